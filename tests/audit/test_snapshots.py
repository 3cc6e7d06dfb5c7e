"""Snapshots: what counts as newly missing, and that only a promotion reaches the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from harken.audit import snapshots
from harken.config import read_params
from harken.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
DAY_MS = 86_400_000
NOW_MS = 1_780_000_000_000


def states(**of: tuple[str, str, int | None, int | None]) -> pd.DataFrame:
    """clip -> (state, reason, last_ok_ms, first_missing_ms), as the ledger's fold gives them."""
    rows = [
        {
            "clip_id": clip,
            "state": state,
            "reason": reason,
            "last_ms": NOW_MS,
            "last_ok_ms": ok,
            "first_missing_ms": gone,
        }
        for clip, (state, reason, ok, gone) in of.items()
    ]
    frame = pd.DataFrame(rows)
    return frame.astype({"last_ms": "int64", "last_ok_ms": "Int64", "first_missing_ms": "Int64"})


def attempts(*rows: tuple[str, int, str, str]) -> pa.Table:
    names = ("clip_id", "ended_ms", "outcome", "reason")
    columns: list[tuple[Any, ...]] = list(zip(*rows, strict=True)) or [()] * 4
    kinds = (pa.string(), pa.int64(), pa.string(), pa.string())
    return pa.table({n: pa.array(c, k) for n, c, k in zip(names, columns, kinds, strict=True)})


def listed(*rows: tuple[str, str, str]) -> pa.Table:
    return pa.table({n: pa.array([r[i] for r in rows]) for i, n in enumerate(("clip_id", "dataset", "split"))})


LISTED = listed(
    ("a", "audioset", "train"), ("b", "audioset", "test"), ("b", "audiocaps", "test"), ("c", "audioset", "train")
)


def test_a_clip_that_was_there_and_is_not_is_newly_missing_in_every_split_that_lists_it(tmp_path: Path) -> None:
    before = states(a=("ok", "", NOW_MS, None), b=("ok", "", NOW_MS, None), c=("gone", "gone.private", None, NOW_MS))
    first = snapshots.take(tmp_path, NOW_MS, before, attempts(), LISTED)
    assert first.facts["compared_with"] is None
    assert first.facts["n_missing"] == 1
    assert first.lost.num_rows == 0  # c was never there as far as anybody knows

    # b is stored, so its state stays ok: that it went is what a census says
    later_ms = NOW_MS + 7 * DAY_MS
    after = states(a=("ok", "", later_ms, None), b=("ok", "", NOW_MS, later_ms), c=("ok", "", later_ms, None))
    said = attempts(("b", NOW_MS, "failed", "net.timeout"), ("b", later_ms, "failed", "gone.account_closed"))
    second = snapshots.take(tmp_path, later_ms, after, said, LISTED)
    assert second.facts["compared_with"] == first.facts["date"]
    assert second.facts["n_newly_missing"] == 1
    assert second.facts["n_back"] == 1
    expected = {"clip_id": "b", "reason": "gone.account_closed", "since_ms": later_ms}
    assert second.lost.to_pylist() == [
        {**expected, "dataset": "audiocaps", "split": "test"},
        {**expected, "dataset": "audioset", "split": "test"},
    ]
    assert snapshots.dates(tmp_path) == [first.facts["date"], second.facts["date"]]


def test_a_snapshot_of_the_same_day_replaces_itself_and_is_compared_with_an_earlier_day(tmp_path: Path) -> None:
    there, gone = states(a=("ok", "", NOW_MS, None)), states(a=("gone", "gone.private", NOW_MS, NOW_MS))
    snapshots.take(tmp_path, NOW_MS, there, attempts(), LISTED)
    for _ in range(2):
        found = snapshots.take(tmp_path, NOW_MS + DAY_MS, gone, attempts(), LISTED)
        assert found.facts["n_newly_missing"] == 1
    assert len(snapshots.dates(tmp_path)) == 2


def test_without_an_earlier_snapshot_the_ledger_says_what_was_there(tmp_path: Path) -> None:
    state = states(a=("gone", "gone.private", NOW_MS - DAY_MS, NOW_MS), c=("denied", "denied.geo", None, None))
    found = snapshots.take(tmp_path, NOW_MS, state, attempts(), LISTED)
    assert [r["clip_id"] for r in found.lost.to_pylist()] == ["a"]
    assert found.facts["n_missing"] == 2


def test_an_empty_ledger_is_no_loss(tmp_path: Path) -> None:
    state = states(a=("ok", "", NOW_MS, None)).iloc[:0]
    found = snapshots.take(tmp_path, NOW_MS, state, attempts(), LISTED)
    assert found.facts["n_asked_for"] == found.facts["n_missing"] == found.facts["n_newly_missing"] == 0


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_promotion_raises_the_round_and_nothing_else(tmp_path: Path, preset: Path) -> None:
    snapshot = snapshots.take(tmp_path, NOW_MS, states(a=("ok", "", NOW_MS, None)), attempts(), LISTED)
    params = tmp_path / "params.yaml"
    params.write_bytes(preset.read_bytes())
    before = read_params(params)
    round_ = snapshots.promote(tmp_path, snapshot.facts["date"], params)
    after = read_params(params)
    assert round_ == after["download"]["round"] == before["download"]["round"] + 1
    before["download"]["round"] = round_
    assert after == before
    changed = [
        (old, new)
        for old, new in zip(preset.read_text().splitlines(), params.read_text().splitlines(), strict=True)
        if old != new
    ]
    assert len(changed) == 1


def test_only_a_snapshot_that_is_there_is_promoted(tmp_path: Path) -> None:
    snapshot = snapshots.take(tmp_path, NOW_MS, states(a=("ok", "", NOW_MS, None)), attempts(), LISTED)
    with pytest.raises(DataError, match=f"no snapshot of 1999-01-01. There are: {snapshot.facts['date']}"):
        snapshots.promote(tmp_path, "1999-01-01", ROOT / "params.yaml")
    params = tmp_path / "params.yaml"
    params.write_text("download: {round: 1}\n")
    with pytest.raises(ConfigError, match=r"Raise download\.round by hand"):
        snapshots.promote(tmp_path, snapshot.facts["date"], params)
