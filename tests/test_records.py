"""Every record's numbers are those of its runs, and the runs are those of its script or marked as stale."""

import json
import re
import statistics
import subprocess

import pytest
import stats
import submit
from family import ROOT, records
from tables import is_draft

RECORDS = [folder for folder in records() if not is_draft(folder)]


def test_there_is_a_record():
    assert RECORDS


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name)
def test_a_records_command_has_the_settings_of_its_runs(record):
    """Also those that a default has left since."""
    assert [*submit.told_command(submit.Record(record))] == []


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name)
def test_a_submission_repeats_the_metrics_of_its_seeds(record):
    submission = json.loads((record / "submission.json").read_text())
    results = submission["seed_results"]
    runs = {path.parent.name: stats.as_carried(record, json.loads(path.read_text()))
            for path in record.glob("seed*/metrics.json")}
    assert len(runs) >= 3 and set(runs) == {f"seed{seed}" for seed in submission["seeds"]}
    assert list(results) == list(map(str, submission["seeds"]))
    stale = stats.stale_mark(record, runs.values())
    if submission.get("frozen"):
        assert not stale, "a frozen record keeps the script that it was measured with"
    assert stale in (record / "README.md").read_text(), "python scripts/tables.py has not marked it"
    script = (record / "train_gpt.py").read_bytes()
    for seed, result in results.items():
        run = runs[f"seed{seed}"]
        assert run["seed"] == int(seed) and not run["broken_budgets"]
        assert run["bytes_code"] == submission["bytes_code"] and (stale or run["bytes_code"] == len(script))
        assert run["bytes_total"] == run["bytes_code"] + run["bytes_model"]
        assert run["val_bpb"] == run["evals"][run["headline"]]["val_bpb"]
        found = {**run, "val_loss": run["evals"][run["headline"]]["val_loss"]}
        assert {"val_loss", "val_bpb", "bytes_total"} <= result.keys()
        assert result == {key: found[key] for key in result}, seed
    for key in ("val_loss", "val_bpb"):
        mean = statistics.mean(result[key] for result in results.values())
        assert submission[key] == pytest.approx(mean, abs=1e-12)
    assert submission["bytes_total"] == max(result["bytes_total"] for result in results.values())


def test_a_commit_that_a_text_names_is_in_the_repository():
    def git(*words):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)

    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("no repository here, or one without its history")
    texts = [ROOT / "README.md", *ROOT.glob("records/*/README.md"), *ROOT.glob("docs/*.md")]
    pattern = r"commit `([0-9a-f]{7,40})`"
    named = [(path, name) for path in texts for name in re.findall(pattern, path.read_text())]
    missing = [f"{path.relative_to(ROOT)}: {name}" for path, name in named
               if git("cat-file", "-e", f"{name}^{{commit}}").returncode]
    assert not missing, "a reader cannot find these commits"
