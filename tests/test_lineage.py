"""scripts/lineage.py and scripts/symbols.py on small families with a history, and on the real one."""

import ast
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import density
import jsonschema
import lineage
import pytest
from conftest import ROOT
from family import Misuse, find_script
from hypothesis import given, settings
from hypothesis import strategies as st
from symbols import Script, dead, used_too_early

RULER = lineage.RULER
BODIES = {
    "HYPERPARAMETERS": '''
class Var:
    """A variable."""

    def __init__(self, default):
        self.default = default


class Hyperparameters:
    """Settings."""

    _data = "Data"
    width = Var(8)
    depth = Var(2)  # blocks

    def __init__(self, environ):
        self.width = int(environ.get("WIDTH", 8)) + self.depth.default
''',
    "RUNTIME": '''
# Seconds.
LIMIT, GRACE = 600, 5


def clock(start):
    """Left."""
    return LIMIT - GRACE - start
''',
    "MODEL": '''
@staticmethod
def shape(width):
    return (width, width)


class Model:
    """Weights."""

    scale = 1.0

    def __init__(self, args):
        self.size = shape(args.width)

    # Heads

    @property
    def heads(self):
        return self.size[0] * self.scale
''',
    "ARTIFACT": '''
codec = None
try:
    import zstandard as codec
except ImportError:
    pass


def load(path, device):
    return Model(path) if codec else None
''',
    "EVALUATION": '''
def score(model, ids):
    return model.heads
''',
    "GENERATION": '''
class Stream:
    def __init__(self, model):
        self.model = model

    def logprobs(self):
        return self.model

    def push(self, token):
        pass


stream = Stream
''',
    "TRAINING": '''
def main():
    args = Hyperparameters(os.environ)
    return clock(args.width) + math.pi


if __name__ == "__main__":
    main()
''',
}


def script_of(**bodies: str) -> str:
    """The small trunk, with some sections replaced."""
    text = '"""The trunk."""\n\nimport math\nimport os\n\n'
    for title in lineage.TITLES:
        body = {**BODIES, **bodies}.get(title.replace(" ", "_"), "# None: nothing here.\n")
        text += f"{RULER}\n# {title}\n{RULER}\n" + (f"\n{body}\n\n" if body[0] == "\n" else f"{body}\n")
    return text.rstrip("\n") + "\n"


TRUNK = script_of()
FIELDS = ["    width = Var(8)\n", "    depth = Var(2)  # blocks\n"]
SWAP = "".join(FIELDS), "".join(reversed(FIELDS))


class Family:
    """A trunk and records in a repository of their own."""

    def __init__(self, root):
        self.root, self.trunk = root, root / "train_gpt.py"
        self.git("init", "-q")
        self.trunk.write_text(TRUNK)
        self.commit()

    def git(self, *words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(self.root), *identity, *words], check=True, capture_output=True)

    def commit(self):
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "step")

    def record(self, name, source=TRUNK, changes=(), parent="train_gpt.py", **more):
        folder = self.root / "records" / name
        (folder / "seed42").mkdir(parents=True)
        (folder / "train_gpt.py").write_text(source)
        ideas = {"idea": {"reason": "why", "symbols": list(changes)}} if changes else {}
        entry = {"parent": parent, "changes": ideas, "blurb": f"The idea of {name}.", **more}
        (folder / "submission.json").write_text(json.dumps(entry))
        digest = hashlib.sha256(source.encode()).hexdigest()
        metrics = {"val_bpb": 1.25, "headline": "final_int6_sliding", "script_sha256": digest}
        (folder / "seed42" / "metrics.json").write_text(json.dumps(metrics))
        above = self.root / parent if parent else None
        above = above / "train_gpt.py" if above and above.is_dir() else above
        if above and above.is_file():
            lineage.agree_first(above, folder, changes)
        return folder

    def text(self, name):
        return (self.root / "records" / name / "train_gpt.py").read_text()

    def edit(self, old, new):
        """Changes the trunk, not committed."""
        source = self.trunk.read_text()
        assert source.count(old) == 1, (source.count(old), old)
        self.trunk.write_text(source.replace(old, new))

    def fails(self, folder="."):
        """[(rule, text)] of what fails in a record's folder, by its path or name, or in the trunk."""
        folder = self.root / (f"records/{folder}" if isinstance(folder, str) and folder != "." else folder)
        return failures(lineage.check(folder, self.root))

    def sync(self, *symbols, **options):
        """{(rule, symbol): level} of what was done."""
        found = lineage.sync(symbols, root=self.root, **options)
        return {(f.rule.removeprefix("lineage/"), f.text.partition(":")[0]): f.level for f in found[:-1]}


@pytest.fixture
def family(tmp_path):
    return Family(tmp_path)


def failures(findings, level="FAIL"):
    return [(f.rule.removeprefix("lineage/"), f.text) for f in findings if f.level == level]


def replaced(old, new, source=TRUNK):
    assert source.count(old) == 1, (source.count(old), old)
    return source.replace(old, new)


# --- Symbols ---


def joined(script):
    return "".join(symbol.gap + symbol.text for symbol in script.symbols) + script.tail


def test_names_of_symbols():
    assert Script(TRUNK).keys == [
        "docstring", "imports", "section HYPERPARAMETERS", "Var", "Var.__init__", "Hyperparameters",
        "Hyperparameters._data", "Hyperparameters.width", "Hyperparameters.depth", "Hyperparameters.__init__",
        "section RUNTIME", "LIMIT, GRACE", "clock", "section ATTENTION", "section DATA", "section QUANTISER",
        "section AUXILIARY OBJECTIVES", "section MODEL", "shape", "Model", "Model.scale", "Model.__init__",
        "Model.heads", "section OPTIMIZERS", "section ARTIFACT", "codec", "codec#2", "load",
        "section EVALUATION", "score", "section GENERATION", "Stream", "Stream.__init__", "Stream.logprobs",
        "Stream.push", "stream", "section TRAINING", "main", "if __name__ == '__main__'"]


def test_a_symbol_owns_its_decorators_and_comments():
    symbols = Script(TRUNK).by_name
    assert symbols["LIMIT"] is symbols["GRACE"]
    assert symbols["LIMIT"].text == "# Seconds.\nLIMIT, GRACE = 600, 5\n"
    assert symbols["shape"].text.startswith("@staticmethod\ndef")
    assert symbols["Model"].text == 'class Model:\n    """Weights."""\n'
    assert symbols["Model.heads"].text.startswith("    # Heads\n\n    @property\n")
    assert symbols["section DATA"].text == f"{RULER}\n# DATA\n{RULER}\n# None: nothing here.\n"
    assert symbols["Hyperparameters.depth"].text == "    depth = Var(2)  # blocks\n"


def test_odd_layouts_keep_every_byte_and_every_name():
    source = ("#!/usr/bin/env python\n# a remark\n\nimport a; import b\nx = 1; y = 2\nclass A: z = 3\n"
              "class B(\n    A,\n):\n    # first\n    def f(self): pass\n\n    @property\n"
              "    def g(self): pass\n    @g.setter\n    def g(self, v): pass\n    # the end of B\n\n"
              "# of h\n\n\ndef h():\n"
              "    return '''\n# not a comment\n'''\n\n  \nif x:\n    def k(): pass\nelse:\n"
              "    def k(): pass\n"
              "torch.setup(1)\n__all__ = ['h']\n__all__ += ['k']\nclass C:\n    pass\n# tail\n\n")
    script = Script(source)
    assert joined(script) == source
    assert script.keys == ["imports", "x, y", "A, A.z", "B", "B.f", "B.g", "B.g#2", "h", "k", "torch.setup()",
                           "__all__", "__all__#2", "C", "C.pass"]
    assert script.by_name["B.g#2"].text.endswith("    # the end of B\n")
    assert script.by_name["h"].text.startswith("# of h\n\n\ndef h")
    for newline in ("\r\n", "\r"):
        other = source.replace("\n", newline)
        assert joined(Script(other)) == other and Script(other).keys == script.keys
    for source in ("", "\n\n", "# alone\n", "x = 1", f"{RULER}\n# DATA\n{RULER}"):
        assert joined(Script(source)) == source
    with pytest.raises(Misuse, match="does not parse"):
        Script("def f(:\n")


PIECES = st.sampled_from([
    "\n", "\n\n", "   \n", "# c\n", "    # indented\n", f"{RULER}\n# DATA\n{RULER}\n", f"{RULER}\n# M\n",
    "x = 1\n", "import os\n", "a, b = 1, 2; c = 3\n", "@d\ndef f():\n    return 1\n", "def f(): pass\n",
    "class A: pass\n", "f(\n\n# in\n)\n", "if x:\n    y = '''\n\n'''\n", "\f\n",
    'class B:\n    """D."""\n\n    x = 1\n    # of y\n    y: int = 2\n',
    "class B:\n    def f(self):\n        pass\n    # end\n",
    "try:\n    import q\nexcept ImportError:\n    q = None\n", '"""\n# text\n\n"""\n',
    "s = 'a\\\nb'\n", "class E:\n\n    def f(self): pass\n\n\n    g = 1\n", "x = '\u2028'\n"])


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=8), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_symbols_and_gaps_are_the_source_again(pieces, newline, cut):
    source = "".join(pieces).replace("\n", newline)
    source = source.rstrip("\r\n") if cut else source
    script = Script(source)
    assert joined(script) == source
    assert len({name for symbol in script.symbols for name in symbol.names}) == sum(
        len(symbol.names) for symbol in script.symbols)
    assert all(symbol.text.strip() for symbol in script.symbols)
    blank = [symbol.gap for symbol in script.symbols[1:]] + [script.tail] * bool(script.symbols)
    assert not any(gap.strip() for gap in blank)


# --- Reachability ---


def test_nothing_of_the_small_trunk_is_dead():
    assert dead(Script(TRUNK)) == {}


@pytest.mark.parametrize("add, to, found", [
    ("\ndef f():\n    return g()\n\n\ndef g():\n    return f()\n", "RUNTIME", {"f": True, "g": True}),
    ("\ndef f():\n    pass\n\n\ndef g(f):\n    return f\n\n\nX = g(1)\nprint(X)\n", "DATA", {"f": True}),
    ("\ndef f():\n    pass\n\n\nTABLE = {1: f}\n", "DATA", {"f": True, "TABLE": False}),
    ("\nclass K:\n    x = 1\n\n    def m(self):\n        pass\n", "MODEL",
     {"K": True, "K.x": False, "K.m": True}),
    ("\nclass K(Base):\n    def m(self):\n        pass\n\n    def forward(self):\n        pass\n\n\nK()\n",
     "MODEL", {"K.m": False}),
    ("\nclass K:\n    def m(self):\n        self.m\n\n\nK()\n", "MODEL", {"K.m": True}),
    ("\nclass K:\n    def heads(self):\n        pass\n", "MODEL", {"K": True, "K.heads": True}),
    ("\nclass K:\n    def m(self):\n        pass\n\n\ngetattr(K(), 'm')\n", "MODEL", {}),
    ("\nclass K:\n    n = 1\n\n    def m(self, k=n):\n        pass\n\n\nK().m()\n", "MODEL", {}),
    ("\nX = [1]\nwith open(X[0]):\n    Y = 2\n", "DATA", {}),
])
def test_dead_symbols(add, to, found):
    body = BODIES[to] + "\n" + add if to in BODIES else add
    assert dead(Script(script_of(**{to: body}))) == found


def test_dead_variables_and_imports():
    more = "    depth = Var(2)\n    master_port = Var('')\n    lost = Var(1)\n"
    source = replaced("    depth = Var(2)  # blocks\n", more)
    assert dead(Script(replaced("import os\n", "import json\nimport os\n", source))) == {
        "import json": False, "Hyperparameters.lost": False}
    assert dead(Script(source.replace('"WIDTH"', '"LOST"'))) == {}  # read by the variable's name


# --- Comparing ---


def test_compare_says_what_became_of_each_symbol(tmp_path):
    child = TRUNK
    for old, new in [('"""Left."""', '"""What is left."""'), ("(width, width)", "(width,)"),
                     ("    scale = 1.0\n\n", ""), ("class Stream:", "# A new remark.\nclass Stream:"),
                     ("import math\n", "import json\nimport math\n"), ("# Seconds.", "# seconds"),
                     ("Var(8)", "Var(16)"), ("\n\ndef main", "\n\ndef added():\n    pass\n\n\ndef main")]:
        child = replaced(old, new, child)
    (tmp_path / "a.py").write_text(TRUNK)
    (tmp_path / "b.py").write_text(child)
    found = {pair.name: pair.status for pair in lineage.compare(tmp_path / "a.py", tmp_path / "b.py")}
    assert {name: status for name, status in found.items() if status != "identical"} == {
        "clock": "same code", "shape": "changed", "Model.scale": "removed", "Stream": "same code",
        "imports": "changed", "LIMIT": "same code", "GRACE": "same code", "Hyperparameters.width": "changed",
        "added": "added"}
    assert lineage.changed_symbols(tmp_path / "a.py", tmp_path / "b.py") == [
        "imports", "Hyperparameters.width", "LIMIT", "GRACE", "clock", "shape", "Stream", "added",
        "Model.scale"]
    pairs = {pair.name: pair for pair in lineage.compare(tmp_path / "a.py", tmp_path / "b.py")}
    assert pairs["added"].dead == (False, True) and pairs["shape"].likeness() == pytest.approx(2 / 3)


def test_diff_prints_defaults_and_with_text_the_texts(tmp_path, capsys):
    (tmp_path / "a.py").write_text(TRUNK + "os.environ.get('OLD', '3')\n")
    (tmp_path / "b.py").write_text(replaced("Var(8)", "Var(16)"))
    call = ["diff", str(tmp_path / "a.py"), str(tmp_path / "b.py")]
    assert lineage.main(call) == 0
    shown = capsys.readouterr().out
    assert "| WIDTH | 8 | 16 |" in shown and "| OLD | '3' |  |" in shown and "Var(16)" not in shown
    assert lineage.main([*call, "--text"]) == 0
    assert "+    width = Var(16)\n" in capsys.readouterr().out
    assert lineage.main([*call, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"variable": "WIDTH", "a": "8", "b": "16"} in shown["defaults"]
    symbols = {row["name"]: row for row in shown["symbols"]}
    width = symbols["Hyperparameters.width"]
    assert (width["status"], width["added"], width["removed"], width["diff"]) == ("changed", 1, 1, [])


def test_diff_counts_lines_by_status(tmp_path, capsys):
    child = replaced("    scale = 1.0\n\n", "", replaced("# Seconds.", "# seconds"))
    child = replaced("    return (width, width)\n", "    width += 1\n    return (width, width)\n", child)
    for name, source in (("a.py", TRUNK), ("b.py", child)):
        (tmp_path / name).write_text(source)
    assert lineage.main(["diff", str(tmp_path / "a.py"), str(tmp_path / "b.py")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[3:] == [
        f"identical: {len(Script(TRUNK).by_name) - 4}",
        "same code, other text: 2, +1 -1", "  LIMIT, GRACE  +1 -1",
        "changed: 1, +1 -0", "  shape  +1 -0  86% of its lines",
        "added: 0, +0 -0", "removed: 1, +0 -1", "  Model.scale  +0 -1", "", "4 lines differ (+2 -2)"]


def test_diff_of_a_record_goes_by_its_ideas(family, capsys):
    source = replaced("scale = 1.0", "scale = 2.0", replaced("# Seconds.", "# seconds"))
    folder = family.record("A", source.replace("The trunk.", "A."), ["Model.scale", "LIMIT"])
    assert lineage.main(["diff", str(family.trunk), str(folder)], family.root) == 0
    shown = capsys.readouterr().out.splitlines()
    at = shown.index("idea: 2, +2 -2")
    assert shown[at + 1 : at + 3] == ["  LIMIT, GRACE  +1 -1  same code",
                                      "  Model.scale  +1 -1  changed  0% of its lines"]
    assert any(line.startswith("no idea: 2, ") for line in shown) and "  docstring  +1 -1" in "\n".join(shown)
    assert shown[-1].endswith(" lines differ (+4 -4)")


# --- Checking ---


def test_a_copy_passes(family):
    findings = lineage.check(family.record("A"), family.root)
    assert {f.level for f in findings} == {"PASS"}
    assert {f.rule.removeprefix("lineage/") for f in findings} == {
        "symbols", "unchanged", "drift", "frame", "lines", "columns", "mean", "long", "paragraphs", "main",
        "order", "environment", "imports", "dead", "stale"}
    findings = lineage.check(family.root, family.root)
    assert {f.level for f in findings} == {"PASS"} and "lineage/bytes" in {f.rule for f in findings}


@pytest.mark.parametrize("old, new, names", [
    ("def clock", "def timer", ["clock", "timer"]),  # renamed: the call is in main
    ("return (width, width)", "return (width,  width)", ["shape"]),
    ("# Seconds.", "# seconds.", ["LIMIT", "GRACE"]),
    ("# Heads", "# heads", ["Model.heads"]),
    ("@staticmethod\n", "@functools.cache\n", ["shape"]),
    ('"""Weights."""', '"""The weights."""', ["Model"]),
    ("class Model:", "class Model(object):", ["Model"]),
    ("scale = 1.0", "scale = 2.0", ["Model.scale"]),
    ("# blocks", "# layers", ["Hyperparameters.depth"]),
    ("import math\n", "import json\nimport math\n", ["imports"]),
    ("LIMIT, GRACE = 600, 5", "LIMIT, GRACE, MORE = 600, 5, 1", ["LIMIT", "GRACE", "MORE"]),
    (f"# DATA\n{RULER}\n# None: nothing here.", f"# DATA\n{RULER}\n# None: no data.", ["section DATA"]),
    ("import zstandard as codec", "import lzma as codec", ["codec#2"]),
    ("    scale = 1.0\n\n", "", ["Model.scale"]),
    ("    main()\n", "    sys.exit(main())\n", ["if __name__ == '__main__'"]),
])
def test_a_difference_has_to_be_declared(family, old, new, names):
    source = replaced(old, new)
    shown = family.fails(family.record("A", source))
    assert sorted(text.split(" is not ")[0] for rule, text in shown if rule == "symbols") == sorted(names)
    shown = family.fails(family.record("B", source, names))
    assert not {"symbols", "unchanged"} & {rule for rule, _ in shown}
    if len(names) > 1:  # each of them
        shown = family.fails(family.record("C", source, names[1:]))
        assert [text.split(" is not ")[0] for rule, text in shown if rule == "symbols"] == names[:1]


@pytest.mark.parametrize("old, new, text", [
    ("\n\n\ndef clock", "\n\ndef clock", "blank lines before clock"),
    ("    scale = 1.0\n\n", "    scale = 1.0\n", "blank lines before Model.__init__"),
    ("    main()\n", "    main()\n\n", "blank lines before the end"),
    ("\n\nif __name__", "\n  \nif __name__", "blank lines before if __name__"),
])
def test_blank_lines_count(family, old, new, text):
    (rule, found), = family.fails(family.record("A", replaced(old, new)))
    assert rule == "symbols" and found.startswith(text)


def test_blank_lines_beside_a_declared_symbol_are_free(family):
    source = replaced("def clock", "def more():\n    pass\n\n\n\ndef clock")
    source = replaced("    return clock(", "    more()\n    return clock(", source)
    assert not family.fails(family.record("A", source, ["more", "main"]))


def test_order_counts(family):
    body = BODIES["EVALUATION"].strip("\n")
    source = replaced(body + "\n\n\n", "", TRUNK)
    source = replaced("def load", body + "\n\n\ndef load", source)
    shown = [text for rule, text in family.fails(family.record("A", source)) if rule == "symbols"]
    assert "score does not stand where the parent has it" in shown
    swapped = replaced(*SWAP)
    (rule, text), = family.fails(family.record("B", swapped))
    assert rule == "symbols" and "does not stand where" in text


def test_the_docstring_is_free_and_not_to_be_declared_in_vain(family):
    source = TRUNK.replace("The trunk.", "A record.\n\nIts idea.")
    findings = lineage.check(family.record("A", source), family.root)
    assert not failures(findings)
    shown = family.fails(family.record("B", source, ["clock", "nowhere"]))
    assert sorted(shown) == [("unchanged", "clock is declared and is the parent's"),
                             ("unchanged", "nowhere is declared and is neither here nor in the parent")]


@pytest.mark.parametrize("old, new, text", [
    (f"{RULER}\n# DATA\n{RULER}\n# None: nothing here.\n", "", "no ruler DATA"),
    (f"# DATA\n{RULER}\n# None: nothing here.\n", f"# DATA\n{RULER}\n", "DATA is empty"),
    (f"# DATA\n{RULER}", f"# DATA\n{RULER}-", "the ruler of DATA"),
    ("# DATA\n", "# DATEN\n", "no section DATEN"),
    (f"{RULER}\n# QUANTISER", f"{RULER}\n# EXTRA\n{RULER}\n# Why.\n\n{RULER}\n# QUANTISER",
     "no section EXTRA"),
])
def test_the_frame(family, old, new, text):
    family.edit(old, new)
    assert any(rule == "frame" and text in found for rule, found in family.fails())


def test_the_order_of_the_frame(family):
    other = TRUNK.replace("# DATA\n", "# X\n").replace("# MODEL\n", "# DATA\n").replace("# X\n", "# MODEL\n")
    family.trunk.write_text(other)
    shown = family.fails()
    assert shown and {rule for rule, _ in shown} == {"frame"} and "not in the order" in shown[0][1]


def test_budgets(family, monkeypatch):
    long = replaced("    return clock(", "\n" + "    pass\n" * 57 + "    return clock(")
    assert family.fails(family.record("A", long, ["main"])) == [
        ("main", "main has 61 lines, 60 are allowed")]
    fits = replaced("    return clock(", "\n" + "    pass\n" * 56 + "    return clock(")
    assert not family.fails(family.record("B", fits, ["main"]))
    wide = replaced("# Seconds.", "# " + "é" * 109)
    assert family.fails(family.record("C", wide, ["LIMIT", "GRACE"])) == [
        ("columns", "111 columns, 110 are allowed")]
    monkeypatch.setattr(lineage, "TRUNK_LINES", TRUNK.count("\n") - 1)
    assert [rule for rule, _ in family.fails()] == ["lines"]
    assert not family.fails("B")  # records have another budget
    monkeypatch.setattr(lineage, "RECORD_LINES", TRUNK.count("\n") - 1)
    assert "lines" in [rule for rule, _ in family.fails("B")]
    nowhere = replaced("def main", "def start", replaced("    main()", "    start()"))
    assert ("main", "no main") in family.fails(family.record("D", nowhere, ["main", "start"]))


def test_a_trunk_has_a_budget_of_bytes_and_a_record_has_none(family, monkeypatch):
    folder = family.record("A")
    monkeypatch.setattr(lineage, "TRUNK_BYTES", len(TRUNK.encode()))
    assert not family.fails()
    monkeypatch.setattr(lineage, "TRUNK_BYTES", len(TRUNK.encode()) - 1)
    assert [rule for rule, _ in family.fails()] == ["bytes"]
    assert not family.fails(folder)


def test_the_mean_column_is_over_lines_that_are_not_blank(family, monkeypatch):
    widths = [len(line) for line in TRUNK.splitlines() if line]
    monkeypatch.setattr(lineage, "MEAN_COLUMN", sum(widths) / len(widths))
    assert not family.fails()
    family.trunk.write_text(TRUNK.replace("\n\n\ndef clock", "\n\n\n\n\ndef clock"))
    assert not family.fails()  # more blank lines make it no lower, nor higher
    family.edit("# Seconds.", "# Seconds, of a run.")
    assert [rule for rule, _ in family.fails()] == ["mean"]


def test_a_few_long_lines_are_allowed(family, monkeypatch):
    lines = sum(1 for line in TRUNK.splitlines() if line)
    monkeypatch.setattr(lineage, "SHARE_LONG", 1.5 / lines)
    family.edit("# Seconds.", "# " + "x" * 99)
    assert not family.fails()
    family.edit("# Heads", "# " + "x" * 94)
    assert not family.fails()  # 100 columns
    family.edit("# " + "x" * 94 + "\n", "# " + "x" * 95 + "\n")
    assert [rule for rule, _ in family.fails()] == ["long"]


STATEMENTS = "    pass\n" * 9


@pytest.mark.parametrize("body, fine", [
    ("    pass\n" * 18, True),  # 19 lines
    ("    pass\n" * 19, False),
    (f"{STATEMENTS}\n{STATEMENTS}    pass\n", True),
    (f"{STATEMENTS}    # Then this.\n{STATEMENTS}    pass\n", True),
    (f"    # First this.\n{STATEMENTS}{STATEMENTS}    pass\n", True),
    (f"    pass  # a remark\n{STATEMENTS}{STATEMENTS}", False),
    (f'    """What it does.\n\n    More.\n    """\n\n{STATEMENTS}{STATEMENTS}', False),
    (f'    """What it does."""\n    # First this.\n{STATEMENTS}{STATEMENTS}', True),
    (f'{STATEMENTS}{STATEMENTS}    return """\n\n# no comment\n"""\n', False),
    (f"{STATEMENTS}{STATEMENTS}    pass\n\n    # the end\n", False),
    (f"    def inner():\n        pass\n\n    inner()\n{STATEMENTS}{STATEMENTS}", True),
    ("    def inner():\n" + "        pass\n" * 30 + "\n    inner()\n", True),  # one function, with a pause
], ids=range(12))
def test_a_long_function_needs_paragraphs(body, fine):
    script = Script(f"def f():\n{body}\n\nclass A:\n    x = 1\n")
    bad = [shape.name for shape in density.measure(script).without_paragraphs()]
    assert bad == ([] if fine else ["f"])


def test_paragraphs_are_asked_of_methods(family):
    family.edit("    return self.size[0] * self.scale\n", "    pass\n" + "        pass\n" * 18)
    (rule, text), = family.fails()
    assert rule == "paragraphs" and text.startswith("Model.heads has 20 lines and no paragraph")


def test_of_a_frozen_record_budgets_and_frame_are_warnings(family, monkeypatch):
    monkeypatch.setattr(lineage, "MEAN_COLUMN", 1)
    source = replaced(f"{RULER}\n# ATTENTION\n{RULER}\n# None: nothing here.\n\n", "")
    findings = lineage.check(family.record("F", source, frozen=True), family.root)
    assert not failures(findings) and {"frame", "mean"} <= {rule for rule, _ in failures(findings, "WARN")}


def test_density_is_a_table(family, capsys):
    family.record("A")
    other = family.root / "other.py"
    other.write_text("a, b = 1, 2\nc, d = b, a\ne, f = range(2)\n\n\ndef f():\n" + "    pass\n" * 13
                     + "\n    # Done.\n    def g():\n        pass\n" + "#" * 101 + "\n")
    assert lineage.main(["density", str(other)], family.root) == 0
    header, _, row = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    size = len(other.read_text())
    mean = f"{sum(map(len, other.read_text().splitlines())) / 21:.1f}"
    shown = dict(zip(header, row))
    assert [*shown.values()] == ["other.py", "24", str(size), mean, "4.8%", "2", "1", "1", "1", "0", "0"]
    assert lineage.main(["density", "--json"], family.root) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["script"] for row in rows] == ["train_gpt.py", "records/A/train_gpt.py"]
    assert [row["bytes"] for row in rows] == [len(TRUNK.encode())] * 2


@pytest.mark.parametrize("line, bad", [
    ("X = clock(LATE)", True), ("@late\ndef f():\n    pass", True), ("class K(Late):\n    pass", True),
    ("def f(x=LATE):\n    pass", True), ("class K:\n    x = LATE", True),
    ("X = [y + LATE for y in (1,)]", True), ("def f():\n    return LATE", False),
    ("def f(x: Late) -> Late:\n    pass", False), ("x: Late = 1", False),
    ("X = [LATE for LATE in (1,)]", False), ("class K:\n    LATE = 1\n    x = LATE", False),
    ("F = lambda: LATE", False), ("F = lambda x=LATE: x", True),
    ("for LATE in (1,):\n    print(LATE)", False)])
def test_a_module_reads_nothing_before_it_is_defined(line, bad):
    script = Script(f"{line}\n\n\ndef late():\n    pass\n\n\nclass Late:\n    pass\n\n\nLATE = 1\n")
    assert bool([*used_too_early(script)]) == bad


def test_what_a_later_section_defines_is_a_warning_unless_listed(family, monkeypatch):
    family.edit("    return LIMIT - GRACE - start", "    return LIMIT - GRACE - start + load('', None)")
    findings = lineage.check(family.root, family.root)
    assert failures(findings, "WARN") == [
        ("order", "clock in RUNTIME uses load, which ARTIFACT defines further down")]
    monkeypatch.setitem(lineage.AHEAD, "load", "a reason")
    assert not failures(lineage.check(family.root, family.root), "WARN")
    family.edit("def score(model, ids):", "def score(model: Stream, ids) -> Stream:")
    assert not failures(lineage.check(family.root, family.root), "WARN")  # annotations are for the reader


# --- Parents' fixes inside declared symbols ---


OWN_CLOCK = replaced("return LIMIT - GRACE - start", "return LIMIT - GRACE - 2 * start")


def drifting(family, record="A"):
    """Symbols that `check` names, by the first words of its lines."""
    shown = [text for rule, text in family.fails(record) if rule == "drift"]
    return [text.removeprefix("the parent's ").partition(" has changed")[0] for text in shown]


def test_a_fix_of_the_parent_inside_a_declared_symbol_is_named_until_it_is_taken(family, capsys):
    folder = family.record("A", OWN_CLOCK, ["clock"])
    family.commit()
    assert not family.fails("A")
    family.edit("return LIMIT - GRACE - start", "return max(0, LIMIT - GRACE - start)")
    assert drifting(family) == ["clock"]
    before = (folder / lineage.AGREED).read_text(), (folder / "submission.json").read_text()
    assert lineage.main(["agree", str(folder), "--dry-run"], family.root) == 0
    shown = capsys.readouterr().out
    assert "-    return LIMIT - GRACE - start\n+    return max(0, LIMIT - GRACE - start)\n" in shown
    assert before == ((folder / lineage.AGREED).read_text(), (folder / "submission.json").read_text())

    taken = OWN_CLOCK.replace("LIMIT - GRACE - 2 * start", "max(0, LIMIT - GRACE - 2 * start)")
    (folder / "train_gpt.py").write_text(taken)
    assert drifting(family) == ["clock"]  # nobody has said so yet
    assert lineage.main(["agree", str(folder), "clock", "--json"], family.root) == 0
    assert json.loads(capsys.readouterr().out) == {"record": "A", "settled": ["clock"], "written": True}
    assert not family.fails("A")
    family.edit("max(0, LIMIT", "max(1, LIMIT")
    assert drifting(family) == ["clock"]


def test_a_fix_may_be_answered_and_the_answer_holds_for_that_fix(family):
    folder = family.record("A", OWN_CLOCK, ["clock", "Model.scale"], seeds=[1])
    (folder / "train_gpt.py").write_text(OWN_CLOCK.replace("scale = 1.0", "scale = 2.0"))
    family.edit("return LIMIT - GRACE - start", "return max(0, LIMIT - GRACE - start)")
    family.edit("scale = 1.0", "scale = 3.0")
    assert drifting(family) == ["clock", "Model.scale"]
    assert lineage.agree(folder, ["clock"], "its clock may be negative", root=family.root) == ["clock"]
    submission = json.loads((folder / "submission.json").read_text())
    assert submission["answers"]["clock"]["reason"] == "its clock may be negative"
    assert submission["seeds"] == [1] and drifting(family) == ["Model.scale"]
    rules = json.loads((ROOT / "scripts" / "submission.schema.json").read_text())["properties"]["answers"]
    jsonschema.validate(submission["answers"], rules)
    family.edit("max(0, LIMIT", "max(1, LIMIT")
    assert drifting(family) == ["clock", "Model.scale"]
    assert lineage.agree(folder, root=family.root) == ["clock", "Model.scale"]
    assert "answers" not in json.loads((folder / "submission.json").read_text()) and not drifting(family)


def test_formatting_and_remarks_of_the_parent_need_no_answer(family):
    family.record("A", OWN_CLOCK, ["clock"])
    layout = "# What is left.\n\n    return (LIMIT - GRACE\n            - start)"
    family.edit("return LIMIT - GRACE - start", layout)
    family.edit('"""Left."""', '"""Seconds that are left."""')
    assert not drifting(family)


def test_what_the_parent_lacks_and_what_the_record_dropped_need_no_answer(family):
    source = replaced("    scale = 1.0\n\n", "", replaced("def clock", "BEAT = 1\n\n\ndef clock"))
    folder = family.record("A", source, ["Model.scale", "BEAT"])
    family.edit("scale = 1.0", "scale = 2.0")
    assert not drifting(family) and not (folder / lineage.AGREED).exists()


def test_the_parents_own_new_text_is_taken_without_more_ado(family):
    folder = family.record("A", OWN_CLOCK, ["clock"])
    family.edit("return LIMIT - GRACE - start", "return max(0, LIMIT - GRACE - start)")
    (folder / "train_gpt.py").write_text(family.trunk.read_text())
    assert not drifting(family)


def test_a_declared_symbol_has_to_be_agreed_with_once(family):
    folder = family.record("A", OWN_CLOCK, ["clock"])
    (folder / lineage.AGREED).unlink()
    (rule, text), = family.fails("A")
    assert rule == "drift"
    assert text.startswith("1 declared symbols have never been agreed with the parent's: clock;")
    assert lineage.main(["agree", str(folder)], family.root) == 0 and not family.fails("A")
    (folder / lineage.AGREED).unlink()
    assert lineage.agree_first(family.trunk, folder, ["clock"]) and not family.fails("A")
    assert not lineage.agree_first(family.trunk, folder, ["clock"])
    family.edit("return LIMIT - GRACE - start", "return 0")
    assert not lineage.agree_first(family.trunk, folder, ["clock"])
    assert drifting(family) == ["clock"]


@pytest.mark.parametrize("text, values, words", [
    ("[]", {}, "agreed.json: an object"), ('{"clock": 1}', {}, "agreed.json: an object"),
    ("{", {}, "not JSON"), ("{}", {"answers": []}, "answers: 'answers' needs"),
    ("{}", {"answers": {"clock": "no"}}, "answers: 'clock' needs"),
    ("{}", {"answers": {"clock": {"parent": "0", "reason": ""}}}, "answers: 'clock' needs")])
def test_a_wrong_agreement_is_a_finding(family, text, values, words):
    folder = family.record("A", OWN_CLOCK, ["clock"])
    (folder / lineage.AGREED).write_text(text)
    submission = json.loads((folder / "submission.json").read_text())
    (folder / "submission.json").write_text(json.dumps({**submission, **values}))
    (rule, found), = family.fails("A")
    assert rule == "readable" and words in found


def test_misuse_of_agree(family):
    folder = family.record("A", OWN_CLOCK, ["clock"])
    for call, words in ((["agree", str(folder), "main"], "main: not declared by A"),
                        (["agree", str(family.trunk)], "not a record"),
                        (["agree", str(family.record("F", frozen=True))], "F: frozen"),
                        (["agree", str(family.record("R", parent=None))], "R: no parent")):
        with pytest.raises(Misuse, match=words):
            lineage.main(call, family.root)


def test_a_fingerprint_is_of_the_code_and_the_same_everywhere():
    """Written out: agreed.json is written under one version of Python and read under another."""
    symbol = Script("def f(a, *, b=1):\n    return f'{a:>3}' + (b or None)\n").by_name["f"]
    assert symbol.fingerprint() == "39e107598c03"
    other = Script("# x\ndef f( a, *, b = 1 ):\n    'D.'\n    return (f'{a:>3}'\n      + (b or None))\n")
    assert other.by_name["f"].fingerprint() == symbol.fingerprint()
    for text in ("b=2", "b=True", "c=1"):
        changed = Script(f"def f(a, *, {text}):\n    return f'{{a:>3}}' + (b or None)\n").by_name["f"]
        assert changed.fingerprint() != symbol.fingerprint()


@pytest.mark.parametrize("line", [
    "os.environ['X']", "os.getenv('X')", "os.environb", "e = os.environ",
    "from os import environ as e\ne['X']", "import os as o\no.environ.get('X')",
    "from os import *\ngetenv('X')", "shutil.os.environ", "getattr(os, 'environ')",
    "os.__dict__['getenv']('X')", "import posix\nposix.environ", "print(os.environ)",
    "Hyperparameters(dict(os.environ))", "clock(start=os.environ)", "Hyperparameters(*os.environ)",
    "def leak(env):\n    return env['X']\n\n\nleak(os.environ)",
    "def on(a, env):\n    Hyperparameters(env)\n    return env\n\n\non(1, os.environ)"])
def test_the_environment_is_read_in_one_section(family, line):
    source = script_of(DATA=f"\n{line}\n")
    path = family.record("A", source) / "train_gpt.py"
    assert "environment" in {rule for rule, _ in family.fails(path)}


@pytest.mark.parametrize("line", [
    "Hyperparameters(os.environ)", "Hyperparameters(environ=os.environ)",
    "def on(a, env):\n    return Hyperparameters(env)\n\n\non(1, os.environ)\non(1, env=os.environ)",
    "def on(env):\n    Hyperparameters(env)\n\n\ndef over(env):\n    return on(env)\n\n\nover(os.environ)",
    "os.path.join('a')", "environ = {}\nenviron.get('X')"])
def test_handing_the_environment_on_reads_nothing(family, line):
    source = script_of(DATA=f"\n{line}\n")
    assert "environment" not in {rule for rule, _ in family.fails(family.record("A", source))}


@pytest.mark.parametrize("line, bad", [
    ("import train_gpt", True), ("from records.A import x", True), ("from . import x", True),
    ("import helper", True), ("importlib.import_module('helper')", True), ("__import__('helper')", True),
    ("sys.path.insert(0, '..')", True), ("importlib.util.spec_from_file_location('x', p)", True),
    ("runpy.run_path('x')", True), ("def f():\n    import tool\n\n\nf()", True),
    ("import numpy.random", False), ("import json", False), ("importlib.import_module(name)", False)])
def test_nothing_of_the_repository_is_imported(family, line, bad):
    folder = family.record("A", script_of(DATA=f"\n{line}\n"))
    (folder / "helper.py").touch()
    (family.root / "scripts").mkdir()
    (family.root / "scripts" / "tool.py").touch()
    (family.root / "scripts" / "json.py").touch()  # the standard library comes first
    assert ("imports" in {rule for rule, _ in family.fails(folder)}) == bad


def test_dead_symbols_fail_and_uncertain_ones_warn(family):
    source = replaced("def clock", "UNUSED = 1\n\n\ndef lost():\n    pass\n\n\ndef clock")
    findings = lineage.check(family.record("A", source, ["UNUSED", "lost"]), family.root)
    assert failures(findings) == [("dead", "nothing that runs reaches lost")]
    assert failures(findings, "WARN") == [("dead", "nothing that runs reaches UNUSED")]
    line = source[: source.index("def lost")].count("\n") + 1
    assert [f.where for f in findings if f.level == "FAIL"] == [f"records/A/train_gpt.py:{line}"]


def test_a_program_beside_the_script_keeps_its_settings_alive(family):
    source = replaced("    depth = Var(2)  # blocks\n", "    depth = Var(2)  # blocks\n    radius = Var(6)\n")
    folder = family.record("A", source, ["Hyperparameters.radius"])
    assert failures(lineage.check(folder, family.root), "WARN") == [("dead", "nothing that runs reaches "
                                                                     "Hyperparameters.radius")]
    (folder / "gate.py").write_text("def near(args):\n    return args.radius\n")
    assert failures(lineage.check(folder, family.root), "WARN") == []


def test_numbers_of_another_script_are_stale(family):
    folder = family.record("A", TRUNK)
    (folder / "train_gpt.py").write_text(TRUNK.replace("The trunk.", "Another."))
    findings = lineage.check(folder, family.root)
    assert not failures(findings) and [rule for rule, _ in failures(findings, "WARN")] == ["stale"]
    frozen = family.record("F", replaced("# Seconds.", "# Other."), parent=None, frozen=True)
    assert not family.fails(frozen)  # its parent has moved on
    (frozen / "train_gpt.py").write_text(TRUNK + "\n\ndef lost():\n    pass\n")
    findings = lineage.check(frozen, family.root)
    assert [rule for rule, _ in failures(findings)] == ["stale"]
    assert [rule for rule, _ in failures(findings, "WARN")] == ["dead"]


@pytest.mark.parametrize("entry, text", [
    ({"parent": "records/none"}, "not a script"), ({"changes": {"idea": {"symbols": ["a"]}}}, "needs"),
    ({"changes": {"idea": ["a"]}}, "needs"),
    ({"changes": {"idea": {"reason": "r", "symbols": [1]}}}, "needs")])
def test_a_wrong_submission_is_a_finding(family, entry, text):
    folder = family.record("A")
    (folder / "submission.json").write_text(json.dumps({"parent": "train_gpt.py", **entry}))
    (rule, found), = family.fails(folder)
    assert rule == "readable" and text in found
    (folder / "submission.json").unlink()
    assert [rule for rule, _ in family.fails(folder)] == ["readable"]


# --- Carrying fixes down ---


def test_a_fix_reaches_all_who_have_the_old_text(family):
    family.record("A")
    own = replaced("def score", "def extra():\n    pass\n\n\nextra()\n\n\ndef score")
    family.record("B", own, ["extra", "extra()"])
    family.commit()
    family.edit("return LIMIT - GRACE - start", "return max(0, LIMIT - GRACE - start)")
    before = family.text("A"), family.text("B")
    assert family.sync(dry_run=True) == {("carried", "clock"): "PASS"}
    assert (family.text("A"), family.text("B")) == before
    assert family.sync() == {("carried", "clock"): "PASS"}
    assert family.text("A") == family.trunk.read_text()
    assert family.text("B") == own.replace("return LIMIT - GRACE - start",
        "return max(0, LIMIT - GRACE - start)")
    assert not family.fails("B")
    assert family.sync() == {}
    assert not list(family.root.rglob("*.tmp"))


def test_texts_of_all_versions_are_old_texts(family):
    family.record("A")
    for i in range(3):
        family.edit("LIMIT, GRACE = 600, " + "5" + "0" * i, "LIMIT, GRACE = 600, 5" + "0" * (i + 1))
        family.commit()
    commits = lineage.git(family.root, "rev-list", "HEAD").split()
    assert family.sync(since=commits[1], dry_run=True) == {("conflict", "LIMIT, GRACE"): "FAIL"}
    assert family.sync(since=commits[-1], dry_run=True) == {("carried", "LIMIT, GRACE"): "PASS"}
    assert family.sync() == {("carried", "LIMIT, GRACE"): "PASS"}
    assert family.text("A") == family.trunk.read_text()


def test_declared_symbols_and_frozen_records_are_not_touched(family):
    own = replaced("return LIMIT - GRACE - start", "return LIMIT")
    family.record("Declared", own, ["clock"])
    family.record("Frozen", frozen=True)
    family.record("Below", parent="records/Frozen")
    family.edit("return LIMIT - GRACE - start", "return 0")
    assert family.sync() == {}
    assert family.text("Declared") == own and family.text("Frozen") == TRUNK and family.text("Below") == TRUNK


def test_a_text_of_its_own_is_a_conflict(family, capsys):
    family.record("A", replaced("return LIMIT - GRACE - start", "return 7"))
    family.edit("return LIMIT - GRACE - start", "return 0")
    family.edit("scale = 1.0", "scale = 2.0")
    assert family.sync() == {("conflict", "clock"): "FAIL", ("carried", "Model.scale"): "PASS"}
    assert "return 7" in family.text("A") and "scale = 2.0" in family.text("A")
    assert lineage.main(["sync"], family.root) == 1
    assert "FAIL lineage/conflict: records/A/train_gpt.py:" in capsys.readouterr().out


def test_what_the_parent_gets_is_put_behind_the_same_neighbour(family):
    family.record("A", replaced("class Stream:", "def between():\n    pass\n\n\nclass Stream:"), ["between"])
    end = "        return self.size[0] * self.scale\n"
    family.record("B", replaced(end, end + "\n    def more(self):\n        pass\n"), ["Model.more"])
    family.edit("def clock", "BEAT = 1\n\n\ndef clock")
    family.edit(end, end + "\n    def tails(self):\n        pass\n\n\ndef after():\n    pass\n")
    family.edit("    width = Var(8)\n", "    height = Var(1)\n    width = Var(8)\n")
    names = {"BEAT", "Model.tails", "after", "Hyperparameters.height"}
    assert family.sync() == {("added", name): "PASS" for name in names}
    for record, own in (("A", "between"), ("B", "Model.more")):
        script = Script(family.text(record))
        assert [key for key in script.keys if key != own] == Script(family.trunk.read_text()).keys
        shown = family.fails(record)
        assert not [text for rule, text in shown if rule == "symbols"]


def test_what_the_parent_drops_is_dropped(family):
    family.record("A")
    family.record("B", replaced("import zstandard as codec", "import lzma as codec"), ["codec#2"])
    heads = "\n    # Heads\n\n    @property\n    def heads(self):\n        return self.size[0] * self.scale\n"
    family.edit(heads, "")
    family.edit("codec = None\n", "")
    assert family.sync("Model.heads") == {("removed", "Model.heads"): "PASS"}
    assert family.text("A") == TRUNK.replace(heads, "")
    found = family.sync()
    assert found[("removed", "codec#2")] == "PASS"  # now the parent's only codec
    assert family.text("A") == family.trunk.read_text()


def test_what_a_record_dropped_stays_out(family):
    cut = replaced("    scale = 1.0\n\n", "")
    family.record("Silent", cut)
    family.record("Said", cut, ["Model.scale"])
    family.edit("Var(8)", "Var(9)")
    found = {("conflict", "Model.scale"): "FAIL", ("carried", "Hyperparameters.width"): "PASS"}
    assert family.sync() == found
    assert "scale = " not in family.text("Silent") + family.text("Said")


def test_a_class_that_a_record_adds_to_is_not_taken_from_under_it(family):
    end = "    def push(self, token):\n        pass\n"
    source = replaced(end, end + "\n    def more(self):\n        pass\n")
    family.record("A", source, ["Stream.more"])
    family.edit(BODIES["GENERATION"].strip("\n") + "\n", "# nothing\n")
    found = family.sync()
    assert found[("conflict", "Stream")] == "FAIL" and found[("removed", "stream")] == "PASS"
    assert Script(family.text("A")).keys[-5:-2] == ["Stream", "Stream.more", "section TRAINING"]


def test_grandchildren_follow_their_own_parent(family):
    mother = replaced("Var(8)", "Var(16)")
    family.record("B_mother", mother, ["Hyperparameters.width"])
    child = replaced("scale = 1.0", "scale = 3.0", mother)
    family.record("A_child", child, ["Model.scale"], parent="records/B_mother")
    family.edit("# Seconds.", "# Seconds, all of them.")
    family.edit("Var(8)", "Var(9)")
    found = lineage.sync(root=family.root)  # not committed: the mother's text on disk is the child's old one
    assert [f.text.partition(":")[0] for f in found[:-1]] == ["LIMIT, GRACE"] * 2
    for name in ("B_mother", "A_child"):
        assert "# Seconds, all of them." in family.text(name) and "Var(16)" in family.text(name)
    assert not family.fails("A_child")
    # The mother declares a width of its own, and the trunk has a new one.
    assert [rule for rule, _ in family.fails("B_mother")] == ["drift"]


def test_what_the_parent_moves_moves(family):
    family.record("A", replaced("def score", "def extra():\n    pass\n\n\ndef score"), ["extra"])
    family.edit(*SWAP)
    (rule, name), = family.sync()
    assert rule == "moved" and name in ("Hyperparameters.width", "Hyperparameters.depth")
    assert not [f for f in family.fails("A") if f[0] == "symbols"]
    family.edit("\n\n\ndef score", "\n\n\n\ndef score")  # extra stands above it in the record
    family.edit("\n\n\ndef clock", "\n\n\n\ndef clock")
    assert family.sync() == {("carried", "clock"): "PASS"}


def test_layout_of_its_own_stays(family):
    body = BODIES["EVALUATION"].strip("\n").replace("heads", "size")
    early = replaced(BODIES["EVALUATION"].strip("\n") + "\n", "# None: above load.\n")
    early = replaced("def load", body + "\n\n\ndef load", early)
    family.record("Moved", early, ["score", "section EVALUATION"])
    loose = replaced("\n\n\ndef clock", "\n\n\n\ndef clock")
    family.record("Loose", loose)
    family.edit("scale = 1.0", "scale = 2.0")
    assert family.sync() == {("carried", "Model.scale"): "PASS"}
    assert family.text("Moved") == early.replace("scale = 1.0", "scale = 2.0")
    assert family.text("Loose") == loose.replace("scale = 1.0", "scale = 2.0")


def test_nothing_is_written_if_one_result_is_no_python(family):
    family.record("A")
    family.record("B", replaced("class Stream:", "class Stream(object):"), ["Stream"])
    family.edit("Var(8)", "Var(9)")
    family.edit(BODIES["GENERATION"].strip("\n") + "\n", "# None: B keeps a class without members.\n")
    before = family.text("A"), family.text("B")
    found = lineage.sync(root=family.root)
    assert (found[-1].rule, found[-1].level) == ("lineage/failed", "FAIL")
    assert "does not parse" in found[-1].text
    assert (family.text("A"), family.text("B")) == before
    assert lineage.main(["sync"], family.root) == 1


def test_an_error_while_writing_leaves_all_files(family, monkeypatch):
    family.record("A")
    family.record("B")
    family.edit("Var(8)", "Var(9)")
    real = lineage.shutil.copymode

    def full(source, target):
        if "records/B" in str(source):
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr(lineage.shutil, "copymode", full)
    with pytest.raises(OSError, match="disk full"):
        lineage.sync(root=family.root)
    assert family.text("A") == family.text("B") == TRUNK and not list(family.root.rglob("*.tmp"))


# --- The command ---


def test_tree(family, capsys):
    family.record("A")
    family.record("B", replaced("scale = 1.0", "scale = 3.0"), ["Model.scale"], parent="records/A")
    (family.root / "records" / "A" / "train_gpt.py").write_text(TRUNK.replace("The trunk.", "A."))
    family.record("Z", parent=None, frozen=True)
    assert lineage.main(["tree"], family.root) == 0
    assert capsys.readouterr().out == (
        "train_gpt.py  the trunk\n"
        "└── A  1.2500 final_int6_sliding [stale]\n        The idea of A.\n"
        "    └── B  1.2500 final_int6_sliding\n            The idea of B.\n"
        "Z  1.2500 final_int6_sliding [frozen]\n    The idea of Z.\n")
    assert lineage.main(["tree", "--json"], family.root) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["parent"], row["stale"], row["frozen"]) for row in rows] == [
        ("A", "train_gpt.py", True, False), ("Z", None, False, True), ("B", "records/A", False, False)]


def test_json_and_exit_codes(family, capsys):
    family.record("A")
    assert lineage.main(["check", "--json"], family.root) == 0
    found = json.loads(capsys.readouterr().out)
    assert {finding["level"] for finding in found} == {"PASS"} and found[0]["where"] == "train_gpt.py"
    (family.root / "records" / "A" / "train_gpt.py").write_text(TRUNK + "\n\nprint(1)\n")
    assert lineage.main(["check"], family.root) == 1
    assert lineage.main(["check", str(family.trunk)], family.root) == 0
    capsys.readouterr()
    assert lineage.main(["sync", "--dry-run", "--json"], family.root) == 1
    rules = [finding["rule"] for finding in json.loads(capsys.readouterr().out)]
    assert rules == ["lineage/conflict", "lineage/sync"]


def test_misuse(family):
    family.record("A")
    for call in (["sync", "nowhere"], ["sync", "--since", "nowhere"]):
        with pytest.raises(Misuse, match="nowhere"):
            lineage.main(call, family.root)
    circle = family.record("B", parent="records/C")
    family.record("C", parent="records/B")
    for call in (["tree"], ["sync"]):
        with pytest.raises(Misuse, match="lead to no root"):
            lineage.main(call, family.root)
    (circle / "submission.json").write_text("{")
    with pytest.raises(Misuse, match="not JSON"):
        lineage.main(["tree"], family.root)
    tool = [sys.executable, str(ROOT / "scripts" / "lineage.py")]
    for words in (["check", "nowhere"], ["diff", ".", "nowhere"], ["check", "--bad"], []):
        done = subprocess.run([*tool, *words], capture_output=True, text=True)
        assert done.returncode == 2 and "error" in done.stderr, words


def test_no_history_is_misuse(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    family = Family.__new__(Family)
    family.root, family.trunk = tmp_path, tmp_path / "train_gpt.py"
    family.trunk.write_text(TRUNK)
    family.record("A")
    with pytest.raises(Misuse, match="git log"):
        lineage.sync(root=tmp_path)


# --- The real family ---


@pytest.mark.parametrize("path", [ROOT, *lineage.family.records()], ids=lambda path: path.name)
def test_the_real_family_keeps_its_rules(path):
    findings = lineage.check(path)
    assert not failures(findings), "\n".join(map(str, findings))


def test_real_scripts_fall_into_symbols_and_back():
    for path in (find_script("."), find_script("BytePPM"), find_script("Baseline")):
        script = Script.read(path)
        assert joined(script) == path.read_bytes().decode()
        ast.parse("".join(symbol.text for symbol in script.symbols))


def test_a_drift_in_a_real_record_is_seen(tmp_path):
    source = find_script("BytePPM").read_text()
    path = tmp_path / "train_gpt.py"
    for old, new in (("up to 7x", "up to 8x"), ("\n\n\ndef tune_allocator", "\n\ndef tune_allocator")):
        path.write_text(replaced(old, new, source))
        submission = json.loads((find_script("BytePPM").parent / "submission.json").read_text())
        (tmp_path / "submission.json").write_text(json.dumps(submission))
        shown = [text for rule, text in failures(lineage.check(path)) if rule == "symbols"]
        assert len(shown) == 1 and "tune_allocator" in shown[0]


def test_a_name_that_the_parent_joins_with_a_declared_one_is_no_deletion():
    def script(text):
        return Script(text, Path("records/x/train_gpt.py"))
    past, child = script("A = 1\nB = 2\n"), script("A = 1\nB = 3\n")
    result, done = lineage.carry(script("A, B = 1, 2\n"), [past], child, ["B"], lambda symbol: True)
    assert result.source == child.source and [finding.level for finding in done] == ["FAIL"]


@pytest.mark.parametrize("values", [
    {"parent": "records/Child"}, {"parent": "records/Child/other.py"}, {"parent": 5}, {"changes": []},
], ids=str)
def test_a_parent_of_ones_own_choosing_is_refused(family, values):
    folder = family.root / "records" / "Child"
    folder.mkdir(parents=True)
    for name in ("train_gpt.py", "other.py"):
        (folder / name).write_text(family.trunk.read_text())
    (folder / "submission.json").write_text(json.dumps({"parent": "train_gpt.py", "changes": {}} | values))
    assert ("readable" in dict(family.fails("Child"))), family.fails("Child")


def test_a_source_in_another_coding_is_refused(tmp_path):
    path = tmp_path / "train_gpt.py"
    path.write_bytes(b"# -*- coding: unicode_escape -*-\nA = 1\n")
    with pytest.raises(Misuse, match="coding unicode"):
        Script.read(path)
