"""The interval of a share, also where the clips seen are a large part of a finite list."""

from __future__ import annotations

from statistics import NormalDist

from harken.errors import DataError


def wilson(count: int, n: int, level: float = 0.95, population: int | None = None) -> tuple[float, float]:
    """Wilson's score interval of a proportion count / n (Wilson 1927), in 0 .. 1.

    Unlike the normal interval it stays in range and has a width at 0 and 1. With `population`, the n clips are a random
    sample without replacement of a list of that size N, and the interval is of the share in the list. A proportion of
    such a sample has the variance p (1 - p) / n * (N - n) / (N - 1) (Cochran 1977, theorem 3.2), so
    the score test |count / n - p| <= z * sqrt(variance) is inverted as Wilson did, with

        z^2 (N - n) / (N - 1)   in the place of   z^2

    What was seen is certain, so the interval is cut to [count / N, 1 - (n - count) / N]; with n = N it is the point.

    Raises DataError unless 0 <= count <= n, 0 < n <= population and 0 < level < 1.
    """
    if not 0 <= count <= n or n == 0:
        raise DataError(f"wilson: {count} of {n} is not a proportion.")
    if not 0 < level < 1:
        raise DataError(f"wilson: the level is {level}; it must lie between 0 and 1, such as 0.95.")
    if population is not None and population < n:
        raise DataError(f"wilson: a sample of {n} from a list of {population}; a list is no smaller than its sample.")
    if population == n:
        return count / n, count / n
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    if population is not None:
        z2 *= (population - n) / (population - 1)
    p = count / n
    centre, half = p + z2 / (2 * n), (z2 * (p * (1 - p) / n + z2 / (4 * n * n))) ** 0.5
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    if population is not None:
        low, high = max(low, count / population), min(high, 1 - (n - count) / population)
    return (0.0 if count == 0 else low, 1.0 if count == n else high)
