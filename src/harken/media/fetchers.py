"""The hosts that serve clips, by name.

A fetcher has one method, `fetch(clip, needs_images) -> Section`, and raises ClipError with a canonical reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from harken.clips import Clip
from harken.media.folder import FolderFetcher
from harken.media.http import HttpFetcher
from harken.media.section import Section
from harken.media.youtube import YouTubeFetcher
from harken.media.zenodo import ZenodoFetcher


class Fetcher(Protocol):
    """How the bytes of one host are reached."""

    def fetch(self, clip: Clip, needs_images: bool) -> Section:
        """The clip's section, proven to decode. Raises ClipError."""
        ...


FETCHERS: Final[dict[str, Callable[..., Fetcher]]] = {
    "youtube": YouTubeFetcher,
    "http": HttpFetcher,
    "folder": FolderFetcher,
    "zenodo": ZenodoFetcher,
}
