"""What each way of mixing counts with the network is worth, on the log-probabilities of one artifact.

    python records/2026-11-21_BytePPM/mixtures.py \\
        runs/NAME/artifact.bin data/datasets/mine/files_val_000000.bin \\
        --targets 250000 --train data/datasets/mine/files_train_000000.bin --out mixtures.json

Rows: only the network; only PPM-D; fixed weights; the learned gate; the control (the network through the
binary mixer, without contexts and match); the binary mixer; published rules that are not probabilities,
marked INVALID, with the sum of their "probabilities"; and, with --train, a context mixer without a network
that first reads as many training bytes as the network did. MB/s is processor time.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from family import Misuse, command, load_script, markdown_table

SCRIPT = Path(__file__).with_name("train_gpt.py")
HEADER = ["variant", "BPB", "gain", "MB/s"]

# Ways to call a number per byte a probability that it is not. p: network, q: PPM-D, of the same byte.
PUBLISHED = {
    "INVALID: the better of the two at the byte that came": np.maximum,
    "INVALID: weight .18 for the network if PPM likes the byte that came better, else .999":
        lambda p, q: np.where(q > p, 0.18 * p + 0.82 * q, 0.999 * p + 0.001 * q),
}


def network_logprobs(script, artifact: str, ids: np.ndarray) -> np.ndarray:
    """fp32 (targets, V): the network's log-probabilities without a mixture, by the windows of `score`."""
    header, _ = script.unpack(script.read_file(artifact, "ARTIFACT"), artifact)
    args = script.shipped_settings(header, artifact, {"PPM_WEIGHT": "0"})
    runtime = script.Runtime(args)
    attention = script.pick_attention(args, runtime)
    model = script.load(artifact, runtime.device, args, runtime.dtype, attention)

    found = np.empty((len(ids) - 1, args.vocab_size), np.float32)
    rows = max(1, 16384 // args.eval_seq_len)
    plan = script.WindowPlan(args.eval_seq_len, args.eval_stride, rows)
    for first, stop, logprobs, _ in script.scored(model, ids, plan):
        found[first:stop] = logprobs.float().cpu().numpy()
    return found


def mixture(script, mix: str = "binary", weight: float = 1.0, order: int = 6, rows: int = 20, contexts=None,
            network: float = 1.0):
    """A mixture of the record.

    contexts: pairs (order - 1, of this document) in place of its own.
    network: the weight that the network starts with, where `contexts` are given.
    """
    args = argparse.Namespace(mix=mix, ppm_weight=weight, ppm_order=order, mix_rows=rows)
    found = script.Mixture(args)
    if contexts is None:
        return found

    found.state = script.fresh_mixer(contexts, order, rows)
    found.state.weights[:5, 0] = network
    found.state.weights[:5, 1 : len(contexts) + 1] = (1 - network) * 0.3
    return found


def timed(found, ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, float]:
    """Nats of `ids`, and targets a second of processor time without compilation."""
    copy.deepcopy(found).score(ids[:50], logprobs[:50])  # compiles
    start = time.process_time()
    nats = found.score(ids, logprobs)
    return nats, len(ids) / (time.process_time() - start)


def only_ppm(script, ids: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """(PPM-D's probability of each id, its confidence before it:
    the favourite's share of the longest context).
    """
    found = mixture(script, "ppm", order=order)
    found._make_room(len(ids))
    q = np.zeros(len(ids))
    sure = np.zeros(len(ids))
    walk_ppm(script)(found.state, ids, q, sure)
    return q, sure


def walk_ppm(script):
    """A kernel over the record's own `ppm_id` and `ppm_push`."""
    # numba reads these as constants of the closure.
    ppm_id, ppm_push, context = script.ppm_id, script.ppm_push, script.CONTEXT
    total, best, count = script.TOTAL, script.BEST, script.COUNT

    @script.njit
    def walk(ppm, ids, q, sure):
        for t in range(len(ids)):
            node = np.uint32(ppm.now[context])
            most = np.int64(ppm.rows[ppm.rows[node + best] + count])
            sure[t] = most / max(np.int64(ppm.rows[node + total]), 1)
            q[t] = ppm_id(ppm, ids[t])
            ppm_push(ppm, ids[t])

    return walk


def invalid_sums(script, ids, logprobs, at: int, rules: dict) -> dict[str, float]:
    """Each rule's numbers for all 260 ids added up: 1 for a probability.

    Means over 100 positions from `at` on.
    """
    found = mixture(script, "ppm", order=5)
    found.score(ids[:at], logprobs[:at])
    sums: dict[str, list] = {name: [] for name in rules}

    for t in range(at, at + 100):
        q = np.array([script.ppm_id(found.state, token) for token in range(logprobs.shape[1])])
        p = np.exp(logprobs[t].astype(np.float64))
        for name, rule in rules.items():
            sums[name].append(float(rule(p, q).sum()))
        found.push(int(ids[t]), logprobs[t])
    return {name: float(np.mean(values)) for name, values in sums.items()}


def without_network(script, ids: np.ndarray, train: np.ndarray, vocab_size: int):
    """(row's name, nats of `ids`) of context mixers without a network, before and after the training text."""
    uniform = np.full((1 << 16, vocab_size), -math.log(vocab_size), np.float32)
    contexts = [(k, 1) for k in (0, 1, 2, 3, 6)] + [(k, 0) for k in range(7)]
    variants = [
        ("context mixer alone, empty start", 21, train[:0]),
        (f"context mixer alone after {len(train):,} training ids, state not counted", 21, train),
        ("the same in tables of {:.1f} MB", 12, train),
    ]
    for name, rows, text in variants:
        found = mixture(script, rows=rows, contexts=contexts, network=0.0)
        parts = []
        for stream in (text, ids):
            for piece in np.array_split(stream, len(stream) // 60000 + 1):
                parts.append(found.score(piece.astype(np.int64), uniform[: len(piece)]))
        yield name.format(found.state.table.nbytes / 1e6), np.concatenate(parts)[len(text) :]


def table(script, artifact: str, ids: np.ndarray, train: np.ndarray | None, log) -> dict:
    """{"header", "rows", "note"} of all variants; `ids` begin with the first context."""
    logprobs = network_logprobs(script, artifact, ids)
    ids = ids[1:].astype(np.int64)
    count = len(ids)
    span = math.log(2) * (ids >= script.BYTE_OFFSET).sum()
    own = logprobs[np.arange(count), ids].astype(np.float64)
    base, rows = -own.sum() / span, []

    def add(name: str, nats: np.ndarray, speed: float | None = None) -> None:
        bpb = nats.sum() / span
        rows.append([name, f"{bpb:.4f}", f"{base - bpb:+.4f}", f"{speed / 1e6:.2f}" if speed else ""])
        log(rows[-1])

    def add_mixture(name: str, *arguments, **options) -> None:
        add(name, *timed(mixture(script, *arguments, **options), ids, logprobs))

    # Probabilities.
    add("network alone", -own)
    q, sure = only_ppm(script, ids, 5)
    add("PPM-D alone, order 5", -np.log(np.maximum(q, 1e-9)))
    for weight in (0.05, 0.1, 0.2):
        add_mixture(f"fixed weight {weight} (`MIX=ppm PPM_WEIGHT={weight}`)", "ppm", weight)
    add_mixture("learned gate on PPM and network (`MIX=ppm`)", "ppm")
    add_mixture("control: network alone through the binary mixer", order=60, contexts=[])
    stream = [(order, 0) for order in range(6)]
    add_mixture("binary: orders 1 to 6 of the stream, match", contexts=stream)
    document = [(order, 1) for order in range(6)]
    add_mixture("binary: orders 1 to 6 of the document alone, match", contexts=document)
    add_mixture("**binary mixing (`MIX=binary`)**")

    # Numbers that are not, and the nearest that is.
    p = np.exp(own)
    fixed = np.where(sure > 0.8, 0.18, 0.999)
    sums = invalid_sums(script, ids, logprobs, count // 2, PUBLISHED)
    for name, rule in PUBLISHED.items():
        add(f"{name}; its numbers sum to {sums[name]:.2f}", -np.log(rule(p, q)))
    fours = own[: count // 4 * 4].reshape(-1, 4)
    spread = np.exp(np.append(fours.mean(1).repeat(4), own[count // 4 * 4 :]))
    add("INVALID: the network's loss spread evenly over 4 bytes, weight .18 / .999 by confidence",
        -np.log(fixed * spread + (1 - fixed) * q))
    add("the same weights on the network's own bytes: a probability", -np.log(fixed * p + (1 - fixed) * q))

    if train is not None:
        for name, nats in without_network(script, ids, train, logprobs.shape[1]):
            add(name, nats)
    note = (
        f"First {count:,} targets, network's log-probabilities from one artifact (one seed); "
        "MB/s on one thread."
    )
    return {"header": HEADER, "rows": rows, "targets": count, "note": note}


def made_by(artifact: str) -> str | None:
    """sha256 of the script that trained an artifact, from its run's metrics.json; None without one."""
    metrics = Path(artifact).with_name("metrics.json")
    return json.loads(metrics.read_text())["script_sha256"] if metrics.is_file() else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact")
    parser.add_argument("shard", help="*.bin with the text to score")
    parser.add_argument(
        "--targets", type=int, default=250_000, help="how many of its targets (default: %(default)s)"
    )
    parser.add_argument(
        "--train", metavar="SHARD", help="training text for a context mixer without a network"
    )
    parser.add_argument(
        "--train-ids", type=int, default=4_915_200, help="how much of it (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="write the table here as JSON")
    options = parser.parse_args(argv)

    script = load_script(SCRIPT)
    try:
        ids = np.array(script.open_shard(Path(options.shard), 260)[: options.targets + 1])
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
        found["script_sha256"] = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
        found["artifact_script_sha256"] = made_by(options.artifact)
        script.write_atomic(options.out, json.dumps(found, indent=1).encode())
    return 0


if __name__ == "__main__":
    command(main)
