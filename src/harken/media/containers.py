"""Opening a media file, choosing its streams, and reading its clock."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any, Final, Protocol, cast, runtime_checkable

import av
import av.error
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from harken.errors import ClipError

av.logging.set_level(av.logging.PANIC)  # FFmpeg's own words go to stderr of every worker; the verdict is ours

# Playlists and concat scripts are left out: a served text must not make FFmpeg open other files or hosts.
_FORMATS: Final = "mov,matroska,webm,wav,w64,aiff,caf,flac,ogg,mp3,aac,mpegts,mpeg,avi,flv,asf"
# 8K, the largest that hosts serve, in either of its shapes: 7680 x 4320 and 8192 x 4320. A decoder may hold seventeen.
MAX_PIXELS: Final = 8192 * 4352
_MAGIC: Final = ((4, b"ftyp"), (0, b"\x1aE\xdf\xa3"), (0, b"RIFF"), (0, b"fLaC"), (0, b"OggS"))
_OPTIONS: Final = {"format_whitelist": _FORMATS, "max_pixels": str(MAX_PIXELS)}  # opening decodes some pictures
_ENCODER_DELAY_S: Final = Fraction(1, 5)


@runtime_checkable
class MediaFile(Protocol):
    """A seekable binary file: an open file, BytesIO or a RangeReader."""

    def read(self, size: int = -1, /) -> bytes: ...

    def seek(self, offset: int, whence: int = 0, /) -> int: ...

    def tell(self) -> int: ...


def open_media(file: MediaFile) -> InputContainer:
    """`file` opened by FFmpeg.

    Raises ClipError: `media.empty`, `media.not_media` (text, HTML, JSON or an unknown format) and `media.truncated` (it
    begins like a media file, but the part that describes its streams is missing), or what reading the file raised.
    """
    file.seek(0)
    head = file.read(512)
    check(file)
    if not head:
        raise ClipError("media.empty", "the file has no bytes")
    if _is_text(head):
        raise ClipError("media.not_media", f"the file is text: {head[:60]!r}")
    file.seek(0)
    try:
        # tags may be in any encoding (old WAV files): we read none, and a bad one must not cost the clip
        container: InputContainer = av.open(file, options=_OPTIONS, metadata_errors="replace")
        return container
    except av.error.FFmpegError as e:
        check(file)
        code = "media.truncated" if container_magic(head) else "media.not_media"
        raise ClipError(code, f"{e.strerror}; the file begins {head[:12]!r}") from e


def container_magic(head: bytes) -> bytes | None:
    """The signature that `head` begins with, of the containers whose truncation can be told from other damage."""
    return next((magic for at, magic in _MAGIC if head[at : at + len(magic)] == magic), None)


def check(file: MediaFile) -> None:
    """Raise the error that a RangeReader has latched; other files have none."""
    error = getattr(file, "error", None)
    if error is not None:
        raise error


def audio_of(container: InputContainer) -> AudioStream | None:
    """The best audio stream."""
    return container.streams.best("audio")  # type: ignore[return-value]


def video_of(container: InputContainer) -> VideoStream | None:
    """The best video stream that is not a cover picture; its decoder refuses pictures of more than MAX_PIXELS."""
    best: Any = container.streams.best("video")
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    chosen = cast(VideoStream, best) if best in streams else streams[0] if streams else None
    if chosen is not None and chosen.codec_context is not None and not chosen.codec_context.is_open:
        chosen.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return chosen


def origin(container: InputContainer) -> Fraction:
    """The time, on the file's own clock, at which its recording begins, in seconds.

    Where nothing is amiss it is 0. A fragmented MP4 without an edit list starts its pictures some frames late (the
    encoder's delay) and its sound with them, so a picture stream that begins within 0.2 s of the file sets the clock.
    """
    start = Fraction(container.start_time or 0, 1_000_000)
    video = video_of(container)
    if video is not None and video.start_time is not None:
        first = video.start_time * clock(video)
        if abs(first - start) <= _ENCODER_DELAY_S:
            return first
    audio = audio_of(container)
    if video is None and audio is not None and audio.start_time is not None:
        return audio.start_time * clock(audio)
    return start


def clock(stream: Stream) -> Fraction:
    """The length of one tick of the stream's clock, in seconds. Raises ClipError where it has none."""
    if stream.time_base is None:
        raise ClipError("media.not_media", f"stream {stream.index} has no clock")
    return stream.time_base


def is_cut_off(file: MediaFile) -> bool:
    """Whether the file ends before its own container says (MP4 boxes, a Matroska segment, a RIFF chunk)."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    magic = container_magic(file.read(12))
    if magic == b"ftyp":
        return _mp4_end(file, size) > size
    if magic == b"RIFF":
        file.seek(4)
        declared = int.from_bytes(file.read(4), "little")
        return declared not in (0, 0xFFFFFFFF) and declared + 8 > size + 1  # an odd chunk may lack its padding byte
    if magic == b"\x1aE\xdf\xa3":
        return _matroska_end(file) > size
    return False


def _mp4_end(file: MediaFile, size: int) -> int:
    at = 0
    for _ in range(64):  # each box of a fragmented file may cost one request
        if at >= size:
            break
        file.seek(at)
        box = file.read(16)
        if len(box) < 8:
            return size + 1
        length = int.from_bytes(box[:4], "big")
        if length == 1:
            length = int.from_bytes(box[8:16], "big")
        if length == 0:
            return size
        if length < 8:
            return size + 1
        at += length
    return at


def _matroska_end(file: MediaFile) -> int:
    at = 4
    for _ in range(2):  # the EBML header, then the segment
        file.seek(at)
        field = file.read(8)
        if not field or not field[0]:
            return at
        width = 9 - field[0].bit_length()
        value = int.from_bytes(field[:width], "big") & ((1 << 7 * width) - 1)
        if value == (1 << 7 * width) - 1:
            return 0  # a live muxer does not know its segment's size
        at += width + value
        end, at = at, at + 4
    return end


def _is_text(head: bytes) -> bool:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start in (b"<", b"{", b"["):
        return True
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as e:
        if e.start < len(head) - 3:  # else only the last character is cut
            return False
        text = head[: e.start].decode("utf-8")
    return all(c.isprintable() or c in "\r\n\t" for c in text)
