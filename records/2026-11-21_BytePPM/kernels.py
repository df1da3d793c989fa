"""Megabytes a second of both mixtures on one thread: by an older script's kernels and by this one's, in turn.

    git show 244e558:records/2026-11-21_BytePPM/train_gpt.py > old.py   # the last one before these kernels
    python records/2026-11-21_BytePPM/kernels.py old.py data/datasets/mine \\
        --out records/2026-11-21_BytePPM/measured/rates.json

The network is replaced by a bigram model of the training shard, so that no artifact is needed. Each mixture
scores the validation shard, 8,192 bytes at a time; who goes first changes from piece to piece. Times are
processor time of one thread, with the allocator that a run has. *whole* has the first touch of every page of
the tables in it, the medians of pieces have not.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from family import Misuse, command, load_script, tell, texts_to_mix

SCRIPT = Path(__file__).with_name("train_gpt.py")
VOCAB, PIECE, ROWS = 260, 8192, 20
KINDS = {"`MIX=binary`": ("binary", 6), "`MIX=ppm`, the learned gate": ("ppm", 6),
         "`MIX=ppm PPM_ORDER=5`": ("ppm", 5)}
HEADER = ["mixture", "before, MB/s", "now, MB/s", "ratio", "ratio, whole", "BPB before", "BPB now"]


def bigrams(ids: np.ndarray) -> np.ndarray:
    """fp32 (V, V): log-probabilities of the next id after each id, by counts of pairs."""
    pairs = np.bincount(ids[:-1].astype(np.int64) * VOCAB + ids[1:], minlength=VOCAB * VOCAB)
    pairs = pairs.reshape(VOCAB, VOCAB) + 0.1
    return np.log(pairs / pairs.sum(1, keepdims=True)).astype(np.float32)


def in_turn(scripts: dict, kind: str, order: int, ids: np.ndarray, network: np.ndarray) -> dict[str, tuple]:
    """{name: (nats of ids[1:], seconds a byte of each piece)} of scripts that read the same pieces."""
    args = SimpleNamespace(mix=kind, ppm_weight=1, ppm_order=order, mix_rows=ROWS, mix_streams=1)
    for script in scripts.values():  # compiles
        script.Mixture(args).score(ids[1:50], network[ids[:49]])

    mixtures = {name: script.Mixture(args) for name, script in scripts.items()}
    nats, seconds = dict.fromkeys(scripts, 0.0), {name: [] for name in scripts}
    for first in range(0, len(ids) - 1, PIECE):
        before, after = ids[first : first + PIECE][: len(ids) - 1 - first], ids[first + 1 : first + PIECE + 1]
        logprobs = network[before]
        for name in [*mixtures][:: 1 if first // PIECE % 2 else -1]:
            began = time.process_time()
            nats[name] += mixtures[name].score(after, logprobs).sum()
            seconds[name].append((time.process_time() - began) / len(after))
    return {name: (nats[name], np.array(seconds[name])) for name in scripts}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="an older train_gpt.py of this record")
    parser.add_argument("data", type=Path, help="folder of byte260 shards")
    parser.add_argument("--targets", type=int, default=0, help="how many of the targets; 0 = all")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args(argv)

    scripts = {"old": load_script(options.old), "new": load_script(SCRIPT)}
    if not hasattr(scripts["old"], "Mixture"):
        raise Misuse(f"{options.old}: a script without a mixture")
    train, ids = texts_to_mix(scripts["new"], options.data, options.targets, VOCAB)
    ids = np.array(ids, np.int64)
    network = bigrams(train[:6_000_000])
    scripts["new"].tune_allocator()
    span = math.log(2) * int((ids[1:] >= 4).sum())

    rows = []
    for title, kind in KINDS.items():
        (old, slow), (new, fast) = in_turn(scripts, *kind, ids, network).values()
        rates = [1e-6 / np.median(each) for each in (slow, fast)]
        rows.append([title, *(f"{rate:.2f}" for rate in rates), f"{rates[1] / rates[0]:.2f}",
                     f"{slow.sum() / fast.sum():.2f}", f"{old / span:.4f}", f"{new / span:.4f}"])
    note = (f"{len(ids) - 1:,} bytes after a bigram model, one thread, `MIX_ROWS={ROWS}`, both in turn by "
            f"pieces of {PIECE:,}; medians of pieces.")
    told = {"header": HEADER, "rows": rows, "note": note,
            "old_sha256": hashlib.sha256(options.old.read_bytes()).hexdigest(),
            "script_sha256": hashlib.sha256(SCRIPT.read_bytes()).hexdigest()}
    tell(told, options.out)
    return 0


if __name__ == "__main__":
    command(main)
