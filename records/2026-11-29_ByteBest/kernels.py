"""Microseconds a byte of the mixture on one thread: the parent's and this record's, in turn.

    python records/2026-11-29_ByteBest/kernels.py data/datasets/mine \\
        --out records/2026-11-29_ByteBest/measured/kernels.json

The network is replaced by a bigram model of the training shard, so that no artifact is needed. Each mixture
scores the validation shard, 8,192 bytes at a time. Times are processor time of one thread, with the allocator
that a run has. `bench.py --plan` reads the median of `score_us_new`.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from family import command, load_script, tell, texts_to_mix

SCRIPT = Path(__file__).with_name("train_gpt.py")
PARENT = SCRIPT.parents[1] / "2026-11-21_BytePPM" / "train_gpt.py"
VOCAB, PIECE = 260, 8192


def mixture(script):
    args = SimpleNamespace(mix="binary", ppm_weight=1, ppm_order=6, mix_rows=20, mix_streams=1)
    return script.Mixture(args)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of byte260 shards")
    parser.add_argument("--targets", type=int, default=0, help="how many of the targets; 0 = all")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args(argv)

    scripts = {"old": load_script(PARENT), "new": load_script(SCRIPT)}
    train, ids = texts_to_mix(scripts["new"], options.data, options.targets, VOCAB)
    ids = np.array(ids, np.int64)
    network = load_script(PARENT.with_name("kernels.py")).bigrams(train[:6_000_000])
    scripts["new"].tune_allocator()
    for script in scripts.values():  # compiles
        mixture(script).score(ids[1:50], network[ids[:49]])

    mixtures = {name: mixture(script) for name, script in scripts.items()}
    spent, nats = ({name: [] for name in scripts} for _ in range(2))
    for first in range(0, len(ids) - 1, PIECE):
        before, after = ids[first : first + PIECE][: len(ids) - 1 - first], ids[first + 1 : first + PIECE + 1]
        for name, each in mixtures.items():
            logprobs, start = network[before], time.process_time()
            nats[name].append(each.score(after, logprobs).sum())
            spent[name].append(1e6 * (time.process_time() - start) / len(after))

    told = {"targets": len(ids) - 1, "nats": {name: sum(parts) for name, parts in nats.items()},
            "old_sha256": hashlib.sha256(PARENT.read_bytes()).hexdigest(),
            "script_sha256": hashlib.sha256(SCRIPT.read_bytes()).hexdigest(),
            "distil_us_new": {"best": 0.0, "median": 0.0}}  # in `score`
    for name, each in spent.items():
        told[f"score_us_{name}"] = {"best": round(min(each), 3), "median": round(float(np.median(each)), 3)}
    told["header"] = ["us a byte", "best", "median", "MB/s"]
    told["rows"] = [
        [title, *(f"{told[f'score_us_{name}'][key]:.2f}" for key in ("best", "median")),
         f"{1 / told[f'score_us_{name}']['median']:.2f}"]
        for name, title in (("old", "BytePPM's eight contexts"), ("new", "this record's ten"))]
    told["note"] = (f"{told['targets']:,} bytes after a bigram model, one thread, both in turn by pieces of "
                    f"{PIECE:,}; MB/s of the median.")

    tell(told, options.out)
    return 0


if __name__ == "__main__":
    command(main)
