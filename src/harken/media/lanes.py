"""Lanes: how fast one egress may ask one host, when it must stop, and when what it saw is no evidence.

A lane is one way out (one address, one session) to one host. All worker processes of a machine that use it share one
small SQLite file, so a pace is a promise to the host and not to each worker. A lane slows down at the first sign of a
troubled session and waits; it never changes its address, its identity or its country to get round a refusal.

Whether a session is healthy is asked of canaries: long-lived public videos that are known to be there. When one is
missing, the clips that went missing since the last good canary are no evidence either, and their range is void.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import Field, model_validator

from harken.config import Config
from harken.errors import ConfigError, DataError, HarkenError, unknown
from harken.shards import write_json

log = logging.getLogger("harken")

HOUR_S: Final = 3600.0
DAY_S: Final = 24 * HOUR_S
# a session that YouTube has told to prove itself: users report one to three days until it is trusted again
BLOCKS: Final = ("session.bot_check", "session.captcha", "session.ip_blocked")
BLOCKED_S: Final = (24 * HOUR_S, 48 * HOUR_S, 72 * HOUR_S)
RATE_LIMITED_S: Final = 1 * HOUR_S
TOO_MANY_S: Final = 900.0  # HTTP 429 without Retry-After; doubled each time in a row, up to a day
REFUSED_S: Final = 900.0  # the breaker, doubled likewise
# the first is short and followed by another canary: one canary alone may be the one that has died
CANARY_FAILED_S: Final = (60.0, 1 * HOUR_S, 2 * HOUR_S, 4 * HOUR_S, 8 * HOUR_S, 16 * HOUR_S, 24 * HOUR_S)
# reasons that say more of the session or the tool than of the clip: the next thing to ask for is a canary
SUSPICIOUS: Final = ("session.suspect", "tool.extractor_broken", "media.not_media")
FAILED_IN_A_ROW: Final = 8  # a quarter of AudioSet is missing: eight in a row by chance is one time in 65,000
LONGEST_S: Final = 7 * DAY_S  # of a Retry-After: what asks for more is a mistake, and a lane must come back
CANARY_AGE_S: Final = 6 * HOUR_S
CANARY_CLAIM_S: Final = 600.0  # a worker killed while it asks a canary holds the others up for this long at most
CANARY_MISSES: Final = 3  # misses of one canary, each while another was well, until it is passed over
RECOVERY_PER_HOUR: Final = 0.1  # of the full pace, per hour of clean running
CLIP_BYTES: Final = (1_100_000, 2_200_000)  # a ten-second section over Range requests, by block size and container

_SLICE_S: Final = 60.0  # longest sleep before the lane is looked at again
_POLL_S: Final = 1.0
_LOCK_PATIENCE_S: Final = 30.0  # transactions take a tenth of a millisecond
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")


class LanePaused(HarkenError):  # noqa: N818 - a state of the lane, not a mistake
    """The lane may not be used before `until_ms` (UTC epoch milliseconds), for the reason `why`."""

    def __init__(self, lane: str, until_ms: int, why: str) -> None:
        when = datetime.fromtimestamp(until_ms / 1000, UTC).isoformat(" ", "minutes").removesuffix("+00:00")
        super().__init__(
            f"lane {lane}: paused until {when} UTC ({why}). What is done is kept; run the same command again then."
        )
        self.lane, self.until_ms, self.why = lane, until_ms, why

    def __reduce__(self) -> tuple[type[LanePaused], tuple[str, int, str]]:
        return type(self), (self.lane, self.until_ms, self.why)


class CanaryDue(LanePaused):
    """The lane's pause is over, but a canary must be asked for first: `Lane.due_for_canary`; `Lane.admit` does it."""


class Pace(Config):
    """What a lane promises its host. Every worker of a lane must be given the same one.

    per_hour            videos an hour, canaries included; None: no pacing (a host of one's own)
    jitter              0 to 1: how irregular the gaps are; at 200 an hour 0.5 makes them 9 to 27 s, on average 18 s
    floor_per_hour      the least that troubles may slow the lane down to; None: a tenth of per_hour
    canary_keys         public videos that are known to be there, asked for in turn; none: nothing is ever void
    canary_every        videos between two canaries
    breaker_after       distinct clips refused by the media server (HTTP 403) ...
    breaker_window_s    ... within this time open the breaker
    budget_bytes_per_day    None: no limit. A day is the 24 h from its first byte
    hours               UTC hours [from, to) in which to ask, such as (22, 6); None: always
    """

    per_hour: float | None = Field(gt=0)
    jitter: float = Field(0.5, ge=0, lt=1)
    floor_per_hour: float | None = Field(None, gt=0)
    canary_keys: tuple[str, ...] = ()
    canary_every: int = Field(50, ge=1)
    breaker_after: int = Field(3, ge=1)
    breaker_window_s: float = Field(600.0, gt=0)
    budget_bytes_per_day: int | None = Field(None, gt=0)
    hours: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _is_possible(self) -> Pace:
        if self.per_hour is not None and self.floor_per_hour is not None and self.floor_per_hour > self.per_hour:
            raise ValueError(f"floor_per_hour {self.floor_per_hour} is above per_hour {self.per_hour}")
        if self.hours is not None and (self.hours[0] == self.hours[1] or not all(0 <= h < 24 for h in self.hours)):
            raise ValueError(f"hours {self.hours}: expected two different hours from 0 to 23, such as [22, 6]")
        if len(set(self.canary_keys)) != len(self.canary_keys):
            raise ValueError("canary_keys: a key is named twice")
        return self

    @property
    def slot_s(self) -> float:
        """Seconds between two videos at full pace; 0 without pacing."""
        return 0.0 if self.per_hour is None else HOUR_S / self.per_hour

    @property
    def least_per_hour(self) -> float:
        """Videos an hour below which no trouble slows the lane; 0 without pacing."""
        return (self.per_hour or 0.0) / 10 if self.floor_per_hour is None else self.floor_per_hour

    @property
    def hours_a_day(self) -> int:
        """How many hours of a day the lane may be used."""
        return 24 if self.hours is None else (self.hours[1] - self.hours[0]) % 24


class VoidRange(NamedTuple):
    """Failed attempts of `lane` that ended in from_ms .. to_ms (UTC epoch milliseconds) are no evidence."""

    lane: str
    from_ms: int
    to_ms: int


class Answer(NamedTuple):
    """How a host answered one video: `reason` is canonical, empty where the video was served."""

    reason: str
    retry_after_s: float | None = None
    n_bytes: int = 0


class LaneStatus(NamedTuple):
    """A lane as it stands. `state` is `closed` (in use), `open` (paused) or `half_open` (a canary comes first)."""

    state: str
    why: str
    until_ms: int | None
    per_hour: float | None
    n_permits: int
    n_bytes_today: int
    canary_ok_ms: int | None


class SharedState:
    """A small JSON document that the processes of one machine read and change one at a time.

    SQLite in WAL mode keeps it: the lock of a killed process goes with the process, and what it had not committed was
    never there. The folder must lie on a local disk, since the write-ahead log needs shared memory.
    """

    def __init__(self, path: Path, version: int) -> None:
        self.path = path
        self._version = version
        self._connection: sqlite3.Connection | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_version": self._version}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["_version"])  # type: ignore[misc]

    @contextlib.contextmanager
    def edit(self, is_durable: bool = False) -> Iterator[dict[str, Any]]:
        """The document, to be changed in place; kept when the block ends without an exception.

        `is_durable` waits for the disk, so that the change also outlives a power cut. Raises DataError where the file
        is not such a document or stays locked for half a minute.
        """
        with self._lock, self._explained():
            db = self._open()
            db.execute(f"PRAGMA synchronous = {'FULL' if is_durable else 'NORMAL'}")
            db.execute("BEGIN IMMEDIATE")
            try:
                row = db.execute("SELECT document FROM state").fetchone()
                before = row[0] if row else "{}"
                document = json.loads(before)
                yield document
                after = json.dumps(document)
                if after != before:
                    db.execute("REPLACE INTO state (id, document) VALUES (0, ?)", (after,))
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, json.JSONDecodeError) as e:
            self._connection = None
            raise DataError(
                f"{self.path}: cannot be used ({e}). Stop what holds it; if it is damaged or is not harken's, "
                f"move it away: the lane then starts anew at full pace."
            ) from None

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and self._owner == os.getpid():
            return self._connection
        if self._connection is not None:
            _INHERITED.append(self._connection)  # closing a parent's connection in a fork would harm the parent's
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                self._connection, self._owner = self._connect(), os.getpid()
                return self._connection
            except sqlite3.OperationalError as e:
                # alone among statements, the switch to WAL of a new file does not wait for another process' lock
                if e.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=_LOCK_PATIENCE_S, isolation_level=None, check_same_thread=False)
        try:
            if db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                db.execute("PRAGMA journal_mode = WAL")
            db.execute("BEGIN IMMEDIATE")
            found = db.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, self._version):
                raise sqlite3.DatabaseError(f"version {found}, expected {self._version}")
            if found == 0:
                db.execute("CREATE TABLE state (id INTEGER PRIMARY KEY, document TEXT NOT NULL)")
                db.execute(f"PRAGMA user_version = {self._version}")
            db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        return db


_INHERITED: Final[list[sqlite3.Connection]] = []


@dataclass(slots=True)
class _State:
    """What a lane remembers. Times are epoch seconds on the lane's clock."""

    seen_s: float  # the last reading of the clock
    slot_s: float  # the place in the schedule of the next permit ...
    next_s: float  # ... and when it is granted: its place plus jitter
    ran_s: float  # until when clean running was counted
    clean_from_s: float  # lowest and highest clock reading since the last good canary
    clean_to_s: float
    per_hour: float | None = None  # None: full pace
    paused_until_s: float = 0.0
    why: str = ""
    needs_canary: bool = False
    canary_ok_s: float | None = None
    canary_next: int = 0
    claim_key: str = ""
    claim_until_s: float = 0.0
    n_since_canary: int = 0
    n_failed_in_a_row: int = 0
    canary_failed: list[str] = field(default_factory=list)  # since the last good one
    canary_misses: dict[str, int] = field(default_factory=dict)
    strikes: dict[str, int] = field(default_factory=dict)
    blocked_until_s: float = 0.0
    refused: dict[str, float] = field(default_factory=dict)  # clip_id: when the media server forbade it
    n_permits: int = 0
    n_bytes: int = 0
    bytes_since_s: float = 0.0
    voids: list[list[int]] = field(default_factory=list)  # [from_ms, to_ms]

    def shift(self, by_s: float) -> None:
        """Move every instant that is waited for: where the clock goes back, no time has passed."""
        for name in ("slot_s", "next_s", "ran_s", "paused_until_s", "claim_until_s", "blocked_until_s"):
            setattr(self, name, getattr(self, name) + by_s)
        self.bytes_since_s += by_s
        self.canary_ok_s = None if self.canary_ok_s is None else self.canary_ok_s + by_s
        self.refused = {clip_id: at_s + by_s for clip_id, at_s in self.refused.items()}


class Lane:
    """One lane's pace, breaker and canaries, shared by every process that opens the same `folder` and `name`.

        lane = Lane(folder, "youtube", pace)
        for clip in clips:
            lane.admit(probe, void, patience_s=3600)      # raises LanePaused: stop cleanly
            lane.report(clip.id, reason, retry_after_s=after_s, n_bytes=n)

    The pace is a token bucket of one token: in any stretch of T seconds at most ceil(T x per_hour / 3600) + 1 permits.
    It is halved by every session trouble (never below the floor) and regains a tenth of the full pace per hour of clean
    running. A clock that is set back counts as one that stood still; one that jumps ahead gains at most one permit.
    Raises ConfigError for a name that is no plain file name.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        pace: Pace,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"lane {name!r}: expected up to 128 letters, digits or any of '._@-', and a letter or digit first."
            )
        self.name = name
        self.pace = pace
        self._shared = SharedState(folder / f"{name}.sqlite", version=1)
        self._clock = clock
        self._sleep = sleep
        # only spreads requests in time and reaches no result, so it may differ from run to run
        self._rng = rng or random.Random(os.urandom(16))

    def admit(self, probe: Callable[[str], Answer], void: Callable[[VoidRange], None], *, patience_s: float) -> None:
        """Wait until one more video may be asked for, asking for canaries wherever they are due.

        `probe(key)` asks the host for a canary; `void(range)` records that the failures in a range are no evidence.
        Raises LanePaused as `permit` does.
        """
        while True:
            key = self.due_for_canary()
            if key is not None:
                self._ask_canary(key, probe, void, patience_s)
                continue
            with contextlib.suppress(CanaryDue):
                return self.permit(patience_s=patience_s)

    def verify(self, probe: Callable[[str], Answer], void: Callable[[VoidRange], None], *, patience_s: float) -> None:
        """Ask for a canary if anything was asked for since the last good one: for the end of a run."""
        key = self.due_for_canary(is_last=True)
        if key is not None:
            self._ask_canary(key, probe, void, patience_s)

    def _ask_canary(
        self, key: str, probe: Callable[[str], Answer], void: Callable[[VoidRange], None], patience_s: float
    ) -> None:
        try:
            self.permit(patience_s=patience_s, is_canary=True)
            answer = probe(key)
        except BaseException:
            with self._edit() as (s, _):
                s.claim_until_s = 0.0  # nobody asks any more
            raise
        found = self.canary(not answer.reason, answer=answer)
        if found is not None:
            void(found)

    def permit(self, patience_s: float, *, is_canary: bool = False) -> None:
        """Wait until one more video may be asked for, by any worker of the lane.

        Raises LanePaused where a pause (of a session, the byte budget or the hours) lasts longer than `patience_s`, and
        CanaryDue where a canary comes first and no worker is asking for it. The wait for one's turn has no limit.
        """
        while True:
            with self._edit() as (s, now):
                until_s, why = _pause(s, self.pace, now)
                must_wait_for_canary = _is_half_open(s, self.pace, now) and not is_canary
                if until_s > now:
                    wait_s = until_s - now
                elif must_wait_for_canary:
                    wait_s = min(_POLL_S, s.claim_until_s - now)
                elif s.next_s > now and self.pace.per_hour is not None:
                    wait_s = s.next_s - now
                else:
                    _grant(s, self.pace, now, self._rng, is_canary)
                    return
                if is_canary:
                    s.claim_until_s = max(now, until_s) + CANARY_CLAIM_S
            if until_s > now and wait_s > patience_s:
                raise LanePaused(self.name, math.ceil(1000 * until_s), why)
            if must_wait_for_canary and wait_s <= 0:
                raise CanaryDue(self.name, math.ceil(1000 * now), f"{why or s.why}, a canary comes first")
            self._sleep(max(0.001, min(wait_s, _SLICE_S)))

    def report(self, clip_id: str, reason: str, retry_after_s: float | None = None, n_bytes: int = 0) -> None:
        """Tell the lane how a clip's attempt ended: `reason` is canonical, empty where the clip was served."""
        is_trouble = reason.startswith("session.") or reason == "media.403" or retry_after_s is not None
        with self._edit(is_durable=is_trouble) as (s, now):
            _count_bytes(s, now, n_bytes)
            _answered(s, self.pace, now, reason, retry_after_s)
            if reason == "media.403":
                _refused(s, self.pace, now, clip_id)

    def due_for_canary(self, *, is_last: bool = False) -> str | None:
        """The key of the canary that this worker should ask for now, or None.

        Only one worker of the lane is given it: `permit(is_canary=True)`, ask the host, then `canary(...)`. Due at the
        start, after every `canary_every` videos or six hours, after a suspicious answer or eight failures in a row, and
        when a pause has ended; with `is_last` whenever a video was asked for since the last good one.
        """
        with self._edit() as (s, now):
            keys = [k for k in self.pace.canary_keys if s.canary_misses.get(k, 0) < CANARY_MISSES]
            keys = keys or list(self.pace.canary_keys)
            if not keys or now < s.paused_until_s or now < s.claim_until_s:
                return None
            is_stale = s.canary_ok_s is None or now - s.canary_ok_s > CANARY_AGE_S
            if not (s.needs_canary or is_stale or s.n_since_canary >= (1 if is_last else self.pace.canary_every)):
                return None
            s.claim_key = keys[s.canary_next % len(keys)]
            s.claim_until_s = now + CANARY_CLAIM_S
            s.canary_next += 1
            return s.claim_key

    def canary(self, ok: bool, *, answer: Answer | None = None) -> VoidRange | None:
        """Tell the lane how the canary answered; `answer` adds its reason, Retry-After and bytes.

        A failing canary pauses the lane (a minute, then another canary; then 1 h, 2 h, ... 24 h while they fail) and
        gives the range since the last good canary, whose failures are void. A good one closes the breaker; where it
        ends a bad spell, it too gives the range, for the clips of other workers that ended meanwhile.
        """
        answer = answer or Answer("" if ok else "session.suspect")
        with self._edit(is_durable=True) as (s, now):
            _count_bytes(s, now, answer.n_bytes)
            was_bad = bool(s.canary_failed)
            if ok:
                self._well(s)
            else:
                s.canary_failed.append(s.claim_key)
                _answered(s, self.pace, now, answer.reason, answer.retry_after_s)
                nth = min(len(s.canary_failed), len(CANARY_FAILED_S)) - 1
                _stop(s, now, CANARY_FAILED_S[nth], f"the canary {s.claim_key} failed ({answer.reason})")
                s.needs_canary = True
            s.claim_until_s = 0.0
            found = None
            if was_bad or not ok:
                found = VoidRange(self.name, math.floor(1000 * s.clean_from_s), math.ceil(1000 * s.clean_to_s))
                # a spell is one range that grows: only its last extent is kept
                s.voids = [*(v for v in s.voids if v[0] != found.from_ms), [found.from_ms, found.to_ms]]
            if ok:
                s.clean_from_s = s.clean_to_s = s.canary_ok_s = now
        return found

    def _well(self, s: _State) -> None:
        for key in s.canary_failed:
            if key != s.claim_key:
                s.canary_misses[key] = s.canary_misses.get(key, 0) + 1
                if s.canary_misses[key] == CANARY_MISSES:
                    log.warning(
                        "lane %s: canary %s was missing %d times while %s was there. It is passed over from now on; "
                        "put another one in its place.",
                        *(self.name, key, CANARY_MISSES, s.claim_key),
                    )
        s.canary_misses.pop(s.claim_key, None)
        s.canary_failed = []
        s.needs_canary = False
        s.n_since_canary = s.n_failed_in_a_row = 0
        s.refused = {}
        s.why = ""

    def voids(self) -> list[VoidRange]:
        """Every range the lane has declared void, oldest first: for a run that was killed before it recorded one."""
        with self._edit() as (s, _):
            return [VoidRange(self.name, from_ms, to_ms) for from_ms, to_ms in s.voids]

    def status(self) -> LaneStatus:
        """The lane as it stands now, for people."""
        with self._edit() as (s, now):
            until_s, why = _pause(s, self.pace, now)
            is_open = until_s > now
            half_open = _is_half_open(s, self.pace, now)
            return LaneStatus(
                "open" if is_open else "half_open" if half_open else "closed",
                why if is_open else s.why if half_open else "",
                math.ceil(1000 * until_s) if is_open else None,
                _rate(s, self.pace),
                s.n_permits,
                s.n_bytes,
                None if s.canary_ok_s is None else math.floor(1000 * s.canary_ok_s),
            )

    @contextlib.contextmanager
    def _edit(self, is_durable: bool = False) -> Iterator[tuple[_State, float]]:
        """The lane's state and the time, in one transaction. The clock is read under its lock: in order."""
        with self._shared.edit(is_durable) as document:
            now = self._clock()
            s = _State(**document) if document else _State(now, now, now, now, now, now)
            if now < s.seen_s:
                s.shift(now - s.seen_s)
            s.seen_s = now
            s.clean_from_s, s.clean_to_s = min(s.clean_from_s, now), max(s.clean_to_s, now)
            if s.n_bytes and now >= s.bytes_since_s + DAY_S:
                s.n_bytes = 0
            yield s, now
            document.clear()
            document.update(asdict(s))


def _rate(s: _State, pace: Pace) -> float | None:
    """Videos an hour now."""
    if pace.per_hour is None:
        return None
    return pace.per_hour if s.per_hour is None else min(s.per_hour, pace.per_hour)


def _gap_s(s: _State, pace: Pace) -> float:
    rate = _rate(s, pace)
    return 0.0 if rate is None else HOUR_S / rate


def _grant(s: _State, pace: Pace, now: float, rng: random.Random, is_canary: bool) -> None:
    # each permit lies within `width` after its place, and places are at least a full-pace slot apart: that is the law
    width_s = pace.jitter * pace.slot_s
    s.slot_s = max(s.slot_s, now - width_s) + _gap_s(s, pace)
    s.next_s = s.slot_s + rng.uniform(0, width_s)
    s.n_permits += 1
    s.n_since_canary += not is_canary
    if is_canary:
        s.claim_until_s = now + CANARY_CLAIM_S


def _pause(s: _State, pace: Pace, now: float) -> tuple[float, str]:
    """Until when the lane is paused and why; a time not after `now`: it is not."""
    pauses = [(s.paused_until_s, s.why)]
    if pace.budget_bytes_per_day is not None and s.n_bytes >= pace.budget_bytes_per_day:
        pauses.append((s.bytes_since_s + DAY_S, f"the day's {pace.budget_bytes_per_day} bytes are spent"))
    if pace.hours is not None:
        first, last = pace.hours
        hour = now % DAY_S / HOUR_S
        if not (first <= hour < last if first < last else hour >= first or hour < last):
            pauses.append((now + (first - hour) % 24 * HOUR_S, f"outside {first:02}:00 to {last:02}:00 UTC"))
    return max(pauses)


def _is_half_open(s: _State, pace: Pace, now: float) -> bool:
    return s.needs_canary and bool(pace.canary_keys) and now >= s.paused_until_s


def _count_bytes(s: _State, now: float, n_bytes: int) -> None:
    if n_bytes and not s.n_bytes:
        s.bytes_since_s = now
    s.n_bytes += n_bytes


def _answered(s: _State, pace: Pace, now: float, reason: str, retry_after_s: float | None) -> None:
    """What every answer does to the pace and the pauses."""
    was_paused = now < s.paused_until_s  # then it is the answer to a video asked for before the pause
    if reason.startswith("session."):
        if not was_paused:
            _halve(s, pace, now)
        _session(s, now, reason, retry_after_s, was_paused)
    else:
        _recover(s, pace, now)
        if reason in SUSPICIOUS:
            s.needs_canary = True
            s.why = reason
    if retry_after_s is not None and retry_after_s > 0:
        _stop(s, now, min(retry_after_s, LONGEST_S), f"{reason or 'the host'} asked to wait (Retry-After)")
    if not reason or reason.startswith("qc."):  # served, whatever it holds: the session is well
        s.n_failed_in_a_row = 0
        if not was_paused:
            s.strikes.pop("session.http_429", None)
            s.strikes.pop("media.403", None)
        return
    s.n_failed_in_a_row += 1
    if s.n_failed_in_a_row >= FAILED_IN_A_ROW and not s.needs_canary:
        s.needs_canary = True
        s.why = f"{s.n_failed_in_a_row} failures in a row"


def _session(s: _State, now: float, reason: str, retry_after_s: float | None, was_paused: bool) -> None:
    s.needs_canary = True
    if reason in BLOCKS:
        if was_paused and s.why in BLOCKS:
            return
        is_in_a_row = now < s.blocked_until_s + DAY_S
        nth = _strike(s, "blocked") if is_in_a_row else _strike(s, "blocked", first=True)
        _stop(s, now, BLOCKED_S[min(nth, len(BLOCKED_S) - 1)], reason)
        s.blocked_until_s = s.paused_until_s
    elif reason == "session.rate_limited":
        _stop(s, now, RATE_LIMITED_S, reason)
    elif reason == "session.http_429" and not was_paused:
        nth = _strike(s, reason)
        if retry_after_s is None:
            _stop(s, now, min(TOO_MANY_S * 2**nth, DAY_S), reason)
    elif not was_paused:
        s.why = reason


def _strike(s: _State, kind: str, first: bool = False) -> int:
    """How many of this kind came before this one in a row."""
    nth = 0 if first else s.strikes.get(kind, 0)
    s.strikes[kind] = nth + 1
    return nth


def _stop(s: _State, now: float, for_s: float, why: str) -> None:
    """Pause; a longer pause that already runs stays."""
    if now + for_s > s.paused_until_s:
        s.paused_until_s = now + for_s
        s.why = why


def _halve(s: _State, pace: Pace, now: float) -> None:
    rate = _rate(s, pace)
    if rate is None:
        return
    s.per_hour = max(pace.least_per_hour, rate / 2)
    s.slot_s = max(s.slot_s, now + HOUR_S / s.per_hour)
    s.next_s = max(s.next_s, s.slot_s)
    s.ran_s = max(s.ran_s, now)


def _recover(s: _State, pace: Pace, now: float) -> None:
    if s.per_hour is not None and pace.per_hour is not None:
        # a lane that nobody used was not running clean
        ran_s = min(max(0.0, now - s.ran_s), 2 * _gap_s(s, pace))
        s.per_hour += RECOVERY_PER_HOUR * pace.per_hour * ran_s / HOUR_S
        if s.per_hour >= pace.per_hour:
            s.per_hour = None
    s.ran_s = max(s.ran_s, now)


def _refused(s: _State, pace: Pace, now: float, clip_id: str) -> None:
    """The media server forbade a clip: one may have an address that expired, several are the session's."""
    s.refused = {c: at_s for c, at_s in s.refused.items() if now - at_s < pace.breaker_window_s} | {clip_id: now}
    if len(s.refused) >= pace.breaker_after and now >= s.paused_until_s:
        _halve(s, pace, now)
        _stop(s, now, min(REFUSED_S * 2 ** _strike(s, "media.403"), DAY_S), f"media.403 on {len(s.refused)} clips")
        s.needs_canary = True
        s.refused = {}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What fetching takes: `hours` of running and `days` on the calendar (None without pacing), and the traffic."""

    n_clips: int
    hours: float | None
    days: float | None
    bytes_low: int
    bytes_high: int
    text: str

    def __str__(self) -> str:
        return self.text


def estimate(n_clips: int, pace: Pace) -> Estimate:
    """How long `n_clips` take at the full pace, canaries included, and how much they transfer.

    A lower bound: troubles slow a lane down. The traffic is that of ten-second sections read by Range requests, 1.1 to
    2.2 MB each as measured on H.264 + AAC and VP9 + Opus at 360 lines. Raises ConfigError for a negative number.
    """
    if n_clips < 0:
        raise ConfigError(f"estimate: {n_clips} clips: expected 0 or more.")
    low, high = (n_clips * b for b in CLIP_BYTES)
    size = f"{low / 1e9:,.1f} to {high / 1e9:,.1f} GB"
    n_asked = n_clips + (math.ceil(n_clips / pace.canary_every) if pace.canary_keys else 0)
    hours = None if pace.per_hour is None else n_asked / pace.per_hour
    days = None if hours is None else hours / pace.hours_a_day
    limits = []
    if pace.budget_bytes_per_day is not None:
        by_bytes = high / pace.budget_bytes_per_day
        if days is None or by_bytes > days:
            days = by_bytes
            limits.append(f"the budget of {pace.budget_bytes_per_day / 1e9:,.1f} GB a day decides")
    if pace.hours is not None:
        limits.append(f"{pace.hours_a_day} hours a day are used")
    speed = "without pacing" if pace.per_hour is None else f"at most {pace.per_hour:g} videos an hour"
    span = "as fast as the host answers" if days is None else f"at least {_span(days)}"
    text = f"{n_clips:,} clips, {speed}: {span}, {size} of traffic" + "".join(f"; {w}" for w in limits) + "."
    return Estimate(n_clips, hours, days, low, high, text)


def _span(days: float) -> str:
    if days < 1 / 24:
        return f"{days * 24 * 60:.0f} minutes"
    return f"{days * 24:.1f} hours" if days < 2 else f"{days:,.1f} days"


@dataclass(frozen=True, slots=True)
class Terms:
    """What a host's terms mean for fetching from it. `version` changes with `text`."""

    version: str
    url: str
    text: str


TERMS: Final[dict[str, Terms]] = {
    "youtube": Terms(
        version="1",
        url="https://www.youtube.com/t/terms",
        text=(
            "YouTube's Terms of Service restrict downloading and automated access: in general both need YouTube's "
            "prior written permission, and where it applies the right holder's, unless the law of your country allows "
            "them. harken therefore takes two other ways by default: a census by the official YouTube Data API (who is "
            "still there) and the import of copies that you already have. If you fetch sections of videos, you do it "
            "on your own responsibility and, for research, with your institution's consent. harken asks slowly, uses "
            "no account, no cookies and no proxies of its own, does not evade country restrictions, and removes clips "
            "on request (`harken forget`). This is a summary and no legal advice; the full text is at the address."
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Who accepted which text of a host's terms, and when (UTC epoch milliseconds)."""

    host: str
    who: str
    text_version: str
    url: str
    accepted_ms: int


def accept_terms(folder: Path, host: str, who: str, text_version: str, now_ms: int) -> Acceptance:
    """Record in folder/terms.json that `who` accepts the text of TERMS[host] that they were shown.

    Raises ConfigError for a host without terms, an empty name, or a version that is not the current one.
    """
    if host not in TERMS:
        raise unknown("accept-terms", host, TERMS)
    if not who.strip():
        raise ConfigError("accept-terms: no name. Say who accepts: harken accept-terms " + host + " --who NAME")
    terms = TERMS[host]
    if text_version != terms.version:
        raise ConfigError(
            f"accept-terms: {host}'s text is now version {terms.version!r}, not {text_version!r}. Read it again."
        )
    acceptance = Acceptance(host, who.strip(), text_version, terms.url, now_ms)
    record = {**asdict(acceptance), "text": terms.text}
    write_json(_terms_file(folder), {**_recorded(folder), host: record})
    return acceptance


def acceptances(folder: Path) -> dict[str, Acceptance]:
    """What was accepted so far, by host; also of texts that have changed since. Raises DataError for a damaged file."""
    found = {}
    for host, record in _recorded(folder).items():
        try:
            found[host] = Acceptance(**{k: v for k, v in record.items() if k != "text"})
        except (TypeError, AttributeError):
            raise _damaged(folder) from None
    return found


def accepted(folder: Path, host: str) -> Acceptance | None:
    """The acceptance of the current text of the host's terms, if there is one."""
    if host not in TERMS:
        raise unknown("terms", host, TERMS)
    found = acceptances(folder).get(host)
    return found if found is not None and found.text_version == TERMS[host].version else None


def refuse_unaccepted(folder: Path, host: str) -> None:
    """Raise ConfigError, saying what to run, unless the current text of the host's terms was accepted."""
    if accepted(folder, host) is None:
        state = "have changed since they were accepted" if host in acceptances(folder) else "have not been accepted"
        raise ConfigError(
            f"{_terms_file(folder)}: the terms of {host} {state}. Nothing is fetched without it. Read and accept them "
            f"with `harken accept-terms {host}`, or use a census or `harken import` instead."
        )


def _terms_file(folder: Path) -> Path:
    return folder / "terms.json"


def _recorded(folder: Path) -> dict[str, Any]:
    path = _terms_file(folder)
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise _damaged(folder) from None
    if not isinstance(record, dict):
        raise _damaged(folder)
    return record


def _damaged(folder: Path) -> DataError:
    return DataError(
        f"{_terms_file(folder)}: not a record of accepted terms. Delete it and run `harken accept-terms HOST` again."
    )
