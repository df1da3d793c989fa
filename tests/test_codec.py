"""The codec: exact integer tables, round trips through files, refusals, and proofs that must fail."""

import json
import math
import random
import subprocess
import sys
import zlib

import codec
import numpy as np
import pytest
from conftest import ROOT, TINY, enlivened, environment, slow
from family import load_script
from hypothesis import given, settings
from hypothesis import strategies as st

SMALL = {"NUM_LAYERS": 1, "NGRAM_ORDERS": "2", "NGRAM_WORDS": 0, "JEPA_CHUNK_SIZE": 0, "XSA_LAST_N": 1}
SMALL |= {"MODEL_DIM": 16, "NUM_HEADS": 2, "NUM_KV_HEADS": 1}
# Runs the tool's own `main` on several command lines, so that they share one import of torch.
DRIVER = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])
import codec
for argv in json.loads(sys.argv[2]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = codec.main(argv)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def call(*command, **env) -> tuple[int, str, str]:
    """codec.py with these arguments in a process of its own: (exit code, stdout, stderr)."""
    line = [sys.executable, str(ROOT / "scripts" / "codec.py"), *map(str, command)]
    done = subprocess.run(line, env=environment(**env), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def call_all(*commands) -> list[list]:
    """The same for several command lines in one process."""
    lines = json.dumps([[str(part) for part in command] for command in commands])
    command = [sys.executable, "-c", DRIVER, str(ROOT / "scripts"), lines]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def refused(result) -> str:
    """The one line that a misuse ends with."""
    code, out, err = result
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, result
    return err


@pytest.fixture
def artifact(trunk, tiny, alive, tmp_path):
    """artifact(VAR=value, ...) -> path of an untrained model's artifact."""

    def artifact(name: str = "model.bin", seed: int = 0, **overrides):
        args = tiny(**{**SMALL, **overrides})
        tensors = {key: p.detach().numpy() for key, p in alive(args, seed).exported().items()}
        (tmp_path / name).write_bytes(trunk.pack(tensors, args))
        return tmp_path / name

    return artifact


@pytest.fixture
def doctored(tmp_path):
    """doctored(name, source) -> a copy of the trunk with `source` below it, to replace functions."""

    def doctored(name: str, source: str):
        (tmp_path / name).mkdir()
        script = tmp_path / name / "train_gpt.py"
        script.write_text((ROOT / "train_gpt.py").read_text() + "\n\n" + source)
        return script

    return doctored


# --- the table ---------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=400))
def test_table_is_whole_positive_and_in_order(logprobs):
    logprobs = np.array(logprobs, np.float32)
    if not np.isfinite(logprobs.max()):
        with pytest.raises(codec.BadStream):
            codec.frequencies(logprobs)
        return
    table = codec.frequencies(logprobs)
    assert table.sum() == codec.TOTAL and table.min() >= 1
    assert (table == codec.frequencies(logprobs.copy())).all()
    p = np.exp(logprobs.astype(np.float64) - logprobs.max())
    assert (np.diff(table[np.lexsort((table, p))]) >= 0).all()  # likelier symbols get no less
    share = p / p.sum() * (codec.TOTAL - len(p))
    assert (table >= np.floor(share * (1 - 1e-12))).all()  # the bound on the length of the code


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_table_refuses_what_is_no_distribution(bad):
    with pytest.raises(codec.BadStream):
        codec.frequencies(np.array(bad, np.float32))


@pytest.mark.parametrize("size", [2, 260, 65536])
def test_constriction_codes_with_exactly_this_table(size):
    """Reads the table back out of constriction: the first words of a code are a point of its cumulation."""
    from constriction import stream

    logprobs = np.log(np.random.default_rng(0).dirichlet(np.full(size, 0.05)) + 1e-30)
    model = codec.categorical(stream.model, logprobs)
    edges = np.concatenate(([0], np.cumsum(codec.frequencies(logprobs))))
    width = (2**64 - 1) >> codec.PRECISION
    for symbol in range(0, size, 1 + size // 500):
        for quantile in (edges[symbol], edges[symbol + 1] - 1):
            point = int(quantile) * width + width // 2
            words = np.array([point >> 32, point & 0xFFFFFFFF], np.uint32)
            assert stream.queue.RangeDecoder(words).decode(model) == symbol


def test_code_is_as_long_as_the_probabilities_say():
    """0.02 % over -log2 p at most, the end of the code apart; certain and impossible ids decode too."""

    class Fixed:
        """A stream that knows its distributions beforehand."""

        def __init__(self):
            self.at = -1

        def logprobs(self):
            return rows[self.at % len(rows)]

        def push(self, token):
            self.at += 1

    generator = np.random.default_rng(0)
    rows = np.log(generator.dirichlet(np.full(260, 0.02), 50) + 1e-9).astype(np.float32)
    rows -= np.log(np.exp(rows.astype(np.float64)).sum(1, keepdims=True)).astype(np.float32)
    ids = [1] + [
        int(generator.choice(260, p=np.exp(rows[i % 50]) / np.exp(rows[i % 50]).sum())) for i in range(20000)
    ]
    payload, nats, gap = codec.encode(Fixed(), np.array(ids))
    bits = nats.sum() / math.log(2)
    assert gap < 1e-5 and -1 < 8 * len(payload) - bits < 0.0002 * bits + 64
    assert codec.decode(Fixed(), payload, len(ids), 1).tolist() == ids
    rows = np.full((2, 260), -np.inf, np.float32)
    rows[:, 7] = 0.0
    payload, nats, _ = codec.encode(Fixed(), np.array([1, *[7] * 1000]))
    assert len(payload) <= 8 and nats.sum() == 0
    payload, nats, _ = codec.encode(Fixed(), np.array([1, 8, 9]))  # 24 bits each
    assert len(payload) <= 12 and np.isinf(nats).all()
    assert codec.decode(Fixed(), payload, 3, 1).tolist() == [1, 8, 9]


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=3000))
def test_shards_are_told_from_other_files(raw):
    assert codec.shard_ids(raw) is None
    ids = np.frombuffer(raw[: len(raw) // 2 * 2], "<u2")
    assert codec.shard_ids(codec.make_shard(ids)).tolist() == ids.tolist()
    assert codec.shard_ids(codec.make_shard(ids) + b"x") is None


# --- files -------------------------------------------------------------------


def test_files_come_back(artifact, corpus, tmp_path):
    """Random bytes, text, nothing at all, a shard: coded in one process, decoded in another."""
    model = artifact()
    shard = np.fromfile(next(corpus.glob("*_val_*.bin")), "<u2", offset=1024)[:150]
    files = {
        "noise": random.Random(0).randbytes(150),
        "text": "Grüße aus der Tiefe des Raums,\n\tund so weiter.\n".encode() * 4,
        "empty": b"",
        "shard.bin": codec.make_shard(shard),
        "no_ids.bin": codec.make_shard(shard[:0]),
        "odd.bin": codec.make_shard(shard[:20])[:-1],  # not quite a shard: bytes like any others
    }
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    changed = ["--set", "EVAL_STRIDE=8", "--set", "EVAL_SEQ_LEN=32"]
    packed = call_all(
        *(["compress", ROOT, model, tmp_path / name, "--json"] for name in files),
        ["compress", ROOT, model, tmp_path / "text", "-o", tmp_path / "changed.golf", *changed, "--json"],
    )
    assert [code for code, _, _ in packed] == [0] * 7, packed
    results = [json.loads(out) for _, out, _ in packed]
    for (name, raw), result in zip(files.items(), results):
        coded = (tmp_path / f"{name}.golf").stat().st_size
        assert result["bytes"] == len(raw) and result["coded_bytes"] == coded
        assert result["header_bytes"] < 190
    assert results[2]["coded_bytes"] == results[2]["header_bytes"]  # nothing to code
    assert results[3]["kind"] == "shard" and results[3]["ids"] == 150 and results[5]["kind"] == "byte260"
    plain, other = (codec.unpack((tmp_path / f"{n}.golf").read_bytes(), n) for n in ("text", "changed"))
    assert plain[1] != other[1] and "set" not in plain[0]
    assert other[0]["set"] == {"EVAL_STRIDE": "8", "EVAL_SEQ_LEN": "32"} and other[0]["threads"] == 1
    names = [*files, "changed"]
    back = call_all(
        *(["decompress", ROOT, model, tmp_path / f"{n}.golf", "-o", tmp_path / f"{n}.back"] for n in names)
    )
    assert [(code, err) for code, _, err in back] == [(0, "")] * 7, back
    assert all((tmp_path / f"{name}.back").read_bytes() == raw for name, raw in files.items())
    assert (tmp_path / "changed.back").read_bytes() == files["text"]


def test_coded_files_that_cannot_be_trusted_are_refused(artifact, doctored, tmp_path):
    """One line, exit code 2, nothing written; another machine is a warning, and then the checksum decides."""
    model, other = artifact(), artifact("other.bin", seed=3)
    script = doctored("record", "# another script\n")
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog.")
    assert call("compress", ROOT, model, tmp_path / "text")[0] == 0
    blob = (tmp_path / "text.golf").read_bytes()
    header, payload = codec.unpack(blob, "text.golf")
    lacking = {key: value for key, value in header.items() if key != "ids"}
    flipped = [blob[:at] + bytes([blob[at] ^ 4]) + blob[at + 1 :] for at in (5, 30, len(blob) - 1)]
    elsewhere = {**header, "torch": "1.0", "machine": "VAX"}
    cases = [
        *((blob[:size], ROOT, model, "not a file of this codec") for size in (0, 2)),
        *((blob[:size], ROOT, model, "truncated") for size in (7, 11, 60, len(blob) - 4, len(blob) - 1)),
        *((altered, ROOT, model, "truncated or altered") for altered in flipped),
        (blob[:3] + b"\x09" + blob[4:], ROOT, model, "format version 9"),
        (b"GOLFLM\r\n" + blob, ROOT, model, "not a file of this codec"),
        (blob, ROOT, other, "another artifact"),
        (blob, script, model, "another script"),
        (codec.pack(lacking, payload), ROOT, model, "no ids"),
        (codec.pack(header, payload[:-1]), ROOT, model, "no whole number of words"),
        (
            codec.pack(elsewhere, payload[:8] + bytes(4) + payload[12:]),
            ROOT,
            model,
            "; made with machine VAX (here",
        ),
        (codec.pack(elsewhere, payload), ROOT, model, ""),
    ]
    commands = []
    for i, (data, record, named, _) in enumerate(cases):
        (tmp_path / f"{i}.golf").write_bytes(data)
        commands.append(["decompress", record, named, tmp_path / f"{i}.golf", "-o", tmp_path / f"{i}.out"])
    results = call_all(*commands)
    for result, case in zip(results[:-2], cases):
        assert case[3] in refused(result)
    (code, out, err), moved = results[-2:]
    assert code == 2 and out == "" and cases[-2][3] in err.splitlines()[-1]
    assert moved[0] == 0 and moved[2] == err.splitlines()[0] + "\n"
    assert err.startswith("warning: made with machine VAX (here ") and ", torch 1.0 (here " in err
    assert [path.name for path in tmp_path.glob("*.out")] == [f"{len(cases) - 1}.out"]
    assert (tmp_path / f"{len(cases) - 1}.out").read_bytes() == (tmp_path / "text").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_misuse_is_one_line(artifact, doctored, tmp_path):
    model, text = artifact(), tmp_path / "text"
    text.write_text("abc")
    broken = doctored("broken", "import not_installed_anywhere\n")
    bare = doctored("bare", "del stream\n")
    before = sorted(tmp_path.rglob("*"))
    base = ["compress", ROOT, model, text]
    cases = {
        "--set NUM_LAYERS: not a setting": [*base, "--set", "NUM_LAYERS=2"],
        "--set EVAL_STRIED: not a setting": [*base, "--set", "EVAL_STRIED=2"],
        "--set EVAL_STRIDE: NAME=VALUE": [*base, "--set", "EVAL_STRIDE"],
        "EVAL_STRIDE='x' is not accepted": [*base, "--set", "EVAL_STRIDE=x"],
        "EVAL_STRIDE=65": [*base, "--set", "EVAL_STRIDE=65"],
        "--threads 0": [*base, "--threads", 0],
        "device ": [*base, "--device", "nonsense"],
        "FILE ": ["compress", ROOT, model, tmp_path / "missing"],
        "ARTIFACT ": ["prove", ROOT, tmp_path / "missing", text],
        "RECORD ": ["prove", tmp_path, model, text],
        "not an artifact of this family": ["compress", ROOT, text, text],
        "cannot be imported": ["compress", broken, model, text],
        "no function stream": ["compress", bare, model, text],
        "cannot be the output": [*base, "-o", tmp_path / "nowhere" / "out"],
        "text cannot be the output": [*base, "-o", text],
        "--bytes 0": ["prove", ROOT, model, text, "--bytes", 0],
        "not a file of this codec": ["decompress", ROOT, model, text, "-o", tmp_path / "out"],
    }
    for expected, result in zip(cases, call_all(*cases.values())):
        assert expected in refused(result), (expected, result)
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == before
    (tmp_path / "text.golf").write_text("mine")
    assert "exists: name the output with -o" in refused(call("compress", ROOT, model, text))
    (tmp_path / "constriction.py").write_text("raise ImportError\n")
    result = call("compress", ROOT, model, text, "-o", tmp_path / "out", PYTHONPATH=tmp_path)
    assert "constriction is not installed" in refused(result) and not (tmp_path / "out").exists()
    assert call("squeeze", ROOT, model, text)[0] == 2


def test_text_comes_back_through_a_tokenizer_or_is_refused(artifact, field_tokenizer, tmp_path):
    """Text that SentencePiece keeps, text that it folds, shards of its ids; no file that is not UTF-8."""
    generator = random.Random(0)
    words = ["code", "coder", "decode", "range", "naïve"]
    lines = "\n".join(" ".join(generator.choices(words, k=9)) for _ in range(200))
    exact = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    tokenizer, path = field_tokenizer(lines, 300, "exact", hard_vocab_limit=True, **exact)
    _, other = field_tokenizer(lines, 300, "folding", hard_vocab_limit=True)
    exact, folding = ["--tokenizer", path], ["--tokenizer", other]
    model = artifact(VOCAB_SIZE=300, TOKENIZER_PATH=exact[1])
    text, shard, latin, raw = (tmp_path / name for name in ("text", "ids.bin", "latin", "raw.bin"))
    text.write_bytes("the  coder\ndecodes 東京 naïvely".encode())
    ids = tokenizer.encode(text.read_text())
    shard.write_bytes(codec.make_shard(np.array([1, *ids, 1, *ids[:5]])))
    latin.write_bytes(b"na\xefve")
    raw.write_bytes(codec.make_shard(np.array([1, 300])))
    coded, coded_shard, folded, *odd = call_all(
        *(["compress", ROOT, model, path, *exact] for path in (text, shard)),
        ["compress", ROOT, model, text, "-o", tmp_path / "folded.golf", *folding],
        ["compress", ROOT, model, text, "-o", tmp_path / "out"],
        ["compress", ROOT, model, latin, *exact],
        ["compress", ROOT, model, raw, *exact],
    )
    assert coded[0] == coded_shard[0] == folded[0] == 0, (coded, coded_shard, folded)
    assert "for what the tokenizer folds" in folded[1] and "folds" not in coded[1]
    why = (
        "300 ids: --tokenizer",
        "not UTF-8 at byte 2",
        "id 300 is outside",
    )
    for expected, result in zip(why, odd):
        assert expected in refused(result)
    *back, other, (code, out, _) = call_all(
        *(["decompress", ROOT, model, f"{p}.golf", "-o", f"{p}.back", *exact] for p in (text, shard)),
        ["decompress", ROOT, model, tmp_path / "folded.golf", "-o", tmp_path / "unfolded", *folding],
        ["decompress", ROOT, model, f"{text}.golf", "-o", tmp_path / "out", *folding],
        ["prove", ROOT, model, text, *exact, "--json", "--bytes", "9"],
    )
    assert [result[0] for result in back] == [0, 0, 0], back
    assert (tmp_path / "unfolded").read_bytes() == text.read_bytes()
    assert all(p.read_bytes() == p.with_name(p.name + ".back").read_bytes() for p in (text, shard))
    assert "another tokenizer" in refused(other) and not (tmp_path / "out").exists()
    proof = json.loads(out)
    assert code == 0 and proof["decoded"] and proof["kind"] == "shard" and 9 <= proof["bytes"] < 20


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=200), st.integers(0, 200))
def test_what_a_tokenizer_folds_comes_back(left, right, cut):
    for spelled, raw in ((left, right), (left + right, left[:cut] + b"\n" + right), (left, left)):
        assert codec.repaired(spelled, codec.repair(spelled, raw)) == raw


def caseops_model(folder, prepare, kind: str):
    """A SentencePiece model of text in CaseOps form: one of data/prepare.py, or one that folds."""
    words = ["The", "quick", "brown", "FOX", "jumps", "over", "NASA", "and", "OpenAI", "every", "iPhone"]
    lines = [" ".join(random.Random(i).choices(words, k=200)) for i in range(9)]
    if kind == "exact":
        return prepare.train_pieces(iter([line.encode() for line in lines]), 320, folder, with_caseops=True)
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(codec.caseops.encode, lines), model_prefix=str(folder / "field"),
        vocab_size=320, model_type="bpe", hard_vocab_limit=False, minloglevel=2, pad_id=0, bos_id=1,
        eos_id=2, unk_id=3, byte_fallback=True, user_defined_symbols=list(codec.caseops.OPERATORS),
    )
    return folder / "field.model"


@pytest.mark.parametrize("kind", ["exact", "folding"])
def test_a_caseops_record_codes_text_in_caseops_form(kind, prepare, prepare_files, tmp_path):
    """The network reads what it was trained on, and the file comes back: capitals, literal operators, line
    ends, and what the field's model folds. A proof counts the bytes of the file, none for an operator."""
    record = codec.find_script("BiJEPAX")
    script, model = load_script(record), caseops_model(tmp_path, prepare, kind)
    size = prepare.PieceTokenizer(model, "sp").vocab_size
    off = {name: "" for name in TINY if name.startswith(("JEPA_", "NGRAM_"))}
    small = {"VOCAB_SIZE": size, "TOKENIZER_PATH": model, "MODEL_DIM": 16, "NUM_LAYERS": 4, "GATE_WINDOW": 6}
    small |= {"LOOP_FIRST": 1, "LOOP_LAST": 1, "PARALLEL_START": 2, "XSA_LAST_N": 4, "PPM_WEIGHT": 0}
    args = script.Hyperparameters({key: str(value) for key, value in (TINY | off | small).items()})
    tensors = {key: p.detach().numpy() for key, p in enlivened(script, args).exported().items()}
    (tmp_path / "model.bin").write_bytes(script.pack(tensors, args))

    document = "\ufeffThe NASA iPhone\r\n  of \ue001 OpenAI\n\n \ufb01 \u00c9T\u00c9\0 AB aB\n"
    text, size_of_text = tmp_path / "text.txt", len(document.encode())
    text.write_bytes(document.encode())
    (tmp_path / "a.txt").write_text("training text " * 20)
    options = ["--tokenizer", model, "--variant", f"sp{size}-caseops", "--overlap", "off"]
    shard = prepare_files(tmp_path / "a.txt", text, *options) / "files_val_000000.bin"
    ids = np.fromfile(shard, "<u2", offset=1024)
    assert codec.sidecar_of(shard, len(ids)).sum() == size_of_text
    # As published, the sidecar has another name; without any, nothing says what an id stands for.
    for name, data in (
        ("x_val_000000.bin", shard.read_bytes()),
        ("y_val_000000.bin", shard.read_bytes()),
        ("y_val_bytes_000000.bin", shard.with_suffix(".bytes").read_bytes()),
    ):
        (tmp_path / name).write_bytes(data)

    base, tail = [record, tmp_path / "model.bin"], ["--tokenizer", model, "--json"]
    proved = text if kind == "exact" else tmp_path / "y_val_000000.bin"
    packed, back, proof, bare = call_all(
        ["compress", *base, text, *tail],
        ["decompress", *base, f"{text}.golf", "-o", tmp_path / "back", *tail],
        ["prove", *base, proved, *tail],
        ["prove", *base, tmp_path / "x_val_000000.bin", *tail],
    )
    assert packed[0] == back[0] == proof[0] == 0, (packed, back, proof)
    result = json.loads(packed[1])
    assert result["kind"] == "caseops" and bool(result["repair_bytes"]) == (kind == "folding")
    assert result["ids"] == len(ids)  # the very ids of the shards that such a record is trained on
    assert (tmp_path / "back").read_bytes() == document.encode()
    assert json.loads(proof[1])["bytes"] == size_of_text and json.loads(proof[1])["decoded"]
    assert "without the sidecar" in refused(bare)


# --- proofs ------------------------------------------------------------------


@slow
def test_prove_passes_on_a_prefix_of_a_shard(artifact, corpus):
    shard = next(corpus.glob("*_val_*.bin"))
    code, out, err = call(
        "prove", ROOT, artifact(), shard, "--bytes", 2000, "--set", "EVAL_STRIDE=32", "--json"
    )
    assert (code, err) == (0, ""), out + err
    result = json.loads(out)
    ids = np.fromfile(shard, "<u2", offset=1024)
    stop = int(np.searchsorted(np.cumsum(ids >= 4), 2000)) + 1
    assert result["pass"] and result["decoded"] and result["failures"] == []
    assert result["bytes"] == 2000 and result["ids"] == stop and result["set"] == {"EVAL_STRIDE": "32"}
    for name in ("stream_bytes", "score_bytes"):
        assert abs(result["coded_bytes"] / result[name] - 1) < 0.002  # no 64 bytes are needed here
    assert result["coded_bpb"] == pytest.approx(8 * result["coded_bytes"] / 2000)
    assert result["largest_gap_nats"] < 1e-3 and result["normalisation_error"] < 1e-5
    assert result["encode_seconds"] > 0 and result["decode_seconds"] > 0 and result["score_seconds"] > 0


DOCTORED = """
class Doctored(Stream):
    updates = 0

    def logprobs(self):
        good = super().logprobs()
        return {logprobs}

    def push(self, token):
        super().push(token)
        self.updates += 1


def stream(model):
    return Doctored(model)


true_score = score


def score(*args):
    nats, vectors = true_score(*args)
    return {share} * nats, vectors
"""


def test_prove_fails_where_the_score_cannot_be_decoded(artifact, doctored, tmp_path):
    """A scorer that is too good, sums that are not 1, NaN, a stream that does not repeat itself; a pass."""
    scripts = {
        name: doctored(name, DOCTORED.format(logprobs=logprobs, share=share))
        for name, logprobs, share in (
            ("flattering", "good + 0.01", 0.1),
            ("silent", "good * np.float32(1 if len(self.ids) < 3 else np.nan)", 1),
            ("fickle", "good + np.float32(1e-3) * np.sin(os.getpid() + np.arange(260))", 1),
            ("honest", "good", 1),
        )
    }
    text, model = tmp_path / "text", artifact()
    text.write_bytes(random.Random(1).randbytes(100))
    *failed, passed = call_all(
        *(["prove", script, model, text, "--json"] for name, script in scripts.items() if name != "honest"),
        ["prove", scripts["honest"], model, text],
    )
    assert [code for code, _, _ in failed] == [1] * 3, failed
    flattering, silent, fickle = (json.loads(out)["failures"] for _, out, _ in failed)
    assert flattering[0].endswith("by score") and len(flattering) == 2
    assert flattering[1].startswith("a distribution misses the sum 1 by 0.01")
    assert len(silent) == 1 and "log-probabilities are not numbers" in silent[0]
    assert fickle[-1] == "decoding ended with exit code 2"
    assert passed[0] == 0 and "updates  101 at test time" in passed[1], passed
    assert passed[1].rstrip().endswith("PASS: decoded id for id in a process of its own")


def test_deflated_header_reads_back():
    header = dict.fromkeys(codec.TEXTS, "x") | {"bytes": 1, "ids": 2, "first": 1, "threads": 1}
    assert codec.unpack(codec.pack(header, b"1234"), "it") == (header, b"1234")
    body = (3).to_bytes(2, "little") + b"abc"
    noise = codec.MAGIC + bytes([codec.VERSION]) + zlib.crc32(body).to_bytes(4, "little") + body
    with pytest.raises(codec.CodecError, match="header cannot be read"):
        codec.unpack(noise, "it")
