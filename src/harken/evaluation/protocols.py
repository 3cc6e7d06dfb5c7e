"""Who asks whom: from embeddings or a similarity matrix to queries, items and what is relevant.

A similarity matrix is (other, clip): columns are audio clips, rows texts or images. Rows are read for `t2a` and `i2a`,
columns for `a2t` and `a2i`. A protocol has a name because the choice moves R@1 by more than most methods do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from harken.errors import ConfigError, DataError

Matrix = npt.NDArray[np.floating]


class Retrieval(NamedTuple):
    """A retrieval task: scores (query, item), each query's relevant items, and the clip of each query (query,).

    The clip is what the bootstrap resamples: five captions of a clip are one observation, not five.
    """

    scores: Matrix
    relevant: Sequence[npt.NDArray[np.int64]]
    clip: npt.NDArray[np.int64]


def text_to_audio(sim: npt.ArrayLike, clip_of_text: npt.ArrayLike) -> Retrieval:
    """Every caption asks for its clip: 5N queries over N clips where each clip has five captions.

    sim: (text, clip). clip_of_text: (text,) the column of each caption's clip. Raises ConfigError for shapes that do
    not fit and for a caption whose clip is not in the gallery.
    """
    matrix, owner = _texts(sim, clip_of_text)
    return Retrieval(matrix, [owner[i : i + 1] for i in range(len(owner))], owner)


def audio_to_text(sim: npt.ArrayLike, clip_of_text: npt.ArrayLike) -> Retrieval:
    """Every clip asks for its captions among all captions; the best-ranked of them counts (best of five).

    sim: (text, clip). clip_of_text: (text,). Raises as `text_to_audio`, and DataError for a clip without captions.
    """
    matrix, owner = _texts(sim, clip_of_text)
    n_clips = matrix.shape[1]
    order = np.argsort(owner, kind="stable")
    counts = _caption_counts(owner, n_clips)
    return Retrieval(matrix.T, np.split(order, np.cumsum(counts)[:-1]), np.arange(n_clips))


def audio_to_text_grouped(sim: npt.ArrayLike, clip_of_text: npt.ArrayLike) -> Retrieval:
    """Every clip asks for its group of captions among N groups, a group scoring as its best caption.

    The R@1 is that of `audio_to_text`; R@5 and R@10 are higher, because rivals of one clip take one place, not up to
    five (the reading of X-Pool). Never put it in one column with `audio_to_text`.
    """
    matrix, owner = _texts(sim, clip_of_text)
    n_clips = matrix.shape[1]
    counts = _caption_counts(owner, n_clips)
    order = np.argsort(owner, kind="stable")
    grouped = np.maximum.reduceat(matrix[order], np.cumsum(counts) - counts, axis=0)
    return Retrieval(grouped.T, *_diagonal(n_clips))


def dual_softmax(sim: npt.ArrayLike, prior_scale: float) -> tuple[Matrix, Matrix]:
    """`sim` revised by the prior of the other direction, for t2a and for a2t: DSL's inference (Cheng et al. 2021).

        t2a: sim ∘ softmax(ω sim) down each column     a2t: sim ∘ softmax(ω sim) along each row

    Transductive: a query's answer depends on all the other queries, which a search does not have. It adds points to any
    model; never put it in one row with plain similarity. Raises ConfigError for a scale that is not positive.
    """
    if not prior_scale > 0:
        raise ConfigError(f"dual_softmax: prior_scale is {prior_scale}; it must be above 0, such as 1 / temperature.")
    matrix = np.asarray(sim, np.float64)
    found = []
    for axis in (0, 1):
        logits = prior_scale * (matrix - matrix.max(axis, keepdims=True))
        prior = np.exp(logits)
        found.append(matrix * (prior / prior.sum(axis, keepdims=True)))
    return found[0], found[1]


def image_to_audio(sim: npt.ArrayLike) -> Retrieval:
    """Every clip's images ask for its audio. sim: (clip of the images, clip of the audio), square."""
    matrix = _square(sim)
    return Retrieval(matrix, *_diagonal(len(matrix)))


def audio_to_image(sim: npt.ArrayLike) -> Retrieval:
    """Every clip's audio asks for its images. sim: (clip of the images, clip of the audio), square."""
    matrix = _square(sim)
    return Retrieval(matrix.T, *_diagonal(len(matrix)))


def mid(audio: npt.ArrayLike, images: npt.ArrayLike) -> Matrix:
    """Cosine of the audio and the middle image (index (L - 1) // 2, so 1 of 4): VIP-ANT's and Nearest Match's protocol.

    audio: (clip, dim), or (clip, L, dim) with one segment for each image, of which the middle one is taken.
    images: (clip, L, dim). Returns (clip of the images, clip of the audio). Raises ConfigError for shapes that do not
    fit and DataError for an embedding that is zero or not finite; so do the other protocols.
    """
    a, v = _pairs(audio, images)
    middle = (v.shape[1] - 1) // 2
    return _unit(v[:, middle], "images") @ _unit(a[:, middle], "audio").T


def max_image(audio: npt.ArrayLike, images: npt.ArrayLike) -> Matrix:
    """The largest over the L images of the cosine with the audio, or with the audio segment of the same index.

    Shapes as for `mid`.
    """
    a, v = (_unit(x, name) for x, name in zip(_pairs(audio, images), ("audio", "images"), strict=True))
    best = v[:, 0] @ a[:, 0].T
    for i in range(1, v.shape[1]):
        np.maximum(best, v[:, i] @ a[:, i].T, out=best)
    return best


def mean_image(audio: npt.ArrayLike, images: npt.ArrayLike) -> Matrix:
    """The mean over the L images of the cosine with the audio, or with the audio segment of the same index.

    Shapes as for `mid`.
    """
    a, v = (_unit(x, name) for x, name in zip(_pairs(audio, images), ("audio", "images"), strict=True))
    sim: Matrix = _unfold(v) @ _unfold(a).T / v.shape[1]
    return sim


def flatten(audio: npt.ArrayLike, images: npt.ArrayLike) -> Matrix:
    """Cosine of the L images laid end to end and the L audio segments laid end to end: Multiframe Match's protocol.

    Rows are not normalised before they are laid out, as Eq. 4 of Tsubaki et al. (2024) has it. A single audio vector
    stands for each of the L segments. Shapes as for `mid`.
    """
    a, v = _pairs(audio, images)
    return _unit(_unfold(v), "images") @ _unit(_unfold(a), "audio").T


PROTOCOLS: dict[str, Callable[[npt.ArrayLike, npt.ArrayLike], Matrix]] = {
    "mid": mid,
    "max": max_image,
    "mean": mean_image,
    "flatten": flatten,
}


def _diagonal(n: int) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    clips = np.arange(n)
    return [clips[i : i + 1] for i in range(n)], clips


def _square(sim: npt.ArrayLike) -> Matrix:
    matrix = np.asarray(sim)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ConfigError(f"sim: expected (clip, clip), rows of images and columns of audio, found {matrix.shape}.")
    return matrix


def _texts(sim: npt.ArrayLike, clip_of_text: npt.ArrayLike) -> tuple[Matrix, npt.NDArray[np.int64]]:
    matrix, owner = np.asarray(sim), np.asarray(clip_of_text)
    if matrix.ndim != 2 or owner.shape != matrix.shape[:1] or not np.issubdtype(owner.dtype, np.integer):
        raise ConfigError(
            f"expected sim (text, clip) and clip_of_text (text,) of integers, found {matrix.shape} and "
            f"{owner.shape} of {owner.dtype}."
        )
    if owner.size == 0 or owner.min() < 0 or owner.max() >= matrix.shape[1]:
        raise ConfigError(f"clip_of_text: every caption's clip must be a column of sim, 0 .. {matrix.shape[1] - 1}.")
    return matrix, owner.astype(np.int64)


def _caption_counts(owner: npt.NDArray[np.int64], n_clips: int) -> npt.NDArray[np.int64]:
    counts = np.bincount(owner, minlength=n_clips)
    if counts.min() == 0:
        raise DataError(f"clip {int(counts.argmin())} of the gallery has no caption, so it cannot ask. Leave it out.")
    return counts


def _pairs(audio: npt.ArrayLike, images: npt.ArrayLike) -> tuple[Matrix, Matrix]:
    """Audio as (clip, L, dim), a single vector repeated for each image, and images (clip, L, dim)."""
    a, v = np.asarray(audio), np.asarray(images)
    if v.ndim == 3 and a.ndim == 2:
        a = np.broadcast_to(a[:, None, :], (a.shape[0], v.shape[1], a.shape[1]))
    if v.ndim != 3 or a.shape != v.shape or 0 in v.shape:
        raise ConfigError(
            "expected images (clip, L, dim) and audio (clip, dim) or (clip, L, dim) of the same clips, "
            f"found images {v.shape} and audio {np.shape(audio)}."
        )
    return a, v


def _unfold(x: Matrix) -> Matrix:
    return x.reshape(len(x), -1)


def _unit(x: Matrix, name: str) -> Matrix:
    wide = x.astype(np.result_type(x.dtype, np.float32), copy=False)  # float16 squares overflow
    norm = np.linalg.norm(wide, axis=-1, keepdims=True)
    bad = ~(np.isfinite(norm) & (norm > 0))
    if bad.any():
        raise DataError(f"{name}: clip {int(np.argwhere(bad)[0][0])} has a zero or non-finite embedding: no cosine.")
    unit: Matrix = wide / norm
    return unit
