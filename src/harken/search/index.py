"""The index of a collection: one unit vector and one row of facts for each clip, in a folder of three plain files.

Exact search over a matrix is the right size here: a million clips of 512 numbers are 2 GB and one pass of memory. One
vector for each clip is all that does not depend on the text; for text-aware pooling (TAP) see `text_aware`.

    embeddings.npy   (clip, dim) float32, rows of length 1, read as a memory map
    clips.parquet    one row for each: clip_id, then what `meta` gave
    index.json       sizes and hashes of the two; written last, so its presence means that the index is whole
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from harken.errors import ConfigError, DataError
from harken.shards import atomic, file_sha256, write_json

EMBEDDINGS, CLIPS, FACTS = "embeddings.npy", "clips.parquet", "index.json"
FILES = (EMBEDDINGS, CLIPS)
FORMAT = 1


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """Clips that can be searched: `embeddings` (clip, dim) float32, rows of length 1, and `clips`, a row for each.

    `clips` has a column `clip_id`; a column `captions` (list of strings) is shown with every hit.
    """

    embeddings: npt.NDArray[np.float32]
    clips: pa.Table

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def dim(self) -> int:
        return int(self.embeddings.shape[1])

    def save(self, folder: Path) -> None:
        """Write the index into `folder`, in place of one that may be there. A stop in between leaves none, not half."""
        (folder / FACTS).unlink(missing_ok=True)
        with atomic(folder / EMBEDDINGS) as f:
            np.save(f, np.ascontiguousarray(self.embeddings), allow_pickle=False)
        with atomic(folder / CLIPS) as f:
            pq.write_table(self.clips, f)
        write_facts(folder, FORMAT, FILES, {"n_clips": len(self), "dim": self.dim})


def build(clip_ids: Sequence[str], embeddings: npt.ArrayLike, meta: pa.Table | None = None) -> Index:
    """The index of clips with their embeddings (clip, dim), of any length, and a row of facts `meta` for each.

    meta: columns such as `captions`, `dataset` or `start_s`, rows in the order of clip_ids; where it has a `clip_id`
    column, that must agree. Raises ConfigError for sizes that do not fit or ids that come twice, and DataError for an
    embedding that is zero or not finite.
    """
    matrix = np.asarray(embeddings)
    if matrix.ndim != 2 or len(matrix) != len(clip_ids) or 0 in matrix.shape:
        raise ConfigError(
            f"index: expected embeddings (clip, dim) of {len(clip_ids)} clips, at least one, found shape "
            f"{matrix.shape}."
        )
    table = clips_table(clip_ids, meta)
    wide = matrix.astype(np.float64)  # the squares of large half-precision numbers overflow
    norm = np.linalg.norm(wide, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norm) & (norm > 0)))
    if bad.size:
        raise DataError(
            f"index: the embedding of {clip_ids[bad[0]]} is zero or not finite. Embed the clip again or leave it out."
        )
    return Index((wide / norm).astype(np.float32), table)


def clips_table(clip_ids: Sequence[str], meta: pa.Table | None) -> pa.Table:
    """A row for each clip: `clip_id`, then the columns of `meta`. Raises ConfigError as `build` does."""
    ids = [str(i) for i in clip_ids]
    if len(set(ids)) != len(ids):
        twice = next(i for k, i in enumerate(ids) if i in set(ids[:k]))
        raise ConfigError(f"index: clip {twice} is given more than once.")
    table = pa.table({"clip_id": pa.array(ids, pa.string())})
    if meta is None:
        return table
    if meta.num_rows != len(ids):
        raise ConfigError(f"index: meta has {meta.num_rows} rows for {len(ids)} clips.")
    if "clip_id" in meta.column_names:
        if meta["clip_id"].to_pylist() != ids:
            raise ConfigError("index: the clip_id column of meta differs from clip_ids. Put both in the same order.")
        meta = meta.drop_columns(["clip_id"])
    for name in meta.column_names:
        table = table.append_column(name, meta[name])
    return table


def load(folder: Path) -> Index:
    """The index in `folder`, its embeddings as a memory map. Raises DataError where there is none or it is not whole.

    Only sizes are checked here; `verify` reads every byte.
    """
    facts = read_facts(folder, FORMAT, FILES)
    embeddings = np.load(folder / EMBEDDINGS, mmap_mode="r", allow_pickle=False)
    clips = pq.read_table(folder / CLIPS)
    expected = (facts["n_clips"], facts["dim"])
    if embeddings.shape != expected or embeddings.dtype != np.float32 or clips.num_rows != expected[0]:
        raise DataError(
            f"{folder}: index.json says {expected[0]} clips of {expected[1]} numbers, found {embeddings.dtype} "
            f"{embeddings.shape} and {clips.num_rows} rows. Build the index again."
        )
    return Index(embeddings, clips)


def verify(folder: Path) -> None:
    """Read every byte of the index in `folder` and raise DataError where a file is not what was saved."""
    verify_files(folder, read_facts(folder, FORMAT, FILES))


def verify_files(folder: Path, facts: Mapping[str, Any]) -> None:
    """Hold every file that `facts` has a hash of against it."""
    for name, expected in facts["sha256"].items():
        if file_sha256(folder / name) != expected:
            raise DataError(f"{folder / name}: changed since the index was saved. Build the index again.")


def read_facts(folder: Path, form: int | str, files: Sequence[str]) -> dict[str, Any]:
    """index.json. Raises DataError where there is none, it is of another format or one of `files` is missing."""
    path = folder / FACTS
    if not path.is_file():
        raise DataError(f"{folder}: no index here (index.json is missing). Build it first, or check the folder.")
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if facts.get("format") != form:
        raise DataError(f"{path}: format {facts.get('format')!r}, this reads {form!r}. Build the index again.")
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise DataError(f"{folder}: {', '.join(missing)} missing beside index.json. Build the index again.")
    return facts


def write_facts(folder: Path, form: int | str, files: Sequence[str], facts: Mapping[str, Any]) -> None:
    """index.json, with the hashes of the files that are there: the index is whole now."""
    hashes = {name: file_sha256(folder / name) for name in files}
    write_json(folder / FACTS, {**facts, "format": form, "sha256": hashes})
