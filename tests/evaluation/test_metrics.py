"""Hand-made matrices, brute force over every way to break ties, and the laws that every ranking obeys."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harken.errors import ConfigError, DataError
from harken.evaluation import metrics
from harken.evaluation.metrics import Ranks, average_precision, chance, project_recall, ranks, retrieval_metrics


def orders(scores: np.ndarray) -> list[list[int]]:
    """Every ranking of the items that a random tie-break can give."""
    return [list(p) for p in itertools.permutations(range(len(scores))) if all(np.diff(scores[list(p)]) <= 0)]


def literal_hit(scores: np.ndarray, relevant: set[int], k: int) -> float:
    found = orders(scores)
    return sum(any(i in relevant for i in o[:k]) for o in found) / len(found)


def literal_rank(scores: np.ndarray, relevant: set[int]) -> float:
    found = orders(scores)
    return sum(min(o.index(i) for i in relevant) + 1 for o in found) / len(found)


def literal_ap(scores: np.ndarray, relevant: set[int], k: int) -> float:
    found = orders(scores)
    total = 0.0
    for order in found:
        n_found = 0
        for place, item in enumerate(order[:k], 1):
            if item in relevant:
                n_found += 1
                total += n_found / place
    return total / min(len(relevant), k) / len(found)


@st.composite
def queries(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n = draw(st.integers(1, 6))
    scores = np.array(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)), float)
    mask = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any)))
    return scores, mask


@settings(max_examples=80)
@given(queries(), st.integers(1, 7))
def test_ties_are_broken_at_random_in_expectation(query: tuple[np.ndarray, np.ndarray], k: int) -> None:
    scores, mask = query
    relevant = set(np.flatnonzero(mask).tolist())
    found = ranks(scores[None], mask[None])
    assert found.hit(k)[0] == pytest.approx(literal_hit(scores, relevant, k), abs=1e-12)
    assert found.expected[0] == pytest.approx(literal_rank(scores, relevant), abs=1e-12)
    assert average_precision(scores[None], mask[None], k)[0] == pytest.approx(
        literal_ap(scores, relevant, k), abs=1e-12
    )


def test_hand_made_matrix() -> None:
    scores = np.array([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.3, 0.2, 0.1]])
    found = retrieval_metrics(scores, np.eye(3, dtype=bool), ks=(1, 2, 3))
    assert found["R@1"] == pytest.approx(100 / 3)
    assert found["R@2"] == pytest.approx(200 / 3)
    assert found["R@3"] == pytest.approx(100)
    assert found["median_rank"] == 2
    assert found["mean_rank"] == 2
    assert found["mAP@10"] == pytest.approx(100 * (1 + 1 / 2 + 1 / 3) / 3)


def test_perfect_scores_give_100() -> None:
    found = retrieval_metrics(np.eye(20), np.eye(20, dtype=bool))
    assert found == {"R@1": 100, "R@5": 100, "R@10": 100, "median_rank": 1, "mean_rank": 1, "mAP@10": 100}


def test_the_best_of_several_relevant_items_counts_and_map_uses_all_of_them() -> None:
    scores = -np.arange(20.0)[None]  # item i stands at place i + 1
    found = retrieval_metrics(scores, [[7, 0, 3, 15, 18]])
    assert found["R@1"] == 100
    assert found["median_rank"] == 1
    assert found["mAP@10"] == pytest.approx(37.5)  # (1/1 + 2/4 + 3/8) / 5


@pytest.mark.parametrize(
    ("n_items", "n_relevant", "expected"),
    [
        (957, 1, (0.1045, 0.5225, 1.0449)),
        (4785, 5, (0.1045, 0.5216, 1.0410)),
        (845, 1, (0.1183, 0.5917, 1.1834)),
        (4225, 5, (0.1183, 0.5906, 1.1784)),
        (1045, 1, (0.0957, 0.4785, 0.9569)),
        (5225, 5, (0.0957, 0.4777, 0.9536)),
        (16000, 1, (0.00625, 0.03125, 0.0625)),
    ],
)
def test_constant_scores_give_chance(n_items: int, n_relevant: int, expected: tuple[float, ...]) -> None:
    by_formula = chance(n_items, n_relevant)
    assert list(by_formula.values()) == pytest.approx(expected, abs=6e-5)
    items = np.arange(n_relevant)
    constant = retrieval_metrics(
        np.zeros((2, n_items), np.float32), [items, items + 1 if n_relevant < n_items else items]
    )
    for name, value in by_formula.items():
        assert constant[name] == pytest.approx(value, rel=1e-9)


def test_chance_is_the_closed_form() -> None:
    assert chance(10, [3, 1], ks=(4,))["R@4"] == pytest.approx(100 * ((1 - comb(7, 4) / comb(10, 4)) + 4 / 10) / 2)


def test_k_beyond_the_gallery_is_100() -> None:
    assert retrieval_metrics(np.zeros((2, 3)), np.eye(3, dtype=bool)[:2], ks=(3, 50)) | {"R@3": 100, "R@50": 100} == (
        retrieval_metrics(np.zeros((2, 3)), np.eye(3, dtype=bool)[:2], ks=(3, 50))
    )


def test_order_of_queries_and_items_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 8, (30, 40)).astype(np.float32)
    mask = rng.random((30, 40)) < 0.1
    mask[:, 0] = True
    rows, columns = rng.permutation(30), rng.permutation(40)
    shuffled = retrieval_metrics(scores[rows][:, columns], mask[rows][:, columns])
    assert shuffled == pytest.approx(retrieval_metrics(scores, mask))


def test_only_the_order_of_scores_matters() -> None:
    rng = np.random.default_rng(1)
    scores, mask = rng.normal(size=(20, 30)), np.eye(20, 30, dtype=bool)
    assert retrieval_metrics(np.exp(scores), mask) == retrieval_metrics(scores, mask)


def test_lists_of_indices_equal_the_mask() -> None:
    rng = np.random.default_rng(2)
    scores, mask = rng.normal(size=(20, 30)), rng.random((20, 30)) < 0.2
    mask[:, 3] = True
    assert retrieval_metrics(scores, [np.flatnonzero(m) for m in mask]) == retrieval_metrics(scores, mask)


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    scores, mask = rng.integers(0, 5, (17, 11)), np.eye(17, 11, dtype=bool)
    mask[11:, 0] = True
    whole = retrieval_metrics(scores, mask)
    monkeypatch.setattr(metrics, "TILE", 25)
    assert retrieval_metrics(scores, mask) == whole


def test_minus_infinity_is_a_score() -> None:
    scores = np.array([[-np.inf, 1.0, -np.inf]])
    assert ranks(scores, [[0]]).expected[0] == 2.5


def test_nan_is_refused_by_name() -> None:
    scores = np.zeros((3, 4))
    scores[1, 2] = np.nan
    with pytest.raises(DataError, match="NaN at query 1, item 2"):
        retrieval_metrics(scores, np.ones((3, 4), bool))


@pytest.mark.parametrize(
    ("scores", "relevant", "error", "says"),
    [
        (np.zeros(3), [[0]], ConfigError, "query, item"),
        (np.zeros((2, 3)), np.ones((3, 2), bool), ConfigError, r"\(2, 3\)"),
        (np.zeros((2, 3)), np.ones((2, 3)), ConfigError, "bool"),
        (np.zeros((2, 3)), [[0]], ConfigError, "each needs one"),
        (np.zeros((2, 3)), [[0], [3]], ConfigError, "outside 0 .. 2"),
        (np.zeros((2, 3)), [[0], [0.5]], ConfigError, "indices"),
        (np.zeros((2, 3)), [[0], []], DataError, "query 1 has no relevant item"),
        (np.zeros((0, 3)), [], ConfigError, "at least one"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_misuse_is_refused(scores: np.ndarray, relevant: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        retrieval_metrics(scores, relevant)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
@pytest.mark.usefixtures("unchecked")
def test_k_must_be_a_count(k: object) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        ranks(np.eye(2), np.eye(2, dtype=bool)).hit(k)  # type: ignore[arg-type]


@pytest.mark.parametrize("gallery", [1, 2, 5, 8])
def test_projection_is_the_mean_over_all_smaller_galleries(gallery: int) -> None:
    for target in range(1, gallery + 1):
        for k in (1, 2, 3, 10):
            for rank in range(1, gallery + 1):
                others = [i for i in range(1, gallery + 1) if i != rank]
                kept = list(itertools.combinations(others, target - 1))
                literal = sum(sum(i < rank for i in c) < k for c in kept) / len(kept)
                assert project_recall([rank], gallery, target, k) == pytest.approx(100 * literal, abs=1e-9)


def test_projection_to_the_same_gallery_is_the_recall_itself() -> None:
    rng = np.random.default_rng(4)
    scores = rng.integers(0, 30, (50, 200)).astype(float)
    found = ranks(scores, [[i] for i in range(50)])
    assert (found.tied > 0).any()
    for k in (1, 5, 10):
        assert project_recall(found, 200, 200, k) == pytest.approx(100 * found.hit(k).mean(), abs=1e-9)


def test_projection_matches_drawn_galleries_at_real_size() -> None:
    rng = np.random.default_rng(5)
    position = rng.geometric(0.02, 400).clip(1, 975)
    drawn = np.mean([rng.hypergeometric(position - 1, 975 - position, 844) < 10 for _ in range(4000)]) * 100
    assert project_recall(position, 975, 845, 10) == pytest.approx(drawn, abs=0.1)
    assert project_recall(position, 975, 845, 10) > project_recall(position, 975, 975, 10)


def test_projection_closed_form_for_recall_at_1() -> None:
    assert project_recall([4], 20, 8, 1) == pytest.approx(100 * comb(16, 7) / comb(19, 7))


def test_projection_averages_over_a_tie() -> None:
    tied = Ranks(np.array([2]), np.array([3]), np.array([1]), np.array([1]), 12)
    assert project_recall(tied, 12, 6, 2) == pytest.approx(
        np.mean([project_recall([r], 12, 6, 2) for r in (3, 4, 5, 6)])
    )


@pytest.mark.parametrize(
    ("given_ranks", "gallery", "target", "says"),
    [
        ([1, 2], 10, 11, "smaller gallery"),
        ([1, 2], 10, 0, "smaller gallery"),
        ([1.5], 10, 5, "whole numbers"),
        ([0], 10, 5, r"1 .. gallery"),
        ([11], 10, 5, r"1 .. gallery"),
        ([], 10, 5, "at least one"),
        (ranks(np.zeros((1, 9)), [[0]]), 10, 5, "from 9 items"),
        (ranks(np.zeros((1, 10)), [[0, 1]]), 10, 5, "several relevant"),
    ],
)
def test_projection_refuses_what_is_not_exact(given_ranks: object, gallery: int, target: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        project_recall(given_ranks, gallery, target, 1)  # type: ignore[arg-type]


def test_subset_keeps_the_gallery() -> None:
    found = ranks(np.eye(4), np.eye(4, dtype=bool)[::-1])
    assert len(found.subset([0, 2])) == 2
    assert found.subset([0, 2]).n_items == 4
