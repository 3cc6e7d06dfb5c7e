"""The scripts for SLURM, run as they are with a `srun` that starts each task on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from processes import lives, until

DEPLOY = Path(__file__).parents[1] / "deploy" / "slurm"
SCRIPTS = sorted(DEPLOY.glob("*.sbatch"))
SRUN = """#!/bin/bash
# what SLURM gives to each task of a step
set -u
while [[ "$1" == --* ]]; do shift; done
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; (sleep 3; kill -KILL "${pids[@]}" 2>/dev/null) &' TERM INT
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_STEP_NUM_TASKS=$SLURM_NTASKS SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_ID=0 \\
        SLURM_STEP_NODELIST=localhost "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"""
DVC = """#!{python}
import os, pathlib, sys, time
sys.path.insert(0, {tests!r})
import engine_toys
from harken.engines import engine
if __name__ == "__main__":
    told = sorted(engine(pathlib.Path(".work"))(engine_toys.pid_of, "", range(8), devices=[]))
    print("dvc", *sys.argv[1:], "workers", len(set(told)), os.environ["HARKEN_ENGINE"].startswith("dask+tcp://"))
    pathlib.Path("reached").touch()
    time.sleep(float(os.environ.get("LAST_S", "0")))
"""


def test_there_are_scripts() -> None:
    assert [p.name for p in SCRIPTS] == ["dask.sbatch", "train.sbatch"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_is_one_that_bash_and_slurm_read(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    asked = [i for i, line in enumerate(lines) if line.startswith("#SBATCH --")]
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert asked
    assert max(asked) < first, "SLURM reads no #SBATCH after the first command"
    assert lines[first] == "set -euo pipefail"


def project(root: Path) -> dict[str, str]:
    """A folder with SLURM's and DVC's commands as they look to a script."""
    commands = root / "bin"
    commands.mkdir()
    tests = str(Path(__file__).parent)
    for name, text in {"srun": SRUN, "dvc": DVC.format(python=sys.executable, tests=tests)}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    sources = os.pathsep.join([tests, str(Path(__file__).parents[1] / "src")])
    return {**os.environ, "PATH": path, "PYTHONPATH": sources, "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}


def of(root: Path) -> list[psutil.Process]:
    """Living processes that work in the folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(root) and lives(process):
                found.append(process)
    return found


def is_left(root: Path) -> bool:
    """Whether nobody works in the folder any more, after some seconds at most."""
    return until(lambda: not of(root), 15, every_s=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("gpus", ["", "1"])
def test_a_job_of_dask_workers(gpus: str, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    env = project(tmp_path) | ({"SLURM_GPUS_PER_TASK": gpus, "HARKEN_DEVICE": "cuda"} if gpus else {})
    script = ["bash", str(DEPLOY / "dask.sbatch"), "embed", "train"]
    done = subprocess.run(script, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "dvc repro embed train workers" in done.stdout
    assert done.stdout.rstrip().endswith("True")
    assert is_left(tmp_path)
    assert not list((tmp_path / ".work").iterdir())


@pytest.mark.slow
def test_a_job_that_is_cancelled_leaves_nobody(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    env = project(tmp_path) | {"LAST_S": "100"}
    job = subprocess.Popen(
        ["bash", str(DEPLOY / "dask.sbatch")], cwd=tmp_path, env=env, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        assert until((tmp_path / "reached").exists, 60)
        os.killpg(job.pid, signal.SIGTERM)  # scancel tells every process of a step
        assert job.wait(30) != 0
        assert is_left(tmp_path)
    finally:
        for process in of(tmp_path):
            process.kill()
