"""What is done with a broken file, in a guarded process: all that download and extract would do with it."""

from __future__ import annotations

import io
import math
import resource
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harken.errors import ClipError
from harken.media.reasons import REASONS
from harken.media.section import Section, cut
from harken.stages.extract import ExtractConfig, featurer

Row = dict[str, Any]
SLACK = 1 << 16  # bytes that a container may add


@dataclass(frozen=True)
class Outcome:
    """What became of a file: `extracted` as it is, `cut` and then extracted: `ok`, a canonical reason, or, where what
    came out is wrong or another error was raised, `bug` and its story in `bugs`. `peak_bytes`: the process' most."""

    extracted: str
    cut: str
    bugs: tuple[str, ...]
    peak_bytes: int


def judge(cfg: ExtractConfig) -> Callable[[Row], Outcome]:
    """A function of a media shard's row whose media were never cut."""
    features = featurer(cfg)
    bugs: list[str] = []

    def ended(work: Callable[[], str]) -> str:
        try:
            return work()
        except ClipError as e:
            if e.reason in REASONS and e.message:
                return e.reason
            bugs.append(repr(e))
        except MemoryError:
            raise
        except Exception:
            bugs.append(traceback.format_exc())
        return "bug"

    def extracted(row: Row) -> str:
        _check_features(features(row), row, cfg)
        return "ok"

    def cut_and_extracted(row: Row) -> str:
        section = cut(io.BytesIO(row["media"]), row["start_s"], row["end_s"], row["has_images"])
        _check_section(section, row)
        values = {"start_s": section.start_s, "end_s": section.end_s, "has_images": section.has_video}
        outcome = ended(lambda: extracted({"media": section.data, **values}))
        return outcome if outcome in ("ok", "bug") else f"ok, then {outcome}"

    def work(row: Row) -> Outcome:
        bugs.clear()
        as_it_is = {**row, "end_s": 2.0 if row["end_s"] is None else row["end_s"]}
        outcomes = ended(lambda: extracted(as_it_is)), ended(lambda: cut_and_extracted(row))
        return Outcome(*outcomes, tuple(bugs), _peak_bytes())

    return work


def _peak_bytes() -> int:
    if sys.platform == "linux":  # where getrusage counts in what the parent had when it started this process
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(status["VmHWM"].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _check_features(found: dict[str, Any], row: Row, cfg: ExtractConfig) -> None:
    """Of the right type, finite, and no longer than was asked for."""
    length_s = min(row["end_s"] - row["start_s"], cfg.max_s)
    for name, bins in (("fbank", 128), ("logmel", 64)):
        values = found[name]
        assert values.dtype == cfg.dtype
        assert values.ndim == 2
        assert values.shape[1] == bins
        assert len(values) <= math.ceil(100 * length_s) + 1
        assert np.isfinite(values).all()
    n_images = cfg.n_images if row["has_images"] else 0
    pictures, times = found["images"] or [], found["image_times_s"] or []
    assert len(pictures) == len(times) == n_images
    assert all(p[:2] == b"\xff\xd8" for p in pictures)
    assert all(0 <= t <= length_s for t in times)
    assert times == sorted(times)
    assert 0 < found["sound_s"] <= length_s + 1e-3
    assert 0 <= found["clipped_share"] <= 1
    assert math.isfinite(found["fbank_mean"])


def _check_section(section: Section, row: Row) -> None:
    """Whole numbers of a clip that is as long as was asked for, in a file that is no larger than what it came from."""
    assert 0 <= section.start_s < section.end_s < math.inf
    if row["end_s"] is not None:
        assert math.isclose(section.end_s - section.start_s, row["end_s"] - row["start_s"], abs_tol=1e-6)
    assert 0 < len(section.data) <= len(row["media"]) + SLACK
    assert section.has_video == row["has_images"]
    assert section.decoded_s > 0
    assert math.isfinite(section.peak_dbfs)
