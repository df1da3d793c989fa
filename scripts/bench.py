"""How fast a script trains: step time, bytes a second, model FLOP/s, and their ratio to a plain matmul.

    python scripts/bench.py                     three sizes, then sequence and batch doubled
    python scripts/bench.py --script RECORD --compile 0 --steps 20 --json out.json
    python scripts/bench.py --twin --compile 0 --json out.json   the trunk beside train_gpt_mlx.py
    NUM_LAYERS=6 MODEL_DIM=192 python scripts/bench.py --one      the configuration of the environment
    make gpu-check        or: python scripts/bench.py --check [--text FILE.jsonl.zst ...] [--out FOLDER]
    python scripts/bench.py --rehearse                            the same with a toy model on a CPU
    python scripts/bench.py --plan --card h100 NUM_HEADS=8    what a run will cost, see docs/plan.md

The matmul (2048^3, or 8192^3 on a GPU, 1024^3 with MLX on a CPU, in the dtype of the run) is timed in the
same process between the steps, since machines are noisy: quote the ratio. Model FLOP a byte = 6 * (matrices +
V * D) + 6 * L * T * D, the causal half of attention included; embeddings looked up are free. Every
configuration runs in a process of its own, so that its peak memory is its own.

`--check` and `--rehearse` are in gpu_check.py.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from family import (
    ROOT,
    TRUNK,
    Misuse,
    command,
    find_script,
    load_script,
    markdown_table,
    write_atomic,
)
from run_seeds import variables

# The warm-up tries scoring too: EVAL_BATCH_TOKENS left to
# DEVICE_BATCH_TOKENS would add 8 GB and a minute to it.
BASE = {
    "TRAIN_SEQ_LEN": 512, "TRAIN_BATCH_TOKENS": 8192, "DEVICE_BATCH_TOKENS": 1 << 20,
    "EVAL_BATCH_TOKENS": 8192, "EVAL_STRIDE": 64, "MAX_WALLCLOCK_SECONDS": 0, "NGRAM_BUCKETS": 32768,
    "NGRAM_DIM": 16, "JEPA_CHUNK_SIZE": 0,
}
# Of scripts with the trunk's defaults, which are the contest's; another record's own are its design.
OF_TRUNK = {"MLP_MULT": 2.0, "NGRAM_ORDERS": "2,3,4,5,6"}
SIZES = {
    "4 x 128": {"NUM_LAYERS": 4, "MODEL_DIM": 128, "NUM_HEADS": 4, "NUM_KV_HEADS": 2},
    "6 x 192 (bench)": {"NUM_LAYERS": 6, "MODEL_DIM": 192, "NUM_HEADS": 6, "NUM_KV_HEADS": 3},
    "6 x 384": {"NUM_LAYERS": 6, "MODEL_DIM": 384, "NUM_HEADS": 6, "NUM_KV_HEADS": 3},
}
BENCH = SIZES["6 x 192 (bench)"]
# MLX's CPU build multiplies some ten times slower than torch.
TWIN = {
    **SIZES["4 x 128"],
    "DTYPE": "fp32",
    "TRAIN_BATCH_TOKENS": 2048,
    "EVAL_BATCH_TOKENS": 2048,
    "NGRAM_BUCKETS": 4096,
}
LENGTHS = {"TRAIN_SEQ_LEN": (256, 512, 1024, 2048), "TRAIN_BATCH_TOKENS": (4096, 8192, 16384, 32768)}


class Torch:
    """What timing needs of a framework: arrays, a product, and the end of what was begun."""

    name = "torch"

    def __init__(self, module, runtime):
        self.torch, self.device, self.dtype = module.torch, runtime.device, runtime.dtype
        self.version, self.size = module.torch.__version__, 8192 if runtime.device.type == "cuda" else 2048
        self.on_cpu = runtime.device.type == "cpu"

    def ids(self, shape: tuple, vocab_size: int):
        return self.torch.randint(4, vocab_size, shape).to(self.device)

    def ones(self, shape: tuple):
        return self.torch.ones(shape, device=self.device)

    def square(self):
        return self.torch.randn(self.size, self.size, device=self.device).to(self.dtype)

    def wait(self, arrays=()) -> None:
        if not self.on_cpu:
            getattr(self.torch, self.device.type).synchronize()

    def matrices(self, trainer) -> int:
        return sum(p.numel() for stack in trainer.optimizers.muon.stacks for p in stack)

    def parameters(self, model) -> int:
        return sum(p.numel() for p in model.parameters())

    def compiled(self, module, trainer) -> bool:
        if hasattr(module, "piece"):
            return module.piece.compiled
        return trainer.losses is not module.training_losses  # a script from before


class Mlx(Torch):
    name = "mlx"

    def __init__(self, module, runtime):
        self.mx, self.dtype, self.version = module.mx, runtime.dtype, module.mx.__version__
        self.on_cpu = runtime.device == module.mx.cpu
        self.size = 1024 if self.on_cpu else 8192

    def ids(self, shape: tuple, vocab_size: int):
        return self.mx.random.randint(4, vocab_size, shape)

    def ones(self, shape: tuple):
        return self.mx.ones(shape)

    def square(self):
        return self.mx.random.normal((self.size, self.size)).astype(self.dtype)

    def wait(self, arrays=()) -> None:
        self.mx.eval(arrays)  # what nobody asks for is never computed
        self.mx.synchronize()

    def matrices(self, trainer) -> int:
        params = trainer.model.named_parameters()
        return sum(params[name].size for stack in trainer.optimizers.muon.stacks for name in stack)

    def parameters(self, model) -> int:
        return sum(p.size for p in model.named_parameters().values())

    def compiled(self, module, trainer) -> bool:
        return trainer.gradients is not module.training_gradients


def matmul_rate(kit: Torch, seconds: float = 0.5) -> float:
    """FLOP/s of a square product: the best of several runs in a short while."""
    a, best, until = kit.square(), 0.0, time.perf_counter() + seconds
    kit.wait([a])
    while time.perf_counter() < until:
        start = time.perf_counter()
        kit.wait([a @ a for _ in range(3)])
        best = max(best, 3 * 2 * kit.size**3 / (time.perf_counter() - start))
    return best


def flop_per_byte(trainer, matrices: int) -> float:
    args = trainer.args
    head = args.vocab_size * args.model_dim
    return 6 * (matrices + head) + 6 * args.num_layers * args.train_seq_len * args.model_dim


def measure(script: str, steps: int) -> dict:
    """Times `steps` training steps of the environment's configuration on made-up ids."""
    module = load_script(script)
    # without a clock: there is no text that a calibration could be timed with
    args = module.Hyperparameters({**os.environ, "MAX_WALLCLOCK_SECONDS": "0"})
    runtime = module.Runtime(args)
    takes = inspect.signature(module.pick_attention).parameters
    if "args" in takes:  # scripts from before picked inside of Runtime
        known = {"args": args, "runtime": runtime, "device": runtime.device, "dtype": runtime.dtype}
        runtime.attention = module.pick_attention(*(known[name] for name in takes))
    kit = (Torch if hasattr(module, "torch") else Mlx)(module, runtime)
    before = runtime.peak_memory_mb()
    trainer = module.Trainer(args, None, runtime, print)
    shape = (trainer.plan.micro_steps, trainer.plan.groups * trainer.plan.group, args.train_seq_len + 1)
    ids, weights = kit.ids(shape, args.vocab_size), kit.ones(shape[:2])
    compiling = time.perf_counter()
    trainer.warm_up()
    kit.wait()
    compiling = time.perf_counter() - compiling
    times, rates = [], [matmul_rate(kit)]
    for step in range(steps):
        start = time.perf_counter()
        trainer.train_step(ids, weights, 0.0)
        kit.wait()
        times.append(time.perf_counter() - start)
        if step % 5 == 4:
            rates.append(matmul_rate(kit, 0.2))
    seconds = statistics.median(times)
    flop = flop_per_byte(trainer, kit.matrices(trainer)) * args.train_batch_tokens
    rate = statistics.median(rates)
    return {
        "step_ms": 1e3 * seconds,
        "tokens_per_second": args.train_batch_tokens / seconds,
        "flop_per_step": flop,
        "flop_per_second": flop / seconds,
        "matmul_flop_per_second": rate,
        "ratio": flop / seconds / rate,
        "warm_up_seconds": compiling,
        "parameters": kit.parameters(trainer.model),
        "memory_mb": runtime.peak_memory_mb() - (before if kit.on_cpu else 0),
        "device": runtime.device_name(),
        "dtype": str(runtime.dtype),
        "attention": runtime.attention,
        "compile": kit.compiled(module, trainer),
        kit.name: kit.version,
    }


def settings_of(script: str, overrides: dict) -> dict[str, str]:
    """The environment of a size for a script, by name or path."""
    own, trunk = variables(find_script(script)), variables(TRUNK)
    same = all(own.get(name) == trunk[name] for name in OF_TRUNK)
    return {key: str(value) for key, value in {**BASE, **(OF_TRUNK if same else {}), **overrides}.items()}


def measure_apart(options: argparse.Namespace, name: str, overrides: dict) -> dict:
    """`measure` in a process of its own; a line on stderr says how far the bench is."""
    env = {**os.environ, **settings_of(options.script, overrides), "COMPILE": options.compile}
    command = [sys.executable, __file__, "--one", "--raw", "--script", options.script]
    command += ["--steps", str(options.steps)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["failed"])[-1]
        raise Misuse(f"{name}: {last}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {result['step_ms']:.0f} ms, ratio {result['ratio']:.3f}", file=sys.stderr)
    return result


def describe(name: str, result: dict) -> list:
    return [
        name,
        f"{result['parameters'] / 1e6:.2f} M",
        f"{result['step_ms']:.0f}",
        f"{result['tokens_per_second'] / 1e3:.1f} k",
        *(
            f"{rate:.{int(rate < 10)}f}"
            for rate in (result[key] / 1e9 for key in ("flop_per_second", "matmul_flop_per_second"))
        ),
        f"{result['ratio']:.3f}",
        f"{result['memory_mb']:.0f}",
    ]


HEADER = ["model", "parameters", "ms a step", "bytes/s", "GFLOP/s", "matmul GFLOP/s", "ratio", "memory MB"]


def machine(result: dict) -> str:
    kind = "mlx" if "mlx" in result else "torch"
    return (
        f"{result['device']}, {result['dtype'].rpartition('.')[2]}, attention `{result['attention']}`, "
        f"compiled: {'yes' if result['compile'] else 'no'}, {kind} {result[kind]}."
    )


def doublings(scaling: dict[str, dict[str, dict]]) -> list[list[str]]:
    """A row for each step from one value of a variable to the next."""
    rows = []
    for variable, series in scaling.items():
        for (a, low), (b, high) in itertools.pairwise(series.items()):
            step, flop, memory = (high[key] / low[key] for key in ("step_ms", "flop_per_step", "memory_mb"))
            ratios = [f"{ratio:.2f}" for ratio in (step, flop, step / flop, memory)]
            rows.append([f"`{variable}` {a} to {b}", *ratios])
    return rows


def twins(results: dict) -> str:
    """What `--twin --json` writes, {"twins": {script: numbers}, "settings", "load", "cores"}, as Markdown."""
    found, settings = results["twins"], results["settings"]
    versions = {name: next(f"{kind} {result[kind]}" for kind in ("torch", "mlx") if kind in result)
                for name, result in found.items()}
    rows = [describe(f"`{name}` ({versions[name]})", result) for name, result in found.items()]
    torch, mlx = found.values()
    slower, rate = (
        mlx["step_ms"] / torch["step_ms"],
        torch["matmul_flop_per_second"] / mlx["matmul_flop_per_second"],
    )
    note = (
        f"{settings['NUM_LAYERS']} layers x {settings['MODEL_DIM']}, {settings['TRAIN_BATCH_TOKENS']:,} "
        "bytes a step in rows of "
        f"{settings['TRAIN_SEQ_LEN']}, {settings['DTYPE']}, compiled: {'yes' if mlx['compile'] else 'no'}, "
        f"{torch['device']}, OMP_NUM_THREADS="
        f"{results['threads']}; load before the run {results['load']:.1f} on {results['cores']} cores. "
        f"The twin's step takes {slower:.1f} times as long; its framework multiplies {rate:.1f} times slower."
    )
    return f"{markdown_table(['script', *HEADER[1:]], rows)}\n\n{note}"


def report(results: dict) -> str:
    """What `--json` writes, {"sizes", "scaling"} or that of `--twin`, as Markdown."""
    if "twins" in results:
        return twins(results)
    sizes = [describe(name, result) for name, result in results["sizes"].items()]
    tables = [
        markdown_table(HEADER, sizes),
        markdown_table(["doubling", "time", "FLOP", "time / FLOP", "memory"], doublings(results["scaling"])),
    ]
    return "\n\n".join([machine(next(iter(results["sizes"].values()))), *tables])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", default=str(TRUNK), help="a script or a record's folder")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--compile", default="auto", choices=("auto", "0", "1"))
    parser.add_argument("--one", action="store_true", help="only the configuration of the environment")
    parser.add_argument("--twin", action="store_true", help="the trunk and the MLX twin, side by side")
    parser.add_argument("--raw", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--json", default="", help="also write all numbers to this file")
    parser.add_argument("--check", action="store_true", help="everything for a day with a GPU")
    parser.add_argument(
        "--text", nargs="*", default=[], help="--check: .txt, .jsonl or .jsonl.zst to train on"
    )
    parser.add_argument("--out", default="runs/gpu_check", help="--check: where results go")
    parser.add_argument("--rehearse", action="store_true", help="--check with a toy model on a CPU")
    parser.add_argument("--only", nargs="*", default=[], help="--check: these processes, see gpu_check.py")
    parser.add_argument("--plan", action="store_true", help="what a run costs, without running it")
    parser.add_argument("--card", default="h100", help="--plan: h100, h200, a100, 4090 or cpu, measured now")
    parser.add_argument("--world-size", type=int, default=0, help="--plan: ranks; 0 = as the card is used")
    parser.add_argument(
        "--mix-rate", type=float, default=0.0, help="--plan: MB/s of the mixture; 0 = as its record measured"
    )
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="--plan: settings of the script")
    options = parser.parse_args()

    if options.plan:
        import plan
        return plan.run(options)
    if options.settings:
        raise Misuse(f"{options.settings[0]}: only --plan takes settings; put them in front of the command")
    if options.check or options.rehearse:
        import gpu_check
        only = tuple(options.only)
        return gpu_check.check(options.text, ROOT / options.out, options.rehearse,
                               find_script(options.script), only)
    if options.one:
        if options.compile != "auto":
            os.environ["COMPILE"] = options.compile
        result = measure(options.script, options.steps)
        table = markdown_table(HEADER, [describe("environment", result)])
        warm_up = f"The warm-up, compilation included, took {result['warm_up_seconds']:.0f} s."
        print(json.dumps(result) if options.raw else f"{machine(result)}\n\n{table}\n\n{warm_up}")
        if options.json:
            write_atomic(Path(options.json), f"{json.dumps(result, indent=1)}\n".encode())
        return 0
    if options.twin:
        results = {
            "load": os.getloadavg()[0],
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
            "settings": {**BASE, **OF_TRUNK, **TWIN},
            "twins": {},
        }
        for name in ("train_gpt.py", "train_gpt_mlx.py"):
            options.script = str(ROOT / name)
            results["twins"][name] = measure_apart(options, name, TWIN)
    else:
        results = {
            "sizes": {name: measure_apart(options, name, overrides) for name, overrides in SIZES.items()},
            "scaling": {
                variable: {
                    str(value): measure_apart(options, f"{variable}={value}", {**BENCH, variable: value})
                    for value in values
                }
                for variable, values in LENGTHS.items()
            },
        }
    print(report(results))
    if options.json:
        write_atomic(Path(options.json), f"{json.dumps(results, indent=1)}\n".encode())
    return 0


if __name__ == "__main__":
    command(main)
