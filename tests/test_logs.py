"""What stages say: plain for people; as JSON whole lines that say which run, stage and shard they are of."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harken import logs
from harken.config import Paths
from harken.engines import inline
from harken.errors import ConfigError

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _own_handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HARKEN_LOG", "HARKEN_RUN_ID", "HARKEN_METRICS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    monkeypatch.syspath_prepend(str(TESTS))
    found: Paths = importlib.import_module("stage_toys").write_params(tmp_path)
    return found


def say(toy: str, paths: Paths, **env: str) -> tuple[int, str]:
    """The exit status of a toy stage in a process of its own, and its stderr."""
    settings = {"HARKEN_PARAMS": "params.yaml", "HARKEN_ENGINE": "inline", "PYTHONPATH": str(TESTS.parent / "src")}
    done = subprocess.run(
        [sys.executable, str(TESTS / "stage_toys.py"), toy],
        cwd=paths.work.parents[1],
        env={**os.environ, **settings, "CI": "1", **env},
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_for_people_lines_are_plain(paths: Paths) -> None:
    status, said = say("counts", paths)
    assert status == 0
    assert said.splitlines()[0] == "made"
    assert said.splitlines()[-1] == "counted 3"


def test_as_json_every_line_says_of_what_it_is(paths: Paths) -> None:
    env = {"HARKEN_ENGINE": "local", "HARKEN_WORKERS": "2", "HARKEN_LOG": "json", "HARKEN_RUN_ID": "the-flow"}
    status, said = say("counts", paths, **env, PYTHONPATH=os.pathsep.join([str(TESTS), str(TESTS.parent / "src")]))
    assert status == 0
    lines = [json.loads(line) for line in said.splitlines()]
    assert {(n["run_id"], n["stage"], n["level"], n["logger"]) for n in lines} == {
        ("the-flow", "stats", "info", "harken")
    }
    assert sorted(n["shard"] for n in lines if n["message"] == "at work") == [0, 1, 2]
    assert all("shard" not in n for n in lines if n["message"] != "at work")
    assert all(n["time"].endswith("Z") and len(n["time"]) == 24 for n in lines)
    assert lines[-1]["message"] == "counted 3"


def test_a_refusal_and_a_mistake_are_lines_too_under_an_id_of_their_own(paths: Paths) -> None:
    status, said = say("refuses", paths, HARKEN_LOG="json")
    (first,) = [json.loads(text) for text in said.splitlines()]
    assert (status, first["level"], first["message"]) == (1, "error", "data/x: no such shard. Make it.")
    assert first["run_id"]
    assert json.loads((paths.work / "stats.failed.json").read_text())["run_id"] == first["run_id"]
    status, said = say("mistaken", paths, HARKEN_LOG="json")
    line = json.loads(said.splitlines()[-1])
    assert (status, line["level"]) == (1, "critical")
    assert line["run_id"] != first["run_id"]
    assert line["error"].endswith("KeyError: 'oh'")
    assert "\n" in line["error"]


def test_what_this_process_starts_inherits_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARKEN_RUN_ID", "gone after the test")
    monkeypatch.delenv("HARKEN_RUN_ID")
    made = logs.run_id()
    assert os.environ["HARKEN_RUN_ID"] == made == logs.run_id()


def test_an_unknown_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARKEN_LOG", "jsn")
    with pytest.raises(ConfigError, match="Did you mean 'json'"):
        logs.is_json()


def test_for_people_the_engine_is_left_as_it_is() -> None:
    assert logs.telling(inline) is inline


def test_any_record_becomes_one_line() -> None:
    odd = 'a\nb\u2028"\\ \ud800'
    record = logging.LogRecord("x", logging.INFO, "f", 1, "%s", (odd,), None)
    text = logs.JsonLines().format(record)
    assert len(text.splitlines()) == 1
    assert json.loads(text)["message"] == odd
    text.encode()


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ((7, "mark"), {"shard": 7}),
        (3, {"shard": 3}),
        (("nearest-20", "nearest", 20), {"item": "nearest-20"}),
        ("clip", {"item": "clip"}),
        (None, {}),
    ],
)
def test_an_item_s_name(item: Any, named: dict[str, Any]) -> None:
    assert logs._named(item) == named


@pytest.mark.slow
def test_a_cluster_s_workers_speak_so_too(paths: Paths) -> None:
    pytest.importorskip("distributed")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    status, said = say(
        "counts", paths, HARKEN_ENGINE="dask", HARKEN_WORKERS="2", HARKEN_LOG="json", HARKEN_RUN_ID="r", PYTHONPATH=path
    )
    assert status == 0, said
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    ours = [n for n in lines if n["logger"] == "harken"]
    assert {(n["run_id"], n["stage"]) for n in ours} == {("r", "stats")}
    assert sorted(n["shard"] for n in ours if n["message"] == "at work") == [0, 1, 2]
