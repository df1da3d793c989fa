"""scripts/prose.py on small trees of its own: which numbers are prose and supported, what notes must say."""

import json

import prose
import pytest
import tables
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st


@pytest.fixture
def said(tmp_path):
    """said(text of a record's README, files={name below the tree: JSON}) -> [(line, what is wrong)]."""

    def said(text: str, files: dict | None = None) -> list[tuple[int, str]]:
        path = tmp_path / "records" / "2026-01-02_A" / "README.md"
        for name, tree in (files or {}).items():
            place = tmp_path / "records" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(tree))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return prose.unsupported(path, tmp_path)

    return said


def texts(words: str) -> list[str]:
    return [number.text for number in prose.numbers(prose.prose(words))]


@pytest.mark.parametrize("words, found", [
    ("It has 1,234,567 parameters.", ["1,234,567"]),
    ("It scores 2.1110.", ["2.1110"]),
    ("It scores 2.1110, or less", ["2.1110"]),
    ("## Why 1,000 steps", ["1,000"]),
    ("-0.0354 and +0.0240 and −0.0111, +-0.0030", ["0.0354", "0.0240", "0.0111", "0.0030"]),
    ("1.03 to 1.41, 1.23-1.45, 1.23–1.45", ["1.03", "1.41", "1.23", "1.45", "1.23", "1.45"]),
    ("13 x 512 or 13x512, 459/647 s", ["512", "512", "459", "647"]),
    ("99.8 % and 0.125%", ["99.8", "0.125"]),
    ("**0.0058 better**, (0.0059) [0.0060](x.md)", ["0.0058", "0.0059", "0.0060"]),
    ("3.14e-5 and 1.25e+12", ["3.14e-5", "1.25e+12"]),
    ("seeds 42, 314 and 999", ["314", "999"]),
    ("1e-3, 12 of 60 MB, 0.5, 30", []),
    ("#832, #1196's, 8xH100, SP8192, int256, x86-64", []),
    ("on 2026-11-21, Leslie 1999, in 2023", []),
    ("torch 2.13.0, Python 3.10, transformers 5.22.2", []),
    ("2^200 and 200^2", []),
    ("`SEED=1234`, ``1.234``, https://example.org/1234, [x](../1234.md)", []),
    ("```\n1,234\n```\n", []),
    ("<!-- 1,234\n5.678 -->\n| 1.234 | 5.678 |\n  | 9,999 |\n", []),
    ("<!-- table: seeds records/A -->\n1.234 in 5,678\n<!-- end -->\n", []),
    ("<!-- leaderboard -->\n5,678\n<!-- end -->\n8,888\n<!-- ladder -->\n7,777\n<!-- end -->", ["8,888"]),
])
def test_what_is_a_number(words, found):
    assert texts(words) == found


def test_an_unsupported_number_is_found_on_its_line(said):
    wrong = "stands in no file, and no note says how it follows"
    text = "# A\n\n```\n1,111\n2,222\n```\n\nIt has 3,333 bytes\nand 4,444.\n"
    assert said(text) == [(8, f"3,333 {wrong}"), (9, f"4,444 {wrong}")]
    files = {"2026-01-02_A/deep/er/rows.json": {"rows": [["3,333 bytes"]]}}
    assert said(text, files) == [(9, f"4,444 {wrong}")]


@pytest.mark.parametrize("name, tree, supported", [
    ("2026-01-02_A/seed42/metrics.json", {"evals": {"final": {"val_bpb": 1.2345}}}, True),
    ("2026-01-02_A/measured/rows.json", {"rows": [["1.2345 here", 7]]}, True),
    ("2026-01-02_A/measured/rows.json", {"rows": [[-1.2345]]}, True),
    ("published.json", {"rows": [["#832", "1.23450"]]}, True),
    ("2026-01-01_B/submission.json", {"val_bpb": 1.2345}, True),
    ("2026-01-01_B/submission.json", {"seed_results": {"42": {"val_bpb": 1.2345}}}, True),
    ("2026-01-01_B/submission.json", {"seed_results": {"42": {"eval_seconds": 1.2345}}}, False),
    ("2026-01-01_B/seed42/metrics.json", {"val_bpb": 1.2345}, False),
    ("2026-01-02_A/seed42/metrics.json", {"bits_by_class": {"digit": 1.2345}}, False),
    ("2026-01-02_A/seed42/metrics.json", {"1.2345": "a1.2345", "x": "#1.2345", "y": None}, False),
])
def test_where_a_number_may_stand(said, name, tree, supported):
    assert bool(said("It scores 1.2345.\n", {name: tree})) is not supported


def test_a_table_that_a_tool_wrote_supports_the_prose_below_it(said):
    table = "<!-- table: ablation records/A -->\n| arm | +0.0018 |\n<!-- end -->\n"
    assert not said(f"{table}\nWorse by 0.0018 and by 0.002.\n")
    assert [line for line, _ in said("| arm | +0.0018 |\n\nWorse by 0.0018.\n")] == [3]


@pytest.mark.parametrize("words, supported", [
    ("2.22 MB", True), ("2,222 kB", True), ("2,222,223 bytes", True), ("2.22 million", True),
    ("2.22", False), ("2,222", False), ("2.22 kB", False), ("2.23 MB", False),
    ("45.7 %", True), ("45.7%", True), ("12.3 to 45.7 %", True), ("12.3, 12.3 and 45.7 %", True),
    ("45.7", False), ("45.8 %", False), ("12.3 for 45.7 %", False),
    ("1.75 s", True), ("1.75 seconds", True), ("1.75", False), ("1,749 of 1,749 ms", True),
    ("0.457\nof it, 2.22\nMB", True),
])
def test_a_unit_that_follows_scales(said, words, supported):
    files = {"2026-01-02_A/a.json": {"bytes": 2222223, "share": 0.457, "least": 0.123, "ms": 1749.4}}
    assert bool(said(f"It takes {words} here.\n", files)) is not supported


@given(st.floats(1e-3, 1e7), st.integers(0, 4), st.sampled_from([-1, 0, 1]), st.booleans())
@example(2.11105, 4, 0, False)
@example(0.0005, 3, 1, False)
def test_a_rounding_is_supported_and_a_unit_of_the_last_digit_away_is_not(value, decimals, away, commas):
    written = round(value, decimals) + away * 10.0**-decimals
    text = f"{written:,.{decimals}f}" if commas else f"{written:.{decimals}f}"
    if written < 0:
        return
    near = abs(float(text.replace(",", "")) - value) <= 0.5001 * 10.0**-decimals
    assert prose.supported(prose.Number(text), [value]) is near
    assert near or away  # a rounding is always near
    far = [value - 1.01 * 10.0**-decimals, value + 1.01 * 10.0**-decimals]
    assert away or not prose.supported(prose.Number(text), sorted(far)) or value < 1.01 * 10.0**-decimals


def test_a_note_says_how_a_number_follows(said):
    files = {"2026-01-02_A/a.json": {"base": 1037.2, "plain": 1752.4}}
    text = "The base takes 0.59 of the time.\n<!-- number 0.59: {} -->\n"
    assert not said(text.format("base by plain in a.json, 1,037 by 1,752"), files)
    assert not said(text.format("base by plain in records/*/a.json"), files)
    assert said(text.format("1,038 by 1,752")) == [
        (2, "1,038 in a note stands in no file, and no note says how it follows")]
    assert said(text.format("base by plain in b.json")) == [(2, "a note names b.json: no such file")]
    assert said("<!-- number 0.59 0.60: a.json -->\n\nIt takes 0.60.\n") == [
        (1, "the note on 0.59 has no number to be about")]
    assert not said("It takes 0.59.\n<!-- number 0.59: 777 by 1,752 -->\n<!-- number 777: so it is -->\n")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("# Page\n\nIt has 1,234 bytes.\n")
    for name, text in (("2026-01-02_A", "In 567 steps.\n"), ("ladder/deep", "None.\n\nOr 8,910.\n")):
        (tmp_path / "records" / name).mkdir(parents=True)
        (tmp_path / "records" / name / "README.md").write_text(text)
    (tmp_path / "records" / "2026-01-02_A" / "a.json").write_text('{"bytes": 1234}')
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return tmp_path


def test_tables_reports_numbers_beside_stale_tables(tree, capsys):
    wrong = "stands in no file, and no note says how it follows"
    lines = [f"README.md:3: 1,234 {wrong}", f"records/2026-01-02_A/README.md:1: 567 {wrong}",
             f"records/ladder/deep/README.md:3: 8,910 {wrong}"]
    assert tables.main(["--check"]) == 1 and capsys.readouterr().out.splitlines() == lines
    assert tables.main(["--check", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"stale": [], "unsupported": lines}
    assert tables.main([]) == 0 and capsys.readouterr().out == "all tables agree\n"
    assert tables.main(["--json"]) == 0 and json.loads(capsys.readouterr().out) == {"rewritten": []}


def test_tables_has_nothing_to_say_of_numbers_that_stand_in_files(tree, capsys):
    (tree / "records" / "published.json").write_text('{"rows": [[1234, "567 and 8,910"]]}')
    assert tables.main(["--check"]) == 0 and capsys.readouterr().out == "all tables and numbers agree\n"


def test_rows_may_be_a_part_of_a_file(tree):
    part = {"header": ["script", "BPB"], "rows": [["#832", "2.1110"]]}
    (tree / "records" / "published.json").write_text(json.dumps({"bench": part}))
    page = tree / "README.md"
    page.write_text("<!-- table: rows records published.json#bench -->\n<!-- end -->\n")
    assert "| #832 | 2.1110 |\n<!-- end -->" in tables.rewrite(page, tree)
    page.write_text("<!-- table: rows records published.json#other -->\n<!-- end -->\n")
    with pytest.raises(tables.Misuse, match="table rows of records: its files have no 'other'"):
        tables.rewrite(page, tree)


def test_every_number_of_the_committed_readmes_is_supported():
    found = prose.check(ROOT)
    assert not found, "\n".join(found)
