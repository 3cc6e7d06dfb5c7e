from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest

from harken.errors import ClipError
from harken.media.containers import is_cut_off
from harken.media.decode import decode
from harken.media.range_reader import RangeReader
from harken.media.section import Section, cut

CLIPS = [(0.0, 6.0), (0.0, 3.0), (1.0, 4.0), (1.04, 1.9), (2.5, 6.0), (3.333, 5.1)]


def _cut(data: bytes, start_s: float, end_s: float | None, needs_images: bool = True, **how: Any) -> Section:
    return cut(io.BytesIO(data), start_s, end_s, needs_images, **how)


def _reason(data: bytes, start_s: float = 1.0, end_s: float | None = 4.0, needs_images: bool = True, **how: Any) -> str:
    with pytest.raises(ClipError) as e:
        _cut(data, start_s, end_s, needs_images, **how)
    return e.value.reason


def _lag(found: np.ndarray, truth: np.ndarray) -> int:
    """By how many samples `found` is late."""
    n = min(found.size, truth.size)
    a, b = found[:n], truth[:n]
    size = 1 << (2 * n - 1).bit_length()
    scores = np.fft.irfft(np.fft.rfft(a, size) * np.conj(np.fft.rfft(b, size)))
    best = int(scores.argmax())
    return best if best < size // 2 else best - size


def _all_pictures(data: bytes) -> tuple[list[float], list[np.ndarray]]:
    """Every picture of a file and the time at which it appears, decoded in one go."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        zero = stream.start_time * stream.time_base
        frames = [(float(f.pts * f.time_base - zero), f.to_ndarray(format="rgb24")) for f in container.decode(stream)]
    return [t for t, _ in frames], [p for _, p in frames]


def test_the_first_sound_of_a_recording_is_not_lost(lab: Any) -> None:
    for how in ({"container": "webm", "vcodec": "libvpx-vp9", "acodec": "libopus", "rate": 48000}, {}):
        section = cut(io.BytesIO(lab.make(**how)), 0.0, 3.0, True)
        got = decode(section.data, section.start_s, section.end_s, n_images=0, sounds=[("first", None)])
        assert got.heard is not None
        assert got.heard.decoded_s == pytest.approx(3.0, abs=1e-3), how


def test_a_clip_out_of_any_recording_is_exact(recording: tuple[str, dict[str, Any], bytes], lab: Any) -> None:
    name, how, data = recording
    rate = how.get("rate", 44100)
    shown_at, pictures = _all_pictures(data)
    fps = float(how.get("fps", 25))
    slack_s = 0.0006 if how.get("container") else 0.00004  # half a tick of the file's clock
    for start_s, end_s in CLIPS:
        section = _cut(data, start_s, end_s)
        assert section.data == _cut(data, start_s, end_s).data  # the same clip, the same bytes
        assert section.end_s - section.start_s == pytest.approx(end_s - start_s, abs=1e-9)
        assert section.has_audio
        assert section.has_video
        assert section.bytes_fetched == 0
        got = decode(section.data, section.start_s, section.end_s, n_images=4, sounds=[("all", rate), ("all", 16000)])
        # pictures: the one on screen, pixel by pixel as the whole recording decodes
        expected_s = np.minimum(np.linspace(start_s, end_s, 4), min(end_s, shown_at[-1] + 1 / fps) - 1 / fps)
        for image, time_s, at in zip(got.images, got.image_times_s, expected_s, strict=True):
            assert time_s + start_s == pytest.approx(at, abs=0.03)
            index = int(np.searchsorted(shown_at, start_s + time_s + slack_s, side="right")) - 1
            assert np.array_equal(image, pictures[index]), (name, start_s, time_s)
            assert lab.read_number(image) == index
        # sound: to the sample; WebM and Matroska write times in milliseconds
        truth = lab.sound(6.0, rate, how.get("channels", 2))[
            :, round(start_s * rate) : round(start_s * rate) + round((end_s - start_s) * rate)
        ]
        assert got.sounds["all", rate].shape[0] == truth.shape[0]
        assert truth.shape[1] - got.sounds["all", rate].shape[1] in range(rate // 50)
        for channel in range(truth.shape[0]):
            slack = 25 if how.get("container") else 0
            assert abs(_lag(got.sounds["all", rate][channel], truth[channel])) <= slack, (name, start_s, channel)


def test_sound_alone_where_no_images_are_needed(lab: Any) -> None:
    data = lab.make()
    section = _cut(data, 1.0, 4.0, needs_images=False)
    assert not section.has_video
    assert section.has_audio
    assert len(section.data) < len(_cut(data, 1.0, 4.0).data)
    with av.open(io.BytesIO(section.data)) as container:
        assert [s.type for s in container.streams] == ["audio"]
    assert decode(section.data, section.start_s, section.end_s, n_images=0, sounds=[("all", None)]).sounds[
        "all", None
    ].shape == (2, 132300)


def test_the_section_is_the_recording_s_own_packets(lab: Any) -> None:
    data = lab.make(gop=25)
    section = _cut(data, 2.1, 4.0)
    packets: dict[str, set[bytes]] = {"video": set(), "audio": set()}
    with av.open(io.BytesIO(data)) as container:
        for p in container.demux():
            packets[p.stream.type].add(bytes(p))
    with av.open(io.BytesIO(section.data)) as container:
        kept = [p for p in container.demux() if p.size]
        assert all(bytes(p) in packets[p.stream.type] for p in kept)
        videos = [p for p in kept if p.stream.type == "video"]
    shown_at = [float(p.pts * p.time_base) for p in videos if p.is_keyframe]
    assert videos[0].is_keyframe
    assert shown_at[0] <= section.start_s < shown_at[1]
    assert len(section.data) < 0.6 * len(data)


def test_apart_sound_and_pictures_give_what_they_give_together(lab: Any) -> None:
    together = lab.make()
    sound = lab.make(vcodec=None)
    pictures = lab.make(acodec=None)
    one = _cut(together, 1.5, 4.5)
    two = cut(io.BytesIO(sound), 1.5, 4.5, True, pictures=io.BytesIO(pictures))
    a = decode(one.data, one.start_s, one.end_s, n_images=4, sounds=[("all", 44100)])
    b = decode(two.data, two.start_s, two.end_s, n_images=4, sounds=[("all", 44100)])
    assert np.array_equal(a.sounds["all", 44100], b.sounds["all", 44100])
    assert all(np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    mixed = cut(
        io.BytesIO(lab.make("webm", vcodec=None, acodec="libopus", rate=48000)),
        1.5,
        4.5,
        True,
        pictures=io.BytesIO(pictures),
    )
    c = decode(mixed.data, mixed.start_s, mixed.end_s, n_images=4, sounds=[("all", 48000)])
    assert [lab.read_number(i) for i in c.images] == [lab.read_number(i) for i in a.images]
    assert abs(_lag(c.sounds["all", 48000][0], lab.sound(6, 48000)[0, 72000 : 72000 + 144000])) <= 1
    assert _reason(sound, 1.5, 4.5, pictures=io.BytesIO(sound)) == "qc.no_video"


@pytest.mark.parametrize(("container", "codec"), [("wav", "pcm_s16le"), ("flac", "flac")])
def test_whole_recordings_keep_their_bytes(lab: Any, container: str, codec: str) -> None:
    data = lab.make(container, vcodec=None, acodec=codec, channels=1)
    section = _cut(data, 0.0, None, needs_images=False)
    assert section.data == data
    assert section.container == container
    assert (section.start_s, section.end_s) == (0.0, pytest.approx(6.0))
    truth = np.round(lab.sound(6.0, 44100, 1) * 32767).astype(np.int16)
    got = decode(section.data, section.start_s, section.end_s, n_images=0, sounds=[("all", 44100)]).sounds["all", 44100]
    assert np.array_equal(got, (truth / 32768).astype(np.float32))
    part = _cut(data, 1.2345, 3.5, needs_images=False)
    lo = round(1.2345 * 44100)
    got = decode(part.data, part.start_s, part.end_s, n_images=0, sounds=[("all", 44100)]).sounds["all", 44100]
    assert np.array_equal(got, (truth / 32768).astype(np.float32)[:, lo : lo + round((3.5 - 1.2345) * 44100)])


def test_a_whole_recording_ends_where_its_sound_ends(lab: Any) -> None:
    section = _cut(lab.make(vcodec=None), 0.0, None, needs_images=False)
    assert section.end_s - section.start_s == pytest.approx(6.0, abs=1e-6)  # without the encoder's padding


def test_a_hidden_lead_in_is_not_the_clip(lab: Any) -> None:
    """An edit list hides the start (what `-c copy` leaves): time counts from the first visible picture."""
    source = lab.make(gop=25)
    buffer = io.BytesIO()
    with av.open(io.BytesIO(source)) as src, av.open(buffer, "w", format="mp4") as out:
        copies = {s.index: out.add_stream_from_template(s) for s in src.streams}
        src.seek(2_000_000, backward=True)
        rows = []
        for p in src.demux():
            if p.size:
                shift = round(Fraction(25, 10) / p.time_base)  # 2.5 s becomes 0
                p.pts, p.dts = p.pts - shift, p.dts - shift
                rows.append(p)
        for p in rows:
            p.stream = copies[p.stream.index]
            out.mux(p)
    section = _cut(buffer.getvalue(), 0.5, 2.5)
    got = decode(section.data, section.start_s, section.end_s, n_images=4, sounds=[("all", 44100)])
    assert lab.read_number(got.images[0]) == 75
    assert abs(_lag(got.sounds["all", 44100][0], lab.sound(6, 44100)[0, 3 * 44100 : 5 * 44100])) <= 1


def test_refusals(lab: Any) -> None:
    good = lab.make()
    assert _reason(b"") == "media.empty"
    assert _reason(b"<!DOCTYPE html><html></html>") == "media.not_media"
    assert _reason(b'{"error": "no"}') == "media.not_media"
    assert _reason(b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n") == "media.not_media"
    assert _reason(b"ffconcat version 1.0\nfile /etc/hostname\n") == "media.not_media"
    assert _reason(bytes(range(256)) * 40) == "media.not_media"
    assert _reason(lab.make(acodec=None)) == "qc.no_audio"
    assert _reason(lab.make(vcodec=None)) == "qc.no_video"
    assert _reason(good, 6.0, 9.0) == "qc.past_end"
    assert _reason(good, 5.6, 9.0) == "qc.past_end"
    assert _reason(good, 60.0, 70.0) == "qc.past_end"
    assert _reason(good, 4.0, 7.0) == "qc.short"
    assert _reason(lab.make(gain=0.0)) == "qc.silent"
    assert _reason(lab.make(gain=1e-3), silence_dbfs=-50.0) == "qc.silent"
    assert _cut(lab.make(gain=2e-2), 1.0, 4.0, silence_dbfs=-50.0).peak_dbfs == pytest.approx(-42, abs=1)
    assert _reason(lab.make(video_seconds=2.0)) == "qc.short"
    assert _reason(lab.make(video_seconds=0.5), 1.0) == "qc.no_video"
    assert _reason(lab.make(audio_seconds=2.0)) == "qc.short"


def test_a_clip_nearly_to_the_end_is_whole(lab: Any) -> None:
    section = _cut(lab.make(), 3.1, 6.02)
    assert 2.85 < section.decoded_s < 2.92
    got = decode(section.data, section.start_s, section.end_s, n_images=4, sounds=[("all", 44100)])
    assert [lab.read_number(i) for i in got.images] == [77, 101, 126, 149]


@pytest.mark.parametrize("kind", ["mp4", "faststart", "vp9_opus_webm", "wav", "flac"])
def test_truncated_files_are_told_from_short_ones(lab: Any, kind: str) -> None:
    if kind in ("wav", "flac"):
        data = lab.make(kind, vcodec=None, acodec={"wav": "pcm_s16le", "flac": "flac"}[kind])
    elif kind == "vp9_opus_webm":
        data = lab.make("webm", vcodec="libvpx-vp9", acodec="libopus", rate=48000)
    else:
        data = lab.make(options={"movflags": "faststart"} if kind == "faststart" else {})
    images = kind not in ("wav", "flac")
    for share in (0.02, 0.3, 0.6):
        cut_off = data[: int(len(data) * share)]
        assert _reason(cut_off, 2.0, 5.0, images) == "media.truncated", share
        if not images:
            assert _reason(cut_off, 0.0, None, False) == "media.truncated", share
            assert _reason(data[: int(len(data) * 0.97)], 0.0, None, False) == "media.truncated"
    if kind == "faststart":  # what is there is whole, and a clip that lies in it is good
        assert _cut(data[: int(len(data) * 0.7)], 0.5, 2.5).decoded_s == pytest.approx(2.0)
    assert not is_cut_off(io.BytesIO(data))


def test_over_the_network_it_reads_little_and_gets_the_same_bytes(lab: Any, server: Any) -> None:
    rng_heavy = lab.make(seconds=40.0, size=(320, 200), gop=50, channels=1)
    server.files["a.mp4"] = rng_heavy
    with RangeReader(server.url("a.mp4"), timeout_s=2, block_bytes=16384) as reader:
        remote = cut(reader, 20.0, 23.0, True)
    assert remote.data == _cut(rng_heavy, 20.0, 23.0).data
    assert 0 < remote.bytes_fetched < 0.5 * len(rng_heavy)


@pytest.mark.parametrize(
    ("fault", "reason"), [("cut", "media.truncated"), ("stall", "net.timeout"), ("reset", "net.reset")]
)
def test_a_failing_network_is_never_a_short_clip(lab: Any, server: Any, fault: str, reason: str) -> None:
    server.files["a.mp4"] = lab.make(seconds=20.0, gop=50, channels=1, options={"movflags": "faststart"}) + bytes(
        300_000
    )
    server.faults["a.mp4"] = fault
    with RangeReader(server.url("a.mp4"), timeout_s=0.3, block_bytes=65536) as reader, pytest.raises(ClipError) as e:
        cut(reader, 14.0, 19.0, True)
    assert e.value.reason == reason


def test_damage_ends_in_a_reason(lab: Any) -> None:
    """Flipped, missing and cut bytes: a clip comes out or a ClipError, nothing else."""
    rng = np.random.default_rng(1)
    sources = [(lab.make(), True), (lab.make("webm", vcodec="libvpx-vp9", acodec="libopus", rate=48000), True)]
    sources.append((lab.make("flac", vcodec=None, acodec="flac"), False))
    reasons = set()
    for i in range(60):
        data, images = sources[i % 3]
        damaged = bytearray(data)
        at = int(rng.integers(len(data)))
        if i % 4 == 0:
            del damaged[at:]
        elif i % 4 == 1:
            del damaged[at : at + int(rng.integers(5000))]
        else:
            for _ in range(30):
                damaged[int(rng.integers(len(data)))] = int(rng.integers(256))
        try:
            section = _cut(bytes(damaged), 1.0, 4.0, images)
            decode(section.data, section.start_s, section.end_s, n_images=4 * images, sounds=[("all", 16000)])
            reasons.add("ok")
        except ClipError as e:
            reasons.add(e.reason)
    assert {"ok", "media.truncated"} <= reasons
