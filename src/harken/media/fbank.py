"""Kaldi's log mel filter bank, the input of the audio ViT.

Same definition as `torchaudio.compliance.kaldi.fbank(htk_compat=True, use_energy=False, window_type="hanning",
num_mel_bins=128, dither=0, frame_shift=10)`, in fewer passes: pre-emphasis once on the waveform instead of once per
frame, the frame's mean removed as a rank-1 update, and the mel product as in `mel.py`. Within 1e-3 of the definition in
float64, where torchaudio's own comes to 1.3e-3 and Kaldi's to 2.9e-3 in nearly empty bins; float16 storage costs 4e-3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from harken.errors import ConfigError, DataError
from harken.media.mel import CHUNK, MelBank, per_thread
from harken.media.sizes import FBANK_MELS as N_MELS

Waveform = NDArray[np.float32]
Features = NDArray[np.float32]

FRAME_LENGTH_S: Final = 0.025
FRAME_SHIFT_S: Final = 0.01
PREEMPHASIS: Final = 0.97
LOW_HZ: Final = 20.0
FLOOR: Final = 1.1920928955078125e-07  # float32's epsilon; its log, -15.942385, is silence
_BANDS: Final = 8


def fbank(waveform: Waveform, sample_rate_hz: int) -> Features:
    """`waveform` float32 (time,) in [-1, 1] as float32 (frame, 128): natural-log mel energies, 25 ms windows every 10
    ms.

    The waveform's mean is subtracted first (VIP-ANT; a numerical no-op, since every frame's mean goes too). Frames are
    whole: 998 for ten seconds at 16 kHz, none for less than 25 ms. Rows are not padded here. At 16 kHz filter 3 holds
    no FFT bin and is always -15.942385. Raises DataError for anything but one channel of finite samples.
    """
    wave = _checked(waveform)
    window, shift, _ = sizes(sample_rate_hz)
    n = n_frames(wave.shape[0], sample_rate_hz)
    if n == 0:
        return np.empty((0, N_MELS), np.float32)
    hann, bank = per_thread(("fbank", sample_rate_hz), lambda: _tables(sample_rate_hz))
    features = np.empty((n, N_MELS), np.float32)
    with torch.inference_mode():
        x = torch.from_numpy(wave)
        x = x - x.mean()
        # x[t] - 0.97 x[t-1] as a difference of neighbours, all but exact, and a small rest: ten times nearer to float64
        emphasised = torch.zeros_like(x)  # the first sample of a frame meets the window's zero
        torch.sub(x[1:], x[:-1], out=emphasised[1:])
        emphasised[1:].add_(x[:-1], alpha=1 - PREEMPHASIS)
        windows = emphasised.unfold(0, window, shift)
        means = x.unfold(0, window, shift).mean(1)
        out = torch.from_numpy(features)
        for at in range(0, n, CHUNK):
            stop = min(n, at + CHUNK)
            head = bank.frames[: stop - at, :window]  # behind the window it stays zero
            torch.mul(windows[at:stop], hann, out=head)
            head.addr_(means[at:stop], hann, alpha=-(1 - PREEMPHASIS))
            bank(out[at:stop])
        out.clamp_(min=FLOOR).log_()
    return features


def sizes(sample_rate_hz: int) -> tuple[int, int, int]:
    """The window, the shift and the FFT length in samples at this rate."""
    window, shift = int(sample_rate_hz * FRAME_LENGTH_S), int(sample_rate_hz * FRAME_SHIFT_S)
    if window < 2:
        raise ConfigError(f"fbank: a sample rate of {sample_rate_hz} Hz is too low for windows of 25 ms.")
    return window, shift, 1 << (window - 1).bit_length()


def n_frames(n_samples: int, sample_rate_hz: int) -> int:
    """How many whole 25 ms windows fit, one every 10 ms."""
    window, shift, _ = sizes(sample_rate_hz)
    return 0 if n_samples < window else 1 + (n_samples - window) // shift


def mel_filters(sample_rate_hz: int) -> NDArray[np.float64]:
    """The filters float64 (n_fft / 2 + 1, 128): triangles on 1127 ln(1 + f / 700), from 20 Hz to half the rate."""
    n_fft = sizes(sample_rate_hz)[2]
    low, high = _mel(LOW_HZ), _mel(sample_rate_hz / 2)
    delta = (high - low) / (N_MELS + 1)
    left = low + np.arange(N_MELS) * delta
    bins = _mel(sample_rate_hz / n_fft * np.arange(n_fft // 2))[:, None]
    up, down = (bins - left) / delta, (left + 2 * delta - bins) / delta
    filters = np.zeros((n_fft // 2 + 1, N_MELS))  # Kaldi gives the bin at half the rate no weight
    filters[:-1] = np.maximum(0, np.minimum(up, down))
    return filters


def _mel(hz: float | NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(1127.0 * np.log1p(np.asarray(hz, np.float64) / 700.0))


def _tables(sample_rate_hz: int) -> tuple[torch.Tensor, MelBank]:
    window = sizes(sample_rate_hz)[0]
    hann = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(window) / (window - 1))
    return torch.from_numpy(hann.astype(np.float32)), MelBank(mel_filters(sample_rate_hz), _BANDS)


def _checked(waveform: Waveform) -> Waveform:
    wave = np.ascontiguousarray(waveform, dtype=np.float32)
    if wave.ndim != 1:
        raise DataError(f"fbank: expected one channel, float32 (time,); found shape {wave.shape}. Pass `audio[0]`.")
    if not np.isfinite(wave).all():
        raise DataError("fbank: the waveform holds values that are not finite.")
    return wave


def _torchaudio(waveform: Waveform, sample_rate_hz: int) -> Features:
    """torchaudio's own function, with the same options."""
    from torchaudio.compliance import kaldi

    wave = torch.from_numpy(_checked(waveform))
    if n_frames(len(wave), sample_rate_hz) == 0:
        return np.empty((0, N_MELS), np.float32)
    features = kaldi.fbank(
        (wave - wave.mean())[None],
        sample_frequency=sample_rate_hz,
        htk_compat=True,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=N_MELS,
        dither=0.0,
        frame_shift=FRAME_SHIFT_S * 1000,
    )
    return np.asarray(features.numpy(), np.float32)


def _kaldi(waveform: Waveform, sample_rate_hz: int) -> Features:
    """kaldi-native-fbank with the options that make it equal.

    Raises ConfigError where a filter holds no FFT bin, which Kaldi refuses (16 kHz with 128 filters).
    """
    import kaldi_native_fbank as knf

    if not mel_filters(sample_rate_hz).any(0).all():
        raise ConfigError(
            f"fbank: the backend 'kaldi' refuses {N_MELS} filters at {sample_rate_hz} Hz: one of them holds no FFT bin."
            " Use the backend 'harken' or 'torchaudio', or a rate of 22050 Hz or more."
        )
    wave = _checked(waveform)
    options = knf.FbankOptions()
    options.frame_opts.samp_freq = sample_rate_hz
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = "hanning"
    options.frame_opts.frame_shift_ms = FRAME_SHIFT_S * 1000
    options.frame_opts.frame_length_ms = FRAME_LENGTH_S * 1000
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = N_MELS
    options.mel_opts.low_freq = LOW_HZ
    options.mel_opts.high_freq = 0.0
    options.use_energy = False
    options.htk_compat = True
    computer = knf.OnlineFbank(options)
    computer.accept_waveform(sample_rate_hz, (wave - wave.mean()).tolist() if len(wave) else [])
    computer.input_finished()
    rows = [np.array(computer.get_frame(i)) for i in range(computer.num_frames_ready)]
    return np.array(rows, np.float32).reshape(-1, N_MELS)


FBANKS: Final[dict[str, Callable[[Waveform, int], Features]]] = {
    "harken": fbank,
    "torchaudio": _torchaudio,
    "kaldi": _kaldi,
}
