"""Feature shards -> padded batches. Which clips make a batch is a function of (seed, epoch): resume is two integers."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from harken.errors import ConfigError, DataError
from harken.shards import DenseArray, read_table


class Features:
    """Random access to one dense feature (`fbank` or `logmel`) of every ok clip of a folder of shards."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        table = read_table(folder, [f"{name}_start", f"{name}_rows"])
        ids = table["clip_id"].to_pylist()
        where = zip(*(table[c].to_pylist() for c in ("shard", f"{name}_start", f"{name}_rows")), strict=True)
        self._where: dict[str, tuple[int, int, int]] = dict(zip(ids, where, strict=True))
        shards = pc.unique(table["shard"]).to_pylist()
        if not shards:
            raise DataError(f"{folder}: every clip failed; `harken status` says why.")
        _allow_open_files(len(shards))
        self._arrays = {s: DenseArray(folder, s, name) for s in shards}
        self.width = int(next(iter(self._arrays.values())).shape[1])

    def __contains__(self, clip_id: object) -> bool:
        return clip_id in self._where

    def rows(self, clip_id: str) -> int:
        """How many feature rows the clip has."""
        return self._where[clip_id][2]

    def read(
        self, clip_ids: Sequence[str], n_rows: int
    ) -> tuple[Float[Tensor, "clip row width"], Bool[Tensor, "clip row"]]:
        """The clips' features cut or padded with raw zeros to `n_rows`, as stored, and which rows are valid."""
        first = next(iter(self._arrays.values()))
        out = np.zeros((len(clip_ids), n_rows, self.width), first.dtype)
        valid = np.zeros((len(clip_ids), n_rows), bool)
        for i, clip_id in enumerate(clip_ids):
            try:
                shard, start, rows = self._where[clip_id]
            except KeyError:
                raise DataError(f"{clip_id} has no {self.name} features; it failed in an earlier stage.") from None
            rows = min(rows, n_rows)
            self._arrays[shard].read_into(start, out[i, :rows])
            valid[i, :rows] = True
        return torch.from_numpy(out).float(), torch.from_numpy(valid)


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


@dataclass(frozen=True)
class Order:
    """The order of `n` items in each epoch, cut into batches. The last batch is smaller unless `drop_last`."""

    n: int
    batch: int
    seed: int
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or (self.drop_last and self.n < self.batch):
            raise DataError(
                f"{self.n} training clips do not fill a batch of {self.batch}. Lower the batch or get more clips."
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.n // self.batch if self.drop_last else -(-self.n // self.batch)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[np.ndarray]:
        """The item numbers of each batch of an epoch, from `first_step` on."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
        for step in range(first_step, self.steps_per_epoch):
            yield order[step * self.batch : (step + 1) * self.batch]
