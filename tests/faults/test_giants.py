"""What is huge, or says so, costs bounded memory and ends in a right result or a reason."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harken.config import read_params
from harken.errors import ClipError
from harken.guard import Guard
from harken.stages.extract import ExtractConfig

HERE = Path(__file__).parent
MEMORY_GB = 1.0
OWN_BYTES = 900e6  # torch, FFmpeg and all else that the process holds before it begins


@pytest.fixture(scope="module")
def giants(beside: Any) -> Any:
    return beside("giants")


@pytest.fixture(scope="module")
def guard(giants: Any) -> Iterator[Any]:
    cfg = ExtractConfig(**read_params(HERE.parents[1] / "presets/world.yaml")["extract"])
    with Guard(importlib.import_module("mutant_work").judge, cfg, limit_s=120, memory_gb=MEMORY_GB) as found:
        yield found


@pytest.fixture
def ends(guard: Any) -> Any:
    """How a file ends, extracted as it is and cut first; no bug, and within the memory it is given."""

    def ends(data: bytes, start_s: float, end_s: float | None, has_images: bool) -> tuple[str, str]:
        try:
            found = guard({"media": data, "start_s": start_s, "end_s": end_s, "has_images": has_images})
        except ClipError as e:
            return e.reason, e.reason
        assert found.bugs == (), found.bugs[0]
        assert found.peak_bytes < OWN_BYTES + MEMORY_GB * 1e9
        return found.extracted, found.cut

    return ends


def test_a_recording_of_an_hour(giants: Any, ends: Any) -> None:
    data = giants.long_recording(1)
    assert ends(data, 0.0, 10.0, True) == ("ok", "ok")
    start_s = 58.0 * giants.STEP_S
    assert ends(data, start_s, start_s + 10, True) == ("ok", "ok")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("container", "acodec"), [("matroska", "flac"), ("mp4", "flac"), ("mp4", "aac"), ("matroska", "libopus")]
)
def test_a_recording_of_ten_hours(container: str, acodec: str, giants: Any, ends: Any) -> None:
    data = giants.long_recording(10, container, acodec)
    assert ends(data, 0.0, 10.0, True) == ("ok", "ok")
    start_s = 590.0 * giants.STEP_S
    assert ends(data, start_s, start_s + 10, True) == ("ok", "ok")
    # all of it: 288 million samples or more are not held
    assert ends(data, 0.0, None, False)[1] == "media.too_big"


LYING = {
    "mjpeg": lambda g, w, h: g.with_sound([g.jpeg_that_lies(w, h)] * 10, "mjpeg"),
    "vp8": lambda g, w, h: g.with_sound(g.vp8_that_lies(w, h, 10), "libvpx"),
    "vp9": lambda g, w, h: g.with_sound(g.vp9_that_lies(w, h, 10), "libvpx-vp9"),
    "h264": lambda g, w, h: g.with_sound(g.h264_that_lies(w, h, 10), "libx264", "avi"),
}


@pytest.mark.parametrize("codec", LYING)
def test_a_picture_that_says_it_is_16k_by_16k(codec: str, giants: Any, ends: Any) -> None:
    make: Callable[..., bytes] = LYING[codec]
    assert ends(make(giants, 64, 48), 0.0, 1.0, True)[0] == "ok"  # but for its size it is sound
    for size in ((16_000, 16_000), (16_368, 16_368)):
        for outcome in ends(make(giants, *size), 0.0, 1.0, True):
            assert outcome.startswith("media."), (size, outcome)


@pytest.mark.parametrize("codec", ["vp8", "h264"])
def test_a_picture_that_says_it_is_a_line(codec: str, giants: Any, ends: Any) -> None:
    """Its short side at the size of an image, the other would be a million pixels."""
    make: Callable[..., bytes] = LYING[codec]
    for size in ((16_000, 16), (16, 16_000)):
        for outcome in ends(make(giants, *size), 0.0, 1.0, True):
            assert outcome.removeprefix("ok, then ").startswith("media."), (size, outcome)


def test_a_picture_that_is_16k_by_16k(giants: Any, ends: Any) -> None:
    data = giants.with_sound([giants.jpeg_of(16_000, 16_000)] * 10, "mjpeg")
    extracted, cut = ends(data, 0.0, 1.0, True)
    assert extracted == "media.too_big"
    assert cut.startswith("media.")


@pytest.mark.parametrize("claimed", [2_000_000_000, 0x7FFFFFFF, 0xFFFFFFF0])
def test_a_wav_file_that_claims_2_gb(claimed: int, giants: Any, ends: Any) -> None:
    for how in (
        {},
        {"riff": 16_036},
        {"channels": 65_535, "align": 65_535},
        {"channels": 2, "align": 60_000},
        {"rate": 0x7FFFFFFF},
    ):
        for end_s in (1.0, 30.0, None):
            for outcome in ends(giants.wav_that_lies(claimed, **how), 0.0, end_s, False):
                assert outcome == "ok" or outcome.startswith(("media.", "qc.")), (how, end_s)


def test_an_mp4_file_that_claims_2_gb_of_sound(giants: Any, ends: Any) -> None:
    mutations = importlib.import_module("mutations")
    for name in ("mp4", "fragmented", "m4a"):
        good = mutations.recordings((name,))[name]
        for box, at in ((b"stsz", 8), (b"stsz", 12), (b"mdhd", 20), (b"mdhd", 16), (b"stts", 12), (b"stts", 16)):
            for claimed in (2_000_000_000, 0xFFFFFFFF):
                data = good
                for place in [i for i in range(len(good)) if good.startswith(box, i)]:
                    data = data[: place + at - 4 + 4] + struct.pack(">I", claimed) + data[place + at + 4 :]
                for outcome in ends(data, 0.0, 2.0, name != "m4a"):
                    assert outcome == "ok" or outcome.startswith(("media.", "qc.", "ok, then media.")), (name, box, at)
