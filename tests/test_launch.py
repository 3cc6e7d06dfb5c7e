"""How many processes train a run together, how they find each other, and what becomes of what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harken import launch
from harken.errors import ClipError, ConfigError, DataError, HarkenError, TransientError
from harken.training import runs


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("HARKEN_", "SLURM_", "RANK", "WORLD_SIZE", "MASTER_"))]:
        monkeypatch.delenv(name)


def gpus(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "devices", lambda: [f"cuda:{i}" for i in range(n)])


def never() -> int:
    raise AssertionError("asked for what does not matter")


@pytest.mark.parametrize(
    ("n_gpus", "n_left", "size"),
    [
        (0, 1, 1),
        (1, 1, 1),
        (2, 1, 2),
        (2, 2, 1),
        (4, 3, 4),
        (4, 4, 1),
        (4, 0, 1),
        (8, 1, 8),
        (3, 1, 2),
        (3, 2, 1),
        (7, 3, 4),
    ],
)
def test_gpus_that_would_idle_train_together(
    n_gpus: int, n_left: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(n_gpus, monkeypatch)
    assert launch.how_many(128, True, lambda: n_left) == size


@pytest.mark.parametrize("n_gpus", [0, 1])
def test_where_there_is_no_choice_nothing_is_asked(n_gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(n_gpus, monkeypatch)
    assert launch.how_many(128, True, never) == 1


def test_auto_leaves_to_a_cluster_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(4, monkeypatch)
    monkeypatch.setenv("HARKEN_ENGINE", "dask+tcp://localhost:1")
    assert launch.how_many(128, True, never) == 1


def test_auto_never_changes_what_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(4, monkeypatch)
    assert launch.how_many(128, False, never) == 1


@pytest.mark.parametrize(
    ("given", "n_gpus", "size"),
    [
        ("alone", 4, 1),
        ("torchrun", 4, 4),
        ("torchrun:2", 4, 2),
        ("torchrun:2", 0, 2),
        ("torchrun:1", 4, 1),
        ("auto", 0, 1),
    ],
)
def test_what_is_asked_for_is_done(given: str, n_gpus: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(n_gpus, monkeypatch)
    monkeypatch.setenv("HARKEN_LAUNCH", given)
    assert launch.how_many(128, True, never) == size


@pytest.mark.parametrize(
    ("given", "n_gpus", "told"),
    [
        ("torchrun", 0, "no GPU to be seen. Say how many processes: HARKEN_LAUNCH=torchrun:2"),
        ("torchrun:8", 2, "HARKEN_LAUNCH=torchrun:8, but this machine shows 2 GPUs"),
        ("torchrun:0", 2, "expected torchrun:N with a whole number"),
        ("torchrun:x", 2, "expected torchrun:N with a whole number"),
        ("alone:2", 2, "expected torchrun:N with a whole number"),
        ("torchrn", 2, "HARKEN_LAUNCH: unknown name 'torchrn'. Did you mean 'torchrun'"),
    ],
)
def test_what_cannot_be_done_is_refused(given: str, n_gpus: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(n_gpus, monkeypatch)
    monkeypatch.setenv("HARKEN_LAUNCH", given)
    with pytest.raises(ConfigError, match=told.replace("?", r"\?")):
        launch.how_many(128, True, never)


@pytest.mark.parametrize("given", ["-1", "few", "1.5"])
def test_a_bad_number_of_restarts_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARKEN_MAX_RESTARTS", given)
    with pytest.raises(ConfigError, match=f"HARKEN_MAX_RESTARTS='{given}': expected a whole number"):
        launch.max_restarts()


STEP = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}


def test_a_step_of_several_tasks_is_a_group() -> None:
    env = dict(STEP)
    launch.join_step(env)
    assert (env["WORLD_SIZE"], env["RANK"], env["LOCAL_RANK"], env["MASTER_ADDR"]) == ("8", "5", "1", "gpu007")
    other = {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    launch.join_step(other)
    assert other["MASTER_PORT"] == env["MASTER_PORT"]
    next_step = {**STEP, "SLURM_STEP_ID": "3"}
    launch.join_step(next_step)
    assert next_step["MASTER_PORT"] != env["MASTER_PORT"]
    assert 1024 < int(env["MASTER_PORT"]) < 32_768


@pytest.mark.parametrize(
    ("visible", "local_rank"), [("0", "0"), ("GPU-12ab", "0"), ("0,1", "1"), ("0,1,2,3", "1"), (None, "1")]
)
def test_a_task_that_sees_one_gpu_takes_that(visible: str | None, local_rank: str) -> None:
    env = STEP | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    launch.join_step(env)
    assert env["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize(
    "more",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"RANK": "0"},
        {"HARKEN_LAUNCH": "alone"},
    ],
)
def test_a_step_is_left_alone(more: dict[str, str]) -> None:
    env = STEP | more
    launch.join_step(env)
    assert env == STEP | more


def test_no_step_at_all() -> None:
    env: dict[str, str] = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}  # a batch script itself
    launch.join_step(env)
    assert "WORLD_SIZE" not in env


def test_what_was_set_by_hand_stays() -> None:
    env = STEP | {"MASTER_ADDR": "ib-gpu007", "MASTER_PORT": "5"}
    launch.join_step(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("ib-gpu007", "5")


@pytest.mark.parametrize("lacking", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST"])
def test_a_step_without_its_variables_is_refused(lacking: str) -> None:
    env = {k: v for k, v in STEP.items() if k != lacking}
    with pytest.raises(ConfigError, match=f"SLURM_STEP_NUM_TASKS=8, but {lacking} not set"):
        launch.join_step(env)


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("node1", ["node1"]),
        ("a,b", ["a", "b"]),
        ("gpu[1-3]", ["gpu1", "gpu2", "gpu3"]),
        ("gpu[01-03,7]", ["gpu01", "gpu02", "gpu03", "gpu7"]),
        ("gpu[008-011]", ["gpu008", "gpu009", "gpu010", "gpu011"]),
        ("a[1-2],b3,c[5]", ["a1", "a2", "b3", "c5"]),
        ("rack[1-2]n[0-1]", ["rack1n0", "rack1n1", "rack2n0", "rack2n1"]),
        ("dgx-a[1,3]-ib.cluster", ["dgx-a1-ib.cluster", "dgx-a3-ib.cluster"]),
    ],
)
def test_slurms_short_form(nodelist: str, names: list[str]) -> None:
    assert launch.hosts(nodelist) == names


@pytest.mark.parametrize("nodelist", ["", "a[1-", "a[3-1]", "a[x]", "a,,b", "a[1-2]]", "a[]"])
def test_what_is_no_list_of_nodes_is_refused(nodelist: str) -> None:
    with pytest.raises(ConfigError, match="SLURM's list of nodes"):
        launch.hosts(nodelist)


def told(folder: Path, start: int, rank: int, error: HarkenError, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HARKEN_TOLD": folder, "RANK": rank, "TORCHELASTIC_RESTART_COUNT": start}.items():
        monkeypatch.setenv(name, str(value))
    assert launch.tell(error)


def test_of_what_several_say_the_reason_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch._told(tmp_path) is None
    told(tmp_path, 0, 0, HarkenError("another process has ended"), monkeypatch)
    told(tmp_path, 0, 1, TransientError("disk full"), monkeypatch)
    error = launch._told(tmp_path)
    assert (type(error), str(error)) == (TransientError, "disk full")
    told(tmp_path, 1, 0, DataError("no such shard"), monkeypatch)
    told(tmp_path, 1, 1, HarkenError("another process has ended"), monkeypatch)
    error = launch._told(tmp_path)
    assert (type(error), str(error)) == (DataError, "no such shard")
    told(tmp_path, 2, 0, ClipError("qc.silent", "x"), monkeypatch)
    assert type(launch._told(tmp_path)) is HarkenError


def test_who_was_not_started_with_others_says_it_itself() -> None:
    assert not launch.tell(HarkenError("x"))


@pytest.mark.parametrize(("of", "status"), [("our", 0), ("other", 1)])
def test_who_lost_its_torchrun_before_it_was_bound_to_it_ends(of: str, status: int) -> None:
    grandparent = {"our": os.getppid(), "other": 1 if os.getppid() != 1 else 2}[of]
    code = "import os; from harken import launch; launch.check_parent(); os._exit(0)"
    env = {**os.environ, "HARKEN_LAUNCHER": str(grandparent), "RANK": "0"}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == status


def fake_torchrun(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """In torchrun's place, a process that does this."""
    real = subprocess.Popen

    def start(command: list[str], **how: object) -> object:
        assert command[1:3] == ["-m", "torch.distributed.run"]
        return real([command[0], "-c", code], **how)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", start)


REFUSE = """
import json, os, sys, time
open(os.path.join(os.environ["HARKEN_TOLD"], "00000-00000.json"), "w").write(
    json.dumps({"kind": KIND, "message": "so it is"}))
time.sleep(SLEEP)
sys.exit(1)
"""


@pytest.mark.parametrize(
    ("kind", "sleep_s", "raised"),
    [("ConfigError", 60, ConfigError), ("DataError", 60, DataError), ("TransientError", 1, TransientError)],
)
def test_what_no_restart_mends_ends_them_at_once(
    kind: str, sleep_s: int, raised: type[HarkenError], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_torchrun(monkeypatch, REFUSE.replace("KIND", repr(kind)).replace("SLEEP", str(sleep_s)))
    with pytest.raises(raised, match="so it is"):
        launch.together("pretrain", 2)


def test_deaths_without_a_word_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torchrun(monkeypatch, "import sys; sys.exit(1)")
    with pytest.raises(HarkenError, match=r"a process of the 2 .* 3 new starts did not help .* HARKEN_LAUNCH=alone"):
        launch.together("pretrain", 2)


def test_all_went_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = tmp_path / "env"
    fake_torchrun(monkeypatch, f"import os; open({str(seen)!r}, 'w').write(repr(dict(os.environ)))")
    monkeypatch.setenv("HARKEN_LAUNCH", "torchrun:2")
    launch.together("pretrain", 2)
    env = eval(seen.read_text())
    assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert "HARKEN_LAUNCH" not in env  # or each of them would start others
