"""What each run of a stage took: `work/timings.jsonl`, a line where it began and one where it ended.

A record for people, never an input: no stage reads it, DVC does not know it, and no result depends on it. A run with a
first line and no second one was killed, or runs still. Lines are appended under a lock, so stages that run side by side
share the file; a line that a full disk cut short is passed over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import resource
import socket
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from harken import __version__
from harken.engines import n_workers
from harken.progress import Loop

log = logging.getLogger("harken")
FILE: Final = "timings.jsonl"
OUTCOMES: Final = ("done", "failed", "stopped", "killed", "running")
LAST: Final = 5  # of how many done runs `summary` takes the median


def now_ms() -> int:
    """UTC epoch milliseconds."""
    return round(1000 * time.time())


class Run:
    """One run of a stage by this process, from its begin line to its end line.

    CPU time, memory and bytes are of this process and of the children that it has waited for, so a cluster's workers
    are not in them. Memory is that of the largest process. Bytes read and written are what was asked of files, pipes
    and sockets (Linux only, else None); what lies in the system's cache counts, what is mapped does not.
    """

    def __init__(self, work: Path, stage: str, run_id: str) -> None:
        self._path = work / FILE
        self._began = time.monotonic()
        self._before = _used()
        engine = os.environ.get("HARKEN_ENGINE", "local").partition("+")[0]  # no address: these files are shown around
        self._facts: dict[str, Any] = {
            "stage": stage,
            "run_id": run_id,
            "began_ms": now_ms(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "engine": engine,
            "n_workers": {"local": n_workers(), "inline": 1}.get(engine),  # a cluster's come and go
            "version": __version__,
        }
        _append(self._path, {"event": "begin", **self._facts})

    def end(self, outcome: str, reason: str, loops: Sequence[Loop], out: Path) -> dict[str, Any]:
        """Write and return the end line. `outcome` is `done`, `failed` or `stopped` (Ctrl-C), `reason` the kind of
        error; `loops` are what the stage counted, `out` is the folder that it fills."""
        wall_s = time.monotonic() - self._began
        used = {k: None if v is None else v - (self._before[k] or 0) for k, v in _used().items()}
        line = {
            "event": "end",
            **self._facts,
            "ended_ms": now_ms(),
            "outcome": outcome,
            "reason": reason,
            "wall_s": round(wall_s, 3),
            "cpu_s": round(used["cpu_s"] or 0.0, 3),
            "peak_rss_bytes": _peak_rss_bytes(),
            "bytes_read": used["bytes_read"],
            "bytes_written": used["bytes_written"],
            "bytes_out": _bytes_in(out) if outcome == "done" else None,
            **_counted(loops),
        }
        _append(self._path, line)
        return line


def _counted(loops: Sequence[Loop]) -> dict[str, Any]:
    """The items of the loop that took longest: the others prepare or publish."""
    counted = [loop for loop in loops if loop.done]
    if not counted:
        return {"what": "", "n_items": 0, "items_s": None}
    loop = max(counted, key=lambda loop: loop.seconds)
    rate = loop.done / loop.seconds if loop.seconds > 0 else None
    return {"what": loop.what, "n_items": loop.done, "items_s": None if rate is None else round(rate, 3)}


def _used() -> dict[str, float | None]:
    """CPU seconds and bytes so far of this process and of the children that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    used: dict[str, float | None] = {"cpu_s": sum(u.ru_utime + u.ru_stime for u in usages)}
    try:
        lines = Path("/proc/self/io").read_text().splitlines()  # children that were waited for are counted in
    except OSError:
        return {**used, "bytes_read": None, "bytes_written": None}
    counts = dict(line.split(": ") for line in lines)
    return {**used, "bytes_read": int(counts["rchar"]), "bytes_written": int(counts["wchar"])}


def _peak_rss_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _bytes_in(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _append(path: Path, line: dict[str, Any]) -> None:
    """A line more, on a line of its own whatever stands before it. What cannot be written is said, and no more: a
    record of a run must not be what ends it."""
    data = (json.dumps(line) + "\n").encode()
    try:
        with open(path, "ab+") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            size = f.seek(0, os.SEEK_END)
            if size and os.pread(f.fileno(), 1, size - 1) != b"\n":
                data = b"\n" + data
            f.write(data)
    except OSError as e:
        log.warning("%s: this run's times are not recorded: %s", path, e)


def read(work: Path) -> list[dict[str, Any]]:
    """Every run that `work` tells of, in the order of beginning: the fields of its end line, of its begin line alone
    where it has none.

    `outcome` is `done`, `failed`, `stopped`, `running`, or `killed` where its process is gone and said nothing more.
    """
    runs: dict[tuple[Any, ...], dict[str, Any]] = {}
    try:
        lines = (work / FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for raw in lines:
        with contextlib.suppress(ValueError):  # cut short by a full disk
            line = json.loads(raw)
            runs[tuple(line[k] for k in ("stage", "run_id", "began_ms", "pid", "host"))] = line
    for run in runs.values():
        if run.pop("event") == "begin":
            run["outcome"] = "running" if is_locked(work, run["stage"]) else "killed"
    # only the last of a stage's open runs can be the one that runs: a stage has one at a time
    open_runs = {run["stage"]: run for run in runs.values() if run["outcome"] == "running"}
    for run in runs.values():
        if run["outcome"] == "running" and run is not open_runs[run["stage"]]:
            run["outcome"] = "killed"
    return sorted(runs.values(), key=lambda run: run["began_ms"])


def is_locked(work: Path, stage: str) -> bool:
    """Whether a process holds the stage's lock, whichever process or host: it runs now."""
    try:
        with open(work / f"{stage}.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def summary(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each stage, in the order of first runs: `last`, its last run; and of its last LAST runs that were done
    `n_done`, and the medians `median_wall_s` and `median_items_s` (None where there was none)."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        stages.setdefault(run["stage"], []).append(run)
    rows = []
    for stage, its in stages.items():
        done = [r for r in its if r["outcome"] == "done"][-LAST:]
        rates = [r["items_s"] for r in done if r["items_s"] is not None]
        rows.append(
            {
                "stage": stage,
                "last": its[-1],
                "n_done": len(done),
                "median_wall_s": statistics.median(r["wall_s"] for r in done) if done else None,
                "median_items_s": statistics.median(rates) if rates else None,
            }
        )
    return rows
