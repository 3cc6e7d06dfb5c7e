"""Small real recordings by real encoders, for servers that fail."""

from __future__ import annotations

import io
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

FPS = 10
_CODECS = {
    "mp4": ("libx264", "aac", 44_100),
    "matroska": ("libx264", "aac", 44_100),
    "webm": ("libvpx-vp9", "libopus", 48_000),
    "wav": (None, "pcm_s16le", 44_100),
}
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
FASTSTART = {"movflags": "faststart"}


def encode(
    seconds: float,
    container: str = "mp4",
    *,
    size: tuple[int, int] = (160, 120),
    gop_s: float = 2.0,
    noise: int = 0,
    pictures: bool = True,
    sound: bool = True,
    gain: float = 0.4,
    options: dict[str, str] | None = None,
    bit_rate: int | None = None,
) -> bytes:
    """A recording of a moving square over `noise` (0 to 255) and a rising tone."""
    vcodec, acodec, rate = _CODECS[container]
    rng = np.random.default_rng(0)
    width, height = size
    base = rng.integers(0, noise + 1, (16, height, width, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording"  # a real file: `faststart` reads back what was written
        with av.open(str(path), "w", format=container, options=options or {}) as out:
            video: Any = out.add_stream(vcodec, rate=FPS) if vcodec and pictures else None
            if video is not None:
                video.width, video.height, video.pix_fmt, video.gop_size = width, height, "yuv420p", round(gop_s * FPS)
                video.codec_context.thread_count = 1
                fast = {"preset": "ultrafast"} if vcodec == "libx264" else {"deadline": "realtime", "cpu-used": "8"}
                video.options = fast
                if bit_rate:
                    video.bit_rate = bit_rate
            audio: Any = out.add_stream(acodec, rate=rate) if sound else None
            if audio is not None:
                audio.layout = "mono"
            for i in range(round(seconds * FPS)):
                if video is not None:
                    _draw(out, video, base[i % 16], i, width, height)
                if audio is not None:
                    _sing(out, audio, acodec, rate, i, gain)
            for stream in (video, audio):
                if stream is not None:
                    out.mux(stream.encode(None))
        return path.read_bytes()


def repeated(data: bytes, n: int, container: str, options: dict[str, str] | None = None) -> bytes:
    """A recording `n` times over, without encoding it again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording"
        with av.open(str(path), "w", format=container, options=options or {}) as out:
            shift_s = Fraction(0)
            copies: dict[int, Any] = {}
            for _ in range(n):
                with av.open(io.BytesIO(data)) as part:
                    copies = copies or {s.index: out.add_stream_from_template(s) for s in part.streams}
                    end_s = shift_s
                    for packet in part.demux():
                        if packet.size:
                            ticks = round(shift_s / packet.time_base)
                            end_s = max(end_s, shift_s + (packet.pts + (packet.duration or 0)) * packet.time_base)
                            packet.pts += ticks
                            packet.dts = packet.pts if packet.dts is None else packet.dts + ticks
                            packet.stream = copies[packet.stream.index]
                            out.mux(packet)
                shift_s = end_s + Fraction(1, 10)  # a gap: the first packets may lie before 0
        return path.read_bytes()


def _draw(out: Any, video: Any, base: np.ndarray, i: int, width: int, height: int) -> None:
    picture = base.copy()
    left = 3 * i % (width - 20)
    picture[height // 3 : height // 2, left : left + 20] = 230
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    frame.pts, frame.time_base = i, Fraction(1, FPS)
    out.mux(video.encode(frame))


def _sing(out: Any, audio: Any, codec: str, rate: int, i: int, gain: float) -> None:
    n = rate // FPS
    t = (i * n + np.arange(n)) / rate
    wave = (gain * np.sin(2 * np.pi * (300 + 5 * t) * t)).astype(np.float32)[None]
    if codec == "pcm_s16le":
        chunk = av.AudioFrame.from_ndarray(np.round(wave * 32767).astype(np.int16), format="s16", layout="mono")
    else:
        chunk = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
    chunk.sample_rate, chunk.pts, chunk.time_base = rate, i * n, Fraction(1, rate)
    out.mux(audio.encode(chunk))
