"""Ten seconds of a four-minute video: bytes that the host serves, and seconds, of harken and of yt-dlp.

The host is on loopback, once as fast as it goes and once at 1.5 MB/s. harken reads by Range and copies the packets;
yt-dlp downloads the whole file (its cutting not counted), or the section through its own ffmpeg (`download_ranges`),
if there is an ffmpeg: on the path, or brought by the package imageio-ffmpeg.
"""

from __future__ import annotations

import re
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np

import interleaved
from harken.media.range_reader import RangeReader
from harken.media.section import cut

LENGTH_S, START_S, END_S = 240, 103.0, 113.0
SIZE, FPS, KEY_FRAME_EVERY, RATE_HZ = (640, 360), 25, 125, 44_100
VIDEO_BPS, AUDIO_BPS = 330_000, 128_000
THROTTLE = 1_500_000  # bytes/s
ROUNDS = 3
_PIECE = 16 * 1024


@dataclass
class Host:
    """One file by Range, at most `per_s` bytes a second over all connections (None: no limit)."""

    data: bytes
    per_s: float | None = None
    url: str = ""
    n_bytes: int = 0
    n_requests: int = 0
    free_at: float = 0.0

    def pace(self, n: int) -> None:
        if self.per_s is not None:
            self.free_at = max(self.free_at, time.monotonic()) + n / self.per_s
            time.sleep(max(0.0, self.free_at - time.monotonic()))


@contextmanager
def serve(host: Host) -> Iterator[Host]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            # what lies in socket buffers was served but may never be read: keep that small
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
            super().setup()

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            host.n_requests += 1
            size = len(host.data)
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first, last = (int(asked[1]), min(int(asked[2] or size), size - 1)) if asked else (0, size - 1)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Type", "video/mp4")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(last - first + 1))
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            for at in range(first, last + 1, _PIECE) if with_body else ():
                piece = host.data[at : min(at + _PIECE, last + 1)]
                host.pace(len(piece))
                self.wfile.write(piece)
                host.n_bytes += len(piece)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Who has enough hangs up."""

    with Server(("127.0.0.1", 0), Handler) as http:
        host.url = f"http://127.0.0.1:{http.server_address[1]}/recording.mp4"
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield host
        http.shutdown()


def recording() -> bytes:
    """H.264 and AAC in MP4, its index in front: a square over drifting noise, and noise."""
    rng = np.random.default_rng(0)
    width, height = SIZE
    base = rng.integers(0, 60, (height, 2 * width, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording.mp4"
        with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
            video: Any = out.add_stream("libx264", rate=FPS)
            video.width, video.height, video.pix_fmt, video.bit_rate = width, height, "yuv420p", VIDEO_BPS
            video.gop_size, video.options = KEY_FRAME_EVERY, {"preset": "ultrafast"}
            audio: Any = out.add_stream("aac", rate=RATE_HZ)
            audio.layout, audio.bit_rate = "stereo", AUDIO_BPS
            for i in range(LENGTH_S * FPS):
                picture = base[:, i // 25 % width :][:, :width].copy()
                picture[100:180, 3 * i % (width - 80) :][:, :80] = 230
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, FPS)
                out.mux(video.encode(frame))
                sound = (0.1 * rng.standard_normal((2, RATE_HZ // FPS))).astype(np.float32)
                chunk = av.AudioFrame.from_ndarray(sound, format="fltp", layout="stereo")
                chunk.sample_rate, chunk.pts, chunk.time_base = RATE_HZ, i * sound.shape[1], Fraction(1, RATE_HZ)
                out.mux(audio.encode(chunk))
            out.mux(video.encode(None))
            out.mux(audio.encode(None))
        return path.read_bytes()


def ours(block_bytes: int, url: str) -> None:
    with RangeReader(url, timeout_s=20, block_bytes=block_bytes) as reader:
        section = cut(reader, START_S, END_S, True)
    if abs(section.decoded_s - (END_S - START_S)) > 0.01:
        raise SystemExit(f"harken cut {section.decoded_s} s")


def yt_dlp_download(ffmpeg: str | None, url: str) -> None:
    """The whole file, or the section where yt-dlp is given an ffmpeg to read it with."""
    import yt_dlp
    from yt_dlp.utils import download_range_func

    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "quiet": True,
            "noprogress": True,
            "outtmpl": f"{folder}/clip.%(ext)s",
            "cachedir": False,
            "socket_timeout": 20,
        }
        if ffmpeg:
            options |= {"ffmpeg_location": ffmpeg, "download_ranges": download_range_func(None, [(START_S, END_S)])}
        info = {"id": "clip", "title": "clip", "url": url, "ext": "mp4", "duration": LENGTH_S}
        info |= {"vcodec": "avc1", "acodec": "mp4a", "extractor": "bench", "extractor_key": "Bench", "webpage_url": url}
        with yt_dlp.YoutubeDL(options, auto_init=False) as ydl:
            ydl.process_ie_result(info, download=True)
        if not any(p.stat().st_size for p in Path(folder).iterdir()):
            raise SystemExit("yt-dlp left no file")


def find_ffmpeg() -> str | None:
    found = shutil.which("ffmpeg")
    if found:
        return found
    try:
        import imageio_ffmpeg
    except ImportError:
        return None
    # yt-dlp knows the program by its name only
    link = Path(tempfile.mkdtemp()) / "ffmpeg"
    link.symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    return str(link)


def measure(host: Host, contestants: dict[str, Callable[[str], None]]) -> dict[str, tuple[float, float, float]]:
    """Medians of (bytes served, wall seconds, requests) over ROUNDS, the contestants in turn."""
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, fetch in contestants.items():
            host.n_bytes = host.n_requests = 0
            began = time.perf_counter()
            fetch(host.url)
            taken = time.perf_counter() - began
            time.sleep(0.3)  # let a connection that was hung up on find out
            rows[name].append((host.n_bytes, taken, host.n_requests))
    return {name: tuple(statistics.median(c) for c in zip(*r, strict=True)) for name, r in rows.items()}  # type: ignore[misc]


def main() -> None:
    data = recording()
    ffmpeg = find_ffmpeg()
    us = "harken, 256 KB blocks"
    contestants: dict[str, Callable[[str], None]] = {
        us: partial(ours, 256 * 1024),
        "harken, 64 KB blocks": partial(ours, 64 * 1024),
        "yt-dlp, whole file": partial(yt_dlp_download, None),
    }
    if ffmpeg:
        contestants["yt-dlp download_ranges"] = partial(yt_dlp_download, ffmpeg)
    print(f"{START_S:.0f} to {END_S:.0f} s of {LENGTH_S} s, {SIZE[0]}x{SIZE[1]}, {len(data) / 1e6:.2f} MB")
    print(f"{interleaved.machine().rpartition(', one thread')[0]}, wall time, median of {ROUNDS}")
    if not ffmpeg:
        print("no ffmpeg here: yt-dlp's own download_ranges needs one and was not run")
    for per_s in (None, THROTTLE):
        print("unthrottled" if per_s is None else f"host throttled to {per_s / 1e6:.1f} MB/s")
        with serve(Host(data, per_s)) as host:
            found = measure(host, contestants)
        for name, (n_bytes, seconds, n_requests) in found.items():
            print(
                f"  {name:<24} {n_bytes / 1e6:7.2f} MB {100 * n_bytes / len(data):6.1f} % {n_requests:4.0f} requests"
                f" {seconds:7.2f} s   bytes {n_bytes / found[us][0]:6.2f} x, seconds {seconds / found[us][1]:6.2f} x"
            )


if __name__ == "__main__":
    main()
