"""Fan-out over a Ray cluster: a running one, or one of this process's own.

Each worker is an actor with one processor, and with a GPU where the fan-out computes on a device and the cluster has
some; it makes the heavy object once and goes with its fan-out, or with the process that asked, however that ends. Two
items are out for each, so that nothing piles up. An actor that dies is replaced and what it was at is done again; the
fourth death ends the run. Whatever is the cluster's fault and not an item's is a TransientError.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = os.environ.get("RAY_USAGE_STATS_ENABLED", "0")  # nothing here reports home

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from harken.engines import REBUILDS, Map, call, die_with_parent, died, one_thread, pool_size, wait_s
from harken.engines.terms import Terms, terms
from harken.errors import ConfigError, TransientError

log = logging.getLogger("harken")
EACH = 2  # items out per worker: one that it is at, one that waits for it
CONNECT_S, TICK_S = 10.0, 5.0
MARK = "HARKEN_RAY_OWN"
CLEAR = """
import os, select, signal, sys, time

def alive():
    # process -> its parent and when it began, which tells it from a later one of the same number
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open(f"/proc/{name}/stat").read().rpartition(")")[2].split()
            if words[0] != "Z":
                found[int(name)] = int(words[1]), words[19]
        except OSError:
            pass
    return found

def is_marked(pid):
    try:
        return sys.argv[1].encode() in open(f"/proc/{pid}/environ", "rb").read().split(bytes(1))
    except OSError:
        return False

known, family, quiet, has_ended = set(), set(), 0, False
while quiet < 3:
    has_ended = has_ended or bool(select.select([0], [], [], 0.2)[0])  # closed by who asked, or by its end
    now = alive()
    for pid in sorted(now):  # Ray's agents and workers rename themselves, which overwrites the mark
        if now[pid][0] in family or is_marked(pid):
            family.add(pid)
            known.add((pid, now[pid][1]))
    left = [pid for pid, since in known if pid in now and now[pid][1] == since and pid != os.getpid()]
    quiet = quiet + 1 if has_ended and not left else 0
    for pid in left if has_ended else ():
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    if has_ended:
        time.sleep(0.1)
"""


def on_ray(address: str, shared: Path | None) -> Map:
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
            asked = stack.enter_context(terms(shared, token)) if address else None
            size = pool_size(len(todo), len(devices or ()))
            if not address:
                stack.enter_context(_cleared(token))
            stack.enter_context(_joined(address, size, len(devices or ())))
            n_gpus = _gpus(address, devices)
            if address:
                there = int(ray.cluster_resources().get("GPU" if n_gpus else "CPU", 0))
                size = max(1, min(there, len(todo)))
            kind = ray.remote(num_cpus=1, num_gpus=n_gpus, max_restarts=0, max_task_retries=0)(Worker)
            crew = Crew(lambda: kind.remote(make, cfg, token), size, asked, address)
            try:
                yield from _results(crew, todo)
            except RayTaskError as e:
                raise (e.cause if isinstance(e.cause, Exception) else e) from None

    return run


@contextlib.contextmanager
def _cleared(token: str) -> Iterator[None]:
    """Whatever Ray starts in here ends with the block, or with this process, however that ends.

    Left to themselves its workers and agents outlived a killed one by 10 to 30 s, some for good.
    """
    if sys.platform != "linux":
        yield
        return
    guard = subprocess.Popen(
        [sys.executable, "-c", CLEAR, f"{MARK}={token}"], stdin=subprocess.PIPE, start_new_session=True
    )
    os.environ[MARK] = token
    try:
        yield
    finally:
        os.environ.pop(MARK, None)
        guard.communicate()


@contextlib.contextmanager
def _joined(address: str, size: int, n_devices: int) -> Iterator[None]:
    """Connected to a cluster. Raises TransientError where there is none."""
    how: dict[str, Any] = {"include_dashboard": False, "num_cpus": size, "num_gpus": n_devices}
    if address:
        how = {"address": address}
        _knock(address)
    try:
        with one_thread():  # its processes are started here
            ray.init(**how, log_to_driver=False, configure_logging=False)
    except ValueError as e:
        raise ConfigError(f"HARKEN_ENGINE=ray+{address}: no address of a Ray cluster ({e}). Expected host:port.") from e
    except (OSError, RuntimeError, TimeoutError, RayError) as e:
        raise _nobody(address, e) from e
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Ray itself takes more than a minute to find that nobody is there."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # `auto`, or a name that Ray resolves
    try:
        socket.create_connection((host.rpartition("/")[2] or "127.0.0.1", int(port)), CONNECT_S).close()
    except OSError as e:
        raise _nobody(address, e) from e


def _nobody(address: str, error: BaseException) -> TransientError:
    return TransientError(
        f"HARKEN_ENGINE=ray+{address}: no Ray cluster answers there ({_line(error)}). Start one (`ray start --head`), "
        "correct the address, or unset HARKEN_ENGINE to work on this machine. A cluster that asks for a token is told "
        "it by RAY_AUTH_MODE and RAY_AUTH_TOKEN, the same in both."
    )


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _gpus(address: str, devices: Sequence[str] | None) -> int:
    """How many GPUs each worker takes. Raises ConfigError where one is asked for that no machine of the cluster has."""
    if devices is None:
        return 0
    has = ray.cluster_resources().get("GPU", 0) >= 1
    wanted = os.environ.get("HARKEN_DEVICE", "")
    if address and wanted.startswith("cuda") and not has:
        raise ConfigError(
            f"HARKEN_DEVICE={wanted}, but no machine of the Ray cluster at {address} has a GPU. Start some that have "
            "(`ray start --address ... --num-gpus 1`), or unset HARKEN_DEVICE."
        )
    return int(has)


class Worker:
    """An actor. Ray sends it by name, so its process imports harken."""

    def __init__(self, make: Callable[[Any], Callable[[Any], Any]], cfg: Any, token: str) -> None:
        self._made = make, cfg, token

    def hello(self, asked: Terms | None) -> list[str]:
        """The first that it is asked. Raises ConfigError where it could not do the same work (see `terms`)."""
        if asked is None:
            die_with_parent()
            return []
        return asked.differences()

    def do(self, item: Any) -> Any:
        make, cfg, token = self._made
        return call(make, cfg, item, token)


class Crew:
    """The actors of one fan-out: those that have said hello, and those that wait for a processor."""

    def __init__(self, actor: Callable[[], Any], size: int, asked: Terms | None, address: str) -> None:
        self._actor, self._asked, self._address = actor, asked, address
        self.free: dict[Any, int] = {}  # actor -> how many more items it may be given
        self.coming: dict[Any, Any] = {}  # its hello -> actor
        self._alone_since = time.monotonic()
        for _ in range(size):
            self.add()

    def add(self) -> None:
        actor = self._actor()
        self.coming[actor.hello.remote(self._asked)] = actor

    def welcome(self, hello: Any) -> None:
        """Raises what an actor said that could do no work."""
        actor = self.coming.pop(hello)
        try:
            differences = ray.get(hello)
        except RayActorError:  # it was gone before it spoke
            self.add()
            return
        if differences:
            log.warning("%s: %s; results may differ in their last bits", self._address, "; ".join(differences))
        self.free[actor] = EACH

    def check(self) -> None:
        """Raises TransientError where there has been nobody to work for as long as HARKEN_WAIT_S says."""
        if self.free:
            self._alone_since = time.monotonic()
        elif time.monotonic() - self._alone_since > wait_s():
            raise TransientError(
                f"no processor of the Ray cluster at {self._address} was free for {wait_s():.0f} s (HARKEN_WAIT_S). "
                "Finished shards and checkpoints are kept: see that it has some to spare (`ray status`), then run the "
                "same command again."
            )


def _results(crew: Crew, todo: deque[Any]) -> Iterator[Any]:
    """What each item comes to, in the order in which they are done."""
    out: dict[Any, tuple[Any, Any]] = {}
    deaths = 0

    def fill() -> None:
        while todo and crew.free and crew.free[actor := max(crew.free, key=lambda a: crew.free[a])]:
            item = todo.popleft()
            out[actor.do.remote(item)] = actor, item
            crew.free[actor] -= 1

    while todo or out:
        fill()
        done, _ = ray.wait([*out, *crew.coming], num_returns=1, timeout=TICK_S)
        crew.check()
        for future in done:
            if future in crew.coming:
                crew.welcome(future)
                continue
            actor, _ = out[future]
            try:
                result = ray.get(future)
            except RayActorError as e:
                lost = {f: i for f, (a, i) in out.items() if a == actor}
                deaths += 1
                if deaths > REBUILDS:
                    raise died(deaths, list(lost.values())) from None
                log.warning("a worker died (%s); starting another and repeating %d items", _line(e), len(lost))
                for f in lost:
                    del out[f]
                todo.extendleft(reversed(lost.values()))
                del crew.free[actor]
                crew.add()
                break
            del out[future]
            crew.free[actor] += 1
            fill()
            yield result
