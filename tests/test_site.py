"""scripts/site.py: what the pages say is what the files say, and a browser shows it."""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import browser as pages_in
import leaderboard
import lineage
import pytest
import tables
from browser import DESK, PHONE, serious
from conftest import ROOT, environment
from family import Misuse, load_script, records
from pages import build, compare, figures, found, negative, prose

SITE = load_script(ROOT / "scripts" / "site.py")
PPM = "2026-11-21_BytePPM"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The repository's own site, built once for all workers of a session."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site_of_the_repository"
    with open(f"{shared}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.is_dir():
            assert SITE.main(["--out", str(shared)]) == 0
    return shared


@pytest.fixture
def opened(browser):
    """opened(address, size, dark) -> a page, on which in the end nothing went wrong and that asked for files.
    """
    contexts = []

    def opened(address, size=DESK, dark=False):
        observed = pages_in.Observed(browser, size, dark)
        contexts.append(observed)
        return observed.open(address if isinstance(address, str) else address.as_uri())
    yield opened
    for observed in contexts:
        observed.context.close()
        assert not observed.errors
        assert all(address.startswith(("file://", "data:")) for address in observed.asked), observed.asked


def pages_of(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


# --- The pages of the repository ---


def test_there_is_a_page_for_everything_and_it_is_small(site):
    names = {path.relative_to(site).as_posix() for path in pages_of(site)}
    assert names == {"index.html", "compare.html", "ladder.html", "negative.html",
                     *(f"records/{record.name}.html" for record in records())}
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < build.LIMIT


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.ids = [], set()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values["id"]} if "id" in values else set()
        self.links += [values[name] for name in ("href", "src") if name in values]


def read_links(path: Path) -> Links:
    parser = Links()
    parser.feed(path.read_text())
    return parser


def test_links_lead_somewhere(site):
    anchors = {path: read_links(path) for path in pages_of(site)}
    for path, page in anchors.items():
        assert len(page.links) > 5
        for link in page.links:
            if link.startswith(("https://", "http://", "data:")):
                continue
            place, _, anchor = link.partition("#")
            target = (path.parent / place).resolve() if place else path
            assert target.is_file(), (path, link)
            if anchor and target.name != "compare.html":  # its address says what it shows
                assert anchor in anchors[target].ids, (path, link)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_open_fit_a_phone_and_read_aloud(site, opened, dark):
    """In the light all pages, in the dark those with the most colours; axe reads one of each kind."""
    kinds = [site / name for name in (f"records/{PPM}.html", "compare.html")]
    page = opened(kinds[0], PHONE, dark)
    for path in kinds if dark else pages_of(site):
        page.goto(f"{path.as_uri()}#idea=windows" if path.name == "compare.html" else path.as_uri())
        assert page.locator("h1").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"], path
        if path in kinds or path.parent == site:
            assert serious(page) == [], path


def test_the_leaderboard_sorts_and_filters(site, opened):
    page = opened(site / "index.html")
    titles = "[...document.querySelectorAll('#board-1 tbody tr')].filter(row => !row.hidden)" \
             ".map(row => row.cells[1].querySelector('a').textContent)"
    board = leaderboard.read()
    group, = leaderboard.ranked(board.records)
    assert page.evaluate(titles) == [record.title for record in group]

    heading = page.get_by_role("button", name="bytes", exact=True)
    heading.click()
    by_size = [record.title for record in sorted(group, key=lambda record: record.bytes_total)]
    assert page.evaluate(titles) == by_size
    heading.press("Enter")  # by keyboard, and the other way round
    assert page.evaluate(titles) == by_size[::-1]
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"

    budget = 16_000_000
    page.get_by_label("Budget").select_option(str(budget))
    wanted = {record.title for record in group if record.setting.budget == budget}
    assert 0 < len(wanted) < len(group) and {*page.evaluate(titles)} == wanted
    page.get_by_label("Search").fill("sp1024")
    wanted = [record.title for record in group if record.setting.ids == "sp1024"]
    assert wanted and page.evaluate(titles) == wanted
    assert page.get_by_text(f"{len(wanted)} of {len(group)}").is_visible()


def test_the_leaderboard_has_the_marks_of_the_readme(site):
    text = (site / "index.html").read_text()
    for record in leaderboard.read().records:
        if record.unranked:
            continue
        row = re.search(rf'<a href="records/{record.name}.html">.*?</tr>', text, re.S)[0]
        carried = "carried to" in tables.of_script("seeds", record.folder, None, ROOT)
        assert ('class="mark stale"' in row) == bool(record.stale)
        assert ('class="mark carried"' in row) == carried
        assert f"{record.group.mean:.4f}" in row


# --- Figures ---

# Of each figure its title, its numbers, and where the marks of its dots stand in the picture.
DRAWN = """[...document.querySelectorAll("figure.plot")].map(figure => ({
  title: figure.querySelector("figcaption").textContent.trim(),
  numbers: JSON.parse(figure.querySelector("script.numbers").textContent),
  marks: [...figure.querySelectorAll(".picture svg g[data-series] use")].map(mark => [mark.getAttribute("x"),
    mark.getAttribute("y"), mark.closest("[data-series]").dataset.series].map(Number)),
}))"""


def drawn(page) -> dict[str, dict]:
    return {figure["title"]: figure for figure in page.evaluate(DRAWN)}


def series_of(figure: dict) -> dict[str, list]:
    return {series["name"]: series["points"] for series in figure["numbers"]["series"]}


def place(numbers: dict, point: list[float]) -> list[float]:
    """Where a point has to stand in the picture."""
    left, top, right, bottom = numbers["box"]
    at = []
    for name, value, start, end in zip("xy", point, (left, bottom), (right, top)):
        axis = numbers[name]
        low, high, value = (math.log(each) if axis["log"] else each for each in (*axis["limits"], value))
        at.append(start + (value - low) / (high - low) * (end - start))
    return at


def close(a, b) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-9)
                                    for one, two in zip(a, b) for x, y in zip(one, two))


def test_plots_have_the_points_of_the_files(site, opened):
    group, = leaderboard.ranked(leaderboard.read().records)
    page = opened(site / "index.html")
    board = drawn(page)
    for record in group:
        assert close(series_of(board["Bits per byte against bytes"])[record.title],
                     [[record.bytes_total / 1e6, record.group.mean]])

    record = next(record for record in group if record.name == PPM)
    page.goto((site / f"records/{PPM}.html").as_uri())
    own = drawn(page)
    paths = sorted(record.folder.glob("seed*/metrics.jsonl"))
    band = leaderboard.band(leaderboard.read_curve(path, record) for path in paths)
    losses = series_of(own["Loss by bytes"])
    assert close(losses["BytePPM"], [[point.seen / 1e6, point.mean] for point in band])
    timed = series_of(own["Loss by seconds"])["BytePPM"]
    assert close(timed, [[point.seconds, point.mean] for point in band])
    assert len(losses["validation of the raw weights, a seed a mark"]) == len(paths)

    arms = tables.ablation_arms(record.folder)[1:]
    points = [point for points in series_of(own["Ablation"]).values() for point in points]
    assert close(sorted(points, key=lambda point: point[1]),
                 [[tables.verdict(arm.differences)[0], at] for at, arm in enumerate(arms)])

    # And the marks stand where the numbers say.
    for figure in (*board.values(), *own.values()):
        numbers = figure["numbers"]
        for i, series in enumerate(numbers["series"]):
            wanted = [place(numbers, point) for point in series["points"]]
            marks = [mark for *mark, of in figure["marks"] if of == i]
            if series["kind"] == "dots":
                assert len(marks) == len(wanted)
                for mark, point in zip(sorted(marks), sorted(wanted)):
                    assert math.dist(mark, point) < 0.5, (figure["title"], series["name"])


def test_a_legend_hides_a_line_and_the_pointer_reads_a_point(site, opened):
    page = opened(site / "index.html")
    figure = page.locator("figure.plot").first
    button = figure.get_by_role("button", name="BytePPM")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    index = button.get_attribute("data-toggles")
    assert not figure.locator(f'[data-series="{index}"] use').first.is_visible()
    button.click()
    mark = figure.locator(f'[data-series="{index}"] use').first.bounding_box()
    page.mouse.move(mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2)
    assert figure.locator(".readout").inner_text().startswith("BytePPM. code and artifact")


# --- Two scripts ---

SHOWN = """[...document.querySelectorAll(".symbol")].flatMap(symbol =>
  JSON.parse(symbol.dataset.names).map(name => [name, symbol.dataset.status]))"""


@pytest.mark.parametrize("a, b", [("trunk", PPM), ("2026-11-21_SGJM", PPM), ("trunk", "trunk")])
def test_a_comparison_names_the_symbols_of_lineage(site, opened, a, b):
    page = opened(f"{(site / 'compare.html').as_uri()}#a={a}&b={b}")
    scripts = [ROOT / "train_gpt.py" if name == "trunk" else ROOT / "records" / name / "train_gpt.py"
               for name in (a, b)]
    found_by_lineage = {pair.name: pair.status for pair in lineage.compare(*scripts)}
    different = {name: status for name, status in found_by_lineage.items() if status != "identical"}
    assert dict(page.evaluate(SHOWN)) == different

    if a != b:
        page.get_by_label("equal symbols too").check()
        assert dict(page.evaluate(SHOWN)) == found_by_lineage


def test_a_comparison_by_idea_shows_both_texts_and_settings(site, opened):
    paths = ROOT / "train_gpt.py", ROOT / "records" / PPM / "train_gpt.py"
    scripts = [*map(lineage.Script.read, paths)]
    declared = lineage.read_submission(paths[1].parent, ROOT)[1]
    changed = next(pair.name for pair in lineage.pairs(*scripts, reach=False)
                   if pair.status == "changed" and pair.name in declared)
    idea = declared[changed]
    page = opened(f"{(site / 'compare.html').as_uri()}#a=trunk&b={PPM}&idea={quote(idea)}")
    wanted = {name for name in declared if declared[name] == idea}
    assert {name for name, _ in page.evaluate(SHOWN)} == wanted

    page.get_by_role("button", name="Open all").click()
    symbol = page.locator(".symbol", has=page.get_by_text(changed, exact=True))
    for script, side in zip(scripts, ("left", "right")):
        text = script.by_name[changed].text
        lines = symbol.locator(f".sides > .{side}:not(.void)").all_text_contents()
        assert [line.rstrip() for line in lines] == [line.rstrip() for line in text.splitlines()]

    settings = [*map(lineage.defaults, scripts)]
    names = {name for name in settings[0] | settings[1] if settings[0].get(name) != settings[1].get(name)}
    assert {*page.locator("#settings-table tbody th").all_text_contents()} == names - found.family.OF_THE_RUN


def test_what_did_not_help_can_be_searched(site, opened):
    page = opened(site / "negative.html")
    listed = negative.page(found.Repository.read(ROOT), prose.Prose())["found"]
    assert page.locator("#negative tbody tr").count() == len(listed) > 20
    page.get_by_label("Search").fill("jepa random adapter")
    visible = page.locator("#negative tbody tr:visible").all_inner_texts()
    assert 0 < len(visible) < len(listed) and all("random adapter" in text for text in visible)
    page.get_by_label("Kind").select_option("ladder")
    assert page.locator("#negative tbody tr:visible").count() == 0


# --- Odd files ---

EVIL = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"


def odd_record(root: Path, name: str, **submission) -> Path:
    """A record of three seeds, its texts as evil as its name."""
    folder, script = root / "records" / name, f'"""{EVIL}"""\nprint("{EVIL}")\n'
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_text(script)
    settings = {"ARTIFACT_BUDGET_BYTES": 16_000_000, "MAX_WALLCLOCK_SECONDS": 600.0, "ITERATIONS": 4,
                "TRAIN_BATCH_TOKENS": 8, "NAME": EVIL}
    data = {"name": EVIL, "sha256": "ab" * 32, "variant": EVIL, "train_tokens": 100, "val_documents": 3,
            "bytes": {"train": 100, "val": 1000}}
    for seed in (1, 2, 3):
        bpb = 1.5 + 0.001 * seed
        entry = {"val_loss": bpb * math.log(2), "val_bpb": bpb, "targets": 1000, "bytes": 1000, "seconds": 1,
                 "bits_by_class": {"lower": 900 * bpb, EVIL: 100 * bpb}}
        metrics = {"headline": EVIL, "evals": {EVIL: entry}, "val_bpb": bpb, "seed": seed,
                   "script_sha256": hashlib.sha256(script.encode()).hexdigest(), "params": 12345,
                   "bytes_total": 1_000_000, "bytes_model": 900_000, "bytes_code": 100_000, "device": EVIL,
                   "world_size": 1, "steps": 4, "dataset": data, "torch": "2", "ms_per_step": 1.0,
                   "eval_seconds": 1.0, "settings": settings}
        place = folder / f"seed{seed}"
        place.mkdir()
        (place / "metrics.json").write_text(json.dumps(metrics))
        steps = [{"step": i, "train_loss": 5 / i, "train_seconds": 0.1 * i} for i in (1, 2, 3, 4)]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    (folder / "README.md").write_text(
        f"# {EVIL}\n\n## Legality\n\n{EVIL} [a](javascript:alert(1)) ![b](x.png)\n\n"
        f"## What did not work\n\n- {EVIL}\n\n## Command\n\n```\npython {EVIL}\n```\n")
    told = {"name": EVIL, "date": name[:10], "parent": None, "blurb": EVIL, "val_bpb": 1.502, **submission}
    (folder / "submission.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """(the site of odd files, {record: what is said of it})."""
    root = tmp_path_factory.mktemp("odd")
    (root / "train_gpt.py").write_text("print()\n")
    odd_record(root, "2026-01-01_<script>alert(1)<&>", parent="train_gpt.py", changes={
        EVIL: {"reason": EVIL, "symbols": ["docstring", "print()"]}})
    number = odd_record(root, "2026-01-02_NaN") / "seed1" / "metrics.jsonl"
    number.write_text(number.read_text().replace("2.5", "NaN"))
    half = odd_record(root, "2026-01-03_Half") / "seed2" / "metrics.jsonl"
    half.write_text(half.read_text()[:-20])
    (half.parent.parent / "train_gpt.py").write_text("print('another script')\n")
    broken = odd_record(root, "2026-01-04_Broken") / "seed3" / "metrics.json"
    broken.write_text(broken.read_text()[:100])
    ladder = root / "records" / "ladder" / "evil"
    ladder.mkdir(parents=True)
    (ladder / "ladder.json").write_text(json.dumps({"question": EVIL, "arms": {EVIL: {"why": EVIL}}}))

    made = build.Site(root)
    made.make()
    made.write(root / "site")
    return root / "site", made.problems


def test_odd_files_are_marked(odd):
    site, problems = odd
    said = "\n".join(problems)
    assert re.search(r"2026-01-02_NaN: loss: 1 values .* no numbers", said)
    assert re.search(r"2026-01-03_Half: loss: .*seed2/metrics.jsonl:4: not JSON", said)
    assert re.search(r"records/2026-01-04_Broken: .*seed3/metrics.json: not JSON", said)
    assert "1 values in metrics.jsonl are no numbers" in (site / "records/2026-01-02_NaN.html").read_text()
    board = (site / "index.html").read_text()
    assert "cannot be read" in board and board.count('class="mark stale"') == 1
    assert 'class="mark stale"' in (site / "records/2026-01-03_Half.html").read_text()
    assert not (site / "records/2026-01-04_Broken.html").exists()


def test_odd_files_are_shown_and_never_carried_out(odd, opened):
    site, _ = odd
    page = opened(site / "index.html")
    for path in pages_of(site):
        assert "<script>window" not in path.read_text() and "<img" not in path.read_text()
        page.goto(path.as_uri())
        if path.name == "compare.html":
            page.get_by_role("button", name="Open all").click()
            assert "<script>window.pwned" in page.inner_text("#symbols")
        assert page.evaluate("window.pwned") is None
        assert page.locator("img, a[href^=javascript]").count() == 0
    record = next(path for path in pages_of(site) if "alert" in path.name)
    page.goto(record.as_uri())
    assert page.inner_text("h1").startswith("<script>alert(1)<&>")
    assert "<script>window.pwned = 1</script>" in page.inner_text("section[aria-labelledby=legality]")


# --- Parts ---


def test_highlighting_changes_no_character():
    for script in (ROOT / "train_gpt.py", ROOT / "records" / PPM / "train_gpt.py"):
        for symbol in list(lineage.Script.read(script).symbols)[:200:7]:
            shown = compare.highlighted(symbol.text)
            plain = re.sub("<[^>]*>", "", shown)
            for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
                plain = plain.replace(entity, character)
            assert plain == symbol.text
            assert all(line.count("<i ") == line.count("</i>") for line in shown.split("\n"))


def test_prose_keeps_html_as_words():
    table = f"| a |\n|---|\n| {EVIL} |\n"
    comment = "<!-- number 1.5: of a file,\nover two lines -->\n"
    text = prose.Prose().html(f"{EVIL} [x](javascript:alert(1)) [y](notes.md)\n{comment}\n{table}", "T")
    assert not any(part in text for part in ("<script", "<img", "href", "number 1.5", "over two lines"))
    assert '<div class="scroll" role="region" tabindex="0"' in text


def test_a_number_that_json_lacks_is_refused():
    with pytest.raises(ValueError):
        figures.as_script(math.nan)
    assert figures.as_script("</script>") == '"\\u003c/script\\u003e"'


def test_misuse_is_one_line(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(Misuse, match="something else than a site"):
        SITE.main(["--out", str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(Misuse, match="https://"):
        SITE.main(["--link", "ftp://x", "--out", str(tmp_path / "new")])


def test_the_tools_name_hides_no_module_of_python():
    """scripts/site.py is beside every tool; what they import as `site` is Python's."""
    program = "import site; print(site.__file__); import leaderboard"
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, 'scripts'); {program}"],
                          capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0 and Path(done.stdout.strip()).parent != ROOT / "scripts", done.stderr


def test_an_earlier_site_is_replaced_as_a_whole(odd, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(odd[0], site)
    (site / "records" / "gone.html").write_text("of a record that is gone")
    assert build.may_replace(site)
    made = build.Site(ROOT)
    made.files = {"index.html": "new"}
    made.write(site)
    assert {path.name for path in site.iterdir()} == {"index.html", build.MARK}
    assert not [path for path in tmp_path.iterdir() if path != site]
