from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harken import attempts
from harken.attempts import SCHEMA, Attempt, AttemptLog, Policy, fold, new_id, read, seal, write_rulings
from harken.errors import ConfigError, DataError

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
T0 = 1_700_000_000_000
NOW = T0 + 10_000 * DAY_MS
RECHECK_S = 90 * 86_400.0
VERDICT = {"gone": "gone", "unknown": "gone", "denied": "denied", "content": "content"}

# small ladders and gaps, so that random histories of a few hours reach every rule
POLICIES = {
    "gone.private": Policy("gone", True, 1, 0, (), 1, RECHECK_S),
    "gone.unspecified": Policy("unknown", True, 2, 86_400, (86_400,), 2, RECHECK_S),
    "live.ended": Policy("unknown", True, 3, 7200, (7200, 3600), 3, RECHECK_S),
    "live.gone": Policy("unknown", True, 2, 0, (60,), 2, None),
    "denied.geo": Policy("denied", True, 1, 0, (), 1, RECHECK_S),
    "denied.client": Policy("denied", True, 2, 3600, (3600,), 2, RECHECK_S),
    "qc.silent": Policy("content", True, 1, 0, (), 1, None),
    "net.timeout": Policy("ours", True, 0, 0, (2, 60, 600), 4, None),
    "net.reset": Policy("ours", True, 0, 0, (2, 60, 600), 4, None),
    "media.403": Policy("ours", True, 0, 0, (2, 86_400), 2, None),
    "session.rate_limited": Policy("ours", False, 0, 0, (3600, 7200), 0, None),
    "local.killed": Policy("ours", False, 0, 0, (0,), 0, None),
}


def attempt(
    clip_id: str, at_ms: int, reason: str = "", *, i: int = 0, step: str = "fetch", lane: str = "a", **other: Any
) -> Attempt:
    """A failed attempt for `reason`, or an ok one without, that ended `at_ms` after T0."""
    outcome = other.pop("outcome", "failed" if reason else "ok")
    facts = other.pop("facts", {})
    identity = other.pop("attempt_id", None) or new_id(
        T0 + at_ms, random.Random(f"{clip_id}/{at_ms}/{reason}/{step}/{i}")
    )
    ended = T0 + at_ms
    message = other.pop("message", f"{reason} said the host" if reason else "")
    assert not other
    return Attempt(
        identity, "run", "w0", lane, clip_id, step, ended - 5, ended, outcome, reason, "v1", message, facts, {"t": "1"}
    )


def table_of(rows: Iterable[Attempt]) -> pa.Table:
    def row(a: Attempt) -> dict[str, Any]:
        values = {name: getattr(a, name) for name in SCHEMA.names}
        return {**values, "facts": json.dumps(dict(a.facts)), "tools": json.dumps(dict(a.tools))}

    return pa.Table.from_pylist([row(a) for a in rows], SCHEMA)


def state_of(rows: Iterable[Attempt], now_ms: int = NOW) -> dict[str, Any]:
    """The one clip's row, with None for NA and times relative to T0."""
    (row,) = as_rows(fold(table_of(rows), POLICIES, now_ms))
    for name in ("first_ms", "last_ms", "last_ok_ms", "first_missing_ms", "next_ms"):
        row[name] = None if row[name] is None else row[name] - T0
    return row


# ---------------------------------------------------------------------------------------------- the rules, one by one


def test_an_ok_fetch_is_final() -> None:
    row = state_of([attempt("c", 0, "net.timeout"), attempt("c", 5000)])
    assert row == {
        "clip_id": "c",
        "state": "ok",
        "reason": "",
        "message": "",
        "n_attempts": 2,
        "n_counted": 1,
        "first_ms": 0,
        "last_ms": 5000,
        "last_ok_ms": 5000,
        "first_missing_ms": None,
        "next_ms": None,
    }


def test_an_imported_clip_is_as_good_as_a_fetched_one() -> None:
    assert state_of([attempt("c", 0, step="import")])["state"] == "ok"


def test_a_census_after_the_fetch_says_since_when_it_is_gone_but_takes_nothing_away() -> None:
    row = state_of(
        [attempt("c", 0), attempt("c", DAY_MS, step="census"), attempt("c", 9 * DAY_MS, "gone.private", step="census")]
    )
    assert (row["state"], row["reason"], row["next_ms"]) == ("ok", "", None)
    assert (row["last_ok_ms"], row["first_missing_ms"]) == (DAY_MS, 9 * DAY_MS)


def test_a_clip_seen_by_the_census_is_due_at_once() -> None:
    row = state_of([attempt("c", 0, "gone.private", step="census"), attempt("c", DAY_MS, step="census")])
    assert (row["state"], row["reason"], row["message"], row["next_ms"]) == ("retry", "", "", DAY_MS)
    assert (row["last_ok_ms"], row["first_missing_ms"], row["n_counted"]) == (DAY_MS, None, 1)


def test_an_explicit_reason_is_a_verdict_at_once() -> None:
    row = state_of([attempt("c", 0, "gone.private", message="Private video")])
    assert (row["state"], row["reason"], row["message"]) == ("gone", "gone.private", "Private video")
    assert (row["next_ms"], row["first_missing_ms"], row["last_ok_ms"]) == (90 * DAY_MS, 0, None)


def test_denied_and_content_are_verdicts_but_no_absence() -> None:
    denied = state_of([attempt("c", 0, "denied.geo")])
    assert (denied["state"], denied["next_ms"], denied["first_missing_ms"]) == ("denied", 90 * DAY_MS, None)
    content = state_of([attempt("c", 0, "qc.silent"), attempt("c", 1000, "session.rate_limited")])
    assert (content["state"], content["reason"], content["next_ms"]) == ("content", "qc.silent", None)


def test_the_latest_verdict_holds() -> None:
    there_again = [attempt("c", 0, "gone.private"), attempt("c", 90 * DAY_MS, "denied.geo")]
    row = state_of(there_again)
    assert (row["state"], row["first_missing_ms"], row["next_ms"]) == ("denied", None, 180 * DAY_MS)
    row = state_of([*there_again, attempt("c", 180 * DAY_MS, "gone.private")])
    assert (row["state"], row["first_missing_ms"]) == ("gone", 180 * DAY_MS)
    row = state_of([attempt("c", 0, "gone.private"), attempt("c", 90 * DAY_MS)])
    assert (row["state"], row["first_missing_ms"]) == ("ok", None)


def test_a_suspicion_needs_a_second_observation_a_day_later() -> None:
    once = [attempt("c", 0, "gone.unspecified")]
    row = state_of(once)
    assert (row["state"], row["next_ms"], row["first_missing_ms"]) == ("suspect", DAY_MS, None)
    hasty = [*once, attempt("c", DAY_MS - 1, "gone.unspecified")]
    assert state_of(hasty)["state"] == "suspect"
    row = state_of([*hasty, attempt("c", DAY_MS, "gone.unspecified")])
    assert (row["state"], row["first_missing_ms"], row["next_ms"]) == ("gone", 0, 91 * DAY_MS)


def test_a_suspicion_does_not_confirm_another() -> None:
    row = state_of([attempt("c", 0, "live.ended"), attempt("c", 30 * DAY_MS, "gone.unspecified")])
    assert (row["state"], row["reason"]) == ("suspect", "gone.unspecified")


def test_three_observations_must_each_be_apart() -> None:
    rows = [attempt("c", ms, "live.ended") for ms in (0, 1 * HOUR_MS, 2 * HOUR_MS, 3 * HOUR_MS)]
    assert state_of(rows)["state"] == "suspect"
    assert state_of([*rows, attempt("c", 4 * HOUR_MS, "live.ended")])["state"] == "gone"


def test_a_suspicion_of_a_denial_becomes_a_denial() -> None:
    rows = [attempt("c", 0, "denied.client"), attempt("c", HOUR_MS, "denied.client")]
    assert state_of(rows[:1])["state"] == "suspect"
    assert (state_of(rows)["state"], state_of(rows)["first_missing_ms"]) == ("denied", None)


@pytest.mark.parametrize("between", ["", "denied.geo", "qc.silent"])
def test_what_shows_the_video_to_exist_starts_the_count_anew(between: str) -> None:
    rows = [
        attempt("c", 0, "gone.unspecified"),
        attempt("c", 2 * DAY_MS, between, step="census"),
        attempt("c", 4 * DAY_MS, "gone.unspecified", step="census"),
    ]
    row = state_of(rows)
    assert row["state"] == {"": "suspect", "denied.geo": "denied", "qc.silent": "content"}[between]
    assert row["first_missing_ms"] is None
    assert state_of([*rows, attempt("c", 5 * DAY_MS, "gone.unspecified")])["state"] == "gone"


def test_a_confirmed_absence_after_the_fetch_is_dated_by_its_first_observation() -> None:
    rows = [attempt("c", 0)] + [attempt("c", d * DAY_MS, "gone.unspecified", step="census") for d in (3, 5)]
    assert state_of(rows[:2])["first_missing_ms"] is None
    assert (state_of(rows)["state"], state_of(rows)["first_missing_ms"]) == ("ok", 3 * DAY_MS)


def test_failures_of_ours_never_count() -> None:
    rows = [attempt("c", h * HOUR_MS, "session.rate_limited") for h in range(50)]
    row = state_of(rows)
    assert (row["state"], row["n_attempts"], row["n_counted"]) == ("retry", 50, 0)
    assert row["next_ms"] == 51 * HOUR_MS
    assert state_of(rows[:1])["next_ms"] == HOUR_MS


def test_failures_of_ours_do_not_hide_what_the_clip_said() -> None:
    row = state_of([attempt("c", 0, "gone.unspecified"), attempt("c", HOUR_MS, "session.rate_limited")])
    assert (row["state"], row["reason"], row["next_ms"]) == ("suspect", "gone.unspecified", DAY_MS)
    row = state_of([attempt("c", 0, "gone.unspecified"), attempt("c", 24 * HOUR_MS, "session.rate_limited")])
    assert row["next_ms"] == 25 * HOUR_MS


def test_passing_failures_wait_longer_each_time_and_end() -> None:
    rows = [attempt("c", n * HOUR_MS, reason) for n, reason in enumerate(["net.timeout", "net.reset"] * 2)]
    waits = [state_of(rows[: n + 1])["next_ms"] - n * HOUR_MS for n in range(3)]  # equal policies share their ladder
    assert waits == [2_000, 60_000, 600_000]
    row = state_of(rows)
    assert (row["state"], row["reason"], row["next_ms"], row["n_counted"]) == ("exhausted", "net.reset", None, 4)


def test_what_is_exhausted_stays_so_when_a_new_round_meets_trouble_of_ours() -> None:
    rows = [attempt("c", 0, "media.403"), attempt("c", 1000, "media.403"), attempt("c", DAY_MS, "session.rate_limited")]
    row = state_of(rows)
    assert (row["state"], row["reason"], row["next_ms"], row["n_counted"]) == ("exhausted", "media.403", None, 2)
    assert state_of([*rows, attempt("c", DAY_MS + 1)])["state"] == "ok"


def test_another_kind_of_trouble_has_its_own_patience() -> None:
    rows = [attempt("c", n * HOUR_MS, "net.timeout") for n in range(3)] + [attempt("c", 3 * HOUR_MS, "media.403")]
    row = state_of(rows)
    assert (row["state"], row["next_ms"], row["n_counted"]) == ("retry", 3 * HOUR_MS + 2_000, 4)


def test_a_recheck_that_fails_for_a_passing_reason_leaves_the_verdict() -> None:
    verdict = attempt("c", 0, "gone.private")
    tries = [attempt("c", 90 * DAY_MS + n * HOUR_MS, "media.403") for n in range(2)]
    row = state_of([verdict, tries[0]])
    assert (row["state"], row["reason"], row["next_ms"]) == ("gone", "gone.private", 90 * DAY_MS + 2_000)
    row = state_of([verdict, *tries])
    assert (row["state"], row["next_ms"]) == ("gone", 180 * DAY_MS + HOUR_MS)


def test_retry_after_is_honoured_where_it_is_longer() -> None:
    def next_ms(reason: str, retry_after_s: object) -> int:
        return state_of([attempt("c", 0, reason, facts={"retry_after_s": retry_after_s})])["next_ms"]

    assert next_ms("session.rate_limited", 10) == HOUR_MS
    assert next_ms("session.rate_limited", 7200.5) == 7_200_500
    assert next_ms("net.timeout", 30) == 30_000
    assert next_ms("net.timeout", None) == 2_000
    assert next_ms("net.timeout", 1e300) == 366 * DAY_MS  # a host's nonsense is not "never"
    assert next_ms("gone.private", 10**9) == 90 * DAY_MS  # a verdict waits for its recheck


def test_a_failed_canary_takes_back_its_lanes_failures_and_nothing_else() -> None:
    def void(lane: str, from_ms: int, to_ms: int) -> Attempt:
        facts = {"lane": lane, "from_ms": T0 + from_ms, "to_ms": T0 + to_ms}
        return attempt("canary:x", to_ms, outcome="void", step="canary", lane=lane, facts=facts)

    rows = [
        attempt("before", 0, "gone.private"),
        attempt("first", 10, "gone.private"),
        attempt("ok", 15),
        attempt("other lane", 15, "gone.private", lane="b"),
        attempt("last", 20, "gone.private"),
        attempt("after", 21, "gone.private"),
    ]
    frame = fold(table_of([*rows, void("a", 10, 20)]), POLICIES, NOW)
    assert list(frame["clip_id"]) == ["after", "before", "ok", "other lane"]
    # ranges may overlap, lie inside one another and name lanes that nobody used
    events = [void("a", 0, 12), void("a", 5, 6), void("a", 11, 30), void("c", 0, 99)]
    assert list(fold(table_of([*rows, *events]), POLICIES, NOW)["clip_id"]) == ["ok", "other lane"]


def test_canaries_are_no_clips() -> None:
    assert fold(table_of([attempt("canary:x", 0, step="canary")]), POLICIES, NOW).empty


def test_a_clock_that_ran_ahead_is_set_back() -> None:
    row = state_of([attempt("c", 99_999 * DAY_MS, "net.timeout")], now_ms=T0 + DAY_MS)
    assert (row["last_ms"], row["next_ms"]) == (DAY_MS, DAY_MS + 2_000)


def test_clips_come_sorted_with_whole_columns() -> None:
    frame = fold(table_of(attempt(c, 0, "net.timeout") for c in ("yt:b", "yt:-a", "yt:é", "yt:a")), POLICIES, NOW)
    assert list(frame["clip_id"]) == sorted(frame["clip_id"]) == ["yt:-a", "yt:a", "yt:b", "yt:é"]
    assert list(frame.columns) == [
        "clip_id", "state", "reason", "message", "n_attempts", "n_counted", "first_ms", "last_ms",
        "last_ok_ms", "first_missing_ms", "next_ms",
    ]  # fmt: skip
    assert [str(frame[c].dtype) for c in ("n_counted", "last_ms", "next_ms")] == ["int64", "int64", "Int64"]
    empty = fold(SCHEMA.empty_table(), POLICIES, NOW)
    assert empty.empty
    assert list(empty.columns) == list(frame.columns)
    assert list(empty.dtypes) == list(frame.dtypes)


def test_a_reason_without_a_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reason: unknown name 'net.timeoot'. Did you mean 'net.timeout'\?"):
        fold(table_of([attempt("c", 0, "net.timeoot")]), POLICIES, NOW)


# --------------------------------------------------------------------------------------------- laws over any history


def twin(rows: Iterable[Attempt], now_ms: int) -> list[dict[str, Any]]:
    """`fold`, rule by rule and clip by clip."""
    unique = {a.attempt_id: a for a in rows}.values()
    voids = [a.facts for a in unique if a.outcome == "void"]
    clips: dict[str, list[tuple[int, Attempt]]] = {}
    for a in sorted(unique, key=lambda a: (min(a.ended_ms, now_ms), a.attempt_id)):
        is_taken_back = any(v["lane"] == a.lane and v["from_ms"] <= a.ended_ms <= v["to_ms"] for v in voids)
        if a.outcome == "void" or a.step == "canary" or (a.outcome == "failed" and is_taken_back):
            continue
        clips.setdefault(a.clip_id, []).append((min(a.ended_ms, now_ms), a))
    return [twin_of_one(clip_id, history) for clip_id, history in sorted(clips.items())]


def twin_of_one(clip_id: str, history: list[tuple[int, Attempt]]) -> dict[str, Any]:
    has_media = False
    last_ok: int | None = None
    verdict: tuple[int, Attempt] | None = None
    counted: tuple[int, Attempt] | None = None  # since the last ok
    latest: tuple[int, Attempt] | None = None
    met: dict[Policy, int] = {}  # since the last verdict or ok
    seen: dict[str, list[int]] = {}  # observations of a suspicion since the video was known to exist, each apart
    begun: dict[str, int] = {}
    missing_plain: int | None = None
    for ms, a in history:
        if a.outcome == "ok":
            has_media |= a.step in ("fetch", "import")
            last_ok, verdict, counted, latest, missing_plain = ms, None, None, None, None
            met, seen, begun = {}, {}, {}
            continue
        p = POLICIES[a.reason]
        latest = (ms, a)
        met[p] = met.get(p, 0) + 1
        if p.is_counted:
            counted = (ms, a)
        is_verdict = p.confirmations == 1
        if p.confirmations > 1:
            times = seen.setdefault(a.reason, [])
            begun.setdefault(a.reason, ms)
            if not times or ms >= times[-1] + p.gap_s * 1000:
                times.append(ms)
            is_verdict = len(times) >= p.confirmations
        if is_verdict:
            verdict, met = (ms, a), {}
            if p.confirmations == 1 and p.group in ("denied", "content"):
                seen, begun, missing_plain = {}, {}, None
            elif p.confirmations == 1 and missing_plain is None:
                missing_plain = ms

    gone = [
        begun[r]
        for r, times in seen.items()
        if len(times) >= POLICIES[r].confirmations and VERDICT[POLICIES[r].group] == "gone"
    ]
    first_missing = min([*gone, *([] if missing_plain is None else [missing_plain])], default=None)

    def due(row: tuple[int, Attempt]) -> int:
        ms, a = row
        p = POLICIES[a.reason]
        wait_s = p.delays_s[min(met.get(p, 0), len(p.delays_s)) - 1]
        return ms + round(1000 * max(wait_s, a.facts.get("retry_after_s") or 0))

    state, speaks, next_ms = "retry", None, history[-1][0]
    if has_media:
        state, next_ms = "ok", None
    elif latest is not None:
        speaks = (verdict or counted or latest)[1]
        p = POLICIES[counted[1].reason] if counted else None
        is_open = counted is not None and counted != verdict
        is_exhausted = is_open and p.confirmations == 0 and met[p] >= p.max_attempts
        if verdict:
            state = VERDICT[POLICIES[verdict[1].reason].group]
        elif is_exhausted:
            state = "exhausted"
        elif is_open and p.confirmations > 1:
            state = "suspect"
        recheck_s = POLICIES[verdict[1].reason].recheck_s if verdict else None
        if (verdict or is_exhausted) and recheck_s is None:
            next_ms = None
        else:
            times = [due(latest)] if counted is None or latest != counted else []
            if counted and (is_exhausted or not is_open):
                times.append(counted[0] + round(recheck_s * 1000))
            elif counted:
                times.append(due(counted))
            next_ms = max(times)
    return {
        "clip_id": clip_id,
        "state": state,
        "reason": speaks.reason if speaks else "",
        "message": speaks.message if speaks else "",
        "n_attempts": len(history),
        "n_counted": sum(a.outcome == "failed" and POLICIES[a.reason].is_counted for _, a in history),
        "first_ms": history[0][0],
        "last_ms": history[-1][0],
        "last_ok_ms": last_ok,
        "first_missing_ms": first_missing,
        "next_ms": next_ms,
    }


def as_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {k: None if v is pd.NA else int(v) if isinstance(v, np.integer) else v for k, v in row.items()}
        for row in frame.to_dict("records")
    ]


@st.composite
def histories(draw: st.DrawFn) -> list[Attempt]:
    n = draw(st.integers(0, 30))
    reasons = draw(st.lists(st.sampled_from(sorted(POLICIES)), min_size=1, max_size=4))  # few: that they meet again
    clips = draw(st.sampled_from([["c1"], ["c1", "c2", "c3"]]))
    rows = []
    for i in range(n):
        at_ms = draw(st.integers(0, 60)) * HOUR_MS + draw(st.integers(0, 1))
        kind = draw(st.sampled_from(["failed"] * 16 + ["ok", "void", "census", "canary"]))
        lane = draw(st.sampled_from("ab"))
        clip = draw(st.sampled_from(clips))
        if kind == "void":
            to_ms = at_ms + draw(st.integers(0, 4)) * HOUR_MS
            facts = {"lane": lane, "from_ms": T0 + at_ms, "to_ms": T0 + to_ms}
            rows.append(attempt("canary:x", to_ms, outcome="void", step="canary", lane=lane, facts=facts, i=i))
        elif kind == "failed":
            reason = draw(st.sampled_from(reasons))
            step = draw(st.sampled_from(["fetch", "fetch", "census"]))
            facts = draw(st.sampled_from([{}, {}, {"retry_after_s": 5400}, {"retry_after_s": None}]))
            rows.append(attempt(clip, at_ms, reason, step=step, lane=lane, i=i, facts=facts, message=f"m{i}"))
        else:
            step = {"ok": draw(st.sampled_from(["fetch", "import"])), "census": "census", "canary": "canary"}[kind]
            rows.append(attempt(clip, at_ms, step=step, lane=lane, i=i))
    return rows


@settings(max_examples=80, deadline=None)
@given(histories(), st.integers(0, 80))
def test_fold_agrees_with_its_twin(rows: list[Attempt], now_h: int) -> None:
    now_ms = T0 + now_h * HOUR_MS
    assert as_rows(fold(table_of(rows), POLICIES, now_ms)) == twin(rows, now_ms)


@settings(max_examples=30, deadline=None)
@given(histories(), st.randoms(use_true_random=False))
def test_neither_order_nor_repetition_changes_the_state(rows: list[Attempt], rng: random.Random) -> None:
    expected = fold(table_of(rows), POLICIES, NOW)
    shuffled = rows + rng.choices(rows, k=len(rows)) if rows else rows
    rng.shuffle(shuffled)
    pd.testing.assert_frame_equal(fold(table_of(shuffled), POLICIES, NOW), expected)
    pd.testing.assert_frame_equal(fold(table_of(rows), POLICIES, NOW), expected)


@settings(max_examples=30, deadline=None)
@given(histories())
def test_evidence_that_was_taken_back_was_never_there(rows: list[Attempt]) -> None:
    spans = [(a.facts["lane"], a.facts["from_ms"], a.facts["to_ms"]) for a in rows if a.outcome == "void"]
    left = [
        a
        for a in rows
        if a.outcome == "ok"
        or (a.outcome == "failed" and not any(a.lane == lane and b <= a.ended_ms <= e for lane, b, e in spans))
    ]
    pd.testing.assert_frame_equal(fold(table_of(left), POLICIES, NOW), fold(table_of(rows), POLICIES, NOW))


@settings(max_examples=30, deadline=None)
@given(histories())
def test_what_is_not_counted_never_makes_a_clip_lost(rows: list[Attempt]) -> None:
    ours = [a for a in rows if a.outcome == "failed" and not POLICIES[a.reason].is_counted]
    frame = fold(table_of(ours), POLICIES, NOW)
    assert set(frame["state"]) <= {"retry"}
    assert frame["next_ms"].notna().all()
    assert not frame["n_counted"].any()


# ----------------------------------------------------------------------------------------------------- on the disk


def test_what_is_flushed_is_read_back(tmp_path: Path) -> None:
    first = attempt(
        "yt:-a_b:0-10000", 0, "gone.private", message='tab\t "quotes" \u2028 \x00 é', facts={"http_status": 403}
    )
    with AttemptLog(tmp_path, "run1", "host-1") as log:
        log.append(first)
        assert read(tmp_path).num_rows == 0  # kept in memory
        log.flush()
        assert read(tmp_path).num_rows == 1
        log.append(attempt("b", 5, facts={"formats": ["140"], "n_bytes": 7}))
    table = read(tmp_path)
    assert table.schema.names == [*SCHEMA.names, "reason_then"]
    row = table.to_pylist()[0]
    assert row["message"] == first.message
    assert row["reason"] == row["reason_then"] == "gone.private"
    assert json.loads(row["facts"]) == {"http_status": 403}
    assert json.loads(row["tools"]) == {"t": "1"}
    assert read(tmp_path, ["clip_id", "ended_ms"]).to_pydict() == {
        "clip_id": ["yt:-a_b:0-10000", "b"],
        "ended_ms": [T0, T0 + 5],
    }
    assert read(tmp_path / "nowhere").num_rows == 0


def test_an_exception_in_the_block_loses_nothing(tmp_path: Path) -> None:
    def stop_half_way() -> None:
        with AttemptLog(tmp_path, "run", "w") as log:
            log.append(attempt("a", 0))
            raise KeyError

    with pytest.raises(KeyError):
        stop_half_way()
    assert read(tmp_path).num_rows == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(), min_size=1, max_size=5),
    st.dictionaries(
        st.text(), st.recursive(st.none() | st.booleans() | st.integers(0, 9) | st.text(), st.lists), max_size=3
    ),
)
def test_any_text_comes_back_as_it_was(messages: list[str], facts: dict[str, Any]) -> None:
    facts = {f"x{k}": v for k, v in facts.items()}
    with tempfile.TemporaryDirectory() as name:
        with AttemptLog(Path(name), "run", "w") as log:
            for n, message in enumerate(messages):
                log.append(attempt(f"c{n}", n, "net.reset", message=message, facts=facts))
        for _ in range(2):
            found = sorted(read(Path(name)).to_pylist(), key=lambda r: r["attempt_id"])
            assert [r["message"] for r in found] == messages
            assert all(json.loads(r["facts"]) == facts for r in found)
            seal(Path(name), keep=())


def test_an_unopened_log_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Use AttemptLog in a with statement"):
        AttemptLog(tmp_path, "run", "w").flush()


def test_a_torn_line_is_no_attempt_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    with AttemptLog(tmp_path, "run", "w") as log:
        log.append(attempt("a", 0))
        log.append(attempt("b", 1))
    whole = log.path.read_bytes()
    for cut in range(len(whole) + 1):
        log.path.write_bytes(whole[:cut])
        n_whole = whole[:cut].count(b"\n")
        assert read(tmp_path).num_rows == n_whole
        if cut % 97 == 0:
            with AttemptLog(tmp_path, "run", "w") as again:
                again.append(attempt("c", 2))
            assert read(tmp_path)["clip_id"].to_pylist() == [*["a", "b"][:n_whole], "c"]


def test_a_full_disk_leaves_no_torn_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_write = os.write

    def half_a_write(fd: int, data: Any) -> int:
        if len(data) > 40:
            return true_write(fd, bytes(data[:40]))
        raise OSError(28, "No space left on device")

    with AttemptLog(tmp_path, "run", "w") as log:
        log.append(attempt("a", 0))
        log.flush()
        log.append(attempt("b", 1))
        monkeypatch.setattr(os, "write", half_a_write)
        with pytest.raises(OSError, match="No space"):
            log.flush()
        assert log.path.read_bytes().count(b"\n") == 1
        assert log.path.read_bytes().endswith(b"\n")
        monkeypatch.undo()  # there is space again
        log.append(attempt("c", 2))
    assert read(tmp_path)["clip_id"].to_pylist() == ["a", "b", "c"]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with AttemptLog(tmp_path, "run", "w") as log:
        log.append(attempt("a", 0))
    log.path.write_bytes(b"{]\n" + log.path.read_bytes())
    with pytest.raises(DataError, match=r"w\.jsonl: a line is no attempt"):
        read(tmp_path)
    log.path.write_bytes(b'{"attempt_id": "x"}\n')
    with pytest.raises(DataError, match=r"w\.jsonl: run_id, .*missing in some lines"):
        read(tmp_path)
    log.path.unlink()
    (tmp_path / "run" / "w.attempts.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"w\.attempts\.parquet: not a sealed segment"):
        read(tmp_path)


def test_one_writer_per_file(tmp_path: Path) -> None:
    with AttemptLog(tmp_path, "run", "w"), pytest.raises(DataError, match="another process is writing"):
        AttemptLog(tmp_path, "run", "w").__enter__()
    with AttemptLog(tmp_path, "run", "w") as log:
        log.append(attempt("a", 0))
    for name in ("../x", "", ".hidden", "a/b", "a\n"):
        with pytest.raises(ConfigError, match="expected a file name"):
            AttemptLog(tmp_path, name, "w")
        with pytest.raises(ConfigError, match="expected a file name"):
            AttemptLog(tmp_path, "run", name)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (attempt("a", 0, attempt_id="short"), "expected a ULID"),
        (attempt("a", 0, step="fech"), "Did you mean 'fetch'"),
        (attempt("a", 0, outcome="fine"), "outcome: unknown name 'fine'"),
        (attempt("a", 0, "net.dns", outcome="ok"), "Failed ones have one"),
        (attempt("a", 0, outcome="failed"), "Failed ones have one"),
        (attempt("a", 0, facts={"http_status": "403"}), "http_status='403': expected int"),
        (attempt("a", 0, facts={"http_status": True}), "http_status=True: expected int"),
        (attempt("a", 0, facts={"expected": 0}), "expected=0: expected bool"),
        (attempt("a", 0, facts={"x": float("nan")}), "JSON"),
        (attempt("a", 0, outcome="void", facts={"lane": "a"}), "facts say which failures it takes back"),
        (attempt("a", 0, facts={"page": "x" * 5_000_000}), "can be kept"),
    ],
)
def test_what_could_not_be_read_back_is_refused(tmp_path: Path, made: Attempt, message: str) -> None:
    with AttemptLog(tmp_path, "run", "w") as log, pytest.raises((ValueError, ConfigError, DataError), match=message):
        log.append(made)
    assert read(tmp_path).num_rows == 0


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    with AttemptLog(tmp_path, "run", "w") as log:
        log.append(attempt("a", 0, "net.dns", message="caf\udce9", facts={"x": "\ud800"}))
    row = read(tmp_path).to_pylist()[0]
    assert (row["message"], json.loads(row["facts"])) == ("caf?", {"x": "?"})


def test_ids_sort_by_time() -> None:
    rng = random.Random(1)
    ids = [new_id(ms, rng) for ms in (0, 1, 31, 32, T0, T0 + 1, (1 << 48) - 1)]
    assert ids == sorted(ids)
    assert {len(i) for i in ids} == {26}
    assert new_id((1 << 48) - 1, rng).startswith("7ZZZZZZZZZ")
    assert new_id(1469918176385, rng).startswith("01ARYZ6S41")  # the ULID specification's example
    with pytest.raises(ConfigError, match="no time"):
        new_id(-1, rng)


def fill(folder: Path, run: str, worker: str, clips: Iterable[str]) -> None:
    with AttemptLog(folder, run, worker) as log:
        for n, clip in enumerate(clips):
            log.append(attempt(clip, n, "gone.private", facts={"http_status": 404}))


def contents(folder: Path) -> list[dict[str, Any]]:
    return sorted(read(folder).to_pylist(), key=lambda r: r["attempt_id"])


def test_sealing_changes_the_files_and_not_the_ledger(tmp_path: Path) -> None:
    fill(tmp_path, "r1", "w1", "abc")
    fill(tmp_path, "r1", "w2", "de")
    fill(tmp_path, "r2", "w1", "f")
    before = contents(tmp_path)
    assert seal(tmp_path, keep={"r2"}) == 2
    assert sorted(p.name for p in (tmp_path / "r1").iterdir()) == ["w1.attempts.parquet", "w2.attempts.parquet"]
    assert [p.name for p in (tmp_path / "r2").iterdir()] == ["w1.jsonl"]
    assert contents(tmp_path) == before
    assert seal(tmp_path, keep={"r2"}) == 0
    fill(tmp_path, "r1", "w1", "xy")  # the run goes on
    before = contents(tmp_path)
    assert len(before) == 8
    assert seal(tmp_path, keep=()) == 2
    assert contents(tmp_path) == before
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_kill_between_the_two_steps_of_sealing_changes_nothing(tmp_path: Path) -> None:
    fill(tmp_path, "r", "w", "abc")
    lines = (tmp_path / "r" / "w.jsonl").read_bytes()
    before = contents(tmp_path)
    seal(tmp_path, keep=())
    (tmp_path / "r" / "w.jsonl").write_bytes(lines)  # the Parquet file is there, the lines not yet gone
    (tmp_path / "r" / ".w.attempts.parquet.1.tmp").write_bytes(b"half")
    assert contents(tmp_path) == before
    seal(tmp_path, keep=())
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["w.attempts.parquet"]
    assert contents(tmp_path) == before
    assert pq.read_metadata(tmp_path / "r" / "w.attempts.parquet").num_rows == 3


def test_a_segment_that_is_being_written_is_not_sealed(tmp_path: Path) -> None:
    with AttemptLog(tmp_path, "r", "w") as log:
        log.append(attempt("a", 0))
        log.flush()
        assert seal(tmp_path, keep=()) == 0
        log.append(attempt("b", 1))
    assert read(tmp_path).num_rows == 2
    assert seal(tmp_path, keep=()) == 1


def test_a_segment_that_is_sealed_while_the_ledger_is_read_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "r", "w1", "ab")
    fill(tmp_path, "r", "w2", "c")
    true_read = attempts._read_lines

    def meanwhile(path: Path) -> pa.Table:
        monkeypatch.undo()
        seal(tmp_path, keep=())
        return true_read(path)

    monkeypatch.setattr(attempts, "_read_lines", meanwhile)
    assert sorted(read(tmp_path)["clip_id"].to_pylist()) == ["a", "b", "c"]


WRITER = """
import random, sys
from pathlib import Path
from harken.attempts import Attempt, AttemptLog, new_id
rng = random.Random(0)
with AttemptLog(Path(sys.argv[1]), "run", "w") as log:
    for n in range(100_000):
        log.append(Attempt(new_id(n, rng), "run", "w", "a", f"c{n}", "fetch", n, n, "ok", "", "v", "", {}, {}))
        if n % 10 == 9:
            log.flush()
            print(n + 1, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_was_flushed(tmp_path: Path) -> None:
    for trial in range(3):
        folder = tmp_path / str(trial)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        told = [writer.stdout.readline() for _ in range(5 + 20 * trial)]
        writer.send_signal(signal.SIGKILL)
        told += writer.stdout.readlines()
        writer.wait()
        n_flushed = int([line for line in told if line.endswith("\n")][-1])
        found = read(folder)["clip_id"].to_pylist()
        assert found[:n_flushed] == [f"c{n}" for n in range(n_flushed)]
        assert len(found) <= n_flushed + 10
        assert seal(folder, keep=()) == 1
        assert sorted(read(folder)["clip_id"].to_pylist()) == sorted(found)


def test_a_ruling_is_applied_and_the_stored_reason_kept(tmp_path: Path) -> None:
    fill(tmp_path, "r", "w", "abc")
    ids = {r["clip_id"]: r["attempt_id"] for r in contents(tmp_path)}
    assert write_rulings(tmp_path, pa.table({"attempt_id": [], "reason": [], "rule_version": []})) is None

    def rule(version: str, **reasons: str) -> None:
        rows = {"attempt_id": [ids[c] for c in reasons], "reason": list(reasons.values())}
        write_rulings(tmp_path, pa.table({**rows, "rule_version": [version] * len(reasons)}))

    rule("v2", a="denied.geo", b="denied.geo")
    seal(tmp_path, keep=())
    rule("v3", b="net.timeout")
    table = read(tmp_path)
    assert dict(zip(table["clip_id"].to_pylist(), table["reason"].to_pylist(), strict=True)) == {
        "a": "denied.geo",
        "b": "net.timeout",
        "c": "gone.private",
    }
    assert set(table["reason_then"].to_pylist()) == {"gone.private"}
    assert list(fold(table, POLICIES, NOW)["state"]) == ["denied", "retry", "gone"]
    assert list(fold(read(tmp_path, attempts.FOLD_COLUMNS), POLICIES, NOW)["state"]) == ["denied", "retry", "gone"]
    with pytest.raises(ConfigError, match="Did you mean 'reason'"):
        read(tmp_path, ["resaon"])


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (("ours", False, 1, 0, (), 1, None), "not counted"),
        (("ours", True, 1, 0, (), 1, None), "no verdict follows"),
        (("ours", True, 0, 0, (), 1, None), "delays_s is empty"),
        (("gone", True, 2, 0, (), 2, None), "delays_s is empty"),
        (("ours", True, 0, 0, (1,), 0, None), "max_attempts"),
        (("gone", True, 1, -1, (), 1, None), "negative"),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(wrong: tuple[Any, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Policy(*wrong)
