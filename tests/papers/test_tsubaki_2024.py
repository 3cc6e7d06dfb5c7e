"""Tsubaki et al. (2024), equation by equation, one loop per sum, against the library's vectorised forms."""

from __future__ import annotations

import math

import pytest
import torch

from harken.models.losses import infonce
from harken.models.matching import MATCHES

Vector = list[float]


def cos(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def infonce_twin(sim: list[Vector]) -> float:
    """Eq. 1 with the logarithm and the batch mean that its print leaves out; rows are keys, columns queries."""
    n = len(sim)
    total = 0.0
    for j in range(n):
        over_queries = sum(math.exp(sim[j][q]) for q in range(n))
        over_keys = sum(math.exp(sim[k][j]) for k in range(n))
        total -= math.log(math.exp(sim[j][j]) / over_queries) + math.log(math.exp(sim[j][j]) / over_keys)
    return total / n


def batch(n_clips: int = 4, n_images: int = 3, dim: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n_clips, n_images, dim, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def test_infonce() -> None:
    sim = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    assert float(infonce(sim)) == pytest.approx(infonce_twin(sim.tolist()), rel=1e-12)


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
@pytest.mark.parametrize("scope", ["own_clip", "all_pairs"])
def test_nearest_match(epoch: int, scope: str) -> None:
    """Eq. 3 with n = 2."""
    segments, images = batch()
    audio = segments[:, 0]
    match = MATCHES["nearest_image"](n_warmup=2, scope=scope)
    sim = match(audio, images, epoch, torch.Generator().manual_seed(7))
    a, i = audio.tolist(), images.tolist()
    drawn = torch.randint(3, (4,), generator=torch.Generator().manual_seed(7)).tolist()
    for k in range(4):
        own = [cos(a[k], i[k][c]) for c in range(3)]
        chosen = own.index(max(own)) if epoch >= 2 else drawn[k]
        assert int(match.chosen[k]) == chosen
        for q in range(4):
            if epoch >= 2 and scope == "all_pairs":
                expected = max(cos(a[q], i[k][c]) for c in range(3))
            else:
                expected = cos(a[q], i[k][chosen])
            assert float(sim[k, q]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("row_norm", [False, True])
def test_multiframe_match(row_norm: bool) -> None:
    """Eq. 4."""
    audio, images = batch()
    sim = MATCHES["multiframe"](row_norm=row_norm)(audio, images, 0)

    def flatten(rows: list[Vector]) -> Vector:
        out: Vector = []
        for row in rows:
            length = math.sqrt(sum(x * x for x in row)) if row_norm else 1.0
            out += [x / length for x in row]
        return out

    for k in range(4):
        for q in range(4):
            assert float(sim[k, q]) == pytest.approx(
                cos(flatten(audio[q].tolist()), flatten(images[k].tolist())), rel=1e-12
            )


def test_an_image_taken_at_its_time_lies_in_the_segment_it_is_compared_with() -> None:
    """Section II-C.2 divides the audio as the images divide the clip: t_l = l D / (L - 1), the last just short of D."""
    for n_images in range(2, 40):
        for duration_s in (10.0, 9.97, 30.0):
            times = [duration_s * i / (n_images - 1) for i in range(n_images)]
            times[-1] = duration_s - 1 / 25
            assert [math.floor(t * n_images / duration_s) for t in times] == list(range(n_images))
