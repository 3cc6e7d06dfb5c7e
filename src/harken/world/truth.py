"""What is true about the built-in corpus, for tests, oracles and error analysis; no stage of training may read it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harken.config import Config
from harken.errors import DataError
from harken.world.classes import CLASSES
from harken.world.records import Event, Interval, Record


@dataclass(frozen=True, slots=True)
class ClipTruth:
    """One clip: why it cannot be used ("" if it can), its times in the recording, and its events.

    audioset, audiocaps, clotho: the list that names it, or "". start_s, end_s, duration_s: the clip in its recording.
    events: times relative to the clip's start. decoys: what sounds and shows before and after the clip. labels: the
    classes that sound in the clip. fps: of the video; 0 for sounds.
    """

    clip_id: str
    reason: str
    audioset: str
    audiocaps: str
    clotho: str
    start_s: float
    end_s: float
    duration_s: float
    fps: float
    captions: tuple[str, ...]
    labels: tuple[str, ...]
    events: tuple[Event, ...]
    decoys: tuple[Event, ...]

    @property
    def is_usable(self) -> bool:
        """Whether the clip can be had, whole and as promised."""
        return self.reason == ""

    @property
    def has_distractor(self) -> bool:
        """Whether a picture is shown of what does not sound, or a sound has no picture at all."""
        return any(not e.sounds or not e.shown for e in self.events)

    def sounding(self, t_s: float) -> tuple[Event, ...]:
        """What sounds `t_s` seconds after the clip's start."""
        return tuple(e for e in self.events if e.sounds and e.start_s <= t_s < e.end_s)

    def on_screen(self, t_s: float) -> tuple[Event, ...]:
        """What the video frame at `t_s` seconds after the clip's start shows; none over a neutral scene.

        The frame is the last one that begins at or before `t_s`, so at the very start it may still show a decoy;
        times at or after the clip's end give its last frame.
        """
        if self.fps <= 0:
            return ()
        at = min(max(t_s, 0.0), self.end_s - self.start_s - 1 / self.fps) + self.start_s
        frame_s = int(at * self.fps + 1e-6) / self.fps + 1e-9 - self.start_s
        things = (*self.events, *self.decoys)
        return tuple(e for e in things if any(a <= frame_s < b for a, b in e.shown))


@dataclass(frozen=True, slots=True)
class Truth:
    """Every clip's truth by clip id, and the classes' mids."""

    clips: Mapping[str, ClipTruth]
    mids: Mapping[str, str]

    @staticmethod
    def read(path: Path) -> Truth:
        """The truth.json that `harken.world.build` wrote last. Raises DataError where it is missing or unreadable."""
        if not path.is_file():
            raise DataError(f"{path}: no truth here: the built-in corpus is not complete. Build it first.")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            clips = {i: _clip(i, c) for i, c in found["clips"].items()}
            return Truth(clips, found["mids"])
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(f"{path}: not a truth file ({type(e).__name__}: {e}). Build the corpus anew.") from None

    def __getitem__(self, clip_id: str) -> ClipTruth:
        if clip_id not in self.clips:
            raise DataError(f"clip {clip_id!r} is not in the built-in corpus of {len(self.clips)} clips.")
        return self.clips[clip_id]

    def image_is_right(self, clip_id: str, t_s: float) -> bool | None:
        """Whether the picture `t_s` seconds into the clip shows a class that sounds somewhere in the clip.

        None where the picture shows a neutral scene, or there is no picture (a sound of Clotho).
        """
        clip = self[clip_id]
        shown = clip.on_screen(t_s)
        return any(e.name in clip.labels for e in shown) if shown else None


def _interval(pair: list[float]) -> Interval:
    a, b = pair
    return a, b


def _clip(clip_id: str, c: dict[str, Any]) -> ClipTruth:
    events = {
        kind: tuple(Event(**{**e, "shown": tuple(_interval(p) for p in e["shown"])}) for e in c[kind])
        for kind in ("events", "decoys")
    }
    texts = {"captions": tuple(c["captions"]), "labels": tuple(c["labels"])}
    return ClipTruth(clip_id, **{**c, **events, **texts})


def write_truth(records: Iterable[Record], cfg: Config, path: Path) -> None:
    """Write `path` (JSON, sorted keys), in one step: a file at its final name is complete."""
    clips = {}
    for r in records:
        clips[r.clip_id] = {
            "reason": r.reason,
            "audioset": r.audioset,
            "audiocaps": r.audiocaps,
            "clotho": r.clotho,
            "start_s": r.start_s,
            "end_s": r.duration_s if r.end_s is None else r.end_s,
            "duration_s": r.duration_s,
            "fps": r.fps[0] / r.fps[1] if r.host == "youtube" else 0.0,
            "captions": r.captions,
            "labels": r.labels,
            "events": [asdict(e) for e in r.events],
            "decoys": [asdict(e) for e in r.decoys],
        }
    mids = {name: c.mid for name, c in CLASSES.items()}
    text = json.dumps({"config": cfg.model_dump(), "mids": mids, "clips": clips}, sort_keys=True, separators=(",", ":"))
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text + "\n", encoding="utf-8")
    scratch.replace(path)
