"""What the training and evaluation stages read: which clips a split has left, their embeddings and captions."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from harken.clips import Manifest
from harken.errors import DataError
from harken.shards import read_table
from harken.training.tasks import Captions


class ImageEmbeddings:
    """The frozen CLIP image embeddings of every clip that has them, in memory as stored."""

    def __init__(self, folder: Path) -> None:
        table = read_table(folder, ["images"])
        self._row = {c: i for i, c in enumerate(table["clip_id"].to_pylist())}
        column = table["images"].combine_chunks()
        n_images, dim = column.type.list_size, column.type.value_type.list_size
        self._values = column.flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, n_images, dim)

    def __contains__(self, clip_id: str) -> bool:
        return clip_id in self._row

    def of(self, clip_ids: Sequence[str]) -> Float[Tensor, "clip image dim"]:
        """(clip, image, dim) in float32, not normalised."""
        return torch.from_numpy(self._values[[self._row[c] for c in clip_ids]].astype(np.float32))


class CaptionEmbeddings:
    """The captions and their frozen CLIP text embeddings, by dataset and split."""

    def __init__(self, folder: Path) -> None:
        path = folder / "captions.parquet"
        if not path.is_file():
            raise DataError(f"{path}: no caption embeddings. Run `dvc repro embed` first.")
        self._table = pq.read_table(path)

    def of(self, captions: Captions, dataset: str, split: str) -> Float[Tensor, "caption dim"]:
        """The embedding of every caption of a split, in the order of `captions.texts`."""
        mask = pc.and_(pc.equal(self._table["dataset"], dataset), pc.equal(self._table["split"], split))
        table = self._table.filter(mask)
        column = table["embedding"].combine_chunks()
        values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
        row = {t: i for i, t in enumerate(table["caption"].to_pylist())}  # equal captions have equal embeddings
        return torch.from_numpy(values[[row[t] for t in captions.texts]].astype(np.float32))


def captions_of(manifest: Manifest, dataset: str, split: str, present: Container[str], where: Path) -> Captions:
    """The captions of a split's clips that are present, in the list's order. Raises DataError where none is left."""
    clips = [(c.id, c.captions) for c in manifest.clips(dataset, split) if c.id in present and c.captions]
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
