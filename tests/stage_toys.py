"""Stages that tests run as `python -m harken.stages` does, under the name `stats`: in place of its module.

As a script it runs one of them: `stage_toys.py NAME`. A module of its own, because workers must be able to import it.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from harken.config import Config, Paths
from harken.engines import Map
from harken.errors import DataError, TransientError
from harken.progress import track
from harken.shards import atomic, publish, write_json

log = logging.getLogger("harken")
NAME = "stats"


class StatsConfig(Config):
    n: int


def worker(cfg: StatsConfig) -> Callable[[tuple[int, str]], int]:
    log.info("made")
    return work


def work(item: tuple[int, str]) -> int:
    log.info("at work")
    return item[0]


def counts(paths: Paths, cfg: StatsConfig, map: Map) -> None:
    """A fan-out over shards, and its result."""
    items = [(i, "mark") for i in range(cfg.n)]
    found = sorted(track(map(worker, cfg, items), len(items), "stats: shards"))
    write_json(paths.work / NAME / "stats.json", found)
    publish(paths.work / NAME, paths.stats, ["stats.json"])
    log.info("counted %d", len(found))


def refuses(paths: Paths, cfg: StatsConfig, map: Map) -> None:
    raise DataError("data/x: no such shard. Make it.")


def gives_up(paths: Paths, cfg: StatsConfig, map: Map) -> None:
    raise TransientError("the cluster is gone. Start it and try again.")


def mistaken(paths: Paths, cfg: StatsConfig, map: Map) -> None:
    for _ in track(range(2), 2, "stats: shards"):
        pass
    raise KeyError("oh")


def fills_the_disk(paths: Paths, cfg: StatsConfig, map: Map) -> None:
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some.npy")
    except OSError:
        raise RuntimeError("a library's own words") from None


def is_killed(paths: Paths, cfg: StatsConfig, map: Map) -> None:
    for i in track(range(3), 3, "stats: shards"):
        if i == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def is_interrupted(paths: Paths, cfg: StatsConfig, map: Map) -> None:
    raise KeyboardInterrupt


def waits(paths: Paths, cfg: StatsConfig, map: Map) -> None:
    """Two items are done at once, the third takes until the file `go` is there."""
    go = paths.work / "go"
    for i in track(range(4), 4, "stats: shards"):
        while i == 2 and not go.exists():
            time.sleep(0.02)
        time.sleep(0.01)


def writer(folder: str) -> Callable[[int], int]:
    return partial(write, Path(folder))


def write(folder: Path, shard: int) -> int:
    with atomic(folder / f"{shard:05d}.parquet") as f:
        f.write(os.urandom(1_000_000))
    return shard


def fills(paths: Paths, cfg: StatsConfig, map: Map) -> None:
    """Shards of a megabyte each; says which it has made."""
    folder = paths.work / NAME
    folder.mkdir(parents=True, exist_ok=True)
    todo = [i for i in range(cfg.n) if not (folder / f"{i:05d}.parquet").exists()]
    for shard in track(map(writer, str(folder), todo), len(todo), "stats: shards"):
        log.info("made %d", shard)
    publish(folder, paths.stats, [p.name for p in sorted(folder.iterdir())])


def run(name: str) -> int:
    """Run one of the above as the stage `stats`; its exit status."""
    import harken.stages
    from harken.stages.__main__ import main

    module: Any = ModuleType(NAME)
    module.run = globals()[name]
    known = harken.stages.stage, harken.stages.config_class
    harken.stages.stage, harken.stages.config_class = lambda _: module, lambda _: StatsConfig
    try:
        return main(NAME)
    finally:
        harken.stages.stage, harken.stages.config_class = known


def write_params(root: Path, n: int = 3) -> Paths:
    """A params.yaml under `root` for the toys, and its paths."""
    from ruamel.yaml import YAML

    folders = {name: f"data/{name}" for name in Paths.model_fields} | {"work": ".work/toy"}
    with open(root / "params.yaml", "w") as f:
        YAML(typ="safe", pure=True).dump({"paths": folders, NAME: {"n": n}}, f)
    return Paths(**{name: root / folder for name, folder in folders.items()})


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
