"""README.md and docs/: short enough, in their order, and every link leads somewhere."""

import re

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md",
         *sorted((ROOT / "docs").glob("*.md"))]
ORDER = ["One result", "Start", "Your own text", "Eight GPUs", "Ten terms", "How to read the script",
         "Leaderboard", "Tools"]


def test_the_readme_is_short_and_in_order():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert re.findall(r"^## (.*)$", text, re.M) == ORDER

    terms = text.split("## Ten terms")[1].split("\n## ")[0]
    assert len(re.findall(r"^\| ", terms, re.M)) == 1 + 10  # the heading and ten terms
    introduction = text.split("\n\n")[1]
    assert len(introduction.splitlines()) <= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_tools_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    assert all((page.parent / link).exists() for link in links), links
    tools = set(re.findall(r"\bscripts/\w+\.py\b", text))
    assert all((ROOT / tool).is_file() for tool in tools), tools


@pytest.mark.parametrize("page", PAGES[3:], ids=lambda page: page.stem)
def test_a_page_says_its_purpose_and_the_readme_links_to_it(page):
    title, blank, purpose = page.read_text().splitlines()[:3]
    assert title.startswith("# ") and not blank and purpose.startswith("Purpose: ")
    assert f"(docs/{page.name})" in (ROOT / "README.md").read_text()
