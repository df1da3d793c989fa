"""Every record in one table, and plots beside it: rewrites a part of README.md and records/leaderboard/*.png.

    python scripts/leaderboard.py            writes what has changed
    python scripts/leaderboard.py --check    writes nothing; exit code 1 where README or plots are out of date

The table stands in README.md between `<!-- leaderboard -->` and `<!-- end -->`. It is made from
records/*/submission.json, records/*/seed*/metrics.json and records/texts.json, the plots from these and
metrics.jsonl; nothing is typed.

One table a text: bits per byte do not depend on the tokenizer, so records that were scored on the same
original documents stand together, with columns for ids, budget and training bytes. The text is
`val_text_sha256` of a run's `dataset`, or what records/texts.json (see scripts/texts.py) says of its
fingerprint. Runs that score only the first VAL_BYTES of a text have a table of their own.

The verdict is that of scripts/stats.py against the record's parent on the same text, seeds paired; it names
what else differs. A parent `train_gpt.py` is the latest record whose submission.json says `"trunk": true`;
such a record is itself compared with the trunk before it.

A plot carries the sha256 of its numbers; that is what --check compares, so another matplotlib is no
difference. One whose numbers have not changed is left as it is: delete it to have it drawn again. The tool
has its own markers, beside those of scripts/tables.py, because a table of records reads all of them where a
table there reads one folder, and because --check then needs nothing but Python.

Exit code 1 too: a record whose seeds are not seeds of one configuration or that broke a budget (it is listed,
not ranked), whose submission.json says another score, or which is frozen and stale. 2: a file is not what it
should be.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import io
import itertools
import json
import math
import re
import statistics
import struct
from collections.abc import Iterable
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
from texts import TEXTS

BLOCK = re.compile(r"(<!-- leaderboard -->\n).*?(<!-- end -->)", re.S)
PLOTS = Path("records/leaderboard")
# Okabe and Ito's colours, which the colour-blind tell apart, darkest first; markers and dashes for
# black and white.
STYLES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#000000", "^", ":"), ("#009E73", "D", "-."),
          ("#CC79A7", "v", (0, (1, 1))), ("#E69F00", "P", (0, (5, 1))), ("#56B4E9", "X", (0, (3, 1, 1, 1)))]
# Two records saw the same amount of text where it differs by less: other ids never match to a byte.
SAME_AMOUNT = 0.01


# --- Records ---


@dataclass(frozen=True)
class Text:
    """The validation text that a record was scored on: what its rivals share."""

    sha256: str  # of the original documents; the fingerprint of the ids where nobody knows more
    name: str
    bytes: int | None
    documents: int | None
    prefix: int  # VAL_BYTES, 0 = all of it

    @property
    def key(self) -> tuple:
        return self.sha256, self.prefix

    def __str__(self) -> str:
        size = f", {self.bytes:,} bytes in {self.documents:,} documents" if self.bytes else ""
        part = f", scored on its first {self.prefix:,} bytes" if self.prefix else ""
        return f"`{self.name}` ({self.sha256[:8]}){size}{part}"


@dataclass(frozen=True)
class Setting:
    """What may differ between the records of one text, and is named where it does."""

    ids: str
    budget: int  # bytes of code and artifact, 0 = none
    seconds: float  # limit of training, 0 = none
    trained: int  # bytes of text seen in training
    divisor: str  # the bytes that divide its bits: the text's, or those that its ids spell
    order: str  # of rows in training: as they stand, or shuffled
    scoring: str  # the pass of the headline, without the bits of a weight

    def differences(self, other: Setting) -> list[str]:
        """What a comparison of two records has to say beside their scores."""
        pairs = {
            "ids": (self.ids, other.ids),
            "budget": (self.budget, other.budget),
            "time limit": (self.seconds, other.seconds),
            "divisor": (self.divisor, other.divisor),
            "order of rows": (self.order, other.order),
            "scoring": (self.scoring, other.scoring),
        }
        found = [word for word, (mine, theirs) in pairs.items() if mine != theirs]
        limited = self.seconds and self.seconds == other.seconds  # then a faster script may see more
        if not limited and not math.isclose(self.trained, other.trained, rel_tol=SAME_AMOUNT):
            found.append("training bytes")
        return found


@dataclass
class Record:
    folder: Path
    submission: dict
    texts: dict = field(default_factory=dict, repr=False)  # records/texts.json
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
        parts = [part for part in Path(parent or "").parts
                 if part not in ("records", "train_gpt.py", "trunk")]
        return parts[-1] if parts else "trunk" if parent else ""

    @property
    def trunk(self) -> bool:
        """Whether this is the trunk of its day, whose numbers are those of the parent `train_gpt.py`."""
        return bool(self.submission.get("trunk"))

    @property
    def when(self) -> tuple:
        """By date; of one day, trunks and others without a parent first."""
        return self.date, bool(self.parent) and not self.trunk, self.name

    @property
    def frozen(self) -> bool:
        return bool(self.submission.get("frozen"))

    @cached_property
    def stale(self) -> str:
        return stats.stale_mark(self.folder, [run.metrics for run in self.group.runs])

    @cached_property
    def text(self) -> Text:
        metrics = self.group.runs[0].metrics
        data, prefix = metrics["dataset"], metrics["settings"].get("VAL_BYTES", 0)
        known = (text for text, entry in self.texts.items() if data["sha256"] in entry["datasets"])
        sha256 = data.get("val_text_sha256") or next(known, data["sha256"])

        about = self.texts.get(sha256, {})
        size = about.get("bytes") or (data.get("bytes") or {}).get("val")
        documents = about.get("documents") or data.get("val_documents", 0)
        return Text(sha256, about.get("name", data["name"]), size, documents,
                    0 if size and prefix >= size else prefix)

    @cached_property
    def bytes_a_token(self) -> float:
        """Of the training text; of the scored one where the manifest does not count the other."""
        data, entry = self.group.runs[0].metrics["dataset"], self.group.runs[0].entry
        if size := (data.get("bytes") or {}).get("train"):
            return size / data["train_tokens"]
        return entry["bytes"] / entry["targets"]

    @property
    def bytes_a_step(self) -> float:
        return self.group.runs[0].metrics["settings"]["TRAIN_BATCH_TOKENS"] * self.bytes_a_token

    @cached_property
    def setting(self) -> Setting:
        metrics = self.group.runs[0].metrics
        chosen, data = metrics["settings"], metrics["dataset"]
        steps = statistics.mean(run.metrics["steps"] for run in self.group.runs)
        ids = data.get("variant") or f"{chosen['VOCAB_SIZE']} ids"
        whole = self.text.prefix or self.group.runs[0].entry["bytes"] == self.text.bytes
        return Setting(ids, chosen["ARTIFACT_BUDGET_BYTES"], chosen["MAX_WALLCLOCK_SECONDS"],
                       round(steps * self.bytes_a_step), "text" if whole else "ids",
                       chosen.get("TRAIN_ORDER", "sequential"), stats.without_bits(metrics["headline"]))

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


def read_record(folder: Path, texts: dict) -> Record:
    """A record and what is wrong with it.

    Raises:
        Misuse: a file of it cannot be read or lacks a number.
    """
    path = folder / "submission.json"
    record = Record(folder, read_json(path) if path.exists() else {}, texts)
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
        _ = record.text, record.setting, record.bytes_total, record.hardware, runs[0].metrics["params"]
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
        text = "frozen, and not the script of its seeds"
        record.findings.append(Finding("script", "FAIL", text, record.name))
    return record


def ranked(found: list[Record]) -> list[list[Record]]:
    """Records by text, each text from the best score to the worst; texts by name."""
    groups: dict[tuple, list[Record]] = {}
    for record in found:
        if not record.unranked:
            groups.setdefault(record.text.key, []).append(record)
    ordered = [sorted(group, key=lambda record: (record.group.mean, record.when))
               for group in groups.values()]
    return sorted(ordered, key=lambda group: (group[0].text.name, group[0].text.key))


def base_of(record: Record, group: list[Record]) -> Record | None:
    """The record of the same text that this one is held against: its parent, or a trunk's predecessor."""
    others = [other for other in group if other is not record]
    trunks = sorted((other for other in others if other.trunk), key=lambda other: other.when)
    if record.trunk:
        trunks = [other for other in trunks if other.when < record.when]
    if record.trunk or record.parent == "trunk":
        return trunks[-1] if trunks else None
    return next((other for other in others if record.parent in (other.name, other.title)), None)


# --- Table ---


def held_against(record: Record, group: list[Record]) -> tuple[Record, stats.Comparison, list[str]] | None:
    """(its base, the comparison of their scores, what else differs); None where there is no base."""
    base = base_of(record, group)
    if base is None:
        return None
    found = stats.compare(record.group.scores, base.group.scores)
    return base, found, [f"other {what}" for what in record.setting.differences(base.setting)]


def verdict(record: Record, group: list[Record]) -> str:
    held = held_against(record, group)
    if held is None:
        missing = "no trunk before it" if record.trunk else "no parent"
        return "its parent is not measured on this text" if record.parent and not record.trunk else missing

    base, found, other = held
    low, high = found.interval
    word = found.word + (" than " if found.word in ("better", "worse") else " against ") + base.title
    span = f" ({low:+.4f} to {high:+.4f})" if math.isfinite(low) else ""
    return "; ".join([f"{word}: {found.difference:+.4f}{span}", *([", ".join(other)] if other else [])])


def notes(record: Record) -> list[str]:
    """What a reader has to know beside the score: it is stale, or divided by other bytes than the text's."""
    lines, text, entry = [], record.text, record.group.runs[0].entry
    if record.stale:
        lines.append(f"{record.title} is {record.stale}.")
    if text.bytes and not text.prefix and entry["bytes"] != text.bytes:
        lines.append(
            f"{record.title}'s tokenizer normalises the text: its bits are divided by "
            f"{entry['bytes']:,} bytes instead of {text.bytes:,}, which makes its score higher.")
    spelled = record.texts.get(text.sha256, {}).get("spelled", {}).get(record.setting.ids, text.bytes)
    if text.bytes and not text.prefix and spelled < entry["bytes"]:
        bpb = record.group.mean * text.bytes / spelled
        lines.append(
            f"{record.title}'s ids spell {spelled:,} of the {text.bytes:,} bytes, all of which divide its "
            f"bits: by what they spell it would have {bpb:.4f}.")
    return lines


HEADER = ["rank", "record", "BPB", "evaluation", "ids", "bytes", "budget", "training bytes",
          "parameters", "verdict", "parent", "hardware", "date"]


def table(group: list[Record]) -> str:
    """One text: a heading, a row a record, a line for each that is stale or divides by other bytes."""
    text, rows, lines = group[0].text, [], []
    for i, record in enumerate(group, 1):
        marks = [word for word, holds in (("stale", record.stale), ("frozen", record.frozen)) if holds]
        deviation = "" if record.group.sd is None else f" +- {record.group.sd:.4f}"
        first, setting = record.group.runs[0], record.setting
        link = f"[{record.title}](records/{record.name}/README.md)"
        limit = f" in {setting.seconds:g} s" if setting.seconds else ""

        rows.append([
            i, link + "".join(f" *{mark}*" for mark in marks), f"**{record.group.mean:.4f}**{deviation}",
            f"`{first.evaluation}`", setting.ids, f"{record.bytes_total:,}",
            f"{setting.budget:,}" if setting.budget else "none", f"{setting.trained:,}{limit}",
            f"{first.metrics['params']:,}", verdict(record, group), record.parent or "none", record.hardware,
            record.date])
        lines += notes(record)
    return "\n\n".join([f"Text {text}:", markdown_table(HEADER, rows), *lines])


NOTE = ("BPB: mean +- standard deviation of the seeds, lower is better. "
        "Bytes: code and artifact, the largest of the seeds. "
        "Verdict: difference in BPB with its 95 % interval, seeds paired, against the parent on the same "
        "text; a parent `trunk` is the latest record of the trunk. Other differences from the parent's run "
        "are named.")


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
    "training": "training loss in bits per byte against bytes of text and against seconds",
    "classes": "bits per byte by class of byte",
}


def read_curve(path: Path, record: Record) -> dict[str, list]:
    """A metrics.jsonl -> {"train": [[bytes of text, seconds, BPB]], "val": [[bytes of text, BPB]]}.

    A run that went on from a checkpoint has steps twice: the last line of a step counts.
    """
    bits = 1 / (math.log(2) * record.bytes_a_token)  # per byte, of a nat per token
    steps: dict[str, dict[int, list]] = {"train": {}, "val": {}}
    for i, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            seen = entry["step"] * record.bytes_a_step
            if "train_loss" in entry:
                steps["train"][entry["step"]] = [seen, entry["train_seconds"], entry["train_loss"] * bits]
            elif "val_loss" in entry:
                steps["val"][entry["step"]] = [seen, entry["val_bpb"]]
        except (ValueError, KeyError) as error:
            reason = f"{'no ' if isinstance(error, KeyError) else 'not JSON: '}{error}"
            raise Misuse(f"{path}:{i}: {reason}") from None
    return {name: [points[step] for step in sorted(points)] for name, points in steps.items()}


def class_bits(record: Record) -> dict[str, float]:
    """{class of byte: its bits over all bytes}, mean of the seeds; empty where a seed does not say."""
    entries = [run.entry for run in record.group.runs]
    if not all(entry.get("bits_by_class") for entry in entries):
        return {}
    return {name: statistics.mean(entry["bits_by_class"].get(name, 0.0) / entry["bytes"] for entry in entries)
            for name in entries[0]["bits_by_class"]}


def plot_data(found: list[Record]) -> dict[str, dict]:
    """{plot: {"groups": [...]}} of every plot that there are numbers for, records by date."""
    data: dict[str, list] = {name: [] for name in CAPTIONS}
    for group in ranked(found):
        title = str(group[0].text).replace("`", "")
        # By date: a record keeps its colour when another one passes it.
        group = sorted(group, key=lambda record: record.when)
        data["bytes"].append({"title": title, "records": [
            {"name": record.title, "bytes": record.bytes_total, "values": record.group.values,
             "budget": record.setting.budget} for record in group]})

        curves = []
        for record in group:
            paths = {run.seed: Path(run.where).with_name("metrics.jsonl") for run in record.group.runs}
            seeds = {str(seed): read_curve(path, record) for seed, path in paths.items() if path.exists()}
            if any(curve["train"] for curve in seeds.values()):
                curves.append({"name": record.title, "hardware": record.hardware, "seeds": seeds})
        if curves:
            data["training"].append({"title": title, "records": curves})

        classes = [{"name": record.title, "bits": bits} for record in group if (bits := class_bits(record))]
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
        size = 11 if panels == 2 else 9, 0.4 + 4.2 * len(data["groups"])
        figure = Figure(figsize=size, layout="constrained")
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
        size = record["bytes"] / 1e6
        axes.errorbar([size], [mean], [error] if error else None, **points(i), markersize=8, capsize=4,
                      label=f"{record['name']}, {len(values)} seeds")
        axes.annotate(f"{record['name']} {mean:.4f}", (size, mean), (9, 7 if i % 2 == 0 else -14), fontsize=9,
                      textcoords="offset points")

    # A budget far to the right would press all records against the left edge.
    most = max(record["bytes"] for record in group["records"])
    for budget in sorted({record["budget"] for record in group["records"]}):
        if 0 < budget < 2 * most:
            axes.axvline(budget / 1e6, color="#555555", linestyle=":", linewidth=1.2,
                         label=f"a budget, {budget:,} bytes")
    axes.margins(0.2)
    axes.set(xlabel="code and artifact (MB = 1,000,000 bytes)",
             ylabel="bits per byte (BPB), mean +- sd of seeds")
    axes.legend(fontsize=8)


# A point of a smooth curve is the mean of the lines from 1 / 1.1 to 1.1 times its bytes of text.
SMOOTHING = 1.1


def smooth(line: list[list[float]]) -> dict[float, tuple[float, float]]:
    """[[bytes, seconds, loss]] -> {bytes: (seconds, running mean of the loss)}."""
    line = sorted(line)
    places = [point[0] for point in line]
    sums = [0.0, *itertools.accumulate(point[2] for point in line)]
    curve = {}
    for place, seconds, _ in line:
        first = bisect.bisect_left(places, place / SMOOTHING)
        end = bisect.bisect_right(places, place * SMOOTHING)
        curve[place] = seconds, (sums[end] - sums[first]) / (end - first)
    return curve


@dataclass(frozen=True)
class Band:
    """The seeds of one curve together: at `seen` bytes of text the running means of the loss have this mean
    and these ends, after `seconds`, their mean too.
    """

    seen: float
    seconds: float
    mean: float
    low: float
    high: float


def band(seeds: Iterable[dict[str, list]]) -> list[Band]:
    """One curve from those of `read_curve`, where all seeds have a line; empty where they share none."""
    curves = [smooth(curve["train"]) for curve in seeds if curve["train"]]
    found = []
    for seen in sorted(set.intersection(*map(set, curves))) if curves else ():
        losses = [curve[seen][1] for curve in curves]
        seconds = statistics.mean(curve[seen][0] for curve in curves)
        found.append(Band(seen, seconds, statistics.mean(losses), min(losses), max(losses)))
    return found


def draw_training(row, group: dict) -> None:
    """A line is the mean of the seeds' running means, its band goes from the lowest seed to the highest."""
    for axes, unit in zip(row, ("bytes of text", "seconds of training")):
        ends = []
        for i, record in enumerate(group["records"]):
            curve = band(record["seeds"].values())
            if not curve:
                continue
            x = [point.seen if unit == "bytes of text" else point.seconds for point in curve]
            y, low, high = ([getattr(point, key) for point in curve] for key in ("mean", "low", "high"))

            axes.fill_between(x, low, high, color=style(i)["color"], alpha=0.2, linewidth=0)
            axes.plot(x, y, **style(i) | {"marker": None}, linewidth=1.4,
                      label=f"{record['name']}, {record['hardware']}")
            ends.append((y[-1], x[-1], record["name"]))
            for curve in record["seeds"].values() if unit == "bytes of text" else ():
                seen, scores = ([point[of] for point in curve["val"]] for of in (0, 1))
                axes.plot(seen, scores, **points(i), markersize=6, markerfacecolor="none")

        axes.set(xscale="log", yscale="log", xlabel=unit)
        low, high = axes.get_ylim()
        axes.set(ylim=(low, high), xlim=(None, axes.get_xlim()[1] * 12))  # room for the names
        label_ends(axes, ends)
        ticks = (0.5, 0.7, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
        axes.set_yticks([tick for tick in ticks if low <= tick <= high])
        axes.set_yticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")

    row[0].plot([], [], "o", color="#555555", markersize=6, markerfacecolor="none",
                label="validation, raw weights")
    row[0].legend(handles=row[0].get_lines()[-1:], fontsize=8)
    row[0].set_ylabel("loss of training batches (bits per byte),\nrunning mean over +-10 % of the bytes")
    row[1].legend(fontsize=7)


def label_ends(axes, ends: list[tuple[float, float, str]]) -> None:
    """Each name beside its curve's end, or above the name below it."""
    low, high = axes.get_ylim()
    height = 0.0  # as a share of the axis
    for y, x, name in sorted(ends):
        height = max(height + 0.045, math.log(y / low) / math.log(high / low))
        axes.annotate(name, (x, y), (0.80, height), textcoords="axes fraction", fontsize=8, va="center",
                      arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#777777"})


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
                axes.annotate(f"{value:.4f}", (value, height), (7 if right else -7, -3),
                              textcoords="offset points", ha="left" if right else "right", fontsize=8)
    axes.set(xscale="log",
             xlabel="bits of the class over all validation bytes (BPB; the classes add up to the score)",
             ylabel="class of the target byte", ylim=(-0.6, len(names) - 0.4))
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    axes.legend(fontsize=8)


# --- Command ---


DISAGREES = "does not agree with the records: python scripts/leaderboard.py writes it"


@dataclass(frozen=True)
class Board:
    """The leaderboard as it has to be, and which of its files are not so yet."""

    records: list[Record]
    plots: dict[str, dict]
    text: str  # of README.md
    changed: list[Path]


def read(root: Path = ROOT) -> Board:
    """The leaderboard of the records below `root`.

    Raises:
        Misuse: a file is not what it should be, or README.md has no place for the table.
    """
    path = root / TEXTS
    texts = read_json(path) if path.exists() else {}
    found = [read_record(folder, texts) for folder in records(root)]
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true",
                        help="change nothing; exit with 1 where something would")
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
