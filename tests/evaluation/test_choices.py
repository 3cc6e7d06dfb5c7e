"""Runs of one recipe are pooled, runs of other clips refused, the hard clips told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pytest

from harken.errors import DataError
from harken.evaluation.choices import Choices

CLIPS = ("a", "b", "c", "d")
SHARE = {"a": 1.0, "b": 0.5, "c": 0.25, "d": 0.75}


def table(runs: Mapping[tuple[str, int], Sequence[bool]], clips: Sequence[str] = CLIPS) -> pa.Table:
    rows = [
        {"recipe": r, "seed": s, "clip_id": c, "is_right": f, "share_right": SHARE[c], "is_hard": SHARE[c] < 1}
        for (r, s), flags in runs.items()
        for c, f in zip(clips, flags, strict=True)
    ]
    schema = pa.schema(
        [("recipe", pa.string()), ("seed", pa.int64()), ("clip_id", pa.string()), ("is_right", pa.bool_()),
         ("share_right", pa.float64()), ("is_hard", pa.bool_())]
    )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schema)


RUNS = {
    ("nearest", 21): (True, True, True, False),
    ("nearest", 20): (True, False, True, True),
    ("vip", 20): (True,) * 4,
}


def test_runs_are_kept_by_recipe_and_seed() -> None:
    found = Choices.of(table(RUNS))
    assert found is not None
    assert list(found.recipes) == ["nearest", "vip"]
    assert {s: v.tolist() for s, v in found.runs("nearest", "all").items()} == {
        20: [100, 0, 100, 100],
        21: [100, 100, 100, 0],
    }
    assert found.by_chance("all") == pytest.approx(62.5)


def test_the_hard_clips_are_those_with_a_wrong_image() -> None:
    found = Choices.of(table(RUNS))
    assert found is not None
    assert (found.count("all"), found.count("hard")) == (4, 3)
    assert found.runs("nearest", "hard")[20].tolist() == [0, 100, 100]
    assert found.by_chance("hard") == pytest.approx(50.0)


def test_a_corpus_without_hard_clips() -> None:
    found = Choices.of(table({("nearest", 20): (True,)}, ["a"]))
    assert found is not None
    assert (found.count("hard"), found.by_chance("hard")) == (0, None)
    assert found.runs("nearest", "hard")[20].shape == (0,)


def test_the_order_of_rows_changes_nothing() -> None:
    shuffled = table(RUNS).take(np.random.default_rng(0).permutation(12))
    found = Choices.of(shuffled)
    assert found is not None
    assert found.runs("nearest", "all")[21].tolist() == [100, 100, 100, 0]
    assert found.random.tolist() == [100, 50, 25, 75]


def test_nothing_chosen_is_none() -> None:
    assert Choices.of(table({})) is None


@pytest.mark.parametrize("clips", [["a", "b", "c"], ["a", "b", "c", "c"]])
def test_runs_of_other_clips_are_refused(clips: list[str]) -> None:
    both = pa.concat_tables([table({("nearest", 20): (True,) * 4}), table({("vip", 20): (True,) * len(clips)}, clips)])
    with pytest.raises(DataError, match=f"vip-20 has {len(clips)} clips, the first run 4"):
        Choices.of(both)
