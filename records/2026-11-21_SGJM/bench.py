"""The bench: how fast a model writes with drafts and without, by one code path with one cache, in turn.

    python bench.py FILE                                 a checkpoint or an artifact, from prompts of its own
    python bench.py FILE measured/prompts                a text, a file, a folder of files, JSON
    DRAFTER=heads RUN_ID=heads python bench.py FILE      settings of the drafts are the script's variables
    DTYPE=bf16 python bench.py FILE --temperature 0.8    fp32 and temperature 1 by default
    python bench.py FILE --script train_gpt_mlx.py       the same in MLX

From every prompt it writes greedily and at a temperature, --repeats times with drafts and as often without.
The run's folder (RUNS_PATH, RUN_ID) gets a log and bench.json. Exit code 0; 1 if drafts change a greedy text;
2 misuse; 130 stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np

# Logits closer than this are ordered by the rounding of a pass's shape; bf16 has 8 bits.
NEAR_TIES = {"float32": 1e-4, "bfloat16": 0.15}


def beside(name: str):
    """The script of this name in this folder, as a module."""
    path = Path(__file__).with_name(name)
    spec = importlib.util.spec_from_file_location(f"benched_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def with_clock(script):
    """The script's Generator, which reads no clock, with one. It stands while the prompt is read."""

    class Timed(script.Generator):
        seconds = drafting = 0.0

        def grow(self, count: int):
            self.catch_up()
            yield from super().grow(count)

        def step(self, left: int) -> None:
            began = time.perf_counter()
            super().step(left)
            self.seconds += time.perf_counter() - began

        def plan(self, most: int) -> list:
            began = time.perf_counter()
            read = super().plan(most)
            self.drafting += time.perf_counter() - began
            return read

    return Timed


def looping(text: str) -> float:
    """Share of a text that repeats the text some ids before, for twice as many, at least 8."""
    ids = np.array(list(map(ord, text)))
    found = np.zeros(len(text), bool)
    for period in range(1, len(ids) // 3 + 1):
        same = (ids[period:] == ids[:-period]).astype(int)
        edges = np.flatnonzero(np.diff(np.pad(same, 1)))
        for start, stop in zip(edges[::2], edges[1::2]):
            if stop - start >= max(2 * period, 8):
                found[start : stop + period] = True
    return float(found.mean())


def summed_up(writers: list, prompt: list[int], count: int) -> dict:
    """Medians and means of runs that wrote `count` ids each after a prompt."""
    read = sum(writer.read for writer in writers).tolist()
    taken = sum(writer.taken for writer in writers).tolist()
    seconds = sum(writer.seconds for writer in writers)
    made = [writer.text[len(prompt) :] for writer in writers]
    speeds = [count / writer.seconds for writer in writers]
    states = writers[0].graph.counts
    return {
        "bytes_per_second": float(np.median(speeds)),
        "bytes_per_pass": len(writers) * count / read[0],
        "acceptance": [a / n for a, n in zip(taken[1:], read[1:]) if n],  # by depth, where read
        "drafting": sum(writer.drafting for writer in writers) / seconds,
        "looping": float(np.mean([looping(text) for text in made])),
        "drafts": {state: sum(writer.graph.counts[state] for writer in writers) for state in states},
    }


def measured(script, model, prompt: list[int], temperature: float, count: int, repeats: int) -> dict:
    """Plain and speculative decoding of `count` ids after a prompt in turn, `repeats` times each."""
    runs, generator = {"ar": [], "speculation": []}, with_clock(script)
    for repeat in range(repeats):
        for name, writers in runs.items():
            seed, speculate = model.args.seed + repeat, name != "ar"
            writers.append(generator(model, prompt, seed, speculate, temperature))
            writers[-1].write(count)
    report = {name: summed_up(writers, prompt, count) for name, writers in runs.items()}
    report["ratio"] = report["speculation"]["bytes_per_second"] / report["ar"]["bytes_per_second"]

    if temperature == 0:  # where the texts part, if they do
        parted = [(a, len(os.path.commonprefix((a.text, b.text)))) for a, b in zip(*runs.values())]
        gaps = [a.gaps[place] for a, place in parted if place < len(a.text)]
        near = next(gap for dtype, gap in NEAR_TIES.items() if dtype in str(model.dtype))
        report["near_ties"] = sum(gap < near for gap in gaps)
        report["mismatches"] = len(gaps) - report["near_ties"]
    return report


def own_prompts() -> dict[str, bytes]:
    """Four kinds of text, 256 bytes each, that every machine has."""
    code = Path(difflib.__file__).read_bytes()
    prose = " ".join(difflib.SequenceMatcher.__doc__.split())
    rows = [b"  row %d: yes, no, yes\n" % (i % 3) for i in range(12)]
    noise = np.random.default_rng(0).integers(0, 256, 256, np.uint8)
    found = {"prose": prose.encode(), "code": code[code.index(b"def _plain_replace") :],
             "repetitive": b"".join(rows), "random": noise.tobytes()}
    return {name: text[:256] for name, text in found.items()}


def read_prompts(place: str) -> dict[str, bytes]:
    """{name: prompt} of a text, a file, a folder or JSON; else `own_prompts`.

    Raises:
        ValueError: a path that is not there, no prompt or an empty one, JSON that is no object of texts.
    """
    if not place:
        return own_prompts()
    path, there = Path(place), False
    with contextlib.suppress(OSError, ValueError):  # too long for a path, or not one
        there = path.exists()
    if not there:
        if len(place.split()) == 1 and (path.suffix or os.sep in place):
            raise ValueError(f"{place}: no such file or folder")
        return {"prompt": os.fsencode(place)}

    files = [path] if path.is_file() else [*filter(Path.is_file, sorted(path.iterdir()))]
    stems = [file.stem for file in files]
    found = {file.name if stems.count(file.stem) > 1 else file.stem: file.read_bytes() for file in files}
    if path.suffix == ".json" and path.is_file():
        texts = json.loads(found[path.stem])  # a ValueError, too
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f"{place}: JSON prompts are one object, {{name: text}}")
        found = {name: text.encode() for name, text in texts.items()}
    if not found or not all(found.values()):
        raise ValueError(f"{place}: {len(found)} prompts, or an empty one")
    return found


def bench(script, model, prompts: dict[str, list[int]], runtime, log, options: argparse.Namespace) -> int:
    """bench.json: prompts greedy and at a temperature; exit code 1 if drafts change a greedy text."""
    count, repeats, found, summary = options.max_new_tokens, options.repeats, {}, {}
    for speculate in (False, True):  # outside the clock
        script.Generator(model, next(iter(prompts.values())), 0, speculate, 0.0).write(8)
    for kind, temperature in (("greedy", 0.0), ("sampled", options.temperature)):
        found[kind] = {}
        for name, prompt in prompts.items():
            found[kind][name] = result = measured(
                script, model, prompt, temperature, count, repeats)
            plain, ours = result["ar"], result["speculation"]
            log(f"bench {kind} {name} ar:{plain['bytes_per_second']:.1f} "
                f"speculation:{ours['bytes_per_second']:.1f} bytes/s "
                f"ratio:{result['ratio']:.2f} bytes_per_pass:{ours['bytes_per_pass']:.2f} "
                f"looping:{plain['looping']:.0%}")
        ratios = [result["ratio"] for result in found[kind].values()]
        summary[kind] = {"ratio": math.prod(ratios) ** (1 / len(ratios))}

    for key in ("near_ties", "mismatches"):
        summary["greedy"][key] = sum(result[key] for result in found["greedy"].values())
    log(f"bench {json.dumps(summary)}")
    report = {
        "summary": summary, **found, "heads": model.aux is not None,
        "device": runtime.device_name(), "dtype": str(model.dtype), **versions(script),
        "settings": model.args.settings() | {"MAX_NEW_TOKENS": count, "BENCH_REPEATS": repeats,
                                             "TEMPERATURE": options.temperature},
        "artifact_sha256": script.sha256_file(Path(options.model)),
        "script_sha256": script.sha256_file(Path(script.__file__)),
        "bench_sha256": script.sha256_file(Path(__file__)),
    }
    text = json.dumps(report, indent=1, allow_nan=False)
    script.write_atomic(log.folder / "bench.json", text.encode())
    return int(summary["greedy"]["mismatches"] > 0)


def versions(script) -> dict:
    """What computes, and with how many threads."""
    if hasattr(script, "torch"):
        return {"threads": script.torch.get_num_threads(), "torch": script.torch.__version__}
    return {"mlx": script.mx.__version__}


def check_heads_of(script, model, path: str) -> None:
    """Says where drafts will not come from the heads; refuses, where they were asked for."""
    args, missing = model.args, "no heads in it" if model.aux is None else ""
    if args.block_size == 1:
        missing = "BLOCK_SIZE=1 drafts nothing: its byte is settled already"
    if missing and args.drafter == "heads":
        raise script.UserError(f"DRAFTER=heads: {path}: {missing}; DRAFTER=suffix drafts without")
    if missing and args.drafter == "both":
        print(f"{path}: {missing}, drafts only by prompt lookup", file=sys.stderr)


def run(script, options: argparse.Namespace) -> int:
    """Reads the model and the prompts, and measures."""
    if min(options.max_new_tokens, options.repeats) < 1 or not options.temperature > 0:
        raise script.UserError("--max-new-tokens and --repeats: at least 1; --temperature: above 0")
    try:
        args = script.settings_of(options.model, os.environ)
    except KeyError:
        raise script.UserError(f"{options.model}: a checkpoint of another script") from None
    runtime = script.Runtime(args)
    args.run_id = args.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-seed{args.seed}"
    special = args.vocab_size - 256
    start = [script.BOS_ID] if special else []
    try:
        texts = read_prompts(options.prompts)
    except ValueError as error:
        raise script.UserError(f"prompts: {error}") from None
    prompts = {name: [*start, *(byte + special for byte in text)] for name, text in texts.items()}
    more = {} if args.dtype == "auto" else {"dtype": runtime.dtype}
    model = script.load(options.model, runtime.device, args, **more)
    check_heads_of(script, model, options.model)
    return bench(script, model, prompts, runtime, script.Log(script.run_folder(args)), options)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="FILE", help="best|last|final.safetensors, or an artifact")
    parser.add_argument("prompts", nargs="?", default="", help="a text, a file, a folder or JSON")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="ids (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each kind (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="(%(default)s)")
    parser.add_argument("--script", default="train_gpt.py", help="in this folder (%(default)s)")
    options = parser.parse_args(argv)

    if not Path(__file__).with_name(Path(options.script).name).is_file():
        parser.error(f"--script {options.script}: no such file in this folder")
    script = beside(Path(options.script).name)
    try:
        return run(script, options)
    except script.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
