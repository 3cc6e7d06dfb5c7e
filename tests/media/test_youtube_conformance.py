"""What YouTube answers, through yt-dlp's real extractor, to harken's reason: run this on every upgrade of yt-dlp.

Only the source of the player responses is replaced. Messages, exceptions and formats are made by yt-dlp itself.
"""

from __future__ import annotations

import copy
import json
import re
import socket
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
from yt_dlp.extractor.youtube import YoutubeIE
from yt_dlp.networking.common import Response
from yt_dlp.networking.exceptions import HTTPError, IncompleteRead, SSLError, TransportError

from harken.errors import ClipError
from harken.media.reasons import REASONS, classify
from harken.media.youtube import YouTubeFetcher

KEY = "-PJHxphWEs_"  # an id that begins with a dash and ends with an underscore
OTHER = "otherVideo0"
CANNED: list[Any] = []  # what `_initial_extract` has as its player responses; an exception is raised

TERMINATED = (
    "This video is no longer available because the YouTube account associated with this video has been terminated."
)
CLOSED = "This video is no longer available because the uploader has closed their YouTube account."
CLAIM = "This video is no longer available due to a copyright claim by Some Records, Inc."
BLOCKED = "This video contains content from Some Records, who has blocked it on copyright grounds"
BLOCKED_HERE = "This video contains content from Some Records, who has blocked it in your country on copyright grounds"
TERMS = "This video has been removed for violating YouTube's Terms of Service"
POLICY = "This video has been removed for violating YouTube's policy on spam, deceptive practices, and scams"
GUIDELINES = "This video has been removed for violating YouTube's Community Guidelines."
GEO = "The uploader has not made this video available in your country"
GRANTED = "Sign in if you've been granted access to this video"
MEMBERS = "Join this channel to get access to members-only content like this video, and other exclusive perks."
LEVEL = "This video is available to this channel's members on level: Fan (or any higher level)."
KIDS_APP = "The following content is not available on this app. Watch on the latest version of YouTube."
COMMUNITY = "This helps protect our community. Learn more"

# (status, reason, subreason, harken's reason): each is tried with straight and with typographic apostrophes
REFUSALS: list[tuple[str, str, str, str]] = [
    ("LOGIN_REQUIRED", "Sign in to confirm you're not a bot", COMMUNITY, "session.bot_check"),
    ("LOGIN_REQUIRED", "Sign in to confirm you're not a bot", "", "session.bot_check"),
    ("UNPLAYABLE", "Video unavailable", "This content isn't available, try again later.", "session.rate_limited"),
    ("ERROR", "This content isn't available, try again later.", "", "session.rate_limited"),
    ("UNPLAYABLE", "Video unavailable", "This content isn't available.", "session.suspect"),
    ("UNPLAYABLE", "This content isn't available", "", "session.suspect"),
    ("UNPLAYABLE", "The page needs to be reloaded.", "", "session.suspect"),
    ("ERROR", "Video unavailable", TERMINATED, "gone.account_terminated"),
    ("ERROR", TERMINATED, "", "gone.account_terminated"),
    ("ERROR", "Video unavailable", CLOSED, "gone.account_closed"),
    ("ERROR", "Video unavailable", "This video has been removed by the uploader", "gone.removed_uploader"),
    ("ERROR", "This video has been removed by the user", "", "gone.removed_uploader"),
    ("ERROR", "Video unavailable", TERMS, "gone.removed_policy"),
    ("ERROR", POLICY, "", "gone.removed_policy"),
    ("ERROR", GUIDELINES, "", "gone.removed_policy"),
    ("ERROR", "Video unavailable", CLAIM, "gone.copyright_claim"),
    ("UNPLAYABLE", "Video unavailable", BLOCKED, "gone.copyright_blocked"),
    ("UNPLAYABLE", "Video unavailable", BLOCKED_HERE, "denied.copyright_country"),
    ("UNPLAYABLE", "Video unavailable", GEO, "denied.geo"),
    ("UNPLAYABLE", "Video unavailable", f"{GEO}.", "denied.geo"),
    ("LOGIN_REQUIRED", "Private video", GRANTED, "gone.private"),
    ("LOGIN_REQUIRED", "Private video", "", "gone.private"),
    ("LOGIN_REQUIRED", "This video is private", "", "gone.private"),
    ("ERROR", "Video unavailable", "This video is private", "gone.private"),
    (
        "LOGIN_REQUIRED",
        "Sign in to confirm your age",
        "This video may be inappropriate for some users.",
        "denied.age",
    ),
    ("AGE_VERIFICATION_REQUIRED", "This video may be inappropriate for some users.", "", "denied.age"),
    ("AGE_CHECK_REQUIRED", "This video is age-restricted and only available on YouTube", "", "denied.age"),
    ("UNPLAYABLE", MEMBERS, "", "denied.members"),
    ("UNPLAYABLE", LEVEL, "", "denied.members"),
    ("UNPLAYABLE", "Video unavailable", MEMBERS, "denied.members"),
    ("UNPLAYABLE", "This video requires payment to watch.", "", "denied.paid"),
    ("UNPLAYABLE", "This video is only available to Music Premium members", "", "denied.paid"),
    ("UNPLAYABLE", "Video unavailable", "This video is only available to YouTube Premium members", "denied.paid"),
    ("LOGIN_REQUIRED", "Please sign in", "", "denied.login"),
    ("LOGIN_REQUIRED", "Login details are needed to download this video", "", "denied.login"),
    ("LIVE_STREAM_OFFLINE", "Premieres in 3 hours", "", "live.upcoming"),
    ("LIVE_STREAM_OFFLINE", "Premiere will begin shortly", "", "live.upcoming"),
    ("LIVE_STREAM_OFFLINE", "This live event will begin in 12 days.", "", "live.upcoming"),
    ("LIVE_STREAM_OFFLINE", "This live event has ended.", "", "live.ended"),
    ("LIVE_STREAM_OFFLINE", "This live stream recording is not available.", "", "live.ended"),
    ("UNPLAYABLE", "We're processing this video. Check back later.", "", "live.processing"),
    ("UNPLAYABLE", "Video unavailable", "We're processing this video. Check back later.", "live.processing"),
    ("UNPLAYABLE", "Video unavailable", "This video is not available", "denied.client"),
    ("UNPLAYABLE", "This video is not available", "", "denied.client"),
    ("UNPLAYABLE", "Video unavailable", KIDS_APP, "denied.client"),
    ("ERROR", KIDS_APP, "", "denied.client"),
    ("ERROR", "Video unavailable", "", "gone.unspecified"),
    ("ERROR", "Video unavailable.", "", "gone.unspecified"),
    ("ERROR", "This video is unavailable", "", "gone.unspecified"),
    ("ERROR", "This video does not exist.", "", "gone.unspecified"),
    ("UNPLAYABLE", "Something that YouTube has never said before", "", "unknown.unmapped"),
    ("UNPLAYABLE", "Video unavailable", "Something that YouTube has never said before", "unknown.unmapped"),
]


class CannedIE(YoutubeIE):  # type: ignore[misc]
    """yt-dlp's extractor with its player responses given."""

    def _initial_extract(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(CANNED[0], BaseException):
            raise CANNED[0]
        config = self._get_default_ytcfg("web")
        return None, config, {}, False, [_marked(self, copy.deepcopy(r)) for r in CANNED], None


class CannedPlayerIE(YoutubeIE):  # type: ignore[misc]
    """One layer deeper: what each client's player endpoint answers is given, yt-dlp weighs the answers itself."""

    def _download_initial_webpage(self, *args: Any, **kwargs: Any) -> None:
        return None

    def _download_initial_data(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}

    def _download_ytcfg(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}

    def _download_player_url(self, *args: Any, **kwargs: Any) -> None:
        return None

    def _extract_player_response(self, *args: Any, **kwargs: Any) -> Any:
        return copy.deepcopy(CANNED[0])


def _marked(extractor: Any, response: dict[str, Any]) -> dict[str, Any]:
    """What `_extract_player_responses` would have noted of the client that answered."""
    from yt_dlp.extractor.youtube import _video as video

    marks = {
        video.STREAMING_DATA_CLIENT_NAME: "web_embedded",
        video.STREAMING_DATA_FETCH_GVS_PO_TOKEN: lambda **_: None,
        video.STREAMING_DATA_PLAYER_TOKEN_PROVIDED: False,
        video.STREAMING_DATA_IS_PREMIUM_SUBSCRIBER: False,
    }
    streaming = response.setdefault("streamingData", {})
    if isinstance(streaming, dict):
        for part in (streaming, *streaming.get("formats", ()), *streaming.get("adaptiveFormats", ())):
            part.update(marks)
        streaming[video.STREAMING_DATA_INNERTUBE_CONTEXT] = {}
        streaming[video.STREAMING_DATA_FETCH_SUBS_PO_TOKEN] = lambda **_: None
        streaming[video.STREAMING_DATA_AVAILABLE_AT_TIMESTAMP] = 0
    return response


def _refusal(status: str, reason: str, subreason: str = "", **screen: Any) -> dict[str, Any]:
    renderer: dict[str, Any] = {"reason": {"simpleText": reason}}
    if subreason:
        renderer["subreason"] = {"runs": [{"text": subreason}]}
    error = {"playerErrorMessageRenderer": renderer, **screen}
    return {"playabilityStatus": {"status": status, "reason": reason, "errorScreen": error}}


FORMAT = {
    "itag": 18,
    "url": "https://rr1.googlevideo.com/videoplayback?id=1",
    "mimeType": 'video/mp4; codecs="avc1.42001E, mp4a.40.2"',
    "bitrate": 300_000,
    "quality": "medium",
    "qualityLabel": "360p",
    "width": 640,
    "height": 360,
    "fps": 25,
    "audioQuality": "AUDIO_QUALITY_LOW",
    "audioSampleRate": "44100",
    "audioChannels": 2,
}
NO_URL = {k: v for k, v in FORMAT.items() if k != "url"}
CIPHERED = {**NO_URL, "signatureCipher": "s=abc&sp=sig&url=https%3A%2F%2Frr1.googlevideo.com%2Fvideoplayback"}
DRM = {**FORMAT, "drmFamilies": ["WIDEVINE"]}
STORYBOARD = {"playerStoryboardSpecRenderer": {"spec": "https://i.ytimg.com/sb/$L/$N.jpg|48#27#100#10#10#0#d#rs$a"}}


def _video(*formats: dict[str, Any], details: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    found = {"videoId": KEY, "title": "t", "lengthSeconds": "200", "isLiveContent": False, **(details or {})}
    streaming = {"formats": list(formats), "adaptiveFormats": []}
    return {"playabilityStatus": {"status": "OK"}, "streamingData": streaming, "videoDetails": found, **more}


TRAILER = {"playerLegacyDesktopYpcTrailerRenderer": {"trailerVideoId": OTHER}}
CAPTCHA = {"playerCaptchaViewModel": {"siteKey": "none"}}
FEEDS = f"id%3D{KEY}%26title%3Dleft,id%3D{OTHER}%26title%3Dright"
LICENCE = {"licenseInfos": [{"drmFamily": "WIDEVINE"}], "formats": []}
UPCOMING = {"isUpcoming": True, "isLiveContent": True}
# (name, responses of the clients in their order, harken's reason; "" is a video that can be fetched)
ANSWERS: list[tuple[str, list[Any], str]] = [
    ("a video", [_video(FORMAT)], ""),
    ("refused to one client and served to another", [_refusal("ERROR", "Video unavailable"), _video(FORMAT)], ""),
    (
        "served without formats to one client, refused to another",
        [_video(), _refusal("LOGIN_REQUIRED", "Private video", GRANTED)],
        "gone.private",
    ),
    ("two refusals: the first is quoted", [_refusal("ERROR", TERMINATED), _refusal("ERROR", "Video unavailable")],
     "gone.account_terminated"),
    ("captcha", [_refusal("UNPLAYABLE", "Video unavailable", **CAPTCHA)], "session.captcha"),
    ("no formats", [_video()], "tool.extractor_broken"),
    ("formats without addresses (SABR)", [_video(NO_URL)], "tool.extractor_broken"),
    ("ciphered formats and no player", [_video(CIPHERED)], "tool.extractor_broken"),
    ("storyboards only", [_video(storyboards=STORYBOARD)], "tool.no_format"),
    ("licence and no formats", [_video() | {"streamingData": LICENCE}], "denied.drm"),
    ("formats under DRM", [_video(DRM)], "denied.drm"),
    ("a trailer in its place", [_refusal("UNPLAYABLE", "This video requires payment to watch", **TRAILER)],
     "qc.id_mismatch"),
    ("another video's answer", [_video(FORMAT, details={"videoId": OTHER})], "qc.id_mismatch"),
    ("several cameras", [_video(FORMAT, multicamera={"playerLegacyMulticameraRenderer": {"metadataList": FEEDS}})], ""),
    ("live now", [_video(FORMAT, details={"isLive": True, "isLiveContent": True})], "live.processing"),
    ("live now, in pieces", [_video(details={"isLive": True, "isLiveContent": True}, storyboards=STORYBOARD)],
     "live.processing"),
    ("live before, being processed", [_video(FORMAT, details={"isPostLiveDvr": True, "isLiveContent": True})],
     "live.processing"),
    ("live before", [_video(FORMAT, details={"isLiveContent": True})], ""),
    ("a premiere with a preview", [_video(FORMAT, details=UPCOMING)], "live.upcoming"),
    ("a premiere", [_refusal("LIVE_STREAM_OFFLINE", "Premieres in 2 days") | {"videoDetails": UPCOMING}],
     "live.upcoming"),
    ("yt-dlp trips over a key", [KeyError("streamingData")], "tool.extractor_broken"),
    ("yt-dlp trips over a type", [TypeError("'NoneType' object is not subscriptable")], "tool.extractor_broken"),
    ("yt-dlp trips over a name", [AttributeError("'list' object has no attribute 'get'")], "tool.extractor_broken"),
    ("the disk is full", [OSError(28, "No space left on device")], "local.disk"),
    ("the memory is full", [MemoryError()], "local.oom"),
]  # fmt: skip


@pytest.fixture(scope="module")
def canned() -> YouTubeFetcher:
    return YouTubeFetcher(extractors=(CannedIE,), timeout_s=1)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would leave this machine is an error of the test, not a slow pass."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the test went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def _error(fetcher: YouTubeFetcher, *responses: Any) -> ClipError:
    CANNED[:] = responses
    with pytest.raises(ClipError) as e:
        fetcher.extract(KEY)
    json.dumps(e.value.facts)
    assert e.value.facts["where"] == "extract"
    return e.value


@pytest.mark.parametrize("curly", [False, True], ids=["straight", "curly"])
@pytest.mark.parametrize(("status", "reason", "subreason", "expected"), REFUSALS)
def test_each_refusal(
    status: str, reason: str, subreason: str, expected: str, curly: bool, canned: YouTubeFetcher
) -> None:
    if curly:
        reason, subreason = reason.replace("'", "\u2019"), subreason.replace("'", "\u2019")
    error = _error(canned, _refusal(status, reason, subreason))
    assert error.reason == expected, error
    assert error.facts["playability_status"] == status
    assert error.facts["expected"] is True
    assert error.facts["exception"] == ("GeoRestrictedError" if expected == "denied.geo" else "ExtractorError")
    assert KEY not in error.message  # the ledger keeps the words, once for all videos
    assert "cookies" not in error.message
    assert "\u2019" not in error.message
    # what the ledger keeps is enough to judge again
    assert classify(error.message, **error.facts).code == expected


@pytest.mark.parametrize(("name", "responses", "expected"), ANSWERS, ids=[a[0] for a in ANSWERS])
def test_each_answer(name: str, responses: list[Any], expected: str, canned: YouTubeFetcher) -> None:
    if expected:
        assert _error(canned, *responses).reason == expected
        return
    CANNED[:] = responses
    info = canned.extract(KEY)
    assert info["id"] == KEY
    assert info["url"] == FORMAT["url"]


def test_the_words_at_the_start_are_never_enough() -> None:
    """Of all that begins with 'Video unavailable' only the bare words say that it may be gone, and that is a doubt."""
    begins = {expected for _, reason, sub, expected in REFUSALS if reason == "Video unavailable" and sub}
    assert len(begins) > 12
    assert "gone.unspecified" not in begins
    assert {"session.rate_limited", "session.suspect", "denied.client", "denied.geo"} <= begins


def test_every_reason_that_youtube_can_give_is_here() -> None:
    met = {r for *_, r in REFUSALS} | {r for *_, r in ANSWERS} | {"session.ip_blocked", "session.http_429"}
    assert {r for r in REASONS if r.startswith(("session.", "tool.", "gone.", "denied.", "live."))} <= met


def test_where_a_video_may_be_watched_is_kept(canned: YouTubeFetcher) -> None:
    answer = _refusal("UNPLAYABLE", "Video unavailable", GEO)
    answer["microformat"] = {"playerMicroformatRenderer": {"availableCountries": ["IS", "NO"]}}
    assert _error(canned, answer).facts["countries"] == ["IS", "NO"]


def test_what_a_page_says_of_a_video_is_kept(canned: YouTubeFetcher) -> None:
    CANNED[:] = [_video(FORMAT, microformat={"playerMicroformatRenderer": {"uploadDate": "2010-01-02"}})]
    info = canned.extract(KEY)
    assert (info["upload_date"], info["live_status"], info["duration"]) == ("20100102", "not_live", 200)
    assert info["playability_status"] == "OK"


def test_an_unasked_for_video_is_not_asked_for(canned: YouTubeFetcher) -> None:
    """A page that points elsewhere is refused before the other video costs a request."""
    error = _error(canned, _refusal("UNPLAYABLE", "This video requires payment to watch", **TRAILER))
    assert OTHER in error.message


@pytest.mark.parametrize(
    ("answer", "reason", "words"),
    [
        (_video(FORMAT, details={"videoId": OTHER}), "session.ip_blocked", "All player responses are invalid"),
        (None, "tool.extractor_broken", "Failed to extract any player response"),
        (_refusal("ERROR", "Video unavailable"), "gone.unspecified", "Video unavailable"),
    ],
    ids=["other videos", "nothing", "a refusal"],
)
def test_how_yt_dlp_weighs_the_clients_answers(answer: Any, reason: str, words: str) -> None:
    error = _error(YouTubeFetcher(extractors=(CannedPlayerIE,), timeout_s=1), answer)
    assert error.reason == reason
    assert error.message.startswith(words)


def _status(code: int, **headers: str) -> Callable[[], BaseException]:
    def make() -> BaseException:
        given = {k.replace("_", "-"): v for k, v in headers.items()}
        return HTTPError(Response(BytesIO(b"no"), "https://www.youtube.com/watch", given, status=code))

    return make


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (_status(429, Retry_After="120"), "session.http_429"),
        (_status(403), "session.suspect"),
        (_status(500), "net.5xx"),
        (_status(503), "net.5xx"),
        (lambda: TransportError(cause=socket.gaierror(-2, "Name or service not known")), "net.dns"),
        (lambda: TransportError(cause=ConnectionRefusedError(111, "Connection refused")), "net.connect"),
        (lambda: TransportError(cause=ConnectionResetError(104, "Connection reset by peer")), "net.reset"),
        (lambda: TransportError("The read operation timed out"), "net.timeout"),
        (lambda: SSLError("certificate verify failed"), "net.tls"),
        (lambda: IncompleteRead(partial=5, expected=9), "net.reset"),
    ],
    ids=["429", "403", "500", "503", "dns", "refused", "reset", "timeout", "tls", "incomplete"],
)
def test_a_network_that_fails_under_the_real_extractor(
    fault: Callable[[], BaseException], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """yt-dlp only warns of these, and then finds that it has no answer: that is not the extractor's fault."""
    fetcher = YouTubeFetcher(timeout_s=1)
    asked = []

    def urlopen(request: Any) -> Any:
        asked.append(request)
        raise fault()

    monkeypatch.setattr(fetcher._ydl, "urlopen", urlopen)
    with pytest.raises(ClipError) as e:
        fetcher.extract(KEY)
    assert e.value.reason == reason, e.value
    assert classify(e.value.message, **e.value.facts).code == reason
    assert 1 <= len(asked) < 20


def test_a_page_s_own_status_and_its_retry_after_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    fetcher = YouTubeFetcher("http://127.0.0.1:9/watch?v={key}", extractors=(_watch_page(),), timeout_s=1)

    def urlopen(request: Any) -> Any:
        raise _status(429, Retry_After="120")()

    monkeypatch.setattr(fetcher._ydl, "urlopen", urlopen)
    with pytest.raises(ClipError) as e:
        fetcher.extract(KEY)
    assert e.value.reason == "session.http_429"
    assert e.value.facts == {
        "where": "extract",
        "exception": "HTTPError",
        "http_status": 429,
        "retry_after_s": 120.0,
    }


def _watch_page() -> Any:
    from harken.world.youtube import WatchPageIE

    return WatchPageIE


def test_the_options_hold_no_evasion() -> None:
    params = YouTubeFetcher(timeout_s=1)._ydl.params
    assert params["geo_bypass"] is False
    for name in ("cookiefile", "cookiesfrombrowser", "proxy", "geo_verification_proxy", "username", "http_headers"):
        found = params.get(name)
        assert not found or (name == "http_headers" and not re.search("cookie|forwarded", str(found), re.IGNORECASE))
