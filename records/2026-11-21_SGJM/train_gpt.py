"""SGJM: a byte model with heads that draft blocks of bytes, foresee where they end, and judge them.

Parent: the trunk (`train_gpt.py` of the repository).
Idea:   beside a causal transformer, or a hybrid with Mamba-2 blocks, three small heads are trained on its
        states: a drafter of the next BLOCK_SIZE bytes, a judge that foresees the state behind them, a
        verifier that says whether the backbone would accept a draft. By default they leave the backbone as
        it is, bit for bit. The Speculative Graph JEPA Model, with what its audit found wrong mended.

Run:    python train_gpt.py --help                               every variable, its default and its reason
        SIZE=25m-hybrid python train_gpt.py                      another size; any of its fields can be set
        ARCH=baseline python train_gpt.py                        no heads, BASELINE_LAYERS blocks
        TRAIN_SEQ_LEN=512 TRAIN_BATCH_TOKENS=393216 torchrun --standalone --nproc_per_node=8 train_gpt.py
                                                                 the contest: 8xH100, 600 s, 16,000,000 bytes
        EVAL_ONLY=1 ARTIFACT=FILE python train_gpt.py            score an artifact and nothing else
        GENERATE='def ' ARTIFACT=FILE python train_gpt.py        go on with a text; GENERATE_BENCH=1: how fast
        EVAL_GATE=1 SGJM=FILE BASELINE=FILE python train_gpt.py  are the heads worth having? gate.json

The file reads downwards: environment -> batches -> losses -> weights -> artifact -> bits. It needs torch,
numpy and safetensors; constriction and FlashAttention are used if installed.
The trunk's n-gram tables, chunk JEPA, U-Net skips, gates, document masks, SentencePiece and test-time
training are not here.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import hashlib
import importlib
import json
import lzma
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # later, its defaults would keep the group: threads that outlive Python abort
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

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


# The published sizes, field by field; the variable of a field's name overrides it.
SIZED = ("model_dim", "num_layers", "num_heads", "ff_dim", "max_seq_len", "block_size", "drafter_layers",
         "drafter_dim", "drafter_heads", "drafter_ff_dim", "judge_hidden", "verifier_hidden",
         "baseline_layers", "attn_every_n", "mamba_state", "train_seq_len", "train_batch_tokens")
SIZES = {
    "smoke": (64, 2, 2, 128, 64, 2, 1, 32, 2, 64, 64, 64, 3, 1, 64, 32, 128),
    "25m": (384, 10, 6, 1536, 512, 4, 2, 192, 4, 768, 512, 256, 11, 1, 64, 256, 4096),
    "100m": (768, 9, 12, 3072, 1024, 4, 2, 384, 6, 1536, 1024, 512, 10, 1, 64, 512, 2048),
    "250m": (1024, 14, 16, 4096, 1024, 4, 2, 512, 8, 2048, 2048, 1024, 18, 1, 64, 512, 2048),
    "1b": (2048, 20, 16, 8192, 4096, 2, 3, 768, 12, 3072, 4096, 2048, 26, 1, 64, 2048, 2048),
    "25m-hybrid": (384, 10, 6, 1536, 512, 4, 2, 192, 4, 768, 512, 256, 11, 8, 64, 256, 4096),
    "250m-hybrid": (1024, 14, 16, 4096, 1024, 4, 2, 512, 8, 2048, 2048, 1024, 18, 8, 128, 512, 2048),
}
ROW_GROUP = 4  # rows that lend each other negatives, where the batch divides by it; on any number of ranks


class Hyperparameters:
    """Every setting of a run, read from the environment once; nothing below this class reads it again."""

    _data = "Data"
    data_path = Var("./data/datasets/fineweb10B_byte260", "folder of *_train_*.bin and *_val_*.bin shards")
    vocab_size = Var(260, "260 = PAD BOS EOS UNK + 256 bytes; 256 = bytes alone", ship="model")
    train_seq_len = Var(0, "tokens a training row; 0 = of SIZE", low=0, ship="model")
    train_batch_tokens = Var(0, "tokens an optimizer step, over all ranks; 0 = of SIZE, in whole rows", low=0)
    device_batch_tokens = Var(49152, "tokens a forward on one device: the one out-of-memory knob", low=1)
    train_order = Var("sequential", "order of rows within an epoch", choices=("sequential", "shuffled"))
    verify_data = Var("auto", "check shards by manifest.json; auto: up to 2 GB", choices=("auto", "0", "1"))
    _model = "Model; 0 = of SIZE"
    size = Var("25m", "which published size", choices=tuple(SIZES), ship="model")
    arch = Var("sgjm", "baseline: no heads, BASELINE_LAYERS blocks", choices=("sgjm", "baseline"),
               ship="model")
    num_layers = Var(0, "blocks of the backbone", low=0, ship="model")
    baseline_layers = Var(0, "its blocks with ARCH=baseline", low=0, ship="model")
    model_dim = Var(0, "width of the residual stream", low=0, ship="model")
    num_heads = Var(0, "attention heads, each with its own keys and values", low=0, ship="model")
    ff_dim = Var(0, "inner width of SwiGLU", low=0, ship="model")
    positions = Var("learned", "learned: a table, as published; rope: rotated queries and keys",
                    choices=("learned", "rope"), ship="model")
    max_seq_len = Var(0, "rows of the table of learned positions", low=0, ship="model")
    rope_base = Var(10000.0, "rotary base", low=1.0, ship="model")
    rope_dims = Var(0, "rotated dimensions a head; 0 = all (#315)", low=0, ship="model")
    init_std = Var(0.02, "std of matrices and embeddings at init", low=0.0)
    attn_every_n = Var(0, "every nth block attends, others are Mamba-2; 1 = all attend", low=0, ship="model")
    mamba_state = Var(0, "Mamba-2: numbers that each channel remembers", low=0, ship="model")
    mamba_expand = Var(2, "Mamba-2: inner width / model width", low=1, ship="model")
    mamba_d_conv = Var(4, "Mamba-2: taps of the convolution", low=2, ship="model")
    mamba_head_dim = Var(64, "Mamba-2: channels that share a decay", low=1, ship="model")
    mamba_chunk_size = Var(64, "Mamba-2: positions of a chunk, for speed alone", low=1, ship="model")
    _heads = "Drafter, judge and verifier; 0 = of SIZE"
    block_size = Var(0, "bytes a draft", low=0, ship="model")
    drafter_layers = Var(0, "blocks of the drafter", low=0, ship="model")
    drafter_dim = Var(0, "its width", low=0, ship="model")
    drafter_heads = Var(0, "its attention heads", low=0, ship="model")
    drafter_ff_dim = Var(0, "inner width of its SwiGLU", low=0, ship="model")
    judge_hidden = Var(0, "hidden width of the judge", low=0, ship="model")
    verifier_hidden = Var(0, "hidden width of the verifier", low=0, ship="model")
    token_weight = Var(1.0, "weight of the backbone's CE", low=0.0)
    drafter_weight = Var(0.5, "weight of the drafter's CE", low=0.0)
    jepa_weight = Var(0.25, "weight of the errors of judge and endpoint latent", low=0.0)
    verifier_weight = Var(0.1, "weight of the verifier's loss", low=0.0)
    heads_grad = Var(False, "the heads' losses reach the backbone, as published")
    head_positions = Var(64, "positions a row at which heads are trained; 0 = all, as published", low=0)
    export_heads = Var(False, "the heads stay in the artifact", ship="model")
    _optimizers = "Optimizers and schedule"
    iterations = Var(9000, "optimizer steps at most", low=1)
    max_wallclock_seconds = Var(600.0, "training time; 0 = no limit; progress = max(step, time)", low=0.0)
    warmdown_iters = Var(3000, "steps (as a share of ITERATIONS) over which the rate falls", low=0)
    min_lr = Var(0.0, "rate at the end, as a share of the peak", low=0.0, high=1.0)
    warmup_steps = Var(2, "throw-away steps that compile every shape, outside the clock", low=0)
    matrix_lr = Var(0.025, "Muon: matrices of blocks and heads", low=0.0)
    muon_momentum = Var(0.99, "final momentum", low=0.0, high=0.9999)
    muon_momentum_warmup_start = Var(0.92, "momentum at step 0", low=0.0, high=0.9999)
    muon_momentum_warmup_steps = Var(1500, "steps from start to final momentum", low=0)
    muon_backend_steps = Var(5, "Newton-Schulz steps", low=1)
    muon_wd = Var(0.04, "decoupled weight decay of Muon, times its rate", low=0.0)
    tied_embed_lr = Var(0.015, "AdamW: embeddings of bytes, positions and slots", low=0.0)
    scalar_lr = Var(0.01, "AdamW: norms, biases, convolutions, decays", low=0.0)
    adam_wd = Var(0.04, "decoupled weight decay of the embeddings", low=0.0)
    beta1 = Var(0.9, "Adam", low=0.0, high=0.9999)
    beta2 = Var(0.95, "Adam", low=0.0, high=0.99999)
    adam_eps = Var(1e-8, "Adam", low=0.0)
    grad_clip_norm = Var(0.3, "gradient norm after reduction, backbone and heads apart; 0 = no clip", low=0.0)
    ema_enabled = Var(True, "score and export an average of the weights")
    ema_decay = Var(0.997, "decay a step, reached as (1 + t) / (10 + t)", low=0.0, high=0.99999)
    seed = Var(1337, "weights, shuffling and positions of the heads", low=0)
    _artifact = "Artifact"
    bits = Var("embed:8,attn:7,mlp:7,ssm:7,heads:7,other:7", "bit width by tensor class")
    quant_k = Var("embed:8,attn:10,mlp:10,ssm:10,heads:10,other:10", "k by tensor class: the size knob")
    quant_round = Var("gptq", "gptq: by the inputs' second moments", choices=("nearest", "gptq"))
    gptq_batches = Var(4, "training batches behind them, on the training clock", low=1)
    compressor = Var("auto", "auto keeps the smallest", choices=("auto", "rans", "lzma"))
    artifact_budget_bytes = Var(16_000_000, "code + model, decimal bytes; 0 = no limit", low=0)
    _evaluation = "Evaluation"
    eval_seq_len = Var(0, "window length; 0 = TRAIN_SEQ_LEN", low=0, ship="eval")
    eval_stride = Var(0, "targets scored a window in the sliding pass; 0 = a quarter", low=0, ship="eval")
    eval_batch_tokens = Var(0, "tokens a scoring forward; 0 = DEVICE_BATCH_TOKENS", low=0)
    val_bytes = Var(0, "score only this prefix of the validation text; 0 = all", low=0)
    val_loss_every = Var(0, "validation of the raw weights every so many steps; 0 = at the end only", low=0)
    eval_budget_seconds = Var(600.0, "final scoring of the artifact; 0 = no limit", low=0.0)
    eval_only = Var(False, "score ARTIFACT and nothing else")
    artifact = Var("", "path for EVAL_ONLY and GENERATE; for the latter a checkpoint, too")
    eval_gate = Var(False, "judge SGJM against BASELINE and nothing else: gate.json, exit code 0 or 1")
    sgjm = Var("", "a checkpoint, or an artifact with heads")
    baseline = Var("", "the same of ARCH=baseline, with as many parameters and steps")
    gate_bench = Var("", "bench.json of GENERATE_BENCH; empty = the speed-up is not measured")
    gate_batches = Var(32, "batches of TRAIN_BATCH_TOKENS that it looks at", low=1)
    gate_radius = Var(6, "bits of 64 in which signatures of merged states may differ", low=0, high=64)
    _generation = "Generation"
    generate = Var("", "a text, or its file, to go on from, with the model in ARTIFACT")
    generate_bench = Var(False, "speed with and without drafts: bench.json; GENERATE: also a folder, JSON")
    bench_repeats = Var(3, "its runs of each kind, in turn", low=1)
    max_new_tokens = Var(256, "bytes to write", low=1)
    temperature = Var(0.0, "0 = greedy", low=0.0)
    speculate = Var(True, "read drafts too: the same text at temperature 0, above it the same distribution")
    drafter = Var("both", "suffix: what followed a like text before", choices=("heads", "suffix", "both"))
    draft_branches = Var(4, "blocks that the heads draft", low=1, high=64)
    draft_budget = Var(16, "drafted bytes a pass; a hybrid reads a chain of them", low=1, high=63)
    draft_byte_cost = Var(0.1, "time of one more byte in a pass / of a plain step; less on GPUs", low=0.0)
    draft_cost = Var(0.0, "time of a draft / of a pass; 0 = measured: SEED may not repeat a text", low=0.0)
    keep_top_k = Var(4, "drafts read in a pass", low=1)
    judge_weight = Var(1.0, "of the judge's score beside log-probabilities, where drafts are ranked", low=0.0)
    merge_radius = Var(4, "bits of 64 in which drafts may differ of which one is read", low=0, high=64)
    _run = "Run"
    run_id = Var("", "folder under RUNS_PATH; empty = time and seed")
    runs_path = Var("./runs", "where runs are kept")
    resume = Var("", "auto, or a checkpoint file")
    checkpoint_every = Var(0, "steps between checkpoints; 0 = only on a signal", low=0)
    train_log_every = Var(200, "steps between log lines; the first ten are always shown", low=1)
    device = Var("auto", "ROCm counts as cuda", choices=("auto", "cpu", "cuda", "mps"))
    dtype = Var("auto", "of activations; weights stay fp32", choices=("auto", "fp32", "bf16"))
    compile = Var("auto", "auto: on GPUs, and on CPUs when it pays", choices=("auto", "0", "1"))
    attention = Var("auto", "first rung", choices=("auto", "fa3", "fa2", "cpu", "sdpa", "math"))
    strict_env = Var(True, "refuse variables that look misspelt; 0 = only warn")
    _launcher = "Set by the launcher (torchrun)"
    rank = Var(0, "rank of this process", low=0)
    local_rank = Var(0, "rank on this machine", low=0)
    world_size = Var(1, "processes", low=1)
    master_addr = Var("", "rendezvous host")
    master_port = Var("", "rendezvous port")

    # Published variables of ideas that are gone: {name: (values that mean off, reason)}; () = ignored.
    RETIRED = {
        **dict.fromkeys(("SWA_ENABLED", "MTP_NUM_HEADS", "QAT_ENABLED", "LATE_QAT", "JEPA_CHUNK_SIZE",
                         "NGRAM_ORDERS", "BIGRAM_VOCAB_SIZE", "DOC_MASK", "TTT"), (("0",), "not here")),
        "TRAIN_ALIGN": (("stream",), "rows are cut from the stream"),
        "TOKENIZER_PATH": (("",), "this model reads bytes"),
        "VAL_BATCH_SIZE": ((), "EVAL_BATCH_TOKENS took its place and does not change the score"),
        "CONTROL_TENSOR_NAME_PATTERNS": ((), "tensors are sorted by shape and module, not by name patterns"),
    }

    def __init__(self, environ: dict[str, str] | None = None, shipped: dict | None = None):
        """Reads `environ`. `shipped`, the settings in an artifact, replaces the defaults of what it names."""
        environ = {name: text for name, text in (environ or {}).items()
                   if name.lower() not in SIZED or text.strip() != "0"}
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
        for name, number in zip(SIZED, SIZES[self.size]):
            setattr(self, name, getattr(self, name) or number)
        rows = max(1, self.train_batch_tokens // self.train_seq_len)
        self.row_group = math.gcd(rows, ROW_GROUP)
        if not environ.get("TRAIN_BATCH_TOKENS"):
            self.train_batch_tokens = rows * self.train_seq_len
        self.bits_by_class = self._parse_classes("bits", int, 2, 8)
        self.k_by_class = self._parse_classes("quant_k", float, 0.1, 1000)
        self.eval_seq_len = self.eval_seq_len or self.train_seq_len
        self.eval_stride = self.eval_stride or max(1, self.eval_seq_len // 4)
        self.eval_batch_tokens = self.eval_batch_tokens or self.device_batch_tokens
        others = self.eval_only, self.eval_gate, self.generate_bench, self.generate
        if shipped or not any(others):  # else the file's settings are still to come
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
        spare = trains and self.train_batch_tokens % self.train_seq_len
        learned = self.positions == "learned"
        calibrates = self.quant_round == "gptq" and self.max_wallclock_seconds and not self.eval_only
        inner = self.mamba_expand * self.model_dim
        problems = [
            (self.vocab_size not in (256, 260), "vocab_size", "data_path", "accepted are 260 and 256"),
            (self.model_dim % self.num_heads, "model_dim", "num_heads", "no whole width for a head"),
            (self.drafter_dim % self.drafter_heads, "drafter_dim", "drafter_heads", "no width for a head"),
            (not learned and head_dim % 2, "model_dim", "num_heads",
             f"head width {head_dim} is odd, rotary needs pairs"),
            (rope % 2 or rope > head_dim, "rope_dims", "num_heads", f"odd or wider than a head, {head_dim}"),
            (self.attn_every_n > 1 and inner % self.mamba_head_dim, "model_dim", "mamba_head_dim",
             f"of {inner} channels no whole heads"),
            (learned and self.train_seq_len > self.max_seq_len, "train_seq_len", "max_seq_len",
             "the table of positions is shorter"),
            (learned and self.eval_seq_len > self.train_seq_len, "eval_seq_len", "train_seq_len",
             "POSITIONS=learned has no position that was not trained; POSITIONS=rope does"),
            (self.train_seq_len < self.block_size + 2, "train_seq_len", "block_size", "no room for a draft"),
            (spare, "train_batch_tokens", "train_seq_len", "the batch is not a whole number of rows"),
            (self.eval_stride > self.eval_seq_len, "eval_stride", "eval_seq_len", "the stride skips targets"),
            (self.rank >= self.world_size, "rank", "world_size", "a rank is below the number of processes"),
            (calibrates and not self.warmup_steps, "warmup_steps", "quant_round", "calibration is untimed"),
            (self.eval_only and not self.artifact, "eval_only", "artifact", "which artifact?"),
            (self.eval_gate and self.world_size > 1, "eval_gate", "world_size", "one process judges"),
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


def tune_allocator() -> None:
    """Keeps freed pages inside the process: fresh ones dominate eager CPU runs on some machines (up to 7x).
    On glibc: no mmap for large blocks, no trimming, one arena that all threads share. Elsewhere: nothing."""
    mmap_max, trim_threshold, top_pad, arena_max = -4, -1, -2, -8  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        if platform.libc_ver()[0] == "glibc":
            for parameter, value in ((mmap_max, 0), (trim_threshold, -1), (top_pad, 1 << 28), (arena_max, 1)):
                ctypes.CDLL("libc.so.6").mallopt(parameter, value)


class Runtime:
    """Device, dtype, ranks and attention backend: what the machine offers, decided once."""

    def __init__(self, args: Hyperparameters):
        self.rank, self.world_size, self.main = args.rank, args.world_size, args.rank == 0
        self.clocks: dict[str, float] = {}  # seconds by phase
        self.notes: list[str] = []
        self.device = self._pick_device(args)
        self.dtype = self._pick_dtype(args)
        self.compile = self._pick_compile(args)
        head_dim = args.model_dim // args.num_heads
        self.attention = pick_attention(args.attention, self.device, self.dtype, head_dim)
        self.notes.append(f"attention:{self.attention} compile:{int(self.compile)} "
                          f"dtype:{str(self.dtype).removeprefix('torch.')} device:{self.device_name()}")
        if not constriction and args.compressor in ("auto", "rans"):
            self.notes.append("compressor: constriction is missing, LZMA instead of rANS")
        if self.device.type == "cpu":
            tune_allocator()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            if not args.master_addr:
                raise UserError(f"WORLD_SIZE={self.world_size} without MASTER_ADDR: launch with torchrun")
            self.gloo = not (self.device.type == "cuda" and dist.is_nccl_available())
            dist.init_process_group("gloo" if self.gloo else "cpu:gloo,cuda:nccl")

    def _pick_device(self, args: Hyperparameters) -> torch.device:
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        seen = [kind for kind in there if there[kind]]
        name = seen[0] if args.device == "auto" else args.device
        if not there[name]:
            raise UserError(f"DEVICE={name} is not there: torch {torch.__version__} sees {', '.join(seen)}")
        if name == "cuda" and args.local_rank >= torch.cuda.device_count():
            raise UserError(f"LOCAL_RANK={args.local_rank}, but torch sees {torch.cuda.device_count()} GPUs")
        return torch.device(name, args.local_rank if name == "cuda" else None)

    def _pick_dtype(self, args: Hyperparameters) -> torch.dtype:
        if args.dtype != "auto":
            return {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
        if self.device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        with contextlib.suppress(OSError):  # CPUs that multiply bf16 natively: AMX, AVX512-BF16, Arm BF16
            native = {"amx_bf16", "avx512_bf16", "bf16"} & set(Path("/proc/cpuinfo").read_text().split())
            return torch.bfloat16 if native and self.device.type == "cpu" else torch.float32
        return torch.float32

    def _pick_compile(self, args: Hyperparameters) -> bool:
        if args.compile != "auto":
            return args.compile == "1"
        if self.device.type == "cuda":
            with contextlib.suppress(ImportError):
                import triton  # noqa: F401
                return True
            self.notes.append("compile: no triton, running eager")
        # on CPUs 20-80 s of compilation against about 0.3 s a step saved on a small model
        pays = self.device.type == "cpu" and args.iterations >= 275 and not args.eval_only
        return pays and any(map(shutil.which, ("g++", "clang++")))

    @contextlib.contextmanager
    def clock(self, phase: str):
        """Adds what the block takes to a phase; nothing is on two clocks at once."""
        start = time.perf_counter()
        yield
        self.clocks[phase] = self.clocks.get(phase, 0.0) + time.perf_counter() - start

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"

    def all_reduce(self, tensor: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
        """In place, over ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op)
        return tensor

    def from_main(self, values: list[float]) -> list[float]:
        """Rank 0's numbers on every rank, through CPU memory: decisions never wait for a GPU queue."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.broadcast(tensor, 0)
        return tensor.tolist()

    def peak_memory_mb(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        unit = 2**20 if platform.system() == "Darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def causal_mask(docs: Tensor, queries: int) -> Tensor:
    """docs (B, T), the document of each position -> (B, 1, queries, T): what the last `queries` see."""
    at = torch.arange(docs.size(1), device=docs.device)
    return (docs[:, None, -queries:, None] == docs[:, None, None]) & (at[-queries:, None] >= at)


def math_attention(q: Tensor, k: Tensor, v: Tensor, where: Tensor | None = None) -> Tensor:
    """Causal attention spelt out: q (B, T, H, d), k, v (B, T, K, d) -> (B, T, H, d); where: causal_mask."""
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).float() * q.size(-1) ** -0.5
    if where is None:
        where = causal_mask(torch.zeros(q.shape[:2], device=q.device), q.size(1))
    weights = scores.masked_fill(~where, -torch.inf).softmax(-1).to(v.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, where: Tensor | None = None) -> Tensor:
    """The same through torch's fused kernels. With a mask, q may be the last positions of k and v alone;
    without one, a shorter q sees all of them."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal = where is None and q.size(2) == k.size(2)
    y = F.scaled_dot_product_attention(q, k, v, where, is_causal=causal, enable_gqa=True)
    return y.transpose(1, 2)


QUERY_BLOCK = 128  # queries that the CPU's attention takes at a time
KEPT_LENGTH = 1024  # longest row whose attention weights are kept for the backward: they grow with its square


def query_blocks(x: Tensor, groups: int) -> list[Tensor]:
    """x (B, H, T, n) -> for each block of queries (B * groups, H / groups * queries, n)."""
    return [part.reshape(len(x) * groups, -1, x.size(3)) for part in x.split(QUERY_BLOCK, 2)]


class BlockedAttention(torch.autograd.Function):
    """Causal attention for CPUs: blocks of queries meet the keys up to their own end. The weights are kept in
    the input's dtype, so that the backward computes no score and no exponential again: for rows of some
    hundred ids both ways are faster than torch's flash kernel, whose backward recomputes."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, T, d), k and v (B, K, T, d) -> (B, H, T, d)"""
        (batch, heads, length, dim), kv = q.shape, k.size(1)
        keys, values, out, kept = k.flatten(0, 1), v.flatten(0, 1), [], []
        at = torch.arange(length, device=q.device)
        for i, query in enumerate(query_blocks(q * dim**-0.5, kv)):
            stop = min((i + 1) * QUERY_BLOCK, length)
            ahead = (at[:stop] > at[i * QUERY_BLOCK : stop, None]).repeat(heads // kv, 1)
            scores = torch.bmm(query, keys[:, :stop].mT).float().masked_fill(ahead, -torch.inf)
            kept.append(scores.softmax(-1).to(q.dtype))
            out.append(torch.bmm(kept[i], values[:, :stop]).view(batch, heads, -1, dim))
        out = torch.cat(out, 2)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, *kept = ctx.saved_tensors
        (batch, heads, _, dim), kv, scale = q.shape, k.size(1), q.size(3) ** -0.5
        keys, values, grad_q = k.flatten(0, 1), v.flatten(0, 1), []
        grad_k, grad_v = torch.zeros_like(keys).float(), torch.zeros_like(values).float()
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)
        blocks = (query_blocks(x, kv) for x in (q * scale, grad, delta))
        for query, above, shift, weights in zip(*blocks, kept):
            stop = weights.size(2)
            scores = torch.bmm(above, values[:, :stop].mT).float() - shift
            scores = (weights.float() * scores).to(q.dtype)
            grad_q.append(torch.bmm(scores, keys[:, :stop]).view(batch, heads, -1, dim) * scale)
            grad_k[:, :stop] += torch.bmm(scores.mT, query)
            grad_v[:, :stop] += torch.bmm(weights.mT, above)
        return torch.cat(grad_q, 2), grad_k.to(q.dtype).view(k.shape), grad_v.to(q.dtype).view(v.shape)


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, where: Tensor | None = None) -> Tensor:
    """The CPU's rung: blocks of queries, weights kept; torch's kernel for long rows and masks."""
    if where is not None or q.size(1) > KEPT_LENGTH:
        return sdpa_attention(q, k, v, where)
    return BlockedAttention.apply(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flash_attention(package: str):
    """FlashAttention 2 or 3."""
    def attend(q: Tensor, k: Tensor, v: Tensor, where: None = None) -> Tensor:
        out = importlib.import_module(package).flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    return attend


ATTENTION = {"fa3": flash_attention("flash_attn_interface"), "fa2": flash_attention("flash_attn"),
             "cpu": cpu_attention, "sdpa": sdpa_attention, "math": math_attention}


def pick_attention(wanted: str, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """The first rung, from `wanted` down, that runs forward and backward here and agrees with `math`."""
    ladder = list(ATTENTION)[0 if wanted == "auto" else list(ATTENTION).index(wanted) :]
    gpu, half = device.type == "cuda", dtype == torch.bfloat16
    fits = {"fa3": gpu and half, "fa2": gpu and half, "cpu": device.type == "cpu" and half, "sdpa": True,
            "math": True}
    for name in filter(fits.get, ladder):
        with contextlib.suppress(Exception):  # a missing package, a card that it refuses, an old signature
            generator = torch.Generator().manual_seed(0)
            q, k = (torch.randn(1, 128, n, dim, generator=generator).to(device, dtype) for n in (2, 1))
            q.requires_grad_(True)
            out = ATTENTION[name](q, k, k)
            out.sum().backward()
            if torch.allclose(out.float(), math_attention(q, k, k).float(), atol=3e-2):
                return name
    raise UserError(f"ATTENTION={wanted}: no rung of {ladder} runs on {device} in {dtype}")


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


# -----------------------------------------------------------------------------
# DATA
# -----------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
PAD_ID, BOS_ID, BYTE_OFFSET, SHARD_VOCAB = 0, 1, 4, 260
BYTE_CLASSES = ("lower", "upper", "digit", "space", "newline", "punctuation", "non-ascii", "special")


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
        self.train_shards = [self._open(path, 1 << 20) for path in self.train_files]
        self.val = np.concatenate([self._open(path) for path in self.val_files])
        if verify:
            self._verify(args.verify_data)
        if len(self.val) < 2:
            raise UserError(f"{self.val_files[0]}: {len(self.val)} ids leave no validation target")

    def _open(self, path: Path, checked: int | None = None) -> np.ndarray:
        """A byte260 shard; with VOCAB_SIZE=256 its bytes alone."""
        ids = open_shard(path, SHARD_VOCAB, checked)
        return ids if self.vocab_size == SHARD_VOCAB else ids[ids >= BYTE_OFFSET] - BYTE_OFFSET

    def _read_manifest(self) -> dict:
        path = self.path / "manifest.json"
        if not path.exists():
            return {}
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            shards = {str(entry["file"]): str(entry["sha256"]) for entry in manifest["shards"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a manifest of data/prepare.py ({error!r})") from None
        if manifest.get("vocab_size", SHARD_VOCAB) != SHARD_VOCAB:
            raise UserError(f"{path}: of {manifest['vocab_size']} ids, where byte260 has {SHARD_VOCAB}")
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
        documents = int((self.val == BOS_ID).sum()) if self.vocab_size == SHARD_VOCAB else None
        names = "source", "source_notes", "variant", "documents", "bytes", "overlap"
        known = {key: self.manifest.get(key) for key in names}
        return {"name": self.path.name, **known, "train_shards": len(self.train_files),
                "val_shards": len(self.val_files), "train_tokens": sum(map(len, self.train_shards)),
                "val_tokens": len(self.val), "val_documents": documents,
                "sha256": digest.hexdigest()}


def sha256_file(path: Path) -> str:
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()  # mapped: shards may be large


def byte_tables(args: Hyperparameters) -> np.ndarray:
    """Bytes that each id stands for (V,): one, and none for the special ids of byte260."""
    return (np.arange(args.vocab_size) >= args.vocab_size - 256).astype(np.int64)


def target_bytes(ids: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Bytes of each target ids[1:], an int64 array of len(ids) - 1."""
    return tables[ids[1:]]


def class_table(vocab_size: int) -> np.ndarray:
    """Class of each id, an index into BYTE_CLASSES, for the bits-by-class report."""
    def name_of(byte: int) -> str:
        text = chr(byte)
        tests = {"non-ascii": byte > 127, "newline": text in "\r\n", "space": text.isspace(),
                 "digit": text.isdigit(), "lower": text.islower(), "upper": text.isupper()}
        return next((name for name, found in tests.items() if found), "punctuation")
    names = ["special"] * (vocab_size - 256) + [name_of(byte) for byte in range(256)]
    return np.array([BYTE_CLASSES.index(name) for name in names])


class BatchPlan(namedtuple("BatchPlan", "rows group groups micro_steps world_size")):
    """How a global batch of `rows` rows is spread: micro-steps x ranks x `groups` groups of `group` rows.
    Every rank runs the same shapes: slots beyond the batch repeat its first group with weight 0."""

    @classmethod
    def make(cls, args: Hyperparameters, world_size: int) -> BatchPlan:
        group = args.row_group
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
        """Where the rows of a shard begin."""
        if self._starts[0] == (epoch, index):
            return self._starts[1]
        last = len(self.data.train_shards[index]) - self.length - 1  # a row needs one id more for its targets
        starts = np.arange(0, last + 1, self.length)
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

    def next(self) -> tuple[Tensor, Tensor, dict]:
        """This rank's part: ids (micro_steps, rows, T + 1), weights (micro_steps, rows), state after it."""
        plan, rows = self.plan, self._next_rows(self.plan.rows)
        batch = np.empty((plan.micro_steps, plan.groups * plan.group, self.length + 1), np.int64)
        weights = np.empty(batch.shape[:2], np.float32)
        for micro in range(plan.micro_steps):
            numbers, weights[micro] = plan.slots(micro, self.rank)
            for slot, number in enumerate(numbers):
                index, start = rows[number]
                batch[micro, slot] = self.data.train_shards[index][start : start + self.length + 1]
        check_ids(batch, self.data.vocab_size, self.data.path)
        return torch.from_numpy(batch), torch.from_numpy(weights), dict(self.state)

    def prefetch(self, device: torch.device):
        """Iterates over `next()` from a thread, two batches ahead, in pinned memory on GPUs."""
        def work() -> tuple[Tensor, Tensor, dict]:
            *tensors, state = self.next()
            return *(x.pin_memory() if device.type == "cuda" else x for x in tensors), state
        with ThreadPoolExecutor(1) as thread:
            ahead = deque(thread.submit(work) for _ in range(2))
            while True:
                ids, weights, state = ahead.popleft().result()
                ahead.append(thread.submit(work))
                yield ids.to(device, non_blocking=True), weights.to(device, non_blocking=True), state


# -----------------------------------------------------------------------------
# QUANTISER
# -----------------------------------------------------------------------------

TENSOR_CLASSES = ("embed", "attn", "mlp", "ssm", "heads", "other")
SMALL_TENSOR = 4096  # elements; below it a tensor stays fp16
SCALE_FLOOR = 2.0**-20  # rows of zeros need a step; no other is this small


def tensor_class(name: str) -> str:
    if name.startswith(("tok_emb", "pos_emb", "aux.")):
        return "heads" if name.startswith("aux.") else "embed"
    kinds = {"attn": ".attn.", "mlp": ".mlp.", "ssm": "_proj."}
    return next((kind for kind, part in kinds.items() if part in name), "other")


def quant_plan(name: str, shape, args: Hyperparameters) -> tuple[int, int]:
    """(bits, axis of a step's slice: the last); (0, 0): stays fp16."""
    if len(shape) < 2 or math.prod(shape) < SMALL_TENSOR:
        return 0, 0
    return args.bits_by_class[tensor_class(name)], len(shape) - 1


def nearest(x: np.ndarray, top: int) -> np.ndarray:
    return np.clip(np.rint(x), -top, top)


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


def quantise(weight: np.ndarray, bits: int, k: float, axis: int,
             hessian: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rounds to integers of `bits` bits with one fp16 step for each slice along `axis`: q * step ~ weight.

    step = k * std / top, top = 2^(bits-1) - 1 (SDClip, #1394); a Gaussian then costs about
    log2(top / k) + 2.05 bits a weight, so k sets the size. Steps have an epsilon floor.
    Rounding: by `gptq` with a hessian (C, C), else to the nearest.
    Returns q, int8 of weight's shape, and step, fp16 with size 1 on `axis`. NumPy: backends pack alike."""
    top = 2 ** (bits - 1) - 1
    weight = np.asarray(weight, dtype=np.float32)
    step = k / top * weight.std(axis=axis, keepdims=True, dtype=np.float64)
    step = np.maximum(step, SCALE_FLOOR).astype(np.float16).astype(np.float32)
    x = weight / step
    q = gptq(x, hessian, top) if hessian is not None else nearest(x, top)
    return q.astype(np.int8), step.astype(np.float16)


# -----------------------------------------------------------------------------
# AUXILIARY OBJECTIVES
# -----------------------------------------------------------------------------


class LatentMLP(nn.Module):
    """W2 gelu(W1 x + b1) + b2: the judge and the verifier."""

    def __init__(self, dim_in: int, hidden: int, dim_out: int):
        super().__init__()
        self.fc1, self.bias1 = CastedLinear(dim_in, hidden), nn.Parameter(torch.zeros(hidden))
        self.fc2, self.bias2 = CastedLinear(hidden, dim_out), nn.Parameter(torch.zeros(dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x) + self.bias1.to(x.dtype))) + self.bias2.to(x.dtype)


class SlotCache:
    """Keys and values of a drafter's slots, those of all branches."""

    def __init__(self):
        self.layers, self.length = {}, 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds those of new slots (N, n, H, d); returns those of all."""
        if layer in self.layers:
            k, v = (torch.cat(pair, 1) for pair in zip(self.layers[layer], (k, v)))
        self.layers[layer], self.length = (k, v), k.size(1)
        return k, v


class Drafter(nn.Module):
    """Drafts BLOCK_SIZE bytes behind a state of the backbone, and the latent of where they end.

    A causal stack over b + 1 slots: slot 0 holds u + Q_0, slot i holds u + Q_i + E(d_i), u = W_in parent.
    Slots 0 ... b - 1 give the logits of d_1 ... d_b, through E again, slot b the endpoint latent. The
    published one has no E: its slots do not know what was drafted before them, so that blocks are incoherent,
    and all branches of a state end in the same latent."""

    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.size, dim = args.block_size, args.drafter_dim
        self.enter = CastedLinear(args.model_dim, dim)
        self.slot_emb = nn.Parameter(torch.empty(self.size + 1, dim))
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        self.blocks = nn.ModuleList(Block(dim, args.drafter_heads, args.drafter_ff_dim, i, "math")
                                    for i in range(args.drafter_layers))
        self.norm = RMSNorm(dim)
        self.latent = CastedLinear(dim, args.model_dim)

    def slots(self, parents: Tensor, tokens: Tensor, past: SlotCache | None = None) -> Tensor:
        """parents (N, D), tokens (N, n) drafted so far -> states of slots 0 ... n (N, n + 1, e). If `past`
        knows slots, tokens are those behind them, and n slots come back."""
        given, known = F.embedding(tokens, self.tok_emb.weight), past.length if past else 0
        if known == 0:
            given = F.pad(given, (0, 0, 1, 0))
        at = self.slot_emb[known : known + given.size(1)]
        x = self.enter(parents)[:, None] + (at + given).to(parents.dtype)
        where = None if past else causal_mask(tokens.new_zeros(1, x.size(1)), x.size(1))
        for block in self.blocks:
            x = block(x, None, where, past)
        return self.norm(x)

    def head(self, x: Tensor) -> Tensor:
        return F.linear(x, self.tok_emb.weight.to(x.dtype)).float()

    @torch.no_grad()
    def draft(self, parents: Tensor, branches: int, temperature: float = 0.0,
              generator: torch.Generator | None = None,
              given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """parents (N, D) -> k branches of each: tokens (N, k, b), log-probabilities of every slot at this
        temperature (at 1 if it is 0) (N, k, b, V), endpoint latents (N, k, D).
        All branches begin with `given` (N, n < b) where it is known. The bytes behind it differ: the k most
        likely at temperature 0, else drawn in turn without replacement. Later bytes are the most likely ones,
        or drawn."""
        tokens = parents.new_empty(len(parents), 0, dtype=torch.long) if given is None else given
        heat, first, past = temperature or 1.0, tokens.size(1), SlotCache()
        x = self.slots(parents, tokens, past)
        logits = self.head(x)  # (N, then N * k, slots so far, V)
        for i in range(first, self.size):
            keys, count = logits[:, -1] / heat, branches if i == first else 1
            if temperature:  # the largest of logits + Gumbel noise are a sample without replacement
                keys = keys - torch.empty_like(keys).exponential_(generator=generator).log()
            chosen = keys.topk(count).indices.view(-1, 1)
            if i == first:
                past.layers = {layer: tuple(x.repeat_interleave(count, 0) for x in pair)
                               for layer, pair in past.layers.items()}
                parents, tokens, logits = (x.repeat_interleave(count, 0) for x in (parents, tokens, logits))
            tokens, x = torch.cat((tokens, chosen), 1), self.slots(parents, chosen, past)
            logits = torch.cat((logits, self.head(x)), 1)
        found = tokens, (logits[:, :-1] / heat).log_softmax(-1), self.latent(x[:, -1])
        return tuple(part.unflatten(0, (-1, branches)) for part in found)


def accepted(tokens: Tensor, text: Tensor, best: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What greedy verification says of drafts, as far as one forward over the text can tell.

    tokens (..., k, b) drafted, text (..., b) the true bytes, best (..., b) the backbone's choice at each of
    them -> three of (..., k): 1 where all b are accepted; 1 where that is known; how many are known to be.
    What the backbone would choose behind a draft is known while the draft is the text: one that it accepts
    although the text goes on otherwise has an unknown end."""
    text, best = text.unsqueeze(-2), best.unsqueeze(-2)
    told = F.pad((tokens == text).long().cumprod(-1)[..., :-1], (1, 0), value=1).bool()
    agrees = told & (tokens == best)
    whole = agrees.all(-1)
    known = whole | (told & ~agrees).any(-1)
    return whole.float(), known.float(), agrees.long().cumprod(-1).sum(-1).float()


class SpeculativeHeads(nn.Module):
    """Drafter, judge and verifier, trained on states of the backbone beside it.

    The interface that a record replaces, and nothing else of the script:
      inputs(step, device)    what a step's losses need from outside the graph, equal on all ranks
      forward(..., inputs)    {name: (groups,) loss}
      weights(progress)       {name: weight of that term beside CE}
      report(means)           what the step line says about the mean terms
      exported()              prefixes of the parameters that the artifact keeps

    With parent p = h[t], text d = ids[t + 1 ... t + b] and future f = stop-gradient h[t + b], the state that
    has read all of d (published: one byte less):
      drafter   CE of d, each slot given the bytes before it
      jepa      (|judge(p) - f|^2 + |endpoint latent(p, d) - f|^2) / 2, means over channels
      verifier  BCE of verifier(p, latent). The drafter's two best branches at t are labelled by whether the
                backbone accepts them, and left out where that is unknown (`accepted`): what it rejects is a
                negative. With equal weight, negatives by kind: the state of another time, and that of
                another row, never p itself, never f
    HEADS_GRAD=0 stops all of them at h; 1, as published, lets them shape the backbone (and collapse its
    states: `latent_var` shows it)."""

    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.args, dim = args, args.model_dim
        self.drafter = Drafter(args)
        self.judge = LatentMLP(dim, args.judge_hidden, dim)
        self.verifier = LatentMLP(2 * dim, args.verifier_hidden, 1)

    def inputs(self, step: int, device: torch.device) -> Tensor | None:
        """(2, K) from seed and step alone: the positions at which heads are trained, and for each that of a
        state before, inside or behind its draft: not its own, not the draft's end."""
        args, size, length = self.args, self.args.block_size, self.args.train_seq_len
        if not any(self.weights(0.0).values()):
            return None
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        room = length - size
        at = torch.randperm(room, generator=generator)[: args.head_positions or room].sort().values
        other = at[:, None] + torch.tensor(sorted({-1, size - 1, size + 1, 3 * size} - {0, size}))
        chance = torch.rand(other.shape, generator=generator)
        best = chance.masked_fill((other < 0) | (other >= length), -1.0).argmax(1, keepdim=True)
        return torch.stack((at, other.gather(1, best)[:, 0])).to(device)

    def verdict(self, parent: Tensor, latent: Tensor) -> Tensor:
        """parent and latent (..., D) -> logits (...) that the backbone accepts the draft that ends there."""
        pair = torch.cat((parent.expand_as(latent), latent), -1)
        return self.verifier(pair).squeeze(-1).float()

    def forward(self, hidden: Tensor, best: Tensor, ids: Tensor, inputs: Tensor) -> dict[str, Tensor]:
        """hidden (B, T, D), best (B, T) the backbone's choices, ids (B, T + 1) -> terms per group of rows."""
        args, (at, other), group = self.args, inputs, self.args.row_group
        states, near = hidden.detach(), at[:, None] + torch.arange(args.block_size, device=at.device)
        parent = (hidden if args.heads_grad else states)[:, at]  # (B, K, D)
        text = ids[:, near + 1]  # (B, K, b)
        future = states[:, at + args.block_size]

        def mean(x: Tensor) -> Tensor:
            return x.float().reshape(len(ids) // group, -1).mean(1)
        slots = self.drafter.slots(parent.flatten(0, 1), text.flatten(0, 1)).unflatten(0, text.shape[:2])
        logits = self.drafter.head(slots[:, :, :-1])  # (B, K, b, V)
        nats = F.cross_entropy(logits.flatten(0, 2), text.flatten(), reduction="none").view(text.shape)
        judge, endpoint = (mean((guess.float() - future.float()).square())
                           for guess in (self.judge(parent), self.drafter.latent(slots[:, :, -1])))
        spread = future.float().reshape(len(judge), -1, future.size(-1)).var(1, correction=0).mean(-1)

        drafts = self.drafter.draft(parent.detach().flatten(0, 1), 2)
        tokens, _, latents = (part.unflatten(0, text.shape[:2]) for part in drafts)
        whole, known, taken = accepted(tokens, text, best[:, near])  # (B, K, 2)
        real = self.verdict(parent[:, :, None], latents)
        strange = [states[:, other]]
        if group > 1:  # the same times of the next row
            strange.append(future.unflatten(0, (-1, group)).roll(1, 1).flatten(0, 1))
        fake = F.softplus(torch.stack([self.verdict(parent, latent) for latent in strange], 1))
        wrong = known * F.binary_cross_entropy_with_logits(real, whole, reduction="none")
        wrong = mean(wrong) / mean(known).clamp(min=1e-6)
        terms = {"drafter": mean(nats), "jepa": (judge + endpoint) / 2, "verifier": (wrong + mean(fake)) / 2}
        shown = {"first": mean(nats[..., 0]), "last": mean(nats[..., -1]), "judge": judge,
                 "endpoint": endpoint, "spread": spread, "known": mean(known), "whole": mean(whole),
                 "right": mean(known * ((real > 0) == whole.bool())), "greedy_known": mean(known[..., 0]),
                 "greedy_whole": mean(whole[..., 0]), "greedy_bytes": mean(taken[..., 0])}
        return terms | {name: value.detach() for name, value in shown.items()}

    def weights(self, progress: float) -> dict[str, float]:
        args = self.args
        return {"drafter": args.drafter_weight, "jepa": args.jepa_weight, "verifier": args.verifier_weight}

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """drafter_*: nats a byte, of all slots, the first, the last; *_r2 of judge and endpoint latent, and
        latent_var, the variance of what they foresee; verifier_acc on labelled drafts and verifier_base, that
        of the better constant answer; of greedy drafts draft_accepted, the accepted share of those whose end
        is known, draft_unknown, the share of the others, draft_bytes, accepted bytes, as far as known."""
        if not means:
            return {}
        known, variance = max(means["known"], 1e-9), max(means["spread"], 1e-12)
        base = means["whole"] / known
        return {"drafter_loss": means["drafter"], "drafter_first": means["first"],
                "drafter_last": means["last"], "judge_mse": means["judge"],
                "judge_r2": 1 - means["judge"] / variance, "endpoint_r2": 1 - means["endpoint"] / variance,
                "latent_var": means["spread"],
                "verifier_loss": means["verifier"], "verifier_acc": means["right"] / known,
                "verifier_base": max(base, 1 - base), "draft_bytes": means["greedy_bytes"],
                "draft_accepted": means["greedy_whole"] / max(means["greedy_known"], 1e-9),
                "draft_unknown": 1 - means["greedy_known"]}

    def exported(self) -> tuple[str, ...]:
        return ("",) if self.args.export_heads else ()


# -----------------------------------------------------------------------------
# MODEL
# -----------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6), times a learned gain a channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-6)


class CastedLinear(nn.Linear):
    """fp32 weight, multiplied in the dtype of the input; no bias."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__(dim_in, dim_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rotary_tables(length: int, args: Hyperparameters) -> Tensor:
    """cos and sin of positions below `length`: (2, T, 1, r / 2), r the rotated dimensions, fp32, never cast:
    bf16 positions are wrong beyond 256 (defect G1 of #832). Windows longer than TRAIN_SEQ_LEN grow the base
    by (length / train_seq_len)^(r / (r - 2)) (NTK scaling)."""
    dims = args.rope_dims or args.model_dim // args.num_heads
    base = args.rope_base
    if length > args.train_seq_len and dims > 2:
        base *= (length / args.train_seq_len) ** (dims / (dims - 2))
    frequency = base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angles = torch.arange(length, dtype=torch.float64)[:, None, None] * frequency
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Half-split rotary on the first dimensions of x (B, T, H, d); rotary as of `rotary_tables`."""
    (cos, sin), half = rotary, rotary.size(-1)
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat(((a * cos + b * sin).to(x.dtype), (b * cos - a * sin).to(x.dtype), rest), -1)


class CausalSelfAttention(nn.Module):
    """Each head has keys and values of its own. `layer` counts the attention of a stack, for its cache."""

    def __init__(self, dim: int, heads: int, layer: int, attention: str):
        super().__init__()
        self.layer, self.head_dim = layer, dim // heads
        self.c_q = CastedLinear(dim, dim)
        self.c_k = CastedLinear(dim, dim)
        self.c_v = CastedLinear(dim, dim)
        self.proj = CastedLinear(dim, dim)
        self.attend = ATTENTION[attention]

    def forward(self, x: Tensor, rotary: Tensor | None, where=None, past: KVCache | None = None) -> Tensor:
        layers = self.c_q, self.c_k, self.c_v  # one wide product, but for few ids, where to copy is as slow
        parts = [layer(x) for layer in layers] if past else F.linear(
            x, torch.cat([layer.weight for layer in layers]).to(x.dtype)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # (B, T, H, d)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        y = sdpa_attention(q, *past.extend(self.layer, k, v), where) if past else self.attend(q, k, v, where)
        return self.proj(y.flatten(2))


class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = CastedLinear(dim, hidden)
        self.up = CastedLinear(dim, hidden)
        self.proj = CastedLinear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, layer: int, attention: str):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(dim), CausalSelfAttention(dim, heads, layer, attention)
        self.mlp_norm, self.mlp = RMSNorm(dim), MLP(dim, hidden)

    def forward(self, x: Tensor, rotary: Tensor | None, where=None, past: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rotary, where, past)
        return x + self.mlp(self.mlp_norm(x))


def ssd_steps(x: Tensor, dt: Tensor, rate: Tensor, write: Tensor, read: Tensor,
              state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The recurrence itself: S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t, from `state` on.

    x (B, T, H, P), dt (B, T, H), A = rate (H,) < 0, B and C = write and read (B, T, N), state (B, H, P, N),
    all fp32 -> y (B, T, H, P), and the states before the first position and after each."""
    fall = (dt * rate).exp()[..., None, None]
    new = torch.einsum("bth,bthp,btn->bthpn", dt, x, write)
    states = [state]
    for t in range(x.size(1)):
        states.append(torch.addcmul(new[:, t], fall[:, t], states[-1]))
    return torch.einsum("bthpn,btn->bthp", torch.stack(states[1:], 1), read), states


def ssd(x: Tensor, dt: Tensor, rate: Tensor, write: Tensor, read: Tensor, state: Tensor,
        size: int) -> tuple[Tensor, Tensor]:
    """`ssd_steps` in chunks of `size` positions, all at once (Dao & Gu 2024, section 6) -> y, the last state.

    With c_t the sum of log decays from a chunk's start to t, y_t = exp(c_t) S C_t + sum_{s<=t}
    exp(c_t - c_s) (C_t . B_s) dt_s x_s, where S, the state before the chunk, sums over the chunks before."""
    length = x.size(1)
    x, dt, write, read = (F.pad(part, (0, 0) * (part.ndim - 2) + (0, -length % size)).unflatten(1, (-1, size))
                          for part in (dt[..., None] * x, dt, write, read))  # (B, C, L, ...); dt 0: no step
    x, log = x.transpose(2, 3), (dt * rate).transpose(2, 3).cumsum(-1)  # (B, C, H, L, P) and (B, C, H, L)
    ends = F.pad(log[..., -1].cumsum(1), (0, 0, 1, 0)).mT  # (B, H, C + 1)

    def decay(sums: Tensor) -> Tensor:
        """(..., n) -> (..., n, n): exp(sums_t - sums_s) for s <= t, else 0."""
        past = torch.ones(2 * sums.shape[-1:], dtype=torch.bool, device=sums.device).tril()
        return (sums[..., None] - sums[..., None, :]).masked_fill(~past, -torch.inf).exp()
    left = (log[..., -1:] - log).exp()[..., None] * x  # what is left of each input at its chunk's end
    sums = torch.cat((state[:, None], torch.einsum("bchlp,bcln->bchpn", left, write)), 1)
    states = torch.einsum("bhzc,bchpn->bzhpn", decay(ends), sums)  # before each chunk, and behind the last
    y = ((read @ write.mT)[:, :, None] * decay(log)) @ x
    y = y + log.exp()[..., None] * torch.einsum("bcln,bchpn->bchlp", read, states[:, :-1])
    return y.transpose(2, 3).flatten(1, 2)[:, :length], states[:, -1]


class MambaBlock(nn.Module):
    """A whole block of Mamba-2: (z, x, B, C, dt) = W_in RMSNorm(u); x, B and C through a causal convolution
    and silu; the recurrence of `ssd_steps` and a skip D x; u + W_out RMSNorm(y silu(z)).

    dt = softplus(. + bias) starts log-uniform in [1e-3, 0.1], A in -[1, 16], as Mamba-2 has it. The published
    variant convolves x alone, adds x B^T without dt and decays it at once, S_t = a (S_{t-1} + x B^T), has no
    norm before W_out, and begins with dt = ln 2, A = -1 ... -H: its head h keeps 2^-h of the current input,
    so that most heads are all but dead and the others remember a few bytes."""

    def __init__(self, args: Hyperparameters, layer: int):
        super().__init__()
        inner, state, taps = args.mamba_expand * args.model_dim, args.mamba_state, args.mamba_d_conv
        self.layer, self.taps, self.chunk = layer, taps, args.mamba_chunk_size
        self.heads, self.widths = inner // args.mamba_head_dim, [inner, inner + 2 * state]
        self.state_shape = self.heads, args.mamba_head_dim, state
        self.norm = RMSNorm(args.model_dim)
        self.in_proj = CastedLinear(args.model_dim, sum(self.widths) + self.heads)
        self.conv_weight = nn.Parameter(torch.empty(self.widths[1], taps))
        self.conv_bias = nn.Parameter(torch.zeros(self.widths[1]))
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.ones(self.heads)) for _ in range(3))
        self.out_norm = RMSNorm(inner)
        self.out_proj = CastedLinear(inner, args.model_dim)

    def forward(self, x: Tensor, rotary: Tensor | None, where=None, past: KVCache | None = None) -> Tensor:
        z, mixed, dt = self.in_proj(self.norm(x)).split([*self.widths, self.heads], -1)
        tail, state = past.resume(self.layer) if past else self.start(len(x), x)
        mixed = torch.cat((tail, mixed.mT), 2)  # (B, I + 2N, taps - 1 + T)
        weight, bias = self.conv_weight[:, None].to(x.dtype), self.conv_bias.to(x.dtype)
        seen = F.silu(F.conv1d(mixed, weight, bias, groups=len(weight))).mT.float()
        inner, *sides = seen.split([self.widths[0], *[self.state_shape[2]] * 2], -1)
        inner = inner.unflatten(-1, self.state_shape[:2])  # (B, T, H, P)
        parts = inner, F.softplus(dt.float() + self.dt_bias), -self.A_log.exp(), *sides, state
        if past and x.size(1) <= past.KEPT:
            y, states = ssd_steps(*parts)
            past.keep(self.layer, mixed, states)
        else:
            y, state = ssd(*parts, min(self.chunk, x.size(1)))
            if past:
                past.keep(self.layer, mixed[..., -self.taps + 1 :], [state])
        y = (y + self.D[:, None] * inner).flatten(2).to(x.dtype)
        return x + self.out_proj(self.out_norm(y * F.silu(z)))

    def start(self, batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(inputs of the convolution before the first position, state), all 0."""
        tail = like.new_zeros(batch, self.widths[1], self.taps - 1)
        return tail, like.new_zeros(batch, *self.state_shape, dtype=torch.float32)


class KVCache:
    """What decoding goes on from: keys and values of a window's positions, states of its Mamba blocks.

    `rewind` takes positions back. Attention can forget any; a Mamba block only as far as it kept its states:
    each one of the last read, if that had KEPT positions at most, else the one behind it."""

    KEPT = 64

    def __init__(self, model: GPT):
        args, like = model.args, {"dtype": model.dtype, "device": model.tok_emb.weight.device}
        window = args.eval_seq_len, args.num_heads, args.model_dim // args.num_heads
        self.mambas = [block for block in model.blocks if isinstance(block, MambaBlock)]
        self.layers = torch.zeros(len(model.blocks) - len(self.mambas), 2, 1, *window, **like)
        self.rewind(0)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values of new positions (1, n, K, d); returns those of all."""
        stop = self.length + k.size(1)
        self.layers[layer, :, :, self.length : stop] = torch.stack((k, v))
        return self.layers[layer, :, :, :stop].unbind()

    def resume(self, layer: int) -> tuple[Tensor, Tensor]:
        """Inputs of a Mamba block's convolution and its state, both behind the last position."""
        mixed, states = self.tails[layer]
        return mixed[..., 1 - self.mambas[layer].taps :], states[-1]

    def keep(self, layer: int, mixed: Tensor, states: list[Tensor]) -> None:
        """mixed (1, C, taps - 1 + n), and n + 1 states, the first of them that after `first` positions."""
        self.tails[layer] = mixed, states

    def advance(self, count: int) -> None:
        """`count` positions have been read."""
        self.first = self.length if count <= self.KEPT else self.length + count
        self.length += count

    def gather(self, start: int, rows: list[int]) -> None:
        """Of what was read behind `start` positions keeps these rows alone: a path of a tree, in order."""
        if rows != list(range(len(rows))):
            kept = self.layers[:, :, :, [start + row for row in rows]]
            self.layers[:, :, :, start : start + len(rows)] = kept
        self.rewind(start + len(rows))

    def rewind(self, length: int) -> None:
        """Forgets what was read behind the first `length` positions: 0, or any from `first` on."""
        if length == 0:
            self.tails = [(tail, [state]) for tail, state in
                          (block.start(1, self.layers) for block in self.mambas)]
            self.first = self.length = 0
        elif not (self.first if self.mambas else 0) <= length <= self.length:
            raise ValueError(f"cannot go back to {length} of {self.length} positions, only to {self.first}")
        kept = length - self.first + 1
        self.tails = [(mixed[..., : block.taps - 2 + kept], states[:kept])
                      for block, (mixed, states) in zip(self.mambas, self.tails)]
        self.length = length


class GPT(nn.Module):
    """The network. `losses` gives every loss term of a batch in one forward, `logits` what scoring needs."""

    def __init__(self, args: Hyperparameters, attention: str = "sdpa", dtype: torch.dtype = torch.float32):
        super().__init__()
        self.args, self.dtype, dim = args, dtype, args.model_dim
        layers = args.num_layers if args.arch == "sgjm" else args.baseline_layers
        attends = [(i + 1) % args.attn_every_n == 0 for i in range(layers)]
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        self.pos_emb = nn.Embedding(args.max_seq_len, dim) if args.positions == "learned" else None
        self.blocks = nn.ModuleList(
            Block(dim, args.num_heads, args.ff_dim, sum(attends[:i]), attention) if attends[i]
            else MambaBlock(args, i - sum(attends[:i])) for i in range(layers))
        self.norm = RMSNorm(dim)
        self.aux = SpeculativeHeads(args) if args.arch == "sgjm" else None
        self.set_rotary()

    def set_rotary(self) -> None:
        """Tables for training and scoring windows, which may have different lengths; None if learned."""
        for use in ("train", "eval"):
            length = getattr(self.args, f"{use}_seq_len")
            tables = rotary_tables(length, self.args) if self.pos_emb is None else None
            self.register_buffer(f"rotary_{use}", tables, persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal matrices and embeddings, as published; Mamba's own tensors as in Mamba-2. The heads come
        last: the backbone is the same without them."""
        generator, std = torch.Generator().manual_seed(seed), self.args.init_std
        for name, p in self.named_parameters():
            kind = name.rpartition(".")[2]
            if kind == "A_log":
                p.uniform_(1, 16, generator=generator).log_()
            elif kind == "dt_bias":
                dt = p.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp()
                p.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            elif kind == "conv_weight":
                p.uniform_(-(p.size(1) ** -0.5), p.size(1) ** -0.5, generator=generator)
            elif p.ndim == 2:
                p.normal_(0, std, generator=generator)

    def hidden(self, ids: Tensor, rotary: Tensor | None, past: KVCache | None = None,
               tree: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """ids (B, T) -> normalised states (B, T, D). With `past`, ids (1, n) are those that follow it; with
        `tree`, of which each attention sees its own path alone: depths (n,) from 0, and sees (n, n)."""
        known, where = past.length if past else 0, None
        at = slice(known, known + ids.size(1)) if tree is None else known + tree[0]
        x = F.embedding(ids, self.tok_emb.weight)
        if self.pos_emb is not None:
            x = x + self.pos_emb.weight[at]
        if tree is not None:
            where = F.pad(tree[1], (known, 0), value=True)[None, None]
        elif past and ids.size(1) > 1:  # one that follows sees all
            where = causal_mask(ids.new_zeros(1, at.stop), ids.size(1))
        x, rotary = x.to(self.dtype), None if rotary is None else rotary[:, at]
        for block in self.blocks:
            x = block(x, rotary, where, past)
        if past:
            past.advance(ids.size(1))
        return self.norm(x)

    def exported(self) -> dict[str, nn.Parameter]:
        """Parameters that scoring needs, by name; what only training uses never reaches an artifact."""
        kept = () if self.aux is None else tuple(f"aux.{prefix}" for prefix in self.aux.exported())
        return {n: p for n, p in self.named_parameters() if not n.startswith("aux.") or n.startswith(kept)}

    def head(self, x: Tensor) -> Tensor:
        """States -> logits in fp32."""
        return F.linear(x, self.tok_emb.weight.to(x.dtype)).float()

    def losses(self, ids: Tensor, weights: Tensor, aux_inputs: Tensor | None) -> dict[str, Tensor]:
        """ids (B, T + 1), weights (B,) -> weighted sums: "ce", nats over all targets, and auxiliary terms."""
        x = self.hidden(ids[:, :-1], self.rotary_train)
        logits = self.head(x)
        nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        sums = {"ce": (nats.view(len(ids), -1).sum(1) * weights).sum()}
        terms = {} if aux_inputs is None else self.aux(x, logits.detach().argmax(-1), ids, aux_inputs)
        for name, value in terms.items():  # one value a group; the weights inside a group are equal
            sums[name] = (value * weights.view(len(value), -1).mean(1)).sum()
        return sums

    def logits(self, ids: Tensor, take: Tensor, span: int) -> Tensor:
        """fp32 logits (B, span, V) of positions take[b] ... take[b] + span - 1 in row b of ids (B, T)."""
        x = self.hidden(ids, self.rotary_eval)
        where = take[:, None] + torch.arange(span, device=ids.device)
        return self.head(x.gather(1, where[..., None].expand(-1, -1, x.size(-1))).float())


# Functions of the class, so that every model (trained, averaged, reloaded) shares one compiled graph.
training_losses, scoring_logits = GPT.losses, GPT.logits


# -----------------------------------------------------------------------------
# OPTIMIZERS
# -----------------------------------------------------------------------------


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Each matrix of (n, r, c) becomes about U V^T of its SVD: the quintic iteration of Muon (K. Jordan)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


class Muon:
    """Momentum, then orthogonalisation: every update of a matrix has singular values near 1, times its rate.

    Matrices of equal shape form one stack; each rank owns a share of it, receives the share's summed gradient
    (reduce-scatter), orthogonalises it and sends it round (all-gather) while it works on the next stack.
    update = NS(g + mu m), m <- mu m + g; p <- (1 - rate wd) p - rate sqrt(max(1, r / c)) update."""

    def __init__(self, params: list[nn.Parameter], args: Hyperparameters, runtime: Runtime):
        self.args, self.runtime = args, runtime
        self.dtype = torch.bfloat16 if runtime.dtype == torch.bfloat16 else torch.float32
        stacks = [[p for p in params if p.shape == shape] for shape in dict.fromkeys(p.shape for p in params)]
        self.stacks = sorted(stacks, key=lambda members: -len(members) * members[0].numel())
        self.momenta = [torch.zeros(-(-len(members) // runtime.world_size), *members[0].shape,
                                    device=runtime.device) for members in self.stacks]

    def start_reduction(self) -> None:
        """Begins to sum the gradients over ranks."""
        self.shares, self.pending = [], []
        for members, momentum in zip(self.stacks, self.momenta):
            spare = len(momentum) * self.runtime.world_size - len(members)
            full = torch.stack(gradients(members) + [torch.zeros_like(members[0])] * spare)
            share = full.split(len(momentum))[self.runtime.rank]
            if self.runtime.world_size > 1 and self.runtime.gloo:  # which has no reduce-scatter
                self.pending.append(dist.all_reduce(full, async_op=True))
            elif self.runtime.world_size > 1:
                share = torch.empty_like(momentum)
                self.pending.append(dist.reduce_scatter_tensor(share, full, async_op=True))
            self.shares.append(share)

    def square_norm(self) -> Tensor:
        """Waits for the reduction; the squared norm of all gradients of this group."""
        for work in self.pending:
            work.wait()
        return self.runtime.all_reduce(torch.stack([share.square().sum() for share in self.shares]).sum())

    def step(self, rate: float, momentum: float, clip: Tensor) -> None:
        flying = []
        for members, buffer, share in zip(self.stacks, self.momenta, self.shares):
            share.mul_(clip)
            buffer.mul_(momentum).add_(share)
            mine = newton_schulz(share.add_(buffer, alpha=momentum), self.args.muon_backend_steps, self.dtype)
            flying.append((members, self._gather(mine)))
        for members, update in flying:
            factor = max(1.0, members[0].size(0) / members[0].size(1)) ** 0.5
            torch._foreach_mul_(members, 1 - rate * self.args.muon_wd)
            torch._foreach_add_(members, update()[: len(members)].unbind(), alpha=-rate * factor)

    def _gather(self, share: Tensor):
        """Starts to collect every rank's share of a stack; returns the function that waits for the stack."""
        if self.runtime.world_size == 1:
            return lambda: share
        full = share.new_empty(len(share) * self.runtime.world_size, *share.shape[1:])
        work = dist.all_gather_into_tensor(full, share.contiguous(), async_op=True)

        def whole() -> Tensor:
            work.wait()
            return full
        return whole

    def state(self) -> dict[str, Tensor]:
        """Momenta of all ranks, for a checkpoint that any number of ranks can read."""
        return {f"muon.{i}": self._gather(momentum)()[: len(members)]
                for i, (members, momentum) in enumerate(zip(self.stacks, self.momenta))}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for i, momentum in enumerate(self.momenta):
            mine = state[f"muon.{i}"][self.runtime.rank * len(momentum) :][: len(momentum)]
            momentum.zero_()[: len(mine)].copy_(mine)


def gradients(params: list[nn.Parameter]) -> list[Tensor]:
    """Gradients, zeros where a loss did not reach a parameter: ranks always exchange the same shapes."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]


class Optimizers:
    """Which parameter goes where, one step for all of them, and what a checkpoint needs of them.

    | kind   | parameters                                                 | method | rate          |
    |--------|------------------------------------------------------------|--------|---------------|
    | matrix | 2-D weights of blocks and heads                            | Muon   | MATRIX_LR     |
    | embed  | embeddings of bytes and positions; the drafter's own       | AdamW  | TIED_EMBED_LR |
    | scalar | norms, biases, convolutions, A_log, D                      | AdamW  | SCALAR_LR     |

    Backbone and heads are two parts, each with stacks and a gradient norm of its own: with HEADS_GRAD=0 the
    backbone's weights do not depend on whether there are heads. (Published: AdamW for all, one rate, betas
    0.9 and 0.95, weight decay 0.1 on every parameter, one gradient norm, of 1.)"""

    def __init__(self, model: GPT, args: Hyperparameters, runtime: Runtime):
        self.args, self.runtime, self.model = args, runtime, model
        parts: dict[bool, dict[str, list[nn.Parameter]]] = {}
        for name, p in model.named_parameters():
            kinds = parts.setdefault(name.startswith("aux."), {"matrix": [], "embed": [], "scalar": []})
            kinds[self.group_of(name, p)].append(p)
        self.muons = [Muon(kinds["matrix"], args, runtime) for kinds in parts.values()]
        self.muon = self.muons[0]
        rates = {"embed": args.tied_embed_lr, "scalar": args.scalar_lr}
        self.adam = torch.optim.AdamW(
            [{"params": kinds[key], "lr": rate, "peak": rate, "weight_decay": args.adam_wd * (key == "embed")}
             for kinds in parts.values() for key, rate in rates.items()],
            betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True)
        self.replicated = [kinds["embed"] + kinds["scalar"] for kinds in parts.values()]

    @staticmethod
    def group_of(name: str, p: nn.Parameter) -> str:
        if "_emb" in name:
            return "embed"
        return "matrix" if p.ndim == 2 and name.endswith(".weight") else "scalar"

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Sums all gradients over ranks; returns the norm of each part (before clipping)."""
        for muon in self.muons:
            muon.start_reduction()
        members = [p for part in self.replicated for p in part]
        for p, g in zip(members, gradients(members)):
            p.grad = g
        grads = [p.grad for p in members]
        if self.runtime.world_size > 1:
            flat = torch._utils._flatten_dense_tensors(grads)
            dist.all_reduce(flat)
            torch._foreach_copy_(grads, list(torch._utils._unflatten_dense_tensors(flat, grads)))
        rest = [torch.stack(torch._foreach_norm([p.grad for p in part])) for part in self.replicated]
        squares = [norms.square().sum() + muon.square_norm() for norms, muon in zip(rest, self.muons)]
        return torch.stack(squares).sqrt()

    @torch.no_grad()
    def step(self, step: int, progress: float, norm: Tensor) -> None:
        args, fall = self.args, rate_at(progress, self.args)
        warm = min(1.0, step / max(args.muon_momentum_warmup_steps, 1e-9))
        momentum = (1 - warm) * args.muon_momentum_warmup_start + warm * args.muon_momentum
        clips = ((args.grad_clip_norm or math.inf) / (norm + 1e-6)).clamp(max=1.0)
        for clip, part, muon in zip(clips, self.replicated, self.muons):
            torch._foreach_mul_([p.grad for p in part], clip)
            muon.step(args.matrix_lr * fall, momentum, clip)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * fall
        self.adam.step()

    def state(self) -> dict[str, Tensor]:
        """Every tensor of every optimizer, by name."""
        found = {f"part{i}.{key}": value for i, muon in enumerate(self.muons)
                 for key, value in muon.state().items()}
        for i, entry in self.adam.state_dict()["state"].items():
            found |= {f"adam.{i}.{key}": torch.as_tensor(value) for key, value in entry.items()}
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        for i, muon in enumerate(self.muons):
            muon.load_state({key.removeprefix(f"part{i}."): value for key, value in state.items()})
        adam = self.adam.state_dict() | {"state": {}}
        for name, value in state.items():
            if name.startswith("adam."):
                _, i, key = name.split(".")
                adam["state"].setdefault(int(i), {})[key] = value
        self.adam.load_state_dict(adam)


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
        self.decay, self.live = decay, list(model.parameters())
        self.average = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        torch._foreach_lerp_(self.average, self.live, 1.0 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def apply(self) -> None:
        """From here on the model holds the average."""
        torch._foreach_copy_(self.live, self.average)


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
                      lambda blob, _: lzma.decompress(blob))}
    return found | ({"rans": (rans_encode, rans_decode)} if constriction else {})


def size_plan(model: GPT, args: Hyperparameters) -> dict[str, int]:
    """Bytes of the artifact by tensor class, before training: with the entropy of a rounded normal."""
    plan = dict.fromkeys(TENSOR_CLASSES, 0)
    for name, p in model.exported().items():
        kind, (bits, axis) = tensor_class(name), quant_plan(name, p.shape, args)
        weight_bits = 16.0
        if bits:
            top = 2 ** (bits - 1) - 1
            at = [(i + 0.5) * args.k_by_class[kind] / top / math.sqrt(2) for i in range(-top, top)]
            shares = np.diff([0, *(0.5 + 0.5 * math.erf(x) for x in at), 1]) + 1e-30
            weight_bits = float(-(shares * np.log2(shares)).sum()) + 16 / p.shape[axis]
        plan[kind] += int(p.numel() * weight_bits / 8)
    return plan


def pack(tensors: dict[str, np.ndarray], args: Hyperparameters, hessians: dict | None = None) -> bytes:
    """Quantises and compresses: one self-describing file, no pickle.
    Tensors of at least 2 dimensions and SMALL_TENSOR elements become integers with a step a row, the rest
    fp16. Payload: all integers, then the fp16 numbers: all low bytes, all high bytes.
    `hessians` {name: (C, C)} of the matrices that GPTQ is to round."""
    entries, codes, halves = [], [], []
    for name, weight in tensors.items():
        kind, (bits, axis) = tensor_class(name), quant_plan(name, weight.shape, args)
        entries.append([name, list(weight.shape), bits, axis])
        if bits:
            q, weight = quantise(weight, bits, args.k_by_class[kind], axis, (hessians or {}).get(name))
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


def load(artifact_path: str | Path, device: str | torch.device = "cpu", args: Hyperparameters | None = None,
         dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> GPT:
    """The scoring model, from an artifact alone; `args` of the same model may change how it is scored."""
    header, tensors = unpack(read_file(artifact_path, "ARTIFACT"), str(artifact_path))
    args = args or shipped_settings(header, str(artifact_path))
    with torch.device("meta"):
        model = GPT(args, attention, dtype)
    wanted = {(name, tuple(p.shape)) for name, p in model.exported().items()}
    if odd := wanted ^ {(name, array.shape) for name, array in tensors.items()}:
        raise UserError(f"{artifact_path}: its tensors are not those of its config, first {min(odd)}")
    found = {name: torch.from_numpy(array) for name, array in tensors.items()}
    model.load_state_dict(found, strict=False, assign=True)
    if not args.export_heads:
        model.aux = None
    model.set_rotary()
    return model.to(device).eval()


def read_checkpoint(path: str | Path, what: str, parts: tuple[str, ...] = ("",)) -> tuple[dict, dict]:
    """(metadata, {name: tensor} of the names that begin with one of `parts`) of a checkpoint."""
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {})["golf"])
            names = [key for key in file.keys() if key.startswith(parts)]  # noqa: SIM118
            return meta, {key: file.get_tensor(key) for key in names}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{what}={path}: not a checkpoint of this script ({error})") from None


def settings_of(path: str | Path, environ: dict[str, str] | None = None,
                what: str = "ARTIFACT") -> Hyperparameters:
    """The settings in the artifact or checkpoint that `what` names, with what `environ` may change."""
    if not path:
        raise UserError(f"{what} is empty: a checkpoint or an artifact is needed")
    if Path(path).suffix == ".safetensors":
        return shipped_settings(read_checkpoint(path, what, ())[0], str(path), environ)
    return shipped_settings(unpack(read_file(path, what), str(path))[0], str(path), environ)


def open_model(path: str | Path, device: str | torch.device = "cpu",
               args: Hyperparameters | None = None) -> GPT:
    """The model in an artifact or a checkpoint (best, last, final.safetensors), in fp32, to be evaluated.

    Of a checkpoint: the average of the weights where it has one, as an artifact is made of it, and the heads,
    which an artifact has with EXPORT_HEADS=1 alone (`model.aux` is None where there are none)."""
    if Path(path).suffix != ".safetensors":
        return load(path, device, args)
    _, state = read_checkpoint(path, "checkpoint", ("model.", "ema."))
    kind = "ema." if any(key.startswith("ema.") for key in state) else "model."
    found = {key.removeprefix(kind): value for key, value in state.items() if key.startswith(kind)}
    with torch.device("meta"):
        model = GPT(args or settings_of(path))
    try:
        model.load_state_dict(found, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path}: its tensors are not those of its config ({error})") from None
    model.set_rotary()
    return model.to(device).eval()


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


@torch.no_grad()
def scored(model: GPT, ids: np.ndarray, length: int, stride: int, batch: int, logits=scoring_logits,
           share: tuple[int, int] = (0, 1)):
    """Yields (first, stop, fp32 log-probabilities (n, V), nats (n,)) for each block of stop - first targets.
    `share` = (rank, ranks) keeps a rank's part of the batches. The only path from weights to a score."""
    device = next(model.parameters()).device
    plan, span = windows(len(ids) - 1, length, stride), min(stride, length)
    for start_at in range(share[0] * batch, len(plan), share[1] * batch):
        rows = plan[start_at : start_at + batch]
        inputs = np.full((batch, length), PAD_ID, np.int64)  # one shape: compiled once
        wanted, take = np.zeros((batch, span), np.int64), np.zeros(batch, np.int64)
        for i, (start, first, stop) in enumerate(rows):
            text = ids[start : min(start + length, len(ids) - 1)]
            inputs[i, : len(text)] = text
            wanted[i, : stop - first] = ids[first + 1 : stop + 1]
            take[i] = first - start
        inputs, take, wanted = (torch.from_numpy(x).to(device) for x in (inputs, take, wanted))
        logprobs = logits(model, inputs, take, span).log_softmax(-1)
        nats = -logprobs.gather(-1, wanted[..., None]).squeeze(-1).cpu().numpy().astype(np.float64)
        for i, (_, first, stop) in enumerate(rows):
            yield first, stop, logprobs[i, : stop - first], nats[i, : stop - first]


def score(model: GPT, ids, positions=()) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """(nats of each target ids[1:], {t: log-probabilities (V,) at target t, for t in positions})."""
    args, ids, wanted, length = model.args, np.asarray(ids), set(positions), model.args.eval_seq_len
    batch = max(1, args.eval_batch_tokens // length)
    nats, vectors = np.zeros(max(len(ids) - 1, 0)), {}
    for first, stop, logprobs, part in scored(model, ids, length, args.eval_stride, batch):
        nats[first:stop] = part
        vectors |= {t: logprobs[t - first].cpu().numpy() for t in wanted if first <= t < stop}
    return nats, vectors


class Evaluator:
    """Scores a model on the validation stream: one line in the log, one entry in `metrics.json` a pass."""

    def __init__(self, args: Hyperparameters, data: Dataset, runtime: Runtime, log: Log):
        self.args, self.runtime, self.log = args, runtime, log
        self.logits = scoring_logits
        ids, self.prefix = data.val, 0
        sizes = target_bytes(ids, byte_tables(args))
        if args.val_bytes and args.val_bytes < sizes.sum():
            targets = int(np.searchsorted(np.cumsum(sizes), args.val_bytes)) + 1
            ids, sizes, self.prefix = ids[: targets + 1], sizes[:targets], args.val_bytes
        self.ids, self.bytes = ids, int(sizes.sum())
        if not self.bytes:
            raise UserError(f"{data.val_files[0]}: the validation targets stand for no byte at all")
        self.classes = class_table(args.vocab_size)
        self.results: dict[str, dict] = {}

    def describe(self) -> str:
        prefix = f" prefix:{self.prefix}" * bool(self.prefix)
        return f"val: targets:{len(self.ids) - 1} bytes:{self.bytes}{prefix}"

    def run(self, name: str, model: GPT, length: int, stride: int) -> dict:
        """val_loss in nats a target, val_bpb = nats / ln 2 / bytes: special ids cost nats and add no byte."""
        args, runtime, start = self.args, self.runtime, time.perf_counter()
        sums = torch.zeros(len(BYTE_CLASSES) + 1, dtype=torch.float64)
        batch, share = max(1, args.eval_batch_tokens // length), (runtime.rank, runtime.world_size)
        for first, stop, _, nats in scored(model, self.ids, length, stride, batch, self.logits, share):
            classes = self.classes[self.ids[first + 1 : stop + 1]]
            sums[:-1] += torch.from_numpy(np.bincount(classes, nats, minlength=len(BYTE_CLASSES)))
            sums[-1] += stop - first
        targets, sums = len(self.ids) - 1, runtime.all_reduce(sums)
        assert int(sums[-1]) == targets, f"{name}: scored {int(sums[-1])} targets of {targets}"
        nats = float(sums[:-1].sum())
        bits = {label: float(total) / math.log(2) for label, total in zip(BYTE_CLASSES, sums) if total}
        result = {"val_loss": nats / targets, "val_bpb": nats / math.log(2) / self.bytes, "targets": targets,
                  "bytes": self.bytes, "seconds": time.perf_counter() - start, "seq_len": length,
                  "stride": stride, "bits_by_class": bits}
        if self.prefix:
            result["prefix_bytes"] = self.prefix
        self.results[name] = result
        return result

    def report(self, name: str, model: GPT, stride: int | None = None) -> dict:
        """Runs a pass and prints its line: non-overlapping windows, or sliding ones with a stride."""
        length = self.args.eval_seq_len
        result = self.run(name, model, length, stride or length)
        extra = f" stride:{stride}" * bool(stride) + f" prefix:{self.prefix}" * bool(self.prefix)
        self.log(f"{name} val_loss:{result['val_loss']:.4f} val_bpb:{result['val_bpb']:.4f}{extra} targets:"
                 f"{result['targets']} bytes:{result['bytes']} eval_time:{1e3 * result['seconds']:.0f}ms")
        self.log(f"{name}_exact val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f}")
        return result


# The gate: are the heads worth having? The published conditions as they were computed, honest ones beside.

DISTRACTORS, PAIRS, BRANCHES, GATE_SEED = 8, 4096, 4, 1234  # published
MATCHED, ENOUGH, POOL, DRAWS = 0.02, 30, 2048, 1000  # share, merged pairs, places, bootstrap samples


def conditions(published: dict, honest: dict, ours: dict, theirs: dict) -> dict[str, list[dict]]:
    """The published gate with its thresholds, and the same five questions asked of what they are about. What
    was not measured (None), is no number (NaN) or says nothing, for a reason that is told, does not hold:
    so bits of models with other numbers of parameters or steps, or of which one is the best of many."""
    merge, asked = honest["merge"], {"published": {
        "nll_delta": ("<=", 0.05), "branch_acceptance_rate": (">=", 0.5),
        "jepa_top1_acc": (">", published["sgjm"]["jepa_chance_top1"] + 0.05),
        "merge_precision_advantage": (">=", 1.5), "compute_advantage": (">=", 1.0),
    }, "honest": {
        "val_bpb_delta": ("<=", 0.01), "bytes_per_pass": (">=", 1.5),
        "jepa_top1_hard": (">", honest["jepa_chance_hard"] + 0.05),
        "merge_advantage_low": (">=", max(1.5, honest["control"]["interval"][1])), "speed_up": (">", 1.0)}}
    found = published | published["sgjm"] | honest | {"merge_advantage_low": merge["interval"][0]}
    why = {name: "not measured" for name, value in found.items() if value is None}
    for key, share in (("params", MATCHED), ("steps", MATCHED), ("best", 0)):
        if None in (ours[key], theirs[key]) or abs(ours[key] - theirs[key]) > share * theirs[key]:
            why["val_bpb_delta"] = f"not matched: {key} {ours[key]} against {theirs[key]}"
    if merge["merged_pairs"] < ENOUGH:
        why["merge_advantage_low"] = f"{merge['merged_pairs']} merged pairs, {ENOUGH} needed"

    def holds(value, sign: str, limit: float) -> bool:
        return {"<=": value <= limit, ">=": value >= limit, ">": value > limit}[sign]
    return {kind: [{"name": name, "value": found[name], "wanted": f"{sign} {limit:.4f}",
                    "why": why.get(name, ""), "passed": not why.get(name) and holds(found[name], sign, limit)}
                   for name, (sign, limit) in limits.items()] for kind, limits in asked.items()}


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions (..., V), in nats, ln 2 at most."""
    middle = ((p + q) / 2 + 1e-12).log()
    return sum((x * ((x + 1e-12).log() - middle)).sum(-1) for x in (p, q)) / 2


def closest(guess: Tensor, right: Tensor, others: Tensor) -> Tensor:
    """Is a guess (..., D) nearer to the right state (..., D) than to each of the others (..., n, D)?"""
    wrong = (guess[..., None, :] - others).square().mean(-1)
    return (guess - right).square().mean(-1) < wrong.amin(-1)


def merge_figures(signs: Tensor, told: Tensor, window: Tensor, radius: int) -> dict:
    """Do places with near signatures predict alike? All pairs of N places are held against each other: signs
    (N, 64) of 1 and -1, told (N, V) the backbone's predictions there, window (N,) where a place is from.

    advantage: mean divergence of other pairs / of merged pairs, with a 95 % interval over windows drawn anew
    (places of a window are alike); same_choice: share of merged, of other pairs with one most likely id."""
    generator, near = torch.Generator().manual_seed(GATE_SEED), (64 - signs @ signs.mT) / 2 <= radius
    merged, places, windows = near.triu(1).nonzero(), len(signs), int(window.max()) + 1
    apart = torch.randint(places, (PAIRS, 2), generator=generator)
    groups = merged[torch.randperm(len(merged), generator=generator)[:PAIRS]], apart[~near[tuple(apart.T)]]
    draws = np.random.default_rng(GATE_SEED).multinomial(windows, np.full(windows, 1 / windows), DRAWS)
    draws = torch.from_numpy(draws).double()  # (DRAWS, windows)
    means, sampled, same = [], [], []
    for i, j in (group.T for group in groups):
        js, weight = divergence(told[i], told[j]).double(), draws[:, window[i]] * draws[:, window[j]]
        means.append(js.mean().item())
        sampled.append(weight @ js / weight.sum(1))
        same.append((told[i].argmax(-1) == told[j].argmax(-1)).double().mean().item())
    ends = (sampled[1] / sampled[0].clamp(min=1e-9)).nanquantile(draws.new_tensor([0.025, 0.975]))
    return {"radius": radius, "places": places, "pairs": places * (places - 1) // 2, "same_choice": same,
            "merged_pairs": len(merged), "js": means, "advantage": means[1] / max(means[0], 1e-9),
            "interval": ends.tolist()}


@torch.no_grad()
def figures(model: GPT, plain: GPT, ids: np.ndarray, starts: np.ndarray, args: Hyperparameters) -> tuple:
    """What the windows that begin at `starts` say of SGJM and baseline: (published figures, honest ones).

    The published are computed as they were, faults and all: acceptance is the verifier's opinion of latents,
    no byte is looked at; the judge chooses among states of any place; pairs to merge are any two places;
    computation per byte takes all siblings as accepted and none as verified. Ours are the latent, behind a
    greedy draft, and the state to foresee, h[t + b] (published h[t + b - 1]), for which heads were trained.

    bytes_per_pass   what a pass of the backbone settles, at any place of the text: the bytes of a greedy
                     draft that it accepts, and its own. What it would choose behind a byte that the text has
                     not is unknown, and taken as rejected; drafts_unknown is the share of drafts with that
    jepa_top1_hard   the judge's choice among the state to come and the 8 next to it in time, without parent
    merge, control   latents behind the true bytes, held against the predictions there, or others dealt out"""
    aux, length, size = model.aux, args.train_seq_len, args.block_size
    at, rows, generator = torch.arange(length - size), args.train_batch_tokens // length, torch.Generator()
    near, gaps = at[:, None] + torch.arange(size), (torch.arange(length) - at[:, None] - size).abs().double()
    gaps[at, at] = gaps[at, at + size] = math.inf
    hard = gaps.topk(min(DISTRACTORS, length - 2), largest=False).indices
    planes = torch.randn(args.model_dim, 64, generator=generator.manual_seed(42))
    means, merged, apart, signs, told = torch.zeros(7), [], [], [], []
    for first in range(0, len(starts), rows):
        text = ids[starts[first : first + rows, None] + np.arange(length + 1)].astype(np.int64)
        text = torch.from_numpy(text).to(model.tok_emb.weight.device)  # (B, T + 1)
        states, theirs = (each.hidden(text[:, :-1], each.rotary_train) for each in (model, plain))
        logits, theirs = model.head(states), plain.head(theirs)
        parent, future, true = states[:, :-size], states[:, size:], text[:, near + 1]  # (B, K, D or b)
        every, laws = future.flatten(0, 1), logits[:, size:].softmax(-1).flatten(0, 1)
        guess, (tokens, _, ends) = aux.judge(parent), aux.drafter.draft(parent.flatten(0, 1), 1)
        _, known, taken = accepted(tokens.unflatten(0, true.shape[:2]), true, logits.argmax(-1)[:, near])
        other = torch.randint(len(every), (*parent.shape[:2], DISTRACTORS), generator=generator)
        means += len(text) / len(starts) * torch.stack([
            *(F.cross_entropy(each.flatten(0, 1), text[:, 1:].flatten()) for each in (logits, theirs)),
            *(part.float().mean() for part in (
                aux.verdict(parent.flatten(0, 1), ends[:, 0]) > 0, closest(guess, future, every[other]),
                taken, known, closest(guess, future, states[:, hard])))]).cpu()
        i, j = torch.randint(len(every), (2, PAIRS), generator=generator)
        i, j = i[i != j], j[i != j]
        bits, js = ends[:, 0] @ planes.to(ends) >= 0, divergence(laws[i], laws[j])
        same = (bits[i] != bits[j]).sum(-1) <= args.gate_radius
        merged, apart = merged + js[same].tolist(), apart + js[~same].tolist()
        some = torch.randperm(len(at), generator=generator)[: -(-POOL // len(starts))]
        slots = aux.drafter.slots(*(part[:, some].flatten(0, 1) for part in (parent, true)))
        signs.append((aux.drafter.latent(slots[:, -1]).cpu() @ planes >= 0).float() * 2 - 1)
        told.append(laws.unflatten(0, true.shape[:2])[:, some].flatten(0, 1).cpu())
    *nats, acceptance, right, taken, known, hard_right = means.tolist()
    signs, told = torch.cat(signs), torch.cat(told)
    window = torch.arange(len(starts)).repeat_interleave(len(some))
    mixed = told[torch.randperm(len(told), generator=generator)]
    whole, heads, drafter, verifier, theirs = (sum(p.numel() for p in part.parameters()) for part in (
        model, aux, aux.drafter, aux.verifier, plain))
    cost = whole - heads + BRANCHES * (drafter + verifier)
    cost /= max(acceptance, 1e-6) * BRANCHES * size
    js = [sum(part) / len(part) if part else math.nan for part in (merged, apart)]
    counts = {"n_tokens": len(starts) * length, "n_positions": len(starts) * len(at)}
    sgjm = counts | {
        "token_nll": nats[0], "branch_acceptance_rate": acceptance, "jepa_top1_acc": right,
        "jepa_chance_top1": 1 / (DISTRACTORS + 1), "merge_precision_js": js[0], "random_pair_js": js[1],
        "merge_precision_advantage": js[1] / max(js[0], 1e-9) if merged and apart else 1.0,
        "merged_pairs": len(merged), "compute_per_accepted_token": cost}
    return {"sgjm": sgjm, "baseline": {"token_nll": nats[1], "compute_per_token": theirs},
            "nll_delta": nats[0] - nats[1], "compute_advantage": theirs / cost}, counts | {
        "bytes_per_pass": 1 + taken, "drafts_unknown": 1 - known,
        "jepa_top1_hard": hard_right, "jepa_chance_hard": 1 / (hard.size(1) + 1),
        "merge": merge_figures(signs, told, window, args.gate_radius),
        "control": merge_figures(signs, mixed, window, args.gate_radius)}


def compared(path: str, model: GPT) -> dict:
    """Who is compared; `steps` None: neither in the file nor in a metrics.json beside it."""
    steps = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        steps = (read_checkpoint(path, "checkpoint", ())[0]["step"] if Path(path).suffix == ".safetensors"
                 else json.loads(Path(path).with_name("metrics.json").read_text())["steps"])
    return {"file": str(path), "sha256": sha256_file(Path(path)), "steps": steps,
            "params": sum(p.numel() for p in model.parameters()), "best": Path(path).stem == "best"}


def gate(args: Hyperparameters, log: Log, evaluator: Evaluator, fingerprint: dict) -> int:
    """Judges SGJM against BASELINE: a table, gate.json; 0 if every honest condition holds, else 1."""
    device, ids, ratio = evaluator.runtime.device, evaluator.ids, None
    theirs = settings_of(args.baseline, what="BASELINE")
    wanted = {"arch": "baseline", "vocab_size": args.vocab_size, "train_seq_len": args.train_seq_len}
    for name, value in wanted.items():
        if (found := getattr(theirs, name)) != value:
            raise UserError(f"BASELINE={args.baseline}: {name.upper()}={found}, where {value} is needed")
    theirs.eval_seq_len = args.eval_seq_len
    model, plain = open_model(args.sgjm, device, args), open_model(args.baseline, device, theirs)
    if model.aux is None:
        raise UserError(f"SGJM={args.sgjm}: no heads in it; a checkpoint has them, or EXPORT_HEADS=1")
    if len(ids) < args.train_seq_len + 2:
        raise UserError(f"TRAIN_SEQ_LEN={args.train_seq_len}: no such window in {len(ids)} validation ids")
    report = {"sgjm": compared(args.sgjm, model), "baseline": compared(args.baseline, plain)}
    if args.gate_bench:
        try:
            bench = json.loads(read_file(args.gate_bench, "GATE_BENCH"))
            ratio = float(bench["summary"]["greedy"]["ratio"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"GATE_BENCH={args.gate_bench}: no summary.greedy.ratio ({error!r})") from None
        if bench.get("artifact_sha256", mine := report["sgjm"]["sha256"]) != mine:
            raise UserError(f"GATE_BENCH={args.gate_bench}: measured with another file than {args.sgjm}")
    bits = [evaluator.report(f"gate_{name}", part, args.eval_stride)["val_bpb"]
            for name, part in (("sgjm", model), ("baseline", plain))]
    length, last = args.train_seq_len, len(ids) - args.train_seq_len
    count = args.gate_batches * args.train_batch_tokens // length
    starts = np.random.default_rng(GATE_SEED).integers(last, size=count)
    published, _ = figures(model, plain, ids, starts, args)
    starts = np.arange(0, last, length)  # spread over the text, none twice
    starts = starts[np.unique(np.linspace(0, len(starts) - 1, count).astype(int))]
    honest = {"val_bpb_delta": bits[0] - bits[1], "val_bpb": bits, "speed_up": ratio,
              **figures(model, plain, ids, starts, args)[1]}
    told = conditions(published, honest, *report.values())
    report |= {"published": published, "honest": honest, "dataset": fingerprint, "evals": evaluator.results,
               "settings": args.settings(), "script_sha256": sha256_file(Path(__file__))}
    for kind, asked in told.items():
        failed = [each["name"] for each in asked if not each["passed"]]
        report[kind] |= {"conditions": asked, "gate_passed": not failed, "gate_reasons": failed}
        for each in asked:
            value = "-" if each["value"] is None else f"{each['value']:.4f}"
            log(f"gate {kind:<9} {each['name']:<25} {value:>11} {each['wanted']:<9} "
                + ("pass" if each["passed"] else "FAIL") + f" ({each['why']})" * bool(each["why"]))
        log(f"gate {kind:<9} {'failed: ' + ', '.join(failed) if failed else 'passed'}")
    report = json.loads(json.dumps(report), parse_constant=lambda _: None)  # JSON has no NaN: null
    write_atomic(log.folder / "gate.json", json.dumps(report, indent=2, allow_nan=False).encode())
    return int(not honest["gate_passed"])


# -----------------------------------------------------------------------------
# GENERATION
# -----------------------------------------------------------------------------


class Stream:
    """The scorer, one id at a time: what a decoder can follow. Reads the same windows as `score` and keeps
    what is known of the window at hand; ids that were pushed are read together when it is asked."""

    def __init__(self, model: GPT):
        self.model, self.ids = model, []
        self.start, self.past, self.known = 0, KVCache(model), None

    @torch.no_grad()
    def logprobs(self) -> np.ndarray:
        """fp32 log-probabilities (V,) of the next id. The first id, a BOS, is given: push it first."""
        if not self.ids:
            raise ValueError("push the first id (BOS) before asking for the second")
        if self.known is None:
            args, device = self.model.args, self.model.tok_emb.weight.device
            block = (len(self.ids) - 1) // args.eval_stride
            start = max((block + 1) * args.eval_stride - args.eval_seq_len, 0)
            if start != self.start:
                self.start = start
                self.past.rewind(0)
            ids = torch.tensor([self.ids[start + self.past.length :]], device=device)
            x = self.model.hidden(ids, self.model.rotary_eval, self.past)
            self.known = self.model.head(x[0, -1].float()).log_softmax(-1).cpu().numpy()
        return self.known

    def push(self, token: int) -> None:
        self.ids.append(int(token))
        self.known = None


stream = Stream  # the name that every script of the family gives it

NEAR_TIE = 1e-4  # logits closer than this are ordered by the rounding of a pass's shape


class Draft:
    """A node of the speculation graph: `ids` drafted to follow `parent`, None for the text; as in that, an id
    is a character. `start` is the length of its true prefix. Of each id: the law that it was drawn with (V,),
    None without chance; the drafter's log-probability; its kind, the key of `Generator.rates`. Of its end:
    what judge and verifier think of it, and its signature."""

    def __init__(self, parent: Draft | None, start: int, ids: str, laws: list, logs: list[float],
                 kinds: list[tuple[str, int]], bonus: float = 0.0, bits: int | None = None):
        self.parent, self.start, self.end, self.ids = parent, start, start + len(ids), ids
        self.laws, self.logs, self.kinds, self.bonus, self.bits = laws, logs, kinds, bonus, bits
        self.state, self.score, self.alias = "created", 0.0, None
        self.path: list[Place] = []  # in the tree of a pass, from the place before it

    def through(self, text: str) -> str:
        """The text as it would be with the draft."""
        return (self.parent.through(text) if self.parent else text[: self.start]) + self.ids


class SpeculationGraph:
    """Drafts ahead of a text, and which of them a pass of the backbone reads.

    created -> scored -> verified | pruned | merged -> committed | expired, or, still ahead, scored again.
    Two drafts merge if they end at the same length in latents whose signatures (SimHash, Charikar 2002: signs
    of 64 products with Gaussian vectors) differ in few bits: the better one is read, the other points to it
    and keeps its own prefix. Edges lead to longer prefixes, pointers to equal ones: no cycle. (Published:
    nodes forget what came before them, merging drops bytes, and one can merge with its own ancestor.)"""

    AFTER = {"created": ("scored",), "scored": ("verified", "pruned", "merged"),
             **dict.fromkeys(("verified", "pruned", "merged"), ("scored", "committed", "expired")),
             "committed": (), "expired": ()}

    def __init__(self, dim: int, keep: int, radius: int):
        self.planes = torch.randn(dim, 64, generator=torch.Generator().manual_seed(42))
        self.keep, self.radius, self.alive = keep, radius, []  # elder ones first
        self.counts = dict.fromkeys(self.AFTER, 0)  # how often a draft came into a state

    def add(self, *fields) -> Draft:
        self.alive.append(Draft(*fields))
        self.counts["created"] += 1
        return self.alive[-1]

    def move(self, draft: Draft, state: str) -> None:
        assert state in self.AFTER[draft.state], f"{draft.state} -> {state}"
        draft.state = state
        self.counts[state] += 1

    def signatures(self, latents: Tensor) -> list[int]:
        """latents (n, D) -> 64 bits each."""
        signs = (latents.float().cpu() @ self.planes >= 0).numpy()
        return np.packbits(signs, axis=1).view(">u8")[:, 0].tolist()

    def choose(self, length: int) -> list[Draft]:
        """The best drafts ahead of a text of `length` ids, without those that look like a better one; what is
        left of older drafts takes no new one's place."""
        kept: list[Draft] = []
        for draft in self.alive:
            self.move(draft, "scored")
            before = draft.parent.score if draft.start > length else 0.0
            draft.score = before + sum(draft.logs[max(length - draft.start, 0) :]) + draft.bonus
        for draft in sorted(self.alive, key=lambda draft: -draft.score):
            near = (other for other in kept if other.end == draft.end and None not in (other.bits, draft.bits)
                    and (other.bits ^ draft.bits).bit_count() <= self.radius)
            draft.alias = next(near, None)
            free = draft.start < length or sum(other.start >= length for other in kept) < self.keep
            if draft.alias is None and free:
                kept.append(draft)
            else:
                self.move(draft, "pruned" if draft.alias is None else "merged")
        return kept

    def settle(self, text: str) -> None:
        """What the text has taken as a whole is committed, what it went away from expires."""
        for draft in self.alive:
            orphan, seen = draft.parent and draft.parent.state == "expired", text[draft.start : draft.end]
            if orphan or not draft.ids.startswith(seen):
                self.move(draft, "expired")
            elif draft.end <= len(text):
                self.move(draft, "committed")
        self.alive = [draft for draft in self.alive if self.AFTER[draft.state]]


class Place:
    """An id in the tree of a pass: its root is the last id of the text, drafts with a common prefix share it.
    `offers` are the ids drafted to follow it, in the order of drawing: (id, law, kind)."""

    def __init__(self, token: int, above: Place | None = None):
        self.id, self.above, self.depth = token, above, above.depth + 1 if above else 0
        self.row, self.chance = -1, float(above is None)  # not read; that the text comes by
        self.children, self.offers = {}, []

    def offer(self, token: int, law: np.ndarray | None, kind: tuple, rate: float) -> Place:
        """`token` may follow, and does so at this rate: its place."""
        self.offers.append((token, law, kind))
        child = self.children.setdefault(token, Place(token, self))
        child.chance = max(child.chance, self.chance * rate)
        return child


def tree_mask(read: list[Place], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """(depths (n,), who sees whom (n, n)) of places in the order of their rows; None for a chain."""
    if read[-1].depth == len(read) - 1:
        return None
    sees = np.eye(len(read), dtype=bool)
    for place in read[1:]:
        sees[place.row] |= sees[place.above.row]
    return torch.tensor([place.depth for place in read], device=device), torch.from_numpy(sees).to(device)


def repeated(text: str, limit: int) -> tuple[int, str]:
    """Prompt lookup: (length, from 3 to 32, of the longest end of `text` that stands in it before; `limit`
    characters that followed the last time), or (0, "")."""
    low, high, length, after = 3, min(32, len(text) - 1), 0, 0
    while low <= high:  # what has a long end twice has a short one twice
        n = (low + high) // 2
        if (found := text.rfind(text[-n:], 0, -1)) < 0:
            high = n - 1
        else:
            low, length, after = n + 1, n, found + n
    period = len(text) - after  # where it is shorter than `limit`, the text goes round
    return length, (text[after:] * (limit // period + 1))[:limit] if length else ""


def chosen(p: np.ndarray, offers: list[tuple], rng: np.random.Generator) -> int:
    """An id with probabilities p (V,), one of `offers` if it can be: (id, law, ...) in the order of drawing.

    Rejection, offer by offer (Leviathan et al. 2023; for trees Miao et al. 2024): x, drawn with q, is taken
    with probability min(1, p(x) / q(x)); else p becomes (p - q)+, normalised. The law of a draw without
    replacement is q without its elder siblings; None, no draw at all, has q(x) = 1."""
    for token, law, *_ in offers:
        if rng.random() * (1.0 if law is None else law[token]) < p[token]:
            return token
        p = np.where(np.arange(len(p)) == token, 0.0, p) if law is None else np.maximum(p - law, 0.0)
        if not p.any():  # p was q, but for rounding
            return token
        p = p / p.sum()
    sums = p.cumsum()
    return int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))


class Generator:
    """Goes on with a text. A pass of the backbone reads its last id and drafts behind it; those that the
    backbone would have written itself join the text, and behind them the id that it predicts: the heads draft
    what follows that one. When the window is full, its last half is read again, with drafts or without.

    At temperature 0 the text is that of decoding without drafts, above it has the same distribution, whatever
    is read: ids drawn to follow a prefix are put to the test in the order of drawing when the text reaches
    that prefix, be it some passes later. (Forgetting what was not read would favour what the graph prefers.)
    An id is read if its chance, by how drafts of its kind fared of late, is DRAFT_BYTE_COST or more; the
    heads draft in one pass of 64 alone while what they win of late does not pay for their time."""

    def __init__(self, model: GPT, ids: list[int], seed: int, speculate: bool, temperature: float):
        args, self.device = model.args, model.tok_emb.weight.device
        self.model, self.args, self.text, self.temperature = model, args, "".join(map(chr, ids)), temperature
        self.past, self.window, self.start, self.state = KVCache(model), args.eval_seq_len, 0, None
        self.rng, self.noise = np.random.default_rng(seed), torch.Generator(self.device).manual_seed(seed)
        self.graph = SpeculationGraph(args.model_dim, args.keep_top_k, args.merge_radius)
        self.heads = model.aux if speculate and args.drafter != "suffix" and args.block_size > 1 else None
        self.suffix = speculate and (args.drafter != "heads" or self.heads is None)
        self.rates = {("heads", i): (i + 0.5) / 8 for i in range(8)}
        self.rates |= {("suffix", i): 1 - 0.5 / (i + 1) for i in range(8)}
        self.worth, self.cost = 1.0, args.draft_cost or 0.25  # of a draft by the heads: ids won, time
        self.seconds, self.drafting, self.reading = 0.0, 0.0, 0.0
        self.read, self.taken = np.zeros((2, args.draft_budget + 1), np.int64)  # passes, by depth of drafts
        self.gaps: dict[int, float] = {}  # at temperature 0: {place in the text: best logit - the second}

    @torch.no_grad()
    def write(self, count: int) -> str:
        """`count` ids more. The clock stands while the prompt is read."""
        stop = len(self.text) + count
        self.catch_up()
        began = time.perf_counter()
        while len(self.text) < stop:
            self.step(stop - len(self.text))
        self.seconds += time.perf_counter() - began
        return self.text[-count:]

    def states(self, ids: list[int], mask: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(n, D) of ids that follow the cache, which takes them up."""
        ids = torch.tensor([ids], device=self.device)
        return self.model.hidden(ids, self.model.rotary_eval, self.past, mask)[0]

    def catch_up(self) -> None:
        """Reads what lies before the last id and is not in the cache."""
        while len(self.text) - 1 - self.start >= self.window:
            self.start += self.window - self.window // 2
            self.past.rewind(0)
        if missing := self.text[self.start + self.past.length : -1]:
            self.state = self.states(list(map(ord, missing)))[-1:]

    def step(self, left: int) -> None:
        """One pass: from 1 to `left` ids."""
        self.catch_up()
        began, known = time.perf_counter(), self.past.length
        read = self.plan(min(left, self.window - known))
        drafted = time.perf_counter()
        x = self.states([place.id for place in read], tree_mask(read, self.device))
        path = self.walk(read[0], self.model.head(x).cpu().numpy())
        self.past.gather(known, path)
        self.graph.settle(self.text)
        self.state = x[path[-1:]]
        times = drafted - began, time.perf_counter() - drafted
        self.drafting, self.reading = self.drafting + times[0], self.reading + times[1]
        if self.tried and not self.args.draft_cost:
            self.cost += 0.2 * (min(times[0] / times[1], 4.0) - self.cost)
        self.read[: 1 + max(place.depth for place in read)] += 1
        self.taken[: len(path)] += 1

    def plan(self, most: int) -> list[Place]:
        """What a pass reads that is to give `most` ids at most, by rows: the last id, and ids of drafts."""
        args, root, length = self.args, Place(ord(self.text[-1])), len(self.text)
        ends = [draft.end for draft in self.graph.alive if draft.kinds[0][0] == "suffix"]
        if self.suffix and most > 1 and max(ends, default=0) < length + args.draft_budget // 2:
            self.look_up(None)
        due = self.worth >= self.cost or self.read[0] % 64 == 0
        self.tried = self.heads is not None and self.state is not None and most > 1 and due
        if self.tried:
            self.draft(length)
        for draft in self.graph.alive:
            draft.path = [root if draft.start <= length else draft.parent.path[-1]]
            parts = list(zip(map(ord, draft.ids), draft.laws, draft.kinds))
            for token, law, kind in parts[max(length - draft.start, 0) :]:
                draft.path.append(draft.path[-1].offer(token, law, kind, self.rates[kind]))
        kept, read, root.row = self.graph.choose(length), [root], 0
        room = min(args.draft_budget + 1, self.window - self.past.length)
        for draft in kept[: 1 if self.past.mambas else None]:  # whose states follow a chain
            for place in (*(draft.parent.path if draft.start > length else ()), *draft.path):
                if place.row < 0:
                    if len(read) == room or place.depth == most or place.chance < args.draft_byte_cost:
                        break
                    place.row = len(read)
                    read.append(place)
        for draft in kept:
            self.graph.move(draft, "verified" if draft.path[-1].row >= 0 else "pruned")
        return read

    def draft(self, length: int) -> None:
        """Adds the heads' blocks to the graph, and what the best of them calls up."""
        args, given = self.args, torch.tensor([[ord(self.text[-1])]], device=self.device)
        found = self.heads.drafter.draft(self.state, args.draft_branches, self.temperature, self.noise, given)
        tokens, logprobs, latents = (part[0] for part in found)  # (k, b), (k, b, V), (k, D)
        logs = logprobs.gather(-1, tokens[..., None])[:, 1:, 0].tolist()
        scores = logprobs[:, 1:].to(torch.float64, copy=True)
        for i, score in enumerate(scores[:, 0]):  # drawn without replacement
            score[tokens[:i, 1]] = -math.inf
        foreseen = (self.heads.judge(self.state) - latents).float().square().mean(-1)
        bonus = F.logsigmoid(self.heads.verdict(self.state, latents)) - args.judge_weight * foreseen
        kinds = [[("heads", min(int(8 * math.exp(log)), 7)) for log in row] for row in logs]
        parts = zip(tokens[:, 1:].tolist(), scores.softmax(-1).cpu().numpy(), logs, kinds, bonus.tolist(),
                    self.graph.signatures(latents))
        drafts = [self.graph.add(None, length, "".join(map(chr, block)), list(law), *rest)
                  for block, law, *rest in parts]
        if self.suffix:
            self.look_up(max(drafts, key=lambda draft: sum(draft.logs) + draft.bonus))

    def look_up(self, parent: Draft | None) -> None:
        text = self.text if parent is None else parent.through(self.text)
        match, ids = repeated(text, self.args.draft_budget)
        kinds = [("suffix", min((match + i - 3) // 4, 7)) for i in range(len(ids))]
        if ids:
            logs = [math.log(max(self.rates[kind], 1e-9)) for kind in kinds]
            self.graph.add(parent, len(text), ids, [None] * len(ids), logs, kinds)

    def walk(self, place: Place | None, logits: np.ndarray) -> list[int]:
        """Adds to the text what the backbone takes, and the id behind it; the rows that it went by."""
        path, won = [], 0
        while place is not None and place.row >= 0:
            path.append(place.row)
            scores, offers = logits[place.row], place.offers
            if self.temperature:
                p = np.exp((scores - scores.max()).astype(np.float64) / self.temperature)
                token = chosen(p / p.sum(), offers, self.rng)
            else:
                token, best = int(scores.argmax()), np.partition(scores, -2)[-2:]
                self.gaps[len(self.text)] = float(best[1] - best[0])
            for drafted, _, kind in offers:
                self.rates[kind] += 0.05 * ((drafted == token) - self.rates[kind])
            self.text, place = self.text + chr(token), place.children.get(token)
            by = {kind[0] for drafted, _, kind in offers if drafted == token}
            won += by == {"heads"} and place.row >= 0
        self.worth += 0.2 * self.tried * (won - self.worth)
        return path


def looping(text: str) -> float:
    """Share of a text that repeats what stands some ids before, for twice as many ids, and 8 at least."""
    ids, found = np.array(list(map(ord, text))), np.zeros(len(text), bool)
    for period in range(1, len(ids) // 3 + 1):
        edges = np.flatnonzero(np.diff(np.pad((ids[period:] == ids[:-period]).astype(int), 1)))
        for start, stop in zip(edges[::2], edges[1::2]):
            if stop - start >= max(2 * period, 8):
                found[start : stop + period] = True
    return float(found.mean())


def measured(model: GPT, prompt: list[int], temperature: float) -> dict:
    """Plain and speculative decoding of a prompt in turn, BENCH_REPEATS times each: medians and means."""
    args, runs, report = model.args, {"ar": [], "speculation": []}, {}
    for repeat in range(args.bench_repeats):
        for name, writers in runs.items():
            writers.append(Generator(model, prompt, args.seed + repeat, name != "ar", temperature))
            writers[-1].write(args.max_new_tokens)
    for name, writers in runs.items():
        read, taken = sum(w.read for w in writers).tolist(), sum(w.taken for w in writers).tolist()
        seconds = sum(w.seconds for w in writers)
        report[name] = {
            "bytes_per_second": float(np.median([args.max_new_tokens / w.seconds for w in writers])),
            "bytes_per_pass": len(writers) * args.max_new_tokens / read[0],
            "acceptance": [a / n for a, n in zip(taken[1:], read[1:]) if n],  # by depth, where one was read
            "drafting": sum(w.drafting for w in writers) / seconds,
            "verification": sum(w.reading for w in writers) / seconds,
            "looping": float(np.mean([looping(w.text[len(prompt) :]) for w in writers])),
            "drafts": {key: sum(w.graph.counts[key] for w in writers) for key in SpeculationGraph.AFTER}}
    report["ratio"] = report["speculation"]["bytes_per_second"] / report["ar"]["bytes_per_second"]
    if temperature == 0:  # where the texts part, if they do
        parted = [(a, len(os.path.commonprefix((a.text, b.text)))) for a, b in zip(*runs.values())]
        gaps = [a.gaps[place] for a, place in parted if place < len(a.text)]
        report["near_ties"] = sum(gap < NEAR_TIE for gap in gaps)
        report["mismatches"] = len(gaps) - report["near_ties"]
    return report


def read_prompts(args: Hyperparameters) -> dict[str, bytes]:
    """{name: prompt} of GENERATE: text, file, folder of files, JSON; without: four kinds of 256 bytes."""
    path, found = Path(args.generate), {"prompt": os.fsencode(args.generate)}
    if not args.generate:
        code, prose = Path(difflib.__file__).read_bytes(), " ".join(difflib.SequenceMatcher.__doc__.split())
        found = {"prose": prose.encode(), "code": code[code.index(b"def _plain_replace") :],
                 "repetitive": b"".join(b"  row %d: yes, no, yes\n" % (i % 3) for i in range(12)),
                 "random": np.random.default_rng(0).integers(0, 256, 256, np.uint8).tobytes()}
        return {name: text[:256] for name, text in found.items()}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no such path, no such JSON
        files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.is_file()]
        found = {file.stem: file.read_bytes() for file in files}
        if path.suffix == ".json":
            found = {name: text.encode() for name, text in json.loads(found[path.stem]).items()}
    return found


def generate(args: Hyperparameters, runtime: Runtime) -> int:
    """Writes what follows GENERATE to stdout and numbers to stderr; with GENERATE_BENCH bench.json."""
    model, special = open_model(args.artifact, runtime.device, args), args.vocab_size - 256
    prompts = {name: [BOS_ID] * (special > 0) + [byte + special for byte in text]
               for name, text in read_prompts(args).items()}
    if not all(prompts.values()) or len(prompts) != 1 and not (prompts and args.generate_bench):
        raise UserError(f"GENERATE={args.generate}: {len(prompts)} prompts, or an empty one")
    if model.aux is None and args.speculate and args.drafter != "suffix":
        print(f"{args.artifact}: no heads in it, drafts by prompt lookup alone", file=sys.stderr)
    if args.generate_bench:
        return bench(model, prompts, runtime, Log(run_folder(args)))
    writer = Generator(model, *prompts.values(), args.seed, args.speculate, args.temperature)
    ids = map(ord, writer.write(args.max_new_tokens))
    text, passes = bytes(i - special for i in ids if i >= special), int(writer.read[0])
    sys.stdout.buffer.write(text.decode(errors="replace").encode() if sys.stdout.isatty() else text)
    print(f"\nbytes:{len(text)} passes:{passes} bytes_per_pass:{args.max_new_tokens / passes:.2f} "
          f"bytes_per_second:{args.max_new_tokens / writer.seconds:.1f} "
          + " ".join(f"{state}:{count}" for state, count in writer.graph.counts.items()), file=sys.stderr)
    return 0


def bench(model: GPT, prompts: dict[str, list[int]], runtime: Runtime, log: Log) -> int:
    """bench.json: each prompt greedy and at temperature 1; exit code 1 where a greedy text is another one."""
    args, found, summary = model.args, {}, {}
    for speculate in (False, True):  # outside the clock
        Generator(model, next(iter(prompts.values())), 0, speculate, 0.0).write(8)
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        found[kind] = {name: measured(model, prompt, temperature) for name, prompt in prompts.items()}
        for name, result in found[kind].items():
            speeds = [result[way]["bytes_per_second"] for way in ("ar", "speculation")]
            log(f"bench {kind} {name} ar:{speeds[0]:.1f} speculation:{speeds[1]:.1f} bytes/s "
                f"ratio:{result['ratio']:.2f} bytes_per_pass:{result['speculation']['bytes_per_pass']:.2f}")
        ratios = [result["ratio"] for result in found[kind].values()]
        summary[kind] = {"ratio": math.prod(ratios) ** (1 / len(ratios))}
    summary["greedy"] |= {key: sum(result[key] for result in found["greedy"].values())
                          for key in ("near_ties", "mismatches")}
    log(f"bench {json.dumps(summary)}")
    report = {"summary": summary, **found, "settings": args.settings(), "device": runtime.device_name(),
              "threads": torch.get_num_threads(), "dtype": str(model.dtype), "torch": torch.__version__,
              "heads": model.aux is not None, "artifact_sha256": sha256_file(Path(args.artifact)),
              "script_sha256": sha256_file(Path(__file__))}
    write_atomic(log.folder / "bench.json", json.dumps(report, indent=1, allow_nan=False).encode())
    return int(summary["greedy"]["mismatches"] > 0)


# -----------------------------------------------------------------------------
# TRAINING
# -----------------------------------------------------------------------------


class Stopped(Exception):
    """SIGTERM or Ctrl-C: the checkpoint is written, the message says how to go on."""


class Trainer:
    """Model, optimizers, average, loader and clock: all that a checkpoint holds, and one step of training."""

    def __init__(self, args: Hyperparameters, data: Dataset, runtime: Runtime, log: Log):
        self.args, self.data, self.runtime, self.log = args, data, runtime, log
        self.plan = BatchPlan.make(args, runtime.world_size)
        torch.manual_seed(args.seed)
        self.model = GPT(args, runtime.attention, runtime.dtype)
        self.model.init_weights(args.seed)
        self.model.to(runtime.device)
        self.losses, self.logits = training_losses, scoring_logits
        if runtime.compile:
            self.losses, self.logits = (torch.compile(f, dynamic=False) for f in (self.losses, self.logits))
        self.loader_state, self.signal = None, 0
        self.step, self.seconds, self.best = 0, 0.0, math.inf  # of this run and the runs that it resumes
        self.slowest = 0.0  # seconds of the slowest step, slowly forgotten
        self.reserve = 0.0  # seconds that calibration will take of the training clock
        self.fresh_optimizers()

    def fresh_optimizers(self) -> None:
        self.optimizers = Optimizers(self.model, self.args, self.runtime)
        self.ema = EMA(self.model, self.args.ema_decay) if self.args.ema_enabled else None

    def micro_step(self, ids: Tensor, weights: Tensor, aux_inputs, aux_weights: dict[str, float]) -> dict:
        """Forward and backward of one micro-batch; gradients add up to those of the global batch's mean."""
        sums = self.losses(self.model, ids, weights, aux_inputs)
        loss = self.args.token_weight * sums["ce"] / (self.plan.rows * self.args.train_seq_len)
        for name, weight in aux_weights.items():
            if weight:
                loss = loss + weight / (self.plan.rows // self.plan.group) * sums[name]
        loss.backward()
        return {name: value.detach() for name, value in sums.items()}

    def train_step(self, ids: Tensor, weights: Tensor, progress: float) -> dict[str, Tensor]:
        """One optimizer step on a global batch; returns this rank's share of each summed term."""
        aux = self.model.aux
        aux_inputs = aux.inputs(self.step, self.runtime.device) if aux is not None else None
        aux_weights = aux.weights(progress) if aux is not None else {}
        parts = [self.micro_step(*batch, aux_inputs, aux_weights) for batch in zip(ids, weights)]
        self.optimizers.step(self.step, progress, self.optimizers.reduce())
        if self.ema is not None:
            self.ema.update(self.step)
        self.model.zero_grad()
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def warm_up(self) -> None:
        """Compiles every shape on made-up ids, then puts weights and optimizers back bit for bit."""
        if not self.args.warmup_steps:
            return
        kept = [p.detach().clone() for p in self.model.parameters()]
        try:
            self.try_shapes()
        except Exception as error:  # whatever the compiler did not like: the same work runs without it
            if not self.runtime.compile:
                raise
            self.log(f"compile: failed ({type(error).__name__}), running eager")
            self.losses, self.logits = training_losses, scoring_logits
            self.try_shapes()
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), kept)
        self.model.zero_grad()
        self.fresh_optimizers()

    def try_shapes(self) -> None:
        args, device, generator = self.args, self.runtime.device, torch.Generator().manual_seed(0)
        shape = (self.plan.micro_steps, self.plan.groups * self.plan.group, args.train_seq_len + 1)
        for _ in range(args.warmup_steps):
            ids = torch.randint(BYTE_OFFSET, args.vocab_size, shape, generator=generator).to(device)
            self.train_step(ids, torch.ones(shape[:2], device=device), 0.0)
        length, batch = args.eval_seq_len, max(1, args.eval_batch_tokens // args.eval_seq_len)
        for stride in sorted({length, args.eval_stride}):
            list(scored(self.model, np.full(2, BOS_ID), length, stride, batch, self.logits))
        if args.quant_round == "gptq":
            for _ in range(2):  # the second time is the one to go by
                start = time.perf_counter()
                self.input_moments(ids, {})["tok_emb.weight"].sum().item()  # waits for the device
                seconds = 1.25 * args.gptq_batches * (time.perf_counter() - start)
                self.reserve, = self.runtime.from_main([seconds])  # ranks must agree on when to stop

    @torch.no_grad()
    def input_moments(self, batch: Tensor, sums: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Adds this rank's X^T X of every matrix's inputs to `sums` {name: (C, C)}."""
        sums = {} if sums is None else sums

        def add(names: list[str], x: Tensor) -> None:
            x = x.flatten(0, -2).float()
            for name, product in zip(names, [x.T @ x] * len(names)):
                sums[name] = sums.get(name, 0) + product
        hooks = []
        for path, module in self.model.named_modules():
            kind = {CastedLinear: ("",), CausalSelfAttention: ("c_q.", "c_k.", "c_v.")}.get(type(module), ())
            if names := [f"{path}.{part}weight" for part in kind]:
                hooks.append(module.register_forward_pre_hook(lambda _, x, names=names: add(names, x[0])))
        for ids in batch:
            add(["tok_emb.weight"], self.model.hidden(ids[:, :-1], self.model.rotary_train))
        for hook in hooks:
            hook.remove()
        return sums

    def calibrate(self) -> dict[str, np.ndarray]:
        """Hessians for GPTQ from the next GPTQ_BATCHES training batches, on the training clock."""
        start, sums = time.perf_counter(), {}
        batches = Loader(self.data, self.args, self.plan, self.runtime.rank, self.loader_state)
        for _ in range(self.args.gptq_batches):
            self.input_moments(batches.next()[0].to(self.runtime.device), sums)
        hessians = {name: self.runtime.all_reduce(total).cpu().numpy() for name, total in sums.items()}
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
        first_bad = torch.full((), 2**31 - 1, device=runtime.device)  # step of the first non-finite loss
        fences: deque = deque()
        started = time.perf_counter() - self.seconds

        def due(every: int) -> bool:
            return every > 0 and self.step % every == 0
        with contextlib.closing(loader.prefetch(runtime.device)) as batches:
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
                first_bad = torch.where(terms["ce"].isfinite(), first_bad, first_bad.clamp(max=self.step))
                if runtime.device.type == "cuda":  # the CPU runs two steps ahead at most: an honest clock
                    fences.append(torch.cuda.current_stream().record_event())
                    if len(fences) > 2:
                        fences.popleft().synchronize()
                shown = self.step <= 10 or self.step == args.iterations or due(args.train_log_every)
                if shown or due(args.checkpoint_every):
                    self.refuse_non_finite(first_bad)
                if shown:
                    self.log_step(terms, time.perf_counter() - started, progress)
                if due(args.checkpoint_every):
                    self.seconds = time.perf_counter() - started
                    self.save("last")
                if due(args.val_loss_every) and self.step < args.iterations:  # the end has its own
                    self.seconds = time.perf_counter() - started
                    self.validate(evaluator)
                    started = time.perf_counter() - self.seconds
        self.refuse_non_finite(first_bad)  # waits for the device
        self.seconds, = runtime.from_main([time.perf_counter() - started])
        runtime.clocks["training"] = self.seconds

    def refuse_non_finite(self, first_bad: Tensor) -> None:
        step = int(self.runtime.all_reduce(first_bad.clone(), dist.ReduceOp.MIN))
        if step <= self.step:
            raise self.not_finite(step, "the loss")

    def not_finite(self, step: int, what: str) -> UserError:
        last = run_folder(self.args) / "last.safetensors"
        good = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint"
        return UserError(f"step {step}: {what} is not finite; {good}")

    def timing(self, seconds: float) -> str:
        return f"train_time:{1e3 * seconds:.0f}ms step_avg:{1e3 * seconds / max(self.step, 1):.2f}ms"

    def log_step(self, terms: dict[str, Tensor], seconds: float, progress: float) -> None:
        names = sorted(terms)
        sums = self.runtime.all_reduce(torch.stack([terms[name].float() for name in names])).tolist()
        means = {name: total / (self.plan.rows // self.plan.group) for name, total in zip(names, sums)}
        loss = means.pop("ce") / (self.plan.group * self.args.train_seq_len)
        extra = self.model.aux.report(means) if self.model.aux is not None else {}
        self.log(f"step:{self.step}/{self.args.iterations} train_loss:{loss:.4f} {self.timing(seconds)}"
                 + "".join(f" {name}:{value:.5f}" for name, value in extra.items()))
        self.log.metrics(step=self.step, train_loss=loss, train_seconds=seconds, progress=progress,
                         rate=rate_at(progress, self.args), **extra)

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

    # Checkpoints

    CHECKPOINTED = ("step", "seconds", "best", "loader_state")

    def save(self, name: str) -> None:
        """Weights, average, optimizers, RNG, loader position and clock: one safetensors file, atomically."""
        tensors = {f"model.{key}": p for key, p in self.model.named_parameters()}
        if self.ema is not None:
            tensors |= {key.replace("model", "ema", 1): p for key, p in zip(tensors, self.ema.average)}
        tensors |= {**self.optimizers.state(), "rng.cpu": torch.get_rng_state()}
        if self.runtime.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.runtime.device)
        for key, value in tensors.items():  # a loss is that of the weights before its step: look at these too
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise self.not_finite(self.step, key)
        if self.runtime.main:
            meta = {key: getattr(self, key) for key in self.CHECKPOINTED} | {"config": self.args.shipped()}
            tensors = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
                       for key, value in tensors.items()}
            blob = safetensors_bytes(tensors, {"golf": json.dumps(meta)})
            write_atomic(run_folder(self.args) / f"{name}.safetensors", blob)

    def restore(self, path: Path) -> None:
        meta, state = read_checkpoint(path, "RESUME")
        for key, value in self.args.shipped().items():
            if meta["config"].get(key) != value:
                raise UserError(f"RESUME={path}: made with {key}={meta['config'].get(key)}, not {value}")
        if self.ema is not None and not any(key.startswith("ema.") for key in state):
            raise UserError(f"RESUME={path}: made with EMA_ENABLED=0, this run has 1")
        with torch.no_grad():
            for i, (key, p) in enumerate(self.model.named_parameters()):
                p.copy_(state[f"model.{key}"])
                if self.ema is not None:
                    self.ema.average[i].copy_(state[f"ema.{key}"])
        self.optimizers.load_state(state)
        torch.set_rng_state(state["rng.cpu"])
        if "rng.cuda" in state and self.runtime.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng.cuda"], self.runtime.device)
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
    versions = f"python:{platform.python_version()} torch:{torch.__version__} numpy:{np.__version__}"
    warnings = [f"warning: {warning}" for warning in args.warnings]
    for line in [*warnings, f"{versions} commit:{git_commit()}", *runtime.notes]:
        log(line)
    log("settings " + json.dumps(args.settings()), console=False)
    log("data " + json.dumps(fingerprint))


def train(args: Hyperparameters, data: Dataset, runtime: Runtime, log: Log, evaluator: Evaluator) -> dict:
    """Training, the scores of raw and averaged weights, the artifact; returns what `metrics.json` says."""
    trainer = Trainer(args, data, runtime, log)
    params = sum(p.numel() for p in trainer.model.parameters())
    log(f"model_params:{params} world_size:{runtime.world_size} micro_steps:{trainer.plan.micro_steps} "
        f"micro_batch_rows:{trainer.plan.groups * trainer.plan.group} seed:{args.seed}")
    plan, code = size_plan(trainer.model, args), len(Path(__file__).read_bytes())
    log(f"size_plan:{sum(plan.values())} + code:{code} of {args.artifact_budget_bytes} bytes: "
        + " ".join(f"{kind}:{size}" for kind, size in plan.items()))
    with runtime.clock("warm-up"):
        trainer.warm_up()
    evaluator.logits = trainer.logits
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
        tensors = {name: p.detach().cpu().numpy() for name, p in trainer.model.exported().items()}
        artifact = run_folder(args) / "artifact.bin"
        if runtime.main:
            write_atomic(artifact, pack(tensors, args, hessians))
        runtime.all_reduce(torch.zeros(1))  # the others wait for the file
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
        "device": runtime.device_name(), "world_size": runtime.world_size, "torch": torch.__version__,
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
        if args.eval_gate:
            args = settings_of(args.sgjm, os.environ, "SGJM")
        elif args.eval_only or args.generate or args.generate_bench:
            args = settings_of(args.artifact, os.environ)
        runtime = Runtime(args)
        started, = runtime.from_main([time.time()])
        args.run_id = args.run_id or time.strftime(f"%Y%m%d-%H%M%S-seed{args.seed}", time.localtime(started))
        if args.generate or args.generate_bench:
            return generate(args, runtime) if runtime.main else 0
        data = Dataset(args, verify=runtime.main)
        log = Log(run_folder(args) if runtime.main else None)
        fingerprint = data.fingerprint()
        log_header(log, args, runtime, fingerprint)
        evaluator = Evaluator(args, data, runtime, log)
        log(evaluator.describe())
        summary = {"artifact": args.artifact, "dataset": fingerprint}
        if args.eval_gate:
            return gate(args, log, evaluator, fingerprint)
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
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
