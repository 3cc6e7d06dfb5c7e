"""A stored section of a recording -> sound, exact to the sample, and images, exact to the frame.

One open and one demux pass, which ends where the clip does. Only the groups of pictures that hold a wanted image are
decoded, and in them the pictures that nothing refers to are skipped: 0.6 of the time of the nearest exact peer at a
keyframe every 250 pictures. What a clip costs depends on the clip, not on the file it lies in, with one exception:
decoders whose sound depends on all that they heard before (see `_MEMORY_S`) are run from the file's beginning.
"""

from __future__ import annotations

import bisect
import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal, TypeVar

import av
import av.error
import numpy as np
import soxr
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from harken.errors import ClipError
from harken.media.containers import MAX_PIXELS, audio_of, clock, open_media, video_of
from harken.media.images import Picture, image_times

Waveform = NDArray[np.float32]
Mix = Literal["first", "mean", "all"]
Chosen = TypeVar("Chosen", AudioStream, VideoStream)
RESAMPLER: Final = "VHQ"  # soxr quality; the choice moves FBANK values, so every rate of every clip uses this one
MIN_RATE_HZ: Final = 1_000  # below it is no sound: the papers' features begin at 20 Hz with frames of 25 ms
MAX_RATE_HZ: Final = 384_000  # the highest that recorders write
MAX_CHANNELS: Final = 32  # 22.2 surround has 24, ambisonics of the fourth order 25
MAX_SAMPLES: Final = 1 << 28  # of all channels of a clip: 1 GiB as float32, 50 minutes of stereo at 44.1 kHz
MAX_HOLE_S: Final = 60.0  # a longer jump of the clock is damage: as silence it would fill the memory
MAX_ASPECT: Final = 32  # of a picture's sides; the widest films have 4
_FULL_SCALE: Final = 0.999  # sound that was clipped and then coded anew may stay a little below 1
_GAP_S: Final = 0.02  # a jump of the audio clock that rounding to milliseconds cannot explain
_AT_ONCE: Final = 32  # packets that are decoded before their sound is copied out of the decoder's memory
_ROOM_S: Final = 10.0  # what the first run has room for at first, if the clip is as long
_NEAR_S: Final = 0.1  # frames so near the clip are kept: they help to place its own
_PAST_S: Final = 0.1  # no packet of sound comes so late after one that is to be heard before it
_PAST_PICTURES: Final = 40  # a decoder holds back 16 pictures at most, of two fields each: none comes later than this
_FIRST_IMAGE_SLACK_S: Final = 0.25

# How far back a decoder remembers, where that has an end: then what lies further back need not be decoded. One second
# is more than MP3's reservoir of 511 bytes can span, and than Vorbis's one packet. AAC is not here, because its noise
# comes from one generator all through the stream; nor is Opus, whose filters forget, but never wholly.
_MEMORY_S: Final = {"flac": 1.0, "alac": 1.0, "mp2float": 1.0, "mp3float": 1.0, "vorbis": 1.0}

_DTYPES: Final[dict[str, Any]] = {
    "u8": np.uint8,
    "s16": np.int16,
    "s32": np.int32,
    "flt": np.float32,
    "dbl": np.float64,
}


def _first(data: Waveform) -> Waveform:
    return data[0]


def _mean(data: Waveform) -> Waveform:
    return data.mean(axis=0, dtype=np.float32)


def _all(data: Waveform) -> Waveform:
    return data


MIXES: Final[dict[Mix, Callable[[Waveform], Waveform]]] = {"first": _first, "mean": _mean, "all": _all}


@dataclass(frozen=True, slots=True)
class Heard:
    """What the recording holds of the clip's sound, before any mixing and resampling.

    `decoded_s`: seconds really there, without holes. `peak_dbfs`: the loudest sample of any channel, in dB below full
    scale; minus infinity for silence. `clipped_share`: the share of the clip's samples (moments) at which some channel
    is within 0.1 % of full scale or beyond it: a lossy coder makes clipped sound overshoot, so runs of equal samples
    would miss it. A recording merely normalised to full scale has a handful.
    """

    sample_rate_hz: int
    n_channels: int
    decoded_s: float
    peak_dbfs: float
    clipped_share: float


@dataclass(frozen=True, slots=True)
class Decoded:
    """One clip's sound and images.

    `sounds`: (mix, sample rate in Hz or None) as asked -> float32 (time,) for `first` and `mean`, (channel, time) for
    `all`, in [-1, 1] (a lossy coder may overshoot), from the clip's start; shorter than the clip where the recording
    ends early, and never padded at the end. `heard`: what is known of the sound; None where none was asked for.
    `images`: uint8 (height, width, 3) each. `image_times_s`: the time each image was taken at, in seconds from the
    clip's start; `shown_from_s`: when the picture then on screen first appeared, on the same clock. `pictures_end_s`:
    when the recording's last picture goes, on that clock, at most the clip's length; None where no image was asked for.
    """

    sounds: dict[tuple[Mix, int | None], Waveform]
    heard: Heard | None
    images: list[Picture]
    image_times_s: list[float]
    shown_from_s: list[float]
    pictures_end_s: float | None


@dataclass(frozen=True, slots=True)
class Sound:
    """A stretch of decoded sound: `data` float32 (channel, time), and how much of it was really in the recording.

    `peak`: the largest absolute value of any channel.
    """

    sample_rate_hz: int
    data: Waveform
    n_decoded: int
    peak: float

    @property
    def decoded_s(self) -> float:
        """Seconds of sound that the recording holds in this stretch."""
        return self.n_decoded / self.sample_rate_hz

    @property
    def peak_dbfs(self) -> float:
        """The loudest sample of any channel, in dB below full scale; minus infinity for silence."""
        return 20 * math.log10(self.peak) if self.peak > 0 else float("-inf")

    @property
    def clipped_share(self) -> float:
        """The share of moments at which some channel is at full scale (see `Heard`)."""
        if self.peak < _FULL_SCALE:
            return 0.0
        return float((np.abs(self.data) >= _FULL_SCALE).any(axis=0).mean())


def decode(
    section: bytes,
    start_s: float,
    end_s: float | None,
    *,
    n_images: int,
    timestamps: str = "endpoints",
    sounds: Sequence[tuple[Mix, int | None]],
) -> Decoded:
    """The clip from `start_s` to `end_s` of `section`, on that file's own clock (see `Section`).

    Sound is cut at the sample, then mixed (`first` channel, `mean` of the channels, or `all`), then resampled (soxr
    VHQ; None keeps the recording's own rate); no `sounds`, no sound. Where all channels are the same, so are `first`
    and `mean`, to the bit. Each image is the picture on screen at its time, the last one no later than one frame before
    the end; `n_images=0` leaves the pictures alone. `end_s=None` is the end of the sound.
    Raises ClipError: `media.*` (`media.too_big` beyond this module's bounds), `qc.no_audio`, `qc.past_end` (no sound in
    the clip), `qc.no_video` (images are wanted and no picture is on screen at the clip's start).
    """
    with open_media(io.BytesIO(section)) as container:
        ear = _Ear(_sounding(container), start_s, end_s) if sounds or end_s is None else None
        eye = _Eye(_showing(container), start_s, end_s) if n_images else None
        senses = {sense.stream.index: sense for sense in (ear, eye) if sense is not None}
        for packet in _packets(container, senses):
            sense = senses[packet.stream_index]
            sense.take(packet)
            if sense.is_done and all(other.is_done for other in senses.values()):
                break
        sound = ear.sound() if ear is not None else None
        if end_s is None:
            assert sound is not None
            end_s = start_s + sound.data.shape[1] / sound.sample_rate_hz
        seen = eye.images(end_s, n_images, timestamps) if eye is not None else ([], [], [], None)
    heard = None if sound is None else _heard(sound)
    return Decoded({} if sound is None else _mixed(sound, sounds), heard, *seen)


def read_sound(stream: AudioStream, packets: Iterable[Packet[Any]], start_s: float, end_s: float | None) -> Sound:
    """The samples from `start_s` to `end_s` on the packets' clock, decoded from `packets`.

    A hole in the recording's clock is silence, as a player would have it; nothing is added behind the last sample.
    Raises ClipError: `media.truncated` where the decoder gives up, `media.not_media` and `media.too_big` where what it
    gives is beyond this module's bounds, `qc.past_end` where no sample lies in the stretch.
    """
    ear = _Ear(stream, start_s, end_s)
    for packet in packets:
        ear.take(packet)
    return ear.sound()


def resample(data: Waveform, rate_in_hz: int, rate_out_hz: int) -> Waveform:
    """`data` (time,) or (channel, time) at another rate: round(time * out / in) samples, by soxr at its best."""
    if rate_in_hz == rate_out_hz:
        return np.ascontiguousarray(data)
    if data.ndim == 2:  # two channels at once take soxr half as long again
        return np.stack([resample(channel, rate_in_hz, rate_out_hz) for channel in data])
    return soxr.resample(np.ascontiguousarray(data), rate_in_hz, rate_out_hz, quality=RESAMPLER)


def _mixed(sound: Sound, wanted: Sequence[tuple[Mix, int | None]]) -> dict[tuple[Mix, int | None], Waveform]:
    """Each wanted mix at its rate; what is the same is computed once."""
    data, own = sound.data, sound.sample_rate_hz
    is_mono = all(np.array_equal(data[0], other) for other in data[1:])
    mixed: dict[Mix, Waveform] = {}
    made: dict[tuple[Mix, int], Waveform] = {}
    result = {}
    for mix, rate in wanted:
        source: Mix = "first" if is_mono and mix == "mean" else mix
        if source not in mixed:
            mixed[source] = MIXES[source](data)
        key = (source, rate or own)
        if key not in made:
            made[key] = resample(mixed[source], own, key[1])
        result[mix, rate] = made[key]
    return result


def _heard(sound: Sound) -> Heard:
    return Heard(sound.sample_rate_hz, len(sound.data), sound.decoded_s, sound.peak_dbfs, sound.clipped_share)


def _sounding(container: InputContainer) -> AudioStream:
    return _decodable(audio_of(container), "qc.no_audio", "audio stream")


def _showing(container: InputContainer) -> VideoStream:
    stream = _decodable(video_of(container), "qc.no_video", "video stream")
    _refuse_big(stream.codec_context.width, stream.codec_context.height)
    return stream


def _decodable(stream: Chosen | None, reason: str, what: str) -> Chosen:
    if stream is None:
        raise ClipError(reason, f"the stored section has no {what}")
    if stream.codec_context is None:
        raise ClipError("media.not_media", f"no decoder for the stored section's {what}")
    return stream


def _packets(container: InputContainer, streams: Iterable[int]) -> Iterator[Packet[Any]]:
    """The packets of the streams numbered `streams`, in the order of decoding."""
    try:
        for packet in container.demux(*[container.streams[i] for i in streams]):
            if packet.size:
                yield packet
    except av.error.FFmpegError as e:
        raise _failure(e, "reading packets") from e
    except IndexError as e:  # PyAV's, for a stream that a damaged file first shows at its end
        raise ClipError("media.truncated", "a stream that was not announced appears while reading packets") from e


def _failure(error: av.error.FFmpegError, doing: str) -> ClipError:
    reason = "media.too_big" if isinstance(error, av.error.MemoryError) else "media.truncated"
    return ClipError(reason, f"{error.strerror} while {doing}")


class _Ear:
    """Decodes a recording's sound packet by packet and keeps what is in and near the clip, no more."""

    def __init__(self, stream: AudioStream, start_s: float, end_s: float | None) -> None:
        self.stream = stream
        self.is_done = False  # no later packet holds sound of the clip
        self._context = stream.codec_context
        self._context.thread_count = 1
        _refuse_absurd(self._context.sample_rate or MIN_RATE_HZ, self._context.channels or 1)  # 0: not known yet
        self._tick = clock(stream)
        self._start_s, self._end_s = start_s, math.inf if end_s is None else end_s
        memory_s = 1.0 if self._context.name.startswith("pcm_") else _MEMORY_S.get(self._context.name, math.inf)
        self._needed_from = (start_s - memory_s) / float(self._tick)
        self._needed_until = (self._end_s + _PAST_S) / float(self._tick)
        self._format: tuple[int, int, str] | None = None  # rate, channels, sample format: the first frame's
        self._next = 0.0  # where the next frame is expected, in samples
        self._runs: list[_Run] = []
        self._waiting: list[Packet[Any]] = []  # not yet decoded

    def take(self, packet: Packet[Any]) -> None:
        """Decode `packet`, or leave it where the clip is over or nothing of it is left when the clip begins."""
        pts = packet.pts
        if pts is not None:
            if pts > self._needed_until:
                self.is_done = True
            elif pts < self._needed_from and packet.duration and pts + packet.duration < self._needed_from:
                return
        if not self.is_done:
            self._waiting.append(packet)
            if len(self._waiting) == _AT_ONCE:
                self._decode()

    def sound(self) -> Sound:
        """The clip's sound, once every packet was taken or `is_done`."""
        self._decode(is_end=not self.is_done)
        if self._format is None:
            raise ClipError("qc.past_end", "no sound could be decoded")
        rate, channels, _ = self._format
        lead = _lead(self._context, rate)
        runs = [(_beginning(run.offsets, run.counts, rate, self._tick, lead), run) for run in self._runs]
        first = round(self._start_s * rate)
        stop = max((at + run.n_samples for at, run in runs), default=first)
        if math.isfinite(self._end_s):
            stop = min(stop, first + round((self._end_s - self._start_s) * rate))
        heard = _union([(max(at, first), min(at + run.n_samples, stop)) for at, run in runs])
        if not heard:
            raise ClipError(
                "qc.past_end",
                f"no sound from {self._start_s:.3f} s on; what was read ends at {self._next / rate:.3f} s",
            )
        _refuse_holes(heard, first, rate)
        _refuse_long(channels, stop - first)
        data = _assembled(runs, channels, first, stop)
        peak = max(float(data.max()), -float(data.min()))
        if not math.isfinite(peak):
            raise ClipError("media.not_media", "some samples are not finite numbers")
        return Sound(rate, data, sum(hi - lo for lo, hi in heard), peak)

    def _decode(self, is_end: bool = False) -> None:
        """Decode the packets that wait, and what the decoder still holds at the recording's end."""
        decode, frames = self._context.decode, []
        try:
            for packet in self._waiting:
                frames += decode(packet)
            if is_end:
                frames += decode(None)
        except av.error.FFmpegError as e:
            raise _failure(e, "decoding the sound") from e
        self._waiting.clear()
        if frames := [f for f in frames if f.samples]:
            self._keep(frames)

    def _keep(self, frames: list[AudioFrame]) -> None:
        """Keep what is in or near the clip. A batch of frames at a time: one by one took as long as decoding them."""
        self._know(frames)
        assert self._format is not None
        rate, channels, _ = self._format
        begins, step = [], self._step
        for frame in frames:
            at = self._next if frame.pts is None else frame.pts * step
            self._next = at + frame.samples
            begins.append(at)
        if not (self._runs and begins[0] > self._near[0] and self._next < self._near[1]):  # at the clip's edges
            ends = [at + frame.samples for at, frame in zip(begins, frames, strict=True)]
            is_near = [end > self._near[0] and at < self._near[1] for at, end in zip(begins, ends, strict=True)]
            begins, frames = list(itertools.compress(begins, is_near)), list(itertools.compress(frames, is_near))
        while frames:
            if not self._runs or abs(begins[0] - self._runs[-1].expected) > _GAP_S * rate:
                length_s = max(0.0, min(self._end_s - self._start_s, _ROOM_S)) + 2 * _NEAR_S + _GAP_S
                # there is one run nearly always; were there many, room for all in each would be too much
                self._runs.append(_Run(channels, 0 if self._runs else round(length_s * rate)))
            n = self._runs[-1].extend(begins, frames, _GAP_S * rate)
            begins, frames = begins[n:], frames[n:]
        _refuse_long(channels, sum(run.n_samples for run in self._runs))

    def _know(self, frames: list[AudioFrame]) -> None:
        """The frames' format, which must stay what the first one's is."""
        for found in dict.fromkeys((f.sample_rate, f.layout.nb_channels, f.format.name) for f in frames):
            if self._format is None:
                rate, channels, _ = found
                _refuse_absurd(rate, channels)
                self._format = found
                self._step = float(self._tick * rate)  # samples to a tick; exactly 1 in most MP4 files
                self._near = (self._start_s - _NEAR_S) * rate, (self._end_s + _NEAR_S) * rate
            elif found != self._format:
                raise ClipError("media.not_media", f"the sound changes on the way, from {self._format} to {found}")


class _Run:
    """Frames that follow one another without a jump: what each says of its time, and their samples.

    `offsets`: when each frame begins, less the samples of the run before it, which are in `counts`; the last count is
    `n_samples`. Frames are copied out of the decoder's memory a few at a time, which the next ones then take: to hold
    them all, or to go through `AudioFrame.to_ndarray`, took as long again as decoding.
    """

    def __init__(self, channels: int, room: int) -> None:
        self.offsets: list[float] = []
        self.counts = [0]
        self._data: Waveform = np.empty((channels, room), np.float32)

    @property
    def n_samples(self) -> int:
        return self.counts[-1]

    @property
    def expected(self) -> float:
        """When the next frame begins if it follows without a jump."""
        return self.offsets[0] + self.counts[-1]

    @property
    def data(self) -> Waveform:
        """The samples so far, float32 (channel, time) in [-1, 1]."""
        return self._data[:, : self.n_samples]

    def extend(self, begins: list[float], frames: list[AudioFrame], gap: float) -> int:
        """Add the frames that follow without a jump of more than `gap`, each beginning at its `begins`; how many."""
        before, first = self.n_samples, self.offsets[0] if self.offsets else begins[0]
        end, n_frames = before, 0
        for at, frame in zip(begins, frames, strict=True):
            if abs(at - end - first) > gap:
                break
            self.offsets.append(at - end)
            end += frame.samples
            self.counts.append(end)
            n_frames += 1
        if end > self._data.shape[1]:
            larger = np.empty((len(self._data), 2 * end), np.float32)
            larger[:, :before] = self._data[:, :before]
            self._data = larger
        _write(frames[:n_frames], self._data[:, before:end])
        return n_frames


def _refuse_absurd(rate: int, channels: int) -> None:
    if rate < MIN_RATE_HZ or channels < 1:
        raise ClipError("media.not_media", f"sound of {channels} channels at {rate} Hz")
    if rate > MAX_RATE_HZ or channels > MAX_CHANNELS:
        raise ClipError(
            "media.too_big", f"{channels} channels at {rate} Hz; at most {MAX_CHANNELS} at {MAX_RATE_HZ} Hz are read"
        )


def _refuse_long(channels: int, samples: int) -> None:
    if channels * samples > MAX_SAMPLES:
        raise ClipError(
            "media.too_big", f"{samples} samples of {channels} channels; a clip holds at most {MAX_SAMPLES}"
        )


def _refuse_holes(heard: list[tuple[int, int]], first: int, rate: int) -> None:
    ends = [first, *(hi for _, hi in heard)]
    for end, (begin, _) in zip(ends, heard, strict=False):
        if begin - end > MAX_HOLE_S * rate:
            raise ClipError(
                "media.not_media", f"the sound's clock jumps from {end / rate:.3f} s to {begin / rate:.3f} s"
            )


def _lead(context: Any, rate: int) -> int:
    """By how many samples the recording's first packet begins before its sound does, as far as the codec says."""
    head = context.extradata or b""
    return round(int.from_bytes(head[10:12], "little") * rate / 48_000) if head.startswith(b"OpusHead") else 0


def _beginning(offsets: list[float], counts: list[int], rate: int, tick: Fraction, lead: int) -> int:
    """The index of a run's first sample, from where each of its frames says that it is (all in samples).

    A clock in milliseconds (Matroska's, or an MP4's that was copied from it) is wrong by up to half of one at each
    frame, but the run's true beginning is that near to all of them: of what remains possible we take the middle, or the
    place on the codec's own grid if there is one. Frames of one length begin at whole multiples of it from the
    recording's beginning; Opus frames of 20 ms leave no other trace of the truth. In MP4 nothing is left to choose.
    The first frame is not asked if there are others: where its decoder drops samples, its time is rounded once more.
    """
    offsets, after = offsets[1:] or offsets, counts[1:-1] or counts[:1]
    low, high = min(offsets), max(offsets)
    middle, spread = (low + high) / 2, high - low
    unit, millisecond = float(tick * rate), rate / 1000
    error = unit / 2
    if unit < millisecond and (spread > unit + 0.01 or _is_whole(offsets, after, millisecond)):
        error += millisecond / 2
    if spread > 2 * error + 0.01:  # the clock trembles by more than rounding explains
        return round(math.fsum(offsets) / len(offsets))
    lengths = np.diff(counts)
    length = int(lengths.max())
    if (lengths[1:-1] == length).all():
        inside = counts[int(lengths.argmax())]
        for moved in (0, rate):  # `cut` moves what begins before 0 to a whole second later
            on_grid = round((middle + inside + lead - moved) / length) * length - lead - inside + moved
            if abs(on_grid - middle) <= error - spread / 2 + 0.01:
                return on_grid
    return round(middle)


def _is_whole(offsets: list[float], after: list[int], unit: float) -> bool:
    """Whether every frame's time is a whole number of units."""
    times = (np.array(offsets) + after) / unit
    return bool((np.abs(times - np.rint(times)) < 1e-6).all())


def _assembled(runs: list[tuple[int, _Run]], channels: int, first: int, stop: int) -> Waveform:
    """The samples from `first` to `stop` of runs that begin where they say; what no run holds is silent."""
    for at, run in runs:
        if at <= first and at + run.n_samples >= stop and len(runs) == 1:  # nearly always: nothing to copy
            return run.data[:, first - at : stop - at]
    data = np.zeros((channels, stop - first), np.float32)
    for at, run in runs:
        lo, hi = max(at, first), min(at + run.n_samples, stop)
        if lo < hi:
            data[:, lo - first : hi - first] = run.data[:, lo - at : hi - at]
    return data


def _union(stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The stretches (begin, end) in order, joined where they touch; empty ones are left out."""
    joined: list[tuple[int, int]] = []
    for lo, hi in sorted(s for s in stretches if s[0] < s[1]):
        if joined and lo <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(hi, joined[-1][1])
        else:
            joined.append((lo, hi))
    return joined


def _write(frames: list[AudioFrame], out: Waveform) -> None:
    """The frames' samples, one after another, as float32 in [-1, 1] into `out` (channel, time)."""
    name, is_planar = frames[0].format.name.removesuffix("p"), frames[0].format.is_planar
    if name not in _DTYPES:
        raise ClipError("media.not_media", f"samples of the format {name} are not known")
    dtype, channels = _DTYPES[name], len(out)
    memories: list[tuple[Any, int]] = [(frame.planes, frame.samples) for frame in frames]
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused in the end
        for c, row in enumerate(out):
            if is_planar:  # a plane may be longer than its frame
                parts = [np.frombuffer(planes[c], dtype, n) for planes, n in memories]
            else:
                parts = [np.frombuffer(planes[0], dtype, n * channels)[c::channels] for planes, n in memories]
            np.concatenate(parts, out=row, casting="same_kind")
    if name == "u8":  # WAV's 8 bits are unsigned
        out -= 128
    if np.issubdtype(dtype, np.integer):
        out *= 2.0 ** (1 - 8 * np.dtype(dtype).itemsize)


class _Eye:
    """Collects a recording's pictures, undecoded, and decodes those that the clip wants."""

    def __init__(self, stream: VideoStream, start_s: float, end_s: float | None) -> None:
        self.stream = stream
        self.is_done = False  # no later packet is shown in the clip
        self._tick = clock(stream)
        self._start_s = start_s
        self._start = start_s / self._tick
        self._end = math.inf if end_s is None else end_s / self._tick
        self._packets: list[Packet[Any]] = []
        self._lead = 0  # index of the last keyframe that is shown at the clip's start or before
        self._n_past = 0

    def take(self, packet: Packet[Any]) -> None:
        """Keep `packet`, and no group of pictures that ends before the clip starts, but for the last one."""
        pts = _pts(packet)
        if packet.is_keyframe and pts <= self._start:
            del self._packets[: self._lead]
            self._lead = len(self._packets)
        self._packets.append(packet)
        self._n_past += pts > self._end
        self.is_done = self._n_past >= _PAST_PICTURES

    def images(self, end_s: float, n: int, rule: str) -> tuple[list[Picture], list[float], list[float], float]:
        """The clip's images, the times they were taken at, when each appeared, and when the last picture goes."""
        tick, start_s = self._tick, self._start_s
        if not self._packets:
            raise ClipError("qc.no_video", "the video stream has no pictures")
        shown = sorted({_pts(p) for p in self._packets})
        rate = self.stream.average_rate or self.stream.guessed_rate
        fps = float(rate) if rate else None
        finish = min(end_s, float(_last_goes(self._packets, shown) * tick))
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
        pictures = _decode_pictures(self.stream.codec_context, self._packets, sorted(set(wanted)))
        relative = [max(0.0, t - start_s) for t in times]
        return [pictures[p] for p in wanted], relative, [float(p * tick) - start_s for p in wanted], finish - start_s


def _last_goes(packets: list[Packet[Any]], shown: list[int]) -> int:
    """When the last picture goes, in ticks: where the file does not say (WebM), after as long as the one before it."""
    lasting = max((p.duration or 0 for p in packets if _pts(p) == shown[-1]), default=0)
    if not lasting and len(shown) > 1:
        lasting = shown[-1] - shown[-2]
    return max(shown[-1] + lasting, *(_pts(p) + (p.duration or 0) for p in packets))


def _pts(packet: Packet[Any]) -> int:
    pts = packet.pts if packet.pts is not None else packet.dts
    if pts is None:
        raise ClipError("media.not_media", "a picture has no time")
    return pts


def _decode_pictures(context: VideoCodecContext, packets: list[Packet[Any]], wanted: list[int]) -> dict[int, Picture]:
    """The pictures shown from the times `wanted` (in ticks, ascending), each decoded from its keyframe and no further.

    A decoder gives a picture two or three pictures late. Where the next one that is wanted has a keyframe of its own,
    the decoder is told instead that there is no more, and gives it at once.
    """
    context.thread_count = 1
    where = {_pts(p): i for i, p in enumerate(packets)}
    leads = _leads(packets, wanted, where)
    found: dict[int, Picture] = {}
    at, drained = -1, False  # index of the last packet fed; whether the decoder was told that there is no more

    def keep(frames: list[VideoFrame]) -> None:
        for frame in frames:
            if frame.pts in leads and frame.pts not in found:
                _refuse_big(frame.width, frame.height)
                # by one thread: left to itself the conversion takes one for each core, and waits for a busy one
                found[frame.pts] = np.asarray(frame.to_ndarray(format="rgb24", threads=1), np.uint8)

    try:
        for time, following in zip(wanted, [*wanted[1:], None], strict=True):
            if time in found:
                continue
            if drained or leads[time] > at + 1:
                context.flush_buffers()
                at, drained = leads[time] - 1, False
            while at < where[time]:
                at += 1
                context.skip_frame = "DEFAULT" if _pts(packets[at]) in leads else "NONREF"
                keep(context.decode(packets[at]))
            if following is None or leads[following] > at + 1:
                keep(context.decode(None))
                drained = True
    except av.error.ArgumentError as e:  # what libavcodec says of a picture that is larger than it may be
        raise ClipError("media.too_big", f"a picture's size is refused; {MAX_PIXELS} pixels at most are read") from e
    except av.error.FFmpegError as e:
        raise _failure(e, "decoding the pictures") from e
    missing = [t for t in wanted if t not in found]
    if missing:
        raise ClipError("media.truncated", f"{len(missing)} of {len(wanted)} pictures could not be decoded")
    return found


def _leads(packets: list[Packet[Any]], wanted: list[int], where: dict[int, int]) -> dict[int, int]:
    """For each wanted picture the index of the keyframe that it is decoded from.

    A picture that is shown before its keyframe but sent after it (an open group) needs the group before.
    """
    keys = [(i, _pts(p)) for i, p in enumerate(packets) if p.is_keyframe]
    return {time: max((i for i, pts in keys if i <= where[time] and pts <= time), default=0) for time in wanted}


def _refuse_big(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ClipError("media.too_big", f"pictures of {width} x {height}; {MAX_PIXELS} pixels at most are read")
    # 0: not known yet. A line of pixels with its short side scaled to CLIP's would be gigabytes.
    if max(width, height) > MAX_ASPECT * min(width, height) > 0:
        raise ClipError(
            "media.not_media", f"pictures of {width} x {height}; no video is {MAX_ASPECT} times as long as it is high"
        )
