"""Flags: measured on the clip, judged by bounds, counted, and used to leave clips out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from harken.errors import DataError
from harken.media.decode import Heard
from harken.media.quality import FACTS, FILE, FLAGS, Flag, Quality, counts, flagged, judge, measure
from harken.shards import ShardWriter

BOUNDS = Quality(
    silent_dbfs=-50.0, clipped_share=0.01, short_share=0.95, black_grey=16.0, frozen_grey=0.5, mismatch_s=0.5
)
SOUND = {"sample_rate_hz": 32000, "n_channels": 2, "decoded_s": 10.0, "peak_dbfs": -3.0, "clipped_share": 0.0}
GOOD = {
    "peak_dbfs": -3.0,
    "clipped_share": 0.0,
    "sound_s": 10.0,
    "pictures_s": 10.0,
    "brightness": 90.0,
    "change": 20.0,
}
BAD: dict[Flag, dict[str, float]] = {
    "silent": {"peak_dbfs": -50.1},
    "clipped": {"clipped_share": 0.011},
    "short": {"sound_s": 9.4, "pictures_s": 9.4},
    "black": {"brightness": 15.9},
    "frozen": {"change": 0.49},
    "mismatch": {"pictures_s": 9.4},
}
ON_THE_BOUND = {"peak_dbfs": -50.0, "clipped_share": 0.01, "sound_s": 9.5, "pictures_s": 9.0, "brightness": 16.0}
SOUND_ALONE = {"pictures_s": None, "brightness": None, "change": None}


def write(folder: Path, clips: dict[str, dict[str, Any]]) -> None:
    import pyarrow as pa

    columns = {"duration_s": pa.float64(), **FACTS}
    with ShardWriter(folder, 0, fingerprint="f", columns=columns) as out:
        for clip_id, facts in clips.items():
            out.write(clip_id, duration_s=10.0, **{**GOOD, **facts})
        out.skip("failed", "qc.no_audio")


def pictures(*grey: int) -> list[np.ndarray]:
    return [np.full((6, 8, 3), g, np.uint8) for g in grey]


def test_what_is_measured() -> None:
    facts = measure(Heard(**SOUND), 9.9, pictures(10, 30, 12, 0))
    assert facts == {
        "peak_dbfs": -3.0,
        "clipped_share": 0.0,
        "sound_s": 10.0,
        "pictures_s": 9.9,
        "brightness": 30.0,
        "change": 20.0,
    }
    assert measure(Heard(**SOUND), None, [])["brightness"] is None
    assert measure(Heard(**SOUND), 10.0, pictures(40))["change"] is None
    # a stream that changes its size: the second half is another shape of the same grey
    assert measure(Heard(**SOUND), 10.0, [*pictures(40), np.full((12, 4, 3), 40, np.uint8)])["change"] == 0
    coloured = np.zeros((4, 4, 3), np.uint8)
    coloured[..., 1] = 255  # the eye's grey of pure green, not the mean of the channels
    assert measure(Heard(**SOUND), 10.0, [coloured])["brightness"] == pytest.approx(150, abs=1)


@pytest.mark.parametrize("flag", get_args(Flag))
def test_each_flag_has_its_own_bound(flag: Flag, tmp_path: Path) -> None:
    write(tmp_path, {"good": {}, "bad": BAD[flag], "bound": ON_THE_BOUND, "sound": SOUND_ALONE})
    found = judge(tmp_path, BOUNDS, tmp_path / FILE)
    assert found == counts(tmp_path) == {name: int(name == flag) for name in FLAGS}
    assert flagged(tmp_path, [flag]) == {"bad"}
    assert flagged(tmp_path, [f for f in FLAGS if f != flag]) == frozenset()


def test_flags_add_up(tmp_path: Path) -> None:
    write(tmp_path, {"a": BAD["silent"], "b": BAD["silent"] | BAD["black"], "c": BAD["frozen"], "d": {}})
    judge(tmp_path, BOUNDS, tmp_path / FILE)
    assert flagged(tmp_path, ["silent", "frozen"]) == {"a", "b", "c"}
    assert flagged(tmp_path, []) == frozenset()


def test_nothing_is_silent_below_all_bounds(tmp_path: Path) -> None:
    write(tmp_path, {"digital": {"peak_dbfs": float("-inf")}})
    assert judge(tmp_path, BOUNDS, tmp_path / FILE)["silent"] == 1


def test_flags_that_are_not_there_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dvc repro extract"):
        flagged(tmp_path, ["silent"])
    assert flagged(tmp_path, []) == frozenset()  # who leaves nothing out needs none
