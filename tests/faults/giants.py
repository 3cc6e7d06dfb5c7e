"""Files that are small and say, or hold, something huge."""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

RATE_HZ = 8_000
_PIECE_S = 60
STEP_S = 61  # a codec's padding must not reach into the next piece


def long_recording(hours: float, container: str = "matroska", acodec: str = "flac") -> bytes:
    """One tiny picture a second and a constant sound: an hour takes 0.4 MB.

    A minute is encoded; its packets are written again and again, each time STEP_S later.
    """
    piece = _minute(acodec)
    buffer = io.BytesIO()
    with av.open(io.BytesIO(piece)) as source, av.open(buffer, "w", format=container) as out:
        copies: dict[int, Any] = {s.index: out.add_stream_from_template(s) for s in source.streams}
        packets = [p for p in source.demux() if p.size]
        step = {i: round(STEP_S / source.streams[i].time_base) for i in copies}
        for minute in range(math.ceil(hours * 3600 / STEP_S)):
            for packet in packets:
                copy: av.Packet[Any] = av.Packet(packet)
                copy.time_base, copy.is_keyframe = packet.time_base, packet.is_keyframe
                copy.pts = packet.pts + minute * step[packet.stream.index]
                copy.dts, copy.duration = copy.pts, packet.duration
                copy.stream = copies[packet.stream.index]
                out.mux_one(copy)
    return buffer.getvalue()


def _minute(acodec: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        video: Any = out.add_stream("libx264", rate=1)
        video.width, video.height, video.pix_fmt, video.gop_size = 32, 32, "yuv420p", 10
        video.codec_context.thread_count, video.options = 1, {"bf": "0", "preset": "ultrafast"}
        audio: Any = out.add_stream(acodec, rate=RATE_HZ)
        audio.layout = "mono"
        form = "fltp" if acodec == "aac" else "s16"
        for i in range(_PIECE_S):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 3 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1)
            out.mux(video.encode(frame))
            level = np.full((1, RATE_HZ), 0.3 if acodec == "aac" else 9_000, np.float32 if form == "fltp" else np.int16)
            chunk = av.AudioFrame.from_ndarray(level, format=form, layout="mono")
            chunk.sample_rate, chunk.pts, chunk.time_base = RATE_HZ, i * RATE_HZ, Fraction(1, RATE_HZ)
            out.mux(audio.encode(chunk))
        for stream in (video, audio):
            out.mux(stream.encode(None))
    return buffer.getvalue()


def with_sound(pictures: list[bytes], codec: str, container: str = "matroska") -> bytes:
    """Encoded `pictures`, ten a second, each a keyframe, beside as much sound."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        video: Any = out.add_stream(codec, rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        audio: Any = out.add_stream("pcm_s16le", rate=RATE_HZ)
        audio.layout = "mono"
        for i, data in enumerate(pictures):
            packet: av.Packet[Any] = av.Packet(data)
            packet.pts = packet.dts = i
            packet.time_base, packet.is_keyframe, packet.stream = Fraction(1, 10), True, video
            out.mux_one(packet)
            tone = (9_000 * np.sin(np.arange(RATE_HZ // 10) / 3)).astype(np.int16)[None]
            chunk = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            chunk.sample_rate, chunk.pts, chunk.time_base = RATE_HZ, i * RATE_HZ // 10, Fraction(1, RATE_HZ)
            out.mux(audio.encode(chunk))
        out.mux(audio.encode(None))
    return buffer.getvalue()


def jpeg_of(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height), 90).save(buffer, "JPEG", quality=30)
    return buffer.getvalue()


def jpeg_that_lies(width: int, height: int) -> bytes:
    """A small picture whose frame header says another size."""
    data = jpeg_of(64, 48)
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def encoded(codec: str, width: int, height: int, n: int, **options: str) -> list[bytes]:
    """`n` grey pictures as packets, each a keyframe."""
    context: Any = av.CodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt, context.time_base = width, height, "yuv420p", Fraction(1, 10)
    context.thread_count, context.gop_size, context.options = 1, 1, options
    frame = av.VideoFrame(width, height, "yuv420p")
    for plane in frame.planes:
        plane.update(b"\x60" * plane.buffer_size)
    packets = []
    for i in range(n):
        frame.pts = i
        packets += [bytes(p) for p in context.encode(frame)]
    return packets + [bytes(p) for p in context.encode(None)]


def vp8_that_lies(width: int, height: int, n: int) -> list[bytes]:
    """Keyframes whose heads say another size: 14 bits each behind the start code (RFC 6386, 9.1)."""
    pictures = encoded("libvpx", 64, 48, n, deadline="realtime")
    return [p[:6] + struct.pack("<HH", width, height) + p[10:] for p in pictures]


def vp9_that_lies(width: int, height: int, n: int) -> list[bytes]:
    """Keyframes whose heads say another size: 16 bits each, less one, from bit 36 on (VP9 bitstream, 6.2)."""
    pictures = encoded("libvpx-vp9", 64, 48, n, deadline="realtime")
    size = (width - 1) << 16 | height - 1
    return [
        (int.from_bytes(p[:9], "big") & ~(0xFFFFFFFF << 4) | size << 4).to_bytes(9, "big") + p[9:] for p in pictures
    ]


def h264_that_lies(width: int, height: int, n: int) -> list[bytes]:
    """Pictures whose sequence parameters say another size (ITU-T H.264, 7.3.2.1.1), for containers of start codes."""
    units = [
        [unit for unit in re.split(b"\0\0\0?\1", picture) if unit]
        for picture in encoded("libx264", 64, 48, n, profile="baseline", preset="ultrafast", tune="zerolatency")
    ]
    return [
        b"".join(b"\0\0\0\1" + (_resized(u, width // 16, height // 16) if u[0] & 31 == 7 else u) for u in picture)
        for picture in units
    ]


def _resized(sps: bytes, width_blocks: int, height_blocks: int) -> bytes:
    """The baseline sequence parameters `sps` with another width and height in blocks of 16."""
    body = sps[4:].replace(b"\0\0\3", b"\0\0")
    bits = "".join(f"{b:08b}" for b in body).rstrip("0")[:-1]  # without the stop bit
    numbers = _golomb(bits)
    at = 0
    for _ in range(3):  # its id, log2_max_frame_num - 4, pic_order_cnt_type
        value, at = next(numbers)
    if value == 0:
        _, at = next(numbers)
    _, at = next(numbers)  # max_num_ref_frames
    head = bits[: at + 1]  # and gaps_in_frame_num_allowed
    rest = _golomb(bits, at + 1)
    next(rest)
    _, end = next(rest)
    new = head + _as_golomb(width_blocks - 1) + _as_golomb(height_blocks - 1) + bits[end:] + "1"
    new += "0" * (-len(new) % 8)
    raw = bytes(int(new[i : i + 8], 2) for i in range(0, len(new), 8))
    for n in range(4):  # three bytes that would be taken for a start code
        raw = raw.replace(bytes([0, 0, n]), bytes([0, 0, 3, n]))
    return sps[:4] + raw


def _golomb(bits: str, at: int = 0) -> Iterator[tuple[int, int]]:
    """The unsigned Exp-Golomb numbers from bit `at` on, each with the bit behind it."""
    while True:
        zeros = bits.index("1", at) - at
        end = at + 2 * zeros + 1
        yield int(bits[at + zeros : end], 2) - 1, end
        at = end


def _as_golomb(value: int) -> str:
    digits = f"{value + 1:b}"
    return "0" * (len(digits) - 1) + digits


def wav_that_lies(
    claimed: int, *, riff: int | None = None, channels: int = 1, align: int = 2, rate: int = RATE_HZ
) -> bytes:
    """A second of sound in a file that claims so many bytes of it."""
    tone = (9_000 * np.sin(np.arange(RATE_HZ) / 3)).astype("<i2").tobytes()
    head = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * align, align, 16)
    return (
        b"RIFF"
        + struct.pack("<I", min(claimed + 36, 0xFFFFFFFF) if riff is None else riff)
        + head
        + b"data"
        + struct.pack("<I", claimed)
        + tone
    )
