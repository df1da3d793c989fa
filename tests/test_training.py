"""The real script in a process of its own: whole runs at toy size."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment, slow
from family import records
from safetensors.numpy import load_file

# A frozen record keeps the script that it was measured with.
FROZEN = [json.loads((folder / "submission.json").read_text()).get("frozen") for folder in records()]
SCRIPTS = [
    ROOT / "train_gpt.py",
    *(folder / "train_gpt.py" for folder, frozen in zip(records(), FROZEN) if not frozen),
]
CLOSING = (
    "val_bpb", "headline", "evals", "bytes_code", "bytes_model", "bytes_total", "train_seconds",
    "eval_seconds", "steps", "ms_per_step", "params", "peak_mem_mb", "seed", "script_sha256", "git_commit",
    "device", "world_size", "dataset",
)


def losses(output: str) -> list[float]:
    return [float(x) for x in re.findall(r"^step:\d+/\d+ train_loss:([\d.]+)", output, re.M)]


def test_a_run_leaves_what_the_house_promises(run, trunk, tmp_path):
    code, output, metrics = run(VAL_LOSS_EVERY=3, JEPA_PHASE1_FRAC=0)
    assert code == 0, output
    folder = tmp_path / "runs" / "test"
    assert sorted(p.name for p in folder.iterdir()) == [
        "artifact.bin", "best.safetensors", "final.safetensors", "log.txt", "metrics.json", "metrics.jsonl",
    ]
    assert all(key in metrics for key in CLOSING)
    assert (
        metrics["headline"] == "final_int6_sliding" and metrics["steps"] == 6 and metrics["dataset"]["sha256"]
    )
    names = ["raw", "final_raw", "final_ema", "final_int6_roundtrip", "final_int6_sliding"]
    assert list(metrics["evals"]) == names
    for entry in metrics["evals"].values():
        assert entry["val_bpb"] == pytest.approx(
            entry["val_loss"] * entry["targets"] / entry["bytes"] / np.log(2)
        )
        assert sum(entry["bits_by_class"].values()) == pytest.approx(entry["val_bpb"] * entry["bytes"])
    assert metrics["bytes_model"] == (folder / "artifact.bin").stat().st_size
    # averages are shipped: of a tensor that is kept in fp16
    state = load_file(folder / "final.safetensors")
    shipped = trunk.unpack((folder / "artifact.bin").read_bytes(), "artifact.bin")[1]["smear.gate"]
    live, average = (state[f"{kind}.smear.gate"].astype(np.float16) for kind in ("model", "ema"))
    assert np.array_equal(shipped, average) and not np.array_equal(shipped, live)
    assert metrics["bytes_total"] == metrics["bytes_model"] + (ROOT / "train_gpt.py").stat().st_size
    log = (folder / "log.txt").read_text()
    assert log.startswith((ROOT / "train_gpt.py").read_text()) and set(output.splitlines()) <= set(
        log.splitlines()
    )
    assert re.search(
        r"^final_int6_sliding val_loss:\d\.\d{4} val_bpb:\d\.\d{4} stride:16 prefix:3000 targets:\d+ "
        r"bytes:300\d eval_time:\d+ms$",
        output,
        re.M,
    )
    assert re.search(r"^final_int6_sliding_exact val_loss:\d\.\d{8} val_bpb:\d\.\d{8}$", output, re.M)
    assert re.search(r"^step:6/6 val_loss:\S+ val_bpb:\S+ train_time:\d+ms step_avg:\S+ms$", output, re.M)
    assert re.search(r"^step:2/6 .* jepa_pred:\S+ jepa_r2:\S+ sigreg:\S+$", output, re.M)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 1 and lines[0]["train_loss"] == pytest.approx(losses(output)[0], abs=1e-4)
    found = losses(output)
    assert found[-1] < found[0] - 0.3  # it learns


def test_eval_only_scores_an_artifact_without_training_data(run, corpus, tmp_path):
    code, output, metrics = run(NUM_LAYERS=2)
    assert code == 0, output
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in corpus.glob("*_val_*.bin"):
        shutil.copy(path, bare)
    # NUM_LAYERS is the tiny default again: the artifact's own settings build the model
    env = dict.fromkeys(("NUM_LAYERS",), "")
    code, output, again = run(
        EVAL_ONLY=1, ARTIFACT=tmp_path / "runs/test/artifact.bin", DATA_PATH=bare, RUN_ID="again", **env
    )
    assert code == 0, output
    assert again["val_bpb"] == metrics["val_bpb"] and "step:" not in output
    assert list(again["evals"]) == ["final_int6_roundtrip", "final_int6_sliding"]
    code, output, _ = run(EVAL_ONLY=1, ARTIFACT=tmp_path / "runs/test/artifact.bin", RUN_ID="x", NUM_LAYERS=3)
    assert code == 2 and "NUM_LAYERS=3: the artifact was made with 2" in output


def weights(path: Path) -> dict[str, np.ndarray]:
    return load_file(path)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_stop_and_resume_equals_one_run_bit_for_bit(run, cut, tmp_path):
    """SIGTERM somewhere in the middle, then RESUME=auto: every tensor of the final checkpoint is the same."""
    settings = {
        "ITERATIONS": 40, "WARMDOWN_ITERS": 20, "TRAIN_ORDER": "shuffled", "TRAIN_LOG_EVERY": 1,
        "JEPA_PHASE1_FRAC": 0, "CHECKPOINT_EVERY": 15,
    }
    code, output, _ = run(**settings)
    assert code == 0, output
    step = cut(ROOT / "train_gpt.py", signal.SIGTERM, "step:10/40 train_loss", **settings)
    assert 10 <= step < 40
    code, output, _ = run(**settings, RUN_ID="cut", RESUME="auto")
    assert code == 0 and f"step:{step} train_time" in output, output
    assert same(
        weights(tmp_path / "runs/test/final.safetensors"), weights(tmp_path / "runs/cut/final.safetensors")
    )
    whole, halves = ((tmp_path / f"runs/{name}/artifact.bin").read_bytes() for name in ("test", "cut"))
    assert whole == halves


def test_resume_from_a_file_and_refusals(run, tmp_path):
    code, output, _ = run(CHECKPOINT_EVERY=5, ITERATIONS=6)
    assert code == 0, output
    last = tmp_path / "runs/test/last.safetensors"
    code, output, metrics = run(RUN_ID="b", RESUME=last, ITERATIONS=6)
    assert code == 0 and f"resume:{last} step:5" in output and metrics["steps"] == 6
    assert same(
        weights(tmp_path / "runs/test/final.safetensors"), weights(tmp_path / "runs/b/final.safetensors")
    )
    code, output, _ = run(RUN_ID="c", RESUME=last, NUM_LAYERS=2)
    assert code == 2 and "made with NUM_LAYERS=3, not 2" in output
    last.write_bytes(last.read_bytes()[:1000])
    code, output, _ = run(RUN_ID="d", RESUME=last)
    assert code == 2 and "not a checkpoint" in output and "Traceback" not in output


def test_two_ranks_give_the_losses_of_one(run, tmp_path):
    """The batch, SIGReg's groups, Muon's shares and the scores do not depend on the number of ranks."""
    settings = {
        "JEPA_CHUNK_SIZE": 8, "JEPA_PHASE1_FRAC": 0, "JEPA_LAMBDA_MAX": 0.1,
        "ITERATIONS": 8, "TRAIN_LOG_EVERY": 1,
    }
    outcomes = []
    for ranks in (1, 2):
        code, output, metrics = run(ranks, RUN_ID=f"r{ranks}", **settings)
        assert code == 0, output
        assert metrics["world_size"] == ranks
        outcomes.append((losses(output), metrics))
    (one, first), (two, second) = outcomes
    assert len(one) == 8 and np.abs(np.array(one) - np.array(two)).max() <= 1.0001e-4
    texts = [(tmp_path / f"runs/r{ranks}/metrics.jsonl").read_text() for ranks in (1, 2)]
    for a, b in zip(*([json.loads(line) for line in text.splitlines()] for text in texts), strict=True):
        for key in {"jepa_pred", "sigreg"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-3), (a["step"], key)
    assert "jepa_pred" in texts[0] and "sigreg" in texts[0]
    for name, entry in first["evals"].items():
        assert entry["val_loss"] == pytest.approx(second["evals"][name]["val_loss"], abs=3e-4), name
        assert entry["targets"] == second["evals"][name]["targets"]


LEAVING = """
import sys
sys.path.insert(0, sys.argv[1])
from family import load_script
import torch
script = load_script(sys.argv[2])
script.dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=0, world_size=1)
group = script.dist.group.WORLD
# The first optimizer imports what may take hold of a group.
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
script.dist.destroy_process_group()
print(sys.getrefcount(group))
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
def test_a_process_group_goes_when_it_is_destroyed(script, tmp_path):
    """One that stays keeps its threads; a thread that drops
    a tensor while Python ends aborts a run that was good."""
    call = [sys.executable, "-c", LEAVING, str(ROOT / "scripts"), str(script), str(tmp_path / "store")]
    done = subprocess.run(call, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2"], done.stdout + done.stderr  # `group` and the argument of getrefcount



STUCK = """
import signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
from family import load_script
script = load_script(sys.argv.pop(1))
alarm = signal.alarm
script.dist.is_initialized = lambda: True
script.dist.destroy_process_group = lambda: time.sleep(60)
script.signal.alarm = lambda seconds: alarm(seconds // 60)
if sys.argv[1:] == ["unexpected"]:
    def settings(environ):
        raise ValueError("nobody has thought of this")
    script.Hyperparameters, sys.argv[1:] = settings, []
sys.exit(script.main())
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
@pytest.mark.parametrize("what, words", [("word", "error: 'word'"), ("unexpected", "ValueError: nobody has")])
def test_a_rank_that_fails_speaks_and_ends_though_its_group_hangs(script, what, words):
    """NCCL's end may wait for ranks that wait for this one."""
    if script != SCRIPTS[0] and os.environ.get("CI"):
        pytest.skip("the same function as the trunk's")
    call = [sys.executable, "-c", STUCK, str(ROOT / "scripts"), str(script), what]
    done = subprocess.run(call, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGALRM and words in done.stderr, done.stderr


@slow
def test_three_ranks_with_a_batch_that_does_not_divide(run):
    code, output, metrics = run(3, ITERATIONS=3, CHECKPOINT_EVERY=2)
    assert code == 0 and "micro_steps:1 micro_batch_rows:4" in output, output  # 4 groups on 3 ranks of 2
    one = run(RUN_ID="one", ITERATIONS=3, TRAIN_LOG_EVERY=1)
    assert np.abs(np.array(losses(output)) - np.array(losses(one[1]))).max() <= 1.0001e-4
    assert run(RUN_ID="test", RESUME="auto", ITERATIONS=3)[0] == 0  # one rank goes on where three stopped


def test_accumulation_changes_no_loss(run, tmp_path):
    """Neither cross-entropy nor a term of the JEPA, whose weights are felt here."""
    settings = {"JEPA_PHASE1_FRAC": 0, "JEPA_LAMBDA_MAX": 0.1}
    whole = run(RUN_ID="a", **settings)
    parts = run(RUN_ID="b", DEVICE_BATCH_TOKENS=128, **settings)
    assert "micro_steps:4" in parts[1]
    assert np.abs(np.array(losses(whole[1])) - np.array(losses(parts[1]))).max() <= 1.0001e-4
    texts = [(tmp_path / f"runs/{name}/metrics.jsonl").read_text() for name in "ab"]
    one, other = ([json.loads(line) for line in text.splitlines()] for text in texts)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"train_seconds"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), (a["step"], key)
    assert {"jepa_pred", "sigreg"} <= one[0].keys()


def test_the_clock_ends_a_run_at_its_floor(run, tmp_path):
    code, output, metrics = run(
        ITERATIONS=1_000_000,
        WARMDOWN_ITERS=300_000,
        MAX_WALLCLOCK_SECONDS=5,
        MIN_LR=0.05,
        TRAIN_LOG_EVERY=1,
        TRAIN_BATCH_TOKENS=4096,
    )
    assert code == 0, output
    lines = [json.loads(x) for x in (tmp_path / "runs/test/metrics.jsonl").read_text().splitlines()]
    rates = [line["rate"] for line in lines if "rate" in line]
    assert 5 < metrics["steps"] < 100_000 and 3 < metrics["train_seconds"] < 5
    assert rates[0] == 1 and rates[-1] < 0.4


def test_validation_text_does_not_touch_training(run, corpus, tmp_path):
    """Probe P9: with noise for validation text, trained weights and artifact are bit for bit the same."""
    scores, noise = [], tmp_path / "noise"
    noise.mkdir()
    for path in corpus.glob("*.bin"):
        data = bytearray(path.read_bytes())
        if "_val_" in path.name:
            size = (len(data) - 1024) // 2
            ids = np.random.default_rng(0).integers(4, 260, size).astype("<u2")
            data[1024:] = ids.tobytes()
        (noise / path.name).write_bytes(bytes(data))
    for name, folder in (("a", corpus), ("b", noise)):
        code, output, metrics = run(RUN_ID=name, DATA_PATH=folder, VAL_LOSS_EVERY=2)
        assert code == 0, output
        scores.append(metrics["val_bpb"])
    x, y = ((tmp_path / f"runs/{name}/artifact.bin").read_bytes() for name in "ab")
    assert x == y and abs(scores[0] - scores[1]) > 0.1  # the noise was read
    a, b = (weights(tmp_path / f"runs/{name}/final.safetensors") for name in "ab")
    assert same(a, b)


@pytest.mark.parametrize("rate", [1e12, 1e30])  # the loss explodes; the weights do, after a finite loss
def test_a_run_that_explodes_names_step_and_checkpoint(run, tmp_path, rate):
    code, output, _ = run(
        MATRIX_LR=rate, SCALAR_LR=rate, ITERATIONS=12, CHECKPOINT_EVERY=1, TRAIN_LOG_EVERY=100
    )
    message = (
        r"^error: step \d+: (the loss|[\w.]+) is not finite; the last good checkpoint: \S+last.safetensors$"
    )
    assert code == 2 and re.search(message, output, re.M) and "Traceback" not in output, output
    kept = weights(tmp_path / "runs/test/last.safetensors")
    assert all(np.isfinite(value).all() for value in kept.values() if value.dtype.kind == "f")


def test_every_step_has_its_line_in_the_metrics_whatever_the_log_shows(run, tmp_path):
    """A curve of hundreds of points needs no line on the console and no wait for the device a step."""
    code, output, _ = run(ITERATIONS=30, TRAIN_LOG_EVERY=1000)
    assert code == 0, output
    lines = [json.loads(line) for line in (tmp_path / "runs/test/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 31))
    assert len(losses(output)) == 11  # the first ten and the last
    assert [round(line["train_loss"], 4) for line in (*steps[:10], steps[-1])] == losses(output)
    assert all(a["train_seconds"] < b["train_seconds"] for a, b in zip(steps, steps[1:]))


def test_bf16_trains_and_keeps_fp32_masters(run, tmp_path):
    code, output, metrics = run(DTYPE="bf16", ITERATIONS=8)
    assert code == 0 and losses(output)[-1] < losses(output)[0] - 0.3, output
    assert ("attention:cpu" in output) and metrics["val_bpb"] < 9
    final = weights(tmp_path / "runs/test/final.safetensors")
    assert all(
        value.dtype == np.float32 for key, value in final.items() if key.startswith(("model.", "ema."))
    )


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_equals_eager(run):
    eager = run(RUN_ID="a", NUM_LAYERS=1, ITERATIONS=4)
    compiled = run(RUN_ID="b", NUM_LAYERS=1, ITERATIONS=4, COMPILE=1, timeout=400)
    code, output, _ = compiled
    assert code == 0 and "compile:1" in output and "running eager" not in output, output
    assert np.abs(np.array(losses(eager[1])) - np.array(losses(output))).max() < 2e-3


def test_compile_1_refuses_a_compiler_that_fails(run, tmp_path):
    wrong = tmp_path / "bin"
    wrong.mkdir()
    for name in ("g++", "clang++", "gcc", "cc", "c++"):
        (wrong / name).write_text("#!/bin/sh\necho no compiler today >&2\nexit 1\n")
        (wrong / name).chmod(0o755)
    code, output, metrics = run(
        COMPILE=1,
        NUM_LAYERS=2,
        ITERATIONS=3,
        PATH=f"{wrong}:{os.environ['PATH']}",
        TORCHINDUCTOR_CACHE_DIR=tmp_path / "cache",
    )
    assert code == 2 and metrics is None, output
    assert "error: COMPILE=1: " in output and "; COMPILE=0 runs eager" in output


def test_broken_budgets_are_said_and_exit_non_zero(run):
    code, output, metrics = run(ARTIFACT_BUDGET_BYTES=1000, EVAL_BUDGET_SECONDS=0.001)
    assert code == 3 and "budget: ARTIFACT_BUDGET_BYTES=1000 is broken" in output
    assert len(metrics["broken_budgets"]) == 2


def test_a_tokenizer_run_prints_both_byte_counts(run, prepare_files, field_tokenizer, tmp_path):
    """The whole pipeline on SentencePiece ids; a model that folds white space says which bytes divide."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    rng = np.random.default_rng(0)
    training = "\n".join(" ".join(rng.choice(words, 60)) for _ in range(100))
    (tmp_path / "t.txt").write_text(training)
    (tmp_path / "v.txt").write_text(" ".join(rng.choice(words, 600)).replace("fox", "fox  "))
    model, path = field_tokenizer(training, 300)
    size = model.vocab_size()
    options = ["--variant", f"sp{size}", "--tokenizer", path, "--overlap", "off"]
    out = prepare_files(tmp_path / "t.txt", tmp_path / "v.txt", *options)
    code, output, metrics = run(
        DATA_PATH=out, VOCAB_SIZE=size, TOKENIZER_PATH=out / path.name, VAL_BYTES=0, ITERATIONS=2
    )
    assert code == 0, output
    text = (tmp_path / "v.txt").read_text()
    normalised = len(model.decode(model.encode(text)).encode())
    assert normalised < len(text) and f"bytes:{normalised} (original text {len(text)}" in output
    assert metrics["evals"]["final_raw"]["bytes"] == normalised


def test_time_between_interrupt_and_exit(run, corpus, tmp_path):
    """Ctrl-C saves and leaves; nothing is left running."""
    env = environment(DATA_PATH=corpus, RUNS_PATH=tmp_path / "runs", RUN_ID="i", ITERATIONS=100000)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt.py")], env=env, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step:4/"):
            break
    start = time.time()
    process.send_signal(signal.SIGINT)
    output = process.stdout.read()
    assert process.wait(timeout=30) == 128 + signal.SIGINT and "stopped by SIGINT" in output
    assert time.time() - start < 20 and (tmp_path / "runs/i/last.safetensors").exists()
