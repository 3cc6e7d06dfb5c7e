"""Runs: which are done, which are dropped, and what each leaves."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from harken.errors import ConfigError, DataError
from harken.training.runs import (
    device,
    finish,
    folder_of,
    load_model,
    publish_runs,
    run_name,
    runs_in,
    seeds_times,
    unfinished,
)
from harken.training.state import TrainState

STATE = TrainState(6, 12.5, 1, [{"epoch": 0, "loss": 1.5, "score": 3.0}, {"epoch": 1, "loss": 1.0, "score": 12.5}])


def done(work: Path, run: str, mark: str) -> nn.Module:
    folder = folder_of(work, run, mark)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.safetensors").touch()
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    finish(folder, model, STATE, {"recipe": "tap", "seed": 20})
    return model


def test_a_finished_run_keeps_its_weights_curve_and_facts(tmp_path: Path) -> None:
    model = done(tmp_path, "tap-20", "abc")
    folder = tmp_path / "tap-20.abc"
    assert sorted(p.name for p in folder.iterdir()) == ["history.csv", "model.safetensors", "run.json"]
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert [float(r["score"]) for r in rows] == [3.0, 12.5]
    publish_runs(tmp_path, tmp_path / "out", {"tap-20": "abc"})
    (facts,) = runs_in(tmp_path / "out")
    assert facts == {
        "run": "tap-20",
        "recipe": "tap",
        "seed": 20,
        "steps": 6,
        "best_epoch": 1,
        "best_score": 12.5,
    }
    other = load_model(tmp_path / "out", "tap-20", nn.Linear(2, 3).train())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    assert not other.training


def test_equal_runs_are_equal_bytes(tmp_path: Path) -> None:
    for mark in ("a", "b"):
        done(tmp_path, "tap-20", mark)
    for name in ("history.csv", "model.safetensors", "run.json"):
        assert (tmp_path / "tap-20.a" / name).read_bytes() == (tmp_path / "tap-20.b" / name).read_bytes()


def test_what_is_done_is_not_done_again_and_what_nobody_wants_goes(tmp_path: Path) -> None:
    work = tmp_path / "work"
    done(work, "tap-20", "abc")
    done(work, "old-20", "abc")
    done(work, "mean-20", "old")
    (work / "begun-20.abc").mkdir()
    (work / "begun-20.abc" / "state.safetensors").touch()
    marks = {"tap-20": "abc", "mean-20": "new", "begun-20": "abc"}
    assert unfinished(work, marks, {n: {"seed": 20} for n in marks}) == ["mean-20", "begun-20"]
    assert sorted(p.name for p in work.iterdir()) == ["begun-20.abc", "mean-20.new", "tap-20.abc"]
    assert (work / "begun-20.abc" / "state.safetensors").exists()


THEN = {"pretrain": {"epochs": 30, "optimizer": {"lr_weight": 0.2}, "batch": 128}, "data": {"stats": "aa"}, "code": "c"}
NOW = {
    "pretrain": {"epochs": 20, "optimizer": {"lr_weight": 0.1}, "compute": None},
    "data": {"stats": "bb"},
    "code": "c",
}


def begin(work: Path) -> Path:
    assert unfinished(work, {"nearest-20": "then"}, {"nearest-20": THEN}) == ["nearest-20"]
    folder = work / "nearest-20.then"
    (folder / "state.safetensors").write_bytes(b"hours of work")
    return folder


def test_a_run_begun_under_other_settings_is_kept_and_what_changed_is_listed(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    with pytest.raises(DataError, match="begun under other settings") as e:
        unfinished(tmp_path, {"nearest-20": "now"}, {"nearest-20": NOW})
    said = str(e.value)
    changes = ["pretrain.epochs: 30 -> 20", "pretrain.optimizer.lr_weight: 0.2 -> 0.1", "pretrain.batch: 128 -> absent"]
    assert all(c in said for c in [*changes, "pretrain.compute: absent -> None", "data.stats has changed"])
    assert "code has changed" not in said
    assert str(folder) in said
    assert "put the settings (or the code) back" in said
    assert (folder / "state.safetensors").read_bytes() == b"hours of work"
    assert unfinished(tmp_path, {"nearest-20": "then"}, {"nearest-20": THEN}) == ["nearest-20"]  # and it goes on


def test_what_was_begun_is_given_up_on_request_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begin(tmp_path)
    monkeypatch.setenv("HARKEN_RESTART", "1")
    assert unfinished(tmp_path, {"nearest-20": "now"}, {"nearest-20": NOW}) == ["nearest-20"]
    assert not folder.exists()


@pytest.mark.parametrize("value", ["0", "", "no"])
def test_a_request_that_says_no_gives_nothing_up(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begin(tmp_path)
    monkeypatch.setenv("HARKEN_RESTART", value)
    with pytest.raises(DataError, match="begun under other settings"):
        unfinished(tmp_path, {"nearest-20": "now"}, {"nearest-20": NOW})
    assert (folder / "state.safetensors").read_bytes() == b"hours of work"


def test_what_is_done_under_other_settings_but_not_tidied_is_no_longer_wanted(tmp_path: Path) -> None:
    """A kill came between run.json and the checkpoint's removal; then the params were changed."""
    done(tmp_path, "nearest-20", "then")
    (tmp_path / "nearest-20.then" / "state.safetensors").touch()
    assert unfinished(tmp_path, {"nearest-20": "now"}, {"nearest-20": NOW}) == ["nearest-20"]
    assert not (tmp_path / "nearest-20.then").exists()


def test_a_run_begun_before_settings_were_kept_is_not_lost_either(tmp_path: Path) -> None:
    (tmp_path / "nearest-20.then").mkdir()
    (tmp_path / "nearest-20.then" / "state.safetensors").touch()
    with pytest.raises(DataError, match=r"pretrain\.epochs: absent -> 20"):
        unfinished(tmp_path, {"nearest-20": "now"}, {"nearest-20": NOW})


def test_the_settings_lie_beside_the_state_until_the_run_is_done(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    assert json.loads((folder / "settings.json").read_text()) == THEN
    done(tmp_path, "nearest-20", "then")
    assert sorted(p.name for p in folder.iterdir()) == ["history.csv", "model.safetensors", "run.json"]


def test_what_was_begun_of_a_recipe_that_is_gone_for_now_is_kept(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    assert unfinished(tmp_path, {"tap-20": "abc"}, {"tap-20": {}}) == ["tap-20"]
    assert (folder / "state.safetensors").exists()


def test_a_kill_between_the_results_and_the_tidying_leaves_nothing_behind(tmp_path: Path) -> None:
    done(tmp_path, "tap-20", "abc")
    for name in ("state.safetensors", "settings.json", "diverged.json"):
        (tmp_path / "tap-20.abc" / name).touch()
    assert unfinished(tmp_path, {"tap-20": "abc"}, {"tap-20": {}}) == []
    assert sorted(p.name for p in (tmp_path / "tap-20.abc").iterdir()) == [
        "history.csv",
        "model.safetensors",
        "run.json",
    ]


def test_an_unknown_run_is_met_with_those_there_are(tmp_path: Path) -> None:
    done(tmp_path, "tap-20", "abc")
    publish_runs(tmp_path, tmp_path / "out", {"tap-20": "abc"})
    with pytest.raises(ConfigError, match=r"unknown name 'tab-20'. Did you mean 'tap-20'\? Known: tap-20"):
        load_model(tmp_path / "out", "tab-20", nn.Linear(2, 3))
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_model(tmp_path / "out", "tap-20", nn.Linear(2, 4))
    with pytest.raises(DataError, match="no runs here"):
        runs_in(tmp_path / "none")


def test_runs_are_recipes_times_seeds() -> None:
    assert seeds_times(["a", "b"], [1, 2]) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert run_name("tap_pmr", 20) == "tap_pmr-20"


def test_each_process_of_a_run_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARKEN_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device() == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device() == torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device() == torch.device("cpu")


def test_the_device_is_the_environment_s_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARKEN_DEVICE", "cpu")
    assert device() == torch.device("cpu")
    monkeypatch.setenv("HARKEN_DEVICE", "gpu0")
    with pytest.raises(ConfigError, match="HARKEN_DEVICE='gpu0'"):
        device()
