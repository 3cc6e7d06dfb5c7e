"""Every way in which a server can fail ends in the right reason, in time, and costs no more bytes than it must."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from yt_dlp.extractor.common import InfoExtractor

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from fault_media import FASTSTART, FRAGMENTED, encode, repeated
from fault_server import STALL_S, Site, closed_port, serve

from harken.clips import Clip, Source, Split
from harken.datasets import DATASETS
from harken.errors import ClipError, DataError
from harken.guard import OVER_LIMITS
from harken.media.folder import FolderFetcher
from harken.media.http import HttpFetcher
from harken.media.range_reader import RangeReader, retry_after_s
from harken.media.reasons import REASONS
from harken.media.section import Section, cut
from harken.media.youtube import YouTubeFetcher
from harken.world.youtube import WatchPageIE

TIMEOUT_S = 0.3
PATIENCE_S = 10 * TIMEOUT_S + 2.0  # the longest that one answer may take, and a slow machine's share
LONG_S = 60.0


@pytest.fixture(scope="module")
def long() -> bytes:
    """A recording of several blocks, its index in front."""
    data = encode(LONG_S, options=FASTSTART, noise=8)
    assert len(data) > 4 * 256 * 1024
    return data


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve() as found:
        yield found


def _clip(key: str, start_s: float, end_s: float | None, host: str = "youtube") -> Clip:
    return Clip(f"{host}:{key}", "test", Split.TRAIN, Source(host, key, "files"), start_s, end_s)


class TubeIE(InfoExtractor):
    """A page for every id: one file, or sound and pictures apart where the id begins with 'apart'."""

    _VALID_URL = r"(?P<base>http://127\.0\.0\.1:\d+)/watch\?v=(?P<id>[\w-]+)"

    def _real_extract(self, url: str) -> dict[str, Any]:
        base, key = self._match_valid_url(url).group("base", "id")
        whole = {"format_id": "18", "url": f"{base}/{key}", "ext": "mp4", "vcodec": "avc1", "acodec": "mp4a"}
        sound = {**whole, "format_id": "140", "url": f"{base}/sound", "ext": "m4a", "vcodec": "none"}
        pictures = {**whole, "format_id": "134", "url": f"{base}/{key}", "acodec": "none"}
        formats = [sound, pictures] if key.startswith("apart") else [whole]
        return {
            "id": key,
            "title": "t",
            "upload_date": "20100102",
            "license": "CC BY",
            "availability": "public",
            "formats": [{"height": 360, **f} for f in formats],
        }


@pytest.fixture(scope="module")
def tube() -> YouTubeFetcher:
    return YouTubeFetcher("http://127.0.0.1:1/watch?v={key}", extractors=(TubeIE,), timeout_s=TIMEOUT_S)


def _fetch(route: str, tube: YouTubeFetcher, site: Site, timeout_s: float = TIMEOUT_S) -> Section:
    """The clip by one of the routes; what fails is always the file `media` (or `apart`, the pictures alone)."""
    if route == "http":
        fetcher = HttpFetcher(site.base + "/{key}", timeout_s=timeout_s)
        return fetcher.fetch(_clip("media", 40.0, 50.0, "zenodo"), True)
    tube._watch_url, tube._timeout_s = site.base + "/watch?v={key}", timeout_s
    return tube.fetch(_clip("media" if route == "youtube" else "apart", 40.0, 50.0), True)


def _outcome(ask: Callable[[], Section]) -> tuple[Section | None, ClipError]:
    """What came out: the section and an error without a reason, or the error."""
    try:
        return ask(), ClipError("")
    except ClipError as e:
        return None, e


# (fault, reason, most requests that it may take, what else is known)
AT_ONCE: list[tuple[str, str, int, dict[str, Any]]] = [
    ("400", "unknown.unmapped", 1, {"http_status": 400}),
    ("403", "media.403", 1, {"http_status": 403}),
    ("404", "media.404", 1, {"http_status": 404}),
    ("410", "media.410", 1, {"http_status": 410}),
    ("416", "media.416", 1, {"http_status": 416}),
    ("429", "session.http_429", 1, {"http_status": 429}),
    ("429 17", "session.http_429", 1, {"http_status": 429, "retry_after_s": 17.0}),
    ("429 date", "session.http_429", 1, {"http_status": 429, "retry_after_s": pytest.approx(90, abs=3)}),
    ("429 soon", "session.http_429", 1, {"http_status": 429}),
    ("500", "net.5xx", 1, {"http_status": 500}),
    ("502", "net.5xx", 1, {"http_status": 502}),
    ("503 30", "net.5xx", 1, {"http_status": 503, "retry_after_s": 30.0}),
    ("504", "net.5xx", 1, {"http_status": 504}),
    ("stall_headers", "net.timeout", 1, {"exception": "TimeoutError"}),
    ("drip_headers", "net.timeout", 1, {"exception": "TimeoutError"}),
    ("stall", "net.timeout", 1, {"exception": "TimeoutError"}),
    ("drip", "net.timeout", 1, {"exception": "TimeoutError"}),
    ("cut", "media.truncated", 1, {}),
    ("shorter_length", "media.truncated", 1, {}),
    ("longer_length", "", 20, {}),  # all that was asked for has come: what else was promised is not missed
    ("reset_headers", "net.reset", 1, {"exception": "ConnectionResetError"}),
    ("reset", "net.reset", 1, {"exception": "ConnectionResetError"}),
    ("close", "net.reset", 1, {"exception": "RemoteDisconnected"}),
    ("no_http", "net.connect", 1, {"exception": "BadStatusLine"}),
    ("chunked", "", 20, {}),
    ("chunked cut", "media.truncated", 1, {}),
    ("html 200", "media.not_media", 1, {"http_status": 200}),
    ("html 206", "media.not_media", 1, {}),
    ("json", "media.not_media", 1, {"http_status": 200}),
    ("no_range", "media.no_range", 1, {"http_status": 200}),
    ("multipart", "media.no_range", 1, {}),
    ("lie_start", "media.no_range", 1, {}),
    ("no_total", "media.no_range", 1, {}),
    ("packed", "media.no_range", 1, {}),
    ("redirect", "net.connect", 1, {"http_status": 302}),
    ("redirect file:///etc/hostname", "net.connect", 1, {"http_status": 302}),
    ("redirect http://127.0.0.1:99999/media", "net.connect", 1, {}),
    ("redirect http://[::1/media", "net.connect", 1, {}),
    ("redirect /media", "net.connect", 6, {"http_status": 302}),
    ("redirect /good", "", 20, {}),
    ("redirect /b%20l%C3%A4nk", "", 20, {}),
    ("redirect /b%20länk", "", 20, {}),
    ("nothing 200", "media.empty", 1, {"http_status": 200}),
    ("nothing 206", "media.no_range", 1, {}),
    ("nothing 204", "unknown.unmapped", 1, {"http_status": 204}),
]
# the first block is good: the demuxer is at work when it happens, and would take the error for the file's end
ON_THE_WAY: list[tuple[str, str]] = [
    ("late 403", "media.403"),
    ("late 404", "media.404"),
    ("late 410", "media.410"),
    ("late 416", "media.416"),
    ("late 429 60", "session.http_429"),
    ("late 503", "net.5xx"),
    ("late stall_headers", "net.timeout"),
    ("late stall", "net.timeout"),
    ("late drip", "net.timeout"),
    ("late cut", "media.truncated"),
    ("late shorter_length", "media.truncated"),
    ("late reset", "net.reset"),
    ("late chunked cut", "media.truncated"),
    ("late html 200", "media.not_media"),
    ("late html 206", "media.no_range"),
    ("late json", "media.not_media"),
    ("late no_range", "media.no_range"),
    ("late lie_start", "media.no_range"),
    ("late lie_total", "media.truncated"),  # the file has grown since
    ("late nothing 200", "media.empty"),
    ("late redirect /gone", "media.404"),
    ("late reset_headers", "net.reset"),
]


SLOW = ("drip_headers", "drip", "late drip")  # ten times the timeout each: a short one, and one route will do


@pytest.mark.parametrize(
    ("route", "fault", "reason", "n_requests", "facts"),
    [(r, *row) for row in AT_ONCE for r in ("http", "youtube") if r == "http" or row[0] not in SLOW],
)
def test_a_fault_at_the_first_request(
    route: str, fault: str, reason: str, n_requests: int, facts: dict[str, Any], tube: Any, site: Site, long: bytes
) -> None:
    site.files |= {"media": long, "good": long, "b%20l%C3%A4nk": long}
    site.faults["media"] = fault
    began = time.monotonic()
    section, error = _outcome(lambda: _fetch(route, tube, site, 0.1 if fault in SLOW else TIMEOUT_S))
    assert error.reason == reason, error
    if section is None:
        assert {k: error.facts.get(k) for k in facts} == facts
        assert error.facts["where"] == "media"
        assert error.facts["n_requests"] == len(site.asks)
        assert ("retry_after_s" in error.facts) == ("retry_after_s" in facts)
        assert error.message
        json.dumps(error.facts)
    else:
        assert section.decoded_s == pytest.approx(10.0)
        assert section.facts["n_bytes"] == section.bytes_fetched <= sum(a.n_bytes for a in site.asks)
        assert section.facts["n_requests"] == len(site.asks)
    assert time.monotonic() - began < PATIENCE_S
    assert sum(a.path == "media" for a in site.asks) <= n_requests


@pytest.mark.parametrize(
    ("route", "fault", "reason"),
    [(r, *row) for row in ON_THE_WAY for r in ("http", "apart") if r == "http" or row[0] not in SLOW],
)
def test_a_fault_while_the_demuxer_reads(
    route: str, fault: str, reason: str, tube: Any, site: Site, long: bytes
) -> None:
    site.files |= {"media": long, "apart": long, "sound": long}
    path = "apart" if route == "apart" else "media"
    site.faults[path] = fault
    began = time.monotonic()
    with pytest.raises(ClipError) as e:
        _fetch(route, tube, site, 0.1 if fault in SLOW else TIMEOUT_S)
    assert e.value.reason == reason
    assert e.value.facts["where"] == "media"
    assert time.monotonic() - began < PATIENCE_S
    assert e.value.facts["n_bytes"] <= 6 * 256 * 1024


# the same servers, when yt-dlp asks them for the watch page
PAGES: list[tuple[str, str, dict[str, Any]]] = [
    ("429 17", "session.http_429", {"http_status": 429, "retry_after_s": 17.0}),
    ("403", "session.suspect", {"http_status": 403}),
    ("404", "gone.unspecified", {"http_status": 404}),
    ("410", "gone.unspecified", {"http_status": 410}),
    ("500", "net.5xx", {"http_status": 500}),
    ("503 30", "net.5xx", {"http_status": 503, "retry_after_s": 30.0}),
    ("stall_headers", "net.timeout", {}),
    ("stall", "net.timeout", {}),
    ("reset_headers", "net.reset", {}),
    ("close", "net.reset", {}),
    ("cut", "net.reset", {}),
    ("redirect /watch", "net.connect", {"http_status": 302}),  # a page that redirects to itself
    ("html 200", "tool.extractor_broken", {}),  # a page without a player response: a consent page
    ("json", "tool.extractor_broken", {}),
    ("nothing 200", "tool.extractor_broken", {}),
]


@pytest.mark.parametrize(("fault", "reason", "facts"), PAGES, ids=[p[0] for p in PAGES])
def test_a_fault_of_the_watch_page(fault: str, reason: str, facts: dict[str, Any], site: Site) -> None:
    fetcher = YouTubeFetcher(site.base + "/watch?v={key}", extractors=(WatchPageIE,), timeout_s=TIMEOUT_S)
    site.files["watch"] = b"<html>" + bytes(3000)
    site.faults["watch"] = fault
    began = time.monotonic()
    with pytest.raises(ClipError) as e:
        fetcher.fetch(_clip("-PJHxphWEs1", 1.0, 2.0), True)
    assert e.value.reason == reason, e.value
    assert {k: e.value.facts.get(k) for k in facts} == facts
    assert e.value.facts["where"] == "extract"
    assert time.monotonic() - began < PATIENCE_S
    json.dumps(e.value.facts)


def test_every_reason_of_a_server_s_making_was_met() -> None:
    met = {r for _, r, _, _ in AT_ONCE} | {r for _, r in ON_THE_WAY}
    by_others = {"net.dns", "net.tls", *OVER_LIMITS}  # tested below; and what ends a process that decodes
    wanted = {r for r in REASONS if r.startswith(("net.", "media."))} | {"session.http_429"}
    assert wanted - by_others <= met


def test_a_server_that_is_not_there_or_does_not_speak_tls(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def reason(url: str) -> str:
        with pytest.raises(ClipError) as e:
            RangeReader(url, timeout_s=TIMEOUT_S)
        assert e.value.facts["exception"]
        return e.value.reason

    assert reason(f"http://127.0.0.1:{closed_port()}/media") == "net.connect"
    assert reason(site.base.replace("http", "https") + "/media") in ("net.tls", "net.timeout")

    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert reason("http://media.example/a.mp4") == "net.dns"


def test_a_slow_server_is_given_up_before_the_day_is_over(site: Site, long: bytes) -> None:
    """Each answer comes in time, all of them do not: the file has a patience of its own."""
    site.files["media"] = long
    with RangeReader(site.url("media"), timeout_s=TIMEOUT_S, block_bytes=4096) as reader:
        reader._waited_s = 30 * TIMEOUT_S + 0.01
        reader.seek(500_000)
        with pytest.raises(ClipError) as e:
            reader.read(10)
    assert e.value.reason == "net.timeout"
    assert len(site.asks) == 1


def test_a_file_that_changes_while_it_is_read_is_no_clip(site: Site, long: bytes) -> None:
    site.files["media"] = long
    fetcher = HttpFetcher(site.base + "/{key}", timeout_s=TIMEOUT_S)
    for answers, reason in [
        (["version a", "version b"], "media.truncated"),
        (["version a mon", "version a mon"], ""),
        (["version a mon", "version b mon"], ""),  # two mirrors of one file, each with its own tag
        (["version a mon", "version b tue"], "media.truncated"),
        (["version a", ""], ""),
    ]:
        site.faults["media"] = list(answers)
        if reason:
            with pytest.raises(ClipError, match="changed") as e:
                fetcher.fetch(_clip("media", 40.0, 50.0, "zenodo"), True)
            assert e.value.reason == reason
        else:
            assert fetcher.fetch(_clip("media", 40.0, 50.0, "zenodo"), True).decoded_s == pytest.approx(10.0)


def test_a_redirect_to_another_host_is_followed(site: Site, long: bytes) -> None:
    site.files["good"] = long
    port = site.base.rpartition(":")[2]
    site.faults["media"] = f"redirect http://localhost:{port}/good"
    section = HttpFetcher(site.base + "/{key}", timeout_s=1).fetch(_clip("media", 40.0, 50.0, "zenodo"), True)
    assert section.decoded_s == pytest.approx(10.0)
    assert [a.path for a in site.asks].count("media") == 1  # the new place is remembered
    assert {a.host for a in site.asks if a.path == "good"} == {f"localhost:{port}"}


def test_retry_after_in_all_its_forms() -> None:
    assert retry_after_s("0") == 0.0
    assert retry_after_s(" 120 ") == 120.0
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0  # long past
    for nothing in (None, "", "soon", "-3", "1.5", "99999999999999", "Wed, 99 Oct 2015"):
        assert retry_after_s(nothing) is None


RECORDINGS: dict[str, dict[str, Any]] = {
    "moov at end": {},
    "faststart": {"options": FASTSTART},
    "fragmented": {"options": FRAGMENTED},
    "webm": {"container": "webm"},
    "matroska": {"container": "matroska"},
}
SECONDS = 30.0


@pytest.fixture(scope="module", params=sorted(RECORDINGS))
def recording(request: pytest.FixtureRequest) -> bytes:
    return encode(SECONDS, **{"container": "mp4", **RECORDINGS[request.param]})


@pytest.fixture(scope="module")
def places(recording: bytes) -> list[tuple[float, float, str]]:
    """All places for the first MP4 and for WebM, every third for their kin."""
    is_kin = b"matroska" in recording[:64] or b"mvex" in recording or recording.find(b"moov") < 100
    return PLACES[::3] if is_kin else PLACES


# (start, end, the reason): of a recording of 30 s
PLACES: list[tuple[float, float, str]] = [
    *((12.0, 12.0 + n, "") for n in range(1, 10)),
    *((SECONDS - n, SECONDS, "") for n in (1, 2, 5, 9)),
    (0.0, 1.0, ""),
    (0.0, 10.0, ""),
    (13.337, 20.021, ""),
    (0.4, 0.95, ""),
    (20.0, 30.04, ""),
    (24.0, 34.0, "qc.short"),
    (29.6, 39.6, "qc.past_end"),
    (SECONDS, SECONDS + 10, "qc.past_end"),
    (SECONDS - 0.04, SECONDS + 10, "qc.past_end"),
    (SECONDS + 0.5, SECONDS + 10, "qc.past_end"),
    (90.0, 100.0, "qc.past_end"),
    (5000.0, 5010.0, "qc.past_end"),
]


def test_every_place_of_every_format(recording: bytes, places: list[tuple[float, float, str]], site: Site) -> None:
    site.files["media"] = recording
    fetcher = HttpFetcher(site.base + "/{key}", timeout_s=2)
    for start_s, end_s, reason in places:
        clip = _clip("media", start_s, end_s, "zenodo")
        section, error = _outcome(functools.partial(fetcher.fetch, clip, True))
        assert error.reason == reason, (start_s, end_s, error)
        if section is None:
            continue
        assert section.decoded_s == pytest.approx(min(end_s, SECONDS) - start_s, abs=0.06)


def test_broken_files_that_their_server_thinks_whole(recording: bytes, site: Site) -> None:
    fetcher = HttpFetcher(site.base + "/{key}", timeout_s=2)
    n = len(recording)
    for broken, reason in [
        (b"", "media.empty"),
        (recording[: n // 50], "media.truncated"),
        (recording[: n // 3], "media.truncated"),
        (recording[: n * 2 // 5], "media.truncated"),
        (bytes(n), "media.not_media"),
        (b"\xff\xfe" * 5000, "media.not_media"),
        (b"Not Found\n", "media.not_media"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "media.not_media"),
    ]:
        site.files["media"] = broken
        with pytest.raises(ClipError) as e:
            fetcher.fetch(_clip("media", 18.0, 28.0, "zenodo"), True)
        assert e.value.reason == reason, broken[:20]


@pytest.fixture(scope="module", params=["faststart", "moov at end", "webm"])
def four_minutes(request: pytest.FixtureRequest) -> bytes:
    how = RECORDINGS[request.param]
    part = encode(30.0, **{"container": "mp4", "noise": 100, "gop_s": 5.0, "bit_rate": 300_000, **how})
    return repeated(part, 8, how.get("container", "mp4"), how.get("options"))


@pytest.mark.parametrize("start_s", [0.0, 103.0, 230.0])
def test_ten_seconds_of_four_minutes_cost_a_fraction_of_the_bytes(
    four_minutes: bytes, start_s: float, site: Site
) -> None:
    n = len(four_minutes)
    site.files["media"] = four_minutes
    with RangeReader(site.url("media"), timeout_s=2, block_bytes=64 * 1024) as reader:
        section = cut(reader, start_s, start_s + 10, True)
    assert section.decoded_s == pytest.approx(10.0, abs=0.03)
    assert section.bytes_fetched == site.bytes_of("media")
    assert section.bytes_fetched < 0.20 * n
    # what was fetched: the file's head and tail, where its index lies, and one stretch around the clip
    share = (start_s / 240, (start_s + 10) / 240)
    stretch = [a for a in site.asks if a.first is not None and 128 * 1024 < a.first < n - 192 * 1024]
    for ask in stretch:
        assert share[0] - 0.05 < ask.first / n < share[1] + 0.05  # type: ignore[operator]


def test_what_a_fetch_says_of_itself(tube: YouTubeFetcher, site: Site, long: bytes) -> None:
    site.files |= {"media": long, "apart": long, "sound": long}
    one, two = _fetch("youtube", tube, site), _fetch("apart", tube, site)
    assert one.facts == {
        "duration_s": pytest.approx(LONG_S, abs=0.1),
        "info_id": "media",
        "formats": ["18"],
        "availability": "public",
        "upload_date": "20100102",
        "license": "CC BY",
        "n_bytes": one.bytes_fetched,
        "n_requests": one.facts["n_requests"],
    }
    assert two.facts["formats"] == ["134", "140"]
    assert two.facts["n_bytes"] == two.bytes_fetched == site.bytes_of("apart") + site.bytes_of("sound")
    site.faults["apart"] = "late 403"
    site.asks.clear()
    with pytest.raises(ClipError) as e:
        _fetch("apart", tube, site)
    facts = e.value.facts
    assert (facts["info_id"], facts["formats"], facts["http_status"]) == ("apart", ["134", "140"], 403)
    assert facts["n_bytes"] == pytest.approx(sum(a.n_bytes for a in site.asks), abs=5)  # less a refusal's few
    assert facts["n_requests"] == len(site.asks)
    site.files["media"] = encode(3.0)
    with pytest.raises(ClipError) as e:  # a verdict of our own, with what it cost
        _fetch("youtube", tube, site)
    assert e.value.reason == "qc.past_end"
    assert e.value.facts["n_bytes"] == len(site.files["media"])


BAD_NAMES = ("../../x.wav", "/etc/passwd.wav", "a\0b.wav", "..\\x.wav", "C:\\x.wav", "a/b.wav", "..", ".", "")


def test_names_that_are_paths_never_leave_their_place(site: Site, tmp_path: Path, tube: YouTubeFetcher) -> None:
    tube._watch_url = site.base + "/watch?v={key}"
    wav = encode(2.0, "wav")
    inside = tmp_path / "inside" / "deep"
    inside.mkdir(parents=True)
    (tmp_path / "x.wav").write_bytes(wav)
    (inside / "good.wav").write_bytes(wav)
    folder = FolderFetcher(inside)
    http = HttpFetcher(site.base + "/files/{key}", timeout_s=1)
    for name in BAD_NAMES:
        for host, archive in (("zenodo", ""), ("zenodo", "../.."), ("youtube", "")):
            clip = Clip("c", "t", Split.TRAIN, Source(host, name, archive), 0.0, None)
            with pytest.raises(ClipError) as e:
                folder.fetch(clip, False)
            assert e.value.reason == "folder.absent"
        with pytest.raises(ClipError) as e:
            http.fetch(_clip(name, 0.0, None, "zenodo"), False)
        assert e.value.reason == ("local.bug" if name in ("", ".", "..") else "media.404")
        with pytest.raises(ClipError, match="no video id") as e:
            tube.fetch(_clip(name, 0.0, 1.0), False)
        assert e.value.reason == "local.bug"
    assert all(a.path.startswith("files/") and ".." not in a.path.split("/") for a in site.asks)
    assert len({a.path for a in site.asks}) == len(BAD_NAMES) - 3  # each name reached the server as one quoted segment
    assert all(a.path.count("/") == 1 for a in site.asks)


@pytest.mark.parametrize("key", ["-PJHxphWEs1", "--PJHxphWEs", "_a_b_c_d_e_", "-_-_-_-_-_-"])
def test_ids_with_dashes_and_underscores_are_only_ids(
    key: str, site: Site, tmp_path: Path, tube: YouTubeFetcher
) -> None:
    data = encode(3.0)
    site.files[key] = data
    (tmp_path / f"{key}.mp4").write_bytes(data)
    tube._watch_url = site.base + "/watch?v={key}"
    for fetcher in (tube, FolderFetcher(tmp_path)):
        assert fetcher.fetch(_clip(key, 1.0, 2.5), True).decoded_s == pytest.approx(1.5)
    listed = tmp_path / "list.csv"
    listed.write_text(f"audiocap_id,youtube_id,start_time,caption\n1,{key},30,a dog\n")
    assert [c.source.key for c in DATASETS["audiocaps"].clips(listed, split="val")] == [key]


@pytest.mark.parametrize("name", [n for n in BAD_NAMES if n])
def test_lists_refuse_names_that_are_paths(name: str, tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text(f"file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n{name},a,b,c,d,e\n")
    with pytest.raises(DataError, match=r"list\.csv:2"):
        list(DATASETS["clotho"].clips(path, split="development"))
    path.write_text(f"audiocap_id,youtube_id,start_time,caption\n1,{name},30,a dog\n")
    with pytest.raises(DataError, match=r"list\.csv:2"):
        list(DATASETS["audiocaps"].clips(path, split="val"))


def test_garbage_of_an_earlier_run_is_no_recording(tmp_path: Path) -> None:
    """Half files that other tools leave behind are not taken for the clip; nothing is resumed."""
    data = encode(6.0)
    for name in ("abcdefghijk.mp4.part", "abcdefghijk.mp4.tmp", "abcdefghijk.f137.mp4.part-Frag3", "abcdefghijk.ytdl"):
        (tmp_path / name).write_bytes(bytes(5000))
    with pytest.raises(ClipError) as e:
        FolderFetcher(tmp_path).fetch(_clip("abcdefghijk", 1.0, 3.0), True)
    assert e.value.reason == "folder.absent"
    for content, reason in (
        (b"", "media.empty"),
        (bytes(9000), "media.not_media"),
        (data[:4000], "media.truncated"),
        (b"Traceback (most recent call last):\n", "media.not_media"),
    ):
        (tmp_path / "abcdefghijk.mp4").write_bytes(content)
        with pytest.raises(ClipError) as e:
            FolderFetcher(tmp_path).fetch(_clip("abcdefghijk", 1.0, 3.0), True)
        assert e.value.reason == reason
    (tmp_path / "abcdefghijk.mp4").write_bytes(data)
    assert FolderFetcher(tmp_path).fetch(_clip("abcdefghijk", 1.0, 3.0), True).decoded_s == pytest.approx(2.0)


def test_tags_in_another_alphabet_do_not_cost_the_clip(tmp_path: Path) -> None:
    wav = encode(3.0, "wav")
    tag = b"INFOINAM" + (8).to_bytes(4, "little") + "café \xff\xfe\0".encode("latin-1")
    chunk = b"LIST" + len(tag).to_bytes(4, "little") + tag
    size = (len(wav) + len(chunk) - 8).to_bytes(4, "little")
    (tmp_path / "abcdefghijk.wav").write_bytes(wav[:4] + size + wav[8:12] + chunk + wav[12:])
    section = FolderFetcher(tmp_path).fetch(_clip("abcdefghijk", 0.5, 2.5), False)
    assert section.decoded_s == pytest.approx(2.0)


def test_a_codec_that_nobody_knows_is_no_media(tmp_path: Path) -> None:
    data = encode(3.0, "matroska")
    for known, unknown in ((b"A_AAC", b"A_ZZZ"), (b"V_MPEG4/ISO/AVC", b"V_ZZZZZZZZZZZZZ")):
        assert data.count(known) == 1
        (tmp_path / "abcdefghijk.mkv").write_bytes(data.replace(known, unknown))
        with pytest.raises(ClipError, match="no decoder") as e:
            FolderFetcher(tmp_path).fetch(_clip("abcdefghijk", 0.5, 2.5), True)
        assert e.value.reason == "media.not_media"


def test_nothing_stalls_longer_than_its_test() -> None:
    assert 3 * TIMEOUT_S < STALL_S < PATIENCE_S
