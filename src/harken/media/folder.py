"""Clips that somebody already has: a local folder of recordings or of cut clips."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from harken.clips import Clip
from harken.errors import ClipError, DataError
from harken.media.containers import open_media
from harken.media.section import SILENCE_DBFS, Section, cut

# In order of preference where one id has several files: those with pictures first.
_PICTURES: Final = (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".flv", ".ts", ".3gp")
_SOUND: Final = (".wav", ".flac", ".m4a", ".opus", ".ogg", ".mp3", ".aac")
_KNOWN: Final = {ext: rank for rank, ext in enumerate((*_PICTURES, *_SOUND))}
# An id may itself hold '_' and begin with '-': it is the first 11 characters, never what precedes an underscore.
_NAME: Final = re.compile(r"(?P<id>[A-Za-z0-9_-]{11})(?:_(?P<start>\d+(?:\.\d+)?))?\Z")
_SAME_LENGTH_S: Final = 0.5
_PARTS: Final = ("development", "validation", "evaluation")


class FolderFetcher:
    """Reads clips from the files under `root`, which are listed once. Layouts, side by side if need be:

    * `<youtube id>.<ext>`: the whole video, or the clip already cut. It is taken for the clip where it lasts as long as
    the
      clip (within 0.5 s) and is too short to hold the clip's place in the video.
    * `<youtube id>_<start in s>.<ext>`: the clip that starts there, already cut.
    * Clotho's exact file names, in `root` or in its folder `development`, `validation` or `evaluation`.

    Raises DataError where `root` is no folder.
    """

    def __init__(self, root: Path | str, *, silence_dbfs: float = SILENCE_DBFS) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{self.root}: no such folder of media. Set it to the folder that holds the recordings.")
        self._silence_dbfs = silence_dbfs
        self._named: dict[tuple[str, str], Path] = {}
        self._videos: dict[tuple[str, int | None], Path] = {}
        for part in ("", *_PARTS):
            for path in _files(self.root / part):
                self._add(part, path)

    def fetch(self, clip: Clip, needs_images: bool) -> Section:
        """The clip's section. Raises ClipError: `folder.absent`, and all that `cut` raises."""
        if clip.source.host != "youtube":
            part = clip.source.archive.rpartition("_")[2]
            path = self._named.get((part, clip.source.key)) or self._named.get(("", clip.source.key))
            if path is None:
                raise ClipError("folder.absent", f"no file named {clip.source.key!r} in the folder")
            return self._cut(path, clip.start_s, clip.end_s, needs_images)
        start_ms = round(clip.start_s * 1000)
        ready = self._videos.get((clip.source.key, start_ms))
        path = ready or self._videos.get((clip.source.key, None))
        if path is None:
            raise ClipError("folder.absent", f"no {clip.source.key}.* in the folder")
        if clip.end_s is None:
            return self._cut(path, 0.0 if ready else clip.start_s, None, needs_images)
        length_s = clip.end_s - clip.start_s
        if ready or _is_the_clip(path, clip.end_s, length_s):
            return self._cut(path, 0.0, length_s, needs_images)
        return self._cut(path, clip.start_s, clip.end_s, needs_images)

    def _cut(self, path: Path, start_s: float, end_s: float | None, needs_images: bool) -> Section:
        with path.open("rb") as file:
            return cut(file, start_s, end_s, needs_images, silence_dbfs=self._silence_dbfs)

    def _add(self, part: str, path: Path) -> None:
        self._named[part, path.name] = path
        match = _NAME.match(path.stem)
        if match is None or part:
            return
        start_ms = None if match["start"] is None else round(float(match["start"]) * 1000)
        key = (match["id"], start_ms)
        best = self._videos.get(key)
        if best is None or _rank(path) < _rank(best):
            self._videos[key] = path


def _files(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        with os.scandir(folder) as entries:
            found = [e.name for e in entries if e.is_file() and Path(e.name).suffix.lower() in _KNOWN]
        for name in sorted(found):
            yield folder / name


def _rank(path: Path) -> int:
    return _KNOWN[path.suffix.lower()]


def _is_the_clip(path: Path, end_s: float, length_s: float) -> bool:
    """Whether a file is the clip itself rather than the video it comes from, by its length."""
    with path.open("rb") as file, open_media(file) as container:
        if not container.duration:
            return False
        duration_s = container.duration / 1e6
    return duration_s < end_s - _SAME_LENGTH_S and abs(duration_s - length_s) <= _SAME_LENGTH_S
