"""Clips whose recordings lie on a plain HTTP server or mirror, one file each."""

from __future__ import annotations

from typing import Final
from urllib.parse import quote

from harken.clips import Clip
from harken.errors import ConfigError
from harken.media.range_reader import RangeReader
from harken.media.section import SILENCE_DBFS, Section, cut

_FIELDS: Final = ("{archive}", "{key}")


class HttpFetcher:
    """Fetches `url` with `{archive}` and `{key}` replaced by the clip's, percent-quoted (Clotho's names hold '#' and ',
    ').

    HttpFetcher("https://mirror.example.org/clotho/{archive}/{key}", timeout_s=20)
    """

    def __init__(self, url: str, *, timeout_s: float, silence_dbfs: float = SILENCE_DBFS) -> None:
        if "{key}" not in url or "{" in _filled(url, "", ""):
            raise ConfigError(
                f"url {url!r}: expected an address with {{key}} and perhaps {{archive}}, and no other braces."
            )
        self.url = url
        self._timeout_s = timeout_s
        self._silence_dbfs = silence_dbfs

    def fetch(self, clip: Clip, needs_images: bool) -> Section:
        """The clip's section. Raises ClipError: `media.404` and its kin, `net.*`, and all that `cut` raises."""
        url = _filled(self.url, quote(clip.source.archive, safe=""), quote(clip.source.key, safe=""))
        with RangeReader(url, timeout_s=self._timeout_s) as reader:
            return cut(reader, clip.start_s, clip.end_s, needs_images, silence_dbfs=self._silence_dbfs)


def _filled(url: str, archive: str, key: str) -> str:
    for field, value in zip(_FIELDS, (archive, key), strict=True):
        url = url.replace(field, value)
    return url
