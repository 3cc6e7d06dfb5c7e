"""7z archives whose members' names are keys: what they hold, which part of them is damaged, and safe extraction.

py7zr reads the header and unpacks. A solid archive packs many members as one stream, so where a member's CRC is wrong
the damage lies between the packed bytes that the last good member had read and those that the bad one has read: that is
what has to be fetched again, not the archive.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import re
import shutil
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import py7zr
from py7zr.io import Py7zIO, WriterFactory

from harken.errors import DataError
from harken.shards import sync_folder, write_json

INDEX: Final = ".members.json"  # of an extracted folder: every member's size and CRC; its name is refused for a member
_ENDS: Final = "the header at the start or the end"
_TAIL: Final = "the header at the end"
_UNSEEN: Final = "what no CRC covers (every member is right)"
_MAGIC: Final = b"7z\xbc\xaf\x27\x1c"
_START: Final = 32  # bytes of the first header: signature, version, and where the last header is, with CRCs
_STEP: Final = 1 << 16  # packed bytes fed at a time while looking for damage: how exactly it is placed
_PIECE: Final = 1 << 20  # unpacked bytes held at a time
_COPY, _DELTA, _LZMA, _LZMA2 = b"\x00", b"\x03", b"\x03\x01\x01", b"\x21"
_BRANCHES: Final = MappingProxyType(
    {
        b"\x03\x03\x01\x03": lzma.FILTER_X86,
        b"\x03\x03\x02\x05": lzma.FILTER_POWERPC,
        b"\x03\x03\x05\x01": lzma.FILTER_ARM,
        b"\x03\x03\x07\x01": lzma.FILTER_ARMTHUMB,
        b"\x03\x03\x08\x05": lzma.FILTER_SPARC,
    }
)


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive: its exact name with '/' between folders, its size in bytes, its CRC32 (None: unstated)."""

    name: str
    size: int
    crc32: int | None


@dataclass(frozen=True, slots=True)
class Suspect:
    """The bytes [start, stop) of an archive that hold the damage of `what`."""

    what: str
    start: int
    stop: int


def members(archive: Path) -> list[Member]:
    """The files in `archive`, in its order. Folders are not listed.

    Raises DataError for a damaged header, for encryption, and for names that could leave the folder or stand for
    something else than a file: absolute, with `..` or an empty part, with a drive letter, links, devices, sockets, a
    name given twice or both to a file and to a folder.
    """
    with archive.open("rb") as file:
        return _listed(archive, _opened(archive, file))


def suspects(archive: Path, block_bytes: int) -> list[Suspect]:
    """Where `archive`, which is known to be damaged, can be so. Costs one decompression.

    The headers, where one cannot be read: the blocks of `block_bytes` that can hold them. Else the first bad member of
    each packed stream. Where every member has its CRC, the few places that no CRC covers.
    """
    size = archive.stat().st_size
    with archive.open("rb") as file:
        start = file.read(_START)
        at, n = int.from_bytes(start[12:20], "little"), int.from_bytes(start[20:28], "little")
        told = int.from_bytes(start[8:12], "little")
        tail = max(0, size - 2 * block_bytes)
        if len(start) < _START or start[:6] != _MAGIC or zlib.crc32(start[12:]) != told or _START + at + n > size:
            return [Suspect(_ENDS, 0, min(_START, size)), Suspect(_ENDS, tail, size)]
        try:
            found = _opened(archive, file)
            streams = _streams(found)
        except DataError:
            return [Suspect(_TAIL, max(0, _START + at - 2 * block_bytes), size)]
        bad = [s for stream in streams if (s := _first_bad(archive, file, stream)) is not None]
    if bad:
        return bad
    unseen = [(0, _START), *((max(s.start, s.stop - _STEP), s.stop) for s in streams), (tail, size)]
    return [Suspect(_UNSEEN, first, stop) for first, stop in unseen]


@dataclass(frozen=True, slots=True)
class _Stream:
    """The packed bytes [start, stop) that unpack to `files`, one after the other."""

    start: int
    stop: int
    folder: Any
    files: list[Any]


def _streams(found: Any) -> list[_Stream]:
    main = found.header.main_streams
    if main is None:
        return []
    first = found.afterheader + main.packinfo.packpos
    edges = [first + p for p in main.packinfo.packpositions]
    streams, n = [], 0
    for folder in main.unpackinfo.folders:
        n_packed = max(1, len(folder.packed_indices))
        files = [f for f in found.files if not f.emptystream and f.folder is folder]
        streams.append(_Stream(edges[n], edges[n + n_packed], folder, files))
        n += n_packed
    return streams


def extract(archive: Path, target: Path) -> None:
    """Unpack `archive` into the folder `target`, which appears whole or not at all; nothing is done where it exists.

    Every member is written under its exact name and must have the size and the CRC32 that the header states. The folder
    also holds `.members.json`, the list that `index` reads. What an earlier, killed call left behind is removed. The
    caller sees to it that only one process at a time unpacks to `target`.

    Raises DataError as `members` does, and for damage, for a member that yields more or fewer bytes than stated, and
    for a disk without room for what the header announces.
    """
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.unpacking")
    if work.exists():
        shutil.rmtree(work)
    listed = members(archive)
    _refuse_no_room(archive, target, listed)
    work.mkdir()
    try:
        _unpack(archive, work, listed)
        write_json(work / INDEX, {m.name: [m.size, m.crc32] for m in listed})
        sync_folder(work)
        work.rename(target)
        sync_folder(target.parent)
    except OSError as e:
        raise DataError(
            f"{target}: cannot be written ({e}). Make room or choose another folder, then run again."
        ) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)


def index(folder: Path) -> dict[str, int]:
    """Name -> size in bytes of each member of a folder that `extract` made. Raises DataError where it did not."""
    path = folder / INDEX
    if not path.is_file():
        raise DataError(f"{folder}: not a folder that harken unpacked ({INDEX} is missing). Remove it and run again.")
    return {name: size for name, (size, _) in json.loads(path.read_bytes()).items()}


def _opened(archive: Path, file: io.BufferedReader) -> Any:
    try:
        file.seek(0)
        found = py7zr.SevenZipFile(file, "r")
        if found.needs_password():
            raise DataError(f"{archive}: the archive is encrypted; harken reads open data only.")
        if not hasattr(found, "files"):
            raise DataError(f"{archive}: the archive has no members.")
        return found
    except DataError:
        raise
    except MemoryError:
        raise
    except Exception as e:  # a damaged header may say anything, and py7zr believes some of it
        raise DataError(
            f"{archive}: not a readable 7z archive ({type(e).__name__}: {e}). It is cut or damaged: get it again."
        ) from e


def _listed(archive: Path, found: Any) -> list[Member]:
    folders: set[str] = set()
    files: dict[str, Member] = {}
    for f in found.files:
        name = str(f.filename)
        _refuse_name(archive, name, is_folder=f.is_directory)
        _refuse_kind(archive, name, f)
        parts = name.rstrip("/").split("/")
        folders.update("/".join(parts[:n]) for n in range(1, len(parts) + bool(f.is_directory)))
        if f.is_directory:
            continue
        if name in files:
            raise DataError(f"{archive}: two members are named {name!r}; no official archive does that.")
        if f.uncompressed < 0:
            raise DataError(f"{archive}: member {name[:120]!r} states a size below 0: do not trust this archive.")
        files[name] = Member(name, int(f.uncompressed), f.crc32)
    if both := sorted(folders & files.keys()):
        raise DataError(f"{archive}: {both[0]!r} is both a file and a folder; no official archive does that.")
    return list(files.values())


def _refuse_name(archive: Path, name: str, *, is_folder: bool) -> None:
    parts = (name.removesuffix("/") if is_folder else name).split("/")
    wrong = (
        "an absolute path"
        if name.startswith("/")
        else "a drive letter"
        if re.match(r"[A-Za-z]:", name)
        else "a part '..', '.' or ''"
        if any(p in ("", ".", "..") for p in parts)
        else "a NUL or a backslash"
        if "\0" in name or "\\" in name
        else "the name of harken's own list"
        if name == INDEX
        else ""
    )
    if wrong:
        raise DataError(
            f"{archive}: member {name[:120]!r} has {wrong}. Nothing was unpacked: do not trust this archive."
        )


def _refuse_kind(archive: Path, name: str, f: Any) -> None:
    kind = f.st_fmt or 0
    if f.is_symlink or f.is_junction or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a link" if f.is_symlink or f.is_junction else "a device, pipe or socket"
        raise DataError(
            f"{archive}: member {name[:120]!r} is {what}, expected files only. Nothing was unpacked: do not trust this"
            " archive."
        )


def _refuse_no_room(archive: Path, target: Path, listed: list[Member]) -> None:
    needed, free = sum(m.size for m in listed), shutil.disk_usage(target.parent).free
    if needed > free:
        raise DataError(
            f"{archive}: unpacks to {needed / 1e9:.2f} GB, {target.parent} has {free / 1e9:.2f} GB free. Make room or"
            " choose another folder."
        )


class _Writer(Py7zIO):
    """One member on its way to disk: no byte more than the header states."""

    seekable = staticmethod(lambda: False)  # py7zr must not rewind what is written once

    def __init__(self, path: Path, member: Member) -> None:
        self._member, self._n, self._crc32 = member, 0, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("xb")

    def write(self, s: bytes | bytearray) -> int:
        self._n += len(s)
        if self._n > self._member.size:
            raise DataError(f"{self._member.name!r} unpacks to more than the {self._member.size} bytes it states.")
        self._crc32 = zlib.crc32(s, self._crc32)
        return self._file.write(s)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def drop(self) -> None:
        """Close the file of a member that was broken off."""
        self._file.close()

    @property
    def is_right(self) -> bool:
        return self._n == self._member.size and self._member.crc32 in (None, self._crc32)

    def read(self, size: int | None = None) -> bytes:
        raise io.UnsupportedOperation("a member on its way to disk is not read")

    def seek(self, offset: int, whence: int = 0) -> int:
        raise io.UnsupportedOperation("a member on its way to disk is not rewound")

    def flush(self) -> None:
        self._file.flush()

    def size(self) -> int:
        return self._n


class _Writers(WriterFactory):
    def __init__(self, work: Path, listed: list[Member]) -> None:
        self._members = {str(work / m.name): m for m in listed}
        self.made: dict[str, _Writer] = {}

    def create(self, filename: str) -> _Writer:
        member = self._members[filename]
        self.made[member.name] = writer = _Writer(Path(filename), member)
        return writer

    def close(self) -> None:
        for writer in self.made.values():
            writer.drop()


def _unpack(archive: Path, work: Path, listed: list[Member]) -> None:
    writers = _Writers(work.absolute(), listed)
    with archive.open("rb") as file:
        found = _opened(archive, file)
        try:
            for stream in filter(lambda s: s.files, _streams(found)):
                # py7zr reads a block for each member and holds what that member did not use: with blocks of 1 MiB the
                # packed bytes of small members pile up to the size of the archive
                stream.folder.get_decompressor(stream.files[0].compressed).block_size = _STEP
            found.extractall(work.absolute(), factory=writers)
        except (py7zr.exceptions.ArchiveError, lzma.LZMAError, EOFError, ValueError) as e:
            at = list(writers.made)[-1:] or ["the first member"]
            raise DataError(
                f"{archive}: damaged at {at[0]!r} ({type(e).__name__}: {e}). Nothing was kept: get the archive again."
            ) from e
        except DataError as e:
            raise DataError(f"{archive}: member {e} Nothing was kept: do not trust this archive.") from e
        finally:
            writers.close()
    wrong = [m.name for m in listed if m.name not in writers.made or not writers.made[m.name].is_right]
    n_files = sum(p.is_file() and not p.is_symlink() for p in work.rglob("*"))
    if wrong or n_files != len(listed):
        raise DataError(
            f"{archive}: {n_files} files unpacked, {len(listed)} listed, {len(wrong)} wrong ({wrong[:3]}). Nothing was"
            " kept: get the archive again, and unpack it on a file system that tells upper from lower case."
        )


def _first_bad(archive: Path, file: io.BufferedReader, stream: _Stream) -> Suspect | None:
    """Where a packed stream is damaged first."""
    try:
        decode = _decoder(stream.folder.coders)
    except (lzma.LZMAError, ValueError, IndexError):
        return Suspect(_TAIL, stream.start, stream.stop)
    if decode is None:  # a method that cannot be followed byte by byte
        return _anywhere(archive, file, stream)
    file.seek(stream.start)
    good = fed = stream.start
    for f in stream.files:
        crc32, left = 0, int(f.uncompressed)
        try:
            while left:
                packed = file.read(min(_STEP, stream.stop - fed)) if decode.needs_input else b""
                fed += len(packed)
                data = decode(packed, min(left, _PIECE))
                if not data and not packed and decode.needs_input:
                    raise EOFError("the packed stream ends early")
                crc32, left = zlib.crc32(data, crc32), left - len(data)
            is_bad = f.crc32 not in (None, crc32)
        except (lzma.LZMAError, EOFError):
            is_bad = True
        if is_bad:
            return Suspect(repr(str(f.filename)), good, max(fed, good + 1))
        good = max(stream.start, fed - _STEP)  # what was read ahead of this member's end belongs to the next
    return None


def _anywhere(archive: Path, file: io.BufferedReader, stream: _Stream) -> Suspect | None:
    """The whole packed stream, if py7zr finds it damaged."""
    names = [str(f.filename) for f in stream.files]
    try:
        _opened(archive, file).extract(None, targets=names, factory=_Discard())
    except Exception as e:  # whatever the method's own decoder says of damaged input
        what = f"one of {len(names)} members from {names[0]!r} ({type(e).__name__})"
        return Suspect(what, stream.start, stream.stop)
    return None


class _Discard(WriterFactory):
    def create(self, filename: str) -> Py7zIO:
        return py7zr.io.HashIO(filename)  # type: ignore[no-untyped-call]


class _Decoder:
    """Unpacks a stream step by step and asks for input only when it has used up what it was given."""

    def __init__(self, filters: list[dict[str, int]]) -> None:
        self._lzma = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters) if filters else None
        self._held = b""

    @property
    def needs_input(self) -> bool:
        return not self._held if self._lzma is None else bool(self._lzma.needs_input)

    def __call__(self, packed: bytes, max_bytes: int) -> bytes:
        if self._lzma is not None:
            return self._lzma.decompress(packed, max_bytes)
        data, self._held = (self._held + packed)[:max_bytes], (self._held + packed)[max_bytes:]
        return data


def _decoder(coders: list[dict[str, Any]]) -> _Decoder | None:
    """The decoder of a chain of LZMA, LZMA2, branch and delta filters, or of a plain copy; None for other methods."""
    if [c["method"] for c in coders] == [_COPY]:
        return _Decoder([])
    filters: list[dict[str, int]] = []
    for coder in coders:
        read = _FILTERS.get(coder["method"])
        if read is None or coder["numinstreams"] != 1 or coder["numoutstreams"] != 1:
            return None
        filters.insert(0, read(coder.get("properties") or b""))
    if filters[-1]["id"] not in (lzma.FILTER_LZMA1, lzma.FILTER_LZMA2):
        return None
    return _Decoder(filters)


def _lzma(properties: bytes) -> dict[str, int]:
    packed = properties[0]
    dictionary = max(4096, int.from_bytes(properties[1:5], "little"))
    return {
        "id": lzma.FILTER_LZMA1,
        "lc": packed % 9,
        "lp": packed // 9 % 5,
        "pb": packed // 45,
        "dict_size": dictionary,
    }


def _lzma2(properties: bytes) -> dict[str, int]:
    bits = properties[0]
    dictionary = 0xFFFFFFFF if bits == 40 else (2 | bits & 1) << (bits // 2 + 11)
    return {"id": lzma.FILTER_LZMA2, "dict_size": dictionary}


def _branch(which: int) -> Callable[[bytes], dict[str, int]]:
    return lambda properties: {"id": which}


_FILTERS: Final[dict[bytes, Callable[[bytes], dict[str, int]]]] = {
    _LZMA: _lzma,
    _LZMA2: _lzma2,
    _DELTA: lambda properties: {"id": lzma.FILTER_DELTA, "dist": properties[0] + 1},
    **{method: _branch(which) for method, which in _BRANCHES.items()},
}
