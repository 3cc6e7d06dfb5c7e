"""The interval of a share in a finite list: certain of what was seen, Wilson's where the list is endless."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harken.audit.intervals import wilson
from harken.errors import DataError


@st.composite
def samples(draw: st.DrawFn) -> tuple[int, int, int]:
    population = draw(st.integers(1, 5000))
    n = draw(st.integers(1, population))
    return draw(st.integers(0, n)), n, population


def test_wilson_against_published_values() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, Table I, method 3
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


@pytest.mark.parametrize(("count", "n"), [(1, 0), (0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(count: int, n: int) -> None:
    with pytest.raises(DataError, match="not a proportion"):
        wilson(count, n)


def test_impossible_samples_and_levels_are_refused() -> None:
    with pytest.raises(DataError, match="sample of 5 from a list of 4"):
        wilson(1, 5, population=4)
    with pytest.raises(DataError, match=r"level is 95"):
        wilson(1, 5, 95)


@given(samples())
def test_a_whole_list_is_a_point_and_a_part_is_narrower_than_an_endless_list(sample: tuple[int, int, int]) -> None:
    count, n, population = sample
    low, high = wilson(count, n, population=population)
    endless = wilson(count, n)
    assert 0 <= low <= count / n <= high <= 1
    assert endless[0] <= low + 1e-12
    assert high <= endless[1] + 1e-12
    if n == population:
        assert low == high == count / n


@given(samples())
def test_ends_are_where_the_score_test_just_accepts(sample: tuple[int, int, int]) -> None:
    """|count / n - p| = z sqrt(p (1 - p) / n (N - n) / (N - 1)) at each end that certainty does not cut."""
    count, n, population = sample
    z = 1.959963984540054
    for p in wilson(count, n, population=population):
        surely = count / population, 1 - (n - count) / population
        if n < population and all(abs(p - x) > 1e-12 for x in (*surely, 0, 1)):
            error = (p * (1 - p) / n * (population - n) / (population - 1)) ** 0.5
            assert abs(count / n - p) == pytest.approx(z * error, rel=1e-6, abs=1e-9)


@given(samples())
def test_what_was_seen_is_certain(sample: tuple[int, int, int]) -> None:
    count, n, population = sample
    low, high = wilson(count, n, population=population)
    assert low >= count / population - 1e-12 or count == 0
    assert high <= 1 - (n - count) / population + 1e-12 or count == n


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_covers_the_list_it_was_drawn_from(share: float) -> None:
    rng = np.random.default_rng(int(100 * share))
    population, held = 2000, 1571
    n = round(share * population)
    inside = 0
    for count in rng.hypergeometric(held, population - held, n, 4000).tolist():
        low, high = wilson(count, n, population=population)
        inside += low <= held / population <= high
    assert 0.94 <= inside / 4000 <= 0.965
