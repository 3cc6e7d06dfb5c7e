"""Stage `stats`: dataset-level mean and standard deviation of the FBANK, over the valid frames of one training split.

Streamed in float64, one (count, mean, sum of squared deviations) per shard, merged exactly (Chan et al. 1979): the same
numbers for any number of shards and workers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harken.clips import Manifest, Split
from harken.config import Config, Paths
from harken.engines import Map
from harken.errors import DataError
from harken.progress import track
from harken.shards import DenseArray, facts, fingerprint, publish, read_shard, shards_in, write_json

log = logging.getLogger("harken")
CODE = ("stages/stats.py", "shards.py")


class StatsConfig(Config):
    """Which clips the statistics are of; `exclude[dataset]` splits' clips are left out (AudioCaps val and test)."""

    dataset: str
    split: Split
    exclude: dict[str, list[Split]]


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of a set of numbers."""

    n: int
    mean: float
    squares: float

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together."""
        if not self.n or not other.n:
            return self if self.n else other
        n = self.n + other.n
        delta = other.mean - self.mean
        mean = self.mean + delta * other.n / n
        return Moments(n, mean, self.squares + other.squares + delta**2 * self.n * other.n / n)


class Job(Config):
    paths: Paths
    stats: StatsConfig


def run(paths: Paths, cfg: StatsConfig, map: Map) -> None:
    """Write stats.json: mean, std, n_values, n_clips and what they were computed on."""
    ids = training_ids(Manifest.read(paths.manifest), cfg.dataset, cfg.split, cfg.exclude)
    shards = shards_in(paths.features)
    parts = list(track(map(measurer, Job(paths=paths, stats=cfg), shards), len(shards), "stats: shards"))
    parts.sort()  # by shard: merging in one order gives the same last bit however the workers raced
    total = reduce(Moments.merge, (m for _, m, _ in parts), Moments(0, 0.0, 0.0))
    if total.n < 2:
        raise DataError(f"{paths.features}: no ok clip of {cfg.dataset} {cfg.split} to take statistics of.")
    digest = fingerprint([facts(paths.features, s)["digest"] for s in shards], sorted(ids))
    write_json(
        paths.work / "stats" / "stats.json",
        {
            "mean": total.mean,
            "std": math.sqrt(total.squares / total.n),
            "n_values": total.n,
            "n_clips": sum(n for _, _, n in parts),
            "dataset": cfg.dataset,
            "split": str(cfg.split),
            "exclude": {k: [str(s) for s in v] for k, v in cfg.exclude.items()},
            "fbank": facts(paths.features, shards[0])["fbank"],
            "computed_on": digest,
        },
    )
    publish(paths.work / "stats", paths.stats, ["stats.json"])
    log.info("fbank mean %.4f std %.4f", total.mean, math.sqrt(total.squares / total.n))


def training_ids(manifest: Manifest, dataset: str, split: str, exclude: dict[str, list[Split]]) -> list[str]:
    """The clip ids of a split less those that stand in the excluded splits, in the list's order."""
    held_out = {i for d, splits in exclude.items() for s in splits for i in manifest.of(d, s)["clip_id"].to_pylist()}
    return [i for i in manifest.of(dataset, split)["clip_id"].to_pylist() if i not in held_out]


def measurer(job: Job) -> Callable[[int], tuple[int, Moments, int]]:
    cfg = job.stats
    ids = training_ids(Manifest.read(job.paths.manifest), cfg.dataset, cfg.split, cfg.exclude)
    return partial(measure, job.paths.features, frozenset(ids))


def measure(features: Path, ids: frozenset[str], shard: int) -> tuple[int, Moments, int]:
    """The moments of one shard's wanted clips, and how many they were."""
    array = DenseArray(features, shard, "fbank")
    total, n_clips = Moments(0, 0.0, 0.0), 0
    for row in read_shard(features, shard, ("fbank_start", "fbank_rows")):
        if row["clip_id"] in ids:
            values = np.empty((row["fbank_rows"], array.shape[1]), array.dtype)
            array.read_into(row["fbank_start"], values)
            values = values.astype(np.float64)
            mean = float(values.mean())
            total = total.merge(Moments(values.size, mean, float(((values - mean) ** 2).sum())))
            n_clips += 1
    return shard, total, n_clips
