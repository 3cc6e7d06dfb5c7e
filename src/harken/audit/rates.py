"""From a manifest and a ledger to what is left, why the rest is not, and what is not known.

Three nested rates for each dataset and split:

    platform  still on the platform for somebody: everything that is not `gone`
    access    we could fetch it: not `gone` and not `denied` to us
    usable    we hold it and it passed the checks: `ok`

Where our own troubles or a bare suspicion left a clip undecided, platform and access are intervals, never a guess:
undecided clips count as lost at the lower end and as present at the upper end. Usable is a count, so it is one number.
Clips are visited small splits first and each split in a random order, so the visited part of a split is a random sample
of those of its clips that no smaller split names: an audit of a run that was stopped states the whole split, with an
interval (see `_rate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from harken.audit import bias, survival
from harken.audit.drift import drift
from harken.audit.intervals import wilson
from harken.audit.observations import UNDATED, Observation
from harken.audit.references import PUBLISHED, official_list
from harken.audit.visits import (
    CODE,
    GROUPS,
    OK,
    STATES,
    UNDECIDED,
    UNVISITED,
    Visits,
    numpy_of,
    one_array,
    places,
    strings,
    visits,
)

UNMAPPED = "unknown.unmapped"  # the reason of messages that no rule knows
UNMAPPED_ALARM = 0.001  # share of visited clips above which the table of reasons is not to be trusted
POLICY = "usable: fetched, decoded and checked"  # what a clip in our own passports went through
LISTED = "listed by its holder"  # what one in another laboratory's went through, as far as we know
PREDICTION_DIGITS = 0.005  # a predicted rate is stated in whole percents

Report = dict[str, Any]
# (dataset, split, ids of the official list, which are present, policy) -> the passport's fields for JSON
MakePassport = Callable[[str, str, Sequence[str], np.ndarray, str], Mapping[str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The clips of one dataset's split, in the order of its official list; arrays of one length.

    rows: their rows of the manifest. state: code of STATES. reason: index into visits.reasons, -1 where there is none.
    alive_ms, missing_ms: when we saw them last and missed them first since, UTC in milliseconds since 1970, or NaN.
    stratum: the rank of the smallest split that names the clip: it is visited with that one.
    """

    dataset: str
    split: str
    rows: np.ndarray
    clip_ids: pa.Array
    keys: pa.Array
    is_youtube: bool
    state: np.ndarray
    reason: np.ndarray
    alive_ms: np.ndarray
    missing_ms: np.ndarray
    stratum: np.ndarray

    @property
    def visited(self) -> np.ndarray:
        return self.state != CODE[UNVISITED]


@dataclass(frozen=True, slots=True, eq=False)
class _Context:
    """What every split's report draws on beside its clips."""

    manifest: pa.Table
    visits: Visits
    observed: Mapping[_Part, Sequence[tuple[Observation, np.ndarray]]]
    names: Mapping[str, str]
    captions: bool
    min_positives: int
    level: float
    passport: MakePassport | None


def audit(
    manifest_table: pa.Table,
    ledger: pd.DataFrame | pa.Table,
    group: Callable[[str], str],
    *,
    observations: Sequence[Observation] | None = None,
    attempts_state: pd.DataFrame | None = None,
    names: Mapping[str, str] | None = None,
    captions: bool = True,
    min_positives: int = 50,
    target_level: float = 0.95,
    previous: pd.DataFrame | pa.Table | None = None,
    passport: MakePassport | None = None,
) -> Report:
    """The audit report: JSON-able, the same for the same inputs whatever the order of the ledger, free of timestamps.

    manifest_table: the rows of `clips.parquet`, one for each clip and dataset. ledger: clip_id, status (`ok` or
    `failed`), reason, message, one row for each clip visited. group: reason -> roll-up. observations: what other
    laboratories held. attempts_state: one row per clip as `harken.attempts.fold` returns it, which dates our own
    evidence. names: label -> display name. captions: whether to compare the words of captions. min_positives: below
    that many clips a label is rare. target_level: of all intervals. previous: the ledger of an earlier run, for
    `drift`. passport: makes passports (`harken.evaluation.passports.passport_of`).

    Returns
        n_clips, n_visited   distinct clips in all datasets
        n_unlisted           ledger rows of clips that the manifest does not list; they count nowhere else
        level, min_positives as given
        unmapped             count, share of visited clips, is_alarm, messages: [{message, count}] of unrecognised
                             failures
        drift                see `harken.audit.drift.drift`, or None without `previous`
        observations         [{who, when, source, dataset, split, n_listed, n_present, n_unlisted, agreement, passport}]
                             of the splits in the manifest: n_present of the n_listed clips of the official list are
                             on theirs, n_unlisted of their ids are not official; agreement: counts both, only_us,
                             only_them, neither over visited clips (ours: usable), or None before the first visit
        splits               for each dataset and split, in the manifest's order:
            dataset, split, n_total, n_visited
            groups           count of each of ok, gone, denied, content, ours, unknown, absent, unvisited; they add up
                             to n_total
            rates            platform, access, usable: see `_rate`; None before the first visit
            unknown_band     low, high: the shares of visited clips on the platform if all undecided clips are lost, or
                             none; n_undecided; None before the first visit
            causes           [{group, count, share}] of groups that occur, gone first, shares of visited clips
            reasons          [{reason, group, count, share}], most frequent first, shares of visited clips
            labels           [{label, name, n_listed, n, n_ok, n_left, rate, ci_low, ci_high, q_value, is_biased,
                             is_rare}] by label, over visited clips: see `harken.audit.bias.label_rows`
            n_rare_labels, n_biased_labels
            reason_by_label  see `harken.audit.bias.reason_by_label`
            words            see `harken.audit.bias.words`, or None
            sensitivity      {share_missing, low_share, high_share, text}: see `harken.audit.bias.sensitivity`, from
                             the visited part; None before the first visit
            since_when       see `harken.audit.survival.since_when`, for clips of YouTube; None with fewer than two
                             dates
            reference        {list, ours: {rate, ci_low, ci_high}, rows: [{when, n_held, rate, source, agrees}]}: what
                             others held of the same official list, and whether that rate lies in the interval of our
                             usable rate; None for a list of another size; ours and agrees None before the first visit
            passport         which clips we hold: text, dataset, split, n_present, n_total, ids_sha256,
                             official_sha256, bitmap, policy; None without `passport`
            missing          {clip_id: [...], reason: [...], group: [...]}, in the manifest's order

    Raises DataError for a ledger that lists a clip twice, holds another status, fails a clip without a reason, or rolls
    a reason up into an unknown group.
    """
    found = visits(ledger, group)
    clip_ids = strings(manifest_table, "clip_id")
    at = places(clip_ids, found.clip_ids)
    is_listed = np.zeros(len(found), dtype=bool)
    is_listed[at[at >= 0]] = True
    parts = _parts(manifest_table, clip_ids, found, at, _own_times(clip_ids, attempts_state))
    given = _Context(
        manifest_table,
        found,
        {part: _seen(observations or (), part) for part in parts},
        names or {},
        captions,
        min_positives,
        target_level,
        passport,
    )
    return {
        "n_clips": pc.count_distinct(clip_ids).as_py(),
        "n_visited": int(is_listed.sum()),
        "n_unlisted": int((~is_listed).sum()),
        "level": target_level,
        "min_positives": min_positives,
        "unmapped": _unmapped(found, is_listed),
        "drift": drift(previous, ledger, group) if previous is not None else None,
        "observations": [_observed(o, held, p, passport) for p in parts for o, held in given.observed[p]],
        "splits": [_split(part, given) for part in parts],
    }


def _parts(
    manifest: pa.Table, clip_ids: pa.Array, found: Visits, at: np.ndarray, own_ms: tuple[np.ndarray, np.ndarray]
) -> list[_Part]:
    # the last entry is for clips that were not visited: index -1
    state = np.append(found.state, np.int8(CODE[UNVISITED]))[at]
    reason = np.append(found.reason, np.int32(-1))[at]
    keys, host = strings(manifest, "key"), strings(manifest, "host")
    youtube = numpy_of(pc.equal(host, "youtube"))
    pairs = [strings(manifest, name).dictionary_encode() for name in ("dataset", "split")]
    datasets, splits = (x.dictionary.to_pylist() for x in pairs)
    code = numpy_of(pairs[0].indices).astype(np.int64) * max(len(splits), 1) + numpy_of(pairs[1].indices)
    values, first = np.unique(code, return_index=True)
    strata = _strata(code, clip_ids, [f"{datasets[v // len(splits)]}/{splits[v % len(splits)]}" for v in values])
    parts = []
    for value in values[np.argsort(first)].tolist():
        rows = np.flatnonzero(code == value)
        dataset, split = divmod(value, len(splits))
        index = pa.array(rows)
        parts.append(
            _Part(
                datasets[dataset],
                splits[split],
                rows,
                clip_ids.take(index),
                keys.take(index),
                bool(youtube[rows].all()),
                state[rows],
                reason[rows],
                own_ms[0][rows],
                own_ms[1][rows],
                strata[rows],
            )
        )
    return parts


def _strata(code: np.ndarray, clip_ids: pa.Array, names: Sequence[str]) -> np.ndarray:
    """(row,) the rank, by size and then by name, of the smallest split that names the row's clip."""
    _, splits, sizes = np.unique(code, return_inverse=True, return_counts=True)
    rank = np.empty(len(sizes), np.int64)
    rank[np.lexsort((np.array(names, dtype=object), sizes))] = np.arange(len(sizes))
    clips = numpy_of(clip_ids.dictionary_encode().indices)
    smallest = np.full(clips.max(initial=-1) + 1, len(sizes), np.int64)
    np.minimum.at(smallest, clips, rank[splits])
    return smallest[clips]


def _split(part: _Part, given: _Context) -> Report:
    counts = np.bincount(part.state, minlength=len(STATES))
    groups = {name: int(counts[CODE[name]]) for name in STATES}
    n_total, n_visited = len(part.rows), len(part.rows) - groups[UNVISITED]
    rates = _rates(part, given.level) if n_visited else None
    pairs = bias.Labels.of(given.manifest["labels"].take(pa.array(part.rows)))
    labels = bias.label_rows(pairs, part.state, given.names, given.min_positives, given.level)
    reasons = _reasons(part, given.visits, n_visited)
    of_reason = {r["reason"]: r["group"] for r in reasons}
    return {
        "dataset": part.dataset,
        "split": part.split,
        "n_total": n_total,
        "n_visited": n_visited,
        "groups": groups,
        "rates": rates,
        "unknown_band": _band(rates, groups) if rates else None,
        "causes": [
            {"group": name, "count": groups[name], "share": groups[name] / n_visited} for name in GROUPS if groups[name]
        ],
        "reasons": reasons,
        "labels": labels,
        "n_rare_labels": sum(x["is_rare"] for x in labels),
        "n_biased_labels": sum(x["is_biased"] for x in labels),
        "reason_by_label": bias.reason_by_label(
            pairs, part.state, part.reason, given.visits.reasons, of_reason, given.names
        ),
        "words": _words(part, given),
        "sensitivity": bias.sensitivity((n_visited - groups[OK]) / n_visited) if n_visited else None,
        "since_when": _since_when(part, given),
        "reference": _reference(part.dataset, n_total, rates),
        "passport": _passport(part, part.state == CODE[OK], POLICY, given.passport),
        "missing": _missing(part, given.visits),
    }


class _Seen(NamedTuple):
    """What was seen of one stratum: clips that have it at least and at most, of n visited, of n_total."""

    at_least: int
    at_most: int
    n: int
    n_total: int


def _rates(part: _Part, level: float) -> Report:
    strata = []
    for value in np.unique(part.stratum):
        states = part.state[part.stratum == value]
        counts = dict(zip(STATES, np.bincount(states, minlength=len(STATES)).tolist(), strict=True))
        strata.append((counts, len(states)))

    def rate(*groups: str, undecided: Sequence[str] = ()) -> Report:
        seen = []
        for counts, n_total in strata:
            sure = sum(counts[g] for g in groups)
            seen.append(_Seen(sure, sure + sum(counts[g] for g in undecided), n_total - counts[UNVISITED], n_total))
        return _rate(seen, level)

    return {
        "platform": rate(OK, "content", "denied", undecided=UNDECIDED),
        "access": rate(OK, "content", undecided=UNDECIDED),
        "usable": rate(OK),
    }


def _rate(strata: Sequence[_Seen], level: float) -> Report:
    """A share of the n visited clips between two counts, and what it says of all clips of the split.

    A clip that a smaller split names too is visited with that one, first, so the visited part of a split is a random
    sample of each of its strata and not of the whole; each stratum weighs as much as it has clips (Cochran 1977,
    chapter 5). rate_low and rate_high are the shares if all undecided clips are lost, or none, over the strata that
    were visited. ci_low is the lower end of Wilson's interval of rate_low and ci_high the upper end of that of
    rate_high, for a sample of n from n_total, summed over strata, of which an unvisited one may have none or all: with
    several strata the interval is wider than it need be, never narrower. Once all clips are visited they are the rates
    themselves. projected: the whole numbers of clips of the split within that interval.
    """
    n, n_total = sum(s.n for s in strata), sum(s.n_total for s in strata)
    at_least, at_most = sum(s.at_least for s in strata), sum(s.at_most for s in strata)
    visited = [s for s in strata if s.n]
    if len(visited) == 1 or n == n_total:
        rate_low, rate_high = at_least / n, at_most / n
    else:
        known = sum(s.n_total for s in visited)
        rate_low = sum(s.n_total * s.at_least / s.n for s in visited) / known
        rate_high = sum(s.n_total * s.at_most / s.n for s in visited) / known
    low = sum(s.n_total * (wilson(s.at_least, s.n, level, s.n_total)[0] if s.n else 0.0) for s in strata) / n_total
    high = sum(s.n_total * (wilson(s.at_most, s.n, level, s.n_total)[1] if s.n else 1.0) for s in strata) / n_total
    if n == n_total:
        low, high = rate_low, rate_high
    return {
        "at_least": at_least,
        "at_most": at_most,
        "n": n,
        "rate_low": rate_low,
        "rate_high": rate_high,
        "ci_low": low,
        "ci_high": high,
        "projected": {"at_least": math.ceil(low * n_total - 1e-6), "at_most": math.floor(high * n_total + 1e-6)},
    }


def _band(rates: Report, groups: Mapping[str, int]) -> Report:
    return {
        "low": rates["platform"]["rate_low"],
        "high": rates["platform"]["rate_high"],
        "n_undecided": sum(groups[name] for name in UNDECIDED),
    }


def _reasons(part: _Part, found: Visits, n_visited: int) -> list[Report]:
    counts = np.bincount(part.reason[part.reason >= 0], minlength=len(found.reasons))
    state_of = np.zeros(len(found.reasons), dtype=np.int8)
    state_of[part.reason[part.reason >= 0]] = part.state[part.reason >= 0]
    rows = [
        {"reason": reason, "group": STATES[state], "count": count, "share": count / n_visited}
        for reason, state, count in zip(found.reasons, state_of.tolist(), counts.tolist(), strict=True)
        if count
    ]
    return sorted(rows, key=lambda r: (-r["count"], r["reason"]))


def _words(part: _Part, given: _Context) -> Report | None:
    if not given.captions or "captions" not in given.manifest.column_names:
        return None
    held = part.state == CODE[OK]
    return bias.words(given.manifest["captions"].take(pa.array(part.rows)), part.visited & ~held, held)


def _since_when(part: _Part, given: _Context) -> Report | None:
    if not part.is_youtube:
        return None
    none = np.full(len(part.rows), -1, dtype=np.int64)
    evidence = []
    if part.dataset in PUBLISHED:
        listed = np.full(len(part.rows), survival.day(PUBLISHED[part.dataset]), dtype=np.int64)
        evidence.append(survival.Evidence(f"the official list, {PUBLISHED[part.dataset]}: all there", listed, none))
    for o, held in given.observed[part]:
        if o.when != UNDATED:
            when = np.full(len(part.rows), survival.day(o.when), dtype=np.int64)
            evidence.append(
                survival.Evidence(f"{o.who}, {o.when}", np.where(held, when, none), np.where(held, none, when))
            )
    if not (np.isnan(part.alive_ms).all() and np.isnan(part.missing_ms).all()):
        evidence.append(survival.Evidence("our own attempts", *survival.pooled(part.alive_ms, part.missing_ms)))
    return survival.since_when(evidence)


def _own_times(clip_ids: pa.Array, attempts: pd.DataFrame | None) -> tuple[np.ndarray, np.ndarray]:
    """When our own attempts last saw each clip and first missed it since: two float64 (clip,), NaN for never."""
    if attempts is None:
        return np.full(len(clip_ids), np.nan), np.full(len(clip_ids), np.nan)
    at = places(clip_ids, strings(attempts, "clip_id"))

    def times(name: str) -> np.ndarray:
        return np.append(attempts[name].to_numpy(dtype=np.float64, na_value=np.nan), np.nan)[at]

    # a verdict of denied or content fell after the first attempt, so the clip was there then
    refused = np.append(attempts["state"].isin(["denied", "content"]).to_numpy(dtype=bool), False)[at]
    return np.fmax(times("last_ok_ms"), np.where(refused, times("first_ms"), np.nan)), times("first_missing_ms")


def _reference(dataset: str, n_total: int, rates: Report | None) -> Report | None:
    official = official_list(dataset, n_total)
    if official is None:
        return None
    usable = rates["usable"] if rates else None
    rows = []
    for row in official.rows:
        rate = row.n_held / n_total if row.n_held is not None else row.rate or 0.0
        slack = 1e-12 if row.n_held is not None else PREDICTION_DIGITS
        agrees = usable["ci_low"] - slack <= rate <= usable["ci_high"] + slack if usable else None
        rows.append({"when": row.when, "n_held": row.n_held, "rate": rate, "source": row.source, "agrees": agrees})
    ours = {"rate": usable["rate_low"], "ci_low": usable["ci_low"], "ci_high": usable["ci_high"]} if usable else None
    return {"list": official.name, "ours": ours, "rows": rows}


def _seen(observations: Sequence[Observation], part: _Part) -> list[tuple[Observation, np.ndarray]]:
    """The observations of this split, and which of its clips each holds: bool (clip,)."""
    found = [o for o in observations if (o.dataset, o.split) == (part.dataset, part.split)]
    return [(o, o.present(part.keys)) for o in sorted(found, key=lambda o: (o.when, o.who, o.source))]


def _observed(observation: Observation, theirs: np.ndarray, part: _Part, passport: MakePassport | None) -> Report:
    ours, visited = part.state == CODE[OK], part.visited
    on_list = pc.count_distinct(part.keys.filter(pa.array(theirs))).as_py()
    agreement = {
        "both": int((ours & theirs).sum()),
        "only_us": int((ours & ~theirs).sum()),
        "only_them": int((visited & ~ours & theirs).sum()),
        "neither": int((visited & ~ours & ~theirs).sum()),
    }
    return {
        "who": observation.who,
        "when": observation.when,
        "source": observation.source,
        "dataset": part.dataset,
        "split": part.split,
        "n_listed": len(part.rows),
        "n_present": int(theirs.sum()),
        "n_unlisted": len(observation.ids) - on_list,
        "agreement": agreement if visited.any() else None,
        "passport": _passport(part, theirs, LISTED, passport),
    }


def _passport(part: _Part, present: np.ndarray, policy: str, passport: MakePassport | None) -> Report | None:
    if passport is None:
        return None
    return dict(passport(part.dataset, part.split, part.clip_ids.to_pylist(), present, policy))


def _missing(part: _Part, found: Visits) -> dict[str, list[str]]:
    rows = np.flatnonzero(part.reason >= 0)
    reasons, states = np.array(found.reasons, dtype=object), np.array(STATES, dtype=object)
    return {
        "clip_id": part.clip_ids.take(pa.array(rows)).to_pylist(),
        "reason": reasons[part.reason[rows]].tolist() if len(rows) else [],
        "group": states[part.state[rows]].tolist(),
    }


def _unmapped(found: Visits, is_listed: np.ndarray) -> Report:
    code = found.reasons.index(UNMAPPED) if UNMAPPED in found.reasons else len(found.reasons)
    rows = np.flatnonzero(is_listed & (found.reason == code))
    counts = pc.value_counts(one_array(found.messages).take(pa.array(rows))).to_pylist()
    ordered = sorted(counts, key=lambda item: (-item["counts"], item["values"]))
    share = len(rows) / max(int(is_listed.sum()), 1)
    return {
        "count": len(rows),
        "share": share,
        "is_alarm": share > UNMAPPED_ALARM,
        "messages": [{"message": item["values"], "count": item["counts"]} for item in ordered],
    }
