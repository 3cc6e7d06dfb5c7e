"""Several processes that train one run, as torchrun starts them: what one learns, and nobody is left behind."""

from __future__ import annotations

import csv
import json
import random
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
import torch
from corridor import ROOT, Corridor, contents, copy_before, until
from safetensors.torch import load_file

from harken.config import FOLDERS
from harken.stages import STAGES
from harken.stages import __main__ as entry
from processes import lives

# the agent otherwise meets its restarted workers at a store in which the dead ones' addresses still lie
RESTARTABLE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
ENDS_S = 30.0  # within so many seconds of one's death the others are gone; it takes one or two


@pytest.mark.parametrize("stage", [s for s in STAGES if s not in entry.TOGETHER])
def test_what_is_one_processs_work_is_refused_to_several(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(entry, "die_with_parent", lambda: None)
    for name, value in {"HARKEN_PARAMS": str(ROOT / "params.yaml"), "HARKEN_THREADS": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert entry.main(stage) == 1
    said = capsys.readouterr().err
    assert f"stage {stage} is one process's work, and 2 were started together" in said
    assert "with it run pretrain and finetune." in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("lacking", "told"), [("RANK", "RANK not set"), ("MASTER_PORT", "MASTER_PORT not set")])
def test_processes_that_could_not_find_each_other_are_refused(
    lacking: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "die_with_parent", lambda: None)
    known = {"HARKEN_THREADS": "1", "WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(lacking)
    assert entry.main("pretrain") == 1
    assert f"WORLD_SIZE=2, but {told}" in capsys.readouterr().err


def lengthen(copy: Corridor) -> None:
    """Let `pretrain` have one run, long enough to be met in its middle."""
    copy.params["pretrain"]["recipes"] = {"nearest": copy.params["pretrain"]["recipes"]["nearest"]}
    copy.params["pretrain"]["epochs"] = 40
    copy.write()


@pytest.fixture
def longer(corridor: Corridor, tmp_path: Path) -> Corridor:
    copy = copy_before(corridor, "pretrain", tmp_path / "copy")
    lengthen(copy)
    return copy


@pytest.fixture(scope="module")
def undisturbed(corridor: Corridor, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """What two processes make of it that nobody kills."""
    copy = copy_before(corridor, "pretrain", tmp_path_factory.mktemp("undisturbed") / "copy")
    lengthen(copy)
    copy.run("pretrain", 2)
    return contents(copy.path("pretrained"))


def differences(a: Path, b: Path) -> dict[str, float]:
    """The largest difference of any weight of two runs, by tensor.

    Not of the keys' biases: softmax does not see them, their gradients are rounding, and Adam makes steps of it.
    """
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == two.keys()
    for tensors in (one, two):
        for name in [n for n in tensors if n.endswith("in_proj_bias")]:
            query, _, value = tensors[name].chunk(3)
            tensors[name] = torch.cat([query, value])
    return {name: float((one[name] - two[name]).abs().max()) for name in one}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_two_processes_learn_what_one_does(stage: str, corridor: Corridor, tmp_path: Path) -> None:
    one, two = (copy_before(corridor, stage, tmp_path / name) for name in ("one", "two"))
    for copy in (one, two):
        copy.params["finetune"] |= {"batch": 2, "drop_last": True}  # five clips: the last batch would be of one
        copy.write()
    one.run(stage)
    two.run(stage, 2)
    out, other = (copy.path(FOLDERS[stage]) for copy in (one, two))
    assert contents(other).keys() == contents(out).keys()
    left = {p.name for p in (two.path("work") / stage).rglob("*")}
    assert not left & {"settings.json", "state.safetensors", "diverged.json"}
    assert not [name for name in left if name.endswith(".tmp")]
    for run in sorted(p.name for p in out.iterdir()):
        assert max(differences(out / run, other / run).values()) < 1e-5
        assert json.loads((other / run / "run.json").read_text()) == json.loads((out / run / "run.json").read_text())
        expected, found = history(out / run), history(other / run)
        assert [row.keys() for row in found] == [row.keys() for row in expected]
        assert [pytest.approx(row, abs=1e-5) for row in expected] == found
    before = contents(other)
    two.run(stage)  # one process alone finds nothing left to do
    assert contents(other) == before


def history(run: Path) -> list[dict[str, float]]:
    with open(run / "history.csv") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def begun(copy: Corridor, *torchrun: str, **env: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """torchrun in the middle of a run, and its two workers, the first of them first."""
    process = copy.start("pretrain", 2, torchrun, **env)
    work = copy.path("work") / "pretrain"
    assert until(lambda: any(work.glob("*/state.safetensors")), 90), copy.ended(process)[1]
    workers = [p for p in psutil.Process(process.pid).children() if "harken.stages" in " ".join(p.cmdline())]
    workers.sort(key=lambda p: int(p.environ()["RANK"]))
    assert len(workers) == 2
    return process, workers


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_one_ends_the_other_and_both_go_on_when_run_again(
    rank: int, longer: Corridor, undisturbed: Mapping[str, bytes]
) -> None:
    process, workers = begun(longer)
    workers[rank].kill()
    assert until(lambda: not any(map(lives, workers)), ENDS_S), "the other one lives on"
    status, said = longer.ended(process)
    assert status != 0, said
    assert not longer.path("pretrained").exists(), "what is not whole was published"
    assert "resuming at step" in longer.run("pretrain", 2)
    assert contents(longer.path("pretrained")) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchruns_own_death_leaves_nobody_behind(longer: Corridor, undisturbed: Mapping[str, bytes]) -> None:
    process, workers = begun(longer)
    process.send_signal(signal.SIGKILL)
    assert until(lambda: not any(map(lives, workers)), ENDS_S), "workers outlived torchrun"
    longer.ended(process)
    assert "resuming at step" in longer.run("pretrain")  # with one process, so not with the same last bits
    assert contents(longer.path("pretrained")).keys() == undisturbed.keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_itself_restarts_what_died(rank: int, longer: Corridor, undisturbed: Mapping[str, bytes]) -> None:
    process, workers = begun(longer, "--max-restarts", "2", **RESTARTABLE)
    workers[rank].kill()
    status, said = longer.ended(process)
    assert status == 0, said
    assert "resuming at step" in said
    assert contents(longer.path("pretrained")) == undisturbed
    assert not any(map(lives, workers))


def grandchildren(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The workers of the torchrun that a stage has started, the first of them first."""
    found = [p for p in psutil.Process(process.pid).children(recursive=True) if "--standalone" not in p.cmdline()]
    ranks = [p for p in found if "harken.stages" in " ".join(p.cmdline()) and "RANK" in p.environ()]
    return sorted(ranks, key=lambda p: int(p.environ()["RANK"]))


def launched(copy: Corridor, **env: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A stage that has started two processes for itself, in the middle of a run."""
    process = copy.start("pretrain", HARKEN_LAUNCH="torchrun:2", **env)
    work = copy.path("work") / "pretrain"
    assert until(lambda: any(work.glob("*/state.safetensors")), 90), copy.ended(process)[1]
    ranks = grandchildren(process)
    assert len(ranks) == 2
    return process, ranks


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stage_starts_its_processes_itself(longer: Corridor, undisturbed: Mapping[str, bytes]) -> None:
    said = longer.run("pretrain", HARKEN_LAUNCH="torchrun:2")
    assert contents(longer.path("pretrained")) == undisturbed, said
    assert not (longer.path("work") / "pretrain.failed.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stage_whose_process_dies_goes_on_by_itself(
    rank: int, longer: Corridor, undisturbed: Mapping[str, bytes]
) -> None:
    process, ranks = launched(longer)
    ranks[rank].kill()
    status, said = longer.ended(process)
    assert status == 0, said
    assert "resuming at step" in said
    assert contents(longer.path("pretrained")) == undisturbed
    assert not any(map(lives, ranks))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("who", ["stage", "torchrun"])
def test_nobody_outlives_a_stage_that_started_others(
    who: str, longer: Corridor, undisturbed: Mapping[str, bytes]
) -> None:
    process, ranks = launched(longer, HARKEN_MAX_RESTARTS="0")
    family = psutil.Process(process.pid).children(recursive=True)
    victim = process if who == "stage" else ranks[0].parent()
    victim.kill()
    assert until(lambda: not any(map(lives, family)), ENDS_S), [p.cmdline() for p in family if lives(p)]
    status, said = longer.ended(process)
    assert status == (-signal.SIGKILL if who == "stage" else 1)
    if who == "torchrun":
        assert "a process of the 2 that trained together died" in said
    assert "resuming at step" in longer.run("pretrain", HARKEN_LAUNCH="torchrun:2")
    assert contents(longer.path("pretrained")) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_all_processes_refuse_is_said_once_and_not_tried_again(longer: Corridor) -> None:
    process = longer.start("pretrain", HARKEN_LAUNCH="torchrun:3")
    status, said = longer.ended(process)
    assert status == 1
    assert said.count("A batch of 4 cannot be shared by 3 processes: make it a multiple of 3.") == 1, said
    failed = json.loads((longer.path("work") / "pretrain.failed.json").read_text())
    assert failed["reason"] == "ConfigError"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tasks_of_one_step_find_each_other_as_torchruns_do(longer: Corridor, undisturbed: Mapping[str, bytes]) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(random.randrange(10**6)), "SLURM_STEP_ID": "0"}
    step |= {"SLURM_STEP_NODELIST": "localhost,elsewhere"}
    tasks = [longer.start("pretrain", **step, SLURM_PROCID=str(n), SLURM_LOCALID=str(n)) for n in range(2)]
    for task in tasks:
        status, said = longer.ended(task)
        assert status == 0, said
    assert contents(longer.path("pretrained")) == undisturbed
