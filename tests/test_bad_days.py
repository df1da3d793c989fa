"""Bad days of data/prepare.py: wrong files, foreign layouts, full disks. Each is refused in one line that
says what to do. tests/test_bad_runs.py has those of the training scripts.

A row of `FAULTS` is one bad day: how its files are made, the command, the words that the user reads. Each
ends with exit code 2 and one `error: ` line, without a traceback, and leaves all files as they were. To add a
row, append a `Fault`.

Below the table, hypothesis damages files: never a traceback, exit code 0 only where the input is right. Each
kind has 100 examples, and 1,000 with HYPOTHESIS_PROFILE=nightly.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import zstandard
from conftest import EXAMPLES, ROOT, environment, shard
from hypothesis import example, given, settings
from hypothesis import strategies as st

PREPARE = ROOT / "data" / "prepare.py"


# --- the machine -------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What is wrong with the machine: a limit that the process sets for itself, or a disk of its own.

    The disk is mounted on the folder `disk`, where nobody else sees it, and goes with the process. It begins
    with the files of the folder `given`, and must hold these and nothing else when the program has ended.
    """

    limit: tuple[str, int] | None = None  # a name in the module `resource`, and the most that is allowed
    disk: str = ""  # of 400 kB: "small" or "read-only"

    def wrap(self, command: list[str]) -> list[str]:
        if not self.disk:
            return command
        lock = "mount -o remount,ro disk &&" if self.disk == "read-only" else ""
        script = f'''
            mount -t tmpfs -o size=400k none disk && cp -r given/. disk/ && {lock} {{
                "$@"
                code=$?
                diff -r given disk >&2
                exit $code
            }}'''
        return ["unshare", "-rm", "sh", "-c", script, "sh", *command]

    def start(self) -> None:
        """Runs in the new process, before the program."""
        import resource

        name, most = self.limit
        number = getattr(resource, name)
        resource.setrlimit(number, (most, resource.getrlimit(number)[1]))

    def unable(self) -> str:
        """Why this system cannot have such a bad day; "" where it can."""
        if self.disk and not mounting_works():
            return "this system mounts nothing for a test; the limits on a file's size stand for it"
        if self.limit and sys.platform != "linux":
            return "other systems keep such limits in their own ways"
        return ""


def file_limit(size: int) -> Machine:
    """No file may grow beyond this: what a full disk is, without a disk of its own."""
    return Machine(limit=("RLIMIT_FSIZE", size))


def memory(size: int) -> Machine:
    return Machine(limit=("RLIMIT_AS", size))


@cache
def mounting_works() -> bool:
    """Whether the system lets a user mount a disk that only the process sees."""
    if not (shutil.which("unshare") and shutil.which("mount")):
        return False
    line = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=400k none /mnt"]
    return subprocess.run(line, capture_output=True).returncode == 0


# --- the table ---------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A bad day. `make` gets an empty folder, in which prepare.py runs with the arguments of `command`."""

    name: str
    make: Callable[[Path], None]
    command: str
    says: tuple[str, ...]
    machine: Machine = Machine()
    stdin: bytes = b""
    env: dict = field(default_factory=dict)


def write(folder: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def holds(files: dict[str, bytes | str]) -> Callable:
    """A `make` that writes these files."""
    return lambda folder: write(folder, files)


def words(seed: int, count: int) -> str:
    return " ".join(map(str, np.random.default_rng(seed).integers(0, 10**6, count)))


def jsonl(*documents: str) -> bytes:
    return "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()


def zst(data: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True, **options).compress(data)


def flipped(data: bytes, at: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


TEXT, VAL = words(0, 200), words(1, 200)
LINES = jsonl(*(words(i, 150) for i in range(2, 152)))
FILES = "files {} --val v.txt --out o"
REPLACE = "; --errors replace writes U+FFFD in its place"


def cut_at_a_block() -> bytes:
    """A .zst cut after its first block of 128 kB, which ends a line: right as far as it goes."""
    line = json.dumps({"text": ""}).encode() + b"\n"
    lines = (json.dumps({"text": words(i, 200)[: 1024 - len(line)]}).encode() + b"\n" for i in range(200))
    whole = zst(b"".join(lines))
    for size in range(len(whole) // 2, len(whole)):
        text = zstandard.ZstdDecompressor().decompressobj().decompress(whole[:size])
        if len(text) == 128 * 1024:
            assert text.endswith(b"\n")
            return whole[:size]
    raise AssertionError("no such block")


CUT = cut_at_a_block()


def bad_text(title: str, file: str, content: bytes | str, *says: str, options: str = "") -> Fault:
    """The file is named as training text, beside validation text that is right."""
    make, command = holds({file: content, "v.txt": VAL}), f"{FILES.format(file)} {options}"
    return Fault(title, make, command, (f"error: {file}", *says))


def parquet(columns: dict) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


def not_installed(module: str, file: str, content: bytes, *says: str) -> Fault:
    """A module of this name that cannot be imported stands before the installed one."""
    stub = f"raise ImportError({module!r})\n"
    make = holds({file: content, "v.txt": VAL, f"stubs/{module}.py": stub})
    return Fault(f"no {module}", make, FILES.format(file), says, env={"PYTHONPATH": "stubs"})


NAMES = [
    Fault("no such file", holds({"v.txt": VAL}), FILES.format("no.jsonl"),
          ("error: no.jsonl: no such file",)),
    Fault("no such validation text", holds({"a.txt": TEXT}), FILES.format("a.txt"),
          ("error: v.txt: no such file",)),
    Fault("nothing of a pattern", holds({"v.txt": VAL}), FILES.format("'no*.txt'"),
          ("error: no*.txt: no such file, and none of this pattern",)),
    Fault("a folder without text", holds({"f/a.md": "x", "v.txt": VAL}), FILES.format("f"),
          ("error: f: no file that ends in .txt, .jsonl",)),
    Fault("one text in two forms",
          holds({"f/a.jsonl": LINES, "f/a.jsonl.gz": gzip.compress(LINES), "v.txt": VAL}), FILES.format("f"),
          ("error: f/a.jsonl and a.jsonl.gz: one text in two forms?",)),
    Fault("one text on both sides", holds({"v.txt": VAL}), FILES.format("v.txt"),
          ("error: v.txt: named as training text and as validation text",)),
    Fault("standard input twice", holds({"v.txt": VAL}), FILES.format("- -"),
          ("error: - is named twice: standard input can be read once",), stdin=LINES),
    Fault("standard input on both sides", holds({}), "files - --val - --out o",
          ("error: - is named twice",), stdin=LINES),
    Fault("nothing on standard input", holds({"v.txt": VAL}), FILES.format("-"),
          ("error: files: no training documents",)),
    Fault("a device", holds({"v.txt": VAL}), FILES.format("/dev/null"),
          ("error: /dev/null: not a regular file; pipe its text into `prepare.py files -`",)),
    bad_text("a kind that is not read", "a.pdf", "x",
             ": .txt, .jsonl (each also as .gz or .zst) or .parquet expected"),
    bad_text("an archive", "a.tar.gz", gzip.compress(b"x"), ": an archive, unpack it first"),
    bad_text("packed twice", "a.parquet.gz", gzip.compress(b"x"), ": packed twice, unpack it first"),
    Fault("--train-bytes below zero", holds({"a.txt": TEXT, "v.txt": VAL}),
          FILES.format("a.txt") + " --train-bytes -1", ("error: --train-bytes -1: at least 0",)),
    Fault("--val-tail below zero", holds({"a.txt": TEXT}), "files a.txt --val-tail -1 --out o",
          ("error: --val-tail -1: at least 0",)),
]

LATIN, OFFSET_3 = b"caf\xe9 " + TEXT.encode(), f": byte 0xe9 at offset 3 is not UTF-8{REPLACE}"
ENCODINGS = [
    bad_text("Latin-1 for a tokenizer", "a.txt", LATIN, OFFSET_3, options="--variant sp320"),
    bad_text("Latin-1 for CaseOps", "a.txt", LATIN, OFFSET_3, options="--variant sp320-caseops"),
    bad_text("Latin-1, packed", "a.txt.gz", gzip.compress(LATIN), OFFSET_3, options="--variant sp320"),
    bad_text("UTF-16", "a.txt", TEXT.encode("utf-16"),
             ": byte 0xff at offset 0 is not UTF-8 (UTF-16, it seems)", options="--variant sp320"),
    bad_text("Latin-1 in JSON lines", "a.jsonl", jsonl("a") + b'{"text": "caf\xe9"}\n',
             f": line 2: byte 0xe9 at offset 27 is not UTF-8{REPLACE}"),
    bad_text("JSON lines in UTF-16", "a.jsonl", LINES.decode().encode("utf-16"),
             ": line 1: byte 0xff at offset 0 is not UTF-8 (UTF-16, it seems)"),
    bad_text("a lone surrogate", "a.jsonl", jsonl("a") + rb'{"text": "ab\ud83d"}',
             rf": line 2: '\ud83d' at character 2 of the text is a lone surrogate, not UTF-8{REPLACE}"),
    bad_text("Latin-1 in Parquet", "a.parquet", parquet({"text": [b"good", b"caf\xe9"]}),
             f": row 2: byte 0xe9 at offset 3 is not UTF-8{REPLACE}"),
    Fault("bytes for a tokenizer", holds({}), "markov2 --variant sp320 --out o",
          ("error: markov2 --variant sp320: its bytes are no text; byte260 has ids for them",)),
    Fault("no bytes at all", holds({}), "markov2 --bytes -1 --out o", ("--bytes -1: at least 100",)),
]

NO_OBJECT = ": line 1 is not a JSON object with a text"
DOCUMENTS = [
    bad_text("JSON lines, cut off", "a.jsonl", LINES[:-30], ": line 150 is not a JSON object with a text",
             "; the file ends there, as one that is cut off"),
    bad_text("a list", "a.jsonl", '["a"]\n', f"{NO_OBJECT}, but list"),
    bad_text("nested too deeply", "a.jsonl", "[" * 200_000 + "\n", f"{NO_OBJECT} (nested too deeply)"),
    bad_text("another field", "a.jsonl", '{"content": "a"}\n',
             ": line 1 has no field 'text'; --field takes one of 'content'"),
    bad_text("no field at all", "a.jsonl", "{}\n", ": line 1 has no field 'text'"),
    bad_text("a number", "a.jsonl", '{"text": 5}\n', ": line 1: field 'text' is no text, but int"),
    bad_text("null", "a.jsonl", '{"text": null}\n', ": line 1: field 'text' is no text, but NoneType"),
    bad_text("a field that --field does not name", "a.jsonl", LINES,
             ": line 1 has no field 'body'; --field takes one of 'text'", options="--field body"),
    bad_text("Parquet, cut off", "a.parquet", parquet({"text": [TEXT]})[:-9], ": not a whole Parquet file"),
    bad_text("no Parquet", "a.parquet", LINES, ": not a whole Parquet file"),
    bad_text("another column", "a.parquet", parquet({"content": [TEXT]}),
             " has no column 'text'; --field takes one of 'content'"),
    bad_text("a column of numbers", "a.parquet", parquet({"text": [1]}),
             ": column 'text' is no text, but int64"),
    bad_text("a row without text", "a.parquet", parquet({"text": [TEXT, None]}),
             ": row 2 has no text (null)"),
    not_installed("pyarrow", "a.parquet", parquet({"text": [TEXT]}),
                  "error: a.parquet: .parquet needs pyarrow: pip install -r requirements-parquet.txt"),
    not_installed("zstandard", "a.jsonl.zst", zst(LINES),
                  "error: a.jsonl.zst: .zst needs the zstandard package: pip install -r requirements.txt"),
]

# gzip says in its last eight bytes what the text must be; zstandard in its last four.
GZ, ZST = gzip.compress(LINES), zst(LINES)
NOTHING, ALL = "after 0 bytes of text", f"after {len(LINES)} bytes of text"
BLOCK = ": truncated after 131072 bytes of text"
PACKED = [
    bad_text(".zst, cut in its first block", "a.jsonl.zst", ZST[:5000], f": truncated {NOTHING}"),
    bad_text(".zst, cut where a line ends", "a.jsonl.zst", CUT, BLOCK),
    bad_text(".zst, cut before a tokenizer", "a.jsonl.zst", CUT, BLOCK, options="--variant sp320"),
    bad_text(".zst, cut at its checksum", "a.jsonl.zst", ZST[:-1], f": truncated {ALL}"),
    bad_text(".zst, cut in its second frame", "a.jsonl.zst", ZST + ZST[:9], f": truncated {ALL}"),
    bad_text(".zst of a text, cut", "a.txt.zst", zst(TEXT.encode())[:-9], f": truncated {NOTHING}"),
    bad_text(".zst with another checksum", "a.jsonl.zst", flipped(ZST, -1), ": damaged after", "checksum"),
    bad_text(".zst with a tail", "a.jsonl.zst", ZST + b"tail", f": damaged {ALL}"),
    bad_text(".zst without a byte", "a.jsonl.zst", b"", f": truncated {NOTHING} (the file is empty)"),
    bad_text(".zst that is none", "a.jsonl.zst", LINES, f": damaged {NOTHING}"),
    bad_text(".gz, cut", "a.jsonl.gz", GZ[:-9], ": truncated after"),
    bad_text(".gz, cut in its second member", "a.jsonl.gz", GZ + GZ[:15], f": truncated {ALL}"),
    bad_text(".gz with another checksum", "a.jsonl.gz", flipped(GZ, -6), ": damaged after", "CRC"),
    bad_text(".gz with a tail", "a.jsonl.gz", GZ + b"tail", f": damaged {ALL}"),
    bad_text(".gz without a byte", "a.gz", b"", f": truncated {NOTHING} (the file is empty)"),
    bad_text(".gz that is none", "a.txt.gz", TEXT, f": damaged {NOTHING}"),
    Fault(".zst on standard input, cut", holds({"v.txt": VAL}), FILES.format("-"),
          (f"error: standard input{BLOCK}",), stdin=CUT),
    Fault(".zst of FineWeb, cut", holds({"hub/docs_selected.jsonl.zst": CUT}),
          "fineweb --hub-folder hub --val-documents 3 --out o", (BLOCK,)),
    Fault("sums without names", holds({"hub/docs_selected.jsonl": LINES, "hub/SHA256SUMS": "0123abcd\n"}),
          "fineweb --hub-folder hub --out o", ("SHA256SUMS: line 1 is not a sum and a name",)),
]

SHARDS = {"s/x_train_000000.bin": shard(1, 5, 6), "s/x_val_000000.bin": shard(1, 5), "m.model": "no model"}


def bad_shards(title: str, files: dict, *says: str) -> Fault:
    command = "convert --from s --tokenizer m.model --out o"
    return Fault(title, holds({**SHARDS, **files}), command, says)


LAYOUTS = [
    bad_shards("a published sidecar among shards", {"s/x_val_bytes_000000.bin": shard(0, 1)},
               "error: --from s: x_val_bytes_000000.bin is a sidecar of CaseOps ids, no shard of text"),
    bad_shards("a sidecar of ours among shards", {"s/x_val_000000.bytes": shard(0, 1)},
               "error: --from s: x_val_000000.bytes is a sidecar of CaseOps ids, no shard of text"),
    bad_shards("a copy among shards", {"s/x_val_000000 (1).bin": shard(1, 5)},
               "error: s/x_val_000000 (1).bin: a copy?"),
    bad_shards("shards of two texts", {"s/y_val_000000.bin": shard(1, 5)},
               "error: --from s: two val shards of one number: two texts in one folder?"),
    bad_shards("no model to convert with", {}, "error: m.model: not a SentencePiece model"),
]


# Shards that stand at `o` already, and text beside them.
OLD = {"v.txt": VAL, "o/manifest.json": "{}", "o/old.bin": b"1"}
FORCE = " --force --overlap off"
TOO_LARGE = ("error: o: File too large; nothing was written",)


def on_a_disk(folder: Path) -> None:
    write(folder / "given", {"o/manifest.json": "{}", "o/old.bin": b"1"})
    write(folder, {"a.txt": words(3, 60_000), "v.txt": VAL})
    (folder / "disk").mkdir()


def disk(title: str, options: str, says: str, kind: str = "small") -> Fault:
    command = f"files a.txt --val v.txt {options} {FORCE}"
    return Fault(title, on_a_disk, command, (f"error: {says}; nothing was written",), Machine(disk=kind))


def huge(file: str) -> Callable:
    """A `make` of a text larger than the memory, on a disk that holds next to nothing of it."""

    def make(folder: Path) -> None:
        write(folder, {file: "", "v.txt": VAL})
        os.truncate(folder / file, 250_000_000)

    return make


MACHINES = [
    Fault("a full disk", holds({"a.txt": words(3, 40_000), **OLD}), FILES.format("a.txt") + FORCE,
          TOO_LARGE, file_limit(100_000)),
    # Shards of 400 ids fit, the list of them does not.
    Fault("a full disk at the manifest", holds({"a.txt": words(3, 800), **OLD}),
          FILES.format("a.txt") + " --shard-tokens 400" + FORCE, TOO_LARGE, file_limit(2000)),
    Fault("a full disk at the model", holds({"a.txt": TEXT, "m.model": bytes(500_000), **OLD}),
          FILES.format("a.txt") + " --variant sp320 --tokenizer m.model" + FORCE, TOO_LARGE,
          file_limit(100_000)),
    Fault("a full disk for standard input", holds({"v.txt": VAL}), FILES.format("-"),
          ("error: standard input: File too large", "TMPDIR"), file_limit(100_000), stdin=LINES),
    disk("a small disk", "--out disk/o", "disk/o: No space left on device"),
    disk("a small disk and a new folder", "--out disk/a/b", "disk/a/b: No space left on device"),
    disk("a small disk and a tokenizer", "--variant sp320 --out disk/o", "disk/o: No space left on device"),
    disk("a read-only disk", "--out disk/o", "disk/o: Read-only file system", "read-only"),
    Fault("a file where the folder goes", holds({"a.txt": TEXT, "v.txt": VAL, "o": "x"}),
          FILES.format("a.txt"), ("error: o exists; --force replaces it",)),
    Fault("a file where the folder goes, by force", holds({"a.txt": TEXT, "v.txt": VAL, "o": "x"}),
          FILES.format("a.txt") + FORCE, ("error: o is a file: --out names a folder",)),
    Fault("a file above the folder", holds({"a.txt": TEXT, "v.txt": VAL, "f": "x"}),
          "files a.txt --val v.txt --out f/o",
          ("error: f/o: ", "/f is a file, not a folder")),
    Fault("a folder in place of a file", holds({"f/a": "x"}), "tinyshakespeare --path f --out o",
          ("error: f: Is a directory",)),
    Fault("too little memory for a text", huge("a.txt"), FILES.format("a.txt"),
          ("error: a.txt: out of memory", "--no-shuffle", "JSON lines"), memory(300_000_000)),
    Fault("too little memory for a line", huge("a.jsonl"), FILES.format("a.jsonl"),
          ("error: a.jsonl: out of memory", "--no-shuffle", "JSON lines"), memory(300_000_000)),
    # The text fits, its ids do not.
    Fault("too little memory for ids", huge("a.txt"), FILES.format("a.txt"),
          ("error: out of memory", "--no-shuffle", "JSON lines", "; nothing was written"),
          memory(500_000_000)),
]

FAULTS = [*NAMES, *ENCODINGS, *DOCUMENTS, *PACKED, *LAYOUTS, *MACHINES]


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below, with the hash of what a file holds (of a huge one its size)."""
    found = {}
    for path in folder.rglob("*"):
        if "__pycache__" in path.parts:
            continue
        held = "a folder" if path.is_dir() else str(path.stat().st_size)
        if path.is_file() and path.stat().st_size < 1 << 27:
            held = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = held
    return found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_bad_day_ends_in_one_line(fault: Fault, tmp_path):
    if why := fault.machine.unable():
        pytest.skip(why)
    fault.make(tmp_path)
    before = contents(tmp_path)

    done = subprocess.run(
        fault.machine.wrap([sys.executable, str(PREPARE), *shlex.split(fault.command)]),
        cwd=tmp_path, env=environment(**fault.env), input=fault.stdin, capture_output=True, timeout=120,
        preexec_fn=fault.machine.start if fault.machine.limit else None,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    said = [line for line in err.splitlines() if not line.startswith(("note: ", "warning: "))]
    assert done.returncode == 2 and len(said) == 1, (done.returncode, out, err)
    assert said[0].startswith("error: ") and "Traceback" not in out, (out, err)
    for part in fault.says:
        assert part in said[0], said[0]

    assert contents(tmp_path) == before


def test_no_two_rows_have_one_name():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)


# --- what no command line can bring about ------------------------------------


def test_a_folder_that_goes_away_during_the_run(prepare, tmp_path, monkeypatch, capsys):
    write(tmp_path, {"a.jsonl": LINES, "v.txt": VAL})
    encode = prepare.ByteTokenizer.encode_sized

    def encode_and_remove(self, document):
        shutil.rmtree(tmp_path / "sets", ignore_errors=True)
        return encode(self, document)

    monkeypatch.setattr(prepare.ByteTokenizer, "encode_sized", encode_and_remove)
    call = ["files", tmp_path / "a.jsonl", "--val", tmp_path / "v.txt", "--out", tmp_path / "sets" / "o"]
    assert prepare.main([str(word) for word in call]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path}/sets/o: No such file or directory; nothing was written\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "v.txt"]


@pytest.mark.parametrize("trouble", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_the_old_folder_comes_back_where_the_new_one_fails(prepare, tmp_path, monkeypatch, trouble):
    write(tmp_path, {"a.txt": TEXT, **OLD})
    before, rename = contents(tmp_path), Path.rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise trouble
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    call = ["files", tmp_path / "a.txt", "--val", tmp_path / "v.txt", "--out", tmp_path / "o", "--force"]
    assert prepare.main([str(word) for word in call]) == (2 if isinstance(trouble, OSError) else 130)
    assert contents(tmp_path) == before


def test_what_a_killed_run_left_is_put_right(prepare, tmp_path):
    """Killed between two renames, it leaves the old folder under another name; earlier, half of a new one."""
    write(tmp_path, {"a.txt": TEXT, **OLD})
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "o").rename(tmp_path / f".o.{ended.pid}.old")
    (tmp_path / f".o.{ended.pid}.partial").mkdir()
    others = f".o.v2.{ended.pid}.partial", f".o.{os.getppid()}.partial"  # another folder's; of a run at work
    for name in others:
        (tmp_path / name).mkdir()
    call = ["files", tmp_path / "a.txt", "--val", tmp_path / "v.txt", "--out", tmp_path / "o"]
    assert prepare.main([str(word) for word in [*call, "--val-share", "2"]]) == 2
    assert prepare.main([str(word) for word in [*call, "--overlap", "off"]]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "a.txt", "o", "v.txt"])


# --- damage at random --------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    write(folder, {"v.txt": VAL})
    return folder


def outcome(prepare, folder: Path, name: str, data: bytes) -> list[bytes] | None:
    """The training documents that `prepare.py files` makes of a file; None where it refuses the file.

    A refusal names the file in one line; and no refusal leaves anything behind.
    """
    (folder / name).write_bytes(data)
    call = ["files", folder / name, "--val", folder / "v.txt", "--out", folder / "o"]
    call += ["--overlap", "off", "--no-shuffle"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = prepare.main([str(word) for word in call])
    (folder / name).unlink()
    left = {path.name for path in folder.iterdir()} - {"v.txt"}
    if code:
        assert code == 2 and not left and err.getvalue().count("\n") == 1, (code, left, err.getvalue())
        assert err.getvalue().startswith((f"error: {folder / name}", "error: files: no training documents"))
        return None
    assert left == {"o"} and not err.getvalue()
    ids = np.fromfile(folder / "o" / "files_train_000000.bin", "<u2", offset=1024)
    shutil.rmtree(folder / "o")
    return [(part[1:] - 4).astype(np.uint8).tobytes() for part in np.split(ids, np.flatnonzero(ids == 1))[1:]]


def documents_in(raw: bytes) -> list[bytes] | None:
    """What JSON lines hold, read in another way than prepare.py's; None where they are wrong or hold none."""
    found = []
    for line in raw.split(b"\n"):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8-sig"))["text"]
            found.append(str.encode(text))
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
    return [document for document in found if document] or None


@st.composite
def damage(draw, data: bytes) -> bytes:
    """The data after one to three accidents: a changed byte, a cut, an insertion, a part that is lost."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["change", "cut", "insert", "lose"]))
        if kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at:]
        else:
            new = draw(st.binary(min_size=1, max_size=1)) if kind == "change" else b""
            data = data[:at] + new + data[at + draw(st.integers(1, 8 if kind == "lose" else 1)) :]
    return data


PARTS = st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=6)
LINE = st.one_of(
    st.text(max_size=30).map(lambda text: json.dumps({"text": text}, ensure_ascii=False)),
    st.text(max_size=9).map(lambda text: json.dumps({"id": 1, "text": text, "more": [text]})),
    st.sampled_from([
        "", " \r", "{}", "[]", "null", "NaN", "\ufeff", "[" * 5000, '{"text": 1}', '{"text": "\\ud800"}',
        '{"text": "\\ud83d\\ude00"}', '\ufeff{"text": "a"}', '{"text": "a", "text": "b"}',
        '{"text": ' + "1" * 5000 + "}",
    ]),
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_json_lines_are_read_as_they_are_or_refused(prepare, workplace, data):
    raw = b"\n".join(line.encode("utf-8", "surrogatepass") for line in data.draw(st.lists(LINE, max_size=6)))
    if data.draw(st.booleans()):
        raw = data.draw(damage(raw))
    assert outcome(prepare, workplace, "a.jsonl", raw) == documents_in(raw)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbfa\r\nb\0\xff\xed\xa0\x80")
def test_any_bytes_are_a_text_for_byte260(prepare, workplace, raw):
    assert outcome(prepare, workplace, "a.txt", raw) == ([raw] if raw else None)


def packed(data, pack: Callable[[bytes], bytes]) -> tuple[list[bytes], list[bytes]]:
    """(parts of JSON lines, each part packed). A part may end in the middle of a line."""
    raw = jsonl(*data.draw(PARTS))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=2)))
    parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)])]
    return parts, [pack(part) for part in parts]


def check_packed(prepare, workplace, data, name: str, pack: Callable[[bytes], bytes]) -> None:
    """A cut is noticed unless it falls between frames; other damage is refused or changes nothing."""
    parts, frames = packed(data, pack)
    raw, blob = b"".join(parts), b"".join(frames)
    assert outcome(prepare, workplace, name, blob) == documents_in(raw)

    # Text up to the end of each frame, by the bytes of the frames: there, a cut cannot be seen.
    ends = {sum(map(len, frames[:i])): b"".join(parts[:i]) for i in range(1, len(frames) + 1)}
    cut = data.draw(st.one_of(st.integers(0, len(blob) - 1), st.sampled_from(sorted(ends))))
    wanted = documents_in(ends[cut]) if cut in ends else None
    assert outcome(prepare, workplace, name, blob[:cut]) == wanted

    at, bit = data.draw(st.integers(0, len(blob) - 1)), 1 << data.draw(st.integers(0, 7))
    found = outcome(prepare, workplace, name, blob[:at] + bytes([blob[at] ^ bit]) + blob[at + 1 :])
    assert found in (None, documents_in(raw))

    outcome(prepare, workplace, name, data.draw(damage(blob)))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_zst_is_whole_or_refused(prepare, workplace, data):
    sized = data.draw(st.booleans())
    level = data.draw(st.sampled_from([-5, 1, 3, 19]))
    check_packed(
        prepare, workplace, data, "a.jsonl.zst", lambda part: zst(part, level=level, write_content_size=sized)
    )


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_gz_is_whole_or_refused(prepare, workplace, data):
    level = data.draw(st.sampled_from([0, 1, 9]))
    check_packed(prepare, workplace, data, "a.jsonl.gz", lambda part: gzip.compress(part, level, mtime=0))
