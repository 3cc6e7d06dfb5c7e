"""Synthesised sounds of the classes: pulses, shaped noise, decaying partials and gliding harmonics at known times.

A sound's size sets its pitch: a big source sounds about half as high as a small one, whatever the class. Noise is made
as a random-phase spectrum of a fixed length and repeated, one small inverse FFT in place of filtering every sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harken.errors import unknown
from harken.world.classes import NAMES

Wave = NDArray[np.float32]
Samples = NDArray[np.floating[Any]]  # intermediate: float64 unless noise alone

RATE_HZ = 44_100
_PITCH = {"big": 0.8, "small": 1.25}
_NOISE_LEN = 1 << 16
_NOISE_HZ = np.fft.rfftfreq(_NOISE_LEN, 1 / RATE_HZ)
_FADE_S = 0.012
_TABLE_LEN = 1 << 13


def _seconds(duration_s: float) -> Samples:
    return np.arange(max(1, round(duration_s * RATE_HZ))) / RATE_HZ


def _noise(rng: np.random.Generator, n: int, weight: Callable[[Samples], Samples]) -> Wave:
    """`n` samples of noise whose magnitude spectrum is `weight(frequency in Hz)`, at unit RMS."""
    phase = np.exp(2j * np.pi * rng.random(_NOISE_HZ.size))
    spectrum = weight(np.maximum(_NOISE_HZ, 1.0)) * phase
    spectrum[0] = 0
    period = np.fft.irfft(spectrum, _NOISE_LEN).astype(np.float32)
    period /= np.sqrt(np.mean(period**2)) + 1e-12
    return np.resize(np.roll(period, int(rng.integers(_NOISE_LEN))), n)


def _band(low_hz: float, high_hz: float, slope: float = 4.0) -> Callable[[Samples], Samples]:
    """A smooth band-pass weight."""
    return lambda f: 1 / (1 + (low_hz / f) ** slope) / (1 + (f / high_hz) ** slope)


def _decay(t: Samples, attack_s: float, decay_s: float) -> Samples:
    return np.minimum(t / attack_s, 1.0) * np.exp(-t / decay_s)


def _hump(t: Samples) -> Samples:
    """A smooth rise and fall over the whole of `t`."""
    return np.asarray(np.sin(np.pi * np.linspace(0, 1, t.size)) ** 0.5)


def _harmonics(f0_hz: Samples, gains: Samples | list[float]) -> Samples:
    """A sum of harmonics of a gliding fundamental, read from a table of one period; those above 20 kHz are left out."""
    cycle, top_hz = np.arange(_TABLE_LEN) / _TABLE_LEN, float(f0_hz.max())
    table = np.zeros(_TABLE_LEN)
    for k, g in enumerate(gains, 1):
        if k * top_hz < 0.45 * RATE_HZ:
            table += g * np.sin(2 * np.pi * k * cycle)
    phase = np.cumsum(f0_hz) * (_TABLE_LEN / RATE_HZ)
    return np.asarray(table[phase.astype(np.int64) % _TABLE_LEN])


def _formants(f0_hz: float, centres_hz: list[float], width_hz: float, n: int) -> Samples:
    """Harmonic gains of a voice: a falling source through resonances."""
    f = f0_hz * np.arange(1, n + 1)
    gains = sum(np.exp(-(((f - c) / width_hz) ** 2)) for c in centres_hz)
    return np.asarray(gains + 0.03 / np.arange(1, n + 1))


def _place(
    n: int,
    rng: np.random.Generator,
    grains: Sequence[Samples],
    times_s: Samples,
    spread: float = 0.2,
) -> Samples:
    """Add `grains`, in turn, at `times_s`, each with a little loudness of its own."""
    out = np.zeros(n)
    for k, t in enumerate(times_s):
        grain, i = grains[k % len(grains)], round(float(t) * RATE_HZ)
        if 0 <= i < n:
            part = grain[: n - i]
            out[i : i + part.size] += part * (1 + spread * rng.uniform(-1, 1))
    return out


def _every(duration_s: float, period_s: float, rng: np.random.Generator, jitter: float = 0.08) -> Samples:
    """Onsets from 0 on, about `period_s` apart."""
    t = np.arange(0, duration_s, period_s)
    return np.asarray(np.maximum(t + period_s * jitter * rng.uniform(-1, 1, t.size) * (t > 0), 0.0))


def _groups(duration_s: float, period_s: float, offsets_s: list[float], rng: np.random.Generator) -> Samples:
    """Onsets in groups: bark-bark, pause, bark-bark."""
    starts = _every(duration_s, period_s, rng)
    return np.sort((starts[:, None] + np.array(offsets_s)).ravel())


def _dog(rng: np.random.Generator, d: float, p: float) -> Samples:
    grains = []
    for _ in range(2):
        t = _seconds(0.19)
        f0 = p * (430 * np.exp(-(((t - 0.05) / 0.09) ** 2)) + 170)
        voice = _harmonics(f0, _formants(400 * p, [650 * p, 1500 * p], 420 * p, 14))
        rough = _noise(rng, t.size, _band(500 * p, 2200 * p)) * 0.8
        grains.append((voice + rough) * _decay(t, 0.012, 0.075))
    return _place(round(d * RATE_HZ), rng, grains, _groups(d, 1.1, [0.0, 0.33], rng))


def _cat(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(0.85)
    u = t / t[-1]
    f0 = p * (480 + 260 * np.sin(np.pi * u**0.7) + 6 * np.sin(2 * np.pi * 6 * t))
    low = _harmonics(f0, _formants(600 * p, [900 * p], 400 * p, 14))
    high = _harmonics(f0, _formants(600 * p, [2400 * p], 700 * p, 14))
    grain = (low * (1 - u) + 1.2 * high * u) * _hump(t)
    return _place(round(d * RATE_HZ), rng, [grain], _every(d, 1.35, rng))


def _bird(rng: np.random.Generator, d: float, p: float) -> Samples:
    grains = []
    for up in (1, -1, 1):
        t = _seconds(0.075)
        u = np.linspace(-1, 1, t.size) * up
        grains.append(_harmonics(p**0.7 * (4300 + 1300 * u + 300 * np.sin(2 * np.pi * 60 * t)), [1.0, 0.1]) * _hump(t))
    return _place(round(d * RATE_HZ), rng, grains, _groups(d, 0.85, [0.0, 0.11, 0.22, 0.33], rng))


def _rooster(rng: np.random.Generator, d: float, p: float) -> Samples:
    parts = []
    for length, a, b in ((0.16, 620, 720), (0.2, 700, 900), (0.18, 800, 860), (0.85, 980, 560)):
        t = _seconds(length)
        f0 = p * np.linspace(a, b, t.size) * (1 + 0.012 * np.sin(2 * np.pi * 17 * t))
        parts += [_harmonics(f0, [0.5, 1.0, 0.9, 0.8, 0.5, 0.35, 0.2, 0.15]) * _hump(t), np.zeros(1600)]
    return _place(round(d * RATE_HZ), rng, [np.concatenate(parts)], _every(d, 2.0, rng))


def _cow(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(1.6)
    u = t / t[-1]
    f0 = p * (105 + 45 * np.sin(np.pi * u**0.6))
    grain = _harmonics(f0, _formants(130 * p, [280 * p, 620 * p], 170 * p, 20)) * _hump(t)
    return _place(round(d * RATE_HZ), rng, [grain], _every(d, 1.95, rng))


def _frog(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(0.034)
    pulse = np.sin(2 * np.pi * 620 * p * t) * _decay(t, 0.002, 0.009)
    pulse += 0.5 * np.sin(2 * np.pi * 1350 * p * t) * _decay(t, 0.002, 0.006)
    croak = _place(round(0.45 * RATE_HZ), rng, [pulse], np.arange(12) * 0.034, 0.1)
    return _place(round(d * RATE_HZ), rng, [croak], _every(d, 0.8, rng))


def _bee(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(d)
    drift = np.sin(2 * np.pi * 0.7 * t + rng.uniform(0, 6)) + 0.5 * np.sin(2 * np.pi * 1.9 * t)
    f0 = p * (215 + 14 * drift + 3 * np.sin(2 * np.pi * 27 * t))
    return _harmonics(f0, [1 / k**0.6 for k in range(1, 15)]) * (0.75 + 0.25 * drift / 1.5)


def _duck(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(0.2)
    f0 = p * np.linspace(235, 190, t.size) * (1 + 0.03 * np.sign(np.sin(2 * np.pi * 95 * t)))
    grain = _harmonics(f0, _formants(210 * p, [1250 * p, 2700 * p], 260 * p, 26)) * _decay(t, 0.015, 0.16)
    return _place(round(d * RATE_HZ), rng, [grain], _groups(d, 1.5, [0.0, 0.29, 0.56], rng))


def _bell(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(2.6)
    grain = np.zeros(t.size)
    for ratio, gain, decay in (
        (0.5, 0.8, 1.6),
        (1, 1, 1.1),
        (1.2, 0.8, 0.9),
        (1.5, 0.4, 0.7),
        (2, 0.9, 0.6),
        (2.66, 0.5, 0.4),
    ):
        grain += gain * np.sin(2 * np.pi * 520 * p * ratio * t) * np.exp(-t / decay)
    grain += 0.5 * _noise(rng, t.size, _band(2500, 7000)) * np.exp(-t / 0.02)
    return _place(round(d * RATE_HZ), rng, [grain], _every(d, 1.5, rng, 0.03))


def _telephone(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(1.0)
    hits = np.floor(t * 24).astype(int)
    since = t - hits / 24
    f = np.where(hits % 2, 1480.0, 1180.0) * p
    grain = (np.sin(2 * np.pi * f * t) + 0.6 * np.sin(2 * np.pi * 2.76 * f * t)) * np.exp(-since / 0.05)
    return _place(round(d * RATE_HZ), rng, [grain], _every(d, 1.7, rng, 0.02))


def _ambulance(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(d)
    sweep = np.abs(2 * ((t / 2.4 + rng.random()) % 1) - 1)
    return _harmonics(p * (560 + 800 * sweep), [1.0, 0.1, 0.4, 0.05, 0.18])


def _car(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(0.5)
    ones = np.ones(t.size)
    chord = sum(_harmonics(p * f * ones, [1 / k**0.5 for k in range(1, 13)]) for f in (350.0, 441.0))
    return _place(round(d * RATE_HZ), rng, [np.asarray(chord) * _hump(t) ** 0.2], _groups(d, 1.7, [0.0, 0.62], rng))


def _train(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(0.2)
    puff = _noise(rng, t.size, _band(120 * p, 900 * p, 3)) * _decay(t, 0.03, 0.06)
    clank = np.sin(2 * np.pi * 95 * p * t) * _decay(t, 0.004, 0.03)
    grains = [(2.0 if k == 0 else 1.0) * puff + (1.5 if k == 2 else 0.0) * clank for k in range(4)]
    return _place(round(d * RATE_HZ), rng, grains, _every(d, 0.21, rng, 0.03), 0.1)


def _motorcycle(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(d)
    rev = np.clip(np.sin(2 * np.pi * t / 2.2 + rng.uniform(0, 6)), -0.3, 1) + 0.3
    f0 = p * (42 + 55 * rev)
    wave = _harmonics(f0, [1 / k**0.35 * (1.5 if k % 2 else 1.0) for k in range(1, 26)])
    return (wave + 1.2 * _noise(rng, t.size, _band(200 * p, 1800 * p))) * (0.5 + 0.5 * rev)


def _helicopter(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(d)
    beat = (t * 11.0 * p**0.4) % 1
    thump = np.sin(2 * np.pi * 75 * p * t) * np.exp(-beat * 6) * 1.8
    return thump + _noise(rng, t.size, _band(60 * p, 420 * p, 3)) * (0.15 + np.exp(-beat * 5))


def _rain(rng: np.random.Generator, d: float, p: float) -> Samples:
    n = round(d * RATE_HZ)
    hiss = _noise(rng, n, _band(1800 * p, 12_000, 2)).astype(np.float64)
    t = _seconds(0.012)
    drops = [np.sin(2 * np.pi * f * p * t) * _decay(t, 0.0005, 0.003) for f in (2600, 3400, 4700)]
    return hiss + 4 * _place(n, rng, drops, np.sort(rng.uniform(0, d, round(22 * d))), 0.9)


def _thunder(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(3.0)
    rumble = _noise(rng, t.size, _band(25, 110 * p, 3)) * _decay(t, 0.08, 1.0)
    roll = 1 + 0.7 * np.sin(2 * np.pi * 3.1 * t + rng.uniform(0, 6)) * np.sin(2 * np.pi * 1.3 * t)
    crack = _noise(rng, t.size, _band(200 * p, 2500 * p, 2)) * np.exp(-t / 0.12)
    return _place(round(d * RATE_HZ), rng, [2.5 * rumble * roll + 0.9 * crack], _every(d, 2.7, rng))


def _wind(rng: np.random.Generator, d: float, p: float) -> Samples:
    n = round(d * RATE_HZ)
    t = _seconds(d)
    gust = 0.5 + 0.5 * np.sin(2 * np.pi * t / 3.3 + rng.uniform(0, 6))
    low = _noise(rng, n, lambda f: np.exp(-(((f - 330 * p) / (60 * p)) ** 2)) + 0.05 * _band(80, 600)(f))
    high = _noise(rng, n, lambda f: np.exp(-(((f - 720 * p) / (110 * p)) ** 2)))
    return low * (1.1 - gust) + high * gust


def _waves(rng: np.random.Generator, d: float, p: float) -> Samples:
    n = round(d * RATE_HZ)
    u = (_seconds(d) / 3.0 + rng.random() * 0.3) % 1
    swell = np.where(u < 0.55, (u / 0.55) ** 3, np.exp(-(u - 0.55) * 7))
    deep = _noise(rng, n, lambda f: _band(60, 500 * p)(f) / np.sqrt(f))
    foam = _noise(rng, n, lambda f: _band(700 * p, 5000 * p, 2)(f) / np.sqrt(f))
    return deep * (0.25 + 0.5 * swell) + foam * (0.06 + 1.5 * swell)


def _fire(rng: np.random.Generator, d: float, p: float) -> Samples:
    n = round(d * RATE_HZ)
    grains = []
    for length in (0.004, 0.008, 0.016):
        t = _seconds(0.03)
        grains.append(_noise(rng, t.size, _band(900 * p, 9000)) * np.exp(-t / length * 2))
    base = 0.12 * _noise(rng, n, _band(60, 260 * p))
    return base + _place(n, rng, grains, np.sort(rng.uniform(0, d, round(24 * d))), 0.95)


def _hands(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(0.06)
    grains = [
        _noise(rng, t.size, _band(c * p * 0.8, c * p * 1.4, 6)) * _decay(t, 0.001, 0.012) for c in (1150, 1300, 1500)
    ]
    return _place(round(d * RATE_HZ), rng, grains, _every(d, 0.24, rng, 0.06), 0.25)


def _boots(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(0.22)
    grains = []
    for scuff in (1.0, 0.7):
        thud = np.sin(2 * np.pi * 85 * p * t) * _decay(t, 0.004, 0.035) * 1.6
        grit = _noise(rng, t.size, _band(2200 * p, 5200 * p)) * (np.exp(-(((t - 0.1) / 0.035) ** 2)))
        grains.append(thud + 0.55 * scuff * grit)
    return _place(round(d * RATE_HZ), rng, grains, _every(d, 0.55, rng, 0.04))


def _door(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(0.14)
    modes = ((210, 0.045, 1.0), (385, 0.03, 0.8), (640, 0.02, 0.5), (1150, 0.01, 0.3))
    knock = sum(g * np.sin(2 * np.pi * f * p * t) * np.exp(-t / tau) for f, tau, g in modes)
    return _place(round(d * RATE_HZ), rng, [np.asarray(knock)], _groups(d, 1.5, [0.0, 0.19, 0.38], rng), 0.1)


def _hammer(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(0.45)
    modes = ((2150, 0.16, 1.0), (3480, 0.12, 0.8), (5210, 0.08, 0.6), (7330, 0.05, 0.4))
    ring = sum(g * np.sin(2 * np.pi * f * p**0.7 * t) * np.exp(-t / tau) for f, tau, g in modes)
    hit = _noise(rng, t.size, _band(150, 3000)) * np.exp(-t / 0.012)
    return _place(round(d * RATE_HZ), rng, [np.asarray(ring) + hit], _every(d, 0.62, rng, 0.04))


def _saw(rng: np.random.Generator, d: float, p: float) -> Samples:
    grains = []
    for low, high in ((900, 3600), (1500, 6000)):
        t = _seconds(0.34)
        teeth = 0.35 + 0.65 * (((t * np.linspace(70, 130, t.size) * p) % 1) < 0.45)
        grains.append(_noise(rng, t.size, _band(low * p, high * p)) * teeth * _hump(t))
    return _place(round(d * RATE_HZ), rng, grains, _every(d, 0.4, rng, 0.03))


def _keyboard(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(0.05)
    grains = []
    for c in (3300, 4200, 5200):
        click = _noise(rng, t.size, _band(c * p * 0.75, c * p * 1.3, 8))
        grains.append(click * (np.exp(-t / 0.004) + 0.5 * np.exp(-(((t - 0.03) / 0.004) ** 2))))
    times = np.cumsum(rng.exponential(0.07, round(d * 14)) + 0.05)
    return _place(round(d * RATE_HZ), rng, grains, np.concatenate([[0.0], times[times < d]]), 0.5)


def _clock(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(0.09)
    grains = []
    for f in (1650, 1200):
        ring = np.sin(2 * np.pi * f * p * t) + 0.7 * np.sin(2 * np.pi * 2.9 * f * p * t)
        grains.append(ring * _decay(t, 0.0008, 0.016))
    return _place(round(d * RATE_HZ), rng, grains, _every(d, 0.5, rng, 0.0), 0.05)


def _glass(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(0.9)
    grain = 1.2 * _noise(rng, t.size, _band(2500 * p**0.6, 15_000)) * np.exp(-t / 0.05)
    for _ in range(22):
        at, f = float(rng.exponential(0.16)), float(rng.uniform(3200, 9500)) * p**0.6
        i = round(at * RATE_HZ)
        if i < t.size:
            u = t[: t.size - i]
            grain[i:] += 0.7 * np.sin(2 * np.pi * f * u) * np.exp(-u / 0.09)
    return _place(round(d * RATE_HZ), rng, [grain], _every(d, 1.7, rng))


def _drum(rng: np.random.Generator, d: float, p: float) -> Samples:
    t = _seconds(0.3)
    kick = np.sin(2 * np.pi * p * (62 * t + 5.5 * (1 - np.exp(-t / 0.03)))) * _decay(t, 0.002, 0.1) * 1.5
    skin = 0.7 * np.sin(2 * np.pi * 190 * p * t) * np.exp(-t / 0.06)
    snare = _noise(rng, t.size, _band(300 * p, 9000)) * _decay(t, 0.001, 0.07) + skin
    return _place(round(d * RATE_HZ), rng, [kick, snare, kick, kick, snare], _every(d, 0.3, rng, 0.0), 0.1)


def _piano(rng: np.random.Generator, d: float, p: float) -> Samples:
    scale = 261.6 * 2 ** (np.array([0, 2, 4, 7, 9, 12, 14]) / 12)
    grains = []
    for f in rng.choice(scale, 6):
        t = _seconds(1.0)
        partials = sum(
            np.sin(2 * np.pi * k * np.sqrt(1 + 0.0004 * k * k) * f * p * t) * np.exp(-t * (2.2 + 0.9 * k)) / k**1.1
            for k in range(1, 8)
        )
        grains.append(np.asarray(partials) * np.minimum(t / 0.004, 1))
    return _place(round(d * RATE_HZ), rng, grains, _every(d, 0.36, rng, 0.02))


def _trumpet(rng: np.random.Generator, d: float, p: float) -> Samples:
    scale = 392.0 * 2 ** (np.array([0, 4, 7, 12]) / 12)
    grains = []
    for f in rng.choice(scale, 4):
        t = _seconds(0.52)
        f0 = p * f * (1 + 0.007 * np.sin(2 * np.pi * 5.5 * t) * np.minimum(t / 0.3, 1)) * (1 - 0.04 * np.exp(-t / 0.02))
        grains.append(_harmonics(f0, [0.7, 1, 1, 0.9, 0.8, 0.6, 0.45, 0.35, 0.25, 0.2]) * _hump(t) ** 0.6)
    return _place(round(d * RATE_HZ), rng, grains, _every(d, 0.6, rng, 0.0), 0.05)


def _tap(rng: np.random.Generator, d: float, p: float) -> Samples:
    grains = []
    for f in (780, 860):
        t = _seconds(0.11)
        glide = p * f * (1 + 1.1 * t / 0.11)
        grains.append(np.sin(2 * np.pi * np.cumsum(glide) / RATE_HZ) * _decay(t, 0.003, 0.03))
    return _place(round(d * RATE_HZ), rng, grains, _every(d, 0.42, rng, 0.15))


SOUNDS: dict[str, Callable[[np.random.Generator, float, float], Samples]] = {
    "dog": _dog,
    "cat": _cat,
    "bird": _bird,
    "rooster": _rooster,
    "cow": _cow,
    "frog": _frog,
    "bee": _bee,
    "duck": _duck,
    "bell": _bell,
    "telephone": _telephone,
    "ambulance": _ambulance,
    "car": _car,
    "train": _train,
    "motorcycle": _motorcycle,
    "helicopter": _helicopter,
    "rain": _rain,
    "thunder": _thunder,
    "wind": _wind,
    "waves": _waves,
    "fire": _fire,
    "hands": _hands,
    "boots": _boots,
    "door": _door,
    "hammer": _hammer,
    "saw": _saw,
    "keyboard": _keyboard,
    "clock": _clock,
    "glass": _glass,
    "drum": _drum,
    "piano": _piano,
    "trumpet": _trumpet,
    "tap": _tap,
}


def synthesise(class_name: str, size: str, duration_s: float, rng: np.random.Generator) -> Wave:
    """The sound of `class_name` for `duration_s`: float32 (time,) at RATE_HZ, RMS 0.1 where it sounds, short fades.

    size: "big" (low) or "small" (high). Raises ConfigError for an unknown class or size.
    """
    if class_name not in SOUNDS:
        raise unknown("sound", class_name, NAMES)
    if size not in _PITCH:
        raise unknown("size", size, _PITCH)
    n = max(1, round(duration_s * RATE_HZ))
    wave = SOUNDS[class_name](rng, duration_s, _PITCH[size] * float(rng.uniform(0.94, 1.06)))[:n]
    wave = np.pad(wave, (0, n - wave.size))
    loud = wave[np.abs(wave) > 0.05 * np.abs(wave).max()]  # pauses between barks do not make the barks louder
    out = (0.1 * wave / np.sqrt(np.mean(loud**2))).astype(np.float32)
    if np.abs(out).max() > 0.5:
        # a single click may stand 20 dB above the mean; soft clipping keeps it below full scale and in place
        out = np.tanh(out / np.float32(0.6)) * np.float32(0.6)
    fade = min(round(_FADE_S * RATE_HZ), n // 2)
    if fade:
        ramp = np.linspace(0, 1, fade, dtype=np.float32)
        out[:fade] *= ramp
        out[-fade:] *= ramp[::-1]
    return np.asarray(out, dtype=np.float32)


def background(duration_s: float, level_db: float, rng: np.random.Generator) -> Wave:
    """The quiet noise of a place, under everything: float32 (time,) at RATE_HZ with an RMS of `level_db` dBFS."""
    corner_hz = float(rng.uniform(150, 900))
    noise = _noise(rng, max(1, round(duration_s * RATE_HZ)), lambda f: 1 / (1 + f / corner_hz))
    return noise * np.float32(10 ** (level_db / 20))
