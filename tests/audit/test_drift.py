"""What changed between two runs, clip by clip, and whether it could be chance."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harken.audit.drift import drift
from harken.errors import DataError

GROUP = {
    "gone.private": "gone",
    "gone.removed": "gone",
    "denied.geo": "denied",
    "qc.silent": "content",
    "net.timeout": "ours",
    "gone.unspecified": "unknown",
    "folder.absent": "absent",
}


def ledger(reasons: dict[str, str]) -> pd.DataFrame:
    rows = [(i, "failed" if r else "ok", r, "") for i, r in reasons.items()]
    return pd.DataFrame(rows, columns=["clip_id", "status", "reason", "message"])


BEFORE = {"a": "", "b": "", "c": "gone.private", "d": "denied.geo", "e": "", "f": "net.timeout", "g": "", "only": ""}
AFTER = {"g": "", "a": "", "b": "gone.private", "c": "", "d": "gone.removed", "e": "net.timeout", "f": "", "new": ""}


def test_every_change_is_told() -> None:
    found = drift(ledger(BEFORE), ledger(AFTER), GROUP.__getitem__)
    assert found["n_both"] == 7
    assert found["newly_missing"] == [{"clip_id": "b", "reason": "gone.private"}]
    assert found["resurrected"] == [{"clip_id": "c", "reason": "gone.private"}]
    assert found["reason_changed"] == [{"clip_id": "d", "before": "denied.geo", "after": "gone.removed"}]
    assert found["n_undecided"] == 2  # e and f: our own trouble is no evidence
    assert found["mcnemar_p"] == 1.0
    assert found["states"] == ["ok", "gone", "denied", "content", "ours", "unknown", "absent"]
    transitions = found["transitions"]
    assert transitions[0] == [2, 1, 0, 0, 1, 0, 0]
    assert (transitions[1][0], transitions[2][1], transitions[4][0]) == (1, 1, 1)
    assert json.loads(json.dumps(found)) == found


def test_mcnemar_is_the_exact_binomial() -> None:
    before = {f"c{i}": "" for i in range(20)} | {"z": "gone.private"}
    after = {f"c{i}": "gone.private" if i < 9 else "" for i in range(20)} | {"z": ""}
    found = drift(ledger(before), ledger(after), GROUP.__getitem__)
    assert found["mcnemar_p"] == pytest.approx(stats.binomtest(9, 10, 0.5).pvalue)
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 10) / 2**10)


def test_nothing_in_common() -> None:
    found = drift(ledger({"a": ""}), ledger({"b": "gone.private"}), GROUP.__getitem__)
    assert (found["n_both"], found["mcnemar_p"], found["newly_missing"]) == (0, 1.0, [])


def test_a_ledger_that_does_not_add_up_is_refused() -> None:
    twice = pd.concat([ledger({"a": ""}), ledger({"a": ""})])
    with pytest.raises(DataError, match="a has several rows"):
        drift(twice, ledger({"a": ""}), GROUP.__getitem__)


outcomes = st.dictionaries(st.sampled_from("abcdefghij"), st.sampled_from(["", *GROUP]))


@given(outcomes, outcomes)
def test_the_way_back_mirrors_the_way_there(before: dict[str, str], after: dict[str, str]) -> None:
    there = drift(ledger(before), ledger(after), GROUP.__getitem__)
    back = drift(ledger(after), ledger(before), GROUP.__getitem__)
    assert there["newly_missing"] == back["resurrected"]
    assert there["n_undecided"] == back["n_undecided"]
    assert there["transitions"] == [list(column) for column in zip(*back["transitions"], strict=True)]
    assert sum(map(sum, there["transitions"])) == there["n_both"] == len(before.keys() & after.keys())
    changed = sum(before[i] != after[i] for i in before.keys() & after.keys())
    told = sum(len(there[k]) for k in ("newly_missing", "resurrected", "reason_changed")) + there["n_undecided"]
    assert told == changed
