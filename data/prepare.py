"""Text -> documents -> shards: everything between a corpus and `train_gpt.py`.

    python data/prepare.py                            the running Python's standard library (no network)
    python data/prepare.py files A.jsonl.zst B.parquet C.txt FOLDER 'parts/*.jsonl.gz' --val D.txt
    zcat parts/*.gz | python data/prepare.py files -  standard input
    python data/prepare.py python PATH                every .py file below PATH
    python data/prepare.py python_extended            standard library and site-packages
    python data/prepare.py tinyshakespeare [--path input.txt]
    python data/prepare.py fineweb [--shards N | --documents] [--hub-folder PATH]
    python data/prepare.py markov2                    a deterministic toy stream, for tests only
    python data/prepare.py convert --from FOLDER --variant byte260 --tokenizer sp1024.model
    python data/prepare.py SOURCE --help              the options of a source

A folder is written whole or not at all: the work happens in a hidden folder beside it that is renamed at the
end. `data/README.md` describes every source, variant and file. Exit codes: 0 fine; 2 for what the user can
mend, said in one line that begins with "error: ". Nothing is left behind then, and what stood there stays.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import site
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

sys.path.append(str(Path(__file__).resolve().parent))  # tools and tests load this file by its path
import caseops
from readers import ACCEPTED, OUT_OF_MEMORY, Piped, Reading, UserError, documents, say, sources, whole_text

SHARD_MAGIC, SHARD_VERSION, SHARD_TOKENS = 20240520, 1, 100_000_000
PAD_ID, BOS_ID, EOS_ID, UNK_ID, BYTE_OFFSET = 0, 1, 2, 3, 4
# The contest's validation split: the first 50,000 documents, in one place for both sides.
VAL_DOCUMENTS_FINEWEB = 50_000
SHINGLE, OVERLAP_LIMIT = 64, 0.30
# Of a sidecar, beside `.bin`: nothing that looks for shards may take one for ids.
SIDECAR = ".bytes"
SPACE = "\u2581"  # SentencePiece's mark for a space
TINYSHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
FINEWEB_REPO = "willdepueoai/parameter-golf"


def bar(items: Iterable, what: str, total: int | None = None, unit: str = "doc"):
    """tqdm on a terminal, plain iteration elsewhere."""
    return tqdm(items, desc=what, total=total, unit=unit, disable=None, leave=False) if tqdm else items


# -----------------------------------------------------------------------------
# SOURCES: each gives training and validation documents as iterators that can be started again
# -----------------------------------------------------------------------------


@dataclass
class Corpus:
    """A source: `train()` and `val()` start a new pass over UTF-8 documents; `notes` go into the manifest."""

    name: str
    train: Callable[[], Iterator[bytes]]
    val: Callable[[], Iterator[bytes]]
    notes: dict
    # A validation split that may not change: training gives way where documents are equal.
    fixed_val: bool = False


def digest(document: bytes) -> bytes:
    return hashlib.blake2b(document, digest_size=16).digest()


class TextHash:
    """Names a text by its documents, whatever ids they become: folders with equal hashes hold the same text.

    sha256 over the documents in their order, each after its length as 8 bytes, little-endian: no other list
    of documents makes the same stream.
    """

    def __init__(self):
        self.sha = hashlib.sha256()

    def add(self, document: bytes) -> None:
        self.sha.update(len(document).to_bytes(8, "little") + document)

    def hexdigest(self) -> str:
        return self.sha.hexdigest()


def reading_of(args: argparse.Namespace) -> Reading:
    return Reading(getattr(args, "field", "text"), args.errors, any_bytes=args.variant == "byte260")


def provenance(key: str, paths: list[Path | Piped]) -> dict:
    """Names and hashes of named files, for the manifest. Two files of one content are worth a word: often the
    second is a forgotten copy, and its text counts twice."""
    sums = [sha256_file(path) for path in paths]
    for second, found in enumerate(sums):
        if (first := sums.index(found)) < second:
            say(f"{paths[second]} has the same bytes as {paths[first]}: its text is there twice")
    return {key: [path.name for path in paths], f"{key}_sha256": sums}


def take_bytes(documents: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """Documents until `limit` bytes are passed; 0 = all."""
    seen = 0
    for document in documents:
        yield document
        seen += len(document)
        if limit and seen > limit:
            return


def hold_out(name: str, digests: Iterable[bytes], val_share: float) -> set[bytes]:
    """The validation documents' digests: a function of each document by itself, at least one of them."""
    digests = set(digests)
    held_out = {key for key in digests if int.from_bytes(key[8:], "big") < val_share * 2**64}
    held_out = held_out or {min(digests, default=b"")}
    if len(held_out) >= len(digests):
        raise UserError(f"{name}: {len(digests)} documents are too few to hold any out")
    return held_out


def split_by_hash(name: str, paths: Iterable[Path], args: argparse.Namespace, notes: dict) -> Corpus:
    """A file is a document: equal ones once, ordered by hash (a shuffle that never changes), the first share
    validation. Memory holds digests and paths; each pass reads the files again."""
    reading, val_share = reading_of(args), args.val_share
    places: dict[bytes, Path] = {}

    def read_text(path: Path) -> bytes:
        return whole_text(path.read_bytes(), str(path), reading)

    for path in paths:
        with contextlib.suppress(OSError):
            if document := read_text(path):
                places[digest(document)] = path
    order, held_out = sorted(places), hold_out(name, places, val_share)

    def part(validation: bool) -> Iterator[bytes]:
        for key in order:
            if (key in held_out) == validation:
                try:
                    document = read_text(places[key])
                except OSError as error:
                    raise UserError(f"{places[key]}: {error}") from None
                if digest(document) != key:
                    raise UserError(f"{places[key]}: changed while it was read")
                yield document

    notes = {**notes, "split": f"by hash of the file, {val_share:g} held out"}
    return Corpus(name, lambda: part(False), lambda: part(True), notes)


def python_files(roots: Iterable[Path], skip: tuple[str, ...] = ()) -> Iterator[Path]:
    """.py files below the roots, in path order."""
    for root in roots:
        paths = sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)
        for path in bar(paths, f"reading {root.name}", len(paths), "file"):
            if not any(part in skip for part in path.relative_to(root).parts):
                yield path


def source_stdlib(args: argparse.Namespace) -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    notes = {"python": sys.version.split()[0]}
    paths = python_files([root], ("site-packages", "dist-packages"))
    return split_by_hash("stdlib", paths, args, notes)


def source_python(args: argparse.Namespace) -> Corpus:
    root = Path(args.path)
    if not root.is_dir():
        raise UserError(f"{root}: not a folder")
    return split_by_hash("python", python_files([root]), args, {"root": root.name})


def source_python_extended(args: argparse.Namespace) -> Corpus:
    packages = {Path(path) for path in [*site.getsitepackages(), sysconfig.get_paths()["purelib"]]}
    roots = [Path(sysconfig.get_paths()["stdlib"]), *sorted(path for path in packages if path.is_dir())]
    notes = {"python": sys.version.split()[0]}
    return split_by_hash("python_extended", python_files(roots, ("dist-packages",)), args, notes)


def named_files(args: argparse.Namespace) -> tuple[list[Path | Piped], list[Path | Piped]]:
    """(training files, validation files) that the command line names; no file is on both sides."""
    if args.val and args.val_tail:
        raise UserError("files: --val and --val-tail both name the validation text; give one")
    if "-" in args.train and "-" in args.val:
        raise UserError("- is named twice: standard input can be read once")
    train_files, val_files = sources(args.train), sources(args.val)
    validation = {path.resolve() for path in val_files if isinstance(path, Path)}
    for path in train_files:
        if isinstance(path, Path) and path.resolve() in validation:
            raise UserError(f"{path}: named as training text and as validation text")
    return train_files, val_files


def source_files(args: argparse.Namespace) -> Corpus:
    """Named files, in their order (`--no-shuffle`) or in the order of a seeded permutation of the documents.
    """
    (train_files, val_files), reading = named_files(args), reading_of(args)

    def texts(paths: list[Path | Piped]) -> Iterator[bytes]:
        for path in paths:
            yield from (document for document in documents(path, reading) if document)

    def training(source: Iterator[bytes]) -> Iterator[bytes]:
        # Memory stays flat: the documents are shuffled in blocks of 64 MB, the blocks follow the files.
        return source if args.no_shuffle else shuffle_blocks(source, args.seed)

    notes = {**provenance("files", train_files), "shuffled": not args.no_shuffle}
    if args.field != "text":
        notes["field"] = args.field
    if args.val:
        return Corpus(
            "files",
            lambda: training(take_bytes(texts(train_files), args.train_bytes)),
            lambda: take_bytes(texts(val_files), args.val_bytes),
            {**notes, **provenance("val_files", val_files)},
        )
    if args.val_tail:
        cut = tail_start(map(len, texts(train_files)), args.val_tail)
        if not cut:
            raise UserError(f"files: --val-tail {args.val_tail} leaves no training text")
        return Corpus(
            "files",
            lambda: training(take_bytes(itertools.islice(texts(train_files), cut), args.train_bytes)),
            lambda: take_bytes(itertools.islice(texts(train_files), cut, None), args.val_bytes),
            {**notes, "val_tail": args.val_tail},
        )

    def taken() -> Iterator[bytes]:
        return take_bytes(texts(train_files), args.train_bytes)

    held_out = hold_out("files", map(digest, taken()), args.val_share)  # only digests are kept in memory

    def part(validation: bool) -> Iterator[bytes]:
        seen = set()
        for document in taken():
            key = digest(document)
            if key not in seen and (key in held_out) == validation:
                seen.add(key)
                yield document

    return Corpus(
        "files",
        lambda: training(part(False)),
        lambda: take_bytes(part(True), args.val_bytes),
        {**notes, "val_share": args.val_share},
    )


def tail_start(sizes: Iterable[int], limit: int) -> int:
    """Number of documents before the last ones that together pass `limit` bytes; 0 if there are none."""
    tail: deque[int] = deque()
    held = count = 0
    for size in sizes:
        tail.append(size)
        held, count = held + size, count + 1
        while held - tail[0] > limit:
            held -= tail.popleft()
    return count - len(tail)


def shuffle_blocks(documents: Iterator[bytes], seed: int, block: int = 64_000_000) -> Iterator[bytes]:
    rng, held, size = random.Random(seed), [], 0
    for document in documents:
        held.append(document)
        size += len(document)
        if size > block:
            rng.shuffle(held)
            yield from held
            held, size = [], 0
    rng.shuffle(held)
    yield from held


def source_tinyshakespeare(args: argparse.Namespace) -> Corpus:
    """The 1.1 MB file, cut once, after the paragraph that passes nine tenths: training, then validation."""
    url, wanted = TINYSHAKESPEARE
    path = Path(args.file) if args.file else Path(args.out_root) / "downloads" / "tinyshakespeare.txt"
    if not path.exists():
        if args.file:
            raise UserError(f"{path}: no such file")
        download(url, path)
    text = path.read_bytes()
    if hashlib.sha256(text).hexdigest() != wanted:
        raise UserError(
            f"{path}: sha256 {hashlib.sha256(text).hexdigest()} is not tinyshakespeare's {wanted}"
        )
    cut = text.index(b"\n\n", len(text) * 9 // 10) + 2
    split = f"contiguous: {cut} bytes, then {len(text) - cut} held out"
    notes = {"url": url, "sha256": wanted, "split": split}
    return Corpus("tinyshakespeare", lambda: iter([text[:cut]]), lambda: iter([text[cut:]]), notes)


def markov2(length: int, seed: int) -> bytes:
    """SGJM's synthetic stream: P[i mod 96] xor (17 a + 31 c + 7 i)
    mod 256 over the two bytes before (c before a).

    Deterministic and periodic (24,576 bytes for seed 42): text for tests, never for a score.
    """
    rng = random.Random(seed)
    pattern = [rng.randrange(256) for _ in range(96)]
    out, a, c = bytearray(length), 0, 0
    for i in range(length):
        out[i] = pattern[i % 96] ^ (17 * a + 31 * c + 7 * i) & 255
        a, c = out[i], a
    return bytes(out)


def source_markov2(args: argparse.Namespace) -> Corpus:
    if args.variant != "byte260":
        raise UserError(f"markov2 --variant {args.variant}: its bytes are no text; byte260 has ids for them")
    if args.bytes < 100:
        raise UserError(f"--bytes {args.bytes}: at least 100")
    text = markov2(args.bytes, args.seed)
    cut = len(text) * 95 // 100
    return Corpus(
        "markov2",
        lambda: iter([text[:cut]]),
        lambda: iter([text[cut:]]),
        {"warning": "synthetic and periodic: for tests only", "seed": args.seed},
    )


def download(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(temporary, "wb") as file:
            shutil.copyfileobj(response, file)
        os.replace(temporary, path)
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{url}: {error}; pass a local copy with --path") from None
    finally:
        temporary.unlink(missing_ok=True)


class Hub:
    """Files of a dataset repository on the Hugging Face hub, or of a local folder laid out like it."""

    def __init__(self, args: argparse.Namespace):
        self.repo, self.revision = args.repo, args.revision
        self.folder = Path(args.hub_folder) if args.hub_folder else None
        self.cache = Path(args.out_root) / "downloads" / args.repo.replace("/", "--")
        if self.folder is not None and not self.folder.is_dir():
            raise UserError(f"--hub-folder {self.folder}: not a folder")

    def files(self) -> dict[str, str]:
        """{path inside the repository: sha256, or "" where none is known}."""
        if self.folder is not None:
            known = self.sums(self.folder / "SHA256SUMS")
            paths = (
                path.relative_to(self.folder).as_posix()
                for path in sorted(self.folder.rglob("*"))
                if path.is_file()
            )
            return {path: known.get(path, "") for path in paths}
        try:
            from huggingface_hub import HfApi

            tree = HfApi().list_repo_tree(
                self.repo, repo_type="dataset", revision=self.revision, recursive=True
            )
            return {
                item.path: item.lfs.sha256 if getattr(item, "lfs", None) else ""
                for item in tree
                if hasattr(item, "size")
            }
        except ImportError:
            raise UserError("fineweb needs the huggingface_hub package, or --hub-folder") from None
        except Exception as error:  # the hub's client has many kinds of its own
            raise UserError(f"hub {self.repo}: {error}; --hub-folder takes a local copy") from None

    @staticmethod
    def sums(path: Path) -> dict[str, str]:
        """{name: sha256} of a file as `sha256sum` writes it; {} where there is none."""
        known = {}
        for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
            parts = line.decode(errors="replace").split(maxsplit=1)
            if len(parts) == 1:
                raise UserError(f"{path}: line {number} is not a sum and a name, as sha256sum writes them")
            if parts:
                known[parts[1]] = parts[0]
        return known

    def get(self, path: str, sha256: str) -> Path:
        """A local file with the right sha256; downloads resume where they stopped."""
        if self.folder is not None:
            local = self.folder / path
        else:
            from huggingface_hub import hf_hub_download

            try:
                local = Path(
                    hf_hub_download(
                        self.repo, path, repo_type="dataset", revision=self.revision, local_dir=self.cache
                    )
                )
            except Exception as error:
                raise UserError(f"hub {self.repo}/{path}: {error}") from None
        if sha256 and (found := sha256_file(local)) != sha256:
            raise UserError(f"{local}: sha256 {found} is not the published {sha256}; delete it and try again")
        return local


def source_fineweb(args: argparse.Namespace) -> Corpus:
    """The published documents (`docs_selected.jsonl`): the first 50,000 are validation, in their order."""
    hub = Hub(args)
    files = hub.files()
    name = next(
        (path for path in files if path.endswith(("docs_selected.jsonl", "docs_selected.jsonl.zst"))), None
    )
    if name is None:
        raise UserError(f"hub {args.hub_folder or args.repo}: no docs_selected.jsonl")
    path = hub.get(name, files[name])

    def part(first: int, last: int | None) -> Iterator[bytes]:
        for number, document in enumerate(documents(path, reading_of(args))):
            if last is not None and number >= last:
                return
            if number >= first:
                yield document

    count = args.val_documents
    return Corpus(
        "fineweb",
        lambda: take_bytes(part(count, None), args.train_bytes),
        lambda: part(0, count),
        {"repo": args.repo, "documents_file": name, "val_documents": count},
        fixed_val=True,
    )


# -----------------------------------------------------------------------------
# VARIANTS: documents -> ids
# -----------------------------------------------------------------------------


class ByteTokenizer:
    """byte260: PAD BOS EOS UNK, then byte value + 4. An identity on any file."""

    name, vocab_size, path, sha256, notes = "byte260", 260, None, None, {}

    def encode(self, document: bytes) -> np.ndarray:
        return np.frombuffer(document, np.uint8).astype(np.uint16) + BYTE_OFFSET

    def encode_sized(self, document: bytes) -> tuple[np.ndarray, None]:
        """Ids and the sidecar of BOS and ids: none here, an id's bytes are known."""
        return self.encode(document), None

    def spelled_bytes(self, ids: np.ndarray) -> int:
        """Bytes of text that a document's ids stand for."""
        return len(ids)


class PieceTokenizer:
    """A SentencePiece model. Those trained here (identity normalisation, byte fallback, no dummy prefix) lose
    nothing: a literal U+2581, which SentencePiece cannot tell from a space, is written as its three byte
    pieces.
    """

    notes: dict = {}  # what the manifest says on top

    def __init__(self, model: Path, variant: str):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise UserError(f"variant {variant} needs the sentencepiece package") from None
        try:
            self.model = SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{model}: not a SentencePiece model ({error})") from None
        self.name, self.path, self.vocab_size = variant, model, self.model.vocab_size()
        if self.vocab_size > 65536:
            raise UserError(f"{model}: {self.vocab_size} ids do not fit uint16 shards")
        if self.model.bos_id() != BOS_ID:
            raise UserError(f"{model}: BOS is id {self.model.bos_id()}, shards need {BOS_ID}")
        self.sha256 = sha256_file(model)
        self.dummy_prefix = self.model.encode("a", out_type=str)[0].startswith(SPACE)
        self.splits_marks = not self.dummy_prefix  # writes a literal U+2581 as byte pieces
        self.mark = [self.model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def encode(self, document: bytes) -> np.ndarray:
        text = document.decode("utf-8")
        if SPACE not in text or not self.splits_marks:
            return np.array(self.model.encode(text), np.uint16)
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):
            ids += (self.mark if i else []) + self.model.encode(part)
        return np.array(ids, np.uint16)

    def encode_sized(self, document: bytes) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids and the sidecar of BOS and ids: none here, a table of the pieces has an id's bytes."""
        return self.encode(document), None

    @functools.cached_property
    def byte_tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The training scripts' own, by which a score is divided: (bytes of each id without a leading space,
        whether it has one, whether it is a boundary, after which a space is the dummy prefix)."""
        ids = range(self.vocab_size)
        special = (self.model.is_control, self.model.is_unknown, self.model.is_unused)
        edge = np.array([any(test(i) for test in special) for i in ids])
        space = np.array([self.dummy_prefix and self.model.id_to_piece(i).startswith(SPACE) for i in ids])
        space &= ~edge
        return np.where(edge, 0, self.lengths) - space, space, edge

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return piece_table(self.model)[2]

    def spelled_bytes(self, ids: np.ndarray) -> int:
        """Bytes of text that a document's ids stand for: fewer than it has where the model folds."""
        base, space, edge = self.byte_tables
        follows_edge = np.concatenate(([True], edge[ids]))[: len(ids)]  # BOS comes first
        return int((base[ids] + (space[ids] & ~follows_edge)).sum())


class CaseOpsTokenizer(PieceTokenizer):
    """A SentencePiece model of text in CaseOps form
    (`caseops.py`): takes plain documents, counts their bytes.

    A model that normalises, as the field's does, is used as it is: a literal U+2581 is its space, and bytes
    go by the pieces' surfaces. One that keeps everything has a table of them.
    """

    # white space to fold, a ligature, a character that no vocabulary has
    PROBE = "  a\t\n \ufb01 \U0010fffd  "

    def __init__(self, model: Path, variant: str):
        super().__init__(model, variant)
        try:
            self.operators = caseops.operator_ids(self.model)
        except ValueError as error:
            raise UserError(f"{model}: {error}") from None
        self.lossless = self.model.decode(self.model.encode(self.PROBE)) == self.PROBE
        self.splits_marks = self.lossless
        names = ("title", "allcaps", "capnext", "escape")
        operators = dict(zip(names, self.operators.tolist()))
        self.notes = {"caseops": {"transform": caseops.NAME, "operators": operators, "sidecar": SIDECAR}}

    def encode(self, document: bytes) -> np.ndarray:
        return super().encode(caseops.encode(document.decode("utf-8")).encode("utf-8"))

    def encode_sized(self, document: bytes) -> tuple[np.ndarray, np.ndarray]:
        try:
            if self.lossless:
                ids = self.encode(document)
                sizes = caseops.sidecar_of_ids(ids, self.lengths, self.operators)
            else:
                text = caseops.encode(document.decode("utf-8"))
                pieces = self.model.encode(text, return_type="offset_mapping")
                ids, ends = np.array(pieces["ids"], np.uint16), [end for _, end in pieces["offsets"]]
                sizes = caseops.sidecar(text, ids, ends, self.operators)
        except ValueError as error:
            raise UserError(f"{self.path.name}: document {document[:40]!r}...: {error}") from None
        if (counted := int(sizes.sum(dtype=np.int64))) != len(document):
            raise UserError(
                f"{self.path.name}: document {document[:40]!r}...: "
                f"its ids stand for {counted} of {len(document)} bytes"
            )
        return ids, sizes

    def spelled_bytes(self, ids: np.ndarray) -> int:
        return len(caseops.decode(self.model.decode(ids.tolist()), strict=False).encode())


def train_pieces(
    documents: Iterator[bytes], size: int, folder: Path, limit: int = 40_000_000, with_caseops: bool = False
) -> Path:
    """A BPE model of `size` ids on the first `limit` bytes of the
    training documents (the last few are never seen).

    `with_caseops`: of the documents in CaseOps form, with its operators as user-defined symbols.
    """
    try:
        import sentencepiece
    except ImportError:
        raise UserError("training a tokenizer needs the sentencepiece package") from None
    path = folder / (f"sp{size}-caseops.model" if with_caseops else f"sp{size}.model")
    # Into memory: a model that is written by its trainer holds the name of its file, which differs by run.
    model = io.BytesIO()
    texts = (document.decode("utf-8") for document in take_bytes(documents, limit))
    pieces = (part for text in texts for part in slices(caseops.encode(text) if with_caseops else text))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=pieces,
            model_writer=model,
            vocab_size=size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            max_sentence_length=1 << 20,
            character_coverage=0.9995,
            hard_vocab_limit=False,
            minloglevel=2,
            **({"user_defined_symbols": list(caseops.OPERATORS)} if with_caseops else {}),
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"variant {path.stem}: {' '.join(str(error).split())}") from None
    path.write_bytes(model.getvalue())
    return path


def slices(text: str, size: int = 4000) -> Iterator[str]:
    """Pieces of a document short enough for SentencePiece's trainer, without the characters it reserves."""
    text = text.replace(SPACE, " ").replace("\0", " ")
    yield from (text[i : i + size] for i in range(0, len(text), size))


# -----------------------------------------------------------------------------
# OVERLAP: is validation text in the training text?
# -----------------------------------------------------------------------------

HASH_BASE = 0x9E3779B97F4A7C15 | 1


class OverlapScan:
    """Looks for the validation text's 64-byte shingles (every 64th
    offset) at every offset of the training text.

    Rolling hash without a loop: with S the running sum of byte * B^i (mod 2^64), a window's hash is
    (S[i + 64] - S[i]) * B^-i. A table of bits on the hash's top bits keeps the exact look-up rare.
    """

    def __init__(self, chunk: int = 1 << 20):
        self.chunk = chunk + SHINGLE
        powers = np.full(self.chunk, HASH_BASE, np.uint64)
        powers[0] = 1
        self.powers = np.cumprod(powers, dtype=np.uint64)
        inverse = np.full(self.chunk, pow(HASH_BASE, -1, 1 << 64), np.uint64)
        inverse[0] = 1
        self.inverse = np.cumprod(inverse, dtype=np.uint64)
        self.hashes: list[np.ndarray] = []
        self.documents: list[int] = []
        self.held, self.size = [], 0

    def window_hashes(self, text: np.ndarray) -> np.ndarray:
        """Hash of every 64-byte window of at most `chunk` bytes of text."""
        if len(text) < SHINGLE:
            return np.zeros(0, np.uint64)
        sums = np.concatenate(([np.uint64(0)], np.cumsum(text * self.powers[: len(text)], dtype=np.uint64)))
        return (sums[SHINGLE:] - sums[:-SHINGLE]) * self.inverse[: len(text) - SHINGLE + 1]

    def add_validation(self, document: bytes) -> None:
        """Call for every validation document, in order, before `close_validation`."""
        text = np.frombuffer(document, np.uint8)
        count = len(text) // SHINGLE
        whole = text[: count * SHINGLE].reshape(count, SHINGLE).astype(np.uint64)
        self.hashes.append((whole * self.powers[:SHINGLE]).sum(1, dtype=np.uint64))
        self.documents.append(count)

    def close_validation(self) -> None:
        self.all = np.concatenate(self.hashes) if self.hashes else np.zeros(0, np.uint64)
        self.sorted = np.unique(self.all)
        self.found = np.zeros(len(self.sorted), bool)
        self.shift = np.uint64(64 - min(28, max(16, int(32 * len(self.sorted)).bit_length())))
        self.table = np.zeros(1 << (64 - int(self.shift)), bool)
        self.table[self.slot(self.sorted)] = True

    def slot(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes * np.uint64(0xD6E8FEB86659FD93)) >> self.shift

    def add_training(self, document: bytes) -> None:
        """Call for every training document; `flush` at the end. Windows never span two documents by
        accident: the join is a byte that UTF-8 does not use, and other texts rarely.
        """
        self.held.append(document)
        self.size += len(document) + 1
        if self.size >= 1 << 23:
            self.flush()

    def flush(self) -> None:
        text = np.frombuffer(b"\xff".join(self.held), np.uint8)
        self.held, self.size = [], 0
        step = self.chunk - SHINGLE + 1
        for start in range(0, max(len(text) - SHINGLE + 1, 0), step):
            hashes = self.window_hashes(text[start : start + self.chunk])
            candidates = hashes[self.table[self.slot(hashes)]]
            if len(candidates):
                at = np.minimum(np.searchsorted(self.sorted, candidates), len(self.sorted) - 1)
                self.found[at[self.sorted[at] == candidates]] = True

    def shares(self) -> np.ndarray:
        """Share of each validation document's shingles that the training text holds."""
        hits = self.found[np.searchsorted(self.sorted, self.all)] if len(self.all) else np.zeros(0, bool)
        edges = np.cumsum([0, *self.documents])
        return np.array([hits[a:b].mean() if b > a else 0.0 for a, b in zip(edges[:-1], edges[1:])])

    def share_found(self, shares: np.ndarray) -> float:
        """The same of the whole validation text, from its documents' shares."""
        weights = np.array(self.documents)
        return float((shares * weights).sum() / max(weights.sum(), 1))


# -----------------------------------------------------------------------------
# SHARDS
# -----------------------------------------------------------------------------


class Shard:
    """One file of ids, or of their sidecar, written as they come: memory holds none of it.

    The header comes last.
    """

    def __init__(self, path: Path):
        self.path, self.tokens = path, 0
        self.file = open(path, "wb")  # noqa: SIM115 (close or abandon ends it)
        self.file.write(bytes(1024))

    def write(self, ids: np.ndarray) -> None:
        self.file.write(ids.astype("<u2").tobytes())
        self.tokens += len(ids)

    def close(self, split: str) -> dict:
        """The shard's entry in the manifest."""
        header = np.zeros(256, "<i4")
        header[:3] = SHARD_MAGIC, SHARD_VERSION, self.tokens
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.close()
        entry = {"file": self.path.name, "split": split, "tokens": self.tokens}
        return {**entry, "sha256": sha256_file(self.path)}

    def abandon(self) -> None:
        """After an error: what waits to be written is dropped, and a full disk is not named again."""
        with contextlib.suppress(OSError):
            self.file.close()


class ShardWriter:
    """Writes `<prefix>_<split>_NNNNNN.bin` files of at most
    `shard_tokens` ids, with a sidecar where one is given.
    """

    def __init__(self, folder: Path, prefix: str, split: str, shard_tokens: int):
        self.folder, self.prefix, self.split, self.limit = folder, prefix, split, shard_tokens
        self.entries: list[dict] = []
        self.shard: Shard | None = None
        self.sidecar: Shard | None = None
        self.tokens = self.documents = self.bytes = self.replaced = 0
        self.first = self.last = ""

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error) -> None:
        for shard in (self.shard, self.sidecar):
            if shard is not None:
                shard.abandon()

    def add(self, ids: np.ndarray, sizes: np.ndarray | None, document: bytes) -> None:
        """A document: its ids, and the bytes that BOS and each id account for (a sidecar) or None."""
        key = digest(document).hex()
        self.first, self.last = self.first or key, key
        self.documents += 1
        self.bytes += len(document)
        self.replaced += getattr(document, "places", 0)
        self.tokens += len(ids) + 1
        ids = np.concatenate((np.array([BOS_ID], np.uint16), ids))
        while len(ids):
            if self.shard is None:
                name = f"{self.prefix}_{self.split}_{len(self.entries):06d}.bin"
                self.shard = Shard(self.folder / name)
                self.sidecar = Shard((self.folder / name).with_suffix(SIDECAR)) if sizes is not None else None
            room = self.limit - self.shard.tokens
            self.shard.write(ids[:room])
            if sizes is not None:
                self.sidecar.write(sizes[:room])
                sizes = sizes[room:]
            ids = ids[room:]
            if self.shard.tokens == self.limit:
                self.close_shard()

    def close_shard(self) -> None:
        if self.shard is not None:
            entry = self.shard.close(self.split)
            if self.sidecar is not None:
                sidecar = self.sidecar.close(self.split)
                entry |= {"sidecar": sidecar["file"], "sidecar_sha256": sidecar["sha256"]}
            self.entries.append(entry)
            self.shard = None

    def summary(self) -> dict:
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "first_document": self.first,
            "last_document": self.last,
        }


def sha256_file(path: Path | Piped) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()


def target_of(args: argparse.Namespace, name: str) -> Path:
    """The folder to write: `--out`, or this name below `--out-root`."""
    return Path(args.out) if args.out else Path(args.out_root) / name


@contextlib.contextmanager
def whole_folder(target: Path, force: bool):
    """Yields a hidden folder that becomes `target` when the block ends well, and vanishes when it does not.

    A disk that is full, read-only or gone is the user's to mend; what stood at `target` then still stands.
    """
    if target.exists() and not force:
        raise UserError(f"{target} exists; --force replaces it")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: --out names a folder")
    place = target.resolve()
    missing = [folder for folder in place.parents if not folder.exists()]
    above = place.parents[len(missing)]
    if not above.is_dir():
        raise UserError(f"{target}: {above} is a file, not a folder")
    working = place.parent / f".{place.name}.{os.getpid()}.partial"
    written = False

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_remains(place)
        working.mkdir()
        yield working
        put_in_place(working, place)
        written = True
    except OSError as error:
        raise UserError(f"{reason(error, target, place)}; nothing was written") from None
    finally:
        shutil.rmtree(working, ignore_errors=True)
        for folder in missing if not written else ():
            with contextlib.suppress(OSError):
                folder.rmdir()


def remove_remains(place: Path) -> None:
    """Deletes what a run that was killed left beside `place`, or gives back the folder that it had moved."""
    for left in place.parent.glob(f".{glob.escape(place.name)}.*"):
        named = re.fullmatch(re.escape(f".{place.name}.") + r"(\d+)\.(partial|old)", left.name)
        if named is None or is_running(int(named[1])):
            continue  # another folder's, or of a run that is at work
        if named[2] == "partial" or place.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(place)


def is_running(process: int) -> bool:
    """Whether another process of this machine has this number."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True


def put_in_place(working: Path, place: Path) -> None:
    """Renames the new folder; the old one is deleted when the new one stands, or else comes back."""
    old = place.parent / f".{place.name}.{os.getpid()}.old"
    if place.exists():
        place.rename(old)
    try:
        working.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def reason(error: OSError, target: Path, place: Path | None = None) -> str:
    """`file: what the system says`. The hidden folder and what is above it stand for `target`, at `place`."""
    named = Path(os.fsdecode(error.filename2 or error.filename or target))
    ours = place is not None and (
        named in (place, *place.parents) or any(part.startswith(f".{place.name}.") for part in named.parts)
    )
    return f"{target if ours else named}: {error.strerror or error}"


def build(corpus: Corpus, args: argparse.Namespace, target: Path) -> dict:
    """One pass over the validation text, one over the training
    text, one to write the validation documents kept.
    """
    scan = OverlapScan() if args.overlap != "off" else None
    held_out: dict[bytes, int] = {}
    for number, document in enumerate(bar(corpus.val(), "validation")):
        held_out.setdefault(digest(document), number)
        if scan:
            scan.add_validation(document)
    if not held_out:
        raise UserError(f"{corpus.name}: no validation documents")
    if scan:
        scan.close_validation()

    with (
        whole_folder(target, args.force) as folder,
        ShardWriter(folder, corpus.name, "train", args.shard_tokens) as train,
        ShardWriter(folder, corpus.name, "val", args.shard_tokens) as val,
    ):
        tokenizer = make_tokenizer(args, corpus, folder)
        skipped = write_training(corpus, tokenizer, train, held_out, scan)
        shares = scan.shares() if scan else np.zeros(0)
        mode = "report" if args.overlap == "drop" and corpus.fixed_val else args.overlap
        dropped = set(np.flatnonzero(shares > OVERLAP_LIMIT)) if mode == "drop" else set()
        text, spelled = write_validation(corpus, tokenizer, val, dropped)
        manifest = {
            "source": corpus.name,
            "source_notes": corpus.notes,
            "variant": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.path and Path(tokenizer.path).name,
            "tokenizer_sha256": tokenizer.sha256,
            "documents": {"train": train.documents, "val": val.documents},
            "tokens": {"train": train.tokens, "val": val.tokens},
            "bytes": {"train": train.bytes, "val": val.bytes},
            "val_bytes": val.bytes,
            "val_normalised_bytes": spelled,
            "val_text_sha256": text.hexdigest(),
            "train": train.summary(),
            "val": val.summary(),
            "overlap": {
                "mode": mode,
                "shingle_bytes": SHINGLE,
                "limit": OVERLAP_LIMIT,
                "share_found": scan.share_found(shares) if scan else None,
                "documents_dropped": len(dropped),
                "train_documents_equal_to_val_skipped": skipped,
            },
            **tokenizer.notes,
            **replacements(train.replaced, val.replaced),
            "shards": train.entries + val.entries,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def write_training(
    corpus: Corpus,
    tokenizer: ByteTokenizer | PieceTokenizer,
    train: ShardWriter,
    held_out: dict[bytes, int],
    scan: OverlapScan | None,
) -> int:
    """Writes and scans the training documents -> how many gave way to an equal one that is held out."""
    skipped = 0
    for number, document in enumerate(bar(corpus.train(), "training")):
        if (equal := held_out.get(digest(document))) is not None:
            if not corpus.fixed_val:
                raise UserError(
                    f"{corpus.name}: validation document {equal} equals training document {number}: "
                    "remove one of them"
                )
            skipped += 1
            continue
        train.add(*tokenizer.encode_sized(document), document)
        if scan:
            scan.add_training(document)

    train.close_shard()
    if not train.documents:
        raise UserError(f"{corpus.name}: no training documents")
    if scan:
        scan.flush()
    return skipped


def write_validation(
    corpus: Corpus, tokenizer: ByteTokenizer | PieceTokenizer, val: ShardWriter, dropped: set[int]
) -> tuple[TextHash, int]:
    """Writes the validation documents that are not dropped -> (hash of their text, bytes that ids spell)."""
    text, spelled = TextHash(), 0
    for number, document in enumerate(bar(corpus.val(), "validation")):
        if number in dropped:
            continue
        text.add(document)
        ids, sizes = tokenizer.encode_sized(document)
        val.add(ids, sizes, document)
        spelled += tokenizer.spelled_bytes(ids)

    val.close_shard()
    if not val.documents:
        raise UserError(
            f"{corpus.name}: all {len(dropped)} validation documents repeat training text (more than "
            f"{OVERLAP_LIMIT:.0%} of their {SHINGLE}-byte shingles): a score on them says nothing; hold out "
            "other text, or keep them with --overlap report"
        )
    return text, spelled


def replacements(train: int, val: int) -> dict:
    """What the manifest says where a text was changed, and a word to the user; nothing where none was."""
    if not train + val:
        return {}
    say(f"not UTF-8, now U+FFFD: {train} places of the training text, {val} of the validation text")
    return {"replacements": {"train": train, "val": val}}


def make_tokenizer(args: argparse.Namespace, corpus: Corpus, folder: Path) -> ByteTokenizer | PieceTokenizer:
    """The variant's tokenizer; a SentencePiece model travels with the shards."""
    if args.variant == "byte260":
        return ByteTokenizer()
    known = re.fullmatch(r"sp(\d+)(-caseops)?", args.variant, re.ASCII)
    if not known:
        raise UserError(f"--variant {args.variant}: byte260, sp<N> or sp<N>-caseops, for example sp1024")
    size, with_caseops = int(known[1]), bool(known[2])
    kind = CaseOpsTokenizer if with_caseops else PieceTokenizer
    if args.tokenizer:
        copied = folder / Path(args.tokenizer).name
        if not Path(args.tokenizer).is_file():
            raise UserError(f"--tokenizer {args.tokenizer}: no such file")
        shutil.copyfile(args.tokenizer, copied)
        tokenizer = kind(copied, args.variant)
    else:
        if not 300 <= size <= 65536:
            raise UserError(f"--variant {args.variant}: from sp300 (256 bytes and a few pieces) to sp65536")
        trained = train_pieces(corpus.train(), size, folder, with_caseops=with_caseops)
        tokenizer = kind(trained, args.variant)
    if tokenizer.vocab_size != size:
        raise UserError(f"--variant {args.variant}: the model has {tokenizer.vocab_size} ids")
    return tokenizer


# -----------------------------------------------------------------------------
# PUBLISHED SHARDS
# -----------------------------------------------------------------------------


def read_shard(path: Path) -> np.ndarray:
    """Memory-mapped ids of a shard, after a check of header and size."""
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", 256) if size >= 1024 else np.zeros(3)
    if header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION or size != 1024 + 2 * int(header[2]):
        raise UserError(
            f"{path}: not a shard (header {header[0]:.0f}, {header[1]:.0f}, {header[2]:.0f}; {size} bytes)"
        )
    return np.memmap(path, "<u2", "r", 1024, (int(header[2]),))


def piece_table(tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Look-up table of a SentencePieceProcessor: (all pieces' bytes
    joined, start of each id's, length of each id's).

    A piece's leading space is part of it; `ids_to_bytes` drops it after a BOS, where the dummy prefix stood.
    """
    pieces = []
    for i in range(tokenizer.vocab_size()):
        if tokenizer.is_byte(i):
            pieces.append(bytes([int(tokenizer.id_to_piece(i)[1:-1], 16)]))
        elif tokenizer.is_control(i) or tokenizer.is_unused(i):
            pieces.append(b"")
        else:
            pieces.append(tokenizer.id_to_piece(i).replace(SPACE, " ").encode())
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    return np.frombuffer(b"".join(pieces), np.uint8), np.cumsum(lengths) - lengths, lengths


def plain_pieces(path: str) -> PieceTokenizer:
    """The model that made published shards, whose pieces are the text's own bytes."""
    if not path:
        raise UserError("convert needs --tokenizer, the SentencePiece model that made the shards")
    tokenizer = PieceTokenizer(Path(path), "sp")
    try:
        caseops.operator_ids(tokenizer.model)
    except ValueError:  # it has no operators
        return tokenizer
    raise UserError(f"convert --tokenizer {path}: a CaseOps model, whose pieces are not the text's bytes")


def ids_to_bytes(
    ids: np.ndarray, table: tuple[np.ndarray, np.ndarray, np.ndarray], dummy_prefix: bool, after_bos: bool
) -> np.ndarray:
    """byte260 ids of the same text: BOS stays BOS, every other id becomes its bytes + 4."""
    joined, starts, lengths = table
    ids = np.asarray(ids, np.int64)
    is_bos = ids == BOS_ID
    begin, count = starts[ids], lengths[ids]
    if dummy_prefix and len(ids):
        fresh = np.concatenate(([after_bos], is_bos[:-1]))
        drop = fresh & (count > 0) & (joined[np.minimum(begin, len(joined) - 1)] == ord(" "))
        begin, count = begin + drop, count - drop
    room = np.where(is_bos, 1, count)
    ends = np.cumsum(room)
    out = np.full(int(ends[-1]) if len(ids) else 0, BOS_ID, np.uint16)
    where = np.arange(len(out)) - np.repeat(ends - room, room)
    text = np.repeat(~is_bos, room)
    out[text] = joined[(np.repeat(begin, room) + where)[text]].astype(np.uint16) + BYTE_OFFSET
    return out


class ShardText:
    """The `TextHash` of byte260 ids that come in blocks. Memory holds one document."""

    def __init__(self):
        self.hash, self.document, self.started = TextHash(), bytearray(), False

    def add(self, ids: np.ndarray) -> None:
        first, *others = np.split(ids, np.flatnonzero(ids == BOS_ID))
        self.document += self.text_of(first)

        for ids_of_one in others:
            self.close()
            self.document, self.started = bytearray(self.text_of(ids_of_one[1:])), True

    @staticmethod
    def text_of(ids: np.ndarray) -> bytes:
        return (ids - BYTE_OFFSET).astype(np.uint8).tobytes()

    def close(self) -> None:
        if self.started or self.document:  # ids before the first BOS are a document too
            self.hash.add(bytes(self.document))
        self.document, self.started = bytearray(), False

    def hexdigest(self) -> str:
        self.close()
        return self.hash.hexdigest()


SHARD_NAME = re.compile(r".*_(train|val)_(\d+)\.bin")


def published(source: Path) -> list[Path]:
    """The shards of a folder, training first. Refuses a folder that holds more than one text's ids."""
    if not source.is_dir():
        raise UserError(f"--from {source}: not a folder")
    paths = sorted(source.glob("*_train_*.bin")) + sorted(source.glob("*_val_*.bin"))
    if not paths:
        raise UserError(f"--from {source}: no *_train_*.bin or *_val_*.bin")
    sidecars = [*source.glob("*_bytes_*.bin"), *source.glob(f"*{SIDECAR}")]
    if sidecars:
        raise UserError(f"--from {source}: {sidecars[0].name} is a sidecar of CaseOps ids, no shard of text")

    numbers: dict[str, list[int]] = {"train": [], "val": []}
    for path in paths:
        parts = SHARD_NAME.fullmatch(path.name)
        if not parts:
            raise UserError(f"{path}: a copy? A shard is called NAME_train_000000.bin or NAME_val_000000.bin")
        numbers[parts[1]].append(int(parts[2]))
    for split, found in numbers.items():
        if len(set(found)) < len(found):
            raise UserError(f"--from {source}: two {split} shards of one number: two texts in one folder?")
        for before, after in itertools.pairwise(sorted(found)):
            if after > before + 1:
                say(f"{source}: no {split} shard {before + 1:06d}, though there is {after:06d}")
    return paths


def convert(args: argparse.Namespace) -> dict:
    """Published token shards -> byte shards of the same text, shard by shard, by a table."""
    source = Path(args.source)
    paths = published(source)
    if args.variant != "byte260":
        raise UserError(f"convert --variant {args.variant}: byte260 is what a table can make")
    tokenizer = plain_pieces(args.tokenizer)
    table = piece_table(tokenizer.model)
    target = target_of(args, f"{source.name}_byte260")
    entries, totals = [], {"train": [0, 0, 0], "val": [0, 0, 0]}
    text = ShardText()
    with whole_folder(target, args.force) as folder, contextlib.ExitStack() as opened:
        after_bos = {"train": False, "val": False}
        for path in bar(paths, "converting", len(paths), "shard"):
            split = "val" if "_val_" in path.name else "train"
            ids = read_shard(path)
            if len(ids) and int(ids.max()) >= len(table[2]):
                raise UserError(f"{path}: id {int(ids.max())} is outside the model's {len(table[2])} ids")
            shard = Shard(folder / path.name)
            opened.callback(shard.abandon)
            for start in range(0, len(ids), 1 << 20):
                block = ids[start : start + (1 << 20)]
                out = ids_to_bytes(block, table, tokenizer.dummy_prefix, after_bos[split])
                after_bos[split] = bool(block[-1] == BOS_ID)
                shard.write(out)
                if split == "val":
                    text.add(out)
                count = int((out == BOS_ID).sum())
                for i, value in enumerate((count, len(out), len(out) - count)):
                    totals[split][i] += value
            entries.append(shard.close(split))
        parts = {
            key: {split: totals[split][i] for split in totals}
            for i, key in enumerate(("documents", "tokens", "bytes"))
        }
        manifest = {
            "source": f"convert:{source.name}",
            "variant": "byte260",
            "vocab_size": 260,
            "tokenizer": None,
            "converted_with": sha256_file(Path(args.tokenizer)),
            **parts,
            "val_bytes": parts["bytes"]["val"],
            "val_text_sha256": text.hexdigest(),
            "shards": entries,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return {**manifest, "folder": str(target)}


def fetch_shards(args: argparse.Namespace) -> dict:
    """Published `fineweb_*` token shards, N training shards and all validation shards, unchanged."""
    hub = Hub(args)
    files = hub.files()
    folder_name = f"fineweb10B_{args.variant}"
    inside = sorted(path for path in files if f"/{folder_name}/" in f"/{path}" and path.endswith(".bin"))
    train = [path for path in inside if "_train_" in path][: args.shards]
    val = [path for path in inside if "_val_" in path]
    if len(train) < args.shards or not val:
        raise UserError(
            f"hub {args.hub_folder or args.repo}: {len(train)} training and {len(val)} validation shards of "
            f"{folder_name}, {args.shards} and 1 wanted"
            + ("; byte260 is not published: convert sp1024 shards" if args.variant == "byte260" else "")
        )
    models = [path for path in files if path.endswith(f"fineweb_{args.variant.removeprefix('sp')}_bpe.model")]
    target = target_of(args, folder_name)
    entries = []
    with whole_folder(target, args.force) as folder:
        for path in bar(train + val + models[:1], "fetching", None, "file"):
            local, name = hub.get(path, files[path]), Path(path).name
            shutil.copyfile(local, folder / name)
            if name.endswith(".bin"):
                entries.append(
                    {
                        "file": name,
                        "split": "val" if path in val else "train",
                        "tokens": len(read_shard(folder / name)),
                        "sha256": sha256_file(folder / name),
                    }
                )
        tokens = {
            split: sum(entry["tokens"] for entry in entries if entry["split"] == split)
            for split in ("train", "val")
        }
        manifest = {
            "source": "fineweb",
            "source_notes": {"repo": args.repo, "published_shards": True},
            "variant": args.variant,
            "tokenizer": models and Path(models[0]).name or None,
            "tokens": tokens,
            "shards": entries,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return {**manifest, "folder": str(target)}


# -----------------------------------------------------------------------------
# COMMAND LINE
# -----------------------------------------------------------------------------

SOURCES = {
    "stdlib": source_stdlib,
    "files": source_files,
    "python": source_python,
    "python_extended": source_python_extended,
    "tinyshakespeare": source_tinyshakespeare,
    "markov2": source_markov2,
    "fineweb": source_fineweb,
}


def shared_options() -> argparse.ArgumentParser:
    """Options of every source."""
    shared = argparse.ArgumentParser(add_help=False)
    option = shared.add_argument
    option("--variant", default="byte260", help="byte260, sp<N> or sp<N>-caseops, for example sp1024")
    option("--tokenizer", default="", help="a .model to use instead of training one")
    option("--out", default="", help="folder to write (default: OUT_ROOT/<source>_<variant>)")
    option("--out-root", default="data/datasets", help="where folders go by default")
    option("--shard-tokens", type=int, help=f"ids a shard holds at most (default: {SHARD_TOKENS:,})")
    option("--val-share", type=float, help="share of documents held out by hash (default: 0.02)")
    option(
        "--overlap",
        choices=("drop", "report", "off"),
        help="validation documents that repeat training text: drop (default), only report, or no scan; "
        "the contest's are never dropped",
    )
    option("--seed", type=int, help="of the shuffle, and of markov2 (default: 42)")
    option("--force", action="store_true", help="replace the folder if it exists")
    return shared


def reading_options(errors: str) -> argparse.ArgumentParser:
    """Options of a source that reads files; `errors` is what it does unasked."""
    reads = argparse.ArgumentParser(add_help=False)
    reads.add_argument(
        "--errors",
        default=errors,
        choices=("strict", "replace"),
        help="what is not UTF-8: refused (byte260 keeps the bytes of a text file), or U+FFFD, counted "
        "in the manifest (default: %(default)s)",
    )
    return reads


def add_files_options(files: argparse.ArgumentParser) -> None:
    files.add_argument(
        "train",
        nargs="+",
        metavar="TRAIN",
        help=f"{ACCEPTED}, a folder of them, a pattern such as 'parts/*.jsonl', or - for standard input",
    )
    option = files.add_argument
    option("--val", nargs="+", default=[], help="the validation text, named in the same way")
    option("--field", default="text", help="the field of JSON lines, the column of Parquet")
    option("--train-bytes", type=int, default=0, help="stop after the document that passes this; 0 = all")
    option("--val-bytes", type=int, default=0, help="the same for the validation text")
    option(
        "--val-tail",
        type=int,
        default=0,
        help="hold out the last documents of TRAIN, this many bytes: tune on them",
    )
    option("--no-shuffle", action="store_true", help="keep the order of the files")


def add_fineweb_options(fineweb: argparse.ArgumentParser) -> None:
    option = fineweb.add_argument
    option("--shards", type=int, default=0, help="fetch this many published token shards as they are")
    option("--documents", action="store_true", help="tokenize the published documents (default)")
    option("--train-bytes", type=int, default=0, help="stop after the document that passes this; 0 = all")
    option(
        "--val-documents",
        type=int,
        default=VAL_DOCUMENTS_FINEWEB,
        help="the first documents, held out (default, the contest's: %(default)s)",
    )
    option("--repo", default=FINEWEB_REPO, help="dataset repository on the hub (default: %(default)s)")
    option("--revision", default="main", help="of the repository (default: %(default)s)")
    option("--hub-folder", default="", help="a local folder laid out like the repository")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(
        dest="source_name",
        metavar="SOURCE",
        help="one of the above (default: stdlib); SOURCE --help lists its options",
    )
    shared, reads = shared_options(), reading_options("strict")
    # Libraries of Python hold files in other encodings, to test these: no reason to stop.
    lenient = reading_options("replace")
    for name in ("stdlib", "python_extended"):
        commands.add_parser(name, parents=[shared, lenient])
    python = commands.add_parser("python", parents=[shared, lenient])
    python.add_argument("path", help="a folder")

    add_files_options(commands.add_parser("files", parents=[shared, reads]))
    shakespeare = commands.add_parser("tinyshakespeare", parents=[shared])
    shakespeare.add_argument("--path", "--file", dest="file", default="", help="a local copy of the file")
    markov = commands.add_parser("markov2", parents=[shared])
    markov.add_argument("--bytes", type=int, default=1 << 20, help="of the stream (default: %(default)s)")
    add_fineweb_options(commands.add_parser("fineweb", parents=[shared, reads]))
    converter = commands.add_parser("convert", parents=[shared])
    converter.add_argument("--from", dest="source", required=True, help="a folder of published shards")

    if not argv or argv[0].startswith("-") and not {"-h", "--help"} & set(argv):
        argv = ["stdlib", *argv]
    return parser.parse_args(argv)


def settle(args: argparse.Namespace) -> None:
    """Fills in the defaults of what was not given.

    Raises:
        UserError: a number out of range, or an option that this source has no use for.
    """
    defaults = {"shard_tokens": SHARD_TOKENS, "val_share": 0.02, "overlap": "drop", "seed": 42}
    given = [name for name in defaults if getattr(args, name) is not None]
    copier = "convert" if args.source_name == "convert" else "--shards" if getattr(args, "shards", 0) else ""
    if copier and given:
        option = f"--{given[0].replace('_', '-')}"
        raise UserError(f"{option}: {copier} keeps documents, order and shards as published")
    if copier == "--shards" and args.documents:
        raise UserError("--documents --shards: one of both")
    if copier == "--shards" and args.train_bytes:
        raise UserError("--train-bytes: --shards fetches whole shards")

    if "val_share" in given and (getattr(args, "val", None) or getattr(args, "val_tail", 0)):
        raise UserError("--val-share: --val or --val-tail says what is held out")
    if args.tokenizer and args.variant == "byte260" and args.source_name != "convert":
        raise UserError(f"--tokenizer {args.tokenizer}: byte260 has none; --variant sp<N> is missing")

    for name in defaults.keys() - {*given}:
        setattr(args, name, defaults[name])
    if args.shard_tokens < 1:
        raise UserError(f"--shard-tokens {args.shard_tokens}: at least 1")
    if not 0 < args.val_share < 1:
        raise UserError(f"--val-share {args.val_share}: between 0 and 1")
    for name in ("train_bytes", "val_bytes", "val_tail", "val_documents", "shards"):
        if getattr(args, name, 0) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 0")


def refuse(message: str) -> int:
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    start = time.perf_counter()
    try:
        settle(args)
        if args.source_name == "convert":
            manifest = convert(args)
        elif args.source_name == "fineweb" and args.shards:
            manifest = fetch_shards(args)
        else:
            target = target_of(args, f"{args.source_name}_{args.variant}")
            if target.exists() and not args.force:
                raise UserError(f"{target} exists; --force replaces it")
            manifest = {**build(SOURCES[args.source_name](args), args, target), "folder": str(target)}
    except UserError as error:
        return refuse(str(error))
    except OSError as error:
        return refuse(f"{reason(error, Path(args.out or args.out_root))}; nothing was written")
    except MemoryError:
        return refuse(f"{OUT_OF_MEMORY}; nothing was written")
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    overlap = manifest.get("overlap", {})
    print(
        f"{manifest['folder']}: "
        + " ".join(
            f"{key}:{manifest[key]['train']}+{manifest[key]['val']}"
            for key in ("documents", "tokens", "bytes")
            if key in manifest
        )
        + (
            f" overlap:{overlap['share_found']:.4f} dropped:{overlap['documents_dropped']}"
            if overlap.get("share_found") is not None
            else ""
        )
        + f" seconds:{time.perf_counter() - start:.1f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
