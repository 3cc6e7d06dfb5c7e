"""`harken status` for people, the part about running: what goes on now (`--watch`), what runs took (`--timings`)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from harken import progress, space, timings
from harken.config import FOLDERS, Paths
from harken.errors import ConfigError
from harken.stages import STAGES

out = Console()
EVERY_S = 1.0


def state(stage: str, paths: Paths) -> str:
    """`running`, `done`, `begun` (killed or failed: finished shards and checkpoints are kept, and `dvc repro` goes on
    from them) or `not run`. Looks at names alone."""
    if timings.is_locked(paths.work, stage):
        return "running"
    folder, work = getattr(paths, FOLDERS[stage]), paths.work / stage
    if folder.is_dir() and any(folder.iterdir()):
        return "done"
    return "begun" if work.is_dir() and any(work.iterdir()) else "not run"


def failure(stage: str, paths: Paths) -> dict[str, Any] | None:
    """How the stage's last run failed (see `harken.stages.__main__`); None where it did not, or runs again."""
    try:
        told: dict[str, Any] = json.loads((paths.work / f"{stage}.failed.json").read_text())
    except FileNotFoundError:
        return None
    return told


def now(paths: Paths) -> list[dict[str, Any]]:
    """Every stage: its state, since when it runs (UTC epoch milliseconds), its progress, its failure; None where there
    is none."""
    since = {r["stage"]: r["began_ms"] for r in timings.read(paths.work) if r["outcome"] == "running"}
    return [
        {
            "stage": stage,
            "state": state(stage, paths),
            "began_ms": since.get(stage),
            "progress": progress.read(paths.work, stage),
            "failure": failure(stage, paths),
        }
        for stage in STAGES
    ]


def watch(paths: Paths, as_json: bool) -> None:
    """Show what goes on, anew every second, until Ctrl-C. As JSON: a line each time, for other programs.

    Raises ConfigError where there is no terminal to draw on.
    """
    if not as_json and not out.is_terminal:
        raise ConfigError("status --watch draws on a terminal, and this is none. Use `harken status --watch --json`.")
    try:
        if as_json:
            while True:
                print(json.dumps({"now_ms": timings.now_ms(), "stages": now(paths)}), flush=True)
                time.sleep(EVERY_S)
        with Live(_board(now(paths)), console=out, auto_refresh=False) as live:
            while True:
                live.update(_board(now(paths)), refresh=True)
                time.sleep(EVERY_S)
    except KeyboardInterrupt:
        return


def _board(stages: list[dict[str, Any]]) -> Table:
    table = Table("stage", "state", "", "done", "for", "left", box=None, header_style="bold")
    for s in stages:
        found = s["progress"]
        if found is None:
            since = "" if s["began_ms"] is None else span((timings.now_ms() - s["began_ms"]) / 1000)
            why = _first_line(s["failure"]) if s["state"] != "running" else ""
            table.add_row(s["stage"], s["state"], why, "", since, "")
            continue
        bar = ProgressBar(total=max(found["total"], 1), completed=found["done"], width=24)
        began = span((timings.now_ms() - found["began_ms"]) / 1000)
        done = f"{found['done']:,} of {found['total']:,}  {found['what']}"
        table.add_row(s["stage"], s["state"], bar, done, began, span(found["left_s"]))
    return table


def _first_line(told: Mapping[str, Any] | None) -> str:
    return "" if told is None else f"[red]failed[/]: {escape(told['message'].splitlines()[0])}"


def show_timings(paths: Paths, as_json: bool) -> None:
    """What the last run of each stage took, and the median of the last ones that were done."""
    rows = timings.summary(timings.read(paths.work))
    rows.sort(key=lambda r: STAGES.index(r["stage"]) if r["stage"] in STAGES else len(STAGES))
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    columns = ("stage", "last run", "ended", "took", "median", "CPU", "memory", "items", "a second", "out")
    table = Table(*columns, box=None, header_style="bold", padding=(0, 1, 0, 0))
    for column in table.columns[2:]:
        column.no_wrap = True
    for row in rows:
        table.add_row(*_cells(row))
    out.print(table)
    if not rows:
        print(f"{paths.work}: no stage has run here yet.", file=sys.stderr)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    last = row["last"]
    outcome = f"{last['outcome']} ({last['reason']})" if last.get("reason") else last["outcome"]
    return (
        row["stage"],
        outcome,
        _when(last.get("ended_ms")),
        span(last.get("wall_s")),
        span(row["median_wall_s"]),
        span(last.get("cpu_s")),
        space.size(last.get("peak_rss_bytes")),
        f"{last['n_items']:,}" if last.get("n_items") else "",
        rate(last.get("items_s")),
        space.size(last.get("bytes_out")),
    )


def _when(ms: int | None) -> str:
    """The hour of a time today, the day of an earlier one."""
    if ms is None:
        return ""
    then, today = time.localtime(ms / 1000), time.localtime()
    return time.strftime("%H:%M" if then[:3] == today[:3] else "%Y-%m-%d", then)


def span(seconds: float | None) -> str:
    """A time for people; empty for None."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def rate(per_s: float | None) -> str:
    """Items a second for people; empty for None."""
    return "" if per_s is None else f"{per_s:.3g}" if per_s < 100 else f"{per_s:,.0f}"
