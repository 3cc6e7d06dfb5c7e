"""`python -m harken.stages NAME`: what DVC runs. One process at a time per stage and preset; dies with its parent.

Under `paths.work` a run leaves what people and flows ask of it: how far it is while it runs (`harken.progress`), what
it took (`harken.timings`) and, until it begins again, how it failed. DVC's own exit status tells none of it, so
`NAME.failed.json` has stage, run_id, status, is_transient, reason (the kind of error), message and ended_ms.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from harken import launch, logs, prometheus, space, timings
from harken.config import FOLDERS, Config, Paths, load
from harken.engines import ONE_THREAD, die_with_parent, engine, n_started
from harken.errors import REFUSED, ConfigError, HarkenError, TransientError, status_of
from harken.progress import watched
from harken.shards import write_json

log = logging.getLogger("harken")
TOGETHER = ("pretrain", "finetune")  # the stages whose runs several processes can train together, under torchrun


def main(name: str) -> int:
    """Run one stage. Exit status 0 on success; with a message on stderr 1 where harken refuses, 75 where trying again
    may help."""
    if "HARKEN_THREADS" not in os.environ:
        os.environ.update(ONE_THREAD)  # before torch and NumPy are imported: the same bytes for any number of workers
    die_with_parent()
    launch.check_parent()
    try:
        logs.begin(name)
        _run(name)
    except HarkenError as e:
        if not launch.tell(e):
            logs.refuse(str(e))
        return status_of(e)
    except Exception:
        if not logs.is_json():
            raise  # Python prints where
        log.critical("stage %s: a mistake in harken or in a library", name, exc_info=True)
        return REFUSED
    return 0


def _run(name: str) -> None:
    from harken.stages import STAGES, config_class, stage

    launch.join_step(os.environ)
    if n_started() > 1:
        _check_company(name in TOGETHER or name not in STAGES, name)
    module = stage(name)
    paths = load("paths", Paths)
    if n_started() > 1 and os.environ["RANK"] != "0":  # the first of the processes holds the lock for all
        logging.getLogger().setLevel(logging.WARNING)
        module.run(paths, load(name, config_class(name)), logs.telling(engine(paths.work)))
        return
    paths.work.mkdir(parents=True, exist_ok=True)
    with _alone(paths.work, name), _failure_told(paths, name):
        cfg = load(name, config_class(name))
        size = _size(module, paths, name, cfg)
        if size == 1:
            _run_told(module, paths, name, cfg)
            return
    with _failure_told(paths, name):  # the first of them takes the lock
        launch.together(name, size)


def _size(module: ModuleType, paths: Paths, name: str, cfg: Any) -> int:
    """How many processes are to train each run together. What is learnt is to be the same for any number of them."""
    if name not in TOGETHER or n_started() > 1:
        return 1
    is_divisible = getattr(cfg, "shards_at_once", None) is None
    return launch.how_many(cfg.batch, is_divisible, lambda: len(module.todo(paths, cfg, paths.work / name)[0]))


@contextlib.contextmanager
def _alone(work: Path, name: str) -> Iterator[None]:
    """While the block runs, no other process runs the stage on `work`."""
    with open(work / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logs.note(f"stage {name} is already running on {work}; waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _failure_told(paths: Paths, name: str) -> Iterator[None]:
    """Leaves `NAME.failed.json` where the block fails; a full disk is told as what it is, not by the write it met."""
    path = paths.work / f"{name}.failed.json"
    path.unlink(missing_ok=True)
    try:
        yield
    except Exception as e:
        error: Exception = e
        if space.is_of_full_disk(e):
            error = space.disk_full(e, name, paths.work, (getattr(paths, FOLDERS[name]), paths.ledger))
        facts = {
            "stage": name,
            "run_id": logs.run_id(),
            "status": status_of(error),
            "is_transient": isinstance(error, TransientError),
            "reason": "DiskFull" if error is not e else type(e).__name__,
            "message": str(error),
            "ended_ms": timings.now_ms(),
        }
        try:
            write_json(path, facts)
        except OSError as refused:  # the disk may be that full
            log.warning("%s: not written: %s", path, refused)
        if error is e:
            raise
        raise error from e


def _run_told(module: ModuleType, paths: Paths, name: str, cfg: Config) -> None:
    """Run the stage with its progress and its times told. However it ends, it is said."""
    out, run_id = getattr(paths, FOLDERS[name]), logs.run_id()
    told = prometheus.metrics(paths.work, name)
    run = timings.Run(paths.work, name, run_id)
    outcome, reason = "done", ""
    try:
        with watched(paths.work, name, run_id, told.update) as watch:
            module.run(paths, cfg, logs.telling(engine(paths.work)))
    except BaseException as e:
        outcome = "failed" if isinstance(e, Exception) else "stopped"
        reason = "DiskFull" if space.is_of_full_disk(e) else type(e).__name__
        raise
    finally:
        told.end(run.end(outcome, reason, watch.loops, out))


def _check_company(is_welcome: bool, name: str) -> None:
    """Raises ConfigError where the processes that were started together cannot run the stage."""
    if not is_welcome:
        raise ConfigError(
            f"stage {name} is one process's work, and {n_started()} were started together (WORLD_SIZE). Run it "
            f"without torchrun; with it run {' and '.join(TOGETHER)}."
        )
    if lacking := [v for v in ("RANK", "MASTER_ADDR", "MASTER_PORT") if v not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE={n_started()}, but {', '.join(lacking)} not set: each process would wait for the others "
            "without knowing where. Start them with torchrun, or unset WORLD_SIZE."
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m harken.stages NAME")
    sys.exit(main(sys.argv[1]))
