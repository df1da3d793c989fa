"""What a run will cost, before it runs: FLOPs, bytes, milliseconds and memory of a step, seconds of scoring.

    python scripts/bench.py --plan                                  the trunk's defaults on 8 x H100
    python scripts/bench.py --plan --card a100 NUM_HEADS=8 NUM_KV_HEADS=4
    python scripts/bench.py --plan --card cpu --script BytePPM NUM_LAYERS=6 MODEL_DIM=192 NUM_HEADS=6 ...
    python scripts/plan.py [--json FILE]      the plan held against this machine: predicted beside measured

Nothing is typed that the script knows: its own `Trainer` makes a step, its own `GPT.logits` a scoring batch,
on meta tensors (shapes without data), while every operation is counted. A count is priced by a card: rates of
a table, or, with `--card cpu`, rates measured here. docs/plan.md says what each group means and how far to
trust it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import inspect
import json
import math
import os
import re
import statistics
import sys
import time
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from family import ROOT, Misuse, command, find_script, load_script, markdown_table, read_json, write_atomic
from rate import size_plan
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

BROKEN = 3  # exit code: a clock, the byte budget or the card's memory does not hold, as of the scripts

# The contest's validation text, FineWeb's first 50,000 documents, and what #832 scores of it as byte260.
VAL_BYTES, VAL_TARGETS, VAL_DOCUMENTS = 151_080_891, 151_130_112, 50_000
SPREAD = 1.0  # standard deviation of the logarithm of a web page's length, as remembered (plan)
# Bytes an id of other vocabularies stands for. Source: the field's counts of the same text, 62.02 M ids of
# sp1024 and 40.54 M of sp8192 (openai/parameter-golf, 2026-04). Between them, straight in log2(vocabulary).
BYTES_PER_ID = {1024: 2.436, 8192: 3.727}

# Weights a second out of the rANS coder. Source: docs/coders.md, 38.8 M in 6.1 s on one thread.
DECODED_PER_SECOND = 38.8e6 / 6.1
# Host time of a scoring window: NumPy rows, a copy to the device and back. An estimate.
HOST_SECONDS_PER_WINDOW = 40e-6
# A mixture's MB/s on one thread where neither --mix-rate nor its record says: BytePPM's first, 2026-11-29;
# and the threads that a rank mixes in where MIX_THREADS does not say.
MIX_RATE, MIX_THREADS = 0.44, 8

# Moments of a run at which a step is looked at: its auxiliary terms and its layers may change on the way.
MOMENTS = [(i + 0.5) / 20 for i in range(20)]

GROUPS = (
    "products forward", "products backward", "attention forward", "attention backward",
    "pointwise forward", "pointwise backward", "hash lookups", "loss and head softmax",
    "reductions and gathers", "Muon", "AdamW, RowAdagrad, EMA", "gaps",
)
FORWARD, BACKWARD, REDUCE, MUON, OPTIMIZER = "forward", "backward", "reduce", "Muon", "optimizer"


# -----------------------------------------------------------------------------
# CARDS
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """A number, its unit and where it is from; `plan` marks an estimate that nobody has measured here."""

    value: float
    unit: str
    source: str
    plan: bool = True


@dataclass(frozen=True)
class Card:
    """What a GPU does in a second. docs/plan.md tells how each number came about."""

    name: str
    ranks: int  # where --world-size does not say
    multiprocessors: int
    memory: float  # bytes
    peak: Rate  # dense bf16
    peak_fp32: Rate
    product: Rate  # of large bf16 products of this family's shapes
    # (forward, backward) by head width, over the pairs that are visible; a backward counts as 2.5 forwards
    attention: dict[int, tuple[float, float]]
    attention_source: str
    bandwidth: Rate
    achieved: Rate  # by kernels that stream
    bus: Rate  # of an all-reduce of some 100 MB over 8 ranks, as nccl-tests count it

    # what the cards share
    scattered: Rate = Rate(0.15, "of bandwidth", "11 M rows of 64 bytes in 0.3 to 0.5 ms: review")
    spread: Rate = Rate(1.40, "of fused bytes", "fitted to #832 without JEPA, 60 ms; 1 is perfect fusion")
    latency: Rate = Rate(25.0, "us", "of a small NCCL collective, as remembered")
    launch: Rate = Rate(5.0, "us", "of an eager operation: Muon's 100 in 1 ms less their work, review")
    kernel: Rate = Rate(3.0, "us", "the shortest kernel of a compiled graph, as remembered")
    gap: Rate = Rate(1.2, "ms", "a step with an idle queue: review")


# "Review": estimates on paper of how the trunk runs on eight H100s, 2026-11-29; the day of all else that is
# remembered, too. A `plan` stays one until somebody has measured it, see docs/plan.md.
HOPPER = {
    "multiprocessors": 132,
    "peak": Rate(989.4, "TFLOP/s", "NVIDIA's datasheet", False),
    "peak_fp32": Rate(66.9, "TFLOP/s", "NVIDIA's datasheet", False),
    "product": Rate(590 / 989.4, "of peak", "590 TFLOP/s at these shapes: review"),
    "attention": {64: (400, 340), 128: (550, 430)},
    "attention_source": "head 64: review; 128: FlashAttention-3, arXiv 2407.08608, as remembered",
    "bus": Rate(300.0, "GB/s", "review"),
}
CARDS = {
    "h100": Card(
        name="H100 SXM", ranks=8, memory=80e9, **HOPPER,
        bandwidth=Rate(3.35, "TB/s", "NVIDIA's datasheet", False),
        achieved=Rate(0.80, "of bandwidth", "review"),
    ),
    "h200": Card(
        name="H200 SXM", ranks=8, memory=141e9, **HOPPER,
        bandwidth=Rate(4.8, "TB/s", "NVIDIA's datasheet", False),
        achieved=Rate(0.90, "of bandwidth", "a copy at 4.3 TB/s, measured on one, 2026-10-28", False),
    ),
    "a100": Card(
        name="A100 SXM 80 GB", ranks=8, memory=80e9, multiprocessors=108,
        peak=Rate(312.0, "TFLOP/s", "NVIDIA's datasheet", False),
        peak_fp32=Rate(19.5, "TFLOP/s", "NVIDIA's datasheet", False),
        product=Rate(0.72, "of peak", "225 TFLOP/s at large shapes, as remembered"),
        attention={64: (165, 130), 128: (190, 155)},
        attention_source="FlashAttention-2, arXiv 2307.08691, as remembered",
        bandwidth=Rate(2.039, "TB/s", "NVIDIA's datasheet", False),
        achieved=Rate(0.80, "of bandwidth", "as for H100"),
        bus=Rate(200.0, "GB/s", "NVLink 3 against NVLink 4's 300"),
    ),
    "4090": Card(
        name="GeForce RTX 4090", ranks=1, memory=24e9, multiprocessors=128,
        peak=Rate(165.2, "TFLOP/s", "NVIDIA's Ada whitepaper, sums in fp32", False),
        peak_fp32=Rate(82.6, "TFLOP/s", "NVIDIA's Ada whitepaper", False),
        product=Rate(0.85, "of peak", "140 TFLOP/s at large shapes, as remembered"),
        attention={64: (130, 100), 128: (145, 115)},
        attention_source="FlashAttention-2 on Ada, as remembered",
        bandwidth=Rate(1.008, "TB/s", "NVIDIA's Ada whitepaper", False),
        achieved=Rate(0.85, "of bandwidth", "as remembered"),
        bus=Rate(10.0, "GB/s", "PCIe 4 without peer access, as remembered"),
    ),
}


# -----------------------------------------------------------------------------
# COUNTING
# -----------------------------------------------------------------------------

PRODUCT, ATTEND, POINTWISE, GATHER, LOSS, COLLECTIVE = (
    "product", "attention", "pointwise", "lookup", "loss", "collective")
# What moves no byte: shapes, and memory that something else will fill.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh",
        "resize_", "set_", "record_stream"}
GATHERS = {"embedding", "embedding_dense_backward", "index", "index_put", "index_put_", "_index_put_impl_",
           "_unsafe_index", "index_select", "index_add", "index_add_", "gather", "scatter", "scatter_",
           "scatter_add", "scatter_add_"}
LOSSES = {"_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward"}


@dataclass(eq=False)
class Op:
    """One operation on meta tensors: its FLOPs, and what it reads and writes by storage."""

    phase: str
    kind: str
    name: str
    flops: float = 0.0  # that the hardware must do
    model_flops: float = 0.0  # that the model asks for: an attention's backward recomputes nothing
    reads: dict = field(default_factory=dict)  # {storage: bytes}
    writes: dict = field(default_factory=dict)
    tiles: float = 0.0  # of a product: 128 x 128 pieces of work, along its inner side too
    head: int = 0  # of an attention: width of a head
    shapes: tuple = ()  # of an attention: those of q, k and v
    scattered: float = 0.0  # of a lookup: bytes in rows that lie anywhere
    sent: float = 0.0  # of a collective: bytes that each rank sends
    call: tuple | None = None  # (function, arguments, keywords), to run it for real

    @property
    def moved(self) -> float:
        return sum(self.reads.values()) + sum(self.writes.values())


def tensors_of(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def seen_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the memory behind a view: repeats of an expanded side count once."""
    sides = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride]
    return math.prod(sides) * tensor.element_size() if tensor.numel() else 0


def visible_pairs(queries: int, keys: int, causal: bool, window: int = 0) -> int:
    """Pairs (query, key) that meet; the last query stands at the last key.

    window: keys that a query sees at most, itself among them; 0: all before it.
    """
    if not causal:
        return queries * keys
    first = keys - queries + 1  # keys that the first query may see
    most = min(window or keys, keys)
    growing = max(0, min(queries, most - first))  # queries that see fewer than `most`
    return growing * first + growing * (growing - 1) // 2 + (queries - growing) * most


class Counter(TorchDispatchMode):
    """Records every operation on meta tensors, in order, under the phase at hand."""

    def __init__(self, vocab_size: int, world_size: int):
        super().__init__()
        self.vocab_size, self.world_size = vocab_size, world_size
        self.phase, self.ops = FORWARD, []
        self.storages: dict[int, object] = {}  # kept alive: an id must name one storage

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def memory(self, tree) -> dict[int, int]:
        """{storage: bytes} of the meta tensors in a tree; views of a storage are at most all of it."""
        found, views = defaultdict(int), set()
        for tensor in tensors_of(tree):
            if tensor.is_meta:
                storage = tensor.untyped_storage()
                key = storage._cdata
                self.storages[key] = storage
                view = key, tensor.storage_offset(), tensor.shape, tensor.stride()
                if view not in views:
                    views.add(view)
                    found[key] = min(found[key] + seen_bytes(tensor), storage.nbytes())
        return dict(found)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, made = tensors_of((args, kwargs)), tensors_of(out)
        if not any(tensor.is_meta for tensor in given + made):
            return out

        packet = func.overloadpacket
        name = packet.__name__
        written = [value for argument, value in zip(func._schema.arguments, args)
                   if argument.alias_info is not None and argument.alias_info.is_write]
        written += [kwargs[argument.name] for argument in func._schema.arguments
                    if argument.name in kwargs and argument.alias_info and argument.alias_info.is_write]
        reads, writes = self.memory(given), self.memory([made, written])
        alias = not written and made and set(writes) <= set(reads)
        state = self.phase == OPTIMIZER and name in ("zeros", "zeros_like")  # Adam's, in a first step only
        if name in FREE or alias or state:
            return out

        op = Op(self.phase, self.kind_of(name, made), name, reads=reads, writes=writes,
                call=(func, args, kwargs))
        if name in ("fill_", "zero_", "copy_"):  # what was there is not read
            op.reads = self.memory(list(args[1:]))
        if name in GATHERS:
            self.count_rows(op, args, made)
        if packet in flop_registry:
            op.kind = PRODUCT
            op.flops = op.model_flops = flop_registry[packet](*args, **kwargs, out_val=out)
            rows, columns = made[0].shape[-2:] if made[0].ndim > 1 else (made[0].numel(), 1)
            inner = op.flops / max(2 * made[0].numel(), 1)
            outer = math.prod(made[0].shape[:-2])
            op.tiles = outer * -(-rows // 128) * -(-columns // 128) * max(1.0, inner / 512)
        self.ops.append(op)
        return out

    def count_rows(self, op: Op, args: tuple, made: list[torch.Tensor]) -> None:
        """A lookup reads rows, not the table; a table's gradient is read, added to and written by rows."""
        if op.name == "embedding_dense_backward":
            op.scattered = op.writes["rows"] = 2.0 * seen_bytes(args[0])
        elif op.name in ("embedding", "index", "index_select", "gather"):
            rows = sum(map(seen_bytes, made))
            table = args[0].untyped_storage()._cdata
            op.reads[table] = min(op.reads.get(table, 0), rows)
            narrow = args[0].size(-1) * args[0].element_size() < 256
            op.scattered = float(op.reads[table]) if narrow else 0.0

    def kind_of(self, name: str, made: list[torch.Tensor]) -> str:
        if name in LOSSES:
            return LOSS
        if name in GATHERS:
            return GATHER
        first = next((tensor for tensor in made if tensor.numel() > 1), None)
        if first is None:
            return POINTWISE
        if self.phase in (FORWARD, BACKWARD) and not first.is_floating_point():
            return GATHER  # hashes, masks and rows of tables are all integers
        is_logits = first.ndim > 1 and first.size(-1) == self.vocab_size
        return LOSS if is_logits and self.phase in (FORWARD, BACKWARD) else POINTWISE

    def attention(self, tensors: list, made: list, pairs: int, backward: bool) -> None:
        """Records an attention of q, k, v and what else it reads, (B, H, T, d) each."""
        q, _, v = tensors[:3]
        flops = 2.0 * q.size(0) * q.size(1) * pairs * (q.size(3) + v.size(3))
        self.ops.append(Op(
            self.phase, ATTEND, "attention", flops * (2.5 if backward else 1), flops * (2 if backward else 1),
            self.memory(tensors), self.memory(made), head=q.size(3),
            shapes=tuple(tuple(tensor.shape) for tensor in tensors[:3]),
        ))

    def collective(self, name: str, tensors: list[torch.Tensor]) -> None:
        """Bytes by a ring: an all-reduce goes round twice, everything else once."""
        whole = max((seen_bytes(tensor) for tensor in tensors if tensor.is_meta), default=0)
        if whole and self.world_size > 1:
            rounds = 2 if name == "all_reduce" else 1
            sent = rounds * whole * (self.world_size - 1) / self.world_size
            self.ops.append(Op(self.phase, COLLECTIVE, name, sent=sent))


class Attention(torch.autograd.Function):
    """In the place of a kernel: the right shapes both ways, and the FLOPs of the visible pairs."""

    @staticmethod
    def forward(ctx, q, k, v, counter: Counter, pairs: int):
        out = q.new_empty(*q.shape[:-1], v.size(-1))
        ctx.save_for_backward(q, k, v, out)
        ctx.counter, ctx.pairs = counter, pairs
        counter.attention([q, k, v], [out], pairs, False)
        return out

    @staticmethod
    def backward(ctx, grad):
        made = [torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]]
        ctx.counter.attention([*ctx.saved_tensors, grad], made, ctx.pairs, True)
        return *made, None, None


class AttentionTap(TorchFunctionMode):
    """Takes torch's attention out of the script's hands, whatever asks for it.

    A mask is causal here, with or without documents: what documents hide is counted, windows are not.
    """

    def __init__(self, counter: Counter):
        super().__init__()
        self.counter, self.window = counter, 0  # of the layer that runs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args)) | kwargs
        q, k, v = (given[name] for name in names[:3])
        causal = bool(given.get("is_causal")) or given.get("attn_mask") is not None
        pairs = visible_pairs(q.size(2), k.size(2), causal, self.window)
        return Attention.apply(q, k, v, self.counter, pairs)

    def watch(self, model: torch.nn.Module) -> None:
        """Knows from now on how many keys a query of the layer that runs sees; 0: all."""
        def enter(module, _):
            self.window = getattr(module, "window", 0)

        for module in model.modules():
            if isinstance(getattr(module, "layer", None), int):
                module.register_forward_pre_hook(enter)


class Collectives:
    """`torch.distributed` for a rank that is alone: collectives are counted, nothing is sent."""

    COUNTED = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "reduce_scatter_single",
               "all_gather_single", "all_to_all_single", "broadcast", "reduce", "all_gather")

    def __init__(self, counter: Counter):
        self.counter = counter

    def __getattr__(self, name: str):
        if name not in self.COUNTED:
            return getattr(torch.distributed, name)

        def call(*args, **kwargs):
            self.counter.collective(name, tensors_of((args, kwargs)))
            return mock.Mock(name="work")
        return call


# -----------------------------------------------------------------------------
# TRAFFIC
# -----------------------------------------------------------------------------


@dataclass(eq=False)
class Segment:
    """Operations that run as one: a product, an attention, or neighbours that a compiler fuses."""

    ops: list[Op]
    reads: dict = field(default_factory=dict)
    writes: dict = field(default_factory=dict)

    @property
    def phase(self) -> str:
        return self.ops[0].phase

    @property
    def kind(self) -> str:
        return self.ops[0].kind

    @property
    def fusable(self) -> bool:
        return self.kind in (POINTWISE, GATHER, LOSS)

    @property
    def moved(self) -> float:
        return sum(self.reads.values()) + sum(self.writes.values())

    @property
    def group(self) -> str:
        if self.kind == COLLECTIVE:
            return "reductions and gathers"
        if self.phase in (FORWARD, BACKWARD):
            fixed = {GATHER: "hash lookups", LOSS: "loss and head softmax"}
            plural = "products" if self.kind == PRODUCT else self.kind
            return fixed.get(self.kind, f"{plural} {self.phase}")
        return "Muon" if self.phase == MUON else "AdamW, RowAdagrad, EMA"


def segments(ops: list[Op], compiled: bool) -> tuple[list[Segment], float]:
    """The operations of a step as they run, and the bytes that its forward keeps for its backward.

    Eager, each operation reads and writes all that it names. Compiled, neighbours of one kind in a forward
    or a backward are one kernel: it reads each tensor from outside once and writes only what others read. A
    tensor that only the backward asks for is computed again there from its kernel's inputs where this moves
    fewer bytes, as the min-cut partitioner of torch does. The optimizers' step is eager in every script.
    """
    found: list[Segment] = []
    for op in ops:
        last = found[-1] if found else None
        fuses = compiled and op.phase in (FORWARD, BACKWARD) and op.kind in (POINTWISE, GATHER, LOSS)
        if fuses and last and last.kind == op.kind and last.phase == op.phase:
            last.ops.append(op)
        else:
            found.append(Segment([op]))

    # what each reads from outside, who made a storage, and who reads it later
    maker, readers, size = {}, defaultdict(list), {}
    for number, segment in enumerate(found):
        own = set()
        for op in segment.ops:
            for key, count in op.reads.items():
                if key not in own:
                    segment.reads[key] = max(segment.reads.get(key, 0), count)
            for key, count in op.writes.items():
                own.add(key)
                segment.writes[key] = max(segment.writes.get(key, 0), count)
                size[key] = max(size.get(key, 0), count)
        for key in segment.reads:
            readers[key].append(number)
        for key in segment.writes:
            maker.setdefault(key, number)
    if compiled:
        for number, segment in enumerate(found):
            if segment.fusable and segment.phase in (FORWARD, BACKWARD):
                segment.writes = {key: count for key, count in segment.writes.items()
                                  if any(reader > number for reader in readers[key])}
                recompute(number, found, maker, readers)

    kept = {key for segment in found if segment.phase == BACKWARD for key in segment.reads
            if key in maker and found[maker[key]].phase == FORWARD}
    return found, float(sum(size[key] for key in kept))


def recompute(number: int, found: list[Segment], maker: dict, readers: dict) -> None:
    """Drops what a forward kernel would write only for the backward, where its inputs serve as well."""
    segment = found[number]
    late = {key for key in segment.writes if maker[key] == number and segment.phase == FORWARD
            and all(found[reader].phase == BACKWARD and found[reader].fusable for reader in readers[key])}
    users = {reader for key in late for reader in readers[key]}
    save = sum(segment.writes[key] for key in late)
    save += sum(found[user].reads.get(key, 0) for user in users for key in late)
    again = sum(count for user in users for key, count in segment.reads.items()
                if key not in found[user].reads)
    if not late or again >= save:
        return
    for key in late:
        del segment.writes[key]
    for user in users:
        for key in late:
            found[user].reads.pop(key, None)
        found[user].reads |= {key: count for key, count in segment.reads.items()
                              if key not in found[user].reads}


# -----------------------------------------------------------------------------
# PRICES
# -----------------------------------------------------------------------------


class Gpu:
    """Prices a segment by a card's rates."""

    def __init__(self, card: Card, dtype: torch.dtype, compiled: bool):
        self.card, self.compiled = card, compiled
        bf16 = dtype == torch.bfloat16
        self.name, self.gap = card.name, 1e-3 * card.gap.value
        self.peak = 1e12 * (card.peak if bf16 else card.peak_fp32).value
        self.product = self.peak * card.product.value
        # fp32 attention has no kernel of its own there: torch's runs at about the rate of its products
        self.attention = card.attention if bf16 else {64: (0.5 * self.product / 1e12,) * 2}
        self.bytes = 1e12 * card.bandwidth.value * card.achieved.value

    def seconds(self, segment: Segment, world_size: int) -> float:
        card, first = self.card, segment.ops[0]
        fused = self.compiled and segment.phase in (FORWARD, BACKWARD)
        floor = 1e-6 * (card.kernel if fused else card.launch).value
        if segment.kind == COLLECTIVE:
            return 1e-6 * card.latency.value + first.sent / (1e9 * card.bus.value)
        if segment.kind == ATTEND:
            width = min(self.attention, key=lambda width: abs(width - first.head))
            rate = self.attention[width][segment.phase == BACKWARD]
            # narrower heads than the table's waste what they leave of a tile
            return max(floor, first.flops / (1e12 * rate * min(1.0, first.head / width)))
        if segment.kind == PRODUCT:
            busy = min(1.0, first.tiles / card.multiprocessors)  # small products leave some idle
            return max(floor, first.flops / (self.product * busy), segment.moved / self.bytes)

        scattered = sum(op.scattered for op in segment.ops)
        spread = card.spread.value if fused else 1.0
        time = spread * max(segment.moved - scattered, 0) / self.bytes
        return max(floor, time + scattered / (1e12 * card.bandwidth.value * card.scattered.value))

    def table(self) -> list[list[str]]:
        """Rows of the rates in use: name, value, unit, source."""
        card = self.card
        rates = {
            "dense bf16 peak": card.peak, "fp32 peak": card.peak_fp32, "products": card.product,
            "memory": card.bandwidth, "memory, achieved": card.achieved, "scattered rows": card.scattered,
            "fused pointwise": card.spread, "all-reduce": card.bus, "start of a collective": card.latency,
            "eager launch": card.launch, "shortest kernel": card.kernel, "idle": card.gap,
        }
        rows = [[name, f"{rate.value:.4g}", rate.unit, rate.source + " (plan)" * rate.plan]
                for name, rate in rates.items()]
        return rows + [[f"attention, head {width}, forward / backward", f"{forward} / {backward}", "TFLOP/s",
                        f"{card.attention_source} (plan)"]
                       for width, (forward, backward) in card.attention.items()]


def real(tensor: torch.Tensor, top: int) -> torch.Tensor:
    """A tensor of this shape, these strides and made-up numbers; integers are below `top`."""
    if not tensor.is_meta:
        return tensor
    room = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    if tensor.dtype == torch.bool:
        flat = torch.rand(room) < 0.5
    elif tensor.is_floating_point():
        flat = torch.empty(room).uniform_(0.1, 1.0).to(tensor.dtype)
    else:
        flat = torch.randint(max(top, 1), (room,), dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride()) if tensor.numel() else tensor.new_empty(
        tensor.shape, device="cpu")


def own_seconds() -> float:
    """A clock that does not run while one thread waits for other programs; that of the wall for several."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Cpu:
    """Prices a segment by what this machine does at the moment, in this process and its threads.

    An operation of the step is run again by itself on made-up numbers: each product shape that matters, the
    attention's rung both ways, and of every other kind of operation the one that moves most. Others of a kind
    are priced by its bytes a second, and each pays what the smallest possible operation takes.
    """

    SECONDS = 0.12  # of measuring an operation, at least three runs
    PRODUCTS = 16  # shapes that are measured: the others take the mean rate
    MOST = 1 << 30  # bytes of an operation that is run: larger ones take the copy's rate
    gap = 0.0

    def __init__(self, dtype: torch.dtype, compiled: bool, attend):
        self.dtype, self.compiled, self.attend = dtype, compiled, attend
        self.name = f"cpu ({torch.get_num_threads()} threads)"
        self.products: dict[tuple, float] = {}  # seconds of a shape
        self.rates: dict[str, float] = {}  # bytes a second by name of the operation
        self.heads: dict[tuple, float] = {}  # FLOP/s of attention by (width, backward)

    def time(self, call, seconds: float | None = None) -> float:
        """Seconds of a call: the mean of several."""
        call()
        count, start = 0, own_seconds()
        while (passed := own_seconds() - start) < (seconds or self.SECONDS) or count < 3:
            call()
            count += 1
        return passed / count

    def run(self, op: Op) -> float:
        """Seconds of an operation by itself."""
        func, args, kwargs = op.call
        top = self.largest_index(op)
        sets = [tree_map(lambda leaf: real(leaf, top) if isinstance(leaf, torch.Tensor) else leaf,
                         (args, {key: value for key, value in kwargs.items() if key != "device"}))
                for _ in range(2)]
        if "device" in kwargs:
            for _, words in sets:
                words["device"] = torch.device("cpu")
        turn = iter(range(1 << 62))

        def call():
            given, words = sets[next(turn) % 2]
            func(*given, **words)
        with torch.no_grad():
            return self.time(call)

    @staticmethod
    def largest_index(op: Op) -> int:
        func, args, _ = op.call
        if op.name == "embedding":
            return args[0].size(0)
        if op.name == "embedding_dense_backward":
            return args[2]
        sizes = [size for tensor in tensors_of(op.call[1:]) for size in tensor.shape if size > 1]
        return min(sizes, default=1)

    @staticmethod
    def shape(op: Op) -> tuple:
        return op.name, *((*tensor.shape, *tensor.stride()) for tensor in tensors_of(op.call[1:]))

    def measure(self, ops: list[Op]) -> None:
        """Fills the tables with what these operations need."""
        size = 2048
        a = torch.rand(size, size).to(self.dtype)
        self.peak = 2 * size**3 / self.time(lambda: a @ a, 0.5)
        b = torch.rand(1 << 24)
        self.bytes = 2 * b.nbytes / self.time(b.clone)
        one = torch.rand(1)
        self.call_seconds = self.time(lambda: one * one)

        shapes, kinds = {}, {}
        for op in ops:
            if op.kind == PRODUCT:
                key = self.shape(op)
                shapes[key] = (shapes.get(key, (0, 0))[0] + op.flops, op)
            elif op.kind == ATTEND:
                self.measure_attention(op)
            elif op.call and op.moved > kinds.get(op.name, Op("", "", "")).moved:
                kinds[op.name] = op
        for key, (_, op) in sorted(shapes.items(), key=lambda item: -item[1][0])[: self.PRODUCTS]:
            self.products[key] = self.run(op)
        self.product = sum(shapes[key][1].flops for key in self.products) / max(
            sum(self.products.values()), 1e-12)
        for name, op in kinds.items():
            if op.moved < self.MOST:
                self.rates[name] = op.moved / max(self.run(op) - self.call_seconds, 1e-9)

    def measure_attention(self, op: Op) -> None:
        q, k, v = op.shapes
        key = q[3], op.phase == BACKWARD
        if (q[3], True) in self.heads or (key in self.heads and not key[1]):
            return
        # the script's own rung takes (B, T, H, d); some rows say as much as all
        rows = max(1, min(q[0], 8192 // q[2]))
        flops = op.flops * rows / q[0] / (2.5 if key[1] else 1)
        q, k, v = (torch.randn(rows, size[2], size[1], size[3], dtype=self.dtype) for size in (q, k, v))
        self.heads[q.size(3), False] = flops / self.time(lambda: self.attend(q, k, v))
        for tensor in (q, k, v):
            tensor.requires_grad_(True)
        out = self.attend(q, k, v)
        grad = torch.randn_like(out)
        both = self.time(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
        self.heads[q.size(3), True] = 2.5 * flops / both

    def seconds(self, segment: Segment, world_size: int) -> float:
        first = segment.ops[0]
        if segment.kind == COLLECTIVE:  # gloo: 0.35 ms for two ranks, measured 2026-11-29; then copies
            return 3.5e-4 * math.log2(world_size) + first.sent / self.bytes
        if segment.kind == ATTEND:
            return first.flops / self.heads[first.head, segment.phase == BACKWARD]
        if segment.kind == PRODUCT:
            known = self.products.get(self.shape(first))
            return known if known is not None else self.call_seconds + first.flops / self.product
        if self.compiled and segment.phase in (FORWARD, BACKWARD):
            return self.call_seconds + segment.moved / self.bytes
        return self.call_seconds + segment.moved / self.rates.get(first.name, self.bytes)

    def table(self) -> list[list[str]]:
        rows = [["product of 2048^3", f"{self.peak / 1e9:.1f}", "GFLOP/s", "measured now"],
                ["products of the model's shapes", f"{self.product / 1e9:.1f}", "GFLOP/s", "measured now"],
                ["copy", f"{self.bytes / 1e9:.1f}", "GB/s", "measured now"],
                ["shortest operation", f"{1e6 * self.call_seconds:.1f}", "us", "measured now"]]
        for (head, backward), rate in self.heads.items():
            way = "backward" if backward else "forward"
            rows.append([f"attention, head {head}, {way}", f"{rate / 1e9:.1f}", "GFLOP/s", "measured now"])
        slowest = sorted(self.rates.items(), key=lambda item: item[1])[:12]
        rows += [[f"`{name}`", f"{rate / 1e9:.2f}", "GB/s", "measured now"] for name, rate in slowest]
        return rows


# -----------------------------------------------------------------------------
# A SCRIPT ON PAPER
# -----------------------------------------------------------------------------


def picked_rung(module: ModuleType, args, runtime) -> str:
    """The attention that a script picks for this runtime; what it takes has changed over the years."""
    known = {"args": args, "runtime": runtime, "device": runtime.device, "dtype": runtime.dtype}
    takes = inspect.signature(module.pick_attention).parameters
    return module.pick_attention(*(known[name] for name in takes))


def attention_of(module: ModuleType, rung: str):
    """A rung as a function of q, k and v (B, T, H, d)."""
    return module.attention_of(rung) if hasattr(module, "attention_of") else module.ATTENTION[rung]


class Paper:
    """A script's trainer with these settings on meta tensors, and what it does, counted.

    Raises:
        Misuse: the script refuses the settings, or does something that needs numbers.
    """

    def __init__(self, script: Path, settings: dict[str, str], environ: dict[str, str], world_size: int,
                 on_gpu: bool):
        self.script, self.world_size = script, world_size
        self.module = module = load_script(script)
        names = self.known_names()
        for name in settings:
            if name not in names:
                raise Misuse(f"{name} is no setting of this script: python train_gpt.py --help lists them")
        self.settings = {name: environ[name] for name in names if environ.get(name)} | settings
        try:
            self.args = module.Hyperparameters({**environ, **settings})
        except module.UserError as error:
            raise Misuse(str(error)) from None
        # the real runtime knows what this machine would choose; then it gets the ranks and no data
        own = {"DEVICE": "cpu", "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
        if on_gpu:
            own |= {"DTYPE": "bf16" if self.args.dtype == "auto" else self.args.dtype}
            own |= {"COMPILE": "0" if self.args.compile == "0" else "1"}
        own = {**environ, **settings, **own}
        self.runtime = runtime = module.Runtime(module.Hyperparameters(own))
        self.compiled, self.dtype = bool(runtime.compile), runtime.dtype
        self.rung = "sdpa" if on_gpu else picked_rung(module, self.args, runtime)
        runtime.world_size, runtime.device = world_size, torch.device("meta")
        runtime.compile, runtime.attention, runtime.gloo = False, "sdpa", not on_gpu

        self.counter = Counter(self.args.vocab_size, world_size)
        self.tap = AttentionTap(self.counter)
        self.stand_in(on_gpu)
        with self.quiet("to build the model"), torch.device("meta"):
            self.trainer = module.Trainer(self.args, None, runtime, lambda *_, **__: None)
        self.model = self.trainer.model
        self.tap.watch(self.model)
        self.name_phases()

    def stand_in(self, on_gpu: bool) -> None:
        """Takes out of the module what needs other ranks, weights or a GPU."""
        module, alone = self.module, Collectives(self.counter)
        module.dist = alone
        for name, value in list(vars(module).items()):  # other names for a collective
            for counted in Collectives.COUNTED:
                if value is getattr(torch.distributed, counted, alone):
                    setattr(module, name, getattr(alone, counted))
        module.GPT.init_weights = lambda *_: None
        if on_gpu and hasattr(module, "document_mask"):  # flash kernels take lengths, not a mask
            module.document_mask = lambda *_: None
        if on_gpu and hasattr(module, "block_attention"):  # and they know windows
            module.block_attention = lambda q, k, v, *_: module.sdpa_attention(q, k, v)
        module.GPT.losses = self.under(module.GPT.losses, FORWARD)
        if hasattr(module, "training_losses"):
            module.training_losses = module.GPT.losses

    def under(self, function, phase: str):
        """The function, counted in this phase."""
        def call(*args, **kwargs):
            with self.counter.during(phase):
                return function(*args, **kwargs)
        return call

    def known_names(self) -> set[str]:
        """Names of settings that the script reads, or takes from older command lines."""
        known = self.module.Hyperparameters
        older = (getattr(known, kind, ()) for kind in ("RETIRED", "ALIASES"))
        return {var.name for var in known.vars().values()}.union(*older)

    @contextlib.contextmanager
    def quiet(self, purpose: str) -> Iterator[None]:
        """An error of a script on meta tensors is the caller's to know, in one line."""
        try:
            yield
        except self.module.UserError as error:
            raise Misuse(str(error)) from None
        except (NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
            line = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
            raise Misuse(f"{self.script}: no plan: {purpose} it needs numbers ({line})") from error

    def name_phases(self) -> None:
        """Puts the counter into the phase of each part of a step."""
        trainer, optimizers = self.trainer, self.trainer.optimizers
        parts = [(trainer, "micro_step", BACKWARD), (optimizers, "reduce", REDUCE),  # but for its losses
                 (optimizers, "step", OPTIMIZER), (trainer.ema, "update", OPTIMIZER)]
        parts += [(muon, "step", MUON) for muon in getattr(optimizers, "muons", [optimizers.muon])]
        for owner, name, phase in parts:
            setattr(owner, name, self.under(getattr(owner, name), phase))

    @contextlib.contextmanager
    def counting(self, purpose: str) -> Iterator[list[Op]]:
        """Counts what runs inside -> the list that it fills."""
        self.counter.ops = []
        fused = mock.patch("torch.optim.adam._device_dtype_check_for_fused", lambda *_: None)  # knows no meta
        with self.quiet(purpose), fused, self.tap, self.counter:
            yield self.counter.ops

    def moments(self) -> list[tuple[float, float]]:
        """(progress, share of the run) of the kinds of steps that a run has: with which auxiliary terms,
        which layers."""
        shares: dict[tuple, list[float]] = {}
        aux = getattr(self.model, "aux", None)
        for progress in MOMENTS:
            mode = self.trainer.mode(progress) if hasattr(self.trainer, "mode") else None
            terms = aux.weights(progress) if aux is not None else {}
            kind = mode, *(name for name, weight in terms.items() if weight)
            shares.setdefault(kind, []).append(progress)
        return [(moments[0], len(moments) / len(MOMENTS)) for moments in shares.values()]

    def step(self, progress: float) -> list[Op]:
        """A step's operations, with one micro-step of `BatchPlan`'s."""
        plan, length = self.trainer.plan, self.args.train_seq_len
        shape = 1, plan.groups * plan.group, length + 1
        ids = torch.zeros(shape, dtype=torch.int64, device="meta")
        with self.counting("to train") as ops:
            self.trainer.train_step(ids, torch.ones(shape[:2], device="meta"), progress)
        return ops

    def forward(self, rows: int, length: int, span: int) -> list[Op]:
        """Operations of scoring `span` targets in each of `rows` windows."""
        ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
        first = torch.zeros(rows, dtype=torch.int64, device="meta")
        if hasattr(self.trainer, "mode"):
            self.model.looping, _ = self.trainer.mode(1.0)
        with self.counting("to score") as ops, torch.no_grad(), self.counter.during(FORWARD):
            self.module.GPT.logits(self.model, ids, first, span).log_softmax(-1)
        return ops

    def update(self) -> list[Op]:
        """Operations of an update of test-time training."""
        args = self.args
        learner = self.module.TestTimeTraining(self.model, runtime=self.runtime)
        learner.chunks, learner.losses = 1, self.module.GPT.losses
        ids = np.zeros(args.train_seq_len + 1, np.int64)
        with self.counting("to learn while scoring") as ops, self.counter.during(BACKWARD):
            learner.update(ids, np.zeros(args.ttt_batch_rows, np.int64))
        exchanged = next((i for i, op in enumerate(ops) if op.kind == COLLECTIVE), len(ops))
        for op in ops[exchanged:]:  # nothing is left to hide it under
            op.phase = OPTIMIZER
        return ops

    def adapted(self, rows: int, window: int) -> list[Op]:
        """Operations of a chunk of `rows` documents, which their adapters learn once it is scored, at the end
        of `window` ids."""
        learner = self.module.TestTimeTraining(self.model)
        size = min(doc_chunk(self.args), window)
        spans = np.tile([0, window + 1], (rows, 1))  # which go on
        with self.counting("to learn documents") as ops, self.counter.during(FORWARD):
            adapters = self.module.Adapters(self.model, rows)
            learner.adapt_chunk(adapters, np.zeros(window + 2, np.int64), spans, window - size, window)
        return ops

    def persistent_bytes(self) -> float:
        """Weights, averages and the state of every optimizer, after a step."""
        seen, storages = set(), {}
        waiting = [self.trainer]
        while waiting:
            item = waiting.pop()
            if isinstance(item, torch.Tensor):
                storages[item.untyped_storage()._cdata] = item.untyped_storage().nbytes() * item.is_meta
            elif id(item) not in seen and not isinstance(item, (type, ModuleType, Counter, str)):
                seen.add(id(item))
                parts = item.items() if isinstance(item, dict) else enumerate(
                    item if isinstance(item, (list, tuple)) else ())
                own = getattr(item, "__dict__", {})
                waiting += [part for pair in parts for part in pair] + list(own.values())
        return float(sum(storages.values()))


# -----------------------------------------------------------------------------
# THE PLAN
# -----------------------------------------------------------------------------


def priced(ops: list[Op], prices, world_size: int, micro_steps: int = 1) -> tuple[dict[str, dict], float]:
    """{group: its FLOPs, bytes, launches and ms on one rank} of a step, and bytes that a forward keeps."""
    found, kept = segments(ops, prices.compiled)
    groups = {name: {"flops": 0.0, "model_flops": 0.0, "bytes": 0.0, "sent": 0.0, "launches": 0, "ms": 0.0}
              for name in GROUPS}
    for segment in found:
        often = micro_steps if segment.phase in (FORWARD, BACKWARD) else 1
        row = groups[segment.group]
        row["flops"] += often * sum(op.flops for op in segment.ops)
        if segment.phase in (FORWARD, BACKWARD):
            row["model_flops"] += often * sum(op.model_flops for op in segment.ops)
        row["bytes"] += often * segment.moved
        row["sent"] += often * sum(op.sent for op in segment.ops)
        row["launches"] += often
        # a reduction that starts during the backward is under it
        hidden = segment.kind == COLLECTIVE and segment.phase == BACKWARD
        row["ms"] += 0.0 if hidden else often * 1e3 * prices.seconds(segment, world_size)
    groups["gaps"]["ms"] = 1e3 * prices.gap
    return groups, kept


def added(parts: list[tuple[dict, float]]) -> dict:
    """The weighted sum of numbers by group."""
    return {name: {key: sum(weight * groups[name][key] for groups, weight in parts) for key in row}
            for name, row in parts[0][0].items()}


def doc_chunk(args) -> int:
    """Targets of a document between two updates of its adapters; 0 means ByteBest's share of a window."""
    return getattr(args, "doc_chunk", args.ttt_doc_chunk)


def document_lengths(targets: int, longest: float = math.inf) -> np.ndarray:
    """Targets of the validation documents in the order of the text: a lognormal distribution with the
    contest's mean, drawn once. What is longer than `longest` is cut.
    """
    drawn = np.random.default_rng(0).lognormal(0.0, SPREAD, VAL_DOCUMENTS)
    lengths = np.maximum(1, np.rint(drawn * targets / drawn.sum())).astype(int)
    if lengths.max() <= longest:
        return lengths
    counts = -(-lengths // int(longest))
    pieces = np.full(counts.sum(), int(longest))
    pieces[counts.cumsum() - 1] = lengths - (counts - 1) * int(longest)
    return pieces


def adapter_steps(lengths: np.ndarray, chunk: int, batch: int, ranks: int, group: int,
                  together: bool) -> list[list[Tally]]:
    """Chunks that adapters read and learn, {(documents alive, targets before): how often}, of each rank in
    each group: as TestTimeTraining of the script goes through them.

    A group is `group` batches of every rank, the longest documents first. With `together` ranks share each
    batch and meet after each chunk, so that all go at the pace of the first; else they meet after the group.
    """
    groups = []
    for first in range(0, len(lengths), group * batch * ranks):
        longest = -np.sort(-lengths[first:first + group * batch * ranks])
        steps = [Tally() for _ in range(1 if together else ranks)]
        for rank, found in enumerate(steps):
            mine = longest[rank::ranks]
            for start in range(0, len(mine), batch):
                part = mine[start:start + batch]
                for done in range(0, int(part[0]), chunk):
                    found[int((part > done).sum()), done] += 1
        groups.append(steps)
    return groups


def adapter_seconds(paper: Paper, eager, seconds) -> tuple[int, float]:
    """(Chunks that the busiest rank reads, seconds) of a pass with adapters of documents; they run eager."""
    args, learner = paper.args, paper.module.TestTimeTraining
    length, chunk, ranks = args.eval_seq_len, doc_chunk(args), paper.world_size
    batch = max(1, args.eval_batch_tokens // length)
    targets = round(VAL_BYTES / bytes_per_id(args.vocab_size))
    lengths = document_lengths(targets, getattr(args, "ttt_doc_tokens", math.inf))
    group = getattr(learner, "GROUP", len(lengths))  # batches; without groups all documents make one
    if isinstance(eager, Gpu):
        group = getattr(learner, "GROUP_OF_GPUS", group)
    groups = adapter_steps(lengths, chunk, batch, ranks, group, hasattr(learner, "gathered"))

    windows, rows = sorted({chunk, max(chunk, length // 2), length}), sorted({1, batch})
    cost = np.array([[seconds(paper.adapted(each, window), eager) for window in windows] for each in rows])

    def price(found: Tally) -> float:
        alive, done = np.array([*found]).T
        few, many = (np.interp(done + chunk, windows, cost[i]) for i in (0, -1))  # level beyond the last one
        share = (alive - 1) / max(1, batch - 1)
        return float(((few + share * (many - few)) * [*found.values()]).sum())

    slowest = [max(steps, key=price) for steps in groups]
    return sum(sum(found.values()) for found in slowest), sum(map(price, slowest))


def bytes_per_id(vocab_size: int) -> float:
    """Bytes of the contest's text that an id stands for: known for three vocabularies, else between them."""
    if vocab_size <= 260:
        return VAL_BYTES / VAL_TARGETS
    (low, a), (high, b) = BYTES_PER_ID.items()
    return a + (b - a) * math.log2(vocab_size / low) / math.log2(high / low)


def mixture_seconds(script: Path, args, targets: int, rate: float, prices=None, ranks=1) -> float:
    """Seconds of a script's mixture over the validation text on one thread; 0 without one.

    rate: MB/s; 0: what the record has measured, or its parent. `measured/kernels.json` beside the script has
    microseconds a target, to mix and to distil what the network says of it; `measured/mixtures.json` has
    MB/s. A card distils in its own memory, each rank its share: exponentials, a
    permutation and running sums, 40 bytes an id of the vocabulary.
    """
    if not getattr(args, "ppm_weight", 0):
        return 0.0
    folder, about = script.parent / "measured", script.parent / "submission.json"
    parent = read_json(about).get("parent") if about.is_file() else None
    folders = folder, ROOT / (parent or ".") / "measured"
    for path in (each / "kernels.json" for each in folders):
        if rate or not path.is_file():
            continue
        measured = read_json(path)
        distilled = 1e-6 * measured["distil_us_new"]["median"]
        if isinstance(prices, Gpu):
            distilled = 40 * args.vocab_size / prices.bytes / ranks
        return targets * (1e-6 * measured["score_us_new"]["median"] + distilled)

    for path in (each / "mixtures.json" for each in folders):
        if rate or not path.is_file():
            continue
        mark = f"(`MIX={args.mix}`)" if hasattr(args, "mix") else "**"  # bold: the record's own
        for label, *_, cell in read_json(path).get("rows", []):
            if mark in label and (number := re.match(r"[\d.]+", cell)):
                rate = float(number[0])
    return VAL_BYTES / (1e6 * (rate or MIX_RATE))


def mixed_seconds(network: float, mixture: float, args, ranks: int) -> tuple[float, float]:
    """(Seconds of the thread that mixes the longest, seconds of the pass) of a network's seconds and a
    mixture's on one thread.

    A script with MIX_STREAMS cuts the text into as many runs. The network reads them one after another; each
    is mixed meanwhile, by one of MIX_THREADS threads of one of the ranks, but not before it is read. Other
    scripts mix on one thread, which the network waits for.
    """
    if not hasattr(args, "mix_streams"):
        return mixture, network + mixture
    streams = args.mix_streams
    threads = min(streams, ranks * (args.mix_threads or MIX_THREADS))
    busiest = mixture / streams * math.ceil(streams / threads)
    last = network * (1 - 1 / streams) + mixture / streams  # a run that is read last, or waits for its ids
    return busiest, max(network, busiest, last)


def scoring(paper: Paper, prices, mix_rate: float) -> list[dict]:
    """Seconds of every pass over the contest's validation text, by part.

    Each is {"pass", "clock", "forwards" (of a rank), "seconds", and of these "forward", "host", "updates",
    "mixture"}; `clock` is the one that it runs on: that of "validation" has no limit. "mixture", of the
    busiest thread, may run while the others do.
    """
    args, ranks = paper.args, paper.world_size
    targets = round(VAL_BYTES / bytes_per_id(args.vocab_size))
    mixture = mixture_seconds(paper.script, args, targets, mix_rate, prices, ranks)
    length, stride = args.eval_seq_len, args.eval_stride
    batch = max(1, args.eval_batch_tokens // length)
    label = f"final_int{getattr(args, 'bits_by_class', {}).get('mlp', 6)}"
    rows = []

    eager = copy.copy(prices)
    eager.compiled = False

    def seconds(ops: list[Op], rates=prices) -> float:
        groups, _ = priced(ops, rates, ranks)
        return sum(row["ms"] for name, row in groups.items() if name != "gaps") / 1e3

    costs = {span: seconds(paper.forward(batch, length, min(span, length))) for span in {length, stride}}

    def add(name: str, clock: str, span: int, forwards: int, reading: float, updates: float,
            mixed: bool) -> None:
        parts = {"forward": reading, "updates": updates,
                 "host": HOST_SECONDS_PER_WINDOW * targets / span / ranks}
        busiest, total = mixed_seconds(sum(parts.values()), mixture * mixed, args, ranks)
        rows.append({"pass": name, "clock": clock, "forwards": forwards, **parts, "mixture": busiest,
                     "seconds": total})

    for name, clock, span in (
        ("final_raw", "validation", length), ("final_ema", "validation", length),
        (f"{label}_roundtrip", "evaluation", length), (f"{label}_sliding", "evaluation", stride),
    ):
        forwards = math.ceil(targets / (span * batch * ranks))
        add(name, clock, span, forwards, forwards * costs[span], 0.0, name.endswith("sliding"))
    if getattr(args, "ttt", "0") == "0":
        return rows
    name = f"{label}_ttt" if args.ttt_adapt else f"{label}_ttt_off"
    if hasattr(args, "ttt_doc_chunk"):
        forwards, learning = adapter_seconds(paper, eager, seconds)  # reads, too
        add(name, "evaluation", doc_chunk(args), forwards, 0.0, learning, True)
    if not hasattr(args, "ttt_chunk_tokens"):
        return rows

    # every chunk waits for all ranks: a batch is whole even where its windows are few
    chunks = targets // args.ttt_chunk_tokens
    forwards = chunks * math.ceil(args.ttt_chunk_tokens // stride / (batch * ranks))
    learned = math.ceil(args.ttt_chunk_tokens / args.train_seq_len)
    updates = chunks * args.ttt_epochs * math.ceil(learned / args.ttt_batch_rows) * args.ttt_adapt
    learning = updates * seconds(paper.update()) if updates else 0.0
    add(name, "evaluation", stride, forwards, forwards * costs[stride], learning, True)
    return rows


def corrections(module: ModuleType, model: torch.nn.Module, args) -> float:
    """Bytes, at most, of what an exporter adds to rounded matrices: columns with 8 bits (AWQ-lite) and
    products of 3 and 5 bits (LQER). Which matrices get them training decides: here the largest do.
    """
    groups, products = getattr(args, "awq_groups", 0), getattr(args, "lqer_top_k", 0)
    if not (groups or products):
        return 0.0
    shapes = [(p.shape, module.quant_plan(name, p.shape, args)[0]) for name, p in exported(model).items()]
    shapes = [(shape, bits) for shape, bits in shapes if bits and len(shape) == 2]
    finer = sorted((shape[0] * (8 - bits) for shape, bits in shapes), reverse=True)
    long = sorted((sum(shape) for shape, _ in shapes), reverse=True)
    columns = sum(finer[:groups]) * getattr(module, "AWQ_WIDTH", 0)
    return (columns + sum(long[:products]) * getattr(args, "lqer_rank", 0) * 4) / 8


def artifact_bytes(module: ModuleType, model: torch.nn.Module, args) -> tuple[float, str]:
    """(Bytes of the artifact before training, how they were planned): by `rate.size_plan`."""
    if hasattr(module, "quant_plan"):
        size = sum(size_plan(module, model, args).values()) + corrections(module, model, args)
        return size, "the entropy of rounded normals"
    weights = sum(p.numel() for p in exported(model).values())
    return 0.75 * weights, "six bits a weight, more than its coder needs"


def exported(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return model.exported() if hasattr(model, "exported") else dict(model.named_parameters())


def size_of(paper: Paper) -> dict:
    """Bytes of the code and of the artifact, how the latter were planned, and how many weights are in it."""
    with paper.quiet("to plan its size"):
        model, how = artifact_bytes(paper.module, paper.model, paper.args)
    return {"code": paper.script.stat().st_size, "model": int(model), "by": how,
            "weights": sum(p.numel() for p in exported(paper.model).values())}


def run_length(seconds: float, kinds: list[tuple[float, float]], iterations: int) -> tuple[int, list[float]]:
    """(Steps that fit in `seconds`, 0 for no limit; the share of each kind of steps among them).

    kinds: (seconds a step, share of the progress). A run's progress is the larger of its step share and its
    time share: where the clock ends it, a kind has its share of the time, so slow steps are fewer.
    """
    mean = sum(share * step for step, share in kinds)
    if not seconds or mean * iterations <= seconds:
        return iterations, [share for _, share in kinds]
    counts = [share * seconds / step for step, share in kinds]
    return min(iterations, int(sum(counts))), [count / sum(counts) for count in counts]


def training(paper: Paper, prices, kinds: list[tuple[list[Op], float]]) -> dict:
    """What training costs: groups, ms a step, steps inside the clock, memory at the peak.

    kinds: (operations, share of the progress) of each kind of step.
    """
    args, ranks, micro_steps = paper.args, paper.world_size, paper.trainer.plan.micro_steps
    counted = [priced(ops, prices, ranks, micro_steps) for ops, _ in kinds]
    times = [(sum(row["ms"] for row in groups.values()) / 1e3, share)
             for (groups, _), (_, share) in zip(counted, kinds)]

    # the training clock leaves room for three steps and for the calibration, which only reads batches
    reading = sum(row["ms"] for name, row in counted[-1][0].items() if name.endswith("forward")) / 1e3
    batches = args.gptq_batches if getattr(args, "quant_round", "") == "gptq" else 0
    reserve = 1.25 * batches * reading
    usable = args.max_wallclock_seconds - reserve - 3 * max(seconds for seconds, _ in times)
    steps, shares = 0, [share for _, share in times]
    if usable > 0 or not args.max_wallclock_seconds:
        steps, shares = run_length(max(usable, 0.0), times, args.iterations)

    groups = added([(groups, share) for (groups, _), share in zip(counted, shares)])
    ms = sum(row["ms"] for row in groups.values())
    model_flops = sum(row["model_flops"] for row in groups.values())
    tokens = steps * args.train_batch_tokens
    return {
        "groups": groups, "ms_per_step": ms, "model_flops_per_step": ranks * model_flops,
        "mfu": 1e3 * model_flops / (prices.peak * ms), "steps": steps,
        "train_seconds": steps * ms / 1e3 + reserve, "tokens": tokens,
        "bytes": tokens * bytes_per_id(args.vocab_size),
        "memory": memory_of(paper, max(kept for _, kept in counted), kinds[0][0]),
    }


def make_plan(script: Path, settings: dict[str, str], card: str = "h100", world_size: int = 0,
              mix_rate: float = 0.0, environ: dict[str, str] | None = None) -> dict:
    """The whole plan, as `--json` writes it: FLOPs, bytes and milliseconds of one rank.

    settings: the script's, by name; they go before those of `environ`. card: a name of CARDS, or cpu.
    world_size: ranks, 0: the card's usual number. mix_rate: MB/s, 0: see `mixture_seconds`.

    Raises:
        Misuse: an unknown card, a setting that the script refuses, or no plan on meta tensors.
    """
    if card not in (*CARDS, "cpu"):
        raise Misuse(f"--card {card}: {', '.join(CARDS)} or cpu")
    if world_size < 0 or mix_rate < 0:
        raise Misuse(f"--world-size {world_size}, --mix-rate {mix_rate:g}: not below 0")
    sheet = CARDS.get(card)
    ranks = world_size or (sheet.ranks if sheet else 1)
    paper = Paper(script, settings, dict(environ or {}), ranks, sheet is not None)
    kinds = [(paper.step(progress), share) for progress, share in paper.moments()]
    if sheet:
        prices = Gpu(sheet, paper.dtype, paper.compiled)
    else:
        prices = Cpu(paper.dtype, paper.compiled, attention_of(paper.module, paper.rung))
        prices.measure([op for ops, _ in kinds for op in ops])

    place = script.resolve()
    found = {
        "script": str(place.relative_to(ROOT) if place.is_relative_to(ROOT) else script),
        "script_sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
        "settings": dict(sorted(paper.settings.items())), "card": prices.name,
        "world_size": ranks, "dtype": str(paper.dtype).removeprefix("torch."), "compiled": paper.compiled,
        "parameters": sum(p.numel() for p in paper.model.parameters()),
        "micro_steps": paper.trainer.plan.micro_steps, "tokens_per_step": paper.args.train_batch_tokens,
        **training(paper, prices, kinds), "passes": scoring(paper, prices, mix_rate),
        "sizes": size_of(paper), "rates": prices.table(),
    }
    found["decode_seconds"] = found["sizes"]["weights"] / DECODED_PER_SECOND
    found["eval_seconds"] = found["decode_seconds"] + sum(
        row["seconds"] for row in found["passes"] if row["clock"] == "evaluation")
    found["checks"] = checks(found, paper.args, sheet.memory if sheet else 0.0)
    return found


def memory_of(paper: Paper, kept: float, ops: list[Op]) -> dict[str, float]:
    """Bytes at the peak of a step: in the backward, or where gradients are exchanged, whichever is more."""
    weights = 4.0 * sum(p.numel() for p in paper.model.parameters())
    held = paper.persistent_bytes()
    working = max(op.moved for op in ops if op.phase in (FORWARD, BACKWARD))
    peak = held + weights + max(kept + working, weights)
    tokens = paper.trainer.plan.groups * paper.trainer.plan.group * paper.args.train_seq_len
    return {"weights": weights, "gradients": weights, "optimizers and averages": held - weights,
            "kept for the backward": kept, "kept a token": kept / tokens, "working": working, "peak": peak}


def checks(plan: dict, args, room: float) -> list[dict]:
    """What must hold: {"what", "holds", "text"} of both clocks, the byte budget and the card's memory."""
    found = []

    def add(what: str, holds: bool, text: str) -> None:
        found.append({"what": what, "holds": bool(holds), "text": text})

    limit = args.max_wallclock_seconds
    text = f"{plan['train_seconds']:.0f} s, {plan['steps']:,} of {args.iterations:,} steps"
    add(f"MAX_WALLCLOCK_SECONDS={limit:g}", not limit or plan["steps"], text if plan["steps"] else
        f"{text}: calibration and three steps alone take longer")
    limit, seconds = args.eval_budget_seconds, plan["eval_seconds"]
    add(f"EVAL_BUDGET_SECONDS={limit:g}", not limit or seconds <= limit, f"{seconds:.0f} s")
    limit, total = args.artifact_budget_bytes, plan["sizes"]["code"] + plan["sizes"]["model"]
    add(f"ARTIFACT_BUDGET_BYTES={limit}", not limit or total <= limit, f"{total:,} bytes")
    if room:
        peak = plan["memory"]["peak"]
        add(f"memory of {room / 1e9:.0f} GB", peak <= room, f"{peak / 1e9:.1f} GB, by DEVICE_BATCH_TOKENS")
    return found


# -----------------------------------------------------------------------------
# WHAT IS SHOWN
# -----------------------------------------------------------------------------

HEADER = ["group", "TFLOP", "GB moved", "MB sent", "launches", "ms", "share"]


def group_rows(plan: dict) -> list[list[str]]:
    """A row a group and one of all, as the table shows them."""
    total = {key: sum(row[key] for row in plan["groups"].values())
             for key in ("flops", "bytes", "sent", "launches", "ms")}
    rows = []
    for name, row in [*plan["groups"].items(), ("**all**", total)]:
        rows.append([
            name, f"{row['flops'] / 1e12:.4g}", f"{row['bytes'] / 1e9:.3g}", f"{row['sent'] / 1e6:.3g}",
            f"{row['launches']:.0f}", f"{row['ms']:.2f}", f"{row['ms'] / total['ms']:.0%}"])
    return rows


def report(plan: dict, rates: bool = False) -> str:
    """What a plan says, as Markdown; `rates`: with the rates that priced it."""
    compiled = "compiled" if plan["compiled"] else "eager"
    settings = " ".join(f"{name}={value}" for name, value in plan["settings"].items()) or "defaults"
    name = Path(plan["script"])
    name = name.parent.name if "records" in name.parts else name.name
    mb, memory, sizes = plan["bytes"] / 1e6, plan["memory"], plan["sizes"]
    parts = ", ".join(f"{key} {value / 1e9:.2f}" for key, value in memory.items()
                      if key not in ("peak", "kept a token"))
    lines = [
        f"Plan of {name} ({settings}): {plan['parameters'] / 1e6:.2f} M parameters, "
        f"{plan['world_size']} rank{'s' * (plan['world_size'] > 1)} of {plan['card']}, {plan['dtype']}, "
        f"{compiled}, {plan['tokens_per_step']:,} tokens a step, {plan['micro_steps']} forward"
        f"{'s' * (plan['micro_steps'] > 1)} a rank. FLOP, bytes and ms are one rank's.", "",
        markdown_table(HEADER, group_rows(plan)), "",
        f"{plan['ms_per_step']:.1f} ms a step, MFU {plan['mfu']:.3f} "
        f"({plan['model_flops_per_step'] / 1e12:.1f} model TFLOP over all ranks), {plan['steps']:,} steps in "
        f"{plan['train_seconds']:.0f} s: {plan['tokens'] / 1e6:,.0f} M ids, {mb:,.0f} MB of text.", "",
        f"Memory at the peak {memory['peak'] / 1e9:.2f} GB a rank: {parts}; "
        f"{memory['kept a token'] / 1e3:.0f} kB kept a token.", "", markdown_table(
            ["pass", "clock", "forwards", "forward s", "host s", "updates s", "mixture s", "seconds"],
            [[row["pass"], row["clock"], f"{row['forwards']:,}",
              *(f"{row[key]:.1f}" for key in ("forward", "host", "updates", "mixture", "seconds"))]
             for row in plan["passes"]]), "",
        f"Decoding the artifact {plan['decode_seconds']:.1f} s. Planned bytes: code {sizes['code']:,}, model "
        f"{sizes['model']:,} by {sizes['by']}.", ""]
    lines += [f"{'holds' if item['holds'] else 'BROKEN'}: {item['what']}: {item['text']}"
              for item in plan["checks"]]
    if rates:
        lines += ["", markdown_table(["rate", "value", "unit", "source"], plan["rates"])]
    return "\n".join(lines)


def parse_settings(words: list[str]) -> dict[str, str]:
    """`NAME=VALUE` words -> {name: value}.

    Raises:
        Misuse: a word of another form.
    """
    given = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise Misuse(f"{word!r} is no setting: NAME=VALUE, as NUM_LAYERS=6")
        given[name] = value
    return given


def run(options: argparse.Namespace) -> int:
    """`bench.py --plan` -> the exit code: 3 where a clock, the byte budget or the memory does not hold."""
    plan = make_plan(find_script(options.script), parse_settings(options.settings), options.card,
                     options.world_size, options.mix_rate, dict(os.environ))
    print(report(plan, rates=True))
    if options.json:
        write_atomic(Path(options.json), json.dumps(plan, indent=1).encode())
    return 0 if all(item["holds"] for item in plan["checks"]) else BROKEN


# -----------------------------------------------------------------------------
# AGAINST REALITY
# -----------------------------------------------------------------------------


def real_steps(script: Path, settings: dict[str, str]):
    """A trainer with weights and a function that runs one of its steps on made-up ids."""
    module = load_script(script)
    args = module.Hyperparameters(settings)
    runtime = module.Runtime(args)
    runtime.attention = picked_rung(module, args, runtime)
    trainer = module.Trainer(args, None, runtime, lambda *_, **__: None)
    plan = trainer.plan
    shape = plan.micro_steps, plan.groups * plan.group, args.train_seq_len + 1
    ids = torch.randint(4, args.vocab_size, shape)
    weights = torch.ones(shape[:2])
    return lambda: trainer.train_step(ids, weights, 0.0)


def compare(script: Path, name: str, sizes: dict, steps: int) -> dict:
    """A model's step on this CPU, eager in fp32: {"model", "predicted_ms", "measured_ms", "ratio", "plan"}.

    Half of the steps run before the rates are measured, half after: a machine that others use drifts.
    """
    from bench import settings_of
    settings = settings_of(str(script), {**sizes, "COMPILE": 0, "DTYPE": "fp32"})
    step, times = real_steps(script, settings), []

    def run() -> None:
        for _ in range(-(-steps // 2)):
            start = own_seconds()
            step()
            times.append(own_seconds() - start)
    step()
    run()
    plan = make_plan(script, settings, "cpu")
    run()
    measured = 1e3 * statistics.median(times)
    predicted = plan["ms_per_step"]
    return {"model": name, "predicted_ms": predicted, "measured_ms": measured, "ratio": predicted / measured,
            "fastest_ms": 1e3 * min(times), "slowest_ms": 1e3 * max(times), "plan": plan}


def main() -> int:
    from bench import SIZES
    parser = argparse.ArgumentParser(description="The plan of three models held against this CPU.")
    parser.add_argument("--script", default="trunk", help="a script or a record's folder")
    parser.add_argument("--steps", type=int, default=6, help="measured steps a model")
    parser.add_argument("--json", default="", help="also write all numbers to this file")
    options = parser.parse_args()

    script, found = find_script(options.script), []
    for name, sizes in SIZES.items():
        found.append(compare(script, name, sizes, options.steps))
        print(f"{name}: done", file=sys.stderr)
    header = ["model", "predicted ms", "measured ms", "fastest to slowest", "predicted / measured"]
    print(markdown_table(header, [
        [row["model"], f"{row['predicted_ms']:.0f}", f"{row['measured_ms']:.0f}",
         f"{row['fastest_ms']:.0f} to {row['slowest_ms']:.0f}", f"{row['ratio']:.2f}"] for row in found]))
    print(f"\n{found[0]['plan']['card']}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    if options.json:
        write_atomic(Path(options.json), json.dumps(found, indent=1).encode())
    return 0 if all(0.8 <= row["ratio"] <= 1.25 for row in found) else 1


if __name__ == "__main__":
    command(main)
