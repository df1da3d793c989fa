"""The MLX twin against the trunk in one process: the same
weights give the same logits, losses, gradients, steps, files."""

import ast
import itertools

import generate
import lineage
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    assert_drafts_follow_score,
    assert_stream_follows_score,
    mlx_or_skip,
    trainers_alike,
)
from symbols import Script

mlx_or_skip()
import mlx.core as mx  # noqa: E402

SWITCHES = [
    {},
    {"DRAFT": 3},
    {"DOC_MASK": 1, "NGRAM_WORDS": 0, "NGRAM_HASHES": 4},
    {"XSA_LAST_N": 0, "UNET_SKIPS": 0, "RESID_MIX": 0, "SMEAR_GATE": 0},
    {"LOGIT_SOFTCAP": 0, "JEPA_CHUNK_SIZE": 0, "NGRAM_ORDERS": 0, "DRAFT": 2},
    {
        "EVAL_SEQ_LEN": 128, "LN_SCALE": 0, "ROPE_DIMS": 0, "LEAKY_SLOPE": 0,
        "NGRAM_WORDS": 1,
    },
    {
        "ATTENTION": "math", "NUM_KV_HEADS": 4, "MLP_MULT": 1.5, "NUM_LAYERS": 2, "XSA_LAST_N": 1,
        "ROPE_BASE": 500,
    },
]


def named(switches: dict) -> str:
    return ",".join(f"{key}={value}" for key, value in switches.items()) or "all on"


def text(rows: int, length: int) -> torch.Tensor:
    """Ids of every kind, with documents that begin inside a row."""
    ids = torch.randint(0, 260, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[0, length // 3], ids[1, 0], ids[-1, length // 2] = 1, 1, 1
    return ids


def numpy(x) -> np.ndarray:
    return x.detach().numpy() if isinstance(x, torch.Tensor) else np.array(x)


def array(x) -> mx.array:
    return mx.array(numpy(x))


@pytest.mark.parametrize("switches", SWITCHES, ids=named)
def test_logits_losses_and_gradients(pair, twin, switches):
    model, other = pair(**switches)
    ids, take = text(4, 65), torch.tensor([0, 10, 20, 48])
    with torch.no_grad():
        logits = model.logits(ids[:, :-1], take, 16).numpy()
    found = np.array(other.logits(array(ids[:, :-1]), array(take), 16))
    assert np.abs(found - logits).max() < 2e-5 and np.abs(logits).max() > 0.5
    weights = torch.tensor([1.0, 1.0, 0.5, 0.5])  # a group's rows have the same
    inputs = model.aux.inputs(3, ids.device) if model.aux is not None else None
    sums = model.losses(ids, weights, inputs)
    trained = sorted(name for name, value in sums.items() if value.requires_grad)
    sum(i * sums[name] for i, name in enumerate(trained, 1)).backward()
    shares = {name: mx.array(float(i)) for i, name in enumerate(trained, 1)}
    others, grads = twin.training_gradients(
        other, other.named_parameters(), shares, array(ids), array(weights),
        array(inputs) if inputs is not None else None)
    assert {name: float(value.detach()) for name, value in sums.items()} == pytest.approx(
        {name: value.item() for name, value in others.items()}, rel=1e-5)
    for name, p in model.named_parameters():
        wanted = np.zeros(p.shape) if p.grad is None else p.grad.numpy()
        assert np.abs(np.array(grads[name]) - wanted).max() <= 2e-5 * max(np.abs(wanted).max(), 1e-3), name


def test_long_rows_turn_by_the_same_angles(trunk, twin):
    """Positions near the contest's 4,096: nn.RoPE's own frequencies would be off by more than 1e-4 there."""
    args, mine = (script.Hyperparameters({"ROPE_DIMS": "0", "NUM_HEADS": "8"}) for script in (trunk, twin))
    x = torch.randn(1, 4096, 1, 64, generator=torch.Generator().manual_seed(0))
    wanted = trunk.rotate(x, trunk.rotary_tables(4096, args)).transpose(1, 2).numpy()
    tables, rows = twin.rotary_tables(4096, mine), array(x.transpose(1, 2))
    assert np.abs(np.array(twin.rotate(rows, tables)) - wanted).max() < 2e-3
    tail = twin.rotate(rows[:, :, 4000:], tables, 4000)
    assert np.abs(np.array(tail) - wanted[:, :, 4000:]).max() < 2e-3


# Adam's first step is lr * g / (|g| + eps): with the default of
# 1e-8, noise in a gradient of 1e-9 would be a step of its own.
EPS = {"ADAM_EPS": 1e-5}
TRAINED = {
    **EPS, "DRAFT": 2, "JEPA_PHASE1_FRAC": 0, "JEPA_LAMBDA_MAX": 0.1,
    "DEVICE_BATCH_TOKENS": 256,
}


@pytest.fixture
def trainers(trunk, twin, pair):
    """trainers(VAR=value, ...) -> trainers of both from the
    same weights, the twin with the trunk's SIGReg directions."""

    def trainers(log=print, **overrides):
        settings = {**TINY, **{key: str(value) for key, value in overrides.items()}}
        return trainers_alike((trunk, twin), pair(**overrides), (settings, settings), log)

    return trainers


def weights(trainer) -> dict[str, np.ndarray]:
    named = trainer.model.named_parameters()
    return {name: numpy(p).copy() for name, p in dict(named).items()}


@pytest.mark.parametrize("overrides", [
    TRAINED,
    {
        **EPS, "GRAD_CLIP_NORM": 0, "JEPA_CHUNK_SIZE": 0, "TIED_EMBED_LR": 0.1, "ADAM_WD": 0.5,
        "MUON_WD": 0.5,
    },
], ids=named)
def test_steps_move_weights_averages_and_moments_alike(trainers, overrides):
    both = trainers(**overrides)
    assert [trainer.plan for trainer in both][0] == both[1].plan and both[0].plan.micro_steps in (1, 2)
    shape = (both[0].plan.micro_steps, both[0].plan.groups * both[0].plan.group, 65)
    for step in range(2):
        ids = torch.randint(4, 260, shape, generator=torch.Generator().manual_seed(step))
        before = weights(both[0])
        mine, theirs = (trainer.train_step(convert(ids), convert(torch.ones(shape[:2])), 0.4)
                        for trainer, convert in zip(both, (lambda x: x, array)))
        assert {name: float(value) for name, value in mine.items()} == pytest.approx(theirs, rel=1e-5)
        for trainer in both:
            trainer.step += 1
        for name, p in weights(both[0]).items():
            assert np.abs(p - weights(both[1])[name]).max() < 1e-4, (step, name)
            assert np.abs(p - before[name]).max() > 1e-6 or name.startswith("draft") and not step, (
                step,
                name,
            )
        averages = zip(both[0].ema.average, both[1].ema.average.values())
        assert all(np.abs(numpy(a) - numpy(b)).max() < 1e-4 for a, b in averages)
    states = [trainer.optimizers.state() for trainer in both]
    assert set(states[0]) == set(states[1])  # a checkpoint of one is a checkpoint of the other
    for name, value in states[0].items():
        assert np.abs(value.numpy() - np.array(states[1][name])).max() < 1e-4, name


def test_fifty_steps_end_at_the_same_loss(trunk, trainers, corpus):
    both = trainers(
        NUM_LAYERS=2, MODEL_DIM=64, ITERATIONS=50, WARMDOWN_ITERS=20,
        NGRAM_ORDERS="2,3", NGRAM_WORDS=0, JEPA_PHASE1_FRAC=0, TRAIN_SEQ_LEN=32,
        TRAIN_BATCH_TOKENS=256, DATA_PATH=corpus,
    )
    data = trunk.Dataset(both[0].args, verify=False)
    loader, losses = trunk.Loader(data, both[0].args, both[0].plan, 0), []
    for _ in range(50):
        ids, rows, _ = loader.next()
        pairs = [trainer.train_step(convert(ids), convert(rows), trainer.progress())
                 for trainer, convert in zip(both, (lambda x: x, array))]
        losses.append([float(terms["ce"]) / 256 for terms in pairs])
        for trainer in both:
            trainer.step += 1
    losses = np.array(losses)
    assert losses[-5:, 0].mean() < losses[0, 0] - 1.5  # it learned something
    assert np.abs(losses[:, 0] - losses[:, 1]).max() < 0.01


def test_compiled_steps_are_the_eager_ones(twin, tracing):
    """Rates, momentum, weights of the losses and SIGReg's directions
    change from step to step; the graph does not."""
    found = []
    for compile in ("0", "1"):
        args = twin.Hyperparameters(
            {
                **TINY, **{key: str(value) for key, value in TRAINED.items()}, "COMPILE": compile,
                "JEPA_PHASE2_FRAC": "0.7",
            }
        )
        trainer = twin.Trainer(args, None, twin.Runtime(args), print)
        shape, sums = (trainer.plan.micro_steps, trainer.plan.groups * trainer.plan.group), []
        assert shape[0] == 2
        for step, progress in enumerate((0.0, 0.4, 0.8)):
            ids = torch.randint(4, 260, (*shape, 65), generator=torch.Generator().manual_seed(step))
            sums.append(trainer.train_step(array(ids), mx.ones(shape), progress))
            trainer.step += 1
        scores = trainer.logits(trainer.model, array(text(2, 64)), mx.zeros(2, mx.int32), 16)
        found.append((sums, weights(trainer) | trainer.optimizers.state() | {"scores": scores}))
    assert sorted(tracing) == [1, 3, 6]  # scoring, the optimizers' step, gradients of six micro-batches
    for mine, theirs in zip(found[0][0], found[1][0]):
        assert mine == pytest.approx(theirs, rel=1e-6)
    for name, value in found[0][1].items():
        assert np.allclose(np.array(value), np.array(found[1][1][name]), rtol=1e-5, atol=1e-7), name


def test_what_does_not_compile_runs_eagerly_and_says_so(twin, monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(twin.mx, "compile", lambda method: broken)
    args, lines = twin.Hyperparameters({**TINY, "COMPILE": "1"}), []
    trainer = twin.Trainer(args, None, twin.Runtime(args), lines.append)
    before = weights(trainer)
    trainer.warm_up()
    assert lines == ["compile: failed (RuntimeError), running eager"]
    assert all(np.array_equal(p, before[name]) for name, p in weights(trainer).items())
    trainer.train_step(array(text(4, 65))[None], mx.ones((1, 4)), 0.0)
    assert not np.array_equal(weights(trainer)["tok_emb.weight"], before["tok_emb.weight"])


def peak(work, *given) -> int:
    """Bytes that MLX holds at most during a piece of work, beyond those before it."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    work(*given)
    return mx.get_peak_memory() - before


def test_memory_is_that_of_one_micro_batch_and_of_one_batch_of_windows(twin):
    """The peak of one step moves by a tenth on a busy machine (what
    is freed when is MLX's own time): the highest of eight is held to."""
    peaks = {}
    for micro_steps, micro_rows in ((2, 4), (8, 4), (1, 32)):
        args = twin.Hyperparameters({**TINY, "TRAIN_BATCH_TOKENS": str(64 * micro_steps * micro_rows),
                                     "DEVICE_BATCH_TOKENS": str(64 * micro_rows)})
        trainer = twin.Trainer(args, None, twin.Runtime(args), print)
        ids = mx.random.randint(4, 260, (micro_steps, micro_rows, 65))
        rows = mx.ones((micro_steps, micro_rows))
        trainer.train_step(ids, rows, 0.0)
        peaks[micro_steps] = max(peak(trainer.train_step, ids, rows, 0.0) for _ in range(8))
    assert peaks[8] < 1.05 * peaks[2] and peaks[8] < peaks[1] / 4  # peaks[1]: the same rows in one piece
    sizes, trainer.args.val_bytes = [], 0
    for targets in (400, 2000):
        data = type(
            "Data",
            (),
            {"val": np.random.default_rng(0).integers(4, 260, targets + 1), "val_files": ["val"]},
        )
        evaluator = twin.Evaluator(trainer.args, data, trainer.runtime, twin.Log(None))
        trainer.args.eval_batch_tokens = 256
        sizes.append(peak(evaluator.run, "raw", trainer.model, 64, 16))
        assert evaluator.results["raw"]["targets"] == targets
    assert 0 < sizes[1] < 1.05 * sizes[0]


def test_batches_come_ahead_and_in_order(trunk, twin, corpus):
    settings = {**TINY, "DATA_PATH": str(corpus), "TRAIN_ORDER": "shuffled", "DEVICE_BATCH_TOKENS": "256"}
    loaders = []
    for script in (trunk, twin):
        args = script.Hyperparameters(settings)
        loaders.append(
            script.Loader(
                script.Dataset(args, verify=False), args, script.BatchPlan.make(args, 1), 0
            )
        )
    ahead = loaders[1].prefetch()
    for _ in range(4):
        ids, rows, state = loaders[0].next()
        found = next(ahead)
        assert np.array_equal(numpy(ids), found[0])
        assert np.array_equal(numpy(rows), found[1])
        assert state == found[2]
    ahead.close()
    assert loaders[1].state != state  # it read on while the others were used


def test_one_compiled_graph_serves_every_model(twin):
    """A model that needs few kernels: MLX's CPU build asks a C++ compiler for each, a second or so."""
    settings = {
        **TINY, "NUM_LAYERS": "1", "NGRAM_ORDERS": "0",
        "JEPA_CHUNK_SIZE": "0", "SMEAR_GATE": "0", "XSA_LAST_N": "0", "RESID_MIX": "0",
        "UNET_SKIPS": "0", "LOGIT_SOFTCAP": "0", "LN_SCALE": "0",
    }
    models = [twin.GPT(twin.Hyperparameters(settings)) for _ in range(2)]
    for seed, model in enumerate(models):
        model.init_weights(seed)
    graph, ids, take = twin.compiled(twin.scoring_logits), array(text(2, 16)), mx.zeros(2, mx.int32)
    kept = models[0].tok_emb.weight
    logits = [np.array(graph(model, ids, take, 16)) for model in (*models, models[0])]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3 and np.array_equal(logits[0], logits[2])
    for model, found in zip(models, logits):
        assert np.allclose(found, twin.scoring_logits(model, ids, take, 16), atol=1e-5)
    assert models[0].tok_emb.weight is kept  # tracing leaves the arrays where they were


# --- Files ---


def plain(script) -> dict[str, str]:
    return {name: symbol.text for name, symbol in script.by_name.items()}


SHARED = """UserError Var Var.__init__ Var.__set_name__ Var.accepted Var.convert Var.parse
    TENSOR_CLASSES CHECKS check forbid Hyperparameters Hyperparameters.jepa_phase1_frac
    Hyperparameters.jepa_phase2_frac Hyperparameters.beta1 Hyperparameters.beta2
    Hyperparameters.RETIRED Hyperparameters.FIELD Hyperparameters.__init__ Hyperparameters.vars
    Hyperparameters.help Hyperparameters.settings Hyperparameters.shipped
    Hyperparameters._refuse_retired_and_misspelt Hyperparameters._parse_numbers
    Hyperparameters._parse_classes write_atomic Runtime Runtime.clock Log Log.__init__
    Log.__call__ Log.metrics SHARD_MAGIC SHARD_VERSION HEADER_BYTES PAD_ID BOS_ID
    BYTE_OFFSET BYTE_CLASSES check_ids open_shard sha256_file Dataset Dataset.__init__
    Dataset._read_manifest Dataset._verify Dataset.fingerprint open_tokenizer byte_tables
    target_bytes class_table check_batch BatchPlan BatchPlan.make BatchPlan.slots Loader
    Loader.__init__ Loader.order Loader._next_rows SMALL_TENSOR SCALE_FLOOR
    tensor_class quant_plan nearest cheapest gptq quantise CastedLinear.__init__
    LatentMLP.__init__ check_jepa ChunkJEPA.weights ChunkJEPA.report
    ChunkJEPA.first_read check_draft DraftHeads.__init__ KVCache KVCache.cut check_heads
    MLP.__init__ in_word check_ngrams HashEmbedding.WORD_REACH GPT.hidden rate_at RowAdagrad
    Optimizers.GROUPS EMA ARTIFACT_MAGIC ARTIFACT_VERSION CHUNK CONTEXT_EDGES CONTEXT_LEVELS Plane
    planes fresh_counts code_slices code_plane code_planes rans_encode rans_decode COMPRESSORS
    pack unpack_tensors unpack shipped_settings read_file check_windows windows WindowPlan
    check_ttt TestTimeTraining TestTimeTraining.rows TestTimeTraining.catch_up Evaluator
    Evaluator.describe Evaluator.report Stream Stream.__init__ Stream.logprobs
    Stream.push stream Stopped run_folder Trainer
    Trainer.CHECKPOINTED Trainer.progress Trainer.not_finite Trainer.timing
    Trainer.means Trainer.log_step Trainer.validate Trainer.log_validation git_commit
    run_until_done PROGRESS_SECONDS"""


def test_what_needs_no_framework_is_the_trunks_byte_for_byte():
    trunk, twin = (plain(Script.read(ROOT / name)) for name in ("train_gpt.py", "train_gpt_mlx.py"))
    assert not {name for name in SHARED.split() if trunk[name] != twin.get(name)}


def test_the_twin_keeps_the_frame_and_imports_no_torch():
    source = (ROOT / "train_gpt_mlx.py").read_text()
    imported = {alias.name.partition(".")[0] for node in ast.walk(ast.parse(source))
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module)])}
    assert not imported & {"torch", "transformers", "jax", "tensorflow"} and "mlx" in imported
    trunk, twin = (Script.read(ROOT / name) for name in ("train_gpt.py", "train_gpt_mlx.py"))
    shared = [key for key in twin.by_name if key in trunk.by_name]
    assert shared == [key for key in trunk.by_name if key in twin.by_name]  # the same order
    assert len(shared) > 0.85 * len(trunk.by_name)


def test_twins_keep_the_rules_of_the_house():
    twins = [ROOT / "train_gpt_mlx.py", *ROOT.glob("records/*/train_gpt_mlx.py")]
    findings = [finding for path in twins for finding in lineage.check(path)]
    assert len(twins) > 1 and len(findings) >= 8 * len(twins)
    assert all(finding.level == "PASS" for finding in findings), [
        str(f) for f in findings if f.level != "PASS"
    ]


def test_both_know_the_same_variables(trunk, twin):
    ours, theirs = (script.Hyperparameters.vars() for script in (trunk, twin))
    assert set(theirs) - set(ours) == {"memory_limit_mb"}
    assert set(ours) - set(theirs) == {"rank", "local_rank", "master_addr", "master_port"}
    assert all(theirs[name].default == var.default and theirs[name].ship == var.ship
               for name, var in ours.items() if name in theirs)


@pytest.mark.parametrize("settings", [
    {}, {"QUANT_ROUND": "nearest", "COMPRESSOR": "rans"},
    {"QUANT_RATE": "ngram:0.3", "BITS": "mlp:4,ngram:3", "COMPRESSOR": "lzma", "DRAFT": 1}], ids=named)
def test_the_same_weights_pack_to_the_same_bytes_and_score_alike(
    trunk, twin, pair, settings, corpus, tmp_path, monkeypatch
):
    for script in (trunk, twin):  # the header says which script packed
        monkeypatch.setattr(script, "sha256_file", lambda path: "0" * 64)
        monkeypatch.setattr(script, "__doc__", "A script: this one.")
    model, other = pair(**settings)
    hessians = {}
    if settings == {}:  # GPTQ too, given the same moments
        inputs = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
        hessians = {name: inputs.T @ inputs for name, p in model.named_parameters()
                    if p.ndim == 2 and p.shape[1] == 32}
    blobs = [script.pack({name: numpy(p) for name, p in source.exported().items()},
                         source.args, hessians) for script, source in ((trunk, model), (twin, other))]
    assert blobs[0] == blobs[1]
    path = tmp_path / "artifact.bin"
    path.write_bytes(blobs[1])
    ids = np.fromfile(next(corpus.glob("*_val_*.bin")), "<u2", offset=1024)[:300].astype(np.int64)
    for ttt in ("0", "sgd"):
        nats = []
        for script in (trunk, twin):
            header, _ = script.unpack(path.read_bytes(), str(path))
            args = script.shipped_settings(
                header,
                str(path),
                {
                    "TTT": ttt, "TTT_CHUNK_TOKENS": "64", "TTT_LR": "0.05", "TTT_BATCH_ROWS": "2",
                    "EVAL_STRIDE": "16",
                },
            )
            nats.append(script.score(script.load(path, "cpu", args), ids)[0])
        bits = [part.sum() / np.log(2) / (len(ids) - 1) for part in nats]
        assert abs(bits[0] - bits[1]) < 1e-4 and np.abs(nats[0] - nats[1]).max() < 1e-3


def test_checkpoints_go_both_ways_and_mistakes_are_told(trunk, twin, trainers, tmp_path):
    """A checkpoint of either is restored by both to the same arrays, and a step from there is the same."""
    settings = {**TRAINED, "RUNS_PATH": tmp_path, "RUN_ID": "a"}
    shape, paths = (2, 4, 65), {}
    for script, trainer in zip((trunk, twin), trainers(**settings)):
        ids = torch.randint(4, 260, shape, generator=torch.Generator().manual_seed(0))
        convert = array if script is twin else lambda x: x
        trainer.train_step(convert(ids), convert(torch.ones(shape[:2])), 0.4)
        trainer.step, trainer.seconds, trainer.best, trainer.loader_state = (
            1,
            2.5,
            3.5,
            {"epoch": 0, "shard": 0, "row": 8},
        )
        trainer.save("last")
        paths[script] = (tmp_path / "a/last.safetensors").rename(tmp_path / f"{script.__name__}.safetensors")
    for path in paths.values():
        found = []
        for script, trainer in zip((trunk, twin), trainers(log=lambda _: None, **settings)):
            trainer.restore(path)
            assert (trainer.step, trainer.seconds, trainer.best, trainer.loader_state["row"]) == (
                1,
                2.5,
                3.5,
                8,
            )
            averages = trainer.ema.average if script is trunk else trainer.ema.average.values()
            moments = [value for _, value in sorted(trainer.optimizers.state().items())]
            kept = [
                numpy(value).copy()
                for value in (*dict(trainer.model.named_parameters()).values(), *averages, *moments)
            ]
            ids = torch.randint(4, 260, shape, generator=torch.Generator().manual_seed(1))
            convert = array if script is twin else lambda x: x
            trainer.train_step(convert(ids), convert(torch.ones(shape[:2])), 0.5)
            found.append((kept, weights(trainer)))
        assert len(found[0][0]) == len(found[1][0])
        assert all(np.array_equal(a, b) for a, b in zip(found[0][0], found[1][0]))
        assert all(np.abs(p - found[1][1][name]).max() < 1e-4 for name, p in found[0][1].items())
    trainer = trainers(**{**settings, "NUM_LAYERS": 2})[1]
    with pytest.raises(twin.UserError, match="made with NUM_LAYERS=3, not 2"):
        trainer.restore(paths[trunk])
    (tmp_path / "torn").write_bytes(paths[twin].read_bytes()[:1000])
    for name in ("torn", "none"):
        with pytest.raises(twin.UserError, match=f"{name}: not a checkpoint of this script"):
            trainer.restore(tmp_path / name)


def test_a_checkpoint_has_the_random_state_that_torch_asks_for(twin):
    for seed in (0, 1337, 2**40 + 7):
        assert np.array_equal(
            twin.torch_rng_state(seed), torch.Generator().manual_seed(seed).get_state().numpy()
        )


# --- Scoring and decoding ---


@pytest.mark.parametrize(
    "switches",
    [{}, {"DOC_MASK": 1, "JEPA_CHUNK_SIZE": 0}, {"TTT": "sgd", "TTT_CHUNK_TOKENS": 32},
     {"ATTN_WINDOW": 5, "ATTN_WINDOW_LAYERS": "0"}],
    ids=named,
)
def test_the_stream_has_the_scorers_distributions(pair, twin, corpus, switches):
    ids = np.fromfile(next(corpus.glob("*_val_*.bin")), "<u2", offset=1024)[:90].astype(np.int64)
    ids[40] = 1
    _, model = pair(**switches)
    stream = assert_stream_follows_score(twin, model, ids)
    assert (stream.learner.updates if stream.learner else 0) == (1 if "TTT" in switches else 0)
    assert_drafts_follow_score(twin, model, ids)


def test_every_target_is_scored_once_and_causally(pair, twin):
    _, model = pair()
    ids = np.random.default_rng(0).integers(4, 260, 150)
    for length, stride in itertools.product((32, 64), (8, 16, 32)):
        count = np.zeros(len(ids) - 1, int)
        plan = twin.WindowPlan(length, stride, 4)
        for first, stop, logprobs, nats in twin.scored(model, ids, plan):
            count[first:stop] += 1
            assert logprobs.shape == (stop - first, 260) and len(nats) == stop - first
        assert (count == 1).all(), (length, stride)
    nats, _ = twin.score(model, ids)
    for t in (1, 17, 64, 149):
        changed = ids.copy()
        changed[t] = 4 + (changed[t] + 100) % 256
        moved = np.abs(twin.score(model, changed)[0] - nats)
        assert moved[: t - 1].max(initial=0) < 1e-5 and moved[t - 1] > 1e-6


def test_drafts_write_what_the_model_writes_and_what_the_trunk_writes(trunk, twin, pair):
    model, other = pair(DRAFT=3)
    prompt = [1, *range(60, 90)]
    for temperature in (0, 0.7):
        texts, law = [], generate.Law(1337, temperature)
        for script, source in ((trunk, model), (twin, other)):
            for speculate in (False, True):
                writer = generate.Writer(script, source, prompt, law, 24, speculate)
                texts.append((list(writer), writer.passes))
        assert all(made == texts[0][0] for made, _ in texts) and len(texts[0][0]) == 24
        assert texts[0][1] == texts[2][1] == 24 and texts[1][1] == texts[3][1] <= 24  # passes


def test_device_and_limits_are_the_runs_own(twin, monkeypatch):
    assert twin.pick_device("cpu") == mx.Device(mx.cpu)
    if not mx.is_available(mx.gpu):
        with pytest.raises(twin.UserError, match="DEVICE=gpu is not there: mlx .* sees cpu"):
            twin.pick_device("gpu")
    limits = {}
    for name in ("memory", "cache", "wired"):
        monkeypatch.setattr(twin.mx, f"set_{name}_limit", lambda size, name=name: limits.update({name: size}))
    args = twin.Hyperparameters({**TINY, "MEMORY_LIMIT_MB": "512", "DTYPE": "auto", "COMPILE": "auto"})
    runtime = twin.Runtime(args)
    assert limits == {"memory": 512 << 20, "cache": 256 << 20} and runtime.world_size == 1
    assert runtime.from_main([1 / 3, 2.0]) == [1 / 3, 2.0]
    assert runtime.dtype == mx.float32
    assert not runtime.compile
    # A Mac whose system keeps less resident than that
    monkeypatch.setattr(twin.mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(
        twin.mx,
        "device_info",
        lambda: {"max_recommended_working_set_size": 300 << 20, "device_name": "M"},
    )
    twin.Runtime(args)
    assert limits == {"memory": 512 << 20, "cache": 256 << 20, "wired": 300 << 20}
    runtime.device = mx.Device(mx.gpu)
    assert runtime._pick_dtype(args) == mx.bfloat16
    assert runtime._pick_compile(args)
    assert runtime.device_name() == "M"
