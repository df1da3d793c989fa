"""What the tools and the tests share: loading a script as a module, and Markdown tables."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRUNK = ROOT / "train_gpt.py"


def load_script(path: Path | str = TRUNK):
    """A script of this repository, or that of a record's folder, as a module: importing one starts no work."""
    path = Path(path)
    path = path / "train_gpt.py" if path.is_dir() else path
    if not path.is_file():
        raise SystemExit(f"error: {path}: no such script")
    name = f"script_{path.resolve().parent.name}_{path.stem}".replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def markdown_table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
