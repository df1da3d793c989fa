"""SGJM in MLX: the byte model with heads that draft, foresee and judge blocks of bytes, for Macs.

Parent: train_gpt.py beside it, symbol by symbol, and for MLX train_gpt_mlx.py of the repository.
Idea:   the same sizes, variables, shards, checkpoints and artifacts on another framework: a model
        that one of the two scripts trained, the other scores, goes on training and writes with.

Run:    python train_gpt_mlx.py --help                      every variable and its reason
        SIZE=25m-hybrid python train_gpt_mlx.py             another size; any field can be set
        ARCH=baseline python train_gpt_mlx.py               no heads, BASELINE_LAYERS blocks
        mlx.launch --hosts IP,IP python train_gpt_mlx.py    several Macs, the same batches
        EVAL_ONLY=1 ARTIFACT=FILE python train_gpt_mlx.py   score an artifact of either script
        python bench.py FILE --script train_gpt_mlx.py      how fast it writes with drafts

The file reads downwards: environment -> batches -> losses -> weights -> artifact -> bits. It needs
mlx, numpy and safetensors, and uses constriction and tqdm if they are installed. The gate
(EVAL_GATE) stays with the torch script, which reads this one's checkpoints.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import functools
import hashlib
import itertools
import json
import lzma
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import zlib
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.core import array as Tensor  # the trunk's word: signatures stay
from mlx.utils import tree_flatten, tree_unflatten
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

constriction = None  # without it, LZMA takes the place of rANS
with contextlib.suppress(ImportError):
    import constriction

# -----------------------------------------------------------------------------
# HYPERPARAMETERS
# -----------------------------------------------------------------------------


class UserError(Exception):
    """A mistake in the environment or a file: `main` prints it as one line and exits with code 2.
    """


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


TENSOR_CLASSES = ("embed", "attn", "mlp", "ssm", "heads", "other")

# The published sizes, field by field; the variable of a field's name overrides it.
SIZED = ("model_dim", "num_layers", "num_heads", "ff_dim", "max_seq_len",
         "block_size", "drafter_layers", "drafter_dim", "drafter_heads", "drafter_ff_dim",
         "judge_hidden", "verifier_hidden", "baseline_layers",
         "attn_every_n", "mamba_state", "train_seq_len", "train_batch_tokens")
SIZES = {
    "smoke": (64, 2, 2, 128, 64, 2, 1, 32, 2, 64, 64, 64, 3, 1, 64, 32, 128),
    "25m": (384, 10, 6, 1536, 512, 4, 2, 192, 4, 768, 512, 256, 11, 1, 64, 256, 4096),
    "100m": (768, 9, 12, 3072, 1024, 4, 2, 384, 6, 1536, 1024, 512, 10, 1, 64, 512, 2048),
    "250m": (1024, 14, 16, 4096, 1024, 4, 2, 512, 8, 2048, 2048, 1024, 15, 1, 64, 512, 2048),
    "1b": (2048, 20, 16, 8192, 4096, 2, 3, 768, 12, 3072, 4096, 2048, 21, 1, 64, 2048, 2048),
    "25m-hybrid": (384, 10, 6, 1536, 512, 4, 2, 192, 4, 768, 512, 256, 12, 8, 64, 256, 4096),
    "250m-hybrid": (1024, 14, 16, 4096, 1024, 4, 2, 512, 8, 2048, 2048, 1024, 16, 8, 128, 512, 2048),
}
# Baselines have as many parameters as SGJM, to 2 % (published: up to 25 % more).
BASELINE_FF = {"250m-hybrid": 2816}  # FF_DIM, where layers alone do not reach that
BEYOND = "100m", "250m", "1b", "250m-hybrid"  # no contest has room for these
ROW_GROUP = 4  # rows that lend each other negatives, where the batch divides by it

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
    data_path = Var("./data/datasets/fineweb10B_byte260", "folder of shards")
    vocab_size = Var(260, "260 = 4 special ids + 256 bytes; 256 = bytes", 256, 260, ship="model")
    train_seq_len = Var(0, "tokens a training row; 0 = of SIZE", 0, ship="model")
    train_batch_tokens = Var(0, "tokens a step, over all ranks; 0 = SIZE's, in whole rows", 0)
    device_batch_tokens = Var(49152, "tokens a forward: the out-of-memory knob", 1)
    train_order = Var("sequential", "of rows in an epoch", choices=("sequential", "shuffled"))
    verify_data = Var("auto", "by manifest.json; auto: up to 2 GB", choices=("auto", "0", "1"))

    _model = "Model; 0 = of SIZE"
    size = Var("25m", "which published size", choices=tuple(SIZES), ship="model")
    arch = Var("sgjm", "baseline: no heads, BASELINE_LAYERS blocks",
               choices=("sgjm", "baseline"), ship="model")
    num_layers = Var(0, "blocks of the backbone", 0, ship="model")
    baseline_layers = Var(0, "its blocks with ARCH=baseline", 0, ship="model")
    model_dim = Var(0, "width of the residual stream", 0, ship="model")
    num_heads = Var(0, "heads, each with its own keys and values", 0, ship="model")
    ff_dim = Var(0, "inner width of SwiGLU", 0, ship="model")
    positions = Var("learned", "learned: a table, as published; rope: rotated queries and keys",
                    choices=("learned", "rope"), ship="model")
    max_seq_len = Var(0, "rows of the table of learned positions", 0, ship="model")
    rope_base = Var(10000.0, "rotary base", 1, ship="model")
    rope_dims = Var(0, "rotated dimensions a head; 0 = all (#315)", 0, ship="model")
    init_std = Var(0.02, "std of matrices and embeddings at init", 0)
    attn_every_n = Var(0, "every nth block attends, others are Mamba-2", 0, ship="model")
    mamba_state = Var(0, "Mamba-2: numbers that each channel remembers", 0, ship="model")
    mamba_expand = Var(2, "Mamba-2: inner width / model width", 1, ship="model")
    mamba_d_conv = Var(4, "Mamba-2: taps of the convolution", 2, ship="model")
    mamba_head_dim = Var(64, "Mamba-2: channels that share a decay", 1, ship="model")
    mamba_chunk_size = Var(64, "Mamba-2: positions a chunk, only for speed", 1, ship="model")

    _heads = "Drafter, judge and verifier; 0 = of SIZE"
    block_size = Var(0, "bytes a draft", 0, ship="model")
    drafter_layers = Var(0, "blocks of the drafter", 0, ship="model")
    drafter_dim = Var(0, "its width", 0, ship="model")
    drafter_heads = Var(0, "its attention heads", 0, ship="model")
    drafter_ff_dim = Var(0, "inner width of its SwiGLU", 0, ship="model")
    judge_hidden = Var(0, "hidden width of the judge", 0, ship="model")
    verifier_hidden = Var(0, "hidden width of the verifier", 0, ship="model")
    token_weight = Var(1.0, "weight of the backbone's CE", 0)
    drafter_weight = Var(0.5, "weight of the drafter's CE", 0)
    jepa_weight = Var(0.25, "weight of the errors of judge and endpoint latent", 0)
    verifier_weight = Var(0.1, "weight of the verifier's loss", 0)
    heads_grad = Var(False, "the heads' losses reach the backbone, as published")
    head_positions = Var(64, "positions a row that train heads; 0 = all, as published", 0)
    export_heads = Var(False, "the heads stay in the artifact", ship="model")

    _optimizers = "Optimizers and schedule"
    iterations = Var(9000, "optimizer steps at most", 1)
    max_wallclock_seconds = Var(600.0, "training time; 0 = no limit", 0)
    warmdown_iters = Var(3000, "steps over which the rate falls", 0)
    lr_schedule = Var("linear", "linear: flat, then falling; cosine: half a wave, as published",
                      choices=("linear", "cosine"))
    lr_warmup_steps = Var(0, "steps over which the rate rises from 0", 0)
    min_lr = Var(0.0, "rate at the end, as a share of the peak", 0, 1)
    warmup_steps = Var(2, "steps that compile, off the clock", 0)
    matrix_lr = Var(0.025, "Muon: block matrices", 0)
    muon_momentum = Var(0.99, "final momentum", 0, 0.9999)
    muon_momentum_warmup_start = Var(0.92, "momentum at step 0", 0, 0.9999)
    muon_momentum_warmup_steps = Var(1500, "steps from start to final momentum", 0)
    muon_backend_steps = Var(5, "Newton-Schulz steps", 1)
    muon_wd = Var(0.04, "Muon: decoupled weight decay", 0)
    tied_embed_lr = Var(0.015, "AdamW: embeddings of bytes, positions and slots", 0)
    scalar_lr = Var(0.01, "AdamW: norms, biases, convolutions, decays", 0)
    adam_wd = Var(0.04, "weight decay of the embeddings", 0)
    beta1 = Var(0.9, "Adam", 0, 0.9999)
    beta2 = Var(0.95, "Adam", 0, 0.99999)
    adam_eps = Var(1e-8, "Adam", 0)
    grad_clip_norm = Var(0.3, "gradient norm of backbone, of heads; 0 = no clip", 0)
    ema_decay = Var(0.997, "of the average that is scored", 0, 0.99999)
    seed = Var(1337, "of weights, order and positions of the heads", 0)

    _artifact = "Artifact"
    bits = Var("embed:8,attn:7,mlp:7,ssm:7,heads:7,other:7", "bit width by tensor class")
    quant_k = Var("embed:8,attn:10,mlp:10,ssm:10,heads:10,other:10",
                  "step = k * std / top: the size knob")
    quant_round = Var("gptq", "gptq: by the inputs' second moments", choices=("nearest", "gptq"))
    gptq_batches = Var(4, "training batches that GPTQ sees", 1)
    compressor = Var("auto", "auto: rans if it is installed", choices=("auto", "rans", "lzma"))
    artifact_budget_bytes = Var(16_000_000, "code + model; 0 = no limit, as from 100m on", 0)

    _evaluation = "Evaluation"
    eval_seq_len = Var(0, "window length; 0 = TRAIN_SEQ_LEN", 0, ship="eval")
    eval_stride = Var(0, "targets a window of the sliding pass; 0 = a quarter", 0, ship="eval")
    eval_batch_tokens = Var(0, "tokens a forward; 0 = DEVICE_BATCH_TOKENS", 0)
    val_bytes = Var(0, "validates only on this prefix; 0 = all", 0)
    val_loss_every = Var(0, "steps between validations; 0 = only at the end", 0)
    eval_budget_seconds = Var(600.0, "final scoring of the artifact; 0 = no limit", 0)
    eval_only = Var(False, "score ARTIFACT and nothing else")
    artifact = Var("", "its path, for EVAL_ONLY")

    _generation = "Drafts, for bench.py; scripts/generate.py takes the defaults"
    drafter = Var("both", "suffix: what followed a like text before",
                  choices=("heads", "suffix", "both"))
    draft_branches = Var(4, "blocks that the heads draft", 1, 64)
    draft_budget = Var(16, "drafted bytes a pass; a hybrid reads a chain of them", 1, 63)
    draft_price = Var(1.0, "times what drafts are thought to cost; 0 = free", 0)
    keep_top_k = Var(4, "drafts read in a pass", 1)
    judge_weight = Var(1.0, "of the judge's error where drafts are ranked", 0)
    merge_radius = Var(4, "bits of 64 in which drafts may differ of which one is read", 0, 64)

    _run = "Run"
    run_id = Var("", "folder under RUNS_PATH; empty = time and seed")
    runs_path = Var("./runs", "where runs are kept")
    resume = Var("", "auto, or a checkpoint file")
    resume_data = Var("same", "changed: other text than before", choices=("same", "changed"))
    checkpoint_every = Var(0, "steps between checkpoints; 0 = on a signal; from 100m on 500", 0)
    train_log_every = Var(200, "steps between log lines, after the first ten", 1)
    device = Var("auto", "gpu: Metal, or CUDA in MLX's build", choices=("auto", "cpu", "gpu"))
    dtype = Var("auto", "of activations; weights are fp32", choices=("auto", "fp32", "bf16"))
    compile = Var("auto", "auto: on GPUs, not on CPUs", choices=("auto", "0", "1"))
    attention = Var("auto", "first rung", choices=("auto", "sdpa", "math"))
    memory_limit_mb = Var(0, "memory that MLX may hold; 0 = its own limit", 0)
    strict_env = Var(True, "refuse misspelt variables; 0 = only warn")
    _launcher = "Ranks: mlx.launch tells MLX, not this script"
    world_size = Var(1, "of `mlx.launch`", 1, 1)

    # Variables of ideas that are gone: {name: (values still allowed, reason)}.
    RETIRED = {
        "SWA_ENABLED": ("0", "EMA took its place"),
        "EMA_ENABLED": ("1", "EMA_DECAY=0 scores the last weights"),
        "TIE_EMBEDDINGS": ("1", "an untied head costs bytes"),
        "MTP_NUM_HEADS": ("0", "the drafter took its place"),
        **dict.fromkeys(("BIGRAM_VOCAB_SIZE", "NGRAM_ORDERS"), ("0", "it reads bytes")),
        "QUANT_CLIP": ("std", "a search lost at equal size"),
        "QAT_START": ("1 1.0", "see BytePatchJEPA"),
        **dict.fromkeys(("QAT_ENABLED", "LATE_QAT"), ("0", "see BytePatchJEPA")),
        "JEPA_CHUNK_SIZE": ("0", "judge and drafter took its place"),
        "DOC_MASK": ("0", "rows are short"),
        "TTT": ("0", "not measured with these heads"),
        "TOKENIZER_PATH": ("none", "this model reads bytes"),
        "TRAIN_ALIGN": ("stream", "see TokenBest"),
        **dict.fromkeys(("GENERATE", "GENERATE_BENCH"), ("0", "scripts/generate.py, bench.py")),
        "DRAFT_COST": ("0 0.0", "see DRAFT_PRICE"), "DRAFT_BYTE_COST": ("0.1", "see DRAFT_PRICE"),
        "EVAL_GATE": ("0", "train_gpt.py judges"),
    }
    # How variables of other scripts begin.
    FIELD = re.compile("(ATTN|AWQ|BATCH|BIGRAM|BIJEPAX|CASEOPS|DRAFTER|EMBED|EVAL|GATED?|"
                       "HEAD|JEPA|LOOP|LORA|LQER|MIX|MTP|MUON|NGRAM|PATCH|PPM|QAT|QUANT|"
                       "SIGREG|SPARSE|SWA|TTT|VAL)_")

    def __init__(self, environ: dict[str, str] | None = None, shipped: dict | None = None):
        """Reads `environ`; `shipped`, settings in an artifact, replaces the defaults it names."""
        environ = {name: text for name, text in (environ or {}).items()
                   if name.lower() not in SIZED or text.strip() != "0"}  # 0 is SIZE's
        self.warnings = []
        self._refuse_retired_and_misspelt(environ)
        # environment, else artifact, else default
        for name, var in self.vars().items():
            value = (shipped or {}).get(var.name, var.default)
            if text := environ.get(var.name):
                value = var.parse(text)
                if shipped and var.ship == "model" and value != shipped[var.name]:
                    raise UserError(f"{var.name}={value}: the artifact was made with "
                                    f"{shipped[var.name]}; leave it unset")
            setattr(self, name, value)
        # of SIZE, where 0 is left
        for name, number in zip(SIZED, SIZES[self.size]):
            if name == "ff_dim" and self.arch == "baseline":
                number = BASELINE_FF.get(self.size, number)
            setattr(self, name, getattr(self, name) or number)
        if self.size in BEYOND and not environ.get("ARTIFACT_BUDGET_BYTES"):
            self.artifact_budget_bytes = 0
        if self.size in BEYOND and not environ.get("CHECKPOINT_EVERY"):
            self.checkpoint_every = 500
        rows = max(1, self.train_batch_tokens // self.train_seq_len)
        self.row_group = math.gcd(rows, ROW_GROUP)
        if not environ.get("TRAIN_BATCH_TOKENS"):
            self.train_batch_tokens = rows * self.train_seq_len
        # what several settings together mean
        self.trains = not shipped
        self.bits_by_class = self._parse_classes("bits", int, 2, 8)
        self.k_by_class = self._parse_classes("quant_k", float, 0.1, 1000)
        self.head_dim = self.model_dim // self.num_heads
        self.eval_seq_len = self.eval_seq_len or self.train_seq_len
        self.eval_stride = self.eval_stride or max(1, self.eval_seq_len // 4)
        self.eval_batch_tokens = self.eval_batch_tokens or self.device_batch_tokens

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
        lines.append("\nAccepted from older command lines, without effect")
        for name, (off, why) in cls.RETIRED.items():
            lines.append(f"  {name}={off.split()[0]:<24} {why}")
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


def pick_device(name: str) -> mx.Device:
    """`auto`, `cpu` or `gpu` (Metal, or CUDA in MLX's build for it) -> MLX's device.

    Raises UserError where this build of MLX has none."""
    there = {"gpu": mx.is_available(mx.gpu), "cpu": mx.is_available(mx.cpu)}
    seen = [kind for kind in there if there[kind]]
    name = seen[0] if name == "auto" else name
    if not there.get(name):
        seen = ", ".join(seen)
        raise UserError(f"DEVICE={name} is not there: mlx {mx.__version__} sees {seen}")
    return mx.Device(getattr(mx, name))


@check
def check_launch(args: Hyperparameters) -> None:
    nameless = args.resume == "auto" and not args.run_id
    forbid(nameless, args, "resume run_id", "set RUN_ID")
    forbid(args.artifact and args.trains, args, "artifact", "set EVAL_ONLY=1 to score it")


class Runtime:
    """Device, dtype, ranks and clocks: what the machine offers, decided once."""

    def __init__(self, args: Hyperparameters):
        self.group = mx.distributed.init()  # of one process, unless mlx.launch started it
        self.rank = self.group.rank()
        self.world_size = self.group.size()
        self.main = self.rank == 0
        self.clocks = {}  # seconds by phase
        self.notes = []
        self.peak = 0  # bytes, of the phases whose own peaks were asked for
        self.device = pick_device(args.device)
        mx.set_default_device(self.device)
        self.dtype = self._pick_dtype(args)
        self.compile = self._pick_compile(args)
        self.attention = "sdpa"  # runs everywhere; `main` asks for the best rung
        # what is missing, and what is limited
        if args.memory_limit_mb:
            self._limit_memory(args.memory_limit_mb * 2**20)
        if not constriction and args.compressor != "lzma":
            self.notes.append("compressor: constriction is missing, LZMA instead of rANS")

    def _pick_dtype(self, args: Hyperparameters) -> mx.Dtype:
        if args.dtype != "auto":
            return {"fp32": mx.float32, "bf16": mx.bfloat16}[args.dtype]
        return mx.bfloat16 if self.device == mx.gpu else mx.float32

    def _pick_compile(self, args: Hyperparameters) -> bool:
        if args.compile != "auto":
            return args.compile == "1"
        return self.device == mx.gpu  # on CPUs kernels take minutes to build

    def _limit_memory(self, limit: int) -> None:
        """Bytes beyond which MLX frees its cache and waits for work in flight; half of it may be cache. Metal
        keeps as much of it resident as the system allows, so that weights are not paged out."""
        mx.set_memory_limit(limit)
        mx.set_cache_limit(limit // 2)
        if mx.metal.is_available():
            allowed = int(mx.device_info().get("max_recommended_working_set_size", 0))
            mx.set_wired_limit(min(limit, allowed))

    @contextlib.contextmanager
    def clock(self, phase: str):
        """Adds what the block takes to a phase; phases do not overlap."""
        start = time.perf_counter()
        yield
        self.clocks[phase] = self.clocks.get(phase, 0.0) + time.perf_counter() - start

    def device_name(self) -> str:
        if self.device == mx.gpu:
            return str(mx.device_info().get("device_name", "gpu"))
        return f"cpu ({platform.machine()}, mlx)"

    def describe(self) -> str:
        return (f"attention:{self.attention} compile:{int(self.compile)} "
                f"dtype:{str(self.dtype).removeprefix('mlx.core.')} device:{self.device_name()}")

    def all_reduce(self, values, op=np.sum) -> np.ndarray:
        """float64 numbers over ranks. They travel as bits: GPUs have no float64 here."""
        values = np.asarray(values, np.float64)
        if self.world_size == 1:
            return values
        bits = mx.array(values.reshape(1, -1).view(np.uint32))
        every = np.array(mx.distributed.all_gather(bits, group=self.group, stream=mx.cpu))
        return op(every.view(np.float64), axis=0).reshape(values.shape)

    def sum_arrays(self, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums fp32 arrays over ranks, 32 MiB a message."""
        if self.world_size == 1:
            return arrays
        means = nn.average_gradients(arrays, self.group, communication_stream=mx.cpu)
        return {name: self.world_size * mean for name, mean in tree_flatten(means)}

    def from_main(self, values: list[float]) -> list[float]:
        """Rank 0's numbers on every rank."""
        return self.all_reduce(values, lambda every, axis: every[0]).tolist()

    def agree(self, what: str, values) -> None:
        """Raises UserError on all ranks if one has other values than rank 0."""
        mine = zlib.crc32(json.dumps(values, sort_keys=True).encode())
        first, = self.from_main([mine])
        apart = [self.rank if mine != first else 0]
        if rank := int(self.all_reduce(apart, np.max)[0]):
            raise UserError(f"rank {rank} has other {what} than rank 0")

    def peak_memory_mb(self, since_last: bool = False) -> float:
        """The most that MLX held at once; `since_last`: since such a question was last asked."""
        recent = mx.get_peak_memory()
        self.peak = max(self.peak, recent)
        if since_last:
            mx.reset_peak_memory()
        return (recent if since_last else self.peak) / 2**20


class Module(nn.Module):
    """MLX's module under the trunk's names: `forward` is the call, parameters in torch's order."""

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def named_parameters(self) -> dict[str, Tensor]:
        """A module's own arrays, then those of the modules inside it, in the order in which they were
        made; frozen ones are what torch calls buffers."""
        return dict(named_arrays(self))


def named_arrays(module, prefix: str = ""):
    frozen = getattr(module, "_no_grad", ())
    if isinstance(module, list):
        items = dict(enumerate(module))
    else:
        items = {key: module[key] for key in module}
    for name, value in items.items():
        if isinstance(value, Tensor) and name not in frozen:
            yield f"{prefix}{name}", value
    for name, value in items.items():
        if isinstance(value, (nn.Module, list)):
            yield from named_arrays(value, f"{prefix}{name}.")


def update_parameters(model: nn.Module, params: dict[str, Tensor]) -> None:
    """From here on the model holds these arrays, given by their full names."""
    model.update(tree_unflatten([*params.items()]))


def functional(model: nn.Module, method):
    """method(model, ...) as a function of all of the model's arrays in front, which it leaves as they
    were: MLX can trace a graph only of such a function."""
    def call(arrays: dict, *rest):
        kept = model.parameters()
        model.update(arrays)
        try:
            return method(model, *rest)
        finally:
            model.update(kept)
    return call


def compiled(method):
    """method(model, ...) through one compiled graph for every model of the same settings (trained,
    averaged, reloaded): the first one traces it, arrays go in with each call."""
    graph = None

    def call(model: nn.Module, *rest):
        nonlocal graph
        graph = graph or mx.compile(functional(model, method))
        return graph(model.parameters(), *rest)
    return call


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


def progress_bar(items, total: int, name: str, show: bool):
    """tqdm on a terminal, plain iteration elsewhere."""
    if show:
        with contextlib.suppress(ImportError):  # a bar is a comfort, not a need
            from tqdm import tqdm
            return tqdm(items, total=total, desc=name, disable=None, leave=False)
    return items


# -----------------------------------------------------------------------------
# ATTENTION
# -----------------------------------------------------------------------------
# The rungs of a ladder, fastest first: q (B, H, T, d) and k, v (B, K, T, d) -> (B, H, T, d).
# `mask` is None for plain causal attention, else (..., queries, keys), True where one is seen.


def causal_mask(docs: Tensor, queries: int) -> Tensor:
    """docs (B, T), the document of each position -> (B, 1, queries, T) for the last `queries`."""
    positions = mx.arange(docs.shape[1])
    same_document = docs[:, None, -queries:, None] == docs[:, None, None]
    return same_document & (positions[-queries:, None] >= positions)


def math_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention spelt out, what every other rung must agree with."""
    k, v = (mx.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = (q @ k.swapaxes(2, 3)).astype(mx.float32) * q.shape[-1] ** -0.5
    if mask is None:
        mask = causal_mask(mx.zeros((1, k.shape[2])), q.shape[2])
    weights = mx.softmax(mx.where(mask, scores, -mx.inf), axis=-1).astype(v.dtype)
    return weights @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """MLX's kernel. q may be only the last positions of k and v."""
    mask = "causal" if mask is None else mask
    scale = q.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


ATTENTION = {"sdpa": sdpa_attention, "math": math_attention}


def agrees_with_math(rung: str, dtype: mx.Dtype, dim: int) -> bool:
    """Whether a rung runs both ways here, with heads `dim` wide, and computes what `math` does."""
    shapes = {n: (1, n, 128, dim) for n in (2, 1)}
    q, k = (mx.random.normal(shapes[n], key=mx.random.key(n)).astype(dtype) for n in (2, 1))
    grad = mx.grad(lambda q: ATTENTION[rung](q, k, k).sum())(q)
    out, wanted = ATTENTION[rung](q, k, k), math_attention(q, k, k)
    close = mx.allclose(out, wanted, atol=3e-2)
    return (close & mx.isfinite(grad).all()).item()


def pick_attention(args: Hyperparameters, dtype: mx.Dtype) -> str:
    """The first rung, from ATTENTION down, that works here."""
    rungs = list(ATTENTION)
    first = 0 if args.attention == "auto" else rungs.index(args.attention)
    dim = args.model_dim // args.num_heads
    for rung in rungs[first:]:
        with contextlib.suppress(Exception):  # a chip that it refuses, an old signature
            if agrees_with_math(rung, dtype, dim):
                return rung
    device, rungs = mx.default_device(), ", ".join(rungs[first:])
    raise UserError(f"ATTENTION={args.attention}: none of {rungs} runs on {device} in {dtype}")


# -----------------------------------------------------------------------------
# DATA
# -----------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
PAD_ID, BOS_ID, BYTE_OFFSET = 0, 1, 4
SHARD_VOCAB = 260  # ids of byte260
BYTE_CLASSES = ("lower", "upper", "digit", "space", "newline", "punctuation", "non-ascii",
                "special", "token")


def check_ids(ids: np.ndarray, vocab_size: int, path: Path) -> None:
    if ids.size and (top := int(ids.max())) >= vocab_size:
        raise UserError(f"{path}: id {top} is outside VOCAB_SIZE={vocab_size}: another tokenizer?")


def open_shard(path: Path, vocab_size: int, checked: int | None = None) -> np.ndarray:
    """Memory-maps a shard: 256 little-endian int32 (magic, version, count, 0...), then `count`
    uint16 ids.

    The first `checked` ids (None: all) are held against the vocabulary at once."""
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
        # training shards stay on disk, the validation text is read whole
        self.vocab_size = SHARD_VOCAB
        self.only_bytes = args.vocab_size < SHARD_VOCAB
        self.manifest = self._read_manifest()
        if "caseops" in self.manifest:
            raise UserError(f"DATA_PATH={self.path}: CaseOps ids, this script reads no sidecars")
        self.train_shards = [self._open(path, 1 << 20) for path in self.train_files]
        self.val = np.concatenate([self._open(path) for path in self.val_files])
        if verify:
            self._verify(args.verify_data)
        if len(self.val) < 2:
            raise UserError(f"{self.val_files[0]}: {len(self.val)} ids leave no validation target")

    def _open(self, path: Path, checked: int | None = None) -> np.ndarray:
        """A byte260 shard; with VOCAB_SIZE=256 only its bytes, of ids that are all checked."""
        if not self.only_bytes:
            return open_shard(path, self.vocab_size, checked)
        ids = open_shard(path, self.vocab_size)
        return ids[ids >= BYTE_OFFSET] - BYTE_OFFSET

    def _shards(self, split: str, args: Hyperparameters) -> list[Path]:
        """The files of a split, SOURCE_split_NUMBER.bin, by number."""
        files = sorted(self.path.glob(f"*_{split}_*.bin"))
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
        documents = None if self.only_bytes else int((self.val == BOS_ID).sum())
        told = ("source", "source_notes", "variant", "documents", "bytes", "overlap",
                "val_text_sha256")
        known = {key: self.manifest.get(key) for key in told}
        return {"name": self.path.name, **known, "train_shards": len(self.train_files),
                "val_shards": len(self.val_files), "train_tokens": sum(map(len, self.train_shards)),
                "val_tokens": len(self.val), "val_documents": documents,
                "sha256": digest.hexdigest()}


def byte_tables(args: Hyperparameters) -> np.ndarray:
    """Bytes that each id stands for (V,): one, and none for the special ids of byte260."""
    return (np.arange(args.vocab_size) >= args.vocab_size - 256).astype(np.int64)


def target_bytes(ids: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Bytes of each target ids[1:], int64, by `byte_tables`."""
    return tables[ids[1:]]


def class_table(vocab_size: int) -> np.ndarray:
    """Class of each id, an index into BYTE_CLASSES."""
    names = ["special"] * (vocab_size - 256)
    for byte in range(256):
        text = chr(byte)
        tests = {"non-ascii": byte > 127, "newline": text in "\r\n", "space": text.isspace(),
                 "digit": text.isdigit(), "lower": text.islower(), "upper": text.isupper()}
        found = [name for name in tests if tests[name]]
        names.append(found[0] if found else "punctuation")
    return np.array([BYTE_CLASSES.index(name) for name in names])


@check
def check_vocabulary(args: Hyperparameters) -> None:
    odd = args.vocab_size not in (256, SHARD_VOCAB)
    forbid(odd, args, "vocab_size", "260, or 256 for only bytes; no tokenizer is read")


@check
def check_batch(args: Hyperparameters) -> None:
    spare = args.trains and args.train_batch_tokens % args.train_seq_len
    forbid(spare, args, "train_batch_tokens train_seq_len", "must be a multiple of a row")


class BatchPlan(namedtuple("BatchPlan", "rows group groups micro_steps world_size")):
    """How a global batch of `rows` rows is spread: micro-steps x ranks x `groups` groups of `group`
    rows.

    Ranks run the same shapes: slots beyond the batch repeat its first group with weight 0."""

    @classmethod
    def make(cls, args: Hyperparameters, world_size: int) -> BatchPlan:
        group = args.row_group
        rows = args.train_batch_tokens // args.train_seq_len
        total = rows // group
        at_most = max(1, args.device_batch_tokens // (args.train_seq_len * group))
        micro_steps = -(-total // (world_size * at_most))
        return cls(rows, group, -(-total // (world_size * micro_steps)), micro_steps, world_size)

    def slots(self, micro_step: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the global batch for one forward, and a weight for each."""
        first = (micro_step * self.world_size + rank) * self.groups * self.group
        numbers = np.arange(first, first + self.groups * self.group)
        real = numbers < self.rows  # which is a whole number of groups
        return np.where(real, numbers, numbers % self.group), real.astype(np.float32)


class Loader:
    """Rows of TRAIN_SEQ_LEN + 1 ids for this rank, in the same order for any number of ranks.
    `state`, of the checkpoint, is the position of the next row: {"epoch", "shard", "row"}."""

    def __init__(self, data: Dataset, args: Hyperparameters, plan: BatchPlan, rank: int,
                 state: dict | None = None):
        self.data, self.args, self.plan, self.rank = data, args, plan, rank
        self.length = args.train_seq_len
        self.state = dict(state or {"epoch": 0, "shard": 0, "row": 0})
        self.order = functools.lru_cache(2)(self.order)  # serves many steps
        if (most := max(map(len, data.train_shards))) <= self.length:
            raise UserError(f"TRAIN_SEQ_LEN={self.length}: no training shard has over {most} ids")

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
            whole = (len(self.data.train_shards[index]) - 1) // self.length  # one id is spare
            order = self.order(whole, state["epoch"], index)
            taken = order[state["row"] : state["row"] + count - len(rows)]
            rows += [(index, self.length * int(row)) for row in taken]
            state["row"] += len(taken)
            if state["row"] >= whole:
                state["row"] = 0
                state["shard"] += 1
            if state["shard"] == len(shards):
                state["shard"] = 0
                state["epoch"] += 1
        return rows

    def next(self) -> tuple[np.ndarray, np.ndarray, dict]:
        """This rank's ids (micro_steps, rows, T + 1), weights (micro_steps, rows), next state."""
        plan = self.plan
        rows = self._next_rows(plan.rows)
        shape = plan.micro_steps, plan.groups * plan.group
        batch = np.empty((*shape, self.length + 1), np.int32)
        weights = np.empty(shape, np.float32)
        for micro in range(plan.micro_steps):
            numbers, weights[micro] = plan.slots(micro, self.rank)
            for slot, number in enumerate(numbers):
                index, start = rows[number]
                shard = self.data.train_shards[index]
                batch[micro, slot] = shard[start : start + self.length + 1]
        check_ids(batch, self.data.vocab_size, self.data.path)
        return batch, weights, dict(self.state)

    def prefetch(self):
        """Iterates over `next()` from a thread, two batches ahead; arrays are made where they are used.
        """
        with ThreadPoolExecutor(1) as thread:
            ahead = deque(thread.submit(self.next) for _ in range(2))
            while True:
                ids, weights, state = ahead.popleft().result()
                ahead.append(thread.submit(self.next))
                yield mx.array(ids), mx.array(weights), state


# -----------------------------------------------------------------------------
# QUANTISER
# -----------------------------------------------------------------------------

SMALL_TENSOR = 4096  # elements; smaller matrices stay fp16, as do gains
SCALE_FLOOR = 2.0**-20  # rows of zeros need a step; no other is this small


def tensor_class(name: str) -> str:
    if name.startswith("aux."):
        return "heads"
    if name.startswith(("tok_emb", "pos_emb")):
        return "embed"
    if ".attn." in name:
        return "attn"
    if ".mlp." in name:
        return "mlp"
    return "ssm" if "_proj." in name else "other"


def quant_plan(name: str, shape, args: Hyperparameters) -> tuple[int, int]:
    """(bits, the axis that shares a step, the last); (0, 0): fp16."""
    small = math.prod(shape) < SMALL_TENSOR and min(shape, default=0) < 16
    if small or len(shape) < 2 or not name.endswith(".weight"):
        return 0, 0
    return args.bits_by_class[tensor_class(name)], len(shape) - 1


def nearest(x: np.ndarray, top: int) -> np.ndarray:
    return np.clip(np.rint(x), -top, top)


def gptq(x: np.ndarray, hessian: np.ndarray, top: int) -> np.ndarray:
    """Full-Hessian GPTQ (Frantar et al. 2022) of x (R, C), its rows in units of their steps.

    Columns go by falling input power; the error of each is spread over those to come by the
    inverse of the damped hessian = X^T X (C, C)."""
    power = np.diag(hessian)
    order = np.argsort(-power, kind="stable")
    damped = hessian[np.ix_(order, order)].astype(np.float64)
    damped[np.diag_indices(len(order))] += 0.01 * power.mean() + 1e-12
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    # blocks of columns: errors reach later blocks once
    left = x[:, order].copy()
    q = np.empty_like(x)
    for start in range(0, x.shape[1], 128):
        stop = min(start + 128, x.shape[1])
        errors = np.empty((len(x), stop - start), np.float32)
        for j in range(start, stop):
            chosen = nearest(left[:, j], top)
            error = (left[:, j] - chosen) / factor[j, j]
            left[:, j:stop] -= error[:, None] * factor[j, j:stop]
            q[:, order[j]] = chosen
            errors[:, j - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return q


def quantise(weight: np.ndarray, bits: int, k: float, axis: int,
             hessian: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rounds to integers q of `bits` bits, one fp16 step per slice along `axis`: q * step ~ weight.

    step = k * std / top, top = 2^(bits-1) - 1 (SDClip, #1394). A Gaussian then costs about
    log2(top / k) + 2.05 bits a weight, so k sets the size. Steps have an epsilon floor, not 1 / top
    (defect G2 of #832). Rounding: by `gptq` with a hessian (C, C), else to the nearest. Returns q,
    int8 of weight's shape, and step, fp16 with size 1 on `axis`. NumPy: backends pack alike."""
    top = 2 ** (bits - 1) - 1
    weight = np.asarray(weight, dtype=np.float32)
    step = k / top * weight.std(axis=axis, keepdims=True, dtype=np.float64)
    step = np.maximum(step, SCALE_FLOOR).astype(np.float16).astype(np.float32)
    x = weight / step
    q = nearest(x, top) if hessian is None else gptq(x, hessian, top)
    return q.astype(np.int8), step.astype(np.float16)


# -----------------------------------------------------------------------------
# AUXILIARY OBJECTIVES
# -----------------------------------------------------------------------------


class CastedLinear(Module, nn.Linear):
    """fp32 weight, multiplied in the dtype of the input; no bias. `watch` is shown the inputs."""

    watch = None

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__(dim_in, dim_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch(x)
        return x @ self.weight.astype(x.dtype).T


def silu(x: Tensor) -> Tensor:
    return x * mx.sigmoid(x)  # nn.silu is compiled, whatever COMPILE says


def log_softmax(logits: Tensor) -> Tensor:
    # nn.log_softmax is compiled, whatever COMPILE says
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class LatentMLP(Module):
    """W2 gelu(W1 x + b1) + b2: the judge and the verifier."""

    def __init__(self, dim_in: int, hidden: int, dim_out: int):
        super().__init__()
        self.fc1 = CastedLinear(dim_in, hidden)
        self.bias1 = mx.zeros(hidden)
        self.fc2 = CastedLinear(hidden, dim_out)
        self.bias2 = mx.zeros(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x) + self.bias1.astype(x.dtype)
        inner = x * (1 + mx.erf(x / math.sqrt(2))) / 2
        return self.fc2(inner) + self.bias2.astype(x.dtype)


class SlotCache:
    """Keys and values of a drafter's slots, those of all branches."""

    def __init__(self):
        self.layers, self.length = {}, 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds those of new slots (N, H, n, d); returns those of all."""
        if layer in self.layers:
            k, v = (mx.concatenate(pair, 2) for pair in zip(self.layers[layer], (k, v)))
        self.layers[layer], self.length = (k, v), k.shape[2]
        return k, v

    def branch(self, count: int) -> None:
        """Each row becomes `count` equal ones."""
        self.layers = {layer: tuple(mx.repeat(x, count, 0) for x in pair)
                       for layer, pair in self.layers.items()}


class Drafter(Module):
    """Drafts the BLOCK_SIZE bytes after a state of the backbone, and the latent of their end.

    A causal stack over b + 1 slots: slot 0 holds u + Q_0, slot i holds u + Q_i + E(d_i), where
    u = W_in parent. Slots 0 ... b - 1 give the logits of d_1 ... d_b, through E again, slot b the
    endpoint latent. The published one has no E: its slots do not know the bytes drafted before
    them, so that blocks are incoherent and all branches of a state end in the same latent."""

    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.size = args.block_size
        dim = args.drafter_dim
        self.enter = CastedLinear(args.model_dim, dim)
        self.slot_emb = mx.zeros((self.size + 1, dim))
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        size = dim, args.drafter_heads, args.drafter_ff_dim
        self.blocks = [Block(*size, i, "math") for i in range(args.drafter_layers)]
        self.norm = RMSNorm(dim)
        self.latent = CastedLinear(dim, args.model_dim)

    def slots(self, parents: Tensor, tokens: Tensor, past: SlotCache | None = None) -> Tensor:
        """parents (N, D), tokens (N, n) drafted so far -> states of slots 0 ... n (N, n + 1, e).
        If `past` knows slots, tokens are those after them, and n slots come back."""
        known = past.length if past else 0
        drafted = self.tok_emb.weight[tokens]
        if known == 0:
            drafted = mx.pad(drafted, ((0, 0), (1, 0), (0, 0)))
        place = self.slot_emb[known : known + drafted.shape[1]]
        x = self.enter(parents)[:, None] + (place + drafted).astype(parents.dtype)
        for block in self.blocks:
            x = block(x, None, None, past)
        return self.norm(x)

    def head(self, x: Tensor) -> Tensor:
        return (x @ self.tok_emb.weight.astype(x.dtype).T).astype(mx.float32)

    def draft(self, parents: Tensor, branches: int, temperature: float = 0.0,
              generator: np.random.Generator | None = None,
              given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """parents (N, D) -> k branches of each: tokens (N, k, b), log-probabilities of each slot at
        this temperature (at 1 if it is 0) (N, k, b, V), endpoint latents (N, k, D).

        All branches begin with `given` (N, n < b) where it is known. The bytes after it differ: the
        k most likely at temperature 0, else drawn in turn without replacement. Later bytes are the
        most likely ones, or drawn."""
        tokens = mx.zeros((len(parents), 0), mx.int32) if given is None else given
        heat, first = temperature or 1.0, tokens.shape[1]
        past = SlotCache()
        x = self.slots(parents, tokens, past)
        logits = self.head(x)  # (N, then N * k, slots so far, V)

        for i in range(first, self.size):
            keys = logits[:, -1] / heat
            if temperature:  # the largest of logits + Gumbel noise: drawn without replacement
                noise = generator.gumbel(size=keys.shape)
                keys = keys + mx.array(noise.astype(np.float32))
            best = mx.argsort(-keys, axis=-1)[:, : branches if i == first else 1]
            chosen = best.astype(mx.int32).reshape(-1, 1)
            if i == first:
                past.branch(branches)
                parents, tokens, logits = (
                    mx.repeat(part, branches, 0) for part in (parents, tokens, logits))
            tokens = mx.concatenate((tokens, chosen), 1)
            x = self.slots(parents, chosen, past)
            logits = mx.concatenate((logits, self.head(x)), 1)
        laws = log_softmax(logits[:, :-1] / heat)
        found = tokens, laws, self.latent(x[:, -1])
        found = (mx.unflatten(part, 0, (-1, branches)) for part in found)
        return tuple(mx.stop_gradient(part) for part in found)


def accepted(tokens: Tensor, text: Tensor, best: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What greedy verification says of drafts, as far as one forward over the text can tell.

    tokens (..., k, b) drafted, text (..., b) the true bytes, best (..., b) the backbone's choice at
    each of them -> three of (..., k): 1 where all b are accepted; 1 where that is known; how many
    are known to be. The backbone's choice after a draft is known while the draft is the text: one
    that it accepts although the text goes on otherwise has an unknown end."""
    text, best = text[..., None, :], best[..., None, :]
    is_text = mx.cumprod((tokens == text).astype(mx.int32), -1)
    told = mx.concatenate((mx.ones_like(tokens[..., :1]), is_text[..., :-1]), -1) > 0
    agrees = told & (tokens == best)
    whole = agrees.all(-1)
    known = whole | (told & mx.logical_not(agrees)).any(-1)
    taken = mx.cumprod(agrees.astype(mx.int32), -1).sum(-1)
    return tuple(part.astype(mx.float32) for part in (whole, known, taken))


class SpeculativeHeads(Module):
    """Drafter, judge and verifier, trained on states of the backbone beside it.

    The interface that a record replaces:
      inputs(step, device)    what losses need from outside the graph, equal on all ranks
      forward(..., inputs)    {name: (groups,) loss}
      weights(progress)       {name: weight of that term beside CE}
      report(means)           what the step line says about the mean terms

    With parent p = h[t], text d = ids[t + 1 ... t + b] and future f = stop-gradient h[t + b], the
    state that has read all of d (published: one byte less):
      drafter   CE of d, each slot given the bytes before it
      jepa      (|judge(p) - f|^2 + |endpoint latent(p, d) - f|^2) / 2, means over channels
      verifier  BCE of verifier(p, latent). The drafter's two best branches at t are labelled by
                whether the backbone accepts them (a negative is a draft that it rejects), and left
                out where that is unknown (`accepted`). With equal weight, negatives by kind: the
                state of another time, and that of another row, never p itself, never f
    HEADS_GRAD=0 stops all of them at h; 1, as published, lets them shape the backbone (and collapse
    its states: `latent_var` shows it)."""

    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.args = args
        dim = args.model_dim
        self.drafter = Drafter(args)
        self.judge = LatentMLP(dim, args.judge_hidden, dim)
        self.verifier = LatentMLP(2 * dim, args.verifier_hidden, 1)

    def inputs(self, step: int) -> Tensor | None:
        """(2, K), from only seed and step: the positions at which heads are trained, and for each
        that of a state before, inside or after its draft: not its own, not the draft's end."""
        args, size, length = self.args, self.args.block_size, self.args.train_seq_len
        if not any(self.weights(0.0).values()):
            return None
        generator = np.random.default_rng([args.seed, step])
        room = length - size
        order = generator.permutation(room)
        positions = np.sort(order[: args.head_positions or room])

        shifts = sorted({-1, size - 1, size + 1, 3 * size} - {0, size})
        others = positions[:, None] + np.array(shifts)
        chance = generator.random(others.shape)
        outside = (others < 0) | (others >= length)
        best = np.where(outside, -1.0, chance).argmax(1)[:, None]
        others = np.take_along_axis(others, best, 1)[:, 0]
        return mx.array(np.stack((positions, others)).astype(np.int32))

    def verdict(self, parent: Tensor, latent: Tensor) -> Tensor:
        """parent, latent (..., D) -> logits (...) that a draft which ends there is accepted."""
        pair = mx.concatenate((mx.broadcast_to(parent, latent.shape), latent), -1)
        return self.verifier(pair).squeeze(-1).astype(mx.float32)

    def forward(self, hidden: Tensor, best: Tensor, ids: Tensor, inputs: Tensor) -> dict:
        """hidden (B, T, D), best (B, T) the backbone's choices, ids (B, T + 1) -> terms per group
        of rows."""
        args, group = self.args, self.args.row_group
        positions, others = inputs
        states = mx.stop_gradient(hidden)
        ahead = positions[:, None] + mx.arange(args.block_size)
        parent = (hidden if args.heads_grad else states)[:, positions]  # (B, K, D)
        text = ids[:, ahead + 1]  # (B, K, b)
        future = states[:, positions + args.block_size]
        wanted = future.astype(mx.float32)

        def mean(x: Tensor) -> Tensor:
            return x.astype(mx.float32).reshape(len(ids) // group, -1).mean(1)
        # drafter and judge
        slots = self.drafter.slots(parent.flatten(0, 1), text.flatten(0, 1))
        slots = mx.unflatten(slots, 0, text.shape[:2])
        logits = self.drafter.head(slots[:, :, :-1])  # (B, K, b, V)
        nats = nn.losses.cross_entropy(logits, text)
        guesses = self.judge(parent), self.drafter.latent(slots[:, :, -1])
        judge, endpoint = (mean((x.astype(mx.float32) - wanted).square()) for x in guesses)
        spread = wanted.reshape(len(judge), -1, future.shape[-1]).var(1).mean(-1)
        # verifier
        drafts = self.drafter.draft(mx.stop_gradient(parent).flatten(0, 1), 2)
        tokens, _, latents = (mx.unflatten(part, 0, text.shape[:2]) for part in drafts)
        whole, known, taken = accepted(tokens, text, best[:, ahead])  # (B, K, 2)
        real = self.verdict(parent[:, :, None], latents)
        strange = [states[:, others]]
        if group > 1:  # the same times of the next row
            groups = mx.unflatten(future, 0, (-1, group))
            strange.append(mx.roll(groups, 1, 1).flatten(0, 1))
        strange = mx.stack([self.verdict(parent, x) for x in strange], 1)
        true, fake = self.verdict(parent, future), mx.logaddexp(strange, 0.0)
        wrong = known * nn.losses.binary_cross_entropy(real, whole, reduction="none")
        wrong = mean(wrong) / mx.maximum(mean(known), 1e-6)

        terms = {"drafter": mean(nats), "jepa": (judge + endpoint) / 2,
                 "verifier": (wrong + mean(fake)) / 2}
        shown = {
            "first": mean(nats[..., 0]), "last": mean(nats[..., -1]),
            "judge": judge, "endpoint": endpoint, "spread": spread,
            "known": mean(known), "whole": mean(whole),
            "right": mean(known * ((real > 0) == (whole > 0))),
            "greedy_known": mean(known[..., 0]), "greedy_whole": mean(whole[..., 0]),
            "greedy_bytes": mean(taken[..., 0]),
            "told": (mean(true > 0) + mean(strange <= 0)) / 2,
        }
        return terms | {name: mx.stop_gradient(value) for name, value in shown.items()}

    def weights(self, progress: float) -> dict[str, float]:
        return {"drafter": self.args.drafter_weight, "jepa": self.args.jepa_weight,
                "verifier": self.args.verifier_weight}

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """drafter_*: nats a byte, of all slots, the first, the last. *_r2 of judge and endpoint
        latent, and latent_var, the variance of what they foresee. verifier_acc on labelled drafts
        and verifier_base, that of the better constant answer. Of greedy drafts draft_accepted, the
        accepted share of those whose end is known, draft_unknown, the share of the others, and
        draft_bytes, accepted bytes, as far as known. accept_acc, as published, is the mean
        share of true states that the verifier takes and of negatives that it does not."""
        if not means:
            return {}
        known, variance = max(means["known"], 1e-9), max(means["spread"], 1e-12)
        base = means["whole"] / known

        return {
            "drafter_loss": means["drafter"], "drafter_first": means["first"],
            "drafter_last": means["last"], "judge_mse": means["judge"],
            "judge_r2": 1 - means["judge"] / variance,
            "endpoint_r2": 1 - means["endpoint"] / variance,
            "latent_var": means["spread"], "verifier_loss": means["verifier"],
            "verifier_acc": means["right"] / known, "accept_acc": means["told"],
            "verifier_base": max(base, 1 - base), "draft_bytes": means["greedy_bytes"],
            "draft_accepted": means["greedy_whole"] / max(means["greedy_known"], 1e-9),
            "draft_unknown": 1 - means["greedy_known"],
        }


@check
def check_drafter(args: Hyperparameters) -> None:
    spare = args.drafter_dim % args.drafter_heads
    forbid(spare, args, "drafter_dim drafter_heads", "must be a multiple of the heads")
    too_long = args.block_size + 2 > args.train_seq_len
    forbid(too_long, args, "train_seq_len block_size", "a row must hold the drafted ids")


# -----------------------------------------------------------------------------
# MODEL
# -----------------------------------------------------------------------------


class RMSNorm(Module, nn.RMSNorm):
    """x / sqrt(mean(x^2) + 1e-6), times a learned gain a channel, in the dtype of the input."""

    def __init__(self, dim: int):
        super().__init__(dim, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return mx.fast.rms_norm(x, self.weight.astype(x.dtype), self.eps)


def rotary_tables(length: int, args: Hyperparameters) -> Tensor:
    """Periods of the rotated pairs of dimensions, in positions a radian: (r / 2,), r the rotated ones.

    From float64: nn.RoPE's are exponentials in fp32, whose last digits long rows multiply by
    thousands. Windows longer than TRAIN_SEQ_LEN grow the base by
    (length / train_seq_len)^(r / (r - 2)) (NTK scaling)."""
    dims = args.rope_dims or args.head_dim
    base = args.rope_base
    if length > args.train_seq_len and dims > 2:
        base *= (length / args.train_seq_len) ** (dims / (dims - 2))
    return mx.array((base ** (np.arange(0, dims, 2) / dims)).astype(np.float32))


def rotate(x: Tensor, rotary: Tensor, first: int | Tensor = 0) -> Tensor:
    """Half-split rotary on the first dimensions of x (B, H, T, d), whose positions begin at `first`,
    or are those (T,), B being 1; rotary as of `rotary_tables`. The torch script turns pairs the
    other way round than MLX: hence the sign."""
    each = isinstance(first, Tensor)
    x = x.swapaxes(0, 2) if each else x
    x = mx.fast.rope(x, 2 * rotary.size, traditional=False, base=None, scale=-1.0,
                     offset=first, freqs=rotary)
    return x.swapaxes(0, 2) if each else x


class KVCache:
    """What decoding goes on from: keys and values of a window's positions, states of its Mamba
    blocks.

    `rewind` takes positions back. Attention can forget any; a Mamba block only those whose states
    it kept: each one of the last read, if that had KEPT positions at most, else the one after."""

    KEPT = 64

    def __init__(self, model: GPT):
        args, self.dtype = model.args, model.dtype
        head_dim = args.model_dim // args.num_heads
        self.mambas = [block for block in model.blocks if isinstance(block, MambaBlock)]
        attentions = len(model.blocks) - len(self.mambas)
        shape = (1, args.num_heads, args.eval_seq_len, head_dim)
        self.layers = [[mx.zeros(shape, self.dtype)] * 2 for _ in range(attentions)]
        self.rewind(0)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values of new positions (1, K, n, d); returns those of all."""
        start, stop = mx.array([self.length]), self.length + k.shape[2]
        kept = [mx.slice_update(old, new, start, (2,))
                for old, new in zip(self.layers[layer], (k, v))]
        self.layers[layer] = kept
        return kept[0][:, :, :stop], kept[1][:, :, :stop]

    def resume(self, layer: int) -> tuple[Tensor, Tensor]:
        """Inputs of a Mamba block's convolution and its state, both after the last position."""
        mixed, states = self.tails[layer]
        return mixed[:, 1 - self.mambas[layer].taps :], states[-1]

    def keep(self, layer: int, mixed: Tensor, states: list[Tensor]) -> None:
        """mixed (1, taps - 1 + n, C), and n + 1 states, the first that after `first` positions."""
        self.tails[layer] = mixed, states

    def advance(self, count: int) -> None:
        """`count` positions have been read."""
        self.first = self.length if count <= self.KEPT else self.length + count
        self.length += count

    def gather(self, start: int, rows: list[int]) -> None:
        """Of what was read after `start` positions keeps only these rows: a path of a tree."""
        if rows != list(range(len(rows))):
            path, first = mx.array([start + row for row in rows]), mx.array([start])
            self.layers = [[mx.slice_update(x, x[:, :, path], first, (2,)) for x in pair]
                           for pair in self.layers]
        self.rewind(start + len(rows))

    def rewind(self, length: int) -> None:
        """Forgets all after the first `length` positions: 0, or any from `first` on."""
        if length == 0:
            starts = [block.start(1, self.dtype) for block in self.mambas]
            self.tails = [(tail, [state]) for tail, state in starts]
            self.first = self.length = 0
        elif not (self.first if self.mambas else 0) <= length <= self.length:
            raise ValueError(f"cannot go back to {length} of {self.length} positions, "
                             f"only to {self.first}")
        kept = length - self.first + 1
        self.tails = [(mixed[:, : block.taps - 2 + kept], states[:kept])
                      for block, (mixed, states) in zip(self.mambas, self.tails)]
        self.length = length


@check
def check_heads(args: Hyperparameters) -> None:
    head_dim, spare = args.head_dim, args.model_dim % args.num_heads
    forbid(spare, args, "model_dim num_heads", "must be a multiple of the heads")
    odd = args.positions == "rope" and head_dim % 2
    forbid(odd, args, "model_dim num_heads", f"a head's width, {head_dim}, must be even")
    unfit = args.rope_dims % 2 or args.rope_dims > head_dim
    forbid(unfit, args, "rope_dims num_heads", f"the first must be even, at most {head_dim}")


class CausalSelfAttention(Module):
    """Each head has keys and values of its own. `layer` counts the attentions of a stack; `rotary`
    holds the tables and the positions, as `rotate` takes them."""

    watch = None

    def __init__(self, dim: int, heads: int, layer: int, attention: str):
        super().__init__()
        self.layer = layer
        self.head_dim = dim // heads
        self.c_q = CastedLinear(dim, dim)
        self.c_k = CastedLinear(dim, dim)
        self.c_v = CastedLinear(dim, dim)
        self.proj = CastedLinear(dim, dim)
        self.attend = ATTENTION[attention]

    def forward(self, x: Tensor, rotary: tuple | None, mask=None, past=None) -> Tensor:
        if self.watch is not None:
            self.watch(x)
        layers = self.c_q, self.c_k, self.c_v
        weight = mx.concatenate([layer.weight for layer in layers])
        parts = mx.split(x @ weight.astype(x.dtype).T, 3, axis=-1)  # one wide product
        q, k, v = (mx.unflatten(part, -1, (-1, self.head_dim)).swapaxes(1, 2) for part in parts)
        if rotary is not None:  # (B, H, T, d)
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if past is not None:
            k, v = past.extend(self.layer, k, v)
        y = self.attend(q, k, v, mask)
        return self.proj(y.swapaxes(1, 2).flatten(2))


class MLP(Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = CastedLinear(dim, hidden)
        self.up = CastedLinear(dim, hidden)
        self.proj = CastedLinear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(silu(self.gate(x)) * self.up(x))


class Block(Module):
    def __init__(self, dim: int, heads: int, hidden: int, layer: int, attention: str):
        super().__init__()
        self.attn_norm = RMSNorm(dim)
        self.attn = CausalSelfAttention(dim, heads, layer, attention)
        self.mlp_norm = RMSNorm(dim)
        self.mlp = MLP(dim, hidden)

    def forward(self, x: Tensor, rotary: tuple | None, mask=None, past=None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rotary, mask, past)
        return x + self.mlp(self.mlp_norm(x))


def ssd_steps(x: Tensor, dt: Tensor, rate: Tensor, write: Tensor, read: Tensor,
              state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The recurrence itself, from `state` on: S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t =
    S_t C_t.

    x (B, T, H, P), dt (B, T, H), A = rate (H,) < 0, B and C = write and read (B, T, N), state
    (B, H, P, N), all fp32 -> y (B, T, H, P), and the states before the first position and after
    each."""
    fall = mx.exp(dt * rate)[..., None, None]
    new = mx.einsum("bth,bthp,btn->bthpn", dt, x, write)
    states = [state]
    for t in range(x.shape[1]):
        states.append(new[:, t] + fall[:, t] * states[-1])
    return mx.einsum("bthpn,btn->bthp", mx.stack(states[1:], 1), read), states


def decay(sums: Tensor) -> Tensor:
    """sums (..., n) -> (..., n, n): exp(sums_t - sums_s) for s <= t, else 0."""
    past = mx.tri(sums.shape[-1], dtype=mx.bool_)
    return mx.exp(mx.where(past, sums[..., None] - sums[..., None, :], -mx.inf))


def ssd(x: Tensor, dt: Tensor, rate: Tensor, write: Tensor, read: Tensor, state: Tensor,
        size: int) -> tuple[Tensor, Tensor]:
    """`ssd_steps` in chunks of `size` positions, all at once (Dao & Gu 2024, section 6) -> y, the
    last state.

    With c_t the sum of log decays from a chunk's start to t, y_t = exp(c_t) S C_t + sum_{s<=t}
    exp(c_t - c_s) (C_t . B_s) dt_s x_s, where S, the state before the chunk, sums over the chunks
    before."""
    length = x.shape[1]

    def chunks(part: Tensor) -> Tensor:
        """(B, T, ...) -> (B, C, L, ...); the last chunk is filled with 0: dt 0 changes nothing."""
        padding = [(0, 0), (0, -length % size)] + [(0, 0)] * (part.ndim - 2)
        return mx.unflatten(mx.pad(part, padding), 1, (-1, size))

    x, dt, write, read = (chunks(part) for part in (dt[..., None] * x, dt, write, read))
    x = x.swapaxes(2, 3)  # (B, C, H, L, P)
    log = (dt * rate).swapaxes(2, 3).cumsum(-1)  # (B, C, H, L)
    ends = mx.pad(log[..., -1].cumsum(1), ((0, 0), (1, 0), (0, 0))).swapaxes(1, 2)  # (B, H, C + 1)
    # states before each chunk, and after the last
    left = mx.exp(log[..., -1:] - log)[..., None] * x  # of each input at its chunk's end
    sums = mx.concatenate((state[:, None], mx.einsum("bchlp,bcln->bchpn", left, write)), 1)
    states = mx.einsum("bhzc,bchpn->bzhpn", decay(ends), sums)
    # outputs, from the own chunk and from those before
    y = ((read @ write.swapaxes(2, 3))[:, :, None] * decay(log)) @ x
    before = mx.einsum("bcln,bchpn->bchlp", read, states[:, :-1])
    y = y + mx.exp(log)[..., None] * before
    return y.swapaxes(2, 3).flatten(1, 2)[:, :length], states[:, -1]


class MambaBlock(Module):
    """A whole block of Mamba-2: (z, x, B, C, dt) = W_in RMSNorm(u); x, B and C through a causal
    convolution and silu; the recurrence of `ssd_steps` and a skip D x; u + W_out RMSNorm(y silu(z)).

    dt = softplus(. + bias) starts log-uniform in [1e-3, 0.1], A in -[1, 16], as Mamba-2 has it."""

    def __init__(self, args: Hyperparameters, layer: int):
        super().__init__()
        inner, state = args.mamba_expand * args.model_dim, args.mamba_state
        self.layer, self.chunk = layer, args.mamba_chunk_size
        self.taps = args.mamba_d_conv
        self.heads = inner // args.mamba_head_dim
        self.widths = (inner, inner + 2 * state)  # of z; of x, B and C
        self.state_shape = self.heads, args.mamba_head_dim, state

        self.norm = RMSNorm(args.model_dim)
        self.in_proj = CastedLinear(args.model_dim, sum(self.widths) + self.heads)
        self.conv_weight = mx.zeros((self.widths[1], self.taps))
        self.conv_bias = mx.zeros(self.widths[1])
        self.dt_bias = mx.ones(self.heads)
        self.A_log = mx.ones(self.heads)
        self.D = mx.ones(self.heads)
        self.out_norm = RMSNorm(inner)
        self.out_proj = CastedLinear(inner, args.model_dim)

    def forward(self, x: Tensor, rotary: tuple | None, mask=None, past=None) -> Tensor:
        width, mixed_width = self.widths
        edges = width, width + mixed_width
        z, mixed, dt = mx.split(self.in_proj(self.norm(x)), edges, axis=-1)
        tail, state = past.resume(self.layer) if past else self.start(len(x), x.dtype)
        mixed = mx.concatenate((tail, mixed), 1)  # (B, taps - 1 + T, I + 2N)
        weight = self.conv_weight[..., None].astype(x.dtype)
        bias = self.conv_bias.astype(x.dtype)
        seen = silu(mx.conv1d(mixed, weight, groups=mixed_width) + bias).astype(mx.float32)
        inner, write, read = mx.split(seen, (width, width + self.state_shape[2]), axis=-1)
        inner = mx.unflatten(inner, -1, self.state_shape[:2])  # (B, T, H, P)

        dt = mx.logaddexp(dt.astype(mx.float32) + self.dt_bias, 0.0)
        parts = inner, dt, -mx.exp(self.A_log), write, read, state
        if past and x.shape[1] <= past.KEPT:
            y, states = ssd_steps(*parts)
            past.keep(self.layer, mixed, states)
        else:
            y, state = ssd(*parts, min(self.chunk, x.shape[1]))
            if past:
                past.keep(self.layer, mixed[:, -self.taps + 1 :], [state])
        y = (y + self.D[:, None] * inner).flatten(2).astype(x.dtype)
        return x + self.out_proj(self.out_norm(y * silu(z)))

    def start(self, batch: int, dtype: mx.Dtype) -> tuple[Tensor, Tensor]:
        """(inputs of the convolution before the first position, state), all 0."""
        tail = mx.zeros((batch, self.taps - 1, self.widths[1]), dtype)
        return tail, mx.zeros((batch, *self.state_shape))


@check
def check_mamba(args: Hyperparameters) -> None:
    inner = args.mamba_expand * args.model_dim
    spare = args.attn_every_n > 1 and inner % args.mamba_head_dim
    forbid(spare, args, "model_dim mamba_expand mamba_head_dim", f"whole heads in {inner} channels")


@check
def check_positions(args: Hyperparameters) -> None:
    learned = args.positions == "learned"
    too_long = learned and args.train_seq_len > args.max_seq_len
    forbid(too_long, args, "train_seq_len max_seq_len", "the table of positions is shorter")
    untrained = learned and args.eval_seq_len > args.train_seq_len
    forbid(untrained, args, "eval_seq_len train_seq_len",
           "learned positions end with the training row; POSITIONS=rope goes on")


class GPT(Module):
    """The network: `losses` gives all loss terms of a batch in one forward, `logits` scores.
    """

    def __init__(self, args: Hyperparameters, attention: str = "sdpa", dtype=mx.float32):
        super().__init__()
        self.args, self.dtype = args, dtype
        dim = args.model_dim
        layers = args.num_layers if args.arch == "sgjm" else args.baseline_layers
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        learned = args.positions == "learned"
        self.pos_emb = nn.Embedding(args.max_seq_len, dim) if learned else None
        # each nth block attends
        self.blocks = []
        attentions = 0
        for i in range(layers):
            if (i + 1) % args.attn_every_n == 0:
                block = Block(dim, args.num_heads, args.ff_dim, attentions, attention)
                self.blocks.append(block)
                attentions += 1
            else:
                self.blocks.append(MambaBlock(args, i - attentions))
        self.norm = RMSNorm(dim)
        self.aux = SpeculativeHeads(args) if args.arch == "sgjm" else None
        self.set_rotary()

    def set_rotary(self) -> None:
        """Tables for training and scoring windows, which may have different lengths; or None."""
        self.rotary_train = self.rotary_eval = None
        if self.pos_emb is None:
            self.rotary_train = rotary_tables(self.args.train_seq_len, self.args)
            self.rotary_eval = rotary_tables(self.args.eval_seq_len, self.args)
            self.freeze(recurse=False, keys=["rotary_train", "rotary_eval"])

    def init_weights(self, seed: int) -> None:
        """Normal matrices and embeddings, as published; Mamba's own tensors as in Mamba-2. The
        heads come last: the backbone is the same without them."""
        mx.random.seed(seed)
        found = {}
        for name, p in self.named_parameters().items():
            kind = name.rpartition(".")[2]
            if kind == "A_log":
                found[name] = mx.log(mx.random.uniform(1, 16, p.shape))
            elif kind == "dt_bias":
                dt = mx.exp(mx.random.uniform(math.log(1e-3), math.log(0.1), p.shape))
                found[name] = dt + mx.log(-mx.expm1(-dt))  # the inverse of softplus
            elif kind == "conv_weight":
                bound = p.shape[1] ** -0.5
                found[name] = mx.random.uniform(-bound, bound, p.shape)
            elif p.ndim == 2:
                found[name] = mx.random.normal(p.shape, scale=self.args.init_std)

        update_parameters(self, found)
        mx.eval(self.parameters())

    def hidden(self, ids: Tensor, rotary: Tensor | None, past: KVCache | None = None,
               tree: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """ids (B, T) -> states (B, T, D), as the head reads them, normalised.

        With `past`, ids (1, n) are those that follow it. With `tree`, each sees only its own path:
        depths (n,) from 0, and who sees whom (n, n)."""
        known = past.length if past else 0
        if tree is None:
            first, positions = known, slice(known, known + ids.shape[1])
        else:
            first = positions = known + tree[0]
        x = self.tok_emb.weight[ids]
        if self.pos_emb is not None:
            x = x + self.pos_emb.weight[positions]
        x = x.astype(self.dtype)

        mask = self.attention_mask(ids, past, tree)
        rotary = None if rotary is None else (rotary, first)
        for block in self.blocks:
            x = block(x, rotary, mask, past)
        if past:
            past.advance(ids.shape[1])
        return self.norm(x)

    def attention_mask(self, ids: Tensor, past: KVCache | None, tree: tuple | None):
        """The `mask` of the attention rungs: None where plain causal attention is wanted, which
        here holds for the last positions of a window, too."""
        if past is None or tree is None:
            return None
        return mx.pad(tree[1], ((0, 0), (past.length, 0)), constant_values=True)[None, None]

    def exported(self) -> dict[str, Tensor]:
        """Parameters that scoring needs, by name; the heads with EXPORT_HEADS=1."""
        named, heads = self.named_parameters().items(), self.args.export_heads
        return {name: p for name, p in named if heads or not name.startswith("aux.")}

    def head(self, x: Tensor) -> Tensor:
        """States -> logits in fp32."""
        return (x @ self.tok_emb.weight.astype(x.dtype).T).astype(mx.float32)

    def losses(self, ids: Tensor, weights: Tensor, aux_inputs=None) -> dict[str, Tensor]:
        """ids (B, T + 1), weights (B,) -> weighted sums: "ce", nats of all targets, other terms."""
        x, terms = self.hidden(ids[:, :-1], self.rotary_train), {}
        logits = self.head(x)
        nats = nn.losses.cross_entropy(logits, ids[:, 1:])
        sums = {"ce": (nats.sum(1) * weights).sum()}
        if aux_inputs is not None:
            best = mx.stop_gradient(logits).argmax(-1)
            terms = self.aux(x, best, ids, aux_inputs)
        for name, value in terms.items():  # one value a group, whose weights are equal
            sums[name] = (value * weights.reshape(len(value), -1).mean(1)).sum()
        return sums

    def gradients(self, params: dict[str, Tensor], shares: dict[str, Tensor], ids: Tensor,
                  weights: Tensor, aux_inputs: Tensor | None) -> tuple[dict, dict]:
        """(sums of `losses`, {name: gradient of the sums, each times its share, for `params`}), fp32.
        A term without a share, not one with a share of 0, costs no backward."""
        def weighted(params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            update_parameters(self, params)
            sums = self.losses(ids, weights, aux_inputs)
            return sum(share * sums[name] for name, share in shares.items()), sums
        (_, sums), found = mx.value_and_grad(weighted)(params)
        update_parameters(self, params)
        return sums, found

    def logits(self, ids: Tensor, first: Tensor, span: int) -> Tensor:
        """fp32 (B, span, V) of positions first[b] ... first[b] + span - 1 in row b of ids (B, T)."""
        x = self.hidden(ids, self.rotary_eval)
        positions = first[:, None] + mx.arange(span)
        x = mx.take_along_axis(x, positions[..., None], axis=1)
        return self.head(x.astype(mx.float32))


# Functions of the class: a compiled graph takes their place where it pays.
training_gradients, scoring_logits = GPT.gradients, GPT.logits


# -----------------------------------------------------------------------------
# OPTIMIZERS
# -----------------------------------------------------------------------------


def rate_at(progress: float, args: Hyperparameters) -> float:
    """Share of the peak rate at `progress` in [0, 1]: it rises over LR_WARMUP_STEPS; then it is flat
    and falls in a line, or falls as a cosine does, to MIN_LR at 1.

    Progress is max(step share, time share), so the rate ends at its floor whichever limit
    ends the run (#832 stopped at 17 % of its peak, defect A4)."""
    rise, fall = args.lr_warmup_steps / args.iterations, args.warmdown_iters / args.iterations
    if progress < rise:
        return min(1.0, (progress + 1 / args.iterations) / rise)
    left = min(1.0, (1.0 - progress) / fall) if fall else 1.0
    if args.lr_schedule == "cosine":
        left = 0.5 + 0.5 * math.cos(math.pi * (progress - rise) / max(1.0 - rise, 1e-9))
    return args.min_lr + (1.0 - args.min_lr) * max(0.0, left)


def newton_schulz(matrices: Tensor, steps: int, dtype: mx.Dtype) -> Tensor:
    """Each of (n, r, c) becomes about U V^T of its SVD: the quintic iteration of Muon (K. Jordan)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.swapaxes(1, 2) if tall else matrices).astype(dtype)
    x = x / (mx.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.swapaxes(1, 2)
        polynomial = mx.addmm(gram, gram, gram, beta=b, alpha=c)
        x = mx.addmm(x, polynomial, x, beta=a)
    return (x.swapaxes(1, 2) if tall else x).astype(mx.float32)


class Muon:
    """Momentum, then orthogonalisation: the update's singular values are near 1.

    Matrices of equal shape form one stack; every rank works on all of them.
    update = NS(g + mu m), m <- mu m + g;
    p <- (1 - rate wd) p - rate sqrt(max(1, r / c)) update.
    By hand, since mlx.optimizers.Muon weighs the gradient by 1 - mu, which is another method
    while mu warms up, adds the decay to the gradient instead of the weight, and takes one
    matrix at a time."""

    def __init__(self, params: dict[str, Tensor], args: Hyperparameters, dtype: mx.Dtype):
        self.args = args
        self.dtype = mx.bfloat16 if dtype == mx.bfloat16 else mx.float32
        shapes = dict.fromkeys(p.shape for p in params.values())
        stacks = [[name for name, p in params.items() if p.shape == shape]
                  for shape in shapes]
        self.stacks = sorted(stacks, key=lambda names: -len(names) * params[names[0]].size)

    def step(self, params: dict, grads: dict, state: dict, rate: Tensor, momentum: Tensor) -> dict:
        """The weights after a step; `state` is brought forward in place."""
        found = {}
        for i, members in enumerate(self.stacks):
            share = mx.stack([grads[name] for name in members])
            buffer = momentum * state[f"muon.{i}"] + share
            state[f"muon.{i}"] = buffer
            share = share + momentum * buffer
            update = newton_schulz(share, self.args.muon_backend_steps, self.dtype)
            factor = max(1.0, share.shape[1] / share.shape[2]) ** 0.5
            for name, part in zip(members, update):
                kept = (1 - rate * self.args.muon_wd) * params[name]
                found[name] = kept - rate * factor * part
        return found

    def state(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Momenta before the first step."""
        return {f"muon.{i}": mx.zeros((len(members), *params[members[0]].shape))
                for i, members in enumerate(self.stacks)}


class Optimizers:
    """Every optimizer: one step for all of them, and what a checkpoint needs.

    group    parameters                                       optimizer  rate
    matrix   2-D weights of blocks and heads                  Muon       MATRIX_LR
    embed    embeddings of bytes and positions, the drafter's AdamW      TIED_EMBED_LR
    scalar   norms, biases, convolutions, A_log, D            AdamW      SCALAR_LR, no decay

    Backbone and heads are two parts, each with stacks and a gradient norm of its own: with
    HEADS_GRAD=0 the backbone's weights do not depend on whether there are heads.

    `moments`, the state of all of them, has the names that the torch script's checkpoints give."""

    GROUPS = ("matrix", "embed", "scalar")

    def __init__(self, model: GPT, args: Hyperparameters, runtime: Runtime):
        self.args, self.runtime, self.model = args, runtime, model
        params = model.named_parameters()
        parts: dict[bool, dict[str, list[str]]] = {}
        for name, p in params.items():
            fresh = {group: [] for group in self.GROUPS}
            groups = parts.setdefault(name.startswith("aux."), fresh)
            groups[self.group_of(name, p)].append(name)
        self.muons = []
        for groups in parts.values():
            matrices = {name: params[name] for name in groups["matrix"]}
            self.muons.append(Muon(matrices, args, runtime.dtype))
        self.muon = self.muons[0]

        rates = {"embed": (args.tied_embed_lr, args.adam_wd), "scalar": (args.scalar_lr, 0.0)}
        betas = [args.beta1, args.beta2]
        self.adam = []  # (AdamW, its peak rate, names)
        for groups in parts.values():
            for group, (rate, decay) in rates.items():
                adam = optim.AdamW(rate, betas, args.adam_eps, decay, bias_correction=True)
                self.adam.append((adam, rate, groups[group]))
        self.order = [name for *_, names in self.adam for name in names]  # AdamW's
        self.parts = [[name for names in groups.values() for name in names]
                      for groups in parts.values()]
        self.apply = mx.compile(self.update) if runtime.compile else self.update
        self.fresh()

    def fresh(self) -> None:
        """Moments as before the first step."""
        params = self.model.named_parameters()
        self.moments = {}
        for i, muon in enumerate(self.muons):
            self.moments |= {f"part{i}.{key}": value for key, value in muon.state(params).items()}
        for i, name in enumerate(self.order):
            self.moments[f"adam.{i}.step"] = mx.zeros(())
            for key in ("exp_avg", "exp_avg_sq"):
                self.moments[f"adam.{i}.{key}"] = mx.zeros_like(params[name])

    @staticmethod
    def group_of(name: str, p: Tensor) -> str:
        if "_emb" in name:
            return "embed"
        return "matrix" if p.ndim == 2 and name.endswith(".weight") else "scalar"

    def reduce(self, grads: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """All gradients, summed over ranks, and the norm of each part (before clipping)."""
        grads = self.runtime.sum_arrays(grads)
        squares = [sum(grads[name].square().sum() for name in part) for part in self.parts]
        return grads, mx.sqrt(mx.stack(squares))

    def step(self, step: int, progress: float, grads: dict[str, Tensor], norm: Tensor) -> None:
        args = self.args
        rate = rate_at(progress, args)
        warm = min(1.0, step / max(args.muon_momentum_warmup_steps, 1e-9))
        momentum = (1 - warm) * args.muon_momentum_warmup_start + warm * args.muon_momentum
        numbers = {"norm": norm, "matrix": mx.array(args.matrix_lr * rate),
                   "momentum": mx.array(momentum),
                   "adam": [mx.array(peak * rate) for _, peak, _ in self.adam]}
        params, self.moments = self.apply(
            self.model.named_parameters(), grads, self.moments, numbers)
        update_parameters(self.model, params)

    def update(self, params: dict, grads: dict, moments: dict, numbers: dict) -> tuple[dict, dict]:
        """(weights, moments) after a step: a function of only arrays, to be compiled."""
        moments, found = dict(moments), {}
        longest = self.args.grad_clip_norm or math.inf
        clips = mx.minimum(longest / (numbers["norm"] + 1e-6), 1.0)
        grads = {name: clips[i] * grads[name]
                 for i, part in enumerate(self.parts) for name in part}
        for i, muon in enumerate(self.muons):
            state = {key.removeprefix(f"part{i}."): value for key, value in moments.items()}
            found |= muon.step(params, grads, state, numbers["matrix"], numbers["momentum"])
            mine = [key for key in moments if key.startswith(f"part{i}.")]
            moments |= {key: state[key.removeprefix(f"part{i}.")] for key in mine}

        for (adam, _, names), rate in zip(self.adam, numbers["adam"]):
            keys = {name: f"adam.{self.order.index(name)}" for name in names}
            # MLX's state of a group, from the torch script's names and back
            adam.state = {"step": moments[f"{keys[names[0]]}.step"], "learning_rate": rate}
            for name, key in keys.items():
                mean, square = (moments[f"{key}.{part}"] for part in ("exp_avg", "exp_avg_sq"))
                adam.state[name] = {"m": mean, "v": square}
            mine = {name: grads[name] for name in keys}
            theirs = {name: params[name] for name in keys}
            found |= adam.apply_gradients(mine, theirs)
            for name, key in keys.items():
                moments[f"{key}.step"] = adam.state["step"]
                moments[f"{key}.exp_avg"] = adam.state[name]["m"]
                moments[f"{key}.exp_avg_sq"] = adam.state[name]["v"]
        return found, moments

    def state(self) -> dict[str, Tensor]:
        """Every tensor of every optimizer, by name."""
        return self.moments

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.moments = {name: state[name] for name in self.moments}


class EMA:
    """fp32 average of the weights; decay min(EMA_DECAY, (1 + t) / (10 + t)): it forgets the init.
    """

    def __init__(self, model: GPT, decay: float):
        self.decay = decay
        self.model = model
        self.average = model.named_parameters()

    def update(self, step: int) -> None:
        share = 1.0 - min(self.decay, (1 + step) / (10 + step))
        live = self.model.named_parameters()
        for name, old in self.average.items():
            self.average[name] = old + share * (live[name] - old)

    def apply(self) -> None:
        """From here on the model holds the average."""
        update_parameters(self.model, self.average)


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
    """Layout of the raw payload: quantised tensors, then low and high bytes of all fp16 numbers."""
    found, halves = [], 0
    for name, shape, bits, axis in entries:
        slices = math.prod(shape) // (shape[axis] if bits else 1)
        halves += slices
        if bits:
            top = 2 ** (bits - 1) - 1
            period = slices if len(shape) < 3 else shape[-1]
            found.append(Plane(f"{tensor_class(name)}{bits}", top, slices, shape[axis], period))
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


def size_plan(model: GPT, args: Hyperparameters) -> dict[str, int]:
    """Bytes of the artifact by tensor class, before training: the entropy of a rounded normal."""
    plan = dict.fromkeys(TENSOR_CLASSES, 0)
    for name, p in model.exported().items():
        kind = tensor_class(name)
        bits, axis = quant_plan(name, p.shape, args)
        weight_bits = 16.0
        if bits:
            top = 2 ** (bits - 1) - 1
            k = args.k_by_class[kind]
            edges = [(i + 0.5) * k / top / math.sqrt(2) for i in range(-top, top)]
            shares = np.diff([0, *(0.5 + 0.5 * math.erf(edge) for edge in edges), 1]) + 1e-30
            entropy = -(shares * np.log2(shares)).sum()
            weight_bits = entropy + 16 / p.shape[axis]
        plan[kind] += int(p.size * weight_bits / 8)
    return plan


def pack(tensors: dict, args: Hyperparameters, hessians: dict | None = None) -> bytes:
    """{name: float array} -> a file: quantised by `quant_plan`, compressed in `planes`' order.
    `hessians` {name: (C, C)} of the matrices that GPTQ is to round."""
    entries, codes, halves = [], [], []
    for name, half in tensors.items():
        kind = tensor_class(name)
        bits, axis = quant_plan(name, half.shape, args)
        entries.append([name, list(half.shape), bits, axis])
        if bits:  # only its steps stay fp16
            hessian = (hessians or {}).get(name)
            q, half = quantise(half, bits, args.k_by_class[kind], axis, hessian)
            codes.append(np.moveaxis(q, axis, -1).tobytes())
        halves.append(np.asarray(half, dtype="<f2").reshape(-1))
    raw = b"".join(codes) + np.concatenate(halves).view(np.uint8).reshape(-1, 2).T.tobytes()

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
    counts = [math.prod(shape) // (shape[axis] if bits else 1) for _, shape, bits, axis in entries]
    tensors = {}
    for (name, shape, bits, axis), numbers in zip(entries, np.split(halves, np.cumsum(counts))):
        numbers = numbers.astype(np.float32)
        if bits:
            q = codes.pop(0).reshape([*shape[:axis], *shape[axis + 1 :], shape[axis]])
            numbers = np.moveaxis(q * numbers.reshape([*q.shape[:-1], 1]), -1, axis)
        tensors[name] = np.ascontiguousarray(numbers.reshape(shape))
    return tensors


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


def read_checkpoint(path: str | Path, variable: str, parts: tuple = ("",)) -> tuple[dict, dict]:
    """(metadata, {name: array} of the names that begin with one of `parts`) of a checkpoint."""
    try:
        with safe_open(path, "np") as file:
            meta = json.loads((file.metadata() or {})["golf"])
            names = [key for key in file.keys() if key.startswith(parts)]  # noqa: SIM118
            return meta, {key: mx.array(file.get_tensor(key)) for key in names}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{variable}={path}: not a checkpoint of this script ({error})") from None


def settings_of(path: str | Path, environ: dict[str, str] | None = None,
                variable: str = "ARTIFACT") -> Hyperparameters:
    """The settings in an artifact or a checkpoint, with what `environ` may change."""
    if Path(path).suffix == ".safetensors":
        header, _ = read_checkpoint(path, variable, ())
        config = header["config"]  # which also says how it was trained
        names = [var.name for var in Hyperparameters.vars().values() if var.ship]
        header["config"] = {name: config[name] for name in names if name in config}
    else:
        header, _ = unpack(read_file(path, variable), str(path))
    return shipped_settings(header, str(path), environ)


def load(artifact_path: str | Path, device="cpu", args: Hyperparameters | None = None,
         dtype: mx.Dtype = mx.float32, attention: str = "sdpa") -> GPT:
    """The model of an artifact (heads only with EXPORT_HEADS=1) or of a checkpoint (its average, if
    it has one); `args` may change how it scores."""
    trained = Path(artifact_path).suffix == ".safetensors"
    if trained:
        _, state = read_checkpoint(artifact_path, "checkpoint", ("model.", "ema."))
        kind = "ema." if any(key.startswith("ema.") for key in state) else "model."
        found = {key.removeprefix(kind): x for key, x in state.items() if key.startswith(kind)}
        args = args or settings_of(artifact_path)
    else:
        header, tensors = unpack(read_file(artifact_path, "ARTIFACT"), str(artifact_path))
        args = args or shipped_settings(header, str(artifact_path))
        found = {name: mx.array(array) for name, array in tensors.items()}
    # the tensors become weights
    mx.set_default_device(pick_device(device) if isinstance(device, str) else device)
    model = GPT(args, attention, dtype)
    named = model.named_parameters() if trained else model.exported()
    wanted = {(name, tuple(p.shape)) for name, p in named.items()}
    if odd := wanted ^ {(name, tuple(x.shape)) for name, x in found.items()}:
        raise UserError(f"{artifact_path}: its tensors do not fit its config, first {min(odd)}")
    update_parameters(model, found)
    if not (trained or args.export_heads):
        model.aux = None
    return model


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


class WindowPlan(namedtuple("WindowPlan", "length stride batch rank ranks", defaults=(0, 1))):
    """How a text is read: windows of `length` ids for `stride` targets each, `batch` a forward, and
    of these a rank's share."""

    def tensors(self, ids: np.ndarray, rows: np.ndarray) -> list[Tensor]:
        """Inputs (batch, length), first scored positions (batch,) and targets (batch, stride) of a
        batch. One shape, whatever the text: compiled once."""
        inputs = np.full((self.batch, self.length), PAD_ID, np.int32)
        position = np.zeros(self.batch, np.int32)
        targets = np.zeros((self.batch, min(self.stride, self.length)), np.int32)
        for i, (start, first, stop) in enumerate(rows):
            text = ids[start : min(start + self.length, len(ids) - 1)]
            inputs[i, : len(text)] = text
            position[i] = first - start
            targets[i, : stop - first] = ids[first + 1 : stop + 1]
        return [mx.array(x) for x in (inputs, position, targets)]


def scored(model: GPT, ids: np.ndarray, plan: WindowPlan, logits=scoring_logits):
    """Yields (first, stop, fp32 log-probabilities (n, V), nats (n,)) of each block of n targets.

    This is the only path from weights to a score."""
    rows = windows(len(ids) - 1, plan.length, plan.stride)
    for number in range(plan.rank, -(-len(rows) // plan.batch), plan.ranks):
        batch = rows[number * plan.batch : (number + 1) * plan.batch]
        inputs, position, targets = plan.tensors(ids, batch)
        logprobs = log_softmax(logits(model, inputs, position, targets.shape[1]))
        found = mx.take_along_axis(logprobs, targets[..., None], axis=-1)
        nats = -found.squeeze(-1)
        mx.eval(nats, logprobs)  # now, or graphs of earlier windows stay in memory
        nats = np.array(nats).astype(np.float64)
        for i, (_, first, stop) in enumerate(batch):
            yield first, stop, logprobs[i, : stop - first], nats[i, : stop - first]


def score(model: GPT, ids, positions=()) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """(nats of each target ids[1:], {t: log-probabilities (V,) at target t, for t in positions})."""
    args, ids, wanted = model.args, np.asarray(ids), set(positions)
    blocks = -(-len(ids) // args.eval_stride)  # a short text needs no full batch
    batch = max(1, min(args.eval_batch_tokens // args.eval_seq_len, blocks))
    plan = WindowPlan(args.eval_seq_len, args.eval_stride, batch)
    nats, vectors = np.zeros(max(len(ids) - 1, 0)), {}
    for first, stop, logprobs, part in scored(model, ids, plan):
        nats[first:stop] = part
        vectors |= {t: np.array(logprobs[t - first]) for t in wanted if first <= t < stop}
    return nats, vectors


class Evaluator:
    """Scores models on the validation stream: a line in the log, an entry in `metrics.json` a pass.
    """

    def __init__(self, args: Hyperparameters, data: Dataset, runtime: Runtime, log: Log):
        self.args, self.runtime, self.log = args, runtime, log
        self.logits = scoring_logits
        self.classes = class_table(args.vocab_size)
        self.results = {}
        # VAL_BYTES cuts the text after the target that reaches it
        ids = data.val
        sizes = target_bytes(ids, byte_tables(args))
        self.prefix = args.val_bytes if args.val_bytes < sizes.sum() else 0
        if self.prefix:
            targets = int(np.searchsorted(np.cumsum(sizes), args.val_bytes)) + 1
            ids, sizes = ids[: targets + 1], sizes[:targets]
        self.ids = ids
        self.bytes = int(sizes.sum())
        if not self.bytes:
            raise UserError(f"{data.val_files[0]}: its targets stand for no byte")

    def describe(self, manifest: dict) -> str:
        original = manifest.get("val_bytes") or self.bytes
        note = ""
        if self.prefix:
            note = f" prefix:{self.prefix}"
        elif original != self.bytes:
            note = f" (original text {original}: normalised, the targets' own bytes divide)"
        return f"val: targets:{len(self.ids) - 1} bytes:{self.bytes}{note}"

    def run(self, name: str, model: GPT, length: int, stride: int) -> dict:
        """val_bpb = nats / ln 2 / bytes: special ids cost nats and add no byte."""
        args, runtime, began = self.args, self.runtime, time.perf_counter()
        classes = len(BYTE_CLASSES)
        sums = np.zeros(classes + 1)  # nats by class, and targets
        # every target once
        batch = max(1, args.eval_batch_tokens // length)
        plan = WindowPlan(length, stride, batch, runtime.rank, runtime.world_size)
        blocks = scored(model, self.ids, plan, self.logits)
        count = len(self.ids) // (stride * runtime.world_size)
        for first, stop, _, nats in progress_bar(blocks, count, name, runtime.main):
            found = self.classes[self.ids[first + 1 : stop + 1]]
            sums[:-1] += np.bincount(found, nats, minlength=classes)
            sums[-1] += stop - first
        targets, sums = len(self.ids) - 1, runtime.all_reduce(sums)
        assert int(sums[-1]) == targets, f"{name}: scored {int(sums[-1])} targets of {targets}"
        nats = float(sums[:-1].sum())
        by_class = zip(BYTE_CLASSES, sums.tolist())
        bits = {label: total / math.log(2) for label, total in by_class if total}
        result = {"val_loss": nats / targets, "val_bpb": nats / math.log(2) / self.bytes,
                  "targets": targets, "bytes": self.bytes, "seconds": time.perf_counter() - began,
                  "seq_len": length, "stride": stride, "bits_by_class": bits}
        result |= {"prefix_bytes": self.prefix} if self.prefix else {}
        self.results[name] = result
        return result

    def report(self, name: str, model: GPT, stride: int | None = None) -> dict:
        """Runs a pass, prints its line; without a stride windows do not overlap."""
        length = self.args.eval_seq_len
        result = self.run(name, model, length, stride or length)
        extra = f" stride:{stride}" if stride else ""
        extra += f" prefix:{self.prefix}" if self.prefix else ""
        loss, bpb = result["val_loss"], result["val_bpb"]
        self.log(f"{name} val_loss:{loss:.4f} val_bpb:{bpb:.4f}{extra} "
                 f"targets:{result['targets']} bytes:{result['bytes']} "
                 f"eval_time:{1e3 * result['seconds']:.0f}ms")
        self.log(f"{name}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
        return result


# -----------------------------------------------------------------------------
# GENERATION
# -----------------------------------------------------------------------------


class Stream:
    """The scorer, one id at a time, for a decoder to follow: it reads the same windows as `score`
    and keeps what is known of the window at hand; pushed ids are read together when it is asked."""

    def __init__(self, model: GPT):
        self.model, self.ids = model, []
        self.start = 0  # where the window at hand begins
        self.past = KVCache(model)
        self.known = None  # log-probabilities of the next id

    def logprobs(self) -> np.ndarray:
        """fp32 log-probabilities (V,) of the next id. Push the first one, a BOS."""
        if not self.ids:
            raise ValueError("push the first id (BOS) before asking for the second")
        if self.known is not None:
            return self.known
        args = self.model.args
        block = (len(self.ids) - 1) // args.eval_stride
        start = max((block + 1) * args.eval_stride - args.eval_seq_len, 0)
        if start != self.start:
            self.start = start
            self.past.rewind(0)
        ids = mx.array([self.ids[start + self.past.length :]], mx.int32)
        x = self.model.hidden(ids, self.model.rotary_eval, self.past)
        self.known = np.array(log_softmax(self.model.head(x[0, -1].astype(mx.float32))))
        return self.known

    def push(self, token: int) -> None:
        self.ids.append(int(token))
        self.known = None


stream = Stream  # the family's name for it


class Draft:
    """A node of the speculation graph: `ids` drafted to follow `parent`, None for the text; as in
    that, an id is a character. `start` is the length of its true prefix.

    Of each id: the law that it was drawn with (V,), or None; the drafter's log-probability; its
    kind, the key of `Generator.rates`. Of its end: what the heads think of it, its signature."""

    def __init__(self, parent: Draft | None, start: int, ids: str, laws: list, logs: list[float],
                 kinds: list[tuple[str, int]], bonus: float = 0.0, bits: int | None = None):
        self.parent, self.ids = parent, ids
        self.start, self.end = start, start + len(ids)
        self.laws, self.logs, self.kinds = laws, logs, kinds
        self.bonus, self.bits = bonus, bits
        self.state, self.score = "created", 0.0
        self.alias = None  # the better draft that it merged with
        self.path: list[Place] = []  # in the tree of a pass, from the place before it

    def through(self, text: str) -> str:
        """The text as it would be with the draft."""
        before = self.parent.through(text) if self.parent else text[: self.start]
        return before + self.ids


class SpeculationGraph:
    """Drafts ahead of a text, and which of them a pass of the backbone reads.

    created -> scored -> verified | pruned | merged -> committed | expired, or, still ahead, scored
    again. Two drafts merge if they end at the same length in latents whose signatures (SimHash,
    Charikar 2002: signs of 64 products with Gaussian vectors) differ in few bits: the better one is
    read, the other points to it and keeps its own prefix. Edges lead to longer prefixes, pointers
    to equal ones: no cycle. (Published: nodes forget what came before them, merging drops bytes,
    and one can merge with its own ancestor.)"""

    AFTER = {
        "created": ("scored",), "scored": ("verified", "pruned", "merged"),
        **dict.fromkeys(("verified", "pruned", "merged"), ("scored", "committed", "expired")),
        "committed": (), "expired": (),
    }

    def __init__(self, dim: int, keep: int, radius: int):
        self.planes = np.random.default_rng(42).standard_normal((dim, 64), np.float32)
        self.keep, self.radius = keep, radius
        self.alive: list[Draft] = []  # elder ones first
        self.counts = dict.fromkeys(self.AFTER, 0)  # how often a draft came into a state

    def add(self, *fields) -> Draft:
        self.alive.append(Draft(*fields))
        self.counts["created"] += 1
        return self.alive[-1]

    def move(self, draft: Draft, state: str) -> None:
        assert state in self.AFTER[draft.state], f"{draft.state} -> {state}"
        draft.state = state
        self.counts[state] += 1

    def signatures(self, latents: np.ndarray) -> list[int]:
        """latents (n, D) -> 64 bits each."""
        signs = latents @ self.planes >= 0
        return np.packbits(signs, axis=1).view(">u8")[:, 0].tolist()

    def alike(self, a: Draft, b: Draft) -> bool:
        if a.end != b.end or None in (a.bits, b.bits):
            return False
        return (a.bits ^ b.bits).bit_count() <= self.radius

    def choose(self, length: int) -> list[Draft]:
        """The best drafts ahead of a text of `length` ids, without those that look like a better
        one; what is left of older drafts takes no new one's place."""
        for draft in self.alive:
            self.move(draft, "scored")
            before = draft.parent.score if draft.start > length else 0.0
            ahead = draft.logs[max(length - draft.start, 0) :]
            draft.score = before + sum(ahead) + draft.bonus

        kept: list[Draft] = []
        for draft in sorted(self.alive, key=lambda draft: -draft.score):
            better = (other for other in kept if self.alike(other, draft))
            draft.alias = next(better, None)
            fresh = sum(other.start >= length for other in kept)
            if draft.alias is not None:
                self.move(draft, "merged")
            elif draft.start < length or fresh < self.keep:
                kept.append(draft)
            else:
                self.move(draft, "pruned")
        return kept

    def settle(self, text: str) -> None:
        """What the text has taken as a whole is committed, what it went away from expires."""
        for draft in self.alive:
            orphan = draft.parent and draft.parent.state == "expired"
            if orphan or not draft.ids.startswith(text[draft.start : draft.end]):
                self.move(draft, "expired")
            elif draft.end <= len(text):
                self.move(draft, "committed")
        self.alive = [draft for draft in self.alive if self.AFTER[draft.state]]


class Place:
    """An id in the tree of a pass: its root is the last id of the text, drafts with a common
    prefix share it.

    `offers` are the ids drafted to follow it, in the order of drawing: (id, law, kind)."""

    def __init__(self, token: int, above: Place | None = None):
        self.id, self.above = token, above
        self.depth = above.depth + 1 if above else 0
        self.row = -1  # not read
        self.chance = float(above is None)  # that the text comes by
        self.children: dict[int, Place] = {}
        self.offers: list[tuple] = []
        self.drafters: set[str] = set()  # who offered it

    def offer(self, token: int, law: np.ndarray | None, kind: tuple, rate: float) -> Place:
        """`token` may follow, and does so at this rate: its place."""
        self.offers.append((token, law, kind))
        child = self.children.setdefault(token, Place(token, self))
        child.chance = max(child.chance, self.chance * rate)
        child.drafters.add(kind[0])
        return child


def tree_mask(read: list[Place]) -> tuple[Tensor, Tensor] | None:
    """(depths (n,), who sees whom (n, n)) of places in the order of rows; None for a chain."""
    if read[-1].depth == len(read) - 1:
        return None
    sees = np.eye(len(read), dtype=bool)
    for place in read[1:]:
        sees[place.row] |= sees[place.above.row]
    return mx.array([place.depth for place in read]), mx.array(sees)


def repeated(text: str, limit: int) -> tuple[int, str]:
    """Prompt lookup: (length, from 3 to 32, of the longest end of `text` that stands in it before;
    `limit` characters that followed the last time), or (0, "")."""
    low, high = 3, min(32, len(text) - 1)
    length, after = 0, 0
    while low <= high:  # a text with a long end twice has each shorter one twice
        n = (low + high) // 2
        found = text.rfind(text[-n:], 0, -1)
        if found < 0:
            high = n - 1
        else:
            low = n + 1
            length, after = n, found + n
    if not length:
        return 0, ""
    period = len(text) - after  # where it is shorter than `limit`, the text goes round
    return length, (text[after:] * (limit // period + 1))[:limit]


def nucleus(p: np.ndarray, share: float) -> np.ndarray:
    """p (V,) of the fewest ids that have this share of it together, 0 for the others (top-p:
    Holtzman et al. 2020)."""
    order = np.argsort(-p, kind="stable")
    likelier = p[order].cumsum() - p[order]
    kept = np.zeros(len(p), bool)
    kept[order] = likelier < share * p.sum()
    return np.where(kept, p, 0.0)


def chosen(p: np.ndarray, offers: list[tuple], rng: np.random.Generator) -> int:
    """An id with probabilities p (V,), one of `offers` if it can be: (id, law, ...), as drawn.

    Rejection, offer by offer (Leviathan et al. 2023; for trees Miao et al. 2024): x, drawn with q,
    is taken with probability min(1, p(x) / q(x)); else p becomes (p - q)+, normalised. The law of a
    draw without replacement is q without its elder siblings; None, no draw at all, has q(x) = 1."""
    for token, law, *_ in offers:
        q = 1.0 if law is None else law[token]
        if rng.random() * q < p[token]:
            return token
        if law is None:
            p = np.where(np.arange(len(p)) == token, 0.0, p)
        else:
            p = np.maximum(p - law, 0.0)
        if not p.any():  # p was q, but for rounding
            return token
        p = p / p.sum()

    sums = p.cumsum()
    return int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))


def drafting_cost(model: GPT) -> float:
    """Of drafts by the heads, in plain steps: weights read, and a million for each layer called."""
    args, heads = model.args, model.aux
    drafter, all_heads, whole = (
        sum(math.prod(p.shape) for p in dict(part.named_parameters()).values())
        for part in (heads.drafter, heads, model))
    calls = args.block_size * args.drafter_layers + 2  # judge, verifier
    draft = (args.block_size - 1) * drafter + all_heads + 1e6 * calls
    return draft / (whole - all_heads + 1e6 * len(model.blocks))


class Generator:
    """Goes on from a text. A pass of the backbone reads its last id and drafts after it; those that
    it would have written itself join the text, and then the id that it predicts: the heads draft
    what follows that one. When the window is full, its last half is read again.

    At temperature 0 the text is that of decoding without drafts, above it has the same
    distribution, whatever is read: ids drawn to follow a prefix are put to the test in the order of
    drawing when the text reaches that prefix, be it some passes later. (Forgetting what was not read
    would favour what the graph prefers.) Drafts are read where that pays, by how their kinds fared
    of late; heads that do not, draft ever less often. No clock decides: one seed, one text."""

    def __init__(self, model: GPT, ids: list[int], seed: int, speculate: bool, temperature: float,
                 top_p: float = 1.0):
        args = model.args
        self.model, self.args = model, args
        self.temperature, self.top_p = temperature, top_p
        self.text = "".join(map(chr, ids))
        self.past, self.window = KVCache(model), args.eval_seq_len
        self.start = 0  # where the window begins in the text
        self.state = None  # of the place before the last id
        self.rng = np.random.default_rng(seed)
        self.noise = np.random.default_rng([seed, 1])
        self.graph = SpeculationGraph(args.model_dim, args.keep_top_k, args.merge_radius)

        by_heads = speculate and args.drafter != "suffix" and args.block_size > 1
        self.heads = model.aux if by_heads else None
        self.suffix = speculate and args.drafter != "heads"
        self.rates = {("heads", i): (i + 0.5) / 8 for i in range(8)}
        self.rates |= {("suffix", i): 1 - 0.5 / (i + 1) for i in range(8)}
        self.tests = dict.fromkeys(self.rates, 0)
        self.worth = 1.0  # plain steps that a draft by the heads wins
        self.cost = args.draft_price * drafting_cost(model) if self.heads else 0.0
        self.byte_cost = args.draft_price * (0.2 if self.past.mambas else 0.02 * model.dtype.size)
        self.pause, self.due = 64, 0  # passes that heads wait; their next
        self.read, self.taken = np.zeros((2, args.draft_budget + 1), np.int64)  # by depth of drafts
        self.gaps: dict[int, float] = {}  # at temperature 0: {place: best logit - the second}

    def grow(self, count: int):
        """Yields `count` ids more, pass by pass."""
        stop = len(self.text) + count
        while (length := len(self.text)) < stop:
            self.step(stop - length)
            yield self.text[length:]

    def write(self, count: int) -> str:
        return "".join(self.grow(count))

    def states(self, ids: list[int], tree: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(n, D) of ids that follow the cache, which takes them up."""
        ids = mx.array([ids], mx.int32)
        return self.model.hidden(ids, self.model.rotary_eval, self.past, tree)[0]

    def catch_up(self) -> None:
        """Reads all before the last id that is not in the cache."""
        while len(self.text) - 1 - self.start >= self.window:
            self.start += self.window - self.window // 2
            self.past.rewind(0)
        if missing := self.text[self.start + self.past.length : -1]:
            self.state = self.states(list(map(ord, missing)))[-1:]

    def step(self, left: int) -> None:
        """One pass: from 1 to `left` ids."""
        self.catch_up()
        known = self.past.length
        read = self.plan(min(left, self.window - known))
        x = self.states([place.id for place in read], tree_mask(read))
        path = self.walk(read[0], np.array(self.model.head(x)))
        self.past.gather(known, path)
        self.graph.settle(self.text)
        self.state = x[path[-1] : path[-1] + 1]
        self.read[: 1 + max(place.depth for place in read)] += 1
        self.taken[: len(path)] += 1

    def plan(self, most: int) -> list[Place]:
        """What a pass for at most `most` ids reads, by rows: the last id, and drafts."""
        args, length = self.args, len(self.text)
        ends = [draft.end for draft in self.graph.alive if draft.kinds[0][0] == "suffix"]
        if self.suffix and most > 1 and max(ends, default=0) < length + args.draft_budget // 2:
            self.look_up(None)
        due = self.worth >= self.cost or self.read[0] >= self.due
        self.tried = self.heads is not None and self.state is not None and most > 1 and due
        if self.tried:
            self.draft(length)

        root = self.tree(length)
        kept = self.graph.choose(length)
        paths = kept[:1] if self.past.mambas else kept  # Mamba's states follow a chain
        read = self.rows(root, paths, most)
        if sum(place.chance for place in read[1:]) < self.byte_cost * (len(read) + 1):
            read, root.children = [root], {}  # any draft costs two bytes more
        self.spent = self.byte_cost * sum(place.drafters == {"heads"} for place in read)
        for draft in kept:
            self.graph.move(draft, "verified" if draft.path[-1] in read else "pruned")
        return read

    def tree(self, length: int) -> Place:
        """The tree of all drafts ahead -> its root, the last id."""
        root = Place(ord(self.text[-1]))
        for draft in self.graph.alive:
            draft.path = [root if draft.start <= length else draft.parent.path[-1]]
            parts = list(zip(map(ord, draft.ids), draft.laws, draft.kinds))
            for token, law, kind in parts[max(length - draft.start, 0) :]:
                draft.path.append(draft.path[-1].offer(token, law, kind, self.rates[kind]))
        return root

    def rows(self, root: Place, drafts: list[Draft], most: int) -> list[Place]:
        """Gives rows to the root and to places that are likely enough."""
        args, length = self.args, len(self.text)
        root.row, read = 0, [root]
        room = min(args.draft_budget + 1, self.window - self.past.length)
        for draft in drafts:
            before = draft.parent.path if draft.start > length else []
            for place in [*before, *draft.path]:
                if place.row >= 0:
                    continue
                if len(read) == room or place.depth == most or place.chance < self.byte_cost:
                    break
                place.row = len(read)
                read.append(place)
        return read

    def draft(self, length: int) -> None:
        """Adds the heads' blocks to the graph, and what the best of them calls up."""
        args = self.args
        last = mx.array([[ord(self.text[-1])]], mx.int32)
        found = self.heads.drafter.draft(
            self.state, args.draft_branches, self.temperature, self.noise, last)
        ends = found[2][0]
        kinds = mx.int32, mx.float32, mx.float32
        parts = (np.array(part[0].astype(kind)) for part, kind in zip(found, kinds))
        tokens, logprobs, latents = parts  # (k, b), (k, b, V), (k, D)
        logs = np.take_along_axis(logprobs, tokens[..., None], -1)[:, 1:, 0].tolist()
        laws = np.exp(logprobs[:, 1:].astype(np.float64))
        for i, law in enumerate(laws[:, 0]):  # drawn without replacement
            law[tokens[:i, 1]] = 0.0
        laws /= laws.sum(-1, keepdims=True)

        foreseen = (self.heads.judge(self.state) - ends).astype(mx.float32).square().mean(-1)
        verdict = -mx.logaddexp(-self.heads.verdict(self.state, ends), 0.0)
        bonus = verdict - args.judge_weight * foreseen
        kinds = [[("heads", min(int(8 * math.exp(log)), 7)) for log in row] for row in logs]
        blocks = ["".join(map(chr, block)) for block in tokens[:, 1:].tolist()]
        parts = zip(blocks, map(list, laws), logs, kinds, bonus.tolist(),
                    self.graph.signatures(latents))
        drafts = [self.graph.add(None, length, *part) for part in parts]
        if self.suffix:
            self.look_up(max(drafts, key=lambda draft: sum(draft.logs) + draft.bonus))

    def look_up(self, parent: Draft | None) -> None:
        """Adds what followed the same end before, of the text or of the text with a draft."""
        text = self.text if parent is None else parent.through(self.text)
        match, ids = repeated(text, self.args.draft_budget)
        kinds = [("suffix", min((match + i - 3) // 4, 7)) for i in range(len(ids))]
        if ids:
            logs = [math.log(max(self.rates[kind], 1e-9)) for kind in kinds]
            self.graph.add(parent, len(text), ids, [None] * len(ids), logs, kinds)

    def walk(self, place: Place | None, logits: np.ndarray) -> list[int]:
        """Adds to the text what the backbone takes, and the id after it -> their rows."""
        path, won = [], 0
        while place is not None and place.row >= 0:
            path.append(place.row)
            scores, offers = logits[place.row], place.offers
            if self.temperature:
                p = np.exp((scores - scores.max()).astype(np.float64) / self.temperature)
                if self.top_p < 1:
                    p = nucleus(p, self.top_p)
                token = chosen(p / p.sum(), offers, self.rng)
            else:
                token = int(scores.argmax())
                second, best = np.partition(scores, -2)[-2:]
                self.gaps[len(self.text)] = float(best - second)

            for drafted, _, kind in offers:  # what a rate began with counts as two tests
                self.tests[kind] += 1
                off = (drafted == token) - self.rates[kind]
                self.rates[kind] += max(1 / (self.tests[kind] + 2), 0.05) * off
            self.text += chr(token)
            place = place.children.get(token)
            won += place is not None and place.row >= 0 and place.drafters == {"heads"}
        if self.tried:
            self.worth += 0.2 * (won - self.spent - self.worth)
            self.pause = 64 if self.worth >= self.cost else min(2 * self.pause, 1024)
            self.due = self.read[0] + self.pause
        return path


# -----------------------------------------------------------------------------
# TRAINING
# -----------------------------------------------------------------------------


class Stopped(Exception):
    """SIGTERM or Ctrl-C: a checkpoint is written, a message tells how to go on."""


def run_folder(args: Hyperparameters) -> Path:
    return Path(args.runs_path) / args.run_id


def torch_rng_state(seed: int) -> np.ndarray:
    """The bytes of torch.get_rng_state() after manual_seed(seed), (5056,) uint8: the trunk asks for
    them. The seed, numbers left, "seeded", the next number's place, 624 words of MT19937, and 40
    bytes of spare normals."""
    words = np.random.RandomState(seed % 2**32).get_state()[1]
    head = np.array([seed % 2**64], "<u8"), np.array([1, 1, 0, 0], "<i4")
    parts = *head, words.astype("<u8"), np.zeros(40, np.uint8)
    return np.concatenate([part.view(np.uint8) for part in parts])


@check
def check_calibration(args: Hyperparameters) -> None:
    limited = args.quant_round == "gptq" and args.max_wallclock_seconds and not args.eval_only
    untimed = limited and not args.warmup_steps
    forbid(untimed, args, "quant_round max_wallclock_seconds warmup_steps",
           "gptq with a time limit needs WARMUP_STEPS >= 1: warm-up times the calibration")


class Trainer:
    """All that a checkpoint holds, and one step of training."""

    CHECKPOINTED = ("step", "seconds", "best", "loader_state", "text")

    def __init__(self, args: Hyperparameters, data: Dataset, runtime: Runtime, log: Log):
        self.args, self.data, self.runtime, self.log = args, data, runtime, log
        self.plan = BatchPlan.make(args, runtime.world_size)
        self.model = GPT(args, runtime.attention, runtime.dtype)
        self.model.init_weights(args.seed)

        self.gradients, self.logits = training_gradients, scoring_logits
        if runtime.compile:
            self.gradients = compiled(training_gradients)
            self.logits = compiled(scoring_logits)
        self.loader_state, self.text = None, data and data.fingerprint()["sha256"]
        self.signal = 0
        self.step, self.seconds, self.best = 0, 0.0, math.inf  # resumed runs included
        self.slowest = 0.0  # seconds of the slowest step, slowly forgotten
        self.reserve = 0.0  # seconds that calibration will take of the training clock
        self.unwritten: list[tuple] = []  # steps whose losses are still to be written
        self.optimizers = Optimizers(self.model, args, runtime)
        self.fresh_optimizers()

    def fresh_optimizers(self) -> None:
        self.optimizers.fresh()
        self.ema = EMA(self.model, self.args.ema_decay)

    def micro_step(self, ids: Tensor, weights: Tensor, term_weights: dict, aux_inputs) -> tuple:
        """Sums and gradients; gradients add up to those of the global batch's mean."""
        groups = self.plan.rows // self.plan.group
        shares = {"ce": self.args.token_weight / (self.plan.rows * self.args.train_seq_len)}
        for name, weight in term_weights.items():
            if weight:
                shares[name] = weight / groups
        shares = {name: mx.array(share) for name, share in shares.items()}
        params = self.model.named_parameters()
        return self.gradients(self.model, params, shares, ids, weights, aux_inputs)

    def train_step(self, ids: Tensor, weights: Tensor, progress: float) -> dict[str, float]:
        """One optimizer step on a global batch; returns this rank's share of each summed term.

        Every micro-batch is computed before the next one's graph is made: the memory of one."""
        term_weights, aux_inputs = {}, None
        if self.model.aux is not None:
            term_weights |= self.model.aux.weights(progress)
            aux_inputs = self.model.aux.inputs(self.step)

        sums, grads = [], {}
        for batch in zip(ids, weights):
            part, more = self.micro_step(*batch, term_weights, aux_inputs)
            for name, grad in more.items():
                grads[name] = grads[name] + grad if name in grads else grad
            mx.eval(grads, part)
            sums.append(part)
        grads, norm = self.optimizers.reduce(grads)
        self.optimizers.step(self.step, progress, grads, norm)
        self.ema.update(self.step)
        mx.eval(self.model.parameters(), self.optimizers.state(), self.ema.average)
        return {name: sum(part[name].item() for part in sums) for name in sums[0]}

    def warm_up(self) -> None:
        """Compiles every shape on made-up ids, then puts all back bit for bit."""
        if not self.args.warmup_steps:
            return
        kept = self.model.named_parameters()
        try:
            self.try_shapes()
        except Exception as error:  # whatever the compiler refused runs without it
            if not self.runtime.compile:
                raise
            self.log(f"compile: failed ({type(error).__name__}), running eager")
            self.gradients, self.logits = training_gradients, scoring_logits
            self.optimizers.apply = self.optimizers.update
            self.try_shapes()
        update_parameters(self.model, kept)
        self.fresh_optimizers()

    def try_shapes(self) -> None:
        args, generator = self.args, np.random.default_rng(0)
        rows = self.plan.groups * self.plan.group
        shape = (self.plan.micro_steps, rows, args.train_seq_len + 1)
        for _ in range(args.warmup_steps):
            ids = generator.integers(BYTE_OFFSET, args.vocab_size, shape, np.int32)
            ids = mx.array(ids)
            self.train_step(ids, mx.ones(shape[:2]), 0.0)
        # scoring shapes: one window, and the sliding ones
        length = args.eval_seq_len
        for stride in sorted({length, args.eval_stride}):
            plan = WindowPlan(length, stride, max(1, args.eval_batch_tokens // length))
            list(scored(self.model, np.full(2, BOS_ID), plan, self.logits))
        if args.quant_round == "gptq":
            for _ in range(2):  # the second time counts
                start = time.perf_counter()
                self.input_moments(ids, {})
                seconds = 1.25 * args.gptq_batches * (time.perf_counter() - start)
                self.reserve, = self.runtime.from_main([seconds])

    def input_moments(self, batch: Tensor, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds X^T X of every matrix's inputs to `sums` {name: (C, C)}."""
        def add(names: list[str], x: Tensor) -> None:
            x = x.flatten(0, -2).astype(mx.float32)
            product = x.T @ x
            for name in names:
                sums[name] = sums.get(name, 0) + product

        readers = {CastedLinear: ("",), CausalSelfAttention: ("c_q.", "c_k.", "c_v.")}
        for path, module in self.model.named_modules():
            if names := [f"{path}.{part}weight" for part in readers.get(type(module), ())]:
                module.watch = lambda x, names=names: add(names, x)
        for ids in batch:
            x = self.model.hidden(ids[:, :-1], self.model.rotary_train)
            add(["tok_emb.weight"], x)
            mx.eval(sums)
        for module in self.model.modules():
            module.watch = None
        return sums

    def calibrate(self) -> dict[str, np.ndarray]:
        """Hessians for GPTQ from the next GPTQ_BATCHES training batches, on the training clock."""
        start, sums = time.perf_counter(), {}
        batches = Loader(self.data, self.args, self.plan, self.runtime.rank, self.loader_state)
        for _ in range(self.args.gptq_batches):
            ids, _, _ = batches.next()
            self.input_moments(mx.array(ids), sums)
        sums = self.runtime.sum_arrays(sums)
        self.seconds, = self.runtime.from_main([self.seconds + time.perf_counter() - start])
        return {name: np.array(total) for name, total in sums.items()}

    def progress(self) -> float:
        """Share of the run that is done, of its steps or seconds. Time for calibration and three
        steps as slow as the slowest late one stays unused: nothing may end after the limit."""
        done = self.step / self.args.iterations
        if self.args.max_wallclock_seconds:
            usable = self.args.max_wallclock_seconds - 3 * self.slowest - self.reserve
            done = max(done, self.seconds / max(usable, 1e-9))
        return min(1.0, done)

    def agree_on_time(self, now: float) -> None:
        """Takes rank 0's clock and signal; raises Stopped on every rank at the same step."""
        slowest = max(now - self.seconds, 0.99 * self.slowest)
        agreed = self.runtime.from_main([now, slowest, float(self.signal)])
        self.seconds, self.slowest, stop = agreed
        if stop:
            self.write_steps()
            raise Stopped(int(stop))

    def run(self, evaluator: Evaluator) -> None:
        """Trains until progress is 1 or a signal comes. The clock runs here, but for validation."""
        args, runtime = self.args, self.runtime
        loader = Loader(self.data, args, self.plan, runtime.rank, self.loader_state)
        first_bad = math.inf  # step of a non-finite loss
        started = time.perf_counter() - self.seconds

        def due(every: int) -> bool:
            return every > 0 and self.step % every == 0

        with contextlib.closing(loader.prefetch()) as batches:
            while True:
                self.agree_on_time(time.perf_counter() - started)
                if (progress := self.progress()) >= 1.0:
                    break
                ids, weights, state = next(batches)
                terms = self.train_step(ids, weights, progress)
                self.step, self.loader_state = self.step + 1, state
                if not math.isfinite(terms["ce"]):
                    first_bad = min(first_bad, self.step)
                # ranks sum their losses only when a line is shown
                edge = self.step <= 10 or self.step == args.iterations
                shown = edge or due(args.train_log_every)
                if shown or due(max(1, args.iterations // 400)):  # a smooth curve
                    now = time.perf_counter() - started
                    memory = runtime.peak_memory_mb(since_last=True)
                    self.unwritten.append((self.step, now, progress, terms, memory))
                if shown or due(args.checkpoint_every):
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

        self.refuse_non_finite(first_bad)
        self.seconds, = runtime.from_main([time.perf_counter() - started])
        runtime.clocks["training"] = self.seconds
        self.write_steps()

    def refuse_non_finite(self, first_bad: float) -> None:
        step = float(self.runtime.all_reduce(first_bad, np.min))
        if step <= self.step:
            raise self.not_finite(int(step), "the loss")

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
        parts = [step[3][name] for step in self.unwritten for name in sorted(step[3])]
        values = deque(self.runtime.all_reduce(parts).tolist())
        for step, seconds, progress, terms, memory in self.unwritten:
            sums = {name: values.popleft() for name in sorted(terms)}
            line = {"step": step, **self.means(sums)}
            line |= {"train_seconds": seconds, "progress": progress}
            line["rate"] = rate_at(progress, self.args)
            self.log.metrics(**line, peak_mem_mb=memory)
        self.unwritten.clear()
        return line

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Terms of a step, summed over ranks -> what its line says."""
        groups = self.plan.rows // self.plan.group
        means = {name: total / groups for name, total in sums.items()}
        line = {"train_loss": means.pop("ce") / (self.plan.group * self.args.train_seq_len)}
        if self.model.aux is not None:
            line |= self.model.aux.report(means)
        return line

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
        """All that a run needs to go on from here, under the trunk's names: one file, atomically.
        Every draw has the step or the place in its key: `rng.cpu` is there for torch."""
        tensors = {f"model.{key}": p for key, p in self.model.named_parameters().items()}
        tensors |= {f"ema.{key}": p for key, p in self.ema.average.items()}
        tensors |= self.optimizers.state()
        tensors = {key: np.array(value) for key, value in tensors.items()}
        tensors["rng.cpu"] = torch_rng_state(self.args.seed)

        for key, value in tensors.items():  # a loss tells only of the weights before its step
            if not np.isfinite(value).all():
                raise self.not_finite(self.step, key)
        if self.runtime.main:
            meta = {key: getattr(self, key) for key in self.CHECKPOINTED}
            meta["config"] = self.args.learning() | self.args.shipped()
            blob = safetensors_bytes(tensors, {"golf": json.dumps(meta)})
            write_atomic(run_folder(self.args) / f"{name}.safetensors", blob)
            config = json.dumps(self.args.settings(), indent=1)  # for people
            write_atomic(run_folder(self.args) / "config.json", config.encode())

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
        """Goes on from a checkpoint, of the torch script too."""
        meta, state = read_checkpoint(path, "RESUME")
        self._check_resumed(path, meta)
        names = list(self.model.named_parameters())
        update_parameters(self.model, {name: state[f"model.{name}"] for name in names})
        self.ema.average = {name: state[f"ema.{name}"] for name in names}
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
    log(f"python:{platform.python_version()} mlx:{mx.__version__} numpy:{np.__version__} "
        f"commit:{git_commit()}")
    for line in [*runtime.notes, runtime.describe()]:
        log(line)
    log("settings " + json.dumps(args.settings()), console=False)
    log("data " + json.dumps(fingerprint))


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
        tensors = {name: np.array(p) for name, p in trainer.model.exported().items()}
        artifact = run_folder(args) / "artifact.bin"
        if runtime.main:
            write_atomic(artifact, pack(tensors, args, hessians))
        runtime.all_reduce(0)  # the others wait for the file
    shipped = sum(map(np.size, tensors.values()))
    trainer.log(f"artifact:{artifact} bytes:{artifact.stat().st_size} parameters:{shipped}")
    return artifact, shipped


def train(args: Hyperparameters, data: Dataset, runtime: Runtime, log: Log,
          evaluator: Evaluator) -> dict:
    """Training, scores of raw and averaged weights, the artifact -> entries of `metrics.json`."""
    trainer = Trainer(args, data, runtime, log)
    plan, named = trainer.plan, trainer.model.named_parameters()
    params = sum(p.size for p in named.values())
    log(f"model_params:{params} world_size:{runtime.world_size} micro_steps:{plan.micro_steps} "
        f"micro_batch_rows:{plan.groups * plan.group} seed:{args.seed}")
    sizes, code = size_plan(trainer.model, args), len(Path(__file__).read_bytes())
    log(f"size_plan:{sum(sizes.values())} + code:{code} of {args.artifact_budget_bytes} bytes: "
        + " ".join(f"{kind}:{size}" for kind, size in sizes.items()))
    planned = sum(sizes.values()) + code
    forbid(0 < args.artifact_budget_bytes < 0.9 * planned, args, "artifact_budget_bytes",
           f"code and artifact would take about {planned:,} bytes; 0 = no limit")
    # compile off the clock, then train
    with runtime.clock("warm-up"):
        trainer.warm_up()
    evaluator.logits = trainer.logits
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
    model = load(path, runtime.device, args, runtime.dtype, runtime.attention)
    label = f"final_int{args.bits_by_class['mlp']}"
    evaluator.report(f"{label}_roundtrip", model)
    evaluator.report(f"{label}_sliding", model, args.eval_stride)


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
        "mlx": mx.__version__, "clocks": runtime.clocks, "broken_budgets": broken,
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
    runtime = None
    try:
        if sys.argv[1:]:
            raise UserError(f"{sys.argv[1]!r}: settings are environment variables, see --help")
        args = Hyperparameters(os.environ)
        if args.eval_only:
            header, _ = unpack(read_file(args.artifact, "ARTIFACT"), args.artifact)
            args = shipped_settings(header, args.artifact, os.environ)
        runtime = Runtime(args)
        runtime.attention = pick_attention(args, runtime.dtype)
        started, = runtime.from_main([time.time()])
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(started))
        args.run_id = args.run_id or f"{stamp}-seed{args.seed}"
        data = Dataset(args, verify=runtime.main)
        log = Log(run_folder(args) if runtime.main else None)
        fingerprint = data.fingerprint()
        same = {name: value for name, value in args.settings().items()
                if not re.search("PATH|RANK|MASTER|RUN_ID|ARTIFACT$", name)}
        runtime.agree("settings or text", [same, fingerprint["sha256"]])
        log_header(log, args, runtime, fingerprint)
        evaluator = Evaluator(args, data, runtime, log)
        log(evaluator.describe(data.manifest))

        summary = {"artifact": args.artifact, "dataset": fingerprint}
        if not args.eval_only:
            summary |= train(args, data, runtime, log, evaluator)
        with runtime.clock("evaluation"):
            score_artifact(summary["artifact"], args, runtime, evaluator)
        return finish(args, runtime, log, evaluator, summary) if runtime.main else 0
    except UserError as error:
        several = runtime is not None and runtime.world_size > 1
        print((f"rank {runtime.rank}: " if several else "") + f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        return 128 + stopped.args[0]


if __name__ == "__main__":
    sys.exit(main())
