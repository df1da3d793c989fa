"""The record TokenBest: its parent's weights bit for bit where that one's gone parts are off, and answers
to the names of these."""

import pytest
import torch
from conftest import ROOT, TINY, slow
from family import load_script

RECORD, = (ROOT / "records").glob("*_TokenBest")
PARENT, = (ROOT / "records").glob("*_BiJEPAX")
section = load_script(RECORD)

# The tiny model of the tests, in the variables that this record has: layers 2 and 3 have two lanes.
HERE = {name: "" for name in TINY if name.startswith(("JEPA_", "NGRAM_", "BIGRAM_"))} | {
    "VOCAB_SIZE": 260, "NUM_LAYERS": 4, "PARALLEL_START": 2, "XSA_LAST_N": 4, "GATE_WINDOW": 6,
    "PPM_WEIGHT": 0, "VAL_BYTES": 400,
}


def tiny(**overrides):
    return section.Hyperparameters({**TINY, **{k: str(v) for k, v in {**HERE, **overrides}.items()}})


def checkpoint(path) -> dict[str, torch.Tensor]:
    with section.safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.fixture
def final(run, tmp_path):
    """final(name, VAR=value, ...) -> the last checkpoint of a tiny run."""

    def final(name: str, ranks: int = 1, script=RECORD / "train_gpt.py", **overrides):
        code, output, _ = run(ranks, script=script, **{**HERE, "RUN_ID": name, **overrides})
        assert code == 0 and ("resume:" in output) == ("RESUME" in overrides), output
        return checkpoint(tmp_path / f"runs/{name}/final.safetensors")

    return final


def test_it_is_the_parent_without_recurrence_and_heads(final):
    off = {"LOOP_EXTRA": 0, "BIJEPAX_ENABLED": 0}
    assert same(final("here"), final("parent", script=PARENT / "train_gpt.py", **off))


@pytest.mark.parametrize("more", [{}, {"NORMUON_BETA2": 0.95}], ids=str)
def test_a_run_resumes_bit_for_bit(final, tmp_path, more):
    whole = final("cut", CHECKPOINT_EVERY=4, **more)
    assert same(whole, final("on", RESUME=tmp_path / "runs/cut/last.safetensors", **more))
    assert any(name.startswith("normuon.") for name in whole) == bool(more)


def test_rows_may_become_even_on_resuming_and_cease_to_be(final, tmp_path):
    final("off", CHECKPOINT_EVERY=4)
    on = final("on", RESUME=tmp_path / "runs/off/last.safetensors", NORMUON_BETA2=0.95)
    assert all(on[name].any() for name in on if name.startswith("normuon."))
    final("off again", RESUME=tmp_path / "runs/on/final.safetensors", ITERATIONS=8)


@slow
def test_three_ranks_train_as_one(final, tmp_path):
    """Stacks of four and eight matrices: they do not share them evenly. Adam's first steps are signs,
    which magnifies what the order of sums does to gains; Muon's matrices show its own."""
    more = {"NORMUON_BETA2": 0.95}
    one, three = (final(f"{ranks} ranks", ranks, ITERATIONS=3, **more) for ranks in (1, 3))
    assert one.keys() == three.keys()
    for key, value in one.items():
        muon = "muon" in key or ".mlp." in key or ".attn.c_" in key
        assert torch.allclose(value, three[key], atol=2e-6 if muon else 2e-3), key
    # what three ranks kept, one can go on with
    final("on", RESUME=tmp_path / "runs/3 ranks/final.safetensors", ITERATIONS=5, **more)


def test_even_rows_are_those_of_the_formula():
    """Per row and step by step; rows, or all of a matrix, may be zero."""
    rng = torch.Generator().manual_seed(0)
    squares = torch.zeros(3, 5, 1)
    kept = [[0.0] * 5 for _ in range(3)]
    for _ in range(4):
        updates = torch.randn(3, 5, 7, generator=rng) * torch.logspace(-1, 1, 5)[:, None]
        updates[0, 2] = updates[2] = 0
        found = section.even_rows(updates.clone(), squares, 0.9)
        for i in range(2):
            plain = updates[i].clone().double()
            for j, row in enumerate(plain):
                kept[i][j] = 0.9 * kept[i][j] + 0.1 * row.square().mean().item()
                row /= max(kept[i][j], 1e-20) ** 0.5
            assert torch.allclose(found[i].double(), plain * updates[i].norm() / plain.norm(), atol=1e-5)
        assert found.isfinite().all() and not found[2].any() and not found[0, 2].any()


@pytest.mark.parametrize("name, low, high", [("polar", 0.75, 1.25), ("fixed", 0.6, 1.3)])
def test_both_sorts_of_coefficients_make_updates_orthogonal(name, low, high):
    matrices = torch.randn(4, 24, 40, generator=torch.Generator().manual_seed(0))
    update = section.newton_schulz(matrices, section.COEFFICIENTS[name], torch.float32)
    values = torch.linalg.svdvals(update)
    assert low < values.min() and values.max() < high


@pytest.mark.parametrize("name, value", [
    ("LOOP_EXTRA", 2), ("LOOP_FIRST", 3), ("LOOP_LAST", 5), ("LOOP_START", 0.35), ("NUM_LOOPS", 2),
    ("BIJEPAX_ENABLED", 1), ("BIJEPAX_WEIGHT", 0.01), ("BIJEPAX_STRIDE", 64), ("BIJEPAX_CYCLE", 1),
])
def test_what_is_gone_is_refused_with_the_reason(name, value):
    with pytest.raises(section.UserError, match=f"{name}='{value}' is retired"):
        tiny(**{name: value})


def test_command_lines_that_switched_it_off_still_work():
    off = {"LOOP_EXTRA": 0, "LOOP_START": 1, "NUM_LOOPS": 0, "BIJEPAX_ENABLED": 0, "BIJEPAX_WEIGHT": 0}
    assert tiny(**off).warnings == []


def test_all_that_is_trained_is_shipped():
    model = section.GPT(tiny())
    assert model.exported().keys() == dict(model.named_parameters()).keys()
