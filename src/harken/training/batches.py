"""Feature shards -> padded batches. Which clips make a batch is a function of (seed, epoch, step): resume is two
integers, and neither the number of readers nor their speed has a say.
"""

from __future__ import annotations

import resource
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from harken.errors import ConfigError, DataError
from harken.models.features import Part
from harken.shards import DenseArray, read_table


class Clips:
    """Room for a batch of clips, as they lie on the disk: `values` (clip, row, width) in the stored dtype.

    Made by `Features.room` and filled by `Features.fill`, again and again; `numbers` are then the clips that it holds.
    """

    def __init__(self, n_clips: int, n_rows: int, width: int, dtype: torch.dtype, page_locked: bool) -> None:
        self._room = torch.empty((n_clips, n_rows, width), dtype=dtype, pin_memory=page_locked)
        self._copied: torch.cuda.Event | None = None
        self.array: np.ndarray = self._room.numpy()
        """The same memory: all of it, whatever it holds."""
        self.numbers = np.empty(0, np.int64)
        self.n_valid = np.empty(0, np.int64)
        """(clip,): how many rows of each are its own."""

    @property
    def values(self) -> Tensor:
        """(clip, row, width), cut or padded with raw zeros; good until the next `fill`."""
        return self._room[: len(self.numbers)]

    def on(self, device: torch.device) -> Float[Tensor, "clip row width"]:
        """The values as float32 on a device, in memory of their own.

        What travels is what is stored: half as much as float32, and a GPU widens it faster than the CPU would.
        """
        there = self.values.to(device, non_blocking=True)
        if there.is_cuda:
            self._copied = torch.cuda.current_stream(device).record_event()
        return there.to(torch.float32, copy=True)

    def valid_on(self, device: torch.device) -> Bool[Tensor, "clip row"]:
        """Which rows are a clip's own."""
        return torch.arange(self._room.shape[1], device=device) < torch.from_numpy(self.n_valid).to(device)[:, None]

    def wait(self) -> None:
        """Wait until no device copies from this memory any more."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


class Features:
    """Random access to one dense feature (`fbank` or `logmel`) of every ok clip of a folder of shards.

    A clip's number is its place in the folder; whoever reads often turns ids into numbers once.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        table = read_table(folder, [f"{name}_start", f"{name}_rows"])
        self._number: dict[str, int] = {c: i for i, c in enumerate(table["clip_id"].to_pylist())}
        self._shard, self._start, self._rows = (
            table[c].to_numpy().astype(np.int64) for c in ("shard", f"{name}_start", f"{name}_rows")
        )
        shards = pc.unique(table["shard"]).to_pylist()
        if not shards:
            raise DataError(f"{folder}: every clip failed; `harken status` says why.")
        _allow_open_files(len(shards))
        self._arrays = {s: DenseArray(folder, s, name) for s in shards}
        first = next(iter(self._arrays.values()))
        self.width = int(first.shape[1])
        self._dtype = torch.from_numpy(np.empty(0, first.dtype)).dtype

    def __contains__(self, clip_id: object) -> bool:
        return clip_id in self._number

    def rows(self, clip_id: str) -> int:
        """How many feature rows the clip has."""
        return int(self._rows[self._number[clip_id]])

    @property
    def all(self) -> frozenset[str]:
        """Every clip."""
        return frozenset(self._number)

    @property
    def most_rows(self) -> int:
        """How many rows the longest clip has."""
        return int(self._rows.max())

    def at_least(self, n_rows: int) -> frozenset[str]:
        """The clips that have so many rows."""
        return frozenset(c for c, i in self._number.items() if self._rows[i] >= n_rows)

    def numbers(self, clip_ids: Sequence[str]) -> np.ndarray:
        """The clips' numbers. Raises DataError where one has no features."""
        try:
            return np.array([self._number[c] for c in clip_ids], np.int64)
        except KeyError as e:
            raise DataError(f"{e.args[0]} has no {self.name} features; it failed in an earlier stage.") from None

    def shards(self, numbers: np.ndarray) -> np.ndarray:
        """The shard that each clip lies in."""
        return self._shard[numbers]

    def room(self, n_clips: int, n_rows: int, device: torch.device) -> Clips:
        """Memory for a batch of up to `n_clips`, page-locked where the device is a GPU."""
        return Clips(n_clips, n_rows, self.width, self._dtype, device.type == "cuda")

    def fill(self, clips: Clips, numbers: np.ndarray) -> Clips:
        """Read clips into `clips`, cut or padded with raw zeros to its rows, and return it. Any thread may call this.

        One system call a clip while they are in memory. From the first one that is not, the kernel is told of all
        the rest before that one is waited for: a disk that is asked for 32 clips at once gave 1.3 to 1.6 times the
        clips of one that is asked for each in turn. Telling it always would cost 15 % where all is in memory.
        """
        clips.wait()
        n_rows = clips.array.shape[1]
        n_valid = np.minimum(self._rows[numbers], n_rows)
        where = zip(self._shard[numbers].tolist(), self._start[numbers].tolist(), n_valid.tolist(), strict=True)
        wanted = [(self._arrays[shard], start, rows) for shard, start, rows in where]
        parts = [out[:rows] for out, (_, _, rows) in zip(clips.array[: len(numbers)], wanted, strict=True)]
        for i, (array, start, _) in enumerate(wanted):
            if not array.read_into(start, parts[i], wait=False):
                _read_cold(wanted[i:], parts[i:])
                break
        for out, rows in zip(clips.array, n_valid.tolist(), strict=False):
            out[rows:] = 0
        clips.numbers, clips.n_valid = numbers, n_valid
        return clips

    def read(
        self, clip_ids: Sequence[str], n_rows: int
    ) -> tuple[Float[Tensor, "clip row width"], Bool[Tensor, "clip row"]]:
        """The clips' features cut or padded with raw zeros to `n_rows`, in float32, and which rows are valid."""
        cpu = torch.device("cpu")
        clips = self.fill(self.room(len(clip_ids), n_rows, cpu), self.numbers(clip_ids))
        return clips.on(cpu), clips.valid_on(cpu)

    def stretches(self, numbers: np.ndarray, at_most_bytes: int) -> Iterator[tuple[DenseArray, int, int]]:
        """(array, first row, rows) of clips in the order in which they lie on the disk, neighbours joined."""
        # by rows too: a clip of none stands before its neighbour, not between it and the next
        numbers = numbers[np.lexsort((self._rows[numbers], self._start[numbers], self._shard[numbers]))]
        shards, starts, ends = self._shard[numbers], self._start[numbers], self._start[numbers] + self._rows[numbers]
        apart = (shards[1:] != shards[:-1]) | (starts[1:] != ends[:-1])
        first = np.flatnonzero(np.r_[np.ones(min(1, len(numbers)), bool), apart])
        last = np.r_[first[1:], len(numbers)][: len(first)] - 1
        for shard, start, end in zip(shards[first].tolist(), starts[first].tolist(), ends[last].tolist(), strict=True):
            array = self._arrays[shard]
            step = max(1, at_most_bytes // array.row_bytes)
            for row in range(start, end, step):
                yield array, row, min(step, end - row)


def _read_cold(wanted: Sequence[tuple[DenseArray, int, int]], parts: Sequence[np.ndarray]) -> None:
    """Read (array, first row, rows) into `parts`, the kernel being told of all before the first is waited for."""
    for array, start, rows in wanted:
        array.expect(start, rows)
    for (array, start, _), part in zip(wanted, parts, strict=True):
        array.read_into(start, part)


def _allow_open_files(n: int) -> None:
    """Raise the soft limit on open files so that `n` shards fit: real corpora have thousands, the default is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # three folders of shards may be read in one process, and the process has files of its own
    needed = 3 * n + 256
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ConfigError(
                f"{n} shards are read at once and this machine allows {hard} open files. Try `ulimit -n`."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _too_few(n: int, batch: int) -> DataError:
    return DataError(f"{n} training clips do not fill a batch of {batch}. Lower the batch or get more clips.")


def _check_ranks(rank: int, world: int, batch: int) -> None:
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} of {world} processes: expected 0 to {world - 1}.")
    if batch % world:
        raise ConfigError(f"A batch of {batch} cannot be shared by {world} processes: make it a multiple of {world}.")


@dataclass(frozen=True)
class Order:
    """The order of `n` items in each epoch, cut into batches. The last batch is smaller unless `drop_last`.

    Of `world` processes each takes its own part of every batch: together they see the batches that one alone would.
    `clips` (item,) is each item's clip where items are captions: an epoch then goes through the clips again and again
    until every caption was met, and no batch has two captions of one clip. Raises ConfigError where batches are too
    large for that.
    """

    n: int
    batch: int
    seed: int
    drop_last: bool = False
    rank: int = 0
    world: int = 1
    clips: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.n < 1 or (self.drop_last and self.n < self.batch):
            raise _too_few(self.n, self.batch)
        if self.clips is not None and (n := len(np.unique(self.clips))) < self.batch:
            raise ConfigError(
                f"Batches of {self.batch} captions of different clips need as many clips, found {n}. Lower the "
                "batch, or let an epoch be one of clips."
            )
        _check_ranks(self.rank, self.world, self.batch)
        if not self.drop_last and 0 < self.n % self.batch < self.world:
            raise ConfigError(
                f"The last of {self.n} clips in batches of {self.batch} are too few for {self.world} processes. "
                "Drop the last batch."
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.n // self.batch if self.drop_last else -(-self.n // self.batch)

    def epoch(self, epoch: int, first_step: int = 0) -> Generator[np.ndarray, None, None]:
        """The item numbers of each batch of an epoch, from `first_step` on; of several processes, this one's part."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.n) if self.clips is None else _spread(rng, self.clips, self.batch)
        for step in range(first_step, self.steps_per_epoch):
            yield np.array_split(order[step * self.batch : (step + 1) * self.batch], self.world)[self.rank]

    def part(self, step: int) -> Part:
        """Which clips of the batch that all processes share are this one's, at a step of any epoch."""
        size = min(self.batch, self.n - step * self.batch)
        share, extra = divmod(size, self.world)
        return Part(self.rank * share + min(self.rank, extra), size)


def _spread(rng: np.random.Generator, clips: np.ndarray, batch: int) -> np.ndarray:
    """A random order of captions in which those of a clip lie evenly over the epoch, and none share a batch."""
    order = rng.permutation(len(clips))
    nth, n = _counted(clips[order])
    order = order[np.argsort((nth + rng.random(len(clips))) / n)]
    for start in range(0, len(order), batch):
        met: set[int] = set()
        for at in range(start, min(start + batch, len(order))):
            if clips[order[at]] in met:
                other = _elsewhere(order, clips, at, batch, met)
                if other is None:
                    return _tight(rng, clips, batch)
                order[at], order[other] = order[other], order[at]
            met.add(int(clips[order[at]]))
    return order


def _elsewhere(order: np.ndarray, clips: np.ndarray, at: int, batch: int, met: set[int]) -> int | None:
    """A place whose caption can change places with that at `at`: sooner to come first, else in a batch before."""
    for i in range(at + 1, len(order)):
        if int(clips[order[i]]) not in met:
            return i
    own = clips[order[at]]
    first = at // batch * batch
    for i in range(first - 1, -1, -1):
        there = clips[order[i // batch * batch : i // batch * batch + batch]]
        if own not in there and clips[order[i]] not in clips[order[first:]]:
            return i
    return None


def _tight(rng: np.random.Generator, clips: np.ndarray, batch: int) -> np.ndarray:
    """An order wherever there is one: each batch takes the clips that have most captions left (Ryser 1957).

    Needed where batches are nearly as large as there are clips. Raises ConfigError where no order is such.
    """
    shuffled = rng.permutation(len(clips))
    by_clip = shuffled[np.argsort(clips[shuffled], kind="stable")]
    left = [w.tolist() for w in np.split(by_clip, np.flatnonzero(np.diff(clips[by_clip])) + 1)]
    order: list[int] = []
    while len(order) < len(clips):
        chosen = sorted(left, key=lambda w: (-len(w), rng.random()))[: min(batch, len(clips) - len(order))]
        if not all(chosen):
            raise ConfigError(
                f"No order of these captions has batches of {batch} without a clip twice. Lower the batch."
            )
        order += [w.pop() for w in chosen]
    return np.array(order)


def _counted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each value came before, and how often it comes in all."""
    by_value = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.r_[True, values[by_value][1:] != values[by_value][:-1]])
    counts = np.diff(np.r_[starts, len(values)])
    before, total = np.empty(len(values), np.int64), np.empty(len(values), np.int64)
    before[by_value] = np.arange(len(values)) - np.repeat(starts, counts)
    total[by_value] = np.repeat(counts, counts)
    return before, total


@dataclass(frozen=True, eq=False)
class ShardOrder:
    """An order for data that do not fit in memory: each epoch goes once through the shards, `at_once` at a time.

    The shards are shuffled, then the clips of every group of `at_once` shards together. A group's files can so be read
    from end to end while the group before it is trained on, which disks and networks do faster than reading clips here
    and there; two groups must fit in memory. What it costs is chance: clips of shards that are far apart in an epoch
    never meet in a batch. A clip's shard is a hash of its recording, so a group is a random sample of the corpus all
    the same, and groups are drawn anew each epoch; with `at_once` shards or fewer in all it is one whole shuffle.

    Of `world` processes each has shards of its own and reads no other; they all make as many whole batches as the one
    that has the fewest clips, so `drop_last` must be set, and the batches are others than one process alone would make.
    """

    shards: np.ndarray
    """(item,): the shard of each item."""
    at_once: int
    batch: int
    seed: int
    drop_last: bool = False
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        _check_ranks(self.rank, self.world, self.batch)
        if self.at_once < 1:
            raise ConfigError(f"{self.at_once} shards at once: expected 1 or more.")
        if self.world > 1 and not self.drop_last:
            raise ConfigError(f"{self.world} processes with shards of their own need whole batches: drop the last one.")
        if not len(self.shards) or self.steps_per_epoch < 1:
            raise _too_few(len(self.shards), self.batch)

    @property
    def _share(self) -> int:
        return self.batch // self.world

    @cached_property
    def _by_shard(self) -> list[np.ndarray]:
        """The items of each shard, shards ascending."""
        order = np.argsort(self.shards, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self.shards[order])) + 1)

    @cached_property
    def steps_per_epoch(self) -> int:
        fewest = min(sum(map(len, self._by_shard[r :: self.world])) for r in range(self.world))
        return fewest // self._share if self.drop_last else -(-fewest // self._share)

    def groups(self, epoch: int) -> list[np.ndarray]:
        """This process's items in the order of an epoch, cut where the next shards begin."""
        rng = np.random.default_rng((self.seed, epoch, self.rank))
        own = self._by_shard[self.rank :: self.world]
        # as even as can be: a small last group would be shuffled less well
        parts = np.array_split(rng.permutation(len(own)), -(-len(own) // self.at_once))
        return [rng.permutation(np.concatenate([own[s] for s in part])) for part in parts]

    def epoch(self, epoch: int, first_step: int = 0) -> Generator[np.ndarray, None, None]:
        """The item numbers of each of this process's batches of an epoch, from `first_step` on."""
        order = np.concatenate(self.groups(epoch))
        for step in range(first_step, self.steps_per_epoch):
            yield order[step * self._share : (step + 1) * self._share]

    def part(self, step: int) -> Part:
        """Which clips of the batch that all processes share are this one's, at a step of any epoch."""
        if self.world > 1:
            return Part(self.rank * self._share, self.batch)
        return Part(0, min(self.batch, len(self.shards) - step * self.batch))

    def upcoming(self, epoch: int, first_step: int = 0) -> Iterator[list[np.ndarray]]:
        """For each batch of `epoch`, the groups to be fetched when it is: its own at first, then always the next."""
        groups = self.groups(epoch)
        ends = np.cumsum([len(g) for g in groups])
        done = int(np.searchsorted(ends, first_step * self._share, "right"))  # what lies behind is not fetched
        for step in range(first_step, self.steps_per_epoch):
            last = int(np.searchsorted(ends, min((step + 1) * self._share, ends[-1]) - 1, "right"))
            yield groups[done : last + 2]
            done = max(done, last + 2)
