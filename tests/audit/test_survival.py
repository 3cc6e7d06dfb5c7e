"""The survival curve is the likeliest one, agrees with known estimators, and never reads an absence as too much."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harken.audit.survival import NEVER, Evidence, day, iso, pooled, since_when, turnbull

DAY = 86_400_000


def mass_of(*intervals: tuple[int, int], weight: list[float] | None = None) -> dict[tuple[int, int], float]:
    ends = np.array(intervals, dtype=np.int64)
    found = turnbull(ends[:, 0], ends[:, 1], None if weight is None else np.array(weight))
    triples = zip(found.left.tolist(), found.right.tolist(), found.mass.tolist(), strict=True)
    return {(left, right): m for left, right, m in triples}


def test_one_interval_holds_all() -> None:
    assert mass_of((0, 5), (3, 9)) == {(3, 5): 1.0}


def test_disjoint_intervals_hold_their_shares() -> None:
    assert mass_of((0, 1), (0, 1), (4, 6)) == pytest.approx({(0, 1): 2 / 3, (4, 6): 1 / 3})


def test_touching_intervals_do_not_overlap() -> None:
    """(0, 3] and (3, 8] share no time: at 3 the first is closed and the second open."""
    assert mass_of((0, 3), (3, 8)) == pytest.approx({(0, 3): 0.5, (3, 8): 0.5})


def test_the_small_case_with_a_closed_form() -> None:
    """(0,1] (2,3] (0,3]: the third tells nothing about which of the two; both keep half."""
    assert mass_of((0, 1), (2, 3), (0, 3)) == pytest.approx({(0, 1): 0.5, (2, 3): 0.5}, abs=1e-6)
    # L = p (1-p)^2 for (0,1], (2,3], (2,3]; a fourth over both multiplies by 1
    assert mass_of((0, 1), (2, 3), (2, 3), (0, 3)) == pytest.approx({(0, 1): 1 / 3, (2, 3): 2 / 3}, abs=1e-6)


def test_weights_are_repetitions() -> None:
    heavy = mass_of((0, 2), (1, 4), (3, NEVER), weight=[3, 1, 2])
    assert heavy == pytest.approx(mass_of((0, 2), (0, 2), (0, 2), (1, 4), (3, NEVER), (3, NEVER)), abs=1e-6)


@st.composite
def censored(draw: st.DrawFn) -> np.ndarray:
    """Intervals (left, right], some without end, over few times: int64 (clip, 2)."""
    n = draw(st.integers(1, 12))
    left = draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    span = draw(st.lists(st.sampled_from([1, 2, 3, 5, None]), min_size=n, max_size=n))
    return np.array([(a, NEVER if s is None else a + s) for a, s in zip(left, span, strict=True)], dtype=np.int64)


@settings(max_examples=60)
@given(censored(), st.integers(0, 2**32 - 1))
def test_no_other_curve_is_likelier(intervals: np.ndarray, seed: int) -> None:
    found = turnbull(intervals[:, 0], intervals[:, 1])
    inside = (found.left[None] >= intervals[:, :1]) & (found.right[None] <= intervals[:, 1:])
    best = np.log(inside @ found.mass).sum()
    assert found.mass.sum() == pytest.approx(1)
    others = np.random.default_rng(seed).dirichlet(np.ones(len(found.mass)), 200)
    near = 0.95 * found.mass + 0.05 * others
    for candidates in (others, near):
        with np.errstate(divide="ignore"):
            assert (np.log(candidates @ inside.T).sum(axis=1) <= best + 1e-5).all()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=25))
def test_right_censored_times_give_kaplan_and_meier(clips: list[tuple[int, bool]]) -> None:
    left = np.array([t - 1 if dies else t for t, dies in clips], dtype=np.int64)
    right = np.array([t if dies else NEVER for t, dies in clips], dtype=np.int64)
    curve, alive = turnbull(left, right), 1.0
    for t in sorted({t for t, dies in clips if dies}):
        deaths = sum(dies and x == t for x, dies in clips)
        alive *= 1 - deaths / sum(x >= t for x, _ in clips)
        low, high = curve.alive(np.array([t]))
        assert low[0] == pytest.approx(alive, abs=1e-4) == pytest.approx(high[0], abs=1e-4)


def test_one_look_at_each_clip_gives_the_pooled_shares() -> None:
    """Current status: on day 1 80 of 100 are there, on day 2 90 of 100. No curve rises, so both are 85 %."""
    left = np.array([1] * 80 + [0] * 20 + [2] * 90 + [0] * 10, dtype=np.int64)
    right = np.array([NEVER] * 80 + [1] * 20 + [NEVER] * 90 + [2] * 10, dtype=np.int64)
    low, high = turnbull(left, right).alive(np.array([1, 2]))
    assert low == pytest.approx([0.85, 0.85], abs=1e-3)
    assert high == pytest.approx([0.85, 0.85], abs=1e-3)


def test_many_dates_are_quick_and_converge() -> None:
    rng = np.random.default_rng(1)
    asked, death = rng.integers(1, 300, 200_000), rng.exponential(1000, 200_000)
    gone = death <= asked
    curve = turnbull(np.where(gone, 0, asked), np.where(gone, asked, NEVER))
    low, high = curve.alive(np.array([100, 200]))
    assert low == pytest.approx(np.exp([-0.1, -0.2]), abs=0.01)
    assert high == pytest.approx(low, abs=0.01)


def evidence(source: str, alive: list[int], missing: list[int]) -> Evidence:
    return Evidence(source, np.array(alive, dtype=np.int64), np.array(missing, dtype=np.int64))


def test_since_when_from_three_dates() -> None:
    listed = evidence("list", [0] * 4, [-1] * 4)
    lab = evidence("lab", [100, 100, 100, -1], [-1, -1, -1, 100])
    ours = evidence("ours", [465, 465, -1, -1], [-1, -1, 465, 465])
    found = since_when([listed, lab, ours])
    assert found is not None
    assert [(c["when"], c["alive_low"], c["n"]) for c in found["curve"]] == [
        ("1970-01-01", 1.0, 4),
        ("1970-04-11", pytest.approx(0.75), 4),
        ("1971-04-11", pytest.approx(0.5), 4),
    ]
    assert found["median"] == {"low": "1971-04-11", "high": "1971-04-11"}
    assert found["loss_per_year"]["low"] == pytest.approx(0.5 / (465 / 365.25))
    assert (found["n_clips"], found["n_dates"], found["sources"]) == (4, 3, ["list", "lab", "ours"])


def test_a_later_sighting_takes_back_an_absence() -> None:
    listed = evidence("list", [0, 0], [-1, -1])
    lab = evidence("lab", [-1, 10], [10, -1])  # they could not get the first one
    ours = evidence("ours", [20, 20], [20, -1])  # we could, and an absence on that very day is no death
    found = since_when([listed, lab, ours])
    assert found is not None
    assert [c["alive_low"] for c in found["curve"]] == [1.0, 1.0, 1.0]
    assert found["median"] is None
    assert found["curve"][1]["n"] == 2


def test_fewer_than_two_dates_are_no_curve() -> None:
    assert since_when([]) is None
    assert since_when([evidence("list", [0, 0], [-1, -1])]) is None
    assert since_when([evidence("list", [-1], [-1])]) is None


def test_our_days_are_pooled_until_they_weigh_something() -> None:
    alive = np.array([0.5, 1.5, 2.5, 3.5, 9.5, np.nan]) * DAY
    missing = np.array([np.nan] * 5 + [9.9]) * DAY
    days = pooled(alive, missing, min_per_date=2)
    assert days[0].tolist() == [1, 1, 3, 3, 9, -1]
    assert days[1].tolist() == [-1] * 5 + [9]
    days = pooled(alive[:5], missing[:5], min_per_date=2)
    assert days[0].tolist() == [1, 1, 9, 9, 9]  # the rest of one visit joins the date before it
    assert pooled(alive[:1], missing[:1], min_per_date=50)[0].tolist() == [0]
    assert pooled(missing[:1], missing[:1])[0].tolist() == [-1]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 20))
def test_pooling_keeps_order_and_fills_dates(days: list[int], least: int) -> None:
    ms = np.array(days) * float(DAY)
    found = pooled(ms, np.full(len(days), np.nan), least)[0]
    assert (found >= np.minimum(days, found.max())).all()
    assert (np.diff(found[np.argsort(days, kind="stable")]) >= 0).all()
    assert found.max() == max(days)
    counts = np.unique(found, return_counts=True)[1]
    assert (counts >= least).all() or len(counts) == 1


def test_dates() -> None:
    assert iso(day("2017-03-05")) == "2017-03-05"
    assert iso(day("2023-02")) == "2023-02-28"
    assert iso(day("2023-12")) == "2023-12-31"
    assert iso(day("2021")) == "2021-12-31"
    assert day("1970-01-02") == 1
    ms = datetime(2026, 11, 21, 23, 59, tzinfo=UTC).timestamp() * 1000
    assert iso(int(pooled(np.array([ms]), np.array([np.nan]))[0][0])) == "2026-11-21"
