"""Results of runs -> the tables of a paper: mean ± sample standard deviation over seeds, interval over clips, and N.

A result is one run (recipe × seed) measured on one gallery:

    {"recipe": "tap_pmr", "seed": 0, "dataset": "audiocaps", "split": "test", "n_clips": 957,
     "passport": "audiocaps test 957/975 ids:...",
     "metrics":   {"t2a": {"R@1": 36.8, ...}, "a2t": {...}},
     "intervals": {"t2a": {"R@1": [35.1, 38.6], ...}}}         # optional

Results of different galleries never share a table: a gallery is (dataset, split, n_clips, passport).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harken.errors import DataError

Result = Mapping[str, Any]

DIRECTIONS = {"t2a": "T→A", "a2t": "A→T", "i2a": "I→A", "a2i": "A→I"}
TRANSDUCTIVE = "(transductive)"
"""What the recipe of a row ends with whose answers depend on all the other queries."""
FIELDS = ("recipe", "seed", "dataset", "split", "n_clips", "passport", "metrics")


def summarise(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Galleries in order of first appearance, each with its recipes: a JSON-able list.

    Each cell `rows[i]["metrics"][direction][metric]` holds `mean`, `std` (sample standard deviation over seeds, that is
    ddof = 1; None for one seed) and `interval` ([low, high] over clips, or None unless every seed has one). The
    interval of several seeds is the mean of theirs, which is no narrower than that of their mean. Raises DataError
    where the seeds of a recipe report different metrics, a run comes twice, or a result lacks a field.
    """
    galleries: dict[tuple[Any, ...], dict[str, list[Result]]] = {}
    for result in results:
        missing = [name for name in FIELDS if name not in result]
        if missing:
            raise DataError(f"a result lacks {', '.join(missing)}. A result has: {', '.join(FIELDS)}.")
        gallery = (result["dataset"], result["split"], result["n_clips"], result["passport"])
        runs = galleries.setdefault(gallery, {}).setdefault(result["recipe"], [])
        if any(r["seed"] == result["seed"] for r in runs):
            raise DataError(f"{result['recipe']}: seed {result['seed']} comes twice for {gallery[0]} {gallery[1]}.")
        runs.append(result)
    return [
        dict(zip(("dataset", "split", "n_clips", "passport"), gallery, strict=True))
        | {"rows": [_row(recipe, runs) for recipe, runs in recipes.items()]}
        for gallery, recipes in galleries.items()
    ]


def as_json(results: Iterable[Result]) -> str:
    """`summarise(results)` as indented JSON."""
    return json.dumps(summarise(results), indent=1, ensure_ascii=False) + "\n"


def markdown(results: Iterable[Result], metrics: Sequence[str] = ("R@1", "R@5", "R@10")) -> str:
    """A Markdown table for each gallery: a row for each recipe, a column for each direction and metric.

    A cell reads `36.8 ± 0.4 [35.1, 38.6]`: mean, sample standard deviation over seeds, 95 % interval over clips. The
    best mean of a column is bold. A metric that a recipe does not report is shown as a dash.
    """
    return "\n".join(_table(gallery, metrics) for gallery in summarise(results))


def _row(recipe: str, runs: Sequence[Result]) -> dict[str, Any]:
    runs = sorted(runs, key=lambda r: int(r["seed"]))
    first = runs[0]["metrics"]
    shape = {direction: list(values) for direction, values in first.items()}
    for run in runs[1:]:
        if {d: sorted(v) for d, v in run["metrics"].items()} != {d: sorted(v) for d, v in shape.items()}:
            raise DataError(f"{recipe}: seeds {runs[0]['seed']} and {run['seed']} report different metrics.")
    cells = {d: {m: _cell([r["metrics"][d][m] for r in runs], _intervals(runs, d, m)) for m in shape[d]} for d in shape}
    return {"recipe": recipe, "seeds": [r["seed"] for r in runs], "metrics": cells}


def _intervals(runs: Sequence[Result], direction: str, metric: str) -> list[Sequence[float]]:
    found = [run.get("intervals", {}).get(direction, {}).get(metric) for run in runs]
    return [i for i in found if i is not None]


def _cell(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> dict[str, Any]:
    complete = len(intervals) == len(values)
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "interval": [statistics.fmean(ends) for ends in zip(*intervals, strict=True)] if complete else None,
    }


def _table(gallery: Mapping[str, Any], metrics: Sequence[str]) -> str:
    rows = gallery["rows"]
    used = {d for row in rows for d in row["metrics"]}
    ordered = [d for d in DIRECTIONS if d in used] + sorted(used - set(DIRECTIONS))
    columns = [(d, m) for d in ordered for m in metrics if any(m in row["metrics"].get(d, {}) for row in rows)]
    best = {}
    for d, m in columns:
        # a row that knows all queries is not in the race
        means = [r["metrics"][d][m]["mean"] for r in rows if m in r["metrics"].get(d, {}) and not is_transductive(r)]
        if means:
            best[d, m] = min(means) if m.endswith("rank") else max(means)
    head = ["recipe", "seeds", *(f"{DIRECTIONS.get(d, d)} {m}" for d, m in columns)]
    lines = [
        f"### {gallery['dataset']} {gallery['split']}, N = {gallery['n_clips']}",
        "",
        f"`{gallery['passport']}`",
        "",
    ]
    lines += head_lines(head)
    for row in rows:
        cells = [row["metrics"].get(d, {}).get(m) for d, m in columns]
        texts = [
            text(x, is_best=len(rows) > 1 and not is_transductive(row) and x is not None and x["mean"] == best[c])
            for x, c in zip(cells, columns, strict=True)
        ]
        lines.append(line([row["recipe"], str(len(row["seeds"])), *texts]))
    return "\n".join([*lines, ""])


def is_transductive(row: Mapping[str, Any]) -> bool:
    """Whether a row's answers depend on the other queries (see protocols.dual_softmax)."""
    return str(row["recipe"]).endswith(TRANSDUCTIVE)


def text(cell: Mapping[str, Any] | None, *, is_best: bool = False) -> str:
    """A cell as it reads in a table: mean, sample standard deviation and interval, as far as it has them."""
    if cell is None:
        return "–"
    said = f"**{cell['mean']:.1f}**" if is_best else f"{cell['mean']:.1f}"
    if cell["std"] is not None:
        said += f" ± {cell['std']:.1f}"
    if cell["interval"] is not None:
        said += f" [{cell['interval'][0]:.1f}, {cell['interval'][1]:.1f}]"
    return said


def head_lines(cells: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table, whose first column is of words and whose others are of numbers."""
    return [line(cells), line(["---", *["---:"] * (len(cells) - 1)])]


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    escaped = [c.replace("|", "\\|") for c in cells]
    return "| " + " | ".join(escaped) + " |"
