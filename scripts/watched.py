"""Runs as they happen, read from what they leave behind. Nothing here writes, locks or asks for anything.

A run's `metrics.jsonl` has a line a logged step; only what is new in it is read. The settings and the data
that turn nats into bits per byte stand once in `log.txt`, and the end of a run is its `metrics.json`.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import bench
import leaderboard
import stats
from family import LOG_RULER, Misuse, find_script, read_json
from leaderboard import Band, Record

RECENT = 50  # lines over which a rate is taken
WINDOW = 1.2  # as far back as curves are compared: the bytes of the last line over this
FALL = 20  # part of the lines before the line of losses begins: the first fall would flatten the rest
SILENT = 600  # seconds without a line after which a run that cannot be asked counts as gone
# What the trunk's blocks are made of: a script with other ones has other FLOPs.
BLOCKS = ("NUM_LAYERS", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "MLP_MULT", "VOCAB_SIZE", "TRAIN_SEQ_LEN")
OTHER_BLOCKS = "PATCH_SIZE"


@dataclass
class Follower:
    """The lines of a metrics.jsonl, as far as it has been written; the last line of a step counts.

    A line that is no object with a step and a loss is counted under `unreadable`. A file that has become
    shorter is another one: it is read from its beginning.
    """

    path: Path
    steps: dict[int, dict] = field(default_factory=dict)  # of training
    checks: dict[int, dict] = field(default_factory=dict)  # of validation
    unreadable: int = 0
    _at: int = 0
    _rest: bytes = b""

    def read(self) -> list[dict]:
        """What is new, in order; nothing where the file is not there."""
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._at:
                    self.steps, self.checks, self.unreadable = {}, {}, 0
                    self._at, self._rest = 0, b""
                file.seek(self._at)
                data = file.read()
        except OSError:
            return []
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [entry for line in lines if line.strip() and (entry := self.taken(line))]

    def taken(self, line: bytes) -> dict | None:
        """The entry of a line, kept under its step; None where it is none."""
        try:
            entry = json.loads(line)
            step = entry["step"]
            if not isinstance(step, int) or not {"train_loss", "val_loss"} & entry.keys():
                raise ValueError
            told = [entry[key] for key in ("train_loss", "val_loss", "progress") if key in entry]
            if not all(isinstance(value, (int, float)) for value in told):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            self.unreadable += 1
            return None
        (self.steps if "train_loss" in entry else self.checks)[step] = entry
        return entry

    @property
    def cut(self) -> bool:
        """Whether the file ends inside a line: one that is being written, or the last of a run that died."""
        return bool(self._rest.strip())


@dataclass(frozen=True)
class About:
    """What a run said at its start. `settings` and `data` are empty where its log does not say."""

    settings: dict
    data: dict
    scored: dict  # targets and bytes of the validation text

    @classmethod
    def read(cls, log: Path) -> About | None:
        """From the lines after the script in a log.txt; None as long as they are not there."""
        try:
            text = log.read_bytes().partition(LOG_RULER)[2].decode(errors="replace")
        except OSError:
            return None
        found = {}
        for name in ("settings", "data"):
            line = re.search(rf"^{name} (\{{.*\}})$", text, re.M)
            try:
                found[name] = json.loads(line[1]) if line else {}
            except ValueError:
                found[name] = {}
        counts = re.search(r"^val: targets:(\d+) bytes:(\d+)", text, re.M)
        if not counts:
            return None
        return cls(**found, scored={"targets": int(counts[1]), "bytes": int(counts[2])})


class Watched:
    """A run in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        self.lines = Follower(folder / "metrics.jsonl")
        self._about: About | None = None

    def read(self) -> list[dict]:
        return self.lines.read()

    @property
    def about(self) -> About:
        """Read until the log has it, then never again."""
        self._about = self._about or About.read(self.folder / "log.txt")
        return self._about or About({}, {}, {})

    @property
    def record(self) -> Record:
        """The run in the shape of a record, which knows the bytes of a token and of a step."""
        about = self.about
        metrics = {"dataset": about.data, "settings": about.settings, "evals": {"val": about.scored}}
        run = stats.Run(str(self.folder / "metrics.json"), None, math.nan, "val", metrics)
        return Record(self.folder, {}, group=stats.Group(self.name, [run]))

    def scale(self) -> tuple[float, float] | None:
        """(bytes of text a step, bits a byte of a nat a token); None where the log does not say."""
        try:
            return self.record.bytes_a_step, 1 / (math.log(2) * self.record.bytes_a_token)
        except (KeyError, TypeError, ZeroDivisionError):
            return None

    def curve(self) -> list[tuple[float, float, float]]:
        """[(bytes of text, seconds, BPB)] of training, by bytes; without values that are no numbers."""
        scale = self.scale()
        if scale is None:
            return []
        points = [(step * scale[0], entry.get("train_seconds"), entry["train_loss"], scale[1])
                  for step, entry in sorted(self.lines.steps.items())]
        return [(seen, seconds, loss * bits) for seen, seconds, loss, bits in points
                if is_number(seconds) and is_number(loss)]

    def smooth(self) -> list[tuple[float, float]]:
        """[(bytes of text, running mean of BPB)]."""
        return [(seen, loss) for seen, (_, loss) in leaderboard.smooth(self.curve()).items()]


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# --- Is it alive? ---


def holder(path: Path) -> int | None:
    """Process that holds the lock on a log.txt: 0 for none, None where this machine does not tell.

    A run holds it while it lives. To try the lock could make a run fail that starts just then, so the
    kernel's list is read.
    """
    try:
        inode = str(path.stat().st_ino)
        locks = Path("/proc/locks").read_text()
    except OSError:
        return None
    for line in locks.splitlines():
        parts = line.split()
        if len(parts) > 5 and parts[1] == "FLOCK" and parts[5].rpartition(":")[2] == inode:
            return int(parts[4])
    return 0


def resident_mb(process: int) -> float | None:
    """Memory of a process as the kernel sees it, MB."""
    try:
        found = re.search(r"^VmRSS:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) / 1e3 if found else None


# --- One line of the view ---


@dataclass(frozen=True)
class Row:
    """A run at one moment; None is what cannot be known. Losses are running means."""

    name: str
    state: str  # starting, training, scoring, finished, died; silent where that cannot be told
    step: int = 0
    steps: int | None = None
    progress: float | None = None
    loss: float | None = None  # nats a token
    bpb: float | None = None
    val_bpb: float | None = None
    bytes_per_second: float | None = None
    mfu: float | None = None
    left: float | None = None  # seconds of training
    memory_mb: float | None = None
    difference: float | None = None  # BPB, run minus record at equal bytes
    other_data: bool = False  # the record was trained on other text or ids
    seen: float = 0.0  # bytes of text
    marks: tuple[str, ...] = ()
    spark: tuple[float, ...] = ()


def row(run: Watched, against: Against | None = None, peak: float | None = None) -> Row:
    """What there is to say of a run. peak: FLOP/s of the machine."""
    lines, curve = run.lines, run.curve()
    steps = sorted(lines.steps)
    last = lines.steps[steps[-1]] if steps else {}
    finished = finish(run.folder)
    process = None if finished else holder(run.folder / "log.txt")
    state = state_of(run, last, finished, process)

    rate = tokens_per_second(run)
    scale, smooth = run.scale(), run.smooth()
    progress, seconds = last.get("progress"), last.get("train_seconds")
    left = None
    if state == "training" and is_number(progress) and is_number(seconds) and 0 < progress <= 1:
        left = seconds * (1 - progress) / progress
    bad = len(steps) - len(curve) if scale else 0
    marks = [f"{lines.unreadable} lines cannot be read"] if lines.unreadable else []
    marks += [f"{bad} losses are no numbers"] if bad else []
    marks += ["the last line is cut off"] if lines.cut and state in ("died", "finished") else []

    checks = [lines.checks[step].get("val_bpb") for step in sorted(lines.checks)]
    scores = [score for score in (*checks, (finished or {}).get("val_bpb")) if is_number(score)]
    flop = flop_per_token(run.about.settings)
    return Row(
        run.name, state, steps[-1] if steps else 0, run.about.settings.get("ITERATIONS"), progress,
        smooth[-1][1] / scale[1] if smooth else last.get("train_loss"), smooth[-1][1] if smooth else None,
        scores[-1] if scores else None,
        rate * run.record.bytes_a_token if rate and scale else None,
        rate * flop / peak if rate and peak and flop else None, left,
        resident_mb(process) if process else (finished or {}).get("peak_mem_mb"),
        against.difference(curve, smooth) if against else None,
        bool(against and run.about.data.get("sha256") != against.data), curve[-1][0] if curve else 0.0,
        tuple(marks), tuple(thinned([loss for _, loss in smooth[len(smooth) // FALL :]])))


def finish(folder: Path) -> dict | None:
    """The metrics.json of a run that has ended; a run that goes on from a checkpoint has removed nothing yet,
    so one that is older than the last line is not its end.
    """
    path, lines = folder / "metrics.json", folder / "metrics.jsonl"
    try:
        if lines.exists() and path.stat().st_mtime < lines.stat().st_mtime:
            return None
        found = read_json(path)
    except (OSError, Misuse):
        return None
    return found if isinstance(found, dict) else None


def state_of(run: Watched, last: dict, finished: dict | None, process: int | None) -> str:
    if finished is not None:
        return "finished"
    if process == 0:
        return "died"
    if process is None:
        newest = run.lines.path if run.lines.path.exists() else run.folder
        if time.time() - newest.stat().st_mtime > SILENT:
            return "silent"
    if not last:
        return "starting"
    trained = last.get("progress") == 1 or last["step"] == run.about.settings.get("ITERATIONS")
    return "scoring" if trained else "training"


def tokens_per_second(run: Watched) -> float | None:
    """Over the last lines, by the run's own clock of training."""
    timed = [(step, entry["train_seconds"]) for step, entry in sorted(run.lines.steps.items())
             if is_number(entry.get("train_seconds"))][-RECENT:]
    batch = run.about.settings.get("TRAIN_BATCH_TOKENS")
    if len(timed) < 2 or not is_number(batch) or timed[-1][1] <= timed[0][1]:
        return None
    return batch * (timed[-1][0] - timed[0][0]) / (timed[-1][1] - timed[0][1])


def flop_per_token(settings: dict) -> float | None:
    """FLOPs that the trunk's blocks and head ask for, forward and back, as scripts/bench.py counts them."""
    if OTHER_BLOCKS in settings or not all(is_number(settings.get(name)) for name in BLOCKS):
        return None
    args = SimpleNamespace(**{name.lower(): settings[name] for name in BLOCKS})
    keys = args.model_dim * args.num_kv_heads // args.num_heads
    block = args.model_dim * (2 * args.model_dim + 2 * keys + 2 * int(args.mlp_mult * args.model_dim))
    return bench.flop_per_byte(SimpleNamespace(args=args), args.num_layers * block)


def thinned(values: list[float], most: int = 24) -> list[float]:
    """At most so many of them, the last one among them."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


# --- Against a record ---


@dataclass(frozen=True)
class Against:
    """A record's curve: mean of its seeds, at its own lines and smoothed like the run's."""

    title: str
    data: str  # sha256 of its data
    lines: dict[int, float]  # {bytes of text: BPB of this very step, where all seeds have it}
    band: list[Band]

    @classmethod
    def read(cls, name: str) -> Against:
        """Raises Misuse for a record without a curve."""
        folder = find_script(name).parent
        record = leaderboard.read_record(folder, {})
        runs = record.group.runs if record.group else []
        paths = [Path(run.where).with_name("metrics.jsonl") for run in runs]
        curves = [leaderboard.read_curve(path, record) for path in paths if path.is_file()]
        band = leaderboard.band(curves)
        if not band:
            raise Misuse(f"--against {name}: no seed*/metrics.jsonl with steps that all seeds have")

        trained = [curve["train"] for curve in curves if curve["train"]]
        seeds = [{round(seen): loss for seen, _, loss in points} for points in trained]
        lines = {seen: statistics.mean(seed[seen] for seed in seeds)
                 for seen in set.intersection(*map(set, seeds))}
        return cls(record.title, runs[0].metrics["dataset"].get("sha256", ""), lines, band)

    @cached_property
    def places(self) -> list[tuple[float, float]]:
        """[(ln bytes, BPB)] of the curve."""
        return [(math.log(point.seen), point.mean) for point in self.band]

    def at(self, seen: float) -> float | None:
        """BPB after so many bytes, between two points of the curve; None before and after it."""
        x = math.log(seen)
        for (low, before), (high, after) in zip(self.places, self.places[1:]):
            if low <= x <= high + 1e-9:
                return before + (after - before) * (x - low) / (high - low)
        return None

    def difference(self, curve: list[tuple[float, float, float]], smooth: list[tuple[float, float]]
                   ) -> float | None:
        """Run minus record in BPB, a mean over the run's last lines; positive: the run is behind.

        Lines that both have are of the same batch where both read the same text: its own difficulty is not in
        their difference. Without such lines it is that of the smoothed curves.
        """
        found = {seen: loss - self.lines[round(seen)] for seen, _, loss in curve if round(seen) in self.lines}
        if not found:
            found = {seen: loss - there for seen, loss in smooth if (there := self.at(seen)) is not None}
        recent = [value for seen, value in found.items() if seen >= max(found) / WINDOW]
        return statistics.mean(recent) if recent else None


# --- Which runs ---


def chosen(names: list[str], root: Path) -> list[Watched]:
    """The runs of these names or folders; without names those below `root` that are in progress.

    Raises:
        Misuse: a name is no folder with a run.
    """
    if not names:
        folders = sorted(path.parent for path in root.glob("*/log.txt"))
        return [Watched(folder) for folder in folders if in_progress(folder)]
    runs = []
    for name in names:
        folder = next((path for path in (root / name, Path(name)) if path.is_dir()), None)
        if folder is None or not any((folder / file).exists() for file in ("metrics.jsonl", "log.txt")):
            raise Misuse(f"{name}: no folder of a run, and none below {root}")
        runs.append(Watched(folder))
    return runs


def in_progress(folder: Path) -> bool:
    process = holder(folder / "log.txt")
    if process is not None:
        return process != 0
    return finish(folder) is None and time.time() - (folder / "log.txt").stat().st_mtime < SILENT
