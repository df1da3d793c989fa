"""A script of the family's form in a hundred lines: log-linear
counts in place of a network, for tests of the tools.

The logits of the next id come from the last id and, within the document, the one before it, plus counts
of the ids of all chunks that have been scored. Needs numpy, and sentencepiece for a token vocabulary.
"""

import json
import math
import os
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np

BOS = 1


class Hyperparameters:
    TABLE = {
        "DATA_PATH": ".", "TOKENIZER_PATH": "", "VOCAB_SIZE": 260, "RUNS_PATH": "runs",
        "RUN_ID": "run", "SEED": 0, "EVAL_ONLY": 0, "ARTIFACT": "", "TTT": "sgd",
        "TTT_CHUNK_TOKENS": 64, "DOC_MASK": 0,
    }

    def __init__(self, environ):
        for name, default in self.TABLE.items():
            setattr(self, name.lower(), type(default)(environ.get(name, default)))


def shards(args, split):
    paths = sorted(Path(args.data_path).glob(f"*_{split}_*.bin"))
    return np.concatenate([np.fromfile(path, "<u2")[512:].astype(np.int64) for path in paths])


def train(args):
    """Log counts of pairs, next to each other and one apart, as int8 (2, V, V)."""
    ids = shards(args, "train")
    table = np.ones((2, args.vocab_size, args.vocab_size))
    np.add.at(table[0], (ids[:-1], ids[1:]), 8)
    np.add.at(table[1], (ids[:-2], ids[2:]), 8)
    return np.round(8 * np.log(table)).clip(-127, 127).astype(np.int8)


class Model:
    def __init__(self, table, chunk, learn):
        self.table, self.chunk, self.learn = table / 8.0, chunk, learn
        self.seen = np.zeros(table.shape[-1])


def load(artifact_path, device="cpu"):
    with open(artifact_path, "rb") as file:
        header = json.loads(file.readline())
        return Model(np.load(file, allow_pickle=False), **header)


def logprobs_of(model, ids, first, stop):
    """Log-probabilities (stop - first, V) of the targets first ... stop - 1, target t being ids[t + 1]."""
    at = np.arange(first, stop)
    before = np.where((at > 0) & (ids[at] != BOS), ids[at - 1], 0)
    logits = model.table[0][ids[at]] + 0.4 * (before > 0)[:, None] * model.table[1][before]
    logits = logits + model.learn * 0.3 * np.log1p(model.seen)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def score(model, ids, positions=()):
    ids = np.asarray(ids)
    nats, vectors = np.zeros(len(ids) - 1), {}
    for first in range(0, len(nats), model.chunk):
        stop = min(first + model.chunk, len(nats))
        logprobs = logprobs_of(model, ids, first, stop)
        nats[first:stop] = -logprobs[np.arange(stop - first), ids[first + 1 : stop + 1]]
        vectors |= {t: logprobs[t - first] for t in positions if first <= t < stop}
        np.add.at(model.seen, ids[first + 1 : stop + 1], 1)
    return nats, vectors


class stream:
    def __init__(self, model):
        self.model, self.ids = model, []

    def logprobs(self):
        t = len(self.ids) - 1
        if t and t % self.model.chunk == 0:
            np.add.at(self.model.seen, np.array(self.ids[t - self.model.chunk + 1 :]), 1)
        return logprobs_of(self.model, np.array(self.ids), t, t + 1)[0]

    def push(self, token):
        self.ids.append(int(token))


def byte_sizes(args):
    if not args.tokenizer_path:
        return (np.arange(args.vocab_size) >= 4).astype(int)
    from sentencepiece import SentencePieceProcessor
    sp = SentencePieceProcessor(model_file=args.tokenizer_path)
    pieces = [sp.id_to_piece(i).replace("\u2581", " ") for i in range(sp.vocab_size())]
    return np.array([
        0 if sp.is_control(i) or sp.is_unknown(i) else 1 if sp.is_byte(i) else len(piece.encode())
        for i, piece in enumerate(pieces)
    ])


def evaluate(args, artifact):
    ids, sizes = shards(args, "val"), byte_sizes(args)
    nats = score(load(artifact), ids)[0]
    size = int(sizes[ids[1:]].sum())
    return {"val_loss": nats.mean(), "val_bpb": nats.sum() / math.log(2) / size,
            "targets": len(nats), "bytes": size}


def main():
    if "--help" in sys.argv:
        print("\n".join(f"  {name:20} {default}" for name, default in Hyperparameters.TABLE.items()))
        return 0
    args = Hyperparameters(os.environ)
    folder = Path(args.runs_path) / args.run_id
    folder.mkdir(parents=True, exist_ok=True)
    artifact = Path(args.artifact or folder / "artifact.bin")
    if not args.eval_only:
        header = {"chunk": args.ttt_chunk_tokens, "learn": int(args.ttt == "sgd")}
        with open(artifact, "wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            np.save(file, train(args))
    entry = evaluate(args, artifact)
    code, model = Path(__file__).read_bytes(), artifact.stat().st_size
    assert len(code) + model < 16_000_000
    metrics = {
        "val_bpb": entry["val_bpb"], "headline": "final", "evals": {"final": entry},
        "artifact": str(artifact), "seed": args.seed, "bytes_code": len(code), "bytes_model": model,
        "bytes_total": len(code) + model, "script_sha256": sha256(code).hexdigest(),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(main())
