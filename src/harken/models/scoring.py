"""Full similarity matrices in tiles, at any size, exactly.

TAP never needs its pooled vectors. Attention rows sum to one, so LN_o's centring can be done once on each frame's
value, its variance and the cosine's norm are quadratic forms of the attention row, and what is left per (text, clip)
pair is arithmetic on T weights instead of on `dim` numbers: an eleventh of the multiplications at T = 31, dim = 1024,
and no (text, clip, dim) tensor, which for AudioCaps would take 17.5 GB.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from harken.models.features import full, full_precision
from harken.models.pooling import Pooling, TextAwareAttention, cosine_similarity

Scores = Float[Tensor, "text clip"]


@runtime_checkable
class ClipIndex(Protocol):
    """What scoring keeps of some clips: all that a text must meet."""

    def score(self, texts: Float[Tensor, "text dim"]) -> Scores: ...


class VectorIndex:
    """Clips under a text-agnostic pooling: one vector each."""

    def __init__(self, pooling: Pooling, frames: Tensor, mask: Tensor) -> None:
        self.pooled = pooling(frames, mask, frames.new_zeros(1, frames.shape[-1]))

    def score(self, texts: Float[Tensor, "text dim"]) -> Scores:
        return cosine_similarity(texts, self.pooled)


class NaiveIndex:
    """Clips under any pooling, by its own forward pass: (clip, text, dim) is built."""

    def __init__(self, pooling: Pooling, frames: Tensor, mask: Tensor) -> None:
        self.pooling, self.frames, self.mask = pooling, frames, mask

    def score(self, texts: Float[Tensor, "text dim"]) -> Scores:
        return cosine_similarity(texts, self.pooling(self.frames, self.mask, texts))


class TapIndex:
    """Clips under TAP, in Gram form. Differentiable; in float32 at least, also under autocast.

        Ũ = U - mean_D(U),  U = V W_O      G = Ũ Ũᵀ / D      H = Ũ diag(γ²) Ũᵀ      h = Ũ (γ∘β)
        σ² = wᵀ G w + eps       c·z = (w · Ũ (γ∘c)) / σ + c·β       |z|² = wᵀ H w / σ² + 2 w·h / σ + β·β

    for an attention row w; γ, β and eps are LN_o's.
    """

    def __init__(self, pooling: TextAwareAttention, frames: Tensor, mask: Tensor) -> None:
        self.pooling = pooling
        with full_precision(frames):
            frames = full(frames)
            if pooling.key_mask:
                frames = frames.masked_fill(~mask[..., None], 0)
            gain, shift = pooling.ln_out.weight, pooling.ln_out.bias
            normed = pooling.ln_audio(frames)
            self.keys = pooling.key(normed)
            values = pooling.out(pooling.value(normed))
            self.values = values - values.mean(-1, keepdim=True)
            scaled = self.values * gain
            gram = self.values @ self.values.transpose(1, 2) / self.values.shape[-1]
            self.grams = torch.cat([gram, scaled @ scaled.transpose(1, 2)], dim=1)  # G over H: (clip, 2T, T)
            self.cross = scaled @ shift
            self.padding = ~mask if pooling.key_mask else torch.zeros_like(mask)

    def score(self, texts: Float[Tensor, "text dim"]) -> Scores:
        with full_precision(texts):
            tap, texts = self.pooling, full(texts)
            gain, shift, eps = tap.ln_out.weight, tap.ln_out.bias, tap.ln_out.eps
            n_clips, n_frames, _ = self.keys.shape
            # (clip, frame, text) throughout: every product below then runs on contiguous memory
            logits = (self.keys.flatten(0, 1) @ tap.queries(texts).T).view(n_clips, n_frames, -1)
            row = torch.softmax(logits.masked_fill(self.padding[..., None], -torch.inf), dim=1)
            variance, norm = (self.grams @ row).view(n_clips, 2, n_frames, -1).mul(row[:, None]).sum(2).unbind(1)
            inverse = (variance.clamp_min(0) + eps).rsqrt()
            aligned = (self.values.flatten(0, 1) @ (texts * gain).T).view(n_clips, n_frames, -1)
            numerator = (aligned * row).sum(1) * inverse + texts @ shift
            cross = (self.cross[..., None] * row).sum(1)
            norm = norm * inverse**2 + 2 * cross * inverse + shift @ shift
            # both norms are bounded from below as F.normalize bounds them, so that the naive path agrees at zero too
            length = norm.clamp_min(1e-24).sqrt() * texts.norm(dim=-1).clamp_min(1e-12)
            return (numerator / length).T


def index_clips(
    pooling: Pooling, frames: Float[Tensor, "clip frame dim"], mask: Bool[Tensor, "clip frame"]
) -> ClipIndex:
    """What to keep of these clips so that texts can be scored against them, in the cheapest exact form."""
    if isinstance(pooling, TextAwareAttention):
        return TapIndex(pooling, frames, mask)
    # a pooling from elsewhere that does not say is taken as text-aware: slower, never wrong
    return (
        NaiveIndex(pooling, frames, mask)
        if getattr(pooling, "is_text_aware", True)
        else VectorIndex(pooling, frames, mask)
    )


def score_matrix(
    texts: Float[Tensor, "text dim"],
    frames: Float[Tensor, "clip frame dim"],
    mask: Bool[Tensor, "clip frame"],
    pooling: Pooling,
    *,
    text_chunk: int = 512,
    clip_chunk: int = 64,
) -> Scores:
    """Cosine similarity of every text with every clip, `text_chunk` x `clip_chunk` at a time.

    Exact: chunk sizes change speed and memory alone. Differentiable, so training may use it too. `frames` may lie in
    main memory while `texts` and `pooling` are on an accelerator: each chunk is moved there as it is needed.
    """
    columns = []
    for clips in range(0, len(frames), clip_chunk):
        part = slice(clips, clips + clip_chunk)
        index = index_clips(pooling, frames[part].to(texts.device), mask[part].to(texts.device))
        columns.append(torch.cat([index.score(chunk) for chunk in torch.split(texts, text_chunk)]))
    return torch.cat(columns, dim=1)
