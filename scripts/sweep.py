"""Runs variants of one configuration, each for several seeds, and says which of them differ from the base.

    python scripts/sweep.py . --like records/2026-11-21_BytePPM/seed42 --grid MATRIX_LR=0.025,0.03 --grid MUON_MOMENTUM=0.9,0.95
    python scripts/sweep.py . --arms ablations.json --jobs 2 --threads 1 --collect records/DATE_NAME

`--grid` is repeatable; the arms are all combinations, the first of them is the base. A value that has a comma itself: put ; between the values
(`--grid 'NGRAM_ORDERS=0;2,3'`). `--arms FILE` reads

    {"base": {"ITERATIONS": 300}, "arms": {"no JEPA": {"JEPA_CHUNK_SIZE": 0}}, "labels": {"base": "the headline's setting"}}

where `base` is shared by all and an arm of its own, and `labels`, for tables, may be missing. `--base ARM` compares with another arm. What
every run gets, how runs are placed, skipped, resumed and stopped is said in scripts/run_seeds.py, whose options this tool shares.

Differences are arm minus base over the seeds that both have, with the verdict of scripts/stats.py. `--collect FOLDER` copies the good runs to
FOLDER/ablations/<arm>/seed<N>.json and names them in FOLDER/ablations/arms.json: what the table `ablation` of scripts/tables.py reads. The
base is called `base` there; arms of an earlier sweep stay if they were measured against the same base.

Exit code 0; 1 if a run failed or broke a budget; 2 misuse; 130 stopped.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

from family import Misuse, command, find_script, read_json, write_atomic
from run_seeds import Job, assignments, carry_out, known_only, parser, say, settings_of, variables
from stats import read_run


def grid(axes: list[str]) -> dict[str, dict[str, str]]:
    """All combinations of `NAME=V1,V2` texts, the last varying fastest, named for what they set.

    Raises:
        Misuse: an axis that is none, an empty or repeated value.
    """
    values = {}
    for name, text in assignments(axes, "--grid").items():
        found = values[name] = text.split(";" if ";" in text else ",")
        if len({*found}) < len(found) or "" in found:
            raise Misuse(f"--grid {name}={text}: different values with commas are needed")
    combinations = itertools.product(*([(name, value) for value in found] for name, found in values.items()))
    return {" ".join(f"{name}={value}" for name, value in pairs): dict(pairs) for pairs in combinations}


def as_settings(found: object, where: str) -> dict[str, str]:
    """A JSON object of plain values as texts that the environment can hold."""
    if not isinstance(found, dict) or not all(isinstance(value, (str, int, float)) for value in found.values()):
        raise Misuse(f"{where}: an object of variables with texts, numbers or true and false is needed")
    pairs = [(key, int(value) if isinstance(value, bool) else value) for key, value in found.items()]
    return assignments([f"{key}={value}" for key, value in pairs], where)


def listed(path: str) -> tuple[dict[str, str], dict[str, dict[str, str]], dict[str, str]]:
    """(settings of all arms, {arm: its own}, {arm: label}) of a file of arms; `base` is the first arm.

    Raises:
        Misuse: the file is not as the docstring says.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.keys() - {"base", "arms", "labels"}:
        raise Misuse(f"{path}: an object with `base`, `arms` and `labels` is needed")
    arms, labels = found.get("arms"), found.get("labels", {})
    if not arms or not isinstance(arms, dict) or "base" in arms:
        raise Misuse(f"{path}: `arms` is needed, an object of one arm or more that are not `base`")
    if not isinstance(labels, dict) or labels.keys() - arms.keys() - {"base"}:
        raise Misuse(f"{path}: `labels` is an object, and names arms that are there")
    arms = {name: as_settings(settings, f"{path}: arm {name}") for name, settings in arms.items()}
    return as_settings(found.get("base", {}), f"{path}: base"), {"base": {}, **arms}, labels


def collect_arms(jobs: list[Job], folder: Path, names: dict[str, str], labels: dict[str, str]) -> None:
    """FOLDER/ablations/<name>/seed<N>.json of the good runs, and arms.json, where a label that is there stays.

    Raises:
        Misuse: arms there were measured against another base, or are of other settings; nothing is written.
    """
    place = folder / "ablations"
    index, good = place / "arms.json", [job for job in jobs if job.good]
    notes = read_json(index) if index.exists() else {}
    for job in good if notes.keys() - {"base"} else ():
        old = place / "base" / f"seed{job.seed}.json"
        if names[job.arm] != "base" or not old.exists():
            continue
        if read_run(old).identity() != read_run(job.folder / "metrics.json").identity():
            raise Misuse(f"{old}: the base of other arms, of another script, data or setting; move {place} away")
    # Seeds of an earlier sweep stay beside the fresh ones, under the label of then.
    for job in good:
        fresh = read_run(job.folder / "metrics.json").identity()
        for old in sorted((place / names[job.arm]).glob("seed*.json")):
            if read_run(old).identity() != fresh:
                text = f"not of the script, data and settings of arm {job.arm}; move {old.parent} away"
                raise Misuse(f"{old}: {text}")
    for job in good:
        name = names[job.arm]
        (place / name).mkdir(parents=True, exist_ok=True)
        write_atomic(place / name / f"seed{job.seed}.json", (job.folder / "metrics.json").read_bytes())
        notes.setdefault(name, labels[job.arm])
    if good:
        write_atomic(index, f"{json.dumps(notes, indent=1, ensure_ascii=False)}\n".encode())
        say(f"collected {place}: {', '.join(notes)}")


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--grid", action="append", default=[], metavar="NAME=V1,V2", help="an axis; repeatable")
    options.add_argument("--arms", metavar="FILE", help="JSON file of arms")
    options.add_argument("--base", metavar="ARM", help="compare with this arm (default: the first)")
    options = options.parse_args(argv)
    if bool(options.grid) == bool(options.arms):
        raise Misuse("the arms: --grid NAME=V1,V2 or --arms FILE, one of them, is needed")
    script = find_script(options.script)
    known = {*variables(script)}
    shared, own, labels = ({}, grid(options.grid), {}) if options.grid else listed(options.arms)
    base = options.base or next(iter(own))
    if base not in own:
        raise Misuse(f"--base {base}: the arms are {', '.join(own)}")
    everywhere = settings_of(options, known)
    arms = {name: known_only(everywhere | shared | mine, known, f"arm {name}") for name, mine in own.items()}
    names = {name: "base" if name == base else re.sub(r"[^\w.=+-]+", "-", name) for name in own}
    if len({*names.values()}) < len(names):
        raise Misuse(f"arms {', '.join(own)} against {base}: folders of one name, {', '.join(names.values())}")
    for name, mine in own.items():
        pairs = " ".join(f"{key}={value}" for key, value in mine.items())
        labels.setdefault(name, f"`{pairs}`" if pairs else "what all arms share")
    return carry_out(options, script, known, arms, base,
                     lambda jobs, folder: collect_arms(jobs, folder, names, labels))


if __name__ == "__main__":
    command(main)
