"""Planted truth against times worked out by hand, and laws over whole planned corpora."""

from __future__ import annotations

import pytest

from harken.errors import DataError
from harken.evaluation.agreement import agreement, image_times_report, outcomes, right_images
from harken.media.images import image_times
from harken.world import WorldConfig
from harken.world.corpus import plan
from harken.world.records import Event, Interval
from harken.world.truth import ClipTruth, Truth, write_truth

SEGMENT_S = 2.5


def event(name: str, start_s: float, end_s: float, shown: tuple[Interval, ...] | None = None, **kind: bool) -> Event:
    return Event(name, "big", start_s, end_s, kind.get("sounds", True), ((start_s, end_s),) if shown is None else shown)


def clip(clip_id: str, *events: Event, end_s: float = 10.0, decoys: tuple[Event, ...] = ()) -> ClipTruth:
    labels = tuple(dict.fromkeys(e.name for e in events if e.sounds))
    return ClipTruth(clip_id, "", "unbalanced_train", "", "", 0.0, end_s, end_s, 10.0, (), labels, events, decoys)


# images at 0, 3.33, 6.67 and 9.9 s, or at 1.25, 3.75, 6.25 and 8.75 s
SEQUENCE = clip("sequence", event("dog", 0.0, 3.5), event("bell", 3.6, 6.4), event("rain", 6.5, 10.0))
DISTRACTED = clip(
    "distracted",
    event("dog", 0.0, 10.0, ((0.0, 3.0), (7.5, 10.0))),
    event("cat", 3.0, 7.5, sounds=False),
)
UNSEEN = clip("unseen", event("wind", 0.0, 10.0, ()))
SHORT = clip("short", event("drum", 0.0, 4.0), end_s=4.0)
TRUTH = Truth({c.clip_id: c for c in (SEQUENCE, DISTRACTED, UNSEEN, SHORT)}, {})


def times(*clips: ClipTruth, rule: str) -> dict[str, list[float]]:
    return {c.clip_id: image_times(0.0, c.end_s - c.start_s, 4, c.fps, rule) for c in clips}


def test_an_image_is_right_where_it_shows_what_sounds_somewhere_in_the_clip() -> None:
    assert right_images(TRUTH, "sequence", [0.0, 3.55, 5.0, 9.9]) == [True, False, True, True]
    assert right_images(TRUTH, "distracted", [0.0, 3.3, 6.7, 9.9]) == [True, False, False, True]
    assert right_images(TRUTH, "unseen", [0.0, 5.0]) == [False, False]


def test_a_choice_is_right_wrong_or_nothing_to_find() -> None:
    at = times(SEQUENCE, DISTRACTED, UNSEEN, rule="endpoints")
    right, wrong = outcomes(TRUTH, at, {"sequence": 2, "distracted": 1, "unseen": 0})
    assert (right.clip_id, right.chosen, right.is_right, right.share_right, right.is_hard) == (
        "sequence", 2, True, 1.0, False,
    )  # fmt: skip
    assert (wrong.clip_id, wrong.is_right, wrong.share_right, wrong.is_hard) == ("distracted", False, 0.5, True)


def test_a_short_sound_falls_between_endpoints() -> None:
    ends = agreement(TRUTH, times(SEQUENCE, rule="endpoints"), SEGMENT_S)
    assert (ends.n_events, ends.n_short) == (3, 1)
    assert (ends.events, ends.short) == (pytest.approx(200 / 3), 0.0)
    middles = agreement(TRUTH, times(SEQUENCE, rule="centres"), SEGMENT_S)
    assert (middles.events, middles.short) == (100.0, 100.0)


def test_what_is_left_to_each_match() -> None:
    found = agreement(TRUTH, times(SEQUENCE, DISTRACTED, UNSEEN, rule="endpoints"), SEGMENT_S)
    assert (found.n_clips, found.n_pairs) == (3, 12)
    assert found.clips == pytest.approx(200 / 3)
    assert found.images == pytest.approx(100 * (4 + 2 + 0) / 12)
    # the dog at 3.33 s sounds in the second quarter, the rain at 6.67 s in the third, though not all through
    assert found.pairs == pytest.approx(100 * (4 + 2 + 0) / 12)


def test_a_pair_needs_the_sound_in_its_own_stretch() -> None:
    late = clip("late", event("dog", 0.0, 1.0, ((0.0, 10.0),)))  # goes on being seen when it is silent
    found = agreement(Truth({"late": late}, {}), times(late, rule="endpoints"), SEGMENT_S)
    assert (found.images, found.pairs) == (100.0, 25.0)


def test_the_stretches_of_a_short_clip_hold_padding() -> None:
    found = agreement(TRUTH, times(SHORT, rule="endpoints"), SEGMENT_S)
    assert (found.images, found.pairs) == (100.0, 50.0)  # images at 2.67 and 3.9 s meet the zeros after 5 s


def test_a_corpus_without_short_sounds_says_so() -> None:
    found = agreement(TRUTH, times(UNSEEN, rule="endpoints"), SEGMENT_S)
    assert (found.n_short, found.short) == (0, None)
    assert (found.clips, found.images, found.pairs) == (0.0, 0.0, 0.0)


def test_what_happens_before_the_clip_is_no_right_image() -> None:
    before = event("cat", -1.0, 0.05, ((-1.0, 0.05),))
    seen = clip("seen", event("dog", 0.2, 10.0), decoys=(before,))
    found = agreement(Truth({"seen": seen}, {}), times(seen, rule="endpoints"), SEGMENT_S)
    assert found.images == 75.0


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    sizes = {"n_train": 160, "n_captioned": 100, "n_val": 20, "n_test": 20, "n_balanced": 10, "n_eval": 10}
    sizes |= {"n_clotho_train": 1, "n_clotho_val": 1, "n_clotho_test": 1, "width": 64, "height": 48, "fps": 10}
    sizes |= {"n_sounds": None, "sound_s": None, "background_db": (-50.0, -40.0), "further": None, "told": None}
    cfg = WorldConfig.model_validate({**sizes, "seed": 3, "unavailable": 0.0, "broken": 0.0})
    path = tmp_path_factory.mktemp("truth") / "truth.json"
    write_truth(plan(cfg), cfg, path)
    return Truth.read(path)


@pytest.mark.parametrize(("rule", "gaps"), [("endpoints", 3), ("centres", 4)])
def test_no_sound_as_long_as_the_gap_between_images_is_missed(planned: Truth, rule: str, gaps: int) -> None:
    clips = [c for c in planned.clips.values() if c.audioset]
    long = [
        c
        for c in clips
        if all(e.end_s - e.start_s >= (c.end_s - c.start_s) / gaps + 0.11 for e in c.events if e.sounds)
    ]
    assert 50 < len(long) < len(clips)
    assert agreement(planned, times(*long, rule=rule), SEGMENT_S).events == 100.0
    every = agreement(planned, times(*clips, rule=rule), SEGMENT_S)
    assert every.n_short > 0
    assert every.images is not None
    assert every.pairs is not None
    assert every.pairs <= every.images  # what sounds in a stretch sounds in the clip


def test_the_rule_in_use_is_found_from_the_times(planned: Truth) -> None:
    clips = [c for c in planned.clips.values() if c.audioset][:40]
    for rule in ("endpoints", "centres"):
        found = image_times_report(planned, times(*clips, rule=rule), SEGMENT_S)
        assert (found["rule"], found["n_moved"], found["most_s"]) == (rule, 0, 0.0)
        assert found["taken"] == found["rules"][rule]
        assert found["rules"]["endpoints"] != found["rules"]["centres"]
        assert {r["n_clips"] for r in found["rules"].values()} == {40}


def test_images_that_were_taken_elsewhere_are_counted() -> None:
    clips = (SEQUENCE, DISTRACTED, UNSEEN)
    taken = times(*clips, rule="endpoints")
    taken["sequence"] = [min(t, 5.0) for t in taken["sequence"]]  # its recording ends half way
    found = image_times_report(TRUTH, taken, SEGMENT_S)
    assert (found["rule"], found["n_moved"]) == ("endpoints", 1)
    assert found["most_s"] == pytest.approx(9.9 - 5.0)
    assert found["rules"] == image_times_report(TRUTH, times(*clips, rule="centres"), SEGMENT_S)["rules"]
    assert (found["rules"]["endpoints"]["n_events"], found["rules"]["endpoints"]["events"]) == (5, 80.0)
    assert found["taken"]["events"] == 80.0  # the bell instead of the rain
    assert found["taken"]["short"] == 100.0


def test_a_clip_of_another_corpus_is_refused() -> None:
    with pytest.raises(DataError, match="not in the built-in corpus"):
        agreement(TRUTH, {"nobody": [0.0]}, SEGMENT_S)
