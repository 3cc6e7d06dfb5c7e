"""Full similarity matrices in tiles, at any size, exactly, and their gradients in the memory of a few tiles.

TAP never needs its pooled vectors. Attention rows sum to one, so LN_o's centring can be done once on each frame's
value, its variance and the cosine's norm are quadratic forms of the attention row, and what is left per (text, clip)
pair is arithmetic on T weights instead of on `dim` numbers: a sixteenth of its multiplications at T = 31, dim = 1024,
dp = 512, and no (text, clip, dim) tensor, which for AudioCaps would take 17.5 GB.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harken.models.features import full, full_precision
from harken.models.pooling import (
    MaxSim,
    Pooling,
    TextAwareAttention,
    XPool,
    best_frames,
    cosine_similarity,
    require_frames,
)

Texts = Float[Tensor, "text dim"]
Scores = Float[Tensor, "text clip"]
Rows = Float[Tensor, "clip frame text"]
Pairs = Float[Tensor, "clip text"]


@runtime_checkable
class ClipIndex(Protocol):
    """What scoring keeps of some clips: all that a text must meet."""

    def score(self, texts: Texts) -> Scores: ...

    def meet(self, *prepared: Tensor) -> Scores:
        """The same, of what `prepare` made of the texts."""
        ...


class VectorIndex:
    """Clips under a text-agnostic pooling: one vector each."""

    def __init__(self, pooling: Pooling, frames: Tensor, mask: Tensor) -> None:
        self.pooled = pooling(frames, mask, frames.new_zeros(1, frames.shape[-1]))

    def score(self, texts: Texts) -> Scores:
        return cosine_similarity(texts, self.pooled)

    def meet(self, *prepared: Tensor) -> Scores:
        return self.score(*prepared)


class NaiveIndex:
    """Clips under any pooling, by its own forward pass: (clip, text, dim) is built."""

    def __init__(self, pooling: Pooling, frames: Tensor, mask: Tensor) -> None:
        self.pooling, self.frames, self.mask = pooling, frames, mask

    def score(self, texts: Texts) -> Scores:
        return cosine_similarity(texts, self.pooling(self.frames, self.mask, texts))

    def meet(self, *prepared: Tensor) -> Scores:
        return self.score(*prepared)


class MaxSimIndex:
    """Clips under MaxSim: the largest cosine itself, without fetching the frame that it is of."""

    def __init__(self, pooling: MaxSim, frames: Tensor, mask: Tensor) -> None:
        require_frames(mask)
        self.frames, self.mask = frames, mask

    def score(self, texts: Texts) -> Scores:
        return best_frames(self.frames, self.mask, texts)[0].T

    def meet(self, *prepared: Tensor) -> Scores:
        return self.score(*prepared)


class TapIndex:
    """Clips under TAP, in Gram form. Differentiable; in float32 at least, also under autocast.

        V = LN(c_a) W_V     Ũ = C(V W_O + b_O)     G = Ũ Ũᵀ / D      H = Ũ diag(γ²) Ũᵀ      h = Ũ (γ∘β)
        σ² = wᵀ G w + eps       c·z = (w · Ũ (γ∘c)) / σ + c·β       |z|² = wᵀ H w / σ² + 2 w·h / σ + β·β

    for a text c of unit length and its attention row w; γ, β and eps are LN_o's, C subtracts the mean over D. Ũ (γ∘c)
    is taken as V (W_O C (γ∘c)): for each frame and text a product over dp numbers, not over D. In float32 a cosine is
    off by 1e-7, as it is by the equations as printed; by 4e-5 where frames cancel to a two hundredth of their length.
    """

    def __init__(self, pooling: TextAwareAttention, frames: Tensor, mask: Tensor) -> None:
        self.pooling = pooling
        with full_precision(frames):
            self.attention = _Attention(pooling, frames, mask)
            self.grams, self.cross = _forms(self.attention.centred(), pooling.ln_out)

    def score(self, texts: Texts) -> Scores:
        return self.meet(*_prepare_tap(self.pooling, texts))

    def meet(self, *prepared: Tensor) -> Scores:
        queries, aims, offset, shift = prepared
        with full_precision(queries):
            row = self.attention.rows(queries)
            aligned = self.attention.read(row, aims) + offset
            return _cosine(row, self.grams, self.cross, aligned, shift, self.pooling.ln_out)


class XPoolIndex:
    """Clips under X-Pool's block without dropout, in Gram form: TAP's, with the residual folded in the same way.

        x = γ₂∘(Ũᵀw) / σ₂ + β₂     y = x + x W + b     z = LN₃(y)

    y is affine in (w / σ₂, 1), so LN₃'s variance and |z|² are quadratic forms of that row, which is one longer than w.
    """

    def __init__(self, pooling: XPool, frames: Tensor, mask: Tensor) -> None:
        self.pooling = pooling
        with full_precision(frames):
            self.attention = _Attention(pooling.tap, frames, mask)
            centred = self.attention.centred()
            self.spread = centred @ centred.transpose(1, 2) / centred.shape[-1]
            scaled = centred * pooling.tap.ln_out.weight
            moved = _centre(scaled + F.linear(scaled, pooling.fc.weight))
            at_zero = _centre(_without_frames(pooling)).expand(len(moved), 1, -1)
            self.grams, self.cross = _forms(torch.cat([moved, at_zero], dim=1), pooling.ln_fc)

    def score(self, texts: Texts) -> Scores:
        return self.meet(*_prepare_xpool(self.pooling, texts))

    def meet(self, *prepared: Tensor) -> Scores:
        queries, aims, offset, at_zero, shift = prepared
        with full_precision(queries):
            row = self.attention.rows(queries)
            inverse = _inverse_deviation(_quadratic(self.spread, row)[0], self.pooling.tap.ln_out)
            aligned = (self.attention.read(row, aims) + offset) * inverse + at_zero
            row = torch.cat([row * inverse[:, None], torch.ones_like(row[:, :1])], dim=1)
            return _cosine(row, self.grams, self.cross, aligned, shift, self.pooling.ln_fc)


class _Attention:
    """TAP's attention over some clips. (clip, frame, text) throughout: every product runs on contiguous memory."""

    def __init__(self, tap: TextAwareAttention, frames: Tensor, mask: Tensor) -> None:
        frames = full(frames)
        if tap.key_mask:
            require_frames(mask)
            frames = frames.masked_fill(~mask[..., None], 0)
        normed = tap.ln_audio(frames)
        self.tap, self.keys, self.values = tap, tap.key(normed), tap.value(normed)
        self.padding = ~mask[..., None] if tap.key_mask else None

    def centred(self) -> Float[Tensor, "clip frame dim"]:
        """Ũ."""
        return _centre(self.tap.out(self.values))

    def rows(self, queries: Float[Tensor, "text dp"]) -> Rows:
        """w of every pair."""
        logits = self._products(self.keys, queries)
        if self.padding is not None:
            logits = logits.masked_fill(self.padding, -torch.inf)
        return torch.softmax(logits, dim=1)

    def read(self, row: Rows, aims: Float[Tensor, "text dp"]) -> Pairs:
        """w · V aim of every pair."""
        return (self._products(self.values, aims) * row).sum(1)

    @staticmethod
    def _products(frames: Float[Tensor, "clip frame dp"], texts: Float[Tensor, "text dp"]) -> Rows:
        return (frames.flatten(0, 1) @ texts.T).view(*frames.shape[:2], -1)


def _prepare_tap(tap: TextAwareAttention, texts: Texts) -> tuple[Tensor, ...]:
    """Q / √d_p, what of V and of b_O meets the text, and c·β."""
    with full_precision(texts):
        texts = full(texts)
        unit = F.normalize(texts, dim=-1)
        return tap.queries(texts), *_aims(tap, unit * tap.ln_out.weight), unit @ tap.ln_out.bias


def _prepare_xpool(pooling: XPool, texts: Texts) -> tuple[Tensor, ...]:
    """As `_prepare_tap`, with what meets the text of the part of y that no frame changes, and c·β₃ for c·β."""
    tap = pooling.tap
    with full_precision(texts):
        texts = full(texts)
        unit = F.normalize(texts, dim=-1)
        aim = _centre(unit * pooling.ln_fc.weight)
        through = (aim + aim @ pooling.fc.weight) * tap.ln_out.weight
        at_zero = aim @ _without_frames(pooling)
        return tap.queries(texts), *_aims(tap, through), at_zero, unit @ pooling.ln_fc.bias


def _aims(tap: TextAwareAttention, direction: Texts) -> tuple[Float[Tensor, "text dp"], Float[Tensor, " text"]]:
    """What V and what 1 must be multiplied by to give Ũ · direction in sum."""
    direction = _centre(direction)
    of_bias = direction.new_zeros(len(direction)) if tap.out.bias is None else direction @ tap.out.bias
    return direction @ tap.out.weight, of_bias


def _without_frames(pooling: XPool) -> Float[Tensor, " dim"]:
    """y where Ũᵀw is zero."""
    shift = pooling.tap.ln_out.bias
    return shift + pooling.fc(shift)


def _centre(x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    return x - x.mean(-1, keepdim=True)


def _forms(
    centred: Float[Tensor, "clip frame dim"], ln: nn.LayerNorm
) -> tuple[Float[Tensor, "clip two_frames frame"], Float[Tensor, "clip frame"]]:
    """G over H, and h."""
    scaled = centred * ln.weight
    gram = centred @ centred.transpose(1, 2) / centred.shape[-1]
    return torch.cat([gram, scaled @ scaled.transpose(1, 2)], dim=1), scaled @ ln.bias


def _quadratic(grams: Float[Tensor, "clip some_frames frame"], row: Rows) -> tuple[Pairs, ...]:
    """wᵀ G w of every pair, for each G of the ones over one another that `grams` is made of."""
    n_clips, n_frames, n_texts = row.shape
    forms = (grams @ row).view(n_clips, -1, n_frames, n_texts)
    return forms.mul(row[:, None]).sum(2).unbind(1)


def _inverse_deviation(variance: Pairs, ln: nn.LayerNorm) -> Pairs:
    return (variance.clamp_min(0) + ln.eps).rsqrt()


def _cosine(row: Rows, grams: Tensor, cross: Tensor, aligned: Pairs, shift: Tensor, ln: nn.LayerNorm) -> Scores:
    """Cosines of unit texts with LN(y), from the forms of y's centred part and `aligned`, its product with γ∘c."""
    variance, norm = _quadratic(grams, row)
    inverse = _inverse_deviation(variance, ln)
    crossed = (cross[..., None] * row).sum(1)
    norm = norm * inverse**2 + 2 * crossed * inverse + ln.bias @ ln.bias
    # bounded from below as F.normalize bounds it, so that the naive path agrees at zero too
    return ((aligned * inverse + shift) / norm.clamp_min(1e-24).sqrt()).T


def _is_folded(pooling: Pooling) -> bool:
    """X-Pool's block, but for training: dropout acts on (clip, text, dim), and what it leaves cannot be folded."""
    return isinstance(pooling, XPool) and not (pooling.training and pooling.dropout.p)


def prepare(pooling: Pooling, texts: Texts) -> tuple[Tensor, ...]:
    """What any clips under this pooling must know of texts to `meet` them: tensors of one row a text."""
    if isinstance(pooling, TextAwareAttention):
        return _prepare_tap(pooling, texts)
    if isinstance(pooling, XPool) and _is_folded(pooling):
        return _prepare_xpool(pooling, texts)
    return (texts,)


def index_clips(
    pooling: Pooling, frames: Float[Tensor, "clip frame dim"], mask: Bool[Tensor, "clip frame"]
) -> ClipIndex:
    """What to keep of these clips so that texts can be scored against them, in the cheapest exact form.

    In float32 at least: frames of half precision are taken as the single precision numbers that they are.
    """
    frames = full(frames)
    if isinstance(pooling, TextAwareAttention):
        return TapIndex(pooling, frames, mask)
    if isinstance(pooling, XPool) and _is_folded(pooling):
        return XPoolIndex(pooling, frames, mask)
    if isinstance(pooling, MaxSim):
        return MaxSimIndex(pooling, frames, mask)
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

    Exact: chunk sizes change speed and memory alone. `frames` may lie in main memory while `texts` and `pooling` are on
    an accelerator: each chunk is moved there as it is needed.

    Differentiable. Under a text-aware pooling of ours, when there are several chunks of clips, none keeps what its
    gradient needs: the backward pass computes each again. Memory for a gradient is then that of all texts with one
    chunk of clips, some ten times text x `clip_chunk` x frame numbers, whatever the number of clips.
    """
    prepared = prepare(pooling, texts)

    def column(frames: Tensor, mask: Tensor, *prepared: Tensor) -> Scores:
        index = index_clips(pooling, frames.to(texts.device), mask.to(texts.device))
        chunks = zip(*(torch.split(p, text_chunk) for p in prepared), strict=True)
        return torch.cat([index.meet(*chunk) for chunk in chunks])

    # what is computed twice must have no memory: not so a pooling from elsewhere, nor NetRVLAD's batch norm
    if (
        torch.is_grad_enabled()
        and len(frames) > clip_chunk
        and isinstance(pooling, TextAwareAttention | XPool | MaxSim)
    ):
        column = partial(checkpoint, column, use_reentrant=False)
    parts = zip(torch.split(frames, clip_chunk), torch.split(mask, clip_chunk), strict=True)
    return torch.cat([column(*part, *prepared) for part in parts], dim=1)


def batch_similarity(
    texts: Float[Tensor, "text dim"],
    frames: Float[Tensor, "clip frame dim"],
    mask: Bool[Tensor, "clip frame"],
    pooling: Pooling,
) -> Scores:
    """`score_matrix` of a training batch: what a loss needs of a pooling.

    A text-agnostic pooling sees all clips at once, since its batch norm's statistics are those of the batch.
    """
    if getattr(pooling, "is_text_aware", True):
        return score_matrix(texts, frames, mask, pooling)
    return cosine_similarity(texts, pooling(full(frames), mask, texts))
