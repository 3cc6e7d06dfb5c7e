"""Fan-out over a Dask cluster: a running one that others may use too, or one of this process's own.

What Dask leaves open is settled here. A bounded number of items is out at a time, so that nothing piles up on the
scheduler, or after this process's death. The heavy object is made once per worker process and goes when the fan-out
that needed it has ended, however it ended. A worker that dies is Dask's to replace; what it was at is done again, and
an item that was with four of them ends the run. Whatever is the cluster's fault and not an item's is a TransientError.

A running cluster's workers have one thread each (`dask worker --nthreads 1`), run the same harken and see the same
folders: they are asked before the first item, those that join later before their first one. Where any of them declares
`--resources GPU=1`, fan-outs that compute on a device go to those alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dask import config
from distributed import Client, Future, KilledWorker, Nanny, Scheduler, SpecCluster, Worker, as_completed

from harken.engines import ONE_THREAD, Map, call, died, made, pool_size, start_worker, wait_s
from harken.engines.terms import Terms, terms
from harken.errors import ConfigError, HarkenError, TransientError

log = logging.getLogger("harken")
CONNECT_S = 10.0
TICK_S = 5.0  # between two looks at the cluster while it works
EACH = 2  # items out per worker: one that it is at, one that waits for it
# and of those that take less than QUICK_S: the way there and back takes milliseconds, in which no worker is to idle
QUICK, QUICK_S = 32, 0.05
KEPT = "Finished shards and checkpoints are kept"


def on_dask(address: str, shared: Path | None) -> Map:
    """The cluster at `address`, whose workers must see the folder `shared`; without an address, one of our own."""

    def run(
        make: Callable[[Any], Callable[[Any], Any]],
        cfg: Any,
        items: Iterable[Any],
        *,
        devices: Sequence[str] | None = None,
    ) -> Iterator[Any]:
        todo, token = deque(items), uuid.uuid4().hex
        if not todo:
            return
        with contextlib.ExitStack() as stack:
            if address:
                stack.enter_context(config.set({"distributed.comm.timeouts.connect": f"{CONNECT_S} s"}))
                asked = stack.enter_context(terms(shared, token))
                client = stack.enter_context(_connected(address, address, token))
                crew = Crew(client, address, devices is not None)
                stack.enter_context(_guest(crew, token, asked))
                one = partial(_call_there, asked, make, cfg, token)
            else:
                cluster = stack.enter_context(_own_cluster(pool_size(len(todo), len(devices or ())), devices or ()))
                client = stack.enter_context(_connected(cluster, cluster.scheduler_address, token))
                crew = Crew(client, cluster.scheduler_address, False)
                one = partial(call, make, cfg, token=token)
            yield from _results(crew, one, todo, token)

    return run


class Own(Worker):  # type: ignore[misc]
    """A worker of our own cluster."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        start_worker()
        super().__init__(*args, **kwargs)


def _own_cluster(size: int, devices: Sequence[str]) -> SpecCluster:
    """A scheduler in this process and `size` workers, each with one thread, of which each keeps one of the devices.

    Without limits to memory: at 80% of one Dask pauses a worker, and a stage would wait for ever.
    """
    quiet = {"silence_logs": logging.WARNING, "dashboard": False}
    shared: dict[str, Any] = {"worker_class": Own, "host": "127.0.0.1", "nthreads": 1, "memory_limit": 0, **quiet}
    envs = [ONE_THREAD | ({"HARKEN_DEVICE": devices[i % len(devices)]} if devices else {}) for i in range(size)]
    return SpecCluster(
        workers={i: {"cls": Nanny, "options": shared | {"env": env}} for i, env in enumerate(envs)},
        # port 0: any free one, or two stages at once would quarrel over the dashboard's
        scheduler={"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}},
        silence_logs=logging.WARNING,
    )


def _connected(cluster: Any, where: str, token: str) -> Client:
    """Raises ConfigError for what is no address, TransientError where no scheduler answers within CONNECT_S."""
    try:
        return Client(cluster, timeout=CONNECT_S, set_as_default=False, name=token)
    except ValueError as e:
        raise ConfigError(
            f"HARKEN_ENGINE=dask+{where}: no address of a scheduler ({e}). Expected tcp://host:port."
        ) from e
    except (OSError, TimeoutError, asyncio.CancelledError) as e:
        raise TransientError(
            f"HARKEN_ENGINE=dask+{where}: no Dask scheduler answers there within {CONNECT_S:.0f} s ({e}). Start one "
            "(`dask scheduler`), correct the address, or unset HARKEN_ENGINE to work on this machine."
        ) from e
    except Exception as e:  # whatever Dask makes of words that are not its own
        raise ConfigError(
            f"HARKEN_ENGINE=dask+{where}: what answers there does not speak as a Dask scheduler does "
            f"({type(e).__name__}: {e}). Expected the address that `dask scheduler` prints, tcp://host:port."
        ) from e


@contextlib.contextmanager
def _asking(where: str) -> Iterator[None]:
    """A question to the cluster. Raises TransientError where there is nobody to answer it."""
    try:
        yield
    except (OSError, TimeoutError, asyncio.CancelledError, RuntimeError) as e:
        raise _lost(where, str(e) or type(e).__name__) from e


def _lost(where: str, why: str) -> TransientError:
    return TransientError(
        f"the Dask cluster at {where} is gone ({why.rstrip('.')}). {KEPT}: see that a scheduler and workers run, then "
        "run the same command again."
    )


@contextlib.contextmanager
def _guest(crew: Crew, token: str, asked: Terms) -> Iterator[None]:
    """Be one of those who use a cluster: its workers agree to the terms, and forget what nobody needs any more."""
    client = crew.client
    with _asking(crew.where):
        # by value, not by name: a scheduler need not have harken
        present = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.clients))
        answers = client.run(_agree, asked, present, on_error="return")
    refused = {w: a for w, a in answers.items() if isinstance(a, Exception) and not isinstance(a, OSError)}
    for worker, error in refused.items():
        if isinstance(error, HarkenError):
            raise error
        raise ConfigError(
            f"the worker {worker} cannot run harken ({type(error).__name__}: {error}). Install the same harken in its "
            "Python, then start it again."
        ) from error
    for worker, differences in answers.items():
        if isinstance(differences, list) and differences:
            log.warning("%s: %s; results may differ in their last bits", worker, "; ".join(differences))
    try:
        yield
    finally:
        if client.status == "running":
            with contextlib.suppress(Exception):  # a cluster that is going away; the next one to come tidies too
                client.run(_forget, token, on_error="ignore")


def _agree(asked: Terms, present: Collection[str]) -> list[str]:
    """In a worker, at the begin of a fan-out: the heavy objects of those that have ended go, however they ended."""
    for token in [t for t in made if not any(t in client for client in present)]:
        made.pop(token, None)
    return asked.differences()


def _forget(token: str) -> None:
    made.pop(token, None)


def _call_there(asked: Terms, make: Callable[[Any], Callable[[Any], Any]], cfg: Any, token: str, item: Any) -> Any:
    """One item in a running cluster's worker, which may have joined after all others were asked."""
    if token not in made:
        asked.differences()
    return call(make, cfg, item, token)


class Crew:
    """The workers of a cluster that may take an item of one fan-out."""

    def __init__(self, client: Client, where: str, is_for_devices: bool) -> None:
        self.client, self.where = client, where
        self._alone_since: float | None = None
        self._resources: dict[str, float] = {}
        while not (workers := self._workers()):
            time.sleep(0.2)
        if is_for_devices and any(w["resources"].get("GPU") for w in workers):
            self._resources = {"GPU": 1}
        elif is_for_devices and (wanted := os.environ.get("HARKEN_DEVICE", "")).startswith("cuda"):
            raise ConfigError(
                f"HARKEN_DEVICE={wanted}, but none of the {len(workers)} workers at {where} declares a GPU. Start one "
                "for each GPU: CUDA_VISIBLE_DEVICES=0 dask worker --nthreads 1 --resources GPU=1; or unset "
                "HARKEN_DEVICE."
            )

    @property
    def resources(self) -> dict[str, float] | None:
        """What an item takes of its worker."""
        return self._resources or None

    def size(self) -> int:
        """How many there are. It changes as workers come and go; with none left, nothing is lost but time."""
        return len(self._workers())

    def _workers(self) -> list[dict[str, Any]]:
        """Raises TransientError where there has been none for as long as HARKEN_WAIT_S says, or no scheduler."""
        if self.client.status != "running":
            raise _lost(self.where, "the connection was lost")
        with _asking(self.where):
            every = self.client.scheduler_info(n_workers=-1)["workers"]
        if many := [address for address, w in every.items() if w["nthreads"] > 1]:
            raise ConfigError(
                f"the worker {many[0]} has {every[many[0]]['nthreads']} threads. An item needs a process of its own: "
                "start workers with --nthreads 1, as many as are wanted (--nworkers)."
            )
        able = [w for w in every.values() if not self._resources or w["resources"].get("GPU")]
        if able:
            self._alone_since = None
            return able
        what = "worker that declares a GPU" if self._resources else "worker"
        if self._alone_since is None:
            self._alone_since = time.monotonic()
            log.warning("no %s at %s; waiting for one, up to %.0f s (HARKEN_WAIT_S)", what, self.where, wait_s())
        elif time.monotonic() - self._alone_since > wait_s():
            raise TransientError(
                f"no {what} at {self.where} for {wait_s():.0f} s (HARKEN_WAIT_S). {KEPT}: start one (`dask worker "
                "--nthreads 1`), then run the same command again."
            )
        return []


def _results(crew: Crew, one: Callable[[Any], Any], todo: deque[Any], token: str) -> Iterator[Any]:
    """What each item comes to, in the order in which they are done."""
    client, numbers = crew.client, itertools.count()
    out: dict[Any, Any] = {}
    answers = as_completed(loop=client.loop, with_results=True)
    size, began, n_done = crew.size(), time.monotonic(), 0
    looked = began

    def fill() -> None:
        is_quick = n_done > QUICK and size * (time.monotonic() - began) < n_done * QUICK_S
        free = size * (QUICK if is_quick else EACH) - len(out)
        if is_quick and len(out) > free:
            return  # many at once cost less than one by one
        batch = [todo.popleft() for _ in range(min(free, len(todo)))]
        if batch:
            # a name of its own for each: the same shard may be asked for again after its file was deleted
            keys = [(f"harken-{token}", next(numbers)) for _ in batch]
            out.update(zip(keys, batch, strict=True))
            answers.update(client.map(one, batch, key=keys, pure=False, resources=crew.resources))

    while todo or out:
        fill()
        with answers.thread_condition:
            answers.thread_condition.wait_for(answers.has_ready, TICK_S)
        found = answers.next_batch(block=False)
        if not found and any(future.cancelled() for future in list(answers.futures)):
            raise _lost(crew.where, "what was out is lost")
        for future, value in found:
            result = _result(future, value, out.pop(future.key), crew.where)
            n_done += 1
            fill()  # before the caller has the result: it may take its time
            yield result
        if time.monotonic() - looked > TICK_S:
            size, looked = crew.size(), time.monotonic()


def _result(future: Future, value: Any, item: Any, where: str) -> Any:
    """Raises what the item raised; HarkenError where workers die of it, TransientError where the cluster is gone."""
    status = future.status
    future.release()
    if status == "finished":
        return value
    if status != "error":
        raise _lost(where, getattr(value, "reason", status))
    _, error, trace = value
    if isinstance(error, KilledWorker):
        raise died(error.allowed_failures + 1, [item]) from None
    raise error.with_traceback(trace)
