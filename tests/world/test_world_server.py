"""The host on loopback: ranges, watch pages, and yt-dlp's own verdict on every kind of refusal."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import yt_dlp

from harken.errors import DataError
from harken.world.recordings import media_files, media_folder
from harken.world.records import Record
from harken.world.server import serve, write_watch_index
from harken.world.youtube import WatchPageIE


@pytest.fixture(scope="module")
def base(world: Path) -> Iterator[str]:
    with serve(world / "host") as url:
        yield url


@pytest.fixture(scope="module")
def plain(world: Path, small_plan: list[Record]) -> tuple[str, bytes]:
    r = next(r for r in small_plan if r.host == "youtube" and not r.reason and not r.is_adaptive)
    return f"/videoplayback/{r.key}.mp4", (media_folder(world / "host", r) / f"{r.key}.mp4").read_bytes()


def _get(base: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=5)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_the_whole_file_and_its_ranges(base, plain):
    path, data = plain
    status, headers, body = _get(base, path)
    assert (status, body, headers["Accept-Ranges"], headers["Content-Type"]) == (200, data, "bytes", "video/mp4")
    n = len(data)
    for header, start, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=100-199", 100, 200),
        (f"bytes={n - 5}-", n - 5, n),
        ("bytes=-7", n - 7, n),
        (f"bytes=10-{n + 1000}", 10, n),
    ):
        status, headers, body = _get(base, path, Range=header)
        assert (status, body) == (206, data[start:end])
        assert headers["Content-Range"] == f"bytes {start}-{end - 1}/{n}"
    status, headers, body = _get(base, path, Range=f"bytes={n}-")
    assert (status, headers["Content-Range"], body) == (416, f"bytes */{n}", b"")
    assert _get(base, path, Range="lines=1-2")[0] == 200


def test_one_connection_serves_many_requests(base, plain):
    path, data = plain
    connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=5)
    connection.connect()
    port = connection.sock.getsockname()[1]
    for k in range(20):
        connection.request("GET", path, headers={"Range": f"bytes={k}-{k + 9}"})
        assert connection.getresponse().read() == data[k : k + 10]
        assert connection.sock.getsockname()[1] == port
    connection.request("HEAD", path)
    answer = connection.getresponse()
    assert (answer.status, answer.read(), answer.headers["Content-Length"]) == (200, b"", str(len(data)))
    connection.close()


def test_clotho_names_are_reached_quoted(base, world, small_plan):
    sounds = [r for r in small_plan if r.host == "zenodo"]
    for r in sounds:
        status, _, body = _get(base, f"/clotho/{r.archive}/{quote(r.key)}")
        if r.reason == "media.404":
            assert status == 404
        else:
            assert (status, body) == (200, (media_folder(world / "host", r) / r.key).read_bytes())
    assert {r.reason for r in sounds} == {"", "media.404", "media.truncated", "qc.silent"}


OUTSIDE = (
    "/",
    "/videoplayback/",
    "/videoplayback/nobody.mp4",
    "/videoplayback/..%2Fwatch.json",
    "/watch.json",
    "/clotho/a/..%2F..%2Fwatch.json",
)


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_else_is_served(base, path):
    assert _get(base, path)[0] == 404


def test_a_folder_that_is_no_host_is_refused(tmp_path):
    with pytest.raises(DataError, match="Build the corpus first"), serve(tmp_path):
        pass


class _Quiet:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def debug(self, message: str) -> None: ...

    info = error = debug

    def warning(self, message: str) -> None:
        self.warnings.append(message)


def _extractor() -> tuple[Any, _Quiet]:
    log = _Quiet()
    ydl = yt_dlp.YoutubeDL({"quiet": True, "logger": log, "skip_download": True, "format": "b/wv*+wa"}, auto_init=False)
    ydl.add_info_extractor(WatchPageIE())
    return ydl, log


SAYS = {
    "gone.private": "Private video. Sign in if you've been granted access to this video",
    "gone.removed_uploader": "Video unavailable. This video has been removed by the uploader",
    "gone.account_terminated": "YouTube account associated with this video has been terminated",
    "denied.copyright_country": "who has blocked it in your country on copyright grounds",
    "denied.age": "Sign in to confirm your age. This video may be inappropriate for some users",
    "denied.members": "available to this channel's members on level",
    "gone.unspecified": "Video unavailable",
}


def test_yt_dlp_says_of_every_refusal_what_it_says_of_youtubes(tmp_path, default_plan, monkeypatch):
    hosts: set[str] = set()
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def watched_connect(self: socket.socket, address: Any) -> None:
        hosts.add(address[0])
        connect(self, address)

    def watched_resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        hosts.add(host)
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", watched_connect)
    monkeypatch.setattr(socket, "getaddrinfo", watched_resolve)
    write_watch_index(default_plan, tmp_path)
    ydl, log = _extractor()
    with serve(tmp_path) as base:
        for reason, words in SAYS.items():
            r = next(r for r in default_plan if r.reason == reason)
            with pytest.raises(yt_dlp.utils.DownloadError) as caught:
                ydl.extract_info(f"{base}/watch?v={r.key}", download=False)
            inner = caught.value.exc_info[1]
            assert words in inner.orig_msg
            assert inner.expected
            assert inner.video_id == r.key
            if reason == "gone.unspecified":
                assert inner.orig_msg == words
        with pytest.raises(yt_dlp.utils.DownloadError) as caught:
            ydl.extract_info(f"{base}/watch?v=never_there", download=False)
        assert caught.value.exc_info[1].orig_msg == "Video unavailable"
    assert hosts == {"127.0.0.1"}
    assert log.warnings == []


def test_yt_dlp_finds_the_formats_of_playable_videos(base, world, small_plan):
    ydl, log = _extractor()
    seen = set()
    for r in small_plan:
        if r.host != "youtube" or (r.reason and not r.reason.startswith(("media.", "qc."))):
            continue
        info = ydl.extract_info(f"{base}/watch?v={r.key}", download=False)
        assert info["id"] == r.key
        assert info["duration"] == int(r.duration_s)
        formats = info.get("requested_formats") or [info]
        seen.add(tuple(f["format_id"] for f in formats))
        names = [f["url"].rsplit("/", 1)[1] for f in formats]
        if r.reason == "media.404":
            assert _get(base, f"/videoplayback/{names[0]}")[0] == 404
        else:
            assert names == list(media_files(r))
            sizes = [(media_folder(world / "host", r) / n).stat().st_size for n in names]
            assert [f["filesize"] or 0 for f in formats] == sizes
    assert seen == {("18",), ("134", "140")}
    assert log.warnings == []
