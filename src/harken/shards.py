"""Shards: a few hundred clips in one file, complete when at its final name. The only atomic-rename code in harken.

A shard is `NNNNN.parquet`: one row per requested clip (`clip_id`, `status`, `reason`, `message`, then the stage's own
columns, null where the clip failed). Dense features stand beside it as `NNNNN.<name>.npy`, all clips' rows one after
the other (so nothing is padded and a clip is one `preadv` away); `<name>_start` and `<name>_rows` say which are whose.
The Parquet file is published last, so its presence means that the shard is whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harken.errors import DataError

OK, FAILED = "ok", "failed"
OUTCOME = [("clip_id", pa.string()), ("status", pa.string()), ("reason", pa.string()), ("message", pa.string())]


class Outcome(NamedTuple):
    """What happened to one requested clip in one stage: `status` is `ok`, or `failed` for the canonical `reason`."""

    clip_id: str
    status: str
    reason: str
    message: str


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` whole or not at all, even if the machine stops in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb+") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a file's own fsync does not."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON with sorted keys, atomically."""
    with atomic(path) as f:
        f.write((json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def fingerprint(*parts: Any) -> str:
    """A short hash of JSON-able values: equal inputs, params and code give an equal fingerprint."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def code_version(modules: Iterable[str]) -> str:
    """A hash of the sources under `src/harken` that a stage's results depend on (paths such as `media/fbank.py`)."""
    root = Path(__file__).parent
    files = sorted(p for m in modules for p in ((root / m).rglob("*.py") if (root / m).is_dir() else [root / m]))
    return hashlib.sha256(
        b"\0".join(f.relative_to(root).as_posix().encode() + f.read_bytes() for f in files)
    ).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.parquet"


def vectors_type(dtype: str, *shape: int) -> pa.DataType:
    """Nested fixed-size lists that hold an array of this shape, such as (image, dim).

    No number in them may be missing, only a whole array: Parquet then stores no mark for each, and reads twice as fast.
    """
    kind = pa.from_numpy_dtype(np.dtype(dtype))
    for size in reversed(shape):
        kind = pa.list_(pa.field("item", kind, nullable=False), size)
    return kind


def vectors(values: np.ndarray, kind: pa.DataType, missing: np.ndarray | None = None) -> pa.Array:
    """(row, *shape) as `kind` (see `vectors_type`), without a copy or a Python list; null where `missing` (row,)."""
    if not pa.types.is_fixed_size_list(kind):
        return pa.array(values.reshape(-1), kind)
    mask = None if missing is None or not missing.any() else pa.array(missing)
    return pa.FixedSizeListArray.from_arrays(vectors(values, kind.value_type), type=kind, mask=mask)


def _shape_of(kind: pa.DataType) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and type of the array that nested fixed-size lists hold."""
    shape = []
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    return tuple(shape), np.dtype(kind.to_pandas_dtype())


class ShardWriter:
    """Writes one shard: `write(clip_id, ...)` for a clip that worked, `skip(clip_id, reason)` for one that did not.

    `columns` maps column names to Arrow types; `arrays` maps names of dense features to (width, dtype), for which
    `write` takes a (rows, width) array. For a column of fixed-size lists it takes an array of their shape, too.
    Nothing appears in `folder` until the block ends without an exception.
    """

    def __init__(
        self,
        folder: Path,
        shard: int,
        *,
        fingerprint: str,
        columns: Mapping[str, pa.DataType],
        arrays: Mapping[str, tuple[int, str]] | None = None,
        meta: Mapping[str, str] | None = None,
        rows_per_group: int = 64,
    ) -> None:
        self.path = shard_path(folder, shard)
        self.outcomes: list[Outcome] = []
        self._columns = list(columns)
        self._vectors = {n: _shape_of(kind) for n, kind in columns.items() if pa.types.is_fixed_size_list(kind)}
        self._specs = dict(arrays or {})
        fields = [*OUTCOME, *columns.items()]
        for name in self._specs:
            fields += [(f"{name}_start", pa.int64()), (f"{name}_rows", pa.int32())]
        self._schema = pa.schema(fields)
        self.meta = {**(meta or {}), "fingerprint": fingerprint}  # facts may be added until the block ends
        self._rows: list[dict[str, Any]] = []
        self._rows_per_group = rows_per_group
        self._digest = hashlib.blake2b(digest_size=16)
        self._lengths = dict.fromkeys(self._specs, 0)
        self._files: dict[str, tuple[Any, BinaryIO]] = {}
        self._ids: set[str] = set()

    def __enter__(self) -> ShardWriter:
        for name in self._specs:
            context = atomic(self.path.with_suffix(f".{name}.npy"))
            f = context.__enter__()
            f.write(self._header(name))
            self._files[name] = (context, f)
        self._context = atomic(self.path)
        self._file = self._context.__enter__()
        # no dictionary and no statistics: the columns that matter are media, images and embeddings
        self._parquet = pq.ParquetWriter(
            self._file, self._schema, compression="lz4", use_dictionary=["status", "reason"], write_statistics=False
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            for name, (_, f) in self._files.items():
                f.seek(0)
                f.write(self._header(name))  # now with the true number of rows
                f.seek(0, os.SEEK_END)
            self._flush()
            meta = {**self.meta, "digest": self._digest.hexdigest()}
            self._parquet.add_key_value_metadata({f"harken.{k}": v for k, v in meta.items()})
            self._parquet.close()
        else:
            with contextlib.suppress(Exception):  # what matters is the error that ended the block
                self._parquet.close()
        # the arrays first, the Parquet file last: its presence means that all is there
        for context, _ in [*self._files.values(), (self._context, self._file)]:
            try:
                context.__exit__(kind, error, trace)
            except BaseException as e:
                if e is not error:
                    raise

    def write(self, clip_id: str, **values: Any) -> None:
        """One clip that worked. Every column and array must be given."""
        row = self._outcome(Outcome(clip_id, OK, "", ""))
        for name in self._columns:
            value = values.pop(name)
            if name in self._vectors and isinstance(value, np.ndarray):
                shape, number = self._vectors[name]
                if value.shape != shape:
                    raise ValueError(f"{name} of {clip_id}: expected {shape}, found {value.shape}")
                value = np.ascontiguousarray(value, number)
                row[name] = value
                # an array of vectors and a list of them are the same content
                feed(self._digest, list(value) if len(shape) > 1 else value)
            else:
                row[name] = value
                feed(self._digest, value)
        for name, (width, dtype) in self._specs.items():
            array = np.ascontiguousarray(values.pop(name), dtype)
            if array.ndim != 2 or array.shape[1] != width:
                raise ValueError(f"{name} of {clip_id}: expected (rows, {width}), found {array.shape}")
            row[f"{name}_start"], row[f"{name}_rows"] = self._lengths[name], len(array)
            self._lengths[name] += len(array)
            self._files[name][1].write(array.data)
            feed(self._digest, array)
        if values:
            raise TypeError(f"{clip_id}: columns that this shard does not have: {', '.join(values)}")
        if len(self._rows) >= self._rows_per_group:
            self._flush()

    def skip(self, clip_id: str, reason: str, message: str = "") -> None:
        """One clip that failed, for a canonical reason."""
        self._outcome(Outcome(clip_id, FAILED, reason, message))

    def _outcome(self, outcome: Outcome) -> dict[str, Any]:
        if outcome.clip_id in self._ids:
            raise ValueError(f"{self.path.name}: {outcome.clip_id} was written twice")
        self._ids.add(outcome.clip_id)
        self.outcomes.append(outcome)
        self._rows.append(dict(outcome._asdict()))
        feed(self._digest, list(outcome[:3]))
        return self._rows[-1]

    def _flush(self) -> None:
        if self._rows:
            columns = [self._column(field.name, field.type) for field in self._schema]
            self._parquet.write_table(pa.Table.from_arrays(columns, schema=self._schema))
            self._rows = []

    def _column(self, name: str, kind: pa.DataType) -> pa.Array:
        values = [row.get(name) for row in self._rows]
        if name not in self._vectors or not all(v is None or isinstance(v, np.ndarray) for v in values):
            return pa.array(values, kind)
        missing = np.array([v is None for v in values])
        nothing = np.zeros(*self._vectors[name])
        return vectors(np.stack([nothing if v is None else v for v in values]), kind, missing)

    def _header(self, name: str) -> bytes:
        width, dtype = self._specs[name]
        buffer = io.BytesIO()
        spec = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": (self._lengths[name], width),
        }
        np.lib.format.write_array_header_1_0(buffer, spec)  # leaves room for the row count to grow in place
        return buffer.getvalue()


def feed(digest: Any, value: Any) -> None:
    """Feed `value` to a hash, exactly and with its length, so that no two different rows feed the same bytes."""
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype.str}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    elif isinstance(value, list | tuple):
        digest.update(b"[%d" % len(value))
        for v in value:
            feed(digest, v)
    else:
        raw = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(b"%d:" % len(raw))
        digest.update(raw)


def facts(folder: Path, shard: int) -> dict[str, str]:
    """The facts of the data in a shard's schema metadata: fingerprint, digest and what the stage recorded."""
    path = shard_path(folder, shard)
    try:
        raw = pq.read_metadata(path).metadata or {}
    except FileNotFoundError:
        raise DataError(f"{path}: no such shard. Run the stage that makes {folder.name} first.") from None
    except pa.ArrowInvalid as e:
        raise DataError(f"{path}: not a whole Parquet file ({e}). Delete it and run its stage again.") from None
    return {k.decode().removeprefix("harken."): v.decode() for k, v in raw.items() if k.startswith(b"harken.")}


def is_done(folder: Path, shard: int, fingerprint: str) -> bool:
    """Whether the shard is whole and was made from the same inputs, params and code."""
    return shard_path(folder, shard).is_file() and facts(folder, shard).get("fingerprint") == fingerprint


def shards_in(folder: Path) -> list[int]:
    """The numbers of the shards in a folder, ascending. Raises DataError where there are none."""
    found = sorted(int(p.stem) for p in folder.glob("*.parquet") if p.stem.isdigit())
    if not found:
        raise DataError(
            f"{folder} has no shards. Run `dvc repro` for the stage that fills it, or check `paths` in params."
        )
    return found


def read_shard(folder: Path, shard: int, columns: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
    """The ok clips of a shard, one dict each: `clip_id` and the wanted columns. Streams one row group at a time."""
    wanted = ["clip_id", "status", *columns]
    with pq.ParquetFile(shard_path(folder, shard)) as file:
        for batch in file.iter_batches(64, columns=wanted):
            for row in batch.to_pylist():
                if row.pop("status") == OK:
                    yield row


def read_table(folder: Path, columns: Iterable[str] = ()) -> pa.Table:
    """The ok clips of every shard of a folder: `clip_id`, `shard` and the wanted columns, ordered by shard."""
    tables = []
    for shard in shards_in(folder):
        table = pq.read_table(shard_path(folder, shard), columns=["clip_id", "status", *columns])
        table = table.filter(pa.compute.equal(table["status"], OK)).drop_columns(["status"])
        tables.append(table.append_column("shard", pa.array([shard] * len(table), pa.int32())))
    return pa.concat_tables(tables)


def ledger(folder: Path) -> pa.Table:
    """What happened to every requested clip of a folder: clip_id, status, reason, message, shard."""
    tables = []
    for shard in shards_in(folder):
        table = pq.read_table(shard_path(folder, shard), columns=[name for name, _ in OUTCOME])
        tables.append(table.append_column("shard", pa.array([shard] * len(table), pa.int32())))
    return pa.concat_tables(tables)


class DenseArray:
    """One `.npy` file of rows, read with `preadv` straight into the caller's buffer (no views, no copies)."""

    # Linux cuts a longer hint to the disk's read-ahead or its largest request, which are 128 KB or more on most disks
    HINT_BYTES = 1 << 17

    def __init__(self, folder: Path, shard: int, name: str) -> None:
        self.path = shard_path(folder, shard).with_suffix(f".{name}.npy")
        try:
            with open(self.path, "rb") as f:
                np.lib.format.read_magic(f)
                self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(f)
                self._offset = f.tell()
        except FileNotFoundError:
            raise DataError(
                f"{self.path}: missing beside its Parquet file. Run the stage that makes it again."
            ) from None
        except ValueError as e:
            raise DataError(f"{self.path}: not a whole .npy file ({e}). Delete it and run its stage again.") from None
        self._fd = os.open(self.path, os.O_RDONLY)
        self.row_bytes = int(self.dtype.itemsize * self.shape[1])

    def expect(self, start: int, n_rows: int) -> None:
        """Tell the kernel that these rows will be read soon: it fetches them meanwhile, many requests at once.

        Only a hint: no promise, and nothing on a system that takes none.
        """
        if hasattr(os, "posix_fadvise"):
            begin, end = (self._offset + row * self.row_bytes for row in (start, start + n_rows))
            for at in range(begin, end, self.HINT_BYTES):
                os.posix_fadvise(self._fd, at, min(self.HINT_BYTES, end - at), os.POSIX_FADV_WILLNEED)

    def read_into(self, start: int, out: np.ndarray, *, wait: bool = True) -> bool:
        """Rows `start .. start + len(out)` into `out` (rows, width), contiguous and of the file's dtype.

        Without `wait` only what is in memory is read, and False says that it was not all, or that the system or the
        file system cannot tell.
        """
        if out.dtype != self.dtype or out.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"{self.path.name} holds {self.dtype} {self.shape}; it cannot fill {out.dtype} {out.shape}"
            )
        if not len(out):
            return True
        if not (wait or hasattr(os, "RWF_NOWAIT")):
            return False
        view = out.data.cast("B")
        done, at, flags = 0, self._offset + start * self.row_bytes, 0 if wait else os.RWF_NOWAIT
        while done < len(view):
            try:
                n = os.preadv(self._fd, [view[done:]], at + done, flags)
            except OSError as e:
                if wait or e.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                    raise
                return False
            if n == 0:
                raise DataError(f"{self.path}: ends before row {start + len(out)}. Delete it and run its stage again.")
            done += n
        return True

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


def publish(work: Path, out: Path, names: Iterable[str] | Mapping[str, str]) -> None:
    """Make `out` hold exactly the files and folders `names` of `work`, by hard link (by copy on another file system).

    A mapping gives each name in `out` its name in `work`.

    Published files share their inode with the scratch folder and with DVC's cache: nothing may open them for writing.
    """
    for leftover in work.rglob(".*.tmp"):  # of a run that was killed
        leftover.unlink()
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    for name, kept_as in (names if isinstance(names, Mapping) else {n: n for n in names}).items():
        source, target = work / kept_as, out / name
        if source.is_dir():
            shutil.copytree(source, target, copy_function=_link)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(str(source), str(target))


def publish_shards(work: Path, out: Path, shards: Iterable[int]) -> None:
    """Publish the given shards with their dense arrays, and drop from `work` what no current job asks for."""
    wanted = {f"{s:05d}" for s in shards}
    names = []
    for path in sorted(work.iterdir()):
        if path.name.split(".")[0] in wanted:
            names.append(path.name)
        elif path.is_file():
            path.unlink()
    publish(work, out, names)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def digest_of(folder: Path) -> str:
    """One hash of the contents of all shards of a folder, from their footers."""
    return fingerprint([(s, facts(folder, s)["digest"]) for s in shards_in(folder)])


def pending(work: Path, jobs: Mapping[int, str]) -> list[int]:
    """The shards of `jobs` (shard -> fingerprint) that `work` does not hold yet, ascending."""
    work.mkdir(parents=True, exist_ok=True)
    for leftover in work.glob(".*.tmp"):
        leftover.unlink()
    return [shard for shard in sorted(jobs) if not is_done(work, shard, jobs[shard])]
