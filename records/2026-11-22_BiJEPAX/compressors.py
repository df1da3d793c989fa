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


def payload(script, artifact: str) -> tuple[list, bytes]:
    """(entries, the payload as it was before its compressor)."""
    blob = script.read_file(artifact, "ARTIFACT")
    header, _ = script.unpack(blob, artifact)  # refuses what is damaged
    body = blob[len(script.ARTIFACT_MAGIC) + 32 :]
    start = 6 + int.from_bytes(body[2:6], "little")
    decompress = script.COMPRESSORS[header["compressor"]][1]
    return header["tensors"], decompress(body[start:], script.planes(header["tensors"]))


def groups(entries: list, raw: bytes) -> tuple[dict, bytes]:
    """({role: matrices (R, C) int8}, all that is in none: small parts, steps, fp16 numbers)."""
    found, rest, place = {}, b"", 0
    for name, shape, bits, _ in entries:
        if not bits:
            continue
        size = int(np.prod(shape))
        part, place = raw[place : place + size], place + size
        if ":" in name:
            rest += part
            continue
        role = re.sub(r"blocks\.\d+\.|\.?weight", "", name)
        found.setdefault(role, []).append(np.frombuffer(part, np.int8).reshape(shape))
    return found, rest + raw[place:]


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


def rans_sizes(script, entries: list, raw: bytes) -> list[int]:
    """Bytes by rANS of the embedding alone, and of the matrices of blocks alone."""
    layout = script.planes(entries)
    ends = np.cumsum([plane.slices * plane.places for plane in layout])
    blocks = np.split(np.frombuffer(raw, np.int8), ends[:-1])
    names = [name for name, _, bits, _ in entries if bits] + ["half0", "half1"]
    sizes = []
    for wanted in ("tok_emb.weight", "blocks."):
        keep = [i for i, name in enumerate(names) if name.startswith(wanted) and ":" not in name]
        part = b"".join(blocks[i].tobytes() for i in keep)
        sizes.append(len(script.rans_encode(part, [layout[i] for i in keep])))
    return sizes


def table(script, artifact: str, log) -> dict:
    """{"header", "rows", "note"} of all that is installed."""
    entries, raw = payload(script, artifact)
    parts, rows = rans_sizes(script, entries, raw), []
    start = time.perf_counter()
    own = len(script.rans_encode(raw, script.planes(entries)))

    def add(name: str, order: str, sizes: list, whole: int) -> None:
        against = "" if not rows else f"{whole / own - 1:+.2%}"
        told = [f"{size:,}" for size in (*sizes, whole)]
        rows.append([name, order, *told, against, f"{time.perf_counter() - start:.0f}"])
        log(rows[-1])

    add("**rANS** (the script's)", "as it lies", parts, own)
    found, rest = groups(entries, raw)
    plain = {role: arranged(matrices, False) for role, matrices in found.items()}
    rows_sorted = {role: arranged(matrices, role.endswith(SORTED)) for role, matrices in found.items()}
    codecs = installed()
    small = codecs.get("brotli 11", codecs["LZMA"])
    for name, compress in codecs.items():
        for order, streams in (("by role, transposed", plain), ("the same, rows sorted", rows_sorted)):
            start = time.perf_counter()
            sizes = {role: len(compress(stream)) + (len(small(orders)) if orders else 0)
                     for role, (stream, orders) in streams.items()}
            embedding = sizes.pop("tok_emb")
            blocks = sum(sizes.values())
            add(name, order, [embedding, blocks], embedding + blocks + len(small(rest)))
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
