"""Everything that a day with a GPU needs, in one command of under ten minutes:

    make gpu-check                              or: python scripts/gpu_check.py [--text FILE.jsonl.zst ...] [--out FOLDER]

1. byte260 shards from the text (default: the standard library); 2. step time of the default configuration, 13 x 512 at
393,216 bytes a step, compiled and eager, with its share of an 8192^3 matmul in the same process; 3. 300 steps of it with
every score line, and the artifact scored again by a fresh process. Writes `gpu_check.json` and the run's own files.

`--rehearse` does the same with a toy model on any device, to see that the command works before the day comes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from family import ROOT, TRUNK

TOY = {
    "NUM_LAYERS": 2, "MODEL_DIM": 64, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "TRAIN_SEQ_LEN": 128,
    "ITERATIONS": 10, "TRAIN_BATCH_TOKENS": 1024, "WARMDOWN_ITERS": 4, "JEPA_LATENT_DIM": 32,
    "EVAL_STRIDE": 64, "VAL_BYTES": 20000, "NGRAM_BUCKETS": 1024, "TRAIN_LOG_EVERY": 5,
}
FULL = {
    "ITERATIONS": 300, "WARMDOWN_ITERS": 100, "MUON_MOMENTUM_WARMUP_STEPS": 100, "EMA_DECAY": 0.98,
    "TRAIN_LOG_EVERY": 25, "VAL_BYTES": 4_000_000,
}


def call(command: list[str], overrides: dict, clock: dict, name: str, quiet: bool = False) -> str:
    """Runs a command with settings in front; its output, shown as it comes."""
    print(f"--- {name}", flush=True)
    start = time.perf_counter()
    env = {**os.environ, **{key: str(value) for key, value in overrides.items()}, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if not quiet:
            print(line, end="", flush=True)
    clock[name] = time.perf_counter() - start
    if process.wait() not in (0, 3):
        print("".join(lines[-20:]) if quiet else "", file=sys.stderr)
        raise SystemExit(f"error: {name} ended with exit code {process.returncode}")
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", nargs="*", default=[], help=".txt, .jsonl or .jsonl.zst; default: standard library"
    )
    parser.add_argument("--out", default="runs/gpu_check", help="where results go")
    parser.add_argument("--rehearse", action="store_true", help="a toy model on any device")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available() and not options.rehearse:
        print(
            "error: torch sees no CUDA or ROCm device; --rehearse tries the command without one",
            file=sys.stderr,
        )
        return 2
    out, clock = ROOT / options.out, {}
    data = out / "data"
    source = ["files", *map(os.path.abspath, options.text)] if options.text else ["stdlib"]
    if not (data / "manifest.json").exists():
        call([sys.executable, "data/prepare.py", *source, "--out", str(data)], {}, clock, "data")
    settings = {"MAX_WALLCLOCK_SECONDS": 0, "EVAL_BUDGET_SECONDS": 0, **(TOY if options.rehearse else {})}
    report = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }
    bench = [sys.executable, "scripts/bench.py", "--one", "--raw", "--script", str(TRUNK), "--steps"]
    for name, compiled, steps in (("compiled", 1, 20), ("eager", 0, 8)):
        text = call(
            [*bench, str(steps)], {**settings, "COMPILE": compiled}, clock, f"bench {name}", quiet=True
        )
        report[name] = json.loads(text.splitlines()[-1])
        print(
            f"{name}: {report[name]['step_ms']:.1f} ms a step, {report[name]['tokens_per_second'] / 1e6:.3f} MB/s, "
            f"{report[name]['ratio']:.3f} of the matmul's {report[name]['matmul_flop_per_second'] / 1e12:.1f} TFLOP/s"
        )
    run = {**({} if options.rehearse else FULL), **settings}
    run |= {"DATA_PATH": data, "RUNS_PATH": out, "RUN_ID": "run"}
    call([sys.executable, str(TRUNK)], run, clock, "train")
    again = {
        "DATA_PATH": data, "RUNS_PATH": out, "RUN_ID": "again", "EVAL_ONLY": 1,
        "ARTIFACT": out / "run/artifact.bin", "VAL_BYTES": run["VAL_BYTES"], "EVAL_BUDGET_SECONDS": 0,
    }
    call([sys.executable, str(TRUNK)], again, clock, "score again", quiet=True)
    first, second = (json.loads(Path(out / name / "metrics.json").read_text()) for name in ("run", "again"))
    report |= {"seconds": clock, "train": first, "val_bpb_again": second["val_bpb"]}
    (out / "gpu_check.json").write_text(json.dumps(report, indent=1))
    print(
        f"val_bpb {first['val_bpb']:.4f}, scored again {second['val_bpb']:.4f}; {sum(clock.values()):.0f} s in all; "
        f"{out / 'gpu_check.json'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
