"""scripts/plan.py: what a run costs, counted on meta tensors."""

import argparse
import json
import math
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import plan
import pytest
import rate
import torch
from conftest import ROOT, TINY
from family import TRUNK, Misuse, find_script, load_script

# JEPA and word contexts add much to count: without them a hand count is short and a plan quick.
PLAIN = {**{name: value for name, value in TINY.items() if name != "DEVICE"}, "JEPA_CHUNK_SIZE": "0",
         "MLP_MULT": "2", "NGRAM_ORDERS": "2,3", "NGRAM_WORDS": "0"}


def planned(script=TRUNK, card="h100", ranks=1, rate=0.0, **settings) -> dict:
    return plan.make_plan(script, {**PLAIN, **settings}, card, ranks, rate)


@pytest.fixture(scope="module")
def tiny() -> dict:
    return planned()


def test_a_plan_names_its_script_by_its_place_in_the_repository(tiny, tmp_path):
    assert tiny["script"] == TRUNK.name
    copy = tmp_path / "train_gpt.py"
    copy.write_bytes(TRUNK.read_bytes())
    elsewhere = planned(copy)
    assert elsewhere["script"] == str(copy) and elsewhere["script_sha256"] == tiny["script_sha256"]


def options(**changes) -> argparse.Namespace:
    """What bench.py parses, for a tiny model."""
    settings = {**PLAIN, **changes.pop("settings", {})}
    words = [f"{name}={value}" for name, value in settings.items()]
    usual = {"script": "trunk", "card": "h100", "world_size": 1, "mix_rate": 0.0, "json": ""}
    return argparse.Namespace(**{**usual, "settings": words, **changes})


def test_flops_are_those_of_a_hand_count(tiny):
    layers, dim, heads, kv_heads, tokens, length, vocab = 3, 32, 4, 2, 512, 64, 260
    width, hidden, contexts = dim // heads, 64, 2 * 8  # two orders, 8 numbers each
    weights = layers * (dim * (dim + 2 * kv_heads * width) + dim * dim + 2 * dim * hidden)
    weights += contexts * dim + vocab * dim
    groups = tiny["groups"]
    assert groups["products forward"]["flops"] == 2 * tokens * weights
    assert groups["products backward"]["flops"] == 4 * tokens * weights

    pairs = tokens // length * heads * sum(range(1, length + 1))
    forward = layers * pairs * 4 * width
    assert groups["attention forward"]["flops"] == forward
    assert groups["attention backward"]["flops"] == 2.5 * forward
    assert tiny["model_flops_per_step"] == 6 * tokens * weights + 3 * forward

    # Newton-Schulz: five times X X^T, its square, and that times X, with the short side first
    shapes = [(dim, dim)] * 2 + [(kv_heads * width, dim)] * 2 + [(hidden, dim), (dim, hidden)]
    shapes = shapes * layers + [(dim, contexts)]
    muon = sum(5 * (4 * min(shape) ** 2 * max(shape) + 2 * min(shape) ** 3) for shape in shapes)
    assert groups["Muon"]["flops"] == muon


def test_two_ranks_halve_the_work_of_each_and_exchange_gradients(tiny, trunk):
    two = planned(ranks=2)
    for name in ("products forward", "products backward", "attention forward", "attention backward"):
        assert two["groups"][name]["flops"] == tiny["groups"][name]["flops"] / 2
    assert two["model_flops_per_step"] == tiny["model_flops_per_step"]
    assert not any(row["sent"] for row in tiny["groups"].values())

    # a reduce-scatter and an all-gather of the matrices, in stacks of two shares; an all-reduce of the rest
    args = trunk.Hyperparameters(PLAIN)
    with torch.device("meta"):
        model = trunk.GPT(args)
    stacks, rest = {}, 0
    for name, p in model.named_parameters():
        if trunk.Optimizers.group_of(name, p) == "matrix":
            stacks[p.shape] = stacks.get(p.shape, 0) + 1
        else:
            rest += p.numel()
    matrices = sum(2 * math.ceil(count / 2) * math.prod(shape) for shape, count in stacks.items())
    assert two["groups"]["reductions and gathers"]["sent"] == pytest.approx(4 * (matrices + rest), abs=16)


def test_more_forwards_a_step_cost_more_launches_not_more_flops(tiny):
    cut = planned(DEVICE_BATCH_TOKENS="128")
    assert cut["micro_steps"] == 4
    assert cut["groups"]["products forward"]["flops"] == tiny["groups"]["products forward"]["flops"]
    assert cut["groups"]["products forward"]["launches"] == 4 * tiny["groups"]["products forward"]["launches"]
    assert cut["memory"]["kept for the backward"] < tiny["memory"]["kept for the backward"] / 3


def test_a_compiler_moves_and_keeps_less(tiny):
    compiled = planned(COMPILE="1")
    assert compiled["compiled"] and not tiny["compiled"]
    for name in ("pointwise forward", "pointwise backward"):
        assert compiled["groups"][name]["bytes"] < 0.7 * tiny["groups"][name]["bytes"]
        assert compiled["groups"][name]["launches"] < 0.5 * tiny["groups"][name]["launches"]
    assert compiled["memory"]["kept a token"] < 0.9 * tiny["memory"]["kept a token"]


@pytest.mark.parametrize(
    "queries, keys, window", [(7, 7, 0), (7, 7, 3), (7, 7, 9), (2, 7, 0), (3, 7, 4), (1, 1, 1)]
)
def test_pairs_that_a_window_leaves(queries, keys, window):
    seen = sum(
        j <= i and (not window or i - j < window) for i in range(keys - queries, keys) for j in range(keys)
    )
    assert plan.visible_pairs(queries, keys, True, window) == seen
    assert plan.visible_pairs(queries, keys, False) == queries * keys


def test_windows_scale_the_attention_of_their_layers_only(tiny):
    full, cut = plan.visible_pairs(64, 64, True), plan.visible_pairs(64, 64, True, 16)
    groups = planned(ATTN_WINDOW="16", ATTN_WINDOW_LAYERS="0,2")["groups"]
    for name in ("attention forward", "attention backward"):
        share = groups[name]["flops"] / tiny["groups"][name]["flops"]
        assert share == pytest.approx((full + 2 * cut) / (3 * full))
    assert groups["products forward"] == tiny["groups"]["products forward"]


@pytest.mark.parametrize("settings, word", [
    ({"EVAL_BUDGET_SECONDS": "1"}, "EVAL_BUDGET_SECONDS=1"),
    ({"ARTIFACT_BUDGET_BYTES": "1000"}, "ARTIFACT_BUDGET_BYTES=1000"),
    ({"MAX_WALLCLOCK_SECONDS": "0.001"}, "MAX_WALLCLOCK_SECONDS=0.001"),
])
def test_a_limit_that_does_not_hold_is_said_and_is_the_exit_code(settings, word, capsys):
    assert plan.run(options(settings=settings)) == plan.BROKEN == 3
    broken = re.findall(r"^BROKEN: (\S+):", capsys.readouterr().out, re.M)
    assert broken == [word]


def test_json_and_table_say_the_same(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert plan.run(options(json=str(path))) == 0
    text, found = capsys.readouterr().out, json.loads(path.read_text())
    rows = {cells[0]: cells[1:] for cells in
            (re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines() if line.startswith("| "))}
    for name, row in found["groups"].items():
        assert rows[name][0] == f"{row['flops'] / 1e12:.4g}" and rows[name][4] == f"{row['ms']:.2f}"
    assert rows["**all**"][4] == f"{sum(row['ms'] for row in found['groups'].values()):.2f}"
    assert f"{found['ms_per_step']:.1f} ms a step, MFU {found['mfu']:.3f}" in text

    for row in found["passes"]:
        assert rows[row["pass"]][-1] == f"{row['seconds']:.1f}"
    assert f"{found['sizes']['model']:,}" in text and "BROKEN" not in text


def test_the_rules_of_a_run_set_its_steps():
    assert plan.run_length(0.0, [(1.0, 1.0)], 7) == (7, [1.0])
    assert plan.run_length(100.0, [(1.0, 1.0)], 7) == (7, [1.0])
    steps, shares = plan.run_length(100.0, [(1.0, 0.5), (4.0, 0.5)], 1000)  # half of the time each
    assert steps == 62 and shares == pytest.approx([0.8, 0.2])


def test_what_the_caller_can_mend_is_one_line():
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "--plan", "--card", "b200"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: --card b200: h100, h200, a100, 4090 or cpu\n"


@pytest.mark.parametrize("word", ["NUM_LAYERS", "num_layers=3", "=3"])
def test_a_word_that_is_no_setting(word):
    with pytest.raises(Misuse, match=f"'{word}' is no setting: NAME=VALUE"):
        plan.parse_settings(["MODEL_DIM=64", word])


@pytest.mark.parametrize("changes, message", [
    ({"NUM_LAYER": "3"}, "NUM_LAYER is no setting"), ({"NUM_LAYERS": "x"}, "NUM_LAYERS='x' is not accepted"),
    ({"NUM_HEADS": "5"}, "NUM_HEADS=5"),
])
def test_settings_that_a_script_refuses(changes, message):
    with pytest.raises(Misuse, match=re.escape(message)):
        planned(**changes)


@pytest.mark.parametrize("record, settings", [
    ("BytePPM", {"NUM_LAYERS": "2", "NGRAM_ORDERS": "0"}),
    ("ByteBest", {"NUM_LAYERS": "2", "NGRAM_ORDERS": "0"}),
    ("BytePatchJEPA", {"NUM_LAYERS": "2", "XSA_LAST_N": "1"}),
    ("SGJM", {"NUM_LAYERS": "5"}),
])
def test_records_whose_models_differ_have_plans(record, settings):
    found = plan.make_plan(find_script(record), settings, "h100", 8)
    groups = found["groups"]
    assert all(groups[name]["ms"] > 0 for name in plan.GROUPS)
    backward = groups["products backward"]["flops"] / groups["products forward"]["flops"]
    assert backward == pytest.approx(2, rel=0.2)
    assert 0 < found["mfu"] < 1 and found["sizes"]["model"] > 0

    mixture = next(row["mixture"] for row in found["passes"] if row["pass"].endswith("sliding"))
    assert (mixture > 0) == (record in ("BytePPM", "ByteBest"))
    passes = [row["pass"].rpartition("_")[2] for row in found["passes"]]
    learns = record in ("ByteBest", "BytePatchJEPA")
    assert passes == ["raw", "ema", "roundtrip", "sliding"] + ["ttt"] * learns


def test_the_published_script_is_planned_near_its_published_step():
    """#832 by its design in our frame: 63.1 ms in three logs; its 60 without JEPA have fitted one number."""
    found = plan.make_plan(find_script("ByteJEPA"), {"JEPA_CHUNK_SIZE": "8"}, "h100", 8)
    assert 57 < found["ms_per_step"] < 66


def test_adapters_of_documents_cost_by_the_chunk():
    """Each chunk is a window read and learned from: half as long, they are twice as many."""
    script, seconds = find_script("ByteBest"), {}
    for chunk in (128, 256):
        found = plan.make_plan(script, {"NUM_LAYERS": "2", "TTT_DOC_CHUNK": str(chunk)}, "h100", 8)
        row = found["passes"][-1]
        assert row["pass"].endswith("ttt") and row["forward"] == 0 and row["mixture"] > 0
        seconds[chunk] = row["updates"]
    assert seconds[128] == pytest.approx(2 * seconds[256], rel=0.15)
    eager = plan.make_plan(script, {"NUM_LAYERS": "2", "TTT_DOC_CHUNK": "256", "COMPILE": "0"}, "h100", 8)
    assert eager["passes"][-1]["updates"] == seconds[256]  # a document's shapes are its own: never compiled
    control = plan.make_plan(script, {"NUM_LAYERS": "2", "TTT_ADAPT": "0"}, "h100", 8)["passes"][-1]
    assert control["pass"].endswith("ttt_off") and 0 < control["updates"] < seconds[256]


def test_bits_of_a_rounded_normal():
    for k, top in ((4, 127), (6, 127), (4, 31)):  # fine steps: a normal's own entropy less the step's
        wanted = 0.5 * math.log2(2 * math.pi * math.e) + math.log2(top / k)
        assert rate.rounded_bits(k, top) == pytest.approx(wanted, abs=0.01)
    assert rate.rounded_bits(1e3, 1) < 1e-9  # all are zero


def test_the_mixtures_rate_is_the_callers_or_the_records():
    script, args = find_script("BytePPM"), SimpleNamespace(mix="binary", ppm_weight=1.0)
    assert plan.mixture_seconds(script, args, 10, 2.0) == pytest.approx(75.54, abs=0.01)
    rows = json.loads((script.parent / "measured/mixtures.json").read_text())["rows"]
    for mix in ("binary", "ppm"):
        rate, = (float(row[-1]) for row in rows if f"(`MIX={mix}`)" in row[0])
        found = plan.mixture_seconds(script, SimpleNamespace(mix=mix, ppm_weight=1.0), 10, 0.0)
        assert found == pytest.approx(plan.VAL_BYTES / 1e6 / rate)
    best = find_script("ByteBest")
    told = json.loads((best.parent / "measured/kernels.json").read_text())
    micros = told["score_us_new"]["median"] + told["distil_us_new"]["median"]
    assert plan.mixture_seconds(best, SimpleNamespace(ppm_weight=1.0), 10**6, 0.0) == pytest.approx(micros)
    assert plan.mixture_seconds(script, SimpleNamespace(mix="binary", ppm_weight=0.0), 10, 2.0) == 0
    assert plan.mixture_seconds(TRUNK, SimpleNamespace(), 10, 2.0) == 0


def test_the_mixtures_rate_is_the_parents_where_a_record_has_none(tmp_path):
    parent, child = find_script("BytePPM"), tmp_path / "train_gpt.py"
    child.write_bytes(parent.read_bytes())
    about = {"parent": str(parent.parent.relative_to(ROOT))}
    (tmp_path / "submission.json").write_text(json.dumps(about))
    args = SimpleNamespace(mix="binary", ppm_weight=1.0)
    assert plan.mixture_seconds(child, args, 10, 0.0) == plan.mixture_seconds(parent, args, 10, 0.0)


@pytest.mark.parametrize("streams, threads, network, mixture, wanted", [
    (1, 0, 100, 80, (80, 100)),  # hidden under the network
    (1, 0, 100, 160, (160, 160)),  # one stream is one thread's, whatever there is
    (8, 1, 100, 160, (20, 107.5)),  # eight ranks: the last run is read from 87.5 s on
    (8, 2, 100, 160, (20, 107.5)),
    (32, 1, 10, 320, (40, 40)),  # four runs a thread
    (3, 1, 10, 300, (100, 10 * 2 / 3 + 100)),
])
def test_runs_of_a_mixture_go_to_ranks_and_threads_while_the_network_reads(
    streams, threads, network, mixture, wanted
):
    args = SimpleNamespace(mix_streams=streams, mix_threads=threads)
    assert plan.mixed_seconds(network, mixture, args, 8) == pytest.approx(wanted)
    assert plan.mixed_seconds(network, mixture, SimpleNamespace(), 8) == (mixture, network + mixture)


def test_this_machine_prices_what_it_has_measured(monkeypatch):
    monkeypatch.setattr(plan.Cpu, "SECONDS", 0.002)
    found = planned(card="cpu", ranks=0)
    assert found["world_size"] == 1 and found["card"].startswith("cpu") and not found["compiled"]
    assert all(math.isfinite(row["ms"]) for row in found["groups"].values())
    assert {"products of the model's shapes", "copy", "attention, head 8, forward"} <= {
        row[0] for row in found["rates"]}
    assert not any("memory" in item["what"] for item in found["checks"])  # no card, no room to fill


def test_what_an_exporter_adds_is_planned():
    """TokenBest: 64 columns of its embedding with 8 bits for 7, and a product of rank 4 for it, 4 bits a
    number; the trunk adds nothing."""
    section = load_script(find_script("TokenBest"))
    args = section.Hyperparameters({"PPM_WEIGHT": "0", "TOKENIZER_PATH": "x"})
    with torch.device("meta"):
        model = section.GPT(args)
    rows, columns = model.tok_emb.weight.shape
    wanted = (64 * rows * (8 - 7) + 4 * (rows + columns) * 4) / 8
    assert plan.corrections(section, model, args) == wanted
    args.awq_groups = args.lqer_top_k = 0
    assert plan.corrections(section, model, args) == 0
    assert plan.corrections(load_script(TRUNK), model, SimpleNamespace()) == 0


# --- Documents ---


def test_documents_have_the_contests_mean_and_a_long_tail():
    whole, cut = plan.document_lengths(plan.VAL_TARGETS), plan.document_lengths(plan.VAL_TARGETS, 2000)
    assert len(whole) == plan.VAL_DOCUMENTS and abs(whole.sum() / plan.VAL_TARGETS - 1) < 1e-3
    assert whole.min() >= 1 and np.log(whole).std() == pytest.approx(plan.SPREAD, rel=0.02)
    assert cut.sum() == whole.sum() and cut.max() == 2000 and cut.min() >= 1
    assert len(cut) == (-(-whole // 2000)).sum()


@pytest.mark.parametrize("name", ["ByteBest", "TokenBest"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_documents_take_the_steps_that_the_script_takes(name, ranks):
    """The plan's count of chunks, by rank, documents alive and place, is that of the record's own loop."""
    section = load_script(find_script(name))
    lengths = np.random.default_rng(2).integers(1, 90, 70)
    ids = np.full(lengths.sum() + 1, 4)
    ids[np.cumsum([0, *lengths[:-1]])] = section.BOS_ID
    args = SimpleNamespace(doc_chunk=8, ttt_doc_chunk=8, ttt_doc_tokens=50, vocab_size=5)
    model = SimpleNamespace(args=args, tok_emb=SimpleNamespace(weight=torch.zeros(1)))
    together, batch, found = name == "ByteBest", 2, []

    for rank in range(ranks):
        steps, runtime = Counter(), SimpleNamespace(rank=rank, world_size=ranks)

        def chunk(adapters, ids, alive, done, length, steps=steps):
            steps[len(alive), done] += 1
            part = torch.zeros(len(alive), 8, 5)
            return part if together else (part, part[..., 0])

        learner = section.TestTimeTraining(model, runtime) if together else section.TestTimeTraining(model)
        learner.adapt_chunk = chunk
        learner.gathered = lambda part, ranks: part.repeat_interleave(ranks, 0)
        many = batch * ranks if together else batch
        reading = section.WindowPlan(64, 16, many, rank, ranks)
        if together:
            blocks = learner.by_document(ids, reading)
        else:
            blocks = learner.by_document(ids, reading, lambda first, stop, blocks: list(blocks))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(section, "Adapters", lambda model, documents: None)
            assert sum(stop - first for first, stop, *_ in blocks) > 0
        found.append(steps)

    if together:  # longer ones are cut
        lengths = np.concatenate([np.diff(np.append(np.arange(0, n, 50), n)) for n in lengths])
    groups = plan.adapter_steps(lengths, 8, batch, ranks, section.TestTimeTraining.GROUP, together)
    for rank, steps in enumerate(found[:1] if together else found):
        planned = sum((Counter(group[rank]) for group in groups), Counter())
        assert planned == steps
