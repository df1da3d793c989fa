"""What each way of mixing counts with the network is worth, on the log-probabilities of one artifact.

    python records/2026-11-22_BiJEPAX/mixtures.py \\
        runs/NAME/artifact.bin data/datasets/mine/files_val_000000.bin \\
        --tokenizer data/tokenizers/mine.model --targets 100000 --out mixtures.json

Rows: only the network; the control (the network through the mixer, without contexts and proposals); a tilt
(#1145: one proposed id is made likelier); the mixture; and the claim that the published rule of #2080 would
make of the same log-probabilities, marked INVALID, with the largest sum over ids that it implies at sampled
positions. A sidecar beside the shard (*.bytes) holds the bytes of each id where the tokenizer normalises.
MB/s is processor time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from family import Misuse, command, load_script, markdown_table

SCRIPT = Path(__file__).with_name("train_gpt.py")
HEADER = ["variant", "BPB", "gain", "MB/s"]


class Published:
    """The rule of #2080, INVALID: each byte of an id gets p(id)^(1 / bytes), mixed with a byte PPM.

    Orders 5 to 0 without exclusion; the network's weight is .18 where the favourite of the longest known
    context has more than .80 of its counts, else .999. Ids without bytes are dropped, with all the
    information they carry. No score uses this rule.
    """

    HIGH, LOW, THRESHOLD, ORDER = 0.999, 0.18, 0.80, 5

    def __init__(self, spelled: list[tuple]):
        self.spelled = spelled
        self.history: tuple = ()
        self.counts: dict[tuple, dict] = {}

    def byte(self, history: tuple, x: int, network: float) -> float:
        """The number that the rule calls the probability of byte x; learns nothing."""
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
        word = (*word[:size], *(word[-1:] * (size - len(word))))

        nats = 0.0
        for x in word:
            nats -= math.log(self.byte(self.history, x, math.exp(logprob / size)))
            for order in range(min(self.ORDER, len(self.history)) + 1):
                seen = self.counts.setdefault(self.history[len(self.history) - order :], {})
                seen[x] = seen.get(x, 0) + 1
            self.history = (*self.history, x)[-self.ORDER :]
        return nats

    def total(self, logprobs: np.ndarray) -> float:
        """The rule's numbers for all ids with bytes, added up.

        The others, which it drops, would come on top at 1 each. An id's own bytes are not counted on the way.
        """
        total = 0.0
        for token, word in enumerate(self.spelled):
            history, p = self.history, 1.0
            network = math.exp(logprobs[token] / max(len(word), 1))
            for x in word:
                p *= self.byte(history, x, network)
                history = (*history, x)[-self.ORDER :]
            total += p if word else 0.0
        return total


class Tilt:
    """p'(a) = p(a) e^(beta [a = h]) / (1 + p(h) (e^beta - 1)), for the id h of the longest run that
    proposes one (#1145). It sums to one.

    A strength beta belongs to a run, its ids that agree and p(h), and learns by AdaGrad.
    """

    def __init__(self):
        self.strength: dict[tuple, float] = defaultdict(float)
        self.squares: dict[tuple, float] = defaultdict(lambda: 1.0)

    def hint(self, hints: np.ndarray, liked: np.ndarray):
        """(h, log p(h), what its strength belongs to) or None. hints: (2 * runs,), as `propose` has them;
        liked: (runs,), log-probabilities of the ids proposed."""
        for run, (token, agree) in enumerate(hints.reshape(-1, 2).astype(int)):
            if agree:
                return token, float(liked[run]), (run, agree, min(int(-2 * liked[run]), 15))
        return None

    def book(self, token: int, own: float, hints: np.ndarray, liked: np.ndarray, learn: bool = True) -> float:
        """Nats of an id of log-probability `own`, in front of which the hints stood; learns it."""
        found = self.hint(hints, liked)
        if found is None:
            return -own
        proposed, logprob, cell = found
        hit, p, odds = token == proposed, math.exp(logprob), math.exp(self.strength[cell])
        whole = 1 + p * (odds - 1)
        nats = -own + math.log(whole) - hit * self.strength[cell]

        gradient = hit - p * odds / whole
        if learn:
            self.squares[cell] += 0.1 * gradient**2
            self.strength[cell] += 0.1 * gradient / math.sqrt(self.squares[cell])
        return nats


def control(found):
    """The mixture without contexts: it refines the network's own numbers, and gets no proposals either."""
    found.mixer = found.mixer._replace(contexts=found.mixer.contexts[:0])
    return found


def distilled(script, args, artifact: str, ids: np.ndarray, samples: int):
    """(what the mixture keeps of the network (targets, width), log-probabilities of the ids proposed
    (targets, runs), {sampled target: log-probabilities}, seconds).
    """
    runtime = script.Runtime(args)
    attention = script.pick_attention(args, runtime)
    model = script.load(artifact, runtime.device, args, runtime.dtype, attention)
    script.Mixture(args).distil(ids, 0, 1, torch.zeros(1, args.vocab_size).log_softmax(-1))  # compiles
    found, count = script.Mixture(args), len(ids) - 1
    wanted = {*np.linspace(count // 2, count - 1, samples, dtype=int).tolist()} if samples else set()

    values, liked, at, seconds = [], [], {}, 0.0
    rows = max(1, 16384 // args.eval_seq_len)
    plan = script.WindowPlan(args.eval_seq_len, args.eval_stride, rows)
    for first, stop, logprobs, _ in script.scored(model, ids, plan):
        start = time.process_time()
        values.append(found.distil(ids, first, stop, logprobs).numpy())
        seconds += time.process_time() - start
        proposed = values[-1][:, 1 : 1 + 2 * len(script.RUNS) : 2].astype(int)
        liked.append(np.take_along_axis(logprobs.float().cpu().numpy(), proposed, 1))
        at |= {t: logprobs[t - first].float().cpu().numpy() for t in wanted if first <= t < stop}
    return np.concatenate(values), np.concatenate(liked), at, seconds


def mixed_in_parts(script, args, ids: np.ndarray, values: np.ndarray, sizes: np.ndarray, at: dict):
    """(nats (targets,), MB/s of each of 20 parts, ms of each distribution over all ids)."""
    count, proposals = len(ids) - 1, slice(1, 1 + 2 * len(script.RUNS))
    script.Mixture(args).score(ids[1:50], values[:49])  # compiles
    found = script.Mixture(args)

    nats, speeds, milliseconds = [], [], []
    stops = [*np.linspace(0, count, 21, dtype=int)]
    for first, stop in zip(stops[:-1], stops[1:]):
        start = time.process_time()
        nats.append(found.score(ids[first + 1 : stop + 1], values[first:stop]))
        speeds.append(sizes[first:stop].sum() / (time.process_time() - start) / 1e6)
        for t in (t for t in sorted(at) if first <= t < stop):
            start = time.perf_counter()
            found.distribution(at[t], values[t, None, proposals])
            milliseconds.append(1e3 * (time.perf_counter() - start))
    return np.concatenate(nats), speeds, milliseconds


def claim(rule: Published, ids: np.ndarray, own: np.ndarray, sizes: np.ndarray, at: dict):
    """(nats that the published rule books, nats of the ids that it drops, its sums at the sampled targets).
    """
    claimed, dropped, sums = 0.0, 0.0, []
    for t in range(len(ids) - 1):
        if t in at:
            sums.append(rule.total(at[t]))
        claimed += rule.book(int(ids[t + 1]), own[t], int(sizes[t]))
        dropped -= own[t] if sizes[t] <= 0 else 0.0
    return claimed, dropped, sums


def table(
    script, artifact: str, tokenizer: str, ids: np.ndarray, sizes: np.ndarray | None, samples: int, log
) -> dict:
    """{"header", "rows", "note"} of all variants.

    ids: the first context and the targets. sizes (targets,): bytes of each target from the sidecar, where
    there is one. samples: the positions at which the INVALID rule is summed over all ids.
    """
    header, _ = script.unpack(script.read_file(artifact, "ARTIFACT"), artifact)
    args = script.shipped_settings(
        header, artifact, {"TOKENIZER_PATH": tokenizer, "PPM_WEIGHT": "1"}
    )
    script.check_ids(ids, args.vocab_size, artifact)
    count = len(ids) - 1
    sizes = script.target_bytes(ids, script.byte_tables(args)) if sizes is None else sizes
    values, liked, at, kept = distilled(script, args, artifact, ids, samples)
    own = values[:, 0]
    span, rows = math.log(2) * sizes.sum(), []
    base = -own.sum() / span

    def add(name: str, nats: float, speed: str = "") -> None:
        rows.append([name, f"{nats / span:.4f}", f"{base - nats / span:+.4f}", speed])
        log(rows[-1])

    # Probabilities.
    add("network alone", -own.sum())
    silent = values.copy()
    silent[:, 1 : 1 + 2 * len(script.RUNS)] = 0
    refined = control(script.Mixture(args)).score(ids[1:], silent).sum()
    add("control: network alone through the mixer", refined)
    nats, speeds, milliseconds = mixed_in_parts(script, args, ids, values, sizes, at)
    tilt, proposals = Tilt(), values[:, 1 : 1 + 2 * len(script.RUNS)]
    add("tilt", sum(map(tilt.book, ids[1:].tolist(), own, proposals, liked)))
    add("**mixture**", nats.sum(), f"{max(speeds):.2f} (median {np.median(speeds):.2f})")

    # The published rule, which is not one.
    spelled = [word if word[0] < 256 else () for word in script.spelling(args)]
    claimed, dropped, sums = claim(Published(spelled), ids, own, sizes, at)
    largest = f"; its numbers sum to {np.mean(sums):.2f}, at most {max(sums):.2f}" if sums else ""
    add(f"INVALID: what the rule of #2080 would claim{largest}", claimed)
    add("INVALID: the same, with the ids that it drops paid for", claimed + dropped)

    note = (
        f"{count:,} targets of {sizes.sum():,} bytes, one artifact; MB/s: best (and median) of 20 parts on "
        "one thread, "
        f"from what is distilled of log-probabilities, which took {1e6 * kept / count:.0f} us an id; a "
        "distribution "
        f"over all ids: {min(milliseconds, default=0):.1f} ms (median {np.median(milliseconds or [0]):.1f})."
    )
    return {"header": HEADER, "rows": rows, "targets": count, "note": note}


def trained_by(artifact: str) -> str | None:
    """sha256 of the script that trained an artifact, from its run's metrics.json; None without one."""
    metrics = Path(artifact).with_name("metrics.json")
    return json.loads(metrics.read_text())["script_sha256"] if metrics.is_file() else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact")
    parser.add_argument("shard", type=Path, help="*.bin with the text to score")
    parser.add_argument("--tokenizer", required=True, help="its SentencePiece model")
    parser.add_argument(
        "--targets", type=int, default=250_000, help="how many of its targets (default: %(default)s)"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=12,
        help="positions at which the INVALID rule is summed (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, help="write the table here as JSON")
    options = parser.parse_args(argv)

    script = load_script(SCRIPT)
    try:
        ids = np.array(script.open_shard(options.shard, 1 << 16)[: options.targets + 1])
        sidecar, sizes = options.shard.with_suffix(".bytes"), None
        if sidecar.exists():
            sizes = np.array(script.open_shard(sidecar, 1 << 16)[1 : len(ids)]).astype(int)
        found = table(script, options.artifact, options.tokenizer, ids, sizes, options.samples,
                      lambda row: print(row, file=sys.stderr, flush=True))
    except script.UserError as error:
        raise Misuse(str(error)) from None

    print(markdown_table(found["header"], found["rows"]) + "\n\n" + found["note"])
    if options.out:
        found["script_sha256"] = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
        found["trained_by"] = trained_by(options.artifact)
        script.write_atomic(options.out, json.dumps(found, indent=1).encode())
    return 0


if __name__ == "__main__":
    command(main)
