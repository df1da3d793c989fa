"""scripts/submit.py: a record from `new` to `export`, and everything that `check` has to catch on the way."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import leaderboard
import lineage
import pytest
import run_seeds
import submit
from conftest import ROOT, TINY
from family import Finding, Misuse
from tables import is_draft

NAME = "2026-01-02_Probe"
SEEDS = (1, 2, 3)


def git(root: Path, *words: str) -> None:
    call = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    subprocess.run(call, check=True, capture_output=True)


def written(text: str) -> str:
    """What a person makes of the places that are left to be written."""
    return re.sub(r"\bTODO\b", "it says here", text)


@pytest.fixture(scope="session")
def made(tmp_path_factory, corpus) -> Path:
    """A repository with one record, made with the tools alone:
    new, a changed default, three tiny runs, fill, words by hand.

    Branch `main` has the trunk, branch `idea` the record.
    states.json keeps what the tools said on the way.
    """
    root = tmp_path_factory.mktemp("made") / "repository"
    root.mkdir()
    shutil.copy(ROOT / "train_gpt.py", root)
    shutil.copy(ROOT / "requirements.txt", root)
    (root / ".gitignore").write_text("runs/\n__pycache__/\nstates.json\n")
    (root / "README.md").write_text("# Title\n\n<!-- leaderboard -->\n<!-- end -->\n")
    git(root, "init", "-b", "main")
    git(root, "add", ".")
    git(root, "commit", "-m", "trunk")
    git(root, "checkout", "-b", "idea")
    assert submit.main(["new", "Probe", "--parent", ".", "--date", "2026-01-02"], root) == 0
    folder = root / "records" / NAME
    states = {"new": {path.name: path.read_text() for path in folder.iterdir()}}
    states["draft"] = [[each.rule, each.level, each.text] for each in submit.check(folder, skip=submit.SLOW)]
    script = folder / "train_gpt.py"
    text, count = re.subn(r"(train_log_every = Var\()200,", r"\g<1>201,", script.read_text())
    assert count == 1
    script.write_text(text)
    settings = {**TINY, "DATA_PATH": str(corpus)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        given = [f"--set={key}={value}" for key, value in settings.items()]
        seeds = ",".join(map(str, SEEDS))
        code = run_seeds.main([str(folder), "--seeds", seeds, "--jobs", "2", "--threads", "1", *given,
                               "--collect", str(folder)])
    assert code == 0
    shutil.rmtree(root / "runs")
    states["changed"] = submit.fill(submit.Record(folder))
    states["filled"] = json.loads((folder / "submission.json").read_text())
    found = submit.check(folder, skip=submit.SLOW)
    states["findings"] = [[each.rule, each.level, each.text] for each in found]
    command = " ".join(f"{key}={value}" for key, value in settings.items())
    readme = (folder / "README.md").read_text()
    readme = readme.replace("TODO the exact command, with every setting", f"{command} python train_gpt.py")
    (folder / "README.md").write_text(written(readme))
    about = json.loads((folder / "submission.json").read_text())
    symbols = about["changes"]["TODO"]["symbols"]
    about["changes"] = {"fewer lines": {"reason": "to have a change", "symbols": symbols}}
    about = {**json.loads(written(json.dumps(about))), "github_id": ""}
    (folder / "submission.json").write_bytes(submit.as_json(about))
    git(root, "add", ".")
    git(root, "commit", "-m", "record")
    (root / "states.json").write_text(json.dumps(states))
    return root


@pytest.fixture
def copy(made, tmp_path, monkeypatch) -> Path:
    """The folder of the record in a copy of its repository;
    lineage.py, tested elsewhere, has nothing to say."""
    monkeypatch.setattr(lineage, "check", lambda folder, root: [])
    return Path(shutil.copytree(made, tmp_path / "repository")) / "records" / NAME


def failures(folder: Path, base: str | None = None) -> list[Finding]:
    return [found for found in submit.check(folder, base, submit.SLOW) if found.level == "FAIL"]


def edit(path: Path, **values) -> None:
    """Sets keys of a JSON file; None deletes one."""
    found = json.loads(path.read_text()) | values
    path.write_bytes(submit.as_json({key: value for key, value in found.items() if value is not None}))


# --- The way of a record ---


def test_a_new_record_is_its_parents_script_and_a_draft(made):
    files = json.loads((made / "states.json").read_text())["new"]
    assert sorted(files) == sorted(submit.FILES)
    assert files["train_gpt.py"] == (made / "train_gpt.py").read_text()
    assert files["requirements.txt"] == (made / "requirements.txt").read_text()
    rules = jsonschema.Draft202012Validator(json.loads(submit.SCHEMA.read_text()))
    assert rules.is_valid(json.loads(files["submission.json"]))
    assert json.loads(files["submission.json"])["draft"] is True
    assert not [*(made / "records").glob(".*")]
    failed = {
        rule: text
        for rule, level, text in json.loads((made / "states.json").read_text())["draft"]
        if level == "FAIL"
    }
    assert "nothing is measured yet" in failed["submit/seeds"]
    assert {"submit/schema", "submit/todo"} <= {*failed}
    assert "Not measured yet." in files["README.md"]


def test_fill_writes_numbers_tables_and_symbols_without_an_idea(made):
    states = json.loads((made / "states.json").read_text())
    folder, filled = made / "records" / NAME, states["filled"]
    runs = [json.loads((folder / f"seed{seed}" / "metrics.json").read_text()) for seed in SEEDS]
    assert sorted(states["changed"]) == ["README.md", "agreed.json", "submission.json"]
    assert [*json.loads((folder / "agreed.json").read_text())] == ["Hyperparameters.train_log_every"]
    assert filled["val_bpb"] == pytest.approx(sum(run["val_bpb"] for run in runs) / 3, abs=1e-15)
    assert "draft" not in filled
    assert filled["bytes_total"] == max(run["bytes_total"] for run in runs) and filled["seeds"] == [*SEEDS]
    assert filled["seed_results"]["2"]["eval_seconds"] == runs[1]["eval_seconds"]
    assert filled["blurb"] == "TODO"
    assert filled["dataset"]["sha256"] == runs[0]["dataset"]["sha256"]
    assert filled["hardware"] == runs[0]["device"]
    assert filled["changes"] == {"TODO": {"reason": "", "symbols": ["Hyperparameters.train_log_every"]}}
    assert f"**{filled['val_bpb']:.4f} BPB**" in (folder / "README.md").read_text()
    refused = [text for rule, level, text in states["findings"] if level == "FAIL"]
    assert any("changes.TODO.reason" in text for text in refused)
    assert any("still to be written" in text for text in refused)


def test_a_finished_record_passes_with_lineage_and_smoke(made):
    found = submit.check(made / "records" / NAME, "main", ["audit"])
    assert [str(each) for each in found if each.level == "FAIL"] == []
    passed = {each.rule for each in found if each.level == "PASS"}
    rules = [*submit.RULES, "scope", "plan", "smoke"]
    assert {*(f"submit/{rule}" for rule in rules), "lineage/symbols"} <= passed
    assert [each.text for each in found if each.rule == "submit/audit"] == ["left out by --skip"]


def test_the_plan_has_the_headlines_passes_and_the_contests_sizes(monkeypatch):
    """How a score is made is the headline's; windows, batches and chunks of its short text are not."""
    import plan
    monkeypatch.setattr(plan, "make_plan", lambda script, settings: settings)
    folder, = (ROOT / "records").glob("*_BytePPM")
    taken, ran = submit.planned(submit.Record(folder)), submit.run_settings(folder / "seed42")
    assert taken["TTT"] == "sgd" and taken["MIX_ROWS"] == ran["MIX_ROWS"]
    sizes = {"EVAL_STRIDE", "EVAL_SEQ_LEN", "TTT_CHUNK_TOKENS", "TTT_BATCH_ROWS", "NUM_LAYERS"}
    assert sizes <= ran.keys() and not sizes & taken.keys()


def test_fill_twice_changes_nothing_and_keeps_what_was_written_by_hand(copy):
    before = (copy / "submission.json").read_bytes()
    assert submit.fill(submit.Record(copy)) == [] and (copy / "submission.json").read_bytes() == before
    edit(copy / "submission.json", val_bpb=1.0, compliance="as the README says")
    assert submit.fill(submit.Record(copy)) == ["submission.json"]
    after = json.loads((copy / "submission.json").read_text())
    assert after == {**json.loads(before), "compliance": "as the README says"}


def test_fill_reproduces_the_numbers_of_the_records():
    for folder in sorted((ROOT / "records").glob("*/submission.json")):
        if is_draft(folder.parent):
            continue
        record = submit.Record(folder.parent)
        found = submit.measured(record.present)
        assert {key: record.submission[key] for key in found.keys() & record.submission.keys()} == {
            key: found[key] for key in found.keys() & record.submission.keys()}
        needed = {"val_loss", "val_bpb", "bytes_total", "bytes_code", "seeds", "seed_results", "hardware"}
        assert needed <= record.submission.keys()
        assert [*submit.schema(record)] == []


def test_a_frozen_record_is_not_filled(copy):
    edit(copy / "submission.json", frozen=True, val_bpb=1.0)
    before = (copy / "submission.json").read_bytes()
    with pytest.raises(Misuse, match="frozen, its numbers stay"):
        submit.main(["fill", str(copy)])
    assert (copy / "submission.json").read_bytes() == before
    assert submit.main(["fill", str(copy), "--force"]) == 0
    assert (copy / "submission.json").read_bytes() != before


# --- What check catches ---

SCHEMA_ERRORS = [  # a change of submission.json, and the key that the message names
    ({"val_bpb": None}, "val_bpb"), ({"blurb": None}, "blurb"), ({"val_bpb": "1.9"}, "val_bpb"),
    ({"val_loss": -1.0}, "val_loss"), ({"bytes_total": 1.5}, "bytes_total"), ({"date": "2026-1-2"}, "date"),
    ({"date": "2026-02-30"}, "date"), ({"name": "a b"}, "name"), ({"parent": "Baseline"}, "parent"),
    ({"frozen": "yes"}, "frozen"), ({"seeds": [1, 1]}, "seeds"), ({"seeds": []}, "seeds"),
    ({"seed_results": {"one": {"val_loss": 1, "val_bpb": 1, "bytes_total": 1}}}, "seed_results"),
    ({"seed_results": {"1": {"val_loss": 1}}}, "seed_results.1"), ({"changes": {"a": ["b"]}}, "changes.a"),
    ({"changes": {"a": {"reason": "", "symbols": ["b"]}}}, "changes.a.reason"),
    ({"changes": {"a": {"reason": "r", "symbols": []}}}, "changes.a.symbols"),
    ({"dataset": {"name": "d", "sha256": "no"}}, "dataset.sha256"), ({"val_bbp": 1.9}, "val_bbp"),
    ({"hardware": ""}, "hardware"),
]


@pytest.mark.parametrize("change, key", SCHEMA_ERRORS, ids=str)
def test_the_schema_refuses_and_names_the_key(copy, change, key):
    edit(copy / "submission.json", **change)
    texts = [text for _, text in submit.schema(submit.Record(copy))]
    assert any(re.search(rf"(?<!\w){re.escape(key)}(?!\w)", text) for text in texts), texts


def test_every_key_of_the_schema_is_described():
    def walk(rules: dict):
        for name, each in rules.get("properties", {}).items():
            yield name, each
            yield from walk(each)
            if isinstance(each.get("additionalProperties"), dict):
                yield from walk(each["additionalProperties"])

    rules = json.loads(submit.SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(rules)
    keys = dict(walk(rules))
    assert [name for name, each in keys.items() if not each.get("description")] == []
    field = """author date github_id name val_bpb blurb val_loss bytes_total track bytes_code seeds
        seed_results hardware val_bpb_std pytorch_version technique_summary compliance
        pre_quant_val_bpb pre_quant_val_loss wallclock_seconds step_stop eval_time_seconds
        artifact_bytes_max artifact_bytes_mean"""
    assert {*field.split()} <= rules["properties"].keys()


def replace(name: str, old: str, new: str, count: int = 0):
    """A change of a file by a pattern that has to be there."""
    def change(folder: Path) -> None:
        path = folder / name
        text, found = re.subn(old, new, path.read_text(), count=count, flags=re.M)
        assert found, f"{old} is not in {name}"
        path.write_text(text)

    return change


def metrics(seed: int, **values):
    return lambda folder: edit(folder / f"seed{seed}" / "metrics.json", **values)


def both(seed: int, name: str, value):
    """A setting of one seed changed in its metrics and its log alike."""
    def change(folder: Path) -> None:
        path = folder / f"seed{seed}" / "metrics.json"
        found = json.loads(path.read_text())
        found["settings"][name] = value
        path.write_text(json.dumps(found, indent=1))
        replace(f"seed{seed}/log.txt", r"^settings .*$", "settings " + json.dumps(found["settings"]))(folder)

    return change


def budget(**limits):
    def change(folder: Path) -> None:
        for seed in SEEDS:
            for name, value in limits.items():
                both(seed, name, value)(folder)

    return change


def two_seeds(folder: Path) -> None:
    shutil.rmtree(folder / "seed3")


def twice_the_same(folder: Path) -> None:
    shutil.rmtree(folder / "seed3")
    shutil.copytree(folder / "seed2", folder / "seed3")


def copied(folder: Path) -> None:
    """Seed 3 with the result of seed 2."""
    found = json.loads((folder / "seed2" / "metrics.json").read_text())
    edit(folder / "seed3" / "metrics.json", evals=found["evals"])


CHANGES = {  # what is done to the record, the rule that has to fail, words of its finding
    "number": (
        replace("submission.json", r'^( "val_bpb": )', r"\g<1>9"),
        "numbers",
        "val_bpb is 9",
    ),
    "seed's number": (
        replace("submission.json", r'("train_seconds": )', r"\g<1>9", 1),
        "numbers",
        "seed_results is",
    ),
    "metrics alone": (metrics(2, val_bpb=1.5), "numbers", "val_bpb is not that of its headline"),
    "bytes": (
        replace("submission.json", r'^( "bytes_total": )\d', r"\g<1>9"),
        "numbers",
        "bytes_total is 9",
    ),
    "log's result": (
        replace("seed2/log.txt", r"^(final_int6_sliding_exact .*)\d$", r"\g<1>"),
        "log",
        "final_int6_sliding_exact",
    ),
    "log's settings": (
        replace("seed2/log.txt", r'("MATRIX_LR": )0', r"\g<1>1"),
        "log",
        "its settings are not those",
    ),
    "log's source": (
        replace("seed2/log.txt", r"^import ", "import  ", 1),
        "log",
        "does not begin with the source",
    ),
    "log's artifact": (
        replace("seed2/log.txt", r"^(artifact:.* bytes:)", r"\g<1>1"),
        "log",
        "its artifact has",
    ),
    "no log": (lambda folder: (folder / "seed2" / "log.txt").unlink(), "files", "is missing"),
    "not a log": (
        lambda folder: (folder / "seed2" / "log.txt").write_text("Traceback"),
        "log",
        "not a finished run's",
    ),
    "README's table": (
        replace("README.md", r"\*\*(\d\.\d{3})\d\*\*", r"**\g<1>x**"),
        "readme",
        "a table is not what the files say",
    ),
    "README's section": (
        replace("README.md", r"^## Legality$", "## Rules"),
        "readme",
        "no section `## Legality`",
    ),
    "README's headline": (
        replace("README.md", r"^<!-- table: headline.*$", "<!-- nothing -->"),
        "readme",
        "has no table",
    ),
    "README's command": (
        replace("README.md", r"\bMUON_BACKEND_STEPS=\d|\bITERATIONS=6", "ITERATIONS=7"),
        "command",
        "the runs had 6",
    ),
    "README left": (
        replace("README.md", r"^## Credits$", "## Credits\n\nTODO"),
        "todo",
        "still to be written",
    ),
    "script": (replace("train_gpt.py", r"Var\(201,", "Var(202,"), "stale", "re-run"),
    "script's size": (replace("train_gpt.py", r"\Z", "\n"), "size", "bytes of code"),
    "script's syntax": (replace("train_gpt.py", r"\Z", "\nif:"), "files", "does not compile"),
    "model's bytes": (metrics(2, bytes_model=1), "size", "are not"),
    "requirements": (
        replace("requirements.txt", r"torch==.*", "torch"),
        "files",
        "pins no version",
    ),
    "two seeds": (two_seeds, "seeds", "2 of the 3"),
    "one seed twice": (twice_the_same, "seeds", "seed 2 is there 2 times"),
    "another setting": (both(2, "MATRIX_LR", 0.5), "seeds", "MATRIX_LR"),
    "another script": (metrics(2, script_sha256="0" * 64), "seeds", "script"),
    "artifact's budget": (
        budget(ARTIFACT_BUDGET_BYTES=1000),
        "size",
        "ARTIFACT_BUDGET_BYTES allows 1,000",
    ),
    "time": (budget(MAX_WALLCLOCK_SECONDS=0.001), "time", "MAX_WALLCLOCK_SECONDS allows 0.001"),
    "time of scoring": (budget(EVAL_BUDGET_SECONDS=0.001), "time", "EVAL_BUDGET_SECONDS allows"),
    "broken budget": (
        metrics(2, broken_budgets=["EVAL_BUDGET_SECONDS=1 is broken: 2"]),
        "time",
        "is broken",
    ),
    "name": (
        replace("submission.json", r'"name": "Probe"', '"name": "Other"'),
        "schema",
        "the folder is",
    ),
    "draft": (lambda folder: edit(folder / "submission.json", draft=True), "schema", "draft"),
    "no JSON": (lambda folder: (folder / "submission.json").write_text("{"), "schema", "not JSON"),
    "log's ending": (
        replace("seed2/log.txt", r"^(train_seconds: )", r"\g<1>9"),
        "log",
        "train_seconds is 9",
    ),
    "a clock of metrics": (metrics(2, eval_seconds=0.5), "log", "metrics.json has 0.5"),
    "seed of the settings": (both(2, "SEED", 7), "seeds", "its settings have SEED=7"),
    "a seed copied": (copied, "seeds", "has the val_loss of seed 2"),
    "command with --set": (
        replace("README.md", r"\bITERATIONS=6", "--set='ITERATIONS=7'"),
        "command",
        "the runs had 6",
    ),
    "untold setting": (
        replace("README.md", r"\bNGRAM_BUCKETS=\d+", ""),
        "command",
        "has no NGRAM_BUCKETS, the runs had 512",
    ),
    "unknown setting": (
        replace("README.md", r"\bITERATIONS=6", r"\g<0> ITERATION=6"),
        "command",
        "the script has no such variable",
    ),
    "a folder of no seed": (
        lambda folder: (folder / "seed_4").mkdir(),
        "files",
        "seed<N> is needed",
    ),
    "the contest's bytes": (metrics(2, bytes_total=16_000_001), "size", "no record may have more"),
    "metrics of a list": (
        lambda folder: (folder / "seed2" / "metrics.json").write_text("[]"),
        "seeds",
        "not a run's metrics.json",
    ),
    "seed null": (
        replace("seed2/metrics.json", r'^ "seed": 2', ' "seed": null'),
        "seeds",
        "seed is None",
    ),
    "README's bytes": (
        lambda folder: (folder / "README.md").write_bytes(b"\xff"),
        "readme",
        "cannot be judged",
    ),
    "a budget of letters": (budget(ARTIFACT_BUDGET_BYTES="x"), "size", "cannot be judged"),
    "no metrics": (
        lambda folder: edit(folder / "seed1" / "metrics.json", settings=None),
        "seeds",
        "no settings",
    ),
}


@pytest.mark.parametrize("change, rule, words", CHANGES.values(), ids=CHANGES)
def test_check_catches(copy, change, rule, words):
    change(copy)
    found = [each for each in failures(copy) if each.rule == f"submit/{rule}"]
    assert any(words in each.text for each in found), [str(each) for each in failures(copy)]


def test_check_judges_a_submission_that_is_nonsense(copy, monkeypatch):
    monkeypatch.undo()  # lineage.py too
    for change in ({"changes": []}, {"parent": 3}, {"changes": {"a": 1}}):
        before = (copy / "submission.json").read_bytes()
        edit(copy / "submission.json", **change)
        assert {"submit/schema"} <= {each.rule for each in failures(copy)}
        with pytest.raises(Misuse, match="submission.json: (changes|parent)"):
            submit.fill(submit.Record(copy))
        (copy / "submission.json").write_bytes(before)


def test_what_passes_says_what_was_looked_at(copy):
    def passed() -> dict[str, str]:
        return {each.rule: each.text for each in submit.check(copy, skip=submit.SLOW) if each.level == "PASS"}

    assert passed()["submit/size"].endswith("within the budget") and "a log" in passed()["submit/files"]
    budget(ARTIFACT_BUDGET_BYTES=0)(copy)
    assert "switched the budget off" in passed()["submit/size"]
    for seed in SEEDS:
        shutil.rmtree(copy / f"seed{seed}")
    assert "a log" not in passed()["submit/files"]


def test_a_stale_record_that_is_frozen_is_a_warning(copy):
    replace("train_gpt.py", r"Var\(201,", "Var(202,")(copy)
    edit(copy / "submission.json", frozen=True)
    found = {each.rule: each for each in submit.check(copy, skip=submit.SLOW)}
    assert found["submit/stale"].level == "WARN" and "re-run" in found["submit/stale"].text


def test_a_pull_request_has_one_record_and_nothing_else(copy):
    assert failures(copy, "main") == []
    root = copy.parent.parent
    shutil.copytree(copy, root / "records" / "2026-01-03_Second")
    (copy / "notes.txt").write_text("not committed")
    git(root, "add", "records/2026-01-03_Second")
    git(root, "commit", "-m", "a second record")
    found = [str(each) for each in failures(copy, "main")]
    assert any("2026-01-03_Second/README.md: is no part of this record" in text for text in found)
    assert any("notes.txt: is not committed" in text for text in found)
    with pytest.raises(Misuse, match="nowhere"):
        submit.check(copy, "nowhere", submit.SLOW)


def test_a_pull_request_may_bring_the_leaderboard_and_no_other_word(copy):
    root = copy.parent.parent
    assert leaderboard.main([], root) == 0
    git(root, "add", ".")
    git(root, "commit", "-m", "leaderboard")
    assert failures(copy, "main") == []
    readme = root / "README.md"
    written = readme.read_text()
    readme.write_text(re.sub(r"\*\*\d\.", "**0.", written))
    git(root, "commit", "-am", "a number by hand")
    assert ["README.md: does not agree" in str(each) for each in failures(copy, "main")] == [True]
    readme.write_text(written + "a word\n")
    (root / "records" / "leaderboard" / "notes.txt").write_text("")
    git(root, "add", ".")
    git(root, "commit", "-m", "more")
    found = [str(each) for each in failures(copy, "main")]
    assert [
        "README.md: is no part" in text or "notes.txt: is no part" in text for text in found
    ] == [True, True]


def test_a_pull_request_moves_nothing_hides_nothing_and_starts_with_lineage_on(copy):
    root = copy.parent.parent
    git(root, "mv", "requirements.txt", f"records/{NAME}/moved.txt")
    (copy / "kept.tmp").write_text("")
    (root / ".git" / "info" / "exclude").write_text("*.tmp\n")
    edit(copy / "submission.json", frozen=True)
    git(root, "commit", "-am", "more")
    found = [str(each) for each in failures(copy, "main") if each.rule == "submit/scope"]
    for words in (
        " requirements.txt: is no part",
        "kept.tmp: is not committed",
        "frozen: a new record is not",
    ):
        assert any(words in text for text in found), found
    git(root, "stash", "--include-untracked")
    git(root, "checkout", "main")
    git(root, "checkout", "idea", "--", "records")
    git(root, "reset")
    assert any("is HEAD the pull request's branch?" in each.text for each in failures(copy, "main"))


def test_the_smoke_test_takes_what_the_submission_says_of_tiny_runs(copy):
    plain = submit.smoke_settings(submit.Record(copy))
    path = copy / "submission.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"audit": {"NUM_LAYERS": 7}}))
    assert submit.smoke_settings(submit.Record(copy)) == plain | {"NUM_LAYERS": "7"} != plain


def test_a_record_that_plans_to_score_for_too_long_does_not_pass(copy):
    replace("train_gpt.py", r"(eval_budget_seconds = Var\()600\.0", r"\g<1>20.0", 1)(copy)
    (where, text), = submit.limits(submit.Record(copy))
    assert where == "train_gpt.py"
    assert re.search(r"planned on 8xH100: EVAL_BUDGET_SECONDS=20 is broken, \d\d s", text)


def test_a_script_that_needs_the_repository_does_not_pass_the_smoke_test(copy):
    (copy / "helper.py").write_text("")  # beside it, and not counted
    replace("train_gpt.py", r"^import torch$", "import helper\nimport torch", 1)(copy)
    (where, text), = submit.smoke(submit.Record(copy))
    assert where == "train_gpt.py" and "exit code 1 in a folder of its own" in text
    assert "helper" in text


# --- Export ---


def test_export_lays_a_record_out_for_the_competition(copy, tmp_path, capsys):
    upstream = tmp_path / "upstream"
    (upstream / "records").mkdir(parents=True)
    (copy / "plots").mkdir()
    (copy / "plots" / "a.png").write_bytes(b"plot")
    links = "![a](plots/a.png) [b](../../train_gpt.py) [c](https://x.y)"
    replace("README.md", r"^## Credits$", f"## Credits\n\n{links}")(copy)
    call = ["export", str(copy), "--upstream", str(upstream)]
    assert submit.main(call) == 0
    folder = upstream / "records" / "track_non_record_16mb" / NAME
    logs = [f"train_seed{seed}.log" for seed in SEEDS]
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == sorted(
        ["README.md", "plots/a.png", "requirements.txt", "submission.json", "train_gpt.py", *logs])
    assert (folder / "train_gpt.py").read_bytes() == (copy / "train_gpt.py").read_bytes()
    assert (folder / logs[1]).read_bytes() == (copy / "seed2" / "log.txt").read_bytes()
    about = json.loads((folder / "submission.json").read_text())
    assert about["track"] == "non_record_16mb" and about["technique_summary"] == "to have a change"
    assert "changes" not in about
    with pytest.raises(Misuse, match="exists already; --force"):
        submit.main(call)
    (folder / "old.txt").write_text("")
    assert submit.main([*call, "--force"]) == 0 and not (folder / "old.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == [NAME]
    shutil.rmtree(folder)
    replace("README.md", r"^## Legality$", "## Rules")(copy)
    assert submit.main(call) == 1 and not folder.exists()
    assert "no section `## Legality`" in capsys.readouterr().out


def test_the_contests_track_is_for_its_hardware_with_its_limits_on():
    run = {"world_size": 8, "device": "NVIDIA H100 80GB HBM3", "settings": dict(submit.CONTEST)}
    assert submit.track([run, run]) == "10min_16mb"
    others = [{**run, "world_size": 1}, {**run, "device": "NVIDIA A100"}]
    for name in submit.CONTEST:
        others += [{**run, "settings": {**submit.CONTEST, name: value}} for value in (0, 10**9)]
    assert {submit.track([run, other]) for other in others} == {"non_record_16mb"}


# --- Misuse ---

MISUSES = [
    (["new", "a/b", "--parent", "."], "NAME 'a/b'"),
    (["new", "A", "--parent", ".", "--date", "2026-02-30"], "--date 2026-02-30"),
    (["new", "A", "--parent", "nothing"], "nothing: no script"),
    (["new", "Probe", "--parent", ".", "--date", "2026-01-02"], "exists already"),
    (["new", "A", "--parent", "Baseline"], "neither the trunk nor a record"),
    (["check", "."], "not a record"),
    (["check", "{record}", "--skip", "schema"],
     "--skip schema: parts that can be left out are plan, smoke, audit"),
    (["fill", "nothing"], "nothing: no script"),
    (["fill", "{empty}"], "seed*/metrics.json: no such file"),
    (["fill", "{mixed}"], "no seeds of one configuration"),
    (["export", "{record}", "--upstream", "{record}"], "a checkout of openai/parameter-golf"),
]


@pytest.mark.parametrize("arguments, words", MISUSES, ids=[" ".join(each[0]) for each in MISUSES])
def test_misuse_says_what_is_accepted_and_writes_nothing(copy, arguments, words):
    root = copy.parent.parent
    names = "2026-01-02_Empty", "2026-01-02_Mixed"
    empty, mixed = (Path(shutil.copytree(copy, copy.with_name(name))) for name in names)
    for seed in SEEDS:
        shutil.rmtree(empty / f"seed{seed}")
    metrics(2, script_sha256="0" * 64)(mixed)
    before = {path: path.read_bytes() for path in root.glob("records/**/*") if path.is_file()}
    with pytest.raises(Misuse) as error:
        submit.main([part.format(record=copy, empty=empty, mixed=mixed) for part in arguments], root)
    assert words in str(error.value)
    assert {path: path.read_bytes() for path in root.glob("records/**/*") if path.is_file()} == before


def test_the_command_ends_with_0_1_or_2_and_prints_json(copy):
    def end(*arguments) -> tuple[int, str]:
        call = [sys.executable, str(ROOT / "scripts" / "submit.py"), *map(str, arguments)]
        done = subprocess.run(call, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    code, text = end("fill", copy, "--json")
    assert code == 0 and json.loads(text) == {"written": [], "unnamed": []}
    code, text = end("check", copy, "--skip", "audit,plan,smoke", "--json")
    assert code == 0 and {"submit/log", "lineage/symbols"} <= {found["rule"] for found in json.loads(text)}
    two_seeds(copy)
    assert end("check", copy, "--skip", "audit,plan,smoke")[0] == 1
    code, text = end("check", "nothing")
    assert code == 2 and text.startswith("error: nothing: ")
