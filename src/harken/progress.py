"""Progress of long stages: a bar on a terminal, a line now and then in a log, one line at the end in CI."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("harken")
T = TypeVar("T")
LOG_EVERY_S = 30.0


def track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """`items`, with their progress shown as `what done/total` and time left."""
    if sys.stderr.isatty() and not os.environ.get("CI"):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            yield from bar.track(items, total=total, description=what)
        return
    began = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - last > LOG_EVERY_S and not os.environ.get("CI"):
            left = (now - began) / done * (total - done)
            log.info("%s: %d of %d, about %.0f s left", what, done, total, left)
            last = now
    if total:
        log.info("%s: %d in %.1f s", what, done, time.monotonic() - began)
