"""Work on one item at a time in a process of its own, under a limit of time and of memory.

Media come from strangers, and a decoder written in C may spin for ever, ask for more memory than the machine has, or
crash. In a process of its own that costs the one clip: it gets a reason (`media.too_slow`, `media.too_big`,
`media.crash`), the process is replaced, and the worker, its shard and the run go on.

The kernel does what can be left to it. A timer that counts the process' own computing ends a clip that spins, also
inside C code that never comes back to Python; RLIMIT_DATA makes allocations beyond the limit fail. Items and results
lie in memory files that both processes hold, so neither ever waits for the other to read: only their lengths are sent.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import itertools
import logging
import mmap
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Generic, TypeVar

from harken.engines import ONE_THREAD, die_with_parent
from harken.errors import ClipError, ConfigError, HarkenError

log = logging.getLogger("harken")
Key = TypeVar("Key")
Item = TypeVar("Item")
Result = TypeVar("Result")

OVER_LIMITS: Final = frozenset({"media.too_slow", "media.too_big", "media.crash"})
"""What may end otherwise under other limits: code that is refused memory crashes at times."""

PATIENCE: Final = 4  # times `limit_s` on the clock: work that waits computes nothing, and a busy machine is slow
_AHEAD: Final = 2  # items in flight: one is worked on, the next lies ready
_SLICE_S: Final = 1.0
_FULL: Final = 0.8  # of the memory it may take
_FAULTS: Final = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP}
)
_TORCH_HAS_NO_MEMORY: Final = "DefaultCPUAllocator: can't allocate memory"  # a RuntimeError of its own

_READY, _DONE, _RAISED, _TOO_BIG = range(4)
_ASK: Final = struct.Struct("<BQ")  # slot, bytes in it
_ANSWER: Final = struct.Struct("<BBQ")  # what became of it, slot, bytes in it
_BOOT: Final = (
    f"import sys; sys.path[:] = sys.argv[1].split({os.pathsep!r}); import harken.guard; harken.guard._serve()"
)


class Guard(Generic[Item, Result]):
    """`make(cfg)(item)` in a process of its own, which is started with the first item and kept for the next ones.

    `make` must be importable (module level), as for an engine. An item may cost `limit_s` seconds of computing (or 4
    times that on the clock, should it wait instead) and, over what `make(cfg)` left in use, `memory_gb` GB (10^9 bytes)
    of memory; the memory is limited on Linux only. Both count from the moment the process is ready: importing and
    loading cost no item anything, and have no limit. `params` names the section of params.yaml that the two come from,
    for the messages.

    An item that ran out of memory or crashed a process that had worked on others is tried again in a fresh one, so
    that a verdict never depends on what was done before. The process computes with one thread, ignores Ctrl-C (its
    parent decides) and ends with its parent. Its standard output goes to standard error. Use one guard from one
    thread at a time.
    """

    def __init__(
        self,
        make: Callable[[Any], Callable[[Item], Result]],
        cfg: Any,
        *,
        limit_s: float,
        memory_gb: float,
        params: str = "extract",
    ) -> None:
        if not (limit_s > 0 and memory_gb > 0):
            raise ConfigError(f"{params}: limit_s and memory_gb must be above 0, found {limit_s} and {memory_gb}.")
        self.limit_s, self.memory_gb, self._params = limit_s, memory_gb, params
        self._setup = _memory_file()
        self._items = [_memory_file() for _ in range(_AHEAD)]
        self._results = [_memory_file() for _ in range(_AHEAD)]
        self._flying: deque[_Flight] = deque()
        self._n_flown = 0
        self._child: _Child | None = None
        self._setup_bytes = _store(self._setup, (make, cfg, limit_s, memory_gb))
        files = [self._setup, *self._items, *self._results]
        weakref.finalize(self, _close_all, files)

    def __call__(self, item: Item) -> Result:
        """The result for one item.

        Raises ClipError: `media.too_slow`, `media.too_big`, or `media.crash` where the process died of the item; or
        whatever the work itself raised. What `make(cfg)` raises is raised as it is. Raises HarkenError where the
        process cannot be kept alive, which says nothing of the item: something outside kills it.
        """
        with self._or_end():
            self._submit(item)
            return self._land()

    def map(self, items: Iterable[tuple[Key, Item]]) -> Iterator[tuple[Key, Result | ClipError]]:
        """For each key and item, in order: the key with the item's result, or with the ClipError that it ended in.

        Other errors are raised. One item is always sent ahead, so that the process works while the caller writes away
        the last result; of an item that has been sent, only the key is kept here.
        """
        source = iter(items)
        keys: deque[Key] = deque()
        with self._or_end():
            while True:
                for key, item in itertools.islice(source, _AHEAD - len(keys)):
                    self._submit(item)
                    keys.append(key)
                if not keys:
                    return
                outcome: Result | ClipError
                try:
                    outcome = self._land()
                except ClipError as e:
                    outcome = e
                yield keys.popleft(), outcome

    def close(self) -> None:
        """End the process. A guard that is used again starts another."""
        self._flying.clear()
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def __enter__(self) -> Guard[Item, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The process that does the work, while there is one."""
        return None if self._child is None else self._child.process.pid

    @contextlib.contextmanager
    def _or_end(self) -> Iterator[None]:
        """Whatever leaves items in flight (Ctrl-C, an abandoned `map`, an error that is no clip's) ends the process."""
        if self._flying:
            self.close()  # of a `map` that was not read to its end
        try:
            yield
        finally:
            if self._flying:
                self.close()

    def _submit(self, item: Item) -> None:
        slot = self._n_flown % _AHEAD
        self._n_flown += 1
        flight = _Flight(slot, _store(self._items[slot], item))
        self._flying.append(flight)
        if self._child is not None:
            self._child.ask(flight)

    def _land(self) -> Result:
        """What became of the first item in flight."""
        flight = self._flying[0]
        while True:
            child = self._child or self._start()
            was_fresh = child.n_done == 0
            answer = child.answer(PATIENCE * self.limit_s)
            if isinstance(answer, _Death) or answer.kind == _TOO_BIG:
                place = child.place()
                self._child = None
                child.end()
                verdict = self._verdict(answer, flight, was_fresh)
                if verdict is None:
                    continue
                self._flying.popleft()
                log.warning("%s", f"{verdict} (in {place})" if place else str(verdict))
                verdict.facts |= {"place": place} if place else {}
                raise verdict
            child.n_done += 1
            self._flying.popleft()
            value = _load(self._results[answer.slot], answer.n_bytes)
            if answer.kind == _RAISED:
                raise value
            result: Result = value
            return result

    def _verdict(self, answer: _Death | _Answer, flight: _Flight, was_fresh: bool) -> ClipError | None:
        """What the end of a process says of the item it worked on; None: nothing yet, try again in a fresh one."""
        if isinstance(answer, _Death) and answer.is_slow:
            text = (
                f"not done after {self.limit_s:g} s of computing; the limit is `{self._params}.limit_s` of params.yaml"
            )
            return ClipError("media.too_slow", text, limit_s=self.limit_s)
        if isinstance(answer, _Death) and answer.is_from_outside:
            flight.n_killed += 1
            if flight.n_killed > 1:
                raise HarkenError(
                    f"the process that works on the clips was ended twice at the same clip ({answer}), not by the "
                    f"clip itself. Out of memory? Try fewer HARKEN_WORKERS or a lower `{self._params}.memory_gb`."
                )
            return None
        if not was_fresh:
            return None
        # code that is refused memory may crash instead of telling
        if isinstance(answer, _Death) and answer.grown < _FULL * self.memory_gb * 1e9:
            return ClipError("media.crash", f"the process that worked on it ended: {answer}")
        text = (
            f"needs more than {self.memory_gb:g} GB of memory; the limit is `{self._params}.memory_gb` of params.yaml"
        )
        return ClipError("media.too_big", text, memory_gb=self.memory_gb)

    def _start(self) -> _Child:
        """A new process, ready, with everything that is in flight sent to it. Raises what `make(cfg)` raised."""
        self._child = child = _Child(self._setup, self._setup_bytes, self._items, self._results)
        answer = child.answer(None)
        if isinstance(answer, _Death):
            self.close()
            raise HarkenError(f"the process that is to work on the clips ended while it was getting ready: {answer}.")
        if answer.kind == _RAISED:
            error = _load(self._results[answer.slot], answer.n_bytes)
            self.close()
            raise error
        for flight in self._flying:
            child.ask(flight)
        return child


@dataclass
class _Flight:
    """An item that has been sent: its slot, its bytes there, and how often its process was killed from outside."""

    slot: int
    n_bytes: int
    n_killed: int = 0


@dataclass(frozen=True)
class _Answer:
    kind: int
    slot: int
    n_bytes: int


@dataclass(frozen=True)
class _Death:
    """How the process ended: `code` as subprocess gives it (minus the signal, or the exit status), and by how many
    bytes it had grown since it was ready."""

    code: int
    grown: int = 0
    is_late: bool = False

    @property
    def is_slow(self) -> bool:
        return self.is_late or self.code == -signal.SIGPROF

    @property
    def is_from_outside(self) -> bool:
        """Whether by a signal that no fault in the process' own code gives."""
        return self.code < 0 and -self.code not in _FAULTS

    def __str__(self) -> str:
        if self.code >= 0:
            return f"exit status {self.code}"
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"


class _Child:
    """The process, as its parent sees it."""

    def __init__(self, setup: IO[bytes], setup_bytes: int, items: list[IO[bytes]], results: list[IO[bytes]]) -> None:
        self.n_done = 0
        self._rss_when_ready = 0
        self._trace = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed in `end`
        inbox, self._ask = os.pipe()
        self._answers, outbox = os.pipe()
        files = [f.fileno() for f in (self._trace, setup, *items, *results)]
        try:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _BOOT,
                    os.pathsep.join(p or str(Path.cwd()) for p in sys.path),
                    *map(str, (os.getpid(), setup_bytes, inbox, outbox, *files)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=2,  # native code prints what it likes
                pass_fds=(inbox, outbox, *files),
                env={**os.environ, **ONE_THREAD},
            )
        finally:
            os.close(inbox)
            os.close(outbox)
        self._poll = select.poll()
        self._poll.register(self._answers, select.POLLIN)
        self.end = weakref.finalize(self, _end, self.process, self._trace, (self._ask, self._answers))

    def ask(self, flight: _Flight) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died: the answer will say so
            os.write(self._ask, _ASK.pack(flight.slot, flight.n_bytes))

    def answer(self, patience_s: float | None) -> _Answer | _Death:
        """The next answer. Waiting is counted in slices: a Ctrl-Z or a laptop's sleep costs one slice at most."""
        waited_s = 0.0
        while True:
            slice_s = _SLICE_S if patience_s is None else min(_SLICE_S, patience_s - waited_s)
            if self._poll.poll(1000 * slice_s):
                break
            waited_s += slice_s
            if patience_s is not None and waited_s >= patience_s:
                self.process.kill()
                return _Death(self.process.wait(), is_late=True)
        message = os.read(self._answers, _ANSWER.size)  # written at once, so read at once
        if not message:
            return self._death()
        answer = _Answer(*_ANSWER.unpack(message))
        if answer.kind == _READY:
            self._rss_when_ready = answer.n_bytes
        return answer

    def _death(self) -> _Death:
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)  # or it would wait for what is no more
        return _Death(self.process.returncode, _peak_rss(usage) - self._rss_when_ready)

    def place(self) -> str:
        """Where in Python the process was when it crashed or ran out of time; empty where that is not known."""
        self._trace.seek(0)
        line = next(
            (n for n in self._trace.read().decode(errors="replace").splitlines() if n.startswith("  File ")), ""
        )
        _, _, where = line.rpartition("/")
        return where.replace('", line ', ":").replace(" in ", ", ")


def _peak_rss(usage: resource.struct_rusage) -> int:
    """The most memory in bytes that a process ever had in use. Linux counts in what its parent had when it started it,
    so a small child of a large parent seems not to grow."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _end(process: subprocess.Popen[bytes], trace: IO[bytes], pipes: tuple[int, int]) -> None:
    process.kill()
    process.wait()
    trace.close()
    for fd in pipes:
        os.close(fd)


def _close_all(files: list[IO[bytes]]) -> None:
    for file in files:
        file.close()


def _memory_file() -> IO[bytes]:
    """A file without a name; on Linux one that is never written to a disk."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("harken"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _store(file: IO[bytes], value: object) -> int:
    """`value` at the beginning of `file`; returns how many bytes it takes."""
    out = _Out(file)
    pickle.dump(value, out, protocol=5)  # hands over long bytes and arrays without copying them first
    return out.n_bytes


class _Out:
    """What is written to `file`, from its beginning."""

    def __init__(self, file: IO[bytes]) -> None:
        self._fd, self.n_bytes = file.fileno(), 0

    def write(self, data: bytes | pickle.PickleBuffer) -> None:
        left = data.raw() if isinstance(data, pickle.PickleBuffer) else memoryview(data)
        while left:  # one call writes 2 GB at most
            n = os.pwrite(self._fd, left, self.n_bytes)
            left, self.n_bytes = left[n:], self.n_bytes + n


def _load(file: IO[bytes], n_bytes: int) -> Any:
    with mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ) as view:
        return pickle.loads(view)


# What follows runs in the process itself.


def _serve() -> None:
    """Get ready, then work on what is asked for until nobody can ask any more."""
    parent, setup_bytes, inbox, outbox, *rest = map(int, sys.argv[2:])
    trace, setup, *slots = [open(fd, "r+b", buffering=0) for fd in rest]  # noqa: SIM115 - until this process ends
    items, results = slots[:_AHEAD], slots[_AHEAD:]
    _settle(parent, trace)
    try:
        make, cfg, limit_s, memory_gb = _load(setup, setup_bytes)
        work = make(cfg)
    except Exception as e:
        os.write(outbox, _ANSWER.pack(_RAISED, 0, _store(results[0], _portable(e))))
        os._exit(0)
    _bound_memory(memory_gb)
    os.write(outbox, _ANSWER.pack(_READY, 0, _peak_rss(resource.getrusage(resource.RUSAGE_SELF))))
    while message := os.read(inbox, _ASK.size):
        slot, n_bytes = _ASK.unpack(message)
        kind, n_bytes = _work(work, items[slot], n_bytes, results[slot], limit_s)
        os.write(outbox, _ANSWER.pack(kind, slot, n_bytes))
        if kind == _TOO_BIG:
            break  # libraries do not test what they leave behind when memory runs out
    os._exit(0)  # nothing here is worth a tidy end, which could itself hang or crash


def _settle(parent: int, trace: IO[bytes]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # both are inherited, ignored and blocked ones too
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    die_with_parent()  # on Linux, with the thread that started it: an idle process that is gone is simply replaced
    if os.getppid() != parent:
        os._exit(1)  # it ended before it was watched
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # a crash here is a verdict, not a file of gigabytes
    faulthandler.enable(trace, all_threads=False)
    faulthandler.register(signal.SIGPROF, trace, all_threads=False, chain=True)  # says where, then ends the process


def _bound_memory(memory_gb: float) -> None:
    """Let allocations fail beyond `memory_gb` over what is in use.

    RLIMIT_DATA counts every private writable page since Linux 4.7, touched or not. RLIMIT_AS would count the gigabytes
    of address space that torch's libraries reserve and never use.
    """
    if sys.platform != "linux":
        return
    with open("/proc/self/status") as f:
        used_kb = next(int(line.split()[1]) for line in f if line.startswith("VmData:"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used_kb * 1024 + int(memory_gb * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _work(
    work: Callable[[Any], Any], item: IO[bytes], n_bytes: int, result: IO[bytes], limit_s: float
) -> tuple[int, int]:
    """Do one item: what became of it, and the bytes that its result or its error takes."""
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        return _DONE, _store(result, work(_load(item, n_bytes)))
    except Exception as e:
        return (_TOO_BIG, 0) if _is_of_memory(e) else (_RAISED, _store(result, _portable(e)))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _is_of_memory(error: BaseException | None) -> bool:
    """Whether `error` is, or comes from, an allocation that failed."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and _TORCH_HAS_NO_MEMORY in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _portable(error: Exception) -> Exception:
    """`error` as it can be sent: with its traceback as a note where somebody will have to look for a mistake."""
    text = "".join(traceback.format_exception(error))
    if not isinstance(error, HarkenError):
        error.add_note(f"in the guarded process:\n{text}")
    try:
        pickle.loads(pickle.dumps(error, protocol=5))
    except Exception:
        return HarkenError(f"an error that cannot be sent between processes:\n{text}")
    return error
