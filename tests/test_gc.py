"""Removing scratch: what is published stays, whatever is half made stays, and nothing goes while its stage runs."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from harken import gc
from harken.config import Paths, load


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    root = Path(__file__).parents[1]
    monkeypatch.setenv("HARKEN_PARAMS", str(root / "params.yaml"))
    monkeypatch.chdir(tmp_path)
    return load("paths", Paths)


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def link(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        os.link(path, target / path.name)


OLD, NEW = "0123456789abcdef", "fedcba9876543210"


def test_what_is_published_stays_and_what_is_not_goes(paths: Paths) -> None:
    write(paths.work / "lists" / OLD, truth_json="old")
    link(write(paths.work / "lists" / NEW, truth_json="new"), paths.lists)
    link(write(paths.work / "train" / f"tap-20.{NEW}", run_json="{}", model_bin="new"), paths.trained / "tap-20")
    old = write(paths.work / "train" / f"tap-20.{OLD}", run_json="{}", model_bin="old")
    found = gc.leftovers(paths, {"lists", "train"})
    assert {f.path for f in found} == {paths.work / "lists" / OLD, old}
    assert all(f.n_bytes > 0 for f in found)
    assert gc.leftovers(paths, {"train"}) == [f for f in found if f.stage == "train"]  # lists is not up to date

    assert len(gc.remove(paths, found)) == 2
    assert not old.exists()
    assert (paths.work / "train" / f"tap-20.{NEW}" / "model.bin").read_text() == "new"
    assert gc.leftovers(paths, {"lists", "train"}) == []


def test_copies_with_the_same_bytes_are_published_too(paths: Paths) -> None:
    for run, text in ((NEW, "new"), (OLD, "old")):
        write(paths.work / "train" / f"tap-20.{run}", run_json="{}", model_bin=text)
    write(paths.trained / "tap-20", run_json="{}", model_bin="new")  # as after a `dvc pull`
    assert [f.path.name for f in gc.leftovers(paths, {"train"})] == [f"tap-20.{OLD}"]


def test_begun_runs_media_and_what_cannot_be_judged_stay(paths: Paths) -> None:
    write(paths.work / "train" / f"tap-20.{OLD}", state_bin="hours")  # begun: no run.json
    link(write(paths.work / "train" / f"mean-20.{NEW}", run_json="{}"), paths.trained / "mean-20")
    write(paths.work / "download" / OLD, media_bin="m")
    write(paths.media, other_bin="o")
    write(paths.work / "weights" / OLD, weights_json="another host's")
    write(paths.weights, weights_json="here")  # nothing in the scratch folder is what is published
    assert gc.leftovers(paths, {"train", "download", "weights"}) == []


def test_of_evaluated_runs_those_stay_whose_results_are_published(paths: Paths) -> None:
    new, old = [{"recipe": "tap", "metrics": 2}], [{"recipe": "tap", "metrics": 1}]
    write(paths.work / "evaluate" / f"train.tap-20.{NEW}", results_json=json.dumps(new))
    write(paths.work / "evaluate" / f"train.tap-20.{OLD}", results_json=json.dumps(old))
    write(paths.evaluations, results_json=json.dumps([*new, {"recipe": "mean", "metrics": 3}]))
    assert [f.path.name for f in gc.leftovers(paths, {"evaluate"})] == [f"train.tap-20.{OLD}"]


def test_nothing_goes_while_its_stage_runs(paths: Paths) -> None:
    write(paths.work / "lists" / OLD, truth_json="old")
    link(write(paths.work / "lists" / NEW, truth_json="new"), paths.lists)
    found = gc.leftovers(paths, {"lists"})
    with open(paths.work / "lists.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert gc.remove(paths, found) == []
    assert (paths.work / "lists" / OLD).is_dir()
    assert gc.remove(paths, found) == found
