"""Flows that look after a corpus between runs: `census`, `audit`, `retry-downloads`, `gc`. None makes a result stale.

    python -m pipelines.upkeep audit --alarm 10
    python -m pipelines.upkeep gc                  what could go; with --no-dry-run it goes

They work in the folder that they are run in, with the params file there, as the command `harken` does.
"""

from __future__ import annotations

import argparse
import inspect
import json
import socket
import sys
from datetime import UTC, datetime
from typing import Any

from prefect import flow, runtime, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.states import Completed, State
from prefect.task_runners import ThreadPoolTaskRunner

from harken import gc as scratch
from harken import timings
from harken.config import Paths, load, params_path
from harken.errors import HarkenError, status_of
from pipelines import workspace
from pipelines.repro import changed, graph, walk
from pipelines.workspace import Say

LOST = "harken.clips.lost"
"""The event of an audit that lost more clips than its alarm."""
ROWS = 1000  # of a table artifact; the whole table lies in the snapshot


def _day(ms: int | None) -> str:
    return "" if ms is None else f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d}"


@flow(name="census", persist_result=False)
def census(
    country: str | None = None, limit: int | None = None, older_than: int = 6, base_url: str | None = None
) -> dict[str, Any] | State[Any]:
    """Which videos are still there, by YouTube's official Data API: `harken census`, fifty videos a call.

    Ends as `Paused` where the day's quota is spent, and goes on from there the next time. `older_than` days: what was
    asked for since is not asked again. Needs HARKEN_YOUTUBE_API_KEY where the worker runs.
    """
    from harken.stages.download import DownloadConfig, is_world

    say = get_run_logger().info
    if is_world(load("download", DownloadConfig)) and base_url is None:
        return Completed(name="Skipped", message="the built-in world is no platform: there is nobody to ask")
    options = {"--country": country, "--limit": limit, "--older-than": older_than, "--base-url": base_url}
    args = [str(part) for name, value in options.items() if value is not None for part in (name, value)]
    status, found = workspace.told(["harken.cli", "census", *args, "--json"], ".", say)
    rows = [{"found": reason, "videos": n} for reason, n in (found or {}).get("found", {}).items()]
    create_table_artifact(table=rows, key="census", description=f"Left for another day: {(found or {}).get('n_left')}")
    if status != 0 and (why := (found or {}).get("paused")):
        return Completed(name="Paused", message=why)
    if status != 0 or found is None:
        raise HarkenError(f"`harken census` ended with status {status}; the run's log holds what it said.")
    return found


@flow(name="audit", persist_result=False)
def audit(alarm: int = 0, promote: bool = False) -> dict[str, Any]:
    """Take a dated snapshot of what the ledger says of every clip, and tell what went missing since the one before.

    The table artifact `newly-missing` names each clip, the split that lists it, the reason and since when. Where more
    than `alarm` clips are newly missing, the event `harken.clips.lost` is sent. A snapshot changes no result;
    `promote` lets the pipeline see what was seen, by raising `download.round` in the params file.
    """
    snapshot = take_snapshot()
    facts: dict[str, Any] = snapshot.facts
    since = facts["compared_with"] or "all that was ever known"
    rows = [{**row, "since": _day(row.pop("since_ms"))} for row in snapshot.lost.slice(0, ROWS).to_pylist()]
    told = f"{facts['n_newly_missing']} of {facts['n_asked_for']} clips are newly missing, against {since}"
    more = f"; the first {ROWS} rows, all in {snapshot.folder}" if len(snapshot.lost) > ROWS else ""
    create_table_artifact(table=rows, key="newly-missing", description=told + more)
    get_run_logger().info("%s; %d are back; %s", told, facts["n_back"], snapshot.folder)
    if facts["n_newly_missing"] > alarm:
        emit_event(
            LOST,
            resource={"prefect.resource.id": f"harken.corpus.{snapshot.folder.parent}", "prefect.resource.name": told},
            payload={**facts, "alarm": alarm, "folder": str(snapshot.folder)},
        )
    if promote:
        from harken.audit.snapshots import promote as put_into_graph

        round_ = put_into_graph(snapshot.folder.parent, snapshot.folder.name, params_path())
        get_run_logger().info("%s: download.round is %d now; `dvc repro` does the rest", params_path(), round_)
    return facts


@task(name="snapshot", cache_policy=NO_CACHE, persist_result=False)
def take_snapshot() -> Any:
    """The snapshot of today (`harken.audit.snapshots`), beside the ledger that it is of."""
    from harken.attempts import FOLD_COLUMNS, read
    from harken.audit import snapshots
    from harken.clips import Manifest
    from harken.stages.download import DownloadConfig, ledger_folder, states

    paths, now_ms = load("paths", Paths), timings.now_ms()
    book = ledger_folder(paths, load("download", DownloadConfig))
    attempts = read(book, FOLD_COLUMNS)
    manifest = Manifest.read(paths.manifest)
    return snapshots.take(book / "snapshots", now_ms, states(attempts, now_ms), attempts, manifest.table)


@flow(name="retry-downloads", task_runner=ThreadPoolTaskRunner(), persist_result=False)
def retry_downloads() -> list[dict[str, Any]] | State[Any]:
    """Go on with a download that is not finished: `dvc repro` of the stage `download` and what it needs.

    The pace and the pauses that hosts were promised hold, whoever runs the stage: while a lane is paused nothing is
    asked, and the run ends as `Paused`. A download that is finished is left alone, so nothing downstream becomes stale;
    to ask again for what is due since, raise `download.round`. Ends as `Skipped` while another flow works here.
    """
    say = get_run_logger().info
    if paused := _paused():
        return Completed(name="Paused", message=paused)
    try:
        with workspace.exclusive(".", f"flow run {runtime.flow_run.name} (retry-downloads)", 0.0, say):
            return walk(["download"], 0, 1, None, ".")
    except workspace.WorkspaceBusy as e:
        return Completed(name="Skipped", message=str(e))
    except HarkenError:
        if paused := _paused():  # a host asked for it during this run: what was fetched is kept
            return Completed(name="Paused", message=paused)
        raise


def _paused() -> str:
    """The lanes of this machine that may not be used now, until when and why; empty where all may."""
    from harken.media.lanes import Lane, Pace
    from harken.stages.download import shared_folder

    folder = shared_folder(load("paths", Paths)) / "lanes"
    told = []
    for path in sorted(folder.glob(f"*@{socket.gethostname()}.sqlite")):
        lane = Lane(folder, path.stem, Pace(per_hour=None)).status()
        if lane.until_ms is not None:
            told.append(f"{path.stem}: paused until {datetime.fromtimestamp(lane.until_ms / 1000, UTC)} ({lane.why})")
    return "; ".join(told)


@flow(name="gc", persist_result=False)
def gc(dry_run: bool = True, dvc_cache: bool = False, wait_s: float = 600.0) -> list[dict[str, Any]]:
    """Remove scratch of fingerprints that nobody wants any more (`harken.gc`); with `dry_run` only show it.

    Only stages that DVC says are up to date are looked at. `dvc_cache`: also `dvc gc --workspace`, which forgets every
    result that the present dvc.lock does not name, the run cache's among them. Waits `wait_s` for another flow.
    """
    say, paths = get_run_logger().info, load("paths", Paths)
    with workspace.exclusive(".", f"flow run {runtime.flow_run.name} (gc)", wait_s, say):
        found = scratch.leftovers(paths, set(graph(".")) - changed(".", say))
        kept = found if dry_run else scratch.remove(paths, found)
        rows = [{"stage": i.stage, "folder": str(i.path), "MB": round(i.n_bytes / 1e6, 1), "why": i.why} for i in kept]
        freed = sum(i.n_bytes for i in kept) / 1e6
        told = f"{'Would free' if dry_run else 'Freed'} {freed:.1f} MB in {len(rows)} folders of {paths.work}"
        create_table_artifact(table=rows[:ROWS], key="gc", description=told)
        say(told)
        if dvc_cache:
            create_markdown_artifact(f"```\n{_dvc_gc(dry_run, say)}\n```", key="dvc-gc")
    return rows


def _dvc_gc(dry_run: bool, say: Say) -> str:
    command = [sys.executable, "-m", "dvc", "gc", "--workspace", "--force", *(["--dry"] if dry_run else [])]
    with workspace.process(command, ".", workspace.environment({}, "")) as child:
        assert child.stdout is not None
        lines = [line.rstrip() for line in child.stdout if line.strip()]
    for line in lines:
        say(line)
    if child.returncode != 0:
        raise HarkenError(f"`dvc gc` ended with status {child.returncode}: {' / '.join(lines[-3:])}")
    return "\n".join(lines)


FLOWS = {f.name: f for f in (census, audit, retry_downloads, gc)}


def main() -> int:
    """The command line: a flow's name and its parameters as options."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.upkeep", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="flow", required=True)
    for name, one in FLOWS.items():
        command = commands.add_parser(name, help=(one.description or "").splitlines()[0])
        for key, parameter in inspect.signature(one.fn).parameters.items():
            default, option = parameter.default, "--" + key.replace("_", "-")
            if isinstance(default, bool):
                command.add_argument(option, action=argparse.BooleanOptionalAction, default=default)
            else:
                kind = type(default) if default is not None else int if key == "limit" else str
                command.add_argument(option, type=kind, default=default)
    given = vars(parser.parse_args())
    try:
        workspace.require_server()
        state = FLOWS[given.pop("flow")](**given, return_state=True)
        result = state.result()
    except HarkenError as e:
        print(f"harken: {e}", file=sys.stderr)
        return status_of(e)
    print(state.message if result is None else json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
