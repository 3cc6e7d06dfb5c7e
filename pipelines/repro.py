"""Flow `repro`: DVC's own graph, walked by Prefect, one task per stage, named by the stage.

DVC alone decides what is stale (`dvc repro -s STAGE`); Prefect shows, waits, tries again what was nobody's fault, and
cancels. Nothing is cached here and no result is kept, so there is one memory of what was done, not two. Plain
`dvc repro` does the same work without Prefect.

    python -m pipelines.repro                      the whole graph, on the server that PREFECT_API_URL names
    python -m pipelines.repro evaluate             one stage and all that it needs
    python -m pipelines.repro --branches 2         independent stages side by side
    python -m pipelines.repro --ephemeral          with a server of its own, which ends with it
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import graphlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dvc.repo import Repo
from httpx import TransportError
from prefect import Task, flow, runtime, task
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings
from prefect.task_runners import ThreadPoolTaskRunner

from harken import progress
from harken.errors import TRY_AGAIN, ConfigError, HarkenError, TransientError, status_of, unknown
from pipelines import workspace
from pipelines.workspace import Say, stop_all

LOOK_EVERY_S = 2.0
RETRY_AFTER_S = [10.0, 60.0, 300.0]  # the last one repeats


def graph(root: str | Path = ".") -> dict[str, set[str]]:
    """Every stage of the dvc.yaml under `root` with the stages it waits for, from DVC's own index."""
    with Repo(str(root)) as repo:
        found = repo.index.graph
        return {_address(s): {_address(upstream) for upstream in found.successors(s)} for s in found}


def _address(stage: Any) -> str:
    """What `dvc repro` calls a stage in the project's root; DVC's own `addressing` is relative to this process."""
    name = getattr(stage, "name", None)
    if name is None:
        return str(stage.path_in_repo)  # a .dvc file
    return str(name) if stage.path_in_repo == "dvc.yaml" else f"{stage.path_in_repo}:{name}"


def order(stages: Mapping[str, set[str]], targets: Iterable[str] = ()) -> list[str]:
    """The stages in an order in which each comes after all that it waits for; `targets`, if any, and what they need.

    Raises ConfigError for a target that is no stage.
    """
    wanted: set[str] = set()
    todo = list(targets) or list(stages)
    while todo:
        name = todo.pop()
        if name not in stages:
            raise unknown("repro: stage", name, stages)
        if name not in wanted:
            wanted.add(name)
            todo += stages[name]
    sorter = graphlib.TopologicalSorter({s: sorted(stages[s]) for s in sorted(wanted)})
    return list(sorter.static_order())


def changed(root: str | Path, say: Say) -> set[str]:
    """The stages of which DVC says that something changed: a dependency, a param, the command, an out.

    One process for all of them, so that a graph in which nothing is to be done costs seconds and not a second a stage.
    """
    status, found = workspace.told(["dvc", "--wait-for-lock", "status", "--json"], root, say)
    if status != 0:
        raise HarkenError(f"`dvc status` ended with status {status}; the run's log holds what it said.")
    return set(found)


def untouched(stages: Mapping[str, set[str]], names: Iterable[str], stale: Collection[str]) -> set[str]:
    """Those of `names`, which are in order, that are not stale and wait for nothing that is."""
    found: set[str] = set()
    for name in names:
        if name not in stale and stages[name] <= found:
            found.add(name)
    return found


def run_stage(
    stage: str,
    say: Say,
    root: str | Path = ".",
    *,
    env: Mapping[str, str] | None = None,
    run_id: str = "",
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """`dvc repro -s STAGE` in a process group of its own, each line of it to `say` as it comes, its progress to `show`.

    Returns the stage, what DVC did (`ran`, `unchanged` or `from the run cache`) and the seconds it took. Raises
    HarkenError with the last lines where DVC refuses or the stage fails, TransientError where the stage says that it
    may well go another time. The whole group ends with any exception raised here; on Linux also when this process ends,
    however it does.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "-s", stage]
    work, began = workspace.work_of(root), time.monotonic()
    did, last = "unchanged", deque[str](maxlen=12)
    with (
        workspace.process(command, root, workspace.environment(env or {}, run_id)) as process,
        _watched(stage, work, show),
    ):
        assert process.stdout is not None
        for line in process.stdout:
            line = line.rstrip()
            if line:
                say(line)
                last.append(line)
            did = _what(line, stage) or did
    if process.returncode != 0:
        if (why := workspace.failure(stage, work, run_id)) is not None:
            raise TransientError(f"stage {stage}: {why}")
        raise HarkenError(
            f"stage {stage}: dvc ended with status {process.returncode}. Its last lines:\n  "
            + "\n  ".join(last)
            + f"\nMend it and run again; finished shards and checkpoints are kept. Alone: dvc repro -s {stage}"
        )
    return {"stage": stage, "did": did, "seconds": round(time.monotonic() - began, 1)}


def _what(line: str, stage: str) -> str | None:
    if line.startswith(f"Running stage '{stage}'"):
        return "ran"
    if line.startswith(f"Stage '{stage}' is cached"):
        return "from the run cache"
    return None


@contextlib.contextmanager
def _watched(stage: str, work: Path | None, show: Callable[[dict[str, Any]], None] | None) -> Iterator[None]:
    """Meanwhile, every two seconds, what the stage says of its progress to `show`."""
    if work is None or show is None:
        yield
        return
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(LOOK_EVERY_S):
            if (told := progress.read(work, stage)) is not None:
                show(told)

    # in the task's context, or Prefect would not know whose progress it is
    thread = threading.Thread(target=contextvars.copy_context().run, args=(look,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


class Bar:
    """A stage's progress as an artifact of its task, `progress-STAGE`; none for a stage that tells of none."""

    def __init__(self, stage: str, warn: Say) -> None:
        self._key = "progress-" + "".join(c if c.isalnum() else "-" for c in stage.lower())
        self._warn: Say | None = warn
        self._id: Any = None

    def __call__(self, told: Mapping[str, Any]) -> None:
        done, total, left_s = told["done"], told["total"], told.get("left_s")
        left = "" if left_s is None else f", about {left_s:.0f} s left"
        self._put(100.0 * done / total if total else 0.0, f"{told['what']}: {done} of {total}{left}")

    def end(self) -> None:
        if self._id is not None:
            self._put(100.0, "done")

    def _put(self, percent: float, text: str) -> None:
        try:
            if self._id is None:
                self._id = create_progress_artifact(percent, key=self._key, description=text)
            else:
                update_progress_artifact(self._id, percent, description=text)
        except Exception as e:  # a server that is away for a while must not end hours of work
            if self._warn is not None:
                self._warn(f"the server takes no progress ({type(e).__name__}: {e}); the stage goes on")
            self._warn = None


def is_transient(task: Any, run: Any, state: Any) -> bool:
    """Whether a failed task is to be tried again: only where the stage said that it was nobody's fault."""
    return isinstance(state.result(raise_on_failure=False), TransientError)


def tasks(
    stages: Iterable[str],
    retries: int = 0,
    root: str | Path = ".",
    *,
    env: Mapping[str, str] | None = None,
    branches: int | None = None,
    idle: Collection[str] = (),
) -> dict[str, Task[..., dict[str, Any]]]:
    """A Prefect task for each stage, named by it: nothing cached or persisted, tried again only for passing troubles.

    `branches`: at most so many at a time; None: as many as there are. For those in `idle` there is nothing to run.
    """
    places = contextlib.nullcontext() if branches is None else threading.BoundedSemaphore(branches)
    delays_s = [RETRY_AFTER_S[min(i, len(RETRY_AFTER_S) - 1)] for i in range(retries)]

    def one(stage: str) -> Task[..., dict[str, Any]]:
        @task(
            name=stage,
            task_run_name=stage,
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=retries,
            retry_delay_seconds=delays_s,
            retry_condition_fn=is_transient,
        )
        def run() -> dict[str, Any]:
            if stage in idle:
                return {"stage": stage, "did": "unchanged", "seconds": 0.0, "tries": 0}
            logger = get_run_logger()
            bar = Bar(stage, logger.warning)
            with places:
                run_id = str(runtime.flow_run.id or "")
                row = run_stage(stage, logger.info, root, env=env, run_id=run_id, show=bar)
            bar.end()
            return {**row, "tries": runtime.task_run.run_count or 1}

        return run

    return {stage: one(stage) for stage in stages}


@flow(name="repro", task_runner=ThreadPoolTaskRunner(), persist_result=False)
def repro(
    targets: list[str] | None = None,
    retries: int = 2,
    branches: int = 1,
    wait_s: float = 600.0,
    env: dict[str, str] | None = None,
    root: str = ".",
) -> list[dict[str, Any]]:
    """Bring `targets` (default: every stage) up to date. Returns, and shows as a table artifact, what each stage did.

    `retries`: how often a stage is tried again after a trouble that passes, such as an unreachable cluster or a full
    disk. `branches`: stages that may run side by side. `wait_s`: how long to wait for another flow on this workspace.
    `env`: variables for the stages, such as HARKEN_ENGINE. Raises HarkenError where a stage fails; stages that do not
    need it still run.
    """
    if branches < 1 or retries < 0:
        raise ConfigError(f"repro: branches={branches}, retries={retries}: expected 1 or more, and 0 or more.")
    who = f"flow run {runtime.flow_run.name} ({runtime.flow_run.flow_name})"
    with workspace.exclusive(root, who, wait_s, get_run_logger().info):
        return walk(targets, retries, branches, env, root)


def walk(
    targets: Iterable[str] | None, retries: int, branches: int, env: Mapping[str, str] | None, root: str | Path
) -> list[dict[str, Any]]:
    """The body of the flow, for a flow that holds the workspace."""
    stages = graph(root)
    names = order(stages, targets or ())
    idle = untouched(stages, names, changed(root, get_run_logger().info))
    known = tasks(names, retries, root, env=env, branches=branches, idle=idle)
    futures: dict[str, Any] = {}
    try:
        for name in names:
            futures[name] = known[name].submit(wait_for=[futures[upstream] for upstream in sorted(stages[name])])
        for future in futures.values():
            future.wait()
    except BaseException:  # a cancelled or interrupted flow: the threads would wait for their stages
        stop_all()
        raise
    rows = [_row(name, futures[name].state) for name in names]
    create_table_artifact(table=rows, key="repro", description="What `dvc repro` did, stage by stage")
    if failed := [name for name in names if _error(futures[name].state) is not None]:
        errors = [_error(futures[name].state) for name in failed]
        kind = TransientError if all(isinstance(e, TransientError) for e in errors) else HarkenError
        raise kind(f"repro: {', '.join(failed)} failed. " + "\n".join(str(e) for e in errors))
    return rows


def _row(name: str, state: Any) -> dict[str, Any]:
    if state.is_completed():
        return dict(state.result())
    # a task that never began because what it waits for failed is not itself at fault
    return {"stage": name, "did": "not reached" if state.is_pending() else "failed", "seconds": None, "tries": None}


def _error(state: Any) -> BaseException | None:
    if state.is_completed() or state.is_pending():
        return None
    found = state.result(raise_on_failure=False)
    return found if isinstance(found, BaseException) else HarkenError(str(state))


def main() -> int:
    """The command line. Exit status 0 only if every stage is up to date; 75 where it may well go another time."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.repro", description=repro.description)
    parser.add_argument("targets", nargs="*", help="stages; none means all")
    parser.add_argument("--retries", type=int, default=2, help="how often a stage is tried again after passing trouble")
    parser.add_argument("--branches", type=int, default=1, help="stages that may run side by side")
    parser.add_argument("--wait-s", type=float, default=600.0, help="how long to wait for another flow that works here")
    parser.add_argument("--ephemeral", action="store_true", help="start a server that lasts as long as this command")
    given = parser.parse_args()
    is_given = bool(os.environ.get("PREFECT_API_URL")) or not given.ephemeral
    try:
        with temporary_settings({PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: given.ephemeral}):
            if is_given:
                workspace.require_server(" Or add --ephemeral for one that lasts as long as this command.")
            rows = repro(given.targets or None, given.retries, given.branches, given.wait_s)
    except HarkenError as e:
        print(f"harken: {e}", file=sys.stderr)
        return status_of(e)
    except TransportError as e:
        print(f"harken: the Prefect server went away ({type(e).__name__}). What is done is kept.", file=sys.stderr)
        return TRY_AGAIN
    for row in rows:
        print(f"{row['stage']:<12} {row['did']:<20} {row['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
