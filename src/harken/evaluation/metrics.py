"""Retrieval metrics as pure functions of a score matrix, exact under ties.

Every public evaluator of the field breaks ties with argsort, so a model that gives all items one score reaches anything
from 0 to 100 % by the order of the files. Here a tie is broken at random and the expectation is taken in closed form:
constant scores give chance, and the order of queries or items changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harken.errors import ConfigError, DataError

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Relevant = npt.NDArray[np.bool_] | Sequence[npt.ArrayLike]

TILE = 1 << 23  # scores looked at together: bounds the memory, not the result


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """Where the best relevant item of each query stands. All arrays are (query,).

    above     irrelevant items that score higher than the best relevant one
    tied      irrelevant items that score exactly as high
    tied_relevant  relevant items at that score, 1 or more
    n_relevant     relevant items in all
    n_items   size of the gallery
    """

    above: Int
    tied: Int
    tied_relevant: Int
    n_relevant: Int
    n_items: int

    def __len__(self) -> int:
        return len(self.above)

    @property
    def expected(self) -> Float:
        """Expected 1-based rank of the first relevant item, ties broken at random: above + 1 + tied / (m + 1)."""
        return self.above + 1 + self.tied / (self.tied_relevant + 1)

    def hit(self, k: int) -> Float:
        """P(a relevant item is among the first k) for each query, ties broken at random.

        With g items above, e irrelevant and m relevant items in the tie, and t = k - g places left for the tie:
        0 if t <= 0, else 1 - C(e, t) / C(e + m, t). Raises ConfigError where k < 1.
        """
        _check_k(k)
        left = k - self.above
        miss = np.where(left > 0, 1.0, 0.0)
        for i in range(int(max(0, min(k, self.tied.max(initial=0) + 1)))):
            total = np.maximum(self.tied + self.tied_relevant - i, 1)
            miss *= np.where(i < left, np.maximum(self.tied - i, 0) / total, 1.0)
        return np.where(left > 0, 1.0 - miss, 0.0)

    def subset(self, queries: npt.ArrayLike) -> Ranks:
        """The ranks of some queries (indices or a mask)."""
        pick = np.asarray(queries)
        return Ranks(self.above[pick], self.tied[pick], self.tied_relevant[pick], self.n_relevant[pick], self.n_items)


def ranks(scores: npt.ArrayLike, relevant: Relevant) -> Ranks:
    """The rank of each query's best relevant item, with what it is tied with.

    scores: (query, item) float, higher is better. relevant: (query, item) bool, or for each query the indices of its
    relevant items. Raises DataError for NaN scores and for a query without a relevant item, ConfigError for shapes that
    do not fit.
    """
    matrix = _checked(scores, relevant)
    n_queries, n_items = matrix.shape
    above, tied, same, total = (np.zeros(n_queries, np.int64) for _ in range(4))
    for rows, block, mask in _tiles(matrix, relevant):
        best = np.where(mask, block, -np.inf).max(axis=1, keepdims=True)
        equal = block == best
        above[rows] = (block > best).sum(axis=1)
        same[rows] = (equal & mask).sum(axis=1)
        tied[rows] = equal.sum(axis=1) - same[rows]
        total[rows] = mask.sum(axis=1)
    return Ranks(above, tied, same, total, n_items)


def average_precision(scores: npt.ArrayLike, relevant: Relevant, k: int = 10) -> Float:
    """Expected AP@k of each query (query,), in 0 .. 1, ties broken at random.

    AP@k = sum over places j <= k that hold a relevant item of precision(j), over min(k, relevant items). A tie of n
    items, m of them relevant, that starts below g items with p relevant ones, holds a relevant item at its i-th place
    with probability m / n, and then p + 1 + (i - 1)(m - 1) / (n - 1) relevant ones are expected so far; the sum is
    linear in these, so the expectation is exact. Raises as `ranks` does.
    """
    _check_k(k)
    matrix = _checked(scores, relevant)
    n_queries, n_items = matrix.shape
    depth = min(k, n_items)
    result = np.zeros(n_queries)
    for rows, block, mask in _tiles(matrix, relevant):
        top = np.argpartition(-block, depth - 1, axis=1)[:, :depth]
        value = np.take_along_axis(block, top, axis=1)
        order = np.argsort(-value, axis=1, kind="stable")
        value = np.take_along_axis(value, order, axis=1)
        hit = np.take_along_axis(mask, np.take_along_axis(top, order, axis=1), axis=1)
        last = value[:, -1:]  # only the tie that crosses place k has members outside the first k
        same = value[:, :, None] == value[:, None, :]
        ends = value == last
        n = np.where(ends, (block == last).sum(axis=1, keepdims=True), same.sum(axis=2))
        m = np.where(ends, ((block == last) & mask).sum(axis=1, keepdims=True), (same & hit[:, None, :]).sum(axis=2))
        higher = value[:, None, :] > value[:, :, None]
        g, p = higher.sum(axis=2), (higher & hit[:, None, :]).sum(axis=2)
        place = np.arange(1, depth + 1)
        so_far = p + 1 + (place - g - 1) * (m - 1) / np.maximum(n - 1, 1)
        result[rows] = (m / n * so_far / place).sum(axis=1) / np.minimum(mask.sum(axis=1), k)
    return result


def retrieval_metrics(scores: npt.ArrayLike, relevant: Relevant, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """The retrieval metrics of a score matrix, exact under ties.

    scores: (query, item) float, higher is better. relevant: (query, item) bool, or for each query the indices of its
    relevant items; the best-ranked of several counts for R@k (the hit rate, not the fraction found).

    Returns `R@k` in percent for each k, `median_rank` and `mean_rank` (1-based, of the expected ranks) and `mAP@10` in
    percent. Raises DataError for NaN scores and for a query without a relevant item, ConfigError for shapes that do not
    fit.
    """
    found = ranks(scores, relevant)
    metrics = {f"R@{k}": 100.0 * float(found.hit(k).mean()) for k in ks}
    metrics["median_rank"] = float(np.median(found.expected))
    metrics["mean_rank"] = float(found.expected.mean())
    metrics["mAP@10"] = 100.0 * float(average_precision(scores, relevant, 10).mean())
    return metrics


def chance(n_items: int, n_relevant: npt.ArrayLike = 1, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """R@k in percent of a random ranking of `n_items`, of which `n_relevant` (a number, or one per query) are relevant.

    1 - C(n - r, k) / C(n, k), the hypergeometric probability of at least one relevant item among the first k.
    """
    m = np.atleast_1d(np.asarray(n_relevant, np.int64))
    if n_items < 1 or m.size == 0 or m.min() < 1 or m.max() > n_items:
        raise ConfigError(f"chance: n_relevant must lie in 1 .. n_items = {n_items}, found {m.tolist()[:5]}.")
    blind = Ranks(np.zeros_like(m), n_items - m, m, m, n_items)
    return {f"R@{k}": 100.0 * float(blind.hit(k).mean()) for k in ks}


def project_recall(ranks: Ranks | npt.ArrayLike, gallery: int, target_gallery: int, k: int) -> float:
    """Expected R@k in percent, had the gallery been a random `target_gallery` of its `gallery` items.

    ranks: 1-based ranks (query,), or a `Ranks`, whose ties are broken at random. Each query has one relevant item,
    which stays in the gallery. Of the r - 1 items above it, a number that follows the hypergeometric law survives:
    P(hit@k) = P(X < k), X ~ Hypergeometric(gallery - 1, r - 1, target_gallery - 1); exact, no model of the scores. This
    makes R@k comparable between test sets that have lost different clips, such as AudioCaps at 975, 957 and 845.

    Raises ConfigError where the target is larger than the gallery (nothing is known about clips that were not there),
    where a query has several relevant items (captions of a clip leave together, so they are no random subset), and for
    ranks that are not whole numbers in 1 .. gallery.
    """
    _check_k(k)
    if not 1 <= target_gallery <= gallery:
        raise ConfigError(
            f"project_recall: target_gallery must lie in 1 .. gallery = {gallery}, found {target_gallery}. "
            "Recall can only be projected to a smaller gallery."
        )
    if isinstance(ranks, Ranks):
        if ranks.n_items != gallery:
            raise ConfigError(f"project_recall: the ranks are from {ranks.n_items} items, but gallery is {gallery}.")
        if ranks.n_relevant.max(initial=1) > 1:
            raise ConfigError("project_recall: a query has several relevant items. Project t2a, or group by clip.")
        first, last = ranks.above + 1, ranks.above + 1 + ranks.tied
    else:
        given = np.asarray(ranks, np.float64)
        first = last = given.astype(np.int64)
        if given.ndim != 1 or np.any(first != given):
            raise ConfigError(
                "project_recall: ranks must be whole numbers (query,). For ties pass the `Ranks` of `ranks()`."
            )
    if len(first) == 0 or first.min() < 1 or last.max() > gallery:
        raise ConfigError(f"project_recall: ranks must lie in 1 .. gallery = {gallery} and there must be at least one.")
    by_rank = _survival(gallery, target_gallery, k)
    total = np.concatenate([[0.0], np.cumsum(by_rank)])  # of ranks 1 .. r, so that a tie is one difference
    return 100.0 * float(((total[last] - total[first - 1]) / (last - first + 1)).mean())


def _survival(gallery: int, target: int, k: int) -> Float:
    """P(hit@k) at the target gallery for ranks 1 .. gallery."""
    others, kept = gallery - 1, target - 1
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, max(gallery, 2), dtype=np.float64)))])

    def log_choose(n: Int, r: Int) -> Float:
        safe = np.clip(r, 0, n)
        value = log_factorial[n] - log_factorial[safe] - log_factorial[n - safe]
        return np.where((r < 0) | (r > n), -np.inf, value)

    above = np.arange(gallery)
    probability = np.zeros(gallery)
    for x in range(min(k, target)):  # x of the items above survive
        n = np.full(gallery, x)
        log_ways = log_choose(above, n) + log_choose(others - above, kept - n)
        probability += np.exp(log_ways - log_choose(np.array(others), np.array(kept)))
    return np.where(above < k, 1.0, np.minimum(probability, 1.0))


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ConfigError(f"k must be a whole number of at least 1, found {k!r}.")


def _checked(scores: npt.ArrayLike, relevant: Relevant) -> npt.NDArray[np.floating]:
    matrix = np.asarray(scores)
    if not np.issubdtype(matrix.dtype, np.floating):
        matrix = matrix.astype(np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ConfigError(f"scores: expected a matrix (query, item), at least one of each, found shape {matrix.shape}.")
    if isinstance(relevant, np.ndarray) and relevant.ndim == 2:
        if relevant.dtype != np.bool_ or relevant.shape != matrix.shape:
            raise ConfigError(
                f"relevant: expected a bool matrix of shape {matrix.shape} or one list of item indices for each query, "
                f"found {relevant.dtype} of shape {relevant.shape}."
            )
    elif len(relevant) != len(matrix):
        raise ConfigError(f"relevant: {len(relevant)} lists of items for {len(matrix)} queries; each needs one.")
    return matrix


def _tiles(
    matrix: npt.NDArray[np.floating], relevant: Relevant
) -> Iterator[tuple[slice, npt.NDArray[np.floating], npt.NDArray[np.bool_]]]:
    """Rows of scores with their relevance as a dense mask, a bounded number of scores at a time."""
    n_queries, n_items = matrix.shape
    step = max(1, TILE // n_items)
    for start in range(0, n_queries, step):
        rows = slice(start, min(start + step, n_queries))
        block = matrix[rows]
        if np.isnan(block).any():
            query, item = np.argwhere(np.isnan(block))[0]
            raise DataError(
                f"scores: NaN at query {start + query}, item {item}; it has no rank. "
                "A diverged model or an all-zero embedding does this: look at the embeddings."
            )
        if isinstance(relevant, np.ndarray) and relevant.ndim == 2:
            mask = relevant[rows]
        else:
            mask = np.zeros(block.shape, np.bool_)
            for row in range(len(block)):
                items = np.atleast_1d(np.asarray(relevant[start + row]))
                if items.size and not np.issubdtype(items.dtype, np.integer):
                    raise ConfigError(f"relevant: query {start + row}: expected item indices, found {items.dtype}.")
                if items.size and (items.min() < 0 or items.max() >= n_items):
                    raise ConfigError(f"relevant: query {start + row} names an item outside 0 .. {n_items - 1}.")
                mask[row, items.astype(np.int64)] = True
        lonely = np.flatnonzero(~mask.any(axis=1))
        if lonely.size:
            raise DataError(
                f"relevant: query {start + lonely[0]} has no relevant item, so no rank. "
                "Leave out the queries whose clips are missing and count them in the passport."
            )
        yield rows, block, mask
