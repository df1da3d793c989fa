"""How small other compressors make an artifact's weights: in #2080's order, and as the script codes them.

    python records/2026-11-22_BiJEPAX/compressors.py runs/NAME/artifact.bin --out compressors.json

#2080 gathered the matrices of a role (all c_q, all mlp.fc ...), each transposed, and compressed every group
for itself with ZPAQ (`lrzip -z`); rows of the embedding, of c_q and of mlp.fc were put into an order in which
each is the nearest to the one before (L1, greedy), at two bytes a row; all else went through brotli. The
script codes integers by rANS with counts that adapt. Here both code the same integers of one artifact.

ZPAQ and brotli are rows of the table if they are installed: pip install brotli==1.2.1 zpaq==0.3.7. Without
brotli, LZMA takes what is in no matrix. Two minutes for 6 million weights, ten for 36 million.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from family import Misuse, command, load_script, markdown_table
from rate import payload, rans_size

SCRIPT = Path(__file__).with_name("train_gpt.py")
HEADER = ["compressor", "order", "embedding", "matrices of blocks", "all", "against rANS", "seconds"]
SORTED = ("tok_emb", "c_q", "mlp.fc")


def installed() -> dict:
    """{name: compress}. ZPAQ at 5 models more than the 3 at which `lrzip -z -L 9` asks for it."""
    found = {"LZMA": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)}
    try:
        import brotli
        found["brotli 11"] = lambda data: brotli.compress(data, quality=11, lgwin=24)
    except ImportError:
        pass
    try:
        import zpaq
        found["ZPAQ 5"] = lambda data: zpaq.compress(data, 5, threads=1)  # one block
    except ImportError:
        pass
    return found


def groups(entries: list, parts: list[tuple]) -> tuple[dict, bytes]:
    """({role: matrices (R, C) int8}, all that is in none: small parts, steps, fp16 numbers)."""
    coded = [(name, shape) for name, shape, bits, _ in entries if bits]
    found, rest = {}, b""
    for (name, shape), (_, block) in zip(coded, parts):
        if ":" in name:
            rest += block
            continue
        role = re.sub(r"blocks\.\d+\.|\.?weight", "", name)
        found.setdefault(role, []).append(np.frombuffer(block, np.int8).reshape(shape))
    return found, rest + b"".join(block for _, block in parts[len(coded) :])


def nearest_first(rows: np.ndarray) -> np.ndarray:
    """An order of rows (R, C) int8 from row 0 on, each the nearest in L1 to the one before."""
    left, order = np.arange(1, len(rows)), [0]
    wide = rows.astype(np.int16)
    while len(left):
        away = np.abs(wide[left] - wide[order[-1]]).sum(1, dtype=np.int32)
        order.append(int(left[at := int(away.argmin())]))
        left = np.delete(left, at)
    return np.array(order)


def arranged(matrices: list, sort: bool) -> tuple[bytes, bytes]:
    """(a role's matrices, transposed; the orders of their rows, where they are sorted first)."""
    stream, orders = b"", b""
    for matrix in matrices:
        if sort:
            order = nearest_first(matrix)
            orders += order.astype("<u2").tobytes()
            matrix = matrix[order]
        stream += matrix.T.tobytes()
    return stream, orders


def table(script, artifact: str, log) -> dict:
    """{"header", "rows", "note"} of all that is installed."""
    entries, parts = payload(script, artifact)
    found, rest = groups(entries, parts)
    names = [name for name, _, bits, _ in entries if bits]
    matrices = [(name, part) for name, part in zip(names, parts) if ":" not in name]
    apart = [rans_size(script, [part for name, part in matrices if name.startswith(wanted)])
             for wanted in ("tok_emb.", "blocks.")]
    start = time.perf_counter()
    own = rans_size(script, parts)
    rows = []

    def add(name: str, order: str, sizes: list[int], against: str, seconds: float) -> None:
        rows.append([name, order, *(f"{size:,}" for size in sizes), against, f"{seconds:.0f}"])
        log(rows[-1])

    add("**rANS** (the script's)", "as it lies", [*apart, own], "", time.perf_counter() - start)
    plain = {role: arranged(matrices, False) for role, matrices in found.items()}
    nearest = {role: arranged(matrices, role.endswith(SORTED)) for role, matrices in found.items()}
    codecs = installed()
    small = codecs.get("brotli 11", codecs["LZMA"])
    for name, compress in codecs.items():
        for order, streams in (("by role, transposed", plain), ("the same, rows sorted", nearest)):
            start = time.perf_counter()
            sizes = {role: len(compress(stream)) + (len(small(orders)) if orders else 0)
                     for role, (stream, orders) in streams.items()}
            embedding, whole = sizes["tok_emb"], sum(sizes.values()) + len(small(rest))
            told = [embedding, sum(sizes.values()) - embedding, whole]
            add(name, order, told, f"{whole / own - 1:+.2%}", time.perf_counter() - start)
    weights = sum(matrix.size for matrices in found.values() for matrix in matrices)
    note = (f"{weights:,} integers of one artifact and {len(rest):,} bytes of all else, the header and the "
            "code not counted; seconds on one thread, without those for sorting rows.")
    return {"header": HEADER, "rows": rows, "weights": weights, "note": note}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact")
    parser.add_argument("--out", type=Path, help="write the table here as JSON")
    options = parser.parse_args(argv)
    script = load_script(SCRIPT)
    if not script.constriction:
        raise Misuse("rANS needs constriction: pip install constriction")
    try:
        found = table(script, options.artifact, lambda row: print(row, file=sys.stderr, flush=True))
    except script.UserError as error:
        raise Misuse(str(error)) from None
    print(markdown_table(found["header"], found["rows"]) + "\n\n" + found["note"])
    if options.out:
        found["script_sha256"] = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
        script.write_atomic(options.out, json.dumps(found, indent=1).encode())
    return 0


if __name__ == "__main__":
    command(main)
