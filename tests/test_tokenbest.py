"""The record TokenBest: its parent's weights bit for bit where that one's gone parts are off, and answers
to the names of these."""

import pytest
import torch
from conftest import ROOT, TINY
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


def test_a_run_resumes_bit_for_bit(final, tmp_path):
    whole = final("cut", CHECKPOINT_EVERY=4)
    assert same(whole, final("on", RESUME=tmp_path / "runs/cut/last.safetensors"))


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
