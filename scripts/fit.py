"""The largest model whose artifact fits the budget, by the trunk's own size plan, and how good that plan is.

    python scripts/fit.py                                        13 layers x 512 and its neighbours under 16,000,000 bytes
    python scripts/fit.py --layers 9-13 --width 384-640 --mlp 2,3,4 --set QUANT_K=mlp:18
    python scripts/fit.py --like runs/NAME/artifact.bin          hash tables counted as they were in that artifact
    python scripts/fit.py --check runs/*/artifact.bin            plan against file, exit code 1 beyond 2 %

A candidate is a script's model on the meta device: no weight is made. Matrices count as the entropy of a rounded normal;
what hash tables take depends on how much text has touched them, which `--like` reads off a trained artifact.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
from family import TRUNK, Misuse, command, load_script, markdown_table, run_settings

TOLERANCE = 0.02


def numbers(text: str, kind=int, step=1) -> list:
    """`9-13` -> [9, 10, ... 13] in steps, `2,3.5` -> [2.0, 3.5]."""
    try:
        if "-" in text:
            low, high = map(int, text.split("-"))
            return list(range(low, high + 1, step))
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise Misuse(f"{text!r}: a range LOW-HIGH or a list A,B,C expected") from None


def planned(script, settings: dict[str, str]) -> tuple[dict[str, int], int]:
    """({tensor class: bytes}, parameters) of a configuration; raises the script's UserError if it cannot work."""
    args = script.Hyperparameters(settings)
    with torch.device("meta"):
        model = script.GPT(args)
    return script.size_plan(model, args), sum(p.numel() for p in model.exported().values())


def coded(script, path: str) -> dict[str, int]:
    """{tensor class: bytes} of a real artifact, every class coded on its own by rANS."""
    blob = script.read_file(path, "ARTIFACT")
    header, _ = script.unpack(blob, path)
    body = blob[len(script.ARTIFACT_MAGIC) + 32 :]
    length = int.from_bytes(body[2:6], "little")
    layout = script.planes(header["tensors"])
    raw = script.compressors()[header["compressor"]][1](body[6 + length :], layout)
    parts: dict[str, tuple[list, list]] = {}
    at = 0
    for plane in layout:
        size = plane.slices * plane.places
        blocks, planes = parts.setdefault(plane.model.rstrip("0123456789"), ([], []))
        blocks.append(raw[at : at + size])
        planes.append(plane)
        at += size
    return {kind: len(script.rans_encode(b"".join(blocks), planes)) for kind, (blocks, planes) in parts.items()}


def check(script, paths: list[str]) -> tuple[list[dict], bool]:
    """Plan against file for each artifact, settings of the quantiser read from the run's metrics.json beside it."""
    rows, good = [], True
    for path in paths:
        settings = run_settings(Path(path).parent)
        plan, params = planned(script, settings)
        size = Path(path).stat().st_size
        error = sum(plan.values()) / size - 1
        good &= abs(error) <= TOLERANCE
        rows.append({"artifact": path, "parameters": params, "planned": sum(plan.values()), "bytes": size,
                     "error": error})
    return rows, good


def search(script, options, factor: dict[str, float]) -> list[dict]:
    """Every configuration that fits, the most parameters first."""
    code = len(Path(script.__file__).read_bytes())
    base = dict(pair.split("=", 1) for pair in options.set)
    heads = int(base.get("NUM_HEADS", 8))
    found, refused = [], None
    grid = itertools.product(numbers(options.layers), numbers(options.width, step=2 * heads),
                             numbers(options.mlp, float))
    for layers, width, mlp in grid:
        settings = {**base, "NUM_LAYERS": str(layers), "MODEL_DIM": str(width), "MLP_MULT": str(mlp)}
        try:
            plan, params = planned(script, settings)
        except script.UserError as error:  # heads that do not divide the width, and the like
            refused = error
            continue
        size = code + sum(int(bytes_ * factor.get(kind, 1.0)) for kind, bytes_ in plan.items())
        if size * (1 + options.margin) <= options.budget:
            found.append({"layers": layers, "width": width, "mlp": mlp, "parameters": params, "bytes": size})
    if refused and not found:
        raise refused
    return sorted(found, key=lambda entry: -entry["parameters"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default=str(TRUNK), help="script or record folder (default: the trunk)")
    parser.add_argument("--budget", type=int, default=16_000_000, help="bytes of code and model (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.005, help="share of the budget to leave (default: %(default)s)")
    parser.add_argument("--layers", default="9-15", help="LOW-HIGH or a list (default: %(default)s)")
    parser.add_argument("--width", default="384-640", help="LOW-HIGH in whole head pairs, or a list (default: %(default)s)")
    parser.add_argument("--mlp", default="2,2.5,3,3.5,4", help="multipliers (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting; repeatable")
    parser.add_argument("--like", metavar="ARTIFACT", help="count tensor classes as in this trained artifact")
    parser.add_argument("--check", nargs="+", metavar="ARTIFACT", help="compare the plan with packed artifacts")
    parser.add_argument("--top", type=int, default=10, help="rows to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    if any("=" not in pair for pair in options.set):
        parser.error("--set needs NAME=VALUE")
    script = load_script(options.script)
    try:
        if options.check:
            rows, good = check(script, options.check)
            table = [[row["artifact"], f"{row['parameters']:,}", f"{row['planned']:,}", f"{row['bytes']:,}",
                      f"{row['error']:+.2%}"] for row in rows]
            header = ["artifact", "parameters", "planned bytes", "packed bytes", "error"]
        else:
            factor = {}
            if options.like:
                sizes, (plan, _) = coded(script, options.like), planned(script, run_settings(Path(options.like).parent))
                factor = {kind: sizes[kind] / plan[kind] for kind in sizes if plan.get(kind)}
            rows, good = search(script, options, factor), True
            rows = rows[: options.top]
            table = [[row["layers"], row["width"], row["mlp"], f"{row['parameters']:,}", f"{row['bytes']:,}"]
                     for row in rows]
            header = ["layers", "width", "MLP x", "parameters", "planned bytes with code"]
            good = bool(rows)
    except script.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=1) if options.json else markdown_table(header, table))
    if not good:
        print("a plan is off by more than 2 %" if options.check else "nothing fits", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    command(main)
