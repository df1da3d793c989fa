"""Writes the tables of README files from `metrics.json` files: no number in a table is typed.

    python scripts/tables.py            rewrites what stands between the markers, and looks at nothing else
    python scripts/tables.py --check    exits with 1 where a README and its files disagree: a table that is
                                        not what the files give, and a number in prose that no file supports,
                                        a line `README:LINE: ...` each; scripts/prose.py has the rules

A marker pair `<!-- table: KIND FOLDER [ARGUMENT] -->` ... `<!-- end -->` names what to build from the files
below FOLDER: `headline` (a sentence), `seeds` (a row a seed), `ablation` (arms of a folder
`ablations/<arm>/seed*.json` against the arm `base`, seeds paired), `bench` (what scripts/bench.py --json
wrote, with --twin or without), `classes` (bits by byte class), `passes` (every scoring pass against the one
before it that it adds to, seeds paired), `proofs` (what codec.py prove --json wrote), `audit` (what audit.py
RECORD --json printed), and `rows`: any JSON file {"header": [...], "rows": [[...]], "note": "..."}, or one
part of it, `FILE#PART`. Tools write it for a table of their own: scripts/rate.py, scripts/sweep.py (a
ranking), and the tools in the records' folders.

A table of a record ends with the script that made its numbers; where these do not hold for the record's
present script, *stale* says so. Numbers hold there if `scripts/lineage.py carry` has shown it. Verdicts are
those of scripts/stats.py. Exit code 2: a file or a number that a table needs is missing. The root README's
table of records is written by scripts/leaderboard.py.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import prose
import stats
from bench import report
from family import FINDINGS, FINE, ROOT, Misuse, command, markdown_table, read_json, write_atomic
from stats import spread, verdict

MARK = re.compile(r"(<!-- table: (\w+) (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.S)


def headline(metrics: dict) -> float:
    return metrics["val_bpb"]


def seed_runs(folder: Path) -> list[dict]:
    """The metrics of a record's seeds, by seed.

    Raises:
        Misuse: there is none, or a folder is not named for its seed.
    """
    paths = list(folder.glob("seed*/metrics.json"))
    if not paths:
        raise Misuse(f"{folder}/seed*/metrics.json: no such file")
    runs = [read_json(path) for path in sorted(paths, key=lambda path: seed_of(path.parent))]
    return [stats.as_carried(folder, run) for run in runs]


def seed_of(path: Path) -> int:
    """The seed that a folder or a file `seed<N>.json` is named for.

    Raises:
        Misuse: it is not.
    """
    if not re.fullmatch(r"seed\d+", path.stem):
        raise Misuse(f"{path}: seed<N> is needed")
    return int(path.stem[4:])


def is_draft(folder: Path) -> bool:
    """Whether a record has been started and not measured: its tables say so."""
    path = folder / "submission.json"
    return (
        path.is_file() and bool(read_json(path).get("draft")) and not list(folder.glob("seed*/metrics.json"))
    )


# The files that a kind of table reads below its folder; {} is the argument of its marker.
SOURCES = {
    "headline": "seed*/metrics.json", "seeds": "seed*/metrics.json", "passes": "seed*/metrics.json",
    "classes": "seed*/metrics.json", "ablation": "ablations/*/seed*.json", "proofs": "prove_*.json",
    "bench": "bench.json", "audit": "audit.json", "rows": "rows.json",
}


def script_named(path: Path) -> str | None:
    """sha256 of the script that a result file names: at its top, or in each of its rows."""
    found = read_json(path)
    rows = found if isinstance(found, list) else [found]
    named = {row.get("script_sha256") for row in rows if isinstance(row, dict)}
    return named.pop() if len(named) == 1 else None


def of_script(kind: str, folder: Path, argument: str | None, root: Path) -> str:
    """The line below a record's table: which script made its numbers; below a sentence only where stale."""
    record = next((place for place in (folder, *folder.parents) if (place / "train_gpt.py").is_file()), None)
    if record is None or record == root or is_draft(record):
        return ""
    if kind == "rows" and "script" in rows_of(folder, argument)["header"]:
        return ""  # each row names its own
    results = {}
    for path in sorted(folder.glob((argument or SOURCES[kind]).partition("#")[0])):
        inside = path.relative_to(record)
        name = inside.parent if inside.name == "metrics.json" else inside
        results[name.as_posix()] = script_named(path)
    line = stats.script_line(record, results)
    if kind == "headline" and "stale" not in line:
        return ""
    return f"\n\n{line}" if line else ""


def sentence(folder: Path, _) -> str:
    runs = seed_runs(folder)
    scores = [headline(run) for run in runs]
    deviation = f"standard deviation {statistics.stdev(scores):.4f}" if len(runs) > 1 else "one seed"
    return (
        f"**{statistics.mean(scores):.4f} BPB** (`{runs[0]['headline']}`, mean of seeds "
        f"{', '.join(str(run['seed']) for run in runs)}, {deviation}) in at most "
        f"{max(run['bytes_total'] for run in runs):,} bytes, code included; {runs[0]['params']:,} "
        "parameters."
    )


def headline_entry(run: dict) -> dict:
    return run["evals"][run["headline"]]


def evaluations(runs: list[dict]) -> dict[str, str]:
    """{evaluation without the width of the artifact's weights: its name} of those that all runs have."""
    return {stats.without_bits(name): name for name in runs[0]["evals"]
            if all(name in run["evals"] for run in runs)}


# Columns of the table `seeds`, each named as in the log and in metrics.json.
COLUMNS = ("final_raw", "final_ema", "final_int_roundtrip", "final_int_sliding")


def seeds(folder: Path, _) -> str:
    runs = seed_runs(folder)
    known = evaluations(runs)
    shown = [name for name in COLUMNS if name in known] or [*known][:1]
    names = [known[name] for name in shown]
    rows = [
        [
            run["seed"],
            *(f"{run['evals'][name]['val_bpb']:.4f}" for name in names),
            f"{run['bytes_model']:,}",
            f"{run['bytes_code']:,}",
            f"{run['bytes_total']:,}",
            f"{run['ms_per_step']:.0f}",
            f"{run['eval_seconds']:.0f}",
        ]
        for run in runs
    ]
    means = [statistics.mean(run["evals"][name]["val_bpb"] for run in runs) for name in names]
    rows.append(["**mean**", *(f"**{mean:.4f}**" for mean in means), *([""] * 5)])
    first = runs[0]
    note = (
        f"{first['params']:,} parameters, {first['steps']} steps, {first['device']}, torch "
        f"{first['torch']}, data "
        f"`{first['dataset']['name']}`: {first['evals'][names[0]]['bytes']:,} validation bytes in "
        f"{first['evals'][names[0]]['targets']:,} targets."
    )
    header = ["seed", *(f"`{name}`" for name in names), "model bytes", "code bytes", "total bytes"]
    return markdown_table([*header, "ms a step", "scoring s"], rows) + f"\n\n{note}"


# Each scoring pass and the pass that it is to be compared with.
PASSES = {
    "final_raw": None,
    "final_ema": "final_raw",
    "final_int_roundtrip": "final_ema",
    "final_int_sliding": "final_int_roundtrip",
    "final_int_ttt": "final_int_sliding",
    "final_int_sliding_tilt": "final_int_sliding",
    "final_int_sliding_mix": "final_int_sliding",
    "final_int_ttt_mix": "final_int_sliding_mix",
}


def passes(folder: Path, _) -> str:
    runs = seed_runs(folder)
    rows, known = [], evaluations(runs)
    for key in (*(key for key in PASSES if key in known), *(key for key in known if key not in PASSES)):
        name, before = known[key], PASSES.get(key)
        scores = [run["evals"][name]["val_bpb"] for run in runs]
        row = [f"`{name}`", *(f"{score:.4f}" for score in scores), f"{statistics.mean(scores):.4f}",
               f"{statistics.mean(run['evals'][name]['seconds'] for run in runs):.0f}"]
        if before in known:
            mean, half, word = verdict([run["evals"][name]["val_bpb"] - run["evals"][known[before]]["val_bpb"]
                                        for run in runs])
            interval = f"{mean - half:+.4f} to {mean + half:+.4f}" if math.isfinite(half) else "one seed"
            row += [f"`{known[before]}`", f"{mean:+.4f}", interval, word]
        rows.append(row + [""] * (len(runs) + 7 - len(row)))
    header = ["pass", *(f"seed {run['seed']}" for run in runs), "mean", "seconds", "against", "difference",
              "95 % interval", "verdict"]
    first = runs[0]
    note = (
        f"BPB on {headline_entry(first)['bytes']:,} bytes; {first['steps']} steps, {first['device']}, torch "
        f"{first['torch']}, data `{first['dataset']['name']}`."
    )
    return f"{markdown_table(header, rows)}\n\n{note}"


def proofs(folder: Path, _) -> str:
    """What `codec.py prove --json` printed, a file `prove_*.json` a proof."""
    found = [read_json(path) for path in sorted(folder.glob("prove_*.json"))]
    if not found:
        raise Misuse(f"{folder}/prove_*.json: no such file")
    header = [
        "settings",
        "ids",
        "coded bytes",
        "-log2 p of the stream",
        "of the batched scorer",
        "updates",
        "encode s",
        "decode s",
        "score s",
        "",
    ]
    return markdown_table(
        header,
        [
            [
                " ".join(f"`{name}={value}`" for name, value in run["set"].items()) or "the record's own",
                f"{run['ids']:,}",
                f"{run['coded_bytes']:,}",
                f"{run['stream_bytes']:,.1f}",
                f"{run['score_bytes']:,.1f}",
                run["updates"],
                *(f"{run[f'{part}_seconds']:.0f}" for part in ("encode", "decode", "score")),
                "PASS" if run["pass"] else "FAIL",
            ]
            for run in found
        ],
    )


def rows_of(folder: Path, argument: str | None) -> dict:
    """{"header", "rows", "note"} of a file, or of a part of it, FILE#PART."""
    name, _, part = (argument or "rows.json").partition("#")
    found = read_json(folder / name)
    return found[part] if part else found


def plain_rows(folder: Path, argument: str | None) -> str:
    found = rows_of(folder, argument)
    table = markdown_table(found["header"], found["rows"])
    return f"{table}\n\n{found['note']}" if found.get("note") else table


@dataclass(frozen=True)
class Arm:
    """One arm of an ablation beside its base, {seed: metrics} each; seeds that both have are paired."""

    name: str
    why: str
    runs: dict[int, dict]
    base: dict[int, dict]

    @property
    def shared(self) -> list[int]:
        return sorted(self.runs.keys() & self.base.keys())

    @property
    def score(self) -> float:
        return statistics.mean(headline(self.runs[seed]) for seed in self.shared)

    @property
    def differences(self) -> list[float]:
        """BPB against the base, one a shared seed."""
        return [headline(self.runs[seed]) - headline(self.base[seed]) for seed in self.shared]

    @property
    def step_time(self) -> float:
        """Of the base's."""
        ratios = (self.runs[seed]["ms_per_step"] / self.base[seed]["ms_per_step"] for seed in self.shared)
        return statistics.mean(ratios)

    @property
    def bytes_model(self) -> float:
        return statistics.mean(self.runs[seed]["bytes_model"] for seed in self.shared)


def ablation_arms(folder: Path) -> list[Arm]:
    """The arms in `ablations/<arm>/seed*.json` of a folder: the base, then the others as arms.json has them.

    Raises:
        Misuse: arms.json names other arms, there is no base, or arms are not to be compared.
    """
    found = {
        path.name: {seed_of(file): read_json(file) for file in path.glob("seed*.json")}
        for path in sorted({file.parent for file in (folder / "ablations").glob("*/seed*.json")})
    }
    notes = read_json(folder / "ablations" / "arms.json")
    if set(found) != set(notes) or "base" not in found:
        raise Misuse(
            f"{folder}/ablations: arms.json names {', '.join(notes)}, the folders are {', '.join(found)}; "
            "base is one of both"
        )
    groups = {name: stats.Group(name, [stats.read_run(folder / "ablations" / name / f"seed{seed}.json")
                                       for seed in sorted(runs)]) for name, runs in found.items()}
    for name, group in groups.items():
        against = stats.check_pair(group, groups["base"]) if name != "base" else []
        for finding in stats.check_group(group) + against:
            if finding.level == "FAIL":
                raise Misuse(f"{folder}/ablations/{name}: {finding.rule}: {finding.text}")
    return [Arm(name, notes[name], found[name], found["base"])
            for name in sorted(found, key=lambda name: (name != "base", list(notes).index(name)))]


def ablation_note(arms: list[Arm]) -> str:
    """What was scored, and how far seeds are apart."""
    first = next(iter(arms[0].runs.values()))
    pooled = spread(map(headline, arm.runs.values()) for arm in arms)
    steps = sorted({run["steps"] for arm in arms for run in arm.runs.values()})
    some = " or some of them" if any(len(arm.shared) < len(arms[0].shared) for arm in arms) else ""
    return (
        f"`{first['headline']}` BPB, {' or '.join(map(str, steps))} steps, seeds "
        f"{', '.join(map(str, sorted(arms[0].runs)))}{some}, {first['device']}, "
        f"{first['evals'][first['headline']]['bytes']:,} validation bytes of "
        f"`{first['dataset']['name']}`; spread {pooled:.4f}."
    )


def ablation(folder: Path, _) -> str:
    arms = ablation_arms(folder)
    base = arms[0]
    rows = [[f"base: {base.why}", len(base.shared), f"{base.score:.4f}", "", "", "", "1.00",
             f"{base.bytes_model:,.0f}"]]
    for arm in arms[1:]:
        if not arm.shared:
            raise Misuse(f"{folder}/ablations/{arm.name}: no seed that base has, too")
        mean, half, word = verdict(arm.differences)
        interval = f"{mean - half:+.4f} to {mean + half:+.4f}" if math.isfinite(half) else "one seed"
        rows.append([arm.why, len(arm.shared), f"{arm.score:.4f}", f"{mean:+.4f}", interval, word,
                     f"{arm.step_time:.2f}", f"{arm.bytes_model:,.0f}"])
    header = ["arm", "seeds", "BPB", "difference", "95 % interval", "verdict", "step time", "model bytes"]
    return f"{markdown_table(header, rows)}\n\n{ablation_note(arms)}"


def bench(folder: Path, argument: str | None) -> str:
    return report(read_json(folder / (argument or "bench.json")))


def classes(folder: Path, _) -> str:
    runs = seed_runs(folder)
    entry = [run["evals"][run["headline"]] for run in runs]
    total = statistics.mean(sum(e["bits_by_class"].values()) for e in entry)
    rows = [
        [name, f"{statistics.mean(e['bits_by_class'].get(name, 0.0) for e in entry) / total:.1%}"]
        for name in entry[0]["bits_by_class"]
    ]
    return markdown_table(["class of the target byte", "share of all bits"], rows)


def audit(folder: Path, argument: str | None) -> str:
    """What the auditor found: the counts of verdicts, then a row a
    finding; rules that found the same share one.
    """
    found = read_json(folder / (argument or "audit.json"))
    counts = Counter(finding["level"] for finding in found)
    rules: dict[tuple[str, str], list[str]] = {}
    for finding in found:
        rules.setdefault((finding["level"], finding["text"]), []).append(finding["rule"])
    return (
        ", ".join(f"{counts[level]} {level}" for level in ("PASS", "WARN", "FAIL"))
        + ".\n\n"
        + markdown_table(
            ["what was found", "rule", "verdict"],
            [[text.replace("|", "\\|"), ", ".join(named), level] for (level, text), named in rules.items()],
        )
    )


KINDS = {
    "headline": sentence, "seeds": seeds, "ablation": ablation, "bench": bench, "classes": classes,
    "passes": passes, "proofs": proofs, "audit": audit, "rows": plain_rows,
}


def rewrite(path: Path, root: Path = ROOT) -> str:
    """The text of a README with every table between markers built anew from the files below `root`.

    Raises:
        Misuse: a marker names no table, or a table's files are missing or lack a number.
    """
    def replace(match: re.Match) -> str:
        start, kind, folder, argument, end = match.groups()
        if "<!-- table:" in match[0][len(start):]:
            raise Misuse(f"{path}: table {kind} of {folder}: no <!-- end --> before the next table")
        if kind not in KINDS:
            raise Misuse(f"{path}: table kind {kind} is not one of {', '.join(KINDS)}")
        try:
            text = KINDS[kind](root / folder, argument)
            return f"{start}{text}{of_script(kind, root / folder, argument, root)}\n{end}"
        except Misuse:
            if not any(map(is_draft, (root / folder, (root / folder).parent))):
                raise
            return f"{start}Not measured yet.\n{end}"
        except KeyError as error:
            raise Misuse(f"{path}: table {kind} of {folder}: its files have no {error}") from None
        except (TypeError, AttributeError, ValueError) as error:
            raise Misuse(
                f"{path}: table {kind} of {folder}: its files are not what it is made of ({error})"
            ) from None

    text = path.read_text()
    new = MARK.sub(replace, text)
    if len(MARK.findall(text)) < len(re.findall("^ *<!-- table:", text, re.M)):
        raise Misuse(f"{path}: a table without <!-- end -->, or a marker other than "
                     "<!-- table: KIND FOLDER FILE -->")
    return new


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 where something would change"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    options = parser.parse_args(argv)
    stale = []
    others = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "records").glob("*/README.md")])
    for path in [ROOT / "README.md", *others]:
        new = rewrite(path)
        if new != path.read_text():
            stale.append(path.relative_to(ROOT))
            if not options.check:
                write_atomic(path, new.encode())
    word = "stale" if options.check else "rewritten"
    found = {word: [path.as_posix() for path in stale]}
    if options.check:
        found["unsupported"] = prose.check(ROOT)
    if options.json:
        print(json.dumps(found))
    else:
        lines = [*(f"{word}: {path}" for path in found[word]), *found.get("unsupported", [])]
        agree = "all tables and numbers agree" if options.check else "all tables agree"
        print("\n".join(lines) or agree)
    return FINDINGS if options.check and any(found.values()) else FINE


if __name__ == "__main__":
    command(main)
