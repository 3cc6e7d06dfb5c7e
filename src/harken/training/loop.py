"""`fit`: the only training loop, whatever the paper."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from harken.errors import DataError
from harken.training.batches import Order
from harken.training.state import TrainState, load, save

log = logging.getLogger("harken")


@runtime_checkable
class Task(Protocol):
    """What a recipe brings to the loop."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        ...

    def loss(self, items: np.ndarray, epoch: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """The loss of one batch (numbers into the training clips) and what to log beside it."""
        ...

    def validate(self) -> Mapping[str, float]:
        """Metrics on the validation split; `score` is what the best model is chosen by (higher is better)."""
        ...


@dataclass(frozen=True)
class Plan:
    """How long and how: `lr_factor(step)` scales every parameter group's own `peak_lr`."""

    epochs: int
    seed: int
    lr_factor: Callable[[int], float]
    clip_norm: float | None
    checkpoint_every: int
    select: str


def fold(*parts: object) -> int:
    """A 63-bit seed from (seed, step, ...): each step has a generator of its own, so a resume needs no RNG state."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def _diverged(name: str, what: str, epoch: int, state: TrainState, path: Path) -> DataError:
    kept = f"The last good state is {path}." if path.is_file() else "No state was kept yet."
    return DataError(
        f"{name}: the {what} at epoch {epoch}, step {state.step}. {kept} "
        "Lower the learning rate or check the recipe's loss."
    )


def fit(task: Task, optimizer: torch.optim.Optimizer, order: Order, plan: Plan, folder: Path, name: str) -> TrainState:
    """Train `task.model` and leave it with the selected weights; resume from `folder` if a checkpoint is there.

    A run that is killed at any step and started again ends with the same bytes as one that was not: batches, schedule
    and random draws are functions of (seed, step), and the checkpoint holds the rest.

    Raises DataError when the loss or its gradient stops being finite; the last good checkpoint stays.
    """
    path = folder / "state.safetensors"
    state = TrainState()
    best = copy.deepcopy(task.model)
    if path.is_file():
        state = load(path, task.model, best, optimizer)
        log.info("%s: resuming at step %d", name, state.step)
    n_steps = plan.epochs * order.steps_per_epoch
    sums: dict[str, float] = state.history.pop() if state.history and "epoch" not in state.history[-1] else {}
    while state.step < n_steps:
        epoch, first = divmod(state.step, order.steps_per_epoch)
        began = time.monotonic()
        task.model.train()
        for items in order.epoch(epoch, first):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * plan.lr_factor(state.step)
            seed = fold(plan.seed, state.step)
            torch.manual_seed(
                seed
            )  # dropout has no generator argument; this is the one global draw, and it is a function of the step
            loss, extra = task.loss(items, epoch, torch.Generator().manual_seed(seed))
            value = float(loss.detach())
            if not math.isfinite(value):
                raise _diverged(name, f"loss is {value}", epoch, state, path)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.get_total_norm([p.grad for p in task.model.parameters() if p.grad is not None])
            if not math.isfinite(
                norm
            ):  # a finite loss can have one (sqrt at 0); the step would spoil every later checkpoint
                raise _diverged(name, f"gradient's norm is {float(norm)}", epoch, state, path)
            if plan.clip_norm is not None:
                nn.utils.clip_grads_with_norm_(task.model.parameters(), plan.clip_norm, norm)
            optimizer.step()
            state.step += 1
            for key, v in {"loss": value, **extra}.items():
                sums[key] = sums.get(key, 0.0) + v
            in_epoch = state.step % order.steps_per_epoch
            if in_epoch and state.step % plan.checkpoint_every == 0:
                part = TrainState(state.step, state.best, state.best_epoch, [*state.history, sums])
                save(path, part, task.model, best, optimizer)
        task.model.eval()
        with torch.no_grad():
            metrics = dict(task.validate())
        row = {k: v / order.steps_per_epoch for k, v in sums.items()}
        sums = {}
        score = metrics.pop("score")
        state.history.append({"epoch": epoch, **row, **metrics, "score": score})
        if plan.select == "last" or score > state.best:
            state.best, state.best_epoch = score, epoch
            best.load_state_dict(task.model.state_dict())
        save(path, state, task.model, best, optimizer)
        log.info(
            "%s: epoch %d/%d loss %.3f score %.2f (%.1f s)",
            name,
            epoch + 1,
            plan.epochs,
            row["loss"],
            score,
            time.monotonic() - began,
        )
    task.model.load_state_dict(best.state_dict())
    task.model.eval()
    return state
