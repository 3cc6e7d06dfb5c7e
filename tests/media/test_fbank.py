from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from harken.errors import ConfigError, DataError
from harken.media.fbank import FBANKS, fbank, mel_filters, n_frames

RATES = (16000, 22050, 32000, 44100, 48000)
SILENCE = -15.942385


def _signals(rate: int, seconds: float = 2.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    t = np.arange(round(seconds * rate)) / rate
    white = 0.1 * rng.standard_normal(t.size)
    waves = {
        "white": white,
        "pink": np.cumsum(rng.standard_normal(t.size)) / 300,
        "sine": 0.5 * np.sin(2 * np.pi * 440 * t),
        "gap": np.where((t > 0.6) & (t < 1.2), 0, white),
        "dc": 0.3 + 0.01 * rng.standard_normal(t.size),
        "quiet": 1e-4 * rng.standard_normal(t.size),
        "silence": np.zeros(t.size),
    }
    return {name: wave.astype(np.float32) for name, wave in waves.items()}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("oracle", ["torchaudio", "kaldi"])
def test_equals_kaldi_s_definition(rate: int, oracle: str) -> None:
    if oracle == "kaldi" and rate == 16000:
        pytest.skip("Kaldi refuses 128 filters at 16 kHz")
    for name, wave in _signals(rate).items():
        ours, theirs = fbank(wave, rate), FBANKS[oracle](wave, rate)
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype == np.float32
        gap = np.abs(ours - theirs)
        assert gap.max() < 3e-3, name
        assert gap.mean() < 1e-4, name


def _literal(wave: np.ndarray, rate: int, frame: int) -> np.ndarray:
    """One frame by the book, in float64 (Kaldi's feature-window.cc and mel-computations.cc)."""
    window, shift = int(rate * 0.025), int(rate * 0.010)
    x = wave.astype(np.float64)
    x = (x - x.mean())[frame * shift : frame * shift + window]
    x = x - x.mean()
    x = x - 0.97 * np.concatenate([x[:1], x[:-1]])
    x = x * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / (window - 1)))
    size = 1
    while size < window:
        size *= 2
    power = np.abs(np.fft.rfft(x, size)) ** 2
    mel = lambda f: 1127.0 * np.log(1.0 + f / 700.0)  # noqa: E731
    step = (mel(rate / 2) - mel(20.0)) / 129
    out = np.zeros(128)
    for b in range(128):
        left, centre, right = (mel(20.0) + (b + k) * step for k in (0, 1, 2))
        for i in range(size // 2):
            m = mel(i * rate / size)
            if left < m < right:
                out[b] += power[i] * ((m - left) / (centre - left) if m <= centre else (right - m) / (right - centre))
    return np.log(np.maximum(out, 1.1920928955078125e-07))


@pytest.mark.parametrize("rate", [16000, 32000])
def test_equals_the_book(rate: int) -> None:
    for wave in _signals(rate).values():
        ours = fbank(wave, rate)
        for frame in (0, 77, len(ours) - 1):
            assert np.abs(ours[frame] - _literal(wave, rate, frame)).max() < 1e-3


def test_a_clip_in_a_thread_is_the_same_clip() -> None:
    waves = [np.float32(0.1) * np.random.default_rng(i).standard_normal(32000 * 2, np.float32) for i in range(8)]
    alone = [fbank(wave, 32000) for wave in waves]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(np.array_equal, pool.map(lambda w: fbank(w, 32000), waves), alone))


def test_frame_counts() -> None:
    for rate in RATES:
        expected = 1000 if rate == 22050 else 998
        assert n_frames(10 * rate, rate) == expected == len(fbank(np.zeros(10 * rate, np.float32), rate))
    assert n_frames(160_320, 16000) == 1000
    assert n_frames(160_800, 16000) == 1003
    assert fbank(np.zeros(399, np.float32), 16000).shape == (0, 128)
    assert fbank(np.zeros(400, np.float32), 16000).shape == (1, 128)


def test_silence_gain_and_offset() -> None:
    assert np.allclose(fbank(np.zeros(32000, np.float32), 32000), SILENCE, atol=1e-5)
    wave = _signals(32000)["white"]
    assert np.allclose(fbank(wave * 32768, 32000) - fbank(wave, 32000), 20.794415, atol=5e-3)
    assert np.abs(fbank(wave + np.float32(0.1), 32000) - fbank(wave, 32000)).max() < 5e-3


def test_filter_three_is_empty_at_16_khz_alone() -> None:
    assert [int(i) for i in np.flatnonzero(~mel_filters(16000).any(0))] == [3]
    assert (fbank(_signals(16000)["white"], 16000)[:, 3] == np.float32(SILENCE)).all()
    for rate in RATES[1:]:
        assert mel_filters(rate).any(0).all()


@pytest.mark.usefixtures("unchecked")  # float64 is taken as well
def test_a_clip_s_features_do_not_depend_on_what_came_before() -> None:
    wave = _signals(22050)["white"]
    first = fbank(wave, 22050)
    for rate in RATES:  # 22.05 and 32 kHz share an FFT length but not a window
        fbank(_signals(rate)["pink"], rate)
    assert np.array_equal(fbank(wave, 22050), first)
    assert np.array_equal(fbank(wave.astype(np.float64), 22050), first)


def test_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match=r"one channel.*\(2, 400\).*audio\[0\]"):
        fbank(np.zeros((2, 400), np.float32), 16000)
    with pytest.raises(DataError, match="not finite"):
        fbank(np.array([0, np.nan] * 400, np.float32), 16000)
    with pytest.raises(ConfigError, match="too low"):
        fbank(np.zeros(400, np.float32), 40)
    with pytest.raises(ConfigError, match=r"refuses 128 filters at 16000 Hz.*Use the backend"):
        FBANKS["kaldi"](np.zeros(16000, np.float32), 16000)
    for backend in FBANKS.values():
        assert backend(np.zeros(10, np.float32), 44100).shape == (0, 128)
