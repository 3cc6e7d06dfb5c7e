"""One clip's hang, crash or hunger for memory costs that clip and nothing else."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from harken.engines import ENGINES
from harken.errors import ClipError, ConfigError, HarkenError
from harken.guard import OVER_LIMITS, PATIENCE, Guard
from harken.media.reasons import POLICIES, REASONS
from processes import lives, until

LIMIT_S = 0.2
MEMORY_GB = 0.3
PATHS = (str(Path(__file__).parent), str(Path(__file__).parents[1] / "src"))
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process' memory")


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HARKEN_WORKERS", "2")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(PATHS))
    monkeypatch.syspath_prepend(PATHS[0])
    return importlib.import_module("guard_toys")


@pytest.fixture
def guard(toys: Any, tmp_path: Path) -> Iterator[Guard[Any, Any]]:
    with Guard(toys.worker, str(tmp_path), limit_s=60, memory_gb=MEMORY_GB) as found:
        yield found


@pytest.fixture
def impatient(toys: Any, tmp_path: Path) -> Iterator[Guard[Any, Any]]:
    with Guard(toys.worker, str(tmp_path), limit_s=LIMIT_S, memory_gb=MEMORY_GB) as found:
        yield found


def n_made(folder: Path) -> int:
    return len(list(folder.glob("made-*")))


def is_gone(pid: int, within_s: float = 10.0) -> bool:
    return until(lambda: not lives(pid), within_s)


def reason_of(guard: Guard[Any, Any], item: Any) -> str:
    with pytest.raises(ClipError) as e:
        guard(item)
    return e.value.reason


def test_the_same_results_as_without(guard: Guard[Any, Any], toys: Any, tmp_path: Path) -> None:
    """Also of more bytes than any pipe holds, both ways; the process is made once."""
    for n in (100, 10_000, 3_000_000, 300):
        media = np.random.default_rng(n).bytes(n)
        found, wanted = guard(("features", media)), toys.work(("features", media))
        assert found["images"] == wanted["images"]
        for name in ("fbank", "logmel"):
            assert found[name].dtype == np.float32
            assert found[name].flags.writeable
            np.testing.assert_array_equal(found[name], wanted[name], strict=True)
    assert n_made(tmp_path) == 1
    assert guard("pid") == guard.pid != os.getpid()


def test_making_costs_no_item_its_time_or_memory(toys: Any, tmp_path: Path) -> None:
    with Guard(toys.heavy, str(tmp_path), limit_s=LIMIT_S, memory_gb=MEMORY_GB) as guard:
        assert guard(("big_result", 10**8)) == b"x" * 10**8


def test_errors_come_back_as_they_were_raised(guard: Guard[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ClipError) as e:
        guard("refuse")
    assert (e.value.reason, e.value.message) == ("qc.silent", "the loudest sample is at -80 dBFS")
    assert e.value.facts == {"n_bytes": 7}
    with pytest.raises(ValueError, match="a mistake in the code") as mistake:
        guard("mistake")
    assert "in _mistake" in mistake.value.__notes__[0]
    with pytest.raises(HarkenError, match=r"(?s)cannot be sent.*_UnsendableError: so it is"):
        guard("not_to_be_sent")
    assert guard(("echo", 1)) == 1
    assert n_made(tmp_path) == 1


def test_what_cannot_be_made_is_no_clip_s_fault(toys: Any, tmp_path: Path) -> None:
    with Guard(toys.unmakeable, str(tmp_path), limit_s=1, memory_gb=1) as guard:
        for _ in range(2):
            with pytest.raises(ConfigError, match="unknown name 'kaldy'"):
                guard(("echo", 1))
        assert guard.pid is None
    with (
        Guard(toys.dying_maker, str(tmp_path), limit_s=1, memory_gb=1) as guard,
        pytest.raises(HarkenError, match="getting ready: SIGABRT") as e,
    ):
        guard(("echo", 1))
    assert not isinstance(e.value, ClipError)
    for limits in ({"limit_s": 0, "memory_gb": 1}, {"limit_s": 1, "memory_gb": float("nan")}):
        with pytest.raises(ConfigError, match=r"extract: limit_s and memory_gb must be above 0"):
            Guard(toys.worker, str(tmp_path), **limits)


@pytest.mark.parametrize("how", ["spin", "spin_in_c", "sleep"])
def test_what_takes_too_long_is_ended(
    how: str, impatient: Guard[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert impatient(("echo", 1)) == 1
    before = impatient.pid
    assert before is not None
    began = time.monotonic()
    with pytest.raises(ClipError) as e, caplog.at_level(logging.WARNING, "harken"):
        impatient(how)
    assert time.monotonic() - began >= (PATIENCE if how == "sleep" else 1) * LIMIT_S - 0.02
    assert e.value.reason == "media.too_slow"
    assert e.value.message == "not done after 0.2 s of computing; the limit is `extract.limit_s` of params.yaml"
    assert is_gone(before)
    if how == "spin":  # where it was goes to the log: a message that tells it would differ from run to run
        assert "in guard_toys.py:" in caplog.text
        assert e.value.facts["place"].endswith("_spin")
        assert reason_of(impatient, how) == "media.too_slow"
    assert impatient(("echo", 2)) == 2


@pytest.mark.parametrize(
    ("how", "said"),
    [("segfault", "SIGSEGV"), ("abort", "SIGABRT"), ("exit", "exit status 3"), ("sys_exit", "exit status 4")],
)
def test_a_crash_is_a_reason(how: str, said: str, guard: Guard[Any, Any], tmp_path: Path) -> None:
    assert guard(("echo", 1)) == 1
    with pytest.raises(ClipError) as e:
        guard(how)
    assert (e.value.reason, e.value.message) == ("media.crash", f"the process that worked on it ended: {said}")
    assert guard(("echo", 2)) == 2
    assert n_made(tmp_path) == 3  # nothing is said of an item by a process that had worked on another
    assert not list(Path.cwd().glob("core*"))


@on_linux
@pytest.mark.parametrize("how", ["big_array", "big_bytes", "big_picture", "refused_by_ffmpeg", ("big_result", 10**9)])
def test_what_takes_too_much_memory_is_ended(how: Any, guard: Guard[Any, Any]) -> None:
    with pytest.raises(ClipError) as e:
        guard(how)
    assert e.value.reason == "media.too_big"
    assert e.value.message == "needs more than 0.3 GB of memory; the limit is `extract.memory_gb` of params.yaml"
    assert guard(("echo", 2)) == 2


@on_linux
def test_a_crash_for_want_of_memory_is_told_from_others(toys: Any, tmp_path: Path) -> None:
    """In a small parent: Linux counts a parent's memory as its child's until that has more."""

    def ended(how: str) -> str:
        done = subprocess.run(
            [sys.executable, toys.__file__, str(tmp_path), how], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert ended("crash_when_full") == "media.too_big"
    assert ended("segfault") == "media.crash"


@on_linux
def test_no_item_pays_for_those_before_it(guard: Guard[Any, Any], tmp_path: Path) -> None:
    """Every item leaves 100 MB behind; the third would be one too many in the same process."""
    assert [guard(("leak", 100)) for _ in range(6)] == [1, 2, 1, 2, 1, 2]
    assert n_made(tmp_path) == 3
    assert [guard("corrupt") for _ in range(3)] == ["whole"] * 3
    assert reason_of(guard, ("leak", 400)) == "media.too_big"


def test_an_item_is_not_blamed_for_a_kill_from_outside(guard: Guard[Any, Any], tmp_path: Path) -> None:
    assert guard(("killed", str(tmp_path), 1)) == "spared"
    assert guard.pid is not None
    os.kill(guard.pid, signal.SIGKILL)  # while it is idle
    assert guard(("echo", 2)) == 2
    folder = tmp_path / "again"
    folder.mkdir()
    with pytest.raises(HarkenError, match=r"ended twice at the same clip \(SIGKILL\).*Out of memory\?") as e:
        guard(("killed", str(folder), 2))
    assert not isinstance(e.value, ClipError)
    assert guard(("killed", str(folder), 2)) == "spared"


def test_native_noise_does_not_disturb(guard: Guard[Any, Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert [guard("noise") for _ in range(3)] == ["heard"] * 3
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("native code says") == 300


def test_it_computes_with_one_thread(guard: Guard[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    threads, n = guard("threads")
    assert threads == "1"
    assert n == 1 or sys.platform != "linux"


def test_map_gives_every_outcome_in_order(impatient: Guard[Any, Any]) -> None:
    work = [("echo", 0), "refuse", ("echo", 2), "segfault", "spin", ("echo", 5), "abort", ("echo", 7), ("echo", 8)]
    found = {k: v.reason if isinstance(v, ClipError) else v for k, v in impatient.map(enumerate(work))}
    assert list(found.items()) == list(
        enumerate([0, "qc.silent", 2, "media.crash", "media.too_slow", 5, "media.crash", 7, 8])
    )
    assert list(impatient.map([])) == []
    assert list(impatient.map([("a", ("echo", 1))])) == [("a", 1)]


def test_map_works_on_the_next_item_while_the_last_result_is_used(guard: Guard[Any, Any], tmp_path: Path) -> None:
    paths = [str(tmp_path / f"touched-{i}") for i in range(4)]
    for i, (key, _) in enumerate(guard.map((p, ("touch", p)) for p in paths)):
        assert key == paths[i]
        assert i == 3 or until(Path(paths[i + 1]).exists, 10)
        assert not any(Path(p).exists() for p in paths[i + 2 :])


def test_an_interrupted_map_leaves_nothing_behind(guard: Guard[Any, Any]) -> None:
    """Neither one that is not read to its end, nor one whose items or work raise, mixes up the next one's results."""

    def broken() -> Iterator[tuple[int, Any]]:
        yield 0, ("echo", 0)
        yield 1, ("echo", 1)
        raise OSError("the shard cannot be read")

    abandoned = guard.map((i, ("echo", i)) for i in range(10))
    assert next(abandoned) == (0, 0)
    assert guard(("echo", "new")) == "new"
    abandoned.close()
    with pytest.raises(OSError, match="the shard cannot be read"):
        list(guard.map(broken()))
    with pytest.raises(ValueError, match="a mistake"):
        list(guard.map(enumerate(["mistake", ("echo", 1), ("echo", 2)])))
    assert list(guard.map((i, ("echo", i)) for i in range(3))) == [(0, 0), (1, 1), (2, 2)]


def test_the_process_ends_with_its_guard(toys: Any, tmp_path: Path) -> None:
    guard: Guard[Any, Any] = Guard(toys.worker, str(tmp_path), limit_s=LIMIT_S, memory_gb=MEMORY_GB)
    assert guard.pid is None  # nothing to do makes nothing
    first = guard("pid")
    guard.close()
    assert is_gone(first, 0.1)
    second = guard("pid")
    del guard
    gc.collect()
    assert is_gone(second, 0.1)


@pytest.mark.parametrize("name", ["idle", "spin_in_c", "sleep"])
def test_the_process_ends_with_its_parent(name: str, toys: Any, tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, toys.__file__, str(tmp_path), name])
    child = pid_in(tmp_path)
    assert psutil.Process(child).ppid() == parent.pid
    parent.kill()
    parent.wait()
    assert is_gone(child)


def test_ctrl_c_ends_both_without_a_trace_from_the_process(toys: Any, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, toys.__file__, str(tmp_path), "sleep"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    child = pid_in(tmp_path)
    os.killpg(parent.pid, signal.SIGINT)  # what a terminal does
    _, said = parent.communicate(timeout=30)
    assert is_gone(child)
    assert said.count("KeyboardInterrupt") == 1
    assert "_serve" not in said


def pid_in(folder: Path) -> int:
    assert until((folder / "pid").exists, 30)
    return int((folder / "pid").read_text())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("dask", "ray") else n for n in sorted(ENGINES)]
)
def test_every_engine_s_workers_can_use_one(name: str, toys: Any, tmp_path: Path) -> None:
    """Dask's are daemonic: they may not start processes by multiprocessing."""
    if name in ("dask", "ray"):
        pytest.importorskip({"dask": "distributed", "ray": "ray"}[name])
    items = [("echo", 0), "segfault", ("echo", 1), "refuse", "spin", ("echo", 2)]
    make: Callable[..., Any] = toys.guarded
    found = list(ENGINES[name]()(make, str(tmp_path), items))
    assert sorted(map(str, found)) == ["0", "1", "2", "media.crash", "media.too_slow", "qc.silent"]
    gc.collect()
    assert all(is_gone(int(p.name.split("-")[1])) for p in tmp_path.glob("made-*"))


def test_its_reasons_are_verdicts_on_the_content() -> None:
    assert set(REASONS) >= OVER_LIMITS
    for code in OVER_LIMITS:
        assert (REASONS[code].about, REASONS[code].retry) == ("clip", "never")
        policy = POLICIES[code]
        assert (policy.group, policy.confirmations, policy.recheck_s) == ("content", 1, None)
