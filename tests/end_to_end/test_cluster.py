"""A stage on the workers of a cluster: the same bytes, or a clear no, and nobody left of a killed dvc."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from corridor import ROOT, Corridor, contents, copy_before, until

from processes import lives

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """The address of a scheduler with two workers that were started in `folder`, by the commands of the guide."""
    pytest.importorskip("distributed")
    at = folder / "scheduler.json"
    told = ["--scheduler-file", str(at), "--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
    kinds = [["scheduler", "--port", "0"], ["worker", "--nthreads", "1", "--nworkers", "2"]]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HARKEN_DEVICE": "cpu"}
    parts = []
    try:
        for kind in kinds:
            command = [sys.executable, "-m", "dask", *kind, *told]
            parts.append(subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.DEVNULL))
            assert until(lambda: at.exists() and at.stat().st_size > 0, 60)
        yield "dask+" + json.loads(at.read_text())["address"]
    finally:
        for part in reversed(parts):
            part.terminate()
            part.wait(30)


def test_the_same_bytes_by_a_clusters_workers(corridor: Corridor, tmp_path: Path) -> None:
    copy = copy_before(corridor, "extract", tmp_path / "copy")
    with cluster(copy.root) as address:
        copy.run("extract", HARKEN_ENGINE=address)
    assert contents(copy.path("features")) == contents(corridor.path("features"))
    assert not list(copy.path("work").glob(".seen-*"))


def test_workers_that_do_not_see_the_folders_are_refused(corridor: Corridor, tmp_path: Path) -> None:
    copy = copy_before(corridor, "extract", tmp_path / "copy")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with cluster(elsewhere) as address:
        status, said = copy.ended(copy.start("extract", HARKEN_ENGINE=address))
    assert status == 1
    assert f"it works in {elsewhere}. The folders that `paths` names must be the same on all machines" in said
    assert json.loads((copy.path("work") / "extract.failed.json").read_text())["is_transient"] is False
    assert not copy.path("features").exists()


def test_a_scheduler_that_is_not_there_is_worth_another_try(corridor: Corridor, tmp_path: Path) -> None:
    copy = copy_before(corridor, "extract", tmp_path / "copy")
    status, said = copy.ended(copy.start("extract", HARKEN_ENGINE="dask+tcp://127.0.0.1:9"))
    assert status == 75
    assert "no Dask scheduler answers there" in said
    assert json.loads((copy.path("work") / "extract.failed.json").read_text())["is_transient"] is True


GRAPH = """
stages:
  extract:
    cmd: python -m harken.stages extract
    params: [extract]
    outs: [{features}]
"""


@pytest.mark.parametrize("kind", ["local", "dask", "dask+tcp", "ray"])
def test_a_killed_dvc_leaves_nobody_and_what_was_done_is_kept(kind: str, corridor: Corridor, tmp_path: Path) -> None:
    if kind == "ray":
        pytest.importorskip("ray")
    copy = copy_before(corridor, "extract", tmp_path / "copy")
    (copy.root / "dvc.yaml").write_text(GRAPH.format(**copy.params["paths"]))
    work, out = copy.path("work") / "extract", copy.path("features")
    env = {k: v for k, v in os.environ.items() if not k.startswith("HARKEN_")}
    env |= {"HARKEN_WORKERS": "2", "HARKEN_DEVICE": "cpu", "CI": "1", "PYTHONPATH": str(ROOT / "src")}
    env |= {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(tmp_path / "site")}
    env |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"}
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "-q"], cwd=copy.root, env=env, check=True)
    with cluster(copy.root) if kind == "dask+tcp" else contextlib.nullcontext(kind) as named:
        command, how = [*dvc, "repro", "-s", "extract"], {"cwd": copy.root, "env": {**env, "HARKEN_ENGINE": named}}
        how |= {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **how, start_new_session=True)
        try:
            assert until(lambda: any(work.glob("[0-9]*.parquet")) or process.poll() is not None, 150), "it never began"
            done = {p: p.stat().st_mtime_ns for p in work.glob("[0-9]*.parquet")}
            family = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.send_signal(signal.SIGKILL)
            said, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, said
        assert family, "no stage was running"
        assert until(lambda: not any(map(lives, family)), 20), [p for p in family if lives(p)]
        assert not out.exists()
        again = subprocess.run(command, **how, timeout=200)
        assert again.returncode == 0, again.stdout
    assert contents(out) == contents(corridor.path("features"))
    assert done == {p: p.stat().st_mtime_ns for p in done}, "a shard that was finished was made again"
