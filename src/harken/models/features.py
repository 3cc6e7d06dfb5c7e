"""What every audio encoder returns, which part of a batch it returns, and the precision of similarities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AudioFeatures:
    """One clip as one vector and as a sequence of vectors.

    `summary` is the encoder's own one-vector output (the CLS projection of a transformer), None where it has none.
    `frames` is the output over time, before any time pooling. `mask` is True where a frame is made of audio alone and
    False where it is padding; pooling ignores the False ones.
    """

    summary: Float[Tensor, "clip dim"] | None
    frames: Float[Tensor, "clip frame dim"]
    mask: Bool[Tensor, "clip frame"]


class Part(NamedTuple):
    """Which clips of a batch are here, where several processes share one: those from `first` on, of `of` in all."""

    first: int
    of: int


def full(x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """`x` in float32 at least. Half precision holds a cosine to two or three digits; softmax at 1 / 0.07 needs more."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which autocast lowers nothing on `x`'s device."""
    return torch.autocast(x.device.type, enabled=False)
