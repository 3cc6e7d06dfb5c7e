"""A run's curves are its history, nothing else is written, and nobody is told."""

from __future__ import annotations

import csv
import json
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harken.training.curves import FOLDER, Rows, curves

HISTORY: list[dict[str, float]] = [
    {"epoch": 0, "loss": 1 / 3, "val_a2i_R@1": 12.5, "score": 1e-17},
    {"epoch": 1, "loss": 0.1 + 0.2, "val_a2i_R@1": 0.0, "score": -3},
    {"epoch": 2, "loss": 123456.789, "val_a2i_R@1": 100.0, "score": 7.5},
]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def keep(folder: Path, *histories: Rows) -> dict[str, bytes]:
    """What lies in the folder after a process was given these histories, one after the other."""
    watch = curves(folder)
    for history in histories:
        watch(history)
    return files(folder)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.chdir(tmp_path)


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    found = keep(tmp_path / "run", [], HISTORY[:1], HISTORY[:2], HISTORY)
    metrics = tmp_path / "run" / FOLDER / "plots" / "metrics"
    for name in ("loss", "val_a2i_R@1", "score"):
        rows = list(csv.DictReader((metrics / f"{name}.tsv").open(), delimiter="\t"))
        assert [float(r[name]) for r in rows] == [h[name] for h in HISTORY]
        assert [int(r["step"]) for r in rows] == [h["epoch"] for h in HISTORY]
    last = {k: v for k, v in HISTORY[-1].items() if k != "epoch"}
    assert json.loads((tmp_path / "run" / FOLDER / "metrics.json").read_text()) == last | {"step": 2}
    names = [f"plots/metrics/{n}.tsv" for n in ("loss", "score", "val_a2i_R@1")]
    assert sorted(found) == [f"{FOLDER}/{n}" for n in ("metrics.json", *names)]


def test_a_number_that_is_none_is_kept_too(tmp_path: Path) -> None:
    found = keep(tmp_path, [{"epoch": 0, "score": float("nan")}, {"epoch": 1, "score": float("-inf")}])
    rows = found[f"{FOLDER}/plots/metrics/score.tsv"].decode().splitlines()
    assert rows == ["step\tscore", "0\tnan", "1\t-inf"]


@pytest.mark.parametrize("known", range(4))
@pytest.mark.parametrize("left", range(4))
def test_a_kill_between_an_epoch_and_its_curve_leaves_no_trace(left: int, known: int, tmp_path: Path) -> None:
    """A process showed `left` epochs before it was killed; the next one knows of `known` when it starts."""
    expected = keep(tmp_path / "undisturbed", [], *(HISTORY[: n + 1] for n in range(3)))
    keep(tmp_path / "run", *(HISTORY[: n + 1] for n in range(left)))
    after = [HISTORY[: n + 1] for n in range(known, 3)]
    assert keep(tmp_path / "run", HISTORY[:known], *after) == expected


def test_what_a_kill_cut_short_is_made_anew(tmp_path: Path) -> None:
    expected = keep(tmp_path / "run", HISTORY)
    for path in (tmp_path / "run" / FOLDER).rglob("*.*"):
        path.write_bytes(path.read_bytes()[:-3])
    (tmp_path / "run" / FOLDER / "plots" / "metrics" / "gone.tsv").write_text("of another run")
    assert keep(tmp_path / "run", HISTORY) == expected


def test_nothing_is_there_before_it_is_told(tmp_path: Path) -> None:
    curves(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def git(*args: str) -> None:
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *args], check=True, capture_output=True)


@pytest.mark.parametrize("kind", ["git, empty", "git", "dvc"])
def test_the_repository_that_it_is_run_in_is_left_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a token of DVC Studio and within `dvc repro`, too."""
    git("init", "-q")
    if kind == "dvc":
        (tmp_path / ".dvc").mkdir()
        (tmp_path / ".dvc" / "config").touch()
        monkeypatch.setenv("DVC_ROOT", str(tmp_path))
        monkeypatch.setenv("DVC_EXP_BASELINE_REV", "0" * 40)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    git("add", "--all")
    if kind != "git, empty":
        git("commit", "-q", "-m", "first")
    monkeypatch.setenv("DVC_STUDIO_TOKEN", "isat_nobody")
    monkeypatch.setenv("DVC_STUDIO_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("DVC_STUDIO_REPO_URL", "git@example.org:nobody/nothing.git")
    before = files(tmp_path)
    keep(tmp_path / "work" / "run", HISTORY[:1], HISTORY)
    new: Sequence[str] = sorted(set(files(tmp_path)) - set(before))
    assert new
    assert all(n.startswith(f"work/run/{FOLDER}/") for n in new), new
    assert {n: c for n, c in files(tmp_path).items() if n in before} == before


def test_another_program_s_wish_to_resume_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = keep(tmp_path / "undisturbed", HISTORY)
    keep(tmp_path / "run", HISTORY[:2])
    monkeypatch.setenv("DVCLIVE_RESUME", "1")
    assert keep(tmp_path / "run", HISTORY) == expected
