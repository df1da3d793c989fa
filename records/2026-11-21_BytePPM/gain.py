"""The mixture's gain by training steps, as JSON that the kind `rows` of scripts/tables.py prints.

    python records/2026-11-21_BytePPM/gain.py runs/*/metrics.json \\
        --out records/2026-11-21_BytePPM/measured/gain.json

Each file is the metrics.json of one run of this record with another number of steps, all of one seed; the
record's own run of that seed is added. Without --out it prints the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from family import Misuse, command, markdown_table, read_json, write_atomic

RECORD = Path(__file__).resolve().parent


def gain(paths: list[Path]) -> dict:
    """{"header", "rows", "note", "scripts": {steps: sha256 of the script}}."""
    runs = [read_json(path) for path in paths]
    seeds = {run["seed"] for run in runs}
    if len(seeds) > 1:
        raise Misuse(
            f"{', '.join(map(str, paths))}: runs of one seed are needed, these are of {sorted(seeds)}"
        )
    runs.append(read_json(RECORD / f"seed{seeds.pop()}" / "metrics.json"))

    rows, scripts = [], {}
    for run in sorted(runs, key=lambda run: run["steps"]):
        network, mixed = (run["evals"][f"final_int6_sliding{end}"] for end in ("", "_mix"))
        rows.append([
            f"{run['steps']:,}",
            network["stride"],
            f"{network['val_bpb']:.4f}",
            f"{mixed['val_bpb']:.4f}",
            f"{network['val_bpb'] - mixed['val_bpb']:.4f}",
        ])
        scripts[run["steps"]] = run["script_sha256"]

    note = f"Seed {runs[0]['seed']}, `final_int6_sliding`, {network['bytes']:,} bytes; one run each."
    header = ["steps", "stride", "network", "with the mixture", "gain"]
    return {"header": header, "rows": rows, "note": note, "scripts": scripts}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="METRICS", help="metrics.json of a run")
    parser.add_argument("--out", type=Path, help="write the table here as JSON")
    options = parser.parse_args(argv)

    try:
        found = gain(options.runs)
    except KeyError as error:
        raise Misuse(f"{', '.join(map(str, options.runs))}: no {error} in one of them") from None
    if options.out:
        write_atomic(options.out, json.dumps(found, indent=1).encode())
    else:
        print(markdown_table(found["header"], found["rows"]) + "\n\n" + found["note"])
    return 0


if __name__ == "__main__":
    command(main)
