"""Is an arm better than its base? Seeds, t-tests, intervals, and the
verdicts of this house and of the competition.

    python scripts/stats.py --base records/X new=runs/a,runs/b,runs/c
    python scripts/stats.py --base records/X/ablations/base records/X/ablations/*/
    python scripts/stats.py --base their_logs --eval final_int6_sliding --json new=A/log.txt,B/log.txt
    python scripts/stats.py --base 1.9226,1.9231,1.9224 A=1.92,1.93,1.94 B=42:1.92,314:1.93

A group is `NAME=SOURCE,SOURCE...` or only sources. A source is a metrics.json, a log with lines
`final_..._exact val_loss:.. val_bpb:..` (the one that the log calls its headline counts, else the last), a
folder of either (a run, seed*/ or seed*.json, logs), a record's name, or a number, with or without its seed.
Scores are bits per byte (BPB), lower is better, *difference* is arm minus base.

House: where two seeds or more are shared, or the only one of a group, the paired t over those, else Welch's.
*better* or *worse*: the 95 % interval excludes zero; *no effect*: it lies inside +-0.003 BPB; anything else
is *undecided*.
Competition: at least 0.005 nats better at one-sided p < 0.01, by Welch's t, read per token and per byte.
*yes*: p < 0.01 that the gain exceeds 0.005; *mean only*: the mean gain does, and p < 0.01 only for some gain;
*frontier*: the practice for rows in order of date, one-sided p < 0.25 for some gain.

`--plot FILE.png` draws the differences with their intervals, an arm a line.

A group whose runs differ in script, data, evaluation or in a setting other than the seed,
names and paths is not compared: exit code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

from family import (
    FINDINGS,
    FINE,
    OF_THE_RUN,
    Finding,
    Misuse,
    carried,
    command,
    find_script,
    markdown_table,
    read_json,
    report,
)

CONFIDENCE = 0.95
NO_EFFECT = 0.003  # BPB
RECORD_NATS, RECORD_P, FRONTIER_P = 0.005, 0.01, 0.25
FEWEST_SEEDS = 3


# --- Student's t ---


def betainc(a: float, b: float, x: float, y: float | None = None) -> float:
    """The regularised incomplete beta function I_x(a, b), for a, b > 0 and x in [0, 1].

    Continued fraction DLMF 8.17.22 by the modified Lentz method (Press et al., Numerical Recipes 6.4), on the
    side of the mean on which it converges fast. `y` is 1 - x where the caller knows it without cancellation.
    """
    y = 1.0 - x if y is None else y
    if x <= 0.0 or y <= 0.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - betainc(b, a, y, x)
    log_x, log_y = (math.log(u) if u < 0.5 else math.log1p(-v) for u, v in ((x, y), (y, x)))
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * log_x + b * log_y) / a
    smallest = 1e-300  # stands for a denominator of zero
    c, d = 1.0, 1.0 / ((1.0 - (a + b) * x / (a + 1.0)) or smallest)
    value = d
    for m in range(1, 100_000):
        for step in (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
                     -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))):
            d = 1.0 / ((1.0 + step * d) or smallest)
            c = (1.0 + step / c) or smallest
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            return front * value
    raise ArithmeticError(f"betainc({a}, {b}, {x}): no convergence")


def t_sf(t: float, df: float) -> float:
    """P(T > t) for Student's t with `df` > 0 degrees of freedom,
    whole or not; inf is the normal distribution.

    I_x(df / 2, 1 / 2) / 2 at x = df / (df + t^2), Abramowitz and Stegun
    26.7.1. Far tails keep their relative accuracy.
    """
    if math.isnan(t) or not df > 0:
        raise ValueError(f"t_sf({t}, {df}): needs a number and more than 0 degrees of freedom")
    if t < 0:
        return 1.0 - t_sf(-t, df)
    if math.isinf(t):
        return 0.0
    if math.isinf(df):
        return math.erfc(t / math.sqrt(2.0)) / 2.0
    if t * t > df:  # either way the small one of x and 1 - x is exact
        ratio = df / t / t
        return betainc(df / 2, 0.5, ratio / (1 + ratio), 1 / (1 + ratio)) / 2
    ratio = t * t / df
    return betainc(df / 2, 0.5, 1 / (1 + ratio), ratio / (1 + ratio)) / 2


def t_cdf(t: float, df: float) -> float:
    """P(T <= t); see `t_sf`."""
    return t_sf(-t, df)


@lru_cache(maxsize=1024)
def t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p, by bisection to neighbouring floats.

    Raises:
        ValueError: p is not inside (0, 1).
    """
    if not 0.0 < p < 1.0:
        raise ValueError(f"t_quantile({p}, {df}): p is a number between 0 and 1")
    if p == 0.5:
        return 0.0
    tail, low, high = min(p, 1.0 - p), 0.0, 1.0
    while t_sf(high, df) > tail:
        low, high = high, 2.0 * high
    while low < (middle := (low + high) / 2.0) < high:
        low, high = (middle, high) if t_sf(middle, df) > tail else (low, middle)
    return math.copysign(high, p - 0.5)


# --- Comparisons ---


def negligible(interval: tuple[float, float]) -> bool:
    """Whether a difference in BPB is too small to matter wherever it lies in its interval."""
    low, high = interval
    return max(-low, high) <= NO_EFFECT


def word(interval: tuple[float, float]) -> str:
    """The house's verdict on a difference, arm minus base, by its 95 % interval."""
    low, high = interval
    if high < 0:
        return "better"
    if low > 0:
        return "worse"
    return "no effect" if negligible(interval) else "undecided"


@dataclass(frozen=True)
class Comparison:
    """How an arm differs from its base, in BPB: difference = arm - base, negative is better.

    A standard error that the data do not say (a single value) is infinite: t = 0, p = 0.5, the interval is
    everything. One of zero decides by the sign of the difference: p = 0 or 1, and 0.5 for a difference of
    zero.
    """

    test: str  # "paired" or "Welch"
    count: int  # pairs, or values of both arms together
    difference: float
    error: float  # standard error of the difference
    df: float

    def t(self, margin: float = 0.0) -> float:
        """Student's t of the gain (base - arm) over `margin`, BPB."""
        over = -self.difference - margin
        if self.error == 0.0:
            return math.copysign(math.inf, over) if over else 0.0
        return over / self.error

    def p(self, margin: float = 0.0) -> float:
        """One-sided p of so large a gain where the true one is at most `margin`, BPB."""
        return 0.5 if math.isinf(self.error) else t_sf(self.t(margin), self.df)

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval."""
        if math.isinf(self.error):
            return math.inf
        return t_quantile((1.0 + CONFIDENCE) / 2.0, self.df) * self.error

    @property
    def interval(self) -> tuple[float, float]:
        return self.difference - self.half, self.difference + self.half

    @property
    def word(self) -> str:
        return word(self.interval)

    def __str__(self) -> str:
        low, high = self.interval
        span = f" ({low:+.4f} to {high:+.4f})" if math.isfinite(low) else ""
        return f"{self.word}: {self.difference:+.4f}{span}"


def paired(a: dict[int, float], b: dict[int, float]) -> Comparison:
    """The paired t of arm `a` against base `b`, {seed: BPB} each, over the seeds that both have.

    Raises:
        Misuse: they share no seed.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise Misuse(f"no seed in common: {', '.join(map(str, a))} against {', '.join(map(str, b))}")
    differences = [a[seed] - b[seed] for seed in seeds]
    n = len(seeds)
    error = statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.inf
    return Comparison("paired", n, statistics.mean(differences), error, n - 1)


def welch(a: Iterable[float], b: Iterable[float]) -> Comparison:
    """Welch's t of arm `a` against base `b`, BPB each, their variances unlike;
    degrees of freedom by Welch and Satterthwaite.

    Raises:
        Misuse: one of them is empty.
    """
    a, b = list(a), list(b)
    if not a or not b:
        raise Misuse("Welch's t needs a value in each group")
    count, difference = len(a) + len(b), statistics.mean(a) - statistics.mean(b)
    if min(len(a), len(b)) < 2:
        return Comparison("Welch", count, difference, math.inf, 0)
    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    total = sum(parts)
    if total == 0.0:
        return Comparison("Welch", count, difference, 0.0, count - 2)
    # Shares instead of squared variances, which could underflow.
    df = 1.0 / sum((part / total) ** 2 / (len(values) - 1) for part, values in zip(parts, (a, b)))
    return Comparison("Welch", count, difference, math.sqrt(total), df)


def compare(a: dict[int, float], b: dict[int, float]) -> Comparison:
    """What the house goes by: paired over the seeds that both have (one alone: a difference, no interval),
    Welch's t of all where none is shared.
    """
    shared = len(a.keys() & b.keys())
    alone = shared == 1 and min(len(a), len(b)) == 1
    return paired(a, b) if shared > 1 or alone else welch(a.values(), b.values())


def verdict(differences: list[float]) -> tuple[float, float, str]:
    """(mean, half width of the 95 % interval, verdict) of paired differences in BPB, arm minus base."""
    found = paired(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))
    return found.difference, found.half, found.word


def spread(arms: Iterable[Iterable[float]]) -> float:
    """Pooled standard deviation of arms, each weighted by its
    degrees of freedom; 0 where no arm has two values.
    """
    arms = [values for values in map(list, arms) if len(values) > 1]
    freedom = sum(len(values) - 1 for values in arms)
    return math.sqrt(sum(statistics.variance(v) * (len(v) - 1) for v in arms) / freedom) if arms else 0.0


@dataclass(frozen=True)
class Reading:
    """The competition's rule in one unit: gain in nats, one-sided p of a true gain of at most 0.005, verdict.
    """

    gain: float
    p: float
    word: str  # yes, mean only or no


def reading(found: Comparison, units_per_byte: float = 1.0) -> Reading:
    """The rule of 0.005 nats a unit: a byte, or a token where there are `units_per_byte` tokens to a byte."""
    bpb_a_nat = units_per_byte / math.log(2)
    gain, p = -found.difference / bpb_a_nat, found.p(RECORD_NATS * bpb_a_nat)
    if p < RECORD_P:
        return Reading(gain, p, "yes")
    return Reading(gain, p, "mean only" if gain >= RECORD_NATS and found.p() < RECORD_P else "no")


# --- Runs and groups ---

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|nan|inf"
VALUE = re.compile(rf"(?:(\d+):)?({NUMBER})")
EXACT = re.compile(rf"^(\S+)_exact val_loss:({NUMBER}) val_bpb:({NUMBER})", re.M)
COUNTS = re.compile(r"^(\S+) val_loss:\S+ val_bpb:\S+ (?:.* )?targets:(\d+) bytes:(\d+)", re.M)
RULER = f"\n{'=' * 100}\n"
# A source that is a folder: what is looked for in it, in this order.
PATTERNS = ("metrics.json", "seed*/metrics.json", "seed*.json", "log.txt", "seed*/log.txt", "*.log",
            "*seed*.txt")
# What may differ between the seeds of one configuration, beside paths.
OF_A_RUN = {"LOGFILE", "IS_MAIN_PROCESS", *OF_THE_RUN}
PATHS = ("_PATH", "_DIR", "_FILE", "_FILES")


@dataclass(frozen=True)
class Run:
    """One score of one seed, and what is known of the run behind it."""

    where: str
    seed: int | None
    bpb: float
    evaluation: str = ""
    metrics: dict = field(default_factory=dict, repr=False)

    @property
    def entry(self) -> dict:
        """The evaluation that counts: val_loss (nats a token),
        val_bpb, targets and bytes where they are known.
        """
        return self.metrics.get("evals", {}).get(self.evaluation, {})

    @property
    def tokens_per_byte(self) -> float | None:
        """From the counts, or from nats a token against bits a byte."""
        if self.entry.get("bytes"):
            return self.entry["targets"] / self.entry["bytes"]
        return self.bpb * math.log(2) / self.entry["val_loss"] if self.entry.get("val_loss") else None

    def identity(self) -> dict[str, dict[str, str]]:
        """{rule: {what: value}} of all that the seeds of one configuration share, as far as it is known."""
        data = {"sha256": self.metrics.get("dataset", {}).get("sha256"), **{
            key: self.entry.get(key) for key in ("bytes", "targets")}}
        known = {"script": {"sha256": self.metrics.get("script_sha256")}, "data": data,
                 "evaluation": {"name": self.evaluation}, "settings": self.settings()}
        return {rule: {key: str(value) for key, value in values.items() if value is not None}
                for rule, values in known.items()}

    def settings(self) -> dict:
        return {key: value for key, value in self.metrics.get("settings", {}).items()
                if key.upper() not in OF_A_RUN and not key.upper().endswith(PATHS)}


@dataclass(frozen=True)
class Group:
    name: str
    runs: list[Run]

    @property
    def values(self) -> list[float]:
        return [run.bpb for run in self.runs]

    @property
    def scores(self) -> dict:
        """{seed: BPB}; runs without a seed are kept apart by numbers that
        no seed has, so that nothing pairs with them.
        """
        return {(self.name, i) if run.seed is None else run.seed: run.bpb for i, run in enumerate(self.runs)}

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def sd(self) -> float | None:
        return statistics.stdev(self.values) if len(self.runs) > 1 else None

    @property
    def tokens_per_byte(self) -> float | None:
        return self.runs[0].tokens_per_byte


def seed_in(path: Path) -> int | None:
    """The seed that a file or its folder is named for."""
    found = re.search(r"seed[_-]?(\d+)", path.name) or re.search(r"seed[_-]?(\d+)", path.parent.name)
    return int(found[1]) if found else None


def read_log(path: Path) -> dict:
    """A log in the field's form as far as it goes, in the shape of a metrics.json.

    Raises:
        Misuse: it has no exact result.
    """
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise Misuse(f"{path}: {error.strerror}") from None
    # A log begins with its own source, whose lines can look like output: what counts stands after the ruler.
    source, ruler, output = text.partition(RULER)
    if not ruler:
        source, output = "", text

    def last(pattern: str) -> str | None:
        return (re.findall(pattern, output, re.M) or [None])[-1]

    exact = EXACT.findall(output)
    if not exact:
        raise Misuse(
            f"{path}: no line `final_..._exact val_loss:.. val_bpb:..`: not a log, or not a finished run's"
        )
    evals = {name: {"val_loss": float(loss), "val_bpb": float(bpb)} for name, loss, bpb in exact}
    for name, targets, count in COUNTS.findall(output):
        if name in evals:
            evals[name] |= {"targets": int(targets), "bytes": int(count)}
    listed = re.search(r"^Hyperparameters:\n((?:[ \t]+\w+: .*\n)+)", output, re.M)
    try:
        settings = json.loads(last(r"^settings (\{.*\})$") or "{}")
        dataset = json.loads(last(r"^data (\{.*\})$") or "{}")
    except ValueError as error:
        raise Misuse(f"{path}: line `settings` or `data` is not JSON: {error}") from None
    if listed and not settings:
        settings = dict(re.findall(r"(\w+): (.*)", listed[1]))
    seed = settings.get("SEED", settings.get("seed", last(r"\bseed: ?(\d+)")))
    if seed is not None and not re.fullmatch(r"\d+", str(seed)):
        raise Misuse(f"{path}: seed is {seed!r}: a whole number is needed")
    printed = hashlib.sha256(f"{source}\n".encode()).hexdigest() if source else None
    return {"headline": last(r"^headline: (\S+)") or exact[-1][0], "evals": evals, "settings": settings,
            "dataset": dataset, "seed": seed_in(path) if seed is None else int(seed),
            "script_sha256": last(r"^script_sha256: (\w+)") or printed}


def read_run(path: Path, evaluation: str | None = None) -> Run:
    """One run from its metrics.json or its log, by its headline or by another of its evaluations.

    Raises:
        Misuse: the file is neither, or has no such evaluation.
    """
    metrics = read_json(path) if path.suffix == ".json" else read_log(path)
    for key in ("headline", "evals", "seed"):
        if not isinstance(metrics, dict) or key not in metrics:
            raise Misuse(f"{path}: no `{key}`: not a run's metrics.json")
    evals, seed = metrics["evals"], metrics["seed"]
    if not isinstance(evals, dict) or not all(isinstance(entry, dict) for entry in evals.values()):
        raise Misuse(f"{path}: evals: an object of objects is needed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise Misuse(f"{path}: seed is {seed!r}: a whole number is needed")
    for key in ("settings", "dataset"):
        if not isinstance(metrics.get(key, {}), dict):
            raise Misuse(f"{path}: {key}: an object is needed")
    if not isinstance(metrics.get("dataset", {}).get("bytes", {}), dict):
        raise Misuse(f"{path}: dataset.bytes: an object is needed")
    name = evaluation or metrics["headline"]
    if name not in metrics["evals"]:
        raise Misuse(f"{path}: no evaluation {name}: there are {', '.join(metrics['evals'])}")
    return scored(str(path), metrics["seed"], metrics["evals"][name].get("val_bpb"), name, metrics)


def scored(where: str, seed: int | None, bpb, evaluation: str = "", metrics: dict | None = None) -> Run:
    if not isinstance(bpb, (int, float)) or not (math.isfinite(bpb) and bpb > 0):
        raise Misuse(f"{where}: val_bpb is {bpb}: a finite number above 0 is needed")
    return Run(where, seed, float(bpb), evaluation, metrics or {})


def exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except OSError:  # a list of numbers can be longer than a name may be
        return False


def find_files(source: str) -> list[Path]:
    """The metrics.json files or logs of a source that is a path or a record's name."""
    path = Path(source)
    if not exists(source):
        try:
            path = find_script(source).parent
        except Misuse:
            raise Misuse(f"{source}: no file, folder or record of this name, and no number") from None
    if path.is_file():
        return [path]
    for pattern in PATTERNS:
        if files := sorted(path.glob(pattern)):
            return files
    raise Misuse(f"{source}: none of {', '.join(PATTERNS)} in this folder")


def read_group(text: str, evaluation: str | None = None) -> Group:
    """A group from `NAME=SOURCE,SOURCE...` or `SOURCE,SOURCE...`; runs by seed.

    Raises:
        Misuse: a source that is nothing.
    """
    name, _, rest = text.partition("=") if re.match("[^/,=]+=", text) and not exists(text) else ("", "", text)
    sources = [rest] if exists(rest) else [part.strip() for part in rest.split(",")]
    runs: list[Run] = []
    for source in sources:
        if not source:
            raise Misuse(f"{text!r}: an empty source; a group is NAME=SOURCE,SOURCE...")
        if number := VALUE.fullmatch(source):
            runs.append(scored(source, int(number[1]) if number[1] else None, float(number[2])))
        else:
            runs += [read_run(path, evaluation) for path in find_files(source)]
    if not name:
        folder = Path(runs[0].where).resolve().parent
        plain = len(runs) > 1 and seed_in(Path(folder.name)) is not None
        name = (folder.parent if plain else folder).name if runs[0].metrics else rest
    return Group(name, sorted(runs, key=lambda run: (run.seed is None, run.seed)))


def check_group(group: Group) -> list[Finding]:
    """What keeps a group's runs from being seeds of one configuration (FAIL), and what weakens them (WARN).
    """
    found = []

    def add(rule: str, level: str, text: str) -> None:
        found.append(Finding(rule, level, text, group.name))

    first = group.runs[0]
    for run in group.runs[1:]:
        for rule, values in run.identity().items():
            mine = first.identity()[rule]
            if rule != "settings":  # there a name that is missing was unset, elsewhere it is not known
                shared = mine.keys() & values.keys()
                mine, values = ({key: side[key] for key in shared} for side in (mine, values))
            if mine and values and mine != values:
                add(rule, "FAIL", f"{contrast(mine, values)} ({first.where}, {run.where})")
    seeds = [run.seed for run in group.runs if run.seed is not None]
    for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        add("seeds", "FAIL", f"seed {seed} is there {seeds.count(seed)} times")
    for run in group.runs:
        named = seed_in(Path(run.where)) if run.metrics else None
        if named is not None and named != run.seed:
            add("seeds", "FAIL", f"{run.where} ran seed {run.seed}")
        if run.metrics.get("broken_budgets"):
            add("budgets", "WARN", f"{run.where} broke {run.metrics['broken_budgets']}")
    folders = {Path(run.where).parent for run in group.runs}
    for folder in {folder.parent for folder in folders if seed_in(Path(folder.name)) is not None}:
        if mark := stale_mark(folder, [run.metrics for run in group.runs]):
            add("script", "WARN", mark.strip("*"))
    if len(group.runs) < FEWEST_SEEDS:
        add("seeds", "WARN", f"{len(group.runs)} of the {FEWEST_SEEDS} that a claim needs")
    return found


def check_pair(group: Group, base: Group) -> list[Finding]:
    """What keeps two groups from being compared (FAIL), and what a reader has to know (WARN)."""
    mine, theirs = (arm.runs[0].identity()["data"] for arm in (group, base))
    # Two texts that VAL_BYTES cuts to one size are told apart by what they were before.
    whole, other = ({"bytes": entry.get("bytes", {}).get("val"), "documents": entry.get("val_documents")}
                    for entry in (arm.runs[0].metrics.get("dataset", {}) for arm in (group, base)))
    for key, value in whole.items():
        if None not in (value, other[key]) and value != other[key]:
            text = f"its validation text has {value} {key}, the base's {other[key]}: not the same text"
            return [Finding("data", "FAIL", text, group.name)]
    if "bytes" in mine and "bytes" in theirs and mine["bytes"] != theirs["bytes"]:
        text = f"scored on {mine['bytes']} bytes, the base on {theirs['bytes']}: not the same validation text"
        return [Finding("data", "FAIL", text, group.name)]
    found = []
    passes = [arm.runs[0].metrics.get("headline") for arm in (group, base)]
    if None not in passes and len({*map(without_bits, passes)}) > 1:
        text = f"its score is `{passes[0]}`, the base's `{passes[1]}`: other ways of scoring"
        found.append(Finding("scoring", "WARN", text, group.name))
    if "sha256" in mine and "sha256" in theirs and mine["sha256"] != theirs["sha256"]:
        text = (
            f"data {mine['sha256'][:8]}, the base {theirs['sha256'][:8]}: other training or validation text, "
            "or tokenizer"
        )
        found.append(Finding("data", "WARN", text, group.name))
    return found


def without_bits(scoring: str) -> str:
    """The name of a pass without the width of the artifact's weights: `final_int_sliding`."""
    return re.sub(r"^final_int\d+", "final_int", scoring)


def contrast(a: dict[str, str], b: dict[str, str], most: int = 8) -> str:
    """Names and both values of what differs, the first few of them."""
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    words = [f"{name} {short(a.get(name))} against {short(b.get(name))}" for name in names[:most]]
    return ", ".join(words) + (f" and {len(names) - most} more" if len(names) > most else "")


def short(value: str | None) -> str:
    """A value on a line; of a hash the first eight digits."""
    if value is None:
        return "unset"
    return value[:8] if re.fullmatch(r"[0-9a-f]{40,}", value) else value or "empty"


def present_script(folder: Path) -> str | None:
    """sha256 of a record's script as it is now."""
    script = folder / "train_gpt.py"
    return hashlib.sha256(script.read_bytes()).hexdigest() if script.is_file() else None


def holds(folder: Path, sha256: str | None, result: str) -> bool:
    """Whether a number that the script of this sha256 made is one of the record's script as it is now."""
    path, now = folder / "submission.json", present_script(folder)
    if now is None or sha256 is None:
        return False
    return sha256 == now or carried(read_json(path) if path.is_file() else {}, sha256, now, result)


def script_line(folder: Path, results: dict[str, str | None]) -> str:
    """A line for a table of a record: which script made its numbers, and do they hold for the present one.

    results: {path below the record's folder: sha256 of the script that made it, or None where none is named}.
    """
    now = present_script(folder)
    named = {name: sha256 for name, sha256 in results.items() if sha256 is not None}
    old = {sha256 for name, sha256 in named.items() if not holds(folder, sha256, name)}
    unnamed = "no script named" if len(named) < len(results) else ""
    if now is None or not results:
        return ""
    if old:
        mark = f"stale: measured with {counted(old)}, this one is `{now[:8]}`"
        return f"*{mark}{f'; {unnamed}' if unnamed else ''}*"
    if unnamed:
        return f"*{unnamed}*"
    line = counted({*named.values()}).capitalize()
    return f"{line}, carried to `{now[:8]}`." if {*named.values()} - {now} else f"{line}."


def counted(hashes: Iterable[str]) -> str:
    shown = ", ".join(f"`{sha256[:8]}`" for sha256 in sorted(hashes))
    return f"{'scripts' if ',' in shown else 'script'} {shown}"


def stale_mark(folder: Path, runs: Iterable[dict]) -> str:
    """A line where the seeds (metrics) of a record do not hold for the script in `folder`, else nothing."""
    named = {f"seed{run.get('seed')}": run.get("script_sha256", "unknown") for run in runs}
    line = script_line(folder, named)
    return line if line.startswith("*stale") else ""


def as_carried(folder: Path, run: dict) -> dict:
    """The metrics of a seed with the size of the script to which its numbers were carried."""
    script = folder / "train_gpt.py"
    other = script.is_file() and run.get("script_sha256") != present_script(folder)
    if not other or not holds(folder, run.get("script_sha256"), f"seed{run.get('seed')}"):
        return run
    code = script.stat().st_size
    return {**run, "bytes_code": code, "bytes_total": code + run["bytes_model"]}


# --- Report ---


def finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def decimal(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else format(value, form)


def p_value(p: float) -> str:
    return f"{p:.1e}" if p < 0.001 else f"{p:.3f}"


def summary(group: Group) -> dict:
    return {"name": group.name, "evaluation": group.runs[0].evaluation, "values": group.values,
            "seeds": [run.seed for run in group.runs], "mean": group.mean, "sd": group.sd,
            "tokens_per_byte": group.tokens_per_byte}


def of_tests(found: Comparison) -> dict:
    low, high = found.interval
    return {**asdict(found), "error": finite(found.error), "t": finite(found.t()), "p_better": found.p(),
            "low": finite(low), "high": finite(high), "verdict": found.word}


def analyse(base: Group, groups: list[Group], tokens_per_byte: float | None = None):
    """(everything that `--json` prints but the findings, list of findings) of groups against their base.

    `tokens_per_byte` stands in for what plain numbers do not say.
    """
    findings = check_group(base)

    def warn(rule: str, text: str, where: str) -> None:
        findings.append(Finding(rule, "WARN", text, where))

    sound = not any(finding.level == "FAIL" for finding in findings)
    rows = []
    for group in groups:
        mine = check_group(group) + check_pair(group, base)
        findings += mine
        row = summary(group)
        rows.append(row)
        if not sound or any(finding.level == "FAIL" for finding in mine):
            continue
        house, separate = compare(group.scores, base.scores), welch(group.values, base.values)
        if house.error == 0.0:
            warn("variance", "all differences are equal: the same runs, or rounded numbers", group.name)
        row["house"], row["welch"] = of_tests(house), of_tests(separate)
        contest = {"nats per byte": asdict(reading(separate)), "frontier": separate.p() < FRONTIER_P}
        row["competition"] = contest
        ratios = [arm.tokens_per_byte or tokens_per_byte for arm in (base, group)]
        if all(ratios) and math.isclose(*ratios, rel_tol=1e-4):  # logs have eight digits
            contest["nats per token"] = asdict(reading(separate, ratios[0]))
        elif all(ratios):
            text = f"{ratios[1]:.4f} a byte, the base {ratios[0]:.4f}: nats per token are not comparable"
            warn("tokens", text, group.name)
        old, new = base.runs[0].settings(), group.runs[0].settings()
        if old and new:
            pairs = {key: [old.get(key), new.get(key)] for key in {**old, **new}}
            row["settings"] = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    pooled = spread(arm.values for arm in (base, *groups))
    return {"base": summary(base), "groups": rows, "spread": pooled}, findings


def tables(result: dict) -> str:
    """The tables of what `analyse` found, in Markdown."""
    rows, contest, lines = [], [], []
    for row in (result["base"], *result["groups"]):
        seeds = ", ".join("?" if seed is None else str(seed) for seed in row["seeds"])
        cells = [row["name"], row["evaluation"], seeds, f"{row['mean']:.4f}", decimal(row["sd"], ".4f")]
        house = row.get("house")
        if house:
            span = f"{house['low']:+.4f} to {house['high']:+.4f}" if house["low"] is not None else ""
            test = f"{house['test']}, {decimal(house['t'], '.2f')} ({house['df']:.3g})"
            cells += [f"{house['difference']:+.4f}", span, test, p_value(house["p_better"]), house["verdict"]]
            rules = row["competition"]
            line = [row["name"], f"{-row['welch']['difference']:+.4f}"]
            for unit in ("nats per byte", "nats per token"):
                if found := rules.get(unit):
                    line += [f"{found['gain']:+.5f}", p_value(found["p"]), found["word"]]
                else:
                    line += ["", "", "unknown"]
            contest.append([*line, p_value(row["welch"]["p_better"]), "yes" if rules["frontier"] else "no"])
        else:
            cells += ["", "", "", "", "base" if row is result["base"] else "not compared"]
        rows.append(cells)
        if row.get("settings"):
            old, new = ({key: str(pair[i]) for key, pair in row["settings"].items() if pair[i] is not None}
                        for i in (0, 1))
            lines.append(f"Settings, base against {row['name']}: {contrast(old, new)}.")
    text = markdown_table(["group", "evaluation", "seeds", "BPB", "sd", "difference", "95 % interval",
                           "test, t (df)", "p one-sided", "verdict"], rows)
    text += (
        f"\n\nSpread (pooled sd) {result['spread']:.4f} BPB. t and p are of the gain, base minus arm: p of "
        "one "
        "so large if there were none."
    )
    if contest:
        text += f"\n\nThe competition, {RECORD_NATS} nats at p < {RECORD_P}, Welch's t:\n\n" + markdown_table(
            ["group", "gain in BPB", "nats a byte", "p", "record", "nats a token", "p", "record",
             "p of any gain", f"frontier (p < {FRONTIER_P})"], contest)
    return "\n\n".join([text, *lines])


def plot(result: dict, path: Path) -> None:
    """The differences of `analyse` and their 95 % intervals as PNG;
    the band is where the verdict is *no effect*.

    Raises:
        Misuse: no group was compared.
    """
    rows = [row for row in result["groups"] if row.get("house")]
    if not rows:
        raise Misuse(f"{path}: no group to draw was compared")
    from matplotlib.figure import Figure  # here: no table needs it
    figure = Figure(figsize=(8, 1.2 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-NO_EFFECT, NO_EFFECT, color="#EEEEEE")
    axes.axvline(0, color="#555555", linewidth=0.8)
    colours = {"better": "#0072B2", "worse": "#D55E00", "no effect": "#222222", "undecided": "#888888"}
    for at, row in enumerate(rows):
        house = row["house"]
        half = None if house["low"] is None else [house["difference"] - house["low"]]
        axes.errorbar(
            [house["difference"]], [at], xerr=half, fmt="o", capsize=4, color=colours[house["verdict"]]
        )
    axes.set_yticks(range(len(rows)), [f"{row['name']}: {row['house']['verdict']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"BPB against {result['base']['name']}; lower is better")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="NAME=SOURCE,SOURCE... or only sources")
    parser.add_argument("--base", required=True, metavar="GROUP", help="what the others are compared with")
    parser.add_argument("--eval", metavar="NAME", help="another evaluation of the runs than their headline")
    parser.add_argument("--tokens-per-byte", type=float, metavar="RATIO",
                        help="for plain numbers: the reading per token needs it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the differences here, a PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    ratio = options.tokens_per_byte
    if ratio is not None and not (math.isfinite(ratio) and ratio > 0):
        raise Misuse(f"--tokens-per-byte {ratio}: a finite number above 0 is needed")
    base = read_group(options.base, options.eval)
    groups = [read_group(text, options.eval) for text in options.groups]
    # A wildcard over the arms of a folder meets the base too.
    groups = [group for group in groups if [run.where for run in group.runs if run.metrics]
              != [run.where for run in base.runs] or not base.runs[0].metrics]
    names = [group.name for group in (base, *groups)]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise Misuse(
            f"{doubled[0]}: the name of {names.count(doubled[0])} groups; name one by NAME=SOURCE,..."
        )
    result, findings = analyse(base, groups, ratio)
    if options.plot:
        plot(result, options.plot)
    if options.json:
        print(json.dumps({**result, "findings": [asdict(finding) for finding in findings]}, indent=1))
        return FINDINGS if any(finding.level == "FAIL" for finding in findings) else FINE
    print(tables(result))
    if findings:
        print()
        return report(findings, False)
    return FINE


if __name__ == "__main__":
    command(main)
