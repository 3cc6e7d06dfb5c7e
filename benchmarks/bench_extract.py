"""The stage `extract` end to end on ten-second clips: clips a second and core, where the time goes, two workers.

The clips are those of bench_decode.py (H.264 640x360, AAC stereo), stored as the stage `download` stores them. The
stage runs as `dvc repro` would run it, with one worker and with two; the parts are timed alone, here, one thread.

    python benchmarks/bench_extract.py [--clips 48] [--keyframe-every 250] [--media FOLDER]

`--media` takes a folder of media shards instead, such as data/world/media.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

import interleaved
from bench_decode import END_S, START_S, recording
from harken.config import read_params
from harken.guard import Guard
from harken.media import quality
from harken.media.decode import decode
from harken.media.fbank import fbank
from harken.media.images import jpeg
from harken.media.logmel import logmel
from harken.media.resize import resize_short_side
from harken.media.section import cut
from harken.shards import ShardWriter, read_shard, shards_in
from harken.stages.download import COLUMNS
from harken.stages.extract import ExtractConfig, featurer, moments

ROOT = Path(__file__).parents[1]
N_SHARDS, SIDE = 4, 224


def store(folder: Path, n_clips: int, keyframe_every: int) -> None:
    section = cut(io.BytesIO(recording(END_S + 2, keyframe_every)), START_S, END_S, True)
    row = {
        "media": section.data,
        "container": section.container,
        "start_s": section.start_s,
        "end_s": section.end_s,
        "has_images": True,
    }
    for shard in range(N_SHARDS):
        with ShardWriter(folder, shard, fingerprint="f", columns=COLUMNS) as out:
            for i in range(shard, n_clips, N_SHARDS):
                out.write(f"clip-{i}", **row)


def params(folder: Path, media: Path) -> Path:
    """The committed params with folders of their own and images of the size that CLIP takes."""
    given = read_params(ROOT / "params.yaml")
    given["paths"] = {name: str(folder / name) for name in given["paths"]} | {"media": str(media.resolve())}
    given["extract"]["image_short_side"] = SIDE
    path = folder / "params.yaml"
    YAML().dump(given, path)
    return path


def stage(folder: Path, path: Path, workers: int) -> float:
    """Wall seconds of the stage, from nothing."""
    for old in ("work", "features"):
        subprocess.run(["rm", "-rf", str(folder / old)], check=True)
    env = {**os.environ, "HARKEN_PARAMS": str(path), "HARKEN_WORKERS": str(workers)}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "harken.stages", "extract"], env=env, check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def parts(row: dict[str, Any], cfg: ExtractConfig) -> dict[str, Callable[[], object]]:
    """What extract does with a clip, each part on what the one before it gives."""
    media, start_s, end_s = row["media"], row["start_s"], row["end_s"]
    first, mean = ("first", 32_000), ("mean", 32_000)
    n_images = cfg.n_images if row["has_images"] else 0
    whole = partial(decode, media, start_s, end_s, n_images=n_images, sounds=(first, mean))
    clip = whole()
    small = [resize_short_side(i, cfg.image_short_side) for i in clip.images]
    features = fbank(clip.sounds[first], 32_000)
    assert clip.heard is not None
    return {
        "open, demux, decode and resample the sound": partial(
            decode, media, start_s, end_s, n_images=0, sounds=(first, mean)
        ),
        "open, demux, decode the images": partial(decode, media, start_s, end_s, n_images=n_images, sounds=()),
        "both in one pass": whole,
        "resize images": lambda: [resize_short_side(i, cfg.image_short_side) for i in clip.images],
        "JPEG": lambda: [jpeg(i, cfg.jpeg_quality) for i in small],
        "FBANK": partial(fbank, clip.sounds[first], 32_000),
        "log-mel": partial(logmel, clip.sounds[mean], 32_000),
        "facts": lambda: (moments(features), quality.measure(clip.heard, clip.pictures_end_s, small)),
        "everything": partial(featurer(cfg), row),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--keyframe-every", type=int, default=250)
    parser.add_argument("--media", type=Path, help="a folder of media shards, instead of made clips")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        media = given.media or folder / "media"
        if not given.media:
            store(media, given.clips, given.keyframe_every)
        path = params(folder, media)
        cfg = ExtractConfig.model_validate(read_params(path)["extract"])
        n_clips = sum(1 for s in shards_in(media) for _ in read_shard(media, s))
        row = next(iter(read_shard(media, 0, COLUMNS)))
        medians = interleaved.measure(parts(row, cfg))
        interleaved.show("one clip, part by part", medians, "everything")
        with Guard(featurer, cfg, limit_s=cfg.limit_s, memory_gb=cfg.memory_gb) as guard:
            guard(row)
            began = time.perf_counter()
            n = sum(1 for _ in guard.map((i, row) for i in range(20)))
            each_ms = (time.perf_counter() - began) / n * 1e3
            print(f"  everything in a process of its own, with transfers {each_ms:10.1f} ms on the clock")
        taken = {workers: stage(folder, path, workers) for workers in (1, 2)}
        print(f"the stage on {n_clips} clips, start-up included")
        for workers, seconds in taken.items():
            print(f"  {workers} worker{'s' * (workers > 1)}: {seconds:6.1f} s   {n_clips / seconds:6.1f} clips/s")
        print(f"  efficiency of two workers over one: {taken[1] / taken[2] / 2:.0%}")


if __name__ == "__main__":
    main()
