"""The page of one record: its numbers, what it changes, where its bits and bytes go, and its proofs."""

from __future__ import annotations

import math
import re
from pathlib import Path

import family
import leaderboard
import lineage
import tables
from symbols import Script

from pages import prose
from pages.board import row
from pages.figures import MUTED, Axis, Figure, Series
from pages.found import Entry, Repository, slug

WORDS = ("better", "no effect", "undecided", "worse")  # the order of colours, and of legends
SIZE_PLAN = re.compile(rb"^size_plan:(\d+) \+ code:(\d+) of (\d+) bytes: (.*)$", re.M)
COMMANDS = re.compile(r"command|try it", re.I)
LEGALITY = re.compile(r"legality", re.I)
PROOF = re.compile(r"^proof", re.I)


def page(entry: Entry, repository: Repository, text: prose.Prose) -> dict:
    record, folder, base = entry.record, entry.record.folder, repository.base(entry)
    parts = prose.sections(entry.readme)

    def written(title: re.Pattern) -> list[tuple[str, str]]:
        return [(name, text.html(body, name, 1)) for name, body in parts.items() if title.search(name)]

    def table(kind: str) -> str | None:
        made = entry.attempt(f"table {kind}", lambda: tables.KINDS[kind](folder, None))
        line = tables.of_script(kind, folder, None, repository.root) if made else ""
        return text.html(f"{made}{line}", f"{entry.title}: {kind}") if made else None

    measured = record.group is not None
    curves = entry.attempt("loss", lambda: losses(entry, base)) if measured else None
    return {
        "entry": entry, "record": record, "base": base, "measured": measured,
        "row": entry.attempt("score", lambda: row(entry)) if entry.group else None,
        "curves": curves or [], "passes": table("passes") if measured else None,
        "seeds": table("seeds") if measured else None,
        "ideas": entry.attempt("changes", lambda: ideas(entry, repository.root)),
        "bits": (entry.attempt("bits", lambda: bits(entry, base)) if measured else None) or [],
        "artifact": entry.attempt("artifact", lambda: artifact(entry)) if measured else None,
        "ablations": ablations(entry), "commands": written(COMMANDS), "legality": written(LEGALITY),
        "audits": [] if "<!-- table: audit" in entry.readme else found_tables(
            entry, "audit", "audit.json", text), "proof_text": written(PROOF),
        "proofs": found_tables(entry, "proofs", "prove_*.json", text),
        "carried": record.submission.get("carried", []),
        "readme": text.html(entry.readme, f"{entry.title}: README", 2),
        "problems": [*dict.fromkeys(entry.problems)],
    }


# --- What changed ---


def ideas(entry: Entry, root: Path) -> dict | None:
    """Every idea with its reason and its symbols, each with the lines that came and went."""
    submission, declared, parent = lineage.read_submission(entry.record.folder, root)
    if parent is None:
        return None
    scripts = Script.read(parent), Script.read(entry.record.folder / "train_gpt.py")
    pairs = [pair for pair in lineage.pairs(*scripts, reach=False) if pair.status != "identical"]
    reasons = {name: each["reason"] for name, each in submission.get("changes", {}).items()}
    groups = {name: {"name": name, "reason": reason, "symbols": [], "added": 0, "removed": 0}
              for name, reason in reasons.items()}

    seen = set()
    for pair in pairs:
        other = "the docstring" if pair.name == "docstring" else "no idea names these"
        idea = groups.setdefault(declared.get(pair.name, other), {
            "name": declared.get(pair.name, other), "reason": "", "symbols": [], "added": 0, "removed": 0})
        added, removed = pair.lines()
        # `A, B = 1, 2` is two names and one text.
        if (id(pair.a), id(pair.b)) not in seen:
            seen.add((id(pair.a), id(pair.b)))
            idea["added"] += added
            idea["removed"] += removed
        idea["symbols"].append({"name": pair.name, "status": pair.status, "added": added, "removed": removed})
    own = parent.resolve().parent
    return {"parent": "trunk" if own == root.resolve() else slug(own.name), "ideas": [*groups.values()],
            "count": len(pairs)}


# --- Figures ---


def losses(entry: Entry, base: Entry | None) -> list[Figure]:
    """Training losses over bytes and over seconds, the base's behind them; none without a curve."""
    if not entry.band:
        return []
    header = ["bytes of text", "seconds", "mean of the seeds, BPB", "lowest", "highest"]
    rows = [[f"{point.seen:,.0f}", f"{point.seconds:,.1f}", f"{point.mean:.4f}", f"{point.low:.4f}",
             f"{point.high:.4f}"] for point in entry.band]
    checks = [(seen / 1e6, score) for curve in entry.curves.values() for seen, score in curve["val"]]
    scored = [Series("validation of the raw weights, a seed a mark", checks, 1, "dots")] if checks else []
    return [
        Figure("Loss by bytes", Axis("MB of text", log=True), Axis("BPB", log=True),
               [*bands(entry, base, "seen", 1e6), *scored],
               f"Training loss of {entry.title} against bytes of text{against(base)}.",
               "Running mean over 10 % of the bytes to either side; the band goes from the lowest seed to "
               "the highest.", header, rows),
        Figure("Loss by seconds", Axis("seconds of training", log=True), Axis("BPB", log=True),
               bands(entry, base, "seconds", 1.0),
               f"Training loss of {entry.title} against seconds{against(base)}.",
               f"On {entry.record.hardware}: other machines take other times."),
    ]


def against(base: Entry | None) -> str:
    return f", and {base.title} for comparison" if base and base.band else ""


def bands(entry: Entry, base: Entry | None, place: str, unit: float) -> list[Series]:
    """The curve of the base, muted, and the record's with its seeds as a band, over a field of `Band`."""
    series = []
    if base and base.band:
        points = [(getattr(point, place) / unit, point.mean) for point in base.band]
        series.append(Series(f"{base.title}, for comparison", points, MUTED))
    points = [(getattr(point, place) / unit, point.mean) for point in entry.band]
    low, high = [point.low for point in entry.band], [point.high for point in entry.band]
    return [*series, Series(entry.title, points, 0, low=low, high=high)]


def bits(entry: Entry, base: Entry | None) -> list[Figure]:
    """Bits by class of byte; with a base also the differences, which add up to that of the scores."""
    mine = leaderboard.class_bits(entry.record)
    theirs = leaderboard.class_bits(base.record) if base else {}
    if not mine:
        return []
    theirs = theirs if theirs.keys() == mine.keys() else {}  # other ids have other classes
    names, whole = sorted(mine, key=mine.get, reverse=True), sum(mine.values())
    gains = {name: mine[name] - theirs.get(name, 0.0) for name in names} if theirs else {}
    header = ["class", "BPB", "share"] + ([f"{base.title}, BPB", "difference"] if theirs else [])
    rows = [[name, f"{mine[name]:.4f}", f"{mine[name] / whole:.1%}"]
            + ([f"{theirs.get(name, 0.0):.4f}", f"{gains[name]:+.4f}"] if theirs else []) for name in names]
    made = [Figure(
        "Where the bits go", Axis("bits of the class over all bytes, BPB"), Axis("", names=names),
        [Series(entry.title, [(mine[name], at) for at, name in enumerate(names)], 0, "bars")],
        f"Bits that {entry.title} spends on each class of byte.",
        "By class of the byte that is predicted, mean of the seeds; the classes add up to the score.",
        header, rows)]
    if theirs:
        made.append(Figure(
            f"The same against {base.title}", Axis("BPB, difference; below zero is better"),
            Axis("", names=names),
            [Series("difference", [(gains[name], at) for at, name in enumerate(names)], 0, "bars")],
            f"Differences in bits between {entry.title} and {base.title} by class of byte.",
            f"They add up to {sum(gains.values()):+.4f}.", zero=True))
    return made


def size_plan(path: Path) -> dict[str, int]:
    """{class of tensors: planned bytes} as a log says it after the script at its head; else nothing."""
    if not path.is_file():
        return {}
    told = SIZE_PLAN.findall(path.read_bytes().partition(family.LOG_RULER)[2])
    if not told:
        return {}
    pairs = (part.split(":") for part in told[-1][3].decode(errors="replace").split())
    return {name: int(size) for name, size in pairs if int(size)}


def artifact(entry: Entry) -> Figure:
    """Bytes by class of tensors, as far as a log has them: as the script plans them before it trains."""
    group = entry.record.group
    logs = [size_plan(Path(run.where).with_name("log.txt")) for run in group.runs]
    plan = next((each for each in logs if each), {})
    packed = max(run.metrics["bytes_model"] for run in group.runs)
    tensors = plan or {"tensors": packed}
    sizes = {**tensors, "code": entry.record.bytes_total - packed}
    sizes = {name: sizes[name] for name in sorted(sizes, key=sizes.get, reverse=True)}
    whole = sum(sizes.values())
    note = "The logs of this record do not tell classes of tensors apart."
    if plan:
        note = (f"Tensors as the script plans them before it trains, {sum(plan.values()):,} bytes; the "
                f"packed file has {packed:,}.")
    return Figure(
        "Bytes of the artifact", Axis("kB"), Axis("", names=[*sizes]),
        [Series("bytes", [(size / 1e3, at) for at, size in enumerate(sizes.values())], 0, "bars")],
        f"Bytes of {entry.title} by class of tensors, and of its code.", note,
        ["class", "bytes", "share"],
        [[name, f"{size:,}", f"{size / whole:.1%}"] for name, size in sizes.items()])


def ablations(entry: Entry) -> list[Figure]:
    """A dot plot for every folder of arms below the record's."""
    made = []
    for path in sorted(entry.record.folder.rglob("ablations/arms.json")):
        place = path.parent.parent
        inside = place.relative_to(entry.record.folder).as_posix()
        if figure := entry.attempt(f"ablation {inside}", lambda place=place: ablation(entry, place)):
            made.append(figure)
    return made


def ablation(entry: Entry, place: Path) -> Figure:
    base, *arms = tables.ablation_arms(place)
    found = [(arm, *tables.verdict(arm.differences)) for arm in arms]
    series = []
    for colour, word in enumerate(WORDS):
        chosen = [(at, mean, half) for at, (_, mean, half, told) in enumerate(found) if told == word]
        ends = [half if math.isfinite(half) else 0.0 for *_, half in chosen]
        if chosen:
            series.append(Series(
                word, [(mean, at) for at, mean, _ in chosen], (3, 6, 2, 1)[colour], "dots",
                [mean - end for (_, mean, _), end in zip(chosen, ends)],
                [mean + end for (_, mean, _), end in zip(chosen, ends)]))
    inside = place.relative_to(entry.record.folder).as_posix()
    rows = [[arm.why.replace("`", ""), f"{arm.score:.4f}", f"{mean:+.4f}",
             f"{mean - half:+.4f} to {mean + half:+.4f}" if math.isfinite(half) else "one seed", word,
             f"{arm.step_time:.2f}"] for arm, mean, half, word in found]
    line = tables.of_script("ablation", place, None, entry.record.folder.parent.parent).strip()
    note = " ".join([f"Base: {base.why}, {base.score:.4f}.", tables.ablation_note([base, *arms]), line])
    return Figure(
        "Ablation" if inside == "." else f"Ablation, {inside}",
        Axis("BPB against the base; below zero is better"),
        Axis("", names=[arm.why.replace("`", "") for arm in arms]), series,
        f"Differences of {len(arms)} arms against the base with 95 % intervals.",
        note.replace("`", "").replace("*", ""),
        ["arm", "BPB", "difference", "95 % interval", "verdict", "step time"], rows, zero=True)


# --- Proofs ---


def found_tables(entry: Entry, kind: str, pattern: str, text: prose.Prose) -> list[str]:
    """A table of every folder of the record that has files of this kind."""
    made = []
    for folder in sorted({path.parent for path in entry.record.folder.rglob(pattern)}):
        table = entry.attempt(f"table {kind}", lambda folder=folder: tables.KINDS[kind](folder, None))
        if table:
            line = tables.of_script(kind, folder, None, entry.record.folder.parent.parent)
            made.append(text.html(f"{table}{line}", f"{entry.title}: {kind}"))
    return made
