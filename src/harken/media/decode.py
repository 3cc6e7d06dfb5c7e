"""A stored section of a recording -> sound, exact to the sample, and images, exact to the frame.

One open and one demux pass. Only the groups of pictures that hold a wanted image are decoded, and in them the pictures
that nothing refers to are skipped: 0.6 of the time of the nearest exact peer at a keyframe every 250 pictures.
"""

from __future__ import annotations

import bisect
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import av
import av.error
import numpy as np
import soxr
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from harken.errors import ClipError
from harken.media.containers import audio_of, clock, open_media, video_of
from harken.media.images import Picture, image_times

Waveform = NDArray[np.float32]
RESAMPLER: Final = "VHQ"  # soxr quality; the choice moves FBANK values, so every rate of every clip uses this one
_GAP_S: Final = 0.02  # a jump of the audio clock that rounding to milliseconds cannot explain
_FIRST_IMAGE_SLACK_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class Decoded:
    """One clip's sound and images.

    `audio`: sample rate in Hz -> float32 (channel, time) in [-1, 1], from the clip's start; it is shorter than the clip
    where the recording ends early, and never padded at the end. `images`: uint8 (height, width, 3) each.
    `image_times_s`: the time each image was taken at, in seconds from the clip's start; `shown_from_s`: when the
    picture then on screen first appeared, on the same clock.
    """

    audio: dict[int, Waveform]
    images: list[Picture]
    image_times_s: list[float]
    shown_from_s: list[float]


@dataclass(frozen=True, slots=True)
class Sound:
    """A stretch of decoded sound: `data` float32 (channel, time) and how much of it was really in the recording."""

    sample_rate_hz: int
    data: Waveform
    n_decoded: int

    @property
    def decoded_s(self) -> float:
        """Seconds of sound that the recording holds in this stretch."""
        return self.n_decoded / self.sample_rate_hz

    @property
    def peak_dbfs(self) -> float:
        """The loudest sample of any channel, in dB below full scale; minus infinity for silence."""
        peak = float(np.abs(self.data).max()) if self.data.size else 0.0
        return 20 * float(np.log10(peak)) if peak > 0 else float("-inf")


def decode(
    section: bytes,
    start_s: float,
    end_s: float | None,
    *,
    n_images: int,
    timestamps: str = "endpoints",
    sample_rates_hz: Sequence[int],
) -> Decoded:
    """The clip from `start_s` to `end_s` of `section`, on that file's own clock (see `Section`).

    Sound is cut at the sample before it is resampled (soxr VHQ), every channel alike; no rates, no sound. Each image is
    the picture on screen at its time, the last one no later than one frame before the end; `n_images=0` leaves the
    pictures alone. `end_s=None` is the end of the sound.
    Raises ClipError: `media.*`, `qc.no_audio`, `qc.past_end` (no sound in the clip), `qc.no_video` (images are wanted
    and no picture is on screen at the clip's start).
    """
    with open_media(io.BytesIO(section)) as container:
        audio = audio_of(container) if sample_rates_hz or end_s is None else None
        video = video_of(container) if n_images else None
        if audio is None and (sample_rates_hz or end_s is None):
            raise ClipError("qc.no_audio", "the stored section has no audio stream")
        if video is None and n_images:
            raise ClipError("qc.no_video", "the stored section has no video stream")
        sounding, shown = _packets(container, [s for s in (audio, video) if s is not None])
        sound = None
        if audio is not None:
            sound = read_sound(audio, sounding, start_s, end_s)
            end_s = start_s + sound.data.shape[1] / sound.sample_rate_hz if end_s is None else end_s
        seen: tuple[list[Picture], list[float], list[float]] = [], [], []
        if video is not None:
            assert end_s is not None
            seen = _images(video, shown, start_s, end_s, n_images, timestamps)
    rates = {rate: resample(sound.data, sound.sample_rate_hz, rate) for rate in sample_rates_hz} if sound else {}
    return Decoded(rates, *seen)


def resample(data: Waveform, rate_in_hz: int, rate_out_hz: int) -> Waveform:
    """`data` (channel, time) at another rate: round(time * out / in) samples, by soxr at its highest quality."""
    if rate_in_hz == rate_out_hz:
        return np.ascontiguousarray(data)
    out = soxr.resample(np.ascontiguousarray(data.T), rate_in_hz, rate_out_hz, quality=RESAMPLER).T
    return np.ascontiguousarray(out, dtype=np.float32)


def read_sound(stream: AudioStream, packets: list[Packet[Any]], start_s: float, end_s: float | None) -> Sound:
    """The samples from `start_s` to `end_s` on the packets' clock, decoded from `packets`.

    A hole in the recording's clock is silence, as a player would have it; nothing is added behind the last sample.
    Raises ClipError: `media.truncated` where the decoder gives up, `qc.past_end` where no sample lies in the stretch.
    """
    frames = _audio_frames(stream, packets)
    if not frames:
        raise ClipError("qc.past_end", "no sound could be decoded")
    rate = frames[0].sample_rate
    channels = frames[0].layout.nb_channels
    if any(f.sample_rate != rate or f.layout.nb_channels != channels for f in frames):
        raise ClipError("media.not_media", "the sound changes its sample rate or channels on the way")
    placed = _place(frames, rate, clock(stream))
    first = round(start_s * rate)
    stop = max(at + f.samples for at, f in placed)
    last = stop if end_s is None else min(stop, first + round((end_s - start_s) * rate))
    if last <= first:
        raise ClipError("qc.past_end", f"the sound ends at {stop / rate:.3f} s, the clip starts at {start_s:.3f} s")
    data = np.zeros((channels, last - first), np.float32)
    have = np.zeros(last - first, bool)
    for at, frame in placed:
        lo, hi = max(at, first), min(at + frame.samples, last)
        if lo < hi:
            data[:, lo - first : hi - first] = _floats(frame, channels)[:, lo - at : hi - at]
            have[lo - first : hi - first] = True
    if not np.isfinite(data).all():
        raise ClipError("media.not_media", "some samples are not finite numbers")
    return Sound(rate, data, int(have.sum()))


def _packets(
    container: av.container.InputContainer, streams: list[AudioStream | VideoStream]
) -> tuple[list[Packet[Any]], ...]:
    """The audio packets, then the video packets, in the order of decoding."""
    found: dict[str, list[Packet[Any]]] = {"audio": [], "video": []}
    try:
        for packet in container.demux(*streams):
            if packet.size:
                found[packet.stream.type].append(packet)
    except av.error.FFmpegError as e:
        raise ClipError("media.truncated", f"{e.strerror} while reading packets") from e
    return found["audio"], found["video"]


def _audio_frames(stream: AudioStream, packets: list[Packet[Any]]) -> list[AudioFrame]:
    context = stream.codec_context
    context.thread_count = 1
    frames: list[AudioFrame] = []
    try:
        for packet in packets:
            frames.extend(context.decode(packet))
        frames.extend(context.decode(None))
    except av.error.FFmpegError as e:
        raise ClipError("media.truncated", f"{e.strerror} while decoding the sound") from e
    return [f for f in frames if f.samples]


def _place(frames: list[AudioFrame], rate: int, tick: Fraction) -> list[tuple[int, AudioFrame]]:
    """Each frame with the index of its first sample on the stream's clock.

    Frames that follow one another without a jump form a run, placed as one: Matroska rounds times to milliseconds, and
    the mean over the run takes most of that back. In MP4 the times are exact and the mean changes nothing.
    """
    step = float(tick) * rate  # samples to a tick; exactly 1 in most MP4 files
    runs: list[list[tuple[int, AudioFrame]]] = []  # (samples since the run's first, frame)
    offsets: list[list[float]] = []
    for frame in frames:
        at = None if frame.pts is None else frame.pts * step
        since = runs[-1][-1][0] + runs[-1][-1][1].samples if runs else 0
        if runs and (at is None or abs(at - offsets[-1][0] - since) <= _GAP_S * rate):
            runs[-1].append((since, frame))
            if at is not None:
                offsets[-1].append(at - since)
        else:
            runs.append([(0, frame)])
            offsets.append([at or 0.0])
    placed = []
    for run, seen in zip(runs, offsets, strict=True):
        first = round(math.fsum(seen) / len(seen))
        placed += [(first + since, frame) for since, frame in run]
    return placed


def _floats(frame: AudioFrame, channels: int) -> Waveform:
    """The frame's samples as float32 (channel, time) in [-1, 1]."""
    raw: NDArray[Any] = frame.to_ndarray()
    planes: NDArray[Any] = raw if frame.format.is_planar else raw.reshape(-1, channels).T
    kind, bits = planes.dtype.kind, 8 * planes.dtype.itemsize
    if kind == "u":  # WAV's 8 bits are unsigned
        planes = planes.astype(np.float64) - 2 ** (bits - 1)
    floats: Waveform = (planes if kind == "f" else planes / 2.0 ** (bits - 1)).astype(np.float32, copy=False)
    return floats


def _images(
    stream: VideoStream, packets: list[Packet[Any]], start_s: float, end_s: float, n: int, rule: str
) -> tuple[list[Picture], list[float], list[float]]:
    tick = clock(stream)
    if not packets:
        raise ClipError("qc.no_video", "the video stream has no pictures")
    shown = sorted({_pts(p) for p in packets})
    lasting = max((p.duration or 0) for p in packets[-8:])
    rate = stream.average_rate or stream.guessed_rate
    fps = float(rate) if rate else None
    finish = min(end_s, float((shown[-1] + lasting) * tick)) if lasting else end_s
    if finish <= start_s:
        raise ClipError("qc.no_video", f"the pictures end at {finish:.3f} s, the clip starts at {start_s:.3f} s")
    times = [min(t, finish - 1 / fps if fps else finish) for t in image_times(start_s, end_s, n, fps, rule)]
    wanted = []
    for time in times:
        # half a tick: a clock in milliseconds shows the picture of 6.6667 s from "6.667" on
        at = bisect.bisect_right(shown, time / tick + Fraction(1, 2)) - 1
        if at < 0 and float(shown[0] * tick) - time > _FIRST_IMAGE_SLACK_S:
            raise ClipError(
                "qc.no_video", f"no picture at {time - start_s:.3f} s; the first is {shown[0] * tick - start_s:.3f}"
            )
        wanted.append(shown[max(at, 0)])
    pictures = _decode_pictures(stream.codec_context, packets, sorted(set(wanted)))
    relative = [max(0.0, t - start_s) for t in times]
    return [pictures[p] for p in wanted], relative, [float(p * tick) - start_s for p in wanted]


def _pts(packet: Packet[Any]) -> int:
    pts = packet.pts if packet.pts is not None else packet.dts
    if pts is None:
        raise ClipError("media.not_media", "a picture has no time")
    return pts


def _decode_pictures(context: VideoCodecContext, packets: list[Packet[Any]], wanted: list[int]) -> dict[int, Picture]:
    """The pictures shown from the times `wanted` (in ticks, ascending), each decoded from its keyframe."""
    context.thread_count = 1
    keys = [(i, _pts(p)) for i, p in enumerate(packets) if p.is_keyframe]
    where = {_pts(p): i for i, p in enumerate(packets)}
    targets = set(wanted)
    found: dict[int, Picture] = {}
    at = -1  # index of the last packet fed
    drained = False

    def keep(frames: list[VideoFrame]) -> None:
        for frame in frames:
            if frame.pts in targets and frame.pts not in found:
                found[frame.pts] = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)

    try:
        for time in wanted:
            if time in found:
                continue
            # a picture that is shown before its keyframe but sent after it (an open group) needs the group before
            lead = max((i for i, pts in keys if i <= where[time] and pts <= time), default=0)
            if drained or lead > at + 1:
                context.flush_buffers()
                at, drained = lead - 1, False
            while time not in found and at + 1 < len(packets):
                at += 1
                packet = packets[at]
                context.skip_frame = "DEFAULT" if _pts(packet) in targets else "NONREF"
                keep(context.decode(packet))
            if time not in found:
                keep(context.decode(None))
                drained = True
    except av.error.FFmpegError as e:
        raise ClipError("media.truncated", f"{e.strerror} while decoding the pictures") from e
    missing = [t for t in wanted if t not in found]
    if missing:
        raise ClipError("media.truncated", f"{len(missing)} of {len(wanted)} pictures could not be decoded")
    return found
