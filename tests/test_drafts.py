"""Draft heads: what they cost the model (nothing), and that text written with drafts is the model's own."""

import subprocess
import sys

import generate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_drafts_follow_score, enlivened, environment, same_text
from safetensors.torch import load_file
from scipy.stats import chisquare

DRAFT = {"DRAFT": 3}


@pytest.fixture(scope="module")
def ids(corpus):
    return np.fromfile(next(corpus.glob("*_val_*.bin")), "<u2", offset=1024)[:200].astype(np.int64)


def test_heads_change_no_bit_of_the_model(run, tmp_path):
    results = {}
    for name, overrides in (("without", {}), ("with", {**DRAFT, "QUANT_ROUND": "nearest"}),
                            ("nearest", {"QUANT_ROUND": "nearest"})):
        code, output, metrics = run(RUN_ID=name, **overrides)
        assert code == 0, output
        tensors = load_file(tmp_path / "runs" / name / "final.safetensors")
        results[name] = metrics, {key: x for key, x in tensors.items() if key.startswith(("model.", "ema."))}
    plain, heads = (results[name][1] for name in ("without", "with"))
    assert {key for key in heads if key not in plain} == {
        f"{kind}.draft.link.{layer}.weight" for kind in ("model", "ema") for layer in ("fc1", "fc2")}
    assert all(torch.equal(plain[key], heads[key]) for key in plain)
    losses = [{key: value["val_loss"] for key, value in results[name][0]["evals"].items()}
              for name in ("nearest", "with")]
    assert losses[0] == losses[1]
    assert results["with"][0]["params_shipped"] > results["nearest"][0]["params_shipped"]


def test_the_loss_is_that_of_guesses_on_true_ids(trunk, tiny):
    args = tiny(**DRAFT, JEPA_SIGREG_GROUP=2)
    model, weights = enlivened(trunk, args), torch.tensor([1.0, 0.0, 0.5, 1.0])
    rows = torch.randint(4, 260, (4, 21), generator=torch.Generator().manual_seed(1))
    x = model.hidden(rows[:, :-1], model.rotary_train)
    means = []
    for row, states in zip(rows, x):
        nats = [[] for _ in range(3)]
        for t, state in enumerate(states):
            for i in range(1, 4):
                if t + i + 1 < len(row):
                    state = model.draft(state, model.embed(row[t + i]))
                    nats[i - 1].append(F.cross_entropy(model.head(state), row[t + i + 1]))
        means.append(torch.stack([torch.stack(part).mean() for part in nats]).mean())
    found = model.losses(rows, weights, model.aux.inputs(0, rows.device))["draft"]
    assert float(found.detach()) == pytest.approx(
        float((torch.stack(means) * weights).sum().detach() / 2), rel=1e-5
    )


def test_the_loss_reaches_the_heads_alone(trunk, tiny):
    rows = torch.randint(4, 260, (4, 21), generator=torch.Generator().manual_seed(1))
    model = enlivened(trunk, tiny(**DRAFT))
    model.losses(rows, torch.ones(4), None)["draft"].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"draft.link.fc1.weight", "draft.link.fc2.weight"}


@pytest.mark.parametrize("overrides", [
    {}, {"JEPA_CHUNK_SIZE": 0}, {"DOC_MASK": 1}, {"EVAL_SEQ_LEN": 32, "EVAL_STRIDE": 32},
    {"TTT": "sgd", "TTT_CHUNK_TOKENS": 32, "TTT_LR": 0.05, "TTT_BATCH_ROWS": 2},
], ids=str)
def test_a_pass_over_drafts_is_the_scorer(trunk, tiny, ids, overrides):
    assert_drafts_follow_score(trunk, enlivened(trunk, tiny(**overrides)).eval(), ids)


def test_drafts_that_came_true_are_not_read_again(trunk, tiny, ids):
    model = enlivened(trunk, tiny(EVAL_STRIDE=64)).eval()
    stream, lengths, hidden = trunk.stream(model), [], model.hidden

    def counted(ids, rotary, past=None):
        lengths.append(ids.size(1) - past.length)
        return hidden(ids, rotary, past)
    model.hidden = counted
    stream.push(ids[0])
    stream.ahead(list(ids[1:6]))
    for token in ids[1:7]:
        stream.push(token)
    stream.logprobs()
    stream.ahead([int(ids[7]), 5, 6])
    for token in ids[7:9]:
        stream.push(token)
    stream.logprobs()
    assert lengths == [6, 1, 4, 1]


def written(trunk, model, prompt, law, count: int = 40, speculate: bool = True) -> tuple[list[int], int]:
    """(ids that go on from a prompt, passes), as scripts/generate.py writes them."""
    writer = generate.Writer(trunk, model, [*map(int, prompt)], law, count, speculate)
    return list(writer), writer.passes


@pytest.fixture(scope="module")
def trained(trunk, corpus, tmp_path_factory):
    """A network that has learned something, so that drafts come true; loaded from its artifact."""
    folder = tmp_path_factory.mktemp("trained")
    env = environment(**DRAFT, DATA_PATH=corpus, RUNS_PATH=folder, RUN_ID="a", ITERATIONS=150, EVAL_STRIDE=32,
                      WARMDOWN_ITERS=50, JEPA_CHUNK_SIZE=0, VAL_BYTES=300)
    subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=env, check=True, capture_output=True)
    return trunk.load(folder / "a" / "artifact.bin")


@pytest.mark.parametrize("temperature", [0, 1])
def test_the_text_does_not_depend_on_drafts(trunk, trained, ids, temperature):
    fewer, ties, law = 0, 0, generate.Law(1, temperature)
    for i in range(20):
        prompt = [1, *ids[5 * i : 5 * i + 10 + i]]
        plain, passes = written(trunk, trained, prompt, law, speculate=False)
        drafted, spared = written(trunk, trained, prompt, law)
        assert passes == len(plain) == len(drafted) == 40
        assert same_text(trunk, trained, prompt, plain, drafted, law)
        ties += plain != drafted
        fewer += passes - spared
    assert fewer > (60 if temperature else 200) and ties < 3


def test_sampled_text_has_the_models_law(trunk, trained, ids):
    """Chi-square of the first two ids over many seeds; the second one has been drafted."""
    prompt, temperature, seeds = [1, *map(int, ids[1:40])], 0.8, 600
    shares = {(): 1.0}
    for _ in range(2):
        longer = {}
        for head, share in shares.items():
            text = [*prompt, *head, 0]
            row = trunk.score(trained, text, [len(text) - 2])[1][len(text) - 2]
            p = np.exp(row.astype(np.float64) / temperature)
            p /= p.sum()
            longer |= {(*head, int(i)): share * p[i] for i in np.flatnonzero(p > 1e-3)}
        shares = longer
    counts = dict.fromkeys(shares, 0)
    for seed in range(seeds):
        made, _ = written(trunk, trained, prompt, generate.Law(seed, temperature), 4)
        counts[tuple(made[:2])] = counts.get(tuple(made[:2]), 0) + 1
    often = [key for key, share in shares.items() if share * seeds >= 5]
    expected = [shares[key] * seeds for key in often]
    observed = [counts[key] for key in often]
    expected, observed = ([*part, seeds - sum(part)] for part in (expected, observed))
    assert len(often) > 3 and chisquare(observed, expected).pvalue > 1e-3
