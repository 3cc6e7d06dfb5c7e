"""Good recordings by real encoders, and files that were broken from them: the same seed gives the same bytes."""

from __future__ import annotations

import itertools
import random
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

SECONDS = 2.0
_FPS = 10
_SIZE = (64, 48)

# name -> container, picture codec, sound codec, its rate, the muxer's options
_FORMATS: dict[str, tuple[str, str | None, str, int, dict[str, str]]] = {
    "mp4": ("mp4", "libx264", "aac", 44_100, {}),
    "faststart": ("mp4", "libx264", "aac", 44_100, {"movflags": "faststart"}),
    "fragmented": ("mp4", "libx264", "aac", 44_100, {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    "matroska": ("matroska", "libx264", "aac", 44_100, {}),
    "webm": ("webm", "libvpx-vp9", "libopus", 48_000, {}),
    "vp8": ("matroska", "libvpx", "libopus", 48_000, {}),
    "mpegts": ("mpegts", "libx264", "aac", 44_100, {}),
    "avi": ("avi", "mpeg4", "libmp3lame", 44_100, {}),
    "wav": ("wav", None, "pcm_s16le", 22_050, {}),
    "adpcm": ("wav", None, "adpcm_ms", 22_050, {}),
    "flac": ("flac", None, "flac", 22_050, {}),
    "mp3": ("mp3", None, "libmp3lame", 44_100, {}),
    "ogg": ("ogg", None, "libopus", 48_000, {}),
    "oggflac": ("ogg", None, "flac", 22_050, {}),
    "m4a": ("mp4", None, "alac", 22_050, {}),
}
SOUND_ONLY = frozenset(name for name, how in _FORMATS.items() if how[1] is None)


def recordings(names: tuple[str, ...] = tuple(_FORMATS)) -> dict[str, bytes]:
    """Two seconds of moving pictures, where the format holds pictures, and of a rising tone."""
    return {name: _encode(*_FORMATS[name]) for name in names}


def _encode(container: str, vcodec: str | None, acodec: str, rate: int, options: dict[str, str]) -> bytes:
    with (
        tempfile.TemporaryDirectory() as folder,  # a real file: `faststart` reads back what was written
        av.open(
            str(path := Path(folder) / "recording"), "w", format=container, options={"fflags": "bitexact", **options}
        ) as out,
    ):
        video: Any = out.add_stream(vcodec, rate=_FPS) if vcodec else None
        if video is not None:
            video.width, video.height, video.pix_fmt, video.gop_size = *_SIZE, "yuv420p", 8
            video.codec_context.thread_count = 1
            video.options = {
                "libx264": {"preset": "veryfast", "bf": "2"},
                "mpeg4": {},
            }.get(vcodec or "", {"deadline": "realtime", "cpu-used": "8"})
        audio: Any = out.add_stream(acodec, rate=rate)
        audio.layout = "stereo"
        shapes = {"pcm_s16le": "s16", "adpcm_ms": "s16p", "flac": "s16", "alac": "s16p"}
        resampler = av.AudioResampler(shapes.get(acodec, "flt" if acodec == "libopus" else "fltp"), "stereo", rate)
        for i in range(round(SECONDS * _FPS)):
            if video is not None:
                out.mux(video.encode(_picture(i)))
            for chunk in resampler.resample(_tone(i, rate)):
                out.mux(audio.encode(chunk))
        for stream in (video, audio):
            if stream is not None:
                out.mux(stream.encode(None))
        out.close()
        return path.read_bytes()


def _picture(i: int) -> av.VideoFrame:
    width, height = _SIZE
    image = np.random.default_rng(i).integers(0, 60, (height, width, 3), dtype=np.uint8)
    image[10:30, 2 * i : 2 * i + 20] = 230
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
    frame.pts, frame.time_base = i, Fraction(1, _FPS)
    return frame


def _tone(i: int, rate: int) -> av.AudioFrame:
    n = rate // _FPS
    t = (i * n + np.arange(n)) / rate
    wave = np.stack([0.4 * np.sin(2 * np.pi * (300 + 50 * t) * t), 0.3 * np.sin(2 * np.pi * 700 * t)])
    chunk = av.AudioFrame.from_ndarray(wave.astype(np.float32), format="fltp", layout="stereo")
    chunk.sample_rate, chunk.pts, chunk.time_base = rate, i * n, Fraction(1, rate)
    return chunk


@dataclass(frozen=True)
class Mutant:
    """`data` was made from the recording `origin` by `kind`; `name` is all that is needed to make it again."""

    name: str
    origin: str
    kind: str
    data: bytes


def mutants(good: Mapping[str, bytes], n: int, seed: int = 0) -> Iterator[Mutant]:
    """`n` files, all different and none of them good, of each kind from each recording in turn."""
    names, kinds = list(good), list(KINDS)
    seen = set(good.values())
    for i in range(n):
        origin, kind = names[i % len(names)], kinds[(i % len(names) + i // len(names)) % len(kinds)]
        for attempt in itertools.count():
            kind = kind if attempt < 20 else "random_bytes"  # some kinds have few ways to break a simple file
            found = mutant(good, f"{seed}/{origin}/{kind}/{i}/{attempt}")
            if found.data not in seen:
                break
        seen.add(found.data)
        yield found


def mutant(good: Mapping[str, bytes], name: str) -> Mutant:
    """The mutant that was given this name: its recording, its kind and the seed of its chances."""
    _, origin, kind, *_ = name.split("/")
    return Mutant(name, origin, kind, KINDS[kind](random.Random(name), good[origin], good))


Good = Mapping[str, bytes]


def _truncated(r: random.Random, data: bytes, good: Good) -> bytes:
    """Cut off anywhere, or where it hurts: in the first bytes, at the start of a part, just before the end."""
    parts = [at for at, _, _ in fields(data)] or [0]
    at = r.choice([r.randrange(len(data)), r.randrange(64), r.choice(parts), len(data) - r.randrange(1, 32)])
    return data[: max(0, min(len(data), at + r.choice([0, 0, 1, 4, 8, 9])))]


def _beheaded(r: random.Random, data: bytes, good: Good) -> bytes:
    return data[r.choice([1, 4, 8, r.randrange(len(data)), r.randrange(512)]) :]


def _flipped(r: random.Random, data: bytes, places: list[int]) -> bytes:
    out = bytearray(data)
    for at in places:
        out[at] ^= 1 << r.randrange(8)
    return bytes(out)


def _few_bits(r: random.Random, data: bytes, good: Good) -> bytes:
    return _flipped(r, data, [r.randrange(len(data)) for _ in range(r.randint(1, 8))])


def _many_bits(r: random.Random, data: bytes, good: Good) -> bytes:
    n = max(1, int(len(data) * r.choice([0.0005, 0.002, 0.01, 0.05])))
    return _flipped(r, data, [r.randrange(len(data)) for _ in range(n)])


def _head_bits(r: random.Random, data: bytes, good: Good) -> bytes:
    return _flipped(r, data, [r.randrange(min(4096, len(data))) for _ in range(r.randint(1, 24))])


def _table_bits(r: random.Random, data: bytes, good: Good) -> bytes:
    """In what describes the streams: the boxes of an MP4 file, the elements of a Matroska one, heads of pages."""
    places = [p for at, head, body in fields(data) for p in range(at, min(len(data), at + head + min(body, 64)))]
    return _flipped(r, data, [r.choice(places or [0]) for _ in range(r.randint(1, 6))])


def _random_bytes(r: random.Random, data: bytes, good: Good) -> bytes:
    a, b = _stretch(r, data)
    return data[:a] + r.randbytes(b - a) + data[b:]


def _zeroed(r: random.Random, data: bytes, good: Good) -> bytes:
    a, b = _stretch(r, data)
    return data[:a] + bytes([r.choice([0, 0, 255])]) * (b - a) + data[b:]


def _removed(r: random.Random, data: bytes, good: Good) -> bytes:
    a, b = _stretch(r, data)
    return data[:a] + data[b:]


def _doubled(r: random.Random, data: bytes, good: Good) -> bytes:
    a, b = _stretch(r, data)
    return data[:b] + data[a:b] * r.choice([1, 1, 5]) + data[b:]


def _exchanged(r: random.Random, data: bytes, good: Good) -> bytes:
    a, b, c, d = sorted(r.randrange(len(data)) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _spliced(r: random.Random, data: bytes, good: Good) -> bytes:
    """The beginning of one file and the end of another, or of the same."""
    other = good[r.choice(list(good))]
    return data[: r.randrange(len(data))] + other[r.randrange(len(other)) :]


def _lying_sizes(r: random.Random, data: bytes, good: Good) -> bytes:
    """Sizes of parts that are not theirs."""
    out = bytearray(data)
    found = fields(data)
    if len(found) < 2:
        return _lying_numbers(r, data, good)
    for at, head, _ in r.sample(found, min(len(found), r.randint(1, 2))):
        _put(out, at + _size_at(data, at, head), r.choice(_HUGE), data)
    return bytes(out)


def _lying_numbers(r: random.Random, data: bytes, good: Good) -> bytes:
    """Counts, times, rates and dimensions that no recording has, in what describes the streams."""
    out = bytearray(data)
    named = [(at, head, body) for at, head, body in fields(data) if 4 <= body <= 400]
    for _ in range(r.randint(1, 3)):
        if named:
            at, head, body = r.choice(named)
            _put(out, at + head + r.randrange(0, body - 3), r.choice(_HUGE), data)
        else:
            _put(out, r.randrange(4, min(200, len(data) - 4)), r.choice(_HUGE), data)
    return bytes(out)


def _swapped_tracks(r: random.Random, data: bytes, good: Good) -> bytes:
    """Sound said to be pictures and the reverse, by handler, codec, number or setup; heads of other codecs."""
    swaps = [(a, b) for a, b in _TWINS if a in data or b in data]
    if not swaps:
        return _lying_numbers(r, data, good)
    for a, b in r.sample(swaps, min(len(swaps), r.randint(1, 3))):
        data = data.replace(a, b"\0\r\n\0" * 4).replace(b, a).replace(b"\0\r\n\0" * 4, b)
    return data


def _put(out: bytearray, at: int, value: int, data: bytes) -> None:
    order = ">" if data[4:8] == b"ftyp" or data[:4] == b"\x1aE\xdf\xa3" else "<"
    if 0 <= at <= len(out) - 4:
        out[at : at + 4] = struct.pack(order + "I", value)


_HUGE = (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0x7FFFFF00, 0x40000000, 0x00FFFFFF, 0x10000, 1, 0)
_TWINS = (
    (b"vide", b"soun"),
    (b"vmhd", b"smhd"),
    (b"avc1", b"mp4a"),
    (b"avcC", b"esds"),
    (b"alac", b"mp4a"),
    (b"avc1", b"hvc1"),
    (b"stts", b"ctts"),
    (b"stsz", b"stco"),
    (b"A_AAC\0\0", b"A_OPUS\0"),
    (b"V_VP9", b"V_VP8"),
    (b"\x86\x86A_OPUS", b"\x86\x86A_DTS\0"),
    (b"\x83\x81\x01", b"\x83\x81\x02"),  # Matroska: the track's type
    (b"\xd7\x81\x01", b"\xd7\x81\x02"),  # its number
    (b"\xa3", b"\xa1"),
    (b"fmt \x10\0\0\0\x01\0", b"fmt \x10\0\0\0\x03\0"),  # WAV: 16-bit numbers as floats
    (b"fmt \x10\0\0\0\x01\0\x02\0", b"fmt \x10\0\0\0\x01\0\xff\0"),  # 255 channels
    (b"\x02\0\x22\x56\0\0", b"\x02\0\x55\0\0\0"),
    (b"OpusHead\x01\x02", b"OpusHead\x01\xff"),
    (b"OpusHead", b"\x7fFLAC\x01\0\0"),
    (b"\x47\x41\x00", b"\x47\x41\x01"),  # MPEG-TS: the streams' numbers
    (b"\x1b\xe1\x00", b"\x0f\xe1\x01"),
    (b"00dc", b"01wb"),
    (b"vids", b"auds"),
    (b"FMP4", b"MJPG"),
    (b"\xff\xfb", b"\xff\xf3"),  # MP3: MPEG 1 as MPEG 2
    (b"fLaC\0\0\0\x22", b"fLaC\x81\0\0\x22"),
)


def _stretch(r: random.Random, data: bytes) -> tuple[int, int]:
    a = r.randrange(len(data))
    return a, min(len(data), a + r.choice([1, 4, 16, 100, 1000, r.randrange(1, len(data) + 1)]))


KINDS: dict[str, Callable[[random.Random, bytes, Good], bytes]] = {
    "truncated": _truncated,
    "few_bits": _few_bits,
    "swapped_tracks": _swapped_tracks,
    "lying_numbers": _lying_numbers,
    "head_bits": _head_bits,
    "table_bits": _table_bits,
    "lying_sizes": _lying_sizes,
    "many_bits": _many_bits,
    "beheaded": _beheaded,
    "random_bytes": _random_bytes,
    "zeroed": _zeroed,
    "removed": _removed,
    "doubled": _doubled,
    "exchanged": _exchanged,
    "spliced": _spliced,
}


# The parts of a file: (offset, bytes of the head, bytes of the body), those within others as well.
Field = tuple[int, int, int]
_BOXES = frozenset(b"moov trak mdia minf stbl dinf edts moof traf mvex udta meta stsd avc1 mp4a".split())


def fields(data: bytes) -> list[Field]:
    """The parts of an MP4, Matroska, RIFF, Ogg, FLAC, MPEG-TS or MP3 file."""
    if data[4:8] == b"ftyp":
        return list(_boxes(data, 0, len(data)))
    if data[:4] == b"\x1aE\xdf\xa3":
        return list(_elements(data, 0, len(data)))
    if data[:4] == b"RIFF":
        return list(_chunks(data, 12, len(data)))
    if data[:4] == b"OggS":
        return [(at, 27, 16) for at in _all(data, b"OggS")]
    if data[:4] == b"fLaC":
        return [(4, 4, 34)]
    if data[:1] == b"\x47":
        return [(at, 4, 184) for at in range(0, len(data) - 187, 188)]
    return [(at, 4, 32) for at in _all(data, b"\xff\xfb")]


def _all(data: bytes, mark: bytes) -> Iterator[int]:
    at = data.find(mark)
    while at >= 0:
        yield at
        at = data.find(mark, at + 1)


def _boxes(data: bytes, at: int, end: int) -> Iterator[Field]:
    while at + 8 <= end:
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size < 8 or at + size > end:
            return
        yield at, 8, size - 8
        if kind in _BOXES:
            skip = {b"meta": 4, b"stsd": 8, b"avc1": 78, b"mp4a": 28}.get(kind, 0)
            yield from _boxes(data, at + 8 + skip, at + size)
        at += size


_MASTERS = frozenset({0x18538067, 0x1654AE6B, 0xAE, 0xE0, 0xE1, 0x1F43B675, 0x1C53BB6B, 0xBB, 0xB7, 0x1549A966, 0xA0})


def _elements(data: bytes, at: int, end: int) -> Iterator[Field]:
    while at < end and data[at]:
        n_id = 9 - data[at].bit_length()
        if at + n_id >= end or not data[at + n_id]:
            return
        n_size = 9 - data[at + n_id].bit_length()
        size = int.from_bytes(data[at + n_id : at + n_id + n_size], "big") & ((1 << 7 * n_size) - 1)
        stop = min(end, at + n_id + n_size + size)
        yield at, n_id + n_size, stop - at - n_id - n_size
        if int.from_bytes(data[at : at + n_id], "big") in _MASTERS:
            yield from _elements(data, at + n_id + n_size, stop)
        at = stop


def _chunks(data: bytes, at: int, end: int) -> Iterator[Field]:
    while at + 8 <= end:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        yield at, 8, min(size, end - at - 8)
        if data[at : at + 4] == b"LIST":
            yield from _chunks(data, at + 12, min(end, at + 8 + size))
        at += 8 + size + size % 2


def _size_at(data: bytes, at: int, head: int) -> int:
    """Where in a part's head its size is."""
    if data[4:8] == b"ftyp":
        return 0
    if data[:4] == b"RIFF":
        return 4
    if data[:4] == b"OggS":
        return 26 - 3  # the last bytes of the checksum and the number of segments
    return max(0, head - 4)
