"""CaseOps: the case of ASCII words moved into operator symbols, so that a tokenizer learns each word once.

    "The NASA iPhone"  ->  TITLE the, ALLCAPS nasa, i CAPNEXT phone

The transform `lossless_caps_caseops_v1` of openai/parameter-golf #1729 (also in #1736, #1855, #2080), written
from its description. Four private-use characters are the operators; a tokenizer has them as user-defined
symbols:

| symbol  | code   | what it does                                                     |
|---------|--------|------------------------------------------------------------------|
| TITLE   | U+E001 | the letter after it, the first of a word, is a capital           |
| ALLCAPS | U+E002 | all letters of the word after it, two or more, are capitals      |
| CAPNEXT | U+E003 | the letter after it, inside a word, is a capital                 |
| ESCAPE  | U+E004 | the operator after it is a character of the text and no operator |

A word is a run of [A-Za-z] that is as long as can be. Everything else stays as it is: case outside ASCII does
not change its bytes in the same way ('\u00df', '\u0130', '\u0149', '\u01c5' have lower or upper forms of
another length, or several), so the published rules leave it alone, and nothing is lost on any text. `encode`
is one to one.

Where the published transform leaves something open, or says less than *bijective*:

- Its decoder reads several spellings of one text (CAPNEXT for TITLE, CAPNEXT letter by letter for ALLCAPS, an
  ESCAPE before anything). `decode` takes those that `encode` writes and refuses all others, so the two are
  inverse to one another on texts and on transformed texts. `decode(..., strict=False)` reads anything, for
  what a model writes or a normalising tokenizer makes of it ("\u2122" after NFKC is a bare "TM").
- A normalising tokenizer drops white space at the ends of a document, which belongs to no piece's surface.
  The sidecar gives it to the nearest piece that holds text, so that the sum is the document's length always.
- A piece that stands for more bytes than 16 bits hold (a very long run of
white space, folded into one) passes the rest on.
"""

from __future__ import annotations

import re

import numpy as np

NAME = "lossless_caps_caseops_v1"
OPERATORS = TITLE, ALLCAPS, CAPNEXT, ESCAPE = "\ue001", "\ue002", "\ue003", "\ue004"
SIDECAR_LIMIT = 65535  # bytes that one token can account for: sidecars are uint16

ANY_OPERATOR = re.compile("[\ue001-\ue004]")
# From a word's first capital to its end. The engine looks for one set
# of characters, and most text has few of them.
CAPITALS = re.compile("[A-Z][A-Za-z]*")
CAPNEXT_LETTERS = {ord(letter): CAPNEXT + letter.lower() for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
# An operator and what it acts on; groups: what is escaped, the word, the letter.
MARKED = re.compile(f"{ESCAPE}([{TITLE}-{ESCAPE}])?|{ALLCAPS}([A-Za-z]*)|[{TITLE}{CAPNEXT}]([A-Za-z]?)")


# -----------------------------------------------------------------------------
# THE TRANSFORM
# -----------------------------------------------------------------------------


def encode(text: str) -> str:
    """The text in CaseOps form: no ASCII capital is left, and `decode` gives the text back.

    Any `str`, lone surrogates too. One pass of a regular expression;
    time grows with the length and with nothing else.
    """
    if any(symbol in text for symbol in OPERATORS):
        text = ANY_OPERATOR.sub(rf"{ESCAPE}\g<0>", text)
    return CAPITALS.sub(_marked, text)


def _marked(match: re.Match) -> str:
    """The end of a word, from its first capital on, with its operators."""
    word, start = match[0], match.start()
    if start and "a" <= match.string[start - 1] <= "z":  # the word began before: no TITLE or ALLCAPS here
        return word.translate(CAPNEXT_LETTERS)
    if len(word) > 1 and word.isupper():
        return ALLCAPS + word.lower()
    return TITLE + word[0].lower() + word[1:].translate(CAPNEXT_LETTERS)


def decode(text: str, strict: bool = True) -> str:
    """The text that `encode` made this of.

    Raises ValueError, with the place, for a text that `encode` never writes: a capital, an operator without
    its letter, another operator than the rules ask for. With `strict=False` any text is read: an operator
    that finds no letter vanishes, capitals stay.
    """
    plain = MARKED.sub(lambda match: (match[1] or match[2] or match[3] or "").upper(), text)
    if strict and (wanted := encode(plain)) != text:
        at = next((i for i, (a, b) in enumerate(zip(text, wanted)) if a != b), min(len(text), len(wanted)))
        found, wanted = text[at : at + 8], wanted[at : at + 8]
        raise ValueError(f"not a CaseOps text: {found!a} at character {at}, where encode writes {wanted!a}")
    return plain


# -----------------------------------------------------------------------------
# THE SIDECAR: bytes of the original text for each token
# -----------------------------------------------------------------------------


def acting(symbols: np.ndarray, operators: np.ndarray) -> np.ndarray:
    """Where `symbols` (n,) holds an operator that acts, and no literal one after an ESCAPE: (n,) bool.

    `symbols` are ids, or code points; `operators` (4,) is what
    TITLE, ALLCAPS, CAPNEXT and ESCAPE are among them.
    """
    title, allcaps, capnext, escape = (symbols == operator for operator in operators)
    found = title | allcaps | capnext | escape
    if escape.any():
        # In a run of ESCAPEs the first, third, ... act, and make the next symbol a literal one.
        at = np.arange(len(symbols))
        run = at - np.maximum.accumulate(np.where(escape, -1, at))  # 1, 2, ... inside a run, counted from 1
        found[1:] &= ~(escape & (run % 2 == 1))[:-1]
    return found


def character_bytes(transformed: str) -> np.ndarray:
    """UTF-8 bytes of the original text for each character of the transformed one: (len(transformed),) int64.

    0 for an operator that acts, otherwise the character's own length: the transform changes ASCII letters
    into ASCII letters and keeps all others. The sum is the original's length in UTF-8.
    """
    codes = np.frombuffer(transformed.encode("utf-32-le", "surrogatepass"), "<u4")
    sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    sizes[acting(codes, np.array([ord(symbol) for symbol in OPERATORS]))] = 0
    return sizes


def sidecar(transformed: str, ids: np.ndarray, ends: np.ndarray, operators: np.ndarray) -> np.ndarray:
    """Original UTF-8 bytes for BOS and for each token, by the piece's surface: (1 +
    n,) uint16; the sum is the document's length.

    `ids` (n,) are the tokens of `transformed`, `ends` (n,) the character after each token's surface, as
    `model.encode(transformed, return_type="offset_mapping")` of SentencePiece tells; `operators` as in
    `operator_ids`. Fits any model, also one that normalises. Of several byte pieces of a character the last
    has its bytes, as in #1729. Operators that act and BOS count 0, except that BOS holds the bytes of a
    document that normalises to nothing. Raises ValueError where 16 bits a token cannot hold the document, or
    `ends` are not places in it in their order.
    """
    edges = np.concatenate(([0], np.cumsum(character_bytes(transformed))))
    ids, ends = np.asarray(ids, np.int64), np.asarray(ends, np.int64)
    if len(ids) != len(ends) or (np.diff(ends, prepend=0, append=len(transformed)) < 0).any():
        raise ValueError(
            f"{len(ids)} tokens with {len(ends)} ends: not the surfaces of {len(transformed)} characters"
        )
    sizes = np.zeros(1 + len(ids), np.int64)
    bearing = 1 + np.flatnonzero(~acting(ids, operators))
    if not len(bearing):
        bearing = np.zeros(1, np.int64)
    total, most = int(edges[-1]), SIDECAR_LIMIT * np.arange(len(bearing) + 1)
    if total > most[-1]:
        raise ValueError(f"{total} bytes in {len(bearing)} tokens: a sidecar holds {SIDECAR_LIMIT} a token")
    # What lies between two surfaces goes to the piece after it, what lies after the last to the last.
    held = np.concatenate(([0], edges[ends[bearing[:-1] - 1]], [total]))
    # A token's excess goes to the ones after it, and from the end back to the ones before.
    held = np.minimum.accumulate(held - most) + most
    held = np.maximum(held, total - most[::-1])
    sizes[bearing] = np.diff(held)
    return sizes.astype(np.uint16)


def sidecar_of_ids(ids: np.ndarray, lengths: np.ndarray, operators: np.ndarray) -> np.ndarray:
    """The same from ids alone, for a model that loses nothing: (1 + n,) uint16.

    `lengths` (number of ids,) are the UTF-8 bytes of each id's piece
    with its mark as one space, 1 for a byte piece.
    """
    sizes = lengths[ids]
    sizes[acting(np.asarray(ids), operators)] = 0
    return np.concatenate(([0], sizes)).astype(np.uint16)


def operator_ids(model) -> np.ndarray:
    """Ids of TITLE, ALLCAPS, CAPNEXT and ESCAPE in a SentencePieceProcessor: (4,) int64.

    Raises ValueError where one has no piece of its own, or is part of another piece: only operators that are
    always tokens of their own can be told from text.
    """
    ids = [model.piece_to_id(symbol) for symbol in OPERATORS]
    found = [i for i in range(model.vocab_size()) if ANY_OPERATOR.search(model.id_to_piece(i))]
    written = [i for i in model.encode("a".join(["", *OPERATORS, ""])) if i in ids]
    if sorted(ids) != found or written != ids:
        raise ValueError(
            "CaseOps needs U+E001 to U+E004 as pieces of their own: "
            "user-defined symbols of a model trained on transformed text"
        )
    return np.array(ids, np.int64)
