"""Intervals cover what they claim, clips are the unit, and two runs are compared query by query."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from harken.errors import ConfigError, DataError
from harken.evaluation.significance import bootstrap, paired_by_seed, paired_difference, pooled


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_same_generator_gives_the_same_interval() -> None:
    values, clips = rng().random(100), np.repeat(np.arange(20), 5)
    first, second = (bootstrap(values, clips, rng=rng(7), n_resamples=500) for _ in range(2))
    assert first == second
    assert first.low < first.mean < first.high
    assert first.mean == pytest.approx(values.mean())
    assert bootstrap(values, clips, rng=rng(8), n_resamples=500) != first


def test_a_clip_is_one_observation_however_many_captions_it_has() -> None:
    one = rng().random(60) < 0.4
    clips = np.arange(60)
    single = bootstrap(one, clips, rng=rng(1))
    fivefold = bootstrap(np.repeat(one, 5), np.repeat(clips, 5), rng=rng(1))
    assert (fivefold.low, fivefold.high) == pytest.approx((single.low, single.high))
    naive = bootstrap(np.repeat(one, 5), np.arange(300), rng=rng(1))
    assert naive.high - naive.low < 0.6 * (single.high - single.low)


def test_interval_matches_the_known_error_of_a_mean() -> None:
    values = rng(2).normal(size=2000)
    found = bootstrap(values, np.arange(2000), rng=rng(3), n_resamples=2000)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(2000), rel=0.06)


def test_coverage_with_uneven_clips() -> None:
    source, covered = rng(4), 0
    for _ in range(200):
        n_captions = source.integers(1, 6, 120)
        skill = source.beta(2, 3, 120)  # captions of one clip succeed together; the mean is 0.4 whatever their number
        clips = np.repeat(np.arange(120), n_captions)
        found = bootstrap(source.random(len(clips)) < skill[clips], clips, rng=source, n_resamples=400)
        covered += found.low <= 0.4 <= found.high
    assert 0.90 <= covered / 200 <= 0.985


def test_seeds_are_averaged_before_the_clips_are_drawn() -> None:
    values, clips = rng(5).random((3, 40)), np.arange(40)
    assert bootstrap(values, clips, rng=rng(6)) == bootstrap(values.mean(axis=0), clips, rng=rng(6))


def test_sign_flip_equals_the_exact_test() -> None:
    difference = np.array([0.4, -0.1, 0.3, 0.2, 0.5, -0.2, 0.6, 0.1])
    flips = [abs(np.dot(s, difference)) for s in itertools.product([-1, 1], repeat=8)]
    exact = np.mean(np.array(flips) >= abs(difference.sum()) - 1e-12)
    found = paired_difference(difference, np.zeros(8), np.arange(8), rng=rng(7), n_resamples=40_000)
    assert found.p_value == pytest.approx(exact, abs=0.006)
    assert found.mean == pytest.approx(difference.mean())


def test_pairing_sees_what_two_intervals_cannot() -> None:
    source = rng(8)
    base = source.random(900) < 0.36
    better = base | (source.random(900) < 0.03)
    clips = np.arange(900)
    a, b = (bootstrap(x, clips, rng=rng(9), n_resamples=2000) for x in (better, base))
    found = paired_difference(better, base, clips, rng=rng(9), n_resamples=2000)
    assert a.low < b.high  # the intervals overlap
    assert found.low > 0
    assert found.p_value < 0.01
    assert not found.is_within_noise


def test_equal_runs_are_within_noise() -> None:
    same = paired_difference(np.ones(10), np.ones(10), np.arange(10), rng=rng(), n_resamples=100)
    assert same.p_value == 1
    assert same.is_within_noise
    assert same.low == same.high == 0


def test_false_alarms_are_as_rare_as_promised() -> None:
    source, alarms = rng(10), 0
    clips = np.repeat(np.arange(60), 5)
    for _ in range(200):
        a, b = (source.random(300) < source.beta(2, 3, 60)[clips] for _ in range(2))
        alarms += not paired_difference(a, b, clips, rng=source, n_resamples=300).is_within_noise
    assert alarms / 200 <= 0.09


def test_order_of_the_runs_flips_the_sign() -> None:
    a, b = rng(11).random((2, 50))
    ab = paired_difference(a, b, np.arange(50), rng=rng(1))
    ba = paired_difference(b, a, np.arange(50), rng=rng(1))
    assert (ab.mean, ab.low, ab.high) == pytest.approx((-ba.mean, -ba.high, -ba.low), abs=1e-3)
    assert ab.p_value == ba.p_value


@pytest.mark.parametrize(
    ("values", "clips", "options", "error", "says"),
    [
        ([1.0, np.nan], [0, 1], {}, DataError, "NaN"),
        ([1.0, 2.0], [0], {}, ConfigError, "2 queries"),
        ([], [], {}, ConfigError, "at least one"),
        ([1.0], [0], {"level": 95}, ConfigError, "level"),
        ([1.0], [0], {"n_resamples": 0}, ConfigError, "n_resamples"),
    ],
)
def test_misuse_is_refused(values, clips, options, error, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        bootstrap(values, clips, rng=rng(), **options)


def test_runs_of_different_queries_are_not_compared() -> None:
    with pytest.raises(ConfigError, match="3 queries against 2"):
        paired_difference([1, 2, 3], [1, 2], [0, 1, 2], rng=rng())


def hits(n_seeds: int, skill: float, *, first: int = 20) -> dict[int, np.ndarray]:
    return {first + k: 100.0 * (rng(100 + first + k).random(300) < skill) for k in range(n_seeds)}


def test_pooled_runs_have_both_errors() -> None:
    runs, clips = hits(3, 0.6), np.arange(300)
    found = pooled(runs, clips, rng=rng(1), n_resamples=500)
    means = [v.mean() for v in runs.values()]
    assert found.mean == pytest.approx(np.mean(means))
    assert found.std == pytest.approx(np.std(means, ddof=1))
    assert found.seeds == (20, 21, 22)
    same = bootstrap(np.stack(list(runs.values())), clips, rng=rng(1), n_resamples=500)
    assert (found.low, found.high) == (same.low, same.high)
    assert pooled(dict(reversed(runs.items())), clips, rng=rng(1), n_resamples=500) == found


def test_one_run_has_no_spread() -> None:
    assert pooled(hits(1, 0.6), np.arange(300), rng=rng(), n_resamples=50).std is None


def test_only_the_seeds_that_both_have_are_compared() -> None:
    a, b = hits(3, 0.7), hits(2, 0.6, first=21) | {7: np.full(300, 100.0)}
    found = paired_by_seed(a, b, np.arange(300), rng=rng(2), n_resamples=200)
    assert found.seeds_a == found.seeds_b == (21, 22)
    assert found.by_seed == {s: pytest.approx((a[s] - b[s]).mean()) for s in (21, 22)}
    assert found.difference.mean == pytest.approx(np.mean(list(found.by_seed.values())))


def test_without_a_common_seed_each_is_the_mean_of_its_own() -> None:
    a, b = hits(1, 0.7), hits(2, 0.6, first=31)
    found = paired_by_seed(a, b, np.arange(300), rng=rng(3), n_resamples=200)
    assert (found.seeds_a, found.seeds_b, dict(found.by_seed)) == ((20,), (31, 32), {})
    assert found.difference.mean == pytest.approx(a[20].mean() - (b[31].mean() + b[32].mean()) / 2)


def test_a_seed_that_goes_the_other_way_is_told() -> None:
    b = {20: np.zeros(300), 21: np.zeros(300)}
    a = {20: np.full(300, 40.0), 21: np.full(300, -10.0)}
    found = paired_by_seed(a, b, np.arange(300), rng=rng(4), n_resamples=200)
    assert found.difference.mean == 15
    assert found.verdict == "a real difference, but only in 1 of 2 seeds"
    assert paired_by_seed(b, a, np.arange(300), rng=rng(4), n_resamples=200).verdict.startswith("a real loss, but only")


@pytest.mark.parametrize("runs", [{}, {20: np.ones(3), 21: np.ones(4)}, {20: np.ones((2, 3))}])
def test_runs_that_do_not_fit_are_refused(runs: dict[int, np.ndarray]) -> None:
    with pytest.raises(ConfigError, match="at least one seed, each with values"):
        pooled(runs, np.arange(3), rng=rng(), n_resamples=10)
