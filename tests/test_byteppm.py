"""The record BytePPM: its mixtures are distributions,
causal, decodable, and PPM-D is that of a slow reference."""

import copy
import hashlib
import json
import math
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, TINY, enlivened, environment, slow
from family import load_script

RECORD, = (ROOT / "records").glob("*_BytePPM")
section = load_script(RECORD)
KINDS = [("binary", 1.0), ("ppm", 1.0), ("ppm", 0.1)]
WORDS = (
    b"the cat sat on a mat and the dog ran to the barn\nwhile Mary, who had the cat, sang of rivers 1234 "
    b"\xc3\xa9t\xc3\xa9. "
)


def mixture(mix="binary", weight=1.0, order=4, rows=10):
    return section.Mixture(SimpleNamespace(mix=mix, ppm_weight=weight, ppm_order=order, mix_rows=rows))


def text(seed: int, n: int) -> np.ndarray:
    """Documents of repeated words, with noise, all 256 bytes and a few of the odd ids in between."""
    rng, words, ids = np.random.default_rng(seed), WORDS.split(b" "), []
    while len(ids) < n:
        ids.append(1)
        for _ in range(rng.integers(1, 120)):
            ids += [4 + b for b in words[rng.integers(len(words))] + b" "]
            if rng.random() < 0.03:
                ids += (4 + rng.integers(0, 256, 3)).tolist()
            if rng.random() < 0.01:
                ids.append(int(rng.integers(0, 4)))
    return np.array(ids[:n])


def shard(ids: np.ndarray) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = section.SHARD_MAGIC, section.SHARD_VERSION, len(ids)
    return header.tobytes() + ids.astype("<u2").tobytes()


def network(ids: np.ndarray, seed: int) -> np.ndarray:
    """A noisy guess of each id: fp32 log-probabilities (n, 260)."""
    logits = np.random.default_rng(seed).normal(0, 2, (len(ids), 260))
    logits[np.arange(len(ids)), ids] += 4
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    return logits.astype(np.float32)


def ppm_d(history: list[int], order: int, counts: dict) -> np.ndarray:
    """PPM-D with exclusion over 256 bytes, from dictionaries: {context: {byte: count}}."""
    q, mass, seen = np.zeros(256), 1.0, set()
    for k in range(min(order, len(history)), -1, -1):
        table = counts.get(tuple(history[len(history) - k :]), {})
        left = {b: c for b, c in table.items() if b not in seen}
        if not left:
            continue
        total = sum(left.values())
        if len(seen) + len(left) == 256:
            for b, c in left.items():
                q[b] = mass * c / total
            return q
        for b, c in left.items():
            q[b] = mass * (2 * c - 1) / (2 * total)
        mass *= len(left) / (2 * total)
        seen |= set(left)
    for b in set(range(256)) - seen:
        q[b] = mass / (256 - len(seen))
    return q


def ppm_d_learn(history: list[int], order: int, counts: dict, byte: int) -> None:
    for k in range(min(order, len(history)), -1, -1):
        table = counts.setdefault(tuple(history[len(history) - k :]), {})
        table[byte] = table.get(byte, 0) + 1
        if table[byte] > 1:
            return  # update exclusion


@pytest.mark.parametrize("order,seed", [(1, 0), (3, 1), (6, 2)])
def test_ppm_equals_a_slow_reference(order, seed):
    ids = text(seed, 4000)
    if order == 1:  # every byte in one context: the case in which nothing is left to escape to
        ids = np.concatenate(([1], 4 + np.random.default_rng(0).permutation(256), ids))
    lp, weight = network(ids, seed), 0.25
    got = mixture("ppm", weight, order).score(ids, lp)
    history, counts, bos, want = [], {}, 0, np.zeros(len(ids))
    for t, token in enumerate(ids):
        rho = (bos + 0.5) / (t + 1)
        if token >= 4:
            q = ppm_d(history, order, counts)
            assert abs(q.sum() - 1) < 1e-12
            q = (1 - rho) * q[token - 4]
            ppm_d_learn(history, order, counts, token - 4)
            history.append(token - 4)
        else:
            q, history = rho if token == 1 else 0.0, []
            bos += token == 1
        want[t] = -math.log((1 - weight) * math.exp(lp[t, token]) + weight * q)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mix,weight", KINDS)
def test_sums_to_one_and_scores_what_it_says(mix, weight):
    """1,000 positions: the 260 probabilities sum to one,
    and the realised one is the number that is booked."""
    ids = text(3, 6000)
    lp = network(ids, 3)
    whole = mixture(mix, weight).score(ids, lp)
    stepwise = mixture(mix, weight)
    audit = set(np.random.default_rng(3).choice(len(ids), 1000, replace=False))
    worst = apart = 0.0
    for t, token in enumerate(ids):
        if t in audit:
            logprobs = stepwise.distribution(lp[t])
            assert logprobs.shape == (260,) and np.isfinite(logprobs).all()
            worst = max(worst, abs(np.exp(logprobs).sum() - 1))
            apart = max(apart, abs(whole[t] + logprobs[token]))
        stepwise.push(token, lp[t])
    assert worst < 1e-6 and apart <= 1e-12, (worst, apart)


@pytest.mark.parametrize("mix,weight", KINDS)
def test_any_cut_into_blocks_gives_the_same_numbers(mix, weight):
    ids = text(4, 3000)
    lp = network(ids, 4)
    parts, at, m = [], 0, mixture(mix, weight)
    for n in (1, 2, 7, 300, 0, 1000, 1690):
        parts.append(m.score(ids[at : at + n], lp[at : at + n]))
        at += n
    np.testing.assert_array_equal(np.concatenate(parts), mixture(mix, weight).score(ids, lp))


@pytest.mark.parametrize("mix,weight", KINDS)
@pytest.mark.parametrize("at", [0, 1, 777, 2500])
def test_poisoned_target(mix, weight, at):
    """Another id at t moves no earlier score and not the
    distribution at t; its own score is that distribution's."""
    ids = text(5, 3000)
    lp = network(ids, 5)
    want, before = mixture(mix, weight).score(ids, lp), mixture(mix, weight)
    before.score(ids[:at], lp[:at])
    vector = before.distribution(lp[at])
    for poison in (0, 1, 2, 3, 4, 36, 104, 259):
        poisoned = ids.copy()
        poisoned[at] = poison
        got = mixture(mix, weight).score(poisoned, lp)
        np.testing.assert_array_equal(got[:at], want[:at])
        assert abs(got[at] + vector[poison]) <= 1e-12
    np.testing.assert_array_equal(before.distribution(lp[at]), vector)


@pytest.mark.parametrize("mix,weight", KINDS)
def test_future_is_not_read_and_score_comes_before_update(mix, weight):
    ids = text(6, 2000)
    lp = network(ids, 6)
    m = mixture(mix, weight)
    m.score(ids[:1000], lp[:1000])
    twin, vector = copy.deepcopy(m), m.distribution(lp[1000])
    np.testing.assert_array_equal(m.distribution(lp[1000]), vector)  # asking changes nothing
    first = m.score(ids[1000:1001], lp[1000:1001])[0]
    assert abs(first + vector[ids[1000]]) <= 1e-12  # the score is from before the update
    assert np.abs(m.distribution(lp[1000]) - vector).max() > 1e-6  # and the update happened
    noise = np.random.default_rng(0).integers(4, 260, 999)
    got = twin.score(np.append(ids[1000], noise), np.concatenate((lp[1000:1001], network(noise, 9))))
    assert got[0] == first  # the twin had its own state, and what follows did not matter


@pytest.mark.parametrize("mix,weight", KINDS)
def test_bos_forgets_the_history_but_not_the_counts(mix, weight):
    ids, lp = text(7, 1500), network(text(7, 1500), 7)
    tail = np.array([1] + [4 + b for b in b"the cat sat on the mat"])
    tail_lp = network(tail, 8)
    a, b = mixture(mix, weight), mixture(mix, weight)
    # The same ids in another order before BOS: orders above
    # 0 have other contexts, but only the counts may tell.
    a.score(ids, lp)
    b.score(ids, lp)
    for m, last in ((a, b"the ca"), (b, b"zzzzzz")):
        m.score(np.array([4 + x for x in last]), network(np.zeros(6, int), 1))
        m.score(tail[:1], tail_lp[:1])
    if mix == "ppm":
        assert a.state.now[section.CONTEXT] == b.state.now[section.CONTEXT] == section.ROOT
        assert a.state.now[section.LENGTH] == b.state.now[section.LENGTH] == 0
    else:
        assert not a.state.hashes.any() and not b.state.hashes.any()
        assert a.state.now[section.MATCHED] == b.state.now[section.MATCHED] == 0
    fresh = mixture(mix, weight).score(tail, tail_lp)
    assert a.score(tail[1:], tail_lp[1:]).sum() < fresh[1:].sum()  # what was counted before BOS still helps


def test_weight_zero_is_the_network():
    ids = text(8, 500)
    lp = network(ids, 8)
    m = mixture(KINDS[-1][0], 0.0)
    want = -lp[np.arange(500), ids].astype(np.float64)
    assert np.abs(m.score(ids, lp) - want).max() <= 1e-9
    assert np.abs(copy.deepcopy(m).distribution(lp[0]) - lp[0]).max() <= 1e-9


@pytest.mark.parametrize("mix,weight", KINDS)
def test_learns_a_text_that_repeats(mix, weight):
    """A network that knows nothing: the second reading has to be far cheaper than the first."""
    ids = np.concatenate(([1], 4 + np.frombuffer(WORDS * 8, np.uint8)))
    lp = np.full((len(ids), 260), -math.log(260), np.float32)
    nats = mixture(mix, weight).score(ids, lp)
    assert nats[-len(WORDS) :].sum() < (0.5 if weight == 1 else 0.9) * nats[1 : len(WORDS)].sum()


@pytest.mark.parametrize("mix,weight", KINDS)
def test_certain_networks_and_endless_matches_stay_finite(mix, weight):
    ids = np.concatenate(([1], np.full(20000, 104), [105, 0, 1, 4]))
    lp = np.full((len(ids), 260), -100, np.float32)
    lp[np.arange(len(ids)), ids] = 0
    lp[-4:, :] = np.float32(-100)
    lp[-4:, 104] = 0  # the last four come as a surprise
    m = mixture(mix, weight)
    nats = m.score(ids, lp)
    assert np.isfinite(nats).all() and (nats >= -1e-6).all()
    assert abs(np.exp(m.distribution(lp[-1])).sum() - 1) < 1e-6


def test_without_numba_there_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(section, "njit", None)
    with pytest.raises(section.UserError, match="PPM_WEIGHT=1.0: install numba"):
        section.Hyperparameters({})
    section.Hyperparameters({"PPM_WEIGHT": "0"})
    assert mixture(weight=0.0).score(np.array([5]), np.zeros((1, 260), np.float32)) == 0


def test_arithmetic_coder_round_trip():
    """The distributions drive a range coder, a decoder that sees only the bytes gets the ids back."""
    ids = text(9, 2500)
    lp = network(ids, 9)
    for mix, weight in KINDS:
        bits, low, high, pending, m = [], 0, (1 << 48) - 1, 0, mixture(mix, weight)

        def table(logprobs):
            return np.concatenate(
                ([0], np.cumsum(np.floor(np.exp(logprobs) * (1 << 30)).astype(np.int64) + 1))
            )

        half, quarter = 1 << 47, 1 << 46
        for t, token in enumerate(ids):
            c = table(m.distribution(lp[t]))
            span = high - low + 1
            low, high = (
                low + span * int(c[token]) // int(c[-1]),
                low + span * int(c[token + 1]) // int(c[-1]) - 1,
            )
            m.push(token, lp[t])
            while True:
                if high < half or low >= half:
                    bit = int(low >= half)
                    bits += [bit] + [1 - bit] * pending
                    pending, low, high = 0, low - half * bit, high - half * bit
                elif low >= quarter and high < 3 * quarter:
                    pending, low, high = pending + 1, low - quarter, high - quarter
                else:
                    break
                low, high = 2 * low, 2 * high + 1
        bits += [int(low >= quarter)] + [1 - int(low >= quarter)] * (pending + 1)
        nats = mixture(mix, weight).score(ids, lp).sum()
        assert abs(len(bits) - nats / math.log(2)) <= 0.002 * len(bits) + 64
        feed = iter(bits + [0] * 64)
        value, low, high, m = 0, 0, (1 << 48) - 1, mixture(mix, weight)
        for _ in range(48):
            value = 2 * value + next(feed)
        for t in range(len(ids)):
            c = table(m.distribution(lp[t]))
            span = high - low + 1
            token = int(np.searchsorted(c, ((value - low + 1) * int(c[-1]) - 1) // span, side="right")) - 1
            assert token == ids[t], (mix, t)
            low, high = (
                low + span * int(c[token]) // int(c[-1]),
                low + span * int(c[token + 1]) // int(c[-1]) - 1,
            )
            m.push(token, lp[t])
            while True:
                if high < half or low >= half:
                    off = half * int(low >= half)
                elif low >= quarter and high < 3 * quarter:
                    off = quarter
                else:
                    break
                low, high, value = 2 * (low - off), 2 * (high - off) + 1, 2 * (value - off) + next(feed)


# The script around the mixture


BYTES = {key: value for key, value in TINY.items() if "JEPA" not in key}
UNSET = {key: "" for key in TINY if "JEPA" in key}  # an empty variable is
SETTINGS = UNSET | {"MIX_ROWS": 10}
LEARN = {"TTT": "sgd", "TTT_CHUNK_TOKENS": 256, "TTT_LR": 0.02, "TTT_BATCH_ROWS": 2}


@pytest.fixture(scope="module")
def model():
    return enlivened(section, section.Hyperparameters({**BYTES, "MIX_ROWS": "10"})).eval()


@pytest.mark.parametrize(
    "settings",
    [{"mix": "binary"}, {"mix": "ppm"}, {"ppm_weight": 0.0}, {"ttt": "sgd"}, {"mix_streams": 3},
     {"mix_streams": 3, "mix": "ppm", "ttt": "sgd"}],
    ids=str,
)
def test_score_and_stream_agree_on_the_mixture(model, monkeypatch, settings):
    monkeypatch.setattr(model.args, "ttt_chunk_tokens", 64)
    for name, value in settings.items():
        monkeypatch.setattr(model.args, name, value)
    ids = text(1, 250)
    ids[[90, 170]] = 1  # three documents
    nats, vectors = section.score(model, ids, range(0, 249, 3))
    stream = section.stream(model, len(ids))
    assert len(section.run_starts(ids, model.args.mix_streams)) == settings.get("mix_streams", 1)
    stream.push(ids[0])
    for t in range(249):
        logprobs = stream.logprobs()
        assert abs(np.exp(logprobs).sum() - 1) < 1e-6 and abs(nats[t] + logprobs[ids[t + 1]]) < 1e-4
        if t in vectors:
            assert np.abs(vectors[t] - logprobs).max() < 1e-4 and abs(nats[t] + vectors[t][ids[t + 1]]) < 1e-9
        stream.push(ids[t + 1])


@pytest.mark.parametrize("streams", [1, 2, 3, 7, 1000])
def test_runs_begin_at_documents_and_are_nearly_equal(streams):
    """What `score` cuts at once is what a decoder finds from the place of each BOS and the length."""
    ids = text(11, 20000)
    starts = section.run_starts(ids, streams)
    documents = np.flatnonzero(ids == 1)
    assert starts[0] == 0 and (ids[starts] == 1).all() and (np.diff(starts) > 0).all()
    found, run = [0], 0
    for place in documents:
        if section.run_of(int(place), len(ids), streams) > run:
            found, run = [*found, place], section.run_of(int(place), len(ids), streams)
    assert found == starts.tolist()
    longest = np.diff([*documents, len(ids)]).max()
    if streams < 10:
        sizes = np.diff([*starts, len(ids)])
        assert len(starts) == streams and np.abs(sizes - len(ids) / streams).max() <= longest
    else:
        assert 10 < len(starts) <= len(documents)  # no more than there are documents


@pytest.mark.parametrize("ids, starts", [
    (np.full(50, 9), [0]),  # no BOS
    (np.array([1] + [9] * 49), [0]),  # one document
    (np.array([9] * 5 + [1] + [9] * 44), [0]),  # the first begins before the text
    (np.array([1] + [9] * 40 + [1] + [9] * 8), [0, 41]),  # a huge one takes the runs that it covers
    (np.array([1] * 10), [0, 3, 5, 8]),  # empty ones
    (np.array([1]), [0]),
])
def test_odd_texts_are_cut_sensibly(ids, starts):
    assert section.run_starts(ids, 4).tolist() == starts


@pytest.mark.parametrize("mix", ["binary", "ppm"])
def test_each_run_has_counts_of_its_own(model, monkeypatch, mix):
    """A run is scored as a text of its own would be, given the network's log-probabilities of the whole."""
    ids = text(12, 900)
    monkeypatch.setattr(model.args, "mix", mix)
    batches = section.scored(model, ids, section.WindowPlan(64, 16, 8))
    logprobs = np.concatenate([part for _, _, part, _ in batches])
    monkeypatch.setattr(model.args, "mix_streams", 3)
    nats, vectors = section.score(model, ids, [500])
    starts = section.run_starts(ids, 3)
    assert len(starts) == 3
    for start, stop in zip(starts, [*starts[1:], len(ids) - 1]):
        own = section.Mixture(model.args).score(ids[start + 1 : stop + 1], logprobs[start:stop])
        np.testing.assert_allclose(nats[start:stop], own, rtol=0, atol=1e-5)
    assert abs(nats[500] + vectors[500][ids[501]]) < 1e-9
    monkeypatch.setattr(model.args, "mix_streams", 1)
    whole, _ = section.score(model, ids)
    np.testing.assert_array_equal(whole[: starts[1]], nats[: starts[1]])  # the first run is that of one run
    assert np.abs(whole[starts[1] :] - nats[starts[1] :]).max() > 1e-3


@pytest.mark.parametrize("mix", ["binary", "ppm"])
def test_poison_in_one_run_moves_only_what_follows_in_it(model, monkeypatch, mix):
    """Counts do not leave their run; the network's windows do, as far as they reach."""
    ids = text(13, 900)
    ids[[310, 620]] = 1
    monkeypatch.setattr(model.args, "mix", mix)
    monkeypatch.setattr(model.args, "mix_streams", 3)
    _, second, third = section.run_starts(ids, 3)
    at = int(second) + 40
    want, before = section.score(model, ids, [at - 1])
    poisoned = ids.copy()
    poisoned[at] = 77 if ids[at] != 77 else 78
    got, after = section.score(model, poisoned, [at - 1])
    np.testing.assert_array_equal(got[: at - 1], want[: at - 1])
    np.testing.assert_array_equal(after[at - 1], before[at - 1])
    far = third + model.args.eval_seq_len
    np.testing.assert_array_equal(got[far:], want[far:])
    assert np.abs(got[at : third] - want[at : third]).max() > 1e-4


def test_weight_zero_reproduces_the_network(model, monkeypatch):
    ids = text(2, 300)
    monkeypatch.setattr(model.args, "ppm_weight", 0.0)
    nats, _ = section.score(model, ids)
    want = np.concatenate([part for *_, part in section.scored(model, ids, section.WindowPlan(64, 16, 8))])
    assert np.abs(nats - want).max() < 1e-9


@slow
def test_lines_of_a_run_on_any_number_of_ranks(run):
    """The mixture is one stream: two ranks gather their blocks in order and find what one finds."""
    found, updates = [], []
    for ranks in (1, 2):
        code, output, metrics = run(
            ranks=ranks, script=RECORD / "train_gpt.py", RUN_ID=f"ranks{ranks}", **SETTINGS,
            **LEARN, VAL_BYTES=1500,
        )
        assert code == 0, output
        assert metrics["headline"] == "final_int6_ttt_mix"
        found.append(metrics["evals"])
        updates.append(metrics["evals"]["final_int6_ttt"]["updates"])
    assert updates[0] == updates[1] == 2 * (1502 // 256)  # an update is all ranks'; the last chunk has none
    names = ["final_int6_sliding", "final_int6_sliding_mix", "final_int6_ttt", "final_int6_ttt_mix"]
    assert set(names) <= set(found[0]) and all(f"{name}_exact" in output for name in names)
    for name in names:
        assert found[0][name]["val_bpb"] == pytest.approx(found[1][name]["val_bpb"], abs=3e-3)
    assert found[0]["final_int6_sliding_mix"]["val_bpb"] < found[0]["final_int6_sliding"]["val_bpb"]


@pytest.mark.parametrize("mix, streams, others", [
    ("binary", 4, [(3, 2)]), pytest.param("ppm", 1, [(2, 3)], marks=slow),
])
def test_ranks_and_threads_change_no_digit(run, model, corpus, tmp_path, mix, streams, others):
    """One artifact, scored on one to three ranks by one to three threads each: the same sums, bit for bit."""
    tensors = {name: p.detach().numpy() for name, p in model.exported().items()}
    path = tmp_path / "model.bin"
    path.write_bytes(section.pack(tensors, model.args))
    data = shutil.copytree(corpus, tmp_path / "data")
    val, = data.glob("*_val_*.bin")
    val.write_bytes(shard(text(16, 2500)))  # many documents
    (data / "manifest.json").unlink(missing_ok=True)
    found = []
    for ranks, threads in [(1, 1), *others]:
        code, output, metrics = run(
            ranks=ranks, script=RECORD / "train_gpt.py", RUN_ID=f"r{ranks}t{threads}", **UNSET, EVAL_ONLY=1,
            ARTIFACT=path, DATA_PATH=data, MIX=mix, MIX_STREAMS=streams, MIX_THREADS=threads, DTYPE="fp32",
            EVAL_STRIDE=16, EVAL_BATCH_TOKENS=512,
        )
        assert code == 0, output
        evals = metrics["evals"]
        assert evals["final_int6_sliding_mix"]["runs"] == streams
        assert "slower:" in output and evals["final_int6_sliding_mix"]["mix_seconds"] > 0
        found.append({name: (result["val_loss"], result["val_bpb"], result["bits_by_class"])
                      for name, result in evals.items()})
    assert all(each == found[0] for each in found[1:])


def test_a_slow_mixture_holds_the_network_back_and_loses_nothing(model, monkeypatch):
    """Batches that wait take no more than BACKLOG: then the network waits for its threads."""
    ids = text(14, 1500)
    runtime = SimpleNamespace(rank=0, world_size=1, all_reduce=lambda x: x)
    monkeypatch.setattr(section, "BACKLOG", 0)
    monkeypatch.setattr(model.args, "mix_streams", 3)
    ledger = section.Ledger(model.args, runtime, ids, True)
    waiting = []
    for batch in section.scored(model, ids, section.WindowPlan(64, 16, 8)):
        ledger.take(*batch)
        waiting.append(len(ledger.jobs))
    network, mixed = ledger.close()
    nats, _ = section.score(model, ids)
    assert max(waiting) == 0 and ledger.waited > 0
    assert network[-1] == mixed[-1] == len(ids) - 1
    assert not ledger.mixtures  # a run that is over frees its counts
    assert float(mixed[:-1].sum()) == pytest.approx(nats.sum(), abs=1e-2)


@pytest.mark.parametrize("settings, words", [
    ({"VOCAB_SIZE": 512}, "VOCAB_SIZE='512' is not accepted: an integer from 260 to 260"),
    ({"TOKENIZER_PATH": "some.model"}, "TOKENIZER_PATH='some.model' is retired: ids are bytes"),
    ({"DRAFT": 2}, "DRAFT='2' is retired: draft heads are the trunk's"),
    ({"MIX_STREAMS": 0}, "MIX_STREAMS='0' is not accepted"),
    ({"MIX_ROWS": 7}, "MIX_ROWS='7' is not accepted"),
    ({"PPM_WEIGHT": 0.5}, "MIX=binary, PPM_WEIGHT=0.5"),
    ({"MIX": "lpaq"}, "MIX='lpaq' is not accepted"),
    ({"PPM_ORDER": 0}, "PPM_ORDER='0' is not accepted"),
    ({"JEPA_CHUNK_SIZE": 8}, "JEPA_CHUNK_SIZE='8' is retired"),
])
def test_bad_settings_are_one_line(run, settings, words):
    code, output, metrics = run(script=RECORD / "train_gpt.py", **(SETTINGS | settings))
    assert code == 2 and words in output and "Traceback" not in output and metrics is None


@pytest.mark.parametrize(
    "settings",
    [pytest.param({"MIX_STREAMS": 2, "MIX": "ppm"}, marks=slow), {"MIX_STREAMS": 3},
     pytest.param({"TTT": "sgd", "TTT_CHUNK_TOKENS": 64, "TTT_LR": 0.02}, marks=slow)],
    ids=str,
)
def test_a_codec_proves_the_mixture(model, tmp_path, settings):
    """Text coded and decoded by the record's own stream:
    plain mixture, PPM-D, and with at least three updates."""
    tensors = {name: p.detach().numpy() for name, p in model.exported().items()}
    (tmp_path / "model.bin").write_bytes(section.pack(tensors, model.args))
    (tmp_path / "text.txt").write_bytes(WORDS * 20)
    if "MIX_STREAMS" in settings:  # runs begin at documents, which a shard has
        (tmp_path / "text.txt").write_bytes(shard(text(15, 900)))
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    done = subprocess.run(
        [
            sys.executable, ROOT / "scripts" / "codec.py", "prove", RECORD, tmp_path / "model.bin",
            tmp_path / "text.txt", "--bytes", "700", "--json", *sets,
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert "TTT" not in settings or result["updates"] >= 3


@slow
def test_what_each_mixture_is_worth(model, corpus, tmp_path):
    tensors = {name: p.detach().numpy() for name, p in model.exported().items()}
    (tmp_path / "model.bin").write_bytes(section.pack(tensors, model.args))
    shard, = corpus.glob("*_val_*.bin")
    done = subprocess.run([sys.executable, RECORD / "mixtures.py", tmp_path / "model.bin", shard,
                           "--targets", "3000", "--train", shard, "--train-ids", "2000",
                           "--out", tmp_path / "out.json"],
                          env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["script_sha256"] == hashlib.sha256((RECORD / "train_gpt.py").read_bytes()).hexdigest()
    rows = {row[0]: float(row[1]) for row in found["rows"]}
    assert rows["**binary mixing (`MIX=binary`)**"] < rows["control: network alone through the binary mixer"]
    better, = (name for name in rows if "better of the two" in name)
    # Whatever comes: no probability
    assert rows[better] < min(rows["network alone"], rows["PPM-D alone, order 5"])
    assert float(better.split()[-1]) > 1.001
    assert (
        rows["context mixer alone after 2,000 training ids, state not counted"]
        < rows["context mixer alone, empty start"]
    )


def test_streams_of_several_seeds_are_compared_with_one_stream(tmp_path, capsys):
    """By hand: differences of 0.02 and 0.04, their mean, Student's t of one degree of freedom."""
    tool = load_script(RECORD / "streams.py")

    def wrote(name: str, one: float, two: float, **more) -> str:
        path = tmp_path / name
        found = {"1": {"bpb": one}, "2": {"bpb": two}}
        path.write_text(json.dumps({"found": found, "targets": 9, "network": 2.0, "script_sha256": "ab",
                                    "note": "8 bytes, the network alone 2.0000 BPB", **more}))
        return str(path)

    good = [wrote("seed314.json", 1.5, 1.54), wrote("seed42.json", 1.6, 1.62)]
    assert tool.main(["--together", *good, "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["header"][1:3] == ["seed 42", "seed 314"] and found["rows"][0][3:] == ["", "", ""]
    half = 0.01 * math.tan(0.95 * math.pi / 2)  # the quantile of Cauchy's law times the standard error
    assert found["rows"][1] == ["2", "1.6200", "1.5400", "+0.0300",
                                f"{0.03 - half:+.4f} to {0.03 + half:+.4f}", "undecided"]
    assert found["note"] == "8 bytes; the network alone 2.0000, 2.0000 BPB." and capsys.readouterr().out
    other = wrote("seed7.json", 1.0, 1.0, targets=10)
    fewer = wrote("seed8.json", 1.0, 1.0, found={"1": {"bpb": 1.0}})
    ppm = wrote("seed9.json", 1.0, 1.0, note="8 bytes by `MIX=ppm`, the network alone 2.0000 BPB")
    for files, message in (([*good, other], "different targets"), ([good[0], good[0]], "named for its seed"),
                           ([*good, fewer], "different numbers of streams"), ([*good, ppm], "or mixtures"),
                           ([wrote("mine.json", 1.0, 1.0)], "named for its seed")):
        with pytest.raises(tool.Misuse, match=message):
            tool.main(["--together", *files])
    with pytest.raises(tool.Misuse, match="--cache are needed"):
        tool.main([])


def test_a_cache_of_log_probabilities_knows_what_it_is_of(model, tmp_path):
    """Another artifact, text or stride is refused: its numbers would be the first one's."""
    tool, args = load_script(RECORD / "streams.py"), copy.copy(model.args)
    tensors = {name: p.detach().numpy() for name, p in model.exported().items()}
    first, second = tmp_path / "a.bin", tmp_path / "b.bin"
    first.write_bytes(section.pack(tensors, args))
    second.write_bytes(first.read_bytes() + b"x")
    ids, path = text(3, 80), tmp_path / "cache.npy"
    known = tool.cached_logprobs(section, args, str(first), ids, path)
    assert known.shape == (79, args.vocab_size) and np.exp(known).sum(1) == pytest.approx(1, abs=1e-4)
    assert (tool.cached_logprobs(section, args, str(first), ids, path) == known).all()
    with pytest.raises(tool.Misuse, match="of other artifact"):
        tool.cached_logprobs(section, args, str(second), ids, path)
    args.eval_stride += 1
    with pytest.raises(tool.Misuse, match="of other ids, eval_stride"):
        tool.cached_logprobs(section, args, str(first), ids[:-1], path)


@pytest.mark.parametrize("words, message", [
    ("a b --cache c --streams 0", "at least 1"), ("a b --cache c --threads 0", "at least 1"),
    ("a b --cache c --rehearse 5", "at least 10,000"), ("a b --cache c --targets -1", "0, for all"),
    ("a b --cache missing.npy --rehearse 20000", "no such file")])
def test_streams_refuses_what_it_cannot_count(words, message):
    tool = load_script(RECORD / "streams.py")
    with pytest.raises(tool.Misuse, match=message):
        tool.main(words.split())


def test_kernels_refuses_a_folder_without_shards_and_a_script_without_a_mixture(tmp_path, monkeypatch):
    tool = load_script(RECORD / "kernels.py")
    monkeypatch.setattr(tool, "load_script", lambda path: section)
    with pytest.raises(tool.Misuse, match=r"has no \*_train_\*.bin"):
        tool.main(["old.py", str(tmp_path)])
    monkeypatch.setattr(tool, "load_script", lambda path: SimpleNamespace())
    with pytest.raises(tool.Misuse, match="without a mixture"):
        tool.main(["old.py", str(tmp_path)])


def test_both_kernels_are_timed_on_the_same_text(corpus, tmp_path, monkeypatch):
    """The old script is this one, compiled already, 0.05 s slower a piece and 0.01 nats a byte worse: that is
    what is told of the old one.
    """
    class Old(section.Mixture):
        def score(self, *given):
            found, end = super().score(*given), time.process_time() + 0.05
            while time.process_time() < end:
                pass
            return found + 0.01

    tool, out = load_script(RECORD / "kernels.py"), tmp_path / "rates.json"
    known = {tool.SCRIPT: section}
    monkeypatch.setattr(tool, "load_script", lambda path: known.get(path, SimpleNamespace(Mixture=Old)))
    (tmp_path / "old.py").write_text("# old\n")
    words = [str(tmp_path / "old.py"), str(corpus), "--targets", "20000", "--out", str(out)]
    assert tool.main(words) == 0
    told = json.loads(out.read_text())
    assert told["old_sha256"] != told["script_sha256"] and len(told["rows"]) == len(tool.KINDS)
    for _, before, now, ratio, whole, old, new in told["rows"]:
        assert float(before) < float(now) and float(ratio) > 1.5 and float(whole) > 1
        assert float(old) - float(new) == pytest.approx(0.01 / math.log(2), abs=1e-3)
