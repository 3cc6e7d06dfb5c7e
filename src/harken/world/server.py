"""The corpus's host on loopback: YouTube-like watch pages, videos with byte ranges, and Clotho's sounds.

/watch?v=ID                        an HTML page holding `ytInitialPlayerResponse`; refusals in YouTube's own words
/videoplayback/ID.mp4              the video (ID.f134.mp4 and ID.f140.m4a where its streams are served apart)
/clotho/ARCHIVE/QUOTED%20NAME.wav  a sound
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from harken.errors import DataError
from harken.world.records import Record

_INDEX = "watch.json"
_CHUNK = 1 << 18

# (playabilityStatus.status, reason, subreason): the words that YouTube answers with
_REFUSALS: dict[str, tuple[str, str, str]] = {
    "gone.private": ("LOGIN_REQUIRED", "Private video", "Sign in if you've been granted access to this video"),
    "gone.removed_uploader": ("ERROR", "Video unavailable", "This video has been removed by the uploader"),
    "gone.account_terminated": (
        "ERROR",
        "Video unavailable",
        "This video is no longer available because the YouTube account associated with this video has been terminated.",
    ),
    "denied.copyright_country": (
        "UNPLAYABLE",
        "Video unavailable",
        "This video contains content from Harken Music, who has blocked it in your country on copyright grounds",
    ),
    "denied.age": (
        "LOGIN_REQUIRED",
        "Sign in to confirm your age",
        "This video may be inappropriate for some users.",
    ),
    "denied.members": (
        "UNPLAYABLE",
        "This video is available to this channel's members on level: Listener (or any higher level). "
        "Join this channel to get access to members-only content and other exclusive perks.",
        "",
    ),
    "gone.unspecified": ("ERROR", "Video unavailable", ""),
}


def write_watch_index(records: Iterable[Record], host_dir: Path) -> None:
    """Write what the watch pages say about each video of `records` into `host_dir`."""
    index = {
        r.key: {
            "reason": r.reason if r.reason in _REFUSALS else "",
            "length_s": r.duration_s,
            "width": r.width,
            "height": r.height,
            "fps": r.fps[0] / r.fps[1],
            "n_channels": r.n_channels,
            "files": [f"{r.key}.f134.mp4", f"{r.key}.f140.m4a"] if r.is_adaptive else [f"{r.key}.mp4"],
        }
        for r in records
        if r.host == "youtube"
    }
    (host_dir / _INDEX).write_text(json.dumps(index, sort_keys=True, indent=0) + "\n", encoding="utf-8")


@contextmanager
def serve(host_dir: Path, port: int = 0) -> Iterator[str]:
    """Serve `host_dir` on 127.0.0.1 from threads of this process; yields the base URL, without a slash at its end.

    port 0 takes a free one. Raises DataError where `host_dir` is not a host that `harken.world.build` wrote.
    """
    path = host_dir / _INDEX
    if not path.is_file():
        raise DataError(f"{path}: no such file. Build the corpus first: this folder is not its host/.")
    server = _Server(("127.0.0.1", port), _Handler)
    server.root, server.index = host_dir.resolve(), json.loads(path.read_text(encoding="utf-8"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # an idle keep-alive connection does not hold up the end
    block_on_close = False
    request_queue_size = 128
    root: Path
    index: dict[str, dict[str, Any]]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in mid-answer is not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # without it every answer on a kept connection waits 40 ms for an acknowledgement
    wbufsize = -1
    timeout = 60
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: thousands of requests a minute."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        url = urlsplit(self.path)
        if url.path == "/watch":
            key = parse_qs(url.query).get("v", [""])[0]
            page = self._watch_page(key).encode()
            self._head(200, "text/html; charset=utf-8", len(page))
            if with_body:
                self.wfile.write(page)
            return
        path = self._file(unquote(url.path))
        if path is None:
            body = b"<html><body><h1>404 Not Found</h1></body></html>"
            self._head(404, "text/html", len(body))
            if with_body:
                self.wfile.write(body)
            return
        self._send(path, with_body)

    def _file(self, url_path: str) -> Path | None:
        """The file that a URL path names; None where there is none, or it would lie outside the host's folders."""
        parts = url_path.removeprefix("/").split("/")
        wanted = {"videoplayback": 2, "clotho": 3}.get(parts[0])
        if wanted != len(parts) or any(p in ("", ".", "..") or p.startswith(".") for p in parts):
            return None
        path = self.server.root.joinpath(*parts)
        return path if path.is_file() else None

    def _head(self, status: int, content_type: str, length: int, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def _send(self, path: Path, with_body: bool) -> None:
        size = path.stat().st_size
        with path.open("rb") as f:
            kind = _content_type(path, f.read(16))
            span = _range(self.headers.get("Range"), size)
            if span is None:
                self._head(416, kind, 0, Content_Range=f"bytes */{size}", Accept_Ranges="bytes")
                return
            start, end, is_partial = span
            extra = {"Accept_Ranges": "bytes"}
            if is_partial:
                extra["Content_Range"] = f"bytes {start}-{end - 1}/{size}"
            self._head(206 if is_partial else 200, kind, end - start, **extra)
            if not with_body:
                return
            f.seek(start)
            left = end - start
            while left and (block := f.read(min(left, _CHUNK))):
                self.wfile.write(block)
                left -= len(block)

    def _watch_page(self, key: str) -> str:
        host = self.headers.get("Host") or f"127.0.0.1:{self.server.server_address[1]}"
        response = player_response(
            key, self.server.index.get(key), f"http://{host}", self.server.root / "videoplayback"
        )
        text = json.dumps(response).replace("</", "<\\/")
        return (
            '<!DOCTYPE html><html lang="en"><head><title>Video</title></head><body>'
            f"<script>var ytInitialPlayerResponse = {text};</script></body></html>"
        )


def _range(header: str | None, size: int) -> tuple[int, int, bool] | None:
    """(start, end, whether the answer is partial) of a Range header; None where it cannot be satisfied.

    A header that is not one range of bytes is ignored, as RFC 9110 section 14.2 allows.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").strip())
    if match is None or match.groups() == ("", ""):
        return 0, size, False
    first, last = match.groups()
    if first == "":
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1 if last else size)
    return (start, end, True) if start < end else None


def _content_type(path: Path, head: bytes) -> str:
    if head.lstrip().startswith(b"<"):
        return "text/html"
    return {".mp4": "video/mp4", ".m4a": "audio/mp4", ".wav": "audio/wav"}.get(path.suffix, "application/octet-stream")


def player_response(key: str, video: dict[str, Any] | None, base_url: str, folder: Path) -> dict[str, Any]:
    """YouTube's player response for a video as the index describes it; None: a video that was never there."""
    reason = "gone.unspecified" if video is None else str(video["reason"])
    if video is None or reason:
        status, text, subreason = _REFUSALS[reason]
        renderer: dict[str, Any] = {"reason": {"simpleText": text}}
        if subreason:
            renderer["subreason"] = {"simpleText": subreason}
        screen = {"playerErrorMessageRenderer": renderer}
        return {"playabilityStatus": {"status": status, "reason": text, "errorScreen": screen}}
    streaming: dict[str, Any] = {"expiresInSeconds": "21540", "formats": [], "adaptiveFormats": []}
    for name in video["files"]:
        file = folder / name
        size = file.stat().st_size if file.is_file() else 0  # absent: the page promises it, the media is a 404
        is_audio, is_apart = name.endswith(".m4a"), len(video["files"]) > 1
        codecs = "mp4a.40.2" if is_audio else "avc1.4D400C" if is_apart else "avc1.42C00C, mp4a.40.2"
        fmt: dict[str, Any] = {
            "itag": 140 if is_audio else 134 if is_apart else 18,
            "url": f"{base_url}/videoplayback/{name}",
            "mimeType": f'{"audio" if is_audio else "video"}/mp4; codecs="{codecs}"',
            "bitrate": max(1, round(8 * size / video["length_s"])),
            "contentLength": str(size),
            "approxDurationMs": str(round(1000 * video["length_s"])),
            "quality": "tiny" if is_audio else "small",
        }
        if not is_audio:
            label = f"{video['height']}p"
            fmt |= {
                "width": video["width"],
                "height": video["height"],
                "fps": round(video["fps"]),
                "qualityLabel": label,
            }
        if is_audio or not is_apart:
            fmt |= {
                "audioQuality": "AUDIO_QUALITY_LOW",
                "audioSampleRate": "44100",
                "audioChannels": video["n_channels"],
            }
        streaming["adaptiveFormats" if is_apart else "formats"].append(fmt)
    details = {
        "videoId": key,
        "title": f"Planted video {key}",
        "lengthSeconds": str(max(1, int(video["length_s"]))),
        "channelId": "UC" + "0" * 22,
        "shortDescription": "",
        "isLiveContent": False,
        "viewCount": "1",
        "author": "harken.world",
    }
    return {
        "playabilityStatus": {"status": "OK", "playableInEmbed": True},
        "streamingData": streaming,
        "videoDetails": details,
    }
