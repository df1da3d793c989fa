"""What happens to a difference as compute grows: lines, verdicts and curves for scripts/ladder.py.

A difference is arm minus base in BPB, one for each seed that both have; below zero the arm is better.
Everything is fitted in x, the natural logarithm of compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from stats import CONFIDENCE, betainc, negligible, t_quantile

BENT_P = 0.05
FEWEST_RUNGS = 3  # for a verdict, 4 for a curve
WORDS = ("grows", "stays", "fades", "reverses", "undecided")

Interval = tuple[float, float]


def f_sf(f: float, df1: int, df2: int) -> float:
    """P(F > f) of Fisher's F with `df1` and `df2` degrees of freedom: I_y(df2 / 2, df1 / 2), y = df2 / (df2 +
    df1 f), Abramowitz and Stegun 26.6.2.
    """
    if math.isinf(f):
        return 0.0
    return betainc(df2 / 2, df1 / 2, df2 / (df2 + df1 * f))


def side(interval: Interval) -> int:
    """-1 or 1 where an interval lies on one side of zero, else 0."""
    low, high = interval
    return -1 if high < 0 else 1 if low > 0 else 0


@dataclass(frozen=True)
class Line:
    """A least-squares line through differences, every pair of seeds a point.

    The scatter around it is that of the points. Where the rungs' means lie off the line by more than the
    seeds explain (an F-test of lack of fit, p < 0.05: it is `bent`), it is that of the means instead, with
    two degrees of freedom less than there are rungs: a bend makes intervals wide, not narrow.
    """

    slope: float  # BPB an e-fold of compute
    middle: Interval  # (x, y) of the centre of the points
    spread: float  # sum of squares of x around it
    count: int
    variance: float  # of a point around the line; inf where the points do not say
    df: int
    bent: bool

    @classmethod
    def through(cls, points: list[tuple[float, float]]) -> Line:
        """A line through (x, y) of two different x or more.

        Raises:
            ValueError: all x are equal.
        """
        x, y = np.array(points, dtype=float).T
        centre, height = x.mean(), y.mean()
        spread = float(((x - centre) ** 2).sum())
        if spread == 0.0:
            raise ValueError("a line needs two rungs")
        slope = float(((x - centre) * (y - height)).sum() / spread)
        error = y - height - slope * (x - centre)

        rungs = [y[x == place] for place in np.unique(x)]
        total, pure = float((error**2).sum()), float(sum(((r - r.mean()) ** 2).sum() for r in rungs))
        df, df_pure, df_means = len(x) - 2, len(x) - len(rungs), len(rungs) - 2
        variance, bent = total / df if df else math.inf, False
        if df_pure and df_means:
            off = max(0.0, total - pure) / df_means
            # Points that lie on the line but for rounding have no bend.
            exact = total <= 1e-18 * max(1.0, float((y**2).sum()))
            f = off / (pure / df_pure) if pure else math.inf
            bent = not exact and f_sf(f, df_means, df_pure) < BENT_P
            variance, df = (off, df_means) if bent else (variance, df)
        return cls(slope, (float(centre), float(height)), spread, len(x), variance, df, bent)

    def at(self, x: float) -> float:
        return self.middle[1] + self.slope * (x - self.middle[0])

    def _around(self, value: float, share: float) -> Interval:
        if math.isinf(self.variance):
            return -math.inf, math.inf
        half = t_quantile((1 + CONFIDENCE) / 2, self.df) * math.sqrt(self.variance * share)
        return value - half, value + half

    @property
    def slope_interval(self) -> Interval:
        return self._around(self.slope, 1 / self.spread)

    def interval(self, x: float) -> Interval:
        """The 95 % interval of the line itself at x."""
        return self._around(self.at(x), 1 / self.count + (x - self.middle[0]) ** 2 / self.spread)

    def prediction(self, x: float, pairs: int = 1) -> Interval:
        """The 95 % interval of the mean of `pairs` new pairs of seeds at x.

        Where the line is bent, a new rung's mean is off it as the old ones are, however many seeds it has.
        """
        noise = 1.0 if self.bent else 1 / pairs
        return self._around(self.at(x), noise + 1 / self.count + (x - self.middle[0]) ** 2 / self.spread)


def verdict(line: Line | None, x: list[float], contest: float) -> str:
    """What happens to a difference from the lowest rung to the contest: one of `WORDS`.

    x: ln compute of the measured rungs; contest: of the contest. By 95 % intervals: of the line at the lowest
    rung (L) and the highest (H), of its change from the lowest rung to the contest (S), and for one new pair
    at the contest (C). "On a side" means that an interval excludes zero, "flat" that S has zero in it or is
    within +-0.003 BPB. First match:

    undecided   fewer than three rungs
    stays       flat, and L, H and C are on one side;
                or L, H and C are within +-0.003 BPB: no effect, here or there
    undecided   flat otherwise
    grows       S and H are on one side, and L is not on the other: away from zero
    reverses    L is on one side; S, H and C are on the other: it turned where measured
    fades       L is on one side and S on the other, and it has not reversed: towards zero. A line that may
                cross zero only beyond the highest rung fades too
    undecided   anything else

    The words are about the difference, be it a gain or a loss: `stats.word` of the line's interval at the
    highest rung says which.
    """
    if line is None or len({*x}) < FEWEST_RUNGS:
        return "undecided"
    low, high, far = line.interval(min(x)), line.interval(max(x)), line.prediction(contest)
    change = tuple(each * (contest - min(x)) for each in line.slope_interval)
    start, end, trend, there = side(low), side(high), side(change), side(far)
    if all(map(negligible, (low, high, far))):
        return "stays"
    if not trend or negligible(change):
        return "stays" if start and start == end == there else "undecided"
    if end == trend and start != -trend:
        return "grows"
    if start == -trend:
        return "reverses" if there == end == trend else "fades"
    return "undecided"


# --- Curves ---


@dataclass(frozen=True)
class Curve:
    """BPB = E + A C^-a through the means of rungs: floor E, A at the middle of the rungs, exponent a.

    `centre` is ln C there, so that A is a number of BPB.
    """

    floor: float
    size: float
    exponent: float
    centre: float

    def at(self, x: float) -> float:
        return self.floor + self.size * math.exp(-self.exponent * (x - self.centre))


def curve(x: list[float], y: np.ndarray, weight: list[float]) -> list[Curve]:
    """The best curve through each row of y (draws, rungs): least squares with E >= 0 and A >= 0, by a search
    over the exponent in which the other two are linear.
    """
    x, w, y = np.asarray(x, float), np.asarray(weight, float), np.atleast_2d(np.asarray(y, float))
    w, centre = w / w.sum(), float(np.mean(x))

    def fit(exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(squares, E, A), each (draws, exponents), of exponents (draws or 1, exponents)."""
        z = np.exp(-exponents[..., None] * (x - centre))  # (draws or 1, exponents, rungs)
        mean_z, mean_y = (z * w).sum(-1), (y * w).sum(-1)[:, None]
        var_z = (w * (z - mean_z[..., None]) ** 2).sum(-1)
        cov = (w * (z - mean_z[..., None]) * (y[:, None] - mean_y[..., None])).sum(-1)
        size = np.maximum(0.0, cov / var_z)
        floor = mean_y - size * mean_z
        # A floor below zero is set to zero, and A follows from that.
        through_zero = np.maximum(0.0, (w * z * y[:, None]).sum(-1) / (w * z * z).sum(-1))
        size = np.where(floor < 0, through_zero, size)
        floor = np.maximum(0.0, floor)
        error = y[:, None] - floor[..., None] - size[..., None] * z
        return (w * error**2).sum(-1), floor, size

    grid = np.geomspace(0.005, 3.0, 240)[None]
    ratio = grid[0, 1] / grid[0, 0]
    for _ in range(3):
        squares, floor, size = fit(grid)
        best = squares.argmin(1)
        rows = np.arange(len(y))
        chosen = np.broadcast_to(grid, squares.shape)[rows, best]
        grid = chosen[:, None] * np.geomspace(1 / ratio, ratio, 61)[None]
        ratio = ratio ** (1 / 30)
    return [Curve(*map(float, each), centre)
            for each in zip(floor[rows, best], size[rows, best], chosen)]


@dataclass(frozen=True)
class Fitted:
    """A curve, and what noise of the seeds could have made of it: 95 % intervals from drawn rungs."""

    best: Curve
    draws: list[Curve]

    def interval(self, of) -> Interval | None:
        """of(curve) -> a number; None where the seeds do not say how large the noise is."""
        if not self.draws:
            return None
        tails = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
        low, high = np.quantile([of(each) for each in self.draws], tails)
        return float(low), float(high)

    def at(self, x: float) -> Interval | None:
        return self.interval(lambda each: each.at(x))


def fitted(rungs: dict[float, list[float]], draws: int = 400) -> Fitted | None:
    """The curve through {x: BPB of the seeds} of three rungs or more, None of fewer.

    Noise is drawn for each rung's mean from a normal whose standard deviation is pooled over the rungs. It
    stands for the seeds only: a curve of another shape is not in the interval.
    """
    if len(rungs) < 3:
        return None
    x, counts = sorted(rungs), [len(rungs[place]) for place in sorted(rungs)]
    means = np.array([np.mean(rungs[place]) for place in x])
    df = sum(counts) - len(x)
    best = curve(x, means, counts)[0]
    if not df:
        return Fitted(best, [])
    pure = sum(float(((np.array(rungs[place]) - mean) ** 2).sum()) for place, mean in zip(x, means))
    generator = np.random.default_rng(0)
    # The standard deviation is an estimate itself: a scaled inverse chi-square for each draw.
    scale = np.sqrt(pure / generator.chisquare(df, draws))[:, None]
    noise = generator.standard_normal((draws, len(x))) * scale / np.sqrt(counts)
    return Fitted(best, curve(x, means + noise, counts))
