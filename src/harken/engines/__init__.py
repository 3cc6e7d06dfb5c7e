"""Fan-out: `map(make, cfg, items)` builds the heavy object once per worker and yields one result per item.

Chosen by the environment, never by a tracked param, or a change of engine would make every stage stale:
`HARKEN_ENGINE=local` (default: spawned processes on this machine), `inline` (this process), `dask` or `ray` (a cluster
of its own on this machine), `dask+tcp://host:port` or `ray+host:port` (a running one; see `dask.py` and `ray.py`).
`HARKEN_WORKERS` is the number of workers on this machine (default: one per core).
Every worker computes with one thread, so that results do not depend on the number of workers. A fan-out that is given
`devices` (a machine's GPUs) has one worker for each, which keeps its device for life.

Processes that torchrun or srun starts together (WORLD_SIZE) go through the items together, one run at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from harken.errors import ConfigError, HarkenError, unknown

log = logging.getLogger("harken")
Cfg = TypeVar("Cfg")
Item = TypeVar("Item")
Result = TypeVar("Result")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
REBUILDS = 3
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork


@runtime_checkable
class Map(Protocol):
    """The whole engine abstraction. `make` must be importable (module level); `make(cfg)` is a function of one item.

    `devices` are given where a worker computes on a device: those of this machine, none of which may be there. Each
    worker finds one of them as HARKEN_DEVICE. In-process they are left alone: one process takes the first GPU by
    itself. A running cluster's workers are given theirs by whoever starts them, and those that declare a `GPU` are
    asked before all others.
    """

    def __call__(
        self,
        make: Callable[[Cfg], Callable[[Item], Result]],
        cfg: Cfg,
        items: Iterable[Item],
        *,
        devices: Sequence[str] | None = None,
    ) -> Iterator[Result]: ...


made: dict[str, Callable[[Any], Any]] = {}
"""fan-out -> its heavy object, in a worker. A running cluster's worker may serve several fan-outs by turns."""


def call(make: Callable[[Any], Callable[[Any], Any]], cfg: Any, item: Any, token: str) -> Any:
    """One item in a worker. `token` names the fan-out: a cluster's worker outlives it, and what was made must not."""
    if token not in made:
        made[token] = make(cfg)
    return made[token](item)


def died(deaths: int, items: Sequence[Any]) -> HarkenError:
    """The error of a fan-out that stops because workers die of these items."""
    return HarkenError(
        f"a worker process died {deaths} times, last while {len(items)} items were in flight "
        f"({', '.join(map(str, items[:4]))}). Out of memory? Try HARKEN_WORKERS=1."
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Processes that are started inside compute with one thread: they read it before they import NumPy and torch."""
    before = {k: os.environ.get(k) for k in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for k, v in before.items():
            if v is None:
                os.environ.pop(k, None)
            else:
                os.environ[k] = v


def die_with_parent() -> None:
    """End this process when its parent ends, however it ends, so that no killed run leaves workers behind."""
    started_by = multiprocessing.parent_process()
    if sys.platform == "linux":
        bind_to(None if started_by is None else started_by.pid)
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def bind_to(parent: int | None) -> None:
    """On Linux, end this process when its parent ends, also after an exec; everywhere at once where `parent` has ended.

    For a child between fork and exec too (`preexec_fn`), so it does no more than it must.
    """
    if _libc is not None:
        _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os._exit(1)  # it ended before it was watched: nobody would tell this process


def start_worker(devices: Any = None) -> None:
    """What every worker process does first. `devices`: a queue that holds one device for each worker."""
    die_with_parent()
    if devices is not None:
        os.environ["HARKEN_DEVICE"] = devices.get()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; a Ctrl-C must not print a trace per worker
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def n_workers() -> int:
    """Local workers: HARKEN_WORKERS, or one per core that this process may use."""
    given = os.environ.get("HARKEN_WORKERS", "")
    if not given:
        return n_cores()
    if not given.isdigit() or int(given) < 1:
        raise ConfigError(f"HARKEN_WORKERS={given!r}: expected a whole number of processes, 1 or more.")
    return int(given)


def wait_s() -> float:
    """HARKEN_WAIT_S: for how long a running cluster may have no worker before a stage gives up; a minute if unset."""
    given = os.environ.get("HARKEN_WAIT_S", "") or "60"
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"HARKEN_WAIT_S={given!r}: expected a number of seconds, 0 or more.")
    return seconds


def n_started() -> int:
    """How many processes were started together to train one run: torchrun's WORLD_SIZE, else 1."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdigit() or int(given) < 1:
        raise ConfigError(f"WORLD_SIZE={given!r}: expected a whole number of processes, as torchrun sets it.")
    return int(given)


def pool_size(n_items: int, n_devices: int = 0) -> int:
    """How many processes for so many items: one for each device where there are some, but HARKEN_WORKERS is obeyed.

    Three runs on two cores would leave one core idle for a whole run; side by side they share both evenly.
    """
    workers = n_workers()
    if n_devices and not os.environ.get("HARKEN_WORKERS"):
        return min(n_devices, n_items)
    if not os.environ.get("HARKEN_WORKERS") and workers < n_items < 2 * workers:
        return n_items
    return min(workers, n_items)


def inline(
    make: Callable[[Cfg], Callable[[Item], Result]],
    cfg: Cfg,
    items: Iterable[Item],
    *,
    devices: Sequence[str] | None = None,
) -> Iterator[Result]:
    """Everything in this process, one after the other."""
    function = None
    for item in items:
        function = function or make(cfg)
        yield function(item)


def local(
    make: Callable[[Cfg], Callable[[Item], Result]],
    cfg: Cfg,
    items: Iterable[Item],
    *,
    devices: Sequence[str] | None = None,
) -> Iterator[Result]:
    """Spawned processes on this machine; a worker that dies is replaced and its items are done again."""
    todo, devices = deque(items), devices or ()
    workers = pool_size(len(todo), len(devices))
    if workers <= 1:
        yield from inline(make, cfg, todo)
        return
    deaths, token = 0, uuid.uuid4().hex
    with one_thread():
        while todo:
            in_flight: dict[Future[Result], Item] = {}
            context = get_context("spawn")
            given = context.SimpleQueue() if devices else None
            if given is not None:
                for i in range(workers):
                    given.put(devices[i % len(devices)])
            pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(given,))
            try:
                while todo or in_flight:
                    while todo and len(in_flight) < 2 * workers:
                        in_flight[pool.submit(call, make, cfg, todo[0], token)] = todo[0]
                        todo.popleft()  # only now: a pool that a worker's death has broken takes nothing
                    done, _ = wait(in_flight, return_when=FIRST_COMPLETED)
                    for future in done:
                        result = future.result()
                        del in_flight[future]
                        yield result
            except BrokenProcessPool:
                deaths += 1
                if deaths > REBUILDS:
                    raise died(deaths, list(in_flight.values())) from None
                log.warning("a worker died; starting a new pool and repeating %d items", len(in_flight))
                todo.extendleft(reversed(in_flight.values()))
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def dask(address: str = "", shared: Path | None = None) -> Map:
    """A Dask cluster: the one at `address`, whose workers must see the folder `shared`, or one of this process's own.

    Raises ConfigError where Dask is not installed.
    """
    try:
        from harken.engines.dask import on_dask
    except ImportError:
        raise ConfigError("HARKEN_ENGINE=dask needs the extra `cluster`: pip install 'harken[cluster]'.") from None
    return on_dask(address, shared)


def ray(address: str = "", shared: Path | None = None) -> Map:
    """A Ray cluster: the one at `address`, whose workers must see the folder `shared`, or one of this process's own.

    Raises ConfigError where Ray is not installed.
    """
    try:
        from harken.engines.ray import on_ray
    except ImportError:
        raise ConfigError("HARKEN_ENGINE=ray needs the extra `ray`: pip install 'harken[ray]'.") from None
    return on_ray(address, shared)


CLUSTERS: dict[str, Callable[[str, Path | None], Map]] = {"dask": dask, "ray": ray}
ENGINES: dict[str, Callable[[], Map]] = {"local": lambda: local, "inline": lambda: inline, "dask": dask, "ray": ray}


def engine(shared: Path | None = None) -> Map:
    """The engine that HARKEN_ENGINE names; `inline` where processes were started together, for these are the workers.

    `shared` is a folder that a running cluster's workers must see as this process does; they are asked.
    Raises ConfigError for an unknown engine.
    """
    if n_started() > 1:
        return inline
    name = os.environ.get("HARKEN_ENGINE") or "local"
    kind, plus, address = name.partition("+")
    if plus and kind in CLUSTERS and address:
        return CLUSTERS[kind](address, shared)
    if name not in ENGINES:
        raise unknown("HARKEN_ENGINE", name, [*ENGINES, "dask+tcp://host:port", "ray+host:port"])
    return ENGINES[name]()
