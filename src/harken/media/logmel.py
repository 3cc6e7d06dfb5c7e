"""The log mel spectrogram that PANNs were trained on, the input of ResNet38 and CNN14.

What torchlibrosa's `Spectrogram(1024, 320)` and `LogmelFilterBank(64 bins, 50-14000 Hz)` compute at 32 kHz: a centred,
reflected STFT with a periodic Hann window, power, Slaney's mel filters of equal area, and 10 log10 of it, floored at
-100 dB.
"""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from harken.errors import ConfigError, DataError

SAMPLE_RATE_HZ: Final = 32000
N_FFT: Final = 1024
HOP: Final = 320
N_MELS: Final = 64
LOW_HZ: Final = 50.0
HIGH_HZ: Final = 14000.0
FLOOR: Final = 1e-10


def logmel(waveform: NDArray[np.float32], sample_rate_hz: int = SAMPLE_RATE_HZ) -> NDArray[np.float32]:
    """`waveform` float32 (time,) in [-1, 1] at 32 kHz as float32 (frame, 64), in decibels: one frame every 10 ms.

    1 + time // 320 frames: 1001 for ten seconds. Raises ConfigError at another rate, DataError for anything but one
    channel of at least 513 finite samples (the reflection at the edges needs them).
    """
    if sample_rate_hz != SAMPLE_RATE_HZ:
        raise ConfigError(
            f"logmel: PANNs take {SAMPLE_RATE_HZ} Hz, found {sample_rate_hz}. Decode at {SAMPLE_RATE_HZ} Hz."
        )
    wave = np.ascontiguousarray(waveform, dtype=np.float32)
    if wave.ndim != 1 or wave.shape[0] <= N_FFT // 2:
        raise DataError(
            f"logmel: expected one channel, float32 (time,) of more than {N_FFT // 2} samples; found {wave.shape}."
        )
    if not np.isfinite(wave).all():
        raise DataError("logmel: the waveform holds values that are not finite.")
    window, filters = _tables()
    with torch.inference_mode():
        padded = torch.nn.functional.pad(torch.from_numpy(wave)[None], (N_FFT // 2, N_FFT // 2), mode="reflect")[0]
        spectrum = torch.fft.rfft(padded.unfold(0, N_FFT, HOP) * window)
        mel = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag) @ filters
        out: NDArray[np.float32] = mel.clamp_(min=FLOOR).log10_().mul_(10).numpy()
    return out


def mel_filters() -> NDArray[np.float64]:
    """Slaney's filters float64 (513, 64): linear below 1 kHz, logarithmic above, each of unit area in Hz."""
    hz = _hz(np.linspace(_mel(LOW_HZ), _mel(HIGH_HZ), N_MELS + 2))
    bins = np.arange(N_FFT // 2 + 1) * (SAMPLE_RATE_HZ / N_FFT)
    up = (bins[:, None] - hz[:-2]) / (hz[1:-1] - hz[:-2])
    down = (hz[2:] - bins[:, None]) / (hz[2:] - hz[1:-1])
    filters: NDArray[np.float64] = np.maximum(0, np.minimum(up, down)) * (2 / (hz[2:] - hz[:-2]))
    return filters


_KNEE_HZ: Final = 1000.0
_MEL_PER_HZ: Final = 3 / 200
_LOG_STEP: Final = float(np.log(6.4) / 27)


def _mel(hz: float) -> float:
    if hz < _KNEE_HZ:
        return hz * _MEL_PER_HZ
    return _KNEE_HZ * _MEL_PER_HZ + float(np.log(hz / _KNEE_HZ)) / _LOG_STEP


def _hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    knee = _KNEE_HZ * _MEL_PER_HZ
    return np.where(mel < knee, mel / _MEL_PER_HZ, _KNEE_HZ * np.exp((mel - knee) * _LOG_STEP))


@functools.lru_cache(maxsize=1)
def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    return torch.from_numpy(window.astype(np.float32)), torch.from_numpy(mel_filters().astype(np.float32))
