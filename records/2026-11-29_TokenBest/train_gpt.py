"""TokenBest: the family's best token model.

Parent: ../2026-11-22_BiJEPAX/train_gpt.py
Idea:   BiJEPAX without recurrence and its latent objective, which did not pay. Training reads rows
        in a shuffled order, in small batches at first. The rest is the parent's:
        two lanes, gates, and a mixture over the tree of the vocabulary that sums to one.

Run:    python train_gpt.py --help                             every variable and its reason
        python train_gpt.py                                    one process, any device
        torchrun --standalone --nproc_per_node=8 train_gpt.py  the contest: 8xH100, 600 s, 16 MB
        RESUME=auto RUN_ID=name torchrun ...                   go on with a run
        EVAL_ONLY=1 ARTIFACT=FILE python train_gpt.py          only score an artifact

The file reads downwards: environment -> batches -> losses -> weights -> artifact -> bits.
It needs torch, numpy and safetensors, and numba for the mixture (PPM_WEIGHT=1).
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import difflib
import fcntl
import functools
import hashlib
import importlib
import itertools
import json
import lzma
import math
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # a later import keeps the group: threads abort
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.utils.benchmark import Timer

# torch 2.13 gave two collectives new names, and warns of the old ones
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

constriction = None  # without it, LZMA takes the place of rANS
with contextlib.suppress(ImportError):
    import constriction
njit = None  # without it, only the network scores
with contextlib.suppress(ImportError):
    from llvmlite import ir
    from numba import extending, njit, types
    from numba.core.cgutils import alloca_once_value, for_range, unpack_tuple

# -----------------------------------------------------------------------------
# HYPERPARAMETERS
# -----------------------------------------------------------------------------


class UserError(Exception):
    """A mistake in a setting or a file: one line and exit code 2."""


class Var:
    """One environment variable, of its default's type; `why` is the unit and the reason.
    `ship` marks what artifacts carry, to build the network ("model") or to score ("eval")."""

    def __init__(self, default, why: str, low=None, high=None, *, choices=(), ship: str = ""):
        self.default, self.why = default, why
        self.low, self.high, self.choices = low, high, choices
        self.ship = ship

    def __set_name__(self, owner, name: str) -> None:
        self.name = name.upper()

    def accepted(self) -> str:
        if self.choices:
            return " | ".join(self.choices)
        kinds = {bool: "0 | 1", int: "an integer", float: "a number", str: "text"}
        low = "" if self.low is None else f" from {self.low}"
        high = "" if self.high is None else f" to {self.high}"
        return kinds[type(self.default)] + low + high

    def convert(self, text: str):
        """The text in the default's type; ValueError or KeyError where that fails."""
        word = text.strip()
        if isinstance(self.default, bool):
            return {"0": False, "1": True, "false": False, "true": True}[word.lower()]
        if isinstance(self.default, str):
            return word if self.choices else text
        return type(self.default)(word)

    def parse(self, text: str):
        with contextlib.suppress(ValueError, KeyError):
            value = self.convert(text)
            if isinstance(value, str):
                accepted = value in (self.choices or [value])
            else:
                low = value if self.low is None else self.low
                high = value if self.high is None else self.high
                accepted = math.isfinite(value) and low <= value <= high
            if accepted:
                return value
        raise UserError(f"{self.name}={text!r} is not accepted: {self.accepted()} ({self.why})")


TENSOR_CLASSES = ("embed", "attn", "mlp", "other")

CHECKS: list = []  # each section adds those of its features: a record keeps both or neither


def check(function):
    """Registers a function that forbids settings which cannot work."""
    CHECKS.append(function)
    return function


def forbid(broken, args: Hyperparameters, names: str, reason: str) -> None:
    """Where `broken`, raises UserError with the settings in `names` and their values."""
    if broken:
        values = ", ".join(f"{name.upper()}={getattr(args, name)}" for name in names.split())
        raise UserError(f"{values}: {reason}")


class Hyperparameters:
    """Every setting of a run, read from the environment once."""

    _data = "Data"
    data_path = Var("./data/datasets/fineweb10B_sp8192_caseops", "folder of shards")
    tokenizer_path = Var("", "SentencePiece .model; byte260 has none")
    vocab_size = Var(8192, "ids; 260 = 4 special ones + 256 bytes", 5, 65536, ship="model")
    train_seq_len = Var(2048, "tokens a training row", 2, ship="model")
    train_batch_tokens = Var(786432, "tokens an optimizer step, over all ranks", 2)
    device_batch_tokens = Var(98304, "tokens a forward: the out-of-memory knob", 1)
    train_order = Var("shuffled", "of rows in an epoch", choices=("sequential", "shuffled"))
    train_align = Var("stream", "packed: cut by documents", choices=("stream", "packed"))
    pack_rows = Var(8, "packed: rows that are read as one text", 2)
    verify_data = Var("auto", "by manifest.json; auto: up to 2 GB", choices=("auto", "0", "1"))

    _model = "Model"
    num_layers = Var(11, "transformer blocks", 1, ship="model")
    model_dim = Var(512, "width of the residual stream", 8, ship="model")
    num_heads = Var(8, "query heads", 1, ship="model")
    num_kv_heads = Var(4, "key/value heads (GQA)", 1, ship="model")
    mlp_mult = Var(4.0, "MLP hidden width / model width", 0, ship="model")
    leaky_slope = Var(0.3, "slope of the squared LeakyReLU; 0 = ReLU^2", ship="model")
    tied_embed_init_std = Var(0.005, "std of the token embedding, also the head", 0)
    logit_softcap = Var(30.0, "cap * tanh(logits / cap); 0 = none", 0, ship="model")
    qk_gain_init = Var(5.25, "initial gain a head on normalised queries", ship="model")
    rope_base = Var(10000.0, "rotary base", 1, ship="model")
    rope_dims = Var(16, "rotated dimensions a head; 0 = all (#315)", 0, ship="model")
    ln_scale = Var(True, "block inputs times 1/sqrt(layer + 1) (#315)", ship="model")
    doc_mask = Var(True, "attention stays in a document", ship="model")
    xsa_last_n = Var(11, "last layers that drop their own value (XSA, #265)", 0, ship="model")
    gate_window = Var(12, "channels of gates", 1, ship="model")
    gate_scale = Var(0.5, "of the head gates' logits", ship="model")
    parallel_start = Var(8, "first with two lanes", 0, ship="model")

    _optimizers = "Optimizers and schedule"
    iterations = Var(20000, "optimizer steps at most", 1)
    max_wallclock_seconds = Var(600.0, "training time; 0 = no limit", 0)
    warmdown_iters = Var(17000, "steps over which the rate falls", 0)
    min_lr = Var(0.1, "least rate, as a share of the peak", 0, 1)
    batch_growth = Var("1", "updates a step, N until a share of the run: 4:0.4,2:0.75,1")
    warmup_steps = Var(2, "steps that compile, off the clock", 0)
    matrix_lr = Var(0.026, "Muon: block matrices", 0)
    muon_momentum = Var(0.97, "final momentum", 0, 0.9999)
    muon_momentum_warmup_start = Var(0.92, "momentum at step 0", 0, 0.9999)
    muon_momentum_warmup_steps = Var(1500, "steps from start to final momentum", 0)
    muon_backend_steps = Var(5, "steps of Polar Express", 1, 5)
    muon_wd = Var(0.095, "Muon: decoupled weight decay", 0)
    tied_embed_lr = Var(0.03, "AdamW: tied token embedding", 0)
    scalar_lr = Var(0.02, "AdamW: gains, mixes, gates", 0)
    embed_wd = Var(0.085, "weight decay of the embedding", 0)
    adam_wd = Var(0.02, "weight decay of scalars", 0)
    beta1 = Var(0.9, "Adam", 0, 0.9999)
    beta2 = Var(0.99, "Adam", 0, 0.99999)
    adam_eps = Var(1e-8, "Adam", 0)
    grad_clip_norm = Var(0.3, "global gradient norm; 0 = no clip", 0)
    ema_decay = Var(0.9965, "of the average that is scored", 0, 0.99999)
    seed = Var(1337, "of weights and order", 0)

    _artifact = "Artifact"
    bits = Var("embed:7,attn:6,mlp:6,other:6", "bit width by tensor class")
    quant_k = Var("embed:14,attn:13,mlp:12.5,other:12.85", "step = k * std / top: the size knob")
    quant_round = Var("gptq", "gptq: by the inputs' second moments", choices=("nearest", "gptq"))
    gptq_batches = Var(2, "training batches for these", 1)
    awq_groups = Var(1, "gptq: groups of 64 salient columns with 8 bits", 0)
    lqer_top_k = Var(1, "worst matrices, corrected by a product (#1797)", 0)
    lqer_rank = Var(4, "inner width of these products", 1)
    compressor = Var("auto", "auto: rans if it is installed", choices=("auto", "rans", "lzma"))
    artifact_budget_bytes = Var(16_000_000, "code + model; 0 = no limit", 0)

    _evaluation = "Evaluation"
    eval_seq_len = Var(0, "window length; 0 = TRAIN_SEQ_LEN", 0, ship="eval")
    eval_stride = Var(512, "targets a window of the sliding pass", 1, ship="eval")
    eval_batch_tokens = Var(0, "tokens a forward; 0 = as training, up to 32768", 0)
    val_bytes = Var(0, "validates only on this prefix; 0 = all", 0)
    val_loss_every = Var(0, "steps between validations; 0 = only at the end", 0)
    eval_budget_seconds = Var(600.0, "final scoring of the artifact; 0 = no limit", 0)
    ttt = Var("lora", "adapters that learn from scored text", choices=("0", "lora"), ship="eval")
    ttt_adapt = Var(True, "0 = without learning: the control", ship="eval")
    ttt_doc_chunk = Var(64, "lora: targets of a document a step", 1, ship="eval")
    ttt_lora_rank = Var(96, "lora: inner width", 1, ship="eval")
    ttt_lora_alpha = Var(144.0, "lora: alpha / rank scales the product", 0, ship="eval")
    ttt_lora_lr = Var(1e-4, "lora: rate of AdamW, whose beta1 is 0", 0, ship="eval")
    ttt_lora_wd = Var(1.0, "lora: decoupled weight decay", 0, ship="eval")
    ppm_weight = Var(1, "0 = only the network, 1 = mixed", 0, 1, ship="eval")
    ppm_order = Var(5, "longest context in bytes", 1, 15, ship="eval")
    mix_rows = Var(20, "log2 of the 64-byte rows of a table", 4, 26, ship="eval")
    eval_only = Var(False, "score ARTIFACT and nothing else")
    artifact = Var("", "its path, for EVAL_ONLY")

    _run = "Run"
    run_id = Var("", "folder under RUNS_PATH; empty = time and seed")
    runs_path = Var("./runs", "where runs are kept")
    resume = Var("", "auto, or a checkpoint file")
    resume_data = Var("same", "changed: other text than before", choices=("same", "changed"))
    checkpoint_every = Var(0, "steps between checkpoints; 0 = on a signal", 0)
    train_log_every = Var(200, "steps between log lines, after the first ten", 1)
    device = Var("auto", "ROCm counts as cuda", choices=("auto", "cpu", "cuda", "mps"))
    dtype = Var("auto", "of activations; weights are fp32", choices=("auto", "fp32", "bf16"))
    compile = Var("auto", "auto: on GPUs that have triton", choices=("auto", "0", "1"))
    attention = Var("auto", "auto: the fastest; else this rung or the next that works",
                    choices=("auto", "fa3", "fa2", "cpu", "sdpa", "math"))
    strict_env = Var(True, "refuse misspelt variables; 0 = only warn")

    _launcher = "Set by the launcher (torchrun)"
    rank = Var(0, "rank of this process", 0)
    local_rank = Var(0, "rank on this machine", 0)
    world_size = Var(1, "processes", 1)
    master_addr = Var("", "rendezvous host")
    master_port = Var(0, "rendezvous port", 0, 65535)

    # Variables of ideas that are gone: {name: (values still allowed, reason)}.
    RETIRED = {name: (off, why) for why, names in (
        ("EMA_DECAY=0 scores the last weights", "SWA_ENABLED=0 EMA_ENABLED=1"),
        ("#2080 has it so", "BIJEPAX_CYCLE=0 MTP_NUM_HEADS=0 CASEOPS_ENABLED=1"),
        ("only this", "TTT_LORA_MODULES=attn.proj,mlp.fc,mlp.proj,tok_emb"),
        ("LQER_TOP_K=0 switches it off", "LQER_ENABLED=1"),
        ("binary mixing only", "MIX=binary PPM_H=0.999 PPM_L=0.18 PPM_T=0.80"),
        ("no sweeps", "PPM_DUMP_INPUTS=0 PPM_SWEEP_GRID= PPM_SWEEP_APPLY=0"),
        ("set EVAL_ONLY=1 ARTIFACT=FILE", "QUANTIZE_ONLY=0 PREQUANT_ONLY=0 TTT_EVAL_ONLY=0"),
        ("set ITERATIONS, WARMDOWN_ITERS", "FORCE_STOP_STEP=0 WARMDOWN_FRAC="),
        ("set QUANT_K=mlp:NUMBER", "MLP_CLIP_SIGMAS="),
        ("here it is COMPILE, RUNS_PATH, TTT, PPM_WEIGHT", "DISABLE_COMPILE=0 ARTIFACT_DIR="
         " TTT_ENABLED=1 PPM_MIXER_ENABLED=1"),
        ("every layer runs once: repetition cost 0.0079 BPB", "NUM_LOOPS=0 LOOP_EXTRA=0 LOOP_START=1"
         " LOOP_FIRST= LOOP_LAST="),
        ("BIJEPAX-lite had no effect", "BIJEPAX_ENABLED=0 BIJEPAX_WEIGHT=0 BIJEPAX_START_FRAC="
         " BIJEPAX_END_FRAC= BIJEPAX_FWD_HOPS=0 BIJEPAX_BWD_HOPS=0 BIJEPAX_HEAD_DIM= BIJEPAX_STRIDE="
         " BIJEPAX_LR="),
    ) for name, _, off in (word.partition("=") for word in names.split())}
    # How variables of other scripts begin.
    FIELD = re.compile("(ATTN|AWQ|BATCH|BIGRAM|BIJEPAX|CASEOPS|DRAFTER|EMBED|EVAL|GATED?|"
                       "HEAD|JEPA|LOOP|LORA|LQER|MIX|MTP|MUON|NGRAM|PATCH|PPM|QAT|QUANT|"
                       "SIGREG|SPARSE|SWA|TTT|VAL)_")

    def __init__(self, environ: dict[str, str] | None = None, shipped: dict | None = None):
        """Reads `environ`; `shipped`, of an artifact, replaces defaults."""
        environ = environ or {}
        self.warnings = []
        self._refuse_retired_and_misspelt(environ)

        for name, var in self.vars().items():
            value = (shipped or {}).get(var.name, var.default)
            if text := environ.get(var.name):
                value = var.parse(text)
                if shipped and var.ship == "model" and value != shipped[var.name]:
                    raise UserError(f"{var.name}={value}: the artifact was made with "
                                    f"{shipped[var.name]}; leave it unset")
            setattr(self, name, value)

        self.trains = not shipped
        self.pack = self.pack_rows if self.train_align == "packed" and self.trains else 1
        self.bits_by_class = self._parse_classes("bits", int, 2, 8)
        self.growth = self._parse_growth()
        self.k_by_class = self._parse_classes("quant_k", float, 0.1, 1000)
        self.head_dim = self.model_dim // self.num_heads
        self.eval_seq_len = self.eval_seq_len or self.train_seq_len
        most = min(self.device_batch_tokens, 32768)
        self.eval_batch_tokens = self.eval_batch_tokens or most

        if shipped or not self.eval_only:  # else the artifact's come first
            for function in CHECKS:
                function(self)

    @classmethod
    def vars(cls) -> dict[str, Var]:
        return {name: var for name, var in vars(cls).items() if isinstance(var, Var)}

    @classmethod
    def help(cls) -> str:
        lines = [__doc__.strip()]
        for name, item in vars(cls).items():
            if isinstance(item, Var):
                default = int(item.default) if isinstance(item.default, bool) else item.default
                told = f"{item.why} [{item.accepted()}]"
                lines.append(f"  {item.name:<28} {default!s:<14} {told}")
            elif isinstance(item, str) and re.match("_[a-z]", name):
                lines.append(f"\n{item}")
        return "\n".join(lines)

    def settings(self) -> dict:
        return {var.name: getattr(self, name) for name, var in self.vars().items()}

    def shipped(self) -> dict:
        """What an artifact must carry to be rebuilt and scored."""
        settings = self.settings()
        return {var.name: settings[var.name] for var in self.vars().values() if var.ship}

    def learning(self) -> dict:
        """What decides the weights, all before BITS, but for the text and the limits."""
        free = "DATA_PATH", "VERIFY_DATA", "ITERATIONS", "MAX_WALLCLOCK_SECONDS"
        settings = self.settings()
        names = itertools.takewhile(lambda name: name != "BITS", settings)
        return {name: settings[name] for name in names if name not in free}

    def _refuse_retired_and_misspelt(self, environ: dict[str, str]) -> None:
        known = {*self.RETIRED, *map(str.upper, self.vars())}
        for name, value in environ.items():
            if name in self.RETIRED:
                allowed, why = self.RETIRED[name]
                if value not in ("", *allowed.split()):
                    raise UserError(f"{name}={value!r} is retired: {why}; unset it")
            if name in known:
                continue
            if near := difflib.get_close_matches(name, known, 1, cutoff=0.87):
                message = f"{name} is not a variable of this script; did you mean {near[0]}?"
                if self.strict_env.parse(environ.get("STRICT_ENV") or "1"):
                    raise UserError(f"{message} (STRICT_ENV=0: only a warning)")
                self.warnings.append(message)
            elif self.FIELD.match(name):
                self.warnings.append(f"{name} is no variable of this script: ignored")

    def _parse_growth(self) -> list[tuple[int, float]]:
        """`4:0.4,1` -> [(4, 0.4), (1, 1.0)]: updates a step, and the progress that ends them."""
        var, found = self.vars()["batch_growth"], [(math.inf, 0.0)]
        for part in f"{self.batch_growth}:1".split(","):  # the last one stays to the end
            match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d*\.?\d+)\s*", part)
            count, end = (int(match[1]), float(match[2])) if match else (0, 0.0)
            if not (0 < count < found[-1][0] and found[-1][1] < end <= 1):
                raise UserError(f"{var.name}={self.batch_growth!r} is not accepted: NUMBER:SHARE, ... "
                                "with falling numbers and growing shares, NUMBER at last")
            found.append((count, end))
        return found[1:]

    def _parse_classes(self, name: str, kind: type, low: float, high: float) -> dict:
        """`embed:8,mlp:6` -> {"embed": 8, ...}; classes that are not named keep the default."""
        var = self.vars()[name]
        values = {}
        for part in f"{var.default},{getattr(self, name)}".split(","):
            key, _, number = part.strip().partition(":")
            values[key] = low - 1
            with contextlib.suppress(ValueError):
                values[key] = kind(number)
            if key not in TENSOR_CLASSES or not low <= values[key] <= high:
                classes = "|".join(TENSOR_CLASSES)
                raise UserError(f"{var.name}: {part.strip()!r} is not accepted: CLASS:NUMBER, "
                                f"CLASS in {classes}, NUMBER from {low} to {high}")
        return values


# -----------------------------------------------------------------------------
# RUNTIME
# -----------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes) -> None:
    """Writes to a temporary name and renames: a reader never meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the old file is whole") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def tune_allocator() -> None:
    """Keeps freed pages: page faults can dominate eager CPU runs (up to 7x).
    On glibc: no mmap for large blocks, no trimming, one arena. Elsewhere: nothing."""
    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX
    values = {-4: 0, -1: -1, -2: 1 << 28, -8: 1}
    with contextlib.suppress(OSError, AttributeError):
        if platform.libc_ver()[0] == "glibc":
            for parameter, value in values.items():
                ctypes.CDLL("libc.so.6").mallopt(parameter, value)


def piece(function):
    """Marks a part of the network that compiles whole, once for all who call it.

    `piece.compiled` switches all. All models and equal blocks share the graphs."""
    @functools.cache
    def compiled():
        torch._dynamo.config.recompile_limit = 64  # kinds of blocks times shapes
        return torch.compile(function, dynamic=False, fullgraph=True)

    @functools.wraps(function)
    def call(*args):
        return (compiled() if piece.compiled else function)(*args)
    return call


piece.compiled = False


@check
def check_launch(args: Hyperparameters) -> None:
    forbid(args.rank >= args.world_size, args, "rank world_size", "let torchrun set both")
    forbid(args.resume == "auto" and not args.run_id, args, "resume run_id", "set RUN_ID")
    forbid(args.artifact and args.trains, args, "artifact", "set EVAL_ONLY=1 to score it")


class Runtime:
    """Device, dtype, ranks and clocks: what the machine offers, decided once."""

    def __init__(self, args: Hyperparameters):
        self.rank = args.rank
        self.world_size = args.world_size
        self.main = args.rank == 0
        self.clocks = {}  # seconds by phase
        self.notes = []
        self.device = self._pick_device(args)
        self.attention = "sdpa"  # runs everywhere; `main` asks for the best rung
        if not constriction and args.compressor != "lzma":
            self.notes.append("compressor: constriction is missing, LZMA instead of rANS")

        if self.device.type == "cpu":
            tune_allocator()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            if not args.master_addr:
                raise UserError(f"WORLD_SIZE={args.world_size} but no MASTER_ADDR: use torchrun")
            nccl = self.device.type == "cuda" and dist.is_nccl_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
        self.dtype = self._pick_dtype(args)
        self.compile = self._pick_compile(args)
        self.must_compile = args.compile == "1"

    def watch_ranks(self, args: Hyperparameters) -> None:
        """Ends this process once a rank is silent for a minute."""
        def beats() -> list[tuple]:
            address = args.master_addr, args.master_port
            store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=9))
            return [(rank, store.add(f"beat {rank}", rank == self.rank))
                    for rank in range(self.world_size)]

        asker, silent = ThreadPoolExecutor(1), {}  # seconds, by rank and its last beat
        while dist.is_initialized() and 60 not in silent.values():
            time.sleep(1)
            wait([found := asker.submit(beats)], 60)
            if not found.done():  # the store's host hangs
                silent = {("0 or the launcher", 0): 60}
            elif not found.exception():
                silent = {beat: silent.get(beat, 0) + 1 for beat in found.result()}
        if dist.is_initialized():
            lost = next(rank for (rank, _), seconds in silent.items() if seconds == 60)
            print(f"rank {self.rank}: stopped, rank {lost} is silent", file=sys.stderr)
            os._exit(1)

    def _pick_device(self, args: Hyperparameters) -> torch.device:
        seen = ["cuda"] if torch.cuda.is_available() else []
        seen += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
        name = seen[0] if args.device == "auto" else args.device
        if name not in seen:
            raise UserError(f"DEVICE={name}: torch {torch.__version__} sees only {', '.join(seen)}")
        if name == "cuda" and args.local_rank >= (count := torch.cuda.device_count()):
            raise UserError(f"LOCAL_RANK={args.local_rank}, but torch sees {count} GPUs")
        return torch.device(name, args.local_rank if name == "cuda" else None)

    def _pick_dtype(self, args: Hyperparameters) -> torch.dtype:
        if args.dtype != "auto":
            return {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
        if self.device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        faster = self.device.type == "cpu" and self._bf16_is_faster(args.model_dim)
        return torch.bfloat16 if faster else torch.float32

    def _bf16_is_faster(self, dim: int) -> bool:
        """Whether bf16 is clearly faster here."""
        info, rates = Path("/proc/cpuinfo"), []
        words = set(info.read_text().split()) if info.exists() else set()
        if not words & {"amx_bf16", "avx512_bf16", "bf16"}:
            return False
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = (torch.ones(size, dim, dtype=dtype) for size in (2048, 2 * dim))
            flop = 2 * x.numel() * len(weight)
            timer = Timer("x @ weight.T", globals=locals())
            rates.append(max(1e-9 * flop / timer.timeit(2).mean for _ in range(5)))
        fp32, bf16 = self.from_main(rates)
        self.notes.append(f"dtype: fp32 at {fp32:.0f} GFLOP/s, bf16 at {bf16:.0f}")
        return bf16 > 1.3 * fp32

    def _pick_compile(self, args: Hyperparameters) -> bool:
        if args.compile != "auto":
            return args.compile == "1"
        if self.device.type == "cuda":
            with contextlib.suppress(ImportError):
                import triton  # noqa: F401
                return True
            self.notes.append("compile: no triton, running eager")
        return False  # on CPUs it takes half a minute, to save a quarter of each step

    @contextlib.contextmanager
    def clock(self, phase: str):
        """Adds what the block takes to a phase; phases do not overlap."""
        start = time.perf_counter()
        yield
        self.clocks[phase] = self.clocks.get(phase, 0.0) + time.perf_counter() - start

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"

    def describe(self) -> str:
        return (f"attention:{self.attention} compile:{int(self.compile)} "
                f"dtype:{str(self.dtype).removeprefix('torch.')} device:{self.device_name()}")

    def all_reduce(self, tensor: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
        """In place, over ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op)
        return tensor

    def from_main(self, values: list[float]) -> list[float]:
        """Rank 0's numbers on every rank, through CPU memory."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.broadcast(tensor, 0)
        return tensor.tolist()

    def agree(self, what: str, values) -> None:
        """Raises UserError on all ranks if one has other values than rank 0."""
        mine = zlib.crc32(json.dumps(values, sort_keys=True).encode())
        first, = self.from_main([mine])
        apart = torch.tensor(self.rank if mine != first else 0)
        if rank := int(self.all_reduce(apart, dist.ReduceOp.MAX)):
            raise UserError(f"rank {rank} has other {what} than rank 0")

    def compile_by(self, attempt, log) -> None:
        """Compiles what `attempt` runs, without collectives, on all ranks or none."""
        piece.compiled, failure = True, ""
        try:
            attempt()
        except (UserError, torch.OutOfMemoryError):  # eager takes more memory
            raise
        except Exception as error:  # a compiler may raise anything
            failure = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if self.all_reduce(torch.tensor(int(failure != "")), dist.ReduceOp.MAX):
            failure = failure or "another rank failed"
            if self.must_compile:
                raise UserError(f"COMPILE=1: {failure}; COMPILE=0 runs eager")
            log(f"compile: running eager ({failure})")
            self.compile = piece.compiled = False

    def peak_memory_mb(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        unit = 2**20 if platform.system() == "Darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class Log:
    """Console on rank 0, `log.txt` and `metrics.jsonl` in the run's folder."""

    def __init__(self, folder: Path | None):
        self.folder, self.warned = folder, False
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(folder / "log.txt", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(f"RUNS_PATH={folder.parent}: {folder}: {error.strerror}") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # while the process lives
        except BlockingIOError:
            raise UserError(f"RUN_ID={folder.name}: another process runs it") from None
        except OSError:
            pass  # no locks here

    def __call__(self, text: str, console: bool = True, name: str = "log.txt") -> None:
        if self.folder is None:
            return
        if console:
            print(text, flush=True)
        try:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:  # training can go on without
            if not self.warned:
                print(f"warning: {self.folder / name}: {error.strerror}", file=sys.stderr)
            self.warned = True

    def metrics(self, **values) -> None:
        self(json.dumps(values), False, "metrics.jsonl")


# -----------------------------------------------------------------------------
# ATTENTION
# -----------------------------------------------------------------------------
# The rungs of a ladder, fastest first: q (B, T, H, d) and k, v (B, T, K, d) -> (B, T, H, d).
# `mask` is None for plain causal attention, else what `document_mask` made for that rung.


def causal_mask(docs: Tensor, queries: int) -> Tensor:
    """docs (B, T), a position's document -> (B, 1, queries, T) for the last `queries`."""
    positions = torch.arange(docs.size(1), device=docs.device)
    same_document = docs[:, None, -queries:, None] == docs[:, None, None]
    return same_document & (positions[-queries:, None] >= positions)


def math_attention(q: Tensor, k: Tensor, v: Tensor, mask=None) -> Tensor:
    """Causal attention spelt out, what every other rung must agree with."""
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).float() * q.size(-1) ** -0.5
    if mask is None:
        mask = causal_mask(torch.zeros(q.shape[:2], device=q.device), q.size(1))
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask=None) -> Tensor:
    """Torch's fused kernels. With a mask, q may be only the last positions of k and v."""
    if mask is not None and q.is_cuda:  # lean kernels share none
        k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return y.transpose(1, 2)


QUERY_BLOCK = 128  # for `block_attention`


def block_attention(q: Tensor, k: Tensor, v: Tensor, mask=None) -> Tensor:
    """Causal attention by blocks of queries, each with the keys that it may see.
    The backward pass finds its weights stored; torch's kernel computes them again."""
    length, groups, dim = q.size(1), k.size(2), q.size(3)
    before = k.size(1) - length  # keys of the row before, see `with_row_before`
    if mask is None:
        mask = causal_mask(torch.zeros(1, length, device=q.device), length)
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))  # (B * K, T, d)
    out = []

    for query in (q * dim**-0.5).transpose(1, 2).split(QUERY_BLOCK, 2):
        stop = min((len(out) + 1) * QUERY_BLOCK, length)
        seen = slice(stop - query.size(2) if before else 0, before + stop)
        unseen = ~mask[:, :, None, stop - query.size(2) : stop, seen]  # (B, 1, 1, q, k)
        flat = query.unflatten(1, (groups, -1)).flatten(2, 3).flatten(0, 1)  # heads share keys
        scores = torch.bmm(flat, keys[:, seen].mT)
        scores = scores.view(len(q), groups, -1, *unseen.shape[-2:])
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1).flatten(0, 1).flatten(1, 2)
        out.append(torch.bmm(weights, values[:, seen]).view(query.shape))
    return torch.cat(out, 2).transpose(1, 2)


def flash_attention(package: str):
    """FlashAttention 2 or 3; documents go through its varlen kernel."""
    flash = importlib.import_module(package)  # here: an import would break a graph

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens=None) -> Tensor:
        if cu_seqlens is None:
            out = flash.flash_attn_func(q, k, v, causal=True)
        else:
            flat = [x.flatten(0, 1) for x in (q, k, v)]
            lengths = cu_seqlens, cu_seqlens, q.size(1), q.size(1)
            out = flash.flash_attn_varlen_func(*flat, *lengths, causal=True)
        out = out[0] if isinstance(out, tuple) else out  # some builds return more
        return out.view(q.shape)
    return attend


FLASH = {"fa3": "flash_attn_interface", "fa2": "flash_attn"}  # packages
ATTENTION = {"cpu": block_attention, "sdpa": sdpa_attention, "math": math_attention}


@functools.cache
def attention_of(rung: str):
    """The function of a rung; ImportError where its package is missing."""
    return flash_attention(FLASH[rung]) if rung in FLASH else ATTENTION[rung]


def document_mask(rung: str, docs: Tensor):
    """What a rung needs to keep documents apart; docs (B, T), the document of each position.
    Flash: where documents begin (cu_seqlens), then the end, without a wait for the device; other
    rungs: a mask (B, 1, T, T)."""
    if rung not in FLASH:
        return causal_mask(docs, docs.size(1))
    begins = F.pad(docs[:, 1:] != docs[:, :-1], (1, 0), value=True)
    number = begins.flatten().cumsum(0)  # from 1
    room = max(64, docs.numel() // 256)  # empty ones take time
    torch._assert_async(number[-1] < room, "ATTENTION=sdpa takes more of them")
    wanted = torch.arange(1, room + 1, device=docs.device)
    return torch.searchsorted(number, wanted, out_int32=True)


def piece_mask(rung: str, ids: Tensor, pack: int):
    """What a rung needs where `pack` rows of ids (B, T) follow one another: documents are cut every
    T ids from their own begin, and a query sees its piece, as far as the row before (B, 1, T, 2 T)."""
    length = ids.size(1)
    flat = ids.reshape(-1, pack * length)
    places = torch.arange(flat.size(1), device=ids.device)
    begin = torch.where(flat == BOS_ID, places, 0).cummax(1).values  # of the document
    pieces = ((places - begin) % length == 0).flatten().cumsum(0)
    if rung in FLASH:  # no piece is longer than a row
        return document_mask(rung, pieces[None])

    pieces = pieces.view_as(ids)
    before = pieces.roll(1, 0)
    before[::pack] = -1  # the first row of a pack has none
    return causal_mask(torch.cat((before, pieces), 1), length)


def with_row_before(x: Tensor, mask) -> Tensor:
    """Keys or values x (B, T, K, d) -> all that a mask reaches: (B, 2 T, K, d) by `piece_mask`."""
    if mask is None or mask.ndim < 4 or mask.size(-1) == x.size(1):
        return x
    return torch.cat((x.roll(1, 0), x), 1)


def check_rung(rung: str, args: Hyperparameters, runtime: Runtime) -> None:
    """Raises unless a rung runs both ways here and agrees with `math`."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 128, heads, args.head_dim, generator=generator) for heads in (2, 1))
    q, k = (x.to(runtime.device, runtime.dtype).requires_grad_() for x in (q, k))
    docs = (torch.arange(128, device=runtime.device)[None] - 1) // 50  # begin at 1, 51 and 101
    masks = (document_mask(name, docs) if args.doc_mask else None for name in (rung, "math"))
    attend = attention_of(rung)
    if runtime.compile and runtime.device.type == "cuda":  # it must fit in a graph
        attend = torch.compile(attend, dynamic=False, fullgraph=True)
    out = attend(q, k, k, next(masks))
    wanted = math_attention(q, k, k, next(masks))
    out.sum().backward()
    torch.testing.assert_close(out.float(), wanted.float(), atol=3e-2, rtol=1e-5)


def pick_attention(args: Hyperparameters, runtime: Runtime) -> str:
    """The first rung from ATTENTION down that agrees with `math`, by rank 0. No clock decides:
    documents, kept apart by default, leave flash or a mask."""
    rungs = [*FLASH, *ATTENTION]
    first = 0 if args.attention == "auto" else rungs.index(args.attention)
    gpu, bf16 = runtime.device.type == "cuda", runtime.dtype == torch.bfloat16
    unfit = {"cpu"} if gpu else {*FLASH}
    for rung in rungs[first:]:
        if rung in unfit or not bf16 and rung in (*FLASH, "cpu"):
            continue
        try:
            check_rung(rung, args, runtime)
            choice, = runtime.from_main([rungs.index(rung)])
            return rungs[int(choice)]
        except Exception as error:  # no package, no memory
            runtime.notes.append(f"attention: no {rung}, {error!r:.90}")
    raise UserError(f"ATTENTION={args.attention}: no rung from there on runs here; use auto")


# -----------------------------------------------------------------------------
# DATA
# -----------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
PAD_ID, BOS_ID, BYTE_OFFSET = 0, 1, 4
OPERATORS = ("\ue001", "\ue002", "\ue003", "\ue004")  # of CaseOps, without a byte
BYTE_CLASSES = ("special", "token")


def check_ids(ids: np.ndarray, vocab_size: int, path: Path) -> None:
    if ids.size and (top := int(ids.max())) >= vocab_size:
        raise UserError(f"{path}: id {top} is outside VOCAB_SIZE={vocab_size}: another tokenizer?")


def open_shard(path: Path, vocab_size: int, checked: int | None = None) -> np.ndarray:
    """Maps a shard: 256 little-endian int32 (magic, version, count, 0...), then uint16 ids. The
    first `checked` ids (None: all) are held against the vocabulary."""
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise UserError(f"{path}: {size} bytes is too short for a shard header of {HEADER_BYTES}")
    header = np.fromfile(path, dtype="<i4", count=256)
    if header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path}: header {header[:2]}, not {SHARD_MAGIC} {SHARD_VERSION}: no shard")
    room = (size - HEADER_BYTES) / 2
    if header[2] != room:
        raise UserError(f"{path}: the header says {header[2]} ids, the file has room for {room}")

    ids = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(int(header[2]),))
    check_ids(ids[:checked], vocab_size, path)
    return ids


def sha256_file(path: Path) -> str:
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()  # mapped: it may be large


class Dataset:
    """The shards under DATA_PATH and what is known about them."""

    def __init__(self, args: Hyperparameters, verify: bool):
        self.path = Path(args.data_path)
        self.train_files = self._shards("train", args)
        self.val_files = self._shards("val", args)
        if not self.val_files or not (self.train_files or args.eval_only):
            files = "*_train_*.bin" if self.val_files else "*_val_*.bin"
            below = next(self.path.glob(f"**/{files}"), None)
            hint = f"did you mean {below.parent}?" if below else "see data/prepare.py"
            raise UserError(f"DATA_PATH={self.path} has no {files}: {hint}")

        self.vocab_size = size = args.vocab_size
        self.manifest = self._read_manifest()
        # training shards stay on disk, the validation text is read whole
        self.train_shards = [open_shard(path, size, 1 << 20) for path in self.train_files]
        self.val = np.concatenate([open_shard(path, size) for path in self.val_files])
        self.val_sizes = self._read_sidecars(verify and args.verify_data != "0")
        if verify:
            self._verify(args.verify_data)
        if len(self.val) < 2:
            raise UserError(f"{self.val_files[0]}: {len(self.val)} ids leave no target")

    def _shards(self, split: str, args: Hyperparameters) -> list[Path]:
        """The files of a split, SOURCE_split_NUMBER.bin, by number."""
        found = self.path.glob(f"*_{split}_*.bin")
        files = sorted(path for path in found if "_bytes_" not in path.name)
        names = [re.fullmatch(rf"(.+)_{split}_(\d+)\.bin", path.name) for path in files]
        for path, name in zip(files, names):
            if not name or name[1] != names[0][1]:
                raise UserError(f"{path}: a copy, a sidecar, or another source's")
        if files and int(names[-1][2]) - int(names[0][2]) != len(files) - 1:
            args.warnings.append(f"{files[0]} to {files[-1].name}: a number is missing")
        return files

    def _read_manifest(self) -> dict:
        path = self.path / "manifest.json"
        if not path.exists():
            return {}
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            shards = {str(entry["file"]): str(entry["sha256"]) for entry in manifest["shards"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a manifest of data/prepare.py ({error!r})") from None
        if (size := manifest.get("vocab_size", self.vocab_size)) != self.vocab_size:
            raise UserError(f"{path}: made for VOCAB_SIZE={size}, not {self.vocab_size}")
        return {**manifest, "sha256": shards}

    def _read_sidecars(self, verify: bool) -> np.ndarray | None:
        """Original bytes of each validation id, uint16, of CaseOps text; else None."""
        paths = [self.path / path.name.replace("_val_", "_val_bytes_") for path in self.val_files]
        if not all(path.exists() for path in paths):  # named otherwise
            paths = [path.with_suffix(".bytes") for path in self.val_files]
        if "caseops" not in self.manifest and not any(path.exists() for path in paths):
            return None
        shards = self.manifest.get("shards", ())
        wanted = {entry.get("sidecar"): entry.get("sidecar_sha256") for entry in shards}
        for path, shard in zip(paths, self.val_files):
            if not path.exists():
                raise UserError(f"{path} is missing: data/prepare.py writes it")
            if path.stat().st_size != shard.stat().st_size:
                raise UserError(f"{path}: not the sidecar of {shard.name}")
            if verify and wanted.get(path.name) not in (None, sha256_file(path)):
                raise UserError(f"{path}: its sha256 is not the manifest's")
        return np.concatenate([open_shard(path, 1 << 16) for path in paths])

    def _verify(self, mode: str) -> None:
        files = self.train_files + self.val_files
        size = sum(path.stat().st_size for path in files)
        if mode == "0" or (mode == "auto" and (not self.manifest or size > 2_000_000_000)):
            return
        for path in files:
            wanted = self.manifest.get("sha256", {}).get(path.name, "nothing")
            found = sha256_file(path)
            if wanted != found:
                raise UserError(f"{path}: sha256 {found[:16]}, the manifest has {wanted[:16]}")

    def fingerprint(self) -> dict:
        """What a reader needs to know that two runs saw the same text."""
        digest = hashlib.sha256(self.val.tobytes())
        for path, shard in zip(self.train_files, self.train_shards):  # all of it takes long
            digest.update(f"{path.name} {len(shard)}".encode())
            digest.update(shard[:4096].tobytes() + shard[-4096:].tobytes())
        told = ("source", "variant", "documents", "bytes", "val_text_sha256")
        return {
            "name": self.path.name, **{key: self.manifest.get(key) for key in told},
            "train_shards": len(self.train_files), "val_shards": len(self.val_files),
            "train_tokens": sum(map(len, self.train_shards)), "val_tokens": len(self.val),
            "val_documents": int((self.val == BOS_ID).sum()), "sha256": digest.hexdigest(),
        }


def open_tokenizer(args: Hyperparameters):
    """The SentencePiece model of TOKENIZER_PATH, held against VOCAB_SIZE."""
    path = args.tokenizer_path
    try:
        from sentencepiece import SentencePieceProcessor
        tokenizer = SentencePieceProcessor(model_file=path)
    except ImportError:
        raise UserError("TOKENIZER_PATH is set, but sentencepiece is not installed") from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"TOKENIZER_PATH={path}: no SentencePiece model ({error})") from None
    if (size := tokenizer.vocab_size()) != args.vocab_size:
        raise UserError(f"TOKENIZER_PATH={path} has {size} ids, VOCAB_SIZE={args.vocab_size}")
    return tokenizer


def byte_tables(args: Hyperparameters) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three (V,): an id's bytes without a leading space, whether it has one, is a boundary.

    byte260: 1 for ids from 4 up. SentencePiece: 1 for byte pieces, 0 for control, unknown and
    unused ones, else the UTF-8 length with U+2581 as a space. A leading space counts unless the id
    before is a boundary: then it is the dummy prefix, which models of data/prepare.py lack."""
    base = np.zeros(args.vocab_size, dtype=np.int64)
    space = np.zeros(args.vocab_size, dtype=bool)
    edge = np.zeros(args.vocab_size, dtype=bool)
    if not args.tokenizer_path:
        if args.vocab_size != 260:
            raise UserError(f"VOCAB_SIZE={args.vocab_size} needs TOKENIZER_PATH; byte260 has none")
        base[BYTE_OFFSET:] = 1
        edge[:BYTE_OFFSET] = True
        return base, space, edge
    # SentencePiece
    tokenizer = open_tokenizer(args)
    dummy_prefix = tokenizer.encode("a", out_type=str)[0].startswith("\u2581")
    for i in range(args.vocab_size):
        piece = tokenizer.id_to_piece(i)
        edge[i] = tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
        if tokenizer.is_byte(i):
            base[i] = 1
        elif not edge[i]:
            space[i] = dummy_prefix and piece.startswith("\u2581")
            base[i] = len(piece.replace("\u2581", " ").encode()) - space[i]
    return base, space, edge


def target_bytes(ids: np.ndarray, tables: tuple) -> np.ndarray:
    """Bytes of each target ids[1:], int64, by `byte_tables`."""
    base, space, edge = tables
    return base[ids[1:]] + (space[ids[1:]] & ~edge[ids[:-1]])


def spelling(args: Hyperparameters) -> list[tuple[int, ...]]:
    """The symbols of each id: its bytes, or 256 + id where it has none."""
    _, _, special = byte_tables(args)
    if not args.tokenizer_path:
        return [(256 + i,) if special[i] else (i - BYTE_OFFSET,) for i in range(260)]
    tokenizer, found = open_tokenizer(args), []
    for i in range(args.vocab_size):
        piece = tokenizer.id_to_piece(i)
        text = piece.replace("\u2581", " ").encode()
        if tokenizer.is_byte(i):  # <0x0A>
            text = bytes([int(piece[3:5], 16)])
        found.append((256 + i,) if special[i] or piece in OPERATORS else tuple(text))
    return found


def class_table(vocab_size: int) -> np.ndarray:
    """Class of each id, an index into BYTE_CLASSES."""
    return (np.arange(vocab_size) >= BYTE_OFFSET).astype(int)


@check
def check_batch(args: Hyperparameters) -> None:
    spare = args.trains and args.train_batch_tokens % args.train_seq_len
    forbid(spare, args, "train_batch_tokens train_seq_len", "must be a multiple of a row")
    spare = args.trains and args.train_batch_tokens % (args.train_seq_len * args.pack)
    names = "train_batch_tokens train_seq_len train_align pack_rows"
    forbid(spare, args, names, "must be a multiple of these rows")
    forbid(args.pack > 1 and not args.doc_mask, args, "train_align doc_mask", "pieces are kept apart")


class BatchPlan(namedtuple("BatchPlan", "rows group groups micro_steps world_size")):
    """How a batch of `rows` rows is spread: micro-steps x ranks x `groups` of `group` rows.

    Ranks run the same shapes: slots beyond the batch repeat its first group with weight 0."""

    @classmethod
    def make(cls, args: Hyperparameters, world_size: int) -> BatchPlan:
        group = args.pack
        rows = args.train_batch_tokens // args.train_seq_len
        total = rows // group
        at_most = max(1, args.device_batch_tokens // (args.train_seq_len * group))
        micro_steps = -(-total // (world_size * at_most))
        for count, _ in args.growth:  # whole micro-steps, without spare slots
            full = count == 1 or total % (world_size * micro_steps) == 0
            fits = full and micro_steps % count == 0
            forbid(not fits, args, "batch_growth device_batch_tokens",
                   f"{rows} rows on {world_size} ranks make {micro_steps} equal forwards")
        return cls(rows, group, -(-total // (world_size * micro_steps)), micro_steps, world_size)

    def slots(self, micro_step: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the global batch for one forward, and a weight for each."""
        first = (micro_step * self.world_size + rank) * self.groups * self.group
        numbers = np.arange(first, first + self.groups * self.group)
        real = numbers < self.rows  # which is a whole number of groups
        return np.where(real, numbers, numbers % self.group), real.astype(np.float32)


def updates_at(progress: float, args: Hyperparameters) -> int:
    """How many updates share the batch of a step: small batches learn faster at first."""
    return next(count for count, end in args.growth if progress < end or end == 1)


class Loader:
    """Rows of TRAIN_SEQ_LEN + 1 ids for this rank, in the same order for any number of ranks.
    `state`, of the checkpoint, is the position of the next row: {"epoch", "shard", "row"}."""

    def __init__(self, data: Dataset, args: Hyperparameters, plan: BatchPlan, rank: int,
                 state: dict | None = None):
        self.data, self.args, self.plan, self.rank = data, args, plan, rank
        self.length = args.train_seq_len
        self.state = dict(state or {"epoch": 0, "shard": 0, "row": 0})
        self.order = functools.lru_cache(2)(self.order)  # serves many steps
        needed = self.length * plan.group
        if (most := max(map(len, data.train_shards))) <= needed:
            what = f"{plan.group} rows of " * (plan.group > 1) + f"TRAIN_SEQ_LEN={self.length}"
            raise UserError(f"{what}: no training shard has over {most} ids")

    def order(self, count: int, *key: int) -> np.ndarray:
        """In which order `count` rows, or shards, are read."""
        if self.args.train_order == "sequential":
            return np.arange(count)
        return np.random.default_rng([self.args.seed, *key]).permutation(count)

    def _next_rows(self, count: int) -> list[tuple[int, int]]:
        """(shard, start) of the next `count` rows; moves the state."""
        rows, state = [], self.state
        while len(rows) < count:
            shards = self.order(len(self.data.train_shards), state["epoch"])
            index = int(shards[state["shard"]])
            group = self.plan.group  # rows of a pack stay together, and in one shard
            packs = (len(self.data.train_shards[index]) - 1) // self.length // group  # one id is spare
            order = self.order(packs, state["epoch"], index)[:, None] * group + np.arange(group)
            taken = order.flatten()[state["row"] : state["row"] + count - len(rows)]
            rows += [(index, self.length * int(row)) for row in taken]
            state["row"] += len(taken)
            if state["row"] >= packs * group:
                state["row"] = 0
                state["shard"] += 1
            if state["shard"] == len(shards):
                state["shard"] = 0
                state["epoch"] += 1
        return rows

    def next(self) -> tuple[Tensor, Tensor, dict]:
        """This rank's ids (micro_steps, rows, T + 1), weights, and the next state."""
        plan = self.plan
        rows = self._next_rows(plan.rows)
        shape = plan.micro_steps, plan.groups * plan.group
        batch = np.empty((*shape, self.length + 1), np.int64)
        weights = np.empty(shape, np.float32)
        for micro in range(plan.micro_steps):
            numbers, weights[micro] = plan.slots(micro, self.rank)
            for slot, number in enumerate(numbers):
                index, start = rows[number]
                shard = self.data.train_shards[index]
                batch[micro, slot] = shard[start : start + self.length + 1]
        check_ids(batch, self.data.vocab_size, self.data.path)
        return torch.from_numpy(batch), torch.from_numpy(weights), dict(self.state)

    def prefetch(self, device: torch.device):
        """Iterates over `next()` from a thread, two batches ahead, pinned on GPUs."""
        def work() -> tuple[Tensor, Tensor, dict]:
            ids, weights, state = self.next()
            if device.type == "cuda":
                ids, weights = ids.pin_memory(), weights.pin_memory()
            return ids, weights, state

        with ThreadPoolExecutor(1) as thread:
            ahead = deque(thread.submit(work) for _ in range(2))
            while True:
                ids, weights, state = ahead.popleft().result()
                ahead.append(thread.submit(work))
                ids, weights = (x.to(device, non_blocking=True) for x in (ids, weights))
                yield ids, weights, state


# -----------------------------------------------------------------------------
# QUANTISER
# -----------------------------------------------------------------------------

SMALL_TENSOR = 4096  # elements; smaller matrices stay fp16, as do gains
SCALE_FLOOR = 2.0**-20  # rows of zeros need a step; no other is this small
AWQ_WIDTH = 64  # columns of an AWQ-lite group


def tensor_class(name: str) -> str:
    if name.startswith("tok_emb"):
        return "embed"
    if ".attn." in name:
        return "attn"
    return "mlp" if ".mlp." in name else "other"


def quant_plan(name: str, shape, args: Hyperparameters) -> tuple[int, int]:
    """(bits, axis of a step's slice), the last; (0, 0): stays fp16."""
    small = math.prod(shape) < SMALL_TENSOR and min(shape, default=0) < 16
    if len(shape) < 2 or small or not name.endswith(".weight"):
        return 0, 0
    return args.bits_by_class[tensor_class(name)], len(shape) - 1


def nearest(x: np.ndarray, top: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x), -top, top)


def gptq(x: np.ndarray, hessian: np.ndarray, top: np.ndarray) -> np.ndarray:
    """Full-Hessian GPTQ (Frantar et al. 2022) of x (R, C), its rows in units of their steps. Column
    c has integers up to top[c], and steps finer by top.min() / top[c].

    Columns go by falling input power; the error of each is spread over those to come by the
    inverse of the damped hessian = X^T X (C, C)."""
    power = np.diag(hessian)
    grain = (top.min() / top).astype(np.float32)
    order = np.argsort(-power, kind="stable")
    damped = hessian[np.ix_(order, order)].astype(np.float64)
    damped[np.diag_indices(len(order))] += 0.01 * power.mean() + 1e-12
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)

    left = x[:, order].copy()
    q = np.empty_like(x)
    for start in range(0, x.shape[1], 128):
        stop = min(start + 128, x.shape[1])
        errors = np.empty((len(x), stop - start), np.float32)
        for j in range(start, stop):
            column = order[j]
            q[:, column] = nearest(left[:, j] / grain[column], top[column])  # fp32
            error = (left[:, j] - q[:, column] * grain[column]) / factor[j, j]
            left[:, j:stop] -= error[:, None] * factor[j, j:stop]
            errors[:, j - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return q


def quantise(weight: np.ndarray, top: np.ndarray, k: float, hessian: np.ndarray | None = None):
    """Rounds a matrix (R, C) to integers in [-top, top] a column, with one fp16 step a row.

    step = k * std / least top (SDClip, #1394); larger tops have finer ones. By `gptq`
    with a hessian (C, C), else to the nearest. -> (q int8, step fp16 (R, 1), q * step fp32)."""
    weight, least = np.asarray(weight, dtype=np.float32), top.min()
    step = k / least * weight.std(axis=1, keepdims=True, dtype=np.float64)
    step = np.maximum(step, SCALE_FLOOR).astype(np.float16).astype(np.float32)
    grain = (least / top).astype(np.float32)
    x = weight / step
    q = nearest(x / grain, top) if hessian is None else gptq(x, hessian, top)
    return q.astype(np.int8), step.astype(np.float16), q * grain * step


def salient_groups(tensors: dict, hessians: dict, args: Hyperparameters) -> dict[str, int]:
    """AWQ-lite (#1908): {name: first column} of the most salient groups, at most one a matrix. The
    score sums the columns' root mean square of inputs times mean |W|."""
    scores = []
    for name, hessian in hessians.items():
        columns = np.sqrt(np.diag(hessian)) * np.abs(tensors[name]).mean(0)
        sums = columns[: len(columns) // AWQ_WIDTH * AWQ_WIDTH].reshape(-1, AWQ_WIDTH).sum(1)
        if len(sums) > 1:
            scores.append((float(sums.max()), name, int(sums.argmax()) * AWQ_WIDTH))
    return {name: column for _, name, column in sorted(scores)[::-1][: args.awq_groups]}


def low_rank(error: np.ndarray, rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """LQER (#1797): the best product A B for an error (R, C), both as (q, step), a step a row.
    A^T (rank, R) lies in -2 ... 1, B (rank * C / 64, 64) in -8 ... 7."""
    u, values, v = np.linalg.svd(error, full_matrices=False)
    a, b = (u[:, :rank] * values[:rank]).T, v[:rank]
    largest = np.take_along_axis(a, np.abs(a).argmax(1)[:, None], 1)
    flip = np.sign(-largest) + 0.0  # the largest entry is for -2
    b = np.pad(b * flip, ((0, 0), (0, -b.shape[1] % AWQ_WIDTH))).reshape(-1, AWQ_WIDTH)
    parts = []
    for part, low, high in ((a * flip, -2, 1), (b, -8, 7)):
        step = np.abs(part).max(1, keepdims=True) / (high + 0.5)
        step = np.maximum(step, SCALE_FLOOR).astype(np.float16)
        q = np.clip(np.rint(part / step.astype(np.float32)), low, high)
        parts.append((q.astype(np.int8), step))
    return parts


# -----------------------------------------------------------------------------
# AUXILIARY OBJECTIVES
# -----------------------------------------------------------------------------
# None: the parent's had no effect. The parts of which every network is made stand here.


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def adapted(owner: nn.Module, x: Tensor) -> Tensor:
    """x (B, T, in) W^T in the dtype of x, plus x A^T B^T where W has adapters of rows."""
    y = F.linear(x, owner.weight.to(x.dtype))
    if (pair := getattr(owner, "adapter", None)) is None:
        return y
    a, b = (part.to(x.dtype) for part in pair)  # (B, r, in), (B, out, r)
    return y + (x @ a.mT) @ b.mT


class CastedLinear(nn.Linear):
    """fp32 weight, multiplied in the dtype of the input; no bias."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__(dim_in, dim_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return adapted(self, x)


# -----------------------------------------------------------------------------
# MODEL
# -----------------------------------------------------------------------------


def rotary_tables(length: int, args: Hyperparameters, reach: int) -> Tensor:
    """cos and sin of positions below `length`: (2, T, 1, r / 2), r the rotated dimensions.

    fp32, never cast: bf16 positions are wrong beyond 256 (defect G1 of #832). A reach of more than
    TRAIN_SEQ_LEN grows the base by (reach / train_seq_len)^(r / (r - 2)) (NTK scaling)."""
    dims = args.rope_dims or args.head_dim
    base = args.rope_base
    if reach > args.train_seq_len and dims > 2:
        base *= (reach / args.train_seq_len) ** (dims / (dims - 2))
    frequency = base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angles = torch.arange(length, dtype=torch.float64)[:, None, None] * frequency
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Half-split rotary on x (B, T, H, d), by `rotary_tables`."""
    cos, sin = rotary
    half = rotary.size(-1)
    a = x[..., :half].float()
    b = x[..., half : 2 * half].float()
    rest = x[..., 2 * half :]
    turned = torch.cat((a * cos + b * sin, b * cos - a * sin), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


class KVCache:
    """Keys and values of a window's positions read so far, for each layer."""

    def __init__(self, model: GPT):
        args = model.args
        like = {"dtype": model.dtype, "device": model.tok_emb.weight.device}
        shape = args.num_layers, 2, 1, args.eval_seq_len, args.num_kv_heads, args.head_dim
        self.layers = torch.zeros(shape, **like)
        self.length, self.turn = 0, 0  # `turn`: the next layer

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values of new positions (1, n, K, d); returns those of all."""
        stop = self.length + k.size(1)
        layer = self.layers[self.turn]
        layer[:, :, self.length : stop] = torch.stack((k, v))
        self.turn = (self.turn + 1) % len(self.layers)
        return layer[:, :, :stop].unbind()


@check
def check_heads(args: Hyperparameters) -> None:
    head_dim, spare = args.head_dim, args.model_dim % args.num_heads
    forbid(spare, args, "model_dim num_heads", "must be a multiple of the heads")
    spare = args.num_heads % args.num_kv_heads
    forbid(spare, args, "num_heads num_kv_heads", "must be a multiple of the kv heads")
    forbid(head_dim % 2, args, "model_dim num_heads", f"a head's width, {head_dim}, must be even")
    unfit = args.rope_dims % 2 or args.rope_dims > head_dim
    forbid(unfit, args, "rope_dims num_heads", f"the first must be even, at most {head_dim}")


class CausalSelfAttention(nn.Module):
    def __init__(self, args: Hyperparameters, layer: int, attention: str):
        super().__init__()
        self.num_kv_heads = args.num_kv_heads
        self.head_dim = args.head_dim
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(args.model_dim, args.model_dim)
        self.c_k = CastedLinear(args.model_dim, kv_dim)
        self.c_v = CastedLinear(args.model_dim, kv_dim)
        self.proj = CastedLinear(args.model_dim, args.model_dim)
        self.q_gain = nn.Parameter(torch.full((args.num_heads,), args.qk_gain_init))
        self.gate = nn.Parameter(torch.zeros(args.num_heads, args.gate_window))
        self.gate_scale = args.gate_scale
        self.exclude_self = layer >= args.num_layers - args.xsa_last_n
        self.attend = attention_of(attention)

    def forward(self, x: Tensor, rotary: Tensor, mask=None, past: KVCache | None = None) -> Tensor:
        weight = torch.cat([layer.weight for layer in (self.c_q, self.c_k, self.c_v)])
        qkv = F.linear(x, weight.to(x.dtype)).unflatten(-1, (-1, self.head_dim))
        heads = len(self.q_gain), self.num_kv_heads, self.num_kv_heads
        q, k, v = qkv.split(heads, 2)  # (B, T, H or K, d)
        q, k = (rotate(rms_norm(part), rotary) for part in (q, k))
        q = q * self.q_gain.to(q.dtype)[:, None]
        if past is None:
            y = self.attend(q, with_row_before(k, mask), with_row_before(v, mask), mask)
        else:
            y = sdpa_attention(q, *past.extend(k, v), mask)
        if self.exclude_self:  # XSA: drop the component along this position's own value
            own = F.normalize(v.float(), dim=-1).to(y.dtype).unsqueeze(3)  # (B, T, K, 1, d)
            y = y.unflatten(2, (self.num_kv_heads, -1))
            y = (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3)
        # a share of each head, by the first channels of the input
        gate = self.gate_scale * self.gate.to(x.dtype)
        share = F.linear(x[..., : gate.size(1)], gate)  # (B, T, H)
        y = y * torch.sigmoid(share).unsqueeze(-1)
        return self.proj(y.flatten(2))


class MLP(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        hidden = max(1, round(args.model_dim * args.mlp_mult))
        self.fc = CastedLinear(args.model_dim, hidden)
        self.proj = CastedLinear(hidden, args.model_dim)
        self.slope = args.leaky_slope

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), self.slope).square())


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, layer: int, attention: str):
        super().__init__()
        self.attn = CausalSelfAttention(args, layer, attention)
        self.mlp = MLP(args)
        self.attn_scale = nn.Parameter(torch.ones(args.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(args.model_dim))
        mix = torch.tensor([[1.0], [0.0]]).repeat(1, args.model_dim)
        self.resid_mix = nn.Parameter(mix)
        lanes = layer >= args.parallel_start
        self.lane_keep = nn.Parameter(torch.full((2,), 1.1)) if lanes else None
        self.lane_gain = nn.Parameter(torch.ones(2, 2)) if lanes else None  # (from, to)

    @piece
    def forward(self, x: Tensor, lane: Tensor | None, x0: Tensor, scale: Tensor, rotary: Tensor,
                mask, past: KVCache | None) -> tuple[Tensor, Tensor | None]:
        """One stream x (B, T, D), or two: attention reads x, the MLP the lane (#1529).
        `scale` () of the inputs of both."""
        mix = self.resid_mix.to(x.dtype)
        mixed = mix[0] * x + mix[1] * x0
        attended = self.attn(rms_norm(mixed) * scale, rotary, mask, past)
        attended = self.attn_scale.to(x.dtype) * attended
        source = mixed + attended if lane is None else lane
        out = self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(source) * scale)
        if lane is None:
            return source + out, None
        keep, gain = self.lane_keep.to(x.dtype), self.lane_gain.to(x.dtype)
        x, lane = (keep[i] * stream + gain[0, i] * attended + gain[1, i] * out
                   for i, stream in enumerate((x, lane)))
        return x, lane


class SmearGate(nn.Module):
    """x_t <- x_t + g_t x_{t-1}, g_t from the first channels of x_t; a BOS takes nothing."""

    def __init__(self, window: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1, window))
        self.size = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gate = torch.sigmoid(F.linear(x[..., : self.gate.size(1)], self.gate.to(x.dtype)))
        gate = self.size.to(x.dtype) * gate * (ids != BOS_ID).unsqueeze(-1)
        return x + gate * F.pad(x[:, :-1], (0, 0, 1, 0))


@piece
def joined(x: Tensor, skip: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """x and a weighted skip (B, T, D), in shares of a learned gate a channel."""
    return torch.lerp(weight.to(x.dtype) * skip, x, torch.sigmoid(gate).to(x.dtype))


@check
def check_network(args: Hyperparameters) -> None:
    forbid(args.gate_window > args.model_dim, args, "gate_window model_dim", "no such channels")


class GPT(nn.Module):
    """The network: `losses` for training, `logits` for scoring."""

    def __init__(self, args: Hyperparameters, attention: str = "sdpa", dtype=torch.float32):
        super().__init__()
        self.args, self.attention, self.dtype = args, attention, dtype
        dim, layers = args.model_dim, args.num_layers
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        self.smear = SmearGate(args.gate_window)
        self.blocks = nn.ModuleList(Block(args, i, attention) for i in range(layers))
        self.skip_weights = nn.Parameter(torch.ones(layers // 2, dim))
        self.skip_gates = nn.Parameter(torch.zeros(layers // 2, dim))
        self.set_tables()

    def set_tables(self) -> None:
        """Rotary tables by use; what scales the inputs of each block."""
        for use, pack in (("train", self.args.pack), ("eval", 1)):
            reach = getattr(self.args, f"{use}_seq_len")
            tables = rotary_tables(pack * reach, self.args, reach)
            self.register_buffer(f"rotary_{use}", tables, persistent=False)
        power = -0.5 if self.args.ln_scale else 0.0
        scales = [(i + 1) ** power for i in range(self.args.num_layers)]
        self.register_buffer("ln_scales", torch.tensor(scales), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Small embeddings, orthogonal matrices, zero output projections."""
        generator = torch.Generator().manual_seed(seed)
        self.tok_emb.weight.normal_(0, self.args.tied_embed_init_std, generator=generator)
        for block in self.blocks:
            for layer in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.fc):
                nn.init.orthogonal_(layer.weight, generator=generator)
            block.attn.proj.weight.zero_()
            block.mlp.proj.weight.zero_()

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.tok_emb.weight).to(self.dtype)

    def embed_contexts(self, ids: Tensor, known: int) -> Tensor:
        """ids (B, T) -> normalised embeddings (B, T - known, D), from position `known` on."""
        x = self.embed_rows(ids[:, max(0, known - 1) :])  # an id reads the one before
        return x[:, known - ids.size(1) :]

    @piece
    def embed_rows(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> normalised embeddings (B, T, D)."""
        return rms_norm(self.smear(self.embed(ids), ids))

    def attention_mask(self, ids: Tensor, past: KVCache | None):
        """The rungs' `mask`: None where plain causal attention is wanted."""
        if past is None and not self.args.doc_mask:
            return None
        docs = ((ids == BOS_ID) & self.args.doc_mask).cumsum(1)
        if past is None:
            return document_mask(self.attention, docs)
        return causal_mask(docs, ids.size(1) - past.length)

    def run_blocks(self, x: Tensor, rotary: Tensor, mask, past: KVCache | None) -> Tensor:
        """x (B, T, D) -> the same. U-Net: late blocks take early ones' outputs, last first."""
        # views are tensors of their own: equal blocks share a graph
        x0, lane, skips = x.view_as(x), None, []
        first_half = len(self.blocks) // 2
        for layer, block in enumerate(self.blocks):
            if layer >= self.args.parallel_start and lane is None:
                lane = x.view_as(x)  # two lanes from here on
            if layer >= first_half and skips:
                i = layer - first_half
                x = joined(x, skips.pop(), self.skip_weights[i], self.skip_gates[i])
            x, lane = block(x, lane, x0, self.ln_scales[layer], rotary, mask, past)
            if layer < first_half:
                skips.append(x.view_as(x))
        return x if lane is None else 0.5 * (x + lane)

    def states(self, ids: Tensor, rotary: Tensor, past: KVCache | None = None) -> Tensor:
        """ids (B, T) -> the stream (B, T, D) after the last block.

        With `past`, ids (1, T) are a window's so far; it gives only the states that are new."""
        known = 0 if past is None else past.length
        x = self.embed_contexts(ids, known)
        mask = self.attention_mask(ids, past)
        x = self.run_blocks(x, rotary[:, known : ids.size(1)], mask, past)
        if past is not None:
            past.length = ids.size(1)
        return x

    def hidden(self, ids: Tensor, rotary: Tensor, past: KVCache | None = None) -> Tensor:
        """`states`, as the head reads them: (B, T, D), normalised."""
        return rms_norm(self.states(ids, rotary, past))

    def read(self, ids: Tensor) -> Tensor:
        """`hidden` of training rows (B, T), each for itself or in packs."""
        pack = self.args.pack
        if pack == 1:
            return self.hidden(ids, self.rotary_train)
        mask = piece_mask(self.attention, ids, pack)
        rotary = self.rotary_train.unflatten(1, (pack, -1))  # (2, rows of a pack, T, 1, r / 2)
        rotary = rotary.repeat(1, len(ids) // pack, 1, 1, 1)
        return rms_norm(self.run_blocks(self.embed_contexts(ids, 0), rotary, mask, None))

    def exported(self) -> dict[str, nn.Parameter]:
        """The parameters that an artifact holds: all."""
        return dict(self.named_parameters())

    def head(self, x: Tensor) -> Tensor:
        """States -> capped logits in fp32."""
        logits = adapted(self.tok_emb, x).float()
        cap = self.args.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    @piece
    def nats(self, x: Tensor, targets: Tensor) -> Tensor:
        """Normalised states (B, T, D), targets (B, T) -> the nats of each (B, T)."""
        nats = F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten(), reduction="none")
        return nats.view(targets.shape)

    def losses(self, ids: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """ids (B, T + 1), weights (B,) -> sums, rows weighted: "ce" in nats."""
        x = self.read(ids[:, :-1])
        return {"ce": (self.nats(x, ids[:, 1:]).sum(1) * weights).sum()}

    def logits(self, ids: Tensor, first: Tensor, span: int) -> Tensor:
        """fp32 (B, span, V), from position first[b] of each row b of ids (B, T)."""
        return self.logits_from(self.hidden(ids, self.rotary_eval), first, span)

    @piece
    def logits_from(self, x: Tensor, first: Tensor, span: int) -> Tensor:
        positions = first[:, None] + torch.arange(span, device=x.device)
        return self.head(x.gather(1, positions[..., None].expand(-1, -1, x.size(-1))).float())


# -----------------------------------------------------------------------------
# OPTIMIZERS
# -----------------------------------------------------------------------------


def rate_at(progress: float, args: Hyperparameters) -> float:
    """Share of the peak rate at `progress` in [0, 1]: flat, then on the line that would reach 0 at
    1, but never below MIN_LR. Progress is max(step share, time share)."""
    fall = args.warmdown_iters / args.iterations
    left = min(1.0, (1.0 - progress) / fall) if fall else 1.0
    return max(args.min_lr, left)


# (a, b, c) of X <- a X + (b A + c A^2) X, A = X X^T, a triple a step: the best quintic for the
# singular values that earlier steps leave (Polar Express, Amsel et al. 2025; #1787).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Each of (n, r, c) becomes about U V^T of its SVD: the quintic iteration of Muon (K. Jordan),
    with the coefficients above, once its rows have equal norms (MuonEq-R)."""
    matrices = F.normalize(matrices, dim=-1, eps=1e-7)
    tall = matrices.size(1) > matrices.size(2)
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for a, b, c in POLAR_EXPRESS[:steps]:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).float()


def gradients(params: list[nn.Parameter]) -> list[Tensor]:
    """Gradients, or zeros: ranks always exchange the same shapes."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]


class Muon:
    """Momentum, then orthogonalisation: the update's singular values are near 1.

    Matrices of equal shape form one stack; each rank owns a share, receives its summed gradient
    (reduce-scatter), orthogonalises it and sends it round (all-gather) while it does the next.
    m <- mu m + g; update = NS(g + mu m);
    p <- (1 - rate wd) p - rate sqrt(max(1, r / c)) update."""

    def __init__(self, params: list[nn.Parameter], args: Hyperparameters, runtime: Runtime):
        self.args, self.runtime = args, runtime
        shapes = dict.fromkeys(p.shape for p in params)
        stacks = [[p for p in params if p.shape == shape] for shape in shapes]
        self.stacks = sorted(stacks, key=lambda members: -len(members) * members[0].numel())
        self.momenta = []
        for members in self.stacks:
            share = -(-len(members) // runtime.world_size)
            self.momenta.append(torch.zeros(share, *members[0].shape, device=runtime.device))

    def start_reduction(self) -> None:
        """Begins to sum the gradients over ranks."""
        self.shares, self.pending = [], []
        for members, momentum in zip(self.stacks, self.momenta):
            spare = len(momentum) * self.runtime.world_size - len(members)
            full = torch.stack(gradients(members) + [torch.zeros_like(members[0])] * spare)
            if self.runtime.world_size > 1:
                share = torch.empty_like(momentum)
                self.pending.append(reduce_scatter(share, full, async_op=True))
            else:
                share = full
            self.shares.append(share)

    def square_norm(self) -> Tensor:
        """Waits for the reduction; the squared norm of this group's gradients."""
        for work in self.pending:
            work.wait()
        total = torch.stack([share.square().sum() for share in self.shares]).sum()
        return self.runtime.all_reduce(total)

    def step(self, rate: float, momentum: float, clip: Tensor) -> None:
        flying = []
        for members, buffer, share in zip(self.stacks, self.momenta, self.shares):
            share.mul_(clip)
            buffer.mul_(momentum).add_(share)
            share.add_(buffer, alpha=momentum)
            mine = newton_schulz(share, self.args.muon_backend_steps, self.runtime.dtype)
            flying.append((members, self._gather(mine)))
        for members, update in flying:
            factor = max(1.0, members[0].size(0) / members[0].size(1)) ** 0.5
            torch._foreach_mul_(members, 1 - rate * self.args.muon_wd)
            torch._foreach_add_(members, update()[: len(members)].unbind(), alpha=-rate * factor)

    def _gather(self, share: Tensor):
        """Starts to collect the ranks' shares of a stack -> a function that waits."""
        if self.runtime.world_size == 1:
            return lambda: share
        full = share.new_empty(len(share) * self.runtime.world_size, *share.shape[1:])
        work = all_gather(full, share.contiguous(), async_op=True)

        def whole() -> Tensor:
            work.wait()
            return full
        return whole

    def state(self) -> dict[str, Tensor]:
        """Momenta of all ranks, for a checkpoint that any number of ranks reads."""
        return {f"muon.{i}": self._gather(momentum)()[: len(members)]
                for i, (members, momentum) in enumerate(zip(self.stacks, self.momenta))}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for i, momentum in enumerate(self.momenta):
            mine = state[f"muon.{i}"][self.runtime.rank * len(momentum) :][: len(momentum)]
            momentum.zero_()[: len(mine)].copy_(mine)


class Optimizers:
    """Every optimizer: one step for all of them, and what a checkpoint needs.

    group    parameters                     optimizer   rate
    matrix   2-D weights of blocks          Muon        MATRIX_LR
    embed    token embedding                AdamW       TIED_EMBED_LR, decay EMBED_WD
    scalar   gains, mixes, gates: all else  AdamW       SCALAR_LR"""

    GROUPS = ("matrix", "embed", "scalar")

    def __init__(self, model: GPT, args: Hyperparameters, runtime: Runtime):
        self.args, self.runtime, self.model = args, runtime, model
        groups = {group: [] for group in self.GROUPS}
        for name, p in model.named_parameters():
            groups[self.group_of(name, p)].append(p)
        self.muon = Muon(groups["matrix"], args, runtime)
        rates = {"embed": (args.tied_embed_lr, args.embed_wd),
                 "scalar": (args.scalar_lr, args.adam_wd)}
        adam = [{"params": groups[group], "lr": rate, "peak": rate, "weight_decay": decay}
                for group, (rate, decay) in rates.items()]
        betas = args.beta1, args.beta2
        self.adam = torch.optim.AdamW(adam, betas=betas, eps=args.adam_eps, fused=True)
        self.replicated = [p for group in self.GROUPS[1:] for p in groups[group]]

    @staticmethod
    def group_of(name: str, p: nn.Parameter) -> str:
        if name.startswith("tok_emb."):
            return "embed"
        return "matrix" if p.ndim == 2 and name.endswith(".weight") else "scalar"

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Sums all gradients over ranks; returns the global norm (before clipping)."""
        self.muon.start_reduction()
        grads = gradients(self.replicated)
        for p, grad in zip(self.replicated, grads):
            p.grad = grad
        if self.runtime.world_size > 1:
            flat = torch._utils._flatten_dense_tensors(grads)
            dist.all_reduce(flat)
            torch._foreach_copy_(grads, torch._utils._unflatten_dense_tensors(flat, grads))
        return (self.muon.square_norm() + torch.stack(torch._foreach_norm(grads)).square().sum()).sqrt()

    @torch.no_grad()
    def step(self, step: int, progress: float, norm: Tensor) -> None:
        args = self.args
        rate = rate_at(progress, args)
        clip = ((args.grad_clip_norm or math.inf) / (norm + 1e-6)).clamp(max=1.0)
        warm = min(1.0, step / max(args.muon_momentum_warmup_steps, 1e-9))
        momentum = (1 - warm) * args.muon_momentum_warmup_start + warm * args.muon_momentum
        torch._foreach_mul_([p.grad for p in self.replicated], clip)
        self.muon.step(args.matrix_lr * rate, momentum, clip)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * rate
        self.adam.step()

    def state(self) -> dict[str, Tensor]:
        """Every tensor of every optimizer, by name."""
        found = self.muon.state()
        for i, entry in self.adam.state_dict()["state"].items():
            found |= {f"adam.{i}.{key}": torch.as_tensor(value) for key, value in entry.items()}
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.muon.load_state(state)
        adam = self.adam.state_dict() | {"state": {}}
        for name, value in state.items():
            if name.startswith("adam."):
                _, i, key = name.split(".")
                adam["state"].setdefault(int(i), {})[key] = value
        self.adam.load_state_dict(adam)


class EMA:
    """fp32 average of the weights; the decay min(EMA_DECAY, (1 + t) / (10 + t))."""

    def __init__(self, model: GPT, decay: float):
        self.decay = decay
        self.live = list(model.parameters())
        self.average = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.live, 1.0 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """From here on the model holds the average."""
        torch._foreach_copy_(self.live, self.average)


# -----------------------------------------------------------------------------
# ARTIFACT
# -----------------------------------------------------------------------------

# magic (8 bytes), sha256 of the rest (32), version (2), header length (4), zlib of JSON, payload
ARTIFACT_MAGIC, ARTIFACT_VERSION = b"GOLFLM\r\n", 2

CHUNK = 1024  # symbols coded under one state of the models
CONTEXT_EDGES = np.array([1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64,
                          91, 128, 181, 256, 362, 512])  # of 16 * |q|
CONTEXT_LEVELS = len(CONTEXT_EDGES) + 1

# Integers in [-top, top] as they lie in the raw payload, a byte each: slices x places. Planes of
# one `model` share statistics; every `period` slices the history of a place begins anew.
Plane = namedtuple("Plane", "model top slices places period")


def planes(entries: list) -> list[Plane]:
    """Layout for entries [name, shape, bits, axis]: quantised tensors, then fp16 bytes."""
    found, halves = [], 0
    for name, shape, bits, axis in entries:
        slices = math.prod(shape) // (shape[axis] if bits else 1)
        halves += 0 if ":fine" in name else slices
        if bits:
            top = 2 ** (bits - 1) - 1
            found.append(Plane(f"{tensor_class(name)}{bits}", top, slices, shape[axis], slices))
    return found + [Plane(f"half{i}", 128, 1, halves, 1) for i in range(2)]


def fresh_counts(top: int) -> np.ndarray:
    """Counts before a model's first symbol: (4 ages x CONTEXT_LEVELS, 2 top + 1).
    A row is a two-sided geometric distribution with the mean |q| of its context."""
    mean = np.tile(np.append(CONTEXT_EDGES, 724), 4)[:, None] / 16
    mean[:CONTEXT_LEVELS] = 4  # age 0: no slice before
    fall = np.repeat(mean / (mean + 1), top, 1)
    fall = np.multiply.accumulate(fall, axis=1)  # not `**`: its last bit differs by machine
    shares = np.hstack((fall[:, ::-1], np.ones_like(mean), fall)) / (2 * mean + 1)
    return 24 * shares + 0.02


def code_slices(block: np.ndarray, contexts: np.ndarray, counts: np.ndarray, top, code) -> None:
    """Codes block (slices, places): of each CHUNK, the symbols of one context at once."""
    for left in range(0, block.shape[1], CHUNK):
        here = contexts[left : left + CHUNK]
        for context in np.unique(here):
            columns = left + np.flatnonzero(here == context)
            part = block[:, columns]
            table = counts[context]
            model = constriction.stream.model.Categorical(table, perfect=False)
            symbols = code(part.ravel(), model, top)
            block[:, columns] = symbols.reshape(part.shape)
            table += np.bincount(symbols.astype(np.int64) + top, minlength=len(table))


def code_plane(block: np.ndarray, plane: Plane, counts: np.ndarray, code) -> None:
    """Codes block (slices, places), as many slices at a time as fill a CHUNK."""
    group = max(1, min(plane.period, CHUNK // plane.places))
    for begin in range(0, plane.slices, plane.period):
        end = min(begin + plane.period, plane.slices)
        total = np.zeros(plane.places, np.int64)
        counts /= 16
        for first in range(begin, end, group):
            part, seen = block[first : min(first + group, end)], first - begin
            level = np.searchsorted(CONTEXT_EDGES, 16 * total // max(seen, 1), side="right")
            age = min(seen.bit_length(), 3)  # 0, 1, 2 to 3, more slices
            code_slices(part, level + age * CONTEXT_LEVELS, counts, plane.top, code)
            total += np.abs(part.astype(np.int64)).sum(0)


def code_planes(raw: np.ndarray, layout: list[Plane], code) -> None:
    """Walks over `raw`, int8, in coding order; code(symbols, model, top) replaces symbols.

    A symbol's context is the mean |q| of its place (column or bucket) in the slices before, and how
    many these are. Each (model, context) counts what it has seen, so no table is sent; with every
    period old counts shrink. Integers and correctly rounded operations: any machine agrees."""
    models = {}
    ends = np.cumsum([plane.slices * plane.places for plane in layout])
    for plane, block in zip(layout, np.split(raw, ends)):
        if plane.model not in models:
            models[plane.model] = fresh_counts(plane.top)
        code_plane(block.reshape(plane.slices, plane.places), plane, models[plane.model], code)


def rans_encode(raw: bytes, layout: list[Plane]) -> bytes:
    jobs, coder = [], constriction.stream.stack.AnsCoder()

    def code(symbols: np.ndarray, model, top: int) -> np.ndarray:
        jobs.append((symbols.astype(np.int32) + top, model))
        return symbols

    code_planes(np.frombuffer(bytearray(raw), np.int8), layout, code)
    for symbols, model in reversed(jobs):  # a stack: what goes in last comes out first
        coder.encode_reverse(symbols, model)
    return coder.get_compressed().astype("<u4").tobytes()


def rans_decode(blob: bytes, layout: list[Plane]) -> bytes:
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(blob, "<u4").astype(np.uint32))
    raw = np.empty(sum(plane.slices * plane.places for plane in layout), np.int8)

    def code(symbols: np.ndarray, model, top: int) -> np.ndarray:
        return (coder.decode(model, len(symbols)) - top).astype(np.int8)

    code_planes(raw, layout, code)
    if not coder.is_empty():
        raise ValueError("the payload is longer than its layout")
    return raw.tobytes()


COMPRESSORS = {  # (compress, decompress), of bytes and the layout of the payload
    "rans": (rans_encode, rans_decode),
    "lzma": (lambda raw, _: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
             lambda blob, _: lzma.decompress(blob)),
}


def pack(tensors: dict, args: Hyperparameters, hessians: dict | None = None) -> bytes:
    """{name: float array} -> a file: quantised by `quant_plan`, compressed in `planes`' order.

    `hessians` {name: (C, C)} of the matrices that GPTQ is to round. Parts of a matrix are entries
    of their own: `name:fine<column>`, AWQ-lite's; `name:a` and `name:b`, LQER's product for the
    largest errors."""
    entries, codes, halves, errors, hessians = [], [], [], {}, hessians or {}
    groups = salient_groups(tensors, hessians, args)

    def add(name: str, q: np.ndarray, step: np.ndarray, bits: int) -> None:
        entries.append([name, list(q.shape), bits, 1])
        codes.append(q.tobytes())
        halves.append(step.reshape(-1))

    for name, weight in tensors.items():
        bits, _ = quant_plan(name, weight.shape, args)
        if not bits:
            entries.append([name, list(weight.shape), 0, 0])
            halves.append(np.asarray(weight, dtype="<f2").reshape(-1))
            continue
        top, column = np.full(weight.shape[1], 2 ** (bits - 1) - 1), groups.get(name)
        fine = slice(0, 0) if column is None else slice(column, column + AWQ_WIDTH)
        top[fine] = 127
        k = args.k_by_class[tensor_class(name)]
        q, step, near = quantise(weight, top, k, hessians.get(name))
        add(name, np.delete(q, fine, 1), step, bits)
        if column is not None:
            add(f"{name}:fine{column}", q[:, fine], step[:0], 8)
        errors[name] = weight - near
    falling = sorted(errors, key=lambda name: -np.linalg.norm(errors[name]))
    for name in sorted(falling[: args.lqer_top_k], key=[*errors].index):
        a, b = low_rank(errors[name], min(args.lqer_rank, *errors[name].shape))
        add(f"{name}:a", *a, 3)
        add(f"{name}:b", *b, 5)
    halves = np.concatenate(halves).astype("<f2")
    raw = b"".join(codes) + halves.view(np.uint8).reshape(-1, 2).T.tobytes()

    name = "rans" if constriction and args.compressor != "lzma" else "lzma"
    payload = COMPRESSORS[name][0](raw, planes(entries))
    title, digest = __doc__.partition(":")[0], sha256_file(Path(__file__))
    header = {"config": args.shipped(), "tensors": entries, "compressor": name,
              "script": f"{title}, script {digest[:8]}"}
    header = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = ARTIFACT_VERSION.to_bytes(2, "little") + len(header).to_bytes(4, "little")
    body += header + payload
    return ARTIFACT_MAGIC + hashlib.sha256(body).digest() + body


def unpack_tensors(entries: list, raw: bytes) -> dict[str, np.ndarray]:
    sizes = [plane.slices * plane.places for plane in planes(entries)]
    *ends, length = np.cumsum(sizes, dtype=np.int64)
    if len(raw) != length:
        raise ValueError(f"{len(raw) - length} bytes left over")
    *codes, low, high = np.split(np.frombuffer(raw, np.int8), ends)
    halves = np.stack((low, high), 1).view("<f2").reshape(-1)
    counts = [math.prod(shape) // (shape[axis] if bits else 1) if ":fine" not in name else 0
              for name, shape, bits, axis in entries]

    tensors, steps = {}, {}
    for (name, shape, bits, _), numbers in zip(entries, np.split(halves, np.cumsum(counts))):
        numbers = numbers.astype(np.float32)
        if not bits:
            tensors[name] = numbers.reshape(shape)
            continue
        owner, _, part = name.partition(":")
        q, top = codes.pop(0).reshape(shape), np.float32(2 ** (bits - 1) - 1)
        if part.startswith("fine"):
            (step, coarse), column = steps[owner], int(part.removeprefix("fine"))
            fine = q * (coarse / top) * step
            tensors[owner] = np.insert(tensors[owner], [column], fine, axis=1)
            continue
        step = numbers[:, None]
        tensors[name], steps[name] = q * step, (step, top)
        if part == "b":  # in order: any machine agrees
            a, b = tensors.pop(f"{owner}:a"), tensors.pop(name)
            for left, right in zip(a, b.reshape(len(a), -1)):
                tensors[owner] += np.outer(left, right[: tensors[owner].shape[1]])
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def unpack(blob: bytes, path: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The inverse of `pack`: (header, {name: fp32 array}); errors name `path`."""
    start = len(ARTIFACT_MAGIC)
    if blob[:start] != ARTIFACT_MAGIC:
        raise UserError(f"{path}: not an artifact of this family (it begins with {blob[:8]!r})")
    digest, body = blob[start : start + 32], blob[start + 32 :]
    if hashlib.sha256(body).digest() != digest:
        raise UserError(f"{path}: its sha256 does not match: truncated or altered")
    version = int.from_bytes(body[:2], "little")
    length = int.from_bytes(body[2:6], "little")
    if version != ARTIFACT_VERSION:
        raise UserError(f"{path}: format version {version}, this script reads {ARTIFACT_VERSION}")
    header = {"config": {}, "script": "another script"}
    # all that a damaged file can break
    try:
        header |= json.loads(zlib.decompress(body[6 : 6 + length]))
        if header["compressor"] == "rans" and not constriction:
            raise UserError(f"{path}: packed by rANS: `pip install constriction` reads it")
        _, decompress = COMPRESSORS[header["compressor"]]
        raw = decompress(body[6 + length :], planes(header["tensors"]))
        return header, unpack_tensors(header["tensors"], raw)
    except UserError:
        raise
    except Exception as error:  # each decoder has its own kinds
        told = f"made by {header['script']}: header and payload differ"
        raise UserError(f"{path}: {told} ({error!r})") from None


def shipped_settings(header: dict, path: str, environ: dict | None = None) -> Hyperparameters:
    """The settings of an artifact's header; `environ` may change all but the model's."""
    wanted = [var.name for var in Hyperparameters.vars().values() if var.ship]
    if missing := [name for name in wanted if name not in header["config"]]:
        raise UserError(f"{path}: made by {header['script']}: its config lacks {missing[0]}")
    return Hyperparameters(environ, header["config"])


def read_file(path: str | Path, variable: str) -> bytes:
    if not path:
        raise UserError(f"{variable}=FILE is not set")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{variable}={path}: {error.strerror}") from None


def load(artifact_path: str | Path, device="cpu", args: Hyperparameters | None = None,
         dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> GPT:
    """The model of an artifact; `args` may change how it scores."""
    header, tensors = unpack(read_file(artifact_path, "ARTIFACT"), str(artifact_path))
    args = args or shipped_settings(header, str(artifact_path))
    with torch.device("meta"):
        model = GPT(args, attention, dtype)
    wanted = {(name, tuple(p.shape)) for name, p in model.exported().items()}
    if odd := wanted ^ {(name, array.shape) for name, array in tensors.items()}:
        raise UserError(f"{artifact_path}: its tensors do not fit its config, first {min(odd)}")
    # the arrays become the weights, without a copy
    found = {name: torch.from_numpy(array) for name, array in tensors.items()}
    model.load_state_dict(found, assign=True)
    model.set_tables()
    return model.to(device).eval()


# -----------------------------------------------------------------------------
# EVALUATION
# -----------------------------------------------------------------------------


@check
def check_windows(args: Hyperparameters) -> None:
    skips = args.eval_stride > args.eval_seq_len
    forbid(skips, args, "eval_stride eval_seq_len", "a stride beyond the window skips targets")


def windows(targets: int, length: int, stride: int) -> np.ndarray:
    """Rows (start, first, stop): ids[start : start + length] score targets first ... stop - 1.

    Target t is the id t + 1 of the stream. Each block of `stride` targets is scored by the window
    that ends with it (the first windows start at 0): every target, the tail included, counts
    once, after at least length - stride ids where there are so many."""
    first = np.arange(0, targets, stride)
    stop = np.minimum(first + stride, targets)
    start = np.maximum(first + stride - length, 0)
    return np.stack((start, first, stop), axis=1)


def kernel(function, allocates=False):
    """Compiles a loop over ids. No fastmath: scorer and decoder round alike."""
    options = {"error_model": "numpy", "nogil": True, "forceinline": True, "_nrt": allocates}
    return njit(**options)(function) if njit else function


LANES = 16  # of a vector; numba leaves short loops scalar
if njit:
    INT, PART = ir.IntType(32), ir.IntType(64)
    FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()
    VECTOR, WIDE, INTS = (ir.VectorType(kind, LANES) for kind in (FLOAT, DOUBLE, INT))

    def pointer(builder, array, place, to):
        return builder.bitcast(builder.gep(array.data, [place]), to.as_pointer())

    def fetch(builder, array, place, to=VECTOR):
        return builder.load(pointer(builder, array, place, to), align=4)

    def store(builder, array, place, x):
        builder.store(x, pointer(builder, array, place, x.type), align=4)

    def emitted(emit, *kinds):
        """An intrinsic; `emit(builder, ...)` gets arrays as their fields."""
        def lower(context, builder, signature, args):
            opened = [context.make_array(kind)(context, builder, x)
                      if isinstance(kind, types.Array) else x for kind, x in zip(kinds, args)]
            emit(builder, *opened)
            return context.get_dummy_value()
        return types.void(*kinds), lower

    @extending.intrinsic
    def prefetch(typing, a, i):
        """Asks memory for a[i] early."""
        def emit(builder, a, i):
            place = pointer(builder, a, i, ir.IntType(8))
            kind = ir.FunctionType(ir.VoidType(), [place.type, INT, INT, INT])
            ask = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
            builder.call(ask, [place, INT(1), INT(3), INT(1)])  # to write
        return emitted(emit, a, types.intp)

    @extending.intrinsic
    def nudge(typing, w, i, step, x, n):
        """w[i] += step * x[n] for all lanes."""
        def emit(builder, w, i, step, x, n):
            steps = builder.insert_element(ir.Constant(WIDE, None), step, INT(0))
            steps = builder.shuffle_vector(steps, steps, ir.Constant(INTS, None))
            change = builder.fmul(steps, fetch(builder, x, n, WIDE))
            total = builder.fadd(builder.fpext(fetch(builder, w, i), WIDE), change)
            store(builder, w, i, builder.fptrunc(total, VECTOR))
        return emitted(emit, w, types.intp, types.float64, x, types.intp)

    @extending.intrinsic
    def run_up(typing, columns, order, sums):
        """sums (n + 1, 16) of columns (n, 16) in `order`, up to each."""
        def emit(builder, columns, order, sums):
            total = alloca_once_value(builder, ir.Constant(WIDE, None))
            with for_range(builder, order.nitems) as loop:
                place = builder.mul(loop.index, PART(LANES))
                store(builder, sums, place, builder.load(total))
                leaf = builder.load(pointer(builder, order, loop.index, PART))
                x = builder.fpext(fetch(builder, columns, builder.mul(leaf, PART(LANES))), WIDE)
                builder.store(builder.fadd(builder.load(total), x), total)
            store(builder, sums, builder.mul(order.nitems, PART(LANES)), builder.load(total))
        return emitted(emit, columns, order, sums)

    def fused(builder, x, y, z):
        kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
        return builder.call(builder.module.declare_intrinsic("llvm.fma.v16f32", (), kind), (x, y, z))

    def power(builder, x):
        """e^x of 16 x, the same bits on all processors: 2^n times a series."""
        numbers = [math.log(TINY), 1 / math.log(2), 1.5 * 2**23]
        numbers += [math.log(2) ** k / math.factorial(k) for k in range(7, -1, -1)]
        least, scale, big, y, *series = (ir.Constant(VECTOR, [c] * LANES) for c in numbers)
        x = builder.select(builder.fcmp_unordered(">", x, least), x, least)  # NaN stays
        whole = fused(builder, x, scale, big)  # n, in its lowest bits
        rest = fused(builder, x, scale, builder.fsub(big, whole))
        for term in series:
            y = fused(builder, y, rest, term)
        n = builder.shl(builder.bitcast(whole, INTS), ir.Constant(INTS, [23] * LANES))
        return builder.bitcast(builder.add(builder.bitcast(y, INTS), n), VECTOR)

    @extending.intrinsic
    def transpose(typing, logprobs, first, i, columns):
        """columns[i : i + 16] = exp(logprobs[first:, i:][:16, :16]).T, TINY at least."""
        def emit(builder, logprobs, first, i, columns):
            (rows, width), x = unpack_tuple(builder, logprobs.shape), []
            last = builder.sub(rows, PART(1))
            for r in range(LANES):  # the last repeats
                row = builder.add(first, PART(r))
                row = builder.select(builder.icmp_signed("<", row, last), row, last)
                place = builder.add(builder.mul(row, width), i)
                x.append(power(builder, fetch(builder, logprobs, place)))

            for half in (8, 4, 2, 1):  # blocks change places
                picks = [k + (LANES - half) * bool(k & half) for k in range(LANES)]
                near, far = (ir.Constant(INTS, [k + n for k in picks]) for n in (0, half))
                for a, b in ((r, r + half) for r in range(LANES) if not r & half):
                    two = x[a], x[b]  # from 16 on: the second's
                    x[a], x[b] = (builder.shuffle_vector(*two, k) for k in (near, far))
            for r in range(LANES):
                place = builder.mul(builder.add(i, PART(r)), PART(LANES))
                store(builder, columns, place, x[r])
        return emitted(emit, logprobs, types.intp, types.intp, columns)


# The vocabulary as a binary tree. Leaves are the ids in order of spelling; inner nodes are
# the borders between them: node i parts leaves low ... i - 1 (a 0) from i ... high - 1 (a 1).
# Only the network tells `alike` ids apart. Up to ROOM nodes that hang together are a group.
Tree = namedtuple("Tree", "order low high rank nodes alike level group place above paths")
# order, rank (V,): ids by leaf, leaves by id; nodes (V - 1,): topmost first; above (groups,): the
# group above; paths (V, levels): an id's nodes, then 0; the others (V,): by node
ROOM = 15


def border(words: list[tuple], first: int, stop: int) -> tuple[int, bool]:
    """(node of leaves first ... stop - 1, whether all spell the same)."""
    a, b, middle = words[first], words[stop - 1], (first + stop) // 2
    if a == b:
        return middle, True
    n = 1 + len(os.path.commonprefix((a, b)))  # with the first symbol that changes
    before = bisect.bisect_left(words, words[middle][:n], first, stop)
    after = bisect.bisect_right(words, words[middle][:n], first, stop, key=lambda word: word[:n])
    late = before == first or (after < stop and after - middle < middle - before)
    return after if late else before, False


def vocabulary_tree(spelled: list[tuple]) -> Tree:
    """The tree of V >= 2 ids, from the symbols that each spells: some the same, some none."""
    order = np.array(sorted(range(len(spelled)), key=lambda i: (spelled[i], i)))
    words, rank = [spelled[i] for i in order], np.argsort(order)
    low, high, alike, level, group, place = np.zeros((6, len(order)), np.int32)
    paths = np.zeros((len(order), 256), np.int32)
    nodes, above = [], []

    groups = [(0, len(order), 0)]  # first leaf, stop, node above
    for head in groups:
        members = deque([head])  # breadth first
        above.append(group[head[2]])
        for seat in range(1, ROOM + 1):
            if not members:
                break
            first, stop, parent = members.popleft()
            node, same = border(words, first, stop)
            nodes.append(node)
            low[node], high[node], alike[node] = first, stop, same
            level[node], group[node], place[node] = level[parent] + 1, len(above) - 1, seat
            paths[order[first:stop], level[parent]] = node
            halves = ((first, node, node), (node, stop, node))
            members.extend(half for half in halves if half[1] - half[0] > 1)
        groups.extend(members)
    paths = np.ascontiguousarray(paths[:, : level.max()])
    above, nodes = np.array(above, np.int32), np.array(nodes, np.int32)
    return Tree(order, low, high, rank, nodes, alike, level, group, place, above, paths)


# The text's proposals: the id that came after the last ids, for a long and a short run.
Text = namedtuple("Text", "ids now places")
# ids (slots,): the last of the text; now (2 + 2 * runs,): how many there were, where the document
# begins, for each run the proposal's place and the ids before it that agree; places (runs, slots)
RUNS, LONGEST, SLOTS = np.array([5, 2]), 32, 22  # of a run; log2


@kernel
def blend(state, symbol):
    """A 64-bit hash of a state and one more symbol."""
    state = (state ^ np.uint64(symbol)) * np.uint64(0x9E3779B97F4A7C15)
    return state ^ (state >> np.uint64(29))


@functools.partial(kernel, allocates=True)
def propose(text, ids):
    """Reads ids (n,) -> proposals after each: (n, 2 * runs), [id, ids that agree] a run, or 0."""
    hints = np.zeros((len(ids), 2 * len(RUNS)), np.int64)
    now, seen, ring = text.now, text.ids, (1 << SLOTS) - 1
    for t in range(len(ids)):
        n = now[0]
        seen[n & ring], now[0] = ids[t], n + 1
        now[1] = n if ids[t] == BOS_ID else now[1]
        here = n + 1 - now[1]  # of this document

        for r in range(len(RUNS)):
            place, run = now[2 + 2 * r], now[3 + 2 * r]
            true = run > 0 and seen[place & ring] == ids[t]  # it goes on
            place, run = (place + 1, min(run + 1, LONGEST)) if true else (0, 0)
            state = np.uint64(r)
            for k in range(min(RUNS[r], here)):
                state = blend(state, seen[(n - k) & ring] + 1)
            slot = np.int64(state >> np.uint64(64 - SLOTS))
            before = text.places[r, slot] - 1
            if run < LONGEST:  # at the newest such place
                length, most = 0, min(before + 1, min(here, LONGEST))
                while length < most and seen[(before - length) & ring] == seen[(n - length) & ring]:
                    length += 1
                if length >= min(RUNS[r], here) and length > run:
                    place, run = before + 1, length
            text.places[r, slot], now[2 + 2 * r], now[3 + 2 * r] = n + 1, place, run
            if run:
                hints[t, 2 * r], hints[t, 2 * r + 1] = seen[place & ring], run
    return hints


# Binary mixing, after lpaq (Mahoney 2005): an id is a decision at each node above it.
# Contexts are the last bytes, the word so far and the last ids, counted for the document or the
# whole stream. Each owns a row for each group of nodes, 16 uint32: [document << 24 | check, a
# counter a node: probability of a 1 << 10 | n]. A row goes to the later of two.
Mixer = namedtuple("Mixer", "table contexts hashes spelled starts now weights trust hits "
                            "keys row mark met lanes cells sets mixed")
# contexts (C, 3): index into hashes, 1 = this document, rows - 1; hashes (order + 3,) of the last
# 1 ... order bytes, the word, the last id and two; spelled, starts (V + 1,): ids' symbols; now
# (1 + runs,): document, leaves proposed. Scratch: keys (BLOCK + 1, C + 1) and document;
# row, mark, met (groups, C), see `look_up`; others by node, see `decide`.
STRETCH = np.log(np.arange(0.5, 4096) / np.arange(4095.5, 0, -1)).astype(np.float32)
DOUBT = np.digitize(0.5 - np.abs(np.arange(256) - 127.5) / 256, (0.03, 0.12, 0.25))
TRIALS = np.searchsorted([*range(1, 9), 12, 16, 24, 32, 64, 128], range(256), "right")
AGREED = np.digitize(np.arange(LONGEST + 1), (4, 8, 16))
STEPS, LIMIT = 1 / (np.arange(256) + 1.6), 255  # by a counter's n; largest n
RATE, SLOW = 0.0013, 0.02  # of weights and of `hits`
TINY, USED = 1e-12, np.uint64(9 + len(RUNS))  # least probability; inputs
BLOCK, AHEAD = 512, 3  # ids mixed at once; asked for ahead


@kernel
def row_of(m, t, c, group):
    """(The hash of a context and a group, the place of their row)."""
    key, rows = blend(m.keys[t, c], len(m.contexts) * group + c), m.contexts[c, 2]
    return key, (c * (rows + 1) + (np.int64(key >> np.uint64(8)) & rows)) * LANES


@kernel
def look_up(m, tree, t, group):
    """Finds rows; `met`: 2 in this document, 1 in another."""
    above, document = tree.above[group], np.uint32(m.keys[t, len(m.contexts)])
    for c in range(len(m.contexts)):
        key, row = row_of(m, t, c, group)
        mark = np.uint32(key >> np.uint64(40)) | np.uint32(1) | document << np.uint32(24)
        m.row[group, c], m.mark[group, c] = row, mark
        head = m.table[row]
        same = ((head ^ mark) & np.uint32(0xFFFFFF)) == 0 and (group == 0 or m.met[above, c] > 0)
        m.met[group, c] = same * (1 + (head == mark))


@kernel
def ask(m, tree, t, token):
    """Asks for the rows of an id's path."""
    group = -1
    for node in tree.paths[token]:
        if node and tree.group[node] != group:
            group = tree.group[node]
            for c in range(len(m.contexts)):
                prefetch(m.table, row_of(m, t, c, group)[1])


@kernel
def decide(m, tree, t, nodes, count, odds, hints):
    """Logistic mixing: writes `mixed`, the probability of a 1 at each of `count` nodes.
    Inputs, `lanes` of a node, are log odds of the network, counters and proposals.
    An input's weight is a sum of three `sets`: how long the proposals agree, how sure the
    network is, the node; a counter's has a fourth, `trust`: its trials, doubt and `met`."""
    lanes, cells, sets, mixed, weights = m.lanes, m.cells, m.sets, m.mixed, m.weights
    contexts, group = len(m.contexts), -1
    for r in range(len(RUNS)):
        m.now[1 + r] = tree.rank[hints[2 * r]]

    for j in range(count):
        node, z, state = nodes[j], 0.0, 0
        if tree.group[node] != group:
            group = tree.group[node]
            look_up(m, tree, t, group)
        lanes[j, 0] = min(max(odds[j], -12.0), 12.0)
        for c in range(contexts):
            counter = m.table[m.row[group, c] + tree.place[node]]
            n, met = counter & np.uint32(1023), np.int64(m.met[group, c])
            known = met > 0 and n > 0
            cell = TRIALS[n & np.uint32(255)] * 8 + DOUBT[counter >> np.uint32(24)] * 2
            cells[j, c] = cell + met - 1 if known else 0
            lanes[j, 1 + c] = x = STRETCH[counter >> np.uint32(20)] if known else np.float32(0)
            z += m.trust[c, cells[j, c]] * x
        for r in range(len(RUNS)):
            i, run, leaf = contexts + r, hints[2 * r + 1], m.now[1 + r]
            lanes[j, 1 + i], cells[j, i] = 0.0, 0
            if run and tree.low[node] <= leaf < tree.high[node]:
                cell = ((LONGEST + 1) * r + run) * 16 + min(tree.level[node], 15)
                chance = math.log(m.hits[cell] / (1 - m.hits[cell]))
                cells[j, i], lanes[j, 1 + i] = cell, chance if leaf >= node else -chance
                state += 5 if r else 1 + AGREED[run]
        sets[j, 0], sets[j, 1] = state * LANES, (16 + min(int(abs(lanes[j, 0])), 11)) * LANES
        sets[j, 2] = (32 + node) * LANES
        a, b, c = sets[j, 0], sets[j, 1], sets[j, 2]
        for i in range(USED):
            z += (weights[a + i] + weights[b + i] + weights[c + i]) * lanes[j, i]
        mixed[j] = 1 / (1 + math.exp(-odds[j] if tree.alike[node] else min(max(-z, -12.0), 12.0)))


@kernel
def follow(m, ids):
    """Moves contexts on over ids (n,); keeps the keys before each and at the end."""
    hashes, word, contexts = m.hashes, len(m.hashes) - 3, len(m.contexts)
    for t in range(len(ids) + 1):
        for c in range(contexts):
            m.keys[t, c] = blend(hashes[m.contexts[c, 0]], m.contexts[c, 1] * (m.now[0] + 1))
        m.keys[t, contexts] = m.now[0] & 255
        if t == len(ids):
            break

        token = ids[t]
        if token == BOS_ID:
            hashes[:] = 0
            m.now[0] += 1
            continue
        hashes[word + 2] = blend(hashes[word + 1], token + 1)
        hashes[word + 1] = blend(np.uint64(1 << 40), token + 1)
        for i in range(m.starts[token], m.starts[token + 1]):
            x = m.spelled[i]
            for k in range(word - 1, 0, -1):
                hashes[k] = blend(hashes[k - 1], x + 1)
            hashes[0], letter = blend(np.uint64(0), x + 1), x | 32
            inside = 97 <= letter <= 122 or 48 <= x <= 57 or x >= 128
            if x < 256:  # operators are no letters
                hashes[word] = blend(hashes[word], letter) if inside else np.uint64(0)


@kernel
def learn(m, tree, nodes, count, leaf):
    """Learns from a scored id."""
    lanes, cells, table = m.lanes, m.cells, m.table
    contexts, group = len(m.contexts), -1
    for j in range(count):
        node = nodes[j]
        if tree.group[node] != group:
            group = tree.group[node]
            for c in range(contexts):  # new rows start with even counters
                row = m.row[group, c]
                table[row] = m.mark[group, c]
                if not m.met[group, c]:
                    table[row + 1 : row + LANES] = 1 << 31
        if tree.alike[node]:
            continue

        y = np.int64(leaf >= node)
        step = RATE * (y - m.mixed[j])
        for i in range(3):
            nudge(m.weights, m.sets[j, i], step, lanes, j * LANES)
        for c in range(contexts):
            m.trust[c, cells[j, c]] += step * lanes[j, 1 + c]
            place = m.row[group, c] + tree.place[node]
            n, p = np.int64(table[place]) & 1023, np.int64(table[place]) >> 10
            p = min(max(p + np.int64(((y << 22) - p) * STEPS[n]), 64), (1 << 22) - 64)
            table[place] = (p << 10) | min(n + 1, LIMIT)
        for r in range(len(RUNS)):
            cell = cells[j, contexts + r]
            if cell:
                hit = 0.999 if (m.now[1 + r] >= node) == y else 0.001
                m.hits[cell] += (hit - m.hits[cell]) * SLOW


@kernel
def mixer_score(m, tree, ids, hints, odds, nats):
    """nats (n,) of ids (n,), and learns them."""
    for k in range(len(ids)):
        t = k % BLOCK
        if t == 0:
            follow(m, ids[k : k + BLOCK])
        if t + AHEAD < BLOCK and k + AHEAD < len(ids):
            ask(m, tree, t + AHEAD, ids[k + AHEAD])
        nodes, leaf, count, p = tree.paths[ids[k]], tree.rank[ids[k]], 0, 1.0
        while count < len(nodes) and nodes[count]:
            count += 1
        decide(m, tree, t, nodes, count, odds[k], hints[k])
        for j in range(count):
            p *= m.mixed[j] if leaf >= nodes[j] else 1 - m.mixed[j]
        nats[k] = -math.log(p)
        learn(m, tree, nodes, count, leaf)


@kernel
def mixer_distribution(m, tree, hints, odds, p):
    """p (V,), ones, become the probabilities of leaves."""
    for first in range(0, len(tree.nodes), len(m.mixed)):
        nodes = tree.nodes[first : first + len(m.mixed)]
        decide(m, tree, 0, nodes, len(nodes), odds[first : first + len(nodes)], hints)
        for j in range(len(nodes)):
            node = nodes[j]
            for leaf in range(tree.low[node], tree.high[node]):
                p[leaf] *= m.mixed[j] if leaf >= node else 1 - m.mixed[j]


@kernel
def log_odds(logprobs, columns, sums, tree, nodes, out):
    """out (n, K): log odds at nodes (n, K), rows that end at a 0, of log-probabilities
    (n, V). columns (V, 16) fp32, sums (V + 1, 16) fp64: scratch."""
    for first in range(0, len(nodes), LANES):
        for i in range(0, len(columns), LANES):
            transpose(logprobs, first, min(i, len(columns) - LANES), columns)
        run_up(columns, tree.order, sums)
        for r in range(min(LANES, len(nodes) - first)):
            for k in range(nodes.shape[1]):
                node = nodes[first + r, k]
                if node == 0:
                    break
                left = sums[node, r] - sums[tree.low[node], r]
                right = sums[tree.high[node], r] - sums[node, r]
                out[first + r, k] = math.log(right / left)


class Mixture:
    """The network's distributions mixed with statistics of the scored text.

    `distil` keeps few numbers of a rank's log-probabilities; `score` books them on one rank, in
    order. A decoder asks `distribution`, then calls `push`. 512 bytes * 2^MIX_ROWS + 46 MB."""

    def __init__(self, args: Hyperparameters):
        if njit is None:
            raise UserError("PPM_WEIGHT=1 needs numba: install it or set PPM_WEIGHT=0")
        spelled, runs = spelling(args), len(RUNS)
        self.tree = vocabulary_tree(spelled)
        groups, levels = len(self.tree.above), self.tree.paths.shape[1]
        self.hint = np.zeros((1, 2 * runs), np.int64)
        slots, now = 1 << SLOTS, np.zeros(2 + 2 * runs, np.int64)
        self.text = Text(np.zeros(slots, np.uint16), now, np.zeros((runs, slots), np.int32))

        # 1, 3, PPM_ORDER bytes, the word, an id and two; of the whole stream two ids and the word
        word = args.ppm_order
        last, third = word - 1, min(3, word) - 1
        contexts = [(0, 1), (third, 1), (last, 1), (word, 1), (word + 1, 1), (word + 2, 1),
                    (word + 2, 0), (word, 0)]
        n, rows, size = len(contexts), 1 << args.mix_rows, len(spelled)
        weights = np.zeros((32 + size, LANES), np.float32)
        weights[:16, 0] = 1  # it begins as only the network
        table = np.zeros(n * rows * LANES + LANES, np.uint32)
        first = -(table.ctypes.data >> 2) % LANES  # of a cache line
        self.mixer = Mixer(
            table[first : first + n * rows * LANES], np.array([(*pair, rows - 1) for pair in contexts]),
            np.zeros(word + 3, np.uint64), np.concatenate(spelled).astype(np.int64),
            np.cumsum([0, *map(len, spelled)]), np.zeros(1 + runs, np.int64), weights.ravel(),
            np.zeros((n, 128), np.float32), np.full(runs * (LONGEST + 1) * 16, 0.75),
            np.zeros((BLOCK + 1, n + 1), np.uint64), np.zeros((groups, n), np.int64),
            np.zeros((groups, n), np.uint32), np.zeros((groups, n), np.uint8),
            np.zeros((levels, LANES)), np.zeros((levels, n + runs), np.int64),
            np.zeros((levels, 3), np.uint64), np.zeros(levels))
        self.scratch = np.zeros((size, LANES), np.float32), np.zeros((size + 1, LANES))

    def odds(self, logprobs: Tensor, nodes: np.ndarray) -> Tensor:
        """The network's log odds at nodes (n, K), of log-probabilities (n, V): fp64, CPU."""
        if logprobs.device.type != "cuda" and logprobs.size(1) >= LANES:
            out = np.zeros(nodes.shape)
            log_odds(logprobs.float().cpu().contiguous().numpy(), *self.scratch, self.tree, nodes, out)
            return torch.from_numpy(out)

        places = *self.tree[:3], nodes
        order, low, high, nodes = (torch.from_numpy(x).to(logprobs.device).long() for x in places)
        probs = logprobs.exp().clamp(min=TINY).index_select(1, order)
        sums = F.pad(probs.cumsum(1, dtype=torch.float64), (1, 0)).expand(3, -1, -1)
        edges = torch.stack((low[nodes], nodes, high[nodes]))  # (3, n, K)
        return sums.gather(2, edges).diff(dim=0).clamp(min=TINY).log().diff(dim=0)[0].cpu()

    def read(self, ids: np.ndarray, first: int, stop: int, blocks) -> list[tuple]:
        """Blocks (begin, end, log-probabilities (n, V), ...) of targets first ... stop - 1,
        in any order -> [(begin, end, `distil` of them)]. Every rank calls it for all
        targets, in order: proposals are made of all ids."""
        hints = propose(self.text, ids[first:stop].astype(np.int64))
        return [(begin, end, self.distil(ids, begin, end, logprobs, hints[begin - first : end - first]))
                for begin, end, logprobs, *_ in blocks]

    def distil(self, ids: np.ndarray, first: int, stop: int, logprobs: Tensor,
               hints: np.ndarray) -> np.ndarray:
        """Log-probabilities (n, V) of targets first ... stop - 1, and their hints -> fp64 (n, [own;
        hints; log odds above the id])."""
        ids = ids[first + 1 : stop + 1].astype(np.int64)
        own = logprobs.gather(1, torch.from_numpy(ids[:, None]).to(logprobs.device)).cpu().double()
        return torch.cat((own, torch.from_numpy(hints), self.odds(logprobs, self.tree.paths[ids])), 1).numpy()

    def score(self, ids: np.ndarray, values: np.ndarray) -> np.ndarray:
        """fp64 nats (n,) of ids (n,); learns them."""
        (_, hints, odds), nats = np.split(values, (1, 1 + 2 * len(RUNS)), 1), np.zeros(len(ids))
        mixer_score(self.mixer, self.tree, *(x.astype(np.int64) for x in (ids, hints)), odds, nats)
        return nats

    def distribution(self, logprobs: np.ndarray, hints: np.ndarray | None = None) -> np.ndarray:
        """fp64 log-probabilities (V,) of the next id, given the network's, fp32, and the hints
        (1, 2 * runs) of its place, if not the newest. Changes nothing."""
        hints = self.hint if hints is None else hints.astype(np.int64)
        odds = self.odds(torch.from_numpy(logprobs[None]), self.tree.nodes[None])[0]
        follow(self.mixer, np.zeros(0, np.int64))
        out = np.ones(len(logprobs))
        mixer_distribution(self.mixer, self.tree, hints[0], odds.numpy(), out)
        return np.log(out)[self.tree.rank]

    def push(self, token: int, logprobs: np.ndarray | None) -> None:
        """Learns the next id, given the network's view of it: None for the first."""
        ids = np.array([token])
        if logprobs is not None:
            row = torch.from_numpy(logprobs[None])
            self.score(ids, self.distil(ids.repeat(2), 0, 1, row, self.hint))
        self.hint = propose(self.text, ids)


class WindowPlan(namedtuple("WindowPlan", "length stride batch rank ranks", defaults=(0, 1))):
    """How a text is read: windows of `length` ids for `stride` targets each, `batch` a forward."""

    def tensors(self, ids: np.ndarray, rows: np.ndarray, device: torch.device) -> list[Tensor]:
        """Inputs (batch, length), first scored positions (batch,), targets (batch, stride): one
        shape, whatever the text."""
        inputs = np.full((self.batch, self.length), PAD_ID, np.int64)
        position = np.zeros(self.batch, np.int64)
        targets = np.zeros((self.batch, self.stride), np.int64)
        for i, (start, first, stop) in enumerate(rows):
            text = ids[start : min(start + self.length, len(ids) - 1)]
            inputs[i, : len(text)] = text
            position[i] = first - start
            targets[i, : stop - first] = ids[first + 1 : stop + 1]
        return [torch.from_numpy(x).to(device) for x in (inputs, position, targets)]


@torch.no_grad()
def scored(model: GPT, ids: np.ndarray, plan: WindowPlan,
           learner: TestTimeTraining | None = None, gather=None):
    """Yields (first, stop, fp32 log-probabilities (n, V), nats (n,)) of each block of n targets.

    The only path from weights to a score. `gather`, of (first, stop, this rank's blocks of
    the targets between), yields instead: on rank 0 all blocks, in order."""
    if len(ids) < 2:
        return
    if learner is not None:
        yield from learner.by_document(ids, plan, gather)
        return

    device = next(model.parameters()).device
    rows = windows(len(ids) - 1, plan.length, plan.stride)
    size = plan.batch * plan.ranks
    for turn in np.split(rows, range(size, len(rows), size)):  # ranks meet in `gather`
        batch = turn[plan.rank * plan.batch :][: plan.batch]
        inputs, position, targets = plan.tensors(ids, batch, device)
        logprobs = model.logits(inputs, position, targets.size(1)).log_softmax(-1)
        nats = -logprobs.gather(-1, targets[..., None]).squeeze(-1)
        nats = nats.cpu().numpy().astype(np.float64)
        blocks = [(a, b, logprobs[i, : b - a], nats[i, : b - a]) for i, (_, a, b) in enumerate(batch)]
        yield from gather(turn[0, 1], turn[-1, 2], blocks) if gather else blocks


class Adapters:
    """LoRA (Hu et al. 2022): W + alpha / rank B A, a set for each of some documents. All begin with
    the same A and B = 0 and learn by AdamW with betas 0 and 0.999."""

    OWNERS = ("attn.proj", "mlp.fc", "mlp.proj", "tok_emb")

    def __init__(self, model: GPT, documents: int):
        self.args = model.args
        named = model.named_modules()
        self.owners = [module for name, module in named if name.endswith(self.OWNERS)]
        generator = torch.Generator().manual_seed(0)
        rank, self.params = self.args.ttt_lora_rank, []
        for owner in self.owners:
            (size_out, size_in), device = owner.weight.shape, owner.weight.device
            a = torch.randn(rank, size_in, generator=generator).to(device) / size_in**0.5
            b = torch.zeros(documents, size_out, rank, device=device)
            self.params += [a.repeat(documents, 1, 1), b]
        self.squares, self.steps = [torch.zeros_like(p) for p in self.params], 0

    def attach(self, documents: int) -> list[Tensor]:
        """Reads the first `documents` rows through adapters -> the parameters."""
        params = [p[:documents].detach().requires_grad_() for p in self.params]
        scale = self.args.ttt_lora_alpha / self.args.ttt_lora_rank
        for owner, a, b in zip(self.owners, params[::2], params[1::2]):
            owner.adapter = scale * a, b
        return params

    def detach(self) -> None:
        for owner in self.owners:
            del owner.adapter

    @torch.no_grad()
    def learn(self, nats: Tensor, params: list[Tensor]) -> None:
        """A step from nats, summed over documents; `params` as of `attach`."""
        self.steps += 1
        rate, grads = self.args.ttt_lora_lr, torch.autograd.grad(nats, params)
        count = len(grads[0])  # of documents
        parts, squares = ([x[:count] for x in kept] for kept in (self.params, self.squares))
        torch._foreach_lerp_(squares, torch._foreach_mul(grads, grads), 1 - 0.999)
        torch._foreach_mul_(parts, 1 - rate * self.args.ttt_lora_wd)
        roots = torch._foreach_div(squares, 1 - 0.999**self.steps)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, 1e-8)
        torch._foreach_addcdiv_(parts, grads, roots, -rate)


@check
def check_documents(args: Hyperparameters) -> None:
    wide = args.ttt != "0" and args.ttt_doc_chunk > args.eval_seq_len
    forbid(wide, args, "ttt_doc_chunk eval_seq_len", "a window must hold the chunk")


class TestTimeTraining:
    """Adapters of a document: they learn once TTT_DOC_CHUNK targets are scored (#1530).

    A document is scored only from its own ids, so documents may come in any order; but a
    mixture reads the text in its own. So neighbouring documents make a group; without a
    mixture, all of them do. Ranks take turns at its documents, the longest first; those
    of about one length share a batch. A group is handed on once it is scored."""

    GROUP = 4  # batches
    GROUP_OF_GPUS = 64  # one document takes them as long as many

    def __init__(self, model: GPT, tell=lambda read: None):
        self.model, self.args = model, model.args
        self.tell = tell  # of targets that are read
        self.read, self.updates = 0, 0

    def by_document(self, ids: np.ndarray, plan: WindowPlan, gather=None):
        """`scored` by document; a target belongs to the document of the id before it."""
        starts = np.union1d([0], np.flatnonzero(ids[:-1] == BOS_ID))
        spans = np.stack((starts, np.append(starts[1:], len(ids) - 1)), 1)
        count = self.GROUP_OF_GPUS if self.model.tok_emb.weight.is_cuda else self.GROUP
        size = count * plan.batch * plan.ranks if gather else len(spans)
        for group in np.split(spans, range(size, len(spans), size)):
            longest = group[np.argsort(group[:, 0] - group[:, 1], kind="stable")]
            mine = longest[plan.rank :: plan.ranks]
            batches = np.split(mine, range(plan.batch, len(mine), plan.batch))
            blocks = (block for batch in batches if len(batch)
                      for block in self.adapt(ids, batch, plan.length))
            yield from gather(group[0, 0], group[-1, 1], blocks) if gather else blocks

    def adapt(self, ids: np.ndarray, group: np.ndarray, length: int):
        """Scores documents; their adapters learn between chunks."""
        adapters, size = Adapters(self.model, len(group)), self.args.ttt_doc_chunk
        for done in range(0, group[0, 1] - group[0, 0], size):
            alive = group[group[:, 1] - group[:, 0] > done]
            logprobs, nats = self.adapt_chunk(adapters, ids, alive, done, length)
            nats = nats.cpu().numpy().astype(np.float64)
            self.read += int((alive[:, 1] - alive[:, 0] - done).clip(0, size).sum())
            self.tell(self.read)
            for i, (start, end) in enumerate(alive):
                first, stop = start + done, min(start + done + size, end)
                yield first, stop, logprobs[i, : stop - first], nats[i, : stop - first]

    def adapt_chunk(self, adapters: Adapters, ids: np.ndarray, alive: np.ndarray, done: int,
                    length: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n, size, V) of n documents' targets from `done` on, and nats.
        Documents that go on learn from these."""
        size, device = self.args.ttt_doc_chunk, self.model.tok_emb.weight.device
        begin = max(done + size - length, 0)
        rows = np.full((len(alive), done + size - begin), PAD_ID, np.int64)
        goals = np.zeros((len(alive), size), np.int64)
        for i, (start, end) in enumerate(alive):
            text = ids[start + begin : min(start + done + size, end) + 1]
            rows[i, : len(text) - 1] = text[:-1]
            goals[i, : len(text) - 1 - done + begin] = text[done - begin + 1 :]

        goes_on = (alive[:, 1] - alive[:, 0] > done + size) & self.args.ttt_adapt
        learners = int(goes_on.sum())
        rows, goals, goes_on = (torch.from_numpy(x).to(device) for x in (rows, goals, goes_on))
        compiled, piece.compiled = piece.compiled, False  # shapes of its own
        with torch.set_grad_enabled(learners > 0):
            params = adapters.attach(len(alive))
            x = self.model.hidden(rows, self.model.rotary_eval)
            logprobs = self.model.head(x[:, done - begin :].float()).log_softmax(-1)
            nats = -logprobs.gather(-1, goals[..., None]).squeeze(-1)
            if learners:
                adapters.learn((nats.mean(1) * goes_on).sum(), params)
                self.updates += learners
        piece.compiled = compiled
        adapters.detach()
        return logprobs.detach(), nats.detach()


def score(model: GPT, ids, positions=()) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """(nats of ids[1:], {t: log-probabilities (V,) of target t, for t in `positions`})."""
    args, ids, wanted = model.args, np.asarray(ids), sorted(map(int, set(positions)))
    blocks = -(-len(ids) // args.eval_stride)  # a short text needs no full batch
    batch = max(1, min(args.eval_batch_tokens // args.eval_seq_len, blocks))
    plan = WindowPlan(args.eval_seq_len, args.eval_stride, batch)
    mixture = Mixture(args) if args.ppm_weight else None
    learner = TestTimeTraining(model) if args.ttt != "0" else None
    nats, vectors = np.zeros(max(len(ids) - 1, 0)), {}

    def noted(blocks):
        for first, stop, logprobs, part in blocks:
            nats[first:stop] = part
            here = [t for t in wanted if first <= t < stop]
            vectors.update({t: logprobs[t - first].cpu().numpy() for t in here})
            yield first, stop, logprobs

    def gather(first: int, stop: int, blocks):
        return sorted(mixture.read(ids, first, stop, noted(blocks)), key=lambda x: x[0])

    if mixture is None:
        deque(noted(scored(model, ids, plan, learner)), maxlen=0)
        return nats, vectors
    for first, stop, values in scored(model, ids, plan, learner, gather):
        here, done = [t for t in wanted if first <= t < stop], first
        for t in [*here, stop]:  # learns up to t, then tells
            known = values[done - first : t - first]
            nats[done:t] = mixture.score(ids[done + 1 : t + 1], known)
            if t < stop:
                hints = values[t - first, None, 1 : 1 + 2 * len(RUNS)]
                vectors[t] = mixture.distribution(vectors[t], hints)
            done = t
    return nats, vectors


def try_scoring(model: GPT, runtime: Runtime) -> None:
    """Meets every shape of a score once, on made-up ids and without a collective."""
    args, length = model.args, model.args.eval_seq_len
    for stride in sorted({length, args.eval_stride}):
        plan = WindowPlan(length, stride, max(1, args.eval_batch_tokens // length))
        list(scored(model, np.full(2, BOS_ID), plan))


PROGRESS_SECONDS = 15  # between lines about a pass under way


class Evaluator:
    """Scores models on the validation text; a pass ends as a line of the log."""

    def __init__(self, args: Hyperparameters, data: Dataset, runtime: Runtime, log: Log):
        self.args, self.runtime, self.log = args, runtime, log
        self.classes = class_table(args.vocab_size)
        self.results = {}

        ids = data.val
        if data.val_sizes is None and args.tokenizer_path:
            tokenizer = open_tokenizer(args)
            if tokenizer.id_to_piece(tokenizer.piece_to_id(OPERATORS[0])) == OPERATORS[0]:
                raise UserError(f"{data.val_files[0]}: CaseOps text, no sidecar")
        tables = byte_tables(args) if data.val_sizes is None else None
        sizes = target_bytes(ids, tables) if tables else data.val_sizes[1:]
        self.prefix = args.val_bytes if args.val_bytes < sizes.sum() else 0
        if self.prefix:
            targets = int(np.searchsorted(np.cumsum(sizes), args.val_bytes)) + 1
            ids, sizes = ids[: targets + 1], sizes[:targets]
        self.ids, self.sizes, self.bytes = ids, sizes, int(sizes.sum())
        if not self.bytes:
            raise UserError(f"{data.val_files[0]}: its targets stand for no byte")
        if args.ppm_weight:
            Mixture(args)  # refuses in time

    def describe(self, manifest: dict) -> str:
        original = manifest.get("val_bytes") or self.bytes
        note = f" prefix:{self.prefix}" if self.prefix else ""
        if original != self.bytes and not self.prefix:
            note = f" (original text {original}: normalised; these bytes divide)"
        return f"val: targets:{len(self.ids) - 1} bytes:{self.bytes}{note}"

    def gather(self, mixture: Mixture, first: int, stop: int, blocks):
        """Rank 0: (first, stop, `distil`, nats) of all ranks' blocks, in order."""
        runtime, mine = self.runtime, mixture.read(self.ids, first, stop, blocks)
        found = [mine] * runtime.world_size if runtime.main else None
        if runtime.world_size > 1:
            dist.gather_object(mine, found)
        for first, stop, values in sorted(sum(found or [], []), key=lambda x: x[0]):
            yield first, stop, values, -values[:, 0]

    def run(self, name: str, model: GPT, length: int, stride: int, learn: bool = False,
            mix: bool = False) -> dict:
        """val_bpb = nats / ln 2 / bytes: special ids cost nats and add no byte."""
        args, runtime, began = self.args, self.runtime, time.perf_counter()
        classes = len(BYTE_CLASSES)
        names, mixing, gather = [name], 0.0, None
        if mix:
            mixture = Mixture(args)
            names += [f"{name}_mix"]
            gather = functools.partial(self.gather, mixture)
        sums = torch.zeros(len(names), classes + 1, dtype=torch.float64)
        targets, shown = len(self.ids) - 1, began

        def tell(read: int) -> None:
            nonlocal shown
            if (now := time.perf_counter()) - shown > PROGRESS_SECONDS:
                shown, known = now, sums[0, -1]
                loss = f"loss:{sums[0, :-1].sum() / known:.4f}" if known else ""
                self.log(f"  {name} {read / targets:.0%} {now - began:.0f}s {loss}")

        ranks = runtime.world_size
        learner = TestTimeTraining(model, lambda read: tell(ranks * read)) if learn else None
        batch = max(1, args.eval_batch_tokens // length)
        plan = WindowPlan(length, stride, batch, runtime.rank, ranks)
        for first, stop, values, nats in scored(model, self.ids, plan, learner, gather):
            found, parts = self.classes[self.ids[first + 1 : stop + 1]], [nats]
            if mix:
                mixing -= time.perf_counter()
                parts += [mixture.score(self.ids[first + 1 : stop + 1], values)]
                mixing += time.perf_counter()
            for row, part in zip(sums, parts):
                row[:-1] += torch.from_numpy(np.bincount(found, part, minlength=classes))
                row[-1] += stop - first
            if learner is None:
                tell(int(sums[0, -1]) * (1 if mix else ranks))

        sums, seconds = runtime.all_reduce(sums), time.perf_counter() - began
        for label, row in zip(names, sums):
            self.results[label] = self.result(label, row, length, stride, seconds)

        if mix:
            self.results[names[-1]] |= {"mixture": "binary", "mix_seconds": mixing}
        if learner is not None:
            found = runtime.all_reduce(torch.tensor(learner.updates))
            self.results[name]["updates"] = int(found)
        return self.results[name]

    def result(self, name: str, sums: Tensor, length: int, stride: int, seconds: float) -> dict:
        targets = len(self.ids) - 1
        assert int(sums[-1]) == targets, f"{name}: scored {int(sums[-1])} targets of {targets}"
        nats = float(sums[:-1].sum())
        by_class = zip(BYTE_CLASSES, sums.tolist())
        bits = {label: total / math.log(2) for label, total in by_class if total}
        result = {"val_loss": nats / targets, "val_bpb": nats / math.log(2) / self.bytes,
                  "targets": targets, "bytes": self.bytes, "seconds": seconds,
                  "seq_len": length, "stride": stride, "bits_by_class": bits}
        return result | ({"prefix_bytes": self.prefix} if self.prefix else {})

    def report(self, name: str, model: GPT, stride: int | None = None, learn: bool = False) -> dict:
        """Runs a pass, prints its lines; without a stride windows do not overlap."""
        length = self.args.eval_seq_len
        mix = stride is not None and self.args.ppm_weight > 0
        self.run(name, model, length, stride or length, learn, mix)
        extra = f" stride:{stride}" if stride else ""
        extra += f" prefix:{self.prefix}" if self.prefix else ""
        for label in (name, f"{name}_mix")[: 1 + mix]:
            result = self.results[label]
            loss, bpb = result["val_loss"], result["val_bpb"]
            self.log(f"{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f}{extra} "
                     f"targets:{result['targets']} bytes:{result['bytes']} "
                     f"eval_time:{1e3 * result['seconds']:.0f}ms")
            self.log(f"{label}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
        return self.results[name]


# -----------------------------------------------------------------------------
# GENERATION
# -----------------------------------------------------------------------------


class Stream:
    """The scorer, one id at a time, for a decoder to follow: it reads the same windows as `score`,
    learns after the same chunks, and keeps keys and values of the window at hand."""

    def __init__(self, model: GPT):
        self.model = model
        self.ids = []
        self.learner = TestTimeTraining(model) if model.args.ttt != "0" else None
        self.adapters, self.origin = None, 0  # of a document, and its begin
        self.block, self.start = (0, -1), 0  # (origin, number) of a window
        self.past, self.known = None, None  # `known`: log-probabilities of the next id
        self.mixture = Mixture(model.args) if model.args.ppm_weight else None

    def logprobs(self) -> np.ndarray:
        """fp32, or a mixture's fp64, log-probabilities (V,) of the next id."""
        logprobs = self.network()
        return self.mixture.distribution(logprobs) if self.mixture else logprobs

    @torch.no_grad()
    def network(self) -> np.ndarray:
        """The network's part, fp32."""
        if not self.ids:
            raise ValueError("push the first id (BOS) before asking for the second")
        if self.known is not None:
            return self.known
        args, device = self.model.args, self.model.tok_emb.weight.device
        stride = args.ttt_doc_chunk if self.learner else args.eval_stride
        block = (len(self.ids) - 1 - self.origin) // stride
        if (self.origin, block) != self.block:
            if self.learner:
                self.learn(block)
            self.block, self.past = (self.origin, block), KVCache(self.model)
            self.start = self.origin + max((block + 1) * stride - args.eval_seq_len, 0)

        if self.adapters:
            self.adapters.attach(1)
        ids = torch.tensor([self.ids[self.start :]], device=device)
        x = self.model.hidden(ids, self.model.rotary_eval, past=self.past)
        self.known = self.model.head(x[:, -1:].float())[0, 0].log_softmax(-1).cpu().numpy()
        if self.adapters:
            self.adapters.detach()
        return self.known

    def learn(self, block: int) -> None:
        """Learns as the scorer has before this block, asked for or not."""
        ids, args, (origin, last) = np.array(self.ids), self.model.args, self.block
        fresh = last < 0 or origin != self.origin  # a document begins
        self.adapters = Adapters(self.model, 1) if fresh else self.adapters
        span = np.array([[self.origin, len(ids)]])
        for done in args.ttt_doc_chunk * np.arange(0 if fresh else last, block):
            self.learner.adapt_chunk(self.adapters, ids, span, done, args.eval_seq_len)

    def push(self, token: int) -> None:
        if self.mixture:  # it learns from the network's view
            self.mixture.push(int(token), self.network() if self.ids else None)
        if self.learner and token == BOS_ID:
            self.origin = len(self.ids)
        self.ids.append(int(token))
        self.known = None


stream = Stream  # the family's name for it


# -----------------------------------------------------------------------------
# TRAINING
# -----------------------------------------------------------------------------


class Stopped(Exception):
    """SIGTERM or Ctrl-C: a checkpoint is written, a message tells how to go on."""


def run_folder(args: Hyperparameters) -> Path:
    return Path(args.runs_path) / args.run_id


class Trainer:
    """All that a checkpoint holds, and one step of training."""

    CHECKPOINTED = ("step", "seconds", "best", "loader_state", "text")

    def __init__(self, args: Hyperparameters, data: Dataset, runtime: Runtime, log: Log):
        self.args, self.data, self.runtime, self.log = args, data, runtime, log
        self.plan = BatchPlan.make(args, runtime.world_size)
        torch.manual_seed(args.seed)
        self.model = GPT(args, runtime.attention, runtime.dtype)
        self.model.init_weights(args.seed)
        self.model.to(runtime.device)

        self.loader_state, self.text = None, data and data.fingerprint()["sha256"]
        self.signal = 0
        self.step, self.seconds, self.best = 0, 0.0, math.inf  # resumed runs included
        self.slowest = 0.0  # seconds of the slowest step, slowly forgotten
        self.reserve = 0.0  # seconds that calibration will take of the training clock
        self.unwritten = []  # steps whose losses are still on the device
        self.fresh_optimizers()

    def fresh_optimizers(self) -> None:
        self.optimizers = Optimizers(self.model, self.args, self.runtime)
        self.ema = EMA(self.model, self.args.ema_decay)

    def micro_step(self, ids: Tensor, weights: Tensor, updates: int) -> dict:
        """Forward and backward; gradients add up to those of the mean over an update's rows."""
        sums = self.model.losses(ids, weights)
        loss = sums["ce"] * updates / (self.plan.rows * self.args.train_seq_len)
        loss.backward()
        return {name: value.detach() for name, value in sums.items()}

    def train_step(self, ids: Tensor, weights: Tensor, progress: float) -> dict:
        """The updates of one global batch -> {term: this rank's sum}."""
        updates, parts = updates_at(progress, self.args), []
        for batches in zip(ids.chunk(updates), weights.chunk(updates)):
            parts += [self.micro_step(*batch, updates) for batch in zip(*batches)]
            norm = self.optimizers.reduce()
            self.optimizers.step(self.step, progress, norm)
            self.model.zero_grad()
        self.ema.update(self.step)
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def warm_up(self) -> None:
        """Compiles every shape on made-up ids, then puts all back bit for bit."""
        args, runtime = self.args, self.runtime
        kept = [p.detach().clone() for p in self.model.parameters()]
        shape = (self.plan.micro_steps, self.plan.groups * self.plan.group, args.train_seq_len + 1)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(BYTE_OFFSET, args.vocab_size, shape, generator=generator)
        batch = ids.to(runtime.device), torch.ones(shape[:2], device=runtime.device)

        if runtime.compile:
            runtime.compile_by(lambda: self.try_shapes(*batch), self.log)
        for _ in range(args.warmup_steps):
            self.model.zero_grad()
            self.train_step(*batch, 0.0)
        if args.quant_round == "gptq" and args.max_wallclock_seconds:
            for _ in range(2):  # the second time counts
                start = time.perf_counter()
                self.moments(1)
                seconds = 1.25 * args.gptq_batches * (time.perf_counter() - start)
            self.reserve, = runtime.from_main([seconds])
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), kept)
        self.model.zero_grad()
        self.fresh_optimizers()

    def try_shapes(self, ids: Tensor, weights: Tensor) -> None:
        """Meets every shape of a step and of a score, without a collective."""
        self.model.losses(ids[0], weights[0])["ce"].backward()
        try_scoring(self.model, self.runtime)

    @torch.no_grad()
    def input_moments(self, batch: Tensor, real: Tensor, sums: dict) -> dict[str, Tensor]:
        """Adds X^T X of every matrix's inputs to `sums` {name: (C, C)}, of `real` rows."""
        def add(names: list[str], _, inputs: tuple) -> None:
            x = inputs[0].flatten(0, -2)  # a pack is one row of it
            x = (x * rows.repeat_interleave(len(x) // len(rows))[:, None]).float()
            product = x.T @ x
            for name in names:
                sums[name] = sums.get(name, 0) + product

        readers = {CastedLinear: ("",), CausalSelfAttention: ("c_q.", "c_k.", "c_v.")}
        hooks = []
        for path, module in self.model.named_modules():
            if names := [f"{path}.{part}weight" for part in readers.get(type(module), ())]:
                hooks.append(module.register_forward_pre_hook(functools.partial(add, names)))
        compiled, piece.compiled = piece.compiled, False  # a graph would not call the hooks
        for ids, rows in zip(batch, real):
            add(["tok_emb.weight"], None, (self.model.read(ids[:, :-1]),))
        piece.compiled = compiled
        for hook in hooks:
            hook.remove()
        return sums

    def moments(self, batches: int) -> dict[str, np.ndarray]:
        """`input_moments` of the next `batches` training batches, of all ranks."""
        loader = Loader(self.data, self.args, self.plan, self.runtime.rank, self.loader_state)
        sums, device = {}, self.runtime.device
        for _ in range(batches):
            ids, weights, _ = loader.next()
            self.input_moments(ids.to(device), weights.to(device) > 0, sums)
        for total in sums.values():  # means over all inputs
            total /= batches * self.args.train_batch_tokens
        return {name: self.runtime.all_reduce(total).cpu().numpy() for name, total in sums.items()}

    def calibrate(self) -> dict[str, np.ndarray]:
        """Hessians for GPTQ, on the training clock; none where inputs overflow."""
        start = time.perf_counter()
        found = self.moments(self.args.gptq_batches)
        self.seconds, = self.runtime.from_main([self.seconds + time.perf_counter() - start])
        for name in list(found):
            if not np.isfinite(found[name]).all():
                self.log(f"warning: {name}: inputs are not finite, rounded to the nearest")
                del found[name]
        return found

    def progress(self) -> float:
        """Share of the run that is done, of its steps or seconds. Time for calibration and three
        steps as slow as the slowest late one stays unused: nothing may end after the limit."""
        done = self.step / self.args.iterations
        if self.args.max_wallclock_seconds:
            usable = self.args.max_wallclock_seconds - 3 * self.slowest - self.reserve
            done = max(done, self.seconds / max(usable, 1e-9))
        return min(1.0, done)

    def agree_on_time(self, now: float) -> None:
        """Takes the latest clock and any rank's signal; all stop at the same step."""
        slowest = max(now - self.seconds, 0.99 * self.slowest)
        mine = torch.tensor([now, slowest, self.signal], dtype=torch.float64)
        self.seconds, self.slowest, stop = self.runtime.all_reduce(mine, dist.ReduceOp.MAX).tolist()
        if stop:
            self.write_steps()
            raise Stopped(int(stop))

    def run(self, evaluator: Evaluator) -> None:
        """Trains until progress is 1 or a signal comes. The clock runs here, but for validation."""
        args, runtime = self.args, self.runtime
        weights = [p.sum().item() for p in self.model.parameters()]
        runtime.agree("weights or another step", [self.step, *weights])
        loader = Loader(self.data, args, self.plan, runtime.rank, self.loader_state)
        first_bad = torch.full((), 2**31 - 1, device=runtime.device)  # step of a non-finite loss
        fences = deque()
        started = time.perf_counter() - self.seconds

        def due(every: int) -> bool:
            return every > 0 and self.step % every == 0

        with contextlib.closing(loader.prefetch(runtime.device)) as batches:
            while True:
                self.agree_on_time(time.perf_counter() - started)
                if (progress := self.progress()) >= 1.0:
                    break
                ids, weights, state = next(batches)
                terms = self.train_step(ids, weights, progress)
                self.step, self.loader_state = self.step + 1, state
                bad = first_bad.clamp(max=self.step)
                first_bad = torch.where(terms["ce"].isfinite(), first_bad, bad)
                if runtime.device.type == "cuda":  # at most two steps ahead
                    fences.append(torch.cuda.current_stream().record_event())
                    if len(fences) > 2:
                        fences.popleft().synchronize()

                edge = self.step <= 10 or self.step == args.iterations
                shown = edge or due(args.train_log_every)
                if shown or due(max(1, args.iterations // 400)):  # a smooth curve
                    now = time.perf_counter() - started
                    self.unwritten.append((self.step, now, progress, terms))
                if shown or due(args.checkpoint_every) or due(args.val_loss_every):
                    self.refuse_non_finite(first_bad)
                if shown:
                    self.log_step(self.write_steps())
                if due(args.checkpoint_every) and progress < 0.97:  # later, "final" is near
                    self.seconds = time.perf_counter() - started
                    self.save("last")
                if due(args.val_loss_every) and self.step < args.iterations:
                    self.seconds = time.perf_counter() - started
                    self.validate(evaluator)
                    started = time.perf_counter() - self.seconds
        self.refuse_non_finite(first_bad)  # waits for the device
        self.seconds, = runtime.from_main([time.perf_counter() - started])
        runtime.clocks["training"] = self.seconds
        self.write_steps()

    def refuse_non_finite(self, first_bad: Tensor) -> None:
        step = int(self.runtime.all_reduce(first_bad.clone(), dist.ReduceOp.MIN))
        if step <= self.step:
            raise self.not_finite(step, "the loss")

    def not_finite(self, step: int, what: str) -> UserError:
        last = run_folder(self.args) / "last.safetensors"
        good = last if last.exists() else "none"
        return UserError(f"step {step}: {what} is not finite; the last good checkpoint: {good}")

    def timing(self, seconds: float) -> str:
        average = 1e3 * seconds / max(self.step, 1)
        return f"train_time:{1e3 * seconds:.0f}ms step_avg:{average:.2f}ms"

    def write_steps(self) -> dict:
        """Writes waiting steps to `metrics.jsonl`, one sum over ranks -> the newest."""
        if not self.unwritten:
            return {}
        parts = [terms[name].float() for *_, terms in self.unwritten for name in sorted(terms)]
        values = deque(self.runtime.all_reduce(torch.stack(parts)).tolist())
        for step, seconds, progress, terms in self.unwritten:
            sums = {name: values.popleft() for name in sorted(terms)}
            line = {"step": step, **self.means(sums), "train_seconds": seconds,
                    "progress": progress, "rate": rate_at(progress, self.args)}
            self.log.metrics(**line)
        self.unwritten.clear()
        return line

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Terms of a step, summed over ranks -> what its line says."""
        return {"train_loss": sums["ce"] / (self.plan.rows * self.args.train_seq_len)}

    def log_step(self, line: dict) -> None:
        """Shows a line of `metrics.jsonl`."""
        told = ("step", "train_loss", "train_seconds", "progress", "rate")
        extra = [f" {name}:{value:.5f}" for name, value in line.items() if name not in told]
        self.log(f"step:{self.step}/{self.args.iterations} train_loss:{line['train_loss']:.4f} "
                 + self.timing(line["train_seconds"]) + "".join(extra))

    def validate(self, evaluator: Evaluator) -> None:
        """Scores the raw weights; the best so far are kept in `best.safetensors`."""
        with self.runtime.clock("validation"):
            length = self.args.eval_seq_len
            result = evaluator.run("raw", self.model, length, length)
        self.log_validation(result)
        if result["val_bpb"] < self.best:
            self.best = result["val_bpb"]
            self.save("best")

    def log_validation(self, result: dict) -> None:
        self.log(f"step:{self.step}/{self.args.iterations} val_loss:{result['val_loss']:.4f} "
                 f"val_bpb:{result['val_bpb']:.4f} {self.timing(self.seconds)}")
        self.log.metrics(step=self.step, val_loss=result["val_loss"], val_bpb=result["val_bpb"])

    def save(self, name: str) -> None:
        """All that a run needs to go on from here, in one file, atomically."""
        tensors = {f"model.{key}": p for key, p in self.model.named_parameters()}
        names = [key.replace("model", "ema", 1) for key in tensors]
        tensors |= dict(zip(names, self.ema.average))
        tensors |= self.optimizers.state()

        for key, value in tensors.items():  # a loss tells only of the weights before its step
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise self.not_finite(self.step, key)
        if self.runtime.main:
            meta = {key: getattr(self, key) for key in self.CHECKPOINTED}
            meta["config"] = self.args.learning() | self.args.shipped()
            tensors = {key: value.detach().cpu().contiguous().clone()
                       for key, value in tensors.items()}
            blob = safetensors_bytes(tensors, {"golf": json.dumps(meta)})
            write_atomic(run_folder(self.args) / f"{name}.safetensors", blob)
        self.runtime.all_reduce(torch.zeros(1))  # the others wait

    def _check_resumed(self, path: Path, meta: dict) -> None:
        """Refuses another model or text; tells what else is new."""
        args, before = self.args, meta["config"]
        model = {var.name for var in args.vars().values() if var.ship == "model"}
        for key, value in (args.learning() | args.shipped()).items():
            if (other := before.get(key, None if key in model else value)) != value:
                if key in model:
                    raise UserError(f"RESUME={path}: made with {key}={other}, not {value}")
                self.log(f"warning: resumed with {key}={value}, it was {other}")

        if meta.setdefault("text", self.text) != self.text:
            if args.resume_data != "changed":
                raise UserError(f"RESUME={path}: made with other text than {args.data_path}; "
                                "RESUME_DATA=changed reads this from its start")
            meta.update(text=self.text, loader_state=None)

    def restore(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {})["golf"])
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"RESUME={path}: not a checkpoint of this script ({error})") from None
        self._check_resumed(path, meta)
        with torch.no_grad():
            for (key, p), average in zip(self.model.named_parameters(), self.ema.average):
                p.copy_(state[f"model.{key}"])
                average.copy_(state[f"ema.{key}"])
        self.optimizers.load_state(state)
        for key in self.CHECKPOINTED:
            setattr(self, key, meta[key])
        self.log(f"resume:{path} step:{self.step} train_time:{1e3 * self.seconds:.0f}ms")


def git_commit() -> str:
    words = "git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--verify", "HEAD"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(words, capture_output=True, timeout=10)
        return done.stdout.decode().strip() or "unknown"
    return "unknown"


def log_header(log: Log, args: Hyperparameters, runtime: Runtime, fingerprint: dict) -> None:
    """Source, versions, settings and data: what ran."""
    log(Path(__file__).read_text(encoding="utf-8") + "=" * 100, console=False)
    for warning in args.warnings:
        log(f"warning: {warning}")
    log(f"python:{platform.python_version()} torch:{torch.__version__} numpy:{np.__version__} "
        f"commit:{git_commit()}")
    for line in [*runtime.notes, runtime.describe()]:
        log(line)
    log("settings " + json.dumps(args.settings()), console=False)
    log("data " + json.dumps(fingerprint))
    runtime.from_main([0.0])  # rank 0 has written by now
    if not (run_folder(args) / "log.txt").exists():
        raise UserError(f"RUNS_PATH={args.runs_path}: rank 0's log is not here; share the folder")


def run_until_done(trainer: Trainer, evaluator: Evaluator) -> None:
    """Trains from the start or a checkpoint; a signal leaves one and raises Stopped."""
    args = trainer.args
    last, final = (run_folder(args) / f"{name}.safetensors" for name in ("last", "final"))
    newest = max(last, final, key=lambda path: path.exists() and path.stat().st_mtime)
    if args.resume and (args.resume != "auto" or newest.exists()):
        trainer.restore(newest if args.resume == "auto" else Path(args.resume))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: setattr(trainer, "signal", received))
    try:
        trainer.run(evaluator)
    except Stopped as stopped:
        trainer.save("last")
        name = signal.Signals(stopped.args[0]).name
        trainer.log(f"stopped by {name} at step {trainer.step}; {last} is written, "
                    f"RUN_ID={args.run_id} RESUME=auto goes on from there")
        raise
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def write_artifact(trainer: Trainer) -> tuple[Path, int]:
    """(artifact.bin, how many numbers are in it)."""
    args, runtime = trainer.args, trainer.runtime
    with runtime.clock("calibration"):
        hessians = trainer.calibrate() if args.quant_round == "gptq" else {}
    with runtime.clock("compression"):
        tensors = {name: p.detach().cpu().numpy() for name, p in trainer.model.exported().items()}
        artifact = run_folder(args) / "artifact.bin"
        if runtime.main:
            write_atomic(artifact, pack(tensors, args, hessians))
        runtime.all_reduce(torch.zeros(1))  # the others wait
    shipped = sum(map(np.size, tensors.values()))
    trainer.log(f"artifact:{artifact} bytes:{artifact.stat().st_size} parameters:{shipped}")
    return artifact, shipped


def train(args: Hyperparameters, data: Dataset, runtime: Runtime, log: Log,
          evaluator: Evaluator) -> dict:
    """Training, scores of raw and averaged weights, the artifact -> entries of `metrics.json`."""
    trainer = Trainer(args, data, runtime, log)
    plan, params = trainer.plan, sum(p.numel() for p in trainer.model.parameters())
    log(f"model_params:{params} world_size:{runtime.world_size} micro_steps:{plan.micro_steps} "
        f"micro_batch_rows:{plan.groups * plan.group} seed:{args.seed}")
    # compile off the clock, then train
    with runtime.clock("warm-up"):
        trainer.warm_up()
    run_until_done(trainer, evaluator)
    # score the weights as they are, then their average
    with runtime.clock("validation"):
        trainer.save("final")
        trainer.log_validation(evaluator.report("final_raw", trainer.model))
    trainer.ema.apply()
    with runtime.clock("validation"):
        evaluator.report("final_ema", trainer.model)
    artifact, shipped = write_artifact(trainer)
    return {"artifact": str(artifact), "params": params, "params_shipped": shipped,
            "steps": trainer.step, "train_seconds": trainer.seconds,
            "ms_per_step": 1e3 * trainer.seconds / max(trainer.step, 1)}


def score_artifact(path: str, args: Hyperparameters, runtime: Runtime,
                   evaluator: Evaluator) -> None:
    """Reloads the artifact and prints the final lines."""
    with runtime.clock("evaluation"):
        model = load(path, runtime.device, args, runtime.dtype, runtime.attention)
    if runtime.compile:
        with runtime.clock("warm-up"):  # short after training, which left its graphs
            runtime.compile_by(lambda: try_scoring(model, runtime), evaluator.log)
    label = f"final_int{args.bits_by_class['mlp']}"
    with runtime.clock("evaluation"):
        evaluator.report(f"{label}_roundtrip", model)
        evaluator.report(f"{label}_sliding", model, args.eval_stride)
        if args.ttt != "0":
            name = f"{label}_ttt" if args.ttt_adapt else f"{label}_ttt_off"
            evaluator.report(name, model, args.eval_stride, learn=True)


def finish(args: Hyperparameters, runtime: Runtime, log: Log, evaluator: Evaluator,
           summary: dict) -> int:
    """Checks budgets, writes `metrics.json`, prints the closing block -> exit code."""
    headline = list(evaluator.results)[-1]
    code = len(Path(__file__).read_bytes())
    total = code + os.path.getsize(summary["artifact"])
    summary = {"train_seconds": 0.0, "eval_seconds": runtime.clocks["evaluation"]} | summary
    spent = {"artifact_budget_bytes": total, "max_wallclock_seconds": summary["train_seconds"],
             "eval_budget_seconds": summary["eval_seconds"]}
    broken = [f"{name.upper()}={getattr(args, name)} is broken: {value:.3f}"
              for name, value in spent.items() if 0 < getattr(args, name) < value]
    # what the tables of READMEs are made of
    metrics = {
        "val_bpb": evaluator.results[headline]["val_bpb"], "headline": headline,
        "bytes_code": code, "bytes_model": total - code, "bytes_total": total, **summary,
        "peak_mem_mb": runtime.peak_memory_mb(), "seed": args.seed,
        "script_sha256": sha256_file(Path(__file__)), "git_commit": git_commit(),
        "device": runtime.device_name(), "world_size": runtime.world_size,
        "torch": torch.__version__, "clocks": runtime.clocks, "broken_budgets": broken,
        "evals": evaluator.results, "settings": args.settings(),
    }
    write_atomic(log.folder / "metrics.json", json.dumps(metrics, indent=1).encode())

    for key, value in metrics.items():
        if not isinstance(value, (dict, list)):
            log(f"{key}: {value}")
    for line in broken:
        log(f"budget: {line}")
    return 3 if broken else 0


def main() -> int:
    if {"--help", "-h"} & set(sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        print(Hyperparameters.help())
        return 0
    me = ""  # of several ranks, which one speaks
    try:
        if sys.argv[1:]:
            raise UserError(f"{sys.argv[1]!r}: settings are environment variables, see --help")
        args = Hyperparameters(os.environ)
        me = f"rank {args.rank}: " if args.world_size > 1 else ""
        if args.eval_only:
            header, _ = unpack(read_file(args.artifact, "ARTIFACT"), args.artifact)
            args = shipped_settings(header, args.artifact, os.environ)
        runtime = Runtime(args)
        runtime.attention = pick_attention(args, runtime)
        started, = runtime.from_main([time.time()])
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(started))
        args.run_id = args.run_id or f"{stamp}-seed{args.seed}"
        data = Dataset(args, verify=runtime.main)
        log = Log(run_folder(args) if runtime.main else None)
        fingerprint = data.fingerprint()
        same = {name: value for name, value in args.settings().items()
                if not re.search("PATH|RANK|MASTER|RUN_ID|ARTIFACT$", name)}
        runtime.agree("settings or text", [same, fingerprint["sha256"]])
        ThreadPoolExecutor(1).submit(runtime.watch_ranks, args)
        log_header(log, args, runtime, fingerprint)
        evaluator = Evaluator(args, data, runtime, log)
        log(evaluator.describe(data.manifest))

        summary = {"artifact": args.artifact, "dataset": fingerprint}
        if not args.eval_only:
            summary |= train(args, data, runtime, log, evaluator)
        score_artifact(summary["artifact"], args, runtime, evaluator)
        return finish(args, runtime, log, evaluator, summary) if runtime.main else 0
    except UserError as error:
        print(f"{me}error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        half = f"DEVICE_BATCH_TOKENS={args.device_batch_tokens // 2}"
        print(f"{me}error: out of GPU memory, try {half}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        return 128 + stopped.args[0]
    except Exception as error:  # told before the group's end, which may hang
        if isinstance(error, dist.DistError) or me and "Connection" in str(error):
            reason = " ".join(str(error).split())
            print(f"{me}stopped, another rank is gone or out of reach: {reason}", file=sys.stderr)
        else:
            sys.excepthook(*sys.exc_info())
        return 1
    finally:
        if dist.is_initialized():
            signal.alarm(60)  # ends a rank that hangs in here
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
