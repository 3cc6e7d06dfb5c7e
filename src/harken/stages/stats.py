"""Stage `stats`: dataset-level mean and standard deviation of the FBANK, over the valid frames of one training split.

Each clip's count, mean and sum of squared deviations were taken in float64 as its FBANK was written; here they are
merged exactly (Chan et al. 1979), in one order: the same numbers as one pass over all values, for any number of shards
and workers, without reading the values again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

from harken.clips import Manifest, Split
from harken.config import Config, Paths
from harken.engines import Map
from harken.errors import DataError
from harken.media.quality import Flag, flagged
from harken.media.sizes import FBANK_MELS
from harken.progress import track
from harken.shards import facts, fingerprint, publish, read_shard, shards_in, write_json

log = logging.getLogger("harken")
CODE = ("stages/stats.py", "media/quality.py", "media/sizes.py", "shards.py")


class StatsConfig(Config):
    """Which clips the statistics are of, and `pretrain` trains on.

    `exclude[dataset]` splits' clips are left out (AudioCaps val and test), and those with a flag in `leave_out`.
    `pad_to`: null for valid frames only; a number of rows, and shorter clips count as padded with raw zeros to it, as
    VIP-ANT's do (1000).
    """

    dataset: str
    split: Split
    exclude: dict[str, list[Split]]
    leave_out: list[Flag]
    pad_to: int | None


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
    ids = wanted_ids(paths, cfg)
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
            "leave_out": list(cfg.leave_out),
            "pad_to": cfg.pad_to,
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


def wanted_ids(paths: Paths, cfg: StatsConfig) -> frozenset[str]:
    """The clips of the split that the params do not leave out."""
    ids = training_ids(Manifest.read(paths.manifest), cfg.dataset, cfg.split, cfg.exclude)
    return frozenset(ids) - flagged(paths.features, cfg.leave_out)


def measurer(job: Job) -> Callable[[int], tuple[int, Moments, int]]:
    return partial(measure, job.paths.features, wanted_ids(job.paths, job.stats), job.stats.pad_to)


def measure(features: Path, ids: frozenset[str], pad_to: int | None, shard: int) -> tuple[int, Moments, int]:
    """The moments of one shard's wanted clips, and how many they were."""
    found = list(_moments(features, ids, pad_to, shard))
    return shard, reduce(Moments.merge, found, Moments(0, 0.0, 0.0)), len(found)


def _moments(features: Path, ids: frozenset[str], pad_to: int | None, shard: int) -> Iterator[Moments]:
    for row in read_shard(features, shard, ("fbank_rows", "fbank_mean", "fbank_squares")):
        if row["clip_id"] in ids:
            n_rows = row["fbank_rows"]
            valid = Moments(n_rows * FBANK_MELS, row["fbank_mean"], row["fbank_squares"])
            yield valid.merge(Moments(max(0, (pad_to or 0) - n_rows) * FBANK_MELS, 0.0, 0.0))
