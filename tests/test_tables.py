"""scripts/tables.py on records of its own: what it says of stale runs and of files that are not there."""

import hashlib
import json

import bench
import pytest
import stats
import tables
from conftest import ROOT
from family import Finding, Misuse, load_script, report

NAMES = ["final_raw", "final_ema", "final_int6_roundtrip", "final_int6_sliding"]
KINDS = ["headline", "seeds", "passes"]


@pytest.fixture
def record(tmp_path):
    """record(script="...") -> folder of a record with three seeds, measured with the script of these words.
    """

    def record(measured: str = "print()\n", script: str = "print()\n"):
        folder = tmp_path / "records" / "2026-01-02_A"
        for seed in (1, 2, 3):
            entry = {
                "val_loss": 1.3,
                "val_bpb": 1.9 + seed / 1000,
                "targets": 10,
                "bytes": 10,
                "seconds": 1.0,
            }
            run = {
                "val_bpb": entry["val_bpb"],
                "headline": NAMES[-1],
                "evals": dict.fromkeys(NAMES, entry),
                "seed": seed,
                "script_sha256": hashlib.sha256(measured.encode()).hexdigest(),
                "params": 5,
                "steps": 6,
                "bytes_total": 30,
                "bytes_code": 10,
                "bytes_model": 20,
                "ms_per_step": 7.0,
                "eval_seconds": 8.0,
                "device": "cpu",
                "torch": "2",
                "dataset": {"name": "d"},
            }
            path = folder / f"seed{seed}" / "metrics.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(run))
        (folder / "train_gpt.py").write_text(script)
        return folder

    return record


def test_a_table_without_an_end_is_refused(record, tmp_path):
    record()
    path = readme(tmp_path, "passes", "seeds")
    whole = path.read_text()
    for text in whole.replace("<!-- end -->", "A chapter.", 1), whole[:whole.rindex("<!-- end -->")]:
        path.write_text(text)
        with pytest.raises(Misuse, match="<!-- end -->"):
            tables.rewrite(path, tmp_path)
        assert path.read_text() == text


def readme(tmp_path, *kinds: str):
    path = tmp_path / "README.md"
    path.write_text("".join(f"<!-- table: {kind} records/2026-01-02_A -->\n<!-- end -->\n" for kind in kinds))
    return path


def test_tables_of_runs_of_another_script_say_stale(record, tmp_path):
    path = readme(tmp_path, *KINDS)
    folder = record()
    assert "stale" not in tables.rewrite(path, tmp_path) and "**1.9020 BPB**" in tables.rewrite(
        path, tmp_path
    )
    folder = record(script="print(1)\n")
    old, new = (hashlib.sha256(text.encode()).hexdigest()[:8] for text in ("print()\n", "print(1)\n"))
    mark = f"\n\n*stale: measured with script `{old}`, this one is `{new}`*\n<!-- end -->"
    assert tables.rewrite(path, tmp_path).count(mark) == len(KINDS)
    run = folder / "seed2" / "metrics.json"
    run.write_text(run.read_text().replace(old, "00000000"))  # one seed with a third script
    assert f"measured with scripts `00000000`, `{old}`, this one" in tables.rewrite(path, tmp_path)


def test_a_rewritten_readme_is_a_fixed_point(record, tmp_path):
    record(script="print(1)\n")
    path = readme(tmp_path, *KINDS)
    path.write_text(tables.rewrite(path, tmp_path))
    assert tables.rewrite(path, tmp_path) == path.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_without_its_files_is_refused(tmp_path, kind):
    with pytest.raises(Misuse, match="2026-01-02_A/seed\\*/metrics.json: no such file"):
        tables.rewrite(readme(tmp_path, kind), tmp_path)


def test_missing_files_numbers_and_kinds_are_named(record, tmp_path):
    folder = record()
    for kind, name in (
        ("rows", "rows.json"), ("bench", "bench.json"), ("audit", "audit.json"),
        ("ablation", "ablations/arms.json"),
    ):
        with pytest.raises(Misuse, match=f"{folder / name}: No such file"):
            tables.rewrite(readme(tmp_path, kind), tmp_path)
    with pytest.raises(Misuse, match=r"/prove_\*.json: no such file"):
        tables.rewrite(readme(tmp_path, "proofs"), tmp_path)
    with pytest.raises(Misuse, match="table kind nonsense is not one of headline, "):
        tables.rewrite(readme(tmp_path, "nonsense"), tmp_path)
    (folder / "audit.json").write_text('{"level": "PASS"}')
    with pytest.raises(
        Misuse, match="table audit of records/2026-01-02_A: its files are not what it is made of"
    ):
        tables.rewrite(readme(tmp_path, "audit"), tmp_path)
    run = folder / "seed1" / "metrics.json"
    run.write_text(run.read_text().replace("ms_per_step", "renamed"))
    with pytest.raises(Misuse, match="table seeds of records/2026-01-02_A: its files have no 'ms_per_step'"):
        tables.rewrite(readme(tmp_path, "seeds"), tmp_path)
    (folder / "ablations" / "base").mkdir(parents=True)
    (folder / "ablations" / "base" / "seed1.json").write_text("{}")
    (folder / "ablations" / "arms.json").write_text('{"base": "", "gone": ""}')
    with pytest.raises(Misuse, match="arms.json names base, gone, the folders are base"):
        tables.rewrite(readme(tmp_path, "ablation"), tmp_path)


def test_a_bench_of_twins_is_a_row_a_script_with_its_framework_and_the_load(
    record, tmp_path, monkeypatch, capsys
):
    same = {
        "parameters": 970_000,
        "tokens_per_second": 5000.0,
        "ratio": 0.5,
        "memory_mb": 200.4,
        "device": "cpu (x86_64)",
        "compile": False,
    }
    found = {
        "train_gpt.py": {
            **same,
            "step_ms": 400.0,
            "flop_per_second": 2.3e10,
            "matmul_flop_per_second": 4.6e10,
            "torch": "2.13.0",
        },
        "train_gpt_mlx.py": {
            **same,
            "step_ms": 4200.0,
            "flop_per_second": 2.26e9,
            "matmul_flop_per_second": 4.4e9,
            "mlx": "0.32.4",
        },
    }
    path = record() / "twin.json"
    monkeypatch.setattr(bench, "measure_apart", lambda options, name, overrides: found[name])
    monkeypatch.setattr(bench.os, "getloadavg", lambda: (3.96, 0, 0))
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(bench.sys, "argv", ["bench.py", "--twin", "--json", str(path)])
    assert bench.main() == 0
    (tmp_path / "README.md").write_text(
        f"<!-- table: bench {path.parent.relative_to(tmp_path)} twin.json -->\n<!-- end -->\n"
    )
    text, shown = tables.rewrite(tmp_path / "README.md", tmp_path), capsys.readouterr().out
    assert shown.strip() in text
    assert "| `train_gpt.py` (torch 2.13.0) | 0.97 M | 400 | 5.0 k | 23 | 46 | 0.500 | 200 |" in text
    assert "| `train_gpt_mlx.py` (mlx 0.32.4) | 0.97 M | 4200 | 5.0 k | 2.3 | 4.4 | 0.500 | 200 |" in text
    assert (
        "4 layers x 128, 2,048 bytes a step in rows of 512, fp32, compiled: no, cpu (x86_64), "
        "OMP_NUM_THREADS=1"
        in text
    )
    assert (
        "load before the run 4.0 on 2 cores. The twin's step takes 10.5 times as long; its framework "
        "multiplies 10.5 times slower"
        in text
    )
    path.write_text(path.read_text().replace('"ratio"', '"renamed"'))
    with pytest.raises(Misuse, match="its files have no 'ratio'"):
        tables.rewrite(tmp_path / "README.md", tmp_path)


def test_tables_take_the_evaluations_that_the_runs_have(record, tmp_path):
    """An artifact of five bits, no average of weights, and a pass of its own."""
    for path in record().glob("seed*/metrics.json"):
        run = json.loads(path.read_text().replace("_int6_", "_int5_"))
        run["evals"]["final_int5_own"] = run["evals"].pop("final_ema")
        path.write_text(json.dumps(run))
    text = tables.rewrite(readme(tmp_path, "seeds", "passes"), tmp_path)
    assert "| seed | `final_raw` | `final_int5_roundtrip` | `final_int5_sliding` | model bytes |" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    rows = {row[0]: row for row in rows}
    assert rows["`final_int5_roundtrip`"][6] == "" and rows["`final_int5_own`"][4] == "1.9020"
    assert rows["`final_int5_sliding`"][6] == "`final_int5_roundtrip`"


def test_verdicts_are_those_of_the_statistics():
    assert tables.verdict is stats.verdict


def test_a_draft_shows_what_has_been_measured(tmp_path):
    folder = tmp_path / "records" / "2026-01-02_A"
    (folder / "measured").mkdir(parents=True)
    (folder / "submission.json").write_text('{"draft": true}')
    (folder / "measured" / "rows.json").write_text('{"header": ["a"], "rows": [["one"]]}')
    path = tmp_path / "README.md"
    path.write_text(
        "".join(
            f"<!-- table: {table} -->\n<!-- end -->\n"
            for table in (
                "seeds records/2026-01-02_A",
                "rows records/2026-01-02_A/measured",
                "proofs records/2026-01-02_A/measured",
            )
        )
    )
    assert [text.splitlines()[1] for text in tables.rewrite(path, tmp_path).split("<!-- table")[1:]] == [
        "Not measured yet.", "| a |", "Not measured yet."]


def test_what_the_auditor_printed_is_a_row_a_finding(tmp_path, capsys):
    folder = tmp_path / "records" / "2026-01-02_A"
    folder.mkdir(parents=True)
    report(
        [
            Finding("C1/P3", "PASS", "no target moves"),
            Finding("C2/P4", "FAIL", "|p| sums to 1.3", "target 5"),
            Finding("C1/P5", "PASS", "no target moves"),
        ],
        as_json=True,
    )
    (folder / "audit.json").write_text(capsys.readouterr().out)
    path = tmp_path / "README.md"
    path.write_text("<!-- table: audit records/2026-01-02_A -->\n<!-- end -->\n")
    assert tables.rewrite(path, tmp_path).splitlines()[1:-1] == [
        "2 PASS, 0 WARN, 1 FAIL.", "", "| what was found | rule | verdict |", "| --- | ---: | ---: |",
        "| no target moves | C1/P3, C1/P5 | PASS |", "| \\|p\\| sums to 1.3 | C2/P4 | FAIL |"]


SGJM, = (ROOT / "records").glob("*_SGJM")
BYTEPPM, = (ROOT / "records").glob("*_BytePPM")


@pytest.mark.parametrize("kind, report, rows", [
    ("generation", "bench.json", "bench_rows.json"),
    ("gate", "gate.json", "gate_rows.json"),
    ("history", "tinyshakespeare/metrics.jsonl", "tinyshakespeare/history.json"),
])
def test_rows_of_sgjm_are_those_of_its_reports(kind, report, rows):
    made = load_script(SGJM / "rows.py").KINDS[kind](SGJM / "measured" / report)
    assert made == json.loads((SGJM / "measured" / rows).read_text())


def test_a_report_of_another_kind_is_refused(tmp_path):
    module = load_script(SGJM / "rows.py")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.0}\n')
    for kind, path, words in (
        ("history", tmp_path / "metrics.jsonl", "no validation in it; set VAL_LOSS_EVERY"),
        ("gate", SGJM / "measured" / "bench.json", "has no 'published'; a report for `gate` is needed"),
    ):
        with pytest.raises(Misuse, match=words):
            module.main([kind, str(path)])


def test_rows_of_the_gain_are_those_of_the_runs(tmp_path):
    module, folder = load_script(BYTEPPM / "gain.py"), BYTEPPM / "measured"
    runs = sorted(map(str, folder.glob("steps*.json")))
    assert module.main([*runs, "--out", str(tmp_path / "gain.json")]) == 0
    assert (tmp_path / "gain.json").read_text() == (folder / "gain.json").read_text()
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"seed": 7}))
    with pytest.raises(Misuse, match=r"runs of one seed are needed, these are of \[7, 42\]"):
        module.main([runs[0], str(other)])
