from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soxr

from harken.errors import ClipError
from harken.media import decode as decoding
from harken.media.containers import MAX_PIXELS
from harken.media.decode import decode, resample
from harken.media.section import cut

ALL = [("all", None)]


def _wav(samples: np.ndarray, rate: int = 8000, layout: str = "stereo") -> bytes:
    """A WAV file of `samples` int16 (channel, time)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as out:
        stream: Any = out.add_stream("pcm_s16le", rate=rate)
        stream.layout = layout
        frame = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1).copy(), format="s16", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def _copied(
    source: bytes,
    container: str,
    change: Callable[[Any], Any] = lambda packet: packet,
    times: int = 1,
    extradata: bytes | None = None,
) -> bytes:
    """The file's packets, each as `change` returns it (or left out), so many times over, in another file."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(source)) as src, av.open(buffer, "w", format=container) as out:
        copies: dict[int, Any] = {s.index: out.add_stream_from_template(s) for s in src.streams}
        if extradata is not None:
            copies[0].codec_context.extradata = extradata
        packets = [change(p) for p in src.demux() if p.size]
        length_s = max((p.pts + p.duration) * p.time_base for p in packets if p is not None)
        for n in range(times):
            for p in packets:
                if p is not None:
                    later = round(n * length_s / p.time_base)
                    copy: Any = av.Packet(bytes(p))
                    copy.time_base, copy.pts, copy.dts = p.time_base, p.pts + later, p.dts + later
                    copy.duration, copy.is_keyframe, copy.stream = p.duration, p.is_keyframe, copies[p.stream.index]
                    out.mux(copy)
    return buffer.getvalue()


def _refusal(data: bytes, start_s: float, end_s: float | None, n_images: int = 0, sounds: Any = ALL) -> str:
    with pytest.raises(ClipError) as e:
        decode(data, start_s, end_s, n_images=n_images, sounds=sounds)
    return e.value.reason


def test_rates_and_channels_stay_apart(lab: Any) -> None:
    data = lab.make()
    section = cut(io.BytesIO(data), 1.0, 3.0, True)
    got = decode(
        section.data, section.start_s, section.end_s, n_images=0, sounds=[("all", r) for r in (44100, 32000, 16000)]
    )
    assert {rate: a.shape for (_, rate), a in got.sounds.items()} == {
        44100: (2, 88200),
        32000: (2, 64000),
        16000: (2, 32000),
    }
    assert all(a.dtype == np.float32 and a.flags.c_contiguous for a in got.sounds.values())
    assert got.images == []
    assert got.image_times_s == []
    left, right = got.sounds["all", 44100]
    for channel, truth in zip((left, right), lab.sound(6, 44100)[:, 44100:132300], strict=True):
        assert np.sqrt(np.mean((channel - truth) ** 2)) < 0.1 * truth.std()
    for rate in (32000, 16000):  # each channel as if it were alone
        for channel in (0, 1):
            alone = soxr.resample(got.sounds["all", 44100][channel], 44100, rate, quality="VHQ")
            assert np.array_equal(got.sounds["all", rate][channel], alone)


def test_lengths_after_resampling() -> None:
    for n in (441000, 440999, 12345, 1):
        assert abs(resample(np.zeros((1, n), np.float32), 44100, 16000).shape[1] - n * 16000 / 44100) <= 1
    data = np.random.default_rng(0).standard_normal((2, 100)).astype(np.float32)
    assert np.array_equal(resample(data, 8000, 8000), data)


def test_images_at_centres_and_repeats(lab: Any) -> None:
    section = cut(io.BytesIO(lab.make()), 1.0, 3.0, True)
    got = decode(section.data, section.start_s, section.end_s, n_images=4, timestamps="centres", sounds=())
    assert got.sounds == {}
    assert got.heard is None
    assert got.image_times_s == pytest.approx([0.25, 0.75, 1.25, 1.75])
    assert [lab.read_number(i) for i in got.images] == [31, 43, 56, 68]
    assert got.shown_from_s == pytest.approx([0.24, 0.72, 1.24, 1.72])
    dense = decode(section.data, section.start_s, section.start_s + 0.08, n_images=5, sounds=())
    assert [lab.read_number(i) for i in dense.images] == [25, 25, 26, 26, 26]


def test_any_order_of_groups_gives_the_pictures_of_a_full_decode(lab: Any) -> None:
    for options in ({"gop": 7, "b_frames": 3}, {"gop": 250, "b_frames": 2}):
        data = lab.make(**options)
        section = cut(io.BytesIO(data), 0.0, 6.0, True)
        for n in (1, 2, 3, 9, 40):
            got = decode(section.data, section.start_s, section.end_s, n_images=n, timestamps="centres", sounds=())
            assert [lab.read_number(i) for i in got.images] == [int(t * 25 + 1e-6) for t in got.image_times_s]


def test_missing_parts_are_refused(lab: Any) -> None:
    sound = cut(io.BytesIO(lab.make(vcodec=None)), 1.0, 3.0, False)
    with pytest.raises(ClipError) as e:
        decode(sound.data, sound.start_s, sound.end_s, n_images=4, sounds=())
    assert e.value.reason == "qc.no_video"
    assert (
        decode(sound.data, sound.start_s, None, n_images=0, sounds=[("all", 44100)]).sounds["all", 44100].shape[1]
        > 88200
    )
    pictures = lab.make(acodec=None)
    with pytest.raises(ClipError) as e:
        decode(pictures, 1.0, 3.0, n_images=0, sounds=[("all", 16000)])
    assert e.value.reason == "qc.no_audio"
    assert len(decode(pictures, 1.0, 3.0, n_images=2, sounds=()).images) == 2
    with pytest.raises(ClipError) as e:
        decode(pictures, 7.0, 9.0, n_images=2, sounds=())
    assert e.value.reason == "qc.no_video"
    with pytest.raises(ClipError) as e:
        decode(sound.data, 50.0, 60.0, n_images=0, sounds=[("all", 16000)])
    assert e.value.reason == "qc.past_end"


def test_a_recording_that_ends_early_is_not_padded(lab: Any) -> None:
    section = cut(io.BytesIO(lab.make(rate=16000, channels=1)), 3.1, 6.05, True)
    audio = decode(section.data, section.start_s, section.end_s, n_images=0, sounds=[("all", 16000)]).sounds[
        "all", 16000
    ]
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
    got = decode(buffer.getvalue(), 0.0, 6.0, n_images=0, sounds=[("all", 16000)]).sounds["all", 16000][0]
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
        got = decode(buffer.getvalue(), 0.0, 1.0, n_images=0, sounds=[("all", 8000)]).sounds["all", 8000]
        assert np.abs(got - wave).max() < (0.01 if kind == "u8" else 1e-6)


def test_mixes_are_made_before_resampling(lab: Any) -> None:
    section = cut(io.BytesIO(lab.make()), 1.0, 3.0, False)
    wanted = [("first", 16000), ("mean", 16000), ("mean", None), ("first", None), ("all", None), ("mean", 32000)]
    got = decode(section.data, section.start_s, section.end_s, n_images=0, sounds=wanted).sounds
    assert list(got) == wanted
    left, right = got["all", None]
    assert np.array_equal(got["first", None], left)
    assert got["mean", None] == pytest.approx((left + right) / 2, abs=1e-7)
    for mix, rate in (("first", 16000), ("mean", 16000), ("mean", 32000)):
        assert got[mix, rate].shape == (2 * rate,)
        assert np.array_equal(got[mix, rate], soxr.resample(got[mix, None], 44100, rate, quality="VHQ"))
    assert not np.array_equal(got["first", 16000], got["mean", 16000])


@pytest.mark.parametrize(("channels", "layout"), [(1, "mono"), (2, "stereo"), (6, "5.1")])
def test_equal_channels_are_resampled_once(
    lab: Any, monkeypatch: pytest.MonkeyPatch, channels: int, layout: str
) -> None:
    wave = np.round(lab.sound(1.0, 44100, 1) * 32767).astype(np.int16)
    data = _wav(np.repeat(wave, channels, axis=0), 44100, layout)
    calls = []
    resampled = soxr.resample

    def counted(*args: Any, **how: Any) -> Any:
        calls.append(args)
        return resampled(*args, **how)

    monkeypatch.setattr(soxr, "resample", counted)
    got = decode(data, 0.0, 1.0, n_images=0, sounds=[("first", 16000), ("mean", 16000), ("mean", None)])
    assert len(calls) == 1
    assert np.array_equal(got.sounds["first", 16000], got.sounds["mean", 16000])
    assert np.array_equal(got.sounds["mean", None], (wave[0] / 32768).astype(np.float32))
    assert got.heard is not None
    assert got.heard.n_channels == channels


def test_what_is_heard_and_seen_is_told(lab: Any) -> None:
    both = lab.make(seconds=4.0, video_seconds=3.0)
    got = decode(both, 1.0, 3.5, n_images=2, sounds=[("first", 16000)])
    assert got.heard is not None
    assert (got.heard.sample_rate_hz, got.heard.n_channels) == (44100, 2)
    assert got.heard.decoded_s == pytest.approx(2.5)
    assert got.heard.peak_dbfs == pytest.approx(20 * np.log10(0.4), abs=0.5)
    assert got.heard.clipped_share == 0
    assert got.pictures_end_s == pytest.approx(2.0)  # the pictures end at 3 s, the clip begins at 1 s
    assert decode(both, 1.0, 2.5, n_images=1, sounds=()).pictures_end_s == pytest.approx(1.5)  # at most the clip
    assert decode(both, 1.0, 2.5, n_images=0, sounds=ALL).pictures_end_s is None
    late = decode(both, 3.9, 9.0, n_images=0, sounds=ALL).heard
    assert late is not None
    assert 0.1 <= late.decoded_s < 0.13
    webm = lab.make("webm", vcodec="libvpx-vp9", acodec="libopus", rate=48000, seconds=3.0, video_seconds=2.0)
    assert decode(webm, 0.5, 2.8, n_images=1, sounds=()).pictures_end_s == pytest.approx(1.5, abs=0.002)


def test_clipped_samples_are_counted_in_any_channel() -> None:
    wave = np.full((2, 8000), 1000, np.int16)
    wave[0, 100:140] = 32767
    wave[1, 130:150] = -32768
    wave[1, 7000:] = 32700  # loud, not clipped
    heard = decode(_wav(wave), 0.0, 1.0, n_images=0, sounds=ALL).heard
    assert heard is not None
    assert heard.clipped_share == pytest.approx(50 / 8000)
    assert heard.peak_dbfs == 0
    silent = decode(_wav(np.zeros((2, 800), np.int16)), 0.0, 0.1, n_images=0, sounds=ALL).heard
    assert silent is not None
    assert (silent.peak_dbfs, silent.clipped_share) == (float("-inf"), 0)


CODECS = ["aac", "ac3", "alac", "flac", "libmp3lame", "libopus", "mp2", "pcm_s16le"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_part_is_what_decoding_everything_gives(lab: Any, codec: str, container: str) -> None:
    """To the bit, though a decoder that forgets is fed no more than the second before the clip."""
    if (codec, container) == ("pcm_s16le", "mp4"):
        container = "mov"
    rate = 48000 if codec == "libopus" else 44100
    data = lab.make(container, vcodec=None, acodec=codec, rate=rate, seconds=6.0)
    with av.open(io.BytesIO(data)) as whole:
        frames = list(whole.decode(audio=0))
        begins = float(frames[0].pts * frames[0].time_base)
    channels = 2
    blocks = [f.to_ndarray() if f.format.is_planar else f.to_ndarray().reshape(-1, channels).T for f in frames]
    everything = np.concatenate(blocks, axis=1)
    if everything.dtype.kind == "i":
        everything = (everything / 2.0 ** (8 * everything.itemsize - 1)).astype(np.float32)
    for start_s, end_s in ((0.0, 1.0), (0.5, 2.0), (3.3, 4.7), (4.2, 5.95)):
        got = decode(data, start_s, end_s, n_images=0, sounds=ALL).sounds["all", None]
        assert got.shape[1] == round((end_s - start_s) * rate)
        near = round((start_s - begins) * rate)
        slack = range(-50, 51) if container == "matroska" else range(1)  # milliseconds there, samples here
        got, near = got[:, 100:], near + 100  # a clock in milliseconds may leave the first samples to silence
        assert any(np.array_equal(got, everything[:, near + d :][:, : got.shape[1]]) for d in slack), (start_s, end_s)


def _spoiled(until_s: float, from_s: float, kind: str) -> Callable[[Any], Any]:
    """Packets of the kind that end before `until_s`, or begin after `from_s`, are rubbish."""

    def change(packet: Any) -> Any:
        begin, end = packet.pts * packet.time_base, (packet.pts + packet.duration) * packet.time_base
        if packet.stream.type != kind or (end > until_s and begin < from_s):
            return packet
        copy: Any = av.Packet(bytes(range(256)) * (packet.size // 256 + 1))
        copy.time_base, copy.pts, copy.dts, copy.duration = packet.time_base, packet.pts, packet.dts, packet.duration
        copy.is_keyframe, copy.stream = packet.is_keyframe, packet.stream
        return copy

    return change


def test_only_what_the_clip_needs_is_decoded(lab: Any) -> None:
    """Rubbish costs nothing before the second ahead of a clip, behind it, and in groups without a wanted image."""
    good = lab.make(acodec="flac", gop=25, seconds=8.0)
    with av.open(io.BytesIO(good)) as source:
        keys = [float(p.pts * p.time_base) for p in source.demux(video=0) if p.size and p.is_keyframe]
    lead_s = max(k for k in keys if k <= 4.1)
    clean = decode(good, 4.1, 5.9, n_images=2, sounds=ALL)
    for kind, until_s, from_s in (("audio", 3.0, 6.3), ("video", lead_s, 6.2)):
        spoiled = _copied(good, "mp4", _spoiled(until_s, from_s, kind))
        got = decode(spoiled, 4.1, 5.9, n_images=2, sounds=ALL)
        assert np.array_equal(got.sounds["all", None], clean.sounds["all", None])
        assert all(np.array_equal(a, b) for a, b in zip(got.images, clean.images, strict=True))
    # the last image's group is not decoded past that image
    last_s = max(k for k in keys if k <= 6) + 0.2
    spoiled = _copied(good, "mp4", _spoiled(0.0, last_s + 0.3, "video"))
    assert lab.read_number(decode(spoiled, 0.0, last_s + 0.04, n_images=2, sounds=()).images[1]) == round(last_s * 25)
    with pytest.raises(ClipError):  # the rubbish is real
        decode(spoiled, 0.0, last_s + 1.0, n_images=2, sounds=())


def test_reading_ends_with_the_clip(lab: Any) -> None:
    """What lies behind the clip may be damaged or missing; pictures out of order are waited for."""
    for options in ({"gop": 40, "b_frames": 3}, {"container": "matroska", "gop": 250, "b_frames": 3}):
        data = lab.make(seconds=9.0, channels=1, options=None if "container" in options else _FRAGMENTS, **options)
        whole = decode(data, 1.0, 3.0, n_images=4, sounds=ALL)
        broken = data[: int(0.55 * len(data))]
        got = decode(broken, 1.0, 3.0, n_images=4, sounds=ALL)
        assert np.array_equal(got.sounds["all", None], whole.sounds["all", None])
        assert all(np.array_equal(a, b) for a, b in zip(got.images, whole.images, strict=True))


_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


def _patched(data: bytes, box: bytes, *changes: tuple[int, str, int]) -> bytes:
    """`data` with numbers written at places counted from the end of the name `box`: (place, format, number)."""
    copy, at = bytearray(data), data.index(box) + len(box)
    for place, form, number in changes:
        struct.pack_into(form, copy, at + place, number)
    return bytes(copy)


def _vast_vp8(lab: Any, side: int) -> bytes:
    """VP8 whose keyframes, and they alone, say that they are `side` x `side`."""
    data = bytearray(lab.make("matroska", vcodec="libvpx", acodec="libopus", rate=48000, seconds=2.0))
    at = -1
    while (at := data.find(b"\x9d\x01\x2a", at + 1)) >= 0:
        struct.pack_into("<HH", data, at + 3, side, side)
    return bytes(data)


def _vast_h264(lab: Any, blocks: int) -> bytes:
    """H.264 whose parameter set says blocks * 16 pixels a side, while its container says 160 x 96."""
    data = lab.make(seconds=1.0, acodec=None)
    with av.open(io.BytesIO(data)) as source:
        head = source.streams.video[0].codec_context.extradata
    assert head is not None
    length = int.from_bytes(head[6:8], "big")
    bits = "".join(f"{b:08b}" for b in head[8 : 8 + length])
    place = 32  # behind the kind, the profile and the level

    def number() -> int:
        nonlocal place
        zeros = bits.index("1", place) - place
        place += 2 * zeros + 1
        return int(bits[place - zeros - 1 : place], 2) - 1

    for _ in range(4):  # set, chroma, depths
        number()
    place += 2  # lossless, scaling lists
    number()
    assert number() == 0
    number(), number()
    place += 1  # gaps
    before = place
    assert (number(), number()) == (9, 5)  # 160 and 96 pixels in blocks of 16, less one
    side = f"{blocks:b}".rjust(2 * blocks.bit_length() - 1, "0")
    bits = (bits[:before] + side + side + bits[place:]).rstrip("0") + "0"
    bits = bits.ljust(-(-len(bits) // 8) * 8, "0")
    changed = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return _copied(data, "mp4", extradata=head[:6] + struct.pack(">H", len(changed)) + changed + head[8 + length :])


def _jumping(lab: Any, hours: float) -> bytes:
    """Sound whose clock jumps by so many hours after two seconds."""

    def change(packet: Any) -> Any:
        if packet.pts * packet.time_base >= 2:
            later = round(Fraction(hours) * 3600 / packet.time_base)
            packet.pts, packet.dts = packet.pts + later, packet.dts + later
        return packet

    source = lab.make("matroska", vcodec=None, acodec="pcm_s16le", channels=1, rate=16000, seconds=4.0)
    return _copied(source, "matroska", change)


def _lies(lab: Any) -> dict[str, tuple[bytes, float, float | None, int, set[str]]]:
    """Files that promise more than a machine holds: data, clip, images, and the reasons that may be given for it."""
    wav = lab.make("wav", vcodec=None, acodec="pcm_s16le", seconds=2.0)
    mp4 = lab.make(vcodec=None, seconds=2.0)
    huge = (1 << 31) - 8
    beyond, damage = {"media.too_big"}, {"media.truncated", "media.not_media", "qc.past_end"}
    video = _patched(lab.make(seconds=1.0), b"stsd", (40, ">H", 60_000), (42, ">H", 60_000))
    return {
        "vast pictures": (_vast_vp8(lab, 16_000), 0.0, 2.0, 4, beyond),
        "vaster pictures": (_vast_vp8(lab, 16_383), 0.0, 2.0, 4, beyond),
        "vast pictures, small container": (_vast_h264(lab, 750), 0.0, 1.0, 4, beyond | {"media.truncated"}),
        "vast container, small pictures": (video, 0.0, 1.0, 4, beyond | {"ok"}),
        "WAV of 2 GB": (_patched(wav, b"data", (0, "<I", huge)), 0.0, None, 0, {"ok"}),
        "WAV at 1 Hz": (_patched(wav, b"fmt ", (8, "<I", 1)), 0.0, None, 0, {"media.not_media"}),
        "WAV at 0 Hz": (_patched(wav, b"fmt ", (8, "<I", 0)), 0.0, 10.0, 0, damage),
        "WAV at 1 MHz": (_patched(wav, b"fmt ", (8, "<I", 1_000_000)), 0.0, 10.0, 0, beyond),
        "WAV at 4 GHz": (_patched(wav, b"fmt ", (8, "<I", 4_000_000_000)), 0.0, 10.0, 0, beyond | damage),
        "WAV of 40 channels": (_patched(wav, b"fmt ", (6, "<H", 40)), 0.0, 10.0, 0, beyond),
        "WAV of 65535 channels": (_patched(wav, b"fmt ", (6, "<H", 65_535)), 0.0, 10.0, 0, beyond | {"qc.no_audio"}),
        "MP4 with a packet of 2 GB": (_patched(mp4, b"stsz", (12, ">I", huge)), 0.0, None, 0, damage),
        "MP4 with 100 M packets": (
            _patched(_patched(mp4, b"stsz", (4, ">I", 8), (8, ">I", 10**8)), b"stsc", (12, ">I", 10**8)),
            0.0, None, 0, damage,
        ),
        "MP4 with a packet of hours": (_patched(mp4, b"stts", (12, ">I", huge)), 0.0, None, 0, damage),
        "five hours of silence": (_jumping(lab, 5), 0.0, None, 0, {"media.not_media"}),
        "five hours of silence in a clip of ten": (_jumping(lab, 5), 0.0, 36_000.0, 0, {"media.not_media"}),
        "a jump behind the clip": (_jumping(lab, 5), 0.0, 1.5, 0, {"ok"}),
        "sound that begins at noon": (_jumping(lab, 12), 36_000.0, None, 0, {"media.not_media"}),
    }  # fmt: skip


_WATCH = """
import json, resource, sys
from pathlib import Path
from harken.errors import ClipError
from harken.media.decode import decode

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

before, found = peak(), {}
for name, path, start_s, end_s, n_images in json.loads(sys.argv[1]):
    try:
        sounds = [] if n_images else [("first", 16000)]
        decode(Path(path).read_bytes(), start_s, end_s, n_images=n_images, sounds=sounds)
        reason = "ok"
    except ClipError as e:
        reason = e.reason
    found[name] = reason, peak() - before
print(json.dumps(found))
"""


def _watched(folder: Path, jobs: dict[str, tuple[bytes, float, float | None, int]]) -> dict[str, tuple[str, int]]:
    """For each job its reason (or ok), and the MiB by which the peak of a process that did those so far has grown."""
    rows = []
    for i, (name, (data, *clip)) in enumerate(jobs.items()):
        (folder / str(i)).write_bytes(data)
        rows.append([name, str(folder / str(i)), *clip])
    done = subprocess.run([sys.executable, "-c", _WATCH, json.dumps(rows)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: (reason, grown) for name, (reason, grown) in json.loads(done.stdout).items()}


def test_a_lying_file_costs_a_reason_not_the_memory(lab: Any, tmp_path: Path) -> None:
    lies = _lies(lab)
    found = _watched(tmp_path, {name: lie[:4] for name, lie in lies.items()})
    for name, (*_, reasons) in lies.items():
        assert found[name][0] in reasons, (name, found[name])
        assert found[name][1] < 150, (name, found)


def test_memory_follows_the_clip_not_the_file(lab: Any, tmp_path: Path) -> None:
    """Ten minutes of stereo are 212 MB of samples; ten seconds near their end are 4."""
    jobs: dict[str, tuple[bytes, float, float | None, int]] = {}
    for codec in ("flac", "aac"):  # skipped undecoded; decoded from the beginning
        long = _copied(lab.make("matroska", vcodec=None, acodec=codec, seconds=10.0), "matroska", times=60)
        jobs[codec] = (long, 580.0, 590.0, 0)
    size = sum(len(job[0]) for job in jobs.values()) >> 20
    found = _watched(tmp_path, jobs)
    assert all(reason == "ok" and grown < size + 60 for reason, grown in found.values()), found


def test_more_samples_than_a_clip_may_hold_are_refused(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = lab.make(vcodec=None, seconds=3.0)
    monkeypatch.setattr(decoding, "MAX_SAMPLES", 2 * 44100 + 2 * 44100 // 2)
    assert decode(data, 0.5, 1.5, n_images=0, sounds=ALL).sounds["all", None].shape == (2, 44100)
    assert _refusal(data, 0.5, 2.5) == "media.too_big"
    assert _refusal(data, 0.0, None) == "media.too_big"


def test_the_largest_picture_that_is_read_is_eight_k() -> None:
    assert 7680 * 4320 <= MAX_PIXELS < 2 * 7680 * 4320
