"""scripts/rate.py on a run of the real script."""

import json
import subprocess
import sys

import family
import pytest
from conftest import ROOT, environment, slow


def tool(name: str, *arguments) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, ROOT / "scripts" / name, *map(str, arguments)], env=environment(),
                          capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_fit_finds_the_largest_model_under_a_budget(trunk):
    code, out, err = tool(
        "rate.py",
        "fit",
        "--layers",
        "2-3",
        "--width",
        "64,128,100",
        "--mlp",
        "1,2",
        "--json",
        "--budget",
        400_000,
        "--set",
        "NGRAM_ORDERS=2,3,4,5,6",
        "--set",
        "NGRAM_BUCKETS=1024",
        "--set",
        "JEPA_CHUNK_SIZE=0",
    )
    assert code == 0, err
    rows = json.loads(out)["numbers"]
    assert [row["parameters"] for row in rows] == sorted((row["parameters"] for row in rows), reverse=True)
    assert all(row["bytes"] <= 400_000 and row["width"] != 100 for row in rows)  # 8 heads do not divide 100
    import torch
    args = trunk.Hyperparameters(
        {
            "NUM_LAYERS": str(rows[0]["layers"]),
            "MODEL_DIM": str(rows[0]["width"]),
            "MLP_MULT": str(rows[0]["mlp"]),
            "NGRAM_ORDERS": "2,3,4,5,6",
            "NGRAM_BUCKETS": "1024",
            "JEPA_CHUNK_SIZE": "0",
        }
    )
    with torch.device("meta"):
        model = trunk.GPT(args)
    assert rows[0]["parameters"] == sum(p.numel() for p in model.parameters())
    assert (
        tool("rate.py", "fit", "--layers", "9", "--width", "512", "--mlp", "2", "--budget", 100_000)[0] == 1
    )


@pytest.mark.parametrize("arguments, words", [
    (["fit", "--set", "BITS=mlp:9", "--layers", "2", "--width", "64", "--mlp", "1"], "BITS: 'mlp:9'"),
    (["fit", "--layers", "two"], "'two': a range"), (["fit", "--set", "NUM_HEADS"], "--set needs NAME=VALUE"),
    (["plan", "no-such/artifact.bin"], "metrics.json"),
])
def test_fit_refuses_nonsense(arguments, words):
    code, _, err = tool("rate.py", *arguments)
    assert code == 2 and words in err and "Traceback" not in err


@slow
def test_plan_coders_and_curve_of_a_run(run, tmp_path, corpus):
    code, output, metrics = run(
        COMPRESSOR="rans",
        QUANT_ROUND="nearest",
        JEPA_CHUNK_SIZE=0,
        MODEL_DIM=64,
        NGRAM_ORDERS="2,3",
        NGRAM_BUCKETS=256,
    )
    assert code == 0, output
    folder = tmp_path / "runs" / "test"
    code, out, err = tool("rate.py", "plan", "--json", folder / "artifact.bin")
    row, = json.loads(out)["numbers"]
    assert row["bytes"] == metrics["bytes_model"] and code == (abs(row["error"]) > 0.02), err
    assert (
        tool(
            "rate.py",
            "fit",
            "--like",
            folder / "artifact.bin",
            "--layers",
            "3",
            "--width",
            "64",
            "--mlp",
            "2",
            "--set",
            "NUM_HEADS=4",
            "--set",
            "NUM_KV_HEADS=2",
        )[0]
        == 0
    )

    code, out, err = tool("rate.py", "coders", folder, "--out", tmp_path / "coders.json")
    assert code == 0, err
    row, = json.loads((tmp_path / "coders.json").read_text())["numbers"]
    assert row["rans"]["bytes"] == metrics["bytes_model"] and row["entropy"] + row["small"] < row["raw"]

    code, out, err = tool("rate.py", "curve", folder, "--data", corpus, "--val-bytes", 1500, "--batches", 1,
                          "--out", tmp_path / "curve.json", "--plot", tmp_path / "curve.png")
    assert code == 0 and (tmp_path / "curve.png").stat().st_size > 5000, err
    found = json.loads((tmp_path / "curve.json").read_text())
    points = found["numbers"]
    assert len(found["rows"]) == len(points) and found["script_sha256"] == metrics["script_sha256"]
    assert {"std, GPTQ", "std, nearest"} <= {point["quantiser"] for point in points}
    for label in {point["quantiser"] for point in points if point["quantiser"].startswith("std")}:
        mine = sorted((p["k"], p["bits_a_weight"]) for p in points if p["quantiser"] == label)
        assert all(a[1] > b[1] for a, b in zip(mine, mine[1:]))  # a wider step takes fewer bits


@pytest.mark.parametrize(
    "problem, words",
    [
        (family.Misuse("--seeds x: numbers are needed"), "--seeds x: numbers are needed"),
        (
            ModuleNotFoundError("No module named 'x'", name="x"),
            "x is not installed: pip install -r requirements-dev.txt",
        ),
        (
            FileNotFoundError(2, "No such file or directory", "gone.json"),
            "gone.json: No such file or directory",
        ),
    ],
    ids=["misuse", "module", "file"],
)
def test_what_the_caller_can_mend_is_one_line(capsys, problem, words):
    def main():
        raise problem
    with pytest.raises(SystemExit) as ended:
        family.command(main)
    assert ended.value.code == family.MISUSE and capsys.readouterr().err == f"error: {words}\n"
