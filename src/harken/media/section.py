"""Cut a clip's section out of a recording without re-encoding it, and prove that the section holds the clip.

The packets are copied as they are, from the keyframe at or before the clip's start to a little past its end, with their
own exact times. What is kept is then opened and decoded again: nothing that does not decode is ever stored.
"""

from __future__ import annotations

import io
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final, cast

import av
import av.error
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Stream
from av.video.stream import VideoStream

from harken.errors import ClipError
from harken.media.containers import (
    MAX_PIXELS,
    MediaFile,
    audio_of,
    check,
    clock,
    is_cut_off,
    open_media,
    origin,
    video_of,
)
from harken.media.decode import Sound, read_sound

SILENCE_DBFS: Final = -60.0
_SHORTEST_S: Final = 0.5  # less of a clip than this is not a short clip but none
_ENOUGH: Final = 0.95  # of the clip's length
_LEAD_S: Final = 0.25  # what audio decoders need to settle (Opus asks for 0.08 s)
_TAIL_S: Final = 0.1
_LAG_S: Final = 5  # how far one stream may lag behind another before waiting for it would download the recording

# One fragment, whose header carries each stream's first time: times survive to the tick. No date and no id is written.
_MP4: Final = {
    "movflags": "frag_custom+empty_moov+default_base_moof+frag_discont",
    "use_editlist": "0",
    "avoid_negative_ts": "disabled",
    "fflags": "bitexact",
}
_MATROSKA: Final = {"avoid_negative_ts": "disabled", "fflags": "bitexact"}
_WAV: Final = {"fflags": "bitexact"}


@dataclass(frozen=True, slots=True)
class Section:
    """The stored stretch of a recording that holds one clip.

    `data` is a media file of format `container` (`mp4`, `matroska`, `wav` or `flac`). On that file's clock the clip
    runs from `start_s` to `end_s`; `data` may hold more on either side. The same clip gives the same bytes every time.
    `source_duration_s` is what the recording says of itself (None where it does not); `bytes_fetched` counts what was
    read over the network, `peak_dbfs` is the clip's loudest sample and `decoded_s` the seconds of sound really in the
    clip. `facts` is what a ledger should keep of the attempt and can be written as JSON: `n_bytes` and `n_requests` of
    media, `duration_s`, and from YouTube `info_id`, `formats`, `live_status`, `availability`, `upload_date`, `license`
    and `playability_status` where they are known.
    """

    data: bytes
    container: str
    start_s: float
    end_s: float
    has_audio: bool
    has_video: bool
    source_duration_s: float | None
    bytes_fetched: int
    decoded_s: float
    peak_dbfs: float
    facts: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class _Track:
    stream: Stream
    packets: list[Packet[Any]]
    shift: int  # ticks to add, so that the recording begins at `lift` seconds


def cut(
    recording: MediaFile,
    start_s: float,
    end_s: float | None,
    needs_images: bool,
    *,
    pictures: MediaFile | None = None,
    silence_dbfs: float = SILENCE_DBFS,
) -> Section:
    """The section of `recording` (a seekable file or a RangeReader) from `start_s` to `end_s`; None is its end.

    `pictures` is a second file where sound and pictures are stored apart. Without `needs_images` only the sound is
    kept.
    Raises ClipError: `media.empty`, `media.not_media`, `media.truncated` (the file ends before it says),
    `media.too_big` (the clip does not fit into memory), `qc.no_audio`, `qc.no_video`, `qc.past_end` (less than 0.5 s of
    the clip is there), `qc.short` (less than 95 %), `qc.silent` (no sample above `silence_dbfs`), or whatever reading
    the file raised.
    """
    files = [recording] if pictures is None or not needs_images else [recording, pictures]
    with ExitStack() as stack:
        opened = [stack.enter_context(open_media(file)) for file in files]
        audio, duration_s = _promising(opened, files, start_s, needs_images)
        sound_s = float(audio.duration * clock(audio)) if audio.duration else duration_s
        name = opened[0].format.name
        if end_s is None and start_s == 0 and not needs_images and name in ("wav", "flac"):
            data, lift = _read_all(recording), Fraction(0)
        else:
            wanted: list[list[Stream]] = [[] for _ in files]
            if needs_images:
                wanted[-1].append(cast(Stream, video_of(opened[-1])))
            wanted[0].append(audio)
            tracks = [t for c, ss in zip(opened, wanted, strict=True) for t in _collect(c, ss, start_s, end_s)]
            data, name, lift = _store(tracks, files)
    for file in files:
        check(file)
    clip_start = start_s + float(lift)
    clip_end = None if end_s is None else end_s + float(lift)
    if clip_end is None and sound_s is not None:
        clip_end = float(lift) + sound_s  # less the encoder's padding, which the packets still hold
    if end_s is None:  # no length was asked for that could show what is missing
        _refuse_if_cut_off(files, "the whole recording is wanted")
    promised = end_s is None or bool(audio.duration and sound_s and sound_s >= end_s)
    found = _prove(data, clip_start, clip_end, needs_images, files, promised=promised)
    if found.peak_dbfs < silence_dbfs:
        raise ClipError("qc.silent", f"the loudest sample is at {found.peak_dbfs:.1f} dBFS")
    if end_s is None or clip_end is None:
        if name in ("wav", "flac") and sound_s is not None and found.decoded_s < sound_s - _TAIL_S:
            raise ClipError(
                "media.truncated", f"{found.decoded_s:.3f} s of sound where the header says {sound_s:.3f} s"
            )
        clip_end = clip_start + found.data.shape[1] / found.sample_rate_hz
    fetched = sum(getattr(file, "bytes_fetched", 0) for file in files)
    return Section(
        data,
        name,
        clip_start,
        clip_end,
        has_audio=True,
        has_video=needs_images,
        source_duration_s=duration_s,
        bytes_fetched=fetched,
        decoded_s=found.decoded_s,
        peak_dbfs=found.peak_dbfs,
        facts={} if duration_s is None else {"duration_s": duration_s},
    )


def _promising(
    opened: list[InputContainer], files: list[MediaFile], start_s: float, needs_images: bool
) -> tuple[AudioStream, float | None]:
    """The audio stream and the recording's length in s, if by its own header the recording can hold the clip."""
    audio = audio_of(opened[0])
    if audio is None:
        _refuse_if_cut_off(files, "no sound")
        raise ClipError("qc.no_audio", _streams_of(opened[0]))
    if needs_images and video_of(opened[-1]) is None:
        _refuse_if_cut_off(files, "no pictures")
        raise ClipError("qc.no_video", _streams_of(opened[-1]))
    for stream in (audio, video_of(opened[-1])) if needs_images else (audio,):
        if stream is not None and stream.codec_context is None:
            raise ClipError("media.not_media", f"no decoder for the {stream.type}; {_streams_of(opened[0])}")
    duration_s = opened[0].duration / 1e6 if opened[0].duration else None
    if duration_s is not None and duration_s < start_s + _SHORTEST_S:
        _refuse_if_cut_off(files, f"the recording ends at {duration_s:.3f} s")
        raise ClipError("qc.past_end", f"the recording lasts {duration_s:.3f} s, the clip starts at {start_s:.3f} s")
    return audio, duration_s


def _collect(container: InputContainer, streams: list[Stream], start_s: float, end_s: float | None) -> list[_Track]:
    """The packets of `streams` that the clip needs, in the order of decoding."""
    zero = origin(container)
    start = float(zero) + start_s
    end = None if end_s is None else float(zero) + end_s + _TAIL_S
    guide = streams[0]
    back = _LEAD_S
    is_fresh = True
    while True:
        is_from_start = start - back <= float(zero)
        # a file that was just opened stands at its beginning; a seek there loses the first sound of a WebM
        packets = _read(container, streams, None if is_fresh and is_from_start else start - back, end, guide)
        is_fresh = False
        if is_from_start or _has_lead(guide, packets[guide.index], start):
            break
        back *= 8  # the file's index led behind the keyframe that shows the clip's start
    return [_Track(s, _needed(s, _dated(packets[s.index]), start), -round(zero / clock(s))) for s in streams]


def _read(
    container: InputContainer, streams: list[Stream], start: float | None, end: float | None, guide: Stream
) -> dict[int, list[Packet[Any]]]:
    found: dict[int, list[Packet[Any]]] = {s.index: [] for s in streams}
    going = set(found)
    try:
        if start is not None:  # else from where the file stands
            container.seek(max(0, math.floor(start / float(clock(guide)))), stream=guide, backward=True)
        for packet in container.demux(*streams):
            time = _time(packet)
            if time is None or not packet.size:
                continue
            if end is None or time <= end:
                found[packet.stream.index].append(packet)
                continue
            going.discard(packet.stream.index)
            if not going or time > end + _LAG_S:
                break
    except av.error.MemoryError as e:  # what is missing is not the file's end
        raise ClipError("media.too_big", f"{e.strerror} while reading packets") from e
    except (av.error.FFmpegError, IndexError):  # PyAV's, for a stream that a damaged MPEG-TS first shows at its end
        pass  # the file ends here: `_prove` judges by what was read, and by what the file says of itself
    return found


def _has_lead(stream: Stream, packets: list[Packet[Any]], start: float) -> bool:
    if isinstance(stream, VideoStream):
        return any(p.is_keyframe and _shown(p) <= start for p in packets)
    return bool(packets) and _shown(packets[0]) <= start


def _dated(packets: list[Packet[Any]]) -> list[Packet[Any]]:
    """`packets`, each with a decoding time: Matroska stores none, and FFmpeg cannot guess the first ones."""
    known = next((i for i, p in enumerate(packets) if p.dts is not None), None)
    for i in range(known or 0):
        assert known is not None
        packets[i].dts = packets[known].dts - (known - i) * (packets[known].duration or 1)  # type: ignore[operator]
    return packets


def _needed(stream: Stream, packets: list[Packet[Any]], start: float) -> list[Packet[Any]]:
    if isinstance(stream, VideoStream):
        lead = max((i for i, p in enumerate(packets) if p.is_keyframe and _shown(p) <= start), default=None)
        if lead is None:
            lead = next((i for i, p in enumerate(packets) if p.is_keyframe), len(packets))
        return packets[lead:]
    return [p for p in packets if _ends(p) > start - _LEAD_S]


def _store(tracks: list[_Track], files: list[MediaFile]) -> tuple[bytes, str, Fraction]:
    """The tracks as one file in memory, its format, and the seconds by which its clock is ahead of the recording's."""
    for track in tracks:
        if not track.packets:
            for file in files:
                check(file)
            kind = "pictures" if isinstance(track.stream, VideoStream) else "sound"
            _refuse_if_cut_off(files, f"no {kind} in the clip")
            raise ClipError(
                "qc.no_video" if kind == "pictures" else "qc.past_end", f"the recording has no {kind} in the clip"
            )
    first = min((_dts(p) + t.shift) * clock(t.stream) for t in tracks for p in t.packets[:1])
    lift = Fraction(max(0, math.ceil(-first)))  # whole seconds, because they are whole ticks of every clock
    codecs = {t.stream.codec_context.name for t in tracks}
    if len(tracks) == 1 and all(c.startswith("pcm_") for c in codecs):
        ahead = -(_dts(tracks[0].packets[0]) + tracks[0].shift) * clock(tracks[0].stream)  # a WAV file begins at 0
        return _mux(tracks, "wav", _WAV, Fraction(0)), "wav", ahead
    for name, options in (("mp4", _MP4), ("matroska", _MATROSKA)):
        try:
            return _mux(tracks, name, options, lift), name, lift
        except av.error.MemoryError as e:
            raise ClipError("media.too_big", f"{e.strerror} while storing packets") from e
        except (
            av.error.FFmpegError,
            ValueError,
        ) as e:  # MP4 cannot hold VP8; Matroska holds all, its times rounded to ms
            problem = e
    raise ClipError("media.not_media", f"codecs {sorted(codecs)} cannot be stored: {problem}")


def _mux(tracks: list[_Track], name: str, options: dict[str, str], lift: Fraction) -> bytes:
    buffer = io.BytesIO()
    out: OutputContainer = av.open(buffer, "w", format=name, options=options)
    try:
        # pictures first: the order of the streams must not depend on which file they came from
        ordered = sorted(tracks, key=lambda t: not isinstance(t.stream, VideoStream))
        copies = [out.add_stream_from_template(t.stream) for t in ordered]
        rows = [
            (float(clock(t.stream)) * (_dts(p) + t.shift), i, n, p)
            for i, t in enumerate(ordered)
            for n, p in enumerate(t.packets)
        ]
        # the muxer changes a packet's times and stream in place, and a second format may yet need them
        for _, i, _, packet in sorted(rows, key=lambda r: r[:3]):
            ticks = ordered[i].shift + int(lift / clock(ordered[i].stream))
            out.mux_one(_moved(packet, ticks, copies[i]))
    finally:
        out.close()
    return buffer.getvalue()


def _moved(packet: Packet[Any], ticks: int, stream: Stream) -> Packet[Any]:
    copy: Packet[Any] = Packet(bytes(packet))
    copy.time_base = packet.time_base
    copy.pts = None if packet.pts is None else packet.pts + ticks
    copy.dts = None if packet.dts is None else packet.dts + ticks
    copy.duration = packet.duration
    copy.is_keyframe = packet.is_keyframe
    copy.stream = stream
    return copy


def _prove(
    data: bytes, start_s: float, end_s: float | None, needs_images: bool, files: list[MediaFile], *, promised: bool
) -> Sound:
    """The clip's sound, decoded from the stored bytes, once all of the clip is found to be there.

    `promised` says that the recording's own header counts sound up to `end_s`, so that a lack is damage.
    """
    with open_media(io.BytesIO(data)) as container:
        audio, video = audio_of(container), video_of(container)
        for stream in (audio, video) if needs_images else (audio,):
            if stream is None or stream.codec_context is None:
                raise ClipError("media.not_media", f"cannot be read once it is stored; {_streams_of(container)}")
        assert audio is not None
        packets: dict[str, list[Packet[Any]]] = {"audio": [], "video": []}
        try:
            for packet in container.demux(*[s for s in (audio, video) if s is not None]):
                if packet.size:
                    packets[packet.stream.type].append(packet)
        except av.error.ArgumentError as e:  # what libavcodec says of a picture that is larger than it may be
            raise ClipError("media.too_big", f"a picture's size is refused; {MAX_PIXELS} pixels at most") from e
        except av.error.FFmpegError as e:  # of a WAV or FLAC file, which is stored as it is
            raise ClipError("media.truncated", f"{e.strerror} while reading what was stored") from e
        try:
            sound = read_sound(audio, packets["audio"], start_s, end_s)
        except ClipError as e:
            if e.reason == "qc.past_end":
                _refuse_if_cut_off(files, e.message)
            raise
        _judge(sound.decoded_s, start_s, end_s, "sound", files, promised=promised)
        if needs_images:
            assert video is not None
            _judge_pictures(video, packets["video"], start_s, end_s or start_s + sound.decoded_s, files)
    return sound


def _judge(
    have_s: float, start_s: float, end_s: float | None, what: str, files: list[MediaFile], *, promised: bool
) -> None:
    if end_s is None or have_s >= _ENOUGH * (end_s - start_s):
        return
    message = f"{have_s:.3f} s of {what} in a clip of {end_s - start_s:.3f} s"
    _refuse_if_cut_off(files, message)
    if promised:
        raise ClipError("media.truncated", message)
    raise ClipError("qc.past_end" if have_s < min(_SHORTEST_S, end_s - start_s) else "qc.short", message)


def _judge_pictures(
    video: VideoStream, packets: list[Packet[Any]], start_s: float, end_s: float, files: list[MediaFile]
) -> None:
    reach = _last_picture_ends(packets) - start_s
    if reach <= 0:
        _refuse_if_cut_off(files, "no pictures in the clip")
        raise ClipError("qc.no_video", f"the pictures end {-reach:.3f} s before the clip starts")
    _judge(min(reach, end_s - start_s), start_s, end_s, "pictures", files, promised=False)
    context = video.codec_context
    context.thread_count = 1
    try:
        pictures = context.decode(packets[0]) or context.decode(None)  # a keyframe needs no other packet
    except av.error.FFmpegError as e:
        raise ClipError("media.truncated", f"{e.strerror} while decoding the first picture") from e
    if not pictures:
        raise ClipError("media.truncated", "the first picture cannot be decoded")


def _last_picture_ends(packets: list[Packet[Any]]) -> float:
    """When the last picture goes: where the file does not say (WebM), after as long as the one before it was shown."""
    shown = sorted(_shown(p) for p in packets)
    gap = shown[-1] - shown[-2] if len(shown) > 1 and not max(packets, key=_shown).duration else 0.0
    return max(*(_ends(p) for p in packets), shown[-1] + gap)


def _refuse_if_cut_off(files: list[MediaFile], message: str) -> None:
    for file in files:
        check(file)
        if is_cut_off(file):
            raise ClipError("media.truncated", f"the file ends before its container says; {message}")
        check(file)


def _read_all(file: MediaFile) -> bytes:
    file.seek(0)
    data = file.read()
    check(file)
    return data


def _streams_of(container: InputContainer) -> str:
    kinds = ", ".join(f"{s.type}" for s in container.streams) or "none"
    return f"streams in the {container.format.name.partition(',')[0]} file: {kinds}"


def _dts(packet: Packet[Any]) -> int:
    time = packet.dts if packet.dts is not None else packet.pts
    assert time is not None
    return time


def _time(packet: Packet[Any]) -> float | None:
    """When the packet must be decoded, in seconds on its file's clock."""
    if packet.dts is None and packet.pts is None:
        return None
    return _dts(packet) * float(packet.time_base)


def _shown(packet: Packet[Any]) -> float:
    """When the packet is seen or heard, in seconds on its file's clock."""
    time = packet.pts if packet.pts is not None else packet.dts
    assert time is not None
    return time * float(packet.time_base)


def _ends(packet: Packet[Any]) -> float:
    return _shown(packet) + (packet.duration or 0) * float(packet.time_base)
