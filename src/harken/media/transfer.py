"""Large published files by HTTP Range, resumable to the block, and proven by the MD5 that their authors state.

What has arrived lies in `NAME.part`; `NAME.part.json` holds a hash of each block, written as it arrives. A restarted
download believes only the blocks that still have their hash, so neither a torn write nor somebody else's file of that
name is ever built upon. Where the MD5 is wrong at the end, the parts that can be bad are found and fetched again.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from email.message import Message
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from harken.errors import DataError
from harken.media import sevenzip
from harken.media.range_reader import retry_after_s
from harken.media.sevenzip import Suspect
from harken.shards import write_json

log = logging.getLogger("harken")

BLOCK: Final = 4 << 20
GAP_S: Final = 2.0  # guests may send 60 requests a minute, and each may be redirected once
ROUNDS: Final = 2  # of fetching the same damaged place again
_FORMAT: Final = 1
_ENOUGH: Final = 1 << 16  # bytes by which a broken answer was still worth its request
_SAY_S: Final = 30.0
_TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)$")
_MD5: Final = re.compile(r"(?:md5:)?([0-9a-f]{32})")


class Pace:
    """At least `gap_s` between two requests to one host, and none before the host's own limit is lifted."""

    def __init__(self, gap_s: float = GAP_S) -> None:
        self._gap_s = gap_s
        self._next = 0.0

    def wait(self) -> None:
        """Sleep until the next request is due."""
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = time.monotonic() + self._gap_s

    def note(self, headers: Message) -> None:
        """Hold back where the host says that nothing is left of its limit (`X-RateLimit-Remaining`, `-Reset`)."""
        reset = headers.get("X-RateLimit-Reset", "")
        if headers.get("X-RateLimit-Remaining") == "0" and reset.isdecimal():
            wait_s = min(60.0, max(0.0, int(reset) - time.time()))  # the limit is per minute; clocks may differ
            self._next = max(self._next, time.monotonic() + wait_s)


def download(
    url: str,
    target: Path,
    md5: str,
    size: int | None = None,
    *,
    timeout_s: float,
    block_bytes: int = BLOCK,
    attempts: int = 6,
    backoff_s: float = 1.0,
    patience_s: float = 900.0,
    pace: Pace | None = None,
) -> Path:
    """The file behind `url` at `target`, whole, with the right `md5` (hex) and, where it is known, `size` in bytes.

    A file that is already there and right is left alone, and nothing is asked. One that is there and wrong is repaired
    like a download's own: what it lacks is fetched, then what is damaged. In a 7z archive that is the packed bytes of
    the first member of each packed stream whose CRC is wrong, rounded to blocks; of any other file, all of it.

    An answer that breaks off is continued from the next byte. After `attempts` answers in a row without progress (waits
    from `backoff_s` doubling, or as long as Retry-After says) it gives up. Interrupt or kill it at will: the next call
    goes on from the last whole block.

    Raises DataError, keeping what has arrived: for an address that does not exist or stays unreachable, a host that
    asks to wait longer than `patience_s`, a server without Range, an HTML page, a file that changed or has another size
    or MD5 than stated, and damage that is still there after it was fetched twice; the message names the bad members.
    """
    if not re.fullmatch(r"[0-9a-f]{32}", md5):
        raise DataError(f"{target.name}: md5 is {md5!r}, expected 32 hexadecimal digits. Take it from the card.")
    if target.is_file() and (size is None or target.stat().st_size == size) and _md5_of(target) == md5:
        _note_of(target).unlink(missing_ok=True)  # left where a run was killed right after the last rename
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _Part(target, url, md5, size, block_bytes) as part:
        client = _Client(
            part,
            timeout_s=timeout_s,
            attempts=attempts,
            backoff_s=backoff_s,
            patience_s=patience_s,
            pace=pace or Pace(),
        )
        client.complete()
        _repair(client, part)
        part.publish()
    return target


def _repair(client: _Client, part: _Part) -> None:
    """Fetch again what is damaged until the MD5 is right. Raises DataError where that does not help."""
    rounds: Counter[str] = Counter()
    while (found := part.md5_found()) != part.md5:
        bad = _suspects(part)
        rounds.update({s.what for s in bad})
        worn = sorted(s.what for s in bad if rounds[s.what] > ROUNDS)
        if worn:
            raise DataError(
                f"{part.target.name}: the md5 is {found}, the card says {part.md5}. Still bad after {ROUNDS} more"
                f" downloads of that part: {'; '.join(worn[:5])}. The server's copy is damaged, or it is another"
                f" release: get {part.url} from another place and put it at {part.target}."
            )
        for s in bad:
            log.warning("%s: %s is damaged; fetching bytes %d-%d again", part.target.name, s.what, s.start, s.stop - 1)
            part.forget(s.start, s.stop)
        client.complete()


def _suspects(part: _Part) -> list[Suspect]:
    size = part.size or 0
    changed = part.changed()
    if changed:  # on this disk, since they arrived: their own hashes tell
        step = part.block_bytes
        return [Suspect(f"block {i} on this disk", i * step, min(size, (i + 1) * step)) for i in changed]
    if part.target.suffix != ".7z":
        return [Suspect("the whole file", 0, size)]
    return sevenzip.suspects(part.path, part.block_bytes)


def _note_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part.json")


def _md5_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _hasher(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=16)


class _Part:
    """`NAME.part` and what is known of it: which blocks are held, and of which file on the server."""

    def __init__(self, target: Path, url: str, md5: str, size: int | None, block_bytes: int) -> None:
        self.target, self.url, self.md5 = target, url, md5
        self.path = target.with_name(f"{target.name}.part")
        self._note = _note_of(target)
        for left in target.parent.glob(f".{glob.escape(self._note.name)}.*.tmp"):  # of a run killed while writing it
            left.unlink()
        self.stated_size = size
        self.size: int | None = None
        self.etag = self.last_modified = ""
        self.block_bytes = block_bytes
        self._blocks: dict[int, str] = {}
        self._open: tuple[int, int, Any] | None = None  # (block, bytes so far, hasher) of the block that is arriving
        if not self._load():
            self._begin()
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        if not self._file.closed:
            with contextlib.suppress(OSError):  # a full disk has its own error by now
                self._file.close()
                self._save()

    @property
    def held_bytes(self) -> int:
        """What is held, in whole blocks and in the one that is arriving."""
        return sum(b - a for a, b in map(self._span, self._blocks)) + (self._open[1] if self._open else 0)

    def missing(self) -> Iterator[tuple[int, int | None]]:
        """(first, stop) of each stretch that is not held; `stop` is None while the size is not known."""
        if self.size is None:
            index = next(i for i in range(len(self._blocks) + 1) if i not in self._blocks)
            yield self._start(index), None
            return
        lacking = [i for i in range(-(-self.size // self.block_bytes)) if i not in self._blocks]
        for _, run in groupby(enumerate(lacking), lambda pair: pair[1] - pair[0]):
            indices = [i for _, i in run]
            yield self._start(indices[0]), min(self.size, (indices[-1] + 1) * self.block_bytes)

    def meet(self, size: int, headers: Message) -> None:
        """Check that the server's file is the one that is held in part. Raises DataError."""
        if self.stated_size is not None and size != self.stated_size:
            raise self._wrong(f"the server's file has {size} bytes, expected {self.stated_size}")
        if self.size is not None and size != self.size:
            raise self._changed(f"it had {self.size} bytes, now {size}")
        for name, held in (("ETag", self.etag), ("Last-Modified", self.last_modified)):
            if held and headers.get(name, held) != held:
                raise self._changed(f"its {name} was {held}, now {headers[name]}")
        for name in ("ETag", "Content-MD5"):
            stated = _MD5.fullmatch(headers.get(name, "").strip('"').lower())
            if stated and stated[1] != self.md5:
                raise self._wrong(f"the server states md5 {stated[1]}, the card says {self.md5}")
        if self.size is None:
            self.size = size
            self.etag = headers.get("ETag", "")
            self.last_modified = headers.get("Last-Modified", "")
            self._blocks = {i: h for i, h in self._blocks.items() if (i + 1) * self.block_bytes <= size}
            if self.path.stat().st_size > size:
                self._file.truncate(size)
            self._save()

    def write(self, at: int, data: bytes) -> None:
        """Take the bytes that arrived for position `at`, in order within their block."""
        self._file.seek(at)
        self._file.write(data)
        while data:
            index = at // self.block_bytes
            start, stop = self._span(index)
            _, n, hasher = (index, 0, _hasher()) if at == start or self._open is None else self._open
            piece = data[: stop - at]
            hasher.update(piece)
            at, data = at + len(piece), data[len(piece) :]
            self._open = (index, n + len(piece), hasher)
            if at == stop:
                self._file.flush()
                self._blocks[index], self._open = hasher.hexdigest(), None
                self._save()

    def forget(self, start: int, stop: int) -> None:
        """Hold none of the blocks that have a byte in [start, stop)."""
        for index in range(start // self.block_bytes, -(-stop // self.block_bytes)):
            self._blocks.pop(index, None)
        self._open = None

    def changed(self) -> list[int]:
        """The held blocks whose bytes on disk are no longer those that arrived."""
        self._file.flush()
        with self.path.open("rb") as f:
            return [i for i, h in sorted(self._blocks.items()) if self._hash(f, *self._span(i)) != h]

    def md5_found(self) -> str:
        self._file.flush()
        return _md5_of(self.path)

    def publish(self) -> None:
        """Put the file at its final name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.path.replace(self.target)
        self._note.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Start from the file at the final name, which is wrong somewhere, or from nothing."""
        self._blocks, self._open, self.size, self.etag, self.last_modified = {}, None, None, "", ""
        self.path.unlink(missing_ok=True)
        if not self.target.is_file():
            self._save()
            return
        n_whole = max(0, -(-self.target.stat().st_size // self.block_bytes) - 1)  # the last is asked for in any case
        with self.target.open("rb") as f:
            step = self.block_bytes
            self._blocks = {i: self._hash(f, i * step, (i + 1) * step) for i in range(n_whole)}
        self._save()  # before the rename: a part without its note is nobody's
        self.target.replace(self.path)

    def _load(self) -> bool:
        """Whether a note of an earlier run on the same file was found; what no longer has its hash is dropped."""
        try:
            note = json.loads(self._note.read_bytes())
            if note["format"] != _FORMAT or note["md5"] != self.md5 or not self.path.is_file():
                return False
            self.block_bytes, self.size = int(note["block_bytes"]), note["size"]
            if note["url"] == self.url:  # a mirror has validators of its own
                self.etag, self.last_modified = note["etag"], note["last_modified"]
            self._blocks = {int(i): h for i, h in note["blocks"].items()}
            partial = note["partial"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        with self.path.open("rb") as f:
            self._blocks = {i: h for i, h in self._blocks.items() if self._hash(f, *self._span(i)) == h}
            if partial:
                index, n, digest = partial
                f.seek(index * self.block_bytes)
                hasher = _hasher(f.read(n))
                if hasher.hexdigest() == digest:
                    self._open = (index, n, hasher)
        return True

    def _save(self) -> None:
        partial = [self._open[0], self._open[1], self._open[2].hexdigest()] if self._open else None
        note = {
            "format": _FORMAT,
            "url": self.url,
            "md5": self.md5,
            "size": self.size,
            "etag": self.etag,
            "last_modified": self.last_modified,
            "block_bytes": self.block_bytes,
            "blocks": {str(i): h for i, h in self._blocks.items()},
            "partial": partial,
        }
        write_json(self._note, note)

    def _start(self, index: int) -> int:
        if self._open is not None and self._open[0] == index:
            return index * self.block_bytes + self._open[1]
        self._open = None
        return index * self.block_bytes

    def _span(self, index: int) -> tuple[int, int]:
        stop = (index + 1) * self.block_bytes
        return index * self.block_bytes, stop if self.size is None else min(stop, self.size)

    @staticmethod
    def _hash(file: Any, start: int, stop: int) -> str:
        file.seek(start)
        return str(_hasher(file.read(stop - start)).hexdigest())

    def _wrong(self, what: str) -> DataError:
        return DataError(
            f"{self.url}: {what}. It is another release or a truncated mirror: use the official address, or get"
            f" {self.target.name} by hand and put it at {self.target}. What had arrived is kept."
        )

    def _changed(self, what: str) -> DataError:
        return DataError(
            f"{self.url}: the file changed on the server since this download began ({what}). What had arrived is kept"
            f" in {self.path}; delete it to begin again."
        )


class _Interrupted(Exception):  # noqa: N818 - it ends an attempt, not the download
    """An answer that may be better when asked again."""

    def __init__(self, what: str, retry_after_s: float | None = None) -> None:
        super().__init__(what)
        self.retry_after_s = retry_after_s


class _Client:
    """Fetches the missing stretches of a part, asking again where that can help."""

    def __init__(
        self, part: _Part, *, timeout_s: float, attempts: int, backoff_s: float, patience_s: float, pace: Pace
    ) -> None:
        self._part, self._timeout_s, self._attempts, self._pace = part, timeout_s, attempts, pace
        self._patience_s = patience_s
        self._conditional = True
        self._said = time.monotonic()
        self._backoff = wait_exponential_jitter(backoff_s, 60 * backoff_s, jitter=backoff_s)

    def complete(self) -> None:
        """Hold every block. Raises DataError."""
        part = self._part
        policy = Retrying(
            retry=retry_if_exception_type(_Interrupted),
            stop=stop_after_attempt(self._attempts),
            wait=self._pause_s,
            reraise=True,
        )
        while (stretch := next(part.missing(), None)) is not None:
            try:
                policy(self._pull)
            except _Interrupted as e:
                raise DataError(
                    f"{part.url}: gave up after {self._attempts} attempts at byte {stretch[0]} of"
                    f" {part.size or 'an unknown number'} ({e}). {part.held_bytes} bytes are kept in {part.path}; run"
                    " again to go on from there."
                ) from e

    def _pause_s(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = getattr(error, "retry_after_s", None)
        pause_s = float(self._backoff(state)) if asked is None else float(asked)
        log.info("%s: %s; asking again in %.0f s", self._part.target.name, error, pause_s)
        return pause_s

    def _pull(self) -> None:
        """One request for the first missing stretch. Raises _Interrupted where it brought nothing worth its while."""
        stretch = next(self._part.missing(), None)
        if stretch is None:
            return
        first, stop = stretch
        at = first
        try:
            answer = self._ask(first, stop)
            if answer is None:
                return
            with contextlib.closing(answer):
                stop = stop or next(self._part.missing())[1]  # an answer always tells the size
                assert stop is not None
                deadline = time.monotonic() + 10 * self._timeout_s  # a byte per second must not hold a worker for days
                while at < stop:
                    data = answer.read1(min(1 << 18, stop - at))
                    if not data:
                        raise _Interrupted(f"the answer ended at byte {at} of {stop}")
                    if at == 0:
                        self._refuse_page(data)
                    at = self._take(at, data)
                    if at - first >= self._part.block_bytes:
                        first, deadline = at, time.monotonic() + 10 * self._timeout_s
                    elif time.monotonic() > deadline:
                        raise _Interrupted(f"no block in {10 * self._timeout_s:.0f} s")
        except (_Interrupted, OSError, http.client.HTTPException) as e:
            if at - stretch[0] >= min(_ENOUGH, self._part.block_bytes):
                log.info("%s: %s at byte %d; going on from there", self._part.target.name, e or type(e).__name__, at)
                return
            if isinstance(e, _Interrupted):
                raise
            raise _Interrupted(f"{type(e).__name__}: {e}") from e

    def _take(self, at: int, data: bytes) -> int:
        try:
            self._part.write(at, data)
        except OSError as e:  # the disk's trouble, not the network's
            raise DataError(f"{self._part.path}: cannot be written ({e}). Make room, then run again.") from e
        if time.monotonic() - self._said > _SAY_S:
            self._said = time.monotonic()
            size = self._part.size or 1
            log.info("%s: %.1f %% of %.2f GB", self._part.target.name, 100 * at / size, size / 1e9)
        return at + len(data)

    def _ask(self, first: int, stop: int | None) -> Any:
        """The open answer to a request for the bytes [first, stop), proven to be these bytes of the right file.

        None where the answer only told the file's size.
        """
        part = self._part
        headers = {
            "User-Agent": "harken (https://pypi.org/project/harken)",
            "Accept-Encoding": "identity",
            "Range": f"bytes={first}-{'' if stop is None else stop - 1}",
        }
        condition = part.last_modified if not part.etag or part.etag.startswith("W/") else part.etag
        if condition and self._conditional:
            headers["If-Range"] = condition
        self._pace.wait()
        try:
            answer = urllib.request.urlopen(urllib.request.Request(part.url, headers=headers), timeout=self._timeout_s)
        except urllib.error.HTTPError as e:
            with e:
                self._pace.note(e.headers)
                self._refuse_status(e)
                return None
        except (urllib.error.URLError, http.client.InvalidURL, ValueError) as e:
            if isinstance(e, urllib.error.URLError) and isinstance(e.reason, OSError):
                raise _Interrupted(f"{type(e.reason).__name__}: {e.reason}") from e
            raise DataError(f"{part.url}: not an address that can be fetched ({e}). Check it in params.yaml.") from e
        try:
            self._pace.note(answer.headers)
            if answer.headers.get_content_type() == "text/html" and part.target.suffix not in (".html", ".htm"):
                raise self._page()
            if answer.status != 206 and "If-Range" in headers and self._unchanged(answer.headers):
                self._conditional = False  # it compares validators wrongly; `meet` compares them as well
                answer.close()
                return self._ask(first, stop)
            if answer.status != 206:
                if part.size is not None:
                    part.meet(int(answer.headers.get("Content-Length") or part.size), answer.headers)
                raise self._no_range(f"HTTP {answer.status} to a request for bytes {first}-")
            found = _CONTENT_RANGE.match(answer.headers.get("Content-Range", ""))
            if not found or found[1] is None or int(found[1]) != first:
                text = answer.headers.get("Content-Range", "none")
                raise self._no_range(f"asked for bytes {first}-, its Content-Range is {text!r}")
            part.meet(int(found[3]), answer.headers)
        except BaseException:
            answer.close()
            raise
        return answer

    def _unchanged(self, headers: Message) -> bool:
        part = self._part
        return all(
            headers.get(name, held) == held
            for name, held in (
                ("ETag", part.etag),
                ("Last-Modified", part.last_modified),
                ("Content-Length", str(part.size)),
            )
            if held
        )

    def _refuse_status(self, error: urllib.error.HTTPError) -> None:
        """Return only where the status is 416 and taught something new: how large the file is."""
        part = self._part
        status, headers = error.code, error.headers
        if status in _TRANSIENT:
            wait_s = retry_after_s(headers.get("Retry-After"))
            if wait_s is not None and wait_s > self._patience_s:
                raise DataError(
                    f"{part.url}: the server (HTTP {status}) asks to wait {wait_s:.0f} s. {part.held_bytes} bytes are"
                    f" kept in {part.path}; run again after that."
                )
            raise _Interrupted(f"HTTP {status} {error.reason}", wait_s)
        found = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
        if status == 416 and found and part.size is None and int(found[3]) > 0:
            part.meet(int(found[3]), headers)
            return  # an old copy was longer than the server's file
        if status == 416 and found:
            part.meet(int(found[3]), headers)
        raise DataError(
            f"{part.url}: HTTP {status} {error.reason}. Check the address; what had arrived is kept in {part.path}."
        )

    def _refuse_page(self, head: bytes) -> None:
        start = head[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        if start.startswith((b"<!doctype html", b"<html")):
            raise self._page()

    def _page(self) -> DataError:
        return DataError(
            f"{self._part.url}: the server sent an HTML page instead of {self._part.target.name} (a login, maintenance"
            " or consent page?). Open the address in a browser. What had arrived is kept."
        )

    def _no_range(self, what: str) -> DataError:
        return DataError(
            f"{self._part.url}: the server ignores Range requests ({what}), so no download could be continued."
            f" Use an address that honours them (on zenodo.org: /records/..., not /api/...), or get"
            f" {self._part.target.name} by hand and put it at {self._part.target}. What had arrived is kept."
        )
