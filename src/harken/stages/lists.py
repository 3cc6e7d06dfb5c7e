"""Stage `lists`: the official metadata lists at hand, unchanged, with their hashes.

Where they come from is the preset's choice: files of the built-in world, URLs of the official hosts, or your folder.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from harken.config import Config, Paths
from harken.engines import Map
from harken.errors import ConfigError, DataError
from harken.progress import track
from harken.shards import atomic, code_version, file_sha256, fingerprint, publish, write_json
from harken.world import WorldConfig, build

log = logging.getLogger("harken")
CODE = ("stages/lists.py", "world")
TIMEOUT_S = 60.0


class ListFile(Config):
    """One list: `source` is a URL or a path (relative to the project's root).

    `checksum` is `sha256:` or `md5:` and the hexadecimal digits (Zenodo publishes the latter); null: not checked.
    """

    source: str
    checksum: str | None = Field(pattern=r"^(sha256:[0-9a-f]{64}|md5:[0-9a-f]{32})$")


class ListsConfig(Config):
    """`world` generates the built-in corpus (null: none); `files` maps names under `paths.lists` to their sources."""

    world: WorldConfig | None
    files: dict[str, ListFile] = Field(...)


def run(paths: Paths, cfg: ListsConfig, map: Map) -> None:
    """Fill `paths.lists`. Raises ConfigError where no world and no file is asked for, DataError on a wrong hash."""
    if cfg.world is None and not cfg.files:
        raise ConfigError("params.yaml: lists: nothing to do. Give `world` a section, or name files under `files`.")
    work = paths.work / "lists"
    if cfg.world is not None:
        work = work / fingerprint(cfg.world.model_dump(), code_version(CODE))
        build(work, cfg.world, partial(_spread, map))
    for name, file in cfg.files.items():
        _obtain(work / name, file)
    hashes = {p.relative_to(work).as_posix(): file_sha256(p) for p in sorted(work.rglob("*.csv*"))}
    write_json(work / "lists.json", hashes)
    publish(work, paths.lists, [p.name for p in sorted(work.iterdir())])
    log.info("lists: %d files in %s", len(hashes), paths.lists)


def _constant(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return fn


def _spread(map: Map, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`fn` over `items` on the engine; the shape of a plain `map`, which is all that the world asks for."""
    items = list(items)
    return track(map(_constant, fn, items), len(items), "recordings")


def _obtain(target: Path, file: ListFile) -> None:
    if target.is_file() and file.checksum is not None and _checksum(target, file.checksum) == file.checksum:
        return
    if "://" in file.source:
        _download(file.source, target)
    else:
        source = Path(file.source)
        if not source.is_file():
            raise DataError(f"{source}: no such list. Check `lists.files.{target.name}.source` in params.yaml.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as f, atomic(target) as out:
            shutil.copyfileobj(f, out)
    if file.checksum is None:
        return
    found = _checksum(target, file.checksum)
    if found != file.checksum:
        target.unlink()
        raise DataError(
            f"{file.source}: {found}, expected {file.checksum}. A truncated mirror or another release? "
            "Get the official file, or set the checksum in params.yaml if you mean this one."
        )


def _checksum(path: Path, like: str) -> str:
    """The file's checksum by the same algorithm as `like`."""
    name = like.partition(":")[0]
    with open(path, "rb") as f:
        return f"{name}:{hashlib.file_digest(f, name).hexdigest()}"


@retry(
    retry=retry_if_exception_type((urllib.error.URLError, TimeoutError, ConnectionError)),
    stop=stop_after_attempt(4),
    wait=wait_exponential_jitter(1, 20),
    reraise=True,
)
def _fetch(url: str, target: Path) -> None:
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, atomic(target) as out:
        while block := response.read(1 << 20):
            digest.update(block)
            out.write(block)


def _download(url: str, target: Path) -> None:
    try:
        _fetch(url, target)
    except (OSError, ValueError) as e:
        raise DataError(
            f"{url}: cannot be fetched ({e}). Put the file in place by hand and name its path instead."
        ) from None
