from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from harken.media.images import jpeg, read_jpeg
from harken.media.resize import resize_short_side
from harken.models.clip import STD, preprocess

SIZE = 224
SHAPES = [(360, 640), (640, 360), (720, 1280), (240, 320), (480, 480), (224, 400), (225, 224), (96, 160)]


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Detail at every scale, mostly grey as photographs are, and objects of other colours with hard edges."""
    rng = np.random.default_rng(seed)
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = np.maximum(np.hypot(x, y), 1 / max(height, width)) ** -1.3
    waves = np.fft.rfft2(rng.standard_normal((3, height, width))) * falloff
    field = np.fft.irfft2(waves, s=(height, width)).transpose(1, 2, 0)
    mixed = field @ np.array([[1, 0.9, 0.8], [0.2, -0.1, -0.2], [0.05, -0.1, 0.2]])
    picture = 128 + 45 * (mixed - mixed.mean()) / mixed.std()
    rows, columns = np.mgrid[:height, :width]
    for _ in range(6):
        row, column, radius = (
            rng.uniform(0, height),
            rng.uniform(0, width),
            rng.uniform(0.05, 0.25) * min(height, width),
        )
        picture[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] += rng.uniform(-70, 70, 3)
    return np.clip(picture, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 1000), (65, 64)])
def test_the_short_side_is_as_asked_and_the_other_as_clip_rounds_it(shape: tuple[int, int]) -> None:
    small = resize_short_side(photo(*shape), 64)
    assert small.dtype == np.uint8
    assert small.flags.c_contiguous
    assert small.shape == (64 * shape[0] // min(shape), 64 * shape[1] // min(shape), 3)


def test_it_is_pillow_s_bicubic_but_for_rounding() -> None:
    picture = photo(360, 640)
    small = resize_short_side(picture, SIZE)
    pillow = Image.fromarray(picture).resize(small.shape[1::-1], Image.Resampling.BICUBIC)
    difference = np.abs(small.astype(int) - np.asarray(pillow))
    assert difference.max() <= 2
    assert difference.mean() < 0.02


def test_a_picture_of_the_size_is_left_alone_and_none_is_changed() -> None:
    picture = photo(SIZE, 400)
    assert resize_short_side(picture, SIZE) is picture
    larger = photo(300, 400)
    larger.setflags(write=False)  # as decoders and files hand them out
    before = larger.copy()
    resize_short_side(larger, SIZE)
    resize_short_side(larger[::-1, ::-1], SIZE)
    assert np.array_equal(larger, before)


def test_the_bytes_depend_on_the_picture_alone() -> None:
    picture = photo(360, 640)
    views = [picture, np.asfortranarray(picture), picture[::-1][::-1].copy()]
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            results += [resize_short_side(view, SIZE).tobytes() for view in views for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    assert len(set(results)) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_clip_sees_a_stored_image_as_it_sees_the_picture(shape: tuple[int, int]) -> None:
    """CLIP's preprocessing of what is stored (short side 224, JPEG 95) against that of the picture itself.

    Before the JPEG the two are equal to the bit. After it they differ by less than 2.6 levels of 255 in the mean (0.04
    of CLIP's normalised units) and less than 24 (0.35) anywhere.
    """
    picture = photo(*shape)
    wanted = preprocess([picture], SIZE)
    small = resize_short_side(picture, SIZE)
    assert torch.equal(preprocess([small], SIZE), wanted)
    stored = preprocess([read_jpeg(jpeg(small, 95))], SIZE)
    levels = (stored - wanted)[0] * torch.tensor(STD)[:, None, None] * 255
    assert levels.abs().mean() < 2.6
    assert levels.abs().max() < 24
    assert (stored - wanted).abs().mean() < 0.04
    assert (stored - wanted).abs().max() < 0.35
