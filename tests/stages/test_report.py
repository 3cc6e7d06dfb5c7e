"""The report says what the data say, whichever way it falls, and no more than they can carry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from harken.config import Paths
from harken.engines import inline
from harken.errors import DataError
from harken.evaluation import protocols
from harken.evaluation.passports import Passport
from harken.shards import write_json
from harken.stages import report
from harken.stages.evaluate import EvaluateConfig, Sheet

N = 60
IDS = [f"clip{i:02d}" for i in range(N)]
MEASURED = EvaluateConfig(
    ks=[1, 5], n_resamples=50, level=0.95, images=["mid"], zero_shot=[], at_pool="mean", prior_scale=None
)
ASKED: dict[str, Any] = {
    "title": "A test",
    "metrics": ["R@1", "R@5"],
    "chance_factor": 10.0,
    "planted_percent": 95.0,
    "onset_frames": 1.0,
    "compare": [["good (mid)", "poor (mid)"]],
    "compare_at": [1],
    "compare_planted": [["good", "poor"]],
    "n_resamples": 300,
    "level": 0.95,
}
Runs = Mapping[tuple[str, int], float]


def galleries(ids: Sequence[str], skill: float, seed: int) -> dict[str, protocols.Retrieval]:
    """A similarity whose diagonal wins for about `skill` of the clips."""
    rng = np.random.default_rng([seed, int(1000 * skill)])
    sim = rng.random((len(ids), len(ids)))
    sim[np.diag_indices(len(ids))] += 2.0 * (rng.random(len(ids)) < skill)
    return {"a2i": protocols.audio_to_image(sim), "i2a": protocols.image_to_audio(sim)}


def measure(paths: Paths, runs: Runs, ids: Sequence[str] = IDS, others: Mapping[str, Sequence[str]] = {}) -> None:
    """results.json and ranks.parquet of runs (recipe, seed) -> skill, as `evaluate` writes them."""
    results, ranks = [], []
    for (recipe, seed), skill in runs.items():
        sheet = Sheet("pretrain", {"seed": seed}, MEASURED)
        asked = list(others.get(recipe, ids))
        passport = Passport.of("audioset", "test", dict.fromkeys(ids, ()), len(ids) + 2)
        sheet.add(f"{recipe} (mid)", passport, asked, galleries(asked, skill, seed))
        results += sheet.results
        ranks += sheet.ranks
    write_json(paths.evaluations / "results.json", results)
    if ranks:
        pq.write_table(pa.concat_tables(ranks), paths.evaluations / "ranks.parquet")


def plant(paths: Paths, runs: Runs, hard: bool = True, n: int = 200) -> None:
    """planted.parquet and image_times.json: runs (recipe, seed) -> share of right choices, wrong on hard clips."""
    tables = []
    for (recipe, seed), skill in runs.items():
        is_hard = np.arange(n) < n // 2 if hard else np.zeros(n, bool)
        right = np.ones(n, bool)
        right[seed % 7 : seed % 7 + round(n * (1 - skill))] = False
        columns: dict[str, Any] = {
            "recipe": [recipe] * n,
            "seed": [seed] * n,
            "clip_id": [f"train{i}" for i in range(n)],
        }
        columns |= {"is_right": right, "share_right": np.where(is_hard, 0.5, 1.0), "is_hard": is_hard}
        tables.append(pa.table(columns))
    pq.write_table(pa.concat_tables(tables), paths.evaluations / "planted.parquet")
    counts = {"n_clips": n, "n_events": 300, "n_short": 0, "n_pairs": 4 * n, "short": None}
    ends = counts | {"events": 91.5, "clips": 100.0, "images": 75.0, "pairs": 74.0}
    middles = counts | {"events": 99.0, "clips": 98.0, "images": 85.0, "pairs": 85.0}
    told = {"rule": "endpoints", "n_moved": 0, "most_s": 0.0, "segment_s": 2.5, "taken": ends}
    write_json(paths.evaluations / "image_times.json", told | {"rules": {"endpoints": ends, "centres": middles}})


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(**{name: tmp_path / name for name in Paths.model_fields})


def say(paths: Paths, **changed: Any) -> str:
    """report.md."""
    report.run(paths, report.ReportConfig.model_validate_json(json.dumps(ASKED | changed)), inline)
    return (paths.report / "report.md").read_text()


def of_seeds(**skill: float) -> dict[tuple[str, int], float]:
    return {(recipe, seed): s for recipe, s in skill.items() for seed in (20, 21, 22)}


def line(text: str, start: str) -> str:
    (found,) = [x for x in text.splitlines() if x.startswith(start)]
    return found


def test_three_seeds_and_a_clear_winner(paths: Paths) -> None:
    measure(paths, of_seeds(good=0.8, poor=0.3))
    plant(paths, of_seeds(good=0.99, poor=0.7))
    text = say(paths)
    for direction in ("A→I", "I→A"):
        said = line(text, f"- good (mid) against poor (mid), audioset {direction} R@1: +")
        assert said.count(", by seed +") == 1
        assert said.count("+") == 6, "a difference, two ends and three seeds"
        assert said.endswith(": a real difference.")
    assert line(text, "- good against poor, nearest image: +29.0").endswith("a real difference.")
    assert "a real difference." in line(text, "- good against poor, nearest image of hard clips: +58.0")
    assert line(text, "- good: 99.0 % is at least 95 %, and so is its interval.")
    assert line(text, "- poor: 70.0 % is below 95 %, and so is its interval.")
    assert "| good | 3 | 99.0 ± 0.0 [" in text
    assert "| an image at random | – | 75.0 | 50.0 |" in text
    assert line(text, "- Told from noise: 4 of 4 comparisons.")


def test_the_words_turn_with_the_data(paths: Paths) -> None:
    measure(paths, of_seeds(good=0.3, poor=0.8))
    plant(paths, of_seeds(good=0.7, poor=0.99))
    text = say(paths)
    assert line(text, "- good (mid) against poor (mid), audioset A→I R@1: -").endswith(": a real loss.")
    assert line(text, "- good against poor, nearest image: -29.0").endswith(": a real loss.")
    measure(paths, of_seeds(good=0.5, poor=0.51))
    assert line(say(paths), "- good (mid) against poor (mid), audioset A→I").endswith(": within noise.")


def test_rows_are_compared_at_every_k_that_is_asked_for(paths: Paths) -> None:
    """What the tables say of both rows is what lies between them, at each k."""
    measure(paths, of_seeds(good=0.8, poor=0.3))
    text = say(paths, compare_at=[1, 5])
    rows = json.loads((paths.evaluations / "results.json").read_text())
    for direction, name in (("a2i", "A→I"), ("i2a", "I→A")):
        for k in (1, 5):
            means = [
                np.mean([r["metrics"][direction][f"R@{k}"] for r in rows if r["recipe"] == f"{row} (mid)"])
                for row in ("good", "poor")
            ]
            said = line(text, f"- good (mid) against poor (mid), audioset {name} R@{k}: ")
            assert f"R@{k}: {means[0] - means[1]:+.1f} [" in said
    assert " of 4 comparisons." in line(text, "- Told from noise: ")
    with pytest.raises(ValidationError, match=r"compare_at\.0\s.*greater than or equal to 1"):
        say(paths, compare_at=[0])


def test_a_seed_that_one_row_lacks_is_left_out(paths: Paths) -> None:
    runs = of_seeds(good=0.8, poor=0.3)
    del runs["poor", 21]
    measure(paths, runs)
    plant(paths, runs)
    text = say(paths)
    assert "| good (mid) | 3 |" in text
    assert "| poor (mid) | 2 |" in text
    for start in ("- good (mid) against poor (mid), audioset A→I", "- good against poor, nearest image:"):
        seeds = line(text, start).partition(" by seed ")[2].partition(", p =")[0].split(", ")
        assert len(seeds) == 2


def test_rows_of_other_seeds_are_compared_as_such(paths: Paths) -> None:
    measure(paths, {("good", 20): 0.8, ("poor", 21): 0.3, ("poor", 22): 0.3})
    assert "no seed in common (20 against 21, 22)," in line(say(paths), "- good (mid) against poor (mid), audioset A→I")


def test_one_seed_has_no_spread(paths: Paths) -> None:
    measure(paths, {("good", 20): 0.8, ("poor", 20): 0.3})
    plant(paths, {("good", 20): 0.99, ("poor", 20): 0.7})
    text = say(paths)
    assert "by seed" not in text
    assert "±" not in text.replace("mean ± sample standard deviation", "")
    assert line(text, "- good against poor, nearest image: +29.0").endswith("a real difference.")


def test_nothing_is_said_of_truth_where_none_is_planted(paths: Paths) -> None:
    measure(paths, of_seeds(good=0.8, poor=0.3))
    text = say(paths)
    for word in ("planted", "nearest image", "random", "endpoints"):
        assert word not in text.replace("broken at random", ""), word
    assert line(text, "- Told from noise: 2 of 2")
    assert "planted_image" not in json.loads((paths.report / "metrics.json").read_text())


def test_a_corpus_without_hard_clips(paths: Paths) -> None:
    measure(paths, of_seeds(good=0.8, poor=0.3))
    plant(paths, of_seeds(good=0.99, poor=0.7), hard=False)
    text = say(paths)
    assert line(text, "| good | 3 | 99.0").endswith("| – |")
    assert line(text, "- good against poor, nearest image")
    assert "of hard clips" not in text
    assert list(json.loads((paths.report / "metrics.json").read_text())["planted_image"]) == ["all"]


def test_a_recipe_that_chooses_nothing_is_named(paths: Paths) -> None:
    measure(paths, of_seeds(good=0.8, poor=0.3))
    plant(paths, of_seeds(good=0.99))
    text = say(paths, compare=[["good (mid)", "best (mid)"]], compare_planted=[["good", "multiframe"]])
    assert line(text, "- good (mid) against best (mid): not both measured on one gallery.")
    assert line(text, "- good against multiframe, nearest image: nothing was chosen by multiframe.")
    assert "Told from noise" not in text


def test_rows_below_chance_s_multiple_are_named(paths: Paths) -> None:
    measure(paths, of_seeds(good=0.9, poor=0.05))
    text = say(paths)
    assert line(
        text, "- 1 of 2 rows have an R@1 of at least 10 times chance in both directions; the lowest: poor (mid)"
    )
    assert line(text, "- NOT 10 times chance: poor (mid) on audioset ")


def test_no_runs_at_all(paths: Paths) -> None:
    measure(paths, {})
    text = say(paths)
    assert "No recipes were run" in text
    assert "against" not in text


def test_the_metrics_are_numbers(paths: Paths) -> None:
    measure(paths, of_seeds(good=0.8, poor=0.3))
    plant(paths, of_seeds(good=0.99, poor=0.7))
    say(paths)

    def leaves(node: Any) -> list[Any]:
        return [x for v in node.values() for x in leaves(v)] if isinstance(node, dict) else [node]

    told = json.loads((paths.report / "metrics.json").read_text())
    assert all(isinstance(x, float) for x in leaves(told))
    assert told["planted_image"]["all"] == {"good": 99.0, "poor": 70.0, "an image at random": 75.0}
    assert told["planted_image"]["hard"]["poor"] == 40.0
    assert told["image_times"]["endpoints"] == {"events": 91.5, "clips": 100.0, "images": 75.0, "pairs": 74.0}


def test_the_same_evaluation_gives_the_same_report(paths: Paths) -> None:
    measure(paths, of_seeds(good=0.6, poor=0.5))
    plant(paths, of_seeds(good=0.96, poor=0.95))
    assert say(paths) == say(paths)


def test_other_queries_under_one_passport_are_refused(paths: Paths) -> None:
    measure(paths, of_seeds(good=0.8, poor=0.3), others={"poor": [*IDS[:-1], "clip99"]})
    with pytest.raises(DataError, match=r"good \(mid\) and poor \(mid\) were asked other queries under one passport"):
        say(paths)


def test_nothing_was_evaluated(paths: Paths) -> None:
    with pytest.raises(DataError, match="Run `dvc repro evaluate` first"):
        say(paths)
