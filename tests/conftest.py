"""What the tests share: the trunk as a module, a small
real corpus, and runs of the real script in a subprocess."""

import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

# Two workers with a thread for every core each wait for one another
# at every barrier: the suite took minutes for what takes seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from family import load_script  # noqa: E402 (the tools are no package: their folder goes on the path first)

# A model of a few thousand parameters with every piece of the trunk switched on.
TINY = {
    "NUM_LAYERS": "3", "MODEL_DIM": "32", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "ROPE_DIMS": "4",
    "XSA_LAST_N": "2", "NGRAM_ORDERS": "2,3,5", "NGRAM_BUCKETS": "512", "NGRAM_DIM": "8",
    "JEPA_CHUNK_SIZE": "8", "JEPA_LATENT_DIM": "16",
    "JEPA_PROJ_HIDDEN": "16", "JEPA_SIGREG_PROJS": "16", "JEPA_SIGREG_GROUP": "2", "TRAIN_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "512", "EVAL_STRIDE": "16", "EVAL_BATCH_TOKENS": "2048", "ITERATIONS": "6",
    "WARMDOWN_ITERS": "3", "WARMUP_STEPS": "1", "MAX_WALLCLOCK_SECONDS": "0", "EVAL_BUDGET_SECONDS": "0",
    "VAL_BYTES": "3000", "DTYPE": "fp32", "COMPILE": "0", "DEVICE": "cpu", "TRAIN_LOG_EVERY": "2",
}


# Whole runs of half a minute that other tests cover in part: at home and nightly, not where minutes count.
slow = pytest.mark.skipif(os.environ.get("CI") == "1", reason="slow: `make test` without CI=1 runs it")
# Of tests that damage files at random.
EXAMPLES = 1000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 100


def shard(*ids: int) -> bytes:
    """A shard of these ids."""
    import codec
    import numpy as np

    return codec.make_shard(np.array(ids))


@pytest.fixture(scope="session")
def trunk():
    return load_script(ROOT / "train_gpt.py")


@pytest.fixture(scope="session")
def prepare():
    return load_script(ROOT / "data" / "prepare.py")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, prepare) -> Path:
    """byte260 shards of one package of the standard library."""
    folder = tmp_path_factory.mktemp("corpus") / "email_byte260"
    source = Path(sysconfig.get_paths()["stdlib"]) / "email"
    assert prepare.main(["python", str(source), "--out", str(folder), "--val-share", "0.2"]) == 0
    return folder


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium for the tests of pages."""
    from browser import chromium  # here: other tests need none
    with chromium() as made:
        yield made


def environment(**overrides) -> dict[str, str]:
    """A clean environment with the tiny model in it."""
    kept = {
        key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV") if key in os.environ
    }
    return {**kept, **TINY, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in overrides.items()}}


@pytest.fixture
def run(corpus, tmp_path):
    """run(VAR=value, ...) -> (exit code, output, metrics
    or None): the real script in a process of its own."""

    def run(ranks: int = 1, timeout: int = 120, script: Path = ROOT / "train_gpt.py", **overrides):
        overrides = {"DATA_PATH": corpus, "RUNS_PATH": tmp_path / "runs", "RUN_ID": "test", **overrides}
        command = [sys.executable, str(script)]
        if ranks > 1:
            command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run(
            command, env=environment(**overrides), capture_output=True, text=True, timeout=timeout
        )
        path = Path(overrides["RUNS_PATH"]) / str(overrides["RUN_ID"]) / "metrics.json"
        metrics = json.loads(path.read_text()) if path.exists() else None
        return done.returncode, done.stdout + done.stderr, metrics

    return run


@pytest.fixture
def cut(corpus, tmp_path):
    """cut(script, signal, first line, VAR=value, ...) -> the step
    at which a run `cut` stopped, sent the signal at that line.

    It ends with the signal's exit code, says how to go on, and leaves no artifact.
    """

    def cut(script: Path, number: int, line: str, **overrides) -> int:
        env = environment(DATA_PATH=corpus, RUNS_PATH=tmp_path / "runs", RUN_ID="cut", **overrides)
        process = subprocess.Popen([sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True)
        for each in process.stdout:
            if each.startswith(line):
                process.send_signal(number)
                break
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 128 + number, rest
        stopped = re.search(
            rf"stopped by {signal.Signals(number).name} at step (\d+).*RUN_ID=cut RESUME=auto", rest
        )
        assert stopped and not (tmp_path / "runs/cut/artifact.bin").exists()
        return int(stopped[1])

    return cut


@pytest.fixture
def inside(corpus, tmp_path, monkeypatch, capfd):
    """inside(module, VAR=value, ...) -> what `run` gives: `main`
    of a script that is loaded already, without a process's start."""

    def inside(script, **overrides):
        overrides = {"DATA_PATH": corpus, "RUNS_PATH": tmp_path / "runs", "RUN_ID": "inside", **overrides}
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", environment(**overrides))
            patch.setattr(sys, "argv", ["train_gpt.py"])
            code, shown = script.main(), capfd.readouterr()
        path = Path(overrides["RUNS_PATH"]) / str(overrides["RUN_ID"]) / "metrics.json"
        return code, shown.out + shown.err, json.loads(path.read_text()) if path.exists() else None

    return inside


@pytest.fixture
def prepare_files(prepare, tmp_path):
    """prepare_files(train, val, option, ...) -> the folder that `prepare.py files` makes of these paths.

    `code` is the exit code to expect, `out` the folder's name.
    """

    def prepare_files(train, val, *options, out: str = "shards", code: int = 0) -> Path:
        train = train if isinstance(train, list) else [train]
        call = ["files", *train, "--val", val, *options, "--out", tmp_path / out]
        assert prepare.main([str(argument) for argument in call]) == code
        return tmp_path / out

    return prepare_files


@pytest.fixture
def field_tokenizer(tmp_path):
    """field_tokenizer(text, size) -> (model, its path): SentencePiece as the field trains it.

    It puts a space before a document and folds white space and Unicode;
    data/prepare.py's own does neither, and no more does one with options that say so.
    """

    def field_tokenizer(text: str, size: int, name: str = "field", **options):
        import sentencepiece

        (tmp_path / f"{name}.txt").write_text(text)
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / f"{name}.txt"),
            model_prefix=str(tmp_path / name),
            vocab_size=size,
            model_type="bpe",
            byte_fallback=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=2,
            **{"hard_vocab_limit": False, **options},
        )
        path = tmp_path / f"{name}.model"
        return sentencepiece.SentencePieceProcessor(model_file=str(path)), path

    return field_tokenizer


@pytest.fixture
def tiny(trunk):
    """tiny(VAR=value, ...) -> Hyperparameters of the tiny model."""
    return lambda **overrides: trunk.Hyperparameters({**TINY, **{k: str(v) for k, v in overrides.items()}})


def enlivened(script, args, seed: int = 0):
    """A script's model whose zero-initialised tensors are random too, so that every path carries a signal."""
    import torch

    model = script.GPT(args)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.15)
    return model


@pytest.fixture
def alive(trunk):
    """alive(args) -> `enlivened` model of the trunk."""
    return lambda args, seed=0: enlivened(trunk, args, seed)


def assert_causal(model, length: int = 40) -> None:
    """Changing one id, at every position in turn, moves
    no logit before it, and does move those from it on."""
    import torch

    ids = torch.randint(4, 260, (1, length), generator=torch.Generator().manual_seed(3))
    ids[0, 17] = 1
    variants = ids.repeat(length, 1)
    for t in range(length):
        variants[t, t] = 4 + (variants[t, t] + 100) % 256
    with torch.no_grad():
        base = model.logits(ids, torch.zeros(1, dtype=torch.long), length)[0]
        logits = model.logits(variants, torch.zeros(length, dtype=torch.long), length)
        moved = (logits - base).abs().amax(-1)  # (variant, t)
    for t in range(length):
        assert moved[t, t] > 1e-6 and (not t or moved[t, :t].max() < 1e-5), t


def assert_stream_follows_score(script, model, ids, every: int = 1, atol: float = 1e-4):
    """At every position, the stream has the nats of the scorer, and a distribution that sums
    to one; at each `every`th the scorer's own distribution, which holds the nats; the stream."""
    import numpy as np

    nats, vectors = script.score(model, ids, range(0, len(ids) - 1, every))
    stream = script.stream(model)
    stream.push(ids[0])
    for t in range(len(ids) - 1):
        found = stream.logprobs()
        assert nats[t] == pytest.approx(-found[ids[t + 1]], abs=atol), t
        assert np.exp(found.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
        if t in vectors:
            assert np.abs(found - vectors[t]).max() < atol, t
            assert nats[t] == pytest.approx(-vectors[t][ids[t + 1]], abs=1e-6)
        stream.push(ids[t + 1])
    return stream


def assert_drafts_follow_score(script, model, ids) -> None:
    """Drafts right, wrong and in part right, asked for or
    not: what a pass over them says is what `score` says."""
    import numpy as np

    rng, t = np.random.default_rng(0), 0
    _, vectors = script.score(model, ids, range(len(ids) - 1))
    stream = script.stream(model)
    stream.push(ids[0])
    while t < len(ids) - 1:
        right = int(rng.integers(0, 5))
        drafts = [*ids[t + 1 : t + 1 + right], *rng.integers(4, 260, int(rng.integers(0, 3)))]
        if rng.random() < 0.3:
            assert np.abs(stream.logprobs() - vectors[t]).max() < 1e-4, t
        # Lazy where a mixture learns on the way
        for row in itertools.islice(stream.ahead(drafts), right + 1):
            if t < len(ids) - 1:
                assert np.abs(row - vectors[t]).max() < 1e-4, t
                stream.push(ids[t + 1])
                t += 1


def same_text(script, model, prompt, plain: list[int], drafted: list[int], law) -> bool:
    """Whether two texts after a prompt are one, by a law of scripts/generate.py; or part
    at a near tie, which may fall the other way in a pass of another shape."""
    import numpy as np

    if plain == drafted:
        return True
    at = next(i for i, pair in enumerate(itertools.zip_longest(plain, drafted)) if len({*pair}) > 1)
    place = len(prompt) + at
    row = script.score(model, [*prompt, *plain[:at], 0], [place - 1])[1][place - 1]
    little = 1e-4 * np.eye(len(row), dtype=np.float32)
    return all(law.pick(row + little[token], place) == token for token in plain[at:][:1] + drafted[at:][:1])


def mlx_or_skip() -> None:
    """Puts MLX on the CPU. Skips a module of tests only where
    it has no wheel: elsewhere requirements-dev.txt brings it."""
    if not (sys.platform == "linux" or (sys.platform == "darwin" and platform.machine() == "arm64")):
        reason = f"MLX runs on Linux and on Apple Silicon, not on {sys.platform} {platform.machine()}"
        pytest.skip(reason, allow_module_level=True)
    import mlx.core as mx

    mx.set_default_device(mx.cpu)  # where fp32 is fp32


@pytest.fixture(scope="session")
def twin():
    return load_script(ROOT / "train_gpt_mlx.py")


@pytest.fixture
def pair(trunk, twin):
    """pair(VAR=value, ...) -> (the trunk's model, the twin's): every tensor random, and the same in both."""
    import mlx.core as mx

    def pair(**overrides):
        settings = {**TINY, **{key: str(value) for key, value in overrides.items()}}
        model = enlivened(trunk, trunk.Hyperparameters(settings))
        other = twin.GPT(twin.Hyperparameters(settings))
        arrays = {name: mx.array(p.detach().numpy()) for name, p in model.named_parameters()}
        assert list(arrays) == list(other.named_parameters())  # the order that an artifact has
        twin.update_parameters(other, arrays)
        return model, other

    return pair


def trainers_alike(scripts, models, settings, log) -> list:
    """Trainers of a torch script and of its twin with the weights of
    these models, and with torch's draws for the auxiliary losses."""
    import mlx.core as mx
    import torch

    made = []
    for script, start, mine in zip(scripts, models, settings, strict=True):
        args = script.Hyperparameters(mine)
        made.append(trainer := script.Trainer(args, None, script.Runtime(args), log))
        if hasattr(script, "torch"):
            trainer.model.load_state_dict(start.state_dict())
        else:
            script.update_parameters(trainer.model, start.named_parameters())
        trainer.fresh_optimizers()
    if models[0].aux is not None:
        made[1].model.aux.inputs = lambda step: mx.array(
            made[0].model.aux.inputs(step, torch.device("cpu")).numpy()
        )
    return made


@pytest.fixture
def tracing(tmp_path, monkeypatch):
    """mx.compile without its kernels, each of which costs seconds of a C++ compiler:
    graphs are traced, written and read back. What a function took from elsewhere than its
    arguments is a constant in such a graph. The list has the graphs' numbers of calls."""
    import mlx.core as mx
    from mlx.utils import tree_map

    calls = []

    def leaves(tree) -> list:
        found = []
        tree_map(found.append, tree)
        return found

    def filled(tree, values):
        values = iter(values)
        return tree_map(lambda _: next(values), tree)

    def compile(method):
        graphs = {}

        def call(*args):
            given = leaves(args)
            key = str(tree_map(lambda x: x.shape if isinstance(x, mx.array) else x, args))
            arrays = [x for x in given if isinstance(x, mx.array)]
            if key not in graphs:
                results, path = [], str(tmp_path / f"{len(calls)}.mlxfn")

                def traced(*arrays):
                    rest = iter(arrays)
                    results.append(
                        method(
                            *filled(
                                args, [next(rest) if isinstance(x, mx.array) else x for x in given]
                            )
                        )
                    )
                    return leaves(results[0])

                mx.export_function(path, traced, *arrays)
                graphs[key] = len(calls), mx.import_function(path), tree_map(lambda _: 0, results[0])
                calls.append(0)
            number, graph, shape = graphs[key]
            calls[number] += 1
            return filled(shape, graph(*arrays))

        return call

    monkeypatch.setattr(mx, "compile", compile)
    return calls
