"""The census against a loopback server that answers like videos.list, and like it on a bad day."""

from __future__ import annotations

import contextlib
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harken.errors import ConfigError, DataError
from harken.media.census import ABSENT, Census, CensusPaused, duration_s, key_from_environment, n_calls

KEY = "secret-key-of-nobody"
NOON = datetime(2026, 7, 1, 19, 0, tzinfo=UTC).timestamp()  # noon in California, in summer
MIDNIGHT_MS = round(1000 * datetime(2026, 7, 2, 7, 0, tzinfo=UTC).timestamp())


@dataclass
class Site:
    """What the server holds and how it misbehaves: `faults` are used up one a call."""

    url: str = ""
    videos: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=list)
    calls: list[dict[str, list[str]]] = field(default_factory=list)


def video(duration: str = "PT3M20S", **changes: Any) -> dict[str, Any]:
    status = {"uploadStatus": "processed", "privacyStatus": "public", "license": "youtube", "embeddable": True}
    details: dict[str, Any] = {"duration": duration, "definition": "sd", "contentRating": {}}
    for name, value in changes.items():
        (status if name in status or name.endswith("Reason") else details)[name] = value
    return {"kind": "youtube#video", "status": status, "contentDetails": details}


def send(handler: BaseHTTPRequestHandler, status: int, body: Any, **headers: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(raw)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(raw)


def fails(status: int, reason: str, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    error = {"code": status, "message": f"Because of {reason}.", "errors": [{"reason": reason, "domain": "youtube"}]}
    return lambda handler: send(handler, status, {"error": error}, **headers)


def hangs_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def cuts(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"items": [')
    handler.close_connection = True


def echoes(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(handler.requestline.encode() + b"\r\n")
    handler.close_connection = True


def drips(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(20):
            handler.wfile.write(b" ")
            time.sleep(0.05)


@pytest.fixture
def site() -> Iterator[Site]:
    it = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            it.calls.append(query)
            if it.faults:
                it.faults.pop(0)(self)
                return
            ids = query["id"][0].split(",")
            assert (url.path, len(ids) <= 50, query["part"]) == ("/v3/videos", True, ["status,contentDetails"])
            items = [{"id": i, **it.videos[i]} for i in ids if i in it.videos]
            send(self, 200, {"kind": "youtube#videoListResponse", "items": items, "pageInfo": {}})

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    it.url = f"http://127.0.0.1:{server.server_address[1]}/v3"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield it
    server.shutdown()
    server.server_close()
    thread.join()


class Clock:
    def __init__(self) -> None:
        self.now = NOON
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def census_of(folder: Path, site: Site, clock: Clock, **changes: Any) -> Census:
    return Census(folder, KEY, base_url=site.url, timeout_s=5, clock=clock, sleep=clock.sleep, **changes)


def key(i: int) -> str:
    return f"-_{i:09d}"  # ids may start with a dash and hold underscores


def test_present_and_absent_fifty_at_a_call(tmp_path: Path, site: Site, clock: Clock) -> None:
    site.videos = {key(i): video(f"PT{i % 60}M1S") for i in range(123) if i % 3}
    found = list(census_of(tmp_path, site, clock).ask(key(i) for i in range(123)))
    assert [f.key for f in found] == [key(i) for i in range(123)]
    assert [f.outcome for f in found] == ["ok" if i % 3 else "failed" for i in range(123)]
    assert [len(c["id"][0].split(",")) for c in site.calls] == [50, 50, 23]
    assert all(c["key"] == [KEY] for c in site.calls)
    absent, present = found[0], found[1]
    assert (absent.reason, absent.message, absent.facts) == ("gone.unspecified", ABSENT, {})
    assert (present.reason, present.message) == ("", "")
    assert present.facts == {
        "duration_s": 61.0,
        "availability": "public",
        "license": "youtube",
        "is_embeddable": True,
        "is_age_restricted": False,
    }
    assert present.began_ms == present.ended_ms == round(1000 * NOON)
    json.dumps([f._asdict() for f in found])


def test_what_the_service_tells_of_country_age_and_upload(tmp_path: Path, site: Site, clock: Clock) -> None:
    site.videos = {
        key(0): video(regionRestriction={"blocked": ["US", "DE"]}),
        key(1): video(regionRestriction={"allowed": ["US", "JP"]}),
        key(2): video(regionRestriction={"allowed": []}),
        key(3): video(regionRestriction={"blocked": []}),
        key(4): video(contentRating={"ytRating": "ytAgeRestricted"}),
        key(5): video(privacyStatus="unlisted"),
        key(6): video(uploadStatus="rejected", rejectionReason="copyright"),
        key(7): video(privacyStatus="private"),
        key(8): video("P0D"),
        key(9): {"status": {}, "contentDetails": None},
    }
    found = {f.key: f for f in census_of(tmp_path, site, clock, country="DE").ask(site.videos)}
    assert [found[key(i)].facts["is_blocked_here"] for i in range(5)] == [True, True, True, False, False]
    assert found[key(0)].facts["region_blocked"] == ["DE", "US"]
    assert found[key(1)].facts["region_allowed"] == ["JP", "US"]
    assert all(found[key(i)].outcome == "ok" for i in (0, 1, 2, 3, 4, 5, 8, 9))  # present, though perhaps not from here
    assert found[key(4)].facts["is_age_restricted"] is True
    assert found[key(5)].facts["availability"] == "unlisted"
    assert found[key(6)][1:4] == ("failed", "gone.unspecified", "uploadStatus rejected: copyright")
    assert found[key(7)][1:4] == ("failed", "gone.private", "privacyStatus private")
    assert "duration_s" not in found[key(8)].facts  # a broadcast yet to come


def test_a_canary_in_every_call_tells_a_broken_answer_from_absent_videos(
    tmp_path: Path, site: Site, clock: Clock
) -> None:
    canaries = ("canary_one_", "canary_two_", "canary_tri_")
    site.videos = {canaries[2]: video()}
    census = census_of(tmp_path, site, clock, canary_keys=canaries)
    found = list(census.ask(key(i) for i in range(96)))
    asked = [c["id"][0].split(",") for c in site.calls]
    assert [len(a) for a in asked] == [50, 50]
    assert [a[48:] for a in asked] == [["canary_one_", "canary_two_"], ["canary_tri_", "canary_one_"]]
    # the first call saw no canary and proves nothing; in the second one of two is enough
    assert {f.reason for f in found[:48]} == {"session.suspect"}
    assert "canary_one_ and canary_two_" in found[0].message
    assert {(f.reason, f.message) for f in found[48:]} == {("gone.unspecified", ABSENT)}
    assert len(found) == 96
    site.videos[key(0)] = video()
    site.videos.pop(canaries[2])
    assert [f.outcome for f in census.ask([key(0), key(1)])] == ["ok", "failed"]  # presence needs no witness


def test_ids_are_checked_before_they_are_sent(tmp_path: Path, site: Site, clock: Clock) -> None:
    census = census_of(tmp_path, site, clock)
    for wrong in ("short", "with,commaXX", "a" * 12, "", "../../../ab"):
        with pytest.raises(DataError, match="no video id"):
            list(census.ask([wrong]))
    assert site.calls == []
    assert [f.key for f in census.ask([key(1), key(1), key(2)])] == [key(1), key(2)]


def test_the_budget_of_a_day_is_kept_over_restarts_and_ends_at_midnight_pacific(
    tmp_path: Path, site: Site, clock: Clock
) -> None:
    keys = [key(i) for i in range(500)]
    done: list[str] = []
    with pytest.raises(CensusPaused, match="3 quota units") as e:
        done.extend(f.key for f in census_of(tmp_path, site, clock, units_per_day=3).ask(keys))
    assert done == keys[:150]  # what was found holds
    assert e.value.until_ms == MIDNIGHT_MS
    with pytest.raises(CensusPaused):
        list(census_of(tmp_path, site, clock, units_per_day=3).ask(keys[150:]))
    assert len(site.calls) == 3
    clock.now = MIDNIGHT_MS / 1000
    census = census_of(tmp_path, site, clock, units_per_day=8)
    assert census.units_left() == 8
    assert [f.key for f in census.ask(keys[150:])] == keys[150:]
    assert census.units_left() == 1
    clock.now -= 86400  # a clock set back gives no second budget
    assert census.units_left() == 1


@pytest.mark.parametrize("reason", ["quotaExceeded", "dailyLimitExceeded"])
def test_the_service_says_that_the_quota_is_spent(tmp_path: Path, site: Site, clock: Clock, reason: str) -> None:
    census = census_of(tmp_path, site, clock)
    assert len(list(census.ask(key(i) for i in range(50)))) == 50
    site.faults = [fails(403, reason)]
    with pytest.raises(CensusPaused, match=reason) as e:
        list(census.ask([key(1)]))
    assert e.value.until_ms == MIDNIGHT_MS
    assert len(site.calls) == 2  # asked once and no more
    assert census.units_left() == 0
    copy = pickle.loads(pickle.dumps(e.value))
    assert (str(copy), copy.until_ms) == (str(e.value), MIDNIGHT_MS)


@pytest.mark.parametrize(
    "fault",
    [
        fails(500, "backendError"),
        fails(503, ""),
        fails(429, "rateLimitExceeded"),
        fails(403, "userRateLimitExceeded"),
        hangs_up,
        cuts,
        echoes,
        lambda h: send(h, 200, b"<html>Welcome to the hotel</html>"),
        lambda h: send(h, 200, {"error": {}}),
        lambda h: send(h, 200, []),
        lambda h: send(h, 200, {"items": [{"id": "another_one"}]}),
        lambda h: send(h, 200, {"items": [3]}),
    ],
)
def test_no_answer_is_asked_again_and_never_a_finding(tmp_path: Path, site: Site, clock: Clock, fault: Any) -> None:
    site.videos = {key(1): video()}
    site.faults = [fault] * 2
    census = census_of(tmp_path, site, clock)
    assert [f.outcome for f in census.ask([key(1)])] == ["ok"]
    assert len(clock.slept) == 2
    assert census.units_left() == 10_000 - 3  # a call that fails costs a unit too
    site.faults = [fault] * 5
    with pytest.raises(CensusPaused, match="asked 5 times") as e:
        list(census.ask([key(1)]))
    assert e.value.until_ms == round(1000 * (clock.now + 600))
    assert KEY not in str(e.value)


def test_retry_after_is_honoured(tmp_path: Path, site: Site, clock: Clock) -> None:
    site.faults = [fails(429, "rateLimitExceeded", Retry_After="77")]
    assert len(list(census_of(tmp_path, site, clock).ask([key(1)]))) == 1
    assert clock.slept == [77]
    site.faults = [fails(503, "", Retry_After="7200")]
    with pytest.raises(CensusPaused, match="Retry-After") as e:
        list(census_of(tmp_path, site, clock).ask([key(1)]))
    assert e.value.until_ms == round(1000 * (clock.now + 7200))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (fails(400, "keyInvalid"), "refuses the key.*keyInvalid"),
        (fails(403, "accessNotConfigured"), "accessNotConfigured.*is enabled"),
        (fails(403, "ipRefererBlocked"), "ipRefererBlocked"),
        (fails(401, "x"), "HTTP 401"),
        (fails(404, "x"), "not the YouTube Data API"),
        (lambda h: send(h, 302, b"", Location="http://127.0.0.1:9/elsewhere"), "HTTP 302"),
        (lambda h: send(h, 403, {"error": {"message": f"bad key {KEY}", "status": "X"}}), "bad key <key>"),
    ],
)
def test_a_refused_key_is_for_the_user_to_mend(
    tmp_path: Path, site: Site, clock: Clock, fault: Any, words: str
) -> None:
    site.faults = [fault]
    with pytest.raises(ConfigError, match=words) as e:
        list(census_of(tmp_path, site, clock).ask([key(1)]))
    assert len(site.calls) == 1
    assert KEY not in str(e.value)


def test_nobody_listens(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(CensusPaused, match="no answer") as e:
        list(census_of(tmp_path, Site("http://127.0.0.1:9"), clock).ask([key(1)]))
    assert KEY not in str(e.value)


@pytest.mark.parametrize("fault", [lambda h: time.sleep(0.6), drips])
def test_a_server_that_stalls_holds_nobody_up(tmp_path: Path, site: Site, clock: Clock, fault: Any) -> None:
    site.faults = [fault] * 5
    census = Census(tmp_path, KEY, base_url=site.url, timeout_s=0.1, clock=clock, sleep=clock.sleep)
    began = time.monotonic()
    with pytest.raises(CensusPaused, match=r"TimeoutError|timed out"):
        list(census.ask([key(1)]))
    assert time.monotonic() - began < 4


def test_the_key_comes_from_the_environment() -> None:
    assert key_from_environment({"HARKEN_YOUTUBE_API_KEY": " abc "}) == "abc"
    for environ in ({}, {"HARKEN_YOUTUBE_API_KEY": "  "}):
        with pytest.raises(ConfigError, match="HARKEN_YOUTUBE_API_KEY: not set"):
            key_from_environment(environ)


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "ftp://x"},
        {"base_url": "http://x y"},
        {"base_url": "http://x?"},
        {"country": "Germany"},
        {"units_per_day": 0},
    ],
)
def test_unusable_arguments_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="census"):
        Census(tmp_path, KEY, **wrong)
    with pytest.raises(DataError, match="canary"):
        Census(tmp_path, KEY, canary_keys=("nope",))


def test_calls_of_a_whole_census() -> None:
    assert n_calls(2_041_789 + 22_160 + 20_371) == 41_687
    assert n_calls(0) == 0
    assert n_calls(97, n_canaries=2) == 3


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_durations(days: int, hours: int, minutes: int, seconds: int) -> None:
    parts = [f"{n}{u}" for n, u in ((hours, "H"), (minutes, "M"), (seconds, "S")) if n]
    text = "P" + (f"{days}D" if days else "") + ("T" + "".join(parts) if parts else "")
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert duration_s(text) == (total or None)


@pytest.mark.parametrize("text", [None, "", "P", "3:20", "PT3M20", 200, "PT-1S"])
def test_what_is_no_duration(text: object) -> None:
    assert duration_s(text) is None
