"""SIGKILL in the middle of a stage, then the stage again: the same bytes as undisturbed, and nobody left behind."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from corridor import Corridor, contents

# stage -> where its result is, what shows that it is in the middle, the engine under which it is killed
MATRIX = {
    "download": ("media", "spool/*/*", "local"),
    "extract": ("features", "*.parquet", "inline"),
    "pretrain": ("pretrained", "*/state.safetensors", "inline"),
    "train": ("trained", "*/state.safetensors", "inline"),
}


def copy_before(corridor: Corridor, stage: str, out: str, root: Path) -> Corridor:
    """The corridor as it was before a stage, by hard links: no stage may write into what it did not make."""
    shutil.copytree(corridor.root, root, copy_function=os.link)
    copy = Corridor(root, corridor.params)
    shutil.rmtree(copy.path(out))
    shutil.rmtree(copy.path("work") / stage)
    return copy


def until(is_so: Callable[[], bool], limit_s: float) -> bool:
    end = time.monotonic() + limit_s
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("stage", [pytest.param(s, marks=pytest.mark.slow) if s == "train" else s for s in MATRIX])
def test_a_killed_stage_run_again_ends_with_the_same_bytes(stage: str, corridor: Corridor, tmp_path: Path) -> None:
    out, sign, engine = MATRIX[stage]
    before = contents(corridor.root)
    copy = copy_before(corridor, stage, out, tmp_path / "copy")
    work = copy.path("work") / stage
    process = copy.start(stage, HARKEN_ENGINE=engine, HARKEN_WORKERS="2")
    try:
        assert until(lambda: any(not p.name.startswith(".") for p in work.glob(sign)), 90), "the stage never began"
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL, "the stage had ended before it was killed"
    assert until(lambda: not any(map(lives, family)), 10), "workers outlived their stage"
    assert not copy.path(out).exists(), "what is not whole was published"
    assert any(p.is_file() for p in work.rglob("*")), "nothing is left to go on from"
    copy.run(stage)
    assert contents(copy.path(out)) == contents(corridor.path(out))
    assert not [p for p in work.rglob("*") if p.name.endswith(".tmp") or p.name in ("spool", "state.safetensors")]
    assert contents(corridor.root) == before, "a stage wrote into a file that it shares with others"
