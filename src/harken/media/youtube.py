"""Clips from YouTube: yt-dlp finds where the media lies, harken reads only the clip's bytes.

yt-dlp's own section download answers a cut body, a start past the end and a rate limit with a short file, a wrong one
or the same bare error; so it extracts and nothing else. Pacing is the caller's: one `fetch` is one video.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from harken.clips import Clip
from harken.errors import ClipError, ConfigError
from harken.media.range_reader import RangeReader
from harken.media.reasons import classify, normalise
from harken.media.section import SILENCE_DBFS, Section, cut

if TYPE_CHECKING:  # yt-dlp takes a second to import, which a worker that reads a folder should not pay
    from yt_dlp.extractor.common import InfoExtractor
    from yt_dlp.utils import DownloadError

WATCH_URL: Final = "https://www.youtube.com/watch?v={key}"
_PLAIN: Final = "[protocol~='^https?$']"  # no HLS, DASH fragments or SABR: they cannot be read by Range
# The smallest pictures of at least 240 lines and the best AAC track, no compressed-range copy; else one file with both;
# else whatever there is, so that a video without a sound track is known as such.
FORMATS: Final = (
    f"((wv*[height>=240][height<=480][vcodec^=avc1]{_PLAIN}/wv*[height>=240]{_PLAIN}/bv*{_PLAIN})"
    f"+(ba[ext=m4a][format_id!$='-drc']{_PLAIN}/ba[format_id!$='-drc']{_PLAIN}))"
    f"/w[height>=240]{_PLAIN}/b{_PLAIN}/bv*{_PLAIN}/ba{_PLAIN}"
)
_LONGEST_WAIT_S: Final = 30.0
_LIVE: Final = {"is_live": "live.processing", "is_upcoming": "live.upcoming", "post_live": "live.processing"}


class YouTubeFetcher:
    """Fetches clips by their video id through one `YoutubeDL`, made once per process.

    `watch_url` holds `{key}`; `extractors` are tried before yt-dlp's own (a mirror brings its own); `formats` is a
    yt-dlp selector whose result may be one format or a picture and a sound format. No cookies, no proxies of ours, and
    nothing that evades a country block: a video denied here is recorded as denied here.
    """

    def __init__(
        self,
        watch_url: str = WATCH_URL,
        *,
        extractors: tuple[type[InfoExtractor], ...] = (),
        formats: str = FORMATS,
        timeout_s: float,
        silence_dbfs: float = SILENCE_DBFS,
    ) -> None:
        import yt_dlp
        from yt_dlp.extractor.youtube import YoutubeIE

        if "{key}" not in watch_url:
            raise ConfigError(f"watch_url {watch_url!r}: expected an address with {{key}}, such as {WATCH_URL}.")
        self._watch_url = watch_url
        self._timeout_s = timeout_s
        self._silence_dbfs = silence_dbfs
        self._log = _Log()
        options = {
            "quiet": True,
            "noprogress": True,
            "logger": self._log,
            "color": "never",
            "skip_download": True,
            "noplaylist": True,
            "geo_bypass": False,
            "ignoreerrors": False,
            "cachedir": False,
            "socket_timeout": timeout_s,
            "extractor_retries": 1,
            "js_runtimes": {"deno": {}},
            "remote_components": set(),
            "format": formats,
        }
        # only what is named here can answer: a redirect can never land in one of yt-dlp's 1,800 other extractors
        self._ydl = yt_dlp.YoutubeDL(options, auto_init=False)
        for extractor in (*extractors, YoutubeIE):
            self._ydl.add_info_extractor(extractor())

    def fetch(self, clip: Clip, needs_images: bool) -> Section:
        """The clip's section. Raises ClipError with YouTube's own words and their canonical reason."""
        info = self.extract(clip.source.key)
        duration = info.get("duration")
        if duration is not None and duration + 1 < clip.start_s + 0.5:  # YouTube rounds it to whole seconds
            raise ClipError("qc.past_end", f"the video lasts {duration} s, the clip starts at {clip.start_s:.3f} s")
        picked = info.get("requested_formats") or [info]
        sound = [f for f in picked if f.get("acodec") not in (None, "none")]
        pictures = [f for f in picked if f.get("vcodec") not in (None, "none")]
        if not sound and len(picked) == 1 and picked[0].get("acodec") is None:
            sound = picked  # a single file whose codecs the page does not tell: the file itself will
        if not sound:
            raise ClipError("qc.no_audio", f"formats: {', '.join(str(f.get('format_id')) for f in picked)}")
        separate = pictures[0] if pictures and pictures[0] is not sound[0] and needs_images else None
        if any(f.get("has_drm") for f in picked):
            raise ClipError("denied.drm", "the chosen formats are DRM protected")
        self._wait([sound[0], *([separate] if separate else [])])
        with ExitStack() as stack:
            recording = stack.enter_context(self._reader(sound[0]))
            second = stack.enter_context(self._reader(separate)) if separate else None
            return cut(
                recording, clip.start_s, clip.end_s, needs_images, pictures=second, silence_dbfs=self._silence_dbfs
            )

    def extract(self, key: str) -> Mapping[str, Any]:
        """yt-dlp's info for the video `key`, its formats chosen. Raises ClipError unless it is one finished video."""
        from yt_dlp.utils import DownloadError

        self._log.warnings.clear()
        # always the full address: an id that begins with '-' would be read as an option
        try:
            info: dict[str, Any] | None = self._ydl.extract_info(self._watch_url.replace("{key}", key), download=False)
        except DownloadError as e:
            raise self._error(e) from e
        if info is None:
            raise ClipError("tool.extractor_broken", "yt-dlp returned nothing and raised nothing")
        if info.get("_type", "video") != "video" or "entries" in info:
            raise ClipError("qc.id_mismatch", f"expected one video, found a {info.get('_type')}")
        if info.get("id") != key:
            raise ClipError("qc.id_mismatch", f"asked for {key}, the page answered with {info.get('id')}")
        live = info.get("live_status")
        if live in _LIVE:
            raise ClipError(_LIVE[live], f"live_status is {live}")
        return info

    def _reader(self, chosen: Mapping[str, Any]) -> RangeReader:
        headers = {str(k): str(v) for k, v in (chosen.get("http_headers") or {}).items()}
        return RangeReader(str(chosen["url"]), headers=headers, timeout_s=self._timeout_s)

    def _wait(self, chosen: list[Mapping[str, Any]]) -> None:
        """Respect the time before which YouTube does not serve the formats (its pre-roll)."""
        pause = max(float(f.get("available_at") or 0) for f in chosen) - time.time()
        if pause > _LONGEST_WAIT_S:
            raise ClipError("live.processing", f"the formats will be available in {pause:.0f} s")
        if pause > 0:
            time.sleep(pause)

    def _error(self, error: DownloadError) -> ClipError:
        from yt_dlp.utils import YoutubeDLError

        inner = error.exc_info[1] if error.exc_info and error.exc_info[1] is not None else error
        message = str(getattr(inner, "orig_msg", None) or inner)
        cause: BaseException | None = inner
        status = None
        names: list[str] = []
        while cause is not None and len(names) < 8:
            names.append(type(cause).__name__)
            found = getattr(cause, "status", None)
            status = found if status is None and isinstance(found, int) else status
            cause = getattr(cause, "cause", None) or cause.__cause__
        reason = classify(
            message,
            http_status=status,
            exception=names[0] if names[0] == "GeoRestrictedError" else names[-1],
            where="extract",
            countries=getattr(inner, "countries", None),
            # whatever else is raised inside an extractor is the extractor's fault, not ours
            expected=getattr(inner, "expected", None) if isinstance(inner, YoutubeDLError) else False,
        )
        text = normalise(message)
        if reason.code in ("tool.no_format", "tool.extractor_broken") and self._log.warnings:
            text += " | " + " | ".join(normalise(w) for w in self._log.warnings)
        return ClipError(reason.code, text)


class _Log:
    """Keeps yt-dlp's warnings (they tell why formats are missing) and silences the rest."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def debug(self, message: str) -> None:
        pass

    def info(self, message: str) -> None:
        pass

    def warning(self, message: str) -> None:
        self.warnings.append(re.sub(r"^WARNING:\s*", "", message))

    def error(self, message: str) -> None:
        pass
