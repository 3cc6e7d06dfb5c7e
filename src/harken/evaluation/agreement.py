"""What planted truth says of images: which show what sounds, what a choice among them is worth, when to take them.

Only the built-in corpus has such a truth. An image is right where it shows a class that sounds somewhere in its clip;
one that shows something else, or a neutral scene, is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from harken.media.images import IMAGE_TIMES, image_times
from harken.world.truth import ClipTruth, Truth

Times = Mapping[str, Sequence[float]]
"""Clip id -> when its images are taken, in seconds from the clip's start."""

MOVED_S = 1e-3  # images nearer than this to where the rule wants them are where it wants them


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one clip's chosen image is worth. Clips without a right image have none: there is nothing to find.

    chosen: index of the image. is_right: whether it is a right one. share_right: of the clip's images, from 0 to 1,
    which is what an image at random is worth. is_hard: whether some image of the clip is wrong.
    """

    clip_id: str
    chosen: int
    is_right: bool
    share_right: float
    is_hard: bool


def right_images(truth: Truth, clip_id: str, times_s: Iterable[float]) -> list[bool]:
    """Whether each image shows a class that sounds in the clip."""
    return [bool(truth.image_is_right(clip_id, t)) for t in times_s]


def outcomes(truth: Truth, times: Times, chosen: Mapping[str, int]) -> list[Outcome]:
    """The outcome of every clip of `chosen` (clip id -> index of an image) that has a right image, in its order."""
    found = []
    for clip_id, index in chosen.items():
        flags = right_images(truth, clip_id, times[clip_id])
        if any(flags):
            found.append(Outcome(clip_id, index, flags[index], sum(flags) / len(flags), not all(flags)))
    return found


@dataclass(frozen=True, slots=True)
class Agreement:
    """How images taken at certain times agree with what sounds. Shares are in percent; None where there is none.

    n_clips, n_events, n_short, n_pairs: of what the shares are. events: sounds during which an image is taken; short:
    those of them that are shorter than the gap between two images of `endpoints`, a third of the clip for four, and
    could fall between. clips: those with a right image: what Nearest Match can reach at most. images: those that are
    right: what VIP-ANT's image at random is worth. pairs: images that show what sounds in the stretch of audio of
    their own number: what Multiframe Match trains on.
    """

    n_clips: int
    n_events: int
    n_short: int
    n_pairs: int
    events: float | None
    short: float | None
    clips: float | None
    images: float | None
    pairs: float | None


def agreement(truth: Truth, times: Times, segment_s: float) -> Agreement:
    """The agreement of images at `times`; image l goes with the audio from l to l + 1 times `segment_s`."""
    events: list[bool] = []
    short: list[bool] = []
    rights: list[list[bool]] = []
    pairs: list[bool] = []
    for clip_id, at in times.items():
        clip = truth[clip_id]
        gap_s = (clip.end_s - clip.start_s) / max(len(at) - 1, 1)
        for event in clip.events:
            if event.sounds:
                events.append(any(event.start_s <= t < event.end_s for t in at))
                if event.end_s - event.start_s < gap_s:
                    short.append(events[-1])
        rights.append(right_images(truth, clip_id, at))
        pairs += [_shows_sound_of(clip, t, i * segment_s, (i + 1) * segment_s) for i, t in enumerate(at)]
    return Agreement(
        n_clips=len(rights),
        n_events=len(events),
        n_short=len(short),
        n_pairs=len(pairs),
        events=_percent(events),
        short=_percent(short),
        clips=_percent([any(flags) for flags in rights]),
        images=_percent([f for flags in rights for f in flags]),
        pairs=_percent(pairs),
    )


def image_times_report(truth: Truth, taken: Times, segment_s: float) -> dict[str, Any]:
    """Every rule for when to take images, held against the truth on the same clips.

    taken: when the images of the features really were taken; clips have one number of images, and at least one clip is
    needed. Returns `rule`, the one in use: that whose times are nearest to them; `n_moved`, in how many clips some
    image was not taken where this rule wants it (a recording that ends early, another frame rate than planned);
    `most_s`, by how much at most; `segment_s`; `rules`: name -> Agreement, as a dict; and `taken`, the agreement of
    the times as they were.
    """
    wanted = {rule: {i: _nominal(truth[i], len(at), rule) for i, at in taken.items()} for rule in IMAGE_TIMES}
    off = {
        rule: {i: max(abs(a - b) for a, b in zip(at, taken[i], strict=True)) for i, at in of.items()}
        for rule, of in wanted.items()
    }
    rule = min(off, key=lambda r: float(np.median(list(off[r].values()))))
    return {
        "rule": rule,
        "n_moved": sum(d > MOVED_S for d in off[rule].values()),
        "most_s": max(off[rule].values()),
        "segment_s": segment_s,
        "rules": {r: asdict(agreement(truth, of, segment_s)) for r, of in wanted.items()},
        "taken": asdict(agreement(truth, taken, segment_s)),
    }


def _nominal(clip: ClipTruth, n: int, rule: str) -> list[float]:
    return image_times(0.0, clip.end_s - clip.start_s, n, clip.fps or None, rule)


def _shows_sound_of(clip: ClipTruth, t_s: float, start_s: float, end_s: float) -> bool:
    """Whether the picture at `t_s` shows a class that sounds between `start_s` and `end_s`."""
    heard = {e.name for e in clip.events if e.sounds and e.start_s < end_s and e.end_s > start_s}
    return any(e.name in heard for e in clip.on_screen(t_s))


def _percent(flags: Sequence[bool]) -> float | None:
    return 100 * sum(flags) / len(flags) if flags else None
