"""The record BiJEPAX: #2080's network against its formulas, its two
heads, its quantiser, and adapters that learn a document at a time."""

import functools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, assert_causal, assert_stream_follows_score, enlivened, slow
from family import load_script
from hypothesis import given, settings
from hypothesis import strategies as st

RECORD, = (ROOT / "records").glob("*_BiJEPAX")
section = load_script(RECORD)
compressors = load_script(RECORD / "compressors.py")

# The tiny model of the tests, in the variables that this record
# has: layer 1 runs three times, layers 2 and 3 have two lanes.
HERE = {name: "" for name in TINY if name.startswith(("JEPA_", "NGRAM_", "BIGRAM_"))} | {
    "VOCAB_SIZE": 260, "NUM_LAYERS": 4, "LOOP_FIRST": 1, "LOOP_LAST": 1, "PARALLEL_START": 2,
    "XSA_LAST_N": 4, "GATE_WINDOW": 6, "BIJEPAX_STRIDE": 8, "PPM_WEIGHT": 0, "TTT_DOC_CHUNK": 16,
    "TTT_LORA_RANK": 4, "TTT_LORA_LR": 0.01,
}
ARMS = {
    "default": {}, "no recurrence": {"LOOP_EXTRA": 0}, "one lane": {"PARALLEL_START": 9},
    "two layers again": {"LOOP_FIRST": 0, "LOOP_EXTRA": 3},
    "documents see others": {"DOC_MASK": 0}, "hops": {"BIJEPAX_FWD_HOPS": 9},
}


def tiny(**overrides):
    return section.Hyperparameters({**TINY, **{k: str(v) for k, v in {**HERE, **overrides}.items()}})


def alive(seed: int = 0, **overrides):
    return enlivened(section, tiny(**overrides), seed)


def batch(rows: int = 4, seed: int = 0, length: int = 65):
    ids = torch.randint(4, 260, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[0, 20] = ids[-1, 0] = ids[-1, 13] = 1
    return ids


def text(corpus, size: int = 150) -> np.ndarray:
    ids = np.fromfile(next(corpus.glob("*_val_*.bin")), "<u2", offset=1024)[:size].astype(np.int64)
    ids[[31, 40, 97]] = 1  # documents of many lengths
    return ids


def test_published_settings_are_the_defaults():
    args = section.Hyperparameters({})
    published = {
        "num_layers": 11, "model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "mlp_mult": 4.0,
        "vocab_size": 8192, "train_seq_len": 2048, "train_batch_tokens": 786432, "eval_stride": 512,
        "rope_base": 10000.0, "rope_dims": 16, "qk_gain_init": 5.25, "logit_softcap": 30.0,
        "ln_scale": True, "loop_first": 3, "loop_last": 5, "loop_extra": 2, "loop_start": 0.35,
        "parallel_start": 8, "xsa_last_n": 11, "gate_window": 12, "gate_scale": 0.5,
        "leaky_slope": 0.3, "matrix_lr": 0.026, "muon_wd": 0.095, "muon_momentum": 0.97,
        "tied_embed_lr": 0.03, "embed_wd": 0.085, "scalar_lr": 0.02, "adam_wd": 0.02, "beta1": 0.9,
        "beta2": 0.99, "min_lr": 0.1, "grad_clip_norm": 0.3, "ema_decay": 0.9965,
        "bijepax_weight": 0.01, "bijepax_start_frac": 0.35, "bijepax_end_frac": 0.8,
        "bijepax_head_dim": 32, "bijepax_stride": 64, "bijepax_lr": 0.001, "lqer_top_k": 1,
        "lqer_rank": 4, "awq_groups": 1, "ttt": "0",
    }
    assert {name: getattr(args, name) for name in published} == published
    assert args.hops == [4, -4] and args.warmdown_iters == 0.85 * args.iterations
    assert args.bits_by_class["embed"] == 7 and args.bits_by_class["attn"] == args.bits_by_class["mlp"] == 6


def test_published_tensor_list():
    """35,945,673 parameters, less 50 that nothing ever moved: lanes
    of layers without lanes, and two caps that were in no optimizer."""
    with torch.device("meta"):
        model = section.GPT(section.Hyperparameters({}))
    found = {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith("aux.")}
    published = {
        "tok_emb.weight": (8192, 512), "skip_weights": (8, 512), "skip_gates": (8, 512),
        "smear.gate": (1, 12), "smear.size": (1,),
    }
    matrices = {
        "attn.c_q": (512, 512), "attn.proj": (512, 512), "attn.c_k": (256, 512),
        "attn.c_v": (256, 512), "mlp.fc": (2048, 512), "mlp.proj": (512, 2048),
    }
    for i in range(11):
        published |= {f"blocks.{i}.{name}.weight": shape for name, shape in matrices.items()}
        published |= {
            f"blocks.{i}.{name}": shape
            for name, shape in {
                "attn.q_gain": (8,), "attn.gate": (8, 12), "attn_scale": (512,),
                "mlp_scale": (512,), "resid_mix": (2, 512),
                **({"lane_gain": (2, 2), "lane_keep": (2,)} if i >= 8 else {}),
            }.items()
        }
    assert found == published
    dead = 8 * (2 * 2 + 2) + 2
    assert sum(map(math.prod, published.values())) == 35_945_673 - dead
    heads = {name: p for name, p in model.named_parameters() if name.startswith("aux.")}
    assert sum(p.numel() for p in heads.values()) == 65_664 and not set(heads) & set(model.exported())


def test_the_stacks_of_muon_are_the_published_banks():
    args = section.Hyperparameters({})
    with torch.device("meta"):
        model = section.GPT(args)
    named = [p for name, p in model.named_parameters() if section.Optimizers.group_of(name, p) == "matrix"]
    muon = section.Muon(named, args, SimpleNamespace(world_size=1, dtype=torch.bfloat16, device="meta"))
    assert {tuple(m.shape) for m in muon.momenta} == {
        (22, 512, 512),
        (22, 256, 512),
        (11, 2048, 512),
        (11, 512, 2048),
    }


def test_published_routes():
    route = section.routes(section.Hyperparameters({}))
    assert route[False] == [*range(11)]
    assert route[True] == [0, 1, 2, 3, 4, 5, 3, 4] + [5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert len(route[True]) // 2 == 8
    # Layers that are not there do not run
    assert section.routes(tiny(LOOP_FIRST=3, LOOP_LAST=7))[True] == [0, 1, 2, 3, 3, 3]


def reference(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one row in float64, from the specification's
    formulas, position by position and head by head."""
    args, w = model.args, {name: p.detach().double() for name, p in model.named_parameters()}
    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    length, heads, groups, dim = len(ids), args.num_heads, args.num_kv_heads, args.model_dim // args.num_heads
    e = w["tok_emb.weight"][ids]
    x = e.clone()
    for t in range(1, length):
        if ids[t] != 1 and args.gate_window:
            x[t] += w["smear.size"] * torch.sigmoid(w["smear.gate"][0] @ e[t, : args.gate_window]) * e[t - 1]
    x = x0 = norm(x)
    document = (ids == 1).cumsum(0) * args.doc_mask

    def rotate(v, t):  # v (d)
        half, out = args.rope_dims // 2, v.clone()
        for j in range(half):
            angle = t * args.rope_base ** (-2 * j / args.rope_dims)
            out[j] = v[j] * math.cos(angle) + v[half + j] * math.sin(angle)
            out[half + j] = v[half + j] * math.cos(angle) - v[j] * math.sin(angle)
        return out

    def attention(i, h):
        q, k, v = (h @ w[f"blocks.{i}.attn.{c}.weight"].T for c in ("c_q", "c_k", "c_v"))
        out = torch.zeros(length, heads, dim, dtype=torch.float64)
        for a in range(heads):
            g = a * groups // heads
            keys = torch.stack([rotate(norm(k[t, g * dim : (g + 1) * dim]), t) for t in range(length)])
            values = v[:, g * dim : (g + 1) * dim]
            for t in range(length):
                query = rotate(norm(q[t, a * dim : (a + 1) * dim]), t) * w[f"blocks.{i}.attn.q_gain"][a]
                seen = torch.tensor([s <= t and document[s] == document[t] for s in range(length)])
                share = torch.softmax((keys @ query / dim**0.5).masked_fill(~seen, -math.inf), 0)
                y, own = share @ values, F.normalize(values[t], dim=0)
                if i >= args.num_layers - args.xsa_last_n:
                    y = y - (y @ own) * own
                if args.gate_window:
                    y = y * torch.sigmoid(
                        args.gate_scale * w[f"blocks.{i}.attn.gate"][a] @ h[t, : args.gate_window]
                    )
                out[t, a] = y
        return out.flatten(1) @ w[f"blocks.{i}.attn.proj.weight"].T

    def mlp(i, z):
        up = z @ w[f"blocks.{i}.mlp.fc.weight"].T
        return torch.where(up > 0, up, 0.3 * up).square() @ w[f"blocks.{i}.mlp.proj.weight"].T

    looping = args.loop_extra if model.looping else 0
    order = [
        *range(args.loop_last + 1),
        *[*range(args.loop_first, args.loop_last + 1)] * looping,
        *range(args.loop_last + 1, args.num_layers),
    ]
    half, stack, lane = len(order) // 2, [], None
    for step, i in enumerate(order):
        b, scale = f"blocks.{i}.", (i + 1) ** -0.5
        if i >= args.parallel_start and lane is None:
            lane = x
        if step >= half and stack:
            j, skip = step - half, stack.pop()
            g = torch.sigmoid(w["skip_gates"][j])
            x = w["skip_weights"][j] * skip + g * (x - w["skip_weights"][j] * skip)
        mixed = w[b + "resid_mix"][0] * x + w[b + "resid_mix"][1] * x0
        a = w[b + "attn_scale"] * attention(i, norm(mixed) * scale)
        if lane is None:
            x = mixed + a
            x = x + w[b + "mlp_scale"] * mlp(i, norm(x) * scale)
        else:
            m = w[b + "mlp_scale"] * mlp(i, norm(lane) * scale)
            gain = w[b + "lane_gain"]
            keep = w[b + "lane_keep"]
            x = keep[0] * x + gain[0, 0] * a + gain[1, 0] * m
            lane = keep[1] * lane + gain[0, 1] * a + gain[1, 1] * m
        if step < half:
            stack.append(x)
    x = norm(x if lane is None else (x + lane) / 2)
    return 30 * torch.tanh(x @ w["tok_emb.weight"].T / 30)


@pytest.mark.parametrize("name", [name for name in ARMS if name != "hops"])
@pytest.mark.parametrize("looping", [False, True])
def test_the_network_is_that_of_the_formulas(name, looping):
    model, ids = alive(**ARMS[name]), batch(1, length=24)[0]
    model.looping = looping
    found = model.logits(ids[None], torch.zeros(1, dtype=torch.long), len(ids))[0]
    assert (found.double() - reference(model, ids)).abs().max() < 2e-4


def test_the_derivative_of_the_leaky_square_is_its_own():
    """Q1: #2080's backward has 0.3 x on the negative side, where (0.3 x)^2 has 0.18 x."""
    mlp = section.MLP(tiny(MODEL_DIM=8, NUM_HEADS=2, MLP_MULT=1))
    with torch.no_grad():
        mlp.fc.weight.copy_(torch.eye(8))
        mlp.proj.weight.copy_(torch.eye(8))
    x = torch.linspace(-2, 2, 8, requires_grad=True)
    grad, = torch.autograd.grad(mlp(x[None]).sum(), x)
    assert torch.allclose(grad, torch.where(x > 0, 2 * x, 0.18 * x))


@pytest.mark.parametrize("length", [1, 130, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_blocks_keeps_documents_apart(length, masked):
    """The CPU's rung against the formula, forward and backward, with documents that begin anywhere."""
    rng = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 40, (3, length), generator=rng)
    mask = section.document_mask("cpu", (ids == section.BOS_ID).cumsum(1)) if masked else None
    q, k, v = (torch.randn(3, length, n, 8, generator=rng, requires_grad=True) for n in (4, 2, 2))
    grad, found = torch.randn(3, length, 4, 8, generator=rng), []
    for attend in (section.block_attention, section.math_attention):
        out = attend(q, k, v, mask)
        found.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(*found))


@pytest.mark.parametrize("name", ["default", "no recurrence", "one lane", "documents see others"])
def test_causality_over_every_position(name):
    assert_causal(alive(**ARMS[name]).eval())


def test_no_document_sees_another():
    model, ids = alive().eval(), batch(1, length=48)
    ids[0, 20] = 1
    other = ids.clone()
    other[0, :20] = 4 + (ids[0, :20] + 77) % 256
    first, second = (model.logits(x, torch.zeros(1, dtype=torch.long), 48)[0] for x in (ids, other))
    assert torch.equal(first[20:], second[20:]) and (first[:20] - second[:20]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in ARMS if name != "hops"])
def test_decoding_follows_the_scorer(name, corpus):
    assert_stream_follows_score(section, alive(**ARMS[name]).eval(), text(corpus))


# ----------------------------------------------------------------------------------------------- BIJEPAX-lite


@pytest.mark.parametrize(
    "overrides",
    [{}, {"BIJEPAX_FWD_HOPS": 9, "BIJEPAX_BWD_HOPS": 0}, {"BIJEPAX_BWD_HOPS": 7}],
    ids=str,
)
def test_the_loss_is_that_of_every_pair_inside_a_document(overrides):
    model, ids = alive(**overrides), batch(3)[:, :-1]
    aux, x = model.aux, model.hidden(ids, model.rotary_train)
    found, losses, plains = aux(x, ids), [], []
    for row, states in zip(ids.tolist(), x):
        for head, hop in enumerate(aux.args.hops):
            costs, goals = [], []
            for t in range(max(0, -hop), len(row) - max(0, hop), 8):
                u = t + hop
                if 1 in row[min(t, u) + 1 : max(t, u) + 1]:
                    continue
                guess = aux.up[head](F.gelu(aux.norm[head](aux.down[head](states[t]))))
                goals.append(F.normalize(states[u], dim=0))
                costs.append(1 - F.cosine_similarity(guess, states[u], dim=0))
            losses.append(torch.stack(costs).mean())
            plains.append(1 - torch.stack(goals).mean(0).norm())
    assert torch.allclose(found["bijepax"].sum(), torch.stack(losses).sum() / len(aux.args.hops), rtol=1e-4)
    assert torch.allclose(
        found["bijepax_plain"].sum(), torch.stack(plains).sum() / len(aux.args.hops), rtol=1e-4
    )


def test_a_row_without_a_pair_costs_nothing():
    model = alive()
    ids = torch.ones(2, 64, dtype=torch.long)
    terms = model.aux(model.hidden(ids, model.rotary_train), ids)
    assert terms["bijepax"].tolist() == terms["bijepax_plain"].tolist() == [0, 0]


def test_targets_have_no_gradient_and_sources_do():
    model, ids = alive(BIJEPAX_BWD_HOPS=0, BIJEPAX_STRIDE=64), batch(1)[:, :-1]
    x = model.hidden(ids, model.rotary_train).detach().requires_grad_()
    grad, = torch.autograd.grad(model.aux(x, ids)["bijepax"].sum(), x)
    assert grad[0, 0].abs().max() > 0 and not grad[0, 1:].any()  # the one pair: 0 predicts 4


def test_the_schedule_is_a_trapezium():
    aux = alive().aux
    points = {
        0: 0, 0.35: 0, 0.35 + 0.03375: 0.005, 0.4175: 0.01, 0.6: 0.01, 0.7325: 0.01,
        0.8 - 0.03375: 0.005, 0.8: 0, 1: 0,
    }
    for progress, weight in points.items():
        assert aux.weights(progress)["bijepax"] == pytest.approx(weight, abs=1e-9), progress
    assert [aux.weights(progress)["bijepax"] > 0 for progress in (0.0, 0.34, 0.36, 0.79, 0.81, 1.0)] == [
        False, False, True, True, False, False,
    ]


def fitted(zero: bool, eps: float, steps: int = 150) -> tuple[float, float, float]:
    """(loss before, loss after, largest step of W2 late in
    training) of one head on a fixed map that it can learn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator)
    goal = F.normalize(x @ torch.randn(32, 32, generator=generator), dim=-1)
    model = alive(seed=1, MODEL_DIM=32)
    model.aux.init_weights(generator)
    down, norm, up = model.aux.down[0], model.aux.norm[0], model.aux.up[0]
    with torch.no_grad():
        up.weight.mul_(0 if zero else 1)
    adam = torch.optim.Adam(
        [*down.parameters(), *norm.parameters(), *up.parameters()], lr=0.001, betas=(0.9, 0.99)
    )
    losses = []
    late = 0.0
    for step in range(steps):
        guess = F.normalize(up(F.gelu(norm(down(x)))), dim=-1, eps=eps)
        loss = (1 - (guess * goal).sum(-1)).mean()
        adam.zero_grad()
        loss.backward()
        kept = up.weight.detach().clone()
        adam.step()
        losses.append(loss.item())
        if step >= steps - 20:
            late = max(late, (up.weight.detach() - kept).abs().max().item())
    return losses[0], losses[-1], late


def test_the_second_matrix_is_not_frozen():
    """#2080's zeros under a cosine: the first gradient is 1e12
    of a sane one, and Adam's second moment never forgets it."""
    *_, frozen = fitted(zero=True, eps=1e-12)
    before, after, late = fitted(zero=False, eps=1e-6)
    assert frozen < 1e-7 and late > 1e-4 and after < before - 0.1


def test_heads_are_neither_clipped_nor_slowed_nor_in_the_norm():
    args = tiny(GRAD_CLIP_NORM=1e-3, BIJEPAX_START_FRAC=0, BIJEPAX_END_FRAC=1)
    trainer = section.Trainer(args, None, section.Runtime(args), section.Log(None))
    optimizers, model = trainer.optimizers, trainer.model
    heads = [p for name, p in model.named_parameters() if name.startswith("aux.")]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    norm = optimizers.reduce()
    assert norm.item() == pytest.approx(
        sum(p.numel() for n, p in model.named_parameters() if not n.startswith("aux.")) ** 0.5,
        rel=1e-5,
    )
    optimizers.step(0, 0.99, norm)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in heads)
    assert model.skip_gates.grad.abs().max() < 1e-3
    rates = {group["peak"]: group["lr"] for group in optimizers.adam.param_groups}
    assert rates[args.bijepax_lr] == args.bijepax_lr
    assert rates[args.scalar_lr] == pytest.approx(0.1 * args.scalar_lr)


# -------------------------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 64, 16), (2, 16, 64)], ids=str)
def test_updates_are_orthogonal(shape):
    x = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-3, 3, shape[1])[:, None]
    )
    update = section.newton_schulz(x, 5, torch.float32)
    # Rows count alike, whatever their scale
    u, values, v = torch.linalg.svd(F.normalize(x, dim=-1), full_matrices=False)
    inside = u.mT @ update @ v.mT
    found = inside.diagonal(dim1=1, dim2=2)
    assert (inside - torch.diag_embed(found)).abs().max() < 1e-3 and found.max() < 1.25
    assert found[values > 0.02 * values.norm(dim=1, keepdim=True)].min() > 0.75


def test_the_rate_is_the_published_one():
    args = section.Hyperparameters({})
    for progress in (0, 0.1, 0.15, 0.3, 0.7, 0.914, 0.915, 0.92, 1.0):
        published = 1.0 if progress < 0.15 else max((1 - progress) / 0.85, 0.1)
        assert section.rate_at(progress, args) == pytest.approx(published)


# -------------------------------------------------------------------------------------------------- quantiser


def matrices(seed: int = 0) -> tuple[dict, dict]:
    rng = np.random.default_rng(seed)
    tensors = {
        "tok_emb.weight": rng.normal(size=(300, 128)),
        "blocks.0.attn.c_q.weight": rng.normal(size=(128, 128)),
        "blocks.0.mlp.proj.weight": rng.normal(size=(96, 256)),
        "skip_weights": rng.normal(size=(2, 128)),
    }
    tensors["tok_emb.weight"][:, 70:80] *= 20  # the salient columns
    tensors["blocks.0.mlp.proj.weight"] += 3 * np.outer(rng.normal(size=96), rng.normal(size=256))
    tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
    hessians = {}
    for name, x in tensors.items():
        if name != "skip_weights":
            inputs = rng.normal(size=(500, x.shape[1])) * np.linspace(0.5, 2, x.shape[1])
            hessians[name] = (inputs.T @ inputs / 500).astype(np.float32)
    return tensors, hessians


@pytest.mark.parametrize("compressor", ["lzma", "auto"])
def test_a_file_holds_the_fine_columns_and_the_products(compressor):
    tensors, hessians = matrices()
    args = tiny(COMPRESSOR=compressor)
    blob = section.pack(tensors, args, hessians)
    header, found = section.unpack(blob, "here")
    parts = [name for name, *_ in header["tensors"] if ":" in name]
    assert parts == ["tok_emb.weight:fine64", *(f"blocks.0.mlp.proj.weight:{part}" for part in "ab")]
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in tensors.items()}
    for name, x in tensors.items():
        if name == "skip_weights":
            assert np.array_equal(found[name], x.astype(np.float16))
            continue
        top = np.full(x.shape[1], 63 if name.startswith("tok") else 31)
        top[64:128] = 127 if name.startswith("tok") else top[0]
        _, _, plain = section.quantise(x, top, args.k_by_class[section.tensor_class(name)], hessians[name])
        if name == "blocks.0.mlp.proj.weight":
            assert np.linalg.norm(x - found[name]) < 0.97 * np.linalg.norm(x - plain)
        else:
            assert np.allclose(found[name], plain, atol=1e-6)
    bare = section.unpack(
        section.pack(tensors, tiny(AWQ_GROUPS=0, LQER_TOP_K=0), hessians), "here"
    )[1]["tok_emb.weight"]
    x = tensors["tok_emb.weight"]
    assert np.linalg.norm((found["tok_emb.weight"] - x)[:, 64:]) < 0.6 * np.linalg.norm((bare - x)[:, 64:])


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 40), columns=st.integers(3, 150), rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_product_is_within_its_bits_and_no_worse_than_nothing(rows, columns, rank, seed):
    error = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    (a, sa), (b, sb) = section.low_rank(error, min(rank, rows, columns))
    assert a.min() >= -2 and a.max() <= 1 and b.min() >= -8 and b.max() <= 7
    left = (a * sa.astype(np.float32)).T @ (b * sb.astype(np.float32)).reshape(len(a), -1)[:, :columns]
    assert left.shape == error.shape and np.isfinite(left).all()
    assert np.linalg.norm(error - left) <= np.linalg.norm(error) * 1.02


@pytest.mark.parametrize(
    "settings_", [{}, {"AWQ_GROUPS": 3, "LQER_TOP_K": 2}, {"QUANT_ROUND": "nearest"}], ids=str
)
def test_gptq_beats_rounding_where_inputs_are_correlated(settings_):
    """Measured as it matters: the error of the products with inputs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 128)).astype(np.float32)
    inputs = rng.normal(size=(400, 20)) @ rng.normal(size=(20, 128)) + 0.3 * rng.normal(size=(400, 128))
    hessian = (inputs.T @ inputs / 400).astype(np.float32)
    blob = section.pack(
        {"blocks.0.mlp.fc.weight": x},
        tiny(**settings_),
        {} if settings_.get("QUANT_ROUND") else {"blocks.0.mlp.fc.weight": hessian},
    )
    found = section.unpack(blob, "here")[1]["blocks.0.mlp.fc.weight"]
    near = section.unpack(section.pack({"blocks.0.mlp.fc.weight": x}, tiny(LQER_TOP_K=0)), "here")[
        1
    ]["blocks.0.mlp.fc.weight"]
    ours, theirs = (np.linalg.norm(inputs @ (y - x).T) for y in (found, near))
    assert ours < (1.0 if settings_.get("QUANT_ROUND") else 0.7) * theirs


def test_moments_are_means_over_the_inputs_of_every_run_of_a_layer(corpus):
    args = tiny(DATA_PATH=corpus, GPTQ_BATCHES=2)
    data = section.Dataset(args, verify=False)
    trainer = section.Trainer(args, data, section.Runtime(args), section.Log(None))
    trainer.model.looping = True
    found = trainer.calibrate()
    for name, hessian in found.items():  # inputs are normed to a mean square of one, times the layer's scale
        if name.endswith(("c_q.weight", "mlp.fc.weight")):
            layer = int(name.split(".")[1])
            assert np.trace(hessian) / len(hessian) == pytest.approx(1 / (layer + 1), rel=0.02), name
    assert np.trace(found["tok_emb.weight"]) / 32 == pytest.approx(1, rel=0.02)


# -------------------------------------------------------------------------------------- adapters of documents


def test_adapters_decode_as_they_score(corpus):
    ids, model = text(corpus), alive(TTT="lora", TTT_DOC_CHUNK=16, EVAL_SEQ_LEN=32).eval()
    stream = assert_stream_follows_score(section, model, ids)
    assert stream.learner.updates > 4
    for owner in model.modules():
        assert getattr(owner, "adapter", None) is None


def test_documents_learn_alone_in_a_batch_of_any_size(corpus):
    ids, found = text(corpus), {}
    for size in (64, 128, 4096):
        found[size], _ = section.score(alive(TTT="lora", EVAL_BATCH_TOKENS=size).eval(), ids)
    assert np.abs(found[64] - found[4096]).max() < 1e-5 and np.abs(found[64] - found[128]).max() < 1e-5
    plain, _ = section.score(alive(TTT="lora", TTT_ADAPT=0).eval(), ids)
    assert np.abs(found[64] - plain).max() > 1e-3


def test_the_control_scores_documents_with_the_plain_model(corpus):
    """Nothing learned: a window of the document alone,
    which the plain pass has too where documents are masked."""
    ids = text(corpus)[:60]
    control, _ = section.score(alive(TTT="lora", TTT_ADAPT=0).eval(), ids)
    plain, _ = section.score(alive().eval(), ids)
    assert np.abs(control - plain).max() < 1e-5


def test_adapters_learn_from_what_is_scored_alone(corpus):
    ids = text(corpus)
    settings = {"TTT": "lora", "TTT_DOC_CHUNK": 16, "EVAL_SEQ_LEN": 32, "TTT_LORA_LR": 0.01}
    before, _ = section.score(alive(**settings).eval(), ids)
    for at in (20, 63, 101, 140):
        other = ids.copy()
        other[at:] = 4 + (ids[at:] + 91) % 256
        after, _ = section.score(alive(**settings).eval(), other)
        assert np.abs(after[: at - 1] - before[: at - 1]).max() < 1e-5 and np.abs(after - before).max() > 0.1


def test_adapters_lower_the_nats_of_a_repetitive_document():
    ids = np.array([1, *np.tile(np.arange(40, 72), 12)])
    learned, _ = section.score(alive(TTT="lora", TTT_LORA_LR=0.003, TTT_LORA_RANK=8).eval(), ids)
    plain, _ = section.score(alive(TTT="lora", TTT_ADAPT=0).eval(), ids)
    assert learned[:16] == pytest.approx(plain[:16], abs=1e-5)
    assert learned[200:].mean() < plain[200:].mean() - 0.5


def test_ids_that_are_pushed_and_never_asked_for_are_learned_too(corpus):
    ids, model = text(corpus), alive(TTT="lora", TTT_DOC_CHUNK=16, EVAL_SEQ_LEN=32).eval()
    _, vectors = section.score(model, ids, (20, 95, 148))
    stream = section.stream(model)
    for t, token in enumerate(ids[:-1]):
        stream.push(token)
        if t in vectors:
            assert np.abs(stream.logprobs() - vectors[t]).max() < 1e-4, t
    assert stream.learner.updates >= 3


@pytest.mark.parametrize(
    "overrides",
    [{}, {"TTT": "lora"}, {"PPM_WEIGHT": 1, "MIX_ROWS": 6}],
    ids=str,
)
def test_a_text_without_a_target_has_no_nats(overrides):
    model = alive(**overrides).eval()
    for ids in ([], [1]):
        nats, vectors = section.score(model, ids)
        assert nats.shape == (0,) and vectors == {}


# ---------------------------------------------------------------------------------------------------- warm-up


def varlen_attention(q, k, v, cu_seqlens=None):
    """FlashAttention's result from where documents begin, padded to a length that varies."""
    positions = torch.arange(q.size(0) * q.size(1))
    documents = torch.searchsorted(cu_seqlens.long(), positions, right=True).view(q.shape[:2])
    return section.sdpa_attention(q, k, v, section.causal_mask(documents, q.size(1)))


def test_warm_up_compiles_all_that_training_and_scoring_meet(monkeypatch, tmp_path, corpus):
    """Recurrence begins between the heads' start and their middle;
    documents are many or few. No graph is made on the training clock. Adapters run eager."""
    graphs = torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(section.piece, "compiled", False)
    monkeypatch.setattr(section, "attention_of", lambda rung: varlen_attention)
    args = tiny(LOOP_START=0.45, NUM_LAYERS=3, BIJEPAX_STRIDE=32, COMPILE=1)
    runtime = section.Runtime(args)
    runtime.attention = "fa2"
    trainer = section.Trainer(args, None, runtime, section.Log(None))
    torch._dynamo.reset()
    graphs.clear()
    trainer.warm_up()
    known = graphs["unique_graphs"]
    # ids, a lane and two, a skip, heads, nats; no heads in a score, but two lengths of a stride
    assert section.piece.compiled and known == 12
    for progress in (0.0, 0.36, 0.45, 0.9):
        for documents in (2, 300):
            ids = batch(8)[None]
            ids.view(-1)[torch.randperm(ids.numel())[:documents]] = 1
            trainer.train_step(ids, torch.ones(1, 8), progress)
        assert graphs["unique_graphs"] == known, progress
    tensors = {name: p.detach().numpy() for name, p in trainer.model.exported().items()}
    (tmp_path / "model.bin").write_bytes(section.pack(tensors, args))
    loaded = section.load(tmp_path / "model.bin", "cpu", args, runtime.dtype, runtime.attention)
    for stride in (args.eval_seq_len, args.eval_stride):
        plan = section.WindowPlan(args.eval_seq_len, stride, 32)
        list(section.scored(loaded, batch(1, length=700)[0].numpy(), plan))
    args.ttt = "lora"
    list(section.scored(loaded, text(corpus), plan, section.TestTimeTraining(loaded)))
    assert section.piece.compiled and graphs["unique_graphs"] == known
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "overrides, again",
    [({"LOOP_START": 0.9}, True), ({"LOOP_START": 1}, False), ({"LOOP_EXTRA": 0}, False)],
    ids=str,
)
def test_what_is_scored_at_the_end_runs_as_the_artifact_will(overrides, again, corpus):
    """Also where the last step came before LOOP_START, and where warm-up was at progress 1."""
    args = tiny(DATA_PATH=corpus, ITERATIONS=1, **overrides)
    trainer = section.Trainer(
        args, section.Dataset(args, verify=False), section.Runtime(args), section.Log(None)
    )
    trainer.run(None)
    with torch.device("meta"):
        assert trainer.model.looping == section.GPT(args).looping == again
    heads = trainer.model.aux.weights(args.loop_start)["bijepax"] > 0
    assert trainer.mode(args.loop_start) == (again, heads)


# ------------------------------------------------------------------------------------------------------- runs


def test_a_run_and_what_its_artifact_carries(run, tmp_path):
    code, output, metrics = run(
        script=RECORD / "train_gpt.py",
        **{**HERE, "ITERATIONS": 12, "TTT": "lora", "TRAIN_LOG_EVERY": 1, "VAL_BYTES": 400},
    )
    assert code == 0, output
    steps = [json.loads(line) for line in (tmp_path / "runs/test/metrics.jsonl").read_text().splitlines()]
    shown = [step["step"] for step in steps if "bijepax" in step]
    assert shown == [6, 7, 8, 9, 10]  # progress 5/12 ... 9/12, inside (0.35, 0.8)
    assert metrics["headline"] == "final_int6_ttt" and metrics["evals"]["final_int6_ttt"]["updates"] > 0
    header, tensors = section.unpack((tmp_path / "runs/test/artifact.bin").read_bytes(), "artifact")
    assert not any(name.startswith("aux") for name in tensors)
    code, output, _ = run(
        script=RECORD / "train_gpt.py",
        **{
            **HERE, "RUN_ID": "again", "EVAL_ONLY": 1, "TTT": "lora", "VAL_BYTES": 400,
            "ARTIFACT": tmp_path / "runs/test/artifact.bin",
        },
    )
    assert code == 0 and f"val_bpb:{metrics['val_bpb']:.8f}" in output, output


def test_a_run_resumes_bit_for_bit_across_recurrence_and_heads(run, tmp_path):
    """From a checkpoint at step 3 of 5, before layers run again and before the heads begin."""
    found = []
    for name, more in (
        ("cut", {"CHECKPOINT_EVERY": 3}),
        ("on", {"RESUME": tmp_path / "runs/cut/last.safetensors"}),
    ):
        code, output, _ = run(
            script=RECORD / "train_gpt.py",
            **{
                **HERE, "RUN_ID": name, "ITERATIONS": 5, "LOOP_START": 0.7, "VAL_BYTES": 400,
                "BIJEPAX_START_FRAC": 0.7, "BIJEPAX_END_FRAC": 1, **more,
            },
        )
        assert code == 0 and ("resume:" in output) == (name == "on"), output
        with section.safe_open(tmp_path / f"runs/{name}/final.safetensors", "pt") as file:
            found.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_other_compressors_get_the_same_integers(tmp_path):
    """Groups hold all of the payload; sorted rows come back by their order."""
    model, path = alive(), tmp_path / "model.bin"
    tensors = {name: p.detach().numpy() for name, p in model.exported().items()}
    path.write_bytes(section.pack(tensors, model.args))
    entries, parts = compressors.payload(section, str(path))
    found, rest = compressors.groups(entries, parts)
    size = sum(len(block) for _, block in parts)
    assert sum(matrix.size for part in found.values() for matrix in part) + len(rest) == size
    assert {"tok_emb", "attn.c_q", "attn.c_k", "mlp.fc", "mlp.proj"} <= set(found)

    matrix = found["tok_emb"][0]
    assert compressors.arranged([matrix], False) == (matrix.T.tobytes(), b"")
    stream, orders = compressors.arranged([matrix, matrix], True)
    half, back = len(stream) // 2, np.empty_like(matrix)
    back[np.frombuffer(orders, "<u2")[: len(matrix)]] = np.frombuffer(
        stream[half:], np.int8).reshape(matrix.shape[::-1]).T
    np.testing.assert_array_equal(back, matrix)

    table = compressors.table(section, str(path), print)["rows"]
    numbers = [[int(cell.replace(",", "")) for cell in row[2:5]] for row in table]
    assert numbers[0][2] == compressors.rans_size(section, parts)
    assert [row[0] for row in table[1:3]] == ["LZMA"] * 2 and "sorted" in table[2][1]
    assert numbers[1][0] == len(compressors.installed()["LZMA"](matrix.T.tobytes()))
    assert all(0 < embedding < whole and 0 < blocks < whole for embedding, blocks, whole in numbers)


def test_an_order_of_rows_by_hand():
    rows = np.array([[0, 0], [9, 9], [1, 0], [8, 9]], np.int8)
    assert compressors.nearest_first(rows).tolist() == [0, 2, 3, 1]


@slow
def test_two_ranks_give_the_losses_of_one(run):
    found = []
    for ranks in (1, 2):
        code, output, _ = run(
            ranks,
            script=RECORD / "train_gpt.py",
            **{
                **HERE, "RUN_ID": f"r{ranks}", "ITERATIONS": 6, "TRAIN_BATCH_TOKENS": 384,
                "VAL_BYTES": 400, "BIJEPAX_WEIGHT": 0.5, "BIJEPAX_LR": 0.05,
                "BIJEPAX_START_FRAC": 0.1, "TRAIN_LOG_EVERY": 1,
            },
        )
        assert code == 0, output
        lines = [line for line in output.splitlines() if line.startswith("step:") and "train_loss" in line]
        found.append(
            [
                [
                    part.split(":")[1]
                    for part in line.split()
                    if part.startswith(("train_loss", "bijepax:"))
                ]
                for line in lines
            ]
        )
    assert [len(line) for line in found[0]] == [1, 2, 2, 2, 2, 1]
    for one, two in zip(*found):
        assert np.allclose(np.array(one, float), np.array(two, float), atol=2e-3)


@pytest.mark.parametrize("bad,words", [
    ({"BIJEPAX_FWD_HOPS": "4,9"}, "BIJEPAX_FWD_HOPS='4,9' is not accepted: an integer"),
    ({"BIJEPAX_BWD_HOPS": "64"}, "BIJEPAX_BWD_HOPS=64, TRAIN_SEQ_LEN=64"),
    ({"GATE_WINDOW": 0}, "GATE_WINDOW='0' is not accepted"),
    ({"TTT_LORA_MODULES": "mlp.fc"}, "TTT_LORA_MODULES='mlp.fc' is retired"),
    ({"LOOP_FIRST": 2}, "LOOP_FIRST=2, LOOP_LAST=1: no layer"),
    ({"LOOP_LAST": 2}, "LOOP_LAST=2, PARALLEL_START=2"),
    ({"BIJEPAX_END_FRAC": 0.2}, "BIJEPAX_START_FRAC=0.35, BIJEPAX_END_FRAC=0.2"),
    ({"GATE_WINDOW": 33}, "GATE_WINDOW=33, MODEL_DIM=32"),
    ({"TTT": "lora", "TTT_DOC_CHUNK": 100}, "TTT_DOC_CHUNK=100, EVAL_SEQ_LEN=64"),
    ({"TTT": "lora", "PPM_WEIGHT": 1}, "TTT=lora, PPM_WEIGHT=1"),
    ({"TTT": "phased"}, "TTT='phased' is not accepted"),
    ({"TRAIN_ORDER": "shuffled"}, "TRAIN_ORDER='shuffled' is retired"),
    ({"BIJEPAX_CYCLE": 1}, "BIJEPAX_CYCLE='1' is retired"),
    ({"MIX": "tilt"}, "MIX='tilt' is retired"),
], ids=str)
def test_settings_that_cannot_work_are_refused(bad, words):
    with pytest.raises(section.UserError, match=words):
        tiny(**bad)


PUBLISHED = {  # the README block of #2080, without its paths
    "DISABLE_COMPILE": 1, "CASEOPS_ENABLED": 1, "TTT_ENABLED": 0, "PPM_MIXER_ENABLED": 1, "PPM_ORDER": 5,
    "PPM_H": "0.999", "PPM_L": "0.18", "PPM_T": "0.80", "LQER_TOP_K": 1, "BIJEPAX_ENABLED": 1,
    "BIJEPAX_WEIGHT": 0.01, "BIJEPAX_START_FRAC": 0.35, "BIJEPAX_END_FRAC": 0.80, "BIJEPAX_FWD_HOPS": 4,
    "BIJEPAX_BWD_HOPS": 4, "BIJEPAX_CYCLE": 0, "BIJEPAX_HEAD_DIM": 32, "BIJEPAX_STRIDE": 64,
    "BIJEPAX_LR": 0.001, "TRAIN_LOG_EVERY": 250, "SEED": 42,
}


def test_the_published_block_is_accepted_and_means_the_same():
    older = {"MIX": "binary"}  # ours, of commands before the tilt became a control
    args = section.Hyperparameters({name: str(value) for name, value in (PUBLISHED | older).items()})
    assert (args.compile, args.ttt, args.ppm_weight, args.seed) == ("0", "0", 1, 42)
    assert args.warnings == [] and {name: args.settings()[name] for name in ("PPM_ORDER", "LQER_TOP_K")} == {
        "PPM_ORDER": 5, "LQER_TOP_K": 1}


@pytest.mark.parametrize("name, value, ours, wanted", [
    ("DISABLE_COMPILE", "0", "compile", "auto"), ("NUM_LOOPS", "1", "loop_extra", 1),
    ("PPM_MIXER_ENABLED", "0", "ppm_weight", 0), ("ARTIFACT_DIR", "out", "runs_path", "out"),
])
def test_names_of_the_source_are_honoured(name, value, ours, wanted):
    assert getattr(section.Hyperparameters({name: value}), ours) == wanted
    assert f"  {name}" in section.Hyperparameters.help()


def test_every_variable_of_the_source_that_is_on_record_has_a_verdict():
    """41 names: 21 mean the same here, 5 are other names of ours, 14 have one value that means off, or
    none; LOOP_START is a layer there and a share of the run here, so a layer is out of its range."""
    same = re.findall(r"\w+", """
        BIJEPAX_BWD_HOPS BIJEPAX_ENABLED BIJEPAX_END_FRAC BIJEPAX_FWD_HOPS BIJEPAX_HEAD_DIM
        BIJEPAX_LR BIJEPAX_START_FRAC BIJEPAX_STRIDE BIJEPAX_WEIGHT DATA_PATH ITERATIONS
        LQER_TOP_K MAX_WALLCLOCK_SECONDS PPM_ORDER RUN_ID SEED TOKENIZER_PATH TRAIN_LOG_EVERY
        VAL_LOSS_EVERY VOCAB_SIZE WORLD_SIZE LOOP_START""")
    off = re.findall(r"\w+", """
        BIJEPAX_CYCLE CASEOPS_ENABLED FORCE_STOP_STEP MLP_CLIP_SIGMAS PPM_DUMP_INPUTS PPM_H
        PPM_L PPM_SWEEP_APPLY PPM_SWEEP_GRID PPM_T PREQUANT_ONLY QUANTIZE_ONLY TTT_EVAL_ONLY
        WARMDOWN_FRAC""")
    ours = {var.name for var in section.Hyperparameters.vars().values()}
    assert set(same) <= ours and set(off) <= set(section.Hyperparameters.RETIRED)
    aliases = section.Hyperparameters.ALIASES
    assert len(same) + len(off) + len(aliases) == 41 and {name for name, _ in aliases.values()} <= ours
    assert set(PUBLISHED) <= {*same, *off, *aliases}


def test_adapters_by_the_name_of_the_source():
    assert tiny(TTT_ENABLED=1, TTT_DOC_CHUNK=16).ttt == "lora"


@pytest.mark.parametrize("name, value", [
    ("PPM_H", "0.9"), ("PPM_SWEEP_APPLY", "1"), ("PPM_SWEEP_GRID", "0.1:0.9"), ("PPM_DUMP_INPUTS", "1"),
    ("QUANTIZE_ONLY", "1"), ("PREQUANT_ONLY", "1"), ("TTT_EVAL_ONLY", "1"), ("CASEOPS_ENABLED", "0"),
    ("FORCE_STOP_STEP", "100"), ("WARMDOWN_FRAC", "0.85"), ("MLP_CLIP_SIGMAS", "11.5"), ("LOOP_START", "3"),
    ("BIJEPAX_CYCLE", "1"), ("MTP_NUM_HEADS", "1"),
])
def test_what_cannot_be_honoured_is_refused_with_the_reason(name, value):
    with pytest.raises(section.UserError, match=f"{name}='{value}'"):
        section.Hyperparameters({name: value})


def test_two_names_of_one_setting_must_agree():
    assert section.Hyperparameters({"DISABLE_COMPILE": "1", "COMPILE": "0"}).compile == "0"
    with pytest.raises(section.UserError, match="DISABLE_COMPILE=1 means COMPILE=0, not 1"):
        section.Hyperparameters({"DISABLE_COMPILE": "1", "COMPILE": "1"})


def test_settings_of_what_is_switched_off_are_not_refused():
    assert tiny(LOOP_EXTRA=0, LOOP_LAST=2).loop_extra == 0
    assert tiny(LOOP_START=1, LOOP_FIRST=3).loop_start == 1
    shipped = tiny(
        TRAIN_SEQ_LEN=4, TRAIN_BATCH_TOKENS=8, EVAL_STRIDE=4, BIJEPAX_FWD_HOPS=2, BIJEPAX_BWD_HOPS=0
    ).shipped()
    # Hops are not in an artifact: their defaults would not fit its rows
    assert section.Hyperparameters({}, shipped).hops == []
