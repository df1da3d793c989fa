"""The contest's proportions at any size: what scripts/ladder.py sets at a rung, and artifacts of equal bytes.

A rung is a number of block weights N, in millions. `proportions` turns it into a run that is shaped like the
contest's; `measuring` says how the ladder scores it on a CPU; `matched` moves one setting or several until an
arm's planned artifact has the bytes of the base's.
"""

from __future__ import annotations

import functools
import math
import re

from family import Misuse
from rate import planned

# The contest's run, the trunk's defaults: 13 layers x 512, 9,000 steps of 393,216 bytes.
LAYERS, WIDTH, BATCH, STEPS = 13, 512, 393_216, 9000
# Weights a layer / width^2: q 1, k and v 1/2 each, output 1, MLP 2 + 2. Rungs are counted so, though the
# default has MLPs of 3.5 widths and no tables since the ladder `tables`; ladders before it name both.
LAYER = 7
WEIGHTS = LAYERS * LAYER * WIDTH**2
TEXT = BATCH * STEPS / WEIGHTS  # bytes of text a block weight: 148
TABLES = 8 / 13  # weights of the hash tables a block weight: 7 contexts x 65,536 rows x 32
CONTEXTS = 7

SMALL_BATCH, SMALL_TEXT = 8192, 4.4e6  # the anchor of the law of the batch
GROUP = 4  # rows that SIGReg pools: JEPA_SIGREG_GROUP
DEVICE_TOKENS = 10_240  # of a forward: more leave the caches of a core


def nearest(value: float, step: int, least: int) -> int:
    """The multiple of `step` that is nearest to a value, at least `least`."""
    return max(least, step * round(value / step))


def shape(millions: float) -> tuple[int, int]:
    """(layers, width) of a rung. Layers grow as N^0.215, as they do from #832's 13 layers down to the bench's
    6 at 1.5 M; the width follows from N. It is a multiple of 16, which vector units like and heads divide, of
    8 below 48 and of 64 from 1,000 on.
    """
    layers = max(2, round(LAYERS * (1e6 * millions / WEIGHTS) ** 0.215))
    width = (1e6 * millions / LAYER / layers) ** 0.5
    return layers, nearest(width, 8 if width < 44 else 16 if width < 1000 else 64, 16)


def weights(millions: float) -> int:
    """Block weights that a rung really has."""
    layers, width = shape(millions)
    return LAYER * layers * width**2


def text(millions: float) -> float:
    """Bytes of text that a rung is to read, 148 a block weight."""
    return TEXT * weights(millions)


def batch_law(size: float) -> float:
    """Bytes a step for so much text: a power law through 8,192 at 4.4 MB and the contest's 393,216 at 3.5 GB,
    whose exponent is 0.579. The ladder `laws` tests it on the smallest rung.
    """
    power = math.log(BATCH / SMALL_BATCH) / math.log(TEXT * WEIGHTS / SMALL_TEXT)
    return SMALL_BATCH * (size / SMALL_TEXT) ** power


def rotated(width: int, heads: int) -> int:
    """ROPE_DIMS: a quarter of a head, even, at least 8 where a head has them, at most the contest's 16."""
    head = width // heads
    return min(head // 2 * 2, max(8, head // 8 * 2), 16)


def schedule(steps: int) -> dict[str, str]:
    """What goes by the number of steps.

    Warm-down a third, the ramp of the momentum a sixth, the average's horizon 1/27 of the run, as in the
    contest. A momentum of 0.99 would remember a sixth of a run of 600 steps, where 0.85 rising to 0.9 was
    tuned (the bench setting): 1 - momentum is a power of the steps through both points, at either end.
    """
    shrunk = STEPS / steps
    final, start = 1 - 0.01 * shrunk**0.850, 1 - 0.08 * shrunk**0.232
    return {
        "WARMDOWN_ITERS": str(round(steps / 3)),
        "MUON_MOMENTUM_WARMUP_STEPS": str(round(steps / 6)),
        "MUON_MOMENTUM": f"{max(0.0, final):.4g}",
        "MUON_MOMENTUM_WARMUP_START": f"{max(0.0, min(start, final)):.4g}",
        "EMA_DECAY": f"{max(0.0, 1 - 27 / steps):.6g}",
    }


def proportions(millions: float, per_id: float = 1.0) -> dict[str, str]:
    """The settings of a rung; at 23.86 they are the trunk's defaults, but for MLPs and tables.

    `per_id`: bytes of text that an id stands for; sequence and batch are counted in ids, their laws in bytes.

    what                      law                                      reason
    layers, width             N^0.215, and N / (7 layers)              `shape`
    heads                     a power of two, of 128 or more; but two  the contest's; attention's time goes
                              at least, half of them for keys and      by their number
                              values
    sequence                  8 widths                                 attention's share of the compute stays
    bytes of text             148 N                                    the contest's
    bytes a step              `batch_law`, whole pairs of 4 rows       a lower loss bears, and needs, more
    weights of hash tables    8/13 N; their width as D^0.5, the rest   the contest's until 2026-11-30
                              are rows
    JEPA's widths, SIGReg's   D / 2                                    the contest's
    directions
    layers with XSA           4/13                                     the contest's
    window, of windowed       a quarter of the sequence                the contest's
    layers
    schedules, momenta, EMA   `schedule`                               shares of the run

    Vocabulary (260), chunks (8), rates, bits and steps of the quantiser do not depend on N. So the token
    embedding, 0.6 % of the contest's weights, is a third of the lowest rung's: a floor that every arm has.

    The sequence is 320 to 1,152 on the first rungs. At 1,024 a model of width 40 would do three quarters of
    its work in attention, the contest's does a half. Whether reach matters, arms of `laws` test.
    """
    layers, width = shape(millions)
    heads = max(2, 1 << max(1, width // 128).bit_length() - 1)
    sequence = nearest(8 * width / per_id, 8, 8)
    group = GROUP * sequence
    batch = nearest(batch_law(text(millions)) / per_id, 2 * group, 2 * group)
    steps = max(1, round(text(millions) / per_id / batch))
    dim = nearest(32 * (width / WIDTH) ** 0.5, 4, 4)
    return {
        "NUM_LAYERS": str(layers),
        "MODEL_DIM": str(width),
        "NUM_HEADS": str(heads),
        "NUM_KV_HEADS": str(heads // 2),
        "ROPE_DIMS": str(rotated(width, heads)),
        "XSA_LAST_N": str(round(layers * 4 / 13)),
        "ATTN_WINDOW": str(sequence // 4),
        "NGRAM_DIM": str(dim),
        "NGRAM_BUCKETS": str(round(TABLES * weights(millions) / CONTEXTS / dim)),
        "JEPA_LATENT_DIM": str(width // 2),
        "JEPA_PROJ_HIDDEN": str(width // 2),
        "JEPA_SIGREG_PROJS": str(width // 2),
        "TRAIN_SEQ_LEN": str(sequence),
        "TRAIN_BATCH_TOKENS": str(batch),
        "ITERATIONS": str(steps),
        **schedule(steps),
    }


def measuring(settings: dict[str, str]) -> dict[str, str]:
    """How the ladder trains and scores on a CPU: what none of the contest's proportions is about.

    A sliding window moves by half of itself: every target has half a window before it, for the price of two
    passes. DEVICE_BATCH_TOKENS is the largest part of the batch within `DEVICE_TOKENS` that divides it.
    """
    rows = int(settings["TRAIN_SEQ_LEN"]) * (GROUP if settings.get("JEPA_CHUNK_SIZE") != "0" else 1)
    groups = max(1, int(settings["TRAIN_BATCH_TOKENS"]) // rows)
    parts = [n for n in range(1, groups + 1) if groups % n == 0 and n * rows <= DEVICE_TOKENS]
    return {
        "DEVICE": "cpu",
        "DTYPE": "fp32",
        "COMPILE": "0",
        "DEVICE_BATCH_TOKENS": str(max(parts, default=1) * rows),
        "VAL_BYTES": "2000000",
        "EVAL_STRIDE": str(int(settings["TRAIN_SEQ_LEN"]) // 2),
        "MAX_WALLCLOCK_SECONDS": "0",
        "EVAL_BUDGET_SECONDS": "0",
        "ARTIFACT_BUDGET_BYTES": "0",
        "TRAIN_LOG_EVERY": str(max(20, int(settings["ITERATIONS"]) // 20)),
        "CHECKPOINT_EVERY": str(max(50, int(settings["ITERATIONS"]) // 20)),
    }


# --- An arm at a rung ---

RELATIVE = re.compile(r"([*+-])(\d+\.?\d*)")


def changed(name: str, asked: str, base: str, where: str) -> str:
    """A value of an arm: plain, or `*F`, `+N`, `-N` of the base's. Whole stays whole.

    Raises:
        Misuse: a relative value of what is no number.
    """
    found = RELATIVE.fullmatch(asked)
    if not found:
        return asked
    try:
        old, by = float(base), float(found[2])
    except ValueError:
        raise Misuse(f"{where}: {name}={asked}: the base's {base!r} is no number") from None
    new = {"*": old * by, "+": old + by, "-": old - by}[found[1]]
    whole = re.fullmatch(r"-?\d+", base)
    return str(round(new)) if whole else f"{new:.6g}"


def arm_settings(millions: float, asked: dict[str, str], defaults: dict[str, str], where: str,
                 shared: dict[str, str] | None = None, per_id: float = 1.0) -> dict[str, str]:
    """The settings of an arm at a rung: the rung's, then those that the base has too, then its own.

    Another batch means other steps, for the same text, and their schedule; another sequence the same batch in
    rows of that length; another width or number of heads another share of rotated dimensions, unless the arm
    names it.
    """
    def resolved(asked: dict[str, str], base: dict[str, str]) -> dict[str, str]:
        return {name: changed(name, value, base.get(name, defaults.get(name, "").strip("'\"")), where)
                for name, value in asked.items()}

    base = proportions(millions, per_id)
    own = resolved(shared or {}, base)
    own |= resolved(asked, base | own)
    found = base | own
    if "ITERATIONS" not in own and found["TRAIN_BATCH_TOKENS"] != base["TRAIN_BATCH_TOKENS"]:
        ids = text(millions) / per_id
        found["ITERATIONS"] = str(max(1, round(ids / int(found["TRAIN_BATCH_TOKENS"]))))
    found |= {**schedule(int(found["ITERATIONS"])), **own}
    found = measuring(found) | found | own
    return rotated_again(found, own)


def rotated_again(settings: dict[str, str], own: dict[str, str]) -> dict[str, str]:
    if "ROPE_DIMS" in own:
        return settings
    return settings | {"ROPE_DIMS": str(rotated(int(settings["MODEL_DIM"]), int(settings["NUM_HEADS"])))}


# --- Equal bytes ---


@functools.lru_cache(maxsize=4096)
def _bytes(script, settings: tuple) -> int:
    return sum(planned(script, dict(settings))[0].values())


def planned_bytes(script, settings: dict[str, str]) -> int:
    """Bytes of the artifact that scripts/rate.py plans, without code.

    Raises:
        Misuse: the script refuses the settings.
    """
    try:
        return _bytes(script, tuple(sorted(settings.items())))
    except script.UserError as error:
        raise Misuse(str(error)) from None


def steps_of(name: str, settings: dict[str, str], defaults: dict[str, str]) -> tuple[float, int]:
    """(step, most steps) in which `matched` moves a setting. An MLP's width goes by one column."""
    known = defaults | settings
    if name == "MODEL_DIM":
        return 2 * int(known["NUM_HEADS"]), 4096
    if name == "MLP_MULT":
        return 1 / int(known["MODEL_DIM"]), 1 << 16
    return {"NGRAM_DIM": int(known.get("NGRAM_HASHES", 1)), "NUM_LAYERS": 1}.get(name, 1), 1 << 20


def matched(script, settings: dict[str, str], names: list[str], size: int, own: dict[str, str],
            defaults: dict[str, str]) -> dict[str, str]:
    """The settings with each of `names` moved in turn until the planned artifact is as near to `size` bytes
    as it gets: first the coarse one, then the fine one.

    Small tensors are not rounded, so an artifact gets smaller where one of them grows past that size: of
    several values that make the bytes the largest is taken.

    Raises:
        Misuse: the smallest value is too large already, or the largest too small.
    """
    for name in names:
        step, most = steps_of(name, settings, defaults)

        def at(count: int, name=name, step=step, settings=settings) -> dict[str, str]:
            value = count * step
            new = settings | {name: str(value) if isinstance(step, int) else f"{value:.6f}"}
            return rotated_again(new, own) if name == "MODEL_DIM" else new

        low, high = 0, 2
        while high <= most and (found := planned_bytes(script, at(high))) < 4 * size:
            low = high if found < size else low
            high *= 2
        low, high = (low, 2 * low) if low else (1 if name != "NGRAM_BUCKETS" else 2, 2)
        if high > most or planned_bytes(script, at(high)) < size:
            raise Misuse(f"match {name}: no value makes {size:,} bytes")
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if planned_bytes(script, at(middle)) >= size else (middle, high)
        settings = min((at(low), at(high)), key=lambda each: abs(planned_bytes(script, each) - size))
    if (error := planned_bytes(script, settings) / size - 1) > 0.10:
        raise Misuse(f"match {', '.join(names)}: the least is {error:+.0%} above the base's {size:,} bytes")
    return settings
