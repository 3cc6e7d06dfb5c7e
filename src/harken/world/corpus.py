"""The plan of the built-in corpus: every recording's truth, decided before a single sample is made.

A plan is cheap (a few thousand records a second) and depends on the config alone. Each recording draws from a generator
of its own, so a larger corpus begins with the smaller one's recordings.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np
from pydantic import Field, model_validator

from harken.clips import youtube_id, zenodo_id
from harken.config import Config
from harken.world.captions import Along, Scene, Sound, Then, caption, paraphrases
from harken.world.classes import CLASSES, NAMES, SIZES, is_held_out
from harken.world.lists import clotho_name, write_lists
from harken.world.pictures import SCENES
from harken.world.recordings import NOT_SERVED, make_recording
from harken.world.records import Event, Interval, Record, subtract

__all__ = ["WorldConfig", "make_recording", "plan", "write_lists"]

CLOTHO_RECORD = "4783391"
N_CAPTIONS = 5

UNAVAILABLE = NOT_SERVED
BROKEN = (
    "media.truncated",
    "qc.silent",
    "qc.no_audio",
    "qc.no_video",
    "media.not_media",
    "media.empty",
    "qc.past_end",
)
CLOTHO_UNAVAILABLE = ("media.404",)
CLOTHO_BROKEN = ("media.truncated", "qc.silent")

_DISTRACTOR_SHARE = 0.4  # of the drawn clips; a few draws leave no right picture and are dropped, 35 % remain
_DISTRACTOR_SPANS = ((0.0, 0.25), (0.2, 0.5), (0.5, 0.8), (0.75, 1.0), (0.0, 0.45), (0.25, 0.75), (0.55, 1.0))


class WorldConfig(Config):
    """The size and shape of the built-in corpus.

    n_train: rows of AudioSet's unbalanced list, in which all AudioCaps clips (n_captioned for training, n_val, n_test)
    stand as well, as in the real one. n_balanced and n_eval: AudioSet's other lists. n_clotho_*: sounds of Clotho.
    unavailable, broken: shares of the recordings that cannot be had, or are damaged. width, height (pixels) and fps are
    the videos'. n_sounds: the shares of the clips that have one, two and three sounds; null: 60, 28 and 12 %, and
    more or fewer in the test galleries. sound_s: the shortest and the longest that a sound lasts, but for one that goes
    on behind others in turn; null: sounds fill the clip between them. background_db: from how soft to how loud the
    noise behind the sounds is, in dBFS. further: the fewest and the most further sounds of a clip with captions, as
    long as `sound_s` says and whenever they come; its labels tell of them; null: none. told: how many of its sounds a
    caption tells, each caption another choice of them; null: all but the further ones.
    """

    seed: int
    n_train: int = Field(ge=1)
    n_captioned: int = Field(ge=1)
    n_val: int = Field(ge=1)
    n_test: int = Field(ge=1)
    n_balanced: int = Field(ge=1)
    n_eval: int = Field(ge=1)
    n_clotho_train: int = Field(ge=1)
    n_clotho_val: int = Field(ge=1)
    n_clotho_test: int = Field(ge=1)
    width: int = Field(ge=32, multiple_of=2)
    height: int = Field(ge=32, multiple_of=2)
    fps: int = Field(ge=2, le=60)
    unavailable: float = Field(ge=0, le=0.5)
    broken: float = Field(ge=0, le=0.25)
    n_sounds: tuple[float, float, float] | None
    sound_s: tuple[float, float] | None
    background_db: tuple[float, float]
    further: tuple[int, int] | None
    told: int | None = Field(ge=1, le=3)

    @model_validator(mode="after")
    def _shares(self) -> WorldConfig:
        if self.n_sounds is not None and (min(self.n_sounds) < 0 or abs(sum(self.n_sounds) - 1) > 1e-6):
            raise ValueError(f"n_sounds is {list(self.n_sounds)}: expected three shares that sum to 1")
        return self

    @model_validator(mode="after")
    def _lasts(self) -> WorldConfig:
        if self.sound_s is not None and not 0.2 <= self.sound_s[0] <= self.sound_s[1]:
            raise ValueError(f"sound_s is {list(self.sound_s)}: expected [shortest, longest], at least 0.2 seconds")
        return self

    @model_validator(mode="after")
    def _leaves_out(self) -> WorldConfig:
        if self.further is None:
            return self
        if not 0 <= self.further[0] <= self.further[1] <= len(NAMES) - 6:
            raise ValueError(f"further is {list(self.further)}: expected [fewest, most], at most {len(NAMES) - 6}")
        if self.sound_s is None:
            raise ValueError("further needs sound_s: sounds that fill the clip leave no time for others")
        return self

    @model_validator(mode="after")
    def _holds_audiocaps(self) -> WorldConfig:
        inside = self.n_captioned + self.n_val + self.n_test
        if self.n_train < inside:
            raise ValueError(
                f"n_train {self.n_train} is less than n_captioned + n_val + n_test = {inside}: "
                "every AudioCaps clip stands in the unbalanced list"
            )
        return self


@dataclass(frozen=True, slots=True)
class _Group:
    """Recordings of one official list: all drawn alike. `part` numbers the group's own random streams."""

    part: int
    n: int
    audioset: str
    audiocaps: str
    clotho: str
    n_captions: int
    held_out: bool | None  # True: only test combinations; False: none of them; None: any

    @property
    def host(self) -> str:
        return "zenodo" if self.clotho else "youtube"


def _groups(cfg: WorldConfig) -> list[_Group]:
    rest = cfg.n_train - cfg.n_captioned - cfg.n_val - cfg.n_test
    unbalanced, five = "unbalanced_train", N_CAPTIONS
    return [
        _Group(0, cfg.n_captioned, unbalanced, "train", "", 1, False),
        _Group(1, cfg.n_val, unbalanced, "val", "", five, None),
        _Group(2, cfg.n_test, unbalanced, "test", "", five, True),
        _Group(3, rest, unbalanced, "", "", 0, False),
        _Group(4, cfg.n_balanced, "balanced_train", "", "", 0, None),
        _Group(5, cfg.n_eval, "eval", "", "", 0, True),
        _Group(6, cfg.n_clotho_train, "", "", "development", five, False),
        _Group(7, cfg.n_clotho_val, "", "", "validation", five, None),
        _Group(8, cfg.n_clotho_test, "", "", "evaluation", five, True),
    ]


def plan(cfg: WorldConfig) -> list[Record]:
    """Every recording of the corpus, in a fixed order, without making any media."""
    groups = _groups(cfg)
    reasons = _reasons(cfg, [g for g in groups if g.host == "youtube"], UNAVAILABLE, BROKEN)
    reasons |= _reasons(cfg, [g for g in groups if g.host == "zenodo"], CLOTHO_UNAVAILABLE, CLOTHO_BROKEN)
    records: list[Record] = []
    taken: set[str] = set()
    for group in groups:
        for i in range(group.n):
            record = _record(cfg, group, i, reasons.get((group.part, i), ""), taken)
            taken.add(record.key)
            records.append(record)
    return records


def _reasons(
    cfg: WorldConfig, groups: list[_Group], unavailable: tuple[str, ...], broken: tuple[str, ...]
) -> dict[tuple[int, int], str]:
    """Which recordings fail and why: the wanted shares, spread over the groups, with every reason in turn."""
    rng = np.random.default_rng([cfg.seed, 90, groups[0].part])
    ranked: list[tuple[float, int, int]] = []
    for g in groups:
        order = rng.permutation(g.n)
        # a group's members rank at even steps between 0 and 1, so that the first m of all groups are m/n of each;
        # its last member never fails: no split is emptied
        ranked += [((k + 0.5) / g.n, g.part, int(i)) for k, i in enumerate(order[:-1])]
    total = sum(g.n for g in groups)
    n_unavailable, n_broken = round(cfg.unavailable * total), round(cfg.broken * total)
    chosen = [(part, i) for _, part, i in sorted(ranked)[: n_unavailable + n_broken]]
    chosen = [chosen[int(k)] for k in rng.permutation(len(chosen))]
    kinds = [unavailable[k % len(unavailable)] for k in range(n_unavailable)]
    kinds += [broken[k % len(broken)] for k in range(n_broken)]
    return dict(zip(chosen, kinds, strict=False))


def _video_key(cfg: WorldConfig, group: _Group, i: int, taken: set[str]) -> str:
    """An 11-character video id; some begin with - or _, as real ones do and as careless programs do not expect."""
    for attempt in range(1000):
        digest = hashlib.blake2b(f"{cfg.seed}/{group.part}/{i}/{attempt}".encode(), digest_size=8).digest()
        key = base64.urlsafe_b64encode(digest).decode()[:11]
        head = {3: "-", 7: "_", 11: "--"}.get(i % 17, "")
        key = head + key[len(head) :]
        if key not in taken:
            return key
    raise AssertionError("1000 hashes gave no free video id")


def _record(cfg: WorldConfig, group: _Group, i: int, reason: str, taken: set[str]) -> Record:
    rng = np.random.default_rng([cfg.seed, group.part, i])
    place = SCENES[int(rng.integers(len(SCENES)))]
    start_s, length_s, duration_s = _times(group, rng, reason)
    scene = _scene(cfg, group, i, rng, length_s)
    events = _events(scene, length_s, rng, cfg.sound_s)
    if group.host != "youtube":
        events = _hear_only(events)
    elif not group.held_out:  # the test galleries are clean: what is wrong there is the model's fault
        events = _distract(events, length_s, rng)
    decoys = _decoys(start_s, length_s, duration_s, {e.name for e in events}, rng)
    captions = paraphrases(scene, group.n_captions, rng) if group.n_captions else ()
    told = _names(events)
    events += _further(cfg, group, i, {e.name for e in (*events, *decoys)}, length_s)
    if cfg.told is not None:  # those above have been drawn all the same: what follows of the clip depends on it
        captions = _partial(cfg, cfg.told, group, i, events)
    rate = (cfg.fps, 1)
    if i % 31 == 5:
        rate = (25, 1)
    elif i % 31 == 20:
        rate = (30_000, 1001)
    is_video = group.host == "youtube"
    if is_video:
        key, archive, end_s = _video_key(cfg, group, i, taken), "", round(start_s + length_s, 3)
        clip_id = youtube_id(key, start_s, end_s)
    else:
        key, archive, end_s = clotho_name(told, i, rng), f"clotho_audio_{group.clotho}", None
        clip_id = zenodo_id(CLOTHO_RECORD, archive, key)
    adaptive = is_video and reason == "" and i % 6 == 2
    return Record(
        clip_id=clip_id,
        host=group.host,
        key=key,
        archive=archive,
        start_s=start_s,
        end_s=end_s,
        duration_s=duration_s,
        audioset=group.audioset,
        audiocaps=group.audiocaps,
        clotho=group.clotho,
        reason=reason,
        captions=captions,
        labels=_names(events),
        events=events,
        decoys=decoys,
        place=place,
        background_db=float(rng.uniform(*cfg.background_db)),
        n_channels=2 if is_video and rng.random() < 0.2 else 1,
        width=cfg.width,
        height=cfg.height,
        fps=rate,
        keyframe_interval=int(rng.integers(20, 51)),
        x264_preset="veryfast" if i % 4 == 1 else "ultrafast",
        is_faststart=reason != "media.truncated" and i % 5 != 4,
        is_adaptive=adaptive,
        seed=int(rng.integers(2**62)),
    )


def _names(events: tuple[Event, ...]) -> tuple[str, ...]:
    """The classes that sound, each once."""
    return tuple(dict.fromkeys(e.name for e in events if e.sounds))


def _times(group: _Group, rng: np.random.Generator, reason: str) -> tuple[float, float, float]:
    """(clip's start, clip's length, recording's duration) in seconds."""
    if group.host == "zenodo":
        length_s = round(float(rng.uniform(15, 30)), 2)
        return 0.0, length_s, length_s
    start_s = float(rng.choice(5, p=[0.2, 0.25, 0.25, 0.2, 0.1]))
    length_s = 10.0
    if not group.audiocaps:  # AudioCaps knows whole seconds and ten of them only
        if rng.random() < 0.12:
            start_s = round(start_s + float(rng.integers(1, 20)) * 0.05, 3)
        if rng.random() < 0.12:
            length_s = float(rng.integers(3, 10))
    tail_s = 0.0 if rng.random() < 0.2 else round(float(rng.uniform(0.4, 1.6)), 2)
    if reason == "qc.past_end":  # the uploader has cut the video since
        return 4.0, length_s, 2.5
    return start_s, length_s, round(start_s + length_s + tail_s, 3)


def _event_shares(cfg: WorldConfig, group: _Group) -> Sequence[float]:
    """The shares of a group's clips that have one, two and three sounds."""
    if cfg.n_sounds is not None:
        return cfg.n_sounds
    if not group.held_out:  # single sounds are what to learn from
        return [0.6, 0.28, 0.12]
    # captioned test clips are about combinations; a gallery of pictures is about what each shows
    return [0.3, 0.45, 0.25] if group.n_captions else [0.8, 0.14, 0.06]


def _scene(cfg: WorldConfig, group: _Group, i: int, rng: np.random.Generator, length_s: float) -> Scene:
    """What sounds: classes that this group may hold together, in an order, at once, or both."""
    counts = [1, 2, 3] if length_s >= 6 else [1, 2]
    weights = np.array(_event_shares(cfg, group)[: len(counts)])
    if not weights.any():  # three sounds were asked for, and there is room for two
        weights[-1] = 1.0
    n = int(rng.choice(counts, p=weights / weights.sum()))
    # every class leads equally often: the group's members walk through shuffled rounds of all classes
    lap, place = divmod(i, len(NAMES))
    first = NAMES[int(np.random.default_rng([cfg.seed, 91, group.part, lap]).permutation(len(NAMES))[place])]
    steady = [c for c in NAMES if CLASSES[c].is_steady]
    while True:
        names = [first]
        while len(names) < n:
            pool = steady if len(names) == 1 and rng.random() < 0.5 else NAMES
            name = pool[int(rng.integers(len(pool)))]
            if name not in names:
                names.append(name)
        if n == 1 or group.held_out is None or is_held_out(*names) == group.held_out:
            break
    order = [names[int(k)] for k in rng.permutation(n)]
    sounds = [Sound(name, SIZES[int(rng.integers(2))]) for name in order]
    if n == 1:
        return sounds[0]
    along = next((s for s in sounds if CLASSES[s.name].is_steady), None)
    if along is None or rng.random() < 0.35:
        return Then(tuple(sounds))
    rest = [s for s in sounds if s is not along]
    if n == 2:
        return Along(rest[0], along)
    if rng.random() < 0.5:
        return Along(Then(tuple(rest)), along)
    return Then((rest[0], Along(rest[1], along)) if rng.random() < 0.5 else (Along(rest[0], along), rest[1]))


def _events(
    scene: Scene, length_s: float, rng: np.random.Generator, sound_s: Interval | None = None
) -> tuple[Event, ...]:
    """The scene's sounds at their times, each on screen while it sounds."""
    edge = 0.04 * length_s
    start_s = 0.0 if rng.random() < 0.8 else float(rng.uniform(0.02, edge))
    end_s = length_s if rng.random() < 0.8 else length_s - float(rng.uniform(0.02, edge))
    return _spread(scene, start_s, end_s, rng, sound_s)


def _spread(
    scene: Scene, start_s: float, end_s: float, rng: np.random.Generator, sound_s: Interval | None
) -> tuple[Event, ...]:
    match scene:
        case Sound(name, size):
            a, b = (round(t, 3) for t in _within(start_s, end_s, rng, sound_s))
            return (Event(name, size, a, b, True, ((a, b),)),)
        case Along(Sound() as main, other):
            a, b = _within(start_s, end_s, rng, sound_s)  # at once: neither has a time of its own
            return (*_spread(main, a, b, rng, None), *_spread(other, a, b, rng, None))
        case Along(main, other):  # the other one sounds all the while
            return (*_spread(main, start_s, end_s, rng, sound_s), *_spread(other, start_s, end_s, rng, None))
        case Then(parts):
            n, length_s = len(parts), end_s - start_s
            cuts = [start_s + length_s * (k / n + float(rng.uniform(-0.08, 0.08))) for k in range(1, n)]
            gap = float(rng.uniform(0.01, 0.025)) * length_s
            edges = [start_s - gap / 2, *cuts, end_s + gap / 2]
            found: list[Event] = []
            for part, a, b in zip(parts, edges, edges[1:], strict=False):
                found += _spread(part, a + gap / 2, b - gap / 2, rng, sound_s)
            return tuple(found)


def _further(cfg: WorldConfig, group: _Group, i: int, taken: set[str], length_s: float) -> tuple[Event, ...]:
    """What sounds besides, off screen and whenever: classes that are not yet in the recording, each once."""
    if cfg.further is None or not group.n_captions:
        return ()
    rng = np.random.default_rng([cfg.seed, 92, group.part, i])  # its own: the rest of the clip is the same without
    n = int(rng.integers(cfg.further[0], cfg.further[1] + 1))
    others = [c for c in NAMES if c not in taken]
    found = []
    for k in rng.choice(len(others), n, replace=False):
        a, b = (round(t, 3) for t in _within(0.0, length_s, rng, cfg.sound_s))
        found.append(Event(others[int(k)], SIZES[int(rng.integers(2))], a, b, True, ()))
    return tuple(found)


def _partial(cfg: WorldConfig, n: int, group: _Group, i: int, events: tuple[Event, ...]) -> tuple[str, ...]:
    """Captions of `n` sounds each: no choice of them comes again before every other one has come."""
    rng = np.random.default_rng([cfg.seed, 93, group.part, i])  # its own: what sounds is the same without
    heard = sorted((e for e in events if e.sounds), key=lambda e: e.start_s)
    choices = list(combinations(heard, min(n, len(heard))))
    order = rng.permutation(len(choices))
    return tuple(caption(_told(choices[order[k % len(order)]]), rng) for k in range(group.n_captions))


def _told(events: tuple[Event, ...]) -> Scene:
    """One to three sounds as a caption speaks of them: in turn, but two neighbours that share much time at once.

    Much is over a third of the shorter one's time; of two such pairs it is the one that shares more.
    """
    sounds = [Sound(e.name, e.size) for e in events]
    if len(events) == 1:
        return sounds[0]
    shares = [_share(a, b) for a, b in pairwise(events)]
    k = shares.index(max(shares))
    if shares[k] <= 1 / 3:
        return Then(tuple(sounds))
    both = Along(sounds[k], sounds[k + 1])
    return Then((*sounds[:k], both, *sounds[k + 2 :])) if len(sounds) > 2 else both


def _share(a: Event, b: Event) -> float:
    """The part of the shorter one's time that both sound; negative where they do not meet."""
    return (min(a.end_s, b.end_s) - max(a.start_s, b.start_s)) / min(a.end_s - a.start_s, b.end_s - b.start_s)


def _within(start_s: float, end_s: float, rng: np.random.Generator, sound_s: Interval | None) -> Interval:
    """A stretch between two times that lasts as long as a sound does, or as long as there is room for."""
    if sound_s is None:
        return start_s, end_s
    lasts_s = min(float(rng.uniform(*sound_s)), end_s - start_s)
    first_s = start_s + float(rng.uniform(0, end_s - start_s - lasts_s))
    return first_s, first_s + lasts_s


def grid_times(length_s: float) -> tuple[float, float, float, float]:
    """The four times at which the papers look at a clip: both ends included (the last one a moment before the end)."""
    return 0.0, length_s / 3, 2 * length_s / 3, length_s - 0.15


def _shows_right(events: tuple[Event, ...], length_s: float) -> bool:
    return any(e.sounds and a <= t < b for t in grid_times(length_s) for e in events for a, b in e.shown)


def _distract(events: tuple[Event, ...], length_s: float, rng: np.random.Generator) -> tuple[Event, ...]:
    """Plant a distractor in some clips: a picture of what does not sound, or a sound whose picture is not shown."""
    if rng.random() >= _DISTRACTOR_SHARE:
        return events
    changed = list(events)
    if len(events) > 1 and rng.random() < 0.35:
        k = int(rng.integers(len(events)))
        changed[k] = replace(events[k], shown=())
    else:
        absent = [c for c in NAMES if c not in {e.name for e in events}]
        name, size = absent[int(rng.integers(len(absent)))], SIZES[int(rng.integers(2))]
        low, high = _DISTRACTOR_SPANS[int(rng.integers(len(_DISTRACTOR_SPANS)))]
        hole: Interval = (round(low * length_s, 3), round(high * length_s, 3))
        changed = [replace(e, shown=subtract(e.shown, hole)) for e in events]
        changed.append(Event(name, size, *hole, sounds=False, shown=(hole,)))
    return tuple(changed) if _shows_right(tuple(changed), length_s) else events


def _hear_only(events: tuple[Event, ...]) -> tuple[Event, ...]:
    return tuple(replace(e, shown=()) for e in events)


def _decoys(
    start_s: float, length_s: float, duration_s: float, taken: set[str], rng: np.random.Generator
) -> tuple[Event, ...]:
    """What sounds and shows before and after the clip: a clip cut at the wrong place holds a sound it should not."""
    absent = [c for c in NAMES if c not in taken]
    found = []
    for a, b in ((-start_s, 0.0), (length_s, duration_s - start_s)):
        if b - a >= 0.5:
            name = absent[int(rng.integers(len(absent)))]
            found.append(Event(name, SIZES[int(rng.integers(2))], a, round(b, 3), True, ((a, round(b, 3)),)))
    return tuple(found)
