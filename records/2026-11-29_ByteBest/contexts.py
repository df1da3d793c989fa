"""What contexts of the mixture are worth, and training text to begin with, on one artifact's probabilities.

    python records/2026-11-29_ByteBest/contexts.py \\
        runs/NAME/artifact.bin data/datasets/mine/files_val_000000.bin \\
        --train data/datasets/mine/files_train_000000.bin --out mixtures.json

Rows: only the network; the contexts of BytePPM; one and the other of the two that this record adds; all; and,
with --train, all after counting training text, whose size as LZMA is told: what an artifact would have to
carry. The mixer's weights begin afresh after it. MB/s is processor time of one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from family import Misuse, command, load_script, markdown_table

SCRIPT = Path(__file__).with_name("train_gpt.py")
HEADER = ["variant", "BPB", "gain", "MB/s"]
PIECE = 60_000  # ids at once


def network_logprobs(script, artifact: str, ids: np.ndarray) -> np.ndarray:
    """fp32 (targets, V): the network's log-probabilities without adapters, by the windows of `score`."""
    header, _ = script.unpack(script.read_file(artifact, "ARTIFACT"), artifact)
    args = script.shipped_settings(header, artifact, {"PPM_WEIGHT": "0", "TTT": "0"})
    runtime = script.Runtime(args)
    attention = script.pick_attention(args, runtime)
    model = script.load(artifact, runtime.device, args, runtime.dtype, attention)

    found = np.empty((len(ids) - 1, args.vocab_size), np.float32)
    rows = max(1, 16384 // args.eval_seq_len)
    stride = min(256, args.eval_seq_len)
    plan = script.WindowPlan(args.eval_seq_len, stride, rows)
    for first, stop, logprobs, _ in script.scored(model, ids, plan):
        found[first:stop] = logprobs.float().cpu().numpy()
    return found


def mixture(script, contexts: list | None = None):
    """The record's mixture, or one with other `contexts`: pairs (order - 1, 1 = of this document)."""
    args = argparse.Namespace(ppm_weight=True, ppm_order=6, mix_rows=20, mix_streams=1)
    found = script.Mixture(args)
    if contexts is not None:
        found.state = script.fresh_mixer(contexts, args.ppm_order, args.mix_rows)
    return found


def count_text(script, found, text: np.ndarray):
    """Lets a mixture count `text` without a network, up to a document's end; all that it learned of weights
    is forgotten again.
    """
    fresh = mixture(script).state
    text = np.append(text, script.BOS_ID).astype(np.int64)
    for piece in np.array_split(text, len(text) // PIECE + 1):
        found.score(piece, np.full((len(piece), 260), -math.log(260), np.float32))
    for name in ("weights", "trust", "hits", "refined"):
        getattr(found.state, name)[:] = getattr(fresh, name)
    return found


def table(script, artifact: str, ids: np.ndarray, train: np.ndarray | None, log) -> dict:
    """{"header", "rows", "note"}; `ids` begin with the first context."""
    logprobs = network_logprobs(script, artifact, ids)
    ids = ids[1:].astype(np.int64)
    span = math.log(2) * (ids >= script.BYTE_OFFSET).sum()
    base = -logprobs[np.arange(len(ids)), ids].astype(np.float64).sum() / span
    rows = [["network alone", f"{base:.4f}", "+0.0000", ""]]
    log(rows[-1])

    def add(name: str, found) -> None:
        start = time.process_time()
        bpb = found.score(ids, logprobs).sum() / span
        speed = len(ids) / (time.process_time() - start) / 1e6
        rows.append([name, f"{bpb:.4f}", f"{base - bpb:+.4f}", f"{speed:.2f}"])
        log(rows[-1])

    mixture(script).score(ids[:50], logprobs[:50])  # compiles
    parents = [(0, 1), (1, 1), (2, 1), (3, 1), (6, 1), (3, 0), (5, 0), (6, 0)]
    add("BytePPM's eight contexts", mixture(script, parents))
    add("the eight and order 6 of the document", mixture(script, [*parents, (5, 1)]))
    add("the eight and order 2 of the stream", mixture(script, [*parents, (1, 0)]))
    add("**all ten: the record's**", mixture(script))
    if train is not None:
        for part in (len(train) // 5, len(train)):
            begun = train[-part:]
            text = (begun[begun >= script.BYTE_OFFSET] - script.BYTE_OFFSET).astype(np.uint8)
            name = f"all ten, after counting {part:,} training ids"
            name += f" ({len(lzma.compress(text.tobytes())):,} bytes as LZMA)"
            add(name, count_text(script, mixture(script), begun))
    note = (
        f"First {len(ids):,} targets, network's log-probabilities from one artifact (one seed), stride 256; "
        "MB/s on one thread."
    )
    return {"header": HEADER, "rows": rows, "targets": len(ids), "note": note}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact")
    parser.add_argument("shard", help="*.bin with the text to score")
    parser.add_argument(
        "--targets", type=int, default=250_000, help="how many of its targets (default: %(default)s)"
    )
    parser.add_argument("--train", metavar="SHARD", help="training text to count first")
    parser.add_argument(
        "--train-ids", type=int, default=4_915_200, help="how much of it (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="write the table here as JSON")
    options = parser.parse_args(argv)

    if options.targets < 1 or options.train_ids < 5:
        raise Misuse("--targets: at least 1; --train-ids: at least 5")
    script = load_script(SCRIPT)
    if not script.njit:
        raise Misuse("the mixture needs numba, see requirements.txt beside this file")
    try:
        ids = np.array(script.open_shard(Path(options.shard), 260)[: options.targets + 1])
        if len(ids) < 2:
            raise Misuse(f"{options.shard}: no target to score")
        train = None
        if options.train:
            train = np.array(script.open_shard(Path(options.train), 260)[: options.train_ids])
        found = table(
            script, options.artifact, ids, train, lambda row: print(row, file=sys.stderr, flush=True)
        )
    except script.UserError as error:
        raise Misuse(str(error)) from None

    print(markdown_table(found["header"], found["rows"]) + "\n\n" + found["note"])
    if options.out:
        found["artifact_sha256"] = hashlib.sha256(Path(options.artifact).read_bytes()).hexdigest()
        found["script_sha256"] = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
        script.write_atomic(options.out, json.dumps(found, indent=1).encode())
    return 0


if __name__ == "__main__":
    command(main)
