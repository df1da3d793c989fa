"""The script of the ladder `candidates`: ByteBest with ideas of public work, each a variable."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_causal, enlivened
from family import load_script
from test_byteppm import BYTES

PARENT, = (ROOT / "records").glob("*_ByteBest")
parent = load_script(PARENT)
section = load_script(ROOT / "records" / "ladder" / "candidates" / "train_gpt.py")
TINY = {**BYTES, "PPM_WEIGHT": "0", "TTT": "0"}
IDEAS = [
    {"POLAR_EXPRESS": 1}, {"EQUAL_ROWS": 1}, {"HEADS_APART": 1}, {"CAUTIOUS_WD": 1}, {"WARMDOWN": "sqrt"},
    {"LATE_QAT_THRESHOLD": 1}, {"SECOND_ID_WEIGHT": 0.3}, {"HEAD_GATES": 1}, {"DENSE_SKIPS": 1},
    {"LOOP_TIMES": 2}, {"KEY_SMEAR": 1}, {"XSA_LEARNED": 1},
]


def settings(script, **own):
    return script.Hyperparameters({**TINY, **{name: str(value) for name, value in own.items()}})


def trained(script, steps: int = 6, **own) -> dict[str, torch.Tensor]:
    """The weights after a few steps of a whole schedule, on made-up ids."""
    args = settings(script, ITERATIONS=steps, WARMDOWN_ITERS=4, **own)
    trainer = script.Trainer(args, None, script.Runtime(args), script.Log(None))
    shape = trainer.plan.micro_steps, trainer.plan.groups * trainer.plan.group, args.train_seq_len + 1
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        ids = torch.randint(4, 260, shape, generator=generator)
        trainer.train_step(ids, torch.ones(shape[:2]), step / steps)
        trainer.step += 1
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def usual():
    return trained(parent)


def test_without_any_it_computes_what_bytebest_computes(usual):
    mine = trained(section)
    assert mine.keys() == usual.keys()
    assert all(torch.equal(mine[name], usual[name]) for name in usual)


@pytest.mark.parametrize("idea", IDEAS, ids=str)
def test_each_changes_what_is_learned(usual, idea):
    mine = trained(section, **idea)
    assert all(p.isfinite().all() for p in mine.values())
    assert any(not torch.equal(mine[name], usual[name]) for name in usual)


@pytest.mark.parametrize("idea", [{"HEAD_GATES": 1}, {"DENSE_SKIPS": 1, "UNET_SKIPS": 0}, {"LOOP_TIMES": 2},
                                  {"KEY_SMEAR": 1}, {"XSA_LEARNED": 1}], ids=str)
def test_those_of_the_network_stay_causal(idea):
    assert_causal(enlivened(section, settings(section, **idea)).eval())


@pytest.mark.parametrize("idea", [{"HEAD_GATES": 1}, {"DENSE_SKIPS": 1}, {"KEY_SMEAR": 1},
                                  {"XSA_LEARNED": 1}], ids=str)
def test_those_of_the_network_begin_as_the_network_without(idea):
    """Gates are 1, a block reads the output before it, keys take in nothing, XSA is where it was."""
    ids = torch.randint(4, 260, (1, 20), generator=torch.Generator().manual_seed(1))
    logits = []
    for own in ({}, idea):
        model = section.GPT(settings(section, **own))
        model.init_weights(3)
        with torch.no_grad():
            for block in model.blocks:  # zero at first: nothing would tell the two apart
                block.attn.proj.weight.fill_(0.01)
            logits.append(model.logits(ids, torch.zeros(1, dtype=torch.long), 20))
    assert torch.allclose(*logits, atol=1e-6)


def moved(rate: float, **own) -> tuple:
    """(settings, queries' weight before and after a step of Muon on made-up gradients)."""
    args = settings(section, **own)
    model = section.GPT(args)
    model.init_weights(0)
    muon = section.Optimizers(model, args, section.Runtime(args)).muon
    weight = model.blocks[0].attn.c_q.weight.detach()  # shares its memory
    before = weight.clone()
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    muon.start_reduction()
    muon.square_norm()
    with torch.no_grad():
        muon.step(rate, 0.0, torch.ones(()))
    return args, before, weight


def test_heads_are_taken_one_by_one():
    """Each head of an update is orthogonal by itself; taken together the heads would share a norm."""
    args, before, after = moved(0.1, HEADS_APART=1)
    change = (before * (1 - 0.1 * args.muon_wd) - after) / 0.1
    for head in change.split(args.head_dim):
        assert torch.linalg.svdvals(head).sub(1).abs().max() < 0.5
        assert torch.linalg.matrix_norm(head) == pytest.approx(args.head_dim**0.5, rel=0.25)


def test_cautious_decay_leaves_what_the_update_grows():
    _, before, usual = moved(0.01, MUON_WD=0.5)
    _, _, cautious = moved(0.01, MUON_WD=0.5, CAUTIOUS_WD=1)
    undecayed = usual + 0.01 * 0.5 * before
    grown = (undecayed - before) * before > 0  # the update moves it away from zero
    assert torch.allclose(cautious[grown], undecayed[grown], atol=1e-6)
    assert torch.allclose(cautious[~grown], usual[~grown], atol=1e-6)
    assert grown.any() and (~grown).any()


def test_training_rounds_as_the_exporter_does_and_scores_without():
    args = settings(section, LATE_QAT_THRESHOLD=1)
    trainer = section.Trainer(args, None, section.Runtime(args), section.Log(None))
    trainer.set_rounding(True)
    tried = 0
    for name, p in trainer.model.exported().items():
        bits, axis = section.quant_plan(name, p.shape, args)
        if not bits or not name.endswith(".weight"):
            continue
        owner = trainer.model.get_submodule(name.rpartition(".")[0])
        k = args.k_by_class[section.tensor_class(name)]
        q, step = section.quantise(p.detach().numpy(), bits, k, axis)
        wanted = q.astype(np.float32) * step.astype(np.float32)
        assert np.allclose(section.rounded(owner).detach().numpy(), wanted, atol=1e-6), name
        tried += 1
    assert tried
    trainer.set_rounding(False)
    assert all(not hasattr(owner, "qat") for owner, _ in trainer.roundings)


def test_the_warm_down_of_a_root_falls_faster():
    linear, root = settings(section), settings(section, WARMDOWN="sqrt")
    for progress in np.linspace(0, 1, 23):
        left = section.rate_at(progress, linear)
        assert section.rate_at(progress, root) == pytest.approx(1 - (1 - left) ** 0.5)


def test_the_second_id_has_its_own_targets_and_its_weight_falls():
    args = settings(section, SECOND_ID_WEIGHT=0.3)
    trainer = section.Trainer(args, None, section.Runtime(args), section.Log(None))
    assert trainer.second_weight(0.0) == 0.3 and trainer.second_weight(0.667) == 0.0
    model = enlivened(section, args)
    ids = torch.randint(4, 260, (2, args.train_seq_len + 1), generator=torch.Generator().manual_seed(2))
    sums = model.losses(ids, torch.tensor([1.0, 0.5]), second=True)
    logprobs = model.logits(ids[:, :-1], torch.zeros(2, dtype=torch.long), args.train_seq_len).log_softmax(-1)
    nats = -logprobs[:, :-1].gather(-1, ids[:, 2:, None]).squeeze(-1).sum(1).detach()
    assert float(sums["second"].detach()) == pytest.approx(float(nats[0] + nats[1] / 2), rel=1e-4)
    assert "second" not in model.losses(ids, torch.ones(2))


def test_a_late_average_is_the_mean_of_the_last_steps():
    args = settings(section, LATE_AVERAGE=0.3, ITERATIONS=10)
    model = section.GPT(args)
    ema, values = section.EMA(model, args), []
    for step in range(10):
        with torch.no_grad():
            model.tok_emb.weight.fill_(step * step)
        values.append(step * step)
        ema.update(step)
    ema.apply()
    assert torch.allclose(model.tok_emb.weight, torch.tensor(sum(values[7:]) / 3))


@pytest.mark.parametrize("name, value", [("LOOP_TIMES", 2), ("KEY_SMEAR", 1)])
def test_what_cannot_be_decoded_says_so(name, value):
    model = enlivened(section, settings(section, **{name: value}))
    with pytest.raises(section.UserError, match=f"{name}="):
        stream = section.stream(model)
        stream.push(section.BOS_ID)
        stream.logprobs()


def test_a_tool_says_it_in_one_line(tmp_path):
    """What a script raises after its artifact is read, too."""
    args = settings(section, LOOP_TIMES=2)
    model = enlivened(section, args)
    path = tmp_path / "artifact.bin"
    path.write_bytes(section.pack({name: p.detach().numpy() for name, p in model.exported().items()}, args))
    call = [sys.executable, str(ROOT / "scripts/generate.py"), str(path), "The", "--script", section.__file__]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: LOOP_TIMES=2: decoding keeps no keys of a loop"
