"""Runs: recipe x seed. Each is one item of the engine, resumes from its own checkpoint and is not redone when done."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harken.errors import ConfigError, DataError, unknown
from harken.models import weights
from harken.shards import atomic, publish, write_json
from harken.training.state import TrainState

log = logging.getLogger("harken")


def device() -> torch.device:
    """HARKEN_DEVICE, else the first GPU, else the CPU."""
    name = os.environ.get("HARKEN_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"HARKEN_DEVICE={name!r}: {e}") from None


def devices() -> list[str]:
    """This machine's GPUs, for a fan-out with a worker for each; none where HARKEN_DEVICE says what to use."""
    if os.environ.get("HARKEN_DEVICE"):
        return []
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def run_name(recipe: str, seed: int) -> str:
    """`recipe-seed`, the name of a run's folder."""
    return f"{recipe}-{seed}"


def folder_of(work: Path, run: str, mark: str) -> Path:
    """Where a run with this fingerprint keeps its checkpoint and, when done, its results."""
    return work / f"{run}.{mark}"


def unfinished(work: Path, marks: Mapping[str, str]) -> list[str]:
    """The runs (name -> fingerprint) that are not done; scratch folders that no run wants any more are removed."""
    work.mkdir(parents=True, exist_ok=True)
    wanted = {folder_of(work, run, mark).name for run, mark in marks.items()}
    for folder in work.iterdir():
        if folder.is_dir() and folder.name not in wanted:
            shutil.rmtree(folder)
    return [run for run, mark in marks.items() if not (folder_of(work, run, mark) / "run.json").is_file()]


def finish(folder: Path, model: nn.Module, state: TrainState, facts: Mapping[str, Any]) -> None:
    """Write the run's results (`run.json` last: its presence means done) and drop the checkpoint."""
    weights.save(folder / "model.safetensors", model.state_dict(), dict(facts))
    rows = io.StringIO()
    writer = csv.DictWriter(rows, list(state.history[0]) if state.history else ["epoch"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(state.history)
    with atomic(folder / "history.csv") as f:
        f.write(rows.getvalue().encode())
    write_json(
        folder / "run.json", {**facts, "steps": state.step, "best_epoch": state.best_epoch, "best_score": state.best}
    )
    (folder / "state.safetensors").unlink(missing_ok=True)


def publish_runs(work: Path, out: Path, marks: Mapping[str, str]) -> None:
    """Make `out` hold exactly these runs."""
    publish(work, out, {run: folder_of(work, run, mark).name for run, mark in marks.items()})


def runs_in(folder: Path) -> list[dict[str, Any]]:
    """The facts of every finished run of a folder, by name. `run` is added."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no runs here. Run the stage that trains them first.")
    found = []
    for path in sorted(folder.glob("*/run.json")):
        found.append({"run": path.parent.name, **json.loads(path.read_text())})
    return found


def load_model(folder: Path, run: str, model: nn.Module) -> nn.Module:
    """The weights of a finished run, in eval mode. Raises DataError where they are missing or do not fit."""
    path = folder / run / "model.safetensors"
    if not path.is_file():
        raise unknown(f"{folder}: runs", run, [r["run"] for r in runs_in(folder)])
    weights.load_into(model, path)
    return model.eval()


def seeds_times(recipes: Iterable[str], seeds: Iterable[int]) -> list[tuple[str, int]]:
    """Every recipe with every seed, seeds innermost."""
    return [(r, s) for r in recipes for s in seeds]
