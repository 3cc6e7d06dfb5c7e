"""score_matrix equals the naive path, in both precisions, at every tile size, gradients included."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from harken.errors import DataError
from harken.models.losses import nt_xent, pmr
from harken.models.pooling import POOLINGS, cosine_similarity
from harken.models.scoring import (
    MaxSimIndex,
    NaiveIndex,
    TapIndex,
    VectorIndex,
    XPoolIndex,
    batch_similarity,
    index_clips,
    prepare,
    score_matrix,
)

VARIANTS = [(n, {}) for n in POOLINGS] + [
    ("tap", {"share_ln": False, "bias": True}),
    ("tap", {"key_mask": False}),
    ("tap", {"dp": 12, "bias": True}),
    ("xpool", {"dp": 12}),
    ("xpool", {"key_mask": False}),
]


def randomised(pool: torch.nn.Module) -> torch.nn.Module:
    """With gains, shifts and biases that hide no mistake, and no identity in it."""
    for p in pool.parameters():
        torch.nn.init.normal_(p, mean=0.5, std=0.5) if p.ndim == 1 else p.data.add_(0.2 * torch.randn_like(p))
    return pool


@pytest.fixture(params=VARIANTS, ids=str)
def case(request: pytest.FixtureRequest):
    name, options = request.param
    torch.manual_seed(0)
    pool = randomised(POOLINGS[name](dim=32, **options).double().eval())
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


@pytest.mark.parametrize(("text_chunk", "clip_chunk"), [(1, 16), (32, 1), (5, 3), (512, 64)])
def test_tiles_do_not_change_it(case, text_chunk: int, clip_chunk: int) -> None:
    pool, texts, frames, mask = case
    tiled = score_matrix(texts, frames, mask, pool, text_chunk=text_chunk, clip_chunk=clip_chunk)
    assert tiled.shape == (23, 11)
    torch.testing.assert_close(tiled, naive(pool, texts, frames, mask), atol=1e-12, rtol=0)


def test_gradients_equal_those_of_the_naive_path(case) -> None:
    pool, texts, frames, mask = case
    weight = torch.randn(23, 11, dtype=torch.float64)
    grads = []
    chunked = partial(score_matrix, text_chunk=12, clip_chunk=4)
    for path in (lambda t, f, m, p: naive(p, t, f, m), score_matrix, chunked):
        t, f = texts.clone().requires_grad_(), frames.clone().requires_grad_()
        pool.zero_grad()
        (path(t, f, mask, pool) * weight).sum().backward()
        grads.append([t.grad, f.grad, *(p.grad.clone() for p in pool.parameters())])
    for a, b, c in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(c, a, atol=1e-10, rtol=1e-8)


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


def test_frames_that_all_but_cancel_cost_precision_within_a_bound() -> None:
    """Where what is pooled is a hundredth of its frames, the quadratic forms round as much as the square of that."""
    torch.manual_seed(0)
    pool = POOLINGS["tap"](dim=256, dp=128).eval()
    one, texts, mask = torch.randn(16, 1, 256), torch.randn(20, 256), torch.ones(16, 2, dtype=torch.bool)
    frames = torch.cat([one, 0.01 * torch.randn(16, 1, 256) - one], dim=1)
    scores = score_matrix(texts, frames, mask, pool).detach()
    exact = naive(pool.double(), texts.double(), frames.double(), mask).detach()
    assert float((scores - exact).abs().max()) < 1e-4


def test_autocast_does_not_lower_its_precision() -> None:
    torch.manual_seed(0)
    pool = POOLINGS["tap"](dim=64).eval()
    texts, frames, mask = torch.randn(9, 64), torch.randn(5, 7, 64), torch.ones(5, 7, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = score_matrix(texts, frames, mask, pool)
    torch.testing.assert_close(under, score_matrix(texts, frames, mask, pool))


@pytest.mark.parametrize("name", POOLINGS)
def test_each_pooling_takes_its_cheapest_exact_path(name: str) -> None:
    pool = POOLINGS[name](dim=8).eval()
    frames, mask = torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    expected = {"tap": TapIndex, "xpool": XPoolIndex, "maxsim": MaxSimIndex}.get(name, VectorIndex)
    assert isinstance(index_clips(pool, frames, mask), expected)

    def foreign(frames, mask, text):
        return pool(frames, mask, text)

    assert isinstance(index_clips(foreign, frames, mask), NaiveIndex)
    if name == "xpool":  # its dropout cannot be folded; without dropout training can
        assert isinstance(index_clips(pool.train(), frames, mask), NaiveIndex)
        assert isinstance(index_clips(POOLINGS[name](dim=8, dropout=0.0), frames, mask), XPoolIndex)


def test_an_index_scores_texts_and_prepared_texts_alike(case) -> None:
    pool, texts, frames, mask = case
    index = index_clips(pool, frames, mask)
    assert torch.equal(index.score(texts), index.meet(*prepare(pool, texts)))
    torch.testing.assert_close(index.score(texts), naive(pool, texts, frames, mask), atol=1e-12, rtol=0)


def test_a_clip_of_padding_alone_is_refused(case) -> None:
    pool, texts, frames, mask = case
    mask[4] = False
    if getattr(getattr(pool, "tap", pool), "key_mask", True):
        with pytest.raises(DataError, match="no valid frame"):
            score_matrix(texts, frames, mask, pool)
    else:  # it attends to padding
        torch.testing.assert_close(score_matrix(texts, frames, mask, pool), naive(pool, texts, frames, mask))


def kept_for_the_gradient(make) -> tuple[torch.Tensor, int]:
    """What `make` returns and how many numbers autograd keeps to differentiate it, the same storage counted once."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        return make(), sum(kept.values())


@pytest.mark.parametrize("name", ["tap", "xpool"])
def test_nothing_of_pairs_is_kept_for_the_gradient_of_several_chunks(name: str) -> None:
    torch.manual_seed(0)
    pool = POOLINGS[name](dim=16, dp=8).double().eval()
    texts = torch.randn(120, 16, dtype=torch.float64, requires_grad=True)
    frames = torch.randn(120, 9, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(120, 9, dtype=torch.bool)
    one, all_at_once = kept_for_the_gradient(lambda: score_matrix(texts, frames, mask, pool, clip_chunk=120))
    several, in_chunks = kept_for_the_gradient(lambda: score_matrix(texts, frames, mask, pool, clip_chunk=40))
    given = [texts, frames, *pool.parameters()]
    of_pairs = 120 * 120 * 9
    assert all_at_once > of_pairs
    assert in_chunks < sum(g.numel() for g in given) + 10 * texts.numel() < of_pairs
    weight = torch.randn(120, 120, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((s * weight).sum(), given) for s in (one, several)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


LOSS_OF = {
    "nt_xent": lambda sim: nt_xent(sim, temperature=0.07),
    "pmr": lambda sim: pmr(sim, temperature=0.07, prior_scale=1 / 0.07),
}


def gradients(pool, texts, frames, mask, similarity, loss) -> dict[str, torch.Tensor]:
    texts, frames = texts.clone().requires_grad_(), frames.clone().requires_grad_()
    pool.zero_grad()
    loss(similarity(pool, texts, frames, mask)).backward()
    parameters = {n: p.grad.clone() for n, p in pool.named_parameters()}
    return {"texts": texts.grad, "frames": frames.grad} | parameters


def of_batch(pool, texts, frames, mask) -> torch.Tensor:
    return batch_similarity(texts, frames, mask, pool)


@pytest.mark.parametrize(
    ("n", "loss"), [(24, "nt_xent"), (96, "pmr"), pytest.param(256, "pmr", marks=pytest.mark.slow)]
)
def test_a_training_batch_of_tap_has_the_naive_gradient(n: int, loss: str) -> None:
    """To 1e-5 of each tensor's largest entry in single precision, padding and several chunks included.

    Against the naive gradient in double: at 256 the naive one in single is itself off by 1e-5 for ln_out.
    """
    torch.manual_seed(0)
    pool = POOLINGS["tap"](dim=64, dp=32)
    for p in pool.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=1.0, std=0.3)
    texts = torch.randn(n, 64)
    frames, mask = texts[:, None] + torch.randn(n, 31, 64), torch.arange(31) < torch.randint(5, 32, (n, 1))
    found = gradients(pool, texts, frames, mask, of_batch, LOSS_OF[loss])
    expected = gradients(pool.double(), texts.double(), frames.double(), mask, naive, LOSS_OF[loss])
    double = gradients(pool, texts.double(), frames.double(), mask, of_batch, LOSS_OF[loss])
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        assert float((found[name] - gradient).abs().max()) < 1e-5 * largest, name
        assert float((double[name] - gradient).abs().max()) < 1e-12 * largest, name


def test_chunks_of_a_pooling_with_dropout_are_computed_again_with_the_same_dropout() -> None:
    torch.manual_seed(0)
    pool = POOLINGS["xpool"](dim=16, dropout=0.5).train()
    texts, frames, mask = torch.randn(6, 16), torch.randn(8, 3, 16), torch.ones(8, 3, dtype=torch.bool)
    weight = torch.randn(6, 8)

    def by_hand(p, t, f, m):
        return torch.cat([naive(p, t, f[i : i + 2], m[i : i + 2]) for i in range(0, 8, 2)], dim=1)

    found = []
    for similarity in (by_hand, lambda p, t, f, m: score_matrix(t, f, m, p, clip_chunk=2)):
        torch.manual_seed(1)
        found.append(gradients(pool, texts, frames, mask, similarity, lambda sim: (sim * weight).sum()))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("options", [{}, {"gating": True}], ids=str)
def test_a_batch_norm_sees_a_training_batch_whole_and_once(options: dict) -> None:
    torch.manual_seed(0)
    a = POOLINGS["netrvlad"](dim=16, n_clusters=4, **options).train()
    b = POOLINGS["netrvlad"](dim=16, n_clusters=4, **options).train()
    b.load_state_dict(a.state_dict())
    texts, frames, mask = torch.randn(80, 16), torch.randn(80, 3, 16), torch.ones(80, 3, dtype=torch.bool)
    torch.testing.assert_close(batch_similarity(texts, frames, mask, a), naive(b, texts, frames, mask))
    assert int(a.bn.num_batches_tracked) == 1
    torch.testing.assert_close(a.bn.running_var, b.bn.running_var)


def test_a_training_batch_of_any_pooling_is_scored_as_the_naive_path_does(case) -> None:
    pool, texts, frames, mask = case
    expected = naive(pool, texts, frames, mask)
    torch.testing.assert_close(batch_similarity(texts, frames, mask, pool), expected, atol=1e-12, rtol=0)


BFLOAT16_BOUND = 5e-4  # of a cosine; measured: at most 3.7e-4 at dim 256, 1.9e-4 at 1024


@pytest.mark.parametrize("name", POOLINGS)
def test_frames_in_bfloat16_cost_little(name: str) -> None:
    torch.manual_seed(0)
    pool = POOLINGS[name](dim=256).eval()
    texts = torch.randn(40, 256)
    frames, mask = texts[:20, None] + torch.randn(20, 31, 256), torch.arange(31) < torch.randint(1, 32, (20, 1))
    half = score_matrix(texts, frames.bfloat16(), mask, pool).detach()
    assert half.dtype == torch.float32
    exact = naive(pool.double(), texts.double(), frames.double(), mask).detach()
    assert 1e-6 < float((half - exact).abs().max()) < BFLOAT16_BOUND


def test_a_foreign_pooling_is_scored_by_its_own_forward(case) -> None:
    pool, texts, frames, mask = case
    scores = score_matrix(texts, frames, mask, lambda f, m, t: pool(f, m, t), text_chunk=12, clip_chunk=4)
    torch.testing.assert_close(scores, naive(pool, texts, frames, mask), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "options"), [("tap", {"dp": 64}), ("xpool", {"dp": 64}), ("maxsim", {})])
def test_no_tensor_of_text_by_clip_by_dim_is_built(name: str, options: dict) -> None:
    pool = POOLINGS[name](dim=256, **options).eval()
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
