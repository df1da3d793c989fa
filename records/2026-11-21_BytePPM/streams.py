"""What it costs to cut a text into MIX_STREAMS runs with counts of their own, and how fast they are mixed.

    python records/2026-11-21_BytePPM/streams.py runs/NAME/artifact.bin data/datasets/mine/files_val_*.bin \\
        --streams 1 2 4 8 16 32 --threads 2 --cache logprobs.npy --out streams/seed42.json
    python records/2026-11-21_BytePPM/streams.py --together streams/seed*.json --out streams.json

The network's log-probabilities are found once, by the windows of `score`, and kept in --cache, 1,040 bytes a
target; CACHE.json beside it says what they are of. Then they go through the record's own `Ledger` in place of
a network, with as many threads as --threads says. A run of 1 stream is the record's score; BPB is that of the
binary mixture unless --set says otherwise. Seconds are those of the wall; predicted are one stream's on one
thread, shared by the threads.

`--together` takes what it wrote for several seeds (seed42.json, ...) and compares each number of streams with
the first one, seed by seed. `--rehearse N` instead tries the arithmetic of `bench.py --plan` on N targets:
rates come from a tenth of them, and no text is mixed faster than all cores can read and mix it. A cache that
is too short is read from its beginning again, so that no BPB is told.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from family import Misuse, command, load_script, markdown_table, read_json
from mixtures import SCRIPT, made_by
from plan import mixed_seconds, parse_settings
from stats import paired, seed_in

REHEARSED = ["streams", "runs", "predicted s", "measured s", "ratio"]
HEADER = ["streams", "runs", "BPB", "difference", "threads", "seconds", "predicted", "MB/s"]
BATCH = 16384  # targets that are handed over at once


def cached_logprobs(script, args, artifact: str, ids: np.ndarray, path: Path) -> np.ndarray:
    """fp32 (targets, V), from a file that is written where it is missing.

    Raises:
        Misuse: the file is of another artifact, text or window.
    """
    shape, about = (len(ids) - 1, args.vocab_size), path.with_name(path.name + ".json")
    made_of = {"artifact": hashlib.sha256(Path(artifact).read_bytes()).hexdigest(),
               "ids": hashlib.sha256(ids.tobytes()).hexdigest(),
               "eval_seq_len": args.eval_seq_len, "eval_stride": args.eval_stride}
    if path.is_file():
        known = read_json(about) if about.is_file() else {}
        if differs := [key for key, value in made_of.items() if known.get(key) != value]:
            raise Misuse(f"--cache {path}: of other {', '.join(differs)}; name a new file")
    else:
        runtime = script.Runtime(args)
        attention = script.pick_attention(args, runtime)
        model = script.load(artifact, runtime.device, args, runtime.dtype, attention)
        partial = path.with_name(path.name + ".part")
        found = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        plan = script.WindowPlan(args.eval_seq_len, args.eval_stride, max(1, 16384 // args.eval_seq_len))
        for first, stop, logprobs, _ in script.scored(model, ids, plan):
            found[first:stop] = logprobs.float().cpu().numpy()
        found.flush()
        script.write_atomic(about, json.dumps(made_of, indent=1).encode())
        partial.rename(path)
    return np.load(path, mmap_mode="r")


def batches(ids: np.ndarray, logprobs: np.ndarray):
    """Yields (first, stop, log-probabilities, nats) as a network would; a short cache begins again."""
    for first in range(0, len(ids) - 1, BATCH):
        stop = min(first + BATCH, len(ids) - 1)
        part = torch.from_numpy(logprobs[np.arange(first, stop) % len(logprobs)])
        targets = torch.from_numpy(ids[first + 1 : stop + 1].astype(np.int64))
        yield first, stop, part, -part.gather(1, targets[:, None])[:, 0]


def mixed(script, args, ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, int, float, float]:
    """(nats of the network and of the mixture, runs, seconds, seconds of the busiest thread)."""
    runtime = SimpleNamespace(rank=0, world_size=1, all_reduce=lambda x: x)
    began = time.perf_counter()
    ledger = script.Ledger(args, runtime, ids, True)
    for batch in batches(ids, logprobs):
        ledger.take(*batch)
    sums = ledger.close().numpy()
    assert (sums[:, -1] == len(ids) - 1).all()
    return sums[:, :-1].sum(1), len(ledger.starts), time.perf_counter() - began, float(max(ledger.seconds))


def rehearsal(script, args, ids: np.ndarray, logprobs: np.ndarray, streams: list[int], log) -> dict:
    """Predicted and measured seconds of a long text, by streams: {"header", "rows", "note"}."""
    tenth, rows = ids[: len(ids) // 10], []
    began = time.perf_counter()
    for _ in batches(tenth, logprobs):
        pass
    reading = 10 * (time.perf_counter() - began)
    args.mix_streams = 1
    mixing = 10 * mixed(script, args, tenth, logprobs)[3]
    for number in streams:
        args.mix_streams = number
        _, predicted = mixed_seconds(reading, mixing, args, 1)
        predicted = max(predicted, (reading + mixing) / os.cpu_count())  # reading takes a core, too
        _, runs, seconds, _ = mixed(script, args, ids, logprobs)
        ratio = predicted / seconds
        rows.append([f"{number}", f"{runs}", f"{predicted:.1f}", f"{seconds:.1f}", f"{ratio:.2f}"])
        log(rows[-1])
    note = (
        f"{len(ids) - 1:,} targets, {args.mix_threads} threads; by a tenth of them, reading takes "
        f"{reading:.1f} s and mixing {mixing:.1f} s on one thread."
    )
    return {"header": REHEARSED, "rows": rows, "note": note}


def table(script, args, ids: np.ndarray, logprobs: np.ndarray, streams: list[int], log) -> dict:
    """{"header", "rows", "note", ...} of all numbers of streams, one after the other."""
    size = int((ids[1:] >= script.BYTE_OFFSET).sum())
    span = math.log(2) * size
    rows, base, found = [], None, {}
    for number in streams:
        args.mix_streams = number
        (network, mixture), runs, seconds, busiest = mixed(script, args, ids, logprobs)
        bpb = mixture / span
        base = base or (bpb, busiest)  # of the first row
        threads = min(args.mix_threads, runs)
        predicted = base[1] / runs * math.ceil(runs / threads)
        rows.append([f"{number}", f"{runs}", f"{bpb:.4f}", f"{bpb - base[0]:+.4f}", f"{threads}",
                     f"{seconds:.1f}", f"{predicted:.1f}", f"{size / seconds / 1e6:.2f}"])
        found[number] = {"bpb": bpb, "runs": runs, "seconds": seconds, "busiest_thread": busiest}
        log(rows[-1])
    documents = int((ids == script.BOS_ID).sum())
    note = (
        f"{size:,} bytes in {documents:,} documents, `MIX={args.mix}`, the network alone "
        f"{network / span:.4f} BPB at a stride of {args.eval_stride}; one artifact (one seed)."
    )
    return {"header": HEADER, "rows": rows, "targets": len(ids) - 1, "note": note, "network": network / span,
            "found": found}


def together(paths: list[Path]) -> dict:
    """{"header", "rows", "note", ...} of what `table` gave for several seeds, each in a file of its name.

    Raises:
        Misuse: a file that `table` did not write, that is not named for a seed of its own, or of another text
            or script.
    """
    found = {}
    for path in paths:
        each, seed = read_json(path), seed_in(path)
        if not isinstance(each, dict) or not {"found", "targets", "network", "note"} <= each.keys():
            raise Misuse(f"--together {path}: not a result of this tool for one seed")
        if seed is None or seed in found:
            raise Misuse(f"--together {path}: each file must be named for its seed, seed42.json")
        found[seed] = each
    found = dict(sorted(found.items()))
    first = next(iter(found.values()))
    alike = {
        "targets": lambda each: each["targets"], "script_sha256": lambda each: each["script_sha256"],
        "numbers of streams": lambda each: tuple(each["found"]),
        "texts or mixtures": lambda each: each["note"].partition(", the network alone")[0],
    }
    for what, of in alike.items():
        if len({of(each) for each in found.values()}) > 1:
            raise Misuse(f"--together: files of different {what}")

    scores = {number: {seed: each["found"][number]["bpb"] for seed, each in found.items()}
              for number in first["found"]}
    base = next(iter(scores.values()))
    rows = []
    for number, by_seed in scores.items():
        difference = paired(by_seed, base)
        low, high = difference.interval
        told = [f"{difference.difference:+.4f}", f"{low:+.4f} to {high:+.4f}", difference.word]
        told = [""] * 3 if by_seed is base else told
        rows.append([number, *(f"{bpb:.4f}" for bpb in by_seed.values()), *told])

    header = ["streams", *(f"seed {seed}" for seed in found), "difference", "95 % interval", "verdict"]
    network = ", ".join(f"{each['network']:.4f}" for each in found.values())
    stride = re.search(r" at a stride of \d+|$", first["note"])[0]
    note = first["note"].partition(", the network alone")[0] + f"; the network alone {network} BPB{stride}."
    return {"header": header, "rows": rows, "note": note, "script_sha256": first["script_sha256"]}


def measured(script, options: argparse.Namespace, log) -> dict:
    header, _ = script.unpack(script.read_file(options.artifact, "ARTIFACT"), options.artifact)
    args = script.shipped_settings(header, options.artifact, parse_settings(options.set))
    args.mix_threads, args.mix_streams = options.threads, 1
    text = script.open_shard(Path(options.shard), args.vocab_size)
    if max(options.rehearse, options.targets) >= len(text):
        raise Misuse(f"--rehearse, --targets: {options.shard} has only {len(text) - 1:,} targets")

    if options.rehearse:  # any log-probabilities serve, from the beginning again where they are too few
        ids = np.array(text[: options.rehearse + 1])
        logprobs = np.load(options.cache, mmap_mode="r")
        if logprobs.ndim != 2 or logprobs.shape[1] != args.vocab_size:
            raise Misuse(f"--cache {options.cache}: no log-probabilities of {args.vocab_size} ids")
    else:
        ids = np.array(text[: options.targets + 1] if options.targets else text)
        logprobs = cached_logprobs(script, args, options.artifact, ids, options.cache)
    mixed(script, args, ids[:2000], logprobs)  # kernels compile before any clock runs
    if options.rehearse:
        return rehearsal(script, args, ids, logprobs, options.streams, log)
    return table(script, args, ids, logprobs, options.streams, log)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", nargs="?")
    parser.add_argument("shard", nargs="?", help="*.bin with the text to score")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--threads", type=int, default=1, help="that mix (default: %(default)s)")
    parser.add_argument("--targets", type=int, default=0, help="how many of the text's; 0 = all")
    parser.add_argument("--cache", type=Path, help="file of log-probabilities")
    parser.add_argument("--together", type=Path, nargs="+", metavar="FILE", help="only compare these results")
    parser.add_argument("--rehearse", type=int, default=0, metavar="N", help="only the time, of N targets")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="a setting of the evaluation")
    parser.add_argument("--out", type=Path, help="write the table here as JSON")
    options = parser.parse_args(argv)

    script = load_script(SCRIPT)
    if min(*options.streams, options.threads) < 1:
        raise Misuse("--streams and --threads: at least 1")
    if options.targets < 0 or options.rehearse and options.rehearse < 10_000:
        raise Misuse("--targets: 0, for all, or more; --rehearse: at least 10,000 targets")
    if options.rehearse and options.cache and not options.cache.is_file():
        raise Misuse(f"--cache {options.cache}: no such file; a run without --rehearse makes it")
    if options.together:
        found = together(options.together)
    elif not (options.artifact and options.shard and options.cache):
        raise Misuse("an artifact, a shard and --cache are needed, or --together")
    else:
        try:
            found = measured(script, options, lambda row: print(row, file=sys.stderr, flush=True))
        except script.UserError as error:
            raise Misuse(str(error)) from None
        found["artifact_script_sha256"] = made_by(options.artifact)
        found["script_sha256"] = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()

    print(markdown_table(found["header"], found["rows"]) + "\n\n" + found["note"])
    if options.out:
        script.write_atomic(options.out, json.dumps(found, indent=1).encode())
    return 0


if __name__ == "__main__":
    command(main)
