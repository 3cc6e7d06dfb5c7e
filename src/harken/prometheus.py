"""Stages for Prometheus: with HARKEN_METRICS=FOLDER a `.prom` file each, for node_exporter's textfile collector.

Stages end, so nothing could be asked of them over the network; the files stay, and with them when a stage last went
well. Each stage of each preset writes a file of its own, replaced whole at most once a second, so that any number of
them share the folder. How many runs failed is counted in the record of runs (`harken.timings`), not in the file.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from harken import timings
from harken.errors import ConfigError
from harken.progress import Loop
from harken.shards import fingerprint

log = logging.getLogger("harken")


@runtime_checkable
class Metrics(Protocol):
    """What a stage tells each second while it runs (`update`, with its loop) and of its end (`end`, its end line)."""

    def update(self, loop: Loop | None) -> None: ...

    def end(self, line: Mapping[str, Any]) -> None: ...


class _Nothing:
    def update(self, loop: Loop | None) -> None: ...

    def end(self, line: Mapping[str, Any]) -> None: ...


def metrics(work: Path, stage: str) -> Metrics:
    """What writes the stage's file into the folder that HARKEN_METRICS names; nothing where that is not set.

    Raises ConfigError where it is no folder, or prometheus_client is not installed.
    """
    folder = os.environ.get("HARKEN_METRICS", "")
    if not folder:
        return _Nothing()
    if not Path(folder).is_dir():
        raise ConfigError(
            f"HARKEN_METRICS={folder!r}: no such folder. Name the one that node_exporter reads "
            "(--collector.textfile.directory); each stage writes a file of its own there."
        )
    try:
        import prometheus_client  # noqa: F401 - only whether it is there
    except ImportError:
        raise ConfigError("HARKEN_METRICS needs the extra `cluster`: pip install 'harken[cluster]'.") from None
    return _Textfile(Path(folder), work.resolve(), stage)


class _Textfile:
    """The file of one stage, from the record of its runs and what it tells of the present one."""

    def __init__(self, folder: Path, work: Path, stage: str) -> None:
        self.path = folder / f"harken-{work.name}-{fingerprint(str(work))[:6]}-{stage}.prom"
        self._labels = {"work": str(work), "stage": stage}
        runs = [r for r in timings.read(work) if r["stage"] == stage and r["outcome"] != "running"]
        done = [r for r in runs if r["outcome"] == "done"]
        self._failures = Counter(r.get("reason") or r["outcome"] for r in runs if r["outcome"] != "done")
        self._last_done: Mapping[str, Any] | None = done[-1] if done else None
        self._items: tuple[int, int] = (0, 0)
        self._is_running = self._is_well = True
        self._write()

    def update(self, loop: Loop | None) -> None:
        self._items = (0, 0) if loop is None else (loop.done, loop.total)
        self._write()

    def end(self, line: Mapping[str, Any]) -> None:
        self._is_running = False
        if line["outcome"] == "done":
            self._last_done = line
        else:
            self._failures[line["reason"]] += 1
        self._write()

    def _write(self) -> None:
        from prometheus_client import CollectorRegistry, write_to_textfile

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        try:
            write_to_textfile(str(self.path), registry)  # beside it first, then in its place
        except OSError as e:  # no reason to end a stage
            if self._is_well:
                log.warning("%s: not written: %s", self.path, e)
            self._is_well = False

    def collect(self) -> Iterator[Any]:
        """What prometheus_client asks of a collector."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        names, values = list(self._labels), list(self._labels.values())

        def gauge(name: str, told: str, value: float | None) -> Iterator[Any]:
            if value is not None:
                family = GaugeMetricFamily(f"harken_stage_{name}", told, labels=names)
                family.add_metric(values, value)
                yield family

        done, total = self._items
        last = self._last_done or {}
        ended_s = last["ended_ms"] / 1000 if last else None
        yield from gauge("running", "1 while the stage runs; stays 1 where it was killed", float(self._is_running))
        yield from gauge("told_timestamp_seconds", "When this was written", time.time())
        yield from gauge("items_done", "Items of the stage's present or last loop that are done", done)
        yield from gauge("items", "Items of that loop", total)
        yield from gauge("last_success_timestamp_seconds", "When the stage last ended well", ended_s)
        yield from gauge("last_duration_seconds", "Seconds that its last run which ended well took", last.get("wall_s"))
        yield from gauge("last_cpu_seconds", "CPU seconds of that run, its children included", last.get("cpu_s"))
        yield from gauge("last_peak_rss_bytes", "Memory of that run's largest process", last.get("peak_rss_bytes"))
        yield from gauge("last_items_per_second", "Throughput of that run's longest loop", last.get("items_s"))
        failures = CounterMetricFamily("harken_stage_failures", "Runs that did not end well", labels=[*names, "reason"])
        for reason, n in sorted(self._failures.items()):
            failures.add_metric([*values, reason], n)
        yield failures
