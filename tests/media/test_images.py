from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from harken.errors import ConfigError, DataError
from harken.media.images import image_times, jpeg, read_jpeg


def test_the_papers_grid() -> None:
    assert image_times(0, 10, 4) == pytest.approx([0, 10 / 3, 20 / 3, 10])
    assert image_times(30, 40, 4, fps=25) == pytest.approx([30, 30 + 10 / 3, 30 + 20 / 3, 39.96])
    assert image_times(30, 40, 4, fps=25, rule="centres") == pytest.approx([31.25, 33.75, 36.25, 38.75])
    assert image_times(2.5, 3.5, 1, fps=10) == [2.5]
    assert image_times(0, 0.05, 3, fps=10) == [0.0, 0.0, 0.0]
    assert all(isinstance(t, float) for t in image_times(0, 1, 2))


def test_bad_requests_say_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'centres'"):
        image_times(0, 10, 4, rule="centers")
    for start, end, n in ((0, 10, 0), (5, 5, 4), (5, 4, 4)):
        with pytest.raises(ValueError, match="image_times needs"):
            image_times(start, end, n)


def test_jpeg_there_and_back() -> None:
    rows, columns = np.mgrid[:48, :80]
    image = np.stack([rows * 4, columns * 3, rows + columns], -1).astype(np.uint8)
    data = jpeg(image, 95)
    assert data == jpeg(image, 95)
    assert len(jpeg(image, 50)) < len(data)
    assert np.abs(read_jpeg(data).astype(int) - image).mean() < 3
    with pytest.raises(DataError, match="should be a JPEG"):
        read_jpeg(data[: len(data) // 2])
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    with pytest.raises(DataError, match="should be a JPEG"):
        read_jpeg(buffer.getvalue())
