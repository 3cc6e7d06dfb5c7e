"""`fit`: the only training loop, whatever the paper."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from harken.errors import DataError
from harken.shards import write_json
from harken.training import distributed
from harken.training.batches import Order, ShardOrder
from harken.training.curves import Rows
from harken.training.meter import Meter
from harken.training.state import TrainState, load, save

log = logging.getLogger("harken")
STATE, DIVERGED = "state.safetensors", "diverged.json"

Batch = TypeVar("Batch")
Batch_co = TypeVar("Batch_co", covariant=True)


@runtime_checkable
class Batches(Protocol[Batch_co]):
    """What the loop goes through: the batches of any epoch from any step on, the same whenever they are asked for."""

    def epoch(self, epoch: int, first_step: int = 0) -> Generator[Batch_co, None, None]:
        """The batches of an epoch, each good until the next one is asked for."""
        ...


@runtime_checkable
class Task(Protocol[Batch]):
    """What a recipe brings to the loop."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        ...

    def batches(self, order: Order | ShardOrder) -> Batches[Batch]:
        """What `loss` is given: what is on the disk of the clips that `order` names, or, for toys, `order` itself."""
        ...

    def loss(self, batch: Batch, epoch: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """The loss of one batch, or this process's share of it, and what to log beside it."""
        ...

    def names(self, batch: Batch) -> Sequence[str]:
        """The clips of a batch, for people who must find a bad one."""
        ...

    def validate(self) -> Mapping[str, float]:
        """Metrics on the validation split; `score` is what the best model is chosen by (higher is better)."""
        ...


@dataclass(frozen=True)
class Plan:
    """How long and how: `lr_factor(step)` scales every parameter group's own `peak_lr`.

    `flops` that training needs for a clip and `peak` of a device are for the log alone (see Meter).
    """

    epochs: int
    seed: int
    lr_factor: Callable[[int], float]
    clip_norm: float | None
    checkpoint_every: int
    select: str
    flops: float | None = None
    peak: float | None = None


def fold(*parts: object) -> int:
    """A 63-bit seed from (seed, step, ...): each step has a generator of its own, so a resume needs no RNG state."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def fit(
    task: Task[Batch],
    optimizer: torch.optim.Optimizer,
    order: Order | ShardOrder,
    plan: Plan,
    folder: Path,
    name: str,
    *,
    watch: Callable[[Rows], None] = lambda history: None,
) -> TrainState:
    """Train `task.model` and leave it with the selected weights; resume from `folder` if a checkpoint is there.

    A run that is killed at any step and started again ends with the same bytes as one that was not: batches, schedule
    and random draws are functions of (seed, step), and the checkpoint holds the rest. Where several processes train one
    run, each calls this with its own part of the `order`; the first one writes. `watch` is given the history, a row an
    epoch, at the beginning and after every epoch.

    Raises DataError when the loss or its gradient stops being finite; the last good checkpoint stays, and the clips of
    the batch are written beside it.
    """
    path, group = folder / STATE, distributed.group()
    state = TrainState(drawn_by=order.world if isinstance(order, ShardOrder) else 1)
    best = copy.deepcopy(task.model)
    if path.is_file():
        n, state = state.drawn_by, load(path, task.model, best, optimizer)
        if state.drawn_by != n:
            raise DataError(
                f"{path}: {state.drawn_by} processes began this run, each with shards of its own; {n} would draw other "
                f"batches. Start {state.drawn_by}, or delete it to start the run anew."
            )
        log.info("%s: resuming at step %d", name, state.step)
    group.agree("the step they resume at", state.step)
    batches = task.batches(order)
    n_steps = plan.epochs * order.steps_per_epoch
    group.agree("the number of steps of the run", n_steps)
    sums: dict[str, float] = state.history.pop() if state.history and "epoch" not in state.history[-1] else {}
    if group.is_first:
        watch(state.history)
    meter = Meter(name, n_steps, state.step, plan.flops, plan.peak and plan.peak * group.size)
    while state.step < n_steps:
        epoch, first = divmod(state.step, order.steps_per_epoch)
        meter.rest()
        task.model.train()
        # closed even where a step raises: threads may be reading the next batches
        with contextlib.closing(batches.epoch(epoch, first)) as coming:
            for batch in meter.waiting(coming):
                for key, value in _step(task, optimizer, batch, epoch, state, plan, path, name).items():
                    sums[key] = sums.get(key, 0.0) + value
                state.step += 1
                meter.did(order.batch)
                in_epoch = state.step % order.steps_per_epoch
                if group.is_first and in_epoch and state.step % plan.checkpoint_every == 0:
                    save(path, replace(state, history=[*state.history, sums]), task.model, best, optimizer)
        speed = meter.speed()
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
        if group.is_first:
            save(path, state, task.model, best, optimizer)
            watch(state.history)
        log.info("%s: epoch %d/%d loss %.3f score %.2f (%s)", name, epoch + 1, plan.epochs, row["loss"], score, speed)
    task.model.load_state_dict(best.state_dict())
    task.model.eval()
    return state


def _step(
    task: Task[Batch],
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    epoch: int,
    state: TrainState,
    plan: Plan,
    path: Path,
    name: str,
) -> dict[str, float]:
    """One step of the optimiser; the loss of the whole batch and what to log beside it."""
    group = distributed.group()
    for param_group in optimizer.param_groups:
        param_group["lr"] = param_group["peak_lr"] * plan.lr_factor(state.step)
    seed = fold(plan.seed, state.step)
    torch.manual_seed(seed)  # dropout has no generator argument; this is the one global draw, a function of the step
    loss, extra = task.loss(batch, epoch, torch.Generator().manual_seed(seed))
    value = group.total(loss)
    if not math.isfinite(value):
        raise _diverged(name, f"loss is {value}", epoch, state, path, task.names(batch))
    optimizer.zero_grad(set_to_none=True)
    (loss * group.size).backward()  # type: ignore[no-untyped-call]  # several processes average their gradients
    norm = nn.utils.get_total_norm([p.grad for p in task.model.parameters() if p.grad is not None])
    # a finite loss can have a gradient that is not (sqrt at 0); the step would spoil every later checkpoint
    if not math.isfinite(norm):
        what = f"gradient's norm is {float(norm)}"
        raise _diverged(name, what, epoch, state, path, task.names(batch))
    if plan.clip_norm is not None:
        nn.utils.clip_grads_with_norm_(task.model.parameters(), plan.clip_norm, norm)
    optimizer.step()
    return {"loss": value, **extra}


def _diverged(name: str, what: str, epoch: int, state: TrainState, path: Path, clips: Sequence[str]) -> DataError:
    """The error for people, all clips of the batch in a file beside the checkpoint."""
    group = distributed.group()
    everyone = [clip for part in group.all_told(list(clips)) for clip in part]
    where = path.with_name(DIVERGED)
    if group.is_first:
        write_json(where, {"what": what, "epoch": epoch, "step": state.step, "clips": everyone})
    kept = f"The last good state is {path}." if path.is_file() else "No state was kept yet."
    few = ", ".join(everyone[:4]) + (f" and {len(everyone) - 4} more" if len(everyone) > 4 else "")
    return DataError(
        f"{name}: the {what} at epoch {epoch}, step {state.step}. The batch was {few}; {where} names all. {kept} "
        "Look at these clips, lower the learning rate or check the recipe's loss."
    )
