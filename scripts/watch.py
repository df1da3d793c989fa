"""The runs in progress, live: loss, BPB, speed, time left, and how they stand against a record.

    python scripts/watch.py                            all runs in progress below runs/
    python scripts/watch.py mine runs/other            these, also where they have ended
    python scripts/watch.py --against BytePPM          and the difference to its curve at equal bytes of text
    python scripts/watch.py --web                      the same as a page for this machine, 127.0.0.1:8642
    python scripts/watch.py mine --export csv --out mine.csv         or tensorboard, wandb: to a folder

It reads metrics.jsonl, and log.txt once for the settings; a run neither waits for it nor knows of it. A run
that dies is shown as such (on Linux at once, elsewhere after ten minutes without a line).

    loss        nats a token, running mean over the last 10 % of the text
    BPB         the same a byte; validation: the last one, or the final score
    MFU         needs --peak: the machine's TFLOP/s. FLOPs are counted as in scripts/bench.py, for scripts
                with the trunk's blocks
    left        of training, by its share that is done
    memory      of rank 0's process: it says nothing of a GPU's
    against     run minus record, BPB, at equal bytes of text: over the lines of the last 20 % that both have,
                otherwise of the running means; ! where the record was trained on other text or other ids

--export goes on until the runs have ended; with --once it writes what is there. wandb writes to a folder and
uploads nothing unless WANDB_MODE says so. Exit code 0, 2 for misuse; Ctrl-C ends it at any time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import watched
from family import FINE, Misuse, command
from watched import Against, Row, Watched

BARS = "▁▂▃▄▅▆▇█"
ENDED = ("finished", "died", "silent")
PORT = 8642
LOSSES = "loss so far"
SPARE = ("memory", "text", "loss", LOSSES, "MFU", "validation", "speed", "left")  # first to go
COLOURS = {"training": "green", "scoring": "cyan", "starting": "cyan", "died": "red", "silent": "yellow"}


class Watch:
    """The runs that are shown, read again at every `rows`."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.names, self.root = options, options.runs, Path(options.folder)
        self.against = Against.read(options.against) if options.against else None
        self.runs = {run.folder: run for run in watched.chosen(self.names, self.root)}

    def look(self) -> list[Watched]:
        """Runs that have started since are added; those that have ended stay."""
        if not self.names:
            for run in watched.chosen([], self.root):
                self.runs.setdefault(run.folder, run)
        return [*self.runs.values()]

    def rows(self) -> list[Row]:
        peak = self.options.peak * 1e12 if self.options.peak else None
        for run in self.look():
            run.read()
        return [watched.row(run, self.against, peak) for run in self.runs.values()]

    def ended(self) -> bool:
        return all(watched.row(run).state in ENDED for run in self.runs.values())

    def lines(self, rows: list[Row]) -> list[tuple[Row, dict[str, str]]]:
        """The rows in words, {heading: text} each; columns that are empty everywhere are left out."""
        table = [cells(row) for row in rows]
        empty = {name for name in (table[0] if table else ()) if not any(line[name] for line in table)}
        named = {"against": f"against {self.against.title}"} if self.against else {}
        return [(row, {named.get(name, name): text for name, text in line.items() if name not in empty})
                for row, line in zip(rows, table)]


# --- Words ---


def spark(values: tuple[float, ...]) -> str:
    """A line of blocks, high where the value is."""
    if not values:
        return ""
    low, high = min(values), max(values)
    return "".join(BARS[round((value - low) / (high - low or 1) * (len(BARS) - 1))] for value in values)


def clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def amount(value: float | None) -> str:
    """Bytes in a unit that keeps three digits."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value and value >= size:
            return f"{value / size:.3g} {unit}"
    return "" if not value else f"{value:.3g} B"


def cells(row: Row) -> dict[str, str]:
    """{heading: text} of a row, for the terminal and for the page."""
    share = f" {row.progress:.0%}" if row.progress is not None else ""
    rate = amount(row.bytes_per_second)
    return {
        "run": row.name, "state": row.state,
        "step": f"{row.step:,}" + (f" of {row.steps:,}" if isinstance(row.steps, int) else "") + share,
        "text": amount(row.seen), "loss": number(row.loss, ".4f"), "BPB": number(row.bpb, ".4f"),
        "validation": number(row.val_bpb, ".4f"), "speed": f"{rate}/s" if rate else "",
        "MFU": number(row.mfu, ".1%"), "left": clock(row.left),
        "memory": amount(row.memory_mb and row.memory_mb * 1e6),
        "against": number(row.difference, "+.4f") + " !" * (row.other_data and row.difference is not None),
    }


# --- The terminal ---


def fitting(lines: list[dict[str, str]], width: int) -> list[str]:
    """The headings of the columns that a terminal of this width has room for."""
    names = [*lines[0]] if lines else []

    def taken() -> int:
        return sum(2 + max(len(text) for text in (name, *(line[name] for line in lines))) for name in names)
    for name in SPARE:
        if name in names and taken() > width:
            names.remove(name)
    return names


def terminal_table(watch: Watch, width: int):
    """What rich prints of the runs as they are now."""
    from rich.table import Table
    from rich.text import Text

    rows = watch.rows()
    lines = [{**line, LOSSES: spark(row.spark), "": "; ".join(row.marks)} for row, line in watch.lines(rows)]
    columns = fitting(lines, width)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        words = name in ("run", "state", LOSSES, "")
        table.add_column(name, justify="left" if words else "right", no_wrap=words and name != "")
    for row, line in zip(rows, lines):
        style = {"state": COLOURS.get(row.state, ""), LOSSES: "blue", "": "yellow"}
        table.add_row(*(Text(line[name], style.get(name, "")) for name in columns))
    return table if lines else Text("no run in progress")


def show(watch: Watch, options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if options.once or not console.is_terminal:
        console.print(terminal_table(watch, console.width))
        return FINE
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(terminal_table(watch, console.width), refresh=True)
            if watch.names and watch.ended():
                return FINE
            time.sleep(options.every)


def export(watch: Watch, options: argparse.Namespace) -> int:
    """Hands every line of the runs to another tool's files, as it comes."""
    from watch_export import exporter

    writer = exporter(options.export, Path(options.out))
    try:
        while True:
            for run in watch.look():
                for entry in run.read():
                    writer.add(run, entry)
            writer.flush()
            if options.once or watch.ended():
                return FINE
            time.sleep(options.every)
    finally:
        writer.close()


# --- Command ---


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("runs", nargs="*", metavar="RUN", help="names below --folder, or folders; default: in progress")
    option("--folder", default="runs", metavar="DIR", help="where runs are kept (default: %(default)s)")
    option("--against", metavar="RECORD", help="a record, for the difference at equal bytes of text")
    option("--peak", type=float, metavar="TFLOPS", help="of the machine, all cards together, for MFU")
    option("--every", type=float, default=5.0, metavar="SECONDS", help="between looks (default: %(default)s)")
    option("--once", action="store_true", help="look once and end")
    option("--web", nargs="?", type=int, const=PORT, metavar="PORT", help=f"a page on loopback (port {PORT})")
    option("--export", choices=("csv", "tensorboard", "wandb"), help="write the lines for another tool")
    option("--out", metavar="PLACE", help="of --export: a file, or a folder")
    option("--json", action="store_true", help="one JSON document instead of a table; looks once")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    if not 0.2 <= options.every < math.inf:
        raise Misuse(f"--every {options.every:g}: 0.2 seconds at least")
    if options.export and not options.out:
        raise Misuse(f"--export {options.export}: --out is needed, a file or a folder")
    if options.peak is not None and options.peak <= 0:
        raise Misuse(f"--peak {options.peak:g}: TFLOP/s above 0 are needed")
    if not options.runs and not Path(options.folder).is_dir():
        hint = "`make train` makes a first run, --folder names another place"
        raise Misuse(f"--folder {options.folder}: no such folder; {hint}")
    if hasattr(os, "nice"):
        os.nice(10)  # whatever there is to wait for is a run's
    watch = Watch(options)
    try:
        if options.export:
            return export(watch, options)
        if options.web is not None:
            from watch_web import serve
            return serve(watch, options.web)
        if options.json:
            print(json.dumps([asdict(row) for row in watch.rows()], indent=1))
            return FINE
        return show(watch, options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return FINE


if __name__ == "__main__":
    command(main)
