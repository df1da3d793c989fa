"""From an idea to a pull request: starts a record, fills in its
numbers, checks it as a reviewer would, exports it.

    python scripts/submit.py new Name --parent .             records/<today>_Name/, a copy of the trunk
    python scripts/submit.py fill records/DATE_Name       numbers and tables; lists symbols that no idea names
    python scripts/submit.py check records/DATE_Name --base main
    python scripts/submit.py export records/DATE_Name --upstream ../parameter-golf

Between `new` and `fill`: change the script, and measure with scripts/run_seeds.py ... --collect
records/DATE_Name. `fill` reads seed*/metrics.json and keeps what is written by hand. `check` holds the
record's files against each other, plans the contest's run with the script's defaults, scored as the headline
was (`plan`), runs the script at a tiny size, alone in a folder of its own (`smoke`), and puts it through
scripts/lineage.py and scripts/audit.py. `export` refuses what the quick part of `check`
fails. submission.json is described key by key in scripts/submission.schema.json.

Exit code 0; 1 where a finding is a FAIL; 2 misuse.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import hashlib
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import stats
import tables
from family import (
    FINDINGS,
    FINE,
    ROOT,
    Finding,
    Misuse,
    command,
    find_script,
    idle,
    read_json,
    report,
    run_settings,
    write_atomic,
)

SCHEMA, SKELETON = (Path(__file__).with_name(name) for name in ("submission.schema.json", "record_readme.md"))
TODO = "TODO"  # what `new` and `fill` leave to be written by hand, and `check` refuses
SLOW = ("plan", "smoke", "audit")
FILES = ("README.md", "submission.json", "requirements.txt", "train_gpt.py")
# A heading of each kind has to be there.
SECTIONS = {"What changed": "what (changed|it does differently)", "Command": "command",
            "Legality": "legality", "Credits": "credits"}
SMOKE_SECONDS = 300
# Settings that say how a score is made, whatever the size of model and text ...
OF_THE_SCORE = ("TTT", "MIX", "PPM")
# ... but not these: like windows and batches, they are as short as the bench's rows and text.
OF_THE_BENCH = ("TTT_CHUNK_TOKENS", "TTT_BATCH_ROWS", "TTT_DOC_CHUNK")
# Variables that a command may have beside the script's.
OF_THE_MACHINE = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
# The competition's limits, and what of submission.json is only of this repository.
CONTEST = {"ARTIFACT_BUDGET_BYTES": 16_000_000, "MAX_WALLCLOCK_SECONDS": 600, "EVAL_BUDGET_SECONDS": 600}
HOUSE_KEYS = ("parent", "changes", "answers", "carried", "frozen", "trunk", "draft", "audit", "dataset")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def as_json(value: dict) -> bytes:
    return f"{json.dumps(value, indent=1, ensure_ascii=False)}\n".encode()


class Record:
    """A record's folder and what its files say, each read once.

    Raises:
        Misuse: the folder is none of a repository's records/; later, a file that is asked for cannot be read.
    """

    def __init__(self, name: str | Path):
        self.folder = find_script(name).parent
        self.root = self.folder.parent.parent
        if self.folder.parent.name != "records":
            raise Misuse(f"{name}: not a record: these are folders in records/")
        self.script = (self.folder / "train_gpt.py").read_bytes()
        self.sha256 = sha256(self.script)

    @cached_property
    def submission(self) -> dict:
        found = read_json(self.folder / "submission.json")
        if not isinstance(found, dict):
            raise Misuse(f"{self.folder / 'submission.json'}: a JSON object is needed")
        return found

    @cached_property
    def readme(self) -> str:
        return (self.folder / "README.md").read_text()

    @cached_property
    def group(self) -> stats.Group:
        runs = [stats.read_run(path) for path in self.folder.glob("seed*/metrics.json")]
        for run in runs:
            if not isinstance(run.seed, int):
                raise Misuse(f"{run.where}: seed is {run.seed}: a whole number is needed")
        runs.sort(key=lambda run: run.seed)
        for run in runs:
            needed = {*MEASURED, "script_sha256", "settings", "dataset", "device", "torch", "steps"}
            if missing := sorted(needed - {*run.metrics, "val_loss"}):
                raise Misuse(f"{run.where}: no {', '.join(missing)}")
        return stats.Group(self.folder.name, runs)

    @property
    def runs(self) -> list[dict]:
        return [run.metrics for run in self.group.runs]

    @property
    def present(self) -> list[dict]:
        """The runs, with the size of the script to which their numbers were carried."""
        return [stats.as_carried(self.folder, run) for run in self.runs]

    @property
    def frozen(self) -> bool:
        with contextlib.suppress(Misuse):  # a file that cannot be read is a finding elsewhere
            return self.submission.get("frozen") is True
        return False


# --- Numbers ---

# Of each seed, from its metrics.json; val_loss is that of the headline.
MEASURED = ("val_loss", "val_bpb", "bytes_total", "train_seconds", "eval_seconds")
FINGERPRINT = ("name", "sha256", "train_tokens", "val_tokens")


def headline(run: dict) -> dict:
    return run["evals"][run["headline"]]


def measured(runs: list[dict]) -> dict:
    """What submission.json says of runs, by seed; the first few in the order of the field's files."""
    results = {str(run["seed"]): {key: run.get(key, headline(run)["val_loss"]) for key in MEASURED}
               for run in runs}
    before = [run["evals"].get("final_ema") or run["evals"].get("final_raw") for run in runs]
    devices = ", ".join(sorted({run["device"] for run in runs}))
    ranks = max(run.get("world_size", 1) for run in runs)

    def over(key: str, how: Callable) -> float:
        return how([result[key] for result in results.values()])

    found = {"val_loss": over("val_loss", statistics.mean), "val_bpb": over("val_bpb", statistics.mean),
             # Rounded to the digits of a log: the last bit of a square root differs between Python versions.
             "val_bpb_std": round(over("val_bpb", statistics.stdev), 8) if len(runs) > 1 else 0.0,
             "bytes_total": over("bytes_total", max), "bytes_code": max(run["bytes_code"] for run in runs),
             "seeds": [run["seed"] for run in runs], "seed_results": results,
             "hardware": f"{ranks} x {devices}" if ranks > 1 else devices,
             "pytorch_version": ", ".join(sorted({run["torch"] for run in runs})),
             "evaluation": runs[0]["headline"],
             "dataset": {key: value for key, value in runs[0]["dataset"].items() if key in FINGERPRINT},
             "artifact_bytes_max": over("bytes_total", max),
             "artifact_bytes_mean": over("bytes_total", statistics.mean),
             "step_stop": max(run["steps"] for run in runs), "wallclock_seconds": over("train_seconds", max),
             "eval_time_seconds": over("eval_seconds", max)}
    for key in ("val_loss", "val_bpb") if all(before) else ():
        found[f"pre_quant_{key}"] = statistics.mean(entry[key] for entry in before)
    return found


def ideas_of(record: Record) -> dict:
    """`changes` of submission.json.

    Raises:
        Misuse: it is not {idea: {"reason": ..., "symbols": [...]}}.
    """
    ideas = record.submission.get("changes", {})
    if not isinstance(ideas, dict) or not all(
            isinstance(entry, dict) and isinstance(entry.get("symbols"), list) for entry in ideas.values()):
        text = 'an object {idea: {"reason": ..., "symbols": [...]}} is needed'
        raise Misuse(f"{record.folder / 'submission.json'}: changes: {text}")
    return ideas


def parent_script(record: Record) -> Path:
    parent = record.root / record.submission["parent"]
    return parent / "train_gpt.py" if parent.is_dir() else parent


def unnamed(record: Record) -> list[str]:
    """Symbols that differ from the parent's and that no idea names.

    Raises:
        Misuse: parent or changes of submission.json are not what they should be.
    """
    import lineage
    about, where = record.submission, record.folder / "submission.json"
    if record.frozen or about.get("parent") is None:
        return []
    if not isinstance(about["parent"], str):
        raise Misuse(f"{where}: parent is {about['parent']}: a path is needed")
    ideas = ideas_of(record)
    named = {name for idea, entry in ideas.items() if idea != TODO for name in entry["symbols"]}
    changed = lineage.changed_symbols(parent_script(record), record.folder / "train_gpt.py")
    return [name for name in changed if name not in named]


def fill(record: Record, force: bool = False) -> list[str]:
    """Writes README.md and submission.json -> names of those that changed. What is written by hand stays.

    Raises:
        Misuse: frozen and not `force`, no seeds, or seeds of several configurations; nothing is written.
    """
    if record.frozen and not force:
        raise Misuse(f"{record.folder}: frozen, its numbers stay; --force writes them all the same")
    if not record.runs:
        raise Misuse(f"{record.folder}/seed*/metrics.json: no such file; scripts/run_seeds.py makes them")
    if mixed := [found for found in stats.check_group(record.group) if found.level == "FAIL"]:
        raise Misuse(f"{record.folder}: no seeds of one configuration: {mixed[0].rule}: {mixed[0].text}")
    submission = {**record.submission, **measured(record.present)}
    submission.pop("draft", None)
    changes = dict(ideas_of(record))
    waiting = changes.pop(TODO, {"reason": ""})
    if names := unnamed(record):
        changes[TODO] = {**waiting, "symbols": names}
    submission["changes"] = changes
    texts = {"README.md": tables.rewrite(record.folder / "README.md", record.root).encode(),
             "submission.json": as_json(submission)}
    changed = [name for name, text in texts.items() if (record.folder / name).read_bytes() != text]
    for name in changed:
        write_atomic(record.folder / name, texts[name])

    import lineage
    declared = [name for entry in changes.values() for name in entry["symbols"]]
    if record.frozen or submission.get("parent") is None:
        return changed
    if lineage.agree_first(parent_script(record), record.folder, declared):
        changed.append(lineage.AGREED)
    return changed


# --- Checks: each yields what is wrong as (where, text) ---

Problem = tuple[str, str]


def seed_folders(record: Record) -> list[Path]:
    return sorted(path for path in record.folder.glob("seed*") if path.is_dir())


def files_passed(record: Record) -> str:
    measured_by = "a log and metrics a seed, " if seed_folders(record) else ""
    return f"all files, {measured_by}pinned requirements, a script that compiles"


def files(record: Record) -> Iterable[Problem]:
    yield from ((name, "is missing") for name in FILES if not (record.folder / name).is_file())
    for seed in seed_folders(record):
        if not re.fullmatch(r"seed\d+", seed.name):
            yield seed.name, "is no folder of a seed: seed<N> is needed"
        yield from ((f"{seed.name}/{name}", "is missing") for name in ("log.txt", "metrics.json")
                    if not (seed / name).is_file())
    path = record.folder / "requirements.txt"
    for i, line in enumerate(path.read_text().splitlines() if path.is_file() else (), 1):
        if line.strip() and not re.match(r"#|[\w.\[\]-]+==[\w.+!]+( *;.*)?$", line):
            yield f"{path.name}:{i}", f"{line!r} pins no version: NAME==VERSION is needed"
    try:
        ast.parse(record.script)
    except SyntaxError as error:
        yield f"train_gpt.py:{error.lineno}", f"does not compile: {error.msg}"


def schema(record: Record) -> Iterable[Problem]:
    import jsonschema
    dates = jsonschema.FormatChecker(["date"])
    rules = jsonschema.Draft202012Validator(read_json(SCHEMA), format_checker=dates)
    for error in rules.iter_errors(record.submission):
        place = ".".join(map(str, error.absolute_path))
        yield "submission.json", f"{f'{place}: ' if place else ''}{error.message}"
    if record.submission.get("draft"):
        yield "submission.json", "draft: true; scripts/submit.py fill writes the numbers and ends that"
    told = f"{record.submission.get('date')}_{record.submission.get('name')}"
    if told != record.folder.name:
        yield "submission.json", f"date and name are {told}, the folder is {record.folder.name}"


def leftovers(record: Record) -> Iterable[Problem]:
    for name in ("README.md", "submission.json"):
        for i, line in enumerate((record.folder / name).read_text().splitlines(), 1):
            if re.search(rf"\b{TODO}\b", line):
                yield f"{name}:{i}", f"still to be written: {line.strip()[:80]}"


def readme(record: Record) -> Iterable[Problem]:
    titles = re.findall(r"^## +(.+)$", record.readme, re.M)
    for name, pattern in SECTIONS.items():
        if not any(re.match(pattern, title, re.I) for title in titles):
            yield "README.md", f"has no section `## {name}`"
    marks = [f"<!-- table: {kind} records/{record.folder.name} -->" for kind in ("headline", "seeds")]
    yield from (("README.md", f"has no table `{mark}`") for mark in marks if mark not in record.readme)
    if marks[0] in record.readme.partition("\n## ")[2]:
        yield "README.md", "the headline's number does not come first"
    if tables.rewrite(record.folder / "README.md", record.root) != record.readme:
        yield "README.md", "a table is not what the files say: scripts/submit.py fill writes it"


def typed(value: object) -> str:
    """A setting as text in which 2, 2.0, True and 1 can be held against each other."""
    try:
        return repr(float(value))
    except (TypeError, ValueError):
        return str(value)


def told_command(record: Record) -> Iterable[Problem]:
    from run_seeds import OWN, variables
    block = re.search(r"^## +Command.*?(?=^## |\Z)", record.readme, re.M | re.S | re.I)
    pairs = re.findall(r"""(?<!\w)([A-Z][A-Z0-9_]+)=("[^"]*"|'[^']*'|\S+)""", block[0]) if block else []
    known, told = variables(record.folder / "train_gpt.py"), set()
    # What a script puts itself where a setting was left open: `self.name = self.name or ...`.
    itself = re.findall(r"\b(self|args)\.(\w+) = .*\b\1\.\2\b", record.script.decode())
    resolves = {name for _, name in itself}
    for name, value in pairs:
        had = [run["settings"][name] for run in record.runs if name in run["settings"]]
        value = value.strip("'\"`").rstrip(",;:)`'\"")
        told.add(name)
        if had and typed(value) not in map(typed, had):
            yield "README.md", f"the command says {name}={value}, the runs had {had[0]}"
        if known and not had and name not in {*known, *OWN, *OF_THE_MACHINE}:
            yield "README.md", f"the command says {name}={value}, the script has no such variable"
    settings = record.runs[0]["settings"] if record.runs else {}
    passed = told | idle(settings) | {*stats.OF_THE_RUN}
    for name, value in settings.items():
        if name in passed or name.endswith(("_EVERY", *stats.PATHS)):
            continue  # which run it was, where its files lay, how often it wrote a line
        try:
            default = ast.literal_eval(known[name])
        except (KeyError, ValueError, SyntaxError):
            continue  # the source does not show it
        resolved = default in ("", "auto", 0) and name.lower() in resolves
        if typed(value) != typed(default) and not resolved:
            yield "README.md", f"the command has no {name}, the runs had {value}, the default is {default}"


def seeds(record: Record) -> Iterable[Problem]:
    if not record.group.runs:
        yield "seed*/metrics.json", "no such file: nothing is measured yet"
        return
    for finding in stats.check_group(record.group):
        # `stale` and `time` tell of those
        if finding.level == "FAIL" or finding.rule not in ("script", "budgets"):
            yield "seed*/metrics.json", f"{finding.rule}: {finding.text}"
    losses: dict[float, int] = {}
    for run in record.group.runs:
        if (told := run.metrics["settings"].get("SEED")) != run.seed:
            yield f"seed{run.seed}/metrics.json", f"its settings have SEED={told}"
        # Two seeds never agree to all digits: one of them is a copy.
        if (other := losses.setdefault(headline(run.metrics)["val_loss"], run.seed)) != run.seed:
            yield f"seed{run.seed}/metrics.json", f"has the val_loss of seed {other} to all digits"


def stale(record: Record) -> Iterable[Problem]:
    if mark := stats.stale_mark(record.folder, record.runs):
        yield "seed*/metrics.json", f"{mark.strip('*')}: re-run with scripts/run_seeds.py"


def logs(record: Record) -> Iterable[Problem]:
    for run in record.group.runs:
        path = Path(run.where).with_name("log.txt")
        where, ruler = f"{path.parent.name}/log.txt", b"=" * 100 + b"\n"
        source, found, output = path.read_bytes().partition(ruler)
        if not found or sha256(source) != run.metrics["script_sha256"]:
            yield where, "does not begin with the source that script_sha256 of its metrics names"
        try:
            told = stats.read_log(path)
        except Misuse as error:
            yield where, str(error).removeprefix(f"{path}: ")
            continue
        for key in ("settings", "dataset"):
            if told[key] != run.metrics[key]:
                yield where, f"its {key} are not those of metrics.json"
        output = output.decode(errors="replace")
        ending = dict(re.findall(r"^(\w+): (.*)$", output, re.M))
        for key, value in run.metrics.items():
            if not isinstance(value, (dict, list)) and ending.get(key) != str(value):
                yield where, f"{key} is {ending.get(key, 'missing')}, metrics.json has {value}"
        exact = {name: (loss, bpb) for name, loss, bpb in stats.EXACT.findall(output)}
        for name, entry in run.metrics["evals"].items():
            wanted = f"{entry['val_loss']:.8f}", f"{entry['val_bpb']:.8f}"
            if exact.get(name) != wanted:
                yield where, f"{name}_exact is {exact.get(name, 'missing')}, metrics.json has {wanted}"
        said = re.findall(r"^artifact:.* bytes:(\d+)", output, re.M)
        if said and int(said[-1]) != run.metrics["bytes_model"]:
            yield where, f"its artifact has {said[-1]} bytes, metrics.json says {run.metrics['bytes_model']}"


def numbers(record: Record) -> Iterable[Problem]:
    for run in record.group.runs:
        if run.metrics["val_bpb"] != headline(run.metrics)["val_bpb"]:
            yield run.where, "val_bpb is not that of its headline"
    found = measured(record.present)
    for key, value in found.items():
        if key in record.submission and record.submission[key] != value:
            yield "submission.json", f"{key} is {record.submission[key]}, the metrics give {value}"


def size(record: Record) -> Iterable[Problem]:
    for run in record.present:
        where, budget = f"seed{run['seed']}", run["settings"]["ARTIFACT_BUDGET_BYTES"]
        code, model, total = (run[f"bytes_{part}"] for part in ("code", "model", "total"))
        if code != len(record.script):
            yield where, f"counts {code:,} bytes of code, train_gpt.py has {len(record.script):,}"
        if code + model != total:
            yield where, f"{code:,} + {model:,} bytes are not {total:,}"
        if 0 < budget < total:
            yield where, f"{total:,} bytes, ARTIFACT_BUDGET_BYTES allows {budget:,}"
        if total > (most := CONTEST["ARTIFACT_BUDGET_BYTES"]):
            yield where, f"{total:,} bytes, no record may have more than {most:,}"


def size_passed(record: Record) -> str:
    budgets = [run["settings"]["ARTIFACT_BUDGET_BYTES"] for run in record.runs]
    limit = "within the budget" if all(budgets) else (
        f"ARTIFACT_BUDGET_BYTES=0 switched the budget off, {CONTEST['ARTIFACT_BUDGET_BYTES']:,} are kept")
    return f"code and model are counted as they are, {limit}"


def clocks(record: Record) -> Iterable[Problem]:
    for run in record.runs:
        pairs = ("MAX_WALLCLOCK_SECONDS", "train_seconds"), ("EVAL_BUDGET_SECONDS", "eval_seconds")
        for name, clock in pairs:
            if 0 < run["settings"][name] < run[clock]:
                yield f"seed{run['seed']}", f"{run[clock]:.1f} s, {name} allows {run['settings'][name]:g}"
        yield from ((f"seed{run['seed']}", line) for line in run.get("broken_budgets", []))


def scope(record: Record, base: str, start: str) -> Iterable[Problem]:
    """What changed since `base` was left at commit `start`; what leaderboard.py writes may change along."""
    import leaderboard
    import lineage

    def git(*words: str) -> list[str]:
        return lineage.git(record.root, "-c", "core.quotepath=off", *words).splitlines()

    def written_by_hand(revision: str) -> str:
        return leaderboard.BLOCK.sub("", "\n".join(git("show", f"{revision}:README.md")))

    own, generated = f"records/{record.folder.name}/", []
    plots = {f"{leaderboard.PLOTS.as_posix()}/{name}.png" for name in leaderboard.CAPTIONS}
    # A file that is renamed away is gone from its old place: both are told.
    changed = git("diff", "--name-only", "--no-renames", f"{start}..HEAD")
    if not any(path.startswith(own) for path in changed):
        yield own, f"nothing of it differs from {base}: is HEAD the pull request's branch?"
    for path in changed:
        if path in plots or path == "README.md" and written_by_hand(start) == written_by_hand("HEAD"):
            generated.append(path)
        elif not path.startswith(own):
            yield (
                path,
                f"is no part of this record: a pull request has {own} and the leaderboard, nothing else",
            )
    for path in leaderboard.read(record.root).changed if generated else ():
        yield str(path.relative_to(record.root)), leaderboard.DISAGREES
    for line in git("status", "--porcelain", "--ignored", "--", own, *generated):
        if "__pycache__" not in line:
            yield line[3:], "is not committed: the pull request would be without it"
    # Of a new record either would switch lineage.py off.
    if not git("ls-tree", "--name-only", start, f"{own}submission.json"):
        if record.submission.get("frozen"):
            yield "submission.json", "frozen: a new record is not, until its parent moves on"
        if record.submission.get("parent") is None:
            yield "submission.json", "parent is null: a new record has one"


def corpus(folder: Path) -> Path:
    """A folder of byte260 shards, 40,000 bytes of made-up words to train on and 2,500 to score."""
    import numpy as np
    folder.mkdir()
    rng = random.Random(0)
    for part, count in (("train", 40_000), ("val", 2_500)):
        ids = np.array([4 + ord(letter) for letter in rng.choices("etaoin shrdlu\n", k=count)], "<u2")
        ids[::700] = 1  # documents begin with BOS
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(ids)
        (folder / f"smoke_{part}_000000.bin").write_bytes(header.tobytes() + ids.tobytes())
    return folder


def smoke_settings(record: Record) -> dict[str, str]:
    """The settings of the record's runs at a tiny size: what was off stays off;
    `audit` of submission.json has the last word.
    """
    from audit import SMALL
    from run_seeds import OWN, variables
    known = variables(record.folder / "train_gpt.py")
    found = run_settings(Path(record.group.runs[0].where).parent) if record.runs else {}
    off = {key for key, value in (known | found).items() if value.strip("'\"") in ("", "0", "False")}
    small = SMALL | {"ITERATIONS": 4, "WARMDOWN_ITERS": 2, "VOCAB_SIZE": 260, "TOKENIZER_PATH": ""}
    chosen = found | {key: str(value) for key, value in small.items() if key not in off}
    chosen |= {key: str(value) for key, value in record.submission.get("audit", {}).items()}
    return {key: value for key, value in chosen.items() if key not in OWN and (not known or key in known)}


def planned(record: Record) -> dict:
    """`bench.py --plan` of the contest's run on 8xH100: the script's defaults, scored as the headline was,
    in the script's own windows, batches and chunks.
    """
    import plan
    from run_seeds import variables
    script = record.folder / "train_gpt.py"
    seeds = seed_folders(record)
    settings = run_settings(seeds[0]) if seeds else {}
    how = {name: settings[name] for name in variables(script)
           if name in settings and name.startswith(OF_THE_SCORE) and name not in OF_THE_BENCH}
    return plan.make_plan(script, how)


def limits(record: Record) -> Iterable[Problem]:
    for item in planned(record)["checks"]:
        if not item["holds"]:
            text = f"{item['what']} is broken, {item['text']} (docs/plan.md)"
            yield "train_gpt.py", f"planned on 8xH100: {text}"


def smoke(record: Record) -> Iterable[Problem]:
    """Runs the script alone in a folder, in a bare environment: bytes beside it are not counted, nor needed.
    """
    with tempfile.TemporaryDirectory(prefix="smoke-") as name:
        alone = Path(name) / "record"
        alone.mkdir()
        (alone / "train_gpt.py").write_bytes(record.script)
        bare = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL") if key in os.environ}
        environment = {**bare, "HOME": name, "TMPDIR": name, "OMP_NUM_THREADS": "1", **smoke_settings(record),
                       "DATA_PATH": str(corpus(Path(name) / "text")), "RUNS_PATH": "runs", "RUN_ID": "smoke"}
        try:
            done = subprocess.run([sys.executable, "train_gpt.py"], cwd=alone, env=environment, text=True,
                                  errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  timeout=SMOKE_SECONDS)
        except subprocess.TimeoutExpired:
            return (yield "train_gpt.py", f"a run of four tiny steps took more than {SMOKE_SECONDS} s")
        if done.returncode:
            last = " / ".join([line for line in done.stdout.splitlines() if line.strip()][-3:])
            text = f"exit code {done.returncode} in a folder of its own: {last}"
            return (yield "train_gpt.py", text)
        path = alone / "runs" / "smoke" / "metrics.json"
        found = read_json(path) if path.exists() else {}
        if found.get("script_sha256") != record.sha256 or not math.isfinite(found.get("val_bpb", math.nan)):
            yield "train_gpt.py", "leaves no metrics.json with a finite val_bpb and its own hash"


# {rule: (check, what to say if it finds nothing)}
RULES: dict[str, tuple[Callable[[Record], Iterable[Problem]], str | Callable[[Record], str]]] = {
    "files": (files, files_passed),
    "schema": (schema, "submission.json is as its schema says, and the folder is named for it"),
    "todo": (leftovers, "nothing is left to be written"),
    "readme": (readme, "README has its sections, the headline first, and the tables that the files give"),
    "command": (told_command, "the README's command has the settings of the runs"),
    "seeds": (seeds, "three seeds or more of one script, configuration and data"),
    "stale": (stale, "the numbers are those of this script"),
    "log": (logs, "logs begin with their script and end with the numbers of metrics.json, to all digits"),
    "numbers": (numbers, "submission.json has the numbers of its seeds"),
    "size": (size, size_passed),
    "time": (clocks, "training and scoring are within the budgets that were on"),
}
# What a file raises that is not there or not what it should be.
UNFIT = (Misuse, OSError, KeyError, ValueError, TypeError, AttributeError, ArithmeticError)
OF_RUNS = ("command", "stale", "log", "numbers", "size", "time")  # `seeds` says where there is none


def unfit(error: Exception) -> str:
    name = "" if isinstance(error, (Misuse, OSError)) else f"{type(error).__name__}: "
    return f"cannot be judged: {f'no {error}' if isinstance(error, KeyError) else f'{name}{error}'}"


def check(folder: Path | str, base: str | None = None, skip: Iterable[str] = ()) -> list[Finding]:
    """Findings `submit/RULE` of a record, and those of lineage.py and audit.py.

    `base` is the branch that its pull request goes to, `skip` names of SLOW parts.

    Raises:
        Misuse: no record, an unknown part to skip, or no such branch.
    """
    import lineage
    if unknown := sorted({*skip} - {*SLOW}):
        raise Misuse(f"--skip {','.join(unknown)}: parts that can be left out are {', '.join(SLOW)}")
    record, found = Record(folder), []
    start = lineage.git(record.root, "merge-base", base, "HEAD").strip() if base else ""
    place = str(record.folder.relative_to(record.root))

    def judge(rule: str, problems: Iterable[Problem], good: str | Callable[[Record], str]) -> None:
        level = "WARN" if rule in ("stale", "plan") and record.frozen else "FAIL"
        try:
            bad = list(problems)
            good = good if bad or isinstance(good, str) else good(record)
        except UNFIT as error:
            bad = [(place, unfit(error))]
        bad = [(text, where.removeprefix(f"{record.root}/")) for where, text in bad]
        found.extend(Finding(f"submit/{rule}", level, *each) for each in bad)
        if not bad:
            found.append(Finding(f"submit/{rule}", "PASS", good, place))

    measured_at_all = any(record.folder.glob("seed*/metrics.json"))
    for rule, (look, good) in RULES.items():
        if measured_at_all or rule not in OF_RUNS:
            judge(rule, look(record), good)
    if start:
        judge("scope", scope(record, base, start), f"nothing but this record differs from {base}")
    try:
        found += lineage.check(record.folder, record.root)
    except UNFIT as error:
        found.append(Finding("submit/lineage", "FAIL", unfit(error), place))
    for part in skip:
        found.append(Finding(f"submit/{part}", "WARN", "left out by --skip", place))
    if "plan" not in skip:
        judge("plan", limits(record), "the contest's run holds both clocks, bytes and memory by plan")
    if "smoke" not in skip:
        judge("smoke", smoke(record), "runs alone in a folder of its own")
    if "audit" not in skip:
        import audit
        found += audit.check(record.folder)
    return found


# --- New records and exports ---


def new(name: str, parent: str, date: str | None = None, root: Path = ROOT) -> Path:
    """Starts records/<date>_<name>/ below `root` -> the folder, whole or not there.

    Raises:
        Misuse: a name, date or parent that cannot be, or the folder exists.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise Misuse(f"NAME {name!r}: letters, digits, _ . and -, the first a letter or digit")
    try:
        date = datetime.date.fromisoformat(date).isoformat() if date else datetime.date.today().isoformat()
    except ValueError:
        raise Misuse(f"--date {date}: YYYY-MM-DD is needed") from None
    script = (root / "train_gpt.py" if parent in (".", "trunk") else find_script(parent)).resolve()
    folder, trunk = root / "records" / f"{date}_{name}", root.resolve() / "train_gpt.py"
    if script != trunk and script.parent.parent != root.resolve() / "records":
        raise Misuse(f"--parent {parent}: {script} is neither the trunk nor a record of {root}")
    if folder.exists():
        raise Misuse(f"{folder}: exists already")
    about = {"draft": True, "author": TODO, "github_id": TODO, "name": name, "date": date,
             "parent": "train_gpt.py" if script == trunk else f"records/{script.parent.name}", "blurb": TODO,
             "changes": {}, "data": TODO}
    needed = script.with_name("requirements.txt")
    (root / "records").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=root / "records") as temporary:
        place = Path(temporary) / folder.name
        place.mkdir()
        (place / "train_gpt.py").write_bytes(script.read_bytes())
        (place / "requirements.txt").write_bytes(needed.read_bytes())
        (place / "submission.json").write_bytes(as_json(about))
        title = "the trunk" if script == trunk else script.parent.name.split("_", 1)[-1]
        skeleton = SKELETON.read_text().format(name=name, folder=folder.name, parent=title)
        (place / "README.md").write_text(skeleton)
        place.rename(folder)
    return folder


def track(runs: list[dict]) -> str:
    """The competition's track: its own hardware with its limits on, or the one for everything else."""
    hardware = all(run.get("world_size") == 8 and "H100" in run["device"] for run in runs)
    limits = all(0 < run["settings"].get(name, 0) <= most for run in runs for name, most in CONTEST.items())
    return "10min_16mb" if hardware and limits else "non_record_16mb"


def export(record: Record, upstream: Path, force: bool = False) -> Path:
    """Lays a record out as the competition has it, whole or not at all -> the folder.

    Files of the record that its README links to go along.

    Raises:
        Misuse: no checkout of the competition's repository, or the folder exists and not `force`.
    """
    if not (upstream / "records").is_dir():
        raise Misuse(f"--upstream {upstream}: has no records/: a checkout of openai/parameter-golf is needed")
    name = track(record.runs)
    folder = upstream / "records" / f"track_{name}" / record.folder.name
    if folder.exists() and not force:
        raise Misuse(f"{folder}: exists already; --force replaces it")
    about = {key: value for key, value in record.submission.items() if key not in HOUSE_KEYS}
    reasons = "; ".join(entry["reason"] for entry in record.submission["changes"].values())
    about = {**({"technique_summary": reasons} if reasons else {}), **about, "track": name}
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as temporary:
        place = Path(temporary) / folder.name
        place.mkdir()
        for file in ("README.md", "train_gpt.py", "requirements.txt"):
            shutil.copy(record.folder / file, place)
        (place / "submission.json").write_bytes(as_json(about))
        for run in record.runs:
            log = record.folder / f"seed{run['seed']}" / "log.txt"
            shutil.copy(log, place / f"train_seed{run['seed']}.log")
        for link in re.findall(r"\]\(([^)#:]+)\)", record.readme):
            source, aim = (record.folder / link).resolve(), place / link
            if source.is_file() and source.is_relative_to(record.folder) and not aim.exists():
                aim.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, aim)
        if folder.exists():
            folder.rename(Path(temporary) / "before")
        place.rename(folder)
    return folder


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("new", help="start a record from its parent")
    part.add_argument("name", metavar="NAME")
    part.add_argument("--parent", required=True, help="a record, or . for the trunk")
    part.add_argument("--date", help="YYYY-MM-DD (default: today)")
    parts = {name: commands.add_parser(name, help=text) for name, text in (
        ("fill", "write numbers, tables and the list of changed symbols"),
        ("check", "what a reviewer would ask before merging"),
        ("export", "lay it out for the competition's repository"))}
    for part in commands.choices.values():
        part.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    for part in parts.values():
        part.add_argument("record", metavar="RECORD", help="a record's folder or name")
    parts["fill"].add_argument("--force", action="store_true", help="a frozen record too")
    parts["check"].add_argument("--base", metavar="BRANCH", help="nothing but this record may differ from it")
    parts["check"].add_argument("--skip", default="", metavar="PARTS",
                                help=f"slow parts to leave out: {','.join(SLOW)}")
    parts["export"].add_argument("--upstream", type=Path, required=True, metavar="DIR",
                                 help="a checkout of openai/parameter-golf")
    parts["export"].add_argument("--force", action="store_true", help="replace the folder if it is there")
    options = parser.parse_args(argv)
    if options.command == "new":
        folder = new(options.name, options.parent, options.date, root)
        text = f"{folder}: change train_gpt.py, then measure"
        print(json.dumps({"folder": str(folder)}) if options.json else text)
        return FINE
    if options.command == "check":
        skip = [part for part in options.skip.split(",") if part]
        return report(check(options.record, options.base, skip), options.json)
    record = Record(options.record)
    if options.command == "fill":
        changed = fill(record, options.force)
        if options.json:
            print(json.dumps({"written": changed, "unnamed": unnamed(record)}, indent=1))
            return FINE
        print(f"written: {', '.join(changed)}" if changed else "nothing to write")
        if names := unnamed(record):
            print(f"{len(names)} changed symbols are under {TODO}: move each to an idea with a reason")
        return FINE
    failed = [finding for finding in check(record.folder, skip=SLOW) if finding.level == "FAIL"]
    if failed:
        report(failed, options.json)
        print(f"not exported: {len(failed)} findings", file=sys.stderr)
        return FINDINGS
    folder = export(record, options.upstream, options.force)
    print(json.dumps({"folder": str(folder)}) if options.json else folder)
    return FINE


if __name__ == "__main__":
    command(main)
