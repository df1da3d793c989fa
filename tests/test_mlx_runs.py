"""The MLX twin in a process of its own, at toy size and
without torch: runs, files, ranks, signals, mistakes."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import generate
import numpy as np
import pytest
from conftest import ROOT, environment, mlx_or_skip
from safetensors.numpy import load_file

mlx_or_skip()
TWIN, TRUNK = ROOT / "train_gpt_mlx.py", ROOT / "train_gpt.py"
SMALL = {"NGRAM_ORDERS": "2,3", "NGRAM_WORDS": 0, "VAL_BYTES": 600}


@pytest.fixture
def no_torch(tmp_path):
    """A folder for PYTHONPATH in which importing torch is an error."""
    (tmp_path / "poison").mkdir()
    (tmp_path / "poison" / "torch.py").write_text("raise RuntimeError('the twin imports torch')")
    return tmp_path / "poison"


def losses(output: str) -> np.ndarray:
    return np.array([float(x) for x in re.findall(r"^step:\d+/\d+ train_loss:([\d.]+)", output, re.M)])


def scores(output: str) -> dict[str, float]:
    return {
        name: float(bpb)
        for name, bpb in re.findall(r"^(\w+)_exact val_loss:\S+ val_bpb:(\S+)", output, re.M)
    }


def test_a_run_leaves_what_the_house_promises_and_the_trunk_agrees_on_its_score(
    run, inside, trunk, no_torch, tmp_path
):
    settings = {
        "VAL_LOSS_EVERY": 3, "JEPA_PHASE1_FRAC": 0, "DRAFT": 2,
        "TTT": "sgd", "TTT_CHUNK_TOKENS": 512, "TTT_BATCH_ROWS": 4,
        "VAL_BYTES": 1500,
    }
    code, output, metrics = run(script=TWIN, PYTHONPATH=no_torch, **settings)
    assert code == 0, output
    folder = tmp_path / "runs" / "test"
    assert sorted(p.name for p in folder.iterdir()) == [
        "artifact.bin", "best.safetensors", "final.safetensors", "log.txt", "metrics.json", "metrics.jsonl"]
    assert metrics["headline"] == "final_int6_ttt" and metrics["steps"] == 6 and metrics["mlx"]
    names = ["raw", "final_raw", "final_ema", "final_int6_roundtrip", "final_int6_sliding", "final_int6_ttt"]
    assert list(metrics["evals"]) == names and metrics["evals"]["final_int6_ttt"]["updates"] > 0
    for entry in metrics["evals"].values():
        assert entry["targets"] == metrics["evals"]["raw"]["targets"]
        assert sum(entry["bits_by_class"].values()) == pytest.approx(entry["val_bpb"] * entry["bytes"])
    assert metrics["bytes_total"] == (folder / "artifact.bin").stat().st_size + TWIN.stat().st_size
    log = (folder / "log.txt").read_text()
    assert log.startswith(TWIN.read_text()) and set(output.splitlines()) <= set(log.splitlines())
    assert re.search(
        r"^step:2/6 .* draft:\S+ jepa_pred:\S+ jepa_r2:\S+ sigreg:\S+$",
        output,
        re.M,
    )
    assert re.search(r"^step:6/6 val_loss:\S+ val_bpb:\S+ train_time:\d+ms step_avg:\S+ms$", output, re.M)
    assert losses(output)[-1] < losses(output)[0] - 0.3  # it learns
    code, output, theirs = inside(
        trunk, EVAL_ONLY=1, ARTIFACT=folder / "artifact.bin", TTT="sgd", VAL_BYTES=1500,
        TTT_CHUNK_TOKENS=512, TTT_BATCH_ROWS=4,
    )
    assert code == 0, output
    trunks, twins = scores(output), scores(log)
    assert len(trunks) == 3 and trunks == pytest.approx({name: twins[name] for name in trunks}, abs=1e-4)
    assert set(theirs) - set(metrics) == {"torch"}
    # Of training
    assert set(metrics) - set(theirs) == {"mlx", "params", "params_shipped", "steps", "ms_per_step"}


def test_stop_and_resume_equals_one_run_bit_for_bit_in_flat_memory(run, cut, tmp_path):
    """Ctrl-C somewhere in the middle, then RESUME=auto.
    Thirty steps of two micro-batches take the memory of ten."""
    settings = {
        **SMALL, "ITERATIONS": 30, "WARMDOWN_ITERS": 20, "TRAIN_ORDER": "shuffled",
        "TRAIN_LOG_EVERY": 1, "JEPA_PHASE1_FRAC": 0, "CHECKPOINT_EVERY": 15,
        "TRAIN_BATCH_TOKENS": 256, "DEVICE_BATCH_TOKENS": 128,
    }
    code, output, _ = run(script=TWIN, **settings)
    assert code == 0 and "micro_steps:2" in output, output
    lines = [json.loads(line) for line in (tmp_path / "runs/test/metrics.jsonl").read_text().splitlines()]
    peaks = {line["step"]: line["peak_mem_mb"] for line in lines if "peak_mem_mb" in line}
    assert len(peaks) == 30
    assert 0 < max(peaks[step] for step in range(26, 31)) < 1.05 * max(peaks[step] for step in range(6, 11))
    # Early: what is left has to outlast a busy machine's delay
    step = cut(TWIN, signal.SIGINT, "step:2/30 train_loss", **settings)
    assert 2 <= step < 30
    code, output, _ = run(script=TWIN, **settings, RUN_ID="cut", RESUME="auto")
    assert code == 0 and f"step:{step} train_time" in output, output
    whole, halves = (load_file(tmp_path / f"runs/{name}/final.safetensors") for name in ("test", "cut"))
    assert whole.keys() == halves.keys() and all(np.array_equal(whole[key], halves[key]) for key in whole)
    whole, halves = ((tmp_path / f"runs/{name}/artifact.bin").read_bytes() for name in ("test", "cut"))
    assert whole == halves


def test_two_ranks_give_the_losses_of_one(run, corpus, tmp_path):
    """By `mlx.launch`, as the README has it: MLX's ring over two ports of this machine."""
    settings = {
        **SMALL, "JEPA_PHASE1_FRAC": 0, "JEPA_LAMBDA_MAX": 0.1,
        "ITERATIONS": 5, "TRAIN_LOG_EVERY": 1, "TTT": "sgd", "TTT_CHUNK_TOKENS": 256,
        "TTT_LR": 0.1,
    }
    code, one, alone = run(script=TWIN, **settings)
    assert code == 0, one
    with contextlib.ExitStack() as held:  # two ports in a row
        for port in range(41000, 61000, 101):
            with contextlib.suppress(OSError):
                for each in (port, port + 1):
                    held.enter_context(socket.create_server(("127.0.0.1", each)))
                break
    launch = [Path(sys.executable).with_name("mlx.launch"), "--hosts", "127.0.0.1,127.0.0.1", "-p", str(port)]
    env = environment(DATA_PATH=corpus, RUNS_PATH=tmp_path / "runs", RUN_ID="two", **settings)
    done = subprocess.run(
        [*launch, sys.executable, TWIN], capture_output=True, text=True, env=env, timeout=60
    )
    both = done.stdout
    # Rank 0 alone speaks
    assert "world_size:2" in both and len(re.findall(r"^step:5/5 train_loss", both, re.M)) == 1, (
        both + done.stderr
    )
    assert np.abs(losses(one) - losses(both)).max() <= 1.0001e-4 and len(losses(one)) == 5
    together = json.loads((tmp_path / "runs/two/metrics.json").read_text())
    for name, entry in alone["evals"].items():
        assert entry["val_loss"] == pytest.approx(together["evals"][name]["val_loss"], abs=3e-4), name
        assert entry["targets"] == together["evals"][name]["targets"]
    sliding, learned = (alone["evals"][f"final_int6_{name}"] for name in ("sliding", "ttt"))
    # Both ranks learned
    assert learned["updates"] > 0 and abs(learned["val_loss"] - sliding["val_loss"]) > 1e-3


@pytest.mark.parametrize("settings, message", [
    ({"ATTENTION": "fa3"}, "ATTENTION='fa3' is not accepted: auto | sdpa | math"),
    ({"WORLD_SIZE": 2}, "WORLD_SIZE='2' is not accepted: an integer from 1 to 1 .*mlx.launch"),
    ({"MEMORY_LIMIT_MB": -1}, "MEMORY_LIMIT_MB='-1' is not accepted: an integer from 0"),
    ({"MEMORY_LIMT_MB": 1}, "did you mean MEMORY_LIMIT_MB"),
    ({"ARTIFACT": TRUNK, "EVAL_ONLY": 1}, "train_gpt.py: not an artifact of this family"),
])
def test_mistakes_are_one_line(twin, inside, settings, message):
    code, output, _ = inside(twin, **settings)
    assert code == 2 and re.search(f"^error: .*{message}".replace("|", r"\|"), output), output
    assert output.count("\n") == 1


def test_help_and_half_precision(run):
    done = subprocess.run(
        [sys.executable, str(TWIN), "--help"], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0 and "MEMORY_LIMIT_MB" in done.stdout and "mlx.launch" in done.stdout
    code, output, metrics = run(
        script=TWIN, **{**SMALL, "VAL_BYTES": 200}, NUM_LAYERS=2, QUANT_ROUND="nearest",
        DTYPE="bf16", ITERATIONS=4, JEPA_PHASE1_FRAC=0,
    )
    assert code == 0 and np.isfinite(metrics["val_bpb"]) and " dtype:bfloat16 " in output, output
    assert losses(output)[-1] < losses(output)[0] - 0.3


def test_it_writes_from_a_text_without_torch(trunk, twin, pair, tmp_path, no_torch):
    _, model = pair(DRAFT=2)
    path = tmp_path / "artifact.bin"
    path.write_bytes(twin.pack({name: np.array(p) for name, p in model.exported().items()}, model.args))
    tool = [str(ROOT / "scripts" / "generate.py"), str(path), "def", "--max-new-tokens", "20"]
    done = subprocess.run([sys.executable, *tool, "--script", str(TWIN)], capture_output=True, timeout=60,
                          env=environment(PYTHONPATH=no_torch))
    assert done.returncode == 0 and re.match(rb"ids:20 bytes:\d+ passes:\d+ ", done.stderr), done.stderr
    source, prompt = trunk.load(path), [1, *(byte + 4 for byte in b"def")]
    made = generate.Writer(trunk, source, prompt, generate.Law(), 20)
    assert done.stdout == bytes(i - 4 for i in made if i >= 4)


def test_bench_measures_the_twin():
    command = [
        sys.executable, str(ROOT / "scripts" / "bench.py"), "--one", "--raw", "--steps", "2",
        "--script", str(TWIN),
    ]
    env = environment(
        QUANT_ROUND="nearest", EVAL_STRIDE=64, NGRAM_ORDERS=0,
        JEPA_CHUNK_SIZE=0, MLP_MULT=2,
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    blocks = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 32 * 64)
    assert result["flop_per_step"] == (6 * (blocks + 260 * 32) + 6 * 3 * 64 * 32) * 512
    assert result["step_ms"] > 0 and result["compile"] is False and result["mlx"] and result["memory_mb"] > 0
