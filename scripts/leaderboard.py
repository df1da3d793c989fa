"""Every record in one table, and plots beside it: rewrites README.md between its markers and records/leaderboard/*.png.

    python scripts/leaderboard.py            writes what has changed
    python scripts/leaderboard.py --check    writes nothing; exit code 1 where README or plots disagree with the records' files

The table stands in README.md between `<!-- leaderboard -->` and `<!-- end -->`. It is made from records/*/submission.json and
records/*/seed*/metrics.json, the plots from these and metrics.jsonl; nothing is typed. Records are ranked only against those of the same
setting: data (fingerprint of text and shards), validation bytes, artifact budget, and seconds of training or, without a limit, training tokens.
The verdict is that of scripts/stats.py, seeds paired, against the parent where it was measured in the same setting, otherwise
against the best record before it.

A plot carries the sha256 of its numbers; that is what --check compares, so another matplotlib is no difference. One whose numbers have not
changed is left alone: delete it to have it drawn again. The tool has its own markers, beside those of scripts/tables.py, because a
table of records reads all of them where a table there reads one folder, and because --check then needs nothing but Python.

Exit code 1 too: a record whose seeds are no seeds of one configuration or that broke a budget (it is listed, not
ranked), whose submission.json says another score, or which is frozen and stale. 2: a file is not what it should be.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import re
import statistics
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import stats
from family import (
    ROOT,
    Finding,
    Misuse,
    command,
    markdown_table,
    read_json,
    records,
    report,
    write_atomic,
)

BLOCK = re.compile(r"(<!-- leaderboard -->\n).*?(<!-- end -->)", re.S)
PLOTS = Path("records/leaderboard")
# Okabe and Ito's colours, which the colour-blind tell apart, darkest first; marker and dash say the same in black and white.
STYLES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#000000", "^", ":"), ("#009E73", "D", "-."),
          ("#CC79A7", "v", (0, (1, 1))), ("#E69F00", "P", (0, (5, 1))), ("#56B4E9", "X", (0, (3, 1, 1, 1)))]


# --- Records ---


@dataclass(frozen=True)
class Setting:
    """What two records share that may be ranked against each other."""

    data: str  # name, for the reader
    sha256: str
    bytes: int  # of the validation text that the headline is scored on
    budget: int  # bytes of code and artifact, 0 = none
    seconds: float  # of training, 0 = no limit, and then:
    tokens: int  # seen in training

    @property
    def key(self) -> tuple:
        return self.sha256, self.bytes, self.budget, self.seconds, self.tokens

    def __str__(self) -> str:
        limit = f"{self.seconds:g} s of training" if self.seconds else f"{self.tokens:,} training tokens"
        budget = f"at most {self.budget:,} bytes" if self.budget else "no limit of bytes"
        return f"`{self.data}` ({self.sha256[:8]}), {self.bytes:,} validation bytes; {budget}; {limit}"


@dataclass
class Record:
    folder: Path
    submission: dict
    group: stats.Group | None = None
    findings: list[Finding] = field(default_factory=list)
    unranked: str = ""  # why

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def title(self) -> str:
        return self.name.split("_", 1)[-1]

    @property
    def date(self) -> str:
        return self.submission.get("date", self.name.split("_", 1)[0])

    @property
    def parent(self) -> str:
        """Folder of the parent record, `trunk`, or nothing."""
        parent = self.submission.get("parent")
        parts = [part for part in Path(parent or "").parts if part not in ("records", "train_gpt.py", "trunk")]
        return parts[-1] if parts else "trunk" if parent else ""

    @property
    def when(self) -> tuple:
        """By date; of one day, those without a parent first."""
        return self.date, bool(self.parent), self.name

    @property
    def frozen(self) -> bool:
        return bool(self.submission.get("frozen"))

    @cached_property
    def stale(self) -> str:
        return stats.stale_mark(self.folder, [run.metrics for run in self.group.runs])

    @cached_property
    def setting(self) -> Setting:
        run = self.group.runs[0]
        chosen, data = run.metrics["settings"], run.metrics["dataset"]
        seconds = chosen["MAX_WALLCLOCK_SECONDS"]
        tokens = 0 if seconds else chosen["ITERATIONS"] * chosen["TRAIN_BATCH_TOKENS"]
        budget = chosen["ARTIFACT_BUDGET_BYTES"]
        return Setting(data["name"], data["sha256"], run.entry["bytes"], budget, seconds, tokens)

    @property
    def sizes(self) -> dict[str, int]:
        """{run: bytes of code and model}, the code as it is now."""
        runs = {run.where: stats.as_carried(self.folder, run.metrics) for run in self.group.runs}
        return {where: metrics["bytes_total"] for where, metrics in runs.items()}

    @property
    def bytes_total(self) -> int:
        return max(self.sizes.values())

    @property
    def hardware(self) -> str:
        ranks = self.group.runs[0].metrics.get("world_size", 1)
        devices = ", ".join(sorted({run.metrics["device"] for run in self.group.runs}))
        return f"{ranks} x {devices}" if ranks > 1 else devices


def read_record(folder: Path) -> Record:
    """A record and what is wrong with it.

    Raises:
        Misuse: a file of it cannot be read or lacks a number.
    """
    path = folder / "submission.json"
    record = Record(folder, read_json(path) if path.exists() else {})
    files = sorted(folder.glob("seed*/metrics.json"))
    if not path.exists() or not files:
        record.unranked = "no seed*/metrics.json" if path.exists() else "no submission.json"
        record.findings.append(Finding("files", "WARN", record.unranked, record.name))
        return record
    runs = [stats.read_run(file) for file in files]
    if strange := [run.where for run in runs if run.seed is None]:
        raise Misuse(f"{strange[0]}: seed is missing: a whole number is needed")
    runs.sort(key=lambda run: run.seed)
    record.group = stats.Group(record.name, runs)
    record.findings = stats.check_group(record.group)
    if failed := [found.rule for found in record.findings if found.level == "FAIL"]:
        record.unranked = f"its runs differ in {', '.join(dict.fromkeys(failed))}"
        return record
    try:
        _ = record.setting, record.bytes_total, record.hardware, runs[0].metrics["params"]
    except KeyError as error:
        raise Misuse(f"{folder}/seed*/metrics.json: no {error}") from None
    most = record.setting.budget
    over = [f"{where}: {size:,} bytes, the budget is {most:,}"
            for where, size in record.sizes.items() if 0 < most < size]
    broken = [f"{run.where}: {line}" for run in runs for line in run.metrics.get("broken_budgets", [])]
    if over or broken:
        record.unranked = "a budget is broken"
        record.findings += [Finding("budgets", "FAIL", text, record.name) for text in over + broken]
    told = record.submission.get("val_bpb")
    if not isinstance(told, float) or not math.isclose(told, record.group.mean, abs_tol=1e-9):
        text = f"val_bpb is {told}, the mean of the seeds {record.group.mean:.8f}"
        record.findings.append(Finding("score", "FAIL", text, f"{record.name}/submission.json"))
    if record.frozen and record.stale:
        record.findings.append(Finding("script", "FAIL", "frozen, and not the script of its seeds", record.name))
    return record


def ranked(found: list[Record]) -> list[list[Record]]:
    """Records by setting, each setting from the best score to the worst; settings by data, size and budget."""
    groups: dict[tuple, list[Record]] = {}
    for record in found:
        if not record.unranked:
            groups.setdefault(record.setting.key, []).append(record)
    ordered = [sorted(group, key=lambda record: (record.group.mean, record.when)) for group in groups.values()]
    return sorted(ordered, key=lambda group: (group[0].setting.data, group[0].setting.key))


def compared(record: Record, group: list[Record]) -> tuple[Record, stats.Comparison] | None:
    """The record of the same setting that this one is held against, and how it differs from it."""
    family = [other for other in group if other is not record and record.parent in (other.name, other.title)]
    before = [other for other in group if other.when < record.when]
    if not family and not before:
        return None
    base = family[0] if family else min(before, key=lambda other: other.group.mean)
    return base, stats.compare(record.group.scores, base.group.scores)


# --- Table ---


def verdict(record: Record, group: list[Record]) -> str:
    found = compared(record, group)
    if not found:
        return "first of its setting"
    base, comparison = found
    low, high = comparison.interval
    word = comparison.word + (" than " if comparison.word in ("better", "worse") else " against ") + base.title
    span = f" ({low:+.4f} to {high:+.4f})" if math.isfinite(low) else ""
    return f"{word}: {comparison.difference:+.4f}{span}"


def table(group: list[Record]) -> str:
    """One setting: a heading, a row a record, a line for each that is stale."""
    rows = []
    for i, record in enumerate(group, 1):
        marks = [word for word, holds in (("stale", record.stale), ("frozen", record.frozen)) if holds]
        deviation = "" if record.group.sd is None else f" +- {record.group.sd:.4f}"
        first = record.group.runs[0]
        link = f"[{record.title}](records/{record.name}/README.md)"
        rows.append([i, link + "".join(f" *{mark}*" for mark in marks), f"**{record.group.mean:.4f}**{deviation}",
                     f"`{first.evaluation}`", f"{record.bytes_total:,}", f"{first.metrics['params']:,}",
                     verdict(record, group), record.parent or "none", record.hardware, record.date])
    header = ["rank", "record", "BPB", "evaluation", "bytes", "parameters", "verdict", "parent", "hardware", "date"]
    stale = [f"{record.title} is {record.stale}." for record in group if record.stale]
    return "\n\n".join([f"Data {group[0].setting}:", markdown_table(header, rows), *stale])


NOTE = ("BPB: mean +- standard deviation of the seeds, lower is better. Bytes: code and artifact, the largest of the "
        "seeds. Verdict: difference in BPB with its 95 % interval, seeds paired, against the parent where it was measured "
        "in the same setting, otherwise against the best record before it.")


def block(found: list[Record], plots: dict[str, dict]) -> str:
    """What stands between the markers."""
    groups = ranked(found)
    parts = [table(group) for group in groups] + ([NOTE] if groups else ["No record has been measured."])
    if left := [f"{record.title} ({record.unranked})" for record in found if record.unranked]:
        parts.append(f"Not ranked: {'; '.join(left)}.")
    return "\n\n".join([*parts, *(f"![{CAPTIONS[name]}]({PLOTS}/{name}.png)" for name in plots)])


# --- Plots: from numbers that JSON holds, so that their hash says whether a plot is up to date ---

CAPTIONS = {
    "bytes": "bits per byte against bytes of code and artifact",
    "training": "training loss against steps and against seconds",
    "classes": "bits per byte by class of byte",
}


def read_curve(path: Path) -> dict[str, list]:
    """A metrics.jsonl -> {"train": [[step, seconds, loss]], "val": [[step, loss]]}, losses in nats per token."""
    curve: dict[str, list] = {"train": [], "val": []}
    for i, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            if "train_loss" in entry:
                curve["train"].append([entry["step"], entry["train_seconds"], entry["train_loss"]])
            elif "val_loss" in entry:
                curve["val"].append([entry["step"], entry["val_loss"]])
        except (ValueError, KeyError) as error:
            raise Misuse(f"{path}:{i}: {'no ' if isinstance(error, KeyError) else 'not JSON: '}{error}") from None
    return curve


def plot_data(found: list[Record]) -> dict[str, dict]:
    """{plot: {"groups": [...]}} of every plot that there are numbers for, records by date."""
    data: dict[str, list] = {name: [] for name in CAPTIONS}
    for group in ranked(found):
        title, setting = str(group[0].setting).replace("`", ""), group[0].setting
        group = sorted(group, key=lambda record: record.when)  # so that a record keeps its colour when another passes it
        data["bytes"].append({"title": title, "budget": setting.budget, "records": [
            {"name": r.title, "bytes": r.bytes_total, "values": r.group.values} for r in group]})
        curves = []
        for record in group:
            paths = {run.seed: Path(run.where).with_name("metrics.jsonl") for run in record.group.runs}
            seeds = {str(seed): read_curve(path) for seed, path in paths.items() if path.exists()}
            if any(curve["train"] for curve in seeds.values()):
                curves.append({"name": record.title, "hardware": record.hardware, "seeds": seeds})
        if curves:
            data["training"].append({"title": title, "records": curves})
        classes = []
        for record in group:
            entries = [run.entry for run in record.group.runs]
            if all(entry.get("bits_by_class") for entry in entries):
                bits = {name: statistics.mean(entry["bits_by_class"].get(name, 0.0) / entry["bytes"] for entry in entries)
                        for name in entries[0]["bits_by_class"]}
                classes.append({"name": record.title, "bits": bits})
        if classes:
            data["classes"].append({"title": title, "records": classes})
    return {name: {"groups": groups} for name, groups in data.items() if groups}


def digest(data: dict) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def stored_digest(path: Path) -> str | None:
    """The hash of the numbers that a plot was drawn from; None without a plot that says so."""
    content = path.read_bytes() if path.exists() else b""
    at = 8  # after the signature of a PNG: chunks of length, type, content and checksum
    while at + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        if kind == b"tEXt" and content[at + 8 :].startswith(b"Description\0"):
            return content[at + 20 : at + 8 + length].decode("latin-1")
        at += length + 12
    return None


def draw(name: str, data: dict) -> bytes:
    """A plot as PNG, equal bytes for equal numbers under one matplotlib; a row of panels a setting."""
    import matplotlib.style  # here, so that --check runs without it
    from matplotlib.figure import Figure
    with matplotlib.style.context("default"):
        panels = 2 if name == "training" else 1
        figure = Figure(figsize=(9, 0.4 + 4.2 * len(data["groups"])), layout="constrained")
        grid = figure.subplots(len(data["groups"]), panels, squeeze=False)
        for row, group in zip(grid, data["groups"]):
            {"bytes": draw_bytes, "training": draw_training, "classes": draw_classes}[name](row, group)
            row[0].set_title(group["title"], loc="left", fontsize=9)
            for axes in row:
                axes.grid(color="#DDDDDD", linewidth=0.6)
                axes.set_axisbelow(True)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, metadata={"Software": None, "Description": digest(data)})
    return buffer.getvalue()


def style(i: int) -> dict:
    colour, marker, dash = STYLES[i % len(STYLES)]
    return {"color": colour, "marker": marker, "linestyle": dash}


def points(i: int) -> dict:
    return style(i) | {"linestyle": "none"}


def draw_bytes(row, group: dict) -> None:
    axes, = row
    for i, record in enumerate(group["records"]):
        values = record["values"]
        mean, error = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
        where = record["bytes"] / 1e6
        axes.errorbar([where], [mean], [error] if error else None, **points(i), markersize=8, capsize=4,
                      label=f"{record['name']}, {len(values)} seeds")
        axes.annotate(f"{record['name']} {mean:.4f}", (where, mean), (9, 7 if i % 2 == 0 else -14), fontsize=9,
                      textcoords="offset points")
    if group["budget"]:
        axes.axvline(group["budget"] / 1e6, color="#555555", linestyle=":", linewidth=1.2,
                     label=f"budget, {group['budget']:,} bytes")
    axes.margins(0.15, 0.2)
    axes.set(xlabel="code and artifact (MB = 1,000,000 bytes)", ylabel="bits per byte (BPB), mean +- sd of seeds")
    axes.legend(fontsize=8)


def draw_training(row, group: dict) -> None:
    """Thin lines are seeds, the marked one their mean over the steps that all of them logged."""
    for axes, unit, at in zip(row, ("steps", "seconds of training"), (0, 1)):
        ends = []
        for i, record in enumerate(group["records"]):
            lines = [curve["train"] for curve in record["seeds"].values() if curve["train"]]
            for line in lines:
                axes.plot([point[at] for point in line], [point[2] for point in line], color=style(i)["color"],
                          linewidth=0.5, alpha=0.6)
            by_step = [{point[0]: point for point in line} for line in lines]
            shared = sorted(set.intersection(*map(set, by_step)))
            if not shared:
                continue
            x, y = ([statistics.mean(line[step][of] for line in by_step) for step in shared] for of in (at, 2))
            axes.plot(x, y, **style(i), markersize=4, linewidth=1.4, label=f"{record['name']}, {record['hardware']}")
            ends.append((y[-1], x[-1], record["name"]))
            for curve in record["seeds"].values() if unit == "steps" else ():
                axes.plot([point[0] for point in curve["val"]], [point[1] for point in curve["val"]], **points(i),
                          markersize=9, markerfacecolor="none")
        axes.set(xscale="log", yscale="log", xlabel=unit)
        low, high = axes.get_ylim()
        axes.set(ylim=(low, high), xlim=(None, axes.get_xlim()[1] * 6))  # room for the names
        axes.xaxis.set_major_formatter("{x:g}")
        height = 0.0  # each name beside its curve's end, as a share of the axis, or above the name below it
        for y, x, name in sorted(ends):
            height = max(height + 0.045, math.log(y / low) / math.log(high / low))
            axes.annotate(name, (x, y), (0.83, height), textcoords="axes fraction", fontsize=8, va="center",
                          arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#777777"})
        axes.set_yticks([tick for tick in (0.5, 0.7, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if low <= tick <= high])
        axes.set_yticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
    row[0].plot([], [], "o", color="#555555", markersize=9, markerfacecolor="none", label="validation, raw weights")
    row[0].legend(handles=row[0].get_lines()[-1:], fontsize=8)
    row[0].set_ylabel("loss of a training batch (nats per token)")
    row[1].legend(fontsize=8)


def draw_classes(row, group: dict) -> None:
    axes, = row
    names = sorted(group["records"][0]["bits"], key=group["records"][0]["bits"].get)
    count = len(group["records"])
    for i, record in enumerate(group["records"]):
        heights = [at + 0.5 * ((count - 1) / 2 - i) / count for at in range(len(names))]
        axes.plot([record["bits"].get(name, math.nan) for name in names], heights, **points(i), markersize=7,
                  label=f"{record['name']}, {sum(record['bits'].values()):.4f} in all")
        for name, height in zip(names, heights):
            value = record["bits"].get(name, 0.0)
            others = [other["bits"].get(name, 0.0) for other in group["records"]]
            if value > 0 and value in (min(others), max(others)):
                right = value == max(others)  # the most is written to the right, the least to the left
                axes.annotate(f"{value:.4f}", (value, height), (7 if right else -7, -3), textcoords="offset points",
                              ha="left" if right else "right", fontsize=8)
    axes.set(xscale="log", xlabel="bits of the class over all validation bytes (BPB; the classes add up to the score)",
             ylabel="class of the target byte", ylim=(-0.6, len(names) - 0.4))
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    axes.legend(fontsize=8)


# --- Command ---


DISAGREES = "does not agree with the records: python scripts/leaderboard.py writes it"


@dataclass(frozen=True)
class Board:
    """What the leaderboard is to be, and which of its files are not yet."""

    records: list[Record]
    plots: dict[str, dict]
    text: str  # of README.md
    changed: list[Path]


def read(root: Path = ROOT) -> Board:
    """The leaderboard of the records below `root`.

    Raises:
        Misuse: a file is not what it should be, or README.md has no place for the table.
    """
    found = [read_record(folder) for folder in records(root)]
    plots = plot_data(found)
    readme = root / "README.md"
    text = readme.read_text() if readme.exists() else ""
    if (count := len(BLOCK.findall(text))) != 1:
        raise Misuse(f"{readme}: {count} times `<!-- leaderboard -->` ... `<!-- end -->`; once is needed")
    new = BLOCK.sub(lambda match: f"{match[1]}{block(found, plots)}\n{match[2]}", text)
    changed = [] if new == text else [readme]
    paths = {name: root / PLOTS / f"{name}.png" for name in CAPTIONS}
    changed += [paths[name] for name, data in plots.items() if stored_digest(paths[name]) != digest(data)]
    changed += [path for name, path in paths.items() if name not in plots and path.exists()]
    return Board(found, plots, new, changed)


def write(board: Board) -> None:
    """Writes the files that are not what they are to be; OSError where one cannot be written."""
    for path in board.changed:
        if path.suffix == ".md":
            write_atomic(path, board.text.encode())
        elif path.stem in board.plots:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, draw(path.stem, board.plots[path.stem]))
        else:
            path.unlink()


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where something would")
    parser.add_argument("--json", action="store_true", help="findings as one JSON document")
    options = parser.parse_args(argv)
    board = read(root)
    findings = [finding for record in board.records for finding in record.findings]
    level, words = ("FAIL", DISAGREES) if options.check else ("PASS", "written")
    if not options.check:
        write(board)
    findings += [Finding("leaderboard", level, words, str(path.relative_to(root))) for path in board.changed]
    if not board.changed:
        words = f"{len(board.records)} records, README.md and {len(board.plots)} plots agree"
        findings.append(Finding("leaderboard", "PASS", words))
    return report(findings, options.json)


if __name__ == "__main__":
    command(main)
