"""What the tests of the engines let workers do. A module of its own, because workers must be able to import it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from harken.errors import ClipError


def squarer(folder: str) -> Callable[[int], int]:
    """A heavy object: every making of it is noted."""
    (Path(folder) / f"made-{os.getpid()}-{time.time_ns()}").touch()
    return square


def square(n: int) -> int:
    time.sleep(0.02)
    return n * n


def refuser(folder: str) -> Callable[[int], int]:
    return refuse


def refuse(n: int) -> int:
    if n == 3:
        raise ClipError("qc.silent", f"clip {n}")
    return n


def victim(folder: str) -> Callable[[int], int]:
    """Its worker is killed at item 5, once."""
    mark = Path(folder) / "killed"

    def work(n: int) -> int:
        if n == 5 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    return work


def doomed(folder: str) -> Callable[[int], int]:
    """Its worker is killed at every item but the first."""

    def work(n: int) -> int:
        if n:
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    return work


def device_teller(folder: str) -> Callable[[int], tuple[int, str]]:
    def work(n: int) -> tuple[int, str]:
        time.sleep(0.1)
        return os.getpid(), os.environ.get("HARKEN_DEVICE", "")

    return work


def teller(folder: str) -> Callable[[int], str]:
    return lambda _: os.environ.get("OMP_NUM_THREADS", "")


def sleeper(folder: str) -> Callable[[int], int]:
    def work(n: int) -> int:
        (Path(folder) / f"pid-{os.getpid()}").touch()
        time.sleep(60)
        return n

    return work


def echo(folder: str) -> Callable[[object], object]:
    return lambda item: item


def pid_of(folder: str) -> Callable[[int], int]:
    return lambda _: os.getpid()


def scribe(folder: str) -> Callable[[int], int]:
    """Every beginning and every end of an item leaves a file: who was at it, and whether it was done."""

    def work(n: int) -> int:
        (Path(folder) / f"begun-{n}-{os.getpid()}-{time.time_ns()}").touch()
        time.sleep(0.4)
        (Path(folder) / f"done-{n}").touch()
        return n

    return work


def thread_of(folder: str) -> Callable[[int], tuple[int, int]]:
    """Who made the heavy object, and who is at the item."""
    maker = threading.get_ident()

    def work(n: int) -> tuple[int, int]:
        time.sleep(0.1)
        return maker, threading.get_ident()

    return work


def slow_squarer(folder: str) -> Callable[[int], int]:
    """A heavy object: every making of it is noted, and every item."""
    (Path(folder) / f"made-{os.getpid()}-{time.time_ns()}").touch()

    def work(n: int) -> int:
        (Path(folder) / f"item-{n}").touch()
        time.sleep(0.1)
        return n * n

    return work
