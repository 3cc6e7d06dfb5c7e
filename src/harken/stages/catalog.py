"""Stage `catalog`: the official lists -> one manifest of what should exist, with every clip's shard."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pyarrow.parquet as pq

from harken.clips import Clip, Manifest, Split, youtube_id
from harken.config import Config, Paths
from harken.datasets import DATASETS
from harken.engines import Map
from harken.errors import ConfigError, DataError, unknown
from harken.shards import atomic, publish, write_json

log = logging.getLogger("harken")
CODE = ("stages/catalog.py", "clips.py", "datasets")


class CatalogConfig(Config):
    """`lists[dataset][split]` is a file under `paths.lists`; `n_shards` shards hold all clips, a few hundred each."""

    lists: dict[str, dict[Split, str]]
    n_shards: int


def run(paths: Paths, cfg: CatalogConfig, map: Map) -> None:
    """Write clips.parquet. Raises ConfigError for unknown datasets, DataError for lists that are wrong or empty."""
    if cfg.n_shards < 1:
        raise ConfigError(f"params.yaml: catalog.n_shards is {cfg.n_shards}; expected 1 or more.")
    for name in cfg.lists:
        if name not in DATASETS:
            raise unknown("params.yaml: catalog.lists", name, DATASETS)
    manifest = Manifest.build(_clips(paths, cfg), cfg.n_shards)
    work = paths.work / "catalog"
    work.mkdir(parents=True, exist_ok=True)
    with atomic(work / "clips.parquet") as f:
        pq.write_table(manifest.table, f, compression="zstd", write_statistics=False)
    counts = {f"{d}/{s}": len(manifest.of(d, s)) for d, s in manifest.splits()}
    write_json(work / "counts.json", counts)
    publish(work, paths.manifest, ["clips.parquet", "counts.json"])
    for name, n in counts.items():
        log.info("%-18s %9d clips", name, n)


def _clips(paths: Paths, cfg: CatalogConfig) -> Iterator[Clip]:
    """Every list's clips. AudioSet goes first: it states ends, which AudioCaps' lists leave to a 10 s convention."""
    times: dict[tuple[str, int], tuple[float, float]] = {}
    captioned = "audiocaps" in cfg.lists
    for dataset in sorted(cfg.lists, key=lambda name: (name != "audioset", name)):
        for split, name in cfg.lists[dataset].items():
            path = paths.lists / name
            if not path.is_file():
                raise DataError(f"{path}: no such list. Check `catalog.lists.{dataset}.{split}` against `lists.files`.")
            seen: Counter[str] = Counter()
            for clip in DATASETS[dataset].clips(path, split=split):
                # AudioCaps truncates fractional starts, so the whole second is the key both share
                key = (clip.source.key, int(clip.start_s))
                if captioned and dataset == "audioset" and clip.end_s is not None:
                    times[key] = clip.start_s, clip.end_s
                elif dataset == "audiocaps" and key in times:
                    start_s, end_s = times[key]
                    clip = replace(clip, id=youtube_id(clip.source.key, start_s, end_s), start_s=start_s, end_s=end_s)
                seen[clip.id] += 1
                yield clip
            if not seen:
                raise DataError(
                    f"{path}: lists no clips. An empty {dataset} {split} split cannot be used; remove it from params."
                )
            if doubled := [i for i, n in seen.items() if n > 1]:
                raise DataError(
                    f"{path}: {len(doubled)} clips are listed twice, first {doubled[0]}. Get the official file."
                )
