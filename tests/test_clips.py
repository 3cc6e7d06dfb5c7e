"""Ids, shards and the manifest."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harken.clips import SCHEMA, Clip, Manifest, Source, Split, shard_of, youtube_id, zenodo_id
from harken.errors import DataError


def clip(key: str, dataset: str = "audioset", split: Split = Split.TRAIN, **changes: object) -> Clip:
    values: dict[str, object] = {"source": Source("youtube", key), "start_s": 30.0, "end_s": 40.0}
    values |= {"id": youtube_id(key, 30.0, 40.0), "captions": (), "labels": ("/m/09x0r",)}
    return Clip(dataset=dataset, split=split, **(values | changes))  # type: ignore[arg-type]


def some_clips() -> list[Clip]:
    caps = ("a dog barks", "barking, then a bell")
    archive, name = "clotho_audio_development", " a, b&amp;c.wav"
    sound = Clip(
        zenodo_id("4783391", archive, name), "clotho", Split.VAL, Source("zenodo", name, archive), 0.0, None, caps
    )
    return [
        clip("aaaaaaaaaaa"),
        clip("-_bbbbbbbbb", split=Split.TEST),
        clip("aaaaaaaaaaa", "audiocaps", captions=caps, labels=()),
        sound,
    ]


def test_ids_are_of_the_recording_and_the_times_alone() -> None:
    assert youtube_id("dQw4w9WgXcQ", 30.0, 40.0) == "yt:dQw4w9WgXcQ:30000-40000"
    assert youtube_id("dQw4w9WgXcQ", 0.1 + 0.2, 8.35) == "yt:dQw4w9WgXcQ:300-8350"  # floats are no keys
    found = zenodo_id("4783391", "clotho_audio_development", "a b.wav")
    assert found == "zen:4783391/clotho_audio_development/68a4536a5c33417f26311a6b878897d815dfcc12"
    assert found != zenodo_id("4783391", "clotho_audio_development", "a  b.wav")


@pytest.mark.parametrize(
    ("source", "shard"),
    [(Source("youtube", "dQw4w9WgXcQ"), 1174), (Source("zenodo", "a b.wav", "clotho_audio_evaluation"), 3056)],
)
def test_a_recording_stays_in_its_shard_for_ever(source: Source, shard: int) -> None:
    assert shard_of(source, 4096) == shard


@settings(max_examples=100)
@given(st.text(min_size=1), st.integers(1, 5000))
def test_shards_are_in_range(key: str, n_shards: int) -> None:
    assert 0 <= shard_of(Source("youtube", key), n_shards) < n_shards


def test_shards_fill_evenly() -> None:
    counts = [0] * 8
    for i in range(8000):
        counts[shard_of(Source("youtube", f"{i:011d}"), 8)] += 1
    assert max(counts) < 1.15 * min(counts)


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    clips = some_clips()
    built = Manifest.build(clips, 16)
    pq.write_table(built.table, tmp_path / "clips.parquet")
    back = Manifest.read(tmp_path)
    assert back.table.schema.equals(SCHEMA)
    assert (len(back), back.n_shards) == (4, 16)
    assert back.splits() == [("audioset", "train"), ("audioset", "test"), ("audiocaps", "train"), ("clotho", "val")]
    found = [c for dataset, split in back.splits() for c in back.clips(dataset, split)]
    assert found == clips
    assert back.shards == sorted({shard_of(c.source, 16) for c in clips})


def test_the_order_of_the_rows_moves_no_clip() -> None:
    clips = some_clips()
    a, b = Manifest.build(clips, 7), Manifest.build(reversed(clips), 7)
    assert [a.requested(s) for s in range(7)] == [b.requested(s) for s in range(7)]


def test_a_clip_of_two_datasets_is_fetched_once() -> None:
    clips = some_clips()
    manifest = Manifest.build(clips, 1)
    asked = manifest.requested(0)
    assert [c.id for c in asked] == sorted({c.id for c in clips})
    assert {c.id: c.dataset for c in asked}[clips[0].id] == "audiocaps+audioset"
    assert {c.id: c.end_s for c in asked}[clips[3].id] is None
    assert not any(c.captions or c.labels for c in asked)


def test_a_missing_manifest_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dvc repro catalog"):
        Manifest.read(tmp_path)
