"""A picture of when: each sentence's weights over a clip's time, and the stretch in which its sound was planted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harken.errors import DataError

WIDTH_IN = 10.0
ROW_IN, GAP_IN, EDGES_IN = 0.34, 0.24, 1.35  # a sentence's strip; between two clips; title, axis and legend
COLOURS = "cividis"  # as even and as readable for those who do not see red from green
MARK = "#d7301f"  # against dark blue, grey and yellow alike


@dataclass(frozen=True, slots=True)
class Strip:
    """A sentence's weights in one recipe. weights: (frame,), at least 0, of frames of `frame_s` seconds."""

    sentence: str
    start_s: float
    end_s: float
    frame_s: float
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """A clip's strips: recipe and seed, as they read -> the sentences, in the order in which they sound."""

    clip_id: str
    heard_s: float
    strips: dict[str, tuple[Strip, ...]]


def panels(table: pa.Table, n_clips: int = 6) -> list[Panel]:
    """The clips to show of a GROUNDING table: those with the most sentences, of equally many the first by id.

    Only clips about which every recipe of the first row's dataset was asked the same, and of each recipe its lowest
    seed: the choice looks at nothing that a run found. Empty for an empty table.
    """
    if not len(table):
        return []
    table = table.filter(pc.equal(table["dataset"], table["dataset"][0]))
    recipes = pc.unique(table["recipe"]).to_pylist()
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for recipe in recipes:
        runs = table.filter(pc.equal(table["recipe"], recipe))
        seed = pc.min(runs["seed"]).as_py()
        for row in runs.filter(pc.equal(runs["seed"], seed)).to_pylist():
            rows.setdefault(row["clip_id"], {}).setdefault(f"{recipe}, seed {seed}", []).append(row)
    shared = {
        clip: of
        for clip, of in rows.items()
        if len(of) == len(recipes) and len({tuple(sorted(map(_when, found))) for found in of.values()}) == 1
    }
    chosen = sorted(shared, key=lambda clip: (-len(next(iter(shared[clip].values()))), clip))[:n_clips]
    return [
        Panel(
            clip,
            max(row["heard_s"] for of in shared[clip].values() for row in of),
            {run: tuple(map(_strip, sorted(of, key=_when))) for run, of in shared[clip].items()},
        )
        for clip in chosen
    ]


def _when(row: dict[str, Any]) -> tuple[float, str]:
    return row["start_s"], row["sentence"]


def _strip(row: dict[str, Any]) -> Strip:
    return Strip(row["sentence"], row["start_s"], row["end_s"], row["frame_s"], tuple(row["weights"]))


def draw(shown: Sequence[Panel], file: Any) -> None:
    """A PNG: a row for each clip, a column for each recipe, a strip for each sentence; the same bytes from equal data.

    A strip's colour is its weight over its own largest one, so strips do not compare in height, only in where they are
    bright. The bracket is the planted stretch. Raises DataError where there is nothing to draw.
    """
    if not shown:
        raise DataError("strips: no clip to draw. A run with a text-aware pooling and a planted truth gives some.")
    recipes = list(shown[0].strips)
    n_rows = [max(len(strips) for strips in panel.strips.values()) for panel in shown]
    height = EDGES_IN + sum(n_rows) * ROW_IN + len(shown) * GAP_IN
    figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
    grid = figure.subplots(len(shown), len(recipes), squeeze=False, gridspec_kw={"height_ratios": n_rows})
    longest_s = max(panel.heard_s for panel in shown)
    image = None
    for axes, panel in zip(grid, shown, strict=True):
        for axis, strips in zip(axes, panel.strips.values(), strict=True):
            image = _panel(axis, strips, panel.heard_s, longest_s)
        axes[0].set_yticks(range(len(strips)), [s.sentence for s in strips])
        axes[0].set_title(panel.clip_id, fontsize=8, loc="left", color="#555555", pad=3, parse_math=False)
    for axis, recipe in zip(grid[0], recipes, strict=True):
        above = {"xytext": (0, 18), "textcoords": "offset points", "ha": "center", "fontsize": 10, "parse_math": False}
        axis.annotate(recipe, (0.5, 1.0), xycoords="axes fraction", **above)
    for axis in grid[-1]:
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("seconds from the clip's start", fontsize=9)
    assert image is not None
    bar = figure.colorbar(image, ax=grid, location="bottom", shrink=0.35, aspect=40, pad=0.01)
    bar.set_label("weight, relative to the sentence's largest", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    planted = Line2D([], [], color=MARK, linewidth=1.8, label="when it was planted")
    figure.legend(handles=[planted], loc="lower right", fontsize=9, frameon=False)
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})  # no version: the same bytes


def _panel(axis: Axes, strips: Sequence[Strip], heard_s: float, longest_s: float) -> Any:
    """Draw the strips of one clip and recipe, the first on top."""
    image = None
    for row, strip in enumerate(strips):
        weights = np.asarray(strip.weights, np.float64)
        n_heard = min(len(weights), int(np.ceil(heard_s / strip.frame_s - 1e-6)))  # without what is padding alone
        edges = np.minimum(np.arange(n_heard + 1) * strip.frame_s, heard_s)
        image = axis.pcolormesh(
            edges, [row - 0.38, row + 0.38], (weights[:n_heard] / weights.max())[None], cmap=COLOURS, vmin=0.0, vmax=1.0
        )
        a, b, low, high = strip.start_s, strip.end_s, row + 0.47, row + 0.24
        axis.plot(
            [a, a, b, b], [high, low, low, high], color=MARK, linewidth=1.8, solid_joinstyle="miter", clip_on=False
        )
    axis.set_xlim(0.0, longest_s)
    axis.set_ylim(len(strips) - 0.35, -0.5)
    axis.set_yticks([])
    axis.tick_params(axis="x", length=2, labelsize=8, labelbottom=False)
    axis.tick_params(axis="y", length=0, labelsize=9)
    axis.spines[["top", "right", "left"]].set_visible(False)
    return image
