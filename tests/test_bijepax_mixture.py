"""The record BiJEPAX: its mixture over token ids is a
distribution, causal, decodable, and that of a slow reference.

Also the byte sidecars of CaseOps text, and what the published rule (INVALID) sums to.
"""

import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_stream_follows_score, enlivened, environment, slow
from family import load_script
from hypothesis import given, settings
from hypothesis import strategies as st

RECORD, = (ROOT / "records").glob("*_BiJEPAX")
section = load_script(RECORD)
mixtures = load_script(RECORD / "mixtures.py")
streams = load_script(RECORD / "streams.py")
WORDS = [
    "the", "cat", "sat", "on", "a", "mat", "and", "The", "Dog", "ran", "to", "the", "barn", "while",
    "Mary", "who", "had", "the", "cat", "sang", "of", "rivers", "NASA", "iPhone", "café", "été",
    "1234",
]


def prose(seed: int, documents: int = 12) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(20, 120))) + ".\n"
            for _ in range(documents)]


@pytest.fixture(scope="module")
def shards(prepare, tmp_path_factory):
    """A folder of CaseOps pieces, with their model and sidecars."""
    folder = tmp_path_factory.mktemp("bijepax")
    for name, seed in (("train", 0), ("val", 1)):
        lines = [json.dumps({"text": part}) for part in prose(seed, 60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    out = folder / "shards"
    assert (
        prepare.main(
            [
                "files", str(folder / "train.jsonl"), "--val", str(folder / "val.jsonl"),
                "--variant", "sp360-caseops", "--overlap", "off", "--out", str(out),
            ]
        )
        == 0
    )
    return out


def vocab_of(folder) -> int:
    return json.loads((folder / "manifest.json").read_text())["vocab_size"]


@pytest.fixture(scope="module")
def args(shards):
    tokenizer, = shards.glob("*.model")
    return SimpleNamespace(ppm_weight=1, ppm_order=5, mix_rows=12, vocab_size=vocab_of(shards),
                           tokenizer_path=str(tokenizer))


@pytest.fixture(scope="module")
def text(shards):
    file, = shards.glob("*_val_*.bin")
    ids = np.array(section.open_shard(file, vocab_of(shards)))
    return np.concatenate((ids, ids[:300]))[:1500]  # some of it twice


def mixture(args, **changes):
    return section.Mixture(SimpleNamespace(**{**vars(args), **changes}))


def network(ids: np.ndarray, size: int, seed: int) -> torch.Tensor:
    """A noisy guess of each target: fp32 log-probabilities (n, V)."""
    logits = np.random.default_rng(seed).normal(0, 2, (len(ids) - 1, size))
    logits[np.arange(len(ids) - 1), ids[1:]] += 4
    return torch.from_numpy(logits).log_softmax(-1).float()


def booked(found, ids, lp, first: int = 0, stop: int | None = None) -> np.ndarray:
    """Nats of targets first ... stop - 1."""
    stop = len(ids) - 1 if stop is None else stop
    return found.score(ids[first + 1 : stop + 1], found.distil(ids, first, stop, lp[first:stop]).numpy())


# The tree


symbols = st.lists(st.integers(0, 3) | st.sampled_from([32, 97, 255, 256, 300]), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.lists(symbols, min_size=2, max_size=60))
def test_the_tree_of_any_vocabulary(spelled):
    """Strings that repeat, extend one another or are empty:
    every id has its own path, every node its own border."""
    tree, size = section.vocabulary_tree(spelled), len(spelled)
    words = [spelled[i] for i in tree.order]
    assert words == sorted(spelled) and (tree.order[tree.rank] == np.arange(size)).all()
    assert sorted(tree.nodes) == list(range(1, size))
    seen = {(0, size)}
    for node in tree.nodes:  # topmost first: an interval is parted once, after it came to be
        low, high = int(tree.low[node]), int(tree.high[node])
        seen.remove((low, high))
        seen |= {(low, int(node)), (int(node), high)}
        inside = words[low:high]
        shared = 0
        while all(len(w) > shared for w in inside) and len({w[shared] for w in inside}) == 1:
            shared += 1
        assert tree.alike[node] == (inside[0] == inside[-1])
        if not tree.alike[node]:  # what shares a symbol more than all do stays together
            borders = [low + k for k in range(1, high - low)
                       if inside[k][: shared + 1] != inside[k - 1][: shared + 1]]
            middle = (low + high) // 2
            assert node in borders and abs(node - middle) == min(abs(b - middle) for b in borders)
    assert seen == {(i, i + 1) for i in range(size)}
    for token in range(size):
        path = [node for node in tree.paths[token] if node]
        leaf, low, high = tree.rank[token], 0, size
        for k, node in enumerate(path):
            assert (tree.low[node], tree.high[node], tree.level[node]) == (low, high, k + 1)
            low, high = (node, high) if leaf >= node else (low, node)
            over = tree.group[path[k - 1]] if k else 0
            assert tree.group[node] in (over, *np.flatnonzero(tree.above == over))
        assert high - low == 1
    seats = {(tree.group[node], tree.place[node]) for node in tree.nodes}
    assert len(seats) == size - 1 and all(1 <= place <= section.ROOM for _, place in seats)


@settings(max_examples=40, deadline=None)
@given(st.lists(symbols, min_size=2, max_size=40), st.integers(0, 2**32 - 1))
def test_the_network_telescopes_down_any_tree(spelled, seed):
    found = object.__new__(section.Mixture)
    found.tree, size = section.vocabulary_tree(spelled), len(spelled)
    found.scratch = np.zeros((size, 16), np.float32), np.zeros((size + 1, 16))
    lp = torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (1, len(spelled)))).log_softmax(-1).float()
    for token in range(len(spelled)):
        path = found.tree.paths[[token]]
        ones = 1 / (1 + np.exp(-found.odds(lp, path)[0].numpy()))
        kept = [p if found.tree.rank[token] >= node else 1 - p for p, node in zip(ones, path[0]) if node]
        floored = max(math.exp(float(lp[0, token])), section.TINY)
        assert abs(math.log(np.prod(kept)) - math.log(floored)) < 2e-6


def test_what_ids_spell(args):
    spelled, tokenizer = section.spelling(args), section.open_tokenizer(args)
    for i, word in enumerate(spelled):
        if i < 8:  # specials and operators: a symbol of their own
            assert word == (256 + i,)
        else:
            assert (
                bytes(word) == tokenizer.decode([tokenizer.piece_to_id("a"), i]).encode()[1:]
                or word[0] > 127
            )
    with pytest.raises(section.UserError, match="TOKENIZER_PATH"):
        section.spelling(SimpleNamespace(vocab_size=512, tokenizer_path=""))
    byte260 = section.spelling(SimpleNamespace(vocab_size=260, tokenizer_path=""))
    assert byte260[1] == (257,) and byte260[4 + 97] == (97,)


# The mixture


def test_sums_to_one_whatever_the_weights_and_is_what_is_booked(args, text):
    lp = network(text, args.vocab_size, 1)
    whole = booked(mixture(args), text, lp)
    stepwise = mixture(args)
    rng = np.random.default_rng(0)
    stepwise.push(text[0], None)
    for t, token in enumerate(text[1:400]):
        if t % 9 == 0:
            logprobs = stepwise.distribution(lp[t].numpy())
            assert logprobs.shape == (args.vocab_size,) and abs(np.exp(logprobs).sum() - 1) < 1e-6
            assert abs(whole[t] + logprobs[token]) < 1e-9
        stepwise.push(token, lp[t].numpy())
    for scale in (0.1, 3.0, 100.0):  # no weights can spoil the sum
        for array in (stepwise.mixer.weights, stepwise.mixer.trust):
            array[:] = rng.normal(0, min(scale, 20), array.shape)
        logprobs = stepwise.distribution(lp[399].numpy())
        assert np.isfinite(logprobs).all() and abs(np.exp(logprobs).sum() - 1) < 1e-6


def test_any_cut_into_blocks_gives_the_same_numbers(args, text):
    lp, at, parts, found = network(text, args.vocab_size, 2), 0, [], mixture(args)
    for n in (1, 2, 7, 300, 0, len(text) - 311):
        parts.append(booked(found, text, lp, at, at + n))
        at += n
    np.testing.assert_allclose(
        np.concatenate(parts), booked(mixture(args), text, lp), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("at", [0, 1, 500, 1400])
def test_another_target_moves_nothing_up_to_it(args, text, at):
    lp = network(text, args.vocab_size, 3)
    want, before = booked(mixture(args), text, lp), mixture(args)
    before.push(text[0], None)
    for t in range(at):
        before.push(text[t + 1], lp[t].numpy())
    vector = before.distribution(lp[at].numpy())
    np.testing.assert_array_equal(before.distribution(lp[at].numpy()), vector)  # asking changes nothing
    for poison in (1, 3, 4, 20, 270, args.vocab_size - 1):
        poisoned = text.copy()
        poisoned[at + 1] = poison
        poisoned[at + 2 :] = np.random.default_rng(poison).permutation(text[at + 2 :])  # nor does the future
        got = booked(mixture(args), poisoned, lp)
        np.testing.assert_array_equal(got[:at], want[:at])
        assert abs(got[at] + vector[poison]) < 1e-9


def test_what_repeats_gets_cheaper(args, text):
    ids = np.concatenate((text[:200], text[:200]))
    lp = torch.full((len(ids) - 1, args.vocab_size), -math.log(args.vocab_size))
    nats = booked(mixture(args), ids, lp)
    assert nats[-150:].sum() < 0.6 * nats[49:199].sum()


def test_hard_cases_stay_finite(args):
    ids = np.concatenate(([1], np.full(3000, 270), [3, 0, 1, 4, 4, 7, 359]))
    lp = np.full((len(ids) - 1, args.vocab_size), -100, np.float32)
    lp[np.arange(len(ids) - 1), ids[1:]] = 0
    lp[-5:] = np.float32(-100)
    lp[-5:, 270] = 0  # the last five come as a surprise
    nats = booked(mixture(args), ids, torch.from_numpy(lp))
    assert np.isfinite(nats).all() and (nats >= -1e-6).all()


def test_prefix_sums_side_by_side_are_those_of_one_row(args, text):
    """16 rows at once, a last group that is not full, and all nodes for a decoder: the odds of one row
    summed leaf by leaf in fp64."""
    found, lp = mixture(args), network(text[:36], args.vocab_size, 6)
    order, low, high = found.tree.order, found.tree.low, found.tree.high
    for nodes in (found.tree.paths[text[1:36]], found.tree.nodes[None]):
        part = lp[: len(nodes)]
        odds = found.odds(part, nodes).numpy()
        for r, row in enumerate(nodes):
            sums = np.concatenate(([0.0], np.cumsum(part[r].exp().double().numpy()[order])))
            row = row[row > 0]  # a path ends at a 0
            left, right = sums[row] - sums[low[row]], sums[high[row]] - sums[row]
            np.testing.assert_allclose(odds[r, : len(row)], np.log(right / left), rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [15, 16, 17, 31, 33, 260])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_the_kernel_at_its_edges_is_the_path_of_gpus(size, rows, monkeypatch):
    """Widths and heights around 16, certain and impossible ids: the odds of fp64 sums of floored
    probabilities, of what a GPU computes, and of parts of a larger tensor."""
    rng, found = np.random.default_rng(size + rows), object.__new__(section.Mixture)
    found.tree = section.vocabulary_tree([(int(x),) for x in rng.integers(0, 400, size)])
    found.scratch = np.zeros((size, 16), np.float32), np.zeros((size + 1, 16))
    lp = torch.from_numpy(rng.normal(0, 6, (rows, size))).log_softmax(-1).float()
    lp[-1], lp[-1, size // 2] = -torch.inf, 0.0
    nodes = np.tile(found.tree.nodes, (rows, 1))
    odds = found.odds(lp, nodes).numpy()

    p = np.maximum(lp.double().exp().numpy(), section.TINY)[:, found.tree.order]
    sums = np.pad(p.cumsum(1), ((0, 0), (1, 0)))
    left, right = (sums[:, b] - sums[:, a] for a, b in
                   ((found.tree.low[nodes[0]], nodes[0]), (nodes[0], found.tree.high[nodes[0]])))
    np.testing.assert_allclose(odds, np.log(right / left), rtol=0, atol=4e-4)  # a last bit at the floor
    large = torch.cat((lp, lp), 1)[:, :size]
    np.testing.assert_array_equal(found.odds(large, nodes).numpy(), odds)
    monkeypatch.setattr(section, "LANES", 10**6)  # no kernel is so wide
    np.testing.assert_allclose(found.odds(lp, nodes).numpy(), odds, rtol=0, atol=4e-4)


def test_a_network_that_says_nan_gets_no_number(args, text):
    lp = network(text, args.vocab_size, 8)
    lp[20] = torch.nan
    nats = booked(mixture(args), text, lp)
    assert np.isfinite(nats[:20]).all() and np.isnan(nats[20:]).all()


def test_rows_are_cache_lines_and_blocks_leave_no_trace(args, text):
    """Rows begin at multiples of 64 bytes; a text longer than a block is that of many short calls."""
    found, lp = mixture(args), network(text, args.vocab_size, 7)
    assert found.mixer.table.ctypes.data % 64 == 0 and len(text) > 2 * section.BLOCK
    whole, cut = booked(found, text, lp), mixture(args)
    parts = [booked(cut, text, lp, at, min(at + 100, len(text) - 1)) for at in range(0, len(text) - 1, 100)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


class Slow:
    """The binary mixer again, from dictionaries and lists: no hashing, no rows, no scratch."""

    def __init__(self, args):
        self.tree, self.spelled, self.order = (
            (tree := section.vocabulary_tree(section.spelling(args))),
            section.spelling(args),
            args.ppm_order,
        )
        self.counters, self.known, self.document, self.forget = {}, {}, 0, True
        self.shared, self.by_node = {}, {}
        self.trust, self.hits = {}, {}
        self.history, self.ids, self.levels = [], [], tree.level
        self.past, self.last, self.runs, self.start = [], {}, [(0, 0), (0, 0)], 0

    def propose(self, token):
        self.past.append(int(token))
        n = len(self.past) - 1
        self.start = n if token == 1 else self.start
        here, found = n + 1 - self.start, []
        for r, need in enumerate((5, 2)):
            at, run = self.runs[r]
            at, run = (at + 1, min(run + 1, 32)) if run and self.past[at] == token else (0, 0)
            key = (r, *self.past[n - min(need, here) + 1 :])
            if run < 32 and key in self.last:
                before, length = self.last[key], 0
                while (
                    length < min(before + 1, here, 32)
                    and self.past[before - length] == self.past[n - length]
                ):
                    length += 1
                if length >= min(need, here) and length > run:
                    at, run = before + 1, length
            self.last[key], self.runs[r] = n, (at, run)
            found.append((self.past[at], run) if run else None)
        return found

    def contexts(self):
        """(key, of this document alone) of each context; None for the empty one."""
        history, word = self.history, []
        for x in history:
            if x < 256:
                word = [*word, x | 32] if 97 <= x | 32 <= 122 or 48 <= x <= 57 or x >= 128 else []
        orders = [
            tuple(history[-k:]) if len(history) >= k else ("short", k, tuple(history))
            for k in (1, min(3, self.order), self.order)
        ]
        return [*((key, True) for key in orders), (("w", *word), True), (("1", *self.ids[-1:]), True),
                (("2", *self.ids[-2:]), False), (("w", *word), False)]

    def score(self, token, lp, hints):
        tree, leaf, path, nats = self.tree, self.tree.rank[token], [], 0.0
        sums = np.concatenate(([0.0], np.cumsum(np.exp(lp)[tree.order].astype(np.float64))))
        met = [True] * 7
        for node in (int(x) for x in tree.paths[token] if x):
            low, high, y = tree.low[node], tree.high[node], int(leaf >= node)
            odds = math.log(
                (sums[high] - sums[node] + 1e-12 * (high - node))
                / (sums[node] - sums[low] + 1e-12 * (node - low))
            )
            if tree.alike[node]:
                nats -= math.log(1 / (1 + math.exp(-odds if y else odds)))
                continue
            inputs, cells, group = [max(-12, min(12, odds))], [], int(tree.group[node])
            for c, (key, local) in enumerate(self.contexts()):
                key = (c, key, self.document if local else -1, group)
                if not path or path[-1][0] != group:
                    met[c] = met[c] and key in self.known
                p, n = self.counters.get((key, node), (1 << 21, 0)) if met[c] else (1 << 21, 0)
                cell = (
                    c,
                    section.TRIALS[n],
                    section.DOUBT[p >> 14],
                    met[c] and self.known[key] == self.document,
                )
                inputs.append(float(section.STRETCH[p >> 10]) if n else 0.0)
                cells.append((key, cell if n else (c, "none")))
            state = 0
            for r, hint in enumerate(hints):
                inputs.append(0.0)
                cells.append(None)
                if hint and low <= tree.rank[hint[0]] < high:
                    cell = (r, hint[1], min(int(self.levels[node]), 15))
                    chance = self.hits.get(cell, 0.75)
                    inputs[-1] = math.log(chance / (1 - chance)) * (1 if tree.rank[hint[0]] >= node else -1)
                    cells[-1] = (cell, (tree.rank[hint[0]] >= node) == y)
                    state += 5 if r else 1 + int(section.AGREED[hint[1]])
            sets = [("state", state), ("sure", min(int(abs(inputs[0])), 11)), ("node", node)]
            for s in sets:
                self.shared.setdefault(
                    s, np.array([1.0 if s[0] == "state" and i == 0 else 0.0 for i in range(10)])
                )
            z = sum(float(sum(self.shared[s][i] for s in sets)) * x for i, x in enumerate(inputs))
            z += sum(self.trust.get(cells[c][1], 0.0) * inputs[1 + c] for c in range(7))
            one = 1 / (1 + math.exp(-max(-12, min(12, z))))
            nats -= math.log(one if y else 1 - one)
            path.append((group, node, y, one, inputs, cells, sets))
        for group, node, y, one, inputs, cells, sets in path:
            step = section.RATE * (y - one)
            for s in sets:
                self.shared[s] += step * np.array(inputs)
            for c in range(7):
                key, cell = cells[c]
                self.trust[cell] = self.trust.get(cell, 0.0) + step * inputs[1 + c]
                p, n = self.counters.get((key, node), (1 << 21, 0))
                p += int(((y << 22) - p) * section.STEPS[n])
                self.counters[key, node] = (min(max(p, 64), (1 << 22) - 64), min(n + 1, section.LIMIT))
                self.known[key] = self.document
            for hit in cells[7:]:
                if hit:
                    self.hits[hit[0]] = (old := self.hits.get(hit[0], 0.75)) + (
                        (0.999 if hit[1] else 0.001) - old
                    ) * section.SLOW
        if token == 1:
            self.history, self.ids, self.document = [], [], self.document + 1
        else:
            self.history, self.ids = [*self.history, *self.spelled[token]], [*self.ids, token]
        return nats


def test_equals_a_slow_reference(args, text):
    ids = text[:200]
    lp, slow = network(ids, args.vocab_size, 4), Slow(args)
    found = mixture(args, mix_rows=22)  # so wide that no two contexts want one row
    got, want = booked(found, ids, lp), []
    for t, token in enumerate(ids[:-1]):
        want.append(slow.score(int(ids[t + 1]), lp[t].numpy(), slow.propose(token)))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)  # weights are fp32 there and fp64 here
    assert abs(got.sum() - sum(want)) < 1e-3


def test_the_tilt_in_closed_form(args, text):
    """The control of `mixtures.py`: one id likelier by e^beta, all others less likely, one in all."""
    lp, hints, tilt = network(text, args.vocab_size, 5), np.array([300.0, 6, 0, 0]), mixtures.Tilt()
    own, liked = lp[800].double().numpy(), lp[800].double().numpy()[[300, 0]]
    for token in (300, 300, 300, 7, 300):
        tilt.book(token, own[token], hints, liked)
    beta = tilt.strength[0, 6, min(int(-2 * liked[0]), 15)]
    nats = [tilt.book(i, own[i], hints, liked, learn=False) for i in range(args.vocab_size)]
    p = np.exp(own)
    want = p * np.exp(beta * (np.arange(len(p)) == 300)) / (1 + p[300] * (math.exp(beta) - 1))
    assert beta > 0.1 and tilt.book(9, own[9], np.zeros(4), liked) == -own[9]
    np.testing.assert_allclose(np.exp(-np.array(nats)), want, rtol=1e-9)
    assert abs(want.sum() - 1) < 1e-6


def test_without_numba_there_is_one_clear_line(args, monkeypatch):
    monkeypatch.setattr(section, "njit", None)
    with pytest.raises(section.UserError, match="numba"):
        mixture(args)


# Sidecars


def test_bytes_of_targets_come_from_the_sidecars(shards):
    tokenizer, = shards.glob("*.model")
    script = section.Hyperparameters(
        {
            "DATA_PATH": str(shards), "VOCAB_SIZE": str(vocab_of(shards)), "VAL_BYTES": "0",
            "TOKENIZER_PATH": str(tokenizer), "MIX_ROWS": "4",
        }
    )
    data = section.Dataset(script, verify=True)
    evaluator = section.Evaluator(script, data, SimpleNamespace(), None)
    written = sum(len(part.encode()) for part in prose(1, 60))
    assert evaluator.bytes == written and len(evaluator.sizes) == len(data.val) - 1
    # BOS and operators cost nats, add none
    assert not evaluator.sizes[np.isin(data.val[1:], [1, 4, 5, 6])].any()


@pytest.mark.parametrize("spoil, words", [
    (lambda path: path.unlink(), "is missing"),
    (lambda path: path.write_bytes(path.read_bytes()[:-2]), "not the sidecar"),
    (lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\x07\x00"), "sha256"),
])
def test_a_sidecar_that_does_not_fit_is_one_clear_line(shards, tmp_path, spoil, words):
    for file in shards.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer, = shards.glob("*.model")
    spoil(*tmp_path.glob("*_val_*.bytes"))
    script = section.Hyperparameters({"DATA_PATH": str(tmp_path), "VOCAB_SIZE": str(vocab_of(shards)),
                                      "TOKENIZER_PATH": str(tokenizer)})
    with pytest.raises(section.UserError, match=words):
        section.Dataset(script, verify=True)


def test_caseops_pieces_without_any_sidecar_are_refused(shards, tmp_path):
    for file in shards.glob("*.bin"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer, = shards.glob("*.model")
    script = section.Hyperparameters({"DATA_PATH": str(tmp_path), "VOCAB_SIZE": str(vocab_of(shards)),
                                      "TOKENIZER_PATH": str(tokenizer)})
    with pytest.raises(section.UserError, match="no sidecar"):
        section.Evaluator(script, section.Dataset(script, verify=True), SimpleNamespace(), None)


# The script around them

HERE = {name: value for name, value in TINY.items() if name in section.Hyperparameters({}).settings()}
EXTRA = {name: "" for name in TINY if name not in HERE}


@pytest.fixture(scope="module")
def model(args):
    mine = {
        **HERE,
        "MIX_ROWS": "10",
        "VOCAB_SIZE": str(args.vocab_size),
        "TOKENIZER_PATH": args.tokenizer_path,
    }
    return enlivened(section, section.Hyperparameters(mine)).eval()


@pytest.mark.parametrize("changes", [{}, {"ppm_weight": 0}], ids=str)
def test_score_and_stream_agree(model, text, monkeypatch, changes):
    for name, value in changes.items():
        monkeypatch.setattr(model.args, name, value)
    assert_stream_follows_score(section, model, text[:150], every=3, atol=2e-4)


def test_weight_zero_reproduces_the_network(model, text, monkeypatch):
    monkeypatch.setattr(model.args, "ppm_weight", 0)
    nats, _ = section.score(model, text)
    plan = section.WindowPlan(64, model.args.eval_stride, 8)
    want = np.concatenate([part for *_, part in section.scored(model, text, plan)])
    assert abs(nats.sum() - want.sum()) / len(text) < 1e-9


@slow
def test_lines_of_a_run_on_two_ranks(run, shards, args, monkeypatch):
    """The mixture is one stream: two ranks gather their blocks in order and find what `score` finds alone."""
    code, output, metrics = run(
        ranks=2, script=RECORD / "train_gpt.py", **EXTRA, DATA_PATH=shards, VAL_BYTES=1500,
        VOCAB_SIZE=args.vocab_size, TOKENIZER_PATH=args.tokenizer_path, MIX_ROWS=10,
    )
    assert code == 0, output
    names = ["final_int6_sliding", "final_int6_sliding_mix"]
    found = [metrics["evals"][name] for name in names]
    assert metrics["headline"] == names[-1] and all(f"{name}_exact" in output for name in names)
    shard, = shards.glob("*_val_*.bin")
    ids = np.array(section.open_shard(shard, args.vocab_size))[: found[0]["targets"] + 1]
    model = section.load(metrics["artifact"])
    model.args.tokenizer_path = args.tokenizer_path
    for weight, result in enumerate(found):
        monkeypatch.setattr(model.args, "ppm_weight", weight)
        nats = section.score(model, ids)[0]
        assert nats.sum() / math.log(2) / found[0]["bytes"] == pytest.approx(result["val_bpb"], abs=1e-4)
    assert found[1]["val_bpb"] < found[0]["val_bpb"]


@slow
def test_the_published_block_runs(run, shards, args):
    published = dict(re.findall(r"(\w+)=(\S+)", """
        DISABLE_COMPILE=1 CASEOPS_ENABLED=1 TTT_ENABLED=0 PPM_MIXER_ENABLED=1 PPM_ORDER=5 PPM_H=0.999
        PPM_L=0.18 PPM_T=0.80 LQER_TOP_K=1 BIJEPAX_ENABLED=1 BIJEPAX_WEIGHT=0.01 BIJEPAX_START_FRAC=0.35
        BIJEPAX_END_FRAC=0.80 BIJEPAX_FWD_HOPS=4 BIJEPAX_BWD_HOPS=4 BIJEPAX_CYCLE=0 BIJEPAX_HEAD_DIM=32
        BIJEPAX_STRIDE=64 BIJEPAX_LR=0.001 TRAIN_LOG_EVERY=250"""))
    code, output, metrics = run(
        script=RECORD / "train_gpt.py", **{**EXTRA, **published}, DATA_PATH=shards, VAL_BYTES=600,
        VOCAB_SIZE=args.vocab_size, TOKENIZER_PATH=args.tokenizer_path, MIX_ROWS=8,
    )
    assert code == 0, output
    for name in EXTRA:  # settings of the tiny trunk, here empty
        output = output.replace(f"warning: {name} is no variable of this script: ignored", "")
    assert metrics["headline"] == "final_int6_sliding_mix" and "warning" not in output.lower()


@slow
def test_a_codec_proves_the_mixture(model, shards, args, tmp_path):
    """2 kB of ids coded and decoded by the record's own stream, in a process that sees nothing else."""
    tensors = {name: p.detach().numpy() for name, p in model.exported().items()}
    (tmp_path / "model.bin").write_bytes(section.pack(tensors, model.args))
    shard, = shards.glob("*_val_*.bin")
    done = subprocess.run(
        [
            sys.executable, ROOT / "scripts" / "codec.py", "prove", RECORD, tmp_path / "model.bin",
            shard, "--bytes", "2000", "--tokenizer", args.tokenizer_path, "--json",
        ],
        env=environment(**EXTRA),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["bytes"] >= 2000 and abs(result["coded_bytes"] - result["score_bytes"]) < 100


# The published rule


def test_the_published_rule_is_no_probability(args):
    """A network that is sure of a long piece, and counts that
    expect its bytes: the rule's numbers sum to more than 1."""
    spelled = [tuple(word) if word[0] < 256 else () for word in section.spelling(args)]
    text = np.array([i for _ in range(40) for i in range(280, 300)])
    rule = mixtures.Published(spelled)
    sums = []
    for t, token in enumerate(text):
        p = np.full(args.vocab_size, 0.1 / (args.vocab_size - 1))
        p[token] = 0.9
        if t % 40 == 39:
            sums.append(rule.total(np.log(p)))
        rule.book(int(token), math.log(p[token]), len(spelled[token]))
    assert max(sums) > 1.05
    fresh = mixtures.Published(spelled)
    assert fresh.book(280, math.log(0.5), 0) == 0  # zero bytes: dropped, though it says something


def test_what_each_mixture_is_worth(model, shards, args, tmp_path):
    tensors = {name: p.detach().numpy() for name, p in model.exported().items()}
    (tmp_path / "model.bin").write_bytes(section.pack(tensors, model.args))
    shard, = shards.glob("*_val_*.bin")
    paths = (shard, shard.with_suffix(".bytes"))
    ids, sizes = (np.array(section.open_shard(path, 1 << 16))[:1201] for path in paths)
    found = mixtures.table(
        section, str(tmp_path / "model.bin"), args.tokenizer_path, ids, sizes[1:].astype(int), 2, print
    )
    rows = {row[0]: float(row[1]) for row in found["rows"]}
    mixed, control = rows["**mixture**"], rows["control: network alone through the mixer"]
    assert mixed < control and mixed < rows["tilt"] < rows["network alone"]
    assert sum("INVALID" in name for name in rows) == 2 and "sum to" in str(rows)


def test_a_cut_into_streams_is_texts_of_their_own(args):
    """Runs begin at documents; each is mixed as a text alone, so nothing is learned across a cut."""
    ids = np.random.default_rng(3).integers(260, args.vocab_size, 900)
    ids[[0, 100, 380, 500, 820]] = section.BOS_ID
    lp, starts = network(ids, args.vocab_size, 7), streams.run_starts(ids, 3, section.BOS_ID)
    assert starts.tolist() == [0, 380, 820]  # places // 300: 0, 0, 1, 1, 2
    theirs = load_script("BytePPM")
    for count in range(1, 9):  # the cut is BytePPM's
        assert (streams.run_starts(ids, count, section.BOS_ID) == theirs.run_starts(ids, count)).all()
    values = mixture(args).distil(ids, 0, len(lp), lp).numpy()

    alone = [booked(mixture(args), ids[first : stop + 1], lp[first:stop]).sum()
             for first, stop in zip(starts, [380, 820, len(lp)])]
    whole, seconds = streams.mixed(section, args, ids, values, 3)
    assert whole == pytest.approx(sum(alone), abs=1e-9) and len(seconds) == 3
    assert streams.mixed(section, args, ids, values, 1)[0] == pytest.approx(
        booked(mixture(args), ids, lp).sum(), abs=1e-9)
    assert len(streams.run_starts(ids, 50, section.BOS_ID)) == 5  # no more than documents


def test_what_streams_cost_is_told_by_seed():
    found = {seed: {"network": 2.0, "bytes": 10, 1: {"bpb": bpb, "seconds": 4.0},
                    2: {"bpb": bpb + 0.01, "seconds": 2.0}} for seed, bpb in ((42, 1.7), (7, 1.72))}
    result = streams.table(found, [1, 2], 3)
    assert result["header"][1:3] == ["seed 7", "seed 42"]
    assert result["rows"][1][1:] == ["1.7300", "1.7100", "+0.0100", "+0.0100 to +0.0100", "worse", "2.00"]


@pytest.mark.parametrize("paths, message", [
    (["a/artifact.bin"], "named for its seed"), (["seed7/a.bin", "y-seed7/a.bin"], "of seed 7"),
    (["x-seed7/artifact.bin", "--streams", "0"], "1 or more")])
def test_streams_refuses_artifacts_that_it_cannot_tell_apart(paths, message):
    with pytest.raises(streams.Misuse, match=message):
        streams.main([*paths, "--shard", "s.bin", "--tokenizer", "t.model"])
