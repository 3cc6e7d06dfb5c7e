"""Census: which videos are still there, by the official YouTube Data API, fifty at a call and no media touched.

`videos.list` answers with the videos that an anonymous caller may see. A video that it leaves out may be deleted,
private or of a closed account: the census knows *that*, never *why*, and one absence is a suspicion like any other. A
canary in every call tells a broken answer from fifty absent videos.

All 2.08 million ids of AudioSet are 41,687 calls of one quota unit; a key's default is 10,000 units a day
(developers.google.com/youtube/v3/determine_quota_cost).
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from harken.errors import ConfigError, DataError, HarkenError
from harken.media.lanes import SharedState
from harken.media.range_reader import retry_after_s

log = logging.getLogger("harken")

KEY_VARIABLE: Final = "HARKEN_YOUTUBE_API_KEY"
BASE_URL: Final = "https://www.googleapis.com/youtube/v3"
IDS_PER_CALL: Final = 50
UNITS_PER_DAY: Final = 10_000
ABSENT: Final = "absent in videos.list"

_TRIES: Final = 5
_PATIENCE_S: Final = 120.0  # a longer Retry-After ends the run instead of holding it up
_MAX_ANSWER: Final = 4 << 20  # fifty videos are about 50 kB
_VIDEO_ID: Final = re.compile(r"[0-9A-Za-z_-]{11}")
_DURATION: Final = re.compile(r"P(?:(\d+)W)?(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?)?")
_QUOTA: Final = frozenset({"quotaExceeded", "dailyLimitExceeded"})
_SLOW_DOWN: Final = frozenset({"rateLimitExceeded", "userRateLimitExceeded", "servingLimitExceeded"})
_PACIFIC: Final = "America/Los_Angeles"  # where Google's quota day ends at midnight


class CensusPaused(HarkenError):  # noqa: N818 - a state of the census, not a mistake
    """The census cannot go on before `until_ms` (UTC epoch milliseconds), because of `why`. Findings so far hold."""

    def __init__(self, until_ms: int, why: str) -> None:
        when = datetime.fromtimestamp(until_ms / 1000, UTC).isoformat(" ", "minutes").removesuffix("+00:00")
        super().__init__(f"census: paused until {when} UTC: {why}. What was found is kept; run it again then.")
        self.until_ms, self.why = until_ms, why

    def __reduce__(self) -> tuple[type[CensusPaused], tuple[int, str]]:
        return type(self), (self.until_ms, self.why)


class Finding(NamedTuple):
    """What one call said of one video, in the words of an attempt (step `census`).

    outcome `ok`: present, for an anonymous caller; `facts` holds duration_s, availability (`public` or `unlisted`),
    license, is_embeddable, is_age_restricted, region_allowed or region_blocked (ISO 3166 codes) where they are told,
    and is_blocked_here where a country was given. Present is not yet served: age and country may still deny it.

    outcome `failed`, reason `gone.unspecified`, message ABSENT: left out. No evidence of why. Reason `session.suspect`:
    the canary was left out too, so that this call says nothing.
    """

    key: str
    outcome: str
    reason: str
    message: str
    facts: dict[str, Any]
    began_ms: int
    ended_ms: int


def key_from_environment(environ: Mapping[str, str] = os.environ) -> str:
    """The API key of the variable HARKEN_YOUTUBE_API_KEY. Raises ConfigError where it is not set."""
    key = environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise ConfigError(
            f"{KEY_VARIABLE}: not set. A census needs a key of the YouTube Data API v3: create one, free of charge, at "
            f"https://console.cloud.google.com/apis/credentials, and set {KEY_VARIABLE} to it."
        )
    return key


def n_calls(n_videos: int, n_canaries: int = 0) -> int:
    """How many calls, of one unit each, a census of `n_videos` takes with that many canaries in each call."""
    return math.ceil(n_videos / (IDS_PER_CALL - n_canaries))


class Census:
    """Asks `videos.list` for the status of videos.

        census = Census(folder, key_from_environment(), canary_keys=("jNQXAC9IVRw",))
        try:
            for finding in census.ask(keys):
                ...
        except CensusPaused as e:      # the day's quota is spent: go on tomorrow with the keys that are left
            ...

    `folder` keeps the count of units spent today, shared by the processes of this machine. `base_url` may be another
    server's, for tests. `country` is the ISO 3166 code of where the clips would be fetched from. At most two canaries
    travel in each call. Raises ConfigError for an unusable argument.
    """

    def __init__(
        self,
        folder: Path,
        api_key: str,
        *,
        base_url: str = BASE_URL,
        units_per_day: int = UNITS_PER_DAY,
        canary_keys: tuple[str, ...] = (),
        country: str | None = None,
        timeout_s: float = 20.0,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]-]+(/[^?#\s]*)?", base_url):
            raise ConfigError(f"census: base_url {base_url!r}: expected an address such as {BASE_URL}.")
        if country is not None and not re.fullmatch(r"[A-Z]{2}", country):
            raise ConfigError(f"census: country {country!r}: expected two capitals of ISO 3166, such as DE.")
        if units_per_day < 1:
            raise ConfigError(f"census: units_per_day {units_per_day}: expected 1 or more.")
        for key in canary_keys:
            _check(key, "canary")
        self._quota = SharedState(folder / "census.sqlite", version=1)
        self._api_key = api_key
        self._url = base_url.rstrip("/") + "/videos"
        self._units_per_day = units_per_day
        self._canaries = canary_keys
        self._country = country
        self._timeout_s = timeout_s
        self._clock = clock
        self._sleep = sleep
        self._n_calls = 0
        self._opener = urllib.request.build_opener(_AsItIs)
        try:
            self._zone = ZoneInfo(_PACIFIC)
        except ZoneInfoNotFoundError:
            raise ConfigError(
                f"census: no time zone {_PACIFIC} here, where the quota's day ends. Run `pip install tzdata`."
            ) from None

    def ask(self, keys: Iterable[str]) -> Iterator[Finding]:
        """One finding for each video id, in the order given; ids named twice within a call are asked for once.

        Raises CensusPaused when the quota is spent or the service does not answer (every finding before it holds; give
        the ids that are left next time), ConfigError when the key is refused, DataError for what is no video id.
        """
        rest = iter(keys)
        while batch := list(islice(rest, IDS_PER_CALL - min(2, len(self._canaries)))):
            wanted = list(dict.fromkeys(batch))
            for key in wanted:
                _check(key, "video")
            yield from self._findings(wanted)

    def units_left(self) -> int:
        """What is left of the day's budget of units."""
        with self._quota.edit() as document:
            return max(0, self._units_per_day - self._spent(document))

    def _findings(self, wanted: list[str]) -> Iterator[Finding]:
        first = self._n_calls * 2
        canaries = [self._canaries[(first + i) % len(self._canaries)] for i in range(min(2, len(self._canaries)))]
        self._n_calls += 1
        began_ms = self._now_ms()
        items = self._list(list(dict.fromkeys([*wanted, *canaries])))
        ended_ms = self._now_ms()
        is_trusted = not canaries or any(c in items for c in canaries)
        for key in wanted:
            said: tuple[str, str, str, dict[str, Any]] = ("failed", "gone.unspecified", ABSENT, {})
            if key in items:
                said = _present(items[key], self._country)
            elif not is_trusted:
                said = ("failed", "session.suspect", f"{ABSENT}, as is the canary {' and '.join(canaries)}", {})
            yield Finding(key, *said, began_ms, ended_ms)

    def _list(self, ids: list[str]) -> dict[str, dict[str, Any]]:
        """The videos that the service knows, by id; asked again, with pauses, where it does not answer."""
        policy = Retrying(
            retry=retry_if_exception_type(_NoAnswer),
            stop=stop_after_attempt(_TRIES),
            wait=_wait_s,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return policy(self._call, ids)
        except _NoAnswer as e:
            wait_s = max(600.0, e.retry_after_s or 0.0)
            raise CensusPaused(self._now_ms() + round(1000 * wait_s), f"asked {_TRIES} times, {e}") from None

    def _call(self, ids: list[str]) -> dict[str, dict[str, Any]]:
        self._spend()
        query = {"part": "status,contentDetails", "id": ",".join(ids), "key": self._api_key}
        request = urllib.request.Request(
            f"{self._url}?{urllib.parse.urlencode(query, safe=',')}", headers={"Accept": "application/json"}
        )
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                status, after, body = response.status, response.getheader("Retry-After"), self._body(response)
        except (OSError, HTTPException) as e:
            text = f"no answer ({type(e).__name__}: {getattr(e, 'reason', e)})"
            raise _NoAnswer(text.replace(self._api_key, "<key>")) from None
        if status != 200:
            raise self._refusal(status, body, after)
        return _items(body, ids)

    def _body(self, response: Any) -> bytes:
        # one deadline for the whole answer: a server that drips a byte at a time must not hold the census up
        deadline = time.monotonic() + 3 * self._timeout_s
        parts, n = [], 0
        while n <= _MAX_ANSWER and (part := response.read1(1 << 16)):
            parts.append(part)
            n += len(part)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{n} bytes in {3 * self._timeout_s:.0f} s")
        return b"".join(parts)

    def _refusal(self, status: int, body: bytes, retry_after: str | None) -> Exception:
        """The error for an HTTP status that is not 200."""
        reason, message = _error(body)
        wait_s = retry_after_s(retry_after)
        if reason in _QUOTA:
            with self._quota.edit(is_durable=True) as document:  # others may use the key: believe the service
                document["units"] = max(self._spent(document), self._units_per_day)
            return CensusPaused(self._midnight_ms(), f"the service says that the key's quota is spent ({reason})")
        if status == 429 or status >= 500 or reason in _SLOW_DOWN:
            if wait_s is not None and wait_s > _PATIENCE_S:
                return CensusPaused(self._now_ms() + round(1000 * wait_s), f"HTTP {status}: Retry-After")
            return _NoAnswer(f"HTTP {status} {reason}".rstrip(), wait_s)
        if status in (400, 401, 403):
            said = f"HTTP {status}, {reason or 'no reason'}: {message[:300]}".replace(self._api_key, "<key>")
            return ConfigError(
                f"{KEY_VARIABLE}: the service refuses the key or the request ({said}). Check that the key is right and "
                f"not restricted to other addresses, and that the YouTube Data API v3 is enabled for its project."
            )
        return ConfigError(f"census: HTTP {status} from {self._url}: not the YouTube Data API. Check base_url.")

    def _spend(self) -> None:
        """Count one unit before it is used: a call that fails costs one too."""
        with self._quota.edit() as document:
            spent = self._spent(document)
            if spent < self._units_per_day:
                document["units"] = spent + 1
                return
        raise CensusPaused(self._midnight_ms(), f"the day's {self._units_per_day} quota units are spent")

    def _spent(self, document: dict[str, Any]) -> int:
        """Units spent on the quota day of now; starts a new day where one has begun."""
        today = self._today().date().isoformat()
        if today > document.get("day", ""):  # a clock that is set back begins no new day
            document.update(day=today, units=0)
        return int(document["units"])

    def _today(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), self._zone)

    def _midnight_ms(self) -> int:
        tomorrow = (self._today() + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
        return round(1000 * tomorrow.timestamp())

    def _now_ms(self) -> int:
        return round(1000 * self._clock())


class _NoAnswer(Exception):  # noqa: N818 - never leaves this module
    """The service did not answer this time."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = wait_s


class _AsItIs(urllib.request.HTTPErrorProcessor):
    """Gives back every answer, whatever its status. It follows no redirect: the key is for one host alone."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


_backoff_s: Final = wait_exponential_jitter(1, 60)


def _wait_s(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    asked_s = error.retry_after_s if isinstance(error, _NoAnswer) else None
    log.debug("census: %s; asking again", error)
    return asked_s if asked_s is not None else _backoff_s(state)


def _check(key: str, what: str) -> None:
    if not _VIDEO_ID.fullmatch(key):
        raise DataError(f"census: {key!r} is no {what} id. Expected 11 letters, digits, dashes or underscores.")


def _items(body: bytes, ids: list[str]) -> dict[str, dict[str, Any]]:
    """The videos of an answer by id. Raises _NoAnswer for what is no answer to this question."""
    if len(body) > _MAX_ANSWER:
        raise _NoAnswer("the answer is too long for one of videos.list")
    try:
        answer = json.loads(body)
        items = {str(item["id"]): dict(item) for item in answer["items"]}
    except (ValueError, TypeError, KeyError):
        raise _NoAnswer(f"the answer is not one of videos.list: {body[:60]!r}") from None
    if not items.keys() <= set(ids):
        raise _NoAnswer("the answer names videos that were not asked for")
    return items


def _error(body: bytes) -> tuple[str, str]:
    """(reason, message) of an error answer; empty where it is none of the service's own."""
    try:
        error = json.loads(body)["error"]
        reasons = [str(e["reason"]) for e in error.get("errors", ()) if "reason" in e]
        return (reasons[0] if reasons else str(error.get("status", ""))), str(error.get("message", ""))
    except (ValueError, TypeError, KeyError, AttributeError):
        return "", ""


def _present(item: dict[str, Any], country: str | None) -> tuple[str, str, str, dict[str, Any]]:
    """(outcome, reason, message, facts) of a video that the service lists."""
    status, details = _mapping(item.get("status")), _mapping(item.get("contentDetails"))
    facts: dict[str, Any] = {}
    for fact, value in (
        ("duration_s", duration_s(details.get("duration"))),
        ("availability", status.get("privacyStatus")),
        ("license", status.get("license")),
        ("is_embeddable", status.get("embeddable")),
        ("is_age_restricted", _mapping(details.get("contentRating")).get("ytRating") == "ytAgeRestricted"),
    ):
        if value is not None:
            facts[fact] = value
    facts |= _regions(_mapping(details.get("regionRestriction")), country)
    state = status.get("uploadStatus")
    if state in ("deleted", "failed", "rejected"):
        why = status.get("rejectionReason") or status.get("failureReason")
        return "failed", "gone.unspecified", f"uploadStatus {state}" + (f": {why}" if why else ""), facts
    if status.get("privacyStatus") == "private":
        return "failed", "gone.private", "privacyStatus private", facts
    return "ok", "", "", facts


def _regions(restriction: dict[str, Any], country: str | None) -> dict[str, Any]:
    """An empty list of allowed countries blocks all of them, an empty list of blocked ones none (API reference)."""
    given = {kind: restriction.get(kind) for kind in ("allowed", "blocked")}
    lists = {kind: sorted(map(str, codes)) for kind, codes in given.items() if isinstance(codes, list)}
    facts: dict[str, Any] = {f"region_{kind}": codes for kind, codes in lists.items()}
    if country is not None:
        is_allowed = "allowed" not in lists or country in lists["allowed"]
        facts["is_blocked_here"] = not is_allowed or country in lists.get("blocked", ())
    return facts


def duration_s(text: object) -> float | None:
    """Seconds of an ISO 8601 duration such as PT1H2M3S; None for what is none, or a broadcast yet to come (P0D)."""
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return None
    parts = [float(p or 0) for p in match.groups()]
    return sum(p * s for p, s in zip(parts, (604_800, 86_400, 3_600, 60, 1), strict=True)) or None


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
