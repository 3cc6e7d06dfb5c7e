"""Dated snapshots of what the ledger says of every clip, so that two weeks can be compared and a loss be noticed.

`folder/DATE/` (a day, UTC) holds `clips.parquet` (SCHEMA), `newly_missing.parquet` (LOST) and, written last,
`snapshot.json`; one of the same day replaces it. A snapshot is a record and no result: no stage reads it, so a clip
that vanishes makes nothing stale. `promote` puts what was seen into the pipeline, on purpose.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harken.config import read_params
from harken.errors import ConfigError, DataError
from harken.shards import atomic, write_json

SCHEMA: Final = pa.schema(
    [
        ("clip_id", pa.string()),
        ("state", pa.string()),
        ("reason", pa.string()),
        ("is_missing", pa.bool_()),
        ("since_ms", pa.int64()),
        ("last_ok_ms", pa.int64()),
    ]
)
"""A row for each clip that was asked for, sorted by id. `is_missing`: the platform no longer serves it to us, whether
or not its media are stored; `since_ms` the first observation of that; `last_ok_ms` when it was last seen there."""

LOST: Final = pa.schema(
    [(n, pa.string()) for n in ("clip_id", "dataset", "split", "reason")] + [("since_ms", pa.int64())]
)
"""A row for each newly missing clip and each split that lists it."""

_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d")
_ROUND: Final = re.compile(r"(?m)^(download:[^\n]*\n(?:(?:[ \t#][^\n]*)?\n)*?[ \t]+round:[ \t]*)(\d+)")


class Snapshot(NamedTuple):
    """A snapshot as it was written: its facts (those of snapshot.json) and its newly missing clips (LOST)."""

    folder: Path
    facts: dict[str, Any]
    lost: pa.Table


def take(folder: Path, now_ms: int, state: pd.DataFrame, attempts: pa.Table, listed: pa.Table) -> Snapshot:
    """Write the snapshot of now and compare it with the newest one of an earlier day.

    `state`: of each clip, as `harken.stages.download.states` folds `attempts` (clip_id, ended_ms, outcome, reason);
    `listed`: clip_id, dataset, split of the manifest. Newly missing is a clip that is missing and was there: in the
    earlier snapshot or, where that does not know it or there is none, in any attempt.
    """
    date = f"{pd.Timestamp(now_ms, unit='ms'):%Y-%m-%d}"
    earlier = [d for d in dates(folder) if d < date]
    before = read(folder, earlier[-1]) if earlier else SCHEMA.empty_table()
    clips = _clips(state, attempts)
    lost, n_back = _compared(before, clips)
    lost = lost.join(listed.select(["clip_id", "dataset", "split"]), "clip_id", join_type="inner")
    lost = (
        lost.select(LOST.names)
        .cast(LOST)
        .sort_by([("dataset", "ascending"), ("split", "ascending"), ("clip_id", "ascending")])
    )
    facts = {
        "date": date,
        "taken_ms": now_ms,
        "compared_with": earlier[-1] if earlier else None,
        "n_listed": pc.count_distinct(listed["clip_id"]).as_py(),
        "n_asked_for": clips.num_rows,
        "n_missing": pc.sum(clips["is_missing"]).as_py() or 0,
        "n_newly_missing": pc.count_distinct(lost["clip_id"]).as_py(),
        "n_back": n_back,
    }
    target = folder / date
    (target / "snapshot.json").unlink(missing_ok=True)
    for name, table in (("clips", clips), ("newly_missing", lost)):
        with atomic(target / f"{name}.parquet") as f:
            pq.write_table(table, f, compression="zstd")
    write_json(target / "snapshot.json", facts)
    return Snapshot(target, facts, lost)


def dates(folder: Path) -> list[str]:
    """The days of which there are snapshots, ascending."""
    return sorted(p.parent.name for p in folder.glob("*/snapshot.json") if _DATE.fullmatch(p.parent.name))


def read(folder: Path, date: str) -> pa.Table:
    """The clips of a snapshot. Raises DataError where there is none of that day, naming those there are."""
    if date not in dates(folder):
        known = ", ".join(dates(folder)[-8:]) or "none; the flow `audit` takes them"
        raise DataError(f"{folder}: no snapshot of {date}. There are: {known}.")
    return pq.read_table(folder / date / "clips.parquet").cast(SCHEMA)


def promote(folder: Path, date: str, params: Path) -> int:
    """Let the pipeline see what was seen until `date`: raise `download.round` in the params file, and return it.

    The next `dvc repro` asks again for what is due and exports the ledger's state, so the audit, and all that was made
    of media which come or go by that, are made again. Raises DataError for a day without a snapshot, ConfigError where
    the params file has no such line.
    """
    read(folder, date)
    before, text = read_params(params), params.read_text(encoding="utf-8")
    changed, n = _ROUND.subn(lambda m: f"{m[1]}{int(m[2]) + 1}", text, count=1)
    if not n:
        raise ConfigError(f"{params}: no line `round: N` in section `download`. Raise download.round by hand.")
    with atomic(params) as f:
        f.write(changed.encode())
    after = read_params(params)
    round_ = int(after["download"].pop("round"))
    before["download"].pop("round")
    if after != before:
        params.write_text(text, encoding="utf-8")
        raise ConfigError(f"{params}: download.round stands where it cannot be told from others. Raise it by hand.")
    facts = json.loads((folder / date / "snapshot.json").read_text())
    write_json(folder / date / "snapshot.json", {**facts, "promoted_as_round": round_})
    return round_


def _clips(state: pd.DataFrame, attempts: pa.Table) -> pa.Table:
    """The state of each clip as SCHEMA. A stored clip stays `ok`: why it is missing is what its last failure said."""
    state = state.sort_values("clip_id")
    is_missing = state["state"].isin(["gone", "denied"]) | state["first_missing_ms"].notna()
    since_ms = state["first_missing_ms"].fillna(state["last_ms"]).where(is_missing)
    silent = state["clip_id"][is_missing & (state["reason"] == "")]
    reason = state["reason"].where(state["reason"] != "", state["clip_id"].map(_last_reasons(attempts, silent)))
    columns = {
        "clip_id": state["clip_id"],
        "state": state["state"],
        "reason": reason.where(is_missing | (state["reason"] != ""), ""),
        "is_missing": is_missing,
        "since_ms": since_ms,
        "last_ok_ms": state["last_ok_ms"],
    }
    return pa.table({n: pa.array(c, SCHEMA.field(n).type, from_pandas=True) for n, c in columns.items()}, SCHEMA)


def _last_reasons(attempts: pa.Table, clip_ids: pd.Series) -> dict[str, str]:
    """The reason of the last failed attempt at each of these clips."""
    rows = attempts.filter(pc.is_in(attempts["clip_id"], pa.array(clip_ids, pa.string())))
    rows = rows.filter(pc.equal(rows["outcome"].cast(pa.string()), "failed")).sort_by("ended_ms")
    return dict(zip(rows["clip_id"].to_pylist(), rows["reason"].cast(pa.string()).to_pylist(), strict=True))


def _compared(before: pa.Table, now: pa.Table) -> tuple[pa.Table, int]:
    """The clips of `now` that are missing and were there before, and how many are there again."""

    def those(table: pa.Table, is_missing: bool) -> pa.Array:
        return table.filter(pc.equal(table["is_missing"], is_missing))["clip_id"].combine_chunks()

    missing = now.filter(now["is_missing"])
    was_there = pc.is_in(missing["clip_id"], those(before, False))
    is_new = pc.invert(pc.is_in(missing["clip_id"], before["clip_id"].combine_chunks()))
    lost = missing.filter(pc.or_(was_there, pc.and_(is_new, pc.is_valid(missing["last_ok_ms"]))))
    back = pc.is_in(those(now, False), those(before, True))
    return lost, pc.sum(back).as_py() or 0
