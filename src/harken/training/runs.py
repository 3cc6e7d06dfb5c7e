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
from harken.shards import atomic, fingerprint, publish, write_json
from harken.training.loop import DIVERGED, STATE
from harken.training.state import TrainState

log = logging.getLogger("harken")
SETTINGS = "settings.json"
HASHED = ("data.", "code")  # of the settings, those that are hashes: they say that something changed, not what


def device() -> torch.device:
    """HARKEN_DEVICE, else a GPU, else the CPU. Of a run's processes on one machine each takes the GPU of its number."""
    gpu = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    name = os.environ.get("HARKEN_DEVICE") or (gpu if torch.cuda.is_available() else "cpu")
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


def left_to_do(
    work: Path, runs: Mapping[str, tuple[str, int]], settings: Mapping[str, Mapping[str, Any]]
) -> tuple[list[tuple[str, str, int]], dict[str, str]]:
    """The runs that are left, each with its recipe and seed, and the fingerprint of every run.

    Raises as `unfinished` does.
    """
    marks = {name: fingerprint(s) for name, s in settings.items()}
    return [(name, *runs[name]) for name in unfinished(work, marks, settings)], marks


def unfinished(work: Path, marks: Mapping[str, str], settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The runs (name -> fingerprint) that are not done, each with a folder that says what `settings` it has.

    Results that no run wants any more are removed. What was begun under other settings is hours of somebody's GPU: it
    is kept, and DataError lists what has changed, unless HARKEN_RESTART is 1, which gives it up.
    """
    work.mkdir(parents=True, exist_ok=True)
    folders = {run: folder_of(work, run, mark) for run, mark in marks.items()}
    kept = {f.name for f in folders.values()}
    begun: list[str] = []
    unwanted: list[Path] = []
    for old in sorted(f for f in work.iterdir() if f.is_dir() and f.name not in kept):
        is_begun = (old / STATE).is_file() and not (old / "run.json").is_file()
        if not is_begun or os.environ.get("HARKEN_RESTART") == "1":
            unwanted.append(old)
        elif (run := old.name.rpartition(".")[0]) in settings and not (folders[run] / "run.json").is_file():
            begun.append(f"{old}: " + "; ".join(_differences(_settings_of(old), settings[run])))
    if begun:
        raise DataError(
            "runs were begun under other settings and are not done:\n  "
            + "\n  ".join(begun)
            + "\nTo go on with them, put the settings (or the code) back. To give them up, delete the folders "
            "or set HARKEN_RESTART=1."
        )
    for old in unwanted:  # only now: who puts the settings back finds the runs that were done as they were
        shutil.rmtree(old)
    todo = []
    for run, folder in folders.items():
        if (folder / "run.json").is_file():
            _tidy(folder)  # a kill may have come between the last file that counts and this
        else:
            write_json(folder / SETTINGS, settings[run])
            todo.append(run)
    return todo


def _tidy(folder: Path) -> None:
    """Drop from a finished run's folder what only an unfinished one needs."""
    for name in (STATE, SETTINGS, DIVERGED):
        (folder / name).unlink(missing_ok=True)


def _settings_of(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    told: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return told


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every value that is not the same; hashes are only said to have changed."""
    old, new = _flat(then), _flat(json.loads(json.dumps(now, default=str)))
    told = []
    for key in [*new, *(k for k in old if k not in new)]:
        a, b = old.get(key, "absent"), new.get(key, "absent")
        if a != b:
            told.append(f"{key} has changed" if key.startswith(HASHED) else f"{key}: {a} -> {b}")
    return told


def _flat(value: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    found: dict[str, Any] = {}
    for key, v in value.items():
        found |= _flat(v, f"{path}{key}.") if isinstance(v, dict) else {f"{path}{key}": v}
    return found


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
    _tidy(folder)


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
