"""What a run of a stage leaves beside its result: what it took, how it ended, how it failed."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import pty
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from harken import timings
from harken.cli import app
from harken.config import Paths
from harken.errors import ConfigError
from harken.stages import __main__ as entry

TESTS = Path(__file__).parent


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TESTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(entry, "die_with_parent", lambda: None)
    settings = {"HARKEN_PARAMS": "params.yaml", "HARKEN_ENGINE": "inline", "HARKEN_THREADS": "1", "CI": "1"}
    for name, value in {**settings, "HARKEN_RUN_ID": "the-flow", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    for name in ("HARKEN_LOG", "HARKEN_METRICS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return importlib.import_module("stage_toys")


@pytest.fixture
def paths(toys: Any, tmp_path: Path) -> Paths:
    found: Paths = toys.write_params(tmp_path)
    return found


def failed(paths: Paths) -> dict[str, Any] | None:
    path = paths.work / "stats.failed.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_a_run_is_recorded_with_what_it_took(toys: Any, paths: Paths) -> None:
    assert toys.run("counts") == 0
    (run,) = timings.read(paths.work)
    assert (run["stage"], run["run_id"], run["outcome"], run["reason"]) == ("stats", "the-flow", "done", "")
    assert (run["engine"], run["n_workers"]) == ("inline", 1)
    assert (run["what"], run["n_items"]) == ("stats: shards", 3)
    assert run["items_s"] > 0
    assert run["bytes_out"] == (paths.stats / "stats.json").stat().st_size
    assert run["wall_s"] >= 0 < run["peak_rss_bytes"]
    if sys.platform == "linux":
        assert run["bytes_written"] >= run["bytes_out"]
    assert run["began_ms"] <= run["ended_ms"]
    lines = [json.loads(line) for line in (paths.work / "timings.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["begin", "end"]


@pytest.mark.parametrize(
    ("toy", "status", "is_transient", "reason"),
    [
        ("refuses", 1, False, "DataError"),
        ("gives_up", 75, True, "TransientError"),
        ("fills_the_disk", 75, True, "DiskFull"),
    ],
)
def test_a_failure_is_told_until_the_stage_begins_again(
    toy: str, status: int, is_transient: bool, reason: str, toys: Any, paths: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert toys.run(toy) == status
    told = failed(paths)
    assert told is not None
    assert set(told) == {"stage", "run_id", "status", "is_transient", "reason", "message", "ended_ms"}
    assert (told["stage"], told["run_id"], told["reason"]) == ("stats", "the-flow", reason)
    assert (told["status"], told["is_transient"]) == (status, is_transient)
    assert capsys.readouterr().err == f"harken: {told['message']}\n"
    (run,) = timings.read(paths.work)
    assert (run["outcome"], run["reason"], run["bytes_out"]) == ("failed", reason, None)
    assert toys.run("counts") == 0
    assert failed(paths) is None
    assert [r["outcome"] for r in timings.read(paths.work)] == ["failed", "done"]


def test_a_section_that_is_wrong_is_a_failure_too(toys: Any, paths: Paths) -> None:
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("n: 3", "m: 3"))
    assert toys.run("counts") == 1
    told = failed(paths)
    assert told is not None
    assert told["reason"] == "ConfigError"


def test_a_mistake_is_recorded_and_keeps_its_trace(toys: Any, paths: Paths) -> None:
    with pytest.raises(KeyError):
        toys.run("mistaken")
    told = failed(paths)
    assert told is not None
    assert (told["reason"], told["status"]) == ("KeyError", 1)
    (run,) = timings.read(paths.work)
    assert (run["outcome"], run["n_items"]) == ("failed", 2)


def test_ctrl_c_is_no_failure(toys: Any, paths: Paths) -> None:
    with pytest.raises(KeyboardInterrupt):
        toys.run("is_interrupted")
    assert failed(paths) is None
    assert [r["outcome"] for r in timings.read(paths.work)] == ["stopped"]


def start(toy: str, root: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent / "src")}
    command = [sys.executable, str(TESTS / "stage_toys.py"), toy]
    return subprocess.Popen(command, cwd=root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_a_killed_run_has_a_beginning_and_no_end(toys: Any, paths: Paths, tmp_path: Path) -> None:
    process = start("is_killed", tmp_path)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -9, said
    assert [r["outcome"] for r in timings.read(paths.work)] == ["killed"]
    assert toys.run("counts") == 0
    assert [r["outcome"] for r in timings.read(paths.work)] == ["killed", "done"]
    assert "1 KB" not in (told := say("status", "--timings")), told


def say(*args: str) -> str:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_line_cut_short_is_passed_over_and_the_next_is_on_its_own(toys: Any, paths: Paths) -> None:
    assert toys.run("counts") == 0
    with open(paths.work / "timings.jsonl", "a") as f:
        f.write('{"event": "begin", "stage": "sta')
    assert toys.run("counts") == 0
    assert [r["outcome"] for r in timings.read(paths.work)] == ["done", "done"]


def test_a_record_that_cannot_be_written_does_not_end_the_stage(
    toys: Any, paths: Paths, caplog: pytest.LogCaptureFixture
) -> None:
    (paths.work / "timings.jsonl").mkdir(parents=True)
    assert toys.run("counts") == 0
    assert "this run's times are not recorded" in caplog.text


def test_nothing_of_it_is_in_the_result(toys: Any, paths: Paths) -> None:
    assert toys.run("counts") == 0
    first = (paths.stats / "stats.json").read_bytes()
    assert toys.run("counts") == 0
    assert (paths.stats / "stats.json").read_bytes() == first
    assert [p.name for p in paths.stats.iterdir()] == ["stats.json"]


def line(**facts: Any) -> dict[str, Any]:
    return {"stage": "extract", "outcome": "done", "wall_s": 1.0, "items_s": None, **facts}


def test_the_median_is_of_the_last_runs_that_were_done() -> None:
    runs = [line(wall_s=w, items_s=w) for w in (99.0, 1.0, 2.0, 3.0, 4.0, 50.0)]
    runs.append(line(outcome="failed", wall_s=7.0))
    (row,) = timings.summary(runs)
    assert row == {"stage": "extract", "last": runs[-1], "n_done": 5, "median_wall_s": 3.0, "median_items_s": 3.0}
    (none,) = timings.summary([line(outcome="killed")])
    assert (none["n_done"], none["median_wall_s"], none["median_items_s"]) == (0, None, None)


def test_status_tells_what_runs_took(toys: Any, paths: Paths) -> None:
    assert json.loads(say("status", "--timings", "--json")) == []
    assert toys.run("refuses") == 1
    assert toys.run("counts") == 0
    (row,) = json.loads(say("status", "--timings", "--json"))
    assert (row["stage"], row["n_done"], row["last"]["outcome"]) == ("stats", 1, "done")
    assert row["median_wall_s"] == row["last"]["wall_s"]
    assert "stats" in say("status", "--timings")


def test_two_views_at_once_are_refused(paths: Paths) -> None:
    with pytest.raises(ConfigError, match="two views"):
        CliRunner().invoke(app, ["status", "--timings", "--watch"], catch_exceptions=False)


def test_a_watch_without_a_terminal_is_refused(paths: Paths) -> None:
    with pytest.raises(ConfigError, match="--watch --json"):
        CliRunner().invoke(app, ["status", "--watch"], catch_exceptions=False)


def test_a_stage_is_watched_from_another_process(paths: Paths, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent / "src")}
    process = start("waits", tmp_path)
    command = [sys.executable, "-m", "harken.cli", "status", "--watch", "--json"]
    watcher = subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE)
    assert watcher.stdout is not None
    try:
        seen = []
        for told in watcher.stdout:
            (row,) = [s for s in json.loads(told)["stages"] if s["stage"] == "stats"]
            seen.append(row)
            if row["progress"] is not None and row["progress"]["done"] == 0:
                continue
            if row["state"] == "running" and row["progress"] is not None:
                (paths.work / "go").touch()
            if len(seen) > 1 and row["state"] != "running" and any(r["state"] == "running" for r in seen):
                break
            assert len(seen) < 60, seen
    finally:
        watcher.send_signal(2)
        watcher.communicate(timeout=20)
        said, _ = process.communicate(timeout=20)
    assert watcher.returncode == 0
    assert process.returncode == 0, said
    running = [r for r in seen if r["progress"] is not None]
    assert {(r["progress"]["done"], r["progress"]["total"]) for r in running} <= {(n, 4) for n in range(5)}
    assert all(r["began_ms"] is not None for r in running)
    assert seen[-1]["progress"] is None


def test_stages_side_by_side_share_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARKEN_ENGINE", "inline")

    def run(stage: str) -> None:
        for i in range(20):
            timings.Run(tmp_path, stage, f"{i}").end("done", "", [], tmp_path / "out")

    threads = [threading.Thread(target=run, args=(f"stage-{n}",)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    found = timings.read(tmp_path)
    assert len(found) == 80
    assert {r["outcome"] for r in found} == {"done"}
    assert len((tmp_path / "timings.jsonl").read_text().splitlines()) == 160


@pytest.mark.slow
def test_a_watch_on_a_terminal_ends_with_ctrl_c(paths: Paths, tmp_path: Path) -> None:
    mine, its = pty.openpty()
    command = [sys.executable, "-m", "harken.cli", "status", "--watch"]
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent / "src"), "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}

    def lead() -> None:
        """Make the terminal the one whose Ctrl-C reaches the process."""
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdin=its, stdout=its, stderr=its, preexec_fn=lead)
    os.close(its)
    said = b""
    while said.count(b"evaluate") < 3:  # drawn anew, more than once
        said += os.read(mine, 65536)
    os.write(mine, b"\x03")
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while chunk := os.read(mine, 65536):
            said += chunk
    assert process.wait(20) == 0
    os.close(mine)
    assert b"Traceback" not in said
    assert b"Aborted" not in said
