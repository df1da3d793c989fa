"""The record LLMJEPA: what a span's latent is, what its
error reaches, and that #1196's defects stay mended."""

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

RECORD, = (ROOT / "records").glob("*_LLMJEPA")
section = load_script(RECORD)

# The tiny model of the tests, in the variables that this record has.
HERE = {name: "" for name in TINY if name.startswith(("JEPA_", "NGRAM_", "BIGRAM_"))} | {
    "VOCAB_SIZE": 260, "JEPA_SPAN": 16, "JEPA_HIDDEN": 24, "JEPA_GROUP": 2, "JEPA_WARMUP_STEPS": 0,
    "TRAIN_SEQ_LEN": 64, "TRAIN_BATCH_TOKENS": 512}
ARMS = {
    "default": {},
    "published": {"JEPA_NORM": 0, "JEPA_TARGET": "alone", "JEPA_CONTEXT_FRAC": 0.75},
    "last layer": {"JEPA_LAYERS": 1},
    "only the predictor": {"JEPA_BACKBONE_GRAD": 0},
    "off": {"JEPA_ENABLED": 0},
}


def tiny(**overrides):
    return section.Hyperparameters({**TINY, **{k: str(v) for k, v in {**HERE, **overrides}.items()}})


def alive(seed: int = 0, **overrides):
    return enlivened(section, tiny(**overrides), seed)


def batch(rows: int = 4, seed: int = 0):
    return torch.randint(4, 260, (rows, 65), generator=torch.Generator().manual_seed(seed))


def losses(model, ids, step: int = 0):
    return model.losses(ids, torch.ones(len(ids)), model.aux.inputs(step, ids.device) if model.aux else None)


def test_published_settings_are_the_defaults():
    args = section.Hyperparameters({})
    published = {
        "num_layers": 9, "model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "mlp_mult": 2.0,
        "vocab_size": 1024, "train_seq_len": 1024, "train_batch_tokens": 524288,
        "logit_softcap": 30.0, "jepa_lambda": 0.1, "jepa_warmup_steps": 100,
        "jepa_enabled": True, "qk_gain_init": 1.5, "rope_base": 10000.0,
    }
    assert {name: getattr(args, name) for name in published} == published


def test_published_tensor_list():
    """18,110,024 parameters, tensor by tensor."""
    dim, kv, wide = 512, 256, 1024
    block = {
        "attn.c_q": (dim, dim), "attn.c_k": (kv, dim), "attn.c_v": (kv, dim),
        "attn.proj": (dim, dim), "mlp.fc": (wide, dim), "mlp.proj": (dim, wide),
    }
    published = {"tok_emb.weight": (1024, dim), "skip_weights": (4, dim)}
    for i in range(9):
        published |= {f"blocks.{i}.{name}.weight": shape for name, shape in block.items()}
        published |= {
            f"blocks.{i}.attn.q_gain": (8,),
            f"blocks.{i}.attn_scale": (dim,),
            f"blocks.{i}.mlp_scale": (dim,),
            f"blocks.{i}.resid_mix": (2, dim),
        }
    published |= {
        "aux.fc1.weight": (wide, dim),
        "aux.bias1": (wide,),
        "aux.fc2.weight": (dim, wide),
        "aux.bias2": (dim,),
    }
    with torch.device("meta"):
        model = section.GPT(section.Hyperparameters({}))
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == published
    assert sum(map(math.prod, published.values())) == 18_110_024
    assert sum(p.numel() for p in model.exported().values()) == 17_059_912


@pytest.mark.parametrize("overrides", [
    {},
    *[ARMS[name] for name in ("published", "last layer")],
    {"JEPA_CONTEXT_FRAC": 0.5, "JEPA_NORM": 0},
    {"JEPA_TARGET": "alone"},
], ids=str)
def test_the_error_is_that_of_the_span_that_follows(overrides):
    """Brute force, a row at a time: the published way
    needs a pass over the context, here it is the main one."""
    model, ids = alive(**overrides), batch(6)
    args, aux = model.args, model.aux
    starts = aux.inputs(3, "cpu")
    found = losses(model, ids, 3)
    guesses, targets = [], []
    for row, start in zip(ids, starts.tolist() * 3):
        def states(part):
            x = model.states(part[None], model.rotary_train)[0][0]
            return F.rms_norm(x, x.shape[-1:]) if args.jepa_norm else x
        context, span = states(row[:start]), row[start : start + 16]
        inside = states(span) if args.jepa_target == "alone" else states(row[:-1])[start : start + 16]
        guesses.append(aux.fc2(F.gelu(aux.fc1(context[-1]) + aux.bias1)) + aux.bias2)
        targets.append(inside.mean(0))
    guesses, targets = (torch.stack(part).view(3, 2, -1) for part in (guesses, targets))
    errors = (guesses - targets).square().mean(2)
    if args.jepa_norm:
        errors = 2 - 2 * F.cosine_similarity(guesses, targets, dim=2)
        targets = F.normalize(targets, dim=2) * targets.size(2) ** 0.5
    assert torch.allclose(found["jepa"], errors.mean(1).sum(), rtol=1e-3)
    assert torch.allclose(found["latent_var"], targets.var(1).mean(-1).sum(), rtol=1e-3)


def test_spans_are_drawn_anew_and_stay_inside_a_row():
    aux = alive().aux
    found = torch.stack([aux.inputs(step, "cpu") for step in range(400)])
    assert found.min() == 1 and found.max() == 64 - 16 and len(found.unique()) > 40
    assert torch.equal(aux.inputs(7, "cpu"), found[7])
    fixed = alive(JEPA_CONTEXT_FRAC=0.75).aux
    assert fixed.inputs(0, "cpu").tolist() == fixed.inputs(1, "cpu").tolist() == [48, 48]


@pytest.mark.parametrize("name,overrides", ARMS.items(), ids=ARMS)
def test_what_the_error_reaches(name, overrides):
    model = alive(**overrides)
    sums, (names, params) = losses(model, batch()), zip(*model.named_parameters())
    assert {name for name, value in sums.items() if value.requires_grad} == (
        {"ce"} if name == "off" else {"ce", "jepa"}
    )
    if name == "off":
        return
    grads = torch.autograd.grad(sums["jepa"], params, allow_unused=True)
    reached = {name for name, grad in zip(names, grads) if grad is not None and grad.abs().max() > 0}
    wanted = {
        "default": set(names),
        "published": set(names),
        "only the predictor": {n for n in names if n.startswith("aux.")},
        "last layer": {n for n in names if n.startswith(("aux.", "blocks.2."))},
    }[name]
    assert reached == wanted


def test_a_gradient_that_ends_early_changes_no_state():
    model, ids = alive(JEPA_LAYERS=2), batch()[:, :-1]
    x, late = model.states(ids, model.rotary_train, last=2)
    assert torch.equal(x, late)
    assert torch.equal(x, model.states(ids, model.rotary_train)[0])


def test_an_error_that_reaches_only_the_predictor_leaves_the_model_as_it_is():
    """C1: what is identical to four decimals is an objective that does not reach the model, at any weight."""
    found = []
    for overrides in (
        {"JEPA_ENABLED": 0},
        *({"JEPA_BACKBONE_GRAD": 0, "JEPA_LAMBDA": weight} for weight in (0.1, 0.5)),
    ):
        args = tiny(**overrides)
        trainer = section.Trainer(args, None, section.Runtime(args), section.Log(None))
        for step in range(4):
            trainer.step = step
            trainer.train_step(batch(8, step)[None], torch.ones(1, 8), 0.5)
        found.append(
            {
                name: p.detach().clone()
                for name, p in trainer.model.named_parameters()
                if not name.startswith("aux.")
            }
        )
    for other in found[1:]:
        assert all(torch.equal(p, other[name]) for name, p in found[0].items())


def test_the_weights_of_a_curriculum():
    aux = alive(JEPA_FIRST_FRAC=0.25, JEPA_WARMUP_STEPS=3, JEPA_LAMBDA=0.4, ITERATIONS=6).aux
    found = [
        (aux.weights(progress)["ce"], aux.weights(progress)["jepa"])
        for progress in (0, 0.2, 0.25, 0.49, 0.5, 1)
    ]
    assert found == [(0, 0.4), (0, 0.4), (1, 0), (1, 0), (1, 0.4), (1, 0.4)]


def test_scale_is_seen_and_does_not_count():
    """C4: states a hundred times as large cost ten thousand
    times the published error, and the same as ours."""
    def found(norm: int, scale: float) -> float:
        model, ids = alive(JEPA_NORM=norm), batch()
        x = model.states(ids[:, :-1], model.rotary_train)[0] * scale
        terms = model.aux(model, x, x, ids, model.aux.inputs(0, "cpu"))
        return terms["jepa"].mean().item()
    assert found(0, 100) > 100 * found(0, 1)
    assert found(1, 100) == pytest.approx(found(1, 1), rel=1e-3)


def test_causality_over_every_position():
    assert_causal(alive(XSA_LAST_N=2, UNET_SKIPS=1))


@pytest.mark.parametrize(
    "overrides",
    [{}, {"DOC_MASK": 1}, {"NGRAM_ORDERS": "2,3", "NGRAM_BUCKETS": 512, "NGRAM_DIM": 8}],
    ids=str,
)
def test_decoding_follows_the_scorer(overrides, corpus):
    ids = np.fromfile(next(corpus.glob("*_val_*.bin")), "<u2", offset=1024)[:150].astype(np.int64)
    model = alive(EVAL_STRIDE=16, **overrides).eval()
    assert_stream_follows_score(section, model, ids)
    assert_drafts_follow_score(section, model, ids)


@pytest.mark.parametrize("name", ["default", "published"])
def test_a_run_and_what_its_artifact_carries(run, tmp_path, name):
    code, output, metrics = run(
        script=RECORD / "train_gpt.py", **{**HERE, **ARMS[name], "JEPA_FIRST_FRAC": 0.3}
    )
    assert code == 0, output
    steps = [json.loads(line) for line in (tmp_path / "runs/test/metrics.jsonl").read_text().splitlines()]
    assert all(
        {"jepa_loss", "jepa_r2", "latent_var"} <= step.keys()
        for step in steps
        if "train_loss" in step
    )
    _, tensors = section.unpack((tmp_path / "runs/test/artifact.bin").read_bytes(), "artifact")
    assert not any(name.startswith("aux") for name in tensors)
    code, output, _ = run(
        script=RECORD / "train_gpt.py",
        **{
            **HERE,
            "RUN_ID": "again",
            "EVAL_ONLY": 1,
            "ARTIFACT": tmp_path / "runs/test/artifact.bin",
        },
    )
    assert code == 0 and f"val_bpb:{metrics['val_bpb']:.8f}" in output, output


def test_a_run_on_pieces(run, prepare_files, field_tokenizer, tmp_path):
    text = (ROOT / "train_gpt.py").read_text()
    (tmp_path / "train.txt").write_text(text[:100_000])
    (tmp_path / "val.txt").write_text(text[100_000:120_000])
    model, path = field_tokenizer(text[:100_000], 420)
    folder = prepare_files(
        tmp_path / "train.txt", tmp_path / "val.txt", "--variant", f"sp{model.vocab_size()}",
        "--tokenizer", path, "--overlap", "off",
    )
    code, output, metrics = run(
        script=RECORD / "train_gpt.py",
        **{
            **HERE, "DATA_PATH": folder, "TOKENIZER_PATH": path, "VOCAB_SIZE": model.vocab_size(),
            "INT8_SCORE": 1, "MODEL_DIM": 128, "MLP_MULT": 2,
        },
    )
    assert code == 0 and metrics["headline"] == "final_int6_sliding", output
    bits = {
        name: metrics["evals"][f"final_{name}"]["val_bpb"]
        for name in ("ema", "int8_roundtrip", "int6_roundtrip")
    }
    assert bits["int8_roundtrip"] != bits["int6_roundtrip"]
    assert all(abs(value - bits["ema"]) < 0.01 for value in bits.values())
    assert (tmp_path / "runs/test/int8.bin").stat().st_size > metrics["bytes_model"]


def test_two_ranks_give_the_losses_of_one(run):
    found = []
    for ranks in (1, 2):
        code, output, _ = run(ranks, script=RECORD / "train_gpt.py", **{
            **HERE, "RUN_ID": f"r{ranks}", "JEPA_LAMBDA": 0.5, "ITERATIONS": 4, "TRAIN_BATCH_TOKENS": 384})
        assert code == 0, output
        lines = [line for line in output.splitlines() if line.startswith("step:") and "train_loss" in line]
        found.append(
            [
                [
                    part.split(":")[1]
                    for part in line.split()
                    if part.startswith(("train_loss", "jepa", "latent"))
                ]
                for line in lines
            ]
        )
    assert len(found[0]) == 4 and np.allclose(np.array(found[0], float), np.array(found[1], float), atol=2e-3)


@pytest.mark.parametrize("settings,words", [
    ({"JEPA_GROUP": 3}, "TRAIN_BATCH_TOKENS=512, JEPA_GROUP=3"),
    ({"JEPA_SPAN": 64}, "JEPA_SPAN=64, TRAIN_SEQ_LEN=64"),
    ({"JEPA_CONTEXT_FRAC": 0.9}, "JEPA_CONTEXT_FRAC=0.9, JEPA_SPAN=16: the span ends after"),
    ({"JEPA_CONTEXT_FRAC": 0.001}, "JEPA_CONTEXT_FRAC=0.001, TRAIN_SEQ_LEN=64: a row needs an id before"),
    ({"JEPA_LAYERS": 4}, "JEPA_LAYERS=4, NUM_LAYERS=3"),
], ids=str)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(section.UserError, match=words):
        tiny(**settings)
