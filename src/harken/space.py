"""A full disk, wherever it is met, and what to say of it. It costs nothing but time: a stage may be tried again."""

from __future__ import annotations

import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterable
from pathlib import Path

from harken.errors import TransientError

FULL = (errno.ENOSPC, errno.EDQUOT)
# of libraries that write by themselves and tell only in words
_WORDS = ("no space left on device", "disk quota exceeded", "database or disk is full", "os error 28", "os error 122")


def is_of_full_disk(error: BaseException | None) -> bool:
    """Whether `error` is, or comes from, a write that a full disk or a quota refused."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        is_a_library_s = isinstance(error, OSError | sqlite3.Error | RuntimeError) or "safetensors" in repr(type(error))
        if is_a_library_s and any(w in str(error).lower() for w in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full(error: BaseException, stage: str, work: Path, folders: Iterable[Path]) -> TransientError:
    """What to say where a full disk ended `stage`: how much is free where it writes, what is kept and what to do.

    `work` is the preset's scratch folder, `folders` are the others that the stage writes to.
    """
    places = {f: _existing(f) for f in (work / stage, work, *folders, Path(tempfile.gettempdir()))}
    disks: dict[int, list[Path]] = {}
    for folder, place in places.items():
        disks.setdefault(place.stat().st_dev, []).append(folder)
    free = sorted((_free_bytes(places[on[0]]), _names(on), places[on[0]]) for on in disks.values())
    told = "; ".join(f"{names}: {size(n)} free{_no_inodes(place)}" for n, names, place in free)
    is_quota = any(isinstance(e, OSError) and e.errno == errno.EDQUOT for e in _chain(error))
    what = "a disk quota is used up" if is_quota else "no space left on a disk"
    return TransientError(
        f"stage {stage}: {what} ({_first_words(error)}). "
        f"Now, without what was half-written: {told}. What is finished is kept: {_kept(work / stage)}. Make room (drop "
        "old results from DVC's cache with `dvc gc --workspace`) and run the same command again: it goes on from there."
    )


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _names(folders: list[Path]) -> str:
    return ", ".join(map(str, folders))


def _free_bytes(place: Path) -> int:
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def _no_inodes(place: Path) -> str:
    found = os.statvfs(place)
    return ", but no file more may be made" if found.f_files and not found.f_favail else ""


def size(n_bytes: float | None) -> str:
    """Bytes for people; empty for None."""
    if n_bytes is None:
        return ""
    for unit in ("B", "KB", "MB", "GB"):
        if n_bytes < 999.5:  # or three digits would not hold it
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} TB"


def _kept(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} (nothing yet)"
    n_shards = sum(p.suffix == ".parquet" and p.stem.isdigit() for p in folder.iterdir())
    n_checkpoints = sum(1 for _ in folder.glob("*/state.safetensors"))
    counts = [f"{n} {what}" for n, what in ((n_shards, "shards"), (n_checkpoints, "checkpoints")) if n]
    return f"{folder} ({', '.join(counts) or 'see there'})"
