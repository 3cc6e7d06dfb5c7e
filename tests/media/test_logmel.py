from __future__ import annotations

import numpy as np
import pytest

from harken.errors import ConfigError, DataError
from harken.media.logmel import logmel, mel_filters


def _literal_mel() -> np.ndarray:
    """librosa.filters.mel(sr=32000, n_fft=1024, n_mels=64, fmin=50, fmax=14000), written out."""

    def to_mel(hz: float) -> float:
        if hz >= 1000.0:
            return 15.0 + np.log(hz / 1000.0) / (np.log(6.4) / 27.0)
        return hz / (200.0 / 3)

    def to_hz(mel: float) -> float:
        if mel >= 15.0:
            return 1000.0 * np.exp(np.log(6.4) / 27.0 * (mel - 15.0))
        return 200.0 / 3 * mel

    low, high = to_mel(50.0), to_mel(14000.0)
    corners = [to_hz(low + (high - low) * i / 65) for i in range(66)]
    weights = np.zeros((513, 64))
    for m in range(64):
        left, centre, right = corners[m : m + 3]
        for k in range(513):
            hz = k * 32000 / 1024
            rising, falling = (hz - left) / (centre - left), (right - hz) / (right - centre)
            weights[k, m] = max(0.0, min(rising, falling)) * 2.0 / (right - left)
    return weights


def _literal(wave: np.ndarray) -> np.ndarray:
    """torchlibrosa's Spectrogram and LogmelFilterBank with PANNs' numbers, one frame at a time in float64."""
    x = np.pad(wave.astype(np.float64), 512, mode="reflect")
    hann = np.array([0.5 - 0.5 * np.cos(2 * np.pi * n / 1024) for n in range(1024)])
    weights = _literal_mel()
    rows = []
    for start in range(0, x.size - 1024 + 1, 320):
        power = np.abs(np.fft.rfft(x[start : start + 1024] * hann)) ** 2
        rows.append(10.0 * np.log10(np.maximum(power @ weights, 1e-10)))
    return np.array(rows)


def test_filters_are_librosa_s() -> None:
    assert np.abs(mel_filters() - _literal_mel()).max() < 1e-12
    assert mel_filters().any(0).all()


@pytest.mark.parametrize("seconds", [0.31, 2.0])
def test_equals_the_book(seconds: float) -> None:
    rng = np.random.default_rng(0)
    t = np.arange(round(seconds * 32000)) / 32000
    for wave in (
        0.1 * rng.standard_normal(t.size),
        0.5 * np.sin(2 * np.pi * 440 * t) + 1e-3 * rng.standard_normal(t.size),
    ):
        ours, book = logmel(wave.astype(np.float32)), _literal(wave.astype(np.float32))
        assert ours.shape == book.shape
        assert ours.dtype == np.float32
        assert np.abs(ours - book).max() < 1e-2
        assert np.abs(ours - book).mean() < 1e-4


def test_frames_and_silence() -> None:
    for seconds, frames in ((10, 1001), (15, 1501), (30, 3001)):
        assert logmel(np.zeros(seconds * 32000, np.float32)).shape == (frames, 64)
    assert (logmel(np.zeros(32000, np.float32)) == -100).all()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="Decode at 32000 Hz"):
        logmel(np.zeros(32000, np.float32), 16000)
    for wave in (np.zeros((1, 32000), np.float32), np.zeros(512, np.float32)):
        with pytest.raises(DataError, match="one channel"):
            logmel(wave)
    with pytest.raises(DataError, match="not finite"):
        logmel(np.full(32000, np.inf, np.float32))
