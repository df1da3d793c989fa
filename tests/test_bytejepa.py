"""The record ByteJEPA: its switches do what the ablation says they do, and #832's defects stay mended."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    TINY,
    assert_causal,
    assert_drafts_follow_score,
    assert_stream_follows_score,
    enlivened,
)
from family import load_script
from test_model import PUBLISHED

RECORD, = (ROOT / "records").glob("*_ByteJEPA")
section = load_script(RECORD)

CHANGED = {"bigram.table": "one order of a table of several: (1, 4096, 32)"}
ABSENT = {"bigram.scale": "the table's rate does what a scale did"}

CONTEXTS = {"NGRAM_ORDERS": "0", "BIGRAM_VOCAB_SIZE": "256", "BIGRAM_DIM": "8"}  # of the tiny model

# The arms of the ablation, and what each adds to the tiny model.
ARMS = {
    "plain": {"JEPA_CHUNK_SIZE": 0},
    "random": {"JEPA_LOSS": 0, "JEPA_ADAPTER_GRAD": 0},
    "ce": {"JEPA_LOSS": 0, "JEPA_ADAPTER_GRAD": 1, "JEPA_BACKBONE_GRAD": 1},
    "loss": {"JEPA_ADAPTER": 0, "JEPA_BACKBONE_GRAD": 1},
    "published": {"JEPA_ADAPTER_GRAD": 0, "JEPA_SIGREG_BLIND": 1},
    "text": {"JEPA_TARGET": "text", "JEPA_HORIZON": 2, "JEPA_BACKBONE_GRAD": 1, "JEPA_RAMP": "down"},
}
JEPA = [name for name in ARMS if name != "plain"]


def tiny(**overrides):
    settings = {**TINY, **CONTEXTS, "JEPA_CHUNK_SIZE": 8, **overrides}
    return section.Hyperparameters({name: str(value) for name, value in settings.items()})


def alive(args, seed: int = 0):
    return enlivened(section, args, seed)


def batch(rows: int = 4, seed: int = 0):
    return torch.randint(4, 260, (rows, 65), generator=torch.Generator().manual_seed(seed))


def losses(model, ids, step: int = 0):
    inputs = model.aux.inputs(step, ids.device) if model.aux else None
    return model.losses(ids, torch.ones(len(ids)), inputs)


def test_submitted_settings_are_the_defaults():
    """Section 1.1 of the published configuration; what differs is a defect or the answer of the ablation."""
    args = section.Hyperparameters({})
    submitted = {
        "num_layers": 13, "model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "mlp_mult": 2.0,
        "train_seq_len": 4096, "eval_seq_len": 4096, "train_batch_tokens": 393216,
        "iterations": 9000, "warmdown_iters": 3000, "muon_momentum": 0.99,
        "muon_momentum_warmup_start": 0.92, "muon_momentum_warmup_steps": 1500, "matrix_lr": 0.025,
        "scalar_lr": 0.025, "tied_embed_lr": 0.035, "tied_embed_init_std": 0.005, "muon_wd": 0.04,
        "adam_wd": 0.04, "grad_clip_norm": 0.3, "ema_decay": 0.997, "xsa_last_n": 4,
        "rope_dims": 16, "ln_scale": True, "qk_gain_init": 1.5, "rope_base": 10000.0,
        "logit_softcap": 30.0, "bigram_vocab_size": 4096, "bigram_dim": 32, "ngram_orders": "0",
        "eval_stride": 512, "jepa_latent_dim": 256, "jepa_proj_hidden": 256,
        "jepa_sigreg_projs": 256, "jepa_sigreg_knots": 17, "jepa_sigreg_weight": 0.02,
        "jepa_lambda_max": 0.001, "jepa_phase1_frac": 0.3, "jepa_phase2_frac": 0.5,
        "jepa_lr": 0.001, "max_wallclock_seconds": 600.0,
    }
    assert {name: getattr(args, name) for name in submitted} == submitted


def test_published_tensor_list():
    """24,625,001 parameters: each is here, changed with its reason or absent, and nothing is added."""
    with torch.device("meta"):
        model = section.GPT(section.Hyperparameters({"JEPA_CHUNK_SIZE": "8"}))
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name for name in PUBLISHED if name not in ours} == set(ABSENT)
    assert {name for name in PUBLISHED if name in ours and ours[name] != PUBLISHED[name]} == set(CHANGED)
    assert set(ours) <= set(PUBLISHED)
    assert sum(map(math.prod, ours.values())) == 24_625_001 - 1  # the bigrams' scale


@pytest.mark.parametrize("arm", ARMS)
def test_every_tensor_of_an_arm_learns_or_is_meant_not_to(arm):
    """A1 and A2: after two steps no tensor has a zero gradient but those that the arm freezes."""
    args = tiny(**ARMS[arm])
    model = section.GPT(args)
    model.init_weights(0)
    optimizers = section.Optimizers(model, args, section.Runtime(args))
    for step in range(3):
        sums = losses(model, batch(seed=step), step)
        weights = {name: 1.0 for name in ("jepa_pred", "sigreg") if name in sums and args.jepa_loss}
        (sums["ce"] / 256 + sum(sums[name] for name in weights)).backward()
        if step < 2:
            optimizers.step(step, 0.0, optimizers.reduce())
            model.zero_grad()
    dead = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    frozen = {"random": {name for name, _ in model.named_parameters()
                         if name.startswith("aux.") and "injection" not in name}}
    assert dead == frozen.get(arm, set())


@pytest.mark.parametrize("arm", ARMS)
def test_causality_over_every_position(arm):
    assert_causal(alive(tiny(**ARMS[arm])))


def test_the_adapter_carries_the_chunk_before_and_no_other_chunk_ahead():
    model = alive(tiny(JEPA_CHUNK_SIZE=8))
    hidden = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0))
    base, _ = model.aux(hidden)
    moved = hidden.clone()
    moved[:, 8:16] += 1
    added = (model.aux(moved)[0] - moved) - (base - hidden)
    reached = added.abs().amax((0, 2)) > 1e-6
    assert reached.tolist() == [16 <= t < 24 for t in range(32)]


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_the_target_is_so_many_chunks_ahead(horizon):
    """Brute force over chunks: what chunk c - 1 predicts is held against chunk c - 1 + horizon."""
    model = alive(tiny(JEPA_HORIZON=horizon, JEPA_SIGREG_GROUP=2))
    aux, rows = model.aux, 4
    hidden = torch.randn(rows, 64, 32, generator=torch.Generator().manual_seed(1))
    _, terms = aux(hidden, aux.inputs(0, "cpu"))
    z = torch.stack([aux.projector(hidden[:, 8 * c : 8 * c + 8].mean(1)) for c in range(8)], 1)
    errors = torch.zeros(rows)
    for c in range(8 - horizon + 1):  # predicted from chunk c - 1, a start vector at c = 0
        guess = aux.predictor(z[:, c - 1] if c else aux.start.expand(rows, -1))
        errors += (guess - z[:, c - 1 + horizon]).square().mean(-1)
    expected = (errors / (8 - horizon + 1)).view(2, 2).mean(1)
    assert torch.allclose(terms["jepa_pred"], expected, rtol=1e-4)


def test_a_text_target_is_not_in_its_context():
    """The sketch of a chunk reads that chunk's embeddings alone, and gives the backbone no gradient."""
    model = alive(tiny(**ARMS["text"]))
    aux, generator = model.aux, torch.Generator().manual_seed(1)
    hidden, text = (torch.randn(2, 64, 32, generator=generator) for _ in range(2))
    inputs = aux.inputs(0, "cpu")
    _, terms = aux(hidden, inputs, text)
    z = torch.stack([aux.sketch(text[:, 8 * c : 8 * c + 8].flatten(1)) for c in range(8)], 1)
    states = torch.stack([aux.projector(hidden[:, 8 * c : 8 * c + 8].mean(1)) for c in range(8)], 1)
    guesses = [aux.predictor(states[:, c - 1] if c else aux.start.expand(2, -1)) for c in range(7)]
    expected = (torch.stack(guesses, 1) - z[:, 1:]).square().mean()
    assert terms["jepa_pred"].item() == pytest.approx(expected.item(), rel=1e-4)

    sums = losses(model, batch())
    reached = {}
    for term in ("jepa_pred", "sigreg"):
        names, params = zip(*model.named_parameters())
        grads = torch.autograd.grad(sums[term], params, allow_unused=True, retain_graph=True)
        reached[term] = {
            name for name, grad in zip(names, grads) if grad is not None and grad.abs().max() > 0
        }
    assert reached["sigreg"] == {"aux.sketch.weight"}
    assert "blocks.0.attn.c_q.weight" in reached["jepa_pred"]
    assert "aux.sketch.weight" not in reached["jepa_pred"]


def test_blind_sigreg_cannot_see_what_ours_sees():
    """A5: a thousand times smaller latents have the same published value, and another one here."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 1024, 16, generator=generator)
    directions = F.normalize(torch.randn(16, 64, generator=generator), dim=0)
    blind, seeing = ([float(section.sigreg(scale * z, directions, 17, flag).mean()) for scale in (1, 1e-3)]
                     for flag in (True, False))
    assert blind[0] == pytest.approx(blind[1], rel=1e-3)
    assert seeing[1] > 50 * seeing[0]
    assert blind[0] == pytest.approx(section.sigreg_floor(1024, 17, True), rel=0.3)
    assert seeing[0] == pytest.approx(section.sigreg_floor(1024, 17), rel=0.3)
    fresh, fixed = (section.GPT(tiny(JEPA_SIGREG_BLIND=flag)).aux for flag in (0, 1))
    assert not torch.equal(fresh.inputs(3, "cpu"), fresh.inputs(4, "cpu"))
    assert torch.equal(fixed.inputs(3, "cpu"), fixed.inputs(4, "cpu"))


def test_the_weight_can_fall_instead_of_rise():
    aux = section.GPT(
        tiny(JEPA_RAMP="down", JEPA_PHASE1_FRAC=0, JEPA_PHASE2_FRAC=0.8, JEPA_LAMBDA_MAX=0.1)
    ).aux
    found = [aux.weights(progress)["jepa_pred"] for progress in (0, 0.4, 0.79, 0.8, 1)]
    assert found == pytest.approx([0.1, 0.05, 0.00125, 0, 0], abs=1e-9)


@pytest.mark.parametrize("arm", ["published", "text", "loss", "plain"])
def test_decoding_follows_the_scorer(arm, corpus):
    ids = np.fromfile(next(corpus.glob("*_val_*.bin")), "<u2", offset=1024)[:150].astype(np.int64)
    assert_stream_follows_score(section, alive(tiny(**ARMS[arm], EVAL_STRIDE=16)).eval(), ids)


@pytest.mark.parametrize("arm", ["text", "published"])
def test_a_pass_over_drafts_is_the_scorer(arm, corpus):
    ids = np.fromfile(next(corpus.glob("*_val_*.bin")), "<u2", offset=1024)[:150].astype(np.int64)
    assert_drafts_follow_score(section, alive(tiny(**ARMS[arm], EVAL_STRIDE=16)).eval(), ids)


@pytest.mark.parametrize("arm", ["text", "published"])
def test_a_run_and_what_its_artifact_carries(run, corpus, tmp_path, arm):
    """The sketch stays at home, the artifact scores as the
    run did, and R^2 and SIGReg's floor are in the log."""
    settings = {
        **ARMS[arm],
        **CONTEXTS,
        "JEPA_LAMBDA_MAX": 0.1,
        "BF16_MASTERS": int(arm == "published"),
    }
    code, output, metrics = run(script=RECORD / "train_gpt.py", **settings)
    assert code == 0, output
    steps = [json.loads(line) for line in (tmp_path / "runs/test/metrics.jsonl").read_text().splitlines()]
    assert all({"jepa_r2", "sigreg", "sigreg_floor"} <= step.keys() for step in steps if "train_loss" in step)
    _, tensors = section.unpack((tmp_path / "runs/test/artifact.bin").read_bytes(), "artifact")
    assert "aux.injection.weight" in tensors and not any("sketch" in name for name in tensors)
    code, output, _ = run(script=RECORD / "train_gpt.py", RUN_ID="again", EVAL_ONLY=1, **CONTEXTS,
                          ARTIFACT=tmp_path / "runs/test/artifact.bin")
    assert code == 0, output
    line = next(line for line in output.splitlines() if line.startswith("final_int6_sliding_exact"))
    assert f"val_bpb:{metrics['val_bpb']:.8f}" in line


def test_bf16_masters_are_bf16(corpus):
    args = tiny(BF16_MASTERS=1)
    model = section.GPT(args)
    model.init_weights(0)
    optimizers = section.Optimizers(model, args, section.Runtime(args))
    losses(model, batch())["ce"].backward()
    optimizers.step(0, 0.0, optimizers.reduce())
    coarse = {
        name
        for name, p in model.named_parameters()
        if torch.equal(p, p.bfloat16().float()) and p.numel() > 99
    }
    assert {"tok_emb.weight", "aux.projector.fc1.weight", "bigram.table"} <= coarse
    assert "blocks.0.attn.c_q.weight" not in coarse


def test_two_ranks_give_the_losses_of_one(run):
    found = []
    for ranks in (1, 2):
        code, output, _ = run(ranks, script=RECORD / "train_gpt.py", RUN_ID=f"r{ranks}",
                              JEPA_LAMBDA_MAX=0.5, ITERATIONS=4, JEPA_PHASE1_FRAC=0, JEPA_PHASE2_FRAC=0.9,
                              **ARMS["text"], **CONTEXTS)
        assert code == 0, output
        lines = [line for line in output.splitlines() if line.startswith("step:") and "train_loss" in line]
        found.append(
            [
                [
                    part.split(":")[1]
                    for part in line.split()
                    if part.startswith(("train_loss", "jepa", "sig"))
                ]
                for line in lines
            ]
        )
    assert np.allclose(np.array(found[0], float), np.array(found[1], float), atol=2e-4)


def test_a_horizon_beyond_the_row_is_refused():
    with pytest.raises(section.UserError, match="JEPA_HORIZON=8"):
        tiny(JEPA_HORIZON=8)


def test_settings_of_the_old_trunk_that_the_arms_name_are_accepted_when_off():
    """The ablation's results name them; a value that would switch them on is refused with the reason."""
    off = {"QAT_START": "1.0", "QUANT_CLIP": "std", "EMA_ENABLED": "1", "TIE_EMBEDDINGS": "1"}
    assert tiny(**off).jepa_adapter
    with pytest.raises(section.UserError, match="QUANT_CLIP='mse' is retired"):
        tiny(QUANT_CLIP="mse")


ADAPTER = {"aux.injection.weight"}
LATENT_MLPS = {f"aux.{mlp}.fc{i}.weight" for mlp in ("projector", "predictor") for i in (1, 2)}


def reached(term: str, **overrides) -> set[str]:
    """Names of the parameters that a loss gives a gradient."""
    model = alive(tiny(**overrides))
    names, params = zip(*model.named_parameters())
    grads = torch.autograd.grad(losses(model, batch())[term], params, allow_unused=True)
    return {name for name, grad in zip(names, grads) if grad is not None and grad.abs().max() > 0}


def test_without_the_adapter_cross_entropy_does_not_reach_the_jepa():
    assert reached("ce") >= ADAPTER | LATENT_MLPS
    assert not any(name.startswith("aux.") for name in reached("ce", JEPA_ADAPTER=0))


def test_the_adapters_gradient_can_stop_before_the_latent():
    fixed = reached("ce", JEPA_ADAPTER_GRAD=0)
    assert fixed >= ADAPTER and not LATENT_MLPS & fixed


@pytest.mark.parametrize("term", ["jepa_pred", "sigreg"])
def test_a_switch_lets_the_jepas_losses_reach_the_backbone(term):
    backbone = {"tok_emb.weight", "blocks.0.attn.c_q.weight"}
    assert not backbone & reached(term)
    assert backbone <= reached(term, JEPA_BACKBONE_GRAD=1)


def test_a_jepa_loss_that_is_off_has_no_weight():
    off, on = (section.GPT(tiny(JEPA_LOSS=flag)).aux.weights(0.6)["jepa_pred"] for flag in (0, 1))
    assert off == 0 < on
