"""A passport depends on which clips and captions there are, and on nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harken.errors import DataError
from harken.evaluation.passports import (
    Holding,
    Passport,
    common,
    compare,
    decode_bitmap,
    encode_bitmap,
    from_report,
    ids_sha256,
    passport_of,
)

CAPTIONS = {"yt:b:0-10000": ["a dog barks", "barking"], "yt:a:0-10000": ["rain"]}


def test_hash_can_be_computed_by_anyone() -> None:
    assert ids_sha256(["b", "a"]) == hashlib.sha256(b"a\nb\n").hexdigest()
    passport = Passport.of("audiocaps", "test", CAPTIONS, 975)
    lines = '["yt:a:0-10000", ["rain"]]\n["yt:b:0-10000", ["a dog barks", "barking"]]\n'
    assert passport.captions_sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_one_line() -> None:
    passport = Passport("audiocaps", "test", 845, 975, "9f" * 32, "02" * 32)
    assert str(passport) == "audiocaps test 845/975 ids:9f9f9f9f9f9f captions:020202020202"


def test_order_does_not_matter_and_everything_else_does() -> None:
    passport = Passport.of("audiocaps", "test", CAPTIONS, 975)
    assert Passport.of("audiocaps", "test", dict(reversed(CAPTIONS.items())), 975) == passport
    fewer = Passport.of("audiocaps", "test", {"yt:a:0-10000": ["rain"]}, 975)
    edited = Passport.of("audiocaps", "test", CAPTIONS | {"yt:a:0-10000": ["snow"]}, 975)
    moved = Passport.of(
        "audiocaps", "test", {"yt:b:0-10000": ["a dog barks"], "yt:a:0-10000": ["barking", "rain"]}, 975
    )
    assert len({passport, fewer, edited, moved}) == 4
    assert edited.ids_sha256 == passport.ids_sha256


def test_round_trip() -> None:
    passport = Passport.of("audioset", "test", {"a": (), "b": ()}, 20371)
    assert Passport(**passport.to_dict()) == passport  # type: ignore[arg-type]
    assert passport.n_present == 2


def test_impossible_passports_are_refused() -> None:
    with pytest.raises(DataError, match="official list has 1"):
        Passport.of("audiocaps", "test", CAPTIONS, 1)
    with pytest.raises(DataError, match="a is listed more than once"):
        ids_sha256(["a", "b", "a"])


OFFICIAL = [f"yt:{i:011d}:0-10000" for i in (7, 3, 11, 2, 5, 13, 1, 8, 10, 4)]
marks = st.lists(st.booleans(), min_size=1, max_size=300).map(lambda bits: np.array(bits, dtype=bool))


def holding(present: list[int], official: list[str] = OFFICIAL, policy: str = "usable") -> Holding:
    mask = np.isin(np.arange(len(official)), present)
    return Holding.of("audiocaps", "test", official, mask, policy)


def report(*holdings: Holding) -> dict[str, Any]:
    """What an audit writes, through JSON."""
    rows = []
    for h in holdings:
        official = [f"{h.split}:{i}" for i in range(h.n_total)] if h.split != "test" else OFFICIAL
        rows.append(
            {
                "dataset": h.dataset,
                "split": h.split,
                "passport": passport_of(h.dataset, h.split, official, h.present, ""),
            }
        )
    return json.loads(json.dumps({"splits": rows}))  # type: ignore[no-any-return]


@given(marks)
def test_bitmaps_round_trip(present: np.ndarray) -> None:
    text = encode_bitmap(present)
    assert (decode_bitmap(text, len(present)) == present).all()
    assert len(base64.b64decode(text)) == -(-len(present) // 8)


def test_a_bitmap_can_be_read_by_anyone() -> None:
    present = np.array([1, 0, 0, 0, 0, 0, 0, 1, 1, 0], dtype=bool)
    assert base64.b64decode(encode_bitmap(present)) == bytes([0b10000001, 0b10000000])
    assert len(encode_bitmap(np.ones(975, dtype=bool))) == 164


@pytest.mark.parametrize("text", ["", "gYA", "gYA!", "gYCA", base64.b64encode(bytes([129, 129])).decode()])
def test_damaged_bitmaps_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="bitmap"):
        decode_bitmap(text, 10)


def test_a_holding_says_what_it_is() -> None:
    found = holding([0, 3])
    assert (found.n_present, found.n_total) == (2, 10)
    assert found.ids_sha256 == ids_sha256([OFFICIAL[0], OFFICIAL[3]])
    assert found.official_sha256 == hashlib.sha256("".join(f"{i}\n" for i in OFFICIAL).encode()).hexdigest()
    assert str(found) == f"audiocaps test 2/10 ids:{found.ids_sha256[:12]} list:{found.official_sha256[:12]}"
    assert found.ids_sha256 == Passport.of("audiocaps", "test", {OFFICIAL[3]: (), OFFICIAL[0]: ()}, 10).ids_sha256


def test_holdings_come_back_from_a_report() -> None:
    made = holding([1, 2, 9], policy="")
    (found,) = from_report(report(made))
    assert found == made
    assert np.flatnonzero(found.present).tolist() == [1, 2, 9]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=120))
def test_common_is_the_intersection(pairs: list[tuple[bool, bool]]) -> None:
    official = [f"yt:{i * 7919 % 1009}" for i in range(len(pairs))]
    first, second = ({i for i, pair in zip(official, pairs, strict=True) if pair[k]} for k in (0, 1))
    a, b = (Holding.of("d", "s", official, np.array([p[k] for p in pairs]), "x") for k in (0, 1))
    ids, shared = common(a, b, official)
    assert ids == [i for i in official if i in first & second]
    assert shared.ids_sha256 == ids_sha256(first & second)
    assert shared.n_present == len(ids)
    assert common(b, a, official) == (ids, shared)
    assert common(a, a, official)[1] == a
    assert common(shared, a, official)[1] == shared


def test_other_lists_are_refused() -> None:
    a = holding([0, 1])
    reordered = holding([0, 1], OFFICIAL[::-1])
    with pytest.raises(DataError, match="different official lists"):
        common(a, reordered, OFFICIAL)
    with pytest.raises(DataError, match="Give that list"):
        common(a, holding([2]), OFFICIAL[::-1])
    with pytest.raises(DataError, match="9 marks for the 10 clips"):
        Holding.of("d", "s", OFFICIAL, np.ones(9, dtype=bool), "x")
    with pytest.raises(DataError, match="more than once"):
        Holding.of("d", "s", ["a", "a"], np.array([True, False]), "x")


def test_edited_passports_are_refused() -> None:
    a = holding([0, 1])
    moved = replace(a, bitmap=holding([0, 2]).bitmap)
    with pytest.raises(DataError, match="have another hash"):
        common(a, moved, OFFICIAL)
    with pytest.raises(DataError, match="bitmap holds 3 clips"):
        common(a, replace(a, bitmap=holding([0, 2, 4]).bitmap), OFFICIAL)


def test_two_reports_compared() -> None:
    a, b = holding([0, 1, 2, 3], policy=""), holding([2, 3, 4], policy="")
    val = Holding.of("audiocaps", "val", [f"val:{i}" for i in range(5)], np.ones(5, dtype=bool), "")
    (row,) = compare(report(a, val), report(b))
    counts = {k: row[k] for k in ("n_total", "n_a", "n_b", "n_both", "only_a", "only_b", "neither")}
    assert counts == {"n_total": 10, "n_a": 4, "n_b": 3, "n_both": 2, "only_a": 2, "only_b": 1, "neither": 5}
    assert row["common"] is None
    assert not row["is_same"]
    rows = compare(report(a, val), report(val, b), {("audiocaps", "test"): OFFICIAL})
    assert [r["split"] for r in rows] == ["test", "val"]
    assert rows[0]["common"]["ids_sha256"] == ids_sha256([OFFICIAL[2], OFFICIAL[3]])
    assert rows[1]["is_same"]
    assert rows[1]["common"] is None
    assert json.loads(json.dumps(rows)) == rows


def test_reports_that_cannot_be_compared() -> None:
    a = report(holding([0]))
    with pytest.raises(DataError, match="no split in common"):
        compare(a, report(Holding.of("audiocaps", "val", ["val:0"], np.ones(1, dtype=bool), "")))
    with pytest.raises(DataError, match="carries no passport"):
        compare(a, {"splits": [{"dataset": "d", "split": "s", "passport": None}]})
    with pytest.raises(DataError, match="no audit report"):
        compare({}, a)


def test_both_policies_are_kept() -> None:
    assert common(holding([0], policy="checked"), holding([0], policy="listed"), OFFICIAL)[1].policy == (
        "both of: checked | listed"
    )
