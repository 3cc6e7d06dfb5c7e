"""What is lost more than the rest is flagged, what is not is left alone, and bounds hold whatever was lost."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harken.audit import bias
from harken.audit.bias import Labels, label_rows, manski_bounds, reason_by_label, sensitivity, words
from harken.audit.visits import CODE, OK, UNVISITED

GONE, NEW = CODE["gone"], CODE[UNVISITED]


def of(*lists: list[str] | None) -> Labels:
    return Labels.of(pa.chunked_array([pa.array(lists, pa.list_(pa.string()))]))


def states(*names: str) -> np.ndarray:
    return np.array([CODE[n] for n in names], dtype=np.int8)


def test_labels_are_pairs_each_once_in_order() -> None:
    found = of(["b", "a", "b"], None, [], ["c", "a"])
    assert found.labels == ("a", "b", "c")
    assert list(zip(found.row.tolist(), found.code.tolist(), strict=True)) == [(0, 0), (0, 1), (3, 0), (3, 2)]
    assert of(None, []).labels == ()


def test_labels_of_several_chunks_and_of_a_slice() -> None:
    column = pa.chunked_array([[["a"], ["b"]], [["c", "a"], ["a"]]], pa.list_(pa.string()))
    assert Labels.of(column.slice(1, 2)).labels == ("a", "b", "c")
    assert Labels.of(column.slice(1, 2)).row.tolist() == [0, 1, 1]


def test_rows_of_labels() -> None:
    labels = of(*[["/m/dog"]] * 6, *[["/m/cat"]] * 3, ["/m/owl"])
    state = states(*["ok"] * 4, "gone", "unvisited", *["ok"] * 2, "denied", "unvisited")
    cat, dog = label_rows(labels, state, {"/m/dog": "Dog"}, 5, 0.95)
    assert (dog["label"], dog["name"], dog["n_listed"], dog["n"], dog["n_ok"], dog["n_left"]) == (
        "/m/dog", "Dog", 6, 5, 4, 4,
    )  # fmt: skip
    assert cat["name"] == "/m/cat"
    assert (dog["is_rare"], cat["is_rare"]) == (False, True)  # the sixth dog may still be there
    assert dog["q_value"] == pytest.approx(1.0)
    assert not dog["is_biased"]


def test_a_label_struck_by_one_cause_is_found() -> None:
    rng = np.random.default_rng(3)
    n = 6000
    names = np.array(["music", "news", "dog"])[rng.integers(0, 3, n)]
    draw = rng.random(n)
    reason = np.where(draw < 0.05, 0, np.where(draw < 0.1, 1, -1))
    reason[(names == "music") & (rng.random(n) < 0.1)] = 0
    state = np.where(reason >= 0, GONE, CODE[OK]).astype(np.int8)
    cells = reason_by_label(
        of(*[[x] for x in names]),
        state,
        reason,
        ["gone.copyright_claim", "gone.private"],
        {"gone.copyright_claim": "gone", "gone.private": "gone"},
        {"music": "Music"},
    )
    first = cells[0]
    assert (first["reason"], first["group"], first["label"], first["name"]) == (
        "gone.copyright_claim", "gone", "music", "Music",
    )  # fmt: skip
    assert first["log2_ratio"] > 0.5
    assert first["q_value"] < 1e-9
    assert first["count"] == int(((reason == 0) & (names == "music")).sum())
    assert first["expected"] == pytest.approx((reason == 0).sum() * (names == "music").sum() / n)
    assert all(c["reason"] == "gone.copyright_claim" for c in cells)
    assert all(c["q_value"] < 0.05 for c in cells)


def test_causes_that_strike_all_alike_show_nothing() -> None:
    rng = np.random.default_rng(0)
    reason = rng.integers(-20, 3, 4000).clip(-1)
    labels = of(*[[f"L{i % 50}"] for i in range(4000)])
    state = np.where(reason >= 0, GONE, CODE[OK]).astype(np.int8)
    names = ["a", "b", "c"]
    assert reason_by_label(labels, state, reason, names, dict.fromkeys(names, "gone"), {}) == []


def test_clips_not_visited_are_not_counted() -> None:
    labels = of(*[["a"]] * 4, *[["b"]] * 400)
    state = states(*["gone"] * 4, *["ok"] * 40, *["unvisited"] * 360)
    reason = np.array([0] * 4 + [-1] * 400)
    (cell, other) = reason_by_label(labels, state, reason, ["x"], {"x": "gone"}, {})
    assert (cell["label"], cell["count"], cell["expected"]) == ("a", 4, pytest.approx(4 * 4 / 44))
    assert other["label"] == "b"
    assert other["count"] == 0
    assert other["log2_ratio"] < 0
    assert reason_by_label(labels, np.full(404, NEW), np.full(404, -1), ["x"], {}, {}) == []
    assert reason_by_label(of(*[None] * 404), state, reason, ["x"], {"x": "gone"}, {}) == []


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_cell_tests_agree_with_scipy(a: int, b: int, c: int, d: int) -> None:
    n, r, k = a + b + c + d, a + b, a + c
    if not n:
        return
    p, _ = bias._independence(np.array([[float(a)]]), np.array([[float(r)]]), np.array([[float(k)]]), n)
    table = [[a, b], [c, d]]
    if min(r, n - r, k, n - k) == 0:
        assert p[0, 0] == 1
    elif stats.contingency.expected_freq(table).min() >= 5:
        assert p[0, 0] == pytest.approx(stats.chi2_contingency(table, correction=False).pvalue)
    else:
        less, more = (stats.fisher_exact(table, alternative=side)[1] for side in ("less", "greater"))
        assert p[0, 0] == pytest.approx(min(1, 2 * min(less, more)))


CAPTIONS = pa.chunked_array([[["A dog barks", "dog's bark"], ["Music plays. A dog"], ["Rain"], None, ["A dog sings"]]])


def test_words_twin() -> None:
    lists = pa.chunked_array([[["music plays loudly"]] * 6 + [["a dog barks"]] * 20 + [["a dog plays"]] * 4])
    missing = np.array([True] * 6 + [False] * 24)
    found = words(lists, missing, ~missing)
    assert found is not None
    lost, held = {"music": 6, "plays": 6, "loudly": 6}, {"a": 24, "dog": 24, "barks": 20, "plays": 4}
    total = 18 + 72

    def z(word: str) -> float:
        a = 500 * (lost.get(word, 0) + held.get(word, 0)) / total
        y, other = lost.get(word, 0) + a, held.get(word, 0) + a
        odds = math.log(y / (18 + 500 - y)) - math.log(other / (72 + 500 - other))
        return odds / math.sqrt(1 / y + 1 / other)

    told = {w["word"]: w for w in found["missing"] + found["present"]}
    assert set(told) == set(lost) | set(held)
    for word, row in told.items():
        assert row["z"] == pytest.approx(z(word))
        assert (row["n_missing"], row["n_present"]) == (lost.get(word, 0), held.get(word, 0))
    assert [w["word"] for w in found["missing"]] == ["loudly", "music", "plays"]
    assert {w["word"] for w in found["present"]} == {"a", "dog", "barks"}
    assert (found["n_words_missing"], found["n_words_present"]) == (18, 72)
    assert (found["mean_words_missing"], found["mean_words_present"]) == (3.0, 3.0)


def test_words_are_whole_and_rare_ones_left_out() -> None:
    missing = np.array([True, False, False, False, False])
    found = words(CAPTIONS, missing, ~missing)
    assert found is not None
    assert found["missing"] == []
    assert found["present"] == []
    assert (found["n_words_missing"], found["mean_words_missing"]) == (5, 2.5)  # "dog's" is one word


def test_words_need_both_sides() -> None:
    none, every = np.zeros(5, bool), np.ones(5, bool)
    assert words(CAPTIONS, none, every) is None
    assert words(CAPTIONS, every, none) is None
    assert words(pa.chunked_array([pa.nulls(5, pa.list_(pa.string()))]), every, every) is None


def test_one_word_repeated_is_no_division_by_zero() -> None:
    lists = pa.chunked_array([[["beep beep beep"], ["beep beep beep"]]])
    found = words(lists, np.array([True, False]), np.array([False, True]))
    assert found is not None
    assert found["missing"] == []
    assert found["present"] == []


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.lists(st.floats(0, 100), max_size=30))
def test_bounds_hold_whatever_the_missing_clips_score(present: list[float], missing: list[float]) -> None:
    low, high = manski_bounds(min(100.0, float(np.mean(present))), len(missing) / (len(present) + len(missing)))
    assert low - 1e-9 <= np.mean(present + missing) <= high + 1e-9


def test_bounds_are_reached() -> None:
    assert manski_bounds(40, 0.25) == (30, 55)
    assert manski_bounds(0.4, 0.25, -1, 1) == pytest.approx((0.05, 0.55))
    assert manski_bounds(40, 0) == (40, 40)
    for bad in ((101, 0.1), (40, 1.1), (-1, 0.5)):
        with pytest.raises(ValueError, match="manski_bounds"):
            manski_bounds(*bad)


def test_sensitivity_says_what_it_means() -> None:
    found = sensitivity(0.2)
    assert (found["low_share"], found["high_share"], found["share_missing"]) == (0.8, 0.2, 0.2)
    low, high = manski_bounds(37, 0.2)
    assert 37 * found["low_share"] == pytest.approx(low)
    assert 37 * found["low_share"] + 100 * found["high_share"] == pytest.approx(high)
    assert "50 % could be anything from 40.0 % to 60.0 %" in found["text"]
