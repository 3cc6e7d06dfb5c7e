"""Other laboratories' lists of what they held, as attributed observations: who, when, of which list, which clips.

A list says that somebody could get these recordings by that date. That a recording is not on it is weaker evidence: it
may have been refused in one country, or lost to a crawler's bad night.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harken.audit.survival import day
from harken.audit.visits import numpy_of
from harken.errors import DataError
from harken.shards import atomic

UNDATED: Final = "undated"
COLUMNS: Final = ("youtube_id", "ytid", "yt_id", "video_id", "file_name", "filename", "fname", "id")  # first match wins
SCHEMA: Final = pa.schema([("video_id", pa.string())])
_DATE: Final = re.compile(r"\d{4}(-\d\d){0,2}$", re.ASCII)
# a raw id, or a file name: an id, perhaps after the Y that keeps a leading '-' from looking like an option
_ID: Final = re.compile(
    r"(?:Y(?=[\w-]{11}(?:\.|$)))?([A-Za-z0-9_-]{11})(?:\.(?:wav|flac|mp3|mp4|m4a|mkv|webm|ogg|opus))?$"
)


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """The recordings that somebody held of one official split.

    who: the laboratory; when: an ISO date (`2023`, `2023-03` or `2023-03-05`) or `undated`; source: where the list is
    from, to be cited; dataset and split: harken's names; ids: YouTube video ids, sorted, each once, string (id,).
    """

    who: str
    when: str
    source: str
    dataset: str
    split: str
    ids: pa.Array

    @staticmethod
    def of(who: str, when: str, source: str, dataset: str, split: str, ids: Iterable[str]) -> Observation:
        """An observation from ids in any order. Raises DataError for a date that is none, or no ids."""
        if not _is_date(when):
            raise DataError(f"observation of {who}: {when!r} is no date. Write 2023, 2023-03, 2023-03-05 or {UNDATED}.")
        if not (who and dataset and split):
            raise DataError("observation: it must say who held the clips, and of which dataset and split.")
        unique = sorted(set(ids))
        if not unique:
            raise DataError(f"observation of {who}: the list holds no ids.")
        return Observation(who, when, source, dataset, split, pa.array(unique, pa.string()))

    def present(self, keys: pa.Array) -> np.ndarray:
        """Which of these video ids are on the list: bool (key,)."""
        return numpy_of(pc.is_in(keys, value_set=self.ids))


def _is_date(when: str) -> bool:
    if when == UNDATED:
        return True
    try:
        return bool(_DATE.match(when)) and day(when) > 0
    except ValueError:  # the 31st of February
        return False


def read_id_list(path: Path) -> list[str]:
    """The video ids of a list of recordings, in the file's order, each once; plain or .gz.

    Reads one id or file name per line; CSV files with a header that names one of COLUMNS (AudioCaps, aac-datasets, Mei
    et al.); and CSV files without one whose first column holds the ids (AudioSet's segments). Accepted are ids as they
    are, with a media file's extension, and with a leading `Y` (`Y--4gqARaEJE.wav`). Lines that begin with `#` and
    blank ones are skipped.

    Raises DataError for a missing or empty file, a header without such a column, and a value that is no id.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file. It should hold one YouTube id per line, or a CSV column of them.")
    raw = path.read_bytes()
    try:
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as e:
        raise DataError(f"{path}: not a text file ({e}). A list of ids is plain text or CSV in UTF-8.") from e
    lines = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    rows = ((lines.line_num, row) for row in lines if row and not row[0].startswith("#") and any(row))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path}: no rows. It should hold one YouTube id per line, or a CSV column of them.")
    _, row = first
    column, found = 0, dict[str, None]()
    if match := _ID.match(row[0].strip()) if not _is_header(row) else None:
        found[match[1]] = None
    else:
        column = _column(path, row)
    for number, row in rows:
        match = _ID.match(row[column].strip()) if column < len(row) else None
        if match is None:
            told = repr(row[column]) if column < len(row) else f"only {len(row)} columns"
            raise DataError(
                f"{path}, line {number}: {told} in column {column + 1}; expected a YouTube id of 11 letters, digits, "
                "'-' or '_', perhaps as Y<id>.wav. Cut the list to ids, one per line."
            )
        found[match[1]] = None
    if not found:
        raise DataError(f"{path}: a header and no rows. The copy is cut; get the list again.")
    return list(found)


def _is_header(row: list[str]) -> bool:
    return any(name.strip().lower() in COLUMNS for name in row)


def _column(path: Path, header: list[str]) -> int:
    names = [name.strip().lower() for name in header]
    for wanted in COLUMNS:
        if wanted in names:
            return names.index(wanted)
    raise DataError(
        f"{path}: the first line is {','.join(header)[:80]!r}: neither an id nor a header with a column of ids. Looked "
        f"for the columns {', '.join(COLUMNS)}; rename the column that holds the YouTube ids."
    )


def write_observation(folder: Path, observation: Observation) -> Path:
    """Store an observation as one Parquet file; the same observation replaces itself. Returns its path."""
    facts = {name: getattr(observation, name) for name in ("who", "when", "source", "dataset", "split")}
    digest = hashlib.sha256("\0".join([facts["who"], facts["when"], facts["source"]]).encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", facts["who"].lower()).strip("-")[:40] or "list"
    path = folder / f"{_safe(facts['dataset'])}-{_safe(facts['split'])}-{slug}-{digest}.parquet"
    meta = {f"harken.{name}".encode(): value.encode() for name, value in facts.items()}
    table = pa.Table.from_arrays([observation.ids], schema=SCHEMA.with_metadata(meta))
    with atomic(path) as f:
        pq.write_table(table, f, compression="zstd")
    return path


def read_observations(folder: Path) -> list[Observation]:
    """The observations of a folder, by file name; none where there is no folder. Raises DataError for other files."""
    found = []
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        meta = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        names = ("who", "when", "source", "dataset", "split")
        if "video_id" not in table.column_names or any(f"harken.{name}" not in meta for name in names):
            raise DataError(f"{path}: not an observation written by `harken import`. Move it out of {folder}.")
        ids = table["video_id"].combine_chunks()
        who, when, source, dataset, split = (meta[f"harken.{name}"] for name in names)
        found.append(Observation(who, when, source, dataset, split, ids))
    return found


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "_", name)
