"""Which image goes with the audio: audio and the images of each clip to a square similarity matrix.

A match is `(audio, images (clip, image, dim), epoch, generator) -> (clip, clip)`: rows are image sides, columns audio
clips, entries plain cosines in float32 at least (the learnable scale is the loss's business). `match.chosen` then holds
the index of the image each clip was matched with, None where all of them were. Image embeddings are frozen, audio
carries the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from harken.errors import ConfigError, DataError, unknown
from harken.models.features import full, full_precision

Audio = Float[Tensor, "clip dim"]
Images = Float[Tensor, "clip image dim"]
Either = Float[Tensor, "..."]  # what a match is given: it checks the shape itself, and says what it should be
Similarity = Float[Tensor, "clip clip"]
Chosen = Int[Tensor, " clip"]


@runtime_checkable
class Match(Protocol):
    """`epoch` counts from 0; `generator` is needed only where an image is drawn at random."""

    chosen: Tensor | None

    def __call__(
        self, audio: Either, images: Either, epoch: int, generator: torch.Generator | None = None
    ) -> Similarity: ...


def draw_images(images: Images, generator: torch.Generator | None) -> Chosen:
    """A uniform image index for every clip. Raises ConfigError without a generator: nothing here is random globally."""
    if generator is None:
        raise ConfigError("random images need a generator: call match(audio, images, epoch, generator).")
    n_clips, n_images, _ = images.shape
    return torch.randint(n_images, (n_clips,), generator=generator, device=generator.device).to(images.device)


def nearest_images(audio: Audio, images: Images) -> Chosen:
    """The image of each clip with the highest cosine to its audio; the earliest of equals. No gradient."""
    with torch.no_grad(), full_precision(audio):
        return torch.einsum("cd,cld->cl", *_units(audio, images)).argmax(1)


def pair_similarity(audio: Audio, images: Images, chosen: Chosen) -> Similarity:
    """cos of every clip's chosen image (rows) with every clip's audio (columns)."""
    picked = images[torch.arange(len(images), device=images.device), chosen]
    with full_precision(audio):
        audio, picked = _units(audio, picked)
        return picked @ audio.T


def _units(audio: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Both L2-normalised along the last axis, in the audio's precision but float32 at least."""
    audio = full(audio)
    return F.normalize(audio, dim=-1), F.normalize(images.to(audio.dtype), dim=-1)


def _check(name: str, audio: Tensor, images: Tensor, ndim: int) -> None:
    wanted = "(clip, dim)" if ndim == 2 else "(clip, image, dim), as many segments as images"
    if audio.ndim != ndim or len(audio) != len(images) or (ndim == 3 and audio.shape != images.shape):
        raise DataError(f"{name}: audio is {tuple(audio.shape)}, images {tuple(images.shape)}; audio must be {wanted}.")


@dataclass
class RandomImage:
    """One image of each clip, drawn anew at every step (VIP-ANT, Zhao et al. 2022)."""

    chosen: Tensor | None = field(default=None, init=False, repr=False)

    def __call__(
        self, audio: Either, images: Either, epoch: int, generator: torch.Generator | None = None
    ) -> Similarity:
        _check("random_image", audio, images, 2)
        self.chosen = draw_images(images, generator)
        return pair_similarity(audio, images, self.chosen)


@dataclass
class NearestImage:
    """Nearest Match (Tsubaki et al. 2024, eq. 3): random for `n_warmup` epochs, then the image most like the audio.

    `epoch` counts from 0. Scope `own_clip`: each clip's nearest image stands for it, as its own positive and as the
    other clips' negative. Scope `all_pairs`, eq. 3 to the letter: every pair of clips uses the nearest of the row's
    images, S[k, q] = max_l cos(a_q, i_{k,l}); `chosen` is then the choice on the diagonal.
    """

    n_warmup: int
    scope: str = "own_clip"
    chosen: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.scope not in ("own_clip", "all_pairs"):
            raise unknown("nearest_image: scope", self.scope, ("own_clip", "all_pairs"))

    def __call__(
        self, audio: Either, images: Either, epoch: int, generator: torch.Generator | None = None
    ) -> Similarity:
        _check("nearest_image", audio, images, 2)
        if epoch < self.n_warmup:
            self.chosen = draw_images(images, generator)
            return pair_similarity(audio, images, self.chosen)
        self.chosen = nearest_images(audio, images)
        if self.scope == "own_clip":
            return pair_similarity(audio, images, self.chosen)
        with full_precision(audio):
            return torch.einsum("qd,kld->kql", *_units(audio, images)).amax(-1)


@dataclass
class Multiframe:
    """Multiframe Match (Tsubaki et al. 2024, eq. 4): all images against as many audio segments, flattened.

    sim(a, i) = cos(flatten(a_all), flatten(i_all)). `row_norm` L2-normalises each segment and image first, which makes
    it the mean of the cosines of segment l and image l; eq. 4 as printed weighs them by their norms.
    """

    row_norm: bool = False
    chosen: Tensor | None = field(default=None, init=False, repr=False)

    def __call__(
        self, audio: Either, images: Either, epoch: int, generator: torch.Generator | None = None
    ) -> Similarity:
        _check("multiframe", audio, images, 3)
        with full_precision(audio):
            if self.row_norm:
                audio, images = _units(audio, images)
            audio, images = _units(audio.flatten(1), images.flatten(1))
            return images @ audio.T


MATCHES: dict[str, Callable[..., Match]] = {
    "random_image": RandomImage,
    "nearest_image": NearestImage,
    "multiframe": Multiframe,
}
