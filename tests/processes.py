"""What tests ask of processes that they start: whether one lives, whether something has come about, a port for them."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import psutil


def lives(process: psutil.Process | int) -> bool:
    """Whether it runs, or could: one that nobody has reaped yet does not."""
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(is_so: Callable[[], object], limit_s: float = 20.0, every_s: float = 0.01) -> bool:
    """Wait until it is so. False where it is not after `limit_s`."""
    end = time.monotonic() + limit_s
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(every_s)
    return True


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
