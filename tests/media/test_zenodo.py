"""Clotho's archives over a host that breaks in the ways hosts break, and archives that are not to be trusted."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import py7zr
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harken.clips import Clip, Source, Split, zenodo_id
from harken.datasets.clotho import ARCHIVES, CARD, LISTS, RECORD
from harken.errors import ClipError, ConfigError, DataError
from harken.media.fetchers import FETCHERS
from harken.media.sevenzip import extract, members, suspects
from harken.media.transfer import Pace, download
from harken.media.zenodo import ZenodoFetcher, obtain_archive, obtain_lists

SRC = Path(__file__).parents[2] / "src"
BLOCK = 1 << 14
NAMES = (
    " Ambience Birds.wav",
    "Breaking Glass .wav",
    "121006_rain&amp;storm.wav",
    "Grillons-d&#39;Italie, a  night; #2!.wav",
    "KOOKABURRA..WAV.wav",
    "a &gt; b %20+?=:.wav",
    "-dash.wav",
    "x" * 129 + ".wav",
)
SPLITS = ("development", "validation", "evaluation")
COPY = [{"id": py7zr.FILTER_COPY}]
LZMA = [{"id": py7zr.FILTER_LZMA, "preset": 1}]
LZMA2 = [{"id": py7zr.FILTER_LZMA2, "preset": 1}]
BZIP2 = [{"id": py7zr.FILTER_BZIP2}]


def sound(seed: int, seconds: float = 0.8) -> bytes:
    """A WAV file of a tone in noise, 44.1 kHz mono 16-bit, as Clotho's are."""
    rng = np.random.default_rng(seed)
    n = round(seconds * 44100)
    samples = 6000 * np.sin(2 * np.pi * (300 + 50 * seed) * np.arange(n) / 44100) + rng.normal(0, 900, n)
    out = io.BytesIO()
    with wave.open(out, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(44100)
        f.writeframes(samples.astype("<i2").tobytes())
    return out.getvalue()


def pack(files: dict[str, bytes], *, change: Callable[[Any], None] = lambda a: None, filters: Any = None) -> bytes:
    """A solid 7z archive; `change` may falsify the header before it is written."""
    out = io.BytesIO()
    with py7zr.SevenZipFile(out, "w", filters=filters) as a:
        for name, data in files.items():
            a.writestr(data, name)
        change(a)
    return out.getvalue()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@pytest.fixture(scope="session")
def sounds() -> dict[str, bytes]:
    return {f"development/{name}": sound(i) for i, name in enumerate(NAMES)}


@pytest.fixture(scope="session")
def archive(sounds: dict[str, bytes]) -> bytes:
    return pack(sounds)


@dataclass
class Host:
    """Serves `files` with Range, If-Range and validators. `faults[path]` is used up, one a request."""

    base: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    log: list[tuple[str, str, int]] = field(default_factory=list)  # (path, Range, bytes sent)
    slow_s: float = 0.0

    def put(self, path: str, data: bytes, *faults: tuple[Any, ...]) -> str:
        self.files[path], self.faults[path] = data, list(faults)
        return f"{self.base}/{path}"

    def sent(self, path: str = "") -> int:
        return sum(n for p, _, n in self.log if p.startswith(path))


def handler(host: Host) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.lstrip("/").partition("?")[0]
            waiting = host.faults.get(path) or []
            kind, *args = waiting.pop(0) if waiting else ("",)
            data, asked = host.files.get(path), self.headers.get("Range", "")
            entry = len(host.log)
            host.log.append((path, asked, 0))
            if kind == "status":
                return self.say(args[0], b"no", {**(args[1] if len(args) > 1 else {}), "Content-Type": "text/plain"})
            if data is None:
                return self.say(404, b"no", {})
            if kind == "html":
                return self.say(args[0], b"<!DOCTYPE html><html>", {"Content-Type": "text/html; charset=utf-8"})
            if kind == "redirect":
                return self.say(301, b"", {"Location": args[0]})
            extra = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Retry-After": "59", **host.headers}
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
            assert match, "a range is always asked for"
            unchanged = self.headers.get("If-Range") in (None, extra["ETag"])
            if kind == "no_range" or (not unchanged) or (kind == "picky" and "If-Range" in self.headers):
                return self.say(200, data, extra)
            first = int(match[1])
            last = min(int(match[2] or len(data)), len(data) - 1)
            if first >= len(data):
                return self.say(416, b"", {**extra, "Content-Range": f"bytes */{len(data)}"})
            body = bytearray(data[first : last + 1])
            if kind == "page":
                body[:15] = b"<!doctype html>"
            if kind == "flip":
                for at in args:
                    if first <= at <= last:
                        body[at - first] ^= 4
            self.send_response(206)
            shift = 1 if kind == "shifted" else 0
            self.send_header("Content-Range", f"bytes {first + shift}-{last}/{len(data)}")
            self.send_header("Content-Length", str(len(body)))
            for name, value in extra.items():
                self.send_header(name, value)
            self.end_headers()
            if kind in ("cut", "stall"):
                body = body[: args[0]]
                self.close_connection = True
            with contextlib.suppress(OSError):
                for at in range(0, len(body), BLOCK):
                    self.wfile.write(body[at : at + BLOCK])
                    host.log[entry] = (path, asked, min(at + BLOCK, len(body)))
                    time.sleep(host.slow_s)
                if kind == "stall":
                    time.sleep(1.0)
                if kind == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    self.connection.close()
                    self.close_connection = True

        def say(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    return Handler


@pytest.fixture
def host() -> Iterator[Host]:
    state = Host()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    server.daemon_threads = True
    state.base = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(url: str, target: Path, digest: str, size: int | None = None, **options: Any) -> Path:
    quick = {"timeout_s": 5, "block_bytes": BLOCK, "backoff_s": 0.01, "pace": Pace(0)}
    return download(url, target, digest, size, **{**quick, **options})


# the download


def test_a_file_arrives_whole_by_one_request_and_is_not_asked_for_again(host: Host, tmp_path: Path) -> None:
    data = random.Random(0).randbytes(5 * BLOCK + 77)
    url = host.put("a.bin", data)
    target = tmp_path / "sub" / "a.bin"
    assert fetch(url, target, md5(data), len(data)) == target
    assert target.read_bytes() == data
    assert [asked for _, asked, _ in host.log] == ["bytes=0-"]
    fetch(url, target, md5(data))
    assert len(host.log) == 1
    assert [p.name for p in target.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize(
    "fault",
    [("cut", 3 * BLOCK + 5), ("reset",), ("status", 503), ("status", 429, {"Retry-After": "0"}), ("status", 500)],
)
def test_a_broken_answer_is_continued(host: Host, tmp_path: Path, fault: tuple[Any, ...]) -> None:
    data = random.Random(1).randbytes(9 * BLOCK + 1)
    url = host.put("a.bin", data, fault, fault)
    fetch(url, tmp_path / "a.bin", md5(data))
    assert (tmp_path / "a.bin").read_bytes() == data
    if fault != ("reset",):  # which may throw away what was on its way
        assert host.sent() == len(data)


def test_no_byte_is_asked_for_twice_after_many_cuts(host: Host, tmp_path: Path) -> None:
    data = random.Random(2).randbytes(20 * BLOCK)
    cuts = [("cut", BLOCK + 100 * n) for n in range(9)]
    fetch(host.put("a.bin", data, *cuts), tmp_path / "a.bin", md5(data))
    assert host.sent() == len(data)
    assert len(host.log) == 10


def test_a_stalled_answer_does_not_hang(host: Host, tmp_path: Path) -> None:
    data = random.Random(3).randbytes(3 * BLOCK)
    url = host.put("a.bin", data, ("stall", BLOCK), ("stall", 0))
    began = time.monotonic()
    fetch(url, tmp_path / "a.bin", md5(data), timeout_s=0.3)
    assert time.monotonic() - began < 6
    assert (tmp_path / "a.bin").read_bytes() == data


def test_it_gives_up_saying_what_is_kept_and_goes_on_from_there(host: Host, tmp_path: Path) -> None:
    data = random.Random(4).randbytes(10 * BLOCK)
    url = host.put("a.bin", data, ("cut", 4 * BLOCK + 9), *[("status", 503)] * 3)
    with pytest.raises(DataError, match=rf"gave up after 3 attempts at byte {4 * BLOCK + 9}.*HTTP 503.*run again"):
        fetch(url, tmp_path / "a.bin", md5(data), attempts=3)
    assert not (tmp_path / "a.bin").exists()
    host.log.clear()
    fetch(url, tmp_path / "a.bin", md5(data))
    assert [asked for _, asked, _ in host.log] == [f"bytes={4 * BLOCK + 9}-{len(data) - 1}"]


def test_retry_after_is_honoured_and_a_long_one_ends_the_run(host: Host, tmp_path: Path) -> None:
    data = b"x" * 100
    url = host.put("a.bin", data, ("status", 429, {"Retry-After": "1"}))
    began = time.monotonic()
    fetch(url, tmp_path / "a.bin", md5(data))
    assert time.monotonic() - began >= 1
    url = host.put("b.bin", data, ("status", 429, {"Retry-After": "7200"}))
    with pytest.raises(DataError, match="asks to wait 7200 s"):
        fetch(url, tmp_path / "b.bin", md5(data))
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 9000))
    url = host.put("c.bin", data, ("status", 503, {"Retry-After": date}))
    with pytest.raises(DataError, match=r"asks to wait (89\d\d|9000) s"):
        fetch(url, tmp_path / "c.bin", md5(data))


def test_requests_keep_their_distance(host: Host, tmp_path: Path) -> None:
    pace = Pace(0.2)
    began = time.monotonic()
    for name in ("a.csv", "b.csv", "c.csv"):
        fetch(host.put(name, b"1,2\n"), tmp_path / name, md5(b"1,2\n"), pace=pace)
    assert time.monotonic() - began >= 0.4


def test_nothing_is_asked_while_the_hosts_limit_is_used_up() -> None:
    pace = Pace(0)
    headers = Message()
    headers["X-RateLimit-Remaining"], headers["X-RateLimit-Reset"] = "0", str(int(time.time()) + 2)
    pace.note(headers)
    began = time.monotonic()
    pace.wait()
    assert 0.9 < time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (("html", 200), "HTML page instead of a.7z"),
        (("html", 206), "HTML page"),
        (("page",), "HTML page"),
        (("no_range",), "ignores Range"),
        (("shifted",), "Content-Range is 'bytes 1-"),
        (("status", 404), "HTTP 404"),
        (("status", 403), "HTTP 403"),
        (("status", 410), "HTTP 410"),
    ],
)
@pytest.mark.parametrize("held", [False, True])
def test_a_refusal_says_what_is_wrong_and_loses_nothing(
    host: Host, tmp_path: Path, fault: tuple[Any, ...], says: str, held: bool
) -> None:
    data = random.Random(5).randbytes(6 * BLOCK)
    url = host.put("a.7z", data, ("cut", 3 * BLOCK), *[("status", 503)] * 2)
    if held:
        with pytest.raises(DataError):
            fetch(url, tmp_path / "a.7z", md5(data), attempts=2)
        if fault == ("page",):
            return  # only the file's first bytes tell
    if fault == ("shifted",) and held:
        says = f"Content-Range is 'bytes {3 * BLOCK + 1}-"
    host.faults["a.7z"] = [fault, fault]
    with pytest.raises(DataError, match=says):
        fetch(url, tmp_path / "a.7z", md5(data))
    host.faults["a.7z"], before = [], host.sent()
    fetch(url, tmp_path / "a.7z", md5(data))
    assert host.sent() - before == len(data) - 3 * BLOCK * held


def test_a_changed_file_is_refused_and_what_arrived_is_kept(host: Host, tmp_path: Path) -> None:
    data = random.Random(6).randbytes(6 * BLOCK)
    url = host.put("a.bin", data, ("cut", 3 * BLOCK), ("status", 503))
    with pytest.raises(DataError):
        fetch(url, tmp_path / "a.bin", md5(data), attempts=1)
    for other in (random.Random(7).randbytes(6 * BLOCK), data[:-1], data + b"1"):
        host.put("a.bin", other)
        with pytest.raises(DataError, match=r"changed on the server.*delete it to begin again"):
            fetch(url, tmp_path / "a.bin", md5(data))
    host.put("a.bin", data)
    host.log.clear()
    fetch(url, tmp_path / "a.bin", md5(data))
    assert host.sent() == 3 * BLOCK


def test_a_wrong_size_and_a_wrong_stated_md5_are_refused_before_anything_is_fetched(host: Host, tmp_path: Path) -> None:
    data = b"y" * 3 * BLOCK
    url = host.put("a.bin", data)
    with pytest.raises(DataError, match=rf"has {len(data)} bytes, expected 7"):
        fetch(url, tmp_path / "a.bin", md5(data), 7)
    host.headers["ETag"] = f'"md5:{md5(b"other")}"'  # Zenodo's form
    with pytest.raises(DataError, match="server states md5"):
        fetch(url, tmp_path / "b.bin", md5(data))
    host.headers["ETag"] = f'"md5:{md5(data)}"'
    fetch(url, tmp_path / "c.bin", md5(data))


def test_a_server_that_misjudges_if_range_is_asked_plainly(host: Host, tmp_path: Path) -> None:
    data = random.Random(8).randbytes(6 * BLOCK)
    url = host.put("a.bin", data, ("cut", 2 * BLOCK), ("picky",), ("picky",))
    fetch(url, tmp_path / "a.bin", md5(data))
    assert (tmp_path / "a.bin").read_bytes() == data


def test_redirects_keep_the_range(host: Host, tmp_path: Path) -> None:
    data = random.Random(9).randbytes(3 * BLOCK)
    host.put("new", data, ("cut", BLOCK))
    url = host.put("old", data, ("redirect", "/new"), ("redirect", "/new"))
    fetch(url, tmp_path / "a.bin", md5(data))
    assert host.sent("new") == len(data)


def test_a_strangers_part_and_a_torn_note_are_not_built_upon(host: Host, tmp_path: Path) -> None:
    data = random.Random(10).randbytes(4 * BLOCK)
    for note in (None, b"", b"{", b'{"format": 1}', b"[]"):
        (tmp_path / "a.bin").unlink(missing_ok=True)
        (tmp_path / "a.bin.part").write_bytes(b"z" * 3 * BLOCK)
        if note is not None:
            (tmp_path / "a.bin.part.json").write_bytes(note)
        fetch(host.put("a.bin", data), tmp_path / "a.bin", md5(data))
        assert (tmp_path / "a.bin").read_bytes() == data


def test_blocks_that_changed_on_disk_are_fetched_again_and_no_others(host: Host, tmp_path: Path) -> None:
    data = random.Random(11).randbytes(10 * BLOCK)
    url = host.put("a.bin", data, ("cut", 8 * BLOCK + 50), ("status", 503))
    with pytest.raises(DataError):
        fetch(url, tmp_path / "a.bin", md5(data), attempts=1)
    part = tmp_path / "a.bin.part"
    with part.open("r+b") as f:
        for at in (2 * BLOCK + 1, 5 * BLOCK):
            f.seek(at)
            f.write(bytes([data[at] ^ 1]))
    host.log.clear()
    fetch(url, tmp_path / "a.bin", md5(data))
    starts = sorted(int(re.findall(r"\d+", asked)[0]) for _, asked, _ in host.log)
    assert starts[:2] == [2 * BLOCK, 5 * BLOCK]
    assert host.sent() <= 4 * BLOCK
    assert (tmp_path / "a.bin").read_bytes() == data


def test_a_truncated_or_overlong_copy_at_the_final_name_is_completed(host: Host, tmp_path: Path) -> None:
    data = random.Random(12).randbytes(10 * BLOCK + 9)
    url = host.put("a.bin", data)
    for copy in (data[: 7 * BLOCK + 3], data + b"trailing" * BLOCK, data[:-1] + b"!"):
        (tmp_path / "a.bin").write_bytes(copy)
        host.log.clear()
        fetch(url, tmp_path / "a.bin", md5(data))
        assert (tmp_path / "a.bin").read_bytes() == data
        assert host.sent() <= 4 * BLOCK


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 6 * BLOCK),
    cuts=st.lists(st.integers(1, 2 * BLOCK), max_size=5),
    stops=st.integers(1, 3),
)
def test_any_sequence_of_cuts_and_restarts_ends_with_the_same_bytes(
    host: Host, tmp_path: Path, size: int, cuts: list[int], stops: int
) -> None:
    data = random.Random(size).randbytes(size)
    target = tmp_path / "a.bin"
    target.unlink(missing_ok=True)
    url = host.put("a.bin", data, *[("cut", n) for n in cuts])
    host.log.clear()
    for _ in range(20):
        try:
            fetch(url, target, md5(data), attempts=stops)
            break
        except DataError:
            assert not target.exists()
    assert target.read_bytes() == data
    assert host.sent() == size


# damage


@pytest.mark.parametrize(
    "filters", [None, LZMA, LZMA2, COPY, BZIP2], ids=["bcj+lzma2", "lzma", "lzma2", "copy", "bzip2"]
)
def test_one_flipped_bit_costs_the_damaged_member_only(
    host: Host, tmp_path: Path, sounds: dict[str, bytes], filters: Any
) -> None:
    more = {**sounds, **{f"development/{i}.wav": sound(20 + i) for i in range(16)}}
    data = pack(more, filters=filters)
    at = len(data) // 2
    url = host.put("a.7z", data, ("flip", at))
    fetch(url, tmp_path / "a.7z", md5(data))
    assert (tmp_path / "a.7z").read_bytes() == data
    again = [asked for _, asked, _ in host.log[1:]]
    first, last = map(int, re.findall(r"\d+", again[0]))
    assert len(again) == 1
    assert first <= at <= last
    if filters is not BZIP2:
        assert last - first < 0.25 * len(data)


def test_several_flipped_bits_are_mended_one_after_the_other(host: Host, tmp_path: Path, archive: bytes) -> None:
    places = [len(archive) * n // 10 for n in (1, 4, 6, 9)]
    url = host.put("a.7z", archive, ("flip", *places))
    fetch(url, tmp_path / "a.7z", md5(archive))
    assert (tmp_path / "a.7z").read_bytes() == archive


@pytest.mark.parametrize(
    "where", ["magic", "version", "start crc", "start offset", "packed header", "end", "stream end"]
)
def test_a_flipped_bit_in_a_header_or_where_no_crc_looks_is_mended(
    host: Host, tmp_path: Path, archive: bytes, where: str
) -> None:
    n_header = int.from_bytes(archive[20:28], "little")
    at_header = 32 + int.from_bytes(archive[12:20], "little")
    with py7zr.SevenZipFile(io.BytesIO(archive)) as a:
        packed_stop = 32 + a.header.main_streams.packinfo.packpositions[-1]
    at = {
        "magic": 1,
        "version": 7,
        "start crc": 9,
        "start offset": 14,
        "packed header": at_header - 20,
        "end": at_header + n_header - 3,
        "stream end": packed_stop - 1,
    }[where]
    url = host.put("a.7z", archive, ("flip", at))
    fetch(url, tmp_path / "a.7z", md5(archive))
    assert (tmp_path / "a.7z").read_bytes() == archive
    assert host.sent() < 1.5 * len(archive)


def test_damage_on_the_server_is_named_after_two_more_tries(host: Host, tmp_path: Path, archive: bytes) -> None:
    url = host.put("a.7z", archive, *[("flip", len(archive) // 2)] * 9)
    with pytest.raises(DataError, match=r"Still bad after 2 more downloads of that part: 'development/.*\.wav'") as e:
        fetch(url, tmp_path / "a.7z", md5(archive))
    assert md5(archive) in str(e.value)
    assert len(host.log) == 3
    assert host.sent() < 2 * len(archive)
    assert not (tmp_path / "a.7z").exists()
    host.faults["a.7z"] = []
    fetch(url, tmp_path / "a.7z", md5(archive))  # what is right was kept
    assert host.sent() < 2.6 * len(archive)


def test_another_release_is_told_from_damage(host: Host, tmp_path: Path, archive: bytes) -> None:
    url = host.put("a.7z", archive)
    with pytest.raises(DataError, match=r"every member is right.*another release"):
        fetch(url, tmp_path / "a.7z", md5(b"the card's"))


def test_damage_in_each_packed_stream_is_found_in_one_go(tmp_path: Path, sounds: dict[str, bytes]) -> None:
    path = tmp_path / "a.7z"
    items = list(sounds.items())
    for mode, some in (("w", items[:4]), ("a", items[4:])):
        with py7zr.SevenZipFile(path, mode) as a:
            for name, data in some:
                a.writestr(data, name)
    data = bytearray(path.read_bytes())
    with py7zr.SevenZipFile(path) as a:
        edges = [32 + p for p in a.header.main_streams.packinfo.packpositions]
    places = [(edges[0] + edges[1]) // 2, (edges[1] + edges[2]) // 2]
    for at in places:
        data[at] ^= 16
    path.write_bytes(data)
    found = suspects(path, BLOCK)
    assert len(found) == 2
    assert all(s.start <= at < s.stop for s, at in zip(found, places, strict=True))


@settings(max_examples=20, deadline=None)
@given(
    where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), filters=st.sampled_from([None, LZMA, LZMA2, COPY])
)
def test_suspects_always_cover_the_damage(
    tmp_path_factory: pytest.TempPathFactory, where: float, bit: int, filters: Any
) -> None:
    files = {f"{i}.wav": sound(i, 0.25) for i in range(6)}
    data = bytearray(pack(files, filters=filters))
    path = tmp_path_factory.mktemp("suspects") / "a.7z"
    at = int(where * len(data))
    data[at] ^= 1 << bit
    path.write_bytes(data)
    assert any(s.start <= at < s.stop for s in suspects(path, 1 << 12))


# extraction


def unpacked(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".members.json"
    }


@pytest.mark.parametrize("filters", [None, LZMA, COPY, BZIP2], ids=["bcj+lzma2", "lzma", "copy", "bzip2"])
def test_members_keep_their_exact_names_and_bytes(tmp_path: Path, sounds: dict[str, bytes], filters: Any) -> None:
    files = {**sounds, "development/empty.wav": b""}
    (tmp_path / "a.7z").write_bytes(pack(files, filters=filters))
    extract(tmp_path / "a.7z", tmp_path / "out")
    assert unpacked(tmp_path / "out") == files
    assert [m.name for m in members(tmp_path / "a.7z")] == list(files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.7z", "out"]


def rename(number: int, name: str) -> Callable[[Any], None]:
    def change(a: Any) -> None:
        a.header.files_info.files[number]["filename"] = name

    return change


BAD_NAMES = (
    *("/etc/x", "../x", "a/../../x", "..", "a/..", "a//b", "./x", "a/./b", "", "a/"),
    *("C:\\x", "c:x", "\\\\host\\x", "..\\x", ".members.json"),
)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_could_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.7z").write_bytes(pack({"good.wav": b"1", "bad.wav": b"2"}, change=rename(1, name)))
    with pytest.raises(DataError, match="Nothing was unpacked"):
        extract(tmp_path / "a.7z", tmp_path / "sub" / "out")
    assert not any((tmp_path / "sub").iterdir())
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.7z"]


@pytest.mark.parametrize("names", [("a.wav", "a.wav"), ("a", "a/b.wav"), ("a/b.wav", "a")])
def test_two_members_of_one_name_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    def change(a: Any) -> None:
        for i, name in enumerate(names):
            a.header.files_info.files[i]["filename"] = name

    (tmp_path / "a.7z").write_bytes(pack({"1.wav": b"1", "2.wav": b"2"}, change=change))
    with pytest.raises(DataError, match=r"two members are named|both a file and a folder"):
        extract(tmp_path / "a.7z", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_differ_only_in_blanks_case_or_composition_are_different_files(tmp_path: Path) -> None:
    files = {"A.wav": b"1", "a.wav": b"2", "a .wav": b"3", " a.wav": b"4", "\u00e9.wav": b"5", "e\u0301.wav": b"6"}
    (tmp_path / "a.7z").write_bytes(pack(files))
    extract(tmp_path / "a.7z", tmp_path / "out")
    assert unpacked(tmp_path / "out") == files


@pytest.mark.parametrize(
    "attributes",
    [*(0x8000 | mode << 16 for mode in (0o120777, 0o060666, 0o020666, 0o010666, 0o140666)), 0x400],
    ids=["symlink", "block device", "character device", "pipe", "socket", "reparse point"],
)
def test_links_and_devices_are_refused(tmp_path: Path, attributes: int) -> None:
    def change(a: Any) -> None:
        a.header.files_info.files[1]["attributes"] = attributes

    (tmp_path / "a.7z").write_bytes(pack({"good.wav": b"1", "bad.wav": b"/etc/passwd"}, change=change))
    with pytest.raises(DataError, match=r"is a (link|device)"):
        extract(tmp_path / "a.7z", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change_bytes", [-1000, 1000, 1 << 40])
def test_a_member_of_another_size_than_stated_is_refused(
    tmp_path: Path, sounds: dict[str, bytes], change_bytes: int
) -> None:
    def change(a: Any) -> None:
        a.header.main_streams.substreamsinfo.unpacksizes[0] += change_bytes

    (tmp_path / "a.7z").write_bytes(pack(sounds, change=change))
    with pytest.raises(DataError):
        extract(tmp_path / "a.7z", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.7z"]


def test_a_member_that_unpacks_to_more_than_it_states_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.7z").write_bytes(pack({"a.wav": b"1" * 1000}, change=lambda a: a.set_encoded_header_mode(False)))
    decoder = py7zr.compressor.SevenZipDecompressor
    real = decoder.decompress
    monkeypatch.setattr(decoder, "decompress", lambda self, fp, n=-1: bytes(real(self, fp, n)) + b"more")
    with pytest.raises(DataError, match="unpacks to more than the 1000 bytes"):
        extract(tmp_path / "a.7z", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.7z"]


def test_an_archive_too_large_for_the_disk_is_refused_before_it_is_touched(
    tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.7z").write_bytes(archive)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100_000})())
    with pytest.raises(DataError, match=r"unpacks to 0.00 GB, .* GB free"):
        extract(tmp_path / "a.7z", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.7z"]


def test_damage_and_cuts_leave_no_folder(tmp_path: Path, archive: bytes) -> None:
    path = tmp_path / "a.7z"
    rng = random.Random(13)
    for n in range(12):
        if n % 2:
            data = archive[: rng.randrange(len(archive))]
        else:
            flipped = bytearray(archive)
            flipped[rng.randrange(len(archive))] ^= 1 << rng.randrange(8)
            data = bytes(flipped)
        path.write_bytes(data)
        with contextlib.suppress(DataError):
            extract(path, tmp_path / "out")
        if (tmp_path / "out").exists():  # a bit that no CRC covers: then all members are right
            extract(path, tmp_path / "out")
            (tmp_path / "out").rename(tmp_path / f"out{n}")
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_what_a_killed_run_left_is_not_used(tmp_path: Path, archive: bytes, sounds: dict[str, bytes]) -> None:
    (tmp_path / "a.7z").write_bytes(archive)
    left = tmp_path / ".out.unpacking" / "development"
    left.mkdir(parents=True)
    (left / NAMES[0]).write_bytes(b"garbage")
    (left / "stranger.wav").write_bytes(b"garbage")
    extract(tmp_path / "a.7z", tmp_path / "out")
    assert unpacked(tmp_path / "out") == sounds


KILLED = """
import os, signal, sys
from pathlib import Path
from harken.media.transfer import Pace
from harken.media.zenodo import obtain_archive

url, folder, digest, mark, n = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
left = [n]
def watch(event, args):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
        if any(isinstance(a, (str, os.PathLike)) and mark in str(a) for a in args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
obtain_archive(url, folder, digest, timeout_s=5, block_bytes=1 << 15, pace=Pace(0))
"""


def child(script: str, *args: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(command, env={"PYTHONPATH": str(SRC), "PATH": "/usr/bin:/bin"}, stderr=subprocess.PIPE)


def test_a_run_killed_at_any_point_is_completed_by_the_next(
    host: Host, tmp_path: Path, archive: bytes, sounds: dict[str, bytes]
) -> None:
    url = host.put("a.7z", archive)
    folder = tmp_path / "cache" / "a"
    moments = [("a.lock", 1), (".part.json", 3), (".part.json", 9), (".part.json", 30), ("a.7z.part", 20)]
    moments += [(".unpacking", 1), (".unpacking", 8), (".unpacking", 19), (".members.json", 2), (".unpacking", 23)]
    for mark, n in moments:
        process = child(KILLED, url, folder, md5(archive), mark, n)
        _, said = process.communicate(timeout=30)
        assert process.returncode == -9, (mark, n, said.decode())
        assert not folder.exists()
    obtain_archive(url, folder, md5(archive), timeout_s=5, block_bytes=1 << 15, pace=Pace(0))
    assert unpacked(folder) == sounds
    assert {p.name for p in folder.parent.iterdir()} == {"a", "a.7z", "a.lock"}


def test_a_download_killed_mid_way_goes_on_from_its_last_block(host: Host, tmp_path: Path, archive: bytes) -> None:
    url = host.put("a.7z", archive)
    host.slow_s = 0.02
    part = tmp_path / "a.7z.part"
    for share in (0.3, 0.75):
        process = child(KILLED, url, tmp_path / "a", md5(archive), "", -1)
        for _ in range(1500):
            if part.exists() and part.stat().st_size > share * len(archive):
                break
            time.sleep(0.01)
        process.kill()
        process.wait(30)
        assert process.stderr is not None
        process.stderr.close()
        assert process.returncode == -9
        assert not (tmp_path / "a").exists()
    host.slow_s = 0
    obtain_archive(url, tmp_path / "a", md5(archive), timeout_s=5, block_bytes=1 << 15, pace=Pace(0))
    starts = [int(re.findall(r"\d+", asked)[0]) for _, asked, _ in host.log]
    assert starts == sorted(starts)
    assert starts[-1] > 0.6 * len(archive)


# the fetcher


def clip_of(split: str, name: str) -> Clip:
    archive = f"clotho_audio_{split}"
    role = {"development": Split.TRAIN, "validation": Split.VAL, "evaluation": Split.TEST}[split]
    return Clip(zenodo_id(RECORD, archive, name), "clotho", role, Source("zenodo", name, archive), 0.0, None)


@pytest.fixture(scope="session")
def three() -> dict[str, dict[str, bytes]]:
    return {s: {f"{s}/{n}": sound(10 * k + i) for i, n in enumerate(NAMES[:5])} for k, s in enumerate(SPLITS)}


@pytest.fixture(scope="session")
def packed(three: dict[str, dict[str, bytes]]) -> dict[str, bytes]:
    return {f"clotho_audio_{split}.7z": pack(files) for split, files in three.items()}


@pytest.fixture
def zenodo(host: Host, tmp_path: Path, packed: dict[str, bytes]) -> ZenodoFetcher:
    digests = {}
    for name, data in packed.items():
        host.put(f"records/{RECORD}/files/{name}", data)
        digests[name] = md5(data)
    url = host.base + "/records/{record}/files/{archive}.7z?download=1"
    made = FETCHERS["zenodo"](url, cache=tmp_path / "cache", md5=digests, timeout_s=5, silence_dbfs=-60, pace=Pace(0))
    assert isinstance(made, ZenodoFetcher)
    return made


def test_all_three_archives_are_fetched_once_and_their_members_cut(
    host: Host, zenodo: ZenodoFetcher, three: dict[str, dict[str, bytes]]
) -> None:
    for split in SPLITS:
        for name in NAMES[:5]:
            section = zenodo.fetch(clip_of(split, name), False)
            assert section.data == three[split][f"{split}/{name}"]
            assert (section.container, section.start_s, round(section.end_s, 3)) == ("wav", 0.0, 0.8)
    assert len(host.log) == 3


def test_a_member_that_the_archive_lacks_is_the_clips_failure(zenodo: ZenodoFetcher) -> None:
    for name in ("Ambience Birds.wav", "Breaking Glass.wav", "121006_rain&storm.wav", "development", ".members.json"):
        with pytest.raises(ClipError) as e:
            zenodo.fetch(clip_of("development", name), False)
        assert e.value.reason == "media.404"
        assert repr(name) in e.value.message
    zenodo.fetch(clip_of("development", NAMES[0]), False)


def test_an_unreachable_archive_fails_no_clip(host: Host, zenodo: ZenodoFetcher) -> None:
    path = f"records/{RECORD}/files/clotho_audio_validation.7z"
    data = host.files.pop(path)
    for _ in range(2):
        with pytest.raises(DataError, match="HTTP 404"):
            zenodo.fetch(clip_of("validation", NAMES[0]), False)
    host.files[path] = data
    zenodo.fetch(clip_of("validation", NAMES[0]), False)


def test_a_folder_that_lost_a_member_fails_no_clip(zenodo: ZenodoFetcher) -> None:
    clip = clip_of("evaluation", NAMES[1])
    zenodo.fetch(clip, False)
    path = zenodo.cache / "clotho_audio_evaluation" / "evaluation" / NAMES[1]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="delete"):
        zenodo.fetch(clip, False)
    path.unlink()
    with pytest.raises(DataError, match="delete"):
        zenodo.fetch(clip, False)


def test_the_archive_may_be_deleted_once_it_is_unpacked(host: Host, zenodo: ZenodoFetcher) -> None:
    zenodo.fetch(clip_of("validation", NAMES[0]), False)
    (zenodo.cache / "clotho_audio_validation.7z").unlink()
    again = ZenodoFetcher(zenodo.url, cache=zenodo.cache, md5={}, timeout_s=5)
    assert again.fetch(clip_of("validation", NAMES[0]), False).has_audio
    assert len(host.log) == 1


FETCHING = """
import json, sys
from harken.clips import Clip, Source, Split
from harken.media.transfer import Pace
from harken.media.zenodo import ZenodoFetcher

url, cache, digests, names = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
fetcher = ZenodoFetcher(url, cache=cache, md5=digests, timeout_s=20, pace=Pace(0))
for name in names:
    clip = Clip("zen:4783391/x/y", "clotho", Split.TRAIN, Source("zenodo", name, "clotho_audio_development"), 0.0, None)
    assert len(fetcher.fetch(clip, False).data) > 1000
"""


def test_workers_share_one_download(host: Host, zenodo: ZenodoFetcher) -> None:
    host.slow_s = 0.03
    path = f"records/{RECORD}/files/clotho_audio_development.7z"
    digests = {"clotho_audio_development.7z": md5(host.files[path])}
    workers = [
        child(FETCHING, zenodo.url, zenodo.cache, json.dumps(digests), json.dumps(list(NAMES[:5]))) for _ in range(3)
    ]
    for worker in workers:
        _, said = worker.communicate(timeout=60)
        assert worker.returncode == 0, said.decode()
    assert [p for p, _, _ in host.log] == [path]
    assert host.sent() == len(host.files[path])


@pytest.mark.parametrize("url", ["http://h/x.7z", "http://h/{archive}/{key}", "http://h/{record}"])
def test_a_url_without_its_fields_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="archive"):
        ZenodoFetcher(url, cache=tmp_path, md5={}, timeout_s=5)


def test_an_archive_without_md5_is_refused(tmp_path: Path) -> None:
    fetcher = ZenodoFetcher("http://127.0.0.1:9/{archive}.7z", cache=tmp_path, md5={}, timeout_s=5)
    with pytest.raises(DataError, match="no md5 is known"):
        fetcher.fetch(clip_of("development", "a.wav"), False)


# the lists


def test_the_card_names_three_archives_and_six_lists_with_their_md5() -> None:
    assert [f.name for f in ARCHIVES] == [f"clotho_audio_{s}.7z" for s in SPLITS]
    wanted = {f"clotho_{kind}_{s}.csv" for kind in ("captions", "metadata") for s in SPLITS}
    assert {f.name for f in LISTS} == wanted
    assert all(re.fullmatch(r"[0-9a-f]{32}", f.md5) for f in CARD.files)


def test_lists_are_obtained_byte_for_byte(host: Host, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class File:
        name: str
        url: str
        md5: str

    contents = {f.name: f"file_name,{i}\r\nJ\xf6rg\n".encode("iso-8859-1") for i, f in enumerate(LISTS)}
    files = [File(n, host.put(n, d), md5(d)) for n, d in contents.items()]
    kept, wrong = files[0], files[1]
    (tmp_path / kept.name).write_bytes(contents[kept.name])
    (tmp_path / wrong.name).write_bytes(contents[wrong.name].replace(b"\r\n", b"\n"))
    found = obtain_lists(tmp_path, files, timeout_s=5, pace=Pace(0))
    assert {n: p.read_bytes() for n, p in found.items()} == contents
    assert kept.name not in {p for p, _, _ in host.log}
    assert len(list(tmp_path.iterdir())) == 6
    host.put(wrong.name, b"other")
    (tmp_path / wrong.name).unlink()
    with pytest.raises(DataError, match=wrong.name):
        obtain_lists(tmp_path, files, timeout_s=5, pace=Pace(0))
