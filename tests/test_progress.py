"""Progress as other processes see it: while a stage runs, after it, and after it was killed."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from harken import progress
from harken.progress import read, track, watched


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
    monkeypatch.setattr(progress, "WRITE_EVERY_S", 0.01)


def seen(work: Path, done: int) -> dict[str, Any]:
    """What another process reads when so many items are done."""
    end = time.monotonic() + 10
    while (found := read(work, "extract")) is None or found["done"] != done:
        assert time.monotonic() < end, found
        time.sleep(0.002)
    return found


def test_what_is_watched_is_told_while_an_item_is_worked_on_and_goes_with_the_stage(tmp_path: Path) -> None:
    found = []
    with watched(tmp_path, "extract", "a-run") as watch:
        assert read(tmp_path, "extract") is None, "no loop yet"
        for _ in track("abc", 3, "extract: shards"):
            found.append(seen(tmp_path, len(found)))
        last = seen(tmp_path, 3)
    assert set(last) == {*("stage", "what", "done", "total", "began_ms", "now_ms", "left_s", "pid", "host", "run_id")}
    assert (last["stage"], last["what"], last["total"], last["run_id"]) == ("extract", "extract: shards", 3, "a-run")
    assert (last["pid"], last["host"]) == (os.getpid(), socket.gethostname())
    assert found[0]["left_s"] is None
    assert last["left_s"] == 0
    assert last["began_ms"] <= last["now_ms"]
    assert read(tmp_path, "extract") is None
    assert list(tmp_path.iterdir()) == []
    assert [(loop.what, loop.done) for loop in watch.loops] == [("extract: shards", 3)]


def test_without_a_watch_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(track(range(3), 3, "x")) == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_written_at_most_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WRITE_EVERY_S", 3600.0)
    told: list[int] = []
    with watched(tmp_path, "extract", "a-run", lambda loop: told.append(-1 if loop is None else loop.done)):
        assert len(list(track(range(1000), 1000, "x"))) == 1000
    assert told == [0, 1000], "at the beginning and at the end of a loop"


def test_a_stage_without_a_loop_is_told_to_run(tmp_path: Path) -> None:
    told: list[Any] = []
    with watched(tmp_path, "catalog", "a-run", told.append):
        end = time.monotonic() + 10
        while not told and time.monotonic() < end:
            time.sleep(0.002)
    assert told[0] is None
    assert list(tmp_path.iterdir()) == []


def test_a_loop_that_is_left_early_has_counted_what_it_did(tmp_path: Path) -> None:
    with watched(tmp_path, "extract", "a-run") as watch:
        for i in track(range(9), 9, "x"):
            if i == 2:
                break
    assert [loop.done for loop in watch.loops] == [2]


def test_what_a_killed_process_left_is_not_read(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    facts = {"stage": "extract", "done": 1, "total": 2, "pid": pid, "host": socket.gethostname()}
    path = tmp_path / "extract.progress.json"
    path.write_text(json.dumps(facts))
    assert read(tmp_path, "extract") is None
    path.write_text(json.dumps(facts | {"host": "another"}))
    assert read(tmp_path, "extract") == facts | {"host": "another"}, "whether that one lives is not known here"


def test_a_folder_that_takes_no_file_does_not_end_the_stage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with watched(tmp_path / "none", "extract", "a-run"):
        assert list(track(range(3), 3, "x")) == [0, 1, 2]
    assert len([r for r in caplog.records if "progress is not shown" in r.message]) == 1


def test_a_log_says_now_and_then_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CI")
    monkeypatch.setenv("HARKEN_LOG", "json")  # no bar, whatever stderr is
    monkeypatch.setattr(progress, "LOG_EVERY_S", -1.0)
    with caplog.at_level(logging.INFO, "harken"):
        assert list(track(range(2), 2, "x")) == [0, 1]
    told = [re.sub(r"\d+\.?\d* s", "_ s", r.message) for r in caplog.records]
    assert told == ["x: 1 of 2, about _ s left", "x: 2 of 2, about _ s left", "x: 2 in _ s"]
