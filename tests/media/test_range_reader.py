from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from harken.errors import ClipError
from harken.media.range_reader import RangeReader

DATA = np.random.default_rng(5).integers(0, 256, 700_001, dtype=np.uint8).tobytes()


def _open(server: Any, path: str = "a.mp4", **how: Any) -> RangeReader:
    return RangeReader(server.url(path), **{"timeout_s": 0.4, "block_bytes": 65536, **how})


def test_reads_like_a_file(server: Any) -> None:
    server.files["a.mp4"] = DATA
    local = io.BytesIO(DATA)
    rng = np.random.default_rng(0)
    with _open(server) as remote:
        assert remote.size == len(DATA)
        assert remote.seekable()
        assert remote.readable()
        for _ in range(60):
            whence = int(rng.integers(0, 3))
            low = {0: 0, 1: -local.tell(), 2: -len(DATA)}[whence]
            offset = int(rng.integers(low, {0: len(DATA) + 50, 1: 90_000, 2: 50}[whence]))
            assert remote.seek(offset, whence) == local.seek(offset, whence)
            n = int(rng.integers(0, 150_000))
            assert remote.read(n) == local.read(n)
            assert remote.tell() == local.tell()
        remote.seek(0)
        local.seek(0)
        assert remote.read() == DATA
        buffer = bytearray(10)
        remote.seek(-5, 2)
        assert remote.readinto(buffer) == 5
        assert bytes(buffer[:5]) == DATA[-5:]
        with pytest.raises(ValueError, match="negative"):
            remote.seek(-1)
        remote.check()


def test_asks_for_whole_blocks_once_over_one_connection(server: Any) -> None:
    server.files["a.mp4"] = DATA
    with _open(server) as remote:
        for _ in range(3):
            remote.seek(70_000)
            remote.read(10)
        remote.seek(len(DATA) - 1)
        remote.read(10)
        assert remote.requests == 3 == len(server.seen)
        assert remote.bytes_fetched == 65536 * 2 + len(DATA) % 65536
    assert [r for _, _, r in server.seen] == ["bytes=0-65535", "bytes=65536-131071", "bytes=655360-700000"]
    assert server.connections == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("403", "media.403"),
        ("404", "media.404"),
        ("410", "media.410"),
        ("429", "session.http_429"),
        ("500", "net.5xx"),
        ("503", "net.5xx"),
        ("html", "media.not_media"),
        ("no_range", "media.no_range"),
        ("no_size", "media.no_range"),
        ("wrong_range", "media.no_range"),
    ],
)
def test_refuses_at_once(server: Any, fault: str, reason: str) -> None:
    server.files["a.mp4"] = DATA
    server.faults["a.mp4"] = fault
    with pytest.raises(ClipError) as e:
        _open(server)
    assert e.value.reason == reason
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("cut", "media.truncated"), ("stall", "net.timeout"), ("reset", "net.reset"), ("grows", "media.truncated")],
)
def test_an_error_on_the_way_is_typed_and_latched(server: Any, fault: str, reason: str) -> None:
    server.files["a.mp4"] = DATA
    server.faults["a.mp4"] = fault
    with _open(server) as remote:
        assert remote.read(100) == DATA[:100]
        for _ in range(2):  # the second read must not carry on behind the hole
            with pytest.raises(ClipError) as e:
                remote.read(200_000)
            assert e.value.reason == reason
        assert remote.error is not None
        with pytest.raises(ClipError):
            remote.check()


def test_an_empty_file_and_a_missing_server(server: Any) -> None:
    server.files["a.mp4"] = b""
    with pytest.raises(ClipError) as e:
        _open(server)
    assert e.value.reason == "media.empty"
    with pytest.raises(ClipError) as e:
        RangeReader("http://127.0.0.1:9/none", timeout_s=0.4)
    assert e.value.reason == "net.connect"
    with pytest.raises(ClipError) as e:
        RangeReader("ftp://127.0.0.1/none", timeout_s=0.4)
    assert e.value.reason == "tool.no_format"


@pytest.mark.parametrize("fault", ["close", "quiet_close"])
def test_a_closed_connection_is_opened_again(server: Any, fault: str) -> None:
    server.files["a.mp4"] = DATA
    server.faults["a.mp4"] = fault
    with _open(server) as remote:
        assert remote.read() == DATA


def test_follows_redirects_but_not_for_ever(server: Any) -> None:
    server.files["a.mp4"] = DATA
    server.faults["moved"] = "redirect:/a.mp4"
    server.faults["loop"] = "redirect:/loop"
    with _open(server, "moved") as remote:
        assert remote.read() == DATA
        assert sum(path == "moved" for _, path, _ in server.seen) == 1
    with pytest.raises(ClipError) as e:
        _open(server, "loop")
    assert e.value.reason == "net.connect"


def test_goes_through_the_proxy_of_the_environment(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["a.mp4"] = DATA
    monkeypatch.setenv("http_proxy", server.base)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with RangeReader("http://media.example/a.mp4", timeout_s=0.4) as remote:
        assert remote.read() == DATA
    assert server.seen[0][0] == "http://media.example/a.mp4"
