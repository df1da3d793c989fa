"""How densely a script is written: what `lineage.py density` shows and what `lineage.py check` caps.

A budget of lines can be met by longer lines, by two statements in one and by functions without a pause. These
figures show it.
"""

from __future__ import annotations

import ast
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from symbols import FUNCTION, Script, is_text, top

LONG_LINE = 100  # columns; a few such lines are fine
LONG_FUNCTION = 20  # lines from which on a function needs a paragraph
TABLE_FUNCTION = 15  # lines from which on the table counts functions, as published counts of other scripts do
HEADER = ("script", "lines", "bytes", "mean column", f"over {LONG_LINE} columns", "tuple assignments",
          f"functions >= {TABLE_FUNCTION} lines", "with a blank line", "with a comment line",
          f"functions >= {LONG_FUNCTION} lines", "with paragraphs")


@dataclass(frozen=True)
class Shape:
    """A function: its place and length, and whether its body has a blank line, a line with only a comment."""

    name: str
    line: int
    lines: int
    blank: bool
    comment: bool

    @property
    def has_paragraphs(self) -> bool:
        return self.blank or self.comment


@dataclass
class Density:
    """The figures of a script. `mean_column` and `share_long` are over the lines that are not blank."""

    lines: int
    size: int  # bytes
    mean_column: float
    share_long: float  # 0 to 1, of lines over LONG_LINE columns
    tuple_assignments: int  # a, b = c, d
    nested: list[Shape] = field(default_factory=list)  # all functions, those inside other ones too
    functions: list[Shape] = field(default_factory=list)  # those of the module and of its classes

    def without_paragraphs(self) -> list[Shape]:
        return [shape for shape in self.functions
                if shape.lines >= LONG_FUNCTION and not shape.has_paragraphs]

    def row(self) -> dict[str, float]:
        """The columns of HEADER but the first."""
        counted = [shape for shape in self.nested if shape.lines >= TABLE_FUNCTION]
        held = [shape for shape in self.functions if shape.lines >= LONG_FUNCTION]
        values = (self.lines, self.size, self.mean_column, self.share_long, self.tuple_assignments,
                  len(counted), sum(shape.blank for shape in counted),
                  sum(shape.comment for shape in counted), len(held),
                  sum(shape.has_paragraphs for shape in held))
        return dict(zip(HEADER[1:], values))


def pauses(script: Script) -> tuple[set[int], set[int]]:
    """(blank lines, lines with only a comment), by number; inside a text of several lines neither is one."""
    comments, inside = set(), set()
    for token in tokenize.generate_tokens(iter(script.lines).__next__):
        (first, column), (last, _) = token.start, token.end
        if token.type == tokenize.COMMENT and not token.line[:column].strip():
            comments.add(first)
        elif token.type not in (tokenize.NEWLINE, tokenize.NL):
            inside |= {*range(first + 1, last + 1)}

    blank = {i for i, line in enumerate(script.lines, 1) if not line.strip()}
    return blank - inside, comments


def functions(nodes: Iterable[ast.AST], owner: str = "") -> Iterator[tuple[str, ast.AST]]:
    """(name, node) of functions and methods; those inside another function belong to it."""
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            yield from functions(node.body, f"{owner}{node.name}.")
        elif isinstance(node, FUNCTION):
            yield owner + node.name, node
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from functions(ast.iter_child_nodes(node), owner)


def measure(script: Script) -> Density:
    blank, comments = pauses(script)

    def shape(name: str, node: ast.AST) -> Shape:
        end = node.end_lineno
        # A blank line between the docstring and the first statement parts nothing, a comment there does.
        first = next((top(part) for part in node.body if not is_text(part)), end)
        start = first
        while start - 1 in blank | comments:
            start -= 1
        has_blank = bool(blank & {*range(first, end)})
        has_comment = bool(comments & {*range(start, end)})
        return Shape(name, node.lineno, end - node.lineno + 1, has_blank, has_comment)

    widths = [len(line.rstrip()) for line in script.lines if line.strip()]
    nodes = [*ast.walk(script.tree)]
    tuples = [node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
              and isinstance(node.targets[0], ast.Tuple)]
    count = max(len(widths), 1)

    return Density(
        lines=len(script.lines),
        size=len(script.source.encode()),
        mean_column=sum(widths) / count,
        share_long=sum(width > LONG_LINE for width in widths) / count,
        tuple_assignments=len(tuples),
        nested=[shape(node.name, node) for node in nodes if isinstance(node, FUNCTION)],
        functions=[shape(name, node) for name, node in functions(script.tree.body)],
    )


def rows(paths: Iterable[Path], root: Path) -> list[dict]:
    """The figures of scripts, a row each, as in HEADER."""
    found = []
    for path in paths:
        name = path.relative_to(root) if path.is_relative_to(root) else path
        found.append({HEADER[0]: str(name), **measure(Script.read(path)).row()})
    return found


def cells(row: dict) -> list[str]:
    """A row as a table shows it."""
    shown = dict(row)
    for name in ("lines", "bytes"):
        shown[name] = f"{row[name]:,}"
    shown["mean column"] = f"{row['mean column']:.1f}"
    shown[HEADER[4]] = f"{row[HEADER[4]]:.1%}"
    return [str(value) for value in shown.values()]
