"""ByteBest: the family's best byte model.

Parent: BytePPM.
Idea:   training reads rows in a shuffled order; a document's own adapters learn it
        while it is scored; the mixture counts two more contexts. What did not pay is gone.

Run:    python train_gpt.py --help                             every variable and its reason
        torchrun --standalone --nproc_per_node=8 train_gpt.py  the contest: 8xH100, 600 s, 16 MB
        EVAL_ONLY=1 ARTIFACT=FILE TTT=0 python train_gpt.py    score again, without adapters
        python scripts/generate.py FILE TEXT                   what an artifact writes

The file reads downwards: environment -> batches -> losses -> weights -> artifact -> bits.
It needs torch, numpy, safetensors and, for the mixture, numba.
"""

from __future__ import annotations

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
    vocab_size = Var(260, "ids: 4 special ones + 256 bytes", 260, 260, ship="model")
    train_seq_len = Var(4096, "tokens a training row", 2, ship="model")
    train_batch_tokens = Var(393216, "tokens an optimizer step, over all ranks", 2)
    device_batch_tokens = Var(49152, "tokens a forward: the out-of-memory knob", 1)
    train_order = Var("shuffled", "of rows in an epoch", choices=("sequential", "shuffled"))
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
    xsa_last_n = Var(4, "last layers that drop their own value (XSA, #265)", 0, ship="model")
    unet_skips = Var(True, "later blocks add earlier outputs", ship="model")
    resid_mix = Var(True, "blocks mix in the embedding", ship="model")
    smear_gate = Var(True, "blend each embedding with the one before", ship="model")
    ngram_orders = Var("0", "lengths of hashed contexts; 0 = none", ship="model")
    ngram_words = Var(2, "1 = the word so far, 2 = and the one before", 0, 2, ship="model")
    ngram_buckets = Var(65536, "rows of each table", 2, ship="model")
    ngram_dim = Var(32, "width of a context's embedding", 1, ship="model")
    ngram_hashes = Var(2, "tables, each a hash", 1, 4, ship="model")

    _optimizers = "Optimizers and schedule"
    iterations = Var(9000, "optimizer steps at most", 1)
    max_wallclock_seconds = Var(600.0, "training time; 0 = no limit", 0)
    warmdown_iters = Var(3000, "steps over which the rate falls", 0)
    min_lr = Var(0.0, "rate at the end, as a share of the peak", 0, 1)
    batch_growth = Var("1", "updates a step, N until a share of the run: 4:0.4,2:0.75,1")
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
    ttt = Var("lora", "adapters that learn from scored text", choices=("0", "lora"), ship="eval")
    ttt_adapt = Var(True, "0 = without learning: the control", ship="eval")
    ttt_doc_chunk = Var(0, "targets between updates; 0 = an 8th of the window", 0, ship="eval")
    ttt_doc_tokens = Var(32768, "targets of the longest piece of a document", 1, ship="eval")
    ttt_lora_rank = Var(48, "inner width", 1, ship="eval")
    ttt_lora_alpha = Var(48.0, "alpha / rank scales the product", 0, ship="eval")
    ttt_lora_lr = Var(1e-3, "rate of AdamW, whose beta1 is 0", 0, ship="eval")
    ttt_lora_wd = Var(0.0, "decoupled weight decay", 0, ship="eval")
    ppm_weight = Var(True, "1 = mixed with counts, 0 = only the network", ship="eval")
    ppm_order = Var(6, "longest context in bytes", 1, 15, ship="eval")
    mix_rows = Var(20, "log2 of the 64-byte rows in a stream's tables", 8, 26, ship="eval")
    mix_streams = Var(1, "runs of documents, each with its own counts", 1, 65536, ship="eval")
    mix_threads = Var(0, "that mix, on each rank; 0 = the cores it has", 0)
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
    RETIRED = {
        "MTP_NUM_HEADS": ("0", "it costs 0.028 BPB"),
        "QUANT_CLIP": ("std", "a search lost at equal size"),
        "QAT_START": ("1 1.0", "see BytePatchJEPA"),
        "TTT_MODULES": ("blocks", "see BytePatchJEPA"),
        "TRAIN_ALIGN": ("stream", "see TokenBest"),
        "GENERATE": ("", "scripts/generate.py writes texts"),
        "JEPA_CHUNK_SIZE": ("0", "the JEPA objective is the trunk's"),
        "DRAFT": ("0", "draft heads are the trunk's"),
        "MIX": ("binary", "PPM-D is BytePPM's, and gains less"),
        **{f"TTT_{name}": ("", "updates of all weights are BytePPM's") for name in (
            "CHUNK_TOKENS", "BATCH_ROWS", "EPOCHS", "LR", "MOMENTUM", "GRAD_CLIP")},
        "TOKENIZER_PATH": ("", "ids are bytes, which the mixture counts"),
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
        self.bits_by_class = self._parse_classes("bits", int, 2, 8)
        self.growth = self._parse_growth()
        self.k_by_class = self._parse_classes("quant_k", float, 0.1, 1000)
        self.rate_by_class = self._parse_classes("quant_rate", float, 0, 10)
        self.head_dim = self.model_dim // self.num_heads
        self.eval_seq_len = self.eval_seq_len or self.train_seq_len
        least = min(32, self.eval_seq_len)
        self.doc_chunk = self.ttt_doc_chunk or max(self.eval_seq_len // 8, least)
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

    def _parse_numbers(self, name: str, low: int, high: int) -> tuple[int, ...]:
        """`3, 2` -> (2, 3): different integers from `low` to `high`."""
        var, text = self.vars()[name], getattr(self, name)
        parts = [part.strip() for part in text.split(",")]
        numbers = [int(part) if part.isdecimal() else -1 for part in parts if part]
        if any(not low <= n <= high for n in numbers) or len(set(numbers)) != len(numbers):
            raise UserError(f"{var.name}={text!r} is not accepted: different integers from {low} "
                            f"to {high}, with commas ({var.why})")
        return tuple(sorted(numbers))

    def _parse_growth(self) -> list[tuple[int, float]]:
        """`4:0.4,1` -> [(4, 0.4), (1, 1.0)]: updates a step, and the progress that ends them."""
        var, found = self.vars()["batch_growth"], [(math.inf, 0.0)]
        for part in f"{self.batch_growth}:1".split(","):  # the last one stays to the end
            match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d*\.?\d+)\s*", part)
            count, end = (int(match[1]), float(match[2])) if match else (0, 0.0)
            if not (0 < count < found[-1][0] and found[-1][1] < end <= 1):
                text = self.batch_growth
                raise UserError(f"{var.name}={text!r} is not accepted: NUMBER:SHARE, ... "
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
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return y.transpose(1, 2)


QUERY_BLOCK = 128  # for `block_attention`


def block_attention(q: Tensor, k: Tensor, v: Tensor, mask=None) -> Tensor:
    """Causal attention by blocks of queries, each with the keys that it may see.
    The backward pass finds its weights stored; torch's kernel computes them again."""
    if mask is not None:
        return sdpa_attention(q, k, v, mask)
    groups, dim = k.size(2), q.size(3)
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))  # (B * K, T, d)
    out = []

    for query in (q * dim**-0.5).transpose(1, 2).split(QUERY_BLOCK, 2):
        first = len(out) * QUERY_BLOCK
        stop = first + query.size(2)
        hidden = ~torch.ones(stop - first, stop, dtype=torch.bool, device=q.device).tril(first)
        flat = query.unflatten(1, (groups, -1)).flatten(2, 3).flatten(0, 1)  # heads share keys
        scores = torch.bmm(flat, keys[:, :stop].mT)
        scores = scores.masked_fill(hidden.repeat(q.size(2) // groups, 1), -torch.inf)
        out.append(torch.bmm(scores.softmax(-1), values[:, :stop]).view(query.shape))
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
    Flash: where documents begin (cu_seqlens), padded to few shapes, which warm-up meets; other
    rungs: a mask (B, 1, T, T)."""
    if rung in FLASH:
        begins = F.pad(docs[:, 1:] != docs[:, :-1], (1, 0), value=True)
        first = begins.flatten().nonzero().flatten().int()
        room = max(64, docs.numel() // 128, 1 << len(first).bit_length())
        return F.pad(first, (0, room - len(first)), value=docs.numel())
    return causal_mask(docs, docs.size(1))


def check_rung(rung: str, args: Hyperparameters, runtime: Runtime) -> None:
    """Raises unless a rung runs both ways here and agrees with `math`."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 128, heads, args.head_dim, generator=generator) for heads in (2, 1))
    q, k = (x.to(runtime.device, runtime.dtype).requires_grad_() for x in (q, k))
    docs = (torch.arange(128, device=runtime.device)[None] - 1) // 50  # begin at 1, 51 and 101
    masks = (document_mask(name, docs) if args.doc_mask else None for name in (rung, "math"))
    out = attention_of(rung)(q, k, k, next(masks))
    wanted = math_attention(q, k, k, next(masks))
    out.sum().backward()
    torch.testing.assert_close(out.float(), wanted.float(), atol=3e-2, rtol=1e-5)


def attention_seconds(rung: str, args: Hyperparameters, runtime: Runtime) -> float:
    """Seconds of one layer's attention, both ways, in training on a GPU."""
    rows = max(1, min(args.device_batch_tokens, args.train_batch_tokens) // args.train_seq_len)
    like = {"device": runtime.device, "dtype": runtime.dtype}
    q, k, v = (torch.randn(rows, args.train_seq_len, heads, args.head_dim, **like).requires_grad_()
               for heads in (args.num_heads, args.num_kv_heads, args.num_kv_heads))
    attend = attention_of(rung)
    if runtime.compile:  # it must fit in a graph
        attend = torch.compile(attend, dynamic=False, fullgraph=True)

    def both_ways() -> None:
        out = attend(q, k, v)
        torch.autograd.grad(out, (q, k, v), out)

    return Timer("both_ways()", globals=locals()).timeit(5).mean  # waits for the GPU


def pick_attention(args: Hyperparameters, runtime: Runtime) -> str:
    """The first rung from ATTENTION down that agrees with `math`; with `auto` on GPUs the fastest.
    On CPUs no clock decides, since bits depend on the rung; nor with DOC_MASK, where flash is
    first. All ranks look, rank 0 chooses."""
    rungs = [*FLASH, *ATTENTION]
    first = 0 if args.attention == "auto" else rungs.index(args.attention)
    gpu, bf16 = runtime.device.type == "cuda", runtime.dtype == torch.bfloat16
    unfit = {"cpu"} if gpu else {*FLASH}
    timed = gpu and args.attention == "auto" and not args.doc_mask
    seconds = {}
    for rung in rungs[first:]:
        if rung in unfit or not bf16 and rung in (*FLASH, "cpu"):
            continue
        if seconds and (not timed or rung == "math"):
            break
        try:
            check_rung(rung, args, runtime)
            seconds[rung] = attention_seconds(rung, args, runtime) if gpu else 0.0
        except Exception as error:  # no package, no memory
            runtime.notes.append(f"attention: no {rung}, {error!r:.90}")

    if not seconds:
        raise UserError(f"ATTENTION={args.attention}: no rung from there on runs here; use auto")
    if timed:
        table = ", ".join(f"{rung} {1e3 * taken:.2f} ms" for rung, taken in seconds.items())
        runtime.notes.append(f"attention: a layer, both ways: {table}")
    choice, = runtime.from_main([rungs.index(min(seconds, key=seconds.get))])
    return rungs[int(choice)]


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


def byte_tables(args: Hyperparameters) -> tuple[np.ndarray]:
    """Bytes that an id stands for: one for ids from 4 up."""
    return (np.arange(args.vocab_size) >= BYTE_OFFSET).astype(np.int64),


def target_bytes(ids: np.ndarray, tables: tuple) -> np.ndarray:
    """Bytes of each target ids[1:], int64, by `byte_tables`."""
    return tables[0][ids[1:]]


def class_table(vocab_size: int) -> np.ndarray:
    """Class of each id, an index into BYTE_CLASSES."""
    names = ["special"] * vocab_size
    for byte in range(256):
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
        group = 1  # no loss pools rows
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

    def prefetch(self, device: torch.device, aux: ChunkJEPA | None = None, step: int = 0):
        """Iterates over (ids, weights, the auxiliary's inputs, next state), two batches ahead.

        A thread makes them; a GPU copies pinned memory without waiting for its queue."""
        steps = itertools.count(step)

        def work() -> tuple[list, dict]:
            ids, weights, state = self.next()
            inputs = None if aux is None else aux.inputs(next(steps), torch.device("cpu"))
            tensors = [ids, weights, inputs]
            if device.type == "cuda":
                tensors = [x if x is None else x.pin_memory() for x in tensors]
            return tensors, state

        with ThreadPoolExecutor(1) as thread:
            ahead = deque(thread.submit(work) for _ in range(2))
            while True:
                tensors, state = ahead.popleft().result()
                ahead.append(thread.submit(work))
                moved = (x if x is None else x.to(device, non_blocking=True) for x in tensors)
                yield *moved, state


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


def rotary_tables(length: int, args: Hyperparameters) -> Tensor:
    """cos and sin of positions below `length`: (2, T, 1, r / 2), r the rotated dimensions.

    fp32, never cast: bf16 positions are wrong beyond 256 (defect G1 of #832). Windows longer than
    TRAIN_SEQ_LEN grow the base by (length / train_seq_len)^(r / (r - 2)) (NTK scaling)."""
    dims = args.rope_dims or args.head_dim
    base = args.rope_base
    if length > args.train_seq_len and dims > 2:
        base *= (length / args.train_seq_len) ** (dims / (dims - 2))
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
    """Keys and values of the positions that decoding has read."""

    def __init__(self, model: GPT):
        args = model.args
        like = {"dtype": model.dtype, "device": model.tok_emb.weight.device}
        shape = args.num_layers, 2, 1, args.eval_seq_len, args.num_kv_heads, args.head_dim
        self.layers = torch.zeros(shape, **like)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values of new positions (1, n, K, d); returns those of all."""
        stop = self.length + k.size(1)
        self.layers[layer, :, :, self.length : stop] = torch.stack((k, v))
        return self.layers[layer, :, :, :stop].unbind()


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
        self.layer = layer
        self.num_kv_heads = args.num_kv_heads
        self.head_dim = args.head_dim
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(args.model_dim, args.model_dim)
        self.c_k = CastedLinear(args.model_dim, kv_dim)
        self.c_v = CastedLinear(args.model_dim, kv_dim)
        self.proj = CastedLinear(args.model_dim, args.model_dim)
        self.q_gain = nn.Parameter(torch.full((args.num_heads,), args.qk_gain_init))
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
            y = self.attend(q, k, v, mask)
        else:
            y = sdpa_attention(q, *past.extend(self.layer, k, v), mask)
        if self.exclude_self:  # XSA: drop the component along this position's own value
            own = F.normalize(v.float(), dim=-1).to(y.dtype).unsqueeze(3)  # (B, T, K, 1, d)
            y = y.unflatten(2, (self.num_kv_heads, -1))
            y = (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3)
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
        self.resid_mix = nn.Parameter(mix) if args.resid_mix else None

    @piece
    def forward(self, x: Tensor, x0: Tensor, scale: Tensor, rotary: Tensor, mask,
                past: KVCache | None) -> Tensor:
        """x (B, T, D) and the embedding x0 -> (B, T, D); `scale` () of the block's inputs."""
        if self.resid_mix is not None:
            mix = self.resid_mix.to(x.dtype)
            x = mix[0] * x + mix[1] * x0
        out = self.attn(rms_norm(x) * scale, rotary, mask, past)
        x = x + self.attn_scale.to(x.dtype) * out
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x) * scale)


class SmearGate(nn.Module):
    """x_t <- (1 - g) x_t + g x_{t-1}, one learned gate per channel; none into a BOS."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate).to(x.dtype) * (ids != BOS_ID).unsqueeze(-1)
        return x + gate * (F.pad(x[:, :-1], (0, 0, 1, 0)) - x)


def in_word(ids: Tensor) -> Tensor:
    """Whether byte260 ids are letters, digits or bytes of non-ASCII characters."""
    byte = ids - BYTE_OFFSET
    letter = byte | 32
    is_letter = (letter >= 97) & (letter <= 122)
    is_digit = (byte >= 48) & (byte <= 57)
    return is_letter | is_digit | (byte >= 128)


def hash_mix(state: Tensor, symbol: Tensor) -> Tensor:
    """One step of a rolling 32-bit hash, in int64."""
    return ((state ^ (state >> 15)) * 0x2C1B3C6D + symbol) & 0xFFFFFFFF


@piece
def look_back(earlier: Tensor, length: Tensor, inside: Tensor, part: Tensor, gram: Tensor,
              word: Tensor, pair: Tensor) -> tuple[Tensor, ...]:
    """Adds `earlier` (B, T), the id `length` - 1 before each one, to its contexts' hashes."""
    gram = hash_mix(gram, torch.where(inside, earlier, PAD_ID) + length)
    inside = inside & (earlier > BOS_ID)
    part = torch.where(inside, part + (in_word(earlier) ^ (part % 2 == 0)), 3)
    word = torch.where(part == 0, hash_mix(word, earlier), word)
    pair = torch.where(part <= 2, hash_mix(pair, earlier), pair)
    return inside, part, gram, word, pair


@check
def check_ngrams(args: Hyperparameters) -> None:
    spare = args.ngram_dim % args.ngram_hashes
    forbid(spare, args, "ngram_dim ngram_hashes", "must be a multiple of the hashes")


class HashEmbedding(nn.Module):
    """Learned embeddings of several contexts of each id, before one projection.

    The contexts: the last n ids for each n in `orders`; with `words` 1 the word so far, with 2 also
    that and the word before it (after PAQ). Each owns a row in each of `hashes` tables of width
    dim / hashes: two rarely share all of their rows. Nothing before the last BOS counts. Only the
    tables start at zero: in #832 both did, and stayed dead (A1)."""

    SALTS = (0x297A2D39, 0x1B873593, 0x6C078965, 0x5D588B65)  # 31 bits: products fit an int64
    WORD_REACH = 20  # ids that a word context looks back

    def __init__(self, orders: tuple, words: int, buckets: int, dim: int, hashes: int, width: int):
        super().__init__()
        self.orders, self.words, self.buckets = orders, words, buckets
        self.salts = self.SALTS[:hashes]
        contexts = len(orders) + words
        self.table = nn.Parameter(torch.zeros(contexts * hashes, buckets, dim // hashes))
        self.proj = CastedLinear(contexts * dim, width)

    def context_hashes(self, ids: Tensor) -> list[Tensor]:
        """A 32-bit hash (B, T) of each context; that at t depends on ids up to t."""
        mask = 0xFFFFFFFF
        gram = (ids * 0x2545F491) & mask
        word, pair = gram.clone(), gram.clone()
        inside = ids > BOS_ID  # of the document, going back
        part = (~in_word(ids)).long()  # 0: word so far, 1: gap, 2: word before, 3: the rest
        grams = {1: gram}
        reach = max(*self.orders, self.WORD_REACH if self.words else 0)
        before = F.pad(ids, (reach - 1, 0), value=PAD_ID)
        lengths = torch.arange(reach + 1, device=ids.device)
        for n in range(2, reach + 1):
            earlier = before[:, reach - n :][:, : ids.size(1)].contiguous()
            inside, part, gram, word, pair = look_back(
                earlier, lengths[n], inside, part, gram, word, pair)
            grams[n] = gram
        return [grams[n] for n in self.orders] + [word, (pair + 1) & mask][: self.words]

    @torch.no_grad()
    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the flattened table: (B, T, contexts * hashes) int64."""
        rows = []
        for state in self.context_hashes(ids):
            state = state ^ (state >> 13)
            for salt in self.salts:
                bucket = (((state * salt) & 0xFFFFFFFF) >> 7) % self.buckets
                rows.append(bucket + len(rows) * self.buckets)
        return torch.stack(rows, -1)

    def forward(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        found = F.embedding(rows, self.table.flatten(0, 1))  # (..., tables, dim / hashes)
        return self.proj(found.flatten(-2).to(dtype))


class GPT(nn.Module):
    """The network: `losses` for training, `logits` for scoring."""

    def __init__(self, args: Hyperparameters, attention: str = "sdpa", dtype=torch.float32):
        super().__init__()
        self.args, self.attention, self.dtype = args, attention, dtype
        dim, layers = args.model_dim, args.num_layers
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        self.ngram = None
        if args.ngram_order_list:
            size = args.ngram_buckets, args.ngram_dim, args.ngram_hashes, dim
            self.ngram = HashEmbedding(args.ngram_order_list, args.ngram_words, *size)
        self.reach = max((*args.ngram_order_list, HashEmbedding.WORD_REACH))  # in ids
        self.smear = SmearGate(dim) if args.smear_gate else None
        self.blocks = nn.ModuleList(Block(args, i, attention) for i in range(layers))
        skips = nn.Parameter(torch.ones(layers // 2, dim))
        self.skip_weights = skips if args.unet_skips else None
        self.aux = None
        self.set_tables()

    def set_tables(self) -> None:
        """Rotary tables by use; what scales the inputs of each block."""
        for use in ("train", "eval"):
            tables = rotary_tables(getattr(self.args, f"{use}_seq_len"), self.args)
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
        if self.ngram is not None:
            nn.init.orthogonal_(self.ngram.proj.weight, generator=generator)

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.tok_emb.weight).to(self.dtype)

    def embed_contexts(self, ids: Tensor, known: int) -> Tensor:
        """ids (B, T) -> normalised embeddings (B, T - known, D), from position `known` on."""
        tail = ids[:, max(0, known - self.reach) :]  # embeddings depend on earlier ids
        rows = None if self.ngram is None else self.ngram.rows(tail)
        return self.embed_rows(tail, rows)[:, known - ids.size(1) :]

    @piece
    def embed_rows(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        """ids (B, T), their rows in the tables -> normalised embeddings (B, T, D)."""
        x = self.embed(ids)
        if rows is not None:
            x = x + self.ngram(rows, self.dtype)
        x = rms_norm(x)
        return x if self.smear is None else self.smear(x, ids)

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
        x0, skips = x.view_as(x), []  # a tensor of its own: equal blocks share a graph
        first_half = len(self.blocks) // 2
        for i, block in enumerate(self.blocks):
            if i >= first_half and skips:
                x = x + self.skip_weights[i - first_half].to(x.dtype) * skips.pop()
            x = block(x, x0, self.ln_scales[i], rotary, mask, past)
            if i < first_half and self.skip_weights is not None:
                skips.append(x)
        return x

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

    def exported(self) -> dict[str, nn.Parameter]:
        """The parameters that an artifact holds: here, all."""
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

    def losses(self, ids: Tensor, weights: Tensor, aux_inputs=None) -> dict[str, Tensor]:
        """ids (B, T + 1), weights (B,) -> "ce", the weighted sum of nats."""
        x = self.hidden(ids[:, :-1], self.rotary_train)
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
    """Share of the peak rate at `progress` in [0, 1]: flat, then linear to MIN_LR at 1.

    Progress is max(step share, time share), so the rate ends at its floor whichever limit
    ends the run (#832 stopped at 17 % of its peak, defect A4)."""
    fall = args.warmdown_iters / args.iterations
    left = min(1.0, (1.0 - progress) / fall) if fall else 1.0
    return args.min_lr + (1.0 - args.min_lr) * max(0.0, left)


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Each of (n, r, c) becomes about U V^T of its SVD (Muon, K. Jordan)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
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


class RowAdagrad:
    """Adagrad with one accumulator a row: p <- p - rate * g / sqrt(sum over steps of mean(g^2)).

    A row of a hash table is met a few times in a run: its rate falls with its own count."""

    def __init__(self, params: list[nn.Parameter], args: Hyperparameters):
        self.params = params
        self.eps = args.adam_eps
        self.sums = [torch.zeros_like(p[..., :1]) for p in params]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for p, total in zip(self.params, self.sums):
            total += p.grad.square().mean(-1, keepdim=True)
            p.addcdiv_(p.grad, total.sqrt() + self.eps, value=-rate)


class Optimizers:
    """Every optimizer: one step for all of them, and what a checkpoint needs.

    group    parameters                              optimizer   rate
    matrix   2-D weights of blocks, hash projection  Muon        MATRIX_LR
    table    n-gram tables                           RowAdagrad  NGRAM_LR
    embed    token embedding                         AdamW       TIED_EMBED_LR
    scalar   gains, mixes, gates: all else           AdamW       SCALAR_LR"""

    GROUPS = ("matrix", "embed", "table", "scalar")

    def __init__(self, model: GPT, args: Hyperparameters, runtime: Runtime):
        self.args, self.runtime, self.model = args, runtime, model
        groups = {group: [] for group in self.GROUPS}
        for name, p in model.named_parameters():
            groups[self.group_of(name, p)].append(p)
        self.muon = Muon(groups["matrix"], args, runtime)
        self.tables = RowAdagrad(groups["table"], args)
        rates = {"embed": (args.tied_embed_lr, args.adam_wd),
                 "scalar": (args.scalar_lr, args.adam_wd)}
        adam = [{"params": groups[group], "lr": rate, "peak": rate, "weight_decay": decay}
                for group, (rate, decay) in rates.items() if groups[group]]
        betas = args.beta1, args.beta2
        self.adam = torch.optim.AdamW(adam, betas=betas, eps=args.adam_eps, fused=True)
        self.replicated = [p for group in self.GROUPS[1:] for p in groups[group]]

    @staticmethod
    def group_of(name: str, p: nn.Parameter) -> str:
        for prefix, group in {"ngram.table": "table", "tok_emb.": "embed"}.items():
            if name.startswith(prefix):
                return group
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
        self.tables.step(args.ngram_lr * rate)

    def state(self) -> dict[str, Tensor]:
        """Every tensor of every optimizer, by name."""
        found = self.muon.state()
        found |= {f"table.{i}": total for i, total in enumerate(self.tables.sums)}
        for i, entry in self.adam.state_dict()["state"].items():
            found |= {f"adam.{i}.{key}": torch.as_tensor(value) for key, value in entry.items()}
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.muon.load_state(state)
        for i, total in enumerate(self.tables.sums):
            total.copy_(state[f"table.{i}"])
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
    model.load_state_dict(found, strict=False, assign=True)
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
           learner: TestTimeTraining | None = None, logits=GPT.logits):
    """Yields (first, stop, fp32 log-probabilities (n, V), nats (n,)) of the n targets of each
    batch, on the device, which may still be at them.

    This is the only path from weights to a score; a learner reads by document."""
    if learner is not None and len(ids) > 1:
        yield from learner.by_document(ids, plan)
        return

    device = next(model.parameters()).device
    rows = windows(len(ids) - 1, plan.length, plan.stride)
    for number in range(plan.rank, -(-len(rows) // plan.batch), plan.ranks):
        batch = rows[number * plan.batch : (number + 1) * plan.batch]
        inputs, position, targets = plan.tensors(ids, batch, device)
        logprobs = logits(model, inputs, position, targets.size(1)).log_softmax(-1)
        nats = -logprobs.gather(-1, targets[..., None]).squeeze(-1)
        first, stop = batch[0, 1], batch[-1, 2]
        yield first, stop, logprobs.flatten(0, 1)[: stop - first], nats.flatten()[: stop - first]


class Adapters:
    """LoRA (Hu et al. 2022): W + alpha / rank B A, one set a document.

    All begin with the same A and B = 0 and learn for themselves, by AdamW with betas 0 and 0.999."""

    OWNERS = ("attn.proj", "mlp.fc", "mlp.proj", "tok_emb")

    def __init__(self, model: GPT, documents: int):
        self.args = model.args
        named = model.named_modules()
        self.owners = [module for name, module in named if name.endswith(self.OWNERS)]
        rank, self.params = self.args.ttt_lora_rank, []
        for owner, a in zip(self.owners, self.starts(tuple(self.owners), rank)):
            b = a.new_zeros(documents, len(owner.weight), rank)
            self.params += [a.repeat(documents, 1, 1), b]
        self.squares, self.steps = [torch.zeros_like(p) for p in self.params], 0

    @staticmethod
    @functools.lru_cache(1)
    def starts(owners: tuple[nn.Module], rank: int) -> list[Tensor]:
        """The A (rank, in) of each owner that documents begin with."""
        generator, found = torch.Generator().manual_seed(0), []
        for weight in (owner.weight for owner in owners):
            size = weight.size(1)
            a = torch.randn(rank, size, generator=generator)
            found.append(a.to(weight.device) / size**0.5)
        return found

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
    wide = args.ttt != "0" and args.doc_chunk > args.eval_seq_len
    forbid(wide, args, "ttt_doc_chunk eval_seq_len", "a window must hold the chunk")


class TestTimeTraining:
    """Adapters of a document: they learn once TTT_DOC_CHUNK of its targets are scored (#1530).

    A document is scored from its own ids only, so their order is free; but the mixture
    reads the text in its order. Documents that follow one another make a group: those
    of about one length share a batch, the longest first; it is handed on once it is
    scored. Ranks share each batch."""

    GROUP = 4  # batches
    GROUP_OF_GPUS = 16  # which read one document as slowly as many

    def __init__(self, model: GPT, runtime: Runtime | None = None, tell=lambda read: None):
        self.model, self.args, self.runtime = model, model.args, runtime
        self.tell = tell  # takes how many targets are read
        self.read, self.updates, self.seconds = 0, 0, 0.0

    def documents(self, ids: np.ndarray) -> np.ndarray:
        """(n, 2): first target and end of each document; a target belongs to that of
        the id before it. Longer ones than TTT_DOC_TOKENS are several, each read from its
        own start."""
        borders = np.union1d([0, len(ids) - 1], np.flatnonzero(ids[:-1] == BOS_ID))
        spans = itertools.pairwise(borders)
        starts = [np.arange(*span, self.args.ttt_doc_tokens) for span in spans]
        starts = np.concatenate([*starts, borders[-1:]])
        return np.stack((starts[:-1], starts[1:]), 1)

    def by_document(self, ids: np.ndarray, plan: WindowPlan):
        """`scored`, a document at a time, in the order of the text."""
        batches = self.GROUP_OF_GPUS if self.model.tok_emb.weight.is_cuda else self.GROUP
        spans, size = self.documents(ids), batches * plan.batch
        for group in np.split(spans, range(size, len(spans), size)):
            found, order = {}, np.argsort(group[:, 0] - group[:, 1], kind="stable")
            for members in np.split(order, range(plan.batch, len(order), plan.batch)):
                found |= zip(members.tolist(), self.adapt(ids, group[members], plan.length))
            for i, (start, stop) in enumerate(group.tolist()):
                logprobs = found.pop(i)
                targets = torch.from_numpy(ids[start + 1 : stop + 1].astype(np.int64))
                targets = targets.to(logprobs.device)[:, None]
                yield start, stop, logprobs, -logprobs.gather(-1, targets).squeeze(-1)

    def adapt(self, ids: np.ndarray, batch: np.ndarray, length: int) -> list[Tensor]:
        """Log-probabilities (n, V) of the targets of each document, the longest first."""
        began, args = time.perf_counter(), self.args
        rank, ranks = (self.runtime.rank, self.runtime.world_size) if self.runtime else (0, 1)
        mine = batch[rank::ranks]
        rows = -(-len(batch) // ranks)
        adapters, parts = Adapters(self.model, rows), []
        for done in range(0, batch[0, 1] - batch[0, 0], args.doc_chunk):
            alive = mine[mine[:, 1] - mine[:, 0] > done]
            part = self.model.tok_emb.weight.new_zeros(rows, args.doc_chunk, args.vocab_size)
            if len(alive):
                part[: len(alive)] = self.adapt_chunk(adapters, ids, alive, done, length)
            parts.append(self.gathered(part, ranks))
            self.read += int((batch[:, 1] - batch[:, 0] - done).clip(0, args.doc_chunk).sum())
            self.tell(self.read)
        whole = torch.cat(parts, 1)
        self.seconds += time.perf_counter() - began
        return [whole[i, : stop - start] for i, (start, stop) in enumerate(batch)]

    def gathered(self, part: Tensor, ranks: int) -> Tensor:
        """(rows, ...) of each rank -> those of all, in the order of the batch."""
        if ranks == 1:
            return part
        full = part.new_empty(ranks, *part.shape)
        all_gather(full.flatten(0, 1), part)
        return full.transpose(0, 1).flatten(0, 1)

    def adapt_chunk(self, adapters: Adapters, ids: np.ndarray, alive: np.ndarray, done: int,
                    length: int) -> Tensor:
        """Log-probabilities (n, chunk, V) of n documents' targets from `done` on. Documents that
        go on learn from these."""
        size, device = self.args.doc_chunk, self.model.tok_emb.weight.device
        begin = max(done + size - length, 0)  # of the window, in the document
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
            if learners:
                nats = -logprobs.gather(-1, goals[..., None]).squeeze(-1)
                adapters.learn((nats.mean(1) * goes_on).sum(), params)
                self.updates += learners
        piece.compiled = compiled
        adapters.detach()
        return logprobs.detach()


def kernel(function):
    """Compiles a loop over bytes, for a thread of its own. No fastmath: scorer and decoder round alike.
    Nothing is allocated: to count references takes as long as to mix."""
    options = {"error_model": "numpy", "nogil": True, "forceinline": True, "_nrt": False}
    return njit(**options)(function) if njit else function


LANES = 16  # floats in a row that a vector instruction takes
if njit:
    # numba leaves short loops scalar, not knowing that arrays lie apart: so these are LLVM's
    VECTOR, WORD = ir.VectorType(ir.FloatType(), LANES), ir.IntType(32)

    def pointer(context, builder, kind, array, place, to):
        data = context.make_array(kind)(context, builder, array).data
        return builder.bitcast(builder.gep(data, [place]), to.as_pointer())

    def pick(builder, x, places):
        return builder.shuffle_vector(x, x, ir.Constant(ir.VectorType(WORD, len(places)), [*places]))

    @extending.intrinsic
    def dot(typing, a, i, b, j):
        """The sum of a[i : i + 16] * b[j : j + 16], of arrays laid flat, in one order for all."""
        def emit(context, builder, signature, args):
            x, y = (builder.load(pointer(context, builder, *part, VECTOR), align=4)
                    for part in ((a, *args[:2]), (b, *args[2:])))
            x = builder.fmul(x, y)
            for half in (8, 4, 2, 1):
                x = builder.fadd(*(pick(builder, x, part) for part in (range(half), range(half, 2 * half))))
            return builder.extract_element(x, WORD(0))
        return types.float32(a, types.intp, b, types.intp), emit

    @extending.intrinsic
    def nudge(typing, a, i, step, b, j):
        """a[i : i + 16] += step * b[j : j + 16]"""
        def emit(context, builder, signature, args):
            to = pointer(context, builder, a, *args[:2], VECTOR)
            x = builder.load(pointer(context, builder, b, *args[3:], VECTOR), align=4)
            step = builder.insert_element(ir.Constant(VECTOR, None), args[2], WORD(0))
            x = builder.fmul(pick(builder, step, [0] * LANES), x)
            builder.store(builder.fadd(builder.load(to, align=4), x), to, align=4)
            return context.get_dummy_value()
        return types.void(a, types.intp, types.float32, b, types.intp), emit

    @extending.intrinsic
    def prefetch(typing, a, i):
        """Asks memory for a[i] before it is needed."""
        def emit(context, builder, signature, args):
            place = pointer(context, builder, a, *args, ir.IntType(8))
            kind = ir.FunctionType(ir.VoidType(), [place.type, WORD, WORD, WORD])
            ask = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
            builder.call(ask, [place, WORD(1), WORD(3), WORD(1)])  # to write, to keep, data
            return context.get_dummy_value()
        return types.void(a, types.intp), emit


# Binary mixing. A byte is eight decisions, first bit first; `node` is a 1 with the bits so far after it.
# Contexts: orders 1-4, 6 and the word so far, counted for this document only (most of the gain:
# the network knows the language but not this text), and orders 2, 4, 6 and the word, counted for
# the whole stream.
# Each owns a row of its table for the first half of a byte and one near it for each second half, 16 uint32:
# [document << 24 | check, 15 counters: probability of a 1 << 10 | n]. The later of two has a row both want.
Mixer = namedtuple("Mixer", "table contexts hashes text places now weights trust hits refined "
                            "rows marks spots path used lanes mixed")
# contexts (C, 4): index into hashes, 1 = this document, where in the table its rows begin, their number - 1;
# hashes (order + 1,): of the last 1 ... order bytes and of the word; places (2^20,): where the same `order`
# bytes ended before; now (6,): by the names below; weights (517, 16), trust (C * 128,), refined (2^20,):
# see `decide` and `refine`; hits (32,): how often matches of a length go on. The rest: scratch.
BYTES, MATCH, MATCHED, START, LAST, DOC = range(6)
CELL, MATCH_LENGTH, EXPECTED, LAST_BYTE, PLACE = range(5)  # `spots`
NODE, SLOT, BIT, WEIGHTS = range(4)  # `path`
STRETCH = np.log(np.arange(0.5, 4096) / np.arange(4095.5, 0, -1)).astype(np.float32)
DOUBT = 2 * np.digitize(0.5 - np.abs(np.arange(256) - 127.5) / 256, (0.03, 0.12, 0.25)).astype(np.uint32)
TRIALS = 8 * np.searchsorted([*range(1, 9), 12, 16, 24, 32, 64, 128], range(256), "right").astype(np.uint32)
# of a counter: shrinking steps in parts of 65536, its largest n, and how it begins
STEPS, LIMIT = np.round(65536 / (np.arange(256) + 1.6)).astype(np.int64), np.uint32(255)
UNKNOWN = np.uint32(1 << 31)
RATE, SLOW, TINY = np.float32(0.001), np.float32(0.02), np.float32(1e-12)
# of log odds: where they end, where the adaptive map does, points of a table for each unit
REACH, SURE, FINE = np.float32(12), np.float32(7.5), np.float32(64)
SQUASHED = (1 / (1 + np.exp(12 - np.arange(24 * 64 + 2) / 64))).astype(np.float32)
ONES = np.ones(LANES, np.float32)
SHARE = 8  # column of `odds` after those of eight bits: the share of an id's kind, byte or special
BLOCK, AHEAD = 1024, 6  # ids at once, and how far ahead memory is asked


@kernel
def squash(z):
    """The logistic function, straight between points of a table."""
    place = (min(max(z, -REACH), REACH) + REACH) * FINE
    low = np.uint32(place)
    return SQUASHED[low] + (SQUASHED[low + 1] - SQUASHED[low]) * (place - np.float32(low))


@kernel
def blend(state, symbol):
    """A 64-bit hash of a state and one more symbol."""
    state = (state ^ np.uint64(symbol)) * np.uint64(0x9E3779B97F4A7C15)
    return state ^ (state >> np.uint64(29))


@kernel
def bit_odds(ids, probs, odds, tree):
    """Odds of a 1 at each bit of each id, and its share: (n, 9) of probs (n, V). tree (32,): scratch."""
    for t in range(len(ids)):
        x, special = ids[t] - BYTE_OFFSET, probs[t, ids[t]] + TINY
        total = 5 * TINY + probs[t, 0] + probs[t, 1] + probs[t, 2] + probs[t, 3]
        for half in range(2):
            # the leaves: sums of 16 bytes, then, of the one that x is in, the bytes
            for i in range(LANES):
                tree[LANES + i] = probs[t, BYTE_OFFSET + (x & ~15) + i]
                if half == 0:
                    tree[LANES + i] = dot(probs, t * probs.shape[1] + BYTE_OFFSET + LANES * i, ONES, 0)
            for i in range(LANES - 1, 0, -1):
                tree[i] = tree[2 * i] + tree[2 * i + 1]
            if half == 0:
                odds[t, SHARE] = (special if x < 0 else tree[1] + TINY) / (total + tree[1])
            for j in range(4 if x >= 0 else 0):
                node = ((x >> (4 - 4 * half)) & 15 | 16) >> (4 - j)
                odds[t, 4 * half + j] = (tree[2 * node + 1] + TINY) / (tree[2 * node] + TINY)


@kernel
def follow(m, ids):
    """Moves contexts and match on over ids, and notes what each of them and the next will need: of contexts
    `rows` and the `marks` that these must bear, and `spots`. All this depends only on ids, so counters
    can be fetched from memory in time."""
    now, hashes, text, spots, order = m.now, m.hashes, m.text, m.spots, len(m.hashes) - 1
    n = now[BYTES]
    for t in range(len(ids) + 1):
        for c in range(len(m.contexts)):
            key = blend(hashes[m.contexts[c, 0]], m.contexts[c, 1] * (now[DOC] + 1))
            row = np.int64(key >> np.uint64(8)) & m.contexts[c, 3]
            m.rows[t, c] = m.contexts[c, 2] + row * LANES
            m.marks[t, c] = np.int64(key >> np.uint64(40)) | 1 | (now[DOC] & 255) << 24
        spots[t, CELL] = np.int64(hashes[min(2, order - 1)] >> np.uint64(48))
        spots[t, LAST_BYTE] = now[LAST]
        if t == len(ids):
            break
        x = ids[t] - BYTE_OFFSET
        if x < 0:  # BOS forgets the history and keeps what was learned
            hashes[:] = 0
            now[LAST] = 0
            now[DOC] += 1
            continue
        for k in range(order - 1, 0, -1):
            hashes[k] = blend(hashes[k - 1], x + 1)
        hashes[0] = blend(np.uint64(0), x + 1)
        letter = x | 32
        inside = 97 <= letter <= 122 or 48 <= x <= 57 or x >= 128
        hashes[order] = blend(hashes[order], letter) if inside else np.uint64(0)
        spots[t, PLACE] = np.int64(hashes[order - 1] >> np.uint64(44))
        text[now[BYTES]] = x
        now[LAST] = x
        now[BYTES] += 1
    # the match goes on, or the last place of the same bytes may begin another
    for t in range(len(ids) + 1):
        length = now[MATCHED]
        spots[t, MATCH_LENGTH] = min(length, 31)
        spots[t, EXPECTED] = np.int64(text[now[MATCH]]) | 256 if length else 0
        if t == len(ids):
            break
        if t + AHEAD < len(ids):
            prefetch(m.places, spots[t + AHEAD, PLACE])
        if ids[t] < BYTE_OFFSET:
            now[MATCHED], now[START] = 0, n
            continue
        if length and text[now[MATCH]] == text[n]:
            now[MATCHED] += 1
            now[MATCH] += 1
        else:
            before, length = np.int64(m.places[spots[t, PLACE]]) - 1, 0
            most = min(before, n - now[START], 31)  # it may not begin before this document does
            while length <= most and text[before - length] == text[n - length]:
                length += 1
            now[MATCHED], now[MATCH] = length if length >= order else 0, before + 1
        n += 1
        m.places[spots[t, PLACE]] = n


@kernel
def refined_row(m, t, node):
    return ((m.spots[t, CELL] ^ (node * 40503)) & 65535) * LANES


@kernel
def fetch(m, t, x, learns):
    """Reads the counters of byte x's bits; learning, it moves them on at once, since no other bit reads
    them. `path`: each bit's node, place in a row, value; `lanes`: the inputs of eight decisions and, from
    8 on, weights of their own; `used`: the cells of `trust` that these are from."""
    path, table, lanes = m.path, m.table, m.lanes
    for j in range(8):
        path[NODE, j], path[BIT, j] = (x | 256) >> (8 - j), (x >> (7 - j)) & 1
        path[SLOT, j] = ((x if j > 3 else x >> 4) & 15 | 16) >> (4 - (j & 3))
    # a row that bears another's mark is taken over
    for c in range(len(m.contexts)):
        mark = m.marks[t, c]
        for half in range(2):
            row = m.rows[t, c] ^ (LANES * (1 + (x >> 4)) * half)
            head = table[np.uint64(row)]
            here = np.uint32(head == mark)  # this document has met the context
            other = ((head ^ mark) & np.uint32(0xFFFFFF)) != 0
            if learns:
                table[np.uint64(row)] = mark
                if other:
                    table[row + 1 : row + LANES] = UNKNOWN
            for j in range(4 * half, 4 * half + 4):
                place = np.uint64(row + path[SLOT, j])
                counter = UNKNOWN if other else table[place]
                n, p = counter & np.uint32(1023), np.int64(counter >> np.uint32(10))
                cell = np.uint64(128 * c + (TRIALS[n] | DOUBT[counter >> np.uint32(24)] | here))
                m.used[j, c] = cell
                lanes[j, 1 + c] = STRETCH[counter >> np.uint32(20)]
                lanes[8 + j, 1 + c] = m.trust[cell]
                if learns:
                    p += ((path[BIT, j] << 22) - p) * STEPS[n] >> 16
                    table[place] = np.uint32(p << 10) | min(n + np.uint32(1), LIMIT)


@kernel
def decide(m, t, odds):
    """Writes `mixed`, the log odds of a 1 at each bit of the path: logistic mixing (Mahoney 2005, lpaq).
    Inputs are log odds: the network's, a counter's from each context, the match's. An input's weight is
    a sum of three, picked by how long the match is, by the node and by the last byte. A counter's has a
    fourth, `trust`, picked by how often it was asked, how sure it is and whether this document has met
    its context."""
    path, lanes, contexts = m.path, m.lanes, len(m.contexts)
    length, expected = m.spots[t, MATCH_LENGTH], m.spots[t, EXPECTED]
    hit = min(max(m.hits[length], 0.001), 0.9999)
    chance = np.float32(math.log(hit / (1 - hit)) if length else 0.0)
    for j in range(8):
        lanes[j, 0] = min(max(odds[j], -REACH), REACH)
        # the match's bit, where its byte fits the bits so far
        lanes[j, 1 + contexts], path[WEIGHTS, j] = 0, 0
        if (expected >> (8 - j)) == path[NODE, j]:
            lanes[j, 1 + contexts] = chance if (expected >> (7 - j)) & 1 else -chance
            path[WEIGHTS, j] = 1 + length // 8
    last = LANES * (261 + m.spots[t, LAST_BYTE])
    for j in range(8):
        a, b, i = LANES * path[WEIGHTS, j], LANES * (5 + path[NODE, j]), LANES * j
        z = dot(m.weights, a, lanes, i) + dot(m.weights, b, lanes, i)
        m.mixed[j] = z + (dot(m.weights, last, lanes, i) + dot(lanes, 8 * LANES + i, lanes, i))


@kernel
def refine(m, t, j, learns):
    """The probability of a 1 at bit j: the logistic function of the mixed log odds where they are sure, else
    averaged with an adaptive map of it, picked by the last three bytes and the node (the APM of lpaq)."""
    z, one = m.mixed[j], squash(m.mixed[j])
    if abs(z) < SURE:
        knot = np.uint64(z + SURE)
        part = z + SURE - np.float32(knot)
        place = np.uint64(refined_row(m, t, m.path[NODE, j])) + knot
        low, high = m.refined[place], m.refined[place + np.uint64(1)]
        one = np.float32(0.5) * (one + low + (high - low) * part)
        if learns:
            y = np.float32(m.path[BIT, j])
            m.refined[place] += (y - low) * (SLOW - part * SLOW)
            m.refined[place + np.uint64(1)] += (y - high) * (part * SLOW)
    return one


@kernel
def learn(m, t):
    """Updates the weights of eight decisions and the match's odds."""
    path, length, expected = m.path, m.spots[t, MATCH_LENGTH], m.spots[t, EXPECTED]
    last = LANES * (261 + m.spots[t, LAST_BYTE])
    for j in range(8):
        step, i = RATE * (np.float32(path[BIT, j]) - squash(m.mixed[j])), LANES * j
        nudge(m.weights, LANES * path[WEIGHTS, j], step, m.lanes, i)
        nudge(m.weights, LANES * (5 + path[NODE, j]), step, m.lanes, i)
        nudge(m.weights, last, step, m.lanes, i)
        for c in range(len(m.contexts)):
            m.trust[m.used[j, c]] += step * m.lanes[j, 1 + c]
        if path[WEIGHTS, j]:
            right = ((expected >> (7 - j)) & 1) == path[BIT, j]
            m.hits[length] += (np.float32(right) - m.hits[length]) * SLOW


@kernel
def mixer_score(m, ids, odds, nats, learns):
    """nats (n,) of ids (n,). Learning, they follow one another; else each is what may come next."""
    for k in range(len(ids)):
        t, x, p = k if learns else 0, ids[k] - BYTE_OFFSET, 1.0
        if learns and k + AHEAD < len(ids):
            soon = max(ids[k + AHEAD] - BYTE_OFFSET, 0)
            for c in range(len(m.contexts)):
                prefetch(m.table, m.rows[k + AHEAD, c])
                prefetch(m.table, m.rows[k + AHEAD, c] ^ (LANES * (1 + (soon >> 4))))
            for j in range(8):
                prefetch(m.refined, refined_row(m, k + AHEAD, (soon | 256) >> (8 - j)))
        # a special id has the network's share
        if x >= 0:
            fetch(m, t, x, learns)
            decide(m, t, odds[k])
            for j in range(8):
                one = refine(m, t, j, learns)
                p *= one if m.path[BIT, j] else 1 - one
            if learns:
                learn(m, t)
        nats[k] = -np.float64(odds[k, SHARE]) - math.log(p)


@check
def check_mixture(args: Hyperparameters) -> None:
    forbid(args.ppm_weight and not njit, args, "ppm_weight", "install numba, or 0: only the network")


def cache_lines(shape: tuple, kind: type) -> np.ndarray:
    """Zeros that begin with a cache line, so that 64 bytes of them are in one."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    raw = np.zeros(size + 64, np.uint8)
    return raw[-raw.ctypes.data % 64 :][:size].view(kind).reshape(shape)


def fresh_mixer(contexts: list, order: int, rows: int) -> Mixer:
    """A binary mixer that has seen nothing: it begins as only the network. contexts: (order - 1 or, for the
    word, order; 1 = only of this document, which needs fewer rows than the stream: an eighth)."""
    sizes = np.array([1 << (rows - 3 * document) for _, document in contexts], np.int64)
    found = np.array(contexts, np.int64).reshape(-1, 2)
    found = np.column_stack((found, LANES * (np.cumsum(sizes) - sizes), sizes - 1))
    weights, n = cache_lines((517, LANES), np.float32), len(contexts)
    weights[:5, 0] = 1
    refined = cache_lines((65536, LANES), np.float32)
    refined[:] = 1 / (1 + np.exp(SURE - np.arange(LANES)))
    return Mixer(
        cache_lines((sizes.sum() * LANES,), np.uint32), found, np.zeros(order + 1, np.uint64),
        np.zeros(0, np.uint8), np.zeros(1 << 20, np.int32), np.zeros(6, np.int64), weights,
        np.zeros(n * 128, np.float32), np.full(32, 0.75, np.float32), refined.reshape(-1),
        np.zeros((BLOCK + 1, n), np.int64), np.zeros((BLOCK + 1, n), np.uint32),
        np.zeros((BLOCK + 1, 5), np.int64), np.zeros((4, 8), np.int64), np.zeros((8, n), np.uint64),
        cache_lines((2 * 8, LANES), np.float32), np.zeros(8, np.float32))


class Mixture:
    """The network's distributions mixed with those of counts, which start empty and learn what was scored.
    `score` books ids; a decoder asks for `distribution` and hands the id that it decodes to `push`: the
    same numbers. A step uses what the ids before it taught: a function of the prefix."""

    def __init__(self, args: Hyperparameters):
        self.args, self.weight, order = args, args.ppm_weight, args.ppm_order
        document = [(min(k, order) - 1, 1) for k in (1, 2, 3, 4, 6)] + [(order, 1)]
        stream = [(k - 1, 0) for k in range(2, order + 1, 2)] + [(order, 0)]
        self.state = fresh_mixer(document + stream, order, args.mix_rows)

    def _make_room(self, ids: int) -> None:
        """The text's array doubles with it, so that kernels never have to allocate."""
        used = self.state.now[BYTES]
        need = int(used + ids)
        forbid(need >= 1 << 32, self.args, "mix_streams", "this text needs more streams")
        if need > len(old := self.state.text):
            grown = np.zeros(max(need, 2 * len(old)), old.dtype)
            grown[:used] = old[:used]
            self.state = self.state._replace(text=grown)

    def evidence(self, ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """What `book` needs of the network's log-probabilities (n, V) at ids (n,).

        Log odds of their bits (n, 9), or without a mixture the log-probabilities of the ids.
        It asks no state."""
        if not self.weight:
            return np.take_along_axis(logprobs, ids[:, None], 1)[:, 0]
        odds, tree = np.ones((len(ids), SHARE + 1), np.float32), np.zeros(2 * LANES, np.float32)
        for first in range(0, len(ids), BLOCK):  # probabilities that still fit a cache
            part = slice(first, first + BLOCK)
            bit_odds(ids[part], np.exp(logprobs[part]), odds[part], tree)
        return np.log(odds, out=odds)

    def book(self, ids: np.ndarray, odds: np.ndarray, learns: bool = True) -> np.ndarray:
        """fp64 nats (n,) of ids (n,) that follow one another or, unless it learns, may all come next."""
        if not self.weight:
            return -odds.astype(np.float64)
        nats = np.zeros(len(ids))
        self._make_room(len(ids))
        for first in range(0, len(ids), BLOCK):
            part = slice(first, first + BLOCK)
            follow(self.state, ids[part] if learns else ids[:0])
            mixer_score(self.state, ids[part], odds[part], nats[part], learns)
        return nats

    def score(self, ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """fp64 nats (n,) of ids (n,), given the network's log-probabilities (n, V) at each; learns them."""
        ids, logprobs = np.asarray(ids, np.int64), np.ascontiguousarray(logprobs, np.float32)
        return self.book(ids, self.evidence(ids, logprobs))

    def distribution(self, logprobs: np.ndarray) -> np.ndarray:
        """fp64 log-probabilities (V,) of the next id, given the network's: what `score` would book for
        each. Nothing is learned."""
        ids, logprobs = np.arange(len(logprobs)), np.asarray(logprobs, np.float32)
        return -self.book(ids, self.evidence(ids, np.tile(logprobs, (len(ids), 1))), False)

    def push(self, token: int, logprobs: np.ndarray) -> None:
        self.score(np.array([token]), logprobs[None])


def run_of(place, count: int, streams: int):
    """The run of a document that begins at `place` of `count` ids; a decoder that has the count follows."""
    return place * streams // max(count, 1)


def run_starts(ids: np.ndarray, streams: int) -> np.ndarray:
    """Where the runs of ids (n,) begin: at a BOS, but the first at 0. With few documents there are fewer."""
    places = np.union1d(0, np.flatnonzero(ids == BOS_ID))
    _, first = np.unique(run_of(places, len(ids), streams), return_index=True)
    return places[first]


def score(model: GPT, ids, positions=()) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """(nats of ids[1:], {t: log-probabilities (V,) of target t, for t in `positions`})."""
    args, ids, wanted = model.args, np.asarray(ids), set(positions)
    blocks = -(-len(ids) // args.eval_stride)  # a short text needs no full batch
    batch = max(1, min(args.eval_batch_tokens // args.eval_seq_len, blocks))
    plan = WindowPlan(args.eval_seq_len, args.eval_stride, batch)
    learner = TestTimeTraining(model) if args.ttt != "0" else None
    nats, vectors, mixture = np.zeros(max(len(ids) - 1, 0)), {}, Mixture(args)
    starts = {*run_starts(ids, args.mix_streams)[1:].tolist()}
    # to each position that is asked for or begins a run, and on
    for first, stop, logprobs, _ in scored(model, ids, plan, learner=learner):
        logprobs, begin = logprobs.cpu().numpy(), first
        for t in [*sorted((wanted | starts).intersection(range(first, stop))), stop]:
            nats[begin:t] = mixture.score(ids[begin + 1 : t + 1], logprobs[begin - first : t - first])
            if t in starts and t < stop:
                mixture = Mixture(args)
            if t in wanted and t < stop:
                vectors[t] = mixture.distribution(logprobs[t - first])
            begin = t
    return nats, vectors


def try_scoring(model: GPT, runtime: Runtime) -> None:
    """Meets every shape of a score once, on made-up ids and without a collective."""
    args, length = model.args, model.args.eval_seq_len
    for stride in sorted({length, args.eval_stride}):
        plan = WindowPlan(length, stride, max(1, args.eval_batch_tokens // length))
        list(scored(model, np.full(2, BOS_ID), plan))


PROGRESS_SECONDS = 15  # between lines about a pass under way


BACKLOG = 1 << 30  # bytes that may wait to be mixed, of a rank; four times as many on a GPU's


def leaving(*tensors: Tensor):
    """Starts to copy a batch to the host, each tensor in one piece -> a function that waits for them."""
    if tensors[0].device.type != "cuda":
        return lambda: [x.cpu().numpy() for x in tensors]
    copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
              for x in tensors]
    done = torch.cuda.current_stream().record_event()
    return lambda: done.synchronize() or [copy.numpy() for copy in copies]


class Ledger:
    """Adds up a pass: nats by class of bytes, the network's and, where `mix`, the mixture's.

    The text is cut into runs of documents, each with counts of its own. Ranks take turns at runs, and a
    rank's threads at its share, while the network reads on. A run is added up in its own order, so sums
    agree to the last digit whoever adds."""

    def __init__(self, args: Hyperparameters, runtime: Runtime, ids: np.ndarray, mix: bool):
        self.args, self.runtime, self.ids, self.mix = args, runtime, ids, mix
        self.classes = class_table(args.vocab_size)
        self.starts = run_starts(ids, args.mix_streams if mix else 1)
        self.stops = np.append(self.starts[1:], len(ids) - 1)
        self.sums = np.zeros((1 + mix, len(self.starts), len(BYTE_CLASSES) + 1))
        self.mixtures: dict[int, Mixture] = {}
        # a run stays in one thread; any thread may prepare its batches
        count = args.mix_threads or max(1, os.cpu_count() // runtime.world_size)
        count = min(count, -(-len(self.starts) // runtime.world_size))
        self.readers = ThreadPoolExecutor(count)
        self.threads = [ThreadPoolExecutor(1) for _ in range(count)]
        self.seconds, self.waited = np.zeros(count), 0.0
        self.jobs, self.ahead = deque(), 0  # what is not booked: jobs, and their targets

    def take(self, first: int, stop: int, logprobs: Tensor, nats: Tensor) -> None:
        """Has the targets first ... stop - 1 booked some time later, those that are this rank's."""
        arrived, ranks = None, self.runtime.world_size
        runs = range(np.searchsorted(self.starts, first, "right") - 1, np.searchsorted(self.starts, stop))
        for run in [run for run in runs if run % ranks == self.runtime.rank]:
            arrived = arrived or leaving(nats, *[logprobs][: self.mix])
            begin, end = max(first, self.starts[run]), min(stop, self.stops[run])
            if self.mix and run not in self.mixtures:
                self.mixtures[run] = Mixture(self.args)
            ids = self.ids[begin + 1 : end + 1].astype(np.int64)
            found = self.readers.submit(self.read, run, ids, slice(begin - first, end - first), arrived)
            thread = run // ranks % len(self.threads)
            job = self.threads[thread].submit(self.book, thread, run, ids, found)
            self.jobs.append((stop - first, job))
            self.ahead += stop - first
        room = BACKLOG * (4 if logprobs.is_cuda else 1)  # a group of documents comes at once
        self.wait(room // (4 * (SHARE + 2)))

    def wait(self, left: int) -> None:
        """Until no more than so many targets are not booked."""
        began = time.perf_counter()
        while self.ahead > left:
            size, job = self.jobs.popleft()
            job.result()
            self.ahead -= size
        self.waited += time.perf_counter() - began

    def read(self, run: int, ids: np.ndarray, part: slice, arrived) -> tuple:
        nats, *logprobs = (x[part] for x in arrived())
        return nats, self.mixtures[run].evidence(ids, *logprobs) if self.mix else None

    def book(self, thread: int, run: int, ids: np.ndarray, found) -> None:
        (nats, evidence), began = found.result(), time.perf_counter()
        parts = [nats.astype(np.float64)]
        if self.mix:
            parts.append(self.mixtures[run].book(ids, evidence))
        for sums, part in zip(self.sums[:, run], parts):
            np.add.at(sums, self.classes[ids], part)
            sums[-1] += len(ids)
        if sums[-1] == self.stops[run] - self.starts[run]:
            self.mixtures.pop(run, None)  # its memory is the next run's
        self.seconds[thread] += time.perf_counter() - began

    def close(self) -> Tensor:
        """Sums (1 or 2, classes + 1) of all ranks: nats of the network and of the mixture, targets."""
        self.wait(0)
        for pool in (self.readers, *self.threads):
            pool.shutdown()
        return self.runtime.all_reduce(torch.from_numpy(self.sums)).sum(1)


class Evaluator:
    """Scores models on the validation text; a pass ends as a line of the log."""

    def __init__(self, args: Hyperparameters, data: Dataset, runtime: Runtime, log: Log):
        self.args, self.runtime, self.log = args, runtime, log
        self.tables = byte_tables(args)
        self.results = {}
        # VAL_BYTES cuts the text after the target that reaches it
        ids = data.val
        sizes = target_bytes(ids, self.tables)
        self.prefix = args.val_bytes if args.val_bytes < sizes.sum() else 0
        if self.prefix:
            targets = int(np.searchsorted(np.cumsum(sizes), args.val_bytes)) + 1
            ids, sizes = ids[: targets + 1], sizes[:targets]
        self.ids, self.bytes = ids, int(sizes.sum())
        if not self.bytes:
            raise UserError(f"{data.val_files[0]}: its targets stand for no byte")

    def describe(self, manifest: dict) -> str:
        original = manifest.get("val_bytes") or self.bytes
        note = f" prefix:{self.prefix}" if self.prefix else ""
        if original != self.bytes and not self.prefix:
            note = f" (original text {original}: normalised; these bytes divide)"
        return f"val: targets:{len(self.ids) - 1} bytes:{self.bytes}{note}"

    def spread(self, model: GPT, ids: Tensor, first: Tensor, span: int) -> Tensor:
        """`logits`, the batch spread over ranks: each sees all of the stream, in its order."""
        if (ranks := self.runtime.world_size) == 1:
            return model.logits(ids, first, span)
        ids, first = (x.chunk(ranks)[self.runtime.rank] for x in (ids, first))
        mine = model.logits(ids, first, span)
        full = mine.new_empty(len(mine) * ranks, *mine.shape[1:])
        all_gather(full, mine.contiguous())
        return full

    def run(self, name: str, model: GPT, length: int, stride: int, learn: bool = False,
            mix: bool = False) -> dict:
        """val_bpb = nats / ln 2 / bytes: special ids cost nats and add no byte. `mix`: NAME_mix as well."""
        args, runtime, began = self.args, self.runtime, time.perf_counter()
        ledger = Ledger(args, runtime, self.ids, mix)
        targets, shown = len(self.ids) - 1, began

        def tell(stop: int) -> None:
            nonlocal shown
            if (now := time.perf_counter()) - shown > PROGRESS_SECONDS:
                shown, sums = now, ledger.sums[-1].sum(0)
                loss = sums[:-1].sum() / max(sums[-1], 1)
                self.log(f"  {name} {stop / targets:.0%} {now - began:.0f}s loss:{loss:.4f}")

        learner = TestTimeTraining(model, runtime, tell) if learn else None
        batch = max(1, args.eval_batch_tokens // length)
        plan = WindowPlan(length, stride, batch * runtime.world_size)
        for first, stop, logprobs, nats in scored(model, self.ids, plan, learner, self.spread):
            ledger.take(first, stop, logprobs, nats)
            tell(stop)

        read = time.perf_counter() - began - ledger.waited
        sums, seconds = ledger.close(), time.perf_counter() - began
        for row, label in zip(sums, (name, f"{name}_mix")):
            assert int(row[-1]) == targets, f"{label}: scored {int(row[-1])} targets of {targets}"
            nats = float(row[:-1].sum())
            by_class = zip(BYTE_CLASSES, row.tolist())
            bits = {kind: total / math.log(2) for kind, total in by_class if total}
            result = {"val_loss": nats / targets, "val_bpb": nats / math.log(2) / self.bytes,
                      "targets": targets, "bytes": self.bytes, "seconds": seconds,
                      "seq_len": length, "stride": stride, "bits_by_class": bits}
            self.results[label] = result | ({"prefix_bytes": self.prefix} if self.prefix else {})
        if mix:
            spent = torch.tensor([read, max(ledger.seconds), ledger.waited])
            read, mixed, waited = runtime.all_reduce(spent, dist.ReduceOp.MAX).tolist()
            runs, slower = len(ledger.starts), "network" if read > mixed else "mixture"
            self.results[label] |= {"mixture": "binary", "runs": runs, "network_seconds": read,
                                    "mix_seconds": mixed, "waited_seconds": waited}
            self.log(f"  {label} network:{read:.1f}s mixture:{mixed:.1f}s waited:{waited:.1f}s "
                     f"runs:{runs} slower:{slower}")
        if learner is not None:
            updates = int(runtime.all_reduce(torch.tensor([learner.updates])))
            self.results[name] |= {"updates": updates, "adapt_seconds": learner.seconds}
        return self.results[name]

    def report(self, name: str, model: GPT, stride: int | None = None, learn: bool = False) -> dict:
        """Runs a pass and prints its lines: non-overlapping windows or, with a stride, sliding, mixed."""
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
        self.block, self.start = -1, 0  # the window at hand: its number, where it begins
        self.past = None
        self.known = None  # log-probabilities of the next id

    @torch.no_grad()
    def logprobs(self) -> np.ndarray:
        """fp32 log-probabilities (V,) of the next id. Push the first one, a BOS."""
        if not self.ids:
            raise ValueError("push the first id (BOS) before asking for the second")
        if self.known is not None:
            return self.known
        args, position = self.model.args, len(self.ids) - 1 - self.origin
        stride = args.doc_chunk if self.learner else args.eval_stride
        if (block := position // stride) != self.block:
            if self.learner:
                self.learn(block * stride)
            self.block, self.past = block, KVCache(self.model)
            self.start = self.origin + max((block + 1) * stride - args.eval_seq_len, 0)
        # one pass reads all that the cache lacks
        if self.adapters:
            self.adapters.attach(1)
        ids = torch.tensor([self.ids[self.start :]], device=self.model.tok_emb.weight.device)
        x = self.model.hidden(ids, self.model.rotary_eval, past=self.past)
        self.known = self.model.head(x[:, -1:].float())[0, 0].log_softmax(-1).cpu().numpy()
        if self.adapters:
            self.adapters.detach()
        return self.known

    def learn(self, known: int) -> None:
        """Learns, as the scorer has, from the first `known` targets of the document, asked for
        or not."""
        args, ids = self.model.args, np.array(self.ids)
        span, size = np.array([[self.origin, len(ids)]]), args.doc_chunk
        self.adapters = self.adapters or Adapters(self.model, 1)
        for done in range(size * self.adapters.steps, known if args.ttt_adapt else 0, size):
            self.learner.adapt_chunk(self.adapters, ids, span, done, args.eval_seq_len)

    def push(self, token: int) -> None:
        place = len(self.ids)
        ended = token == BOS_ID or place - self.origin == self.model.args.ttt_doc_tokens
        if self.learner and ended:
            self.origin, self.block, self.adapters = place, -1, None
        self.ids.append(int(token))
        self.known = None


class MixedStream(Stream):
    """The stream through the mixture, which learns each id that is pushed. `length`: how many ids will
    come, by which `score` cuts MIX_STREAMS; 0: a text without an end is one run."""

    def __init__(self, model: GPT, length: int = 0):
        super().__init__(model)
        self.mixture, self.run, self.length = Mixture(model.args), 0, length

    def logprobs(self) -> np.ndarray:
        """fp64 log-probabilities (V,) of the next id. The first id, a BOS, is given: push it."""
        return self.mixture.distribution(super().logprobs())

    def push(self, token: int) -> None:
        if self.ids and self.mixture.weight:
            self.mixture.push(int(token), super().logprobs())
        if token == BOS_ID and self.length:
            run = run_of(len(self.ids), self.length, self.model.args.mix_streams)
            if run > self.run:
                self.mixture, self.run = Mixture(self.model.args), run
        super().push(token)


stream = MixedStream  # the name that every script of the family gives it


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

    def train_step(self, ids: Tensor, weights: Tensor, progress: float, aux_inputs=None) -> dict:
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
            x = (inputs[0] * rows[:, None, None]).flatten(0, -2).float()
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
            x = self.model.hidden(ids[:, :-1], self.model.rotary_train)
            add(["tok_emb.weight"], None, (x,))
        piece.compiled = compiled
        for hook in hooks:
            hook.remove()
        return sums

    def moments(self, batches: int) -> dict[str, np.ndarray]:
        """`input_moments` of the next `batches` training batches, of all ranks."""
        loader = Loader(self.data, self.args, self.plan, self.runtime.rank, self.loader_state)
        sums, device = {}, self.runtime.device
        for _ in range(batches):
            ids, weights, _ = loader.next()  # a row of no weight repeats another
            self.input_moments(ids.to(device), weights.to(device) > 0, sums)
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

        loading = loader.prefetch(runtime.device, self.model.aux, self.step)
        with contextlib.closing(loading) as batches:
            while True:
                self.agree_on_time(time.perf_counter() - started)
                if (progress := self.progress()) >= 1.0:
                    break
                ids, weights, aux_inputs, state = next(batches)
                terms = self.train_step(ids, weights, progress, aux_inputs)
                self.step, self.loader_state = self.step + 1, state
                bad = first_bad.clamp(max=self.step)
                first_bad = torch.where(terms["ce"].isfinite(), first_bad, bad)
                if runtime.device.type == "cuda":  # at most two steps ahead
                    fences.append(torch.cuda.current_stream().record_event())
                    if len(fences) > 2:
                        fences.popleft().synchronize()
                # losses leave the device only when a line is shown
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
        groups = self.plan.rows // self.plan.group
        means = {name: total / groups for name, total in sums.items()}
        return {"train_loss": means["ce"] / (self.plan.group * self.args.train_seq_len)}

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
