"""Clips whose recordings are members of a published archive: Clotho on Zenodo.

An archive is downloaded and unpacked once, by whichever worker comes first; then its members are cut like local files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Protocol, runtime_checkable
from urllib.parse import quote

from filelock import FileLock, Timeout

from harken.clips import Clip
from harken.errors import ClipError, ConfigError, DataError
from harken.media.section import SILENCE_DBFS, Section, cut
from harken.media.sevenzip import extract, index
from harken.media.transfer import BLOCK, Pace, download

__all__ = ["Published", "ZenodoFetcher", "download", "extract", "obtain_archive", "obtain_lists"]

log = logging.getLogger("harken")

_FIELDS: Final = ("{record}", "{archive}")


@runtime_checkable
class Published(Protocol):
    """A file as its authors publish it; a card's `OfficialFile` is one."""

    @property
    def name(self) -> str: ...

    @property
    def url(self) -> str: ...

    @property
    def md5(self) -> str: ...


class ZenodoFetcher:
    """Reads clips from the members of published 7z archives, kept under `cache`.

    `url` holds `{archive}` and perhaps `{record}` (from the clip's id); `md5` maps the archives' file names
    (`clotho_audio_development.7z`) to their MD5. Each archive is unpacked to a folder of its stem under `cache`; once
    that is there, the `.7z` beside it may be deleted.

    ZenodoFetcher("https://zenodo.org/records/{record}/files/{archive}.7z?download=1", cache=Path("data/zenodo"),
                  md5={f.name: f.md5 for f in card.files}, timeout_s=20)
    """

    def __init__(
        self,
        url: str,
        *,
        cache: Path | str,
        md5: Mapping[str, str],
        timeout_s: float,
        silence_dbfs: float = SILENCE_DBFS,
        pace: Pace | None = None,
    ) -> None:
        if "{archive}" not in url or "{" in _filled(url, "", ""):
            raise ConfigError(
                f"url {url!r}: expected an address with {{archive}} and perhaps {{record}}, and no other braces."
            )
        self.url = url
        self.cache = Path(cache)
        self._md5 = dict(md5)
        self._timeout_s = timeout_s
        self._silence_dbfs = silence_dbfs
        self._pace = pace or Pace()
        self._folders: dict[str, _Folder] = {}

    def fetch(self, clip: Clip, needs_images: bool) -> Section:
        """The clip's section.

        Raises ClipError: `media.404` where the archive has no member of that exact name, and all that `cut` raises.
        Raises DataError where the archive as a whole cannot be had: that is no clip's fault.
        """
        archive = clip.source.archive
        if archive not in self._folders:
            self._folders[archive] = self._obtain(clip)
        path = self._folders[archive].path(clip.source.key)
        if path is None:
            raise ClipError("media.404", f"{archive}.7z has no member named {clip.source.key!r}", where="media")
        with path.open("rb") as file:
            return cut(file, clip.start_s, clip.end_s, needs_images, silence_dbfs=self._silence_dbfs)

    def _obtain(self, clip: Clip) -> _Folder:
        archive = clip.source.archive
        if not archive or "/" in archive or archive.startswith("."):
            raise DataError(f"{clip.id}: its archive is {archive!r}, expected an archive's plain name.")
        folder = self.cache / archive
        if not folder.is_dir():
            name = f"{archive}.7z"
            if not self._md5.get(name):
                raise DataError(f"{name}: no md5 is known for it. Known: {', '.join(sorted(self._md5)) or 'none'}.")
            record = clip.id.removeprefix("zen:").partition("/")[0]
            url = _filled(self.url, quote(record, safe=""), quote(archive, safe=""))
            obtain_archive(url, folder, self._md5[name], timeout_s=self._timeout_s, pace=self._pace)
        return _Folder(folder)


def obtain_archive(
    url: str, folder: Path, md5: str, *, timeout_s: float, block_bytes: int = BLOCK, pace: Pace | None = None
) -> None:
    """The members of the 7z archive at `url` in `folder`, by way of `folder.7z`; nothing is done where it exists.

    Of several processes that ask at once, one works and the others wait. Raises DataError as `download` and `extract`
    do.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: another worker fetches it; waiting", folder.name)
        lock.acquire()
    try:
        if folder.is_dir():
            return
        archive = folder.with_name(f"{folder.name}.7z")
        download(url, archive, md5, timeout_s=timeout_s, block_bytes=block_bytes, pace=pace)
        extract(archive, folder)
    finally:
        lock.release()


def obtain_lists(
    folder: Path, files: Iterable[Published], *, timeout_s: float, pace: Pace | None = None
) -> dict[str, Path]:
    """Each of `files` in `folder` under its name, byte for byte as published. Name -> path.

    A copy that is there and right is kept, one that is wrong is replaced. Clotho's metadata lists are ISO-8859-1, its
    captions ASCII with the line ends of their split; nothing is converted. Raises DataError as `download` does.
    """
    pace = pace or Pace()
    found = {}
    for file in files:
        if "/" in file.name or file.name.startswith("."):
            raise DataError(f"{file.name!r}: expected a list's plain file name.")
        found[file.name] = download(file.url, folder / file.name, file.md5, timeout_s=timeout_s, pace=pace)
    return found


class _Folder:
    """An unpacked archive: members by their exact name, with or without the archive's own folders."""

    def __init__(self, folder: Path) -> None:
        self._root = folder
        self._sizes = index(folder)
        self._names: dict[str, str] = {}
        self._twice: set[str] = set()
        for name in self._sizes:
            base = name.rpartition("/")[2]
            if base in self._names:
                self._twice.add(base)
            self._names[base] = name

    def path(self, key: str) -> Path | None:
        """The file of member `key`; None where the archive has none. Raises DataError where the folder lost it."""
        if key in self._twice and key not in self._sizes:
            raise DataError(
                f"{self._root}: several members are named {key!r}; name the one that is meant with its folder."
            )
        name = key if key in self._sizes else self._names.get(key)
        if name is None:
            return None
        path = self._root / name
        if not path.is_file() or path.stat().st_size != self._sizes[name]:
            raise DataError(
                f"{path}: missing or not of {self._sizes[name]} bytes, though it was unpacked whole. Something changed"
                f" the folder: delete {self._root} and run again."
            )
        return path


def _filled(url: str, record: str, archive: str) -> str:
    for field, value in zip(_FIELDS, (record, archive), strict=True):
        url = url.replace(field, value)
    return url
