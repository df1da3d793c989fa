"""What compiles: every rung and every shape without a break, and nothing compiles twice; what ranks agree on.

FlashAttention is stood in for by tests/standins; graphs are counted by a backend that only runs them.
"""

import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import audit
import numpy as np
import pytest
import test_bijepax as bijepax
import test_byteppm as byteppm
import test_sgjm as sgjm
import torch
from conftest import TINY, environment, slow
from family import OF_THE_RUN, load_script
from torch._inductor.utils import run_fw_bw_and_get_code

STANDINS = Path(__file__).parent / "standins"
ROOT = Path(__file__).resolve().parent.parent
MEASURED = sorted({*ROOT.glob("records/*/train_gpt.py")} - {*ROOT.glob("records/*_Baseline/train_gpt.py")})
BIG = {**TINY, "NUM_LAYERS": 4, "XSA_LAST_N": 2, "TTT": "sgd", "TTT_CHUNK_TOKENS": 64, "TTT_BATCH_ROWS": 2,
       "DRAFT": 2, "LN_SCALE": 1}


@pytest.fixture
def graphs(monkeypatch):
    """[] that gets each graph; the stand-ins can be imported."""
    found: list = []

    def backend(graph, _):
        found.append(graph)
        return graph.forward

    monkeypatch.syspath_prepend(str(STANDINS))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield found
    torch._dynamo.reset()
    for name in ("flash_attn", "flash_attn_interface"):
        sys.modules.pop(name, None)


def settings(**more) -> dict[str, str]:
    return {name: str(value) for name, value in {**BIG, **more}.items()}


@pytest.mark.parametrize("rung, masks, windowed, kinds", [
    ("fa3", 0, "", 2), ("fa2", 0, "", 2), ("cpu", 0, "", 2), ("sdpa", 0, "", 2), ("math", 0, "", 2),
    ("fa3", 1, "", 2), ("sdpa", 1, "", 2),
    ("fa3", 0, "0,1,3", 3), ("cpu", 0, "0,1,3", 3), ("sdpa", 0, "0,1,3", 3), ("sdpa", 1, "0,1,3", 3),
])
def test_no_rung_breaks_a_graph_and_nothing_compiles_twice(graphs, corpus, rung, masks, windowed, kinds):
    trunk = load_script(ROOT / "train_gpt.py")
    windows = {"ATTN_WINDOW": 5, "ATTN_WINDOW_LAYERS": windowed}
    args = trunk.Hyperparameters(settings(DOC_MASK=masks, DATA_PATH=corpus, DTYPE="fp32", QUANT_ROUND="gptq",
                                          GPTQ_BATCHES=1, **windows))
    runtime = trunk.Runtime(args)
    runtime.attention = rung
    trainer = trunk.Trainer(args, trunk.Dataset(args, False), runtime, trunk.Log(None))
    loader = trunk.Loader(trainer.data, args, trainer.plan, 0)
    ids, weights, _ = loader.next()
    text = np.concatenate([[trunk.BOS_ID], ids[0, 0].numpy(), ids[0, 1].numpy()])

    eager = trainer.model.losses(ids[0], weights[0], trainer.model.aux.inputs(0, runtime.device))
    trunk.piece.compiled = True
    runtime.compile = True
    trainer.try_shapes(ids, weights)
    first = len(graphs)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == first
    shapes = 3  # of ids: a training forward, a scoring batch, the rows of a test-time update
    a_shape = {"look_back": 1, "embed_rows": 1, "Block": kinds, "ChunkJEPA": 1}  # with XSA, with a window
    a_loss = {"nats": 1, "DraftHeads.loss": 1}
    spans = 2  # logits_from: of windows that do not overlap, and of sliding ones
    assert first == shapes * sum(a_shape.values()) + 2 * sum(a_loss.values()) + spans

    compiled = trainer.model.losses(ids[0], weights[0], trainer.model.aux.inputs(0, runtime.device))
    for name, value in eager.items():
        assert torch.allclose(value, compiled[name], rtol=1e-4), name
    for progress in (0.0, 0.4, 0.9):  # JEPA's phases
        trainer.train_step(ids, weights, progress)
    trainer.calibrate()
    trainer.ema.apply()
    trainer.train_step(ids, weights, 0.5)
    tensors = {name: p.detach().numpy() for name, p in trainer.model.exported().items()}
    path = Path(args.runs_path) / f"{rung}{masks}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(trunk.pack(tensors, args))
    model = trunk.load(path, "cpu", args, runtime.dtype, rung)
    path.unlink()
    trunk.try_scoring(model, runtime)
    learner = trunk.TestTimeTraining(model, runtime)
    learner.update(text, np.array([0, 1]))
    # FlashAttention is told where documents begin, in a list whose length is a power of two
    longer = masks and rung == "fa3"
    assert len(graphs) in ([first, first + a_shape["Block"]] if longer else [first])
    assert not counters["graph_break"]


def test_a_block_is_few_kernels(monkeypatch):
    """What stands between the products is fused: QK-norm, rotary and gain are one kernel, LeakyReLU^2 is one,
    as inductor's C++ shows."""
    torch._dynamo.reset()
    trunk = load_script(ROOT / "train_gpt.py")
    model = trunk.GPT(trunk.Hyperparameters(settings(DTYPE="bf16", LN_SCALE=1)), "sdpa", torch.bfloat16)
    shape = 2, 64, model.args.model_dim
    x, x0 = (torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    forward = torch.compile(trunk.Block.forward.__wrapped__, dynamic=False, fullgraph=True)

    def run():
        return forward(model.blocks[0], x, x0, model.ln_scales[0], model.rotary_train, None, None)

    _, codes = run_fw_bw_and_get_code(run)
    kernels = [re.findall(r"^\s+cpp_fused(\w+)\(", code, re.M) for code in codes]
    torch._dynamo.reset()
    assert [len(names) for names in kernels] == [6, 6], kernels
    assert sum("cat" in name and "rsqrt" in name and "slice" in name for name in kernels[0]) == 1
    assert sum("leaky_relu" in name for name in kernels[0]) == 1


def test_a_part_that_cannot_be_taken_whole_fails_loudly(graphs):
    trunk = load_script(ROOT / "train_gpt.py")

    @trunk.piece
    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    assert broken(torch.ones(3)).tolist() == [2.0] * 3
    trunk.piece.compiled = True
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        broken(torch.ones(3))


@pytest.fixture
def gpu(monkeypatch):
    """gpu(rung=seconds, ...) -> the rung that is picked where these are the times on a card."""
    monkeypatch.syspath_prepend(str(STANDINS))

    def pick(wanted: str = "auto", docs: int = 0, **seconds):
        trunk = load_script(ROOT / "train_gpt.py")
        args = trunk.Hyperparameters(settings(ATTENTION=wanted, DOC_MASK=docs, DTYPE="bf16"))
        runtime = trunk.Runtime(args)
        real, runtime.device = runtime.device, torch.device("cuda")

        def check_rung(rung, args, runtime):
            if rung not in seconds:
                raise ImportError(rung)

        def attention_seconds(rung, args, runtime):
            if seconds[rung] is None:
                raise NotImplementedError("no fake kernel")
            return seconds[rung]

        monkeypatch.setattr(trunk, "check_rung", check_rung)
        monkeypatch.setattr(trunk, "attention_seconds", attention_seconds)
        try:
            return trunk.pick_attention(args, runtime), runtime.notes
        finally:
            runtime.device = real

    return pick


def test_on_gpus_the_fastest_rung_wins(gpu):
    rung, notes = gpu(fa3=2e-3, fa2=4e-3, sdpa=1.5e-3, math=1e-4)
    assert rung == "sdpa"  # `math` is only a reference
    assert "attention: a layer of each kind, both ways: fa3 2.00 ms, fa2 4.00 ms, sdpa 1.50 ms" in notes
    assert gpu(fa3=1e-3, sdpa=1.5e-3, math=1e-4)[0] == "fa3"
    assert gpu(math=1e-4)[0] == "math"
    assert gpu("fa2", fa3=1e-3, fa2=4e-3, sdpa=1e-3, math=1.0)[0] == "fa2"  # asked for by name
    assert gpu("fa2", sdpa=1e-3, math=1.0)[0] == "sdpa"  # or the next that works
    assert gpu(docs=1, fa2=4e-3, sdpa=1e-3, math=1.0)[0] == "fa2"  # which skips what a mask hides


def test_a_rung_that_is_not_taken_says_why(gpu):
    _, notes = gpu(sdpa=1.5e-3, math=1e-4)
    for rung in ("fa3", "fa2"):
        assert f"attention: no {rung}, ImportError('{rung}')" in notes


def test_a_rung_that_is_asked_for_must_fit_in_a_graph(gpu):
    """A FlashAttention without fake kernels runs by itself, and would leave the whole run eager."""
    rung, notes = gpu("fa2", fa2=None, sdpa=1e-3, math=1.0)
    assert rung == "sdpa" and "attention: no fa2, NotImplementedError('no fake kernel')" in notes


def test_a_rung_is_timed_both_ways_and_in_one_graph(graphs):
    """At the run's own shape; where layers differ in their windows, one of each kind."""
    trunk = load_script(ROOT / "train_gpt.py")
    runtime = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, compile=True)
    for windows, kinds in ("", 1), ("0,2", 2):
        args = trunk.Hyperparameters(settings(ATTN_WINDOW=5, ATTN_WINDOW_LAYERS=windows))
        for rung in "fa3", "sdpa", "math":
            graphs.clear()
            torch._dynamo.reset()
            assert trunk.attention_seconds(rung, args, runtime) > 0
            assert len(graphs) == kinds, (rung, windows)

    def breaks(q, k, v, mask, window):
        torch._dynamo.graph_break()
        return q * (k.sum() + v.sum())

    trunk.attention_of = lambda rung: breaks
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        trunk.attention_seconds("fa3", args, runtime)
    runtime.compile = False
    assert trunk.attention_seconds("fa3", args, runtime) > 0


@pytest.mark.parametrize("bf16, picked", [(2.0, "bfloat16"), (1.1, "float32"), (0.5, "float32")])
def test_dtype_auto_goes_by_measured_rates(monkeypatch, bf16, picked):
    """Some CPUs that have bf16 multiply it at half the rate of fp32."""
    trunk = load_script(ROOT / "train_gpt.py")

    class Timer:
        def __init__(self, _, globals):
            self.mean = 1.0 / (bf16 if globals["dtype"] == torch.bfloat16 else 1.0)

        def timeit(self, _):
            return self

    monkeypatch.setattr(trunk, "Timer", Timer)
    monkeypatch.setattr(trunk.Path, "read_text", lambda self: "flags : fma avx512_bf16")
    runtime = trunk.Runtime(trunk.Hyperparameters(settings(DTYPE="auto")))
    assert runtime.dtype == getattr(torch, picked) and runtime.notes[0].startswith("dtype: fp32 at ")
    monkeypatch.setattr(trunk.Path, "read_text", lambda self: "flags : fma")
    assert trunk.Runtime(trunk.Hyperparameters(settings(DTYPE="auto"))).dtype == torch.float32


def test_a_tensor_whose_inputs_overflow_is_rounded_to_the_nearest(corpus, monkeypatch):
    trunk, said = load_script(ROOT / "train_gpt.py"), []
    args = trunk.Hyperparameters(settings(DATA_PATH=corpus, GPTQ_BATCHES=1))
    trainer = trunk.Trainer(args, trunk.Dataset(args, False), trunk.Runtime(args), said.append)
    whole = trainer.calibrate()
    assert not said
    name = "blocks.1.mlp.proj.weight"
    for value in np.nan, np.inf:
        bad = {key: each if key != name else np.full_like(each, value) for key, each in whole.items()}
        monkeypatch.setattr(trainer, "moments", lambda batches, found=bad: dict(found))
        said.clear()
        assert {*whole} - {*trainer.calibrate()} == {name}
        assert said == [f"warning: {name}: inputs are not finite, rounded to the nearest"]


COUNTED = """
import functools, importlib.util, json, sys
import torch
made, found = [], {{}}

def backend(graph, _):
    made.append(graph)
    return graph.forward

torch.compile = functools.partial(torch.compile, backend=backend)
spec = importlib.util.spec_from_file_location("script", {script!r})
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
whole = script.Trainer.warm_up

def warm_up(self, *rest):
    out = whole(self, *rest)
    found["warm-up"] = len(made)
    return out

script.Trainer.warm_up = warm_up
code = script.main()
breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
print(json.dumps({{**found, "run": len(made), "breaks": breaks}}))
sys.exit(code)
"""


@slow
@pytest.mark.parametrize("script", MEASURED, ids=lambda path: path.parent.name)
def test_a_record_compiles_all_in_its_warm_up_and_breaks_no_graph(script, corpus, tmp_path):
    """A tiny run of what its seeds had switched on: training, its average, the artifact, every pass."""
    known = {var.name for var in load_script(script).Hyperparameters.vars().values()}
    told = json.loads(next(script.parent.glob("seed*/metrics.json")).read_text())["settings"]
    own = {name: int(value) if isinstance(value, bool) else value for name, value in told.items()
           if name in known - {*OF_THE_RUN, "ATTENTION", "TOKENIZER_PATH", "DRAFTER_PATH"}}
    small = {name: value for name, value in audit.SMALL.items() if own.get(name) not in (0, 0.0, "")}
    small |= json.loads((script.parent / "submission.json").read_text()).get("audit", {})
    run = {"VOCAB_SIZE": 260, "COMPILE": 1, "DTYPE": "fp32", "ITERATIONS": 4, "VAL_BYTES": 3000,
           "VAL_LOSS_EVERY": 0, "ARTIFACT_BUDGET_BYTES": 0, "MAX_WALLCLOCK_SECONDS": 0,
           "EVAL_BUDGET_SECONDS": 0, "DATA_PATH": corpus, "RUNS_PATH": tmp_path / "runs", "RUN_ID": "run"}
    asked = {name: str(value) for name, value in {**own, **small, **run}.items() if name in known}
    machine = {name: value for name, value in os.environ.items() if name not in known}
    driver = tmp_path / "driver.py"
    driver.write_text(COUNTED.format(script=str(script)))
    done = subprocess.run([sys.executable, str(driver)], env={**machine, **asked}, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(script.parent.name, found)
    assert found["breaks"] == 0 and found["run"] == found["warm-up"] > 3, found


DRIVER = """
import importlib.util, os, signal, sys
import torch
spec = importlib.util.spec_from_file_location("script", {script!r})
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
second = os.environ.get("RANK") == "1"
{patch}
sys.exit(script.main())
"""
COMPILER = """
def compile(function, **_):
    if second:
        raise OSError("no compiler today")
    return function
torch.compile = compile
script.Runtime._pick_compile = lambda self, args: True
"""
BAD_ID = """
whole = script.Loader.next
def next(self):
    if second and self.state["row"] > 16:
        raise script.UserError("shard.bin: id 300 is outside VOCAB_SIZE=260")
    return whole(self)
script.Loader.next = next
"""
SIGNAL = """
whole = script.Trainer.train_step
def train_step(self, *rest):
    if second and self.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return whole(self, *rest)
script.Trainer.train_step = train_step
"""


@pytest.fixture
def driven(run, tmp_path):
    """driven(patch, VAR=value, ...): `run` of a script whose `patch` ran first."""

    def driven(patch: str, script: Path = ROOT / "train_gpt.py", ranks: int = 2, **overrides):
        driver = tmp_path / "driver.py"
        driver.write_text(DRIVER.format(script=str(script), patch=patch))
        return run(ranks=ranks, script=driver, **overrides)

    return driven


@slow
def test_where_one_rank_cannot_compile_none_does(driven, run):
    code, output, metrics = driven(COMPILER, COMPILE="auto", RUN_ID="one")
    assert code == 0 and "compile: running eager (another rank failed)" in output, output
    _, _, eager = run(ranks=2, RUN_ID="none")
    assert metrics["val_bpb"] == eager["val_bpb"]


def test_the_rank_that_fails_speaks_and_the_others_end_with_one_line(driven):
    code, output, _ = driven(BAD_ID)
    assert code != 0 and "rank 1: error: shard.bin: id 300 is outside VOCAB_SIZE=260" in output, output
    others = [line for line in output.splitlines() if line.startswith("rank 0:")]
    assert len(others) < 2 and all("stopped, another rank is gone or" in line for line in others), output
    assert "[rank0]: Traceback" not in output and "[rank1]: Traceback" not in output


def test_ranks_that_do_not_share_a_folder_end_at_once(driven):
    patch = """
if second:
    os.environ["RUNS_PATH"] += "/elsewhere"
"""
    code, output, metrics = driven(patch)
    assert code != 0 and metrics is None and "step:1/" not in output, output
    wanted = r"^rank 1: error: RUNS_PATH=.*/elsewhere: rank 0's log is not here"
    assert re.search(wanted, output, re.M), output


def test_a_rendezvous_that_fails_says_why():
    """A taken port is not another rank that ended; a port that is no number is a setting."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for number, code, words in ((port, 1, str(port)), ("abc", 2, "MASTER_PORT='abc' is not accepted")):
            rank = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": number}
            done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=environment(**rank),
                                  capture_output=True, text=True, timeout=60)
            assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
            last = done.stderr.splitlines()[-1]
            assert words in last and last.startswith(("rank 0: stopped, another rank", "error: ")), last


def test_a_signal_to_any_rank_stops_all_with_a_checkpoint(driven, tmp_path):
    code, output, metrics = driven(SIGNAL, ITERATIONS="12")
    assert code != 0 and metrics is None and "stopped by SIGTERM at step 4" in output, output
    assert (tmp_path / "runs/test/last.safetensors").exists()


@pytest.mark.parametrize("name, settings, passes", [
    ("", TINY, ["raw", "ema", "int6_sliding"]),
    pytest.param("2026-11-21_BytePPM", byteppm.SETTINGS, ["int6_roundtrip", "int6_sliding"], marks=slow),
    ("2026-11-21_SGJM", sgjm.RUN, ["ema", "int7_sliding"]),
    ("2026-11-22_BiJEPAX", bijepax.HERE, ["ema", "int6_sliding"]),
], ids=["trunk", "BytePPM", "SGJM", "BiJEPAX"])
def test_a_long_pass_says_how_far_it_is(driven, name, settings, passes):
    script = ROOT / "records" / name / "train_gpt.py" if name else ROOT / "train_gpt.py"
    settings = {**settings, "ITERATIONS": 1}
    code, output, _ = driven("script.PROGRESS_SECONDS = -1.0", script=script, ranks=1, **settings)
    assert code == 0, output
    for label in passes:
        line = rf"^  final_{label} (\d+)% \d+s loss:\d"
        shares = [int(share) for share in re.findall(line, output, re.M)]
        assert shares == sorted(shares) and shares[-1] == 100, output
