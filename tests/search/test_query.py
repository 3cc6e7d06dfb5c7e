"""Search is exact: it equals sorting all cosines, ties included, wherever a clip stands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harken.errors import ConfigError, DataError
from harken.search import query
from harken.search.index import build, load
from harken.search.query import Hit, search


def literal(embeddings: np.ndarray, text: np.ndarray, k: int) -> list[int]:
    unit = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32).astype(float)
    cosines = [float((row * (text / np.linalg.norm(text))).sum()) for row in unit]
    return sorted(range(len(unit)), key=lambda i: (-cosines[i], i))[:k]


def test_hits_carry_what_the_index_knows() -> None:
    meta = pa.table({"captions": [["rain"], ["a dog barks", "barking"]], "dataset": ["clotho", "audiocaps"]})
    index = build(["r", "d"], [[1.0, 0.0], [3.0, 4.0]], meta)
    (hit,) = search(index, [0.0, 2.0], k=1)
    assert hit.score == pytest.approx(0.8)
    assert hit == Hit(1, "d", hit.score, ("a dog barks", "barking"), {"dataset": "audiocaps"})
    assert search(build(["r"], [[1.0, 0.0]]), [1.0, 0.0]) == [Hit(1, "r", 1.0)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 70), st.booleans())
def test_equals_sorting_everything(seed: int, n: int, k: int, has_twins: bool) -> None:
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(n, 7))
    if has_twins:
        embeddings = embeddings[rng.integers(0, max(1, n // 4), n)]
    text = rng.normal(size=7)
    found = search(build([str(i) for i in range(n)], embeddings), text, k)
    assert [int(h.clip_id) for h in found] == literal(embeddings, text, k)
    assert [h.rank for h in found] == list(range(1, len(found) + 1))


def test_twins_score_the_same_wherever_they_stand() -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(1003, 512)).astype(np.float32)
    twins = [3, 500, 777, 1002]
    embeddings[twins] = embeddings[3]
    found = search(build([str(i) for i in range(1003)], embeddings), embeddings[3], 4)
    assert [int(h.clip_id) for h in found] == twins
    assert len({h.score for h in found}) == 1


def test_order_of_the_collection_does_not_change_a_score() -> None:
    rng = np.random.default_rng(1)
    embeddings, text, order = rng.normal(size=(300, 64)), rng.normal(size=64), rng.permutation(300)
    plain = search(build([str(i) for i in range(300)], embeddings), text, 20)
    shuffled = search(build([str(i) for i in order], embeddings[order]), text, 20)
    assert [(h.clip_id, h.score) for h in shuffled] == [(h.clip_id, h.score) for h in plain]


def test_differences_below_single_precision_are_seen() -> None:
    # the float32 pass cannot tell these cosines apart; float64 of the stored vectors can
    rng = np.random.default_rng(2)
    base = rng.normal(size=256)
    embeddings = base + 1e-4 * rng.normal(size=(500, 256))
    found = search(build([str(i) for i in range(500)], embeddings), base, 5)
    assert [int(h.clip_id) for h in found] == literal(embeddings, base, 5)


def test_blocks_and_memory_maps_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    index, text = build([str(i) for i in range(100)], rng.normal(size=(100, 16))), rng.normal(size=16)
    whole = search(index, text, 10)
    index.save(tmp_path)
    monkeypatch.setattr(query, "ROWS", 7)
    assert search(load(tmp_path), text, 10) == whole


def test_length_of_the_text_does_not_matter() -> None:
    index = build(["a", "b"], np.eye(2))
    assert search(index, [1e-3, 2e-3]) == search(index, [1.0, 2.0])


@pytest.mark.parametrize(
    ("text", "k", "error", "says"),
    [
        ([1.0, 0.0, 0.0], 1, ConfigError, r"\(3,\).*\(2,\)"),
        ([[1.0, 0.0]], 1, ConfigError, r"\(1, 2\)"),
        ([0.0, 0.0], 1, DataError, "no direction"),
        ([np.nan, 0.0], 1, DataError, "no direction"),
        ([1.0, 0.0], 0, ConfigError, "at least 1"),
        ([1.0, 0.0], True, ConfigError, "at least 1"),
    ],
)
def test_misuse_is_refused(text, k, error, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        search(build(["a", "b"], np.eye(2)), text, k)
