"""Rounding and entropy coding: GPTQ, entropy-constrained rounding, rANS."""

import math

import numpy as np
import pytest
import rate
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st


def entropy_bits(q: np.ndarray) -> float:
    _, counts = np.unique(q, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def test_gptq_loses_less_output_than_rounding_to_the_nearest(trunk):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((48, 96)).astype(np.float32)
    # Correlated inputs
    x = (rng.standard_normal((4000, 32)) @ rng.standard_normal((32, 96))).astype(np.float32)
    x += 0.1 * rng.standard_normal(x.shape).astype(np.float32)
    losses = []
    for hessian in (None, x.T @ x):
        q, step = trunk.quantise(weight, 4, 3.0, 1, hessian=hessian)
        assert np.abs(q).max() <= 7
        losses.append(np.square(x @ (q * step.astype(np.float32) - weight).T).sum())
    assert losses[1] < 0.5 * losses[0]


def test_gptq_against_the_definition_column_by_column(trunk):
    """One column at a time with an explicit inverse of
    what is left of the hessian: the greedy of the paper."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 12)).astype(np.float32) * 3
    a = rng.standard_normal((40, 12))
    hessian = a.T @ a
    power = np.diag(hessian)
    order = np.argsort(-power, kind="stable")
    left = x[:, order].astype(np.float64)
    h = hessian[np.ix_(order, order)] + np.eye(12) * 0.01 * power.mean()
    want = np.empty_like(x)
    for j in range(12):
        want[:, order[j]] = chosen = np.clip(np.rint(left[:, j]), -31, 31)
        inverse = np.linalg.inv(h[j:, j:])
        left[:, j:] -= ((left[:, j] - chosen) / inverse[0, 0])[:, None] * inverse[0]
    assert (trunk.gptq(x, hessian, 31) == want).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_entropy_constrained_rounding_only_moves_towards_zero(trunk, rows, columns, rate, seed):
    x = (np.random.default_rng(seed).standard_normal((rows, columns)) * 4).astype(np.float32)
    near, q = trunk.nearest(x, 15), trunk.cheapest(x, 15, rate)
    assert ((q == near) | (q == near - np.sign(near)) | (q == 0)).all()
    if rate == 0:
        assert (q == near).all()


def test_entropy_constrained_rounding_buys_bits_for_error(trunk):
    x = (np.random.default_rng(0).standard_t(3, (1, 50_000)) * 2).astype(np.float32)
    points = [(entropy_bits(q) / x.size, np.square(q - x).mean())
              for q in (trunk.nearest(x, 31), trunk.cheapest(x, 31, 0.05), trunk.cheapest(x, 31, 0.2))]
    assert points[0][0] > points[1][0] > points[2][0] and points[0][1] < points[1][1] < points[2][1]


# rANS


def layout(trunk, shapes, bits=6):
    return trunk.planes([[name, list(shape), bits, axis] for name, shape, axis in shapes])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 400), st.integers(1, 20), st.integers(2, 8), st.floats(0.01, 60),
       st.integers(0, 2**32 - 1))
@example(3, 300, 8, 6, 2.0, 0)  # 3 slices at a time, of 8
def test_rans_returns_every_byte(trunk, rows, columns, width, bits, spread, seed):
    rng = np.random.default_rng(seed)
    top = 2 ** (bits - 1) - 1
    plan = layout(
        trunk,
        [("blocks.0.mlp.fc.weight", (rows, columns), 1), ("ngram.table", (3, columns, width), 1)],
        bits,
    )
    size = (rows + 3 * width) * columns
    q = np.clip(np.rint(rng.standard_normal(size) * spread), -top, top).astype(np.int8)
    raw = q.tobytes() + rng.bytes(2 * plan[-1].places)
    assert len(raw) == sum(plane.slices * plane.places for plane in plan)
    blob = trunk.rans_encode(raw, plan)
    assert trunk.rans_decode(blob, plan) == raw


def test_rans_is_within_its_bound_of_the_entropy(trunk):
    """Independent normal weights leave nothing to contexts:
    at most 0.3 % over the order-0 entropy, all told."""
    rng = np.random.default_rng(0)
    q = np.clip(np.rint(rng.standard_normal((1024, 1024)) * 2.6), -31, 31).astype(np.int8)
    plan = layout(trunk, [("blocks.0.mlp.fc.weight", (1024, 1024), 1)])
    steps = (rng.random(1024) * 0.01 + 0.05).astype("<f2").view(np.uint8).reshape(-1, 2)
    raw = q.tobytes() + steps[:, 0].tobytes() + steps[:, 1].tobytes()
    blob = trunk.rans_encode(raw, plan)
    assert 8 * len(blob) < 1.003 * (entropy_bits(q) + 8 * steps.size)


def test_contexts_use_what_columns_and_buckets_have_in_common(trunk):
    rng = np.random.default_rng(0)
    spread = np.exp(rng.standard_normal(2048))  # of each column, of each bucket
    matrix = np.rint(rng.standard_normal((256, 2048)) * spread)
    table = np.rint(rng.standard_normal((4, 16, 2048)) * spread[None, None])
    for q, shape, name, axis in ((matrix, (256, 2048), "blocks.0.mlp.fc.weight", 1),
                                 (table, (4, 2048, 16), "ngram.table", 1)):
        q = np.clip(q, -31, 31).astype(np.int8)
        plan = layout(trunk, [(name, shape, axis)])
        blob = trunk.rans_encode(q.tobytes() + bytes(2 * plan[-1].places), plan)
        assert 8 * len(blob) < 0.93 * entropy_bits(q)


def test_auto_is_rans_and_all_compressors_agree(trunk, tiny, alive):
    tensors = {name: p.detach().numpy() for name, p in alive(tiny()).exported().items()}
    found, sizes = {}, {}
    for name in ("rans", "lzma", "auto"):
        blob = trunk.pack(tensors, tiny(COMPRESSOR=name))
        header, found[name] = trunk.unpack(blob, name)
        sizes[name] = len(blob)
        assert header["compressor"] == {"auto": "rans"}.get(name, name)
    assert sizes["auto"] == sizes["rans"]
    for name in found:
        assert all((found[name][key] == found["rans"][key]).all() for key in tensors)


def test_without_constriction_lzma_takes_over(trunk, tiny, alive, monkeypatch):
    tensors = {name: p.detach().numpy() for name, p in alive(tiny()).exported().items()}
    blob = trunk.pack(tensors, tiny(COMPRESSOR="rans"))
    monkeypatch.setattr(trunk, "constriction", None)
    with pytest.raises(trunk.UserError, match="packed by rANS: `pip install constriction`"):
        trunk.unpack(blob, "file")
    header, _ = trunk.unpack(trunk.pack(tensors, tiny(COMPRESSOR="rans")), "file")
    assert header["compressor"] == "lzma"


def test_size_plan_of_normal_weights(trunk, tiny):
    """Weights that are normal, as the plan takes them to be, pack into what it says."""
    args = tiny(MODEL_DIM=128, MLP_MULT=3, NGRAM_ORDERS=0, COMPRESSOR="rans",
                JEPA_CHUNK_SIZE=0, NUM_LAYERS=4)
    model = trunk.GPT(args)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(p.shape, generator=generator).numpy()
        for name, p in model.exported().items()
    }
    planned = sum(rate.size_plan(trunk, model, args).values())
    assert len(trunk.pack(tensors, args)) == pytest.approx(planned, rel=0.02)


def test_gptq_in_a_real_run(run, trunk, tmp_path):
    """Calibration stands on its own clock and inside the training seconds, and it rounds every matrix
    whose inputs it has seen otherwise than to the nearest.
    """
    found = {}
    for how in ("nearest", "gptq"):
        settings = {"GPTQ_BATCHES": 2, "COMPRESSOR": "rans", "BITS": "mlp:5"}
        code, output, metrics = run(RUN_ID=how, QUANT_ROUND=how, **settings)
        assert code == 0, output
        path = tmp_path / "runs" / how / "artifact.bin"
        found[how] = trunk.unpack(path.read_bytes(), how)[1]
    moved = {name for name, x in found["gptq"].items() if not np.array_equal(x, found["nearest"][name])}
    assert {"tok_emb.weight", "ngram.proj.weight", "aux.injection.weight"} <= moved
    assert "ngram.table" not in moved
    parts = "attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj"
    assert {f"blocks.{i}.{part}.weight" for i in range(3) for part in parts} <= moved
    assert metrics["clocks"]["calibration"] > 0
    assert metrics["train_seconds"] >= metrics["clocks"]["training"]
    assert "final_int5_sliding" in output
    assert math.isfinite(metrics["val_bpb"])


def test_hessians_do_not_depend_on_the_ranks(trunk, tiny, corpus):
    """Where ranks or micro-steps have a slot to spare, it repeats a row, which must not count twice."""
    args = tiny(DATA_PATH=corpus, JEPA_CHUNK_SIZE=0, DRAFT=0)
    data, runtime = trunk.Dataset(args, False), trunk.Runtime(args)
    found = []
    for ranks in (1, 5):
        total = {}
        for rank in range(ranks):
            runtime.rank, runtime.world_size = rank, ranks
            trainer = trunk.Trainer(args, data, runtime, trunk.Log(None))
            runtime.world_size = 1  # each rank's sums, without a group
            for name, part in trainer.moments(1).items():
                total[name] = total.get(name, 0) + part
        found.append(total)
    assert found[0].keys() == found[1].keys()
    assert 5 * trunk.BatchPlan.make(args, 5).groups > trainer.plan.rows  # some are spare
    for name, wanted in found[0].items():
        np.testing.assert_allclose(found[1][name], wanted, rtol=1e-4, atol=1e-3, err_msg=name)


def test_hessians_are_the_second_moments_of_the_inputs(trunk, tiny, alive, corpus):
    args = tiny(DATA_PATH=corpus, JEPA_CHUNK_SIZE=0)
    data, runtime = trunk.Dataset(args, False), trunk.Runtime(args)
    trainer = trunk.Trainer(args, data, runtime, trunk.Log(None))
    ids, _, _ = trunk.Loader(data, args, trainer.plan, 0).next()
    sums = trainer.input_moments(ids, torch.ones(ids.shape[:2], dtype=torch.bool), {})
    wanted = {
        name
        for name, p in trainer.model.named_parameters()
        if p.ndim == 2 and name.startswith("blocks") and name.endswith("weight")
    }
    assert wanted <= set(sums)
    seen = []
    block = trainer.model.blocks[1].mlp
    hook = block.fc.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        for rows in ids:
            trainer.model.hidden(rows[:, :-1], trainer.model.rotary_train)
    hook.remove()
    x = torch.cat(seen).double()
    assert torch.allclose(sums["blocks.1.mlp.fc.weight"].double(), x.T @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings, words", [
    ({"BITS": "mlp:9"}, "BITS: 'mlp:9' is not accepted"),
    ({"BITS": "blocks:6"}, "BITS: 'blocks:6' is not accepted"),
    ({"QUANT_ROUND": "gptq", "GPTQ_BATCHES": 0}, "GPTQ_BATCHES='0' is not accepted"),
    ({"QUANT_CLIP": "mse"}, "QUANT_CLIP='mse' is retired: a search lost at equal size"),
    ({"QUANT_RATE": "ngram:-1"}, "QUANT_RATE: 'ngram:-1' is not accepted"),
])
def test_bad_settings_are_one_line(run, settings, words):
    code, output, metrics = run(**settings)
    assert code == 2 and words in output and "Traceback" not in output and metrics is None
