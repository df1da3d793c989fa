"""The record ByteBest: adapters of documents beside the mixture, rows in a shuffled order, batches that
grow."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, enlivened, environment, slow
from family import load_script
from hypothesis import given
from hypothesis import strategies as st
from test_byteppm import BYTES, SETTINGS, UNSET, WORDS, network, shard, text

RECORD, = (ROOT / "records").glob("*_ByteBest")
section = load_script(RECORD)
LEARN = {"TTT_DOC_CHUNK": 16, "TTT_LORA_RANK": 4, "TTT_LORA_LR": 0.02}


@pytest.fixture(scope="module")
def model():
    settings = {**BYTES, "MIX_ROWS": 10, **LEARN}
    args = section.Hyperparameters({name: str(value) for name, value in settings.items()})
    return enlivened(section, args).eval()


def documents(*lengths: int) -> np.ndarray:
    """Documents of these lengths, BOS included, of words that repeat."""
    ids = text(1, sum(lengths))
    ids = np.where(ids == section.BOS_ID, 36, ids)
    ids[np.cumsum((0, *lengths[:-1]))] = section.BOS_ID
    return ids


@pytest.mark.parametrize("settings", [
    {}, {"ttt": "0"}, {"ttt_adapt": False}, {"ppm_weight": False}, {"mix_streams": 3},
    {"ttt_doc_tokens": 40}, {"ttt_doc_tokens": 40, "mix_streams": 2, "doc_chunk": 7},
], ids=str)
def test_score_and_stream_agree(model, monkeypatch, settings):
    for name, value in settings.items():
        monkeypatch.setattr(model.args, name, value)
    ids = documents(90, 17, 1, 130, 12)  # over a window, one of a chunk and a BOS, one without a byte
    count = len(ids) - 1
    nats, vectors = section.score(model, ids, range(0, count, 3))
    stream = section.stream(model, len(ids))
    stream.push(ids[0])
    for t in range(count):
        logprobs = stream.logprobs()
        assert abs(np.exp(logprobs).sum() - 1) < 1e-6
        assert abs(nats[t] + logprobs[ids[t + 1]]) < 2e-4, t
        if t in vectors:
            assert np.abs(vectors[t] - logprobs).max() < 2e-4
            assert abs(nats[t] + vectors[t][ids[t + 1]]) < 1e-6
        stream.push(ids[t + 1])


def test_a_chunk_by_default_follows_the_window_of_the_scoring():
    """An artifact says 0, and not what 0 meant in training: other windows have other chunks."""
    settings = {name: str(value) for name, value in {**BYTES, **LEARN, "TTT_DOC_CHUNK": 0}.items()}
    shipped = section.Hyperparameters(settings).shipped()
    assert shipped["TTT_DOC_CHUNK"] == 0
    for length, chunk in ((1024, 128), (8192, 1024)):
        args = section.Hyperparameters({"EVAL_SEQ_LEN": str(length)}, shipped)
        assert args.doc_chunk == chunk


def test_a_decoder_may_skip_questions(model):
    """What it does not ask for is learned from all the same."""
    ids = documents(100, 60)
    nats, _ = section.score(model, ids)
    stream = section.stream(model, len(ids))
    for t, token in enumerate(ids[:90]):
        if t in (50, 89):
            assert abs(nats[t - 1] + stream.logprobs()[token]) < 2e-4
        stream.push(token)


def test_adapters_learn_their_document_and_no_other(model, monkeypatch):
    monkeypatch.setattr(model.args, "ppm_weight", False)
    ids = documents(150, 140, 160)
    learned, _ = section.score(model, ids)
    monkeypatch.setattr(model.args, "ttt_adapt", False)
    control, _ = section.score(model, ids)
    size = model.args.doc_chunk
    for start, stop in ((0, 150), (150, 290), (290, 449)):
        first = slice(start, start + size)
        np.testing.assert_allclose(learned[first], control[first], rtol=0, atol=1e-5)  # nothing is known yet
        later = slice(stop - 50, stop)
        assert learned[later].sum() < control[later].sum() - 1
    # another first document moves nothing in the others
    monkeypatch.setattr(model.args, "ttt_adapt", True)
    other = ids.copy()
    other[1:150] = 4 + np.random.default_rng(0).integers(0, 256, 149)
    again, _ = section.score(model, other)
    np.testing.assert_allclose(again[150:], learned[150:], rtol=0, atol=1e-5)
    assert np.abs(again[:149] - learned[:149]).max() > 0.1


def test_adapters_begin_alike_and_learn_by_adamw(model):
    """Those of the documents that go on, as AdamW with a beta1 of 0 has it."""
    adapters = section.Adapters(model, 3)
    for a, again in zip(adapters.params[::2], section.Adapters(model, 5).params[::2]):
        assert torch.equal(a, again[:3]) and torch.equal(a[0], a[2])
    kept = [p.clone() for p in adapters.params]
    want, squares = [p.clone() for p in kept], [torch.zeros_like(p) for p in kept]
    for step, count in ((1, 3), (2, 2)):
        params = adapters.attach(count)
        loss = sum((p * (1 + place)).square().sum() for place, p in enumerate(params))
        for p, square, grad in zip(want, squares, torch.autograd.grad(loss, params, retain_graph=True)):
            square[:count] += (1 - 0.999) * (grad.square() - square[:count])
            corrected = (square[:count] / (1 - 0.999**step)).sqrt() + 1e-8
            p[:count] -= model.args.ttt_lora_lr * grad / corrected
        adapters.learn(loss, params)
        adapters.detach()
    for mine, p, start in zip(adapters.params, want, kept):
        assert torch.allclose(mine, p, atol=1e-6) and (not start.any() or not torch.equal(mine, start))


def test_what_waits_for_the_mixture_is_counted_in_targets(monkeypatch):
    """Many small documents may wait where few large ones may not."""
    args = section.Hyperparameters({**{k: str(v) for k, v in BYTES.items()}, "MIX_ROWS": "10"})
    ids = documents(*[5] * 60)
    runtime = section.Runtime(args)
    ledger, most = section.Ledger(args, runtime, ids, False), []
    monkeypatch.setattr(section, "BACKLOG", 4 * (section.SHARE + 2) * 12)  # twelve targets
    wait = ledger.wait
    monkeypatch.setattr(ledger, "wait", lambda left: (wait(left), most.append(ledger.ahead)))
    for first in range(0, 295, 5):
        ledger.take(first, first + 5, torch.zeros(5, 260), torch.ones(5))
    sums = ledger.close()
    assert max(most) <= 12 and max(most) == 10 and most[-1] == 0
    assert sums[0, -1] == 295 and sums[0, :-1].sum() == 295


@pytest.mark.parametrize("at", [1, 15, 16, 17, 63, 90, 149])
def test_poison_moves_nothing_before_it(model, at):
    """Neither through adapters, which learn a chunk at once, nor through the mixture."""
    ids = documents(120, 80)
    want, before = section.score(model, ids, [at - 1])
    poisoned = ids.copy()
    poisoned[at:] = (poisoned[at:] - 4 + 7) % 256 + 4
    got, after = section.score(model, poisoned, [at - 1])
    np.testing.assert_allclose(got[: at - 1], want[: at - 1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(after[at - 1], before[at - 1], rtol=0, atol=1e-5)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 70), st.booleans())
def test_documents_cover_every_target_once(lengths, most, begins):
    ids = np.full(sum(lengths) + 1, 9)
    if begins:
        ids[np.cumsum([0, *lengths[:-1]])] = section.BOS_ID
    learner = section.TestTimeTraining.__new__(section.TestTimeTraining)
    learner.args = type("Args", (), {"ttt_doc_tokens": most})
    spans = learner.documents(ids)
    assert spans[0, 0] == 0 and spans[-1, 1] == len(ids) - 1
    assert (spans[1:, 0] == spans[:-1, 1]).all()
    assert (np.diff(spans)[:, 0] > 0).all() and (np.diff(spans) <= most).all()
    assert set(np.flatnonzero(ids[:-1] == section.BOS_ID)) <= set(spans[:, 0].tolist())


def test_the_mixture_is_a_probability_that_is_booked():
    args = section.Hyperparameters({"PPM_ORDER": "6", "MIX_ROWS": "10"})
    ids = text(3, 3000)
    lp = network(ids, 3)
    whole, stepwise = section.Mixture(args).score(ids, lp), section.Mixture(args)
    assert len(stepwise.state.contexts) == 10
    audit = set(np.random.default_rng(3).choice(len(ids), 500, replace=False).tolist())
    for t, token in enumerate(ids):
        if t in audit:
            logprobs = stepwise.distribution(lp[t])
            assert abs(np.exp(logprobs).sum() - 1) < 1e-6 and abs(whole[t] + logprobs[token]) <= 1e-12
        stepwise.push(token, lp[t])


def loader(ranks: int = 1, rank: int = 0, state=None, **settings):
    args = section.Hyperparameters({**BYTES, **settings})
    data = type("Data", (), {"path": "here", "vocab_size": 260})
    rows = 4 + np.arange(7 * 64 + 1) // 64 % 200
    data.train_shards = [rows, rows[: 3 * 64 + 1] + 100]
    return section.Loader(data, args, section.BatchPlan.make(args, ranks), rank, state)


def test_a_shuffled_epoch_reads_every_row_once():
    rows = loader(TRAIN_BATCH_TOKENS="640", TRAIN_SEQ_LEN="64")
    first, second = rows._next_rows(10), rows._next_rows(10)
    every = [(0, 64 * i) for i in range(7)] + [(1, 64 * i) for i in range(3)]
    assert sorted(first) == sorted(second) == every
    assert first != every and first != second
    plain = loader(TRAIN_ORDER="sequential", TRAIN_BATCH_TOKENS="640", TRAIN_SEQ_LEN="64")
    assert plain._next_rows(10) == every


def test_a_shuffled_order_is_that_of_the_seed_and_goes_on_from_its_state():
    one, other = loader(SEED="1"), loader(SEED="2")
    assert one._next_rows(10) != other._next_rows(10)
    begun = loader(SEED="1")
    begun._next_rows(4)
    assert loader(SEED="1", state=begun.state)._next_rows(6) == loader(SEED="1")._next_rows(10)[4:]


GROWN = {"TRAIN_BATCH_TOKENS": 512, "DEVICE_BATCH_TOKENS": 256, "TRAIN_SEQ_LEN": 64, "ITERATIONS": 3,
         "WARMDOWN_ITERS": 0, "MUON_MOMENTUM_WARMUP_START": 0.9, "MUON_MOMENTUM": 0.9, "TTT": 0,
         "VAL_BYTES": 300, "WARMUP_STEPS": 0}


def weights(path) -> dict[str, torch.Tensor]:
    with section.safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith("model.")}  # noqa: SIM118


def test_two_updates_a_step_are_twice_as_many_steps(run, tmp_path):
    """Bit for bit, where nothing but the average goes by steps."""
    small = {"TRAIN_BATCH_TOKENS": 256, "ITERATIONS": 6}
    for name, more in (("grown", {"BATCH_GROWTH": 2}), ("small", small)):
        code, output, _ = run(script=RECORD / "train_gpt.py", RUN_ID=name, **SETTINGS | GROWN | more)
        assert code == 0, output
    grown, small = (weights(tmp_path / f"runs/{name}/final.safetensors") for name in ("grown", "small"))
    assert grown.keys() == small.keys() and all(torch.equal(grown[key], small[key]) for key in grown)


@pytest.mark.parametrize("progress, updates", [(0, 4), (0.39, 4), (0.4, 2), (0.74, 2), (0.75, 1), (1, 1)])
def test_updates_become_fewer(progress, updates):
    batch = {"TRAIN_BATCH_TOKENS": "512", "DEVICE_BATCH_TOKENS": "64", "TRAIN_SEQ_LEN": "64"}
    args = section.Hyperparameters({**BYTES, **batch, "BATCH_GROWTH": "4:0.4,2:.75, 1"})
    assert section.updates_at(progress, args) == updates


@pytest.mark.parametrize("settings, words", [
    ({"BATCH_GROWTH": "1,2"}, "BATCH_GROWTH='1,2' is not accepted"),
    ({"BATCH_GROWTH": "4:0.5,2:0.4,1"}, "is not accepted: NUMBER:SHARE"),
    ({"BATCH_GROWTH": "2:0.5"}, "is not accepted: NUMBER:SHARE"),
    ({"BATCH_GROWTH": "two,1"}, "is not accepted: NUMBER:SHARE"),
    ({"BATCH_GROWTH": "0"}, "is not accepted: NUMBER:SHARE"),
    ({"BATCH_GROWTH": "2:-1,1"}, "is not accepted: NUMBER:SHARE"),
    ({"BATCH_GROWTH": "2:1.5,1"}, "is not accepted: NUMBER:SHARE"),
    ({"BATCH_GROWTH": "4:0.5,,1"}, "is not accepted: NUMBER:SHARE"),
    ({"BATCH_GROWTH": ""}, ""),
    ({"BATCH_GROWTH": "3", "DEVICE_BATCH_TOKENS": 64}, "BATCH_GROWTH=3, DEVICE_BATCH_TOKENS=64: "),
    ({"TTT": "sgd"}, "TTT='sgd' is not accepted: 0 | lora"),
    ({"TTT_DOC_CHUNK": 128}, "TTT_DOC_CHUNK=128, EVAL_SEQ_LEN=64: a window must hold the chunk"),
    ({"MIX": "ppm"}, "MIX='ppm' is retired: PPM-D is BytePPM's"),
    ({"TTT_CHUNK_TOKENS": 512}, "TTT_CHUNK_TOKENS='512' is retired: updates of all weights are BytePPM's"),
    ({"TTT_LR": 0.003}, "TTT_LR='0.003' is retired: updates of all weights are BytePPM's"),
    ({"PPM_WEIGHT": 0.5}, "PPM_WEIGHT='0.5' is not accepted: 0 | 1"),
], ids=str)
def test_bad_settings_are_one_line(run, settings, words):
    code, output, _ = run(script=RECORD / "train_gpt.py", **SETTINGS | {"ITERATIONS": 1} | settings)
    assert code == (2 if words else 0) and words in output and "Traceback" not in output, output


@slow
def test_lines_of_a_run_on_any_number_of_ranks(run):
    found = []
    for ranks in (1, 3):
        code, output, metrics = run(
            ranks=ranks, script=RECORD / "train_gpt.py", RUN_ID=f"ranks{ranks}", **SETTINGS,
            TTT_DOC_CHUNK=16, TTT_LORA_RANK=4, TTT_DOC_TOKENS=200, VAL_BYTES=1500,
        )
        assert code == 0, output
        assert metrics["headline"] == "final_int6_ttt_mix"
        found.append(metrics["evals"])
    one, three = found
    assert one["final_int6_ttt"]["updates"] == three["final_int6_ttt"]["updates"] > 0
    for name in one:
        assert one[name]["val_bpb"] == pytest.approx(three[name]["val_bpb"], abs=3e-3)


def test_one_artifact_scores_the_same_on_two_ranks(run, model, corpus, tmp_path):
    tensors = {name: p.detach().numpy() for name, p in model.exported().items()}
    (tmp_path / "model.bin").write_bytes(section.pack(tensors, model.args))
    found = []
    for ranks in (1, 2):
        code, output, metrics = run(
            ranks=ranks, script=RECORD / "train_gpt.py", RUN_ID=f"r{ranks}", **UNSET, EVAL_ONLY=1,
            ARTIFACT=tmp_path / "model.bin", DTYPE="fp32", TTT_DOC_TOKENS=150, VAL_BYTES=900,
            EVAL_BATCH_TOKENS=256,
        )
        assert code == 0, output
        found.append({name: result["val_bpb"] for name, result in metrics["evals"].items()})
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@slow
def test_a_codec_proves_the_adapters(model, tmp_path):
    tensors = {name: p.detach().numpy() for name, p in model.exported().items()}
    (tmp_path / "model.bin").write_bytes(section.pack(tensors, model.args))
    ids = 4 + np.frombuffer(WORDS * 8, np.uint8).astype(int)
    (tmp_path / "text.bin").write_bytes(shard(np.concatenate(([1], ids[:300], [1], ids[:350]))))
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "codec.py", "prove", RECORD, tmp_path / "model.bin",
         tmp_path / "text.bin", "--bytes", "600", "--json"],
        env=environment(), capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["updates"] >= 3


@slow
def test_what_contexts_are_worth(model, corpus, tmp_path):
    tensors = {name: p.detach().numpy() for name, p in model.exported().items()}
    (tmp_path / "model.bin").write_bytes(section.pack(tensors, model.args))
    shard, = corpus.glob("*_val_*.bin")
    done = subprocess.run(
        [sys.executable, RECORD / "contexts.py", tmp_path / "model.bin", shard, "--targets", "3000",
         "--train", shard, "--train-ids", "3000", "--out", tmp_path / "out.json"],
        env=environment(), capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row[0]: float(row[1]) for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    begun, = (bpb for name, bpb in rows.items() if "3,000 training ids" in name)
    assert rows["**all ten: the record's**"] < rows["network alone"]
    assert begun < rows["**all ten: the record's**"] / 2  # it has counted the very text
