"""CaseOps: the transform, the bytes that its tokens stand for, and shards made with it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from family import load_script
from hypothesis import example, given, settings
from hypothesis import strategies as st

caseops = load_script(ROOT / "data" / "caseops.py")
T, A, N, E = caseops.OPERATORS

# Cases whose lower or upper form is of another length, or is
# several; combining marks; controls; SentencePiece's space.
ODD = (
    "\u00df\u1e9e\u0130\u0131\u0149\u01c5\u01c4\u01c6\u00b5"
    "\u03a3\u03c2\u0345\u0301\ufb01\u2122\uff21\u212a\u2581\0\r\n\t\x1b\u200d\U0001f600\U0010ffff"
)
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
operators = st.text(st.sampled_from([T, A, N, E, E, "a", "B", " "]), max_size=40)
cased = st.lists(
    st.sampled_from(
        [
            "the", "The", "NASA", "iPhone", "OpenAI", "A", "I'm", "eBay", "x", "USAir", "mRNA", " ",
            ". ", "-", "7", "\n\n", *ODD, *caseops.OPERATORS,
        ]
    ),
    max_size=40,
).map("".join)
texts = st.one_of(anything, operators, cased, st.text("aAbB \u00e9\u00c9", max_size=40))

WORDS = [
    "The", "quick", "brown", "FOX", "jumps", "over", "The", "lazy", "Dog", "while", "NASA", "and", "OpenAI",
    "learn", "to", "spell", "every", "iPhone", "word", "of", "It",
]


def text(seed: int, words: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, words)) + f" #{seed}\n"


def by_the_rules(document: str) -> str:
    """The transform as it is described, a character at a time."""
    out, i = [], 0
    while i < len(document):
        stop = i
        while stop < len(document) and document[stop].isascii() and document[stop].isalpha():
            stop += 1
        word = document[i:stop]
        if not word:
            out.append(E + document[i] if document[i] in (T, A, N, E) else document[i])
            i += 1
            continue
        if len(word) >= 2 and all(letter.isupper() for letter in word):
            out.append(A + word.lower())
        else:
            out.append((T if word[0].isupper() else "") + word[0].lower())
            out += [N + letter.lower() if letter.isupper() else letter for letter in word[1:]]
        i = stop
    return "".join(out)


# The transform


def test_published_examples():
    cases = {
        "The NASA Launch": f"{T}the {A}nasa {T}launch", "iPhone": f"i{N}phone",
        "OpenAI": f"{T}open{N}a{N}i", "A": f"{T}a", "AB": f"{A}ab", "aB": f"a{N}b",
        "Ab2C": f"{T}ab2{T}c", "plain": "plain", "\u00c9T\u00c9": f"\u00c9{T}t\u00c9",
        "\u0130I\u0149": f"\u0130{T}i\u0149", "": "", E: E + E, f"a{T}B": f"a{E}{T}{T}b",
        f"{E}{E}A": f"{E}{E}{E}{E}{T}a",
    }
    for document, wanted in cases.items():
        assert caseops.encode(document) == wanted and caseops.decode(wanted) == document


@settings(max_examples=400, deadline=None)
@given(texts)
@example(ODD)
@example("\u01c5ABC\u01c5abC")
@example(f"{E}{T}A{E}")
@example("".join(map(chr, range(0x250))))
def test_any_text_comes_back_and_the_rules_are_the_published_ones(document):
    written = caseops.encode(document)
    assert written == by_the_rules(document) and not re.search("[A-Z]", written)
    assert caseops.decode(written) == caseops.decode(written, strict=False) == document


def test_every_character_comes_back():
    document = "".join(chr(code) for code in range(0x110000))  # lone surrogates too: a str can hold them
    assert caseops.decode(caseops.encode(document)) == document
    assert caseops.decode(caseops.encode(document[::-1])) == document[::-1]
    document = document[:0xD800] + document[0xE000:]
    assert caseops.character_bytes(caseops.encode(document)).sum() == len(document.encode())


@settings(max_examples=300, deadline=None)
@given(st.one_of(texts, st.text(st.sampled_from([T, A, N, E, "a", "b", "C", " "]), max_size=12)))
@example(f"{N}a")  # TITLE is how a first capital is written
@example(f"{T}a{N}b")  # and ALLCAPS a word of capitals
@example(f"{A}a")
@example(f"{T}{T}a")
@example(f"x{T}a")
@example(f"{E}a")
@example(E)
def test_decoding_takes_what_encoding_writes_and_nothing_else(written):
    plain = caseops.decode(written, strict=False)  # reads anything
    if caseops.encode(plain) == written:
        assert caseops.decode(written) == plain
    else:
        with pytest.raises(ValueError, match=r"not a CaseOps text: .* at character \d+"):
            caseops.decode(written)


def test_long_words_take_linear_time():
    """A search that begins again at every letter of a word would take minutes here."""
    for document in ("a" * 2_000_000, "A" * 2_000_000, "aB" * 500_000, "a" * 1_000_000 + "B", E * 500_000):
        assert caseops.decode(caseops.encode(document)) == document


# The sidecar


@settings(max_examples=300, deadline=None)
@given(texts)
def test_characters_stand_for_the_documents_bytes(document):
    written = caseops.encode(document)
    sizes = caseops.character_bytes(written)
    assert sizes.shape == (len(written),) and sizes.sum() == len(document.encode())
    literal = False
    for symbol, size in zip(written, sizes):  # an operator that acts counts nothing
        acts = symbol in caseops.OPERATORS and not literal
        assert size == (0 if acts else len(symbol.encode()))
        literal = acts and symbol == E


@pytest.fixture(scope="module")
def pieces(prepare, tmp_path_factory):
    """A model that data/prepare.py trains: it loses nothing."""
    folder = tmp_path_factory.mktemp("caseops")
    model = prepare.train_pieces(
        iter([text(i, 300).encode() for i in range(9)]), 320, folder, with_caseops=True
    )
    return prepare.CaseOpsTokenizer(model, "sp320-caseops")


def field_model(prepare, folder: Path, **options) -> Path:
    """A model as the field trains its own: it folds Unicode and white space. `options` go to the trainer."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(caseops.encode(text(i, 300)) for i in range(9)),
        model_prefix=str(folder / "field"),
        vocab_size=320,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        **{
            "byte_fallback": True,
            "add_dummy_prefix": False,
            "user_defined_symbols": list(caseops.OPERATORS),
            **options,
        },
    )
    return folder / "field.model"


@pytest.fixture(scope="module", params=["field", "dummy prefix", "no byte fallback"])
def folding(request, prepare, tmp_path_factory):
    options = {
        "field": {},
        "dummy prefix": {"add_dummy_prefix": True},
        "no byte fallback": {"byte_fallback": False},
    }
    model = field_model(prepare, tmp_path_factory.mktemp("field"), **options[request.param])
    return prepare.CaseOpsTokenizer(model, "sp320-caseops")


def check_sidecar(tokenizer, document: str) -> tuple[np.ndarray, np.ndarray]:
    ids, sizes = tokenizer.encode_sized(document.encode())
    assert sizes.shape == (1 + len(ids),) and sizes.dtype == ids.dtype == np.uint16
    assert sizes.sum(dtype=np.int64) == len(document.encode())
    assert np.array_equal(ids, tokenizer.encode(document.encode()))
    assert not sizes[1:][caseops.acting(ids, tokenizer.operators)].any()
    if len(ids):
        assert sizes[0] == 0
    return ids, sizes


@settings(max_examples=200, deadline=None)
@given(texts)
@example("")
@example(ODD)
def test_trained_models_lose_nothing_and_count_every_byte(prepare, pieces, document):
    assert pieces.lossless
    ids, sizes = check_sidecar(pieces, document)
    joined, starts, lengths = prepare.piece_table(pieces.model)
    written = b"".join(joined[starts[i] : starts[i] + lengths[i]].tobytes() for i in ids)
    assert caseops.decode(written.decode()) == document
    assert pieces.model.decode(ids.tolist()) == caseops.encode(document)
    assert pieces.spelled_bytes(ids) == len(document.encode())
    literal = 0  # a piece's own bytes, except where it acts as an operator
    for i, size in zip(ids, sizes[1:]):
        acts = i in pieces.operators and not literal
        assert size == (0 if acts else lengths[i])
        literal = acts and i == pieces.operators[3]


@settings(max_examples=200, deadline=None)
@given(texts)
@example("")
@example(ODD)
@example(" \n ")  # normalises to nothing
@example("  The  end \n\n ")
@example("\u200b\u00ad A\u2122")
def test_folding_models_count_every_byte(folding, document):
    assert not folding.lossless
    ids, _ = check_sidecar(folding, document)
    folding.spelled_bytes(ids)  # whatever the ids decode to has a length


def test_bytes_go_where_the_text_was(prepare, tmp_path):
    tokenizer = prepare.CaseOpsTokenizer(field_model(prepare, tmp_path), "sp320-caseops")
    ids, sizes = check_sidecar(tokenizer, f"  The end{E} \u00e9  \n")
    pieces = [tokenizer.model.id_to_piece(int(i)) for i in ids]
    assert pieces[0] == T and list(sizes[:2]) == [0, 0]
    assert sizes[2] == 2 + len(pieces[1])  # the white space before the operator, which no operator may have
    at = pieces.index(E)
    # ESCAPE, and what it escapes
    assert pieces[at : at + 2] == [E, E] and list(sizes[1:][at : at + 2]) == [0, 3]
    assert list(sizes[-2:]) == [0, 2 + 3]  # the letter's last byte piece, and the white space at the end
    assert list(check_sidecar(tokenizer, " \n")[1]) == [2]  # nothing but BOS is left to hold them


def test_a_token_hands_on_what_sixteen_bits_cannot_hold(prepare, tmp_path):
    tokenizer = prepare.CaseOpsTokenizer(field_model(prepare, tmp_path), "sp320-caseops")
    for document in (
        "The" + " " * 100_000 + "quick brown fox",
        "The quick" + " " * 200_000,
        " " * 200_000 + "The quick x",
    ):
        _, sizes = check_sidecar(tokenizer, document)
        assert sizes.max() == 65535
    with pytest.raises(
        prepare.UserError, match="70000 bytes in 1 tokens: a sidecar holds 65535 a token"
    ) as caught:
        tokenizer.encode_sized(b" " * 70_000)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_sidecar_of_any_cut(data):
    """Whatever the tokens are: ends in their order, of which operators
    have their own, give a sum that is the document's length."""
    written = caseops.encode(data.draw(texts))
    ends, ids = [], []
    at = 0
    while at < len(written):
        room = (
            next(
                (i for i in range(at, len(written)) if written[i] in caseops.OPERATORS),
                len(written),
            )
            - at
        )
        step = data.draw(st.integers(1, room)) if room else 1
        ids.append(9 if room else 4 + caseops.OPERATORS.index(written[at]))
        at += step
        ends.append(at)
    sizes = caseops.sidecar(written, np.array(ids, np.int64), np.array(ends, np.int64), np.arange(4, 8))
    assert sizes.sum() == len(caseops.decode(written).encode()) and len(sizes) == 1 + len(ids)
    steps = np.diff(np.concatenate(([0], np.cumsum(caseops.character_bytes(written))))[[0, *ends]])
    assert np.array_equal(sizes[1:], steps)
    if len(ids) > 1:
        for wrong in (ends[::-1], ends[1:], [*ends[:-1], len(written) + 1]):
            with pytest.raises(ValueError, match="not the surfaces"):
                caseops.sidecar(written, np.array(ids), np.array(wrong), np.arange(4, 8))


# Shards


def read(path: Path) -> np.ndarray:
    header = np.fromfile(path, "<i4", 256)
    values = np.fromfile(path, "<u2", offset=1024)
    assert list(header[:3]) == [20240520, 1, len(values)] and not header[3:].any()
    return values


def parts_of(folder: Path, manifest: dict, split: str, prepare) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, sidecar) of every document, BOS first, by what the manifest names; sums and sizes are checked."""
    entries = [entry for entry in manifest["shards"] if entry["split"] == split]
    pairs = []
    for entry in entries:
        assert entry["sidecar"] == entry["file"].removesuffix(".bin") + ".bytes"
        assert prepare.sha256_file(folder / entry["file"]) == entry["sha256"]
        assert prepare.sha256_file(folder / entry["sidecar"]) == entry["sidecar_sha256"]
        pairs.append((read(folder / entry["file"]), read(folder / entry["sidecar"])))
        assert len(pairs[-1][0]) == len(pairs[-1][1]) == entry["tokens"]
    ids, sizes = (np.concatenate(part) for part in zip(*pairs))
    starts = np.flatnonzero(ids == 1)
    assert starts[0] == 0 and len(ids) == manifest["tokens"][split]
    return list(zip(np.split(ids, starts[1:]), np.split(sizes, starts[1:])))


@pytest.fixture
def jsonl(tmp_path):
    def write(name: str, documents: list[str]) -> str:
        (tmp_path / name).write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        return str(tmp_path / name)

    return write


def test_shards_and_sidecars_hold_the_documents(prepare, prepare_files, jsonl):
    train, val = [text(i, 200) for i in range(9)], [text(100 + i, 150) for i in range(3)]
    train[3] += ODD + "".join(caseops.OPERATORS) * 5
    val[1] = f"{E}{T} \u2581 " + val[1] + " \u00c9COLE \u0130stanbul  \n\n"
    options = ["--variant", "sp340-caseops", "--no-shuffle", "--overlap", "report", "--shard-tokens", 701]
    out = prepare_files(jsonl("a.jsonl", train), jsonl("v.jsonl", val), *options)
    manifest = json.loads((out / "manifest.json").read_text())
    model = prepare.CaseOpsTokenizer(out / "sp340-caseops.model", "sp340-caseops").model
    assert manifest["variant"] == "sp340-caseops" and manifest["tokenizer"] == "sp340-caseops.model"
    assert manifest["vocab_size"] == 340 == model.vocab_size()
    learned = [model.id_to_piece(i) for i in range(340) if not model.is_byte(i)]
    assert "the" in learned and not re.search("[A-Z]", "".join(learned))  # trained on text in CaseOps form
    assert manifest["caseops"] == {
        "transform": "lossless_caps_caseops_v1", "sidecar": ".bytes",
        "operators": {"title": 4, "allcaps": 5, "capnext": 6, "escape": 7},
    }
    for split, documents in (("train", train), ("val", val)):
        found = parts_of(out, manifest, split, prepare)
        assert [caseops.decode(model.decode(ids[1:].tolist())) for ids, _ in found] == documents
        assert [int(sizes.sum()) for _, sizes in found] == [len(document.encode()) for document in documents]
        assert all(sizes[0] == 0 for _, sizes in found)
        assert manifest["bytes"][split] == sum(len(document.encode()) for document in documents)
    assert manifest["val_bytes"] == manifest["val_normalised_bytes"] == manifest["bytes"]["val"]
    assert len(list(out.glob("*_train_*.bin"))) > 2  # ids and sidecars are cut at the same places
    names = {entry[key] for entry in manifest["shards"] for key in ("file", "sidecar")}
    assert names | {"manifest.json", "sp340-caseops.model"} == {path.name for path in out.iterdir()}


def test_a_script_that_reads_no_sidecars_refuses_the_folder(trunk, tiny, prepare, prepare_files, jsonl):
    train, val = [text(i, 400) for i in range(9)], [text(100, 300)]
    out = prepare_files(
        jsonl("a.jsonl", train), jsonl("v.jsonl", val), "--variant", "sp320-caseops", "--overlap",
        "off",
    )
    manifest = json.loads((out / "manifest.json").read_text())
    with pytest.raises(trunk.UserError, match=f"DATA_PATH={out}: CaseOps ids"):
        trunk.Dataset(tiny(DATA_PATH=out, VOCAB_SIZE=320), True)
    # Without it nobody can know, but ids are not mixed up with their sidecars
    (out / "manifest.json").unlink()
    data = trunk.Dataset(tiny(DATA_PATH=out, VOCAB_SIZE=320), True)
    ((ids, _),) = parts_of(out, manifest, "val", prepare)
    assert np.array_equal(data.val, ids) and len(data.train_files) == 1


def test_a_folding_model_that_was_made_elsewhere(prepare, prepare_files, jsonl, tmp_path):
    train = [text(i, 200) for i in range(5)]
    val = ["  The  NASA \ufb01\u2122 \u00c9 \n\n x ", " \n", text(77, 90)]
    model = field_model(prepare, tmp_path)
    options = ["--variant", "sp320-caseops", "--tokenizer", model, "--overlap", "off", "--no-shuffle"]
    out = prepare_files(jsonl("a.jsonl", train), jsonl("v.jsonl", val), *options)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tokenizer_sha256"] == prepare.sha256_file(model) and (out / "field.model").exists()
    for split, documents in (("train", train), ("val", val)):
        found = parts_of(out, manifest, split, prepare)
        assert [int(sizes.sum()) for _, sizes in found] == [len(document.encode()) for document in documents]
    assert manifest["val_bytes"] == sum(len(document.encode()) for document in val)
    folded = ["The NASA fiTM \u00c9 x", "", text(77, 90).strip()]
    assert manifest["val_normalised_bytes"] == sum(len(document.encode()) for document in folded)


def test_no_validation_document_is_in_training(prepare, prepare_files, jsonl, tmp_path, capsys):
    """Split by hash, named files, and a fixed split: what
    is compared are documents, before their case is moved."""
    documents = [text(i, 60) for i in range(40)]
    options = ["--variant", "sp320-caseops", "--overlap", "off", "--no-shuffle"]

    def sides(out: Path) -> list[list[str]]:
        manifest = json.loads((out / "manifest.json").read_text())
        model = prepare.CaseOpsTokenizer(out / manifest["tokenizer"], manifest["variant"]).model
        parts = [parts_of(out, manifest, split, prepare) for split in ("train", "val")]
        return [[caseops.decode(model.decode(ids[1:].tolist())) for ids, _ in part] for part in parts]

    call = ["files", jsonl("a.jsonl", documents + documents[:9]), "--val-share", "0.2", *options]
    assert prepare.main([*call, "--out", str(tmp_path / "hash")]) == 0
    train, val = sides(tmp_path / "hash")
    assert not set(train) & set(val) and sorted(train + val) == sorted(documents) and len(val) > 2

    out = prepare_files(
        jsonl("b.jsonl", documents), jsonl("v.jsonl", documents[7:8]), *options, out="named", code=2
    )
    assert "validation document 0 equals training document 7" in capsys.readouterr().err and not out.exists()

    hub = tmp_path / "hub"
    hub.mkdir()
    jsonl("hub/docs_selected.jsonl", documents[:30] + documents[2:4])
    call = [
        "fineweb", "--hub-folder", str(hub), "--val-documents", "5", "--variant", "sp320-caseops",
        "--overlap", "off",
    ]
    assert prepare.main([*call, "--out", str(tmp_path / "fixed")]) == 0
    train, val = sides(tmp_path / "fixed")
    assert val == documents[:5] and train == documents[5:30]


def test_other_variants_have_no_sidecar(prepare_files, jsonl):
    train, val = jsonl("a.jsonl", [text(i, 90) for i in range(5)]), jsonl("v.jsonl", [text(99, 90)])
    for variant in ("byte260", "sp320"):
        out = prepare_files(train, val, "--variant", variant, "--overlap", "off", out=variant)
        manifest = json.loads((out / "manifest.json").read_text())
        assert not list(out.glob("*.bytes")) and "caseops" not in manifest
        assert all(set(entry) == {"file", "split", "tokens", "sha256"} for entry in manifest["shards"])


def test_wrong_tokenizers_are_refused_in_one_line(prepare, prepare_files, jsonl, tmp_path, capsys):
    train, val = jsonl("a.jsonl", [text(i, 90) for i in range(5)]), jsonl("v.jsonl", [text(99, 90)])

    def refused(model: Path, variant: str = "sp320-caseops") -> str:
        options = ["--variant", variant, "--tokenizer", model, "--overlap", "off"]
        assert not prepare_files(train, val, *options, code=2).exists()
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    plain = prepare.train_pieces(iter([text(i, 300).encode() for i in range(9)]), 320, tmp_path)
    missing = refused(plain)
    assert "sp320.model" in missing and "CaseOps needs U+E001 to U+E004" in missing
    some = field_model(prepare, tmp_path, user_defined_symbols=[T, A, N])
    assert "CaseOps needs" in refused(some)
    joined = field_model(prepare, tmp_path, user_defined_symbols=[*caseops.OPERATORS, f"{T}the"])
    assert "CaseOps needs" in refused(joined)  # an operator inside another piece
    good = field_model(prepare, tmp_path)
    assert "the model has 320 ids" in refused(good, "sp400-caseops")
    assert "sp<N>-caseops" in refused(good, "sp320-capsops")
    (tmp_path / "x_val_000000.bin").write_bytes(b"")
    assert (
        prepare.main(
            [
                "convert", "--from", str(tmp_path), "--tokenizer", str(good), "--out",
                str(tmp_path / "c"),
            ]
        )
        == 2
    )
    assert "a CaseOps model" in capsys.readouterr().err and not list(tmp_path.glob(".*partial"))
