"""scripts/carry.py: a refactor leaves every number as it was, and whatever else differs is named."""

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess

import carry
import family
import jsonschema
import lineage
import pytest
import stats
from conftest import ROOT, slow

# Everything of the trunk in a model of some thousand parameters, four steps of eight rows.
SMALL = {**carry.EVERYTHING, "NUM_LAYERS": "2", "MODEL_DIM": "64", "ROPE_DIMS": "4", "NGRAM_ORDERS": "2,3",
         "NGRAM_BUCKETS": "128", "JEPA_LATENT_DIM": "16", "JEPA_PROJ_HIDDEN": "16", "SEED": "42"}
SHORT = carry.Length(4, 256, 32, 600)
GUARD = 'if __name__ == "__main__":'
# In front of the last lines: updates whose two factors can be taken in another order.
SCALED = '''plain_newton_schulz = newton_schulz


def newton_schulz(matrices, steps, dtype):
    """The update, times a factor that is made of two."""
    return {}


'''
ORDERS = ["(plain_newton_schulz(matrices, steps, dtype) * 0.7) * 1.3",
          "plain_newton_schulz(matrices, steps, dtype) * (0.7 * 1.3)"]


def replaced(pattern: str, new: str, source: str) -> str:
    changed, count = re.subn(pattern, new, source)
    assert count, f"the trunk has no {pattern}: this test needs another place to change"
    return changed


def digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


@pytest.fixture(scope="module")
def old() -> str:
    source = (ROOT / "train_gpt.py").read_text()
    return source.replace(GUARD, SCALED.format(ORDERS[0]) + GUARD)


@pytest.fixture(scope="module")
def refactored(old) -> str:
    """The same program: every comment and line break gone, a local renamed."""
    return ast.unparse(ast.parse(replaced(r"\btemporary\b", "unfinished", old))) + "\n"


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """One folder for all workers of a session."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "carry"


@pytest.fixture(autouse=True)
def small(kept, monkeypatch):
    """Short runs, kept in a folder of the tests' own, so that the old script runs once."""
    monkeypatch.setattr(carry, "KEPT", kept)
    monkeypatch.setattr(carry, "FULL", SHORT)


@pytest.fixture
def against(old, corpus):
    """against(new source) -> how its short run differs from that of the old script."""

    def against(new: str) -> carry.Comparison:
        sources = old.encode(), new.encode()
        pair = carry.made_pair(sources, carry.Measured(SMALL), SHORT, {}, corpus)
        return carry.side_by_side([pair])[0]

    return against


def test_a_refactor_is_equal_in_every_phase(against, refactored):
    found = against(refactored)
    assert found.equal and not found.notes, found.different
    stages = ["metrics.jsonl", "gradient reports", "last.safetensors", "best.safetensors",
              "final.safetensors", "scores of the weights", "artifact", "scores of the artifact",
              "metrics.json", "decoding", "generated text"]
    assert list(found.counts) == stages
    assert [stage for stage, count in found.counts.items() if not count] in ([], ["gradient reports"])
    assert found.counts["metrics.jsonl"] == SHORT.steps + 2  # a line a step, and two validations
    assert found.counts["scores of the artifact"] == 3  # round trip, sliding, test-time training
    path = next(path for path in carry.KEPT.glob("*/run/metrics.json")
                if (path.parent.parent / "train_gpt.py").read_text() == refactored)
    assert json.loads(path.read_text())["evals"]["final_int6_ttt"]["updates"] >= 3


def test_another_constant_is_named_at_its_first_step(against, old):
    found = against(replaced(r"\b3\.4445\b", "3.4446", old))
    words = r"metrics.jsonl: step 2 training train_loss is [\d.]+, it was [\d.]+$"
    assert not found.equal and re.match(words, found.first())
    assert {"final.safetensors", "artifact", "scores of the weights"} <= {*found.different}
    name = r"(model|ema|muon|opt|adam)\S*"
    words = rf"{name} \[[\d, ]*\] is -?[\d.e-]+, it was -?[\d.e-]+$"
    assert re.match(words, found.different["final.safetensors"][0])


def test_another_order_of_one_operation_is_refused(against, old):
    found = against(old.replace(*ORDERS))
    assert not found.equal and "final.safetensors" in found.different


@slow
def test_a_change_of_the_last_pass_is_named_there(against, old):
    found = against(replaced(r"\.ttt_lr\b", ".ttt_lr * 1.01", old))
    assert found.first().startswith("scores of the artifact: final_int6_ttt val_loss is ")
    assert {*found.different} <= {"scores of the artifact", "metrics.json", "decoding", "generated text"}
    assert all("final_int6_ttt " in text for text in found.different["scores of the artifact"])


def test_a_script_that_fails_is_different_and_says_why(against, old):
    found = against(old.replace(GUARD, f"{GUARD}\n    raise SystemExit('error: not today')"))
    assert found.first() == "new script: ends with exit code 1: error: not today"


# A record


@pytest.fixture
def record(tmp_path, old, corpus):
    """A record of one seed, whose log begins with the script that made its numbers."""
    folder = tmp_path / "records" / "2026-01-01_Toy"
    (folder / "seed42").mkdir(parents=True)
    (folder / "train_gpt.py").write_text(old)
    (folder / "submission.json").write_text(json.dumps({"parent": None, "changes": {}}))
    about = {"val_bpb": 1.25, "headline": "final_int6_ttt", "seed": 42, "evals": {}, "settings": SMALL,
             "script_sha256": digest(old), "bytes_code": len(old), "bytes_model": 1000,
             "bytes_total": len(old) + 1000}
    (folder / "seed42" / "metrics.json").write_text(json.dumps(about))
    (folder / "seed42" / "log.txt").write_text(f"{old}{'=' * 100}\npython:3.11\n")
    return folder


@pytest.fixture
def carried(record, corpus):
    """carried() -> [(level, rule, text)] of `lineage.py carry`."""

    def carried(**more):
        options = argparse.Namespace(**{"records": [record], "arms": False, "dry_run": False, "quick": False,
                                        "data": str(corpus), "jobs": 1, "fresh": False, **more})
        found = carry.carry_records(options, record.parent.parent)
        return [(each.level, each.rule, each.text) for each in found]

    return carried


def test_numbers_are_carried_to_a_refactored_script(record, carried, old, refactored):
    assert carried() == [("PASS", "carry/present", "measured with the present script")]
    (record / "train_gpt.py").write_text(refactored)
    run = json.loads((record / "seed42" / "metrics.json").read_text())
    assert lineage.stale(record) == ["seed42"] and stats.stale_mark(record, [run])
    assert carried(dry_run=True)[0][:2] == ("PASS", "carry/equal") and lineage.stale(record) == ["seed42"]

    (level, rule, text), = carried()
    assert (level, rule) == ("PASS", "carry/equal") and "equal bit for bit (seed42)" in text
    assert lineage.stale(record) == [] and not stats.stale_mark(record, [run])
    line = f"Script `{digest(old)[:8]}`, carried to `{digest(refactored)[:8]}`."
    assert stats.script_line(record, {"seed42": digest(old)}) == line
    size = len(refactored.encode())
    assert stats.as_carried(record, run) == {**run, "bytes_code": size, "bytes_total": size + 1000}

    submission = json.loads((record / "submission.json").read_text())
    entry, = submission["carried"]
    assert (entry["from"], entry["to"], entry["for"]) == (digest(old), digest(refactored), ["seed42"])
    assert entry["probe"]["ITERATIONS"] == "4" and "NUM_LAYERS" not in entry["probe"]
    rules = json.loads((ROOT / "scripts" / "submission.schema.json").read_text())["properties"]["carried"]
    jsonschema.validate(submission["carried"], rules)


def test_nothing_is_written_for_a_script_that_computes_otherwise(record, carried, old):
    (record / "train_gpt.py").write_text(replaced(r"\b3\.4445\b", "3.4446", old))
    before = (record / "submission.json").read_text()
    (level, rule, text), = carried()
    assert (level, rule) == ("FAIL", "carry/different")
    assert "first in metrics.jsonl: step 2 training train_loss is " in text and "nothing is written" in text
    assert (record / "submission.json").read_text() == before and lineage.stale(record) == ["seed42"]


@pytest.mark.parametrize("log,words", [
    ("# another script\n" + "=" * 100 + "\n", "does not begin with the script"),
    (None, "missing, so the script that made these numbers is not known")])
def test_a_log_without_the_script_is_refused(record, carried, log, words):
    path = record / "seed42" / "log.txt"
    path.write_text(log) if log else path.unlink()
    (record / "train_gpt.py").write_text("# the present one\n")
    (level, rule, text), = carried()
    assert (level, rule) == ("FAIL", "carry/run") and words in text and "seed42/log.txt" in text


def test_a_record_without_runs_is_refused(record, carried):
    (record / "seed42" / "metrics.json").unlink()
    assert carried() == [("FAIL", "carry/runs", "no seed*/metrics.json: nothing is measured")]


def test_proofs_follow_each_other_and_are_for_what_they_name():
    def entry(old, new, *results):
        return {"from": old, "to": new, "for": [*results]}

    about = {"carried": [entry("a", "b", "seed42", "ablations"), entry("b", "c", "seed42"),
                         entry("c", "b", "seed42")]}
    assert family.carried(about, "a", "c", "seed42") and family.carried(about, "c", "c", "seed1")
    assert family.carried(about, "a", "b", "ablations/doc/seed42.json")
    assert not family.carried(about, "a", "c", "ablations/doc/seed42.json")
    assert not family.carried(about, "a", "c", "seed4") and not family.carried(about, "c", "a", "seed42")
    assert not family.carried({}, "a", "b", "seed42")


def test_a_line_below_a_table_names_the_script_of_every_result(record, old):
    mine, other = digest(old), "ab" * 32
    assert stats.script_line(record, {"ablations/a/seed1.json": mine}) == f"Script `{mine[:8]}`."
    assert stats.script_line(record, {"measured/a.json": None}) == "*no script named*"
    found = stats.script_line(record, {"measured/a.json": None, "measured/b.json": other, "seed42": mine})
    assert found == f"*stale: measured with script `abababab`, this one is `{mine[:8]}`; no script named*"
    assert stats.script_line(record.parent, {"seed42": mine}) == "" == stats.script_line(record, {})


# Ablations


def test_arms_are_grouped_by_script_and_setting_and_their_script_is_found_in_git(record, old, tmp_path):
    def git(*words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    past = "# the script that the arms had\n"
    (record / "train_gpt.py").write_text(past)
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "step")
    (record / "train_gpt.py").write_text("# the present one\n")
    arms = {"base/seed1": {"X": 1, "SEED": 1}, "base/seed2": {"X": 1, "SEED": 2},
            "doc/seed1": {"X": 2, "SEED": 1}}
    for name, settings in arms.items():
        path = record / "ablations" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings, "evals": {}, "script_sha256": digest(past)}))
    (record / "ablations" / "arms.json").write_text(json.dumps({"base": "what it is"}))
    (record / "measured").mkdir()
    for name, proof in (("prove", {"set": {"TTT": "0"}, "coded_bytes": 9}), ("speeds", {"seconds": 1}),
                        ("table", {"set": {"MIN_LR": 0.5}, "rows": []})):
        about = {**proof, "script_sha256": digest(old)}
        (record / "measured" / f"{name}.json").write_text(json.dumps(about))

    found = carry.jobs_of(record, arms=True)
    assert [job.results for job in found] == [
        ["seed42"], ["ablations/base"], ["ablations/doc"], ["measured/prove.json"], ["measured/table.json"]]
    assert found[3].like.settings == {**SMALL, "TTT": "0"}
    assert found[4].like.settings == {**SMALL, "MIN_LR": "0.5"}
    assert carry.measured_source(found[1], tmp_path) == past.encode()
    found[1].like = carry.Measured({}, script="0" * 64)
    with pytest.raises(family.Misuse, match="ablations/base: no log and no commit has its script, 00000000"):
        carry.measured_source(found[1], tmp_path)


# The parts of a comparison

HEADER = '''class Var:
    def __init__(self, default): self.default = default
    def __set_name__(self, owner, name): self.name = name.upper()
class Hyperparameters:
{}
    RETIRED = {}
    @classmethod
    def vars(cls): return {{name: var for name, var in vars(cls).items() if isinstance(var, Var)}}
'''


def test_a_setting_may_leave_the_header_where_it_is_not_refused(tmp_path):
    scripts = []
    before = "    clip = Var('std')\n    dim = Var(8)\n    gone = Var(0)\n    size = Var(3)"
    for name, fields, retired in (("old", before, {}),
                                  ("new", "    dim = Var(8)\n    fresh = Var(True)",
                                   {"CLIP": (("std",), "why"), "GONE": ("3 3.0", "why")})):
        path = tmp_path / name / "train_gpt.py"
        path.parent.mkdir()
        path.write_text(HEADER.format(fields, retired))
        scripts.append(path)
    old = {"CLIP": "std", "DIM": 8, "GONE": 3, "SIZE": 7}
    apart, notes = carry.settings_apart(old, {"DIM": 8, "FRESH": True}, scripts)
    assert not apart and notes == ["the header lost CLIP, GONE, SIZE", "the header gained FRESH"]
    apart, _ = carry.settings_apart({**old, "CLIP": "mse"}, {"DIM": 9, "FRESH": False}, scripts)
    assert apart == ["DIM is 9, it was 8", "CLIP is missing and not retired at 'mse'",
                     "FRESH is new, at False"]


def test_a_probe_keeps_windows_shorter_than_its_rows():
    settings = {"TRAIN_SEQ_LEN": "2048", "ATTN_WINDOW": "512", "ATTN_WINDOW_LAYERS": "0,1"}
    source = family.TRUNK.read_text()
    for length in carry.FULL, carry.QUICK:
        found = carry.probe(settings, length, (source, source))
        assert 2 * int(found["ATTN_WINDOW"]) < int(found["TRAIN_SEQ_LEN"]) == length.row


def test_no_process_at_a_time_is_refused():
    with pytest.raises(family.Misuse, match="--jobs 0: a whole number from 1"):
        carry.side_by_side([], 0)


def test_clocks_are_no_difference_and_a_missing_line_is():
    nan = float("nan")
    old = {"step 1": {"train_loss": 1.5, "train_seconds": 2.0}, "step 2": {"train_loss": nan, "eval_time": 1}}
    new = {"step 1": {"train_loss": 1.5, "train_seconds": 3.0, "more": 1}, "step 2": {"train_loss": nan}}
    assert list(carry.values_apart(old, new)) == []
    assert list(carry.values_apart(old, {"step 1": {"train_loss": 1.25}})) == [
        "step 1 train_loss is 1.25, it was 1.5",
        "step 2 is missing, it was {'train_loss': nan, 'eval_time': 1}"]


def test_the_command_compares_two_scripts(tmp_path, old, corpus, monkeypatch, capsys):
    monkeypatch.setattr(carry, "EVERYTHING", SMALL)
    (tmp_path / "old.py").write_text(old)
    call = [str(tmp_path / "old.py"), str(tmp_path / "old.py"), "--data", str(corpus)]
    assert carry.main(call) == 0 and capsys.readouterr().out.startswith("equal: metrics.jsonl 6, ")
    for more, words in ((["--set", "lower=1"], "--set lower=1: NAME=VALUE"),
                        (["--like", str(tmp_path / "none.json")], "none.json"),
                        (["--set", "NUM_LAYERS=0"], "the old script does not run: error: NUM_LAYERS='0'")):
        with pytest.raises(family.Misuse, match=re.escape(words)):
            carry.main(call + more)
