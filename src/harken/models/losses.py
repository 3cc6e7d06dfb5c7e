"""Contrastive losses: a square similarity matrix to a scalar.

`sim[i, j]` is the similarity of row item i (text or image) and audio clip j; the sampler guarantees that the diagonal,
and nothing else, holds the positives. t2a reads along rows, a2t down columns. All arithmetic is in float32 at least,
also under autocast: softmax over a batch loses the positives in half precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from harken.errors import unknown
from harken.models.features import full, full_precision

Similarity = Float[Tensor, "batch batch"]
Scalar = Float[Tensor, ""]
FACTOR = {"sum": 1.0, "mean_of_directions": 0.5}


def _factor(where: str, reduction: str) -> float:
    if reduction not in FACTOR:
        raise unknown(f"{where}: reduction", reduction, FACTOR)
    return FACTOR[reduction]


def _diagonal_ce(logits: Similarity) -> Scalar:
    """Mean over rows of the cross-entropy of the diagonal."""
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def infonce(sim: Similarity) -> Scalar:
    """InfoNCE of *scaled* similarities, the two directions summed (Tsubaki et al. 2024, eq. 1; VIP-ANT).

    `sim` is exp(logit_scale) * cosine. Eq. 1 prints neither the logarithm nor the mean over the batch; we read
    L = CE(S, diagonal) + CE(Sᵀ, diagonal), each a mean over the batch.
    """
    with full_precision(sim):
        sim = full(sim)
        return _diagonal_ce(sim) + _diagonal_ce(sim.T)


def nt_xent(sim: Similarity, *, temperature: float, reduction: str = "sum") -> Scalar:
    """NT-Xent of cosine similarities (Xin et al. 2023, eq. 3): infonce(sim / τ).

    `sum` adds the two directions, as eq. 3 does; `mean_of_directions` halves that, as Mei et al.'s code does.
    """
    with full_precision(sim):
        return _factor("nt_xent", reduction) * infonce(full(sim) / temperature)


def pmr_warnings(prior_scale: float, *, scale_by_batch: bool = False, detach_prior: bool = False) -> list[str]:
    """Why a setting of `pmr` is known not to train, one sentence each; empty for a healthy one.

    Measured on a toy dual encoder: the printed form trains for ω from 8 to 30 with the gradient passing through the
    prior; the form scaled by the batch (CAMoE's code) trains for ω up to 1, detached or not.
    """
    found = []
    if scale_by_batch and prior_scale > 1:
        found.append(f"pmr.scale_by_batch with prior_scale {prior_scale:g} > 1 is known not to train; take 0.1 to 1")
    if not scale_by_batch and not 8 <= prior_scale <= 30:
        found.append(f"pmr.prior_scale {prior_scale:g} is outside [8, 30] and known not to train; take 1 / temperature")
    if not scale_by_batch and detach_prior:
        found.append("pmr.detach_prior without scale_by_batch is known not to train: the prior starts near 1 / batch")
    return found


def pmr(
    sim: Similarity,
    *,
    temperature: float,
    prior_scale: float,
    scale_by_batch: bool = False,
    detach_prior: bool = False,
    reduction: str = "sum",
) -> Scalar:
    """Prior matrix revised loss of cosine similarities (Xin et al. 2023, eq. 10-14).

        prior_t2a = softmax(ω · sim) down each column     how well the audio likes the text
        prior_a2t = softmax(ω · sim) along each row       how well the text likes the audio
        L = CE(sim ∘ prior_t2a / τ) + CE((sim ∘ prior_a2t)ᵀ / τ)

    Eq. 13-14 print the numerator as s(t_i, a_i); we read s(t_i, a_j), without which no column sums to 1. The paper does
    not give ω; 1 / τ is healthy. `scale_by_batch` multiplies the prior by the batch size (CAMoE's code); `detach_prior`
    stops the gradient through it. Settings known not to train raise a warning that names them.
    """
    for why in pmr_warnings(prior_scale, scale_by_batch=scale_by_batch, detach_prior=detach_prior):
        warnings.warn(why, stacklevel=2)
    with full_precision(sim):
        sim = full(sim)
        logits = prior_scale * (sim.detach() if detach_prior else sim)
        boost = (len(sim) if scale_by_batch else 1) / temperature
        t2a = _diagonal_ce(sim * torch.softmax(logits, dim=0) * boost)
        a2t = _diagonal_ce((sim * torch.softmax(logits, dim=1) * boost).T)
        return _factor("pmr", reduction) * (t2a + a2t)


def _hinges(sim: Similarity, margin: float) -> tuple[Tensor, Tensor]:
    """[margin + negative - positive]₊ of every negative, along rows and down columns; the diagonal is 0."""
    sim = full(sim)
    own = torch.eye(len(sim), dtype=torch.bool, device=sim.device)
    positive = sim.diagonal()
    along = F.relu(margin + sim - positive[:, None]).masked_fill(own, 0)
    down = F.relu(margin + sim - positive[None, :]).masked_fill(own, 0)
    return along, down


def triplet_sum(sim: Similarity, *, margin: float) -> Scalar:
    """Hinge over every negative, both directions: (1/B) Σ_i Σ_{j≠i} [m + s_ij - s_ii]₊ + [m + s_ji - s_ii]₊."""
    with full_precision(sim):
        along, down = _hinges(sim, margin)
        return (along.sum() + down.sum()) / len(sim)


def triplet_max(sim: Similarity, *, margin: float) -> Scalar:
    """Hinge over each item's hardest negative, both directions, mean over the batch (VSE++, Faghri et al. 2018)."""
    with full_precision(sim):
        along, down = _hinges(sim, margin)
        return (along.amax(1).sum() + down.amax(0).sum()) / len(sim)


def triplet_weighted(sim: Similarity, *, margin: float) -> Scalar:
    """Polynomially weighted hardest triplets (Wei et al. 2020, max form), as Mei et al. 2022 compare it.

        [0.2 p² - 0.7 p + 0.5]₊ + [0.9 n² - 0.4 n + 0.03]₊

    for each row and column whose hardest negative n comes within `margin` of its positive p; mean over the batch.
    """
    with full_precision(sim):
        sim = full(sim)
        own = torch.eye(len(sim), dtype=torch.bool, device=sim.device)
        p = sim.diagonal()
        total = sim.new_zeros(()) + 0 * p.sum()  # a batch without a violation still has a (zero) gradient
        if len(sim) == 1:
            return total
        for dim in (1, 0):
            n = sim.masked_fill(own, -torch.inf).amax(dim)
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
