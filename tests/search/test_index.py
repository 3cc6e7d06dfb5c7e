"""An index comes back as it was saved, and half of one is not an index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from harken.errors import ConfigError, DataError
from harken.search.index import build, load, verify

IDS = ["yt:a", "yt:b", "zen:c"]
META = pa.table({"captions": [["a dog barks"], [], ["rain", "rain falls"]], "start_s": [0.0, 30.0, 0.0]})


def test_rows_have_length_one_whatever_came_in() -> None:
    index = build(IDS, np.array([[3, 4], [-2, 0], [300, 300]], np.float16), META)
    np.testing.assert_allclose(index.embeddings, [[0.6, 0.8], [-1, 0], [0.5**0.5] * 2], atol=1e-6)
    assert index.embeddings.dtype == np.float32
    assert (len(index), index.dim) == (3, 2)
    assert index.clips.column_names == ["clip_id", "captions", "start_s"]


def test_saved_and_loaded(tmp_path: Path) -> None:
    index = build(IDS, np.random.default_rng(0).normal(size=(3, 8)), META)
    index.save(tmp_path / "deep" / "index")
    again = load(tmp_path / "deep" / "index")
    assert again.clips.equals(index.clips)
    np.testing.assert_array_equal(again.embeddings, index.embeddings)
    assert sorted(p.name for p in (tmp_path / "deep" / "index").iterdir()) == [
        "clips.parquet",
        "embeddings.npy",
        "index.json",
    ]
    verify(tmp_path / "deep" / "index")


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        build(IDS, np.eye(3), META).save(tmp_path)
        contents.append({p.name: p.read_bytes() for p in tmp_path.iterdir()})
    assert contents[0] == contents[1]


def test_an_index_can_be_saved_over_the_one_it_was_read_from(tmp_path: Path) -> None:
    build(IDS, np.eye(3), META).save(tmp_path)
    load(tmp_path).save(tmp_path)
    verify(tmp_path)
    assert load(tmp_path).embeddings.tolist() == np.eye(3).tolist()


def test_half_an_index_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no index here"):
        load(tmp_path)
    build(IDS, np.eye(3)).save(tmp_path)
    (tmp_path / "embeddings.npy").unlink()
    with pytest.raises(DataError, match=r"embeddings\.npy missing"):
        load(tmp_path)


def test_files_of_another_index_are_noticed(tmp_path: Path) -> None:
    build(IDS, np.eye(3)).save(tmp_path / "a")
    build(IDS[:2], np.eye(3)[:2]).save(tmp_path / "b")
    (tmp_path / "b" / "embeddings.npy").replace(tmp_path / "a" / "embeddings.npy")
    with pytest.raises(DataError, match="3 clips of 3 numbers"):
        load(tmp_path / "a")


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    build(IDS, np.eye(3)).save(tmp_path)
    path = tmp_path / "embeddings.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="changed since"):
        verify(tmp_path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    build(IDS, np.eye(3)).save(tmp_path)
    (tmp_path / "index.json").write_text('{"format": 9}')
    with pytest.raises(DataError, match="format 9"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("ids", "embeddings", "meta", "error", "says"),
    [
        (IDS, np.eye(2), None, ConfigError, "3 clips"),
        ([], np.zeros((0, 2)), None, ConfigError, "at least one"),
        (IDS, np.ones(3), None, ConfigError, "clip, dim"),
        (["a", "b", "a"], np.eye(3), None, ConfigError, "clip a is given more than once"),
        (IDS, np.diag([1, 0, 1]), None, DataError, "yt:b is zero"),
        (IDS, np.diag([1, 1, np.inf]), None, DataError, "zen:c is zero or not finite"),
        (IDS, np.eye(3), META.slice(1), ConfigError, "2 rows for 3"),
        (IDS, np.eye(3), pa.table({"clip_id": IDS[::-1]}), ConfigError, "same order"),
    ],
)
def test_misuse_is_refused(ids, embeddings, meta, error, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        build(ids, embeddings, meta)
