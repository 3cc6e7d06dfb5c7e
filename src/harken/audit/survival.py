"""Since when clips are gone: survival curves from sightings and absences at a few dates.

Nobody sees a video die. A clip was there on one date and was not on a later one, so its death is known to lie in an
interval `(alive, missing]`, and a clip that is still there has no later end. The maximum-likelihood curve of such data
is Turnbull's (1976); it says how much died within each interval but not when in it, so it is a band.
"""

from __future__ import annotations

import calendar
import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NEVER = np.iinfo(np.int64).max  # the end of an interval that has none
MAX_STEPS = 20_000
TOLERANCE = 1e-7  # share of the likelihood's slope left at the solution; a curve is printed to three digits
MIN_PER_DATE = 200  # our own days are pooled until a date has as many visits: shares of a handful swing the curve
DAY_MS = 86_400_000
DAYS_PER_YEAR = 365.25


@dataclass(frozen=True, slots=True, eq=False)
class Turnbull:
    """Probability mass of deaths in disjoint intervals (left, right], ascending: int64, int64 and float64 (interval,).

    The mass within an interval can lie anywhere in it. The last right end is NEVER where clips are still there.
    """

    left: np.ndarray
    right: np.ndarray
    mass: np.ndarray

    def alive(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and highest share alive after each time that the data allow equally well: two (time,) arrays."""
        dead_for_sure = (self.right[None, :] <= times[:, None]) @ self.mass
        dead_at_most = (self.left[None, :] < times[:, None]) @ self.mass
        return np.clip(1 - dead_at_most, 0, 1), np.clip(1 - dead_for_sure, 0, 1)


def turnbull(left: np.ndarray, right: np.ndarray, weight: np.ndarray | None = None) -> Turnbull:
    """The nonparametric maximum-likelihood estimate for deaths in (left, right] (Turnbull 1976), by EM.

    left, right: int64 (clip,), left < right, right NEVER where the clip was still there; weight: how many clips each
    row stands for. Mass lies only where a left end is followed by a right end with no other end between (Peto 1973).
    EM stops when the likelihood's slope in every interval's mass is at most the number of clips, as at the maximum
    (Gentleman and Geyer 1994), within TOLERANCE, or after MAX_STEPS. For exact and right-censored times (a death at t
    is (t - 1, t]) the estimate is Kaplan and Meier's.
    """
    lefts, rights = np.unique(left), np.unique(right)
    codes = np.searchsorted(lefts, left) * len(rights) + np.searchsorted(rights, right)
    pairs, inverse = np.unique(codes, return_inverse=True)
    counts = np.bincount(inverse, weights=weight, minlength=len(pairs)).astype(float)
    starts, ends = _innermost(lefts, rights)
    # each clip's interval covers a run of the innermost ones: from `first` up to, not including, `last`
    first = np.searchsorted(starts, lefts[pairs // len(rights)], "left")
    last = np.searchsorted(ends, rights[pairs % len(rights)], "right")
    n, mass = counts.sum(), np.full(len(starts), 1 / len(starts))
    for _ in range(MAX_STEPS):
        total = np.concatenate([[0.0], np.cumsum(mass)])
        share = counts / np.maximum(total[last] - total[first], np.finfo(float).tiny)
        slope = (
            np.cumsum(np.bincount(first, share, len(starts) + 1) - np.bincount(last, share, len(starts) + 1))[:-1] / n
        )
        mass = mass * slope
        mass /= mass.sum()
        if slope.max() <= 1 + TOLERANCE:
            break
    return Turnbull(starts, ends, mass)


def _innermost(lefts: np.ndarray, rights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The intervals that can carry mass. At equal times a right end (closed) comes before a left end (open)."""
    times = np.concatenate([rights, lefts])
    is_left = np.concatenate([np.zeros(len(rights), bool), np.ones(len(lefts), bool)])
    order = np.lexsort((is_left, times))
    times, is_left = times[order], is_left[order]
    at = np.flatnonzero(is_left[:-1] & ~is_left[1:])
    return times[at], times[at + 1]


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What one source says about the clips of a split: seen alive on a day, found missing on a day.

    alive_day, missing_day: int64 (clip,), days since 1970-01-01 (UTC), -1 for no such evidence.
    """

    source: str
    alive_day: np.ndarray
    missing_day: np.ndarray


def since_when(evidence: Sequence[Evidence]) -> dict[str, Any] | None:
    """The survival of a split's clips, or None with fewer than two dates.

    A clip was alive up to the latest date that anyone saw it, and dead by the first later date on which someone did
    not: an absence before or on the date of a sighting is no death. What a laboratory lacked for reasons of its own
    counts as an absence too, so a curve that rests on lists of others can be too low. Clips of which nothing is known
    after the first date are left out.

    Returns
        curve           [{when, alive_low, alive_high, n}] at each date; n: clips with evidence of that date. Between
                        two dates the curve lies between its neighbours
        median          when half were dead: {low, high}, high None where only the band's lower edge came so far; None
                        where neither did
        loss_per_year   {low, high}: share lost from the first date to the last, over the years between
        n_clips, n_dates, sources
    """
    if not evidence:
        return None
    alive = np.max([e.alive_day for e in evidence], axis=0)
    missing = np.full(len(alive), NEVER)
    for e in evidence:
        later = e.missing_day > alive
        missing[later] = np.minimum(missing[later], e.missing_day[later])
    dates, n = _dates([x for e in evidence for x in (e.alive_day, e.missing_day)])
    if len(dates) < 2:
        return None
    known = (alive > dates[0]) | (missing != NEVER)
    if not known.any():
        return None
    # a clip that nobody saw alive died at some time before it was missed
    curve = turnbull(np.where(alive >= 0, alive, dates[0] - 1)[known], missing[known])
    low, high = curve.alive(dates)
    years = float(dates[-1] - dates[0]) / DAYS_PER_YEAR
    return {
        "curve": [
            {"when": iso(d), "alive_low": a, "alive_high": b, "n": k}
            for d, a, b, k in zip(dates.tolist(), low.tolist(), high.tolist(), n.tolist(), strict=True)
        ],
        "median": _median(dates, low, high),
        "loss_per_year": {"low": float(1 - high[-1]) / years, "high": float(1 - low[-1]) / years},
        "n_clips": int(known.sum()),
        "n_dates": len(dates),
        "sources": list(dict.fromkeys(e.source for e in evidence)),
    }


def _dates(days: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct days, and for how many clips each is in at least one of the arrays (clip,); -1 is no day."""
    found = []
    for i, own in enumerate(days):
        is_new = own >= 0
        for earlier in days[:i]:
            is_new &= own != earlier
        found.append(own[is_new])
    return np.unique(np.concatenate(found), return_counts=True)


def _median(dates: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, str | None] | None:
    if low.min() > 0.5:
        return None
    last = iso(int(dates[np.argmax(high <= 0.5)])) if high.min() <= 0.5 else None
    return {"low": iso(int(dates[np.argmax(low <= 0.5)])), "high": last}


def pooled(
    alive_ms: np.ndarray, missing_ms: np.ndarray, min_per_date: int = MIN_PER_DATE
) -> tuple[np.ndarray, np.ndarray]:
    """Times in milliseconds since 1970 (NaN: none) as days, neighbouring days pooled to `min_per_date` visits.

    Pooled visits carry the last of their days; a small rest joins the date before it. -1 where there is no time.
    """
    days = [np.where(np.isnan(ms), -1, np.nan_to_num(ms) // DAY_MS).astype(np.int64) for ms in (alive_ms, missing_ms)]
    distinct, counts = np.unique(np.concatenate(days), return_counts=True)
    counts, distinct = counts[distinct >= 0], distinct[distinct >= 0]
    if not len(distinct):
        return days[0], days[1]
    closes = [i for i, _ in _pools(counts, min_per_date)]
    ends = distinct[closes] if closes else distinct[-1:]
    ends[-1] = distinct[-1]
    alive, missing = (np.where(d >= 0, ends[np.minimum(np.searchsorted(ends, d), len(ends) - 1)], -1) for d in days)
    return alive, missing


def _pools(counts: np.ndarray, at_least: int) -> Iterable[tuple[int, int]]:
    """(index of the last day, visits) of each pool that is full."""
    total = 0
    for i, n in enumerate(counts.tolist()):
        total += n
        if total >= at_least:
            yield i, total
            total = 0


def day(when: str) -> int:
    """The last day of an ISO date `YYYY`, `YYYY-MM` or `YYYY-MM-DD`, as days since 1970-01-01.

    One day for sightings and absences alike: with the first day for the ones and the last for the others, all clips
    could have died between them, and the most likely curve would say so. Raises ValueError for what is no date.
    """
    year, month, number = [int(x) for x in when.split("-")] + [0] * (2 - when.count("-"))
    month = month or 12
    return dt.date(year, month, number or calendar.monthrange(year, month)[1]).toordinal() - _EPOCH


def iso(days: int) -> str:
    """Days since 1970-01-01 as an ISO date."""
    return dt.date.fromordinal(days + _EPOCH).isoformat()


_EPOCH = dt.date(1970, 1, 1).toordinal()
