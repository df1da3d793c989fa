"""How scripts descend from each other: what differs, whether a record declares it, and fixes carried down.

    python scripts/lineage.py diff . BytePPM     symbols by idea, lines, defaults; `--text`: and what changed
    python scripts/lineage.py check              the trunk and all records; `check .` is only the trunk
    python scripts/lineage.py agree BytePPM      its declared symbols have taken their parent's fixes
    python scripts/lineage.py density            how densely every script is written, a table
    python scripts/lineage.py sync --dry-run     where the parents' fixes would go
    python scripts/lineage.py carry              proves that present scripts give the numbers of measured ones
    python scripts/lineage.py tree               the family with its numbers

Symbols and what makes one dead are those of scripts/symbols.py. Exit codes: 0 fine, 1 findings, 2 misuse.

A record's declared symbol started as its parent's. `agreed.json` beside the record's script holds, for each
one that the parent still has, a hash of the parent's code at the last `agree`. When the parent's code is
another one, `check` names the symbol until the record takes the fix and agrees, or gives a reason, which
stands under `answers` in `submission.json`.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import density
import family
from carry import add_options, carry_records
from family import ROOT, Finding, Misuse, find_script, read_json
from symbols import FUNCTION, Script, Symbol, dead, used_in_earlier_section, used_too_early

TITLES = ("HYPERPARAMETERS", "RUNTIME", "ATTENTION", "DATA", "QUANTISER", "AUXILIARY OBJECTIVES",
          "MODEL", "OPTIMIZERS", "ARTIFACT", "EVALUATION", "GENERATION", "TRAINING")
RULER = "# " + "-" * 77
# Budgets. One of lines can be met by longer lines, so the other ones hold bytes and density.
TRUNK_LINES, RECORD_LINES, MAIN_LINES, COLUMNS = 3000, 3400, 60, 110
TRUNK_BYTES, MEAN_COLUMN, SHARE_LONG = 150_000, 58, 0.03
# What an earlier section than its own may use, and why.
AHEAD = {
    "pick_attention": "RUNTIME picks the kernel once, for all that follows",
    "CastedLinear": "the auxiliary objectives are made of the model's layers",
    "RMSNorm": "the same",
    "rms_norm": "the same",
    "Block": "the same",
}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}
LOADERS = {"spec_from_file_location", "SourceFileLoader", "run_path", "run_module"}
TWIN = "train_gpt_mlx.py"  # of the script beside it, in another framework: no record, no parent to be held to
AGREED = "agreed.json"  # beside a record's script: {declared symbol: fingerprint of its parent's code}
STATUSES = ("identical", "same code", "changed", "added", "removed")


# Comparing


@dataclass(frozen=True)
class Pair:
    """A name in two scripts. `status` is one of STATUSES; `dead`: does nothing reach it, in a and in b."""

    name: str
    status: str
    a: Symbol | None
    b: Symbol | None
    dead: tuple[bool, bool]

    def texts(self) -> list[list[str]]:
        return [symbol.text.splitlines() if symbol else [] for symbol in (self.a, self.b)]

    def lines(self) -> tuple[int, int]:
        """Lines that came and lines that went; one that changed is in both."""
        matcher = difflib.SequenceMatcher(None, *self.texts(), autojunk=False)
        blocks = [block for block in matcher.get_opcodes() if block[0] != "equal"]
        added = sum(stop - start for *_, start, stop in blocks)
        removed = sum(stop - start for _, start, stop, *_ in blocks)
        return added, removed

    def likeness(self) -> float:
        """Share of the lines that both have, 0 to 1."""
        return difflib.SequenceMatcher(None, *self.texts(), autojunk=False).ratio()


def pairs(a: Script, b: Script, reach: bool = True) -> list[Pair]:
    """Every name of two scripts; without `reach` nobody asks what is dead, which takes half of the time."""
    found, unreachable = [], (dead(a), dead(b)) if reach else ((), ())
    for name in {**b.by_name, **a.by_name}:
        old, new = a.by_name.get(name), b.by_name.get(name)
        if old is None or new is None:
            status = "added" if old is None else "removed"
        elif old.text == new.text:
            status = "identical"
        else:
            status = "same code" if old.nodes and new.nodes and old.code() == new.code() else "changed"
        found.append(Pair(name, status, old, new, tuple(name in names for names in unreachable)))
    return found


def compare(a: Path, b: Path) -> list[Pair]:
    """What became of every symbol from script a to script b (paths): in the order of b, then what is gone.

    Raises:
        Misuse: one of them is missing or does not parse.
    """
    return pairs(Script.read(a), Script.read(b))


def changed_symbols(parent: Path, child: Path) -> list[str]:
    """The names that a record's `changes` have to hold: the child's in their order, then what is gone.

    All that differ from the parent's but the docstring, which is free; a class that came or went counts with
    all of its members. Raises Misuse as `compare` does.
    """
    found = compare(parent, child)
    return [pair.name for pair in found if pair.status != "identical" and pair.name != "docstring"]


def defaults(script: Script) -> dict[str, str]:
    """{variable: default as written} of `name = Var(default)` fields and `os.environ.get(NAME, default)`."""
    found = {}
    for node in ast.walk(script.tree):
        call = node.value if isinstance(node, ast.Assign) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        function, first, *rest = map(ast.unparse, (call.func, *call.args))
        if function == "Var" and call is not node:
            found[ast.unparse(node.targets[0]).upper()] = first
        elif function in ("os.environ.get", "os.getenv"):
            found[first.strip("'")] = rest[0] if rest else "None"
    return found


def ideas_between(a: Path, b: Path) -> dict[str, str]:
    """{symbol: idea} where b is a record and a its parent; nothing for another pair."""
    root = b.parent.parent.parent
    if b.parent.parent.name != "records" or not (b.parent / "submission.json").is_file():
        return {}
    _, declared, parent = read_submission(b.parent, root)
    return declared if parent and parent.resolve() == a.resolve() else {}


def summary(found: list[Pair], ideas: dict[str, str]) -> list[str]:
    """What differs, by idea or else by status: a line a symbol with its counts of lines, the total last."""
    groups: dict[str, list[Pair]] = {}
    for name in dict.fromkeys(ideas.values()):
        groups[name] = []
    for status in STATUSES[1:] if not ideas else ():
        groups[status] = []
    for pair in found:
        if pair.status != "identical":
            other = "no idea" if ideas else pair.status
            groups.setdefault(ideas.get(pair.name, other), []).append(pair)

    shown = [f"identical: {sum(pair.status == 'identical' for pair in found)}"]
    total = [0, 0]
    for title, members in groups.items():
        # `A, B = 1, 2` is two names and one text.
        texts = {(id(pair.a), id(pair.b)): pair for pair in members}
        rows, count = [], [0, 0]
        for pair in texts.values():
            added, removed = pair.lines()
            count = [count[0] + added, count[1] + removed]
            note = f"  {pair.status}" if ideas else ""
            note += f"  {pair.likeness():.0%} of its lines" if pair.status == "changed" else ""
            rows.append(f"  {(pair.b or pair.a).key}  +{added} -{removed}{note}")

        title += ", other text" if title == "same code" else ""
        shown += [f"{title}: {len(members)}, +{count[0]} -{count[1]}", *rows]
        total = [total[0] + count[0], total[1] + count[1]]

    return [*shown, f"{sum(total)} lines differ (+{total[0]} -{total[1]})"]


def diff(a: Path, b: Path, text: bool, as_json: bool) -> int:
    """Prints what became of every symbol of a in b; with `text` the changes themselves too."""
    scripts = Script.read(a), Script.read(b)
    found, (old, new) = pairs(*scripts), map(defaults, scripts)
    ideas = ideas_between(a, b)
    settings = [{"variable": name, "a": old.get(name, ""), "b": new.get(name, "")} for name in {**old, **new}
                if old.get(name) != new.get(name)]
    texts = {}
    for pair in found if text else ():
        if pair.status != "identical":
            lines = difflib.unified_diff(*pair.texts(), f"a {pair.name}", f"b {pair.name}", lineterm="")
            texts[pair.name] = list(lines)

    if as_json:
        symbols = [{"name": pair.name, "status": pair.status, "idea": ideas.get(pair.name),
                    "likeness": round(pair.likeness(), 3), "dead": pair.dead,
                    "added": pair.lines()[0], "removed": pair.lines()[1],
                    "lines": [symbol and symbol.first for symbol in (pair.a, pair.b)],
                    "diff": texts.get(pair.name, [])} for pair in found]
        print(json.dumps({"a": str(a), "b": str(b), "symbols": symbols, "defaults": settings}, indent=1))
        return family.FINE

    *groups, total = summary(found, ideas)
    print(f"a  {a}\nb  {b}\n")
    print("\n".join(groups))
    for side in (0, 1):
        if names := [pair.name for pair in found if pair.dead[side]]:
            print(f"dead in {'ab'[side]}, unreachable from main: {len(names)}\n  " + "\n  ".join(names))
    if settings:
        header = ["variable", "default in a", "default in b"]
        print("\n" + family.markdown_table(header, [list(row.values()) for row in settings]))
    for lines in texts.values():
        print("\n" + "\n".join(lines))
    print(f"\n{total}")
    return family.FINE


# Checking

Place = tuple[int, str]  # a line, and what is wrong there


def read_submission(folder: Path, root: Path) -> tuple[dict, dict[str, str], Path | None]:
    """A record's submission.json, {symbol: idea} of its `changes`, its parent's script (None for a root).

    Raises:
        Misuse: it is missing, an idea is not {"reason": text, "symbols": names}, or there is no such parent.
    """
    path = folder / "submission.json"
    submission, names = read_json(path), {}
    if not isinstance(submission, dict) or not isinstance(submission.get("changes", {}), dict):
        raise Misuse(f"{path}: an object with an object `changes` is needed")
    for idea, entry in submission.get("changes", {}).items():
        symbols = entry.get("symbols") if isinstance(entry, dict) and entry.get("reason") else None
        if not isinstance(symbols, list) or not all(isinstance(name, str) for name in symbols):
            raise Misuse(f'{path}: changes: {idea!r} needs {{"reason": a text, "symbols": names}}')
        names |= dict.fromkeys(symbols, idea)

    if (name := submission.get("parent")) is None:
        return submission, names, None
    if not isinstance(name, str) or not re.fullmatch(r"train_gpt\.py|records/[^/]+(/train_gpt\.py)?", name):
        raise Misuse(f"{path}: parent {name!r}: null, train_gpt.py or records/NAME")
    parent = root / name / "train_gpt.py" if (root / name).is_dir() else root / name
    if not parent.is_file() or parent.resolve().parent == folder.resolve():
        raise Misuse(f"{path}: parent {name!r} is not a script of another folder")
    return submission, names, parent


@dataclass(frozen=True)
class Agreement:
    """How far a record has followed its parent inside the symbols that it declares.

    agreed: {symbol: fingerprint of the parent's code when both last agreed}, from AGREED.
    answers: {symbol: (fingerprint of the parent's code, reason for not taking it)}, from submission.json.
    """

    agreed: dict[str, str]
    answers: dict[str, tuple[str, str]]
    declared: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path, submission: dict, declared: Iterable[str]) -> Agreement:
        """Raises Misuse where a file holds something else."""
        path, answers = folder / AGREED, {}
        agreed = read_json(path) if path.exists() else {}
        if not isinstance(agreed, dict) or not all(isinstance(value, str) for value in agreed.values()):
            raise Misuse(f"{path}: an object {{symbol: hash}} is needed; `lineage.py agree` writes it")

        said = submission.get("answers", {})
        for name, entry in said.items() if isinstance(said, dict) else [("answers", None)]:
            entry = entry if isinstance(entry, dict) else {}
            parent, reason = entry.get("parent"), entry.get("reason")
            if not isinstance(parent, str) or not isinstance(reason, str) or not reason:
                text = f'{name!r} needs {{"parent": a hash, "reason": a text}}; `lineage.py agree` writes it'
                raise Misuse(f"{folder / 'submission.json'}: answers: {text}")
            answers[name] = parent, reason
        return cls(agreed, answers, tuple(declared))

    def shared(self, parent: Script, child: Script) -> list[str]:
        """Declared symbols that both scripts have: the others are new in the record, or gone from one."""
        return [name for name in self.declared
                if name in parent.by_name and name in child.by_name and parent.by_name[name].nodes]

    def open(self, parent: Script, child: Script) -> list[str]:
        """Symbols whose parent's code the record has neither agreed to, nor taken, nor answered."""
        found = []
        for name in self.shared(parent, child):
            now = parent.by_name[name].fingerprint()
            taken = now == child.by_name[name].fingerprint()
            answered = self.answers.get(name, ("", ""))[0] == now
            if not taken and not answered and self.agreed.get(name) != now:
                found.append(name)
        return found


def drift(parent: Script, child: Script, agreement: Agreement) -> Iterator[Place]:
    """Fixes of the parent inside declared symbols that the record has neither taken nor answered."""
    folder = child.path.parent.name
    new = []
    for name in agreement.open(parent, child):
        if name in agreement.agreed:
            text = f"the parent's {name} has changed since this record agreed with it"
            how = f"`lineage.py agree {folder} --dry-run` shows the change"
            yield child.by_name[name].first, f"{text}; {how}, `lineage.py diff --text` both texts"
        else:
            new.append(name)
    if new:
        names = ", ".join(new[:3]) + ", ..." * (len(new) > 3)
        text = f"{len(new)} declared symbols have never been agreed with the parent's: {names}"
        yield 1, f"{text}; `lineage.py agree {folder}` when they hold all of its fixes"


def moved(old: list[str], new: list[str]) -> list[str]:
    """Keys of both lists that left the order which the two share."""
    old, new = [key for key in old if key in set(new)], [key for key in new if key in set(old)]
    if old == new:
        return []
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    kept = {key for block in blocks for key in new[block.b : block.b + block.size]}
    return [key for key in new if key not in kept]


def undeclared(parent: Script, child: Script, declared: Iterable[str]) -> Iterator[Place]:
    """Every way in which a script differs from its parent outside the declared symbols and the docstring.

    Blank lines count where both scripts have the same two neighbours; elsewhere what came between is named.
    """
    free = {*declared, "docstring"}
    for name in {**child.by_name, **parent.by_name}:
        old, new = parent.by_name.get(name), child.by_name.get(name)
        if name not in free and (old is None or new is None or old.text != new.text):
            what = "in the parent" if old is None else "here" if new is None else "the parent's"
            yield new.first if new else 1, f"{name} is not {what}, and no idea under `changes` names it"
    own = {symbol.key for script in (parent, child) for symbol in script.symbols if free & {*symbol.names}}
    for (before, key), gap in child.gaps.items():
        if gap != parent.gaps.get((before, key), gap) and not own & {before, key}:
            line = child.by_key[key].first if key else len(child.lines)
            yield line, f"blank lines before {key or 'the end'} are not the parent's"
    for key in moved(parent.keys, child.keys):
        if key not in own:
            yield child.by_key[key].first, f"{key} does not stand where the parent has it"


def unchanged(parent: Script, child: Script, declared: Iterable[str]) -> Iterator[Place]:
    """Declared symbols that differ in nothing."""
    for name in declared:
        old, new = parent.by_name.get(name), child.by_name.get(name)
        if old is None and new is None:
            yield 1, f"{name} is declared and is neither here nor in the parent"
        elif old and new and old.text == new.text:
            yield new.first, f"{name} is declared and is the parent's"


def frame(script: Script) -> Iterator[Place]:
    """What is wrong with the rulers."""
    sections = [symbol for symbol in script.symbols if symbol.key.startswith("section ")]
    titles = [symbol.key.removeprefix("section ") for symbol in sections]
    if missing := [title for title in TITLES if title not in titles]:
        yield 1, f"no ruler {', '.join(missing)}"
    for title in moved(list(TITLES), titles):
        yield script.section(title).start, f"{title} is not in the order {', '.join(TITLES)}"
    for symbol, title in zip(sections, titles):
        lines, after = symbol.text.splitlines(), [*script.keys, "section"][script.keys.index(symbol.key) + 1]
        if title not in TITLES:
            yield symbol.first, f"the frame has no section {title}"
        if lines[:3] != [RULER, f"# {title}", RULER]:
            yield symbol.first, f"the ruler of {title} is not `{RULER}` above and below the title"
        if len(lines) == 3 and after.startswith("section"):
            yield symbol.first, f"{title} is empty and does not say why"


def sizes(script: Script, is_record: bool) -> Iterator[tuple[str, list[Place], str]]:
    """(rule, what breaks it, what to say if nothing does) of each budget.

    A cap on lines by itself is met by cramming, so bytes and the figures of density.py are capped too.
    """
    found = density.measure(script)
    count, allowed = found.lines, RECORD_LINES if is_record else TRUNK_LINES
    bad = [(count, f"{count} lines, {allowed} are allowed")] * (count > allowed)
    yield "lines", bad, f"{count} of {allowed} lines"
    if not is_record:
        bad = [(count, f"{found.size:,} bytes, {TRUNK_BYTES:,} are allowed")] * (found.size > TRUNK_BYTES)
        yield "bytes", bad, f"{found.size:,} of {TRUNK_BYTES:,} bytes"

    widths = [len(line.rstrip()) for line in script.lines]
    bad = [(i, f"{width} columns, {COLUMNS} are allowed") for i, width in enumerate(widths, 1)
           if width > COLUMNS]
    yield "columns", bad, f"{max(widths, default=0)} of {COLUMNS} columns"
    said = f"lines have {found.mean_column:.2f} columns on average, {MEAN_COLUMN} are allowed"
    yield "mean", [(1, said)] * (found.mean_column > MEAN_COLUMN), said
    said = f"{found.share_long:.2%} of the lines have over {density.LONG_LINE} columns, {SHARE_LONG:.0%} may"
    yield "long", [(1, said)] * (found.share_long > SHARE_LONG), said
    needed = "no paragraph: it needs a blank line or a comment line inside"
    bad = [(shape.line, f"{shape.name} has {shape.lines} lines and {needed}")
           for shape in found.without_paragraphs()]
    yield "paragraphs", bad, f"in every function of {density.LONG_FUNCTION} lines or more"

    main = [(node.lineno, node.end_lineno - node.lineno + 1) for node in script.tree.body
            if isinstance(node, FUNCTION) and node.name == "main"]
    bad = [(line, f"main has {count} lines, {MAIN_LINES} are allowed") for line, count in main
           if count > MAIN_LINES]
    yield "main", bad or [(1, "no main")] * (not main), f"at most {MAIN_LINES} lines"


def ahead(script: Script) -> Iterator[Place]:
    """Functions and classes that a reader meets before their section; AHEAD lists those that may be."""
    for name, (symbol, here, there) in used_in_earlier_section(script).items():
        if name not in AHEAD:
            yield symbol.first, f"{symbol.key} in {here} uses {name}, which {there} defines further down"


def environment(script: Script) -> Iterator[Place]:
    """Reads of the environment outside HYPERPARAMETERS. Handing it whole to `Hyperparameters`, be it through
    functions that do no more with it, reads nothing there."""
    above = {child: node for node in ast.walk(script.tree) for child in ast.iter_child_nodes(node)}
    functions = {node.name: node for node in script.tree.body if isinstance(node, FUNCTION)}
    imports = [node for node in above if isinstance(node, ast.ImportFrom)]
    from_os = [alias for node in imports if node.module in ("os", "posix", "nt") for alias in node.names]
    aliases = {alias.asname or alias.name for alias in from_os if alias.name in ENVIRONMENT}
    aliases |= ENVIRONMENT if any(alias.name == "*" for alias in from_os) else set()

    def handed_on(node: ast.AST, through: tuple[str, ...] = ()) -> bool:
        call, name = above[node], None
        if isinstance(call, ast.keyword):
            call, name = above[call], call.arg
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or node is call.func:
            return False
        function = functions.get(call.func.id)
        if function is None or function.name in through:
            return call.func.id == "Hyperparameters"
        if name is None:
            parameters = [*function.args.posonlyargs, *function.args.args]
            name = dict(zip(call.args, (parameter.arg for parameter in parameters))).get(node)
        names = [part for part in ast.walk(function) if isinstance(part, ast.Name) and part.id == name]
        return name is not None and all(handed_on(part, (*through, function.name)) for part in names)

    allowed = script.section("HYPERPARAMETERS")
    for node in above:
        word = getattr(node, "attr", getattr(node, "value", None))  # os.environ, getattr(os, "environ")
        named = isinstance(node, ast.Name) and node.id in aliases
        named = named or isinstance(word, str) and word in ENVIRONMENT
        if named and node.lineno not in allowed and not handed_on(node):
            yield node.lineno, f"`{ast.unparse(node)}` reads the environment outside HYPERPARAMETERS"


def repository_imports(script: Script, root: Path) -> Iterator[Place]:
    """Imports that a bare machine with only the script could not follow."""
    folders = (root, root / "scripts", root / "data", root / "tests", script.path.parent)
    own = {path.stem for folder in folders for path in folder.glob("*.py")}
    own |= {path.name for path in root.iterdir() if path.is_dir()} | {""}
    for node in ast.walk(script.tree):
        names, word = [], ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level or node.module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [part.value for part in node.args if isinstance(part, ast.Constant)]
        if any(str(name).partition(".")[0] in own - sys.stdlib_module_names for name in names):
            yield node.lineno, f"`{ast.unparse(node)}` imports from the repository"
        if word == "sys.path" or word.rpartition(".")[2] in LOADERS:
            yield node.lineno, f"`{word}` can load another file"


def runs(folder: Path) -> dict[str, dict]:
    """{seed folder: its metrics.json} of a record; raises Misuse for a file that is none."""
    found = {path.parent.name: read_json(path) for path in sorted(folder.glob("seed*/metrics.json"))}
    for name, metrics in found.items():
        if missing := {"val_bpb", "headline", "script_sha256"} - {*metrics}:
            raise Misuse(f"{folder / name / 'metrics.json'}: no {', '.join(sorted(missing))}")
    return found


def stale(folder: Path) -> list[str]:
    """Seed folders of a record whose numbers are another script's, and are not carried over to this one."""
    digest = hashlib.sha256((folder / "train_gpt.py").read_bytes()).hexdigest()
    submission = read_json(folder / "submission.json")
    return [name for name, metrics in runs(folder).items()
            if not family.carried(submission, metrics["script_sha256"], digest, name)]


def check(folder: Path, root: Path = ROOT) -> list[Finding]:
    """The house's rules for one script: a record's folder, the trunk's (`root`), or the path of a script.

    A twin is held to no parent and has no numbers.

    Returns findings `lineage/RULE` at `path:line` relative to `root`, a PASS where a rule holds. A frozen
    record is not compared with its parent; what is wrong with its frame, its size or its layout and what is
    dead in it are warnings; numbers of another text of its script are a failure, elsewhere a warning.
    """
    path, root = (folder / "train_gpt.py" if folder.is_dir() else folder).resolve(), root.resolve()
    shown = path.relative_to(root) if path.is_relative_to(root) else path
    trunk, found = path == root / "train_gpt.py" or path.name == TWIN, []

    def verdict(rule: str, bad: Iterable[Place], good: str, level: str = "FAIL") -> None:
        places = [Finding(f"lineage/{rule}", level, text, f"{shown}:{line}") for line, text in sorted(bad)]
        found.extend(places or [Finding(f"lineage/{rule}", "PASS", good, str(shown))])

    try:
        script, submission, parent = Script.read(path), {}, None
        if not trunk:
            submission, declared, parent = read_submission(path.parent, root)
            agreement = Agreement.read(path.parent, submission, declared)
            seeds, others = runs(path.parent), stale(path.parent)
        old = Script.read(parent) if parent else None
    except Misuse as error:
        return [Finding("lineage/readable", "FAIL", str(error), str(shown))]
    frozen = bool(submission.get("frozen"))
    if old is None or frozen:
        verdict("symbols", (), "frozen, its parent has moved on" if frozen else "has no parent")
    else:
        count = len(script.by_name)
        verdict("symbols", undeclared(old, script, declared), f"{count}, all the parent's or declared")
        verdict("unchanged", unchanged(old, script, declared), f"{len(declared)} declared, all changed")
        verdict("drift", drift(old, script, agreement), "the parent's fixes are taken or answered")
    softer = "WARN" if frozen else "FAIL"  # the house's rules have moved on from a frozen record
    verdict("frame", frame(script), "all rulers, in order", softer)
    for rule, bad, good in sizes(script, path.parent != root):
        verdict(rule, bad, good, softer)
    early = [(line, f"{name} is used here and defined in line {later}")
             for line, name, later in used_too_early(script)]
    if early or not (late := [*ahead(script)]):
        verdict("order", early, "nothing is used before it is defined")
    else:
        verdict("order", late, "", "WARN")
    verdict("environment", environment(script), "read only in HYPERPARAMETERS")
    verdict("imports", repository_imports(script, root), "nothing of the repository")
    dying: dict[bool, list[Place]] = {True: [], False: []}
    beside = [] if path.parent == root else sorted(path.parent.glob("*.py"))
    companions = [ast.parse(file.read_bytes()) for file in beside if not file.name.startswith("train_gpt")]
    for name, certain in dead(script, companions).items():
        symbol = script.by_name.get(name) or script.by_name["imports"]
        dying[certain and not frozen].append((symbol.first, f"nothing that runs reaches {name}"))
    for certain, level in ((True, "FAIL"), (False, "WARN")):
        if dying[certain] or certain and not dying[False]:
            verdict("dead", dying[certain], "main, load, score and stream reach every symbol", level)
    if not trunk:
        bad = [(1, f"{', '.join(others)}: numbers of another text of this script")] * bool(others)
        bad = bad or [(1, "no seed*/metrics.json")] * (not seeds)
        verdict("stale", bad, f"{len(seeds)} runs of this script", "FAIL" if frozen else "WARN")
    return found


# The family


@dataclass(frozen=True)
class Member:
    script: Path
    submission: dict
    declared: dict[str, str]  # {symbol: idea}
    parent: Path | None  # its script


def members(root: Path = ROOT) -> list[Member]:
    """All records, each after its parent.

    Raises:
        Misuse: a submission.json is missing or wrong, a parent is not there, or parents form a circle.
    """
    folders = family.records(root)
    waiting = [Member(folder / "train_gpt.py", *read_submission(folder, root)) for folder in folders]
    known, found = {None, root / "train_gpt.py"}, []
    while ready := [member for member in waiting if member.parent in known]:
        found += ready
        known |= {member.script for member in ready}
        waiting = [member for member in waiting if member not in ready]
    if waiting:
        raise Misuse(f"{waiting[0].script.parent / 'submission.json'}: its parents lead to no root")
    return found


def tree(root: Path, as_json: bool) -> int:
    rows, below = [], {}
    for member in members(root):
        folder, seeds = member.script.parent, runs(member.script.parent).values()
        row = {"name": folder.name, "parent": member.submission.get("parent"),
               "val_bpb": statistics.mean(run["val_bpb"] for run in seeds) if seeds else None,
               "headline": ", ".join(sorted({run["headline"] for run in seeds})), "seeds": len(seeds),
               "stale": bool(stale(folder)), "frozen": bool(member.submission.get("frozen")),
               "blurb": member.submission.get("blurb", "")}
        rows.append(row)
        below.setdefault(member.parent, []).append((member.script, row))

    def show(parent: Path | None, indent: str) -> None:
        for script, row in below.get(parent, ()):
            last = script == below[parent][-1][0]
            branch, rest = ("", "") if parent is None else ("└── ", "    ") if last else ("├── ", "│   ")
            number = f"{row['val_bpb']:.4f} {row['headline']}" if row["seeds"] else "no numbers"
            marks = "".join(f" [{mark}]" for mark in ("stale", "frozen") if row[mark])
            print(f"{indent}{branch}{row['name']}  {number}{marks}\n{indent}{rest}    {row['blurb']}")
            show(script, indent + rest)

    if as_json:
        print(json.dumps(rows, indent=1))
        return family.FINE
    print("train_gpt.py  the trunk")
    show(root / "train_gpt.py", "")
    show(None, "")
    return family.FINE


# Carrying fixes down


def git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True)
        return done.stdout.decode()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"").decode().strip() or error
        raise Misuse(f"git {' '.join(words)}: {reason}") from None


def history(path: Path, root: Path, since: str | None) -> list[Script]:
    """Committed versions of a script, newest first; with `since` back to what it was at that commit."""
    name, found = f"./{path.relative_to(root).as_posix()}", {}
    commits = git(root, "log", "--format=%H", f"{since}..HEAD" if since else "HEAD", "--", name).split()
    for commit in [*commits, *([since] if since else [])]:
        try:
            source = git(root, "show", f"{commit}:{name}")
            found.setdefault(source, Script(source, f"{commit[:10]}:{name}"))
        except (Misuse, UnicodeDecodeError):  # not there at that commit, or unfinished
            continue
    return list(found.values())


def merge_order(parent: list[str], child: list[str]) -> list[str]:
    """All keys in the parent's order; what only the child has stays after what it stood after."""
    following: dict[str, list[str]] = {}
    for before, key in zip(["", *child], child):
        if key not in set(parent):
            following.setdefault(before, []).append(key)
    found, waiting = [], [*reversed(parent), ""]
    while waiting:
        found.append(waiting.pop())
        waiting += reversed(following.get(found[-1], []))
    return found[1:]


def carry(parent: Script, past: list[Script], child: Script, declared: Iterable[str],
          chosen: Callable[[Symbol], bool]) -> tuple[Script, list[Finding]]:
    """The child with its parent's new texts; what was done and, as FAIL, what was left alone.

    A text that a version in `past` has is the parent's old one. The child stands on the version from which it
    differs least: what that has and the child lacks, the record dropped; what is newer, it gets.

    Raises:
        Misuse: the result would not parse, or would fall into other symbols than planned.
    """
    free, done = {*declared, "docstring"}, []
    own = {symbol.key for script in (parent, child) for symbol in script.symbols if free & {*symbol.names}}

    def distance(version: Script) -> int:
        texts = ({(key, symbol.text) for key, symbol in script.by_key.items() if key not in own}
                 for script in (version, child))
        return len({key for key, _ in set.symmetric_difference(*texts)})

    def note(rule: str, key: str, text: str, level: str = "PASS") -> None:
        line = f":{child.by_key[key].first}" if key in child.by_key else ""
        place = f"records/{child.path.parent.name}/{child.path.name}{line}"
        done.append(Finding(f"lineage/{rule}", level, f"{key}: {text}", place))

    base = min([parent, *past], key=distance)  # of equals the newest
    result = dict(child.by_key)
    for key, symbol in child.by_key.items():
        new = parent.by_key.get(key)
        if key in own or not chosen(symbol) or new and new.text == symbol.text:
            continue
        if not any(key in version.by_key and version.by_key[key].text == symbol.text for version in past):
            note("conflict", key, "not the parent's, now or before, and not declared; left alone", "FAIL")
        elif new:
            result[key] = new
            note("carried", key, "the parent's new text")
        elif any(member.owner == key and member.key in own for member in child.symbols):
            note("conflict", key, "gone from the parent, but the record adds to it; left alone", "FAIL")
        elif any(name in parent.by_name and parent.by_name[name].key in own for name in symbol.names):
            text = "the parent has it together with a symbol of the record; left alone"
            note("conflict", key, text, "FAIL")
        else:
            del result[key]
            note("removed", key, "gone from the parent")
    for key, symbol in parent.by_key.items():
        if key in child.by_key or key in own or not chosen(symbol):
            continue
        if key in base.by_key:
            note("conflict", key, "missing and not declared; left alone", "FAIL")
        elif symbol.owner and symbol.owner not in result:
            note("skipped", key, f"the record has no {symbol.owner}")
        else:
            result[key] = symbol
            note("added", key, "new in the parent")

    stays = {key for key in moved(parent.keys, child.keys) if key in own or not chosen(child.by_key[key])}

    def ordered(owner: str) -> list[str]:  # of the top level, or of the members of a class
        return merge_order(*([key for key, symbol in script.by_key.items() if symbol.owner == owner
                              and key in result and not (script is parent and key in stays)]
                             for script in (parent, child)))

    order = [key for head in ordered("") for key in (head, *ordered(head))]
    for key in moved(child.keys, order):
        note("moved", key, "to where the parent has it")
    parts = []
    for pair in zip(["", *order], [*order, ""]):
        here, there, key = child.gaps.get(pair), parent.gaps.get(pair), pair[1]
        if here is None:
            gap = there if there is not None else result[key].gap if key else child.tail
        else:
            old = any(version.gaps.get(pair) == here for version in past)
            gap = there if there is not None and old and not own & {*pair} else here
            if gap != here:
                note("carried", key or pair[0], "blank lines")
        parts += [gap, result[key].text if key else ""]
    script = Script("".join(parts), child.path)
    if script.keys != order or {*order} != {*result}:
        raise Misuse(f"{child.path}: would fall into other symbols than planned")
    return script, done


def sync(symbols: Iterable[str] = (), since: str | None = None, dry_run: bool = False,
         root: Path = ROOT) -> list[Finding]:
    """Carries the parents' new texts to all descendants that have an old one; writes all files or none.

    symbols: names, a class with its members; none = all. since: a commit; what is older does not count as the
    parent's. Declared symbols and frozen records stay as they are. Returns what was done and, as FAIL, what
    was left alone.

    Raises:
        Misuse: no git, an unknown commit or symbol, or a family that `members` refuses.
    """
    wanted, root = {*symbols}, root.resolve()
    now: dict[Path, Script] = {}  # scripts as they will be
    before: dict[Path, str] = {}
    known, found = set(), []
    for member in members(root):
        path = member.script
        now[path] = Script.read(path)
        before[path] = now[path].source
        if member.parent is None or member.submission.get("frozen"):
            continue
        parent = now.get(member.parent) or Script.read(member.parent)
        past = history(member.parent, root, since)
        if parent.source != before.get(member.parent, parent.source):
            past.insert(0, Script(before[member.parent]))

        known |= {name for script in (now[path], parent, *past) for name in script.by_name}
        try:
            now[path], done = carry(parent, past, now[path], member.declared,
                                    lambda symbol: not wanted or bool(wanted & {*symbol.names, symbol.owner}))
        except Misuse as error:
            text = f"{error}; nothing is written"
            return [*found, Finding("lineage/failed", "FAIL", text, str(path.relative_to(root)))]
        found += done

    if wanted - known:
        raise Misuse(f"{', '.join(sorted(wanted - known))}: no symbol of a parent or a descendant")
    changed = {path: script.source for path, script in now.items() if script.source != before[path]}
    if not dry_run:
        write_all(changed)
    places = ", ".join(path.parent.name for path in changed)
    text = f"{places} {'would be' if dry_run else 'is'} written; numbers there are stale until run again"
    return [*found, Finding("lineage/sync", "PASS", text if changed else "nothing to write")]


def change_of(name: str, before: str | None, parent: Script, past: Iterable[Script]) -> list[str]:
    """Lines of the parent's change of a symbol since its code had the fingerprint `before`."""
    for version in past:
        symbol = version.by_name.get(name)
        if symbol and symbol.fingerprint() == before:
            texts = [owner.by_name[name].text.splitlines() for owner in (version, parent)]
            return list(difflib.unified_diff(*texts, f"parent's {name} then", "now", lineterm=""))
    return [f"{name}: no committed version of the parent is the one that was agreed with"]


def agree(folder: Path, symbols: Iterable[str] = (), reason: str = "", dry_run: bool = False,
          root: Path = ROOT) -> list[str]:
    """Notes that a record's declared symbols hold all of their parent's fixes, as the parent is now.

    symbols: names; none = all that are declared. With a reason those that are open are answered by it: the
    record does without the parent's change. Returns the open symbols that are now settled.

    Raises:
        Misuse: no record with a parent, a frozen one, or a name that is not declared in both scripts.
    """
    place = folder / "submission.json"
    if folder.resolve().parent.name != "records":
        raise Misuse(f"{folder}: not a record: these are folders in records/")
    submission, declared, above = read_submission(folder, root)
    if above is None or submission.get("frozen"):
        raise Misuse(f"{folder.name}: {'frozen' if above else 'no parent'}: there is nothing to agree with")
    parent, child = Script.read(above), Script.read(folder / "train_gpt.py")
    agreement = Agreement.read(folder, submission, declared)
    shared = agreement.shared(parent, child)
    wanted = [*symbols] or shared
    if unknown := sorted({*wanted} - {*shared}):
        raise Misuse(f"{', '.join(unknown)}: not declared by {folder.name}, or not in both scripts")

    settled = [name for name in agreement.open(parent, child) if name in wanted]
    now = {name: parent.by_name[name].fingerprint() for name in wanted}
    agreed = {name: agreement.agreed[name] for name in shared if name in agreement.agreed}
    answers = {name: entry for name, entry in submission.get("answers", {}).items() if name in shared}
    if reason:
        answers |= {name: {"parent": now[name], "reason": reason} for name in settled}
    else:
        agreed |= now
        answers = {name: entry for name, entry in answers.items() if name not in wanted}
    if dry_run:
        return settled

    texts = {folder / AGREED: {name: agreed[name] for name in shared if name in agreed}}
    changed = {**submission, "answers": answers}
    if not answers:
        del changed["answers"]
    if changed != submission:
        texts[place] = changed
    write_all({path: as_json(value) for path, value in texts.items()})
    return settled


def agree_first(parent: Path, folder: Path, declared: Iterable[str]) -> bool:
    """Notes the parent's code of symbols that a record has just declared -> whether there was one.

    Until then they had to be the parent's, so this is where the two begin to differ.
    """
    scripts = Script.read(parent), Script.read(folder / "train_gpt.py")
    agreement = Agreement.read(folder, {}, declared)
    new = {name: scripts[0].by_name[name].fingerprint() for name in agreement.shared(*scripts)
           if name not in agreement.agreed}
    if new:
        write_all({folder / AGREED: as_json({**agreement.agreed, **new})})
    return bool(new)


def as_json(value: dict) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def report_agree(options: argparse.Namespace, root: Path) -> int:
    """Runs `agree` and prints what it settled; a dry run prints the parent's changes too."""
    folder, dry_run = find_script(options.record).parent, options.dry_run
    before = read_json(folder / AGREED) if (folder / AGREED).exists() else {}
    settled = agree(folder, options.symbols, options.reason, dry_run, root)
    if options.json:
        print(json.dumps({"record": folder.name, "settled": settled, "written": not dry_run}, indent=1))
        return family.FINE

    if dry_run and settled:
        above = read_submission(folder, root)[2]
        parent, past = Script.read(above), history(above.resolve(), root.resolve(), None)
        for symbol in settled:
            if symbol in before:
                print("\n".join(change_of(symbol, before[symbol], parent, past)) + "\n")
            else:
                print(f"{symbol}: never agreed with the parent's\n")
    done = "answered" if options.reason else "agreed"
    print(f"{folder.name}: {len(settled)} open symbols {'would be' if dry_run else 'are'} {done}")
    for name in settled:
        print(f"  {name}")
    return family.FINE


def write_all(texts: dict[Path, str]) -> None:
    """All files under temporary names, then a rename each: an error on the way leaves the old ones."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in texts}
    try:
        for path, text in texts.items():
            temporary[path].write_bytes(text.encode())
            if path.exists():
                shutil.copymode(path, temporary[path])
        for path in texts:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def arguments() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)

    part = commands.add_parser("diff", help="what became of every symbol", description=(
        "Symbols of b by idea, where b is a record of a, else by what became of those of a; lines that "
        "differ, dead symbols, defaults. A line that changed is one removed and one added. Exit code 0, 2 "
        "for misuse."))
    part.add_argument("a", help="a script, its folder, a record's name, or . for the trunk")
    part.add_argument("b", help="the same")
    part.add_argument("--text", action="store_true", help="with the text of what differs")

    part = commands.add_parser("check", help="the house's rules for scripts and their lineage", description=(
        "Is every difference declared, are frame and budgets kept. Exit code 1 if one FAILs, 2 for misuse."))
    part.add_argument("records", nargs="*", metavar="RECORD", help="script, folder or name (default: all)")

    part = commands.add_parser("density", help="how densely scripts are written", description=(
        "A table of lines, bytes, columns, tuple assignments and paragraphs; means and shares are over the "
        "lines that are not blank. Exit code 0, 2 for misuse."))
    part.add_argument("scripts", nargs="*", metavar="SCRIPT", help="any Python file (default: the family)")

    part = commands.add_parser("agree", help="declared symbols hold their parent's fixes", description=(
        "Notes in agreed.json that declared symbols hold all fixes of the parent as it is now; with "
        "--reason, in submission.json, why those that are open do without. Exit code 0, 2 for misuse."))
    part.add_argument("record", metavar="RECORD", help="its folder or name")
    part.add_argument("symbols", nargs="*", metavar="SYMBOL", help="declared ones (default: all)")
    part.add_argument("--reason", default="", metavar="TEXT", help="why the parent's change is not taken")
    part.add_argument("--dry-run", action="store_true", help="show what the parent changed, write nothing")

    part = commands.add_parser("sync", help="carry parents' new texts to descendants", description=(
        "Carries fixes down the tree. Exit code 1 where a descendant has a text of its own that it does not "
        "declare, or where nothing can be written; 2 for misuse."))
    part.add_argument("symbols", nargs="*", metavar="SYMBOL", help="a class: its members too (default: all)")
    part.add_argument("--since", metavar="COMMIT", help="what is older does not count as the parent's text")
    part.add_argument("--dry-run", action="store_true", help="show the plan, write nothing")
    part = commands.add_parser("carry", help="carry numbers over to the present script", description=(
        "Runs the script that made a record's numbers and the present one side by side, shortened, and "
        "compares them bit for bit. Equal: submission.json says so, and the numbers are no longer stale. "
        "Exit code 1 where they differ, 2 for misuse."))
    part.add_argument("records", nargs="*", metavar="RECORD", help="script, folder or name (default: all)")
    add_options(part)

    commands.add_parser("tree", help="the family with its numbers", description=(
        "Records below their parents: mean of the seeds, marks, the idea. Exit code 0, 2 for misuse."))
    for part in commands.choices.values():
        part.add_argument("--json", action="store_true", help="one JSON document instead of text")
    return parser


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    options = arguments().parse_args(argv)
    if options.command == "diff":
        return diff(find_script(options.a), find_script(options.b), options.text, options.json)
    if options.command == "tree":
        return tree(root, options.json)
    if options.command == "carry":
        return family.report(carry_records(options, root), options.json)
    if options.command == "sync":
        return family.report(sync(options.symbols, options.since, options.dry_run, root), options.json)
    if options.command == "agree":
        return report_agree(options, root)

    twins = sorted([*root.glob(TWIN), *root.glob(f"records/*/{TWIN}")])
    scripts = [root / "train_gpt.py", *family.records(root), *twins]
    if options.command == "density":
        rows = density.rows(map(find_script, options.scripts or scripts), root)
        table = family.markdown_table(list(density.HEADER), [density.cells(row) for row in rows])
        print(json.dumps(rows, indent=1) if options.json else table)
        return family.FINE

    scripts = [*map(find_script, options.records)] or scripts
    return family.report([finding for script in scripts for finding in check(script, root)], options.json)


if __name__ == "__main__":
    family.command(main)
