"""FBANK of ten seconds by harken, torchaudio's Kaldi port and kaldi-native-fbank, same definition; PANNs' log-mel.

kaldi-native-fbank is called through its Python binding, which takes a list and gives a frame at a time; it refuses 128
filters at 16 kHz. With the times stands each one's largest distance from the definition in float64, over four signals.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

import interleaved
from harken.media.fbank import FBANKS, FLOOR, mel_filters, sizes
from harken.media.logmel import logmel

RATES_HZ, SECONDS, TIMES = (32_000, 16_000), 10, 4


def repeat(fbank: Callable[[np.ndarray, int], np.ndarray], wave: np.ndarray, rate_hz: int) -> None:
    for _ in range(TIMES):
        fbank(wave, rate_hz)


def signals(rate_hz: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    t = np.arange(rate_hz * SECONDS) / rate_hz
    white = 0.1 * rng.standard_normal(t.size)
    walk = np.cumsum(rng.standard_normal(t.size))
    waves = [white, 0.9 * walk / np.abs(walk).max(), 0.5 * np.sin(2 * np.pi * 440 * t), np.where(t % 1 < 0.5, white, 0)]
    return [wave.astype(np.float32) for wave in waves]


def in_float64(wave: np.ndarray, rate_hz: int) -> np.ndarray:
    window, shift, n_fft = sizes(rate_hz)
    x = wave.astype(np.float64)
    frames = np.lib.stride_tricks.sliding_window_view(x - x.mean(), window)[::shift]
    frames = frames - frames.mean(1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], 1)
    frames = frames * np.hanning(window)
    return np.log(np.maximum(np.abs(np.fft.rfft(frames, n_fft)) ** 2 @ mel_filters(rate_hz), FLOOR))


def main() -> None:
    torch.set_num_threads(1)
    for rate_hz in RATES_HZ:
        fbanks = {n: f for n, f in FBANKS.items() if not (n == "kaldi" and rate_hz == 16_000)}
        waves = signals(rate_hz)
        for name, fbank in fbanks.items():
            far = max(float(np.abs(fbank(w, rate_hz) - in_float64(w, rate_hz)).max()) for w in waves)
            near = max(float(np.abs(fbank(w, rate_hz) - fbanks["harken"](w, rate_hz)).max()) for w in waves)
            print(f"{name}: at most {far:.1e} from float64, {near:.1e} from harken")
        medians = interleaved.measure({n: partial(repeat, f, waves[0], rate_hz) for n, f in fbanks.items()})
        what = f"FBANK, 128 bins, {SECONDS} s at {rate_hz} Hz"
        interleaved.show(what, {name: s / TIMES for name, s in medians.items()}, "harken")
    medians = interleaved.measure({"harken": partial(repeat, logmel, signals(32_000)[0], 32_000)})
    interleaved.show("log-mel, 64 bins, 10 s at 32000 Hz", {n: s / TIMES for n, s in medians.items()}, "harken")


if __name__ == "__main__":
    main()
