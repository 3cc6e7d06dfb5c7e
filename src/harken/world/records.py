"""The truth about one recording: what sounds when, what is on screen when, and what becomes of who asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing in a recording. Times are seconds from the clip's start (before the clip: negative).

    name: its class. size: "big" or "small". sounds: False for a distractor, a picture without a sound.
    shown: when its picture is on screen; empty for a sound off screen.
    """

    name: str
    size: str
    start_s: float
    end_s: float
    sounds: bool
    shown: tuple[Interval, ...]


@dataclass(frozen=True, slots=True)
class Shot:
    """A stretch of a recording over which the picture stays the same. Times are seconds in the recording.

    objects: (class name, size) from left to right; none over a neutral scene.
    """

    start_s: float
    end_s: float
    objects: tuple[tuple[str, str], ...]
    number: int


@dataclass(frozen=True, slots=True)
class Record:
    """One recording with its one clip, as planned.

    host, key, archive: its source (`harken.clips.Source`). start_s, end_s: the clip in the recording; end_s is None
    where the clip is the whole recording. duration_s: of the recording. audioset, audiocaps, clotho: the official list
    that names it, or "". reason: the canonical reason why the clip cannot be used, "" if it can. events: in the clip;
    decoys: before and after it. place: the neutral scene. fps: a fraction. seed: of the sounds and pictures.
    """

    clip_id: str
    host: str
    key: str
    archive: str
    start_s: float
    end_s: float | None
    duration_s: float
    audioset: str
    audiocaps: str
    clotho: str
    reason: str
    captions: tuple[str, ...]
    labels: tuple[str, ...]
    events: tuple[Event, ...]
    decoys: tuple[Event, ...]
    place: str
    background_db: float
    n_channels: int
    width: int
    height: int
    fps: tuple[int, int]
    keyframe_interval: int
    x264_preset: str
    is_faststart: bool
    is_adaptive: bool
    seed: int

    @property
    def length_s(self) -> float:
        """The clip's length in seconds."""
        return (self.duration_s if self.end_s is None else self.end_s) - self.start_s

    def rng(self, *path: int) -> np.random.Generator:
        """A generator of this record's own, one for every `path`."""
        return np.random.default_rng([self.seed, *path])


_LONGEST_SHOT_S = 4.0


def subtract(intervals: tuple[Interval, ...], hole: Interval) -> tuple[Interval, ...]:
    """`intervals` without `hole`; what remains of less than a tenth of a second is dropped."""
    kept: list[Interval] = []
    for a, b in intervals:
        kept += [(a, min(b, hole[0])), (max(a, hole[1]), b)]
    return tuple((a, b) for a, b in kept if b - a >= 0.1)


def on_screen(record: Record, t_s: float) -> list[Event]:
    """The events whose picture is on screen `t_s` seconds after the clip's start, from left to right."""
    return [e for e in (*record.events, *record.decoys) if any(a <= t_s < b for a, b in e.shown)]


def shots(record: Record) -> list[Shot]:
    """The recording's shots, in order and without gaps: a cut at every change and at least every four seconds."""
    cuts = {0.0, record.duration_s}
    for event in (*record.events, *record.decoys):
        for a, b in event.shown:
            cuts |= {a + record.start_s, b + record.start_s}
    edges = sorted(t for t in cuts if 0 <= t <= record.duration_s)
    found: list[Shot] = []
    for a, b in pairwise(edges):
        objects = tuple((e.name, e.size) for e in on_screen(record, (a + b) / 2 - record.start_s))
        n = max(1, int(np.ceil((b - a) / _LONGEST_SHOT_S)))
        inner = [*(a + (b - a) * k / n for k in range(n)), b]  # ends on b itself: shots leave no gap of rounding
        for start_s, end_s in pairwise(inner):
            found.append(Shot(start_s, end_s, objects, len(found)))
    return found
