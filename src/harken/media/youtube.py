"""Clips from YouTube: yt-dlp finds where the media lies, harken reads only the clip's bytes.

yt-dlp's own section download answers a cut body, a start past the end and a rate limit with a short file, a wrong one
or the same bare error; so it extracts and nothing else. Pacing is the caller's: one `fetch` is one video.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from harken.clips import Clip
from harken.errors import ClipError, ConfigError
from harken.media.range_reader import RangeReader, Traffic, accounted, retry_after_s
from harken.media.reasons import classify, normalise
from harken.media.section import SILENCE_DBFS, Section, cut

if TYPE_CHECKING:  # yt-dlp takes a second to import, which a worker that reads a folder should not pay
    from yt_dlp.extractor.common import InfoExtractor

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
_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_KEPT: Final = ("live_status", "availability", "upload_date", "license", "playability_status")
_NO_ANSWER: Final = "failed to extract any player response"
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
        self._seen: dict[str, Any] = {}  # of the present video's player responses: what is kept of them,
        self._ids: set[str] = set()  # and the videos they say they are about
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
            self._ydl.add_info_extractor(self._watched(extractor()))

    def fetch(self, clip: Clip, needs_images: bool) -> Section:
        """The clip's section. Raises ClipError with YouTube's own words and their canonical reason."""
        info = self.extract(clip.source.key)
        traffic = Traffic()
        known = _facts(info)
        with accounted(traffic, known):
            found = self._section(clip, info, needs_images, traffic)
        return replace(found, facts=found.facts | known | traffic.facts)

    def _section(self, clip: Clip, info: Mapping[str, Any], needs_images: bool, traffic: Traffic) -> Section:
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
            recording = stack.enter_context(self._reader(sound[0], traffic))
            second = stack.enter_context(self._reader(separate, traffic)) if separate else None
            return cut(
                recording, clip.start_s, clip.end_s, needs_images, pictures=second, silence_dbfs=self._silence_dbfs
            )

    def extract(self, key: str) -> Mapping[str, Any]:
        """yt-dlp's info for the video `key`, its formats chosen. Raises ClipError unless it is one finished video.

        The error's facts: `where` ("extract"), `exception` (the class of what yt-dlp raised), `expected` (yt-dlp's own
        flag), and where they are known `http_status`, `retry_after_s`, `countries` and `playability_status`.
        """
        if not _KEY.match(key):  # nothing is asked: the lists' readers let no such id through
            raise ClipError(
                "local.bug", f"{key!r} is no video id: expected letters, digits, '-' or '_'", where="extract"
            )
        self._log.warnings.clear()
        self._seen.clear()
        self._ids.clear()
        # always the full address: an id that begins with '-' would be read as an option
        url = self._watch_url.replace("{key}", key)
        try:
            # unresolved first: what is no finished video is told from its page, before its formats can fail the choice
            found = self._ydl.extract_info(url, download=False, process=False)
            self._refuse_others(key, found)
            info: dict[str, Any] = self._ydl.process_ie_result(found, download=False)
        except ClipError as e:
            e.facts = {"where": "extract", **self._seen, **e.facts}
            raise
        except Exception as e:  # all of it is raised by yt-dlp, whose own slips are not ours to crash on
            raise self._error(e) from e
        return {**info, **self._seen}

    def _refuse_others(self, key: str, found: Mapping[str, Any] | None) -> None:
        """Raise ClipError unless `found` is the finished video `key`, and the page says so too."""
        if found is None:
            raise ClipError("tool.extractor_broken", "yt-dlp returned nothing and raised nothing")
        kind = found.get("_type", "video")
        if kind in ("url", "url_transparent"):
            raise ClipError("qc.id_mismatch", f"asked for {key}, the page points to {found.get('id') or 'another'}")
        if kind != "video" or "entries" in found:
            raise ClipError("qc.id_mismatch", f"expected one video, found a {kind}")
        others = {str(found.get("id")), *self._ids} - {key}
        if others:
            raise ClipError("qc.id_mismatch", f"asked for {key}, the page answered with {', '.join(sorted(others))}")
        live = found.get("live_status")
        if live in _LIVE:
            raise ClipError(_LIVE[live], f"live_status is {live}", live_status=live)

    def _reader(self, chosen: Mapping[str, Any], traffic: Traffic) -> RangeReader:
        headers = {str(k): str(v) for k, v in (chosen.get("http_headers") or {}).items()}
        return RangeReader(str(chosen["url"]), headers=headers, timeout_s=self._timeout_s, traffic=traffic)

    def _wait(self, chosen: list[Mapping[str, Any]]) -> None:
        """Respect the time before which YouTube does not serve the formats (its pre-roll)."""
        pause = max(float(f.get("available_at") or 0) for f in chosen) - time.time()
        if pause > _LONGEST_WAIT_S:
            raise ClipError("live.processing", f"the formats will be available in {pause:.0f} s")
        if pause > 0:
            time.sleep(pause)

    def _error(self, error: Exception) -> ClipError:
        chain = _chain(error)
        inner = chain[0]
        message = str(getattr(inner, "orig_msg", None) or inner)
        facts = _facts_of(chain)
        code = classify(message, **facts).code
        text = normalise(message)
        if code == "tool.extractor_broken" and _NO_ANSWER in text.lower():
            code, text = self._trouble() or (code, text)
        if code in ("tool.no_format", "tool.extractor_broken") and self._log.warnings:
            text += " | " + " | ".join(normalise(w) for w in self._log.warnings)
        return ClipError(code, text, **facts, **self._seen)

    def _trouble(self) -> tuple[str, str] | None:
        """Why yt-dlp got no answer at all, which it only warns of: a rate limit, a refusal or the network."""
        found = [(classify(w, where="extract").code, normalise(w)) for w in self._log.warnings]
        return next((f for prefix in ("session.", "net.") for f in found if f[0].startswith(prefix)), None)

    def _watched(self, extractor: InfoExtractor) -> InfoExtractor:
        """`extractor`, which from now on lets us see the player responses that it works on, if it is a YouTube one."""
        inner = getattr(extractor, "_initial_extract", None)
        if inner is None:
            return extractor

        def noting(*args: Any, **kwargs: Any) -> Any:
            answer = inner(*args, **kwargs)
            responses = [r for part in answer if isinstance(part, list) for r in part if isinstance(r, dict)]
            statuses = [(r.get("playabilityStatus") or {}).get("status") for r in responses]
            if any(statuses):
                self._seen["playability_status"] = next(s for s in statuses if s)  # the one that yt-dlp quotes
            ids = [(r.get("videoDetails") or {}).get("videoId") for r in responses]
            self._ids.update(str(i) for i in ids if i)
            return answer

        extractor._initial_extract = noting
        return extractor


def _facts(info: Mapping[str, Any]) -> dict[str, Any]:
    """What a ledger should keep of a page that yt-dlp understood."""
    kept = {"info_id": info.get("id"), "duration_s": info.get("duration")}
    kept |= {name: info.get(name) for name in _KEPT}
    picked = info.get("requested_formats") or [info]
    kept["formats"] = [str(f["format_id"]) for f in picked if f.get("format_id") is not None]
    return {name: value for name, value in kept.items() if value is not None}


def _chain(error: BaseException) -> list[BaseException]:
    """What yt-dlp raised inside, and what that came from, outermost first."""
    inner = (getattr(error, "exc_info", None) or (None, None))[1]
    link: BaseException | None = inner if type(error).__name__ == "DownloadError" and inner is not None else error
    chain: list[BaseException] = []
    while link is not None and len(chain) < 8:
        chain.append(link)
        link = getattr(link, "cause", None) or link.__cause__
    return chain


def _facts_of(chain: list[BaseException]) -> dict[str, Any]:
    """What `classify` should know of an error, without what nobody knows."""
    from yt_dlp.utils import YoutubeDLError

    names = [type(e).__name__ for e in chain]
    status = next((e.status for e in chain if isinstance(getattr(e, "status", None), int)), None)  # type: ignore[attr-defined]
    waits = [retry_after_s(header) for e in chain for header in _retry_after(e)]
    facts = {
        "where": "extract",
        "exception": names[0] if names[0] == "GeoRestrictedError" else names[-1],
        # whatever else is raised inside an extractor is the extractor's fault, not ours
        "expected": getattr(chain[0], "expected", None) if isinstance(chain[0], YoutubeDLError) else False,
        "http_status": status,
        "retry_after_s": next((w for w in waits if w is not None), None),
        "countries": getattr(chain[0], "countries", None),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _retry_after(error: BaseException) -> Iterator[str]:
    headers = getattr(getattr(error, "response", None), "headers", None)
    if headers is not None and headers.get("Retry-After"):
        yield headers.get("Retry-After")


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
