"""The log mel spectrogram that PANNs were trained on, the input of ResNet38 and CNN14.

What torchlibrosa's `Spectrogram(1024, 320)` and `LogmelFilterBank(64 bins, 50-14000 Hz)` compute at 32 kHz: a centred,
reflected STFT with a periodic Hann window, power, Slaney's mel filters of equal area, and 10 log10 of it, floored at
-100 dB.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from harken.errors import ConfigError, DataError
from harken.media.mel import CHUNK, MelBank, per_thread
from harken.media.sizes import LOGMEL_MELS as N_MELS
from harken.media.sizes import LOGMEL_RATE_HZ as SAMPLE_RATE_HZ

N_FFT: Final = 1024
HOP: Final = 320
LOW_HZ: Final = 50.0
HIGH_HZ: Final = 14000.0
FLOOR: Final = 1e-10
_BANDS: Final = 4


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
    window, bank = per_thread(("logmel",), _tables)
    features = np.empty((1 + len(wave) // HOP, N_MELS), np.float32)
    with torch.inference_mode():
        half = N_FFT // 2  # reflected at each end, without the sample at the edge
        padded = torch.from_numpy(np.concatenate([wave[half:0:-1], wave, wave[-2 : -half - 2 : -1]]))
        windows = padded.unfold(0, N_FFT, HOP)
        out = torch.from_numpy(features)
        for at in range(0, len(features), CHUNK):
            stop = min(len(features), at + CHUNK)
            torch.mul(windows[at:stop], window, out=bank.frames[: stop - at])
            bank(out[at:stop])
        out.clamp_(min=FLOOR).log10_().mul_(10)
    return features


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


def _tables() -> tuple[torch.Tensor, MelBank]:
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    return torch.from_numpy(window.astype(np.float32)), MelBank(mel_filters(), _BANDS)
