"""Two scripts side by side: every script of the family as symbols, for static/compare.js to pair.

Pairs of scripts are many, so the page pairs them: a name in both is identical where the text is, "same code"
where the fingerprint is, else changed, as in `lineage.pairs`; a test holds the two against each other.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import family
import lineage
from family import Misuse
from pygments.lexers import PythonLexer
from pygments.token import STANDARD_TYPES, Token
from symbols import Script, Symbol

from pages.found import Entry, Repository, slug

# Kinds of tokens that get a colour; all others are text.
SHOWN = {Token.Keyword: "k", Token.Literal.String: "s", Token.Comment: "c", Token.Literal.Number: "n",
         Token.Name.Function: "f", Token.Name.Class: "f", Token.Name.Decorator: "d"}
LEXER = PythonLexer(stripnl=False, ensurenl=False)


def colour(kind) -> str:
    """The class of a token's colour, or nothing."""
    while kind not in SHOWN and kind in STANDARD_TYPES and kind is not Token:
        kind = kind.parent
    return SHOWN.get(kind, "")


def highlighted(text: str) -> str:
    """A symbol's text as HTML, its lines those of the text: no element goes over the end of a line."""
    parts = []
    for kind, value in LEXER.get_tokens(text):
        name = colour(kind)
        for i, line in enumerate(value.split("\n")):
            shown = html.escape(line, quote=False)
            parts.append("\n" if i else "")
            parts.append(f"<i class={name}>{shown}</i>" if name and line.strip() else shown)
    return "".join(parts)


@dataclass
class Texts:
    """Every text once, with the fingerprint of its code: most symbols of a record are its parent's."""

    known: dict[str, int] = field(default_factory=dict)
    codes: list[str | None] = field(default_factory=list)

    def index(self, symbol: Symbol) -> int:
        if symbol.text not in self.known:
            self.known[symbol.text] = len(self.known)
            self.codes.append(symbol.fingerprint() if symbol.nodes else None)
        return self.known[symbol.text]


def sections(script: Script) -> Iterator[tuple[str, Symbol]]:
    """(title of its section, symbol) in the order of the script."""
    title = "HEAD"
    for symbol in script.symbols:
        if symbol.key.startswith("section "):
            title = symbol.key.removeprefix("section ")
        yield title, symbol


def settings(script: Script, entry: Entry | None) -> list[list[str]]:
    """[variable, default as written, what the measured runs had]."""
    defaults = lineage.defaults(script)
    runs = entry.record.group.runs if entry and entry.record.group else []
    chosen = runs[0].metrics.get("settings", {}) if runs else {}
    names = [*defaults, *(name for name in chosen if name not in defaults)]
    return [[name, defaults.get(name, ""), as_text(chosen.get(name))]
            for name in names if name not in family.OF_THE_RUN]


def as_text(value: object) -> str:
    """A setting as the environment would have it."""
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)


def described(key: str, label: str, path: Path, texts: Texts, entry: Entry | None, root: Path) -> dict:
    """One script as compare.js takes it."""
    script, ideas, reasons, parent = Script.read(path), {}, {}, None
    if entry:
        submission, ideas, above = lineage.read_submission(entry.record.folder, root)
        reasons = {name: each["reason"] for name, each in submission.get("changes", {}).items()}
        parent = above and ("trunk" if above.parent.resolve() == root.resolve() else slug(above.parent.name))
    symbols = [{"names": symbol.names, "section": title, "text": texts.index(symbol)}
               for title, symbol in sections(script)]
    return {"key": key, "label": label, "parent": parent, "ideas": ideas, "reasons": reasons,
            "symbols": symbols, "settings": settings(script, entry), "href": entry.href if entry else None}


def page(repository: Repository) -> dict:
    """{"family": what the page's script reads, "scripts": [(key, label)], "problems": [...]}."""
    root, texts, scripts, problems = repository.root, Texts(), [], []

    def add(key: str, label: str, path: Path, entry: Entry | None) -> None:
        if not path.is_file():
            return
        try:
            scripts.append(described(key, label, path, texts, entry, root))
        except Misuse as error:
            problems.append(str(error).replace(f"{root}/", ""))

    add("trunk", "trunk, train_gpt.py", root / "train_gpt.py", None)
    add("trunk-mlx", "trunk in MLX, train_gpt_mlx.py", root / lineage.TWIN, None)
    for entry in repository.entries:
        folder, name = entry.record.folder, slug(entry.record.name)
        add(name, entry.record.name, folder / "train_gpt.py", entry)
        add(f"{name}-mlx", f"{entry.record.name} in MLX", folder / lineage.TWIN, None)
    family_of = {"texts": [highlighted(text.rstrip("\n")) for text in texts.known], "codes": texts.codes,
                 "titles": ["HEAD", *lineage.TITLES], "scripts": scripts}
    return {"family": family_of, "scripts": [(each["key"], each["label"]) for each in scripts],
            "problems": problems}
