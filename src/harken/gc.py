"""What lies in the scratch folder and is wanted by nobody any more.

Stages hard-link what is finished into their out, so an entry of the scratch folder is wanted where a file of it is
published. Only stages that are told to be up to date are looked at: of the others, what is not published may be half
made. Never removed: media, archives and what was spooled (`download`: no run can be sure to get them again), and runs
of training that were begun and not finished (hours of somebody's GPU; HARKEN_RESTART gives those up).
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import json
import logging
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from harken.config import FOLDERS, Paths

log = logging.getLogger("harken")
RUNS = ("pretrain", "finetune", "train")
STAGES = ("lists", "weights", "evaluate", *RUNS)
"""The stages that keep a folder per fingerprint in their scratch folder."""
_MARKED = re.compile(r"(?:.+\.)?[0-9a-f]{16}")  # ends with a fingerprint


class Leftover(NamedTuple):
    """A folder or file of the scratch folder that nobody wants, why not, and the bytes that removing it frees."""

    stage: str
    path: Path
    n_bytes: int
    why: str


def leftovers(paths: Paths, settled: Collection[str]) -> list[Leftover]:
    """What may be removed from the scratch folders of the stages `settled`, whose outs are up to date."""
    found: list[Leftover] = []
    for stage in STAGES:
        work, out = paths.work / stage, getattr(paths, FOLDERS[stage])
        if stage not in settled or not work.is_dir() or not out.is_dir():
            continue
        folders = sorted(p for p in work.iterdir() if p.is_dir() and _MARKED.fullmatch(p.name))
        wanted = _wanted(stage, folders, out)
        if folders and not wanted:
            log.warning("gc: %s: nothing in it is what %s holds; left alone", work, out)
            continue
        for folder in folders:
            is_begun = stage in RUNS and not (folder / "run.json").is_file()
            if folder not in wanted and not is_begun:
                found.append(Leftover(stage, folder, _freed(folder), f"not of what {out} holds"))
    return found


def remove(paths: Paths, found: Iterable[Leftover]) -> list[Leftover]:
    """Remove them, but none of a stage that runs by now. Returns what was removed."""
    removed = []
    for item in found:
        with _quiet(paths, item.stage) as is_quiet:
            if is_quiet:
                shutil.rmtree(item.path)
                removed.append(item)
    return removed


@contextlib.contextmanager
def _quiet(paths: Paths, stage: str) -> Iterator[bool]:
    """Whether nobody runs the stage; nobody can begin to meanwhile."""
    with open(paths.work / f"{stage}.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _wanted(stage: str, folders: Iterable[Path], out: Path) -> set[Path]:
    if stage == "evaluate":
        return _measured(folders, out)
    return {f for f in folders if _is_published(f, out / f.name.rpartition(".")[0] if stage in RUNS else out)}


def _is_published(folder: Path, out: Path) -> bool:
    """Whether `out` holds the files of `folder`: the same ones, or, after a `dvc pull`, files with the same bytes."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    pairs = [(p, out / p.relative_to(folder)) for p in files]
    return bool(pairs) and all(
        there.is_file() and (there.samefile(p) or filecmp.cmp(there, p, shallow=False)) for p, there in pairs
    )


def _measured(folders: Iterable[Path], out: Path) -> set[Path]:
    """The folders of evaluated runs whose results are all among those that are published."""
    published = out / "results.json"
    if not published.is_file():
        return set()
    rows = {json.dumps(r, sort_keys=True) for r in json.loads(published.read_text())}
    wanted = set()
    for folder in folders:
        path = folder / "results.json"
        if path.is_file() and all(json.dumps(r, sort_keys=True) in rows for r in json.loads(path.read_text())):
            wanted.add(folder)
    return wanted


def _freed(folder: Path) -> int:
    """Bytes on the disk that go with the folder: files that lie elsewhere too, under another name, stay there."""
    return sum(s.st_blocks * 512 for s in (p.stat() for p in folder.rglob("*") if p.is_file()) if s.st_nlink == 1)
