"""A full disk: known as one wherever it is met, said with what to do, and the run goes on when there is room."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harken.config import Paths
from harken.errors import DataError, TransientError
from harken.space import disk_full, is_of_full_disk, size

TESTS = Path(__file__).parent


def of(number: int) -> OSError:
    return OSError(number, os.strerror(number), "a.npy")


def raised_from(cause: Exception, error: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (of(errno.ENOSPC), True),
        (of(errno.EDQUOT), True),
        (raised_from(of(errno.ENOSPC), DataError("a shard is not whole")), True),
        (sqlite3.OperationalError("database or disk is full"), True),
        (OSError("I/O error: No space left on device (os error 28)"), True),
        (of(errno.EACCES), False),
        (sqlite3.OperationalError("database is locked"), False),
        (DataError("a clip said: No space left on device"), False),
        (KeyError("x"), False),
    ],
)
def test_a_full_disk_is_known_by_number_cause_or_words(error: Exception, is_so: bool) -> None:
    assert is_of_full_disk(error) is is_so


def test_what_safetensors_says_is_known(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    error = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert is_of_full_disk(error)


@pytest.mark.parametrize(
    ("n_bytes", "told"),
    [
        (None, ""),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (9_750_000, "9.75 MB"),
        (999_499, "999 KB"),
        (999_600, "1 MB"),
        (636e6, "636 MB"),
        (1.5e12, "1.5 TB"),
        (1234.5e12, "1,234.5 TB"),
    ],
)
def test_bytes_for_people(n_bytes: float | None, told: str) -> None:
    assert size(n_bytes) == told


def test_it_is_said_where_how_much_is_free_and_what_is_kept(tmp_path: Path) -> None:
    work = tmp_path / ".work/world"
    (work / "extract").mkdir(parents=True)
    for name in ("00000.parquet", "00001.parquet", "00001.fbank.npy"):
        (work / "extract" / name).touch()
    error = disk_full(of(errno.ENOSPC), "extract", work, (tmp_path / "data/features",))
    assert isinstance(error, TransientError)
    said = str(error)
    assert said.startswith(
        "stage extract: no space left on a disk (OSError: [Errno 28] No space left on device: 'a.npy')."
    )
    same_disk = f"{work}/extract, {work}, {tmp_path}/data/features"
    assert re.search(rf"{re.escape(same_disk)}.*: [0-9.]+ .?B.* free", said)
    assert "extract (2 shards)" in said
    assert "run the same command again" in said
    assert "a disk quota is used up" in str(disk_full(of(errno.EDQUOT), "extract", work, ()))


def may_mount() -> bool:
    """Whether a process here may have a small disk of its own: root on Linux."""
    if not shutil.which("unshare"):
        return False
    return not subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/tmp"], capture_output=True, check=False
    ).returncode


SMALL_DISK = """
set -e
mount -t tmpfs -o size=5m none .work
"$0" "$1" fills 2> full.txt && exit 9 || echo $? > status
cp .work/toy/stats.failed.json .work/toy/timings.jsonl .
ls .work/toy/stats > kept
mount -o remount,size=40m .work
"$0" "$1" fills 2> more.txt
ls -a .work/toy > left
"""


@pytest.mark.slow
def test_a_stage_that_filled_a_disk_goes_on_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not may_mount():
        pytest.skip("a small disk of its own needs root on Linux")
    monkeypatch.syspath_prepend(str(TESTS))
    paths: Paths = importlib.import_module("stage_toys").write_params(tmp_path, n=8)
    (tmp_path / ".work").mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith("HARKEN_")}
    env |= {"HARKEN_PARAMS": "params.yaml", "HARKEN_WORKERS": "2", "CI": "1"}
    env |= {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])}
    script = ["unshare", "-m", "sh", "-c", SMALL_DISK, sys.executable, str(TESTS / "stage_toys.py")]
    done = subprocess.run(script, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr + (tmp_path / "full.txt").read_text()

    def lines(name: str) -> list[str]:
        return (tmp_path / name).read_text().splitlines()

    assert lines("status") == ["75"]
    told: dict[str, Any] = json.loads((tmp_path / "stats.failed.json").read_text())
    assert (told["status"], told["is_transient"], told["reason"]) == (75, True, "DiskFull")
    (said,) = [line for line in lines("full.txt") if line.startswith("harken: ")]
    assert said == f"harken: {told['message']}"
    kept = lines("kept")
    assert 1 <= len(kept) <= 5
    assert not [name for name in kept if name.endswith(".tmp")]
    assert f"({len(kept)} shards)" in said
    assert json.loads(lines("timings.jsonl")[-1])["outcome"] == "failed"
    assert len([line for line in lines("more.txt") if line.startswith("made ")]) == 8 - len(kept)
    assert "stats.failed.json" not in lines("left")
    assert len(list(paths.stats.iterdir())) == 8
