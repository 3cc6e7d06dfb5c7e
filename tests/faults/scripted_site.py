"""A YouTube-like site of many videos on loopback, each with a planted fate; some fates change as scripted time passes.

    site = Site()
    plan = site.plan(2000, seed=7)                 # [(id, kind, reason it ends with; "" is ok), ...]
    clips = site.clips()                           # what a manifest would ask for: one clip per id
    with site.serve() as base:
        fetcher = YouTubeFetcher(base + "/watch?v={key}", extractors=(WatchPageIE,), timeout_s=0.5)
        ...                                        # the first run
        site.asked.clear()
        site.tick(48)                              # two days pass: processing ends, a premiere is over, storms are gone
        ...                                        # the second run
    site.asked                                     # how often each id's watch page was asked for since the clear

Watch pages are read by `harken.world.youtube.WatchPageIE`, so that YouTube's words pass through yt-dlp's own extractor.
Needs pictures: a clip is asked for with `needs_images=True`, else `no_video` is ok and not `qc.no_video`.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import numpy as np
from fault_media import FASTSTART, encode
from fault_server import Ask, Faulty, closed_port, fail_with_status, serve
from fault_server import Site as Served

from harken.clips import Clip, Source, Split, youtube_id

START_S, END_S = 4.0, 6.0  # of every clip
LENGTH_S = 8
CANARIES = ("canary-0000", "canary_0001", "canary-0002")  # always there, in no plan
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


class Planted(NamedTuple):
    """One video: its id, its kind (a key of KINDS) and the reason that remains of it ("" where it is there)."""

    key: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Kind:
    """A fate. `page` is a key of REFUSALS, an HTTP status or a trick of `_page`; else `media` is a file or a fault.

    It ends after `heals_after` asks for the video or when the scripted clock shows `ends_h`; then the video is there.
    """

    share: float
    reason: str
    page: str = ""
    media: str = "good"
    heals_after: int | None = None
    ends_h: float | None = None


# (status, reason, subreason): YouTube's words; a typographic apostrophe where YouTube has been seen to write one
REFUSALS: dict[str, tuple[str, str, str]] = {
    "private": ("LOGIN_REQUIRED", "Private video", "Sign in if you\u2019ve been granted access to this video"),
    "removed_uploader": ("ERROR", "Video unavailable", "This video has been removed by the uploader"),
    "account_terminated": (
        "ERROR",
        "Video unavailable",
        "This video is no longer available because the YouTube account associated with this video has been terminated.",
    ),
    "account_closed": (
        "ERROR",
        "Video unavailable",
        "This video is no longer available because the uploader has closed their YouTube account.",
    ),
    "removed_policy": (
        "ERROR",
        "Video unavailable",
        "This video has been removed for violating YouTube\u2019s Terms of Service",
    ),
    "copyright_claim": (
        "ERROR",
        "Video unavailable",
        "This video is no longer available due to a copyright claim by Planted Records",
    ),
    "copyright_blocked": (
        "UNPLAYABLE",
        "Video unavailable",
        "This video contains content from Planted Records, who has blocked it on copyright grounds",
    ),
    "copyright_country": (
        "UNPLAYABLE",
        "Video unavailable",
        "This video contains content from Planted Records, who has blocked it in your country on copyright grounds",
    ),
    "geo": (
        "UNPLAYABLE",
        "Video unavailable",
        "The uploader has not made this video available in your country",
    ),
    "unspecified": ("ERROR", "Video unavailable", ""),
    "age": ("LOGIN_REQUIRED", "Sign in to confirm your age", "This video may be inappropriate for some users."),
    "members": (
        "UNPLAYABLE",
        "Join this channel to get access to members-only content like this video, and other exclusive perks.",
        "",
    ),
    "paid": ("UNPLAYABLE", "This video requires payment to watch", ""),
    "login": ("LOGIN_REQUIRED", "Please sign in", ""),
    "client": ("UNPLAYABLE", "Video unavailable", "This video is not available"),
    "upcoming": ("LIVE_STREAM_OFFLINE", "This live event will begin in 30 hours.", ""),
    "ended": ("LIVE_STREAM_OFFLINE", "This live stream recording is not available.", ""),
    "processing": ("UNPLAYABLE", "We're processing this video. Check back later.", ""),
    "rate_limited": ("UNPLAYABLE", "Video unavailable", "This content isn\u2019t available, try again later."),
    "bot_check": ("LOGIN_REQUIRED", "Sign in to confirm you\u2019re not a bot", "This helps protect our community."),
    "captcha": ("UNPLAYABLE", "Video unavailable", ""),
}

KINDS: dict[str, Kind] = {
    "ok": Kind(0, ""),
    "private": Kind(0.040, "gone.private", "private"),
    "private_returns": Kind(0.005, "gone.private", "private", ends_h=2400),
    "removed_uploader": Kind(0.040, "gone.removed_uploader", "removed_uploader"),
    "account_terminated": Kind(0.035, "gone.account_terminated", "account_terminated"),
    "account_closed": Kind(0.010, "gone.account_closed", "account_closed"),
    "removed_policy": Kind(0.005, "gone.removed_policy", "removed_policy"),
    "copyright_claim": Kind(0.010, "gone.copyright_claim", "copyright_claim"),
    "copyright_blocked": Kind(0.005, "gone.copyright_blocked", "copyright_blocked"),
    "unspecified": Kind(0.025, "gone.unspecified", "unspecified"),
    "unspecified_once": Kind(0.005, "gone.unspecified", "unspecified", heals_after=1),
    "not_found_page": Kind(0.005, "gone.unspecified", "404"),
    "copyright_country": Kind(0.010, "denied.copyright_country", "copyright_country"),
    "geo": Kind(0.010, "denied.geo", "geo"),
    "age": Kind(0.015, "denied.age", "age"),
    "members": Kind(0.005, "denied.members", "members"),
    "paid": Kind(0.003, "denied.paid", "paid"),
    "login": Kind(0.003, "denied.login", "login"),
    "drm": Kind(0.003, "denied.drm", "drm"),
    "client": Kind(0.005, "denied.client", "client"),
    "upcoming": Kind(0.003, "live.upcoming", "upcoming", ends_h=30),
    "ended": Kind(0.003, "live.ended", "ended"),
    "processing": Kind(0.005, "live.processing", "processing", ends_h=5),
    "no_urls": Kind(0.003, "tool.extractor_broken", "no_urls"),
    "only_storyboards": Kind(0.003, "tool.no_format", "only_storyboards"),
    "other_id": Kind(0.003, "qc.id_mismatch", "other_id"),
    "trailer": Kind(0.003, "qc.id_mismatch", "trailer"),
    "page_503": Kind(0.005, "net.5xx", "503", heals_after=2),
    "media_503": Kind(0.005, "net.5xx", media="503", heals_after=2),
    "reset": Kind(0.003, "net.reset", media="reset", heals_after=1),
    "timeout": Kind(0.002, "net.timeout", media="stall", heals_after=1),
    "refused": Kind(0.003, "net.connect", "closed_port"),
    "media_403": Kind(0.003, "media.403", media="403"),
    "media_403_once": Kind(0.005, "media.403", media="403", heals_after=1),
    "media_404": Kind(0.003, "media.404", media="404"),
    "media_410": Kind(0.003, "media.410", media="410"),
    "media_416": Kind(0.003, "media.416", media="416"),
    "no_range": Kind(0.003, "media.no_range", media="no_range"),
    "cut": Kind(0.003, "media.truncated", media="cut", heals_after=1),
    "truncated_file": Kind(0.003, "media.truncated", media="truncated"),
    "consent_page": Kind(0.003, "media.not_media", media="html 200"),
    "empty": Kind(0.003, "media.empty", media="empty"),
    "past_end": Kind(0.005, "qc.past_end", "short_page", "past_end"),
    "past_end_media": Kind(0.003, "qc.past_end", media="past_end"),
    "short": Kind(0.005, "qc.short", media="short"),
    "no_audio": Kind(0.003, "qc.no_audio", media="no_audio"),
    "no_video": Kind(0.003, "qc.no_video", media="no_video"),
    "silent": Kind(0.005, "qc.silent", media="silent"),
}


@dataclass(frozen=True)
class Storm:
    """From the `at`-th watch page on, `n_asks` of them are refused whatever they ask for; a tick of an hour ends it."""

    at: int
    n_asks: int
    kind: str  # rate_limited | bot_check | captcha | 429
    retry_after_s: int = 120


@dataclass
class Site:
    """The site; see the module's docstring. `media` may be shared by several sites: see `make_media`."""

    media: dict[str, bytes] = field(default_factory=lambda: make_media())
    storms: list[Storm] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)  # watch pages per id
    fetched: Counter[str] = field(default_factory=Counter)  # media requests per id
    order: list[tuple[float, str]] = field(default_factory=list)  # (scripted hour, id) of each watch page
    now_h: float = 0.0
    planted: list[Planted] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._kinds: dict[str, str] = {}
        self._turns: Counter[str] = Counter()  # asks that a storm did not swallow: what heals counts these
        self._lock = threading.Lock()
        self._closed_port = closed_port()
        self._over: set[Storm] = set()

    def plan(self, n: int, seed: int, *, horizon_h: float = 96.0) -> list[Planted]:
        """`n` videos in random order, each kind at its share and at least once (n >= len(KINDS)).

        The reason is what remains at hour `horizon_h` however often is asked; `reason_at` tells it for other hours.
        """
        if n < len(KINDS):
            raise ValueError(f"{n} videos cannot hold {len(KINDS)} kinds")
        rng = np.random.default_rng(seed)
        kinds = [name for name, kind in KINDS.items() if name != "ok" for _ in range(max(1, round(n * kind.share)))]
        kinds += ["ok"] * (n - len(kinds))
        keys: dict[str, None] = {}
        while len(keys) < n:
            key = "".join(_LETTERS[i] for i in rng.integers(0, 64, 11))
            first = ("-", "_", key[0])[min(2, len(keys) % 10)]  # a tenth begins with '-', a tenth with '_'
            keys[first + key[1:]] = None
        order = rng.permutation(n)
        self._kinds = {key: kinds[i] for key, i in zip(keys, order, strict=True)} | dict.fromkeys(CANARIES, "ok")
        self.planted = [Planted(k, self._kinds[k], self.reason_at(k, horizon_h)) for k in keys]
        return self.planted

    def reason_at(self, key: str, hour: float) -> str:
        """What is left of a video at a scripted hour, once everything that asking heals is healed."""
        kind = KINDS[self._kinds[key]]
        over = kind.heals_after is not None or (kind.ends_h is not None and hour >= kind.ends_h)
        return "" if over else kind.reason

    def clips(self, dataset: str = "audiocaps", split: Split = Split.TEST) -> list[Clip]:
        """A clip of each video of the plan, in its order."""
        return [
            Clip(youtube_id(k, START_S, END_S), dataset, split, Source("youtube", k), START_S, END_S)
            for k, _, _ in self.planted
        ]

    def tick(self, hours: float) -> None:
        """Let scripted time pass; an hour ends every storm that has begun."""
        with self._lock:
            self.now_h += hours
            if hours >= 1:
                self._over |= {s for s in self.storms if s.at < len(self.order)}

    @contextlib.contextmanager
    def serve(self) -> Iterator[str]:
        """The site on a free port of 127.0.0.1; yields its base URL."""
        handler = type("ScriptedHandler", (_Handler,), {"scripted": self})
        with serve(handler, Served()) as served:
            yield served.base

    def turn(self, key: str) -> tuple[str, Storm | None]:
        """Note that a watch page was asked for: the kind that answers it, and the storm that swallows it, if any."""
        with self._lock:
            at = len(self.order)
            self.order.append((self.now_h, key))
            self.asked[key] += 1
            storm = next((s for s in self.storms if s.at <= at < s.at + s.n_asks and s not in self._over), None)
            if storm is None:
                self._turns[key] += 1
            return self.present(key), storm

    def present(self, key: str) -> str:
        """The kind by which a video behaves now; `unspecified` for an id that was never there."""
        name = self._kinds.get(key, "unspecified")
        kind = KINDS[name]
        healed = kind.heals_after is not None and self._turns[key] > kind.heals_after
        ended = kind.ends_h is not None and self.now_h >= kind.ends_h
        return "ok" if healed or ended else name


def make_media() -> dict[str, bytes]:
    """The few recordings that all videos share, by name; half a second of encoding."""
    good = encode(LENGTH_S, options=FASTSTART, gop_s=1.0)
    return {
        "good": good,
        "truncated": good[: len(good) // 3],
        "empty": b"",
        "past_end": encode(3.0),
        "short": encode(5.0),
        "no_audio": encode(LENGTH_S, sound=False),
        "no_video": encode(LENGTH_S, pictures=False),
        "silent": encode(LENGTH_S, gain=0.0),
    }


class _Handler(Faulty):
    scripted: Site

    def respond(self) -> None:
        url = urlsplit(self.path)
        self.ask = Ask(url.path, *self.span(), self.headers.get("Host", ""))
        if url.path == "/watch":
            return self._watch(parse_qs(url.query).get("v", [""])[0])
        key = url.path.removeprefix("/videoplayback/").removesuffix(".mp4")
        with self.scripted._lock:
            self.scripted.fetched[key] += 1
            media = KINDS[self.scripted.present(key)].media
        files = self.scripted.media
        return self.answer(files[media], "") if media in files else self.answer(files["good"], media)

    def _watch(self, key: str) -> None:
        name, storm = self.scripted.turn(key)
        page = storm.kind if storm else KINDS[name].page
        if page.isdecimal():
            return fail_with_status(self, int(page), [str(storm.retry_after_s)] if storm else [])
        response = self._response(key, page, KINDS[name])
        text = json.dumps(response).replace("</", "<\\/")
        body = (
            f"<!DOCTYPE html><html><body><script>var ytInitialPlayerResponse = {text};</script></body></html>".encode()
        )
        self.head(200, len(body), "text/html; charset=utf-8")
        return self.send(body)

    def _response(self, key: str, page: str, kind: Kind) -> dict[str, Any]:
        if page in REFUSALS:
            return refusal(page)
        host = self.headers.get("Host", "")
        if page == "closed_port":
            host = f"127.0.0.1:{self.scripted._closed_port}"
        return video(key, page, f"http://{host}/videoplayback/{key}.mp4", 3 if page == "short_page" else LENGTH_S)


def refusal(page: str) -> dict[str, Any]:
    """The player response that refuses a video in the words of REFUSALS."""
    status, reason, subreason = REFUSALS[page]
    renderer: dict[str, Any] = {"reason": {"simpleText": reason}}
    if subreason:
        renderer["subreason"] = {"simpleText": subreason}
    screen: dict[str, Any] = {"playerErrorMessageRenderer": renderer}
    if page == "captcha":
        screen = {"playerCaptchaViewModel": {"siteKey": "none"}}
    response: dict[str, Any] = {"playabilityStatus": {"status": status, "reason": reason, "errorScreen": screen}}
    if page == "geo":
        response["microformat"] = {"playerMicroformatRenderer": {"availableCountries": ["IS", "NO"]}}
    return response


def video(key: str, page: str, url: str, length_s: int) -> dict[str, Any]:
    """The player response of a video that can be played, but for the trick `page`."""
    status: dict[str, Any] = {"status": "OK", "playableInEmbed": True}
    details = {
        "videoId": "other_id_00" if page == "other_id" else key,
        "title": f"Planted video {key}",
        "lengthSeconds": str(length_s),
        "channelId": "UC" + "0" * 22,
        "isLiveContent": False,
        "author": "planted",
    }
    streaming: dict[str, Any] = {"formats": [_format(url)], "adaptiveFormats": []}
    response = {"playabilityStatus": status, "streamingData": streaming, "videoDetails": details}
    if page == "no_urls":
        del streaming["formats"][0]["url"]
    elif page == "only_storyboards":
        streaming["formats"] = []
        spec = f"{url.rpartition('/')[0]}/sb/$L/$N.jpg|48#27#100#10#10#0#default#rs$sig|80#45#10#10#10#2000#M$M#rs$sig"
        response["storyboards"] = {"playerStoryboardSpecRenderer": {"spec": spec}}
    elif page == "drm":
        streaming["formats"] = []
        streaming["licenseInfos"] = [{"drmFamily": "WIDEVINE"}]
    elif page == "trailer":
        screen = {"playerLegacyDesktopYpcTrailerRenderer": {"trailerVideoId": "trailer-000"}}
        status |= {"status": "UNPLAYABLE", "reason": "This video requires payment to watch", "errorScreen": screen}
        streaming["formats"] = []
    return response


def _format(url: str) -> dict[str, Any]:
    return {
        "itag": 18,
        "url": url,
        "mimeType": 'video/mp4; codecs="avc1.42C00C, mp4a.40.2"',
        "bitrate": 200_000,
        "quality": "small",
        "qualityLabel": "360p",
        "width": 480,
        "height": 360,
        "fps": 10,
        "audioQuality": "AUDIO_QUALITY_LOW",
        "audioSampleRate": "44100",
        "audioChannels": 1,
    }
