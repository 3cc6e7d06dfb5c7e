"""A running Dask cluster: what is refused before work begins, what is waited for, and what its end is called."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harken.engines import engine
from harken.errors import ClipError, ConfigError, HarkenError, TransientError
from processes import free_port, until

distributed = pytest.importorskip("distributed")  # the extra `cluster`
on_dask = importlib.import_module("harken.engines.dask")

TESTS = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(TESTS)
    monkeypatch.delenv("HARKEN_DEVICE", raising=False)
    monkeypatch.setattr(on_dask, "TICK_S", 0.2)
    return importlib.import_module("engine_toys")


@contextlib.contextmanager
def cluster(n: int = 2, **kwargs: Any) -> Iterator[Any]:
    """A scheduler and `n` workers, all in this process: as good as any for what they are told."""
    how: dict[str, Any] = {"threads_per_worker": 1, "protocol": "tcp://", "dashboard_address": "127.0.0.1:0", **kwargs}
    with distributed.LocalCluster(n_workers=n, processes=False, silence_logs=50, **how) as found:
        yield found


def at(found: Any, shared: Path | None = None) -> Any:
    return on_dask.on_dask(found if isinstance(found, str) else found.scheduler_address, shared)


def test_the_address_is_what_follows_the_plus(toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster() as found:
        monkeypatch.setenv("HARKEN_ENGINE", f"dask+{found.scheduler_address}")
        assert sorted(engine(tmp_path)(toys.squarer, str(tmp_path), range(6))) == [n * n for n in range(6)]
    assert not list(tmp_path.glob(".seen-*"))


def test_an_address_where_nobody_answers(toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_dask, "CONNECT_S", 0.5)
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(TransientError, match=rf"dask\+{address}: no Dask scheduler answers there .* Start one"):
        list(at(address)(toys.squarer, str(tmp_path), range(3)))


def test_by_default_an_unreachable_scheduler_is_told_in_time() -> None:
    assert on_dask.CONNECT_S <= 15


@pytest.mark.parametrize("address", ["nonsense", "tcp://127.0.0.1"])
def test_what_is_no_address_is_refused(address: str, toys: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no address of a scheduler .* Expected tcp://host:port"):
        list(at(address)(toys.squarer, str(tmp_path), range(3)))


@pytest.mark.slow
def test_what_answers_but_is_no_scheduler(toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_dask, "CONNECT_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    met, _ = server.accept()
                    met.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4)

        threading.Thread(target=answer, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            HarkenError, match=r"no Dask scheduler answers there|does not speak as a Dask scheduler does"
        ):
            list(at(address)(toys.squarer, str(tmp_path), range(3)))


def test_a_cluster_that_stays_without_workers_is_given_up(
    toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HARKEN_WAIT_S", "0.5")
    with cluster(0) as found, pytest.raises(TransientError, match=r"no worker at tcp://.* for 0 s .* start one"):
        list(at(found)(toys.squarer, str(tmp_path), range(3)))
    assert "waiting for one" in caplog.text


@pytest.mark.parametrize("given", ["-1", "soon", "nan", "inf"])
def test_a_bad_wait_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARKEN_WAIT_S", given)
    with pytest.raises(ConfigError, match=f"HARKEN_WAIT_S='{given}': expected a number of seconds"):
        on_dask.wait_s()


def test_workers_that_come_late_are_waited_for_and_used(toys: Any) -> None:
    told: list[tuple[int, int]] = []
    with cluster(0) as found:
        work = at(found)
        thread = threading.Thread(target=lambda: told.extend(work(toys.thread_of, "", range(24))), daemon=True)
        thread.start()
        time.sleep(0.3)
        assert not told
        found.scale(1)
        assert until(lambda: len(found.scheduler.tasks) == 2)  # one that it is at, and one that waits
        found.scale(3)
        assert until(lambda: len(found.scheduler.tasks) > 4)
        thread.join(30)
    assert len(told) == 24
    assert len({worker for _, worker in told}) == 3


def test_workers_with_several_threads_are_refused(toys: Any, tmp_path: Path) -> None:
    told = pytest.raises(ConfigError, match=r"has 3 threads. .* --nthreads 1")
    with cluster(1, threads_per_worker=3) as found, told:
        list(at(found)(toys.squarer, str(tmp_path), range(3)))
    assert not list(tmp_path.iterdir())


def test_no_more_is_out_than_two_items_a_worker(toys: Any, tmp_path: Path) -> None:
    with cluster() as found:
        results = iter(at(found)(toys.squarer, str(tmp_path), range(100)))
        next(results)
        time.sleep(1.0)  # a caller that takes its time
        assert found.scheduler.tasks
        assert len(found.scheduler.tasks) <= 4
        results.close()
        assert until(lambda: not found.scheduler.tasks)


def altered(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    """Let the asking process say this of itself."""
    make = on_dask.terms

    @contextlib.contextmanager
    def other(*args: Any) -> Iterator[Any]:
        with make(*args) as found:
            yield dataclasses.replace(found, **facts)

    monkeypatch.setattr(on_dask, "terms", other)


@pytest.mark.parametrize("asked", ["all", "late"])
@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"harken": "0.0.9, sources abc"}, r"has harken .*, and .* has 0.0.9, sources abc. Install the same on both"),
        ({"facts": {"python": "2.7.1"}}, r"runs Python 3\..*, and .* runs 2.7.1"),
        ({"mark": Path("elsewhere/.seen-x")}, r"does not see elsewhere/.seen-x, .* it works in /.* mount them"),
    ],
)
def test_workers_that_could_not_do_the_same_work_are_refused(
    asked: str, facts: dict[str, Any], told: str, toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    altered(monkeypatch, **facts)
    if asked == "late":  # a worker that was not there when all were asked
        monkeypatch.setattr(on_dask, "_guest", lambda *_: contextlib.nullcontext())
    with cluster(1) as found, pytest.raises(ConfigError, match=told):
        list(at(found, tmp_path)(toys.squarer, str(tmp_path), range(3)))
    assert not list(tmp_path.glob("*made*"))


def test_other_versions_of_what_decides_the_last_bits_are_told(
    toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terms = importlib.import_module("harken.engines.terms")
    altered(monkeypatch, facts=terms.facts() | {"numpy": "1.0"})
    with cluster(1) as found:
        assert sorted(at(found)(toys.squarer, str(tmp_path), range(2))) == [0, 1]
    assert "not 1.0; results may differ in their last bits" in caplog.text


def test_the_same_sources_are_the_same_harken() -> None:
    terms = importlib.import_module("harken.engines.terms")
    assert terms.sources() == terms.sources()
    assert terms.sources().startswith("0.")


def test_marks_of_processes_that_were_killed_do_not_stay_for_ever(tmp_path: Path) -> None:
    terms = importlib.import_module("harken.engines.terms")
    old, new = tmp_path / ".seen-old", tmp_path / ".seen-new"
    for path in (old, new):
        path.touch()
    long_ago = time.time() - 2 * terms.OLD_S
    os.utime(old, (long_ago, long_ago))
    with terms.terms(tmp_path, "mine"):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".seen-mine", ".seen-new"]


@pytest.mark.parametrize("devices", [(), ["cuda:0"]])
def test_fan_outs_for_devices_go_to_workers_that_declare_one(devices: list[str], toys: Any, tmp_path: Path) -> None:
    with cluster(1) as found, cluster_worker(found, {"GPU": 1}) as with_gpu:
        told = list(at(found)(toys.thread_of, "", range(8), devices=devices))
        assert {worker for _, worker in told} == thread_ids(with_gpu)
        assert len(set(at(found)(toys.thread_of, "", range(8)))) > 1  # others go to all


@contextlib.contextmanager
def cluster_worker(found: Any, resources: dict[str, float]) -> Iterator[Any]:
    """One more worker, with resources."""
    spec = {"cls": distributed.Worker, "options": {"nthreads": 1, "resources": resources, "dashboard": False}}
    found.worker_spec["gpu"] = spec
    found.sync(found._correct_state)
    assert until(lambda: len(found.scheduler.workers) == 2)
    yield found.workers["gpu"]


def thread_ids(worker: Any) -> set[int]:
    return {t.ident for t in worker.executors["default"]._threads}


def test_a_gpu_that_was_asked_for_and_is_nowhere(toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARKEN_DEVICE", "cuda")
    with cluster(1) as found:
        with pytest.raises(ConfigError, match=r"HARKEN_DEVICE=cuda, but none of the 1 workers .* --resources GPU=1"):
            list(at(found)(toys.squarer, str(tmp_path), range(2), devices=[]))
        assert sorted(at(found)(toys.squarer, str(tmp_path), range(2))) == [0, 1]  # a stage that needs none
        monkeypatch.setenv("HARKEN_DEVICE", "cpu")
        assert sorted(at(found)(toys.squarer, str(tmp_path), range(2), devices=[])) == [0, 1]


def test_an_items_error_comes_back_as_it_was_raised_and_ends_what_was_out(toys: Any, tmp_path: Path) -> None:
    with cluster() as found:
        with pytest.raises(ClipError) as e:
            list(at(found)(toys.refuser, str(tmp_path), range(50)))
        assert e.value.reason == "qc.silent"
        assert until(lambda: not found.scheduler.tasks)


def test_the_end_of_the_cluster_is_no_items_fault_and_no_result(toys: Any, tmp_path: Path) -> None:
    got: list[Any] = []
    with cluster() as found:
        results = at(found)(toys.slow_squarer, str(tmp_path), range(40))
        got += [next(results) for _ in range(3)]
        found.close()
        with pytest.raises(TransientError, match=r"cluster at tcp://.* is gone .* checkpoints are kept: .* again"):
            got.extend(results)
    assert all(isinstance(n, int) for n in got), "the cluster's farewell was taken for a result"


def test_heavy_objects_go_with_the_fan_out_that_needed_them(toys: Any, tmp_path: Path) -> None:
    kept = importlib.import_module("harken.engines").made
    kept.clear()
    with cluster(1) as found:
        both = [iter(at(found)(toys.slow_squarer, str(tmp_path), range(6))) for _ in range(2)]
        for results in both:
            next(results)
        assert len(kept) == 2  # two stages side by side: neither makes the other's object anew
        rest = [list(results) for results in both]
        assert len(list(tmp_path.glob("made-*"))) == 2
        assert [len(r) for r in rest] == [5, 5]
        assert not kept
        kept["of one that was killed"] = lambda n: n
        assert sorted(at(found)(toys.squarer, str(tmp_path), range(2))) == [0, 1]
        assert not kept


def test_an_address_of_ray_where_nobody_answers(toys: Any, tmp_path: Path) -> None:
    on_ray = pytest.importorskip("harken.engines.ray", exc_type=ImportError)
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(TransientError, match=rf"ray\+{address}: no Ray cluster answers there .* Start one"):
        list(on_ray.on_ray(address, tmp_path)(toys.squarer, str(tmp_path), range(3)))
    assert not list(tmp_path.iterdir())
