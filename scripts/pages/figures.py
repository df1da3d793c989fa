"""Figures as SVG that belong to the page around them.

Matplotlib draws; its colours are then replaced by the page's, so that one file reads in the light and in the
dark. Beside its picture a figure keeps its numbers: JavaScript reads them for the point under the pointer, a
table shows them to everybody else, and the tests hold both against the records' files.
"""

from __future__ import annotations

import io
import json
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from markupsafe import Markup

MARKERS = "os^DvPX*"  # a series is told by its marker too
MUTED = len(MARKERS)  # the colour of what a figure shows for comparison

# Colours that matplotlib is told, and the page's that take their place.
TEXT, GRID, SERIES = "#b00000", "#b00001", "#a0000{:x}"
PAGE = {TEXT: "var(--quiet)", GRID: "var(--line)", SERIES.format(MUTED): "var(--muted)"}
PAGE |= {SERIES.format(i): f"var(--series-{i})" for i in range(len(MARKERS))}
WIDTH = 4.7  # inches of 72 units: a phone shows a unit as a pixel, a column of a wide page as one and a half


@dataclass(frozen=True)
class Series:
    """Points (x, y) under one name. `low` and `high` are the ends of a band around a line, or of an interval
    about each dot: along y, or along x where y counts categories.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    kind: str = "line"  # or dots, bars
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Axis:
    label: str
    log: bool = False
    names: Sequence[str] = ()  # categories, the first one on top


@dataclass(frozen=True)
class Figure:
    """A plot, and in words what it shows.

    `summary` is what a screen reader says of it; `header` and `rows` are its numbers as a table. `rules` are
    lines at a value of x, {value: what it is}; `zero` is a line at zero of the differences.
    """

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    summary: str
    note: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    rules: dict[float, str] = field(default_factory=dict)
    zero: bool = False

    @cached_property
    def drawn(self) -> tuple[str, tuple[float, float, float, float], list[list[float]]]:
        return draw(self)

    @property
    def svg(self) -> Markup:
        return Markup(self.drawn[0])

    @property
    def numbers(self) -> Markup:
        """Where a point lies in the picture, and which points there are."""
        _, box, limits = self.drawn
        axes = {name: {"label": axis.label, "log": axis.log, "limits": ends, "names": list(axis.names)}
                for name, axis, ends in zip("xy", (self.x, self.y), limits)}
        series = [{"name": each.name, "kind": each.kind,
                   "points": [[*map(short, point)] for point in each.points]} for each in self.series]
        return as_script({"box": [round(each, 2) for each in box], **axes, "series": series})


def short(value: float) -> float:
    """Seven digits are finer than a pixel."""
    return float(f"{value:.7g}")


def as_json(value) -> str:
    """JSON for a file of its own. ValueError for a number JSON lacks."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def as_script(value) -> Markup:
    """JSON for a page: nothing in it can end the element around it. ValueError for a number JSON lacks."""
    text = as_json(value)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [point for point in points if all(map(math.isfinite, point))]


def draw(figure: Figure) -> tuple[str, tuple[float, float, float, float], list[list[float]]]:
    """(SVG, the axes' left, top, right and bottom in its units, limits of x and of y)."""
    import matplotlib.style
    from matplotlib.figure import Figure as Canvas

    look = {
        "svg.fonttype": "none", "svg.hashsalt": figure.title, "font.family": "sans-serif", "font.size": 10,
        "axes.edgecolor": GRID, "axes.labelcolor": TEXT, "text.color": TEXT, "xtick.color": TEXT,
        "ytick.color": TEXT, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True, "xtick.major.size": 0,
        "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    }
    with matplotlib.style.context("default"), matplotlib.rc_context(look):
        lines = sum(len(wrapped(name)) + 0.9 for name in figure.y.names)
        height = 0.75 + 0.16 * lines if figure.y.names else 3.1
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        axes = canvas.subplots()
        for value in figure.rules:
            axes.axvline(value, color=TEXT, linestyle=":", linewidth=1)
        if figure.zero:
            (axes.axvline if figure.y.names else axes.axhline)(0, color=TEXT, linewidth=0.9)
        for i, series in enumerate(figure.series):
            draw_series(axes, series, f"series-{i}", bool(figure.y.names))
        scale(axes, figure)

        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        place, width, height = axes.get_position(), 72 * WIDTH, 72 * height
        box = place.x0 * width, (1 - place.y1) * height, place.x1 * width, (1 - place.y0) * height
        limits = [[*map(float, axes.get_xlim())], [*map(float, axes.get_ylim())]]
    return of_the_page(buffer.getvalue()), box, limits


def draw_series(axes, series: Series, gid: str, categories: bool) -> None:
    colour, marker = SERIES.format(series.colour), MARKERS[series.colour % len(MARKERS)]
    x, y = zip(*series.points) if series.points else ((), ())
    if series.kind == "line":
        if series.low:
            axes.fill_between(x, series.low, series.high, color=colour, alpha=0.22, linewidth=0, gid=gid)
        axes.plot(x, y, color=colour, linewidth=1.6, gid=gid)
    elif series.kind == "bars":
        axes.barh(y, x, height=0.56, color=colour)
        for bar in axes.containers[-1]:
            bar.set_gid(gid)
    else:
        axes.plot(x, y, color=colour, marker=marker, linestyle="none", markersize=5.5, gid=gid)
        if series.low:
            lines = axes.hlines if categories else axes.vlines
            lines(y if categories else x, series.low, series.high, color=colour, linewidth=1.5, gid=gid)


def scale(axes, figure: Figure) -> None:
    """Scales, ticks and labels; a log axis has few ticks and plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    axes.margins(x=0.04, y=0.06)
    for axis, side in ((figure.x, axes.xaxis), (figure.y, axes.yaxis)):
        if axis.log:
            getattr(axes, f"set_{side.axis_name}scale")("log")
            low, high = side.get_view_interval()
            decades = math.log10(high / low)
            steps = (1,) if decades > 2.3 else (1, 2, 5) if decades > 0.6 else (1, 1.5, 2, 2.5, 3, 4, 5, 7)
            side.set_major_locator(LogLocator(subs=steps, numticks=12))
            side.set_minor_locator(NullLocator())
            side.set_minor_formatter(NullFormatter())
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}" if value < 1e7
                                                   else f"{value:.0e}".replace("e+", "e")))
        elif not axis.names:
            side.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(figure.x.label)
    axes.set_ylabel(figure.y.label)
    if figure.y.names:
        axes.set_ylim(len(figure.y.names) - 0.5, -0.5)
        labels = ["\n".join(wrapped(name)).replace("$", r"\$") for name in figure.y.names]
        axes.set_yticks(range(len(labels)), labels, fontsize=9, linespacing=0.95)
        axes.grid(axis="y", visible=False)


def wrapped(name: str) -> list[str]:
    """A category on two lines at most; the table has it whole."""
    return textwrap.wrap(name, 25, max_lines=2, placeholder=" …") or [""]


def of_the_page(svg: str) -> str:
    """Matplotlib's file as an element of a page: no size, no rules for other elements, the page's colours.

    An id stays where a definition is used; that of a series becomes `data-series`.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r' id="series-(\d+)"', r' data-series="\1"', svg)
    used = {*re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', svg)}
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = svg.replace("xlink:href", "href").replace(' clip-rule="nonzero"', "")
    for told, page in PAGE.items():
        svg = svg.replace(told, page)
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)  # the page's own, by its style sheet
    # a hundredth of a pixel is finer than any screen
    svg = re.sub(r' d="[^"]*"', lambda found: re.sub(r"-?\d+\.\d{3,}", hundredths, found[0]), svg)
    return re.sub(r">\s+<", "><", svg).strip()


def hundredths(found: re.Match) -> str:
    """A number of a path, rounded, without zeros at its end."""
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")
