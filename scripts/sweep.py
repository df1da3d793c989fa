"""Runs variants of one configuration, each for several seeds, and says which of them differ from the base.

    python scripts/sweep.py . --like records/2026-11-21_BytePPM/seed42 \\
        --grid MATRIX_LR=0.025,0.03 --grid MUON_MOMENTUM=0.9,0.95
    python scripts/sweep.py . --arms ablations.json --jobs 2 --threads 1 --collect records/DATE_NAME
    python scripts/sweep.py SGJM --named ablation --set SIZE=smoke --set ITERATIONS=300

`--grid` is repeatable; the arms are all combinations, the first of them is the base. A value that has a comma
itself: put ; between the values (`--grid 'NGRAM_ORDERS=0;2,3'`). `--arms FILE` reads

    {"base": {"ITERATIONS": 300}, "arms": {"no JEPA": {"JEPA_CHUNK_SIZE": 0}},
     "labels": {"base": "the headline's setting"}}

where `base` is shared by all and an arm of its own, and `labels`, for tables, may be missing. `--base ARM`
compares with another arm. What every run gets, how runs are placed, skipped, resumed and stopped is said in
scripts/run_seeds.py, whose options this tool shares. `--named NAME` reads sweeps/NAME.json beside the script,
for scripts that offer such sets.

An arm can be an experiment card as well, and finished runs can be evaluated, by the script again, with other
settings:

    "arms": {"no JEPA": {"JEPA_WEIGHT": 0, "hypothesis": "what is thought",
                         "expected": "what should be seen if so"},
             "plain": {"ARCH": "baseline", "evaluate": false},
             "wide": {"of": "base", "GATE_RADIUS": 12}},
    "evaluate": {"settings": {"EVAL_GATE": 1, "SGJM": "{run}/final.safetensors",
                              "BASELINE": "{run:plain}/final.safetensors"},
                 "report": "gate.json", "score": {"published.sgjm.token_nll": -0.1},
                 "show": {"BPB": "honest.val_bpb.0"}}

In these settings {run} is the folder of the run that is evaluated and {run:ARM} that of the same seed of
another arm. `of` is an arm that is not trained: the runs of another one are evaluated once more, with its
settings. An evaluation is one process, ends with exit code 0 or 1 and leaves `report` in its folder; numbers
in it are named by their keys with dots between them. `score` is a sum of such numbers times weights, by which
arms are ranked, the mean over seeds; an arm without all of these numbers comes last. `show` names further
columns.

Differences are arm minus base over the seeds that both have, with the verdict of scripts/stats.py. `--collect
FOLDER` copies the good runs to FOLDER/ablations/<arm>/seed<N>.json and names them in
FOLDER/ablations/arms.json: what the table `ablation` of scripts/tables.py reads. The base is called `base`
there; arms of an earlier sweep stay if they were measured against the same base. Of a file with cards or
evaluations it also writes FOLDER/sweeps/<name>.summary.json: arms, cards, evaluations, ranking; the table
`rows` prints it.

Exit code 0; 1 if a run failed or broke a budget; 2 misuse; 130 stopped.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from family import Misuse, command, find_script, markdown_table, read_json, write_atomic
from run_seeds import (
    OWN,
    Job,
    Runner,
    assignments,
    carry_out,
    known_only,
    parser,
    run_id,
    say,
    settings_of,
    variables,
    without_places,
)
from stats import read_run

CARD = ("hypothesis", "expected")
RUN = re.compile(r"\{run(?::([^{}]+))?\}")


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


def as_texts(found: object, where: str) -> list[tuple[str, str]]:
    """A JSON object of plain values as names and texts that the environment can hold."""
    if not isinstance(found, dict) or not all(
        isinstance(value, (str, int, float)) for value in found.values()
    ):
        raise Misuse(f"{where}: an object of variables with texts, numbers or true and false is needed")
    return [(key, str(int(value) if isinstance(value, bool) else value)) for key, value in found.items()]


def as_settings(found: object, where: str) -> dict[str, str]:
    return assignments([f"{key}={value}" for key, value in as_texts(found, where)], where)


@dataclass
class Plan:
    """What a file of arms says. `own`: {arm: its settings}, `base` first, of arms that are trained; `of`:
    {arm: (the arm whose runs it evaluates, its settings)}; `evaluate`: settings, report, score and show, or
    nothing; `spared`: not evaluated.
    """

    shared: dict[str, str]
    own: dict[str, dict[str, str]]
    labels: dict[str, str]
    cards: dict[str, dict[str, str]] = field(default_factory=dict)
    of: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)
    evaluate: dict = field(default_factory=dict)
    spared: set[str] = field(default_factory=set)


def listed(path: Path | str) -> Plan:
    """A file of arms.

    Raises:
        Misuse: the file is not as the docstring says.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.keys() - {"base", "arms", "labels", "evaluate"}:
        raise Misuse(f"{path}: an object with `base`, `arms`, `labels` and `evaluate` is needed")
    arms, labels = found.get("arms"), found.get("labels", {})
    if not arms or not isinstance(arms, dict) or "base" in arms:
        raise Misuse(f"{path}: `arms` is needed, an object of one arm or more that are not `base`")
    if not isinstance(labels, dict) or labels.keys() - arms.keys() - {"base"}:
        raise Misuse(f"{path}: `labels` is an object, and names arms that are there")
    plan = Plan({}, {"base": {}}, dict(labels))
    for name, arm in {"base": found.get("base", {}), **arms}.items():
        where = f"{path}: arm {name}" if name != "base" else f"{path}: base"
        words, settings = {}, arm
        if isinstance(arm, dict):
            words = {key: arm[key] for key in (*CARD, "of", "evaluate") if key in arm}
            settings = {key: value for key, value in arm.items() if key not in words}
        settings = as_settings(settings, where)
        if odd := [key for key in (*CARD, "of") if not isinstance(words.get(key, ""), str)]:
            raise Misuse(f"{where}: `{odd[0]}` is a text")
        if card := {key: words[key] for key in CARD if key in words}:
            plan.cards[name] = card
        if not isinstance(words.get("evaluate", True), bool):
            raise Misuse(f"{where}: `evaluate` is true or false")
        if not words.get("evaluate", True):
            plan.spared.add(name)
        if name == "base":
            plan.shared = settings
        elif "of" in words:
            plan.of[name] = words["of"], settings
        else:
            plan.own[name] = settings
    if "evaluate" in found:
        plan.evaluate = evaluation(found["evaluate"], f"{path}: evaluate", plan.own.keys())
    for name, (source, _) in plan.of.items():
        if source not in plan.own or not plan.evaluate:
            raise Misuse(
                f"{path}: arm {name}: `of` names an arm that is trained, and needs `evaluate`; {source} is "
                "given"
            )
    return plan


def evaluation(found: object, where: str, arms) -> dict:
    """The entry `evaluate` of a file of arms, checked; its settings as texts."""
    if (
        not isinstance(found, dict)
        or found.keys() - {"settings", "report", "score", "show"}
        or not isinstance(found.get("report"), str)
    ):
        raise Misuse(
            f"{where}: an object with `settings`, `report`, `score` and `show` is needed, `report` a file's "
            "name"
        )
    score, show = found.get("score", {}), found.get("show", {})
    for name, part, kinds in (("score", score, (int, float)), ("show", show, str)):
        if not isinstance(part, dict) or not all(isinstance(value, kinds) for value in part.values()):
            raise Misuse(
                f"{where}: `{name}` is an object of {'weights' if name == 'score' else 'names with dots'}"
            )
    settings = dict(as_texts(found.get("settings"), f"{where}: settings"))
    for key, value in settings.items():
        if key in OWN - {"ARTIFACT", "EVAL_ONLY"}:
            raise Misuse(f"{where}: {key} is set by this tool")
        if strange := [arm for arm in RUN.findall(value) if arm and arm not in arms]:
            raise Misuse(f"{where}: {key}={value} names {strange[0]}, which is no arm that is trained")
    return {"settings": settings, "report": found["report"], "score": score, "show": show}


class Evaluation(Job):
    """One evaluation of a finished run; its result is a report, whatever that says."""

    def __init__(self, report: str, since: float, *arguments):
        super().__init__(*arguments)
        self.file, self.since, self.result = report, since, f"{report} of this script, a JSON object"

    def __str__(self) -> str:
        return f"{self.arm} seed {self.seed}, evaluation"

    def told(self) -> str:
        return self.file

    def ended_well(self, code: int) -> bool:
        return code in (0, 1)

    def read(self, script_sha256: str) -> bool:
        """Takes the report, unless a run that it is about is newer, or the script another."""
        path = self.folder / self.file
        if not path.exists() or path.stat().st_mtime < self.since:
            return False
        try:
            found = read_json(path)
        except Misuse:
            return False
        if not isinstance(found, dict) or found.get("script_sha256", script_sha256) != script_sha256:
            return False
        self.metrics = found
        return True


def number_at(report: dict, name: str) -> float | None:
    """The number under keys with dots between them, digits in lists; None where there is none."""
    found = report
    for key in name.split("."):
        try:
            found = found[int(key)] if isinstance(found, list) else found[key]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    fine = isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
    return found if fine else None


def composite(report: dict, weights: dict[str, float]) -> float | None:
    """The weighted sum of a report's numbers; None if one is missing."""
    numbers = [number_at(report, name) for name in weights]
    if not weights or None in numbers:
        return None
    return sum(weight * value for weight, value in zip(weights.values(), numbers))


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def rank(plan: Plan, jobs: list[Job]) -> list[dict]:
    """One entry an arm with a card or an evaluation: score and shown numbers,
    means over its seeds; best score first, none last.
    """
    rows, wanted = [], {job.seed for job in jobs}
    for arm in (*plan.own, *plan.of):
        mine = [job for job in jobs if job.arm == arm and job.good]
        if arm not in plan.cards and (arm in plan.spared or not plan.evaluate):
            continue
        scores = {job.seed: composite(job.metrics, plan.evaluate.get("score", {})) for job in mine}
        whole = scores.keys() == wanted  # a mean over fewer seeds is not to be compared
        shown = {title: mean([number_at(job.metrics, name) for job in mine]) if whole else None
                 for title, name in plan.evaluate.get("show", {}).items()}
        rows.append(
            {
                "arm": arm,
                "score": mean([*scores.values()]) if whole and None not in scores.values() else None,
                "scores": scores,
                "shown": shown,
                **dict.fromkeys(CARD, ""),
                **plan.cards.get(arm, {}),
            }
        )
    return sorted(rows, key=lambda row: math.inf if row["score"] is None else -row["score"])


def cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"


def ranking(rows: list[dict]) -> str:
    """The table of `rank`, with the cards."""
    titles = [*(rows[0]["shown"] if rows else ())]
    body = [
        [
            row["arm"],
            cell(row["score"]),
            *map(cell, row["shown"].values()),
            *(row[key].replace("|", "\\|") for key in CARD),
        ]
        for row in rows
    ]
    return markdown_table(["ranked", "score", *titles, *CARD], body) if rows else ""


def ranking_rows(rows: list[dict]) -> dict:
    """The table of `rank` for the kind `rows` of scripts/tables.py:
    titles that an arm has a number for, no cards.
    """
    if not rows:
        return {}
    titles = [title for title in rows[0]["shown"] if any(row["shown"][title] is not None for row in rows)]
    return {
        "header": ["arm", "score", *titles],
        "rows": [
            [f"`{row['arm']}`", cell(row["score"]), *(cell(row["shown"][title]) for title in titles)]
            for row in rows
        ],
        "note": f"Means over {max(len(row['scores']) for row in rows)} seeds.",
    }


def evaluations(plan: Plan, jobs: list[Job], settings, name_of) -> list[Evaluation]:
    """What is to be evaluated: every arm but spared ones, of the seeds whose runs are good. settings(arm) is
    what its runs got, name_of(settings, seed) the name of an evaluation's folder.
    """
    good, found = {(job.arm, job.seed): job for job in jobs if job.good}, []
    for arm in (*plan.own, *plan.of):
        source, mine = plan.of.get(arm, (arm, {}))
        for seed in dict.fromkeys(job.seed for job in jobs) if arm not in plan.spared else ():
            wanted = {
                source,
                *(
                    other or source
                    for value in plan.evaluate["settings"].values()
                    for other in RUN.findall(value)
                ),
            }
            if missing := sorted(name for name in wanted if (name, seed) not in good):
                say(f"no evaluation of {arm} seed {seed}: no good run of {', '.join(missing)}")
                continue

            def folder(match: re.Match, source=source, seed=seed) -> str:
                return str(good[match[1] or source, seed].folder)

            asked = {key: RUN.sub(folder, value) for key, value in (plan.evaluate["settings"] | mine).items()}
            asked = settings(source) | asked
            since = max((good[name, seed].folder / "metrics.json").stat().st_mtime for name in wanted)
            place = good[source, seed].folder.parent / name_of(asked, seed)
            found.append(Evaluation(plan.evaluate["report"], since, arm, seed, asked, place))
    return found


def collect_arms(jobs: list[Job], folder: Path, names: dict[str, str], labels: dict[str, str]) -> None:
    """FOLDER/ablations/<name>/seed<N>.json of the good runs, and
    arms.json, where a label that is there stays.

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
            raise Misuse(
                f"{old}: the base of other arms, of another script, data or setting; move {place} away"
            )
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
        metrics = (job.folder / "metrics.json").read_bytes()
        write_atomic(place / name / f"seed{job.seed}.json", without_places(metrics, job.folder.parent))
        notes.setdefault(name, labels[job.arm])
    if good:
        write_atomic(index, f"{json.dumps(notes, indent=1, ensure_ascii=False)}\n".encode())
        say(f"collected {place}: {', '.join(notes)}")


def named_set(script: Path, name: str) -> Path:
    """The file of arms that a script offers under a name."""
    path = script.parent / "sweeps" / f"{name}.json"
    offered = sorted(
        each.name.removesuffix(".json")
        for each in path.parent.glob("*.json")
        if not each.name.endswith(".summary.json")
    )
    if name not in offered:
        raise Misuse(f"--named {name}: {script.parent.name} offers {', '.join(offered) or 'no sets'}")
    return path


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument(
        "--grid", action="append", default=[], metavar="NAME=V1,V2", help="an axis; repeatable"
    )
    options.add_argument("--arms", metavar="FILE", help="JSON file of arms")
    options.add_argument(
        "--named", metavar="NAME", help="a file of arms that the script offers, in sweeps/ beside it"
    )
    options.add_argument("--base", metavar="ARM", help="compare with this arm (default: the first)")
    options = options.parse_args(argv)
    if sum(map(bool, (options.grid, options.arms, options.named))) != 1:
        raise Misuse("the arms: --grid NAME=V1,V2 or --arms FILE or --named NAME, one of them, is needed")
    script = find_script(options.script)
    known, path = {*variables(script)}, Path(options.arms or "")
    if options.named:
        path = named_set(script, options.named)
    plan = Plan({}, grid(options.grid), {}) if options.grid else listed(path)
    shared, own, labels = plan.shared, plan.own, plan.labels
    base = options.base or next(iter(own))
    if base not in own:
        raise Misuse(f"--base {base}: the arms are {', '.join(own)}")
    everywhere = settings_of(options, known)
    if clash := sorted(assignments(options.set, "--set").keys() & shared.keys()):
        raise Misuse(f"--set {clash[0]}: {path} sets it for all arms")
    for name in sorted(everywhere.keys() & shared.keys()):
        say(f"{name}={everywhere[name]} is left out: {path} has {shared[name]} for all arms")
    arms = {name: known_only(everywhere | shared | mine, known, f"arm {name}") for name, mine in own.items()}
    for name, (_, mine) in plan.of.items():
        known_only(mine, known, f"arm {name}")
    known_only(plan.evaluate.get("settings", {}), known, "evaluate")
    names = {name: "base" if name == base else re.sub(r"[^\w.=+-]+", "-", name) for name in own}
    if len({*names.values()}) < len(names):
        raise Misuse(
            f"arms {', '.join(own)} against {base}: folders of one name, {', '.join(names.values())}"
        )
    for name, mine in own.items():
        pairs = " ".join(f"{key}={value}" for key, value in mine.items())
        labels.setdefault(name, f"`{pairs}`" if pairs else "what all arms share")

    whole: dict = {}

    def after(runner: Runner, jobs: list[Job], document: dict) -> tuple[list[Job], str]:
        """Evaluates what was trained; cards, evaluations and the ranking go into the document."""
        def name_of(settings: dict[str, str], seed: int) -> str:
            return run_id(script, runner.script_sha256, settings, seed)

        asked = evaluations(plan, jobs, arms.__getitem__, name_of) if plan.evaluate else []
        for job in asked:
            job.keep(runner.script_sha256)
        runner.ranks = 1
        runner.run(asked)
        rows = rank(plan, asked)
        document |= {
            "cards": plan.cards,
            "ranked": rows,
            "evaluations": [
                {
                    "arm": job.arm,
                    "seed": job.seed,
                    "state": job.state,
                    "folder": str(job.folder),
                    "exit_code": job.exit_code,
                    "tail": job.tail,
                    "score": composite(job.metrics, plan.evaluate["score"]),
                }
                for job in asked
            ],
        }
        whole.update({"sweep": path.stem, **document, **ranking_rows(rows)})
        failed = [
            "\n    ".join([f"{job} failed, exit code {job.exit_code}:", *job.tail])
            for job in asked
            if job.state == "failed"
        ]
        return asked, "\n\n".join([ranking(rows), *failed])

    def collect(jobs: list[Job], folder: Path) -> None:
        collect_arms(jobs, folder, names, labels)
        if whole:
            (folder / "sweeps").mkdir(exist_ok=True)
            text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
            write_atomic(
                folder / "sweeps" / f"{path.stem}.summary.json",
                without_places(text.encode(), jobs[0].folder.parent),
            )

    return carry_out(
        options, script, known, arms, base, collect, after if plan.cards or plan.evaluate else None
    )


if __name__ == "__main__":
    command(main)
