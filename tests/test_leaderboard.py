"""scripts/leaderboard.py on records of its own: ranks, settings that are kept apart, marks, --check, plots; and on the real ones."""

import hashlib
import json
import math
import re
import shutil
import statistics
import struct
import subprocess
import sys
import zlib

import leaderboard
import pytest
from conftest import ROOT
from family import Misuse

SCRIPT = "print()\n"
PLOTS = ("bytes", "training", "classes")
DRAW = leaderboard.draw


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """An empty repository; what stands for a plot carries its hash alone, see `plots`."""
    def stand_in(name, data):
        text = f"Description\0{leaderboard.digest(data)}".encode()
        return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", len(text), b"tEXt") + text + bytes(4)

    monkeypatch.setattr(leaderboard, "draw", stand_in)
    (tmp_path / "records").mkdir()
    (tmp_path / "README.md").write_text("# A\n\n<!-- leaderboard -->\n<!-- end -->\n\nAfter.\n")
    return tmp_path


@pytest.fixture
def plots(tree, monkeypatch):
    """{name: path} of plots that are drawn."""
    monkeypatch.setattr(leaderboard, "draw", DRAW)
    return {name: tree / "records" / "leaderboard" / f"{name}.png" for name in PLOTS}


@pytest.fixture
def add(tree):
    """add(name, score or {seed: score}, changes of submission, run=changes of metrics) -> the record's folder."""

    def add(name: str, score, run: dict | None = None, settings: dict | None = None, count: int = 1000, **submission):
        scores = score if isinstance(score, dict) else {1: score, 2: score + 0.001, 3: score + 0.002}
        folder = tree / "records" / name
        folder.mkdir()
        (folder / "train_gpt.py").write_text(SCRIPT)
        for seed, bpb in scores.items():
            entry = {"val_loss": bpb * math.log(2), "val_bpb": bpb, "targets": count, "bytes": count,
                     "bits_by_class": {"lower": 0.9 * bpb * count, "space": 0.1 * bpb * count}}
            chosen = {"ARTIFACT_BUDGET_BYTES": 16_000_000, "MAX_WALLCLOCK_SECONDS": 600.0, "ITERATIONS": 9,
                      "TRAIN_BATCH_TOKENS": 8, **(settings or {})}
            metrics = {"headline": "final_x", "evals": {"final_x": entry}, "val_bpb": bpb, "seed": seed,
                       "script_sha256": hashlib.sha256(SCRIPT.encode()).hexdigest(), "params": 12345,
                       "bytes_total": 1_000_000 + seed, "device": "cpu (x)", "world_size": 1, "settings": chosen,
                       "dataset": {"name": "books", "sha256": "ab" * 32}, **(run or {})}
            (folder / f"seed{seed}").mkdir()
            (folder / f"seed{seed}" / "metrics.json").write_text(json.dumps(metrics))
            curve = [{"step": i, "train_loss": 5 / i, "train_seconds": 0.1 * i} for i in (1, 2, 4)]
            lines = [*curve, {"step": 4, "val_loss": 1.3, "val_bpb": 1.9}]
            (folder / f"seed{seed}" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        told = {"name": name, "date": name[:10], "parent": None, "val_bpb": statistics.mean(scores.values())} | submission
        (folder / "submission.json").write_text(json.dumps(told))
        return folder

    return add


def run(tree, *arguments) -> int:
    return leaderboard.main(list(arguments), root=tree)


def table(tree) -> list[list[str]]:
    """Cells of all table rows of the README but headings."""
    text = (tree / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0].isdigit()]


def titles(tree) -> list[str]:
    return [re.match(r"\[(\w+)\]", row[1])[1] for row in table(tree)]


# --- The table ---


def test_records_are_ranked_by_score_and_held_against_parent_or_the_best_before(add, tree):
    add("2026-01-01_Old", 1.9)
    add("2026-01-02_Child", 1.85, parent="records/2026-01-01_Old/train_gpt.py")
    add("2026-01-03_Worse", 1.95, parent="train_gpt.py")
    add("2026-01-04_Late", 1.88, parent="Old")
    add("2026-01-05_Same", {1: 1.8502, 2: 1.8508, 3: 1.8521}, parent="gone")
    assert run(tree) == 0
    assert titles(tree) == ["Child", "Same", "Late", "Old", "Worse"]
    rows = dict(zip(titles(tree), table(tree)))
    assert [row[0] for row in table(tree)] == ["1", "2", "3", "4", "5"]
    assert rows["Old"][6:8] == ["first of its setting", "none"]
    assert rows["Child"][6].startswith("better than Old: -0.0500") and rows["Child"][7] == "2026-01-01_Old"
    assert rows["Worse"][6].startswith("worse than Child: +0.1000") and rows["Worse"][7] == "trunk"  # the best before
    assert rows["Late"][6].startswith("better than Old: -0.0200")  # its parent, though Child was better
    assert rows["Same"][6].startswith("no effect against Child: +0.0000")
    assert "](records/2026-01-02_Child/README.md)" in rows["Child"][1] and rows["Child"][2] == "**1.8510** +- 0.0010"
    assert rows["Child"][4:6] == ["1,000,003", "12,345"]
    text = (tree / "README.md").read_text()
    assert text.startswith("# A\n\n<!-- leaderboard -->\n") and text.endswith("<!-- end -->\n\nAfter.\n")


@pytest.mark.parametrize("changes", [
    {"run": {"dataset": {"name": "books", "sha256": "cd" * 32}}}, {"count": 500},
    {"settings": {"ARTIFACT_BUDGET_BYTES": 2_000_000}}, {"settings": {"MAX_WALLCLOCK_SECONDS": 60.0}},
    {"settings": {"MAX_WALLCLOCK_SECONDS": 0.0}},
])
def test_other_data_or_budgets_are_never_ranked_together(add, tree, changes):
    add("2026-01-01_One", 1.9)
    add("2026-01-02_Other", 1.8, parent="2026-01-01_One", **changes)
    assert run(tree) == 0
    assert [row[0] for row in table(tree)] == ["1", "1"] and set(titles(tree)) == {"One", "Other"}
    assert all(row[6] == "first of its setting" for row in table(tree))
    headings = re.findall(r"^Data `books`.*:$", (tree / "README.md").read_text(), re.M)
    assert len(set(headings)) == 2  # and the reader sees what differs


def test_steps_count_as_a_budget_only_without_a_clock(add, tree):
    add("2026-01-01_One", 1.9)
    add("2026-01-02_Slow", 1.8, settings={"ITERATIONS": 5})
    assert run(tree) == 0 and [row[0] for row in table(tree)] == ["1", "2"]


def test_of_one_day_the_record_without_a_parent_comes_first(add, tree):
    add("2026-01-01_A", 1.8, parent="train_gpt.py")
    add("2026-01-01_B", 1.9)
    assert run(tree) == 0
    assert [row[6][:13] for row in table(tree)] == ["better than B", "first of its "]


def test_stale_and_frozen_marks(add, tree, capsys):
    folder = add("2026-01-01_One", 1.9)
    add("2026-01-02_Two", 1.8, frozen=True)
    assert run(tree) == 0 and "*frozen*" in table(tree)[0][1] and "stale" not in (tree / "README.md").read_text()
    (folder / "train_gpt.py").write_text("print(1)\n")
    assert run(tree, "--check") == 1
    assert run(tree) == 0 and "*stale*" in table(tree)[1][1]
    assert "One is *stale: measured with script `" in (tree / "README.md").read_text()
    capsys.readouterr()
    (tree / "records" / "2026-01-02_Two" / "train_gpt.py").write_text("print(2)\n")
    assert run(tree) == 1 and "FAIL script: 2026-01-02_Two: frozen" in capsys.readouterr().out


def test_records_without_numbers_are_named_and_not_ranked(add, tree, capsys):
    add("2026-01-01_One", 1.9)
    shutil.rmtree(add("2026-01-02_Bare", 1.8) / "seed1")
    for seed in (2, 3):
        (tree / "records" / "2026-01-02_Bare" / f"seed{seed}" / "metrics.json").unlink()
    (add("2026-01-03_Untold", 1.7) / "submission.json").unlink()
    assert run(tree) == 0 and titles(tree) == ["One"]
    text = (tree / "README.md").read_text()
    assert "Not ranked: Bare (no seed*/metrics.json); Untold (no submission.json)." in text
    assert capsys.readouterr().out.count("WARN files") == 2
    for folder in (tree / "records").glob("*/"):
        shutil.rmtree(folder)
    assert run(tree) == 0 and "No record has been measured." in (tree / "README.md").read_text()
    assert not list(tree.glob("records/leaderboard/*.png"))


def test_seeds_of_two_configurations_are_not_ranked(add, tree, capsys):
    folder = add("2026-01-01_One", 1.9)
    path = folder / "seed2" / "metrics.json"
    path.write_text(path.read_text().replace('"ITERATIONS": 9', '"ITERATIONS": 8'))
    assert run(tree) == 1 and table(tree) == []
    assert "ITERATIONS 9 against 8" in capsys.readouterr().out
    assert "Not ranked: One (its runs differ in settings)." in (tree / "README.md").read_text()


@pytest.mark.parametrize("changes", [
    {"run": {"broken_budgets": ["EVAL_BUDGET_SECONDS=1 is broken: 2"]}},
    {"settings": {"ARTIFACT_BUDGET_BYTES": 1_000_000}},
])
def test_a_broken_budget_is_not_ranked(add, tree, capsys, changes):
    add("2026-01-01_One", 1.9)
    add("2026-01-02_Over", 1.8, **changes)
    assert run(tree, "--json") == 1 and titles(tree) == ["One"]
    assert "Not ranked: Over (a budget is broken)." in (tree / "README.md").read_text()
    failed = [each for each in json.loads(capsys.readouterr().out) if each["level"] == "FAIL"]
    assert {each["rule"] for each in failed} == {"budgets"}


def test_a_submission_that_says_another_score_is_found(add, tree, capsys):
    add("2026-01-01_One", 1.9, val_bpb=1.8)
    assert run(tree) == 1
    assert "One/submission.json: val_bpb is 1.8, the mean of the seeds 1.90100000" in capsys.readouterr().out


def test_misuse_names_the_file(add, tree):
    folder = add("2026-01-01_One", 1.9)
    path = folder / "seed2" / "metrics.jsonl"
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(Misuse, match="seed2/metrics.jsonl:5: not JSON"):
        run(tree)
    path.unlink()
    path = folder / "seed2" / "metrics.json"
    kept = path.read_text()
    path.write_text(kept.replace('"bytes_total"', '"total"'))
    with pytest.raises(Misuse, match="2026-01-01_One/seed\\*/metrics.json: no 'bytes_total'"):
        run(tree)
    path.write_text("[]")
    with pytest.raises(Misuse, match="seed2/metrics.json: no `headline`"):
        run(tree)
    path.write_text(kept)
    (tree / "README.md").write_text("# A\n")
    with pytest.raises(Misuse, match="README.md: 0 times `<!-- leaderboard -->`"):
        run(tree)


# --- --check and plots ---


def test_check_fails_after_an_edit_by_hand_and_passes_after_a_rewrite(add, tree):
    folder = add("2026-01-01_One", 1.9)
    assert run(tree, "--check") == 1 and not (tree / "records" / "leaderboard").exists()  # it wrote nothing
    assert run(tree) == 0 and run(tree, "--check") == 0
    readme = tree / "README.md"
    good = readme.read_text()
    readme.write_text(good.replace("1.9010", "1.8010"))
    assert run(tree, "--check") == 1 and "1.8010" in readme.read_text()
    assert run(tree) == 0 and readme.read_text() == good and run(tree, "--check") == 0
    readme.write_text(good + "more\n")
    assert run(tree, "--check") == 0  # text outside the markers is free
    path = folder / "seed1" / "metrics.jsonl"  # a number that only a plot shows
    path.write_text(path.read_text().replace("2.5", "2.6"))
    assert run(tree, "--check") == 1 and run(tree) == 0 and run(tree, "--check") == 0


def pixels(path) -> tuple[int, int, set]:
    """Width, height and the set of byte values in the uncompressed image data of a PNG."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    at, data = 8, b""
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        data += content[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    return width, height, set(zlib.decompress(data))


def test_plots_are_images_that_depend_on_the_numbers_alone(add, tree, plots):
    add("2026-01-01_One", 1.9)
    add("2026-01-02_Two", {1: 1.8}, parent="One")
    add("2026-01-03_Else", 1.7, count=500)
    assert run(tree) == 0
    first = {name: path.read_bytes() for name, path in plots.items()}
    for path in plots.values():
        width, height, values = pixels(path)
        assert width >= 900 and height >= 800 and len(values) > 50 and path.stat().st_size > 10_000
        path.unlink()
    assert len(set(first.values())) == len(PLOTS) and "Software" not in str(first)
    assert run(tree, "--check") == 1 and run(tree) == 0
    assert {name: path.read_bytes() for name, path in plots.items()} == first
    text = (tree / "README.md").read_text()
    assert all(f"](records/leaderboard/{name}.png)" in text for name in PLOTS)


def test_a_plot_is_judged_by_its_numbers_and_drawn_only_when_they_change(add, tree, plots):
    add("2026-01-01_One", 1.9)
    assert run(tree) == 0
    path = plots["bytes"]
    content = path.read_bytes()
    other = content[:-12] + struct.pack(">I4s", 1, b"tIME") + b"\0" * 5 + content[-12:]  # as another matplotlib would
    path.write_bytes(other)
    assert run(tree, "--check") == 0 and run(tree) == 0 and path.read_bytes() == other
    stored = leaderboard.stored_digest(path)
    path.write_bytes(content.replace(stored.encode(), b"0" * 64))
    assert run(tree, "--check") == 1 and run(tree) == 0 and leaderboard.stored_digest(path) == stored
    path.write_bytes(b"no image")
    assert leaderboard.stored_digest(path) is None and run(tree, "--check") == 1


def test_a_plot_without_numbers_goes(add, tree):
    folder = add("2026-01-01_One", 1.9)
    assert run(tree) == 0
    for path in folder.glob("seed*/metrics.jsonl"):
        path.unlink()
    assert run(tree, "--check") == 1 and run(tree) == 0 and run(tree, "--check") == 0
    assert not (tree / "records" / "leaderboard" / "training.png").exists()
    assert "training.png" not in (tree / "README.md").read_text()


def test_the_repositorys_leaderboard_is_that_of_its_records():
    call = [sys.executable, str(ROOT / "scripts" / "leaderboard.py")]
    done = subprocess.run([*call, "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    probe = "import leaderboard, sys; print({'torch', 'numpy', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT / "scripts", capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
