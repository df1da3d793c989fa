"""Tables of this record's own reports, as JSON that the kind `rows` of scripts/tables.py prints.

    python records/2026-11-21_SGJM/rows.py generation runs/bench/bench.json --out rows.json  of bench.py
    python records/2026-11-21_SGJM/rows.py kinds runs/bench/bench.json --out rows.json       the same, by kind
    python records/2026-11-21_SGJM/rows.py gate runs/gate/gate.json --out rows.json          of EVAL_GATE
    python records/2026-11-21_SGJM/rows.py history runs/NAME/metrics.jsonl --out rows.json  of a run

Without --out it prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from family import Misuse, command, markdown_table, read_json, write_atomic
from stats import verdict

LOOPING = 0.25  # of a text, beyond which the gate does not count it


def calm(result: dict) -> bool:
    """Neither text of a prompt loops, by the gate's rule."""
    return max(result[way]["looping"] for way in ("ar", "speculation")) <= LOOPING


def parted(found: dict) -> str:
    """A sentence about greedy texts, of which each prompt has several runs alike."""
    wrong, near = (sum(result[key] > 0 for result in found["greedy"].values())
                   for key in ("mismatches", "near_ties"))
    return f"Prompts whose greedy text differs with drafts: {wrong}, and {near} at a near tie."


def generation(path: Path) -> dict:
    """Plain and speculative decoding, prompt by prompt."""
    found = read_json(path)
    rows = []
    sampled = f"T = {found['settings'].get('TEMPERATURE', 1):g}"
    for kind, title in (("greedy", "greedy"), ("sampled", sampled)):
        for name, result in found[kind].items():
            plain, drafted = result["ar"], result["speculation"]
            rows.append([
                f"{name}, {title}",
                f"{plain['bytes_per_second']:.0f}",
                f"{drafted['bytes_per_second']:.0f}",
                f"**{result['ratio']:.2f}**",
                f"{drafted['bytes_per_pass']:.2f}",
                " ".join(f"{100 * share:.0f}" for share in drafted["acceptance"][:4]),
                f"{drafted['drafting']:.0%}",
                f"{plain['looping']:.0%}",
                f"{drafted['looping']:.0%}",
            ])
    header = [
        "prompt", "plain, bytes/s", "with drafts", "ratio", "bytes a pass", "accepted at 1, 2, 3, 4, %",
        "drafting", "looping, plain", "with drafts",
    ]

    settings = found["settings"]
    heads = f"drafter {settings['DRAFTER']}" if found["heads"] else "only suffix drafts"
    made_by = f"mlx {found['mlx']}" if "mlx" in found else "{threads} threads, torch {torch}".format(**found)
    dtype = found["dtype"].removeprefix("torch.")
    note = (
        f"{settings['MAX_NEW_TOKENS']} bytes a prompt, median of {settings['BENCH_REPEATS']} runs of each "
        "kind in "
        f"turn; {heads}; {found['device']}, {dtype}, {made_by}. {parted(found)}"
    )
    return {"header": header, "rows": rows, "note": note, "script_sha256": found["script_sha256"]}


def kinds(path: Path) -> dict:
    """Speed-ups by kind of text, the first word of a prompt's name, and of the prompts whose texts do not
    loop: the geometric mean with its interval, and the least."""
    found, rows = read_json(path), []
    sampled = f"T = {found['settings'].get('TEMPERATURE', 1):g}"
    for part, title in (("greedy", "greedy"), ("sampled", sampled)):
        results = list(found[part].values())
        groups = {"all": results, "texts that do not loop": [each for each in results if calm(each)]}
        for name, result in found[part].items():
            groups.setdefault(name.split()[0], []).append(result)
        for name, results in ((name, results) for name, results in groups.items() if results):
            ratios = [result["ratio"] for result in results]
            logs, span = [math.log(ratio) for ratio in ratios], ""
            if len(logs) > 1:
                mean, half, _ = verdict(logs)
                span = f"{math.exp(mean - half):.2f} to {math.exp(mean + half):.2f}"
            looping = sum(result["ar"]["looping"] for result in results) / len(results)
            rows.append([f"{name}, {title}", f"{len(results)}", f"**{math.exp(sum(logs) / len(logs)):.2f}**",
                         span, f"{min(ratios):.2f}", f"{looping:.0%}"])
    settings = found["settings"]
    note = (f"{settings['MAX_NEW_TOKENS']} bytes a prompt, median of {settings['BENCH_REPEATS']} runs of "
            f"each kind in turn; {found['device']}, {found['dtype'].removeprefix('torch.')}. A text loops if "
            f"more than {LOOPING:.0%} of it, plain or with drafts, does. {parted(found)}")
    header = ["prompts", "number", "ratio", "95 % interval", "least", "looping, plain"]
    return {"header": header, "rows": rows, "note": note, "script_sha256": found["script_sha256"]}


def gate(path: Path) -> dict:
    """The published conditions and the honest ones."""
    found = read_json(path)
    rows = []
    for kind in ("published", "honest"):
        for each in found[kind]["conditions"]:
            failed = f"fail ({each['why']})" if each["why"] else "fail"
            ends = each["interval"] or [None]
            rows.append([
                f"{kind}: `{each['name']}`",
                "-" if each["value"] is None else f"{each['value']:.4f}",
                "" if None in ends else "{:.4f} to {:.4f}".format(*ends),
                each["wanted"],
                "pass" if each["passed"] else failed,
            ])

    sizes = [
        f"{found[name]['params']:,} parameters, {found[name]['steps']:,} steps"
        for name in ("sgjm", "baseline")
    ]
    merge = found["honest"]["merge"]
    note = (
        f"SGJM: {sizes[0]}; baseline: {sizes[1]}; data `{found['dataset']['name']}`; "
        f"{merge['merged_pairs']:,} merged pairs of {merge['pairs']:,}."
    )
    header = ["condition", "value", "95 % interval", "wanted", "verdict"]
    return {"header": header, "rows": rows, "note": note, "script_sha256": found["script_sha256"]}


def history(path: Path) -> dict:
    """Validation of the raw weights during a run, at most 12 of its places and the best of all."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise Misuse(f"{path}: not lines of JSON: {error}") from None
    lines = [line for line in lines if "val_bpb" in line and "step" in line]
    if not lines:
        raise Misuse(f"{path}: no validation in it; set VAL_LOSS_EVERY")

    best = min(lines, key=lambda line: line["val_bpb"])
    every = -(-len(lines) // 12)
    few = [line for i, line in enumerate(lines) if i % every == 0 or line in (best, lines[-1])]

    def bits(line: dict) -> str:
        return f"**{line['val_bpb']:.4f}**" if line is best else f"{line['val_bpb']:.4f}"

    found = {
        "header": ["step", *(f"{line['step']:,}" for line in few)],
        "rows": [
            ["BPB", *map(bits, few)],
            ["nats a byte", *(f"{line['val_bpb'] * math.log(2):.4f}" for line in few)],
        ],
    }
    metrics = path.with_name("metrics.json")
    if metrics.is_file():
        found["script_sha256"] = read_json(metrics)["script_sha256"]
    return found


KINDS = {"generation": generation, "kinds": kinds, "gate": gate, "history": history}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("report", type=Path, help="the file that the script wrote")
    parser.add_argument("--out", type=Path, help="write the table here as JSON")
    options = parser.parse_args(argv)

    try:
        found = KINDS[options.kind](options.report)
    except KeyError as error:
        raise Misuse(f"{options.report}: has no {error}; a report for `{options.kind}` is needed") from None
    except (TypeError, AttributeError):
        raise Misuse(f"{options.report}: no report for `{options.kind}`") from None
    if options.out:
        write_atomic(options.out, json.dumps(found, indent=1).encode())
    else:
        table = markdown_table(found["header"], found["rows"])
        print(f"{table}\n\n{found['note']}" if found.get("note") else table)
    return 0


if __name__ == "__main__":
    command(main)
