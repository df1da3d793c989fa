"""What the tests share: the trunk as a module, a small real corpus, and runs of the real script in a subprocess."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A model of a few thousand parameters with every piece of the trunk switched on.
TINY = {
    "NUM_LAYERS": "3",
    "MODEL_DIM": "32",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "ROPE_DIMS": "4",
    "XSA_LAST_N": "2",
    "NGRAM_ORDERS": "2,3,5",
    "NGRAM_BUCKETS": "512",
    "NGRAM_DIM": "8",
    "BIGRAM_VOCAB_SIZE": "256",
    "BIGRAM_DIM": "8",
    "JEPA_CHUNK_SIZE": "8",
    "JEPA_LATENT_DIM": "16",
    "JEPA_PROJ_HIDDEN": "16",
    "JEPA_SIGREG_PROJS": "16",
    "JEPA_SIGREG_GROUP": "2",
    "TRAIN_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "512",
    "EVAL_STRIDE": "16",
    "EVAL_BATCH_TOKENS": "2048",
    "ITERATIONS": "6",
    "WARMDOWN_ITERS": "3",
    "WARMUP_STEPS": "1",
    "MAX_WALLCLOCK_SECONDS": "0",
    "EVAL_BUDGET_SECONDS": "0",
    "VAL_BYTES": "3000",
    "DTYPE": "fp32",
    "COMPILE": "0",
    "DEVICE": "cpu",
    "TRAIN_LOG_EVERY": "2",
}


def load_module(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def trunk():
    return load_module(ROOT / "train_gpt.py", "trunk")


@pytest.fixture(scope="session")
def prepare():
    return load_module(ROOT / "data" / "prepare.py", "prepare")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, prepare) -> Path:
    """byte260 shards of one package of the standard library."""
    folder = tmp_path_factory.mktemp("corpus") / "email_byte260"
    source = Path(sysconfig.get_paths()["stdlib"]) / "email"
    assert prepare.main(["python", str(source), "--out", str(folder), "--val-share", "0.2"]) == 0
    return folder


def environment(**overrides) -> dict[str, str]:
    """A clean environment with the tiny model in it."""
    kept = {
        key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV") if key in os.environ
    }
    return {**kept, **TINY, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in overrides.items()}}


@pytest.fixture
def run(corpus, tmp_path):
    """run(VAR=value, ...) -> (exit code, output, metrics or None): the real script in a process of its own."""

    def run(ranks: int = 1, timeout: int = 120, script: Path = ROOT / "train_gpt.py", **overrides):
        overrides = {"DATA_PATH": corpus, "RUNS_PATH": tmp_path / "runs", "RUN_ID": "test", **overrides}
        command = [sys.executable, str(script)]
        if ranks > 1:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={ranks}",
                str(script),
            ]
        done = subprocess.run(
            command, env=environment(**overrides), capture_output=True, text=True, timeout=timeout
        )
        path = Path(overrides["RUNS_PATH"]) / str(overrides["RUN_ID"]) / "metrics.json"
        metrics = json.loads(path.read_text()) if path.exists() else None
        return done.returncode, done.stdout + done.stderr, metrics

    return run


@pytest.fixture
def tiny(trunk):
    """tiny(VAR=value, ...) -> Hyperparameters of the tiny model."""
    return lambda **overrides: trunk.Hyperparameters({**TINY, **{k: str(v) for k, v in overrides.items()}})


@pytest.fixture
def alive(trunk):
    """alive(args) -> model whose zero-initialised tensors are random too, so that every path carries a signal."""

    def alive(args, seed: int = 0):
        import torch

        model = trunk.GPT(args)
        model.init_weights(seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.15)
        return model

    return alive
