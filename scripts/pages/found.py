"""What the site is made of: the records, their places on it, and what is wrong with their files."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import family
import leaderboard
import stats
import tables
from family import Misuse
from leaderboard import Band, Record

Value = TypeVar("Value")


def slug(name: str) -> str:
    """A name as part of an address: itself where that is one already."""
    if re.fullmatch(r"[\w.-]+", name, re.A):
        return name
    plain = re.sub(r"[^\w.-]+", "-", name, flags=re.A)
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


@dataclass
class Entry:
    """A record and its page. `problems` are said on it, where its files do not hold what a part needs."""

    record: Record
    group: list[Record] = field(default_factory=list)  # of its text, the best first; empty: not ranked
    problems: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return self.record.title

    @property
    def href(self) -> str:
        """From the site's root."""
        return f"records/{slug(self.record.name)}.html"

    @property
    def rank(self) -> int | None:
        return self.group.index(self.record) + 1 if self.group else None

    @property
    def readme(self) -> str:
        path = self.record.folder / "README.md"
        return path.read_text(errors="replace") if path.is_file() else ""

    @cached_property
    def scripts_line(self) -> str:
        """Which script made the seeds' numbers, and whether they hold for the present one."""
        folder = self.record.folder
        return tables.of_script("seeds", folder, None, folder.parent.parent).strip()

    @cached_property
    def marks(self) -> list[tuple[str, str]]:
        """[(word, why)] of what a reader has to know beside the score."""
        record = self.record
        if record.group is None:
            return [("not measured", record.unranked)]
        carried = "carried to" in self.scripts_line and self.scripts_line
        known = {"stale": record.stale, "carried": carried, "not ranked": record.unranked,
                 "frozen": record.frozen and "neither script nor numbers change any more",
                 "trunk": record.trunk and "the trunk of its day: parent of records that name train_gpt.py"}
        return [(word, why.strip("*").replace("`", "")) for word, why in known.items() if why]

    def attempt(self, what: str, make: Callable[[], Value]) -> Value | None:
        """What `make` makes; where the files do not allow it, None, and the page says why."""
        try:
            return make()
        except Misuse as error:
            reason = str(error).replace(f"{self.record.folder}/", "")
        except KeyError as error:
            reason = f"its files have no {error}"
        except (OSError, TypeError, AttributeError, ValueError, IndexError, ZeroDivisionError) as error:
            reason = f"its files are not what it is made of ({error})"
        self.problems.append(f"{what}: {reason}")
        return None

    @cached_property
    def curves(self) -> dict[str, dict[str, list]]:
        """{seed: `leaderboard.read_curve`}, without values that are no numbers: the page says how many."""
        found, dropped = {}, 0
        for run in self.record.group.runs if self.record.group else ():
            path = Path(run.where).with_name("metrics.jsonl")
            if not path.is_file():
                continue
            curve = self.attempt("loss", lambda path=path: leaderboard.read_curve(path, self.record))
            for name, points in (curve or {}).items():
                kept = [point for point in points if all(map(is_number, point))]
                dropped += len(points) - len(kept)
                curve[name] = kept
            if curve:
                found[str(run.seed)] = curve
        if dropped:
            self.problems.append(f"loss: {dropped} values in metrics.jsonl are no numbers and are left out")
        return found

    @cached_property
    def band(self) -> list[Band]:
        return leaderboard.band(self.curves.values())


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@dataclass(frozen=True)
class Repository:
    """Every record below `root`, ranked where it can be; `unreadable` are {folder's name: why}."""

    root: Path
    entries: list[Entry]
    groups: list[list[Record]]
    unreadable: dict[str, str]

    @classmethod
    def read(cls, root: Path) -> Repository:
        path = root / leaderboard.TEXTS
        texts = family.read_json(path) if path.exists() else {}
        found, unreadable = [], {}
        for folder in family.records(root):
            try:
                found.append(leaderboard.read_record(folder, texts))
            except Misuse as error:
                unreadable[folder.name] = str(error).replace(f"{root}/", "")
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                unreadable[folder.name] = f"its files are not those of a record ({error!r})"

        groups = leaderboard.ranked(found)
        of = {record.name: group for group in groups for record in group}
        entries = [Entry(record, of.get(record.name, [])) for record in found]
        return cls(root, entries, groups, unreadable)

    def entry(self, record: Record) -> Entry:
        return next(entry for entry in self.entries if entry.record is record)

    def base(self, entry: Entry) -> Entry | None:
        """The record that another one is held against."""
        base = leaderboard.base_of(entry.record, entry.group) if entry.group else None
        return self.entry(base) if base else None


def interval_of(found: stats.Comparison) -> tuple[float, float] | None:
    """The 95 % interval; None where one seed does not say."""
    return found.interval if math.isfinite(found.half) else None
