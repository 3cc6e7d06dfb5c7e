"""Strips of weights against events worked out by hand, laws of the measures, and whole planned corpora."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from harken.errors import ConfigError, DataError
from harken.evaluation import grounding, significance
from harken.evaluation.grounding import Found, Groundings, Query, ground, mass_inside, outcomes, queries
from harken.evaluation.significance import Pooled, pooled_median
from harken.evaluation.statements import grounding as grounding_says
from harken.evaluation.statements import onset_held
from harken.world import WorldConfig
from harken.world.corpus import plan
from harken.world.records import Event
from harken.world.truth import ClipTruth, Truth, write_truth


def event(name: str, start_s: float, end_s: float, sounds: bool = True) -> Event:
    return Event(name, "big", start_s, end_s, sounds, ())


def clip(clip_id: str, *events: Event, end_s: float = 10.0) -> ClipTruth:
    labels = tuple(dict.fromkeys(e.name for e in events if e.sounds))
    return ClipTruth(clip_id, "", "", "test", "", 0.0, end_s, end_s, 10.0, (), labels, events, ())


def truth_of(*clips: ClipTruth) -> Truth:
    return Truth({c.clip_id: c for c in clips}, {})


TWO = clip("two", event("dog", 0.0, 4.0), event("bell", 5.0, 8.0))
THREE = clip("three", event("rain", 0.0, 10.0), event("cat", 1.0, 3.0), event("door", 6.0, 9.0))
TRUTH = truth_of(TWO, THREE)


class TestQueries:
    def test_every_sound_has_a_sentence_and_its_times(self) -> None:
        assert queries(TWO, 10.0) == [Query("two", "a dog barks", 0.0, 4.0), Query("two", "a bell rings", 5.0, 8.0)]
        assert [q.sentence for q in queries(THREE, 10.0)] == ["rain falls", "a cat meows", "a door is knocked on"]

    def test_what_does_not_sound_is_not_asked_for(self) -> None:
        seen = clip("seen", event("cow", 0.0, 10.0), event("cat", 2.0, 4.0, sounds=False))
        assert [q.sentence for q in queries(seen, 10.0)] == ["a cow moos"]
        assert queries(clip("silent", event("cat", 2.0, 4.0, sounds=False)), 10.0) == []

    def test_a_class_that_sounds_twice_is_not_asked_for(self) -> None:
        twice = clip("twice", event("dog", 0.0, 2.0), event("bell", 3.0, 5.0), event("dog", 6.0, 9.0))
        assert queries(twice, 10.0) == [Query("twice", "a bell rings", 3.0, 5.0)]
        # nor where the second time is beyond what is heard: its place in the clip is another
        assert queries(twice, 5.5) == [Query("twice", "a bell rings", 3.0, 5.0)]
        shown = clip("shown", event("dog", 0.0, 2.0), event("dog", 6.0, 9.0, sounds=False))
        assert len(queries(shown, 10.0)) == 1

    def test_times_end_where_hearing_ends(self) -> None:
        assert queries(TWO, 6.0)[1] == Query("two", "a bell rings", 5.0, 6.0)
        assert [q.sentence for q in queries(TWO, 5.0)] == ["a dog barks"]
        before = clip("before", event("dog", -1.0, 2.0), event("cat", -2.0, 0.0))
        assert queries(before, 10.0) == [Query("before", "a dog barks", 0.0, 2.0)]

    def test_the_captions_grammar_says_the_same_in_its_ways(self) -> None:
        said = {queries(TWO, 10.0, np.random.default_rng(i))[0].sentence for i in range(40)}
        assert said == {"a dog barks", "a dog is barking", "a dog barking"}
        one, again = (queries(TWO, 10.0, np.random.default_rng(3)) for _ in range(2))
        assert one == again


class TestGround:
    def test_the_run_round_the_peak_above_half_of_it(self) -> None:
        found = ground([0.1, 0.3, 0.6, 0.4, 0.3, 0.5], 0.5, 3.0)  # 0.3 is half and not above it; 0.5 is cut off by it
        assert found == Found(1.0, 2.0, 1.25)

    def test_scale_changes_nothing(self) -> None:
        w = np.random.default_rng(0).random(15)
        for scale in (0.5, 3.0, 1000.0):
            assert ground(w, 0.64, 10.0) == ground(scale * w, 0.64, 10.0)
            assert mass_inside(w, 0.64, 2.0, 5.0) == pytest.approx(mass_inside(scale * w, 0.64, 2.0, 5.0))

    @pytest.mark.parametrize(
        ("weights", "found"),
        [([1, 0, 0], Found(0.0, 1.0, 0.5)), ([0, 0, 1], Found(2.0, 3.0, 2.5)), ([0.7], Found(0.0, 1.0, 0.5)),
         ([1, 1, 1], Found(0.0, 3.0, 0.5)), ([0, 2, 2], Found(1.0, 3.0, 1.5)), ([9, 0, 9], Found(0.0, 1.0, 0.5))],
    )  # fmt: skip
    def test_edges_and_equals(self, weights: list[float], found: Found) -> None:
        assert ground(weights, 1.0, 3.0) == found

    def test_one_frame_later_is_one_frame_later(self) -> None:
        w = np.array([0.0, 0.2, 1.0, 0.8, 0.1, 0.0, 0.0, 0.0])
        first = ground(w, 0.32, 10.0)
        for by in (1, 2, 3):
            then = ground(np.roll(w, by), 0.32, 10.0)
            for name in ("onset_s", "offset_s", "peak_s"):
                assert getattr(then, name) - getattr(first, name) == pytest.approx(by * 0.32)

    def test_the_last_frame_ends_with_the_clip(self) -> None:
        assert ground([0, 0, 1], 1.0, 2.4) == Found(2.0, 2.4, 2.5)
        assert ground([0, 0, 1], 1.0, 1.5) == Found(2.0, 3.0, 2.5)  # weight on padding is not moved into the clip

    @pytest.mark.parametrize(
        ("weights", "says"),
        [([], "at least one frame"), ([[1.0]], r"\(1, 1\)"), ([0.1, np.nan], "NaN"), ([np.inf, 1], "infinite"),
         ([0.0, 0.0], "from 0 to 0"), ([-0.5, 1.0], "from -0.5 to 1")],
    )  # fmt: skip
    def test_weights_that_say_nothing_are_refused(self, weights: Any, says: str) -> None:
        for refuse in (lambda: ground(weights, 1.0, 2.0), lambda: mass_inside(weights, 1.0, 0.0, 1.0)):
            with pytest.raises(DataError, match=says):
                refuse()

    @pytest.mark.parametrize(("frame_s", "heard_s"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)])
    def test_times_that_cannot_be_are_refused(self, frame_s: float, heard_s: float) -> None:
        with pytest.raises(ConfigError, match="above 0"):
            ground([1.0], frame_s, heard_s)


class TestMass:
    def test_a_frames_weight_is_spread_over_it(self) -> None:
        assert mass_inside([1, 2, 1], 1.0, 1.0, 2.0) == pytest.approx(0.5)
        assert mass_inside([1, 2, 1], 1.0, 0.5, 1.25) == pytest.approx((0.5 + 0.5) / 4)
        assert mass_inside([1, 2, 1], 1.0, 0.0, 3.0) == pytest.approx(1.0)
        assert mass_inside([1, 2, 1], 1.0, 3.0, 9.0) == 0.0

    def test_parts_add_up(self) -> None:
        w = np.random.default_rng(1).random(15)
        cuts = [0.0, 0.3, 2.0, 2.1, 6.66, 9.6]
        assert sum(mass_inside(w, 0.64, a, b) for a, b in pairwise(cuts)) == pytest.approx(1.0)

    def test_equal_weights_give_the_events_share(self) -> None:
        assert mass_inside(np.ones(10), 1.0, 2.3, 4.8) == pytest.approx(0.25)


def rows(truth: Truth, strips: dict[str, Sequence[Sequence[float]]], frame_s: float = 1.0, **kind: Any) -> pa.Table:
    """The table of a run that gives each clip these strips."""
    ids = list(strips)
    lengths = [truth[i].end_s for i in ids]
    columns = outcomes(truth, ids, lengths, frame_s, lambda i, _: np.array(strips[ids[i]], float))
    told = {"stage": "train", "recipe": "tap", "seed": 20, "dataset": "audiocaps"} | kind
    return grounding.table(columns, **told)


def strip(*frames: int, n: int = 10, weight: float = 1.0, base: float = 0.0) -> list[float]:
    return [weight if t in frames else base for t in range(n)]


RIGHT = {
    "two": [strip(0, 1, 2, 3), strip(5, 6, 7)],
    "three": [strip(*range(10)), strip(1, 2), strip(6, 7, 8)],
}
LATE = {clip_id: [np.roll(s, 1).tolist() for s in strips] for clip_id, strips in RIGHT.items()}


class TestOutcomes:
    def test_a_strip_that_is_the_event(self) -> None:
        found = rows(TRUTH, RIGHT)
        assert found.schema == grounding.GROUNDING
        assert found["sentence"].to_pylist()[:2] == ["a dog barks", "a bell rings"]
        assert found["iou"].to_pylist() == pytest.approx([1.0] * 5)
        assert found["inside"].to_pylist() == pytest.approx([1.0] * 5)
        assert all(found["is_inside"].to_pylist())
        assert found["onset_s"].to_pylist() == found["start_s"].to_pylist()
        assert found["weights"].to_pylist()[1] == strip(5, 6, 7)

    def test_one_frame_late(self) -> None:
        found = rows(TRUTH, {"two": LATE["two"]}).to_pylist()[1]
        assert (found["onset_s"], found["offset_s"], found["peak_s"]) == (6.0, 9.0, 6.5)
        assert found["iou"] == pytest.approx(2 / 4)
        assert found["inside"] == pytest.approx(2 / 3)
        assert found["heard_s"] == 10.0

    def test_a_peak_counts_from_the_start_up_to_the_end(self) -> None:
        edge = truth_of(clip("edge", event("dog", 2.5, 3.5)))
        for frame, is_inside in ((1, False), (2, True), (3, False)):
            assert rows(edge, {"edge": [strip(frame)]})["is_inside"].to_pylist() == [is_inside]

    def test_a_clip_without_a_sentence_is_not_embedded(self) -> None:
        def never(i: int, sentences: list[str]) -> np.ndarray:
            raise AssertionError("asked")

        mute = truth_of(clip("mute", event("dog", 0.0, 5.0, sounds=False)))
        found = outcomes(mute, ["mute"], [10.0], 1.0, never)
        assert set(found) == set(grounding.GROUNDING.names[4:])
        assert not any(found.values())
        assert len(grounding.table(found, stage="train", recipe="tap", seed=1, dataset="d")) == 0

    def test_the_strips_are_asked_for_by_the_number_of_the_clip(self) -> None:
        asked: list[tuple[int, list[str]]] = []

        def strip_of(i: int, sentences: list[str]) -> np.ndarray:
            asked.append((i, sentences))
            return np.ones((len(sentences), 10))

        outcomes(TRUTH, ["three", "two"], [5.0, 10.0], 1.0, strip_of)
        assert asked == [(0, ["rain falls", "a cat meows"]), (1, ["a dog barks", "a bell rings"])]

    @pytest.mark.parametrize(
        ("strips", "says"),
        [([strip(0)], r"two: weights of shape \(1, 10\) for 2 sentences"), (strip(0), r"two: weights of shape \(10,\)"),
         ([strip(0), strip(0, weight=np.nan)], "two: the weights for 'a bell rings': NaN"),
         ([strip(0), strip(0, base=-1.0)], "two: the weights for 'a bell rings': from -1 to 1"),
         ([strip(), strip(0)], "two: the weights for 'a dog barks': from 0 to 0"),
         ([[], []], "two: the weights for 'a dog barks': expected")],
    )  # fmt: skip
    def test_bad_weights_name_the_clip(self, strips: Any, says: str) -> None:
        with pytest.raises(DataError, match=says):
            rows(TRUTH, {"two": strips})

    def test_a_clip_that_was_not_planted_is_named(self) -> None:
        with pytest.raises(DataError, match="'other' is not in the built-in corpus"):
            outcomes(TRUTH, ["other"], [10.0], 1.0, lambda i, s: np.ones((len(s), 10)))

    @pytest.mark.usefixtures("unchecked")
    def test_frames_of_unknown_length_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="above 0"):
            rows(TRUTH, RIGHT, frame_s=0.0)


def only(table: pa.Table) -> Groundings:
    (found,) = Groundings.of(table)
    return found


class TestGroundings:
    def test_runs_are_kept_by_recipe_and_seed(self) -> None:
        both = pa.concat_tables([rows(TRUTH, LATE, seed=21), rows(TRUTH, RIGHT), rows(TRUTH, LATE, recipe="xpool")])
        found = only(both.take(np.random.default_rng(0).permutation(len(both))))
        assert sorted(found.recipes) == ["tap", "xpool"]
        assert list(found.recipes["tap"]) == [20, 21]
        assert found.recipes["tap"][20].own["error_s"].tolist() == [0.0] * 5
        late = found.recipes["tap"][21].own
        # in the order of clips, then of time: rain, cat, door, dog, bell
        assert late["error_s"].tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]
        assert late["near"].tolist() == [100.0] * 5
        assert late["iou"] == pytest.approx([100, 100 / 3, 50, 60, 50])
        assert (found.count("all"), found.n_clips("all")) == (5, 2)

    def test_brief_sounds_leave_room_to_be_wrong(self) -> None:
        found = only(rows(TRUTH, RIGHT))
        assert found.is_brief.tolist() == [False, True, True, True, True]
        long = truth_of(clip("long", event("dog", 0.0, 7.5)), clip("longer", event("dog", 0.0, 7.6)))
        ones = {"long": [strip(0)], "longer": [strip(0)]}
        assert only(rows(long, ones)).is_brief.tolist() == [True, False]
        assert only(rows(long, {"longer": [strip(0)]})).count("brief") == 0

    def test_equal_weights_are_chance(self) -> None:
        found = only(rows(TRUTH, {c: [[1.0] * 10 for _ in strips] for c, strips in RIGHT.items()}))
        own, flat = found.recipes["tap"][20].own, found.flat[1.0]
        for measure in ("error_s", "near", "iou", "inside"):
            assert own[measure] == pytest.approx(flat[measure]), measure
        share = [100.0, 20.0, 30.0, 40.0, 30.0]
        assert flat["inside"] == pytest.approx(share)
        assert flat["iou"] == pytest.approx(share)
        assert flat["peak"] == pytest.approx(share)  # any of the equal ones, not the first
        assert flat["error_s"].tolist() == [0.0, 1.0, 6.0, 0.0, 5.0]

    def test_the_best_weights_are_as_good_as_frames_allow(self) -> None:
        found = only(rows(TRUTH, LATE))
        assert found.best[1.0]["iou"] == pytest.approx([100.0] * 5)
        coarse = only(rows(TRUTH, {c: [[1.0] * 4 for _ in s] for c, s in RIGHT.items()}, frame_s=2.5)).best[2.5]
        # the bell from 5 to 8 s covers one frame of 2.5 s and a fifth of the next
        assert coarse["iou"][-1] == pytest.approx(100 * 2.5 / 3)
        assert coarse["inside"][-1] == pytest.approx(100 * (1 + 0.2 * 0.2) / 1.2)

    def test_a_sound_in_the_rest_that_fills_no_frame(self) -> None:
        tail = truth_of(clip("tail", event("dog", 9.7, 10.0)))
        found = only(rows(tail, {"tail": [strip(8, n=15)]}, frame_s=0.64))
        assert found.best[0.64]["error_s"] == pytest.approx([9.7 - 14 * 0.64])
        assert found.flat[0.64]["inside"].tolist() == [0.0]

    def test_what_other_clips_and_other_texts_would_give(self) -> None:
        run = only(rows(TRUTH, RIGHT)).recipes["tap"][20]
        # the bell (5 to 8 s): the strips of rain, cat and door of the other clip, of the dog of its own
        assert run.other_clips["inside"][4] == pytest.approx(100 * np.mean([0.3, 0.0, 2 / 3]))
        assert run.other_clips["error_s"][4] == 4.0  # the median of 5, 4 and 1
        assert run.other_clips["peak"][4] == pytest.approx(100 / 3)
        assert run.other_texts["inside"][4] == 0.0
        assert run.other_texts["error_s"][4] == 5.0
        # the rain: those of the cat and the door
        assert run.other_texts["iou"][0] == pytest.approx(25.0)

    def test_without_others_nothing_is_compared(self) -> None:
        alone = truth_of(clip("alone", event("dog", 2.0, 5.0)))
        found = only(rows(alone, {"alone": [strip(2, 3, 4)]}))
        run = found.recipes["tap"][20]
        assert np.isnan(run.other_clips["inside"]).all()
        assert np.isnan(run.other_texts["inside"]).all()
        told = summary_of(found)
        assert (told.by_clip, told.by_text) == ({}, {})
        assert ("tap", "brief") in told.by_flat
        assert "| tap, other clips | 1 | 1 | – | – | – | – | – |" in grounding_says(found, told, 1.0)

    def test_strips_of_several_lengths(self) -> None:
        short = truth_of(TWO, clip("short", event("cat", 1.0, 2.0), end_s=4.0))
        found = only(rows(short, {"two": RIGHT["two"], "short": [strip(1, n=4)]}))
        assert found.recipes["tap"][20].own["iou"] == pytest.approx([100.0] * 3)
        assert found.flat[1.0]["inside"] == pytest.approx([25.0, 40.0, 30.0])

    def test_recipes_that_heard_other_clips_are_apart(self) -> None:
        mixed = [rows(TRUTH, RIGHT), rows(TRUTH, {"two": RIGHT["two"]}, recipe="imported"),
                 rows(TRUTH, {"two": RIGHT["two"]}, dataset="clotho")]  # fmt: skip
        found = Groundings.of(pa.concat_tables(mixed))
        assert [(g.dataset, list(g.recipes), g.count("all")) for g in found] == [
            ("audiocaps", ["tap"], 5), ("audiocaps", ["imported"], 2), ("clotho", ["tap"], 2),
        ]  # fmt: skip

    def test_recipes_with_frames_of_their_own_share_a_gallery(self) -> None:
        fine = {c: [np.repeat(s, 2).tolist() for s in strips] for c, strips in RIGHT.items()}
        found = only(pa.concat_tables([rows(TRUTH, RIGHT), rows(TRUTH, fine, frame_s=0.5, recipe="fine")]))
        assert found.frame_s == {"tap": 1.0, "fine": 0.5}
        assert list(found.flat) == [0.5, 1.0]

    @pytest.mark.parametrize("other", [{"strips": {"two": RIGHT["two"]}}, {"strips": RIGHT, "frame_s": 0.5}])
    def test_seeds_that_were_asked_other_things_are_refused(self, other: dict[str, Any]) -> None:
        both = pa.concat_tables([rows(TRUTH, RIGHT), rows(TRUTH, **other, seed=21)])
        with pytest.raises(DataError, match="the seeds of tap on audiocaps, 20, 21,"):
            Groundings.of(both)

    def test_nothing_asked_is_nothing(self) -> None:
        assert Groundings.of(grounding.GROUNDING.empty_table()) == []


class TestPooledMedian:
    CLIPS = np.array([0, 0, 1, 2, 3, 3, 3])

    def test_one_seed_is_the_median(self) -> None:
        values = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0])
        found = pooled_median({20: values}, self.CLIPS, rng=np.random.default_rng(0))
        assert (found.mean, found.std, found.seeds) == (3.0, None, (20,))
        assert found.low <= found.mean <= found.high

    def test_resamples_are_those_of_whole_clips(self) -> None:
        values = np.random.default_rng(1).random(7)
        found = pooled_median({20: values}, self.CLIPS, rng=np.random.default_rng(2), n_resamples=300, level=0.9)
        draws = []
        for times in np.random.default_rng(2).multinomial(4, [0.25] * 4, 300):
            draws.append(np.median([v for v, c in zip(values, self.CLIPS, strict=True) for _ in range(times[c])]))
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.05, 0.95])))

    def test_seeds_are_averaged(self) -> None:
        found = pooled_median({21: [1.0, 3.0], 20: [2.0, 2.0]}, [0, 1], rng=np.random.default_rng(0))
        assert (found.mean, found.std, found.seeds) == (2.0, 0.0, (20, 21))
        apart = pooled_median({20: [1.0, 1.0], 21: [2.0, 2.0]}, [0, 1], rng=np.random.default_rng(0))
        assert (apart.mean, apart.low, apart.high) == (1.5, 1.5, 1.5)
        assert apart.std == pytest.approx(0.5**0.5)

    def test_blocks_bound_the_memory_not_the_result(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = {20: np.random.default_rng(1).random(7)}
        whole = pooled_median(values, self.CLIPS, rng=np.random.default_rng(0), n_resamples=50)
        monkeypatch.setattr(significance, "BLOCK", 20)
        assert pooled_median(values, self.CLIPS, rng=np.random.default_rng(0), n_resamples=50) == whole

    @pytest.mark.parametrize(
        ("by_seed", "clips", "how", "error"),
        [({}, [0], {}, ConfigError), ({20: [1.0]}, [0, 1], {}, ConfigError), ({20: []}, [], {}, ConfigError),
         ({20: [1.0]}, [0], {"level": 1.0}, ConfigError), ({20: [1.0]}, [0], {"n_resamples": 0}, ConfigError),
         ({20: [np.nan]}, [0], {}, DataError)],
    )  # fmt: skip
    def test_what_does_not_fit_is_refused(self, by_seed: Any, clips: Any, how: Any, error: type[Exception]) -> None:
        with pytest.raises(error):
            pooled_median(by_seed, clips, rng=np.random.default_rng(0), **how)


def summary_of(found: Groundings) -> grounding.Summary:
    def rng_of(*purpose: str) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(" ".join(purpose).encode()))

    return grounding.summary(found, rng_of=rng_of, n_resamples=200, level=0.95)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    sizes = {"n_train": 70, "n_captioned": 1, "n_val": 1, "n_test": 60, "n_balanced": 1, "n_eval": 1}
    sizes |= {"n_clotho_train": 1, "n_clotho_val": 1, "n_clotho_test": 4, "width": 64, "height": 48, "fps": 10}
    sizes |= {"n_sounds": None, "sound_s": None, "background_db": (-50.0, -40.0), "further": None, "told": None}
    cfg = WorldConfig.model_validate({**sizes, "seed": 3, "unavailable": 0.0, "broken": 0.0})
    path = tmp_path_factory.mktemp("truth") / "truth.json"
    write_truth(plan(cfg), cfg, path)
    return Truth.read(path)


def run_of(truth: Truth, kind: str, seed: int, frame_s: float = 0.64) -> pa.Table:
    """A run whose weights follow the event, the place in the clip, its first sound whatever the text, or nothing."""
    clips = [c for c in truth.clips.values() if c.audiocaps == "test"]
    rng = np.random.default_rng(seed)
    middles = (np.arange(int(10 / frame_s)) + 0.5) * frame_s

    def strip_of(i: int, sentences: list[str]) -> np.ndarray:
        asked = queries(clips[i], 10.0)
        assert [q.sentence for q in asked] == sentences
        noise = rng.uniform(0.8, 1.0, (len(asked), len(middles)))
        if kind == "event":
            return noise * np.stack([0.02 + ((q.start_s <= middles) & (middles < q.end_s)) for q in asked])
        if kind == "place":
            return noise * np.exp(-middles)
        if kind == "clip":
            return np.repeat(
                noise[:1] * (0.02 + ((asked[0].start_s <= middles) & (middles < asked[0].end_s))), len(asked), 0
            )
        return noise

    columns = outcomes(truth, [c.clip_id for c in clips], [10.0] * len(clips), frame_s, strip_of)
    return grounding.table(columns, stage="train", recipe=kind, seed=seed, dataset="audiocaps")


@pytest.fixture(scope="module")
def told(planned: Truth) -> tuple[Groundings, grounding.Summary]:
    runs = [run_of(planned, kind, seed) for kind in ("event", "place", "clip", "noise") for seed in (20, 21)]
    found = only(pa.concat_tables(runs))
    return found, summary_of(found)


def test_weights_that_follow_the_event_are_told_from_those_that_do_not(
    told: tuple[Groundings, grounding.Summary],
) -> None:
    found, says = told
    assert found.count("brief") > 20
    event_, noise = says.cells["event", "error_s", "brief"], says.cells["noise", "error_s", "brief"]
    assert event_.mean < 0.64 < 2.0 < noise.mean
    assert says.cells["event", "inside", "brief"].mean > 90
    assert says.cells["noise", "inside", "brief"].mean == pytest.approx(
        found.flat[0.64]["inside"][found.is_brief].mean(), abs=2
    )
    assert says.by_flat["event", "brief"].verdict == "a real difference"
    assert says.by_clip["event", "brief"].verdict == says.by_text["event", "brief"].verdict == "a real difference"


def test_weights_that_do_not_heed_the_text_are_as_good_for_another(told: tuple[Groundings, grounding.Summary]) -> None:
    _, says = told
    for kind in ("place", "clip"):
        assert abs(says.by_text[kind, "all"].difference.mean) < 1.0
    assert abs(says.by_clip["place", "all"].difference.mean) < 1.0


def test_the_report_is_tables_and_computed_verdicts(told: tuple[Groundings, grounding.Summary]) -> None:
    found, says = told
    text = "\n".join(grounding_says(found, says, 1.0))
    assert "### When it sounds: audiocaps" in text
    assert f"{found.count('brief')} sounds of {found.n_clips('brief')} clips, each for at most 75 % of what" in text
    assert text.count("| equal weights | – | 0.64 |") == text.count("| at best | – | 0.64 |") == 2
    cell = says.cells["event", "error_s", "brief"]
    assert f"| event | 2 | 0.64 | {cell.mean:.2f} ± {cell.std:.2f} [{cell.low:.2f}, {cell.high:.2f}] |" in text
    assert f"- event: the median onset error is {cell.mean:.2f} ± " in text
    lines = {line.split(":")[0]: line for line in text.splitlines() if line.startswith("- ")}
    assert "at most one frame: holds" in lines["- event"]
    assert lines["- noise"].endswith("at most one frame: does NOT hold.")
    assert lines["- event, IoU, against equal weights"].endswith("a real difference.")
    assert "at most 0.5 frames:" in "\n".join(grounding_says(found, says, 0.5))
    assert set(says.means()) == {"all", "brief"}
    assert says.means()["brief"]["event"]["error_s"] == round(cell.mean, 4)


def test_the_same_rows_say_the_same(planned: Truth, told: tuple[Groundings, grounding.Summary]) -> None:
    runs = [run_of(planned, kind, seed) for kind in ("event", "place", "clip", "noise") for seed in (21, 20)]
    again = only(pa.concat_tables(runs))
    assert summary_of(again) == told[1]


@pytest.mark.parametrize(
    ("mean", "low", "high", "says"),
    [
        (0.5, 0.3, 0.6, "0.50 [0.30, 0.60] s, 0.8 frames of 0.64 s; at most one frame: holds"),
        (0.64, 0.64, 0.64, "0.64 [0.64, 0.64] s, 1.0 frames of 0.64 s; at most one frame: holds"),
        (0.5, 0.3, 0.7, "at most one frame: holds, but its interval reaches above"),
        (0.7, 0.6, 0.9, "at most one frame: does NOT hold, but its interval reaches one frame"),
        (3.2, 2.3, 3.6, "3.20 [2.30, 3.60] s, 5.0 frames of 0.64 s; at most one frame: does NOT hold"),
    ],
)
def test_an_onset_is_held_against_one_frame(mean: float, low: float, high: float, says: str) -> None:
    assert onset_held(Pooled(mean, None, low, high, 0.95, (20,)), 0.64, 1.0).endswith(says)
