"""Clips that somebody already has: a local folder of recordings or of cut clips."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from harken.clips import Clip
from harken.errors import ClipError, DataError
from harken.media.containers import open_media
from harken.media.importing import Holdings
from harken.media.section import SILENCE_DBFS, Section, cut

_SAME_LENGTH_S: Final = 0.5


class FolderFetcher:
    """Reads clips from the media files under `root`, subfolders included, in any of `importing.LAYOUTS`.

    The files are listed once; where `harken import` left its index in `root`, that is read instead and the files stay
    where they are. A file named by the video's id alone is taken for the clip where it lasts as long as the clip
    (within 0.5 s) and is too short to hold the clip's place in the video.

    Raises DataError where `root` is no folder or an indexed folder is not there.
    """

    def __init__(self, root: Path | str, *, silence_dbfs: float = SILENCE_DBFS) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{self.root}: no such folder of media. Set it to the folder that holds the recordings.")
        self._silence_dbfs = silence_dbfs
        self._holdings = Holdings.of(self.root)

    def fetch(self, clip: Clip, needs_images: bool) -> Section:
        """The clip's section. Raises ClipError: `folder.absent`, and all that `cut` raises."""
        found = self._holdings.best(clip, needs_images)
        if found is None:
            raise ClipError("folder.absent", f"no file for {clip.source.key!r} in the folder")
        path, is_cut = found
        length_s = None if clip.end_s is None else clip.end_s - clip.start_s
        try:
            if is_cut or (clip.end_s is not None and length_s and _is_the_clip(path, clip.end_s, length_s)):
                return self._cut(path, 0.0, length_s, needs_images)
            return self._cut(path, clip.start_s, clip.end_s, needs_images)
        except FileNotFoundError:
            raise ClipError("folder.absent", f"the file for {clip.source.key!r} was listed and is gone") from None

    def _cut(self, path: Path, start_s: float, end_s: float | None, needs_images: bool) -> Section:
        with path.open("rb") as file:
            return cut(file, start_s, end_s, needs_images, silence_dbfs=self._silence_dbfs)


def _is_the_clip(path: Path, end_s: float, length_s: float) -> bool:
    """Whether a file is the clip itself rather than the video it comes from, by its length."""
    with path.open("rb") as file, open_media(file) as container:
        if not container.duration:
            return False
        duration_s = container.duration / 1e6
    return duration_s < end_s - _SAME_LENGTH_S and abs(duration_s - length_s) <= _SAME_LENGTH_S
