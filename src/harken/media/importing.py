"""What a lab already has: folders of recordings or cut clips in other tools' layouts, listed once and read in place.

A name is read only where it can mean one thing. What a file may be otherwise (a background clip, a stretch that no list
names, a name that no layout explains) is listed with the reason and never used.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harken.clips import Clip, Manifest
from harken.errors import DataError
from harken.shards import atomic, write_json

# In order of preference where one clip has several files: those with pictures first.
PICTURES: Final = (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".flv", ".ts", ".3gp")
SOUND: Final = (".wav", ".flac", ".m4a", ".opus", ".ogg", ".mp3", ".aac")
_RANK: Final = {ext: rank for rank, ext in enumerate((*PICTURES, *SOUND))}

LAYOUTS: Final[dict[str, str]] = {
    "video_id": "<id>.<ext>: the whole video, or the clip already cut (told by its length)",
    "video_id_start": "<id>_<start in s>.<ext>: aac-datasets, copies of AudioCaps",
    "start_end": "<id>_<start>-<end>.<ext> in seconds: audioset-download; or <id>_<start>_<end>.<ext> in s or ms",
    "vip_ant": "<id>.p0.<ext>: the clip of audioset-dl, VIP-ANT's downloader",
    "panns": "Y<id>.<ext>: the clip as PANNs and Mei et al. name it",
    "exact_name": "a file of Clotho by its exact name, in a folder development, validation or evaluation or anywhere",
}
_CUT: Final = ("vip_ant", "panns")  # the clip itself, though the name does not say when it starts
PARTS: Final = ("development", "validation", "evaluation")
_STRONG: Final = ("train_audio", "eval_audio")

_ID: Final = r"[A-Za-z0-9_-]{11}"
_S: Final = r"\d+(?:\.\d+)?"
# An id may itself hold '_' and begin with '-': it is the first 11 characters, never what precedes an underscore.
_NAME: Final = re.compile(
    rf"Y(?P<panns>{_ID})(?:_(?P<panns_start>{_S}))?\Z|(?P<id>{_ID})"
    rf"(?:_(?P<start>{_S})(?:(?P<by>[-_])(?P<end>{_S}))?|\.(?P<kind>[pn])(?P<number>\d+))?\Z"
)
_LONGEST_CLIP_S: Final = 60.0  # a length of more than this is in milliseconds; one of less than that many ms is not

INDEX: Final = "harken-index.parquet"
SCHEMA: Final = pa.schema(
    [
        ("path", pa.string()),
        ("key", pa.string()),
        ("part", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("layout", pa.string()),
        ("why", pa.string()),
    ]
)
_INDEX_SCHEMA: Final = pa.schema([("root", pa.string()), *SCHEMA])


@dataclass(frozen=True, slots=True)
class Found:
    """One media file: `path` relative to the scanned folder, what its name says, and the layout that says it.

    `key` is the video id, or the exact file name for layout `exact_name`; times are seconds in the recording, None
    where the name does not say.
    """

    path: str
    key: str
    start_s: float | None
    end_s: float | None
    layout: str


def read_name(path: str) -> Found | str:
    """What a file's relative path (with `/`) says, or why it cannot be used. The extension must be a media file's."""
    folder, _, name = path.rpartition("/")
    stem = name[: name.rindex(".")]
    match = _NAME.match(stem)
    if match is None:
        return Found(path, name, None, None, "exact_name")
    if key := match["panns"]:
        start = match["panns_start"]
        if start is None:
            return Found(path, key, None, None, "panns")
        return Found(path, key, float(start), None, "video_id_start")
    key = match["id"]
    if match["kind"]:
        if (match["kind"], match["number"]) == ("p", "0"):
            return Found(path, key, None, None, "vip_ant")
        return "a stretch before or after the clip (audioset-dl's background)"
    if match["start"] is None:
        return Found(path, key, None, None, "video_id")
    start_s = float(match["start"])
    if match["end"] is None:
        if folder.rpartition("/")[2] in _STRONG:
            return "audioset-download's strong sets begin at a label's onset, which is not where the clip begins"
        return Found(path, key, start_s, None, "video_id_start")
    return _stretch(path, key, start_s, float(match["end"]), match["by"])


def _stretch(path: str, key: str, start_s: float, end_s: float, by: str) -> Found | str:
    length = end_s - start_s
    if length <= 0:
        return "the name says that it ends before it starts"
    if length <= _LONGEST_CLIP_S:
        return Found(path, key, start_s, end_s, "start_end")
    if by == "_" and 500 <= length <= 1000 * _LONGEST_CLIP_S:
        return Found(path, key, start_s / 1000, end_s / 1000, "start_end")
    return "longer than any clip in seconds, and no length of a clip in milliseconds"


@dataclass(frozen=True, slots=True)
class Scan:
    """All media files under a folder, ordered by path: `table` has the columns of `SCHEMA`.

    `why` is empty for a file whose name is understood, else why it cannot be used. `n_other` counts the files that are
    no sound or video, by extension.
    """

    table: pa.Table
    n_other: dict[str, int] = field(default_factory=dict)

    def found(self) -> list[Found]:
        """The files whose names are understood."""
        rows = self.table.filter(pc.equal(self.table["why"], ""))
        return [Found(**r) for r in rows.select(list(Found.__dataclass_fields__)).to_pylist()]


def scan(folder: Path) -> Scan:
    """List the media files under `folder`, subfolders included. Opens none of them.

    A link that leaves the folder is listed as refused; linked folders are not entered. Raises DataError where `folder`
    is no folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of media. Set it to the folder that holds the recordings.")
    other: Counter[str] = Counter()
    batches: list[pa.RecordBatch] = []
    rows: list[tuple[Any, ...]] = []
    for row in _walk(folder, other):
        rows.append(row)
        if len(rows) == 100_000:  # columns of Arrow take a tenth of the memory of Python's objects
            batches.append(_batch(rows))
            rows = []
    batches.append(_batch(rows))
    return Scan(pa.Table.from_batches(batches).sort_by("path"), dict(other.most_common()))


def _batch(rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(SCHEMA)
    return pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def _walk(folder: Path, other: Counter[str]) -> Iterator[tuple[Any, ...]]:
    root = os.path.realpath(folder)
    inside = root.rstrip(os.sep) + os.sep
    todo: list[tuple[str, str, str]] = [("", root, "")]
    while todo:
        below, here, part = todo.pop()
        with os.scandir(here) as entries:
            for e in entries:
                if e.name.startswith("."):
                    other["hidden"] += 1  # among them the shadows (._name.wav) that macOS leaves on shared disks
                    continue
                path = below + e.name
                if e.is_dir(follow_symlinks=False):
                    todo.append((path + "/", e.path, e.name if e.name in PARTS else part))
                    continue
                ext = _extension(e.name)
                if ext not in _RANK:
                    other["linked folder" if e.is_dir() else ext or "no extension"] += 1
                    continue
                yield _row(e, path, part, inside)


def _extension(name: str) -> str:
    dot = name.rfind(".")  # two million Path objects would take a minute
    return name[dot:].lower() if dot > 0 else ""


def _row(e: os.DirEntry[str], path: str, part: str, inside: str) -> tuple[Any, ...]:
    if not _is_text(path):
        shown = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return shown, "", part, None, None, 0, 0, "", "the name is not UTF-8"
    if e.is_symlink() and not os.path.realpath(e.path).startswith(inside):
        return path, "", part, None, None, 0, 0, "", "a link that leaves the folder"
    if not e.is_file():
        return path, "", part, None, None, 0, 0, "", "not a file, or a link to nothing"
    stat = e.stat()
    told = read_name(path)
    if isinstance(told, str):
        return path, "", part, None, None, stat.st_size, stat.st_mtime_ns, "", told
    return path, told.key, part, told.start_s, told.end_s, stat.st_size, stat.st_mtime_ns, told.layout, ""


def _is_text(path: str) -> bool:
    if path.isascii():
        return True
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def with_root(table: pa.Table, root: Path) -> pa.Table:
    """A scan's table as rows of an index: with the folder that its paths are relative to."""
    return table.add_column(0, "root", pa.array([str(root.resolve())] * len(table), pa.string()))


def read_index(folder: Path) -> pa.Table:
    """The index that `import_` left in `folder`. Raises DataError where there is none, or one that leads elsewhere."""
    path = folder / INDEX
    if not path.is_file():
        raise DataError(f"{path}: no index here. Run `harken import` first.")
    table = pq.read_table(path)
    if table.schema.names != _INDEX_SCHEMA.names:
        raise DataError(f"{path}: its columns are {', '.join(table.schema.names)}. Run `harken import` again.")
    outside = pc.match_substring_regex(table["path"], r"^/|(^|/)\.\.(/|$)|\x00")
    if pc.any(outside).as_py():
        bad = table.filter(outside)["path"][0].as_py()
        raise DataError(f"{path}: {bad!r} leaves its folder. Delete the index and run `harken import` again.")
    return table.cast(_INDEX_SCHEMA)


class Holdings:
    """The files of an index, to be asked for the one that holds a clip. Two million of them take about 0.4 GB."""

    def __init__(self, index: pa.Table) -> None:
        self.table = index.filter(pc.equal(index["why"], "")).combine_chunks()
        self._files = _Files.of(self.table)
        exact = pc.equal(self.table["layout"], "exact_name")
        keys = pc.if_else(exact, "", self.table["key"]).to_numpy(zero_copy_only=False).astype("S11")
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._named: dict[tuple[str, str], int] = {}
        for i in np.flatnonzero(pc.or_(exact, pc.not_equal(self.table["part"], "")).to_numpy(zero_copy_only=False)):
            name = self.table["path"][int(i)].as_py().rpartition("/")[2]
            self._named.setdefault((self.table["part"][int(i)].as_py(), name), int(i))

    @staticmethod
    def of(folder: Path) -> Holdings:
        """Of the index in `folder` that `import_` left there, or of all media files under it. Raises DataError."""
        if (folder / INDEX).is_file():
            index = read_index(folder)
            for root in index["root"].unique().to_pylist():
                if not Path(root).is_dir():  # a disk that is not there must not look like so many missing clips
                    raise DataError(
                        f"{root}: the folder that {folder / INDEX} lists is not there. Is its disk mounted?"
                    )
            return Holdings(index)
        return Holdings(with_root(scan(folder).table, folder))

    def best(self, clip: Clip, needs_images: bool) -> tuple[Path, bool] | None:
        """The file to read a clip from and whether that is the clip already cut; None where there is none.

        Where several hold it: one with pictures if they are needed, not an empty one, the surest name, the container
        named first in `PICTURES` and `SOUND`, the first by path.
        """
        if clip.source.host != "youtube":
            row = self._exact(clip.source.archive.rpartition("_")[2], clip.source.key)
            return None if row is None else (self._path(row), False)
        rows = self._of_video(clip.source.key)
        n = len(rows)
        fit = self._files.fit(rows, np.full(n, _ms(clip.start_s)), np.full(n, _ms(clip.end_s)))
        rows, fit = rows[fit < _ELSEWHERE], fit[fit < _ELSEWHERE]
        if not len(rows):
            return None
        best = np.lexsort(self._files.preference(rows, fit, np.full(len(rows), needs_images))[::-1])[0]
        return self._path(int(rows[best])), bool(fit[best] < _PERHAPS)

    def _exact(self, part: str, name: str) -> int | None:
        for place in (part, ""):
            if (row := self._named.get((place, name))) is not None:
                return row
        # outside of Clotho's folders a name may look like a video's
        told = read_name(name) if _extension(name) in _RANK else ""
        rows = self._of_video(told.key if isinstance(told, Found) else "")
        same = [int(r) for r in rows if self.table["path"][int(r)].as_py().rpartition("/")[2] == name]
        return next((r for r in same if not self.table["part"][r].as_py()), None)

    def _of_video(self, key: str) -> npt.NDArray[np.int64]:
        raw = np.array([key.encode()], "S11")
        if not key or key.encode() != raw[0]:
            return np.empty(0, np.int64)
        low, high = np.searchsorted(self._keys, raw[0], "left"), np.searchsorted(self._keys, raw[0], "right")
        return np.sort(self._order[low:high])

    def _path(self, row: int) -> Path:
        return Path(self.table["root"][row].as_py(), self.table["path"][row].as_py())


_EXACT, _IS_CUT, _PERHAPS, _ELSEWHERE = 0, 1, 2, 3  # how surely a file holds a clip
_WHYS: Final = (
    "has pictures",
    "is not empty",
    "fits better by its name",
    "is of a preferred container",
    "comes first by path",
)


@dataclass(frozen=True, slots=True)
class _Files:
    """What decides which file is read, column by column. Times in ms, -1 where the name does not say."""

    start_ms: npt.NDArray[np.int64]
    end_ms: npt.NDArray[np.int64]
    is_cut: npt.NDArray[np.bool_]
    is_empty: npt.NDArray[np.bool_]
    rank: npt.NDArray[np.int64]

    @staticmethod
    def of(table: pa.Table) -> _Files:
        ext = pc.utf8_lower(pc.replace_substring_regex(table["path"], r"^.*(\.[^.]*)$", r"\1"))
        rank = pc.index_in(ext, pa.array(list(_RANK))).to_numpy(zero_copy_only=False)
        is_cut = pc.is_in(table["layout"], pa.array(_CUT)).to_numpy(zero_copy_only=False)
        is_empty = pc.equal(table["size"], 0).to_numpy(zero_copy_only=False)
        return _Files(_column_ms(table["start_s"]), _column_ms(table["end_s"]), is_cut, is_empty, rank.astype(np.int64))

    def fit(
        self, rows: npt.NDArray[np.int64], start_ms: npt.NDArray[np.int64], end_ms: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """How surely each of `rows` holds the clip beside it; all arrays of one length."""
        unsaid = np.where(self.is_cut[rows], _IS_CUT, _PERHAPS)
        # a file that is named to end before the clip does not hold it
        reaches = (self.end_ms[rows] < 0) | (end_ms < 0) | (self.end_ms[rows] >= end_ms)
        said = np.where((self.start_ms[rows] == start_ms) & reaches, _EXACT, _ELSEWHERE)
        return np.where(self.start_ms[rows] < 0, unsaid, said)

    def preference(
        self, rows: npt.NDArray[np.int64], fit: npt.NDArray[np.int64], needs_images: npt.NDArray[np.bool_]
    ) -> list[npt.NDArray[Any]]:
        """The sort keys of `rows`, the first deciding first, in the order of `_WHYS`; less is better."""
        lacks = needs_images & (self.rank[rows] >= len(PICTURES))
        return [lacks, self.is_empty[rows], fit, self.rank[rows], rows]


def _ms(seconds: float | None) -> int:
    return -1 if seconds is None else round(seconds * 1000)


def _column_ms(seconds: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    values = pc.fill_null(seconds, -0.001).to_numpy(zero_copy_only=False)
    return np.round(values * 1000).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Imported:
    """What `import_` found: counts, and tables of what can be looked at in detail.

    splits      one dict for each dataset and split: n_clips, n_matched, n_with_pictures, n_missing
    unmatched   why -> number of files that no clip reads
    duplicates  (clip_id, kept, left, why): files of a clip that another was preferred to, and for what
    missing     (dataset, split, clip_id) of each clip that has no file
    """

    n_files: int
    n_used: int
    n_other: dict[str, int]
    layouts: dict[str, int]
    splits: list[dict[str, Any]]
    unmatched: dict[str, int]
    n_duplicates: dict[str, int]
    files: pa.Table = field(repr=False)
    duplicates: pa.Table = field(repr=False)
    missing: pa.Table = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The counts, for JSON."""
        names = ("n_files", "n_used", "n_other", "layouts", "splits", "unmatched", "n_duplicates")
        return {n: getattr(self, n) for n in names}


def import_(folder: Path, manifest: Manifest, into: Path, needs_images: Collection[str] = ()) -> Imported:
    """Find the clips of `manifest` among the files under `folder`; leave in `into` the index that the fetcher reads.

    The files stay where they are and are read there: nothing is copied. Several folders can be imported into one index;
    a folder that is imported again replaces its own rows. `needs_images` names the datasets whose clips want a file
    with pictures. Beside the index lie unmatched.parquet (root, path, why), duplicates.parquet (clip_id, kept, left,
    why), missing.parquet (dataset, split, clip_id) and import.json (counts).

    Raises DataError where there is no folder, no media file in it, or an index in `into` that is not one.
    """
    listed = scan(folder)
    if not len(listed.table):
        raise DataError(f"{folder}: no sound or video file in it ({dict(listed.n_other) or 'it is empty'}).")
    table = with_root(listed.table, folder)
    if (into / INDEX).is_file():
        table = pa.concat_tables([_others(read_index(into), folder), table])
    table = table.sort_by([("root", "ascending"), ("path", "ascending")]).combine_chunks()
    result = _match(table, manifest, needs_images, listed.n_other)
    unmatched = result.files.filter(pc.not_equal(result.files["why"], "")).select(["root", "path", "why"])
    for name, part in {"unmatched": unmatched, "duplicates": result.duplicates, "missing": result.missing}.items():
        _write_parquet(into / f"{name}.parquet", part)
    write_json(into / "import.json", result.to_dict())
    _write_parquet(into / INDEX, result.files)
    return result


def _others(index: pa.Table, folder: Path) -> pa.Table:
    """The rows of other folders, without what an earlier manifest had against them."""
    rows = index.filter(pc.not_equal(index["root"], str(folder.resolve())))
    why = pc.if_else(pc.equal(rows["layout"], ""), rows["why"], "")
    return rows.set_column(rows.schema.names.index("why"), "why", why)


def _write_parquet(path: Path, table: pa.Table) -> None:
    with atomic(path) as f:
        pq.write_table(table, f, compression="zstd", write_statistics=False)


def _match(table: pa.Table, manifest: Manifest, needs_images: Collection[str], n_other: dict[str, int]) -> Imported:
    """Which file each clip is read from."""
    clips = _distinct(manifest)
    wants = pc.is_in(manifest.table["dataset"].cast(pa.string()), pa.array(sorted(needs_images), pa.string()))
    wanting = pc.is_in(clips["clip_id"], manifest.table.filter(wants)["clip_id"].combine_chunks())
    clips = clips.append_column("needs_images", wanting).append_column("clip", pa.array(np.arange(len(clips))))
    clip, row, fit, why = _pairs(table, clips)
    files = _Files.of(table)
    needs = clips["needs_images"].to_numpy()[clip]
    order, first, keys = _ranked(clip, files.preference(row, fit, needs))
    clip, row = clip[order], row[order]
    duplicates = _duplicates(table, clips, clip, row, first, keys)
    used = np.zeros(len(table), bool)
    used[row[first]] = True
    merely = np.zeros(len(table), bool)
    merely[row] = True
    why = np.where((why == "") & ~used & ~merely, "no clip of the manifest has this name", why)
    matched = clips["clip_id"].take(pa.array(clip[first]))
    pictured = matched.filter(pa.array(files.rank[row[first]] < len(PICTURES)))
    splits, missing = _count(manifest, matched, pictured)
    layouts = Counter(table["layout"].take(pa.array(np.flatnonzero(used))).to_pylist())
    return Imported(
        n_files=len(table),
        n_used=int(used.sum()),
        n_other=n_other,
        layouts=dict(layouts.most_common()),
        splits=splits,
        unmatched=_counts(why[why != ""]),
        n_duplicates=_counts(duplicates["why"].to_numpy(zero_copy_only=False)),
        files=table.set_column(table.schema.names.index("why"), "why", pa.array(why.tolist(), pa.string())),
        duplicates=duplicates,
        missing=missing,
    )


def _counts(values: npt.NDArray[Any]) -> dict[str, int]:
    return dict(Counter(str(v) for v in values).most_common())


def _distinct(manifest: Manifest) -> pa.Table:
    columns = ["clip_id", "host", "key", "archive", "start_s", "end_s"]
    table = manifest.table.select(columns)
    for name in ("host", "archive"):
        table = table.set_column(columns.index(name), name, table[name].cast(pa.string()))
    return table.group_by(columns, use_threads=False).aggregate([]).select(columns)


def _pairs(
    table: pa.Table, clips: pa.Table
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[Any]]:
    """(clip, row, fit) of each file that holds a clip, and for each row why it cannot, or ''."""
    why = np.array(table["why"].to_pylist(), object)
    videos = clips.filter(pc.equal(clips["host"], "youtube")).select(["key", "clip", "start_s", "end_s"])
    named = pc.and_(pc.equal(table["why"], ""), pc.not_equal(table["layout"], "exact_name"))
    rows = pa.table({"key": table["key"], "row": pa.array(np.arange(len(table)))}).filter(named)
    pairs = rows.join(videos, "key", join_type="inner", use_threads=False)
    clip, row = pairs["clip"].to_numpy(), pairs["row"].to_numpy()
    fit = _Files.of(table).fit(row, _column_ms(pairs["start_s"]), _column_ms(pairs["end_s"]))
    elsewhere = np.zeros(len(table), bool)
    elsewhere[row[fit == _ELSEWHERE]] = True
    # a cut clip whose name has no time can only be told where one clip of its video is listed
    n_clips = np.bincount(row, minlength=len(table))
    unclear = (fit == _IS_CUT) & (n_clips[row] > 1)
    why[row[unclear]] = "several clips of its video are listed, and the name does not say which it is"
    keep = (fit < _ELSEWHERE) & ~unclear
    clip, row, fit = clip[keep], row[keep], fit[keep]
    elsewhere[row] = False
    why[elsewhere & (why == "")] = "another stretch of a video that is listed"
    exact = _exact_pairs(table, clips, why)
    clip = np.concatenate([clip, [c for c, _ in exact]]).astype(np.int64)
    row = np.concatenate([row, [r for _, r in exact]]).astype(np.int64)
    return clip, row, np.concatenate([fit, [_EXACT] * len(exact)]).astype(np.int64), why


def _exact_pairs(table: pa.Table, clips: pa.Table, why: npt.NDArray[Any]) -> list[tuple[int, int]]:
    others = clips.filter(pc.not_equal(clips["host"], "youtube")).select(["clip", "key", "archive"]).to_pylist()
    if not others:
        return []
    names = pc.replace_substring_regex(table["path"], r"(?s)^.*/", "")
    wanted = pc.is_in(names, pa.array([c["key"] for c in others], pa.string())).to_numpy(zero_copy_only=False)
    rows: dict[tuple[str, str], list[int]] = {}
    for i in np.flatnonzero(wanted).tolist():
        if table["layout"][i].as_py():
            rows.setdefault((table["part"][i].as_py(), names[i].as_py()), []).append(i)
    pairs: list[tuple[int, int]] = []
    for c in others:
        part = c["archive"].rpartition("_")[2]
        for i in rows.get((part, c["key"]), []) + rows.get(("", c["key"]), []):
            pairs.append((c["clip"], i))
            why[i] = ""  # it may have looked like a video's
    return pairs


def _ranked(
    clip: npt.NDArray[np.int64], preference: list[npt.NDArray[Any]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], list[npt.NDArray[Any]]]:
    """The pairs ordered by clip, the preferred file first; which are first of their clip; the sort keys, ordered."""
    order = np.lexsort([*preference[::-1], clip])
    ordered = clip[order]
    first = np.ones(len(order), bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return order, first, [p[order] for p in preference]


def _duplicates(
    table: pa.Table,
    clips: pa.Table,
    clip: npt.NDArray[np.int64],
    row: npt.NDArray[np.int64],
    first: npt.NDArray[np.bool_],
    keys: list[npt.NDArray[Any]],
) -> pa.Table:
    """(clip_id, kept, left, why) of the files that another was preferred to."""
    winner = np.flatnonzero(first)[np.cumsum(first) - 1] if len(first) else np.empty(0, np.int64)
    left = np.flatnonzero(~first)
    kept = winner[left]
    why = np.select([k[left] != k[kept] for k in keys], list(_WHYS), "") if len(left) else np.empty(0, object)
    full = pc.binary_join_element_wise(table["root"], table["path"], "/")
    columns = {
        "clip_id": clips["clip_id"].take(pa.array(clip[left])),
        "kept": full.take(pa.array(row[kept])),
        "left": full.take(pa.array(row[left])),
        "why": pa.array(why.tolist(), pa.string()),
    }
    return pa.table(columns)


def _count(
    manifest: Manifest, matched: pa.ChunkedArray, pictured: pa.ChunkedArray
) -> tuple[list[dict[str, Any]], pa.Table]:
    counts, lacking = [], []
    has, has_pictures = matched.combine_chunks(), pictured.combine_chunks()
    for dataset, split in manifest.splits():
        ids = manifest.of(dataset, split)["clip_id"]
        there = pc.is_in(ids, has)
        n, n_pictured = pc.sum(there).as_py() or 0, pc.sum(pc.is_in(ids, has_pictures)).as_py() or 0
        told = {"n_clips": len(ids), "n_matched": n, "n_with_pictures": n_pictured, "n_missing": len(ids) - n}
        counts.append({"dataset": dataset, "split": split, **told})
        gone = ids.filter(pc.invert(there))
        both = [pa.array([v] * len(gone), pa.string()) for v in (dataset, split)]
        lacking.append(pa.table({"dataset": both[0], "split": both[1], "clip_id": gone}))
    return counts, pa.concat_tables(lacking)


def describe(result: Imported) -> list[str]:
    """What was found, in lines for people."""
    lines = [f"{result.n_files:,} media files, {result.n_used:,} of them used"]
    for s in result.splits:
        lines.append(
            f"{s['dataset']} {s['split']}: {s['n_matched']:,} of {s['n_clips']:,} clips, "
            f"{s['n_with_pictures']:,} with pictures, {s['n_missing']:,} missing"
        )
    lines += [f"layout {name}: {n:,} files" for name, n in result.layouts.items()]
    lines += [f"kept another file {n:,} times: it {why}" for why, n in result.n_duplicates.items()]
    lines += [f"not used, {n:,} files: {why}" for why, n in result.unmatched.items()]
    if result.n_other:
        kinds = ", ".join(f"{ext} {n:,}" for ext, n in list(result.n_other.items())[:8])
        lines.append(f"no sound or video: {kinds}")
    return lines
