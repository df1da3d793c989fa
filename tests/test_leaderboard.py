"""scripts/leaderboard.py and scripts/texts.py on records of their own, and on the real ones: ranks,
texts that are kept apart, parents, marks, --check, plots."""

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
import texts
from conftest import ROOT, environment
from family import Misuse

SCRIPT = "print()\n"
PLOTS = ("bytes", "training", "classes")
DRAW = leaderboard.draw


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """An empty repository; a stand-in for a plot carries only its hash, see `plots`."""
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
    """add(name, score or {seed: score}, changes of submission, run=changes of metrics) -> its folder."""

    def add(name, score, run=None, settings=None, count=1000, dataset=None, **submission):
        scores = score if isinstance(score, dict) else {1: score, 2: score + 0.001, 3: score + 0.002}
        data = {"name": "books", "sha256": "ab" * 32, "variant": "byte260", "train_tokens": 100,
                "bytes": {"train": 100, "val": 1000}, "val_documents": 3, **(dataset or {})}
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
                       "bytes_total": 1_000_000 + seed, "device": "cpu (x)", "world_size": 1,
                       "steps": chosen["ITERATIONS"], "settings": chosen, "dataset": data, **(run or {})}
            (folder / f"seed{seed}").mkdir()
            (folder / f"seed{seed}" / "metrics.json").write_text(json.dumps(metrics))
            curve = [{"step": i, "train_loss": 5 / i, "train_seconds": 0.1 * i} for i in (1, 2, 4)]
            lines = [*curve, {"step": 4, "val_loss": 1.3, "val_bpb": 1.9}]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"seed{seed}" / "metrics.jsonl").write_text(text)
        told = {"name": name, "date": name[:10], "parent": None, "val_bpb": statistics.mean(scores.values()),
                **submission}
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


def rows_of(tree) -> dict[str, dict[str, str]]:
    """{record: {heading: cell}}."""
    return {title: dict(zip(leaderboard.HEADER, row)) for title, row in zip(titles(tree), table(tree))}


def test_records_are_ranked_by_score_and_held_against_their_parents(add, tree):
    add("2026-01-01_Old", 1.9)
    add("2026-01-02_Child", 1.85, parent="records/2026-01-01_Old/train_gpt.py")
    add("2026-01-03_Worse", 1.95, parent="Child")
    add("2026-01-04_Late", 1.88, parent="Old")
    add("2026-01-05_Same", {1: 1.8502, 2: 1.8508, 3: 1.8521}, parent="records/2026-01-02_Child")
    add("2026-01-06_Orphan", 1.99, parent="records/gone")
    assert run(tree) == 0
    assert titles(tree) == ["Child", "Same", "Late", "Old", "Worse", "Orphan"]
    assert [row[0] for row in table(tree)] == ["1", "2", "3", "4", "5", "6"]

    rows = rows_of(tree)
    verdicts = {title: row["verdict"] for title, row in rows.items()}
    assert verdicts["Old"] == "no parent" and rows["Old"]["parent"] == "none"
    assert re.fullmatch(r"better than Old: -0\.0500 \(.*\)", verdicts["Child"])  # and nothing else differs
    assert rows["Child"]["parent"] == "2026-01-01_Old"
    assert verdicts["Worse"].startswith("worse than Child: +0.1000")
    assert verdicts["Late"].startswith("better than Old: -0.0200")  # its parent, though Child was better
    assert verdicts["Same"].startswith("no effect against Child: +0.0000")
    assert verdicts["Orphan"] == "its parent is not measured on this text"

    child = rows["Child"]
    assert "](records/2026-01-02_Child/README.md)" in child["record"]
    assert child["BPB"] == "**1.8510** +- 0.0010"
    assert [child[key] for key in ("bytes", "budget", "training bytes", "parameters", "ids")] == [
        "1,000,003", "16,000,000", "72 in 600 s", "12,345", "byte260"]
    text = (tree / "README.md").read_text()
    assert text.startswith("# A\n\n<!-- leaderboard -->\n") and text.endswith("<!-- end -->\n\nAfter.\n")
    assert f"Text `books` ({'ab' * 4}), 1,000 bytes in 3 documents:" in text


def test_the_trunks_record_is_the_parent_of_those_that_start_from_it(add, tree):
    add("2026-01-01_Baseline", 1.9, trunk=True, frozen=True)
    add("2026-01-02_Child", {1: 1.8, 2: 1.81, 3: 1.82, 4: 9.0}, parent="train_gpt.py")
    assert run(tree) == 0
    assert rows_of(tree)["Child"]["verdict"].startswith("better than Baseline: -0.0")
    assert rows_of(tree)["Baseline"]["verdict"] == "no trunk before it"

    # The latest takes its place, though it is younger than the child; only shared seeds count.
    add("2026-01-09_Trunk", {1: 1.85, 2: 1.86, 3: 1.872}, trunk=True, parent="train_gpt.py")
    add("2026-01-10_Named", 1.7, parent="records/2026-01-01_Baseline")
    assert run(tree) == 0
    rows = rows_of(tree)
    assert rows["Child"]["verdict"].startswith("better than Trunk: -0.0507 (")
    assert rows["Child"]["parent"] == "trunk"
    assert rows["Trunk"]["verdict"].startswith("better than Baseline: -0.04")
    assert rows["Baseline"]["verdict"] == "no trunk before it"
    assert rows["Named"]["verdict"].startswith("better than Baseline: -0.2")


def test_other_ids_of_one_text_share_a_table_and_the_verdict_says_so(add, tree):
    pieces = {"sha256": "cd" * 32, "variant": "sp1024", "train_tokens": 40, "name": "pieces"}
    known = {"12" * 32: {"name": "novels", "bytes": 1000, "documents": 3,
                         "datasets": {"ab" * 32: "byte260", "cd" * 32: "sp1024"},
                         "spelled": {"sp1024": 990, "sp512": 800}}}
    (tree / "records" / "texts.json").write_text(json.dumps(known))
    add("2026-01-01_Trunk", 1.9, trunk=True)
    add("2026-01-02_Pieces", 1.8, parent="train_gpt.py", dataset=pieces, count=990,
        settings={"ARTIFACT_BUDGET_BYTES": 2_000_000, "MAX_WALLCLOCK_SECONDS": 0.0,
                  "TRAIN_ORDER": "shuffled"})
    # One that says itself which text it is, of ids that the file does not know.
    add("2026-01-03_Says", 1.7, parent="train_gpt.py",
        dataset={"sha256": "ef" * 32, "val_text_sha256": "12" * 32, "variant": "sp512"})
    assert run(tree) == 0

    rows = rows_of(tree)
    assert titles(tree) == ["Says", "Pieces", "Trunk"] and [row[0] for row in table(tree)] == ["1", "2", "3"]
    assert [rows[name]["ids"] for name in titles(tree)] == ["sp512", "sp1024", "byte260"]
    assert rows["Says"]["verdict"].endswith("); other ids")
    wanted = ("; other ids, other budget, other time limit, other divisor, other order of rows, "
              "other training bytes")
    assert rows["Pieces"]["verdict"].endswith(wanted)
    assert rows["Pieces"]["training bytes"] == "180"  # 9 steps of 8 ids, 2.5 bytes each
    text = (tree / "README.md").read_text()
    # both numbers, where a record has the text's bytes and its ids spell fewer
    found = re.search(r"Says's ids spell 800 of the 1,000 bytes, .*would have ([\d.]+)\.\n", text)
    assert float(found[1]) == pytest.approx(1.701 * 1000 / 800, abs=1e-4)
    assert text.count("Text `novels` (12121212), 1,000 bytes in 3 documents:") == 1
    assert text.count("its bits are divided by 990 bytes instead of 1,000") == 1


@pytest.mark.parametrize("changes, heading", [
    ({"dataset": {"sha256": "cd" * 32}}, "`books` (cdcdcdcd), 1,000 bytes"),
    ({"dataset": {"val_text_sha256": "cd" * 32}}, "`books` (cdcdcdcd), 1,000 bytes"),
    ({"settings": {"VAL_BYTES": 500}, "count": 500}, "3 documents, scored on its first 500 bytes"),
])
def test_other_texts_are_never_ranked_together(add, tree, changes, heading):
    add("2026-01-01_One", 1.9)
    add("2026-01-02_Other", 1.8, parent="2026-01-01_One", **changes)
    assert run(tree) == 0
    assert [row[0] for row in table(tree)] == ["1", "1"] and set(titles(tree)) == {"One", "Other"}
    assert rows_of(tree)["Other"]["verdict"] == "its parent is not measured on this text"
    headings = re.findall(r"^Text `books`.*:$", (tree / "README.md").read_text(), re.M)
    assert len(set(headings)) == 2 and sum(heading in line for line in headings) == 1


def test_a_prefix_as_long_as_the_text_is_the_text(add, tree):
    add("2026-01-01_One", 1.9)
    add("2026-01-02_All", 1.8, settings={"VAL_BYTES": 1000})
    assert run(tree) == 0 and [row[0] for row in table(tree)] == ["1", "2"]


def test_under_a_clock_a_faster_script_may_see_more_text(add, tree):
    add("2026-01-01_One", 1.9)
    add("2026-01-02_Slow", 1.8, run={"steps": 5}, parent="One")
    for name in ("2026-01-03_Free", "2026-01-04_Less"):
        steps = {"run": {"steps": 5}, "parent": "Free"} if "Less" in name else {}
        add(name, 1.7, settings={"MAX_WALLCLOCK_SECONDS": 0.0}, **steps)
    assert run(tree) == 0
    rows = rows_of(tree)
    assert rows["Slow"]["training bytes"] == "40 in 600 s" and rows["Slow"]["verdict"].endswith(")")
    assert rows["Less"]["training bytes"] == "40"
    assert rows["Less"]["verdict"].endswith("; other training bytes")


def test_stale_and_frozen_marks(add, tree, capsys):
    folder = add("2026-01-01_One", 1.9)
    add("2026-01-02_Two", 1.8, frozen=True)
    assert run(tree) == 0 and "*frozen*" in table(tree)[0][1]
    assert "stale" not in (tree / "README.md").read_text()
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


def test_the_last_line_of_a_repeated_step_counts(add, tree):
    """A run that went on from a checkpoint has written some steps twice."""
    folder = add("2026-01-01_One", 1.9)
    path = folder / "seed1" / "metrics.jsonl"
    again = [{"step": i, "train_loss": 4 / i, "train_seconds": 0.5 * i} for i in (2, 4)]
    path.write_text(path.read_text() + "".join(json.dumps(line) + "\n" for line in again))
    record = leaderboard.read_record(folder, {})
    train = leaderboard.read_curve(path, record)["train"]
    assert [seconds for _, seconds, _ in train] == [0.1, 1.0, 2.0]
    assert [bpb * math.log(2) * record.bytes_a_token for *_, bpb in train] == pytest.approx([5, 2, 1])


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


def test_texts_are_named_by_their_fingerprints(trunk, tiny, prepare, tree, tmp_path, capsys):
    """scripts/texts.py computes what the scripts do, and refuses folders of different texts."""
    words = "The quick brown fox jumps over the lazy dog. "
    (tmp_path / "t.txt").write_text(words * 300)
    (tmp_path / "v.txt").write_text(words[::-1] * 20)
    (tmp_path / "w.txt").write_text(words[::-1] * 21)

    def make(name: str, val: str, *options) -> str:
        call = ["files", str(tmp_path / "t.txt"), "--val", str(tmp_path / val), "--overlap", "off"]
        assert prepare.main([*call, "--out", str(tmp_path / name), *options]) == 0
        return str(tmp_path / name)

    plain, small = make("a", "v.txt"), make("b", "v.txt", "--shard-tokens", "5000")
    other = make("c", "w.txt")
    assert texts.main(["dogs", plain, small], tree) == 0
    known = json.loads((tree / texts.TEXTS).read_text())
    (sha256, entry), = known.items()
    prints = {trunk.Dataset(tiny(DATA_PATH=folder), True).fingerprint()["sha256"]
              for folder in (plain, small)}
    assert len(prints) == 2 and entry["datasets"] == dict.fromkeys(sorted(prints), "byte260")
    assert entry["spelled"] == {}  # bytes spell all of it
    assert sha256 == json.loads((tmp_path / "a" / "manifest.json").read_text())["val_text_sha256"]
    assert (entry["name"], entry["bytes"], entry["documents"]) == ("dogs", 20 * len(words), 1)

    with pytest.raises(Misuse, match="c: its validation text is"):
        texts.main(["dogs", plain, other], tree)
    assert json.loads((tree / texts.TEXTS).read_text()) == known
    assert texts.main(["more", other], tree) == 0 and len(json.loads((tree / texts.TEXTS).read_text())) == 2
    with pytest.raises(Misuse, match="no \\*_train_\\*.bin"):
        texts.fingerprint(tmp_path)
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "texts.py"), "x", str(tmp_path / "gone")],
                          capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 2 and "gone/manifest.json" in done.stderr and "Traceback" not in done.stderr


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


def test_curves_are_bits_per_byte_over_bytes_and_smooth(add, tree):
    add("2026-01-01_One", 1.9, dataset={"train_tokens": 40})  # 2.5 bytes an id, 20 a step
    assert run(tree) == 0
    (group,) = leaderboard.read(tree).plots["training"]["groups"]
    curve = group["records"][0]["seeds"]["1"]
    assert [point[:2] for point in curve["train"]] == [[20, 0.1], [40, 0.2], [80, 0.4]]
    bits = [5 / i / math.log(2) / 2.5 for i in (1, 2, 4)]
    assert [point[2] for point in curve["train"]] == pytest.approx(bits)
    assert curve["val"] == [[80, 1.9]]

    # A point is the mean of all points within 10 % of its bytes; far ones are left out.
    found = leaderboard.smooth([[110.0, 3.0, 3.0], [100.0, 2.0, 2.0], [10.0, 1.0, 9.0], [95.0, 1.5, 1.0]])
    assert found == {10.0: (1.0, 9.0), 95.0: (1.5, 1.5), 100.0: (2.0, 2.0), 110.0: (3.0, 2.5)}


def test_plots_are_images_that_depend_only_on_the_numbers(add, tree, plots):
    add("2026-01-01_One", 1.9)
    add("2026-01-02_Two", {1: 1.8}, parent="One")
    add("2026-01-03_Else", 1.7, dataset={"sha256": "cd" * 32})
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
    # As another matplotlib would write it.
    other = content[:-12] + struct.pack(">I4s", 1, b"tIME") + b"\0" * 5 + content[-12:]
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
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT / "scripts", capture_output=True, text=True,
                          timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
