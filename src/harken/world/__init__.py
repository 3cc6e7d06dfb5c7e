"""The built-in corpus: planted-truth recordings, captions and lists in the official formats, and a host on loopback.

Everything a real corpus does is there in small: real encoders, official lists with their quirks, videos that are
private, removed, blocked or broken. And, unlike a real corpus, the truth: what sounds when, and whether it is shown.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from harken.errors import DataError
from harken.world.corpus import WorldConfig, make_recording, plan, write_lists
from harken.world.records import Record
from harken.world.server import write_watch_index
from harken.world.truth import write_truth

__all__ = ["WorldConfig", "build"]

VERSION = 1  # raise it when the same config makes other bytes: media of another version are not kept
_RECIPE = "recipe.json"


def build(
    out: Path, cfg: WorldConfig, map_items: Callable[[Callable[[Record], None], Iterable[Record]], Iterable[Any]]
) -> None:
    """Fill `out` with audioset/, audiocaps/, clotho/ (lists), host/ (media and watch pages) and truth.json.

    `map_items` is any map: the built-in one, a process pool's, an engine's. Media that are there already are kept, so a
    killed build resumes; media of another config are removed first. truth.json comes last: its presence means that all
    is there. Raises DataError where host/ holds files that no build made.
    """
    host = out / "host"
    recipe = json.dumps({"version": VERSION, **cfg.model_dump()}, sort_keys=True, indent=1) + "\n"
    mark = host / _RECIPE
    truth = out / "truth.json"
    truth.unlink(missing_ok=True)
    if host.exists() and not (mark.is_file() and mark.read_text() == recipe):
        if not mark.is_file() and any(host.iterdir()):
            raise DataError(f"{host}: holds files that no build made. Give another folder, or empty it.")
        shutil.rmtree(host)
    host.mkdir(parents=True, exist_ok=True)
    mark.write_text(recipe)
    records = plan(cfg)
    write_lists(records, out)
    write_watch_index(records, host)
    for _ in map_items(partial(make_recording, host_dir=host), records):
        pass
    for leftover in host.rglob(".*.part"):  # of a build that was killed
        leftover.unlink()
    write_truth(records, cfg, truth)
