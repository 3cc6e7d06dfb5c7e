"""What the tests of the guard let its process do. A module of its own: that process must be able to import it."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harken.errors import ClipError, ConfigError
from harken.guard import Guard


def worker(folder: str) -> Callable[[Any], Any]:
    """Every making of it is noted."""
    (Path(folder) / f"made-{os.getpid()}").touch()
    return work


def heavy(folder: str) -> Callable[[Any], Any]:
    """Takes longer to make, and holds more, than an item may."""
    until = time.process_time() + 0.4
    while time.process_time() < until:
        pass
    _kept.append(bytes(400_000_000))
    return worker(folder)


def work(item: Any) -> Any:
    name, *rest = item if isinstance(item, tuple) else (item,)
    return WORK[name](*rest)


def _spin() -> None:
    while True:
        pass


def _spin_in_c() -> None:
    re.match(r"(a+)+$", "a" * 64 + "b")  # one call into C that no signal handler of Python's interrupts


def _refuse() -> None:
    raise ClipError("qc.silent", "the loudest sample is at -80 dBFS", n_bytes=7)


def _mistake() -> None:
    raise ValueError("a mistake in the code")


class _UnsendableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("so it is")


def _noise() -> str:
    os.write(1, b"native code says\n" * 100)
    print("Python too", flush=True)
    return "heard"


def _refused_by_ffmpeg() -> None:
    """As the decoder tells it: its own error, which comes of FFmpeg's."""
    import av.error

    try:
        raise av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")
    except av.error.FFmpegError as e:
        raise ClipError("media.truncated", "Cannot allocate memory while decoding the sound") from e


def _big_picture() -> int:
    import av

    return sum(p.buffer_size for p in [av.VideoFrame(16_000, 16_000, "rgb24")])


def _big_result(n_bytes: int) -> bytes:
    return b"x" * n_bytes


_kept: list[Any] = []


def _leak(mb: int) -> int:
    _kept.append(np.zeros((mb, 1 << 20), np.uint8))  # counts untouched
    return len(_kept)


def _crash_when_full() -> None:
    """As C code does that never looks whether it was given the memory it asked for."""
    held = []
    try:
        while True:
            held.append(b"x" * 10_000_000)
    except MemoryError:
        os.kill(os.getpid(), signal.SIGSEGV)


def _corrupt() -> str:
    """What crashes in a process that has worked before, and only there."""
    _kept.append(1)
    if len(_kept) > 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return "whole"


def _killed(folder: str, times: int) -> str:
    """Killed from outside, so many times."""
    marks = list(Path(folder).glob("killed-*"))
    if len(marks) < times:
        (Path(folder) / f"killed-{len(marks)}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "spared"


def _features(media: bytes) -> dict[str, Any]:
    data = np.frombuffer(media, np.uint8).astype(np.float32)
    return {"fbank": data.reshape(-1, 100) / 3, "logmel": np.asfortranarray(data.reshape(100, -1)), "images": [media]}


def _touch(path: str) -> str:
    Path(path).touch()
    return path


WORK: dict[str, Callable[..., Any]] = {
    "echo": lambda value=None: value,
    "pid": os.getpid,
    "threads": lambda: (os.environ["OMP_NUM_THREADS"], threading.active_count()),
    "spin": _spin,
    "spin_in_c": _spin_in_c,
    "sleep": lambda: time.sleep(600),
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "exit": lambda: os._exit(3),
    "sys_exit": lambda: sys.exit(4),
    "refuse": _refuse,
    "mistake": _mistake,
    "not_to_be_sent": lambda: (_ for _ in ()).throw(_UnsendableError(1, 2)),
    "noise": _noise,
    "big_array": lambda: len(np.zeros(4_000_000_000, np.uint8)),
    "big_bytes": lambda: len(bytearray(4_000_000_000)),
    "big_picture": _big_picture,
    "big_result": _big_result,
    "refused_by_ffmpeg": _refused_by_ffmpeg,
    "crash_when_full": _crash_when_full,
    "leak": _leak,
    "corrupt": _corrupt,
    "killed": _killed,
    "features": _features,
    "touch": _touch,
}


def unmakeable(folder: str) -> Callable[[Any], Any]:
    raise ConfigError("extract.fbank: unknown name 'kaldy'.")


def dying_maker(folder: str) -> Callable[[Any], Any]:
    os.abort()


def guarded(folder: str) -> Callable[[Any], Any]:
    """What an engine's worker makes: a function that has each item done in a process of that worker's."""
    guard: Guard[Any, Any] = Guard(worker, folder, limit_s=0.3, memory_gb=0.3)

    def outcome(item: Any) -> Any:
        try:
            return guard(item)
        except ClipError as e:
            return e.reason

    return outcome


def run_alone(folder: str, name: str) -> None:
    """The whole program of a parent process: it tells its child's id, then how an item ends."""
    guard: Guard[Any, Any] = Guard(worker, folder, limit_s=600.0, memory_gb=0.3)
    pid = guard("pid")
    (Path(folder) / "pid.part").write_text(str(pid))
    (Path(folder) / "pid.part").rename(Path(folder) / "pid")
    if name == "idle":
        time.sleep(600)
    try:
        guard(name)
    except ClipError as e:
        print(e.reason)


if __name__ == "__main__":
    import guard_toys

    guard_toys.run_alone(*sys.argv[1:])
