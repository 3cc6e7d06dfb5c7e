"""Tsubaki et al. (2024), equation by equation, one loop per sum, against the library's vectorised forms."""

from __future__ import annotations

import math

import pytest
import torch

from harken.models.audio_vit import AudioViT
from harken.models.losses import infonce
from harken.models.matching import MATCHES
from harken.models.towers import AudioTower, text_similarity

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


def tower(division: str, at_pool: str = "mean") -> AudioTower:
    """Four segments of 200 fbank frames, in float64; the image times that Multiframe Match has."""
    torch.manual_seed(0)
    vit = AudioViT(width=12, layers=2, heads=2, embed_dim=6, n_frames=200 if division == "token_pool" else 50)
    return AudioTower(vit, 4, division=division, centres=[0, 1 / 3, 2 / 3, 1], at_pool=at_pool).double().eval()


def fbank() -> torch.Tensor:
    return torch.randn(2, 200, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def read_out(t: AudioTower, token: Vector) -> Vector:
    """ln_post and proj of one token."""
    gain, bias, proj = t.vit.ln_post.weight.tolist(), t.vit.ln_post.bias.tolist(), t.vit.proj.tolist()
    mean = sum(token) / len(token)
    std = math.sqrt(sum((x - mean) ** 2 for x in token) / len(token) + 1e-5)
    normed = [(x - mean) / std * g + b for x, g, b in zip(token, gain, bias, strict=True)]
    return [sum(x * row[d] for x, row in zip(normed, proj, strict=True)) for d in range(len(proj[0]))]


def close(found: torch.Tensor, expected: list[list[Vector]] | list[Vector]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-10)


@torch.no_grad()
def test_a_all_as_segments_and_windows() -> None:
    """Section II-C.2, "audio is also divided into frames": a stretch of 50 for each image, one after the other or
    around its time, t_l = l / 3 of the clip, as far as the clip goes.
    """
    x = fbank()
    for division in ("segment", "window"):
        t = tower(division)
        expected = []
        for clip in x:
            rows = []
            for n in range(4):
                first = 50 * n if division == "segment" else [0, 67 - 25, 133 - 25, 150][n]
                rows.append(t.vit(clip[None, first : first + 50]).summary[0].tolist())
            expected.append(rows)
        close(t.segments(x), expected)


@torch.no_grad()
def test_a_all_as_pooled_tokens() -> None:
    """The other reading of section II-C.2: one pass; mean over mel, then over as many bins of time as images."""
    t, x = tower("token_pool"), fbank()
    seen: list[torch.Tensor] = []
    t.vit.transformer.resblocks[-1].register_forward_hook(lambda *a: seen.append(a[-1]))
    found = t.segments(x)
    n_steps, n_mel, expected = (200 - 32) // 16 + 1, (128 - 32) // 24 + 1, []
    for tokens in seen[0].tolist():
        assert len(tokens) == 1 + n_steps * n_mel
        steps = [
            [sum(tokens[1 + n_mel * s + m][d] for m in range(n_mel)) / n_mel for d in range(12)] for s in range(n_steps)
        ]
        rows = []
        for n in range(4):
            first, end = math.floor(n * n_steps / 4), math.ceil((n + 1) * n_steps / 4)
            rows.append(read_out(t, [sum(s[d] for s in steps[first:end]) / (end - first) for d in range(12)]))
        expected.append(rows)
    close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("division", ["segment", "token_pool", "window"])
def test_text_meets_the_mean_of_segments_or_all_of_them(division: str) -> None:
    """Section II-D, with a tower of L outputs and one text: cosine with their mean direction, or eq. 4 with the text
    in the place of every image.
    """
    x = fbank()
    texts = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for at_pool in ("mean", "flatten_repeat"):
        t = tower(division, at_pool)
        expected = []
        for text in texts.tolist():
            row = []
            for segments in t.segments(x).tolist():
                if at_pool == "mean":
                    units = [[v / math.sqrt(sum(w * w for w in a)) for v in a] for a in segments]
                    row.append(cos(text, [sum(u[d] for u in units) / 4 for d in range(6)]))
                else:
                    length = math.sqrt(sum(v * v for v in text))
                    row.append(cos([v for a in segments for v in a], [v / length for v in text] * 4))
            expected.append(row)
        close(text_similarity(texts, t.pooled(x)), expected)


@torch.no_grad()
def test_text_meets_the_whole_clip_in_one_pass() -> None:
    """The tower of 50 frames, 2 x 5 positions, on all 200: its positions are stretched to 11 x 5, between the centres
    of cells and level beyond the outer ones.
    """
    t, x = tower("segment", "full_clip"), fbank()
    old, whole = t.vit.positional_embedding.tolist(), tower("token_pool")
    assert (t.vit.pos_grid, whole.vit.pos_grid) == ((2, 5), (11, 5))
    stretched = [old[0]]
    for step in range(11):
        at = min(max((step + 0.5) * 2 / 11 - 0.5, 0.0), 1.0)
        for mel in range(5):
            stretched.append([(1 - at) * a + at * b for a, b in zip(old[1 + mel], old[1 + 5 + mel], strict=True)])
    state = {**t.vit.state_dict(), "positional_embedding": torch.tensor(stretched, dtype=torch.float64)}
    whole.vit.load_state_dict(state)
    texts = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    clips = whole.vit(x).summary.tolist()
    close(text_similarity(texts, t.pooled(x)), [[cos(text, clip) for clip in clips] for text in texts.tolist()])


def test_an_image_taken_at_its_time_lies_in_the_segment_it_is_compared_with() -> None:
    """Section II-C.2 divides the audio as the images divide the clip: t_l = l D / (L - 1), the last just short of D."""
    for n_images in range(2, 40):
        for duration_s in (10.0, 9.97, 30.0):
            times = [duration_s * i / (n_images - 1) for i in range(n_images)]
            times[-1] = duration_s - 1 / 25
            assert [math.floor(t * n_images / duration_s) for t in times] == list(range(n_images))
