"""What the training and evaluation stages read: which clips a split has left, their embeddings and captions."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from harken.clips import Manifest
from harken.errors import DataError
from harken.shards import OK, shard_path, shards_in
from harken.training.tasks import Captions


class ImageEmbeddings:
    """The frozen CLIP image embeddings of every clip that has them, in memory as stored."""

    def __init__(self, folder: Path) -> None:
        shards = shards_in(folder)
        n_rows = sum(pq.read_metadata(shard_path(folder, s)).num_rows for s in shards)
        self._row: dict[str, int] = {}
        self._values = np.empty((n_rows, 0, 0), np.float32)
        n = 0
        for shard in shards:  # each straight into its place: two million clips are in memory once, not thrice
            path = shard_path(folder, shard)
            table = pq.read_table(path, columns=["clip_id", "status", "images"])
            if not pc.all(ok := pc.equal(table["status"], OK)).as_py():
                table = table.filter(ok)  # copies, and shards without a failure need none
            for found in _arrays(table["images"]):
                if not n:
                    self._values = np.empty((n_rows, *found.shape[1:]), found.dtype)
                if (self._values.shape[1:], self._values.dtype) != (found.shape[1:], found.dtype):
                    raise DataError(
                        f"{path}: {found.dtype} {found.shape[1:]} for each clip, {self._values.dtype} "
                        f"{self._values.shape[1:]} in the shards before it. Run `dvc repro embed` again."
                    )
                self._values[n : n + len(found)] = found
                n += len(found)
            self._row.update({c: i for i, c in enumerate(table["clip_id"].to_pylist(), start=len(self._row))})
        self._values = self._values[:n]

    def __contains__(self, clip_id: str) -> bool:
        return clip_id in self._row

    def of(self, clip_ids: Sequence[str]) -> Float[Tensor, "clip image dim"]:
        """(clip, image, dim) in float32, not normalised."""
        return torch.from_numpy(self._values[[self._row[c] for c in clip_ids]].astype(np.float32))


class CaptionEmbeddings:
    """The captions and their frozen CLIP text embeddings, by dataset and split."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "captions.parquet"
        if not self.path.is_file():
            raise DataError(f"{self.path}: no caption embeddings. Run `dvc repro embed` first.")
        table = pq.read_table(self.path)
        self._values = np.concatenate(list(_arrays(table["embedding"])) or [np.empty((0, 0), np.float32)])
        self._table = table.drop_columns(["embedding"])

    def of(self, captions: Captions, dataset: str, split: str) -> Float[Tensor, "caption dim"]:
        """The embedding of every caption of a split, in the order of `captions.texts`. Raises DataError without one."""
        mask = pc.and_(pc.equal(self._table["dataset"], dataset), pc.equal(self._table["split"], split))
        rows = np.flatnonzero(mask.to_numpy())
        said = self._table["caption"].filter(mask).to_pylist()
        row = dict(zip(said, rows, strict=True))  # equal captions have equal embeddings
        lacking = [t for t in captions.texts if t not in row]
        if lacking:
            raise DataError(
                f"{self.path}: {len(lacking)} captions of {dataset} {split} have no embedding, the first "
                f"{lacking[0]!r}. Run `dvc repro embed` again."
            )
        return torch.from_numpy(self._values[[row[t] for t in captions.texts]].astype(np.float32))


def _arrays(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """The chunks of a column of nested fixed-size lists as (row, *shape), without a copy; no row may be null."""
    for chunk in column.chunks:
        shape = [len(chunk)]
        while pa.types.is_fixed_size_list(chunk.type):
            shape.append(chunk.type.list_size)
            chunk = chunk.flatten()
        yield chunk.to_numpy(zero_copy_only=True).reshape(shape)


def captions_of(
    manifest: Manifest,
    dataset: str,
    split: str,
    present: Container[str],
    where: Path,
    left_out: Container[str] = frozenset(),
) -> Captions:
    """The captions of a split's clips that are present and not left out, in the list's order.

    Raises DataError where none is left.
    """
    listed = ((c.id, c.captions) for c in manifest.clips(dataset, split) if c.captions)
    clips = [(i, captions) for i, captions in listed if i in present and i not in left_out]
    if not clips:
        raise DataError(
            f"{where}: no captioned clip of {dataset} {split} is left. `harken status` says why each failed."
        )
    return Captions.build(clips)


def read_stats(folder: Path) -> dict[str, object]:
    """stats.json: mean, std and the clips they were computed on."""
    path = folder / "stats.json"
    if not path.is_file():
        raise DataError(f"{path}: no statistics. Run `dvc repro stats` first.")
    stats: dict[str, object] = json.loads(path.read_text())
    return stats
