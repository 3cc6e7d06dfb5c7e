"""What changed between two runs over the same lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import stats

from harken.audit.visits import CODE, GROUPS, OK, UNDECIDED, Visits, places, visits


def drift(
    before: pd.DataFrame | pa.Table, after: pd.DataFrame | pa.Table, group: Callable[[str], str]
) -> dict[str, Any]:
    """How the clips visited in both of two runs changed. Ledgers as in `harken.audit.rates.audit`.

    Returns
        n_both            clips visited in both runs
        states            ok, gone, denied, content, ours, unknown, absent
        transitions       counts, rows: state before, columns: state after
        newly_missing     [{clip_id, reason}] ok before, now gone, denied or unusable
        resurrected       [{clip_id, reason}] the reverse; `reason` is the former one
        reason_changed    [{clip_id, before, after}] missing both times, for different reasons
        n_undecided       ok in one run, and in the other a failure that says nothing about the clip (our own trouble,
                          a suspicion, a folder without it); these are neither newly missing nor resurrected
        mcnemar_p         McNemar's exact test (two-sided binomial) that newly missing and resurrected are equally
                          likely; 1.0 where there are none of either

    Lists are in the order of ids. Raises DataError for ledgers that do not add up.
    """
    old, new = visits(before, group), visits(after, group)
    at = places(old.clip_ids, new.clip_ids)
    rows = np.flatnonzero(at >= 0)
    was, now = old.state[rows], new.state[at[rows]]
    n_states = 1 + len(GROUPS)
    matrix = np.bincount(was.astype(np.int64) * n_states + now, minlength=n_states * n_states)
    sure = np.array([name not in UNDECIDED for name in (OK, *GROUPS)])
    lost = (was == CODE[OK]) & (now != CODE[OK]) & sure[now]
    found = (was != CODE[OK]) & (now == CODE[OK]) & sure[was]
    undecided = ((was == CODE[OK]) != (now == CODE[OK])) & ~lost & ~found
    reasons_before, reasons_after = _reasons(old, rows), _reasons(new, at[rows])
    changed = (was != CODE[OK]) & (now != CODE[OK]) & (reasons_before != reasons_after)
    ids = np.asarray(old.clip_ids.take(pa.array(rows)).to_pylist(), dtype=object)

    def listed(mask: np.ndarray, **columns: np.ndarray) -> list[dict[str, str]]:
        picked = sorted(zip(ids[mask], *(values[mask] for values in columns.values()), strict=True))
        return [dict(zip(("clip_id", *columns), row, strict=True)) for row in picked]

    n_lost, n_found = int(lost.sum()), int(found.sum())
    return {
        "n_both": len(rows),
        "states": [OK, *GROUPS],
        "transitions": matrix.reshape(n_states, n_states).tolist(),
        "newly_missing": listed(lost, reason=reasons_after),
        "resurrected": listed(found, reason=reasons_before),
        "reason_changed": listed(changed, before=reasons_before, after=reasons_after),
        "n_undecided": int(undecided.sum()),
        "mcnemar_p": float(stats.binomtest(n_lost, n_lost + n_found).pvalue) if n_lost + n_found else 1.0,
    }


def _reasons(of: Visits, rows: np.ndarray) -> np.ndarray:
    """The reason of each of these rows as a string, empty where ok."""
    return np.array([*of.reasons, ""], dtype=object)[of.reason[rows]]
