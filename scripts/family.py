"""What the tools and the tests share: loading a script as a module, and Markdown tables."""

from __future__ import annotations

import importlib.util
import json
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


# What a run's settings say about its process alone.
OF_THE_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ARTIFACT", "EVAL_ONLY", "RESUME")


def run_settings(folder: Path | str) -> dict[str, str]:
    """The settings of a run, as its script reads them from the environment, from the metrics.json in its folder."""
    path = Path(folder) / "metrics.json"
    if not path.exists():
        raise SystemExit(f"error: {path}: needed for the settings of this run")
    return {key: str(int(value) if isinstance(value, bool) else value)
            for key, value in json.loads(path.read_text())["settings"].items() if key not in OF_THE_PROCESS}


def markdown_table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
