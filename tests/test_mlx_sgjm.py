"""SGJM's MLX twin against its torch script: the same settings, weights, files and texts."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, assert_stream_follows_score, environment, mlx_or_skip, trainers_alike
from family import load_script
from symbols import Script
from test_mlx_parity import array, named, numpy, plain
from test_mlx_runs import losses, scores
from test_sgjm import HYBRID, RECORD, ROPE, SMALL, section

mlx_or_skip()
import mlx.core as mx  # noqa: E402

TWIN = RECORD / "train_gpt_mlx.py"
gate_tool = load_script(RECORD / "gate.py")
NOTHING = dict.fromkeys(TINY, "")  # of the trunk's tiny model
BACKBONES = [{}, ROPE, {**HYBRID, "EXPORT_HEADS": 1}, {"ARCH": "baseline", "VOCAB_SIZE": 256}]


@pytest.fixture(scope="module")
def mlx():
    return load_script(TWIN)


def both(mlx, seed: int = 0, **overrides):
    """(torch's model, the twin's) of the same random
    weights, large enough that every path carries a signal."""
    settings = {key: str(value) for key, value in {**SMALL, "INIT_STD": 0.15, **overrides}.items()}
    model, other = (script.GPT(script.Hyperparameters(settings)) for script in (section, mlx))
    model.init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    arrays = {name: array(p) for name, p in model.named_parameters()}
    assert list(arrays) == list(other.named_parameters())
    mlx.update_parameters(other, arrays)
    return model.eval(), other


def text(rows: int = 4, length: int = 33) -> torch.Tensor:
    return torch.randint(4, 256, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("overrides", [*BACKBONES, {"HEADS_GRAD": 1, "HEAD_POSITIONS": 9}], ids=named)
def test_logits_losses_and_gradients(mlx, overrides):
    model, other = both(mlx, **overrides)
    ids, take, weights = text(), torch.tensor([0, 3, 9, 16]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    with torch.no_grad():
        logits = model.logits(ids[:, :-1], take, 16).numpy()
    assert np.abs(np.array(other.logits(array(ids[:, :-1]), array(take), 16)) - logits).max() < 1e-4
    inputs = model.aux.inputs(3, ids.device) if model.aux else None
    sums = model.losses(ids, weights, inputs)
    shares = {"ce": 0.01, **(model.aux.weights(0.0) if model.aux else {})}
    sum(share * sums[name] for name, share in shares.items()).backward()
    others, grads = mlx.training_gradients(
        other,
        other.named_parameters(),
        {name: mx.array(share) for name, share in shares.items()},
        array(ids),
        array(weights),
        array(inputs) if inputs is not None else None,
    )
    assert {name: float(value.detach()) for name, value in sums.items()} == pytest.approx(
        {name: value.item() for name, value in others.items()}, rel=1e-4, abs=1e-6)
    for name, p in model.named_parameters():
        wanted = np.zeros(p.shape) if p.grad is None else p.grad.numpy()
        assert np.abs(np.array(grads[name]) - wanted).max() <= 1e-4 * max(np.abs(wanted).max(), 1e-2), name


def both_trainers(mlx, **overrides) -> list:
    """Trainers of torch and of the twin from the same weights, with torch's draws of places for the heads."""
    settings = {key: str(value) for key, value in {**SMALL, **overrides, "ADAM_EPS": 1e-5, "WARMUP_STEPS": 0,
                                                   "MAX_WALLCLOCK_SECONDS": 0}.items()}
    return trainers_alike(
        (section, mlx),
        both(mlx, **overrides),
        ({**settings, "COMPILE": "0"}, settings),
        section.Log(None),
    )


@pytest.mark.parametrize("overrides", [{}, HYBRID], ids=named)
def test_steps_move_weights_averages_and_moments_alike(mlx, overrides):
    trainers = both_trainers(mlx, **overrides)
    for step in range(2):
        ids, ones = text()[None], torch.ones(1, 4)
        terms = trainers[0].train_step(ids, ones, 0.3), trainers[1].train_step(array(ids), array(ones), 0.3)
        assert float(terms[0]["ce"]) == pytest.approx(terms[1]["ce"], rel=1e-5)
        for trainer in trainers:
            trainer.step += 1
        for name, p in trainers[0].model.named_parameters():
            assert (
                np.abs(numpy(p) - np.array(trainers[1].model.named_parameters()[name])).max() < 1e-4
            ), (step, name)
        averages = zip(trainers[0].ema.average, trainers[1].ema.average.values())
        assert all(np.abs(numpy(a) - numpy(b)).max() < 1e-4 for a, b in averages)
    states = [trainer.optimizers.state() for trainer in trainers]
    assert set(states[0]) == set(states[1])
    assert all(
        np.abs(numpy(value) - np.array(states[1][name])).max() < 1e-4
        for name, value in states[0].items()
    )


def test_every_size_has_the_same_tensors_and_settings(mlx):
    for size in ("smoke", "25m", "25m-hybrid"):
        for arch in ("sgjm", "baseline"):
            env = {"SIZE": size, "ARCH": arch}
            with torch.device("meta"):
                model = section.GPT(section.Hyperparameters(env))
            other = mlx.GPT(mlx.Hyperparameters(env))  # lazy: nothing is computed
            shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
            assert shapes == {name: p.shape for name, p in other.named_parameters().items()}
    ours, theirs = (script.Hyperparameters.vars() for script in (section, mlx))
    assert set(theirs) - set(ours) == {"memory_limit_mb"}
    assert {name for name in ours if name not in theirs} == {
        "rank", "local_rank", "master_addr", "master_port", "eval_gate", "sgjm", "baseline",
        "gate_bench", "gate_batches", "gate_radius",
    }
    assert all(theirs[name].default == var.default and theirs[name].ship == var.ship
               for name, var in ours.items() if name in theirs)
    assert section.SIZES == mlx.SIZES


SHARED = """check forbid SIZES Hyperparameters.settings Dataset Dataset._open check_vocabulary
    Loader._next_rows BatchPlan.make tensor_class quant_plan nearest gptq quantise fresh_counts
    code_slices code_plane code_planes rans_encode rans_decode COMPRESSORS pack unpack
    unpack_tensors SpeculativeHeads.weights SpeculativeHeads.report check_drafter check_heads check_mamba
    check_positions settings_of windows Evaluator.report Draft SpeculationGraph.alike
    SpeculationGraph.choose SpeculationGraph.settle Place repeated nucleus chosen Generator.plan
    Generator.tree Generator.rows Generator.walk Generator.look_up Generator.write
    drafting_cost BASELINE_FF BEYOND Trainer.means Trainer._check_resumed
    Hyperparameters.learning Hyperparameters.resume_data"""


def test_what_needs_no_framework_is_the_torch_scripts_byte_for_byte():
    ours, theirs = (plain(Script.read(path)) for path in (RECORD / "train_gpt.py", TWIN))
    assert not {name for name in SHARED.split() if ours[name] != theirs.get(name)}
    assert len(TWIN.read_text().splitlines()) <= 3400


@pytest.mark.parametrize("overrides", BACKBONES[:3], ids=named)
def test_the_stream_has_the_scorers_distributions(mlx, overrides):
    _, model = both(mlx, **overrides)
    ids = numpy(text(1, 70))[0]
    assert_stream_follows_score(mlx, model, ids)


@pytest.mark.parametrize("overrides", BACKBONES[:3], ids=named)
def test_speculation_writes_what_plain_decoding_and_torch_write(mlx, overrides):
    model, other = both(mlx, **overrides, DRAFT_PRICE=0.01)
    prompt, texts = [1, *b"so it goes, and so it goes", *b" so it"], []
    for script, source in ((section, model), (mlx, other)):
        for speculate in (False, True):
            writer = script.Generator(source, prompt, 7, speculate, 0.0)
            texts.append((writer.write(40), int(writer.read[0])))
    assert len({written for written, _ in texts}) == 1 and texts[0][1] == texts[2][1] == 40
    assert texts[3][1] <= 40
    writer = mlx.Generator(other, prompt, 7, True, 0.8, 0.9)
    assert len(writer.write(20)) == 20 and writer.graph.counts["created"] > 0


def test_one_bench_measures_both_scripts(mlx, tmp_path, monkeypatch):
    """Checkpoints of one model: the same greedy texts, in as many passes; drafts cost the same share."""
    trainers = both_trainers(mlx, BLOCK_SIZE=4, RUNS_PATH=tmp_path, RUN_ID="a")
    trainers[0].save("final")
    timing, found = load_script(RECORD / "bench.py"), []
    assert section.drafting_cost(trainers[0].model) == mlx.drafting_cost(trainers[1].model)
    for script in (section, mlx):
        name = script.__name__  # a process keeps the folder of a run to its end
        given = {"RUNS_PATH": tmp_path, "RUN_ID": name}
        words = [str(tmp_path / "a/final.safetensors"), "so it goes, and so it goes", "--repeats", "1"]
        monkeypatch.setattr(timing, "beside", lambda name, script=script: script)
        monkeypatch.setattr(timing.os, "environ", {name: str(value) for name, value in given.items()})
        assert timing.main([*words, "--max-new-tokens", "20"]) == 0
        found.append(json.loads((tmp_path / name / "bench.json").read_text()))
    ours, theirs = (report["greedy"]["prompt"]["speculation"] for report in found)
    assert ours["bytes_per_pass"] == theirs["bytes_per_pass"] and ours["looping"] == theirs["looping"]
    assert found[0]["torch"] and found[1]["mlx"] and found[0]["script_sha256"] != found[1]["script_sha256"]


def step(trainer, progress: float = 0.3) -> None:
    convert = (lambda x: x) if isinstance(trainer, section.Trainer) else array
    trainer.train_step(convert(text()[None]), convert(torch.ones(1, 4)), progress)
    trainer.step += 1


def test_fifty_steps_end_at_the_same_loss(mlx):
    trainers, found = both_trainers(mlx, **HYBRID, ITERATIONS=50, WARMDOWN_ITERS=20, HEADS_GRAD=1), []
    words = np.frombuffer(
        b"so it goes, and so it went, and so it will go on; " * 20, np.uint8
    ).astype(np.int64)
    for i in range(50):
        ids = torch.from_numpy(
            np.stack([words[at : at + 33] for at in np.random.default_rng(i).integers(900, size=4)])
        )[None]
        terms = [trainer.train_step(convert(ids), convert(torch.ones(1, 4)), trainer.progress())
                 for trainer, convert in zip(trainers, (lambda x: x, array))]
        found.append([float(each["ce"]) / 128 for each in terms])
        for trainer in trainers:
            trainer.step += 1
    found = np.array(found)
    assert found[-5:, 0].mean() < found[0, 0] - 1.5 and np.abs(found[:, 0] - found[:, 1]).max() < 0.01


@pytest.mark.parametrize("overrides", [{}, HYBRID], ids=named)
def test_compiled_steps_are_the_eager_ones(mlx, tracing, overrides):
    found = []
    for compile in (0, 1):
        trainer, sums = both_trainers(mlx, **overrides, HEADS_GRAD=1, COMPILE=compile)[1], []
        for i in range(3):
            sums.append(trainer.train_step(array((text() + i) % 256)[None], mx.ones((1, 4)), i / 3))
            trainer.step += 1
        scores = trainer.logits(trainer.model, array(text(2, 32)), mx.zeros(2, mx.int32), 16)
        found.append(
            (
                sums,
                {
                    **trainer.model.named_parameters(),
                    **trainer.optimizers.state(),
                    "scores": scores,
                },
            )
        )
    assert sorted(tracing) == [1, 3, 3]  # scoring, the optimizers' step, gradients
    for mine, theirs in zip(found[0][0], found[1][0]):
        assert mine == pytest.approx(theirs, rel=1e-6)
    for name, value in found[0][1].items():
        assert np.allclose(np.array(value), np.array(found[1][1][name]), rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("overrides", [{}, HYBRID], ids=named)
def test_checkpoints_go_both_ways(mlx, tmp_path, overrides):
    settings, files = {**overrides, "RUNS_PATH": tmp_path, "RUN_ID": "a"}, []
    for name, trainer in zip(("torch", "twin"), both_trainers(mlx, **settings)):
        step(trainer)
        trainer.save("last")
        files.append((tmp_path / "a/last.safetensors").rename(tmp_path / f"{name}.safetensors"))
    for path in files:
        trainers = both_trainers(mlx, **settings)
        for trainer in trainers:
            trainer.restore(path)
        arrays = [
            {**dict(trainer.model.named_parameters()), **trainer.optimizers.state()}
            for trainer in trainers
        ]
        assert arrays[0].keys() == arrays[1].keys()
        assert all(
            np.array_equal(numpy(value), np.array(arrays[1][name]))
            for name, value in arrays[0].items()
        )
        for trainer in trainers:
            step(trainer)
            assert trainer.step == 2
        for name, p in trainers[0].model.named_parameters():
            assert np.abs(numpy(p) - np.array(trainers[1].model.named_parameters()[name])).max() < 1e-4, name


def test_torchs_gate_judges_the_twins_checkpoints(mlx, inside, tmp_path):
    """The gate needs no twin: what it says of the twin's
    checkpoints is what it says of torch's after the same steps."""
    reports, pairs = [], []
    for kind in (0, 1):
        pairs.append([])
        for name, overrides in (("sgjm", {}), ("baseline", {"ARCH": "baseline"})):
            trainer = both_trainers(mlx, **overrides, RUNS_PATH=tmp_path, RUN_ID=f"{name}{kind}")[kind]
            step(trainer, 0.0)
            trainer.save("final")
            pairs[-1].append(tmp_path / f"{name}{kind}" / "final.safetensors")
    gate = {
        **NOTHING, "DEVICE": "cpu", "DTYPE": "fp32", "COMPILE": 0, "EVAL_GATE": 1, "VAL_BYTES": 500,
        "GATE_BATCHES": 2, "EVAL_BATCH_TOKENS": 1024, "TRAIN_BATCH_TOKENS": 128, "RUN_ID": "gate",
    }
    for sgjm, baseline in pairs:
        gate["RUN_ID"] = f"gate{len(reports)}"
        code, output, _ = inside(gate_tool, **gate, SGJM=sgjm, BASELINE=baseline)
        assert code == 1 and "gate honest    failed: " in output, output
        reports.append(json.loads((tmp_path / "runs" / gate["RUN_ID"] / "gate.json").read_text()))
    for kind in ("published", "honest"):
        asked, told = (report[kind]["conditions"] for report in reports)
        assert len(asked) == {"published": 5, "honest": 6}[kind]
        for mine, theirs in zip(asked, told):
            assert (mine["name"], mine["passed"], mine["why"]) == (
                theirs["name"],
                theirs["passed"],
                theirs["why"],
            )
            assert mine["value"] == (
                theirs["value"] and pytest.approx(theirs["value"], rel=0.02, abs=1e-3)
            ), mine["name"]
    code, output, _ = inside(mlx, **{**gate, "RUN_ID": "twin"}, SGJM=pairs[1][0], BASELINE=pairs[1][1])
    assert code == 2 and re.fullmatch(
        r"error: EVAL_GATE='1' .*: train_gpt.py judges; .*\n",
        output,
    ), output


def test_a_run_resumes_and_its_files_are_torchs_too(mlx, inside, corpus, tmp_path):
    settings = {
        "SIZE": "smoke", "ATTN_EVERY_N": 2, "EXPORT_HEADS": 1, "ITERATIONS": 6, "WARMDOWN_ITERS": 3,
        "TRAIN_SEQ_LEN": 32, "CHECKPOINT_EVERY": 4, "TRAIN_LOG_EVERY": 1, "VAL_BYTES": 200,
        "EVAL_BATCH_TOKENS": 1024,
    }
    kept = {
        "PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV", "DEVICE", "DTYPE", "COMPILE",
        "MAX_WALLCLOCK_SECONDS", "EVAL_BUDGET_SECONDS", "OMP_NUM_THREADS",
    }

    def start(**more) -> str:
        env = {key: value for key, value in environment().items() if key in kept}
        env |= {
            key: str(value)
            for key, value in {
                **settings, "DATA_PATH": corpus, "RUNS_PATH": tmp_path, "RUN_ID": "twin", **more,
            }.items()
        }
        done = subprocess.run(
            [sys.executable, str(TWIN)], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    whole = start()
    (tmp_path / "twin" / "final.safetensors").unlink()  # else there is nothing left to train
    again = start(RESUME="auto")
    assert losses(whole)[-1] < losses(whole)[0] - 0.3
    assert re.search(r"^step:6/6 .* drafter_loss:\S+ .* verifier_acc:\S+ .* draft_unknown:\S+$", whole, re.M)
    assert "step:4 train_time" in again and scores(again) == scores(whole)
    metrics = json.loads((tmp_path / "twin" / "metrics.json").read_text())
    artifact, checkpoint = tmp_path / "twin" / "artifact.bin", tmp_path / "twin" / "final.safetensors"
    judged = {
        **NOTHING, "DEVICE": "cpu", "DTYPE": "fp32", "EVAL_BATCH_TOKENS": 1024, "VAL_BYTES": 200,
        "EVAL_BUDGET_SECONDS": 0,
    }
    code, output, theirs = inside(section, **judged, EVAL_ONLY=1, ARTIFACT=artifact)
    assert code == 0, output
    assert set(theirs) - set(metrics) == {"torch"}
    # Of training
    assert set(metrics) - set(theirs) == {"mlx", "params", "params_shipped", "steps", "ms_per_step"}
    final = [name for name in scores(output) if name.startswith("final_int7")]
    assert len(final) == 2
    assert all(scores(output)[name] == pytest.approx(scores(whole)[name], abs=1e-4) for name in final)
    assert scores(whole)["final_int7_sliding"] == pytest.approx(metrics["val_bpb"], abs=1e-7)
    models = [script.load(checkpoint) for script in (section, mlx)]  # a text with the heads' drafts
    texts = [
        script.Generator(model, [1, *b"so it goes"], 1, True, 0.0).write(16)
        for script, model in zip((section, mlx), models)
    ]
    assert texts[0] == texts[1] and models[1].aux is not None


@pytest.mark.parametrize("overrides", [{"EXPORT_HEADS": 1}, HYBRID], ids=named)
def test_the_same_weights_pack_to_the_same_bytes_and_score_alike(mlx, tmp_path, overrides, monkeypatch):
    for script in (section, mlx):  # the header says which script packed
        monkeypatch.setattr(script, "sha256_file", lambda path: "0" * 64)
        monkeypatch.setattr(script, "__doc__", "A script: this one.")
    sources = both(mlx, **overrides)
    blobs = [script.pack({name: numpy(p) for name, p in source.exported().items()}, source.args)
             for script, source in zip((section, mlx), sources)]
    assert blobs[0] == blobs[1]
    path, ids = tmp_path / "artifact.bin", numpy(text(1, 150))[0]
    path.write_bytes(blobs[0])
    nats = [script.score(script.load(path), ids)[0] for script in (section, mlx)]
    assert abs(nats[0].mean() - nats[1].mean()) < 1e-4 * np.log(2) and np.abs(nats[0] - nats[1]).max() < 1e-3
