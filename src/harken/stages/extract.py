"""Stage `extract`: media shards -> feature shards (n equally spaced images, a Kaldi FBANK and a log-mel per clip).

FBANK is of the first audio channel (Tsubaki et al.), the log-mel of the mean of the channels (Mei et al.).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from harken.config import Config, Paths
from harken.engines import Map
from harken.errors import ClipError
from harken.media.decode import decode
from harken.media.fbank import FBANKS, N_MELS
from harken.media.images import jpeg, resize_short_side
from harken.media.logmel import N_MELS as LOGMEL_BINS
from harken.media.logmel import SAMPLE_RATE_HZ as LOGMEL_RATE_HZ
from harken.media.logmel import logmel
from harken.progress import track
from harken.shards import (
    OK,
    Outcome,
    ShardWriter,
    code_version,
    facts,
    fingerprint,
    pending,
    publish_shards,
    read_shard,
    shards_in,
)

log = logging.getLogger("harken")
CODE = ("stages/extract.py", "media", "shards.py")
COLUMNS = {"images": pa.list_(pa.binary()), "image_times_s": pa.list_(pa.float64()), "duration_s": pa.float64()}


class ExtractConfig(Config):
    """What is taken from each clip. `max_s` cuts longer clips (Clotho: 30 s); features are stored as `dtype`."""

    n_images: int
    image_times: Literal["endpoints", "centres"]
    image_short_side: int
    jpeg_quality: int
    sample_rate_hz: int
    fbank: Literal["harken", "torchaudio", "kaldi"]
    max_s: float
    dtype: Literal["float16", "float32"]


class Job(Config):
    paths: Paths
    extract: ExtractConfig


def run(paths: Paths, cfg: ExtractConfig, map: Map) -> None:
    """Fill `paths.features` with one shard for every shard of `paths.media`."""
    work, code = paths.work / "extract", code_version(CODE)
    jobs = {s: fingerprint(cfg.model_dump(), code, facts(paths.media, s)["digest"]) for s in shards_in(paths.media)}
    todo = [(s, jobs[s]) for s in pending(work, jobs)]
    tally: Counter[str] = Counter()
    for outcomes in track(map(extractor, Job(paths=paths, extract=cfg), todo), len(todo), "extract: shards"):
        tally.update(o.reason or OK for o in outcomes)
    publish_shards(work, paths.features, jobs)
    if tally:
        log.info("clips: %s", dict(tally))


def extractor(job: Job) -> Callable[[tuple[int, str]], list[Outcome]]:
    return partial(extract_shard, job)


def extract_shard(job: Job, item: tuple[int, str]) -> list[Outcome]:
    shard, mark = item
    cfg, work = job.extract, job.paths.work / "extract"
    meta = {
        "n_images": str(cfg.n_images),
        "fbank": f"{cfg.fbank} {N_MELS} mel bins, {cfg.sample_rate_hz} Hz, 25/10 ms, first channel",
        "logmel": f"{LOGMEL_BINS} mel bins, {LOGMEL_RATE_HZ} Hz, 32/10 ms, mean of channels",
    }
    arrays = {"fbank": (N_MELS, cfg.dtype), "logmel": (LOGMEL_BINS, cfg.dtype)}
    with ShardWriter(work, shard, fingerprint=mark, columns=COLUMNS, arrays=arrays, meta=meta) as out:
        for row in read_shard(job.paths.media, shard, ("media", "start_s", "end_s", "has_images")):
            try:
                out.write(row["clip_id"], **features(row, cfg))
            except ClipError as e:
                out.skip(row["clip_id"], e.reason, e.message)
    return out.outcomes


def features(row: dict[str, Any], cfg: ExtractConfig) -> dict[str, Any]:
    """One clip's images (JPEG) and dense features. Raises ClipError where the media does not decode after all."""
    start_s, end_s = row["start_s"], min(row["end_s"], row["start_s"] + cfg.max_s)
    rates = tuple(sorted({cfg.sample_rate_hz, LOGMEL_RATE_HZ}))
    n_images = cfg.n_images if row["has_images"] else 0
    clip = decode(row["media"], start_s, end_s, n_images=n_images, timestamps=cfg.image_times, sample_rates_hz=rates)
    pictures = [jpeg(resize_short_side(i, cfg.image_short_side), cfg.jpeg_quality) for i in clip.images]
    mono = clip.audio[LOGMEL_RATE_HZ].mean(axis=0, dtype=np.float32)
    return {
        "images": pictures or None,
        "image_times_s": clip.image_times_s or None,
        "duration_s": end_s - start_s,
        "fbank": FBANKS[cfg.fbank](clip.audio[cfg.sample_rate_hz][0], cfg.sample_rate_hz),
        "logmel": logmel(mono, LOGMEL_RATE_HZ),
    }
