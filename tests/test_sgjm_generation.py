"""The record SGJM writes: drafts change how fast a text
grows, never the text, nor at a temperature its distribution."""

import copy
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, environment
from family import load_script
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from scipy.stats import chi2
from test_sgjm import HYBRID, RECORD, ROPE, SCRIPT, SMALL, alive, batch, reports, section
from torch import nn

timing, lean = load_script(RECORD / "bench.py"), load_script(RECORD / "lean.py")

READ_ALL = {"DRAFT_PRICE": 0}  # no draft is too dear
BLOCKS = {"BLOCK_SIZE": 4, **READ_ALL}
LETTERS = 5


def write(model, ids, count, speculate=True, temperature=0.0, seed=0, heads=None):
    """(what follows, the Generator)."""
    writer = section.Generator(model, ids, seed, speculate, temperature)
    if heads is not None and speculate:
        writer.heads = heads(writer)
    return writer.write(count), writer


def prompts(count: int, longest: int = 70, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [[1, *rng.integers(4, 20, rng.integers(0, longest)).tolist()] for _ in range(count)]


class Oracle:
    """Heads that know what the text will be, and get each byte wrong now and then."""

    def __init__(self, truth: str, seed: int):
        self.truth, self.rng, self.drafter, self.writer = truth, np.random.default_rng(seed), self, None

    def __call__(self, writer):
        self.writer = writer
        return self

    def draft(self, state, branches, temperature, generator, given, joined=None):
        length = len(self.writer.text)
        future = (self.truth[length:] + "\x04" * 3)[:3]
        ids = np.array([[given.item(), *map(ord, future)]] * branches)
        wrong = self.rng.random((branches, 3)) < 0.3
        ids[:, 1:][wrong] = self.rng.integers(4, 20, wrong.sum())
        logprobs = torch.full((1, branches, 4, 260), -math.log(260))
        latents = torch.from_numpy(self.rng.normal(size=(1, branches, len(state[0])))).float()
        return torch.from_numpy(ids)[None], logprobs, latents

    def judge(self, state):
        return state

    def verdict(self, state, latents):
        return torch.from_numpy(self.rng.normal(size=len(latents))).float()


# Greedy


@pytest.mark.parametrize("overrides", [{}, ROPE, HYBRID], ids=str)
def test_a_loop_of_another_hand_writes_the_same_text(overrides):
    """lean.py's, with arrays of its own in place of the cache: what decoding is timed against."""
    model, seen = alive(seed=1, **BLOCKS, **overrides), set()
    for ids in prompts(12, longest=20):
        text, seconds = lean.by_loop(section, model, ids, 8)
        assert text == lean.by_script(section, model, ids, 8)[0] and seconds > 0
        seen |= {*text}
    assert len(seen) > 12


def test_the_lean_loop_refuses_what_it_cannot_time():
    for arguments, message in ((["--sizes", "26m"], "SIZE='26m'"), (["--count", "0"], "at least 1")):
        with pytest.raises(lean.Misuse, match=message):
            lean.main(arguments)


@pytest.mark.parametrize("overrides", [{}, ROPE, HYBRID], ids=str)
def test_greedy_text_is_that_of_plain_decoding(overrides):
    """100 prompts, many longer than the window; a good drafter and a poor one; ties are none of these."""
    model = alive(**BLOCKS, **overrides)
    passes = [0, 0]
    kinds = dict.fromkeys(section.SpeculationGraph.AFTER, 0)
    for i, ids in enumerate(prompts(100)):
        plain, slow = write(model, ids, 14, speculate=False)
        truth = "".join(map(chr, ids)) + plain
        found, fast = write(model, ids, 14, heads=Oracle(truth, i) if i % 4 else None)
        assert found == plain, (i, min(slow.gaps.values()))
        assert slow.read[0] == 14 and fast.past.length == slow.past.length and fast.start == slow.start
        passes = [passes[0] + 14, passes[1] + int(fast.read[0])]
        kinds = {state: kinds[state] + count for state, count in fast.graph.counts.items()}
    assert passes[0] > 1.3 * passes[1] and all(kinds.values()), (passes, kinds)


def slow_greedy(model, ids, count: int) -> list[int]:
    """A full forward a byte; the window's last half is kept when it is full."""
    ids, start, window = list(ids), 0, model.args.eval_seq_len
    for _ in range(count):
        while len(ids) - start > window:
            start += window - window // 2
        with torch.no_grad():
            x = model.hidden(torch.tensor([ids[start:]]), model.rotary_eval)
            ids.append(int(model.head(x[0, -1]).argmax()))
    return ids[-count:]


@pytest.mark.parametrize("overrides", [{}, {**ROPE, "EVAL_SEQ_LEN": 45}, HYBRID], ids=str)
def test_a_full_window_is_read_again_from_its_middle(overrides):
    model = alive(seed=2, **BLOCKS, **overrides)
    for length in (1, 7, 31, 32, 33, 49, 120):
        ids = prompts(1, seed=length)[0][:1] + batch(1, length, seed=length)[0].tolist()
        wanted = slow_greedy(model, ids, 60)
        truth = "".join(map(chr, ids + wanted))
        for speculate, heads in ((False, None), (True, None), (True, Oracle(truth, length))):
            found, _ = write(model, ids, 60, speculate, heads=heads)
            assert list(map(ord, found)) == wanted, (length, speculate)


@pytest.mark.parametrize("overrides", [
    {"KEEP_TOP_K": 1},
    {"DRAFT_BUDGET": 1},
    {"DRAFT_BRANCHES": 1},
    {"DRAFTER": "suffix"},
    {"DRAFTER": "heads"},
    {"JUDGE_WEIGHT": 0},
    {"DRAFT_PRICE": 1},
    {"DRAFT_PRICE": 5},
    {"BLOCK_SIZE": 1},
    {"MERGE_RADIUS": 0},
    {"MERGE_RADIUS": 64},
], ids=str)
def test_no_setting_of_the_drafts_changes_the_text(overrides, monkeypatch):
    """And each setting has the drafters that it asks for."""
    add, sources = section.SpeculationGraph.add, set()

    def seen(self, parent, start, ids, laws, logs, kinds, *rest):
        sources.update(kind[0] for kind in kinds)
        return add(self, parent, start, ids, laws, logs, kinds, *rest)

    ids = prompts(1, seed=5)[0]
    wanted, _ = write(alive(**BLOCKS), ids, 50, speculate=False)
    monkeypatch.setattr(section.SpeculationGraph, "add", seen)
    found, writer = write(alive(**{**BLOCKS, **overrides}), ids, 50)
    assert found == wanted and writer.graph.counts["created"]
    both = {"suffix"} if overrides == {"BLOCK_SIZE": 1} else {"heads", "suffix"}
    assert sources == {"heads": {"heads"}, "suffix": {"suffix"}}.get(overrides.get("DRAFTER"), both)
    assert (writer.graph.counts["merged"] > 0) or overrides.get("MERGE_RADIUS") != 64


# Trees


@pytest.mark.parametrize("overrides", [{}, ROPE], ids=str)
@torch.no_grad()
def test_a_tree_in_one_pass_is_each_of_its_paths_alone(overrides):
    model, rng = alive(**overrides), np.random.default_rng(0)
    for trial in range(12):
        ids, known = batch(1, 32, seed=trial), int(rng.integers(0, 12))
        read = [section.Place(int(ids[0, known]))]
        while len(read) < 10:
            above = read[rng.integers(len(read)) if trial else -1]
            read.append(section.Place(int(rng.integers(4, 260)), above))
        for row, place in enumerate(read):
            place.row = row
        mask, past = section.tree_mask(read, ids.device), section.KVCache(model)
        assert (mask is None) == (trial == 0)
        if known:
            model.hidden(ids[:, :known], model.rotary_eval, past)
        found = model.hidden(torch.tensor([[place.id for place in read]]), model.rotary_eval, past, mask)[0]
        for last in read:
            path = [last]
            while path[0].above is not None:
                path.insert(0, path[0].above)
            text = torch.tensor([ids[0, :known].tolist() + [place.id for place in path]])
            torch.testing.assert_close(
                found[last.row], model.hidden(text, model.rotary_eval)[0, -1], atol=1e-5, rtol=1e-5
            )
        # the accepted path moves to the front, and decoding goes on as from a fresh read
        past.gather(known, [place.row for place in path])
        assert past.length == text.size(1)
        text = torch.cat((text, ids[:, -3:]), 1)
        again = model.hidden(text[:, -3:], model.rotary_eval, past)
        torch.testing.assert_close(again, model.hidden(text, model.rotary_eval)[:, -3:], atol=1e-5, rtol=1e-5)


def test_drafts_with_a_common_beginning_share_their_places():
    model = alive(**BLOCKS, DRAFT_BUDGET=6, KEEP_TOP_K=3)
    writer = section.Generator(model, [1, 50, 60], 0, False, 0.0)
    writer.rates["heads", 0] = 0.5
    for ids, log in (("abc", -1.0), ("abd", -2.0), ("xyz", -3.0), ("abe", -9.0)):
        writer.graph.add(None, 3, ids, [None] * 3, [log] * 3, [("heads", 0)] * 3)
    read = writer.plan(9)
    assert "".join(chr(place.id) for place in read[1:]) == "abcdxy"  # best first, six bytes
    assert [draft.state for draft in writer.graph.alive] == ["verified", "verified", "pruned", "pruned"]
    # What is not read is put to the test, too
    assert [offer[0] for offer in read[2].offers] == [ord(c) for c in "cde"]
    assert [place.chance for place in read] == [1, 0.5, 0.25, 0.125, 0.125, 0.5, 0.25]
    writer.text = writer.text + "ab"
    writer.graph.settle(writer.text)
    # Still ahead, by their last bytes
    assert [draft.ids for draft in writer.graph.alive] == ["abc", "abd", "abe"]
    assert [offer[0] for offer in writer.plan(9)[0].offers] == [ord(c) for c in "cde"]


# Temperature


def surprise(seen, expected, least: float = 5.0) -> float:
    """p-value of chi-square; cells with few expected counts are taken together."""
    seen, expected = np.ravel(seen).astype(float), np.ravel(expected).astype(float)
    small = expected < least
    seen, expected = (np.append(x[~small], x[small].sum()) for x in (seen, expected))
    used = expected > 0
    assert seen[~used].sum() == 0
    return float(
        chi2.sf(
            (np.square(seen - expected) / np.maximum(expected, 1e-9))[used].sum(), used.sum() - 1
        )
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_choice_has_the_distribution_asked_for_whatever_was_drafted(seed):
    """Siblings drawn without replacement from one law, a
    guess without chance, one more draw from another law."""
    rng = np.random.default_rng(seed)
    p, q, other = rng.dirichlet(np.full(LETTERS, 0.5), 3)
    seen, taken = np.zeros(LETTERS), 0
    for _ in range(8000):
        offers, law = [], q.copy()
        for _ in range(3):
            x = int(rng.choice(LETTERS, p=law))
            offers.append((x, law.copy()))
            law[x] = 0
            law /= law.sum()
        offers.insert(seed % 4, (2, None))
        offers.append((int(rng.choice(LETTERS, p=other)), other))
        y = section.chosen(p, offers, rng)
        seen[y] += 1
        taken += y in [offer[0] for offer in offers]
    assert surprise(seen, 8000 * p) > 1e-3
    assert taken > 8000 * np.minimum(p, q).sum()
    assert section.chosen(np.eye(LETTERS)[3], [(1, q), (0, None), (3, other)], rng) == 3
    assert section.chosen(q, [(4, q)], rng) == 4  # drawn from p itself: always taken


class Chain(nn.Module):
    """A toy backbone that knows the last letter alone."""

    def __init__(self, law: np.ndarray, **overrides):
        super().__init__()
        self.args = section.Hyperparameters(
            {name: str(value) for name, value in {**SMALL, **BLOCKS, **overrides}.items()}
        )
        self.args.vocab_size, self.args.model_dim = len(law), 8
        self.tok_emb, self.blocks, self.rotary_eval, self.dtype = nn.Embedding(1, 1), [], None, torch.float32
        self.law, self.aux = torch.from_numpy(law).float().log(), section.SpeculativeHeads(self.args)
        for p in self.aux.parameters():
            nn.init.normal_(p, 0, 0.6, generator=torch.Generator().manual_seed(p.numel()))

    def hidden(self, ids, rotary, past, mask=None):
        past.advance(ids.size(1))
        return torch.nn.functional.one_hot(ids, 8).float()

    def head(self, x):
        return self.law[x.argmax(-1)]


class Picky:
    """Heads that draw from a law of their own, and a verifier
    that wants to read one letter at one place alone."""

    law = np.array([0.5, 0.2, 0.15, 0.1, 0.05])

    def __init__(self, seed: int):
        self.rng, self.drafter = np.random.default_rng(seed), self

    def draft(self, state, branches, temperature, generator, given, joined=None):
        # Without replacement
        first = (np.log(self.law) + self.rng.gumbel(size=LETTERS)).argsort()[::-1][:branches]
        ids = np.column_stack(
            (
                np.full(branches, given.item()),
                first,
                self.rng.choice(LETTERS, (branches, 2), p=self.law),
            )
        )
        latents = torch.nn.functional.one_hot(torch.from_numpy(ids[:, 2]), 8).float()
        return (
            torch.from_numpy(ids)[None],
            torch.from_numpy(np.log(self.law)).expand(1, branches, 4, -1),
            latents[None],
        )

    def judge(self, state):
        return state

    def verdict(self, state, latents):
        return 50 * (2 * latents[:, 0] - 1)


def transitions(ids, law: np.ndarray, back: int) -> float:
    """p-value of letters given the `back` before them, of a text that should be a chain with this law."""
    seen = np.zeros((LETTERS,) * (back + 1))
    np.add.at(seen, tuple(ids[i : len(ids) - back + i] for i in range(back + 1)), 1)
    expected = seen.sum(-1, keepdims=True) * law
    few = expected < 5
    seen, expected = (np.append(x[~few], x[few].sum()) for x in (seen, expected))
    return float(
        chi2.sf(
            (np.square(seen - expected) / np.maximum(expected, 1e-9)).sum(),
            len(seen) - LETTERS**back,
        )
    )


@pytest.mark.parametrize("overrides", [
    {"DRAFTER": "heads", "KEEP_TOP_K": 1, "DRAFT_BRANCHES": 2},
    {"KEEP_TOP_K": 1, "DRAFT_BRANCHES": 2},
    {"MERGE_RADIUS": 64},
    {"DRAFTER": "suffix", "DRAFT_BUDGET": 4},
], ids=str)
def test_a_toy_text_has_the_distribution_of_its_chain(overrides):
    """What the graph likes to read must not come more often: it does (p < 1e-6) where
    drafts that were not read are forgotten, or put to the test after newer ones."""
    law = np.random.default_rng(1).dirichlet(np.full(LETTERS, 3), LETTERS)
    text, writer = write(
        Chain(law, **overrides), [0], 10_000, temperature=1.0, seed=3, heads=lambda writer: Picky(0)
    )
    ids, counts = np.array([0, *map(ord, text)]), writer.graph.counts
    assert min(transitions(ids, law, 1), transitions(ids, law, 2)) > 1e-3
    assert writer.read[0] < 10_000 / 1.2 and counts["pruned"] + counts["merged"] > 500
    assert counts["created"] == counts["committed"] + counts["expired"] + len(writer.graph.alive)


@pytest.mark.parametrize("price", [1.2, 2.0])
def test_a_pass_that_reads_no_draft_forgets_none(price):
    """Where drafts do not pay, they wait to be put to the test: forgotten, they would give p < 1e-5."""
    law = np.random.default_rng(1).dirichlet(np.full(LETTERS, 3), LETTERS)
    model = Chain(law, DRAFTER="heads", KEEP_TOP_K=1, DRAFT_BRANCHES=2, DRAFT_PRICE=price)
    writer = section.Generator(model, [0], 3, True, 1.0)
    writer.heads, writer.cost = Picky(0), -1e9  # they draft in every pass
    ids = np.array([0, *map(ord, writer.write(12_000))])
    assert min(transitions(ids, law, 1), transitions(ids, law, 2)) > 1e-3
    assert writer.graph.counts["created"] > 10_000 and 100 < writer.read[1] < 0.9 * writer.read[0]


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_nucleus_is_the_fewest_ids_of_a_share(share):
    p = np.random.default_rng(2).dirichlet(np.full(9, 0.5)) * 7  # of any sum
    kept, law = section.nucleus(p, share), np.sort(p)[::-1] / p.sum()
    count = int(np.searchsorted(law.cumsum(), share)) + 1
    assert (kept > 0).sum() == count and kept.max() == p.max() and ((kept == p) | (kept == 0)).all()
    assert section.nucleus(np.array([0.0, 3.0]), 0.1).tolist() == [0, 3]


@pytest.mark.parametrize("drafter", ["heads", "suffix", "both"])
def test_a_toy_text_has_the_likeliest_part_of_its_chain(drafter):
    """Top-p under drafts that know nothing of it: its law, and no id outside, as without drafts."""
    law = np.random.default_rng(1).dirichlet(np.full(LETTERS, 1), LETTERS)
    part = np.stack([section.nucleus(row, 0.8) for row in law])
    part /= part.sum(1, keepdims=True)
    assert (part == 0).sum() >= LETTERS
    for speculate in (True, False):
        writer = section.Generator(Chain(law, DRAFTER=drafter), [0], 3, speculate, 1.0, 0.8)
        if writer.heads is not None:
            writer.heads = Picky(0)
        ids = np.array([0, *map(ord, writer.write(4000))])
        assert transitions(ids, part, 1) > 1e-3 and part[ids[:-1], ids[1:]].all()
        assert writer.read[0] < 4000 / 1.1 if speculate else writer.read[0] == 4000


def test_drafts_of_real_heads_keep_a_chain():
    law = np.random.default_rng(1).dirichlet(np.full(LETTERS, 0.6), LETTERS)
    text, writer = write(Chain(law), [0], 1500, temperature=0.8, seed=3)
    law = law ** (1 / 0.8)
    ids = np.array([0, *map(ord, text)])
    assert min(transitions(ids, law / law.sum(1, keepdims=True), back) for back in (1, 2)) > 1e-3
    assert writer.read[0] < 1500 / 1.1


def test_siblings_have_the_laws_that_they_were_drawn_with():
    model = alive(**BLOCKS, DRAFT_BRANCHES=3, DRAFTER="heads")
    writer = section.Generator(model, [1, 50, 60], 0, True, 0.7)
    with torch.no_grad():
        writer.catch_up()
        writer.draft(3)
        slots = model.aux.drafter.slots(writer.state, torch.tensor([[60]]))
        law = (model.aux.drafter.head(slots[0, -1]) / 0.7).double().softmax(-1).numpy()
    elder = []
    for draft in writer.graph.alive:
        np.testing.assert_allclose(draft.laws[0], law / law.sum(), atol=1e-6)
        first = ord(draft.ids[0])
        assert draft.logs[0] == pytest.approx(math.log(law[first]), abs=1e-4)
        law[first] = 0
        elder.append(first)
        assert all(part.sum() == pytest.approx(1, abs=1e-9) for part in draft.laws)
    assert len(set(elder)) == 3


class Near:
    """Heads that are the backbone itself at twice the temperature."""

    def __init__(self, writer):
        self.writer, self.drafter, self.noise = writer, self, torch.Generator().manual_seed(0)

    def draft(self, state, branches, temperature, generator, given, joined=None):
        model = self.writer.model
        ids, found = torch.tensor([list(map(ord, self.writer.text))]), []
        for i in range(3):
            law = model.head(model.hidden(ids, model.rotary_eval)[:, -1]).div(2 * temperature).log_softmax(-1)
            keys = law - torch.empty_like(law).exponential_(generator=self.noise).log()
            chosen = keys.topk(branches if i == 0 else 1).indices.view(-1, 1)
            ids, found = (
                x.repeat_interleave(branches, 0) if i == 0 else x
                for x in (ids, torch.stack([*found, law], 1))
            )
            ids, found = torch.cat((ids, chosen), 1), list(found.unbind(1))
        laws = torch.stack([found[0], *found], 1)
        return ids[None, :, -4:], laws[None], torch.randn(1, branches, state.size(1), generator=self.noise)

    def judge(self, state):
        return state

    def verdict(self, state, latents):
        return 3 * latents[:, 0]


def test_blocks_of_a_real_model_come_as_often_as_they_should():
    """Three bytes after a prompt: each likely block by its exact probability."""
    model, heat, tries = alive(seed=1, **BLOCKS, KEEP_TOP_K=2, DRAFT_BRANCHES=3), 0.6, 1200
    ids = [1, *b"abcabdabcab"]
    writer = section.Generator(model, ids, 0, True, heat)
    writer.heads, prompt = Near(writer), writer.text
    with torch.no_grad():
        writer.catch_up()
    state, seen = writer.state, {}
    for _ in range(tries):
        writer.text, writer.state, writer.graph.alive = prompt, state, []
        writer.past.rewind(len(ids) - 1)
        block = writer.write(3)
        seen[block] = seen.get(block, 0) + 1

    blocks = {"": 1.0}
    for _ in range(3):
        with torch.no_grad():
            texts = torch.tensor([list(map(ord, prompt + block)) for block in blocks])
            laws = (model.head(model.hidden(texts, model.rotary_eval)[:, -1]) / heat).double().softmax(-1)
        best = laws.topk(6)
        blocks = {
            block + chr(i): p * chance
            for (block, p), row, chances in zip(
                blocks.items(), best.indices.tolist(), best.values.tolist()
            )
            for i, chance in zip(row, chances)
        }
    counts = [seen.get(block, 0) for block in blocks]
    expected = [tries * p for p in blocks.values()]
    assert surprise([*counts, tries - sum(counts)], [*expected, tries - sum(expected)]) > 1e-3
    assert 3 * tries > 1.5 * writer.read[0] and writer.taken[1] > 0.2 * writer.read[1]


# The graph

operations = st.lists(
    st.tuples(st.sampled_from(["add", "pass"]), st.integers(0, 2**31), st.integers(1, 3)),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(operations, st.integers(0, 64), st.integers(1, 4))
def test_the_graph_has_no_cycle_and_loses_no_context(steps, radius, keep):
    """Random drafts, passes and texts; two letters, so that much agrees and signatures are close."""
    graph, text, made, alias = section.SpeculationGraph(4, keep, radius), "aa", [], {}
    for kind, seed, size in steps:
        rng = np.random.default_rng(seed)
        if kind == "add":
            ahead = [draft for draft in graph.alive if draft.end > len(text)]
            parent = ahead[rng.integers(len(ahead))] if ahead and rng.random() < 0.5 else None
            ids = "".join(rng.choice(["a", "b"], size))
            bits = None if rng.random() < 0.2 else int(rng.choice([0, 3, 2**63, 2**64 - 1]))
            start = len(text) if parent is None else parent.end
            draft = graph.add(
                parent, start, ids, [None] * size, rng.normal(size=size).tolist(),
                [("heads", 0)] * size, 0.0, bits,
            )
            made.append((draft, (text if parent is None else parent.through(text)) + ids))
            continue
        kept = graph.choose(len(text))
        assert sum(draft.start >= len(text) for draft in kept) <= keep
        assert kept == sorted(kept, key=lambda draft: -draft.score)
        assert all(draft.state == "scored" for draft in kept)
        for draft in graph.alive:
            other = draft.alias
            assert (draft.state == "merged") == (other is not None)
            assert (draft in kept) == (draft.state == "scored")
            if other is not None:  # a pointer: to one as long, kept, no worse, alike
                assert other in kept and other.end == draft.end and other.score >= draft.score
                assert (other.bits ^ draft.bits).bit_count() <= radius
        for i, draft in enumerate(kept):
            assert all(draft.end != other.end or None in (draft.bits, other.bits)
                       or (draft.bits ^ other.bits).bit_count() > radius for other in kept[:i])
            graph.move(draft, "verified" if rng.random() < 0.7 else "pruned")
        text += "".join(rng.choice(["a", "b"], size))
        graph.settle(text)
        alias = {draft: draft.alias for draft, _ in made if draft.alias is not None}
        for draft, whole in made:
            assert (draft.state == "committed") == text.startswith(whole)
            assert draft.state == "committed" or (draft in graph.alive) == (whole.startswith(text))
            assert draft not in graph.alive or draft.through(text) == whole  # its prefix, whatever merged
    for draft, whole in made:  # along edges prefixes grow, along pointers they stay: no way leads back
        assert draft.end == draft.start + len(draft.ids) == len(whole)
        assert draft.parent is None or draft.parent.end == draft.start < draft.end
        assert (
            draft not in alias
            or alias[draft].end == draft.end
            and alias[draft] not in (draft, alias.get(alias[draft]))
        )
    counts = graph.counts
    assert counts["created"] == len(made) == counts["committed"] + counts["expired"] + len(graph.alive)
    assert counts["scored"] == counts["verified"] + counts["pruned"] + counts["merged"]
    for draft, _ in made:
        for state in set(graph.AFTER) - set(graph.AFTER[draft.state]):
            with pytest.raises(AssertionError):
                graph.move(draft, state)
        break


def test_signatures_are_signs_of_products_with_gaussian_planes():
    graph = section.SpeculationGraph(16, 4, 4)
    latents = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    found = graph.signatures(latents)
    assert found == section.SpeculationGraph(16, 1, 0).signatures(latents) and len(set(found)) == 50
    for latent, bits in zip(latents, found):
        signs = [float(latent @ plane) >= 0 for plane in graph.planes.T]
        assert bits == int("".join("01"[sign] for sign in signs), 2)
    assert (found[0] ^ graph.signatures(-latents[:1])[0]) == 2**64 - 1
    near = graph.signatures(latents + 0.02 * torch.randn(50, 16, generator=torch.Generator().manual_seed(1)))
    apart = [(a ^ b).bit_count() for a, b in zip(found, near)]
    angles = torch.arccos(torch.cosine_similarity(latents[:1], latents[1:])).numpy() * 64 / math.pi
    assert np.mean(apart) < 3
    assert np.corrcoef(angles, [(found[0] ^ b).bit_count() for b in found[1:]])[0, 1] > 0.7


# Prompt lookup


@given(st.text(alphabet="ab\x05", max_size=60), st.integers(1, 20))
def test_lookup_finds_the_longest_end_and_its_latest_place(text, limit):
    lengths = [n for n in range(3, 33) if n < len(text) and text[-n:] in text[:-1]]
    length, after = section.repeated(text, limit)
    assert length == max(lengths, default=0)
    if not lengths:
        assert after == ""
        return
    place = max(i for i in range(len(text) - length) if text[i : i + length] == text[-length:])
    whole = text
    for i in range(limit):  # as if the text were written on: it may go round
        whole += whole[place + length + i]
    assert after == whole[len(text) :]


def test_lookup_writes_a_loop_in_few_passes():
    class Cycle(Chain):
        def __init__(self):
            super().__init__(
                np.roll(np.eye(LETTERS) * 0.96 + 0.008, 1, 1),
                **ROPE,
                EVAL_SEQ_LEN=300,
                DRAFTER="suffix",
            )

    text, writer = write(Cycle(), [0, 1, 2, 3, 4, 0, 1, 2], 170)
    assert text == ("\x03\x04\x00\x01\x02" * 34) and writer.read[0] <= 12
    assert timing.looping(text) == 1.0 and timing.looping(text[:7] + "abcdefgh" + text[:7]) == 0.0
    assert timing.looping("".join(map(chr, range(52))) * 4) == 1.0
    assert timing.looping("a" * 8) == 0.0 and timing.looping("xyz" + "a" * 9 + "uvw") == pytest.approx(0.6)


# What does not pay


def test_heads_pause_ever_longer_when_nothing_of_theirs_is_taken():
    model = alive(BLOCK_SIZE=4, DRAFTER="heads", **ROPE, EVAL_SEQ_LEN=600)
    model.args.draft_price = 0.25 / section.drafting_cost(model)
    drafted, draft = [], model.aux.drafter.draft
    model.aux.drafter.draft = lambda *args: drafted.append(int(writer.read[0])) or draft(*args)
    writer = section.Generator(model, [1, 70], 0, True, 0.0)
    text = writer.write(1000)
    tried = np.diff(drafted)  # what the heads are worth falls by a fifth a draft, from 1
    assert writer.read[0] > 980 and len(drafted) <= 11 and (tried[:3] == 1).all()
    assert tried[-3] == 128 and tried[-1] == 2 * tried[-2] == 4 * tried[-3]

    model.aux.drafter.draft = draft
    oracle = Oracle("\x01" + "F" + text, 0)
    # Never wrong
    oracle.rng = SimpleNamespace(
        random=np.ones, integers=lambda *_: [], normal=np.random.default_rng(0).normal
    )
    _, writer = write(model, [1, 70], 120, heads=oracle)
    assert writer.worth > 2 and writer.read[0] < 50


def test_drafts_that_do_not_pay_are_not_read():
    """The first drafted byte of a pass has the price of three: its chance has to be as much."""
    model, ids = alive(BLOCK_SIZE=1, DRAFTER="suffix", **ROPE), [1, *[70, 71, 72, 73] * 3]
    for rate, reads in ((0.0, False), (0.2, False), (0.3, True)):
        writer = section.Generator(model, ids, 0, True, 0.0)
        writer.rates = dict.fromkeys(writer.rates, rate)
        writer.catch_up()
        read = writer.plan(30)
        assert (len(read) > 1) == reads and read[0].offers


def test_a_draft_costs_what_it_reads_and_calls():
    """Of SIZE=25m it says 0.48 plain steps; timed on a CPU were 0.34 in fp32 and 0.44 in bf16."""
    with torch.device("meta"):
        model = section.GPT(section.Hyperparameters({"SIZE": "25m"}))
    weights = {name: sum(p.numel() for p in part.parameters()) for name, part in (
        ("all", model), ("heads", model.aux), ("drafter", model.aux.drafter))}
    drafts = 4 * weights["drafter"] + weights["heads"] - weights["drafter"] + 1e6 * (4 * 2 + 2)
    cost = section.drafting_cost(model)
    assert cost == drafts / (weights["all"] - weights["heads"] + 10e6) and 0.45 < cost < 0.5
    small = alive(BLOCK_SIZE=4, DRAFTER="heads", DRAFT_PRICE=0.5)
    assert section.Generator(small, [1, 5], 0, True, 0.0).cost == section.drafting_cost(small) / 2


@pytest.mark.parametrize("overrides", [{}, HYBRID], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_text_reads_the_weights_as_they_are(overrides, dtype):
    """A text keeps them joined and cast; the next one sees what changed, and how ever it did."""
    model, ids = alive(**overrides), prompts(1, seed=3)[0]
    model.dtype = dtype
    layers = [layer for layer in model.blocks.modules() if isinstance(layer, section.CastedLinear)]
    texts = [write(model, ids, 20)[0]]
    for layer in layers[1:]:  # none of them the first of a product
        layer.weight.data.neg_()
    texts.append(write(model, ids, 20)[0])
    for layer in layers:
        layer.weight.data = torch.randn_like(layer.weight) / 8
    texts.append(write(model, ids, 20)[0])
    fresh = alive(**overrides)
    fresh.dtype = dtype
    fresh.load_state_dict(model.state_dict())
    assert len({*texts}) == 3 and texts[-1] == write(fresh, ids, 20)[0]
    assert not any(p.grad_fn for p in model.parameters()) and copy.deepcopy(model)


def test_training_compiles_whole_and_sees_new_weights():
    """The drafter drafts in training, too, from a cache of its slots."""
    model, ids = alive(BLOCK_SIZE=4).train(), batch()
    inputs = model.aux.inputs(0, ids.device)

    def once(ids: torch.Tensor) -> dict:
        return model.losses(ids, torch.ones(len(ids)), inputs)

    compiled = torch.compile(once, backend="eager", fullgraph=True)
    for _ in range(2):
        eager, found = once(ids), compiled(ids)
        assert {name: float(x.detach()) for name, x in eager.items()} == pytest.approx(
            {name: float(x.detach()) for name, x in found.items()}, rel=1e-5)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.7)


@pytest.mark.parametrize("overrides", [{}, {"DRAFTER": "heads"}, HYBRID], ids=str)
def test_no_clock_decides_what_is_drafted(monkeypatch, overrides):
    """A text at a temperature depends on what was drafted. The same seed writes the same bytes in the same
    passes on any machine, however busy: here the script has no clock.
    """
    model = alive(BLOCK_SIZE=4, **overrides)
    monkeypatch.setattr(section, "time", None)
    for seed in range(3):
        found = []
        for _ in range(2):
            text, writer = write(model, [1, 70, 71, 70, 71], 60, temperature=1.0, seed=seed)
            found.append((text, writer.read.tolist(), writer.graph.counts))
        assert found[0] == found[1] and writer.graph.counts["created"]


# The command


def saved(folder, name: str, heads: int = 1, **overrides):
    """An artifact (or a checkpoint) of a random model."""
    args = section.Hyperparameters(
        {
            key: str(value)
            for key, value in {
                **SMALL, **BLOCKS, "INIT_STD": 0.15, "EXPORT_HEADS": heads, "RUNS_PATH": folder,
                "RUN_ID": "made", **overrides,
            }.items()
        }
    )
    if name == "checkpoint":
        trainer = section.Trainer(args, None, section.Runtime(args), section.Log(None))
        trainer.save("final")
        return folder / "made" / "final.safetensors"
    model = section.GPT(args)
    model.init_weights(0)
    path = folder / f"{name}.bin"
    path.write_bytes(section.pack({key: p.detach().numpy() for key, p in model.exported().items()}, args))
    return path


# The bench


@pytest.fixture
def bench(monkeypatch, capfd, tmp_path):
    """bench(argument, ..., VAR=value, ...) -> (exit code, what was printed, bench.json or None)."""
    monkeypatch.setattr(timing, "beside", lambda name: section)
    monkeypatch.setattr(section.fcntl, "flock", lambda *_: None)  # held while the process lives

    def bench(*arguments, **variables):
        given = {"DEVICE": "cpu", "RUNS_PATH": tmp_path / "runs", "RUN_ID": "test"}
        given = {name: str(value) for name, value in (given | variables).items()}
        monkeypatch.setattr(timing.os, "environ", given)
        code, out = timing.main([str(argument) for argument in arguments]), capfd.readouterr()
        path = tmp_path / "runs" / "test" / "bench.json"
        found = json.loads(path.read_text(), parse_constant=pytest.fail) if path.exists() else None
        return code, out.out + out.err, found

    return bench


def test_the_old_ways_to_write_and_to_measure_say_what_took_their_place():
    for variables, words in (({"GENERATE": "so it goes"}, "scripts/generate.py"),
                             ({"GENERATE_BENCH": "1"}, "bench.py")):
        with pytest.raises(section.UserError, match=words):
            section.Hyperparameters(variables)
    off = {"GENERATE": "", "GENERATE_BENCH": "0", "MAX_NEW_TOKENS": "5", "TEMPERATURE": "1", "SPECULATE": "0"}
    assert section.Hyperparameters(off).warnings == []


def test_without_heads_drafts_come_from_the_text_or_are_refused(bench, tmp_path):
    """DRAFTER=heads is no wish that a suffix can fulfil; what `both` leaves out is said."""
    for name, overrides, why in (
        ("stripped", {"heads": 0}, "no heads in it"),
        ("short", {"BLOCK_SIZE": 1}, "BLOCK_SIZE=1 drafts nothing"),
    ):
        path = saved(tmp_path, name, VOCAB_SIZE=256, **overrides)
        given = path, "abcabcabc", "--max-new-tokens", 30, "--repeats", 1
        code, out, found = bench(*given)
        assert code == 0 and found["greedy"]["prompt"]["speculation"]["drafts"]["created"] > 0
        assert out.count(why) == out.count("drafts only by prompt lookup") == 1
        code, out, _ = bench(*given, DRAFTER="heads")
        assert code == 2 and why in out and "DRAFTER=suffix drafts without" in out
        code, out, _ = bench(*given, DRAFTER="suffix")
        assert code == 0 and why not in out
    writer = section.Generator(alive(BLOCK_SIZE=1, DRAFTER="heads"), [1, 7, 7, 7, 7], 0, True, 0.0)
    writer.write(12)
    assert writer.read[0] == 12 and writer.graph.counts["created"] == 0


def test_mistakes_are_named(bench, tmp_path):
    path = saved(tmp_path, "plain", VOCAB_SIZE=256)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "none.json").write_text("{}")
    for prompt, message in (("empty.txt", "1 prompts, or an empty one"), ("none.json", "0 prompts")):
        code, output, _ = bench(path, tmp_path / prompt)
        assert code == 2 and message in output
    for arguments, variables, message in (
        (["nothing.bin"], {}, "ARTIFACT=nothing.bin: No such file"),
        ([path, "--repeats", 0], {}, "--max-new-tokens and --repeats: at least 1; --temperature: above 0"),
        ([path], {"DRAFTER": "both2"}, "heads | suffix | both"),
    ):
        code, output, _ = bench(*arguments, **variables)
        assert code == 2 and message in output


def test_the_bench_starts_beside_a_script(tmp_path):
    path = saved(tmp_path, "artifact")
    env = {key: value for key, value in environment().items() if key not in TINY}
    env |= {"RUNS_PATH": str(tmp_path), "RUN_ID": "test", "DEVICE": "cpu"}
    line = [sys.executable, RECORD / "bench.py", path, "x", "--max-new-tokens", "3", "--repeats", "1"]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "bench sampled prompt ar:" in done.stdout, done.stderr
    found = json.loads((tmp_path / "test" / "bench.json").read_text())
    assert found["settings"]["MAX_NEW_TOKENS"] == 3 and found["settings"]["BENCH_REPEATS"] == 1
    assert found["script_sha256"] == section.sha256_file(SCRIPT)


def test_the_bench_measures_both_ways_in_turn(bench, tmp_path, monkeypatch):
    path, order, write_ = saved(tmp_path, "artifact"), [], section.Generator.write
    monkeypatch.setattr(
        section.Generator,
        "write",
        lambda self, n: order.append(bool(self.heads)) or write_(self, n),
    )
    code, out, found = bench(path, "--max-new-tokens", 12, "--repeats", 2)
    assert code == 0 and order == [False, True] * (1 + 2 * 4 * 2) and "bench greedy prose ar:" in out, out
    folder = tmp_path / "runs" / "test"
    assert "bench sampled random ar:" in (folder / "log.txt").read_text()
    assert found["summary"].keys() == {"greedy", "sampled"}
    assert found["summary"]["greedy"]["mismatches"] == found["summary"]["greedy"]["near_ties"] == 0
    assert found["heads"]
    assert found["threads"] >= 1
    assert found["settings"]["DRAFT_BRANCHES"] == 4
    assert found["dtype"] == "torch.float32"
    for kind in ("greedy", "sampled"):
        assert found[kind].keys() == {"prose", "code", "repetitive", "random"}
        ratios = [result["ratio"] for result in found[kind].values()]
        assert found["summary"][kind]["ratio"] == pytest.approx(np.exp(np.mean(np.log(ratios))))
        for result in found[kind].values():
            plain, fast = result["ar"], result["speculation"]
            assert result["ratio"] == pytest.approx(fast["bytes_per_second"] / plain["bytes_per_second"])
            assert plain["bytes_per_pass"] == 1 <= fast["bytes_per_pass"]
            assert plain["drafts"]["created"] == 0 < fast["drafts"]["created"]
            for part in (plain, fast):
                assert 0 < part["drafting"] < 1 and 0 <= part["looping"] <= 1
                assert all(0 <= share <= 1 for share in part["acceptance"])
            assert not plain["acceptance"]
        assert any(result["speculation"]["acceptance"] for result in found[kind].values())
    result = found["greedy"]["prose"]
    rows = {row[0]: row for row in reports.generation(folder / "bench.json")["rows"]}
    told = [f"**{result['ratio']:.2f}**", f"{result['speculation']['bytes_per_pass']:.2f}"]
    assert rows["prose, greedy"][3:5] == told
    rows = {row[0]: row[1:] for row in reports.kinds(folder / "bench.json")["rows"]}
    ratios = [result["ratio"] for result in found["sampled"].values()]
    assert rows["all, T = 1"][0] == "4" and rows["prose, T = 1"][2] == ""
    assert rows["all, T = 1"][1] == f"**{np.exp(np.mean(np.log(ratios))):.2f}**"
    assert rows["all, T = 1"][3] == f"{min(ratios):.2f}" and " to " in rows["all, T = 1"][2]
    kinds = timing.read_prompts("")
    assert all(len(text) == 256 for text in kinds.values())
    assert kinds["prose"].isascii()
    assert b"assert " in kinds["code"]


@pytest.mark.parametrize("place, message", [
    ("odd.json", "Expecting|delimiter"), ("list.json", "one object"), ("empty.txt", "or an empty one"),
    ("promts/none.txt", "no such file"), ("folder", "0 prompts")])
def test_prompts_that_are_not_there_or_empty_are_refused(tmp_path, place, message):
    (tmp_path / "odd.json").write_text("[1, 2")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=message):
        timing.read_prompts(str(tmp_path / place))


def test_prompts_of_one_name_are_both_read(tmp_path):
    for name in ("a.txt", "a.md", "b.txt"):
        (tmp_path / name).write_text(name)
    assert timing.read_prompts(str(tmp_path)) == {"a.txt": b"a.txt", "a.md": b"a.md", "b": b"b.txt"}
    assert timing.read_prompts("e.g. this") == {"prompt": b"e.g. this"}


def test_the_bench_refuses_a_script_and_a_checkpoint_of_others(bench, tmp_path):
    path = tmp_path / "last.safetensors"
    save_file({"model.x": np.zeros(2, np.float32)}, path, {"golf": '{"config": {"VOCAB_SIZE": 8192}}'})
    code, printed, _ = bench(path, "x")
    assert code == 2 and "a checkpoint of another script" in printed
    with pytest.raises(SystemExit):
        timing.main([str(path), "--script", "nope.py"])


def test_the_bench_takes_folders_and_json_and_tells_a_wrong_text(bench, tmp_path, monkeypatch):
    path, folder = saved(tmp_path, "artifact", VOCAB_SIZE=256), tmp_path / "prompts"
    (folder / "inner").mkdir(parents=True)
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text(name)
    (tmp_path / "prompts.json").write_text('{"three": "3 3 3 3"}')
    short = "--max-new-tokens", 6, "--repeats", 1
    for where, names in (
        (folder, {"one", "two"}),
        (tmp_path / "prompts.json", {"three"}),
        ("x", {"prompt"}),
    ):
        code, _, report = bench(path, where, *short)
        assert code == 0 and report["greedy"].keys() == report["sampled"].keys() == names
    walk = section.Generator.walk

    def wrong(self, place, logits):
        path = walk(self, place, logits)
        self.text = self.text[:-1] + "~" * (self.heads is not None) + self.text[-1] * (self.heads is None)
        return path
    monkeypatch.setattr(section.Generator, "walk", wrong)
    code, _, report = bench(path, folder, *short)
    assert code == 1 and report["summary"]["greedy"]["mismatches"] == 2
    assert report["greedy"]["one"]["near_ties"] == 0
    monkeypatch.setattr(timing, "NEAR_TIES", {"": math.inf})
    code, _, report = bench(path, folder, *short)
    assert code == 0 and report["summary"]["greedy"]["near_ties"] == 2
    monkeypatch.undo()
    code, _, report = bench(path, folder, *short, "--temperature", 0.5, DTYPE="bf16")
    assert code == 0 and report["dtype"] == "torch.bfloat16" and report["settings"]["TEMPERATURE"] == 0.5
