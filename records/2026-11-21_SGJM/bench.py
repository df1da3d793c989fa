"""The bench: how fast a model writes with drafts and without, by one code path with one cache, in turn.

    GENERATE_BENCH=1 ARTIFACT=FILE python train_gpt.py             starts this file; so does train_gpt_mlx.py
    GENERATE_BENCH=1 ARTIFACT=FILE GENERATE=measured/prompts python train_gpt.py    a folder, a file or JSON

From every prompt it writes greedily and at temperature 1, BENCH_REPEATS times with drafts and as often
without; all settings are variables of the script (`--help` lists them). The run's folder gets a log and
bench.json. Exit code 0; 1 if drafts change a greedy text; 2 misuse; 130 stopped.
"""

from __future__ import annotations

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

NEAR_TIE = 1e-4  # logits closer than this are ordered by the rounding of a pass's shape


def beside(name: str):
    """The script of this name in this folder, as a module."""
    path = Path(__file__).with_name(name)
    spec = importlib.util.spec_from_file_location(f"benched_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
        "verification": sum(writer.reading for writer in writers) / seconds,
        "looping": float(np.mean([looping(text) for text in made])),
        "drafts": {state: sum(writer.graph.counts[state] for writer in writers) for state in states},
    }


def measured(script, model, prompt: list[int], temperature: float) -> dict:
    """Plain and speculative decoding of a prompt in turn, BENCH_REPEATS times each."""
    args, runs = model.args, {"ar": [], "speculation": []}
    for repeat in range(args.bench_repeats):
        for name, writers in runs.items():
            seed, speculate = args.seed + repeat, name != "ar"
            writers.append(script.Generator(model, prompt, seed, speculate, temperature))
            writers[-1].write(args.max_new_tokens)
    report = {name: summed_up(writers, prompt, args.max_new_tokens) for name, writers in runs.items()}
    report["ratio"] = report["speculation"]["bytes_per_second"] / report["ar"]["bytes_per_second"]

    if temperature == 0:  # where the texts part, if they do
        parted = [(a, len(os.path.commonprefix((a.text, b.text)))) for a, b in zip(*runs.values())]
        gaps = [a.gaps[place] for a, place in parted if place < len(a.text)]
        report["near_ties"] = sum(gap < NEAR_TIE for gap in gaps)
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
    """{name: prompt} of GENERATE: a text, a file, a folder, JSON; else `own_prompts`."""
    if not place:
        return own_prompts()
    path, found = Path(place), {"prompt": os.fsencode(place)}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no such path, no such JSON
        files = [path] if path.is_file() else filter(Path.is_file, sorted(path.iterdir()))
        found = {file.stem: file.read_bytes() for file in files}
        if path.suffix == ".json":
            texts = json.loads(found[path.stem])
            found = {name: text.encode() for name, text in texts.items()}
    return found


def bench(script, model, prompts: dict[str, list[int]], runtime, log) -> int:
    """bench.json: prompts greedy and at temperature 1; exit code 1 if drafts change a text."""
    args, found, summary = model.args, {}, {}
    for speculate in (False, True):  # outside the clock
        script.Generator(model, next(iter(prompts.values())), 0, speculate, 0.0).write(8)
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        found[kind] = {}
        for name, prompt in prompts.items():
            found[kind][name] = result = measured(script, model, prompt, temperature)
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
        "summary": summary, **found, "settings": args.settings(), "heads": model.aux is not None,
        "device": runtime.device_name(), "dtype": str(model.dtype), **versions(script),
        "artifact_sha256": script.sha256_file(Path(args.artifact)),
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


def run(script) -> int:
    """Reads the model and the prompts that the environment names, and measures."""
    args = script.settings_of(os.environ.get("ARTIFACT", ""), os.environ)
    runtime = script.Runtime(args)
    args.run_id = args.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-seed{args.seed}"
    special = args.vocab_size - 256
    start = [script.BOS_ID] if special else []
    texts = read_prompts(args.generate)
    prompts = {name: [*start, *(byte + special for byte in text)] for name, text in texts.items()}
    if not prompts or not all(prompts.values()):
        raise script.UserError(f"GENERATE={args.generate}: {len(prompts)} prompts, or an empty one")
    model = script.open_model(args.artifact, runtime.device, args)
    script.check_heads_of(model, args.artifact)
    return bench(script, model, prompts, runtime, script.Log(script.run_folder(args)))


def main(argv: list[str]) -> int:
    script = beside(argv[0] if argv else "train_gpt.py")
    try:
        return run(script)
    except script.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
