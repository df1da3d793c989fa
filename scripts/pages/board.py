"""The leaderboard: what its table and its figures hold."""

from __future__ import annotations

import statistics

import leaderboard
from leaderboard import Record

from pages.figures import MARKERS, Axis, Figure, Series
from pages.found import Entry, Repository, interval_of
from pages.prose import Prose

SHOWN_FROM = 0.01  # of the text: what comes before is the same fall in every record


def row(entry: Entry) -> dict:
    """One record in the table."""
    record, group = entry.record, entry.record.group
    held = leaderboard.held_against(record, entry.group)
    base, found, others = held or (None, None, [])
    return {
        "rank": entry.rank, "title": record.title, "href": entry.href, "marks": entry.marks,
        "bpb": group.mean, "sd": group.sd, "seeds": len(group.runs), "evaluation": group.runs[0].evaluation,
        "ids": record.setting.ids, "bytes": record.bytes_total, "budget": record.setting.budget,
        "seconds": record.setting.seconds, "trained": record.setting.trained,
        "params": group.runs[0].metrics["params"], "word": found.word if found else "",
        "difference": found.difference if found else None, "interval": interval_of(found) if found else None,
        "base": base.title if base else "", "others": others,
        "verdict": leaderboard.verdict(record, entry.group), "parent": record.parent or "none",
        "hardware": record.hardware, "date": record.date, "text": record.text.name,
        "blurb": record.submission.get("blurb", ""),
    }


def page(repository: Repository) -> dict:
    groups = []
    for group in repository.groups:
        text = group[0].text
        entries = [repository.entry(record) for record in group]
        rows = [row(entry) for entry in entries]
        groups.append({
            "text": text, "title": str(text).replace("`", ""), "rows": rows,
            "budgets": sorted({each["budget"] for each in rows}),
            "figures": [figure for figure in (sizes(group), training(entries), classes(group)) if figure],
            "notes": [note.replace("*", "").replace("`", "") for record in group
                      for note in leaderboard.notes(record)],
        })
    left = [entry for entry in repository.entries if not entry.group]
    return {"groups": groups, "left": left, "unreadable": repository.unreadable,
            "about": Prose().html(leaderboard.NOTE, "About")}


def by_date(group: list[Record]) -> list[Record]:
    """A record keeps its colour when another one passes it."""
    return sorted(group, key=lambda record: record.when)


def sizes(group: list[Record]) -> Figure:
    series, rows = [], []
    for i, record in enumerate(by_date(group)):
        mean, sd = record.group.mean, record.group.sd or 0.0
        series.append(Series(record.title, [(record.bytes_total / 1e6, mean)], i % len(MARKERS), "dots",
                             [mean - sd], [mean + sd]))
        rows.append([record.title, f"{record.bytes_total:,}", f"{mean:.4f}", f"{sd:.4f}"])
    most = max(record.bytes_total for record in group)
    budgets = {record.setting.budget for record in group}
    # A budget far to the right would press all records against the left edge.
    rules = {budget / 1e6: f"a budget, {budget:,} bytes" for budget in budgets if 0 < budget < 2 * most}
    return Figure(
        "Bits per byte against bytes", Axis("code and artifact, MB"), Axis("BPB"), series,
        f"{len(group)} records: bits per byte against bytes of code and artifact.",
        "Mean and standard deviation of the seeds; dotted: a budget. Lower left is better.",
        ["record", "bytes", "BPB", "standard deviation"], rows, rules)


def training(entries: list[Entry]) -> Figure | None:
    """The training losses of all records over bytes of text; a record's page has all of its points."""
    order = [record.name for record in by_date([entry.record for entry in entries])]
    series, rows = [], []
    for entry in sorted(entries, key=lambda entry: order.index(entry.record.name)):
        curve = [point for point in entry.band if point.seen >= SHOWN_FROM * entry.band[-1].seen]
        if curve:
            points = [(point.seen / 1e6, point.mean) for point in curve]
            colour = order.index(entry.record.name) % len(MARKERS)
            series.append(Series(entry.title, points, colour,
                                 low=[point.low for point in curve], high=[point.high for point in curve]))
            rows.append([entry.title, f"{curve[-1].seen:,.0f}", f"{curve[-1].mean:.4f}",
                         f"{curve[-1].seconds:,.0f}"])
    if not series:
        return None
    return Figure(
        "Training loss by bytes", Axis("MB of text", log=True), Axis("BPB", log=True), series,
        f"Training losses of {len(series)} records against bytes of text; each record's page has all points.",
        "From 1 % of the text on. Running mean over 10 % of the bytes to either side; the band goes from the "
        "lowest seed to the highest.", ["record", "bytes of text", "BPB", "seconds"], rows)


def classes(group: list[Record]) -> Figure | None:
    """Bits by class of byte against the latest trunk's, of the records whose ids have the same classes."""
    order = by_date(group)
    bits = {record.name: found for record in order if (found := leaderboard.class_bits(record))}
    trunk = next((record for record in reversed(order) if record.trunk and record.name in bits), None)
    if not bits:
        return None
    base = bits[trunk.name] if trunk else {}
    known = base or next(iter(bits.values()))
    bits = {name: found for name, found in bits.items() if found.keys() == known.keys()}

    names = sorted(known, key=lambda name: -statistics.mean(found[name] for found in bits.values()))
    series = [Series(record.title, [(bits[record.name][name] - base.get(name, 0.0), at)
                                    for at, name in enumerate(names)], i % len(MARKERS), "dots")
              for i, record in enumerate(order) if record.name in bits and record is not trunk]
    rows = [[record.title, *(f"{bits[record.name][name]:.4f}" for name in names)]
            for record in order if record.name in bits]
    against = f"BPB against {trunk.title}; below zero is better" if trunk else "BPB"
    return Figure(
        "Where the bits go", Axis(against), Axis("", names=names), series,
        "Bits spent on each class of byte by each record.",
        "By class of the byte that is predicted, where ids are bytes. The table has the bits, which add "
        "up to the score.",
        ["record", *names], rows, zero=bool(trunk))
