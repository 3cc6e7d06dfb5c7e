"""How the benchmarks measure: contestants in turn, CPU time, medians, ratios; one thread."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

from harken.engines import n_cores  # noqa: E402 - after the threads are set

ROUNDS = 5


def measure(contestants: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median CPU seconds of each contestant over `rounds`, after one warm-up each.

    They take turns, so that a slow spell of the machine falls on all of them.
    """
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(rounds):
        for name, run in contestants.items():
            began = time.process_time()
            run()
            taken[name].append(time.process_time() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def show(what: str, medians: Mapping[str, float], us: str, unit: str = "CPU ms", per: float = 1e-3) -> None:
    """Print what was measured, where and when, each median, and how long each takes in units of `us`."""
    print(f"{what}\n{machine()}")
    for name, seconds in medians.items():
        print(f"  {name:<34} {seconds / per:10.1f} {unit}   {seconds / medians[us]:6.2f} x {us}")


def machine() -> str:
    """The machine and the day, for the record."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{cpu}, {n_cores()} cores, {system}, {today}, one thread, median of {ROUNDS}"
