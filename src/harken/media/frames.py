"""Frames of any encoder, brought by whoever made them: a folder of shards on which a pooling can be trained.

A source is a Parquet file or a folder of them (columns `clip_id` and `frames`), a folder of `<clip_id>.npy`, or an .npz
whose keys are clip ids; a clip is an array (frame, dim). What is written depends on the clips alone, not on how or in
which order they came: they are sorted by id, so many a shard, and the digest is that of the contents. The folder is
made beside its place and moved there whole, with `frames.json`, written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harken.clips import Manifest
from harken.errors import ConfigError, DataError, unknown
from harken.progress import track
from harken.shards import (
    ShardWriter,
    atomic,
    digest_of,
    feed,
    file_sha256,
    fingerprint,
    read_table,
    shard_path,
    sync_folder,
    vectors,
    vectors_type,
    write_json,
)

NAME: Final = "frames"
FACTS, TEXTS = "frames.json", "texts.parquet"
FORMAT: Final = 1
DTYPES: Final = ("float16", "float32")
CLIPS_PER_SHARD: Final = 256
_OURS = re.compile(r"\d{5,}\.parquet|\d{5,}\.frames\.npy|texts\.parquet|frames\.json")
_ROWS_AT_ONCE = 16  # of a Parquet file: frames of 10 s may have megabytes
_BROKEN = (pa.ArrowException, ValueError, EOFError, OSError, MemoryError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class ImportedFrames:
    """What an import left in `folder`: frames (frame, `dim`) of `n_clips`, the longest of which has `n_frames`.

    `frame_s`: seconds from one frame to the next, None where nobody said. `digest` names the contents: frames, texts
    and `frame_s`. `n_unknown`: clips that no list of the manifest names, None where they were not held against one.
    """

    folder: Path
    dim: int
    n_clips: int
    n_frames: int
    frame_s: float | None
    dtype: str
    digest: str
    has_texts: bool
    n_unknown: int | None

    def to_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        return {**asdict(self), "folder": str(self.folder)}


class _Clip(NamedTuple):
    """A clip as its source has it, and what to call it where it is wrong."""

    id: str
    who: str
    frames: np.ndarray


class _Source(NamedTuple):
    """The ids of all clips, and the clips in the same order, the source's own; each is read when it is asked for."""

    ids: list[str]
    clips: Iterator[_Clip]


def import_frames(
    source: Path,
    folder: Path,
    *,
    dtype: str,
    frame_s: float | None,
    texts: Path | None,
    known: Collection[str] | None,
) -> ImportedFrames:
    """Make `folder` hold the frames of `source`, as `dtype`, and the `texts`, in place of an earlier import there.

    `texts` is a Parquet file with the columns `caption` and `embedding`. `known` are the ids of the manifest: clips
    that it does not have are kept and counted. Frames are never all in memory; those of a Parquet file that is not
    sorted by id lie meanwhile in a file without a name beside `folder`.

    Raises ConfigError for options that cannot be, and for a folder that holds other things than an import; DataError,
    with the file and the clip, for whatever is not a finite array (frame, dim) of floats that fits `dtype`, for ids
    that come twice or cannot be ids, and where no clip is known.
    """
    _check_options(source, folder, dtype, frame_s)
    frame_s = None if frame_s is None else float(frame_s)
    found = _open(source)
    if not found.ids:
        raise DataError(f"{source}: no clip in it. Expected {_EXPECTED}.")
    n_unknown = None if known is None else _n_unknown(source, found.ids, known)
    with _beside(folder) as work:
        kept = None if texts is None else _write_texts(work, texts)  # first: what is wrong with them shows at once
        dim, n_frames = _write_shards(work, found, dtype)
        facts = {
            "format": FORMAT,
            "dim": dim,
            "n_clips": len(found.ids),
            "n_frames": n_frames,
            "frame_s": frame_s,
            "dtype": dtype,
            "digest": fingerprint(digest_of(work), kept, frame_s),
            "source": {"name": source.name, "sha256": file_sha256(source) if source.is_file() else None},
            "has_texts": kept is not None,
            "n_unknown": n_unknown,
        }
        write_json(work / FACTS, facts)
    return _of(folder, facts)


def read_frames(folder: Path, digest: str | None) -> ImportedFrames:
    """What an import left in `folder`.

    Raises DataError where there is none, or not all of it, and where its digest is not `digest`, if one is given.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder}: no imported frames here. Run `harken import-frames SOURCE --into {folder}` first."
        ) from None
    except ValueError as e:
        raise DataError(f"{folder / FACTS}: not what an import writes ({e}). Import the frames anew.") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise DataError(f"{folder}: imported by another version of harken. Import the frames anew.")
    if digest is not None and facts["digest"] != digest:
        raise DataError(
            f"{folder}: these are not the frames that this run was asked to train on: their digest is "
            f"{facts['digest']}, the recipe's is {digest}. Import those again, or change the recipe's digest."
        )
    for shard in range(_n_shards(facts["n_clips"])):
        if not shard_path(folder, shard).is_file():  # its clips would silently not be there
            raise DataError(f"{shard_path(folder, shard)}: missing. Import the frames anew.")
    return _of(folder, facts)


def read_texts(folder: Path) -> tuple[list[str], np.ndarray]:
    """The captions that were imported into `folder`, sorted, and their embeddings (caption, dim), float32.

    Raises DataError where there are none.
    """
    path = folder / TEXTS
    if not path.is_file():
        raise DataError(f"{path}: no texts were imported. Run `harken import-frames` with `--texts`.")
    with _whole(path, "Parquet file"):
        table = pq.read_table(path)
    return table["caption"].to_pylist(), _matrix(table["embedding"].chunks, str(path))


def coverage(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """How much of each dataset and split was imported: clips with frames, and captions with embeddings, of how many.

    The latter are None where no texts were imported.
    """
    held = read_table(folder)["clip_id"].combine_chunks()
    captions = pq.read_table(folder / TEXTS, columns=["caption"])["caption"] if (folder / TEXTS).is_file() else None
    rows = []
    for dataset, split in manifest.splits():
        listed = manifest.of(dataset, split)
        texts = pc.list_flatten(listed["captions"])
        row = {"dataset": dataset, "split": split, "n_clips": len(listed), "n_captions": len(texts)}
        row["n_with_frames"] = _n_in(listed["clip_id"], held)
        row["n_with_texts"] = None if captions is None else _n_in(texts, captions.combine_chunks())
        rows.append(row)
    return rows


def describe(found: ImportedFrames, splits: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was imported, and how much of each split of `coverage` that is, in lines for people."""
    apart = ""
    if found.frame_s is not None:
        apart = f", {found.frame_s:g} s apart ({found.n_frames * found.frame_s:g} s)"
    lines = [
        f"{found.n_clips:,} clips, at most {found.n_frames} frames each{apart}, of {found.dim} numbers ({found.dtype})",
        f"digest {found.digest}",
    ]
    if found.n_unknown is None:
        lines.append("not held against the lists: there is no manifest yet (`dvc repro catalog`)")
    elif found.n_unknown:
        lines.append(f"{found.n_unknown:,} clips are in no list of the manifest and will not be used")
    for row in splits:
        part = f"{row['dataset']} {row['split']}: {row['n_with_frames']:,} of {row['n_clips']:,} clips"
        n_texts = row["n_with_texts"]
        lines.append(part if n_texts is None else f"{part}, {n_texts:,} of {row['n_captions']:,} captions")
    return lines


def recipe(found: ImportedFrames, splits: Sequence[Mapping[str, Any]]) -> str:
    """The line of `train.recipes` that trains on an import: of the captioned dataset that has most of its clips."""
    held: Counter[str] = Counter()
    for s in splits:
        held[s["dataset"]] += s["n_with_frames"] if s["n_captions"] else 0
    dataset = held.most_common(1)[0][0] if held.total() else "audiocaps"
    texts = "imported" if found.has_texts else "bert"
    encoder = f"{{frames: {_in_yaml(str(found.folder))}, digest: {json.dumps(found.digest)}, texts: {texts}}}"
    loss = "{name: nt_xent, temperature: 0.07, reduction: mean_of_directions}"
    return (
        f"{_in_yaml(found.folder.name)}: {{dataset: {dataset}, encoder: {encoder}, "
        f"pooling: {{name: tap, dp: 512}}, loss: {loss}}}"
    )


def _in_yaml(text: str) -> str:
    """`text` in quotes, unless nobody can read it as anything but a string; a digest may be all digits."""
    words = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
    is_plain = re.fullmatch(r"[A-Za-z/][\w./-]*", text) and text.lower() not in words
    return text if is_plain else json.dumps(text)


def _n_in(values: pa.ChunkedArray, held: pa.Array) -> int:
    return pc.sum(pc.is_in(values, held)).as_py() or 0


def _of(folder: Path, facts: dict[str, Any]) -> ImportedFrames:
    names = set(ImportedFrames.__dataclass_fields__) - {"folder"}
    return ImportedFrames(folder=folder, **{n: facts[n] for n in names})


def _check_options(source: Path, folder: Path, dtype: str, frame_s: float | None) -> None:
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if frame_s is not None and not (math.isfinite(frame_s) and frame_s > 0):
        raise ConfigError(f"frame_s is {frame_s}: expected the seconds from one frame to the next, such as 0.32.")
    here, there = source.resolve(), folder.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ConfigError(
            f"{folder}: what it holds is replaced, and the frames to import are in {source}. Take another folder."
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file. Import into a folder of its own, such as data/frames/laion.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    others = sorted(p.name for p in folder.iterdir() if not _OURS.fullmatch(p.name))
    if others or not (folder / FACTS).is_file():
        what = f"holds {others[0]!r}" if others else f"has no {FACTS}"
        raise ConfigError(f"{folder} {what}: not an import, so it is not replaced. Import into a folder of its own.")


def _n_unknown(source: Path, ids: Sequence[str], known: Collection[str]) -> int:
    n = sum(i not in known for i in ids)
    if n < len(ids):
        return n
    here, there = (" and ".join(repr(i) for i in sorted(some)[:2]) or "none" for some in (ids, known))
    raise DataError(
        f"{source}: no list of the manifest has any of its {n} clips. Its ids are like {here}, the manifest's like "
        f"{there}. Name the clips as harken does, yt:<video id>:<start ms>-<end ms> for ten seconds of a YouTube video "
        "(harken.clips.youtube_id); docs/own-frames.md tells how."
    )


def _check_id(clip_id: str, where: object) -> str:
    """An id that can be printed, compared and looked for; what looks like a path is one."""
    printable = clip_id.isprintable() and clip_id == clip_id.strip() and clip_id != ""
    # Clotho's ids, zen:<record>/<archive>/<hash>, are the only ones of harken's with a slash
    if printable and not (re.search(r"[/\\]", clip_id) and not clip_id.startswith("zen:")):
        return clip_id
    raise DataError(f"{where}: {clip_id!r} is no clip id: expected the manifest's, such as yt:aB3_-kLm90Q:0-10000.")


def _check_once(ids: Sequence[str], where: Sequence[object]) -> None:
    """`where[i]` is the file that `ids[i]` lies in."""
    first: dict[str, object] = {}
    for i, path in zip(ids, where, strict=True):
        if i in first:
            raise DataError(f"{path}: clip {i!r} comes twice, the first time in {first[i]}. Keep one of them.")
        first[i] = path


_EXPECTED = (
    "a Parquet file, or a folder of them, with the columns `clip_id` and `frames`; a folder of <clip_id>.npy; or an "
    ".npz whose keys are clip ids"
)


def _open(source: Path) -> _Source:
    if source.is_dir():
        files = [p for p in sorted(source.rglob("*")) if p.is_file() and not _is_hidden(p.relative_to(source))]
        tables, arrays = ([p for p in files if p.suffix == end] for end in (".parquet", ".npy"))
        if tables and arrays:
            raise DataError(f"{source}: holds {tables[0].name} and {arrays[0].name}; a source is one kind of file.")
        return _of_parquet(tables) if tables else _of_folder(source, arrays)
    if not source.is_file():
        raise DataError(f"{source}: no such file or folder. Expected {_EXPECTED}.")
    if source.suffix == ".parquet":
        return _of_parquet([source])
    if source.suffix == ".npz":
        return _of_archive(source)
    raise DataError(f"{source}: not a kind of file that can be imported. Expected {_EXPECTED}.")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _of_folder(source: Path, files: Sequence[Path]) -> _Source:
    """`<clip_id>.npy`; the slashes of Clotho's ids are folders."""
    paths = {_check_id(p.relative_to(source).as_posix().removesuffix(".npy"), p): p for p in files}
    ids = sorted(paths)
    return _Source(ids, (_Clip(i, str(paths[i]), _load(paths[i])) for i in ids))


def _load(path: Path) -> np.ndarray:
    with _whole(path, ".npy file of numbers"):
        return _array(np.load(path, allow_pickle=False))


def _of_archive(source: Path) -> _Source:
    with _whole(source, ".npz file"), _npz(source) as file:
        listed = list(file.files)
    for i in listed:
        _check_id(i, source)
    _check_once(listed, [source] * len(listed))
    return _Source(sorted(listed), _members(source, sorted(listed)))


def _npz(source: Path) -> np.lib.npyio.NpzFile:
    file = np.load(source, allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("it is a single array")
    return file


def _members(source: Path, ids: Sequence[str]) -> Iterator[_Clip]:
    with _npz(source) as file:
        for i in ids:
            who = f"{source}: clip {i!r}"
            with _whole(who, "array of numbers"):
                frames = _array(file[i])
            yield _Clip(i, who, frames)


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise ValueError(f"it holds {type(value).__name__}")
    return value


@contextlib.contextmanager
def _whole(who: object, kind: str) -> Iterator[None]:
    """What a reader says of a file that is not what it should be, as a DataError; what the disk says as it is."""
    try:
        yield
    except _BROKEN as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise DataError(f"{who}: not a whole {kind} ({e}).") from None


def _of_parquet(files: Sequence[Path]) -> _Source:
    ids: list[str] = []
    where: list[Path] = []
    for path in files:
        with _parquet(path) as file:
            _check_columns(path, file.schema_arrow)
            here = file.read(["clip_id"])["clip_id"].to_pylist()
        if None in here:
            raise DataError(f"{path}: row {here.index(None)} has no clip_id.")
        ids += [_check_id(i, path) for i in here]
        where += [path] * len(here)
    _check_once(ids, where)
    return _Source(ids, (clip for path in files for clip in _rows(path)))


def _rows(path: Path) -> Iterator[_Clip]:
    with _parquet(path) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["clip_id", NAME]):
            for clip_id, frames in zip(batch["clip_id"].to_pylist(), batch[NAME], strict=True):
                who = f"{path}: clip {clip_id!r}"
                yield _Clip(clip_id, who, _matrix([frames.values], who))


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """A Parquet file that is read bit by bit, however large its row groups are, and by its checksums, if it has any."""
    how = {"buffer_size": 1 << 20, "pre_buffer": False, "page_checksum_verification": True}
    with _whole(path, "Parquet file"), pq.ParquetFile(path, **how) as file:
        yield file


def _check_columns(path: Path, schema: pa.Schema) -> None:
    lacking = [n for n in ("clip_id", NAME) if n not in schema.names]
    if lacking:
        raise DataError(f"{path}: no column {lacking[0]!r}; it has {', '.join(schema.names)}. Expected {_EXPECTED}.")
    kind = schema.field("clip_id").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{path}: clip_id is of type {kind}; expected string.")
    kind = schema.field(NAME).type
    if not (_is_list(kind) and _is_vector(kind.value_type)):
        hint = " One vector for a whole clip is (1, dim): a list of one list." if _is_vector(kind) else ""
        raise DataError(f"{path}: {NAME} is of type {kind}; expected lists (frame) of lists (dim) of floats.{hint}")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_vector(kind: pa.DataType) -> bool:
    return _is_list(kind) and pa.types.is_floating(kind.value_type)


def _matrix(rows: Iterable[pa.Array | None], who: str) -> np.ndarray:
    """(row, dim) of arrays of lists, each as long as the others."""
    parts = []
    for part in rows:
        if part is None or part.null_count:
            raise DataError(f"{who}: a value is missing (null).")
        lengths = np.unique(pc.list_value_length(part).to_numpy(zero_copy_only=False))
        if len(lengths) > 1:
            raise DataError(f"{who}: vectors of {lengths[0]} and of {lengths[1]} numbers; all must have as many.")
        numbers = part.flatten()
        if numbers.null_count:
            raise DataError(f"{who}: a number is missing (null).")
        if len(part):
            parts.append(numbers.to_numpy(zero_copy_only=False).reshape(len(part), int(lengths[0])))
    widths = sorted({p.shape[1] for p in parts})
    if len(widths) > 1:
        raise DataError(f"{who}: vectors of {widths[0]} and of {widths[1]} numbers; all must have as many.")
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


def _checked(raw: np.ndarray, dtype: str, who: str) -> np.ndarray:
    """`raw` (row, dim) as `dtype`, contiguous. Raises DataError for what is not so many finite floats that fit."""
    if raw.dtype.kind != "f" or raw.dtype.itemsize > 8:
        raise DataError(f"{who}: holds {raw.dtype}; expected float16, float32 or float64.")
    if raw.ndim != 2:
        hint = " One vector for a whole clip is (1, dim)." if raw.ndim == 1 else ""
        raise DataError(f"{who}: an array of shape {raw.shape}; expected (frame, dim).{hint}")
    if not raw.size:
        raise DataError(f"{who}: nothing in it, shape {raw.shape}. Leave out clips that have no frames.")
    wrong = ~np.isfinite(raw)
    if wrong.any():
        row = int(np.flatnonzero(wrong.any(1))[0])
        raise DataError(f"{who}: {int(wrong.sum())} numbers are NaN or infinite, the first of them in row {row}.")
    with np.errstate(over="ignore", under="ignore"):
        fitting = np.ascontiguousarray(raw, dtype)
    if not np.isfinite(fitting).all() or (raw.any() and not fitting.any()):
        largest, do = float(np.abs(raw).max()), "scale the numbers" if dtype == "float32" else "take --dtype float32"
        raise DataError(f"{who}: the largest number is {largest:g}, which does not fit {dtype}: {do}.")
    return fitting


def _write_shards(work: Path, found: _Source, dtype: str) -> tuple[int, int]:
    """The shards of all clips, sorted by id. Returns the frames' dim and the most frames of a clip."""
    clips = _sorted(_alike(found, dtype), found.ids, dtype, work)
    first = next(clips)
    clips, dim, n_frames = chain([first], clips), first[1].shape[1], 0
    for shard in range(_n_shards(len(found.ids))):
        mark = fingerprint(NAME, FORMAT)
        with ShardWriter(work, shard, fingerprint=mark, columns={}, arrays={NAME: (dim, dtype)}) as out:
            for clip_id, frames in islice(clips, CLIPS_PER_SHARD):
                out.write(clip_id, frames=frames)
                n_frames = max(n_frames, len(frames))
    return dim, n_frames


def _n_shards(n_clips: int) -> int:
    return -(-n_clips // CLIPS_PER_SHARD)


def _alike(found: _Source, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """(clip_id, frames) in the source's order, checked, all of the dim of the first."""
    dim = None
    for clip in track(found.clips, len(found.ids), "import-frames: clips"):
        frames = _checked(clip.frames, dtype, clip.who)
        if dim not in (None, frames.shape[1]):
            raise DataError(f"{clip.who}: frames of {frames.shape[1]} numbers; those of the clips before have {dim}.")
        dim = frames.shape[1]
        yield clip.id, frames


def _sorted(
    clips: Iterator[tuple[str, np.ndarray]], ids: Sequence[str], dtype: str, room: Path
) -> Iterator[tuple[str, np.ndarray]]:
    """The clips by id. Those of a source in another order are read once and lie in a file in `room` until all are."""
    by_id = sorted(ids)
    if by_id == ids:
        yield from clips
        return
    with tempfile.TemporaryFile(dir=room) as file:
        places = {}
        for clip_id, frames in clips:
            places[clip_id] = file.tell(), frames.shape
            file.write(frames.data)
        for clip_id in by_id:
            yield clip_id, _read_at(file, *places[clip_id], np.dtype(dtype))


def _read_at(file: IO[bytes], at: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    file.seek(at)
    return np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def _write_texts(work: Path, path: Path) -> str:
    """Keep the texts of a Parquet file, each caption once, sorted. Returns a hash of them."""
    captions, embeddings = _read_given(path)
    order = sorted(range(len(captions)), key=captions.__getitem__)
    kept: list[int] = []
    for i in order:
        if kept and captions[kept[-1]] == captions[i]:
            if not np.array_equal(embeddings[kept[-1]], embeddings[i]):
                raise DataError(f"{path}: caption {captions[i]!r} comes twice with different embeddings. Keep one.")
            continue
        kept.append(i)
    captions, embeddings = [captions[i] for i in kept], embeddings[kept]
    kind = vectors_type("float32", embeddings.shape[1])
    table = pa.table({"caption": pa.array(captions, pa.string()), "embedding": vectors(embeddings, kind)})
    with atomic(work / TEXTS) as f:
        pq.write_table(table, f, compression="lz4", use_dictionary=False, write_statistics=False)
    digest = hashlib.blake2b(digest_size=16)
    feed(digest, captions)
    feed(digest, embeddings)
    return digest.hexdigest()


def _read_given(path: Path) -> tuple[list[str], np.ndarray]:
    """The captions and embeddings (caption, dim) of a Parquet file, float32."""
    if not path.is_file():
        raise DataError(f"{path}: no such file. Expected a Parquet file with the columns `caption` and `embedding`.")
    with _parquet(path) as file:
        kinds = {f.name: f.type for f in file.schema_arrow}
        kind = kinds.get("caption", pa.null())
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)) or not _is_vector(
            kinds.get("embedding", pa.null())
        ):
            told = ", ".join(f"{n} ({k})" for n, k in kinds.items())
            raise DataError(f"{path}: has {told}; expected `caption` (string) and `embedding` (a list of floats).")
        table = file.read(["caption", "embedding"])
    if table["caption"].null_count:
        raise DataError(f"{path}: {table['caption'].null_count} rows have no caption.")
    if not len(table):
        raise DataError(f"{path}: no caption in it.")
    return table["caption"].to_pylist(), _checked(_matrix(table["embedding"].chunks, str(path)), "float32", str(path))


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block ends well; one import at a time.

    Killed at any point, there is at `folder` what was there before, or what is new, or for an instant nothing; never a
    part. What a killed import left beside it goes when the next one begins.
    """
    place = folder.resolve()
    work, old = (place.with_name(f".{place.name}.{what}") for what in ("importing", "replaced"))
    work.mkdir(parents=True, exist_ok=True)
    lock = work / ".lock"
    with open(lock, "w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another import into it is running. Wait for its end.") from None
        try:
            _clear(work, but=lock)
            yield work
            lock.unlink()
            sync_folder(work)
            shutil.rmtree(old, ignore_errors=True)
            if place.exists():
                place.rename(old)
            work.rename(place)
            sync_folder(place.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            if old.exists() and not place.exists():
                old.rename(place)
            raise


def _clear(folder: Path, but: Path) -> None:
    for entry in os.scandir(folder):
        if entry.path != str(but):
            Path(entry.path).unlink()
