"""When a clip's images are taken, how they are resized, and their JPEG form."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from harken.errors import DataError, unknown

Picture = NDArray[np.uint8]


def _endpoints(start_s: float, end_s: float, n: int) -> NDArray[np.float64]:
    return np.linspace(start_s, end_s, n)


def _centres(start_s: float, end_s: float, n: int) -> NDArray[np.float64]:
    return start_s + (end_s - start_s) * (np.arange(n) + 0.5) / n


IMAGE_TIMES: Final[dict[str, Callable[[float, float, int], NDArray[np.float64]]]] = {
    "endpoints": _endpoints,
    "centres": _centres,
}


def image_times(start_s: float, end_s: float, n: int, fps: float | None = None, rule: str = "endpoints") -> list[float]:
    """The times in seconds at which a clip's `n` images are taken.

    `endpoints` is the papers' grid (VIP-ANT's downloader; Tsubaki et al. 2024: "every 3.3 seconds approximately"): both
    ends included, so 0, 3.33, 6.67 and 10 s of a ten-second clip. No picture starts at a recording's very end, so with
    `fps` no time is later than `end_s - 1 / fps`. `centres` takes the middles of `n` equal parts.
    Raises ConfigError for another rule, ValueError for `n` < 1 or a clip that does not end after it starts.
    """
    if rule not in IMAGE_TIMES:
        raise unknown("image_times: rule", rule, IMAGE_TIMES)
    if n < 1 or not end_s > start_s:
        raise ValueError(f"image_times needs n >= 1 and end_s > start_s, found n={n}, start_s={start_s}, end_s={end_s}")
    times = IMAGE_TIMES[rule](start_s, end_s, n)
    if fps is not None:
        times = np.clip(times, None, max(start_s, end_s - 1 / fps))
    return [float(t) for t in times]


def resize_short_side(image: Picture, size: int) -> Picture:
    """`image` (height, width, 3) scaled so that its short side is `size` pixels: bicubic, antialiased (Pillow's)."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    shape = (size, max(size, int(width * scale))) if height <= width else (max(size, int(height * scale)), size)
    if (height, width) == shape:
        return image
    resized = Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def jpeg(image: Picture, quality: int) -> bytes:
    """`image` uint8 (height, width, 3) as JPEG bytes; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def read_jpeg(data: bytes) -> Picture:
    """JPEG bytes as uint8 (height, width, 3). Raises DataError where they are not a whole picture."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return np.array(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as e:
        raise DataError(
            f"{len(data)} bytes that should be a JPEG are not: {e}. Delete the shard and run its stage again."
        ) from e


def flatness(image: Picture) -> float:
    """The standard deviation of the image's grey values in 0..255: near 0 for a black or blank picture."""
    return float(np.asarray(Image.fromarray(image).convert("L"), np.float32).std())


def is_frozen(images: list[Picture]) -> bool:
    """Whether two or more images are all the same picture, pixel for pixel (the flag `qc.frozen`)."""
    return len(images) > 1 and all(np.array_equal(images[0], other) for other in images[1:])
