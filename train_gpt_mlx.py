"""The trunk's twin for Apple Silicon: the same model, optimizers, artifact and scores in MLX.

Parent: train_gpt.py, symbol by symbol: `python scripts/lineage.py diff . train_gpt_mlx.py`.
Idea:   the same numbers on another framework: checkpoints, artifacts and settings go both ways.
        Arrays are values here: losses and updates are functions of the weights, and `mx.compile`
        takes them as they are.

Run:    python train_gpt_mlx.py --help                       every variable and its reason
        python train_gpt_mlx.py                              one process, Metal or CPU
        mlx.launch --hosts IP,IP python train_gpt_mlx.py     several Macs, the same batches
        RESUME=auto RUN_ID=name python train_gpt_mlx.py      go on with a run
        EVAL_ONLY=1 ARTIFACT=FILE python train_gpt_mlx.py    score an artifact of either script
        python scripts/generate.py FILE TEXT                 what an artifact writes

The file reads downwards: environment -> batches -> losses -> weights -> artifact -> bits. It needs
mlx, numpy and safetensors, and uses constriction and sentencepiece if they are installed.
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


TENSOR_CLASSES = ("embed", "ngram", "attn", "mlp", "other")

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
    tokenizer_path = Var("", "SentencePiece .model; byte260 has none")
    vocab_size = Var(260, "ids; 260 = 4 special ones + 256 bytes", 5, 65536, ship="model")
    train_seq_len = Var(4096, "tokens a training row", 2, ship="model")
    train_batch_tokens = Var(393216, "tokens an optimizer step, over all ranks", 2)
    device_batch_tokens = Var(49152, "tokens a forward: the out-of-memory knob", 1)
    train_order = Var("sequential", "of rows in an epoch", choices=("sequential", "shuffled"))
    verify_data = Var("auto", "by manifest.json; auto: up to 2 GB", choices=("auto", "0", "1"))

    _model = "Model"
    num_layers = Var(13, "transformer blocks", 1, ship="model")
    model_dim = Var(512, "width of the residual stream", 8, ship="model")
    num_heads = Var(4, "query heads", 1, ship="model")
    num_kv_heads = Var(2, "key/value heads (GQA)", 1, ship="model")
    mlp_mult = Var(3.5, "MLP hidden width / model width", 0, ship="model")
    leaky_slope = Var(0.5, "slope of the squared LeakyReLU; 0 = ReLU^2", ship="model")
    tied_embed_init_std = Var(0.005, "std of the token embedding, also the head", 0)
    logit_softcap = Var(30.0, "cap * tanh(logits / cap); 0 = none", 0, ship="model")
    qk_gain_init = Var(1.5, "initial gain a head on normalised queries", ship="model")
    rope_base = Var(10000.0, "rotary base", 1, ship="model")
    rope_dims = Var(16, "rotated dimensions a head; 0 = all (#315)", 0, ship="model")
    ln_scale = Var(True, "block inputs times 1/sqrt(layer + 1) (#315)", ship="model")
    doc_mask = Var(False, "attention stays in a document", ship="model")
    attn_window = Var(1024, "ids a windowed layer sees", 1, ship="model")
    attn_window_layers = Var("", "layers with a window: 0,1,3; empty = none", ship="model")
    xsa_last_n = Var(4, "last layers that drop their own value (XSA, #265)", 0, ship="model")
    unet_skips = Var(True, "later blocks add earlier outputs", ship="model")
    resid_mix = Var(True, "blocks mix in the embedding", ship="model")
    smear_gate = Var(True, "blend each embedding with the one before", ship="model")
    ngram_orders = Var("0", "lengths of hashed contexts; 0 = none", ship="model")
    ngram_words = Var(2, "1 = the word so far, 2 = and the one before", 0, 2, ship="model")
    ngram_buckets = Var(65536, "rows of each table", 2, ship="model")
    ngram_dim = Var(32, "width of a context's embedding", 1, ship="model")
    ngram_hashes = Var(2, "tables, each a hash", 1, 4, ship="model")
    draft = Var(0, "ids that draft heads guess; 0 = none", 0, 16, ship="model")

    _jepa = "Chunk JEPA (#832, corrected)"
    jepa_chunk_size = Var(8, "ids a latent covers; 0 = no JEPA at all", 0, ship="model")
    jepa_latent_dim = Var(256, "width of a chunk latent", 1, ship="model")
    jepa_proj_hidden = Var(256, "hidden width of the two MLPs", 1, ship="model")
    jepa_sigreg_weight = Var(0.02, "SIGReg's weight in the JEPA loss", 0)
    jepa_sigreg_projs = Var(256, "random directions, fresh each step", 1)
    jepa_sigreg_knots = Var(17, "points of its characteristic function", 2)
    jepa_sigreg_group = Var(4, "sequences pooled into one SIGReg statistic", 1)
    jepa_lambda_max = Var(0.001, "peak weight of the JEPA loss beside CE", 0)
    jepa_phase1_frac = Var(0.3, "progress up to which its weight is 0", 0, 1)
    jepa_phase2_frac = Var(0.5, "share over which it ramps up, then 0", 0, 1)

    _optimizers = "Optimizers and schedule"
    iterations = Var(9000, "optimizer steps at most", 1)
    max_wallclock_seconds = Var(600.0, "training time; 0 = no limit", 0)
    warmdown_iters = Var(3000, "steps over which the rate falls", 0)
    min_lr = Var(0.0, "rate at the end, as a share of the peak", 0, 1)
    warmup_steps = Var(2, "steps that compile, off the clock", 0)
    matrix_lr = Var(0.025, "Muon: block matrices", 0)
    muon_momentum = Var(0.99, "final momentum", 0, 0.9999)
    muon_momentum_warmup_start = Var(0.92, "momentum at step 0", 0, 0.9999)
    muon_momentum_warmup_steps = Var(1500, "steps from start to final momentum", 0)
    muon_backend_steps = Var(5, "Newton-Schulz steps", 1)
    muon_wd = Var(0.04, "Muon: decoupled weight decay", 0)
    tied_embed_lr = Var(0.035, "AdamW: tied token embedding", 0)
    scalar_lr = Var(0.025, "AdamW: gains, mixes, gates", 0)
    ngram_lr = Var(0.035, "RowAdagrad: n-gram tables", 0)
    jepa_lr = Var(0.001, "AdamW: projector, predictor, adapter", 0)
    draft_lr = Var(0.003, "AdamW: draft heads", 0)
    adam_wd = Var(0.04, "weight decay of embeddings and scalars", 0)
    beta1 = Var(0.9, "Adam", 0, 0.9999)
    beta2 = Var(0.95, "Adam", 0, 0.99999)
    adam_eps = Var(1e-8, "Adam", 0)
    grad_clip_norm = Var(0.3, "global gradient norm; 0 = no clip", 0)
    ema_decay = Var(0.997, "of the average that is scored", 0, 0.99999)
    seed = Var(1337, "of weights, order and SIGReg", 0)

    _artifact = "Artifact"
    bits = Var("embed:8,ngram:6,attn:6,mlp:6,other:6", "bit width by tensor class")
    quant_k = Var("embed:4,ngram:24,attn:12,mlp:12,other:6", "step = k * std / top: the size knob")
    quant_round = Var("gptq", "gptq: by the inputs' second moments", choices=("nearest", "gptq"))
    gptq_batches = Var(4, "training batches that GPTQ sees", 1)
    quant_rate = Var("embed:0,ngram:0.116,attn:0,mlp:0,other:0", "price of a bit in squared steps")
    compressor = Var("auto", "auto: rans if it is installed", choices=("auto", "rans", "lzma"))
    artifact_budget_bytes = Var(16_000_000, "code + model; 0 = no limit", 0)

    _evaluation = "Evaluation"
    eval_seq_len = Var(0, "window length; 0 = TRAIN_SEQ_LEN", 0, ship="eval")
    eval_stride = Var(512, "targets a window of the sliding pass", 1, ship="eval")
    eval_batch_tokens = Var(0, "tokens a forward; 0 = as training, up to 32768", 0)
    val_bytes = Var(0, "validates only on this prefix; 0 = all", 0)
    val_loss_every = Var(0, "steps between validations; 0 = only at the end", 0)
    eval_budget_seconds = Var(600.0, "final scoring of the artifact; 0 = no limit", 0)
    ttt = Var("0", "test-time training on scored text", choices=("0", "sgd"), ship="eval")
    ttt_adapt = Var(True, "0 = without learning: the control", ship="eval")
    ttt_chunk_tokens = Var(32768, "targets scored, then learned from", 1, ship="eval")
    ttt_batch_rows = Var(8, "rows an update, over all ranks", 1, ship="eval")
    ttt_epochs = Var(1, "passes over each chunk", 1, ship="eval")
    ttt_lr = Var(0.002, "rate of SGD", 0, ship="eval")
    ttt_momentum = Var(0.9, "kept from chunk to chunk", 0, 0.9999, ship="eval")
    ttt_grad_clip = Var(1.0, "gradient norm of an update; 0 = no clip", 0, ship="eval")
    eval_only = Var(False, "score ARTIFACT and nothing else")
    artifact = Var("", "its path, for EVAL_ONLY")

    _run = "Run"
    run_id = Var("", "folder under RUNS_PATH; empty = time and seed")
    runs_path = Var("./runs", "where runs are kept")
    resume = Var("", "auto, or a checkpoint file")
    resume_data = Var("same", "changed: other text than before", choices=("same", "changed"))
    checkpoint_every = Var(0, "steps between checkpoints; 0 = on a signal", 0)
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
        "MTP_NUM_HEADS": ("0", "it costs 0.028 BPB"),
        "BIGRAM_VOCAB_SIZE": ("0", "see NGRAM_ORDERS"),
        "QUANT_CLIP": ("std", "a search lost at equal size"),
        "QAT_START": ("1 1.0", "see BytePatchJEPA"),
        **dict.fromkeys(("QAT_ENABLED", "LATE_QAT"), ("0", "see BytePatchJEPA")),
        "TTT_MODULES": ("blocks", "see BytePatchJEPA"),
        "TRAIN_ALIGN": ("stream", "see TokenBest"),
        "TTT_DECAY_CHUNKS": ("0", "the rate is constant"),
        "GENERATE": ("", "scripts/generate.py writes texts"),
        "JEPA_BACKBONE_GRAD": ("0", "see ByteJEPA"),
        **dict.fromkeys(("JEPA_ADAPTER", "JEPA_ADAPTER_GRAD", "JEPA_LOSS"), ("1", "see ByteJEPA")),
    }
    # How variables of other scripts begin.
    FIELD = re.compile("(ATTN|AWQ|BATCH|BIGRAM|BIJEPAX|CASEOPS|DRAFTER|EMBED|EVAL|GATED?|"
                       "HEAD|JEPA|LOOP|LORA|LQER|MIX|MTP|MUON|NGRAM|PATCH|PPM|QAT|QUANT|"
                       "SIGREG|SPARSE|SWA|TTT|VAL)_")

    def __init__(self, environ: dict[str, str] | None = None, shipped: dict | None = None):
        """Reads `environ`; `shipped`, of an artifact, replaces defaults."""
        environ = environ or {}
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
        # what several settings together mean
        self.trains = not shipped
        self.ngram_order_list = ()
        if self.ngram_orders.strip() != "0":
            self.ngram_order_list = self._parse_numbers("ngram_orders", 2, 16)
        windowed = self._parse_numbers("attn_window_layers", 0, self.num_layers - 1)
        self.windows = [self.attn_window * (i in windowed) for i in range(self.num_layers)]
        self.bits_by_class = self._parse_classes("bits", int, 2, 8)
        self.k_by_class = self._parse_classes("quant_k", float, 0.1, 1000)
        self.rate_by_class = self._parse_classes("quant_rate", float, 0, 10)
        self.head_dim = self.model_dim // self.num_heads
        self.eval_seq_len = self.eval_seq_len or self.train_seq_len
        most = min(self.device_batch_tokens, 32768)  # eight ranks share a chunk of TTT evenly
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

    def _parse_numbers(self, name: str, low: int, high: int) -> tuple[int, ...]:
        """`3, 2` -> (2, 3): different integers from `low` to `high`."""
        var, text = self.vars()[name], getattr(self, name)
        parts = [part.strip() for part in text.split(",")]
        numbers = [int(part) if part.isdecimal() else -1 for part in parts if part]
        if any(not low <= n <= high for n in numbers) or len(set(numbers)) != len(numbers):
            raise UserError(f"{var.name}={text!r} is not accepted: different integers from {low} "
                            f"to {high}, with commas ({var.why})")
        return tuple(sorted(numbers))

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
        """Bytes beyond which MLX frees its cache and waits for work in flight; half is cache.

        Metal keeps as much of it resident as the system allows, so that weights are not paged out."""
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
        """A module's own arrays, then those of the modules inside it, in the order they were made;
        frozen ones are what torch calls buffers."""
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


# -----------------------------------------------------------------------------
# ATTENTION
# -----------------------------------------------------------------------------
# The rungs of a ladder, fastest first: q (B, H, T, d) and k, v (B, K, T, d) -> (B, H, T, d).
# `mask` is None for plain causal attention, else that of `causal_mask`. A query sees the last
# `window` positions, its own among them; 0: all. Here a window saves no time.


def causal_mask(docs: Tensor, queries: int) -> Tensor:
    """docs (B, T), a position's document -> (B, 1, queries, T) for the last `queries`."""
    positions = mx.arange(docs.shape[1])
    same_document = docs[:, None, -queries:, None] == docs[:, None, None]
    return same_document & (positions[-queries:, None] >= positions)


def within(mask: Tensor | None, window: int, q: Tensor, k: Tensor) -> Tensor | None:
    """A causal mask (B, 1, queries, T), without keys that lie before each query's window."""
    if not window:
        return mask
    queries, length = q.shape[2], k.shape[2]
    if mask is None:
        mask = causal_mask(mx.zeros((len(k), length)), queries)
    positions = mx.arange(length)
    return mask & (positions > positions[-queries:, None] - window)


def math_attention(q: Tensor, k: Tensor, v: Tensor, mask=None, window: int = 0) -> Tensor:
    """Causal attention spelt out, what every other rung must agree with."""
    k, v = (mx.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = (q @ k.swapaxes(2, 3)).astype(mx.float32) * q.shape[-1] ** -0.5
    mask = within(mask, window or k.shape[2], q, k)
    weights = mx.softmax(mx.where(mask, scores, -mx.inf), axis=-1).astype(v.dtype)
    return weights @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask=None, window: int = 0) -> Tensor:
    """MLX's kernel; q may be only the last positions of k and v."""
    mask = within(mask, window, q, k)
    mask = "causal" if mask is None else mask
    scale = q.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


ATTENTION = {"sdpa": sdpa_attention, "math": math_attention}


def agrees_with_math(rung: str, dtype: mx.Dtype, args: Hyperparameters) -> bool:
    """Whether a rung runs both ways here, as `math` does."""
    dim, window = args.model_dim // args.num_heads, 40 if any(args.windows) else 0
    shapes = {n: (1, n, 128, dim) for n in (2, 1)}
    q, k = (mx.random.normal(shapes[n], key=mx.random.key(n)).astype(dtype) for n in (2, 1))
    mask = causal_mask(mx.arange(128)[None] // 50, 128) if args.doc_mask else None
    rest = k, k, mask, window
    grad = mx.grad(lambda q: ATTENTION[rung](q, *rest).sum())(q)
    out = ATTENTION[rung](q, *rest)
    wanted = math_attention(q, *rest)
    close = mx.allclose(out, wanted, atol=3e-2)
    return (close & mx.isfinite(grad).all()).item()


def pick_attention(args: Hyperparameters, dtype: mx.Dtype) -> str:
    """The first rung, from ATTENTION down, that works here."""
    rungs = list(ATTENTION)
    first = 0 if args.attention == "auto" else rungs.index(args.attention)
    for rung in rungs[first:]:
        with contextlib.suppress(Exception):  # a chip that it refuses, an old signature
            if agrees_with_math(rung, dtype, args):
                return rung
    device, rungs = mx.default_device(), ", ".join(rungs[first:])
    raise UserError(f"ATTENTION={args.attention}: none of {rungs} runs on {device} in {dtype}")


# -----------------------------------------------------------------------------
# DATA
# -----------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
PAD_ID, BOS_ID, BYTE_OFFSET = 0, 1, 4
BYTE_CLASSES = ("lower", "upper", "digit", "space", "newline", "punctuation", "non-ascii",
                "special", "token")


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
        if "caseops" in self.manifest:
            raise UserError(f"DATA_PATH={self.path}: CaseOps ids, this script reads no sidecars")
        # training shards stay on disk, the validation text is read whole
        self.train_shards = [open_shard(path, size, 1 << 20) for path in self.train_files]
        self.val = np.concatenate([open_shard(path, size) for path in self.val_files])
        if verify:
            self._verify(args.verify_data)
        if len(self.val) < 2:
            raise UserError(f"{self.val_files[0]}: {len(self.val)} ids leave no target")

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


def class_table(vocab_size: int) -> np.ndarray:
    """Class of each id, an index into BYTE_CLASSES."""
    names = ["special"] * BYTE_OFFSET + ["token"] * (vocab_size - BYTE_OFFSET)
    for byte in range(256) if vocab_size == 260 else ():
        text = chr(byte)
        tests = {"non-ascii": byte > 127, "newline": text in "\r\n", "space": text.isspace(),
                 "digit": text.isdigit(), "lower": text.islower(), "upper": text.isupper()}
        found = [name for name in tests if tests[name]]
        names[BYTE_OFFSET + byte] = found[0] if found else "punctuation"
    return np.array([BYTE_CLASSES.index(name) for name in names])


@check
def check_batch(args: Hyperparameters) -> None:
    spare = args.trains and args.train_batch_tokens % args.train_seq_len
    forbid(spare, args, "train_batch_tokens train_seq_len", "must be a multiple of a row")


class BatchPlan(namedtuple("BatchPlan", "rows group groups micro_steps world_size")):
    """How a batch of `rows` rows is spread: micro-steps x ranks x `groups` of `group` rows.

    Ranks run the same shapes: slots beyond the batch repeat its first group with weight 0."""

    @classmethod
    def make(cls, args: Hyperparameters, world_size: int) -> BatchPlan:
        group = args.jepa_sigreg_group if args.jepa_chunk_size else 1
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
        """Iterates over `next()` from a thread, two batches ahead; arrays are made at their use.
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
    if name.startswith("tok_emb"):
        return "embed"
    if name.startswith("ngram.table"):
        return "ngram"
    if ".attn." in name:
        return "attn"
    return "mlp" if ".mlp." in name else "other"


def quant_plan(name: str, shape, args: Hyperparameters) -> tuple[int, int]:
    """(bits, the axis that shares a step: a table's buckets, else the last); (0, 0): fp16."""
    small = math.prod(shape) < SMALL_TENSOR and min(shape, default=0) < 16
    if small or len(shape) < 2 or not name.endswith((".weight", ".table")):
        return 0, 0
    kind = tensor_class(name)
    return args.bits_by_class[kind], len(shape) - (2 if kind == "ngram" else 1)


def nearest(x: np.ndarray, top: int) -> np.ndarray:
    return np.clip(np.rint(x), -top, top)


def cheapest(x: np.ndarray, top: int, rate: float) -> np.ndarray:
    """Entropy-constrained rounding: the least (x - q)^2 + rate * bits(q) among the nearest integer,
    its neighbour towards zero and zero. The bits, of an ideal code, settle in two rounds."""
    near = nearest(x, top)
    options = (near, near - np.sign(near), np.zeros_like(near))
    best = near
    for _ in range(2):
        counts = np.bincount(best.ravel().astype(np.int64) + top, minlength=2 * top + 1) + 0.5
        prices = rate * np.log2(counts.sum() / counts).astype(np.float32)
        costs = [np.square(x - q) + prices[q.astype(np.int64) + top] for q in options]
        best = np.choose(np.argmin(costs, axis=0), options)
    return best


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


def quantise(weight: np.ndarray, bits: int, k: float, axis: int, rate: float = 0.0,
             hessian: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rounds to integers q of `bits` bits, one fp16 step per slice along `axis`: q * step ~ weight.

    step = k * std / top, top = 2^(bits-1) - 1 (SDClip, #1394). A Gaussian then costs about
    log2(top / k) + 2.05 bits a weight, so k sets the size. Steps have an epsilon floor, not 1 / top
    (defect G2 of #832). `rate` is the price of a bit in squared steps; 0.116, ln(2) / 6, is what
    a coarser step would save; GPTQ, with a `hessian`, ignores it. Returns q, int8 of weight's
    shape, and step, fp16 with size 1 on `axis`. NumPy: backends pack alike."""
    top = 2 ** (bits - 1) - 1
    weight = np.asarray(weight, dtype=np.float32)
    step = k / top * weight.std(axis=axis, keepdims=True, dtype=np.float64)
    step = np.maximum(step, SCALE_FLOOR).astype(np.float16).astype(np.float32)
    x = weight / step

    if hessian is not None:
        q = gptq(x, hessian, top)
    elif rate:
        q = cheapest(x, top, rate)
    else:
        q = nearest(x, top)
    return q.astype(np.int8), step.astype(np.float16)


# -----------------------------------------------------------------------------
# AUXILIARY OBJECTIVES
# -----------------------------------------------------------------------------


def rms_norm(x: Tensor) -> Tensor:
    return mx.fast.rms_norm(x, None, 1e-6)


class CastedLinear(Module, nn.Linear):
    """fp32 weight, multiplied in the dtype of the input; no bias. `watch` is shown the inputs."""

    watch = None

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__(dim_in, dim_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch(x)
        return x @ self.weight.astype(x.dtype).T


class LatentMLP(Module):
    """W2 silu(RMSNorm(W1 x)), no biases; the projector and the predictor of #832."""

    def __init__(self, dim_in: int, hidden: int, dim_out: int):
        super().__init__()
        self.fc1 = CastedLinear(dim_in, hidden)
        self.fc2 = CastedLinear(hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x = rms_norm(self.fc1(x))
        return self.fc2(x * mx.sigmoid(x))  # nn.silu is compiled, whatever COMPILE says


def sigreg(latents: Tensor, directions: Tensor, knots: int) -> Tensor:
    """Sketched test for N(0, I): distance of characteristic functions along random directions.

    latents (G, N, d): G samples of N latents; directions (d, P), unit columns. Returns (G,)
    in fp32: the mean over P of sum_k w_k [(mean cos t_k p - phi_k)^2 + (mean sin t_k p)^2],
    phi_k = exp(-t_k^2 / 2), t on [0.2, 3], w_k = phi_k / sum(phi). Nothing is
    standardised, so a wrong scale costs (defect A5 of #832).
    After LeJEPA's SIGReg (Balestriero & LeCun 2025) and #696."""
    t = mx.linspace(0.2, 3.0, knots)
    phi = mx.exp(-0.5 * t * t)
    projected = latents.astype(mx.float32) @ directions.astype(mx.float32)
    angles = projected[..., None] * t  # (G, N, P, K)
    gap = (mx.cos(angles).mean(1) - phi).square() + mx.sin(angles).mean(1).square()
    return (gap @ (phi / phi.sum())).mean(-1)


@check
def check_jepa(args: Hyperparameters) -> None:
    chunk = args.jepa_chunk_size
    for name in ("train_seq_len", "eval_seq_len", "eval_stride"):
        spare = chunk and getattr(args, name) % chunk
        forbid(spare, args, f"{name} jepa_chunk_size", "must be a multiple of the chunk")
    rows = args.train_batch_tokens // args.train_seq_len
    spare = chunk and args.trains and rows % args.jepa_sigreg_group
    forbid(spare, args, "train_batch_tokens jepa_sigreg_group", "must hold whole groups of rows")
    total = args.jepa_phase1_frac + args.jepa_phase2_frac
    forbid(total > 1, args, "jepa_phase1_frac jepa_phase2_frac", "together at most 1")


class ChunkJEPA(Module):
    """Predicts each chunk's latent from the chunk before it, and feeds the guess to the stream.

    The interface that a record replaces:
      inputs(step)            what losses need from outside the graph, equal on all ranks
      forward(hidden, inputs) (hidden with the injection, {name: (groups,) loss}), {} without inputs
      weights(progress)       {name: weight of that term beside CE}
      report(means)           what the step line says about the mean terms
      first_read(position)    first position whose state a decoder needs to feed `position`

    With h_c the mean hidden state of chunk c: z_c = projector(h_c), zhat_c = predictor(z_{c-1}) (a
    start vector for c = 0); losses |zhat_c - sg(z_c)|^2 and SIGReg on z; injection W zhat_c at all
    positions of c: chunk c reads only chunks before it. SIGReg pools fixed groups of rows."""

    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.args = args
        self.chunk = args.jepa_chunk_size
        latent, hidden = args.jepa_latent_dim, args.jepa_proj_hidden
        self.projector = LatentMLP(args.model_dim, hidden, latent)
        self.predictor = LatentMLP(latent, hidden, latent)
        self.start = mx.zeros(latent)
        self.injection = CastedLinear(latent, args.model_dim)

    def init_weights(self) -> None:
        self.start = nn.init.normal(0, 0.02)(self.start)
        layers = (*self.projector.children().values(), *self.predictor.children().values())
        for layer in layers:
            bound = layer.weight.shape[1] ** -0.5
            layer.weight = nn.init.uniform(-bound, bound)(layer.weight)
        self.injection.weight = mx.zeros_like(self.injection.weight)

    def inputs(self, step: int) -> Tensor:
        """Fresh unit directions (latent, projs) of SIGReg, by seed and step."""
        key = mx.random.key(self.args.seed * 1_000_003 + step)
        size = self.args.jepa_latent_dim, self.args.jepa_sigreg_projs
        directions = mx.random.normal(size, key=key)
        return directions / mx.linalg.norm(directions, axis=0)

    def forward(self, hidden: Tensor, inputs: Tensor | None = None) -> tuple[Tensor, dict]:
        """state (..., D) of a position or link, embedded token (..., D) -> (..., D)."""
        args, size, latent = self.args, self.chunk, self.args.jepa_latent_dim
        batch, length, dim = hidden.shape
        full = length // size  # whole chunks, C below
        source = mx.stop_gradient(hidden)  # the loss trains no layer before it
        source = source[:, : full * size]
        z = self.projector(source.reshape(batch, full, size, dim).mean(2))  # (B, C, latent)
        start = mx.broadcast_to(self.start.astype(z.dtype), (batch, 1, latent))
        guess = self.predictor(mx.concatenate((start, z), 1)[:, : -(-length // size)])
        hidden = hidden + mx.repeat(self.injection(guess), size, axis=1)[:, :length]
        if inputs is None:
            return hidden, {}
        # losses pool groups of rows, whatever the ranks
        groups = batch // args.jepa_sigreg_group
        z, guess = (x[:, :full].astype(mx.float32).reshape(groups, -1, latent)
                    for x in (z, guess))  # (G, group * C, latent)
        fixed = mx.stop_gradient(z)
        error = (guess - fixed).square().mean((1, 2))
        return hidden, {"jepa_pred": error, "latent_var": mx.var(fixed, 1, ddof=1).mean(-1),
                        "sigreg": sigreg(z, inputs, args.jepa_sigreg_knots)}

    def weights(self, progress: float) -> dict[str, float]:
        """0 in phase 1, a linear ramp to JEPA_LAMBDA_MAX in phase 2, 0 afterwards."""
        args = self.args
        into = (progress - args.jepa_phase1_frac) / max(args.jepa_phase2_frac, 1e-9)
        weight = args.jepa_lambda_max * into if 0 <= into < 1 else 0.0
        return {"jepa_pred": weight, "sigreg": weight * args.jepa_sigreg_weight, "latent_var": 0.0}

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """The predictor's error also as R^2."""
        r2 = 1 - means["jepa_pred"] / max(means["latent_var"], 1e-12)
        return {"jepa_pred": means["jepa_pred"], "jepa_r2": r2, "sigreg": means["sigreg"]}

    def first_read(self, position: int) -> int:
        return max(0, position // self.chunk - 1) * self.chunk


@check
def check_draft(args: Hyperparameters) -> None:
    too_long = args.draft + 1 >= args.train_seq_len
    forbid(too_long, args, "draft train_seq_len", "a row must hold the drafted ids")


class DraftHeads(Module):
    """A chain of guesses at the ids beyond the next (after Hydra, Ankner et al. 2024).

    A link takes in the id that follows and guesses the one after it, from what the link before
    left of a position's state. Links share weights; the model learns nothing from them."""

    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.links = args.draft
        self.link = LatentMLP(2 * args.model_dim, args.model_dim, args.model_dim)

    def forward(self, state: Tensor, token: Tensor) -> Tensor:
        """state (..., D) of a position or of the link before, token (..., D) embedded -> (..., D)."""
        return rms_norm(state + self.link(mx.concatenate((state, rms_norm(token)), -1)))

    def loss(self, model: GPT, x: Tensor, ids: Tensor) -> Tensor:
        """x (B, T, D) of ids (B, T + 1) -> mean nats of each row's guesses (B,), fed true ids."""
        x, tokens, nats = mx.stop_gradient(x), mx.stop_gradient(model.embed(ids)), 0.0
        for i in range(1, self.links + 1):
            x = self(x[:, :-1], tokens[:, i:-1])
            logits = model.head(x, frozen=True)
            part = nn.losses.cross_entropy(logits, ids[:, i + 1 :]).mean(1)
            nats = nats + part / self.links
        return nats


# -----------------------------------------------------------------------------
# MODEL
# -----------------------------------------------------------------------------


def rotary_tables(length: int, args: Hyperparameters) -> Tensor:
    """Periods of the rotated pairs of dimensions, in positions a radian: (r / 2,), r the rotated ones.

    From float64: nn.RoPE's are exponentials in fp32, whose last digits long rows multiply by
    thousands.
    Windows longer than TRAIN_SEQ_LEN grow the base by
    (length / train_seq_len)^(r / (r - 2)) (NTK scaling)."""
    dims = args.rope_dims or args.head_dim
    base = args.rope_base
    if length > args.train_seq_len and dims > 2:
        base *= (length / args.train_seq_len) ** (dims / (dims - 2))
    return mx.array((base ** (np.arange(0, dims, 2) / dims)).astype(np.float32))


def rotate(x: Tensor, rotary: Tensor, first: int = 0) -> Tensor:
    """Half-split rotary on the first dimensions of x (B, H, T, d), whose positions begin at `first`.

    `rotary` is as of `rotary_tables`.
    The trunk turns pairs the other way round than MLX: hence the sign."""
    return mx.fast.rope(x, 2 * rotary.size, traditional=False, base=None, scale=-1.0,
                        offset=first, freqs=rotary)


class KVCache:
    """Keys, values and last states of the positions that decoding has read."""

    def __init__(self, model: GPT):
        args = model.args
        head_dim = args.model_dim // args.num_heads
        shape = (1, args.num_kv_heads, args.eval_seq_len, head_dim)
        self.layers = [[mx.zeros(shape, model.dtype)] * 2 for _ in range(args.num_layers)]
        self.states = mx.zeros((1, 0, args.model_dim), model.dtype)
        self.length = 0

    def cut(self, length: int) -> None:
        """Forgets all after the first `length` positions."""
        self.states = self.states[:, :length]
        self.length = min(self.length, length)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values of new positions (1, K, n, d); returns those of all."""
        start, stop = mx.array([self.length]), self.length + k.shape[2]
        kept = [mx.slice_update(old, new, start, (2,))
                for old, new in zip(self.layers[layer], (k, v))]
        self.layers[layer] = kept
        return kept[0][:, :, :stop], kept[1][:, :, :stop]


@check
def check_heads(args: Hyperparameters) -> None:
    head_dim, spare = args.head_dim, args.model_dim % args.num_heads
    forbid(spare, args, "model_dim num_heads", "must be a multiple of the heads")
    spare = args.num_heads % args.num_kv_heads
    forbid(spare, args, "num_heads num_kv_heads", "must be a multiple of the kv heads")
    forbid(head_dim % 2, args, "model_dim num_heads", f"a head's width, {head_dim}, must be even")
    unfit = args.rope_dims % 2 or args.rope_dims > head_dim
    forbid(unfit, args, "rope_dims num_heads", f"the first must be even, at most {head_dim}")


class CausalSelfAttention(Module):
    watch = None

    def __init__(self, args: Hyperparameters, layer: int, attention: str):
        super().__init__()
        self.layer = layer
        self.num_kv_heads = args.num_kv_heads
        self.head_dim = args.head_dim
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(args.model_dim, args.model_dim)
        self.c_k = CastedLinear(args.model_dim, kv_dim)
        self.c_v = CastedLinear(args.model_dim, kv_dim)
        self.proj = CastedLinear(args.model_dim, args.model_dim)
        self.q_gain = mx.full((args.num_heads,), args.qk_gain_init)
        self.exclude_self = layer >= args.num_layers - args.xsa_last_n
        self.window = args.windows[layer]
        self.attend = ATTENTION[attention]

    def forward(self, x: Tensor, rotary: Tensor, mask=None, past: KVCache | None = None) -> Tensor:
        if self.watch is not None:
            self.watch(x)
        batch, length, _ = x.shape
        heads, kv_heads = self.q_gain.size, self.num_kv_heads
        weight = mx.concatenate([layer.weight for layer in (self.c_q, self.c_k, self.c_v)])
        qkv = x @ weight.astype(x.dtype).T
        qkv = qkv.reshape(batch, length, -1, self.head_dim).swapaxes(1, 2)
        q, k, v = mx.split(qkv, (heads, heads + kv_heads), axis=1)  # (B, H or K, T, d)
        known = 0 if past is None else past.length
        q, k = (rotate(rms_norm(part), rotary, known) for part in (q, k))
        q = q * self.q_gain.astype(q.dtype)[:, None, None]
        k, v_all = (k, v) if past is None else past.extend(self.layer, k, v)
        y = self.attend(q, k, v_all, mask, self.window)

        if self.exclude_self:  # XSA: drop the component along this position's own value
            own = v.astype(mx.float32)
            own = own * mx.rsqrt(mx.maximum(own.square().sum(-1, keepdims=True), 1e-24))
            own = own.astype(y.dtype)[:, :, None]  # (B, K, 1, T, d)
            y = y.reshape(batch, kv_heads, -1, length, self.head_dim)
            y = (y - (y * own).sum(-1, keepdims=True) * own).reshape(q.shape)
        return self.proj(y.swapaxes(1, 2).reshape(x.shape))


class MLP(Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        hidden = max(1, round(args.model_dim * args.mlp_mult))
        self.fc = CastedLinear(args.model_dim, hidden)
        self.proj = CastedLinear(hidden, args.model_dim)
        self.slope = args.leaky_slope

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return self.proj(mx.where(x > 0, x, self.slope * x).square())


class Block(Module):
    def __init__(self, args: Hyperparameters, layer: int, attention: str):
        super().__init__()
        self.attn = CausalSelfAttention(args, layer, attention)
        self.mlp = MLP(args)
        self.attn_scale = mx.ones(args.model_dim)
        self.mlp_scale = mx.ones(args.model_dim)
        mix = mx.repeat(mx.array([[1.0], [0.0]]), args.model_dim, axis=1)
        self.resid_mix = mix if args.resid_mix else None
        self.ln_scale = (layer + 1) ** -0.5 if args.ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor, rotary: Tensor, mask, past: KVCache | None) -> Tensor:
        if self.resid_mix is not None:
            mix = self.resid_mix.astype(x.dtype)
            x = mix[0] * x + mix[1] * x0
        out = self.attn(rms_norm(x) * self.ln_scale, rotary, mask, past)
        x = x + self.attn_scale.astype(x.dtype) * out
        return x + self.mlp_scale.astype(x.dtype) * self.mlp(rms_norm(x) * self.ln_scale)


class SmearGate(Module):
    """x_t <- (1 - g) x_t + g x_{t-1}, one learned gate per channel; none into a BOS."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = mx.zeros(dim)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gate = mx.sigmoid(self.gate).astype(x.dtype) * (ids != BOS_ID)[..., None]
        return x + gate * (mx.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0))) - x)


def in_word(ids: Tensor) -> Tensor:
    """Whether byte260 ids are letters, digits or bytes of non-ASCII characters."""
    byte = ids - BYTE_OFFSET
    letter = byte | 32
    is_letter = (letter >= 97) & (letter <= 122)
    is_digit = (byte >= 48) & (byte <= 57)
    return is_letter | is_digit | (byte >= 128)


def log_softmax(logits: Tensor) -> Tensor:
    # nn.log_softmax is compiled, whatever COMPILE says
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def hash_mix(state: Tensor, symbol: Tensor) -> Tensor:
    """One step of a rolling 32-bit hash: uint32 wraps where the trunk's int64 are cut."""
    return (state ^ (state >> 15)) * 0x2C1B3C6D + symbol


@check
def check_ngrams(args: Hyperparameters) -> None:
    spare = args.ngram_dim % args.ngram_hashes
    forbid(spare, args, "ngram_dim ngram_hashes", "must be a multiple of the hashes")


class HashEmbedding(Module):
    """Learned embeddings of several contexts of each id, before one projection.

    The contexts: the last n ids for each n in `orders`; with `words` 1 the word so far, with 2 also
    that and the word before it (after PAQ). Each owns a row in each of `hashes` tables of width
    dim / hashes: two rarely share all of their rows. Nothing before the last BOS counts. Only the
    tables start at zero: in #832 both did, and stayed dead (A1)."""

    SALTS = (0x297A2D39, 0x1B873593, 0x6C078965, 0x5D588B65)
    WORD_REACH = 20  # ids that a word context looks back

    def __init__(self, orders: tuple, words: int, buckets: int, dim: int, hashes: int, width: int):
        super().__init__()
        self.orders, self.words, self.buckets = orders, words, buckets
        self.salts = self.SALTS[:hashes]
        contexts = len(orders) + words
        self.table = mx.zeros((contexts * hashes, buckets, dim // hashes))
        self.proj = CastedLinear(contexts * dim, width)

    def context_hashes(self, ids: Tensor) -> list[Tensor]:
        """A 32-bit hash (B, T) of each context; that at t depends on ids up to t."""
        ids = ids.astype(mx.int32)
        gram = word = pair = ids.astype(mx.uint32) * 0x2545F491
        inside = ids > BOS_ID  # of the document, going back
        part = mx.where(in_word(ids), 0, 1)  # 0: word so far, 1: gap, 2: word before, 3: the rest
        grams = {1: gram}
        for n in range(2, max(*self.orders, self.WORD_REACH if self.words else 0) + 1):
            padded = mx.pad(ids, ((0, 0), (n - 1, 0)), constant_values=PAD_ID)
            earlier = padded[:, : ids.shape[1]]
            symbol = earlier.astype(mx.uint32)
            gram = hash_mix(gram, mx.where(inside, symbol, PAD_ID) + n)
            grams[n] = gram
            # the word so far, and the one before it
            inside = inside & (earlier > BOS_ID)
            part = mx.where(inside, part + (in_word(earlier) != (part % 2 == 0)), 3)
            word = mx.where(part == 0, hash_mix(word, symbol), word)
            pair = mx.where(part <= 2, hash_mix(pair, symbol), pair)
        return [grams[n] for n in self.orders] + [word, pair + 1][: self.words]

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the flattened table: (B, T, contexts * hashes)."""
        rows = []
        for state in self.context_hashes(ids):
            state = state ^ (state >> 13)
            for salt in self.salts:
                bucket = ((state * salt) >> 7) % self.buckets
                rows.append(bucket + len(rows) * self.buckets)
        return mx.stack(rows, -1)

    def forward(self, ids: Tensor, dtype: mx.Dtype) -> Tensor:
        rows = self.table.flatten(0, 1)
        found = rows[self.rows(ids)]  # (B, T, contexts * hashes, dim / hashes)
        return self.proj(found.flatten(-2).astype(dtype))


class GPT(Module):
    """The network: `losses` gives all loss terms of a batch in one forward, `logits` scores."""

    def __init__(self, args: Hyperparameters, attention: str = "sdpa", dtype=mx.float32):
        super().__init__()
        self.args, self.dtype = args, dtype
        dim, layers = args.model_dim, args.num_layers
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        self.ngram = None
        if args.ngram_order_list:
            words = args.ngram_words if args.vocab_size == 260 else 0
            size = args.ngram_buckets, args.ngram_dim, args.ngram_hashes, dim
            self.ngram = HashEmbedding(args.ngram_order_list, words, *size)
        self.reach = max((*args.ngram_order_list, HashEmbedding.WORD_REACH))  # in ids
        self.smear = SmearGate(dim) if args.smear_gate else None
        self.blocks = [Block(args, i, attention) for i in range(layers)]
        # what later blocks add, and what feeds or follows the stream
        self.skip_weights = mx.ones((layers // 2, dim)) if args.unet_skips else None
        self.aux = ChunkJEPA(args) if args.jepa_chunk_size else None
        self.draft = DraftHeads(args) if args.draft else None
        self.set_rotary()

    def set_rotary(self) -> None:
        """Tables for training and scoring windows, which may have different lengths."""
        self.rotary_train = rotary_tables(self.args.train_seq_len, self.args)
        self.rotary_eval = rotary_tables(self.args.eval_seq_len, self.args)
        self.freeze(recurse=False, keys=["rotary_train", "rotary_eval"])

    def init_weights(self, seed: int) -> None:
        """Small embeddings, orthogonal matrices, zero output projections."""
        mx.random.seed(seed)
        normal = nn.init.normal(0, self.args.tied_embed_init_std)
        orthogonal = nn.init.orthogonal()
        self.tok_emb.weight = normal(self.tok_emb.weight)
        layers = [self.ngram.proj] if self.ngram is not None else []
        for block in self.blocks:
            layers += [block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.fc]
            block.attn.proj.weight = mx.zeros_like(block.attn.proj.weight)
            block.mlp.proj.weight = mx.zeros_like(block.mlp.proj.weight)
        # draws follow the order of the layers
        if self.draft is not None:
            layers += self.draft.link.children().values()
        for layer in layers:
            layer.weight = orthogonal(layer.weight)
        if self.aux is not None:
            self.aux.init_weights()
        mx.eval(self.parameters())

    def embed(self, ids: Tensor) -> Tensor:
        return self.tok_emb.weight[ids].astype(self.dtype)

    def embed_contexts(self, ids: Tensor, known: int) -> Tensor:
        """ids (B, T) -> normalised embeddings (B, T - known, D), from position `known` on."""
        tail = ids[:, max(0, known - self.reach) :]  # embeddings depend on earlier ids
        x = self.embed(tail)
        if self.ngram is not None:
            x = x + self.ngram(tail, self.dtype)
        x = rms_norm(x)
        if self.smear is not None:
            x = self.smear(x, tail)
        return x[:, known - ids.shape[1] :]

    def attention_mask(self, ids: Tensor, past: KVCache | None):
        """The rungs' `mask`: None where plain causal attention is wanted."""
        if not self.args.doc_mask:
            return None
        known = 0 if past is None else past.length
        return causal_mask((ids == BOS_ID).cumsum(1), ids.shape[1] - known)

    def run_blocks(self, x: Tensor, rotary: Tensor, mask, past: KVCache | None) -> Tensor:
        """x (B, T, D) -> the same. U-Net: late blocks take early ones' outputs, last first."""
        x0, skips = x, []
        first_half = len(self.blocks) // 2
        for i, block in enumerate(self.blocks):
            if i >= first_half and skips:
                x = x + self.skip_weights[i - first_half].astype(x.dtype) * skips.pop()
            x = block(x, x0, rotary, mask, past)
            if i < first_half and self.skip_weights is not None:
                skips.append(x)
        return x

    def states(self, ids: Tensor, rotary: Tensor, past: KVCache | None = None) -> Tensor:
        """ids (B, T) -> the stream (B, T, D) after the last block.

        With `past`, ids (1, T) are a window's so far; it gives only the states that are new."""
        known = 0 if past is None else past.length
        x = self.embed_contexts(ids, known)
        mask = self.attention_mask(ids, past)
        x = self.run_blocks(x, rotary, mask, past)
        if past is not None:
            past.length = ids.shape[1]
        return x

    def injected(self, x: Tensor, past: KVCache | None) -> Tensor:
        """New states x (B, T, D) with the auxiliary's injection."""
        if past is None:
            return self.aux(x)[0]
        known = past.states.shape[1]
        past.states = mx.concatenate((past.states, x), 1)
        return self.aux(past.states[:, self.aux.first_read(known) :])[0][:, -x.shape[1] :]

    def hidden(self, ids: Tensor, rotary: Tensor, past: KVCache | None = None) -> Tensor:
        """`states`, as the head reads them: (B, T, D), normalised."""
        x = self.states(ids, rotary, past)
        if self.aux is not None:
            x = self.injected(x, past)
        return rms_norm(x)

    def exported(self) -> dict[str, Tensor]:
        """The parameters that an artifact holds: here, all."""
        return self.named_parameters()

    def head(self, x: Tensor, frozen: bool = False) -> Tensor:
        """States -> capped logits in fp32; `frozen`: no gradient for the head's own weight."""
        weight = self.tok_emb.weight
        weight = mx.stop_gradient(weight) if frozen else weight
        logits = (x @ weight.astype(x.dtype).T).astype(mx.float32)
        cap = self.args.logit_softcap
        return cap * mx.tanh(logits / cap) if cap else logits

    def losses(self, ids: Tensor, weights: Tensor, aux_inputs=None) -> dict[str, Tensor]:
        """ids (B, T + 1), weights (B,) -> sums, rows weighted: "ce" in nats, other terms."""
        x, terms = self.states(ids[:, :-1], self.rotary_train), {}
        if self.aux is not None:
            x, terms = self.aux(x, aux_inputs)
        x = rms_norm(x)

        nats = nn.losses.cross_entropy(self.head(x), ids[:, 1:])
        sums = {"ce": (nats.sum(1) * weights).sum()}
        if self.draft is not None:
            total = (self.draft.loss(self, x, ids) * weights).sum()
            groups = len(next(iter(terms.values()), ids))  # a term's length
            sums["draft"] = total * groups / len(ids)
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
    """Share of the peak rate at `progress` in [0, 1]: flat, then linear to MIN_LR at 1.

    Progress is max(step share, time share), so the rate ends at its floor whichever limit
    ends the run (#832 stopped at 17 % of its peak, defect A4)."""
    fall = args.warmdown_iters / args.iterations
    left = min(1.0, (1.0 - progress) / fall) if fall else 1.0
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


class RowAdagrad:
    """Adagrad with one accumulator a row: p <- p - rate * g / sqrt(sum over steps of mean(g^2)).

    A row of a hash table is met a few times in a run: its rate falls with its own count."""

    def __init__(self, names: list[str], args: Hyperparameters):
        self.names = names
        self.eps = args.adam_eps

    def state(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums before the first step."""
        sums = [mx.zeros_like(params[name][..., :1]) for name in self.names]
        return {f"table.{i}": total for i, total in enumerate(sums)}

    def step(self, params: dict, grads: dict, state: dict, rate: Tensor) -> dict:
        """The tables after a step; `state` is brought forward in place."""
        found = {}
        for i, name in enumerate(self.names):
            mean = grads[name].square().mean(-1, keepdims=True)
            total = state[f"table.{i}"] = state[f"table.{i}"] + mean
            found[name] = params[name] - rate * grads[name] / (mx.sqrt(total) + self.eps)
        return found


class Optimizers:
    """Every optimizer: one step for all of them, and what a checkpoint needs.

    group    parameters                              optimizer   rate
    matrix   2-D weights of blocks, hash projection  Muon        MATRIX_LR
    table    n-gram tables                           RowAdagrad  NGRAM_LR
    embed    token embedding                         AdamW       TIED_EMBED_LR
    aux      JEPA                                    AdamW       JEPA_LR, no decay
    draft    draft heads                             AdamW       DRAFT_LR, no decay
    scalar   gains, mixes, gates: all else           AdamW       SCALAR_LR

    Draft heads stay out of the norm that clips: the model is to move as it would without them.
    `moments`, the state of all of them, has the names that the trunk's checkpoints give it."""

    GROUPS = ("matrix", "embed", "table", "aux", "scalar", "draft")

    def __init__(self, model: GPT, args: Hyperparameters, runtime: Runtime):
        self.args, self.runtime, self.model = args, runtime, model
        params = model.named_parameters()
        self.groups = {group: [] for group in self.GROUPS}
        for name, p in params.items():
            self.groups[self.group_of(name, p)].append(name)
        matrices = {name: params[name] for name in self.groups["matrix"]}
        self.muon = Muon(matrices, args, runtime.dtype)
        self.tables = RowAdagrad(self.groups["table"], args)

        rates = {"embed": (args.tied_embed_lr, args.adam_wd), "aux": (args.jepa_lr, 0.0),
                 "scalar": (args.scalar_lr, args.adam_wd), "draft": (args.draft_lr, 0.0)}
        betas = [args.beta1, args.beta2]
        self.adam = {}
        for group, (rate, decay) in rates.items():
            if self.groups[group]:
                adam = optim.AdamW(rate, betas, args.adam_eps, decay, bias_correction=True)
                self.adam[group] = adam
        self.rates = {group: rates[group][0] for group in self.adam}
        self.order = [name for group in self.adam for name in self.groups[group]]  # AdamW's
        self.counted = [name for group in self.GROUPS[:-1] for name in self.groups[group]]
        self.apply = mx.compile(self.update) if runtime.compile else self.update
        self.fresh()

    def fresh(self) -> None:
        """Moments as before the first step."""
        params = self.model.named_parameters()
        self.moments = self.muon.state(params) | self.tables.state(params)
        for i, name in enumerate(self.order):
            self.moments[f"adam.{i}.step"] = mx.zeros(())
            for key in ("exp_avg", "exp_avg_sq"):
                self.moments[f"adam.{i}.{key}"] = mx.zeros_like(params[name])

    @staticmethod
    def group_of(name: str, p: Tensor) -> str:
        prefixes = {"aux.": "aux", "draft.": "draft", "ngram.table": "table", "tok_emb.": "embed"}
        for prefix, group in prefixes.items():
            if name.startswith(prefix):
                return group
        return "matrix" if p.ndim == 2 and name.endswith(".weight") else "scalar"

    def reduce(self, grads: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """All gradients, summed over ranks, and their global norm (before clipping)."""
        grads = self.runtime.sum_arrays(grads)
        return grads, mx.sqrt(sum(grads[name].square().sum() for name in self.counted))

    def step(self, step: int, progress: float, grads: dict[str, Tensor], norm: Tensor) -> None:
        args = self.args
        rate = rate_at(progress, args)
        warm = min(1.0, step / max(args.muon_momentum_warmup_steps, 1e-9))
        momentum = (1 - warm) * args.muon_momentum_warmup_start + warm * args.muon_momentum
        numbers = {"norm": norm, "matrix": mx.array(args.matrix_lr * rate),
                   "momentum": mx.array(momentum), "table": mx.array(args.ngram_lr * rate)}
        numbers |= {group: mx.array(peak * rate) for group, peak in self.rates.items()}
        params, self.moments = self.apply(
            self.model.named_parameters(), grads, self.moments, numbers)
        update_parameters(self.model, params)

    def update(self, params: dict, grads: dict, moments: dict, numbers: dict) -> tuple[dict, dict]:
        """(weights, moments) after a step: a function of only arrays, to be compiled."""
        moments = dict(moments)
        longest = self.args.grad_clip_norm or math.inf
        clip = mx.minimum(longest / (numbers["norm"] + 1e-6), 1.0)
        grads = {name: clip * grad for name, grad in grads.items()}
        found = self.muon.step(params, grads, moments, numbers["matrix"], numbers["momentum"])
        found |= self.tables.step(params, grads, moments, numbers["table"])
        for group, adam in self.adam.items():
            keys = {name: f"adam.{self.order.index(name)}" for name in self.groups[group]}
            first = keys[self.groups[group][0]]
            # MLX's state of a group, from the trunk's names and back
            adam.state = {"step": moments[f"{first}.step"], "learning_rate": numbers[group]}
            for name, key in keys.items():
                mean, square = (moments[f"{key}.{part}"] for part in ("exp_avg", "exp_avg_sq"))
                adam.state[name] = {"m": mean, "v": square}
            found |= adam.apply_gradients({name: grads[name] for name in keys},
                                          {name: params[name] for name in keys})
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
    """fp32 average of the weights; the decay min(EMA_DECAY, (1 + t) / (10 + t))."""

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
    """Layout for entries [name, shape, bits, axis]: quantised tensors, then fp16 bytes."""
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


def pack(tensors: dict, args: Hyperparameters, hessians: dict | None = None) -> bytes:
    """{name: float array} -> a file: quantised by `quant_plan`, compressed in `planes`' order.
    `hessians` {name: (C, C)} of the matrices that GPTQ is to round."""
    entries, codes, halves = [], [], []
    for name, half in tensors.items():
        kind = tensor_class(name)
        bits, axis = quant_plan(name, half.shape, args)
        entries.append([name, list(half.shape), bits, axis])
        if bits:  # only its steps stay fp16
            rate, hessian = args.rate_by_class[kind], (hessians or {}).get(name)
            q, half = quantise(half, bits, args.k_by_class[kind], axis, rate, hessian)
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


def load(artifact_path: str | Path, device="cpu", args: Hyperparameters | None = None,
         dtype: mx.Dtype = mx.float32, attention: str = "sdpa") -> GPT:
    """The scoring model, only from an artifact; `args` may change how it scores."""
    header, tensors = unpack(read_file(artifact_path, "ARTIFACT"), str(artifact_path))
    args = args or shipped_settings(header, str(artifact_path))
    mx.set_default_device(pick_device(device) if isinstance(device, str) else device)
    model = GPT(args, attention, dtype)
    wanted = {(name, p.shape) for name, p in model.exported().items()}
    if odd := wanted ^ {(name, array.shape) for name, array in tensors.items()}:
        raise UserError(f"{artifact_path}: its tensors do not fit its config, first {min(odd)}")
    update_parameters(model, {name: mx.array(array) for name, array in tensors.items()})
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
    """How a text is read: windows of `length` ids for `stride` targets each, `batch` a forward."""

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


def scored(model: GPT, ids: np.ndarray, plan: WindowPlan, logits=scoring_logits,
           learner: TestTimeTraining | None = None):
    """Yields (first, stop, fp32 log-probabilities (n, V), nats (n,)) of each block of n targets.

    The only path from weights to a score. A learner is shown each scored chunk but the last."""
    rows = windows(len(ids) - 1, plan.length, plan.stride)
    chunk = max(1, len(rows))  # windows before a learner learns
    if learner is not None:
        chunk = model.args.ttt_chunk_tokens // plan.stride
    seen = np.zeros(len(ids) - 1, dtype=bool)

    for start in range(0, len(rows), chunk):
        if start and learner is not None:
            learner.catch_up(ids, seen)
        part = rows[start : start + chunk]
        for number in range(plan.rank, -(-len(part) // plan.batch), plan.ranks):
            batch = part[number * plan.batch : (number + 1) * plan.batch]
            inputs, position, targets = plan.tensors(ids, batch)
            logprobs = log_softmax(logits(model, inputs, position, targets.shape[1]))
            found = mx.take_along_axis(logprobs, targets[..., None], axis=-1)
            nats = -found.squeeze(-1)
            mx.eval(nats, logprobs)  # now, or graphs of earlier windows stay in memory
            nats = np.array(nats).astype(np.float64)
            for i, (_, first, stop) in enumerate(batch):
                yield first, stop, logprobs[i, : stop - first], nats[i, : stop - first]
        seen[part[0, 1] : part[-1, 2]] = True


@check
def check_ttt(args: Hyperparameters) -> None:
    spare = args.ttt != "0" and args.ttt_chunk_tokens % args.eval_stride
    forbid(spare, args, "ttt_chunk_tokens eval_stride", "must be a multiple of the stride")


class TestTimeTraining:
    """Score-first test-time training (#461, #549): SGD of the blocks on each chunk once scored.

    After a chunk it trains on rows of TRAIN_SEQ_LEN that end with it, TTT_BATCH_ROWS per update,
    all ranks in step. Nothing depends on the text to come: a decoder does the same."""

    def __init__(self, model: GPT, gradients=training_gradients, runtime=None):
        self.model, self.args, self.gradients = model, model.args, gradients
        self.runtime = runtime

        named = model.named_parameters().items()
        self.params = {name: p for name, p in named if name.startswith("blocks.")}
        self.kept = dict(self.params)
        self.sgd = optim.SGD(self.args.ttt_lr, self.args.ttt_momentum)
        self.chunks, self.updates, self.seconds = 0, 0, 0.0

    def rows(self, stop: int) -> np.ndarray:
        """Starts of the rows that cover the chunk before target `stop`, from its end."""
        count = -(-self.args.ttt_chunk_tokens // self.args.train_seq_len)
        starts = stop - self.args.train_seq_len * np.arange(count, 0, -1)
        return starts[starts >= 0]

    def catch_up(self, ids: np.ndarray, seen: np.ndarray) -> None:
        """Learns, in order, from complete chunks; `seen` (targets,): those scored."""
        began = time.perf_counter()
        args, size = self.args, self.args.ttt_chunk_tokens
        while seen[self.chunks * size : (self.chunks + 1) * size].sum() == size:
            self.chunks += 1
            starts = self.rows(self.chunks * size)
            for start in starts:
                assert seen[start : start + args.train_seq_len].all(), "not scored yet"
            for _ in range(args.ttt_epochs if args.ttt_adapt else 0):
                for first in range(0, len(starts), args.ttt_batch_rows):
                    self.update(ids, starts[first : first + args.ttt_batch_rows])
        self.seconds += time.perf_counter() - began

    def batch(self, ids: np.ndarray, starts: np.ndarray) -> list[Tensor]:
        """This rank's rows of an update, and a weight for each; one shape on every rank."""
        length = self.args.train_seq_len
        rank, ranks = (self.runtime.rank, self.runtime.world_size) if self.runtime else (0, 1)
        rows = np.zeros((-(-self.args.ttt_batch_rows // ranks), length + 1), np.int32)
        weights = np.zeros(len(rows), np.float32)
        for i, start in enumerate(starts[rank::ranks]):
            rows[i] = ids[start : start + length + 1]
            weights[i] = 1
        return [mx.array(rows), mx.array(weights)]

    def update(self, ids: np.ndarray, starts: np.ndarray) -> None:
        args = self.args
        share = {"ce": mx.array(1 / (len(starts) * args.train_seq_len))}
        rows, weights = self.batch(ids, starts)
        _, grads = self.gradients(self.model, self.params, share, rows, weights, None)
        # one clipped step of SGD, the same on every rank
        grads = self.runtime.sum_arrays(grads) if self.runtime else grads
        norm = mx.sqrt(sum(grad.square().sum() for grad in grads.values()))
        clip = mx.minimum((args.ttt_grad_clip or math.inf) / (norm + 1e-6), 1.0)
        grads = {name: clip * grad for name, grad in grads.items()}
        self.params = self.sgd.apply_gradients(grads, self.params)
        mx.eval(self.params, self.sgd.state)
        update_parameters(self.model, self.params)
        self.updates += 1

    def restore(self) -> None:
        update_parameters(self.model, self.kept)


def score(model: GPT, ids, positions=()) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """(nats of each target ids[1:], {t: log-probabilities (V,) at target t, for t in positions})."""
    args, ids, wanted = model.args, np.asarray(ids), set(positions)
    blocks = -(-len(ids) // args.eval_stride)  # a short text needs no full batch
    batch = max(1, min(args.eval_batch_tokens // args.eval_seq_len, blocks))
    plan = WindowPlan(args.eval_seq_len, args.eval_stride, batch)
    learner = TestTimeTraining(model) if args.ttt != "0" else None

    nats, vectors = np.zeros(max(len(ids) - 1, 0)), {}
    for first, stop, logprobs, part in scored(model, ids, plan, learner=learner):
        nats[first:stop] = part
        vectors |= {t: np.array(logprobs[t - first]) for t in wanted if first <= t < stop}
    if learner is not None:
        learner.restore()
    return nats, vectors


PROGRESS_SECONDS = 15  # between lines about a pass under way


class Evaluator:
    """Scores models on the validation text; a pass ends as a line of the log."""

    def __init__(self, args: Hyperparameters, data: Dataset, runtime: Runtime, log: Log):
        self.args, self.runtime, self.log = args, runtime, log
        self.logits = scoring_logits
        self.gradients = training_gradients
        self.tables = byte_tables(args)
        self.classes = class_table(args.vocab_size)
        self.results = {}
        # VAL_BYTES cuts the text after the target that reaches it
        ids = data.val
        sizes = target_bytes(ids, self.tables)
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
        note = f" prefix:{self.prefix}" if self.prefix else ""
        if original != self.bytes and not self.prefix:
            note = f" (original text {original}: normalised; these bytes divide)"
        return f"val: targets:{len(self.ids) - 1} bytes:{self.bytes}{note}"

    def run(self, name: str, model: GPT, length: int, stride: int, learn: bool = False) -> dict:
        """val_bpb = nats / ln 2 / bytes: special ids cost nats and add no byte."""
        args, runtime, began = self.args, self.runtime, time.perf_counter()
        classes = len(BYTE_CLASSES)
        sums = np.zeros(classes + 1)  # nats by class, and targets
        learner = TestTimeTraining(model, self.gradients, runtime) if learn else None
        batch = max(1, args.eval_batch_tokens // length)
        plan = WindowPlan(length, stride, batch, runtime.rank, runtime.world_size)
        targets, shown = len(self.ids) - 1, began
        for first, stop, _, nats in scored(model, self.ids, plan, self.logits, learner):
            found = self.classes[self.ids[first + 1 : stop + 1]]
            sums[:-1] += np.bincount(found, nats, minlength=classes)
            sums[-1] += stop - first
            if (now := time.perf_counter()) - shown > PROGRESS_SECONDS:
                shown = now
                loss = sums[:-1].sum() / sums[-1]
                self.log(f"  {name} {stop / targets:.0%} {now - began:.0f}s loss:{loss:.4f}")

        sums = runtime.all_reduce(sums)
        assert int(sums[-1]) == targets, f"{name}: scored {int(sums[-1])} targets of {targets}"
        nats = float(sums[:-1].sum())
        by_class = zip(BYTE_CLASSES, sums.tolist())
        bits = {label: total / math.log(2) for label, total in by_class if total}
        result = {"val_loss": nats / targets, "val_bpb": nats / math.log(2) / self.bytes,
                  "targets": targets, "bytes": self.bytes, "seconds": time.perf_counter() - began,
                  "seq_len": length, "stride": stride, "bits_by_class": bits}
        result |= {"prefix_bytes": self.prefix} if self.prefix else {}
        if learner is not None:
            learner.restore()
            result |= {"updates": learner.updates, "adapt_seconds": learner.seconds}
        self.results[name] = result
        return result

    def report(self, name: str, model: GPT, stride: int | None = None, learn: bool = False) -> dict:
        """Runs a pass, prints its line; without a stride windows do not overlap."""
        length = self.args.eval_seq_len
        result = self.run(name, model, length, stride or length, learn)
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
    """The scorer, one id at a time, for a decoder to follow: it reads the same windows as `score`,
    learns after the same chunks, and keeps keys and values of the window at hand."""

    def __init__(self, model: GPT):
        self.model = model
        self.ids = []
        self.learner = TestTimeTraining(model) if model.args.ttt != "0" else None
        self.block, self.start = -1, 0  # the window at hand: its number, where it begins
        self.past = None
        self.known = None  # log-probabilities of the next id
        self.read = []  # the ids of the last pass's window, drafts included
        self.states = {}  # of the last pass, by position

    def logprobs(self) -> np.ndarray:
        """fp32 log-probabilities (V,) of the next id. Push the first one, a BOS."""
        if self.known is None:
            self.known = self.ahead([])[0]
        return self.known

    def ahead(self, drafts: list[int]) -> np.ndarray:
        """fp32 log-probabilities (n + 1, V) of the next id and of that after each of the first n
        `drafts`, as many as the window takes, in one pass. An id pushed as drafted is not read
        again."""
        if not self.ids:
            raise ValueError("push the first id (BOS) before asking for the second")
        args, position = self.model.args, len(self.ids) - 1
        block, place = divmod(position, args.eval_stride)
        if block != self.block:
            if self.learner:
                self.learner.catch_up(np.array(self.ids), np.ones(position, dtype=bool))
            self.block, self.past = block, KVCache(self.model)
            self.start = max((block + 1) * args.eval_stride - args.eval_seq_len, 0)
        # one pass reads all that the cache lacks
        self.read = [*self.ids[self.start :], *drafts[: args.eval_stride - 1 - place]]
        self.past.cut(position - self.start)
        ids = mx.array(np.array([self.read], np.int32))
        x = self.model.hidden(ids, self.model.rotary_eval, past=self.past)
        states = x[0, position - self.start - len(self.read) :]
        self.states = dict(enumerate(states, position))
        return np.array(log_softmax(self.model.head(states.astype(mx.float32))))

    def push(self, token: int) -> None:
        place = len(self.ids) - self.start
        if self.past is not None and self.read[place : place + 1] != [token]:
            self.past.cut(place)
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


def torch_rng_state(seed: int) -> np.ndarray:
    """The bytes of torch.get_rng_state() after manual_seed(seed), (5056,) uint8.

    The trunk asks for them.
    They are the seed, numbers left, "seeded", the next number's place, 624 words of MT19937, and
    40 bytes of spare normals."""
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
        shares = {"ce": 1 / (self.plan.rows * self.args.train_seq_len)}
        for name, weight in term_weights.items():
            if weight or self.runtime.compile:  # a later term would be compiled in mid-run
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
        if self.model.draft is not None:
            term_weights["draft"] = 1.0

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
        """Hessians for GPTQ, on the training clock; none where inputs overflow."""
        start, sums = time.perf_counter(), {}
        batches = Loader(self.data, self.args, self.plan, self.runtime.rank, self.loader_state)
        for _ in range(self.args.gptq_batches):
            ids, _, _ = batches.next()
            self.input_moments(mx.array(ids), sums)
        sums = self.runtime.sum_arrays(sums)
        self.seconds, = self.runtime.from_main([self.seconds + time.perf_counter() - start])
        found = {name: np.array(total) for name, total in sums.items()}
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
        if self.model.draft is not None:
            line["draft"] = means.pop("draft")
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
        """Goes on from a checkpoint, of the trunk too."""
        try:
            with safe_open(path, "np") as file:
                meta = json.loads((file.metadata() or {})["golf"])
                state = {key: mx.array(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"RESUME={path}: not a checkpoint of this script ({error})") from None
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
    # compile off the clock, then train
    with runtime.clock("warm-up"):
        trainer.warm_up()
    evaluator.logits, evaluator.gradients = trainer.logits, trainer.gradients
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
