"""Laws of every match: which image goes with which audio."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from harken.errors import ConfigError, DataError
from harken.models.features import Part
from harken.models.losses import LOSSES
from harken.models.matching import MATCHES, Match, draw_images, nearest_images, pair_similarity

VARIANTS = [
    ("random_image", {}),
    ("nearest_image", {"n_warmup": 0}),
    ("nearest_image", {"n_warmup": 0, "scope": "all_pairs"}),
    ("nearest_image", {"n_warmup": 9}),
    ("nearest_image", {"n_warmup": 9, "scope": "all_pairs"}),
    ("multiframe", {}),
    ("multiframe", {"row_norm": True}),
]


@pytest.fixture(params=VARIANTS, ids=str)
def case(request: pytest.FixtureRequest):
    name, options = request.param
    return name, MATCHES[name](**options)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(name: str, n_clips: int = 5, n_images: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    g = seeded(1)
    images = torch.randn(n_clips, n_images, 8, generator=g, dtype=torch.float64)
    audio = torch.randn(n_clips, n_images, 8, generator=g, dtype=torch.float64)
    return (audio if name == "multiframe" else audio[:, 0].contiguous()), images


def draws(name: str, match: Match) -> bool:
    """Whether epoch 0 is one of drawn images."""
    return name == "random_image" or getattr(match, "n_warmup", 0) > 0


def test_every_entry_has_a_variant_and_is_a_match() -> None:
    assert {name for name, _ in VARIANTS} == set(MATCHES)
    assert all(isinstance(MATCHES[name](**options), Match) for name, options in VARIANTS)


def test_cosines_with_clips_in_columns(case) -> None:
    name, match = case
    audio, images = data(name)
    sim = match(audio, images, 0, seeded())
    assert sim.shape == (5, 5)
    assert float(sim.abs().max()) <= 1 + 1e-12
    spoilt = audio.clone()
    spoilt[2] = 1.0
    changed = (match(spoilt, images, 0, seeded()) != sim).any(0)
    if match.chosen is None or getattr(match, "scope", "") == "all_pairs" or draws(name, match):
        assert changed.nonzero().flatten().tolist() == [2]  # audio 2 is column 2
    assert bool(changed[2])


def test_sides_are_all_that_a_similarity_needs(case) -> None:
    name, match = case
    audio, images = data(name)
    image_side, audio_side = match.sides(audio, images, 0, seeded())
    chosen = match.chosen
    assert (
        image_side.shape
        == {
            "multiframe": (5, 32),
            "nearest_image": (5, 8) if draws(name, match) or match.__dict__.get("scope") == "own_clip" else (5, 4, 8),
            "random_image": (5, 8),
        }[name]
    )
    for side in (image_side, audio_side):
        torch.testing.assert_close(side.norm(dim=-1), torch.ones(side.shape[:-1], dtype=torch.float64))
    expected = match(audio, images, 0, seeded())
    assert torch.equal(match.similarity(image_side, audio_side), expected)
    assert (chosen is None and match.chosen is None) or torch.equal(chosen, match.chosen)
    if chosen is not None and image_side.ndim == 2:
        assert torch.equal(pair_similarity(audio, images, chosen), expected)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_block_is_the_block_of_the_whole_matrix(case, dtype: torch.dtype, atol: float) -> None:
    name, match = case
    audio, images = (x.to(dtype) for x in data(name, n_clips=7))
    whole = match(audio, images, 0, seeded())
    image_side, audio_side = match.sides(audio, images, 0, seeded())
    for rows, columns in (
        (slice(2, 5), slice(7)),
        (slice(7), slice(2, 5)),
        (slice(6, 7), slice(3)),
        (slice(0), slice(7)),
    ):
        block = match.similarity(image_side[rows], audio_side[columns])
        assert block.dtype == dtype
        torch.testing.assert_close(block, whole[rows, columns], atol=atol, rtol=0)


@pytest.mark.parametrize("cuts", [(0, 7), (0, 4, 7), (0, 3, 3, 5, 7)], ids=str)
def test_parts_make_what_one_process_makes(case, cuts: tuple[int, ...]) -> None:
    """Also what is drawn, and where the draw leaves the generator."""
    name, match = case
    audio, images = data(name, n_clips=7)
    one = seeded(3)
    whole = match.sides(audio, images, 0, one)
    chosen, found, drawn = match.chosen, [], []
    for first, end in itertools.pairwise(cuts):
        g = seeded(3)
        found.append(match.sides(audio[first:end], images[first:end], 0, g, Part(first, 7)))
        drawn.append(match.chosen)
        assert torch.equal(g.get_state(), one.get_state())
    for side, parts in zip(whole, zip(*found, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), side)
    if chosen is None:
        assert drawn == [None] * len(drawn)
    else:
        assert torch.equal(torch.cat(drawn), chosen)
    if draws(name, match):
        assert not torch.equal(match.sides(audio[2:], images[2:], 0, seeded(3))[0], whole[0][2:])


def test_a_gradient_through_blocks_is_that_through_the_whole(case) -> None:
    name, match = case
    audio, images = data(name)
    weights = torch.randn(5, 5, generator=seeded(9), dtype=torch.float64)
    grads = []
    for in_blocks in (False, True):
        a = audio.clone().requires_grad_()
        if in_blocks:
            image_side, audio_side = match.sides(a, images, 0, seeded())
            sim = torch.cat([match.similarity(image_side[r], audio_side) for r in (slice(2), slice(2, 5))])
        else:
            sim = match(a, images, 0, seeded())
        (sim * weights).sum().backward()
        grads.append(a.grad)
    torch.testing.assert_close(*grads)


def test_with_one_image_all_matches_agree(case) -> None:
    name, match = case
    audio, images = data("random_image", n_images=1)
    expected = F.normalize(images[:, 0], dim=-1) @ F.normalize(audio, dim=-1).T
    sim = match(audio[:, None] if name == "multiframe" else audio, images, 0, seeded())
    torch.testing.assert_close(sim, expected)


def test_scaling_either_side_changes_nothing(case) -> None:
    name, match = case
    audio, images = data(name)
    torch.testing.assert_close(match(3 * audio, 5 * images, 0, seeded()), match(audio, images, 0, seeded()))


def test_gradients_reach_the_audio_and_are_finite(case) -> None:
    name, match = case
    audio, images = data(name)
    audio.requires_grad_()
    match(audio, images, 0, seeded()).square().sum().backward()
    assert bool(torch.isfinite(audio.grad).all())
    assert bool(audio.grad.flatten(1).any(1).all())


def test_permuting_the_clips_permutes_both_axes(case) -> None:
    name, match = case
    if draws(name, match):
        pytest.skip("the draw goes by position")
    audio, images = data(name)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(match(audio[order], images[order], 0), match(audio, images, 0)[order][:, order])


def test_shapes_that_do_not_belong_together_are_refused(case) -> None:
    name, match = case
    audio, images = data(name)
    for wrong in (audio[:4], audio[0], audio[:, :3] if name == "multiframe" else audio[:, None]):
        with pytest.raises(DataError, match=name):
            match(wrong, images, 0, seeded())


def test_half_precision_is_compared_in_single(case) -> None:
    name, match = case
    audio, images = data(name)
    single = match(audio.half().float(), images.half().float(), 0, seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = match(audio.half(), images.half(), 0, seeded())
        block = match.similarity(*match.sides(audio.half(), images.half(), 0, seeded()))
    assert half.dtype == block.dtype == torch.float32
    torch.testing.assert_close(half, single)
    torch.testing.assert_close(block, single)
    gathered = [side.bfloat16() for side in match.sides(audio, images, 0, seeded())]
    assert match.similarity(*gathered).dtype == torch.float32


def test_a_draw_without_a_generator_is_refused() -> None:
    audio, images = data("random_image")
    for match in (MATCHES["random_image"](), MATCHES["nearest_image"](n_warmup=1)):
        with pytest.raises(ConfigError, match="generator"):
            match(audio, images, 0)
        with pytest.raises(ConfigError, match="generator"):
            match.sides(audio, images, 0, part=Part(0, 5))


@pytest.mark.parametrize("part", [Part(-1, 9), Part(5, 9), Part(0, 4)])
def test_clips_that_their_part_cannot_hold_are_refused(part: Part) -> None:
    audio, images = data("random_image")
    with pytest.raises(ConfigError, match=f"5 clips from {part.first} on do not lie in a batch of {part.of}"):
        MATCHES["random_image"]().sides(audio, images, 0, seeded(), part)
    assert len(draw_images(images, seeded(), Part(4, 9))) == 5


def test_an_unknown_scope_is_named() -> None:
    with pytest.raises(ConfigError, match="own_clip"):
        MATCHES["nearest_image"](n_warmup=0, scope="own_clips")


def test_the_draw_is_uniform_and_a_function_of_the_generator() -> None:
    match = MATCHES["random_image"]()
    audio, images = torch.randn(4000, 2), torch.randn(4000, 4, 2)
    match(audio, images, 0, seeded())
    first = match.chosen
    assert min(torch.bincount(first, minlength=4)) > 900
    match(audio, images, 0, seeded())
    assert torch.equal(first, match.chosen)
    before = torch.random.get_rng_state()
    match(audio, images, 0, seeded(1))
    assert not torch.equal(first, match.chosen)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("scope", ["own_clip", "all_pairs"])
def test_warming_up_is_random_image_to_the_bit(scope: str) -> None:
    audio, images = data("nearest_image")
    nearest, random = MATCHES["nearest_image"](n_warmup=3, scope=scope), MATCHES["random_image"]()
    a, b = seeded(), seeded()
    for epoch in range(3):
        assert torch.equal(nearest(audio, images, epoch, a), random(audio, images, epoch, b))
    assert torch.equal(a.get_state(), b.get_state())
    state = a.get_state()
    nearest(audio, images, 3, a)
    assert torch.equal(a.get_state(), state)
    assert torch.equal(nearest.chosen, nearest_images(audio, images))


def trained(match: Match, epochs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of a linear audio tower after training, and where its generator is then."""
    g = seeded(5)
    audio, images = torch.randn(12, 6, generator=g), torch.randn(12, 4, 8, generator=g)
    weight = torch.randn(8, 6, generator=g).requires_grad_()
    for epoch in range(epochs):
        for clips in torch.randperm(12, generator=g).split(6):
            loss = LOSSES["infonce"](10 * match(audio[clips] @ weight.T, images[clips], epoch, g))
            (grad,) = torch.autograd.grad(loss, weight)
            weight = (weight - 0.1 * grad).detach().requires_grad_()
    return weight.detach(), g.get_state()


@pytest.mark.parametrize("scope", ["own_clip", "all_pairs"])
def test_a_run_that_only_warms_up_is_the_run_with_random_images_to_the_bit(scope: str) -> None:
    nearest = MATCHES["nearest_image"]
    weight, state = trained(MATCHES["random_image"](), 4)
    same, at = trained(nearest(n_warmup=4, scope=scope), 4)
    assert torch.equal(same, weight)
    assert torch.equal(at, state)
    other, at = trained(nearest(n_warmup=3, scope=scope), 4)
    assert not torch.equal(other, weight)
    assert not torch.equal(at, state)


def test_the_nearest_image_beats_every_other_of_its_clip() -> None:
    audio, images = data("nearest_image")
    cosine = F.cosine_similarity(audio[:, None], images, dim=-1)
    match = MATCHES["nearest_image"](n_warmup=0)
    torch.testing.assert_close(match(audio, images, 0).diagonal(), cosine.amax(1))
    assert match.chosen.tolist() == cosine.argmax(1).tolist()
    drawn = MATCHES["random_image"]()(audio, images, 0, seeded()).diagonal()
    assert bool((match(audio, images, 0).diagonal() >= drawn).all())
    assert bool((match(audio, images, 0).diagonal() > drawn).any())
    all_pairs = MATCHES["nearest_image"](n_warmup=0, scope="all_pairs")
    assert bool((all_pairs(audio, images, 0) >= match(audio, images, 0) - 1e-12).all())
    torch.testing.assert_close(all_pairs(audio, images, 0).diagonal(), cosine.amax(1))


def test_equal_images_are_told_apart_by_the_earliest() -> None:
    audio, images = data("nearest_image")
    same = images[:, :1].expand(-1, 4, -1)
    match = MATCHES["nearest_image"](n_warmup=0)
    torch.testing.assert_close(match(audio, same, 0), MATCHES["random_image"]()(audio, same, 0, seeded()))
    assert match.chosen.tolist() == [0] * 5


def test_multiframe_with_normalised_rows_is_the_mean_cosine() -> None:
    audio, images = data("multiframe")
    mean = torch.einsum("qld,kld->kq", F.normalize(audio, dim=-1), F.normalize(images, dim=-1)) / 4
    torch.testing.assert_close(MATCHES["multiframe"](row_norm=True)(audio, images, 0), mean, atol=1e-15, rtol=0)
    assert not torch.allclose(MATCHES["multiframe"]()(audio, images, 0), mean, atol=1e-3)


def test_multiframe_is_about_which_segment_meets_which_image() -> None:
    audio, images = data("multiframe")
    match, order = MATCHES["multiframe"](), [2, 0, 3, 1]
    torch.testing.assert_close(match(audio[:, order], images[:, order], 0), match(audio, images, 0))
    assert not torch.allclose(match(audio[:, order], images, 0), match(audio, images, 0))
    assert not torch.allclose(match(audio, images[:, order], 0), match(audio, images, 0))
    assert match.chosen is None
