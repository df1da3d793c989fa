"""The record BytePatchJEPA: parameters as published, causal
patches, cached decoding, SIGReg, the exporter's rounding."""

import json
import math
import re

import numpy as np
import pytest
import rate
import torch
from conftest import ROOT, assert_drafts_follow_score, assert_stream_follows_score, enlivened
from family import load_script

RECORD, = (ROOT / "records").glob("*_BytePatchJEPA")
SCRIPT = RECORD / "train_gpt.py"
section = load_script(RECORD)

SMALL = {
    "NUM_LAYERS": 2, "ENCODER_REPEATS": 2, "MODEL_DIM": 32, "NUM_HEADS": 4, "NUM_KV_HEADS": 2,
    "DECODER_LAYERS": 2, "DECODER_HEADS": 2, "LATENT_DIM": 16, "SIGREG_NUM_PROJ": 16,
    "SIGREG_GROUP": 2, "TRAIN_SEQ_LEN": 61, "TRAIN_BATCH_TOKENS": 488, "EVAL_STRIDE": 16,
    "EVAL_BATCH_TOKENS": 2048, "TTT": 0, "TTT_CHUNK_TOKENS": 1024, "ROPE_DIMS": 0, "XSA_LAST_N": 0,
    "LN_SCALE": 0, "LOGIT_SOFTCAP": 0, "PATCH_SPLIT": "fixed", "JEPA_CHUNK_SIZE": "",
    "NGRAM_ORDERS": "", "BIGRAM_VOCAB_SIZE": "",
}
SPACE = {"PATCH_SPLIT": "space"}
TTT = {"TTT": "sgd", "TTT_CHUNK_TOKENS": 32, "TTT_LR": 0.05, "TTT_BATCH_ROWS": 2}
VARIANTS = [
    {},
    SPACE,
    {"PATCH_CONDITION": "context"},
    {**SPACE, "PATCH_CONDITION": "both"},
    {"PATCH_SIZE": 0},
    {"PATCH_SIZE": 3},
    {**SPACE, "PATCH_SIZE": 3},
    {"ENCODER_REPEATS": 1, "EVAL_SEQ_LEN": 96, "EVAL_STRIDE": 8},
    {
        "ENCODER_REPEATS": 3, "NUM_LAYERS": 1, "XSA_LAST_N": 1, "LN_SCALE": 1, "ROPE_DIMS": 4,
        "LOGIT_SOFTCAP": 10, "RESID_MIX": 0,
    },
]


def settings(**overrides):
    return section.Hyperparameters({key: str(value) for key, value in {**SMALL, **overrides}.items()})


def alive(seed: int = 0, **overrides):
    return enlivened(section, settings(**overrides), seed).eval()


@pytest.fixture(scope="module")
def ids(corpus):
    found = np.fromfile(next(corpus.glob("*_val_*.bin")), "<u2", offset=1024)[:230].astype(np.int64)
    found[[0, 70, 71, 140]] = 1  # several documents, one of them empty
    found[160:190] = 4 + ord("x")  # a word longer than any patch
    found[200:206] = 4 + ord(" ")
    return found


# Parameters


def published_tensors():
    """{name here: shape}, written down from #696, whose names are to the right."""
    found = {"encoder.tok_emb.weight": (260, 480),  # tok_emb
             "tok_emb.weight": (260, 480),  # decoder_token_emb
             # patch_pos, W_in
             "encoder.patch_pos.weight": (8, 480), "encoder.patch_in.weight": (480, 8 * 480),
             "aux.start_latent": (192,), "aux.from_latent.weight": (480, 192),  # start_latent, W_cond
             "lm_head.weight": (260, 480)}  # decoder_out
    for name in ("projector", "predictor"):
        found |= {f"aux.{name}.fc1.weight": (960, 480), f"aux.{name}.fc2.weight": (192, 960)}
    for stack, count, heads, kv_dim in (("encoder.blocks", 5, 6, 240), ("blocks", 7, 4, 480)):
        for i in range(count):
            found |= {
                f"{stack}.{i}.{name}": shape
                for name, shape in {
                    "attn.c_q.weight": (480, 480), "attn.c_k.weight": (kv_dim, 480),
                    "attn.c_v.weight": (kv_dim, 480), "attn.proj.weight": (480, 480),
                    "attn.q_gain": (heads,), "mlp.fc.weight": (960, 480),
                    "mlp.proj.weight": (480, 960), "attn_scale": (480,), "mlp_scale": (480,),
                    "resid_mix": (2, 480),
                }.items()
            }
    return found


def test_the_default_model_has_the_tensors_of_the_published_one():
    args = section.Hyperparameters()
    with torch.device("meta"):
        model = section.GPT(args)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == published_tensors()
    assert sum(p.numel() for p in model.parameters()) == 24_593_530
    assert sum(p.numel() for p in model.encoder.blocks.parameters()) == 5 * 1_614_726
    assert sum(p.numel() for p in model.blocks.parameters()) == 7 * 1_845_124
    groups = {}
    for name, p in model.named_parameters():
        group = section.Optimizers.group_of(name, p)
        groups[group] = groups.get(group, 0) + p.numel()
    assert groups == {"embed": 253_440, "matrix": 24_192_000, "head": 124_800, "scalar": 23_290}
    assert sum(p.numel() for p in model.exported().values()) == 24_593_530 - 645_120  # no projector
    assert (
        sum(rate.size_plan(section, model, args).values()) + len(SCRIPT.read_bytes())
        < args.artifact_budget_bytes
    )


@pytest.mark.parametrize("overrides,gone", [
    ({}, ["projector"]), ({"PATCH_CONDITION": "context"}, ["predictor", "projector"]),
    ({"PATCH_CONDITION": "both"}, ["projector"])], ids=str)
def test_what_only_training_uses_is_not_exported(overrides, gone):
    model = alive(**overrides)
    left = {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("aux.")}
    kept = {name.split(".")[1] for name in model.exported() if name.startswith("aux.")}
    assert sorted(left - kept) == gone


def test_no_patches_is_the_decoder_alone():
    names = [name for name, _ in alive(PATCH_SIZE=0).named_parameters()]
    assert not [name for name in names if name.startswith(("encoder", "aux"))]
    assert {name.split(".")[0] for name in names} == {"tok_emb", "blocks", "lm_head"}


@pytest.mark.parametrize("overrides", VARIANTS[:5], ids=str)
def test_every_parameter_learns(overrides):
    args = settings(**overrides)
    model = section.GPT(args)
    model.init_weights(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):  # the zero projections of blocks stop their insides at first
        model.zero_grad(set_to_none=True)
        ids = torch.randint(4, 60, (4, 62), generator=generator)
        inputs = model.aux.inputs(0, ids.device) if model.aux else None
        sums = model.losses(ids, torch.ones(4), inputs)
        weights = model.aux.weights(0.5) if model.aux else {}
        (sums["ce"] / 244 + sum(weight * sums[name] for name, weight in weights.items())).backward()
        optimizer.step()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


# Patches


def slow_patches(ids, size: int, space: bool) -> list[list[int]]:
    """Complete patches and, last, the one that is not."""
    found = [[]]
    for token in ids:
        found[-1].append(int(token))
        if len(found[-1]) == size or space and token in (4 + 32, 4 + 10):
            found.append([])
    return found


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("split", ["fixed", "space"])
def test_patches_are_those_of_a_slow_reference(ids, size, split):
    args = settings(PATCH_SIZE=size, PATCH_SPLIT=split)
    rows = np.stack([ids[:100], ids[120:220]])
    room = section.patch_room(100, args)
    patches, complete = section.cut_into_patches(torch.from_numpy(rows), room, args)
    assert patches.shape == (2, room, size)
    for row, found, counts in zip(rows, patches.tolist(), complete.tolist()):
        for t in range(100):
            assert counts[t] == min(len(slow_patches(row[: t + 1], size, split == "space")) - 1, room)
        want = slow_patches(row, size, split == "space")[:-1][:room]
        assert found[: len(want)] == [patch + [0] * (size - len(patch)) for patch in want]


def test_patches_beyond_the_room_are_dropped():
    args = settings(**SPACE)
    patches, complete = section.cut_into_patches(torch.full((1, 40), 36), 10, args)
    assert complete[0].tolist() == [*range(1, 11), *[10] * 30] and (patches[..., 0] == 36).all()
    assert (patches[..., 1:] == 0).all()


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_no_position_depends_on_a_later_id(ids, overrides):
    model = alive(**overrides)
    length = model.args.eval_seq_len
    for start in (0, 150):  # the second holds the long word and the run of spaces
        row = torch.from_numpy(ids[start : start + length])[None][:, :80]
        with torch.no_grad():
            before = model.hidden(row, model.rotary_eval)
            for at in range(row.size(1)):
                for token in (4 + ord(" "), 4 + ord("h"), 1):
                    if token != row[0, at]:
                        other = row.clone()
                        other[0, at] = token
                        change = (model.hidden(other, model.rotary_eval) - before)[0].abs().amax(-1)
                        assert not change[:at].any() and change[at] > 1e-4, (at, token)


@pytest.mark.parametrize("overrides", [{}, {"PATCH_CONDITION": "context"}], ids=str)
def test_the_decoder_hears_of_a_patch_when_it_is_complete(ids, overrides):
    """Through the condition alone, the bytes of a patch reach the positions from its last byte on."""
    model, row = alive(**overrides), torch.from_numpy(ids[:61])[None]
    with torch.no_grad():
        for block in model.blocks:  # the decoder reads nothing but its own position
            block.attn.proj.weight.zero_()
        before = model.hidden(row, model.rotary_eval)
        other = row.clone()
        other[0, 16] = 104  # the first byte of the third patch
        after = model.hidden(other, model.rotary_eval)
    moved = (after - before)[0].abs().amax(-1) > 1e-5
    assert moved.nonzero().flatten().tolist() == [16, *range(23, 61)]


@pytest.mark.parametrize(
    "overrides", [*VARIANTS, TTT, {**TTT, **SPACE, "TTT_MODULES": "blocks,encoder.blocks"}], ids=str
)
def test_cached_decoding_equals_the_full_forward_everywhere(ids, overrides):
    model = alive(**overrides)
    stream = assert_stream_follows_score(section, model, ids)
    assert (stream.learner is not None and stream.learner.updates > 0) == ("TTT" in overrides)


@pytest.mark.parametrize(
    "overrides", [{}, SPACE, {**SPACE, "PATCH_CONDITION": "both"}, {"PATCH_SIZE": 0}], ids=str
)
def test_a_pass_over_drafts_is_the_scorer(ids, overrides):
    assert_drafts_follow_score(section, alive(**overrides), ids)


def test_draft_heads_leave_the_model_as_it_is():
    plain, heads = (section.GPT(settings(**more)) for more in ({}, {"DRAFT": 2}))
    for model in (plain, heads):
        model.init_weights(3)
    tensors = dict(heads.named_parameters())
    assert all(torch.equal(p, tensors[name]) for name, p in plain.named_parameters())
    rows = torch.randint(
        4, 260, (8, settings().train_seq_len + 1), generator=torch.Generator().manual_seed(1)
    )
    inputs = heads.aux.inputs(0, rows.device)
    found = heads.losses(rows, torch.ones(8), inputs)
    assert torch.equal(found["ce"], plain.losses(rows, torch.ones(8), inputs)["ce"])
    found["draft"].backward()
    assert {name for name, p in tensors.items() if p.grad is not None and p.grad.any()} <= {
        name for name in tensors if name.startswith("draft.")}
    optimizers = section.Optimizers(heads, heads.args, section.Runtime(heads.args))
    assert len(optimizers.replicated) - optimizers.counted == 2


@pytest.mark.parametrize("overrides", [{}, SPACE], ids=str)
def test_decoding_encodes_each_patch_once(ids, overrides, monkeypatch):
    model, seen = alive(EVAL_SEQ_LEN=61, EVAL_STRIDE=61, **overrides), []
    forward = model.encoder.forward
    monkeypatch.setattr(
        model.encoder, "forward", lambda new, *rest: seen.append(new.size(1)) or forward(new, *rest)
    )
    stream = section.stream(model)
    for token in ids[:61]:
        stream.push(token)
        stream.logprobs()
    complete = len(slow_patches(ids[:61], 8, bool(overrides))) - 1
    assert sum(seen) == complete and max(seen) == 1 and len(stream.past.passes) == 2
    assert stream.past.given.size(1) == complete + 1


# The latent


def test_sigreg_is_the_published_statistic():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 32, 12, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(12, 64, generator=generator), dim=0)
    share = torch.full((2, 32), 1 / 32)

    def slow(z):
        t = [3 * k / 16 for k in range(17)]
        w = [(2 if 0 < k < 16 else 1) * 3 / 16 * math.exp(-t[k] ** 2 / 2) for k in range(17)]
        total = 0.0
        for direction in directions.T:
            p = z @ direction
            total += sum(w[k] * ((torch.cos(t[k] * p).mean() - math.exp(-t[k] ** 2 / 2)) ** 2
                                 + torch.sin(t[k] * p).mean() ** 2) for k in range(17))
        return 32 * total / directions.size(1)
    found = section.sigreg(z, share, directions, 17)
    torch.testing.assert_close(found, torch.stack([slow(z[0]), slow(z[1])]))
    many = torch.randn(400, 32, 12, generator=generator)
    for scale, value in ((1.0, 1.04), (2.0, 9.2), (0.5, 5.3), (0.0, 12.9)):  # measured on the published code
        found = section.sigreg(scale * many, share[:1].expand(400, -1), directions, 17).mean()
        assert found == pytest.approx(value, rel=0.05), scale
    assert section.sigreg_floor(torch.tensor([32.0]), 17).item() == pytest.approx(1.0525, rel=1e-3)
    assert section.sigreg_floor(torch.tensor([64.0]), 17).item() == pytest.approx(1.0525 / 2, rel=1e-3)
    weighted = torch.cat((share, torch.zeros(2, 7)), 1)
    padded = torch.cat((z, torch.full((2, 7, 12), 9.0)), 1)
    torch.testing.assert_close(
        section.sigreg(padded, weighted, directions, 17), section.sigreg(z, share, directions, 17)
    )


@pytest.mark.parametrize("overrides", [{}, SPACE], ids=str)
def test_terms_are_those_of_a_slow_loop(ids, overrides):
    model = alive(**overrides)
    rows = torch.from_numpy(np.stack([ids[i : i + 61] for i in (0, 40, 100, 160)]))
    with torch.no_grad():
        directions = model.aux.inputs(3, rows.device)
        _, terms = model.states(rows, model.rotary_train, aux_inputs=directions)
        errors, targets, latents = ([[], []] for _ in range(3))
        for i, row in enumerate(rows):
            want = slow_patches(row, 8, bool(overrides))[:-1][: section.patch_room(61, model.args)]
            patches = torch.tensor([[patch + [0] * (8 - len(patch)) for patch in want]])
            rotary = model.rotary_train.split(model.rotary_widths, -1)[1]
            embedded, context = model.encoder(patches, model.ln_scales, rotary, [])
            z, guess = model.aux.projector(embedded)[0], model.aux.predictor(context)[0]
            errors[i // 2].append((guess[:-1] - z[1:]).square())
            targets[i // 2].append(z[1:])
            latents[i // 2].append(z)
        for group in range(2):
            assert terms["jepa_pred"][group] == pytest.approx(
                torch.cat(errors[group]).mean().item(), rel=1e-4
            )
            variance = torch.cat(targets[group]).var(0, correction=0).mean().item()
            assert terms["latent_var"][group] == pytest.approx(variance, rel=1e-4)
            z = torch.cat(latents[group])[None]
            want = section.sigreg(
                z, torch.full(z.shape[:2], 1 / z.size(1)), directions, 17
            )
            assert terms["sigreg"][group] == pytest.approx(want.item(), rel=1e-3)


def test_gradients_go_where_they_should(ids):
    model = alive()
    rows = torch.from_numpy(np.stack([ids[:62], ids[62:124]]))
    sums = model.losses(rows, torch.ones(2), model.aux.inputs(0, rows.device))

    def reached(term):
        names, params = zip(*model.named_parameters())
        grads = torch.autograd.grad(sums[term].sum(), params, retain_graph=True, allow_unused=True)
        parts = (name.split(".")[: 2 if name.startswith(("encoder", "aux")) else 1] for name in names)
        return {
            ".".join(part)
            for part, grad in zip(parts, grads)
            if grad is not None and grad.abs().max() > 0
        }
    embeds = {"encoder.tok_emb", "encoder.patch_pos", "encoder.patch_in"}
    predicts = embeds | {"encoder.blocks", "aux.predictor"}
    assert reached("ce") == predicts | {"tok_emb", "blocks", "lm_head", "aux.start_latent", "aux.from_latent"}
    assert reached("jepa_pred") == predicts  # the target stands still
    assert reached("sigreg") == embeds | {"aux.projector"}


def test_directions_are_fresh_unit_columns_from_seed_and_step():
    aux = alive().aux
    first, again, later = (aux.inputs(step, torch.device("cpu")) for step in (5, 5, 6))
    assert torch.equal(first, again) and not torch.allclose(first, later)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(16))


def test_weights_keep_ce_at_one_and_zero_switches_off(ids):
    weights = alive().aux.weights(0.3)
    assert weights == {"jepa_pred": pytest.approx(0.5 / 3), "sigreg": pytest.approx(0.02 / 3)}
    aux = alive(JEPA_PRED_WEIGHT=0, SIGREG_WEIGHT=0).aux
    assert aux.inputs(0, torch.device("cpu")) is None and not any(aux.weights(0.3).values())
    model = alive(SIGREG_WEIGHT=0)
    rows = torch.from_numpy(ids[None, :61]).repeat(2, 1)
    directions = model.aux.inputs(0, rows.device)
    _, terms = model.states(rows, model.rotary_train, aux_inputs=directions)
    assert sorted(terms) == ["jepa_pred", "latent_var"]


# The exporter


def test_the_published_exporter_can_be_chosen():
    """Per tensor one of five quantiles of |row|; steps
    of at least 1 / 31, which only large weights exceed."""
    rng = np.random.default_rng(0)
    for scale in (0.05, 3.0):
        weight = (scale * rng.standard_t(3, (40, 500))).astype(np.float32)
        q, step = section.quantise(weight, 6, 5.0, 1, clip="tensor")
        errors = {}
        for share in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
            clip = torch.quantile(torch.from_numpy(weight).abs(), share, dim=1)
            s = (clip / 31).clamp_min(1 / 31).half().float()[:, None]
            trial = (torch.from_numpy(weight) / s).round().clamp(-31, 31)
            errors[share] = float((trial * s - torch.from_numpy(weight)).square().sum())
            if errors[share] == min(errors.values()):
                best, want = trial, s
        assert np.array_equal(q, best.numpy()) and np.array_equal(step.astype(np.float32), want.numpy())
        assert (step >= np.float16(1 / 31)).all()
    std = section.quantise(0.05 * weight / scale, 6, 5.0, 1)
    assert std[1].max() < 1 / 31


@pytest.mark.parametrize("shape, axis", [((24, 40), 1), ((24, 40), 0), ((3, 64, 8), 1)])
def test_qat_rounds_as_the_exporter_does(shape, axis):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.03
    rounding = section.Rounding(6, 12.0, axis)
    q, step = section.quantise(weight.numpy(), 6, 12.0, axis)
    want = q * step.astype(np.float32)
    assert np.allclose(rounding(weight).numpy(), want, atol=1e-7, rtol=0)
    weight.requires_grad_(True)
    rounding(weight).sum().backward()
    assert (weight.grad == 1).all()  # straight through


def test_the_switch_of_qat_chooses_between_two_graphs():
    """Switched off again, a model runs the graph that it had before: a reloaded one needs no other."""
    layer, rounding = section.CastedLinear(96, 64), section.Rounding(3, 2.0, 1)
    x = torch.randn(5, 96)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    found = []
    for on in (False, True, False, True):
        if on:
            layer.qat = rounding
        elif found:
            del layer.qat
        found.append(compiled(x))
    assert counters["unique_graphs"] - before == 2
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])

    assert torch.allclose(found[0], x @ layer.weight.T, atol=1e-5)
    assert not torch.allclose(found[1], found[0], atol=1e-3)
    q, step = section.quantise(layer.weight.detach().numpy(), 3, 2.0, 1)
    want = x @ torch.from_numpy(q * step.astype(np.float32)).T
    assert torch.allclose(found[1], want, atol=1e-5)


def test_without_rounding_a_trained_model_is_like_a_reloaded_one():
    args = settings(MODEL_DIM=64, DEVICE="cpu", DTYPE="fp32")
    trainer = section.Trainer(args, None, section.Runtime(args), None)
    names = set(dict(trainer.model.named_modules()))
    assert not any(hasattr(module, "qat") for module in trainer.model.modules())
    trainer.set_rounding(True)
    assert sum(hasattr(module, "qat") for module in trainer.model.modules()) == len(trainer.roundings)
    trainer.set_rounding(False)
    assert set(dict(trainer.model.named_modules())) == names


def test_ids_that_are_pushed_without_a_question_are_read_later(ids):
    model = alive(**SPACE)
    nats, _ = section.score(model, ids[:60])
    stream = section.stream(model)
    for t, token in enumerate(ids[:59]):
        stream.push(token)
        if t % 7 == 0:
            assert nats[t] == pytest.approx(-stream.logprobs()[ids[t + 1]], abs=1e-4), t


def test_validation_under_rounding_scores_the_weights_that_it_keeps():
    """`best.safetensors` holds unrounded weights, so these are what is compared."""
    args = settings(LATE_QAT_THRESHOLD=0.2, MODEL_DIM=64, DEVICE="cpu", DTYPE="fp32")
    trainer = section.Trainer(args, None, section.Runtime(args), section.Log(None))
    trainer.set_rounding(True)
    seen = []

    class Reader:
        def run(self, name, model, length, stride):
            seen.append(any(hasattr(module, "qat") for module in model.modules()))
            return {"val_bpb": math.inf, "val_loss": 1.0}

    trainer.validate(Reader())
    assert seen == [False]


def test_modules_that_are_not_there_are_refused_before_training(run):
    code, output, metrics = run(script=SCRIPT, **{**SMALL, **TTT, "TTT_MODULES": "blokcs"})
    assert code == 2 and metrics is None and "TTT_MODULES='blokcs': no module 'blokcs'" in output
    assert "step:1/" not in output


def test_the_draft_loss_is_a_mean_without_other_terms(ids):
    """Groups pool rows for SIGReg; without its terms a group still counts once."""
    shown = []
    for weight in (0, 1):
        args = settings(DEVICE="cpu", DTYPE="fp32", DRAFT=2, JEPA_PRED_WEIGHT=weight, SIGREG_WEIGHT=weight)
        trainer = section.Trainer(args, None, section.Runtime(args), section.Log(None))
        rows = torch.from_numpy(np.stack([ids[i : i + 62] for i in range(0, 8 * 20, 20)]))
        inputs = trainer.model.aux.inputs(0, rows.device) if trainer.model.aux is not None else None
        sums = trainer.model.losses(rows, torch.ones(len(rows)), inputs)
        shown.append(trainer.means({name: total.item() for name, total in sums.items()})["draft"])
    assert shown[0] == pytest.approx(shown[1], rel=1e-4) and 4 < shown[0] < 8


def test_training_rounds_everything_as_the_exporter_does():
    args = settings(LATE_QAT_THRESHOLD=0.2, MODEL_DIM=64, DEVICE="cpu", DTYPE="fp32")
    runtime = section.Runtime(args)
    trainer = section.Trainer(args, None, runtime, None)
    trainer.set_rounding(True)
    coarse = 0
    for name, p in trainer.model.exported().items():
        bits, axis = section.quant_plan(name, p.shape, args)
        owner = trainer.model.get_submodule(name.rpartition(".")[0])
        assert hasattr(owner, "qat") == bool(bits), name
        if bits:
            q, step = section.quantise(p.detach().numpy(), bits, 5.0, axis)
            np.testing.assert_allclose(
                section.rounded(owner).detach().numpy(), q * step.astype(np.float32), atol=1e-6
            )
            coarse += 1
    names = {name for name in trainer.model.exported() if "tok_emb" in name}
    assert coarse > 10 and names == {"tok_emb.weight", "encoder.tok_emb.weight"}
    assert (
        section.rate_at(1 - 0.19 * 3500 / 20000, args)
        < 0.2
        < section.rate_at(1 - 0.21 * 3500 / 20000, args)
    )


@pytest.mark.parametrize("overrides", [{}, {**SPACE, "PATCH_CONDITION": "both"}], ids=str)
def test_gptq_has_the_inputs_of_every_matrix(ids, overrides):
    args = settings(DEVICE="cpu", DTYPE="fp32", MODEL_DIM=64, **overrides)
    trainer = section.Trainer(args, None, section.Runtime(args), None)
    rows = torch.from_numpy(np.stack([ids[:62], ids[62:124]]))[None]
    sums = trainer.input_moments(rows, torch.ones(1, 2, dtype=torch.bool), {})
    matrices = {name: p for name, p in trainer.model.exported().items()
                if section.quant_plan(name, p.shape, args)[0] and "tok_emb" not in name}
    for name, p in matrices.items():
        assert sums[name].shape == (p.size(1), p.size(1)) and sums[name].diagonal().sum() > 0, name


# Settings


def test_published_names_are_aliases():
    args = section.Hyperparameters({"VAL_SLIDING_STRIDE": "128", "TTT_ENABLED": "0", "TTT_BATCH_SEQS": "8",
                                    "USE_COMPILE": "1", "TTT_FREEZE_BLOCKS": "0", "VAL_SLIDING_BATCH": "32",
                                    "TOKENIZER_PATH": "./data/tokenizers/fineweb_pure_byte_260.json"})
    assert (args.eval_stride, args.ttt, args.ttt_batch_rows, args.compile) == (128, "0", 8, "1")
    assert section.byte_tables(args)[0].sum() == 256
    assert section.Hyperparameters({"TTT_ENABLED": "1", "TTT": "sgd"}).ttt == "sgd"
    with pytest.raises(
        section.UserError, match="VAL_SLIDING_STRIDE=128 means EVAL_STRIDE=128, but EVAL_STRIDE=64"
    ):
        section.Hyperparameters({"VAL_SLIDING_STRIDE": "128", "EVAL_STRIDE": "64"})
    with pytest.raises(section.UserError, match="TTT_FREEZE_BLOCKS"):
        section.Hyperparameters({"TTT_FREEZE_BLOCKS": "2"})
    for name in section.Hyperparameters.ALIASES:
        assert re.search(rf"^  {name} ", section.Hyperparameters.help(), re.M)


@pytest.mark.parametrize("overrides,message", [
    ({"DECODER_HEADS": 3}, "MODEL_DIM=32, DECODER_HEADS=3"), ({"ROPE_DIMS": 12}, "ROPE_DIMS=12, NUM_HEADS=4"),
    ({"SIGREG_GROUP": 3}, "SIGREG_GROUP=3"), ({"PATCH_SIZE": 40}, "PATCH_SIZE=40"),
    ({"QUANT_CLIP": "tensor"}, "LATE_QAT_THRESHOLD=0.15, QUANT_CLIP=tensor"),
    ({"QAT_START": "0.5"}, "LATE_QAT_THRESHOLD took its place"),
    ({"TIE_EMBEDDINGS": 1}, "the output head has its own weights"),
    ({"DRAFT": 16, "TRAIN_SEQ_LEN": 17, "TRAIN_BATCH_TOKENS": 136}, "DRAFT=16, TRAIN_SEQ_LEN=17"),
    ({"WORLD_SIZE": 1, "RANK": 1}, "RANK=1, WORLD_SIZE=1")], ids=str)
def test_impossible_settings_are_refused(overrides, message):
    with pytest.raises(section.UserError, match=message):
        settings(**overrides)


# Runs


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"train_loss:([\d.]+)", output)]


@pytest.mark.parametrize("overrides", [{}, {**SPACE, "PATCH_CONDITION": "both"}], ids=str)
def test_a_run_trains_packs_and_scores_the_same_again(run, tmp_path, overrides):
    wanted = {
        **SMALL, "TTT": "sgd", "TRAIN_SEQ_LEN": 64, "TRAIN_BATCH_TOKENS": 512, "VAL_BYTES": 2000,
        **overrides,
    }
    code, output, metrics = run(script=SCRIPT, **wanted)
    assert code == 0 and metrics["headline"] == "final_int6_ttt", output
    assert "jepa_r2:" in output and "sigreg_floor:" in output
    assert metrics["params"] - metrics["params_shipped"] == 32 * 64 + 64 * 16  # the projector
    artifact = tmp_path / "runs" / "test" / "artifact.bin"
    again = run(script=SCRIPT, **{**wanted, "RUN_ID": "again", "EVAL_ONLY": 1, "ARTIFACT": artifact})
    assert again[0] == 0, again[1]
    for name, found in again[2]["evals"].items():
        assert found["val_loss"] == pytest.approx(metrics["evals"][name]["val_loss"], abs=1e-6)


def test_qat_and_gptq_in_a_real_run(run, tmp_path):
    """Late QAT switches on and moves what follows; calibration has its own clock, is inside the training
    seconds, and rounds matrices of every kind otherwise than to the nearest."""
    wanted = {
        **SMALL, "MODEL_DIM": 64, "TRAIN_SEQ_LEN": 64, "TRAIN_BATCH_TOKENS": 512, "VAL_BYTES": 1000,
        "ITERATIONS": 4, "WARMDOWN_ITERS": 4, "GPTQ_BATCHES": 2,
        "COMPRESSOR": "rans", "BITS": "embed:3,attn:3,mlp:3,other:3",
    }
    found = {}
    for threshold in (0, 0.6):  # rates of the four steps: 1, 3/4, 1/2, 1/4
        mine = {"QUANT_ROUND": "gptq", "LATE_QAT_THRESHOLD": threshold, "RUN_ID": f"qat{threshold}"}
        code, output, metrics = run(script=SCRIPT, **wanted, **mine)
        assert code == 0 and "final_int3_sliding" in output, output
        assert metrics["clocks"]["calibration"] > 0
        assert metrics["train_seconds"] >= metrics["clocks"]["training"]
        assert math.isfinite(metrics["val_bpb"])
        found[threshold] = losses(output)
    assert len(found[0]) == 4 and found[0][:2] == found[0.6][:2]  # not on yet
    assert found[0][2] != found[0.6][2]

    plainly = {"QUANT_ROUND": "nearest", "LATE_QAT_THRESHOLD": 0, "RUN_ID": "nearest"}
    code, output, _ = run(script=SCRIPT, **wanted, **plainly)
    assert code == 0, output
    ours, plain = (section.unpack((tmp_path / f"runs/{name}/artifact.bin").read_bytes(), name)[1]
                   for name in ("qat0", "nearest"))
    moved = {re.sub(r"\.\d+\.", ".", name) for name, x in ours.items() if not np.array_equal(x, plain[name])}
    assert len(moved) > 4 and any("attn" in name for name in moved) and any("mlp" in name for name in moved)


def test_ranks_do_not_change_the_losses(run, tmp_path):
    wanted = {
        **SMALL, "TRAIN_SEQ_LEN": 64, "TRAIN_BATCH_TOKENS": 512, "VAL_BYTES": 1000,
        "TRAIN_LOG_EVERY": 1,
    }
    one, two = (run(script=SCRIPT, ranks=ranks, RUN_ID=f"r{ranks}", **wanted) for ranks in (1, 2))
    assert one[0] == two[0] == 0, two[1]
    np.testing.assert_allclose(losses(one[1]), losses(two[1]), atol=2e-3)
    lines = [
        [
            json.loads(line)
            for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("r1", "r2")
    ]
    for a, b in zip(*lines):
        for key in {"sigreg", "jepa_pred", "sigreg_floor"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-3), key
