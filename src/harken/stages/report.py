"""Stage `report`: evaluations -> the tables, metrics and curves that people and `dvc metrics` / `dvc plots` read.

Every sentence of the report is computed from data; a claim that does not hold is printed as not holding.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from harken.config import Config, Paths
from harken.engines import Map
from harken.errors import DataError
from harken.evaluation import grounding, metrics, significance, statements, strips, tables
from harken.evaluation.choices import PARTS, Choices, Part
from harken.evaluation.grounding import Groundings
from harken.evaluation.significance import SeededDifference
from harken.shards import atomic, publish, write_json
from harken.training.loop import fold

log = logging.getLogger("harken")
CODE = ("stages/report.py", "evaluation")
CURVES = ("loss", "score")


class ReportConfig(Config):
    """What the results are held against, and which are held against each other.

    `chance_factor`: rows against this multiple of chance at R@1. Where truth is planted, `planted_percent`: how often
    the nearest image should be a right one; `onset_frames`: by how many frames a text-aware pooling's median onset may
    be off. `compare` pairs rows of the tables `[a, b]`, by R@k for each k of `compare_at`; `compare_planted` recipes of
    `pretrain` by their nearest images; without planted truth the latter is not used.
    """

    title: str
    metrics: list[str]
    chance_factor: float
    planted_percent: float
    onset_frames: float
    compare: list[tuple[str, str]]
    compare_at: list[Annotated[int, Field(ge=1)]]
    compare_planted: list[tuple[str, str]]
    n_resamples: int
    level: float


def run(paths: Paths, cfg: ReportConfig, map: Map) -> None:
    """Write report.md, results.json, metrics.json and the curves; print the tables."""
    path = paths.evaluations / "results.json"
    if not path.is_file():
        raise DataError(f"{path}: nothing was evaluated. Run `dvc repro evaluate` first.")
    results = json.loads(path.read_text())
    choices, times = _choices(paths.evaluations), _image_times(paths.evaluations)
    grounded, strips_of = _grounded(paths.evaluations, cfg)
    work = paths.work / "report"
    says = [*_says(paths, results, choices, times, cfg), *_when(grounded, bool(strips_of), cfg)]
    text = "\n".join([f"# {cfg.title}", "", *_tables(results, cfg), *says])
    with atomic(work / "report.md") as f:
        f.write((text.rstrip() + "\n").encode())
    with atomic(work / "results.json") as f:
        f.write(tables.as_json(results).encode())
    told = _metrics(results, choices, times)
    if grounded:
        told["grounding"] = {found.dataset: said.means() for found, said in grounded}
    write_json(work / "metrics.json", told)
    names = ["report.md", "results.json", "metrics.json", *_curves(paths, work)]
    if strips_of:
        names.append("strips.png")
        with atomic(work / names[-1]) as f:
            strips.draw(strips_of, f)
    publish(work, paths.report, names)
    print(text)
    log.info("report: %s", paths.report / "report.md")


def _choices(evaluations: Path) -> Choices | None:
    """None where no truth is planted, or no clip has a right image."""
    path = evaluations / "planted.parquet"
    return Choices.of(pq.read_table(path)) if path.is_file() else None


def _image_times(evaluations: Path) -> dict[str, Any] | None:
    """None where no truth is planted."""
    path = evaluations / "image_times.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _grounded(
    evaluations: Path, cfg: ReportConfig
) -> tuple[list[tuple[Groundings, grounding.Summary]], list[strips.Panel]]:
    """What the weights of text-aware poolings say of when, and some clips' strips; nothing without planted truth."""
    path = evaluations / "grounding.parquet"
    if not path.is_file():
        return [], []
    table = pq.read_table(path)
    found = []
    for gallery in Groundings.of(table):
        said = grounding.summary(
            gallery,
            rng_of=lambda *parts: np.random.default_rng(fold("grounding", *parts)),
            n_resamples=cfg.n_resamples,
            level=cfg.level,
        )
        found.append((gallery, said))
    return found, strips.panels(table)


def _when(grounded: list[tuple[Groundings, grounding.Summary]], has_strips: bool, cfg: ReportConfig) -> list[str]:
    lines = [line for found, said in grounded for line in statements.grounding(found, said, cfg.onset_frames)]
    return [*lines, "", "![When each sentence is heard](strips.png)", ""] if has_strips else lines


def _tables(results: list[dict[str, Any]], cfg: ReportConfig) -> list[str]:
    if not results:
        return ["No recipes were run: `recipes` of pretrain, finetune and train are empty in params.yaml.", ""]
    note = (
        f"R@k in percent, ties broken at random in expectation; mean ± sample standard deviation over seeds, "
        f"[{100 * cfg.level:.0f} % interval over clips]. A→T counts the best of a clip's captions."
    )
    if any(tables.is_transductive(r) for r in results):
        note += (
            " A row marked (transductive) is revised by what all the other queries found, which a search does not "
            "know: it is compared with its like only and is never the best."
        )
    return [tables.markdown(results, cfg.metrics), note, ""]


def _says(
    paths: Paths,
    results: list[dict[str, Any]],
    choices: Choices | None,
    times: dict[str, Any] | None,
    cfg: ReportConfig,
) -> list[str]:
    """What the data say, every sentence computed; of planted truth only where there is one."""
    lines = ["## What the data say", "", *statements.against_chance(_chance_factors(results), cfg.chance_factor)]
    found = [*_rows_compared(paths, results, cfg)]
    if choices is not None:
        lines += statements.nearest_image(choices, _pooled(choices, cfg), cfg.planted_percent)
        found += _choices_compared(choices, cfg)
    if times is not None:
        lines += statements.image_times(times)
    return [*lines, *statements.comparisons(found, cfg.level)]


def _chance_factors(results: list[dict[str, Any]]) -> dict[str, float]:
    """R@1 over chance, the lower of both directions, the mean over seeds."""
    factors: dict[str, list[float]] = {}
    for r in results:
        worst = min(r["metrics"][d]["R@1"] / r["chance"][d]["R@1"] for d in r["metrics"])
        factors.setdefault(f"{r['recipe']} on {r['dataset']}", []).append(worst)
    return {row: float(np.mean(f)) for row, f in factors.items()}


def _pooled(choices: Choices, cfg: ReportConfig) -> dict[tuple[str, Part], significance.Pooled]:
    """(recipe, part) -> its runs together; a part without clips is absent."""
    found = {}
    for recipe in choices.recipes:
        for part in PARTS:
            if n := choices.count(part):
                found[recipe, part] = significance.pooled(
                    choices.runs(recipe, part),
                    np.arange(n),
                    rng=np.random.default_rng(fold("planted", recipe, part)),
                    n_resamples=cfg.n_resamples,
                    level=cfg.level,
                )
    return found


Compared = tuple[str, SeededDifference | None]


def _choices_compared(choices: Choices, cfg: ReportConfig) -> Iterator[Compared]:
    """The nearest images of two recipes, over all clips and over the hard ones."""
    for a, b in cfg.compare_planted:
        if lacking := [r for r in (a, b) if r not in choices.recipes]:
            yield f"{a} against {b}, nearest image: nothing was chosen by {' and '.join(lacking)}", None
            continue
        for part, name in zip(PARTS, ("nearest image", "nearest image of hard clips"), strict=True):
            if n := choices.count(part):
                x, y = choices.runs(a, part), choices.runs(b, part)
                yield f"{a} against {b}, {name}", _paired(x, y, np.arange(n), fold(a, b, part), cfg)


def _rows_compared(paths: Paths, results: list[dict[str, Any]], cfg: ReportConfig) -> Iterator[Compared]:
    """Row against row on the same queries, for every gallery that both were measured on."""
    if not results or not cfg.compare:
        return
    table = pq.read_table(paths.evaluations / "ranks.parquet")
    for a, b in cfg.compare:
        galleries = [{(r["dataset"], r["passport"]) for r in results if r["recipe"] == row} for row in (a, b)]
        if not (shared := galleries[0] & galleries[1]):
            yield f"{a} against {b}: not both measured on one gallery", None
        for dataset, passport in sorted(shared):
            for direction, name in tables.DIRECTIONS.items():
                x, y = (_asked(table, row, passport, direction) for row in (a, b))
                if x is None or y is None:
                    continue
                if x[1] != y[1]:
                    raise DataError(f"{a} and {b} were asked other queries under one passport, {passport}.")
                clips = np.unique(x[1], return_inverse=True)[1]
                for k in cfg.compare_at:
                    p, q = ({seed: 100 * ranks.hit(k) for seed, ranks in row[0].items()} for row in (x, y))
                    found = _paired(p, q, clips, fold(a, b, direction), cfg)
                    yield f"{a} against {b}, {dataset} {name} R@{k}", found


def _paired(
    x: Mapping[int, np.ndarray], y: Mapping[int, np.ndarray], clips: np.ndarray, seed: int, cfg: ReportConfig
) -> SeededDifference:
    rng = np.random.default_rng(seed)
    return significance.paired_by_seed(x, y, clips, rng=rng, n_resamples=cfg.n_resamples, level=cfg.level)


def _asked(
    table: pa.Table, row: str, passport: str, direction: str
) -> tuple[dict[int, metrics.Ranks], list[str]] | None:
    """Seed -> the ranks of a row's queries, and the clip of each query."""
    for name, value in (("recipe", row), ("passport", passport), ("direction", direction)):
        table = table.filter(pc.equal(table[name], value))
    if not len(table):
        return None
    found, clips = {}, []
    for seed in sorted(pc.unique(table["seed"]).to_pylist()):
        part = table.filter(pc.equal(table["seed"], seed)).sort_by("query")
        columns = {c: part[c].to_numpy() for c in ("above", "tied", "tied_relevant", "n_relevant")}
        found[seed] = metrics.Ranks(**columns, n_items=part["n_items"][0].as_py())
        clips.append(part["clip_id"].to_pylist())
    if any(c != clips[0] for c in clips):
        raise DataError(f"{row}: its seeds were asked other queries under one passport: {passport}")
    return found, clips[0]


def _metrics(results: list[dict[str, Any]], choices: Choices | None, times: dict[str, Any] | None) -> dict[str, Any]:
    """Nested means over seeds for `dvc metrics`: dataset -> row -> direction -> metric; and what planted truth says."""
    out: dict[str, Any] = {}
    for gallery in tables.summarise(results):
        for row in gallery["rows"]:
            cells = {d: {m: round(c["mean"], 4) for m, c in v.items()} for d, v in row["metrics"].items()}
            out.setdefault(gallery["dataset"], {})[row["recipe"]] = cells
    if choices is not None:
        for part in (p for p in PARTS if choices.count(p)):
            right = {r: float(np.mean(list(choices.runs(r, part).values()))) for r in choices.recipes}
            right["an image at random"] = float(choices.random[choices.mask(part)].mean())
            out.setdefault("planted_image", {})[part] = {r: round(v, 4) for r, v in right.items()}
    if times is not None:
        out["image_times"] = {
            rule: {k: round(of[k], 4) for k in statements.SHARES if of[k] is not None}
            for rule, of in times["rules"].items()
        }
    return out


def _curves(paths: Paths, work: Path) -> list[str]:
    """One picture per stage with every run's curves, and the same as one table for `dvc plots`."""
    names = []
    for stage, folder in (("pretrain", paths.pretrained), ("finetune", paths.finetuned), ("train", paths.trained)):
        runs = {p.parent.name: list(csv.DictReader(p.open())) for p in sorted(folder.glob("*/history.csv"))}
        runs = {n: rows for n, rows in runs.items() if rows}
        if not runs:
            continue
        names.append(f"curves_{stage}.png")
        with atomic(work / names[-1]) as f:
            _draw(stage, runs, f)
    return names


def _draw(stage: str, runs: dict[str, list[dict[str, str]]], file: Any) -> None:
    figure, axes = plt.subplots(1, len(CURVES), figsize=(10, 3.6), layout="constrained")
    labels = {"loss": "training loss", "score": "validation score (sum of recalls, %)"}
    for axis, key in zip(axes, CURVES, strict=True):
        for name, rows in runs.items():
            axis.plot([int(float(r["epoch"])) + 1 for r in rows], [float(r[key]) for r in rows], label=name, marker=".")
        axis.set_xlabel("epoch")
        axis.set_title(labels[key], fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(stage)
    figure.savefig(
        file, format="png", dpi=110, metadata={"Software": None}
    )  # no version: the same bytes from equal data
    plt.close(figure)
