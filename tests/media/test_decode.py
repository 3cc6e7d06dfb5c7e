from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import pytest
import soxr

from harken.errors import ClipError
from harken.media.decode import decode, resample
from harken.media.section import cut


def test_rates_and_channels_stay_apart(lab: Any) -> None:
    data = lab.make()
    section = cut(io.BytesIO(data), 1.0, 3.0, True)
    got = decode(section.data, section.start_s, section.end_s, n_images=0, sample_rates_hz=(44100, 32000, 16000))
    assert {rate: a.shape for rate, a in got.audio.items()} == {44100: (2, 88200), 32000: (2, 64000), 16000: (2, 32000)}
    assert all(a.dtype == np.float32 and a.flags.c_contiguous for a in got.audio.values())
    assert got.images == []
    assert got.image_times_s == []
    left, right = got.audio[44100]
    for channel, truth in zip((left, right), lab.sound(6, 44100)[:, 44100:132300], strict=True):
        assert np.sqrt(np.mean((channel - truth) ** 2)) < 0.1 * truth.std()
    for rate in (32000, 16000):  # each channel as if it were alone
        for channel in (0, 1):
            alone = soxr.resample(got.audio[44100][channel], 44100, rate, quality="VHQ")
            assert np.array_equal(got.audio[rate][channel], alone)


def test_lengths_after_resampling() -> None:
    for n in (441000, 440999, 12345, 1):
        assert abs(resample(np.zeros((1, n), np.float32), 44100, 16000).shape[1] - n * 16000 / 44100) <= 1
    data = np.random.default_rng(0).standard_normal((2, 100)).astype(np.float32)
    assert np.array_equal(resample(data, 8000, 8000), data)


def test_images_at_centres_and_repeats(lab: Any) -> None:
    section = cut(io.BytesIO(lab.make()), 1.0, 3.0, True)
    got = decode(section.data, section.start_s, section.end_s, n_images=4, timestamps="centres", sample_rates_hz=())
    assert got.audio == {}
    assert got.image_times_s == pytest.approx([0.25, 0.75, 1.25, 1.75])
    assert [lab.read_number(i) for i in got.images] == [31, 43, 56, 68]
    assert got.shown_from_s == pytest.approx([0.24, 0.72, 1.24, 1.72])
    dense = decode(section.data, section.start_s, section.start_s + 0.08, n_images=5, sample_rates_hz=())
    assert [lab.read_number(i) for i in dense.images] == [25, 25, 26, 26, 26]


def test_any_order_of_groups_gives_the_pictures_of_a_full_decode(lab: Any) -> None:
    for options in ({"gop": 7, "b_frames": 3}, {"gop": 250, "b_frames": 2}):
        data = lab.make(**options)
        section = cut(io.BytesIO(data), 0.0, 6.0, True)
        for n in (1, 2, 3, 9, 40):
            got = decode(
                section.data, section.start_s, section.end_s, n_images=n, timestamps="centres", sample_rates_hz=()
            )
            assert [lab.read_number(i) for i in got.images] == [int(t * 25 + 1e-6) for t in got.image_times_s]


def test_missing_parts_are_refused(lab: Any) -> None:
    sound = cut(io.BytesIO(lab.make(vcodec=None)), 1.0, 3.0, False)
    with pytest.raises(ClipError) as e:
        decode(sound.data, sound.start_s, sound.end_s, n_images=4, sample_rates_hz=())
    assert e.value.reason == "qc.no_video"
    assert decode(sound.data, sound.start_s, None, n_images=0, sample_rates_hz=(44100,)).audio[44100].shape[1] > 88200
    pictures = lab.make(acodec=None)
    with pytest.raises(ClipError) as e:
        decode(pictures, 1.0, 3.0, n_images=0, sample_rates_hz=(16000,))
    assert e.value.reason == "qc.no_audio"
    assert len(decode(pictures, 1.0, 3.0, n_images=2, sample_rates_hz=()).images) == 2
    with pytest.raises(ClipError) as e:
        decode(pictures, 7.0, 9.0, n_images=2, sample_rates_hz=())
    assert e.value.reason == "qc.no_video"
    with pytest.raises(ClipError) as e:
        decode(sound.data, 50.0, 60.0, n_images=0, sample_rates_hz=(16000,))
    assert e.value.reason == "qc.past_end"


def test_a_recording_that_ends_early_is_not_padded(lab: Any) -> None:
    section = cut(io.BytesIO(lab.make(rate=16000, channels=1)), 3.1, 6.05, True)
    audio = decode(section.data, section.start_s, section.end_s, n_images=0, sample_rates_hz=(16000,)).audio[16000]
    assert 46_000 < audio.shape[1] < 47_200
    assert np.abs(audio[:, -2000:]).max() > 0  # what is there is sound, not filling


def test_a_hole_in_the_sound_keeps_the_rest_in_place(lab: Any) -> None:
    source = lab.make("matroska", vcodec=None, acodec="pcm_s16le", channels=1, rate=16000)
    buffer = io.BytesIO()
    with av.open(io.BytesIO(source)) as src, av.open(buffer, "w", format="matroska") as out:
        copy = out.add_stream_from_template(src.streams.audio[0])
        for p in src.demux():
            if p.size and not 2.0 <= float(p.pts * p.time_base) < 3.0:
                p.stream = copy
                out.mux(p)
    got = decode(buffer.getvalue(), 0.0, 6.0, n_images=0, sample_rates_hz=(16000,)).audio[16000][0]
    truth = lab.sound(6, 16000, 1)[0]
    assert got.shape == truth.shape
    assert np.abs(got[33600:46400]).max() == 0  # packets of a tenth of a second
    for part in (slice(0, 30400), slice(49600, 96000)):
        assert np.abs(got[part] - truth[part]).max() < 0.02


def test_eight_bit_and_float_samples(lab: Any) -> None:
    for codec, kind, scale in (("pcm_u8", "u8", None), ("pcm_f32le", "flt", 1.0), ("pcm_s32le", "s32", 2.0**31 - 1)):
        wave = lab.sound(1.0, 8000, 1)
        buffer = io.BytesIO()
        out: Any = av.open(buffer, "w", format="wav")
        stream = out.add_stream(codec, rate=8000)
        stream.layout = "mono"
        if kind == "u8":
            values = np.round(wave * 127 + 128).astype(np.uint8)
        elif kind == "flt":
            values = wave
        else:
            values = np.round(wave.astype(np.float64) * scale).astype(np.int32)
        frame = av.AudioFrame.from_ndarray(values, format=kind, layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        for p in (*stream.encode(frame), *stream.encode(None)):
            out.mux(p)
        out.close()
        got = decode(buffer.getvalue(), 0.0, 1.0, n_images=0, sample_rates_hz=(8000,)).audio[8000]
        assert np.abs(got - wave).max() < (0.01 if kind == "u8" else 1e-6)
