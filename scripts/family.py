"""What the tools share: loading a script of the family as a module, and talking to it through its settings."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRUNK = ROOT / "train_gpt.py"


def load_script(path: Path | str = TRUNK):
    """A training script as a module. Importing one has no side effect; work starts in its `main`."""
    path = Path(path)
    path = path / "train_gpt.py" if path.is_dir() else path
    if not path.is_file():
        raise SystemExit(f"error: {path}: no such script")
    name = "script_" + path.parent.name.replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def markdown_table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
