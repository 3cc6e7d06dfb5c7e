"""Xin, Yang and Zou (ICASSP 2023), equation by equation, one loop per sum, against the library's vectorised forms."""

from __future__ import annotations

import math

import pytest
import torch

from harken.models.losses import nt_xent, pmr
from harken.models.pooling import POOLINGS, TextAwareAttention, cosine_similarity
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


def linear(v: Vector, layer: torch.nn.Linear) -> Vector:
    """W v + b, without b where there is none."""
    moved = times(v, layer.weight.T.tolist())
    return moved if layer.bias is None else [x + b for x, b in zip(moved, layer.bias.tolist(), strict=True)]


def normed(v: Vector, ln: torch.nn.LayerNorm) -> Vector:
    return layer_norm(v, ln.weight.tolist(), ln.bias.tolist())


def xpool(text: Vector, frames: Matrix, pool: torch.nn.Module) -> Vector:
    """X-Pool's block for one text and one clip, in evaluation (Gorti et al. 2022)."""
    a = pool.tap
    q = linear(normed(text, a.ln_audio), a.query)
    keys = [linear(normed(f, a.ln_audio), a.key) for f in frames]
    values = [linear(normed(f, a.ln_audio), a.value) for f in frames]
    scores = [math.exp(dot(q, k) / math.sqrt(len(q))) for k in keys]
    mixed = [sum(e * v[d] for e, v in zip(scores, values, strict=True)) / sum(scores) for d in range(len(q))]
    x = normed(linear(mixed, a.out), a.ln_out)
    return normed([i + r for i, r in zip(x, linear(x, pool.fc), strict=True)], pool.ln_fc)


def test_xpool_and_its_similarity() -> None:
    torch.manual_seed(0)
    pool = POOLINGS["xpool"](dim=6, dp=4).double().eval()
    for p in pool.parameters():
        torch.nn.init.normal_(p, mean=0.3, std=0.5)
    texts, frames = torch.randn(3, 6).double(), torch.randn(2, 5, 6).double()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():
        z, tiled = pool(frames, mask, texts), score_matrix(texts, frames, mask, pool)
    for i in range(3):
        for j in range(2):
            twin = xpool(texts[i].tolist(), frames[j][mask[j]].tolist(), pool)
            assert z[j, i].tolist() == pytest.approx(twin, rel=1e-9)
            assert float(tiled[i, j]) == pytest.approx(s(texts[i].tolist(), twin), rel=1e-9)


def test_maxsim() -> None:
    torch.manual_seed(0)
    pool = POOLINGS["maxsim"](dim=6)
    texts, frames = torch.randn(3, 6).double(), torch.randn(2, 5, 6).double()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    sim, tiled = cosine_similarity(texts, pool(frames, mask, texts)), score_matrix(texts, frames, mask, pool)
    for i in range(3):
        for j in range(2):
            twin = max(s(texts[i].tolist(), f) for f in frames[j][mask[j]].tolist())
            assert float(sim[i, j]) == pytest.approx(twin, rel=1e-9)
            assert float(tiled[i, j]) == pytest.approx(twin, rel=1e-9)


def unit(v: Vector) -> Vector:
    return [x / math.sqrt(dot(v, v)) for x in v]


def batch_normed(v: Vector, bn: torch.nn.BatchNorm1d) -> Vector:
    """In evaluation."""
    of = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    return [g * (x - m) / math.sqrt(r + bn.eps) + h for x, m, r, g, h in zip(v, *(t.tolist() for t in of), strict=True)]


def netrvlad(frames: Matrix, pool: torch.nn.Module) -> Vector:
    """Residual-less VLAD (Miech et al. 2017) for one clip, in evaluation."""
    dim, n_clusters = len(frames[0]), pool.assign.out_features
    sums = [[0.0] * dim for _ in range(n_clusters)]
    for f in frames:
        logits = batch_normed(linear(f, pool.assign), pool.bn)
        for k in range(n_clusters):
            weight = math.exp(logits[k]) / sum(math.exp(x) for x in logits)
            sums[k] = [old + weight * x for old, x in zip(sums[k], f, strict=True)]
    z = linear(unit([x for v in sums for x in unit(v)]), pool.out)
    if pool.gate is None:
        return z
    gates = batch_normed(linear(z, pool.gate[0]), pool.gate[1])
    return [x / (1 + math.exp(-g)) for x, g in zip(z, gates, strict=True)]


@pytest.mark.parametrize("gating", [False, True])
def test_netrvlad(gating: bool) -> None:
    torch.manual_seed(0)
    pool = POOLINGS["netrvlad"](dim=6, n_clusters=3, gating=gating).double().eval()
    for name, v in pool.state_dict().items():
        if "running_var" in name or v.ndim == 1:
            v.copy_(torch.rand_like(v) + 0.5)
    frames, mask = torch.randn(2, 5, 6).double(), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    z = pool(frames, mask, torch.zeros(1, 6).double())
    for j in range(2):
        assert z[j, 0].tolist() == pytest.approx(netrvlad(frames[j][mask[j]].tolist(), pool), rel=1e-9)


def others(i: int, clips: list[int]) -> list[int]:
    """The items that item i meets: itself and those of other clips."""
    return [j for j in range(len(clips)) if j == i or clips[j] != clips[i]]


def nt_xent_twin(sim: Matrix, tau: float, clips: list[int] | None = None) -> float:
    """Eq. 3; with `clips`, without what belongs to item i's own clip in its sums."""
    n = len(sim)
    total = 0.0
    for i in range(n):
        met = others(i, clips or list(range(n)))
        positive = math.exp(sim[i][i] / tau)
        total += math.log(positive / sum(math.exp(sim[i][j] / tau) for j in met))
        total += math.log(positive / sum(math.exp(sim[j][i] / tau) for j in met))
    return -total / n


def nt_xent_as_released(sim: Matrix, tau: float, clips: list[int]) -> float:
    """Mei et al.'s code: the mask is put on log-probabilities off the diagonal, of which only the diagonal is read."""
    n = len(sim)
    halves = []
    for matrix in (sim, [list(c) for c in zip(*sim, strict=True)]):
        log_p = [[math.log(math.exp(x / tau) / sum(math.exp(y / tau) for y in row)) for x in row] for row in matrix]
        for i in range(n):
            for j in range(n):
                if i != j and clips[i] == clips[j]:
                    log_p[i][j] = 0.0
        halves.append(-sum(log_p[i][i] for i in range(n)) / n)
    return 0.5 * halves[0] + 0.5 * halves[1]


def pmr_twin(
    sim: Matrix,
    tau: float,
    omega: float,
    boost: float = 1.0,
    *,
    index: str = "other",
    shift: str = "none",
    clips: list[int] | None = None,
) -> float:
    """Eq. 10-14, with s(t_i, a_j) in the numerators of 13 and 14, or as they are printed (see `losses.pmr`)."""
    n = len(sim)
    met = [others(i, clips or list(range(n))) for i in range(n)]
    pr_t2a = [[0.0] * n for _ in range(n)]
    pr_a2t = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in met[i]:
            if index == "literal":
                likes = math.exp(omega * sim[i][i])
                pr_t2a[i][j] = likes / sum(math.exp(omega * sim[k][i]) for k in met[i])  # (13)
                pr_a2t[j][i] = likes / sum(math.exp(omega * sim[i][k]) for k in met[i])  # (14)
            else:
                likes = math.exp(omega * sim[i][j])
                pr_t2a[i][j] = likes / sum(math.exp(omega * sim[k][j]) for k in met[j])  # (13)
                pr_a2t[i][j] = likes / sum(math.exp(omega * sim[i][k]) for k in met[i])  # (14)
    if index == "other":
        for i in range(n):
            assert sum(pr_t2a[k][i] for k in range(n)) == pytest.approx(1)
            assert sum(pr_a2t[i][k] for k in range(n)) == pytest.approx(1)
    revised = [[(1 + x) / 2 if shift == "half" else x for x in row] for row in sim]
    t2a = a2t = 0.0
    for i in range(n):
        row = {j: math.exp(boost * revised[i][j] * pr_t2a[i][j] / tau) for j in met[i]}
        column = {j: math.exp(boost * revised[j][i] * pr_a2t[j][i] / tau) for j in met[i]}
        t2a -= math.log(row[i] / sum(row.values())) / n  # (10)
        a2t -= math.log(column[i] / sum(column.values())) / n  # (11)
    return t2a + a2t  # (12)


CLIPS = [[0, 1, 2, 3, 4], [0, 1, 0, 3, 1]]


@pytest.mark.filterwarnings("ignore:pmr")
@pytest.mark.parametrize("clips", CLIPS, ids=["distinct", "repeated"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_losses(seed: int, clips: list[int]) -> None:
    sim = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    rows, of = sim.tolist(), {"clips": torch.tensor(clips), "mask_same_audio": True, "temperature": 0.07}
    assert float(nt_xent(sim, **of)) == pytest.approx(nt_xent_twin(rows, 0.07, clips), rel=1e-9)
    for omega in (0.1, 14.2857, 50.0):
        for index in ("other", "literal"):
            for shift in ("none", "half"):
                reading = {"index": index, "shift": shift}
                twin = pmr_twin(rows, 0.07, omega, **reading, clips=clips)
                assert float(pmr(sim, prior_scale=omega, **of, **reading)) == pytest.approx(twin, rel=1e-9)
                twin = pmr_twin(rows, 0.07, omega, 5, **reading, clips=clips)
                scaled = pmr(sim, prior_scale=omega, scale_by_batch=True, **of, **reading)
                assert float(scaled) == pytest.approx(twin, rel=1e-9)


@pytest.mark.parametrize("clips", CLIPS, ids=["distinct", "repeated"])
def test_the_released_nt_xent_is_half_of_eq_3_and_masks_nothing(clips: list[int]) -> None:
    sim = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    released = nt_xent_as_released(sim.tolist(), 0.07, clips)
    ours = nt_xent(sim, torch.tensor(clips), temperature=0.07, reduction="mean_of_directions")
    assert float(ours) == pytest.approx(released, rel=1e-12)
    assert nt_xent_twin(sim.tolist(), 0.07) == pytest.approx(2 * released, rel=1e-12)
