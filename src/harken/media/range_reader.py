"""A remote file read like a local one: HTTP Range requests of whole blocks over one kept-alive connection.

Ten seconds of a four-minute video cost about a twelfth of its bytes. Every failure is a typed ClipError, and because
FFmpeg turns an exception inside `read` into an end of file, the first one is also latched: ask `check()` after
decoding.
"""

from __future__ import annotations

import base64
import http.client
import io
import re
import ssl
import time
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final, NoReturn

from harken.errors import ClipError
from harken.media.reasons import classify

BLOCK: Final = 256 * 1024  # 5 to 9 requests a clip; at 64 KB it is 13 to 19 for half the bytes
_KEPT_BLOCKS: Final = 32
_REDIRECTS: Final = 5
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)$")


class RangeReader(io.RawIOBase):
    """A seekable, read-only file over `url`.

    Opening it makes the first request. Raises ClipError: `media.403`, `session.http_429`, `net.5xx` and so on by
    status; `media.truncated` for a body that ends early, `net.timeout` after `timeout_s` without a byte, `media.empty`
    for a file of no bytes, and `media.no_range` from a server that ignores Range (reading it would download the whole
    file). `bytes_fetched` and `requests` count the traffic.
    """

    def __init__(
        self, url: str, *, headers: Mapping[str, str] | None = None, timeout_s: float, block_bytes: int = BLOCK
    ) -> None:
        super().__init__()
        self.url = url
        self.error: ClipError | None = None
        self.bytes_fetched = 0
        self.requests = 0
        self.content_type = ""
        self._headers = {"Accept-Encoding": "identity", "Connection": "keep-alive", **(headers or {})}
        self._headers = {k: v for k, v in self._headers.items() if k.lower() != "range"}
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
        try:
            data = self._fetch(first, first + self._block - 1)
        except ClipError as e:
            self.error = e
            raise
        except (OSError, http.client.HTTPException) as e:
            self._drop()
            reason = classify(str(e) or type(e).__name__, exception=type(e).__name__, where="media")
            code = reason.code if reason.code != "unknown.unmapped" else "net.connect"
            self.error = ClipError(code, f"bytes {first}-: {type(e).__name__}: {e}")
            raise self.error from e
        self._blocks[index] = data
        if len(self._blocks) > _KEPT_BLOCKS:
            self._blocks.popitem(last=False)
        return data

    def _fetch(self, first: int, last: int) -> bytes:
        if self._size is not None:
            last = min(last, self._size - 1)
        response = self._open(first, last)
        status = response.status
        found = _CONTENT_RANGE.match(response.getheader("Content-Range", ""))
        self.content_type = response.getheader("Content-Type", "").partition(";")[0].strip().lower()
        if status == 416 and found and found[3] == "0" and first == 0:
            raise ClipError("media.empty", "the server's file has no bytes")
        if status == 200:
            self._refuse_whole(response)
        if status != 206:
            self._drop()
            message = f"HTTP Error {status}: {response.reason}"
            raise ClipError(classify(message, http_status=status, where="media").code, message)
        if not found or found[1] is None or int(found[1]) != first:
            self._drop()
            text = response.getheader("Content-Range", "none")
            raise ClipError("media.no_range", f"asked for bytes {first}-{last}, the server's Content-Range is {text!r}")
        if found[3] == "*":
            self._drop()
            raise ClipError("media.no_range", "the server does not tell the file's size (Content-Range ends in '/*')")
        total = int(found[3])
        if self._size is None:
            self._size = total
        elif self._size != total:
            self._drop()
            raise ClipError("media.truncated", f"the file changed while it was read: {self._size} bytes, then {total}")
        wanted = min(last, total - 1) - first + 1
        data = self._body(response, wanted)
        if len(data) != wanted:
            self._drop()
            raise ClipError("media.truncated", f"{len(data)} bytes read, {wanted - len(data)} more expected at {first}")
        return data

    def _body(self, response: http.client.HTTPResponse, wanted: int) -> bytes:
        # one deadline for the block: a server that drips a byte per second must not hold a worker for days
        deadline = time.monotonic() + 10 * self._timeout_s
        parts, n = [], 0
        while n < wanted:
            part = response.read1(wanted - n)
            if not part:
                break
            parts.append(part)
            n += len(part)
            self.bytes_fetched += len(part)
            if time.monotonic() > deadline:
                raise TimeoutError(f"timed out: {n} of {wanted} bytes in {10 * self._timeout_s:.0f} s")
        if n == wanted and not response.isclosed() and response.read(1):
            self._drop()  # more than was asked for: the connection cannot be used again
        return b"".join(parts)

    def _refuse_whole(self, response: http.client.HTTPResponse) -> NoReturn:
        head = response.read(512)
        self.bytes_fetched += len(head)
        self._drop()
        if not head:
            raise ClipError("media.empty", "the server sent no bytes")
        if self.content_type in ("text/html", "application/json") or head.lstrip()[:1] in (b"<", b"{"):
            raise ClipError("media.not_media", f"the server sent {self.content_type or 'text'}: {head[:60]!r}")
        raise ClipError(
            "media.no_range", "the server ignores Range requests; harken will not download whole recordings"
        )

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
                raise ClipError("net.connect", f"HTTP {response.status} without a Location")
            self.url = urllib.parse.urljoin(self.url, target)
        raise ClipError("net.connect", f"more than {_REDIRECTS} redirects")

    def _send(self, first: int, last: int) -> http.client.HTTPResponse:
        parts = urllib.parse.urlsplit(self.url)
        path = parts.path or "/"
        path += f"?{parts.query}" if parts.query else ""
        if self._connection is None:
            self._connection, proxied = _connect(parts, self._timeout_s)
            self._via = proxied
        headers = dict(self._headers)
        if self._via:
            path = urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path or "/", parts.query, ""))
            headers[self._via[0]] = self._via[1]
        self.requests += 1
        self._connection.request("GET", path, headers={**headers, "Range": f"bytes={first}-{last}"})
        return self._connection.getresponse()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


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
