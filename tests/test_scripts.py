"""The tools around the scripts."""

import json
import subprocess
import sys

import bench
import pytest
import tables
from conftest import ROOT, environment


def test_bench_measures_one_configuration(tmp_path):
    kept = tmp_path / "one.json"
    words = "--one", "--raw", "--steps", "5", "--compile", "0", "--json", str(kept)
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), *words]
    # with a clock a run times its calibration, for which there is no text here
    env = environment(MLP_MULT=2, MAX_WALLCLOCK_SECONDS=600, COMPILE=1)
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(kept.read_text()) == result
    assert result["step_ms"] > 0 and result["compile"] is False and result["parameters"] > 10_000
    blocks = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 32 * 64)
    hashes = 5 * 8 * 32
    flop = 6 * (blocks + hashes + 260 * 32) + 6 * 3 * 64 * 32
    assert result["flop_per_step"] == flop * 512
    assert result["ratio"] == pytest.approx(
        result["flop_per_second"] / result["matmul_flop_per_second"], rel=1e-6
    )


def test_the_bench_setting_is_for_scripts_with_the_trunks_defaults():
    """Another record's tables and MLPs are its design."""
    for name, given in (".", True), ("BytePPM", True), ("BiJEPAX", False), ("SGJM", False):
        assert ("NGRAM_ORDERS" in bench.settings_of(name, {})) is given, name


def test_verdicts_follow_the_rule_for_claims():
    assert tables.verdict([-0.02, -0.021, -0.019])[2] == "better"
    assert tables.verdict([0.02, 0.021, 0.019])[2] == "worse"
    assert tables.verdict([0.0002, -0.0003, 0.0001])[2] == "no effect"
    assert tables.verdict([0.02, -0.021, 0.001])[2] == "undecided"
    assert tables.verdict([-0.05])[2] == "undecided"  # one seed shows nothing
    mean, half, _ = tables.verdict([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.303 * 1.527525 / 3**0.5, rel=1e-4)


def test_tables_are_those_of_the_files():
    """Every README with markers agrees with the metrics.json files it names."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "tables.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_baseline_is_the_trunk_byte_for_byte():
    for record in (ROOT / "records").glob("*_Baseline"):
        submission = json.loads((record / "submission.json").read_text())
        if not submission.get("frozen"):
            assert (record / "train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()


def test_gpu_check_says_what_is_missing():
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "--check"]
    env = environment(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: torch sees no CUDA")
