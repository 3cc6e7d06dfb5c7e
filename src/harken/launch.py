"""Who trains: one process, or several that torchrun or srun starts to train each run together.

torchrun's own environment is used where it is there, and srun's where its step has several tasks. Else HARKEN_LAUNCH
says: `auto` (default: torchrun over this machine's GPUs where there are several and fewer runs are left than GPUs;
otherwise runs go side by side, one on each GPU), `alone`, `torchrun` (over all GPUs) or `torchrun:N` (N processes). A
process that dies is started again from the last checkpoint, with all others, HARKEN_MAX_RESTARTS times (default 3).

What the processes learn is what one would have learnt (see `training.distributed`), so this is no tracked param.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final

from harken import errors
from harken.engines import bind_to
from harken.errors import ConfigError, DataError, HarkenError, TransientError, unknown
from harken.shards import write_json

log = logging.getLogger("harken")
MODES: Final = ("auto", "alone", "torchrun")
TOLD = "HARKEN_TOLD"  # set by `together` for the processes that it starts: where they leave what they cannot do
STARTED_BY = "HARKEN_LAUNCHER"  # its process
LOOK_S, GRACE_S = 0.2, 10.0
NEVER = (ConfigError, DataError)  # no restart will mend these


def mode(given: str) -> tuple[str, int | None]:
    """What HARKEN_LAUNCH asks for, and of `torchrun:N` the number. Raises ConfigError for anything else."""
    name, colon, number = (given or "auto").partition(":")
    if name not in MODES:
        raise unknown("HARKEN_LAUNCH", name, [*MODES, "torchrun:N"])
    if not colon:
        return name, None
    if name != "torchrun" or not number.isdigit() or int(number) < 1:
        raise ConfigError(f"HARKEN_LAUNCH={given!r}: expected torchrun:N with a whole number of processes, 1 or more.")
    return name, int(number)


def how_many(batch: int, is_divisible: bool, n_left: Callable[[], int]) -> int:
    """How many processes are to train each run of this stage together; 1: this one does, or its engine's workers.

    `batch` is what they share among them. `is_divisible`: whether what is learnt is the same for any number of them;
    `n_left` tells how many runs are left and is asked only where it matters.

    Raises ConfigError where HARKEN_LAUNCH asks for what this machine has not.
    """
    from harken.training.runs import devices  # imports torch

    asked, number = mode(os.environ.get("HARKEN_LAUNCH", ""))
    n_gpus = len(devices())
    if asked == "alone":
        return 1
    if asked == "torchrun":
        if number is None and n_gpus == 0:
            raise ConfigError(
                "HARKEN_LAUNCH=torchrun: no GPU to be seen. Say how many processes: HARKEN_LAUNCH=torchrun:2."
            )
        if number is not None and 0 < n_gpus < number:
            raise ConfigError(
                f"HARKEN_LAUNCH=torchrun:{number}, but this machine shows {n_gpus} GPUs, one for a process."
            )
        return number or n_gpus
    if n_gpus < 2 or (os.environ.get("HARKEN_ENGINE") or "local") != "local":
        return 1
    size = max(n for n in range(1, n_gpus + 1) if batch % n == 0)
    if not is_divisible or not 0 < n_left() < size:
        return 1
    log.info("fewer runs are left than GPUs: %d processes train each together (HARKEN_LAUNCH=alone: one)", size)
    return size


def together(stage: str, size: int) -> None:
    """Run a stage by `size` processes under torchrun, which starts them again where one dies.

    Raises what they raised, if that is one of harken's errors; a ConfigError or DataError ends them at once. Raises
    HarkenError where they died of something else, more often than HARKEN_MAX_RESTARTS.
    """
    restarts = max_restarts()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [sys.executable, *torchrun, "--max-restarts", str(restarts), "-m", "harken.stages", stage]
    with tempfile.TemporaryDirectory(prefix="harken-") as folder:
        env = {**os.environ, TOLD: folder, STARTED_BY: str(os.getpid())}
        # or those that are started again would meet at a store in which the dead ones' addresses still lie
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        env.pop("HARKEN_LAUNCH", None)
        bound = functools.partial(bind_to, os.getpid())
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, preexec_fn=bound)
        try:
            while _lives(process):
                if isinstance(error := _told(Path(folder)), NEVER):
                    raise error
        finally:
            _end(process)
        if process.returncode == 0:
            return
        if (error := _told(Path(folder))) is not None:
            raise error
    raise HarkenError(
        f"stage {stage}: a process of the {size} that trained together died, and {restarts} new starts did not help "
        "(HARKEN_MAX_RESTARTS). What it said is above; the last checkpoint is kept. Out of memory? With "
        "HARKEN_LAUNCH=alone one process trains."
    )


def max_restarts() -> int:
    """HARKEN_MAX_RESTARTS, 3 if unset. Raises ConfigError for what is no number."""
    given = os.environ.get("HARKEN_MAX_RESTARTS", "") or "3"
    if not given.isdigit():
        raise ConfigError(f"HARKEN_MAX_RESTARTS={given!r}: expected a whole number, 0 or more.")
    return int(given)


def _lives(process: subprocess.Popen[bytes]) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LOOK_S)
    return process.poll() is None


def _end(process: subprocess.Popen[bytes]) -> None:
    """torchrun ends its processes when it is asked to end; they end when it does, however that comes."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    if process.poll() is None:
        process.kill()
        process.wait()


def check_parent() -> None:
    """End this process if it is one that `together` started and torchrun died before it could be bound to it."""
    launcher = os.environ.get(STARTED_BY, "")
    if launcher and sys.platform == "linux" and "RANK" in os.environ:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
            if words[1] == launcher:
                return
        os._exit(1)


def tell(error: HarkenError) -> bool:
    """Leave the error to the process that started this one with others, which says it once for all; whether there is
    one."""
    folder = os.environ.get(TOLD, "")
    if not folder or "RANK" not in os.environ:
        return False
    name = f"{int(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')):05d}-{int(os.environ['RANK']):05d}.json"
    with contextlib.suppress(OSError):  # it has gone, and this process with it
        write_json(Path(folder) / name, {"kind": type(error).__name__, "message": str(error)})
        return True
    return False


def _told(folder: Path) -> HarkenError | None:
    """Of what the processes of the last start left, what matters most; the others may only have lost them."""
    found = sorted(folder.glob("*.json"))
    told = [json.loads(p.read_text()) for p in found if p.name[:5] == found[-1].name[:5]]
    made = [_error(**t) for t in told]
    rank = [*NEVER, TransientError]
    made.sort(key=lambda e: next((i for i, kind in enumerate(rank) if isinstance(e, kind)), len(rank)))
    return made[0] if made else None


def _error(kind: str, message: str) -> HarkenError:
    cls: Any = getattr(errors, kind, HarkenError)
    return cls(message) if issubclass(cls, HarkenError) and cls is not errors.ClipError else HarkenError(message)


def join_step(env: MutableMapping[str, str]) -> None:
    """Give processes that srun started together what torchrun would have given them, from srun's own variables.

    Nothing is changed where torchrun started them, where the step has one task, or HARKEN_LAUNCH is `alone`.

    Raises ConfigError where srun's variables are not all there.
    """
    asked, _ = mode(env.get("HARKEN_LAUNCH", ""))
    n = env.get("SLURM_STEP_NUM_TASKS", "1")
    if asked == "alone" or "WORLD_SIZE" in env or "RANK" in env or not n.isdigit() or int(n) < 2:
        return
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    numbers = {name: env.get(name, "") for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")}
    if lacking := [name for name, v in numbers.items() if not v.isdigit()] + ([] if nodes else ["SLURM_STEP_NODELIST"]):
        raise ConfigError(
            f"SLURM_STEP_NUM_TASKS={n}, but {', '.join(lacking)} not set: the processes cannot find each other. Start "
            "them with srun or torchrun, or set HARKEN_LAUNCH=alone."
        )
    env.update({"WORLD_SIZE": n, "RANK": numbers["SLURM_PROCID"], "LOCAL_RANK": _local_rank(env)})
    env.setdefault("MASTER_ADDR", hosts(nodes)[0])
    env.setdefault("MASTER_PORT", str(_port(int(numbers["SLURM_JOB_ID"]), env.get("SLURM_STEP_ID", ""))))


def _local_rank(env: Mapping[str, str]) -> str:
    """Which of the GPUs that it sees a process takes: with `srun --gpus-per-task=1` each sees its own alone."""
    sees_one = len(env.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    return "0" if sees_one else env["SLURM_LOCALID"]


def _port(job: int, step: str) -> int:
    """The same in all processes of a step, another for a job's next step; below those that systems give away."""
    return 12_000 + (31 * job + (int(step) if step.isdigit() else 0)) % 20_000


def hosts(nodelist: str) -> list[str]:
    """The hosts of SLURM's short form: `a[01-03,7],b` -> a01, a02, a03, a7, b.

    Raises ConfigError for what is no such list.
    """
    found: list[str] = []
    parts = re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist)
    if not parts or ",".join(parts) != nodelist:
        raise ConfigError(f"SLURM's list of nodes {nodelist!r}: not understood; set MASTER_ADDR to the first one.")
    for part in parts:
        names = [""]
        for fixed, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            names = [name + more for name in names for more in ([fixed] if fixed else _range(ranges, nodelist))]
        found += names
    return found


def _range(ranges: str, where: str) -> list[str]:
    """`01-03,7` -> 01, 02, 03, 7."""
    found: list[str] = []
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and (not last.isdigit() or int(last) < int(first))):
            raise ConfigError(f"SLURM's list of nodes {where!r}: [{ranges}] is not understood; set MASTER_ADDR.")
        found += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return found
