"""From a manifest and a ledger to what is left, why the rest is not, and what is not known.

Three nested rates for each dataset and split:

    platform  still on the platform for somebody: everything that is not `gone`
    access    we could fetch it: not `gone` and not `denied` to us
    usable    we hold it and it passed the checks: `ok`

Where our own troubles or a bare suspicion left a clip undecided, platform and access are intervals, never a guess:
undecided clips count as lost at the lower end and as present at the upper end. Usable is a count, so it is one number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import stats

from harken.audit.references import official_list
from harken.errors import DataError

OK, FAILED = "ok", "failed"
GROUPS = ("gone", "denied", "content", "ours", "unknown", "absent")
UNDECIDED = ("ours", "unknown", "absent")  # says nothing about the platform
UNVISITED = "unvisited"
UNMAPPED = "unknown.unmapped"  # the reason of messages that no rule knows
UNMAPPED_ALARM = 0.001  # share of visited clips above which the table of reasons is not to be trusted

Report = dict[str, Any]


def audit(manifest_table: pa.Table, ledger: pd.DataFrame, group: Callable[[str], str]) -> Report:
    """The audit report: JSON-able, the same for the same inputs whatever the order of the ledger, free of timestamps.

    manifest_table: the rows of `clips.parquet` (dataset, split, clip_id, labels), one for each clip and dataset.
    ledger: clip_id, status (`ok` or `failed`), reason, message, one row for each clip visited. group: reason ->
    roll-up.

    Returns
        n_clips, n_visited   distinct clips in all datasets
        n_unlisted           ledger rows of clips that the manifest does not list; they count nowhere else
        unmapped             count, share of visited clips, is_alarm, messages: [{message, count}] of unrecognised
        failures splits               for each dataset and split, in the manifest's order:
            dataset, split, n_total, n_visited
            groups           count of each of ok, gone, denied, content, ours, unknown, absent, unvisited; they add up
            to
                             n_total
            rates            platform, access, usable: see `_rate`; None before the first visit
            reasons          [{reason, group, count, share}], most frequent first, shares of visited clips
            labels           [{label, n, n_ok, rate, ci_low, ci_high, q_value}] by name, over visited clips
            reference        what others held of the same official list, or None for a list of another size
            missing          [{clip_id, reason, group}], in the manifest's order

    Raises DataError for a ledger that lists a clip twice, holds another status, fails a clip without a reason, or rolls
    a reason up into an unknown group.
    """
    visits = _visits(ledger, group)
    columns = {name: manifest_table[name].to_numpy(zero_copy_only=False) for name in ("dataset", "split", "clip_id")}
    clips = pd.DataFrame({name: values.astype(object) for name, values in columns.items()})
    clips["row"] = np.arange(len(clips))
    clips = clips.merge(visits, how="left", on="clip_id", sort=False, validate="many_to_one")
    clips["group"] = clips["group"].astype(object).where(clips["group"].notna(), UNVISITED)
    listed = visits[visits["clip_id"].isin(set(clips["clip_id"]))]
    splits = []
    for (dataset, split), part in clips.groupby(["dataset", "split"], sort=False):
        labels = manifest_table["labels"].take(pa.array(part["row"].to_numpy()))
        splits.append(_split(str(dataset), str(split), part, labels))
    return {
        "n_clips": int(clips["clip_id"].nunique()),
        "n_visited": len(listed),
        "n_unlisted": len(visits) - len(listed),
        "unmapped": _unmapped(listed),
        "splits": splits,
    }


def wilson(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion count / n (Wilson 1927), in 0 .. 1.

    Unlike the normal interval it stays in range and has a width at 0 and 1. Raises DataError unless 0 <= count <= n and
    n > 0.
    """
    if not 0 <= count <= n or n == 0:
        raise DataError(f"wilson: {count} of {n} is not a proportion.")
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    p = count / n
    centre, half = p + z2 / (2 * n), (z2 * (p * (1 - p) / n + z2 / (4 * n * n))) ** 0.5
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    return (0.0 if count == 0 else low, 1.0 if count == n else high)


def _visits(ledger: pd.DataFrame, group: Callable[[str], str]) -> pd.DataFrame:
    """The ledger with nulls made empty strings and a `group` for each clip, checked."""
    visits = ledger[["clip_id", "status", "reason", "message"]].astype(object)
    visits = visits.where(visits.notna(), "")
    twice = visits["clip_id"].duplicated()
    if twice.any():
        raise DataError(f"ledger: {visits['clip_id'][twice].iloc[0]} has several rows; a clip is visited once.")
    other = ~visits["status"].isin([OK, FAILED])
    if other.any():
        clip_id, status = visits.loc[other, ["clip_id", "status"]].iloc[0]
        raise DataError(f"ledger: {clip_id} has status {status!r}; known are {OK!r} and {FAILED!r}.")
    failed = visits["status"] == FAILED
    bare = failed & (visits["reason"] == "")
    if bare.any():
        raise DataError(f"ledger: {visits['clip_id'][bare].iloc[0]} failed without a reason.")
    of_reason = {reason: group(reason) for reason in sorted(set(visits["reason"][failed]))}
    for reason, name in of_reason.items():
        if name not in GROUPS:
            raise DataError(f"reason {reason!r} rolls up into {name!r}; known groups: {', '.join(GROUPS)}.")
    visits["group"] = visits["reason"].map(of_reason).where(failed, OK)
    return visits


def _split(dataset: str, split: str, clips: pd.DataFrame, labels: pa.ChunkedArray) -> Report:
    counts = clips["group"].value_counts()
    groups = {name: int(counts.get(name, 0)) for name in (OK, *GROUPS, UNVISITED)}
    n_total, n_visited = len(clips), len(clips) - groups[UNVISITED]
    lost = clips[~clips["group"].isin([OK, UNVISITED])]
    return {
        "dataset": dataset,
        "split": split,
        "n_total": n_total,
        "n_visited": n_visited,
        "groups": groups,
        "rates": _rates(groups, n_visited) if n_visited else None,
        "reasons": _reasons(lost, n_visited),
        "labels": _labels(clips["group"].to_numpy(), labels),
        "reference": _reference(dataset, n_total),
        "missing": lost[["clip_id", "reason", "group"]].to_dict("records"),
    }


def _rates(groups: Mapping[str, int], n: int) -> Report:
    undecided = sum(groups[name] for name in UNDECIDED)
    accessible = groups[OK] + groups["content"]
    on_platform = accessible + groups["denied"]
    return {
        "platform": _rate(on_platform, on_platform + undecided, n),
        "access": _rate(accessible, accessible + undecided, n),
        "usable": _rate(groups[OK], groups[OK], n),
    }


def _rate(at_least: int, at_most: int, n: int) -> Report:
    """A share of the n visited clips between two counts.

    rate_low and rate_high are the shares if all undecided clips are lost, or none. ci_low is the lower end of Wilson's
    95 % interval of rate_low and ci_high the upper end of that of rate_high.
    """
    return {
        "at_least": at_least,
        "at_most": at_most,
        "n": n,
        "rate_low": at_least / n,
        "rate_high": at_most / n,
        "ci_low": wilson(at_least, n)[0],
        "ci_high": wilson(at_most, n)[1],
    }


def _reasons(lost: pd.DataFrame, n_visited: int) -> list[Report]:
    counted = lost.groupby(["reason", "group"], sort=True).size().reset_index(name="count")
    counted = counted.sort_values(["count", "reason"], ascending=[False, True], kind="stable")
    return [
        {"reason": r.reason, "group": r.group, "count": int(r.count), "share": int(r.count) / n_visited}
        for r in counted.itertuples(index=False, name="Row")
    ]


def _labels(groups: np.ndarray, labels: pa.ChunkedArray) -> list[Report]:
    """Availability of each label among visited clips, with how surprising it is beside the rest of the split.

    q_value: Fisher's exact test of the label's clips against all others, adjusted for the number of labels by Benjamini
    and Hochberg (1995). Small: this label has survived better or worse than its split.
    """
    array = labels.combine_chunks()
    owner = np.repeat(np.arange(len(array)), array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
    pairs = pd.DataFrame({"row": owner, "label": array.flatten().to_numpy(zero_copy_only=False)}).drop_duplicates()
    group = groups[pairs["row"].to_numpy()]
    pairs = pairs.assign(is_ok=group == OK)[group != UNVISITED]
    if pairs.empty:
        return []
    table = pairs.groupby("label", sort=True)["is_ok"].agg(["size", "sum"])
    n_all, ok_all = int((groups != UNVISITED).sum()), int((groups == OK).sum())
    rows = [(str(label), int(n), int(ok)) for label, n, ok in table.itertuples(name=None)]
    p_values = [stats.fisher_exact([[ok, n - ok], [ok_all - ok, n_all - n - ok_all + ok]])[1] for _, n, ok in rows]
    q_values = stats.false_discovery_control(np.clip(p_values, 0, 1))
    found = []
    for (label, n, n_ok), q in zip(rows, q_values, strict=True):
        low, high = wilson(n_ok, n)
        found.append(
            {
                "label": label,
                "n": n,
                "n_ok": n_ok,
                "rate": n_ok / n,
                "ci_low": low,
                "ci_high": high,
                "q_value": float(q),
            }
        )
    return found


def _reference(dataset: str, n_total: int) -> Report | None:
    official = official_list(dataset, n_total)
    if official is None:
        return None
    rows = [
        {
            "when": row.when,
            "n_held": row.n_held,
            "rate": row.rate if row.n_held is None else row.n_held / n_total,
            "source": row.source,
        }
        for row in official.rows
    ]
    return {"list": official.name, "rows": rows}


def _unmapped(visits: pd.DataFrame) -> Report:
    messages = visits["message"][visits["reason"] == UNMAPPED].value_counts()
    count, share = int(messages.sum()), int(messages.sum()) / max(len(visits), 1)
    ordered = sorted(messages.items(), key=lambda item: (-int(item[1]), str(item[0])))
    return {
        "count": count,
        "share": share,
        "is_alarm": share > UNMAPPED_ALARM,
        "messages": [{"message": str(message), "count": int(n)} for message, n in ordered],
    }
