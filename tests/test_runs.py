"""scripts/run_seeds.py and scripts/sweep.py: what runs,
what is skipped or resumed, failures, placement, summaries."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import run_seeds
import stats
import sweep
import tables
from conftest import ROOT, slow
from family import Misuse

TOOL = [sys.executable, str(ROOT / "scripts" / "run_seeds.py")]
# A script of this family as far as a scheduler sees it: its score is LR + SEED / 1000.
FAKE = '''
import hashlib, json, os, signal, sys, time
from pathlib import Path
seed, lr = int(os.environ.get("SEED", "0")), float(os.environ.get("LR", "1.0"))
folder = Path(os.environ.get("RUNS_PATH", "runs"), os.environ.get("RUN_ID", "run"))
resume = os.environ.get("RESUME", "") == "auto"
began = time.time()
with open(folder / "log.txt", "a") as log:
    log.write(f"resumed {resume}\\n")
(folder / "metrics.jsonl").write_text('{"step": 3}\\n')
if os.environ.get("JUDGE", "0") == "1":
    folders = os.environ.get("OURS", ""), os.environ.get("THEIRS", "")
    ours, theirs = (json.loads(Path(name, "metrics.json").read_text()) for name in folders)
    report = {"nll": ours["val_bpb"], "pair": [ours["val_bpb"], theirs["val_bpb"]], "lr": lr, "nan": None,
              "radius": int(os.environ.get("RADIUS", "6"))}
    (folder / "report.json").write_text(json.dumps(report))
    sys.exit(int(os.environ.get("JUDGED", "1")))
if os.environ.get("MODE", "") == "fail" and seed == 2:
    print("first line\\nthe reason")
    sys.exit(7)
if os.environ.get("MODE", "") in ("wait", "deaf") and not resume:
    def save(*_):
        (folder / "last.safetensors").write_text("step 3")
        sys.exit(130)
    signal.signal(signal.SIGINT, save if os.environ.get("MODE", "") == "wait" else signal.SIG_IGN)
    print("waiting", flush=True)
    while not Path("go").exists() and time.time() < began + 60:
        time.sleep(0.05)
time.sleep(float(os.environ.get("SLEEP", "0")))
bpb, over = lr + seed / 1000, os.environ.get("MODE", "") == "over"
entry = {"val_loss": bpb, "val_bpb": bpb, "bytes": 100, "targets": 100, "seconds": 1.0}
metrics = {"val_bpb": bpb, "headline": "final", "evals": {"final": entry}, "seed": seed, "bytes_total": 30,
           "bytes_model": 20, "ms_per_step": 2.0, "steps": 3, "train_seconds": 1.0, "eval_seconds": 1.0,
           "device": "cpu", "torch": "2",
           "dataset": {"name": "d", "sha256": "d"}, "settings": {"LR": lr, "SEED": seed},
           "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
           "broken_budgets": ["EVAL_BUDGET_SECONDS=1 is broken: 2"] * over,
           "seen": {"cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
                    "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
                    "threads": os.environ.get("OMP_NUM_THREADS", ""),
                    "time": [began, time.time()]}}
(folder / "metrics.json").write_text(json.dumps(metrics))
sys.exit(3 if over else 0)
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder with the fake script in A/train_gpt.py."""
    monkeypatch.chdir(tmp_path)
    for name in ("LR", "MODE", "SLEEP", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "train_gpt.py").write_text(FAKE)
    return tmp_path


@pytest.fixture
def go(place, capsys):
    """go(tool, argument, ...) -> (exit code, {arm: entry}, stderr) of `tool A --json argument ...`."""

    def go(tool, *arguments):
        code = tool.main(["A", "--json", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, {row["arm"]: row for row in json.loads(out)["arms"]}, err

    return go


def logs(place) -> list[str]:
    return sorted(path.read_text() for path in place.glob("runs/*/log.txt"))


def states(arm: dict) -> list[str]:
    return [run["state"] for run in arm["runs"]]


# --- Which runs ---


def test_finished_runs_are_skipped_and_others_are_not(go, place):
    code, arms, err = go(run_seeds, "--seeds", "1,2,3", "--set", "LR=2")
    assert code == 0 and states(arms["seeds"]) == ["done"] * 3
    assert err.count("start ") == err.count("done  ") == 3
    assert arms["seeds"]["mean"] == pytest.approx(2.002) and arms["seeds"]["sd"] == pytest.approx(0.001)
    code, arms, err = go(run_seeds, "--seeds", "1,2,3,4", "--set", "LR=2")
    assert code == 0 and states(arms["seeds"]) == ["kept"] * 3 + ["done"]
    assert arms["seeds"]["mean"] == pytest.approx(2.0025)
    assert logs(place) == ["resumed False\n"] * 4  # none ran twice
    assert states(go(run_seeds, "--seeds", "1", "--set", "LR=3")[1]["seeds"]) == ["done"]  # other settings
    (place / "A" / "train_gpt.py").write_text(FAKE + "# another script\n")
    assert states(go(run_seeds, "--seeds", "1", "--set", "LR=3")[1]["seeds"]) == ["done"]
    data = place / "data" / "manifest.json"
    data.parent.mkdir()
    for text in ("one", "two"):  # other data under the same name
        (place / "A" / "train_gpt.py").write_text(FAKE + 'os.environ.get("DATA_PATH", "")\n')
        data.write_text(text)
        assert states(go(run_seeds, "--seeds", "1", "--set", "DATA_PATH=data")[1]["seeds"]) == ["done"]


def test_an_unfinished_run_is_started_over_or_resumed(go, place):
    _, arms, _ = go(run_seeds, "--seeds", "1")
    folder = place / arms["seeds"]["runs"][0]["folder"]
    (folder / "metrics.json").unlink()
    assert states(go(run_seeds, "--seeds", "1")[1]["seeds"]) == ["done"]
    assert logs(place) == ["resumed False\n"]
    (folder / "metrics.json").unlink()
    (folder / "last.safetensors").write_text("")
    code, arms, err = go(run_seeds, "--seeds", "1")
    assert code == 0 and "resume seeds seed 1" in err and logs(place) == ["resumed False\nresumed True\n"]


def test_a_failure_is_recorded_and_the_rest_go_on(go, place):
    code, arms, err = go(run_seeds, "--seeds", "1,2,3", "--set", "MODE=fail")
    assert code == 1 and states(arms["seeds"]) == ["done", "failed", "done"]
    assert arms["seeds"]["mean"] == pytest.approx(1.002)
    failed = arms["seeds"]["runs"][1]
    assert failed["exit_code"] == 7 and failed["tail"] == ["first line", "the reason"]
    assert "exit code 7" in err
    _, arms, _ = go(run_seeds, "--seeds", "1,2,3", "--set", "MODE=fail")
    assert states(arms["seeds"]) == ["kept", "failed", "kept"]
    console = (place / failed["folder"] / "console.txt").read_text()
    assert console.startswith("$ MODE=fail SEED=2 ") and console.endswith("the reason\n")


def test_a_run_that_failed_after_its_result_stays_failed(go, place):
    script = place / "A" / "train_gpt.py"
    script.write_text(FAKE.replace("sys.exit(3 if over else 0)", "sys.exit(5 if seed == 2 else 0)"))
    for state in "done", "kept":
        code, arms, _ = go(run_seeds, "--seeds", "1,2")
        assert code == 1 and states(arms["seeds"]) == [state, "failed"]
        assert arms["seeds"]["count"] == 1
    left = place / arms["seeds"]["runs"][1]["folder"]
    assert not (left / "metrics.json").exists() and (left / "metrics.failed.json").exists()


@pytest.mark.parametrize("change", ["bpb = float('nan')", "bpb = None"])
def test_a_run_without_a_finite_score_has_failed(go, place, change):
    script = FAKE.replace("entry = {", f"if seed == 2:\n    {change}\nentry = {{", 1)
    (place / "A" / "train_gpt.py").write_text(script)
    for _ in range(2):  # just run, and found again
        code, arms, _ = go(run_seeds, "--seeds", "1,2,3")
        assert code == 1
        assert states(arms["seeds"])[1] == "failed"
        assert arms["seeds"]["mean"] == pytest.approx(1.002)
        assert "finite val_bpb" in arms["seeds"]["runs"][1]["tail"][-1]


def test_an_unreadable_result_is_none(go, place):
    _, arms, _ = go(run_seeds, "--seeds", "1")
    for text in ("{", "[]"):
        (place / arms["seeds"]["runs"][0]["folder"] / "metrics.json").write_text(text)
        assert states(go(run_seeds, "--seeds", "1")[1]["seeds"]) == ["done"]


def test_a_run_that_was_finished_meanwhile_is_kept(go, place, monkeypatch):
    go(run_seeds, "--seeds", "1")
    read, looked = run_seeds.Job.read, []
    # The first look was before the other process had finished it.
    monkeypatch.setattr(run_seeds.Job, "read",
                        lambda job, sha256: bool(looked or looked.append(1)) and read(job, sha256))
    code, arms, err = go(run_seeds, "--seeds", "1")
    assert code == 0 and states(arms["seeds"]) == ["kept"] and "start " not in err


def test_an_error_of_the_tool_stops_what_runs(go, place, monkeypatch):
    def broken(*_):
        deadline = time.time() + 20
        while not any("waiting" in path.read_text() for path in place.glob("runs/*/console.txt")):
            assert time.time() < deadline
            time.sleep(0.02)
        raise OSError("no more")

    monkeypatch.setattr(run_seeds, "STATUS_SECONDS", 0.0)
    monkeypatch.setattr(run_seeds.Runner, "status", broken)
    with pytest.raises(OSError, match="no more"):
        go(run_seeds, "--seeds", "1", "--set", "MODE=wait")
    deadline = time.time() + 20
    while not [*place.glob("runs/*/last.safetensors")]:
        assert time.time() < deadline
        time.sleep(0.02)


def test_a_runs_name_tells_data_and_ranks_apart(place):
    def name(ranks: int = 1, **settings) -> str:
        return run_seeds.run_id(place / "A" / "train_gpt.py", "d", settings, 1, ranks, "shards")

    found = {name(), name(ranks=2)}
    (place / "shards").mkdir()
    for content in (b"1", b"22"):
        (place / "shards" / "a_train_0.bin").write_bytes(content)
        found |= {name(), name(DATA_PATH="shards")}
    (place / "shards" / "manifest.json").write_text("{}")
    assert len(found | {name()}) == 7


def test_a_broken_budget_is_no_result(go, place):
    for _ in range(2):  # just run, and found again
        code, arms, _ = go(run_seeds, "--seeds", "1", "--set", "MODE=over", "--collect", "A")
        assert code == 1 and states(arms["seeds"]) == ["over budget"] and arms["seeds"]["mean"] is None
    assert not (place / "A" / "seed1").exists()


def test_a_script_that_changes_meanwhile_is_not_mixed_in(go, place):
    vandal = "from pathlib import Path\nPath(__file__).write_text('0')\n"
    (place / "A" / "train_gpt.py").write_text(vandal + FAKE)
    code, arms, _ = go(run_seeds, "--seeds", "1,2")
    assert code == 1 and states(arms["seeds"]) == ["failed", "failed"]
    assert "changed since" in arms["seeds"]["runs"][1]["tail"][0]


def test_a_run_that_another_process_is_at_is_left_alone(go, place):
    import fcntl
    _, arms, _ = go(run_seeds, "--seeds", "1")
    folder = place / arms["seeds"]["runs"][0]["folder"]
    (folder / "metrics.json").unlink()
    with open(folder / "console.txt", "ab") as console:
        fcntl.flock(console, fcntl.LOCK_EX)
        code, arms, _ = go(run_seeds, "--seeds", "1")
    assert code == 1 and "another process" in arms["seeds"]["runs"][0]["tail"][0]
    assert (folder / "log.txt").exists()


# --- Where they run, and with what ---


def seen(place) -> list[dict]:
    return [json.loads(path.read_text())["seen"] for path in place.glob("runs/*/metrics.json")]


def test_jobs_run_side_by_side_and_no_more_of_them(go, place):
    places = ["--jobs", "2", "--threads", "3", "--gpus", "5,7"]
    code, _, _ = go(run_seeds, "--seeds", "1,2,3,4", "--set", "SLEEP=0.4", *places)
    spans, found = [run["time"] for run in seen(place)], seen(place)
    at_once = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert code == 0 and max(at_once) == 2 and {run["threads"] for run in found} == {"3"}
    assert {run["gpus"] for run in found} == {"5", "7"}
    for a in found:  # what runs at the same time has a GPU of its own
        beside = [b for b in found if a is not b and a["time"][0] <= b["time"][0] < a["time"][1]]
        assert all(a["gpus"] != b["gpus"] for b in beside)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin")
def test_a_run_stays_on_its_cores(go, place):
    before = os.sched_getaffinity(0)
    assert go(run_seeds, "--seeds", "1", "--cores", max(before))[0] == 0
    assert [run["cores"] for run in seen(place)] == [[max(before)]] and os.sched_getaffinity(0) == before


def test_ranks_take_their_share_of_the_gpus():
    options = run_seeds.parser("").parse_args([".", "--gpus", "0,1,2,3", "--ranks", "2"])
    assert run_seeds.slots(options) == [run_seeds.Slot((), "0,1"), run_seeds.Slot((), "2,3")]


def test_exported_settings_are_handed_on(go, place, monkeypatch):
    """A page says `export LR=9` once, and runs the script and the tools."""
    monkeypatch.setenv("LR", "9")
    monkeypatch.setenv("SLEEP", "")  # as if unset
    monkeypatch.setenv("SEED", "7")
    _, arms, err = go(run_seeds, "--seeds", "1")
    assert arms["seeds"]["mean"] == pytest.approx(9.001)
    assert "from the environment: LR; the same without it: --set LR=9" in err
    assert "this tool sets it: SEED" in err
    monkeypatch.delenv("SEED")
    # the same run as with these options; options and arms go before
    monkeypatch.delenv("LR")
    _, again, err = go(run_seeds, "--seeds", "1", "--set", "LR=9")
    assert states(again["seeds"]) == ["kept"] and "from the environment" not in err
    monkeypatch.setenv("LR", "9")
    _, arms, err = go(run_seeds, "--seeds", "1", "--set", "LR=2")
    assert arms["seeds"]["mean"] == pytest.approx(2.001) and "from the environment" not in err
    _, arms, _ = go(run_seeds, "--seeds", "1", "--like", place / again["seeds"]["runs"][0]["folder"])
    assert states(arms["seeds"]) == ["kept"]
    monkeypatch.setenv("MODE", "over")
    _, arms, err = go(sweep, "--seeds", "1", "--grid", "LR=3,4")
    assert {name: arm["settings"] for name, arm in arms.items()} == {
        f"LR={rate}": {"LR": rate, "MODE": "over"} for rate in "34"}
    assert "from the environment: LR, MODE" in err


def test_settings_of_an_earlier_run(go, place):
    (place / "old").mkdir()
    settings = {"LR": 4.0, "GONE": 1, "SEED": 8, "RUN_ID": "x"}
    (place / "old" / "metrics.json").write_text(json.dumps({"settings": settings}))
    _, arms, err = go(run_seeds, "--seeds", "1", "--like", "old")
    assert arms["seeds"]["mean"] == pytest.approx(4.001) and "no GONE" in err
    _, arms, _ = go(run_seeds, "--seeds", "1", "--like", "old", "--set", "LR=5")
    assert arms["seeds"]["settings"] == {"LR": "5"}


def test_a_status_line_counts_steps(go, place, monkeypatch):
    monkeypatch.setattr(run_seeds, "STATUS_SECONDS", 0.1)
    _, _, err = go(run_seeds, "--seeds", "1", "--set", "SLEEP=0.8")
    assert "0 of 1 runs through; seeds seed 1 step 3 of ?" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_runs_and_the_same_command_goes_on(place, number):
    call = [*TOOL, "A", "--seeds", "1,2,3", "--jobs", "2", "--set", "MODE=wait"]
    process = interrupted(place, call, 2, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command goes on" in err and out.count("| stopped |") == 3
    assert len([*place.glob("runs/*/last.safetensors")]) == 2
    (place / "go").touch()
    again = subprocess.run(call, capture_output=True, text=True, timeout=30)
    assert again.returncode == 0 and again.stderr.count("resume ") == 2 and again.stderr.count("start ") == 1


def test_a_second_signal_kills_what_does_not_stop(place):
    call = [*TOOL, "A", "--seeds", "1", "--json", "--set", "MODE=deaf"]
    process = interrupted(place, call, 1, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    run = json.loads(out)["arms"][0]["runs"][0]
    assert process.returncode == 130 and "killing" in err
    assert (run["state"], run["exit_code"]) == ("stopped", -9)


def interrupted(place, call: list[str], count: int, number: int) -> subprocess.Popen:
    """The process of a command that got a signal once `count` of its runs were waiting."""
    process = subprocess.Popen(call, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 30
    while sum("waiting" in path.read_text() for path in place.glob("runs/*/console.txt")) < count:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    return process


# --- Sweeps ---


def test_a_grid_is_every_combination_against_the_first(go, place):
    code, arms, _ = go(sweep, "--seeds", "1,2", "--grid", "LR=2,2.5", "--grid", "SLEEP=0;0.0")
    assert code == 0
    assert list(arms) == ["LR=2 SLEEP=0", "LR=2 SLEEP=0.0", "LR=2.5 SLEEP=0", "LR=2.5 SLEEP=0.0"]
    assert "verdict" not in arms["LR=2 SLEEP=0"] and arms["LR=2 SLEEP=0.0"]["verdict"] == "no effect"
    worse = arms["LR=2.5 SLEEP=0"]
    mean, half, word = stats.verdict([0.5, 0.5])
    assert worse["difference"] == pytest.approx(mean) and worse["verdict"] == word == "worse"
    assert worse["pairs"] == 2
    code, arms, _ = go(sweep, "--seeds", "1,2", "--grid", "LR=2,2.5", "--set", "SLEEP=0", "--base", "LR=2.5")
    assert arms["LR=2"]["difference"] == pytest.approx(-0.5)
    assert [*map(states, arms.values())] == [["kept", "kept"]] * 2


def arms_file(place, **content) -> str:
    (place / "arms.json").write_text(json.dumps(content))
    return "arms.json"


def test_listed_arms_pair_the_seeds_that_both_have_and_make_a_table(go, place):
    arms = {"more": {"LR": 2.25}, "broken/arm": {"MODE": "fail"}}
    listed = arms_file(place, base={"LR": 2}, arms=arms, labels={"base": "as it was"})
    code, arms, _ = go(sweep, "--arms", listed, "--seeds", "1,2,3", "--collect", "A")
    assert code == 1 and list(arms) == ["base", "more", "broken/arm"]
    assert states(arms["broken/arm"]) == ["done", "failed", "done"]
    assert arms["broken/arm"]["pairs"] == 2 and arms["broken/arm"]["difference"] == 0
    assert arms["more"]["difference"] == 0.25
    folder = place / "A" / "ablations"
    notes = json.loads((folder / "arms.json").read_text())
    assert notes == {"base": "as it was", "more": "`LR=2.25`", "broken-arm": "`MODE=fail`"}
    assert sorted(path.name for path in folder.glob("broken-arm/*")) == ["seed1.json", "seed3.json"]
    table = tables.ablation(place / "A", None)
    assert "| base: as it was | 3 | 2.0020 |" in table and "| `LR=2.25` | 3 | 2.2520 | +0.2500 |" in table
    assert "| `MODE=fail` | 2 | 2.0020 |" in table and "seeds 1, 2, 3 or some of them" in table
    # Another sweep adds its arms; a label written by hand stays; another base is not mixed in.
    notes |= {"more": "a larger step"}
    (folder / "arms.json").write_text(json.dumps(notes))
    listed = arms_file(place, base={"LR": 2}, arms={"more": {"LR": 2.25}, "less": {"LR": 1}})
    go(sweep, "--arms", listed, "--seeds", "1,2,3", "--collect", "A")
    assert json.loads((folder / "arms.json").read_text()) == notes | {"less": "`LR=1`"}
    listed = arms_file(place, base={"LR": 2}, arms={"more": {"LR": 4}})  # a name that is taken
    with pytest.raises(Misuse, match="seed1.json: not of the script, data and settings of arm more; move"):
        go(sweep, "--arms", listed, "--seeds", "1", "--collect", "A")
    listed = arms_file(place, base={"LR": 3}, arms={"more": {"LR": 4}})
    with pytest.raises(Misuse, match="the base of other arms"):
        go(sweep, "--arms", listed, "--seeds", "1", "--collect", "A")
    assert json.loads((folder / "base" / "seed1.json").read_text())["val_bpb"] == pytest.approx(2.001)
    mixed = folder / "more" / "seed3.json"
    mixed.write_text(mixed.read_text().replace('"LR": 2.25', '"LR": 4'))
    with pytest.raises(Misuse, match="ablations/more: settings: LR 2.25 against 4"):
        tables.ablation(place / "A", None)


def test_seeds_are_collected_whole(go, place):
    (place / "A" / "seed1").mkdir()
    (place / "A" / "seed1" / "stray.txt").write_text("of an earlier run")
    assert go(run_seeds, "--seeds", "1,2", "--collect", "A")[0] == 0
    for seed in (1, 2):
        found = place / "A" / f"seed{seed}"
        assert sorted(path.name for path in found.iterdir()) == ["log.txt", "metrics.json", "metrics.jsonl"]
        assert json.loads((found / "metrics.json").read_text())["seed"] == seed


def test_a_run_from_the_root_of_the_disk_keeps_its_source(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    source = b'a = 7 // 2  # http://host, "/"'
    assert run_seeds.without_places(source, tmp_path) == source


def test_a_collected_run_tells_no_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "elsewhere" / "a"
    told = {
        "artifact": f"{run}/artifact.bin",
        "RUNS_PATH": str(run.parent),
        "DATA_PATH": f"{tmp_path}/data/books",
        "name": "books",
    }
    found = json.loads(run_seeds.without_places(json.dumps(told).encode(), run.parent))
    assert found == {
        "artifact": "runs/a/artifact.bin",
        "RUNS_PATH": "runs",
        "DATA_PATH": "./data/books",
        "name": "books",
    }


def test_the_tables_name_arms_verdicts_and_failures(place, capsys):
    assert sweep.main(["A", "--seeds", "1,2", "--grid", "MODE=x,fail"]) == 1
    out = capsys.readouterr().out
    assert "| MODE=x | 1 | 1.0010 |" in out and "| MODE=fail | 1 | 1.0010 |" in out and "the reason" in out
    assert "MODE=fail seed 2 failed, exit code 7:" in out and "| base |" in out


# --- Cards, evaluations, named sets ---

JUDGE = {
    "settings": {"JUDGE": True, "OURS": "{run}", "THEIRS": "{run:plain}"},
    "report": "report.json",
    "score": {"nll": -1, "radius": 0.01},
    "show": {"theirs": "pair.1", "radius": "radius", "gone": "pair.2"},
}
CARDS = {
    "base": {"LR": 2, "hypothesis": "as it is"},
    "evaluate": JUDGE,
    "arms": {
        "more": {"LR": 2.25, "hypothesis": "a larger rate | is worse", "expected": "0.25 more"},
        "plain": {"LR": 3, "evaluate": False},
        "wide": {"of": "base", "RADIUS": 12},
        "odd": {"LR": 2.5, "expected": "fails"},
    },
}


def swept(place, capsys, *arguments) -> tuple[int, dict, str]:
    code = sweep.main(["A", "--json", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_finished_runs_are_evaluated_and_ranked(place, capsys):
    listed = arms_file(place, **CARDS)
    code, found, err = swept(place, capsys, "--arms", listed, "--seeds", "1,3")
    # `wide` is not trained
    assert code == 0 and [row["arm"] for row in found["arms"]] == ["base", "more", "plain", "odd"]
    assert {(each["arm"], each["seed"], each["state"]) for each in found["evaluations"]} == {
        (arm, seed, "done") for arm in ("base", "more", "odd", "wide") for seed in (1, 3)}
    assert err.count("evaluation: report.json in") == 8
    assert [row["arm"] for row in found["ranked"]] == ["wide", "base", "more", "odd"]
    best, base, more, _ = found["ranked"]
    assert best["score"] == pytest.approx(-2.002 + 0.12)
    assert base["scores"] == pytest.approx({"1": -2.001 + 0.06, "3": -2.003 + 0.06})
    assert best["shown"] == {"theirs": pytest.approx(3.002), "radius": 12, "gone": None}
    assert base["shown"]["radius"] == 6
    assert more["hypothesis"] == "a larger rate | is worse"
    assert base["hypothesis"] == "as it is"
    assert best["expected"] == ""
    assert found["cards"]["odd"] == {"expected": "fails"}
    # The same command again evaluates nothing; a run that is newer than its evaluation has that done again.
    code, again, err = swept(place, capsys, "--arms", listed, "--seeds", "1,3")
    assert code == 0
    assert {each["state"] for each in again["evaluations"]} == {"kept"}
    assert again["ranked"] == found["ranked"]
    report = (
        next(place / each["folder"] for each in found["evaluations"] if each["arm"] == "more")
        / "report.json"
    )
    os.utime(report, (1, 1))
    _, again, _ = swept(place, capsys, "--arms", listed, "--seeds", "1,3")
    assert [each["arm"] for each in again["evaluations"] if each["state"] == "done"] == ["more"]


@slow
def test_what_cannot_be_evaluated_comes_last(place, capsys):
    arms = {
        **CARDS["arms"],
        "odd": {"MODE": "fail", "expected": "one seed of two"},
        "broken": {"of": "more", "JUDGED": 7},
        "none": {"of": "base", "OURS": "nowhere"},
    }
    score = {"nll": -1, "nan": 1}
    code, found, err = swept(
        place, capsys, "--arms", arms_file(place, **{**CARDS, "arms": arms}), "--seeds", "1,2"
    )
    assert code == 1 and "no evaluation of odd seed 2: no good run of odd" in err
    states = {(each["arm"], each["seed"]): each["state"] for each in found["evaluations"]}
    assert ("odd", 2) not in states
    assert states["odd", 1] == "done"
    assert states["broken", 1] == states["none", 2] == "failed"
    assert [row["arm"] for row in found["ranked"]][-3:] == ["odd", "broken", "none"]
    assert found["ranked"][-1]["score"] is None
    told, = (each["tail"] for each in found["evaluations"] if (each["arm"], each["seed"]) == ("none", 1))
    assert "FileNotFoundError" in told[-1]
    code, found, _ = swept(
        place, capsys, "--arms",
        arms_file(place, **{**CARDS, "evaluate": {**JUDGE, "score": score}}), "--seeds", "1",
    )
    assert code == 0 and {row["score"] for row in found["ranked"]} == {None}
    assert [row["arm"] for row in found["ranked"]] == ["base", "more", "odd", "wide"]


def test_cards_alone_are_told_and_the_table_names_them(place, capsys):
    arms = {"more": {"LR": 2.25, "hypothesis": "a | b", "expected": "worse"}}
    code, found, _ = swept(
        place, capsys, "--arms", arms_file(place, base={"LR": 2}, arms=arms), "--seeds", "1"
    )
    assert code == 0 and found["evaluations"] == [] and [row["arm"] for row in found["ranked"]] == ["more"]
    assert sweep.main(["A", "--arms", arms_file(place, **CARDS), "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert "| ranked | score | theirs | radius | gone | hypothesis | expected |" in out
    assert "| more | -2.1910 | 3.0010 | 6.0000 |  | a larger rate \\| is worse | 0.25 more |" in out


@slow
def test_a_named_set_lies_beside_the_script_and_its_summary_too(place, capsys):
    sets = place / "A" / "sweeps"
    sets.mkdir()
    (sets / "rates.json").write_text(json.dumps(CARDS))
    code, found, _ = swept(place, capsys, "--named", "rates", "--seeds", "1,3", "--collect", "A")
    summary = json.loads((sets / "rates.summary.json").read_text())
    assert code == 0 and str(place) not in json.dumps(summary)
    found = json.loads(run_seeds.without_places(json.dumps(found).encode(), place / "runs"))
    assert summary == {"sweep": "rates", **found, **sweep.ranking_rows(found["ranked"])}
    arms = json.loads((place / "A" / "ablations" / "arms.json").read_text())
    assert sorted(arms) == ["base", "more", "odd", "plain"]
    table = tables.plain_rows(place / "A", "sweeps/rates.summary.json")
    best = found["ranked"][0]
    assert table.splitlines()[2].startswith(f"| `{best['arm']}` | {best['score']:.4f} |")
    # A title that no arm has a number for
    assert "gone" not in table and table.endswith("Means over 2 seeds.")
    with pytest.raises(Misuse, match="--named x: A offers rates$"):  # the summary is no set
        sweep.main(["A", "--named", "x"])


def test_a_signal_stops_evaluations_too(place, capsys, monkeypatch):
    runner = run_seeds.Runner

    class Stopping(runner):
        def run(self, jobs):
            super().run(jobs)
            self.signals = 1  # comes while the last run ends

    monkeypatch.setattr(run_seeds, "Runner", Stopping)
    code, found, _ = swept(place, capsys, "--arms", arms_file(place, **CARDS), "--seeds", "1")
    assert code == 130
    assert {each["state"] for each in found["evaluations"]} == {"stopped"}
    assert not [*place.glob("runs/*/report.json")]


@pytest.mark.parametrize("change, words", [
    (
        {"arms": {"a": {"of": "b"}}},
        "arm a: `of` names an arm that is trained, and needs `evaluate`; b is given",
    ),
    ({"arms": {"a": {"of": "base"}}, "evaluate": None}, "evaluate: an object with `settings`"),
    ({"arms": {"a": {"hypothesis": 3}}}, "arm a: `hypothesis` is a text"),
    ({"arms": {"a": {"evaluate": "no"}}}, "arm a: `evaluate` is true or false"),
    ({"arms": {"a": {"hypothesys": "x"}}}, "arm a: the script has no variable hypothesys"),
    (
        {"arms": {"a": {"of": "base", "RADIUSS": 3}}},
        "arm a: the script has no variable RADIUSS",
    ),
    ({"evaluate": {**JUDGE, "report": 3}}, "`report` a file's name"),
    ({"evaluate": {**JUDGE, "score": {"nll": "x"}}}, "`score` is an object of weights"),
    ({"evaluate": {**JUDGE, "show": {"nll": 3}}}, "`show` is an object of names with dots"),
    ({"evaluate": {"report": "x"}}, "settings: an object"),
    (
        {"evaluate": {**JUDGE, "settings": {"OURS": "{run:gone}"}}},
        "OURS={run:gone} names gone, which is no arm that is trained",
    ),
    ({"evaluate": {**JUDGE, "settings": {"SEED": 3}}}, "SEED is set by this tool"),
    (
        {"evaluate": {**JUDGE, "settings": {"OUR": "x"}}},
        "evaluate: the script has no variable OUR",
    ),
    ({"more": 1}, "an object with `base`"),
], ids=lambda part: part if isinstance(part, str) else "")
def test_a_file_of_cards_that_is_wrong_runs_nothing(place, change, words):
    listed = arms_file(
        place,
        **{
            **CARDS,
            "arms": {"plain": {"LR": 3}, **change.get("arms", {})},
            **{k: v for k, v in change.items() if k != "arms"},
        },
    )
    with pytest.raises(Misuse) as error:
        sweep.main(["A", "--arms", listed])
    assert words in str(error.value) and not (place / "runs").exists()


def test_the_sets_of_the_records_are_well_formed():
    from family import find_script
    seen = set()
    for path in sorted((ROOT / "records").glob("*/sweeps/*.json")):
        if path.name.endswith(".summary.json"):
            continue
        plan, known = sweep.listed(path), {*run_seeds.variables(find_script(path.parent.parent))}
        seen.add(path.stem)
        for settings in (
            plan.shared,
            *plan.own.values(),
            *(mine for _, mine in plan.of.values()),
            plan.evaluate.get("settings", {}),
        ):
            assert settings.keys() <= known, path
        assert all({*card} == {*sweep.CARD} for card in plan.cards.values()), path
        assert plan.cards.keys() == {*plan.own, *plan.of} - plan.spared, path
    assert {"ablation", "loss_weight", "block_size", "merge_radius"} <= seen


# --- Misuse ---

MISUSES = [
    (run_seeds, ["B"], "B: no script"),
    (run_seeds, ["A", "--set", "LR"], "--set LR: NAME=VALUE"),
    (run_seeds, ["A", "--set", "SEED=3"], "from --seeds"),
    (run_seeds, ["A", "--set", "RUN_ID=3"], "RUN_ID is set by this tool"),
    (run_seeds, ["A", "--set", "LR=3", "--set", "LR=4"], "given twice"),
    (run_seeds, ["A", "--set", "LRR=3"], "no variable LRR"),
    (run_seeds, ["A", "--seeds", "1,1"], "--seeds 1,1"),
    (run_seeds, ["A", "--seeds", "1,x"], "--seeds 1,x"),
    (run_seeds, ["A", "--jobs", "-1"], "--jobs -1"),
    (run_seeds, ["A", "--threads", "-2"], "--threads -2"),
    (run_seeds, ["A", "--cores", "0-"], "--cores 0-"),
    (run_seeds, ["A", "--ranks", "0"], "--ranks 0"),
    (run_seeds, ["A", "--jobs", "0"], "--jobs 0"),
    (run_seeds, ["A", "--threads", "0"], "--threads 0"),
    (run_seeds, ["A", "--cores", "1-0"], "an empty range"),
    (run_seeds, ["A", "--like", "torn"], "not JSON"),
    (run_seeds, ["A", "--like", "bare"], "no object `settings`"),
    (run_seeds, ["A", "--cores", "0;0"], "each run gets its own"),
    (run_seeds, ["A", "--cores", "99999"], "this process has"),
    (run_seeds, ["A", "--gpus", "0,0"], "each run gets its own"),
    (run_seeds, ["A", "--gpus", "0,1,2", "--ranks", "2"], "cannot be shared out"),
    (run_seeds, ["A", "--gpus", "0,1", "--jobs", "3"], "not the same number"),
    (run_seeds, ["A", "--like", "nowhere"], "nowhere/metrics.json"),
    (run_seeds, ["A", "--collect", "nowhere"], "nowhere: no such folder"),
    (run_seeds, ["A", "--collect", "frozen"], "a frozen record"),
    (run_seeds, ["A", "--collect", "other"], "its train_gpt.py is not"),
    (sweep, ["A"], "--grid NAME=V1,V2 or --arms FILE"),
    (sweep, ["A", "--named", "x", "--grid", "LR=1,2"], "one of them, is needed"),
    (sweep, ["A", "--named", "x"], "--named x: A offers no sets"),
    (sweep, ["A", "--grid", "LR=1,1"], "different values"),
    (sweep, ["A", "--grid", "LRR=1,2"], "no variable LRR"),
    (sweep, ["A", "--grid", "LR=1,2", "--base", "LR=3"], "the arms are LR=1, LR=2"),
    (sweep, ["A", "--arms", "no_arms.json"], "`arms` is needed"),
    (sweep, ["A", "--arms", "labels.json"], "`labels` is an object, and names arms"),
    (sweep, ["A", "--arms", "more.json", "--base", "a"], "folders of one name"),
    (sweep, ["A", "--arms", "bad_arm.json"], "arm a: an object"),
    (sweep, ["A", "--arms", "twins.json"], "arms base and a have the same settings"),
    (sweep, ["A", "--arms", "twins.json", "--set", "LR=2"], "--set LR: twins.json sets it for all arms"),
]


@pytest.mark.parametrize("tool, arguments, words", MISUSES, ids=[" ".join(each[1]) for each in MISUSES])
def test_misuse_names_what_is_wrong_and_runs_nothing(place, tool, arguments, words):
    for name in ("frozen", "other", "torn", "bare"):
        (place / name).mkdir()
    (place / "torn" / "metrics.json").write_text("{")
    (place / "bare" / "metrics.json").write_text("[]")
    (place / "frozen" / "submission.json").write_text('{"frozen": true}')
    (place / "other" / "train_gpt.py").write_text("")
    (place / "labels.json").write_text('{"arms": {"a": {}}, "labels": {"b": "text"}}')
    (place / "more.json").write_text('{"arms": {"a": {"LR": 1}}}')
    (place / "no_arms.json").write_text('{"base": {}}')
    (place / "bad_arm.json").write_text('{"arms": {"a": {"LR": [1]}}}')
    (place / "twins.json").write_text('{"base": {"LR": 1}, "arms": {"a": {"LR": "1"}}}')
    with pytest.raises(Misuse) as error:
        tool.main(arguments)
    assert words in str(error.value) and not (place / "runs").exists()


@pytest.mark.parametrize("tool", ["run_seeds", "sweep"])
def test_exit_codes_of_the_commands(place, tool):
    def end(*arguments) -> tuple[int, str]:
        call = [sys.executable, str(ROOT / "scripts" / f"{tool}.py"), *arguments]
        done = subprocess.run(call, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    assert end("--help")[0] == 0
    code, text = end("B", *["--grid", "LR=1,2"] * (tool == "sweep"))
    assert code == 2 and text.startswith("error: B: ")
    if tool == "run_seeds":  # what the system refuses is a line too
        code, text = end("A", "--runs", "A/train_gpt.py")
        assert code == 2 and "error: A/train_gpt.py/" in text and "Traceback" not in text
