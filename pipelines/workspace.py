"""What flows share of a workspace: its scratch folder, the one flow at a time that works on it, child processes.

A workspace is a folder with a dvc.yaml. One host works on it at a time: DVC's own locks know processes by their number
alone, and a number of another host means nothing here.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from harken.config import Paths, params_path, parse, read_params
from harken.engines import bind_to
from harken.errors import ConfigError, HarkenError, TransientError

GRACE_S = 10.0  # between asking a cancelled process to end and ending it
PASSED_ON = re.compile(r"(HARKEN|TORCH|NCCL|GLOO|CUDA|OMP|MKL|DASK|RAY)_[A-Z0-9_]+")
_running: dict[int, subprocess.Popen[str]] = {}
_lock = threading.Lock()
Say = Callable[[str], None]


class WorkspaceBusy(TransientError):  # noqa: N818 - a state of the workspace, not a mistake
    """Another flow works on the workspace."""


def work_of(root: str | Path) -> Path | None:
    """The scratch folder `paths.work` of the project in `root`; None for a graph that has no params file."""
    path = Path(root) / params_path()
    if not path.is_file():
        return None
    return Path(root) / parse(f"{path}: paths", Paths, read_params(path).get("paths")).work


@contextlib.contextmanager
def exclusive(root: str | Path, who: str, wait_s: float, say: Say) -> Iterator[None]:
    """The workspace for one flow. Another one waits for `wait_s` seconds.

    The kernel frees the lock of a killed flow. Raises WorkspaceBusy where another flow does not end in time, naming its
    host and process.
    """
    path = Path(root) / ".dvc" / "tmp" / "flow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = {"who": who, "pid": os.getpid(), "host": socket.gethostname(), "boot": _boot()}
    deadline, is_told = time.monotonic() + wait_s, False
    with open(path, "a+", encoding="utf-8") as file:
        while (holder := _held_by(file, mine)) is not None:
            told = f"{holder.get('who', 'another flow')} (process {holder.get('pid')} on {holder.get('host')})"
            if time.monotonic() >= deadline:
                raise WorkspaceBusy(
                    f"{Path(root).resolve()}: {told} works here and did not end within {wait_s:.0f} s. Run again when "
                    f"it has ended, or give more time (wait_s); if its host is no more, delete {path}."
                )
            if not is_told:
                say(f"waits for {told}, at most {wait_s:.0f} s")
                is_told = True
            time.sleep(min(1.0, max(0.01, deadline - time.monotonic())))
        try:
            yield
        finally:
            file.truncate(0)


def _held_by(file: IO[str], mine: Mapping[str, Any]) -> dict[str, Any] | None:
    """Take the lock and write `mine` into it, or say who has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(file)
    left = _read(file)
    # of another kernel: a network's file system need not carry locks between hosts. Containers have names of their own
    if left and left.get("host") != mine["host"] and left.get("boot") != mine["boot"]:
        fcntl.flock(file, fcntl.LOCK_UN)
        return left
    file.truncate(0)  # of a flow that was killed, else empty
    file.write(json.dumps(mine))
    file.flush()
    return None


def _boot() -> str:
    """What tells this kernel, since it was started, from every other."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else ""


def _read(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        return dict(json.loads(file.read() or "{}"))
    except ValueError:  # it is being written
        return {}


def environment(given: Mapping[str, str], run_id: str) -> dict[str, str]:
    """The environment of a stage: this process's own, `given`, and the flow run's id for its logs and timings.

    Raises ConfigError for a variable that decides nothing of a stage.
    """
    for name in given:
        if not PASSED_ON.fullmatch(name) or name == "HARKEN_RUN_ID":
            raise ConfigError(
                f"env: {name}: expected HARKEN_ENGINE, CUDA_VISIBLE_DEVICES and the like. Set others where the worker "
                "starts."
            )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, **given, **({"HARKEN_RUN_ID": run_id} if run_id else {})}


def told(command: list[str], root: str | Path, say: Say) -> tuple[int, Any]:
    """The exit status of `python -m COMMAND` in `root` and the JSON that it printed; each line of its log to `say`.

    Raises HarkenError with its last lines where it prints no JSON.
    """
    last = deque[str](maxlen=12)
    with tempfile.TemporaryFile("w+") as out:
        whole = [sys.executable, "-m", *command]
        with process(whole, root, environment({}, ""), stdout=out, stderr=subprocess.PIPE) as child:
            assert child.stderr is not None
            for line in child.stderr:
                if line := line.rstrip():
                    say(line)
                    last.append(line)
        out.seek(0)
        printed = out.read()
    try:
        return child.returncode, json.loads(printed)
    except ValueError:
        said = "\n  ".join(last) or printed[-500:] or "nothing"
        raise HarkenError(f"`{' '.join(command)}` ended with status {child.returncode}. It said:\n  {said}") from None


@contextlib.contextmanager
def process(
    command: list[str], root: str | Path, env: Mapping[str, str], stdout: Any = subprocess.PIPE, stderr: Any = None
) -> Iterator[subprocess.Popen[str]]:
    """A child in its own process group, known to `stop_all`; its group is ended when the block is left early.

    On Linux it also ends with this process, however that ends. Its errors go where its output goes unless said.
    """
    child = subprocess.Popen(
        command,
        cwd=root,
        env=env,
        text=True,
        bufsize=1,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT if stderr is None else stderr,
        start_new_session=True,
        preexec_fn=functools.partial(bind_to, os.getpid()),
    )
    with _lock:
        _running[child.pid] = child
    try:
        yield child
        child.wait()
    finally:
        _stop(child)
        with _lock:
            _running.pop(child.pid, None)


def _stop(child: subprocess.Popen[str]) -> None:
    """End what is left of the process group: politely, then not."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # members that outlived their leader
        os.killpg(child.pid, signal.SIGKILL)


def stop_all() -> None:
    """End every child that is running here. A cancelled flow calls it: its tasks' threads only wait on a pipe."""
    with _lock:
        running = list(_running.values())
    for child in running:
        _stop(child)


def failure(stage: str, work: Path | None, run_id: str) -> str | None:
    """Why a stage of this run failed, where it is sure to be no fault of params, data or code; else None.

    The stage leaves a note in its scratch folder, for DVC's exit status does not tell.
    """
    path = None if work is None else work / f"{stage}.failed.json"
    if path is None or not path.is_file():
        return None
    told = json.loads(path.read_text(encoding="utf-8"))
    is_ours = not run_id or told.get("run_id") == run_id
    return str(told.get("message", "")) if is_ours and told.get("is_transient") else None


def require_server(or_else: str = "", wait_s: float = 0.0) -> str:
    """The address of the Prefect server. Raises ConfigError where none is named, TransientError where none answers.

    `or_else`: what else the command offers to somebody without a server. `wait_s`: how long one that was just started
    has to answer.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    start = "prefect server start --background, then export PREFECT_API_URL=http://127.0.0.1:4200/api"
    if not url:
        raise ConfigError(
            f"PREFECT_API_URL: not set, so nobody would see the run. Start a server: {start}.{or_else} `dvc repro` "
            "needs none."
        )
    deadline = time.monotonic() + wait_s
    with get_client(sync_client=True) as client:
        while (trouble := client.api_healthcheck()) is not None and time.monotonic() < deadline:
            time.sleep(1.0)
        if trouble is not None:
            raise TransientError(
                f"PREFECT_API_URL={url}: no Prefect server answers there ({type(trouble).__name__}: {trouble}). Start "
                f"it: {start}. Nothing was run."
            )
    return str(url)
