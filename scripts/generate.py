"""Writes text with an artifact of any script of the family.

    python scripts/generate.py ARTIFACT "It was a dark"       256 ids that go on from a text, the likeliest
    python scripts/generate.py ARTIFACT "It was" --temperature 0.8 --top-p 0.95 --seed 7 --samples 3
    python scripts/generate.py ARTIFACT --file prompt.txt --stop $'\\n\\n'
    some-command | python scripts/generate.py ARTIFACT -      goes on from standard input
    python scripts/generate.py ARTIFACT                       begins a document of its own

The script is the one that the artifact names, else the trunk; `--script` names another (a record, a path, `.`
for the trunk, train_gpt_mlx.py for Metal). Text goes to stdout as soon as it is settled, numbers to stderr.
A text ends after --max-new-tokens ids, before a --stop text, or where the model ends its document.

Where the model has draft heads (DRAFT), a pass reads the newest id and drafts after it, and keeps those that
the model picks too. Model and heads draw with the same noise at the same place of a text, so drafts save
passes and never change a text, at any temperature. A script that drafts by itself (SGJM's `Generator`: trees
of drafts by heads and by what followed a like text before) writes the same text with drafts and without where
the likeliest id is taken, and at a temperature draws from the same distribution, other ids with drafts than
without. Exit codes: 0 fine, 2 misuse, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import codec
import family
import numpy as np
from carry import parts_of
from codec import BOS_ID, BYTE_VOCAB
from family import Misuse

EOS_ID = 2
BYTES = 256, BYTE_VOCAB  # vocabularies of bytes, the second with special ids before them
INTERRUPTED = 128 + 2  # what a shell makes of SIGINT
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


# -----------------------------------------------------------------------------
# IDS
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """How an id is picked of logits: the best, or a draw at a temperature from the likeliest ids."""

    seed: int = 0
    temperature: float = 0.0
    top_p: float = 1.0

    def pick(self, logits: np.ndarray, place: int) -> int:
        """The id at a place of the text, of logits (V,).

        A draw is the best of the logits with noise (Gumbel). The noise is that of the place, whoever draws:
        what a drafter thinks likely comes true, and a text does not depend on drafts (drafter-invariant
        speculation: Daliri et al. 2025).
        """
        if self.temperature:
            noise = np.random.default_rng([self.seed, place]).gumbel(size=len(logits))
            logits = logits / self.temperature
            if self.top_p < 1:
                logits = np.where(nucleus(logits, self.top_p), logits, -np.inf)
            logits = logits + noise
        return int(logits.argmax())


def nucleus(logits: np.ndarray, share: float) -> np.ndarray:
    """Whether an id is one of the fewest that have this share of the probability: (V,) bool.

    Top-p sampling, Holtzman et al. 2020. The likeliest id is always one of them.
    """
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    likelier = np.cumsum(p[order]) - p[order]

    kept = np.zeros(len(p), bool)
    kept[order] = likelier < share
    return kept


class Writer:
    """Goes on from a prompt, an id at a time: `for token in writer` ends after `count` ids.

    script: a module of the family, torch or MLX. `passes` counts the model's.
    """

    def __init__(self, script, model, prompt: list[int], law: Law, count: int, speculate: bool = True):
        self.script, self.model, self.law, self.count = script, model, law, count
        self.prompt = prompt
        self.reader = script.stream(model)
        self.heads = getattr(model, "draft", None) if speculate else None
        self.passes = 0

    def __iter__(self) -> Iterator[int]:
        reader = self.reader
        for token in self.prompt:
            reader.push(token)
        left = self.count
        while left:
            drafts = self.drafts()[: left - 1]
            # a mixture gives a row once the draft before it is pushed
            rows = reader.ahead(drafts) if drafts else [reader.logprobs()]
            self.passes += 1
            for draft, logprobs in zip([*drafts, None], rows):
                token = self.law.pick(logprobs, len(reader.ids))
                reader.push(token)
                left -= 1
                yield token
                if token != draft:
                    break

    def drafts(self) -> list[int]:
        """The heads' guesses after the newest id, which no pass has read: from the position before."""
        reader, model, found = self.reader, self.model, [self.reader.ids[-1]]
        state = reader.states.get(len(reader.ids) - 2) if self.heads is not None else None
        while state is not None and len(found) <= model.args.draft:
            state, logits = self.guess(state, found[-1])
            found.append(self.law.pick(logits, len(reader.ids) + len(found) - 1))
        return found[1:]

    def guess(self, state, token: int) -> tuple:
        """A link of the heads: (its state, logits (V,)) after `token`, from the state before."""
        if not hasattr(self.script, "torch"):
            state = self.heads(state, self.model.embed(self.script.mx.array(token)))
            return state, np.array(self.model.head(state))
        torch = self.script.torch
        with torch.no_grad():
            state = self.heads(state, self.model.embed(torch.tensor(token, device=state.device)))
            return state, self.model.head(state).cpu().numpy()


class Decoder:
    """The same by the script's own `Generator`, which settles several ids a pass."""

    def __init__(self, script, model, prompt: list[int], law: Law, count: int, speculate: bool = True):
        self.prompt, self.law, self.count = prompt, law, count
        self.own = script.Generator(model, prompt, law.seed, speculate, law.temperature, law.top_p)

    def __iter__(self) -> Iterator[int]:
        for settled in self.own.grow(self.count):  # a character an id
            yield from map(ord, settled)

    @property
    def passes(self) -> int:
        return int(self.own.read[0])


# -----------------------------------------------------------------------------
# TEXT
# -----------------------------------------------------------------------------


@dataclass
class Alphabet:
    """What ids stand for: `table` has the bytes of each, none for special ones; `ends` end a document."""

    table: list[bytes]
    ends: set[int]
    pieces: codec.Pieces | None = None  # byte260 has none
    prefixed: bool = False  # a space is put before a text, and no part of it

    @classmethod
    def of_bytes(cls, vocab: int) -> Alphabet:
        special = vocab - 256
        return cls([b""] * special + [bytes([i]) for i in range(256)], {BOS_ID, EOS_ID} if special else set())

    @classmethod
    def of_pieces(cls, pieces: codec.Pieces) -> Alphabet:
        model, table = pieces.model, []
        for i in range(model.vocab_size()):
            piece = model.id_to_piece(i)
            if model.is_byte(i):
                table.append(bytes([int(piece[1:-1], 16)]))  # <0x41>
            elif model.is_control(i):
                table.append(b"")
            else:
                piece = model.decode([i]) if model.is_unknown(i) else piece.replace("\u2581", " ")
                table.append(piece.encode())
        ends = {BOS_ID, model.bos_id(), model.eos_id()} - {-1}
        first = model.id_to_piece(model.encode("a")[0])
        return cls(table, ends, pieces, first.startswith("\u2581"))

    def ids(self, text: bytes) -> list[int]:
        """A prompt's ids, BOS in front where there is one.

        Raises:
            Misuse: the text is not UTF-8, and the ids are pieces; or there is neither text nor BOS.
        """
        if self.pieces is None:
            special = len(self.table) - 256
            if not special and not text:
                raise Misuse("this artifact has no id that begins a document: a prompt is needed")
            return [BOS_ID] * (special > 0) + [byte + special for byte in text]
        try:
            return [BOS_ID, *self.pieces.encode(text.decode()).tolist()]
        except UnicodeDecodeError as error:
            why = f"not UTF-8 at byte {error.start}; this artifact reads text only"
            raise Misuse(f"the prompt is {why}") from None

    def joined(self, ids: list[int]) -> bytes:
        return b"".join(self.table[i] for i in ids)

    def text(self, joined: bytes) -> bytes:
        """The text that ids of these bytes spell."""
        if self.prefixed:
            joined = joined.removeprefix(b" ")
        if self.pieces is None or self.pieces.kind != "caseops":
            return joined
        # bytes that are no UTF-8 pass as lone surrogates
        written = joined.decode("utf-8", "surrogateescape")
        return codec.caseops.decode(written, strict=False).encode("utf-8", "surrogateescape")


class Screen:
    """Standard output: to a pipe bytes as they are, to a terminal whole characters and no control codes."""

    def __init__(self, file, terminal: bool):
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace") if terminal else None

    def put(self, data: bytes, last: bool = False) -> None:
        if self.decoder is not None:
            text = self.decoder.decode(data, last)
            # an escape code of a byte model is noise, but a terminal would obey it
            data = CONTROLS.sub("\ufffd", text).encode()
        self.file.write(data)
        self.file.flush()

    def end(self, line: bool) -> None:
        """After a text; `line`: a pipe's ends in a line feed, too, as a terminal's always does."""
        self.put(b"", last=True)
        if line or self.decoder is not None:
            self.put(b"\n")


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Ctrl-C waits for the end of what is inside."""
    kept: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: kept.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        for number in kept[:1]:
            signal.raise_signal(number)


class Page:
    """A text that grows, up to the first of the stop texts; `put` is handed what is settled of it."""

    def __init__(self, stops: list[bytes], put: Callable[[bytes], None]):
        self.stops, self.put = stops, put
        self.text, self.shown = b"", 0

    def grow(self, text: bytes) -> bool:
        """The whole text so far; True where a stop text is in it, which ends it."""
        found = []
        for stop in self.stops:  # none was in the text before
            at = text.find(stop, max(0, len(self.text) - len(stop) + 1))
            found += [at] * (at >= 0)
        self.text = text[: min(found)] if found else text
        self.show(0 if found else self.may_stop())
        return bool(found)

    def may_stop(self) -> int:
        """Bytes at the end with which a stop text may begin."""
        lengths = (n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(lengths, default=0)

    def show(self, held: int = 0) -> None:
        with unbroken():  # what is shown is counted
            first, self.shown = self.shown, max(self.shown, len(self.text) - held)
            if self.shown > first:
                self.put(self.text[first : self.shown])


# -----------------------------------------------------------------------------
# THE COMMAND
# -----------------------------------------------------------------------------


@dataclass
class Sample:
    """A text and how it was made. `ended`: by what - length, stop, document or interrupt."""

    seed: int
    ids: list[int] = field(default_factory=list)
    text: bytes = b""
    ended: str = "length"
    passes: int = 0
    seconds: float = 0.0  # the prompt's time in it

    def numbers(self) -> dict:
        return {"ids": len(self.ids), "bytes": len(self.text), "passes": self.passes,
                "ids_per_pass": round(len(self.ids) / max(self.passes, 1), 2),
                "bytes_per_pass": round(len(self.text) / max(self.passes, 1), 2),
                "bytes_per_second": round(len(self.text) / max(self.seconds, 1e-9), 1),
                "seed": self.seed, "ended": self.ended}

    def line(self) -> str:
        return " ".join(f"{name}:{value}" for name, value in self.numbers().items())

    def json(self) -> str:
        text = self.text.decode(errors="replace")
        return json.dumps(self.numbers() | {"seconds": self.seconds, "made": self.ids, "text": text})


def write(writer: Writer | Decoder, alphabet: Alphabet, page: Page) -> Sample:
    """One text, shown on `page` as it grows; Ctrl-C ends it and keeps what is there."""
    made = Sample(writer.law.seed)
    joined = alphabet.joined(writer.prompt)
    skipped, began = len(alphabet.text(joined)), time.perf_counter()
    try:
        for token in writer:
            if token in alphabet.ends:
                made.ended = "document"
                break
            made.ids.append(token)
            joined += alphabet.table[token]
            if page.grow(alphabet.text(joined)[skipped:]):
                made.ended = "stop"
                break
    except KeyboardInterrupt:
        made.ended = "interrupt"

    page.show()
    made.text, made.passes, made.seconds = page.text, writer.passes, time.perf_counter() - began
    return made


def header_of(artifact: str) -> dict | None:
    """What an artifact says of itself; None of one that cannot be read, of which its script says why."""
    try:
        header, _ = parts_of(Path(artifact).read_bytes())
    except (OSError, ValueError, zlib.error):
        return None
    return header if isinstance(header, dict) else None


def named_script(header: dict) -> Path | None:
    """The script of the record that made an artifact; None where the header names none of them."""
    word, *_ = [*str(header.get("script", "")).split(), ""]  # "LLM-JEPA, script 0123abcd", or a folder's name
    name = re.sub(r"^\d{4}-\d\d-\d\d_|\W", "", word)
    folders = {folder.name.partition("_")[2]: folder for folder in family.records()}
    return family.find_script(folders[name]) if name in folders else None


def open_script(path: Path):
    """A script as a module.

    Raises:
        Misuse: it is no script of the family.
    """
    if path.suffix != ".py":
        raise Misuse(f"--script {path}: no Python file")
    try:
        script = family.load_script(path)
    except ModuleNotFoundError:  # `command` says what to install
        raise
    except (ImportError, SyntaxError) as error:
        raise Misuse(f"--script {path}: cannot be imported ({error})") from None
    for name in ("load", "stream"):
        if not callable(getattr(script, name, None)):
            raise Misuse(f"--script {path}: no function {name}: not a script of the family")
    return script


def load_model(script, options: argparse.Namespace, hint: str):
    """The artifact's model, on the device and of the dtype that are asked for."""
    device, library = options.device, getattr(script, "torch", None) or getattr(script, "mx", None)
    if device == "auto" and hasattr(script, "torch"):
        seen = {"cuda": library.cuda.is_available(), "mps": library.backends.mps.is_available(), "cpu": True}
        device = next(name for name in seen if seen[name])
    more = {}
    if options.dtype:
        if "dtype" not in inspect.signature(script.load).parameters:
            raise Misuse(f"--dtype {options.dtype}: {script.__file__} loads artifacts in one dtype only")
        more["dtype"] = {"fp32": library.float32, "bf16": library.bfloat16}[options.dtype]

    try:
        return script.load(options.artifact, device, **more)
    except getattr(script, "UserError", ()) as error:
        raise Misuse(f"{error}{hint}") from None
    except (RuntimeError, AssertionError) as error:  # torch's ways to say that there is no such device
        if device == "cpu":
            raise
        raise Misuse(f"--device {device}: {str(error).splitlines()[0]}") from None


def alphabet_of(model, options: argparse.Namespace) -> Alphabet:
    vocab = model.args.vocab_size
    if vocab in BYTES:
        return Alphabet.of_bytes(vocab)
    try:
        pieces, _ = codec.open_tokenizer(options.tokenizer, vocab)
    except codec.CodecError as error:
        raise Misuse(str(error)) from None
    return Alphabet.of_pieces(pieces)


def prompt_of(options: argparse.Namespace) -> bytes:
    """TEXT, standard input, a file, or nothing."""
    if options.text is not None and options.file is not None:
        raise Misuse(f"TEXT and --file {options.file}: one of them")
    if "-" in (options.text, options.file):
        return sys.stdin.buffer.read()
    if options.file is None:
        return os.fsencode(options.text or "")
    try:
        return Path(options.file).read_bytes()
    except OSError as error:
        raise Misuse(f"--file {options.file}: {error.strerror}") from None


def check(options: argparse.Namespace) -> None:
    """Raises Misuse at a number that means nothing, or that would change nothing."""
    fine = {
        f"--max-new-tokens {options.max_new_tokens}: at least 1": options.max_new_tokens >= 1,
        f"--samples {options.samples}: at least 1": options.samples >= 1,
        f"--seed {options.seed}: at least 0": options.seed >= 0,
        f"--temperature {options.temperature}: a number from 0": 0 <= options.temperature < math.inf,
        f"--top-p {options.top_p}: more than 0, at most 1": 0 < options.top_p <= 1,
        "--stop: an empty text is everywhere": all(options.stop),
    }
    if not options.temperature:
        why = "without --temperature nothing is drawn, the likeliest id is taken"
        fine |= {f"--top-p {options.top_p}: {why}": options.top_p == 1,
                 f"--samples {options.samples}: {why}": options.samples == 1}
    for problem in fine:
        if not fine[problem]:
            raise Misuse(problem)


def sample(script, model, alphabet: Alphabet, prompt: list[int], law: Law,
           options: argparse.Namespace) -> Sample:
    """One text: to stdout as it grows and its numbers to stderr, or a line of JSON."""
    kind = Decoder if hasattr(script, "Generator") else Writer
    writer = kind(script, model, prompt, law, options.max_new_tokens, not options.no_speculate)
    stops = [os.fsencode(stop) for stop in options.stop]
    if options.json:
        made = write(writer, alphabet, Page(stops, lambda data: None))
        print(made.json(), flush=True)
        return made

    several = options.samples > 1
    screen = Screen(sys.stdout.buffer, sys.stdout.isatty())
    if several:
        screen.put(f"=== seed {law.seed} ===\n".encode())
    made = write(writer, alphabet, Page(stops, screen.put))
    screen.end(several)
    print(made.line(), file=sys.stderr)
    return made


def generate(options: argparse.Namespace) -> int:
    """Writes the texts -> the exit code."""
    check(options)
    text = prompt_of(options)
    header = header_of(options.artifact)
    path = family.find_script(options.script) if options.script else named_script(header or {})
    hint = ""
    if path is None and options.artifact.endswith(".safetensors"):
        hint = " (a checkpoint: SGJM's are read with --script SGJM, of other scripts artifact.bin)"
    elif header is not None and options.script:
        hint = f" (read by --script {options.script}; without it, by the script that the artifact names)"
    elif header is not None and path is None:
        hint = f" (read by {family.TRUNK.name}; --script names another)"

    script = open_script(path or family.TRUNK)
    model = load_model(script, options, hint)
    alphabet = alphabet_of(model, options)
    prompt = alphabet.ids(text)
    for number in range(options.samples):
        if number and getattr(model.args, "ttt", "0") != "0":  # it has learned from what it has read
            model = load_model(script, options, hint)
        if alphabet.pieces is not None:  # a mixture over ids asks what they spell
            model.args.tokenizer_path = options.tokenizer
        law = Law(options.seed + number, options.temperature, options.top_p)
        made = sample(script, model, alphabet, prompt, law, options)
        if made.ended == "interrupt":
            return INTERRUPTED
    return family.FINE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("artifact", metavar="ARTIFACT", help="artifact.bin of a run; a checkpoint with --script SGJM")
    add("text", metavar="TEXT", nargs="?", help="the prompt itself, never a file's name; - reads stdin")
    add("--file", help="the file that holds the prompt")

    # what is written
    add("--max-new-tokens", type=int, default=256, metavar="N", help="ids at most (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0, the default: always the likeliest id")
    add("--top-p", type=float, default=1.0, help="draws from the fewest ids of this probability (1: all)")
    add("--seed", type=int, default=0, help="of the draws (%(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends before this text; may be repeated")
    add("--samples", type=int, default=1, metavar="N", help="so many texts, with seeds from --seed on")
    add("--no-speculate", action="store_true", help="no drafts: the same text, or law, from more passes")

    # by what
    add("--script", default="", metavar="NAME", help="a record or a path; default: what the artifact names")
    add("--device", default="auto", help="auto, cpu, cuda, mps; gpu for MLX")
    add("--dtype", choices=("fp32", "bf16"), help="of activations; default: what the script loads, fp32")
    path = os.environ.get("TOKENIZER_PATH", "")
    add("--tokenizer", default=path, metavar="FILE", help="SentencePiece model (TOKENIZER_PATH)")
    add("--json", action="store_true", help="a line of JSON a text, at its end")

    try:
        return generate(parser.parse_intermixed_args(argv))  # TEXT may follow an option
    except KeyboardInterrupt:  # before there was anything to keep
        return INTERRUPTED


if __name__ == "__main__":
    family.command(main)
