"""Data for the record SGJM: the published synthetic stream leaks
and is refused; sources, their splits, what the log says of them."""

import hashlib
import json
import math
import random
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from family import load_script

section = load_script(*(ROOT / "records").glob("*_SGJM"))


def published_stream(length: int, seed: int) -> bytes:
    """P[i mod 96] xor (17 a + 31 c + 7 i) mod 256, a the byte
    before, c the one before that: no chance in it but P."""
    rng = random.Random(seed)
    pattern = [rng.randrange(256) for _ in range(96)]
    out = bytearray()
    for i in range(length):
        a, c = (out[-1] if i else 0), (out[-2] if i > 1 else 0)
        out.append(pattern[i % 96] ^ ((17 * a + 31 * c + 7 * i) % 256))
    return bytes(out)


@pytest.fixture(scope="module")
def stream():
    """The published corpus, 1 MiB, and its split: (training 95 %, evaluation)."""
    text = published_stream(1 << 20, 42)
    return text[: len(text) * 95 // 100], text[len(text) * 95 // 100 :]


def test_the_published_stream_repeats_itself(stream):
    text = b"".join(stream)
    assert text[24_576:] == text[:-24_576]
    # The first bytes tell most periods apart, without a copy of the whole text.
    begins = [period for period in range(1, 24_576) if text.startswith(text[:16], period)]
    assert not any(text[period:] == text[:-period] for period in begins)
    shares = [count / len(text) for count in Counter(text).values()]
    entropy = -sum(share * math.log(share) for share in shares)
    assert entropy == pytest.approx(5.5225, abs=5e-4)  # the plateau of the published curves, 5.526 nats


def test_the_published_evaluation_text_was_trained_on(stream):
    train, held_out = stream
    assert (len(train), len(held_out)) == (996_147, 52_429)
    assert train.find(held_out) == 13_107
    # What a memory of one period pays for windows that start cold: two bytes tell where it is.
    period, nats = train[:24_576] * 2, 0.0
    for known in range(1, 4):
        long, short = (Counter(period[i : i + n] for i in range(24_576)) for n in (known + 1, known))
        nats += sum(-count / 24_576 * math.log(count / short[key[:-1]]) for key, count in long.items())
    # Of the 0.0254 nats that were called TinyShakespeare
    assert nats / 256 == pytest.approx(0.0179, abs=2e-4)


def options(**changes) -> Namespace:
    return Namespace(
        **{
            "overlap": "drop", "variant": "byte260", "tokenizer": "", "shard_tokens": 1 << 20,
            "force": False, **changes,
        }
    )


def test_our_overlap_check_refuses_the_leak(prepare, stream, tmp_path, capsys):
    train, held_out = stream
    # One document, or several
    for name, whole in (("leak", [held_out]), ("cut", [held_out[:20_000], held_out[20_000:]])):
        corpus = prepare.Corpus(name, lambda: iter([train]), lambda whole=whole: iter(whole), {})
        with pytest.raises(
            prepare.UserError, match=f"all {len(whole)} validation documents repeat training text"
        ):
            prepare.build(corpus, options(), tmp_path / name)
    # Beside text that is honest, what leaks is dropped and counted.
    fair = bytes(np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8))
    corpus = prepare.Corpus("mixed", lambda: iter([train]), lambda: iter([held_out, fair]), {})
    manifest = prepare.build(corpus, options(), tmp_path / "mixed")
    assert manifest["overlap"]["documents_dropped"] == 1 and manifest["bytes"]["val"] == 4096
    assert manifest["overlap"]["share_found"] > 0.9
    for name, part in (("train", train), ("val", held_out)):
        (tmp_path / f"{name}.txt").write_bytes(part)
    call = [
        "files", str(tmp_path / "train.txt"), "--val", str(tmp_path / "val.txt"), "--out",
        str(tmp_path / "files"),
    ]
    assert prepare.main(call) == 2 and "repeat training text" in capsys.readouterr().err
    assert not {"leak", "cut", "files"} & {path.name for path in tmp_path.iterdir()}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.fixture
def shakespeare(prepare, tmp_path, monkeypatch) -> bytes:
    """A stand-in for the 1.1 MB file, at the address and with the sum that data/prepare.py believes in."""
    words = [
        "speak", "the", "truth", "and", "shame", "devil", "my", "lord", "come", "hither", "night",
        "is", "long", "enough", "for", "sorrow",
    ]
    rng = random.Random(0)
    speeches = ["".join(f"{rng.choice(words)} " for _ in range(rng.randrange(5, 40))) for _ in range(300)]
    text = "\n\n".join(f"SPEAKER {i}:\n{speech}" for i, speech in enumerate(speeches)).encode()
    (tmp_path / "there.txt").write_bytes(text)
    monkeypatch.setattr(
        prepare,
        "TINYSHAKESPEARE",
        ((tmp_path / "there.txt").as_uri(), hashlib.sha256(text).hexdigest()),
    )
    return text


def decoded(folder: Path, split: str) -> bytes:
    ids = np.concatenate(
        [np.fromfile(path, "<u2", offset=1024) for path in sorted(folder.glob(f"*_{split}_*.bin"))]
    )
    return (ids[ids >= 4] - 4).astype(np.uint8).tobytes()


@pytest.mark.parametrize("how", ["download", "--path", "--file"])
def test_tinyshakespeare_is_one_text_cut_once(prepare, shakespeare, tmp_path, how, capsys):
    local = [how, str(tmp_path / "there.txt")] if how != "download" else []
    assert prepare.main(["tinyshakespeare", *local, "--out-root", str(tmp_path / "sets")]) == 0
    folder = tmp_path / "sets" / "tinyshakespeare_byte260"
    train, val = (decoded(folder, split) for split in ("train", "val"))
    assert train + val == shakespeare and train.endswith(b"\n\n") and val.startswith(b"SPEAKER")
    assert 0.07 < len(val) / len(shakespeare) < 0.1
    manifest = json.loads((folder / "manifest.json").read_text())
    notes = manifest["source_notes"]
    assert notes["sha256"] == hashlib.sha256(shakespeare).hexdigest() and notes["url"].endswith("there.txt")
    assert notes["split"] == f"contiguous: {len(train)} bytes, then {len(val)} held out"
    assert manifest["bytes"] == {"train": len(train), "val": len(val)}
    assert manifest["overlap"]["documents_dropped"] == 0
    assert (tmp_path / "sets" / "downloads" / "tinyshakespeare.txt").exists() == (how == "download")


def test_another_file_than_tinyshakespeare_is_refused(prepare, shakespeare, tmp_path, capsys):
    (tmp_path / "there.txt").write_bytes(shakespeare + b"!")
    for local in ([], ["--path", str(tmp_path / "there.txt")]):
        assert prepare.main(["tinyshakespeare", *local, "--out-root", str(tmp_path / "sets")]) == 2
        assert "is not tinyshakespeare's" in capsys.readouterr().err
    assert (
        prepare.main(
            [
                "tinyshakespeare", "--path", str(tmp_path / "none.txt"), "--out-root",
                str(tmp_path / "sets"),
            ]
        )
        == 2
    )
    assert "none.txt: no such file" in capsys.readouterr().err


def code(seed: int) -> str:
    rng = random.Random(seed)
    return "".join(
        f"def f{rng.randrange(10**9)}(x):\n    return x * {rng.randrange(10**9)}\n\n"
        for _ in range(40)
    )


def test_python_sources_are_split_by_file_and_named(prepare, tmp_path, monkeypatch):
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    for i in range(30):
        path = (packages / "pkg" if i % 2 else library / "email") / f"m{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code(i))
    (packages / "pkg" / "copy.py").write_text(code(3))  # a second copy of a file
    monkeypatch.setattr(prepare.site, "getsitepackages", lambda: [str(packages)])
    monkeypatch.setattr(
        prepare.sysconfig, "get_paths", lambda: {"stdlib": str(library), "purelib": str(packages)}
    )
    for call, files in (
        (["python", str(library / "email")], range(0, 30, 2)),
        (["python_extended"], range(30)),
    ):
        out = tmp_path / call[0]
        assert prepare.main([*call, "--val-share", "0.2", "--out", str(out)]) == 0
        train, val = (decoded(out, split) for split in ("train", "val"))
        for i in files:
            assert (code(i).encode() in train) + (code(i).encode() in val) == 1  # once, on one side
        assert len(train + val) == sum(len(code(i)) for i in files) and val
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["source_notes"]["split"] == "by hash of the file, 0.2 held out"
        assert manifest["source"] == call[0] and manifest["overlap"]["share_found"] < 0.3


def test_the_log_says_what_was_read(prepare, tmp_path, shakespeare):
    (tmp_path / "a.txt").write_text(code(1))
    (tmp_path / "b.txt").write_text(code(2))
    out = tmp_path / "sets"
    assert (
        prepare.main(
            ["files", str(tmp_path / "a.txt"), "--val", str(tmp_path / "b.txt"), "--out", str(out)]
        )
        == 0
    )
    found = section.Dataset(section.Hyperparameters({"DATA_PATH": str(out)}), verify=True).fingerprint()
    sums = [[hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()] for name in ("a.txt", "b.txt")]
    notes = found["source_notes"]
    assert [notes["files"], notes["files_sha256"]] == [["a.txt"], sums[0]]
    assert [notes["val_files"], notes["val_files_sha256"]] == [["b.txt"], sums[1]]
    assert found["source"] == "files"
    assert found["overlap"]["documents_dropped"] == 0
    assert found["bytes"]["val"] == len(code(2))
    assert json.loads(json.dumps(found)) == found
