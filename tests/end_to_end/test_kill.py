"""SIGKILL in the middle of a stage, then the stage again: the same bytes as undisturbed, and nobody left behind."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from corridor import Corridor, contents, copy_before, until

from harken.config import FOLDERS
from processes import lives

# stage -> what shows that it is in the middle, the engine under which it is killed
MATRIX = {
    "download": ("spool/*/*", "local"),
    "extract": ("*.parquet", "inline"),
    "pretrain": ("*/state.safetensors", "inline"),
    "finetune": ("*/state.safetensors", "inline"),
    "train": ("*/state.safetensors", "inline"),
}
SLOW = ("download", "extract", "finetune", "train")
N_KILLS = 20
# of unfinished work alone
SCRATCH = ("spool", "state.safetensors", "settings.json", "diverged.json")


@pytest.mark.parametrize("stage", [pytest.param(s, marks=pytest.mark.slow) if s in SLOW else s for s in MATRIX])
def test_a_killed_stage_run_again_ends_with_the_same_bytes(stage: str, corridor: Corridor, tmp_path: Path) -> None:
    sign, engine = MATRIX[stage]
    before = contents(corridor.root)
    copy = copy_before(corridor, stage, tmp_path / "copy")
    out, work = copy.path(FOLDERS[stage]), copy.path("work") / stage
    process = copy.start(stage, HARKEN_ENGINE=engine, HARKEN_WORKERS="2")
    try:
        assert until(lambda: any(not p.name.startswith(".") for p in work.glob(sign)), 90), "the stage never began"
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL, "the stage had ended before it was killed"
    assert gone(family), "workers outlived their stage"
    assert not out.exists(), "what is not whole was published"
    assert any(p.is_file() for p in work.rglob("*")), "nothing is left to go on from"
    copy.run(stage)
    assert contents(out) == contents(corridor.path(FOLDERS[stage]))
    assert leftovers(work) == []
    assert contents(corridor.root) == before, "a stage wrote into a file that it shares with others"


def leftovers(work: Path) -> list[str]:
    """What a stage's scratch folder must not hold when the stage has ended."""
    return [p.name for p in work.rglob("*") if p.name.endswith(".tmp") or p.name in SCRATCH]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_twenty_kills_at_any_moment_change_no_byte(stage: str, corridor: Corridor, tmp_path: Path) -> None:
    """Each start may have another engine than the one before; a run that was quicker than its kill begins anew."""
    whole, copy = (copy_before(corridor, stage, tmp_path / name) for name in ("whole", "copy"))
    for c in (whole, copy):
        c.params[stage] |= {"epochs": 20, "checkpoint_every": 3}
        c.write()
    process = begun(whole, stage, "inline", "state.safetensors")
    began = time.monotonic()
    assert whole.ended(process)[0] == 0
    lasts_s, expected = time.monotonic() - began, contents(whole.path(FOLDERS[stage]))
    draw, n_killed, n_resumed = random.Random(stage), 0, 0
    while n_killed < N_KILLS:
        # three times in four it has trained a little: before that there is little to spoil
        sign = draw.choice(["settings.json", *["state.safetensors"] * 3])
        process = begun(copy, stage, draw.choice(["inline", "local"]), sign)
        time.sleep(draw.uniform(0, lasts_s))
        family: list[psutil.Process] = []
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGKILL)
        status, said = copy.ended(process)
        assert status in (0, -signal.SIGKILL), said
        assert gone(family), "workers outlived their stage"
        n_killed += status != 0
        n_resumed += "resuming at step" in said
        if status == 0:
            is_whole(copy, stage, expected)
            shutil.rmtree(copy.path(FOLDERS[stage]))
            shutil.rmtree(copy.path("work") / stage)
    copy.run(stage)
    is_whole(copy, stage, expected)
    assert n_resumed >= N_KILLS // 3, "the kills met too little to go on from"


def begun(copy: Corridor, stage: str, engine: str, sign: str) -> subprocess.Popen[str]:
    """A stage that has just written a file of this name: what is left to do, or a checkpoint. Or that has ended."""
    work = copy.path("work") / stage
    before = {p: p.stat().st_mtime_ns for p in work.glob(f"*/{sign}")}
    process = copy.start(stage, HARKEN_ENGINE=engine, HARKEN_WORKERS="2")

    def is_so() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return any(p.stat().st_mtime_ns != before.get(p) for p in work.glob(f"*/{sign}"))
        return False

    assert until(lambda: process.poll() is not None or is_so(), 120), "the stage never began"
    return process


def gone(family: list[psutil.Process]) -> bool:
    return until(lambda: not any(map(lives, family)), 10)


def is_whole(copy: Corridor, stage: str, expected: Mapping[str, bytes]) -> None:
    """Published are the expected bytes, and scratch holds the same files and no other."""
    found = contents(copy.path(FOLDERS[stage]))
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    work = copy.path("work") / stage
    assert leftovers(work) == []
    published = {(run.name, f) for run in work.iterdir() for f in contents(run)}
    assert {(run.rpartition(".")[0], f) for run, f in published} == {tuple(n.split("/", 1)) for n in expected}
