"""`python -m harken.stages NAME`: what DVC runs. One process at a time per stage and preset; dies with its parent."""

from __future__ import annotations

import fcntl
import logging
import os
import sys

from harken.config import Paths, load
from harken.engines import ONE_THREAD, die_with_parent, engine, n_started
from harken.errors import ConfigError, HarkenError

TOGETHER = ("pretrain", "finetune")  # the stages whose runs several processes can train together, under torchrun


def main(name: str) -> int:
    """Run one stage. Exit status 0 on success, 1 with a message on stderr where harken refuses."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if "HARKEN_THREADS" not in os.environ:
        os.environ.update(ONE_THREAD)  # before torch and NumPy are imported: the same bytes for any number of workers
    die_with_parent()
    try:
        from harken.stages import STAGES, config_class, stage

        if n_started() > 1:
            _check_company(name in TOGETHER or name not in STAGES, name)
        module = stage(name)
        paths, cfg = load("paths", Paths), load(name, config_class(name))
        paths.work.mkdir(parents=True, exist_ok=True)
        if n_started() > 1 and os.environ["RANK"] != "0":  # the first of the processes holds the lock for all
            logging.getLogger().setLevel(logging.WARNING)
            module.run(paths, cfg, engine())
            return 0
        with open(paths.work / f"{name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"harken: stage {name} is already running on {paths.work}; waiting for it.", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            module.run(paths, cfg, engine())
    except HarkenError as e:
        print(f"harken: {e}", file=sys.stderr)
        return 1
    return 0


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
