"""Proves that two scripts compute the same numbers: a short run of each, compared bit for bit.

    python scripts/carry.py OLD.py NEW.py                    a small model with everything of the trunk on
    python scripts/carry.py OLD.py NEW.py --like BytePPM     at a record's settings, shortened
    python scripts/carry.py OLD.py NEW.py --quick            shorter still
    python scripts/carry.py OLD.py NEW.py --set DOC_MASK=1 --set DRAFT=0
    python scripts/lineage.py carry BytePPM                  a record's numbers to its present script

A run trains some steps, validates, saves checkpoints, calibrates, packs the artifact and makes every scoring
pass; the artifact is then decoded id by id, and writes a text. All in fp32 on the CPU, one thread, not
compiled: kernels of GPUs, bf16 and torch.compile are not compared. What a run leaves is kept under runs/carry
and taken from there when the same script is asked for again at the same settings.

Exit codes: 0 equal, 1 different (the first difference is named), 2 misuse.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import family
from family import ROOT, Misuse, find_script, read_json

KEPT = ROOT / "runs" / "carry"
KEPT_BYTES = 1_500_000_000  # of finished runs; the oldest go first
FORMAT = 3  # of what a finished run leaves in its folder: another number forgets them all

# What is measured with a clock or by the machine, in the lines of metrics.jsonl and in metrics.json.
TIMED = re.compile(r"(^|_)(seconds|time|ms)(_|$)|per_second|peak_mem")

# Settings of the trunk for a model that is small and has every piece switched on.
EVERYTHING = {
    "VOCAB_SIZE": "260", "NUM_LAYERS": "4", "MODEL_DIM": "128", "NUM_HEADS": "4", "NUM_KV_HEADS": "2",
    "ROPE_DIMS": "8", "XSA_LAST_N": "2", "NGRAM_ORDERS": "2,3,5", "NGRAM_WORDS": "2",
    "NGRAM_BUCKETS": "1024", "NGRAM_DIM": "8", "DRAFT": "2", "JEPA_CHUNK_SIZE": "8",
    "JEPA_LATENT_DIM": "32", "JEPA_PROJ_HIDDEN": "32", "JEPA_SIGREG_PROJS": "32", "JEPA_LAMBDA_MAX": "0.1",
    "ITERATIONS": "600", "WARMDOWN_ITERS": "200", "MUON_MOMENTUM_WARMUP_STEPS": "150", "EMA_DECAY": "0.9",
    "TRAIN_SEQ_LEN": "512", "EVAL_STRIDE": "64", "TTT": "sgd", "QUANT_ROUND": "gptq", "SEED": "42",
}

# Further settings of the trunk that a rewrite of it has to leave alone: `--variants` runs them all, without
# what one of the two scripts does not have.
VARIANTS = {
    "everything": {},
    "documents": {"DOC_MASK": "1", "TRAIN_ALIGN": "document", "TRAIN_ORDER": "shuffled", "TTT": "0"},
    "bare": {"JEPA_CHUNK_SIZE": "0", "NGRAM_ORDERS": "0", "DRAFT": "0", "TTT": "0", "UNET_SKIPS": "0",
             "RESID_MIX": "0", "SMEAR_GATE": "0", "XSA_LAST_N": "0", "LN_SCALE": "0", "ROPE_DIMS": "0",
             "EMA_ENABLED": "0", "QUANT_ROUND": "nearest", "LOGIT_SOFTCAP": "0", "LEAKY_SLOPE": "0"},
    "untied": {"TIE_EMBEDDINGS": "0", "JEPA_BACKBONE_GRAD": "1", "JEPA_ADAPTER_GRAD": "0",
               "NGRAM_HASHES": "4", "GRAD_CLIP_NORM": "0", "TTT_ADAPT": "0", "ATTENTION": "math"},
    "half": {"DTYPE": "bf16", "TRAIN_SEQ_LEN": "256", "TRAIN_BATCH_TOKENS": "1024", "EVAL_SEQ_LEN": "256",
             "DEVICE_BATCH_TOKENS": "1024"},
    "adapter": {"JEPA_LOSS": "0", "TTT_MODULES": "tok_emb,blocks.1", "TTT_EPOCHS": "2",
                "TTT_DECAY_CHUNKS": "2", "COMPRESSOR": "lzma", "MIN_LR": "0.1", "NGRAM_WORDS": "1"},
    "windows": {"ATTN_WINDOW_LAYERS": "0,1,2", "ATTN_WINDOW": "64", "BITS": "mlp:5", "QUANT_K": "attn:10"},
}


@dataclass(frozen=True)
class Length:
    """How short a run is: the steps, the ids of a step and of a row, bytes that are scored."""

    steps: int
    batch: int
    row: int
    val_bytes: int


FULL, QUICK = Length(24, 2048, 256, 4600), Length(8, 512, 64, 1200)


# What to run


def declares(source: str, name: str) -> bool:
    """Whether a script has this setting."""
    return re.search(rf"^\s+{name.lower()}(: \w+)? = Var\(", source, re.M) is not None


def probe(settings: dict[str, str], length: Length, sources: tuple[str, str]) -> dict[str, str]:
    """A record's settings, shortened so that everything that they switch on happens in `length`.

    `sources`: the old script and the new one. What the old one does not have is left out; what only says how
    much a run tells of itself has to be in both.
    """
    found = {key: value for key, value in settings.items() if key not in family.OF_THE_RUN}
    found["SEED"] = settings.get("SEED", "1337")

    def number(name: str, default: int) -> int:
        return int(float(found.get(name, default)))

    steps, row = number("ITERATIONS", 9000), number("TRAIN_SEQ_LEN", 4096)
    for name in ("WARMDOWN_ITERS", "MUON_MOMENTUM_WARMUP_STEPS", "JEPA_WARMUP_STEPS"):
        if number(name, 0):  # the same share of the run
            found[name] = str(max(2, round(number(name, 0) * length.steps / steps)))
    stride = max(8, length.row * number("EVAL_STRIDE", 512) // row)
    pieces = number("VOCAB_SIZE", 260) != 260
    short = {
        "ITERATIONS": length.steps, "TRAIN_BATCH_TOKENS": length.batch, "TRAIN_SEQ_LEN": length.row,
        # two micro-steps without a slot to spare, as all measured runs: GPTQ once counted rows in spare slots
        "DEVICE_BATCH_TOKENS": 4 * length.row,
        "WARMUP_STEPS": 1, "MAX_WALLCLOCK_SECONDS": 0, "ARTIFACT_BUDGET_BYTES": 0, "EVAL_BUDGET_SECONDS": 0,
        "EVAL_SEQ_LEN": length.row, "EVAL_STRIDE": min(stride, length.row),
        "EVAL_BATCH_TOKENS": 4 * length.row,
        # a piece stands for about three bytes: as many ids, and so as many chunks to learn from
        "VAL_BYTES": length.val_bytes * (3 if pieces else 1), "VAL_LOSS_EVERY": length.steps // 2,
        "CHECKPOINT_EVERY": length.steps // 2 - 1,
        "TRAIN_LOG_EVERY": 1, "TTT_CHUNK_TOKENS": 4 * length.row, "TTT_BATCH_ROWS": 2,
        "DEVICE": "cpu", "DTYPE": "fp32", "COMPILE": "0", "VERIFY_DATA": "0"}
    if found.get("BATCH_GROWTH", "1") != "1":  # updates share the micro-steps evenly
        short["DEVICE_BATCH_TOKENS"] = length.batch // 4
    for name, most in (("TTT_DOC_CHUNK", length.row // 4), ("ATTN_WINDOW", length.row // 4),
                       ("NGRAM_BUCKETS", 2048), ("VOCAB_SIZE", 1024), ("HEAD_POSITIONS", length.row // 4),
                       ("JEPA_SPAN", max(1, number("JEPA_SPAN", row) * length.row // row))):
        if name in found:
            short[name] = min(most, number(name, most))

    def known(name: str) -> bool:
        return all(declares(source, name) for source in (sources if name.endswith("_EVERY") else sources[:1]))

    return found | {name: str(value) for name, value in short.items() if known(name)}


def variant_of(settings: dict[str, str], caseops: bool) -> str:
    """The form of the ids at these settings, as data/prepare.py calls it."""
    size = settings.get("VOCAB_SIZE", "260")
    return "byte260" if size == "260" else f"sp{size}" + "-caseops" * caseops


def prepared(variant: str) -> Path:
    """Shards of a package of the standard library; pieces bring their tokenizer along. Made once."""
    import sysconfig

    folder = KEPT / "data" / f"{variant}-python{platform.python_version()}"
    if (folder / "manifest.json").exists():
        return folder
    source = Path(sysconfig.get_paths()["stdlib"]) / "email"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [sys.executable, str(ROOT / "data" / "prepare.py"), "python", str(source), "--variant",
                   variant, "--val-share", "0.2", "--overlap", "off", "--out", f"{temporary}/shards"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Misuse(f"data/prepare.py --variant {variant}: {last_line(done.stderr or done.stdout)}")
        if not folder.exists():
            os.replace(f"{temporary}/shards", folder)
    return folder


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


@dataclass(frozen=True)
class Side:
    """One script at one setting: what is run."""

    source: bytes
    settings: dict[str, str]
    data: Path
    label: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest()

    def key(self) -> str:
        """Names its folder among the finished runs."""
        shards = [(path.name, path.stat().st_size) for path in sorted(self.data.glob("*.bin"))]
        manifest = self.data / "manifest.json"
        text = manifest.read_text() if manifest.exists() else ""
        versions = [version("torch"), version("numpy"), platform.python_version(), platform.node()]
        told = [FORMAT, self.sha256, self.settings, str(self.data.resolve()), shards, text, versions]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:20]


def execute(side: Side, folder: Path) -> None:
    """Trains and scores in `folder`; then decodes with the artifact, and writes a text of bytes."""
    folder.mkdir(parents=True)
    script, data = folder / "train_gpt.py", side.data.resolve()
    script.write_bytes(side.source)
    names = ("PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
    kept = {key: os.environ[key] for key in names if key in os.environ}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    where = {"DATA_PATH": str(data), "RUNS_PATH": str(folder), "RUN_ID": "run"}
    if models := sorted(data.glob("*.model")):
        where["TOKENIZER_PATH"] = str(models[0])

    def call(*words: str, **settings: str) -> subprocess.CompletedProcess:
        environment = {**kept, **threads, **settings}
        return subprocess.run([sys.executable, *words], env=environment, cwd=folder, capture_output=True)

    done = call(script.name, **side.settings | where)
    (folder / "output.txt").write_bytes(done.stdout + done.stderr)
    result = {"exit_code": done.returncode, "error": last_line(done.stderr.decode(errors="replace"))}
    if not done.returncode:
        # longer than a chunk, so that a model that learns from what it reads does so
        count = int(side.settings.get("TTT_CHUNK_TOKENS", "400")) + 50
        shard = next(iter(sorted(data.glob("*_val_*.bin"))))
        decoded = call(str(ROOT / "scripts" / "carry_worker.py"), ".", str(shard), str(count))
        result["decoded"] = {"exit_code": decoded.returncode}
        if decoded.returncode:
            result["decoded"]["error"] = last_line(decoded.stderr.decode(errors="replace"))
        else:
            result["decoded"] |= json.loads(decoded.stdout.splitlines()[-1])
        if side.settings.get("VOCAB_SIZE", "260") == "260":
            own = all(declares(side.source.decode(), name) for name in ("GENERATE", "DRAFTER"))
            result["generated"] = generated(folder, shard, count, call, own)
    for name in ("best", "last"):  # of these it is enough to know whether they are the same
        path = folder / "run" / f"{name}.safetensors"
        if path.exists():
            meta, tensors = checkpoint(path)
            digests = {key: hashlib.sha256(as_bytes(value)).hexdigest() for key, value in tensors.items()}
            path.with_suffix(".json").write_text(json.dumps({"meta": meta, "tensors": digests}))
            path.unlink()
    (folder / "done.json").write_text(json.dumps(result))


def generated(folder: Path, shard: Path, count: int, call: Callable, own: bool) -> dict:
    """The text that goes on from the first ids of a shard: by scripts/generate.py, or by the script's `own`
    GENERATE, where decoding is the product (SGJM)."""
    import numpy as np

    ids = np.fromfile(shard, "<u2", offset=1024, count=count)
    (folder / "prompt.txt").write_bytes((ids[ids >= 4] - 4).astype(np.uint8).tobytes())
    if own:
        done = call("train_gpt.py", GENERATE="prompt.txt", ARTIFACT="run/artifact.bin", MAX_NEW_TOKENS="48",
                    SEED="7", TEMPERATURE="0.8", DEVICE="cpu", DTYPE="fp32", COMPILE="0")
    else:
        done = call(str(ROOT / "scripts" / "generate.py"), "run/artifact.bin", "--script", "train_gpt.py",
                    "--file", "prompt.txt", "--max-new-tokens", "48", "--seed", "7", "--temperature", "0.8",
                    "--device", "cpu")
    told = done.stderr.decode(errors="replace")
    passes = re.search(r"passes:(\d+)", told)
    return {"exit_code": done.returncode, "text": done.stdout.decode("latin-1"),
            "passes": int(passes[1]) if passes else None, "error": last_line(told) if done.returncode else ""}


def finished(side: Side, root: Path, fresh: bool = False) -> Path:
    """The folder of a finished run of this side, made now where there is none."""
    folder = root / side.key()
    if fresh or not (folder / "done.json").exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix="running-") as temporary:
            execute(side, Path(temporary) / "side")
            if fresh:
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process has put the same there meanwhile
                os.replace(Path(temporary) / "side", folder)
    os.utime(folder / "done.json")
    return folder


def prune(root: Path, most: int = KEPT_BYTES) -> None:
    """Forgets the finished runs that were asked for longest ago, down to `most` bytes."""
    marks = sorted(root.glob("*/done.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for mark in marks:
        total += sum(path.stat().st_size for path in mark.parent.rglob("*") if path.is_file())
        if total > most and mark is not marks[0]:
            shutil.rmtree(mark.parent, ignore_errors=True)


# Comparing


def checkpoint(path: Path) -> tuple[dict, dict]:
    """What a checkpoint says of itself, and its tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = json.loads((file.metadata() or {}).get("golf", "{}"))
        return meta, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def as_bytes(tensor) -> bytes:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass
class Comparison:
    """What was compared, by stage in the order of a run, and what is different: {stage: [text, ...]}."""

    counts: dict[str, int] = field(default_factory=dict)
    different: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def stage(self, name: str, count: int, found: Iterable[str]) -> None:
        self.counts[name] = count
        if texts := list(found):
            self.different[name] = texts

    @property
    def equal(self) -> bool:
        return not self.different

    def first(self) -> str:
        stage, texts = next(iter(self.different.items()))
        return f"{stage}: {texts[0]}"

    def others(self) -> str:
        """In a line, what differs after the first difference."""
        told = {stage: len(texts) for stage, texts in self.different.items()}
        told[next(iter(told))] -= 1
        return ", ".join(f"{stage} ({count})" for stage, count in told.items() if count)


def values_apart(old, new, place: str = "") -> Iterator[str]:
    """Where two JSON values are not the same: of objects what `old` has, clocks aside."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in old.items():
            if TIMED.search(key):
                continue
            here = f"{place} {key}".strip()
            if key in new:
                yield from values_apart(value, new[key], here)
            else:
                yield f"{here} is missing, it was {value!r}"
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new), 1):
            yield from values_apart(*pair, f"{place} {i}")
    elif old != new and not (old != old and new != new):  # NaN is like NaN
        yield f"{place} is {new!r}, it was {old!r}"


def log_lines(folder: Path) -> dict[str, dict]:
    """The lines of metrics.jsonl by step and kind, the last of each."""
    path, found = folder / "run" / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        values = json.loads(line)
        kind = "validation" if "val_bpb" in values else "training"
        found[f"step {values.get('step')} {kind}"] = values
    return found


def gradient_lines(folder: Path) -> list[str]:
    text = (folder / "run" / "log.txt").read_text() if (folder / "run" / "log.txt").exists() else ""
    return re.findall(r"^grad_report .*", text, re.M)


def lists_apart(old: list, new: list, what: str) -> Iterator[str]:
    for i, value in enumerate(old):
        if i >= len(new) or new[i] != value:
            yield f"{what} {i + 1} is {new[i] if i < len(new) else 'missing'}, it was {value}"
    if len(new) > len(old):
        yield f"{len(new) - len(old)} more than before"


def settings_apart(old: dict, new: dict, scripts: tuple[Path, Path]) -> tuple[list[str], list[str]]:
    """(differences, notes) between the settings that two artifacts or checkpoints carry.

    A setting may be gone (whether it mattered, the numbers tell), but not where the new script refuses its
    value; it may be new at its default.
    """
    apart = list(values_apart({key: value for key, value in old.items() if key in new}, new))
    gone, come = [key for key in old if key not in new], [key for key in new if key not in old]
    if gone or come:
        before, now = (family.load_script(path).Hyperparameters for path in scripts)
        known = {var.name for var in before.vars().values()}
        defaults = {var.name: var.default for var in now.vars().values()}
        retired = {key: off.split() if isinstance(off, str) else off for key, (off, _) in now.RETIRED.items()}
        for key in list(gone):
            text = as_text(old[key])
            if key in retired and text not in retired[key]:
                apart.append(f"{key} is missing and not retired at {text!r}")
                gone.remove(key)
        for key in list(come):
            if key in known or defaults.get(key) != new[key]:
                apart.append(f"{key} is new, at {new[key]!r}")
                come.remove(key)
    notes = [f"the header lost {', '.join(gone)}"] * bool(gone)
    return apart, notes + [f"the header gained {', '.join(come)}"] * bool(come)


def tensors_apart(old: dict, new: dict) -> Iterator[str]:
    """Tensors by name that differ, each with its first element that does."""
    for name, tensor in old.items():
        other = new.get(name)
        if other is None:
            yield f"{name} is missing"
        elif (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            yield f"{name} is {list(other.shape)} {other.dtype}, it was {list(tensor.shape)} {tensor.dtype}"
        elif (mine := as_bytes(tensor)) != (theirs := as_bytes(other)):
            size = tensor.element_size()
            at = next(i for i, pair in enumerate(zip(mine, theirs)) if pair[0] != pair[1]) // size
            place, rest = [], at
            for width in reversed(tensor.shape):
                place.insert(0, rest % width)
                rest //= width
            pair = (part.reshape(-1)[at].item() for part in (other, tensor))
            yield "{} {} is {!r}, it was {!r}".format(name, place, *pair)
    yield from (f"{name} is new" for name in new if name not in old)


def checkpoints_apart(folders: list[Path], name: str, scripts) -> tuple[int, list[str], list[str]]:
    """(tensors, differences, notes) of a checkpoint that both runs have saved."""
    paths = [folder / "run" / f"{name}.safetensors" for folder in folders]
    digests = [path.with_suffix(".json") for path in paths]
    if any(path.exists() for path in digests):
        old, new = (read_json(path) if path.exists() else {"meta": {}, "tensors": {}} for path in digests)
        meta, tensors = (old["meta"], new["meta"]), (old["tensors"], new["tensors"])
        found = [f"{key} differs" if key in tensors[1] else f"{key} is missing"
                 for key in tensors[0] if tensors[1].get(key) != tensors[0][key]]
        found += [f"{key} is new" for key in tensors[1] if key not in tensors[0]]
    elif any(path.exists() for path in paths):
        old, new = (checkpoint(path) if path.exists() else ({}, {}) for path in paths)
        meta, tensors = (old[0], new[0]), (old[1], new[1])
        found = list(tensors_apart(*tensors))
    else:
        return 0, [], []
    config = [dict(part.pop("config", {})) for part in meta]
    both = {key: value for key, value in config[1].items() if key in config[0]}  # the header has all
    apart, _ = settings_apart(config[0], both, scripts)
    notes = []
    # nothing draws from torch's own generator, so its state is no number either
    found = [text for text in found if not (text.startswith("rng.") and "missing" in text)]
    if gone := [key for key in meta[0] if key not in meta[1] and tensors[1]]:  # bookkeeping, not a number
        notes.append(f"checkpoints say no more of {', '.join(gone)}")
    if come := [key for key in meta[1] if key not in meta[0] and tensors[0]]:
        notes.append(f"checkpoints also say {', '.join(come)}")
    kept = [{key: part[key] for key in part if key in meta[0] and key in meta[1]} for part in meta]
    return len(tensors[0]), [*found, *values_apart(*kept), *apart], notes


def parts_of(blob: bytes) -> tuple[dict, bytes]:
    """(header, payload) of an artifact of any version."""
    import zlib

    body = blob[8 + 32 :]
    length = int.from_bytes(body[2:6], "little")
    header = body[6 : 6 + length]
    return json.loads(header if header[:1] == b"{" else zlib.decompress(header)), body[6 + length :]


def payloads_apart(blobs: list[bytes], scripts: tuple[Path, Path]) -> Iterator[str]:
    """The first tensor that two artifacts unpack differently, or where their bytes part."""
    old, new = (parts_of(blob)[1] for blob in blobs)
    if old == new:
        return
    try:
        sides = [family.load_script(path).unpack(blob, str(path))[1] for path, blob in zip(scripts, blobs)]
        import torch
        sides = [{name: torch.from_numpy(array) for name, array in side.items()} for side in sides]
        yield from tensors_apart(*sides)
    except Exception as error:  # scripts of any age: each has its own kinds
        yield f"the payloads do not unpack alike ({error})"
    at = next((i for i, pair in enumerate(zip(old, new)) if pair[0] != pair[1]), min(len(old), len(new)))
    yield f"byte {at} of the payload ({len(new)} bytes, they were {len(old)})"


def compare(old: Path, new: Path) -> Comparison:
    """Holds two finished runs against each other, in the order in which a run makes its parts."""
    found, folders = Comparison(), [old, new]
    scripts = old / "train_gpt.py", new / "train_gpt.py"
    results = [read_json(folder / "done.json") for folder in folders]
    if results[0]["exit_code"]:
        raise Misuse(f"the old script does not run: {results[0]['error']} ({old / 'output.txt'})")
    lines = [log_lines(folder) for folder in folders]
    if results[1]["exit_code"]:
        text = f"ends with exit code {results[1]['exit_code']}: {results[1]['error']}"
        both = {place: lines[0][place] for place in lines[0] if place in lines[1]}
        found.stage("metrics.jsonl", len(both), values_apart(both, lines[1]))  # as far as it came
        found.stage("new script", 1, [text])
        return found
    found.stage("metrics.jsonl", len(lines[0]), values_apart(*lines))
    reports = [gradient_lines(folder) for folder in folders]
    found.stage("gradient reports", len(reports[0]), lists_apart(*reports, "line"))
    for name in ("last", "best", "final"):
        count, apart, notes = checkpoints_apart(folders, name, scripts)
        found.stage(f"{name}.safetensors", count, apart)
        found.notes += [note for note in notes if note not in found.notes]
    metrics = [read_json(folder / "run" / "metrics.json") for folder in folders]
    passes = [side["evals"] for side in metrics]
    for name, entry in passes[0].items():  # a pass that hardly learns would prove little
        if 0 < entry.get("updates", 0) < 3:
            raise Misuse(f"{name}: {entry['updates']} updates of test-time training, at least 3 are needed: "
                         "--set a smaller TTT_CHUNK_TOKENS or a larger VAL_BYTES")
    weights = ("raw", "final_raw", "final_ema")
    for stage, here in (("scores of the weights", True), ("scores of the artifact", False)):
        if not here:
            compare_artifacts(found, folders, scripts)
        both = [{name: entry for name, entry in side.items() if (name in weights) == here} for side in passes]
        apart = [*values_apart(*both), *(f"{name} is new" for name in both[1] if name not in both[0])]
        found.stage(stage, len(both[0]), apart)
    summary = [{key: side.get(key) for key in ("headline", "val_bpb", "steps", "params", "params_shipped")}
               for side in metrics]
    found.stage("metrics.json", len(summary[0]), values_apart(*summary))
    for kind, stage in (("decoded", "decoding"), ("generated", "generated text")):
        told = [side.get(kind) for side in results]
        if told[0] is None:
            continue
        if error := told[0].pop("error", ""):
            found.notes.append(f"no {stage}: {error}")
            if told[1] and not told[1]["exit_code"]:
                continue  # only the old script failed: there is nothing to hold the new one against
        count = sum(len(value) for value in told[0].values() if isinstance(value, (list, str)))
        found.stage(stage, count, values_apart(told[0], told[1] or {}))
    return found


def compare_artifacts(found: Comparison, folders: list[Path], scripts: tuple[Path, Path]) -> None:
    blobs = [(folder / "run" / "artifact.bin").read_bytes() for folder in folders]
    headers = [parts_of(blob)[0] for blob in blobs]
    for header in headers:
        header.pop("script", None)  # which says what made it
    config = [header.pop("config", {}) for header in headers]
    apart, notes = settings_apart(*config, scripts)
    size = len(blobs[1]) - len(blobs[0])
    if notes:
        found.notes.append(f"{'; '.join(notes)} of the artifact: {size:+d} bytes")
    apart = [*values_apart(*headers), *apart, *payloads_apart(blobs, scripts)]
    found.stage("artifact", len(parts_of(blobs[0])[1]), apart)


def side_by_side(pairs: list[tuple[Side, Side]], jobs: int = 1, fresh: bool = False) -> list[Comparison]:
    """Runs both sides of each pair, `jobs` processes at a time, and compares them."""
    if jobs < 1:
        raise Misuse(f"--jobs {jobs}: a whole number from 1")
    root = KEPT
    sides = {side.key(): side for pair in pairs for side in pair}
    with ThreadPoolExecutor(jobs) as threads:
        folders = dict(zip(sides, threads.map(lambda side: finished(side, root, fresh), sides.values())))
    found = [compare(folders[old.key()], folders[new.key()]) for old, new in pairs]
    prune(root)
    return found


# What was measured


@dataclass(frozen=True)
class Measured:
    """What a result file tells of the run that made it."""

    settings: dict[str, str]
    caseops: bool = False  # are its ids CaseOps pieces?
    script: str | None = None  # sha256

    @classmethod
    def read(cls, path: Path) -> Measured:
        found = read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
            raise Misuse(f"{path}: no `settings`, which a metrics.json or an ablation's file has")
        settings = {key: as_text(value) for key, value in found["settings"].items()}
        variant = str(found.get("dataset", {}).get("variant"))
        return cls(settings, variant.endswith("-caseops"), found.get("script_sha256"))


def result_file(name: str) -> Path:
    """A result by its path, by its run's folder, or of a record's first seed by the record's name."""
    path = Path(name)
    if not path.exists():
        path = find_script(name).parent
    if path.is_dir():
        inside = [path / "metrics.json", *sorted(path.glob("seed*/metrics.json"))]
        path = next((file for file in inside if file.exists()), inside[0])
    return path


def as_text(value) -> str:
    return str(int(value) if isinstance(value, bool) else value)


def made_pair(sources: tuple[bytes, bytes], like: Measured, length: Length, changes: dict[str, str],
              data: Path | None, label: str = "") -> tuple[Side, Side]:
    """Both sides at one setting, shortened, with `changes` on top."""
    mine = probe(like.settings, length, tuple(source.decode() for source in sources))
    if data is not None:
        if not (data / "manifest.json").exists():
            raise Misuse(f"{data}: no manifest.json, so no folder of data/prepare.py")
        mine["VOCAB_SIZE"] = like.settings.get("VOCAB_SIZE", "260")
    mine |= changes
    folder = data or prepared(variant_of(mine, like.caseops))
    return tuple(Side(source, mine, folder, label) for source in sources)


# A record's numbers


@dataclass
class Job:
    """Results of a record that one script made at one setting: one pair of runs speaks for them all."""

    folder: Path
    results: list[str]  # "seed42", or paths below the record's folder
    like: Measured
    source: bytes = b""
    pair: tuple[Side, Side] | None = None

    def place(self) -> str:
        return f"records/{self.folder.name}/{self.results[0]}"


def jobs_of(folder: Path, arms: bool) -> list[Job]:
    """What a record has measured with another text of its script, by that text and by setting."""
    present = hashlib.sha256((folder / "train_gpt.py").read_bytes()).hexdigest()
    paths = sorted(folder.glob("seed*/metrics.json"))
    if arms:
        for part in ("ablations", "measured"):
            paths += sorted((folder / part).rglob("*.json"))
    found: dict[tuple, Job] = {}
    for path in paths:
        about = read_json(path)
        if not isinstance(about, dict) or "script_sha256" not in about:
            continue
        if not {"evals", "set", "coded_bytes"} & {*about}:
            continue  # neither a run nor a proof nor a table of scores, but speeds: these are made again
        if "evals" in about:
            like = Measured.read(path)
        else:  # what codec.py prove made with the artifact of a seed, or a table that says what it set
            of_seed = Measured.read(paths[0])
            own = {key: as_text(value) for key, value in about.get("set", {}).items()}
            like = replace(of_seed, settings=of_seed.settings | own, script=about["script_sha256"])
        if like.script == present:
            continue
        shared = {key: value for key, value in like.settings.items() if key not in family.OF_THE_RUN}
        inside = path.relative_to(folder)
        name = inside.parent.as_posix() if path.name == "metrics.json" else inside.as_posix()
        job = found.setdefault((like.script, *sorted(shared.items())), Job(folder, [], like))
        job.results.append(name)
    for job in found.values():
        job.results = by_folder(folder, job.results)
    return list(found.values())


def by_folder(folder: Path, results: list[str]) -> list[str]:
    """The same results, an arm's folder in place of its files where all of them are there."""
    kept = []
    for name in results:
        parent = Path(name).parent
        files = {path.relative_to(folder).as_posix() for path in (folder / parent).glob("*.json")}
        whole = name.endswith(".json") and files <= {*results}
        kept.append(parent.as_posix() if whole else name)
    return list(dict.fromkeys(kept))


def measured_source(job: Job, root: Path) -> bytes:
    """The script that made these numbers: from the log of a seed, else from git.

    Raises:
        Misuse: neither has it.
    """
    digest = job.like.script
    if seeds := [name for name in job.results if re.fullmatch(r"seed\d+", name)]:
        return [family.source_in_log(job.folder / name / "log.txt", digest) for name in seeds][0]
    for path in sorted(job.folder.glob("seed*/log.txt")):
        try:
            return family.source_in_log(path, digest)
        except Misuse:
            continue
    if (source := sources_in_git(root).get(digest)) is None:
        raise Misuse(f"{job.folder / job.results[0]}: no log and no commit has its script, {digest[:8]}")
    return source


@functools.cache
def sources_in_git(root: Path) -> dict[str, bytes]:
    """{sha256: text} of all scripts that git knows, and of those at the head of logs."""
    found = {}
    for pattern in ("*train_gpt.py", "*log.txt"):
        raw = git(root, "log", "--all", "--format=", "--raw", "--no-abbrev", "--", pattern).decode()
        blobs = {line.split()[3] for line in raw.splitlines() if line.startswith(":")} - {"0" * 40}
        rest = git(root, "cat-file", "--batch", text="\n".join(sorted(blobs)).encode())
        while rest:
            head, _, rest = rest.partition(b"\n")
            size = int(head.split()[-1]) if not head.endswith(b"missing") else -1
            source, rest = rest[: max(size, 0)], rest[size + 1 :]
            source = source.partition(family.LOG_RULER)[0] if pattern == "*log.txt" else source
            found[hashlib.sha256(source).hexdigest()] = source
    return found


def git(root: Path, *words: str, text: bytes = b"") -> bytes:
    """What git says; nothing where there is no git or no repository."""
    try:
        return subprocess.run(["git", "-C", str(root), *words], input=text, capture_output=True).stdout
    except OSError:
        return b""


def entry_of(job: Job, found: Comparison, data: Path) -> dict:
    """The proof as it stands in `carried` of submission.json."""
    old, new = job.pair
    like = {key: value for key, value in job.like.settings.items() if key not in family.OF_THE_RUN}
    probe_settings = {key: value for key, value in old.settings.items() if like.get(key) != value}
    note = "; ".join(["equal bit for bit", *found.notes])
    return {"from": old.sha256, "to": new.sha256, "for": job.results,
            "date": datetime.date.today().isoformat(), "torch": version("torch"),
            "probe": dict(sorted(probe_settings.items())), "data": data.name,
            "compared": {stage: count for stage, count in found.counts.items() if count}, "note": note}


def add_entry(folder: Path, entry: dict) -> None:
    """Writes a proof into submission.json; it takes the place of those from the same script for the same."""
    path = folder / "submission.json"
    submission = read_json(path)
    kept = [old for old in submission.get("carried", [])
            if old["from"] != entry["from"] or not {*old["for"]} <= {*entry["for"]}]
    submission["carried"] = [*kept, entry]
    family.write_atomic(path, f"{json.dumps(submission, indent=1, ensure_ascii=False)}\n".encode())


def carry_records(options: argparse.Namespace, root: Path = ROOT) -> list[family.Finding]:
    """Carries the numbers of records to their present scripts, where both compute the same.

    Returns a finding for each script and setting that made numbers: PASS where they hold for the present
    script, FAIL where they do not, with the first difference.
    """
    folders = [find_script(name).parent for name in options.records] or family.records(root)
    data = Path(options.data) if options.data else None
    length, done = QUICK if options.quick else FULL, []
    if options.jobs < 1:
        raise Misuse(f"--jobs {options.jobs}: a whole number from 1")
    for folder in folders:
        place = f"records/{folder.name}"
        if not list(folder.glob("seed*/metrics.json")):
            text = "no seed*/metrics.json: nothing is measured"
            done.append(family.Finding("carry/runs", "FAIL", text, place))
            continue
        todo = jobs_of(folder, options.arms)
        if not todo:
            done.append(family.Finding("carry/present", "PASS", "measured with the present script", place))
        present = (folder / "train_gpt.py").read_bytes()
        for job in todo:
            try:
                job.source = measured_source(job, root)
                job.pair = made_pair((job.source, present), job.like, length, {}, data)
                found, = side_by_side([job.pair], options.jobs, options.fresh)
            except Misuse as error:
                done.append(family.Finding("carry/run", "FAIL", str(error), job.place()))
                continue
            told = f"{job.pair[0].sha256[:8]} to {job.pair[1].sha256[:8]}"
            if found.equal:
                entry = entry_of(job, found, job.pair[0].data)
                text = f"{told}, {entry['note']} ({', '.join(job.results)})"
                done.append(family.Finding("carry/equal", "PASS", text, job.place()))
                if not options.dry_run:  # at once: a command that is stopped keeps what it has shown
                    add_entry(folder, entry)
            else:
                text = f"{told}, first in {found.first()}; nothing is written for {', '.join(job.results)}"
                done.append(family.Finding("carry/different", "FAIL", text, job.place()))
    return done


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lineage.py carry`."""
    parser.add_argument("--arms", action="store_true", help="ablations/ and measured/ too")
    parser.add_argument("--dry-run", action="store_true", help="compare, write nothing")
    add_shared_options(parser)


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="8 steps of 512 ids instead of 24 of 2,048")
    parser.add_argument("--data", metavar="FOLDER", help="shards (default: made of the standard library)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time")
    parser.add_argument("--fresh", action="store_true", help="run again what runs/carry already has")


# Two scripts


def show(found: Comparison, label: str = "", every: bool = False) -> None:
    """One paragraph: what was compared, and the first difference, or every one."""
    head = f"{label}: " * bool(label)
    counts = ", ".join(f"{stage} {count}" for stage, count in found.counts.items() if count)
    if found.equal:
        print(f"{head}equal: {counts}")
    else:
        print(f"{head}DIFFERENT, first in {found.first()}")
        if every:
            for stage, texts in found.different.items():
                print("\n".join(f"  {stage}: {text}" for text in texts))
        elif rest := found.others():
            print(f"  and further: {rest}")
    for note in found.notes:
        print(f"  note: {note}")


def two(options: argparse.Namespace) -> int:
    sources = find_script(options.old).read_bytes(), find_script(options.new).read_bytes()
    if bad := [text for text in options.set if not re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", text)]:
        raise Misuse(f"--set {bad[0]}: NAME=VALUE")
    changes = dict(text.split("=", 1) for text in options.set)
    like = Measured.read(result_file(options.like)) if options.like else Measured(EVERYTHING)
    texts = [source.decode() for source in sources]
    variants = {}
    for label, more in VARIANTS.items() if options.variants else [("", {})]:
        both = [name for name in more if all(declares(text, name) for text in texts)]
        variants[label] = {name: more[name] for name in both}
    length = QUICK if options.quick else FULL
    data = Path(options.data) if options.data else None
    pairs = [made_pair(sources, like, length, more | changes, data, label)
             for label, more in variants.items()]
    all_found = side_by_side(pairs, options.jobs, options.fresh)
    for (_, new), found in zip(pairs, all_found):
        show(found, new.label, options.all)
    return family.FINE if all(found.equal for found in all_found) else family.FINDINGS


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("old", help="a script, its folder, a record's name, or . for the trunk")
    parser.add_argument("new", help="the same")
    parser.add_argument("--like", metavar="RESULT", help="a record or a result file whose settings are taken "
                        "(default: a small model with everything of the trunk on)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting")
    parser.add_argument("--all", action="store_true", help="show every difference, not only the first")
    parser.add_argument("--variants", action="store_true", help="the trunk at several settings in turn")
    add_shared_options(parser)
    return two(parser.parse_args(argv))


if __name__ == "__main__":
    family.command(main)
