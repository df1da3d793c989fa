"""The record SGJM: which file is which model, the gate's
conditions, its figures against slow loops, whole runs of it."""

import copy
import json
import math

import numpy as np
import pytest
import test_sgjm
import torch
from family import load_script
from test_sgjm import RECORD, reports, section

tool = load_script(RECORD / "gate.py")
timing = load_script(RECORD / "bench.py")

SMALL = {"BLOCK_SIZE": 3, "EVAL_STRIDE": 16}  # beside those of the record's own tests
# As many parameters as backbone and heads have, to a hundredth.
BASELINE = {"ARCH": "baseline", "BASELINE_LAYERS": 3, "FF_DIM": 54}


def settings(**overrides):
    return test_sgjm.settings(**{**SMALL, **overrides})


def alive(seed: int = 0, **overrides):
    return test_sgjm.alive(seed, **{**SMALL, **overrides})


def checkpoint(folder, name: str, steps: int = 3, saved: str = "final", **overrides) -> str:
    """The path of a checkpoint after a few steps on made-up ids."""
    args = settings(RUNS_PATH=folder, RUN_ID=name, **overrides)
    trainer = section.Trainer(args, None, section.Runtime(args), section.Log(None))
    for step in range(steps):
        ids = torch.randint(4, 260, (1, 4, 33), generator=torch.Generator().manual_seed(step))
        trainer.train_step(ids, torch.ones(1, 4), 0.0)
        trainer.step = step + 1
    trainer.save(saved)
    return str(folder / name / f"{saved}.safetensors")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Checkpoints of SGJM and a matched baseline."""
    folder = tmp_path_factory.mktemp("pair")
    return checkpoint(folder, "sgjm"), checkpoint(folder, "plain", **BASELINE)


# Which file is which model


def text(count: int = 90) -> np.ndarray:
    return torch.randint(4, 260, (count,), generator=torch.Generator().manual_seed(5)).numpy()


@pytest.mark.parametrize(
    "overrides",
    [{}, {"ATTN_EVERY_N": 2, "MAMBA_HEAD_DIM": 16, "MAMBA_STATE": 8}, BASELINE],
    ids=str,
)
def test_a_checkpoint_opens_as_its_average(tmp_path, overrides):
    args = settings(RUNS_PATH=tmp_path, RUN_ID="a", **overrides)
    trainer = section.Trainer(args, None, section.Runtime(args), section.Log(None))
    trainer.train_step(torch.from_numpy(text(132)).view(1, 4, 33), torch.ones(1, 4), 0.0)
    trainer.save("last")
    model = section.load(tmp_path / "a" / "last.safetensors")
    assert (model.aux is None) == ("ARCH" in overrides) and not model.training
    assert model.args.shipped() == args.shipped()
    raw = section.score(trainer.model, text())[0]
    trainer.ema.apply()
    wanted = section.score(trainer.model, text())[0]
    assert np.array_equal(section.score(model, text())[0], wanted)
    assert not np.array_equal(raw, wanted)
    # What an artifact holds is the same model, rounded.
    tensors = {name: p.detach().numpy() for name, p in model.named_parameters()}
    packed = settings(EXPORT_HEADS=int(model.aux is not None), **overrides)
    (tmp_path / "a.bin").write_bytes(section.pack(tensors, packed))
    again = section.load(
        str(tmp_path / "a.bin"),
        "cpu",
        section.settings_of(tmp_path / "a.bin", {"EVAL_BATCH_TOKENS": "64"}),
    )
    assert again.args.eval_batch_tokens == 64 and (again.aux is None) == (model.aux is None)
    np.testing.assert_allclose(section.score(again, text())[0], wanted, atol=0.05)


def test_files_that_are_no_models_are_refused_by_name(tmp_path):
    path = checkpoint(tmp_path, "a")
    meta, state = section.read_checkpoint(path, "RESUME")
    for key, value, words in (
        ("model.norm.weight", torch.ones(3), "its tensors do not fit its config"),
        ("ema.blocks.0.attn.c_q.weight", None, "its tensors do not fit its config"),
    ):
        odd = (
            {**state, key: value}
            if value is not None
            else {name: part for name, part in state.items() if name != key}
        )
        odd = {name: part for name, part in odd.items() if value is None or not name.startswith("ema.")}
        (tmp_path / "odd.safetensors").write_bytes(section.safetensors_bytes(odd, {"golf": json.dumps(meta)}))
        with pytest.raises(section.UserError, match=words):
            section.load(tmp_path / "odd.safetensors")
    (tmp_path / "bare.safetensors").write_bytes(section.safetensors_bytes({"x": torch.ones(1)}))
    (tmp_path / "torn.safetensors").write_bytes(b"123")
    (tmp_path / "a.bin").write_bytes(b"123")
    for name, words in (
        ("bare.safetensors", "SGJM=.*not a checkpoint of this script"),
        ("torn.safetensors", "not a checkpoint"),
        ("none.safetensors", "not a checkpoint"),
        ("a.bin", "not an artifact"),
        ("none.bin", "SGJM=.*No such file"),
    ):
        with pytest.raises(section.UserError, match=words):
            section.settings_of(str(tmp_path / name), {}, "SGJM")
    with pytest.raises(section.UserError, match="SGJM=FILE is not set"):
        section.settings_of("", {}, "SGJM")


# Conditions


PUBLISHED = {
    "sgjm": {
        "branch_acceptance_rate": 0.9,
        "jepa_top1_acc": 0.5,
        "jepa_chance_top1": 1 / 9,
        "merge_precision_advantage": 2.0,
    },
    "nll_delta": 0.01,
    "compute_advantage": 2.0,
}
FAST = {"ratio": 1.2, "interval": [1.1, 1.3], "used": 6, "prompts": 6}
HONEST = {
    "val_bpb_delta": 0.001, "bytes_per_pass": 2.0, "jepa_top1_hard": 0.5, "jepa_chance_hard": 1 / 9,
    "intervals": {"val_bpb_delta": [0, 0.002], "bytes_per_pass": [1.9, 2.1], "jepa_top1_hard": [0.4, 0.6]},
    "merge": {"merged_pairs": 100, "advantage": 2.5, "interval": [2.0, 3.0]},
    "control": {"interval": [0.9, 1.1]},
    "speed_up": {"greedy": FAST, "sampled": copy.deepcopy(FAST)},
}


OURS = {"params": 1000, "steps": 100, "best": False}


def judged(path: str = "", value=None) -> dict[str, dict[str, dict]]:
    """{kind: {name: condition}} with one figure changed: `honest.merge.interval.0`."""
    found = {
        "published": copy.deepcopy(PUBLISHED),
        "honest": copy.deepcopy(HONEST),
        "ours": OURS,
        "theirs": {**OURS},
    }
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = found
    for part in way:
        place = place[part]
    if path:
        place[last] = value
    return {
        kind: {each["name"]: each for each in asked}
        for kind, asked in tool.conditions(**found).items()
    }


@pytest.mark.parametrize("path,good,bad,name", [
    ("published.nll_delta", 0.05, 0.0501, "nll_delta"),
    ("published.sgjm.branch_acceptance_rate", 0.5, 0.4999, "branch_acceptance_rate"),
    ("published.sgjm.jepa_top1_acc", 0.1612, 1 / 9 + 0.05, "jepa_top1_acc"),
    ("published.sgjm.merge_precision_advantage", 1.5, 1.4999, "merge_precision_advantage"),
    ("published.compute_advantage", 1.0, 0.9999, "compute_advantage"),
    ("honest.intervals.val_bpb_delta.1", 0.01, 0.0101, "val_bpb_delta"),
    ("theirs.steps", 102, 103, "val_bpb_delta"),
    ("theirs.params", 981, 980, "val_bpb_delta"),
    ("theirs.params", 1020, 1030, "val_bpb_delta"),
    ("theirs.steps", 99, None, "val_bpb_delta"),
    ("theirs.best", False, True, "val_bpb_delta"),
    ("honest.intervals.bytes_per_pass.0", 1.5, 1.4999, "bytes_per_pass"),
    ("honest.intervals.jepa_top1_hard.0", 0.1612, 1 / 9 + 0.05, "jepa_top1_hard"),
    ("honest.merge.interval.0", 1.5, 1.4999, "merge_advantage"),
    ("honest.merge.merged_pairs", 30, 29, "merge_advantage"),
    ("honest.control.interval.1", 2.0, 2.0001, "merge_advantage"),
    ("honest.speed_up.greedy.interval.0", 1.0001, 1.0, "speed_up_greedy"),
    ("honest.speed_up.sampled.interval.0", 1.0001, 1.0, "speed_up_sampled"),
    ("honest.speed_up.greedy.used", 4, 3, "speed_up_greedy"),
    ("honest.speed_up.sampled", FAST, None, "speed_up_sampled"),
])
def test_each_condition_passes_and_fails_alone(path, good, bad, name):
    kind = path.partition(".")[0] if path.startswith(("published", "honest")) else "honest"
    assert all(each["passed"] is True for asked in judged().values() for each in asked.values())
    assert judged(path, good)[kind][name]["passed"] is True
    only = path.startswith("theirs"), path.endswith(("merged_pairs", "control.interval.1", "used", "sampled"))
    for value in [bad] if any(only) else [bad, math.nan]:
        found = judged(path, value)
        failed = [
            (part, each["name"])
            for part, asked in found.items()
            for each in asked.values()
            if not each["passed"]
        ]
        assert failed == [(kind, name)]
        assert ("not matched: " in found[kind][name]["why"]) == path.startswith("theirs")
    assert judged("honest.speed_up.greedy", None)["honest"]["speed_up_greedy"]["why"] == "not measured"
    few = judged("honest.speed_up.greedy.used", 1)["honest"]["speed_up_greedy"]
    assert few["why"] == "texts of 1 of 6 prompts do not loop, 4 needed" and few["value"] == 1.2
    assert few["interval"] == [1.1, 1.3]
    assert (
        judged("theirs.steps", None)["honest"]["val_bpb_delta"]["why"]
        == "not matched: steps 100 against None"
    )


# Figures


def test_divergence_and_the_nearest_state_are_those_of_the_formulas():
    from scipy.spatial.distance import jensenshannon
    p, q = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    wanted = [jensenshannon(a.numpy(), b.numpy()) ** 2 for a, b in zip(p, q)]
    np.testing.assert_allclose(tool.divergence(p, q), wanted, atol=1e-6)
    one, other = torch.eye(2)
    assert tool.divergence(one, other).item() == pytest.approx(math.log(2))
    guess = torch.zeros(3, 1)
    right = torch.tensor([[1.0], [1.0], [1.0]])
    others = torch.tensor([[[2.0], [-3.0]], [[2.0], [-0.5]], [[1.0], [2.0]]])
    assert tool.closest(guess, right, others).tolist() == [True, False, False]  # a tie is no hit


def written(model, count: int, share: float = 0.7) -> np.ndarray:
    """Text of which the model has chosen most ids itself, inside windows of 32."""
    ids = text(count)
    luck = np.random.default_rng(0).random(count)
    for t in range(1, count):
        start = (t - 1) // 32 * 32
        if luck[t] < share:
            states = model.hidden(torch.from_numpy(ids[None, start:t]), model.rotary_train)
            ids[t] = model.head(states[:, -1]).argmax().item()
    return ids


def honest(model, ids: np.ndarray, args) -> dict:
    """Of all windows of 32, one after the other."""
    return tool.figures(model, model, ids, np.arange(0, len(ids) - 32, 32), args)[1]


def written_by(model, prompt: list[int], count: int = 31) -> tuple[list[int], float]:
    """(prompt and `count` ids that the model goes on with, greedily, what the bench says of its bytes a
    pass).
    """
    found = timing.measured(section, model, prompt, 0.0, count, 1)["speculation"]["bytes_per_pass"]
    writer = section.Generator(model, prompt, 0, False, 0.0)
    return [*prompt, *map(ord, writer.write(count))], found


def learned(size: int):
    """A model that has read one sentence often enough to draft it, now and then wrongly."""
    one_draft = {"DRAFTER": "heads", "DRAFT_BRANCHES": 1, "DRAFT_PRICE": 0}
    args = settings(BLOCK_SIZE=size, POSITIONS="rope", **one_draft)
    trainer = section.Trainer(args, None, section.Runtime(args), section.Log(None))
    words = np.frombuffer(b"so it goes, and so it went, and so it will go on; " * 20, np.uint8) + 4
    for i in range(120):
        rows = np.random.default_rng(i).integers(900, size=4)
        ids = torch.from_numpy(np.stack([words[at : at + 33] for at in rows]).astype(np.int64))
        with torch.enable_grad():
            trainer.train_step(ids[None], torch.ones(1, 4), 0.0, trainer.model.aux.inputs(i, ids.device))
        trainer.step = i + 1
    return trainer.model.eval()


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 4])
def test_gate_and_bench_agree_to_the_last_digit(size):
    """On a text that the model has written: as many bytes a pass as the decoder that wrote it. Blocks of b
    bytes begin with one that is settled, so that they give b a pass at most.
    """
    model, sentence, rates, texts = learned(size), b"so it goes, and so it went", [], []
    for i in range(6):
        ids, by_bench = written_by(model, [byte + 4 for byte in sentence[4 * i : 4 * i + 2]])
        by_gate = honest(model, np.array([*ids, 4]), model.args)["bytes_per_pass"]  # 33 ids, one window
        assert by_bench == by_gate <= size
        rates.append(by_bench)
        texts += ids[:32]
    assert (min(rates) == max(rates) == 1) if size == 1 else max(rates) > 1.2
    together = honest(model, np.array([*texts, 4, 4]), model.args)
    low, high = together["intervals"]["bytes_per_pass"]
    assert low <= together["bytes_per_pass"] <= high <= size


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3])
def test_honest_figures_are_those_of_slow_loops(size, monkeypatch):
    model, length = alive(BLOCK_SIZE=size), 32
    ids, args = written(model, 200), settings(BLOCK_SIZE=size, GATE_BATCHES=2)
    luck = np.random.default_rng(1)

    def draft(parents, branches, given=None):
        """Knows the text, and gets a byte wrong now and then; blocks begin with what is given."""
        if given is None:
            given = torch.zeros(len(parents), 1, dtype=torch.long)
        tokens = torch.from_numpy(np.stack([drafts[tuple(parent[:4].tolist())] for parent in parents]))
        if size > 1:
            assert given[:, 0].tolist() in ([0] * len(parents), tokens[:, 0].tolist())
        return torch.cat((given, tokens[:, 1:]), 1)[:, None], None, torch.zeros(len(parents), 1, 32)

    # what is drafted from the state before each newest id, which is the block's first
    drafts, passes, right, places = {}, 0, 0, 0
    for start in range(0, 6 * length, length):
        window = ids[start : start + length + 1].tolist()
        states = model.hidden(torch.tensor([window[:-1]]), model.rotary_train)[0]
        for t in range(length):
            block = [*window[t + 1 : t + 1 + size], *[-2] * size][:size]
            wrong = luck.random(size) < 0.3
            drafts[tuple(states[t, :4].tolist())] = np.where(wrong & (np.arange(size) > 0), 7, block)
        newest = 1
        while newest < length:  # a pass
            guessed = drafts[tuple(states[newest - 1, :4].tolist())][1:]
            newest, passes = newest + 1, passes + 1
            for guess in guessed:
                if newest >= length or guess != window[newest]:
                    break
                newest += 1
        for t in range(length - size):
            places += 1
            order = sorted((abs(s - t - size), s) for s in range(length) if s not in (t, t + size))
            guess = model.aux.judge(states[t])
            errors = [(guess - states[s]).square().mean().item() for _, s in order]
            # Either of two may be the eighth
            ties = [error for (gap, _), error in zip(order, errors) if gap == order[7][0]]
            near = errors[: 8 - sum(gap == order[7][0] for gap, _ in order[:8])]
            mine = (guess - states[t + size]).square().mean().item()
            if mine < min(near) and (mine < min(ties)) != (mine < max(ties)):
                right += 0.5
            else:
                right += mine < min([*near, *ties])
    monkeypatch.setattr(model.aux.drafter, "draft", draft)
    merged, real = [], tool.merge_figures
    monkeypatch.setattr(tool, "merge_figures", lambda *given: merged.append(given) or real(*given))
    found = honest(model, ids, args)
    # what merges are judged by: ends of true blocks, and what the backbone says after them
    signs, told, window, _ = merged[0]
    planes = torch.randn(32, 64, generator=torch.Generator().manual_seed(42))
    for w, start in enumerate(range(0, 6 * length, length)):
        row = torch.from_numpy(ids[None, start : start + length + 1])
        states = model.hidden(row[:, :-1], model.rotary_train)[0]
        laws = model.head(states[size:]).softmax(-1)
        at = torch.cdist(told[window == w], laws).argmin(1)
        assert sorted(at.tolist()) == [*range(length - size)]
        torch.testing.assert_close(told[window == w], laws[at], atol=1e-6, rtol=1e-4)
        block = torch.stack([row[0, t + 1 : t + 1 + size] for t in at])
        ends = model.aux.drafter.latent(model.aux.drafter.slots(states[at], block)[:, -1])
        assert ((signs[window == w] > 0) != (ends @ planes >= 0)).sum() <= 2
    assert found["n_tokens"] == 6 * 32 and found["n_positions"] == places == 6 * (32 - size)
    assert found["bytes_per_pass"] == 6 * 31 / passes and (passes == 6 * 31) == (size == 1)
    assert found["jepa_top1_hard"] == pytest.approx(right / places, abs=0.06)
    assert found["jepa_chance_hard"] == pytest.approx(1 / 9)
    assert found["merge"]["places"] == places  # fewer than POOL: all of them


def test_speed_counts_where_texts_do_not_loop_and_has_an_interval():
    from scipy.stats import t

    def result(ratio, plain=0.1, drafted=0.1):
        return {"ratio": ratio, "ar": {"looping": plain}, "speculation": {"looping": drafted}}

    ratios = [1.1, 1.3, 0.9, 1.6, 1.2]
    calm = {str(i): result(ratio) for i, ratio in enumerate(ratios)}
    loops = {"a": result(9.0, plain=0.9), "b": result(9.0, drafted=0.26)}
    found, logs = tool.speed_up(calm | loops), np.log(ratios)
    half = t.ppf(0.975, 4) * logs.std(ddof=1) / math.sqrt(5)
    assert (found["used"], found["prompts"]) == (5, 7)
    np.testing.assert_allclose(found["ratio"], np.exp(logs.mean()))
    np.testing.assert_allclose(found["interval"], np.exp([logs.mean() - half, logs.mean() + half]), rtol=1e-4)
    assert tool.speed_up(loops)["used"] == 0 and math.isnan(tool.speed_up(loops)["ratio"])
    assert all(abs(q - t.ppf(0.975, i + 1)) < 1e-3 for i, q in enumerate(tool.STUDENT))


def test_the_difference_in_bits_has_an_interval_over_the_text():
    rng = np.random.default_rng(0)
    sizes = (rng.random(6400) < 0.99).astype(int)
    theirs = rng.gamma(2, 1, 6400)
    value, (low, high) = tool.delta(theirs + 0.02 + rng.normal(0, 0.5, 6400), theirs, sizes)
    assert low < 0.02 * 6400 / sizes.sum() < high
    assert low < value < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(6400), rel=0.25)
    value, ends = tool.delta(theirs + 0.02, theirs, np.ones(6400, int))
    assert value == pytest.approx(0.02) and ends == pytest.approx([0.02, 0.02])


@torch.no_grad()
def test_hard_negatives_are_near_in_time_and_neither_parent_nor_target(monkeypatch):
    model, seen = alive(), []
    monkeypatch.setattr(
        tool,
        "closest",
        lambda guess, right, others: seen.append((right, others)) or torch.ones(guess.shape[:-1]),
    )
    found = honest(model, text(200), settings(GATE_BATCHES=2))
    states = model.hidden(torch.from_numpy(text(200)[None, :32]), model.rotary_train)[0]
    right, others = (part[0] for part in seen[1])  # the published one was asked before
    assert found["jepa_top1_hard"] == 1 and others.shape == (29, 8, 32)
    for t in range(29):
        torch.testing.assert_close(right[t], states[t + 3])
        at = (others[t][:, None] - states).square().sum(-1).argmin(1).tolist()
        assert len({*at}) == 8 and not {t, t + 3} & {*at}
        nearest = sorted(abs(s - t - 3) for s in range(32) if s not in (t, t + 3))[:8]
        assert sorted(abs(s - t - 3) for s in at) == nearest


def test_merging_is_precise_where_signatures_tell_the_prediction():
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(120) % 6  # six kinds of places, each with a signature and a prediction of its own
    codes = (torch.rand(6, 64, generator=generator) < 0.5).float() * 2 - 1
    told = torch.randn(6, 20, generator=generator).mul(4).softmax(-1)[kinds]
    signs, window = codes[kinds].clone(), torch.arange(120) // 10
    # One bit of noise: pairs of a kind differ by two at most
    signs[torch.arange(120), torch.arange(120) % 64] *= -1
    for radius, wanted in (
        (0, 0), (1, 0), (2, 6 * 20 * 19 // 2), (6, 6 * 20 * 19 // 2), (64, 120 * 119 // 2),
    ):
        found = tool.merge_figures(signs, told, window, radius)
        slow = sum((signs[i] != signs[j]).sum() <= radius for i in range(120) for j in range(i))
        assert found["merged_pairs"] == slow == wanted
        assert found["pairs"] == 120 * 119 // 2
    found = tool.merge_figures(signs, told, window, 6)
    low, high = found["interval"]
    control = tool.merge_figures(signs, told[torch.randperm(120, generator=generator)], window, 6)
    assert found["same_choice"][0] == 1 > found["same_choice"][1]
    assert found["advantage"] > 1e5
    assert low > 1e5
    assert low <= high
    low, high = control["interval"]
    assert low < 1 < high < 1.5
    assert control["advantage"] == pytest.approx(1, abs=0.3)
    assert control["merged_pairs"] == found["merged_pairs"]
    none = tool.merge_figures(signs, told, window, 0)  # merges nothing
    assert all(map(math.isnan, none["interval"]))


@torch.no_grad()
def test_published_figures_are_computed_as_published(monkeypatch):
    model, plain = alive(), alive(1, **BASELINE)
    ids, args = text(400), settings(GATE_BATCHES=3)
    # Accepts where the state's first number is positive
    monkeypatch.setattr(model.aux, "verdict", lambda parent, latent: parent[..., 0])
    starts = np.random.default_rng(1234).integers(400 - 32, size=12)
    found, _ = tool.figures(model, plain, ids, starts, args)
    nats, yes = np.zeros(2), 0
    for start in starts:
        window = torch.from_numpy(ids[None, start : start + 33])
        for i, each in enumerate((model, plain)):
            states = each.hidden(window[:, :-1], each.rotary_train)
            nats[i] += torch.nn.functional.cross_entropy(
                each.head(states)[0], window[0, 1:], reduction="sum"
            ).item()
            yes += (states[0, :29, 0] > 0).sum().item() if each is model else 0
    sgjm, baseline = found["sgjm"], found["baseline"]
    assert (sgjm["n_tokens"], sgjm["n_positions"]) == (12 * 32, 12 * 29)
    np.testing.assert_allclose([sgjm["token_nll"], baseline["token_nll"]], nats / 384, rtol=1e-5)
    assert sgjm["branch_acceptance_rate"] == pytest.approx(yes / (12 * 29))
    sizes = [
        sum(p.numel() for p in part.parameters())
        for part in (model, model.aux, model.aux.drafter, model.aux.verifier, plain)
    ]
    cost = (sizes[0] - sizes[1] + 4 * (sizes[2] + sizes[3])) / (sgjm["branch_acceptance_rate"] * 4 * 3)
    assert sgjm["compute_per_accepted_token"] == pytest.approx(cost)
    assert found["compute_advantage"] == pytest.approx(sizes[4] / cost)
    assert baseline["compute_per_token"] == sizes[4]
    assert 0 < sgjm["jepa_top1_acc"] < 1 and sgjm["merge_precision_advantage"] > 0
    # The published 13.92: of its sizes and 99.993 % alone.
    cost = (23_994_240 + 4 * (1_377_984 + 197_121)) / (0.99993 * 4 * 4)
    assert pytest.approx(26_354_304 / cost, abs=0.01) == 13.92


def test_a_judge_that_foresees_and_one_that_does_not():
    model = alive()
    ids, args = text(400), settings(GATE_BATCHES=3)
    states = {}
    for start in range(0, 368, 32):
        row = model.hidden(torch.from_numpy(ids[None, start : start + 32]), model.rotary_train)[0].detach()
        states |= {tuple(row[t, :4].tolist()): row[t + 3] for t in range(29)}
    model.aux.judge.forward = lambda parent: torch.stack(
        [states[tuple(p[:4].tolist())] for p in parent.flatten(0, -2)]
    ).view_as(parent)
    assert honest(model, ids, args)["jepa_top1_hard"] == 1
    model.aux.judge.forward = lambda parent: parent  # stays where it is
    assert honest(model, ids, args)["jepa_top1_hard"] < 0.6


# Whole runs


@pytest.fixture
def judge(corpus, tmp_path, monkeypatch, capsys):
    """judge(VAR=value, ...) -> (exit code, what was printed, gate.json or None) of the gate's main."""
    monkeypatch.setattr(tool.script.fcntl, "flock", lambda *_: None)  # held while the process lives

    def judge(**overrides):
        wanted = {
            "EVAL_GATE": 1, "DATA_PATH": corpus, "RUNS_PATH": tmp_path / "runs", "RUN_ID": "gate",
            "VAL_BYTES": 2000, "GATE_BATCHES": 4, "DEVICE": "cpu", "DTYPE": "fp32", "COMPILE": 0,
            "EVAL_BATCH_TOKENS": 1024, "TRAIN_BATCH_TOKENS": 128, **overrides,
        }
        monkeypatch.setattr(tool.os, "environ", {key: str(value) for key, value in wanted.items()})
        code, out = tool.main(), capsys.readouterr()
        path = tmp_path / "runs" / "gate" / "gate.json"
        report = json.loads(path.read_text(), parse_constant=pytest.fail) if path.exists() else None
        return code, out.out + out.err, report
    return judge


def test_two_checkpoints_are_judged(judge, pair, monkeypatch):
    real, seen = tool.figures, []
    monkeypatch.setattr(tool, "figures", lambda *given: seen.append(given[3]) or real(*given))
    code, output, report = judge(SGJM=pair[0], BASELINE=pair[1])
    drawn, spread = seen
    assert drawn.min() >= 0 and drawn.max() < 2001 - 32 and len({*(drawn % 32)}) > 4  # as they come
    assert spread[0] == 0
    assert (spread % 32 == 0).all()
    assert (np.diff(spread) >= 32).all()
    assert 2001 - 64 <= spread[-1] < 2001 - 32
    assert code == 1
    assert "gate honest    failed: " in output
    assert "speed_up" in output
    assert "(not measured)" in output
    for kind, names in (
        (
            "published",
            [
                "nll_delta", "branch_acceptance_rate", "jepa_top1_acc", "merge_precision_advantage",
                "compute_advantage",
            ],
        ),
        (
            "honest",
            [
                "val_bpb_delta", "bytes_per_pass", "jepa_top1_hard", "merge_advantage",
                "speed_up_greedy", "speed_up_sampled",
            ],
        ),
    ):
        asked = report[kind]["conditions"]
        assert [each["name"] for each in asked] == names
        assert all(f"gate {kind:<9} {name}" in output for name in names)
        assert report[kind]["gate_reasons"] == [each["name"] for each in asked if not each["passed"]]
        assert report[kind]["gate_passed"] == (not report[kind]["gate_reasons"])
    honest = report["honest"]
    assert honest["conditions"][0]["why"] == "" and honest["speed_up"] == {"greedy": None, "sampled": None}
    low, high = honest["conditions"][0]["interval"]
    assert low < honest["val_bpb_delta"] == honest["conditions"][0]["value"] < high
    assert honest["val_bpb_delta"] == pytest.approx(honest["val_bpb"][0] - honest["val_bpb"][1])
    assert [report[name]["steps"] for name in ("sgjm", "baseline")] == [3, 3]
    assert report["sgjm"]["file"] == pair[0]
    assert report["dataset"]["sha256"]
    assert report["evals"]["gate_sgjm"]["targets"] == report["evals"]["gate_sgjm"]["bytes"] == 2000
    assert report["settings"]["GATE_RADIUS"] == honest["merge"]["radius"] == 6
    # 16 windows of either kind
    assert honest["n_tokens"] == report["published"]["sgjm"]["n_tokens"] == 4 * 128
    assert honest["merge"]["places"] == 16 * 29
    model = section.load(pair[0])  # the headline's routine, the whole text
    val = section.Dataset(settings(DATA_PATH=report["settings"]["DATA_PATH"]), verify=False).val[:2001]
    assert honest["val_bpb"][0] == pytest.approx(
        section.score(model, val)[0].sum() / math.log(2) / 2000, rel=1e-6
    )
    assert judge(SGJM=pair[0], BASELINE=pair[1])[2]["honest"]["merge"] == honest["merge"]  # the same again
    table = reports.gate(section.Path(report["settings"]["RUNS_PATH"]) / "gate" / "gate.json")
    found = {row[0]: row[1:] for row in table["rows"]}
    ends = "{:.4f} to {:.4f}".format(*honest["intervals"]["bytes_per_pass"])
    assert found["honest: `bytes_per_pass`"][:3] == [f"{honest['bytes_per_pass']:.4f}", ends, ">= 1.5000"]
    assert found["honest: `speed_up_greedy`"] == ["-", "", "> 1.0000", "fail (not measured)"]
    assert found["published: `nll_delta`"][1] == ""


def test_all_honest_conditions_make_exit_code_0(judge, pair, tmp_path, monkeypatch):
    bench, found = tmp_path / "bench.json", {}

    def write_bench(sampled: float, **more) -> None:
        found.update(more)
        for kind, ratio in (("greedy", 1.7), ("sampled", sampled)):
            calm = {"ar": {"looping": 0.1}, "speculation": {"looping": 0.0}}
            found[kind] = {str(i): {"ratio": ratio + i / 100, **calm} for i in range(4)}
        bench.write_text(json.dumps(found))

    write_bench(1.2)
    good = {
        key: HONEST[key]
        for key in ("bytes_per_pass", "jepa_top1_hard", "jepa_chance_hard", "merge", "control", "intervals")
    }
    monkeypatch.setattr(tool, "figures", lambda *given, real=tool.figures: (real(*given)[0], dict(good)))
    monkeypatch.setattr(tool, "delta", lambda *given: (0.001, [0.0, 0.002]))
    code, output, report = judge(SGJM=pair[0], BASELINE=pair[1], GATE_BENCH=bench)
    assert code == 0 and report["honest"]["gate_passed"], output
    assert report["honest"]["speed_up"]["greedy"]["ratio"] == pytest.approx(1.715, abs=1e-3)
    assert "gate honest    passed" in output and not report["published"]["gate_passed"]
    # fast greedily and slow at temperature 1 is not fast
    write_bench(0.9, artifact_sha256=section.sha256_file(section.Path(pair[0])))
    assert judge(SGJM=pair[0], BASELINE=pair[1], GATE_BENCH=bench)[2]["honest"]["gate_reasons"] == [
        "speed_up_sampled"
    ]


def test_what_cannot_be_measured_is_null(judge, pair, monkeypatch):
    """No pair merges: no mean, no interval; nothing of it passes, and the report stays JSON."""
    def far(self, parents, branches, given=None):
        shape = len(parents), branches
        return (
            torch.zeros(*shape, 3, dtype=torch.long),
            None,
            torch.randn(*shape, 32, generator=torch.Generator().manual_seed(0)),
        )
    monkeypatch.setattr(tool.script.Drafter, "draft", far)
    monkeypatch.setattr(tool, "POOL", 12)
    monkeypatch.setattr(tool, "ENOUGH", 0)
    code, _, report = judge(SGJM=pair[0], BASELINE=pair[1], GATE_RADIUS=0, VAL_BYTES=400)
    merge = report["honest"]["merge"]
    assert code == 1 and report["published"]["sgjm"]["merge_precision_js"] is None
    assert report["published"]["sgjm"]["merge_precision_advantage"] == 1.0
    assert report["published"]["sgjm"]["merged_pairs"] == 0
    assert merge["merged_pairs"] == 0 and merge["js"][0] is None and merge["interval"] == [None, None]
    assert "merge_advantage" in report["honest"]["gate_reasons"]


def test_artifacts_are_judged_by_the_run_they_lie_in(judge, pair, tmp_path):
    paths = []
    for i, path in enumerate(pair):
        model = section.load(path)
        args = section.Hyperparameters(None, {**model.args.shipped(), "EXPORT_HEADS": i == 0})
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        (folder / "artifact.bin").write_bytes(
            section.pack({name: p.detach().numpy() for name, p in model.named_parameters()}, args)
        )
        paths.append(folder / "artifact.bin")
    code, output, report = judge(SGJM=paths[0], BASELINE=paths[1])
    assert (
        code == 1
        and report["honest"]["conditions"][0]["why"] == "not matched: steps None against None"
    ), output
    for path in paths:
        path.with_name("metrics.json").write_text('{"steps": 100}')
    code, _, report = judge(SGJM=paths[0], BASELINE=paths[1])
    assert code == 1 and report["honest"]["conditions"][0]["why"] == "" and report["sgjm"]["steps"] == 100
    code, _, mixed = judge(SGJM=paths[0], BASELINE=pair[1])
    assert mixed["honest"]["conditions"][0]["why"] == "not matched: steps 100 against 3"
    assert mixed["honest"]["merge"] == report["honest"]["merge"]


def test_misuse_is_one_line_and_exit_code_2(judge, pair, tmp_path):
    bare = checkpoint(tmp_path, "bare", 0, ARCH="baseline")
    other = checkpoint(tmp_path, "other", 0, **BASELINE, TRAIN_SEQ_LEN=16)
    (tmp_path / "bench.json").write_text('{"summary": {"greedy": {"ratio": 1.7}}}')
    (tmp_path / "other.json").write_text('{"greedy": {}, "sampled": {}, "artifact_sha256": "ab"}')
    (tmp_path / "cool.json").write_text('{"greedy": {}, "sampled": {}, "settings": {"TEMPERATURE": 0.8}}')
    (tmp_path / "wrong.json").write_text(
        '{"greedy": {}, "sampled": {}, "summary": {"greedy": {"mismatches": 2}}}')
    for overrides, words in (
        ({"SGJM": ""}, "SGJM=FILE is not set"),
        ({"BASELINE": ""}, "BASELINE=FILE is not set"),
        ({"SGJM": tmp_path / "none.bin"}, "none.bin: No such file"),
        ({"SGJM": bare}, "no heads in it"),
        ({"BASELINE": pair[0]}, "ARCH=sgjm, where baseline is needed"),
        ({"BASELINE": other}, "TRAIN_SEQ_LEN=16, where 32 is needed"),
        ({"VAL_BYTES": 30}, "no such window in 31 validation ids"),
        ({"GATE_BENCH": tmp_path / "bench.json"}, "no ratios by prompt, greedy and sampled"),
        ({"GATE_BENCH": tmp_path / "none.json"}, "GATE_BENCH="),
        ({"GATE_BENCH": tmp_path / "other.json"}, "measured with another file than"),
        ({"GATE_BENCH": tmp_path / "cool.json"}, "measured at temperature 0.8"),
        ({"GATE_BENCH": tmp_path / "wrong.json"}, "drafts changed greedy texts"),
        ({"GATE_RADIUS": 65}, "GATE_RADIUS='65' is not accepted"),
        ({"MODEL_DIM": 64}, "MODEL_DIM=64: the artifact was made with 32"),
        ({"WORLD_SIZE": 2}, "EVAL_GATE=True, WORLD_SIZE=2: one process judges"),
    ):
        code, output, report = judge(**{"SGJM": pair[0], "BASELINE": pair[1], **overrides})
        assert code == 2 and report is None and words in output and "Traceback" not in output, (
            overrides,
            output,
        )
        assert [
            line for line in output.splitlines() if line.startswith("error: ")
        ] == output.splitlines()[-1:]


def test_the_script_starts_the_gate_with_the_same_variables(corpus, pair, tmp_path, monkeypatch, capfd):
    wanted = {
        "EVAL_GATE": 1, "SGJM": pair[0], "BASELINE": pair[1], "DATA_PATH": corpus, "RUNS_PATH": tmp_path,
        "RUN_ID": "gate", "VAL_BYTES": 400, "GATE_BATCHES": 1, "DEVICE": "cpu", "DTYPE": "fp32",
        "COMPILE": 0, "EVAL_BATCH_TOKENS": 1024, "TRAIN_BATCH_TOKENS": 128, "OMP_NUM_THREADS": 1,
    }
    for key, value in wanted.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(section.sys, "argv", ["train_gpt.py"])
    assert section.main() == 1 and "gate honest    failed: " in capfd.readouterr().out
    report = json.loads((tmp_path / "gate" / "gate.json").read_text())
    assert report["sgjm"]["file"] == pair[0]
    assert report["script_sha256"] == section.sha256_file(RECORD / "train_gpt.py")
    # a script that was copied without its folder says so
    monkeypatch.setattr(section, "__file__", str(tmp_path / "train_gpt.py"))
    assert section.main() == 2 and "gate.py is missing" in capfd.readouterr().err
