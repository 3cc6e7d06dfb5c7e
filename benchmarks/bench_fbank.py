"""FBANK of ten seconds at 32 kHz: harken, torchaudio's Kaldi port and kaldi-native-fbank, same definition.

kaldi-native-fbank is called through its Python binding, which takes a list and gives a frame at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

import interleaved
from harken.media.fbank import FBANKS

RATE_HZ, SECONDS, TIMES = 32_000, 10, 4


def repeat(fbank: Callable[[np.ndarray, int], np.ndarray], wave: np.ndarray) -> None:
    for _ in range(TIMES):
        fbank(wave, RATE_HZ)


def main() -> None:
    torch.set_num_threads(1)
    wave = (0.1 * np.random.default_rng(0).standard_normal(RATE_HZ * SECONDS)).astype(np.float32)
    ours = FBANKS["harken"](wave, RATE_HZ)
    for name, fbank in FBANKS.items():
        print(f"{name}: largest difference from harken {np.abs(fbank(wave, RATE_HZ) - ours).max():.1e}")
    medians = interleaved.measure({name: partial(repeat, fbank, wave) for name, fbank in FBANKS.items()})
    what = f"FBANK, 128 bins, {SECONDS} s at {RATE_HZ} Hz"
    interleaved.show(what, {name: s / TIMES for name, s in medians.items()}, "harken")


if __name__ == "__main__":
    main()
