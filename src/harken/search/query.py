"""Ask an index: exact cosine top-k, the same answer on every machine and in every order of the collection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from harken.errors import ConfigError, DataError
from harken.search.index import Index

ROWS = 1 << 16  # embeddings multiplied together: bounds the memory, not the result


@dataclass(frozen=True, slots=True)
class Hit:
    """One clip found: its 1-based rank, the cosine of its embedding with the text's, its captions and other facts."""

    rank: int
    clip_id: str
    score: float
    captions: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def search(index: Index, text_embedding: npt.ArrayLike, k: int = 10) -> list[Hit]:
    """The k clips of the index whose embeddings have the largest cosine with the text's, best first.

    text_embedding: (dim,), of any length. Fewer than k hits only where the index is smaller. Equal scores come in the
    order of the index. Raises ConfigError for k < 1 or another dim, DataError for an embedding that is zero or not
    finite.

    A fast float32 pass keeps every clip that its rounding error could hide among the first k; these are scored again in
    float64, each on its own. So neither the neighbours of a clip nor the linear algebra library can change its score.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ConfigError(f"search: k must be a whole number of at least 1, found {k!r}.")
    query = checked(text_embedding, index.dim)
    query = query / np.linalg.norm(query)
    candidates = _candidates(index.embeddings, query.astype(np.float32), k)
    scores = (index.embeddings[candidates].astype(np.float64) * query).sum(axis=1)
    order = np.lexsort((candidates, -scores))[:k]  # ties: the earlier clip first
    rows = index.clips.take(candidates[order]).to_pylist()
    return [_hit(rank, row, float(scores[i])) for rank, (row, i) in enumerate(zip(rows, order, strict=True), 1)]


def checked(text_embedding: npt.ArrayLike, dim: int) -> npt.NDArray[np.float64]:
    """The embedding as it is. Raises ConfigError where it is not (dim,), DataError where it has no direction."""
    text = np.asarray(text_embedding, np.float64)
    if text.shape != (dim,):
        raise ConfigError(
            f"search: the text embedding has shape {text.shape}, the index holds vectors of ({dim},). "
            "Embed the text with the model that made the index."
        )
    norm = float(np.linalg.norm(text))
    if not np.isfinite(norm) or norm == 0:
        raise DataError("search: the text embedding is zero or not finite, so it has no direction.")
    return text


def _candidates(embeddings: npt.NDArray[np.float32], query: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Every row that could be among the k best, ascending: all but those further below than rounding explains."""
    rough = np.concatenate([embeddings[i : i + ROWS] @ query for i in range(0, len(embeddings), ROWS)])
    if k >= len(rough):
        return np.arange(len(rough))
    kth = np.partition(rough, len(rough) - k)[len(rough) - k]
    slack = 4 * len(query) * np.finfo(np.float32).eps  # both scores may be off by dim * eps / 2, and the query by eps
    return np.flatnonzero(rough >= kth - slack)


def _hit(rank: int, row: dict[str, Any], score: float) -> Hit:
    clip_id, captions = row.pop("clip_id"), row.pop("captions", None)
    return Hit(rank, clip_id, min(max(score, -1.0), 1.0), tuple(captions or ()), row)
