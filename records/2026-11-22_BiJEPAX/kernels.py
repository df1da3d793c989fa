"""Microseconds a target of the mixture's kernels: an older script's and this folder's or another's, in turn.

    python records/2026-11-22_BiJEPAX/kernels.py OLD.py data/datasets/mine --tokenizer mine.model \\
        --out records/2026-11-22_BiJEPAX/measured/kernels.json
    python records/2026-11-22_BiJEPAX/kernels.py OLD.py data/datasets/mine \\
        --script TokenBest --tokenizer mine.model --out records/2026-11-29_TokenBest/measured/kernels.json

The network is replaced by a bigram model of the training shard, so that no artifact is needed. Both scripts
distil and score the validation shard, 4,096 targets at a time, each of them first every other time; their
numbers are held against each other. Times are processor time of one thread, with the allocator that a run
has. `bench.py --plan` reads the medians.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from family import Misuse, command, find_script, load_script, tell, texts_to_mix

SCRIPT = Path(__file__).with_name("train_gpt.py")
VOCAB, BLOCK, WINDOW = 8192, 4096, 512


class Bigrams:
    """Log-probabilities of the next id by counts of pairs, backed off to counts of ids."""

    def __init__(self, ids: np.ndarray):
        ids = ids.astype(np.int64)
        self.base = np.bincount(ids, minlength=VOCAB) + 0.5
        self.base /= self.base.sum()
        self.pairs, self.counts = np.unique(ids[:-1] * VOCAB + ids[1:], return_counts=True)
        self.starts = np.searchsorted(self.pairs // VOCAB, np.arange(VOCAB + 1))

    def __call__(self, ids: np.ndarray) -> torch.Tensor:
        """(n, V) after each of ids (n,)."""
        found = np.empty((len(ids), VOCAB), np.float32)
        for row, token in zip(found, ids):
            part = slice(self.starts[token], self.starts[token + 1])
            counts = self.counts[part]
            rest = 2 * len(counts) + 5
            row[:] = self.base * (rest / (counts.sum() + rest))
            row[self.pairs[part] % VOCAB] += counts / (counts.sum() + rest)
        return torch.from_numpy(found).log().log_softmax(-1)


def timed(seconds: list, count: int, function, *values):
    start = time.process_time()
    found = function(*values)
    seconds.append(1e6 * (time.process_time() - start) / count)
    return found


def distilled(mixture, ids: np.ndarray, first: int, stop: int, logprobs: torch.Tensor) -> np.ndarray:
    """What `score` needs of the network at targets first ... stop - 1, which are read in order."""
    if hasattr(mixture, "read"):  # TokenBest's, whose blocks may come in any order
        (_, _, found), = mixture.read(ids, first, stop, [(first, stop, logprobs)])
        return found
    return mixture.distil(ids, first, stop, logprobs).numpy()


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("old", type=Path, help="an older train_gpt.py of this record")
    parser.add_argument("data", type=Path, help="folder of shards")
    parser.add_argument("--script", default=SCRIPT, help="a record that mixes like this one, the default")
    parser.add_argument("--tokenizer", required=True, help="their SentencePiece model")
    parser.add_argument("--targets", type=int, default=0, help="how many of the targets; 0 = all")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args(argv)

    torch.set_num_threads(1)
    path = find_script(options.script)
    scripts = {"old": load_script(options.old), "new": load_script(path)}
    if not hasattr(scripts["old"], "Mixture"):
        raise Misuse(f"{options.old}: a script without a mixture")
    train, ids = map(np.array, texts_to_mix(scripts["new"], options.data, options.targets, VOCAB))
    network = Bigrams(train[:6_000_000])
    scripts["new"].tune_allocator()
    args = SimpleNamespace(mix="binary", ppm_weight=1, ppm_order=5, mix_rows=20, vocab_size=VOCAB,
                           tokenizer_path=options.tokenizer)
    for script in scripts.values():  # compiles
        try:
            found = script.Mixture(args)
        except script.UserError as error:
            raise Misuse(str(error)) from None
        found.score(ids[1:50], distilled(found, ids, 0, 49, network(ids[:49])))

    mixtures = {name: script.Mixture(args) for name, script in scripts.items()}
    distil, score, nats = ({name: [] for name in scripts} for _ in range(3))
    for begin in range(0, len(ids) - 1, BLOCK):
        end = min(begin + BLOCK, len(ids) - 1)
        values = {name: [] for name in scripts}
        for first in range(begin, end, WINDOW):
            stop = min(first + WINDOW, end)
            logprobs = network(ids[first:stop])
            turn = 1 if first // WINDOW % 2 else -1  # who goes second finds the caches less cold
            for name, mixture in [*mixtures.items()][::turn]:
                call = distilled, mixture, ids, first, stop, logprobs
                values[name].append(timed(distil[name], stop - first, *call))
        turn = 1 if begin // BLOCK % 2 else -1
        for name, mixture in [*mixtures.items()][::turn]:
            call = mixture.score, ids[begin + 1 : end + 1], np.concatenate(values[name])
            found = timed(score[name], end - begin, *call)
            nats[name].append(np.atleast_2d(found)[-1])  # older scripts had a row for a control, too
    nats = {name: np.concatenate(parts) for name, parts in nats.items()}
    apart = np.abs(nats["old"] - nats["new"])

    told = {"targets": len(ids) - 1, "nats": nats["new"].sum(), "largest_difference": apart.max(),
            "old_sha256": hashlib.sha256(options.old.read_bytes()).hexdigest(),
            "script_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    for part, seconds in (("distil", distil), ("score", score)):
        for name in scripts:
            told[f"{part}_us_{name}"] = {"best": round(min(seconds[name]), 2),
                                         "median": round(float(np.median(seconds[name])), 2)}
    told["header"] = ["us a target", "before, best", "median", "now, best", "median"]
    told["rows"] = [
        [part, *(f"{told[f'{part}_us_{name}'][key]:.1f}" for name in scripts for key in ("best", "median"))]
        for part in ("distil", "score")]
    told["note"] = f"{told['targets']:,} targets, one thread of a busy CPU, both scripts in turn"
    if apart.max() < 0.01:  # the same mixture, faster
        told["note"] += f"; the largest difference of any target's nats is {apart.max():.0e}"
    told["note"] += "."

    tell(told, options.out)
    return 0


if __name__ == "__main__":
    command(main)
