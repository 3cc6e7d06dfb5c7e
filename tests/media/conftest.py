"""Small real media made by real encoders, and a server that fails in all the ways servers fail."""

from __future__ import annotations

import contextlib
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

N_BITS = 10  # the picture's number, painted as ten bars


def painted(number: int, width: int, height: int) -> np.ndarray:
    image = np.full((height, width, 3), 40, np.uint8)
    step = width // N_BITS
    for bit in range(N_BITS):
        if number >> bit & 1:
            image[10:-10, step * bit + 2 : step * (bit + 1) - 2] = 220
    return image


def read_number(image: np.ndarray) -> int:
    step = image.shape[1] // N_BITS
    middle = image.shape[0] // 2
    return sum(int(image[middle, step * b + step // 2].mean() > 130) << b for b in range(N_BITS))


def sound(seconds: float, rate: int, channels: int = 2) -> np.ndarray:
    """A rising tone on the left, another on the right; where it is in time can be told to the sample."""
    t = np.arange(round(seconds * rate)) / rate
    both = np.stack([0.4 * np.sin(2 * np.pi * (200 + 60 * t) * t), 0.3 * np.sin(2 * np.pi * (500 + 35 * t) * t)])
    return both[:channels].astype(np.float32)


def make(
    container: str = "mp4",
    *,
    vcodec: str | None = "libx264",
    acodec: str | None = "aac",
    seconds: float = 6.0,
    fps: Fraction | int = 25,
    gop: int = 40,
    b_frames: int = 2,
    rate: int = 44100,
    channels: int = 2,
    size: tuple[int, int] = (160, 96),
    options: dict[str, str] | None = None,
    gain: float = 1.0,
    audio_seconds: float | None = None,
    video_seconds: float | None = None,
    video_ticks: Callable[[int], int] = lambda i: i,
    tick: Fraction | None = None,
) -> bytes:
    """A recording whose picture `i` shows the number `i` and whose sound is `sound()`."""
    folder = tempfile.TemporaryDirectory()  # a real file: `faststart` reads back what was written
    path = Path(folder.name) / "recording"
    out: Any = av.open(str(path), "w", format=container, options=options or {})
    layout = "stereo" if channels == 2 else "mono"
    video = audio = None
    if vcodec:
        video = out.add_stream(vcodec, rate=fps)
        video.width, video.height = size
        video.pix_fmt = "yuv420p"
        video.gop_size = gop
        video.codec_context.thread_count = 1
        video.options = (
            {"bf": str(b_frames), "preset": "veryfast"}
            if vcodec == "libx264"
            else {"deadline": "realtime", "cpu-used": "8"}
        )
        if tick:
            video.codec_context.time_base = tick
    if acodec:
        audio = out.add_stream(acodec, rate=rate)
        audio.layout = layout
    wave = sound(audio_seconds or seconds, rate, channels) * gain
    n_pictures = int((video_seconds or seconds) * fps)
    step = rate // 10
    events = [(float(i / fps), 0, i) for i in range(n_pictures)] if vcodec else []
    if acodec:
        events += [(i * 0.1, 1, i * step) for i in range(-(-wave.shape[1] // step))]
    for _, kind, i in sorted(events):
        if kind == 0:
            picture = av.VideoFrame.from_ndarray(painted(i, *size), format="rgb24")
            picture.pts, picture.time_base = video_ticks(i), tick or 1 / Fraction(fps)
            for packet in video.encode(picture):
                out.mux(packet)
        else:
            planar = np.ascontiguousarray(wave[:, i : i + step])
            if acodec in ("pcm_s16le", "flac"):
                packed = np.ascontiguousarray(
                    np.round(np.clip(planar.T, -1, 1) * 32767).astype(np.int16).reshape(1, -1)
                )
                chunk = av.AudioFrame.from_ndarray(packed, format="s16", layout=layout)
            else:
                chunk = av.AudioFrame.from_ndarray(planar, format="fltp", layout=layout)
            chunk.sample_rate, chunk.pts, chunk.time_base = rate, i, Fraction(1, rate)
            for packet in audio.encode(chunk):
                out.mux(packet)
    for stream in (video, audio):
        for packet in stream.encode(None) if stream else ():
            out.mux(packet)
    out.close()
    with folder:
        return path.read_bytes()


@dataclass
class FaultServer:
    """Serves `files` by path with Range; `faults` maps a path to what goes wrong with it."""

    base: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[str, str, str]] = field(default_factory=list)  # (host header, path, range)
    connections: int = 0

    def url(self, path: str) -> str:
        return f"{self.base}/{path}"


def _handler(state: FaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            state.connections += 1
            super().setup()

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path = re.sub(r"^https?://[^/]+", "", self.path).lstrip("/")
            asked = self.headers.get("Range", "")
            state.seen.append((self.path, path, asked))
            fault = state.faults.get(path, "")
            if fault.isdecimal() and int(fault) >= 400:
                return self._plain(int(fault), b"no", "text/plain")
            if fault.startswith("redirect:"):
                self.send_response(302)
                self.send_header("Location", fault.removeprefix("redirect:"))
                self.send_header("Content-Length", "0")
                return self.end_headers()
            if fault == "html":
                return self._plain(200, b"<!DOCTYPE html><html><body>Before you continue</body></html>", "text/html")
            if path not in state.files:
                return self._plain(404, b"no", "text/plain")
            data = state.files[path]
            if fault == "no_range":
                return self._plain(200, data, "video/mp4")
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
            assert match, "the reader always asks for a range"
            first, last = int(match[1]), min(int(match[2]), len(data) - 1)
            if first >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            body = data[first : last + 1]
            shift = 5 if fault == "wrong_range" else 0
            total = "*" if fault == "no_size" else len(data) + (100 if fault == "grows" and first else 0)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first + shift}-{last + shift}/{total}")
            self.send_header("Content-Length", str(len(body)))
            if fault == "close":
                self.send_header("Connection", "close")
            self.end_headers()
            late = first > 0 or len(data) <= 300_000
            if fault == "cut" and late:
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return None
            if fault == "stall" and late:
                self.wfile.write(body[:100])
                self.wfile.flush()
                time.sleep(1.5)
                self.close_connection = True
                return None
            if fault == "reset" and late:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.connection.close()
                self.close_connection = True
                return None
            self.wfile.write(body)
            if fault == "quiet_close":  # closes a connection that it promised to keep
                self.close_connection = True
            return None

        def _plain(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):  # the fault closed the socket
                super().finish()

    return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    state = FaultServer()

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass

    with Quiet(("127.0.0.1", 0), _handler(state)) as http:
        state.base = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def lab() -> Any:
    """The makers above, as a namespace: test modules cannot import a conftest."""

    class Lab:
        make = staticmethod(make)
        sound = staticmethod(sound)
        read_number = staticmethod(read_number)

    return Lab


FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
RECORDINGS: dict[str, dict[str, Any]] = {
    "mp4": {},
    "b_frames": {"b_frames": 3, "gop": 60},
    "intra": {"gop": 1, "b_frames": 0},
    "fragmented": {"options": FRAGMENTED},
    "faststart": {"options": {"movflags": "faststart"}},
    "ntsc": {"fps": Fraction(30000, 1001)},
    "mono_16k": {"rate": 16000, "channels": 1},
    "vp9_opus_webm": {"container": "webm", "vcodec": "libvpx-vp9", "acodec": "libopus", "rate": 48000},
    "matroska": {"container": "matroska"},
    # pictures at irregular times: picture i at (i + i % 3 / 4) / 25 s
    "vfr": {"tick": Fraction(1, 10000), "video_ticks": lambda i: i * 400 + i % 3 * 100},
    "vp8_mkv": {"container": "matroska", "vcodec": "libvpx", "acodec": "libopus", "rate": 48000},
}


@pytest.fixture(scope="session", params=sorted(RECORDINGS))
def recording(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], bytes]:
    """(name, how it was made, its bytes), once for each kind."""
    how = RECORDINGS[request.param]
    return request.param, how, make(**how)
