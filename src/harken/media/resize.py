"""A picture at another size: the one step on the way to a stored image that needs torch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from harken.media.images import Picture


def resize_short_side(image: Picture, size: int) -> Picture:
    """`image` uint8 (height, width, 3) with its short side scaled to `size` pixels: bicubic, antialiased.

    The other side is rounded down, as CLIP's own preprocessing does. It is the very operation of
    `harken.models.clip.preprocess`, which therefore leaves an image stored at its model's size alone. torch's kernel
    for bytes takes a third of Pillow's time and is within 2 grey levels of it; one thread or many, the same bytes.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    target = (size * height // short, size * width // short)
    if target == (height, width):
        return image
    pixels = torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, size=target, mode="bicubic", antialias=True, align_corners=False)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())
