"""What is doubtful about a clip that decodes: measured once, judged by bounds, left out where a stage's params say so.

The facts stand beside each clip's features; the flags stand apart, in `quality.parquet`, so that a changed bound judges
anew without decoding anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from harken.config import Config
from harken.errors import DataError
from harken.media.decode import Heard
from harken.media.images import Picture
from harken.shards import atomic, read_table

Flag = Literal["silent", "clipped", "short", "black", "frozen", "mismatch"]
FILE: Final = "quality.parquet"
FACTS: Final = {
    "peak_dbfs": pa.float64(),
    "clipped_share": pa.float64(),
    "sound_s": pa.float64(),
    "pictures_s": pa.float64(),
    "brightness": pa.float64(),
    "change": pa.float64(),
}


class Quality(Config):
    """The bounds of the flags; a clip without pictures has none of the flags that speak of them.

    `silent`: no sample reaches `silent_dbfs`. `clipped`: more than `clipped_share` of the samples are at full scale.
    `short`: the recording holds less than `short_share` of the clip's sound. `black`: the brightest image's mean grey
    is below `black_grey` (0 to 255). `frozen`: no image differs from the first by a mean of `frozen_grey` grey levels.
    `mismatch`: sound and pictures end more than `mismatch_s` apart.
    """

    silent_dbfs: float
    clipped_share: float
    short_share: float
    black_grey: float
    frozen_grey: float
    mismatch_s: float


Column = np.ndarray
FLAGS: Final[dict[Flag, Callable[[Mapping[str, Column], Quality], Column]]] = {
    "silent": lambda f, q: f["peak_dbfs"] < q.silent_dbfs,
    "clipped": lambda f, q: f["clipped_share"] > q.clipped_share,
    "short": lambda f, q: f["sound_s"] < q.short_share * f["duration_s"],
    # a clip without pictures has NaN here, which no comparison holds of
    "black": lambda f, q: f["brightness"] < q.black_grey,
    "frozen": lambda f, q: f["change"] < q.frozen_grey,
    "mismatch": lambda f, q: np.abs(f["sound_s"] - f["pictures_s"]) > q.mismatch_s,
}
assert tuple(FLAGS) == get_args(Flag)


def measure(heard: Heard, pictures_s: float | None, images: Sequence[Picture]) -> dict[str, float | None]:
    """The facts of one clip: its sound, how much of it is there in seconds, and its images uint8 (height, width, 3).

    `brightness` is the mean grey of the brightest image, `change` the largest mean difference of an image from the
    first (null with fewer than two), both in grey levels from 0 to 255.
    """
    stills = [Image.fromarray(i).convert("L") for i in images]
    # some streams change their size on the way; the eye would compare them at one
    grey = [np.asarray(s if s.size == stills[0].size else s.resize(stills[0].size), np.float32) for s in stills]
    return {
        "peak_dbfs": heard.peak_dbfs,
        "clipped_share": heard.clipped_share,
        "sound_s": heard.decoded_s,
        "pictures_s": pictures_s,
        "brightness": max((float(g.mean()) for g in grey), default=None),
        "change": max((float(np.abs(g - grey[0]).mean()) for g in grey[1:]), default=None),
    }


def judge(features: Path, bounds: Quality, path: Path) -> dict[str, int]:
    """Write the flags of every ok clip of the shards in `features` to `path`; how many clips have each."""
    table = read_table(features, ["duration_s", *FACTS])
    facts = {n: table[n].to_numpy().astype(np.float64) for n in ("duration_s", *FACTS)}
    flags = {name: is_flagged(facts, bounds) for name, is_flagged in FLAGS.items()}
    columns = [table["clip_id"], *(pa.array(f) for f in flags.values())]
    with atomic(path) as f:
        pq.write_table(pa.table(columns, ["clip_id", *flags]), f, compression="lz4", write_statistics=False)
    return {name: int(f.sum()) for name, f in flags.items()}


def counts(features: Path) -> dict[str, int]:
    """How many ok clips have each flag, by the bounds that the stage `extract` last ran with."""
    table = _read(features)
    return {name: int(pc.sum(table[name]).as_py() or 0) for name in FLAGS}


def flagged(features: Path, flags: Iterable[Flag]) -> frozenset[str]:
    """The clips that have any of these flags. Raises DataError where they were not judged yet."""
    wanted = list(flags)
    if not wanted:
        return frozenset()
    table = _read(features)
    has = np.logical_or.reduce([table[name].to_numpy() for name in wanted])
    return frozenset(table.filter(pa.array(has))["clip_id"].to_pylist())


def _read(features: Path) -> Any:
    path = features / FILE
    if not path.is_file():
        raise DataError(f"{path}: the clips' flags are not there. Run `dvc repro extract` first.")
    return pq.read_table(path)
