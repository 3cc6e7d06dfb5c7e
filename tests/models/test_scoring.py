"""score_matrix equals the naive path, in both precisions, at every tile size, gradients included."""

from __future__ import annotations

import pytest
import torch

from harken.models.pooling import POOLINGS, cosine_similarity
from harken.models.scoring import NaiveIndex, TapIndex, VectorIndex, index_clips, score_matrix

VARIANTS = [(n, {}) for n in POOLINGS] + [("tap", {"share_ln": False, "bias": True}), ("tap", {"key_mask": False})]


@pytest.fixture(params=VARIANTS, ids=str)
def case(request: pytest.FixtureRequest):
    name, options = request.param
    torch.manual_seed(0)
    pool = POOLINGS[name](dim=32, **options).double().eval()
    for p in pool.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=0.5, std=0.5)
    texts, frames = torch.randn(23, 32, dtype=torch.float64), torch.randn(11, 9, 32, dtype=torch.float64)
    mask = torch.arange(9) < torch.randint(1, 10, (11, 1))
    return pool, texts, frames, mask


def naive(pool, texts, frames, mask) -> torch.Tensor:
    return cosine_similarity(texts, pool(frames, mask, texts))


def test_equals_the_naive_path(case) -> None:
    pool, texts, frames, mask = case
    torch.testing.assert_close(
        score_matrix(texts, frames, mask, pool), naive(pool, texts, frames, mask), atol=1e-12, rtol=0
    )
    pool.float()
    single = score_matrix(texts.float(), frames.float(), mask, pool)
    torch.testing.assert_close(single, naive(pool, texts.float(), frames.float(), mask), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("text_chunk", "clip_chunk"), [(1, 1), (5, 3), (512, 64)])
def test_tiles_do_not_change_it(case, text_chunk: int, clip_chunk: int) -> None:
    pool, texts, frames, mask = case
    tiled = score_matrix(texts, frames, mask, pool, text_chunk=text_chunk, clip_chunk=clip_chunk)
    assert tiled.shape == (23, 11)
    torch.testing.assert_close(tiled, naive(pool, texts, frames, mask), atol=1e-12, rtol=0)


def test_gradients_equal_those_of_the_naive_path(case) -> None:
    pool, texts, frames, mask = case
    weight = torch.randn(23, 11, dtype=torch.float64)
    grads = []
    for path in (score_matrix, lambda t, f, m, p: naive(p, t, f, m)):
        t, f = texts.clone().requires_grad_(), frames.clone().requires_grad_()
        pool.zero_grad()
        (path(t, f, mask, pool) * weight).sum().backward()
        grads.append([t.grad, f.grad, *(p.grad.clone() for p in pool.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_padding_may_hold_anything() -> None:
    torch.manual_seed(0)
    pool = POOLINGS["tap"](dim=8).eval()
    texts, frames, mask = torch.randn(3, 8), torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    mask[:, 3] = False
    spoilt = frames.clone()
    spoilt[:, 3] = float("nan")
    torch.testing.assert_close(
        score_matrix(texts, spoilt, mask, pool), score_matrix(texts, frames[:, :3], mask[:, :3], pool)
    )


def test_autocast_does_not_lower_its_precision() -> None:
    torch.manual_seed(0)
    pool = POOLINGS["tap"](dim=64).eval()
    texts, frames, mask = torch.randn(9, 64), torch.randn(5, 7, 64), torch.ones(5, 7, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = score_matrix(texts, frames, mask, pool)
    torch.testing.assert_close(under, score_matrix(texts, frames, mask, pool))


def test_each_pooling_takes_its_cheapest_exact_path(case) -> None:
    pool, _, frames, mask = case
    assert isinstance(index_clips(pool, frames, mask), TapIndex if pool.is_text_aware else VectorIndex)

    def foreign(frames, mask, text):
        return pool(frames, mask, text)

    assert isinstance(index_clips(foreign, frames, mask), NaiveIndex)


def test_a_foreign_pooling_is_scored_by_its_own_forward(case) -> None:
    pool, texts, frames, mask = case
    scores = score_matrix(texts, frames, mask, lambda f, m, t: pool(f, m, t), text_chunk=4, clip_chunk=2)
    torch.testing.assert_close(scores, naive(pool, texts, frames, mask), atol=1e-12, rtol=0)


def test_no_tensor_of_text_by_clip_by_dim_is_built() -> None:
    pool = POOLINGS["tap"](dim=256, dp=64).eval()
    texts, frames, mask = torch.randn(40, 256), torch.randn(30, 5, 256), torch.ones(30, 5, dtype=torch.bool)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(
                        o.numel()
                        for o in (out if isinstance(out, (tuple, list)) else [out])
                        if isinstance(o, torch.Tensor)
                    ),
                ]
            )
            return out

    with Watch(), torch.no_grad():
        score_matrix(texts, frames, mask, pool)
    assert largest < 40 * 30 * 256 / 4
