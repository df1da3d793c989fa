"""Documents of files: text, JSON lines and Parquet, as they are or packed, read as a stream.

    names of the command line -> `sources` -> files -> `documents` -> one document after another, as bytes

A file that is damaged, cut off or not UTF-8 raises UserError, which names the file and the place. So nobody
takes half a text for the whole, or a changed text for the one that was meant. `data/README.md` says which
files are read, and how.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

KINDS = {".txt": "text", ".jsonl": "lines", ".parquet": "parquet"}
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
ACCEPTED = ".txt, .jsonl (each also as .gz or .zst) or .parquet"
STDIN = "-"
MARK = "\ufeff"  # a byte order mark: before JSON it is no text
REPLACEMENT = "\ufffd"
SURROGATE = re.compile("[\ud800-\udfff]")
PART = 512  # packed bytes that are unpacked at a time: few, since four may stand for 128 kB of text
BUFFER = 1 << 20  # unpacked bytes that wait to be read
# A window of 2 GiB, as `zstd --long=31` writes for large corpora; the library's own limit is 128 MiB.
ZSTD_WINDOW = 1 << 31

REPLACE = "--errors replace writes U+FFFD in its place"
OUT_OF_MEMORY = (
    "out of memory: a document is held whole, several times over, and without --no-shuffle 64 MB of them: "
    "cut long texts into documents (JSON lines)"
)


class UserError(Exception):
    """A mistake in the call or in an input; printed as one line, exit code 2."""


class Damaged(Exception):
    """What a packed file holds is not what was packed."""


@dataclass(frozen=True)
class Reading:
    """How files become documents.

    `field` holds the text of a line or a row. `errors` is "strict" or "replace", for what is not UTF-8.
    With `any_bytes` a text file needs no encoding: byte260 has an id for every byte.
    """

    field: str = "text"
    errors: str = "strict"
    any_bytes: bool = False


class Replaced(bytes):
    """A document with U+FFFD where its file was not UTF-8, at `places` of them."""

    places = 0


def with_places(document: bytes, places: int) -> bytes:
    if places:
        document = Replaced(document)
        document.places = places
    return document


def say(note: str) -> None:
    print(f"note: {note}", file=sys.stderr)


# -----------------------------------------------------------------------------
# NAMES -> FILES
# -----------------------------------------------------------------------------


class Piped:
    """Standard input, kept in a file without a name, since several passes read it.

    The system takes such a file back however the process ends.
    """

    name = STDIN

    def __init__(self, stream: BinaryIO):
        try:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
            shutil.copyfileobj(stream, self.file, BUFFER)
            self.file.flush()
        except OSError as error:
            with contextlib.suppress(OSError, AttributeError):
                self.file.close()  # what waits to be written is dropped
            folder = f"it is kept in {tempfile.gettempdir()} for a while, or where TMPDIR says"
            raise UserError(f"standard input: {error.strerror or error}; {folder}") from None

    def __str__(self) -> str:
        return "standard input"

    def open(self, mode: str = "rb") -> BinaryIO:
        self.file.seek(0)
        return os.fdopen(os.dup(self.file.fileno()), mode)


def sources(names: list[str]) -> list[Path | Piped]:
    """The files that are named: one by one, by folder, by a pattern such as `data/*.jsonl`, `-` for stdin."""
    found: list[Path | Piped] = []
    for name in names:
        path = Path(name)
        if name == STDIN:
            if any(isinstance(source, Piped) for source in found):
                raise UserError("- is named twice: standard input can be read once")
            if sys.stdin is None:
                raise UserError("-: standard input is closed")
            found.append(Piped(sys.stdin.buffer))
        elif path.is_dir():
            found += of_a_kind(name, in_folder(path))
        elif path.is_file():
            found.append(path)
        elif path.exists():
            raise UserError(f"{path}: not a regular file; pipe its text into `prepare.py files -`")
        elif glob.has_magic(name):
            matches = sorted(Path(match) for match in glob.glob(name, recursive=True))
            if not matches:
                raise UserError(f"{name}: no such file, and none of this pattern")
            found += of_a_kind(name, [match for match in matches if match.is_file()])
        else:
            raise UserError(f"{path}: no such file")
    return found


def in_folder(folder: Path) -> list[Path]:
    """Files below a folder in the order of their paths, without hidden ones."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(found)


def of_a_kind(name: str, paths: list[Path]) -> list[Path]:
    """Those that can be read, where the user named a folder or a pattern and not each file."""
    known = [path for path in paths if by_name(path.name)[1] in KINDS.values()]
    others = {"".join(path.suffixes[-2:]) or path.name for path in {*paths} - {*known}}
    if not known:
        raise UserError(f"{name}: no file that ends in {ACCEPTED}")
    passed = f"; passed over: {' '.join(sorted(others)[:8])}" if others else ""
    say(f"{name}: {len(known)} file{'s' if len(known) > 1 else ''}{passed}")

    # a.jsonl beside a.jsonl.gz: the text would be there twice, and nobody would notice.
    forms: dict[Path, Path] = {}
    for path in known:
        bare = path.with_suffix("") if path.suffix.lower() in PACKINGS else path
        bare = bare.with_suffix("")
        if bare in forms:
            raise UserError(f"{forms[bare]} and {path.name}: one text in two forms? Name the files to read")
        forms[bare] = path
    return known


def by_name(name: str) -> tuple[str, str]:
    """(packing, kind) that the endings of a name say; "" where they say nothing."""
    stem, ending = os.path.splitext(name.lower())
    packing = PACKINGS.get(ending, "")
    if packing:
        _, ending = os.path.splitext(stem)
        # What C4 and Dolma call .json.gz is JSON lines.
        inside = {**KINDS, ".json": "lines", ".parquet": "packed twice", ".tar": "an archive"}
        return packing, inside.get(ending, "")
    return packing, KINDS.get(ending, "")


def by_content(file: BinaryIO) -> tuple[str, str]:
    """The same from the first bytes of what has no name."""
    head = file.peek(4)[:4]
    if head[:2] == b"\x1f\x8b":
        return "gzip", ""
    if head == b"\x28\xb5\x2f\xfd" or head[1:] == b"\x2a\x4d\x18":  # a frame, or one to be skipped
        return "zstd", ""
    return "", "parquet" if head == b"PAR1" else ""


# -----------------------------------------------------------------------------
# FILES -> DOCUMENTS
# -----------------------------------------------------------------------------


def documents(source: Path | Piped, reading: Reading) -> Iterator[bytes]:
    """Documents of a file: a text file is one, of JSON lines and of Parquet each line or row."""
    try:
        with source.open("rb") as file:
            yield from documents_of(file, source, reading)
    except MemoryError:
        raise UserError(f"{source}: {OUT_OF_MEMORY}") from None
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from None


def documents_of(file: BinaryIO, source: Path | Piped, reading: Reading) -> Iterator[bytes]:
    packing, kind = by_content(file) if isinstance(source, Piped) else by_name(source.name)
    if not (packing or kind or isinstance(source, Piped)):
        raise UserError(f"{source}: {ACCEPTED} expected")
    if kind and kind not in KINDS.values():
        raise UserError(f"{source}: {kind}, unpack it first: {ACCEPTED} expected")
    if kind == "parquet":
        yield from rows(file, str(source), reading)
        return

    stream = unpacked(file, packing, str(source)) if packing else file
    if not kind:
        kind = "lines" if first_character(stream) == b"{" else "text"
        form = {"lines": "JSON lines, as it begins with {", "text": "text, one document"}
        say(f"{source}: read as {form[kind]}")
    if kind == "text":
        yield whole_text(stream.read(), str(source), reading)
    else:
        yield from lines(stream, str(source), reading)


def first_character(stream: BinaryIO) -> bytes:
    return stream.peek(1).removeprefix(MARK.encode()).lstrip()[:1]


def whole_text(raw: bytes, name: str, reading: Reading) -> bytes:
    """A text file: the very bytes, where they are UTF-8 or need not be."""
    if reading.any_bytes and reading.errors == "strict":
        return raw
    text, places = decoded(raw, name, 0, reading)
    return with_places(text.encode(), places) if places else raw


def decoded(raw: bytes, name: str, start: int, reading: Reading) -> tuple[str, int]:
    """(text, places that were replaced); `start` is where the bytes stand in their file."""
    try:
        return raw.decode(), 0
    except UnicodeDecodeError as error:
        if reading.errors == "strict":
            byte, offset = f"byte 0x{raw[error.start]:02x}", start + error.start
            guess = " (UTF-16, it seems)" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
            raise UserError(f"{name}: {byte} at offset {offset} is not UTF-8{guess}; {REPLACE}") from None
    text = raw.decode(errors="replace")
    return text, text.count(REPLACEMENT) - raw.count(REPLACEMENT.encode())


def lines(stream: BinaryIO, name: str, reading: Reading) -> Iterator[bytes]:
    """A JSON object a line; lines of white space count for nothing."""
    start = 0
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield text_of_line(line, f"{name}: line {number}", start, reading)
        start += len(line)


def text_of_line(line: bytes, place: str, start: int, reading: Reading) -> bytes:
    written, places = decoded(line, place, start, reading)
    try:
        value = json.loads(written.removeprefix(MARK))
    except RecursionError:
        raise UserError(f"{place} is not a JSON object with a text (nested too deeply)") from None
    except ValueError as error:
        end = "" if line.endswith(b"\n") else "; the file ends there, as one that is cut off"
        raise UserError(f"{place} is not a JSON object with a text ({error}){end}") from None
    if not isinstance(value, dict):
        raise UserError(f"{place} is not a JSON object with a text, but {type(value).__name__}")
    if reading.field not in value:
        raise UserError(f"{place} has no field {reading.field!r}{known_fields(value)}")

    text = value[reading.field]
    if not isinstance(text, str):
        raise UserError(f"{place}: field {reading.field!r} is no text, but {type(text).__name__}")
    try:
        return with_places(text.encode(), places)
    except UnicodeEncodeError as error:
        if reading.errors == "strict":
            half = f"{ascii(text[error.start])} at character {error.start} of the text"
            raise UserError(f"{place}: {half} is a lone surrogate, not UTF-8; {REPLACE}") from None
    text, more = SURROGATE.subn(REPLACEMENT, text)
    return with_places(text.encode(), places + more)


def known_fields(names) -> str:
    """What to say where a field is missing: names are what there is instead."""
    names = [ascii(name) for name in names]
    return f"; --field takes one of {', '.join(names[:8])}" if names else ""


def rows(file: BinaryIO, name: str, reading: Reading) -> Iterator[bytes]:
    """A column of text of a Parquet file, a few rows at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{name}: .parquet needs pyarrow: pip install -r requirements-parquet.txt") from None
    try:
        # Without pre_buffer a group of rows is read in pieces, not as a whole.
        table = pyarrow.parquet.ParquetFile(
            file, pre_buffer=False, buffer_size=BUFFER, page_checksum_verification=True
        )
        schema = table.schema_arrow
        if reading.field not in schema.names:
            raise UserError(f"{name} has no column {reading.field!r}{known_fields(schema.names)}")
        kind = schema.field(reading.field).type
        if str(kind) not in ("string", "large_string", "string_view", "binary", "large_binary"):
            raise UserError(f"{name}: column {reading.field!r} is no text, but {kind}")

        # As bytes: Arrow does not check that a text is UTF-8.
        batches = table.iter_batches(64, columns=[reading.field], use_threads=False)
        texts = (text.as_py() for batch in batches for text in batch.column(0).cast(pyarrow.large_binary()))
        for number, raw in enumerate(texts, 1):
            if raw is None:
                raise UserError(f"{name}: row {number} has no text (null)")
            text, places = decoded(raw, f"{name}: row {number}", 0, reading)
            yield with_places(text.encode(), places)
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: not a whole Parquet file ({why})") from None


# -----------------------------------------------------------------------------
# PACKED FILES
# -----------------------------------------------------------------------------


class ZstdFrames:
    """All frames of a .zst, each to its end. zstandard's own readers give what they have of a frame that is
    cut off, without a word, and stop after the first frame.
    """

    def __init__(self, file: BinaryIO, name: str):
        try:
            import zstandard
        except ImportError:
            needed = "pip install -r requirements.txt"
            raise UserError(f"{name}: .zst needs the zstandard package: {needed}") from None
        self.error, self.file = zstandard.ZstdError, file
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        self.frame = None
        self.packed, self.text = b"", memoryview(b"")

    def read1(self, size: int) -> bytes:
        """At least one byte of text; b"" at the end of the last frame, EOFError inside a frame."""
        while not len(self.text):
            packed = self.packed or self.file.read(PART)
            if not packed and self.frame is not None:
                raise EOFError
            if not packed:
                return b""
            self.frame = self.frame or self.decompressor.decompressobj()
            try:
                self.text = memoryview(self.frame.decompress(packed))
            except self.error as error:
                if "memory" in str(error):
                    raise MemoryError(str(error)) from None
                raise Damaged(error) from None
            self.packed = b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        part, self.text = self.text[:size], self.text[size:]
        return bytes(part)


class Unpacked(io.RawIOBase):
    """Text of a packed file; where the file is cut off or damaged, an error says after how much text."""

    def __init__(self, source: ZstdFrames | gzip.GzipFile, name: str):
        self.source, self.name, self.count = source, name, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            text = self.source.read1(len(buffer))
        except EOFError:
            raise UserError(f"{self.name}: truncated after {self.count} bytes of text") from None
        except (Damaged, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{self.name}: damaged after {self.count} bytes of text ({error})") from None
        buffer[: len(text)] = text
        self.count += len(text)
        return len(text)


def unpacked(file: BinaryIO, packing: str, name: str) -> io.BufferedReader:
    if not file.peek(1):  # gzip takes an empty file for one that holds an empty text
        raise UserError(f"{name}: truncated after 0 bytes of text (the file is empty)")
    source = gzip.GzipFile(fileobj=file, mode="rb") if packing == "gzip" else ZstdFrames(file, name)
    return io.BufferedReader(Unpacked(source, name), BUFFER)
