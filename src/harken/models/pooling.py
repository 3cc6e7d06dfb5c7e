"""Frames to one vector per clip, or to one per clip and text. Every pooling ignores masked frames.

A pooling is `(frames (clip, frame, dim), mask (clip, frame), text (text, dim)) -> (clip, text or 1, dim)`:
text-agnostic ones return a text axis of length 1, so nothing downstream asks which kind it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from harken.errors import DataError, unknown
from harken.models.features import full, full_precision

Frames = Float[Tensor, "clip frame dim"]
Mask = Bool[Tensor, "clip frame"]
Texts = Float[Tensor, "text dim"]
Pooled = Float[Tensor, "clip text_or_1 dim"]
Weights = Float[Tensor, "clip text frame"]

STARTS = ("xavier", "uniform")


@runtime_checkable
class Pooling(Protocol):
    """An `is_text_aware` of False on it says that the text does not matter; scoring then pools each clip once."""

    def __call__(self, frames: Frames, mask: Mask, text: Texts) -> Pooled: ...


def cosine_similarity(text: Texts, pooled: Pooled) -> Float[Tensor, "text clip"]:
    """s(t, a) = cos(c_t, z_a) or cos(c_t, z_a|t) (Xin et al. 2023, eq. 2 and 4); rows are texts, columns clips.

    In float32 at least, also under autocast.
    """
    with full_precision(text):
        text, pooled = F.normalize(full(text), dim=-1), F.normalize(full(pooled), dim=-1)
        if pooled.shape[1] == 1:  # one matrix product, where broadcasting would build (clip, text, dim)
            return text @ pooled[:, 0].T
        return torch.einsum("td,ctd->tc", text, pooled)


def require_frames(mask: Mask) -> None:
    """Raises DataError where a clip has no valid frame."""
    if not bool(mask.any(1).all()):
        raise DataError("a clip has no valid frame to pool; leave clips that are padding alone out of the batch.")


class Mean(nn.Module):
    """mean_t f_t."""

    is_text_aware = False

    def __init__(self, *, dim: int) -> None:
        super().__init__()

    def forward(self, frames: Frames, mask: Mask, text: Texts) -> Pooled:
        require_frames(mask)
        # masked_fill, not a product: padding may hold anything, and 0 * nan is nan
        return frames.masked_fill(~mask[..., None], 0).sum(1, keepdim=True) / mask.sum(1)[:, None, None]


class Max(nn.Module):
    """max_t f_t, per dimension."""

    is_text_aware = False

    def __init__(self, *, dim: int) -> None:
        super().__init__()

    def forward(self, frames: Frames, mask: Mask, text: Texts) -> Pooled:
        require_frames(mask)
        return frames.masked_fill(~mask[..., None], -torch.inf).amax(1, keepdim=True)


class MeanMax(nn.Module):
    """max_t f_t + mean_t f_t: their sum, not their concatenation (Mei et al. 2022)."""

    is_text_aware = False

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.max, self.mean = Max(dim=dim), Mean(dim=dim)

    def forward(self, frames: Frames, mask: Mask, text: Texts) -> Pooled:
        return self.max(frames, mask, text) + self.mean(frames, mask, text)


class NetRVLAD(nn.Module):
    """Residual-less VLAD (Miech et al. 2017).

        a = softmax_k(BN(f W_c))     v_k = Σ_t a_tk f_t     z = W_h L2(concat_k L2(v_k))

    The batch norm's statistics are those of the valid frames. `gating` multiplies z by σ(BN(z W_g)), their context
    gating, which the released TensorFlow code has on and PyTorch ports leave out.
    """

    is_text_aware = False

    def __init__(self, *, dim: int, n_clusters: int = 16, gating: bool = False) -> None:
        super().__init__()
        self.assign = nn.Linear(dim, n_clusters, bias=False)
        self.bn = nn.BatchNorm1d(n_clusters)
        self.out = nn.Linear(n_clusters * dim, dim, bias=False)
        nn.init.normal_(self.assign.weight, std=dim**-0.5)
        nn.init.normal_(self.out.weight, std=dim**-0.5)
        self.gate: nn.Sequential | None = None
        if gating:
            gate = nn.Linear(dim, dim, bias=False)
            nn.init.normal_(gate.weight, std=dim**-0.5)
            self.gate = nn.Sequential(gate, nn.BatchNorm1d(dim))

    def forward(self, frames: Frames, mask: Mask, text: Texts) -> Pooled:
        require_frames(mask)
        valid = frames[mask]
        weights = frames.new_zeros(*mask.shape, self.assign.out_features)
        weights[mask] = torch.softmax(self.bn(self.assign(valid)), dim=-1).to(weights.dtype)
        clusters = weights.transpose(1, 2) @ frames.masked_fill(~mask[..., None], 0)
        flat = F.normalize(F.normalize(clusters, dim=-1).flatten(1), dim=-1)
        z = self.out(flat)
        return (z if self.gate is None else z * torch.sigmoid(self.gate(z)))[:, None]


class MaxSim(nn.Module):
    """For each text its best frame, so that s(t, a) = max_t cos(c_t, f_t) (ColBERT, Khattab and Zaharia 2020).

    Of frames that are equally good it takes the first.
    """

    is_text_aware = True

    def __init__(self, *, dim: int) -> None:
        super().__init__()

    def forward(self, frames: Frames, mask: Mask, text: Texts) -> Pooled:
        """Frames as they came, not normalised; `scoring.score_matrix` has the cosines without (clip, text, dim)."""
        require_frames(mask)
        best = best_frames(frames, mask, text)[1]
        return frames.gather(1, best[..., None].expand(-1, -1, frames.shape[-1]))


def best_frames(frames: Frames, mask: Mask, text: Texts) -> tuple[Float[Tensor, "clip text"], Int[Tensor, "clip text"]]:
    """The largest cosine of each text with a valid frame of each clip, and which frame that is."""
    with full_precision(frames):
        frames = F.normalize(full(frames).masked_fill(~mask[..., None], 0), dim=-1)
        # (clip, frame, text), in which the one product and the maximum both run over contiguous memory
        cosine = (frames.flatten(0, 1) @ F.normalize(full(text), dim=-1).T).view(*mask.shape, -1)
        best = cosine.masked_fill(~mask[..., None], -torch.inf).max(1)
        return best.values, best.indices


class TextAwareAttention(nn.Module):
    """TAP, text-aware attention pooling (Xin et al. 2023, eq. 5-9): the text attends to the frames it describes.

        Q = LN(c_t) W_Q     K = LN(c_a) W_K     V = LN(c_a) W_V
        z_a|t = LN_o(softmax(Q Kᵀ / √d_p) V W_O)

    One head, no residual. `share_ln`: text and frames share one input LN (X-Pool, and the paper's one symbol) or have
    their own. `bias`: biases in the four projections (X-Pool has them, the paper's equations do not). `key_mask`:
    padding is not attended to; without it, it is (Mei et al.'s code). `start`: what training starts from, which the
    paper does not say. "xavier": four random matrices, and so attention that prefers frames at random; "uniform": W_Q
    is zero, every text reads all valid frames alike, and TAP is the mean of their values until training finds better.

    Raises ConfigError for another `start`.
    """

    is_text_aware = True

    def __init__(
        self,
        *,
        dim: int,
        dp: int = 512,
        share_ln: bool = True,
        bias: bool = False,
        key_mask: bool = True,
        start: str = "xavier",
    ) -> None:
        super().__init__()
        if start not in STARTS:
            raise unknown("tap.start", start, STARTS)
        self.dp, self.key_mask = dp, key_mask
        self.ln_audio = nn.LayerNorm(dim)
        self.ln_text = None if share_ln else nn.LayerNorm(dim)  # not an alias: a checkpoint holds each tensor once
        self.query, self.key, self.value = (nn.Linear(dim, dp, bias=bias) for _ in range(3))
        self.out = nn.Linear(dp, dim, bias=bias)
        self.ln_out = nn.LayerNorm(dim)
        for projection in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(projection.weight)  # X-Pool's identity is no choice: the matrices are not square
            if bias:
                nn.init.zeros_(projection.bias)
        if start == "uniform":  # W_K stays random: with both at zero neither would ever have a gradient
            nn.init.zeros_(self.query.weight)

    def queries(self, text: Texts) -> Float[Tensor, "text dp"]:
        """Q / √d_p."""
        norm = self.ln_audio if self.ln_text is None else self.ln_text
        return self.query(norm(text)) / self.dp**0.5

    def forward(self, frames: Frames, mask: Mask, text: Texts) -> Pooled:
        """The equations as printed; `scoring.score_matrix` has the same numbers without the (clip, text, dim)."""
        weights, values = self._attend(frames, mask, text)
        return self.ln_out(self.out(weights @ values))

    def attention(self, frames: Frames, mask: Mask, text: Texts) -> Weights:
        """The softmax of eq. 8: how much of each frame a text reads, rows that sum to 1."""
        return self._attend(frames, mask, text)[0]

    def _attend(self, frames: Frames, mask: Mask, text: Texts) -> tuple[Weights, Float[Tensor, "clip frame dp"]]:
        if self.key_mask:
            require_frames(mask)
            frames = frames.masked_fill(~mask[..., None], 0)
        normed = self.ln_audio(frames)
        logits = torch.einsum("np,mtp->mnt", self.queries(text), self.key(normed))
        if self.key_mask:
            logits = logits.masked_fill(~mask[:, None], -torch.inf)
        return torch.softmax(logits, dim=-1), self.value(normed)


class XPool(nn.Module):
    """X-Pool's whole block (Gorti et al. 2022), of which TAP is the part up to LN2.

        x = TAP(c_a, c_t), with biases     z = LN3(x + dropout(x W + b))

    One head, as they use. Projections start at the identity where they are square, as theirs do: `dp` of None is `dim`.
    """

    is_text_aware = True

    def __init__(self, *, dim: int, dp: int | None = None, dropout: float = 0.3, key_mask: bool = True) -> None:
        super().__init__()
        self.tap = TextAwareAttention(dim=dim, dp=dim if dp is None else dp, bias=True, key_mask=key_mask)
        self.fc, self.dropout, self.ln_fc = nn.Linear(dim, dim), nn.Dropout(dropout), nn.LayerNorm(dim)
        for projection in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.zeros_(projection.bias)
            if projection.in_features == projection.out_features:
                nn.init.eye_(projection.weight)

    def forward(self, frames: Frames, mask: Mask, text: Texts) -> Pooled:
        x = self.tap(frames, mask, text)
        return self.ln_fc(x + self.dropout(self.fc(x)))

    def attention(self, frames: Frames, mask: Mask, text: Texts) -> Weights:
        """How much of each frame a text reads, rows that sum to 1."""
        return self.tap.attention(frames, mask, text)


POOLINGS: dict[str, Callable[..., nn.Module]] = {
    "mean": Mean,
    "max": Max,
    "meanmax": MeanMax,
    "netrvlad": NetRVLAD,
    "tap": TextAwareAttention,
    "xpool": XPool,
    "maxsim": MaxSim,
}
