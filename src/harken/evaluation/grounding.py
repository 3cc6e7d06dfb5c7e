"""When, not only which: the weights that a text gives a clip's frames, against the times of what was planted there.

Only the built-in corpus knows when things sound. Attention is not a detector: a pooling is trained to rank clips, and
nothing in its loss asks its weights to be where the sound is, nor does a frame hear only its own stretch. So no number
here stands alone. Beside it stand what equal weights give, what the best weights in frames this long could, and what
the same run's weights give for another clip, or for another text of the clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from harken.errors import ConfigError, DataError
from harken.evaluation.significance import Pooled, SeededDifference, paired_by_seed, pooled, pooled_median
from harken.world.captions import Sound, caption, noun_phrase
from harken.world.classes import CLASSES
from harken.world.records import Event
from harken.world.truth import ClipTruth, Truth

Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
Part = Literal["all", "brief"]
PARTS: tuple[Part, ...] = ("all", "brief")
Measure = Literal["error_s", "near", "iou", "inside", "peak"]
MEASURES: tuple[Measure, ...] = ("error_s", "near", "iou", "inside", "peak")
Measures = Mapping[Measure, Float]
"""Measure -> (sentence,).

error_s: |onset - start|, in seconds. In percent: near: whether that is at most one frame; iou: of onset to offset with
the event; inside: the share of the weight that lies in the event; peak: whether the peak does.
"""

BRIEF = 0.75  # of what is heard: a longer sound is found by any weights at all
ABOVE = 0.5  # of the largest weight: what counts as heard
SLACK_S = 1e-6  # times that differ by less are the same

GROUNDING = pa.schema(
    [
        ("stage", pa.string()),
        ("recipe", pa.string()),
        ("seed", pa.int64()),
        ("dataset", pa.string()),
        ("clip_id", pa.string()),
        ("sentence", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("heard_s", pa.float64()),
        ("onset_s", pa.float64()),
        ("offset_s", pa.float64()),
        ("peak_s", pa.float64()),
        ("frame_s", pa.float64()),
        ("iou", pa.float64()),
        ("inside", pa.float64()),
        ("is_inside", pa.bool_()),
        ("weights", pa.list_(pa.float32())),
    ]
)
"""grounding.parquet: a row for each run and sentence; iou and inside from 0 to 1."""

StripOf = Callable[[int, list[str]], npt.ArrayLike]
"""(number of the clip, its sentences) -> (sentence, frame), none below 0: a softmax, or cosines cut at 0."""


@dataclass(frozen=True, slots=True)
class Query:
    """A sentence about one sound of a clip, and when that sounds, in seconds from the clip's start."""

    clip_id: str
    sentence: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Found:
    """Where a strip of weights says that the sound is: seconds from the clip's start."""

    onset_s: float
    offset_s: float
    peak_s: float


def queries(clip: ClipTruth, heard_s: float, rng: np.random.Generator | None = None) -> list[Query]:
    """One sentence for each sound of the clip's first `heard_s` seconds whose class sounds once in the clip.

    A class that sounds twice would leave open which of the two is meant. The sentence is the plain clause ("a dog
    barks"), or with `rng` one of the captions' grammar; neither tells the size.
    """
    sounding = [e for e in clip.events if e.sounds]
    names = [e.name for e in sounding]
    heard = [(e, max(e.start_s, 0.0), min(e.end_s, heard_s)) for e in sounding if names.count(e.name) == 1]
    return [Query(clip.clip_id, _sentence(e, rng), a, b) for e, a, b in heard if b - a > SLACK_S]


def _sentence(event: Event, rng: np.random.Generator | None) -> str:
    sound = Sound(event.name, event.size)
    if rng is not None:
        return caption(sound, rng, size_share=0.0)
    return f"{noun_phrase(sound, with_size=False)} {CLASSES[event.name].verb}"


def ground(weights: npt.ArrayLike, frame_s: float, heard_s: float) -> Found:
    """What a strip of weights says. weights: (frame,), at least 0, whatever their sum.

    Frame t is the stretch from t to t + 1 times `frame_s`. The peak is the middle of the frame with the largest weight,
    of equal ones the first. The region is the run of frames around it whose weights are above half of the largest; the
    onset is the start of its first frame, the offset the end of its last, but not after the clip's end. Raises
    DataError for weights that are NaN, infinite, negative, all zero or not (frame,).
    """
    w = _checked(weights, "weights")
    _check_times(frame_s, heard_s)
    peak = int(w.argmax())
    below = np.flatnonzero(w <= ABOVE * w[peak])
    first = int(below[below < peak].max(initial=-1)) + 1
    after = int(below[below > peak].min(initial=len(w)))
    onset_s, offset_s = first * frame_s, after * frame_s
    # a frame may reach beyond the clip's end; one that begins there, where padding is heard too, is left as it is
    return Found(onset_s, min(offset_s, heard_s) if onset_s < heard_s else offset_s, (peak + 0.5) * frame_s)


def mass_inside(weights: npt.ArrayLike, frame_s: float, start_s: float, end_s: float) -> float:
    """The share, from 0 to 1, of the weight that lies between two times; a frame's is spread evenly over its stretch.

    Needs no threshold. Raises as `ground` does.
    """
    w = _checked(weights, "weights")
    return float(w @ _covered(len(w), frame_s, start_s, end_s) / w.sum())


def outcomes(
    truth: Truth, clip_ids: Sequence[str], lengths_s: Sequence[float], frame_s: float, strip_of: StripOf
) -> dict[str, list[Any]]:
    """What one run's weights say of every query of these clips: the columns of GROUNDING from `clip_id` on.

    lengths_s: how much of each clip the run hears. frame_s: from one frame of its audio tower to the next. `strip_of`
    is called once for each clip that has a query. Raises DataError, and names the clip, where its weights are NaN,
    infinite, negative, all zero or of another number of sentences.
    """
    rows: list[dict[str, Any]] = []
    for i, (clip_id, heard_s) in enumerate(zip(clip_ids, lengths_s, strict=True)):
        asked = queries(truth[clip_id], heard_s)
        if not asked:
            continue
        strips = np.asarray(strip_of(i, [q.sentence for q in asked]), np.float64)
        if strips.ndim != 2 or len(strips) != len(asked):
            raise DataError(
                f"{clip_id}: weights of shape {strips.shape} for {len(asked)} sentences; expected (sentence, frame)."
            )
        rows += [_row(q, strip, frame_s, heard_s) for q, strip in zip(asked, strips, strict=True)]
    names = GROUNDING.names[GROUNDING.get_field_index("clip_id") :]
    return {name: [row[name] for row in rows] for name in names}


def table(columns: Mapping[str, Sequence[Any]], *, stage: str, recipe: str, seed: int, dataset: str) -> pa.Table:
    """The rows of one run in grounding.parquet. columns: as `outcomes` returns them."""
    n = len(columns["clip_id"])
    run: dict[str, Sequence[Any]] = {"stage": [stage] * n, "recipe": [recipe] * n, "seed": [seed] * n}
    return pa.table(run | {"dataset": [dataset] * n} | dict(columns), schema=GROUNDING)


def _row(query: Query, strip: Float, frame_s: float, heard_s: float) -> dict[str, Any]:
    w = _checked(strip, f"{query.clip_id}: the weights for {query.sentence!r}")
    found = ground(w, frame_s, heard_s)
    inside = mass_inside(w, frame_s, query.start_s, query.end_s)
    own = _measures(found.onset_s, found.offset_s, found.peak_s, inside, query.start_s, query.end_s, frame_s)
    return {
        "clip_id": query.clip_id,
        "sentence": query.sentence,
        "start_s": query.start_s,
        "end_s": query.end_s,
        "heard_s": heard_s,
        "onset_s": found.onset_s,
        "offset_s": found.offset_s,
        "peak_s": found.peak_s,
        "frame_s": frame_s,
        "iou": float(own["iou"]) / 100,
        "inside": inside,
        "is_inside": bool(own["peak"]),
        "weights": w.tolist(),
    }


def _measures(
    onset_s: Any, offset_s: Any, peak_s: Any, inside: Any, start_s: Any, end_s: Any, frame_s: float
) -> dict[Measure, Any]:
    """Every measure of regions against events; the arguments broadcast. inside: a share from 0 to 1."""
    shared = np.maximum(np.minimum(offset_s, end_s) - np.maximum(onset_s, start_s), 0.0)
    error_s = np.abs(np.subtract(onset_s, start_s))
    return {
        "error_s": error_s,
        "near": 100.0 * (error_s <= frame_s + SLACK_S),
        "iou": 100.0 * shared / (np.subtract(offset_s, onset_s) + np.subtract(end_s, start_s) - shared),
        "inside": 100.0 * np.asarray(inside),
        "peak": 100.0 * (np.less_equal(start_s, peak_s) & np.less(peak_s, end_s)),
    }


def _covered(n_frames: int, frame_s: float, start_s: Any, end_s: Any) -> Float:
    """Which share of each frame lies between two times: (..., frame) for times (...)."""
    a = np.arange(n_frames) * frame_s
    low, high = np.maximum(a, np.asarray(start_s)[..., None]), np.minimum(a + frame_s, np.asarray(end_s)[..., None])
    return np.maximum(high - low, 0.0) / frame_s


def _checked(weights: npt.ArrayLike, where: str) -> Float:
    w = np.asarray(weights, np.float64)
    if w.ndim != 1 or not w.size:
        raise DataError(f"{where}: expected (frame,) with at least one frame, found shape {w.shape}.")
    if not np.isfinite(w).all():
        raise DataError(f"{where}: NaN or infinite. Look at the clip's features; if they are finite, at the model.")
    if w.min() < 0 or not w.max() > 0:
        raise DataError(f"{where}: from {w.min():g} to {w.max():g}; expected none below 0 and at least one above it.")
    return w


def _check_times(frame_s: float, heard_s: float) -> None:
    if not (frame_s > 0 and heard_s > 0):
        raise ConfigError(f"expected frame_s and heard_s above 0, found {frame_s} and {heard_s}.")


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One run on the sentences of a gallery, beside two controls.

    other_clips: what its weights for the sentences of other clips would be worth here, the mean over them (error_s: the
    median). other_texts: the same of the other sentences of the clip. NaN where there is no other. Weights that follow
    the place alone are as good as the first, weights that do not heed the text as good as the second.
    """

    own: Measures
    other_clips: Measures
    other_texts: Measures


@dataclass(frozen=True, slots=True, eq=False)
class Groundings:
    """All runs that were asked the same sentences about the same clips of one dataset.

    clips: (sentence,), the number of its clip. is_brief: (sentence,), whether its event sounds through at most BRIEF of
    what is heard. frame_s: recipe -> seconds. flat: frame_s -> what equal weights are worth, which is chance: the peak
    is then any frame. best: what each frame's weight being the share of it that the event covers is worth.
    """

    dataset: str
    clips: npt.NDArray[np.int64]
    is_brief: Bool
    recipes: Mapping[str, Mapping[int, Run]]
    frame_s: Mapping[str, float]
    flat: Mapping[float, Measures]
    best: Mapping[float, Measures]

    @staticmethod
    def of(table: pa.Table) -> list[Groundings]:
        """The galleries of a GROUNDING table, in order of first appearance.

        Recipes that heard other clips (imported frames may lack some) are in a gallery of their own. Raises DataError
        where two seeds of a recipe were asked other sentences, or hear in other frames.
        """
        galleries: dict[tuple[Any, ...], list[tuple[str, int, pa.Table]]] = {}
        for dataset in pc.unique(table["dataset"]).to_pylist():
            rows = table.filter(pc.equal(table["dataset"], dataset))
            for recipe in pc.unique(rows["recipe"]).to_pylist():
                runs = dict(_by_seed(rows.filter(pc.equal(rows["recipe"], recipe))))
                asked = {seed: _asked(run) for seed, run in runs.items()}
                if len(set(asked.values())) > 1:
                    raise DataError(
                        f"grounding: the seeds of {recipe} on {dataset}, {', '.join(map(str, runs))}, were not asked "
                        "the same sentences in frames of one length. Run `dvc repro evaluate` again."
                    )
                sentences, _ = next(iter(asked.values()))
                galleries.setdefault((dataset, sentences), []).extend((recipe, seed, run) for seed, run in runs.items())
        return [_gallery(dataset, runs) for (dataset, _), runs in galleries.items()]

    def mask(self, part: Part) -> Bool:
        """Which sentences a part holds: (sentence,)."""
        return self.is_brief if part == "brief" else np.ones(len(self.is_brief), bool)

    def count(self, part: Part) -> int:
        """How many sentences a part holds."""
        return int(self.mask(part).sum())

    def n_clips(self, part: Part) -> int:
        """How many clips these are about."""
        return len(np.unique(self.clips[self.mask(part)]))

    def typical(self, values: Measures, part: Part) -> dict[Measure, float]:
        """What a part comes to: the mean of each measure, of error_s the median, over sentences that have a value."""
        kept = {m: values[m][self.mask(part) & ~np.isnan(values[m])] for m in MEASURES}
        return {m: float(np.median(v) if m == "error_s" else v.mean()) for m, v in kept.items() if len(v)}


@dataclass(frozen=True, slots=True)
class Summary:
    """What the runs of a gallery come to. cells: (recipe, measure, part) -> its runs together (error_s: the median).

    by_flat: (recipe, part) -> `iou` of the run's own weights against that of equal ones. by_clip, by_text: `inside`
    against that of the weights for other clips, and for the clip's other sentences. A part without a sentence, or
    without another to compare with, is absent.
    """

    cells: Mapping[tuple[str, Measure, Part], Pooled]
    by_flat: Mapping[tuple[str, Part], SeededDifference]
    by_clip: Mapping[tuple[str, Part], SeededDifference]
    by_text: Mapping[tuple[str, Part], SeededDifference]

    def means(self) -> dict[str, dict[str, dict[str, float]]]:
        """Part -> recipe -> measure -> its mean over seeds, for `dvc metrics`."""
        out: dict[str, dict[str, dict[str, float]]] = {}
        for (recipe, measure, part), cell in self.cells.items():
            out.setdefault(part, {}).setdefault(recipe, {})[measure] = round(cell.mean, 4)
        return out


def summary(
    found: Groundings, *, rng_of: Callable[..., np.random.Generator], n_resamples: int, level: float
) -> Summary:
    """Every recipe's measures with intervals over clips, and whether its weights beat chance, heed the clip, the text.

    rng_of: the generator for a purpose, named by strings.
    """
    cells: dict[tuple[str, Measure, Part], Pooled] = {}
    against: dict[str, dict[tuple[str, Part], SeededDifference]] = {"flat": {}, "other_clips": {}, "other_texts": {}}
    how: dict[str, Any] = {"n_resamples": n_resamples, "level": level}
    for recipe, runs in found.recipes.items():
        flat = found.flat[found.frame_s[recipe]]
        for part in (p for p in PARTS if found.count(p)):
            keep = found.mask(part)
            for measure in MEASURES:
                by_seed = {seed: run.own[measure][keep] for seed, run in runs.items()}
                rng = rng_of(found.dataset, recipe, part, measure)
                pool = pooled_median if measure == "error_s" else pooled
                cells[recipe, measure, part] = pool(by_seed, found.clips[keep], rng=rng, **how)
            for name, into in against.items():
                by: Measure = "iou" if name == "flat" else "inside"
                theirs = {s: flat[by] if name == "flat" else getattr(run, name)[by] for s, run in runs.items()}
                both = keep & ~np.isnan(next(iter(theirs.values())))
                if both.any():
                    a = {seed: run.own[by][both] for seed, run in runs.items()}
                    b = {seed: values[both] for seed, values in theirs.items()}
                    rng = rng_of(found.dataset, recipe, part, name)
                    into[recipe, part] = paired_by_seed(a, b, found.clips[both], rng=rng, **how)
    return Summary(cells, against["flat"], against["other_clips"], against["other_texts"])


def _by_seed(rows: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    for seed in sorted(pc.unique(rows["seed"]).to_pylist()):
        run = rows.filter(pc.equal(rows["seed"], seed))
        yield seed, run.sort_by([("clip_id", "ascending"), ("start_s", "ascending"), ("sentence", "ascending")])


def _asked(run: pa.Table) -> tuple[tuple[tuple[Any, ...], ...], float]:
    """Every sentence with its clip and times, and the length of a frame."""
    columns = (run[c].to_pylist() for c in ("clip_id", "sentence", "start_s", "end_s", "heard_s"))
    return tuple(zip(*columns, strict=True)), run["frame_s"][0].as_py()


def _gallery(dataset: str, runs: Sequence[tuple[str, int, pa.Table]]) -> Groundings:
    first = runs[0][2]
    clips = np.unique(first["clip_id"].to_numpy(), return_inverse=True)[1]
    start_s, end_s, heard_s = (first[c].to_numpy() for c in ("start_s", "end_s", "heard_s"))
    recipes: dict[str, dict[int, Run]] = {}
    frame_s: dict[str, float] = {}
    for recipe, seed, run in runs:
        frame_s[recipe] = run["frame_s"][0].as_py()
        recipes.setdefault(recipe, {})[seed] = _run(run, clips)
    flat, best = (
        {f: _reference(start_s, end_s, heard_s, f, is_flat) for f in sorted(set(frame_s.values()))}
        for is_flat in (True, False)
    )
    return Groundings(dataset, clips, end_s - start_s <= BRIEF * heard_s, recipes, frame_s, flat, best)


def _run(run: pa.Table, clips: npt.NDArray[np.int64]) -> Run:
    """The measures of a run's own weights, and of those for the sentences of other clips and of the clip's others."""
    frame_s, start_s, end_s = run["frame_s"][0].as_py(), run["start_s"].to_numpy(), run["end_s"].to_numpy()
    onset_s, offset_s, peak_s = (run[c].to_numpy() for c in ("onset_s", "offset_s", "peak_s"))
    strips = [np.asarray(w, np.float64) for w in run["weights"].to_pylist()]
    weights = np.zeros((len(strips), max(map(len, strips))))
    for row, strip in zip(weights, strips, strict=True):
        row[: len(strip)] = strip / strip.sum()
    own = _measures(onset_s, offset_s, peak_s, run["inside"].to_numpy(), start_s, end_s, frame_s)
    is_own_clip, every = clips[:, None] == clips, np.arange(len(clips))
    crossed = []
    for others in (~is_own_clip, is_own_clip & (every[:, None] != every)):
        values = {m: np.full(len(clips), np.nan) for m in MEASURES}
        for i in np.flatnonzero(others.any(axis=1)):
            event, of = (start_s[i], end_s[i]), others[i]
            inside = weights[of] @ _covered(weights.shape[1], frame_s, *event)
            found = _measures(onset_s[of], offset_s[of], peak_s[of], inside, *event, frame_s)
            for m in MEASURES:
                values[m][i] = np.median(found[m]) if m == "error_s" else found[m].mean()
        crossed.append(values)
    return Run(own, *crossed)


def _reference(start_s: Float, end_s: Float, heard_s: Float, frame_s: float, is_flat: bool) -> Measures:
    """What equal weights are worth, or weights that are the share of each frame which the event covers."""
    found: list[dict[Measure, Any]] = []
    for a, b, length_s in zip(start_s, end_s, heard_s, strict=True):
        n_frames = max(int((length_s + SLACK_S) / frame_s), 1)  # what is left at the end fills no frame
        covered = _covered(n_frames, frame_s, a, b)
        if not covered.any():
            covered[-1] = 1.0  # the event is in that rest: the frame before it is the nearest
        w = np.ones(n_frames) if is_flat else covered
        at = ground(w, frame_s, length_s)
        found.append(_measures(at.onset_s, at.offset_s, at.peak_s, mass_inside(w, frame_s, a, b), a, b, frame_s))
        if is_flat:
            middles_s = (np.arange(n_frames) + 0.5) * frame_s
            found[-1]["peak"] = 100.0 * ((a <= middles_s) & (middles_s < b)).mean()
    return {m: np.array([f[m] for f in found], np.float64) for m in MEASURES}
