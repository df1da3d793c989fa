"""A headless Chromium for the tests of pages, and what is looked for on every page."""

import shutil
from contextlib import contextmanager

import pytest

# Nothing but the page: no sandbox in a container, no traffic of its own.
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
           "--disable-background-networking", "--disable-component-update", "--disable-sync"]
NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1440, "height": 900}


@contextmanager
def chromium():
    """A browser; the test is skipped where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    reason = "no playwright: pip install -r requirements-dev.txt"
    sync_api = pytest.importorskip("playwright.sync_api", reason=reason)
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield made
        made.close()


class Observed:
    """A page that keeps what went wrong on it, and what it asked for."""

    def __init__(self, browser, size=DESK, dark=False):
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        self.page, self.errors, self.asked = self.context.new_page(), [], []
        self.page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, address: str):
        self.page.goto(address)
        return self.page


def serious(page) -> list[str]:
    """What axe finds serious or critical, a line each."""
    from axe_playwright_python.sync_playwright import Axe
    options = {"resultTypes": ["violations"], "preload": False}  # it would fetch style sheets of files
    found = Axe().run(page, options=options).response["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found
            if each["impact"] in ("serious", "critical")]
