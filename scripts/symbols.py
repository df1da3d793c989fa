"""A script as symbols, each with its text: every line belongs to one; and which symbols nothing reaches.

Symbols are the docstring, the imports, `section TITLE` (a ruler and the remark below it), functions,
assignments (`A, B = 1, 2` is both names), other statements by the names they bind, and of a class its header
with the docstring (`GPT`), methods and fields (`GPT.forward`). Decorators and the comments above belong to a
symbol; the second one of a name is `name#2`. Blank lines stand between two neighbours and belong to neither.
"""

from __future__ import annotations

import ast
import builtins
import copy
import hashlib
import io
import re
import symtable
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from family import OF_THE_PROCESS, Misuse

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORT = (ast.Import, ast.ImportFrom)
ASSIGNMENT = (ast.Assign, ast.AnnAssign, ast.AugAssign)
OWN_SCOPE = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)
HOOKS = {"forward", "backward", "setup_context", "jvp", "vmap", "extra_repr"}  # PyTorch calls them by itself


@dataclass(eq=False)
class Symbol:
    """What a script defines under `names`: its text, from line `first` on, and the blank lines above it."""

    names: list[str]
    first: int
    owner: str = ""  # the class around it
    nodes: list[ast.AST] = field(default_factory=list)
    text: str = ""
    gap: str = ""

    @property
    def key(self) -> str:
        return ", ".join(self.names)

    def code(self) -> list[str]:
        """What Python sees of it: no layout, no comments, no docstrings."""
        return list(map(plain, self.nodes))

    def fingerprint(self) -> str:
        """Twelve digits of the hash of its code, the same under every version of Python."""
        return hashlib.sha256("\n".join(self.code()).encode()).hexdigest()[:12]


def plain(node: object) -> str:
    """A syntax tree as a text, without docstrings. Fields without content are left out: newer Pythons have
    more of them.
    """
    if isinstance(node, list):
        return "[" + " ".join(map(plain, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)

    fields = dict(ast.iter_fields(node))
    if isinstance(node, (*FUNCTION, ast.ClassDef)) and is_text(node.body[0]):
        fields["body"] = node.body[1:]
    shown = [f"{name}={plain(value)}" for name, value in fields.items() if value not in (None, [])]
    return f"{type(node).__name__}({' '.join(shown)})"


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def top(node: ast.AST) -> int:
    """Line of a statement's first decorator, or its own."""
    return min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", ()))])


def bound(node: ast.AST) -> Iterator[str]:
    """Names that a statement gives a meaning to in the scope that it stands in."""
    if isinstance(node, IMPORT):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, (*FUNCTION, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif not isinstance(node, OWN_SCOPE):
        for child in ast.iter_child_nodes(node):
            yield from bound(child)


def label(node: ast.AST) -> list[str]:
    """The names of a statement's symbol: those it binds, else how it begins."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return [ast.unparse(node.value.func) + "()"]
    return list(dict.fromkeys(bound(node))) or [ast.unparse(node).splitlines()[0].rstrip(":")]


def ruler(lines: list[str], at: int) -> str:
    """The title of the section whose ruler, three lines, begins at lines[at], or nothing."""
    block = "".join(lines[at : at + 3]).replace("\r\n", "\n")
    found = re.fullmatch(r"# -{3,}[ \t]*\n# ([^-\n][^\n]*)\n# -{3,}[ \t]*\n?", block)
    return found[1].strip() if found else ""


class Script:
    """Symbols in the order of the text: gaps, texts and `tail`, the blank lines at the end, are its source.

    `by_name` finds a symbol by any of its names, `by_key` by all of them with commas; `gaps` has the blank
    lines between two keys, "" being the one before the first symbol and after the last.

    Raises:
        Misuse: the source does not parse.
    """

    def __init__(self, source: str, path: Path | str = ""):
        self.source, self.path = source, Path(path)
        self.lines = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", source)  # as Python counts them
        try:
            self.tree = ast.parse(source)
        except (SyntaxError, ValueError) as error:
            raise Misuse(f"{path}: does not parse as Python: {error}") from None

        self.symbols: list[Symbol] = []
        end = 0  # last line of the statement before
        for symbol, last in self._statements():
            start = self._comments(end, symbol)
            before = self.symbols[-1] if self.symbols else None
            if before and (symbol.first <= end or symbol.key == before.key == "imports"):
                before.names += symbol.names * (symbol.key != "imports")  # `class A: pass`, `a = 1; b = 2`
                before.nodes += symbol.nodes
            else:
                symbol.first = start
                self.symbols.append(symbol)
            end = max(end, last)
        self._comments(end, Symbol([], len(self.lines) + 1))
        self._cut()

    @classmethod
    def read(cls, path: Path) -> Script:
        """Raises Misuse for a file that is missing, not UTF-8 or does not parse."""
        try:
            data = path.read_bytes()
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            if encoding not in ("utf-8", "utf-8-sig"):
                reason = "another text to Python than to a reader"
                raise Misuse(f"{path}: its source says coding {encoding}: {reason}")
            return cls(data.decode(), path)
        except (OSError, UnicodeDecodeError, SyntaxError) as error:
            raise Misuse(f"{path}: {error}") from None

    def _statements(self) -> Iterator[tuple[Symbol, int]]:
        """(symbol, its last line) of all statements and members of classes."""
        leading = True
        for i, node in enumerate(self.tree.body):
            if isinstance(node, ast.ClassDef):
                yield from self._class(node)
                leading = False
            elif i == 0 and is_text(node):
                yield Symbol(["docstring"], top(node), nodes=[node]), node.end_lineno
            else:
                leading = leading and isinstance(node, IMPORT)
                names = ["imports"] if leading else label(node)
                yield Symbol(names, top(node), nodes=[node]), node.end_lineno

    def _class(self, node: ast.ClassDef) -> Iterator[tuple[Symbol, int]]:
        docstring = node.body[:1] if is_text(node.body[0]) else []
        header = copy.copy(node)
        header.body = [*docstring, ast.Pass()]
        last = docstring[0].end_lineno if docstring else top(node.body[0]) - 1
        while not docstring and last > node.lineno and self.lines[last - 1].strip()[:1] in ("", "#"):
            last -= 1
        yield Symbol([node.name], top(node), nodes=[header]), max(last, node.lineno)
        for part in node.body[len(docstring) :]:
            names = [f"{node.name}.{name}" for name in label(part)]
            yield Symbol(names, top(part), node.name, [part]), part.end_lineno

    def _comments(self, end: int, symbol: Symbol) -> int:
        """Adds the sections between line `end` and a symbol; returns its first line, with its comments.

        Indented comments above a symbol that is not indented still belong to what stands before them.
        """
        for at in range(end, symbol.first - 1):
            if title := ruler(self.lines, at):
                self.symbols.append(Symbol([f"section {title}"], at + 1))
                end = at + 3
                while end < symbol.first - 1 and self.lines[end][0] == "#" and not ruler(self.lines, end):
                    end += 1
            elif self.lines[at].strip() and self.lines[at][0] in " \t" and not symbol.owner:
                end = at + 1
        while end < symbol.first - 1 and not self.lines[end].strip():
            end += 1
        return end + 1

    def _cut(self) -> None:
        """A symbol's text reaches to the next symbol, without the blank lines at its end."""
        seen: dict[str, int] = {}
        starts = [*(symbol.first - 1 for symbol in self.symbols), len(self.lines)]
        gap = "".join(self.lines[: starts[0]])
        for symbol, first, stop in zip(self.symbols, starts, starts[1:]):
            for i, name in enumerate(symbol.names):
                seen[name] = seen.get(name, 0) + 1
                symbol.names[i] = name if seen[name] == 1 else f"{name}#{seen[name]}"
            last = stop
            while not self.lines[last - 1].strip():
                last -= 1
            symbol.text, symbol.gap = "".join(self.lines[first:last]), gap
            gap = "".join(self.lines[last:stop])

        self.tail = gap
        self.keys = [symbol.key for symbol in self.symbols]
        self.by_key = dict(zip(self.keys, self.symbols))
        self.by_name = {name: symbol for symbol in self.symbols for name in symbol.names}
        gaps = [*(symbol.gap for symbol in self.symbols), self.tail]
        self.gaps = dict(zip(zip(["", *self.keys], [*self.keys, ""]), gaps))

    def section(self, title: str) -> range:
        """Line numbers of a section; empty where there is none."""
        end = len(self.lines) + 1
        start = self.by_key[f"section {title}"].first if f"section {title}" in self.by_key else end
        starts = [symbol.first for symbol in self.symbols if symbol.key.startswith("section ")]
        return range(start, min((first for first in starts if first > start), default=end))


def uses(symbol: Symbol) -> tuple[set[str], set[str]]:
    """(global names, attributes) that its code reads; a text that could be one, as for `getattr`, is one."""
    names, attributes = set(), set()
    for node in symbol.nodes:
        tables = [symtable.symtable(ast.unparse(node), "", "exec")]
        while tables:
            table = tables.pop()
            outside = table.get_type() == "module"
            names |= {name.get_name() for name in table.get_symbols()
                      if name.is_referenced() and (outside or name.is_global())}
            tables += table.get_children()
        for part in ast.walk(node):
            word = getattr(part, "attr", getattr(part, "value", None))
            stored = isinstance(getattr(part, "ctx", None), ast.Store)
            if isinstance(word, str) and word.isidentifier() and not stored:
                attributes.add(word)
    return names, attributes | (names if symbol.owner else set())  # a class's body reads fields as names


def without_annotations(node: ast.AST) -> ast.AST:
    """A copy in which no annotation names anything: they are for the reader, Python evaluates none."""
    node = copy.deepcopy(node)
    for part in ast.walk(node):
        if isinstance(part, FUNCTION):
            part.returns = None
        elif isinstance(part, ast.arg):
            part.annotation = None
        elif isinstance(part, ast.AnnAssign):
            part.annotation = ast.Constant(None)
    return node


def read_at_once(node: ast.AST) -> Iterator[ast.Name]:
    """The names that Python looks up while it runs a statement: bodies of functions wait for a call."""
    if isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load):
            yield node
        return

    parts = list(ast.iter_child_nodes(node))
    if isinstance(node, (*FUNCTION, ast.Lambda)):
        defaults = [*node.args.defaults, *node.args.kw_defaults]
        parts = [part for part in (*getattr(node, "decorator_list", ()), *defaults) if part]
    own = set()  # names with a meaning inside that they do not have outside
    if isinstance(node, ast.ClassDef):
        own = {name for part in node.body for name in bound(part)}
    elif isinstance(node, OWN_SCOPE):
        names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
        own = {part.id for part in names if isinstance(part.ctx, ast.Store)}

    for part in parts:
        yield from (name for name in read_at_once(part) if name.id not in own)


def used_too_early(script: Script) -> Iterator[tuple[int, str, int]]:
    """(line, name, line of its definition) of names that the module reads before it gives them a meaning."""
    defined: dict[str, tuple[int, int]] = {}
    for i, node in enumerate(script.tree.body):
        for name in bound(node):
            defined.setdefault(name, (i, top(node)))

    for i, node in enumerate(script.tree.body):
        for name in read_at_once(without_annotations(node)):
            index, line = defined.get(name.id, (-1, 0))
            if index > i:
                yield name.lineno, name.id, line


def used_in_earlier_section(script: Script) -> dict[str, tuple[Symbol, str, str]]:
    """{function or class: (symbol that uses it first, its section, the section of the definition)}.

    Only where the definition stands in a later section than the first use; annotations are no use.
    """
    section, sections = "", {}
    for symbol in script.symbols:
        section = symbol.key if symbol.key.startswith("section ") else section
        sections[symbol.key] = section.removeprefix("section ")
    order = list(dict.fromkeys(sections.values()))
    place = {name: sections[symbol.key] for symbol in script.symbols for name in symbol.names
             if symbol.nodes and not symbol.owner and isinstance(symbol.nodes[0], (*FUNCTION, ast.ClassDef))}

    found = {}
    for symbol in script.symbols:
        bare = Symbol(symbol.names, symbol.first, symbol.owner, [*map(without_annotations, symbol.nodes)])
        here = sections[symbol.key]
        for name in sorted(uses(bare)[0] & {*place} - {*found}):
            if order.index(place[name]) > order.index(here):
                found[name] = symbol, here, place[name]
    return found


def dead(script: Script, companions: Iterable[ast.Module] = ()) -> dict[str, bool]:
    """{name: certain} of what neither `main` nor a tool of the family reaches.

    `companions` are the other programs of a record's folder: the attributes they read are in use.

    By names alone: a namesake in use keeps a symbol alive. Functions, classes and methods are certain, but
    not a method that a foreign base class may call; fields, constants and imports are not.
    """
    names = {"main", "load", "score", "stream", "Generator"}  # what tools call
    attributes = {"logprobs", "push"}
    for tree in companions:
        attributes |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    functions = {node.name for node in script.tree.body if isinstance(node, FUNCTION)}
    for node in script.tree.body:  # a decorator of the script may hand a function on: a registry
        decorators = {ast.unparse(part) for part in getattr(node, "decorator_list", ())}
        names |= {node.name} if decorators & functions else set()
    classes = [node for node in script.tree.body if isinstance(node, ast.ClassDef)]
    own = {*vars(builtins), *(node.name for node in classes), "namedtuple", "NamedTuple"}
    foreign = {node.name for node in classes
               if not {ast.unparse(base).partition("(")[0] for base in node.bases} <= own}

    def alive(name: str) -> bool:
        owner, _, last = name.partition("#")[0].rpartition(".")
        if owner and owner not in names:
            return False
        if last.startswith("__") and last.endswith("__") or not owner:
            return owner != "" or last in names or last.startswith("__")
        variable = last.upper() in {*attributes, *OF_THE_PROCESS}  # read as such, or by torch.distributed
        return last in attributes or variable or last in HOOKS and owner in foreign

    def runs(symbol: Symbol) -> bool:
        """Whether what it reads is read: statements run with the module, fields with their class."""
        node = symbol.nodes[0]
        if isinstance(node, (*FUNCTION, ast.ClassDef)) or isinstance(node, ASSIGNMENT) and not symbol.owner:
            return any(map(alive, symbol.names)) or not list(bound(node))
        return symbol.owner in {"", *names}

    waiting = [symbol for symbol in script.symbols if symbol.nodes and symbol.key != "docstring"]
    while more := [symbol for symbol in waiting if runs(symbol)]:
        waiting = [symbol for symbol in waiting if symbol not in more]
        for read, asked in map(uses, more):
            names |= read
            attributes |= asked
    found = {}
    for symbol in script.symbols:
        node = symbol.nodes[0] if symbol.nodes else None
        certain = isinstance(node, (*FUNCTION, ast.ClassDef))
        if symbol.key == "imports":
            found |= {f"import {name}": False for part in symbol.nodes for name in bound(part)
                      if name not in names and getattr(part, "module", "") != "__future__"}
        elif certain or isinstance(node, ASSIGNMENT) and list(bound(node)):
            heading = not certain and is_text(ast.Expr(node.value))  # `_data = "Data"` of Hyperparameters
            found |= {name: certain and symbol.owner not in foreign & names for name in symbol.names
                      if not alive(name) and not (heading and "._" in name)}
    return found
