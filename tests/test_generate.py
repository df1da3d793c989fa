"""scripts/generate.py: what it writes, when it ends, and that drafts change nothing but the passes."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys

import codec
import generate
import numpy as np
import pytest
from conftest import ROOT, TINY, enlivened, environment, same_text
from family import Misuse, find_script, load_script
from scipy.stats import chisquare

TOOL = ROOT / "scripts" / "generate.py"
# What the small model of the tests is in a record, beside the settings that it shares with the trunk.
RECORDS = {
    "ByteJEPA": {"DRAFT": 2, "BIGRAM_VOCAB_SIZE": 512},
    "BytePPM": {"MIX_ROWS": 10},
    "ByteBest": {"MIX_ROWS": 10},
    "BytePatchJEPA": {"DRAFT": 2},
    "LLMJEPA": {"DRAFT": 2, "VOCAB_SIZE": 260},
    "SGJM": {},
    "BiJEPAX": {"VOCAB_SIZE": 260, "NUM_LAYERS": 4, "LOOP_FIRST": 1, "LOOP_LAST": 1, "PARALLEL_START": 2,
                "XSA_LAST_N": 4, "GATE_WINDOW": 6, "PPM_WEIGHT": 0},
    "TokenBest": {"VOCAB_SIZE": 260, "NUM_LAYERS": 4, "PARALLEL_START": 2, "XSA_LAST_N": 4, "GATE_WINDOW": 6,
                  "PPM_WEIGHT": 0},
}
# Spells a text of its own, whatever it is asked, and needs no torch.
SPELLER = '''
import types
import numpy as np
IDS = {ids}
def load(path, device="cpu"):
    return types.SimpleNamespace(args=types.SimpleNamespace(vocab_size=260, ttt="0"))
class stream:
    def __init__(self, model):
        self.ids = []
    def push(self, token):
        self.ids.append(token)
    def logprobs(self):
        made = len(self.ids) - 1 - len("abc")
        return np.where(np.arange(260) == IDS[made % len(IDS)], 0.0, -99.0)
'''


def process(*arguments, **more) -> subprocess.Popen:
    """The tool in a process of its own, which Ctrl-C reaches even where the tests run in the background."""
    line = [sys.executable, str(TOOL), *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(line, env=environment(), **{**pipes, **more},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@pytest.fixture
def call(capfdbinary):
    """call(argument, ...) -> (exit code, stdout, last line of stderr), in this process."""

    def call(*arguments):
        code = generate.main([str(argument) for argument in arguments])
        out, err = capfdbinary.readouterr()
        return code, out, err.decode().rstrip("\n").rpartition("\n")[2]

    return call


@pytest.fixture
def told(call):
    """told(argument, ...) -> the lines that --json prints."""

    def told(*arguments) -> list[dict]:
        code, out, _ = call(*arguments, "--json")
        assert code == 0
        return [json.loads(line) for line in out.splitlines()]

    return told


@pytest.fixture
def refused(call):
    """refused(argument, ...) -> the reason."""

    def refused(*arguments) -> str:
        with pytest.raises(Misuse) as caught:
            call(*arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused


def pack(script, model, path):
    tensors = {name: p.detach().numpy() for name, p in model.exported().items()}
    path.write_bytes(script.pack(tensors, model.args))
    return path


@pytest.fixture
def artifact(trunk, tiny, alive, tmp_path):
    """artifact(VAR=value, ...) -> the file of an untrained model."""
    return lambda **overrides: pack(trunk, alive(tiny(**overrides)), tmp_path / "artifact.bin")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """An artifact that has learned something, and heads whose drafts come true."""
    folder = tmp_path_factory.mktemp("trained")
    env = environment(DRAFT=2, DATA_PATH=corpus, RUNS_PATH=folder, RUN_ID="a", ITERATIONS=100, EVAL_STRIDE=32,
                      WARMDOWN_ITERS=50, JEPA_CHUNK_SIZE=0, VAL_BYTES=300, QUANT_ROUND="nearest")
    subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=env, check=True, capture_output=True)
    return folder / "a" / "artifact.bin"


@pytest.fixture
def speller(tmp_path):
    """speller(ids) -> arguments for a script that spells these ids in turn after `abc`."""

    def speller(ids) -> list:
        script = tmp_path / f"speller{len(list(tmp_path.iterdir()))}.py"
        script.write_text(SPELLER.format(ids=list(ids)))
        return [script, "abc", "--script", script]

    return speller


def of_bytes(text: bytes) -> list[int]:
    return [byte + 4 for byte in text]


# What is picked


def test_a_draw_has_the_law_of_the_likeliest_ids():
    shares = np.array([0.05, 0.4, 0.02, 0.3, 0.03, 0.2])
    logits, p = np.log(shares) + 3, shares**2 / (shares**2).sum()  # at a temperature of 1/2
    for top_p, kept in ((0.5, [1]), (0.84, [1, 3]), (0.86, [1, 3, 5]), (1.0, range(6))):
        assert {*np.flatnonzero(generate.nucleus(2 * logits, top_p))} == {*kept}
        law = generate.Law(seed=1, temperature=0.5, top_p=top_p)
        found = np.bincount([law.pick(logits, place) for place in range(3000)], minlength=6)
        expected = 3000 * p * np.isin(np.arange(6), kept) / p[[*kept]].sum()
        assert not found[expected == 0].any()
        assert len(kept) == 1 or chisquare(found[expected > 0], expected[expected > 0]).pvalue > 1e-3
    assert generate.Law(top_p=0.1).pick(logits, 0) == 1


@pytest.mark.parametrize("more", [[], ["--temperature", "0.8"], ["--temperature", "1.2", "--top-p", "0.8"]],
                         ids=str)
def test_drafts_save_passes_and_change_no_text(trunk, trained, told, more):
    law = generate.Law(5, *map(float, more[1::2]))
    saved, script = 0, ["--script", ROOT / "train_gpt.py", "--max-new-tokens", 40, "--seed", 5]
    for prompt in ("def get_payload(self", "import re\n", "", "    if not "):
        (plain,), (fast,) = (told(trained, prompt, *script, *more, *option) for option in
                             (["--no-speculate"], []))
        ids = [1, *of_bytes(prompt.encode())]
        assert same_text(trunk, trunk.load(trained), ids, plain["made"], fast["made"], law)
        saved += plain["passes"] - fast["passes"]
        assert plain["passes"] == plain["ids"] or plain["ended"] == "document"
    assert saved > (20 if more else 40)


def test_stop_texts_and_samples_are_the_same_with_and_without_drafts(trained, told):
    common = [trained, "def ", "--temperature", 0.9, "--top-p", 0.95, "--max-new-tokens", 40, "--seed", 3]
    texts = [line["text"] for line in told(*common, "--samples", 3)]
    assert len({*texts}) == 3
    singles = [told(*common, "--seed", seed)[0]["text"] for seed in (3, 4, 5)]
    assert texts == singles
    stops = ["--stop", texts[0][11:14], "--stop", texts[1][20:22]]
    for drafts in ([], ["--no-speculate"]):
        for text, line in zip(texts, told(*common, "--samples", 3, *stops, *drafts)):
            ends = [at for at in (text.find(stop) for stop in stops[1::2]) if at >= 0]
            assert line["text"] == text[: min(ends, default=len(text))]
            assert line["ended"] == ("stop" if ends else "length")


def test_greedy_text_is_what_the_scorer_thinks_likeliest(trunk, trained, told):
    line, = told(trained, "class Message:", "--max-new-tokens", 30)
    ids = [1, *of_bytes(b"class Message:")]
    rows = trunk.score(trunk.load(trained), [*ids, *line["made"]], range(len(ids) - 1, len(ids) + 29))[1]
    assert [int(row.argmax()) for row in rows.values()] == line["made"]
    assert bytes(i - 4 for i in line["made"] if i >= 4).decode(errors="replace") == line["text"]


def test_a_model_that_learns_begins_every_text_anew(artifact, told):
    path = artifact(TTT="sgd", TTT_CHUNK_TOKENS=32, TTT_LR=0.5, TTT_BATCH_ROWS=2, DRAFT=2)
    common = [path, "some text that is longer than one chunk", "--max-new-tokens", 60, "--temperature", 1]
    first, second = told(*common, "--samples", 2, "--seed", 8)
    again, = told(*common, "--seed", 9, "--no-speculate")
    assert first["made"] != second["made"] == again["made"]


# Every script of the family


@pytest.mark.parametrize("name", RECORDS)
def test_an_artifact_of_every_record_writes(name, tmp_path, told):
    script = load_script(name)
    known = {var.name for var in script.Hyperparameters.vars().values()}
    settings = {key: value for key, value in TINY.items() if key in known} | RECORDS[name]
    args = script.Hyperparameters({key: str(value) for key, value in settings.items()})
    path = pack(script, enlivened(script, args), tmp_path / "artifact.bin")
    prompt = "The cat sat on the mat, the cat "
    heat = 0.0 if hasattr(script, "Generator") else 0.7
    common = [path, prompt, "--script", name, "--max-new-tokens", 16, "--temperature", heat]
    (fast,), (plain,) = told(*common), told(*common, "--no-speculate")
    assert fast["made"] == plain["made"] and 0 < fast["passes"] <= plain["passes"]

    # the law is that of the scorer, which SGJM's own decoder draws from with other noise
    ids = [1, *of_bytes(prompt.encode())]
    places = range(len(ids) - 1, len(ids) - 1 + len(plain["made"]))
    rows = script.score(script.load(path), [*ids, *plain["made"], 0], places)[1]
    law = generate.Law(0, heat)
    assert [law.pick(row, place + 1) for place, row in rows.items()] == plain["made"]


def test_the_twin_writes_what_the_trunk_writes(artifact, told):
    pytest.importorskip("mlx.core")
    path = artifact(DRAFT=2)
    for more in (["--temperature", 0], ["--temperature", 0.7, "--top-p", 0.9]):
        common = [path, "def ", "--max-new-tokens", 24, "--device", "cpu", *more]
        twin = [*common, "--script", ROOT / "train_gpt_mlx.py"]
        (mine,), (its,), (plain,) = told(*common), told(*twin), told(*twin, "--no-speculate")
        assert mine["made"] == its["made"] == plain["made"] and mine["passes"] == its["passes"]


@pytest.mark.parametrize("maker, found", [
    ("BytePPM, script 0123abcd", "BytePPM"), ("LLM-JEPA, script 0123abcd", "LLMJEPA"),
    ("2026-11-21_ByteJEPA, script 0123abcd", "ByteJEPA"), ("SGJM in MLX, script 0123abcd", "SGJM"),
    ("The trunk, script 0123abcd", None), ("main, script 0123abcd", None), ("/tmp/evil.py", None), ("", None),
])
def test_an_artifact_names_its_script(maker, found):
    assert generate.named_script({"script": maker}) == (found and find_script(found))
    assert generate.named_script({}) is None


# A script that drafts by itself


@pytest.fixture
def sgjm(tmp_path):
    """sgjm(VAR=value, ...) -> an artifact of SGJM with its heads."""
    script = load_script("SGJM")

    def sgjm(**overrides):
        settings = {"SIZE": "smoke", "BLOCK_SIZE": 4, "MODEL_DIM": 32, "EXPORT_HEADS": 1, "INIT_STD": 0.15}
        settings |= {"TRAIN_SEQ_LEN": 64, "MAX_SEQ_LEN": 64} | overrides
        args = script.Hyperparameters({key: str(value) for key, value in settings.items()})
        return pack(script, enlivened(script, args), tmp_path / "artifact.bin")

    return sgjm


@pytest.mark.parametrize("vocab", [256, 260])
def test_sgjms_drafts_save_passes_and_change_no_greedy_text(sgjm, told, call, vocab):
    """Through windows that are read again; every end falls where it falls without drafts."""
    path, saved = sgjm(VOCAB_SIZE=vocab), 0
    for prompt in ("abcabcabcabcabc", "so it goes, and so it goes", "x" * 70):
        common = [path, prompt, "--max-new-tokens", 90]
        (fast,), (plain,) = told(*common), told(*common, "--no-speculate")
        assert fast["made"] == plain["made"] and fast["text"] == plain["text"]
        assert plain["passes"] == len(plain["made"]) + (plain["ended"] == "document")
        saved += plain["passes"] - fast["passes"]
        if vocab == 256:
            stop = ["--stop", os.fsdecode(bytes(plain["made"][20:22]))]
            (fast,), (plain,) = told(*common, *stop), told(*common, *stop, "--no-speculate")
            assert fast["made"] == plain["made"] and fast["ended"] == plain["ended"] == "stop"
    assert saved > 0
    whole, = told(*common)
    code, out, line = call(*common)
    assert code == 0 and len(out) == whole["bytes"]
    assert f" bytes_per_pass:{whole['bytes_per_pass']} " in line


@pytest.mark.parametrize("more", [[], ["--top-p", 0.8], ["--no-speculate"]], ids=str)
def test_sgjms_texts_at_a_temperature_are_those_of_their_seeds(sgjm, told, more):
    """Other ids with drafts than without, of one law (tests/test_sgjm_generation.py), the same every time."""
    common = [sgjm(VOCAB_SIZE=256), "so it goes, and so", "--temperature", 0.6, "--max-new-tokens", 40, *more]
    lines = told(*common, "--samples", 3, "--seed", 5)
    assert len({line["text"] for line in lines}) == 3
    for line in lines:
        again, = told(*common, "--seed", line["seed"])
        assert (again["made"], again["passes"]) == (line["made"], line["passes"])
        stop = bytes(line["made"][10:12])
        cut, = told(*common, "--seed", line["seed"], "--stop", os.fsdecode(stop))
        assert cut["bytes"] == bytes(line["made"]).index(stop) and cut["ended"] == "stop"
        assert cut["made"] == line["made"][: len(cut["made"])]


def test_sgjms_texts_are_those_of_its_decoder(sgjm, told):
    script, path = load_script("SGJM"), sgjm(VOCAB_SIZE=256)
    for temperature, top_p in ((0, 1), (1, 1), (0.7, 0.9)):
        writer = script.Generator(script.load(path), [*b"so it goes"], 3, True, temperature, top_p)
        wanted = writer.write(40).encode("latin-1")
        law = ["--temperature", temperature, "--top-p", top_p] if temperature else []
        line, = told(path, "so it goes", "--seed", 3, "--max-new-tokens", 40, *law)
        assert line["text"] == wanted.decode(errors="replace") and bytes(line["made"]) == wanted
        assert line["passes"] == writer.read[0]


def test_bytes_without_special_ids_need_a_prompt(sgjm, refused):
    assert "no id that begins a document: a prompt is needed" in refused(sgjm(VOCAB_SIZE=256))


@pytest.mark.parametrize("ends", [[1], [2], []])
def test_a_document_ends_inside_a_pass(speller, call, ends):
    """Of ten ids that a pass settles, the model's end is one: none after it is written."""
    ids = [*of_bytes(b"so it goes"), *ends]
    script, *more = speller(ids)
    script.write_text(script.read_text() + """
class Generator:
    def __init__(self, model, ids, seed, speculate, temperature, top_p):
        self.ids, self.read = IDS, [0]
    def grow(self, count):
        text = "".join(map(chr, IDS)) * count
        for start in range(0, count, 10):
            self.read[0] += 1
            yield text[start : min(start + 10, count)]
""")
    code, out, line = call(script, *more, "--max-new-tokens", 25)
    assert code == 0 and out == (b"so it goes" if ends else b"so it goesso it goesso it")
    assert line.startswith(f"ids:{len(out)} bytes:{len(out)} passes:{2 if ends else 3} ")
    assert line.endswith(" ended:document" if ends else " ended:length")


def test_sgjm_goes_on_from_a_checkpoint_and_others_say_what_to_take(told, refused, tmp_path):
    """Of other scripts artifact.bin is needed, and which script a checkpoint is of has to be said."""
    script, small = load_script("SGJM"), {"SIZE": "smoke", "RUNS_PATH": str(tmp_path), "RUN_ID": "a"}
    args = script.Hyperparameters(small | {"DEVICE": "cpu"})
    script.Trainer(args, None, script.Runtime(args), script.Log(None)).save("final")
    path = tmp_path / "a" / "final.safetensors"
    common = [path, "so it goes", "--script", "SGJM", "--max-new-tokens", 12]
    (fast,), (plain,) = told(*common), told(*common, "--no-speculate")
    assert fast["made"] == plain["made"] and len(fast["made"]) == 12
    assert "not an artifact of this family" in refused(path, "--script", ROOT / "train_gpt.py")
    assert "a checkpoint: SGJM's are read with --script SGJM, of other scripts artifact.bin" in refused(path)


# Pieces


def test_pieces_spell_what_sentencepiece_decodes(artifact, field_tokenizer, told, refused, tmp_path):
    words = ["code", "coder", "decode", "range", "na\u00efve", "\u6771\u4eac"]
    lines = "\n".join(" ".join(random.Random(i).choices(words, k=9)) for i in range(200))
    tokenizer, path = field_tokenizer(lines, 300, hard_vocab_limit=True)
    alphabet = generate.Alphabet.of_pieces(codec.Pieces(tokenizer))
    assert alphabet.prefixed and alphabet.ends == {1, 2}
    for text in ("the coder decodes \u6771\u4eac", "\u5317", "\u2581code"):
        ids = tokenizer.encode(text)
        assert alphabet.text(alphabet.joined(ids)).decode() == tokenizer.decode(ids)

    model = artifact(VOCAB_SIZE=300, DRAFT=2)
    common = [model, "the coder", "--max-new-tokens", 30, "--temperature", 1]
    (fast,), (plain,) = (told(*common, "--tokenizer", path, *option) for option in ([], ["--no-speculate"]))
    assert fast["made"] == plain["made"] and fast["text"] == plain["text"]
    prompt = tokenizer.encode("the coder")
    whole = tokenizer.decode([*prompt, *plain["made"]])
    # of bytes that are no UTF-8, Python and SentencePiece write another number of U+FFFD
    ours, wanted = (re.sub("\ufffd+", "\ufffd", each) for each in ("the coder" + plain["text"], whole))
    assert ours == wanted
    assert "300 ids: --tokenizer or TOKENIZER_PATH" in refused(*common)
    (tmp_path / "latin").write_bytes(b"na\xefve")
    assert "not UTF-8 at byte 2" in refused(model, "--file", tmp_path / "latin", "--tokenizer", path)


def test_caseops_pieces_spell_capitals(field_tokenizer):
    words = ["The", "quick", "brown", "FOX", "jumps", "NASA", "OpenAI", "iPhone"]
    lines = "\n".join(" ".join(random.Random(i).choices(words, k=9)) for i in range(200))
    operators = list(codec.caseops.OPERATORS)
    tokenizer, _ = field_tokenizer(codec.caseops.encode(lines), 320, user_defined_symbols=operators)
    alphabet = generate.Alphabet.of_pieces(codec.Pieces(tokenizer))
    text = "The NASA iPhone \u00c9t\u00e9"
    ids = alphabet.ids(text.encode())
    assert ids[0] == 1 and alphabet.text(alphabet.joined(ids)).decode() == text
    # what was shown stays as it was while more follows
    shown = b""
    for n in range(len(ids) + 1):
        longer = alphabet.text(alphabet.joined(ids[:n]))
        assert longer.startswith(shown)
        shown = longer


# Where a text ends, and how it is shown


@pytest.mark.parametrize("end", [1, 2])
def test_a_text_ends_with_the_models_document(speller, call, end):
    code, out, line = call(*speller([*of_bytes(b"so it goes"), end]), "--max-new-tokens", 40)
    assert code == 0 and out == b"so it goes"
    assert line.startswith("ids:10 bytes:10 passes:11 ") and line.endswith(" ended:document")


def test_a_text_that_never_ends_is_cut(speller, call):
    code, out, line = call(*speller(of_bytes(b"ab\xff") + [0, 3]), "--max-new-tokens", 11)
    assert (code, out) == (0, b"ab\xffab\xffa")  # ids 0 and 3 spell nothing
    assert line.startswith("ids:11 bytes:7 passes:11 ids_per_pass:1.0 ") and line.endswith(" ended:length")


def test_several_texts_have_a_line_each_before_them(speller, call):
    code, out, _ = call(*speller(of_bytes(b"ab")), "--max-new-tokens", 2, "--temperature", 1, "--samples", 2)
    assert out == b"=== seed 0 ===\nab\n=== seed 1 ===\nab\n" and code == 0


def test_a_page_holds_back_what_may_be_a_stop_text():
    rng = random.Random(0)
    for _ in range(500):
        text = bytes(rng.choices(b"ab", k=12))
        stops = [bytes(rng.choices(b"ab", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 2))]
        shown, ended = [], False
        page, at = generate.Page(stops, shown.append), 0
        while at < len(text) and not ended:
            at += rng.randint(0, 3)  # an id may stand for several bytes, or for none
            ended = page.grow(text[:at])
            assert page.text.startswith(b"".join(shown))
        page.show()
        places = [place for place in map(text[:at].find, stops) if place >= 0]
        assert ended == bool(places) and page.text == b"".join(shown) == text[: min(places, default=at)]
    # and shows everything else at once
    page = generate.Page([b"\n\n"], shown.clear() or shown.append)
    for text in (b"a", b"ab\n", b"ab\nc", b"ab\nc\n"):
        page.grow(text)
    assert shown == [b"a", b"b", b"\nc"]


def test_a_terminal_gets_whole_characters_and_no_control_codes():
    for terminal in (False, True):
        file, seen = io.BytesIO(), []
        screen = generate.Screen(file, terminal)
        for data in (b"n", b"\xc3", b"\xa9e\t\n", b"\x1b[2J\x80", b"\xe6\x9d"):
            screen.put(data)
            seen.append(file.getvalue())
        screen.end(line=False)
        if terminal:
            assert seen[:3] == [b"n", b"n", "n\u00e9e\t\n".encode()]
            assert file.getvalue().decode() == "n\u00e9e\t\n\ufffd[2J\ufffd\ufffd\n"
        else:
            assert file.getvalue() == b"n\xc3\xa9e\t\n\x1b[2J\x80\xe6\x9d"


@pytest.mark.parametrize("of", ["artifact", "sgjm"])
def test_ctrl_c_keeps_what_is_there(of, request):
    path = request.getfixturevalue(of)()
    with process(path, "text", "--max-new-tokens", 10**6, "--temperature", 1.5) as tool:
        # streamed, long before the end; of the pipe itself: `communicate` misses what a buffered read took
        begun = os.read(tool.stdout.fileno(), 5)
        tool.send_signal(signal.SIGINT)
        out, err = tool.communicate(timeout=60)
    assert tool.returncode == 130 and begun, err
    numbers = dict(part.split(":") for part in err.decode().split())
    assert numbers["ended"] == "interrupt" and int(numbers["bytes"]) == len(begun + out)


def test_a_closed_pipe_is_no_error(speller):
    with process(*speller(of_bytes(b"on and on ")), "--max-new-tokens", 10**6) as tool:
        assert tool.stdout.read(10) == b"on and on "
        tool.stdout.close()
        tool.stdout = None
        _, err = tool.communicate(timeout=60)
    assert tool.returncode == 0 and err == b""


# The prompt and mistakes


def test_the_prompt_is_a_text_a_file_or_standard_input(artifact, told, tmp_path, monkeypatch):
    path, prompt = artifact(), tmp_path / "prompt"
    prompt.write_bytes(b"caf\xc3\xa9 \xff")
    monkeypatch.chdir(tmp_path)
    common = [path, "--max-new-tokens", 8]
    wanted, = told(*common, "--file", prompt)
    assert wanted["made"] == told(*common, os.fsdecode(b"caf\xc3\xa9 \xff"))[0]["made"]
    assert wanted["made"] != told(*common, "prompt")[0]["made"]  # a text, though a file has this name
    for form in (["-"], ["--file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.read_bytes())))
        assert wanted["made"] == told(*common, *form)[0]["made"]
    assert told(*common)[0]["made"] == told(*common, "")[0]["made"]  # a document of its own


def test_mistakes_are_one_line(artifact, refused, tmp_path):
    path = artifact()
    damaged, other = tmp_path / "damaged.bin", tmp_path / "other.py"
    damaged.write_bytes(path.read_bytes()[:-1])
    other.write_text("load = print\n")
    drawn = "nothing is drawn"
    for arguments, words in (
        ([path, "--file", tmp_path / "gone"], f"--file {tmp_path / 'gone'}: No such file or directory"),
        ([path, "text", "--file", damaged], f"TEXT and --file {damaged}: one of them"),
        ([path, "--max-new-tokens", 0], "--max-new-tokens 0: at least 1"),
        ([path, "--samples", 0], "--samples 0: at least 1"),
        ([path, "--samples", 2], drawn), ([path, "--top-p", 0.5], drawn),
        ([path, "--temperature", -1], "--temperature -1.0: a number from 0"),
        ([path, "--temperature", "nan"], "--temperature nan: a number from 0"),
        ([path, "--temperature", 1, "--top-p", 0], "--top-p 0.0: more than 0, at most 1"),
        ([path, "--seed", -1], "--seed -1: at least 0"), ([path, "--stop", ""], "--stop: an empty text"),
        ([tmp_path / "gone.bin"], f"ARTIFACT={tmp_path / 'gone.bin'}: No such file or directory"),
        ([damaged], "its sha256 does not match: truncated or altered"),
        ([other], "not an artifact of this family"),
        ([path, "--script", "BytePPM"], "its config lacks MIX (read by --script BytePPM; without it, by "),
        ([path, "--script", "none"], "none: no script, no folder with a train_gpt.py and no record"),
        ([path, "--script", other], "no function stream: not a script of the family"),
        ([path, "--script", damaged], f"--script {damaged}: no Python file"),
        ([path, "--device", "abacus"], "--device abacus: "),
    ):
        assert words in refused(*arguments, *(["--device", "cpu"] if "--device" not in arguments else []))


def test_the_command_line_refuses_in_one_line(speller):
    for arguments, words in (([*speller([5]), "--dtype", "bf16"], b"--dtype bf16: "),
                             (["none.bin", "--file", "none.txt"], b"--file none.txt: No such file")):
        tool = process(*arguments)
        out, err = tool.communicate(timeout=60)
        assert (tool.returncode, out) == (2, b"") and words in err
        assert err.startswith(b"error: ") and err.count(b"\n") == 1
