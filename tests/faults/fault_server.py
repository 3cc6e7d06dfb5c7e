"""A loopback server that fails in every way that servers fail, on purpose and by name.

    with serve() as site:
        site.files["a.mp4"] = data
        site.faults["a.mp4"] = "429 5"          # or a list: one fault per request, the last repeats; "" is none
        RangeReader(site.url("a.mp4"), timeout_s=0.3)
        site.asks, site.bytes_of("a.mp4")

A fault is a word and perhaps arguments: see `FAULTS`. `late WORD ...` strikes only requests that begin behind byte 0.
"""

from __future__ import annotations

import contextlib
import email.utils
import gzip
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = b"<!DOCTYPE html><html><body>Before you continue to the site</body></html>"
STALL_S = 2.0  # longer than any test's timeout, shorter than a test may take


@dataclass
class Ask:
    """One request: its path, the bytes it asked for (None: all) and how many bytes of body it was sent."""

    path: str
    first: int | None
    last: int | None
    host: str
    n_bytes: int = 0


@dataclass
class Site:
    """What is served and what was asked."""

    base: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, str | list[str]] = field(default_factory=dict)
    asks: list[Ask] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)  # set at the end: nothing stalls longer

    def url(self, path: str) -> str:
        return f"{self.base}/{path}"

    def bytes_of(self, path: str) -> int:
        return sum(a.n_bytes for a in self.asks if a.path == path)

    def fault_of(self, path: str) -> str:
        fault = self.faults.get(path, "")
        if isinstance(fault, str):
            return fault
        return fault.pop(0) if len(fault) > 1 else fault[0]


class Faulty(BaseHTTPRequestHandler):
    """Answers one request, with `data` and a fault; also used by the scripted site."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 20
    site: Site
    ask: Ask

    def log_message(self, format: str, *args: object) -> None:
        pass

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the fault closed the socket
            super().finish()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        self.ask = Ask(path, *self.span(), self.headers.get("Host", ""))
        self.site.asks.append(self.ask)  # before the answer: who has that may look here
        self.answer(self.site.files.get(path), self.site.fault_of(path))

    def span(self) -> tuple[int | None, int | None]:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return None, None
        return int(match[1]), int(match[2]) if match[2] else None

    def answer(self, data: bytes | None, fault: str) -> None:
        first, _ = self.span()
        words = fault.split()
        if words[:1] == ["late"]:
            words = words[1:] if first else []
        if words and words[0].isdecimal():
            return fail_with_status(self, int(words[0]), words[1:])
        if words:
            return FAULTS[words[0]](self, data or b"", words[1:])
        if data is None:
            return fail_with_status(self, 404, [])
        return self.part(data)

    def part(self, data: bytes, *, total: int | str = "", shift: int = 0, **headers: str) -> None:
        """The bytes that were asked for, as a good server sends them, but for the lies that are asked for."""
        body = self.head_of_part(data, total=total, shift=shift, **headers)
        if body is not None:
            self.send(body)

    def head_of_part(
        self, data: bytes, *, total: int | str = "", shift: int = 0, length: int | None = None, **headers: str
    ) -> bytes | None:
        first, last = self.span()
        if first is None:
            self.head(200, len(data) if length is None else length, **headers)
            return data
        if first >= len(data):
            self.head(416, 0, Content_Range=f"bytes */{len(data)}")
            return None
        end = min(len(data) - 1 if last is None else last, len(data) - 1)
        body = data[first : end + 1]
        span = f"bytes {first + shift}-{end + shift}/{total or len(data)}"
        self.head(206, len(body) if length is None else length, **{"Content_Range": span, **headers})
        return body

    def head(self, status: int, length: int | None, kind: str = "video/mp4", **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in {"Content_Type": kind, **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send(self, body: bytes) -> None:
        for at in range(0, len(body), 1 << 16):
            piece = body[at : at + (1 << 16)]
            self.ask.n_bytes += len(piece)
            self.wfile.write(piece)

    def stall(self) -> None:
        self.site.done.wait(STALL_S)
        self.close_connection = True

    def reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()
        self.close_connection = True


def fail_with_status(h: Faulty, status: int, words: list[str]) -> None:
    wait = words[0] if words else ""
    if wait == "date":
        wait = email.utils.formatdate(time.time() + 90, usegmt=True)
    body = b"no"
    h.head(status, len(body), "text/plain", Retry_After=wait)
    h.send(body)


def stall_headers(h: Faulty, data: bytes, words: list[str]) -> None:
    h.stall()


def drip_headers(h: Faulty, data: bytes, words: list[str]) -> None:
    h.wfile.write(b"HTTP/1.1 206 Partial Content\r\n")
    h.close_connection = True
    for i in range(400):
        h.wfile.write(b"X-%d: y\r\n" % i)
        if h.site.done.wait(0.02):
            return


def stall_body(h: Faulty, data: bytes, words: list[str]) -> None:
    body = h.head_of_part(data) or b""
    h.send(body[: len(body) // 3])
    h.stall()


def drip_body(h: Faulty, data: bytes, words: list[str]) -> None:
    body = h.head_of_part(data) or b""
    h.close_connection = True
    for i in range(400):
        h.send(body[i : i + 1])
        if h.site.done.wait(0.02):
            return


def cut_body(h: Faulty, data: bytes, words: list[str]) -> None:
    body = h.head_of_part(data) or b""
    h.send(body[: len(body) // 2])
    h.close_connection = True


def longer_length(h: Faulty, data: bytes, words: list[str]) -> None:
    """Content-Length promises 1,000 bytes more than the range holds; then the connection closes."""
    first, last = h.span()
    assert first is not None
    end = min(len(data) - 1, last if last is not None else len(data))
    h.send(h.head_of_part(data, length=end - first + 1 + 1000) or b"")
    h.close_connection = True


def shorter_length(h: Faulty, data: bytes, words: list[str]) -> None:
    body = h.head_of_part(data, length=max(1, len(data) // 50)) or b""
    h.send(body[: max(1, len(data) // 50)])


def reset_body(h: Faulty, data: bytes, words: list[str]) -> None:
    body = h.head_of_part(data) or b""
    h.send(body[: len(body) // 2])
    h.reset()


def reset_headers(h: Faulty, data: bytes, words: list[str]) -> None:
    h.reset()


def close_silently(h: Faulty, data: bytes, words: list[str]) -> None:
    h.close_connection = True


def no_http(h: Faulty, data: bytes, words: list[str]) -> None:
    h.wfile.write(b"220 mail.example.org ESMTP ready\r\n")
    h.close_connection = True


def chunked(h: Faulty, data: bytes, words: list[str]) -> None:
    """A good answer in chunks; with the word `cut` its last chunk never comes."""
    first, last = h.span()
    assert first is not None
    end = min(len(data) - 1, len(data) if last is None else last)
    body = data[first : end + 1]
    h.head(206, None, Content_Range=f"bytes {first}-{end}/{len(data)}", Transfer_Encoding="chunked")
    half = len(body) // 2
    for piece in (body[:half],) if words else (body[:half], body[half:]):
        if piece:
            h.wfile.write(b"%x\r\n" % len(piece))
            h.send(piece)
            h.wfile.write(b"\r\n")
    if not words:
        h.wfile.write(b"0\r\n\r\n")
    h.close_connection = bool(words)


def html(h: Faulty, data: bytes, words: list[str]) -> None:
    status = int(words[0])
    h.head(status, len(PAGE), "text/html", Content_Range=f"bytes 0-{len(PAGE) - 1}/{len(PAGE)}")
    h.send(PAGE)


def json_(h: Faulty, data: bytes, words: list[str]) -> None:
    body = b'{"error": {"code": 403, "message": "quota"}}'
    h.head(200, len(body), "application/json")
    h.send(body)


def no_range(h: Faulty, data: bytes, words: list[str]) -> None:
    h.head(200, len(data))
    h.send(data)


def multipart(h: Faulty, data: bytes, words: list[str]) -> None:
    body = b"--x\r\nContent-Range: bytes 0-9/%d\r\n\r\n0123456789\r\n--x--\r\n" % len(data)
    h.head(206, len(body), "multipart/byteranges; boundary=x")
    h.send(body)


def lie_start(h: Faulty, data: bytes, words: list[str]) -> None:
    h.part(data, shift=5)


def lie_total(h: Faulty, data: bytes, words: list[str]) -> None:
    h.part(data, total=len(data) + 100)


def no_total(h: Faulty, data: bytes, words: list[str]) -> None:
    h.part(data, total="*")


def packed(h: Faulty, data: bytes, words: list[str]) -> None:
    h.part(gzip.compress(data[:300_000], 1), Content_Encoding="gzip")


def redirect(h: Faulty, data: bytes, words: list[str]) -> None:
    h.head(302, 0, Location=words[0] if words else "")


def version(h: Faulty, data: bytes, words: list[str]) -> None:
    """A good answer that names the file's version by its headers: `version ETAG DATE`."""
    h.part(data, ETag=f'"{words[0]}"', Last_Modified=words[1] if len(words) > 1 else "")


def nothing(h: Faulty, data: bytes, words: list[str]) -> None:
    h.head(int(words[0]), 0)


FAULTS: dict[str, Callable[[Faulty, bytes, list[str]], None]] = {
    "stall_headers": stall_headers,
    "drip_headers": drip_headers,
    "stall": stall_body,
    "drip": drip_body,
    "cut": cut_body,
    "longer_length": longer_length,
    "shorter_length": shorter_length,
    "reset": reset_body,
    "reset_headers": reset_headers,
    "close": close_silently,
    "no_http": no_http,
    "chunked": chunked,
    "html": html,
    "json": json_,
    "no_range": no_range,
    "multipart": multipart,
    "lie_start": lie_start,
    "lie_total": lie_total,
    "no_total": no_total,
    "packed": packed,
    "redirect": redirect,
    "version": version,
    "nothing": nothing,
}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up in mid-answer is what half of these faults are about."""


@contextlib.contextmanager
def serve(handler: type[Faulty] = Faulty, site: Site | None = None) -> Iterator[Site]:
    """The site on a free port of 127.0.0.1, in threads of this process."""
    site = site or Site()
    site.done.clear()
    with Server(("127.0.0.1", 0), type("Handler", (handler,), {"site": site})) as http:
        site.base = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield site
        finally:
            site.done.set()
            http.shutdown()
            thread.join()


def closed_port() -> int:
    """A port of 127.0.0.1 where nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
