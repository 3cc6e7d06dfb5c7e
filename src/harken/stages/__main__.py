"""`python -m harken.stages NAME`: what DVC runs. One process at a time per stage and preset; dies with its parent."""

from __future__ import annotations

import fcntl
import logging
import os
import sys

from harken.config import Paths, load
from harken.engines import ONE_THREAD, die_with_parent, engine
from harken.errors import HarkenError


def main(name: str) -> int:
    """Run one stage. Exit status 0 on success, 1 with a message on stderr where harken refuses."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if "HARKEN_THREADS" not in os.environ:
        os.environ.update(ONE_THREAD)  # before torch and NumPy are imported: the same bytes for any number of workers
    die_with_parent()
    try:
        from harken.stages import config_class, stage

        module = stage(name)
        paths, cfg = load("paths", Paths), load(name, config_class(name))
        paths.work.mkdir(parents=True, exist_ok=True)
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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m harken.stages NAME")
    sys.exit(main(sys.argv[1]))
