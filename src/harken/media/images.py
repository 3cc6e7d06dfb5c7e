"""When a clip's images are taken, their JPEG form, and what is wrong with them. How they are resized: `resize.py`."""

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


def jpeg(image: Picture, quality: int) -> bytes:
    """`image` uint8 (height, width, 3) as JPEG bytes; the same pixels give the same bytes.

    Colour is kept at full resolution: halved, as JPEG usually has it, it is what CLIP would miss most (55 grey levels
    at the worst pixel of a photograph instead of 16, for a fifth fewer bytes).
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
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
