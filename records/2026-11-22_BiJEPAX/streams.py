"""What a cut of the text into runs with counts of their own would cost this mixture, and what it would save.

    python records/2026-11-22_BiJEPAX/streams.py runs/BiJEPAX-seed*/artifact.bin --out streams.json \\
        --shard data/datasets/mine/files_val_000000.bin --tokenizer data/tokenizers/mine.model

BytePPM has MIX_STREAMS, this record has not. Here a text is cut as there: a document that begins at id
`place` of `count` is in the run `streams * place // count`. Each run has a mixture and proposals of its own,
which start empty. The network's numbers are distilled once an artifact. Seconds are processor time of mixing
the longest run, which is what a thread a run would take. Artifacts lie in folders named for their seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from family import Misuse, command, load_script, markdown_table
from stats import paired, seed_in

mixtures = load_script(Path(__file__).with_name("mixtures.py"))
SCRIPT = mixtures.SCRIPT


def run_starts(ids: np.ndarray, streams: int, bos: int) -> np.ndarray:
    """Places in ids (n,) where runs begin: at a BOS, the first at 0. Few documents make fewer runs."""
    places = np.union1d(0, np.flatnonzero(ids == bos))
    _, first = np.unique(places * streams // len(ids), return_index=True)
    return places[first]


def mixed(script, args, ids: np.ndarray, values: np.ndarray, streams: int) -> tuple[float, list[float]]:
    """(nats of all targets, seconds of each run). values: `distil` of ids[1:], of one run."""
    count, nats, seconds = len(ids) - 1, 0.0, []
    starts = run_starts(ids, streams, script.BOS_ID)
    for first, stop in zip(starts, [*starts[1:], count]):
        mixture, part = script.Mixture(args), values[first:stop].copy()
        # target t is ids[t + 1]: the first context of a run is the BOS that begins it
        hints = script.propose(mixture.text, ids[first:stop].astype(np.int64))
        part[:, 1 : 1 + hints.shape[1]] = hints
        began = time.process_time()
        nats += mixture.score(ids[first + 1 : stop + 1], part).sum()
        seconds.append(time.process_time() - began)
    return nats, seconds


def measured(script, artifact: str, tokenizer: str, ids: np.ndarray, sizes: np.ndarray | None,
             streams: list[int], log) -> dict:
    """{"network": BPB, streams: {"bpb", "runs", "seconds"}} of one artifact."""
    header, _ = script.unpack(script.read_file(artifact, "ARTIFACT"), artifact)
    args = script.shipped_settings(header, artifact, {"TOKENIZER_PATH": tokenizer, "PPM_WEIGHT": "1"})
    script.check_ids(ids, args.vocab_size, artifact)
    sizes = script.target_bytes(ids, script.byte_tables(args)) if sizes is None else sizes
    values, *_ = mixtures.distilled(script, args, artifact, ids, 0)
    span = math.log(2) * sizes.sum()
    mixed(script, args, ids[:200], values[:199], 1)  # compiles

    found = {"network": -values[:, 0].sum() / span, "bytes": int(sizes.sum())}
    for number in streams:
        nats, seconds = mixed(script, args, ids, values, number)
        found[number] = {"bpb": nats / span, "runs": len(seconds), "seconds": max(seconds)}
        log(f"{artifact}: {number} streams {nats / span:.4f} BPB, {max(seconds):.2f} s")
    return found


def table(found: dict[int, dict], streams: list[int], documents: int) -> dict:
    """{"header", "rows", "note"} of {seed: `measured`}: each number of streams against the first."""
    found, rows = dict(sorted(found.items())), []
    base = {seed: each[streams[0]]["bpb"] for seed, each in found.items()}
    for number in streams:
        scores = {seed: each[number]["bpb"] for seed, each in found.items()}
        told = [""] * 3
        if number != streams[0]:
            result = paired(scores, base)
            low, high = result.interval
            told = [f"{result.difference:+.4f}", f"{low:+.4f} to {high:+.4f}", result.word]
        seconds = min(each[number]["seconds"] for each in found.values())
        rows.append([f"{number}", *(f"{bpb:.4f}" for bpb in scores.values()), *told, f"{seconds:.2f}"])

    seeds = [f"seed {seed}" for seed in found]
    header = ["streams", *seeds, "difference", "95 % interval", "verdict", "seconds of a run"]
    network = ", ".join(f"{each['network']:.4f}" for each in found.values())
    size = next(iter(found.values()))["bytes"]
    note = (f"{size:,} bytes in {documents:,} documents; the network alone {network} BPB. Seconds: the "
            "longest run of the text on one thread, the fastest of the seeds.")
    return {"header": header, "rows": rows, "note": note}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("--shard", type=Path, required=True, help="*.bin with the text to score")
    parser.add_argument("--tokenizer", required=True, help="its SentencePiece model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--targets", type=int, default=0, help="how many of the text's; 0 = all")
    parser.add_argument("--out", type=Path, help="write the table here as JSON")
    options = parser.parse_args(argv)
    if min(options.streams) < 1 or options.targets < 0:
        raise Misuse("--streams: 1 or more; --targets: 0, for all, or more")
    by_seed = {}
    for path in options.artifacts:
        if (seed := seed_in(Path(path))) is None:
            raise Misuse(f"{path}: must lie in a folder that is named for its seed, such as NAME-seed42")
        if seed in by_seed:
            raise Misuse(f"two artifacts of seed {seed}: {by_seed[seed]}, {path}")
        by_seed[seed] = path

    script = load_script(SCRIPT)
    try:
        text = script.open_shard(options.shard, 1 << 16)
        ids = np.array(text[: options.targets + 1] if options.targets else text)
        sidecar, sizes = options.shard.with_suffix(".bytes"), None
        if sidecar.exists():
            sizes = np.array(script.open_shard(sidecar, 1 << 16)[1 : len(ids)]).astype(int)
        found = {seed: measured(script, path, options.tokenizer, ids, sizes, options.streams,
                                lambda line: print(line, file=sys.stderr, flush=True))
                 for seed, path in by_seed.items()}
    except script.UserError as error:
        raise Misuse(str(error)) from None

    result = table(found, options.streams, int((ids == script.BOS_ID).sum()))
    print(markdown_table(result["header"], result["rows"]) + "\n\n" + result["note"])
    if options.out:
        result["script_sha256"] = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
        script.write_atomic(options.out, json.dumps(result, indent=1).encode())
    return 0


if __name__ == "__main__":
    command(main)
