"""What each way of mixing counts with a network is worth, on the log-probabilities of one artifact.

    python scripts/mixtures.py records/<date>_BytePPM runs/NAME/artifact.bin data/datasets/mine/files_val_000000.bin \\
        --targets 250000 --train data/datasets/mine/files_train_000000.bin --out mixtures.json

Rows: the network alone; PPM-D alone; fixed weights; the learned gate; the control (the network alone through the binary mixer: no
contexts, no match); the binary mixer; published rules that are no probability, marked INVALID, with what their "probabilities" sum to;
and, with --train, a context mixer without a network that first reads as many training bytes as the network did. MB/s is processor time.

For a record whose mixture is over token ids (BiJEPAX; --tokenizer names its model, and a sidecar beside the shard holds the
bytes): the network alone, the control, the tilt, the mixture, and what the published rule of #2080 would have claimed of the same
log-probabilities, marked INVALID, with the largest sum over ids that it implies at sampled positions.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
from family import command, load_script, markdown_table

HEADER = ["variant", "BPB", "gain", "MB/s"]


def network_logprobs(script, artifact: str, ids: np.ndarray) -> np.ndarray:
    """fp32 (targets, V): what the network alone says, by the windows of `score`."""
    header, _ = script.unpack(script.read_file(artifact, "ARTIFACT"), artifact)
    args = script.shipped_settings(header, artifact, {"PPM_WEIGHT": "0"})
    runtime = script.Runtime(args)
    model = script.load(artifact, runtime.device, args, runtime.dtype, runtime.attention)
    found, batch = np.empty((len(ids) - 1, args.vocab_size), np.float32), max(1, 16384 // args.eval_seq_len)
    for first, stop, logprobs, _ in script.scored(model, ids, args.eval_seq_len, args.eval_stride, batch, show="network"):
        found[first:stop] = logprobs.float().cpu().numpy()
    return found


def mixture(script, mix: str = "binary", weight: float = 1.0, order: int = 6, rows: int = 18, contexts=None,
            network: float = 1.0):
    """A mixture of the record; `contexts` (order - 1, of this document) replace its own, `network` is the network's start weight."""
    args = argparse.Namespace(mix=mix, ppm_weight=weight, ppm_order=order, mix_rows=rows)
    found = script.Mixture(args)
    if contexts is not None:
        n = len(contexts)
        weights = np.zeros((517, n + 2), np.float32)
        weights[:5, 0], weights[:5, 1 : n + 1] = network, (1 - network) * 0.3
        found.state = found.state._replace(
            contexts=np.array(contexts, np.int64).reshape(-1, 2), table=np.zeros((n, 1 << rows, 16), np.uint32),
            weights=weights, trust=np.zeros((n, 128), np.float32), row=np.zeros((2, n), np.int64),
            check=np.zeros((2, n), np.int64), met=np.zeros((2, n), np.int64), used=np.zeros((8, n + 2), np.int64),
            inputs=np.zeros((8, n + 4)))
    return found


def timed(found, ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, float]:
    """Nats of `ids` and targets a second of processor time, compilation apart."""
    found.copy().score(ids[:50], logprobs[:50])
    start = time.process_time()
    nats = found.score(ids, logprobs)
    return nats, len(ids) / (time.process_time() - start)


def ppm_alone(script, ids: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """(PPM-D's probability of each id, its confidence before: count / total of the favourite in the longest context)."""
    found = mixture(script, "ppm", order=order)
    found._make_room(len(ids))
    q, sure = np.zeros(len(ids)), np.zeros(len(ids))
    walk_ppm(script)(found.state, ids, q, sure)
    return q, sure


def walk_ppm(script):
    """A kernel over the record's own `ppm_id` and `ppm_push`."""
    ppm_id, ppm_push, child, sibling, count, context = (
        script.ppm_id, script.ppm_push, script.CHILD, script.SIBLING, script.COUNT, script.CONTEXT)

    @script.njit
    def walk(ppm, ids, q, sure):
        for t in range(len(ids)):
            total, most, e = 0, 0, ppm.rows[ppm.now[context], child]
            while e:
                total += ppm.rows[e, count]
                most = max(most, ppm.rows[e, count])
                e = ppm.rows[e, sibling]
            q[t], sure[t] = ppm_id(ppm, ids[t]), most / max(total, 1)
            ppm_push(ppm, ids[t])

    return walk


def invalid_sums(script, ids, logprobs, at: int, rules: dict) -> dict[str, float]:
    """Mean over 100 positions from `at` on of what each rule's numbers for all 260 ids sum to: 1 for a probability."""
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


# -----------------------------------------------------------------------------
# A MIXTURE OVER TOKEN IDS
# -----------------------------------------------------------------------------


class Published:
    """The rule of #2080, INVALID: each byte of an id gets p(id)^(1 / bytes), whatever the byte, mixed with a byte PPM.

    Orders 5 to 0 without exclusion; the network's weight is .18 where the favourite of the longest known context has
    more than .80 of its counts, else .999; ids without bytes are dropped with all that they say. No part of a score.
    """

    HIGH, LOW, THRESHOLD, ORDER = 0.999, 0.18, 0.80, 5

    def __init__(self, spelled: list[tuple]):
        self.spelled, self.history, self.counts = spelled, (), {}

    def byte(self, history: tuple, x: int, network: float) -> float:
        """What the rule calls the probability of byte x; learns nothing."""
        sure, escape, p = None, 1.0, None
        for order in range(min(self.ORDER, len(history)), -1, -1):
            seen = self.counts.get(history[len(history) - order :])
            if not seen:
                continue
            total = sum(seen.values())
            sure = max(seen.values()) / total if sure is None else sure
            if x in seen:
                p = escape * (2 * seen[x] - 1) / (2 * total)
                break
            escape *= len(seen) / (2 * total)
        p = max(escape / 256 if p is None else p, 1e-20)
        weight = self.LOW if sure is not None and sure > self.THRESHOLD else self.HIGH
        return weight * network + (1 - weight) * p

    def book(self, token: int, logprob: float, size: int) -> float:
        """Nats that the rule books for an id of `size` bytes; counts them afterwards, byte by byte."""
        word = self.spelled[token]
        if size <= 0 or not word:
            return 0.0
        word, nats = (*word[:size], *(word[-1:] * (size - len(word)))), 0.0
        for x in word:
            nats -= math.log(self.byte(self.history, x, math.exp(logprob / size)))
            for order in range(min(self.ORDER, len(self.history)) + 1):
                seen = self.counts.setdefault(self.history[len(self.history) - order :], {})
                seen[x] = seen.get(x, 0) + 1
            self.history = (*self.history, x)[-self.ORDER :]
        return nats

    def total(self, logprobs: np.ndarray) -> float:
        """What the rule's numbers for all ids with bytes sum to; the others, dropped, would come on top at 1 each.
        An id's own bytes are not counted on the way through it."""
        total = 0.0
        for token, word in enumerate(self.spelled):
            history, p, network = self.history, 1.0, math.exp(logprobs[token] / max(len(word), 1))
            for x in word:
                p *= self.byte(history, x, network)
                history = (*history, x)[-self.ORDER :]
            total += p if word else 0.0
        return total


def control(script, found):
    """The mixture without contexts: what the mixer makes of the network alone, given no proposals either."""
    mixer, inputs = found.mixer, 1 + len(script.RUNS)
    weights = np.zeros((len(mixer.weights), inputs), np.float32)
    weights[:16, 0] = 1
    groups, levels = mixer.row.shape[0], len(mixer.inputs)
    found.mixer = mixer._replace(
        table=mixer.table[:0], contexts=mixer.contexts[:0], trust=mixer.trust[:0], weights=weights,
        row=np.zeros((groups, 0), np.int64), check=np.zeros((groups, 0), np.int64), met=np.zeros((groups, 0), np.int64),
        inputs=np.zeros((levels, inputs + 1)), used=np.zeros((levels, inputs + 2), np.int64))
    return found


def token_table(script, artifact: str, tokenizer: str, ids: np.ndarray, sizes: np.ndarray | None, samples: int, log) -> dict:
    """Rows for a record whose mixture is over token ids. `sizes` (targets,): bytes of each target, of the sidecar."""
    header, _ = script.unpack(script.read_file(artifact, "ARTIFACT"), artifact)
    args = script.shipped_settings(header, artifact, {"TOKENIZER_PATH": tokenizer, "MIX": "binary", "PPM_WEIGHT": "1"})
    runtime = script.Runtime(args)
    model = script.load(artifact, runtime.device, args, runtime.dtype, runtime.attention)
    found, count = script.Mixture(args), len(ids) - 1
    sizes = script.target_bytes(ids, script.byte_tables(args)) if sizes is None else sizes
    values, at, kept = np.empty((count, found.width)), {}, 0.0
    wanted = {*np.linspace(count // 2, count - 1, samples, dtype=int).tolist()} if samples else set()
    for first, stop, logprobs, _ in script.scored(model, ids, args.eval_seq_len, args.eval_stride,
                                                  max(1, 16384 // args.eval_seq_len), show="network"):
        kept -= time.process_time()
        values[first:stop] = found.distil(ids, first, stop, logprobs).numpy()
        kept += time.process_time()
        at |= {t: logprobs[t - first].float().cpu().numpy() for t in wanted if first <= t < stop}
    own, span, rows = values[:, 0], math.log(2) * sizes.sum(), []
    base = -own.sum() / span

    def add(name: str, nats: float, speed: str = "") -> None:
        rows.append([name, f"{nats / span:.4f}", f"{base - nats / span:+.4f}", speed])
        log(rows[-1])

    add("network alone", -own.sum())
    silent = values.copy()
    silent[:, 1 : 1 + 2 * len(script.RUNS)] = 0
    add("control: network alone through the mixer", control(script, script.Mixture(args)).score(ids[1:], silent)[-1].sum())
    script.Mixture(args).score(ids[1:50], values[:49])  # compiled
    found, parts, speeds, milliseconds = script.Mixture(args), [], [], []
    stops = [*np.linspace(0, count, 21, dtype=int)]
    for first, stop in zip(stops[:-1], stops[1:]):
        start = time.process_time()
        parts.append(found.score(ids[first + 1 : stop + 1], values[first:stop]))
        speeds.append(sizes[first:stop].sum() / (time.process_time() - start) / 1e6)
        for t in (t for t in sorted(at) if first <= t < stop):
            start = time.perf_counter()
            found.distribution(at[t], values[t, None, 1 : 1 + 2 * len(script.RUNS)])
            milliseconds.append(1e3 * (time.perf_counter() - start))
    tilt, mixed = np.concatenate(parts, 1).sum(1)
    add("tilt (`MIX=tilt`)", tilt)
    add("**mixture (`MIX=binary`)**", mixed, f"{max(speeds):.2f} (median {np.median(speeds):.2f})")
    spelled = [word if word[0] < 256 else () for word in script.spelling(args)]
    rule, claimed, sums, dropped = Published(spelled), 0.0, [], 0.0
    for t in range(count):
        if t in at:
            sums.append(rule.total(at[t]))
        claimed += rule.book(int(ids[t + 1]), own[t], int(sizes[t]))
        dropped -= own[t] if sizes[t] <= 0 else 0.0
    largest = f"; its numbers sum to {np.mean(sums):.2f}, at most {max(sums):.2f}" if sums else ""
    add(f"INVALID: what the rule of #2080 would claim{largest}", claimed)
    add("INVALID: the same, with the ids that it drops paid for", claimed + dropped)
    note = (f"{count:,} targets of {sizes.sum():,} bytes, one artifact; MB/s: best (and median) of 20 parts on one thread, from "
            f"what is distilled of log-probabilities, which took {1e6 * kept / count:.0f} us an id; a distribution over all ids: "
            f"{min(milliseconds, default=0):.1f} ms (median {np.median(milliseconds or [0]):.1f}).")
    return {"header": HEADER, "rows": rows, "targets": count, "note": note}


def table(script, artifact: str, ids: np.ndarray, train: np.ndarray | None, log) -> dict:
    logprobs = network_logprobs(script, artifact, ids)
    ids = ids[1:].astype(np.int64)
    count, span = len(ids), math.log(2) * (ids >= script.BYTE_OFFSET).sum()
    own = logprobs[np.arange(count), ids].astype(np.float64)
    base, rows = -own.sum() / span, []

    def add(name: str, nats: np.ndarray, speed: float | None = None) -> None:
        bpb = nats.sum() / span
        rows.append([name, f"{bpb:.4f}", f"{base - bpb:+.4f}", f"{speed / 1e6:.2f}" if speed else ""])
        log(rows[-1])

    add("network alone", -own)
    q, sure = ppm_alone(script, ids, 5)
    add("PPM-D alone, order 5", -np.log(np.maximum(q, 1e-9)))
    for weight in (0.05, 0.1, 0.2):
        add(f"fixed weight {weight} (`MIX=ppm PPM_WEIGHT={weight}`)", *timed(mixture(script, "ppm", weight), ids, logprobs))
    add("learned gate on PPM and network (`MIX=ppm`)", *timed(mixture(script, "ppm"), ids, logprobs))
    add("control: network alone through the binary mixer", *timed(mixture(script, order=60, contexts=[]), ids, logprobs))
    stream = [(order, 0) for order in range(6)]
    add("binary: orders 1 to 6 of the stream, match", *timed(mixture(script, contexts=stream), ids, logprobs))
    here = [(order, 1) for order in range(6)]
    add("binary: orders 1 to 6 of the document alone, match", *timed(mixture(script, contexts=here), ids, logprobs))
    add("**binary mixing (`MIX=binary`)**", *timed(mixture(script), ids, logprobs))

    p, fixed = np.exp(own), np.where(sure > 0.8, 0.18, 0.999)
    rules = {"INVALID: the better of the two at the byte that came": np.maximum,
             "INVALID: weight .18 for the network if PPM likes the byte that came better, else .999":
                 lambda p, q: np.where(q > p, 0.18 * p + 0.82 * q, 0.999 * p + 0.001 * q)}
    sums = invalid_sums(script, ids, logprobs, count // 2, rules)
    for name, rule in rules.items():
        add(f"{name}; its numbers sum to {sums[name]:.2f}", -np.log(rule(p, q)))
    spread = np.exp(np.append(own[: count // 4 * 4].reshape(-1, 4).mean(1).repeat(4), own[count // 4 * 4 :]))
    add("INVALID: the network's loss spread evenly over 4 bytes, weight .18 / .999 by confidence",
        -np.log(fixed * spread + (1 - fixed) * q))
    add("the same weights on the network's own bytes: a probability", -np.log(fixed * p + (1 - fixed) * q))
    if train is not None:
        uniform = np.full((1 << 16, logprobs.shape[1]), -math.log(logprobs.shape[1]), np.float32)
        many = [(k, 1) for k in (0, 1, 2, 3, 6)] + [(k, 0) for k in range(7)]
        for name, bits, text in (("context mixer alone, empty start", 21, train[:0]),
                                 (f"context mixer alone after {len(train):,} training ids, state not counted", 21, train),
                                 ("the same in tables of 2.4 MB", 12, train)):
            found, parts = mixture(script, rows=bits, contexts=many, network=0.0), []
            for piece in (*np.array_split(text, len(text) // 60000 + 1), *np.array_split(ids, count // 60000 + 1)):
                parts.append(found.score(piece.astype(np.int64), uniform[: len(piece)]))
            add(name, np.concatenate(parts)[len(text) :])
    return {"header": HEADER, "rows": rows, "targets": count,
            "note": f"First {count:,} targets, network's log-probabilities from one artifact (one seed); MB/s on one thread."}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", help="a record with a mixture: its folder or script")
    parser.add_argument("artifact")
    parser.add_argument("shard", help="*.bin with the text to score")
    parser.add_argument("--targets", type=int, default=250_000, help="how many of its targets (default: %(default)s)")
    parser.add_argument("--train", metavar="SHARD", help="training text for a context mixer without a network")
    parser.add_argument("--train-ids", type=int, default=4_915_200, help="how much of it (default: %(default)s)")
    parser.add_argument("--tokenizer", help="SentencePiece model of a record over token ids")
    parser.add_argument("--samples", type=int, default=12, help="positions at which the INVALID rule is summed (default: %(default)s)")
    parser.add_argument("--out", help="write the table here as JSON")
    options = parser.parse_args(argv)
    script = load_script(options.record)
    if not hasattr(script, "Mixture"):
        print(f"error: {options.record}: this record has no mixture", file=sys.stderr)
        return 2

    def show(row: list) -> None:
        print(row, file=sys.stderr, flush=True)

    try:
        if hasattr(script, "vocabulary_tree"):
            ids = np.array(script.open_shard(Path(options.shard), 1 << 16)[: options.targets + 1])
            sidecar = Path(options.shard).with_suffix(".bytes")
            sizes = np.array(script.open_shard(sidecar, 1 << 16)[1 : len(ids)]).astype(int) if sidecar.exists() else None
            found = token_table(script, options.artifact, options.tokenizer or "", ids, sizes, options.samples, show)
            return written(script, found, options.out)
        ids = np.array(script.open_shard(Path(options.shard), 260)[: options.targets + 1])
        train = np.array(script.open_shard(Path(options.train), 260)[: options.train_ids]) if options.train else None
        found = table(script, options.artifact, ids, train, show)
    except (script.UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return written(script, found, options.out)


def written(script, found: dict, out: str | None) -> int:
    print(markdown_table(found["header"], found["rows"]) + "\n\n" + found["note"])
    if out:
        script.write_atomic(Path(out), json.dumps(found, indent=1).encode())
    return 0


if __name__ == "__main__":
    command(main)
