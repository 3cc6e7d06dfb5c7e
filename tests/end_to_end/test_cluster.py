"""A stage whose items go to the workers of a running Dask cluster: the same bytes, or a clear no."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from corridor import ROOT, Corridor, contents, copy_before, until

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
