"""The flow over DVC's graph: order, what a stage's run reports, and that nothing outlives a cancelled one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("prefect", reason="the flow needs the extra `cluster`")
ROOT = Path(__file__).parents[2]

TOY = """\
stages:
  first:
    cmd: python -c "open('a', 'w').write(open('seed').read())"
    deps: [seed]
    outs: [a]
  left:
    cmd: python -c "open('l', 'w').write('l')"
    deps: [a]
    outs: [l]
  right:
    cmd: python -c "open('r', 'w').write('r')"
    deps: [a]
    outs: [r]
  last:
    cmd: python -c "open('z', 'w').write('z')"
    deps: [l, r]
    outs: [z]
  fails:
    cmd: python -c "print('there is no such thing'); raise SystemExit(3)"
    deps: [a]
    outs: [f]
  after:
    cmd: python -c "open('g', 'w').write('g')"
    deps: [f]
    outs: [g]
  sleeps:
    cmd: python sleeps.py
    outs: [s]
"""
SLEEPS = """\
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
with open("pids", "w") as f:
    f.write(f"{os.getpid()} {child.pid}")
print("asleep", flush=True)
time.sleep(120)
"""


@pytest.fixture(scope="module")
def flows() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pipelines_repro", ROOT / "pipelines" / "repro.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "dvc.yaml").write_text(TOY)
    (tmp_path / "seed").write_text("20")
    (tmp_path / "sleeps.py").write_text(SLEEPS)
    return tmp_path


def test_the_graph_is_dvcs_own(flows: ModuleType) -> None:
    from harken.stages import STAGES

    found = flows.graph(ROOT)
    assert set(found) == set(STAGES)
    assert found["lists"] == set()
    assert "catalog" in found["download"]
    assert "evaluate" in found["report"]


def test_the_order_respects_the_graph(flows: ModuleType) -> None:
    stages = {"a": set(), "b": {"a"}, "c": {"a"}, "d": {"b", "c"}, "e": set()}
    found = flows.order(stages)
    assert sorted(found) == sorted(stages)
    assert all(found.index(upstream) < found.index(s) for s in stages for upstream in stages[s])
    assert flows.order(stages, ["b"]) == ["a", "b"]


def test_an_unknown_target_names_the_nearest(flows: ModuleType) -> None:
    from harken.errors import ConfigError

    with pytest.raises(ConfigError, match="Did you mean 'catalog'"):
        flows.order({"catalog": set(), "lists": set()}, ["catalogue"])


def test_tasks_are_named_by_their_stage_and_remember_nothing(flows: ModuleType) -> None:
    from prefect.cache_policies import NO_CACHE

    found = flows.tasks(["lists", "catalog"])
    assert {name: t.name for name, t in found.items()} == {"lists": "lists", "catalog": "catalog"}
    for t in found.values():
        assert t.cache_policy == NO_CACHE
        assert t.persist_result is False
        assert t.retries == 0
    assert flows.tasks(["lists"], retries=2)["lists"].retries == 2


def test_a_stage_runs_once_and_tells_what_dvc_did(flows: ModuleType, toy: Path) -> None:
    said: list[str] = []
    assert flows.run_stage("first", said.append, toy)["did"] == "ran"
    assert (toy / "a").read_text() == "20"
    assert any("Running stage 'first'" in line for line in said)
    again = flows.run_stage("first", said.append, toy)
    assert again["did"] == "unchanged"
    assert again["stage"] == "first"


def test_a_failing_stage_ends_with_its_own_last_lines(flows: ModuleType, toy: Path) -> None:
    from harken.errors import HarkenError

    (toy / "a").write_text("20")
    with pytest.raises(HarkenError, match="there is no such thing"):
        flows.run_stage("fails", lambda line: None, toy)


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_cancelling_leaves_nothing_running(flows: ModuleType, toy: Path) -> None:
    errors: list[BaseException] = []
    asleep = threading.Event()

    def run() -> None:
        try:
            flows.run_stage("sleeps", lambda line: asleep.set() if line == "asleep" else None, toy)
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    assert asleep.wait(30)
    pids = [int(p) for p in (toy / "pids").read_text().split()]
    flows.stop_all()
    thread.join(30)
    assert not thread.is_alive()
    assert len(errors) == 1
    deadline = time.monotonic() + 10
    while any(_is_running(p) for p in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [p for p in pids if _is_running(p)] == []


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.is_file() and status.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.slow
def test_the_flow_walks_the_graph_and_reports_every_stage(flows: ModuleType, toy: Path) -> None:
    from prefect.testing.utilities import prefect_test_harness

    from harken.errors import HarkenError

    with prefect_test_harness(server_startup_timeout=120):
        rows = flows.repro(["last"], root=str(toy))
        assert [r["stage"] for r in rows] == flows.order(flows.graph(toy), ["last"])
        assert {r["did"] for r in rows} == {"ran"}
        assert {r["did"] for r in flows.repro(["last"], root=str(toy))} == {"unchanged"}
        with pytest.raises(HarkenError, match="fails failed"):
            flows.repro(["after"], root=str(toy))
        assert not (toy / "g").exists()
