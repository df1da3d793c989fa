"""Which validation text do a record's numbers stand on? Writes records/texts.json.

    python scripts/texts.py NAME FOLDER...    folders of shards with the same validation text
    python scripts/texts.py books data/datasets/books_bench data/datasets/books_sp1024_bench

Bits per byte do not depend on the tokenizer, so the leaderboard groups records by the text that they were
scored on. Runs copy `val_text_sha256` from the manifest of data/prepare.py into `dataset` of their
metrics.json. Older runs have only the fingerprint of their ids; records/texts.json says which text such a
fingerprint stands for:

    {sha256 of the text: {"name": NAME, "bytes": ..., "documents": ..., "datasets": {fingerprint: ids},
                          "spelled": {ids: bytes}}}

`spelled` has the tokenizers that do not keep all of the text, and how many bytes their ids spell.

The fingerprint is computed from the shards as the training scripts do it, and the hash of the text is read
from manifest.json: make a folder again with data/prepare.py where its manifest has none. What the file
already says of other folders stays. Exit code 2: a folder is no folder of shards, or the folders hold
different texts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from family import FINE, ROOT, Misuse, command, read_json, write_atomic

TEXTS = Path("records/texts.json")
HEADER = 1024  # bytes before the ids of a shard
END = 4096  # ids at each end of a training shard that the fingerprint covers
ID = 2  # bytes


def fingerprint(folder: Path) -> str:
    """`dataset.sha256` of runs on these shards: all validation ids, and both ends of each training shard.

    Raises:
        Misuse: the folder has no shards of one of the two.
    """
    train, val = (sorted(folder.glob(f"*_{split}_*.bin")) for split in ("train", "val"))
    if not train or not val:
        raise Misuse(f"{folder}: no *_train_*.bin or no *_val_*.bin; a folder of data/prepare.py is needed")
    digest = hashlib.sha256()
    for path in val:
        digest.update(path.read_bytes()[HEADER:])

    for path in train:
        size = path.stat().st_size
        digest.update(f"{path.name} {(size - HEADER) // ID}".encode())
        with path.open("rb") as shard:
            shard.seek(HEADER)
            digest.update(shard.read(END * ID))
            shard.seek(max(HEADER, size - END * ID))
            digest.update(shard.read())
    return digest.hexdigest()


def described(folder: Path) -> tuple[str, dict]:
    """(sha256 of a folder's validation text, its bytes, documents and {fingerprint: ids}).

    Raises:
        Misuse: its manifest is missing or says no text.
    """
    path = folder / "manifest.json"
    manifest = read_json(path)
    try:
        size, spelled = manifest["bytes"]["val"], manifest.get("val_normalised_bytes")
        return manifest["val_text_sha256"], {
            "bytes": size,
            "documents": manifest["documents"]["val"],
            "datasets": {fingerprint(folder): manifest["variant"]},
            "spelled": {manifest["variant"]: spelled} if spelled and spelled < size else {},
        }
    except KeyError as error:
        raise Misuse(f"{path}: no {error}; python data/prepare.py makes the folder with it") from None


def merged(known: dict, name: str, folders: list[Path]) -> dict:
    """What records/texts.json is to say once these folders, all of one text, are in it.

    Raises:
        Misuse: two folders hold different texts.
    """
    known = {text: {**entry, "datasets": dict(entry["datasets"])} for text, entry in known.items()}
    first = None
    for folder in folders:
        text, entry = described(folder)
        first = first or text
        if text != first:
            raise Misuse(f"{folder}: its validation text is {text[:16]}, "
                         f"that of {folders[0]} is {first[:16]}")

        for key in ("datasets", "spelled"):
            entry[key] = dict(sorted({**known.get(text, {}).get(key, {}), **entry[key]}.items()))
        known[text] = {"name": name, **entry}
    return dict(sorted(known.items()))


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="of the text, for the leaderboard's heading")
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path,
                        help="of shards with a manifest.json")
    parser.add_argument("--json", action="store_true", help="print the whole file instead of a line a folder")
    options = parser.parse_args(argv)

    path = root / TEXTS
    found = merged(read_json(path) if path.exists() else {}, options.name, options.folders)
    write_atomic(path, f"{json.dumps(found, indent=1)}\n".encode())
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for text, entry in found.items():
            ids = ", ".join(f"{ids} ({sha256[:8]})" for sha256, ids in entry["datasets"].items())
            size = f"{entry['bytes']:,} bytes, {entry['documents']:,} documents"
            print(f"{entry['name']} ({text[:8]}): {size}; {ids}")
    return FINE


if __name__ == "__main__":
    command(main)
