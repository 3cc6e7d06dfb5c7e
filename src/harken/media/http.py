"""Clips whose recordings lie on a plain HTTP server or mirror, one file each."""

from __future__ import annotations

from dataclasses import replace
from typing import Final
from urllib.parse import quote

from harken.clips import Clip
from harken.errors import ClipError, ConfigError
from harken.media.range_reader import RangeReader, Traffic, accounted
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
        archive, key = clip.source.archive, clip.source.key
        if key in ("", ".", "..") or archive in (".", ".."):  # quoting leaves these as they are: they name a folder
            raise ClipError("local.bug", f"archive {archive!r}, key {key!r}: expected the name of a file")
        url = _filled(self.url, quote(archive, safe=""), quote(key, safe=""))
        traffic = Traffic()
        with accounted(traffic, {}), RangeReader(url, timeout_s=self._timeout_s, traffic=traffic) as reader:
            found = cut(reader, clip.start_s, clip.end_s, needs_images, silence_dbfs=self._silence_dbfs)
        return replace(found, facts=found.facts | traffic.facts)


def _filled(url: str, archive: str, key: str) -> str:
    for field, value in zip(_FIELDS, (archive, key), strict=True):
        url = url.replace(field, value)
    return url
