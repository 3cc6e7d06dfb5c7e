"""Flow `repro`: DVC's own graph, walked by Prefect, one task per stage, named by the stage.

DVC alone decides what is stale (`dvc repro -s STAGE`); Prefect shows, waits, retries where asked and cancels. Nothing
is cached here and no result is kept, so there is one memory of what was done, not two. Plain `dvc repro` does the same
work without Prefect.

    python -m pipelines.repro                      the whole graph
    python -m pipelines.repro evaluate             one stage and all that it needs
    python -m pipelines.repro --branches 2         independent stages side by side
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import graphlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# nothing here reports home; read by prefect and dvc when they are imported
os.environ["DO_NOT_TRACK"] = os.environ.get("DO_NOT_TRACK", "1")
os.environ["DVC_NO_ANALYTICS"] = os.environ.get("DVC_NO_ANALYTICS", "1")
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = os.environ.get("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

from dvc.repo import Repo
from prefect import Task, flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.task_runners import ThreadPoolTaskRunner

from harken.errors import HarkenError, unknown

GRACE_S = 10.0  # between asking a cancelled stage to end and ending it
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork
_running: dict[int, subprocess.Popen[str]] = {}
_lock = threading.Lock()


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


def run_stage(stage: str, say: Callable[[str], None], root: str | Path = ".") -> dict[str, Any]:
    """`dvc repro -s STAGE` in a process group of its own, each line of it to `say` as it comes.

    Returns the stage, what DVC did (`ran`, `unchanged` or `from the run cache`) and the seconds it took. Raises
    HarkenError with the last lines where DVC refuses or the stage fails. The whole group ends with any exception raised
    here; on Linux also when this process ends, however it does.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "-s", stage]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    began = time.monotonic()
    did, last = "unchanged", deque[str](maxlen=12)
    with _process(command, root, {**os.environ, "PATH": path}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            line = line.rstrip()
            if line:
                say(line)
                last.append(line)
            did = _what(line, stage) or did
    if process.returncode != 0:
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


def _die_with_parent() -> None:
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def _process(command: list[str], root: str | Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A child in its own process group, known to `stop_all`; its group is ended when the block is left early."""
    process = subprocess.Popen(
        command,
        cwd=root,
        env=env,
        text=True,
        bufsize=1,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    with _lock:
        _running[process.pid] = process
    try:
        yield process
        process.wait()
    finally:
        _stop(process)
        with _lock:
            _running.pop(process.pid, None)


def _stop(process: subprocess.Popen[str]) -> None:
    """End what is left of the process group: politely, then not."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # members that outlived their leader
        os.killpg(process.pid, signal.SIGKILL)


def stop_all() -> None:
    """End every stage that is running here. A cancelled flow calls it: its tasks' threads only wait on a pipe."""
    with _lock:
        running = list(_running.values())
    for process in running:
        _stop(process)


def tasks(stages: Iterable[str], retries: int = 0, root: str | Path = ".") -> dict[str, Task[..., dict[str, Any]]]:
    """A Prefect task for each stage, named by it: retried only where the caller asks, nothing cached or persisted."""

    def one(stage: str) -> Task[..., dict[str, Any]]:
        @task(name=stage, task_run_name=stage, cache_policy=NO_CACHE, persist_result=False, retries=retries)
        def run() -> dict[str, Any]:
            return run_stage(stage, get_run_logger().info, root)

        return run

    return {stage: one(stage) for stage in stages}


@flow(name="repro", task_runner=ThreadPoolTaskRunner(max_workers=1), persist_result=False)
def repro(targets: list[str] | None = None, retries: int = 0, root: str = ".") -> list[dict[str, Any]]:
    """Bring `targets` (default: every stage) up to date. Returns, and shows as a table artifact, what each stage did.

    Raises HarkenError where a stage fails; stages that do not need it still run.
    """
    stages = graph(root)
    names = order(stages, targets or ())
    known = tasks(names, retries, root)
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
    if failed := [r["stage"] for r in rows if r["did"] == "failed"]:
        raise HarkenError(f"repro: {', '.join(failed)} failed; the run's log holds the last lines.")
    return rows


def _row(name: str, state: Any) -> dict[str, Any]:
    if state.is_completed():
        return dict(state.result())
    # a task that never began because what it waits for failed is not itself at fault
    return {"stage": name, "did": "not reached" if state.is_pending() else "failed", "seconds": None}


def main() -> int:
    """The command line. Exit status 0 only if every stage is up to date."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.repro", description=repro.description)
    parser.add_argument("targets", nargs="*", help="stages; none means all")
    parser.add_argument("--retries", type=int, default=0, help="how often a failed stage is tried again")
    parser.add_argument("--branches", type=int, default=1, help="stages that may run side by side")
    given = parser.parse_args()
    run = repro.with_options(task_runner=ThreadPoolTaskRunner(max_workers=given.branches))
    try:
        rows = run(given.targets or None, given.retries)
    except HarkenError as e:
        print(f"harken: {e}", file=sys.stderr)
        return 1
    for row in rows:
        print(f"{row['stage']:<12} {row['did']:<20} {row['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
