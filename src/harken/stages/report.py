"""Stage `report`: evaluations -> the tables, metrics and curves that people and `dvc metrics` / `dvc plots` read.

Every sentence of the report is computed from data; a claim that does not hold is printed as not holding.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harken.config import Config, Paths
from harken.engines import Map
from harken.errors import DataError
from harken.evaluation import metrics, significance, tables
from harken.shards import atomic, publish, write_json
from harken.training.loop import fold

log = logging.getLogger("harken")
CODE = ("stages/report.py", "evaluation")
CURVES = ("loss", "score")


class ReportConfig(Config):
    """`chance_factor`: trained rows are held against this multiple of chance at R@1; `compare` pairs rows `[a, b]`."""

    title: str
    metrics: list[str]
    chance_factor: float
    planted_percent: float
    compare: list[tuple[str, str]]
    n_resamples: int
    level: float


def run(paths: Paths, cfg: ReportConfig, map: Map) -> None:
    """Write report.md, results.json, metrics.json and the curves; print the tables."""
    path = paths.evaluations / "results.json"
    if not path.is_file():
        raise DataError(f"{path}: nothing was evaluated. Run `dvc repro evaluate` first.")
    results = json.loads(path.read_text())
    planted = json.loads((paths.evaluations / "planted.json").read_text())
    work = paths.work / "report"
    text = "\n".join([f"# {cfg.title}", "", *_tables(results, cfg), *_claims(paths, results, planted, cfg)])
    with atomic(work / "report.md") as f:
        f.write((text.rstrip() + "\n").encode())
    with atomic(work / "results.json") as f:
        f.write(tables.as_json(results).encode())
    write_json(work / "metrics.json", _metrics(results, planted))
    names = ["report.md", "results.json", "metrics.json", *_curves(paths, work)]
    publish(work, paths.report, names)
    print(text)
    log.info("report: %s", paths.report / "report.md")


def _tables(results: list[dict[str, Any]], cfg: ReportConfig) -> list[str]:
    if not results:
        return ["No recipes were run: `recipes` of pretrain, finetune and train are empty in params.yaml.", ""]
    note = (
        f"R@k in percent, ties broken at random in expectation; mean ± sample standard deviation over seeds, "
        f"[{100 * cfg.level:.0f} % interval over clips]. A→T counts the best of a clip's captions."
    )
    return [tables.markdown(results, cfg.metrics), note, ""]


def _claims(paths: Paths, results: list[dict[str, Any]], planted: dict[str, Any], cfg: ReportConfig) -> list[str]:
    lines = ["## What the data say", ""]
    for row, factor in sorted(_chance_factors(results).items(), key=lambda kv: kv[1]):
        verdict = "at least" if factor >= cfg.chance_factor - 1e-6 else "NOT"
        lines.append(f"- {row}: R@1 is {factor:.1f} times chance ({verdict} {cfg.chance_factor:g} times).")
    for name, p in planted.items():
        if p["n_clips"]:
            verdict = "at least" if p["chosen_right"] >= cfg.planted_percent else "below"
            lines.append(
                f"- {name}: the nearest image is a planted one for {p['chosen_right']:.1f} % of {p['n_clips']} "
                f"training clips ({verdict} {cfg.planted_percent:g} %; a random image: "
                f"{p['random_right']:.1f} %). Of the "
                f"{p['n_hard']} that also have wrong images: {p['chosen_right_hard']:.1f} % (random: "
                f"{p['random_right_hard']:.1f} %)."
            )
    for a, b in cfg.compare:
        lines += [f"- {line}" for line in _comparison(paths, results, a, b, cfg)]
    return [*lines, ""]


def _chance_factors(results: list[dict[str, Any]]) -> dict[str, float]:
    """R@1 over chance, the lower of both directions, the mean over seeds."""
    factors: dict[str, list[float]] = {}
    for r in results:
        worst = min(r["metrics"][d]["R@1"] / r["chance"][d]["R@1"] for d in r["metrics"])
        factors.setdefault(f"{r['recipe']} on {r['dataset']}", []).append(worst)
    return {row: float(np.mean(f)) for row, f in factors.items()}


def _comparison(paths: Paths, results: list[dict[str, Any]], a: str, b: str, cfg: ReportConfig) -> Iterator[str]:
    """Row a against row b on the same queries, for every gallery that both were measured on."""
    table = pq.read_table(paths.evaluations / "ranks.parquet")
    shared = {(r["dataset"], r["passport"]) for r in results if r["recipe"] == a}
    shared &= {(r["dataset"], r["passport"]) for r in results if r["recipe"] == b}
    if not shared:
        yield f"{a} against {b}: not both measured on one gallery."
    for dataset, passport in sorted(shared):
        for direction in ("t2a", "a2t", "i2a", "a2i"):
            hits = [_hits(table, row, passport, direction) for row in (a, b)]
            if hits[0] is None or hits[1] is None:
                continue
            (x, clips), (y, _) = hits[0], hits[1]
            d = significance.paired_difference(
                x,
                y,
                clips,
                rng=np.random.default_rng(fold(a, b, direction)),
                n_resamples=cfg.n_resamples,
                level=cfg.level,
            )
            says = "within noise" if d.is_within_noise else "a real difference" if d.mean > 0 else "a real loss"
            yield (
                f"{a} against {b}, {dataset} {tables.DIRECTIONS[direction]} R@1: {d.mean:+.1f} "
                f"[{d.low:+.1f}, {d.high:+.1f}], p = {d.p_value:.3f}: {says}."
            )


def _hits(table: Any, row: str, passport: str, direction: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(seed, query) hits at 1 in percent, and the clip of each query as a number."""
    for name, value in (("recipe", row), ("passport", passport), ("direction", direction)):
        table = table.filter(pc.equal(table[name], value))
    if not len(table):
        return None
    seeds = sorted(set(table["seed"].to_pylist()))
    parts = [table.filter(pc.equal(table["seed"], s)).sort_by("query") for s in seeds]
    columns = ("above", "tied", "tied_relevant", "n_relevant")
    found = [metrics.Ranks(**{c: p[c].to_numpy() for c in columns}, n_items=p["n_items"][0].as_py()) for p in parts]
    clips = np.unique(parts[0]["clip_id"].to_pylist(), return_inverse=True)[1]
    return np.stack([100 * r.hit(1) for r in found]), clips


def _metrics(results: list[dict[str, Any]], planted: dict[str, Any]) -> dict[str, Any]:
    """Nested means over seeds for `dvc metrics`: dataset -> row -> direction -> metric."""
    out: dict[str, Any] = {}
    for gallery in tables.summarise(results):
        for row in gallery["rows"]:
            cells = {d: {m: round(c["mean"], 4) for m, c in v.items()} for d, v in row["metrics"].items()}
            out.setdefault(gallery["dataset"], {})[row["recipe"]] = cells
    if planted:
        out["planted_image"] = {n: {k: round(v, 4) for k, v in p.items()} for n, p in planted.items()}
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
