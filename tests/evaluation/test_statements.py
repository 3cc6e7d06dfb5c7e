"""The words follow from the numbers: turn the numbers round and the words turn round with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harken.evaluation.choices import Choices
from harken.evaluation.significance import Difference, Pooled, SeededDifference
from harken.evaluation.statements import (
    against_chance,
    comparisons,
    difference,
    held_against,
    image_times,
    nearest_image,
)


def pooled(mean: float, low: float, high: float, *seeds: int) -> Pooled:
    return Pooled(mean, 0.5 if len(seeds) > 1 else None, low, high, 0.95, seeds or (20,))


def seeded(mean: float, p: float, *by_seed: float) -> SeededDifference:
    seeds = tuple(range(20, 20 + len(by_seed)))
    told = Difference(mean, mean - 2, mean + 2, 0.95, p)
    return SeededDifference(told, dict(zip(seeds, by_seed, strict=True)), seeds or (20,), seeds or (21, 22))


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ((96.0, 95.2, 97.0), "96.0 % is at least 95 %, and so is its interval"),
        ((96.0, 94.9, 97.0), "96.0 % is at least 95 %, but its interval reaches below"),
        ((95.0, 95.0, 95.0), "95.0 % is at least 95 %, and so is its interval"),
        ((94.0, 92.0, 96.0), "94.0 % is below 95 %, but its interval reaches 95 %"),
        ((94.0, 93.0, 94.9), "94.0 % is below 95 %, and so is its interval"),
    ],
)
def test_a_bar_is_met_missed_or_in_doubt(found: tuple[float, float, float], says: str) -> None:
    assert held_against(pooled(*found), 95.0) == says


@pytest.mark.parametrize(
    ("mean", "p", "by_seed", "says"),
    [
        (5.0, 0.001, (4.0, 6.0), "a real difference"),
        (-5.0, 0.001, (-4.0, -6.0), "a real loss"),
        (5.0, 0.2, (4.0, 6.0), "within noise"),
        (5.0, 0.001, (12.0, -2.0, 5.0), "a real difference, but only in 2 of 3 seeds"),
        (-5.0, 0.001, (-15.0, 0.0), "a real loss, but only in 1 of 2 seeds"),
        (5.0, 0.001, (), "a real difference"),
    ],
)
def test_a_verdict_needs_the_test_and_the_seeds(mean: float, p: float, by_seed: tuple[float, ...], says: str) -> None:
    assert seeded(mean, p, *by_seed).verdict == says


def test_a_difference_tells_its_seeds() -> None:
    assert difference(seeded(5.0, 0.001, 4.0, 6.0)) == (
        "+5.0 [+3.0, +7.0], by seed +4.0, +6.0, p = 0.001: a real difference"
    )
    assert difference(seeded(-1.0, 0.4, -1.0)) == "-1.0 [-3.0, +1.0], p = 0.400: within noise"
    assert difference(seeded(-0.04, 1.0, -0.04)).startswith("+0.0 [-2.0, +2.0], p = 1.000")
    assert "p < 0.001: a real difference" in difference(seeded(5.0, 0.0001, 5.0))
    assert "no seed in common (20 against 21, 22)" in difference(seeded(5.0, 0.001))


def test_what_chance_alone_would_tell_apart_is_said() -> None:
    found: list[tuple[str, SeededDifference | None]] = [
        ("a against b", seeded(5.0, 0.001, 5.0)),
        ("a against c", seeded(0.5, 0.7, 0.5)),
        ("a against d: not both measured", None),
    ]
    lines = comparisons(found, 0.95)
    assert "- a against d: not both measured." in lines
    assert "- Told from noise: 1 of 2 comparisons. Were there no difference anywhere, about 0.1 would be." in lines
    assert not any("Told from noise" in line for line in comparisons(found[:1], 0.95))
    assert comparisons([], 0.95) == []


def test_rows_below_the_multiple_of_chance_are_named() -> None:
    lines = against_chance({"good": 12.0, "bad": 3.25, "even": 10.0}, 10.0)
    assert lines == [
        "- 2 of 3 rows have an R@1 of at least 10 times chance in both directions; the lowest: bad, 3.2 times.",
        "- NOT 10 times chance: bad 3.2.",
        "",
    ]
    assert against_chance({}, 10.0) == []


def choices(n: int, n_hard: int) -> Choices:
    is_hard = np.arange(n) < n_hard
    return Choices({"nearest": {20: np.full(n, 100.0)}}, np.where(is_hard, 50.0, 100.0), is_hard)


def test_the_nearest_image_is_a_table_and_a_verdict() -> None:
    told = {("nearest", "all"): pooled(96.0, 94.0, 97.0, 20, 21), ("nearest", "hard"): pooled(92.0, 90.0, 94.0, 20, 21)}
    text = "\n".join(nearest_image(choices(8, 4), told, 95.0))  # type: ignore[arg-type]
    assert "| recipe | seeds | all 8 | hard 4 |" in text
    assert "| nearest | 1 | 96.0 ± 0.5 [94.0, 97.0] | 92.0 ± 0.5 [90.0, 94.0] |" in text
    assert "| an image at random | – | 75.0 | 50.0 |" in text
    assert "- nearest: 96.0 % is at least 95 %, but its interval reaches below." in text


def test_without_hard_clips_their_column_is_empty() -> None:
    text = "\n".join(nearest_image(choices(8, 0), {("nearest", "all"): pooled(96.0, 95.5, 97.0)}, 95.0))
    assert "| nearest | 1 | 96.0 [95.5, 97.0] | – |" in text
    assert "| an image at random | – | 100.0 | – |" in text


def shares(**given: Any) -> dict[str, Any]:
    counts = {"n_clips": 5, "n_events": 9, "n_short": 2, "n_pairs": 20}
    percent = {"events": 90.0, "short": 50.0, "clips": 100.0, "images": 75.0, "pairs": 70.0}
    return counts | percent | given


def test_image_times_are_a_table_and_a_sentence() -> None:
    rules = {"endpoints": shares(), "centres": shares(events=100.0, short=100.0, images=85.0)}
    told = {"rule": "endpoints", "n_moved": 0, "most_s": 0.0, "segment_s": 2.5, "rules": rules, "taken": shares()}
    lines = image_times(told)
    assert "| `endpoints` (in use) | 90.0 | 50.0 | 100.0 | 75.0 | 70.0 |" in lines
    assert "| `centres` | 100.0 | 100.0 | 100.0 | 85.0 | 70.0 |" in lines
    assert (
        "- Against `centres`, `endpoints` catches 10.0 points fewer of the sounds and 50.0 points fewer of the short "
        "ones; it leaves as many clips to Nearest Match, 10.0 points fewer right images to VIP-ANT, as many right "
        "pairs to Multiframe Match."
    ) in lines
    assert not [line for line in lines if "as taken" in line]
    turned = image_times(told | {"rule": "centres"})
    assert "- Against `endpoints`, `centres` catches 10.0 points more of the sounds" in "\n".join(turned)
    assert [line.split("|")[1] for line in turned if line.startswith("| `")] == [
        " `centres` (in use) ",
        " `endpoints` ",
    ]


def test_what_does_not_exist_is_a_dash_and_what_moved_a_row() -> None:
    rules = {"endpoints": shares(n_short=0, short=None), "centres": shares(n_short=0, short=None)}
    told = {"rule": "centres", "n_moved": 3, "most_s": 0.05, "segment_s": 2.5, "rules": rules, "taken": shares()}
    text = "\n".join(image_times(told))
    assert "| `endpoints` | 90.0 | – | 100.0 | 75.0 | 70.0 |" in text
    assert "| `centres`, as taken | 90.0 | 50.0 |" in text
    assert "- In 3 clips an image was not taken when `centres` wants it, but up to 0.05 s away" in text
    assert "short ones;" not in text
