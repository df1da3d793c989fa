"""scripts/watch.py on runs that are written by hand: numbers, odd lines, runs that die, the page, exports."""

import csv
import fcntl
import json
import math
import os
import subprocess
import sys
import threading
import types
import urllib.error
import urllib.request
from pathlib import Path

import browser as pages_in
import pytest
import watch
import watch_export
import watch_web
import watched
from browser import serious
from conftest import ROOT
from family import LOG_RULER, Misuse
from watched import Against, Follower, Watched

SETTINGS = {"ITERATIONS": 100, "TRAIN_BATCH_TOKENS": 1000, "NUM_LAYERS": 2, "MODEL_DIM": 8, "NUM_HEADS": 2,
            "NUM_KV_HEADS": 1, "MLP_MULT": 2.0, "VOCAB_SIZE": 260, "TRAIN_SEQ_LEN": 16}
DATA = {"name": "books", "sha256": "ab" * 32, "bytes": {"train": 400}, "train_tokens": 100}  # 4 bytes a token


def step(i: int, loss: float, **more) -> dict:
    """A line as a run writes it: two steps a second."""
    return {"step": i, "train_loss": loss, "train_seconds": i / 2, "progress": i / 100, "rate": 1.0, **more}


@pytest.fixture(autouse=True)
def as_it_is(monkeypatch):
    """The test's own process keeps its priority."""
    monkeypatch.setattr(os, "nice", lambda by: 0)


@pytest.fixture
def make(tmp_path):
    """make(name, lines) -> the folder of a run."""
    def make(name: str, lines=(), settings=None) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        told = f"settings {json.dumps({**SETTINGS, **(settings or {})})}\ndata {json.dumps(DATA)}\n"
        head = b'settings {"ITERATIONS": 1}  # of the source\n'
        (folder / "log.txt").write_bytes(head + LOG_RULER + told.encode() + b"val: targets:10 bytes:40\n")
        write(folder, lines)
        return folder
    return make


def write(folder: Path, lines) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def looked(folder: Path, **more) -> watched.Row:
    run = Watched(folder)
    run.read()
    return watched.row(run, **more)


# --- Lines ---


def test_a_line_is_read_once_and_when_it_is_whole(make):
    folder = make("a", [step(1, 5.0)])
    lines = Follower(folder / "metrics.jsonl")
    assert [entry["step"] for entry in lines.read()] == [1]
    whole = json.dumps(step(2, 4.0))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(whole[:20])
        file.flush()
        assert lines.read() == [] and lines.cut and not lines.unreadable
        file.write(whole[20:] + "\n")
    assert [entry["train_loss"] for entry in lines.read()] == [4.0]
    assert not lines.cut and lines.read() == []


def test_odd_lines_are_counted_and_the_rest_is_read(make):
    folder = make("a", [step(1, 5.0)])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "train\n[1]\n\xff\xfe\n{"step": "x", "train_loss": 1}\n\n')
        file.write(b'{"step": 4, "train_loss": "low"}\n{"step": 5, "train_loss": 1, "progress": "half"}\n')
    write(folder, [step(3, math.nan), step(4, 3.0), step(4, 2.0)])
    row = looked(folder)
    assert row.step == 4 and row.bpb == pytest.approx(2.0 / math.log(2) / 4)  # the last line of a step counts
    assert row.marks == ("6 lines cannot be read", "1 losses are no numbers")


def test_a_file_that_begins_anew_is_read_anew(make):
    folder = make("a", [step(i, 5.0) for i in range(1, 9)])
    lines = Follower(folder / "metrics.jsonl")
    lines.read()
    (folder / "metrics.jsonl").write_text(json.dumps(step(1, 6.0)) + "\n")
    lines.read()
    assert {i: entry["train_loss"] for i, entry in lines.steps.items()} == {1: 6.0}


# --- Numbers ---


def test_the_numbers_of_a_row(make):
    folder = make("a", [*(step(i, 4.0) for i in range(1, 21)), {"step": 20, "val_loss": 4.0, "val_bpb": 1.5}])
    row = looked(folder, peak=1e6)
    assert (row.step, row.steps, row.val_bpb, row.seen) == (20, 100, 1.5, 80_000)
    assert row.loss == pytest.approx(4.0) and row.bpb == pytest.approx(4.0 / math.log(2) / 4)
    assert row.bytes_per_second == pytest.approx(2 * 1000 * 4)

    blocks, head = 2 * 8 * (2 * 8 + 2 * 4 + 2 * 16), 260 * 8
    flop = 6 * (blocks + head) + 6 * 2 * 16 * 8
    assert row.mfu == pytest.approx(2 * 1000 * flop / 1e6)
    assert watched.flop_per_token({**SETTINGS, "PATCH_SIZE": 4}) is None


def test_time_left_is_that_of_a_run_that_trains(make, monkeypatch):
    folder = make("a", [step(20, 4.0)])
    monkeypatch.setattr(watched, "holder", lambda path: os.getpid())
    row = looked(folder)
    assert row.state == "training" and row.left == pytest.approx(10 * 0.8 / 0.2) and row.memory_mb > 1
    write(folder, [step(100, 3.0)])
    row = looked(folder)
    assert row.state == "scoring" and row.left is None
    monkeypatch.setattr(watched, "holder", lambda path: 0)
    assert looked(folder).state == "died"


def test_a_run_is_held_against_a_record_at_equal_bytes(make):
    against = Against.read("2026-11-29_Trunk")
    assert against.data == "06a68b840b042aa4031e3effbc05bacc18f6ba9fbc5b0f66d0c77e8ed3e7219f"
    own = sorted(against.lines.items())[:400]
    assert against.difference([(seen, 1.0, loss + 0.25) for seen, loss in own], []) == pytest.approx(0.25)
    # Other places: the smoothed curves, between the record's points.
    first, second = against.band[100], against.band[101]
    middle = math.sqrt(first.seen * second.seen)
    smooth = [(middle, (first.mean + second.mean) / 2 - 0.1)]
    assert against.difference([(middle, 1.0, 9.0)], smooth) == pytest.approx(-0.1)
    assert against.difference([(1e12, 1.0, 9.0)], [(1e12, 9.0)]) is None

    assert looked(make("a", [step(i, 4.0) for i in range(1, 30)]), against=against).other_data


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="no /proc/locks: a kernel that does not tell")
def test_a_run_that_is_killed_is_seen(make):
    """A process of its own holds the lock as a run does, and is killed without a word."""
    folder = make("a", [step(20, 4.0)])
    program = f"import fcntl, sys; f = open({str(folder / 'log.txt')!r}); fcntl.flock(f, fcntl.LOCK_EX); " \
              "print(flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    assert watched.holder(folder / "log.txt") == process.pid and watched.in_progress(folder)
    assert looked(folder).state == "training"
    process.kill()
    process.wait()
    assert looked(folder).state == "died" and not watched.in_progress(folder)
    with open(folder / "log.txt") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nothing of the watcher holds it


def test_looking_changes_nothing(make, capsys):
    folder = make("a", [step(i, 4.0) for i in range(1, 30)])
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert watch.main([str(folder), "--once"]) == 0
    assert watch.main([str(folder), "--json"]) == 0
    folder.chmod(0o755)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before
    table, listed = capsys.readouterr().out.split("[", 1)
    assert "29 of 100" in table and json.loads(f"[{listed}")[0]["step"] == 29


def test_a_finished_run_has_its_score(make):
    folder = make("a", [step(100, 4.0)])
    (folder / "metrics.json").write_text(json.dumps({"val_bpb": 1.25, "peak_mem_mb": 12.0}))
    row = looked(folder)
    assert (row.state, row.val_bpb, row.memory_mb, row.left) == ("finished", 1.25, 12.0, None)
    os.utime(folder / "metrics.json", (0, 0))  # of an earlier part of a run that goes on
    assert looked(folder).state != "finished"


def test_misuse_is_one_line(tmp_path):
    (tmp_path / "runs").mkdir()
    for call, text in ((["nosuch"], "no folder of a run"), (["--every", "0"], "--every"),
                       (["--export", "csv"], "--out"), (["--peak", "-1"], "--peak"),
                       (["--against", "nosuch"], "nosuch")):
        with pytest.raises(Misuse, match=text):
            watch.main(["--folder", str(tmp_path / "runs"), *call])


def test_a_narrow_terminal_loses_columns_and_not_words():
    line = {"run": "a" * 20, "state": "training", "step": "1 of 2", "text": "1 MB", "BPB": "1.0000",
            "memory": "1.5 GB", "left": "1:00:00"}
    assert watch.fitting([line], 200) == [*line]
    assert watch.fitting([line], 64) == ["run", "state", "step", "text", "BPB", "left"]
    assert watch.fitting([line], 20) == ["run", "state", "step", "BPB"]


# --- Other tools ---


def test_csv_has_every_number(make, tmp_path):
    lines = [step(1, 4.0, extra=0.5), step(2, math.nan), {"step": 2, "val_loss": 3.0, "val_bpb": 1.5}]
    folder, out = make("a", lines), tmp_path / "a.csv"
    assert watch.main([str(folder), "--export", "csv", "--out", str(out), "--once"]) == 0
    rows = list(csv.DictReader(out.open()))
    found = {(row["step"], row["name"]): float(row["value"]) for row in rows}
    assert found["1", "train_loss"] == 4.0 and found["1", "extra"] == 0.5 and found["2", "val_bpb"] == 1.5
    assert found["1", "bytes"] == 4000 and found["1", "train_bpb"] == pytest.approx(1 / math.log(2))
    assert ("2", "train_loss") not in found and {row["run"] for row in rows} == {"a"}
    with pytest.raises(Misuse, match="there already"):
        watch.main([str(folder), "--export", "csv", "--out", str(out), "--once"])


def test_wandb_is_offline_unless_told(make, tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda **kind: logged.append(kind) or run
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = make("a", [step(1, 4.0)])
    assert watch.main([str(folder), "--export", "wandb", "--out", str(tmp_path / "w"), "--once"]) == 0
    assert os.environ.pop("WANDB_MODE") == "offline"
    assert logged[0]["config"]["ITERATIONS"] == 100
    assert logged[1][0] == 1 and logged[1][1]["train_loss"] == 4.0


def test_a_tool_that_is_missing_is_named(tmp_path, monkeypatch):
    for kind in watch_export.NEEDS:
        monkeypatch.setitem(sys.modules, kind, None)
        with pytest.raises(Misuse, match=f"{kind} is not installed: pip install {kind}=="):
            watch_export.exporter(kind, tmp_path / kind)


# --- The page ---


@pytest.fixture
def served(make):
    """(address, folder of its run) of a page."""
    folder = make("<script>window.pwned=1</script>".replace("/", "|"), [step(i, 4.0) for i in range(1, 20)])
    options = watch.arguments().parse_args([str(folder), "--every", "0.5", "--against", "2026-11-29_Trunk"])
    server = watch_web.server(watch.Watch(options), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", folder
    server.shutdown()
    server.server_close()


def status(address: str, **headers) -> int:
    try:
        return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_page_is_for_this_machine_and_gives_no_other_file(served):
    address, _ = served
    assert status(address) == status(f"{address}site.css") == 200
    assert status(address, Host="evil.example") == 421
    for path in ("..%2Fbuild.py", "../build.py", "x.css", "/etc/passwd"):
        assert status(f"{address}{path}") == 404


def test_the_page_follows_the_run(served, browser):
    address, folder = served
    page_of = pages_in.Observed(browser)
    page = page_of.open(address)
    assert page.get_by_text("19 of 100").is_visible() and page.locator("figure.plot svg").count() > 1
    assert serious(page) == []
    write(folder, [step(77, 3.0)])
    page.get_by_text("77 of 100").wait_for(timeout=10_000)

    button = page.get_by_role("button", name="Trunk, for comparison")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"  # the new figure answers too
    assert page.evaluate("window.pwned") is None and not page_of.errors
    assert all(asked.startswith((address, "data:")) for asked in page_of.asked)
    page_of.context.close()


def test_the_tool_starts_from_anywhere(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "watch.py"), "--once"], cwd=tmp_path,
                          capture_output=True, text=True)
    told = "--folder runs: no such folder; `make train` makes a first run, --folder names another place"
    assert done.returncode == 2 and done.stderr == f"error: {told}\n"
