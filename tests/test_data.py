"""From text to shards to batches."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "a", "small", "model",
    "learns", "to", "spell", "every", "word", "of", "it",
]


def text(seed: int, words: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, words)) + f" #{seed}\n"


@pytest.fixture
def jsonl(tmp_path):
    """jsonl(name, documents) -> path of a .jsonl file."""

    def write(name: str, documents: list[str]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        return str(path)

    return write


def write_shard(prepare, path: Path, ids: np.ndarray) -> None:
    shard = prepare.Shard(path)
    shard.write(ids)
    shard.close("")


def ids_of(folder: Path, split: str) -> np.ndarray:
    return np.concatenate(
        [np.fromfile(path, "<u2", offset=1024) for path in sorted(folder.glob(f"*_{split}_*.bin"))]
    )


def documents_of(folder: Path, split: str) -> list[bytes]:
    ids = ids_of(folder, split)
    assert ids[0] == 1
    return [(part[1:] - 4).astype(np.uint8).tobytes() for part in np.split(ids, np.flatnonzero(ids == 1))[1:]]


def test_shards_hold_the_documents_in_order(prepare_files, jsonl):
    train, val = [text(i, 200) for i in range(9)], [text(100 + i, 150) for i in range(3)]
    files = [jsonl("a.jsonl", train[:5]), jsonl("b.jsonl", train[5:])]
    options = ["--no-shuffle", "--overlap", "report", "--shard-tokens", 2500]
    out = prepare_files(files, jsonl("v.jsonl", val), *options)
    assert documents_of(out, "train") == [document.encode() for document in train]
    assert documents_of(out, "val") == [document.encode() for document in val]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["variant"] == "byte260" and manifest["documents"] == {"train": 9, "val": 3}
    assert manifest["bytes"]["train"] == sum(map(len, train))
    assert manifest["tokens"]["train"] == sum(map(len, train)) + 9
    assert (
        manifest["train"]["first_document"] == hashlib.blake2b(train[0].encode(), digest_size=16).hexdigest()
    )
    for entry in manifest["shards"]:
        data = (out / entry["file"]).read_bytes()
        header = np.frombuffer(data[:1024], "<i4")
        assert hashlib.sha256(data).hexdigest() == entry["sha256"] and entry["tokens"] <= 2500
        assert list(header[:3]) == [20240520, 1, entry["tokens"]] and not header[3:].any()
        assert len(data) == 1024 + 2 * entry["tokens"]
    assert len(list(out.glob("*_train_*.bin"))) == -(-manifest["tokens"]["train"] // 2500)


def text_sha256(documents: list[str]) -> str:
    """What `val_text_sha256` of a manifest is to be."""
    parts = [document.encode() for document in documents]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()


def test_the_validation_text_has_one_name_whatever_its_ids(prepare_files, prepare, jsonl):
    train, val = [text(i, 200) for i in range(9)], [text(100, 150), "\u00c9 NASA \u2581", text(101, 150)]
    files = jsonl("a.jsonl", train), jsonl("v.jsonl", val)

    def named(*options) -> str:
        out = prepare_files(*files, "--overlap", "off", "--force", *options)
        return json.loads((out / "manifest.json").read_text())["val_text_sha256"]

    assert named() == text_sha256(val)
    assert named("--variant", "sp320") == named("--variant", "sp320-caseops") == text_sha256(val)
    assert named("--val-bytes", 1) == text_sha256(val[:1]) != text_sha256(val)
    assert text_sha256(["ab", "c"]) != text_sha256(["a", "bc"]) != text_sha256(["abc"])

    # Equal for the bytes of shards that come in blocks, wherever a block ends.
    ids = np.concatenate([np.array([1, *(byte + 4 for byte in d.encode())], np.uint16) for d in ["", *val]])
    for size in (1, 7, len(ids)):
        found = prepare.ShardText()
        for start in range(0, len(ids), size):
            found.add(ids[start : start + size])
        assert found.hexdigest() == text_sha256(["", *val])


def test_documents_that_are_dropped_are_not_in_the_texts_name(prepare_files, jsonl):
    train, val = [text(i, 200) for i in range(9)], [text(100, 150), text(3, 200)[:-1], text(101, 150)]
    out = prepare_files(jsonl("a.jsonl", train), jsonl("v.jsonl", val))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["overlap"]["documents_dropped"] == 1
    assert manifest["val_text_sha256"] == text_sha256([val[0], val[2]])


def test_shuffle_keeps_every_document_and_limits_count_bytes(prepare_files, jsonl):
    train = [text(i, 50) for i in range(30)]
    arguments = [jsonl("a.jsonl", train), jsonl("v.jsonl", [text(99, 90)]), "--overlap", "off"]
    shuffled = documents_of(prepare_files(*arguments, out="x"), "train")
    written = [document.encode() for document in train]
    assert sorted(shuffled) == sorted(written) and shuffled[:3] != written[:3]
    kept = documents_of(prepare_files(*arguments, "--no-shuffle", "--train-bytes", 1000, out="y"), "train")
    assert sum(map(len, kept)) > 1000 >= sum(map(len, kept[:-1]))


def test_tail_of_the_training_text_is_held_out(prepare, jsonl, tmp_path, capsys):
    """--val-tail: the last documents that pass so many bytes, and --train-bytes counts from the front."""
    train = [text(i, 20 + 10 * i) for i in range(9)]
    limit = len(train[8]) + len(train[7])  # passed by the third from the end
    arguments = ["files", jsonl("a.jsonl", train[:6]), jsonl("b.jsonl", train[6:]), "--overlap", "report"]
    arguments += ["--no-shuffle", "--val-tail", str(limit)]
    assert prepare.main([*arguments, "--out", str(tmp_path / "x")]) == 0
    assert documents_of(tmp_path / "x", "val") == [d.encode() for d in train[6:]]
    assert documents_of(tmp_path / "x", "train") == [d.encode() for d in train[:6]]
    assert prepare.main([*arguments, "--train-bytes", "1", "--out", str(tmp_path / "y")]) == 0
    assert documents_of(tmp_path / "y", "train") == [train[0].encode()]
    assert documents_of(tmp_path / "y", "val") == [d.encode() for d in train[6:]]
    assert prepare.main([*arguments[:-1], "999999", "--out", str(tmp_path / "z")]) == 2
    assert "leaves no training text" in capsys.readouterr().err


def test_files_without_validation_are_split_by_hash(prepare, jsonl, tmp_path):
    """Equal documents once, none on both sides, the split
    a function of the documents, whatever their order."""
    train = [text(i, 40) for i in range(60)]
    sides = []
    for name, documents in (("a", train + train[:9]), ("b", train[::-1])):
        arguments = ["files", jsonl(f"{name}.jsonl", documents), "--val-share", "0.2", "--overlap", "report"]
        assert prepare.main([*arguments, "--no-shuffle", "--out", str(tmp_path / name)]) == 0
        sides.append([documents_of(tmp_path / name, split) for split in ("train", "val")])
    (kept, held), (kept_b, held_b) = sides
    assert sorted(kept + held) == sorted(d.encode() for d in train) and 2 < len(held) < 30
    assert kept == [d.encode() for d in train if d.encode() in kept]  # in the order of the file
    assert sorted(held) == sorted(held_b) and sorted(kept) == sorted(kept_b)


def packed(path: Path) -> list[Path]:
    """The same text in all forms that are read: a file with JSON lines, packed, in frames, as a column."""
    import gzip

    import pyarrow
    import pyarrow.parquet
    import zstandard

    raw = path.read_bytes()
    lines = raw.splitlines(keepends=True)
    frames = (zstandard.ZstdCompressor(write_checksum=True).compress(line) for line in lines)
    forms = {
        ".jsonl.gz": gzip.compress(raw), ".gz": gzip.compress(raw), ".json.gz": gzip.compress(raw),
        "_members.jsonl.gz": b"".join(map(gzip.compress, lines)), ".jsonl.zst": zstandard.compress(raw),
        "_frames.jsonl.zst": b"".join(frames), ".zst": zstandard.compress(raw), "_upper.JSONL": raw,
    }
    folder = path.parent / "forms"
    folder.mkdir()
    for ending, data in forms.items():
        (folder / f"a{ending}").write_bytes(data)
    columns = {"id": list(range(len(lines))), "text": [json.loads(line)["text"] for line in lines]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet", row_group_size=3)
    return sorted(folder.iterdir())


def test_every_form_of_a_text_gives_the_same_documents(prepare_files, jsonl, tmp_path):
    documents = [text(i, 40) for i in range(8)] + ["\ufeffGr\u00fc\u00dfe\r\n\0\u2581 \U0001f600"]
    path, val = Path(jsonl("a.jsonl", documents)), jsonl("v.jsonl", [text(99, 50)])
    forms = packed(path)
    assert len(forms) == 9
    options = ["--no-shuffle", "--overlap", "off", "--force"]
    for form in [path, *forms]:
        out = prepare_files(form, val, *options)
        assert documents_of(out, "train") == [document.encode() for document in documents], form


def test_standard_input_is_read_in_every_form(jsonl, tmp_path):
    documents = [text(i, 40) for i in range(8)]
    path, val = Path(jsonl("a.jsonl", documents)), jsonl("v.jsonl", [text(99, 50)])
    named = ("a.parquet", "a.jsonl.gz", "a.jsonl.zst")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 9)
    given = [path, tmp_path / "a.txt", *(form for form in packed(path) if form.name in named)]
    for form in given:
        call = [sys.executable, ROOT / "data" / "prepare.py", "files", "-", "--val", val, "--no-shuffle"]
        call += ["--out", tmp_path / "o", "--force", "--overlap", "off"]
        with open(form, "rb") as file:
            done = subprocess.run(list(map(str, call)), stdin=file, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        wanted = [d.encode() for d in documents] if form.name != "a.txt" else [b"caf\xe9 " * 9]
        assert documents_of(tmp_path / "o", "train") == wanted, form
        notes = json.loads((tmp_path / "o" / "manifest.json").read_text())["source_notes"]
        sums = [hashlib.sha256(form.read_bytes()).hexdigest()]
        assert notes["files"] == ["-"] and notes["files_sha256"] == sums
        said = {"a.parquet": "", "a.txt": "read as text, one document"}.get(form.name, "read as JSON lines")
        assert said in done.stderr and bool(said) == bool(done.stderr)


def test_folders_and_patterns(prepare_files, jsonl, tmp_path, capsys, monkeypatch):
    """In the order of their paths, with a word on what is passed over; hidden files do not count."""
    folder = tmp_path / "parts"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    parts = [text(i, 40) for i in range(4)]
    for name, part in zip(("b.jsonl", "a.jsonl", "sub/c.jsonl", ".hidden/d.jsonl"), parts):
        jsonl(f"parts/{name}", [part])
    for name in ("README.md", "sub/x.tar.gz", ".c.jsonl"):
        (folder / name).write_text("{")
    val, options = jsonl("v.jsonl", [text(99, 50)]), ["--no-shuffle", "--overlap", "off", "--force"]
    monkeypatch.chdir(tmp_path)
    for name, found in (
        ("parts", (1, 0, 2)), ("parts/*", (1, 0)), ("parts/**/*.jsonl", (1, 0, 2)),
        ("parts/[b]*", (0,)), (["parts/sub", "parts/b.jsonl"], (2, 0)),
    ):
        out = prepare_files(name, val, *options)
        assert documents_of(out, "train") == [parts[i].encode() for i in found], name
    assert "note: parts: 3 files; passed over: .md .tar.gz\n" in capsys.readouterr().err
    jsonl("parts/copy.jsonl", [parts[0]])
    prepare_files("parts", val, *options)
    said = capsys.readouterr().err
    assert "parts/copy.jsonl has the same bytes as parts/b.jsonl: its text is there twice" in said


def test_the_text_is_where_field_says(prepare_files, tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = [text(i, 40) for i in range(4)]
    rows = [{"content": d, "text": "another"} for d in texts]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "v.txt").write_text(text(99, 50))
    for name in ("a.jsonl", "a.parquet"):
        options = ["--field", "content", "--no-shuffle", "--overlap", "off", "--force"]
        out = prepare_files(tmp_path / name, tmp_path / "v.txt", *options)
        assert documents_of(out, "train") == [d.encode() for d in texts]
        assert json.loads((out / "manifest.json").read_text())["source_notes"]["field"] == "content"


# CR LF, a byte order mark, NUL, and characters that tokenizers treat in a way of their own
KEPT = "\ufeffone\r\ntwo\rthree\0\n\ttab  \u2028 \ufffd \u2581 \ufeff\r\n"


@pytest.mark.parametrize("variant", ["byte260", "sp320", "sp320-caseops"])
def test_line_ends_marks_and_zeros_are_kept(prepare, prepare_files, jsonl, tmp_path, variant):
    (tmp_path / "a.txt").write_bytes(KEPT.encode() + text(0, 300).encode())
    train = [tmp_path / "a.txt", jsonl("b.jsonl", [KEPT, text(1, 300)])]
    (tmp_path / "b.jsonl").write_bytes(
        b"\xef\xbb\xbf" + (tmp_path / "b.jsonl").read_bytes().replace(b"\n", b"\r\n")
    )
    wanted = [KEPT + text(0, 300), KEPT, text(1, 300)]
    options = ["--variant", variant, "--no-shuffle", "--overlap", "off"]
    out = prepare_files(train, jsonl("v.jsonl", [text(99, 50) + KEPT]), *options)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["bytes"]["train"] == sum(len(document.encode()) for document in wanted)
    assert manifest["val_normalised_bytes"] == manifest["val_bytes"] and "replacements" not in manifest
    if variant == "byte260":
        assert documents_of(out, "train") == [document.encode() for document in wanted]
        return
    kind = prepare.CaseOpsTokenizer if "caseops" in variant else prepare.PieceTokenizer
    model, ids = kind(out / f"{variant}.model", variant).model, ids_of(out, "train")
    found = [model.decode(part[1:].tolist()) for part in np.split(ids, np.flatnonzero(ids == 1))[1:]]
    undo = prepare.caseops.decode if "caseops" in variant else str
    assert [undo(document) for document in found] == wanted


def test_bytes_are_kept_or_replaced_and_counted(prepare_files, jsonl, tmp_path, capsys):
    """What is not UTF-8: byte260 has an id for it, and a tokenizer's text is changed only on demand."""
    raw = b"caf\xe9 \xe2\x82 \xef\xbf\xbd \xff\xfe " + text(0, 300).encode()
    (tmp_path / "a.txt").write_bytes(raw)
    broken = b'{"text": "na\xefve \\udc80 \\ud83d\\ude00 ' + b"x" * 300 + b'"}\n'
    (tmp_path / "b.jsonl").write_bytes(broken)
    val, options = jsonl("v.jsonl", [text(99, 50)]), ["--no-shuffle", "--overlap", "off", "--force"]
    out = prepare_files(tmp_path / "a.txt", val, *options)
    assert documents_of(out, "train") == [raw] and not capsys.readouterr().err

    both = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    replaced = [raw.decode(errors="replace"), "na\ufffdve \ufffd \U0001f600 " + "x" * 300]
    out = prepare_files(both, val, *options, "--errors", "replace")
    assert documents_of(out, "train") == [document.encode() for document in replaced]
    said = "note: not UTF-8, now U+FFFD: 6 places of the training text, 0 of the validation text\n"
    assert capsys.readouterr().err == said
    names = set()
    for variant in ("byte260", "sp320", "sp320-caseops"):
        out = prepare_files(val, *both, *options, "--errors", "replace", "--variant", variant)
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["replacements"] == {"train": 0, "val": 6}
        names.add(manifest["val_text_sha256"])
    assert names == {text_sha256(replaced)}


def test_python_files_in_other_encodings_are_counted(prepare, tmp_path, capsys):
    """A library tests encodings with such files: no reason to stop, but a reason to say so."""
    source = tmp_path / "src"
    source.mkdir()
    for i in range(9):
        (source / f"m{i}.py").write_text(text(i, 60))
    (source / "latin.py").write_bytes(b"# coding: latin-1\n# caf\xe9\n")
    call = ["python", str(source), "--val-share", "0.2", "--overlap", "off", "--out", str(tmp_path / "o")]
    assert prepare.main(call) == 0
    found = json.loads((tmp_path / "o" / "manifest.json").read_text())["replacements"]
    assert sum(found.values()) == 1 and "now U+FFFD" in capsys.readouterr().err
    both = documents_of(tmp_path / "o", "train") + documents_of(tmp_path / "o", "val")
    assert "# coding: latin-1\n# caf\ufffd\n".encode() in both
    assert prepare.main([*call, "--force", "--errors", "strict"]) == 0
    both = documents_of(tmp_path / "o", "train") + documents_of(tmp_path / "o", "val")
    assert b"# coding: latin-1\n# caf\xe9\n" in both
    assert prepare.main([*call, "--force", "--errors", "strict", "--variant", "sp320"]) == 2
    assert "latin.py: byte 0xe9 at offset 23 is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", [False, True])
def test_normalised_bytes_are_what_the_ids_spell(prepare_files, field_tokenizer, trunk, tiny, jsonl, prefix):
    """The very number by which the training script divides, also of a model that folds and has no prefix."""
    train = [text(i, 200) for i in range(5)]
    val = ["  two  spaces\n\nand\tlines \ufb01\u2122 ", text(99, 90), "\u00e9\u6771\u4eac", " \n "]
    _, model = field_tokenizer("\n".join(train), 320, add_dummy_prefix=prefix, hard_vocab_limit=True)
    options = ["--variant", "sp320", "--tokenizer", model, "--overlap", "off", "--no-shuffle"]
    out = prepare_files(jsonl("a.jsonl", train), jsonl("v.jsonl", val), *options)
    manifest = json.loads((out / "manifest.json").read_text())
    folded = ["two spaces and lines fiTM", text(99, 90).strip(), "\u00e9\u6771\u4eac", ""]
    assert manifest["val_normalised_bytes"] == sum(len(document.encode()) for document in folded)
    assert manifest["val_bytes"] == sum(len(document.encode()) for document in val)
    tables = trunk.byte_tables(tiny(VOCAB_SIZE=320, TOKENIZER_PATH=model))
    counted = trunk.target_bytes(ids_of(out, "val").astype(np.int64), tables).sum()
    assert manifest["val_normalised_bytes"] == counted


def test_memory_does_not_grow_with_packed_text(prepare, prepare_files, jsonl, tmp_path):
    """As below, of files that are unpacked on the way. Arrow's memory is its own: rows come by the batch."""
    import gzip

    import pyarrow
    import pyarrow.parquet
    import zstandard

    small, large = jsonl("a.jsonl", [text(0, 99)]), [text(1 + i, 8000) for i in range(400)]
    lines = "".join(json.dumps({"text": document}) + "\n" for document in large).encode()
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    pyarrow.parquet.write_table(pyarrow.table({"text": large}), tmp_path / "b.parquet")
    for name in ("b.jsonl.zst", "b.jsonl.gz", "b.parquet"):
        tracemalloc.start()
        try:
            out = prepare_files(
                tmp_path / name, small, "--no-shuffle", "--overlap", "off", out=f"of_{name}"
            )
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(ids_of(out, "train")) > 15_000_000 and peak < 10_000_000, (name, peak)


def test_memory_does_not_grow_with_the_text(prepare, prepare_files, jsonl, tmp_path):
    """Documents go to the shard as they come: 24 MB of text, 12 MB of memory."""
    small, large = jsonl("a.jsonl", [text(0, 99)]), tmp_path / "b.jsonl"
    line = json.dumps({"text": text(1, 8000)}) + "\n"
    with open(large, "w") as file:
        for _ in range(24_000_000 // len(line)):
            file.write(line)
    tracemalloc.start()
    try:
        out = prepare_files(large, small, "--no-shuffle", "--overlap", "off")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(ids_of(out, "train")) > 23_000_000 and peak < 12_000_000, peak


def test_equal_documents_meet_once_and_never_on_both_sides(prepare, tmp_path):
    source = tmp_path / "src"
    (source / "sub").mkdir(parents=True)
    for i in range(40):
        (source / f"m{i}.py").write_text(text(i, 60))
        (source / "sub" / f"copy{i}.py").write_text(text(i, 60))
    out = tmp_path / "o"
    arguments = ["python", str(source), "--out", str(out), "--val-share", "0.2", "--overlap", "report"]
    assert prepare.main(arguments) == 0
    train, val = documents_of(out, "train"), documents_of(out, "val")
    assert len(train) + len(val) == 40 and not set(train) & set(val) and len(val) > 2
    assert prepare.main([*arguments, "--force"]) == 0
    assert documents_of(out, "val") == val  # the split is a function of the documents
    corpus = prepare.source_python(prepare.parse(arguments))
    (source / "m7.py").write_text("other")
    (source / "sub" / "copy7.py").write_text("other")
    with pytest.raises(prepare.UserError, match="7.py: changed while it was read"):
        list(corpus.train()) + list(corpus.val())


def test_equal_validation_document_is_refused(prepare_files, jsonl, tmp_path, capsys):
    same = text(1, 50)
    training = jsonl("a.jsonl", [text(0, 50), same])
    out = prepare_files(training, jsonl("v.jsonl", [same]), "--no-shuffle", code=2)
    assert "validation document 0 equals training document 1" in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".*partial"))


def test_overlapping_validation_documents_are_dropped_and_counted(prepare_files, jsonl):
    fresh = [" ".join(str(n) for n in np.random.default_rng(i).integers(0, 10**9, 400)) for i in range(3)]
    train = [text(i, 400) for i in range(6)]
    middle = len(train[2]) // 2
    half = fresh[1][:middle] + train[2][middle:]  # half of it is training text, shifted
    out = prepare_files(jsonl("a.jsonl", train), jsonl("v.jsonl", [fresh[0], half, fresh[2]]), "--no-shuffle")
    assert documents_of(out, "val") == [fresh[0].encode(), fresh[2].encode()]
    overlap = json.loads((out / "manifest.json").read_text())["overlap"]
    assert overlap["documents_dropped"] == 1 and 0.05 < overlap["share_found"] < 0.5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(64, 3000), st.integers(1, 400))
def test_overlap_scan_equals_brute_force(prepare, seed, length, alphabet):
    rng = np.random.default_rng(seed)
    training = [rng.integers(0, min(alphabet, 255), length).astype(np.uint8).tobytes() for _ in range(3)]
    start = int(rng.integers(0, max(1, length - 200)))
    validation = [
        training[1][start : start + 200],
        rng.integers(0, 255, 300).astype(np.uint8).tobytes(),
        b"short",
    ]
    scan = prepare.OverlapScan(chunk=512)
    for document in validation:
        scan.add_validation(document)
    scan.close_validation()
    for document in training:
        scan.add_training(document)
    scan.flush()
    for document, share in zip(validation, scan.shares()):
        shingles = [document[i : i + 64] for i in range(0, len(document) - 63, 64)]
        wanted = np.mean([any(s in t for t in training) for s in shingles]) if shingles else 0.0
        assert share == pytest.approx(wanted)


def test_markov2_is_periodic_and_refused(prepare, tmp_path, capsys):
    """The published synthetic stream repeats every 24,576 bytes: its held-out tail is training text."""
    stream = prepare.markov2(1 << 17, 42)
    assert stream[24576:] == stream[:-24576] and len(set(stream[:24576])) > 200
    assert stream[-6000:] in stream[: len(stream) * 95 // 100]
    arguments = ["markov2", "--bytes", str(1 << 17), "--out", str(tmp_path / "m")]
    assert prepare.main(arguments) == 2
    assert "repeat training text" in capsys.readouterr().err and not (tmp_path / "m").exists()
    assert prepare.main([*arguments, "--overlap", "report"]) == 0
    assert json.loads((tmp_path / "m" / "manifest.json").read_text())["overlap"]["share_found"] > 0.99


def test_tinyshakespeare_checks_its_sum(prepare, tmp_path, capsys):
    (tmp_path / "input.txt").write_text("First Citizen:\n")
    arguments = ["tinyshakespeare", "--file", str(tmp_path / "input.txt"), "--out", str(tmp_path / "o")]
    assert prepare.main(arguments) == 2
    assert "sha256" in capsys.readouterr().err


@pytest.fixture
def hub(tmp_path, prepare):
    """A local folder laid out like the published dataset repository, with documents and sp shards."""
    root = tmp_path / "hub"
    (root / "datasets" / "fineweb10B_sp320").mkdir(parents=True)
    (root / "tokenizers").mkdir()
    documents = [text(i, 120) for i in range(24)]
    (root / "docs_selected.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    (tmp_path / "t.txt").write_text(
        " ".join(documents) + " ".join(chr(65 + i % 26) * (i % 9) for i in range(2000))
    )
    model = prepare.train_pieces(iter([(tmp_path / "t.txt").read_bytes()]), 320, root / "tokenizers")
    model.rename(root / "tokenizers" / "fineweb_320_bpe.model")
    tokenizer = prepare.PieceTokenizer(root / "tokenizers" / "fineweb_320_bpe.model", "sp320")
    for split, part in (("val", documents[:4]), ("train", documents[4:])):
        ids = np.concatenate([np.concatenate(([1], tokenizer.encode(d.encode()))) for d in part])
        for number, piece in enumerate(np.array_split(ids, 1 if split == "val" else 2)):
            name = f"fineweb_{split}_{number:06d}.bin"
            write_shard(prepare, root / "datasets" / "fineweb10B_sp320" / name, piece)
    sums = "".join(
        f"{prepare.sha256_file(path)}  {path.relative_to(root).as_posix()}\n"
        for path in sorted(root.rglob("*"))
        if path.is_file()
    )
    (root / "SHA256SUMS").write_text(sums)
    return root, documents


def test_fineweb_documents_from_a_local_hub(prepare, hub, tmp_path):
    root, documents = hub
    out = tmp_path / "o"
    arguments = ["fineweb", "--hub-folder", str(root), "--val-documents", "5", "--overlap", "report"]
    assert prepare.main([*arguments, "--out", str(out)]) == 0
    assert documents_of(out, "val") == [d.encode() for d in documents[:5]]
    assert documents_of(out, "train") == [d.encode() for d in documents[5:]]
    assert prepare.VAL_DOCUMENTS_FINEWEB == 50_000


def test_the_contests_validation_documents_are_never_dropped(prepare, hub, tmp_path, monkeypatch):
    root, documents = hub
    monkeypatch.setattr(prepare, "OVERLAP_LIMIT", -1.0)  # every document overlaps
    arguments = ["fineweb", "--hub-folder", str(root), "--val-documents", "5", "--out", str(tmp_path / "o")]
    assert prepare.main(arguments) == 0
    assert documents_of(tmp_path / "o", "val") == [d.encode() for d in documents[:5]]
    overlap = json.loads((tmp_path / "o" / "manifest.json").read_text())["overlap"]
    assert overlap["mode"] == "report" and overlap["documents_dropped"] == 0


def test_fineweb_shards_are_fetched_and_converted_to_bytes(prepare, hub, tmp_path, capsys):
    root, documents = hub
    shards, converted = tmp_path / "shards", tmp_path / "bytes"
    fetch = ["fineweb", "--hub-folder", str(root), "--variant", "sp320", "--shards", "2"]
    fetch += ["--out", str(shards)]
    assert prepare.main(fetch) == 0
    assert sorted(p.name for p in shards.iterdir()) == [
        "fineweb_320_bpe.model", "fineweb_train_000000.bin", "fineweb_train_000001.bin",
        "fineweb_val_000000.bin", "manifest.json",
    ]
    convert = ["convert", "--from", str(shards), "--tokenizer", str(shards / "fineweb_320_bpe.model")]
    assert prepare.main([*convert, "--out", str(converted)]) == 0
    assert documents_of(converted, "val") == [d.encode() for d in documents[:4]]
    assert documents_of(converted, "train") == [d.encode() for d in documents[4:]]
    manifest = json.loads((converted / "manifest.json").read_text())
    assert manifest["val_text_sha256"] == text_sha256(documents[:4])
    damaged = root / "datasets" / "fineweb10B_sp320" / "fineweb_val_000000.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"\1\1")
    assert prepare.main([*fetch, "--force"]) == 2
    assert "is not the published" in capsys.readouterr().err


def test_conversion_table_equals_decoding_with_a_dummy_prefix(prepare, field_tokenizer):
    """The field's models put a space before every document
    and fold white space; bytes equal the decoded text's."""
    model, path = field_tokenizer("\n".join(text(i, 60) for i in range(40)), 400)
    texts = ["the quick fox", " leading  double", "na\u00efve \u4f60\u597d", "", "dog" * 30, "a\ttab"]
    ids = np.concatenate([[1, *model.encode(t)] for t in texts])
    table = prepare.piece_table(model)
    whole = prepare.ids_to_bytes(ids, table, True, False)
    wanted = b"".join(b"\x00" + model.decode(model.encode(t)).encode() for t in texts)
    assert (whole[whole == 1]).size == len(texts)
    assert bytes(np.where(whole == 1, 0, whole.astype(int) - 4).astype(np.uint8)) == wanted
    for cut in (1, 5, 13, len(ids) - 1):  # blocks are converted one after the other
        parts = [
            prepare.ids_to_bytes(ids[:cut], table, True, False),
            prepare.ids_to_bytes(ids[cut:], table, True, bool(ids[cut - 1] == 1)),
        ]
        assert np.array_equal(np.concatenate(parts), whole)


def test_a_trained_tokenizer_does_not_depend_on_its_folder(prepare_files, jsonl):
    files = jsonl("a.jsonl", [text(i, 300) for i in range(9)]), jsonl("v.jsonl", [text(99, 50)])
    folders = [prepare_files(*files, "--variant", "sp320", out=out) for out in ("first", "second")]
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second and "sp320.model" in first


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_trained_tokenizer_loses_nothing(prepare, pieces, document):
    ids = pieces.encode(document.encode())
    joined, starts, lengths = prepare.piece_table(pieces.model)
    assert b"".join(joined[starts[i] : starts[i] + lengths[i]].tobytes() for i in ids) == document.encode()


@pytest.fixture(scope="module")
def pieces(prepare, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    return prepare.PieceTokenizer(
        prepare.train_pieces(iter([text(i, 300).encode() for i in range(9)]), 320, folder), "sp320"
    )


def test_bad_calls_are_one_line(prepare, jsonl, tmp_path, capsys):
    (tmp_path / "x.pdf").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"tex')
    (tmp_path / "broken.jsonl.zst").write_bytes(b"not zstandard")
    good = jsonl("a.jsonl", [text(0, 30), text(1, 30)])
    cases = [
        ["files", str(tmp_path / "none.txt")],
        ["files", str(tmp_path / "x.pdf")],
        ["files", str(tmp_path / "broken.jsonl")],
        ["files", str(tmp_path / "broken.jsonl.zst")],
        ["files", good, "--variant", "char"],
        ["files", good, "--variant", "sp10"],
        ["files", good, "--variant", "sp99999"],
        ["files", good, "--val", good, "--val-tail", "9"],
        ["files", jsonl("one.jsonl", [text(0, 30)])],
        ["python", str(tmp_path / "no")],
        ["convert", "--from", str(tmp_path), "--variant", "byte260"],
        ["files", good, "--val-share", "0"],
        ["fineweb", "--hub-folder", str(tmp_path / "no")],
        ["files", good, "--shard-tokens", "0"],
        ["files", good, "--tokenizer", "no.model"],
        ["files", good, "--val", good, "--val-share", "0.5"],
        ["convert", "--from", str(tmp_path), "--seed", "3"],
        ["fineweb", "--hub-folder", str(tmp_path), "--shards", "1", "--documents"],
    ]
    for case in cases:
        assert prepare.main([*case, "--out", str(tmp_path / "o")]) == 2, case
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert not (tmp_path / "o").exists()
    assert prepare.main(["files", good, "--out", str(tmp_path / "o"), "--overlap", "off"]) == 0
    assert prepare.main(["files", good, "--out", str(tmp_path / "o")]) == 2  # exists
    assert not list(tmp_path.glob(".o*"))


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupted_preparation_leaves_nothing(tmp_path):
    big = tmp_path / "big.jsonl"
    with open(big, "w") as file:
        for i in range(4000):
            file.write(json.dumps({"text": text(i, 2000)}) + "\n")
    (tmp_path / "v.txt").write_text(text(4000, 2000))
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), "files", str(big)]
    command += ["--val", str(tmp_path / "v.txt")]
    command += ["--out", str(tmp_path / "o"), "--variant", "sp8000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.time() + 30
    while not list(tmp_path.glob(".o.*.partial")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (130, 2, -2) and not (tmp_path / "o").exists()
    assert not list(tmp_path.glob(".o.*.partial"))


# The loader


@pytest.fixture
def data(trunk, tiny, corpus):
    return lambda **overrides: trunk.Dataset(tiny(DATA_PATH=corpus, **overrides), True)


def rows_of(trunk, args, data, ranks: int, steps: int) -> np.ndarray:
    """Real rows of `steps` global batches, in the order of the global batch."""
    plan = trunk.BatchPlan.make(args, ranks)
    loaders = [trunk.Loader(data, args, plan, rank) for rank in range(ranks)]
    out = []
    for _ in range(steps):
        batch = {}
        for rank, loader in enumerate(loaders):
            ids, weights, _ = loader.next()
            for micro in range(plan.micro_steps):
                numbers, _ = plan.slots(micro, rank)
                for number, row, weight in zip(numbers, ids[micro], weights[micro]):
                    if weight:
                        assert number not in batch
                        batch[number] = row.numpy()
        assert sorted(batch) == list(range(plan.rows))
        out += [batch[i] for i in range(plan.rows)]
    return np.stack(out)


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_global_batch_does_not_depend_on_ranks_or_memory(trunk, tiny, data, corpus, order):
    overrides = {"DATA_PATH": corpus, "TRAIN_ORDER": order}
    shards = data()
    base = rows_of(trunk, tiny(**overrides), shards, 1, 3)
    for ranks, memory in ((2, 512), (3, 128), (5, 64), (4, 10**6)):
        assert np.array_equal(
            rows_of(trunk, tiny(**overrides, DEVICE_BATCH_TOKENS=memory), shards, ranks, 3), base
        )


def test_sequential_rows_are_the_stream_without_gap_or_overlap(trunk, tiny, data, corpus):
    rows = rows_of(trunk, tiny(DATA_PATH=corpus), data(), 2, 4)
    stream = ids_of(corpus, "train")
    assert np.array_equal(rows[:, :-1].ravel(), stream[: rows[:, :-1].size])
    assert np.array_equal(rows[:, -1], stream[64 : 64 * len(rows) + 1 : 64])


def test_an_epoch_covers_the_shards_once_and_shuffles_anew(trunk, tiny, data, corpus):
    shards = data()
    total = sum((len(s) - 1) // 64 for s in shards.train_shards)
    args = tiny(DATA_PATH=corpus, TRAIN_ORDER="shuffled", TRAIN_BATCH_TOKENS=64 * 2)
    loader = trunk.Loader(shards, args, trunk.BatchPlan.make(args, 1), 0)
    first, second = loader._next_rows(total), loader._next_rows(total)
    assert len(set(first)) == total and set(first) == set(second) and first != second
    assert loader.state == {"epoch": 2, "shard": 0, "row": 0}


def test_loader_resumes_at_its_state_and_prefetch_changes_nothing(trunk, tiny, data, corpus):
    import torch

    args = tiny(DATA_PATH=corpus, TRAIN_ORDER="shuffled")
    plan, shards = trunk.BatchPlan.make(args, 1), data()
    straight = trunk.Loader(shards, args, plan, 0)
    wanted = [straight.next() for _ in range(6)]
    resumed = trunk.Loader(shards, args, plan, 0, wanted[2][2])
    assert all(torch.equal(resumed.next()[0], wanted[i][0]) for i in (3, 4, 5))
    stream = trunk.Loader(shards, args, plan, 0).prefetch(torch.device("cpu"))
    for ids, weights, state in wanted:
        ids_, weights_, inputs, state_ = next(stream)
        assert inputs is None
        assert torch.equal(ids, ids_) and torch.equal(weights, weights_) and state == state_
    stream.close()


@pytest.fixture(scope="module")
def damaged(corpus, tmp_path_factory):
    """A copy of the corpus whose files a test may break."""
    import shutil

    folder = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(corpus, folder)
    return folder


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_shards_are_refused_by_name(trunk, damaged, data):
    """Any changed byte, a cut or an appended file: refused at start in one line that names the file."""
    from conftest import TINY

    args = trunk.Hyperparameters({**TINY, "DATA_PATH": str(damaged)})
    path = data.draw(st.sampled_from(sorted(damaged.glob("*.bin"))))
    good = path.read_bytes()
    bad = bytearray(good)
    kind = data.draw(st.sampled_from(["flip", "cut", "append", "header"]))
    if kind == "cut":
        bad = bad[: data.draw(st.integers(0, len(bad) - 1))]
    elif kind == "append":
        bad += b"\0" * data.draw(st.integers(1, 5))
    else:
        bad[data.draw(st.integers(0, 11 if kind == "header" else len(bad) - 1))] ^= data.draw(
            st.integers(1, 255)
        )
    try:
        path.write_bytes(bytes(bad))
        with pytest.raises(trunk.UserError) as caught:
            trunk.Dataset(args, True)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)
    finally:
        path.write_bytes(good)
    trunk.Dataset(args, True)


def test_ids_outside_the_vocabulary_are_refused_without_a_manifest(trunk, tiny, prepare, tmp_path):
    ids = np.full(2_000_000, 5, "<u2")
    ids[-70] = 300  # beyond the part that is checked at start
    write_shard(prepare, tmp_path / "x_train_000000.bin", ids)
    write_shard(prepare, tmp_path / "x_val_000000.bin", np.full(100, 5))
    args = tiny(DATA_PATH=tmp_path, TRAIN_BATCH_TOKENS=64 * 2)
    loader = trunk.Loader(
        trunk.Dataset(args, True),
        args,
        trunk.BatchPlan.make(args, 1),
        0,
        {"epoch": 0, "shard": 0, "row": (2_000_000 - 1) // 64 - 1},
    )
    with pytest.raises(trunk.UserError, match="id 300 is outside VOCAB_SIZE=260"):
        loader.next()
    write_shard(prepare, tmp_path / "x_val_000000.bin", np.full(100, 400))
    with pytest.raises(trunk.UserError, match="x_val_000000.bin: id 400"):
        trunk.Dataset(args, True)


def test_verification_that_is_asked_for_needs_a_manifest(trunk, tiny, corpus, tmp_path):
    args = tiny(DATA_PATH=tmp_path)
    for path in corpus.glob("*.bin"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    trunk.Dataset(args, True)  # auto: nothing to hold it against
    args.verify_data = "1"
    with pytest.raises(trunk.UserError, match=r"_train_000000.bin: sha256 \w+, the manifest has nothing"):
        trunk.Dataset(args, True)


def test_rows_longer_than_the_data_are_refused(trunk, tiny, corpus, data):
    args = tiny(DATA_PATH=corpus, TRAIN_SEQ_LEN=1 << 22, TRAIN_BATCH_TOKENS=1 << 23, EVAL_SEQ_LEN=64)
    with pytest.raises(trunk.UserError, match="TRAIN_SEQ_LEN=4194304: no training shard has over"):
        trunk.Loader(data(), args, trunk.BatchPlan.make(args, 1), 0)
    assert "VOCAB_SIZE" in str(pytest.raises(trunk.UserError, data, VOCAB_SIZE=300).value)
