"""Writes the tables of README files from `metrics.json` files: no number in a table is typed.

    python scripts/tables.py            rewrites what stands between the markers
    python scripts/tables.py --check    exits with 1 where a README and its files disagree

A marker pair `<!-- table: KIND FOLDER [ARGUMENT] -->` ... `<!-- end -->` names what to build from the files below FOLDER:
`headline` (a sentence), `seeds` (a row a seed), `ablation` (arms of a folder `ablations/<arm>/seed*.json` against the arm `base`, seeds paired),
`bench` (what scripts/bench.py --json wrote, with --twin or without), `classes` (bits by byte class), `sweep` (training loss of single runs, `sweep.json`),
`passes` (every scoring pass against the one before it that it adds to, seeds paired), `coders` and `curve` (what scripts/rate.py wrote), `proofs` (what codec.py prove
--json wrote), `plan` (fit.py --check --json), `gain` (a mixture's gain by training steps), `rows` (any JSON file {"header": [...],
"rows": [[...]], "note": "..."} that a tool wrote), `generation` (bench.json of GENERATE_BENCH), `gate` (gate.json of EVAL_GATE), `ranking` (what
sweep.py --collect wrote of a named set), `history` (validation during a run, from its metrics.jsonl) and `audit` (what audit.py RECORD --json printed).

A table of a record ends with the script that made its numbers; where these do not hold for the record's present script, *stale* says so.
Numbers hold there if `scripts/lineage.py carry` has shown it.
Verdicts are those of scripts/stats.py. Exit code 2: a file or a number that a table needs is missing. The root README's table of records is
written by scripts/leaderboard.py.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import Counter
from pathlib import Path

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
    return path.is_file() and bool(read_json(path).get("draft")) and not list(folder.glob("seed*/metrics.json"))


# The files that a kind of table reads below its folder; {} is the argument of its marker.
SOURCES = {
    "headline": "seed*/metrics.json", "seeds": "seed*/metrics.json", "passes": "seed*/metrics.json",
    "classes": "seed*/metrics.json", "ablation": "ablations/*/seed*.json", "proofs": "prove_*.json",
    "gain": "steps*.json", "history": "metrics.json", "ranking": "sweeps/{}.summary.json",
    "coders": "coders.json", "curve": "curve.json", "plan": "plan.json", "gate": "gate.json",
    "generation": "bench.json", "bench": "bench.json", "sweep": "sweep.json", "audit": "audit.json",
}


def script_named(path: Path) -> str | None:
    """sha256 of the script that a result file names: at its top, or in each of its rows."""
    found = read_json(path)
    rows = found if isinstance(found, list) else [found]
    named = {row.get("script_sha256") for row in rows if isinstance(row, dict)}
    return named.pop() if len(named) == 1 else None


def of_script(kind: str, folder: Path, argument: str | None, root: Path) -> str:
    """The line below a table of a record: which script made its numbers. A sentence has it only where stale."""
    record = next((place for place in (folder, *folder.parents) if (place / "train_gpt.py").is_file()), None)
    if record is None or record == root or is_draft(record):
        return ""
    pattern = SOURCES.get(kind, argument or "").format(argument)
    if argument and kind not in ("ranking", "history"):
        pattern = argument
    results = {}
    for path in sorted(folder.glob(pattern)):
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
        f"{max(run['bytes_total'] for run in runs):,} bytes, code included; {runs[0]['params']:,} parameters."
    )


def headline_entry(run: dict) -> dict:
    return run["evals"][run["headline"]]


def evaluations(runs: list[dict]) -> dict[str, str]:
    """{evaluation without the width of the artifact's weights: its name} of those that all runs have."""
    return {re.sub(r"^final_int\d+", "final_int", name): name for name in runs[0]["evals"]
            if all(name in run["evals"] for run in runs)}


def width(name: str) -> str:
    """Bits of `final_int6_...`, as text; empty for another pass."""
    found = re.match(r"final_int(\d+)", name)
    return found[1] if found else ""


# Columns of the table `seeds`.
COLUMNS = {"final_raw": "raw", "final_ema": "EMA", "final_int_roundtrip": "int{}",
           "final_int_sliding": "int{} sliding"}


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
        f"{first['params']:,} parameters, {first['steps']} steps, {first['device']}, torch {first['torch']}, data "
        f"`{first['dataset']['name']}`: {first['evals'][names[0]]['bytes']:,} validation bytes in "
        f"{first['evals'][names[0]]['targets']:,} targets."
    )
    columns = [COLUMNS.get(key, name).format(width(name)) for key, name in zip(shown, names)]
    header = ["seed", *columns, "model bytes", "code bytes", "total bytes"]
    return markdown_table([*header, "ms a step", "scoring s"], rows) + f"\n\n{note}"


# Each scoring pass, what it is called, and the pass that it is to be compared with. {} is the 6 of `final_int6_...`.
PASSES = {
    "final_raw": ("raw weights", None), "final_ema": ("averaged weights (EMA)", "final_raw"),
    "final_int_roundtrip": ("int{}", "final_ema"), "final_int_sliding": ("int{} sliding", "final_int_roundtrip"),
    "final_int_ttt": ("+ TTT", "final_int_sliding"), "final_int_sliding_tilt": ("+ tilt", "final_int_sliding"),
    "final_int_sliding_mix": ("+ mixture", "final_int_sliding"),
    "final_int_ttt_mix": ("+ TTT and mixture", "final_int_sliding_mix"),
}


def passes(folder: Path, _) -> str:
    runs = seed_runs(folder)
    rows, known = [], evaluations(runs)
    for key in (*(key for key in PASSES if key in known), *(key for key in known if key not in PASSES)):
        name, (label, before) = known[key], PASSES.get(key, (known[key].removeprefix("final_"), None))
        scores = [run["evals"][name]["val_bpb"] for run in runs]
        row = [label.format(width(name)), *(f"{score:.4f}" for score in scores), f"{statistics.mean(scores):.4f}",
               f"{statistics.mean(run['evals'][name]['seconds'] for run in runs):.0f}"]
        if before in known:
            mean, half, word = verdict([run["evals"][name]["val_bpb"] - run["evals"][known[before]]["val_bpb"]
                                        for run in runs])
            row += [PASSES[before][0].format(width(known[before])), f"{mean:+.4f}",
                    f"{mean - half:+.4f} to {mean + half:+.4f}", word]
        rows.append(row + [""] * (len(runs) + 7 - len(row)))
    header = ["pass", *(f"seed {run['seed']}" for run in runs), "mean", "seconds", "against", "difference",
              "95 % interval", "verdict"]
    first = runs[0]
    note = (f"BPB on {headline_entry(first)['bytes']:,} bytes; {first['steps']} steps, {first['device']}, torch "
            f"{first['torch']}, data `{first['dataset']['name']}`.")
    return f"{markdown_table(header, rows)}\n\n{note}"


def coders(folder: Path, argument: str | None) -> str:
    from rate import coders_table  # brings torch, which no other table needs
    return coders_table(read_json(folder / (argument or "coders.json")))


def curve(folder: Path, argument: str | None) -> str:
    from rate import curve_table
    return curve_table(read_json(folder / (argument or "curve.json")))


def proofs(folder: Path, _) -> str:
    """What `codec.py prove --json` printed, a file `prove_*.json` a proof."""
    found = [read_json(path) for path in sorted(folder.glob("prove_*.json"))]
    if not found:
        raise Misuse(f"{folder}/prove_*.json: no such file")
    header = ["settings", "ids", "coded bytes", "-log2 p of the stream", "of the batched scorer", "updates", "encode s",
              "decode s", "score s", ""]
    return markdown_table(header, [
        [" ".join(f"`{name}={value}`" for name, value in run["set"].items()) or "the record's own",
         f"{run['ids']:,}", f"{run['coded_bytes']:,}", f"{run['stream_bytes']:,.1f}", f"{run['score_bytes']:,.1f}",
         run["updates"], *(f"{run[f'{part}_seconds']:.0f}" for part in ("encode", "decode", "score")),
         "PASS" if run["pass"] else "FAIL"] for run in found])


def plan(folder: Path, argument: str | None) -> str:
    """What `fit.py --check --json` printed; an artifact is named for its folder."""
    return markdown_table(["artifact", "parameters", "planned bytes", "packed bytes", "error"], [
        [Path(row["artifact"]).parent.name, f"{row['parameters']:,}", f"{row['planned']:,}", f"{row['bytes']:,}",
         f"{row['error']:+.1%}"] for row in read_json(folder / (argument or "plan.json"))])


def gain(folder: Path, _) -> str:
    """The mixture's gain by training steps: runs `steps<N>.json`, and the record's own of the same seed."""
    runs = [read_json(path) for path in folder.glob("steps*.json")]
    if not runs:
        raise Misuse(f"{folder}/steps*.json: no such file")
    runs.append(read_json(folder.parent / f"seed{runs[0]['seed']}" / "metrics.json"))
    rows = []
    for run in sorted(runs, key=lambda run: run["steps"]):
        alone, mixed = (run["evals"][f"final_int6_sliding{end}"] for end in ("", "_mix"))
        rows.append([f"{run['steps']:,}", alone["stride"], f"{alone['val_bpb']:.4f}", f"{mixed['val_bpb']:.4f}",
                     f"{alone['val_bpb'] - mixed['val_bpb']:.4f}"])
    return markdown_table(["steps", "stride", "network", "with the mixture", "gain"], rows) + (
        f"\n\nSeed {runs[0]['seed']}, int6 sliding, {alone['bytes']:,} bytes; one run each.")


def plain_rows(folder: Path, argument: str) -> str:
    found = read_json(folder / (argument or "rows.json"))
    table = markdown_table(found["header"], found["rows"])
    return f"{table}\n\n{found['note']}" if found.get("note") else table


def ablation(folder: Path, _) -> str:
    arms = {
        path.name: {seed_of(file): read_json(file) for file in path.glob("seed*.json")}
        for path in sorted({file.parent for file in (folder / "ablations").glob("*/seed*.json")})
    }
    notes = read_json(folder / "ablations" / "arms.json")
    if set(arms) != set(notes) or "base" not in arms:
        raise Misuse(f"{folder}/ablations: arms.json names {', '.join(notes)}, the folders are {', '.join(arms)}; "
                     "base is one of both")
    groups = {name: stats.Group(name, [stats.read_run(folder / "ablations" / name / f"seed{seed}.json")
                                       for seed in sorted(runs)]) for name, runs in arms.items()}
    for name, group in groups.items():
        against = stats.check_pair(group, groups["base"]) if name != "base" else []
        for finding in stats.check_group(group) + against:
            if finding.level == "FAIL":
                raise Misuse(f"{folder}/ablations/{name}: {finding.rule}: {finding.text}")
    base = arms.pop("base")
    rows = [
        [
            f"base: {notes['base']}",
            f"{statistics.mean(map(headline, base.values())):.4f}",
            "",
            "",
            "",
            "1.00",
            f"{statistics.mean(run['bytes_model'] for run in base.values()):,.0f}",
        ]
    ]
    ordered = sorted(arms.items(), key=lambda item: list(notes).index(item[0]))
    for name, runs in ordered:
        shared = sorted(runs.keys() & base.keys())
        mean, half, word = verdict([headline(runs[seed]) - headline(base[seed]) for seed in shared])
        interval = f"{mean - half:+.4f} to {mean + half:+.4f}" if math.isfinite(half) else "one seed"
        ratio = statistics.mean(runs[seed]["ms_per_step"] / base[seed]["ms_per_step"] for seed in shared)
        rows.append(
            [
                notes[name],
                f"{statistics.mean(headline(runs[seed]) for seed in shared):.4f}",
                f"{mean:+.4f}",
                interval,
                word,
                f"{ratio:.2f}",
                f"{statistics.mean(r['bytes_model'] for r in runs.values()):,.0f}",
            ]
        )
    first = next(iter(base.values()))
    pooled = spread(map(headline, runs.values()) for runs in [base, *arms.values()])
    note = (
        f"`{first['headline']}` BPB, {first['steps']} steps, seeds {', '.join(map(str, sorted(base)))}, "
        f"{first['device']}, {first['evals'][first['headline']]['bytes']:,} bytes of the last training documents; "
        f"spread {pooled:.4f}."
    )
    return (
        markdown_table(
            ["arm", "BPB", "difference", "95 % interval", "verdict", "step time", "model bytes"], rows
        )
        + f"\n\n{note}"
    )


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


def sweep(folder: Path, _) -> str:
    """Arms of one seed on equal batches, compared by training loss: {"setting", "rows": [{"change", "bits"}]}."""
    found = read_json(folder / "sweep.json")
    spans = list(found["rows"][0]["bits"])
    rows = [
        [row["change"], *(f"{row['bits'][span]:.4f}" if span in row["bits"] else "stopped" for span in spans)]
        for row in found["rows"]
    ]
    return (
        markdown_table(["arm", *(f"steps {span}" for span in spans)], rows)
        + f"\n\n{found['setting'].capitalize()}."
    )


def generation(folder: Path, argument: str | None) -> str:
    """Plain and speculative decoding, prompt by prompt, from the bench.json of GENERATE_BENCH."""
    found = read_json(folder / (argument or "bench.json"))
    rows = []
    for kind, title in (("greedy", "greedy"), ("sampled", "T = 1")):
        for name, result in found[kind].items():
            plain, ours = result["ar"], result["speculation"]
            rows.append([f"{name}, {title}", f"{plain['bytes_per_second']:.0f}", f"{ours['bytes_per_second']:.0f}",
                         f"**{result['ratio']:.2f}**", f"{ours['bytes_per_pass']:.2f}",
                         " ".join(f"{100 * share:.0f}" for share in ours["acceptance"][:4]),
                         f"{ours['verification']:.0%}", f"{ours['drafting']:.0%}", f"{plain['looping']:.0%}", f"{ours['looping']:.0%}"])
    settings, greedy = found["settings"], found["summary"]["greedy"]
    heads = "suffix drafts alone" if not found["heads"] else f"drafter {settings['DRAFTER']}"
    return markdown_table(["prompt", "plain, bytes/s", "with drafts", "ratio", "bytes a pass", "accepted at 1, 2, 3, 4, %",
                           "verifying", "drafting", "looping, plain", "with drafts"], rows) + (
        f"\n\n{settings['MAX_NEW_TOKENS']} bytes a prompt, median of {settings['BENCH_REPEATS']} runs of each kind in turn; {heads}; "
        f"{found['device']}, {found['threads']} threads, {found['dtype'].removeprefix('torch.')}, torch {found['torch']}. Greedy texts that differ: "
        f"{greedy['mismatches']}, and {greedy['near_ties']} at a near tie.")


def gate(folder: Path, argument: str | None) -> str:
    """The published conditions and the honest ones, from the gate.json of EVAL_GATE."""
    found = read_json(folder / (argument or "gate.json"))
    rows = [[f"{kind}: `{each['name']}`", "-" if each["value"] is None else f"{each['value']:.4f}", each["wanted"],
             "pass" if each["passed"] else f"fail ({each['why']})" if each["why"] else "fail"]
            for kind in ("published", "honest") for each in found[kind]["conditions"]]
    sizes = [f"{found[name]['params']:,} parameters, {found[name]['steps']:,} steps" for name in ("sgjm", "baseline")]
    return markdown_table(["condition", "value", "wanted", "verdict"], rows) + (
        f"\n\nSGJM: {sizes[0]}; baseline: {sizes[1]}; data `{found['dataset']['name']}`; {found['honest']['merge']['merged_pairs']:,} merged pairs "
        f"of {found['honest']['merge']['pairs']:,}.")


def ranking(folder: Path, argument: str | None) -> str:
    """Arms of a named set with their evaluations, means over seeds, best composite score first."""
    if argument is None:
        raise Misuse(f"{folder}: the name of a set is needed behind the folder")
    found = read_json(folder / "sweeps" / f"{argument}.summary.json")
    titles = [title for title in found["ranked"][0]["shown"] if any(row["shown"][title] is not None for row in found["ranked"])]
    rows = [[f"`{row['arm']}`", *("" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"
                                  for value in (row["score"], *(row["shown"][title] for title in titles)))] for row in found["ranked"]]
    return markdown_table(["arm", "score", *titles], rows) + f"\n\nMeans over {len(found['ranked'][0]['scores'])} seeds."


def history(folder: Path, argument: str | None) -> str:
    """Validation of the raw weights during a run, at most 12 of its places and the best of all."""
    path = folder / (argument or "metrics.jsonl")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise Misuse(f"{path}: {getattr(error, 'strerror', error)}") from None
    lines = [line for line in lines if "val_bpb" in line and "step" in line]
    if not lines:
        raise Misuse(f"{path}: no validation in it; VAL_LOSS_EVERY is to be set")
    best = min(lines, key=lambda line: line["val_bpb"])
    few = [line for i, line in enumerate(lines) if i % -(-len(lines) // 12) == 0 or line in (best, lines[-1])]
    return markdown_table(["step", *(f"{line['step']:,}" for line in few)], [
        ["BPB", *(f"**{line['val_bpb']:.4f}**" if line is best else f"{line['val_bpb']:.4f}" for line in few)],
        ["nats a byte", *(f"{line['val_bpb'] * math.log(2):.4f}" for line in few)]])


def audit(folder: Path, argument: str | None) -> str:
    """What the auditor found: the counts of verdicts, then a row a finding; rules that found the same share one."""
    found = read_json(folder / (argument or "audit.json"))
    counts = Counter(finding["level"] for finding in found)
    rules: dict[tuple[str, str], list[str]] = {}
    for finding in found:
        rules.setdefault((finding["level"], finding["text"]), []).append(finding["rule"])
    return ", ".join(f"{counts[level]} {level}" for level in ("PASS", "WARN", "FAIL")) + ".\n\n" + markdown_table(
        ["what was found", "rule", "verdict"], [[text.replace("|", "\\|"), ", ".join(named), level] for (level, text), named in rules.items()])


KINDS = {
    "headline": sentence, "seeds": seeds, "ablation": ablation, "bench": bench, "classes": classes,
    "sweep": sweep, "passes": passes, "coders": coders, "curve": curve, "proofs": proofs, "plan": plan, "gain": gain,
    "rows": plain_rows, "generation": generation, "gate": gate, "ranking": ranking, "history": history,
    "audit": audit,
}


def rewrite(path: Path, root: Path = ROOT) -> str:
    """The text of a README with every table between markers built anew from the files below `root`.

    Raises:
        Misuse: a marker names no table, or a table's files are missing or lack a number.
    """
    def replace(match: re.Match) -> str:
        start, kind, folder, argument, end = match.groups()
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
            raise Misuse(f"{path}: table {kind} of {folder}: its files are not what it is made of ({error})") from None

    return MARK.sub(replace, path.read_text())


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
    for path in [ROOT / "README.md", *sorted((ROOT / "records").glob("*/README.md"))]:
        new = rewrite(path)
        if new != path.read_text():
            stale.append(path.relative_to(ROOT))
            if not options.check:
                write_atomic(path, new.encode())
    word = "stale" if options.check else "rewritten"
    if options.json:
        print(json.dumps({word: [path.as_posix() for path in stale]}))
    else:
        print("\n".join(f"{word}: {path}" for path in stale) or "all tables agree")
    return FINDINGS if stale and options.check else FINE


if __name__ == "__main__":
    command(main)
