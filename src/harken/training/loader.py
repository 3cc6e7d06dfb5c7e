"""Batches read ahead of the training: while the model is at one, threads fill the next few, in memory that is reused.

What a batch holds is the order's to say, a function of (seed, epoch, step). Here is decided only how early it is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch

from harken.models.features import Part
from harken.training.batches import Clips, Features, Order, ShardOrder

# Batches that are read before they are asked for, and by how many threads: each has one to be at while the training is
# at another. More buffers would only leave the processor's cache sooner (with three ahead, a sixth slower).
AHEAD = READERS = 2
# What one request for a coming group of shards covers: little, so that whoever closes the loader waits for little.
STRETCH_BYTES = 1 << 22


class Batch(NamedTuple):
    """What a task's `loss` is given: the numbers of the training clips, the clips as read, and which of the batch they
    are where processes share it.
    """

    items: np.ndarray
    clips: Clips
    part: Part


@contextmanager
def _threads(n: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that are gone when the block is left; what they had not begun by then is dropped."""
    pool = ThreadPoolExecutor(n, name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def read_ahead(
    features: Features,
    batches: Iterable[np.ndarray],
    n_rows: int,
    device: torch.device,
    *,
    ahead: int = AHEAD,
    readers: int = READERS,
) -> Iterator[Iterator[Clips]]:
    """The clips of each batch (their numbers in `features`), cut or padded to `n_rows`, in the order of `batches`.

    Each is good until the next one is asked for: of `ahead + 1` buffers one is the caller's while the others are
    filled. An error of a reader is raised where its batch would have come. Leaving the block ends the threads.
    """
    with _threads(readers, "harken-reader") as pool:
        yield _in_turn(pool, features, iter(batches), n_rows, device, ahead + 1)


def _in_turn(
    pool: ThreadPoolExecutor,
    features: Features,
    batches: Iterator[np.ndarray],
    n_rows: int,
    device: torch.device,
    n_buffers: int,
) -> Iterator[Clips]:
    coming: deque[Future[Clips]] = deque()

    def begin(clips: Clips | None) -> None:
        numbers = next(batches, None)
        if numbers is None:
            return
        if clips is None or len(clips.array) < len(numbers):
            clips = features.room(len(numbers), n_rows, device)
        coming.append(pool.submit(features.fill, clips, numbers))

    for _ in range(n_buffers):
        begin(None)
    while coming:
        clips = coming.popleft().result()
        yield clips
        begin(clips)


def one_pass(
    features: Features, clip_ids: Sequence[str], batch: int, n_rows: int, device: torch.device
) -> AbstractContextManager[Iterator[Clips]]:
    """Clips once through in the given order, `batch` at a time, read ahead."""
    numbers = features.numbers(clip_ids)
    return read_ahead(features, (numbers[i : i + batch] for i in range(0, len(numbers), batch)), n_rows, device)


@dataclass(frozen=True)
class Loader:
    """The batches of any epoch from any step on, read ahead of whoever goes through them.

    Where the order goes by shards, a group's files are fetched from end to end while the group before it is gone
    through.
    """

    order: Order | ShardOrder
    features: Features
    clip_ids: Sequence[str]
    n_rows: int
    device: torch.device
    ahead: int = AHEAD
    readers: int = READERS

    @cached_property
    def _numbers(self) -> np.ndarray:
        return self.features.numbers(self.clip_ids)

    def epoch(self, epoch: int, first_step: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch from `first_step` on. Who leaves it early closes it: that ends its threads."""
        batches = list(self.order.epoch(epoch, first_step))
        with (
            _threads(1, "harken-fetcher") as fetcher,
            read_ahead(
                self.features,
                self._announced(batches, epoch, first_step, fetcher),
                self.n_rows,
                self.device,
                ahead=self.ahead,
                readers=self.readers,
            ) as read,
        ):
            for step, (items, clips) in enumerate(zip(batches, read, strict=True), start=first_step):
                yield Batch(items, clips, self.order.part(step))

    def _announced(
        self, batches: Sequence[np.ndarray], epoch: int, first_step: int, fetcher: ThreadPoolExecutor
    ) -> Iterator[np.ndarray]:
        """The numbers of each batch's clips; when a group of shards is reached, the next one is asked for."""
        order, none = self.order, repeat(list[np.ndarray]())
        upcoming = order.upcoming(epoch, first_step) if isinstance(order, ShardOrder) else none
        for items, groups in zip(batches, upcoming, strict=False):
            for group in groups:
                for array, start, n_rows in self.features.stretches(self._numbers[group], STRETCH_BYTES):
                    fetcher.submit(array.expect, start, n_rows)
            yield self._numbers[items]
