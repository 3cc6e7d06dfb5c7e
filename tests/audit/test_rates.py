"""Every clip is counted once, undecided clips widen a rate instead of moving it, and only facts decide the report."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from harken.audit.intervals import wilson
from harken.audit.observations import Observation
from harken.audit.rates import UNMAPPED, audit
from harken.audit.references import OFFICIAL, PUBLISHED
from harken.audit.visits import GROUPS, UNDECIDED
from harken.clips import Clip, Manifest, Source, Split
from harken.errors import ConfigError, DataError, unknown
from harken.evaluation.passports import from_report, passport_of
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
    assert rates["platform"]["ci_low"] == wilson(6, 9, population=10)[0] == 0.6
    assert rates["platform"]["ci_high"] == wilson(8, 9, population=10)[1] == 0.9
    assert rates["platform"]["projected"] == {"at_least": 6, "at_most": 9}
    for end in ("rate_low", "rate_high", "ci_low", "ci_high"):
        assert rates["platform"][end] >= rates["access"][end] >= rates["usable"][end]


def test_a_folder_says_nothing_about_the_platform() -> None:
    rates = one(audit(TEN, ledger(c0="", c1="folder.absent"), group))["rates"]
    assert (rates["platform"]["rate_low"], rates["platform"]["rate_high"]) == (0.5, 1.0)


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
    assert missing == {
        "clip_id": ["c4", "c5", "c6", "c7", "c8"],
        "reason": ["gone.private", "denied.geo", "qc.silent", "net.timeout", "gone.unspecified"],
        "group": ["gone", "denied", "content", "ours", "unknown"],
    }


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


PLAN = {  # 25 reasons and how many of 2,000 clips each takes; 1,571 are usable
    "gone.account_terminated": 91,
    "gone.account_closed": 17,
    "gone.removed_uploader": 60,
    "gone.removed_policy": 9,
    "gone.copyright_claim": 33,
    "gone.copyright_blocked": 8,
    "gone.private": 97,
    "gone.unspecified": 12,
    "denied.copyright_country": 5,
    "denied.geo": 21,
    "denied.age": 14,
    "denied.members": 3,
    "denied.paid": 2,
    "denied.login": 4,
    "denied.drm": 1,
    "live.processing": 1,
    "net.timeout": 7,
    "net.5xx": 6,
    "media.403": 5,
    "media.truncated": 4,
    "qc.past_end": 11,
    "qc.short": 3,
    "qc.silent": 8,
    "session.rate_limited": 5,
    "tool.no_format": 2,
}
N_PLANNED = 2000


def planned(seed: int) -> tuple[pa.Table, pd.DataFrame]:
    """A manifest of 2,000 clips and what becomes of each, in a random order."""
    fates = [reason for reason, n in PLAN.items() for _ in range(n)]
    fates += [""] * (N_PLANNED - len(fates))
    rng = np.random.default_rng(seed)
    rng.shuffle(fates)
    names = [f"v{i:04d}" for i in range(N_PLANNED)]
    table = manifest(*((i, "audiocaps", "test", ()) for i in names))
    return table, ledger(**dict(zip(names, fates, strict=True)))


def test_the_audit_equals_the_plan() -> None:
    assert len(PLAN) == 25
    table, outcomes = planned(1)
    split = one(audit(table, outcomes, reasons.group))
    assert {r["reason"]: r["count"] for r in split["reasons"]} == PLAN
    expected = dict.fromkeys(GROUPS, 0)
    for reason, n in PLAN.items():
        expected[reasons.group(reason)] += n
    n_ok = N_PLANNED - sum(PLAN.values())
    assert split["groups"] == {"ok": n_ok, **expected, "unvisited": 0}
    assert {c["group"]: c["count"] for c in split["causes"]} == {g: n for g, n in expected.items() if n}
    undecided = sum(expected[g] for g in UNDECIDED)
    surely_gone = expected["gone"]
    platform = split["rates"]["platform"]
    assert (platform["at_least"], platform["at_most"]) == (N_PLANNED - surely_gone - undecided, N_PLANNED - surely_gone)
    assert split["unknown_band"] == {
        "low": platform["at_least"] / N_PLANNED,
        "high": platform["at_most"] / N_PLANNED,
        "n_undecided": undecided,
    }
    for rate in split["rates"].values():  # all visited: nothing is left to chance
        assert (rate["ci_low"], rate["ci_high"]) == (rate["rate_low"], rate["rate_high"])
        assert rate["projected"] == {"at_least": rate["at_least"], "at_most": rate["at_most"]}
    assert split["rates"]["usable"]["at_least"] == n_ok
    told = dict(zip(split["missing"]["clip_id"], split["missing"]["reason"], strict=True))
    lost = outcomes[outcomes["status"] == "failed"]
    assert told == dict(zip(lost["clip_id"], lost["reason"], strict=True))
    assert split["sensitivity"]["share_missing"] == pytest.approx(1 - n_ok / N_PLANNED)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_intervals_of_a_stopped_run_cover_the_truth(share: float) -> None:
    table, outcomes = planned(2)
    truth = one(audit(table, outcomes, reasons.group))["rates"]
    rng, n = np.random.default_rng(int(1000 * share)), round(share * N_PLANNED)
    covered = dict.fromkeys(truth, 0)
    for _ in range(300):
        visited = outcomes.iloc[rng.permutation(N_PLANNED)[:n]]
        rates = one(audit(table, visited, reasons.group, captions=False))["rates"]
        for name, rate in rates.items():
            covers = rate["ci_low"] <= truth[name]["rate_low"] and truth[name]["rate_high"] <= rate["ci_high"]
            counted = rate["projected"]["at_least"] <= truth[name]["at_least"]
            assert not covers or (counted and truth[name]["at_most"] <= rate["projected"]["at_most"])
            covered[name] += covers
    assert min(covered.values()) >= 0.93 * 300


def test_the_level_is_that_of_all_intervals() -> None:
    wide = one(audit(TEN, ledger(c0="", c1="gone.private"), group, target_level=0.99))
    narrow = one(audit(TEN, ledger(c0="", c1="gone.private"), group, target_level=0.5))
    assert wide["rates"]["usable"]["ci_low"] == wilson(1, 2, 0.99, 10)[0] < narrow["rates"]["usable"]["ci_low"]


def test_ours_beside_what_others_held() -> None:
    table = manifest(*((f"c{i}", "audiocaps", "test", ()) for i in range(975)))
    part = ledger(**{f"c{i}": "gone.private" if i % 8 == 0 else "" for i in range(300)})
    reference = one(audit(table, part, group))["reference"]
    usable = one(audit(table, part, group))["rates"]["usable"]
    assert reference["ours"] == {k: usable[k] for k in ("ci_low", "ci_high")} | {"rate": usable["rate_low"]}
    assert [r["agrees"] for r in reference["rows"]] == [False, False, True]  # 93.6 and 98.2 %; 86.7 % is near ours
    whole = one(audit(table, ledger(**{f"c{i}": "" if i < 845 else "gone.private" for i in range(975)}), group))
    assert [r["agrees"] for r in whole["reference"]["rows"]] == [False, False, True]
    empty = one(audit(table, ledger(), group))["reference"]
    assert empty["ours"] is None
    assert {r["agrees"] for r in empty["rows"]} == {None}


def test_names_and_classes_with_few_positives() -> None:
    table = manifest(*((f"c{i}", "audioset", "test", ("/m/a",) if i < 8 else ("/m/b",)) for i in range(20)))
    outcomes = ledger(**{f"c{i}": "gone.private" if i % 4 == 0 else "" for i in range(20)})
    split = one(audit(table, outcomes, group, names={"/m/a": "Bark"}, min_positives=7))
    assert [(x["label"], x["name"], x["n_listed"], x["n_left"], x["is_rare"]) for x in split["labels"]] == [
        ("/m/a", "Bark", 8, 6, True),
        ("/m/b", "/m/b", 12, 9, False),
    ]
    assert (split["n_rare_labels"], split["n_biased_labels"]) == (1, 0)


def observed_table() -> pa.Table:
    return manifest(*((f"{i:011d}", "audiocaps", "test", ()) for i in range(8)))


SEEN = Observation.of("A lab", "2022-06", "its list", "audiocaps", "test", [f"{i:011d}" for i in (0, 1, 2, 3, 4, 99)])


def test_what_others_held_is_set_beside_ours() -> None:
    outcomes = ledger(
        **{f"{i:011d}": r for i, r in enumerate(["", "", "", "gone.private", "qc.silent", "", "gone.private"])}
    )
    elsewhere = Observation.of("B", "2020", "", "audioset", "test", ["x" * 11])
    report = audit(observed_table(), outcomes, group, observations=[SEEN, elsewhere], passport=passport_of)
    (found,) = report["observations"]
    assert (found["who"], found["when"], found["dataset"], found["split"]) == ("A lab", "2022-06", "audiocaps", "test")
    assert (found["n_listed"], found["n_present"], found["n_unlisted"]) == (8, 5, 1)
    assert found["agreement"] == {"both": 3, "only_us": 1, "only_them": 2, "neither": 1}
    assert found["passport"]["n_present"] == 5
    assert audit(observed_table(), ledger(), group, observations=[SEEN])["observations"][0]["agreement"] is None


def attempts_state(**rows: tuple[str, int, int | None, int | None]) -> pd.DataFrame:
    """clip_id=(state, first_ms, last_ok_ms, first_missing_ms), in the form of a fold of attempts."""
    table = pd.DataFrame(
        [(i, *row) for i, row in rows.items()],
        columns=["clip_id", "state", "first_ms", "last_ok_ms", "first_missing_ms"],
    )
    return table.astype({"last_ok_ms": "Int64", "first_missing_ms": "Int64"})


def test_since_when_joins_all_evidence() -> None:
    day = 86_400_000
    now = 20_000 * day  # 2024-10-04
    ids = [f"{i:011d}" for i in range(8)]
    ours = attempts_state(
        **dict.fromkeys(ids[:3], ("ok", now, now, None)),
        **{ids[3]: ("gone", now, None, now), ids[4]: ("content", now, None, None), ids[5]: ("denied", now, None, None)},
        **{ids[6]: ("gone", now, None, now), ids[7]: ("retry", now, None, None)},
    )
    split = one(audit(observed_table(), ledger(), group, observations=[SEEN], attempts_state=ours))
    found = split["since_when"]
    # seen by the lab 0-4, missed by it 5-7; then seen by us 0-2, 4 and 5 (refused, so there), gone 3 and 6; 7 unknown
    assert [(c["when"], c["n"]) for c in found["curve"]] == [("2017-03-05", 8), ("2022-06-30", 8), ("2024-10-04", 7)]
    assert [c["alive_high"] for c in found["curve"]] == pytest.approx([1, 6 / 8, 5 / 8], abs=1e-4)
    assert found["n_clips"] == 8
    assert found["sources"][0] == f"the official list, {PUBLISHED['audiocaps']}: all there"
    undated = Observation.of("A lab", "undated", "", "audiocaps", "test", ids)
    assert one(audit(observed_table(), ledger(), group, observations=[undated]))["since_when"] is None
    assert one(audit(observed_table(), ledger(), group))["since_when"] is None


def test_clips_of_other_hosts_have_no_curve() -> None:
    clip = Clip("z", "clotho", Split.TEST, Source("zenodo", "a.wav", "evaluation"), 0.0, None)
    table = Manifest.build([clip], 1).table
    assert (
        one(audit(table, ledger(z=""), group, attempts_state=attempts_state(z=("ok", 1, 1, None))))["since_when"]
        is None
    )


def test_passports_of_splits() -> None:
    report = audit(TEN, OUTCOMES, group, passport=passport_of)
    (found,) = from_report(report)
    assert found.present.tolist() == [True] * 4 + [False] * 6
    assert one(report)["passport"]["text"] == str(found)
    assert one(audit(TEN, OUTCOMES, group))["passport"] is None


def test_words_of_captions() -> None:
    clips = [
        Clip(f"c{i}", "audiocaps", Split.TEST, Source("youtube", f"c{i}"), 0.0, 10.0, ("music" if i < 8 else "dog",))
        for i in range(16)
    ]
    table = Manifest.build(clips, 1).table
    outcomes = ledger(**{f"c{i}": "gone.private" if i < 6 else "" for i in range(15)})
    found = one(audit(table, outcomes, group))["words"]
    assert (found["missing"][0]["word"], found["present"][0]["word"]) == ("music", "dog")
    assert one(audit(table, outcomes, group, captions=False))["words"] is None
    assert one(audit(TEN, OUTCOMES, group))["words"] is None


def test_drift_against_an_earlier_run() -> None:
    report = audit(TEN, OUTCOMES, group, previous=ledger(c0="gone.private", c1="", c4=""))
    assert report["drift"]["newly_missing"] == [{"clip_id": "c4", "reason": "gone.private"}]
    assert report["drift"]["resurrected"] == [{"clip_id": "c0", "reason": "gone.private"}]
    assert audit(TEN, OUTCOMES, group)["drift"] is None


def test_the_whole_report_is_json_and_takes_arrow_or_pandas() -> None:
    table, outcomes = planned(3)
    now = 20_000 * 86_400_000
    options: dict[str, Any] = {
        "observations": [SEEN],
        "attempts_state": attempts_state(**{f"v{i:04d}": ("ok", now, now, None) for i in range(400)}),
        "previous": outcomes.head(500),
        "passport": passport_of,
    }
    report = audit(table, outcomes, reasons.group, **options)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    shuffled = outcomes.sample(frac=1, random_state=1)
    again = audit(table, pa.Table.from_pandas(shuffled, preserve_index=False), reasons.group, **options)
    assert json.dumps(again) == json.dumps(report)


def test_an_empty_manifest_is_an_empty_report() -> None:
    report = audit(manifest(), ledger(c0="gone.private"), group)
    assert (report["n_clips"], report["n_unlisted"], report["splits"]) == (0, 1, [])
