"""Every clip is counted once, undecided clips widen a rate instead of moving it, and only facts decide the report."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from harken.audit.rates import GROUPS, UNMAPPED, audit, wilson
from harken.audit.references import OFFICIAL
from harken.clips import Clip, Manifest, Source, Split
from harken.errors import ConfigError, DataError, unknown
from harken.media import reasons

GROUP_OF = {
    "gone.private": "gone",
    "denied.geo": "denied",
    "qc.silent": "content",
    "net.timeout": "ours",
    "gone.unspecified": "unknown",
    "unknown.unmapped": "unknown",
    "folder.absent": "absent",
}


def group(code: str) -> str:
    if code not in GROUP_OF:
        raise unknown("reason", code, GROUP_OF)
    return GROUP_OF[code]


def manifest(*clips: tuple[str, str, str, tuple[str, ...]]) -> pa.Table:
    rows = [Clip(i, d, Split(s), Source("youtube", i), 0.0, 10.0, labels=labels) for i, d, s, labels in clips]
    return Manifest.build(rows, n_shards=4).table


def ledger(**reasons: str) -> pd.DataFrame:
    rows = [(i, "failed" if r else "ok", r, f"message of {i}" if r else "") for i, r in reasons.items()]
    return pd.DataFrame(rows, columns=["clip_id", "status", "reason", "message"])


TEN = manifest(*((f"c{i}", "audioset", "test", ()) for i in range(10)))
OUTCOMES = ledger(
    c0="",
    c1="",
    c2="",
    c3="",
    c4="gone.private",
    c5="denied.geo",
    c6="qc.silent",
    c7="net.timeout",
    c8="gone.unspecified",
)


def one(report: dict[str, Any]) -> dict[str, Any]:
    (split,) = report["splits"]
    return split


def test_every_clip_is_in_one_group() -> None:
    split = one(audit(TEN, OUTCOMES, group))
    assert split["groups"] == {
        "ok": 4,
        "gone": 1,
        "denied": 1,
        "content": 1,
        "ours": 1,
        "unknown": 1,
        "absent": 0,
        "unvisited": 1,
    }
    assert (split["n_total"], split["n_visited"]) == (10, 9)
    assert sum(split["groups"].values()) == split["n_total"]


def test_rates_are_nested_and_undecided_clips_widen_them() -> None:
    rates = one(audit(TEN, OUTCOMES, group))["rates"]
    assert [(r["at_least"], r["at_most"]) for r in rates.values()] == [(6, 8), (5, 7), (4, 4)]
    assert rates["platform"]["rate_high"] == pytest.approx(1 - 1 / 9)  # all but what is gone
    assert rates["platform"]["ci_low"] == wilson(6, 9)[0]
    assert rates["platform"]["ci_high"] == wilson(8, 9)[1]
    for end in ("rate_low", "rate_high", "ci_low", "ci_high"):
        assert rates["platform"][end] >= rates["access"][end] >= rates["usable"][end]


def test_a_folder_says_nothing_about_the_platform() -> None:
    rates = one(audit(TEN, ledger(c0="", c1="folder.absent"), group))["rates"]
    assert (rates["platform"]["rate_low"], rates["platform"]["rate_high"]) == (0.5, 1.0)


def test_wilson_against_published_values() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, Table I, method 3
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


@pytest.mark.parametrize(("count", "n"), [(1, 0), (0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(count: int, n: int) -> None:
    with pytest.raises(DataError, match="not a proportion"):
        wilson(count, n)


def test_nothing_visited_has_no_rate() -> None:
    split = one(audit(TEN, ledger(), group))
    assert split["rates"] is None
    assert split["labels"] == []
    assert split["groups"]["unvisited"] == 10


def test_reasons_are_counted_by_how_often() -> None:
    outcomes = ledger(c0="", c1="qc.silent", c2="gone.private", c3="gone.private", c4="denied.geo")
    assert one(audit(TEN, outcomes, group))["reasons"] == [
        {"reason": "gone.private", "group": "gone", "count": 2, "share": 0.4},
        {"reason": "denied.geo", "group": "denied", "count": 1, "share": 0.2},
        {"reason": "qc.silent", "group": "content", "count": 1, "share": 0.2},
    ]


def test_missing_clips_are_listed_in_the_order_of_the_official_list() -> None:
    shuffled = OUTCOMES.sample(frac=1, random_state=1)
    missing = one(audit(TEN, shuffled, group))["missing"]
    assert [m["clip_id"] for m in missing] == ["c4", "c5", "c6", "c7", "c8"]
    assert missing[0] == {"clip_id": "c4", "reason": "gone.private", "group": "gone"}


def test_a_clip_of_two_datasets_counts_in_both_and_once_in_all() -> None:
    table = manifest(
        ("a", "audioset", "train", ("Dog",)),
        ("b", "audioset", "train", ("Cat",)),
        ("a", "audiocaps", "test", ()),
    )
    report = audit(table, ledger(a="gone.private", b=""), group)
    assert [(s["dataset"], s["split"], s["groups"]["gone"]) for s in report["splits"]] == [
        ("audioset", "train", 1),
        ("audiocaps", "test", 1),
    ]
    assert (report["n_clips"], report["n_visited"], report["n_unlisted"]) == (2, 2, 0)


def test_clips_that_are_not_listed_are_counted_apart() -> None:
    report = audit(TEN, ledger(c0="", stray="gone.private"), group)
    assert (report["n_visited"], report["n_unlisted"]) == (1, 1)
    assert one(report)["groups"]["gone"] == 0


def test_messages_that_no_rule_knows_raise_an_alarm() -> None:
    quiet = audit(TEN, OUTCOMES, group)["unmapped"]
    assert quiet == {"count": 0, "share": 0.0, "is_alarm": False, "messages": []}
    outcomes = ledger(c0="", c1="unknown.unmapped", c2="unknown.unmapped", c3="unknown.unmapped")
    outcomes.loc[1:2, "message"] = "new wording"
    loud = audit(TEN, outcomes, group)["unmapped"]
    assert loud["is_alarm"]
    assert loud["share"] == 0.75
    assert loud["messages"] == [{"message": "new wording", "count": 2}, {"message": "message of c3", "count": 1}]


def test_availability_of_each_label() -> None:
    table = manifest(
        *((f"m{i}", "audioset", "test", ("Music", "Music")) for i in range(30)),
        *((f"d{i}", "audioset", "test", ("Dog", "Music") if i == 0 else ("Dog",)) for i in range(30)),
        ("unvisited", "audioset", "test", ("Dog", "Rare")),
    )
    outcomes = ledger(
        **{f"m{i}": "gone.private" if i < 20 else "" for i in range(30)}, **{f"d{i}": "" for i in range(30)}
    )
    dog, music = one(audit(table, outcomes, group))["labels"]
    assert (dog["label"], dog["n"], dog["n_ok"]) == ("Dog", 30, 30)
    assert (music["label"], music["n"], music["n_ok"]) == ("Music", 31, 11)
    assert (music["ci_low"], music["ci_high"]) == wilson(11, 31)
    assert music["q_value"] < 0.001


def test_label_tests_find_nothing_where_nothing_is() -> None:
    rng = np.random.default_rng(0)
    table = manifest(*((f"c{i}", "audioset", "test", (f"L{i % 40}",)) for i in range(2000)))
    outcomes = ledger(**{f"c{i}": "gone.private" if rng.random() < 0.2 else "" for i in range(2000)})
    assert min(x["q_value"] for x in one(audit(table, outcomes, group))["labels"]) > 0.05


def test_report_is_json_and_does_not_depend_on_the_order_of_the_ledger() -> None:
    report = audit(TEN, OUTCOMES, group)
    assert json.loads(json.dumps(report)) == report
    again = audit(TEN, OUTCOMES.iloc[::-1].reset_index(drop=True), group)
    assert json.dumps(again) == json.dumps(report)


def test_nulls_of_the_ledger_are_empty() -> None:
    outcomes = ledger(c0="")
    outcomes["reason"], outcomes["message"] = None, np.nan
    assert one(audit(TEN, outcomes, group))["groups"]["ok"] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: pd.concat([x, x.tail(1)]), "c8 has several rows"),
        (lambda x: x.assign(status="lost"), "status 'lost'"),
        (lambda x: x.assign(status="failed", reason=""), "failed without a reason"),
    ],
)
def test_a_ledger_that_does_not_add_up_is_refused(change, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=says):
        audit(TEN, change(OUTCOMES), group)


def test_unknown_reasons_and_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'gone\.privat'"):
        audit(TEN, ledger(c0="gone.privat"), group)
    with pytest.raises(DataError, match="known groups: gone"):
        audit(TEN, ledger(c0="gone.private"), lambda code: "vanished")


def test_references_belong_to_lists_of_official_size_only() -> None:
    official = manifest(*((f"c{i}", "audiocaps", "test", ()) for i in range(975)))
    reference = one(audit(official, ledger(), group))["reference"]
    assert reference["list"] == "test"
    assert [round(100 * r["rate"], 1) for r in reference["rows"]] == [93.6, 98.2, 86.7]
    assert one(audit(TEN, ledger(), group))["reference"] is None
    clotho = manifest(*((f"c{i}", "clotho", "test", ()) for i in range(975)))
    assert one(audit(clotho, ledger(), group))["reference"] is None


def test_the_real_reasons_roll_up_into_known_groups() -> None:
    assert {reasons.group(code) for code in reasons.REASONS} <= set(GROUPS)
    assert reasons.classify("words that no rule knows").code == UNMAPPED
    outcomes = ledger(**{f"c{i}": code for i, code in enumerate(sorted(reasons.REASONS)[:10])})
    assert sum(one(audit(TEN, outcomes, reasons.group))["groups"].values()) == 10


def test_references_are_possible_and_sizes_unique() -> None:
    assert len({(x.dataset, x.n_total) for x in OFFICIAL}) == len(OFFICIAL)
    for official in OFFICIAL:
        for row in official.rows:
            assert (row.n_held is None) != (row.rate is None)
            assert 0 < (row.n_held or 1) <= official.n_total
    assert set(GROUP_OF.values()) == set(GROUPS)
