"""`fit` ends with the same bytes wherever it was stopped, refuses a loss that is not finite, keeps the right epoch."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harken.errors import DataError
from harken.shards import ShardWriter
from harken.training.batches import Features, Order, ShardOrder
from harken.training.loader import Batch, Loader
from harken.training.loop import Plan, fit, fold
from harken.training.optim import warmup_cosine, weight_bias_groups
from harken.training.state import TrainState

N, BATCH, EPOCHS = 10, 4, 3
STEPS = EPOCHS * 3


class Killed(BaseException):
    """What a SIGKILL would do, as far as a function can tell."""


class Regression:
    """A small task with everything that could spoil a resume: dropout, batch statistics and draws of its own."""

    def __init__(self, kill_at: int = -1, kill_in_validation: int = -1, bad: dict[int, float] | None = None) -> None:
        torch.manual_seed(3)
        self.model: nn.Module = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1)
        )
        g = torch.Generator().manual_seed(4)
        self.x, self.y = torch.randn(N, 3, generator=g), torch.randn(N, 1, generator=g)
        self.kill_at, self.kill_in_validation, self.bad = kill_at, kill_in_validation, bad or {}
        self.step = itertools.count()
        self.n_validations = itertools.count()
        self.scores: list[float] | None = None

    def batches(self, order: Order | ShardOrder) -> Any:
        return order

    def read(self, batch: Any) -> tuple[np.ndarray, Tensor]:
        return batch, self.x[batch]

    def loss(self, batch: Any, epoch: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        step = next(self.step)
        if step == self.kill_at:
            raise Killed
        items, x = self.read(batch)
        noise = torch.randn(len(items), 3, generator=generator)
        out = self.model(x + 0.1 * noise)
        loss = (out - self.y[items]).square().mean()
        return loss * self.bad.get(step, 1.0), {"noise": float(noise.mean())}

    def names(self, batch: Any) -> list[str]:
        return [f"clip {i}" for i in batch]

    def validate(self) -> Mapping[str, float]:
        n = next(self.n_validations)
        if n == self.kill_in_validation:
            raise Killed
        score = self.scores[n] if self.scores else -float((self.model(self.x) - self.y).square().mean())
        return {"val_error": -score, "score": score}


class FromDisk(Regression):
    """The same, its inputs read from shards: in the loop itself where `ahead` is None, else ahead of it."""

    def __init__(self, features: Features, ahead: int | None, readers: int = 1, kill_at: int = -1) -> None:
        super().__init__(kill_at)
        self.features, self.ahead, self.readers = features, ahead, readers
        self.ids = [f"c{i}" for i in range(N)]

    def batches(self, order: Order | ShardOrder) -> Any:
        if self.ahead is None:
            return order
        return Loader(order, self.features, self.ids, 5, torch.device("cpu"), self.ahead, self.readers)

    def read(self, batch: Any) -> tuple[np.ndarray, Tensor]:
        if isinstance(batch, Batch):
            return batch.items, batch.clips.on(torch.device("cpu")).mean(1)
        return batch, self.features.read([self.ids[i] for i in batch], 5)[0].mean(1)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Features:
    return write_clips(tmp_path_factory.mktemp("features"))


def write_clips(folder: Path) -> Features:
    rng = np.random.default_rng(6)
    for shard in range(3):
        with ShardWriter(folder, shard, fingerprint="f", columns={}, arrays={"fbank": (3, "float16")}) as out:
            for i in range(shard, N, 3):
                out.write(f"c{i}", fbank=rng.normal(size=(int(rng.integers(1, 8)), 3)))
    return Features(folder, "fbank")


def run(folder: Path, task: Regression, order: Order | ShardOrder | None = None, **changes: Any) -> TrainState:
    optimizer = torch.optim.Adam(weight_bias_groups(task.model, lr_weight=0.05, lr_bias=0.01))
    order = order or Order(N, BATCH, 5)
    factor = partial(
        warmup_cosine, steps_per_epoch=order.steps_per_epoch, epochs=EPOCHS, warmup_epochs=1, base=1.0, final=0.1
    )
    values: dict[str, Any] = {"epochs": EPOCHS, "seed": 5, "lr_factor": factor, "clip_norm": 1.0}
    told = {"watch": changes.pop("watch")} if "watch" in changes else {}
    plan = Plan(**(values | {"checkpoint_every": 1, "select": "best"} | changes))
    return fit(task, optimizer, order, plan, folder, "toy", **told)


def weights(task: Regression) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in task.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, dict[str, Tensor], bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    task = Regression()
    state = run(folder, task)
    return state, weights(task), (folder / "state.safetensors").read_bytes()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kill_at", range(STEPS))
def test_a_run_stopped_at_any_step_ends_with_the_same_bytes(
    every: int, kill_at: int, tmp_path: Path, undisturbed: tuple[TrainState, dict[str, Tensor], bytes]
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Regression(kill_at=kill_at), checkpoint_every=every)
    task = Regression()
    state = run(tmp_path, task, checkpoint_every=every)
    assert state == undisturbed[0]
    assert same(weights(task), undisturbed[1])
    assert (tmp_path / "state.safetensors").read_bytes() == undisturbed[2]


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_a_run_stopped_in_validation_too(
    epoch: int, tmp_path: Path, undisturbed: tuple[TrainState, dict[str, Tensor], bytes]
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Regression(kill_in_validation=epoch))
    task = Regression()
    assert run(tmp_path, task) == undisturbed[0]
    assert same(weights(task), undisturbed[1])


def test_a_run_stopped_again_and_again(
    tmp_path: Path, undisturbed: tuple[TrainState, dict[str, Tensor], bytes]
) -> None:
    for _ in range(STEPS - 1):  # each gets one step further than the last
        with pytest.raises(Killed):
            run(tmp_path, Regression(kill_at=1))
    task = Regression()
    assert run(tmp_path, task) == undisturbed[0]
    assert same(weights(task), undisturbed[1])


WHOLE, BY_SHARDS = Order(N, BATCH, 5), ShardOrder(np.arange(N) % 3, 2, BATCH, 5)


@pytest.fixture(scope="module")
def read_in_the_loop(features: Features, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    found = {}
    for order in (WHOLE, BY_SHARDS):
        task = FromDisk(features, None)
        found[id(order)] = run(tmp_path_factory.mktemp("in_the_loop"), task, order), weights(task)
    return found


@pytest.mark.parametrize(
    ("order", "ahead", "readers", "kill_at"),
    [(WHOLE, a, r, -1) for a in (0, 1, 3) for r in (1, 2)]
    + [(WHOLE, 3, 2, k) for k in (0, 4)]
    + [(BY_SHARDS, 3, 2, k) for k in (-1, 4)],
)
def test_reading_ahead_changes_no_bit(
    order: Order | ShardOrder,
    ahead: int,
    readers: int,
    kill_at: int,
    features: Features,
    read_in_the_loop: dict[int, Any],
    tmp_path: Path,
) -> None:
    if kill_at >= 0:
        with pytest.raises(Killed) as kept:  # and with it the frames of the loop
            run(tmp_path, FromDisk(features, ahead, readers, kill_at), order, checkpoint_every=2)
        assert not [t for t in threading.enumerate() if t.name.startswith("harken-")], "a thread outlived its run"
        del kept
    task = FromDisk(features, ahead, readers)
    state, expected = run(tmp_path, task, order), read_in_the_loop[id(order)]
    assert state == expected[0]
    assert same(weights(task), expected[1])


@pytest.mark.parametrize(("began", "goes_on"), [(2, 1), (1, 2)])
def test_batches_that_so_many_processes_drew_are_not_taken_up_by_another_number(
    began: int, goes_on: int, tmp_path: Path
) -> None:
    """Of orders by shards alone: any other is the same for any number."""

    def order(world: int, by_shards: bool) -> Order | ShardOrder:
        return (
            ShardOrder(np.arange(N) % 4, 2, BATCH, 5, True, 0, world)
            if by_shards
            else Order(N, BATCH, 5, True, 0, world)
        )

    for by_shards in (True, False):
        folder = tmp_path / str(by_shards)
        with pytest.raises(Killed):
            run(folder, Regression(kill_at=1), order(began, by_shards))
        if by_shards:
            with pytest.raises(DataError, match=rf"safetensors: {began} processes began this run.* Start {began}, or"):
                run(folder, Regression(), order(goes_on, by_shards))
            run(folder, Regression(), order(began, by_shards))
        else:
            run(folder, Regression(), order(goes_on, by_shards))


def test_a_run_that_is_done_does_no_step(tmp_path: Path) -> None:
    run(tmp_path, Regression())
    task = Regression(kill_at=0, kill_in_validation=0)
    assert run(tmp_path, task).step == STEPS


def test_the_history_has_a_row_an_epoch(undisturbed: tuple[TrainState, dict[str, Tensor], bytes]) -> None:
    history = undisturbed[0].history
    assert [r["epoch"] for r in history] == list(range(EPOCHS))
    assert all(list(r) == ["epoch", "loss", "noise", "val_error", "score"] for r in history)


@pytest.mark.parametrize(
    ("bad", "says"),
    [(math.nan, "the loss is nan at epoch 1, step 4"), (math.inf, "the loss is inf at epoch 1, step 4")],
)
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(bad: float, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says) as e:
        run(tmp_path, Regression(bad={4: bad}))
    path = tmp_path / "state.safetensors"
    assert f"The last good state is {path}. Look at these clips" in str(e.value)
    fine, task = tmp_path / "fine", Regression(kill_at=4)
    with pytest.raises(Killed):
        run(fine, task)
    assert path.read_bytes() == (fine / "state.safetensors").read_bytes()


class RootAtZero(Regression):
    """A finite loss whose gradient is not: a square root at 0."""

    def loss(self, batch: Any, epoch: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        loss, extra = super().loss(batch, epoch, generator)
        weight = self.model[0].weight  # type: ignore[index]
        return loss + (0 * weight).sum().sqrt(), extra


def test_a_gradient_that_is_not_finite_stops_before_it_spoils_the_weights(tmp_path: Path) -> None:
    task = RootAtZero()
    before = weights(task)
    with pytest.raises(DataError, match=r"the gradient's norm is nan at epoch 0, step 0.*No state was kept yet"):
        run(tmp_path, task)
    assert all(torch.equal(p, before[k]) for k, p in task.model.named_parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["diverged.json"]


def test_the_batch_that_diverged_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"The batch was clip \d, clip \d, clip \d, clip \d; \S+diverged.json") as e:
        run(tmp_path, Regression(bad={4: math.nan}))
    told = json.loads((tmp_path / "diverged.json").read_text())
    expected = [f"clip {i}" for i in list(Order(N, BATCH, 5).epoch(1))[1]]
    assert told == {"what": "loss is nan", "epoch": 1, "step": 4, "clips": expected}
    assert ", ".join(expected) in str(e.value)


def watched(folder: Path, task: Regression, seen: list[list[float]], **changes: Any) -> None:
    with contextlib.suppress(Killed):
        run(folder, task, watch=lambda history: seen.append([row["epoch"] for row in history]), **changes)


def test_whoever_watches_is_told_at_the_beginning_and_after_every_epoch(tmp_path: Path) -> None:
    seen: list[list[float]] = []
    watched(tmp_path, Regression(), seen)
    assert seen == [[], [0], [0, 1], [0, 1, 2]]
    seen.clear()
    watched(tmp_path, Regression(), seen)  # done
    assert seen == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("kill_at", "before", "after"), [(4, [[], [0]], [[0], [0, 1], [0, 1, 2]]), (2, [[]], [[], [0], [0, 1], [0, 1, 2]])]
)
def test_a_resumed_run_begins_by_telling_what_there_was(
    kill_at: int, before: list[list[float]], after: list[list[float]], tmp_path: Path
) -> None:
    """Within an epoch, too: its sums so far are no row."""
    seen: list[list[float]] = []
    watched(tmp_path, Regression(kill_at=kill_at), seen)
    assert seen == before
    seen.clear()
    watched(tmp_path, Regression(), seen)
    assert seen == after


def test_a_watcher_that_fails_does_so_after_the_state_is_kept(tmp_path: Path, undisturbed: Any) -> None:
    def full(history: Any) -> None:
        if len(history) == 2:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        run(tmp_path, Regression(), watch=full)
    task = Regression(kill_at=STEPS - 6)
    assert run(tmp_path, task) == undisturbed[0]
    assert same(weights(task), undisturbed[1])


def test_a_shard_that_is_cut_short_within_an_epoch_is_named_and_the_state_kept(tmp_path: Path) -> None:
    """And once it is whole again, the run ends as if nothing had been."""
    for folder in ("cut", "whole"):
        write_clips(tmp_path / folder)
    expected = FromDisk(Features(tmp_path / "whole", "fbank"), 1)
    run(tmp_path / "undisturbed", expected)
    path = tmp_path / "cut" / "00001.fbank.npy"
    content = path.read_bytes()
    task = FromDisk(Features(tmp_path / "cut", "fbank"), 0)
    loss = task.loss

    def cut_at_step_4(batch: Any, epoch: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        if epoch == 1:
            os.truncate(path, 130)
        return loss(batch, epoch, generator)

    task.loss = cut_at_step_4  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"00001\.fbank\.npy: ends before row \d+\. Delete it and run its stage again"):
        run(tmp_path / "run", task)
    assert not [t for t in threading.enumerate() if t.name.startswith("harken-")]
    assert (tmp_path / "run" / "state.safetensors").is_file()
    path.write_bytes(content)
    again = FromDisk(Features(tmp_path / "cut", "fbank"), 1)
    seen: list[list[float]] = []
    watched(tmp_path / "run", again, seen)
    assert seen[0] == [0]
    assert same(weights(again), weights(expected))


def test_a_shard_that_vanishes_is_read_to_the_end_and_missed_at_the_next_start(tmp_path: Path) -> None:
    """It is open: what was taken away stays readable until the run ends."""
    write_clips(tmp_path / "clips")
    features = Features(tmp_path / "clips", "fbank")
    (tmp_path / "clips" / "00001.fbank.npy").unlink()
    assert run(tmp_path / "run", FromDisk(features, 1)).step == STEPS
    with pytest.raises(DataError, match=r"00001\.fbank\.npy: missing beside its Parquet file"):
        Features(tmp_path / "clips", "fbank")


@pytest.mark.parametrize(
    ("select", "scores", "epoch"),
    [("best", [1.0, 3.0, 2.0], 1), ("best", [3.0, 3.0, 1.0], 0), ("last", [3.0, 2.0, 1.0], 2)],
)
def test_the_epoch_that_was_chosen_is_left_in_the_model(
    select: str, scores: list[float], epoch: int, tmp_path: Path
) -> None:
    task = Regression()
    task.scores = scores
    seen = []
    validate = task.validate

    def noting() -> Mapping[str, float]:
        seen.append(weights(task))
        return validate()

    task.validate = noting  # type: ignore[method-assign]
    state = run(tmp_path, task, select=select)
    assert (state.best_epoch, state.best) == (epoch, scores[epoch])
    assert same(weights(task), seen[epoch])
    assert not task.model.training


def test_every_group_follows_the_schedule_from_its_own_peak(tmp_path: Path) -> None:
    task, rates = Regression(), []
    optimizer = torch.optim.Adam(weight_bias_groups(task.model, lr_weight=0.05, lr_bias=0.01))
    step = optimizer.step

    def noting() -> None:
        rates.append([g["lr"] for g in optimizer.param_groups])
        step()

    optimizer.step = noting  # type: ignore[method-assign]
    plan = Plan(1, 5, lambda s: s / 2, None, 1, "last")
    fit(task, optimizer, Order(N, BATCH, 5), plan, tmp_path, "toy")
    assert rates == [[0.0, 0.0], [0.025, 0.005], [0.05, 0.01]]


def test_seeds_are_folded_into_63_bits() -> None:
    seeds = [fold(20, step) for step in range(1000)]
    assert len(set(seeds)) == 1000
    assert all(0 <= s < 2**63 for s in seeds)
    assert fold("a", 1) != fold("a1")
    assert fold(20, 3) == 6_371_488_964_718_832_137
