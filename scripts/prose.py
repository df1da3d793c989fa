"""Numbers in the prose of READMEs that no file supports; `scripts/tables.py --check` reports them.

A number of three digits or more must stand in a JSON file of the README's folder, in a table of that README
that a tool wrote, among the scores and sizes in any record's submission.json, or in records/published.json,
which has what others have measured and claimed. It may be rounded (by half a unit of its last digit), and be
in another unit than the file's if its own follows it (ms, s, kB, MB, million, % and so on). Signs are not
compared. Years, dates, versions, pull requests (#832), words with digits (int6, 8xH100, SP8192), powers
(2^20), code, links, comments and tables are not prose.

A number that follows from others has a note, best after its paragraph:

    <!-- number 0.59 0.94: ms_per_step of base/seed42.json, 1,037, by that of plain/seed42.json, 1,752 -->

The numbers that a note argues with are held to the same rule, and files that it names must be there. Whether
the argument holds is for its reader. Nor can this see a number that is that of another thing: where a folder
has a thousand numbers, some number of three digits is near one of them by chance, one of four digits seldom.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from family import ROOT, read_json

PUBLISHED = "records/published.json"
LEAST_DIGITS = 3
# A number begins after no letter, digit, # or dot, but may be the second of 13x512, 459/647 and 1.03-1.41.
NUMBER = re.compile(
    r"(?:(?<![\w.,#/^–-])|(?<=\d[x/–-]))"
    r"[-+−]?(?P<digits>\d+(?:,\d{3})*(?:\.\d+)?)(?P<exponent>e[-+]?\d+)?"
    r"(?![.,]\d|\^|(?!x\d)\w)"
)
YEAR = re.compile(r"(19|20)\d\d")
NOTE = re.compile(r"<!-- number ([^:]+): (.+?) -->", re.S)
FILE_NAME = re.compile(r"[\w*./-]+\.(?:jsonl?|py|md|txt)\b")
MADE = re.compile(r"<!-- (?:table:|ladder|leaderboard).*?<!-- end -->", re.S)
# What is no prose: tables that a tool wrote, comments, code, addresses, dates, Python's version.
ASIDE = re.compile(
    rf"{MADE.pattern}|<!--.*?-->|(?P<ticks>`+).*?(?P=ticks)|\]\([^)]*\)|https?://\S+"
    r"|\b\d{4}-\d\d-\d\d\b|Python \d\.\d+",
    re.S,
)
# A unit follows its number, or the last of several: `459, 647 and 569 s`, `0.8 to 1.2 MB`.
UNIT = re.compile(r"\s*(%|[A-Za-z]+)")
NEXT = re.compile(r"\s*(?:,|/|-|–|\b(?:to|and|or|of|against)\b)(?:\s*and)?\s*[-+−]?\d[\d.,]*(?<!,)")
# What a file's number is multiplied by to be in the unit that is written.
SCALES = {
    "%": (100,), "k": (1e-3,), "thousand": (1e-3,), "M": (1e-6,), "million": (1e-6,), "billion": (1e-9,),
    "kB": (1e-3,), "MB": (1e-6,), "GB": (1e-9, 1e-3), "GFLOP": (1e-9,), "TFLOP": (1e-12,),
    "s": (1e-3,), "seconds": (1e-3,), "minutes": (1 / 60,), "hours": (1 / 3600,),
    "ms": (1e3,), "us": (1e6,), "ns": (1e9,),
}


# Numbers that nobody cites, and many enough to support any by chance.
UNCITED = {"bits_by_class"}
# Of other records' submission.json a README may cite these: what was scored on what.
SUBMISSION = ("val_bpb", "val_loss", "bytes_total", "data")


class Number(NamedTuple):
    """A number as it is written, and what the file's number is multiplied by to have its unit."""

    text: str
    scales: tuple[float, ...] = ()

    @property
    def value(self) -> float:
        return float(self.text.replace(",", ""))

    @property
    def half(self) -> float:
        """Half a unit of the last digit."""
        mantissa, _, exponent = self.text.partition("e")
        return 0.5001 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def scales_at(text: str, place: int) -> tuple[float, ...]:
    """What the unit of a number that ends at a place says about it."""
    for _ in range(5):
        unit = UNIT.match(text, place)
        if unit and unit[1] in SCALES:
            return SCALES[unit[1]]
        follower = NEXT.match(text, place)
        if not follower:
            break
        place = follower.end()
    return ()


def numbers(text: str, least: int = LEAST_DIGITS) -> Iterator[Number]:
    """Those with so many digits or more that are no year, without signs."""
    for found in NUMBER.finditer(text):
        if sum(map(str.isdigit, found["digits"])) < least or YEAR.fullmatch(found["digits"]):
            continue
        yield Number(found["digits"] + (found["exponent"] or ""), scales_at(text, found.end()))


def prose(text: str) -> str:
    """A README without what is not prose, on as many lines."""
    text = ASIDE.sub(lambda aside: "\n" * aside[0].count("\n"), text)
    return "\n".join("" if line.lstrip().startswith("|") else line for line in text.split("\n"))


def values(tree) -> Iterator[float]:
    """All numbers in a JSON document, those inside its texts among them; without signs."""
    if isinstance(tree, dict):
        tree = [item for key, item in tree.items() if key not in UNCITED]
    if isinstance(tree, list):
        for item in tree:
            yield from values(item)
    elif isinstance(tree, str):
        yield from (number.value for number in numbers(tree, 1))
    elif isinstance(tree, int | float) and math.isfinite(tree):
        yield abs(float(tree))


def supported(number: Number, known: list[float]) -> bool:
    """Whether one of `known`, sorted, is rounded to what is written."""
    for scale in (1, *number.scales):
        first = bisect.bisect_left(known, (number.value - number.half) / scale)
        if first < len(known) and known[first] <= (number.value + number.half) / scale:
            return True
    return False


def headlines(submission: dict) -> list:
    """What any README may cite of a record."""
    seeds = submission.get("seed_results", {}).values()
    return [part[key] for part in (submission, *seeds) for key in SUBMISSION if key in part]


def evidence(path: Path, root: Path) -> list[float]:
    """The sorted numbers that a README may cite."""
    own = [] if path.parent == root else path.parent.rglob("*.json")
    shared = [*root.glob(PUBLISHED), *root.glob("records/texts.json")]
    trees = [*map(read_json, [*own, *shared]),
             *map(headlines, map(read_json, root.glob("records/*/submission.json"))),
             *MADE.findall(path.read_text())]
    return sorted(set(itertools.chain.from_iterable(map(values, trees))))


def unsupported(path: Path, root: Path = ROOT) -> list[tuple[int, str]]:
    """(Line, what is wrong) of a README's numbers and of its notes."""
    text = path.read_text()
    known, found, met = evidence(path, root), [], set()
    notes = [*NOTE.finditer(text)]
    noted = {number for note in notes for number in note[1].split()}

    def look(words: str, line: int, where: str = "") -> None:
        for number in numbers(words):
            met.add(number.text)
            if number.text not in noted and not supported(number, known):
                what = f"{number.text}{where} stands in no file, and no note says how it follows"
                found.append((line, what))

    lines = prose(text).split("\n")
    for line, words in enumerate(lines, 1):
        # A unit may stand at the beginning of the next line: its numbers are those of this one.
        unit = re.match(r"\s*(?:%|[A-Za-z]+)", lines[line]) if line < len(lines) else None
        look(f"{words}{' ' + unit[0].strip() if unit else ''}", line)

    for note in notes:
        line = text.count("\n", 0, note.start()) + 1
        look(prose(note[2]), line, " in a note")
        found += [(line, f"a note names {name}: no such file") for name in FILE_NAME.findall(note[2])
                  if not any(any(place.glob(name)) for place in (path.parent, root))]
    for note in notes:
        line = text.count("\n", 0, note.start()) + 1
        found += [(line, f"the note on {number} has no number to be about")
                  for number in note[1].split() if number not in met]
    return sorted(found)


def readmes(root: Path = ROOT) -> Iterable[Path]:
    """The READMEs that have numbers: the first page, the records' and the ladders'."""
    return [root / "README.md", *sorted((root / "records").rglob("README.md"))]


def check(root: Path = ROOT) -> list[str]:
    """`README:LINE: what is wrong` of all READMEs below `root`."""
    return [f"{path.relative_to(root)}:{line}: {what}"
            for path in readmes(root) if path.is_file() for line, what in unsupported(path, root)]
