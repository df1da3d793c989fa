"""The ladders: what is asked, curves, differences by compute with their lines, verdicts."""

from __future__ import annotations

import math
from pathlib import Path

import family
import ladder_report
from family import Misuse
from ladder_report import compute, contest

from pages.figures import MARKERS, MUTED, Axis, Figure, Series
from pages.prose import Prose

STEPS = 40  # points of a line


def page(root: Path, text: Prose) -> dict:
    """Climbed ladders first, then the questions that wait."""
    climbed, waiting, problems = [], [], []
    for path in sorted((root / "records" / "ladder").glob("*/ladder.json")):
        name = path.parent.name
        try:
            asked, results = family.read_json(path), path.parent / "results.json"
            numbers = family.read_json(results) if results.is_file() else {}
            ladder = {"name": name, "question": str(asked["question"]),
                      "arms": {arm: str(each.get("why", "")) for arm, each in asked["arms"].items()}}
            if numbers.get("arms"):
                climbed.append({**ladder, **shown(name, numbers, text)})
            else:
                waiting.append(ladder)
        except Misuse as error:
            problems.append(str(error).replace(f"{root}/", ""))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            problems.append(f"records/ladder/{name}: its files are not those of a ladder ({error!r})")
    readme = root / "records" / "ladder" / "README.md"
    return {"climbed": climbed, "waiting": waiting, "problems": problems, "about": text.html(
        ladder_report.ABOUT, "About"), "readme": text.html(readme.read_text(), "Ladders", 2)
        if readme.is_file() else ""}


def shown(name: str, numbers: dict, text: Prose) -> dict:
    """Figures and tables of one ladder's results.json. Of many comparisons those have a figure that are
    decided on some rung; the tables have all.
    """
    points = {row["arm"]: [each for each in numbers["arms"] if each["arm"] == row["arm"]]
              for row in numbers["trends"] if row["rungs"]}
    few = len(points) <= ladder_report.PANELS
    of_arms = [differences(row, points[row["arm"]]) for row in numbers["trends"] if row["arm"] in points
               and (few or any(each["word"] != "undecided" for each in points[row["arm"]]))]
    parts = {
        "Verdicts": ladder_report.trend_table(numbers["trends"]),
        "Arms against the base": ladder_report.arm_table(numbers["arms"]),
        "Rungs": ladder_report.rung_table(numbers["rungs"]),
    }
    if numbers.get("curves"):
        parts["Curves"] = ladder_report.curve_table(numbers["curves"])
    tables = [(title, text.html(table, f"{name}: {title}")) for title, table in parts.items()]
    return {"figures": [scores(numbers), *of_arms], "tables": tables, "left_out": numbers.get("left_out", []),
            "rungs": sum(row["bpb"] is not None for row in numbers["rungs"]),
            "of": len(numbers["rungs"]), "machines": text.html(" ".join(
                [*numbers.get("scripts", []), *numbers.get("machines", [])]), name)}


def scores(numbers: dict) -> Figure:
    """BPB of every seed by compute."""
    series, rows = [], []
    for i, (arm, of_rungs) in enumerate(numbers["scores"].items()):
        points = [(math.exp(compute(rung)), value) for rung, values in of_rungs.items() for value in values]
        series.append(Series(arm, points, i % len(MARKERS), "dots"))
        rows += [[arm, rung, f"{math.exp(compute(rung)):.2e}", " ".join(f"{value:.4f}" for value in values)]
                 for rung, values in of_rungs.items()]
    return Figure(
        "BPB by compute", Axis("FLOPs of training", log=True), Axis("BPB"), series,
        f"BPB of {len(series)} arms by compute, every seed a mark.",
        "Every seed a mark; compute is 6 x block weights x bytes of text.",
        ["arm", "rung", "FLOPs", "BPB of the seeds"], rows)


def differences(row: dict, points: list[dict]) -> Figure:
    """One arm against the base: seeds, means with intervals, and the line to the contest's compute."""
    places = {each["rung"]: math.exp(compute(each["rung"])) for each in points}
    series = [Series("a pair of seeds", [(places[each["rung"]], value) for each in points
                                         for value in each["differences"]], MUTED, "dots")]
    ends = [each["interval"] or [each["difference"]] * 2 for each in points]
    series.append(Series("mean with its 95 % interval", [(places[each["rung"]], each["difference"])
                                                          for each in points], 0, "dots",
                         [low for low, _ in ends], [high for _, high in ends]))
    line = ladder_report.trend({each["rung"]: each["differences"] for each in points})["line"]
    if line:
        first = min(map(compute, places))
        x = [first + (contest() - first) * i / (STEPS - 1) for i in range(STEPS)]
        band = [line.prediction(at) for at in x]
        wide = not math.isfinite(band[0][0])
        series.append(Series("line, and its band for one new pair",
                             [(math.exp(at), line.at(at)) for at in x], 1,
                             low=() if wide else [low for low, _ in band],
                             high=() if wide else [high for _, high in band]))
    rows = [[each["rung"], f"{places[each['rung']]:.2e}", f"{each['difference']:+.4f}",
             ladder_report.span(each["interval"]), each["word"]] for each in points]
    return Figure(
        f"{row['arm']}: {row['verdict']}", Axis("FLOPs of training", log=True),
        Axis("BPB against the base"), series,
        f"Differences of {row['arm']} against the base by compute.",
        f"At the highest rung: {row['word']}." + (" Dotted: the contest's compute." if line else ""),
        ["rung", "FLOPs", "difference", "95 % interval", "verdict"], rows,
        {math.exp(contest()): "the contest"} if line else {}, zero=True)
