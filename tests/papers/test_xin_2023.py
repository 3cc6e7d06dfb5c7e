"""Xin, Yang and Zou (ICASSP 2023), equation by equation, one loop per sum, against the library's vectorised forms."""

from __future__ import annotations

import math

import pytest
import torch

from harken.models.losses import nt_xent, pmr
from harken.models.pooling import TextAwareAttention, cosine_similarity
from harken.models.scoring import score_matrix

Vector = list[float]
Matrix = list[Vector]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def times(v: Vector, matrix: Matrix) -> Vector:
    """The row vector v times a matrix of (in, out)."""
    return [sum(v[i] * matrix[i][o] for i in range(len(v))) for o in range(len(matrix[0]))]


def layer_norm(v: Vector, gain: Vector, shift: Vector) -> Vector:
    mean = sum(v) / len(v)
    variance = sum((x - mean) ** 2 for x in v) / len(v)
    return [g * (x - mean) / math.sqrt(variance + 1e-5) + s for x, g, s in zip(v, gain, shift, strict=True)]


def tap(text: Vector, frames: Matrix, w: dict[str, Matrix], ln: dict[str, tuple[Vector, Vector]]) -> Vector:
    """Eq. 5-9 for one text and one clip."""
    q = times(layer_norm(text, *ln["in"]), w["query"])  # (5)
    keys = [times(layer_norm(f, *ln["in"]), w["key"]) for f in frames]  # (6)
    values = [times(layer_norm(f, *ln["in"]), w["value"]) for f in frames]  # (7)
    logits = [dot(q, k) / math.sqrt(len(q)) for k in keys]
    total = sum(math.exp(x) for x in logits)
    attention = [math.exp(x) / total for x in logits]
    pooled = [sum(attention[t] * values[t][d] for t in range(len(frames))) for d in range(len(q))]  # (8)
    return layer_norm(times(pooled, w["out"]), *ln["out"])  # (9)


def s(a: Vector, b: Vector) -> float:
    """Eq. 2 and 4."""
    return dot(a, b) / (math.sqrt(dot(a, a)) * math.sqrt(dot(b, b)))


def test_tap_and_its_similarity() -> None:
    torch.manual_seed(0)
    pool = TextAwareAttention(dim=6, dp=4).double()
    for p in (pool.ln_audio.weight, pool.ln_audio.bias, pool.ln_out.weight, pool.ln_out.bias):
        torch.nn.init.normal_(p, mean=0.7, std=0.4)
    texts, frames = torch.randn(3, 6).double(), torch.randn(2, 5, 6).double()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    w = {n: getattr(pool, n).weight.T.tolist() for n in ("query", "key", "value", "out")}
    norms = {"in": pool.ln_audio, "out": pool.ln_out}
    ln = {n: (m.weight.tolist(), m.bias.tolist()) for n, m in norms.items()}
    z = pool(frames, mask, texts)
    sim, tiled = cosine_similarity(texts, z).detach(), score_matrix(texts, frames, mask, pool).detach()
    for i in range(3):
        for j in range(2):
            twin = tap(texts[i].tolist(), frames[j][mask[j]].tolist(), w, ln)
            assert z[j, i].tolist() == pytest.approx(twin, rel=1e-9)
            assert float(sim[i, j]) == pytest.approx(s(texts[i].tolist(), twin), rel=1e-9)
            assert float(tiled[i, j]) == pytest.approx(s(texts[i].tolist(), twin), rel=1e-9)


def nt_xent_twin(sim: Matrix, tau: float) -> float:
    """Eq. 3."""
    n = len(sim)
    total = 0.0
    for i in range(n):
        positive = math.exp(sim[i][i] / tau)
        total += math.log(positive / sum(math.exp(sim[i][j] / tau) for j in range(n)))
        total += math.log(positive / sum(math.exp(sim[j][i] / tau) for j in range(n)))
    return -total / n


def pmr_twin(sim: Matrix, tau: float, omega: float, boost: float = 1.0) -> float:
    """Eq. 10-14, with s(t_i, a_j) in the numerators of 13 and 14 (see `losses.pmr`)."""
    n = len(sim)
    pr_t2a = [[0.0] * n for _ in range(n)]
    pr_a2t = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(n):
            pr_t2a[i][j] = math.exp(omega * sim[i][j]) / sum(math.exp(omega * sim[k][j]) for k in range(n))  # (13)
            pr_a2t[i][j] = math.exp(omega * sim[i][j]) / sum(math.exp(omega * sim[i][k]) for k in range(n))  # (14)
    for i in range(n):
        assert sum(pr_t2a[k][i] for k in range(n)) == pytest.approx(1)
        assert sum(pr_a2t[i][k] for k in range(n)) == pytest.approx(1)
    t2a = a2t = 0.0
    for i in range(n):
        row = [math.exp(boost * sim[i][j] * pr_t2a[i][j] / tau) for j in range(n)]
        column = [math.exp(boost * sim[j][i] * pr_a2t[j][i] / tau) for j in range(n)]
        t2a -= math.log(row[i] / sum(row)) / n  # (10)
        a2t -= math.log(column[i] / sum(column)) / n  # (11)
    return t2a + a2t  # (12)


@pytest.mark.filterwarnings("ignore:pmr")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_losses(seed: int) -> None:
    sim = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    assert float(nt_xent(sim, temperature=0.07)) == pytest.approx(nt_xent_twin(sim.tolist(), 0.07), rel=1e-9)
    for omega in (0.1, 14.2857, 50.0):
        twin = pmr_twin(sim.tolist(), 0.07, omega)
        assert float(pmr(sim, temperature=0.07, prior_scale=omega)) == pytest.approx(twin, rel=1e-9)
        scaled = pmr(sim, temperature=0.07, prior_scale=omega, scale_by_batch=True)
        assert float(scaled) == pytest.approx(pmr_twin(sim.tolist(), 0.07, omega, boost=5), rel=1e-9)
