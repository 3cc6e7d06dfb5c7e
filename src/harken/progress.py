"""Progress of long stages: a bar on a terminal, a line now and then in a log, one line at the end in CI.

Where a stage is watched (`watched`, as `python -m harken.stages` does), it also lies in `work/<stage>.progress.json`
for whoever wants to show it from another process: `harken status --watch`, the flow. The file is of the stage that runs
now; it goes when the stage ends, and one that a killed process left behind is not read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("harken")
T = TypeVar("T")
LOG_EVERY_S = 30.0
WRITE_EVERY_S = 1.0


@dataclass
class Loop:
    """One loop of a stage over `total` items: how many are `done`, when it began (UTC epoch seconds, for people), and
    when the last item was done by a clock that nobody sets."""

    what: str
    total: int
    began_s: float = field(default_factory=time.time)
    done: int = 0
    began: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)

    def count(self) -> None:
        self.done, self.last = self.done + 1, time.monotonic()

    @property
    def seconds(self) -> float:
        """From the beginning to the last item."""
        return self.last - self.began

    @property
    def left_s(self) -> float | None:
        """The time left at the rate so far; None before the first item is done."""
        if not self.done:
            return None
        return max(0.0, self.seconds / self.done * (self.total - self.done) - (time.monotonic() - self.last))


class Watch:
    """The stage that this process runs: where its progress is written, and every loop that it has gone through."""

    def __init__(self, path: Path, stage: str, run_id: str, tell: Callable[[Loop | None], None]) -> None:
        self.loops: list[Loop] = []
        self._path, self._stage, self._run_id, self._tell = path, stage, run_id, tell
        self._is_well = True
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def begin(self, what: str, total: int) -> Loop:
        loop = Loop(what, total)
        self.loops.append(loop)
        self.write()
        return loop

    def _keep_writing(self) -> None:
        # a thread, so that the file is never older than a second: one item may take an hour
        while not self._end.wait(WRITE_EVERY_S):
            self.write()

    def write(self) -> None:
        """Replace the file. One that cannot be written is said once and costs the stage nothing else."""
        with self._lock:
            loop = self.loops[-1] if self.loops else None
            try:
                if loop is not None:
                    # no fsync, unlike a result: this is worth nothing after a crash, and a busy disk would make it wait
                    tmp = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
                    tmp.write_text(json.dumps(self._facts(loop)))
                    tmp.replace(self._path)
                self._tell(loop)
            except OSError as e:
                if self._is_well:
                    log.warning("progress is not shown elsewhere: %s", e)
                self._is_well = False

    def _facts(self, loop: Loop) -> dict[str, Any]:
        left_s = loop.left_s
        return {
            "stage": self._stage,
            "what": loop.what,
            "done": loop.done,
            "total": loop.total,
            "began_ms": round(1000 * loop.began_s),
            "now_ms": round(1000 * time.time()),
            "left_s": None if left_s is None else round(left_s, 1),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "run_id": self._run_id,
        }


_watch: Watch | None = None


@contextlib.contextmanager
def watched(
    work: Path, stage: str, run_id: str, tell: Callable[[Loop | None], None] = lambda loop: None
) -> Iterator[Watch]:
    """While the block runs, every `track` of this process keeps `work/<stage>.progress.json` up to date; `tell` is
    called with the loop as often (None before the first one), from one thread at a time."""
    global _watch
    before = _watch
    with Watch(_path(work, stage), stage, run_id, tell) as _watch:
        try:
            yield _watch
        finally:
            _watch = before


def read(work: Path, stage: str) -> dict[str, Any] | None:
    """How far the stage has come that runs on `work` now; None where none runs or it has not come to a loop yet.

    {"stage", "what", "done", "total", "began_ms", "now_ms" (UTC epoch milliseconds), "left_s" (None before the first
    item is done), "pid", "host", "run_id"}.
    """
    try:
        found: dict[str, Any] = json.loads(_path(work, stage).read_text())
    except FileNotFoundError:
        return None
    return found if found["host"] != socket.gethostname() or _lives(found["pid"]) else None


def _path(work: Path, stage: str) -> Path:
    return work / f"{stage}.progress.json"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """`items`, with their progress shown as `what done/total` and time left."""
    shown = _noted(items, total, what) if _watch is not None else items
    if sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("HARKEN_LOG") != "json":
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            yield from bar.track(shown, total=total, description=what)
        return
    loop = Loop(what, total)
    said = loop.began
    for item in shown:
        yield item
        loop.count()
        if loop.last - said > LOG_EVERY_S and not os.environ.get("CI"):
            log.info("%s: %d of %d, about %.0f s left", what, loop.done, total, loop.left_s)
            said = loop.last
    if total:
        log.info("%s: %d in %.1f s", what, loop.done, time.monotonic() - loop.began)


def _noted(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """`items`, each counted for the watched stage when the stage asks for the next."""
    watch = _watch
    assert watch is not None
    loop = watch.begin(what, total)
    for item in items:
        yield item
        loop.count()
    watch.write()
