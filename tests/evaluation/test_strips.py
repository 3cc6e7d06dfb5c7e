"""What the picture shows is chosen by a rule, drawn where it belongs, and the same bytes every time."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from harken.errors import DataError
from harken.evaluation import strips
from harken.evaluation.grounding import GROUNDING
from harken.evaluation.strips import Panel, Strip, draw, panels


def row(clip_id: str, sentence: str, start_s: float = 2.0, **given: object) -> dict[str, object]:
    weights = [0.0, 0.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    return {
        "stage": "train", "recipe": "tap", "seed": 20, "dataset": "audiocaps", "clip_id": clip_id, "sentence": sentence,
        "start_s": start_s, "end_s": start_s + 2.0, "heard_s": 10.0, "onset_s": 2.0, "offset_s": 3.0, "peak_s": 2.5,
        "frame_s": 1.0, "iou": 0.5, "inside": 1.0, "is_inside": True, "weights": weights,
    } | given  # fmt: skip


def table(*found: dict[str, object]) -> pa.Table:
    return pa.Table.from_pylist(list(found), schema=GROUNDING)


def test_the_clips_with_the_most_sentences_then_the_first() -> None:
    found = table(
        row("d", "x"), row("c", "x"), row("c", "y"), row("b", "x"), row("b", "y"), row("a", "x"), row("e", "x", 1.0),
        row("e", "y", 5.0), row("e", "z", 3.0),
    )  # fmt: skip
    assert [p.clip_id for p in panels(found)] == ["e", "b", "c", "a", "d"]
    assert [p.clip_id for p in panels(found, 2)] == ["e", "b"]
    assert [s.sentence for s in panels(found, 1)[0].strips["tap, seed 20"]] == ["x", "z", "y"]  # as they sound


def test_every_recipe_is_shown_by_its_lowest_seed() -> None:
    found = table(
        row("a", "x", seed=21), row("a", "x", weights=[1.0]), row("a", "x", recipe="xpool", seed=7),
        row("b", "x"), row("b", "y"), row("c", "x"), row("c", "y", 5.0), row("c", "x", recipe="xpool", seed=7),
        row("a", "x", dataset="clotho", recipe="other"),
    )  # fmt: skip
    (only,) = panels(found)
    assert only.clip_id == "a"  # b was not heard by both, and the end of c by one only
    assert list(only.strips) == ["tap, seed 20", "xpool, seed 7"]
    assert only.strips["tap, seed 20"] == (Strip("x", 2.0, 4.0, 1.0, (1.0,)),)


def test_what_was_found_does_not_choose() -> None:
    worse = [row(c, s, inside=0.0, iou=0.0, is_inside=False) for c in "ab" for s in "xy"]
    better = [row(c, s) for c in "cd" for s in "xy"]
    assert [p.clip_id for p in panels(table(*better, *worse), 2)] == ["a", "b"]


def test_nothing_to_show() -> None:
    assert panels(GROUNDING.empty_table()) == []
    with pytest.raises(DataError, match="no clip to draw"):
        draw([], io.BytesIO())


SHOWN = [
    Panel("yt:a$b:0-10000", 10.0, {
        "tap, seed 20": (Strip("a dog barks", 2.0, 4.0, 1.0, (0.0, 0.0, 4.0, 2.0, *[0.0] * 6)),
                         Strip("a bell rings", 6.0, 9.0, 1.0, (*[0.0] * 6, 0.1, 0.1, 0.1, 0.0))),
        "xpool, seed 20": (Strip("a dog barks", 2.0, 4.0, 0.5, (1.0,) * 24),
                           Strip("a bell rings", 6.0, 9.0, 0.5, (1.0,))),
    }),
    Panel("yt:_c:0-4000", 4.0, {
        "tap, seed 20": (Strip("rain falls", 0.0, 4.0, 1.0, (1.0,) * 4),),
        "xpool, seed 20": (Strip("rain falls", 0.0, 4.0, 0.5, (1.0,) * 8),),
    }),
]  # fmt: skip


def test_the_picture_is_the_same_bytes() -> None:
    first, again = io.BytesIO(), io.BytesIO()
    draw(SHOWN, first)
    draw(SHOWN, again)
    assert first.getvalue() == again.getvalue()
    assert b"Software" not in first.getvalue()
    height, width = imread(io.BytesIO(first.getvalue())).shape[:2]
    assert width == 1100
    assert 250 < height < 500


def test_strips_brackets_and_words_are_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(strips, "Figure", lambda *a, **k: drawn.append(Figure(*a, **k)) or drawn[-1])
    draw(SHOWN, io.BytesIO())
    (figure,) = drawn
    left, right, short, _ = figure.axes[:4]
    assert [t.get_text() for t in left.get_yticklabels()] == ["a dog barks", "a bell rings"]
    assert not right.get_yticklabels()
    assert left.get_title(loc="left") == "yt:a$b:0-10000"
    assert left.texts[0].get_text() == "tap, seed 20"
    assert right.texts[0].get_text() == "xpool, seed 20"
    first, second = left.collections
    assert first.get_array().ravel().tolist() == [0, 0, 1, 0.5, 0, 0, 0, 0, 0, 0]  # each over its own largest
    assert second.get_array().max() == 1.0
    assert first.get_clim() == (0.0, 1.0)
    assert right.collections[0].get_array().size == 20  # two frames short of the strip: those after the clip's end
    for line, (a, b) in zip(left.lines, ((2.0, 4.0), (6.0, 9.0)), strict=True):
        assert np.unique(line.get_xdata()).tolist() == [a, b]
    assert left.get_xlim() == short.get_xlim() == (0.0, 10.0)
    assert left.get_ylim()[0] > left.get_ylim()[1]  # the first sentence on top
