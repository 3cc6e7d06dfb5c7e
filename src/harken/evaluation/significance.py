"""How far a number can be trusted: intervals and paired tests that know that captions of one clip belong together.

On AudioCaps R@1 carries a sampling error of about 1.5 (text to audio) to 3 (audio to text) points, more than most
published gains. Two runs on the same clips are therefore compared query by query. Everything here resamples clips, not
queries, and speaks of the clips alone: the spread over seeds is reported beside it, not mixed into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harken.errors import ConfigError, DataError

Float = npt.NDArray[np.float64]

BLOCK = 1 << 22  # resampled clips held together: bounds the memory, not the result


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over queries and its bootstrap percentile interval at `level`, in the unit of the values."""

    mean: float
    low: float
    high: float
    level: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of `a - b` over queries, its interval, and the two-sided p-value of the sign-flip test over clips."""

    mean: float
    low: float
    high: float
    level: float
    p_value: float

    @property
    def is_within_noise(self) -> bool:
        """Whether the test at 1 - level cannot tell the two runs apart."""
        return self.p_value > 1.0 - self.level


@dataclass(frozen=True, slots=True)
class Pooled:
    """Runs of one recipe together: `std` is the sample standard deviation over `seeds` (None for one), `low` and
    `high` are the interval over clips of the seeds' mean.
    """

    mean: float
    std: float | None
    low: float
    high: float
    level: float
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SeededDifference:
    """Recipe `a` against recipe `b`. `by_seed`: the mean of `a - b` of each seed that both have; where they have none
    in common it is empty, and each is the mean of its own. seeds_a, seeds_b: what was compared.
    """

    difference: Difference
    by_seed: Mapping[int, float]
    seeds_a: tuple[int, ...]
    seeds_b: tuple[int, ...]

    @property
    def verdict(self) -> str:
        """In words, as the test over clips has it; and whether every seed says the same."""
        d = self.difference
        if d.is_within_noise:
            return "within noise"
        word = "a real difference" if d.mean > 0 else "a real loss"
        agree = sum(v * d.mean > 0 for v in self.by_seed.values())
        return word if agree == len(self.by_seed) else f"{word}, but only in {agree} of {len(self.by_seed)} seeds"


def bootstrap(
    values: npt.ArrayLike,
    clips: npt.ArrayLike,
    *,
    rng: np.random.Generator,
    n_resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Bootstrap percentile interval of a mean over queries, resampling clips (Efron and Tibshirani 1993, chapter 13).

    values: (query,) such as `100 * ranks.hit(1)`, or (seed, query), which are averaged over seeds first. clips:
    (query,) the clip of each query, any integers. Raises ConfigError for shapes or a level that do not fit, DataError
    for NaN.
    """
    total, count = _per_clip(values, clips)
    _check(n_resamples, level)
    draws = np.concatenate([s / c for s, c in _resampled(total, count, n_resamples, rng)])
    low, high = _ends(draws, level)
    return Interval(float(total.sum() / count.sum()), low, high, level)


def paired_difference(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    clips: npt.ArrayLike,
    *,
    rng: np.random.Generator,
    n_resamples: int = 10_000,
    level: float = 0.95,
) -> Difference:
    """Whether run `a` beats run `b` on the same queries: bootstrap interval and sign-flip test, both over clips.

    a, b: (query,) or (seed, query), averaged over seeds first; the same queries in the same order, asked of the same
    gallery. clips: (query,). The test flips the sign of whole clips at random: if neither run were better, a - b would
    be as likely as b - a for each clip (Fisher's randomisation test). p = (1 + flips at least as extreme) / (1 +
    flips). Raises as `bootstrap` does.
    """
    first, second = _over_seeds(a), _over_seeds(b)
    if first.shape != second.shape:
        raise ConfigError(
            f"paired_difference: {len(first)} queries against {len(second)}. Both runs must have been asked the same "
            "queries; compare runs of different clips on their intersection."
        )
    total, count = _per_clip(first - second, clips)
    _check(n_resamples, level)
    draws = np.concatenate([s / c for s, c in _resampled(total, count, n_resamples, rng)])
    low, high = _ends(draws, level)
    seen = abs(total.sum())
    slack = 1e-9 * (1.0 + np.abs(total).sum())  # sums of the same numbers in another order count as equal
    extreme = 0
    for n in _blocks(n_resamples, len(total)):
        signs = rng.integers(0, 2, (n, len(total)), dtype=np.int8) * np.int8(2) - np.int8(1)
        extreme += int((np.abs(signs @ total) >= seen - slack).sum())
    p = (1 + extreme) / (1 + n_resamples)
    return Difference(float(total.sum() / count.sum()), low, high, level, p)


def pooled(
    by_seed: Mapping[int, npt.ArrayLike],
    clips: npt.ArrayLike,
    *,
    rng: np.random.Generator,
    n_resamples: int = 10_000,
    level: float = 0.95,
) -> Pooled:
    """The mean of a recipe's runs, with both of its errors. by_seed: seed -> (query,); clips: (query,).

    Raises as `bootstrap` does, and ConfigError for seeds that were not asked the same number of queries.
    """
    seeds = tuple(sorted(by_seed))
    values = _stacked("pooled", by_seed, seeds)
    i = bootstrap(values, clips, rng=rng, n_resamples=n_resamples, level=level)
    std = float(values.mean(axis=1).std(ddof=1)) if len(seeds) > 1 else None
    return Pooled(i.mean, std, i.low, i.high, level, seeds)


def pooled_median(
    by_seed: Mapping[int, npt.ArrayLike],
    clips: npt.ArrayLike,
    *,
    rng: np.random.Generator,
    n_resamples: int = 10_000,
    level: float = 0.95,
) -> Pooled:
    """As `pooled`, of medians: the mean of the seeds' medians, and its interval over clips.

    by_seed: seed -> (query,). clips: (query,). A resample takes the same clips of every seed. Raises ConfigError for
    shapes, resamples or a level that do not fit, DataError for NaN.
    """
    seeds, owner = tuple(sorted(by_seed)), np.asarray(clips)
    values = [np.asarray(by_seed[s], np.float64) for s in seeds]
    if not values or owner.ndim != 1 or not owner.size or any(v.shape != owner.shape for v in values):
        raise ConfigError(
            f"pooled_median: expected the clip of each query {owner.shape}, and at least one seed with as many values, "
            f"found { {s: v.shape for s, v in zip(seeds, values, strict=True)} }."
        )
    _check(n_resamples, level)
    if not all(np.isfinite(v).all() for v in values):
        raise DataError("pooled_median: NaN or infinite for some query. Recompute the run's per-query results.")
    each = [float(np.median(v)) for v in values]
    index = np.unique(owner, return_inverse=True)[1]
    draws = np.concatenate(
        [np.mean([_weighted_median(v, times) for v in values], axis=0) for times in _times(index, n_resamples, rng)]
    )
    low, high = _ends(draws, level)
    std = float(np.std(each, ddof=1)) if len(each) > 1 else None
    return Pooled(float(np.mean(each)), std, low, high, level, seeds)


def paired_by_seed(
    a: Mapping[int, npt.ArrayLike],
    b: Mapping[int, npt.ArrayLike],
    clips: npt.ArrayLike,
    *,
    rng: np.random.Generator,
    n_resamples: int = 10_000,
    level: float = 0.95,
) -> SeededDifference:
    """`paired_difference` of the seeds that both recipes have; of all, where they have none in common.

    a, b: seed -> (query,), the same queries in the same order. A seed that one of them lacks is left out: a mean over
    three runs against a mean over two would be lucky or unlucky by which run is missing. Raises as `paired_difference`.
    """
    shared = tuple(sorted(set(a) & set(b)))
    seeds_a, seeds_b = shared or tuple(sorted(a)), shared or tuple(sorted(b))
    x, y = _stacked("a", a, seeds_a), _stacked("b", b, seeds_b)
    d = paired_difference(x, y, clips, rng=rng, n_resamples=n_resamples, level=level)
    by_seed = {s: float((p - q).mean()) for s, p, q in zip(shared, x, y, strict=False)}
    return SeededDifference(d, by_seed, seeds_a, seeds_b)


def _stacked(name: str, by_seed: Mapping[int, npt.ArrayLike], seeds: tuple[int, ...]) -> Float:
    """(seed, query)."""
    rows = [np.asarray(by_seed[s], np.float64) for s in seeds]
    if not rows or len({r.shape for r in rows}) > 1 or rows[0].ndim != 1:
        raise ConfigError(
            f"{name}: expected at least one seed, each with values (query,) of the same queries, found "
            f"{ {s: r.shape for s, r in zip(seeds, rows, strict=True)} }."
        )
    return np.stack(rows)


def _over_seeds(values: npt.ArrayLike) -> Float:
    x = np.asarray(values, np.float64)
    if x.ndim not in (1, 2) or x.size == 0:
        raise ConfigError(f"values: expected (query,) or (seed, query) with at least one query, found {x.shape}.")
    if not np.isfinite(x).all():
        raise DataError("values: NaN or infinite for some query. Recompute the run's per-query results.")
    return x.mean(axis=0) if x.ndim == 2 else x


def _per_clip(values: npt.ArrayLike, clips: npt.ArrayLike) -> tuple[Float, Float]:
    """Sum of the values and number of queries of each clip."""
    x, owner = _over_seeds(values), np.asarray(clips)
    if owner.shape != x.shape:
        raise ConfigError(f"clips: expected the clip of each of {len(x)} queries, found shape {owner.shape}.")
    _, index = np.unique(owner, return_inverse=True)
    return np.bincount(index, x).astype(np.float64), np.bincount(index).astype(np.float64)


def _check(n_resamples: int, level: float) -> None:
    if n_resamples < 1 or not 0 < level < 1:
        raise ConfigError(f"expected n_resamples >= 1 and 0 < level < 1, found {n_resamples} and {level}.")


def _blocks(n: int, width: int) -> Iterator[int]:
    step = max(1, BLOCK // width)
    for start in range(0, n, step):
        yield min(step, n - start)


def _resampled(total: Float, count: Float, n: int, rng: np.random.Generator) -> Iterator[tuple[Float, Float]]:
    """Sums and counts of n resamples of the clips with replacement."""
    for size in _blocks(n, len(total)):
        pick = rng.integers(0, len(total), (size, len(total)), dtype=np.int32)
        yield total[pick].sum(axis=1), count[pick].sum(axis=1)


def _ends(draws: Float, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _times(index: npt.NDArray[np.int64], n: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """How often each query is in a resample of the clips: (resample, query), in blocks."""
    n_clips = int(index.max()) + 1
    for size in _blocks(n, max(len(index), n_clips)):
        yield rng.multinomial(n_clips, np.full(n_clips, 1 / n_clips), size)[:, index]


def _weighted_median(values: Float, times: npt.NDArray[np.int64]) -> Float:
    """The median of `values` (query,) if each comes so many times: (resample,) for times (resample, query)."""
    order = np.argsort(values, kind="stable")
    up_to = times[:, order].cumsum(axis=1)
    n = up_to[:, -1]
    low, high = ((up_to <= at[:, None]).sum(axis=1) for at in ((n - 1) // 2, n // 2))
    return (values[order][low] + values[order][high]) / 2
