"""The network, the auxiliary objective and the optimizers, by perturbation and brute force."""

import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_causal

STANDINS = Path(__file__).with_name("standins")
# Parameters of the published #832 model, by name in this script; 24,625,001 in all.
L, D, KV = 13, 512, 256
PUBLISHED = {
    "tok_emb.weight": (260, D), "bigram.table": (4096, 32), "bigram.proj.weight": (D, 32), "bigram.scale": (),
    "smear.gate": (D,), "skip_weights": (6, D), "aux.start": (256,), "aux.injection.weight": (D, 256),
    "aux.projector.fc1.weight": (256, D), "aux.projector.fc2.weight": (256, 256),
    "aux.predictor.fc1.weight": (256, 256), "aux.predictor.fc2.weight": (256, 256),
} | {
    f"blocks.{i}.{name}": shape
    for i in range(L)
    for name, shape in {
        "attn.c_q.weight": (D, D), "attn.c_k.weight": (KV, D), "attn.c_v.weight": (KV, D),
        "attn.proj.weight": (D, D), "attn.q_gain": (8,), "mlp.fc.weight": (2 * D, D),
        "mlp.proj.weight": (D, 2 * D), "attn_scale": (D,), "mlp_scale": (D,), "resid_mix": (2, D),
    }.items()
}
CHANGED = {}
ABSENT = {name: "the n-gram tables took its place" for name in PUBLISHED if name.startswith("bigram.")}
ADDED = {"ngram.table", "ngram.proj.weight"}


def test_published_tensor_list(trunk):
    """Every tensor of #832 is here with its shape, changed,
    or absent, and nothing else is but the n-gram tables."""
    assert sum(math.prod(shape) for shape in PUBLISHED.values()) == 24_625_001
    args = trunk.Hyperparameters({"NUM_HEADS": "8", "NUM_KV_HEADS": "4", "MLP_MULT": "2",
                                  "NGRAM_ORDERS": "2,3,4,5,6"})
    with torch.device("meta"):
        ours = {name: tuple(p.shape) for name, p in trunk.GPT(args).named_parameters()}
    assert {name for name in PUBLISHED if name not in ours} == set(ABSENT)
    assert {name for name in PUBLISHED if name in ours and ours[name] != PUBLISHED[name]} == set(CHANGED)
    assert set(ours) - set(PUBLISHED) == ADDED
    assert all(math.prod(ours[name]) == math.prod(PUBLISHED[name]) for name in CHANGED)


@pytest.mark.parametrize(
    "overrides",
    [
        {}, {"JEPA_CHUNK_SIZE": 0}, {"ROPE_DIMS": 0}, {"XSA_LAST_N": 3, "LN_SCALE": 0},
        {"SMEAR_GATE": 0, "NGRAM_ORDERS": 0}, {"UNET_SKIPS": 0, "RESID_MIX": 0, "LEAKY_SLOPE": 0},
    ],
    ids=str,
)
def test_causality_over_every_position(trunk, tiny, alive, overrides):
    assert_causal(alive(tiny(**overrides)))


def test_embeddings_do_not_see_the_document_before(trunk, tiny, alive):
    """At a BOS and after it, SmearGate and the hash tables give what they give at the start of a stream."""
    model = alive(tiny())
    x = torch.randn(1, 12, 32)
    ids = torch.randint(4, 260, (1, 12))
    ids[0, 5] = trunk.BOS_ID
    assert torch.equal(model.smear(x, ids)[0, 5], x[0, 5])
    rows = model.ngram.rows(ids)
    alone = model.ngram.rows(ids[:, 5:])
    assert torch.equal(rows[0, 5:], alone[0])
    other = ids.clone()
    other[0, :5] = 7
    assert torch.equal(model.ngram.rows(other)[0, 5:], rows[0, 5:])
    assert not torch.equal(model.ngram.rows(other)[0, 4], rows[0, 4])


def context_strings(ids: list[int], t: int, orders, reach: int) -> list[tuple]:
    """What each context of position t consists of, spelt out: the reference for HashEmbedding.rows."""
    start = max((i for i in range(t + 1) if ids[i] == 1), default=0)
    inside = ids[start : t + 1]
    grams = [(n, *inside[-n:]) for n in orders]
    word = [i >= 4 and (chr(i - 4).isalnum() if i - 4 < 128 else True) for i in ids]
    so_far, both, part = [ids[t]], [ids[t]], 0 if word[t] else 1  # even parts are words
    for n in range(2, reach + 1):
        k = t - n + 1
        if k < 0 or ids[k] <= 1 or ids[t] <= 1:
            break
        part += word[k] != (part % 2 == 0)
        so_far += [ids[k]] * (part == 0)
        both += [ids[k]] * (part <= 2)
    return [*grams, ("word", *so_far), ("pair", *both)]


def test_contexts_are_what_they_say(trunk):
    """Positions with equal contexts share their rows, others
    (nearly) never: against contexts spelt out in Python."""
    text = (b"The cat saw the cat. A cat, the dog and the cat saw 42 dogs; caf\xc3\xa9s saw the cat\n" * 3)[
        :230
    ]
    ids = [1] + [byte + 4 for byte in text]
    ids[100] = 1
    table = trunk.HashEmbedding((2, 3, 5), 2, 1 << 20, 2, 1, 8)
    rows = table.rows(torch.tensor([ids]))[0] % (1 << 20)
    spelt = [context_strings(ids, t, (2, 3, 5), table.WORD_REACH) for t in range(len(ids))]
    for column in range(5):
        pairs = [(spelt[t][column], int(rows[t, column])) for t in range(len(ids))]
        assert len(set(pairs)) == len({context for context, _ in pairs})  # one row for each context
        assert (
            len({row for _, row in pairs}) >= len({context for context, _ in pairs}) - 1
        )  # and one context a row
    assert len({context[3] for context in spelt}) < len({context[4] for context in spelt})


def test_hash_spreads_over_the_buckets(trunk):
    """All pairs and many longer contexts fill the tables evenly: the fullest bucket stays near the mean."""
    table = trunk.HashEmbedding((2, 3, 6), 0, 4096, 4, 1, 8)
    a, b = np.meshgrid(np.arange(4, 260), np.arange(4, 260))
    ids = torch.from_numpy(np.stack([a.ravel(), b.ravel()], 1)).long()
    counts = torch.bincount(table.rows(ids)[:, 1, 0], minlength=4096)
    assert counts.min() > 0 and counts.max() < 3 * counts.float().mean()
    text = torch.randint(97, 123, (1, 100_000))
    rows = table.rows(text)[0]
    for i in range(3):
        counts = torch.bincount(rows[:, i] - i * 4096, minlength=4096)
        assert (counts > 0).float().mean() > (0.1 if i == 0 else 0.9)


def test_every_tensor_learns(trunk, tiny):
    """With all phases active, after the zero-initialised
    outputs have moved, no parameter has a zero gradient."""
    args = tiny(DTYPE="fp32")
    model = trunk.GPT(args)
    model.init_weights(0)
    optimizers = trunk.Optimizers(model, args, trunk.Runtime(args))
    for step in range(3):
        ids = torch.randint(4, 260, (4, 65), generator=torch.Generator().manual_seed(step))
        sums = model.losses(ids, torch.ones(4), model.aux.inputs(step, ids.device))
        (sums["ce"] / 256 + sums["jepa_pred"] + sums["sigreg"]).backward()
        if step < 2:
            optimizers.step(step, 0.0, optimizers.reduce())
            model.zero_grad()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


def test_every_parameter_has_one_optimizer(trunk, tiny):
    args = tiny(DRAFT=2)
    model = trunk.GPT(args)
    optimizers = trunk.Optimizers(model, args, trunk.Runtime(args))
    held = [p for stack in optimizers.muon.stacks for p in stack] + optimizers.replicated
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    adam = [p for group in optimizers.adam.param_groups for p in group["params"]]
    assert sorted(map(id, adam + optimizers.tables.params)) == sorted(map(id, optimizers.replicated))
    assert all(p.ndim == 2 for stack in optimizers.muon.stacks for p in stack)


@pytest.fixture
def standins(trunk, monkeypatch):
    """FlashAttention's packages, played by torch."""
    monkeypatch.syspath_prepend(str(STANDINS))
    yield
    trunk.attention_of.cache_clear()
    for name in ("flash_attn", "flash_attn_interface"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["sdpa", "cpu", "fa3", "fa2"])
@pytest.mark.parametrize("length, heads, kv, window", [
    (192, 6, 3, 0), (64, 4, 4, 1), (40, 8, 2, 17), (130, 2, 1, 128), (1030, 1, 1, 200), (1030, 1, 1, 0),
    (300, 2, 2, 129), (300, 2, 2, 5000),
])
def test_attention_rungs_agree_with_the_formula(trunk, standins, name, length, heads, kv, window):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, n, 16, generator=generator).requires_grad_() for n in (heads, kv, kv))
    out = {}
    for rung in ("math", name):
        y = trunk.attention_of(rung)(q, k, v, None, window)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        out[rung] = [y, *torch.autograd.grad((y * weight).sum(), (q, k, v))]
    for ours, wanted in zip(out[name], out["math"]):
        assert (ours - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["math", "sdpa", "cpu", "fa2"])
def test_a_window_and_documents_hide_what_they_should(trunk, standins, name):
    """By brute force: each query against the keys that it may see."""
    generator, window = torch.Generator().manual_seed(0), 7
    q, k, v = (torch.randn(1, 60, 1, 8, generator=generator) for _ in range(3))
    docs = (torch.arange(60)[None] >= 33).long()
    mask = trunk.document_mask(name, docs)
    y = trunk.attention_of(name)(q, k, v, mask, window)
    for place in (0, 5, 6, 7, 32, 33, 36, 39, 40, 59):
        first = max(place - window + 1, 33 if place >= 33 else 0)
        scores = (k[0, first : place + 1, 0] @ q[0, place, 0]) * 8**-0.5
        wanted = scores.softmax(0) @ v[0, first : place + 1, 0]
        assert torch.allclose(y[0, place, 0], wanted, atol=1e-5), place


def test_windowed_layers_reach_back_as_far_as_their_windows(trunk, tiny, alive):
    """Three layers of windows of 5: a position sees 12 before it, and no more."""
    args = tiny(ATTN_WINDOW=5, ATTN_WINDOW_LAYERS="0, 1,2", NGRAM_ORDERS=0, SMEAR_GATE=0, JEPA_CHUNK_SIZE=0)
    assert args.windows == [5, 5, 5] and tiny(ATTN_WINDOW_LAYERS="1").windows == [0, 1024, 0]
    model = alive(args).eval()
    ids = torch.full((1, 40), 50)
    plain = model.hidden(ids, model.rotary_eval)
    ids[0, 10] = 99
    changed = (model.hidden(ids, model.rotary_eval) != plain).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(10, 23))


def test_a_window_saves_time_on_a_cpu(trunk):
    q, k, v = (torch.randn(1, 4096, 2, 16).requires_grad_() for _ in range(3))

    def seconds(window):
        start = time.perf_counter()
        y = trunk.sdpa_attention(q, k, v, None, window)
        torch.autograd.grad(y, (q, k, v), y)
        return time.perf_counter() - start

    rounds = [(seconds(0), seconds(256)) for _ in range(8)]  # in turns, beside whatever else runs
    whole, windowed = map(min, zip(*rounds))
    assert windowed < 0.7 * whole, f"{windowed / whole:.2f}"


def test_attention_ladder_falls_to_a_rung_that_runs(trunk, tiny, monkeypatch):
    def broken(q, k, v, mask=None, window=0):
        raise TypeError("scaled_dot_product_attention() got an unexpected keyword argument 'enable_gqa'")

    def picked(**settings):
        trunk.attention_of.cache_clear()
        args = tiny(DTYPE="fp32", **settings)
        return trunk.pick_attention(args, trunk.Runtime(args))

    assert picked() == "sdpa"
    monkeypatch.setitem(trunk.ATTENTION, "sdpa", broken)
    assert picked() == "math"
    monkeypatch.setattr(trunk, "check_rung", broken)
    with pytest.raises(trunk.UserError, match="ATTENTION=sdpa: no rung from there on runs here"):
        picked(ATTENTION="sdpa")
    monkeypatch.undo()
    trunk.attention_of.cache_clear()


def test_rotary_is_exact_at_every_position_and_invertible(trunk, tiny):
    args = tiny(TRAIN_SEQ_LEN=4096, TRAIN_BATCH_TOKENS=8192)
    tables = trunk.rotary_tables(4096, args)
    assert (
        tables.dtype == torch.float32 and len(torch.unique(tables[0].flatten(1), dim=0)) == 4096
    )  # #832 had 769
    position = np.arange(4096)[:, None] * args.rope_base ** (-np.arange(0, 4, 2) / 4)
    assert np.abs(tables[0, :, 0].numpy() - np.cos(position)).max() < 1e-6
    x = torch.randn(1, 16, 2, 8, requires_grad=True)
    y = trunk.rotate(x, tables[:, :16])
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5) and torch.equal(y[..., 4:], x[..., 4:])
    assert torch.autograd.gradcheck(
        lambda x: trunk.rotate(x, tables[:, :16]).sum((0, 2)),
        x.double().detach().requires_grad_(),
        eps=1e-3,
        atol=1e-3,
    )


def test_sigreg_on_normal_scaled_and_collapsed_latents(trunk):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 2048, 32, generator=generator)
    directions = F.normalize(torch.randn(32, 128, generator=generator), dim=0)
    t = np.linspace(0.2, 3.0, 17)
    phi = np.exp(-0.5 * t * t)
    floor = float((phi / phi.sum() * (1 - phi**2)).sum() / 2048)  # what 2,048 true samples have on average
    normal = trunk.sigreg(z, directions, 17)
    assert normal.shape == (4,) and 0.7 * floor < normal.mean() < 1.4 * floor
    values = [
        float(trunk.sigreg(x, directions, 17).mean()) for x in (2 * z, 0.5 * z, z * 0 + 0.01 * z, z + 1)
    ]
    assert min(values) > 20 * floor  # too wide, too narrow, collapsed, shifted
    assert float(trunk.sigreg(z * 1000, directions, 17).mean()) > 0.1  # scale is seen
    assert trunk.sigreg(z.bfloat16(), directions, 17).dtype == torch.float32


def test_jepa_losses_reach_only_their_own_module(trunk, tiny, alive):
    ids = torch.randint(4, 260, (4, 65), generator=torch.Generator().manual_seed(0))

    def reached(term: str, **overrides) -> dict[str, bool]:
        model = alive(tiny(**overrides))
        value = model.losses(ids, torch.ones(4), model.aux.inputs(0, ids.device))[term]
        names, params = zip(*model.named_parameters())
        grads = torch.autograd.grad(value, params, allow_unused=True)
        return {name: grad is not None and bool(grad.abs().max() > 0) for name, grad in zip(names, grads)}

    own = {"jepa_pred": {"aux.projector", "aux.predictor", "aux.start"}, "sigreg": {"aux.projector"}}
    for term, modules in own.items():  # as published (A2)
        hit = {".".join(name.split(".")[:2]) for name, yes in reached(term).items() if yes}
        assert hit == modules, term
    through = reached("ce")
    assert through["aux.projector.fc1.weight"] and through["aux.injection.weight"]


def test_jepa_schedule_is_in_units_of_progress(trunk, tiny):
    aux = trunk.GPT(tiny(JEPA_LAMBDA_MAX=0.5, JEPA_SIGREG_WEIGHT=0.1)).aux
    at = {progress: aux.weights(progress) for progress in (0, 0.29, 0.55, 0.799, 0.81, 1)}
    assert [round(at[p]["jepa_pred"], 3) for p in at] == [0, 0, 0.25, 0.499, 0, 0]
    assert at[0.55]["sigreg"] == pytest.approx(0.025)


def test_sigreg_directions_are_fresh_each_step_and_equal_on_ranks(trunk, tiny):
    first, second = (trunk.GPT(tiny()).aux for _ in range(2))
    assert torch.equal(first.inputs(3, "cpu"), second.inputs(3, "cpu"))
    assert not torch.equal(first.inputs(3, "cpu"), first.inputs(4, "cpu"))
    assert torch.allclose(first.inputs(3, "cpu").norm(dim=0), torch.ones(16))


def test_newton_schulz_orthogonalises(trunk):
    x = torch.randn(3, 48, 20, generator=torch.Generator().manual_seed(0))
    for shape in (x, x.mT):
        values = torch.linalg.svdvals(trunk.newton_schulz(shape.contiguous(), 8, torch.float32))
        assert values.min() > 0.5 and values.max() < 1.4


@pytest.mark.parametrize("cap", [0, 60])
def test_rate_ends_at_its_floor_in_both_clocks(trunk, tiny, cap):
    """A run of 1,000 steps that the clock cuts at step
    600 (cap 60 s, 0.1 s a step) or that ends by itself."""
    args = tiny(ITERATIONS=1000, WARMDOWN_ITERS=300, MIN_LR=0.1, MAX_WALLCLOCK_SECONDS=cap)
    rates, step = [], 0
    while (progress := max(step / 1000, step * 0.1 / cap if cap else 0)) < 1:
        rates.append(trunk.rate_at(progress, args))
        step += 1
    assert step == (600 if cap else 1000)
    assert rates[0] == 1 and rates[len(rates) * 7 // 10 - 1] == pytest.approx(1)
    assert 0.1 < rates[-1] < 0.1 + 2 * 0.9 / (0.3 * step) and trunk.rate_at(1.0, args) == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates, rates[1:]))


def test_ema_is_the_average_of_moving_weights(trunk, tiny):
    """By hand; it forgets the initial weights early, and `apply` puts it in place of the last ones."""
    model = trunk.GPT(tiny())
    model.init_weights(0)
    ema, wanted = trunk.EMA(model, 0.5), [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(0)
    for step in range(12):
        decay = min(0.5, (1 + step) / (10 + step))
        with torch.no_grad():
            for p, average in zip(model.parameters(), wanted):
                p.add_(torch.randn_like(p))
                average.mul_(decay).add_(p, alpha=1 - decay)
        ema.update(step)
    last = [p.detach().clone() for p in model.parameters()]
    ema.apply()
    for p, average, raw in zip(model.parameters(), wanted, last):
        torch.testing.assert_close(p.detach(), average, atol=1e-5, rtol=1e-5)
        assert not torch.equal(p, raw)


def test_row_adagrad_leaves_untouched_rows_alone(trunk, tiny):
    table = torch.nn.Parameter(torch.zeros(1, 10, 4))
    optimizer = trunk.RowAdagrad([table], tiny())
    for _ in range(2):
        table.grad = torch.zeros_like(table)
        table.grad[0, 3] = torch.tensor([2.0, -2.0, 2.0, 2.0])
        optimizer.step(0.1)
    assert table[0, 3, 0].item() == pytest.approx(-0.1 * (1 + 0.5**0.5)) and table[0, 3, 1].item() > 0
    assert table.detach().abs().sum(-1).count_nonzero() == 1


def test_warm_up_leaves_no_trace(trunk, tiny, corpus):
    """Weights, averages, optimizers and RNG after warm-up are bit for bit those of a run without it."""
    args = tiny(DATA_PATH=corpus, WARMUP_STEPS=2)
    runtime = trunk.Runtime(args)
    data = trunk.Dataset(args, False)
    states = []
    for warm in (False, True):
        torch.manual_seed(5)
        trainer = trunk.Trainer(args, data, runtime, trunk.Log(None))
        if warm:
            trainer.warm_up()
        assert (trainer.step, trainer.seconds, trainer.slowest, trainer.loader_state) == (0, 0.0, 0.0, None)
        ids, weights, _ = trunk.Loader(data, args, trainer.plan, 0).next()
        trainer.train_step(ids, weights, 0.0)
        states.append([p.detach().clone() for p in trainer.model.parameters()] + [torch.get_rng_state()]
                      + [*trainer.ema.average, *trainer.optimizers.state().values()])
    assert len(states[0]) == len(states[1]) and all(torch.equal(a, b) for a, b in zip(*states))


def test_time_kept_for_calibration_is_measured_and_that_of_rank_0(trunk, tiny, corpus, monkeypatch):
    """Ranks that kept different reserves would stop at different steps and wait for each other for ever."""
    args = tiny(DATA_PATH=corpus, MAX_WALLCLOCK_SECONDS=100, GPTQ_BATCHES=3)
    runtime, asked = trunk.Runtime(args), []
    monkeypatch.setattr(runtime, "from_main", lambda values: asked.append(values[0]) or [7.0])
    trainer = trunk.Trainer(args, trunk.Dataset(args, False), runtime, trunk.Log(None))
    trainer.warm_up()
    assert asked and min(asked) > 0 and trainer.reserve == 7.0
    trainer.seconds, trainer.args.iterations = 92.9, 10**9
    assert trainer.progress() < 1.0
    trainer.seconds = 93.1
    assert trainer.progress() == 1.0


def test_what_is_queued_on_a_device_ends_within_the_limit(trunk, tiny, corpus):
    """Two steps are under way where the clock is asked, and one more follows."""
    args = tiny(DATA_PATH=corpus, MAX_WALLCLOCK_SECONDS=100, ITERATIONS=10**9)
    trainer = trunk.Trainer(args, trunk.Dataset(args, False), trunk.Runtime(args), trunk.Log(None))
    trainer.slowest, trainer.seconds = 2.0, 93.9
    assert trainer.progress() < 1.0
    trainer.seconds = 94.1
    assert trainer.progress() == 1.0


@pytest.fixture
def clocked(trunk, tiny, corpus, monkeypatch):
    """clocked(reserve, VAR=value, ...) -> (trainer, progress of each step of one second, steps saved): a run
    with a limit of 100 s.
    """
    def clocked(reserve: float, **more):
        args = tiny(DATA_PATH=corpus, ITERATIONS=10**6, WARMDOWN_ITERS=3 * 10**5, MIN_LR=0.05,
                    MAX_WALLCLOCK_SECONDS=100, **more)
        trainer = trunk.Trainer(args, trunk.Dataset(args, False), trunk.Runtime(args), trunk.Log(None))
        trainer.reserve, now, seen, saved = reserve, [0.0], [], []

        def step(ids, weights, progress, inputs):
            now[0] += 1.0
            seen.append(progress)
            return {"ce": torch.zeros(())}

        with monkeypatch.context() as patch:
            patch.setattr(trunk, "time", SimpleNamespace(perf_counter=lambda: now[0]))
            for name, put in (("train_step", step), ("save", lambda name: saved.append(trainer.step)),
                              ("log_step", lambda *_: None), ("write_steps", lambda: None)):
                patch.setattr(trainer, name, put)
            trainer.run(None)
        return trainer, seen, saved
    return clocked


def test_the_rate_is_at_its_floor_when_the_clock_ends_a_run(trunk, clocked):
    """With 20 s kept for calibration, and three steps for what is queued: 77 steps, the last at the floor."""
    trainer, seen, _ = clocked(20.0)
    assert trainer.step == 77 and trunk.rate_at(seen[-1], trainer.args) < 0.1


def test_no_checkpoint_is_saved_so_late_that_it_breaks_the_clock(clocked):
    trainer, _, saved = clocked(0.0, CHECKPOINT_EVERY=1)
    assert saved and max(saved) <= 98 and trainer.step > max(saved) and trainer.seconds <= 100


def test_no_checkpoint_is_saved_at_the_last_step(trunk, tiny, corpus, monkeypatch):
    args = tiny(DATA_PATH=corpus, ITERATIONS=50, CHECKPOINT_EVERY=1)
    trainer = trunk.Trainer(args, trunk.Dataset(args, False), trunk.Runtime(args), trunk.Log(None))
    saved, terms = [], {"ce": torch.zeros(())}
    monkeypatch.setattr(trainer, "save", lambda name: saved.append(trainer.step))
    monkeypatch.setattr(trainer, "train_step", lambda *_: terms)
    monkeypatch.setattr(trainer, "log_step", lambda *_: None)
    monkeypatch.setattr(trainer, "write_steps", lambda: None)
    trainer.run(None)
    assert trainer.step == 50 and saved == [*range(1, 50)]


def test_one_forward_of_weighted_groups_equals_the_mean_over_the_batch(trunk, tiny, alive):
    """Splitting a batch into micro-batches, and padding with weight 0, changes no summed loss term."""
    model = alive(tiny())
    ids = torch.randint(4, 260, (6, 65), generator=torch.Generator().manual_seed(0))
    inputs = model.aux.inputs(0, ids.device)
    whole = model.losses(ids, torch.ones(6), inputs)
    padded = torch.cat((ids[4:], ids[:2]))
    parts = [
        model.losses(ids[:4], torch.ones(4), inputs),
        model.losses(padded, torch.tensor([1.0, 1, 0, 0]), inputs),
    ]
    for name, value in whole.items():
        assert sum(part[name] for part in parts).item() == pytest.approx(value.item(), rel=1e-5)
