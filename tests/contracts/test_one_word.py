"""One word names a stage in five places, DVC watches the code that a stage runs, and no choice goes untested."""

from __future__ import annotations

import graphlib
import importlib
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from harken.config import Config, Paths, read_params
from harken.datasets import DATASETS
from harken.engines import ENGINES
from harken.evaluation.protocols import PROTOCOLS
from harken.media.fbank import FBANKS
from harken.media.fetchers import FETCHERS
from harken.models.losses import LOSSES
from harken.models.matching import MATCHES
from harken.models.pooling import POOLINGS
from harken.stages import STAGES, config_class, stage
from harken.training.optim import OPTIMIZERS, SCHEDULES

ROOT = Path(__file__).parents[2]
DVC: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())
CHOICES: dict[str, Mapping[str, Any]] = {
    "DATASETS": DATASETS,
    "ENGINES": ENGINES,
    "FBANKS": FBANKS,
    "FETCHERS": FETCHERS,
    "LOSSES": LOSSES,
    "MATCHES": MATCHES,
    "OPTIMIZERS": OPTIMIZERS,
    "POOLINGS": POOLINGS,
    "PROTOCOLS": PROTOCOLS,
    "SCHEDULES": SCHEDULES,
}
PARAMS = sorted([ROOT / "params.yaml", *ROOT.glob("presets/*.yaml")])


def test_the_stages_are_dvc_s_stages() -> None:
    assert tuple(DVC["stages"]) == STAGES


def test_the_stages_are_modules_with_a_config_class_and_a_run() -> None:
    modules = {p.stem for p in (ROOT / "src/harken/stages").glob("*.py")} - {"__init__", "__main__"}
    assert modules == set(STAGES)
    for name in STAGES:
        assert issubclass(config_class(name), Config)
        assert config_class(name).__module__ == f"harken.stages.{name}"
        assert callable(stage(name).run)
        assert (stage(name).__doc__ or "").startswith(f"Stage `{name}`")


def test_the_stages_are_sections_of_params() -> None:
    assert set(read_params(ROOT / "params.yaml")) == {"paths", *STAGES}


def test_the_stages_are_tasks_of_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prefect")  # the extra `cluster`
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)
    repro = importlib.import_module("pipelines.repro")
    tasks = repro.tasks(repro.graph(ROOT))
    assert set(tasks) == set(STAGES)
    assert all(task.name == name for name, task in tasks.items())


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_run_by_its_name_and_has_its_section(name: str) -> None:
    assert DVC["stages"][name]["cmd"] == f"python -m harken.stages {name}"
    assert DVC["stages"][name]["params"] == [name]


@pytest.mark.parametrize("name", STAGES)
def test_dvc_watches_the_code_that_the_stage_is_of(name: str) -> None:
    watched = {d.removeprefix("src/harken/") for d in DVC["stages"][name]["deps"] if not d.startswith("${")}
    assert watched == set(stage(name).CODE)
    assert f"stages/{name}.py" in watched
    for path in watched:
        assert (ROOT / "src/harken" / path).exists()


def outs(name: str) -> list[str]:
    return [o if isinstance(o, str) else next(iter(o)) for o in DVC["stages"][name].get("outs", [])]


UNTRACKED = {"work", "ledger"}  # scratch; and what was asked of the world and when, which no rerun can make again


def test_every_stage_fills_folders_of_its_own() -> None:
    found = [o for name in STAGES for o in outs(name)]
    assert all(outs(name) for name in STAGES)
    assert len(found) == len(set(found))
    known = set(read_params(ROOT / "params.yaml")["paths"]) - UNTRACKED
    assert {o.removeprefix("${paths.").removesuffix("}") for o in found} == known


@pytest.mark.parametrize("name", STAGES)
def test_dvc_knows_every_folder_that_a_stage_names(name: str) -> None:
    source = (ROOT / f"src/harken/stages/{name}.py").read_text()
    named = set(re.findall(r"\bpaths\.([a-z]+)\b", source)) & (set(Paths.model_fields) - UNTRACKED)
    told = {*DVC["stages"][name].get("deps", []), *outs(name)}
    assert {f"${{paths.{n}}}" for n in named} <= told


def test_arrows_never_turn_back() -> None:
    filled_by = {o: name for name in STAGES for o in outs(name)}
    needs = {n: {filled_by[d] for d in DVC["stages"][n].get("deps", []) if d.startswith("${")} for n in STAGES}
    assert set(graphlib.TopologicalSorter(needs).static_order()) == set(STAGES)  # raises on a circle


@pytest.mark.parametrize("path", PARAMS, ids=lambda p: p.stem)
def test_git_ignores_what_dvc_keeps(path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folders = [str(f) for f in read_params(path)["paths"].values()]
    asked = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        cwd=ROOT,
        input="\n".join(folders),
        text=True,
        capture_output=True,
        check=False,
    )
    assert sorted(asked.stdout.split()) == sorted(folders)


def test_no_data_is_in_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    kept = subprocess.run(
        ["git", "ls-files", "data", "models", "reports", ".work", "ledger"], cwd=ROOT, text=True, capture_output=True
    )
    assert kept.stdout.split() in ([], ["data/README.md"])


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_named_in_a_test(name: str) -> None:
    choices = CHOICES[name]
    assert choices
    others = [p for p in (ROOT / "tests").rglob("*.py") if p != Path(__file__)]
    text = "\n".join(p.read_text() for p in others)
    assert not [c for c in choices if f'"{c}"' not in text and f'["{c}' not in text and f".{c}(" not in text]


def test_light_stages_start_without_torch() -> None:
    code = (
        "import sys, harken.cli, harken.stages.lists, harken.stages.catalog, harken.stages.download, "
        "harken.stages.audit, harken.stages.extract, harken.stages.stats; "
        "print([m for m in ('torch', 'open_clip', 'transformers', 'prefect', 'dvc') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "src")}, text=True, capture_output=True, check=False
    )
    assert found.stdout == "[]\n", found.stderr
