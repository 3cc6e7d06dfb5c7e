"""What should exist: clips, where their bytes come from, and the manifest that lists them all.

A clip's id depends on its recording and its times alone, so AudioSet and AudioCaps share one id, one download and one
row of features for the same ten seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harken.errors import DataError


class Split(StrEnum):
    """The part a clip plays. Each dataset's card maps its official split names to these."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a clip's recording lives.

    `host` is `youtube` (key: the 11-character video id) or `zenodo` (archive: the archive's stem, key: the member's
    exact name). How a host is reached (itself, a mirror, a folder) is the download stage's choice, not the clip's.
    """

    host: str
    key: str
    archive: str = ""


@dataclass(frozen=True, slots=True)
class Clip:
    """A stretch of one recording, as one dataset's official list describes it.

    `end_s` is None where the clip is the whole recording (Clotho). Times are in seconds in the recording.
    """

    id: str
    dataset: str
    split: Split
    source: Source
    start_s: float
    end_s: float | None
    captions: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def youtube_id(video_id: str, start_s: float, end_s: float) -> str:
    """`yt:<video id>:<start_ms>-<end_ms>`: integers, because floats are no keys."""
    return f"yt:{video_id}:{round(start_s * 1000)}-{round(end_s * 1000)}"


def zenodo_id(record: str, archive: str, name: str) -> str:
    """`zen:<record>/<archive>/<sha1 of the exact member name>`: Clotho's names hold blanks, commas, HTML entities."""
    return f"zen:{record}/{archive}/{hashlib.sha1(name.encode()).hexdigest()}"


def shard_of(source: Source, n_shards: int) -> int:
    """The shard of a recording: a hash of its key, so that adding or reordering rows moves no clip."""
    digest = hashlib.blake2b(f"{source.host}/{source.archive}/{source.key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % n_shards


SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("shard", pa.int32()),
        ("dataset", pa.dictionary(pa.int8(), pa.string())),
        ("split", pa.dictionary(pa.int8(), pa.string())),
        ("host", pa.dictionary(pa.int8(), pa.string())),
        ("key", pa.string()),
        ("archive", pa.dictionary(pa.int8(), pa.string())),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("captions", pa.list_(pa.string())),
        ("labels", pa.list_(pa.string())),
    ]
)


class Manifest:
    """clips.parquet: the only list of what should exist, one row per clip and dataset.

    A clip that two datasets name (every AudioCaps clip is in AudioSet's unbalanced list) has a row for each and one id.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @staticmethod
    def build(clips: Iterable[Clip], n_shards: int) -> Manifest:
        """The manifest of `clips`, in the given order, each put into one of `n_shards` by the hash of its recording."""
        columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
        for c in clips:
            row: list[object] = [
                c.id,
                shard_of(c.source, n_shards),
                c.dataset,
                str(c.split),
                c.source.host,
                c.source.key,
            ]
            row += [c.source.archive, c.start_s, c.end_s, c.captions, c.labels]
            for name, value in zip(SCHEMA.names, row, strict=True):
                columns[name].append(value)
        arrays = [pa.array(columns[f.name], f.type) for f in SCHEMA]
        meta = {b"harken.n_shards": str(n_shards).encode()}
        return Manifest(pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(meta)))

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest that the stage `catalog` left in `folder`. Raises DataError where there is none."""
        path = folder / "clips.parquet"
        if not path.is_file():
            raise DataError(f"{path}: no manifest here. Run `dvc repro catalog` first.")
        return Manifest(pq.read_table(path))

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def n_shards(self) -> int:
        return int(self.table.schema.metadata[b"harken.n_shards"])

    @property
    def shards(self) -> list[int]:
        """The shards that hold at least one clip, ascending."""
        return sorted(pc.unique(self.table["shard"]).to_pylist())

    def of(self, dataset: str, split: str) -> pa.Table:
        """The rows of one dataset's split, in the order of the official list."""
        mask = pc.and_(pc.equal(self.table["dataset"], dataset), pc.equal(self.table["split"], split))
        return self.table.filter(mask)

    def splits(self) -> list[tuple[str, str]]:
        """The (dataset, split) pairs present, in order of first appearance."""
        pairs = self.table.select(["dataset", "split"]).group_by(["dataset", "split"], use_threads=False).aggregate([])
        return [(str(r["dataset"]), str(r["split"])) for r in pairs.to_pylist()]

    def requested(self, shard: int) -> list[Clip]:
        """What a shard must fetch: each id once, with the datasets that ask for it joined by `+` in `dataset`.

        Captions and labels are not needed to fetch a clip and are left out.
        """
        rows = self.table.filter(pc.equal(self.table["shard"], shard)).drop_columns(["captions", "labels"])
        found: dict[str, Clip] = {}
        for r in rows.to_pylist():
            seen = found.get(r["clip_id"])
            names = {r["dataset"], *(seen.dataset.split("+") if seen else ())}
            source = Source(r["host"], r["key"], r["archive"])
            found[r["clip_id"]] = Clip(
                r["clip_id"], "+".join(sorted(names)), Split(r["split"]), source, r["start_s"], r["end_s"]
            )
        return [found[i] for i in sorted(found)]

    def clips(self, dataset: str, split: str) -> Iterator[Clip]:
        """The clips of one dataset's split, captions and labels included."""
        for r in self.of(dataset, split).to_pylist():
            yield Clip(
                r["clip_id"],
                cast(str, r["dataset"]),
                Split(r["split"]),
                Source(r["host"], r["key"], r["archive"]),
                r["start_s"],
                r["end_s"],
                tuple(r["captions"] or ()),
                tuple(r["labels"] or ()),
            )
