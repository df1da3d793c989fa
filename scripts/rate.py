"""Bits against error and bytes against seconds, measured on checkpoints: what the quantisers and the coders cost.

    python scripts/rate.py coders runs/A runs/B --out coders.json                raw, zstd, LZMA, rANS, the entropy, seconds
    python scripts/rate.py curve runs/A --data data/datasets/mine --out curve.json --plot curve.png

Both read `final.safetensors` of a run's folder (the averaged weights where there are any). `curve` quantises the named tensor
classes alone, at many step sizes with every quantiser, codes them by rANS, and scores the model on a prefix of DATA's
validation text: bits a weight against the loss in BPB. GPTQ is calibrated on the last batches of DATA's training text.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from family import TRUNK, Misuse, command, load_script, markdown_table, run_settings
from safetensors import safe_open

CODERS = ("zstd", "lzma", "rans")


def checkpoint(script, run: str, **changes):
    """(settings, {name: fp32 array} of what is exported) of a run's final checkpoint."""
    path = Path(run) / "final.safetensors"
    if not path.exists():
        raise Misuse(f"{path}: no such checkpoint")
    args = script.Hyperparameters(run_settings(run) | {"QAT_START": "1"} | changes)
    with torch.device("meta"):
        names = list(script.GPT(args).exported())
    with safe_open(path, "np") as file:
        prefix = "ema." if args.ema_enabled else "model."
        return args, {name: file.get_tensor(prefix + name) for name in names}


def order0(q: np.ndarray) -> float:
    """Bytes of an ideal code with the tensor's own frequencies, which are not counted."""
    _, counts = np.unique(q, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8


def coders(script, runs: list[str]) -> list[dict]:
    rows = []
    for run in runs:
        args, tensors = checkpoint(script, run)
        entropy = small = values = 0
        for name, weight in tensors.items():
            kind, (bits, axis) = script.tensor_class(name), script.quant_plan(name, weight.shape, args)
            if bits:
                q, step = script.quantise(weight, bits, args.quant_clip, args.k_by_class[kind], axis,
                                          args.rate_by_class[kind])
                entropy, values = entropy + order0(q), values + q.size
            small += 2 * (step.size if bits else weight.size)
        row = {"run": Path(run).name, "parameters": sum(map(np.size, tensors.values())), "quantised": values,
               "raw": values + small, "entropy": round(entropy), "small": small}
        for name in CODERS:
            args.compressor = name
            start = time.perf_counter()
            blob = script.pack(tensors, args)
            middle = time.perf_counter()
            script.unpack(blob, name)
            row[name] = {"bytes": len(blob), "pack_seconds": middle - start,
                         "unpack_seconds": time.perf_counter() - middle}
        row["bits_a_weight"] = 8 * (row["rans"]["bytes"] - small) / values
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    return rows


def coders_table(rows: list[dict]) -> str:
    header = ["model", "parameters", "raw int8 + fp16", "entropy + fp16", "zstd-22", "LZMA-9", "rANS", "rANS / entropy",
              "bits a weight", "rANS pack s", "unpack s"]
    return markdown_table(header, [
        [row["run"], f"{row['parameters']:,}", f"{row['raw']:,}", f"{row['entropy'] + row['small']:,}",
         *(f"{row[name]['bytes']:,}" for name in CODERS),
         f"{row['rans']['bytes'] / (row['entropy'] + row['small']):.4f}", f"{row['bits_a_weight']:.3f}",
         f"{row['rans']['pack_seconds']:.1f}", f"{row['rans']['unpack_seconds']:.1f}"] for row in rows])


def arms(classes: list[str]):
    """(label, clip, k, bits, rate, gptq) of every point."""
    tables = classes == ["ngram"]
    for k in (12, 16, 20, 24, 28) if tables else (6, 9, 12, 15, 18, 24):
        yield "std, nearest", "std", k, 6, 0.0, False
        yield "std, entropy-constrained 0.116", "std", k, 6, 0.116, False
        if not tables:
            yield "std, GPTQ", "std", k, 6, 0.0, True
    for bits in (4, 5, 6):
        yield "mse, nearest", "mse", 0, bits, 0.0, False
        if not tables:
            yield "mse, GPTQ", "mse", 0, bits, 0.0, True


def curve(script, run: str, data: str, classes: list[str], val_bytes: int, batches: int) -> list[dict]:
    args, tensors = checkpoint(script, run, DATA_PATH=data, VAL_BYTES=str(val_bytes), DTYPE="auto")
    runtime, dataset = script.Runtime(args), script.Dataset(args, False)
    evaluator = script.Evaluator(args, dataset, runtime, script.Log(None))
    trainer = script.Trainer(args, dataset, runtime, script.Log(None))
    model = trainer.model

    def bpb(weights: dict) -> float:
        model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in weights.items()},
                              strict=False)
        return evaluator.run("curve", model, args.eval_seq_len, args.eval_seq_len)["val_bpb"]

    base = bpb(tensors)
    train, rows = dataset.train_shards[-1], trainer.plan.rows
    sums: dict = {}
    for i in range(batches):
        at = len(train) - (i + 1) * (args.train_batch_tokens + 1)
        ids = np.stack([train[at + j * args.train_seq_len :][: args.train_seq_len + 1] for j in range(rows)])
        trainer.input_moments(torch.from_numpy(ids.astype(np.int64))[None].to(runtime.device), sums)
    hessians = {name: total.cpu().numpy() for name, total in sums.items()}
    points = []
    for label, clip, k, bits, rate, full in arms(classes):
        changed, blocks, entries = dict(tensors), [], []
        for name, weight in tensors.items():
            planned, axis = script.quant_plan(name, weight.shape, args)
            if planned and script.tensor_class(name) in classes:
                q, step = script.quantise(weight, bits, clip, k, axis, rate, hessians.get(name) if full else None)
                changed[name] = q * step.astype(np.float32)
                entries.append([name, list(weight.shape), bits, axis])
                blocks.append(np.moveaxis(q, axis, -1))
        coded = script.rans_encode(b"".join(block.tobytes() for block in blocks), script.planes(entries)[:-2])
        count = sum(block.size for block in blocks)
        points.append({"quantiser": label, "bits": bits, "k": k, "rate": rate, "weights": count,
                       "bits_a_weight": 8 * len(coded) / count, "loss_bpb": bpb(changed) - base})
        print(json.dumps(points[-1]), file=sys.stderr, flush=True)
    return points


def curve_table(points: list[dict]) -> str:
    rows = [[p["quantiser"], f"int{p['bits']}" + (f", k = {p['k']}" if p["k"] else ""), f"{p['bits_a_weight']:.2f}",
             f"{p['loss_bpb']:+.4f}"] for p in sorted(points, key=lambda p: (p["quantiser"], p["bits_a_weight"]))]
    return markdown_table(["quantiser", "setting", "bits a weight", "loss in BPB"], rows)


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("coders", "curve"))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder with final.safetensors and metrics.json")
    parser.add_argument("--script", default=str(TRUNK), help="script or record folder (default: the trunk)")
    parser.add_argument("--data", help="curve: folder of shards")
    parser.add_argument("--classes", default="attn,mlp,other", help="curve: tensor classes (default: %(default)s)")
    parser.add_argument("--val-bytes", type=int, default=131072, help="curve: bytes to score (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=8, help="curve: calibration batches (default: %(default)s)")
    parser.add_argument("--out", help="write the numbers here as JSON")
    parser.add_argument("--plot", help="curve: write a plot here")
    options = parser.parse_args(argv)
    script = load_script(options.script)
    try:
        if options.what == "coders":
            result = coders(script, options.runs)
            print(coders_table(result))
        else:
            if not options.data or len(options.runs) != 1:
                parser.error("curve needs one RUN and --data")
            result = curve(script, options.runs[0], options.data, options.classes.split(","), options.val_bytes,
                           options.batches)
            print(curve_table(result))
            if options.plot:
                draw(result, options.plot)
        if options.out:
            script.write_atomic(Path(options.out), json.dumps(result, indent=1).encode())
    except script.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    command(main)
