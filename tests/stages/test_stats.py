"""Statistics merged from what was taken of each clip are those of one pass over all values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from harken.clips import Clip, Manifest, Source, Split
from harken.config import Paths
from harken.engines import inline, local
from harken.errors import DataError
from harken.media import quality
from harken.shards import DenseArray, ShardWriter, read_shard, shards_in
from harken.stages import stats
from harken.stages.extract import COLUMNS, moments

N_ROWS = {"a": 998, "b": 0, "c": 3, "d": 500, "e": 998, "held": 40, "silent": 60}
NO_IMAGES = dict.fromkeys(("images", "image_times_s", "pictures_s", "brightness", "change"))
BOUNDS = quality.Quality(
    silent_dbfs=-50.0, clipped_share=0.01, short_share=0.95, black_grey=16.0, frozen_grey=0.5, mismatch_s=0.5
)


def values(clip_id: str) -> np.ndarray:
    """Far from zero and nearly constant: what sums of squares would lose."""
    rng = np.random.default_rng(sum(clip_id.encode()))
    level = {"silent": -15.9, "held": 3.0}.get(clip_id, -11.0)
    return (level + 0.05 * rng.standard_normal((N_ROWS[clip_id], 128))).astype(np.float16)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(**{name: tmp_path / name for name in Paths.model_fields})
    clips = [Clip(i, "audioset", Split.TRAIN, Source("youtube", i, ""), 0.0, 10.0) for i in (*N_ROWS, "failed")]
    clips.append(Clip("held", "audiocaps", Split.TEST, Source("youtube", "held", ""), 0.0, 10.0))
    found.manifest.mkdir()
    pq.write_table(Manifest.build(clips, 3).table, found.manifest / "clips.parquet")
    for shard, ids in enumerate(("abc", ["d", "held", "failed"], ["e", "silent"])):
        arrays = {"fbank": (128, "float16")}
        with ShardWriter(
            found.features, shard, fingerprint="f", columns=COLUMNS, arrays=arrays, meta={"fbank": "x"}
        ) as out:
            for i in ids:
                if i == "failed":
                    out.skip(i, "qc.no_audio")
                    continue
                loudness = {"peak_dbfs": -70.0 if i == "silent" else -3.0, "clipped_share": 0.0, "sound_s": 10.0}
                out.write(i, duration_s=10.0, fbank=values(i), **moments(values(i)), **NO_IMAGES, **loudness)
    quality.judge(found.features, BOUNDS, found.features / quality.FILE)
    return found


def run(paths: Paths, engine: Any = inline, **changed: Any) -> dict[str, Any]:
    given = {
        "dataset": "audioset",
        "split": "train",
        "exclude": {"audiocaps": ["test"]},
        "leave_out": [],
        "pad_to": None,
    }
    stats.run(paths, stats.StatsConfig.model_validate({**given, **changed}), engine)
    told: dict[str, Any] = json.loads((paths.stats / "stats.json").read_text())
    return told


def one_pass(*clip_ids: str, pad_to: int = 0) -> tuple[float, float]:
    rows = [values(i).astype(np.float64) for i in clip_ids]
    rows += [np.zeros((max(0, pad_to - N_ROWS[i]), 128)) for i in clip_ids]
    every = np.concatenate(rows)
    return float(every.mean()), float(every.std())


def test_merged_moments_are_those_of_one_pass(paths: Paths) -> None:
    told = run(paths)
    mean, std = one_pass("a", "b", "c", "d", "e", "silent")
    assert told["mean"] == pytest.approx(mean, rel=1e-13)
    assert told["std"] == pytest.approx(std, rel=1e-11)
    assert told["n_values"] == 128 * (998 + 0 + 3 + 500 + 998 + 60)
    assert told["n_clips"] == 6
    assert told["exclude"] == {"audiocaps": ["test"]}


def test_held_out_clips_count_where_they_are_asked_for(paths: Paths) -> None:
    assert run(paths, exclude={})["mean"] == pytest.approx(one_pass(*N_ROWS)[0], rel=1e-13)


def test_doubtful_clips_are_left_out(paths: Paths) -> None:
    told = run(paths, leave_out=["silent", "clipped"])
    assert told["mean"] == pytest.approx(one_pass("a", "b", "c", "d", "e")[0], rel=1e-13)
    assert told["leave_out"] == ["silent", "clipped"]
    assert told["n_clips"] == 5


def test_padding_counts_as_vip_ant_s_does(paths: Paths) -> None:
    told = run(paths, pad_to=1000)
    mean, std = one_pass("a", "b", "c", "d", "e", "silent", pad_to=1000)
    assert (told["mean"], told["std"]) == (pytest.approx(mean, rel=1e-12), pytest.approx(std, rel=1e-11))
    assert told["n_values"] == 6 * 1000 * 128


def test_workers_change_no_bit(paths: Paths) -> None:
    assert run(paths) == run(paths, local)


def test_no_clip_is_left(paths: Paths) -> None:
    with pytest.raises(DataError, match="no ok clip of audioset val"):
        run(paths, split="val")


def test_what_is_merged_is_of_what_is_stored(paths: Paths) -> None:
    for shard in shards_in(paths.features):
        array = DenseArray(paths.features, shard, "fbank")
        for row in read_shard(paths.features, shard, ("fbank_start", "fbank_rows", "fbank_mean", "fbank_squares")):
            stored = np.empty((row["fbank_rows"], 128), array.dtype)
            array.read_into(row["fbank_start"], stored)
            exact = stored.astype(np.float64)
            assert row["fbank_mean"] == (exact.mean() if exact.size else 0)
            assert row["fbank_squares"] == pytest.approx(exact.var() * exact.size if exact.size else 0, rel=1e-12)
