"""Recordings that carry their own time: every picture shows its number, and a click sounds at every second.

What a clip's images show and when its clicks sound is then known without any clock of a container: images must be the
very pictures on screen at their times, and clicks must lie within one sample of their seconds.
"""

from __future__ import annotations

import io
import itertools
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from harken.media.containers import open_media, origin
from harken.media.decode import Decoded, decode
from harken.media.section import cut

N_BITS, SIZE, SECONDS = 8, (64, 32), 5
CLIPS = [(1.37, 3.9), (0.54, 2.6)]  # neither begins at a keyframe
TICK = Fraction(1, 90_000)
FRAGMENTS = {
    "fragmented": "frag_keyframe+delay_moov+default_base_moof",
    "bare": "frag_keyframe+empty_moov+default_base_moof",  # without an edit list: pictures and sound begin late
}
VARIABLE = (3000, 1500, 6000, 2250, 9000, 3754, 13_000)  # how long pictures are shown, in ticks, in turn


@dataclass(frozen=True)
class Film:
    """How a recording is made. `rate`: pictures a second, or None for pictures that last as long as VARIABLE says."""

    container: str
    rate: Fraction | None
    b_frames: int
    sound: str = "aac"
    sound_rate_hz: int = 44_100

    @property
    def shown_at(self) -> list[int]:
        """When each picture appears, in ticks."""
        if self.rate is not None:
            return [round(i / self.rate / TICK) for i in range(int(SECONDS * self.rate))]
        times = [0, *itertools.accumulate(itertools.islice(itertools.cycle(VARIABLE), 250))]
        return [t for t in times if t * TICK < SECONDS]


def click(rate_hz: int) -> np.ndarray:
    """8 ms that rise from 300 to 6000 Hz: a coder may smear it, its place can still be told."""
    t = np.arange(-round(0.004 * rate_hz), round(0.004 * rate_hz) + 1) / rate_hz
    return 0.6 * np.hanning(t.size) * np.cos(2 * np.pi * (3150 * t + 5700 / 0.016 * t**2))


def clicks(rate_hz: int) -> np.ndarray:
    """(channel, time): a click around every whole second, louder on the left."""
    one, track = click(rate_hz), np.zeros(SECONDS * rate_hz)
    for second in range(1, SECONDS):
        track[second * rate_hz - one.size // 2 :][: one.size] += one
    return np.stack([track, 0.5 * track]).astype(np.float32)


def painted(number: int) -> np.ndarray:
    """The number as bars: bit b is the b-th column of eight pixels, black or white."""
    bits = np.array([number >> b & 1 for b in range(N_BITS)], np.uint8)
    row = np.repeat(30 + 200 * bits, SIZE[0] // N_BITS)
    return np.repeat(np.tile(row, (SIZE[1], 1))[..., None], 3, axis=2)


def number_in(image: np.ndarray) -> int:
    step = SIZE[0] // N_BITS
    middles = image[SIZE[1] // 2 - 2 : SIZE[1] // 2 + 2, step // 2 :: step].mean(axis=(0, 2))
    return sum(int(level > 130) << b for b, level in enumerate(middles))


@cache
def shot(film: Film) -> bytes:
    """The recording, as real encoders make it."""
    form = {"fragmented": "mp4", "bare": "mp4", "mkv": "matroska"}.get(film.container, film.container)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film"
        options = {"movflags": FRAGMENTS[film.container]} if film.container in FRAGMENTS else {}
        with av.open(str(path), "w", format=form, options=options) as out:
            video: Any = out.add_stream("libvpx-vp9" if form == "webm" else "libx264", rate=film.rate or 25)
            video.width, video.height, video.pix_fmt, video.gop_size = *SIZE, "yuv420p", 30
            video.codec_context.time_base, video.codec_context.thread_count = TICK, 1
            video.options = (
                {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}
                if form == "webm"
                else {"preset": "ultrafast", "bf": str(film.b_frames), "b-pyramid": "normal", "crf": "18"}
            )
            audio: Any = out.add_stream(film.sound, rate=film.sound_rate_hz)
            audio.layout = "stereo"
            pictures = [(float(at * TICK), _picture(i, at)) for i, at in enumerate(film.shown_at)]
            for _, frame in sorted(pictures + _chunks(film), key=lambda row: row[0]):
                stream = video if isinstance(frame, av.VideoFrame) else audio
                out.mux(stream.encode(frame))
            out.mux(video.encode(None))
            out.mux(audio.encode(None))
        return path.read_bytes()


def _picture(number: int, at: int) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(painted(number), format="rgb24")
    frame.pts, frame.time_base = at, TICK
    return frame


def _chunks(film: Film) -> list[tuple[float, Any]]:
    track, step, rows = clicks(film.sound_rate_hz), film.sound_rate_hz // 10, []
    for at in range(0, track.shape[1], step):
        planar = np.ascontiguousarray(track[:, at : at + step])
        if film.sound == "flac":
            packed = np.round(planar.T * 32767).astype(np.int16).reshape(1, -1)
            chunk = av.AudioFrame.from_ndarray(packed, format="s16", layout="stereo")
        else:
            chunk = av.AudioFrame.from_ndarray(planar, format="fltp", layout="stereo")
        chunk.sample_rate, chunk.pts, chunk.time_base = film.sound_rate_hz, at, Fraction(1, film.sound_rate_hz)
        rows.append((at / film.sound_rate_hz, chunk))
    return rows


def trimmed(recording: bytes, seconds: Fraction) -> bytes:
    """The recording without its first `seconds`, its packets copied: an edit list hides what came before (MP4)."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(recording)) as source, av.open(buffer, "w", format="mp4") as out:
        copies = {s.index: out.add_stream_from_template(s) for s in source.streams}
        packets = [p for p in source.demux() if p.size]
        for packet in packets:
            shift = round(seconds / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = copies[packet.stream.index]
            out.mux(packet)
    return buffer.getvalue()


def check_images(got: Decoded, film: Film, start_s: float, end_s: float) -> None:
    """Each image is the picture on screen at its time, and the times are those of the grid."""
    shown_at_s = np.array(film.shown_at) * float(TICK)
    grid_s = np.linspace(0, end_s - start_s, 4)
    rounding_s = 0.00051 if film.container in ("mkv", "webm") else 0.00001  # half a tick of the file's clock
    assert got.image_times_s[:-1] == pytest.approx(grid_s[:-1], abs=1e-6)
    longest_s = float(np.diff(shown_at_s).max())
    assert grid_s[-1] - longest_s - rounding_s <= got.image_times_s[-1] < grid_s[-1]
    for image, time_s, from_s in zip(got.images, got.image_times_s, got.shown_from_s, strict=True):
        number = number_in(image)
        around = (start_s + time_s - rounding_s, start_s + time_s + rounding_s)
        allowed = np.searchsorted(shown_at_s, around, side="right") - 1
        assert number in allowed, (film, start_s, time_s)
        assert start_s + from_s == pytest.approx(shown_at_s[number], abs=rounding_s)
    assert got.pictures_end_s == pytest.approx(end_s - start_s, abs=1e-6)


def check_clicks(got: Decoded, film: Film, start_s: float, end_s: float) -> None:
    """Every click of the clip lies within one sample of its second, in each channel and in their mean."""
    rate = film.sound_rate_hz
    one, reach = click(rate), rate // 50
    left, right = got.sounds["all", None]
    for channel in (left, right, got.sounds["first", None], got.sounds["mean", None]):
        for second in range(int(start_s) + 1, int(end_s) + 1):
            expected = (second - start_s) * rate
            lo = round(expected) - one.size // 2 - reach
            likeness = np.correlate(channel[lo : lo + one.size + 2 * reach], one)
            top = int(likeness.argmax())
            before, peak, after = likeness[top - 1 : top + 2]
            place = round(expected) - reach + top + 0.5 * (before - after) / (before - 2 * peak + after)
            assert abs(place - expected) < 1.01, (film, start_s, second, place - expected)


def check(film: Film, recording: bytes, hidden_s: Fraction = Fraction(0)) -> None:
    """Clips of the recording, straight from the file and by way of the section that a download stores."""
    sounds = [("all", None), ("first", None), ("mean", None)]
    with open_media(io.BytesIO(recording)) as container:
        zero_s = float(origin(container))
    for start_s, end_s in CLIPS:
        begin, end = start_s - float(hidden_s), end_s - float(hidden_s)
        if begin < 0:
            continue
        section = cut(io.BytesIO(recording), begin, end, True)
        for got in (
            decode(recording, zero_s + begin, zero_s + end, n_images=4, sounds=sounds),
            decode(section.data, section.start_s, section.end_s, n_images=4, sounds=sounds),
        ):
            assert got.heard is not None
            assert got.heard.decoded_s == pytest.approx(end_s - start_s, abs=1 / film.sound_rate_hz)
            check_images(got, film, start_s, end_s)
            check_clicks(got, film, start_s, end_s)


RATES = {"15": Fraction(15), "25": Fraction(25), "29.97": Fraction(30_000, 1001), "variable": None}
SOUNDS = {
    "15": ("aac", 44_100),
    "25": ("libopus", 48_000),
    "29.97": ("libmp3lame", 44_100),
    "variable": ("flac", 44_100),
}
FILMS = {}
for _container, (_name, _rate), _b in itertools.product(("mp4", "fragmented", "mkv", "webm"), RATES.items(), (0, 3)):
    if _container == "webm" and _b:
        continue  # VP9 has no such pictures
    _sound = {"webm": ("libopus", 48_000), "mkv": SOUNDS[_name]}.get(_container, ("aac", 44_100))
    FILMS[f"{_container}-{_name}-{_b}"] = Film(_container, _rate, _b, *_sound)
FILMS["bare-25-3"] = Film("bare", RATES["25"], 3)
# by default every container with every rate, and each way of ordering pictures with every container
QUICK = [
    name for name in FILMS if name.startswith("webm") or name[-1] == ("3" if "25" in name or "var" in name else "0")
]


@pytest.mark.parametrize("name", QUICK)
def test_images_and_sound_are_where_they_say(name: str) -> None:
    check(FILMS[name], shot(FILMS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILMS if name not in QUICK])
def test_images_and_sound_are_where_they_say_in_all_combinations(name: str) -> None:
    check(FILMS[name], shot(FILMS[name]))


@pytest.mark.parametrize("name", ["mp4-25-3", "mp4-29.97-3", "mp4-variable-3"])
def test_what_an_edit_list_hides_is_not_the_clip(name: str) -> None:
    film = FILMS[name]
    hidden_s = film.shown_at[7] * TICK
    check(film, trimmed(shot(film), hidden_s), hidden_s)
