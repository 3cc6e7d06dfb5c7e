"""A lane keeps its promises whoever uses it, whatever the clock does and whenever a worker is killed."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from harken.config import parse
from harken.errors import ConfigError, DataError
from harken.media import lanes
from harken.media.lanes import (
    TERMS,
    Answer,
    CanaryDue,
    Lane,
    LanePaused,
    Pace,
    SharedState,
    VoidRange,
    accept_terms,
    acceptances,
    accepted,
    estimate,
    refuse_unaccepted,
)

START = 1_800_000_000.0 - 1_800_000_000.0 % 86400  # midnight UTC
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


class Clock:
    """Wall clock and true time, which differ by what somebody set the wall clock back or ahead by."""

    def __init__(self) -> None:
        self.true_s = START
        self.offset_s = 0.0
        self.n_sleeps = 0

    def __call__(self) -> float:
        return self.true_s + self.offset_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.n_sleeps += 1
        self.true_s += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def paced(**changes: Any) -> Pace:
    return Pace(**{"per_hour": 200.0, "jitter": 0.0, "floor_per_hour": 20.0, **changes})


def lane_of(folder: Path, clock: Clock, pace: Pace | None = None, name: str = "youtube") -> Lane:
    return Lane(folder, name, pace or paced(), clock=clock, sleep=clock.sleep, rng=random.Random(1))


def permits(lane: Lane, clock: Clock, n: int) -> list[float]:
    found = []
    for _ in range(n):
        lane.permit(0)
        found.append(clock.true_s)
    return found


# --- pace ---


def test_permits_come_one_by_one_at_the_rate(tmp_path: Path, clock: Clock) -> None:
    times = permits(lane_of(tmp_path, clock), clock, 5)
    assert [round(t - START, 6) for t in times] == [0, 18, 36, 54, 72]


def test_a_long_pause_saves_up_no_burst(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock)
    lane.permit(0)
    clock.true_s += 10 * HOUR
    times = permits(lane, clock, 3)
    assert [round(t - times[0], 6) for t in times] == [0, 18, 36]


def test_jitter_makes_gaps_irregular_and_keeps_the_rate(tmp_path: Path, clock: Clock) -> None:
    times = permits(lane_of(tmp_path, clock, paced(jitter=0.5)), clock, 200)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert min(gaps) >= 9 - 1e-6
    assert max(gaps) <= 27 + 1e-6
    assert max(gaps) - min(gaps) > 10
    assert sum(gaps) / len(gaps) == pytest.approx(18, rel=0.02)


def test_without_a_rate_nobody_waits_but_pauses_hold(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock, paced(per_hour=None))
    assert permits(lane, clock, 50) == [START] * 50
    lane.report("a", "session.http_429", retry_after_s=5)
    lane.permit(10)
    assert clock.true_s == START + 5
    assert lane.status().per_hour is None


def test_workers_share_one_pace(tmp_path: Path, clock: Clock) -> None:
    several = [lane_of(tmp_path, clock) for _ in range(4)]
    times = [permits(lane, clock, 1)[0] for _ in range(3) for lane in several]
    assert [round(t - START, 6) for t in times] == [18.0 * i for i in range(12)]


def test_lanes_of_other_names_are_apart(tmp_path: Path, clock: Clock) -> None:
    permits(lane_of(tmp_path, clock), clock, 1)
    permits(lane_of(tmp_path, clock, name="youtube@elsewhere"), clock, 1)
    assert clock.true_s == START


steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.floats(0, 90)),
        st.tuples(st.just("back"), st.floats(0, 4000)),
        st.tuples(
            st.just("report"),
            st.sampled_from(["", "gone.private", "session.suspect", "media.403", "net.timeout", "tool.no_format"]),
        ),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps, per_hour=st.floats(20, 5000), jitter=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_law_of_the_window(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Any], per_hour: float, jitter: float, seed: int
) -> None:
    """In any stretch of true time of length T at most ceil(T x rate) + 1 permits, also where the clock is set back."""
    clock, folder = Clock(), tmp_path_factory.mktemp("lane")
    pace = paced(per_hour=per_hour, jitter=jitter, floor_per_hour=None)
    several = [Lane(folder, "x", pace, clock=clock, sleep=clock.sleep, rng=random.Random(seed + i)) for i in range(3)]
    times: list[float] = []
    for i, (kind, value) in enumerate(steps):
        lane = several[i % 3]
        if kind == "ask":
            clock.true_s += value
            lane.permit(10 * DAY)
            times.append(clock.true_s)
        elif kind == "back":
            clock.offset_s -= value
        else:
            lane.report(f"clip{i}", value)
    for i, first in enumerate(times):
        for j in range(i, len(times)):
            assert j - i + 1 <= math.ceil((times[j] - first) * per_hour / 3600 + 1e-6) + 1


def test_a_clock_set_back_lengthens_no_wait(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock)
    lane.permit(0)
    clock.offset_s -= 30 * DAY
    before = clock.true_s
    lane.permit(0)
    assert clock.true_s - before == pytest.approx(18)


def test_a_clock_set_back_lengthens_no_pause(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock)
    lane.report("a", "session.rate_limited")
    clock.offset_s -= 30 * DAY
    lane.permit(2 * HOUR)
    assert clock.true_s - START <= HOUR + 40


def test_a_clock_that_jumps_ahead_gains_one_permit_at_most(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock)
    lane.permit(0)
    clock.offset_s += 100 * DAY
    assert [round(t - START, 6) for t in permits(lane, clock, 3)] == [0, 18, 36]


# --- real processes ---


def _worker(folder: Path, per_hour: float, until: float, found: Any) -> None:
    lane = Lane(folder, "shared", Pace(per_hour=per_hour, jitter=0.3))
    n = 0
    while time.time() < until:
        lane.permit(10)
        n += 1
    found.put(n)


def test_processes_honour_the_rate_in_sum(tmp_path: Path) -> None:
    rate_per_s = 40
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    began = time.time()
    workers = [
        context.Process(target=_worker, args=(tmp_path, rate_per_s * 3600.0, began + 1.5, found)) for _ in range(4)
    ]
    for w in workers:
        w.start()
    total = sum(found.get(timeout=30) for _ in workers)
    for w in workers:
        w.join(30)
    took = time.time() - began
    assert total == Lane(tmp_path, "shared", Pace(per_hour=1)).status().n_permits
    assert total <= math.ceil(took * rate_per_s) + 1
    assert total >= 0.5 * 1.5 * rate_per_s  # and they do get on with it


def _first(folder: Path, barrier: Any, found: Any) -> None:
    barrier.wait(30)
    try:
        Lane(folder, "shared", Pace(per_hour=None)).permit(0)
        found.put("")
    except DataError as e:
        found.put(str(e))


def test_workers_may_all_be_the_first(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for i in range(6):
        found, barrier = context.Queue(), context.Barrier(8)
        workers = [context.Process(target=_first, args=(tmp_path / str(i), barrier, found)) for _ in range(8)]
        for w in workers:
            w.start()
        assert [found.get(timeout=30) for _ in workers] == [""] * 8
        for w in workers:
            w.join(30)
        assert Lane(tmp_path / str(i), "shared", Pace(per_hour=None)).status().n_permits == 8


def _claim(folder: Path, found: Any) -> None:
    lane = Lane(folder, "shared", Pace(per_hour=None, canary_keys=("a", "b")))
    found.put(lane.due_for_canary())


def test_one_worker_of_many_is_given_the_canary(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    workers = [context.Process(target=_claim, args=(tmp_path, found)) for _ in range(6)]
    for w in workers:
        w.start()
    keys = [found.get(timeout=30) for _ in workers]
    for w in workers:
        w.join(30)
    assert sorted(keys, key=str) == [None] * 5 + ["a"]


def test_a_worker_killed_inside_a_transaction_blocks_nobody(tmp_path: Path) -> None:
    lane = Lane(tmp_path, "shared", paced(per_hour=None))
    lane.permit(0)
    code = textwrap.dedent(
        """
        import pathlib, sys, time
        from harken.media.lanes import SharedState
        with SharedState(pathlib.Path(sys.argv[1]), 1).edit() as document:
            document["n_permits"] = 1000
            print("inside", flush=True)
            time.sleep(60)
        """
    )
    args = [sys.executable, "-c", code, str(tmp_path / "shared.sqlite")]
    child = subprocess.Popen(args, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "src"})
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"inside\n"
        with pytest.raises(sqlite3.OperationalError):  # it does hold the lock
            sqlite3.connect(tmp_path / "shared.sqlite", timeout=0).execute("BEGIN IMMEDIATE")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        if child.stdout is not None:
            child.stdout.close()
    began = time.monotonic()
    lane.permit(0)
    assert time.monotonic() - began < 5
    assert lane.status().n_permits == 2  # what was not committed never was


def _in_a_fork(lane: Lane) -> None:
    inherited = lane._shared._connection
    assert inherited is not None
    lane.permit(0)
    assert lane._shared._connection is not inherited  # SQLite's connections must not cross a fork


def test_a_lane_survives_pickle_and_fork(tmp_path: Path) -> None:
    lane = Lane(tmp_path, "shared", paced(per_hour=None))
    lane.permit(0)
    copy = pickle.loads(pickle.dumps(lane))
    copy.permit(0)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_in_a_fork, args=(lane,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    lane.permit(0)
    assert lane.status().n_permits == 4


def test_an_exception_inside_leaves_the_document_as_it_was(tmp_path: Path) -> None:
    shared = SharedState(tmp_path / "x.sqlite", 1)
    with shared.edit() as document:
        document["a"] = 1
    with pytest.raises(KeyError), shared.edit() as document:
        document["a"] = document.pop("a") + document.pop("b")
    with shared.edit() as document:
        assert document == {"a": 1}


def test_a_file_that_is_no_lane_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.sqlite").write_bytes(b"not a database, but long enough to look at" * 50)
    with pytest.raises(DataError, match=r"x\.sqlite"):
        Lane(tmp_path, "x", paced()).permit(0)
    with SharedState(tmp_path / "y.sqlite", 7).edit() as document:
        document["a"] = 1
    with pytest.raises(DataError, match="version 7, expected 1"):
        Lane(tmp_path, "y", paced()).permit(0)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 200])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="lane"):
        Lane(tmp_path, name, paced())


# --- troubles ---


@pytest.mark.parametrize(
    "reason",
    ["session.bot_check", "session.captcha", "session.ip_blocked"],
)
def test_a_blocked_session_stops_for_one_two_three_days(tmp_path: Path, clock: Clock, reason: str) -> None:
    lane = lane_of(tmp_path, clock)
    for hours in (24, 48, 72, 72):
        lane.report("a", reason)
        with pytest.raises(LanePaused, match=reason) as e:
            lane.permit(HOUR)
        assert e.value.until_ms == pytest.approx(1000 * (clock() + hours * HOUR), abs=2)
        clock.true_s += hours * HOUR + 1
        lane.permit(0)
    clock.true_s += 3 * DAY  # well for long: the next one is a first one again
    lane.report("a", reason)
    assert lane.status().until_ms == pytest.approx(1000 * (clock() + DAY), abs=2)


def test_answers_to_videos_asked_for_before_a_pause_do_not_lengthen_it(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock)
    for i in range(5):
        lane.report(f"clip{i}", "session.bot_check")
    assert lane.status().until_ms == 1000 * (START + DAY)
    assert lane.status().per_hour == 100
    other = lane_of(tmp_path, clock, name="other")
    for i in range(5):
        other.report(f"clip{i}", "session.http_429")
    assert other.status().until_ms == 1000 * (START + 15 * MINUTE)
    other.report("x", "session.bot_check")  # but a worse one does
    assert other.status().until_ms == 1000 * (START + DAY)


def test_rate_limited_waits_an_hour_and_halves(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock)
    lane.report("a", "session.rate_limited")
    lane.permit(2 * HOUR)
    assert clock.true_s == pytest.approx(START + HOUR, abs=40)
    assert lane.status().per_hour == 100


def test_429_honours_retry_after_else_doubles(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock)
    lane.report("a", "session.http_429", 123.0)
    assert lane.status().until_ms == 1000 * (START + 123)
    for minutes in (30, 60, 120):  # the second, third and fourth in a row
        clock.true_s += 10 * DAY
        lane.report("a", "session.http_429")
        assert lane.status().until_ms == pytest.approx(1000 * (clock() + minutes * MINUTE), abs=2)
    clock.true_s += DAY
    lane.report("b", "")
    lane.report("a", "session.http_429")
    assert lane.status().until_ms == pytest.approx(1000 * (clock() + 15 * MINUTE), abs=2)


def test_retry_after_is_honoured_whatever_the_reason(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock)
    lane.report("a", "net.5xx", 600.0)
    assert lane.status().until_ms == 1000 * (START + 600)
    assert lane.status().per_hour == 200
    lane.report("a", "session.http_429", 30.0)
    assert lane.status().until_ms == 1000 * (START + 600)  # a shorter one shortens nothing
    lane.report("a", "net.5xx", 1e12)
    assert lane.status().until_ms == 1000 * (START + 7 * DAY)  # nor does a mistake stop a lane for ever


def test_the_rate_halves_to_the_floor_and_recovers_by_the_hour(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock)
    rates = []
    for i in range(5):
        lane.report(f"{i}", "session.suspect")
        rates.append(lane.status().per_hour)
    assert rates == [100, 50, 25, 20, 20]
    began = clock.true_s
    while (lane.status().per_hour or 0) < 100:
        lane.permit(0)
        lane.report("x", "")
    # a tenth of 200 an hour: from 20 to 100 in four hours
    assert clock.true_s - began == pytest.approx(4 * HOUR, rel=0.1)
    while (lane.status().per_hour or 0) < 200:
        lane.permit(0)
        lane.report("x", "gone.private")
    assert lane.status().per_hour == 200


def test_a_lane_that_nobody_uses_does_not_recover(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock)
    lane.report("a", "session.suspect")
    clock.true_s += 30 * DAY
    lane.report("b", "")
    assert lane.status().per_hour == pytest.approx(100, abs=1)


def test_halving_moves_the_next_permit_away(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock)
    lane.permit(0)
    lane.report("a", "session.suspect")
    assert permits(lane, clock, 1) == [pytest.approx(START + 36, abs=0.1)]


def test_troubles_of_this_machine_do_not_slow_the_lane(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock)
    for reason in ("local.disk", "local.oom", "local.bug"):
        lane.report("a", reason)
    assert lane.status().per_hour == 200
    assert lane.status().state == "closed"


def test_the_breaker_opens_on_distinct_clips_within_the_window(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock)
    for _ in range(10):
        lane.report("same", "media.403")
    assert lane.status().state == "closed"
    clock.true_s += 601
    lane.report("b", "media.403")
    lane.report("c", "media.403")
    assert lane.status().state == "closed"  # the first is too long ago
    lane.report("d", "media.403")
    status = lane.status()
    assert (status.state, status.why) == ("open", "media.403 on 3 clips")
    assert status.until_ms == 1000 * (clock() + 15 * MINUTE)
    assert status.per_hour == 100


def test_the_breaker_stays_open_longer_while_clips_are_refused(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock)

    def pause_min() -> float:
        for i in range(3):
            lane.report(f"{i}", "media.403")
        wait_s = (lane.status().until_ms or 0) / 1000 - clock()
        clock.true_s += wait_s
        return wait_s / MINUTE

    assert [pause_min() for _ in range(3)] == [15, 30, 60]
    lane.report("there", "")
    assert pause_min() == 15


def test_the_byte_budget_of_a_day(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock, paced(budget_bytes_per_day=3_000_000))
    clock.true_s += HOUR
    lane.report("a", "", n_bytes=2_000_000)
    lane.permit(0)
    lane.report("b", "", n_bytes=2_000_000)
    with pytest.raises(LanePaused, match="3000000 bytes") as e:
        lane.permit(HOUR)
    assert e.value.until_ms == 1000 * (START + HOUR + DAY)
    clock.true_s = START + HOUR + DAY
    lane.permit(0)
    assert lane.status().n_bytes_today == 0


@pytest.mark.parametrize(
    ("hours", "at", "wait_h"),
    [((22, 6), 12, 10), ((22, 6), 23, 0), ((22, 6), 5, 0), ((22, 6), 6, 16), ((1, 5), 0, 1), ((1, 5), 6, 19)],
)
def test_the_hours_of_a_day(tmp_path: Path, clock: Clock, hours: tuple[int, int], at: int, wait_h: int) -> None:
    clock.true_s = START + at * HOUR
    lane = lane_of(tmp_path, clock, paced(hours=hours))
    if wait_h:
        with pytest.raises(LanePaused, match=f"outside 0?{hours[0]}:00"):
            lane.permit(0.9 * wait_h * HOUR)
    lane.permit(DAY)
    assert clock.true_s == pytest.approx(START + (at + wait_h) * HOUR, abs=0.1)


def test_a_pause_that_begins_while_a_worker_waits_stops_it(tmp_path: Path, clock: Clock) -> None:
    lane, other = lane_of(tmp_path, clock), lane_of(tmp_path, clock)
    lane.permit(0)
    sleep = clock.sleep

    def interrupted(seconds: float) -> None:
        other.report("a", "session.bot_check")
        sleep(seconds)

    lane._sleep = interrupted
    with pytest.raises(LanePaused, match="bot_check"):
        lane.permit(HOUR)


def test_the_pause_survives_in_a_message_and_a_pickle() -> None:
    error = LanePaused("youtube", 1_800_000_000_000, "session.captcha")
    assert str(error).startswith("lane youtube: paused until 2027-01-15 08:00 UTC (session.captcha).")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.lane, copy.until_ms, copy.why) == (error.lane, error.until_ms, error.why)


# --- canaries ---

KEYS = ("canary1", "canary2", "canary3")


def good(lane: Lane, clock: Clock) -> None:
    assert lane.due_for_canary()
    lane.permit(0, is_canary=True)
    assert lane.canary(True) is None


def test_canaries_are_due_at_the_start_and_every_n_videos_in_turn(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock, paced(canary_keys=KEYS, canary_every=4))
    asked = []
    for i in range(12):
        key = lane.due_for_canary()
        if key:
            asked.append((i, key))
            lane.permit(0, is_canary=True)
            lane.canary(True)
        lane.permit(0)
        lane.report(f"{i}", "")
    assert asked == [(0, "canary1"), (4, "canary2"), (8, "canary3")]
    assert lane.due_for_canary() == "canary1"
    lane.canary(True)
    assert lane.due_for_canary(is_last=True) is None
    lane.permit(0)
    assert lane.due_for_canary() is None
    assert lane.due_for_canary(is_last=True) == "canary2"


def test_no_canaries_no_waiting(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock)
    assert lane.due_for_canary(is_last=True) is None
    lane.report("a", "session.rate_limited")
    clock.true_s += HOUR
    lane.permit(0)


def test_a_failing_canary_voids_what_went_missing_since_the_last_good_one(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock, paced(canary_keys=KEYS, canary_every=4))
    good(lane, clock)
    good_ms = 1000 * clock()
    for i in range(4):
        lane.permit(0)
        lane.report(f"{i}", "gone.unspecified")
    assert lane.due_for_canary() == "canary2"
    found = lane.canary(False)
    assert found == VoidRange("youtube", math.floor(good_ms), math.ceil(1000 * clock()))
    assert lane.status().state == "open"
    # a minute, then another canary; when that one fails too, hours
    waits = []
    while len(waits) < 8:
        waits.append(round((lane.status().until_ms or 0) / 1000 - clock()))
        assert lane.due_for_canary() is None
        clock.true_s = (lane.status().until_ms or 0) / 1000
        assert lane.due_for_canary() == KEYS[(2 + len(waits) - 1) % 3]
        again = lane.canary(False)
        assert again is not None
        assert again.from_ms == found.from_ms
    assert waits == [60, 3600, 7200, 14400, 28800, 57600, 86400, 86400]
    clock.true_s = (lane.status().until_ms or 0) / 1000
    assert lane.due_for_canary()
    assert lane.status().state == "half_open"
    last = lane.canary(True)  # it ends the bad spell, and covers what ended meanwhile
    assert last == VoidRange("youtube", found.from_ms, math.ceil(1000 * clock()))
    assert lane.status().state == "closed"
    assert lane.voids() == [last]
    lane.permit(0)


def test_a_lane_without_a_good_canary_is_void_from_its_start(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock, paced(canary_keys=KEYS))
    lane.permit(0)
    clock.true_s += 100
    lane.due_for_canary()
    assert lane.canary(False) == VoidRange("youtube", int(1000 * START), int(1000 * (START + 100)))


def test_the_void_range_covers_both_clocks_where_one_was_set_back(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock, paced(canary_keys=KEYS))
    good(lane, clock)
    clock.true_s += 500
    lane.report("a", "gone.unspecified")
    clock.offset_s -= 10_000
    lane.report("b", "gone.unspecified")
    clock.true_s += DAY / 2
    clock.offset_s -= DAY / 2
    lane.due_for_canary(is_last=True)
    assert lane.canary(False) == VoidRange("youtube", int(1000 * (START + 500 - 10_000)), int(1000 * (START + 500)))


@pytest.mark.parametrize("reason", ["session.suspect", "tool.extractor_broken", "media.not_media"])
def test_a_suspicious_answer_holds_everybody_until_a_canary_was_seen(tmp_path: Path, clock: Clock, reason: str) -> None:
    pace = paced(canary_keys=KEYS, canary_every=1000)
    lane, other = lane_of(tmp_path, clock, pace), lane_of(tmp_path, clock, pace)
    good(lane, clock)
    lane.permit(0)
    assert lane.due_for_canary() is None
    lane.report("a", reason)
    with pytest.raises(CanaryDue, match="a canary comes first"):
        other.permit(HOUR)
    assert lane.due_for_canary()
    assert other.due_for_canary() is None
    sleep = clock.sleep

    def meanwhile(seconds: float) -> None:
        sleep(seconds)
        if clock.true_s > began + 30:
            lane.canary(True)

    began = clock.true_s
    other._sleep = meanwhile
    other.permit(0)  # waits for the worker that asks
    assert 30 <= clock.true_s - began < 60


def test_a_worker_killed_while_it_asks_a_canary_is_replaced(tmp_path: Path, clock: Clock) -> None:
    pace = paced(canary_keys=KEYS)
    lane, other = lane_of(tmp_path, clock, pace), lane_of(tmp_path, clock, pace)
    good(lane, clock)
    lane.report("a", "session.suspect")
    assert lane.due_for_canary() == "canary2"  # and is never heard of again
    with pytest.raises(CanaryDue):
        other.permit(HOUR)
    assert clock.true_s - START >= lanes.CANARY_CLAIM_S
    assert other.due_for_canary() == "canary3"


def test_eight_failures_in_a_row_call_for_a_canary(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock, paced(canary_keys=KEYS, canary_every=1000))
    good(lane, clock)
    for i in range(7):
        lane.report(f"{i}", "net.timeout")
    lane.report("there", "qc.silent")
    for i in range(7):
        lane.report(f"{i}", "gone.private")
    assert lane.due_for_canary() is None
    lane.report("8", "gone.private")
    assert lane.due_for_canary()


def test_a_canary_grows_old(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock, paced(canary_keys=KEYS))
    good(lane, clock)
    clock.true_s += 7 * HOUR
    assert lane.due_for_canary()


def test_a_canary_that_meets_a_block_pauses_as_long_as_the_block_asks(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock, paced(canary_keys=KEYS))
    lane.due_for_canary()
    assert lane.canary(False, answer=Answer("session.bot_check")) is not None
    assert lane.status().until_ms == 1000 * (START + DAY)
    assert lane.status().why == "session.bot_check"


def test_a_dead_canary_is_passed_over_in_the_end(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    lane = lane_of(tmp_path, clock, paced(canary_keys=KEYS, canary_every=1))
    asked: list[str] = []
    while len(asked) < 16:
        key = lane.due_for_canary()
        if key is not None:
            asked.append(key)
            lane.canary(key != "canary1")
        else:
            clock.true_s += 61
            with contextlib.suppress(LanePaused):
                lane.permit(0)
    assert asked.count("canary1") == 3
    assert asked[-6:].count("canary2") == 3
    assert "canary1 was missing 3 times" in caplog.text


def test_a_canary_that_comes_back_counts_again(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock, paced(canary_keys=KEYS[:2]))
    asked: list[str] = []
    misses = [True, True, False, True, True, False]  # of canary1
    while len(asked) < 20:
        key = lane.due_for_canary()
        clock.true_s += 7 * HOUR
        if key is not None:
            asked.append(key)
            lane.canary(not (key == "canary1" and misses and misses.pop(0)))
    assert asked == ["canary1", "canary2"] * 10


def test_who_asks_a_canary_keeps_the_claim_while_waiting_its_turn(tmp_path: Path, clock: Clock) -> None:
    pace = paced(per_hour=2, floor_per_hour=1, canary_keys=KEYS)  # half an hour, longer than a claim lasts
    lane, other = lane_of(tmp_path, clock, pace), lane_of(tmp_path, clock, pace)
    lane.permit(0)
    assert lane.due_for_canary() == "canary1"
    sleep, claims = clock.sleep, []

    def meanwhile(seconds: float) -> None:
        sleep(seconds)
        claims.append(other.due_for_canary())

    lane._sleep = meanwhile
    lane.permit(0, is_canary=True)
    assert len(claims) >= 30
    assert set(claims) == {None}


def test_admit_asks_the_canaries_that_are_due(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock, paced(canary_keys=KEYS, canary_every=3))
    is_well, probed, voided = True, [], []

    def probe(key: str) -> Answer:
        probed.append(key)
        return Answer("" if is_well else "gone.unspecified", n_bytes=10)

    for i in range(6):
        lane.admit(probe, voided.append, patience_s=0)
        lane.report(f"{i}", "")
    assert probed == ["canary1", "canary2"]
    assert lane.status().n_permits == 8  # a canary is a video too
    assert lane.status().n_bytes_today == 20
    is_well = False
    with pytest.raises(LanePaused, match="canary3 failed"):
        lane.admit(probe, voided.append, patience_s=0)
    assert len(voided) == 1
    with pytest.raises(LanePaused, match="canary1 failed"):  # a minute is worth waiting for, an hour is not
        lane.admit(probe, voided.append, patience_s=120)
    is_well = True
    lane.admit(probe, voided.append, patience_s=2 * HOUR)
    assert [v.from_ms for v in voided] == [voided[0].from_ms] * 3
    assert probed[2:] == ["canary3", "canary1", "canary2"]
    lane.verify(probe, voided.append, patience_s=0)
    lane.verify(probe, voided.append, patience_s=0)
    assert probed[5:] == ["canary3"]  # the second had nothing to prove


def test_a_probe_that_breaks_leaves_the_canary_to_others(tmp_path: Path, clock: Clock) -> None:
    lane = lane_of(tmp_path, clock, paced(canary_keys=KEYS))

    def broken(key: str) -> Answer:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lane.admit(broken, lambda void: None, patience_s=0)
    assert lane.due_for_canary() == "canary2"


# --- pace as a section of params.yaml ---


def test_a_pace_is_read_strictly() -> None:
    values = {"per_hour": 200, "canary_keys": ["a", "b"], "hours": [22, 6]}
    assert parse("p", Pace, values) == Pace(per_hour=200, canary_keys=("a", "b"), hours=(22, 6))
    with pytest.raises(ConfigError, match="per_hor"):
        parse("p", Pace, {"per_hor": 200})


@pytest.mark.parametrize(
    "wrong",
    [
        {"per_hour": 0},
        {"jitter": 1.0},
        {"jitter": -0.1},
        {"floor_per_hour": 201},
        {"canary_every": 0},
        {"hours": (6, 6)},
        {"hours": (22, 24)},
        {"canary_keys": ("a", "a")},
        {"budget_bytes_per_day": 0},
    ],
)
def test_an_impossible_pace_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        paced(**wrong)


# --- estimate ---


def test_the_estimate_of_audiocaps() -> None:
    found = estimate(51_308, paced())
    assert found.hours == pytest.approx(256.54)
    assert found.days == pytest.approx(10.69, abs=0.01)
    assert (found.bytes_low, found.bytes_high) == (56_438_800_000, 112_877_600_000)
    assert str(found) == ("51,308 clips, at most 200 videos an hour: at least 10.7 days, 56.4 to 112.9 GB of traffic.")


def test_the_estimate_counts_canaries_hours_and_the_budget() -> None:
    assert estimate(1000, paced(canary_keys=KEYS, canary_every=50)).hours == pytest.approx(1020 / 200)
    night = estimate(1600, paced(hours=(22, 6)))
    assert (night.hours, night.days) == (8, 1)
    assert "8 hours a day are used" in night.text
    metered = estimate(1000, paced(budget_bytes_per_day=220_000_000))
    assert metered.days == pytest.approx(10)
    assert "the budget of 0.2 GB a day decides" in metered.text
    free = estimate(10, paced(per_hour=None))
    assert (free.hours, free.days) == (None, None)
    assert "as fast as the host answers" in free.text
    assert "3 minutes" in estimate(10, paced()).text
    with pytest.raises(ConfigError):
        estimate(-1, paced())


# --- terms ---


def test_terms_must_be_accepted_by_somebody(tmp_path: Path) -> None:
    assert accepted(tmp_path, "youtube") is None
    with pytest.raises(ConfigError, match=r"have not been accepted.*harken accept-terms youtube"):
        refuse_unaccepted(tmp_path, "youtube")
    with pytest.raises(ConfigError, match="no name"):
        accept_terms(tmp_path, "youtube", "  ", TERMS["youtube"].version, 1)
    with pytest.raises(ConfigError, match="Read it again"):
        accept_terms(tmp_path, "youtube", "Ada", "0", 1)
    with pytest.raises(ConfigError, match="Did you mean 'youtube'"):
        accept_terms(tmp_path, "yuotube", "Ada", "1", 1)
    assert not (tmp_path / "terms.json").exists()
    done = accept_terms(tmp_path, "youtube", "Ada", TERMS["youtube"].version, 1_800_000_000_000)
    refuse_unaccepted(tmp_path, "youtube")
    assert accepted(tmp_path, "youtube") == done
    assert acceptances(tmp_path) == {"youtube": done}
    record = json.loads((tmp_path / "terms.json").read_text(encoding="utf-8"))["youtube"]
    assert (record["who"], record["accepted_ms"], record["text"]) == ("Ada", 1_800_000_000_000, TERMS["youtube"].text)


def test_an_older_text_is_no_acceptance_of_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept_terms(tmp_path, "youtube", "Ada", TERMS["youtube"].version, 1)
    monkeypatch.setitem(lanes.TERMS, "youtube", lanes.Terms("2", TERMS["youtube"].url, "other words"))
    assert accepted(tmp_path, "youtube") is None
    with pytest.raises(ConfigError, match="have changed since"):
        refuse_unaccepted(tmp_path, "youtube")


@pytest.mark.parametrize("text", ["", "[]", '{"youtube": 3}', '{"youtube": {"who": "Ada"}}', "{"])
def test_a_damaged_record_is_no_acceptance(tmp_path: Path, text: str) -> None:
    (tmp_path / "terms.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"terms\.json"):
        refuse_unaccepted(tmp_path, "youtube")


def test_the_terms_name_what_harken_does_not_do() -> None:
    text = TERMS["youtube"].text
    for word in ("cookies", "proxies", "country restrictions", "census", "import", "permission"):
        assert word in text
