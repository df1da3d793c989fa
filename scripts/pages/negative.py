"""What did not help, in one list: records, arms of ablations and ladders that are not better than what they
were held against, and what READMEs say of it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import family
import leaderboard
import tables
from family import Misuse

from pages.found import Entry, Repository, interval_of
from pages.prose import Prose, sections

TOLD = re.compile(r"negative results|did not work", re.I)


@dataclass(frozen=True)
class Negative:
    """One line of the list; of a README's words only `html` is set beside `where`."""

    where: str
    href: str
    kind: str  # record, ablation, ladder, note
    what: str
    verdict: str = ""
    difference: float | None = None
    interval: tuple[float, float] | None = None
    setting: str = ""
    html: str = ""


def page(repository: Repository, text: Prose) -> dict:
    found = [*records(repository), *arms(repository), *ladders(repository), *notes(repository, text)]
    return {"found": found, "kinds": [*dict.fromkeys(each.kind for each in found)],
            "verdicts": [*dict.fromkeys(each.verdict for each in found if each.verdict)]}


def records(repository: Repository):
    for entry in repository.entries:
        held = leaderboard.held_against(entry.record, entry.group) if entry.group else None
        if held and held[1].word != "better":
            base, result, others = held
            yield Negative(entry.title, entry.href, "record", f"{entry.title} against {base.title}",
                           result.word, result.difference, interval_of(result), ", ".join(others))


def arms(repository: Repository):
    """Arms of all ablations. One that takes a part out and is worse speaks for the part."""
    for entry in repository.entries:
        for path in sorted(entry.record.folder.rglob("ablations/arms.json")):
            try:
                base, *others = tables.ablation_arms(path.parent.parent)
                yield from of_ablation(entry, base, others)
            except (Misuse, KeyError, TypeError, ValueError, AttributeError):
                continue  # the record's page says what is wrong


def of_ablation(entry: Entry, base: tables.Arm, others: list[tables.Arm]):
    for arm in others:
        mean, half, word = tables.verdict(arm.differences)
        if word != "better":
            first = next(iter(arm.runs.values()))
            interval = (mean - half, mean + half) if math.isfinite(half) else None
            setting = f"base: {base.why}; {first['steps']} steps, {len(arm.shared)} seeds"
            yield Negative(entry.title, f"{entry.href}#ablations", "ablation", arm.why.replace("`", ""),
                           word, mean, interval, setting.replace("`", ""))


def ladders(repository: Repository):
    for path in sorted((repository.root / "records" / "ladder").glob("*/results.json")):
        try:
            why = family.read_json(path.with_name("ladder.json"))["arms"]
            for row in family.read_json(path)["arms"]:
                if row["word"] != "better":
                    yield Negative(
                        f"ladder {path.parent.name}", f"ladder.html#{path.parent.name}", "ladder",
                        f"{row['arm']}: {why[row['arm']]['why']}", row["word"], row["difference"],
                        tuple(row["interval"]) if row["interval"] else None,
                        f"rung {row['rung']}, {row['bytes']:.3f} of the base's bytes")
        except (Misuse, KeyError, TypeError, ValueError):
            continue  # the ladders' page says what is wrong


def notes(repository: Repository, text: Prose):
    """The points of a README's section on it."""
    for entry in repository.entries:
        for title, body in sections(entry.readme).items():
            if TOLD.search(title):
                for point in re.split(r"^- ", body, flags=re.M)[1:]:
                    yield Negative(entry.title, f"{entry.href}#readme", "note", title,
                                   html=text.html(point, title))
