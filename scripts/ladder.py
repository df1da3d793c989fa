"""The contest's proportions at growing size: does a gain grow, stay, fade or reverse on the way up?

    python scripts/ladder.py tables --data data/datasets/books_ladder --jobs 2 --threads 1
    python scripts/ladder.py tables --data data/datasets/books_ladder --rungs 0.03 --arms bigrams --plan
    python scripts/ladder.py tables --report

NAME is a folder below records/ladder, or a path, with a ladder.json:

    {"question": "what is asked",
     "base": "BiJEPAX", "bytes_per_id": 2.51,
     "rungs": [0.03, 0.1, 0.3],
     "seeds": {"0.03": [42, 314, 999], "0.1": [42, 314, 999], "0.3": [42, 314]},
     "arms": {"none": {"why": "the reason", "set": {"NGRAM_ORDERS": 0}, "match": ["MODEL_DIM", "MLP_MULT"]},
              "fast": {"why": "...", "set": {"MATRIX_LR": "*1.5"}},
              "xsa":  {"why": "...", "set": {"XSA_LAST_N": {"0.03": 3, "0.1": 4, "0.3": 5}}},
              "832":  {"why": "...", "script": "ByteJEPA", "against": ["none"]}}}

A rung is millions of block weights; scripts/rungs.py says what it sets and why. The arm `base` is the trunk
there, or the script of `base`, and is always run. `bytes_per_id` is the text's, of a token model: rungs are
counted in bytes; the *.model in the folder of the data is its TOKENIZER_PATH. Both may be left out.
`set` has plain values, `*F`, `+N` or `-N` of the base's, or one of these for each rung (and, to be planned,
for `contest`); a `set` of the ladder itself, beside `arms`, is for all arms and the base. `match` names
settings that are moved, one after the other, until the planned artifact has the base's bytes. `script` is
another script of the family; what it does not know of a rung's settings is left out. `against` lists other
arms that it is compared with, too.

The data: both files of books made into shards by
    python data/prepare.py files books_train.jsonl.zst --val books_val.jsonl.zst --no-shuffle \\
        --out data/datasets/books_ladder
No text is read twice within a run: a rung that needs more than there is is refused.

Runs go rung by rung from the cheapest, all arms of a seed before the next seed. They start from a copy of the
script, which may be edited meanwhile. What is finished is skipped, what was stopped goes on, as in
scripts/run_seeds.py. A run counts if its settings and its data are those asked for, and its script is the
present one or has been shown to be equal to it. `--carry` does that: short runs of the old script and of the
present one, at the settings of each arm, are compared bit for bit (scripts/carry.py), and where all are equal
records/ladder/carried.json says so, {"from": sha256, "to": sha256, "for": arms, "why": text}. A base that
another ladder has run is taken from there. `--trunk FILE` goes on with another text of the trunk.

`--contest` plans a step of each arm at the contest's size on eight H100s (scripts/plan.py) and writes
contest.json: its milliseconds stand in the table of arms, and what an arm gains at equal planned time beside
what it gains at equal text.

Good runs are copied, in short, to <rung>/<arm>/seed<N>/metrics.json. Of these the table in README.md between
<!-- ladder --> and <!-- end -->, results.json and ladder.png are made at the end, or by `--report` at any
time.

Exit code 0; 1 if a run failed or an old script computes something else; 2 misuse; 130 stopped: the same
command goes on.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import json
import math
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import carry
import plan
import rungs
from family import (
    FINDINGS,
    FINE,
    OF_THE_RUN,
    ROOT,
    TRUNK,
    Misuse,
    command,
    find_script,
    idle,
    load_script,
    markdown_table,
    read_json,
    write_atomic,
)
from ladder_report import write_report
from run_seeds import OWN, STOPPED, Job, Runner, Slot, run_id, say, seed_list, sha256, slots, variables

LADDERS = ROOT / "records" / "ladder"
# How a run is carried out; a score that another value made is the same score.
HOW = {"DEVICE_BATCH_TOKENS", "EVAL_BATCH_TOKENS", "CHECKPOINT_EVERY", "TRAIN_LOG_EVERY", "VERIFY_DATA",
       "TOKENIZER_PATH"}
KEPT = ("val_bpb", "headline", "bytes_code", "bytes_model", "bytes_total", "train_seconds", "eval_seconds",
        "params", "steps", "ms_per_step", "peak_mem_mb", "seed", "script_sha256", "git_commit", "device",
        "world_size", "torch", "clocks", "dataset", "settings")


# --- What is asked ---


def at_rung(asked: dict, rung: str) -> dict[str, str]:
    """{setting: value} of {setting: value, or {rung: value}}."""
    return {name: value[rung] if isinstance(value, dict) else value for name, value in asked.items()}


@dataclass(frozen=True)
class Arm:
    """`asked`: {setting: value, or {rung: value}}; `match`: the settings that make its bytes the base's;
    `against`: arms that it is compared with, beside the base."""

    name: str
    why: str = ""
    asked: dict = field(default_factory=dict)
    script: Path = TRUNK
    match: tuple[str, ...] = ()
    against: tuple[str, ...] = ()

    def at(self, rung: str) -> dict[str, str]:
        """Its own settings at a rung."""
        return at_rung(self.asked, rung)


@dataclass(frozen=True)
class Ladder:
    """What a ladder.json says, the base first among the arms, the rungs from the smallest. `per_id`: bytes
    of text an id."""

    folder: Path
    question: str
    shared: dict  # as an arm's `asked`
    arms: dict[str, Arm]
    rungs: list[str]
    seeds: dict[str, list[int]]
    per_id: float = 1.0

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def base(self) -> Path:
        return self.arms["base"].script

    def comparisons(self) -> dict[str, tuple[str, str]]:
        """{what a table calls it: (arm, what it is compared with)}; against the base, the arm's own name."""
        found = {}
        for arm in [*self.arms.values()][1:]:
            found[arm.name] = arm.name, "base"
            found |= {f"{arm.name} - {other}": (arm.name, other) for other in arm.against}
        return found


def text_of(value: object, where: str) -> str:
    if not isinstance(value, (str, int, float)):
        raise Misuse(f"{where}: a text, a number, true or false is needed")
    return str(int(value) if isinstance(value, bool) else value)


def own_settings(found: dict, where: str, rung_names: list[str] | None = None) -> dict:
    """{setting: text, or {rung: text}} of an entry `set`; one value a rung only where rungs are given.

    Raises:
        Misuse: a setting that the tool sets, a value of another kind, a rung without one.
    """
    asked = {}
    for key, value in found.items():
        if key in OWN or key == "DATA_PATH":
            raise Misuse(f"{where}: {key} is set by this tool")
        if isinstance(value, dict) and rung_names:
            if missing := [rung for rung in rung_names if rung not in value]:
                raise Misuse(f"{where}: {key} has no value for rung {missing[0]}")
            asked[key] = {rung: text_of(each, f"{where}: {key}") for rung, each in value.items()}
        else:
            asked[key] = text_of(value, f"{where}: {key}")
    return asked


def read_arm(name: str, found: object, rung_names: list[str], where: str, base: Path = TRUNK) -> Arm:
    """One entry of `arms`, checked.

    Raises:
        Misuse: it is not as the docstring says.
    """
    if not re.fullmatch(r"\w[\w.+-]*", name) or name == "base":
        raise Misuse(f"{where}: a name of letters, digits and . + - is needed, other than base")
    if not isinstance(found, dict) or found.keys() - {"why", "set", "script", "match", "against"}:
        raise Misuse(f"{where}: an object with `why`, `set`, `script`, `match` and `against` is needed")
    match, against = found.get("match", []), found.get("against", [])
    if not isinstance(found.get("why"), str) or not isinstance(found.get("script", ""), str):
        raise Misuse(f"{where}: `why` is needed, a text; so is `script` where there is one")
    if not isinstance(found.get("set", {}), dict):
        raise Misuse(f"{where}: `set` is an object of settings")
    asked = own_settings(found.get("set", {}), where, rung_names)
    match = [match] if isinstance(match, str) else match
    if not isinstance(match, list) or not all(isinstance(each, str) for each in match):
        raise Misuse(f"{where}: `match` is a setting or a list of settings")
    if not isinstance(against, list) or not all(isinstance(each, str) for each in against):
        raise Misuse(f"{where}: `against` is a list of other arms")
    script = find_script(found["script"]) if "script" in found else base
    if not asked and script == base:
        raise Misuse(f"{where}: it is the base; `set` or `script` is needed")
    return Arm(name, found["why"], asked, script, tuple(match), tuple(against))


def read_ladder(name: str) -> Ladder:
    """The ladder of a name or a folder.

    Raises:
        Misuse: there is none, or its file is not as the docstring says.
    """
    folder = Path(name) if (Path(name) / "ladder.json").is_file() else LADDERS / name
    path = folder / "ladder.json"
    if not path.is_file():
        there = sorted(each.parent.name for each in LADDERS.glob("*/ladder.json"))
        raise Misuse(f"{name}: no ladder; there are {', '.join(there) or 'none'}")
    found = read_json(path)
    keys = "question", "base", "bytes_per_id", "rungs", "seeds", "set", "arms"
    if not isinstance(found, dict) or found.keys() - {*keys}:
        raise Misuse(f"{path}: an object with {', '.join(f'`{key}`' for key in keys)} is needed")
    base, per_id = found.get("base", "trunk"), found.get("bytes_per_id", 1.0)
    if not isinstance(base, str) or not isinstance(per_id, (int, float)) or not 1 <= per_id <= 100:
        raise Misuse(f"{path}: `base` is a script's name, `bytes_per_id` a number from 1 to 100")
    if not isinstance(found.get("question"), str) or not isinstance(found.get("set", {}), dict):
        raise Misuse(f"{path}: `question` is needed, a text; `set`, where there is one, is an object")
    names = found.get("rungs")
    if not isinstance(names, list) or not names:
        raise Misuse(f"{path}: `rungs` is needed, a list of millions of block weights")
    names = [text_of(each, f"{path}: rungs") for each in names]
    for each in names:
        if not re.fullmatch(r"\d+\.?\d*", each) or not 0.001 <= float(each) <= 1000:
            raise Misuse(f"{path}: rung {each}: millions of block weights are needed, 0.001 to 1000")
    names.sort(key=float)
    if len({*map(rungs.weights, map(float, names))}) < len(names):
        raise Misuse(f"{path}: two rungs of one size: {', '.join(names)}")

    shared = own_settings(found.get("set", {}), f"{path}: set", names)
    seeds = found.get("seeds")
    if not isinstance(seeds, dict) or sorted(seeds, key=str) != sorted(names):
        raise Misuse(f"{path}: `seeds` is needed, an object with a list for each rung, {', '.join(names)}")
    for each, listed in seeds.items():
        whole = isinstance(listed, list) and all(type(seed) is int and seed >= 0 for seed in listed)
        if not whole or not listed or len({*listed}) < len(listed):
            raise Misuse(f"{path}: seeds of rung {each}: different whole numbers are needed")

    arms = found.get("arms")
    if not isinstance(arms, dict) or not arms:
        raise Misuse(f"{path}: `arms` is needed, an object of one arm or more beside the base")
    first = Arm("base", "the trunk" if base == "trunk" else base, script=find_script(base))
    read = {arm: read_arm(arm, entry, names, f"{path}: arm {arm}", first.script)
            for arm, entry in arms.items()}
    for arm in read.values():
        if strange := [other for other in arm.against if other not in read or other == arm.name]:
            raise Misuse(f"{path}: arm {arm.name}: `against` {strange[0]}: it is no other arm")
    return Ladder(folder, found["question"], shared, {"base": first, **read}, names, seeds, float(per_id))


# --- Scripts ---


@dataclass(frozen=True)
class Program:
    """A script: where it lives, the copy that runs, its hash and its variables with their defaults."""

    source: Path
    copy: Path
    sha256: str
    defaults: dict[str, str]

    @functools.cached_property
    def module(self):
        return load_script(self.copy)


def program(script: Path, runs: Path, text: Path | None = None) -> Program:
    """A script as it is now, copied so that it can be edited while it runs."""
    text = text or script
    digest = sha256(text)
    copy = runs / "scripts" / digest[:12] / "train_gpt.py"
    if not copy.is_file() or sha256(copy) != digest:
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(copy, text.read_bytes())
    return Program(script, copy.resolve(), digest, variables(text))


def in_proofs(ladder: Ladder, arm: str) -> str:
    """What carried.json calls an arm: a base by what makes it, for ladders share bases, but not all of them.
    """
    if arm != "base":
        return f"{ladder.name}/{arm}"
    script = "trunk" if ladder.base == TRUNK else ladder.base.parent.name.partition("_")[2]
    own = ", ".join(f"{name}={value}" for name, value in sorted(ladder.shared.items()))
    return f"base: {script}, {own or 'no settings'}"


def equal_scripts(ladder: Ladder, arm: str) -> dict[str, str]:
    """{sha256: one sha256 that stands for all that are equal to it, for this arm} of carried.json. An entry
    without `for` is for all arms.

    Raises:
        Misuse: it is no list of {"from", "to", "why"}.
    """
    path, stands = ladder.folder.parent / "carried.json", {}
    found = read_json(path) if path.exists() else []

    def root(sha: str) -> str:
        while stands.get(sha, sha) != sha:
            sha = stands[sha]
        return sha

    for entry in found if isinstance(found, list) else [None]:
        if not isinstance(entry, dict) or not all(entry.get(key) for key in ("from", "to", "why")):
            raise Misuse(f"{path}: a list of objects with `from`, `to` and `why` is needed")
        if in_proofs(ladder, arm) in entry.get("for", [in_proofs(ladder, arm)]):
            stands[root(entry["from"])] = root(entry["to"])
    return {sha: root(sha) for entry in found for sha in (entry["from"], entry["to"])}


def text_of_script(digest: str, runs: Path) -> bytes:
    """A script by its sha256: a copy that has run, else what git knows.

    Raises:
        Misuse: neither is there.
    """
    copy = runs / "scripts" / digest[:12] / "train_gpt.py"
    if copy.is_file() and sha256(copy) == digest:
        return copy.read_bytes()
    if (source := carry.sources_in_git(ROOT).get(digest)) is None:
        raise Misuse(f"--carry: no copy below {runs} and no commit has script {digest[:8]}")
    return source


def carry_on(ladder: Ladder, jobs: list[LadderJob], runs: Path, count: int) -> int:
    """Compares the scripts of kept runs with the present ones, each arm at its lowest rung -> exit code.

    An entry is written for a script only if it is equal for all arms that it has run here.
    """
    todo: dict[tuple[str, str], tuple[LadderJob, Path]] = {}
    for job in jobs:
        path = job.place / "metrics.json"
        found = read_json(path) if path.is_file() else None
        if found and job.why_not(found) and not job.why_not(found, any_script=True):
            todo.setdefault((found["script_sha256"], job.arm), (job, path))
    path = ladder.folder.parent / "carried.json"
    entries, code = read_json(path) if path.exists() else [], FINE
    for old in dict.fromkeys(sha for sha, _ in todo):
        jobs_of_old = {arm: found for (sha, arm), found in todo.items() if sha == old}
        equal = [arm for arm, (job, place) in jobs_of_old.items()
                 if computes_the_same(old, arm, job, place, runs, count)]
        if len(equal) < len(jobs_of_old):
            code = FINDINGS
            continue
        for new in dict.fromkeys(job.program.sha256 for job, _ in jobs_of_old.values()):
            mine = [arm for arm, (job, _) in jobs_of_old.items() if job.program.sha256 == new]
            why = f"equal bit for bit over {carry.FULL.steps} steps, an artifact and its scores"
            names = [in_proofs(ladder, arm) for arm in mine]
            entries.append({"from": old, "to": new, "for": names, "why": why})
        write_atomic(path, f"{json.dumps(entries, indent=1)}\n".encode())
    say(f"{len(todo)} arms of other scripts compared" if todo else "no run of another script")
    return code


def computes_the_same(old: str, arm: str, job: LadderJob, place: Path, runs: Path, count: int) -> bool:
    """Whether the old script and the present one are equal at what a kept run had; says so."""
    try:
        texts = text_of_script(old, runs), job.program.copy.read_bytes()
        pair = carry.made_pair(texts, carry.Measured.read(place), carry.FULL, {}, None)
        result, = carry.side_by_side([pair], count)
    except Misuse as error:
        say(f"{old[:8]}, arm {arm}: {error}")
        return False
    say(f"{old[:8]}, arm {arm}: {'equal' if result.equal else result.first()}")
    return result.equal


# --- The contest's size ---

CONTEST = "contest"
ON_A_CPU = frozenset(rungs.measuring(rungs.proportions(1.0)))


def contest_settings(ladder: Ladder, arm: Arm, programs: dict[Path, Program]) -> dict[str, str]:
    """An arm's settings at the contest's size, without those that say how a CPU trains and scores.

    Raises:
        Misuse: a setting by rung that says nothing of the contest.
    """
    for name, value in {**ladder.shared, **arm.asked}.items():
        if isinstance(value, dict) and CONTEST not in value:
            raise Misuse(f"{ladder.name}: arm {arm.name}: {name} has no value for `{CONTEST}`")
    own = {*at_rung(ladder.shared, CONTEST), *arm.at(CONTEST)}
    found = settings_at(ladder, arm, CONTEST, programs)
    return {name: value for name, value in found.items() if name in own or name not in ON_A_CPU}


def plan_contest(ladder: Ladder, programs: dict[Path, Program]) -> None:
    """Writes contest.json: the planned step of each arm on eight H100s. What is planned already stays."""
    path = ladder.folder / "contest.json"
    found, before = {}, read_json(path)["arms"] if path.is_file() else {}
    for arm in ladder.arms.values():
        asked = {"script_sha256": programs[arm.script].sha256,
                 "settings": contest_settings(ladder, arm, programs)}
        known = before.get(arm.name, {})
        if {key: known.get(key) for key in asked} != asked:
            planned = plan.make_plan(programs[arm.script].copy, asked["settings"], "h100", 8)
            known = asked | {"ms": round(planned["ms_per_step"], 2), "bytes": planned["sizes"]["model"]}
        found[arm.name] = known
        say(f"{arm.name}: {known['ms']:.1f} ms, {known['bytes']:,} bytes")
    write_atomic(path, f"{json.dumps({'card': 'h100', 'ranks': 8, 'arms': found}, indent=1)}\n".encode())


# --- Runs ---


def settings_at(ladder: Ladder, arm: Arm, rung: str, programs: dict[Path, Program]) -> dict[str, str]:
    """What an arm's runs at a rung get, beside the data and the seed.

    Raises:
        Misuse: a setting that its script does not know or accept.
    """
    mine, first = programs[arm.script], programs[ladder.base]
    where = f"{ladder.name}: arm {arm.name} at {rung}"
    size = rungs.WEIGHTS / 1e6 if rung == CONTEST else float(rung)
    own, known, shared = arm.at(rung), mine.defaults, at_rung(ladder.shared, rung)
    if strange := sorted(({*own, *arm.match} - known.keys()) | ({*shared} - first.defaults.keys())):
        raise Misuse(f"{where}: {mine.source.parent.name}/{mine.source.name} has no variable {strange[0]}")
    try:
        found = rungs.arm_settings(size, own, known, where, shared, ladder.per_id)
        found = {key: value for key, value in found.items() if key in known}
        if arm.match:
            base = rungs.arm_settings(size, {}, first.defaults, where, shared, ladder.per_id)
            base = {key: value for key, value in base.items() if key in first.defaults}
            wanted = rungs.planned_bytes(first.module, base)
            found = rungs.matched(mine.module, found, list(arm.match), wanted, own, known)
        mine.module.Hyperparameters(found)
    except Misuse as error:
        raise Misuse(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    except mine.module.UserError as error:
        raise Misuse(f"{where}: {error}") from None
    except (ValueError, ZeroDivisionError) as error:
        raise Misuse(f"{where}: a setting is no usable number ({error})") from None
    return found


def differing(metrics: dict, settings: dict[str, str], module) -> list[str]:
    """Names of settings in which a run is not what is asked for: both know and read them and differ, or the
    run's script did not know one that is not at its default.
    """
    asked, found = module.Hyperparameters(settings).settings(), metrics.get("settings", {})
    names = (asked.keys() & found.keys()) - HOW - {*OF_THE_RUN} - (idle(asked) & idle(found))
    wrong = {name for name in names if asked[name] != found[name]}
    usual = module.Hyperparameters({}).settings()  # what an older script does not know it did not do
    newer = asked.keys() - found.keys() - HOW - {*OF_THE_RUN} - idle(asked)
    return sorted(wrong | {name for name in newer if asked[name] != usual[name]})


def median_step(path: Path) -> float | None:
    """Milliseconds of a step in a metrics.jsonl: the mean over tenths of the run of the median between its
    lines. Other programs' bursts and checkpoints do not count, but phases of a run do.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return None
    points = [(line["step"], line["train_seconds"]) for line in lines if "train_seconds" in line]
    steps = [1e3 * (b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points) if b[0] > a[0]]
    tenths = [steps[len(steps) * i // 10:len(steps) * (i + 1) // 10] for i in range(10)]
    return statistics.mean(statistics.median(tenth) for tenth in tenths if tenth) if steps else None


@dataclass
class LadderJob(Job):
    """One run of an arm at a rung. `place` is where its numbers are kept; `expected` its seconds."""

    rung: str = ""
    program: Program | None = None
    place: Path = Path()
    data: str = ""  # sha256 of the text, where it is known
    equal: dict[str, str] = field(default_factory=dict)
    expected: float = 0.0
    looks: bool = False  # a plan, which leaves no file

    def __str__(self) -> str:
        return f"{self.rung} {self.arm} seed {self.seed}"

    def why_not(self, metrics: object, any_script: bool = False) -> str:
        """Why a run's numbers are not those of this job; empty where they are."""
        if not isinstance(metrics, dict) or not isinstance(metrics.get("val_bpb"), float):
            return "no result"
        if not math.isfinite(metrics["val_bpb"]) or metrics.get("seed") != self.seed:
            return "no finite score of this seed"
        script = metrics.get("script_sha256", "")
        if not any_script and self.stands(script) != self.stands(self.program.sha256):
            return f"script {script[:8]}"
        if self.data and metrics.get("dataset", {}).get("sha256") != self.data:
            return "other data"
        names = differing(metrics, self.settings, self.program.module)
        return f"other {', '.join(names[:4])}" if names else ""

    def stands(self, sha: str) -> str:
        return self.equal.get(sha, sha)

    def keep(self, script_sha256: str) -> bool:
        """Looks in this ladder, in the others, and among the runs."""
        here, pattern = self.place / "metrics.json", f"*/{self.rung}/base/seed{self.seed}/metrics.json"
        others = sorted(self.place.parents[3].glob(pattern)) if self.arm == "base" else []
        for path in dict.fromkeys([here, *others]):
            found = read_json(path) if path.is_file() else None
            if found and not self.why_not(found):
                self.metrics, self.state = found, "kept"
                if path != here and not self.looks:
                    self.store(found)
                    say(f"kept   {self}: {self.told()}, of ladder {path.parents[3].name}")
                return True
        if super().keep(script_sha256):
            if not self.looks:
                self.collect()
            return True
        return False

    def collect(self) -> None:
        """Keeps what a report needs of a finished run's files."""
        shown = {key: self.metrics[key] for key in KEPT if key in self.metrics}
        if (step := median_step(self.folder / "metrics.jsonl")) is not None:
            shown["median_ms_per_step"] = step
        data = shown.get("dataset", {})
        shown["settings"] = {key: value for key, value in shown.get("settings", {}).items()
                             if key not in OF_THE_RUN}
        shown["dataset"] = {key: data[key] for key in data if key != "val_text_sha256"}
        shown["evals"] = {name: {key: value for key, value in entry.items() if key != "bits_by_class"}
                          for name, entry in self.metrics.get("evals", {}).items()}
        self.store(shown)

    def store(self, metrics: dict) -> None:
        """Writes metrics.json, a key a line."""
        self.place.mkdir(parents=True, exist_ok=True)
        lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in metrics.items())
        write_atomic(self.place / "metrics.json", ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def make_jobs(ladder: Ladder, options: argparse.Namespace, programs: dict[Path, Program], data: str
              ) -> list[LadderJob]:
    """All runs that are asked for: by rung, then by seed, then by arm."""
    found = []
    for rung in options.rungs:
        settings = {}
        for arm in options.arms:
            settings[arm] = settings_at(ladder, ladder.arms[arm], rung, programs)
            same = [other for other in settings if other != arm and settings[other] == settings[arm]
                    and ladder.arms[other].script == ladder.arms[arm].script]
            if same:
                raise Misuse(f"{ladder.name}: arms {same[0]} and {arm} have the same settings at {rung}")
        for seed in ladder.seeds[rung]:
            for arm in options.arms if seed in (options.seeds or [seed]) else ():
                mine = programs[ladder.arms[arm].script]
                given = settings[arm] | found_text(options.data, mine)
                name = run_id(mine.source, mine.sha256, given, seed)
                found.append(LadderJob(
                    arm, seed, given, Path(options.runs) / name, rung=rung, program=mine, data=data,
                    place=ladder.folder.absolute() / rung / arm / f"seed{seed}",
                    equal=equal_scripts(ladder, arm)))
    return found


def found_text(data: str | None, mine: Program) -> dict[str, str]:
    """The settings that name a folder of shards, and its tokenizer for a script that reads tokens."""
    if not data:
        return {}
    models = sorted(Path(data).glob("*.model")) if "TOKENIZER_PATH" in mine.defaults else []
    return {"DATA_PATH": data} | ({"TOKENIZER_PATH": str(models[0])} if models else {})


# --- When it will end ---


def prior_seconds(settings: dict[str, str]) -> tuple[float, float]:
    """Seconds of training and of scoring on one thread, from what the rungs took on an AVX-512 core in fp32.

    Products run at 75 GFLOP/s, a pair of a query and a key takes 10 ns a head, all else 90 ns a channel and
    layer; a forward takes 0.35 of a step.
    """
    def number(name: str, default: float) -> float:
        return float(settings.get(name, default))

    layers, width, length = number("NUM_LAYERS", 13), number("MODEL_DIM", 512), number("TRAIN_SEQ_LEN", 4096)
    weights = layers * width**2 * (3 + 2 * number("MLP_MULT", 3.5))
    micros = 6 * weights / 75e3 + 0.01 * layers * number("NUM_HEADS", 4) * length / 2 + 0.09 * layers * width
    passes = 3 + length / number("EVAL_STRIDE", length)
    targets = number("ITERATIONS", 1) * number("TRAIN_BATCH_TOKENS", 1)
    return 1e-6 * micros * targets + 6, 1e-6 * micros * 0.35 * passes * number("VAL_BYTES", 0) + 2


class Costs:
    """What runs will take: the prior, times what finished runs took of theirs."""

    def __init__(self, jobs: list[LadderJob]):
        self.ratios: dict[tuple[str, str], list[float]] = {}
        for job in jobs:
            if job.good and (clocks := job.metrics.get("clocks")):
                ratio = sum(clocks.values()) / sum(prior_seconds(job.settings))
                for key in ((job.rung, job.arm), (job.rung, ""), ("", "")):
                    self.ratios.setdefault(key, []).append(ratio)

    def seconds(self, job: LadderJob) -> float:
        """Of what is left of a run: of one that scores, half of its scoring."""
        keys = ((job.rung, job.arm), (job.rung, ""), ("", ""))
        ratio = next((statistics.median(self.ratios[key]) for key in keys if key in self.ratios), 1.0)
        training, scoring = prior_seconds(job.settings)
        left = 1 - job.step() / int(job.settings["ITERATIONS"]) if job.state == "running" else 1.0
        return ratio * (training * left + scoring * (1.0 if left > 0 else 0.5))


def ends(jobs: list[LadderJob], count: int) -> tuple[dict[str, float], float]:
    """({rung: seconds until its last run is through}, core seconds left) with `count` runs at a time."""
    costs, free, rung_ends, left = Costs(jobs), [0.0] * count, {}, 0.0
    for job in sorted(jobs, key=lambda job: job.state != "running"):
        if job.state not in ("running", "waiting"):
            continue
        seconds = costs.seconds(job)
        done = heapq.heappop(free) + seconds
        heapq.heappush(free, done)
        rung_ends[job.rung] = max(rung_ends.get(job.rung, 0.0), done)
        left += seconds
    return rung_ends, left


def clock(seconds: float) -> str:
    """When something ends that takes so long."""
    then = time.localtime(time.time() + seconds)
    span = f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    return f"{time.strftime('%b %d %H:%M', then)}, in {span}"


def progress(jobs: list[LadderJob], count: int) -> str:
    """The live table: an arm a row, a rung a column; when each rung will end."""
    names, arms = [*dict.fromkeys(job.rung for job in jobs)], [*dict.fromkeys(job.arm for job in jobs)]
    rung_ends, _ = ends(jobs, count)
    rows = []
    for arm in arms:
        cells = []
        for rung in names:
            mine = [job for job in jobs if (job.arm, job.rung) == (arm, rung)]
            done = [job.metrics["val_bpb"] for job in mine if job.good]
            failed = sum(job.state == "failed" for job in mine)
            mean = f" {statistics.mean(done):.4f}" if done else ""
            cells.append(f"{len(done)}/{len(mine)}{mean}{f' {failed} failed' if failed else ''}")
        rows.append([arm, *cells])
    rows.append(["ends", *(clock(rung_ends[rung]) if rung in rung_ends else "" for rung in names)])
    return markdown_table(["runs and BPB", *names], rows)


class LadderRunner(Runner):
    """Runs the scripts' copies, keeps good runs at once and shows the table."""

    def program(self, job: LadderJob) -> tuple[Path, str, set[str]]:
        mine = job.program
        return mine.copy, mine.sha256, {*mine.defaults}

    def finish(self, job: LadderJob, code: int, seconds: float) -> None:
        super().finish(job, code, seconds)
        if job.state == "done":
            job.collect()
            say(progress(self.jobs, len(self.slots)))

    def run(self, jobs: list[LadderJob]) -> None:
        self.jobs = jobs
        super().run(jobs)

    def status(self, jobs: list[LadderJob]) -> str:
        rung_ends, _ = ends(jobs, len(self.slots))
        return f"{super().status(jobs)}; all through {clock(max(rung_ends.values(), default=0.0))}"


# --- The command ---


def check_text(jobs: list[LadderJob], data: str, per_id: float = 1.0) -> str:
    """The sha256 of the text in a folder of shards, if it is long enough for every job.

    Raises:
        Misuse: no shards, ids that stand for other than `per_id` bytes, or a run would meet its text twice.
    """
    if not jobs:
        return ""
    script, settings = jobs[0].program.module, jobs[0].settings
    if not Path(data).is_dir():
        raise Misuse(f"--data {data}: no such folder; --help says how to make one")
    try:
        found = script.Dataset(script.Hyperparameters(settings), False)
    except script.UserError as error:
        raise Misuse(f"--data {data}: {error}") from None
    size, count = (found.manifest.get(key, {}).get("train", 0) for key in ("bytes", "tokens"))
    if count and abs(size / count / per_id - 1) > 0.05:
        told = f"an id stands for {size / count:.2f} bytes, `bytes_per_id` is {per_id:g}"
        raise Misuse(f"--data {data}: {told}")
    for job in jobs:
        length = int(job.settings["TRAIN_SEQ_LEN"])
        there = sum((len(shard) - 1) // length * length for shard in found.train_shards)
        asked = int(job.settings["ITERATIONS"]) * int(job.settings["TRAIN_BATCH_TOKENS"])
        if asked > there:
            raise Misuse(f"--data {data}: {there:,} ids in rows of {length}; arm {job.arm} at {job.rung} "
                         f"reads {asked:,}, and no text twice")
    return found.fingerprint()["sha256"]


def chosen(text: str | None, known: list[str], option: str) -> list[str]:
    """The names in a list with commas, all where there is none, in their own order.

    Raises:
        Misuse: one is not known.
    """
    names = [part.strip() for part in text.split(",")] if text else known
    if strange := [name for name in names if name not in known]:
        raise Misuse(f"{option} {strange[0]}: there are {', '.join(known)}")
    return [name for name in known if name in names]


def plan_table(jobs: list[LadderJob], count: int) -> str:
    """What would run: seconds of one run, and bytes, by rung and arm."""
    costs, sizes, seen = Costs(jobs), {}, {}
    for job in jobs:
        seen.setdefault((job.rung, job.arm), []).append(job)
    for (rung, arm), mine in seen.items():
        size = rungs.planned_bytes(mine[0].program.module, {
            key: value for key, value in mine[0].settings.items()
            if key not in ("DATA_PATH", "TOKENIZER_PATH")})
        sizes[rung, arm] = size
        share = f"{size / sizes[rung, 'base']:.3f}" if (rung, "base") in sizes else ""
        seen[rung, arm] = [*map(str, (rung, arm, sum(job.good for job in mine), len(mine))),
                           f"{size:,}", share, f"{costs.seconds(mine[0]):,.0f}"]
    rung_ends, left = ends(jobs, count)
    header = ["rung", "arm", "done", "of", "planned bytes", "of the base's", "seconds a run"]
    table = markdown_table(header, [*seen.values()])
    lines = [f"{rung}: through {clock(seconds)}" for rung, seconds in rung_ends.items()]
    left = f"{left / 3600:.1f} core hours left, {count} at a time"
    return "\n".join([table, "", left, *lines, *passed_over(jobs)])


def passed_over(jobs: list[LadderJob]) -> list[str]:
    """Lines on runs that are kept but do not count, by the reason."""
    reasons: Counter[str] = Counter()
    for job in jobs:
        path = job.place / "metrics.json"
        if not job.good and path.is_file():
            reasons[job.why_not(read_json(path))] += 1
    hint = "; --carry shows whether it computes what the present one does"
    return [f"{count} kept {'runs do' if count > 1 else 'run does'} not count: {why}"
            + hint * why.startswith("script") for why, count in reasons.items()]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("name", metavar="NAME", help="a folder below records/ladder, or a folder with a ladder.json")
    option("--data", metavar="FOLDER", help="shards of the base's vocabulary; needed to run")
    option("--arms", metavar="A,B", help="only these, and the base (default: all)")
    option("--no-base", action="store_true", help="not the base, where --arms are compared with one another")
    option("--rungs", metavar="A,B", help="only these (default: all)")
    option("--seeds", metavar="A,B", help="only these (default: all of each rung)")
    option("--jobs", type=int, help="runs at a time (default: as many as --cores serve, or one)")
    option("--threads", type=int, default=1, help="threads of a run (default: %(default)s)")
    option("--cores", default="", metavar="A;B", help="cores for each run at a time: '0;1'")
    option("--runs", default="runs", metavar="FOLDER", help="where runs are kept (default: %(default)s)")
    option("--trunk", type=Path, metavar="FILE", help="another text of the trunk than train_gpt.py")
    option("--plan", action="store_true", help="only show what would run, its bytes and when it would end")
    option("--report", action="store_true", help="only make the tables and the plot")
    option("--contest", action="store_true", help="only plan each arm's step at the contest's size")
    option("--carry", action="store_true", help="show that runs of older scripts hold for the present ones")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    for name in ("jobs", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise Misuse(f"--{name} {value}: a whole number from 1")
    ladder = read_ladder(options.name)
    asked_for = {"--arms": options.arms, "--rungs": options.rungs, "--seeds": options.seeds}
    options.gpus, options.ranks = "", 1
    places: list[Slot] = slots(options)
    if options.no_base and not options.arms:
        raise Misuse("--no-base: --arms says which arms are to run without it")
    asked = options.arms if options.no_base else f"base,{options.arms}"
    options.arms = chosen(asked if options.arms else None, [*ladder.arms], "--arms")
    options.rungs = chosen(options.rungs, ladder.rungs, "--rungs")
    options.seeds = seed_list(options.seeds) if options.seeds else []
    if options.trunk and not options.trunk.is_file():
        raise Misuse(f"--trunk {options.trunk}: no such file")
    programs = {script: program(script, Path(options.runs), options.trunk if script == TRUNK else None)
                for script in {arm.script for arm in ladder.arms.values()}}

    if options.report or options.carry or options.contest:
        if given := [name for name in ("--arms", "--rungs", "--seeds") if asked_for[name]]:
            raise Misuse(f"{given[0]}: --report, --carry and --contest are about the whole ladder")
        options.arms, options.rungs, options.seeds = [*ladder.arms], ladder.rungs, []
        if options.contest:
            plan_contest(ladder, programs)
        kept = make_jobs(ladder, options, programs, "")
        if options.carry:
            return carry_on(ladder, kept, Path(options.runs), len(places))
        return report(ladder, kept)
    jobs = make_jobs(ladder, options, programs, "")
    if strange := [seed for seed in options.seeds if all(job.seed != seed for job in jobs)]:
        raise Misuse(f"--seeds {strange[0]}: no rung has it")
    whole = argparse.Namespace(**vars(options) | {"arms": [*ladder.arms], "rungs": ladder.rungs, "seeds": []})
    make_jobs(ladder, whole, programs, "")  # the report at the end needs them all: a wrong arm is told now
    if not options.data and not options.plan:
        raise Misuse("--data FOLDER is needed; --help says how to make one")
    digest = check_text(jobs, options.data, ladder.per_id) if options.data else ""
    for job in jobs:
        job.data, job.looks = digest, options.plan
        job.keep(job.program.sha256)
    if options.plan:
        print(plan_table(jobs, len(places)))
        return FINE

    first = programs[ladder.base]
    runner = LadderRunner(first.copy, places, options.threads, 1, {*first.defaults})
    say(progress(jobs, len(places)))
    runner.run(jobs)
    for job in jobs:
        if job.state == "failed":
            say("\n    ".join([f"{job} failed, exit code {job.exit_code}:", *job.tail]))
    options.arms, options.rungs, options.seeds = [*ladder.arms], ladder.rungs, []
    report(ladder, make_jobs(ladder, options, programs, digest))
    if any(job.state == "stopped" for job in jobs):
        say("stopped; the same command goes on from here")
        return STOPPED
    return FINE if all(job.good for job in jobs) else FINDINGS


def report(ladder: Ladder, jobs: list[LadderJob]) -> int:
    """Writes README.md, results.json and the plot from the runs that are kept; prints the tables."""
    runs, left_out = {}, []
    for job in jobs:
        path = job.place / "metrics.json"
        found = read_json(path) if path.is_file() else None
        if found is None:
            continue
        if why := job.why_not(found, any_script=True):
            left_out.append(f"{job}: {why}")
        else:
            runs[job.rung, job.arm, job.seed] = found
    if not runs and not (ladder.folder / "README.md").exists():
        say("no run is kept yet: no tables")
        return FINE
    print(write_report(ladder, runs, left_out, {job.arm: job.program.sha256 for job in jobs},
                       {arm: equal_scripts(ladder, arm) for arm in ladder.arms}))
    return FINE


if __name__ == "__main__":
    command(main)
