"""The record TokenBest: its parent's weights bit for bit where that one's gone parts are off, and answers
to the names of these; adapters of documents beside the mixture."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_stream_follows_score, enlivened, slow
from family import load_script

RECORD, = (ROOT / "records").glob("*_TokenBest")
PARENT, = (ROOT / "records").glob("*_BiJEPAX")
section = load_script(RECORD)

# The tiny model of the tests, in the variables that this record has: layers 2 and 3 have two lanes.
HERE = {name: "" for name in TINY if name.startswith(("JEPA_", "NGRAM_", "BIGRAM_"))} | {
    "VOCAB_SIZE": 260, "NUM_LAYERS": 4, "PARALLEL_START": 2, "XSA_LAST_N": 4, "GATE_WINDOW": 6,
    "PPM_WEIGHT": 0, "VAL_BYTES": 400, "TTT": 0,
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
    here = {"TRAIN_ORDER": "sequential"}
    assert same(final("here", **here), final("parent", script=PARENT / "train_gpt.py", **off))


@pytest.mark.parametrize("more", [
    {}, {"TRAIN_ALIGN": "packed", "PACK_ROWS": 4}, {"BATCH_GROWTH": "2:0.5,1"},
], ids=str)
def test_a_run_resumes_bit_for_bit(final, tmp_path, more):
    more = {"DEVICE_BATCH_TOKENS": 256} | more
    whole = final("cut", CHECKPOINT_EVERY=4, **more)
    assert same(whole, final("on", RESUME=tmp_path / "runs/cut/last.safetensors", **more))


@slow
def test_three_ranks_train_as_one(final):
    """Adam's first steps are signs, which magnifies what the order of sums does to gains; Muon's
    matrices show its own."""
    more = {"TRAIN_ALIGN": "packed", "PACK_ROWS": 2}
    one, three = (final(f"{ranks} ranks", ranks, ITERATIONS=3, **more) for ranks in (1, 3))
    assert one.keys() == three.keys()
    for key, value in one.items():
        muon = "muon" in key or ".mlp." in key or ".attn.c_" in key
        assert torch.allclose(value, three[key], atol=2e-6 if muon else 2e-3), key


# ----------------------------------------------------------------------------------- adapters and the mixture

LEARN = {"TTT": "lora", "TTT_DOC_CHUNK": 16, "TTT_LORA_RANK": 4, "TTT_LORA_LR": 0.02,
         "PPM_WEIGHT": 1, "MIX_ROWS": 6, "EVAL_SEQ_LEN": 32, "EVAL_BATCH_TOKENS": 64}


def alive(**overrides):
    return enlivened(section, tiny(**{**LEARN, **overrides})).eval()


def documents(*lengths: int) -> np.ndarray:
    """Documents of these lengths, BOS included, of words that repeat."""
    words = np.frombuffer(b"the same few words, the same words again and again. " * 40, np.uint8)
    ids = 4 + np.roll(words, 7)[: sum(lengths)].astype(np.int64)
    ids[np.cumsum((0, *lengths[:-1]))] = section.BOS_ID
    return ids


# More than GROUP batches of two windows, one document of a BOS alone, one longer than a window.
TEXT = documents(60, 17, 1, 70, 12, 9, 30, 5, 16, 33, 20)


@pytest.mark.parametrize("more", [
    {}, {"TTT_ADAPT": 0}, {"PPM_WEIGHT": 0}, {"TTT": "0"},
], ids=str)
def test_the_stream_follows_the_score(more):
    assert_stream_follows_score(section, alive(**more), TEXT, every=3, atol=2e-4)


def test_a_text_of_many_groups_is_scored_as_one_of_one(monkeypatch):
    found = []
    for group in (1, 100):
        monkeypatch.setattr(section.TestTimeTraining, "GROUP", group)
        found.append(section.score(alive(), TEXT, [40, 200]))
    assert np.abs(found[0][0] - found[1][0]).max() < 1e-5
    for t in (40, 200):
        assert np.abs(found[0][1][t] - found[1][1][t]).max() < 1e-5


@pytest.mark.parametrize("at", [1, 17, 61, 149, 230])
def test_poison_moves_nothing_before_it(at):
    """Neither through adapters, which learn a chunk at once, nor through mixture, proposals and groups."""
    want, before = section.score(alive(), TEXT, [at - 1])
    poisoned = np.where(TEXT == section.BOS_ID, TEXT, (TEXT - 4 + 7) % 256 + 4)
    poisoned[:at] = TEXT[:at]
    got, after = section.score(alive(), poisoned, [at - 1])
    assert np.abs(got[: at - 1] - want[: at - 1]).max(initial=0) < 1e-5
    assert np.abs(after[at - 1] - before[at - 1]).max() < 1e-5


@pytest.mark.parametrize("mixed", [0, 1])
def test_the_mixture_reads_what_adapters_say(mixed):
    """They lower the network's nats; the mixture's are others, from a document's second chunk on."""
    ids, more = documents(200, 220, 180), {"PPM_WEIGHT": mixed, "TTT_LORA_LR": 0.002}
    learned, control = (section.score(alive(TTT_ADAPT=adapt, **more), ids)[0] for adapt in (1, 0))
    assert np.abs(learned[:16] - control[:16]).max() < 1e-5  # nothing is known yet
    assert np.abs(learned[16:32] - control[16:32]).max() > 0.1
    for stop in () if mixed else (200, 420, 599):  # the end of each document
        assert learned[stop - 60 : stop].sum() < 0.5 * control[stop - 60 : stop].sum()


@slow
def test_any_number_of_ranks_scores_an_artifact_alike(run, corpus, tmp_path):
    model = alive()
    tensors = {name: p.detach().numpy() for name, p in model.exported().items()}
    (tmp_path / "model.bin").write_bytes(section.pack(tensors, model.args))
    unset = {name: "" for name in {**TINY, **HERE} if name not in ("DEVICE", "COMPILE")}
    found = []
    for ranks in (1, 2):
        code, output, metrics = run(
            ranks=ranks, script=RECORD / "train_gpt.py", RUN_ID=f"r{ranks}",
            **unset | {"EVAL_ONLY": 1, "ARTIFACT": tmp_path / "model.bin", "DTYPE": "fp32", "VAL_BYTES": 900},
        )
        assert code == 0 and metrics["headline"] == "final_int6_ttt_mix", output
        found.append(metrics["evals"])
    one, two = found
    assert one["final_int6_ttt"]["updates"] == two["final_int6_ttt"]["updates"] > 10
    for name in one:
        assert one[name]["val_bpb"] == pytest.approx(two[name]["val_bpb"], abs=1e-5), name


def test_a_run_that_has_ended_is_scored_another_way(run, tmp_path):
    """The checkpoint holds weights, which no setting of the score changes; one of the model would."""
    code, output, first = run(script=RECORD / "train_gpt.py", **HERE, RUN_ID="run")
    assert code == 0, output
    again = {**HERE, "RUN_ID": "run", "RESUME": "auto"}
    code, output, second = run(script=RECORD / "train_gpt.py", **again | {"EVAL_STRIDE": 24})
    assert code == 0 and "resume:" in output, output
    assert first["steps"] == second["steps"] and second["evals"]["final_int6_sliding"]["stride"] == 24
    one, two = (found["evals"]["final_int6_roundtrip"]["val_bpb"] for found in (first, second))
    assert one == two
    assert "warning: resumed with EVAL_STRIDE=24, it was" in output
    code, output, _ = run(script=RECORD / "train_gpt.py", **again | {"XSA_LAST_N": 0})
    assert code == 2 and "made with XSA_LAST_N=4, not 0" in output


# ------------------------------------------------------------------------------------------ packed documents


@pytest.mark.parametrize("shape", [(1, 40), (3, 500), (8, 2048)])
def test_borders_of_documents_are_found_without_a_wait(shape):
    """A list of a length that the shape gives: where documents and rows begin, then the end."""
    ids = torch.randint(4, 260, shape, generator=torch.Generator().manual_seed(4))
    ids[:, 7::shape[1] // 6 + 1] = section.BOS_ID
    docs = (ids == section.BOS_ID).cumsum(1)
    begins = [row * shape[1] + t for row in range(shape[0]) for t in range(shape[1])
              if t == 0 or ids[row, t] == section.BOS_ID]
    found = section.document_mask("fa3", docs)
    room = max(64, ids.numel() // 256)
    assert found.dtype == torch.int32 and found.tolist() == begins + [ids.numel()] * (room - len(begins))
    assert section.document_mask("fa3", docs.to("meta")).shape == (room,)  # nothing depends on the ids
    with pytest.raises(RuntimeError, match="ATTENTION=sdpa"):
        section.document_mask("fa3", torch.arange(64)[None])


def varlen_attention(q, k, v, cu_seqlens=None):
    """FlashAttention's result from where pieces begin."""
    places = torch.arange(q.size(0) * q.size(1))
    pieces = torch.searchsorted(cu_seqlens.long(), places, right=True)[None]
    flat = [x.flatten(0, 1)[None] for x in (q, k, v)]
    assert pieces.unique(return_counts=True)[1].max() <= q.size(1)  # as the kernel is told
    return section.sdpa_attention(*flat, section.causal_mask(pieces, pieces.size(1))).view(q.shape)


def packs(length: int = 64, rows: int = 8) -> torch.Tensor:
    """Documents of 1, 70, 128, 129 ids and more, begun in the middle of one, in rows."""
    ids = torch.randint(4, 260, (rows * length,), generator=torch.Generator().manual_seed(1))
    ids[[33, 103, 104, 232, 361, 430]] = 1
    return ids.view(rows, length)


@pytest.mark.parametrize("rung", ["math", "sdpa", "cpu", "fa2"])
@pytest.mark.parametrize("pack", [2, 4, 8])
def test_a_pack_is_read_as_its_pieces_are(rung, pack):
    """The states of every piece are those that it has as the only text of a window."""
    model = enlivened(section, tiny(TRAIN_ALIGN="packed", PACK_ROWS=pack, TRAIN_SEQ_LEN=64))
    with torch.no_grad():
        model.smear.size.zero_()  # it reads the id before, also at the begin of a row or a piece
    alone = section.GPT(tiny())
    alone.load_state_dict(model.state_dict())
    model.attention = rung
    for block in model.blocks:
        block.attn.attend = varlen_attention if rung == "fa2" else section.attention_of(rung)
    ids, found, pieces = packs(), model.read(packs()).flatten(0, 1), 0
    for number, text in enumerate(ids.view(-1, pack * 64)):
        borders = [0, *[i for i in range(1, len(text)) if text[i] == 1], len(text)]
        for start, stop in zip(borders, borders[1:]):
            for first in range(start, stop, 64):
                part = text[first : min(first + 64, stop)]
                wanted = alone.hidden(part[None], alone.rotary_train[:, : len(part)])[0]
                at = number * len(text) + first
                assert torch.allclose(found[at : at + len(part)], wanted, atol=2e-4), (number, first)
                pieces += 1
    assert pieces > 10


@pytest.mark.parametrize("length", [130, 300])
def test_attention_in_blocks_knows_the_row_before(length):
    rng = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 90, (4, length), generator=rng)
    mask = section.piece_mask("cpu", ids, 2)
    q, k, v = (torch.randn(4, length, n, 8, generator=rng, requires_grad=True) for n in (4, 2, 2))
    grad, found = torch.randn(4, length, 4, 8, generator=rng), []
    for attend in (section.block_attention, section.math_attention):
        out = attend(q, section.with_row_before(k, mask), section.with_row_before(v, mask), mask)
        found.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(*found))


def test_no_pack_goes_over_two_shards():
    """Shards of 7, 2 and 11 rows, packs of 3: rows of a pack follow one another, the rest is passed over."""
    args = tiny(TRAIN_ALIGN="packed", PACK_ROWS=3, TRAIN_BATCH_TOKENS=6 * 64, TRAIN_ORDER="sequential")
    shards = [torch.arange(64 * rows + 1).numpy() for rows in (7, 2, 11)]
    data = SimpleNamespace(train_shards=shards, vocab_size=1 << 16, path="here")
    plan = section.BatchPlan.make(args, 1)
    loader, seen = section.Loader(data, args, plan, 0), []
    for _ in range(5):
        seen += loader._next_rows(plan.rows)
    for at in range(0, len(seen), 3):
        (shard, start), *rest = seen[at : at + 3]
        assert rest == [(shard, start + 64), (shard, start + 128)]
    epoch = [(0, 0), (0, 192), (2, 0), (2, 192), (2, 384)]
    assert seen[::3] == (epoch * 2)[:10] and loader.state["epoch"] == 2
    with pytest.raises(section.UserError, match="12 rows of TRAIN_SEQ_LEN=64: no training shard"):
        section.Loader(data, args, plan._replace(group=12), 0)
    # shuffled, packs stay whole, and an epoch has each once
    args.train_order = "shuffled"
    mixed = section.Loader(data, args, plan, 0)._next_rows(15)
    assert sorted(mixed[::3]) == epoch and mixed[::3] != epoch
    assert all(mixed[at + 2] == (mixed[at][0], mixed[at][1] + 128) for at in range(0, 15, 3))


@pytest.mark.parametrize("bad, words", [
    ({"PACK_ROWS": 3}, "TRAIN_BATCH_TOKENS=512, TRAIN_SEQ_LEN=64, TRAIN_ALIGN=packed, PACK_ROWS=3"),
    ({"DOC_MASK": 0}, "TRAIN_ALIGN=packed, DOC_MASK=False"), ({"PACK_ROWS": 1}, "PACK_ROWS='1' is not"),
], ids=str)
def test_packs_that_cannot_be_are_refused(bad, words):
    with pytest.raises(section.UserError, match=words):
        tiny(TRAIN_ALIGN="packed", **bad)


# ----------------------------------------------------------------------------------------------- what is gone


@pytest.mark.parametrize("name, value", [
    ("LOOP_EXTRA", 2), ("LOOP_FIRST", 3), ("LOOP_LAST", 5), ("LOOP_START", 0.35), ("NUM_LOOPS", 2),
    ("BIJEPAX_ENABLED", 1), ("BIJEPAX_WEIGHT", 0.01), ("BIJEPAX_STRIDE", 64), ("BIJEPAX_CYCLE", 1),
    ("DISABLE_COMPILE", 1), ("TTT_ENABLED", 0), ("PPM_MIXER_ENABLED", 0), ("ARTIFACT_DIR", "out"),
    ("MIX", "tilt"),
])
def test_what_is_gone_is_refused_with_the_reason(name, value):
    with pytest.raises(section.UserError, match=f"{name}='{value}' is retired"):
        tiny(**{name: value})


def test_command_lines_that_switched_it_off_still_work():
    off = {"MIX": "binary", "LOOP_EXTRA": 0, "LOOP_START": 1, "NUM_LOOPS": 0,
           "BIJEPAX_ENABLED": 0, "BIJEPAX_WEIGHT": 0}
    assert not set(off) & {warning.split()[0] for warning in tiny(**off).warnings}


def test_all_that_is_trained_is_shipped():
    model = section.GPT(tiny())
    assert model.exported().keys() == dict(model.named_parameters()).keys()
