"""Lines of metrics.jsonl in the files of other tools: a CSV file, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Protocol

from family import Misuse
from watched import Watched, is_number

NEEDS = {"tensorboard": "tensorboard==2.21.0", "wandb": "wandb==0.31.0"}


class Exporter(Protocol):
    def add(self, run: Watched, entry: dict) -> None:
        """One line of a run."""

    def flush(self) -> None:
        """What was added can be read now."""

    def close(self) -> None: ...


def exporter(kind: str, place: Path) -> Exporter:
    """Raises Misuse where the other tool is not installed, or a CSV file is there already."""
    try:
        return {"csv": Csv, "tensorboard": TensorBoard, "wandb": WeightsAndBiases}[kind](place)
    except ModuleNotFoundError as error:
        raise Misuse(f"--export {kind}: {error.name} is not installed: pip install {NEEDS[kind]}") from None


def values(run: Watched, entry: dict) -> dict[str, float]:
    """{name: number} of a line, with the bytes of text behind it and bits per byte beside nats."""
    found = {name: value for name, value in entry.items() if name != "step" and is_number(value)}
    if scale := run.scale():
        found["bytes"] = entry["step"] * scale[0]
        if "train_loss" in found:
            found["train_bpb"] = found["train_loss"] * scale[1]
    return found


class Csv:
    """A row a number, so that runs with other columns fit into one file: run, step, name, value."""

    def __init__(self, place: Path):
        if place.exists():
            raise Misuse(f"--out {place}: is there already; name a new file")
        self.file = open(place, "w", newline="", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.writer.writerow(["run", "step", "name", "value"])

    def add(self, run: Watched, entry: dict) -> None:
        for name, value in values(run, entry).items():
            self.writer.writerow([run.name, entry["step"], name, value])

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Events of a run below `place`/<run>; `tensorboard --logdir PLACE` shows them."""

    def __init__(self, place: Path):
        import tensorboard  # noqa: F401 (torch says only "no module named tensorboard.compat" without it)
        from torch.utils.tensorboard import SummaryWriter
        self.place, self.make, self.writers = place, SummaryWriter, {}

    def add(self, run: Watched, entry: dict) -> None:
        if run.folder not in self.writers:
            self.writers[run.folder] = self.make(str(self.place / run.name))
            settings = json.dumps(run.about.settings, indent=1)
            self.writers[run.folder].add_text("settings", f"```\n{settings}\n```", 0)
        for name, value in values(run, entry).items():
            self.writers[run.folder].add_scalar(name, value, entry["step"])

    def flush(self) -> None:
        for writer in self.writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class WeightsAndBiases:
    """A run of wandb for each run, in `place`; offline unless WANDB_MODE is set, `wandb sync` uploads it."""

    def __init__(self, place: Path):
        import wandb
        os.environ.setdefault("WANDB_MODE", "offline")
        place.mkdir(parents=True, exist_ok=True)
        self.place, self.wandb, self.runs = place, wandb, {}

    def add(self, run: Watched, entry: dict) -> None:
        if run.folder not in self.runs:
            self.runs[run.folder] = self.wandb.init(
                project="small-language-models", name=run.name, dir=str(self.place),
                config=run.about.settings, reinit="create_new")
        self.runs[run.folder].log(values(run, entry), step=entry["step"])

    def flush(self) -> None:
        """wandb writes by itself."""

    def close(self) -> None:
        for each in self.runs.values():
            each.finish()
