"""Everything that a day with one GPU needs, in under six minutes and without a network: `make gpu-check`.

    python scripts/bench.py --check [--text FILE ...] [--out FOLDER] [--only PROCESS ...]
    python scripts/bench.py --rehearse     the same with a toy model on a CPU, FlashAttention stood in for

It prints a line a section and writes all numbers to FOLDER/gpu_check.json after each of them; a section that
fails is recorded with its error and the rest goes on. Exit code 1: something failed. The processes, and their
sections in order:

    card    versions     what is installed, the rung that the script picks, SDPA's own backends
            attention    TFLOP/s of every rung that works, both ways, heads of 64 and of 128
    cold    warm-up      seconds with empty compile caches
            graphs       no break, and no new graph after the first round (asserted)
    warm    warm-up      seconds with the caches that `cold` has filled
            steps        pipelined and synchronised, MFU
            profile      one step by the groups of `bench.py --plan`, beside the plan
            scoring      compiled and eager on the same windows (asserted to agree)
            memory       at the peak of a step
    large   memory       the same with four times the tokens a forward
    group   collectives  all that the script uses, in a group of one (asserted)
    ranks   collectives  the same by two ranks; only with two GPUs, or in a rehearsal
    run     whole        steps by the real script, and its artifact scored again (asserted to agree)

Processes are apart where caches, memory peaks or process groups matter. docs/machines.md says more.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

import plan
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench import Torch, matmul_rate
from family import (
    FINDINGS,
    FINE,
    ROOT,
    TRUNK,
    Misuse,
    command,
    load_script,
    markdown_table,
    read_json,
    write_atomic,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

STANDINS = ROOT / "tests/standins"
RESULTS = "gpu_check.json"
MOST_SECONDS = 240  # of a process: one that hangs must not use up the day
WHOLE_SECONDS = 360  # that everything should take on one card
TOLERANCE = 1e-3  # BPB between two scores of one artifact, nats between compiled and eager
PROGRESS = 0.4  # of a run: JEPA's terms are on, so the step is the dearest

# On a card all else is the script's default; a step is then a single forward.
CARD = {"TRAIN_BATCH_TOKENS": 49152}
TOY = {
    "NUM_LAYERS": 2, "MODEL_DIM": 64, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "XSA_LAST_N": 1,
    "TRAIN_SEQ_LEN": 128, "TRAIN_BATCH_TOKENS": 1024, "EVAL_BATCH_TOKENS": 1024, "EVAL_STRIDE": 64,
    "NGRAM_ORDERS": "2,3,4,5,6", "NGRAM_BUCKETS": 1024, "JEPA_LATENT_DIM": 32, "GPTQ_BATCHES": 1,
    "DTYPE": "fp32", "DEVICE": "cpu",
}
WHOLE = {
    "ITERATIONS": 100, "WARMDOWN_ITERS": 30, "MUON_MOMENTUM_WARMUP_STEPS": 30, "EMA_DECAY": 0.95,
    "TRAIN_LOG_EVERY": 25, "VAL_BYTES": 1_000_000, "MAX_WALLCLOCK_SECONDS": 0, "EVAL_BUDGET_SECONDS": 0,
}
TOY_WHOLE = {"ITERATIONS": 12, "WARMDOWN_ITERS": 4, "VAL_BYTES": 10_000, "COMPILE": 0}


def environment(*settings: dict) -> dict[str, str]:
    """The caller's environment with these settings in it."""
    return dict(os.environ) | {key: str(value) for each in settings for key, value in each.items()}


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]


class Lab:
    """What the sections of a process share; the dear parts are made when they are first asked for."""

    def __init__(self, script: Path, folder: Path, rehearse: bool):
        self.script, self.folder, self.rehearse = script, folder, rehearse
        if rehearse:  # inductor takes minutes on a CPU; what dynamo does is the same without it
            torch.compile = functools.partial(torch.compile, backend="eager")
        torch._logging.set_logs(recompiles=True, graph_breaks=True)  # on stderr, to explain a failure
        self.module = load_script(script)
        self.args = self.module.Hyperparameters(os.environ)
        self.runtime = self.module.Runtime(self.args)

    @functools.cached_property
    def trainer(self):
        """A trainer on real text; the rung is the one that `versions` has found, by ATTENTION."""
        runtime = self.runtime
        runtime.attention = "fa3" if self.rehearse else self.module.pick_attention(self.args, runtime)
        data = self.module.Dataset(self.args, verify=False)
        return self.module.Trainer(self.args, data, runtime, lambda text, *_: print(f"  {text}"))

    @functools.cached_property
    def batches(self):
        aux = self.trainer.model.aux
        loader = self.module.Loader(self.trainer.data, self.args, self.trainer.plan, 0)
        return loader.prefetch(self.runtime.device, aux)

    def step(self) -> None:
        """One training step on the next batch, queued."""
        ids, weights, aux_inputs, _ = next(self.batches)
        self.trainer.train_step(ids, weights, PROGRESS, aux_inputs)

    def wait(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()

    @functools.cached_property
    def card(self) -> str:
        """The name in plan.CARDS of this GPU; "" of a CPU, or where there is none."""
        return next((card for card in plan.CARDS if card in self.runtime.device_name().lower()), "")

    @functools.cached_property
    def plan(self) -> dict:
        """What `bench.py --plan` says of this configuration on one such card, or on an H100."""
        return plan.make_plan(self.script, {}, self.card or "h100", 1, environ=dict(os.environ))

    def seconds(self, call) -> float:
        """Median seconds of a call; waits for the device."""
        timer = Timer("call()", globals={"call": call})
        return timer.blocked_autorange(min_run_time=0.01 if self.rehearse else 0.2).median

    def qkv(self, rows: int, length: int, heads: int, kv_heads: int, dim: int) -> list[torch.Tensor]:
        """q, k and v, (B, T, H, d) each."""
        like = {"device": self.runtime.device, "dtype": self.runtime.dtype, "requires_grad": True}
        return [torch.randn(rows, length, count, dim, **like) for count in (heads, kv_heads, kv_heads)]


# -----------------------------------------------------------------------------
# THE CARD
# -----------------------------------------------------------------------------

SHAPES = ((12, 4096, 8, 4, 64), (12, 4096, 4, 2, 128))  # (B, T, H, K, d)
SDP_BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
TOY_SHAPES = ((2, 256, 4, 2, 16), (2, 256, 2, 1, 32))


def installed(package: str) -> str:
    """A package's version, "yes" where it has none, "" where it is missing."""
    for name in (package, package.replace("_", "-")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "yes" if importlib.util.find_spec(package) else ""


def driver() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return ""


def versions(lab: Lab, found: dict) -> str:
    """Versions; the rung that the script picks, with its timings; SDPA's backend, and each one's time."""
    packages = ("torch", "triton", "flash_attn", "flash_attn_interface", "constriction", "zstandard")
    found |= {name: installed(name) for name in packages}
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": driver(),
              "device": lab.runtime.device_name(), "dtype": str(lab.runtime.dtype), "cores": os.cpu_count()}
    found["rung"] = rung = lab.module.pick_attention(lab.args, lab.runtime)
    found["notes"] = lab.runtime.notes

    q, k, v = (x.detach().transpose(1, 2).requires_grad_()
               for x in lab.qkv(*(TOY_SHAPES if lab.rehearse else SHAPES)[0]))

    def both_ways() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), out)

    with torch.profiler.profile() as profile:
        both_ways()
    ran = profile.key_averages()
    found["sdpa"] = [event.key for event in ran if re.match(r"aten::_scaled_dot(?!.*backward)", event.key)]
    found["sdpa kernels"] = [event.key for event in ran if event.device_type.name != "CPU"]
    found["sdpa ms"] = {"as it chooses": 1e3 * lab.seconds(both_ways)}
    for backend in SDP_BACKENDS:
        try:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                found["sdpa ms"][backend] = 1e3 * lab.seconds(both_ways)
        except Exception as error:  # a backend that does not take this shape
            found["sdpa ms"][backend] = first_line(error)
    built = f"torch {found['torch']}, CUDA {found['cuda']}, cuDNN {found['cudnn']}"
    return f"{found['device']}, {built}, rung {rung}; SDPA is {' '.join(found['sdpa'])}"


def attention(lab: Lab, found: dict) -> str:
    """TFLOP/s of every rung over the pairs that are visible; a backward counts as 2.5 forwards."""
    best, lines = [], []
    for shape in TOY_SHAPES if lab.rehearse else SHAPES:
        rows, length, heads, _, dim = shape
        flops = 4.0 * rows * heads * dim * plan.visible_pairs(length, length, True)
        table = found[str(shape)] = {}
        for rung in (*lab.module.FLASH, *lab.module.ATTENTION):
            try:
                lab.module.check_rung(rung, lab.args, lab.runtime)
                attend, qkv = lab.module.attention_of(rung), lab.qkv(*shape)
                out = attend(*qkv)
                forward = lab.seconds(functools.partial(attend, *qkv))
                backward = functools.partial(torch.autograd.grad, out, qkv, out, retain_graph=True)
                backward = lab.seconds(backward)
                table[rung] = {"forward": flops / forward / 1e12, "backward": 2.5 * flops / backward / 1e12,
                               "ms": 1e3 * (forward + backward)}
            except Exception as error:  # no package, no memory, or wrong numbers
                table[rung] = first_line(error)
            qkv = out = backward = None  # `math` keeps tens of gigabytes
        works = {rung: row["ms"] for rung, row in table.items() if isinstance(row, dict)}
        assert works, f"no rung works for {shape}: {table}"
        best.append(f"{min(works, key=works.get)} {min(works.values()):.2f} ms for heads of {dim}")
        lines += [[str(shape), rung, *(f"{table[rung][way]:.1f}" for way in ("forward", "backward")),
                   f"{table[rung]['ms']:.2f}"] for rung in works]
    header = ["rows, length, heads, of keys, width", "rung", "forward TFLOP/s", "backward TFLOP/s", "ms"]
    return f"{', '.join(best)}\n{markdown_table(header, lines)}\n"


# -----------------------------------------------------------------------------
# TRAINING AND SCORING
# -----------------------------------------------------------------------------


def warm_up(lab: Lab, found: dict) -> str:
    """Seconds of the script's own warm-up, with the compile caches as this process finds them."""
    trainer, name = lab.trainer, os.environ["GPU_CHECK_PROCESS"]
    start = time.perf_counter()
    trainer.warm_up()
    lab.wait()
    found[name] = time.perf_counter() - start
    return f"{found[name]:.1f} s {name}"


def graphs(lab: Lab, found: dict) -> str:
    """After the warm-up no phase of a run may break a graph or make a new one.

    Raises:
        AssertionError: one does, or nothing was compiled.
    """
    module, trainer, runtime = lab.module, lab.trainer, lab.runtime
    counters, model = torch._dynamo.utils.counters, trainer.model
    batch = next(lab.batches)

    def reload() -> None:
        """`load` without a file between: coding 34 M weights would take longer than all else here."""
        tensors = {name: p.detach().cpu().numpy() for name, p in model.exported().items()}
        memory = {"read_file": lambda *_: b"", "unpack": lambda *_: ({"config": lab.args.shipped()}, tensors)}
        with mock.patch.multiple(module, **memory):
            again = module.load("memory", runtime.device, lab.args, runtime.dtype, runtime.attention)
        module.try_scoring(again, runtime)

    found["graphs"] = counters["stats"]["unique_graphs"]
    found["new"] = {}
    rounds = {f"a step at progress {progress}": functools.partial(trainer.train_step, *batch[:2], progress)
              for progress in (0.0, 0.4, 0.9)}  # JEPA's phases
    rounds |= {"calibration": lambda: trainer.moments(1), "EMA": trainer.ema.apply,
               "a step after EMA": rounds["a step at progress 0.4"], "reload": reload,
               "both scoring shapes": lambda: module.try_scoring(model, runtime)}
    for name, action in rounds.items():
        before = counters["stats"]["unique_graphs"]
        action()
        found["new"][name] = counters["stats"]["unique_graphs"] - before
    found["breaks"] = dict(counters["graph_break"])
    assert found["graphs"], "nothing was compiled"
    assert not found["breaks"], f"graph breaks: {list(found['breaks'])[:3]}"
    assert not any(found["new"].values()), f"new graphs after the first round: {found['new']}"
    return f"{found['graphs']} graphs, no break, none new in {len(rounds)} rounds"


def steps(lab: Lab, found: dict) -> str:
    """Milliseconds a step, queued as in training and with a wait after each; MFU by the plan's FLOPs."""
    count = 4 if lab.rehearse else 30
    for _ in range(3):
        lab.step()
    lab.wait()
    start = time.perf_counter()
    for _ in range(count):
        lab.step()
    lab.wait()
    pipelined, queued, alone = (time.perf_counter() - start) / count, [], []
    for _ in range(count):
        start = time.perf_counter()
        lab.step()
        queued.append(time.perf_counter() - start)
        lab.wait()
        alone.append(time.perf_counter() - start)

    matmul = matmul_rate(Torch(lab.module, lab.runtime), 0.1 if lab.rehearse else 0.5)
    peak = 1e12 * plan.CARDS[lab.card].peak.value if lab.card else matmul
    against = "dense bf16 of the datasheet" if lab.card else "a matmul measured here"
    flops = lab.plan["model_flops_per_step"]
    found |= {"steps": count, "pipelined ms": 1e3 * pipelined, "host ms": 1e3 * statistics.median(queued),
              "synchronised ms": 1e3 * statistics.median(alone), "planned ms": lab.plan["ms_per_step"],
              "model_flops_per_step": flops, "matmul TFLOP/s": matmul / 1e12, "peak TFLOP/s": peak / 1e12,
              "mfu": flops / pipelined / peak, "planned mfu": lab.plan["mfu"],
              "planned for": lab.plan["card"], "mfu against": against}
    return (f"{1e3 * pipelined:.1f} ms pipelined, {found['synchronised ms']:.1f} synchronised, MFU "
            f"{found['mfu']:.3f} against {against} ({peak / 1e12:.4g} TFLOP/s)")


FAMILIES = (  # of kernels and operations; the first whose pattern is in the name
    ("collective", r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter"),
    ("attention", r"flash|fmha|sdpa|attention|attn"),
    ("products", r"gemm|cutlass|cublas|nvjet|xmma|splitk|triton_tem|::(mm|bmm|addmm|baddbmm)$"),
    ("hash lookups", r"embedding|index|gather|scatter|bitwise|remainder"),
    ("loss and head softmax", r"softmax|nll|cross_entropy|tanh"),
    ("pointwise", ""),
)
MARK = "gpu-check "


def family_of(name: str) -> str:
    return next(family for family, pattern in FAMILIES if re.search(pattern, name.lower()))


def group_of(name: str, phase: str) -> str:
    """The group of plan.GROUPS that a kernel of this name belongs to, launched in this phase."""
    family = family_of(name)
    if family == "collective":
        return "reductions and gathers"
    if phase not in (plan.FORWARD, plan.BACKWARD):
        return "Muon" if phase == plan.MUON else "AdamW, RowAdagrad, EMA"
    return f"{family} {phase}" if f"{family} {phase}" in plan.GROUPS else family


def read_trace(events: list[dict]) -> list[tuple[str, str, float, float]]:
    """A Chrome trace of torch.profiler -> (name, phase, start, microseconds) of what ran on the device.

    Kernels run later than they are launched: the phase is the innermost marked range around the launch, by
    the clock, since a backward launches from a thread of its own.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    ranges = sorted((event["ts"], event["ts"] + event["dur"], event["name"][len(MARK):]) for event in spans
                    if event.get("cat") == "user_annotation" and event["name"].startswith(MARK))
    launches = {event["args"]["correlation"]: event["ts"] for event in spans
                if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]}

    def phase(moment: float) -> str:
        inside = [name for start, end, name in ranges if start <= moment < end]
        return inside[-1] if inside else plan.OPTIMIZER

    ran = [event for event in spans if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    own = [event["dur"] for event in ran]
    if not ran:  # a CPU: its operations, each less those inside it
        ran = [event for event in spans if event.get("cat") == "cpu_op"]
        ran.sort(key=lambda event: (event["tid"], event["ts"], -event["dur"]))
        own, around = [event["dur"] for event in ran], []
        for i, event in enumerate(ran):
            while around and (event["tid"] != ran[around[-1]]["tid"]
                              or event["ts"] >= ran[around[-1]]["ts"] + ran[around[-1]]["dur"]):
                around.pop()
            if around:
                own[around[-1]] -= event["dur"]
            around.append(i)
    return [(event["name"], phase(launches.get(event.get("args", {}).get("correlation"), event["ts"])),
             event["ts"], max(0.0, took)) for event, took in zip(ran, own)]


def profile(lab: Lab, found: dict) -> str:
    """A step's milliseconds by group, beside the plan's; gaps are what no kernel of the span covers."""
    trainer, optimizers = lab.trainer, lab.trainer.optimizers
    parts = [(trainer, "micro_step", plan.BACKWARD), (trainer.model, "losses", plan.FORWARD),
             (optimizers, "reduce", plan.REDUCE), (optimizers, "step", plan.OPTIMIZER),
             (optimizers.muon, "step", plan.MUON), (trainer.ema, "update", plan.OPTIMIZER)]
    path = lab.folder / "trace.json"
    with contextlib.ExitStack() as stack:
        for owner, name, phase in parts:
            marked = torch.profiler.record_function(MARK + phase)(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, marked))
        for _ in range(2):  # the first time starts the profiler itself
            with torch.profiler.profile() as traced:
                lab.step()
                lab.wait()
    traced.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    saw = any(event.get("cat") == "kernel" for event in events)
    assert saw or lab.runtime.device.type == "cpu", "the profiler saw no kernel of the GPU: is CUPTI there?"
    ran = read_trace(events)

    ms, kernels, by_name = defaultdict(float), Counter(), defaultdict(float)
    for name, phase, _, microseconds in ran:
        group = group_of(name, phase)
        ms[group] += microseconds / 1e3
        kernels[group] += 1
        by_name[f"{group}: {name[:100]}"] += microseconds / 1e3
    span = (max(start + took for *_, start, took in ran) - min(start for *_, start, _ in ran)) / 1e3
    ms["gaps"] = max(0.0, span - sum(ms.values()))
    planned = lab.plan["groups"]
    found["groups"] = {name: {"ms": ms[name], "kernels": kernels[name], "planned ms": planned[name]["ms"]}
                       for name in plan.GROUPS}
    found["longest"] = dict(sorted(by_name.items(), key=lambda item: -item[1])[:20])
    found["span ms"] = span
    print(markdown_table(["group", "ms", "planned ms", "kernels"], [
        [name, f"{row['ms']:.2f}", f"{row['planned ms']:.2f}", row["kernels"]]
        for name, row in found["groups"].items()]))
    assert not set(ms) - set(plan.GROUPS), f"not the plan's groups: {set(ms) - set(plan.GROUPS)}"
    return f"{span:.1f} ms from the first kernel to the last, planned {lab.plan['ms_per_step']:.1f}"


def scoring(lab: Lab, found: dict) -> str:
    """Milliseconds a batch compiled and eager, and the largest difference in the nats of a target.

    Raises:
        AssertionError: the means differ by more than TOLERANCE nats.
    """
    module, args, model = lab.module, lab.args, lab.trainer.model
    batch, told = max(1, args.eval_batch_tokens // args.eval_seq_len), []
    for stride in sorted({args.eval_seq_len, args.eval_stride}):
        windows = module.WindowPlan(args.eval_seq_len, stride, batch)
        rows = module.windows(len(lab.trainer.data.val) - 1, args.eval_seq_len, stride)[:batch]
        ids, first, targets = windows.tensors(lab.trainer.data.val, rows, lab.runtime.device)
        ms, nats = {}, {}

        @torch.no_grad()
        def score(ids=ids, first=first, targets=targets) -> torch.Tensor:
            logprobs = model.logits(ids, first, targets.size(1)).log_softmax(-1)
            return -logprobs.gather(-1, targets[..., None]).squeeze(-1)

        for name, compiled in (("compiled", lab.runtime.compile), ("eager", False)):
            with mock.patch.object(module.piece, "compiled", compiled):
                ms[name], nats[name] = 1e3 * lab.seconds(score), score()
        gap = nats["compiled"] - nats["eager"]
        found[f"stride {stride}"] = {**ms, "largest difference": gap.abs().max().item(),
                                     "difference of means": gap.mean().item(), "targets": gap.numel()}
        assert abs(gap.mean().item()) < TOLERANCE, f"stride {stride}: {found[f'stride {stride}']}"
        told.append(f"stride {stride}: {ms['compiled']:.1f} ms compiled, {ms['eager']:.1f} eager, largest "
                    f"difference {gap.abs().max():.2g} nats")
    return "; ".join(told)


def memory(lab: Lab, found: dict) -> str:
    """Megabytes at the peak of a step, beside the plan's; on a CPU those of the whole process."""
    tokens, trainer = lab.args.train_batch_tokens, lab.trainer
    assert trainer.plan.micro_steps == 1, f"{tokens} tokens are not one forward"
    lab.module.piece.compiled = lab.runtime.compile
    lab.step()  # compiles where this shape is new
    lab.wait()
    if lab.runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    lab.step()
    lab.wait()
    peak, planned = lab.runtime.peak_memory_mb(), lab.plan["memory"]["peak"] / 2**20
    found[f"{tokens} tokens"] = {"peak MB": peak, "planned MB": planned}
    return f"{peak:,.0f} MB at {tokens:,} tokens a forward, planned {planned:,.0f}"


# -----------------------------------------------------------------------------
# RANKS, AND THE WHOLE SCRIPT
# -----------------------------------------------------------------------------


class Group(int):
    """A number of ranks that is never one to those who ask: the script then goes through its collectives."""

    __hash__ = int.__hash__

    def __gt__(self, other) -> bool:
        return True

    def __eq__(self, other) -> bool:
        return False


def collectives(lab: Lab, found: dict) -> str:
    """Runtime's and the optimizers' collectives against sums made without them.

    Raises:
        AssertionError: a result differs.
    """
    module, runtime = lab.module, lab.runtime
    if not dist.is_initialized():
        nccl = runtime.device.type == "cuda" and dist.is_nccl_available()
        meeting = lab.folder / "meeting"
        meeting.unlink(missing_ok=True)
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", init_method=f"file://{meeting}",
                                rank=0, world_size=1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    runtime.world_size = Group(ranks)
    trainer, same = lab.trainer, torch.testing.assert_close

    operations = {dist.ReduceOp.SUM: ranks * (ranks + 1) // 2, dist.ReduceOp.MAX: ranks, dist.ReduceOp.MIN: 1}
    for place in sorted({"cpu", runtime.device.type}):
        for dtype in (torch.int64, torch.float64, torch.float32):
            for operation, wanted in operations.items():
                mine = torch.full((3,), rank + 1, dtype=dtype, device=place)
                assert runtime.all_reduce(mine, operation).tolist() == [wanted] * 3, (place, dtype, operation)
    assert runtime.from_main([rank + 0.5]) == [0.5]

    # the same step by one process that is handed the sum of all ranks' gradients
    alone = copy.copy(runtime)
    alone.world_size, alone.rank = 1, 0
    twin = module.Trainer(lab.args, trainer.data, alone, trainer.log)
    draws = [torch.Generator().manual_seed(number) for number in range(ranks)]
    for p, q in zip(trainer.model.parameters(), twin.model.parameters()):
        grads = [torch.randn(p.shape, generator=draw).to(p.device) for draw in draws]
        p.grad, q.grad = grads[rank], sum(grads)
    norms = []
    for each in (trainer, twin):
        norms.append(each.optimizers.reduce())
        each.optimizers.step(1, 0.0, norms[-1])
    same(*norms, rtol=1e-4, atol=0)
    furthest = 0.0
    for (name, p), q in zip(trainer.model.named_parameters(), twin.model.parameters()):
        same(p, q, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        furthest = max(furthest, (p - q).abs().max().item())
    momenta = (each.optimizers.muon.state().values() for each in (trainer, twin))
    for mine, wanted in zip(*momenta):
        same(mine, wanted, rtol=1e-3, atol=1e-4)
    name = f"{ranks} rank{'s' * (ranks > 1)}"
    found[name] = {"backend": dist.get_backend_config(), "largest difference of a weight": furthest}
    dist.destroy_process_group()
    return f"{name}, {found[name]['backend']}: all agree, weights to {furthest:.1e}"


def whole(lab: Lab, found: dict) -> str:
    """Steps end to end by the real script, its artifact scored again by a fresh process.

    Raises:
        AssertionError: a run failed, learned nothing, or the two scores differ by TOLERANCE BPB.
    """
    settings = {**WHOLE, **(TOY_WHOLE if lab.rehearse else {}), "RUNS_PATH": lab.folder}
    if not installed("constriction") and not lab.rehearse:
        settings |= {"NUM_LAYERS": 6, "MLP_MULT": 2}  # LZMA takes minutes for 34 M weights
    metrics, seconds = {}, {}
    for name, more in (("run", {}), ("again", {"EVAL_ONLY": 1, "ARTIFACT": lab.folder / "run/artifact.bin"})):
        start, env = time.perf_counter(), environment(settings, more, {"RUN_ID": name})
        done = subprocess.run([sys.executable, lab.script], env=env, capture_output=True, text=True)
        seconds[name] = time.perf_counter() - start
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        assert done.returncode in (0, 3), f"{name}: exit code {done.returncode}: {lines}"
        metrics[name] = json.loads((lab.folder / name / "metrics.json").read_text())

    first, second = (metrics[name]["val_bpb"] for name in ("run", "again"))
    keys = ("val_bpb", "headline", "steps", "ms_per_step", "bytes_total", "peak_mem_mb", "clocks", "evals")
    found |= {"seconds a process": seconds, "val_bpb again": second, "difference": abs(first - second),
              "given": {key: str(value) for key, value in settings.items()}}
    found |= {key: metrics["run"][key] for key in keys} | {"clocks again": metrics["again"]["clocks"]}
    assert first < 8, f"val_bpb {first:.4f}: nothing was learned"
    assert abs(first - second) < TOLERANCE, f"val_bpb {first:.6f}, scored again {second:.6f}"
    return f"{found['steps']} steps, val_bpb {first:.5f}, scored again {second:.5f}"


# -----------------------------------------------------------------------------
# THE PROCESSES
# -----------------------------------------------------------------------------

PROCESSES = {
    "card": (versions, attention), "cold": (warm_up, graphs),
    "warm": (warm_up, steps, profile, scoring, memory), "large": (memory,),
    "group": (collectives,), "ranks": (collectives,), "run": (whole,),
}


def record(folder: Path, section: str, process: str, found: dict, seconds: float, failed: str = "") -> None:
    """Adds what a section found to the file of results."""
    results = json.loads((folder / RESULTS).read_text())
    entry = results["sections"].setdefault(section, {"seconds": 0.0, "failed": [], "processes": []})
    entry |= {**found, "seconds": entry["seconds"] + seconds}
    entry["processes"].append(process)
    if failed:
        entry["failed"].append(f"{process}: {failed}")
        print(f"FAILED {section} ({process}): {failed}", flush=True)
    write_atomic(folder / RESULTS, json.dumps(results, indent=1).encode())


def inside(process: str, script: Path, folder: Path, rehearse: bool) -> int:
    """Runs the sections of a process in this one; rank 0 records them. -> exit code"""
    lab, code = Lab(script, folder, rehearse), FINE
    for section in PROCESSES[process]:
        found, failed, start = {}, "", time.perf_counter()
        try:
            text = section(lab, found)
        except Exception as error:  # whatever it is, the next section is worth a try
            traceback.print_exc()
            failed, code = first_line(error), FINDINGS
        seconds = time.perf_counter() - start
        if os.environ.get("RANK", "0") == "0":
            if not failed:
                print(f"{section.__name__} ({process}): {text} [{seconds:.1f} s]", flush=True)
            record(folder, section.__name__, process, found, seconds, failed)
    return code


def run_apart(words: list[str], env: dict[str, str], log: Path) -> str:
    """Runs a command, its errors into a log -> "" or how it ended."""
    with open(log, "w") as errors:
        child = subprocess.Popen(words, env=env, cwd=ROOT, stderr=errors, start_new_session=True)
        try:
            code = child.wait(MOST_SECONDS)
        except BaseException as error:  # whatever it has started ends with it
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"no end after {MOST_SECONDS} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1] if lines else ''}" if code else ""


def prepare(texts: list[str], folder: Path) -> str:
    """Shards of the texts, or of the standard library -> "" or the error. A single .txt is one document,
    so its tail is cut off for validation."""
    source = ["files", *map(os.path.abspath, texts), "--train-bytes", "64000000"] if texts else ["stdlib"]
    if [Path(text).suffix for text in texts] == [".txt"]:
        # Whatever the bytes are, byte260 has ids for them: what is not UTF-8 is cut like any character.
        text = Path(texts[0]).read_bytes().decode("utf-8", "surrogateescape")
        cut = len(text) * 9 // 10
        for name, part in (("train.txt", text[:cut]), ("val.txt", text[cut:])):
            (folder / name).write_bytes(part.encode("utf-8", "surrogateescape"))
        source = ["files", str(folder / "train.txt"), "--val", str(folder / "val.txt")]
    words = [sys.executable, "data/prepare.py", *source, "--out", str(folder / "data"), "--force"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["failed"])[-1] if done.returncode else ""


def check(texts: list[str], folder: Path, rehearse: bool, script: Path = TRUNK, only: tuple = ()) -> int:
    """Runs every process, or those in `only` -> exit code 1 where anything failed. What other processes found
    before in this folder, with the same script, stays.

    texts: files to train on, the standard library where there are none. rehearse: a toy model on a CPU.

    Raises:
        Misuse: torch sees no GPU, or there is no process of that name.
    """
    if not torch.cuda.is_available() and not rehearse:
        raise Misuse("torch sees no CUDA or ROCm device; --rehearse tries the command without one")
    if odd := {*only} - {*PROCESSES}:
        raise Misuse(f"--only {min(odd)}: {', '.join(PROCESSES)}")
    cards = 2 if rehearse else torch.cuda.device_count()
    if {*only} == {"ranks"} and cards < 2:
        raise Misuse("--only ranks: torch sees one GPU; two, or --rehearse")
    folder.mkdir(parents=True, exist_ok=True)
    start, path = time.perf_counter(), folder / RESULTS
    head = {"script": str(script), "script_sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"), "rehearsal": rehearse}
    before = read_json(path) if only and path.exists() else {}
    same = all(before.get(key) == head[key] for key in ("script_sha256", "rehearsal"))
    kept = {name: section for name, section in before.get("sections", {}).items()
            if same and not {*only} & {*section["processes"]}}
    write_atomic(path, json.dumps({**head, "sections": kept}).encode())
    if failed := prepare(texts, folder):
        record(folder, "data", "prepare", {}, 0.0, failed)

    settings = {**(TOY if rehearse else CARD), "DATA_PATH": folder / "data", "COMPILE": 1}
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        settings[name] = folder / "cache" / name.lower()
    for process, sections in PROCESSES.items():
        if only and process not in only or process == "ranks" and cards < 2:
            continue
        if process == "cold":
            shutil.rmtree(folder / "cache", ignore_errors=True)
        more = {"GPU_CHECK_PROCESS": process}
        if process == "ranks":  # stacks of another height sum in another order, which bf16 would show
            more["DTYPE"] = "fp32"
        if process == "large":
            more["TRAIN_BATCH_TOKENS"] = more["DEVICE_BATCH_TOKENS"] = 4 * settings["TRAIN_BATCH_TOKENS"]
        if rehearse:  # after what the caller may have put there
            paths = os.environ.get("PYTHONPATH"), str(STANDINS)
            more["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        env = environment(settings, more)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        words = [sys.executable, *(launcher if process == "ranks" else []), __file__]
        words += [process, str(script), str(folder), str(int(rehearse))]
        began = time.perf_counter()
        ended = run_apart(words, env, folder / f"{process}.log")

        found = json.loads(path.read_text())["sections"]
        told = any(line.startswith(f"{process}: ") for entry in found.values() for line in entry["failed"])
        for section in (function.__name__ for function in sections):
            silent = process not in found.get(section, {"processes": []})["processes"]
            if silent or ended and not told:  # a crash, or another rank than the one that writes
                seconds = time.perf_counter() - began
                record(folder, section, process, {}, seconds, ended or "it left no result")
        if rung := found.get("versions", {}).get("rung"):
            settings["ATTENTION"] = rung  # not timed again by every process

    results = json.loads(path.read_text())
    results["seconds"] = time.perf_counter() - start
    if not (rehearse or only) and results["seconds"] > WHOLE_SECONDS:
        print(f"slow: {results['seconds']:.0f} s, {WHOLE_SECONDS} are planned for all of it on one H200")
    broken = [line for entry in results["sections"].values() for line in entry["failed"]]
    write_atomic(path, json.dumps(results, indent=1).encode())
    print(f"{len(results['sections'])} sections, {len(broken)} failures, {results['seconds']:.0f} s: {path}")
    return FINDINGS if broken else FINE


def main() -> int:
    if len(sys.argv) != 5:
        raise Misuse("this is one process of `python scripts/bench.py --check`, which starts it")
    process, script, folder, rehearse = sys.argv[1:]
    return inside(process, Path(script), Path(folder), rehearse == "1")


if __name__ == "__main__":
    command(main)
