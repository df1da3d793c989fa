"""Is the number legal? Probes the real script at a tiny size, reads
its source, and checks the files of its runs.

    python scripts/audit.py RECORD                a record's folder, its name, or a script; `.` is the trunk
    python scripts/audit.py RECORD --only future,poison   only these probes (`--list` names probes and rules)
    python scripts/audit.py SCRIPT --adapter FILE         a script that is not of this family

Probes train the script on a few hundred kilobytes of the standard library's source and a validation text of 3
kB, then ask it for probabilities through `load`, `score` and `stream`, with the text changed in ways that an
honest scorer cannot notice. Sizes are tiny, everything else is as in the record's own runs; `audit` in
submission.json and `--set` change settings. Static hints are hints: names lie. Forensics compare logs, JSON
files and bytes.

An adapter is a Python file with `score(ids, positions) -> (nats of each target ids[1:], {t: log-probabilities
at target t})`, and `stream()` -> object with `.logprobs()` and `.push(id)` if it can be decoded. It finds
SCRIPT and ARTIFACT (of `--artifact`) among its globals, and may set VOCAB_SIZE, BOS_ID, EXAMPLE (ids to probe
with) and DOCUMENTS_INDEPENDENT = True.

It runs strangers' code. That code works in an empty folder, in processes of its own, with limits on memory,
time and file sizes, a bare environment, and no network where the system allows (Linux with user namespaces;
elsewhere Python's own sockets are refused). NOT protected: it runs as you, so it can read and write whatever
you can, and a script that looks for an audit can behave while it lasts. Use a container for code that you do
not trust.

NOT judged: where calibration data come from beyond D1/P9 (B5), what a warm-up leaves behind (B7), brute force
over seeds (B8), a sidecar's bytes (M3), copies of single windows of validation text in training shards (D4).

Exit codes: 0 no FAIL, 1 a FAIL, 2 misuse. PASS, WARN and FAIL carry a rule of the competition (C1-C4, B, D,
M, S) and the probe that decided, with the counter-example.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
from audit_files import forensics, hints
from codec import CodecError, categorical, constriction_stream, shard_ids
from family import (
    FINDINGS,
    FINE,
    OF_THE_RUN,
    ROOT,
    Finding,
    Misuse,
    command,
    find_script,
    load_script,
    read_json,
)

# Tiny sizes, given to a script that knows the variable. What the record's runs had at 0 stays switched off.
# fmt: off
SMALL = {
    "NUM_LAYERS": 3, "MODEL_DIM": 32, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "MLP_MULT": 2.0, "ROPE_DIMS": 4,
    "XSA_LAST_N": 2, "NGRAM_ORDERS": "2,3,5", "NGRAM_BUCKETS": 512, "NGRAM_DIM": 8,
    "JEPA_CHUNK_SIZE": 8, "JEPA_LATENT_DIM": 16,
    "JEPA_PROJ_HIDDEN": 16, "JEPA_SIGREG_PROJS": 16, "JEPA_SIGREG_GROUP": 2, "TRAIN_SEQ_LEN": 64,
    "TRAIN_BATCH_TOKENS": 1024, "DEVICE_BATCH_TOKENS": 4096, "EVAL_SEQ_LEN": 64, "EVAL_STRIDE": 16,
    "EVAL_BATCH_TOKENS": 256, "TTT": "sgd", "TTT_CHUNK_TOKENS": 64, "TTT_BATCH_ROWS": 2, "ITERATIONS": 60,
    "WARMDOWN_ITERS": 30, "EMA_DECAY": 0.8, "WARMUP_STEPS": 1, "MUON_MOMENTUM_WARMUP_STEPS": 10,
    "GPTQ_BATCHES": 1, "VAL_LOSS_EVERY": 20, "TRAIN_LOG_EVERY": 20, "MAX_WALLCLOCK_SECONDS": 0,
    "EVAL_BUDGET_SECONDS": 0, "ARTIFACT_BUDGET_BYTES": 16_000_000, "VAL_BYTES": 0, "CHECKPOINT_EVERY": 0,
    "DTYPE": "fp32", "DEVICE": "cpu", "COMPILE": 0, "SEED": 7,
}
# fmt: on
NOT_TINY = ("ATTENTION", "VOCAB_SIZE")  # chosen here
VOCAB, BOS = 260, 1
SAME = 2e-5  # nats; equal shapes give equal sums on a CPU, and other shapes are off by a few 1e-6
CLOSE = 2e-4  # nats; where windows are batched otherwise
FOLLOWS = 0.01  # nats; a stream against a batch, learning on the way
GIB = 1 << 30


# -----------------------------------------------------------------------------
# CONFINEMENT
# -----------------------------------------------------------------------------


def offline() -> list[str]:
    """What to put before a command so that it has no network; empty where this system has nothing for it."""
    for prefix in (  # the first one takes what the script has started with it
        ["unshare", "-rnpf", "--kill-child", "--"],
        ["unshare", "-rn", "--"],
        ["sandbox-exec", "-p", "(version 1)(allow default)(deny network*)"],
    ):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run([*prefix, "true"], capture_output=True, timeout=20).returncode == 0:
                return prefix
    return []


def limits(memory: int, seconds: int) -> Callable[[], None] | None:
    """For the child, between fork and exec; None where the system has no resource limits."""
    try:
        import resource
    except ImportError:
        return None

    def limit() -> None:
        wanted = {"RLIMIT_CPU": seconds, "RLIMIT_FSIZE": GIB, "RLIMIT_CORE": 0}
        if sys.platform == "linux":  # elsewhere address space is no measure of memory
            wanted["RLIMIT_AS"] = memory
        for name, value in wanted.items():
            with contextlib.suppress(ValueError, OSError):
                hard = resource.getrlimit(getattr(resource, name))[1]
                top = value if hard < 0 else min(value, hard)
                resource.setrlimit(getattr(resource, name), (top, top))

    return limit


# -----------------------------------------------------------------------------
# THE TRIAL: a tiny run of the real script in an empty folder
# -----------------------------------------------------------------------------


class Refused(Exception):
    """The script did not do what a script of the family does; the text says what."""


class Worker:
    """A process that has the script loaded and answers questions about it (see audit_worker.py)."""

    def __init__(self, trial: Trial, artifact: str, name: str):
        self.errors = open(trial.folder / f"{name}.err", "w")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            trial.call(
                "serve", "train_gpt.py", trial.place(name, artifact), "adapter.py" if trial.adapter else ""
            ),
            cwd=trial.folder / name,
            env=trial.environment(name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
            preexec_fn=trial.limit,
        )
        self.seconds, self.late = trial.seconds, False
        try:
            self.can_stream = self._answer()["stream"]
        except Refused:
            self.close()
            raise

    def ask(self, **question) -> dict:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        timer = threading.Timer(self.seconds, self._give_up)
        timer.daemon = True
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if line:
            found = json.loads(line)
        elif self.late:
            found = {"error": f"an answer took more than {self.seconds} s"}
        else:
            found = {"error": f"it ended without an answer, exit code {self.process.wait()}"}
        if "error" in found:
            raise Refused(found["error"])
        return found

    def score(self, ids: np.ndarray, positions=()) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """(nats of each target (N - 1,), {t: log-probabilities (V,)}) of the script's own `score`."""
        found = self.ask(op="score", ids=ids.tolist(), positions=[int(t) for t in positions])
        vectors = {int(t): np.array(v) for t, v in found["vectors"].items()}
        if len(found["nats"]) != len(ids) - 1 or set(vectors) != set(map(int, positions)):
            raise Refused(
                f"score gave {len(found['nats'])} losses for {len(ids) - 1} targets and "
                f"{len(vectors)} distributions for {len(set(positions))} positions"
            )
        return np.array(found["nats"]), vectors

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _give_up(self) -> None:
        self.late = True
        self.kill()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what it was asked last may lie unread
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()  # what it started, too
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def text_of(noise: bool = False) -> tuple[list[str], list[str]]:
    """(training documents, validation documents): pieces of the
    standard library's source, or noise for validation.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    train = [path.read_text("utf-8", "replace") for path in sorted((stdlib / "email").glob("*.py"))]
    source = (stdlib / "textwrap.py").read_text("utf-8").encode("ascii", "replace").decode()
    val = [source[i : i + 420 + 40 * k] for k, i in enumerate(range(0, 4200, 700))]
    val = [
        text[:200] + "na\u00efve \u2014 \u6f22\u5b57 \U0001f642" + text[200:] for text in val
    ]  # not one byte a character
    train.append(
        "na\u00efve d\u00e9j\u00e0 vu \u2014 \u6f22\u5b57. " * 400
    )  # so that a tokenizer has pieces of them
    if noise:
        generator = np.random.default_rng(0)
        val = ["".join(map(chr, generator.integers(33, 127, len(text)))) for text in val]
    return train, val


class Trial:
    """One script in a folder of its own: its data, its settings, its runs, and processes that answer for it.
    """

    def __init__(
        self,
        script: Path,
        folder: Path,
        settings: dict[str, str] | None = None,
        adapter: Path | None = None,
        artifact: Path | None = None,
        seconds: int = 170,
        memory: int = 24 * GIB,
        record: Path | None = None,
    ):
        self.folder, self.seconds, self.network = folder, seconds, offline()
        self.limit, self.given, self.record = limits(memory, seconds), settings or {}, record
        self.script = folder / "train_gpt.py"
        shutil.copy(script, self.script)
        shutil.copy(Path(__file__).with_name("audit_worker.py"), folder)
        self.adapter = Path(shutil.copy(adapter, folder / "adapter.py")) if adapter else None
        self.given_artifact = str(shutil.copy(artifact, folder / "given.bin")) if artifact else ""
        self.claims = (
            read_json(record / "submission.json") if record and (record / "submission.json").exists() else {}
        )
        self.rng, self.processes = np.random.default_rng(1), 0
        self.workers: dict[str, Worker] = {}
        self.settings: dict[str, str] = {}

    def call(self, *arguments: str) -> list[str]:
        self.processes += 1
        return [*self.network, sys.executable, "-I", "audit_worker.py", *arguments]

    def place(self, name: str, artifact: str = "") -> str:
        """Makes an empty folder for a process, with the script and
        the artifact alone; the artifact's name in it.
        """
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        for path in (self.script, self.adapter, Path(__file__).with_name("audit_worker.py")):
            if path:
                shutil.copy(path, self.folder / name)
        return str(shutil.copy(artifact, self.folder / name / "artifact.bin")) if artifact else ""

    def environment(self, name: str, **more: str) -> dict[str, str]:
        bare = {
            name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "SYSTEMROOT") if name in os.environ
        }
        return {
            **bare,
            "HOME": str(self.folder / name),
            "TMPDIR": str(self.folder / name),
            "AUDIT_WATCH": str(self.folder / f"{name}.watch"),
            "OMP_NUM_THREADS": "1",
            **self.settings,
            **more,
        }

    def run(self, name: str, **settings: str) -> tuple[str, dict]:
        """The script as a program -> (its output, metrics.json or {}). Raises Refused where it fails."""
        if not (artifact := settings.pop("ARTIFACT", "")):
            self.place(name)
        else:
            settings["ARTIFACT"] = self.place(name, artifact)
        env = self.environment(name, RUNS_PATH=str(self.folder / name / "runs"), RUN_ID=name, **settings)
        said = self.folder / f"{name}.out"
        with open(said, "wb") as file:  # a pipe would wait for whatever the script has started
            process = subprocess.Popen(
                self.call("main", "train_gpt.py", *(["--help"] if name == "help" else [])),
                cwd=self.folder / name,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=self.limit,
            )
        try:
            process.wait(self.seconds)
        except subprocess.TimeoutExpired:
            raise Refused(f"the run {name} took more than {self.seconds} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output = said.read_text("utf-8", "replace")
        if process.returncode:
            last = [line for line in output.strip().splitlines() if line.strip()][-1:] or ["no output"]
            raise Refused(f"the run {name} ended with exit code {process.returncode}: {last[0][:300]}")
        path = self.folder / name / "runs" / name / "metrics.json"
        try:
            metrics = json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise Refused(f"the run {name} wrote a metrics.json that is not JSON: {error}") from None
        if not isinstance(metrics, dict):
            raise Refused(f"the run {name} wrote a metrics.json that is no object")
        return output, metrics

    def made(self, name: str, metrics: dict) -> Path:
        """The artifact of a run."""
        path = self.folder / name / str(metrics.get("artifact") or "artifact.bin")
        if not path.is_file():
            raise Refused(f"the run {name} left no artifact at {path.name}")
        return path

    # What the script knows, and what it is given

    @cached_property
    def help(self) -> str:
        return self.run("help")[0]

    @cached_property
    def names(self) -> set[str]:
        """Every variable that `--help` names, retired ones too."""
        return set(re.findall(r"^\s+([A-Z][A-Z0-9_]+)(?=\s)", self.help, re.M))

    @cached_property
    def settable(self) -> set[str]:
        """Those before the list of the ones without effect."""
        return set(
            re.findall(
                r"^\s+([A-Z][A-Z0-9_]+)(?=\s)",
                re.split(r"^.*without effect$", self.help, flags=re.M)[0],
                re.M,
            )
        )

    def configure(self) -> None:
        """Settings of the record's runs, at tiny sizes; --set last.

        A token model gets a tokenizer of 512 ids.
        """
        if self.adapter or self.settings:
            return
        found = {}
        runs = sorted(self.record.glob("seed*/metrics.json")) if self.record else []
        if runs:
            measured = read_json(runs[0]).get("settings", {})
            found = {
                name: str(int(value) if isinstance(value, bool) else value)
                for name, value in measured.items()
                if name in self.settable and name not in {*OF_THE_RUN, *NOT_TINY}
            }
            self.vocab = int(measured.get("VOCAB_SIZE", VOCAB))
        else:
            self.vocab = VOCAB
        for name, value in SMALL.items():  # nothing starts with them where an artifact is given
            if (self.given_artifact or name in self.settable) and found.get(name) not in ("0", "0.0", ""):
                found[name] = str(value)
        given = {**{k: str(v) for k, v in self.claims.get("audit", {}).items()}, **self.given}
        self.vocab = int(given.get("VOCAB_SIZE", self.vocab))
        self.settings = found | given | {"VOCAB_SIZE": str(VOCAB)}
        if self.vocab != VOCAB:
            self.vocab = 512
            self.settings |= {"VOCAB_SIZE": "512", "TOKENIZER_PATH": str(self.data("text") / "sp512.model")}

    def data(self, kind: str) -> Path:
        """The folder of shards: `text`, `noise` (another validation
        text of the same size), `alone` (no training).
        """
        folder = self.folder / "data" / kind
        if folder.exists():
            return folder
        if kind == "alone":
            shutil.copytree(self.data("text"), folder, ignore=shutil.ignore_patterns("*_train_*"))
            return folder
        train, val = text_of(kind == "noise")
        sources = self.folder / f"{kind}-train.jsonl", self.folder / f"{kind}-val.jsonl"
        for path, documents in zip(sources, (train, val)):
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        variant = "byte260" if self.vocab == VOCAB else f"sp{self.vocab}"
        more = (
            ["--tokenizer", str(self.data("text") / f"{variant}.model")]
            if kind == "noise" and self.vocab != VOCAB
            else []
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = load_script(ROOT / "data" / "prepare.py").main(
                [
                    "files",
                    str(sources[0]),
                    "--val",
                    str(sources[1]),
                    "--variant",
                    variant,
                    "--no-shuffle",
                    "--overlap",
                    "report",
                    "--out",
                    str(folder),
                    *more,
                ]
            )
        if code:
            raise Misuse(f"data/prepare.py could not make the {kind} shards of the trial (exit code {code})")
        return folder

    # What is asked of it

    @cached_property
    def trained(self) -> dict:
        """metrics.json of the tiny run."""
        self.configure()
        if self.adapter or self.given_artifact:
            return {}
        metrics = self.run("text", DATA_PATH=str(self.data("text")))[1]
        if not metrics:
            raise Refused("its run wrote no metrics.json")
        return metrics

    @cached_property
    def artifact(self) -> str:
        if self.adapter or self.given_artifact:
            return self.given_artifact
        kept = shutil.copy(self.made("text", self.trained), self.folder / "artifact.bin")
        shutil.rmtree(self.folder / "text")  # from here on the artifact has to be enough
        return str(kept)

    def worker(self, name: str = "asked") -> Worker:
        if name not in self.workers:
            self.workers[name] = Worker(self, self.artifact, name)
        return self.workers[name]

    @cached_property
    def stream(self) -> np.ndarray:
        """The validation stream, int64."""
        if self.adapter:
            example = self.of_adapter("EXAMPLE")
            if example is not None:
                if len(example) < 400:
                    raise Misuse(f"{self.adapter.name}: EXAMPLE has {len(example)} ids, 400 are needed")
                return np.array(example, np.int64)
            self.vocab = self.of_adapter("VOCAB_SIZE") or VOCAB
            if self.vocab != VOCAB:
                raise Misuse(
                    f"{self.adapter.name}: with VOCAB_SIZE={self.vocab} it must say EXAMPLE, ids to probe "
                    "with"
                )
        self.configure()
        (path,) = self.data("text").glob("*_val_*.bin")
        return shard_ids(path.read_bytes())

    def of_adapter(self, name: str):
        """A literal that the adapter sets, read without running it; None where it does not."""
        if not self.adapter:
            return None
        try:
            for node in ast.parse(self.adapter.read_text()).body:
                if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
                    return ast.literal_eval(node.value)
        except (SyntaxError, ValueError) as error:
            raise Misuse(f"{self.adapter.name}: {name} is no literal: {error}") from None
        return None

    @cached_property
    def bos(self) -> int:
        return BOS if (found := self.of_adapter("BOS_ID")) is None else found

    @cached_property
    def ids(self) -> np.ndarray:
        """What most probes use: a prefix of the stream, of more than one document."""
        return self.stream[:640]

    @cached_property
    def base(self) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """The honest answer on `ids`, with the distribution at every target."""
        return self.worker().score(self.ids, range(len(self.ids) - 1))

    @cached_property
    def size(self) -> int:
        """Ids of the vocabulary."""
        return len(next(iter(self.base[1].values())))

    def borders(self, count: int) -> list[int]:
        """Targets where windows, chunks and documents begin or end, and some in between."""
        n, step = len(self.ids) - 1, int(self.settings.get("EVAL_STRIDE", 16))
        chunk = int(self.settings.get("TTT_CHUNK_TOKENS", 64))
        starts = np.flatnonzero(self.ids == self.bos)
        sure = [
            chunk - 1,
            chunk,
            2 * chunk,
            step,
            3 * step - 1,
            *(s + d for s in starts[1:3] for d in (-2, -1, 0)),
        ]
        rest = self.rng.permutation(n - 2)[:count]
        return list(dict.fromkeys(int(t) for t in [*sure, *rest] if 0 < t < n - 1))[:count]

    def others(self, count: int) -> np.ndarray:
        """Ids drawn from those of the text, so that every one of them is a plain one."""
        return self.rng.choice(self.stream[self.stream != self.bos], count)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers = {}


# -----------------------------------------------------------------------------
# PROBES
# -----------------------------------------------------------------------------


def well(rule: str, text: str) -> Finding:
    return Finding(rule, "PASS", text)


def fail(rule: str, text: str) -> Finding:
    return Finding(rule, "FAIL", text)


def unjudged(rule: str, why: str) -> Finding:
    return Finding(rule, "WARN", f"not judged: {why}")


def moved(a: np.ndarray, b: np.ndarray, tolerance: float) -> tuple[int, float] | None:
    """The first place where two arrays differ by more than that, with the difference; nan differs from all.
    """
    gap = np.abs(np.asarray(a) - np.asarray(b))
    bad = np.flatnonzero(~(gap <= tolerance))
    return (int(bad[0]), float(gap[bad[0]])) if len(bad) else None


def future(trial: Trial) -> list[Finding]:
    """C1/P1: what comes after a target changes nothing before it."""
    ids, (nats, vectors), places = trial.ids, trial.base, trial.borders(10)
    for t in places:
        changed = ids.copy()
        changed[t + 1 :] = trial.others(len(ids) - t - 1)  # the target itself, too
        other, seen = trial.worker().score(changed, [t])
        if found := moved(other[:t], nats[:t], SAME):
            return [
                fail(
                    "C1/P1",
                    f"ids from target {t} on replaced: target {found[0]} moves by {found[1]:.2g} nats",
                )
            ]
        if found := moved(seen[t], vectors[t], SAME):
            return [
                fail("C1/P1", f"ids from target {t} on replaced: its distribution moves by {found[1]:.2g}")
            ]
    return [
        well(
            "C1/P1",
            f"ids from {len(places)} targets on replaced, at borders of windows, chunks and documents",
        )
    ]


def poison(trial: Trial) -> list[Finding]:
    """C2/P2 and C3/P5: the distribution at a target knows nothing of it,
    and its score is read from that distribution.
    """
    ids, vectors, pairs, count = trial.ids[:320], trial.base[1], 0, 5
    base = trial.worker().score(ids)[0]
    rest = trial.rng.permutation(np.arange(2, len(ids) - 3))[:9]
    places = list(dict.fromkeys([*(t for t in trial.borders(5) if t < len(ids) - 2), *map(int, rest)]))[:12]
    plain = np.setdiff1d(trial.stream, [trial.bos])
    out: dict[str, Finding] = {}
    for t in places:
        for value in [trial.bos, *trial.rng.permutation(plain[plain != ids[t + 1]])[: count - 1]]:
            changed = ids.copy()
            changed[t + 1] = value
            other, seen = trial.worker().score(changed, [t])
            what, pairs = f"target {t} set to id {value}", pairs + t
            if found := moved(seen[t], vectors[t], SAME):
                out.setdefault(
                    "C1/P2", fail("C1/P2", f"{what}: the distribution at {t} moves by {found[1]:.2g}")
                )
            if abs(other[t] + seen[t][value]) > SAME or not np.isfinite(other[t]):
                out.setdefault(
                    "C2/P2",
                    fail(
                        "C2/P2",
                        f"{what}: it is charged {other[t]:.4f} nats, its distribution "
                        f"says {-seen[t][value]:.4f}",
                    ),
                )
            if found := moved(other[:t], base[:t], SAME):
                out.setdefault(
                    "C3/P5",
                    fail(
                        "C3/P5",
                        f"{what}: the score of target {found[0]} before it moves by {found[1]:.2g} nats",
                    ),
                )
    passed = {
        "C1/P2": f"{len(places)} targets set to {count} other ids: distributions unmoved",
        "C2/P2": "every score is that of the distribution at its target",
        "C3/P5": f"0 of {pairs} scores before a flipped target moved",
    }
    return [out.get(rule, well(rule, text)) for rule, text in passed.items()]


def normal(trial: Trial) -> list[Finding]:
    """C2/P3: a distribution over all ids at every target, of sum 1, and the score is the target's own."""
    ids, worst = trial.stream, 0.0
    nats, vectors = trial.worker().score(ids, range(0, len(ids) - 1, 3))
    places = sorted(vectors)
    bare = trial.worker().score(ids)[0]
    if found := moved(bare, nats, SAME):
        return [
            fail(
                "C2/P3", f"target {found[0]} moves by {found[1]:.2g} nats where no distribution is asked for"
            )
        ]
    for t in places:
        p = np.exp(vectors[t])
        if not np.isfinite(p).all() or len(p) != trial.size:
            return [fail("C2/P3", f"at target {t} a probability is not a number")]
        worst = max(worst, abs(p.sum() - 1))
        if abs(p.sum() - 1) > 1e-4:
            return [fail("C2/P3", f"at target {t} the probabilities of {len(p)} ids sum to {p.sum():.6f}")]
        if abs(nats[t] + vectors[t][ids[t + 1]]) > SAME:
            return [
                fail(
                    "C2/P3",
                    f"target {t} is charged {nats[t]:.4f} nats, its distribution says "
                    f"{-vectors[t][ids[t + 1]]:.4f}",
                )
            ]
    return [well("C2/P3", f"at {len(places)} targets {trial.size} probabilities sum to 1 within {worst:.1e}")]


def order(trial: Trial) -> list[Finding]:
    """C3/P4: a text that ends early gives the scores that it has in the longer one: no update came first."""
    ids, nats, places = trial.ids, trial.base[0], [t for t in trial.borders(10) if t > 8][:5]
    for t in places:
        if found := moved(trial.worker().score(ids[: t + 1])[0], nats[:t], CLOSE):
            return [
                fail(
                    "C3/P4",
                    f"the text cut after target {t - 1}: target {found[0]} moves by {found[1]:.2g} nats",
                )
            ]
    return [well("C3/P4", f"scores of the text cut at {len(places)} places are those of the whole")]


def coverage(trial: Trial) -> list[Finding]:
    """C4/P6, M2, M4: the reported loss is the sum of `score` over every
    target once, the bytes are those of the text.
    """
    ids, metrics = trial.stream, trial.trained
    if not metrics:
        return [unjudged("C4/P6", "no run of its own: the adapter's scores stand for it")]
    entry = metrics["evals"][metrics["headline"]]
    nats, out, size = trial.worker().score(ids)[0], [], sum(len(text.encode()) for text in text_of()[1])
    if not np.isfinite(nats).all():
        out.append(fail("C4/P6", f"target {int(np.flatnonzero(~np.isfinite(nats))[0])} has no finite score"))
    if entry["targets"] != len(nats):
        out.append(fail("C4/P6", f"the stream has {len(nats)} targets, the run reports {entry['targets']}"))
    if not abs(entry["val_loss"] - nats.mean()) <= CLOSE:
        out.append(
            fail(
                "C4/P6",
                f"the mean of score over every target once is {nats.mean():.6f} nats, "
                f"the run reports {entry['val_loss']:.6f}",
            )
        )
    if entry["bytes"] != size:
        out.append(fail("M2", f"the text has {size} bytes, the run divides by {entry['bytes']}"))
    bpb = nats.sum() / np.log(2) / size
    if not abs(entry["val_bpb"] - bpb) <= CLOSE or metrics["val_bpb"] != entry["val_bpb"]:
        out.append(
            fail("M4", f"all nats over all bytes are {bpb:.6f} BPB, the run reports {metrics['val_bpb']:.6f}")
        )
    model = Path(trial.artifact).stat().st_size
    if metrics.get("bytes_model") != model:
        out.append(fail("B1", f"the artifact has {model} bytes, the run counts {metrics.get('bytes_model')}"))
    return out or [
        well("C4/P6", f"the reported loss is the mean of {len(nats)} targets, once each"),
        well("M2", f"the bytes that divide are the text's {size}"),
        well("M4", f"{bpb:.6f} BPB from all nats, special ids included"),
    ]


def decode(trial: Trial, size: int = 2000) -> list[Finding]:
    """P7: the stream's probabilities code 2 kB, a process that never saw the text decodes them."""
    ids = trial.stream[: size + 1]
    try:
        coder = constriction_stream()
    except CodecError as error:
        return [unjudged("C1/P7", str(error))]
    one, other = trial.worker("encoder"), trial.worker("decoder")
    if not one.can_stream:
        return [unjudged("C1/P7", "the adapter has no stream")]
    encoder, nats = coder.queue.RangeEncoder(), []
    for worker in (one, other):
        worker.ask(op="stream", ids=len(ids))
        worker.ask(op="push", id=int(ids[0]))
    for value in ids[1:]:
        logprobs = np.array(one.ask(op="logprobs")["logprobs"])
        encoder.encode(int(value), categorical(coder.model, logprobs))
        nats.append(-logprobs[value])
        one.ask(op="push", id=int(value))
    code = encoder.get_compressed()
    decoder = coder.queue.RangeDecoder(code)
    for t, value in enumerate(ids[1:]):
        found = int(decoder.decode(categorical(coder.model, np.array(other.ask(op="logprobs")["logprobs"]))))
        if found != value:
            return [fail("C1/P7", f"target {t} decodes to id {found}, it was {value}")]
        other.ask(op="push", id=found)
    scored = trial.worker().score(ids)[0]
    if found := moved(scored, np.array(nats), FOLLOWS):
        return [
            fail(
                "C1/P7",
                f"target {found[0]} is scored {scored[found[0]]:.4f} nats, the stream that a decoder can "
                "follow "
                f"says {nats[found[0]]:.4f}",
            )
        ]
    streamed, said = (float(np.sum(each)) / np.log(2) / 8 for each in (nats, scored))
    text = (
        f"{len(ids) - 1} ids in {4 * len(code)} bytes, -log2 p of the stream {streamed:.1f}, "
        f"of score {said:.1f}"
    )
    good = all(abs(4 * len(code) - value) <= 0.002 * value + 64 for value in (streamed, said))
    return [Finding("C1/P7", "PASS" if good else "FAIL", text)]


def documents(trial: Trial) -> list[Finding]:
    """C1/P8: two documents swapped change only what comes after;
    nothing at all where documents are independent.
    """
    ids, starts = trial.stream, np.flatnonzero(trial.stream == trial.bos)
    if len(starts) < 4:
        return [unjudged("C1/P8", f"its example has {len(starts)} documents, 4 are needed")]
    parts = np.split(ids, starts[1:])
    parts[-1], parts[-2] = parts[-2], parts[-1]
    nats, first = trial.worker().score(ids)[0], starts[-2] - 1
    other = trial.worker().score(np.concatenate(parts))[0]
    if found := moved(other[:first], nats[:first], CLOSE):
        return [
            fail(
                "C1/P8",
                f"the last two documents swapped: target {found[0]} before them moves by {found[1]:.2g}",
            )
        ]
    if not independent(trial):
        return [well("C1/P8", "the last two documents swapped: nothing before them moves")]
    parts = np.split(ids, starts[1:])[::-1]
    other, ends = trial.worker().score(np.concatenate(parts))[0], np.cumsum([len(part) for part in parts])
    for k, end in enumerate(ends):  # what follows the BOS of each document
        was = len(ids) - end
        if found := moved(other[end - len(parts[k]) : end - 1], nats[was : was + len(parts[k]) - 1], CLOSE):
            return [
                fail(
                    "C1/P8",
                    f"documents are said to be independent; in reverse order target {found[0]} of document "
                    f"{len(parts) - 1 - k} moves by {found[1]:.2g} nats",
                )
            ]
    return [well("C1/P8", "documents in reverse order: no score moves")]


def independent(trial: Trial) -> bool:
    """Whether documents are scored on their own: what DOC_MASK
    says, unless something learns along the stream.
    """
    names = ("DOC_MASK", "TTT", "PPM_WEIGHT")
    on = {name: trial.settings.get(name, "0") not in ("0", "0.0", "") for name in names}
    return bool(trial.of_adapter("DOCUMENTS_INDEPENDENT")) or (
        on["DOC_MASK"] and not on["TTT"] and not on["PPM_WEIGHT"]
    )


def validation(trial: Trial) -> list[Finding]:
    """D1/P9: with another validation text the same weights come out, bit for bit."""
    if trial.adapter or trial.given_artifact:
        return [unjudged("D1/P9", "nothing is trained here")]
    mine = Path(trial.artifact).read_bytes()
    other = trial.made("noise", trial.run("noise", DATA_PATH=str(trial.data("noise")))[1]).read_bytes()
    shutil.rmtree(trial.folder / "noise")
    hashes = [hashlib.sha256(blob).hexdigest()[:12] for blob in (mine, other)]
    if mine != other:
        return [
            fail("D1/P9", f"validation text replaced by noise: artifact {hashes[1]} instead of {hashes[0]}")
        ]
    return [well("D1/P9", f"validation text replaced by noise: the same artifact, {hashes[0]}")]


def reload(trial: Trial) -> list[Finding]:
    """D2: a fresh process scores the artifact to the same number where no training data are left."""
    if trial.adapter or trial.given_artifact:
        return [unjudged("D2", "nothing is trained here")]
    said, alone = trial.trained["val_bpb"], trial.data("alone")
    for path in [*trial.folder.glob("*-train.jsonl"), *trial.folder.glob("data/*/*_train_*")]:
        path.unlink()
    again = trial.run("alone", DATA_PATH=str(alone), EVAL_ONLY="1", ARTIFACT=trial.artifact)[1]["val_bpb"]
    if not abs(again - said) <= 1e-6:
        return [fail("D2", f"scored alone the artifact reaches {again:.6f} BPB, the run reported {said:.6f}")]
    return [well("D2", f"{again:.6f} BPB again, from the artifact alone, training shards removed")]


def watched(trial: Trial) -> list[Finding]:
    """static/7, B1, B9: variables that `--help` does not name,
    network, processes - seen while all of the above ran.
    """
    out, known = [], set() if trial.adapter else trial.names
    trial.close()  # the notes are written when a process ends
    notes = [json.loads(path.read_text()) for path in sorted(trial.folder.glob("*.watch"))]
    lines = [(where, names) for note in notes for where, names in note["environment"].items()]
    hidden = {
        name: where
        for where, names in lines
        for name in names  # a line that reads all there is looks for nothing
        if name not in known and "AUDIT_WATCH" not in names
    }
    if (missing := trial.processes - len(notes)) > 0:
        why = f"{missing} of {trial.processes} processes left no notes: os._exit, or killed"
        out.append(unjudged("B1/network", why))
    level = "WARN" if trial.adapter else "FAIL"
    out += [
        Finding(
            "B3/environment", level, f"reads {name} from the environment, which --help does not name", where
        )
        for name, where in sorted(hidden.items())
    ]
    out += [
        fail("B1/network", f"tried the network: {what}")
        for what in sorted({w for n in notes for w in n["network"]})
    ]
    started = sorted({Path(what).name for note in notes for what in note["processes"]})
    if odd := [
        name for name in started if name not in ("git", "uname", "lscpu", "ldconfig", "file", "sysctl")
    ]:
        out.append(Finding("B9/processes", "WARN", f"started {', '.join(odd)}"))
    return out or [
        well("B1/network", f"no network, {len(notes)} processes watched"),
        well("B3/environment", "reads no variable that --help does not name"),
    ]


# fmt: off
PROBES = {
    "future": (future, "C1/P1"),
    "poison": (poison, "C2/P2"),
    "normal": (normal, "C2/P3"),
    "order": (order, "C3/P4"),
    "coverage": (coverage, "C4/P6"),
    "decode": (decode, "C1/P7"),
    "documents": (documents, "C1/P8"),
    "validation": (validation, "D1/P9"),
    "reload": (reload, "D2"),
    "watched": (watched, "B3/environment"),
}


# fmt: on


def behave(trial: Trial, only: list[str]) -> list[Finding]:
    """All findings of the probes named. A script that breaks down under one of them fails that one."""
    try:
        from tqdm import tqdm

        bar = tqdm(only, desc="audit", unit="probe", disable=None, leave=False)
    except ImportError:
        bar = only
    found = []
    try:
        try:
            _ = trial.artifact
        except Refused as error:
            return [fail("trial", str(error))]
        for name in bar:
            probe, rule = PROBES[name]
            try:
                found += probe(trial)
            except (Refused, OSError, LookupError, TypeError, AttributeError, ValueError) as error:
                found.append(fail(rule, f"the probe `{name}` broke off: {error}"))
                trial.close()
    finally:
        trial.close()
    return found


def check(
    record: Path | str,
    only: list[str] | None = None,
    settings: dict[str, str] | None = None,
    adapter: Path | None = None,
    artifact: Path | None = None,
    seconds: int = 170,
) -> list[Finding]:
    """Audits a record's folder or a script -> findings, in the order of the probes, then files and hints.

    Raises:
        Misuse: no such script, a probe or setting that does not exist.
    """
    script = find_script(record)
    folder = script.parent if (script.parent / "submission.json").exists() else None
    chosen = list(PROBES) if only is None else only
    if unknown := sorted(set(chosen) - {*PROBES, "files", "hints"}):
        raise Misuse(
            f"--only {unknown[0]}: no such probe, there are {', '.join([*PROBES, 'files', 'hints'])}"
        )
    chosen = sorted(chosen, key=[*PROBES, "files", "hints"].index)
    found: list[Finding] = []
    if probes := [name for name in chosen if name in PROBES]:
        with tempfile.TemporaryDirectory(prefix="audit-", ignore_cleanup_errors=True) as name:
            trial = Trial(script, Path(name).resolve(), settings, adapter, artifact, seconds, record=folder)
            found += behave(trial, probes)
            if not trial.network:
                found.append(
                    Finding(
                        "B1/network",
                        "WARN",
                        "this system offers no way to cut the network off: "
                        "only Python's own sockets were refused",
                    )
                )
    if folder and (only is None or "files" in only):
        try:
            found += forensics(folder)
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, OSError) as error:
            what = f"its files cannot be judged: {type(error).__name__}: {error}"
            found.append(Finding("files", "FAIL", what, folder.name))
    if only is None or "hints" in only:
        found += hints(script)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "record", nargs="*", help="records or scripts; several are audited one after the other"
    )
    parser.add_argument("--only", help="probes with commas, `files` and `hints` among them")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the tiny runs"
    )
    parser.add_argument("--adapter", type=Path, help="how to score with a script that is not of this family")
    parser.add_argument("--artifact", type=Path, help="probe this artifact; nothing is trained")
    parser.add_argument(
        "--seconds", type=int, default=170, help="for each process of the script (default: %(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="name the probes and end")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(f"{name:12}{probe.__doc__.splitlines()[0]}" for name, (probe, _) in PROBES.items()))
        return 0
    for path in (options.adapter, options.artifact):
        if path and not path.is_file():
            raise Misuse(f"{path}: no such file")
    if not options.record:
        raise Misuse("RECORD: a record's folder or a script is needed; . is the trunk")
    pairs = [item.partition("=") for item in options.set]
    if bad := [f"{name}{equals}{value}" for name, equals, value in pairs if not (name and equals)]:
        raise Misuse(f"--set {bad[0]}: NAME=VALUE expected")
    code, everything = FINE, []
    for record in options.record:
        found = check(
            record,
            options.only.split(",") if options.only else None,
            {n: v for n, _, v in pairs},
            options.adapter,
            options.artifact,
            options.seconds,
        )
        named = hashlib.sha256(find_script(record).read_bytes()).hexdigest()
        everything += [{**asdict(finding), "script_sha256": named} for finding in found]
        if not options.json:
            if len(options.record) > 1:
                print(f"--- {record}")
            print("\n".join(map(str, found)))
            sys.stdout.flush()
        code = max(code, FINDINGS if any(finding.level == "FAIL" for finding in found) else FINE)
    if options.json:
        print(json.dumps(everything, indent=1))
    return code


if __name__ == "__main__":
    command(main)
