"""The ledger as columns: what each visited clip came to, as small integers, so that two million rows stay small.

Every clip is in one state: `ok`, the group that its reason rolls up into, or `unvisited`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from harken.errors import DataError

OK, FAILED = "ok", "failed"
GROUPS = ("gone", "denied", "content", "ours", "unknown", "absent")
UNDECIDED = ("ours", "unknown", "absent")  # says nothing about the platform
UNVISITED = "unvisited"
STATES = (OK, *GROUPS, UNVISITED)  # a state's place here is its code
CODE = {name: code for code, name in enumerate(STATES)}


@dataclass(frozen=True, slots=True, eq=False)
class Visits:
    """One entry per visited clip, in the ledger's order; arrays of one length.

    state: code of STATES, int8 (clip,). reason: index into `reasons`, -1 where ok, int32 (clip,).
    """

    clip_ids: pa.Array
    state: np.ndarray
    reason: np.ndarray
    reasons: tuple[str, ...]
    messages: pa.Array

    def __len__(self) -> int:
        return len(self.clip_ids)


def visits(ledger: pd.DataFrame | pa.Table, group: Callable[[str], str]) -> Visits:
    """The visits of a ledger (clip_id, status, reason, message; nulls are empty), checked.

    Raises DataError for a ledger that lists a clip twice, holds another status than `ok` and `failed`, fails a clip
    without a reason, or rolls a reason up into an unknown group.
    """
    clip_ids, status, reason, message = (strings(ledger, name) for name in ("clip_id", "status", "reason", "message"))
    if pc.count_distinct(clip_ids).as_py() != len(clip_ids):
        counts = pc.value_counts(clip_ids)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
        raise DataError(f"ledger: {twice} has several rows; a clip is visited once.")
    other = pc.invert(pc.is_in(status, pa.array([OK, FAILED])))
    if pc.any(other).as_py():
        at = pc.index(other, True).as_py()
        raise DataError(f"ledger: {clip_ids[at]} has status {str(status[at])!r}; known are {OK!r} and {FAILED!r}.")
    failed = numpy_of(pc.equal(status, FAILED))
    bare = failed & numpy_of(pc.equal(reason, ""))
    if bare.any():
        raise DataError(f"ledger: {clip_ids[int(bare.argmax())]} failed without a reason.")
    coded = reason.dictionary_encode()
    names = tuple(coded.dictionary.to_pylist())
    codes = np.where(failed, numpy_of(coded.indices), -1).astype(np.int32)
    used = set(np.unique(codes).tolist())
    of_reason = {i: group(name) for i, name in sorted(enumerate(names), key=lambda item: item[1]) if i in used}
    for i, name in of_reason.items():
        if name not in GROUPS:
            raise DataError(f"reason {names[i]!r} rolls up into {name!r}; known groups: {', '.join(GROUPS)}.")
    states = np.array([CODE[of_reason.get(i, OK)] for i in range(len(names))] + [CODE[OK]], dtype=np.int8)
    return Visits(clip_ids, states[codes], codes, names, message)


def strings(table: pd.DataFrame | pa.Table, name: str) -> pa.Array:
    """A column as one Arrow array of strings, nulls made empty. Raises DataError where the table has no such column."""
    names = table.column_names if isinstance(table, pa.Table) else list(table.columns)
    if name not in names:
        raise DataError(f"a table has no column {name!r}, only {', '.join(map(str, names))}.")
    values = table[name]
    if not isinstance(table, pa.Table):
        values = pa.array(values, type=pa.string(), from_pandas=True)
    return one_array(pc.fill_null(values.cast(pa.string()), ""))


def one_array(values: Any) -> pa.Array:
    """An Arrow column without chunks."""
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def numpy_of(values: Any) -> np.ndarray:
    """An Arrow column without nulls as a NumPy array."""
    return np.asarray(values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy())


def places(of: pa.Array, among: pa.Array) -> np.ndarray:
    """Where each string of `of` stands in `among` (whose entries are unique), -1 where it does not: int64 (of,)."""
    return np.asarray(numpy_of(pc.fill_null(pc.index_in(of, value_set=among), -1)), dtype=np.int64)
