"""Bytes of a model: the largest that fits the budget, how good the
plan is, and the cost of quantisers and coders.

    python scripts/rate.py fit                      13 layers x 512 and its neighbours under 16,000,000 bytes
    python scripts/rate.py fit --layers 9-13 --width 384-640 --mlp 2,3,4 --set QUANT_K=mlp:18
    python scripts/rate.py fit --like runs/NAME/artifact.bin  tables counted as they were in that artifact
    python scripts/rate.py plan runs/*/artifact.bin                plan against file, exit code 1 beyond 2 %
    python scripts/rate.py coders runs/A runs/B --out coders.json  raw, LZMA, rANS, the entropy, seconds
    python scripts/rate.py curve runs/A --data data/datasets/mine --out curve.json --plot curve.png

`fit` and `plan` make no weight: a candidate is a script's model on the meta device. Matrices count as the
entropy of a rounded normal; the size of hash tables depends on how much text has touched them, which `--like`
reads off a trained artifact.

`coders` and `curve` read `final.safetensors` of a run's folder (the averaged weights where there are any).
`curve` quantises only the named tensor classes, at many step sizes with every quantiser, codes them by rANS,
and scores the model on a prefix of DATA's validation text: bits a weight against the loss in BPB. GPTQ is
calibrated on the last batches of DATA's training text.

`--out` writes {"header", "rows", "numbers"}: what the table `rows` of
scripts/tables.py prints, and the numbers behind it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from family import FINDINGS, FINE, TRUNK, Misuse, command, load_script, markdown_table, run_settings
from safetensors import safe_open

TOLERANCE = 0.02
CODERS = {"lzma": "LZMA-9", "rans": "rANS"}


# -----------------------------------------------------------------------------
# THE SIZE PLAN
# -----------------------------------------------------------------------------


def choices(text: str, kind=int, step=1) -> list:
    """`9-13` -> [9, 10, ... 13] in steps, `2,3.5` -> [2.0, 3.5]."""
    try:
        if "-" in text:
            low, high = map(int, text.split("-"))
            return list(range(low, high + 1, step))
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise Misuse(f"{text!r}: a range LOW-HIGH or a list A,B,C expected") from None


def rounded_bits(k: float, top: int) -> float:
    """Entropy, in bits, of a standard normal rounded to multiples of k / top, clipped to top of them."""
    edges = [(i + 0.5) * k / top / math.sqrt(2) for i in range(-top, top)]
    below = np.array([0.0, *(0.5 + 0.5 * math.erf(edge) for edge in edges), 1.0])
    shares = np.diff(below) + 1e-30
    return float(-(shares * np.log2(shares)).sum())


def size_plan(script, model: torch.nn.Module, args) -> dict[str, int]:
    """{tensor class: bytes of the artifact}, before training; a model on the meta device is enough.

    Matrices are normal enough for the entropy of a rounded normal; hash tables are heavy-tailed and took
    0.83 of it in measured runs (BytePPM's README, size plan). A step is an fp16 number.
    """
    plan: dict[str, float] = dict.fromkeys(script.TENSOR_CLASSES, 0.0)
    for name, p in model.exported().items():
        kind = script.tensor_class(name)
        bits, axis = script.quant_plan(name, p.shape, args)
        weight_bits = 16.0
        if bits:
            entropy = rounded_bits(args.k_by_class[kind], 2 ** (bits - 1) - 1)
            weight_bits = entropy * (0.83 if kind == "ngram" else 1) + 16 / p.shape[axis]
        plan[kind] += p.numel() * weight_bits / 8
    return {kind: int(size) for kind, size in plan.items()}


def planned(script, settings: dict[str, str]) -> tuple[dict[str, int], int]:
    """({tensor class: bytes}, parameters) of a configuration;
    raises the script's UserError if it cannot work.
    """
    args = script.Hyperparameters(settings)
    with torch.device("meta"):
        model = script.GPT(args)
    return size_plan(script, model, args), sum(p.numel() for p in model.exported().values())


def payload(script, path: str) -> tuple[list, list[tuple]]:
    """(entries of the header, [(plane, its bytes)]) of an artifact, as they were before its compressor."""
    blob = script.read_file(path, "ARTIFACT")
    header, _ = script.unpack(blob, path)
    body = blob[len(script.ARTIFACT_MAGIC) + 32 :]
    length = int.from_bytes(body[2:6], "little")
    layout = script.planes(header["tensors"])
    coders = script.COMPRESSORS if hasattr(script, "COMPRESSORS") else script.compressors()  # from before
    raw = coders[header["compressor"]][1](body[6 + length :], layout)

    parts, at = [], 0
    for plane in layout:
        size = plane.slices * plane.places
        parts.append((plane, raw[at : at + size]))
        at += size
    return header["tensors"], parts


def rans_size(script, parts: list[tuple]) -> int:
    """Bytes of some planes coded on their own by rANS."""
    return len(script.rans_encode(b"".join(block for _, block in parts), [plane for plane, _ in parts]))


def coded(script, path: str) -> dict[str, int]:
    """{tensor class: bytes} of a real artifact, every class coded on its own by rANS."""
    classes: dict[str, list] = {}
    for plane, block in payload(script, path)[1]:
        classes.setdefault(plane.model.rstrip("0123456789"), []).append((plane, block))
    return {kind: rans_size(script, parts) for kind, parts in classes.items()}


def plan(script, paths: list[str]) -> list[dict]:
    """Plan against file for each artifact; the settings are those of the run's metrics.json beside it."""
    rows = []
    for path in paths:
        parts, params = planned(script, run_settings(Path(path).parent))
        total, size = sum(parts.values()), Path(path).stat().st_size
        rows.append(
            {
                "artifact": path,
                "parameters": params,
                "planned": total,
                "bytes": size,
                "error": total / size - 1,
            }
        )
    return rows


def plan_table(numbers: list[dict]) -> dict:
    """An artifact is named for its folder."""
    return {
        "header": ["artifact", "parameters", "planned bytes", "packed bytes", "error"],
        "rows": [
            [
                Path(row["artifact"]).parent.name,
                f"{row['parameters']:,}",
                f"{row['planned']:,}",
                f"{row['bytes']:,}",
                f"{row['error']:+.1%}",
            ]
            for row in numbers
        ],
        "numbers": numbers,
    }


def like(script, artifact: str | None) -> dict[str, float]:
    """{tensor class: bytes in a trained artifact / bytes planned for it}."""
    if not artifact:
        return {}
    sizes = coded(script, artifact)
    parts, _ = planned(script, run_settings(Path(artifact).parent))
    return {kind: sizes[kind] / parts[kind] for kind in sizes if parts.get(kind)}


def fit(script, options) -> list[dict]:
    """Every configuration that fits, the most parameters first."""
    if wrong := [pair for pair in options.set if "=" not in pair]:
        raise Misuse(f"--set {wrong[0]}: --set needs NAME=VALUE")
    base = dict(pair.split("=", 1) for pair in options.set)
    heads = int(base.get("NUM_HEADS") or script.Hyperparameters.vars()["num_heads"].default or 1)
    code = len(Path(script.__file__).read_bytes())
    factor = like(script, options.like)
    grid = itertools.product(
        choices(options.layers),
        choices(options.width, step=2 * heads),
        choices(options.mlp, float),
    )

    found, refused = [], None
    for layers, width, mlp in grid:
        settings = {**base, "NUM_LAYERS": str(layers), "MODEL_DIM": str(width), "MLP_MULT": str(mlp)}
        try:
            parts, params = planned(script, settings)
        except script.UserError as error:  # heads that do not divide the width, and the like
            refused = error
            continue
        size = code + sum(int(count * factor.get(kind, 1.0)) for kind, count in parts.items())
        if size * (1 + options.margin) <= options.budget:
            found.append({"layers": layers, "width": width, "mlp": mlp, "parameters": params, "bytes": size})
    if refused and not found:
        raise refused
    return sorted(found, key=lambda entry: -entry["parameters"])[: options.top]


def fit_table(numbers: list[dict]) -> dict:
    return {
        "header": ["layers", "width", "MLP x", "parameters", "planned bytes with code"],
        "rows": [
            [row["layers"], row["width"], row["mlp"], f"{row['parameters']:,}", f"{row['bytes']:,}"]
            for row in numbers
        ],
        "numbers": numbers,
    }


# -----------------------------------------------------------------------------
# CODERS
# -----------------------------------------------------------------------------


def checkpoint(script, run: str, **changes):
    """(settings, {name: fp32 array} of what is exported) of a run's final checkpoint."""
    path = Path(run) / "final.safetensors"
    if not path.exists():
        raise Misuse(f"{path}: no such checkpoint")
    args = script.Hyperparameters(run_settings(run) | changes)
    with torch.device("meta"):
        names = list(script.GPT(args).exported())
    with safe_open(path, "np") as file:
        return args, {name: file.get_tensor("ema." + name) for name in names}


def order0(q: np.ndarray) -> float:
    """Bytes of an ideal code with the tensor's own frequencies, which are not counted."""
    _, counts = np.unique(q, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8


def coders(script, runs: list[str]) -> list[dict]:
    """Bytes and seconds of each coder on each run's checkpoint, and the entropy of its quantised weights."""
    rows = []
    for run in runs:
        args, tensors = checkpoint(script, run)
        entropy = small = values = 0
        for name, weight in tensors.items():
            kind = script.tensor_class(name)
            bits, axis = script.quant_plan(name, weight.shape, args)
            if bits:
                q, step = script.quantise(
                    weight, bits, args.k_by_class[kind], axis, args.rate_by_class[kind]
                )
                entropy += order0(q)
                values += q.size
            small += 2 * (step.size if bits else weight.size)

        row = {
            "run": Path(run).name,
            "parameters": sum(map(np.size, tensors.values())),
            "quantised": values,
            "raw": values + small,
            "entropy": round(entropy),
            "small": small,
        }
        for name in CODERS:
            args.compressor = name
            start = time.perf_counter()
            blob = script.pack(tensors, args)
            middle = time.perf_counter()
            script.unpack(blob, name)
            row[name] = {
                "bytes": len(blob),
                "pack_seconds": middle - start,
                "unpack_seconds": time.perf_counter() - middle,
            }
        row["bits_a_weight"] = 8 * (row["rans"]["bytes"] - small) / values
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    return rows


def coders_table(numbers: list[dict]) -> dict:
    header = [
        "model", "parameters", "raw int8 + fp16", "entropy + fp16", *CODERS.values(),
        "rANS / entropy", "bits a weight", "rANS pack s", "unpack s",
    ]
    rows = [
        [
            row["run"],
            f"{row['parameters']:,}",
            f"{row['raw']:,}",
            f"{row['entropy'] + row['small']:,}",
            *(f"{row[name]['bytes']:,}" for name in CODERS),
            f"{row['rans']['bytes'] / (row['entropy'] + row['small']):.4f}",
            f"{row['bits_a_weight']:.3f}",
            f"{row['rans']['pack_seconds']:.1f}",
            f"{row['rans']['unpack_seconds']:.1f}",
        ]
        for row in numbers
    ]
    return {"header": header, "rows": rows, "numbers": numbers}


# -----------------------------------------------------------------------------
# QUANTISERS
# -----------------------------------------------------------------------------


def arms(classes: list[str]):
    """(label, k, bits, rate, gptq) of every point."""
    tables = classes == ["ngram"]
    for k in (12, 16, 20, 24, 28) if tables else (6, 9, 12, 15, 18, 24):
        yield "std, nearest", k, 6, 0.0, False
        yield "std, entropy-constrained 0.116", k, 6, 0.116, False
        if not tables:
            yield "std, GPTQ", k, 6, 0.0, True


def moments(trainer, dataset, runtime, batches: int) -> dict[str, np.ndarray]:
    """{matrix: second moments of its inputs (C, C)} over the last batches of the training text."""
    args, rows = trainer.args, trainer.plan.rows
    train = dataset.train_shards[-1]
    sums: dict = {}
    for i in range(batches):
        at = len(train) - (i + 1) * (args.train_batch_tokens + 1)
        ids = np.stack([
            train[at + j * args.train_seq_len :][: args.train_seq_len + 1] for j in range(rows)
        ])
        batch = torch.from_numpy(ids.astype(np.int64))[None].to(runtime.device)
        trainer.input_moments(batch, torch.ones(batch.shape[:2], dtype=torch.bool, device=batch.device), sums)
    return {name: total.cpu().numpy() for name, total in sums.items()}


def curve(script, run: str, data: str, classes: list[str], val_bytes: int, batches: int) -> list[dict]:
    """Bits a weight and loss in BPB of every arm, with only `classes` quantised."""
    args, tensors = checkpoint(script, run, DATA_PATH=data, VAL_BYTES=str(val_bytes), DTYPE="auto")
    runtime, dataset = script.Runtime(args), script.Dataset(args, False)
    evaluator = script.Evaluator(args, dataset, runtime, script.Log(None))
    trainer = script.Trainer(args, dataset, runtime, script.Log(None))
    model = trainer.model

    def bpb(weights: dict) -> float:
        state = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in weights.items()}
        model.load_state_dict(state, strict=False)
        return evaluator.run("curve", model, args.eval_seq_len, args.eval_seq_len)["val_bpb"]

    base = bpb(tensors)
    hessians = moments(trainer, dataset, runtime, batches)

    points = []
    for label, k, bits, rate, full in arms(classes):
        changed, blocks, entries = dict(tensors), [], []
        for name, weight in tensors.items():
            quantised, axis = script.quant_plan(name, weight.shape, args)
            if quantised and script.tensor_class(name) in classes:
                hessian = hessians.get(name) if full else None
                q, step = script.quantise(weight, bits, k, axis, rate, hessian)
                changed[name] = q * step.astype(np.float32)
                entries.append([name, list(weight.shape), bits, axis])
                blocks.append(np.moveaxis(q, axis, -1))

        stream = b"".join(block.tobytes() for block in blocks)
        code = script.rans_encode(stream, script.planes(entries)[:-2])
        count = sum(block.size for block in blocks)
        points.append({
            "quantiser": label, "bits": bits, "k": k, "rate": rate, "weights": count,
            "bits_a_weight": 8 * len(code) / count, "loss_bpb": bpb(changed) - base,
        })
        print(json.dumps(points[-1]), file=sys.stderr, flush=True)
    return points


def curve_table(numbers: list[dict]) -> dict:
    ordered = sorted(numbers, key=lambda point: (point["quantiser"], point["bits_a_weight"]))
    return {
        "header": ["quantiser", "setting", "bits a weight", "loss in BPB"],
        "rows": [
            [
                point["quantiser"],
                f"int{point['bits']}" + (f", k = {point['k']}" if point["k"] else ""),
                f"{point['bits_a_weight']:.2f}",
                f"{point['loss_bpb']:+.4f}",
            ]
            for point in ordered
        ],
        "numbers": numbers,
    }


def draw(points: list[dict], path: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for label in dict.fromkeys(p["quantiser"] for p in points):
        mine = sorted((p["bits_a_weight"], p["loss_bpb"]) for p in points if p["quantiser"] == label)
        axes.plot(*zip(*mine), marker="o", label=label)
    axes.set(xlabel="bits a weight (rANS)", ylabel="loss in BPB")
    axes.axhline(0.004, color="grey", linewidth=0.8, linestyle=":")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# -----------------------------------------------------------------------------
# THE COMMAND
# -----------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--script", default=str(TRUNK), help="script or record folder (default: the trunk)")
    shared.add_argument("--out", type=Path, help="write the table and its numbers here as JSON")
    shared.add_argument("--json", action="store_true", help="print that JSON instead of the table")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="what", required=True)

    part = parts.add_parser("fit", parents=[shared], help="the largest model under a budget")
    number = {"help": "(default: %(default)s)"}
    part.add_argument("--budget", type=int, default=16_000_000, metavar="BYTES", help="of code and model")
    part.add_argument("--margin", type=float, default=0.005, help="share of the budget to leave")
    part.add_argument("--layers", default="9-15", help="LOW-HIGH or a list (default: %(default)s)")
    part.add_argument("--width", default="384-640", help="LOW-HIGH in whole head pairs, or a list")
    part.add_argument("--mlp", default="2,2.5,3,3.5,4", help="multipliers (default: %(default)s)")
    part.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting")
    part.add_argument("--like", metavar="ARTIFACT", help="count tensor classes as in this trained artifact")
    part.add_argument("--top", type=int, default=10, **number)

    part = parts.add_parser("plan", parents=[shared], help="the plan against packed artifacts")
    part.add_argument(
        "artifacts", nargs="+", metavar="ARTIFACT", help="with its run's metrics.json beside it"
    )

    run = "folder with final.safetensors and metrics.json"
    part = parts.add_parser("coders", parents=[shared], help="each coder's bytes and seconds")
    part.add_argument("runs", nargs="+", metavar="RUN", help=run)

    part = parts.add_parser("curve", parents=[shared], help="bits a weight against loss")
    part.add_argument("run", metavar="RUN", help=run)
    part.add_argument("--data", required=True, help="folder of shards")
    part.add_argument("--classes", default="attn,mlp,other", help="tensor classes (default: %(default)s)")
    part.add_argument("--val-bytes", type=int, default=131072, **number)
    part.add_argument("--batches", type=int, default=8, help="calibration batches (default: %(default)s)")
    part.add_argument("--plot", help="write a plot here")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    script = load_script(options.script)
    wrong = ""
    try:
        if options.what == "fit":
            found = fit_table(fit(script, options))
            wrong = "" if found["rows"] else "nothing fits"
        elif options.what == "plan":
            found = plan_table(plan(script, options.artifacts))
            if any(abs(row["error"]) > TOLERANCE for row in found["numbers"]):
                wrong = "a plan is off by more than 2 %"
        elif options.what == "coders":
            found = coders_table(coders(script, options.runs))
        else:
            classes = options.classes.split(",")
            found = curve_table(
                curve(script, options.run, options.data, classes, options.val_bytes, options.batches)
            )
            if options.plot:
                draw(found["numbers"], options.plot)
    except script.UserError as error:
        raise Misuse(str(error)) from None

    found["script_sha256"] = script.sha256_file(Path(script.__file__))
    text = json.dumps(found, indent=1)
    print(text if options.json else markdown_table(found["header"], found["rows"]))
    if options.out:
        script.write_atomic(options.out, text.encode())
    if wrong:
        print(wrong, file=sys.stderr)
    return FINDINGS if wrong else FINE


if __name__ == "__main__":
    command(main)
