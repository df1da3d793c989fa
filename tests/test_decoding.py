"""Cached decoding, document masks and score-first test-time training."""

import numpy as np
import pytest
import torch
from conftest import assert_stream_follows_score, slow


@pytest.fixture(scope="module")
def ids(corpus):
    found = np.fromfile(next(corpus.glob("*_val_*.bin")), "<u2", offset=1024)[:230].astype(np.int64)
    found[[0, 70, 71, 140]] = 1  # several documents, one of them empty
    return found


TTT = {"TTT": "sgd", "TTT_CHUNK_TOKENS": 32, "TTT_LR": 0.05, "TTT_BATCH_ROWS": 2}


@pytest.mark.parametrize("settings", [
    {},
    {"JEPA_CHUNK_SIZE": 0},
    {"JEPA_CHUNK_SIZE": 16, "XSA_LAST_N": 3},
    {"SMEAR_GATE": 0, "NGRAM_ORDERS": 0},
    {"NGRAM_WORDS": 0, "UNET_SKIPS": 0, "RESID_MIX": 0},
    {"DOC_MASK": 1},
    {"ATTN_WINDOW": 9, "ATTN_WINDOW_LAYERS": "0"},
    {"ATTN_WINDOW": 9, "ATTN_WINDOW_LAYERS": "0,1", "DOC_MASK": 1, "JEPA_CHUNK_SIZE": 0},
    {"EVAL_STRIDE": 64},
    {"EVAL_SEQ_LEN": 96, "EVAL_STRIDE": 8},
    TTT,
    {**TTT, "DOC_MASK": 1, "TTT_EPOCHS": 2},
], ids=str)
def test_cached_decoding_equals_the_full_forward_everywhere(trunk, tiny, alive, ids, settings):
    model = alive(tiny(**settings)).eval()
    stream = assert_stream_follows_score(trunk, model, ids)
    assert (stream.learner is not None and stream.learner.updates > 0) == ("TTT" in settings)


def test_stream_may_be_fed_without_being_asked(trunk, tiny, alive, ids):
    model = alive(tiny(**TTT)).eval()
    _, vectors = trunk.score(model, ids[:120], [118])
    stream = trunk.stream(model)
    for token in ids[:119]:
        stream.push(token)
    assert np.abs(stream.logprobs() - vectors[118]).max() < 1e-4
    assert np.array_equal(stream.logprobs(), stream.logprobs())  # asking twice changes nothing


# Documents


def test_rungs_agree_on_documents(trunk):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (3, 96), generator=generator)
    q, k, v = (torch.randn(3, 96, heads, 8, generator=generator) for heads in (4, 2, 2))
    docs = (ids == trunk.BOS_ID).cumsum(1)
    plain = trunk.math_attention(q, k, v, trunk.document_mask("math", docs))
    assert not torch.allclose(plain, trunk.math_attention(q, k, v), atol=1e-2)
    sdpa = trunk.sdpa_attention(q, k, v, trunk.document_mask("sdpa", docs))
    assert torch.allclose(plain, sdpa, atol=1e-4)


def test_flash_is_handed_each_document_once(trunk, monkeypatch):
    """No card here: the kernel's contract (rows of varying length, cut at cu_seqlens) stands in for it."""
    def varlen(q, k, v, starts, _, top, *rest, causal, window_size):
        assert causal and window_size == (-1, -1) and starts.dtype == torch.int32 and starts[-1] == len(q)
        out = torch.empty_like(q)
        for a, b in zip(starts.tolist(), starts.tolist()[1:]):
            if b > a:
                assert b - a <= top
                out[a:b] = trunk.math_attention(q[None, a:b], k[None, a:b], v[None, a:b])[0]
        return out

    class Package:
        flash_attn_varlen_func = staticmethod(varlen)

    monkeypatch.setattr(trunk.importlib, "import_module", lambda name: Package)
    generator = torch.Generator().manual_seed(0)
    for low in (0, 1):  # few documents, and more of them than the first size of the list
        ids = torch.randint(low, 40 if not low else 3, (2, 96), generator=generator)
        q, k = (torch.randn(2, 96, heads, 8, generator=generator) for heads in (4, 2))
        docs = (ids == trunk.BOS_ID).cumsum(1)
        starts = trunk.document_mask("fa2", docs)
        assert len(starts) & len(starts) - 1 == 0 and len(starts) >= 64
        found = trunk.flash_attention("flash_attn")(q, k, k, starts)
        assert torch.allclose(
            found, trunk.math_attention(q, k, k, trunk.document_mask("math", docs)), atol=1e-5
        )


def test_with_document_masks_no_document_reads_another(trunk, tiny, alive, ids):
    """P8: other text in the documents before leaves a
    document's scores alone (and without the mask it does not)."""
    other = ids.copy()
    other[1:70] = (other[1:70] - 4 + 7) % 256 + 4
    for mask, same in ((1, True), (0, False)):
        model = alive(tiny(DOC_MASK=mask, JEPA_CHUNK_SIZE=0)).eval()
        a, b = trunk.score(model, ids)[0], trunk.score(model, other)[0]
        assert (np.abs(a[70:] - b[70:]).max() < 1e-5) == same


def test_document_masks_in_a_real_run(run):
    code, output, metrics = run(DOC_MASK=1)
    assert code == 0 and metrics["settings"]["DOC_MASK"] is True, output


# Test-time training


def test_learning_helps_on_text_that_repeats_and_can_be_undone(trunk, tiny, alive):
    rng = np.random.default_rng(0)
    phrase = rng.integers(97, 123, 60) + 4
    ids = np.concatenate(([1], np.tile(phrase, 20)))
    model = alive(tiny(**{**TTT, "TTT_LR": 0.1})).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learned, _ = trunk.score(model, ids)
    assert all((p == before[name]).all() for name, p in model.named_parameters())
    model.args.ttt_adapt = False
    plain, _ = trunk.score(model, ids)
    model.args.ttt = "0"
    assert np.array_equal(plain, trunk.score(model, ids)[0])  # the control is the plain score
    assert np.array_equal(learned[:64], plain[:64]) and learned[600:].sum() < 0.9 * plain[600:].sum()


@pytest.mark.parametrize("stop", [1, 31, 32, 33, 64, 100])
def test_the_future_of_a_text_leaves_its_past_alone_while_learning(trunk, tiny, alive, ids, stop):
    model = alive(tiny(**TTT)).eval()
    changed = ids.copy()
    changed[stop + 1 :] = (changed[stop + 1 :] + 11) % 256 + 4
    changed[stop + 1] = 4 + (ids[stop + 1] + 1) % 250
    (a, va), (b, vb) = (trunk.score(model, x, [stop]) for x in (ids, changed))
    assert np.array_equal(a[:stop], b[:stop]) and np.array_equal(va[stop], vb[stop])


def test_switching_learning_off_later_changes_nothing_before(trunk, tiny, alive, ids, monkeypatch):
    """P4: scores up to and including chunk k are those of a run that stops learning after chunk k - 1."""
    model = alive(tiny(**TTT)).eval()
    full, _ = trunk.score(model, ids)
    update = trunk.TestTimeTraining.update

    def until_three(self, *rest):
        if self.chunks < 3:
            update(self, *rest)

    monkeypatch.setattr(trunk.TestTimeTraining, "update", until_three)
    part, _ = trunk.score(model, ids)
    assert np.array_equal(full[:96], part[:96]) and not np.array_equal(full[96:128], part[96:128])


def test_rows_to_learn_from_were_scored_and_cover_the_chunk(trunk, tiny, alive):
    model = alive(tiny(**TTT))
    for chunk in (16, 32, 64, 80, 160):
        model.args.ttt_chunk_tokens = chunk
        learner = trunk.TestTimeTraining(model)
        for stop in range(chunk, 500, chunk):
            rows = learner.rows(stop)
            targets = {t for start in rows for t in range(start, start + 64)}
            assert not targets or max(targets) == stop - 1 and min(targets) >= 0
            if stop - chunk >= 64:
                assert targets >= set(range(stop - chunk, stop))
    with pytest.raises(AssertionError, match="not scored yet"):
        learner.args.ttt_chunk_tokens = 32
        seen = np.ones(200, bool)
        seen[40] = False
        learner.chunks = 2
        learner.catch_up(np.ones(201, np.int64), seen)


def test_batches_do_not_change_a_result(trunk, tiny, alive, ids):
    model = alive(tiny(**TTT)).eval()
    found = []
    for tokens in (64, 256, 2048):
        model.args.eval_batch_tokens = tokens
        found.append(trunk.score(model, ids)[0])
    assert all(np.abs(found[0] - other).max() < 1e-5 for other in found[1:])


def test_only_the_blocks_learn(trunk, tiny, alive, ids, monkeypatch):
    model = alive(tiny(**TTT)).eval()
    monkeypatch.setattr(trunk.TestTimeTraining, "restore", lambda self: None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trunk.score(model, ids)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name, _ in model.named_parameters() if name.startswith("blocks.")} == moved


@slow
def test_ranks_learn_the_same(run):
    """Two gloo ranks and one: the same updates, the same score."""
    settings = {**TTT, "TTT_CHUNK_TOKENS": 256, "TTT_LR": 0.02, "VAL_BYTES": 1500}
    found = []
    for ranks in (1, 2):
        code, output, metrics = run(ranks=ranks, RUN_ID=f"ranks{ranks}", **settings)
        assert code == 0, output
        assert metrics["headline"] == "final_int6_ttt"
        found.append(metrics["evals"]["final_int6_ttt"])
    assert found[0]["updates"] == found[1]["updates"] == 5 * 2  # chunks before the last, batches of 2 rows
    assert found[0]["val_bpb"] == pytest.approx(found[1]["val_bpb"], abs=2e-3)


def test_control_line_of_learning(run):
    code, output, metrics = run(**{**TTT, "TTT_ADAPT": 0, "TTT_CHUNK_TOKENS": 256})
    assert code == 0 and metrics["headline"] == "final_int6_ttt_off", output
    evals = metrics["evals"]
    assert evals["final_int6_ttt_off"]["val_bpb"] == pytest.approx(
        evals["final_int6_sliding"]["val_bpb"], abs=1e-9
    )


@pytest.mark.parametrize("settings, words", [
    ({"TTT": "adam"}, "TTT='adam' is not accepted"),
    ({**TTT, "TTT_CHUNK_TOKENS": 40}, "TTT_CHUNK_TOKENS=40, EVAL_STRIDE=16"),
    ({**TTT, "TTT_MODULES": "blocks.9"}, "TTT_MODULES='blocks.9' is retired"),
])
def test_bad_settings_are_one_line(run, settings, words):
    code, output, _ = run(ITERATIONS=1, **settings)
    assert code == 2 and words in output and "Traceback" not in output
