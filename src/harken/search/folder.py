"""The folder of a text-aware index: its files, whether they are whole, and how clips leave it. Without torch.

What the files hold: `text_aware`.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harken.search import index
from harken.shards import atomic

FRAMES, STARTS, DETAILS, SKETCHES = "frames.npy", "starts.npy", "details.npy", "sketches.npy"
BASES = ("basis.npy", "key_basis.npy")
POOLING, CLIPS, FACTS = "pooling.safetensors", index.CLIPS, index.FACTS
FILES = (FRAMES, STARTS, DETAILS, SKETCHES, *BASES, POOLING, CLIPS)
FORMAT = "text-aware 1"


def is_text_aware(folder: Path) -> bool:
    """Whether the index in `folder`, whole or not, is a text-aware one, and not one of unit vectors."""
    return (folder / SKETCHES).is_file()


def read_facts(folder: Path) -> dict[str, Any]:
    """As `index.read_facts`, of a text-aware index."""
    return index.read_facts(folder, FORMAT, FILES)


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """As `index.write_facts`, of a text-aware index."""
    index.write_facts(folder, FORMAT, FILES, facts)


def verify(folder: Path) -> None:
    """Read every byte of the index in `folder` and raise DataError where a file is not what was saved."""
    index.verify_files(folder, read_facts(folder))


def write_header(f: BinaryIO, dtype: str, shape: tuple[int, ...]) -> None:
    """The header of an .npy whose rows are then written one after the other; the row count may grow in place."""
    buffer = io.BytesIO()
    spec = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, spec)
    f.write(buffer.getvalue())


def drop(folder: Path, gone: Collection[str]) -> int:
    """Rewrite the index without these clips, and say how many it held; where none would be left, remove it.

    The others score as before: their bytes stay as they are, and so do the bases. A stop in between leaves no index;
    what is left of it is removed when this is called again.
    """
    if not (folder / FACTS).is_file():
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        return 0
    facts, clips = read_facts(folder), pq.read_table(folder / CLIPS)
    stays = np.array([i not in gone for i in clips["clip_id"].to_pylist()], bool)
    n = int((~stays).sum())
    if not n:
        return 0
    (folder / FACTS).unlink()
    if not stays.any():
        return drop(folder, gone) + n
    starts = np.load(folder / STARTS)
    rows = [range(starts[i], starts[i + 1]) for i in np.flatnonzero(stays)]
    lengths = np.array([len(r) for r in rows])
    for name in (FRAMES, DETAILS):
        _keep(folder / name, rows, int(lengths.sum()))
    _keep(folder / SKETCHES, [range(i, i + 1) for i in np.flatnonzero(stays)], len(rows))
    with atomic(folder / STARTS) as f:
        np.save(f, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), allow_pickle=False)
    with atomic(folder / CLIPS) as f:
        pq.write_table(clips.filter(pa.array(stays)), f)
    write_facts(folder, {**facts, "n_clips": len(rows), "n_rows": int(lengths.sum())})
    return n


def _keep(path: Path, stretches: list[range], n_rows: int) -> None:
    """Keep these stretches of an array's rows, one at a time in memory."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    with atomic(path) as f:
        write_header(f, array.dtype.str, (n_rows, *array.shape[1:]))
        for rows in stretches:
            f.write(array[rows.start : rows.stop].tobytes())
