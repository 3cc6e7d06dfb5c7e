"""Runs become rows; galleries are never mixed; the spread is the sample standard deviation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from harken.errors import DataError
from harken.evaluation.tables import as_json, markdown, summarise


def run(recipe: str, seed: int, t2a: float, a2t: float, **fields: Any) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "seed": seed,
        "dataset": "audiocaps",
        "split": "test",
        "n_clips": 957,
        "passport": "audiocaps test 957/975 ids:aa captions:bb",
        "metrics": {"t2a": {"R@1": t2a, "R@10": 80.0}, "a2t": {"R@1": a2t, "R@10": 81.0}},
        **fields,
    }


THREE = [run("tap", s, v, 40.0 + s) for s, v in enumerate([36.0, 36.2, 36.4])]


def test_mean_and_sample_standard_deviation_over_seeds() -> None:
    (gallery,) = summarise(reversed(THREE))
    (row,) = gallery["rows"]
    assert row["seeds"] == [0, 1, 2]
    assert row["metrics"]["t2a"]["R@1"] == {"mean": pytest.approx(36.2), "std": pytest.approx(0.2), "interval": None}
    assert row["metrics"]["a2t"]["R@1"]["std"] == pytest.approx(1.0)


def test_one_seed_has_no_spread() -> None:
    assert summarise(THREE[:1])[0]["rows"][0]["metrics"]["t2a"]["R@1"]["std"] is None
    assert "±" not in markdown(THREE[:1])


def test_markdown() -> None:
    results = [
        *THREE,
        run("mean", 0, 32.6, 41.5, intervals={"t2a": {"R@1": [30.9, 34.3]}}),
    ]
    assert markdown(results).splitlines() == [
        "### audiocaps test, N = 957",
        "",
        "`audiocaps test 957/975 ids:aa captions:bb`",
        "",
        "| recipe | seeds | T→A R@1 | T→A R@10 | A→T R@1 | A→T R@10 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| tap | 3 | **36.2** ± 0.2 | **80.0** ± 0.0 | 41.0 ± 1.0 | **81.0** ± 0.0 |",
        "| mean | 1 | 32.6 [30.9, 34.3] | **80.0** | **41.5** | **81.0** |",
    ]


def test_galleries_are_never_mixed() -> None:
    other = [run("tap", 0, 38.0, 43.0, n_clips=845, passport="audiocaps test 845/975 ids:cc captions:dd")]
    holes = [run("tap", 0, 37.0, 42.0, passport="audiocaps test 957/975 ids:ee captions:ff")]
    found = summarise([*THREE, *other, *holes])
    assert [g["n_clips"] for g in found] == [957, 845, 957]
    assert markdown([*THREE, *other, *holes]).count("###") == 3


def test_interval_of_seeds_is_their_mean_and_needs_all_of_them() -> None:
    runs = [run("tap", s, 36.0, 40.0, intervals={"t2a": {"R@1": [34.0 + s, 38.0 + s]}}) for s in range(2)]
    assert summarise(runs)[0]["rows"][0]["metrics"]["t2a"]["R@1"]["interval"] == [34.5, 38.5]
    del runs[1]["intervals"]
    assert summarise(runs)[0]["rows"][0]["metrics"]["t2a"]["R@1"]["interval"] is None


def test_a_metric_that_a_recipe_lacks_is_a_dash() -> None:
    image = run("multiframe", 0, 0, 0) | {"metrics": {"i2a": {"R@1": 17.6}, "a2i": {"R@1": 15.8}}}
    lines = markdown([*THREE, image]).splitlines()
    assert lines[4] == "| recipe | seeds | T→A R@1 | T→A R@10 | A→T R@1 | A→T R@10 | I→A R@1 | A→I R@1 |"
    assert lines[-1].startswith("| multiframe | 1 | – | – | – | – | **17.6** |")


def test_lower_ranks_are_better() -> None:
    runs = [run(n, 0, 1, 1) | {"metrics": {"t2a": {"median_rank": r}}} for n, r in (("a", 3.0), ("b", 2.0))]
    assert "| b | 1 | **2.0** |" in markdown(runs, metrics=["median_rank"])


def test_json_holds_the_same_numbers() -> None:
    assert json.loads(as_json(THREE)) == summarise(THREE)
    assert as_json(THREE) == as_json(reversed(THREE))


@pytest.mark.parametrize(
    ("results", "says"),
    [
        ([{"recipe": "tap"}], "lacks seed"),
        ([THREE[0], THREE[0]], "seed 0 comes twice"),
        ([THREE[0], THREE[1] | {"metrics": {"t2a": {"R@1": 1.0}}}], "different metrics"),
    ],
)
def test_results_that_do_not_add_up_are_refused(results: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        summarise(results)


def test_a_transductive_row_is_never_the_best() -> None:
    def result(recipe: str, value: float) -> dict[str, Any]:
        about = {"seed": 0, "dataset": "d", "split": "test", "n_clips": 3, "passport": "p"}
        return {"recipe": recipe, **about, "metrics": {"t2a": {"R@1": value}}}

    said = markdown([result("a", 50.0), result("b", 40.0), result("a (transductive)", 60.0)], ["R@1"])
    assert "| a | 1 | **50.0** |" in said
    assert "| a (transductive) | 1 | 60.0 |" in said
