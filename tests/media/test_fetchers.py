from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from yt_dlp.extractor.common import InfoExtractor
from yt_dlp.utils import ExtractorError, GeoRestrictedError

from harken.clips import Clip, Source, Split
from harken.errors import ClipError, ConfigError, DataError
from harken.media.decode import decode
from harken.media.fetchers import FETCHERS
from harken.media.folder import FolderFetcher
from harken.media.http import HttpFetcher
from harken.media.youtube import YouTubeFetcher
from harken.media.zenodo import ZenodoFetcher

BASE: dict[str, str] = {}


def _clip(key: str, start_s: float, end_s: float | None, host: str = "youtube", archive: str = "") -> Clip:
    return Clip(f"{host}:{key}", "test", Split.TRAIN, Source(host, key, archive), start_s, end_s)


def _numbers(section: Any, lab: Any, n: int = 4) -> list[int]:
    images = decode(section.data, section.start_s, section.end_s, n_images=n, sounds=()).images
    return [lab.read_number(i) for i in images]


class FakeTubeIE(InfoExtractor):
    """A loopback host whose answer to an id is chosen by the id."""

    _VALID_URL = r"http://127\.0\.0\.1:\d+/watch\?v=(?P<id>[\w-]+)"

    def _real_extract(self, url: str) -> dict[str, Any]:
        key = self._match_id(url)
        base = BASE["url"]
        whole = {
            "format_id": "18",
            "url": f"{base}/{key}.mp4",
            "ext": "mp4",
            "vcodec": "avc1",
            "acodec": "mp4a",
            "height": 96,
        }
        info: dict[str, Any] = {"id": key, "title": "t", "formats": [whole]}
        match key:
            case "privatevid_":
                raise ExtractorError(
                    "Private video. Sign in if you've been granted access to this video", expected=True
                )
            case "ratelimited":
                raise ExtractorError(
                    "Video unavailable. This content isn\u2019t available, try again later", expected=True
                )
            case "geoblocked_":
                raise GeoRestrictedError("not here", countries=["US"])
            case "brokenpars_":
                raise KeyError("streamingData")
            case "toomany_429":
                self._download_webpage(f"{base}/429", key)
            case "otherVideo_":
                return {**info, "id": "trailer0000"}
            case "aPlaylist__":
                return self.playlist_result([info], key)
            case "stillLive__":
                return {**info, "live_status": "is_live"}
            case "no_formats_":
                self.report_warning("n challenge solving failed")
                self.raise_no_formats("No video formats found!", video_id=key)
            case "apartAV____":
                video = {
                    "format_id": "134",
                    "url": f"{base}/v.mp4",
                    "ext": "mp4",
                    "vcodec": "avc1.4d",
                    "acodec": "none",
                    "height": 360,
                }
                sound = {
                    "format_id": "140",
                    "url": f"{base}/a.m4a",
                    "ext": "m4a",
                    "vcodec": "none",
                    "acodec": "mp4a.40.2",
                    "abr": 128,
                }
                big = {**video, "format_id": "137", "height": 1080, "url": f"{base}/none"}
                drc = {**sound, "format_id": "140-drc", "url": f"{base}/none", "abr": 129}
                hls = {**video, "format_id": "230", "protocol": "m3u8_native", "height": 240, "url": f"{base}/none"}
                return {**info, "duration": 6, "formats": [sound, drc, hls, video, big]}
            case "noSound____":
                return {**info, "formats": [{**whole, "acodec": "none"}]}
            case "shortvideo_":
                return {**info, "duration": 6}
        return info


@pytest.fixture
def tube(server: Any, lab: Any) -> YouTubeFetcher:
    BASE["url"] = server.base
    server.faults["429"] = "429"
    return YouTubeFetcher(server.base + "/watch?v={key}", extractors=(FakeTubeIE,), timeout_s=1)


def test_youtube_fetches_a_clip(tube: YouTubeFetcher, server: Any, lab: Any) -> None:
    server.files["-leading_id.mp4"] = lab.make()
    section = tube.fetch(_clip("-leading_id", 2.0, 5.0), True)
    assert _numbers(section, lab) == [50, 75, 100, 124]
    assert section.bytes_fetched > 0
    assert section.source_duration_s == 6.0
    assert section.data == tube.fetch(_clip("-leading_id", 2.0, 5.0), True).data


def test_youtube_reads_sound_and_pictures_apart(tube: YouTubeFetcher, server: Any, lab: Any) -> None:
    server.files |= {"v.mp4": lab.make(acodec=None), "a.m4a": lab.make(vcodec=None)}
    section = tube.fetch(_clip("apartAV____", 2.0, 5.0), True)
    assert section.has_video
    assert _numbers(section, lab) == [50, 75, 100, 124]
    assert {path for _, path, _ in server.seen} == {"v.mp4", "a.m4a"}  # not HLS, not 1080 lines, not the DRC copy
    server.seen.clear()
    assert not tube.fetch(_clip("apartAV____", 2.0, 5.0), False).has_video
    assert {path for _, path, _ in server.seen} == {"a.m4a"}


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("privatevid_", "gone.private"),
        ("ratelimited", "session.rate_limited"),
        ("geoblocked_", "denied.geo"),
        ("brokenpars_", "tool.extractor_broken"),
        ("toomany_429", "session.http_429"),
        ("otherVideo_", "qc.id_mismatch"),
        ("aPlaylist__", "qc.id_mismatch"),
        ("stillLive__", "live.processing"),
        ("no_formats_", "tool.extractor_broken"),
        ("noSound____", "qc.no_audio"),
        ("shortvideo_", "qc.past_end"),
        ("missingFile", "media.404"),
        ("htmlInstead", "media.not_media"),
        ("emptyFile__", "media.empty"),
        ("cutOffFile_", "media.truncated"),
    ],
)
def test_youtube_says_why_not(tube: YouTubeFetcher, server: Any, lab: Any, key: str, reason: str) -> None:
    server.files |= {"emptyFile__.mp4": b"", "cutOffFile_.mp4": lab.make()[:20_000]}
    server.faults["htmlInstead.mp4"] = "html"
    with pytest.raises(ClipError) as e:
        tube.fetch(_clip(key, 50.0, 60.0), True)
    assert e.value.reason == reason
    assert key not in e.value.message or reason == "qc.id_mismatch"
    if key == "no_formats_":
        assert "n challenge solving failed" in e.value.message


def test_youtube_never_leaves_the_extractors_it_was_given(tube: YouTubeFetcher) -> None:
    assert list(tube._ydl._ies) == ["FakeTube", "Youtube"]
    with pytest.raises(ConfigError, match="watch_url"):
        YouTubeFetcher("https://example.org/", timeout_s=1)


def test_http_quotes_names_whole(server: Any, lab: Any) -> None:
    name = " Bells, #2 &quot;loud&quot; 100% (1/2?).wav".replace("/", "")
    data = lab.make("wav", vcodec=None, acodec="pcm_s16le", channels=1)
    server.files[f"clotho/clotho_audio_development/{quote(name, safe='')}"] = data
    fetcher = HttpFetcher(server.base + "/clotho/{archive}/{key}", timeout_s=1)
    section = fetcher.fetch(_clip(name, 0.0, None, "zenodo", "clotho_audio_development"), False)
    assert section.data == data
    assert section.container == "wav"
    assert section.bytes_fetched == len(data)
    with pytest.raises(ClipError) as e:
        fetcher.fetch(_clip("other.wav", 0.0, None, "zenodo", "clotho_audio_development"), False)
    assert e.value.reason == "media.404"
    for bad in ("http://127.0.0.1/x", "http://127.0.0.1/{key}/{name}"):
        with pytest.raises(ConfigError, match="key"):
            HttpFetcher(bad, timeout_s=1)


@pytest.fixture
def folder(tmp_path: Path, lab: Any) -> Path:
    long = lab.make(seconds=6.0)
    ready = lab.make(seconds=2.0)
    for name in ("-whole_vid_.mp4", "whole_12_34.mp4", "both_kinds_.mp4"):
        (tmp_path / name).write_bytes(long)
    for name in ("-ready_cut_.mp4", "both_kinds__30.mp4", "fraction____239.8.mp4", "two_exts_ab.mp4"):
        (tmp_path / name).write_bytes(ready)
    (tmp_path / "two_exts_ab.wav").write_bytes(lab.make("wav", vcodec=None, acodec="pcm_s16le", seconds=2.0))
    (tmp_path / "two_exts_ab.json").write_text("{}")
    (tmp_path / "cutoff_file.mp4").write_bytes(long[:30_000])
    (tmp_path / "development").mkdir()
    wav = lab.make("wav", vcodec=None, acodec="pcm_s16le", seconds=1.0, channels=1)
    for name in (" Ambience Birds.wav", "Breaking Glass .wav", "rain&amp;storm.wav"):
        (tmp_path / "development" / name).write_bytes(wav)
    (tmp_path / "flat, #1.wav").write_bytes(wav)
    return tmp_path


def test_folder_layouts(folder: Path, lab: Any) -> None:
    fetch = FolderFetcher(folder).fetch

    def numbers(key: str, start_s: float, end_s: float) -> list[int]:
        return _numbers(fetch(_clip(key, start_s, end_s), True), lab)

    assert numbers("-whole_vid_", 3.0, 5.0) == [75, 91, 108, 124]
    assert numbers("-whole_vid_", 0.0, 6.0)[0] == 0
    assert numbers("whole_12_34", 1.0, 3.0)[0] == 25  # an id that looks like an id and a start
    assert numbers("-ready_cut_", 40.0, 42.0) == [
        0,
        16,
        33,
        49,
    ]  # too short for 42 s, as long as the clip: it is the clip
    assert numbers("-ready_cut_", 0.0, 2.0) == [0, 16, 33, 49]
    assert numbers("both_kinds_", 30.0, 32.0) == [0, 16, 33, 49]
    assert numbers("both_kinds_", 3.0, 5.0)[0] == 75
    assert numbers("fraction___", 239.8, 241.8)[0] == 0
    assert fetch(_clip("two_exts_ab", 0.0, 2.0), True).has_video


def test_folder_clotho_names_are_exact(folder: Path) -> None:
    fetcher = FolderFetcher(folder)
    for name in (" Ambience Birds.wav", "Breaking Glass .wav", "rain&amp;storm.wav", "flat, #1.wav"):
        section = fetcher.fetch(_clip(name, 0.0, None, "zenodo", "clotho_audio_development"), False)
        assert section.end_s == pytest.approx(1.0)
    for name in ("Ambience Birds.wav", "rain&storm.wav"):
        with pytest.raises(ClipError) as e:
            fetcher.fetch(_clip(name, 0.0, None, "zenodo", "clotho_audio_development"), False)
        assert e.value.reason == "folder.absent"
    with pytest.raises(ClipError):  # another split's folder does not answer
        fetcher.fetch(_clip(" Ambience Birds.wav", 0.0, None, "zenodo", "clotho_audio_evaluation"), False)


@pytest.mark.parametrize(
    ("key", "start_s", "end_s", "reason"),
    [
        ("notthere___", 0.0, 2.0, "folder.absent"),
        ("-whole_vid_", 30.0, 32.0, "qc.past_end"),
        ("-whole_vid_", 4.0, 8.0, "qc.short"),
        ("cutoff_file", 1.0, 3.0, "media.truncated"),
    ],
)
def test_folder_says_why_not(folder: Path, key: str, start_s: float, end_s: float, reason: str) -> None:
    with pytest.raises(ClipError) as e:
        FolderFetcher(folder).fetch(_clip(key, start_s, end_s), True)
    assert e.value.reason == reason
    assert str(folder) not in str(e.value)


def test_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        FolderFetcher(tmp_path / "none")


def test_the_dict_of_hosts() -> None:
    assert dict(FETCHERS.items()) == {
        "youtube": YouTubeFetcher,
        "http": HttpFetcher,
        "folder": FolderFetcher,
        "zenodo": ZenodoFetcher,
    }


def test_download_workers_stay_small() -> None:
    code = (
        "import sys, harken.datasets, harken.media.fetchers, harken.media.decode, harken.media.images;"
        "sys.exit(' '.join({'torch', 'yt_dlp', 'scipy'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
