"""Which image goes with the audio: audio and the images of each clip to a square similarity matrix.

A match is `(audio, images (clip, image, dim), epoch, generator) -> (clip, clip)`: rows are image sides, columns audio
clips, entries plain cosines in float32 at least (the learnable scale is the loss's business). `match.chosen` then holds
the index of the image each clip was matched with, None where all of them were. Image embeddings are frozen, audio
carries the gradient.

It has two steps, for batches that are nowhere in one piece: `sides` makes of each clip's audio and images what the
others need of it, whoever they are, and `similarity` compares any rows of the one with any rows of the other. A block
of the matrix is thus made by whoever holds its clips:

    match           image side                                  audio side
    random_image    the unit image drawn, (clip, dim)           unit audio, (clip, dim)
    nearest_image   the same, or the nearest unit image         the same
      all_pairs     after warming up all of them, unit each,    the same
                    (clip, image, dim)
    multiframe      its images end to end, one unit vector      its segments end to end, one unit vector
                    (clip, image * dim)                         (clip, image * dim)
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
from harken.models.features import Part, full, full_precision

Audio = Float[Tensor, "clip dim"]
Images = Float[Tensor, "clip image dim"]
Either = Float[Tensor, "..."]  # what a match is given: it checks the shape itself, and says what it should be
Similarity = Float[Tensor, "clip clip"]
Chosen = Int[Tensor, " clip"]
ImageSide = Float[Tensor, "row *image dim"]
AudioSide = Float[Tensor, "column dim"]
Sides = tuple[Float[Tensor, "clip *image dim"], Float[Tensor, "clip dim"]]
Block = Float[Tensor, "row column"]


@runtime_checkable
class Match(Protocol):
    """`epoch` counts from 0; `generator` is needed only where an image is drawn at random."""

    chosen: Tensor | None

    def sides(
        self,
        audio: Either,
        images: Either,
        epoch: int,
        generator: torch.Generator | None = None,
        part: Part | None = None,
    ) -> Sides:
        """The image side and the audio side of these clips, one row a clip, all that `similarity` needs of them.

        `part` says which clips of a shared batch they are: then a draw is made for the whole batch and theirs are
        taken of it, so that every part chooses, and leaves its generator, as one process with all of the clips does
        (each in one call: a second one would draw anew).

        Raises DataError for shapes that do not fit, ConfigError without a generator where an image is drawn or where
        the clips do not lie in their batch.
        """
        ...

    def similarity(self, image_side: ImageSide, audio_side: AudioSide) -> Block:
        """Cosines of the clips of an image side (rows) with those of an audio side, other clips or the same.

        The sides may come from different calls and in different numbers, of one epoch. In float32 at least.
        """
        return _cosines(image_side, audio_side)

    def __call__(
        self, audio: Either, images: Either, epoch: int, generator: torch.Generator | None = None
    ) -> Similarity:
        """The whole matrix of a batch that is here in one piece; raises what `sides` does."""
        return self.similarity(*self.sides(audio, images, epoch, generator))


def draw_images(images: Images, generator: torch.Generator | None, part: Part | None = None) -> Chosen:
    """A uniform image index for every clip; of a `part`, its slice of the draw for the whole batch.

    Raises ConfigError without a generator, for nothing here is random globally, and where the clips do not lie in
    their batch.
    """
    if generator is None:
        raise ConfigError("random images need a generator: call match(audio, images, epoch, generator).")
    n_clips, n_images, _ = images.shape
    first, of = part or (0, n_clips)
    if first < 0 or first + n_clips > of:
        raise ConfigError(f"random images: {n_clips} clips from {first} on do not lie in a batch of {of}: {part}.")
    drawn = torch.randint(n_images, (of,), generator=generator, device=generator.device)
    return drawn[first : first + n_clips].to(images.device)


def nearest_images(audio: Audio, images: Images) -> Chosen:
    """The image of each clip with the highest cosine to its audio; the earliest of equals. No gradient."""
    with torch.no_grad(), full_precision(audio):
        return torch.einsum("cd,cld->cl", *_units(audio, images)).argmax(1)


def pair_similarity(audio: Audio, images: Images, chosen: Chosen) -> Similarity:
    """cos of every clip's chosen image (rows) with every clip's audio (columns)."""
    return _cosines(*_chosen_sides(audio, images, chosen))


def _chosen_sides(audio: Audio, images: Images, chosen: Chosen) -> Sides:
    """The chosen image of each clip and its audio, both of unit length."""
    picked = images[torch.arange(len(images), device=images.device), chosen]
    with full_precision(audio):
        audio, picked = _units(audio, picked)
        return picked, audio


def _cosines(image_side: ImageSide, audio_side: AudioSide) -> Block:
    """Products of unit vectors; of a row with several images, the largest."""
    with full_precision(audio_side):
        audio_side = full(audio_side)
        image_side = image_side.to(audio_side.dtype)
        if image_side.ndim == 2:
            return image_side @ audio_side.T
        return torch.einsum("qd,kld->kql", audio_side, image_side).amax(-1)


def _units(audio: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Both L2-normalised along the last axis, in the audio's precision but float32 at least."""
    audio = full(audio)
    return F.normalize(audio, dim=-1), F.normalize(images.to(audio.dtype), dim=-1)


def _check(name: str, audio: Tensor, images: Tensor, ndim: int) -> None:
    wanted = "(clip, dim)" if ndim == 2 else "(clip, image, dim), as many segments as images"
    if audio.ndim != ndim or len(audio) != len(images) or (ndim == 3 and audio.shape != images.shape):
        raise DataError(f"{name}: audio is {tuple(audio.shape)}, images {tuple(images.shape)}; audio must be {wanted}.")


@dataclass
class RandomImage(Match):
    """One image of each clip, drawn anew at every step (VIP-ANT, Zhao et al. 2022)."""

    chosen: Tensor | None = field(default=None, init=False, repr=False)

    def sides(
        self,
        audio: Either,
        images: Either,
        epoch: int,
        generator: torch.Generator | None = None,
        part: Part | None = None,
    ) -> Sides:
        """The drawn image and the audio, unit vectors (clip, dim). See Match.sides."""
        _check("random_image", audio, images, 2)
        self.chosen = draw_images(images, generator, part)
        return _chosen_sides(audio, images, self.chosen)


@dataclass
class NearestImage(Match):
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

    def sides(
        self,
        audio: Either,
        images: Either,
        epoch: int,
        generator: torch.Generator | None = None,
        part: Part | None = None,
    ) -> Sides:
        """The chosen image, or all of them where every pair chooses, and the audio, unit vectors. See Match.sides."""
        _check("nearest_image", audio, images, 2)
        if epoch < self.n_warmup:
            self.chosen = draw_images(images, generator, part)
            return _chosen_sides(audio, images, self.chosen)
        self.chosen = nearest_images(audio, images)
        if self.scope == "own_clip":
            return _chosen_sides(audio, images, self.chosen)
        with full_precision(audio):
            audio, images = _units(audio, images)
            return images, audio


@dataclass
class Multiframe(Match):
    """Multiframe Match (Tsubaki et al. 2024, eq. 4): all images against as many audio segments, flattened.

    sim(a, i) = cos(flatten(a_all), flatten(i_all)). `row_norm` L2-normalises each segment and image first, which makes
    it the mean of the cosines of segment l and image l; eq. 4 as printed weighs them by their norms.
    """

    row_norm: bool = False
    chosen: Tensor | None = field(default=None, init=False, repr=False)

    def sides(
        self,
        audio: Either,
        images: Either,
        epoch: int,
        generator: torch.Generator | None = None,
        part: Part | None = None,
    ) -> Sides:
        """All images and all segments of a clip end to end, unit vectors (clip, image * dim). See Match.sides."""
        _check("multiframe", audio, images, 3)
        with full_precision(audio):
            if self.row_norm:
                audio, images = _units(audio, images)
            audio, images = _units(audio.flatten(1), images.flatten(1))
            return images, audio


MATCHES: dict[str, Callable[..., Match]] = {
    "random_image": RandomImage,
    "nearest_image": NearestImage,
    "multiframe": Multiframe,
}
