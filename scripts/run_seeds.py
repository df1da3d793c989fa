"""Runs a script for several seeds, side by side, and goes on where it was stopped.

    python scripts/run_seeds.py . --set ITERATIONS=300 --jobs 2 --threads 1
    python scripts/run_seeds.py BytePPM --like records/2026-11-21_BytePPM/seed42 --cores '0;1' \\
        --collect records/2026-11-21_BytePPM
    python scripts/run_seeds.py records/DATE_NAME --ranks 8 --gpus 0,1,2,3,4,5,6,7

The settings are those of `--like` (a run's folder with its metrics.json), then those of the environment
(`export DATA_PATH=...`), then those of `--set`; what the environment gives is said, as options that give the
same without it. A run's folder is named for the script's hash, the settings, the data, the seed and `--ranks`
above 1: the same command again skips what is finished, and starts what is not, from the script's own
checkpoint (`RESUME=auto`) where there is one. Whatever a run prints is in `console.txt` of its folder. A run
that fails is named at the end with its last lines; the others go on. Ctrl-C stops the runs with the signal on
which scripts write a checkpoint; a second one kills them.

`--collect FOLDER` copies metrics.json, metrics.jsonl and log.txt of every good run to FOLDER/seed<N>/.

Progress goes to stderr, the tables or one JSON document (`--json`) to stdout. Exit code 0; 1 if a run failed
or broke a budget; 2 misuse; 130 stopped. scripts/sweep.py runs several variants the same way.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from family import (
    FINDINGS,
    FINE,
    OF_THE_PROCESS,
    ROOT,
    TRUNK,
    Misuse,
    command,
    find_script,
    markdown_table,
    read_json,
    run_settings,
)
from stats import verdict

# What this tool sets; it cannot be given.
OWN = {"SEED", "RUN_ID", "RUNS_PATH", *OF_THE_PROCESS}
COLLECTED = ("metrics.json", "metrics.jsonl", "log.txt")
REPORTED = ("val_bpb", "bytes_total", "train_seconds", "eval_seconds")
STATUS_SECONDS = 30.0
STOPPED = 130
TAIL_LINES = 8


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def without_places(data: bytes, runs: Path) -> bytes:
    """What runs below `runs` wrote, folders named as if they had been started from the
    repository: a record tells no machine's paths.
    """
    for place, word in ((runs.absolute(), "runs"), (Path.cwd(), "."), (ROOT, ".")):
        if place == Path(place.anchor):  # the root: it would be found in every path, and in `//`
            continue
        data = data.replace(str(place).encode() + b"/", word.encode() + b"/").replace(
            f'"{place}"'.encode(), f'"{word}"'.encode()
        )
    return data


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Job:
    """One run: an arm's settings with one seed.

    `state`: waiting, running, done, kept (it was there), over budget, failed or stopped.
    """

    arm: str
    seed: int
    settings: dict[str, str]
    folder: Path
    state: str = "waiting"
    metrics: dict = field(default_factory=dict)
    exit_code: int | None = None
    tail: list[str] = field(default_factory=list)

    # What it has to leave.
    file = "metrics.json"
    result = "metrics.json of this script and seed with a finite val_bpb"

    def __str__(self) -> str:
        return f"{self.arm} seed {self.seed}"

    def told(self) -> str:
        """What came out, in a word."""
        return f"{self.metrics['val_bpb']:.4f} BPB"

    def ended_well(self, code: int) -> bool:
        """Does a process that left a result and this exit code count?"""
        return code == 0 or bool(self.metrics.get("broken_budgets"))

    @property
    def good(self) -> bool:
        return self.state in ("done", "kept")

    def read(self, script_sha256: str) -> bool:
        """Takes the metrics of a finished run of this script; False where there are none with a finite score.
        """
        path, found = self.folder / self.file, {}
        with contextlib.suppress(Misuse):  # what cannot be read is no result
            found = read_json(path) if path.exists() else {}
        if not isinstance(found, dict):
            return False
        bpb, mine = found.get("val_bpb"), (found.get("script_sha256"), found.get("seed"))
        if mine != (script_sha256, self.seed) or not isinstance(bpb, (int, float)) or not math.isfinite(bpb):
            return False
        self.metrics = found
        return True

    def disown(self) -> None:
        """Renames the result of a process that failed after it had written it: no later call takes it."""
        path = self.folder / self.file
        path.rename(path.with_suffix(".failed.json"))
        self.metrics = {}

    def keep(self, script_sha256: str) -> bool:
        """Whether the run is finished already; says so."""
        if not self.read(script_sha256):
            return False
        self.state = "over budget" if self.metrics.get("broken_budgets") else "kept"
        say(f"{self.state:6} {self}: {self.told()}, {self.folder}")
        return True

    def step(self) -> int:
        """The last step in its metrics.jsonl, 0 before the first."""
        with contextlib.suppress(OSError), open(self.folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            for line in reversed(file.read().splitlines()):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    return json.loads(line)["step"]
        return 0


@dataclass(frozen=True)
class Slot:
    """What one run at a time may have: cores to stay on, GPUs to see; empty means all."""

    cores: tuple[int, ...] = ()
    gpus: str = ""


class Runner:
    """Runs jobs on slots until all are through or two signals say otherwise."""

    def __init__(self, script: Path, slots: list[Slot], threads: int | None, ranks: int, known: set[str]):
        self.script, self.script_sha256, self.slots = script, sha256(script), slots
        self.threads, self.ranks, self.known = threads, ranks, known
        self.signals = 0

    def program(self, job: Job) -> tuple[Path, str, set[str]]:
        """(script, its sha256, its variables) of a job: here one for all of them."""
        return self.script, self.script_sha256, self.known

    def run(self, jobs: list[Job]) -> None:
        """Runs what waits; afterwards each job has a state. SIGINT and SIGTERM are handled while it lasts."""
        waiting, free = deque(job for job in jobs if job.state == "waiting"), list(self.slots)
        running: dict[int, tuple[Job, subprocess.Popen, Slot, float]] = {}
        signals = signal.SIGINT, signal.SIGTERM
        handlers = {number: signal.signal(number, self.interrupt) for number in signals}
        sent, told, status = 0, time.monotonic(), ""
        try:
            while running or waiting and not self.signals:
                while waiting and free and not self.signals:
                    job = waiting.popleft()
                    if process := self.start(job, free[0]):
                        running[process.pid] = job, process, free.pop(0), time.monotonic()
                for pid, (job, process, slot, since) in list(running.items()):
                    if process.poll() is not None:
                        self.finish(job, process.returncode, time.monotonic() - since)
                        free.append(slot)
                        del running[pid]
                if self.signals > sent:
                    sent = self.signals
                    say(f"stopping {len(running)} runs; Ctrl-C again kills them" if sent == 1 else "killing")
                    for pid, (_, process, _, _) in running.items():
                        if sent == 1:
                            process.send_signal(signal.SIGINT)
                        else:
                            os.killpg(pid, signal.SIGKILL)
                if time.monotonic() - told > STATUS_SECONDS:
                    told, before, status = time.monotonic(), status, self.status(jobs)
                    if status != before:
                        say(status)
                time.sleep(0.1)
        except BaseException:  # nobody would be left to look after what still runs
            for _, process, _, _ in running.values():
                process.send_signal(signal.SIGINT)
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        for job in waiting:
            job.state = "stopped"

    def interrupt(self, *_) -> None:
        self.signals += 1

    def start(self, job: Job, slot: Slot) -> subprocess.Popen | None:
        """The process of a job, or None where it cannot start or need not."""
        job.folder.mkdir(parents=True, exist_ok=True)
        script, script_sha256, known = self.program(job)
        call = [sys.executable, str(script)]
        if self.ranks > 1:
            call[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        given = {**job.settings, "SEED": str(job.seed), "RUN_ID": job.folder.name,
                 "RUNS_PATH": str(job.folder.parent)}
        with open(job.folder / "console.txt", "ab") as console:
            try:  # the child holds this lock to its end, even if this process is killed
                fcntl.flock(console, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return self.refuse(job, f"{job.folder}: another process is at this run")
            if job.keep(script_sha256):  # another process has finished it since this one looked
                return None
            if sha256(script) != script_sha256:
                return self.refuse(job, f"{script}: changed since the first run was started")
            resumes = (job.folder / "last.safetensors").exists()
            if resumes:
                given["RESUME"] = "auto"
            else:  # a log is appended to: what an attempt without a checkpoint left would stay in it
                console.truncate(0)
                for path in job.folder.iterdir():
                    if path.name != "console.txt":
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            given |= {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
            given |= {"CUDA_VISIBLE_DEVICES": slot.gpus} if slot.gpus else {}
            words = [*(f"{key}={value}" for key, value in given.items()), *call]
            console.write(f"$ {shlex.join(words)}\n".encode())
            console.flush()

            def in_child() -> None:
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
                if slot.cores:
                    os.sched_setaffinity(0, slot.cores)

            environment = {key: value for key, value in os.environ.items() if key not in known} | given
            # A session of its own: Ctrl-C in a terminal reaches only this process, which passes it on once.
            process = subprocess.Popen(call, env=environment, stdin=subprocess.DEVNULL, stdout=console,
                                       stderr=console, start_new_session=True, preexec_fn=in_child)
        job.state = "running"
        say(f"{'resume' if resumes else 'start '} {job}: {job.folder}")
        return process

    def refuse(self, job: Job, why: str) -> None:
        job.state, job.tail = "failed", [why]
        say(f"failed {job}: {why}")

    def finish(self, job: Job, code: int, seconds: float) -> None:
        """Reads what a run has left and says how it went."""
        job.exit_code = code
        if job.read(self.program(job)[1]) and job.ended_well(code):
            job.state = "over budget" if job.metrics.get("broken_budgets") else "done"
            return say(f"{job.state:6} {job}: {job.told()} in {seconds:.0f} s")
        job.state = "stopped" if self.signals else "failed"
        if job.state == "failed" and job.metrics:
            job.disown()
        console = (job.folder / "console.txt").read_text(errors="replace")
        job.tail = [line for line in console.splitlines()[1:] if line.strip()][-TAIL_LINES:]
        if code == 0:
            job.tail.append(f"left no {job.result}")
        say(f"{job.state:6} {job}: exit code {code} after {seconds:.0f} s")

    def status(self, jobs: list[Job]) -> str:
        through = sum(job.state not in ("running", "waiting") for job in jobs)
        steps = [f"{job} step {job.step()} of {job.settings.get('ITERATIONS', '?')}"
                 for job in jobs if job.state == "running"]
        return f"{through} of {len(jobs)} runs through; {', '.join(steps)}"


# --- What to run ---


def variables(script: Path) -> dict[str, str]:
    """{variable: default as written} of what a script reads; empty where its source does not show it."""
    import lineage
    return lineage.defaults(lineage.Script.read(script))


def assignments(pairs: list[str], option: str) -> dict[str, str]:
    """`NAME=VALUE` texts as a dictionary.

    Raises:
        Misuse: one is none, or names what the tool sets itself.
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"\w+", name):
            raise Misuse(f"{option} {pair}: NAME=VALUE is needed")
        if name in OWN:
            raise Misuse(f"{option} {pair}: {name} is set by this tool" + " from --seeds" * (name == "SEED"))
        if name in found:
            raise Misuse(f"{option} {pair}: {name} is given twice")
        found[name] = value
    return found


def known_only(settings: dict[str, str], known: set[str], where: str) -> dict[str, str]:
    """The settings, if the script reads all of them.

    Raises:
        Misuse: one is no variable of the script, where these are known.
    """
    if strange := sorted(settings.keys() - known if known else ()):
        raise Misuse(f"{where}: the script has no variable {', '.join(strange)}")
    return settings


def seed_list(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len({*map(int, parts)}) < len(parts):
        raise Misuse(f"--seeds {text}: different whole numbers with commas are needed")
    return [int(part) for part in parts]


def core_set(text: str) -> tuple[int, ...]:
    """`0-2,5` -> (0, 1, 2, 5)."""
    found: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not span:
            raise Misuse(f"--cores {text}: numbers and ranges with commas, one set a run with ; between them")
        numbers = range(int(span[1]), int(span[2] or span[1]) + 1)
        if not numbers:
            raise Misuse(f"--cores {text}: {part.strip()} is an empty range")
        found += numbers
    return tuple(found)


def slots(options: argparse.Namespace) -> list[Slot]:
    """One slot for each run at a time: as many as `--cores` has sets or `--gpus` has groups, else `--jobs`.

    Raises:
        Misuse: the three contradict each other, or name what is not there.
    """
    cores = [core_set(part) for part in options.cores.split(";")] if options.cores else []
    gpus = [part.strip() for part in options.gpus.split(",")] if options.gpus else []
    every = [core for part in cores for core in part]
    if len({*every}) < len(every) or len({*gpus}) < len(gpus) or "" in gpus:
        raise Misuse(f"--cores {options.cores!r} --gpus {options.gpus!r}: each run gets its own, each once")
    if cores and not hasattr(os, "sched_setaffinity"):
        say("--cores: this system cannot pin processes; runs go where they like")
        cores = [()] * len(cores)
    elif cores and {*every} - (there := os.sched_getaffinity(0)):
        raise Misuse(f"--cores {options.cores}: this process has {', '.join(map(str, sorted(there)))}")
    if len(gpus) % options.ranks:
        raise Misuse(f"--gpus {options.gpus}: {len(gpus)} cannot be shared out with --ranks {options.ranks}")
    groups = [",".join(gpus[i : i + options.ranks]) for i in range(0, len(gpus), options.ranks)]
    counts = {len(part) for part in (cores, groups) if part} | ({options.jobs} if options.jobs else set())
    if len(counts) > 1:
        raise Misuse(f"--jobs {options.jobs} --cores {options.cores!r} --gpus {options.gpus!r}: "
                     "not the same number of runs at a time")
    count = counts.pop() if counts else 1
    return [Slot(*pair) for pair in zip(cores or [()] * count, groups or [""] * count)]


def fingerprint(folder: str) -> str | list:
    """What tells data from other data: the hash of the manifest, else names, sizes and times of the shards.
    """
    manifest = Path(folder) / "manifest.json"
    if not folder or manifest.is_file():
        return sha256(manifest) if folder else ""
    shards = [(path.name, path.stat()) for path in sorted(Path(folder).glob("*.bin"))]
    return [[name, found.st_size, found.st_mtime_ns] for name, found in shards] or ""


def run_id(script: Path, digest: str, settings: dict[str, str], seed: int, ranks: int = 1,
           data_path: str = "") -> str:
    """A name that says what is run: script, settings, data, seed
    and ranks; `data_path` is the script's default.
    """
    told = [digest, sorted(settings.items()), fingerprint(settings.get("DATA_PATH", data_path)), seed]
    told += [ranks] if ranks > 1 else []  # runs of one process keep the names that they had
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]
    title = "trunk" if script == TRUNK else script.parent.name.split("_", 1)[-1]
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', title)}-seed{seed}-{key}"


# --- What came out ---


def summarise(jobs: list[Job], arms: Iterable[str], base: str) -> list[dict]:
    """One entry an arm: runs, mean and sd of the good ones, the difference to the base over shared seeds."""
    scores = {arm: {job.seed: job.metrics["val_bpb"] for job in jobs if job.arm == arm and job.good}
              for arm in arms}
    rows = []
    for arm, values in scores.items():
        mine = [job for job in jobs if job.arm == arm]
        runs = [{"seed": job.seed, "state": job.state, "folder": str(job.folder), "exit_code": job.exit_code,
                 "tail": job.tail, **{key: job.metrics.get(key) for key in REPORTED}} for job in mine]
        row = {"arm": arm, "settings": mine[0].settings, "runs": runs, "count": len(values),
               "mean": statistics.mean(values.values()) if values else None,
               "sd": statistics.stdev(values.values()) if len(values) > 1 else None}
        if arm != base and (shared := sorted(values.keys() & scores[base].keys())):
            mean, half, word = verdict([values[seed] - scores[base][seed] for seed in shared])
            # JSON has no infinity: one pair has no interval.
            row |= {"pairs": len(shared), "difference": mean, "verdict": word,
                    "interval": [mean - half, mean + half] if math.isfinite(half) else None}
        rows.append(row)
    return rows


def tables(rows: list[dict], base: str) -> str:
    """A table of the runs, one of the arms, and the last lines of what failed."""
    def cell(value: float | None, form: str = ".4f") -> str:
        return "" if value is None else format(value, form)

    many, runs, arms, failed = len(rows) > 1, [], [], []
    for row in rows:
        for run in row["runs"]:
            seconds = (cell(run[key], ".0f") for key in ("train_seconds", "eval_seconds"))
            runs.append(
                [row["arm"]] * many
                + [
                    run["seed"],
                    cell(run["val_bpb"]),
                    cell(run["bytes_total"], ","),
                    *seconds,
                    run["state"],
                    run["folder"],
                ]
            )
            if run["state"] == "failed":
                title = f"{row['arm']} seed {run['seed']} failed, exit code {run['exit_code']}:"
                failed.append("\n    ".join([title, *run["tail"]]))
        span = "{:+.4f} to {:+.4f}".format(*row["interval"]) if row.get("interval") else ""
        word = "base" if row["arm"] == base else row.get("verdict", "")
        arms.append([row["arm"], row["count"], cell(row["mean"]), cell(row["sd"]),
                     *[cell(row.get("difference"), "+.4f"), span, word] * many])
    header = ["arm"] * many + ["seed", "BPB", "bytes", "train s", "eval s", "state", "folder"]
    compared = ["difference", "95 % interval", "verdict"] * many
    return "\n\n".join([markdown_table(header, runs),
                        markdown_table(["arm", "seeds", "BPB", "sd", *compared], arms), *failed])


# --- Collecting ---


def target(folder: Path, script: Path) -> None:
    """Refuses a folder that runs of this script cannot be collected into.

    Raises:
        Misuse: it is not there, frozen, or a record with another script.
    """
    if not folder.is_dir():
        raise Misuse(f"--collect {folder}: no such folder")
    if (folder / "submission.json").exists() and read_json(folder / "submission.json").get("frozen"):
        raise Misuse(f"--collect {folder}: a frozen record keeps its numbers")
    if (folder / "train_gpt.py").exists() and sha256(folder / "train_gpt.py") != sha256(script):
        raise Misuse(f"--collect {folder}: its train_gpt.py is not {script}")


def collect_seeds(jobs: list[Job], folder: Path) -> None:
    """FOLDER/seed<N>/ of every good run, each whole or not at all."""
    for job in jobs:
        if not job.good:
            continue
        place = folder / f"seed{job.seed}"
        with tempfile.TemporaryDirectory(prefix=".collect-", dir=folder) as temporary:
            fresh = Path(temporary) / place.name
            fresh.mkdir()
            for name in COLLECTED:
                if (job.folder / name).exists():
                    (fresh / name).write_bytes(
                        without_places((job.folder / name).read_bytes(), job.folder.parent)
                    )
            if place.exists():
                place.rename(Path(temporary) / "before")
            fresh.rename(place)
        say(f"collected {place}")


# --- Command line ---


def parser(text: str) -> argparse.ArgumentParser:
    """The options that run_seeds.py and sweep.py share."""
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = found.add_argument
    option("script", help="a script, its folder, a record's name, or . for the trunk")
    option("--seeds", default="42,314,999", help="with commas (default: %(default)s)")
    option("--like", metavar="RUN", help="settings of a run, from the metrics.json in this folder")
    option("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting; repeatable")
    option("--jobs", type=int, help="runs at a time (default: as many as --cores or --gpus serve, or one)")
    option("--threads", type=int, help="OMP_NUM_THREADS of each run")
    option("--cores", default="", metavar="A;B", help="cores for each run at a time: '0;1', '0-3;4-7'")
    option("--gpus", default="", metavar="A,B", help="GPUs, --ranks of them for each run at a time")
    option("--ranks", type=int, default=1, help="processes of a run, by torchrun (default: %(default)s)")
    option("--runs", default="runs", metavar="FOLDER", help="where runs are kept (default: %(default)s)")
    option("--collect", type=Path, metavar="FOLDER", help="copy what good runs left to this folder")
    option("--json", action="store_true", help="one JSON document instead of tables")
    return found


def exported(known: set[str]) -> dict[str, str]:
    """Settings of the script that stand in the environment."""
    return {key: os.environ[key] for key in sorted(known - OWN) if os.environ.get(key)}


def settings_of(options: argparse.Namespace, known: set[str]) -> dict[str, str]:
    """What every run gets: of `--like` what this script knows, then the environment's, then `--set`.

    Raises:
        Misuse: `--like` is no run, or `--set` no setting.
    """
    found, path = {}, Path(options.like or "", "metrics.json")
    if options.like:
        told = read_json(path) if path.exists() else {"settings": {}}  # `run_settings` says what is missing
        if not isinstance(told, dict) or not isinstance(told.get("settings"), dict):
            raise Misuse(f"--like {options.like}: {path} has no object `settings`")
        found = run_settings(options.like)
    if strange := sorted(found.keys() - known if known else ()):
        say(f"--like {options.like}: left out, the script has no {', '.join(strange)}")
    found = {key: value for key, value in found.items() if key not in OWN and key not in strange}
    given = known_only(assignments(options.set, "--set"), known, "--set")
    taken = {key: value for key, value in exported(known).items() if key not in given}
    if taken:
        words = itertools.chain.from_iterable(("--set", f"{key}={value}") for key, value in taken.items())
        say(f"from the environment: {', '.join(taken)}; the same without it: {shlex.join(words)}")
    return found | taken | given


def carry_out(options: argparse.Namespace, script: Path, known: set[str], arms: dict[str, dict[str, str]],
              base: str, collect: Callable[[list[Job], Path], None],
              after: Callable[[Runner, list[Job], dict], tuple[list[Job], str]] | None = None) -> int:
    """Runs every arm for every seed, prints and collects what came out -> exit code.

    `after`, if given, does what the finished runs are for, adds to the JSON document what came out, and
    returns the jobs that this took and a text for below the tables.

    Raises:
        Misuse: an option that cannot be, two arms with equal settings.
    """
    for name in ("jobs", "threads", "ranks"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise Misuse(f"--{name} {value}: a whole number from 1")
    places, seeds, same = slots(options), seed_list(options.seeds), {}
    for name, settings in arms.items():
        if (other := same.setdefault(json.dumps(settings, sort_keys=True), name)) != name:
            raise Misuse(f"arms {other} and {name} have the same settings")
    if options.collect:
        target(options.collect, script)
    runner = Runner(script, places, options.threads, options.ranks, known)
    if unread := sorted(known & OWN & os.environ.keys() - {*OF_THE_PROCESS}):
        say(f"not taken from the environment, this tool sets it: {', '.join(unread)}")
    # All arms of a seed, then the next seed: a comparison has its first pairs early.
    jobs, digest, data_path = [], runner.script_sha256, variables(script).get("DATA_PATH", "").strip("'\"")
    for seed, (name, settings) in itertools.product(seeds, arms.items()):
        folder = run_id(script, digest, settings, seed, options.ranks, data_path)
        jobs.append(Job(name, seed, settings, Path(options.runs) / folder))
    for job in jobs:
        job.keep(digest)
    runner.run(jobs)
    rows = summarise(jobs, arms, base)
    document = {"script": str(options.script), "script_sha256": digest, "base": base, "arms": rows}
    more, text = after(runner, jobs, document) if after else ([], "")
    print(
        json.dumps(document, indent=1)
        if options.json
        else "\n\n".join(filter(None, (tables(rows, base), text)))
    )
    if options.collect:
        collect(jobs, options.collect)
    if any(job.state == "stopped" for job in (*jobs, *more)):
        say("stopped; the same command goes on from here")
        return STOPPED
    return FINE if all(job.good for job in (*jobs, *more)) else FINDINGS


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__).parse_args(argv)
    script = find_script(options.script)
    known = {*variables(script)}
    return carry_out(options, script, known, {"seeds": settings_of(options, known)}, "seeds", collect_seeds)


if __name__ == "__main__":
    command(main)
