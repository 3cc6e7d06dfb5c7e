"""SIGKILL of a worker, of the scheduler and of the process that asks, on every engine: what is done is not done again.

Each item leaves a file where it begins and one where it is done. What is in flight when something is killed may be
begun a second time, and nothing else may; nobody is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from processes import lives, until

TESTS = Path(__file__).parent
N_ITEMS, N_WORKERS = 14, 2
MARK = "HARKEN_TEST_FAMILY"
DRIVER = """
import logging, os, sys
from pathlib import Path
import engine_toys
from harken.engines import engine
from harken.errors import HarkenError, TransientError

def main(folder):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    left = [n for n in range(int(sys.argv[2])) if not (folder / f"done-{n}").exists()]
    try:
        for n in engine(folder)(engine_toys.scribe, str(folder), left):
            (folder / f"told-{n}").touch()
    except HarkenError as e:
        print(e)
        return 75 if isinstance(e, TransientError) else 1
    return 0

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
"""
_libc = ctypes.CDLL("libc.so.6")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Cluster:
    """A running cluster, if the engine is one of those; started by the commands that its users type."""

    def __init__(self, engine: str, folder: Path, env: dict[str, str]) -> None:
        self.engine, self.folder, self.env = engine, folder, env
        self.parts: list[subprocess.Popen[bytes]] = []
        self.address = engine

    def start(self) -> None:
        if self.engine == "dask+tcp":
            at = self.folder / f"scheduler-{uuid.uuid4().hex}.json"
            told = ["--scheduler-file", str(at)]
            local = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
            self._part("dask", "scheduler", "--port", "0", *local, *told)
            assert until(lambda: at.exists() and at.stat().st_size > 0, 60)
            self._part("dask", "worker", "--nthreads", "1", "--nworkers", str(N_WORKERS), *local, *told)
            self.address = "dask+" + json.loads(at.read_text())["address"]

    def _part(self, *command: str) -> None:
        log = open(self.folder / "cluster.log", "ab")  # noqa: SIM115 - the child's
        self.parts.append(
            subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=self.folder,
                env=self.env,
                stdout=log,
                stderr=log,
                preexec_fn=bound,
            )
        )

    def stop(self) -> None:
        for part in self.parts:
            family = [psutil.Process(part.pid), *children(part.pid)] if part.poll() is None else []
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            part.wait()
        self.parts = []


def bound() -> None:
    _libc.prctl(1, signal.SIGKILL)  # nothing outlives the tests


def children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def family(mark: str) -> list[psutil.Process]:
    """Every living process that inherited the mark, wherever its parent is."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and lives(process):
                found.append(process)
    return found


class Scene:
    """A folder of marks, an engine, and the processes that go through the items."""

    def __init__(self, engine: str, root: Path) -> None:
        self.marks = root / "marks"
        self.marks.mkdir()
        (root / "driver.py").write_text(DRIVER)
        self.root, self.mark = root, uuid.uuid4().hex
        path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
        self.env = {**os.environ, "PYTHONPATH": path, "HARKEN_WORKERS": str(N_WORKERS), "OMP_NUM_THREADS": "1"}
        self.env |= {"HARKEN_WAIT_S": "20"}
        self.cluster = Cluster(engine, root, dict(self.env))

    def begin(self) -> subprocess.Popen[bytes]:
        env = self.env | {"HARKEN_ENGINE": self.cluster.address, MARK: self.mark}
        log = open(self.root / "driver.log", "ab")  # noqa: SIM115 - the child's
        command = [sys.executable, str(self.root / "driver.py"), str(self.marks), str(N_ITEMS)]
        return subprocess.Popen(command, cwd=self.root, env=env, stdout=log, stderr=log, preexec_fn=bound)

    def said(self) -> str:
        return (self.root / "driver.log").read_text()

    def begun(self) -> Counter[int]:
        return Counter(int(p.name.split("-")[1]) for p in self.marks.glob("begun-*"))

    def done(self) -> set[int]:
        return {int(p.name.split("-")[1]) for p in self.marks.glob("done-*")}

    def middle(self) -> tuple[set[int], int]:
        """Wait for the middle: some are done, and an item has just begun. What is in flight then, and its worker."""
        assert until(lambda: len(list(self.marks.glob("told-*"))) >= 3, 90), self.said()
        before = set(self.marks.glob("begun-*"))
        assert until(lambda: bool(set(self.marks.glob("begun-*")) - before), 30)
        newest = next(iter(set(self.marks.glob("begun-*")) - before))
        time.sleep(0.1)  # the worker's last result has been told by now; an item takes longer
        return set(self.begun()) - self.done(), int(newest.name.split("-")[2])

    def kill(self, driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Kill the process that asks. All that it had started, some of which rename themselves and lose the mark."""
        found = children(driver.pid)
        driver.kill()
        driver.wait()
        return found

    def is_gone(self, tree: list[psutil.Process]) -> bool:
        return until(lambda: not family(self.mark) and not any(map(lives, tree)), 15)

    def check(self, in_flight: set[int]) -> None:
        assert self.done() == set(range(N_ITEMS)), self.said()
        again = {n for n, times in self.begun().items() if times > 1}
        assert again <= in_flight, f"done again: {again}; in flight were {in_flight}\n{self.said()}"
        assert max(self.begun().values()) <= 2


@pytest.fixture
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    engine = request.param
    pytest.importorskip({"local": "psutil"}.get(engine, "ray" if engine.startswith("ray") else "distributed"))
    made = Scene(engine, tmp_path)
    made.cluster.start()
    try:
        yield made
    finally:
        made.cluster.stop()
        for process in family(made.mark):
            process.kill()


EVERY = pytest.mark.parametrize("scene", ["local", "dask", "dask+tcp", "ray"], indirect=True)
RUNNING = pytest.mark.parametrize("scene", ["dask+tcp"], indirect=True)
OWN = pytest.mark.parametrize("scene", ["local", "dask", "ray"], indirect=True)


@EVERY
def test_a_worker(scene: Scene) -> None:
    driver = scene.begin()
    in_flight, worker = scene.middle()
    os.kill(worker, signal.SIGKILL)
    assert driver.wait(120) == 0, scene.said()
    scene.check(in_flight)
    assert until(lambda: not family(scene.mark), 15), family(scene.mark)


@EVERY
def test_the_process_that_asks(scene: Scene) -> None:
    driver = scene.begin()
    in_flight, _ = scene.middle()
    tree = scene.kill(driver)
    assert scene.is_gone(tree), (family(scene.mark), tree)
    time.sleep(1.0)
    # a cluster of others' finishes what its workers are at, and begins nothing that nobody waits for
    assert sum(scene.begun().values()) <= len(scene.done()) + len(in_flight)
    assert scene.begin().wait(120) == 0, scene.said()
    scene.check(in_flight)
    assert until(lambda: not family(scene.mark), 15), family(scene.mark)


@RUNNING
def test_the_scheduler(scene: Scene) -> None:
    driver = scene.begin()
    in_flight, _ = scene.middle()
    scene.cluster.parts[0].kill()
    killed = time.monotonic()
    assert driver.wait(60) == 75, scene.said()
    assert time.monotonic() - killed < 30
    assert "is gone" in scene.said()
    assert "checkpoints are kept" in scene.said()
    scene.cluster.stop()
    scene.cluster.start()
    assert scene.begin().wait(120) == 0, scene.said()
    scene.check(in_flight)


@RUNNING
def test_all_workers(scene: Scene) -> None:
    """They are waited for; who starts them again need not start the stage again."""
    driver = scene.begin()
    in_flight, _ = scene.middle()
    workers = scene.cluster.parts.pop()
    for process in [*children(workers.pid), psutil.Process(workers.pid)]:
        process.kill()
    workers.wait()
    time.sleep(1.0)
    assert driver.poll() is None
    kept = scene.cluster.parts
    scene.cluster.parts = []
    at = next(scene.root.glob("scheduler-*.json"))
    told = ["--scheduler-file", str(at), "--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
    scene.cluster._part("dask", "worker", "--nthreads", "1", "--nworkers", "1", *told)
    scene.cluster.parts += kept
    assert driver.wait(120) == 0, scene.said()
    scene.check(in_flight)


@OWN
def test_the_process_that_asks_at_any_moment_of_its_start(scene: Scene) -> None:
    began = time.monotonic()
    driver = scene.begin()
    assert until(lambda: any(scene.marks.glob("begun-*")), 90), scene.said()
    takes_s = time.monotonic() - began
    assert scene.is_gone(scene.kill(driver))
    draw = random.Random(0)
    for _ in range(10):
        driver = scene.begin()
        time.sleep(draw.uniform(0.1, 1.2) * takes_s)
        tree = scene.kill(driver)
        assert scene.is_gone(tree), (family(scene.mark), tree)
