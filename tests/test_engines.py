"""Laws of every engine, and what happens when a worker or the parent is killed."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from harken import engines
from harken.engines import ENGINES, engine, inline, local, n_workers
from harken.errors import ClipError, ConfigError, HarkenError
from processes import lives, until

EVERY = sorted(ENGINES)
# starting a cluster takes seconds, and Ray's five: what Dask's other tests show too is shown by the slow ones
ALL = [pytest.param(n, marks=pytest.mark.slow) if n == "ray" else n for n in EVERY]
MOST = [pytest.param(n, marks=pytest.mark.slow) if n in ("dask", "ray") else n for n in EVERY]
MANY = [n for n in ALL if n != "inline"]
MOST_OF_MANY = [n for n in MOST if n != "inline"]
PATHS = (str(Path(__file__).parent), str(Path(__file__).parents[1] / "src"))


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """The module of what workers do, importable here and in them; two workers."""
    name = getattr(getattr(request.node, "callspec", None), "params", {}).get("name")
    if name in ("dask", "ray"):
        pytest.importorskip({"dask": "distributed", "ray": "ray"}[name])  # the extras `cluster` and `ray`
    monkeypatch.setenv("HARKEN_WORKERS", "2")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(PATHS))
    monkeypatch.syspath_prepend(PATHS[0])
    return importlib.import_module("engine_toys")


def results(name: str, make: Callable[..., Any], folder: Path, n: int) -> list[Any]:
    return list(ENGINES[name]()(make, str(folder), range(n)))


@pytest.mark.parametrize("name", ALL)
def test_one_result_per_item_and_one_heavy_object_per_worker(name: str, toys: Any, tmp_path: Path) -> None:
    assert sorted(results(name, toys.squarer, tmp_path, 12)) == [n * n for n in range(12)]
    made = [p.name.split("-")[1] for p in tmp_path.glob("made-*")]
    assert 1 <= len(made) <= (1 if name == "inline" else 2)
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("name", MOST)
def test_nothing_to_do_makes_nothing(name: str, toys: Any, tmp_path: Path) -> None:
    assert results(name, toys.squarer, tmp_path, 0) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MOST)
def test_errors_come_back_as_they_were_raised(name: str, toys: Any, tmp_path: Path) -> None:
    with pytest.raises(ClipError) as e:
        results(name, toys.refuser, tmp_path, 6)
    assert (e.value.reason, e.value.message) == ("qc.silent", "clip 3")


@pytest.mark.parametrize("name", MOST)
def test_the_environment_is_left_as_it_was(
    name: str, toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = set(results(name, toys.teller, tmp_path, 4))
    assert found == ({"3"} if name == "inline" else {"1"})
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("name", MOST)
def test_items_arrive_as_they_were_sent(name: str, toys: Any) -> None:
    """A cluster's own language has tuples and strings that mean other things."""
    items = [("a", 1), ["x", ("y", 2)], {"k": ("b", 3)}, Path("p"), None, "harken-0", ("squarer", [1, (2,)]), ()]
    assert sorted(map(repr, ENGINES[name]()(toys.echo, "", items))) == sorted(map(repr, items))


@pytest.mark.parametrize("name", MANY)
def test_a_killed_worker_s_items_are_done_again(name: str, toys: Any, tmp_path: Path) -> None:
    assert sorted(results(name, toys.victim, tmp_path, 12)) == list(range(12))
    assert (tmp_path / "killed").exists()


def test_a_worker_that_dies_while_nobody_waits_loses_no_item(toys: Any, tmp_path: Path) -> None:
    got = []
    for n in local(toys.victim, str(tmp_path), range(12)):
        got.append(n)
        time.sleep(0.1)  # the pool breaks here, not in `wait`
    assert sorted(got) == list(range(12))


@pytest.mark.parametrize("name", MOST_OF_MANY)
def test_an_item_that_kills_every_worker_ends_the_run(name: str, toys: Any, tmp_path: Path) -> None:
    with pytest.raises(HarkenError, match=r"a worker process died 4 times, .* Out of memory\? Try HARKEN_WORKERS=1"):
        results(name, toys.doomed, tmp_path, 3)


def test_one_worker_needs_no_process(toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(local(toys.pid_of, "", [1])) == {os.getpid()}
    monkeypatch.setenv("HARKEN_WORKERS", "1")
    assert set(local(toys.pid_of, "", range(3))) == {os.getpid()}


def test_inline_makes_the_heavy_object_anew_for_each_fan_out(toys: Any, tmp_path: Path) -> None:
    for _ in range(2):
        list(inline(toys.squarer, str(tmp_path), range(2)))
    assert len(list(tmp_path.glob("made-*"))) == 2  # what it was made from may have changed between


@pytest.mark.slow
def test_a_cluster_that_outlives_a_fan_out_keeps_no_heavy_object(
    toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        monkeypatch.setenv("HARKEN_ENGINE", f"dask+{cluster.scheduler_address}")
        for _ in range(2):
            assert sorted(engine()(toys.squarer, str(tmp_path), range(3))) == [0, 1, 4]
    assert len(list(tmp_path.glob("made-*"))) == 2


@pytest.mark.parametrize("name", MANY)
def test_no_worker_outlives_a_killed_parent(name: str, tmp_path: Path) -> None:
    code = (
        "import sys, engine_toys; from harken.engines import ENGINES\n"
        "if __name__ == '__main__': list(ENGINES[sys.argv[1]]()(engine_toys.sleeper, sys.argv[2], range(4)))\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    folder = tmp_path / "pids"
    folder.mkdir()
    parent = subprocess.Popen([sys.executable, str(script), name, str(folder)])
    try:
        assert until(lambda: len(list(folder.glob("pid-*"))) == 2, 60)
        workers = [psutil.Process(int(p.name.split("-")[1])) for p in folder.glob("pid-*")]
        family = [*workers, *psutil.Process(parent.pid).children(recursive=True)]
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert until(lambda: not any(map(lives, family)), 15), [p for p in family if lives(p)]


def test_engines_are_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARKEN_ENGINE", raising=False)
    assert engine() is local
    monkeypatch.setenv("HARKEN_ENGINE", "inline")
    assert engine() is inline
    monkeypatch.setenv("HARKEN_ENGINE", "inlin")
    with pytest.raises(ConfigError, match=r"HARKEN_ENGINE: unknown name 'inlin'. Did you mean 'inline'\? Known: dask"):
        engine()


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5"])
def test_a_bad_number_of_workers_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARKEN_WORKERS", given)
    with pytest.raises(ConfigError, match=f"HARKEN_WORKERS={given!r}: expected a whole number of processes, 1 or more"):
        n_workers()


def test_by_default_there_is_a_worker_per_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARKEN_WORKERS")
    assert n_workers() >= 1


@pytest.mark.parametrize(("n_items", "processes"), [(1, 1), (2, 2), (3, 3), (4, 2), (100, 2)])
def test_no_core_idles_through_a_last_long_item(n_items: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARKEN_WORKERS", raising=False)
    monkeypatch.setattr(engines, "n_workers", lambda: 2)
    assert engines.pool_size(n_items) == processes
    monkeypatch.setenv("HARKEN_WORKERS", "2")  # what the user says is a limit
    assert engines.pool_size(n_items) == min(2, n_items)


def test_a_local_cluster_has_the_workers_that_were_asked_for(
    toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setenv("HARKEN_WORKERS", "1")
    assert sorted(results("dask", toys.squarer, tmp_path, 6)) == [n * n for n in range(6)]
    assert len({p.name.split("-")[1] for p in tmp_path.glob("made-*")}) == 1


@pytest.mark.parametrize(("workers", "n_processes"), [("", 2), ("4", 4), ("1", 1)])
@pytest.mark.parametrize("name", ["local", pytest.param("dask", marks=pytest.mark.slow)])
def test_each_device_has_a_worker_that_keeps_it(
    name: str, workers: str, n_processes: int, toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARKEN_WORKERS", workers)
    monkeypatch.delenv("HARKEN_DEVICE", raising=False)
    told = list(ENGINES[name]()(toys.device_teller, str(tmp_path), range(24), devices=["cuda:0", "cuda:1"]))
    of_process: dict[int, set[str]] = {}
    for pid, device in told:
        of_process.setdefault(pid, set()).add(device)
    assert len(of_process) == n_processes
    assert all(len(devices) == 1 for devices in of_process.values())
    used = [next(iter(devices)) for devices in of_process.values()]
    # one worker alone is this process, which finds the first device by itself
    alone = ["" if name == "local" else "cuda:0"]
    assert sorted(used) == (sorted(["cuda:0", "cuda:1"] * (n_processes // 2)) if n_processes > 1 else alone)
    assert "HARKEN_DEVICE" not in os.environ
