"""Frozen CLIP: pixels in, a small one trained, saved and found again, and an audio tower grown from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from harken.errors import ConfigError, DataError
from harken.models import clip
from harken.models.audio_vit import AudioViT

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (220, 220, 220)}
SHAPE = {
    "image_size": 32,
    "width": 32,
    "layers": 1,
    "embed_dim": 16,
    "text_width": 32,
    "text_layers": 1,
    "context_length": 12,
}


def pictures(n: int, seed: int) -> list[tuple[np.ndarray, str]]:
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        name, colour = list(COLOURS.items())[i % 4]
        noisy = np.clip(rng.normal(colour, 40, (36, 48, 3)), 0, 255).astype(np.uint8)
        pairs.append((noisy, f"a {name} wall" if i % 8 < 4 else f"a picture of a {name} wall"))
    return pairs


def train(seed: int = 0, steps: int = 40) -> clip.Towers:
    return clip.train_small(pictures(64, 0), clip.SmallClip(SHAPE, steps=steps, batch=32, lr=3e-3, seed=seed))


@pytest.fixture(scope="module")
def towers() -> clip.Towers:
    return train()


def test_it_learns(towers: clip.Towers) -> None:
    test = pictures(40, 1)
    image = torch.nn.functional.normalize(clip.image_embeddings(towers, [p for p, _ in test]), dim=-1)
    text = torch.nn.functional.normalize(clip.text_embeddings(towers, [f"a {c} wall" for c in COLOURS]), dim=-1)
    found = (image @ text.T).argmax(1).tolist()
    assert np.mean([f == i % 4 for i, f in enumerate(found)]) > 0.9


def test_captions_cut_behind_their_end_embed_alike(towers: clip.Towers) -> None:
    tokens = towers.vocabulary(["a red wall", "a picture of a blue wall"])
    longest = int(tokens.ne(0).sum(1).max())
    assert longest < tokens.shape[1]
    with torch.no_grad():
        whole, cut = towers.model.encode_text(tokens), clip._encode_text(towers.model, tokens[:, :longest])
    torch.testing.assert_close(cut, whole)


def test_it_is_frozen(towers: clip.Towers) -> None:
    assert not towers.model.training
    assert not any(p.requires_grad for p in towers.model.parameters())


def test_training_is_a_function_of_the_seed_and_touches_no_other_randomness() -> None:
    before = torch.random.get_rng_state()
    a, b, c = train(steps=3), train(steps=3), train(seed=1, steps=3)
    assert torch.equal(before, torch.random.get_rng_state())
    for (name, x), y, _z in zip(
        a.model.state_dict().items(), b.model.state_dict().values(), c.model.state_dict().values(), strict=True
    ):
        assert torch.equal(x, y), name
    assert not torch.equal(a.model.visual.proj, c.model.visual.proj)


def test_saved_and_loaded_it_is_the_same(towers: clip.Towers, tmp_path: Path) -> None:
    clip.save(tmp_path / "clip", towers)
    back = clip.load(tmp_path / "clip")
    images = [p for p, _ in pictures(4, 2)]
    assert torch.equal(clip.image_embeddings(back, images), clip.image_embeddings(towers, images))
    captions = ["a red wall", "a zebra, unheard of"]
    assert torch.equal(clip.text_embeddings(back, captions), clip.text_embeddings(towers, captions))
    assert (back.image_size, back.heads, back.embed_dim, back.vocabulary) == (32, 1, 16, towers.vocabulary)


def test_of_nothing_there_is_nothing(towers: clip.Towers) -> None:
    assert clip.image_embeddings(towers, []).shape == clip.text_embeddings(towers, []).shape == (0, 16)


def test_a_caption_s_bytes_are_its_own(towers: clip.Towers) -> None:
    captions = ["a red wall", "a picture of a blue wall", "a wall", "a picture " * 20]
    alone = torch.cat([clip.text_embeddings(towers, [c]) for c in captions])
    assert torch.equal(clip.text_embeddings(towers, captions), alone)
    assert torch.equal(clip.text_embeddings(towers, captions[::-1], batch=2), alone.flip(0))
    with torch.no_grad():
        whole = towers.model.encode_text(towers.vocabulary(captions))  # as open_clip does: padded, and all at once
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-5)


def test_a_caption_s_own_zeros_are_not_its_end() -> None:
    torch.manual_seed(0)
    config = clip.small_config(
        vocab_size=clip.Vocabulary(12).size, **{k: v for k, v in SHAPE.items() if k != "context_length"}
    )
    config["text_cfg"]["context_length"] = 12
    towers = clip._towers(clip.build(config), clip.Vocabulary(12), config)
    caption = "!; a dog"  # CLIP's number of the first piece is 0, which is also the padding
    assert 0 in towers.vocabulary([caption])[0, :4].tolist()
    with torch.no_grad():
        whole = towers.model.encode_text(towers.vocabulary([caption]))
    torch.testing.assert_close(clip.text_embeddings(towers, [caption]), whole, atol=1e-5, rtol=1e-5)


def test_an_audio_tower_grows_from_it(towers: clip.Towers) -> None:
    audio = AudioViT.from_clip(towers.visual_state, heads=towers.heads, n_frames=100, n_mels=64)
    out = audio(torch.randn(2, 100, 64))
    assert out.summary is not None
    assert out.summary.shape == (2, 16)


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    from PIL import Image

    noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    return np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))


def test_preprocessing_is_clip_s() -> None:
    import open_clip
    from PIL import Image

    theirs = open_clip.image_transform(64, is_train=False, mean=clip.MEAN, std=clip.STD)
    rng = np.random.default_rng(0)
    for height, width in ((90, 160), (161, 90), (64, 64), (40, 50), (300, 203)):
        picture = smooth(rng, height, width)
        ours = clip.preprocess([picture], 64)[0]
        assert ours.shape == (3, 64, 64)
        assert float((ours - theirs(Image.fromarray(picture))).abs().max()) < 1.5 / 255 / min(
            clip.STD
        )  # one grey level


def test_pictures_are_cut_to_size_as_pillow_does_to_a_grey_level() -> None:
    from PIL import Image
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    theirs = Compose([Resize(224, interpolation=InterpolationMode.BICUBIC), CenterCrop(224)])
    rng = np.random.default_rng(1)
    n, off = 0, 0
    for height, width in ((360, 640), (480, 854), (1080, 606), (224, 398), (240, 320)):
        for picture in (smooth(rng, height, width), rng.integers(0, 256, (height, width, 3), np.uint8)):
            found = clip.crop([picture], 224)[0].permute(1, 2, 0).numpy().astype(int)
            difference = np.abs(found - np.asarray(theirs(Image.fromarray(picture))))
            assert difference.max() <= 2
            n, off = n + difference.size, off + int((difference > 1).sum())
            if min(height, width) == 224:
                assert not difference.any()  # stored at the model's size, a picture is not resized again
    assert off < 1e-4 * n


def test_normalised_pixels_are_the_preprocessed_picture(towers: clip.Towers) -> None:
    picture = smooth(np.random.default_rng(2), 50, 70)
    pixels = clip.crop([picture], 32)
    assert pixels.dtype == torch.uint8
    assert torch.equal(clip.normalise(pixels), clip.preprocess([picture], 32))
    assert torch.equal(towers.encode_images(pixels), clip.image_embeddings(towers, [picture]))


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((3, 4, 4), np.uint8)]
)
def test_anything_but_rgb_bytes_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(DataError, match="image 0"):
        clip.preprocess([wrong], 4)


def test_the_full_vocabulary_is_clip_s() -> None:
    tokens = clip.Vocabulary(77)(["A photo of a cat"])
    assert tokens.shape == (1, 77)
    assert clip.Vocabulary(77).size == 49408
    assert tokens[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_a_subset_keeps_the_end_token_on_top_and_shares_one_number_for_the_unknown() -> None:
    vocabulary = clip.Vocabulary.of(["a dog", "a cat"], 8)
    tokens = vocabulary(["a dog", "zebra", "a cat " * 5])
    assert vocabulary.ids == (320, 1929, 2368)
    assert tokens[0].tolist() == [2, 3, 4, 6, 0, 0, 0, 0]
    assert tokens[1].tolist()[0] == 2
    assert 1 in tokens[1].tolist()
    assert tokens.argmax(1).tolist()[2] == 7  # cut, with its end kept
    assert int(tokens.max()) == vocabulary.size - 1 == 6


def test_wrong_uses_say_so(towers: clip.Towers, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a folder"):
        clip.load(tmp_path)
    with pytest.raises(DataError, match="neither a folder"):
        clip.load("ViT-B-32")
    with pytest.raises(DataError, match="at least one batch of 32"):
        clip.train_small(pictures(8, 0), clip.SmallClip(SHAPE, steps=1, batch=32, lr=1e-3, seed=0))
    other = clip.build({**towers.config, "text_cfg": towers.config["text_cfg"] | {"pool_type": "last"}})
    with pytest.raises(ConfigError, match="text tower is not CLIP's own"):
        clip._towers(other, towers.vocabulary, None)
    foreign = clip.Towers(towers.model, towers.vocabulary, 32, 1, 16)
    with pytest.raises(ConfigError, match="architecture/tag"):
        clip.save(tmp_path, foreign)


def test_the_papers_clip_has_the_papers_size() -> None:
    import open_clip

    with torch.device("meta"):
        model = clip.build(open_clip.get_model_config("ViT-B-32-quickgelu"))
    assert sum(p.numel() for p in model.parameters()) == 151_277_313


def test_a_clip_of_another_activation_is_refused() -> None:
    config = clip.small_config(vocab_size=10)
    clip._towers(clip.build(config), clip.Vocabulary(24), config)
    with pytest.raises(ConfigError, match="QuickGELU"):
        clip._towers(clip.build({**config, "quick_gelu": False}), clip.Vocabulary(24), config)
