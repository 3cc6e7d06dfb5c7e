"""Windowed frames -> mel energies, a chunk at a time: what Kaldi's filter bank and PANNs' log-mel have in common.

Two things make it quick without changing the definition. The filters are multiplied in bands, where they are not zero;
and real and imaginary parts are squared where they lie and both multiplied by their bin's weight, so that the power is
never gathered from the interleaved spectrum (which cost as much as the transform itself).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

CHUNK: Final = 256  # frames at once: a chunk and its spectrum are 2 MB at 32 kHz; 128 and 512 are slower
_LOCAL: Final = threading.local()
Made = TypeVar("Made")


class MelBank:
    """Mel filters float64 (n_fft / 2 + 1, mel), with the buffers for one chunk of frames; for one thread.

    Write windowed frames into `frames` (CHUNK, n_fft), which is zero at first, then call. What a frame's energies are
    depends on nothing but the frame.
    """

    def __init__(self, filters: NDArray[np.float64], n_bands: int) -> None:
        n_bins, n_mels = filters.shape
        self.frames = torch.zeros(CHUNK, 2 * (n_bins - 1))
        self._spectrum = torch.empty(CHUNK, n_bins, dtype=torch.complex64)
        self._parts = torch.view_as_real(self._spectrum).reshape(CHUNK, 2 * n_bins)  # the same memory
        self._bands = []
        for mels in np.array_split(np.arange(n_mels), n_bands):
            part = filters[:, mels]
            used = np.flatnonzero(part.any(1))
            lo, hi = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 1)
            weights = torch.from_numpy(np.repeat(part[lo:hi], 2, axis=0).astype(np.float32))
            self._bands.append((slice(2 * lo, 2 * hi), weights, slice(int(mels[0]), int(mels[-1]) + 1)))

    def __call__(self, out: Float[Tensor, "frame mel"]) -> None:
        """The mel energies of the first `len(out)` of `frames` into `out`."""
        n = len(out)
        torch.fft.rfft(self.frames[:n], out=self._spectrum[:n])
        parts = self._parts[:n]
        parts.mul_(parts)
        for bins, weights, mels in self._bands:
            torch.mm(parts[:, bins], weights, out=out[:, mels])


def per_thread(key: tuple[object, ...], make: Callable[[], Made]) -> Made:
    """What `make` gives, made once per thread and key: the buffers of two threads must not be one."""
    kept: dict[tuple[object, ...], Made] = _LOCAL.__dict__.setdefault("kept", {})
    if key not in kept:
        kept[key] = make()
    return kept[key]
