"""Tables, verdicts and the plot of a ladder: what scripts/ladder.py makes of the runs that it has kept."""

from __future__ import annotations

import io
import json
import math
import re
import statistics
from collections import Counter

import numpy as np
import rungs
from family import markdown_table, read_json, write_atomic
from leaderboard import STYLES, digest, stored_digest, style
from stats import paired, spread, word
from trends import FEWEST_RUNGS, Fitted, Line, fitted, verdict

BLOCK = re.compile(r"(<!-- ladder -->\n).*?(<!-- end -->)", re.S)
BYTES_OFF = 0.02  # of the base's bytes, beyond which an arm is marked
UNEVEN = 1.2  # slowest of a base's runs at a rung by its fastest, beyond which nothing is said of equal time
TENFOLD = math.log(10)

# {(rung, arm, seed): metrics}
Runs = dict[tuple[str, str, int], dict]


def compute(rung: str) -> float:
    """ln of the FLOPs of training at a rung: 6 x block weights, with MLPs of two widths, x bytes of text.
    Attention, whose share is the same at every rung, is left out; so are a base's or an arm's own weights,
    which change it by a factor that is the same at every rung, too.
    """
    return math.log(6 * rungs.weights(float(rung)) * rungs.text(float(rung)))


def contest() -> float:
    return math.log(6 * rungs.WEIGHTS * rungs.TEXT * rungs.WEIGHTS)


# --- Which runs ---


def select(runs: Runs, present: dict[str, str], equal: dict[str, dict[str, str]]
           ) -> tuple[Runs, list[str], list[str]]:
    """(runs that are compared, why others are not, lines about the scripts in use).

    Of the arms of one script those runs count that one text of it made, or texts shown to be equal: the
    present one if it has made any, else the one with the most runs.
    """
    left_out, notes, kept = [], [], {}
    data = Counter(run["dataset"].get("sha256") for run in runs.values() if "dataset" in run)
    for script in dict.fromkeys(present.values()):
        mine = {key: run for key, run in runs.items() if present[key[1]] == script}
        made = {key: run["script_sha256"] for key, run in mine.items()}
        stands = {key: equal[key[1]].get(sha, sha) for key, sha in made.items()}
        classes, used = Counter(stands.values()), set()
        if not classes:
            continue
        now = {equal[arm].get(script, script) for _, arm, _ in mine}
        counted = now if now & {*classes} else {classes.most_common(1)[0][0]}
        for key, run in mine.items():
            sha = run["script_sha256"]
            name = "{} {} seed {}".format(*key)
            if stands[key] not in counted:
                left_out.append(f"{name}: script {sha[:8]}")
            elif run["dataset"].get("sha256") != data.most_common(1)[0][0]:
                left_out.append(f"{name}: other data")
            else:
                kept[key] = run
                used.add(sha)
        arms = [arm for arm in present if present[arm] == script]
        note = f"Script of {', '.join(arms)}: {', '.join(f'`{sha[:8]}`' for sha in sorted(used))}"
        if counted != now:
            note += f"; the present one is `{script[:8]}`, and nothing has shown that it is equal"
        elif script not in used:
            note += f", shown to be equal to the present one, `{script[:8]}` (carried.json)"
        notes.append(note + ".")
    return kept, left_out, notes


# --- Numbers ---


def step_ms(run: dict) -> float:
    return run.get("median_ms_per_step", run["ms_per_step"])


def time_ratio(pair: list[tuple[dict, dict]]) -> float | None:
    """Training time of the first of each pair by the second's; None where machines or threads differ."""
    if any(a["device"] != b["device"] for a, b in pair):
        return None
    return statistics.mean(step_ms(a) * a["steps"] / (step_ms(b) * b["steps"]) for a, b in pair)


def uneven(runs: list[dict]) -> bool:
    """Whether equal runs differ so much in time that a ratio of times tells of the machine, not of an arm."""
    times = [step_ms(run) for run in runs]
    return len(times) > 1 and max(times) > UNEVEN * min(times)


def finite(interval) -> list[float] | None:
    """JSON has no infinity."""
    return [*map(float, interval)] if interval and all(map(math.isfinite, interval)) else None


def block_weights(rung: str, settings: dict) -> int:
    """Of a base with these settings at a rung; without an MLP_MULT, of MLPs of two widths, as rungs count."""
    layers, width = rungs.shape(float(rung))
    return round(layers * width**2 * (3 + 2 * float(settings.get("MLP_MULT", 2))))


def rung_rows(ladder, runs: Runs) -> list[dict]:
    """The rungs themselves, by their base."""
    rows = []
    anywhere = [run["settings"] for (_, arm, _), run in runs.items() if arm == "base"]
    own = {"MLP_MULT": anywhere[0]["MLP_MULT"]} if anywhere and "MLP_MULT" in anywhere[0] else {}
    for rung in ladder.rungs:
        base = [run for (name, arm, _), run in runs.items() if (name, arm) == (rung, "base")]
        settings = base[0]["settings"] if base else rungs.proportions(float(rung), ladder.per_id) | own
        scores = [run["val_bpb"] for run in base]
        rows.append({
            "rung": rung, "weights": block_weights(rung, settings), "layers": int(settings["NUM_LAYERS"]),
            "width": int(settings["MODEL_DIM"]), "heads": int(settings["NUM_HEADS"]),
            "sequence": int(settings["TRAIN_SEQ_LEN"]),
            "batch": round(ladder.per_id * int(settings["TRAIN_BATCH_TOKENS"])),
            "steps": int(settings["ITERATIONS"]), "compute": math.exp(compute(rung)), "seeds": len(base),
            "bpb": statistics.mean(scores) if scores else None,
            "sd": statistics.stdev(scores) if len(scores) > 1 else None,
            "bytes": statistics.mean(run["bytes_model"] for run in base) if base else None,
            "seconds": statistics.mean(sum(run["clocks"].values()) for run in base) if base else None,
        })
    return rows


def slopes(rows: list[dict]) -> dict[str, float]:
    """{rung: BPB an e-fold of compute} of the base, between a rung and its neighbours."""
    known = [(compute(row["rung"]), row["bpb"], row["rung"]) for row in rows if row["bpb"] is not None]
    if len(known) < 2:
        return {}
    x, y, names = zip(*known)
    return dict(zip(names, map(float, np.gradient(y, x))))


def planned_arms(ladder) -> dict[str, dict]:
    """{arm: its script, settings and milliseconds of a step at the contest's size}, of contest.json."""
    path = ladder.folder / "contest.json"
    return read_json(path)["arms"] if path.is_file() else {}


def arm_rows(ladder, runs: Runs, slope: dict[str, float]) -> list[dict]:
    """Each arm against the base, or another arm, at each rung, seeds paired."""
    rows, arms = [], planned_arms(ladder)
    runs_planned = {arm: row["ms"] * int(row["settings"]["ITERATIONS"]) for arm, row in arms.items()}
    for name, (arm, other) in ladder.comparisons().items():
        for rung in ladder.rungs:
            pair = {seed: (runs[rung, arm, seed], runs[rung, other, seed]) for seed in ladder.seeds[rung]
                    if (rung, arm, seed) in runs and (rung, other, seed) in runs}
            if not pair:
                continue
            mine, base = ({seed: both[i]["val_bpb"] for seed, both in pair.items()} for i in (0, 1))
            found = paired(mine, base)
            size = statistics.mean(a["bytes_model"] / b["bytes_model"] for a, b in pair.values())
            time = time_ratio([*pair.values()])
            even = time is not None and not any(
                uneven([run for (at, name, _), run in runs.items() if (at, name) == (rung, each)])
                for each in (arm, other))
            # More time on the same machine is more text for the same model: about the base's own slope.
            price = -slope[rung] * math.log(time) if rung in slope and even else None
            known = arm in runs_planned and other in runs_planned
            planned = runs_planned[arm] / runs_planned[other] if known else None
            charge = -slope[rung] * math.log(planned) if rung in slope and planned else None
            rows.append({
                "arm": name, "rung": rung, "seeds": sorted(pair),
                "differences": [mine[seed] - base[seed] for seed in sorted(pair)],
                "difference": found.difference, "interval": finite(found.interval), "word": found.word,
                "bytes": size, "time": time if even else None, "price": price,
                "at_equal_time": None if price is None else found.difference + price,
                "planned_time": planned,
                "at_equal_planned_time": None if charge is None else found.difference + charge,
            })
    return rows


def trend(points: dict[str, list[float]]) -> dict:
    """A line through {rung: differences}, what it says about the contest, and the highest rung left out."""
    far = contest()
    flat = [(compute(rung), value) for rung, values in points.items() for value in values]
    x = sorted({each for each, _ in flat})
    if len(x) < 2:
        return {"rungs": len(x), "verdict": "undecided", "word": "undecided", "line": None}
    line = Line.through(flat)
    found = {
        "rungs": len(x), "pairs": len(flat), "verdict": verdict(line, x, far), "bent": line.bent,
        "word": word(line.interval(max(x))), "slope": TENFOLD * line.slope,
        "slope_interval": finite([TENFOLD * each for each in line.slope_interval]),
        "at_contest": line.at(far), "contest_interval": finite(line.interval(far)),
        "contest_prediction": finite(line.prediction(far)), "line": line,
    }
    if len(x) >= FEWEST_RUNGS:
        lower, top = [each for each in flat if each[0] < x[-1]], [y for at, y in flat if at == x[-1]]
        found["left_out"] = left_out(Line.through(lower), x[-1], top)
    return found


def left_out(line: Line, x: float, top: list[float]) -> dict:
    """The mean of the highest rung against what the rungs below predict."""
    interval, value = line.prediction(x, len(top)), statistics.mean(top)
    return {"predicted": line.at(x), "interval": finite(interval), "measured": value,
            "inside": interval[0] <= value <= interval[1] if finite(interval) else None}


def curves(ladder, runs: Runs) -> dict[str, Fitted]:
    """The absolute curve of each arm with four rungs or more: three fix it, the fourth tests it."""
    found = {}
    for arm in ladder.arms:
        scores: dict[float, list[float]] = {}
        for (rung, name, _), run in runs.items():
            if name == arm:
                scores.setdefault(compute(rung), []).append(run["val_bpb"])
        if len(scores) > 3 and (fit := fitted(scores)):
            found[arm] = fit
    return found


def curve_row(arm: str, fit: Fitted, scores: dict[float, list[float]]) -> dict:
    """Numbers of a curve; the highest rung by those below it, where they are three."""
    far = contest()
    row = {
        "arm": arm, "floor": fit.best.floor, "floor_interval": fit.interval(lambda each: each.floor),
        "exponent": fit.best.exponent, "exponent_interval": fit.interval(lambda each: each.exponent),
        "at_contest": fit.best.at(far), "contest_interval": fit.at(far),
    }
    top = max(scores)
    if below := fitted({x: values for x, values in scores.items() if x < top}):
        noise = spread(scores.values()) / math.sqrt(len(scores[top]))
        interval, value = below.at(top), statistics.mean(scores[top])
        wide = [interval[0] - 2 * noise, interval[1] + 2 * noise] if interval else None
        row["left_out"] = {"predicted": below.best.at(top), "interval": wide, "measured": value,
                           "inside": wide[0] <= value <= wide[1] if wide else None}
    return row


# --- Tables ---


def signed(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:+.{digits}f}"


def span(interval, form: str = "+.4f") -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}" if interval else ""


def rung_table(rows: list[dict]) -> str:
    def cells(row: dict) -> list[str]:
        score = "" if row["bpb"] is None else f"{row['bpb']:.4f}"
        size, seconds = row["bytes"], row["seconds"]
        return [
            row["rung"], f"{row['weights']:,}", f"{row['layers']} x {row['width']}, {row['heads']}",
            f"{row['sequence']:,}", f"{row['batch']:,}", f"{row['steps']:,}",
            f"{row['batch'] * row['steps'] / 1e6:.1f}", f"{row['compute']:.1e}", str(row["seeds"]), score,
            "" if row["sd"] is None else f"{row['sd']:.4f}",
            "" if size is None else f"{size:,.0f}", "" if size is None else f"{size / row['weights']:.2f}",
            "" if seconds is None else f"{seconds:,.0f}",
        ]
    header = ["rung", "block weights", "layers x width, heads", "sequence", "bytes a step", "steps",
              "MB of text", "FLOPs", "seeds", "base BPB", "sd", "artifact", "bytes a weight", "seconds a run"]
    return markdown_table(header, [cells(row) for row in rows])


def arm_table(rows: list[dict]) -> str:
    body = [[
        row["arm"], row["rung"], str(len(row["seeds"])), signed(row["difference"]), span(row["interval"]),
        row["word"], f"{row['bytes']:.3f}{' !' if abs(row['bytes'] - 1) > BYTES_OFF else ''}",
        "" if row["planned_time"] is None else f"{row['planned_time']:.2f}",
        signed(row["at_equal_planned_time"]),
        "" if row["time"] is None else f"{row['time']:.2f}", signed(row["at_equal_time"]),
    ] for row in rows]
    return markdown_table(["arm", "rung", "pairs", "difference", "95 % interval", "verdict", "ratio of bytes",
                           "ratio of planned times", "at equal planned time", "ratio of CPU times",
                           "at equal CPU time (estimate)"], body)


def checked(found: dict | None) -> str:
    if not found:
        return ""
    if found["inside"] is None:
        return f"{signed(found['measured'])} for {signed(found['predicted'])}"
    told = "inside" if found["inside"] else "**outside**"
    return f"{signed(found['measured'])}, {told} {span(found['interval'])}"


def trend_table(rows: list[dict]) -> str:
    body = []
    for row in rows:
        timed = row["timed"]
        body.append([
            row["arm"], str(row["rungs"]),
            signed(row.get("slope")) + " bent" * bool(row.get("bent")), span(row.get("slope_interval")),
            signed(row.get("at_contest")), span(row.get("contest_prediction")),
            f"**{row['verdict']}**", row["word"], checked(row.get("left_out")),
            f"{timed['verdict']} ({timed['word']})" if timed else "",
        ])
    return markdown_table(
        ["arm", "rungs", "a tenfold of compute", "95 % interval", "line at the contest's compute",
         "prediction interval", "verdict", "line at the highest rung", "highest rung from those below",
         "at equal CPU time (estimate)"], body)


def curve_table(rows: list[dict]) -> str:
    body = [[
        row["arm"], f"{row['floor']:.4f}", span(row["floor_interval"], ".3f"), f"{row['exponent']:.3f}",
        span(row["exponent_interval"], ".3f"), f"{row['at_contest']:.4f}",
        span(row["contest_interval"], ".4f"),
        checked(row.get("left_out")).replace("+", ""),
    ] for row in rows]
    return markdown_table(["arm", "floor E", "95 % interval", "exponent a", "95 % interval",
                           "at the contest's compute, on books", "95 % interval",
                           "highest rung from those below"], body)


ABOUT = """\
Differences are arm minus base, or minus the arm that is named, in BPB, seeds paired; below zero the arm is
better. Block weights are the base's own; FLOPs are 6 x block weights, with MLPs of two widths, x bytes of
text of the rung. The line goes through all pairs against the logarithm of compute; its prediction interval
is for one new pair at the contest's compute. The verdicts are defined in `scripts/trends.py`: *grows*
(away from zero), *stays*, *fades* (towards zero), *reverses* (turned where measured), *undecided*. *Line
at the highest rung* is the word on the line there, not on that rung's own pairs; of two rungs it is the
word that both have. "!" marks bytes that differ by more than 2 %. *At equal CPU time* charges an arm's
time with the base's own slope: an estimate, left out where equal runs differ by more than a fifth in time.
*At equal planned time* charges its run at the contest's size on eight H100s as `scripts/plan.py` has it
(contest.json), which no card has confirmed. All of it is measured on books, nothing on FineWeb."""


def block(ladder, numbers: dict) -> str:
    """What stands between the marks in README.md."""
    base = ladder.arms["base"].why
    ids = f", of ids that stand for {ladder.per_id:g} bytes" if ladder.per_id != 1 else ""
    about = [f"The base is {base}{ids}.", ""] if base != "the trunk" else []
    planned = planned_arms(ladder)
    arms = [[arm.name, arm.why, f"{planned[arm.name]['ms']:.1f}" if arm.name in planned else ""]
            for arm in ladder.arms.values()]
    parts = [f"**Question**: {ladder.question}", "", *about, "| arm | why | planned step, ms |",
             "| --- | --- | ---: |", *(f"| {' | '.join(cells)} |" for cells in arms), ""]
    parts += [rung_table(numbers["rungs"]), ""]
    if numbers["arms"]:
        parts += [trend_table(numbers["trends"]), "", arm_table(numbers["arms"]), ""]
    if numbers["curves"]:
        parts += ["BPB = E + A C^-a through the rungs' means, noise of the seeds drawn 400 times:", "",
                  curve_table(numbers["curves"]), ""]
    if numbers["outside"]:
        parts += ["The highest rung is **not** where the rungs below put it for "
                  f"{', '.join(numbers['outside'])}: there the extrapolation is not to be trusted.", ""]
    if numbers["arms"]:
        parts += ["![Differences by compute](ladder.png)", ""]
    parts += [ABOUT, "", *numbers["scripts"], *numbers["machines"]]
    if planned:
        texts = dict.fromkeys(f"`{row['script_sha256'][:8]}`" for row in planned.values())
        parts.append(f"Steps planned with {', '.join(texts)}.")
    if numbers["left_out"]:
        parts += ["", f"Not counted: {'; '.join(numbers['left_out'])}."]
    return "\n".join(parts) + "\n"


# --- The plot ---


PANELS = 15  # comparisons that have a panel each; more are rows of one panel a rung


def draw(ladder, numbers: dict, fits: dict[str, Fitted], key: str) -> bytes:
    """The plot as PNG bytes, which carry `key`; of few colours, for the pages that hold it."""
    import matplotlib.style  # here: no table needs it
    from PIL import Image, PngImagePlugin

    with matplotlib.style.context("default"):
        many = sum(row["rungs"] > 0 for row in numbers["trends"]) > PANELS
        figure = draw_rows(numbers) if many else draw_panels(ladder, numbers, fits)
        drawn, buffer = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, dpi=110)
    told = PngImagePlugin.PngInfo()
    told.add_text("Description", key)
    image = Image.open(drawn).convert("RGB")
    image = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(buffer, "PNG", optimize=True, pnginfo=told)
    return buffer.getvalue()


def draw_rows(numbers: dict):
    """A panel a rung, a row a comparison: differences and their intervals."""
    from matplotlib.figure import Figure

    names = [row["arm"] for row in numbers["trends"] if row["rungs"]]
    climbed = [row["rung"] for row in numbers["rungs"]]
    climbed = [rung for rung in climbed if any(point["rung"] == rung for point in numbers["arms"])]
    figure = Figure(figsize=(1.6 + 3.4 * len(climbed), 0.9 + 0.24 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(climbed), squeeze=False, sharey=True).flatten()
    for axes, rung in zip(panels, climbed):
        axes.axvline(0, color="#555555", linewidth=0.8)
        for point in numbers["arms"]:
            if point["rung"] != rung:
                continue
            x, y = point["difference"], names.index(point["arm"])
            seeds = point["differences"]
            axes.plot(seeds, [y] * len(seeds), "x", color="#999999", markersize=4)
            low, high = point["interval"] or (x, x)
            axes.errorbar([x], [y], xerr=[[x - low], [high - x]], fmt="o", color="#0072B2", markersize=4,
                          capsize=3)
        axes.set_title(f"rung {rung}", fontsize=9)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.supxlabel("BPB against the base, seeds paired; further left is better", fontsize=9)
    return figure


def draw_panels(ladder, numbers: dict, fits: dict[str, Fitted]):
    """The curves, then a panel a comparison: differences, intervals, the line, its band to the contest."""
    from matplotlib.figure import Figure

    shown = [row for row in numbers["trends"] if row["rungs"]]
    count = len(shown) + 1
    columns = min(3, count)
    figure = Figure(figsize=(4.3 * columns, 3.1 * -(-count // columns)), layout="constrained")
    panels = figure.subplots(-(-count // columns), columns, squeeze=False).flatten()
    for axes in panels[count:]:
        axes.set_axis_off()
    draw_curves(panels[0], ladder, numbers, fits)
    for axes, row in zip(panels[1:], shown):
        draw_arm(axes, row, [each for each in numbers["arms"] if each["arm"] == row["arm"]])
    for axes in panels[:count]:
        axes.set_xscale("log")
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.axvline(math.exp(contest()), color="#555555", linestyle=":", linewidth=1)
        axes.tick_params(labelsize=8)
    figure.supxlabel("FLOPs of training: 6 x block weights x bytes of text", fontsize=9)
    figure.supylabel("BPB; after the first panel\nless the base's, lower is better", fontsize=9)
    return figure


def draw_curves(axes, ladder, numbers: dict, fits: dict[str, Fitted]) -> None:
    for i, arm in enumerate(ladder.arms):
        points = [(math.exp(compute(rung)), value) for rung, values in numbers["scores"].get(arm, {}).items()
                  for value in values]
        if points:
            marker = style(i + i // len(STYLES))["marker"]  # a colour that comes again has another
            look = {"color": style(i)["color"], "marker": marker, "linestyle": "none"}
            axes.plot(*zip(*points), **look, markersize=4, label=arm)
        if arm in fits:
            x = np.linspace(min(map(compute, numbers["scores"][arm])), contest(), 60)
            y = [fits[arm].best.at(each) for each in x]
            axes.plot(np.exp(x), y, color=style(i)["color"], linewidth=0.9)
    axes.set_title("BPB on books; dotted: the contest's compute", fontsize=8)
    axes.legend(fontsize=6)


def draw_arm(axes, row: dict, points: list[dict]) -> None:
    axes.axhline(0, color="#555555", linewidth=0.8)
    for point in points:
        x, y = math.exp(compute(point["rung"])), point["difference"]
        axes.plot([x] * len(point["differences"]), point["differences"], "x", color="#999999", markersize=4)
        if point["interval"]:
            low, high = point["interval"]
            half = [[y - low], [high - y]]
            axes.errorbar([x], [y], half, fmt="o", color="#0072B2", markersize=4, capsize=3)
        else:
            axes.plot([x], [y], "o", color="#0072B2", markersize=4)
    if line := row["line"]:
        x = np.linspace(min(compute(point["rung"]) for point in points), contest(), 60)
        axes.plot(np.exp(x), [line.at(each) for each in x], color="#D55E00", linewidth=1)
        band = [line.prediction(each) for each in x]
        if finite(band[0]):
            axes.fill_between(np.exp(x), *zip(*band), color="#D55E00", alpha=0.12, linewidth=0)
        # Wide bands leave the panel, so that what was measured can be read.
        shown = [0.0, line.at(x[0]), line.at(x[-1]), *(y for point in points for y in point["differences"])]
        spare = 0.3 * (max(shown) - min(shown)) or 1e-3
        axes.set_ylim(min(shown) - spare, max(shown) + spare)
    axes.set_title(f"{row['arm']}: {row['verdict']} ({row['word']})", fontsize=8)


# --- All of it ---


def numbers_of(ladder, runs: Runs) -> tuple[dict, dict[str, Fitted]]:
    """Everything that the tables and the plot are made of."""
    rung_numbers = rung_rows(ladder, runs)
    arms = arm_rows(ladder, runs, slopes(rung_numbers))
    scores: dict[str, dict[str, list[float]]] = {}
    for (rung, arm, _), run in sorted(runs.items(), key=lambda each: (float(each[0][0]), *each[0][1:])):
        scores.setdefault(arm, {}).setdefault(rung, []).append(run["val_bpb"])

    trends = []
    for name in ladder.comparisons():
        mine = [row for row in arms if row["arm"] == name]
        if not mine:
            continue
        row = {"arm": name, **trend({each["rung"]: each["differences"] for each in mine})}
        if row["rungs"] < FEWEST_RUNGS:
            words = {each["word"] for each in mine}
            row["word"] = words.pop() if len(words) == 1 else "undecided"
        priced = all(each["price"] is not None for each in mine)
        timed = {each["rung"]: [value + each["price"] for value in each["differences"]]
                 for each in mine} if priced else {}
        row["timed"] = trend(timed) if len(timed) >= FEWEST_RUNGS else None
        trends.append(row)

    fits = curves(ladder, runs)
    rows = [curve_row(arm, fit, {compute(rung): values for rung, values in scores[arm].items()})
            for arm, fit in fits.items()]
    outside = [row["arm"] for row in (*trends, *rows) if (row.get("left_out") or {}).get("inside") is False]
    return {"rungs": rung_numbers, "arms": arms, "trends": trends, "curves": rows, "scores": scores,
            "outside": [*dict.fromkeys(outside)]}, fits


def machines(runs: Runs) -> list[str]:
    """A line about what ran where, and on which text."""
    if not runs:
        return []
    kinds = Counter(f"{run['device']}, torch {run['torch']}" for run in runs.values())
    data = next(iter(runs.values()))["dataset"]
    evals = [run["evals"][run["headline"]] for run in runs.values()]
    sizes = ", ".join(f"{size:,}" for size in sorted({entry["bytes"] for entry in evals}))
    heads = ", ".join(f"`{name}`" for name in sorted({run["headline"] for run in runs.values()}))
    return [f"{len(runs)} runs, {'; '.join(f'{n} on {kind}' for kind, n in kinds.items())}; data "
            f"`{data.get('name')}` (`{str(data.get('sha256'))[:8]}`); {heads} on {sizes} validation bytes."]


def plain(value):
    """What results.json holds of it."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items() if key != "line"}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def write_report(ladder, runs: Runs, left_out: list[str], present: dict[str, str],
                 equal: dict[str, dict[str, str]]) -> str:
    """Writes README.md, results.json and ladder.png -> the tables.

    present: {arm: sha256 of its script now}; equal: {arm: of `ladder.equal_scripts`}.
    """
    counted, more, scripts = select(runs, present, equal)
    numbers, fits = numbers_of(ladder, counted)
    numbers |= {"scripts": scripts, "machines": machines(counted), "left_out": [*left_out, *more]}
    text = block(ladder, numbers)

    readme = ladder.folder / "README.md"
    old = readme.read_text() if readme.exists() else f"# Ladder: {ladder.name}\n"
    if not BLOCK.search(old):
        old += "\n<!-- ladder -->\n<!-- end -->\n"
    write_atomic(readme, BLOCK.sub(lambda match: f"{match[1]}{text}{match[2]}", old).encode())
    shown = plain(numbers)
    write_atomic(ladder.folder / "results.json", f"{json.dumps(shown, indent=1)}\n".encode())
    plot, key = ladder.folder / "ladder.png", digest(shown)
    if numbers["arms"] and stored_digest(plot) != key:
        write_atomic(plot, draw(ladder, numbers, fits, key))
    elif not numbers["arms"]:
        plot.unlink(missing_ok=True)
    return text
