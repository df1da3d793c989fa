"""scripts/gpu_check.py: the rehearsal of a day with a GPU, and that what is broken makes it fail."""

import json
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gpu_check
import plan
import pytest
import torch
from conftest import ROOT, environment, slow

RUNGS = {"fa3", "fa2", "cpu", "sdpa", "math"}


def rehearse(folder, *words, **env) -> tuple[int, str, dict]:
    """(exit code, output, what gpu_check.json holds)"""
    kept = {name: value for name, value in environment().items() if name in os.environ}
    command = [sys.executable, str(ROOT / "scripts/bench.py"), "--rehearse", "--out", str(folder), *words]
    done = subprocess.run(command, env={**kept, **env}, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr, json.loads((folder / "gpu_check.json").read_text())


def test_only_some_processes_leave_what_others_found(tmp_path, monkeypatch):
    """After a day with a card, another look at one process must not cost the rest; another script does."""
    path = tmp_path / "gpu_check.json"
    digest = gpu_check.hashlib.sha256(gpu_check.TRUNK.read_bytes()).hexdigest()
    sections = {"versions": {"seconds": 1.0, "failed": [], "processes": ["card"]},
                "collectives": {"seconds": 2.0, "failed": [], "processes": ["group"]}}
    monkeypatch.setattr(gpu_check, "prepare", lambda *_: "")
    monkeypatch.setattr(gpu_check, "run_apart", lambda *_: "")
    for sha256, kept in ((digest, {"versions", "collectives"}), ("another", {"collectives"})):
        path.write_text(json.dumps({"script_sha256": sha256, "rehearsal": True, "sections": sections}))
        assert gpu_check.check([], tmp_path, True, only=("group",)) == 1  # it left no result
        found = json.loads(path.read_text())["sections"]
        assert found.keys() == kept and found["collectives"]["failed"]
    with pytest.raises(gpu_check.Misuse, match="torch sees one GPU"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        gpu_check.check([], tmp_path, False, only=("ranks",))


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> tuple[int, str, dict]:
    """All of it, on a .txt that is cut into a training and a validation part."""
    folder = tmp_path_factory.mktemp("gpu_check")
    source = Path(sysconfig.get_paths()["stdlib"]) / "email"
    (folder / "text.txt").write_text("".join(path.read_text() for path in sorted(source.glob("*.py"))))
    return rehearse(folder / "out", "--text", str(folder / "text.txt"))


def test_a_rehearsal_runs_every_section(rehearsal):
    code, output, results = rehearsal
    sections = results["sections"]
    assert code == 0, output
    assert results["rehearsal"] and results["seconds"] > 0 and "failures" in output
    wanted = {section.__name__ for sections in gpu_check.PROCESSES.values() for section in sections}
    assert set(sections) == wanted and not any(entry["failed"] for entry in sections.values())
    for name, entry in sections.items():
        processes = [process for process, part in gpu_check.PROCESSES.items()
                     if name in (section.__name__ for section in part)]
        assert entry["processes"] == processes and entry["seconds"] > 0


def test_a_rehearsal_measures_what_the_day_needs(rehearsal):
    found = rehearsal[2]["sections"]
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["rung"] in RUNGS
    assert "yes" in (found["versions"]["flash_attn"], found["versions"]["flash_attn_interface"])
    assert found["versions"]["sdpa"] == ["aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert found["versions"]["sdpa ms"]["MATH"] > 0
    for shape in gpu_check.TOY_SHAPES:
        rows = found["attention"][str(shape)]
        assert set(rows) == RUNGS and all(row["forward"] > 0 < row["backward"] for row in rows.values())

    assert found["warm_up"]["cold"] > 0 < found["warm_up"]["warm"]
    assert found["graphs"]["graphs"] > 5 and not found["graphs"]["breaks"]
    assert {"EMA", "reload", "both scoring shapes"} < set(found["graphs"]["new"])
    assert not any(found["graphs"]["new"].values())

    steps = found["steps"]
    assert steps["mfu against"] == "a matmul measured here"
    assert steps["peak TFLOP/s"] == steps["matmul TFLOP/s"]
    flops = 1e3 * steps["model_flops_per_step"] / steps["pipelined ms"]
    assert steps["mfu"] == pytest.approx(1e-12 * flops / steps["peak TFLOP/s"])
    assert steps["host ms"] <= steps["synchronised ms"] * 1.01

    groups = found["profile"]["groups"]
    assert tuple(groups) == plan.GROUPS
    here = set(plan.GROUPS) - {"reductions and gathers", "gaps"}
    assert all(groups[name]["ms"] > 0 and groups[name]["planned ms"] > 0 for name in here)
    assert sum(row["ms"] for row in groups.values()) == pytest.approx(found["profile"]["span ms"], rel=0.05)

    few, many = (found["memory"][f"{tokens:,} tokens".replace(",", "")] for tokens in (1024, 4096))
    assert few["planned MB"] < many["planned MB"] and few["peak MB"] > 0 < many["peak MB"]
    assert found["collectives"]["1 rank"]["backend"] == found["collectives"]["2 ranks"]["backend"]
    for stride in (64, 128):
        row = found["scoring"][f"stride {stride}"]
        assert row["compiled"] > 0 < row["eager"] and row["targets"] == 1024 // 128 * stride
        assert 0 <= row["largest difference"] < 1e-3
    whole = found["whole"]
    assert whole["difference"] < 1e-3 and whole["steps"] == 12
    assert whole["val_bpb"] == whole["evals"][whole["headline"]]["val_bpb"]


BROKEN_RUNG = """
import torch, flash_attn
def flash_attn_func(*args, **kwargs):
    torch._dynamo.graph_break()
    return flash_attn.flash_attn_func(*args, **kwargs)
"""
SHIPPED = "args = shipped_settings(header, args.artifact, os.environ)\n"
FAULTS = {"dist.all_reduce(flat)\n": "flat.mul_(2)\n",  # text of the trunk, and what takes its place
          SHIPPED: f"{SHIPPED}            args.logit_softcap = 3.0\n"}


@slow
def test_what_is_broken_is_recorded_and_the_rest_goes_on(tmp_path):
    """A rung that breaks a graph, gradients that do not add up, and an artifact that scores differently."""
    (tmp_path / "flash_attn_interface.py").write_text(BROKEN_RUNG)
    source = (ROOT / "train_gpt.py").read_text()
    for text, fault in FAULTS.items():
        assert source.count(text) == 1
        source = source.replace(text, fault)
    (tmp_path / "train_gpt.py").write_text(source)
    words = ["--script", str(tmp_path), "--only", "cold", "group", "run"]
    code, output, results = rehearse(tmp_path / "out", *words, PYTHONPATH=str(tmp_path))
    failed = {name: " ".join(entry["failed"]) for name, entry in results["sections"].items()}
    assert code == 1, output
    assert "COMPILE=1: Unsupported" in failed["warm_up"] and "Unsupported" in failed["graphs"]
    assert failed["collectives"].startswith("group: AssertionError")
    assert failed["whole"].startswith("run: AssertionError: val_bpb ") and "scored again" in failed["whole"]
    assert results["sections"]["whole"]["difference"] > 1e-3 and "FAILED whole (run)" in output


def test_a_graph_after_the_first_round_is_a_failure(monkeypatch):
    counters = {"stats": Counter(unique_graphs=7), "graph_break": Counter()}
    monkeypatch.setattr(torch._dynamo.utils, "counters", counters)

    def nothing(*_):
        return None

    def compiles(*_):
        counters["stats"]["unique_graphs"] += 1

    def lab(train_step, ema):
        model = SimpleNamespace(exported=dict)
        trainer = SimpleNamespace(model=model, train_step=train_step, moments=nothing,
                                  ema=SimpleNamespace(apply=ema))
        module = SimpleNamespace(try_scoring=nothing, load=nothing, read_file=nothing, unpack=nothing)
        runtime = SimpleNamespace(device="cpu", dtype=None, attention="")
        return SimpleNamespace(module=module, trainer=trainer, runtime=runtime, args=None,
                               batches=iter([(None, None)]))

    assert gpu_check.graphs(lab(nothing, nothing), {}).startswith("7 graphs, no break")
    found = {}
    with pytest.raises(AssertionError, match="new graphs after the first round: .*'EMA': 1"):
        gpu_check.graphs(lab(nothing, compiles), found)
    assert found["new"]["EMA"] == 1 and sum(found["new"].values()) == 1
    counters["graph_break"]["a print"] = 1
    with pytest.raises(AssertionError, match="graph breaks: .*a print"):
        gpu_check.graphs(lab(nothing, nothing), {})


def test_a_process_that_crashes_hangs_or_says_nothing(tmp_path, monkeypatch):
    def ended(code: str) -> str:
        return gpu_check.run_apart([sys.executable, "-c", code], dict(os.environ), tmp_path / "log")

    assert ended("pass") == ""
    assert ended("raise ValueError('no card')") == "exit code 1: ValueError: no card"
    assert ended("import os; os.abort()").startswith("exit code -6")
    monkeypatch.setattr(gpu_check, "MOST_SECONDS", 0.5)
    assert ended("import time; time.sleep(60)") == "no end after 0.5 s"


def test_a_rank_that_cannot_write_is_a_failure_too(tmp_path, monkeypatch, capsys):
    """Rank 0 has found all in order, and the process ended badly."""
    def run_apart(words, env, log):
        for section in gpu_check.PROCESSES["card"]:
            gpu_check.record(tmp_path, section.__name__, "card", {"rung": "sdpa"}, 1.0)
        return ended

    monkeypatch.setattr(gpu_check, "run_apart", run_apart)
    monkeypatch.setattr(gpu_check, "prepare", lambda *_: "")
    ended = "exit code -6: rank 1"
    assert gpu_check.check([], tmp_path, True, only=("card",)) == 1
    assert "FAILED versions (card): exit code -6: rank 1" in capsys.readouterr().out
    ended = ""
    assert gpu_check.check([], tmp_path, True, only=("card",)) == 0
    assert json.loads((tmp_path / "gpu_check.json").read_text())["sections"]["versions"]["failed"] == []


def test_a_trace_of_a_gpu_is_read_by_the_moment_of_the_launch():
    """A kernel may run long after another phase has begun, and a backward has a thread of its own."""
    events = [{"ph": "X", "cat": "user_annotation", "name": f"gpu-check {name}", "ts": start, "dur": dur}
              for name, start, dur in [("backward", 0, 100), ("forward", 10, 20), ("optimizer", 100, 50),
                                       ("Muon", 110, 10)]]
    launches = [("flash_fwd_kernel", 15), ("nvjet_tst_128x256", 20), ("triton_poi_fused_mul_3", 25),
                ("triton_per_fused_embedding_dense_backward", 60), ("cudnn_sdpa_sm90_bprop", 70),
                ("sm90_xmma_gemm_bf16", 115), ("multi_tensor_apply_kernel", 130), ("Memcpy HtoD", 160),
                ("ncclDevKernel_AllReduce", 140), ("triton_red_fused__log_softmax_nll_loss", 28)]
    for number, (name, moment) in enumerate(launches):
        args = {"correlation": number}
        events.append({"ph": "X", "cat": ("cuda_runtime", "cuda_driver")[number % 2], "name": "launch",
                       "ts": moment, "dur": 1, "tid": number % 3, "args": args})
        events.append({"ph": "X", "cat": "gpu_memcpy" if name.startswith("Mem") else "kernel", "name": name,
                       "ts": 500 + 10 * number, "dur": 5, "tid": 7, "args": args})
    events += [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 15, "dur": 3, "tid": 1}, {"ph": "M"}]
    ran = gpu_check.read_trace(events)
    assert [gpu_check.group_of(name, phase) for name, phase, *_ in ran] == [
        "attention forward", "products forward", "pointwise forward", "hash lookups", "attention backward",
        "Muon", "AdamW, RowAdagrad, EMA", "AdamW, RowAdagrad, EMA", "reductions and gathers",
        "loss and head softmax"]
    assert [(start, took) for *_, start, took in ran] == [(500 + 10 * i, 5) for i in range(len(launches))]


def test_what_the_caller_can_mend_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/bench.py"), "--rehearse", "--only", "cards"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --only cards: card, cold, warm, ")
