"""The audio tower: where its segments come from, and what a text meets of them. Paper A's towers, and what rests."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harken.errors import ConfigError, DataError
from harken.models.audio_vit import AudioViT
from harken.models.features import AudioFeatures
from harken.models.losses import LearnedTemperature
from harken.models.matching import MATCHES
from harken.models.panns import Cnn14
from harken.models.pooling import POOLINGS
from harken.models.towers import (
    AT_POOLS,
    DIVISIONS,
    PRE_PROJECTION,
    AudioTower,
    StoredFrames,
    StoredTexts,
    TextAudio,
    frames_of_pass,
    text_similarity,
    window_starts,
)

N_FRAMES = 400
ENDPOINTS = (0.0, 1 / 3, 2 / 3, 1.0)


def tower(
    division: str = "segment", at_pool: str = "mean", n_segments: int = 4, n_frames: int = N_FRAMES, **kw
) -> AudioTower:
    torch.manual_seed(0)
    length = frames_of_pass(n_frames, n_segments, division)
    vit = AudioViT(width=32, layers=2, heads=2, embed_dim=16, n_frames=length)
    centres = kw.pop("centres", ENDPOINTS if n_segments == 4 else [0.5] * n_segments)
    return AudioTower(vit, n_segments, division=division, centres=centres, at_pool=at_pool, **kw).eval()


def fbank(n_clips: int = 2, n_frames: int = N_FRAMES, seed: int = 0) -> Tensor:
    return torch.randn(n_clips, n_frames, 128, generator=torch.Generator().manual_seed(seed))


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=itertools.product(DIVISIONS, AT_POOLS), ids="-".join)
def either(request: pytest.FixtureRequest) -> AudioTower:
    return tower(*request.param)


def heard(t: AudioTower, first: int, end: int, x: Tensor) -> list[int]:
    """The segments whose embedding changes with those fbank frames."""
    y = x.clone()
    y[:, first:end] += 100
    return (t.segments(y) != t.segments(x)).any(-1).any(0).nonzero().flatten().tolist()


@pytest.mark.parametrize("division", DIVISIONS)
def test_a_single_segment_is_the_whole_clip(division: str) -> None:
    """Of `segment` and `window` its CLS, wherever the centre is; of `token_pool` the mean of all tokens."""
    t, x = tower(division, n_segments=1, centres=[0.9]), fbank()
    tokens: list[Tensor] = []
    t.vit.transformer.resblocks[1].register_forward_hook(lambda *a: tokens.append(a[-1]))
    with torch.no_grad():
        found, whole = t.segments(x), t.vit(x).summary
        mean = t.vit.ln_post(tokens[0][:, 1:].mean(1)) @ t.vit.proj
    assert found.shape == (2, 1, 16)
    if division == "token_pool":
        torch.testing.assert_close(found[:, 0], mean, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found[:, 0], whole, atol=1e-3)
    else:
        assert torch.equal(found[:, 0], whole)


def test_segments_are_equal_stretches_each_embedded_alone() -> None:
    t, x = tower(), fbank()
    with torch.no_grad():
        for i, segment in enumerate(t.segments(x).unbind(1)):
            torch.testing.assert_close(segment, t.vit(x[:, 100 * i : 100 * i + 100]).summary, atol=1e-5, rtol=1e-5)
        assert [heard(t, 100 * i, 100 * i + 1, x) for i in range(4)] == [[0], [1], [2], [3]]
        assert torch.equal(t.segments(F.pad(x, (0, 0, 0, 3))), t.segments(x))  # 403 = 4 * 100 + 3


@torch.no_grad()
def test_permuting_the_stretches_permutes_the_segments_and_no_similarity_to_images_permuted_with_them() -> None:
    t, x, order, match = tower(), fbank(3), [2, 0, 3, 1], MATCHES["multiframe"]()
    moved = x.unflatten(1, (4, 100))[:, order].flatten(1, 2)
    assert torch.equal(t.segments(moved), t.segments(x)[:, order])
    images = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))
    sim = match(t.segments(x), images, 0)
    torch.testing.assert_close(match(t.segments(moved), images[:, order], 0), sim)
    assert not torch.allclose(match(t.segments(moved), images, 0), sim, atol=1e-3)
    pooled = tower("token_pool")
    assert not torch.allclose(pooled.segments(moved), pooled.segments(x)[:, order], atol=1e-3)


@torch.no_grad()
def test_pooled_tokens_have_heard_the_whole_clip() -> None:
    t, x = tower("token_pool"), fbank()
    assert t.segments(x).shape == (2, 4, 16)
    for first in (0, 150, 390):
        assert heard(t, first, first + 1, x) == [0, 1, 2, 3]
    assert not torch.allclose(t.segments(x)[:, 0], t.segments(x)[:, 1], atol=1e-3)
    with pytest.raises(DataError, match="2 time steps"):
        t.segments(x[:, :48])


@torch.no_grad()
def test_windows_are_centred_where_the_images_are_and_moved_inside() -> None:
    assert window_starts(1000, 250, ENDPOINTS) == [0, 208, 542, 750]
    assert window_starts(1000, 250, [0.05, 0.125, 0.2, 0.9]) == [0, 0, 75, 750]
    t, x = tower("window"), fbank()
    for segment, first in zip(t.segments(x).unbind(1), (0, 83, 217, 300), strict=True):
        torch.testing.assert_close(segment, t.vit(x[:, first : first + 100]).summary, atol=1e-5, rtol=1e-5)
    assert [heard(t, i, i + 1, x) for i in (0, 82, 83, 200, 217, 300)] == [[0], [0], [0, 1], [], [2], [2, 3]]


@torch.no_grad()
def test_windows_in_the_middle_of_each_stretch_are_the_segments() -> None:
    centred, x = tower("window", centres=[1 / 8, 3 / 8, 5 / 8, 7 / 8]), fbank()
    assert torch.equal(centred.segments(x), tower().segments(x))


@torch.no_grad()
@pytest.mark.parametrize("division", DIVISIONS)
def test_fbank_frames_that_no_patch_reaches_are_not_heard(division: str) -> None:
    """Of 250 the last 10, of 1000 the last 8; so 998 of them, which 10 s make, are as good as 1000."""
    t, x = tower(division, n_frames=1000), fbank(1, 1000)
    deaf = {
        "segment": [(240, 250), (490, 500), (740, 750), (990, 1000)],
        "token_pool": [(992, 1000)],
        "window": [(448, 542), (990, 1000)],  # windows overlap elsewhere; here they leave a gap
    }
    for first, end in deaf[division]:
        assert heard(t, first, end, x) == []
        assert heard(t, first - 1, first, x) != []
    for value in (0.0, 0.858, -50.0):
        padded = F.pad(x[:, :998], (0, 0, 0, 2), value=value)
        assert torch.equal(t.segments(padded), t.segments(x))
        assert torch.equal(t.pooled(padded), t.pooled(x))


def test_what_is_not_known_or_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"division: unknown name 'segments'.*Known: segment, token_pool, window"):
        tower("segments")
    with pytest.raises(ConfigError, match=r"at_pool: unknown name 'full'.*Known: flatten_repeat, full_clip, mean"):
        tower(at_pool="full")
    with pytest.raises(ConfigError, match="n_segments is 0"):
        AudioTower(tower().vit, 0)
    for centres in (None, [0.5], [*ENDPOINTS, 1.0], [0, 0.3, 0.6, 1.1], [-0.1, 0.3, 0.6, 1], [float("nan"), 0, 0, 0]):
        with pytest.raises(ConfigError, match="needs centres, 4 fractions"):
            tower("window", centres=centres)
    with pytest.raises(ConfigError, match="needs centres, 1 fractions"):
        tower("window", n_segments=1, centres=None)


def test_no_choice_adds_or_renames_a_parameter(either: AudioTower) -> None:
    named = {f"vit.{name}" for name, _ in AudioViT(width=32, layers=2, heads=2, embed_dim=16).named_parameters()}
    assert set(either.state_dict()) == {"logit_scale"} | named
    assert {name for name, _ in either.named_parameters()} == {"logit_scale"} | named


@torch.no_grad()
def test_a_clip_is_what_it_is_in_any_company(either: AudioTower) -> None:
    x = fbank(3)
    others = torch.cat([50 * x[:1], x[1:2], torch.zeros_like(x[2:])])
    for encode in (either.segments, either.pooled):
        found = encode(x)
        assert torch.equal(encode(others)[1], found[1])
        torch.testing.assert_close(encode(x[1:2]), found[1:2], atol=1e-5, rtol=1e-5)


def test_a_gradient_reaches_every_weight(either: AudioTower) -> None:
    text = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    sims = either.scaled(text_similarity(text, either.pooled(fbank())))
    F.cross_entropy(sims, torch.arange(2)).backward()
    for name, p in either.named_parameters():
        assert p.grad is not None, name
        assert bool(torch.isfinite(p.grad).all()), name
        assert bool(p.grad.any()), name


@torch.no_grad()
@pytest.mark.parametrize("division", DIVISIONS)
def test_text_meets_unit_vectors_or_shorter_ones(division: str) -> None:
    x, texts = fbank(), torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    mean, repeat, full = (tower(division, at_pool) for at_pool in AT_POOLS)
    segments = mean.segments(x)
    one = torch.ones(2)
    torch.testing.assert_close(mean.pooled(x).norm(dim=-1), one)
    torch.testing.assert_close(full.pooled(x).norm(dim=-1), one)
    assert bool((repeat.pooled(x).norm(dim=-1) < 0.999).all())
    torch.testing.assert_close(full.pooled(x), unit(full.vit(x).summary))
    was = unit(texts) @ unit(unit(segments).mean(1)).T  # cosines with the mean of the normalised segments
    torch.testing.assert_close(text_similarity(texts, mean.pooled(x)), was, atol=1e-6, rtol=0)
    torch.testing.assert_close(unit(texts) @ unit(mean.pooled(x)).T, was, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("division", DIVISIONS)
def test_flatten_repeat_is_multiframe_match_with_the_text_in_the_place_of_every_image(division: str) -> None:
    t, x = tower(division, "flatten_repeat"), fbank(3)
    texts = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    expected = MATCHES["multiframe"]()(t.segments(x), unit(texts)[:, None].expand(-1, 4, -1), 0)
    torch.testing.assert_close(text_similarity(texts, t.pooled(x)), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(unit(texts) @ unit(t.pooled(x)).T, expected, atol=1e-3)


@torch.no_grad()
def test_where_all_segments_are_the_same_all_of_them_say_the_same() -> None:
    x = fbank(2, 100).repeat(1, 4, 1)
    mean, repeat = tower().pooled(x), tower(at_pool="flatten_repeat").pooled(x)
    torch.testing.assert_close(mean, unit(tower().segments(x)[:, 0]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(repeat, mean, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("division", ["segment", "window"])
def test_of_a_single_segment_every_pooling_is_its_direction(division: str) -> None:
    x = fbank()
    for at_pool in AT_POOLS:
        t = tower(division, at_pool, n_segments=1)
        torch.testing.assert_close(t.pooled(x), unit(t.vit(x).summary))


@torch.no_grad()
def test_the_whole_clip_in_one_pass_has_other_positions_and_is_another_vector() -> None:
    segmented, x = tower(at_pool="full_clip"), fbank()
    assert segmented.vit.pos_grid == (5, 5)
    assert not torch.allclose(segmented.pooled(x), tower().pooled(x), atol=1e-3)
    assert segmented.segments(x).shape == (2, 4, 16)


@torch.no_grad()
def test_single_segments_make_every_match_the_same() -> None:
    """Nearest, Multiframe and a random image are one thing where there is one image and one segment."""
    x, images = fbank(3), torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(1))
    audio = tower(n_segments=1).segments(x)
    g = torch.Generator().manual_seed(0)
    sims = [
        MATCHES["multiframe"]()(audio, images, 0),
        MATCHES["nearest_image"](n_warmup=0)(audio[:, 0], images, 0),
        MATCHES["random_image"]()(audio[:, 0], images, 0, g),
    ]
    assert torch.equal(sims[1], sims[0])
    assert torch.equal(sims[2], sims[0])


def test_similarity_to_text_takes_the_text_s_direction_and_the_clip_s_vector() -> None:
    g = torch.Generator().manual_seed(0)
    texts, pooled = torch.randn(5, 8, generator=g), torch.randn(3, 8, generator=g)
    sim = text_similarity(texts, pooled)
    assert sim.shape == (5, 3)
    torch.testing.assert_close(sim, unit(texts) @ pooled.T)
    torch.testing.assert_close(text_similarity(7 * texts, pooled), sim)
    torch.testing.assert_close(text_similarity(texts, 0.5 * pooled), 0.5 * sim)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(text_similarity(texts, pooled), sim, atol=0, rtol=0)
        half = text_similarity(texts.half(), pooled.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, text_similarity(texts.half().float(), pooled.bfloat16().float()))
    assert text_similarity(texts.double(), pooled.double()).dtype == torch.float64


@torch.no_grad()
def test_text_meets_single_precision_under_autocast(either: AudioTower) -> None:
    x = fbank()
    with torch.autocast("cpu", torch.bfloat16):
        half = either.pooled(x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, either.pooled(x), atol=0.05, rtol=0.05)


def test_the_vit_is_built_for_what_it_sees_at_once() -> None:
    assert [frames_of_pass(1000, 4, d) for d in DIVISIONS] == [250, 1000, 250]
    assert {frames_of_pass(1000, 1, d) for d in DIVISIONS} == {1000}


# ------------------------------------------------------------------------------------------------- paper A's model

SAID = ["rain falls", "a dog barks"]


def stored_texts() -> StoredTexts:
    return StoredTexts(SAID, torch.randn(2, 5, generator=torch.Generator().manual_seed(1)), "here/texts")


def text_audio(pooling: str = "mean", audio: nn.Module | None = None, **options) -> TextAudio:
    torch.manual_seed(0)
    audio = audio or StoredFrames(6)
    dims = {"audio": audio.dim, "text": 5, "hidden": 16, "joint": 8}
    pool = POOLINGS[pooling](dim=audio.dim if pooling in PRE_PROJECTION else 8)
    return TextAudio(audio, stored_texts(), pool, pooling, dims, **options)


def test_stored_frames_are_given_back() -> None:
    frames, valid = torch.randn(2, 3, 6), torch.tensor([[True, True, True], [True, False, False]])
    found = StoredFrames(6)(frames, valid)
    assert found.summary is None
    assert found.frames is frames
    assert found.mask is valid
    assert list(StoredFrames(6).state_dict()) == []


def test_stored_texts_are_found_by_their_caption_and_are_not_in_a_checkpoint() -> None:
    texts = stored_texts()
    whole = texts(texts.tokenize(SAID))
    assert texts.dim == 5
    assert torch.equal(texts(texts.tokenize([SAID[1], SAID[0], SAID[1]])), whole[[1, 0, 1]])
    assert whole.dtype == torch.float32
    assert StoredTexts(SAID, whole.half(), "x").tokenize(SAID)["embedding"].dtype == torch.float32
    assert list(texts.state_dict()) == []


def test_a_caption_that_was_not_imported_is_named() -> None:
    with pytest.raises(DataError, match=r"here/texts: 2 .*no embedding, .*first 'Rain falls'.*to the letter"):
        stored_texts().tokenize([SAID[0], "Rain falls", "a cat"])


def norms(model: nn.Module) -> list[Tensor]:
    return [b.clone() for n, b in model.named_buffers() if "running" in n]


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("compat", [True, False])
def test_a_tower_without_trainable_weights_rests_unless_it_is_to_be_as_in_mei_et_al(compat: bool, learns: bool) -> None:
    audio = Cnn14(n_classes=2, width=1, block6_pool=1)
    model = text_audio(audio=audio, frozen_in_training_mode=compat)
    audio.requires_grad_(learns)
    assert model.train() is model
    is_awake = learns or compat
    assert model.training
    assert model.pooling.training
    assert {m.training for m in audio.modules()} == {is_awake}
    assert model.text.training is compat, "it has no weights at all"
    before, heard = norms(audio), (torch.randn(2, 64, 64), torch.ones(2, 64, dtype=torch.bool))
    one, again = (model.encode_audio(*heard).frames for _ in range(2))
    assert torch.equal(one, again) is not is_awake, "dropout and SpecAugment"
    assert all(torch.equal(a, b) for a, b in zip(before, norms(audio), strict=True)) is not is_awake
    assert not any(m.training for m in model.eval().modules())


@torch.no_grad()
@pytest.mark.parametrize("pooling", sorted(POOLINGS))
def test_what_is_encoded_is_what_is_heard_and_projected(pooling: str) -> None:
    audio = Cnn14(n_classes=2, width=1, block6_pool=1)
    model = text_audio(pooling, audio).eval()
    heard, valid = torch.randn(2, 128, 64), torch.arange(128) < torch.tensor([[128], [70]])
    frames = model.audio(heard, valid)
    found, expected = model.encode_audio(heard, valid), model.project(frames)
    assert torch.equal(found.frames, expected.frames)
    assert torch.equal(found.mask, expected.mask)
    assert found.frames.shape == (2, 1 if pooling in PRE_PROJECTION else 4, 8)
    text = model.encode_text(model.text.tokenize(SAID))
    torch.testing.assert_close(model.score(text, found), model.similarity(text, found), atol=1e-5, rtol=1e-5)
    junk = AudioFeatures(None, frames.frames.masked_fill(~frames.mask[..., None], 1e3), frames.mask)
    torch.testing.assert_close(model.score(text, model.project(junk)), model.score(text, found), atol=1e-5, rtol=1e-5)


def test_a_temperature_is_the_model_s_own_and_is_kept_with_it() -> None:
    model = text_audio(temperature=LearnedTemperature(0.07))
    assert {k for k in model.state_dict() if k.startswith("temp")} == {"temperature.log_scale"}
    assert any(p is model.temperature.log_scale for p in model.parameters())
    assert text_audio().temperature is None
    assert not [k for k in text_audio().state_dict() if k.startswith("temp")]
