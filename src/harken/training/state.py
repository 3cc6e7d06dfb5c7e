"""TrainState: everything that a resume needs, in two files that no code hides in (safetensors and JSON)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from harken.errors import DataError
from harken.shards import atomic


@dataclass
class TrainState:
    """The state between two steps.

    `step` counts optimiser steps from 0 and, with the seed, is the position of the sampler, the schedule and every
    random draw (each step reseeds from (seed, step)). `best` is the best validation score so far and `history` has one
    row an epoch. `drawn_by` is how many processes draw the batches, where another number would draw others; else 1.
    """

    step: int = 0
    best: float = float("-inf")
    best_epoch: int = -1
    history: list[dict[str, float]] = field(default_factory=list)
    drawn_by: int = 1


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with every tensor replaced by a reference into `tensors`, so that the rest is JSON."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"__tensor__": path}
    if isinstance(value, dict):
        return {"__items__": [[k, _flatten(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        return {k: _unflatten(v, tensors) for k, v in value["__items__"]}
    if isinstance(value, list):
        return [_unflatten(v, tensors) for v in value]
    return value


def save(path: Path, state: TrainState, model: nn.Module, best: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint to the one file `path`, atomically."""
    tensors: dict[str, Tensor] = {}
    tree = _flatten(
        {"model": model.state_dict(), "best": best.state_dict(), "optimizer": optimizer.state_dict()}, "", tensors
    )
    # one key: safetensors writes several in an order drawn anew each time, and equal states should be equal bytes
    meta = {"harken": json.dumps({"tree": tree, "state": vars(state)}, allow_nan=True)}
    with atomic(path) as f:
        f.write(safetensors.torch.save(tensors, meta))


def load(path: Path, model: nn.Module, best: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Read a checkpoint into `model`, `best` and `optimizer`. Raises DataError where the file does not fit them."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            meta = json.loads((f.metadata() or {})["harken"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (safe_open is not a dict)
        tree = _unflatten(meta["tree"], tensors)
        model.load_state_dict(tree["model"])
        best.load_state_dict(tree["best"])
        optimizer.load_state_dict(tree["optimizer"])
        return TrainState(**meta["state"])
    except (safetensors.SafetensorError, RuntimeError, KeyError, ValueError) as e:
        raise DataError(
            f"{path}: this checkpoint does not fit the run ({e}). Delete it to start the run anew."
        ) from None
