"""Laws of every pooling, and of TAP in particular."""

from __future__ import annotations

import pytest
import torch

from harken.errors import ConfigError, DataError
from harken.models.pooling import POOLINGS, cosine_similarity

DIM = 24
OPTIONS = {"netrvlad": {"n_clusters": 4}, "tap": {"dp": 12}, "xpool": {"dp": 12}}
VARIANTS = [(name, {}) for name in POOLINGS] + [("netrvlad", {"gating": True}), ("xpool", {"dp": None})]


def build(name: str, **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    pool = POOLINGS[name](dim=DIM, **(OPTIONS.get(name, {}) | more)).double().eval()
    for p in pool.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=1.0, std=0.3)  # a fresh LN has a gain of one and hides mistakes
    return pool


@pytest.fixture(params=VARIANTS, ids=str)
def pool(request: pytest.FixtureRequest) -> torch.nn.Module:
    name, options = request.param
    return build(name, **options)


@pytest.fixture(params=[{}, {"share_ln": False}, {"bias": True}], ids=str)
def tap(request: pytest.FixtureRequest) -> torch.nn.Module:
    return build("tap", **request.param)


def data(n_clips: int = 3, n_frames: int = 6, n_texts: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    frames = torch.randn(n_clips, n_frames, DIM, generator=g, dtype=torch.float64)
    texts = torch.randn(n_texts, DIM, generator=g, dtype=torch.float64)
    return frames, torch.ones(n_clips, n_frames, dtype=torch.bool), texts


def test_shape(pool) -> None:
    frames, mask, texts = data()
    assert pool(frames, mask, texts).shape == (3, 4 if pool.is_text_aware else 1, DIM)


@pytest.mark.parametrize("rubbish", [0.0, 1e6, float("nan"), float("inf")])
def test_padding_is_ignored(pool, rubbish: float) -> None:
    frames, mask, texts = data()
    padded = torch.cat([frames, torch.full((3, 5, DIM), rubbish, dtype=torch.float64)], dim=1)
    longer = torch.cat([mask, torch.zeros(3, 5, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(pool(padded, longer, texts), pool(frames, mask, texts))


def test_the_order_of_frames_does_not_matter(pool) -> None:
    frames, mask, texts = data()
    torch.testing.assert_close(pool(frames[:, torch.randperm(6)], mask, texts), pool(frames, mask, texts))


def test_a_clip_does_not_depend_on_its_companions(pool) -> None:
    frames, mask, texts = data()
    torch.testing.assert_close(pool(frames[1:2], mask[1:2], texts), pool(frames, mask, texts)[1:2])


def test_doubling_every_frame_does_not_change_the_direction(pool) -> None:
    frames, mask, texts = data()
    twice = pool(frames.repeat(1, 2, 1), mask.repeat(1, 2), texts)
    torch.testing.assert_close(cosine_similarity(texts, twice), cosine_similarity(texts, pool(frames, mask, texts)))


def test_gradients_are_finite_with_padding(pool) -> None:
    frames, mask, texts = data()
    mask[1, 1:] = False
    frames.requires_grad_()
    sim = cosine_similarity(texts, pool(frames, mask, texts))
    sim.square().sum().backward()
    assert bool(torch.isfinite(frames.grad).all())
    assert float(frames.grad[1, 1:].abs().max()) == 0
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in pool.parameters())


def test_a_clip_of_padding_alone_is_refused(pool) -> None:
    frames, mask, texts = data()
    mask[2] = False
    with pytest.raises(DataError, match="no valid frame"):
        pool(frames, mask, texts)


def test_no_tensor_is_stored_twice(pool) -> None:
    pointers = [v.data_ptr() for v in pool.state_dict().values()]
    assert len(pointers) == len(set(pointers))


def test_mean_max_and_their_sum() -> None:
    frames, mask, texts = data()
    mean, largest = frames.mean(1, keepdim=True), frames.amax(1, keepdim=True)
    torch.testing.assert_close(build("mean")(frames, mask, texts), mean)
    torch.testing.assert_close(build("max")(frames, mask, texts), largest)
    torch.testing.assert_close(build("meanmax")(frames, mask, texts), mean + largest)


def test_netrvlad_s_statistics_are_those_of_valid_frames() -> None:
    frames, mask, texts = data()
    a, b = build("netrvlad").train(), build("netrvlad").train()
    a(frames, mask, texts)
    b(torch.cat([frames, 1e3 + frames], 1), torch.cat([mask, ~mask], 1), texts)
    torch.testing.assert_close(a.bn.running_mean, b.bn.running_mean)


def test_netrvlad_s_gate_scales_each_dimension() -> None:
    frames, mask, texts = data()
    plain, gated = build("netrvlad"), build("netrvlad", gating=True)
    gated.load_state_dict(plain.state_dict(), strict=False)
    z = plain(frames, mask, texts)
    ratio = gated(frames, mask, texts) / z
    torch.testing.assert_close(ratio, torch.sigmoid(gated.gate(z[:, 0]))[:, None])
    assert float(ratio.detach().std()) > 0.01
    torch.nn.init.zeros_(gated.gate[1].weight)
    torch.nn.init.zeros_(gated.gate[1].bias)
    torch.testing.assert_close(gated(frames, mask, texts), z / 2)


def test_maxsim_takes_the_best_frame_of_each_text() -> None:
    frames, mask, texts = data()
    mask[1, 2:] = False
    pooled = build("maxsim")(frames, mask, texts)
    for c in range(3):
        for t in range(4):
            cosines = [float(torch.cosine_similarity(texts[t], f, dim=0)) for f in frames[c][mask[c]]]
            assert torch.equal(pooled[c, t], frames[c, cosines.index(max(cosines))])
            assert float(cosine_similarity(texts, pooled)[t, c]) == pytest.approx(max(cosines), rel=1e-12)


def test_maxsim_takes_the_first_of_equals_and_does_not_see_length() -> None:
    frames, mask, texts = data()
    best = build("maxsim")
    stretched = frames * torch.rand(3, 6, 1, generator=torch.Generator().manual_seed(0)).double().add(0.1)
    same = cosine_similarity(texts, best(stretched, mask, texts))
    torch.testing.assert_close(same, cosine_similarity(texts, best(frames, mask, texts)))
    doubled = torch.cat([frames, 2 * frames], dim=1)
    torch.testing.assert_close(best(doubled, mask.repeat(1, 2), texts), best(frames, mask, texts))


def test_xpool_has_x_pool_s_parameters_and_start() -> None:
    pool = POOLINGS["xpool"](dim=512)
    assert sum(p.numel() for p in pool.parameters()) == 1_316_352
    for projection in (pool.tap.query, pool.tap.key, pool.tap.value, pool.tap.out, pool.fc):
        assert torch.equal(projection.weight, torch.eye(512))
        assert not projection.bias.any()
    narrow = POOLINGS["xpool"](dim=DIM, dp=12)
    assert narrow.tap.query.weight.shape == (12, DIM)
    assert torch.equal(narrow.fc.weight, torch.eye(DIM))
    assert narrow.dropout.p == 0.3


def test_xpool_is_tap_and_a_residual() -> None:
    frames, mask, texts = data()
    pool = build("xpool")
    x = pool.tap(frames, mask, texts)
    torch.testing.assert_close(pool(frames, mask, texts), pool.ln_fc(x + x @ pool.fc.weight.T + pool.fc.bias))
    torch.nn.init.zeros_(pool.fc.weight)
    torch.nn.init.zeros_(pool.fc.bias)
    torch.testing.assert_close(pool(frames, mask, texts), pool.ln_fc(x))


def test_xpool_drops_in_training_alone() -> None:
    frames, mask, texts = data()
    pool = build("xpool")
    still = pool(frames, mask, texts)
    assert torch.equal(still, pool(frames, mask, texts))
    assert not torch.equal(still, pool.train()(frames, mask, texts))
    certain = build("xpool", dropout=0.0).train()
    torch.testing.assert_close(certain(frames, mask, texts), still)


def test_cosine_similarity_is_by_rows_of_text_and_columns_of_clips() -> None:
    frames, mask, texts = data()
    pooled = build("mean")(frames, mask, texts)
    sim = cosine_similarity(texts, pooled)
    assert sim.shape == (4, 3)
    torch.testing.assert_close(sim, cosine_similarity(texts, pooled.expand(-1, 4, -1)))
    torch.testing.assert_close(sim[1, 2], torch.cosine_similarity(texts[1], pooled[2, 0], dim=0))


def test_tap_has_the_papers_number_of_parameters() -> None:
    n = {s: sum(p.numel() for p in POOLINGS["tap"](dim=1024, dp=512, share_ln=s).parameters()) for s in (True, False)}
    assert n == {True: 2_101_248, False: 2_103_296}


@pytest.mark.parametrize("bias", [False, True])
def test_tap_may_start_as_a_mean_and_leaves_it(bias: bool) -> None:
    frames, mask, texts = data()
    mask[1, 2:] = False
    torch.manual_seed(0)
    flat = POOLINGS["tap"](dim=DIM, dp=12, bias=bias, start="uniform").double()
    torch.manual_seed(0)
    random = POOLINGS["tap"](dim=DIM, dp=12, bias=bias).double()
    torch.testing.assert_close(
        flat.attention(frames, mask, texts), (mask / mask.sum(1, keepdim=True))[:, None].expand(3, 4, 6).double()
    )
    for name in ("key", "value", "out"):
        assert torch.equal(getattr(flat, name).weight, getattr(random, name).weight)
    cosine_similarity(texts, flat(frames, mask, texts)).diagonal().sum().backward()
    assert flat.query.weight.grad.abs().max() > 1e-6
    torch.optim.SGD(flat.parameters(), 1.0).step()
    assert flat.attention(frames, mask, texts)[0].std() > 1e-4


def test_another_start_of_tap_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tap\.start: unknown name 'unifrom'\. Did you mean 'uniform'"):
        build("tap", start="unifrom")


def test_tap_with_no_query_is_a_uniform_mean(tap) -> None:
    frames, mask, texts = data()
    torch.nn.init.zeros_(tap.query.weight)
    if tap.query.bias is not None:
        torch.nn.init.zeros_(tap.query.bias)
    z = tap(frames, mask, texts)
    expected = tap.ln_out(tap.out(tap.value(tap.ln_audio(frames)).mean(1)))
    torch.testing.assert_close(z, expected[:, None].expand_as(z))


@pytest.mark.parametrize("n_frames", [1, 6])
def test_tap_of_identical_frames_does_not_read_the_text(tap, n_frames: int) -> None:
    frames, mask, texts = data(n_frames=n_frames)
    z = tap(frames[:, :1].expand(-1, n_frames, -1), mask, texts)
    expected = tap.ln_out(tap.out(tap.value(tap.ln_audio(frames[:, :1]))))
    torch.testing.assert_close(z, expected.expand_as(z))
    z.square().sum().backward()
    assert float(tap.key.weight.grad.abs().max()) < 1e-10


def test_tap_reads_the_direction_of_the_text(tap) -> None:
    frames, mask, texts = data()
    s = cosine_similarity(texts, tap(frames, mask, texts))
    torch.testing.assert_close(cosine_similarity(7 * texts, tap(frames, mask, 7 * texts)), s, atol=1e-5, rtol=1e-4)


def test_tap_without_key_mask_attends_to_padding() -> None:
    frames, mask, texts = data()
    mask[:, 4:] = False
    pool = build("tap", key_mask=False)
    torch.testing.assert_close(pool(frames, mask, texts), build("tap")(frames, torch.ones_like(mask), texts))
    assert not torch.allclose(pool(frames, mask, texts), build("tap")(frames, mask, texts))
