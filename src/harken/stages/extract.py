"""Stage `extract`: media shards -> feature shards (n equally spaced images, a Kaldi FBANK and a log-mel per clip).

FBANK is of the first audio channel (Tsubaki et al.), the log-mel of the mean of the channels (Mei et al.). Each worker
has its clips decoded by a child process, which it ends where a clip takes too long, too much memory, or the child with
it: such a clip fails alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from harken.config import Config, Paths
from harken.engines import Map
from harken.errors import ClipError
from harken.guard import OVER_LIMITS, Guard
from harken.media import quality
from harken.media.decode import Mix, decode
from harken.media.images import jpeg
from harken.media.quality import Quality
from harken.media.sizes import FBANK_MELS, LOGMEL_MELS, LOGMEL_RATE_HZ, LOGMEL_SHORTEST
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
CODE = (
    "stages/extract.py",
    "media/containers.py",
    "media/decode.py",
    "media/fbank.py",
    "media/images.py",
    "media/logmel.py",
    "media/mel.py",
    "media/quality.py",
    "media/resize.py",
    "media/sizes.py",
    "guard.py",
    "shards.py",
)
COLUMNS = {
    "images": pa.list_(pa.binary()),
    "image_times_s": pa.list_(pa.float64()),
    "duration_s": pa.float64(),
    "fbank_mean": pa.float64(),
    "fbank_squares": pa.float64(),
    **quality.FACTS,
}
JUDGED = {"limit_s", "memory_gb", "quality"}  # what a change of decides about some clips, without touching the others


class ExtractConfig(Config):
    """What is taken from each clip. `max_s` cuts longer clips (Clotho: 30 s); features are stored as `dtype`.

    `sample_rate_hz` is FBANK's: a rate in Hz, or `native`, each recording's own (VIP-ANT). A clip that takes longer
    than `limit_s` or more than `memory_gb` fails; `quality` has the bounds of the flags.
    """

    n_images: int
    image_times: Literal["endpoints", "centres"]
    image_short_side: int
    jpeg_quality: int
    sample_rate_hz: int | Literal["native"]
    fbank: Literal["harken", "torchaudio", "kaldi"]
    max_s: float
    dtype: Literal["float16", "float32"]
    limit_s: float
    memory_gb: float
    quality: Quality


class Job(Config):
    paths: Paths
    extract: ExtractConfig


def run(paths: Paths, cfg: ExtractConfig, map: Map) -> None:
    """Fill `paths.features` with one shard for every shard of `paths.media`, and judge the quality of their clips."""
    work, code = paths.work / "extract", code_version(CODE)
    how = cfg.model_dump(exclude=JUDGED)
    jobs = {s: fingerprint(how, code, facts(paths.media, s)["digest"]) for s in shards_in(paths.media)}
    _drop_ended_by_other_limits(work, cfg)
    todo = [(s, jobs[s]) for s in pending(work, jobs)]
    tally: Counter[str] = Counter()
    for outcomes in track(map(extractor, Job(paths=paths, extract=cfg), todo), len(todo), "extract: shards"):
        tally.update(o.reason or OK for o in outcomes)
    publish_shards(work, paths.features, jobs)
    flags = quality.judge(paths.features, cfg.quality, paths.features / quality.FILE)
    if tally:
        log.info("clips: %s", dict(tally))
    if any(flags.values()):
        log.info("flags: %s", {flag: n for flag, n in flags.items() if n})


def _drop_ended_by_other_limits(work: Path, cfg: ExtractConfig) -> None:
    """A shard in which a limit ended a clip is made again when the limits change; the others do not depend on them."""
    for path in work.glob("*.parquet"):
        told = facts(work, int(path.stem))
        if told.get("ended") not in (None, "0") and told["limits"] != _limits(cfg):
            path.unlink()


def _limits(cfg: ExtractConfig) -> str:
    return f"{cfg.limit_s} s, {cfg.memory_gb} GB"


def extractor(job: Job) -> Callable[[tuple[int, str]], list[Outcome]]:
    guard: Guard[dict[str, Any], dict[str, Any]] = Guard(
        featurer, job.extract, limit_s=job.extract.limit_s, memory_gb=job.extract.memory_gb
    )
    return partial(extract_shard, job, guard)


def extract_shard(job: Job, guard: Guard[dict[str, Any], dict[str, Any]], item: tuple[int, str]) -> list[Outcome]:
    shard, mark = item
    cfg, work = job.extract, job.paths.work / "extract"
    rate = "each recording's own rate" if cfg.sample_rate_hz == "native" else f"{cfg.sample_rate_hz} Hz"
    meta = {
        "n_images": str(cfg.n_images),
        "fbank": f"{cfg.fbank} {FBANK_MELS} mel bins, {rate}, 25/10 ms, first channel",
        "logmel": f"{LOGMEL_MELS} mel bins, {LOGMEL_RATE_HZ} Hz, 32/10 ms, mean of channels",
        "images": f"short side {cfg.image_short_side}, JPEG quality {cfg.jpeg_quality}",
        "limits": _limits(cfg),
    }
    arrays = {"fbank": (FBANK_MELS, cfg.dtype), "logmel": (LOGMEL_MELS, cfg.dtype)}
    with ShardWriter(work, shard, fingerprint=mark, columns=COLUMNS, arrays=arrays, meta=meta) as out:
        rows = read_shard(job.paths.media, shard, ("media", "start_s", "end_s", "has_images"))
        for clip_id, found in guard.map((row["clip_id"], row) for row in rows):
            if isinstance(found, ClipError):
                out.skip(clip_id, found.reason, found.message)
            else:
                out.write(clip_id, **found)
        out.meta["ended"] = str(sum(o.reason in OVER_LIMITS for o in out.outcomes))
    return out.outcomes


def featurer(cfg: ExtractConfig) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The features of a row of a media shard; in the child, which alone needs torch."""
    import torch

    from harken.media.fbank import FBANKS
    from harken.media.logmel import logmel
    from harken.media.resize import resize_short_side

    dtype = torch.float16 if cfg.dtype == "float16" else torch.float32
    fbank_rate_hz = None if cfg.sample_rate_hz == "native" else cfg.sample_rate_hz
    first: tuple[Mix, int | None] = ("first", fbank_rate_hz)
    mean: tuple[Mix, int | None] = ("mean", LOGMEL_RATE_HZ)

    def stored(values: np.ndarray) -> np.ndarray:
        rounded: np.ndarray = torch.from_numpy(values).to(dtype).numpy()  # as NumPy rounds, in a tenth of its time
        return rounded

    def features(row: dict[str, Any]) -> dict[str, Any]:
        """Images (JPEG), dense features and facts of one clip. Raises ClipError where the media does not decode."""
        start_s, end_s = row["start_s"], min(row["end_s"], row["start_s"] + cfg.max_s)
        n_images = cfg.n_images if row["has_images"] else 0
        clip = decode(row["media"], start_s, end_s, n_images=n_images, timestamps=cfg.image_times, sounds=(first, mean))
        assert clip.heard is not None
        if (n := len(clip.sounds[mean])) < LOGMEL_SHORTEST:
            raise ClipError("qc.short", f"{n} samples at {LOGMEL_RATE_HZ} Hz; a log-mel needs {LOGMEL_SHORTEST}")
        pictures = [resize_short_side(i, cfg.image_short_side) for i in clip.images]
        fbank = stored(FBANKS[cfg.fbank](clip.sounds[first], fbank_rate_hz or clip.heard.sample_rate_hz))
        return {
            "images": [jpeg(p, cfg.jpeg_quality) for p in pictures] or None,
            "image_times_s": clip.image_times_s or None,
            "duration_s": end_s - start_s,
            "fbank": fbank,
            "logmel": stored(logmel(clip.sounds[mean], LOGMEL_RATE_HZ)),
            **moments(fbank),
            **quality.measure(clip.heard, clip.pictures_end_s, pictures),
        }

    return features


def moments(fbank: np.ndarray) -> dict[str, float]:
    """Mean and sum of squared deviations in float64, of what is stored: the stage `stats` need not read it again."""
    values = fbank.astype(np.float64).ravel()
    mean = float(values.mean()) if values.size else 0.0
    values -= mean
    return {"fbank_mean": mean, "fbank_squares": float(values @ values)}
