"""Coverage of the validation stream, and that the score is what it says."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=300, deadline=None)
@given(targets=st.integers(1, 700), length=st.integers(1, 96), data=st.data())
def test_every_target_is_scored_once_inside_its_window(trunk, targets, length, data):
    stride = data.draw(st.integers(1, length))
    plan = trunk.windows(targets, length, stride)
    covered = np.concatenate([np.arange(first, stop) for _, first, stop in plan])
    assert (covered == np.arange(targets)).all()
    for start, first, stop in plan:
        assert 0 <= start <= first < stop <= start + length
        assert start == 0 or first - start == length - stride  # all the context that the stride leaves


class Uniform(torch.nn.Module):
    """Gives every id the same probability, and remembers nothing."""

    def __init__(self, args):
        super().__init__()
        self.args, self.p = args, torch.nn.Parameter(torch.zeros(1))

    def logits(self, ids, take, span):
        return torch.zeros(len(ids), span, self.args.vocab_size)


@pytest.mark.parametrize("stride", [64, 16, 24])
def test_uniform_model_scores_log2_of_the_vocabulary(trunk, tiny, corpus, stride):
    args = tiny(DATA_PATH=corpus, EVAL_STRIDE=stride)
    evaluator = trunk.Evaluator(args, trunk.Dataset(args, True), trunk.Runtime(args), trunk.Log(None))
    evaluator.logits = Uniform.logits
    result = evaluator.run("uniform", Uniform(args), 64, stride)
    assert result["targets"] == len(evaluator.ids) - 1 and 3000 <= result["bytes"] <= 3001
    assert result["val_loss"] == pytest.approx(math.log(260), abs=1e-5)
    assert result["val_bpb"] == pytest.approx(math.log2(260) * result["targets"] / result["bytes"], abs=1e-6)
    assert sum(result["bits_by_class"].values()) == pytest.approx(
        math.log2(260) * result["targets"], rel=1e-6
    )


def test_score_is_a_distribution_and_equals_the_stream(trunk, tiny, alive, corpus):
    args = tiny()
    model = alive(args)
    ids = np.fromfile(next(corpus.glob("*_val_*.bin")), "<u2", offset=1024)[:200].astype(np.int64)
    positions = [0, 1, 15, 16, 63, 64, 65, 150, 198]
    nats, vectors = trunk.score(model, ids, positions)
    assert sorted(vectors) == positions
    stream = trunk.stream(model)
    stream.push(ids[0])
    for t in range(len(ids) - 1):
        if t in vectors:
            assert np.exp(vectors[t].astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
            assert nats[t] == pytest.approx(-vectors[t][ids[t + 1]], abs=1e-5)
            assert np.abs(stream.logprobs() - vectors[t]).max() < 1e-4
        stream.push(ids[t + 1])


def test_stream_equals_score_with_windows_longer_than_training(trunk, tiny, alive):
    args = tiny(EVAL_SEQ_LEN=128, EVAL_STRIDE=32)
    model, ids = alive(args), np.random.default_rng(0).integers(4, 260, 300)
    _, vectors = trunk.score(model, ids, [5, 100, 250])
    stream = trunk.stream(model)
    for t, token in enumerate(ids[:-1]):
        stream.push(token)
        if t in vectors:
            assert np.abs(stream.logprobs() - vectors[t]).max() < 1e-4


def test_score_does_not_depend_on_the_batch(trunk, tiny, alive):
    args, ids = tiny(), np.random.default_rng(1).integers(4, 260, 150)
    model = alive(args)
    whole, _ = trunk.score(model, ids)
    parts = np.zeros_like(whole)
    for rank in range(3):
        for first, stop, _, nats in trunk.scored(model, ids, trunk.WindowPlan(64, 16, 2, rank, 3)):
            parts[first:stop] += nats
    assert np.abs(whole - parts).max() < 1e-5


def test_future_and_target_do_not_reach_a_score(trunk, tiny, alive):
    """Probes P1 and P2: ids after a target, and the target itself, change no distribution before or at it."""
    args, rng = tiny(), np.random.default_rng(2)
    model, ids = alive(args), rng.integers(4, 260, 160)
    ids[[40, 41, 100]] = 1
    for t in (0, 7, 8, 15, 16, 62, 63, 64, 65, 120):
        nats, vectors = trunk.score(model, ids, [t])
        changed = ids.copy()
        changed[t + 1 :] = rng.integers(1, 260, len(ids) - t - 1)
        other, other_vectors = trunk.score(model, changed, [t])
        assert np.array_equal(vectors[t], other_vectors[t]) and np.array_equal(nats[:t], other[:t])


def test_headline_of_a_tokenizer_divides_by_the_targets_bytes(trunk, prepare, prepare_files, tmp_path):
    """A SentencePiece model trained here counts exactly the UTF-8 bytes of every document."""
    texts = [
        b"", b"a", b" two  spaces ", "na\u00efve \u4f60\u597d \U0001f600".encode(), b"\n\ttabs\r\n", b"\0nul",
        "literal \u2581 mark\u2581".encode(), b"x" * 500,
    ]
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    (tmp_path / "v.txt").write_text("The lazy dog.")
    out = prepare_files(tmp_path / "t.txt", tmp_path / "v.txt", "--variant", "sp320", "--overlap", "off")
    tokenizer = prepare.PieceTokenizer(out / "sp320.model", "sp320")
    args = trunk.Hyperparameters({"VOCAB_SIZE": "320", "TOKENIZER_PATH": str(out / "sp320.model")})
    tables = trunk.byte_tables(args)
    for text in texts:
        ids = np.concatenate(([1], tokenizer.encode(text))).astype(np.int64)
        assert trunk.target_bytes(ids, tables).sum() == len(text), text
    with pytest.raises(trunk.UserError, match="has 320 ids"):
        trunk.byte_tables(trunk.Hyperparameters({"VOCAB_SIZE": "330", "TOKENIZER_PATH": args.tokenizer_path}))
