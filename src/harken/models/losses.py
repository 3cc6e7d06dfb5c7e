"""Contrastive losses: a square similarity matrix to a scalar.

`sim[i, j]` is the similarity of row item i (text or image) and audio clip j; the diagonal holds the positives. t2a
reads along rows, a2t down columns. All arithmetic is in float32 at least, also under autocast: softmax over a batch
loses the positives in half precision.

Every loss is called as `loss(sim)` or `loss(sim, clips)`. `clips` are the batch's clip numbers, one an item; with
`mask_same_audio` the pairs off the diagonal whose two items have the same number are left out of the negatives (a batch
that holds several captions of one clip), and without it they are negatives like all others (Mei et al.'s code, whose
mask of them has no effect).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from harken.errors import ConfigError, unknown
from harken.models.features import full, full_precision

Similarity = Float[Tensor, "batch batch"]
Scalar = Float[Tensor, ""]
Clips = Int[Tensor, "batch"]
Pairs = Bool[Tensor, "batch batch"]
FACTOR = {"sum": 1.0, "mean_of_directions": 0.5}
INDICES = ("other", "literal")
SHIFTS = ("none", "half")


class LearnedTemperature(nn.Module):
    """A τ that is trained with the model, kept as log(1 / τ), never below `floor` (1 / 100 in CLIP and X-Pool).

    Called, it gives τ as a scalar, which every loss takes for its `temperature`. Raises ConfigError for a floor that is
    not in (0, initial].
    """

    def __init__(self, initial: float, floor: float = 0.01) -> None:
        super().__init__()
        if not 0 < floor <= initial:
            raise ConfigError(
                f"temperature: floor {floor:g} is not in (0, {initial:g}], below what training starts at."
            )
        self.log_scale = nn.Parameter(torch.tensor(-math.log(initial)))
        self.floor = floor

    def forward(self) -> Scalar:
        with torch.no_grad():  # on the parameter: a clamp of the result would have no gradient to come back by
            self.log_scale.clamp_(max=-math.log(self.floor))
        return (-self.log_scale).exp()


def _choice(where: str, name: str, known: tuple[str, ...] | dict[str, float]) -> str:
    if name not in known:
        raise unknown(where, name, known)
    return name


def _factor(where: str, reduction: str) -> float:
    return FACTOR[_choice(f"{where}: reduction", reduction, FACTOR)]


def _own(sim: Similarity) -> Pairs:
    """The diagonal."""
    return torch.eye(len(sim), dtype=torch.bool, device=sim.device)


def _left_out(sim: Similarity, clips: Clips | None, mask_same_audio: bool) -> Pairs | None:
    """The pairs that are neither positive nor negative: those of one clip off the diagonal. None: no such pairs."""
    if not mask_same_audio:
        return None
    if clips is None:
        raise ConfigError("mask_same_audio: the loss needs the clip number of every item; call it as loss(sim, clips)")
    clips = clips.to(sim.device)
    return (clips[:, None] == clips[None, :]) & ~_own(sim)


def _without(logits: Similarity, left_out: Pairs | None) -> Similarity:
    """Logits whose softmax does not see what is left out."""
    return logits if left_out is None else logits.masked_fill(left_out, -torch.inf)


def _diagonal_ce(logits: Similarity) -> Scalar:
    """Mean over rows of the cross-entropy of the diagonal."""
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def infonce(sim: Similarity, clips: Clips | None = None, *, mask_same_audio: bool = False) -> Scalar:
    """InfoNCE of *scaled* similarities, the two directions summed (Tsubaki et al. 2024, eq. 1; VIP-ANT).

    `sim` is exp(logit_scale) * cosine. Eq. 1 prints neither the logarithm nor the mean over the batch; we read
    L = CE(S, diagonal) + CE(Sᵀ, diagonal), each a mean over the batch.
    """
    with full_precision(sim):
        sim = _without(full(sim), _left_out(sim, clips, mask_same_audio))
        return _diagonal_ce(sim) + _diagonal_ce(sim.T)


def nt_xent(
    sim: Similarity,
    clips: Clips | None = None,
    *,
    temperature: float | Scalar,
    reduction: str = "sum",
    mask_same_audio: bool = False,
) -> Scalar:
    """NT-Xent of cosine similarities (Xin et al. 2023, eq. 3): infonce(sim / τ).

    `sum` adds the two directions, as eq. 3 does; `mean_of_directions` halves that, as Mei et al.'s code does.
    """
    with full_precision(sim):
        factor = _factor("nt_xent", reduction)
        return factor * infonce(full(sim) / temperature, clips, mask_same_audio=mask_same_audio)


def pmr_warnings(
    prior_scale: float,
    *,
    scale_by_batch: bool = False,
    detach_prior: bool = False,
    index: str = "other",
    shift: str = "none",
) -> list[str]:
    """Why a setting of `pmr` is known not to train, one sentence each; empty for a healthy one.

    Measured on toy dual encoders (R@1 of 1,000 on new pairs, against NT-Xent's). The printed form trains for ω from 8
    to 30 with the gradient passing through the prior; the form scaled by the batch (CAMoE's code) for ω up to 1,
    detached or not. The literal index trains for ω from 8 on, detached or not; scaled by the batch, for ω up to 8, and
    detached for any. `shift` moves none of these limits.
    """
    _choice("pmr: index", index, INDICES)
    _choice("pmr: shift", shift, SHIFTS)
    is_literal = index == "literal"
    low, high = 8, math.inf if is_literal else 30
    most = 1 if not is_literal else math.inf if detach_prior else 8
    found = []
    if scale_by_batch and prior_scale > most:
        found.append(
            f"pmr.scale_by_batch with prior_scale {prior_scale:g} > {most:g} is known not to train; take 0.1 to 1"
        )
    if not scale_by_batch and not low <= prior_scale <= high:
        found.append(
            f"pmr.prior_scale {prior_scale:g} is outside [{low}, {high:g}] and known not to train; take 1 / temperature"
        )
    if not scale_by_batch and detach_prior and not is_literal:
        found.append("pmr.detach_prior without scale_by_batch is known not to train: the prior starts near 1 / batch")
    return found


def pmr(
    sim: Similarity,
    clips: Clips | None = None,
    *,
    temperature: float | Scalar,
    prior_scale: float,
    scale_by_batch: bool = False,
    detach_prior: bool = False,
    index: str = "other",
    shift: str = "none",
    mask_same_audio: bool = False,
    reduction: str = "sum",
) -> Scalar:
    """Prior matrix revised loss of cosine similarities (Xin et al. 2023, eq. 10-14).

        prior_t2a = softmax(ω · sim) down each column     how well the audio likes the text
        prior_a2t = softmax(ω · sim) along each row       how well the text likes the audio
        L = CE(sim ∘ prior_t2a / τ) + CE((sim ∘ prior_a2t)ᵀ / τ)

    Eq. 13-14 print the numerator as s(t_i, a_i); we read s(t_i, a_j), without which no column sums to 1. `index` of
    "literal" takes them as printed: item i's own prior for its whole row (t2a) or column (a2t), which makes a
    temperature of it, one an item. The paper does not give ω; 1 / τ is healthy. `scale_by_batch` multiplies the prior
    by the batch size (CAMoE's code); `detach_prior` stops the gradient through it. `shift` of "half" revises
    (1 + sim) / 2 instead of sim, the prior being that of sim: a prior below 1 pulls a negative cosine up, towards 0.
    Settings known not to train raise a warning that names them.
    """
    found = pmr_warnings(
        prior_scale, scale_by_batch=scale_by_batch, detach_prior=detach_prior, index=index, shift=shift
    )
    for why in found:
        warnings.warn(why, stacklevel=2)
    with full_precision(sim):
        sim, left_out = full(sim), _left_out(sim, clips, mask_same_audio)
        logits = _without(prior_scale * (sim.detach() if detach_prior else sim), left_out)
        prior_t2a, prior_a2t = torch.softmax(logits, dim=0), torch.softmax(logits, dim=1)
        if index == "literal":
            prior_t2a, prior_a2t = prior_t2a.diagonal()[:, None], prior_a2t.diagonal()[None, :]
        revised = (1 + sim) / 2 if shift == "half" else sim
        boost = (len(sim) if scale_by_batch else 1) / temperature
        t2a = _diagonal_ce(_without(revised * prior_t2a * boost, left_out))
        a2t = _diagonal_ce(_without(revised * prior_a2t * boost, left_out).T)
        return _factor("pmr", reduction) * (t2a + a2t)


def _hinges(sim: Similarity, margin: float, no_negative: Pairs) -> tuple[Tensor, Tensor]:
    """[margin + negative - positive]₊ of every negative, along rows and down columns; 0 where there is none."""
    positive = sim.diagonal()
    along = F.relu(margin + sim - positive[:, None]).masked_fill(no_negative, 0)
    down = F.relu(margin + sim - positive[None, :]).masked_fill(no_negative, 0)
    return along, down


def _no_negative(sim: Similarity, clips: Clips | None, mask_same_audio: bool) -> Pairs:
    left_out = _left_out(sim, clips, mask_same_audio)
    return _own(sim) if left_out is None else _own(sim) | left_out


def triplet_sum(sim: Similarity, clips: Clips | None = None, *, margin: float, mask_same_audio: bool = False) -> Scalar:
    """Hinge over every negative, both directions: (1/B) Σ_i Σ_{j≠i} [m + s_ij - s_ii]₊ + [m + s_ji - s_ii]₊."""
    with full_precision(sim):
        along, down = _hinges(full(sim), margin, _no_negative(sim, clips, mask_same_audio))
        return (along.sum() + down.sum()) / len(sim)


def triplet_max(sim: Similarity, clips: Clips | None = None, *, margin: float, mask_same_audio: bool = False) -> Scalar:
    """Hinge over each item's hardest negative, both directions, mean over the batch (VSE++, Faghri et al. 2018)."""
    with full_precision(sim):
        along, down = _hinges(full(sim), margin, _no_negative(sim, clips, mask_same_audio))
        return (along.amax(1).sum() + down.amax(0).sum()) / len(sim)


def triplet_weighted(
    sim: Similarity, clips: Clips | None = None, *, margin: float, mask_same_audio: bool = False
) -> Scalar:
    """Polynomially weighted hardest triplets (Wei et al. 2020, max form), as Mei et al. 2022 compare it.

        [0.2 p² - 0.7 p + 0.5]₊ + [0.9 n² - 0.4 n + 0.03]₊

    for each row and column whose hardest negative n comes within `margin` of its positive p; mean over the batch.
    """
    with full_precision(sim):
        sim, no_negative = full(sim), _no_negative(sim, clips, mask_same_audio)
        total = sim.new_zeros(()) + 0 * sim.diagonal().sum()  # a batch without a violation still has a (zero) gradient
        for dim in (1, 0):
            some = ~no_negative.all(dim)  # an item without any negative has no hardest one
            n, p = sim.masked_fill(no_negative, -torch.inf).amax(dim)[some], sim.diagonal()[some]
            pull, push = F.relu(0.2 * p**2 - 0.7 * p + 0.5), F.relu(0.9 * n**2 - 0.4 * n + 0.03)
            total = total + ((n + margin > p) * (pull + push)).sum()
        return total / len(sim)


LOSSES: dict[str, Callable[..., Scalar]] = {
    "infonce": infonce,
    "nt_xent": nt_xent,
    "pmr": pmr,
    "triplet_max": triplet_max,
    "triplet_sum": triplet_sum,
    "triplet_weighted": triplet_weighted,
}
