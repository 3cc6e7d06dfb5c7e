"""A remote file read like a local one: HTTP Range requests of whole blocks over one kept-alive connection.

Ten seconds of a four-minute video cost about a twelfth of its bytes. Every failure is a typed ClipError, and because
FFmpeg turns an exception inside `read` into an end of file, the first one is also latched: ask `check()` after
decoding.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import re
import socket
import ssl
import time
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from harken.errors import ClipError
from harken.media.reasons import classify

BLOCK: Final = 256 * 1024  # 5 to 9 requests a clip; at 64 KB it is 13 to 19 for half the bytes
_KEPT_BLOCKS: Final = 32
_REDIRECTS: Final = 5
_ANSWER_PATIENCE: Final = 10  # times `timeout_s`: one answer, its headers and body
_PATIENCE: Final = 30  # times `timeout_s`: all waiting for one file
_PAGES: Final = frozenset({"text/html", "application/xhtml+xml", "application/json"})
_SAFE: Final = "/%:=&?~#+!$,;'@()*[]"
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)$")


@dataclass
class Traffic:
    """What one attempt has cost its host, over all files it read."""

    n_bytes: int = 0
    n_requests: int = 0

    @property
    def facts(self) -> dict[str, int]:
        return {"n_bytes": self.n_bytes, "n_requests": self.n_requests}


@contextmanager
def accounted(traffic: Traffic, known: Mapping[str, Any]) -> Iterator[None]:
    """A ClipError that passes is told where it rose (`media`), what the attempt cost and what was known by then."""
    try:
        yield
    except ClipError as e:
        e.facts = {"where": "media", **known, **e.facts, **traffic.facts}
        raise


class RangeReader(io.RawIOBase):
    """A seekable, read-only file over `url`.

    Opening it makes the first request. Raises ClipError: `media.403`, `session.http_429`, `net.5xx` and so on by
    status; `media.truncated` for a body that ends early or a file that changes while it is read, `net.timeout` after
    `timeout_s` without a byte or 10 times as long for one answer or 30 times for the file, `media.empty` for a file of
    no bytes, `media.not_media` for a page in its place, and `media.no_range` from a server that ignores Range (reading
    it would download the whole file). The error's facts tell `where` ("media"), and the `http_status`, `retry_after_s`
    and `exception` that it came from. `bytes_fetched` and `requests` count the traffic, `traffic` adds it up over
    several files.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float,
        block_bytes: int = BLOCK,
        traffic: Traffic | None = None,
    ) -> None:
        super().__init__()
        self.url = url
        self.error: ClipError | None = None
        self.bytes_fetched = 0
        self.requests = 0
        self.content_type = ""
        self._traffic = traffic or Traffic()
        self._version: dict[str, str] = {}
        self._waited_s = 0.0
        ours = {"Accept-Encoding": "identity", "Connection": "keep-alive"}
        taken = {"range", *(name.lower() for name in ours)}
        self._headers = ours | {k: v for k, v in (headers or {}).items() if k.lower() not in taken}
        self._timeout_s = timeout_s
        self._block = block_bytes
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._connection: http.client.HTTPConnection | None = None
        self._via: tuple[str, str] | None = None
        self._position = 0
        self._size: int | None = None
        try:
            self._load(0)
            assert self._size is not None
        except ClipError:
            self.close()
            raise
        self.size: int = self._size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}
        if whence not in base:
            raise ValueError(f"whence must be 0, 1 or 2, found {whence}")
        if base[whence] + offset < 0:
            raise ValueError(f"negative position {base[whence] + offset}")
        self._position = base[whence] + offset
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes from the current position; fewer only at the end of the file."""
        if self.error is not None:
            raise self.error  # the stream is already wrong: never let a demuxer carry on behind a hole
        end = self.size if size is None or size < 0 else min(self.size, self._position + size)
        parts = []
        while self._position < end:
            index, skip = divmod(self._position, self._block)
            part = self._load(index)[skip : skip + end - self._position]
            parts.append(part)
            self._position += len(part)
        return b"".join(parts)

    def check(self) -> None:
        """Raise the first error that a read met, however little the demuxer made of it."""
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        super().close()

    def _load(self, index: int) -> bytes:
        if index in self._blocks:
            self._blocks.move_to_end(index)
            return self._blocks[index]
        first = index * self._block
        began = time.monotonic()
        try:
            if self._waited_s > _PATIENCE * self._timeout_s:
                raise TimeoutError(f"timed out: {self.bytes_fetched} bytes in {self._waited_s:.0f} s")
            data = self._fetch(first, first + self._block - 1)
        except ClipError as e:
            self._drop()
            e.facts = {"where": "media", **e.facts}
            self.error = e
            raise
        except (OSError, http.client.HTTPException, ValueError) as e:  # ValueError: an address that is none
            self._drop()
            name = type(e).__name__
            code = classify(str(e) or name, exception=name, where="media").code
            code = code if code not in ("unknown.unmapped", "local.bug") else "net.connect"
            self.error = ClipError(code, f"bytes {first}-: {name}: {e}", where="media", exception=name)
            raise self.error from e
        finally:
            self._waited_s += time.monotonic() - began
        self._blocks[index] = data
        if len(self._blocks) > _KEPT_BLOCKS:
            self._blocks.popitem(last=False)
        return data

    def _fetch(self, first: int, last: int) -> bytes:
        if self._size is not None:
            last = min(last, self._size - 1)
        response = self._open(first, last)
        found = _CONTENT_RANGE.match(response.getheader("Content-Range", ""))
        self.content_type = response.getheader("Content-Type", "").partition(";")[0].strip().lower()
        if response.status == 416 and found and found[3] == "0" and first == 0:
            raise ClipError("media.empty", "the server's file has no bytes", http_status=416)
        if response.status != 206:
            self._refuse_status(response)
        total = self._promised(response, found, first, last)
        wanted = min(last, total - 1) - first + 1
        data = self._body(response, wanted)
        if len(data) != wanted:
            raise ClipError("media.truncated", f"{len(data)} bytes read, {wanted - len(data)} more expected at {first}")
        return data

    def _promised(self, response: http.client.HTTPResponse, found: re.Match[str] | None, first: int, last: int) -> int:
        """The file's size by the headers of a partial answer, once they are what was asked for, of the same file."""
        if not found or found[1] is None or int(found[1]) != first:
            text = response.getheader("Content-Range", "none")
            raise ClipError("media.no_range", f"asked for bytes {first}-{last}, the server's Content-Range is {text!r}")
        if found[3] == "*":
            raise ClipError("media.no_range", "the server does not tell the file's size (Content-Range ends in '/*')")
        coding = response.getheader("Content-Encoding", "identity").strip().lower()
        if coding not in ("identity", ""):
            raise ClipError("media.no_range", f"the server packs the file ({coding}): its byte positions are not ours")
        total = int(found[3])
        if self._size is None:
            self._size = total
            self._version = _version_of(response)
        elif self._size != total:
            raise ClipError("media.truncated", f"the file changed while it was read: {self._size} bytes, then {total}")
        elif _is_another(self._version, now := _version_of(response)):
            raise ClipError("media.truncated", f"the file changed while it was read: {self._version}, then {now}")
        return total

    def _body(self, response: http.client.HTTPResponse, wanted: int) -> bytes:
        parts, n = [], 0
        while n < wanted:
            part = response.read1(wanted - n)
            if not part:
                break
            parts.append(part)
            n += len(part)
            self._count(len(part))
        endless = response.length is None and not response.chunked
        if n == wanted and (endless or response.length or response.read(1)):
            self._drop()  # more than was asked for: the connection cannot be used again
        return b"".join(parts)

    def _count(self, n_bytes: int) -> None:
        self.bytes_fetched += n_bytes
        self._traffic.n_bytes += n_bytes

    def _refuse_status(self, response: http.client.HTTPResponse) -> NoReturn:
        status = response.status
        if status != 200:
            message = f"HTTP Error {status}: {response.reason}"
            facts: dict[str, Any] = {"http_status": status}
            wait_s = retry_after_s(response.getheader("Retry-After"))
            if wait_s is not None:
                facts["retry_after_s"] = wait_s
            raise ClipError(classify(message, http_status=status, where="media").code, message, **facts)
        head = response.read(512)
        self._count(len(head))
        if not head:
            raise ClipError("media.empty", "the server sent no bytes", http_status=200)
        if self.content_type in _PAGES or head.lstrip()[:1] in (b"<", b"{"):
            text = f"the server sent {self.content_type or 'text'}: {head[:60]!r}"
            raise ClipError("media.not_media", text, http_status=200)
        text = "the server ignores Range requests; harken will not download whole recordings"
        raise ClipError("media.no_range", text, http_status=200)

    def _open(self, first: int, last: int) -> http.client.HTTPResponse:
        """The response for a byte range, after redirects; one silent retry where a kept-alive connection was closed."""
        for _ in range(_REDIRECTS + 1):
            fresh = self._connection is None
            try:
                response = self._send(first, last)
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                self._drop()
                if fresh:
                    raise
                response = self._send(first, last)
            if response.status not in (301, 302, 303, 307, 308):
                return response
            target = response.getheader("Location")
            self._drop()
            if not target:
                raise ClipError(
                    "net.connect", f"HTTP {response.status} without a Location", http_status=response.status
                )
            self.url = urllib.parse.urljoin(self.url, target)
            if urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
                raise ClipError("net.connect", "redirected to what is no HTTP address", http_status=response.status)
        raise ClipError("net.connect", f"more than {_REDIRECTS} redirects", http_status=response.status)

    def _send(self, first: int, last: int) -> http.client.HTTPResponse:
        parts = urllib.parse.urlsplit(self.url)
        # a Location may hold letters that no request line may; what is quoted already stays as it is
        path = urllib.parse.quote(parts.path or "/", safe=_SAFE)
        query = urllib.parse.quote(parts.query, safe=_SAFE)
        if self._connection is None:
            self._connection, self._via = _connect(parts, self._timeout_s)
        headers = dict(self._headers)
        if self._via:
            path = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, query, ""))
            headers[self._via[0]] = self._via[1]
        elif query:
            path += f"?{query}"
        self.requests += 1
        self._traffic.n_requests += 1
        self._connection.response_class = _within(self._timeout_s)
        self._connection.request("GET", path, headers={**headers, "Range": f"bytes={first}-{last}"})
        return self._connection.getresponse()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def retry_after_s(header: str | None) -> float | None:
    """The seconds that a Retry-After header (seconds or a date, RFC 9110 section 10.2.3) asks to wait; None: no."""
    text = (header or "").strip()
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _version_of(response: http.client.HTTPResponse) -> dict[str, str]:
    return {name: value for name in ("ETag", "Last-Modified") if (value := response.getheader(name))}


def _is_another(before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Whether all that both answers say of the file's version differs: mirrors of one file may disagree on its ETag."""
    both = before.keys() & now.keys()
    return bool(both) and all(before[name] != now[name] for name in both)


def _within(timeout_s: float) -> type[http.client.HTTPResponse]:
    """A response whose every byte must come within `timeout_s` of the one before, and all within ten times as long.

    Without the second bound a server that drips a byte per second would hold a worker for days.
    """
    deadline = time.monotonic() + _ANSWER_PATIENCE * timeout_s

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
            super().__init__(sock, *args, **kwargs)
            self.fp = io.BufferedReader(_Timed(self.fp.detach(), sock, timeout_s, deadline))

    return Response


class _Timed(io.RawIOBase):
    """The bytes of a socket until `deadline` (monotonic s)."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, timeout_s: float, deadline: float) -> None:
        super().__init__()
        self._raw, self._sock, self._timeout_s, self._deadline = raw, sock, timeout_s, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"timed out: the answer took more than {_ANSWER_PATIENCE * self._timeout_s:.1f} s")
        self._sock.settimeout(min(self._timeout_s, left_s))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _connect(
    parts: urllib.parse.SplitResult, timeout_s: float
) -> tuple[http.client.HTTPConnection, tuple[str, str] | None]:
    """A connection to the server of `parts`, by way of the environment's proxy if there is one.

    Second: None, or the extra header that each plain request through a proxy needs.
    """
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClipError("tool.no_format", f"not an HTTP address: scheme {parts.scheme!r}")
    secure = parts.scheme == "https"
    proxy = None if urllib.request.proxy_bypass(parts.hostname) else urllib.request.getproxies().get(parts.scheme)
    if proxy is None:
        if secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout_s, context=context), None
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s), None
    gate = urllib.parse.urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    if gate.scheme != "http" or not gate.hostname:
        raise ClipError("net.connect", f"only http:// proxies are supported, found {gate.scheme}://")
    auth = {}
    if gate.username:
        login = f"{urllib.parse.unquote(gate.username)}:{urllib.parse.unquote(gate.password or '')}"
        auth["Proxy-Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    if secure:
        context = ssl.create_default_context()
        tunnel = http.client.HTTPSConnection(gate.hostname, gate.port or 3128, timeout=timeout_s, context=context)
        tunnel.set_tunnel(parts.hostname, parts.port or 443, headers=auth)
        return tunnel, None
    plain = http.client.HTTPConnection(gate.hostname, gate.port or 3128, timeout=timeout_s)
    return plain, (next(iter(auth.items())) if auth else ("Proxy-Connection", "keep-alive"))
