"""The audit catches planted cheats, each with the probe that should, and is silent on what is honest."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import audit
import audit_files
import pytest
from conftest import ROOT, slow
from family import Misuse

TOY = Path(__file__).parent / "toy" / "train_gpt.py"
BAD = ("FAIL",)


def planted(tmp_path, source: Path, *changes) -> Path:
    """A copy of a script with each (old, new) replaced; the old text must be there once."""
    text = source.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{text.count(old)} of {old!r}"
        text = text.replace(old, new)
    (tmp_path / "train_gpt.py").write_text(text)
    return tmp_path / "train_gpt.py"


def failed(findings) -> set[str]:
    return {finding.rule for finding in findings if finding.level == "FAIL"}


SCORED = "        logprobs = logprobs_of(model, ids, first, stop)\n"
LEARNS = "        np.add.at(model.seen, ids[first + 1 : stop + 1], 1)\n"
LOSSES = "        nats[first:stop] = -logprobs[np.arange(stop - first), ids[first + 1 : stop + 1]]\n"
LOGITS = "    logits = logits + model.learn * 0.3 * np.log1p(model.seen)\n"
SUM = "    nats = score(load(artifact), ids)[0]\n"
OPENED = '    with open(artifact_path, "rb") as file:\n'

# name: (probe, rule that must fail, changes, settings)
# fmt: off
MUTANTS = {
    "a future leak through a bidirectional layer": (
        "future",
        "C1/P1",
        [
            (
                LOGITS,
                LOGITS
                + "    logits = logits + 0.1 * model.table[1][ids[np.minimum(at + 2, len(ids) - 1)]]\n",
            )
        ],
        {},
    ),
    "the mean over the current chunk": (
        "future",
        "C1/P1",
        [
            (
                SCORED,
                SCORED
                + "        logprobs = logprobs + 0.1 * model.table[0][ids[first:stop]].mean(0)\n"
                "        logprobs -= np.log(np.exp(logprobs).sum(1, keepdims=True))\n",
            )
        ],
        {},
    ),
    "a missing BOS mask where documents are said to be independent": (
        "documents",
        "C1/P8",
        [("(at > 0) & (ids[at] != BOS)", "at > 0")],
        {"DOC_MASK": "1", "TTT": "0"},
    ),
    "the target in a hash key": (
        "poison",
        "C1/P2",
        [
            (
                LOGITS,
                LOGITS
                + "    logits[np.arange(stop - first), ids[at + 1]] += (ids[at] * 31 ^ ids[at + 1]) % 3\n",
            )
        ],
        {},
    ),
    "a gate that looks at the byte that came": (
        "poison",
        "C2/P2",
        [
            (
                LOSSES,
                LOSSES + "        seen = np.log((1 + model.seen) / (1 + model.seen).sum())\n"
                "        nats[first:stop] = np.minimum(nats[first:stop], -seen[ids[first + 1 : stop + 1]])\n",
            )
        ],
        {},
    ),
    "a probability spread evenly over the bytes of a token": (
        "normal",
        "C2/P3",
        [
            (
                "    return nats, vectors\n",
                "    whole = len(nats) // 4 * 4\n"
                "    nats[:whole] = np.repeat(nats[:whole].reshape(-1, 4).mean(1), 4)\n"
                "    return nats, vectors\n",
            )
        ],
        {},
    ),
    "update before score": ("future", "C1/P1", [(LEARNS, ""), (SCORED, LEARNS + SCORED)], {}),
    "an offset fitted to the targets that it scores": (
        "poison",
        "C3/P5",
        [
            (
                SCORED,
                SCORED
                + "        logprobs = logprobs + 0.1 * np.bincount(ids[first + 1 : stop + 1], "
                "minlength=logprobs.shape[1])\n"
                "        logprobs -= np.log(np.exp(logprobs).sum(1, keepdims=True))\n",
            )
        ],
        {},
    ),
    "two passes, the better one kept": (
        "future",
        "C1/P1",
        [
            (
                "    return nats, vectors\n",
                "    again = logprobs_of(model, ids, 0, len(nats))\n"
                "    return np.minimum(nats, -again[np.arange(len(nats)), ids[1:]]), vectors\n",
            )
        ],
        {},
    ),
    "a cache added without normalising": (
        "normal",
        "C2/P3",
        [
            (
                SCORED,
                SCORED
                + "        logprobs = np.logaddexp(logprobs, -3 + np.log((1 + model.seen) / (1 + "
                "model.seen).sum()))\n",
            )
        ],
        {},
    ),
    "the length of the text in the model": (
        "order",
        "C3/P4",
        [
            (
                "        self.seen = np.zeros(table.shape[-1])",
                "        self.seen = np.zeros(table.shape[-1])\n        self.length = 0",
            ),
            (
                "    ids = np.asarray(ids)\n    nats",
                "    ids = np.asarray(ids)\n    model.seen[4:] += len(ids) % 5\n    nats",
            ),
            ("np.log1p(model.seen)", "np.log1p(model.seen * (1 + np.arange(model.seen.size) % 7))"),
        ],
        {},
    ),
    "the tail scored twice": (
        "coverage",
        "C4/P6",
        [
            (
                SUM,
                SUM
                + "    nats = np.append(nats, nats[-64:])\n    ids = np.append(ids, ids[-64:])\n",
            )
        ],
        {},
    ),
    "the last window dropped": (
        "coverage",
        "C4/P6",
        [
            (
                SUM,
                SUM
                + "    nats, ids = nats[: len(nats) // 64 * 64], ids[: len(nats) // 64 * 64 + 1]\n",
            )
        ],
        {},
    ),
    "the cost of BOS dropped": (
        "coverage",
        "M4",
        [(SUM, SUM + "    nats = nats * (ids[1:] != BOS)\n")],
        {},
    ),
    "the leading space counted twice": (
        "coverage",
        "M2",
        [("len(piece.encode())\n", "len(piece.encode()) + piece.startswith(' ')\n")],
        {"VOCAB_SIZE": "8192"},
    ),
    "validation text in training": (
        "validation",
        "D1/P9",
        [
            (
                '    ids = shards(args, "train")\n',
                '    ids = np.append(shards(args, "train"), shards(args, "val"))\n',
            )
        ],
        {},
    ),
    "validation text in the artifact": (
        "validation",
        "D1/P9",
        [
            (
                "            np.save(file, train(args))\n",
                '            np.save(file, train(args))\n'
                '            np.save(file, shards(args, "val")[:500])\n',
            )
        ],
        {},
    ),
    "training text while scoring": (
        "reload",
        "D2",
        [
            (
                '    ids, sizes = shards(args, "val"), byte_sizes(args)\n',
                '    ids, sizes = shards(args, "val"), byte_sizes(args)\n    shards(args, "train")\n',
            )
        ],
        {},
    ),
    "a hidden environment switch": (
        "watched",
        "B3/environment",
        [
            (
                "    args = Hyperparameters(os.environ)\n",
                '    args = Hyperparameters(os.environ)\n'
                '    args.seed += int(os.environ.get("FORCE_STOP_STEP", 0))\n',
            )
        ],
        {},
    ),
    "a download while scoring": (
        "watched",
        "B1/network",
        [
            (
                OPENED,
                "    import socket\n    try:\n        socket.create_connection(('192.0.2.1', 80), 1)\n"
                "    except OSError:\n        pass\n" + OPENED,
            )
        ],
        {},
    ),
    "a gate on the target, in the batch alone": (
        "decode",
        "C1/P7",
        [
            (
                SCORED,
                SCORED
                + "        at = np.arange(first, stop)\n"
                "        gate = np.isin(ids[at], [14, 105, 119, 36]) & (at > 140)\n"
                "        logprobs[gate, ids[at + 1][gate]] += 0.18\n"
                "        logprobs -= np.log(np.exp(logprobs).sum(1, keepdims=True))\n",
            )
        ],
        {},
    ),
    "two passes, late in the text": (
        "normal",
        "C2/P3",
        [
            (
                "    return nats, vectors\n",
                "    again = -logprobs_of(model, ids, 0, len(nats))[np.arange(len(nats)), ids[1:]]\n"
                "    nats[2100:] = np.minimum(nats, again)[2100:]\n    return nats, vectors\n",
            )
        ],
        {},
    ),
    "weights beside the artifact": (
        "coverage",
        "C4/P6",
        [
            (
                "            np.save(file, train(args))\n",
                "            np.save(file, np.zeros((2, 1, 1), np.int8))\n"
                "        np.save(artifact.with_name('cache.npy'), train(args))\n",
            ),
            (
                "        return Model(np.load(file, allow_pickle=False), **header)",
                "        return Model(np.load(Path(artifact_path).with_name('cache.npy')), **header)",
            ),
        ],
        {},
    ),
    "validation text kept from one run for the next": (
        "validation",
        "D1/P9",
        [
            (
                '    ids = shards(args, "train")\n',
                "    if Path('tokens.npy').exists():\n        ids = np.load('tokens.npy')\n"
                "    else:\n        ids = np.append(shards(args, 'train'), shards(args, 'val'))\n"
                "        np.save('tokens.npy', ids)\n",
            )
        ],
        {},
    ),
    "training text by another path": (
        "reload",
        "D2",
        [
            (
                '    ids, sizes = shards(args, "val"), byte_sizes(args)\n',
                '    ids, sizes = shards(args, "val"), byte_sizes(args)\n'
                "    assert [*Path(args.data_path).parent.glob('*/*_train_*.bin')]\n",
            )
        ],
        {},
    ),
    "a score that is no number": (
        "reload",
        "D2",
        [
            (
                '    return {"val_loss"',
                "    nats = nats * (float('nan') if args.eval_only else 1)\n"
                + '    return {"val_loss"',
            )
        ],
        {},
    ),
    "a smaller artifact on paper": (
        "coverage",
        "B1",
        [("artifact.stat().st_size", "artifact.stat().st_size // 10")],
        {},
    ),
    "characters counted for bytes": (
        "coverage",
        "M2",
        [("len(piece.encode())", "len(piece)")],
        {"VOCAB_SIZE": "8192"},
    ),
    "a hidden switch behind exec": (
        "watched",
        "B3/environment",
        [
            (
                "    args = Hyperparameters(os.environ)\n",
                "    args = Hyperparameters(os.environ)\n"
                "    exec('args.seed += int(os.environ.get(\"FORCE_STOP_STEP\", 0))')\n",
            )
        ],
        {},
    ),
    "a stream that is another model": (
        "decode",
        "C1/P7",
        [
            (
                "        return logprobs_of(self.model, np.array(self.ids), t, t + 1)[0]",
                "        return np.full(260, -np.log(260.0))",
            )
        ],
        {},
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_its_probe(tmp_path, name):
    probe, rule, changes, settings = MUTANTS[name]
    findings = audit.check(planted(tmp_path, TOY, *changes), [probe], settings)
    assert rule in failed(findings), "\n".join(map(str, findings))
    assert not any("broke off" in finding.text for finding in findings) or probe in (
        "reload",
        "coverage",
    ), findings


@pytest.mark.parametrize(
    "settings", [{}, {"DOC_MASK": "1", "TTT": "0"}, pytest.param({"VOCAB_SIZE": "8192"}, marks=slow)], ids=str
)
def test_no_false_alarm_on_the_honest_toy(settings):
    findings = audit.check(TOY, None, settings)
    assert {finding.level for finding in findings} == {"PASS"}, "\n".join(map(str, findings))
    assert {
        "C1/P1", "C1/P2", "C2/P2", "C2/P3", "C3/P4", "C3/P5", "C4/P6", "C1/P7", "C1/P8", "D1/P9",
        "D2", "M2", "M4", "B1/network", "B3/environment",
    } <= {finding.rule for finding in findings}


def test_a_script_that_breaks_down_or_hangs_fails(tmp_path):
    crash = ("    ids = np.asarray(ids)\n    nats", "    ids = np.asarray(ids)[5]\n    nats")
    finding, = audit.check(planted(tmp_path, TOY, crash), ["future", "normal"])
    assert finding.rule == "trial" and finding.level == "FAIL" and "the run text ended" in finding.text
    unsure = (
        "    ids = np.asarray(ids)\n    nats",
        "    assert not positions\n    ids = np.asarray(ids)\n    nats",
    )
    one, other = audit.check(planted(tmp_path, TOY, unsure), ["future", "coverage"])[:2]
    assert one.rule == "C1/P1" and "broke off: AssertionError" in one.text and other.level == "PASS"
    hangs = planted(tmp_path, TOY, ("    args = Hyperparameters(os.environ)\n", "    while True: pass\n"))
    finding, = audit.check(hangs, ["future"], seconds=3)
    assert finding.level == "FAIL" and ("3 s" in finding.text or "exit code" in finding.text)
    short = planted(tmp_path, TOY, ("    return nats, vectors\n", "    return nats[:-1], vectors\n"))
    finding, = audit.check(short, ["normal"])
    assert finding.level == "FAIL" and "losses for" in finding.text


def test_strangers_code_stays_in_its_folder(tmp_path, monkeypatch):
    """A bare environment, an empty folder, a limit on what is written."""
    monkeypatch.setenv("A_SECRET", "1")
    nosy = planted(
        tmp_path,
        TOY,
        (
            "    args = Hyperparameters(os.environ)\n",
            "    args = Hyperparameters(os.environ)\n"
            "    assert 'A_SECRET' not in os.environ and 'HOME' in os.environ\n"
            "    assert sorted(os.listdir('.'))[:2] == ['audit_worker.py', 'train_gpt.py'], os.listdir('.')\n"
            "    assert os.getcwd() == os.environ['HOME']\n",
        ),
    )
    assert not failed(audit.check(nosy, ["normal"]))
    if sys.platform == "linux":
        big = planted(
            tmp_path,
            TOY,
            (
                "    args = Hyperparameters(os.environ)\n",
                "    args = Hyperparameters(os.environ)\n"
                "    with open('big', 'wb') as f:\n        f.truncate(1 << 31)\n",
            ),
        )
        assert "the run text ended" in audit.check(big, ["normal"])[0].text


# Planted in the trunk itself; the artifact is an honest one.
LOGPROBS = "logprobs = model.logits(inputs, position, targets.size(1)).log_softmax(-1)\n"
PLANTED = {
    "attention that looks ahead": (
        "future",
        "C1/P1",
        [("is_causal=mask is None, ", "is_causal=False, ")],
    ),
    "logits that know the target": (
        "poison",
        "C1/P2",
        [
            (
                LOGPROBS,
                LOGPROBS
                + "            logprobs = (logprobs + 0.1 * F.one_hot(targets, "
                "logprobs.size(-1))).log_softmax(-1)\n",
            )
        ],
    ),
    "learning before scoring": (
        "future",
        "C1/P1",
        [
            (
                "        if start and learner is not None:\n            learner.catch_up(ids, seen)\n"
                "        part = rows[start : start + chunk]\n",
                "        part = rows[start : start + chunk]\n        seen[part[0, 1] : part[-1, 2]] = True\n"
                "        if learner is not None:\n            learner.catch_up(ids, seen)\n",
            )
        ],
    ),
}


@pytest.fixture(scope="module")
def trained_trunk(tmp_path_factory):
    """Findings of the fast probes on the trunk, and the artifact that they were made with."""
    folder = tmp_path_factory.mktemp("trial")
    trial = audit.Trial(ROOT / "train_gpt.py", folder, {"TTT": "sgd", "TTT_LR": "0.05"})
    findings = audit.behave(trial, ["future", "poison", "normal", "order", "coverage"])
    return findings, Path(trial.artifact)


def test_no_false_alarm_on_the_trunk(trained_trunk):
    assert {finding.level for finding in trained_trunk[0]} == {"PASS"}, "\n".join(map(str, trained_trunk[0]))


@pytest.mark.parametrize("record", ["BiJEPAX", "TokenBest", "BytePPM", "ByteBest"])
def test_what_a_mixture_learns_makes_documents_depend_on_others(record, tmp_path):
    """By the settings that the audit takes from each record, with and without its mixture and adapters."""
    folder, = (ROOT / "records").glob(f"*_{record}")
    trial = audit.Trial(folder / "train_gpt.py", tmp_path, {"DOC_MASK": "1", "TTT": "0"}, record=folder)
    trial.configure()
    assert float(trial.settings["PPM_WEIGHT"]) == 1 and not audit.independent(trial)
    trial.settings["PPM_WEIGHT"] = "0"
    assert audit.independent(trial)


@pytest.mark.parametrize("name", PLANTED)
def test_mutant_of_the_trunk_is_caught(trained_trunk, tmp_path, name):
    probe, rule, changes = PLANTED[name]
    script = planted(tmp_path, ROOT / "train_gpt.py", *changes)
    findings = audit.check(script, [probe], {"TTT": "sgd", "TTT_LR": "0.05"}, artifact=trained_trunk[1])
    told = "\n".join(map(str, findings))
    assert rule in failed(findings) and "broke off" not in told, told


def test_adapter_judges_a_script_that_is_not_ours(tmp_path):
    (tmp_path / "train_gpt.py").write_text(
        "import numpy as np\n\ndef model(ids, peek):\n    ids = np.array(ids)\n"
        "    logits = np.log(1 + np.arange(260))[None] * (1 + ids[:-1, None] % 3)\n"
        "    if peek: logits = logits + (ids[1:].sum() % 7) * np.arange(260) / 99\n"
        "    return logits - np.log(np.exp(logits).sum(1, keepdims=True))\n"
    )
    for peek in (False, True):
        (tmp_path / "adapter.py").write_text(
            "import importlib.util, numpy as np\n"
            "spec = importlib.util.spec_from_file_location('theirs', SCRIPT)\n"
            "theirs = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(theirs)\n"
            "DOCUMENTS_INDEPENDENT = False\n\n"
            f"def score(ids, positions=()):\n    logprobs = theirs.model(ids, {peek})\n"
            "    return -logprobs[np.arange(len(ids) - 1), np.array(ids)[1:]], {t: logprobs[t] for "
            "t in positions}\n"
        )
        done = subprocess.run(
            [
                sys.executable, ROOT / "scripts" / "audit.py", tmp_path / "train_gpt.py",
                "--adapter", tmp_path / "adapter.py", "--json",
            ],
            capture_output=True,
            text=True,
        )
        found = {finding["rule"]: finding["level"] for finding in json.loads(done.stdout)}
        assert done.returncode == int(peek) and (found["C1/P1"] == "FAIL") == peek, done.stdout
        # What an adapter cannot show is said
        assert found["C2/P3"] == "PASS" and found["C1/P7"] == found["D2"] == "WARN"


# Static hints: one per pattern, and none on code that is fine.
# fmt: off
HINTS = {
    "1": "import urllib.request\n",
    "2": "def train_model():\n    return open('fineweb_val_000.bin')\n",
    "3": "def adapt(model, val_tokens):\n    loss = model(val_tokens)\n    loss.backward()\n"
    "    model.step()\n",
    "4": "key = ctx_hash ^ (target * 36313)\n",
    "5": "n = base + (has_leading_space[t] & ~boundary[p])\n",
    "6": "p = math.exp(logp / len(piece))\n",
    "7": "stop = os.environ.get('FORCE_STOP_STEP')\n",
    "8": "def eval_sweep(xs):\n    losses = [f(x) for x in xs]\n    return min(losses)\n",
    "10": "bpb = loss * 0.2967 / math.log(2)\n",
}


@pytest.mark.parametrize("item", HINTS)
def test_hint_names_file_and_line(tmp_path, item):
    script = tmp_path / "theirs.py"
    script.write_text("CAP = 16_000_000\n" + HINTS[item])
    rules = {finding.rule: finding for finding in audit_files.hints(script)}
    assert set(rules) == {f"static/{item}"} and rules[f"static/{item}"].where.startswith("theirs.py:"), rules
    assert all(finding.level == "WARN" for finding in rules.values())


def test_hints_see_through_a_wrapper_and_say_where_they_cannot(tmp_path):
    import base64
    import lzma
    script, inner = tmp_path / "packed.py", "CAP = 16_000_000\nimport requests\n" + "x = 1\n" * 40
    packed = base64.b85encode(lzma.compress(inner.encode())).decode()
    script.write_text(f"import lzma, base64\nexec(lzma.decompress(base64.b85decode('{packed}')))\n")
    assert {finding.rule for finding in audit_files.hints(script)} == {"static/0", "static/1"}
    script.write_text("exec(open('other').read())\nCAP = 16_000_000\n")
    finding, = audit_files.hints(script)
    assert "cannot be judged" in finding.text
    script.write_text("def broken(:\n")
    assert audit_files.hints(script)[0].level == "FAIL"


@pytest.fixture
def record(tmp_path):
    """A copy of the frozen Baseline, free to be tampered
    with: record(change) applies change(folder) first."""
    source, = (ROOT / "records").glob("*_Baseline")

    def record(change=lambda folder: None):
        folder = tmp_path / source.name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        change(folder)
        return {finding.rule: finding for finding in audit_files.forensics(folder)}
    return record


def edit(name: str, change) -> None:
    def apply(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))
    return apply


def test_forensics_pass_on_a_record(record):
    assert not failed(record().values())


def append(name: str, text: str):
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


# fmt: off
TAMPERED = [
    ("B1", edit("submission.json", lambda d: d.update(bytes_total=16_000_001))),
    ("B1", edit("seed42/metrics.json", lambda d: d.update(bytes_total=d["bytes_total"] - 1000))),
    ("B2", append("train_gpt.py", "# more code than was counted\n")),
    ("S3", append("train_gpt.py", "# another script\n")),
    ("B4", edit("seed42/metrics.json", lambda d: d["clocks"].update(calibration=9.0))),
    (
        "B3/own",
        edit(
            "seed42/metrics.json",
            lambda d: d.update(broken_budgets=["MAX_WALLCLOCK_SECONDS=600 is broken"]),
        ),
    ),
    ("S2", edit("seed314/metrics.json", lambda d: d["settings"].update(MATRIX_LR=0.5))),
    (
        "S3",
        lambda folder: (folder / "seed42/log.txt").write_text(
            "# edited\n" + (folder / "seed42/log.txt").read_text()
        ),
    ),
    ("S4", edit("submission.json", lambda d: d.update(val_bpb=d["val_bpb"] - 0.01))),
    ("S4", edit("submission.json", lambda d: d["seed_results"]["999"].update(val_bpb=1.0))),
    (
        "S4",
        lambda folder: (folder / "seed42/log.txt").write_text(
            (folder / "seed42/log.txt")
            .read_text()
            .replace("_exact val_loss:1.33", "_exact val_loss:1.23")
        ),
    ),
    ("S5", lambda folder: shutil.rmtree(folder / "seed999")),
    ("M1", edit("seed42/metrics.json", lambda d: d["evals"][d["headline"]].update(bytes=600_000))),
    (
        "M1",
        edit(
            "seed42/metrics.json",
            lambda d: [
                entry.update(bytes=int(entry["bytes"] * 1.167), val_bpb=entry["val_bpb"] / 1.167)
                for entry in d["evals"].values()
            ],
        ),
    ),
    (
        "D3",
        edit("seed42/metrics.json", lambda d: d["evals"][d["headline"]].update(targets=100_000)),
    ),
]


@pytest.mark.parametrize(
    "rule, change", TAMPERED, ids=[f"{rule}-{i}" for i, (rule, _) in enumerate(TAMPERED)]
)
def test_forensics_find_what_was_tampered_with(record, rule, change):
    found = record(change)
    assert found[rule].level == "FAIL", found


def test_budgets_of_the_contest_fail_there_and_warn_elsewhere(record):
    slow = edit("seed42/metrics.json", lambda d: d.update(train_seconds=601.153, eval_seconds=688.0))
    one_card = edit("submission.json", lambda d: d.update(hardware="NVIDIA H100 80GB HBM3"))
    found = record(lambda folder: (slow(folder), one_card(folder)))
    assert found["B3"].level == found["B6"].level == "WARN" and "not the contest" in found["B3"].text

    def on_the_contest(folder):
        slow(folder)
        edit("submission.json", lambda d: d.update(hardware="8xH100 80GB SXM"))(folder)
    found = record(on_the_contest)
    assert found["B3"].level == found["B6"].level == "FAIL" and "601.2 s" in found["B3"].text


def test_misuse(tmp_path):
    for arguments, words in (
        (["no-such"], "no-such"),
        ([], "RECORD"),
        ([".", "--only", "nose"], "nose"),
        ([".", "--set", "X"], "NAME=VALUE"),
        ([".", "--adapter", "gone.py"], "gone.py"),
    ):
        with pytest.raises(Misuse, match=words):
            audit.main(arguments)
