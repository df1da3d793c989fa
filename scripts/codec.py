"""A record's model as a file compressor, and the proof that its score can be decoded.

    python scripts/codec.py compress   RECORD ARTIFACT FILE [-o OUT] [--set NAME=VALUE ...]
    python scripts/codec.py decompress RECORD ARTIFACT FILE.golf [-o OUT]
    python scripts/codec.py prove      RECORD ARTIFACT FILE [--bytes N] [--set NAME=VALUE ...]

RECORD is a record's folder or name, or a script (`.` is the trunk). Its `stream` gives the distribution of
each next id, a range coder (Martin 1979, as in constriction) spends -log2 p bits on the id, and a decoder
that has nothing but the script and the artifact follows. `--set` changes a setting of the evaluation, such as
EVAL_STRIDE=64; it travels in the coded file.

FILE is any file (byte260), UTF-8 text (SentencePiece, `--tokenizer`), or a shard, of which the ids are coded,
BOS included. Text of a CaseOps record is coded in CaseOps form (data/caseops.py). Where the tokenizer folds
Unicode or white space, the coded file also holds what brings the text back, byte for byte.

`prove` codes a prefix, decodes it in a process of its own and compares the size of the code with -log2 p of
the stream and with the batched `score`: each must agree to 0.2 % plus 64 bytes.

Both directions run the same steps in fp32 on a fixed number of threads. A file decodes where torch rounds as
it did when the file was made: the same versions, the same kind of machine. The header names them, and a
checksum decides. Exit codes: 0 fine, 1 not proved, 2 misuse or a file that cannot be decoded.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from family import ROOT, Misuse, find_script, load_script, write_atomic

try:
    from tqdm import tqdm
except ImportError:  # a bar is a comfort, not a need
    tqdm = None

caseops = load_script(ROOT / "data" / "caseops.py")

PRECISION = 24  # bits of a probability; what constriction's Python interface offers, at 0.00015 bits an id
TOTAL = 1 << PRECISION
# magic, version, crc32 of the rest (4 bytes), header length (2, little-endian), deflated JSON header, payload
MAGIC, VERSION = b"GLF", 1
PREAMBLE_BYTES = len(MAGIC) + 1 + 4 + 2
# What deflate may refer to before it has seen anything: part of the format, never changed within a version.
DICTIONARY = (
    b'{"artifact":"","script":"","sha256":"","tokenizer":"","bytes":,"ids":,"first":1,"kind":"sentencepiece"'
    b'"kind":"shard","kind":"byte260","set":{"TTT_CHUNK_TOKENS":"512","TTT":"sgd","EVAL_SEQ_LEN":"",'
    b'"EVAL_STRIDE":"64"},"device":"cuda","device":"cpu","threads":1,"machine":"Darwin arm64 DEFAULT",'
    b'"machine":"Linux x86_64 AVX512","machine":"Linux x86_64 AVX2","torch":"2.13.0+cpu","numpy":"2.2.6",'
    b'"constriction":"0.5.0"}'
)
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
BOS_ID, BYTE_OFFSET, BYTE_VOCAB = 1, 4, 260
# What a decoder cannot do without; "tokenizer", "set" and "repair" are left out where there is none.
TEXTS = ("artifact", "script", "sha256", "kind", "device", "machine", "torch", "numpy", "constriction")
FIELDS = dict.fromkeys(TEXTS, str) | dict.fromkeys(("bytes", "ids", "first", "threads"), int)


class CodecError(Exception):
    """A mistake of the user or a damaged file. `main` prints it as one line and exits with code 2."""


class BadStream(CodecError):
    """A stream that gives no distribution: what `prove` is looking for."""


# -----------------------------------------------------------------------------
# CODER
# -----------------------------------------------------------------------------


def frequencies(logprobs: np.ndarray) -> np.ndarray:
    """Integers (V,), int64, each at least 1, of sum 2^24, in proportion to exp(logprobs (V,)), in nats.

    Every symbol gets 1 and its share of the rest, rounded down; what is left goes to the likeliest. A
    likelier symbol never gets less, and a code grows by at most -log2(1 - V / 2^24) bits an id: 0.00002 for
    260 ids. The input need not sum to one: `prove` sees that in the sizes. Raises BadStream where it is no
    distribution.
    """
    logprobs = np.asarray(logprobs, dtype=np.float64)
    top = logprobs.max()
    if not math.isfinite(top):
        raise BadStream(f"the stream's log-probabilities are not numbers: their maximum is {top}")
    p = np.exp(logprobs - top)
    free = TOTAL - len(p)
    table = 1 + np.floor(p * (free / p.sum())).astype(np.int64)
    table[p.argmax()] += TOTAL - table.sum()
    return table


def categorical(model, logprobs: np.ndarray):
    """constriction's model of exactly the integers of `frequencies`, log-probabilities (V,) -> Categorical.

    It adds 1 to every symbol by itself and scales the rest to 2^24 - V: handed the integers less 1, whose sum
    is that number, its factor is 1.0 and nothing is rounded. `lazy` saves time and leaves the table the same.
    """
    return model.Categorical((frequencies(logprobs) - 1).astype(np.float64), lazy=True, perfect=False)


def constriction_stream():
    try:
        from constriction import stream
    except ImportError:
        raise CodecError("constriction is not installed: pip install constriction==0.5.0") from None
    return stream


def progress(items, what: str):
    """tqdm on a terminal, plain iteration elsewhere."""
    return tqdm(items, desc=what, unit="id", disable=None, leave=False) if tqdm else items


def encode(stream, ids: np.ndarray) -> tuple[bytes, np.ndarray, float]:
    """Codes ids[1:] after ids[0] by the distributions of a fresh `stream`.

    Returns the payload, -log p of each target in nats, float64 (len(ids) - 1,), and the largest |sum p - 1|.
    """
    coder = constriction_stream()
    encoder = coder.queue.RangeEncoder()
    nats, gap = np.zeros(max(len(ids) - 1, 0)), 0.0
    if len(nats):
        stream.push(int(ids[0]))
    for t in progress(range(len(nats)), "encode"):
        logprobs, target = stream.logprobs(), int(ids[t + 1])
        encoder.encode(target, categorical(coder.model, logprobs))
        nats[t] = -float(logprobs[target])
        gap = max(gap, abs(float(np.exp(logprobs, dtype=np.float64).sum()) - 1))
        stream.push(target)
    return encoder.get_compressed().astype("<u4").tobytes() if len(nats) else b"", nats, gap


def decode(stream, payload: bytes, count: int, first: int) -> np.ndarray:
    """The inverse: `count` ids, int64, the first given. Raises CodecError at a payload that is no code."""
    ids = np.zeros(count, np.int64)
    ids[:1] = first
    if count < 2:
        return ids
    coder = constriction_stream()
    decoder = coder.queue.RangeDecoder(np.frombuffer(payload, "<u4").astype(np.uint32))
    stream.push(first)
    for t in progress(range(1, count), "decode"):
        try:
            ids[t] = decoder.decode(categorical(coder.model, stream.logprobs()))
        except AssertionError as error:  # what constriction raises at impossible data
            raise CodecError(f"the code is impossible at id {t}: {error}") from None
        stream.push(int(ids[t]))
    return ids


# -----------------------------------------------------------------------------
# FILES AND IDS
# -----------------------------------------------------------------------------


@dataclass
class Text:
    """A file as the stream of ids that is coded. `ids` (n,) int64 begins with the id that is given."""

    kind: str  # byte260 | sentencepiece | caseops | shard
    raw: bytes
    ids: np.ndarray
    repair: bytes = b""  # makes `raw` of what the ids spell, where they spell something else


KINDS = ("byte260", "sentencepiece", "caseops", "shard")


class Pieces:
    """A SentencePiece model, of plain text or, where it has the operators, of text in CaseOps form."""

    def __init__(self, model):
        self.model = model
        try:
            self.operators = caseops.operator_ids(model)
        except ValueError:
            self.operators = None
        self.kind = "sentencepiece" if self.operators is None else "caseops"

    def encode(self, text: str) -> np.ndarray:
        written = text if self.operators is None else caseops.encode(text)
        return np.array(self.model.encode(written), np.int64)

    def sizes(self, text: str) -> np.ndarray:
        """Bytes of a text in CaseOps form for which each of its ids stands. Raises ValueError where one id
        stands for more than a sidecar can count."""
        written = caseops.encode(text)
        pieces = self.model.encode(written, return_type="offset_mapping")
        ids, ends = np.array(pieces["ids"], np.int64), [end for _, end in pieces["offsets"]]
        return caseops.sidecar(written, ids, np.array(ends, np.int64), self.operators)[1:]

    def spell(self, ids: np.ndarray, kind: str) -> bytes:
        text = self.model.decode(ids.tolist())
        return (caseops.decode(text, strict=False) if kind == "caseops" else text).encode("utf-8")


def read(path: str | Path, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CodecError(f"{what} {path}: {error.strerror}") from None


def write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        raise CodecError(f"{path}: {error.strerror}") from None


def output_path(named: str, default: Path | None, source: Path) -> Path:
    """Where the result goes; refused before any work is done. A file that was not named is never replaced."""
    path = Path(named) if named else default
    if path is None:
        raise CodecError(f"{source} does not end in .golf: name the output with -o")
    if not named and path.exists():
        raise CodecError(f"{path} exists: name the output with -o")
    if not path.absolute().parent.is_dir() or path.is_dir() or path.resolve() == source.resolve():
        raise CodecError(f"{path} cannot be the output")
    return path


def digest(data: bytes) -> str:
    """sha256 in base64: 43 characters, where hexadecimal takes 64."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def make_shard(ids: np.ndarray) -> bytes:
    """ids -> a shard: 256 little-endian int32 (magic, version, count, 0...), then uint16 ids."""
    header = np.zeros(SHARD_HEADER_BYTES // 4, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(ids)
    return header.tobytes() + ids.astype("<u2").tobytes()


def shard_ids(raw: bytes) -> np.ndarray | None:
    """The ids of a shard that `make_shard` would write again; None for any other file."""
    if len(raw) < SHARD_HEADER_BYTES or len(raw) % 2:
        return None
    ids = np.frombuffer(raw, "<u2", offset=SHARD_HEADER_BYTES)
    return ids.astype(np.int64) if raw[:SHARD_HEADER_BYTES] == make_shard(ids)[:SHARD_HEADER_BYTES] else None


def open_tokenizer(path: str, vocab: int) -> tuple[Pieces, str]:
    """(a SentencePiece model, its sha256) for an artifact of `vocab` ids that is not byte260."""
    if not path:
        raise CodecError(f"the artifact has {vocab} ids: --tokenizer or TOKENIZER_PATH names their model")
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise CodecError("the artifact needs sentencepiece, which is not installed") from None
    blob = read(path, "TOKENIZER")
    try:
        tokenizer = SentencePieceProcessor(model_proto=blob)
    except RuntimeError as error:
        raise CodecError(f"TOKENIZER {path}: no SentencePiece model ({error})") from None
    if tokenizer.vocab_size() != vocab:
        raise CodecError(f"TOKENIZER {path} has {tokenizer.vocab_size()} ids, the artifact {vocab}")
    return Pieces(tokenizer), digest(blob)


def zstd():
    try:
        import zstandard
    except ImportError:
        raise CodecError("the tokenizer folds this text: pip install zstandard==0.25.0") from None
    return zstandard


def repair(spelled: bytes, raw: bytes) -> bytes:
    """`raw` for a reader who has `spelled`, a zstd frame: a few bytes for each place that differs."""
    library = zstd()
    known = library.ZstdCompressionDict(spelled, dict_type=library.DICT_TYPE_RAWCONTENT)
    return library.ZstdCompressor(level=19, dict_data=known, write_dict_id=False).compress(raw)


def repaired(spelled: bytes, patch: bytes) -> bytes:
    """The inverse of `repair`. Raises CodecError where the two do not belong together."""
    library = zstd()
    known = library.ZstdCompressionDict(spelled, dict_type=library.DICT_TYPE_RAWCONTENT)
    try:
        return library.ZstdDecompressor(dict_data=known).decompress(patch)
    except library.ZstdError as error:
        raise CodecError(f"what it decodes to cannot be repaired ({error})") from None


def to_ids(raw: bytes, path: str, tokenizer: Pieces | None, vocab: int) -> Text:
    """The file's ids; byte260 has no tokenizer. Raises CodecError where the artifact cannot code the file."""
    ids = shard_ids(raw)
    if ids is not None:
        if ids.size and ids.max() >= vocab:
            raise CodecError(
                f"FILE {path}: id {ids.max()} is outside the artifact's {vocab}: another tokenizer's"
            )
        return Text("shard", raw, ids)
    if tokenizer is None:
        ids = np.frombuffer(raw, np.uint8).astype(np.int64) + BYTE_OFFSET
        return Text("byte260", raw, np.concatenate(([BOS_ID], ids)))
    try:
        ids = tokenizer.encode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        why = f"not UTF-8 at byte {error.start}; this artifact codes text only"
        raise CodecError(f"FILE {path}: {why}") from None
    spelled = tokenizer.spell(ids, tokenizer.kind)
    patch = b"" if spelled == raw else repair(spelled, raw)
    return Text(tokenizer.kind, raw, np.concatenate(([BOS_ID], ids)), patch)


def to_bytes(kind: str, ids: np.ndarray, tokenizer: Pieces | None, patch: bytes = b"") -> bytes:
    if kind == "shard":
        return make_shard(ids)
    if kind in ("sentencepiece", "caseops"):
        spelled = tokenizer.spell(ids[1:], kind)
        return repaired(spelled, patch) if patch else spelled
    if (ids[1:] < BYTE_OFFSET).any():
        raise CodecError("it decodes to ids that are no bytes")
    return (ids[1:] - BYTE_OFFSET).astype(np.uint8).tobytes()


def pack(header: dict, payload: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARY)
    text = json.dumps(header, separators=(",", ":")).encode()
    text = deflate.compress(text) + deflate.flush()
    body = len(text).to_bytes(2, "little") + text + payload
    return MAGIC + bytes([VERSION]) + zlib.crc32(body).to_bytes(4, "little") + body


def unpack(blob: bytes, where: str) -> tuple[dict, bytes]:
    """The inverse of `pack`: (header, payload). Raises CodecError at a foreign, truncated or altered file."""
    if blob[: len(MAGIC)] != MAGIC:
        raise CodecError(f"{where}: not a file of this codec (it begins with {blob[:4]!r})")
    if len(blob) < PREAMBLE_BYTES:
        raise CodecError(f"{where}: truncated after {len(blob)} bytes")
    version, body = blob[len(MAGIC)], blob[PREAMBLE_BYTES - 2 :]
    if version != VERSION:
        raise CodecError(f"{where}: format version {version}, this codec reads {VERSION}")
    if zlib.crc32(body).to_bytes(4, "little") != blob[len(MAGIC) + 1 : PREAMBLE_BYTES - 2]:
        raise CodecError(f"{where}: truncated or altered (its checksum does not match)")
    length = 2 + int.from_bytes(body[:2], "little")
    try:
        header = json.loads(zlib.decompressobj(-15, zdict=DICTIONARY).decompress(body[2:length]))
        wrong = [name for name, kind in FIELDS.items() if type(header.get(name)) is not kind]
        words = len(body) - length - int(header.get("repair", 0))
        if wrong or words < 0 or words % 4:
            raise ValueError(f"no {wrong[0]}" if wrong else "the payload is no whole number of words")
    except (zlib.error, ValueError, AttributeError, TypeError) as error:
        raise CodecError(f"{where}: its header cannot be read ({error})") from None
    return header, body[length:]


# -----------------------------------------------------------------------------
# RECORDS
# -----------------------------------------------------------------------------


class Record:
    """A script and an artifact, with the settings of the evaluation: makes fresh models and streams.

    A stream that learns as it reads changes its model, so every pass loads the artifact again.
    """

    def __init__(self, options: argparse.Namespace, settings: dict[str, str], device: str, threads: int):
        try:
            self.script = find_script(options.record)
        except Misuse as error:
            raise CodecError(f"RECORD {error}") from None
        self.artifact, self.tokenizer_path = options.artifact, options.tokenizer
        self.settings, self.device, self.threads = settings, device, threads
        self.script_digest = digest(read(self.script, "RECORD"))
        self.artifact_digest = digest(read(self.artifact, "ARTIFACT"))

    def open(self) -> None:
        """Imports torch and the script. No part of the constructor: a wrong file is refused at once."""
        constriction_stream()
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else CUDA's products may differ by run
        self.module = self._try(lambda: load_script(self.script))
        for name in ("load", "score", "stream"):
            if not callable(getattr(self.module, name, None)):
                raise CodecError(f"RECORD {self.script}: no function {name}: not a script of the family")
        import torch

        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.torch = torch
        self.args = self._arguments() if self.settings else None
        self.unused = self._load()
        self.vocab = self.unused.args.vocab_size
        self.tokenizer, self.tokenizer_digest = None, ""
        if self.vocab != BYTE_VOCAB:
            self.tokenizer, self.tokenizer_digest = open_tokenizer(self.tokenizer_path, self.vocab)

    def _try(self, step):
        """What a script refuses is the user's to read; anything else is a defect and keeps its traceback."""
        try:
            return step()
        except (Exception, SystemExit) as error:
            if type(error).__name__ == "UserError":
                raise CodecError(str(error)) from None
            if isinstance(error, (ImportError, SyntaxError, SystemExit)):
                raise CodecError(f"RECORD {self.script}: cannot be imported ({error})") from None
            raise

    def _arguments(self, **more: str):
        """The artifact's settings under those of --set, which may change what ships as "eval": no network."""
        module, where = self.module, str(self.artifact)
        allowed = [var.name for var in module.Hyperparameters.vars().values() if var.ship == "eval"]
        for name in self.settings:
            if name not in allowed:
                raise CodecError(f"--set {name}: not a setting of this evaluation: {', '.join(allowed)}")
        header, _ = self._try(lambda: module.unpack(read(where, "ARTIFACT"), where))
        return self._try(lambda: module.shipped_settings(header, where, {**self.settings, **more}))

    def _load(self):
        extra = {"args": self.args} if self.args else {}
        try:
            return self._try(lambda: self.module.load(self.artifact, self.device, **extra))
        except (RuntimeError, AssertionError) as error:
            if self.device == "cpu":
                raise
            raise CodecError(f"device {self.device}: {str(error).splitlines()[0]}") from None

    def model(self):
        """A fresh model in fp32 and a fresh random state, the same in every process."""
        model, self.unused = self.unused or self._load(), None
        self.torch.manual_seed(0)
        if self.tokenizer is not None:  # a mixture over ids asks what they spell; no artifact holds that
            model.args.tokenizer_path = str(self.tokenizer_path)
        return model

    def stream(self, count: int):
        """A fresh stream for a text of `count` ids; a script that cuts texts by length is told so."""
        told = "length" in inspect.signature(self.module.stream).parameters
        return self.module.stream(self.model(), *[count][:told])

    def score(self, ids: np.ndarray) -> np.ndarray:
        """Nats of each target ids[1:] by the routine behind the headline, float64."""
        model = self.model()
        if hasattr(args := model.args, "eval_batch_tokens"):  # memory, not score: a short text pads a batch
            args.eval_batch_tokens = min(args.eval_batch_tokens, 32 * args.eval_seq_len)
        return np.asarray(self.module.score(model, ids)[0] if len(ids) > 1 else [], np.float64)

    def target_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Bytes that each target ids[1:] stands for; special ids stand for none."""
        if self.tokenizer is None:
            return (ids[1:] >= BYTE_OFFSET).astype(np.int64)
        args = self._arguments(TOKENIZER_PATH=self.tokenizer_path)
        return self._try(lambda: self.module.target_bytes(ids, self.module.byte_tables(args)))

    def circumstances(self) -> dict:
        """What decides how sums are rounded."""
        unit = self.torch.backends.cpu.get_cpu_capability()
        if self.device.startswith("cuda"):
            unit = self.torch.cuda.get_device_name(self.device)
        return {
            "machine": f"{platform.system()} {platform.machine()} {unit}",
            "torch": self.torch.__version__,
            "numpy": np.__version__,
            "constriction": importlib.metadata.version("constriction"),
        }

    def header(self, text: Text) -> dict:
        header = {
            "artifact": self.artifact_digest,
            "script": self.script_digest,
            "sha256": digest(text.raw),
            "tokenizer": self.tokenizer_digest,
            "bytes": len(text.raw),
            "ids": len(text.ids),
            "first": int(text.ids[0]) if len(text.ids) else 0,
            "kind": text.kind,
            "repair": len(text.repair),
            "set": self.settings,
            "device": self.device,
            "threads": self.threads,
            **self.circumstances(),
        }
        if not text.repair:
            del header["repair"]
        return {key: value for key, value in header.items() if value not in ("", {})}


# -----------------------------------------------------------------------------
# COMMANDS
# -----------------------------------------------------------------------------


def updates_of(stream) -> int | None:
    """Updates that a stream made at test time; None where it learns nothing."""
    learner = getattr(stream, "learner", None) or stream  # a stream may count them itself
    return getattr(learner, "updates", None)


def per_byte(code: float, size: int) -> float | None:
    """Bits a byte, from bytes of code and bytes of text."""
    return 8 * code / size if size else None


def shown(bpb: float | None) -> str:
    return "-" if bpb is None else f"{bpb:.4f}"


def pace(size: int, seconds: float) -> str:
    return f"{seconds:.1f} s, {size / max(seconds, 1e-9):,.0f} bytes/s"


def open_record(options: argparse.Namespace) -> Record:
    pairs = [item.partition("=") for item in options.set]
    for name, equals, value in pairs:
        if not (name and equals):
            raise CodecError(f"--set {name}{equals}{value}: NAME=VALUE expected")
    if options.threads < 1:
        raise CodecError(f"--threads {options.threads}: at least 1")
    settings = {name: value for name, _, value in pairs}
    record = Record(options, settings, options.device, options.threads)
    record.open()
    return record


def compress(options: argparse.Namespace) -> int:
    source = Path(options.file)
    raw = read(source, "FILE")
    out = output_path(options.output, source.with_name(source.name + ".golf"), source)
    record = open_record(options)
    text = to_ids(raw, str(source), record.tokenizer, record.vocab)
    start = time.perf_counter()
    stream = record.stream(len(text.ids))
    payload, _, _ = encode(stream, text.ids)
    blob = pack(record.header(text), payload + text.repair)
    write(out, blob)
    result = {
        "out": str(out),
        "kind": text.kind,
        "bytes": len(raw),
        "ids": len(text.ids),
        "coded_bytes": len(blob),
        "header_bytes": len(blob) - len(payload) - len(text.repair),
        "repair_bytes": len(text.repair),
        "bpb": per_byte(len(blob), len(raw)),
        "seconds": time.perf_counter() - start,
        "updates": updates_of(stream),
    }
    folded = f", {len(text.repair):,} for what the tokenizer folds" if text.repair else ""
    size = f"{len(raw):,} -> {len(blob):,} bytes (header {result['header_bytes']}{folded})"
    line = f"{out}: {size}, {shown(result['bpb'])} BPB, {pace(len(raw), result['seconds'])}"
    print(json.dumps(result) if options.json else line)
    return 0


def decompress(options: argparse.Namespace) -> int:
    source = Path(options.file)
    header, payload = unpack(read(source, "FILE"), str(source))
    if header["kind"] not in KINDS:
        raise CodecError(f"{source}: kind {header['kind']}: a newer codec made it")
    out = output_path(options.output, source.with_suffix("") if source.suffix == ".golf" else None, source)
    record = Record(options, header.get("set", {}), header["device"], header["threads"])
    if header["artifact"] != record.artifact_digest:
        raise CodecError(f"{source}: made with another artifact than {record.artifact}")
    if header["script"] != record.script_digest:
        raise CodecError(f"{source}: made with another script than {record.script}")
    record.open()
    if header.get("tokenizer", "") != record.tokenizer_digest:
        raise CodecError(f"{source}: made with another tokenizer than {options.tokenizer}")
    here = record.circumstances()
    odd = ", ".join(
        f"{name} {header[name]} (here {now})" for name, now in here.items() if header[name] != now
    )
    if odd:
        print(f"warning: made with {odd}: it may not decode here", file=sys.stderr)
    start = time.perf_counter()
    stream = record.stream(header["ids"])
    code, patch = np.split(np.frombuffer(payload, np.uint8), [len(payload) - header.get("repair", 0)])
    try:
        ids = decode(stream, code.tobytes(), header["ids"], header["first"])
        raw = to_bytes(header["kind"], ids, record.tokenizer, patch.tobytes())
        if len(raw) != header["bytes"] or digest(raw) != header["sha256"]:
            raise CodecError("the checksum of the text does not match")
    except CodecError as error:
        why = f"made with {odd}" if odd else "the stream does not repeat itself"
        raise CodecError(f"{source}: {error}; {why}") from None
    write(out, raw)
    result = {
        "out": str(out),
        "bytes": len(raw),
        "ids": len(ids),
        "seconds": time.perf_counter() - start,
        "updates": updates_of(stream),
    }
    line = f"{out}: {len(raw):,} bytes, {pace(len(raw), result['seconds'])}; the checksum matches"
    print(json.dumps(result) if options.json else line)
    return 0


def prefix_of(text: Text, sizes: np.ndarray, limit: int) -> tuple[Text, int]:
    """The ids up to the target that completes `limit` bytes, as a text of their own, and its bytes.

    `sizes` (targets,) are the bytes of each. SentencePiece ids become a shard, since a prefix of them may end
    inside a character and its text need not give the same ids back.
    """
    total = np.cumsum(sizes)
    if not len(total) or limit >= total[-1]:
        return text, int(sizes.sum())
    targets = int(np.searchsorted(total, limit)) + 1
    ids = text.ids[: targets + 1]
    kind = "shard" if text.kind in ("sentencepiece", "caseops") else text.kind
    return Text(kind, to_bytes(kind, ids, None), ids), int(total[targets - 1])


def decode_apart(options: argparse.Namespace, blob: bytes) -> tuple[dict, bytes]:
    """Decodes in a process that sees the script, the artifact and the coded file, never the text.

    Returns its result and what it wrote. Raises BadStream where it failed; it has said why on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        coded, out = Path(folder, "prefix.golf"), Path(folder, "prefix")
        coded.write_bytes(blob)
        paths = [
            options.record,
            options.artifact,
            str(coded),
            "-o",
            str(out),
            "--tokenizer",
            options.tokenizer,
        ]
        command = [sys.executable, __file__, "decompress", *paths, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise BadStream(f"decoding ended with exit code {done.returncode}")
        return json.loads(done.stdout.splitlines()[-1]), out.read_bytes()


def measure(options: argparse.Namespace, record: Record, text: Text, result: dict) -> None:
    """Fills `result` with sizes, times and `failures`. Raises BadStream where nothing can be coded."""
    size = result["bytes"]
    start = time.perf_counter()
    stream = record.stream(len(text.ids))
    payload, nats, gap = encode(stream, text.ids)
    blob = pack(record.header(text), payload + text.repair)
    result |= {
        "encode_seconds": time.perf_counter() - start,
        "updates": updates_of(stream),
        "coded_bytes": len(payload),
        "header_bytes": len(blob) - len(payload) - len(text.repair),
        "coded_bpb": per_byte(len(payload), size),
        "normalisation_error": gap,
    }
    start = time.perf_counter()
    scored = record.score(text.ids)
    result["score_seconds"] = time.perf_counter() - start
    for name, found in (("stream", nats), ("score", scored)):
        wanted = float(found.sum() / math.log(2) / 8)
        result |= {f"{name}_bytes": wanted, f"{name}_bpb": per_byte(wanted, size)}
        if not abs(len(payload) - wanted) <= 0.002 * wanted + 64:  # a NaN fails too
            result["failures"].append(f"{len(payload)} bytes of code are {wanted:.1f} by {name}")
    if not gap <= 1e-4:
        result["failures"].append(f"a distribution misses the sum 1 by {gap:.2g}")
    differ = np.abs(nats - scored) if nats.shape == scored.shape else np.array([np.inf])
    result["largest_gap_nats"] = float(differ.max(initial=0.0))
    result["largest_gap_target"] = int(differ.argmax()) if len(differ) else None
    found, back = decode_apart(options, blob)
    result |= {"decoded": back == text.raw, "decode_seconds": found["seconds"]}
    if back != text.raw:
        result["failures"].append("what was decoded is not what was coded")


def sidecar_of(shard: Path, count: int) -> np.ndarray | None:
    """Bytes of each target of a shard of `count` ids in CaseOps form; None where no sidecar lies beside it.

    That of NAME_val_000000.bin is NAME_val_000000.bytes (data/README.md) or NAME_val_bytes_000000.bin, as
    published.
    """
    stem, _, number = shard.stem.rpartition("_")
    for path in (shard.with_suffix(".bytes"), shard.with_name(f"{stem}_bytes_{number}{shard.suffix}")):
        if path.exists():
            sizes = shard_ids(read(path, "sidecar"))
            if sizes is None or len(sizes) != count:
                raise CodecError(f"sidecar {path}: not that of {shard.name}, which has {count} ids")
            return sizes[1:]
    return None


def target_sizes(record: Record, text: Text, path: str) -> np.ndarray:
    """Bytes of each target ids[1:]: by a table of the ids, except in CaseOps form, where they depend on the
    text."""
    if text.kind == "caseops":
        try:
            return record.tokenizer.sizes(text.raw.decode("utf-8"))
        except ValueError as error:
            raise CodecError(f"FILE {path}: {error}") from None
    sizes = sidecar_of(Path(path), len(text.ids)) if text.kind == "shard" else None
    if sizes is not None:
        return sizes
    if record.tokenizer is not None and record.tokenizer.kind == "caseops":
        raise CodecError(f"FILE {path}: CaseOps ids, without the sidecar that counts their bytes")
    return record.target_bytes(text.ids)


def prove(options: argparse.Namespace) -> int:
    if options.bytes < 1:
        raise CodecError(f"--bytes {options.bytes}: at least 1")
    raw = read(options.file, "FILE")
    record = open_record(options)
    text = to_ids(raw, options.file, record.tokenizer, record.vocab)
    text, size = prefix_of(text, target_sizes(record, text, options.file), options.bytes)
    result = {"file": options.file, "kind": text.kind, "bytes": size, "ids": len(text.ids)}
    named = hashlib.sha256(record.script.read_bytes()).hexdigest()
    result |= {"set": record.settings, "script_sha256": named, "failures": []}
    try:
        measure(options, record, text, result)
    except BadStream as error:
        result["failures"].append(str(error))
    result["pass"] = not result["failures"]
    print(json.dumps(result) if options.json else report(result))
    return 0 if result["pass"] else 1


def report(result: dict) -> str:
    size = result["bytes"]
    lines = [f"prefix   {size:,} bytes in {result['ids']:,} ids of {result['file']} ({result['kind']})"]
    if "coded_bytes" in result:
        coded, header = result["coded_bytes"], result["header_bytes"]
        note = f"header {header} bytes; sums are 1 within {result['normalisation_error']:.1g}"
        lines.append(f"code     {coded:,} bytes  {shown(result['coded_bpb'])} BPB  ({note})")
    for name in ("stream", "score"):
        if f"{name}_bytes" in result:
            wanted = result[f"{name}_bytes"]
            share = f", {100 * (coded / wanted - 1):+.3f} %" if wanted else ""
            note = f"the code is {coded - wanted:+.1f} bytes{share}"
            lines.append(f"{name:<6}   {wanted:,.1f} bytes  {shown(result[f'{name}_bpb'])} BPB  ({note})")
    if "largest_gap_nats" in result:
        where = f"at target {result['largest_gap_target']}"
        lines.append(
            f"gap      stream and score differ by at most {result['largest_gap_nats']:.2g} nats, {where}"
        )
    if result.get("updates") is not None:
        lines.append(f"updates  {result['updates']} at test time")
    for name in ("encode", "decode", "score"):
        if f"{name}_seconds" in result:
            lines.append(f"{name:<6}   {pace(size, result[f'{name}_seconds'])}")
    verdict = ["PASS: decoded id for id in a process of its own"] if result["pass"] else []
    return "\n".join([*lines, *(f"FAIL: {why}" for why in result["failures"]), *verdict])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (compress, decompress, prove):
        command = commands.add_parser(function.__name__)
        command.set_defaults(run=function)
        add = command.add_argument
        add("record", help="a record's folder or a script; . is the trunk")
        add("artifact", help="the artifact of a run of that script")
        add("file")
        add("--json", action="store_true", help="print the result as one line of JSON")
        path = os.environ.get("TOKENIZER_PATH", "")
        add("--tokenizer", default=path, help="SentencePiece model (TOKENIZER_PATH); byte260 needs none")
        if function is not prove:
            add("-o", "--output", default="", help="default: .golf appended, or taken off")
        if function is not decompress:  # a coded file says all this itself
            add(
                "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the evaluation"
            )
            add("--device", default="cpu")
            add("--threads", type=int, default=1, help="of torch, in both directions")
        if function is prove:
            add("--bytes", type=int, default=20_000, help="length of the prefix")
    options = parser.parse_args(argv)
    try:
        return options.run(options)
    except CodecError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or tempfile.gettempdir()}: {error.strerror or error}", file=sys.stderr)
        return 2
    except MemoryError:
        print(f"error: FILE {options.file}: out of memory; code it in parts", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
