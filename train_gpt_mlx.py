"""The trunk's twin for Apple Silicon: the same model, objectives, optimizers, artifact and scores in MLX.

Parent: train_gpt.py, symbol by symbol (`python scripts/lineage.py diff train_gpt.py train_gpt_mlx.py`).
Idea:   the same numbers on another framework: checkpoints, artifacts and settings go both ways. Arrays are
        values here: losses and updates are functions of the weights, and `mx.compile` takes them as they are.

Run:    python train_gpt_mlx.py --help                           every variable, its default and its reason
        python train_gpt_mlx.py                                  one process, Metal or CPU
        mlx.launch --hosts IP,IP python train_gpt_mlx.py         several Macs, the same global batches
        RESUME=auto RUN_ID=name python train_gpt_mlx.py          go on from runs/name/last.safetensors
        EVAL_ONLY=1 ARTIFACT=FILE python train_gpt_mlx.py        score an artifact of either script
        GENERATE=TEXT ARTIFACT=FILE python train_gpt_mlx.py      go on from a text, or from that in a file

The file reads downwards: environment -> batches -> losses -> weights -> artifact -> bits. It needs mlx,
numpy and safetensors; constriction, zstandard, sentencepiece and tqdm are used if installed.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import lzma
import math
import os
import platform
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
from mlx.core import array as Tensor  # the trunk's word for it: signatures stay the same
from mlx.utils import tree_flatten, tree_unflatten
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

# -----------------------------------------------------------------------------
# HYPERPARAMETERS
# -----------------------------------------------------------------------------


class UserError(Exception):
    """A mistake in the environment or in a file. `main` prints it as one line and exits with code 2."""


class Var:
    """One environment variable, of its default's type; `why` is the unit and the reason. `ship` marks what an
    artifact has to carry: "model" builds the network, "eval" only says how it is scored."""

    def __init__(self, default, why: str, *, low=None, high=None, choices=(), ship: str = ""):
        self.default, self.why, self.low, self.high = default, why, low, high
        self.choices, self.ship = choices, ship

    def __set_name__(self, owner, name: str) -> None:
        self.name = name.upper()

    def accepted(self) -> str:
        if self.choices:
            return " | ".join(self.choices)
        kind = {bool: "0 | 1", int: "an integer", float: "a number", str: "a text"}[type(self.default)]
        bounds = {"from": self.low, "to": self.high}
        return kind + "".join(f" {word} {bound}" for word, bound in bounds.items() if bound is not None)

    def parse(self, text: str):
        word, kind, words = text.strip(), type(self.default), {"0": 0, "1": 1, "false": 0, "true": 1}
        with contextlib.suppress(ValueError, KeyError):
            value = bool(words[word.lower()]) if kind is bool else kind(word if self.choices else text)
            low, high = (bound if bound is not None else value for bound in (self.low, self.high))
            finite = kind is str or math.isfinite(value)
            if finite and low <= value <= high and value in (self.choices or [value]):
                return value
        raise UserError(f"{self.name}={text!r} is not accepted: {self.accepted()} ({self.why})")


class Hyperparameters:
    """Every setting of a run, read from the environment once; nothing below this class reads it again."""

    _data = "Data"
    data_path = Var("./data/datasets/fineweb10B_byte260", "folder of *_train_*.bin and *_val_*.bin shards")
    tokenizer_path = Var("", "SentencePiece .model behind the shards; byte260 needs none")
    vocab_size = Var(260, "ids; 260 = PAD BOS EOS UNK + 256 bytes", low=5, high=65536, ship="model")
    train_seq_len = Var(4096, "tokens a training row", low=2, ship="model")
    train_batch_tokens = Var(393216, "tokens an optimizer step, over all ranks and micro-steps", low=2)
    device_batch_tokens = Var(49152, "tokens a forward on one device: the one out-of-memory knob", low=1)
    train_order = Var("sequential", "order of rows within an epoch", choices=("sequential", "shuffled"))
    train_align = Var("stream", "document: rows begin at BOS if they can", choices=("stream", "document"))
    verify_data = Var("auto", "check shards by manifest.json; auto: up to 2 GB", choices=("auto", "0", "1"))
    _model = "Model"
    num_layers = Var(13, "transformer blocks", low=1, ship="model")
    model_dim = Var(512, "width of the residual stream", low=8, ship="model")
    num_heads = Var(8, "query heads", low=1, ship="model")
    num_kv_heads = Var(4, "key/value heads (grouped-query attention)", low=1, ship="model")
    mlp_mult = Var(2.0, "MLP hidden width / model width, fractions allowed", low=0.0, ship="model")
    leaky_slope = Var(0.5, "negative slope of the MLP's squared LeakyReLU; 0 = ReLU^2", ship="model")
    tie_embeddings = Var(True, "logits reuse the token embedding", ship="model")
    tied_embed_init_std = Var(0.005, "std of the token embedding at init", low=0.0)
    logit_softcap = Var(30.0, "cap * tanh(logits / cap); 0 = none", low=0.0, ship="model")
    qk_gain_init = Var(1.5, "initial per-head gain on RMS-normalised queries", ship="model")
    rope_base = Var(10000.0, "rotary base", low=1.0, ship="model")
    rope_dims = Var(16, "rotated dimensions a head; 0 = all (#315)", low=0, ship="model")
    ln_scale = Var(True, "block inputs times 1/sqrt(layer + 1) (#315)", ship="model")
    doc_mask = Var(False, "attention stays inside a document, in training and in scoring", ship="model")
    xsa_last_n = Var(4, "last layers that drop their own value direction (XSA, #265)", low=0, ship="model")
    unet_skips = Var(True, "second half adds the first half's outputs, last first", ship="model")
    resid_mix = Var(True, "each block mixes its input with the embedding", ship="model")
    smear_gate = Var(True, "blend each embedding with the previous one, never across BOS", ship="model")
    bigram_vocab_size = Var(0, "buckets of BigramHash; 0 = none (NGRAM_ORDERS has it)", low=0, ship="model")
    bigram_dim = Var(32, "width of a BigramHash row", low=1, ship="model")
    ngram_orders = Var("2,3,4,5,6", "context lengths hashed into embeddings; 0 = none", ship="model")
    ngram_words = Var(2, "byte260: 1 = the word so far, 2 = and the one before", low=0, high=2, ship="model")
    ngram_buckets = Var(65536, "rows of each table", low=2, ship="model")
    ngram_dim = Var(32, "width of a context's embedding", low=1, ship="model")
    ngram_hashes = Var(2, "tables that it is spread over, each with a hash", low=1, high=4, ship="model")
    draft = Var(0, "ids that draft heads guess beyond the next; 0 = none", low=0, high=16, ship="model")
    _jepa = "Chunk JEPA (#832, corrected)"
    jepa_chunk_size = Var(8, "ids a latent covers; 0 = no JEPA module at all", low=0, ship="model")
    jepa_latent_dim = Var(256, "width of a chunk latent", low=1, ship="model")
    jepa_proj_hidden = Var(256, "hidden width of projector and predictor", low=1, ship="model")
    jepa_adapter = Var(True, "add the predicted latent to the stream", ship="model")
    jepa_adapter_grad = Var(True, "CE trains projector and predictor through the adapter")
    jepa_loss = Var(True, "latent prediction loss")
    jepa_backbone_grad = Var(False, "JEPA losses reach the backbone")
    jepa_sigreg_weight = Var(0.02, "weight of SIGReg inside the JEPA loss; 0 = off", low=0.0)
    jepa_sigreg_projs = Var(256, "random directions of SIGReg, fresh each step", low=1)
    jepa_sigreg_knots = Var(17, "points of its characteristic function on [0.2, 3]", low=2)
    jepa_sigreg_group = Var(4, "sequences pooled into one SIGReg statistic, on any number of ranks", low=1)
    jepa_lambda_max = Var(0.001, "peak weight of the JEPA loss beside CE", low=0.0)
    jepa_phase1_frac = Var(0.3, "progress up to which its weight is 0", low=0.0, high=1.0)
    jepa_phase2_frac = Var(0.5, "share over which it ramps to the peak; 0 afterwards", low=0.0, high=1.0)
    _optimizers = "Optimizers and schedule"
    iterations = Var(9000, "optimizer steps at most", low=1)
    max_wallclock_seconds = Var(600.0, "training time; 0 = no limit; progress = max(step, time)", low=0.0)
    warmdown_iters = Var(3000, "steps (as a share of ITERATIONS) over which the rate falls", low=0)
    min_lr = Var(0.0, "rate at the end, as a share of the peak", low=0.0, high=1.0)
    warmup_steps = Var(2, "throw-away steps that compile every shape, outside the clock", low=0)
    matrix_lr = Var(0.025, "Muon: block matrices", low=0.0)
    muon_momentum = Var(0.99, "final momentum", low=0.0, high=0.9999)
    muon_momentum_warmup_start = Var(0.92, "momentum at step 0", low=0.0, high=0.9999)
    muon_momentum_warmup_steps = Var(1500, "steps from start to final momentum", low=0)
    muon_backend_steps = Var(5, "Newton-Schulz steps", low=1)
    muon_wd = Var(0.04, "decoupled weight decay of Muon, times its rate", low=0.0)
    tied_embed_lr = Var(0.035, "AdamW: tied token embedding, bigram table", low=0.0)
    embed_lr = Var(0.6, "AdamW: token embedding when untied", low=0.0)
    head_lr = Var(0.008, "AdamW: output head when untied", low=0.0)
    scalar_lr = Var(0.025, "AdamW: gains, mixes, gates", low=0.0)
    ngram_lr = Var(0.035, "RowAdagrad: n-gram tables", low=0.0)
    jepa_lr = Var(0.001, "AdamW: projector, predictor, adapter", low=0.0)
    draft_lr = Var(0.003, "AdamW: draft heads", low=0.0)
    adam_wd = Var(0.04, "decoupled weight decay of the embedding and scalar groups", low=0.0)
    beta1 = Var(0.9, "Adam", low=0.0, high=0.9999)
    beta2 = Var(0.95, "Adam", low=0.0, high=0.99999)
    adam_eps = Var(1e-8, "Adam", low=0.0)
    grad_clip_norm = Var(0.3, "global gradient norm after reduction; 0 = no clip", low=0.0)
    ema_enabled = Var(True, "score and export an average of the weights")
    ema_decay = Var(0.997, "decay a step, reached as (1 + t) / (10 + t)", low=0.0, high=0.99999)
    seed = Var(1337, "weights, shuffling and SIGReg directions", low=0)
    _artifact = "Artifact"
    bits = Var("embed:8,ngram:6,attn:6,mlp:6,other:6", "bit width by tensor class")
    quant_clip = Var("std", "std: step = k * std / top; mse: searched per row", choices=("std", "mse"))
    quant_k = Var("embed:4,ngram:24,attn:12,mlp:12,other:6", "k by tensor class: the size knob")
    quant_round = Var("gptq", "gptq: by the inputs' second moments", choices=("nearest", "gptq"))
    gptq_batches = Var(4, "training batches behind them, on the training clock", low=1)
    qat_start = Var(1.0, "progress from which weights are trained as rounded; 1 = never", low=0.0, high=1.0)
    quant_rate = Var("embed:0,ngram:0.116,attn:0,mlp:0,other:0", "price of a bit in squared steps")
    compressor = Var("auto", "auto keeps the smallest", choices=("auto", "rans", "zstd", "lzma", "zlib"))
    artifact_budget_bytes = Var(16_000_000, "code + model, decimal bytes; 0 = no limit", low=0)
    _evaluation = "Evaluation"
    eval_seq_len = Var(0, "window length; 0 = TRAIN_SEQ_LEN", low=0, ship="eval")
    eval_stride = Var(512, "targets scored a window in the sliding pass", low=1, ship="eval")
    eval_batch_tokens = Var(0, "tokens a scoring forward; 0 = DEVICE_BATCH_TOKENS", low=0)
    val_bytes = Var(0, "score only this prefix of the validation text; 0 = all", low=0)
    val_loss_every = Var(0, "validation of the raw weights every so many steps; 0 = at the end only", low=0)
    eval_budget_seconds = Var(600.0, "final scoring of the artifact; 0 = no limit", low=0.0)
    ttt = Var("0", "test-time training: learn from text once it is scored", choices=("0", "sgd"), ship="eval")
    ttt_adapt = Var(True, "0 = the same pass without learning: its control", ship="eval")
    ttt_modules = Var("blocks", "modules that learn, exact paths with commas", ship="eval")
    ttt_chunk_tokens = Var(32768, "targets scored before they are learned from", low=1, ship="eval")
    ttt_batch_rows = Var(16, "rows of TRAIN_SEQ_LEN an update, over all ranks", low=1, ship="eval")
    ttt_epochs = Var(1, "passes over each chunk", low=1, ship="eval")
    ttt_lr = Var(0.002, "rate of SGD at the first chunk", low=0.0, ship="eval")
    ttt_decay_chunks = Var(0, "rate falls as 1 / sqrt(1 + chunks / this); 0 = constant", low=0, ship="eval")
    ttt_momentum = Var(0.9, "kept from chunk to chunk", low=0.0, high=0.9999, ship="eval")
    ttt_grad_clip = Var(1.0, "gradient norm of an update; 0 = no clip", low=0.0, ship="eval")
    eval_only = Var(False, "score ARTIFACT and nothing else")
    artifact = Var("", "path for EVAL_ONLY and GENERATE")
    generate = Var("", "a text, or its file, to go on from with the model in ARTIFACT")
    max_new_tokens = Var(256, "ids to write", low=1)
    temperature = Var(0.0, "0 = greedy", low=0.0)
    speculate = Var(True, "several drafted ids a pass: the same text, sooner")
    _run = "Run"
    run_id = Var("", "folder under RUNS_PATH; empty = time and seed")
    runs_path = Var("./runs", "where runs are kept")
    resume = Var("", "auto, or a checkpoint file")
    checkpoint_every = Var(0, "steps between checkpoints; 0 = only on a signal", low=0)
    train_log_every = Var(200, "steps between log lines; the first ten are always shown", low=1)
    grad_report_every = Var(0, "steps between gradient attribution reports; 0 = none", low=0)
    device = Var("auto", "gpu: Metal, or CUDA in MLX's build for it", choices=("auto", "cpu", "gpu"))
    dtype = Var("auto", "of activations; weights stay fp32", choices=("auto", "fp32", "bf16", "fp16"))
    compile = Var("auto", "auto: on GPUs; CPUs take minutes to build kernels", choices=("auto", "0", "1"))
    attention = Var("auto", "first rung", choices=("auto", "sdpa", "math"))
    memory_limit_mb = Var(0, "memory that MLX may hold before it waits and frees; 0 = its own limit", low=0)
    strict_env = Var(True, "refuse variables that look misspelt; 0 = only warn")
    _launcher = "Ranks: mlx.launch tells MLX, not this script"
    world_size = Var(1, "torchrun's: `mlx.launch` starts this script on several Macs", low=1, high=1)

    # Published variables of ideas that are gone: {name: (values that mean off, reason)}; () = ignored.
    RETIRED = {
        "SWA_ENABLED": (("0",), "EMA replaced it (-0.003 BPB in #375)"),
        "MTP_NUM_HEADS": (("0",), "multi-token heads cost +0.028 BPB in a 10-minute model; DRAFT costs none"),
        "MUON_BETA2": ((), "was never read by #832"),
        **dict.fromkeys(("QAT_ENABLED", "LATE_QAT"), (("0",), "QAT_START took its place")),
        **dict.fromkeys(("SWA_EVERY", "MTP_LOSS_WEIGHT", "QAT_THRESHOLD"), ((), "belongs to one of these")),
        "VAL_BATCH_SIZE": ((), "EVAL_BATCH_TOKENS took its place and does not change the score"),
        "CONTROL_TENSOR_NAME_PATTERNS": ((), "tensors are sorted by shape and module, not by name patterns"),
    }

    def __init__(self, environ: dict[str, str] | None = None, shipped: dict | None = None):
        """Reads `environ`. `shipped`, the settings in an artifact, replaces the defaults of what it names."""
        environ = environ or {}
        self.warnings: list[str] = []
        self._refuse_retired_and_misspelt(environ)
        for name, var in self.vars().items():
            value = (shipped or {}).get(var.name, var.default)
            if environ.get(var.name, "") != "":
                value = var.parse(environ[var.name])
                if shipped and var.ship == "model" and value != shipped[var.name]:
                    raise UserError(f"{var.name}={value} contradicts the artifact, which was made with "
                                    f"{shipped[var.name]}: leave it unset")
            setattr(self, name, value)
        self.ngram_order_list = self._parse_orders()
        self.bits_by_class = self._parse_classes("bits", int, 2, 8)
        self.k_by_class = self._parse_classes("quant_k", float, 0.1, 1000)
        self.rate_by_class = self._parse_classes("quant_rate", float, 0, 10)
        self.eval_seq_len = self.eval_seq_len or self.train_seq_len
        self.eval_batch_tokens = self.eval_batch_tokens or self.device_batch_tokens
        if shipped or not (self.eval_only or self.generate):  # else the artifact's settings are still to come
            self._check(trains=not shipped)

    @classmethod
    def vars(cls) -> dict[str, Var]:
        return {name: var for name, var in vars(cls).items() if isinstance(var, Var)}

    @classmethod
    def help(cls) -> str:
        lines = [__doc__.strip()]
        for name, item in vars(cls).items():
            if isinstance(item, Var):
                default = int(item.default) if isinstance(item.default, bool) else item.default
                lines.append(f"  {item.name:<28} {default!s:<14} {item.why} [{item.accepted()}]")
            elif isinstance(item, str) and not name.startswith("__"):
                lines.append(f"\n{item}")
        lines.append("\nAccepted from published command lines, without effect")
        lines += [f"  {name:<28} {why}" for name, (_, why) in cls.RETIRED.items()]
        return "\n".join(lines)

    def settings(self) -> dict:
        return {var.name: getattr(self, name) for name, var in self.vars().items()}

    def shipped(self) -> dict:
        """What an artifact must carry to be rebuilt and scored."""
        return {var.name: getattr(self, name) for name, var in self.vars().items() if var.ship}

    def _refuse_retired_and_misspelt(self, environ: dict[str, str]) -> None:
        known = {var.name for var in self.vars().values()} | set(self.RETIRED)
        for name, value in environ.items():
            if name in self.RETIRED:
                off, why = self.RETIRED[name]
                if off and value not in ("", *off):
                    raise UserError(f"{name}={value!r} is retired: {why}; unset it or use {' or '.join(off)}")
            elif name not in known and (near := difflib.get_close_matches(name, known, 1, cutoff=0.87)):
                message = f"{name} is not a variable of this script; did you mean {near[0]}?"
                if environ.get("STRICT_ENV", "1") != "0":
                    raise UserError(f"{message} (STRICT_ENV=0 turns this into a warning)")
                self.warnings.append(message)

    def _parse_orders(self) -> tuple[int, ...]:
        parts = [part.strip() for part in self.ngram_orders.split(",")]
        orders = [int(part) if part.isdecimal() else -1 for part in parts if part]
        if orders == [0]:
            return ()
        if any(not 2 <= n <= 16 for n in orders) or len(set(orders)) != len(orders):
            raise UserError(f"NGRAM_ORDERS={self.ngram_orders!r} is not accepted: different integers from 2 "
                            "to 16, with commas, or 0 for none")
        return tuple(sorted(orders))

    def _parse_classes(self, name: str, kind: type, low: float, high: float) -> dict:
        """`embed:8,mlp:6` -> {"embed": 8, ...}; classes that are not named keep the default."""
        var, values = self.vars()[name], {}
        for part in f"{var.default},{getattr(self, name)}".split(","):
            key, _, number = part.strip().partition(":")
            values[key] = low - 1
            with contextlib.suppress(ValueError):
                values[key] = kind(number)
            if key not in TENSOR_CLASSES or not low <= values[key] <= high:
                raise UserError(f"{var.name}: {part.strip()!r} is not accepted: CLASS:NUMBER with CLASS in "
                                f"{'|'.join(TENSOR_CLASSES)} and NUMBER from {low} to {high}")
        return values

    def _check(self, trains: bool) -> None:
        """Refuses combinations that cannot work, with both values in the message."""
        head_dim, rope = self.model_dim // self.num_heads, self.rope_dims
        rows, spare = divmod(self.train_batch_tokens, self.train_seq_len) if trains else (0, 0)
        chunk, group = self.jepa_chunk_size, self.jepa_sigreg_group
        calibrates = self.quant_round == "gptq" and self.max_wallclock_seconds and not self.eval_only
        problems = [(self.model_dim % self.num_heads, "model_dim", "num_heads", "no whole width for a head"),
            (self.num_heads % self.num_kv_heads, "num_heads", "num_kv_heads", "no equal groups of heads"),
            (head_dim % 2, "model_dim", "num_heads", f"head width {head_dim} is odd, rotary needs pairs"),
            (rope % 2 or rope > head_dim, "rope_dims", "num_heads", f"odd or wider than a head, {head_dim}"),
            (self.ngram_dim % self.ngram_hashes, "ngram_dim", "ngram_hashes", "tables of unequal width"),
            (spare, "train_batch_tokens", "train_seq_len", "the batch is not a whole number of rows"),
            (self.eval_stride > self.eval_seq_len, "eval_stride", "eval_seq_len", "the stride skips targets"),
            *((chunk and getattr(self, name) % chunk, name, "jepa_chunk_size", "breaks the chunk grid")
              for name in ("train_seq_len", "eval_seq_len", "eval_stride")),
            (self.ttt != "0" and self.ttt_chunk_tokens % self.eval_stride, "ttt_chunk_tokens", "eval_stride",
             "a chunk is not a whole number of windows"),
            (chunk and rows % group, "train_batch_tokens", "jepa_sigreg_group", "no equal groups of rows"),
            (self.jepa_phase1_frac + self.jepa_phase2_frac > 1, "jepa_phase1_frac", "jepa_phase2_frac",
             "together more than the whole run"),
            (self.qat_start < 1 and self.quant_clip != "std", "qat_start", "quant_clip", "trains with std"),
            (calibrates and not self.warmup_steps, "warmup_steps", "quant_round", "calibration is untimed"),
            (self.generate and self.vocab_size != 260, "generate", "vocab_size", "other ids are no bytes"),
            (self.draft + 1 >= self.train_seq_len, "draft", "train_seq_len", "no row holds such a draft"),
        ]
        for bad, *names, why in problems:
            if bad:
                pair = ", ".join(f"{name.upper()}={getattr(self, name)}" for name in names)
                raise UserError(f"{pair}: {why}")


# -----------------------------------------------------------------------------
# RUNTIME
# -----------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes) -> None:
    """Writes to a temporary name and renames: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pick_device(name: str) -> mx.Device:
    """`auto`, `cpu` or `gpu` (Metal, or CUDA in MLX's build for it) -> MLX's device.

    Raises UserError where this build of MLX has none."""
    there = {"gpu": mx.is_available(mx.gpu), "cpu": mx.is_available(mx.cpu)}
    seen = [kind for kind in there if there[kind]]
    name = seen[0] if name == "auto" else name
    if not there.get(name):
        raise UserError(f"DEVICE={name} is not there: mlx {mx.__version__} sees {', '.join(seen)}")
    return mx.Device(getattr(mx, name))


class Runtime:
    """Device, dtype, ranks and attention backend: what the machine offers, decided once."""

    def __init__(self, args: Hyperparameters):
        self.group = mx.distributed.init()  # of one process, unless mlx.launch started it
        self.rank, self.world_size = self.group.rank(), self.group.size()
        self.main = self.rank == 0
        self.clocks: dict[str, float] = {}  # seconds by phase
        self.notes: list[str] = []
        self.peak = 0  # bytes, of the phases whose own peaks were asked for
        self.device = pick_device(args.device)
        mx.set_default_device(self.device)
        self.dtype = self._pick_dtype(args)
        self.compile = self._pick_compile(args)
        if args.memory_limit_mb:
            self._limit_memory(args.memory_limit_mb * 2**20)
        head_dim = args.model_dim // args.num_heads
        self.attention = pick_attention(args.attention, self.dtype, head_dim, args.doc_mask)
        self.notes.append(f"attention:{self.attention} compile:{int(self.compile)} "
                          f"dtype:{str(self.dtype).removeprefix('mlx.core.')} device:{self.device_name()}")
        if not constriction and args.compressor in ("auto", "rans"):
            self.notes.append("compressor: constriction is missing, LZMA or zstd instead of rANS")

    def _pick_dtype(self, args: Hyperparameters) -> mx.Dtype:
        if args.dtype != "auto":
            return {"fp32": mx.float32, "bf16": mx.bfloat16, "fp16": mx.float16}[args.dtype]
        return mx.bfloat16 if self.device == mx.gpu else mx.float32

    def _pick_compile(self, args: Hyperparameters) -> bool:
        if args.compile != "auto":
            return args.compile == "1"
        return self.device == mx.gpu  # CPUs: a C++ compiler builds 150 kernels, minutes for a sixth of a step

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
        """Adds what the block takes to a phase; nothing is on two clocks at once."""
        start = time.perf_counter()
        yield
        self.clocks[phase] = self.clocks.get(phase, 0.0) + time.perf_counter() - start

    def device_name(self) -> str:
        if self.device == mx.gpu:
            return str(mx.device_info().get("device_name", "gpu"))
        return f"cpu ({platform.machine()}, mlx)"

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

    def peak_memory_mb(self, since_last: bool = False) -> float:
        """The most that MLX held at once; `since_last`: since such a question was last asked."""
        recent = mx.get_peak_memory()
        self.peak = max(self.peak, recent)
        if since_last:
            mx.reset_peak_memory()
        return (recent if since_last else self.peak) / 2**20


class Module(nn.Module):
    """MLX's module under the trunk's names: `forward` is the call, parameters are listed in torch's order."""

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def get_submodule(self, path: str) -> nn.Module:
        module = self
        for part in filter(None, path.split(".")):
            module = module[int(part)] if isinstance(module, list) else getattr(module, part)
        return module

    def named_parameters(self) -> dict[str, Tensor]:
        """A module's own arrays, then those of the modules inside it, in the order in which they were made;
        frozen ones are what torch calls buffers."""
        return dict(named_arrays(self))


def named_arrays(module, prefix: str = ""):
    frozen = getattr(module, "_no_grad", ())
    items = dict(enumerate(module)) if isinstance(module, list) else {k: module[k] for k in module}
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
    """method(model, ...) as a function of all of the model's arrays in front, which it leaves as they were:
    what MLX needs to trace a graph."""
    def call(arrays: dict, *rest):
        kept = model.parameters()
        model.update(arrays)
        try:
            return method(model, *rest)
        finally:
            model.update(kept)
    return call


def compiled(method):
    """method(model, ...) through one compiled graph for every model of the same settings (trained, averaged,
    reloaded): the first one traces it, arrays go in with each call."""
    graph = None

    def call(model: nn.Module, *rest):
        nonlocal graph
        graph = graph or mx.compile(functional(model, method))
        return graph(model.parameters(), *rest)
    return call


def causal_mask(docs: Tensor, queries: int) -> Tensor:
    """docs (B, T), the document of each position -> (B, 1, queries, T): what the last `queries` see."""
    at = mx.arange(docs.shape[1])
    return (docs[:, None, -queries:, None] == docs[:, None, None]) & (at[-queries:, None] >= at)


def math_attention(q: Tensor, k: Tensor, v: Tensor, where: Tensor | None = None) -> Tensor:
    """Causal attention spelt out: q (B, H, T, d), k, v (B, K, T, d) -> (B, H, T, d); where: causal_mask."""
    k, v = (mx.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = (q @ k.swapaxes(2, 3)).astype(mx.float32) * q.shape[-1] ** -0.5
    where = causal_mask(mx.zeros((len(k), k.shape[2])), q.shape[2]) if where is None else where
    weights = mx.softmax(mx.where(where, scores, -mx.inf), axis=-1).astype(v.dtype)
    return weights @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, where: Tensor | None = None) -> Tensor:
    """The same through MLX's kernel. q may be the last positions of k and v alone."""
    mask = "causal" if where is None else where
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)


ATTENTION = {"sdpa": sdpa_attention, "math": math_attention}


def pick_attention(wanted: str, dtype: mx.Dtype, dim: int, doc_mask: bool = False) -> str:
    """The first rung, from `wanted` down, that runs forward and backward here and agrees with `math`."""
    ladder = list(ATTENTION)[0 if wanted == "auto" else list(ATTENTION).index(wanted) :]
    for name in ladder:
        with contextlib.suppress(Exception):  # a chip that it refuses, an old signature
            q, k = (mx.random.normal((1, n, 128, dim), key=mx.random.key(n)).astype(dtype) for n in (2, 1))
            docs = mx.arange(128)[None] // 50
            where = causal_mask(docs, 128) if doc_mask else None
            grad = mx.grad(lambda q, name=name, k=k, where=where: ATTENTION[name](q, k, k, where).sum())(q)
            close = mx.allclose(ATTENTION[name](q, k, k, where), math_attention(q, k, k, where), atol=3e-2)
            if (close & mx.isfinite(grad).all()).item():
                return name
    raise UserError(f"ATTENTION={wanted}: no rung of {ladder} runs on {mx.default_device()} in {dtype}")


class Log:
    """Console on rank 0, `log.txt` and `metrics.jsonl` in the run's folder."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, text: str, console: bool = True, name: str = "log.txt") -> None:
        if self.folder is None:
            return
        if console:
            print(text, flush=True)
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def metrics(self, **values) -> None:
        self(json.dumps(values), False, "metrics.jsonl")


def progress_bar(items, total: int, what: str, show: bool):
    """tqdm on a terminal, plain iteration elsewhere."""
    with contextlib.suppress(ImportError):  # a bar is a comfort, not a need
        from tqdm import tqdm
        return tqdm(items, total=total, desc=what, disable=None, leave=False) if show else items
    return items


# -----------------------------------------------------------------------------
# DATA
# -----------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
PAD_ID, BOS_ID, BYTE_OFFSET = 0, 1, 4
BYTE_CLASSES = ("lower", "upper", "digit", "space", "newline", "punctuation", "non-ascii", "special", "token")


def open_shard(path: Path, vocab_size: int, checked: int | None = None) -> np.ndarray:
    """Memory-maps a shard: 256 little-endian int32 (magic, version, count, 0...), then `count` uint16 ids, of
    which the first `checked` (None: all) are held against the vocabulary at once."""
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise UserError(f"{path}: {size} bytes is too short for a shard header of {HEADER_BYTES}")
    header = np.fromfile(path, dtype="<i4", count=256)
    if header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path}: header {header[:2]} is not a shard's, {SHARD_MAGIC} {SHARD_VERSION}")
    if header[2] != (room := (size - HEADER_BYTES) / 2):
        raise UserError(f"{path}: the header promises {header[2]} ids, the file has room for {room:g}")
    ids = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(int(header[2]),))
    check_ids(ids[:checked], vocab_size, path)
    return ids


def check_ids(ids: np.ndarray, vocab_size: int, path: Path) -> None:
    if ids.size and (top := int(ids.max())) >= vocab_size:
        raise UserError(f"{path}: id {top} is outside VOCAB_SIZE={vocab_size}: other tokenizer, or damaged")


class Dataset:
    """The shards under DATA_PATH and what is known about them."""

    def __init__(self, args: Hyperparameters, verify: bool):
        self.path = Path(args.data_path)
        if not self.path.is_dir():
            raise UserError(f"DATA_PATH={args.data_path} is not a folder: `python data/prepare.py` makes one")
        self.train_files = sorted(self.path.glob("*_train_*.bin"))
        self.val_files = sorted(self.path.glob("*_val_*.bin"))
        if not self.val_files or not (self.train_files or args.eval_only):
            missing = "_val_" if not self.val_files else "_train_"
            raise UserError(f"DATA_PATH={self.path} holds no *{missing}*.bin; data/prepare.py makes them")
        self.vocab_size = args.vocab_size
        self.manifest = self._read_manifest()
        if "caseops" in self.manifest:
            raise UserError(f"DATA_PATH={self.path}: CaseOps ids, whose bytes only their sidecars know")
        self.train_shards = [open_shard(path, self.vocab_size, 1 << 20) for path in self.train_files]
        self.val = np.concatenate([open_shard(path, self.vocab_size) for path in self.val_files])
        if verify:
            self._verify(args.verify_data)
        if len(self.val) < 2:
            raise UserError(f"{self.val_files[0]}: {len(self.val)} ids leave no validation target")

    def _read_manifest(self) -> dict:
        path = self.path / "manifest.json"
        if not path.exists():
            return {}
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            shards = {str(entry["file"]): str(entry["sha256"]) for entry in manifest["shards"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a manifest of data/prepare.py ({error!r})") from None
        if manifest.get("vocab_size", self.vocab_size) != self.vocab_size:
            raise UserError(f"{path}: made for VOCAB_SIZE={manifest['vocab_size']}, not {self.vocab_size}")
        return {**manifest, "sha256": shards}

    def _verify(self, mode: str) -> None:
        files = self.train_files + self.val_files
        size = sum(path.stat().st_size for path in files)
        if not self.manifest or mode == "0" or (mode == "auto" and size > 2_000_000_000):
            return
        for path in files:
            wanted, found = self.manifest["sha256"].get(path.name, "nothing"), sha256_file(path)
            if wanted != found:
                raise UserError(f"{path}: sha256 {found[:16]}... where the manifest has {wanted[:16]}")

    def fingerprint(self) -> dict:
        """What a reader needs to know that two runs saw the same text."""
        digest = hashlib.sha256(self.val.tobytes())
        for path, shard in zip(self.train_files, self.train_shards):  # the ends: all of it could take minutes
            digest.update(f"{path.name} {len(shard)}".encode())
            digest.update(shard[:4096].tobytes() + shard[-4096:].tobytes())
        known = {key: self.manifest.get(key) for key in ("source", "variant", "documents", "bytes")}
        return {"name": self.path.name, **known, "train_shards": len(self.train_files),
                "val_shards": len(self.val_files), "train_tokens": sum(map(len, self.train_shards)),
                "val_tokens": len(self.val), "val_documents": int((self.val == BOS_ID).sum()),
                "sha256": digest.hexdigest()}


def sha256_file(path: Path) -> str:
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()  # mapped: shards may be large


def byte_tables(args: Hyperparameters) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes that an id stands for: (bytes without a leading space, has one, is a boundary before one).
    A target counts base[id] + (space[id] and not edge[previous id]). byte260: ids from 4 up are a byte each.
    SentencePiece: byte pieces 1, control, unknown and unused 0, others their UTF-8 length with U+2581 as one
    space; a leading one counts only where the previous id is no boundary: the dummy prefix stands there.
    Models trained by data/prepare.py add no prefix: there every U+2581 is a real space and counts."""
    base, space, edge = (np.zeros(args.vocab_size, dtype=kind) for kind in (np.int64, bool, bool))
    if not args.tokenizer_path:
        if args.vocab_size != 260:
            raise UserError(f"VOCAB_SIZE={args.vocab_size} needs TOKENIZER_PATH; only byte260 has none")
        base[BYTE_OFFSET:] = 1
        edge[:BYTE_OFFSET] = True
        return base, space, edge
    try:
        from sentencepiece import SentencePieceProcessor
        tokenizer = SentencePieceProcessor(model_file=args.tokenizer_path)
    except ImportError:
        raise UserError("TOKENIZER_PATH is set, but sentencepiece is not installed") from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"TOKENIZER_PATH={args.tokenizer_path}: no SentencePiece model ({error})") from None
    if (size := tokenizer.vocab_size()) != args.vocab_size:
        raise UserError(f"TOKENIZER_PATH={args.tokenizer_path} has {size} ids, VOCAB_SIZE={args.vocab_size}")
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


def target_bytes(ids: np.ndarray, tables: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """Bytes of each target ids[1:], an int64 array of len(ids) - 1."""
    base, space, edge = tables
    return base[ids[1:]] + (space[ids[1:]] & ~edge[ids[:-1]])


def class_table(vocab_size: int) -> np.ndarray:
    """Class of each id, an index into BYTE_CLASSES, for the bits-by-class report."""
    names = ["special"] * BYTE_OFFSET + ["token"] * (vocab_size - BYTE_OFFSET)
    for byte in range(256) if vocab_size == 260 else ():
        text = chr(byte)
        tests = {"non-ascii": byte > 127, "newline": text in "\r\n", "space": text.isspace(),
                 "digit": text.isdigit(), "lower": text.islower(), "upper": text.isupper()}
        names[BYTE_OFFSET + byte] = next((name for name, found in tests.items() if found), "punctuation")
    return np.array([BYTE_CLASSES.index(name) for name in names])


class BatchPlan(namedtuple("BatchPlan", "rows group groups micro_steps world_size")):
    """How a global batch of `rows` rows is spread: micro-steps x ranks x `groups` groups of `group` rows.
    Every rank runs the same shapes: slots beyond the batch repeat its first group with weight 0."""

    @classmethod
    def make(cls, args: Hyperparameters, world_size: int) -> BatchPlan:
        group = args.jepa_sigreg_group if args.jepa_chunk_size else 1
        rows = args.train_batch_tokens // args.train_seq_len
        total = rows // group
        at_most = max(1, args.device_batch_tokens // (args.train_seq_len * group))
        micro_steps = -(-total // (world_size * at_most))
        return cls(rows, group, -(-total // (world_size * micro_steps)), micro_steps, world_size)

    def slots(self, micro_step: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers inside the global batch for one forward, and a weight for each."""
        first = (micro_step * self.world_size + rank) * self.groups * self.group
        numbers = np.arange(first, first + self.groups * self.group)
        real = numbers < self.rows  # which is a whole number of groups
        return np.where(real, numbers, numbers % self.group), real.astype(np.float32)


class Loader:
    """Rows of TRAIN_SEQ_LEN + 1 ids for this rank, in an order that does not depend on the number of ranks.
    `state` is the position of the next row: {"epoch", "shard", "row"}; it belongs to the checkpoint."""

    def __init__(self, data: Dataset, args: Hyperparameters, plan: BatchPlan, rank: int, state=None):
        self.data, self.args, self.plan, self.rank, self.length = data, args, plan, rank, args.train_seq_len
        self.state = dict(state or {"epoch": 0, "shard": 0, "row": 0})
        self._starts: tuple[tuple, np.ndarray] = ((), np.zeros(0, np.int64))
        if (most := max(map(len, data.train_shards))) <= self.length:
            raise UserError(f"TRAIN_SEQ_LEN={self.length} is longer than every training shard ({most} ids)")

    def _ordered(self, items: np.ndarray, *key: int) -> np.ndarray:
        shuffled = self.args.train_order == "shuffled"
        return np.random.default_rng([self.args.seed, *key]).permutation(items) if shuffled else items

    def _row_starts(self, epoch: int, index: int) -> np.ndarray:
        """Where the rows of a shard begin: disjoint in a stream. With document alignment, a row that would
        begin inside a document that started in the row before begins at its BOS: that head is seen twice."""
        if self._starts[0] == (epoch, index):
            return self._starts[1]
        shard = self.data.train_shards[index]
        last = len(shard) - self.length - 1  # the last legal start: a row needs one id more for its targets
        starts = np.arange(0, last + 1, self.length)
        documents = np.flatnonzero(shard == BOS_ID) if self.args.train_align == "document" else starts[:0]
        if len(documents):
            found, start = [], int(documents[0])
            while start <= last:
                found.append(start)
                nearest = documents[np.searchsorted(documents, start + self.length, side="right") - 1]
                start = int(nearest) if nearest > start else start + self.length
            starts = np.array(found, dtype=np.int64)
        self._starts = ((epoch, index), self._ordered(starts, epoch, index))
        return self._starts[1]

    def _next_rows(self, count: int) -> list[tuple[int, int]]:
        """(shard, start) of the next `count` rows; moves the state."""
        rows, state = [], self.state
        while len(rows) < count:
            order = self._ordered(np.arange(len(self.data.train_shards)), state["epoch"])
            index = int(order[state["shard"]])
            starts = self._row_starts(state["epoch"], index)
            take = starts[state["row"] : state["row"] + count - len(rows)]
            rows += [(index, int(start)) for start in take]
            state["row"] += len(take)
            if state["row"] >= len(starts):
                state["row"], state["shard"] = 0, state["shard"] + 1
            if state["shard"] == len(order):
                state["shard"], state["epoch"] = 0, state["epoch"] + 1
        return rows

    def next(self) -> tuple[np.ndarray, np.ndarray, dict]:
        """This rank's part: ids (micro_steps, rows, T + 1), weights (micro_steps, rows), state after it."""
        plan, rows = self.plan, self._next_rows(self.plan.rows)
        batch = np.empty((plan.micro_steps, plan.groups * plan.group, self.length + 1), np.int32)
        weights = np.empty(batch.shape[:2], np.float32)
        for micro in range(plan.micro_steps):
            numbers, weights[micro] = plan.slots(micro, self.rank)
            for slot, number in enumerate(numbers):
                index, start = rows[number]
                batch[micro, slot] = self.data.train_shards[index][start : start + self.length + 1]
        check_ids(batch, self.data.vocab_size, self.data.path)
        return batch, weights, dict(self.state)

    def prefetch(self):
        """Iterates over `next()` from a thread, two batches ahead; arrays are made where they are used."""
        with ThreadPoolExecutor(1) as thread:
            ahead = deque(thread.submit(self.next) for _ in range(2))
            while True:
                ids, weights, state = ahead.popleft().result()
                ahead.append(thread.submit(self.next))
                yield mx.array(ids), mx.array(weights), state


# -----------------------------------------------------------------------------
# QUANTISER
# -----------------------------------------------------------------------------

TENSOR_CLASSES = ("embed", "ngram", "attn", "mlp", "other")
SMALL_TENSOR = 4096  # elements; below it a tensor stays fp16
SCALE_FLOOR = 2.0**-20  # rows of zeros need a step; no other is this small


def tensor_class(name: str) -> str:
    if name.startswith(("tok_emb", "lm_head")):
        return "embed"
    if name.startswith(("ngram.table", "bigram.table")):
        return "ngram"
    return "attn" if ".attn." in name else "mlp" if ".mlp." in name else "other"


def quant_plan(name: str, shape, args: Hyperparameters) -> tuple[int, int]:
    """(bits, axis of a step's slice): the last, but the buckets of a hash table; (0, 0): stays fp16."""
    if len(shape) < 2 or math.prod(shape) < SMALL_TENSOR:
        return 0, 0
    kind = tensor_class(name)
    return args.bits_by_class[kind], len(shape) - (2 if kind == "ngram" else 1)


def nearest(x: np.ndarray, top: int) -> np.ndarray:
    return np.clip(np.rint(x), -top, top)


def cheapest(x: np.ndarray, top: int, rate: float) -> np.ndarray:
    """Integers with the least (x - q)^2 + rate * bits(q), among the nearest, its neighbour towards zero and
    zero itself: entropy-constrained rounding. The bits, of an ideal order-0 code, settle in two rounds."""
    best = near = nearest(x, top)
    options = (near, near - np.sign(near), np.zeros_like(near))
    for _ in range(2):
        counts = np.bincount(best.ravel().astype(np.int64) + top, minlength=2 * top + 1) + 0.5
        prices = rate * np.log2(counts.sum() / counts).astype(np.float32)
        costs = [np.square(x - q) + prices[q.astype(np.int64) + top] for q in options]
        best = np.choose(np.argmin(costs, axis=0), options)
    return best


def gptq(x: np.ndarray, hessian: np.ndarray, top: int) -> np.ndarray:
    """Full-Hessian GPTQ (Frantar et al. 2022) of x (R, C), a matrix whose rows are in units of their steps.
    Columns in the order of falling input power; the error of each is spread over those still to come by the
    inverse of the damped hessian = X^T X (C, C). (Weighing bits against error here lost to a wider step.)"""
    power = np.diag(hessian)
    order = np.argsort(-power, kind="stable")
    damped = hessian[np.ix_(order, order)].astype(np.float64)
    damped[np.diag_indices(len(order))] += 0.01 * power.mean() + 1e-12
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)  # upper U, inverse = U^T U
    left, q = x[:, order].copy(), np.empty_like(x)
    for start in range(0, x.shape[1], 128):
        stop = min(start + 128, x.shape[1])
        errors = np.empty((len(x), stop - start), np.float32)
        for j in range(start, stop):
            q[:, order[j]] = chosen = nearest(left[:, j], top)
            errors[:, j - start] = error = (left[:, j] - chosen) / factor[j, j]
            left[:, j:stop] -= error[:, None] * factor[j, j:stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return q


def quantise(weight: np.ndarray, bits: int, clip: str, k: float, axis: int, rate: float = 0.0,
             hessian: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rounds to integers of `bits` bits with one fp16 step for each slice along `axis`: q * step ~ weight.

    `std`: step = k * std / top, top = 2^(bits-1) - 1 (SDClip, #1394); a Gaussian then costs about
    log2(top / k) + 2.05 bits a weight, so k sets the size. `mse`: the step with the least squared error among
    33 clips from 0.2 to 1 of the largest value. Steps have an epsilon floor, not 1 / top (defect G2 of #832).
    Rounding: to the nearest; by `gptq` with a hessian (C, C); else by `cheapest` where `rate`, the price of a
    bit in squared steps, is not 0 (at ln(2) / 6 = 0.116 a bit costs what a coarser step would save).
    Returns q, int8 of weight's shape, and step, fp16 with size 1 on `axis`. NumPy: backends pack alike."""
    top = 2 ** (bits - 1) - 1
    weight = np.asarray(weight, dtype=np.float32)

    def floored(step: np.ndarray) -> np.ndarray:
        return np.maximum(step, SCALE_FLOOR).astype(np.float16).astype(np.float32)
    if clip == "std":
        step = floored(k / top * weight.std(axis=axis, keepdims=True, dtype=np.float64))
    else:
        peak, least = np.abs(weight).max(axis=axis, keepdims=True), np.inf
        for share in np.linspace(1.0, 0.2, 33, dtype=np.float32):
            trial = floored(share * peak / top)
            error = np.square(nearest(weight / trial, top) * trial - weight).sum(axis=axis, keepdims=True)
            step = np.where(error < least, trial, step) if share < 1 else trial
            least = np.minimum(error, least)
    x = weight / step
    q = gptq(x, hessian, top) if hessian is not None else cheapest(x, top, rate) if rate else nearest(x, top)
    return q.astype(np.int8), step.astype(np.float16)


class Rounding(Module):
    """Quantisation-aware training: the exporter's std quantiser in the forward, gradients straight through.
    `on` is an array, so that a compiled graph sees the switch. Submodule `qat` of a weight's owner."""

    def __init__(self, bits: int, k: float, axis: int):
        super().__init__()
        self.top, self.k, self.axis = 2 ** (bits - 1) - 1, k, axis
        self.on = mx.zeros(())
        self.freeze(keys="on")

    def forward(self, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        """The weight, or `rows` that were looked up in it (its axis is then gone), rounded."""
        values = weight if rows is None else rows
        step = self.k / self.top * mx.std(weight, self.axis, keepdims=rows is None)
        step = mx.maximum(step, SCALE_FLOOR).astype(mx.float16).astype(mx.float32)
        change = mx.clip(mx.round(values / step), -self.top, self.top) * step - values
        return values + self.on * mx.stop_gradient(change)


def rounded(owner: nn.Module) -> Tensor:
    """A module's weight as the loss is to see it."""
    return owner.qat(owner.weight) if hasattr(owner, "qat") else owner.weight


# -----------------------------------------------------------------------------
# AUXILIARY OBJECTIVES
# -----------------------------------------------------------------------------


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
    """Sketched test that latents are N(0, I): distance of characteristic functions along random directions.
    latents (G, N, d): G samples of N latents; directions (d, P), unit columns. Returns (G,) in fp32: the mean
    over P of sum_k w_k [(mean cos t_k p - phi_k)^2 + (mean sin t_k p)^2], phi_k = exp(-t_k^2 / 2), t on
    [0.2, 3], w_k = phi_k / sum(phi). Nothing is standardised, so a wrong scale costs (defect A5 of #832).
    After LeJEPA's SIGReg (Balestriero & LeCun 2025) and #696."""
    t = mx.linspace(0.2, 3.0, knots)
    phi = mx.exp(-0.5 * t * t)
    angles = (latents.astype(mx.float32) @ directions.astype(mx.float32))[..., None] * t  # (G, N, P, K)
    gap = (mx.cos(angles).mean(1) - phi).square() + mx.sin(angles).mean(1).square()
    return (gap @ (phi / phi.sum())).mean(-1)


def sigreg_floor(samples: int, knots: int) -> float:
    """Expected value of `sigreg` for `samples` true N(0, I) latents: sum_k w_k (1 - phi_k^2) / samples."""
    t = np.linspace(0.2, 3.0, knots)
    phi = np.exp(-0.5 * t * t)
    return float((phi / phi.sum() * (1 - phi**2)).sum() / samples)


class ChunkJEPA(Module):
    """Predicts the latent of each chunk of ids from the chunk before it, and feeds the guess to the stream.

    The interface that a record replaces, and nothing else of the script:
      inputs(step)            what a step's losses need from outside the graph, equal on all ranks
      forward(hidden, inputs) (hidden with the injection, {name: (groups,) loss}); no losses without inputs
      weights(progress)       {name: weight of that term beside CE}
      report(means)           what the step line says about the mean terms
      first_read(position)    first position whose state a decoder needs to feed `position` and later ones
      exported()              prefixes of the parameters that scoring needs; no others reach the artifact

    With h_c the mean hidden state of chunk c: z_c = projector(h_c), zhat_c = predictor(z_{c-1}) (a start
    vector for c = 0); losses |zhat_c - sg(z_c)|^2 and SIGReg on z; injection W zhat_c at all positions of c.
    Causal: chunk c reads the chunks before it. SIGReg pools fixed groups of rows: ranks do not change it."""

    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.args, self.chunk = args, args.jepa_chunk_size
        latent, hidden = args.jepa_latent_dim, args.jepa_proj_hidden
        self.projector = LatentMLP(args.model_dim, hidden, latent)
        self.predictor = LatentMLP(latent, hidden, latent)
        self.start = mx.zeros(latent)
        self.injection = CastedLinear(latent, args.model_dim) if args.jepa_adapter else None

    def init_weights(self) -> None:
        self.start = nn.init.normal(0, 0.02)(self.start)
        for layer in (*self.projector.children().values(), *self.predictor.children().values()):
            bound = layer.weight.shape[1] ** -0.5
            layer.weight = nn.init.uniform(-bound, bound)(layer.weight)
        if self.injection is not None:
            self.injection.weight = mx.zeros_like(self.injection.weight)

    def inputs(self, step: int) -> Tensor:
        """Fresh unit directions (latent, projs) for SIGReg, from the seed and the step alone."""
        key = mx.random.key(self.args.seed * 1_000_003 + step)
        directions = mx.random.normal((self.args.jepa_latent_dim, self.args.jepa_sigreg_projs), key=key)
        return directions / mx.linalg.norm(directions, axis=0)

    def forward(self, hidden: Tensor, inputs: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """hidden (B, T, D). A tail shorter than a chunk is fed like any chunk, so that a decoder that stops
        inside one agrees with the scorer (#832 feeds it nothing). Terms are per group of rows."""
        args, size = self.args, self.chunk
        if inputs is None and self.injection is None:
            return hidden, {}
        batch, length, dim = hidden.shape
        full = length // size
        source = hidden if args.jepa_backbone_grad else mx.stop_gradient(hidden)
        z = self.projector(source[:, : full * size].reshape(batch, full, size, dim).mean(2))  # (B, C, latent)
        start = mx.broadcast_to(self.start.astype(z.dtype), (batch, 1, args.jepa_latent_dim))
        guess = self.predictor(mx.concatenate((start, z), 1)[:, : -(-length // size)])
        if self.injection is not None:
            given = guess if args.jepa_adapter_grad else mx.stop_gradient(guess)
            hidden = hidden + mx.repeat(self.injection(given), size, axis=1)[:, :length]
        if inputs is None:
            return hidden, {}
        groups = batch // args.jepa_sigreg_group
        z, guess = (x[:, :full].astype(mx.float32).reshape(groups, -1, args.jepa_latent_dim)
                    for x in (z, guess))  # (G, group * C, latent)
        fixed = mx.stop_gradient(z)
        error = (guess - fixed).square().mean((1, 2))
        return hidden, {"jepa_pred": error, "latent_var": mx.var(fixed, 1, ddof=1).mean(-1),
                        "sigreg": sigreg(z, inputs, args.jepa_sigreg_knots)}

    def weights(self, progress: float) -> dict[str, float]:
        """0 in phase 1, a linear ramp to JEPA_LAMBDA_MAX in phase 2, 0 afterwards."""
        args = self.args
        into = (progress - args.jepa_phase1_frac) / max(args.jepa_phase2_frac, 1e-9)
        peak = args.jepa_lambda_max * args.jepa_loss * into * (0 <= into < 1)
        return {"jepa_pred": peak, "sigreg": peak * args.jepa_sigreg_weight, "latent_var": 0.0}

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """R^2 of the predictor, and SIGReg beside the value that perfectly normal latents would give."""
        samples = self.args.jepa_sigreg_group * (self.args.train_seq_len // self.chunk)
        r2 = 1 - means["jepa_pred"] / max(means["latent_var"], 1e-12)
        return {"jepa_pred": means["jepa_pred"], "jepa_r2": r2, "sigreg": means["sigreg"],
                "sigreg_floor": sigreg_floor(samples, self.args.jepa_sigreg_knots)}

    def first_read(self, position: int) -> int:
        return max(0, position // self.chunk - 1) * self.chunk

    def exported(self) -> tuple[str, ...]:
        return ("projector.", "predictor.", "start", "injection.") if self.injection is not None else ()


class DraftHeads(Module):
    """A chain of guesses at the ids beyond the next: a link takes in the id that follows and guesses the one
    behind it, from what the link before left of a position's state (after Hydra, Ankner et al. 2024). Links
    share their weights; nothing else learns from them: the model is the same bit for bit without them."""

    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.links, self.link = args.draft, LatentMLP(2 * args.model_dim, args.model_dim, args.model_dim)

    def forward(self, state: Tensor, token: Tensor) -> Tensor:
        """state (..., D) of a position or of the link before, embedding (..., D) of an id -> (..., D)."""
        return rms_norm(state + self.link(mx.concatenate((state, rms_norm(token)), -1)))

    def loss(self, model: GPT, x: Tensor, ids: Tensor) -> Tensor:
        """States x (B, T, D) of ids (B, T + 1) -> nats of a guess on true ids, a mean for each row (B,)."""
        x, tokens, nats = mx.stop_gradient(x), mx.stop_gradient(model.embed(ids)), 0.0
        for i in range(1, self.links + 1):
            x = self(x[:, :-1], tokens[:, i:-1])
            logits = model.head(x, frozen=True)
            nats = nats + nn.losses.cross_entropy(logits, ids[:, i + 1 :]).mean(1) / self.links
        return nats


# -----------------------------------------------------------------------------
# MODEL
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
        return x @ rounded(self).astype(x.dtype).T


def rotary_tables(length: int, args: Hyperparameters) -> Tensor:
    """Periods of the rotated pairs of dimensions, in positions a radian: (r / 2,), r the rotated dimensions.
    From float64: nn.RoPE's are exponentials in fp32, whose last digits long rows multiply by thousands.
    Windows longer than TRAIN_SEQ_LEN grow the base by (length / train_seq_len)^(r / (r - 2)) (NTK)."""
    dims = args.rope_dims or args.model_dim // args.num_heads
    base = args.rope_base
    if length > args.train_seq_len and dims > 2:
        base *= (length / args.train_seq_len) ** (dims / (dims - 2))
    return mx.array((base ** (np.arange(0, dims, 2) / dims)).astype(np.float32))


def rotate(x: Tensor, rotary: Tensor, first: int = 0) -> Tensor:
    """Half-split rotary on the first dimensions of x (B, H, T, d), whose positions begin at `first`; rotary
    as of `rotary_tables`. The trunk turns pairs the other way round than MLX: hence the sign."""
    return mx.fast.rope(x, 2 * rotary.size, traditional=False, base=None, scale=-1.0, offset=first,
                        freqs=rotary)


class CausalSelfAttention(Module):
    watch = None

    def __init__(self, args: Hyperparameters, layer: int, attention: str):
        super().__init__()
        self.layer, self.num_kv_heads = layer, args.num_kv_heads
        self.head_dim = args.model_dim // args.num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(args.model_dim, args.model_dim)
        self.c_k = CastedLinear(args.model_dim, kv_dim)
        self.c_v = CastedLinear(args.model_dim, kv_dim)
        self.proj = CastedLinear(args.model_dim, args.model_dim)
        self.q_gain = mx.full((args.num_heads,), args.qk_gain_init)
        self.exclude_self = layer >= args.num_layers - args.xsa_last_n
        self.attend = ATTENTION[attention]

    def forward(self, x: Tensor, rotary: Tensor, where=None, past: KVCache | None = None) -> Tensor:
        if self.watch is not None:
            self.watch(x)
        (batch, length, _), heads, kv = x.shape, self.q_gain.size, self.num_kv_heads
        weight = mx.concatenate([rounded(layer) for layer in (self.c_q, self.c_k, self.c_v)])
        qkv = (x @ weight.astype(x.dtype).T).reshape(batch, length, -1, self.head_dim).swapaxes(1, 2)
        q, k, v = mx.split(qkv, (heads, heads + kv), axis=1)  # (B, H or K, T, d): one product for all three
        known = 0 if past is None else past.length
        q, k = (rotate(rms_norm(part), rotary, known) for part in (q, k))
        q = q * self.q_gain.astype(q.dtype)[:, None, None]
        y = self.attend(q, *past.extend(self.layer, k, v), where) if past else self.attend(q, k, v, where)
        if self.exclude_self:  # XSA: drop each head's component along this position's own value
            own = v.astype(mx.float32)
            own = own * mx.rsqrt(mx.maximum(own.square().sum(-1, keepdims=True), 1e-24))
            own = own.astype(y.dtype)[:, :, None]  # (B, K, 1, T, d)
            y = y.reshape(batch, kv, -1, length, self.head_dim)
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

    def forward(self, x: Tensor, x0: Tensor, rotary: Tensor, where, past: KVCache | None) -> Tensor:
        if self.resid_mix is not None:
            mix = self.resid_mix.astype(x.dtype)
            x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.astype(x.dtype) * self.attn(rms_norm(x) * self.ln_scale, rotary, where, past)
        return x + self.mlp_scale.astype(x.dtype) * self.mlp(rms_norm(x) * self.ln_scale)


class SmearGate(Module):
    """x_t <- (1 - g) x_t + g x_{t-1}, a learned gate a channel; a BOS takes nothing from before it."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = mx.zeros(dim)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gate = mx.sigmoid(self.gate).astype(x.dtype) * (ids != BOS_ID)[..., None]
        return x + gate * (mx.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0))) - x)


def in_word(ids: Tensor) -> Tensor:
    """byte260 ids that letters, digits and the bytes of non-ASCII characters have."""
    byte = ids - BYTE_OFFSET
    letter = byte | 32
    return (letter >= 97) & (letter <= 122) | (byte >= 48) & (byte <= 57) | (byte >= 128)


class HashEmbedding(Module):
    """Learned embeddings of several contexts of each id, side by side in front of one projection.

    The contexts: the last n ids for each n in `orders`; with `words` 1 the word so far, with 2 also that
    together with the word before it (after the word models of PAQ). Each owns a row in each of `hashes`
    tables of width dim / hashes, so that two contexts rarely share all of their rows. Nothing before the last
    BOS counts: no document sees another. Only tables start at zero: both stayed dead in #832 (defect A1)."""

    SALTS = (0x297A2D39, 0x1B873593, 0x6C078965, 0x5D588B65)
    WORD_REACH = 20  # ids that a word context looks back

    def __init__(self, orders: tuple, words: int, buckets: int, dim: int, hashes: int, model_dim: int):
        super().__init__()
        self.orders, self.words, self.buckets, self.salts = orders, words, buckets, self.SALTS[:hashes]
        contexts = len(orders) + words
        self.table = mx.zeros((contexts * hashes, buckets, dim // hashes))
        self.proj = CastedLinear(contexts * dim, model_dim)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the flattened table: (B, T, contexts * hashes); those of t depend on ids up to t. uint32
        wraps where the trunk's int64 are cut to 32 bits: the same numbers."""
        def mix(state: Tensor, symbol: Tensor) -> Tensor:
            return (state ^ state >> 15) * 0x2C1B3C6D + symbol
        ids = ids.astype(mx.int32)
        gram = word = pair = ids.astype(mx.uint32) * 0x2545F491
        inside = ids > BOS_ID  # of the document, going back
        part = mx.where(in_word(ids), 0, 1)  # 0: word so far, 1: gap before it, 2: word before, 3: the rest
        found = {1: gram}
        for n in range(2, max(*self.orders, self.WORD_REACH if self.words else 0) + 1):
            earlier = mx.pad(ids, ((0, 0), (n - 1, 0)), constant_values=PAD_ID)[:, : ids.shape[1]]
            symbol = earlier.astype(mx.uint32)
            gram = mix(gram, mx.where(inside, symbol, PAD_ID) + n)
            found[n] = gram
            inside = inside & (earlier > BOS_ID)
            part = mx.where(inside, part + (in_word(earlier) != (part % 2 == 0)), 3)
            word = mx.where(part == 0, mix(word, symbol), word)
            pair = mx.where(part <= 2, mix(pair, symbol), pair)
        states = [found[n] for n in self.orders] + [word, pair + 1][: self.words]
        rows = [(((s ^ s >> 13) * salt) >> 7) % self.buckets for s in states for salt in self.salts]
        return mx.stack([row + i * self.buckets for i, row in enumerate(rows)], -1)

    def forward(self, ids: Tensor, dtype: mx.Dtype) -> Tensor:
        found = self.table.flatten(0, 1)[self.rows(ids)]  # (B, T, contexts * hashes, width)
        if hasattr(self, "qat"):
            found = self.qat(self.table, found)
        return self.proj(found.flatten(-2).astype(dtype))


class KVCache:
    """What decoding goes on from: keys, values and last states of the positions of a window, read so far."""

    def __init__(self, model: GPT):
        args = model.args
        window = 1, args.num_kv_heads, args.eval_seq_len, args.model_dim // args.num_heads
        self.layers = [[mx.zeros(window, model.dtype)] * 2 for _ in range(args.num_layers)]
        self.states, self.length = mx.zeros((1, 0, args.model_dim), model.dtype), 0

    def cut(self, length: int) -> None:
        """Forgets what lies behind the first `length` positions."""
        self.states, self.length = self.states[:, :length], min(self.length, length)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values of new positions (1, K, n, d); returns those of all."""
        at, stop = mx.array([self.length]), self.length + k.shape[2]
        kept = [mx.slice_update(old, new, at, (2,)) for old, new in zip(self.layers[layer], (k, v))]
        self.layers[layer] = kept
        return kept[0][:, :, :stop], kept[1][:, :, :stop]


class GPT(Module):
    """The network. `losses` gives every loss term of a batch in one forward, `logits` what scoring needs."""

    def __init__(self, args: Hyperparameters, attention: str = "sdpa", dtype: mx.Dtype = mx.float32):
        super().__init__()
        self.args, self.dtype = args, dtype
        self.reach = max((*args.ngram_order_list, HashEmbedding.WORD_REACH))  # ids that one looks back
        dim, layers = args.model_dim, args.num_layers
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        size = args.bigram_vocab_size, args.bigram_dim, 1, dim
        self.bigram = HashEmbedding((2,), 0, *size) if args.bigram_vocab_size else None
        orders, words = args.ngram_order_list, args.ngram_words if args.vocab_size == 260 else 0
        size = args.ngram_buckets, args.ngram_dim, args.ngram_hashes, dim
        self.ngram = HashEmbedding(orders, words, *size) if orders else None
        self.smear = SmearGate(dim) if args.smear_gate else None
        self.blocks = [Block(args, i, attention) for i in range(layers)]
        self.skip_weights = mx.ones((layers // 2, dim)) if args.unet_skips else None
        self.aux = ChunkJEPA(args) if args.jepa_chunk_size else None
        self.draft = DraftHeads(args) if args.draft else None
        self.set_rotary()
        self.lm_head = None if args.tie_embeddings else CastedLinear(dim, args.vocab_size)

    def set_rotary(self) -> None:
        """Tables for training and scoring windows, which may have different lengths."""
        self.rotary_train = rotary_tables(self.args.train_seq_len, self.args)
        self.rotary_eval = rotary_tables(self.args.eval_seq_len, self.args)
        self.freeze(recurse=False, keys=["rotary_train", "rotary_eval"])

    def init_weights(self, seed: int) -> None:
        """Small normal embeddings, orthogonal matrices, zero output projections: blocks begin as identity."""
        mx.random.seed(seed)
        normal, orthogonal = nn.init.normal(0, self.args.tied_embed_init_std), nn.init.orthogonal()
        self.tok_emb.weight = normal(self.tok_emb.weight)
        layers = [table.proj for table in (self.bigram, self.ngram) if table is not None]
        for block in self.blocks:
            layers += [block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.fc]
            block.attn.proj.weight = mx.zeros_like(block.attn.proj.weight)
            block.mlp.proj.weight = mx.zeros_like(block.mlp.proj.weight)
        for layer in [*layers, *(self.draft.link.children().values() if self.draft is not None else ())]:
            layer.weight = orthogonal(layer.weight)
        if self.aux is not None:
            self.aux.init_weights()
        if self.lm_head is not None:
            self.lm_head.weight = mx.zeros_like(self.lm_head.weight)
        mx.eval(self.parameters())

    def embed(self, ids: Tensor) -> Tensor:
        return rounded(self.tok_emb)[ids].astype(self.dtype)

    def hidden(self, ids: Tensor, rotary: Tensor, aux_inputs: Tensor | None = None,
               past: KVCache | None = None) -> tuple[Tensor, dict]:
        """ids (B, T) -> normalised states (B, T, D) and the auxiliary terms.
        With `past`, ids (1, T) are those of a window so far, the states those of what is not in it yet."""
        known = 0 if past is None else past.length
        fresh = ids.shape[1] - known
        tail = ids[:, max(0, known - self.reach) :]  # an embedding depends on some ids before its own
        x = self.embed(tail)
        for table in (self.bigram, self.ngram):
            if table is not None:
                x = x + table(tail, self.dtype)
        x = rms_norm(x)
        x = x if self.smear is None else self.smear(x, tail)
        x, where = x[:, -fresh:], None
        if self.args.doc_mask:
            where = causal_mask((ids == BOS_ID).cumsum(1), fresh)
        x0, skips, first_half = x, [], len(self.blocks) // 2
        for i, block in enumerate(self.blocks):
            if i >= first_half and skips:  # U-Net: the second half takes the first half's outputs, last first
                x = x + self.skip_weights[i - first_half].astype(x.dtype) * skips.pop()
            x = block(x, x0, rotary, where, past)
            if i < first_half and self.skip_weights is not None:
                skips.append(x)
        if past is not None:
            past.states, past.length = mx.concatenate((past.states, x), 1), ids.shape[1]
            x = x if self.aux is None else past.states[:, self.aux.first_read(known) :]
        x, terms = (x, {}) if self.aux is None else self.aux(x, aux_inputs)
        return rms_norm(x if past is None else x[:, -fresh:]), terms

    def exported(self) -> dict[str, Tensor]:
        """Parameters that scoring needs, by name; what only training uses never reaches an artifact."""
        kept = () if self.aux is None else tuple(f"aux.{prefix}" for prefix in self.aux.exported())
        found = self.named_parameters().items()
        return {n: p for n, p in found if not n.startswith("aux.") or n.startswith(kept)}

    def head(self, x: Tensor, frozen: bool = False) -> Tensor:
        """States -> capped logits in fp32; `frozen`: no gradient for the head's own weight."""
        weight = rounded(self.tok_emb if self.lm_head is None else self.lm_head)
        logits = (x @ (mx.stop_gradient(weight) if frozen else weight).astype(x.dtype).T).astype(mx.float32)
        cap = self.args.logit_softcap
        return cap * mx.tanh(logits / cap) if cap else logits

    def losses(self, ids: Tensor, weights: Tensor, aux_inputs: Tensor | None) -> dict[str, Tensor]:
        """ids (B, T + 1), weights (B,) -> weighted sums: "ce", nats over all targets, and auxiliary terms."""
        x, terms = self.hidden(ids[:, :-1], self.rotary_train, aux_inputs)
        nats = nn.losses.cross_entropy(self.head(x), ids[:, 1:])
        sums = {"ce": (nats.sum(1) * weights).sum()}
        if self.draft is not None:
            groups = len(next(iter(terms.values()), ids))
            sums["draft"] = (self.draft.loss(self, x, ids) * weights).sum() * groups / len(ids)
        for name, value in terms.items():  # one value a group; the weights inside a group are equal
            sums[name] = (value * weights.reshape(len(value), -1).mean(1)).sum()
        return sums

    def gradients(self, params: dict[str, Tensor], shares: dict[str, Tensor], ids: Tensor, weights: Tensor,
                  aux_inputs: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(sums of `losses`, {name: gradient of the sums, each times its share} for each of `params`), fp32.
        A term without a share, not one with a share of 0, costs no backward."""
        def weighted(params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            update_parameters(self, params)
            sums = self.losses(ids, weights, aux_inputs)
            return sum(share * sums[name] for name, share in shares.items()), sums
        (_, sums), found = mx.value_and_grad(weighted)(params)
        update_parameters(self, params)
        return sums, found

    def logits(self, ids: Tensor, take: Tensor, span: int) -> Tensor:
        """fp32 logits (B, span, V) of positions take[b] ... take[b] + span - 1 in row b of ids (B, T)."""
        x, _ = self.hidden(ids, self.rotary_eval)
        where = take[:, None] + mx.arange(span)
        return self.head(mx.take_along_axis(x, where[..., None], axis=1).astype(mx.float32))


# Functions of the class: a compiled graph takes their place where it pays.
training_gradients, scoring_logits = GPT.gradients, GPT.logits


# -----------------------------------------------------------------------------
# OPTIMIZERS
# -----------------------------------------------------------------------------


def newton_schulz(matrices: Tensor, steps: int, dtype: mx.Dtype) -> Tensor:
    """Each matrix of (n, r, c) becomes about U V^T of its SVD: the quintic iteration of Muon (K. Jordan)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.swapaxes(1, 2) if tall else matrices).astype(dtype)
    x = x / (mx.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.swapaxes(1, 2)
        x = mx.addmm(x, mx.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.swapaxes(1, 2) if tall else x).astype(mx.float32)


class Muon:
    """Momentum, then orthogonalisation: every update of a matrix has singular values near 1, times its rate.

    Matrices of equal shape form one stack; every rank works on all of them.
    update = NS(g + mu m), m <- mu m + g; p <- (1 - rate wd) p - rate sqrt(max(1, r / c)) update.
    By hand: mlx.optimizers.Muon weighs the gradient by 1 - mu, which is another method while mu warms up,
    adds the decay to the gradient instead of the weight, and takes one matrix at a time."""

    def __init__(self, params: dict[str, Tensor], args: Hyperparameters, dtype: mx.Dtype):
        self.args, self.dtype = args, mx.bfloat16 if dtype == mx.bfloat16 else mx.float32
        shapes = dict.fromkeys(p.shape for p in params.values())
        stacks = [[name for name, p in params.items() if p.shape == shape] for shape in shapes]
        self.stacks = sorted(stacks, key=lambda members: -len(members) * params[members[0]].size)

    def step(self, params: dict, grads: dict, state: dict, rate: Tensor, momentum: Tensor) -> dict:
        """The weights after a step; `state` is brought forward in place."""
        found = {}
        for i, members in enumerate(self.stacks):
            share = mx.stack([grads[name] for name in members])
            buffer = state[f"muon.{i}"] = momentum * state[f"muon.{i}"] + share
            update = newton_schulz(share + momentum * buffer, self.args.muon_backend_steps, self.dtype)
            factor = max(1.0, share.shape[1] / share.shape[2]) ** 0.5
            for name, part in zip(members, update):
                found[name] = (1 - rate * self.args.muon_wd) * params[name] - rate * factor * part
        return found

    def state(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Momenta before the first step."""
        return {f"muon.{i}": mx.zeros((len(members), *params[members[0]].shape))
                for i, members in enumerate(self.stacks)}


class RowAdagrad:
    """Adagrad with one accumulator a row: p <- p - rate * g / sqrt(sum over steps of mean(g^2) in that row).
    A row of a hash table is met a few times in a run. Rows that a step does not touch stay as they are, a
    row's rate falls with its own count, and the state is 1 / (2 dim) of Adam's."""

    def __init__(self, names: list[str], args: Hyperparameters):
        self.names, self.eps = names, args.adam_eps

    def state(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"table.{i}": mx.zeros_like(params[name][..., :1]) for i, name in enumerate(self.names)}

    def step(self, params: dict, grads: dict, state: dict, rate: Tensor) -> dict:
        """The tables after a step; `state` is brought forward in place."""
        found = {}
        for i, name in enumerate(self.names):
            mean = grads[name].square().mean(-1, keepdims=True)
            total = state[f"table.{i}"] = state[f"table.{i}"] + mean
            found[name] = params[name] - rate * grads[name] / (mx.sqrt(total) + self.eps)
        return found


class Optimizers:
    """Which parameter goes where (`group_of`), at which rate, one step for all of them, and what a checkpoint
    needs. Muon moves the 2-D weights of blocks and hash projections, RowAdagrad n-gram tables, AdamW the
    rest. Draft heads stay out of the norm that clips: the model is to move as it would without them.
    `moments`, the state of all of them, has the names that the trunk's checkpoints give it."""

    def __init__(self, model: GPT, args: Hyperparameters, runtime: Runtime):
        self.args, self.runtime, self.model = args, runtime, model
        keys = ("matrix", "embed", "head", "table", "aux", "scalar", "draft")
        params = model.named_parameters()
        self.groups = {key: [n for n, p in params.items() if self.group_of(n, p) == key] for key in keys}
        self.muon = Muon({name: params[name] for name in self.groups["matrix"]}, args, runtime.dtype)
        self.tables = RowAdagrad(self.groups["table"], args)
        rates = {"embed": args.tied_embed_lr if args.tie_embeddings else args.embed_lr, "head": args.head_lr,
                 "aux": args.jepa_lr, "scalar": args.scalar_lr, "draft": args.draft_lr}
        decays = dict.fromkeys(("embed", "head", "scalar"), args.adam_wd)
        self.adam = {key: optim.AdamW(rate, [args.beta1, args.beta2], args.adam_eps, decays.get(key, 0.0),
                                      bias_correction=True)
                     for key, rate in rates.items() if self.groups[key]}
        self.rates = {key: rates[key] for key in self.adam}
        self.order = [name for key in self.adam for name in self.groups[key]]  # of AdamW's parameters
        self.counted = [name for key in keys[:-1] for name in self.groups[key]]
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
        for prefix, group in (("aux.", "aux"), ("draft.", "draft"), ("ngram.table", "table"),
                              ("lm_head", "head"), ("tok_emb", "embed"), ("bigram.table", "embed")):
            if name.startswith(prefix):
                return group
        return "matrix" if p.ndim == 2 and name.endswith(".weight") else "scalar"

    def reduce(self, grads: dict[str, Tensor], scale: float) -> tuple[dict[str, Tensor], Tensor]:
        """`scale` times all gradients, summed over ranks, and their global norm (before clipping)."""
        if scale != 1.0:
            grads = {name: scale * grad for name, grad in grads.items()}
        grads = self.runtime.sum_arrays(grads)
        return grads, mx.sqrt(sum(grads[name].square().sum() for name in self.counted))

    def step(self, step: int, progress: float, grads: dict[str, Tensor], norm: Tensor) -> None:
        args, fall = self.args, rate_at(progress, self.args)
        warm = min(1.0, step / max(args.muon_momentum_warmup_steps, 1e-9))
        momentum = (1 - warm) * args.muon_momentum_warmup_start + warm * args.muon_momentum
        numbers = {"norm": norm, "matrix": mx.array(args.matrix_lr * fall), "momentum": mx.array(momentum),
                   "table": mx.array(args.ngram_lr * fall)}
        numbers |= {key: mx.array(rate * fall) for key, rate in self.rates.items()}
        params, self.moments = self.apply(self.model.named_parameters(), grads, self.moments, numbers)
        update_parameters(self.model, params)

    def update(self, params: dict, grads: dict, moments: dict, numbers: dict) -> tuple[dict, dict]:
        """(weights, moments) after a step: a function of arrays alone, to be compiled."""
        moments = dict(moments)
        clip = mx.minimum((self.args.grad_clip_norm or math.inf) / (numbers["norm"] + 1e-6), 1.0)
        grads = {name: clip * grad for name, grad in grads.items()}
        found = self.muon.step(params, grads, moments, numbers["matrix"], numbers["momentum"])
        found |= self.tables.step(params, grads, moments, numbers["table"])
        for key, adam in self.adam.items():
            names = {name: f"adam.{self.order.index(name)}" for name in self.groups[key]}
            adam.state = {"step": moments[f"{names[self.groups[key][0]]}.step"],
                          "learning_rate": numbers[key]}
            adam.state |= {name: {"m": moments[f"{at}.exp_avg"], "v": moments[f"{at}.exp_avg_sq"]}
                           for name, at in names.items()}
            found |= adam.apply_gradients({name: grads[name] for name in names},
                                          {name: params[name] for name in names})
            for name, at in names.items():
                moments |= {f"{at}.step": adam.state["step"], f"{at}.exp_avg": adam.state[name]["m"],
                            f"{at}.exp_avg_sq": adam.state[name]["v"]}
        return found, moments

    def state(self) -> dict[str, Tensor]:
        """Every tensor of every optimizer, by name."""
        return self.moments

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.moments = {name: state[name] for name in self.moments}


def rate_at(progress: float, args: Hyperparameters) -> float:
    """Share of the peak rate at `progress` in [0, 1]: flat, then linear down to MIN_LR, reached at 1.
    Progress is max(step share, time share), so the rate is at its floor at the end whichever limit ends the
    run (#832 stopped at 17 % of its peak, defect A4)."""
    fall = args.warmdown_iters / args.iterations
    left = min(1.0, (1.0 - progress) / fall) if fall else 1.0
    return args.min_lr + (1.0 - args.min_lr) * max(0.0, left)


class EMA:
    """fp32 average of the weights; decay min(EMA_DECAY, (1 + t) / (10 + t)): short runs leave the init."""

    def __init__(self, model: GPT, decay: float):
        self.decay, self.model, self.average = decay, model, model.named_parameters()

    def update(self, step: int) -> None:
        share = 1.0 - min(self.decay, (1 + step) / (10 + step))
        live = self.model.named_parameters()
        self.average = {name: old + share * (live[name] - old) for name, old in self.average.items()}

    def apply(self) -> None:
        """From here on the model holds the average."""
        update_parameters(self.model, self.average)


# -----------------------------------------------------------------------------
# ARTIFACT
# -----------------------------------------------------------------------------

# magic (8 bytes), sha256 of the rest (32), version (2), header length (4), zlib of a JSON header, payload
ARTIFACT_MAGIC, ARTIFACT_VERSION = b"GOLFLM\r\n", 2

constriction = None  # rANS -> LZMA
with contextlib.suppress(ImportError):
    import constriction

CHUNK = 1024  # symbols coded under one state of the models
CONTEXT_EDGES = np.array([1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512])  # 16 * |q|

# Integers in [-top, top] as they lie in the raw payload, a byte each: slices x places. `model` names what
# they share statistics with; every `period` slices the history of a place begins anew.
Plane = namedtuple("Plane", "model top slices places period")


def planes(entries: list) -> list[Plane]:
    """Layout of the raw payload: the quantised tensors, then low and high bytes of all fp16 numbers."""
    found, halves = [], 0
    for name, shape, bits, axis in entries:
        slices, model = math.prod(shape) // (shape[axis] if bits else 1), f"{tensor_class(name)}{bits}"
        halves += slices
        if bits:
            period = slices if len(shape) < 3 else shape[-1]
            found.append(Plane(model, 2 ** (bits - 1) - 1, slices, shape[axis], period))
    return found + [Plane(f"half{i}", 128, 1, halves, 1) for i in range(2)]


def code_planes(raw: np.ndarray, layout: list[Plane], code) -> None:
    """Walks over `raw` (int8) in coding order: code(symbols, model, top) returns the symbols, which are
    written back; a decoder is handed what it has to fill.
    A symbol's context is the mean |q| of its place (column of a matrix, bucket of a table) in the slices
    before, and how many these are. Each (model, context) counts what it has seen, so no table is sent; it
    begins with a two-sided geometric distribution of the context's mean, and with every tensor old counts
    shrink. Only integers and correctly rounded operations: any machine agrees."""
    models: dict[str, np.ndarray] = {}
    ends = np.cumsum([plane.slices * plane.places for plane in layout])
    for plane, block in zip(layout, np.split(raw, ends)):
        block = block.reshape(plane.slices, plane.places)
        if plane.model not in models:
            mean = np.tile(np.append(CONTEXT_EDGES, 724), 4)[:, None] / 16  # by level, by age
            mean[: len(CONTEXT_EDGES) + 1] = 4  # no slice before
            fall = np.repeat(mean / (mean + 1), plane.top, 1)
            fall = np.multiply.accumulate(fall, axis=1)  # not `**`, whose last bit differs between machines
            shares = np.hstack((fall[:, ::-1], np.ones_like(mean), fall)) / (2 * mean + 1)
            models[plane.model] = 24 * shares + 0.02
        counts = models[plane.model]
        group = max(1, min(plane.period, CHUNK // plane.places))
        for begin in range(0, plane.slices, plane.period):
            seen, total = 0, np.zeros(plane.places, np.int64)
            counts /= 16
            end = min(begin + plane.period, plane.slices)
            for first in range(begin, end, group):
                context = np.searchsorted(CONTEXT_EDGES, 16 * total // max(seen, 1), side="right")
                context += min(seen.bit_length(), 3) * (len(CONTEXT_EDGES) + 1)  # age: 0, 1, 2 to 3, more
                last = min(first + group, end)
                for left in range(0, plane.places, CHUNK):
                    here = context[left : left + CHUNK]
                    for level in np.unique(here):
                        table, columns = counts[level], left + np.flatnonzero(here == level)
                        part = block[first:last, columns]
                        model = constriction.stream.model.Categorical(table, perfect=False)
                        symbols = code(part.ravel(), model, plane.top)
                        block[first:last, columns] = symbols.reshape(part.shape)
                        table += np.bincount(symbols.astype(np.int64) + plane.top, minlength=len(table))
                seen += last - first
                total += np.abs(block[first:last].astype(np.int64)).sum(0)


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
    code_planes(raw, layout, lambda old, model, top: (coder.decode(model, len(old)) - top).astype(np.int8))
    if not coder.is_empty():
        raise ValueError("the payload is longer than its layout")
    return raw.tobytes()


def compressors() -> dict[str, tuple]:
    """{name: (compress, decompress)} of what is installed; both take bytes and the payload's layout."""
    found = {"lzma": (lambda raw, _: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
                      lambda blob, _: lzma.decompress(blob)),
             "zlib": (lambda raw, _: zlib.compress(raw, 9), lambda blob, _: zlib.decompress(blob))}
    with contextlib.suppress(ImportError):
        import zstandard
        found["zstd"] = lambda raw, _: zstandard.compress(raw, 22), lambda blob, _: zstandard.decompress(blob)
    return found | ({"rans": (rans_encode, rans_decode)} if constriction else {})


def size_plan(model: GPT, args: Hyperparameters) -> dict[str, int]:
    """Bytes of the artifact by tensor class, before training: matrices are normal enough for the entropy of a
    rounded normal; hash tables are heavy-tailed and took 0.83 of it in measured runs (README, Size plan)."""
    plan = dict.fromkeys(TENSOR_CLASSES, 0)
    for name, p in model.exported().items():
        kind, (bits, axis) = tensor_class(name), quant_plan(name, p.shape, args)
        weight_bits = 16.0
        if bits:
            top = 2 ** (bits - 1) - 1
            k = args.k_by_class[kind] if args.quant_clip == "std" else 3.3  # where the mse search ends up
            at = [(i + 0.5) * k / top / math.sqrt(2) for i in range(-top, top)]
            shares = np.diff([0, *(0.5 + 0.5 * math.erf(x) for x in at), 1]) + 1e-30
            weight_bits = float(-(shares * np.log2(shares)).sum()) * (0.83 if kind == "ngram" else 1)
            weight_bits += 16 / p.shape[axis]
        plan[kind] += int(p.size * weight_bits / 8)
    return plan


def pack(tensors: dict[str, np.ndarray], args: Hyperparameters, hessians: dict | None = None) -> bytes:
    """Quantises by `quant_plan` and compresses in the order of `planes`: one self-describing file, no pickle.
    `hessians` {name: (C, C)} of the matrices that GPTQ is to round."""
    entries, codes, halves = [], [], []
    for name, weight in tensors.items():
        kind, (bits, axis) = tensor_class(name), quant_plan(name, weight.shape, args)
        entries.append([name, list(weight.shape), bits, axis])
        if bits:
            q, weight = quantise(weight, bits, args.quant_clip, args.k_by_class[kind], axis,
                                 args.rate_by_class[kind], (hessians or {}).get(name))
            codes.append(np.moveaxis(q, axis, -1).tobytes())
        halves.append(np.asarray(weight, dtype="<f2").reshape(-1))
    raw = b"".join(codes) + np.concatenate(halves).view(np.uint8).reshape(-1, 2).T.tobytes()
    there = compressors()
    wanted = "lzma" if args.compressor == "rans" and not constriction else args.compressor
    names = [name for name in sorted(there) if wanted in ("auto", name)]
    if not names:
        raise UserError(f"COMPRESSOR={wanted} is not installed; there is {', '.join(sorted(there))}")
    blobs = {name: there[name][0](raw, planes(entries)) for name in names}
    name = min(names, key=lambda name: len(blobs[name]))
    header = {"config": args.shipped(), "tensors": entries, "compressor": name}
    header = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = ARTIFACT_VERSION.to_bytes(2, "little") + len(header).to_bytes(4, "little") + header + blobs[name]
    return ARTIFACT_MAGIC + hashlib.sha256(body).digest() + body


def unpack(blob: bytes, where: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The inverse of `pack`: (header, {name: fp32 array}). Raises UserError that names the file `where`."""
    if blob[: len(ARTIFACT_MAGIC)] != ARTIFACT_MAGIC:
        raise UserError(f"{where}: not an artifact of this family (it begins with {blob[:8]!r})")
    body = blob[len(ARTIFACT_MAGIC) + 32 :]
    if hashlib.sha256(body).digest() != blob[len(ARTIFACT_MAGIC) : len(ARTIFACT_MAGIC) + 32]:
        raise UserError(f"{where}: its sha256 does not match: truncated or altered")
    version, length = int.from_bytes(body[:2], "little"), int.from_bytes(body[2:6], "little")
    if version != ARTIFACT_VERSION:
        raise UserError(f"{where}: format version {version}, this script reads {ARTIFACT_VERSION}")
    try:
        header = {"config": {}} | json.loads(zlib.decompress(body[6 : 6 + length]))
        if header["compressor"] not in compressors():
            raise UserError(f"{where}: packed with {header['compressor']}, which is not installed")
        raw = compressors()[header["compressor"]][1](body[6 + length :], planes(header["tensors"]))
        return header, unpack_tensors(header["tensors"], raw)
    except UserError:
        raise
    except Exception as error:  # each decoder has its own kinds
        raise UserError(f"{where}: its header contradicts its payload ({error!r})") from None


def unpack_tensors(entries: list, raw: bytes) -> dict[str, np.ndarray]:
    *ends, length = np.cumsum([plane.slices * plane.places for plane in planes(entries)], dtype=np.int64)
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


def shipped_settings(header: dict, where: str, environ: dict[str, str] | None = None) -> Hyperparameters:
    """The settings in an artifact's header, with what `environ` may change (EVAL_*, the run's own)."""
    wanted = [var.name for var in Hyperparameters.vars().values() if var.ship]
    if missing := [name for name in wanted if name not in header["config"]]:
        raise UserError(f"{where}: its config lacks {missing[0]}")
    return Hyperparameters(environ, header["config"])


def read_file(path: str | Path, what: str) -> bytes:
    if not path:
        raise UserError(f"{what}=FILE is not set")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{what}={path}: {error.strerror}") from None


def load(artifact_path: str | Path, device: str | mx.Device = "cpu", args: Hyperparameters | None = None,
         dtype: mx.Dtype = mx.float32, attention: str = "sdpa") -> GPT:
    """The scoring model, from an artifact alone; `args` of the same model may change how it is scored."""
    header, tensors = unpack(read_file(artifact_path, "ARTIFACT"), str(artifact_path))
    args = args or shipped_settings(header, str(artifact_path))
    mx.set_default_device(pick_device(device) if isinstance(device, str) else device)
    model = GPT(args, attention, dtype)
    wanted = {(name, p.shape) for name, p in model.exported().items()}
    if odd := wanted ^ {(name, array.shape) for name, array in tensors.items()}:
        raise UserError(f"{artifact_path}: its tensors are not those of its config, first {min(odd)}")
    update_parameters(model, {name: mx.array(array) for name, array in tensors.items()})
    return model


# -----------------------------------------------------------------------------
# EVALUATION
# -----------------------------------------------------------------------------


def windows(targets: int, length: int, stride: int) -> np.ndarray:
    """Rows (start, first, stop): ids[start : start + length] are read to score targets first ... stop - 1.
    Target t is the id t + 1 of the stream. The stream is cut into blocks of `stride` targets; each block is
    scored by the window that ends with it (the first windows start at 0), so every target, the tail included,
    is scored exactly once, with at least length - stride ids of context where there are so many."""
    first = np.arange(0, targets, stride)
    stop = np.minimum(first + stride, targets)
    start = np.maximum(first + stride - length, 0)
    assert (stop - first).sum() == targets and (first >= start).all() and (stop - start <= length).all()
    return np.stack((start, first, stop), axis=1)


def log_softmax(logits: Tensor) -> Tensor:
    # nn.log_softmax is compiled, whatever COMPILE says
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def scored(model: GPT, ids: np.ndarray, length: int, stride: int, batch: int, logits=scoring_logits,
           share: tuple[int, int] = (0, 1), show: str = "", learner: TestTimeTraining | None = None):
    """Yields (first, stop, fp32 log-probabilities (n, V), nats (n,)) for each block of stop - first targets.
    `share` = (rank, ranks) keeps a rank's part of the batches. A learner is shown every chunk but the last
    once it is scored. This is the only path from weights to a score."""
    plan = windows(len(ids) - 1, length, stride)
    chunk = len(plan) if learner is None else model.args.ttt_chunk_tokens // stride  # windows
    span, seen = min(stride, length), np.zeros(len(ids) - 1, dtype=bool)
    for at in progress_bar(range(0, len(plan), chunk), len(plan) // chunk, show, bool(show and learner)):
        if at and learner is not None:
            learner.catch_up(ids, seen)
        part = plan[at : at + chunk]
        batches = range(share[0] * batch, len(part), share[1] * batch)
        for start_at in progress_bar(batches, len(batches), show, bool(show and learner is None)):
            rows = part[start_at : start_at + batch]
            inputs = np.full((batch, length), PAD_ID, np.int32)  # one shape: compiled once
            wanted, take = np.zeros((batch, span), np.int32), np.zeros(batch, np.int32)
            for i, (start, first, stop) in enumerate(rows):
                text = ids[start : min(start + length, len(ids) - 1)]
                inputs[i, : len(text)] = text
                wanted[i, : stop - first] = ids[first + 1 : stop + 1]
                take[i] = first - start
            inputs, take, wanted = (mx.array(x) for x in (inputs, take, wanted))
            logprobs = log_softmax(logits(model, inputs, take, span))
            nats = -mx.take_along_axis(logprobs, wanted[..., None], axis=-1).squeeze(-1)
            mx.eval(nats, logprobs)  # here, or graphs of windows behind would stay in memory
            nats = np.array(nats).astype(np.float64)
            for i, (_, first, stop) in enumerate(rows):
                yield first, stop, logprobs[i, : stop - first], nats[i, : stop - first]
        seen[part[0, 1] : part[-1, 2]] = True


class TestTimeTraining:
    """Score-first test-time training (#461, #549): SGD with momentum on each chunk of targets once scored.
    After a chunk, rows of TRAIN_SEQ_LEN that end with it are trained on, TTT_BATCH_ROWS an update, as many
    updates on every rank. The rate depends on the chunks behind alone, so that a decoder, which does not know
    how much text will come, makes the same updates. `restore` undoes them all."""

    def __init__(self, model: GPT, gradients=training_gradients, runtime: Runtime | None = None, report=None):
        self.model, self.args, self.gradients = model, model.args, gradients
        self.runtime, self.report = runtime, report
        modules = tuple(part.strip() + "." for part in self.args.ttt_modules.split(","))
        named = {f"{name}.": p for name, p in model.named_parameters().items()}
        for module in modules:
            if not any(name.startswith(module) for name in named):
                raise UserError(f"TTT_MODULES={self.args.ttt_modules!r}: the model has no {module[:-1]!r}")
        self.params = {name[:-1]: p for name, p in named.items() if name.startswith(modules)}
        self.kept = dict(self.params)
        self.sgd = optim.SGD(self.args.ttt_lr, self.args.ttt_momentum)
        self.chunks, self.updates, self.seconds = 0, 0, 0.0

    def rows(self, stop: int) -> np.ndarray:
        """Starts of the rows that cover the chunk of targets before `stop`, from its end backwards."""
        count = -(-self.args.ttt_chunk_tokens // self.args.train_seq_len)
        starts = stop - self.args.train_seq_len * np.arange(count, 0, -1)
        return starts[starts >= 0]

    def catch_up(self, ids: np.ndarray, seen: np.ndarray) -> None:
        """Learns, in order, from the chunks that are complete; `seen` (targets,): what has been scored."""
        size, start = self.args.ttt_chunk_tokens, time.perf_counter()
        while len(done := seen[self.chunks * size : (self.chunks + 1) * size]) == size and done.all():
            self.chunks += 1
            starts, batch = self.rows(self.chunks * size), self.args.ttt_batch_rows
            assert all(seen[at : at + self.args.train_seq_len].all() for at in starts), "not scored yet"
            for at in [*range(0, len(starts), batch)] * self.args.ttt_epochs * self.args.ttt_adapt:
                self.update(ids, starts[at : at + batch])
        self.seconds += time.perf_counter() - start
        if self.report is not None:
            self.report(self)

    def update(self, ids: np.ndarray, starts: np.ndarray) -> None:
        args, runtime, length = self.args, self.runtime, self.args.train_seq_len
        rank, ranks = (runtime.rank, runtime.world_size) if runtime else (0, 1)
        rows = np.zeros((-(-args.ttt_batch_rows // ranks), length + 1), np.int32)  # one shape on every rank
        weights = np.zeros(len(rows), np.float32)
        for i, start in enumerate(starts[rank::ranks]):
            rows[i], weights[i] = ids[start : start + length + 1], 1
        share = {"ce": mx.array(1 / (len(starts) * length))}
        _, grads = self.gradients(self.model, self.params, share, mx.array(rows), mx.array(weights), None)
        grads = runtime.sum_arrays(grads) if runtime else grads
        norm = mx.sqrt(sum(grad.square().sum() for grad in grads.values()))
        clip = mx.minimum((args.ttt_grad_clip or math.inf) / (norm + 1e-6), 1.0)
        fall = (1 + (self.chunks - 1) / (args.ttt_decay_chunks or math.inf)) ** -0.5
        self.sgd.learning_rate = args.ttt_lr * fall
        grads = {name: clip * grad for name, grad in grads.items()}
        self.params = self.sgd.apply_gradients(grads, self.params)
        mx.eval(self.params, self.sgd.state)
        update_parameters(self.model, self.params)
        self.updates += 1

    def restore(self) -> None:
        update_parameters(self.model, self.kept)


def score(model: GPT, ids, positions=()) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """(nats of each target ids[1:], {t: log-probabilities (V,) at target t, for t in positions})."""
    args, ids, wanted, length = model.args, np.asarray(ids), set(positions), model.args.eval_seq_len
    blocks = -(-len(ids) // args.eval_stride)  # a short text needs no full batch
    batch = max(1, min(args.eval_batch_tokens // length, blocks))
    nats, vectors = np.zeros(max(len(ids) - 1, 0)), {}
    learner = TestTimeTraining(model) if args.ttt != "0" else None
    for first, stop, logprobs, part in scored(model, ids, length, args.eval_stride, batch, learner=learner):
        nats[first:stop] = part
        vectors |= {t: np.array(logprobs[t - first]) for t in wanted if first <= t < stop}
    if learner is not None:
        learner.restore()
    return nats, vectors


class Evaluator:
    """Scores a model on the validation stream: one line in the log, one entry in `metrics.json` a pass."""

    def __init__(self, args: Hyperparameters, data: Dataset, runtime: Runtime, log: Log):
        self.args, self.runtime, self.log = args, runtime, log
        self.logits, self.gradients = scoring_logits, training_gradients
        ids, self.tables, self.prefix = data.val, byte_tables(args), 0
        sizes = target_bytes(ids, self.tables)
        if args.val_bytes and args.val_bytes < sizes.sum():
            targets = int(np.searchsorted(np.cumsum(sizes), args.val_bytes)) + 1
            ids, sizes, self.prefix = ids[: targets + 1], sizes[:targets], args.val_bytes
        self.ids, self.bytes = ids, int(sizes.sum())
        if not self.bytes:
            raise UserError(f"{data.val_files[0]}: the validation targets stand for no byte at all")
        self.classes = class_table(args.vocab_size)
        self.results: dict[str, dict] = {}

    def describe(self, manifest: dict) -> str:
        original = manifest.get("val_bytes") or self.bytes
        note = f" (original text {original}: the tokenizer normalises, the targets' own bytes divide)"
        note = f" prefix:{self.prefix}" if self.prefix else note * (original != self.bytes)
        return f"val: targets:{len(self.ids) - 1} bytes:{self.bytes}{note}"

    def run(self, name: str, model: GPT, length: int, stride: int, learn: bool = False) -> dict:
        """val_loss in nats a target, val_bpb = nats / ln 2 / bytes: special ids cost nats and add no byte."""
        args, runtime, start = self.args, self.runtime, time.perf_counter()
        sums = np.zeros(len(BYTE_CLASSES) + 1)

        def chunk_line(learner: TestTimeTraining) -> None:
            if learner.chunks % 50 == 0 or learner.chunks <= 2:
                nats = runtime.all_reduce(sums)[:-1].sum() / math.log(2)
                size = target_bytes(self.ids[: learner.chunks * args.ttt_chunk_tokens + 1], self.tables).sum()
                infer = time.perf_counter() - start - learner.seconds
                self.log(f"  ttt_chunk {learner.chunks} bpb:{nats / max(size, 1):.6f} "
                         f"updates:{learner.updates} infer:{infer:.1f}s adapt:{learner.seconds:.1f}s")
        batch, share = max(1, args.eval_batch_tokens // length), (runtime.rank, runtime.world_size)
        learner = TestTimeTraining(model, self.gradients, runtime, chunk_line) if learn else None
        for first, stop, _, nats in scored(model, self.ids, length, stride, batch, self.logits, share,
                                           name if runtime.main else "", learner):
            classes = self.classes[self.ids[first + 1 : stop + 1]]
            sums[:-1] += np.bincount(classes, nats, minlength=len(BYTE_CLASSES))
            sums[-1] += stop - first
        targets, sums = len(self.ids) - 1, runtime.all_reduce(sums)
        assert int(sums[-1]) == targets, f"{name}: scored {int(sums[-1])} targets of {targets}"
        nats = float(sums[:-1].sum())
        bits = {label: float(total) / math.log(2) for label, total in zip(BYTE_CLASSES, sums) if total}
        result = {"val_loss": nats / targets, "val_bpb": nats / math.log(2) / self.bytes, "targets": targets,
                  "bytes": self.bytes, "seconds": time.perf_counter() - start, "seq_len": length,
                  "stride": stride, "bits_by_class": bits}
        result |= {"prefix_bytes": self.prefix} if self.prefix else {}
        if learner is not None:
            learner.restore()
            result |= {"updates": learner.updates, "adapt_seconds": learner.seconds}
        self.results[name] = result
        return result

    def report(self, name: str, model: GPT, stride: int | None = None, learn: bool = False) -> dict:
        """Runs a pass and prints its line: non-overlapping windows, or sliding ones with a stride."""
        length = self.args.eval_seq_len
        result = self.run(name, model, length, stride or length, learn)
        extra = f" stride:{stride}" * bool(stride) + f" prefix:{self.prefix}" * bool(self.prefix)
        self.log(f"{name} val_loss:{result['val_loss']:.4f} val_bpb:{result['val_bpb']:.4f}{extra} targets:"
                 f"{result['targets']} bytes:{result['bytes']} eval_time:{1e3 * result['seconds']:.0f}ms")
        self.log(f"{name}_exact val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f}")
        return result


# -----------------------------------------------------------------------------
# GENERATION
# -----------------------------------------------------------------------------


class Stream:
    """The scorer, one id at a time: what a decoder can follow. Reads the same windows as `score`, learns
    after the same chunks, and keeps keys and values of the window at hand; a new window, a new cache."""

    def __init__(self, model: GPT):
        self.model, self.ids = model, []
        self.learner = TestTimeTraining(model) if model.args.ttt != "0" else None
        self.block, self.start, self.past, self.known = -1, 0, None, None
        self.read, self.states = [], {}  # the last pass: ids of its window with drafts; {position: its state}

    @property
    def updates(self) -> int:
        return self.learner.updates if self.learner else 0

    def logprobs(self) -> np.ndarray:
        """fp32 log-probabilities (V,) of the next id. The first id, a BOS, is given: push it first."""
        if self.known is None:
            self.known = self.ahead(())[0]
        return self.known

    def ahead(self, drafts: list[int]) -> np.ndarray:
        """The same if `drafts` were to follow, in one pass: (n + 1, V) of the next id and of those behind the
        first n drafts, as many as the window takes. What is then pushed as drafted is not read again."""
        if not self.ids:
            raise ValueError("push the first id (BOS) before asking for the second")
        args = self.model.args
        block, place = divmod(len(self.ids) - 1, args.eval_stride)
        if block != self.block:
            if self.learner:
                self.learner.catch_up(np.array(self.ids), np.ones(len(self.ids) - 1, dtype=bool))
            self.block, self.past = block, KVCache(self.model)
            self.start = max((block + 1) * args.eval_stride - args.eval_seq_len, 0)
        self.read = [*self.ids[self.start :], *drafts[: args.eval_stride - 1 - place]]
        self.past.cut(len(self.ids) - 1 - self.start)
        ids = mx.array(np.array([self.read], np.int32))
        x, _ = self.model.hidden(ids, self.model.rotary_eval, past=self.past)
        states = x[0, len(self.ids) - 1 - self.start - len(self.read) :]
        self.states = dict(enumerate(states, len(self.ids) - 1))
        return np.array(log_softmax(self.model.head(states.astype(mx.float32))))

    def push(self, token: int) -> None:
        at = len(self.ids) - self.start
        if self.past is not None and self.read[at : at + 1] != [token]:
            self.past.cut(at)
        self.ids.append(int(token))
        self.known = None


stream = Stream  # the name that every script of the family gives it


def picked(logits: np.ndarray, place: int, args: Hyperparameters) -> int:
    """The id at a place of the text: the best or, at a TEMPERATURE, a draw (Gumbel). Its noise is that of the
    place, whoever draws: what a drafter thinks likely comes true, and a text does not depend on drafts."""
    if args.temperature:  # drafter-invariant speculation: Daliri et al. 2025
        noise = np.random.default_rng([args.seed, place]).gumbel(size=len(logits))
        logits = logits / args.temperature + noise
    return int(logits.argmax())


def drafted(reader: Stream, args: Hyperparameters) -> list[int]:
    """What the heads guess behind the newest id, which no pass has read: from the position before it."""
    model, drafts, state = reader.model, [reader.ids[-1]], reader.states.get(len(reader.ids) - 2)
    while state is not None and len(drafts) <= model.args.draft:
        state = model.draft(state, model.embed(mx.array(drafts[-1])))
        place = len(reader.ids) + len(drafts) - 1
        drafts.append(picked(np.array(model.head(state)), place, args))
    return drafts[1:]


def write(model: GPT, prompt: list[int], args: Hyperparameters) -> tuple[list[int], int]:
    """(MAX_NEW_TOKENS ids that go on from a prompt, passes). A pass reads the newest id and drafts behind it;
    those that the model picks too join the text, and behind them the id that it picks instead."""
    reader, passes = Stream(model), 0
    for token in prompt:
        reader.push(token)
    while (made := len(reader.ids) - len(prompt)) < args.max_new_tokens:
        drafts = drafted(reader, args)[: args.max_new_tokens - made - 1] if args.speculate else []
        for draft, logprobs in zip([*drafts, None], reader.ahead(drafts)):
            reader.push(picked(logprobs, len(reader.ids), args))
            if reader.ids[-1] != draft:
                break
        passes += 1
    return reader.ids[len(prompt) :], passes


def generate(args: Hyperparameters, runtime: Runtime) -> int:
    """Writes what follows GENERATE to stdout, and numbers to stderr."""
    model, text = load(args.artifact, runtime.device, args, runtime.dtype), os.fsencode(args.generate)
    with contextlib.suppress(OSError, ValueError):  # a text is no path
        text = Path(args.generate).read_bytes()
    began = time.perf_counter()
    made, passes = write(model, [BOS_ID, *(byte + BYTE_OFFSET for byte in text)], args)
    seconds, text = time.perf_counter() - began, bytes(i - BYTE_OFFSET for i in made if i >= BYTE_OFFSET)
    sys.stdout.buffer.write(text.decode(errors="replace").encode() if sys.stdout.isatty() else text)
    print(f"\nids:{len(made)} bytes:{len(text)} passes:{passes} ids_per_pass:{len(made) / passes:.2f} "
          f"bytes_per_second:{len(text) / seconds:.1f} (the prompt's time in it)", file=sys.stderr)
    return 0


# -----------------------------------------------------------------------------
# TRAINING
# -----------------------------------------------------------------------------


class Stopped(Exception):
    """SIGTERM or Ctrl-C: the checkpoint is written, the message says how to go on."""


def torch_rng_state(seed: int) -> np.ndarray:
    """What torch.get_rng_state() is after manual_seed(seed), (5056,) uint8: the trunk asks for one. The seed,
    numbers left, "seeded", the next number's place, 624 words of MT19937, 40 bytes of spare normals."""
    words = np.random.RandomState(seed % 2**32).get_state()[1]
    head = np.array([seed % 2**64], "<u8"), np.array([1, 1, 0, 0], "<i4")
    parts = *head, words.astype("<u8"), np.zeros(40, np.uint8)
    return np.concatenate([part.view(np.uint8) for part in parts])


class Trainer:
    """Model, optimizers, average, loader and clock: all that a checkpoint holds, and one step of training."""

    def __init__(self, args: Hyperparameters, data: Dataset, runtime: Runtime, log: Log):
        self.args, self.data, self.runtime, self.log = args, data, runtime, log
        self.plan = BatchPlan.make(args, runtime.world_size)
        self.model = GPT(args, runtime.attention, runtime.dtype)
        self.model.init_weights(args.seed)
        for name, p in self.model.named_parameters().items() if args.qat_start < 1 else ():
            if (plan := quant_plan(name, p.shape, args))[0]:
                owner, k = name.rpartition(".")[0], args.k_by_class[tensor_class(name)]
                self.model.get_submodule(owner).qat = Rounding(plan[0], k, plan[1])
        self.gradients, self.logits = training_gradients, scoring_logits
        if runtime.compile:
            self.gradients, self.logits = compiled(training_gradients), compiled(scoring_logits)
        self.loader_state, self.signal = None, 0
        self.step, self.seconds, self.best = 0, 0.0, math.inf  # of this run and the runs that it resumes
        self.slowest = 0.0  # seconds of the slowest step, slowly forgotten
        self.reserve = 0.0  # seconds that calibration will take of the training clock
        self.optimizers = Optimizers(self.model, args, runtime)
        self.fresh_optimizers()

    def fresh_optimizers(self) -> None:
        self.optimizers.fresh()
        self.ema = EMA(self.model, self.args.ema_decay) if self.args.ema_enabled else None
        self.loss_scale, self.good_steps = (65536.0 if self.runtime.dtype == mx.float16 else 1.0), 0

    def micro_step(self, ids: Tensor, weights: Tensor, aux_inputs, aux_weights: dict[str, float]) -> tuple:
        """Sums and gradients of one micro-batch; gradients add up to those of the global batch's mean."""
        shares = {"ce": 1 / (self.plan.rows * self.args.train_seq_len)}
        shares |= {name: weight / (self.plan.rows // self.plan.group) for name, weight in aux_weights.items()
                   if weight or self.runtime.compile}  # terms that came later would be compiled in mid-run
        shares = {name: mx.array(share * self.loss_scale) for name, share in shares.items()}
        return self.gradients(self.model, self.model.named_parameters(), shares, ids, weights, aux_inputs)

    def train_step(self, ids: Tensor, weights: Tensor, progress: float) -> dict[str, float]:
        """One optimizer step on a global batch; returns this rank's share of each summed term. Every
        micro-batch is computed before the next one's graph is made: a step takes the memory of one."""
        if self.args.qat_start < 1:
            self.set_rounding(progress >= self.args.qat_start)
        aux = self.model.aux
        aux_inputs = aux.inputs(self.step) if aux is not None else None
        aux_weights = aux.weights(progress) if aux is not None else {}
        aux_weights |= {"draft": 1.0} if self.model.draft is not None else {}
        sums, grads = [], {}
        for batch in zip(ids, weights):
            part, more = self.micro_step(*batch, aux_inputs, aux_weights)
            grads = {name: grads[name] + grad if grads else grad for name, grad in more.items()}
            mx.eval(grads, part)
            sums.append(part)
        grads, norm = self.optimizers.reduce(grads, 1.0 / self.loss_scale)
        if self.runtime.dtype != mx.float16 or self.adapt_loss_scale(norm):
            self.optimizers.step(self.step, progress, grads, norm)
            if self.ema is not None:
                self.ema.update(self.step)
        mx.eval(self.model.parameters(), self.optimizers.state(), self.ema.average if self.ema else [])
        return {name: sum(part[name].item() for part in sums) for name in sums[0]}

    def set_rounding(self, on: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, Rounding):
                module.on = mx.array(float(on))

    def adapt_loss_scale(self, norm: Tensor) -> bool:
        """fp16: halves the scale and skips the step on overflow, doubles it after 2,000 good steps."""
        finite = math.isfinite(norm.item())
        self.good_steps = self.good_steps + 1 if finite else 0
        self.loss_scale *= 0.5 if not finite else 2.0 if self.good_steps % 2000 == 0 else 1.0
        return finite

    def warm_up(self) -> None:
        """Compiles every shape on made-up ids, then puts weights and optimizers back bit for bit."""
        if not self.args.warmup_steps:
            return
        kept = self.model.named_parameters()
        try:
            self.try_shapes()
        except Exception as error:  # whatever the compiler did not like: the same work runs without it
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
        shape = (self.plan.micro_steps, self.plan.groups * self.plan.group, args.train_seq_len + 1)
        for _ in range(args.warmup_steps):
            ids = mx.array(generator.integers(BYTE_OFFSET, args.vocab_size, shape, np.int32))
            self.train_step(ids, mx.ones(shape[:2]), 0.0)
        length, batch = args.eval_seq_len, max(1, args.eval_batch_tokens // args.eval_seq_len)
        for stride in sorted({length, args.eval_stride}):
            list(scored(self.model, np.full(2, BOS_ID), length, stride, batch, self.logits))
        if args.quant_round == "gptq":
            for _ in range(2):  # the second time is the one to go by
                start = time.perf_counter()
                self.input_moments(ids, {})
                seconds = 1.25 * args.gptq_batches * (time.perf_counter() - start)
                self.reserve, = self.runtime.from_main([seconds])  # ranks must agree on when to stop

    def input_moments(self, batch: Tensor, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds this rank's X^T X of every matrix's inputs to `sums` {name: (C, C)}."""
        def add(names: list[str], x: Tensor) -> None:
            x = x.flatten(0, -2).astype(mx.float32)
            for name, product in zip(names, [x.T @ x] * len(names)):
                sums[name] = sums.get(name, 0) + product
        for path, module in self.model.named_modules():
            kind = {CastedLinear: ("",), CausalSelfAttention: ("c_q.", "c_k.", "c_v.")}.get(type(module), ())
            if names := [f"{path}.{part}weight" for part in kind]:
                module.watch = lambda x, names=names: add(names, x)
        for ids in batch:
            x, _ = self.model.hidden(ids[:, :-1], self.model.rotary_train)
            add(["tok_emb.weight", "lm_head.weight"], x)
            mx.eval(sums)
        for module in self.model.modules():
            module.watch = None
        return sums

    def calibrate(self) -> dict[str, np.ndarray]:
        """Hessians for GPTQ from the next GPTQ_BATCHES training batches, on the training clock."""
        start, sums = time.perf_counter(), {}
        batches = Loader(self.data, self.args, self.plan, self.runtime.rank, self.loader_state)
        for _ in range(self.args.gptq_batches):
            self.input_moments(mx.array(batches.next()[0]), sums)
        hessians = {name: np.array(total) for name, total in self.runtime.sum_arrays(sums).items()}
        self.seconds, = self.runtime.from_main([self.seconds + time.perf_counter() - start])
        return hessians

    def progress(self) -> float:
        """Share of the run that is behind: of the steps or of the seconds, whichever is larger. Twice the
        slowest of late steps, and the time for calibration, stay unused: nothing may end after the limit."""
        cap = self.args.max_wallclock_seconds - 2 * self.slowest - self.reserve
        by_time = self.seconds / max(cap, 1e-9) if self.args.max_wallclock_seconds else 0.0
        return min(1.0, max(self.step / self.args.iterations, by_time))

    def run(self, evaluator: Evaluator) -> None:
        """Trains until progress is 1 or a signal comes. The clock runs here, but for validation."""
        args, runtime = self.args, self.runtime
        loader = Loader(self.data, args, self.plan, runtime.rank, self.loader_state)
        first_bad = math.inf  # step of the first non-finite loss
        started = time.perf_counter() - self.seconds

        def due(every: int) -> bool:
            return every > 0 and self.step % every == 0
        with contextlib.closing(loader.prefetch()) as batches:
            while True:
                now = time.perf_counter() - started
                slowest = max(now - self.seconds, 0.99 * self.slowest)
                self.seconds, self.slowest, stop = runtime.from_main([now, slowest, float(self.signal)])
                if stop:
                    raise Stopped(int(stop))
                if (progress := self.progress()) >= 1.0:
                    break
                ids, weights, state = next(batches)
                terms = self.train_step(ids, weights, progress)
                self.step, self.loader_state = self.step + 1, state
                first_bad = first_bad if math.isfinite(terms["ce"]) else min(first_bad, self.step)
                shown = self.step <= 10 or self.step == args.iterations or due(args.train_log_every)
                if shown or due(args.checkpoint_every):
                    self.refuse_non_finite(first_bad)
                if shown:
                    self.log_step(terms, time.perf_counter() - started, progress)
                if due(args.grad_report_every) and runtime.main:
                    self.grad_report(ids[0], weights[0])
                if due(args.checkpoint_every):
                    self.seconds = time.perf_counter() - started
                    self.save("last")
                if due(args.val_loss_every) and self.step < args.iterations:  # the end has its own
                    self.seconds = time.perf_counter() - started
                    self.validate(evaluator)
                    started = time.perf_counter() - self.seconds
        self.refuse_non_finite(first_bad)
        self.seconds, = runtime.from_main([time.perf_counter() - started])
        runtime.clocks["training"] = self.seconds

    def refuse_non_finite(self, first_bad: float) -> None:
        step = float(self.runtime.all_reduce(first_bad, np.min))
        if step <= self.step:
            raise self.not_finite(int(step), "the loss")

    def not_finite(self, step: int, what: str) -> UserError:
        last = run_folder(self.args) / "last.safetensors"
        good = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint"
        return UserError(f"step {step}: {what} is not finite; {good}")

    def timing(self, seconds: float) -> str:
        return f"train_time:{1e3 * seconds:.0f}ms step_avg:{1e3 * seconds / max(self.step, 1):.2f}ms"

    def log_step(self, terms: dict[str, float], seconds: float, progress: float) -> None:
        names = sorted(terms)
        sums = self.runtime.all_reduce([terms[name] for name in names]).tolist()
        means = {name: total / (self.plan.rows // self.plan.group) for name, total in zip(names, sums)}
        loss = means.pop("ce") / (self.plan.group * self.args.train_seq_len)
        extra = {"draft": means.pop("draft")} if self.model.draft is not None else {}
        extra |= self.model.aux.report(means) if self.model.aux is not None else {}
        self.log(f"step:{self.step}/{self.args.iterations} train_loss:{loss:.4f} {self.timing(seconds)}"
                 + "".join(f" {name}:{value:.5f}" for name, value in extra.items()))
        self.log.metrics(step=self.step, train_loss=loss, train_seconds=seconds, progress=progress,
                         rate=rate_at(progress, self.args), **extra,
                         peak_mem_mb=self.runtime.peak_memory_mb(since_last=True))

    def validate(self, evaluator: Evaluator) -> None:
        """Scores the raw weights; the best so far are kept in `best.safetensors`."""
        with self.runtime.clock("validation"):
            result = evaluator.run("raw", self.model, self.args.eval_seq_len, self.args.eval_seq_len)
        self.log_validation(result)
        if result["val_bpb"] < self.best:
            self.best = result["val_bpb"]
            self.save("best")

    def log_validation(self, result: dict) -> None:
        self.log(f"step:{self.step}/{self.args.iterations} val_loss:{result['val_loss']:.4f} "
                 f"val_bpb:{result['val_bpb']:.4f} {self.timing(self.seconds)}")
        self.log.metrics(step=self.step, val_loss=result["val_loss"], val_bpb=result["val_bpb"])

    def grad_report(self, ids: Tensor, weights: Tensor) -> None:
        """Logs the gradient norm that each loss term, at weight 1, sends into each module (a micro-batch)."""
        aux = self.model.aux
        aux_inputs = aux.inputs(self.step) if aux is not None else None
        params, sums = self.model.named_parameters(), self.model.losses(ids, weights, aux_inputs)
        for term in sums:
            share = 1 / len(ids) / (self.args.train_seq_len if term == "ce" else 1)
            _, grads = training_gradients(self.model, params, {term: share}, ids, weights, aux_inputs)
            squares: dict[str, float] = {}
            for name, grad in grads.items():
                parts = [part for part in name.split(".") if not part.isdigit()]
                module = ".".join(parts[:2] if parts[0] in ("blocks", "aux") else parts[:1])
                squares[module] = squares.get(module, 0.0) + grad.square().sum().item()
            if any(squares.values()):  # some terms are there to be looked at
                self.log(f"grad_report step:{self.step} {term} "
                         + " ".join(f"{module}:{square ** 0.5:.3e}" for module, square in squares.items()))

    CHECKPOINTED = ("step", "seconds", "best", "loader_state", "loss_scale", "good_steps")

    def save(self, name: str) -> None:
        """Weights, average, optimizers, loader position and clock: one safetensors file, atomically, under
        the trunk's names. Every draw has the step or the place in its key: `rng.cpu` is there for torch."""
        tensors = {f"model.{key}": p for key, p in self.model.named_parameters().items()}
        if self.ema is not None:
            tensors |= {f"ema.{key}": p for key, p in self.ema.average.items()}
        tensors = {key: np.array(value) for key, value in {**tensors, **self.optimizers.state()}.items()}
        tensors["rng.cpu"] = torch_rng_state(self.args.seed)
        for key, value in tensors.items():  # a loss is that of the weights before its step: look at these too
            if not np.isfinite(value).all():
                raise self.not_finite(self.step, key)
        if self.runtime.main:
            meta = {key: getattr(self, key) for key in self.CHECKPOINTED} | {"config": self.args.shipped()}
            blob = safetensors_bytes(tensors, {"golf": json.dumps(meta)})
            write_atomic(run_folder(self.args) / f"{name}.safetensors", blob)

    def restore(self, path: Path) -> None:
        """Goes on from a checkpoint, of the trunk too."""
        try:
            with safe_open(path, "np") as file:
                meta = json.loads((file.metadata() or {})["golf"])
                state = {key: mx.array(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"RESUME={path}: not a checkpoint of this script ({error})") from None
        for key, value in self.args.shipped().items():
            if meta["config"].get(key) != value:
                raise UserError(f"RESUME={path}: made with {key}={meta['config'].get(key)}, not {value}")
        if self.ema is not None and not any(key.startswith("ema.") for key in state):
            raise UserError(f"RESUME={path}: made with EMA_ENABLED=0, this run has 1")
        names = list(self.model.named_parameters())
        update_parameters(self.model, {name: state[f"model.{name}"] for name in names})
        if self.ema is not None:
            self.ema.average = {name: state[f"ema.{name}"] for name in names}
        self.optimizers.load_state(state)
        for key in self.CHECKPOINTED:
            setattr(self, key, meta[key])
        self.log(f"resume:{path} step:{self.step} train_time:{1e3 * self.seconds:.0f}ms")


def run_folder(args: Hyperparameters) -> Path:
    return Path(args.runs_path) / args.run_id


def git_commit() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).resolve().parent, timeout=10,
                              capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def log_header(log: Log, args: Hyperparameters, runtime: Runtime, fingerprint: dict) -> None:
    """Source, versions, settings and data: the log alone says what ran."""
    log(Path(__file__).read_text(encoding="utf-8") + "=" * 100, console=False)
    versions = f"python:{platform.python_version()} mlx:{mx.__version__} numpy:{np.__version__}"
    warnings = [f"warning: {warning}" for warning in args.warnings]
    for line in [*warnings, f"{versions} commit:{git_commit()}", *runtime.notes]:
        log(line)
    log("settings " + json.dumps(args.settings()), console=False)
    log("data " + json.dumps(fingerprint))


def train(args: Hyperparameters, data: Dataset, runtime: Runtime, log: Log, evaluator: Evaluator) -> dict:
    """Training, the scores of raw and averaged weights, the artifact; returns what `metrics.json` says."""
    trainer = Trainer(args, data, runtime, log)
    params = sum(p.size for p in trainer.model.named_parameters().values())
    log(f"model_params:{params} world_size:{runtime.world_size} micro_steps:{trainer.plan.micro_steps} "
        f"micro_batch_rows:{trainer.plan.groups * trainer.plan.group} seed:{args.seed}")
    plan, code = size_plan(trainer.model, args), len(Path(__file__).read_bytes())
    log(f"size_plan:{sum(plan.values())} + code:{code} of {args.artifact_budget_bytes} bytes: "
        + " ".join(f"{kind}:{size}" for kind, size in plan.items()))
    with runtime.clock("warm-up"):
        trainer.warm_up()
    evaluator.logits, evaluator.gradients = trainer.logits, trainer.gradients
    last = run_folder(args) / "last.safetensors"
    if args.resume and (args.resume != "auto" or last.exists()):
        trainer.restore(last if args.resume == "auto" else Path(args.resume))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: setattr(trainer, "signal", received))
    try:
        trainer.run(evaluator)
    except Stopped as stopped:
        trainer.save("last")
        log(f"stopped by {signal.Signals(stopped.args[0]).name} at step {trainer.step}; {last} is written, "
            f"RUN_ID={args.run_id} RESUME=auto goes on from there")
        raise
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    trainer.set_rounding(False)
    with runtime.clock("validation"):
        trainer.log_validation(evaluator.report("final_raw", trainer.model))
        trainer.save("final")
    if trainer.ema is not None:
        trainer.ema.apply()
        with runtime.clock("validation"):
            evaluator.report("final_ema", trainer.model)
    with runtime.clock("calibration"):
        hessians = trainer.calibrate() if args.quant_round == "gptq" else {}
    with runtime.clock("compression"):
        tensors = {name: np.array(p) for name, p in trainer.model.exported().items()}
        artifact = run_folder(args) / "artifact.bin"
        if runtime.main:
            write_atomic(artifact, pack(tensors, args, hessians))
        runtime.all_reduce(0)  # the others wait for the file
    shipped = sum(map(np.size, tensors.values()))
    log(f"artifact:{artifact} bytes:{artifact.stat().st_size} parameters:{shipped}")
    return {"artifact": str(artifact), "params": params, "params_shipped": shipped, "steps": trainer.step,
            "train_seconds": trainer.seconds, "ms_per_step": 1e3 * trainer.seconds / max(trainer.step, 1)}


def score_artifact(path: str, args: Hyperparameters, runtime: Runtime, evaluator: Evaluator) -> None:
    """Reloads the artifact into a new model and prints the final lines, non-overlapping and sliding."""
    model = load(path, runtime.device, args, runtime.dtype, runtime.attention)
    label = f"final_int{args.bits_by_class['mlp']}"
    evaluator.report(f"{label}_roundtrip", model)
    evaluator.report(f"{label}_sliding", model, args.eval_stride)
    if args.ttt != "0":
        evaluator.report(f"{label}_ttt" + "_off" * (not args.ttt_adapt), model, args.eval_stride, learn=True)


def finish(args: Hyperparameters, runtime: Runtime, log: Log, evaluator: Evaluator, summary: dict) -> int:
    """Checks the budgets, writes `metrics.json`, prints the closing block; returns the exit code."""
    headline, code = list(evaluator.results)[-1], len(Path(__file__).read_bytes())
    total = code + os.path.getsize(summary["artifact"])
    seconds = {"train_seconds": 0.0, "eval_seconds": runtime.clocks["evaluation"]} | summary
    limits = [("ARTIFACT_BUDGET_BYTES", args.artifact_budget_bytes, total),
              ("MAX_WALLCLOCK_SECONDS", args.max_wallclock_seconds, seconds["train_seconds"]),
              ("EVAL_BUDGET_SECONDS", args.eval_budget_seconds, seconds["eval_seconds"])]
    broken = [f"{name}={limit} is broken: {value:.3f}" for name, limit, value in limits if 0 < limit < value]
    metrics = {
        "val_bpb": evaluator.results[headline]["val_bpb"], "headline": headline, "bytes_code": code,
        "bytes_model": total - code, "bytes_total": total, **seconds, "peak_mem_mb": runtime.peak_memory_mb(),
        "seed": args.seed, "script_sha256": sha256_file(Path(__file__)), "git_commit": git_commit(),
        "device": runtime.device_name(), "world_size": runtime.world_size, "mlx": mx.__version__,
        "clocks": runtime.clocks, "broken_budgets": broken, "evals": evaluator.results,
        "settings": args.settings()}
    write_atomic(log.folder / "metrics.json", json.dumps(metrics, indent=1).encode())
    shown = [f"{key}: {value}" for key, value in metrics.items() if not isinstance(value, (dict, list))]
    for line in shown + [f"budget: {line}" for line in broken]:
        log(line)
    return 3 if broken else 0


def main() -> int:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(Hyperparameters.help())
        return 0
    runtime = None
    try:
        if sys.argv[1:]:
            raise UserError(f"{sys.argv[1]!r}: settings are environment variables, `--help` lists them")
        args = Hyperparameters(os.environ)
        if args.eval_only or args.generate:
            header, _ = unpack(read_file(args.artifact, "ARTIFACT"), args.artifact)
            args = shipped_settings(header, args.artifact, os.environ)
        runtime = Runtime(args)
        if args.generate:
            return generate(args, runtime)
        started, = runtime.from_main([time.time()])
        args.run_id = args.run_id or time.strftime(f"%Y%m%d-%H%M%S-seed{args.seed}", time.localtime(started))
        data = Dataset(args, verify=runtime.main)
        log = Log(run_folder(args) if runtime.main else None)
        fingerprint = data.fingerprint()
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
        if runtime is None or runtime.main:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        return 128 + stopped.args[0]


if __name__ == "__main__":
    sys.exit(main())
