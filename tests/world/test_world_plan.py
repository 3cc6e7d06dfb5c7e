"""The plan: shares, held-out combinations, distractors, captions; no media is made here."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError

from harken.clips import youtube_id, zenodo_id
from harken.world.captions import Along, Sound, Then, caption, noun_phrase, paraphrases
from harken.world.classes import CLASSES, NAMES, is_held_out
from harken.world.corpus import BROKEN, CLOTHO_BROKEN, CLOTHO_UNAVAILABLE, UNAVAILABLE, grid_times, plan
from harken.world.records import Event, Record, on_screen, shots, subtract


def test_a_plan_depends_on_its_config_alone(small_plan, make_config):
    assert plan(make_config()) == small_plan
    assert plan(make_config(seed=6)) != small_plan


def test_a_larger_corpus_begins_with_the_smaller_ones_recordings(make_config):
    small = {r.clip_id: r for r in plan(make_config(unavailable=0.0, broken=0.0))}
    large = {
        r.clip_id: r for r in plan(make_config(unavailable=0.0, broken=0.0, n_train=60, n_captioned=20, n_eval=30))
    }
    assert set(small) < set(large)
    assert all(large[i] == r for i, r in small.items())


def test_too_few_training_clips_are_refused(make_config):
    with pytest.raises(ValidationError, match="every AudioCaps clip stands in the unbalanced list"):
        make_config(n_train=21)


def test_classes_have_unique_mids_and_words():
    assert len(NAMES) >= 28
    assert len({c.mid for c in CLASSES.values()}) == len({c.display_name for c in CLASSES.values()}) == len(NAMES)
    assert all(re.fullmatch(r"/m/0[0-9a-z]{5}", c.mid) for c in CLASSES.values())


def test_every_reason_occurs_in_about_the_planned_share_and_empties_no_split(default_plan):
    videos = [r for r in default_plan if r.host == "youtube"]
    sounds = [r for r in default_plan if r.host == "zenodo"]
    reasons = Counter(r.reason for r in videos)
    assert set(reasons) == {"", *UNAVAILABLE, *BROKEN}
    assert sum(reasons[k] for k in UNAVAILABLE) == round(0.08 * len(videos))
    assert sum(reasons[k] for k in BROKEN) == round(0.02 * len(videos))
    assert {r.reason for r in sounds} == {"", *CLOTHO_UNAVAILABLE, *CLOTHO_BROKEN}
    for part in ({r.audioset for r in videos} - {""}, {r.audiocaps for r in videos} - {""}):
        for name in part:
            inside = [r for r in videos if name in (r.audioset, r.audiocaps)]
            assert 0.8 < np.mean([r.reason == "" for r in inside]) < 1.0


@pytest.mark.parametrize("seed", range(3))
def test_no_split_is_emptied_even_where_most_recordings_fail(make_config, seed):
    records = plan(make_config(seed=seed, unavailable=0.5, broken=0.25, n_val=1, n_test=1, n_clotho_val=1))
    for field in ("audioset", "audiocaps", "clotho"):
        for name in {getattr(r, field) for r in records} - {""}:
            assert any(r.reason == "" for r in records if getattr(r, field) == name)


def test_ids_are_unique_and_some_begin_with_a_dash_or_underscore(default_plan):
    keys = [r.key for r in default_plan if r.host == "youtube"]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[0-9A-Za-z_-]{11}", k) for k in keys)
    assert {"-", "_"} <= {k[0] for k in keys}
    assert any(k.startswith("--") for k in keys)
    assert len({r.clip_id for r in default_plan}) == len(default_plan)
    for r in default_plan:
        if r.host == "youtube":
            assert r.clip_id == youtube_id(r.key, r.start_s, r.end_s)
        else:
            assert r.clip_id == zenodo_id("4783391", f"clotho_audio_{r.clotho}", r.key)


def test_audiocaps_clips_are_ten_whole_seconds_of_the_unbalanced_list(default_plan):
    captioned = [r for r in default_plan if r.audiocaps]
    assert all(r.audioset == "unbalanced_train" and r.length_s == 10 and r.start_s == int(r.start_s) for r in captioned)
    assert {r.audiocaps: len(r.captions) for r in captioned} == {"train": 1, "val": 5, "test": 5}
    others = [r for r in default_plan if r.audioset and not r.audiocaps]
    assert any(r.length_s < 10 for r in others)
    assert any(r.start_s != int(r.start_s) for r in others)
    assert all(3 <= r.length_s <= 10 for r in others)


def test_test_clips_hold_combinations_that_no_training_clip_holds(default_plan):
    def combinations(*parts: str) -> set[frozenset[str]]:
        return {
            frozenset(r.labels)
            for r in default_plan
            if (r.audiocaps or r.clotho or r.audioset) in parts and len(r.labels) > 1
        }

    seen = combinations("train", "unbalanced_train", "development")
    unseen = combinations("test", "eval", "evaluation")
    assert len(unseen) >= 80  # the other test clips hold a single sound
    captioned = [r for r in default_plan if r.audiocaps == "test"]
    assert np.mean([len(r.labels) > 1 for r in captioned]) > 0.6
    assert not seen & unseen
    assert all(is_held_out(*c) for c in unseen)
    assert not any(is_held_out(*c) for c in seen)


def test_every_class_is_trained_on(default_plan):
    counts = Counter(label for r in default_plan if r.audiocaps == "train" and not r.reason for label in r.labels)
    assert set(counts) == set(NAMES)
    assert min(counts.values()) >= 4


def test_events_cover_the_clip_and_distractors_lie_in_a_third_of_the_clips(default_plan):
    videos = [r for r in default_plan if r.host == "youtube"]
    for r in videos:
        t = (np.arange(200) + 0.5) / 200 * r.length_s
        heard = [any(e.sounds and e.start_s <= x < e.end_s for e in r.events) for x in t]
        assert np.mean(heard) >= 0.75
        assert 1 <= len(r.labels) <= 3
        assert all(0 <= e.start_s < e.end_s <= r.length_s + 1e-6 for e in r.events)
    videos = [r for r in videos if r.audioset != "eval" and r.audiocaps != "test"]
    distracted = [any(not e.sounds or not e.shown for e in r.events) for r in videos]
    assert 0.28 < np.mean(distracted) < 0.45
    seen = Counter()
    for r in videos:
        shown = [on_screen(r, t) for t in grid_times(r.length_s)]
        seen.update("none" if not s else "right" if any(e.sounds for e in s) else "wrong" for s in shown)
        assert any(e.sounds for s in shown for e in s), "a clip without a single right image"
    total = sum(seen.values())
    assert seen["right"] / total > 0.7
    assert 0.05 < seen["wrong"] / total < 0.2


def test_the_test_galleries_show_what_sounds_and_nothing_else(default_plan: list[Record]):
    galleries = [r for r in default_plan if r.host == "youtube" and (r.audioset == "eval" or r.audiocaps == "test")]
    assert len(galleries) > 100
    assert all(e.sounds and e.shown for r in galleries for e in r.events)


def test_a_distractor_is_never_on_screen_beside_a_sounding_class(default_plan: list[Record]):
    for r in default_plan:
        for s in shots(r):
            middle = on_screen(r, (s.start_s + s.end_s) / 2 - r.start_s)
            assert len({e.sounds for e in middle}) <= 1


def test_shots_tile_the_recording(default_plan):
    for r in default_plan[:200]:
        found = shots(r)
        assert found[0].start_s == 0
        assert found[-1].end_s == r.duration_s
        assert all(a.end_s == b.start_s for a, b in pairwise(found))
        assert all(s.end_s - s.start_s <= 4.0001 for s in found)


def test_subtract_cuts_holes_and_drops_slivers():
    assert subtract(((0.0, 10.0),), (4.0, 6.0)) == ((0.0, 4.0), (6.0, 10.0))
    assert subtract(((0.0, 10.0),), (0.05, 6.0)) == ((6.0, 10.0),)
    assert subtract(((0.0, 3.0),), (0.0, 3.0)) == ()


def test_captions_tell_order_simultaneity_and_size():
    rng = np.random.default_rng(0)
    dog, bell, rain = Sound("dog", "big"), Sound("bell", "small"), Sound("rain", "big")
    for _ in range(200):
        text = caption(Then((dog, bell)), rng)
        after = " after " in text
        assert (text.index("dog") < text.index("bell")) != after
        assert re.search(r"\b(then|before|after|followed)\b", text)
        assert re.search(r"\b(while|as|background|same time)\b", caption(Along(dog, rain), rng))
        everything = caption(Along(Then((dog, bell)), rain), rng)
        assert all(word in everything for word in ("dog", "bell", "rain"))
    assert noun_phrase(dog, True) == "a big dog"
    assert noun_phrase(rain, True) == "heavy rain"
    assert noun_phrase(Sound("ambulance", "small"), True) == "a small ambulance"
    assert noun_phrase(Sound("ambulance", "small"), False) == "an ambulance"


def test_paraphrases_of_a_pair_differ():
    rng = np.random.default_rng(1)
    assert len(set(paraphrases(Then((Sound("dog", "big"), Sound("cat", "big"))), 5, rng))) == 5
    assert len(paraphrases(Sound("frog", "big"), 5, rng)) == 5


# ------------------------------------------------------------------------------------------- how many sounds, how long


def test_a_plan_that_asks_for_neither_is_the_plan_of_before_one_could(small_plan, default_plan):
    for records, digest in ((small_plan, "a3445a6f6b8a6520"), (default_plan, "22eaf29520b33459")):
        assert hashlib.sha256(repr(records).encode()).hexdigest()[:16] == digest


def sounding(record: Record) -> list[Event]:
    return [e for e in record.events if e.sounds]


def heard_s(record: Record) -> float:
    return (record.duration_s if record.end_s is None else record.end_s) - record.start_s


@pytest.fixture(scope="module")
def larger():
    """Enough clips of every list to count on."""
    return {"n_train": 240, "n_captioned": 120, "n_val": 10, "n_test": 60, "n_eval": 60, "n_clotho_train": 40}


def test_shares_of_one_two_and_three_sounds_are_those_asked_for_in_every_list(make_config, larger):
    asked = (0.2, 0.3, 0.5)
    records = [r for r in plan(make_config(**larger, n_sounds=asked)) if heard_s(r) >= 6 and r.reason == ""]
    lists = {
        "unbalanced": [r for r in records if r.audioset == "unbalanced_train"],
        "test": [r for r in records if r.audiocaps == "test"],
        "eval": [r for r in records if r.audioset == "eval"],
        "clotho": [r for r in records if r.clotho == "development"],
    }
    for name, some in lists.items():
        found = np.bincount([len(sounding(r)) for r in some], minlength=4)[1:] / len(some)
        assert len(found) == 3
        for share, want in zip(found, asked, strict=True):
            assert abs(share - want) < 4 * (want * (1 - want) / len(some)) ** 0.5, name


@pytest.mark.parametrize("shares", [(0.0, 0.5, 0.5), (0.0, 0.0, 1.0)])
def test_clips_without_room_for_three_sounds_have_two(make_config, larger, shares):
    short = [r for r in plan(make_config(**larger, n_sounds=shares)) if heard_s(r) < 6]
    assert short
    assert {len(sounding(r)) for r in short} == {2}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_sounds_last_as_long_as_asked_and_begin_anywhere(make_config, larger, n):
    low, high = 0.4, 0.9
    shares = tuple(float(k == n) for k in (1, 2, 3))
    records = [r for r in plan(make_config(**larger, n_sounds=shares, sound_s=(low, high))) if heard_s(r) >= 6]
    lasting, begins, n_apart, n_along, n_around = [], [], 0, 0, 0
    for r in records:
        events = sounding(r)
        assert len(events) == n
        around = [e for e in events if e.end_s - e.start_s > high + 0.002]
        assert len(around) <= (n == 3), "only what sounds while others sound in turn lasts longer"
        n_around += len(around)
        for e in events:
            assert 0 <= e.start_s < e.end_s <= heard_s(r) + 0.001
            assert all(a.start_s <= e.start_s and e.end_s <= a.end_s for a in around)
        brief = [e for e in events if e not in around]
        lasting += [e.end_s - e.start_s for e in brief]
        begins += [e.start_s / heard_s(r) for e in brief]
        for a, b in pairwise(sorted(brief, key=lambda e: (e.start_s, e.end_s))):
            is_along = (a.start_s, a.end_s) == (b.start_s, b.end_s)
            assert is_along or a.end_s <= b.start_s, "neither at once nor in turn"
            n_along, n_apart = n_along + is_along, n_apart + (not is_along)
    assert low - 0.001 <= min(lasting) < low + 0.05
    assert high - 0.05 < max(lasting) <= high + 0.001
    assert abs(np.mean(lasting) - (low + high) / 2) < 0.03
    assert min(begins) < 0.05
    assert max(begins) > 0.85
    assert (n_along > 20) == (n > 1)
    assert (n_apart > 20) == (n > 1)
    assert (n_around > 20) == (n == 3)


def test_what_a_caption_says_comes_first_does_so_where_sounds_are_brief(make_config, larger):
    records = plan(make_config(**larger, n_sounds=(0.0, 1.0, 0.0), sound_s=(0.5, 1.0)))
    n = 0
    for r in (r for r in records if r.captions and heard_s(r) >= 6):
        a, b = sounding(r)
        for said in r.captions:
            words = re.match(r"(?:first )?(.*)(?:, then| and then| before) (.*)", said)
            if words is None or " while " in said:
                continue
            assert a.end_s <= b.start_s, said
            assert CLASSES[a.name].noun in words[1], said
            assert CLASSES[b.name].noun in words[2], said
            n += 1
    assert n > 20


def test_a_sound_for_which_there_is_no_room_fills_what_there_is(make_config):
    for r in plan(make_config(n_sounds=(1.0, 0.0, 0.0), sound_s=(60.0, 90.0))):
        (e,) = sounding(r)
        assert e.end_s - e.start_s >= 0.9 * heard_s(r)


def test_what_no_caption_tells_is_heard_and_labelled_and_nothing_else_changes(make_config, larger):
    sizes = {**larger, "sound_s": (0.5, 1.0)}
    told = {r.clip_id: r for r in plan(make_config(**sizes))}
    records = plan(make_config(**sizes, further=(2, 4)))
    assert [r.clip_id for r in records] == [*told]
    counts = []
    for r in records:
        before = told[r.clip_id]
        assert r.captions == before.captions
        extra = [e for e in sounding(r) if e.name not in {e.name for e in sounding(before)}]
        assert tuple(e for e in r.events if e not in extra) == before.events
        if not r.captions:
            assert extra == []
            continue
        counts.append(len(extra))
        assert len({e.name for e in extra}) == len(extra)
        for e in extra:
            assert e.name in r.labels
            assert e.shown == ()
            assert 0 <= e.start_s < e.end_s <= heard_s(r) + 0.001
            assert 0.49 <= e.end_s - e.start_s <= 1.01
            assert not any(re.search(rf"\b{CLASSES[e.name].noun}\b", c) for c in r.captions)
    assert set(counts) == {2, 3, 4}


def share(a: Event, b: Event) -> float:
    """The part of the shorter one's time in which both sound."""
    return (min(a.end_s, b.end_s) - max(a.start_s, b.start_s)) / min(a.end_s - a.start_s, b.end_s - b.start_s)


@pytest.mark.parametrize("told", [1, 2, 3])
def test_captions_of_part_tell_other_sounds_each_and_in_their_order(make_config, larger, told):
    sizes = {**larger, "sound_s": (0.5, 1.0), "further": (2, 4)}
    whole = {r.clip_id: r for r in plan(make_config(**sizes))}
    found = set()
    for r in plan(make_config(**sizes, told=told)):
        assert replace(r, captions=()) == replace(whole[r.clip_id], captions=())
        assert len(r.captions) == len(whole[r.clip_id].captions)
        heard, spoken = sounding(r), []
        for text in r.captions:
            at = {e.name: re.search(rf"\b{CLASSES[e.name].noun}\b", text) for e in heard}
            named = sorted((m.start(), name) for name, m in at.items() if m)
            assert len(named) == told, text
            spoken.append(frozenset(name for _, name in named))
            told_of = [next(e for e in heard if e.name == name) for _, name in named]
            if not re.search(" after (?!that)", text):  # the one phrase that turns the order round
                assert told_of == sorted(told_of, key=lambda e: e.start_s), text
            at_once = [share(a, b) > 1 / 3 for a, b in pairwise(sorted(told_of, key=lambda e: e.start_s))]
            assert any(at_once) == bool(re.search(" while | as |in the background|at the same time", text)), text
            found.add((len(named), any(at_once)))
        choices = math.comb(len(heard), told)
        assert len(set(spoken)) == min(len(spoken), choices)
    assert found == ({(1, False)} if told == 1 else {(told, False), (told, True)})


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"n_sounds": (0.5, 0.5, 0.5)}, "three shares that sum to 1"),
        ({"n_sounds": (-0.5, 0.5, 1.0)}, "three shares that sum to 1"),
        ({"n_sounds": (0.5, 0.5)}, "n_sounds"),
        ({"sound_s": (2.0, 1.0)}, r"sound_s is \[2.0, 1.0\]: expected \[shortest, longest\], at least 0.2 seconds"),
        ({"sound_s": (0.1, 1.0)}, "at least 0.2 seconds"),
        ({"sound_s": (0.5, 1.0), "further": (3, 2)}, r"further is \[3, 2\]: expected \[fewest, most\], at most 26"),
        ({"sound_s": (0.5, 1.0), "further": (0, 27)}, "at most 26"),
        ({"told": 4}, "told"),
        ({"told": 0}, "told"),
        ({"further": (1, 2)}, "further needs sound_s"),
    ],
)
def test_shares_and_lengths_that_cannot_be_are_refused(make_config, changed, says):
    with pytest.raises(ValidationError, match=says):
        make_config(**changed)
