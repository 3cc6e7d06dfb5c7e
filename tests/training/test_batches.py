"""Batches are a function of (seed, epoch), and a clip's rows are its own whatever the batch."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from harken.errors import ConfigError, DataError
from harken.shards import ShardWriter
from harken.training.batches import Features, Order

LENGTHS = {"a": 3, "b": 0, "c": 7, "d": 5}


def value(clip: str) -> np.ndarray:
    return np.random.default_rng(ord(clip)).normal(size=(LENGTHS[clip], 4)).astype(np.float16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard, clips in enumerate(("ab", "cd")):
        with ShardWriter(tmp_path, shard, fingerprint="f", columns={}, arrays={"fbank": (4, "float16")}) as out:
            for clip in clips:
                out.write(clip, fbank=value(clip))
            out.skip(f"failed{shard}", "qc.silent")
    return tmp_path


def test_rows_are_cut_or_padded_with_raw_zeros(folder: Path) -> None:
    features = Features(folder, "fbank")
    values, valid = features.read(["c", "a", "b"], 5)
    assert (values.shape, valid.shape, values.dtype) == ((3, 5, 4), (3, 5), torch.float32)
    assert valid.sum(1).tolist() == [5, 3, 0]
    assert torch.equal(values[0], torch.from_numpy(value("c")[:5]).float())
    assert torch.equal(values[1, :3], torch.from_numpy(value("a")).float())
    assert not values[~valid].any()


def test_a_clip_reads_the_same_in_any_batch(folder: Path) -> None:
    features = Features(folder, "fbank")
    alone, _ = features.read(["d"], 6)
    for ids in (["d", "a"], ["a", "c", "d"], ["d", "d"]):
        values, _ = features.read(ids, 6)
        assert torch.equal(values[ids.index("d")], alone[0])


def test_what_failed_is_absent(folder: Path) -> None:
    features = Features(folder, "fbank")
    assert "a" in features
    assert "failed0" not in features
    assert features.rows("c") == 7
    with pytest.raises(DataError, match="failed0 has no fbank features; it failed in an earlier stage"):
        features.read(["a", "failed0"], 4)


def test_a_folder_of_failures_alone_says_so(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0, fingerprint="f", columns={}, arrays={"fbank": (4, "float16")}) as out:
        out.skip("a", "qc.silent")
    with pytest.raises(DataError, match="every clip failed; `harken status` says why"):
        Features(tmp_path, "fbank")


@pytest.fixture
def few_files() -> Iterator[int]:
    """A soft limit that leaves room for a handful of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = max(int(p.name) for p in Path("/dev/fd").iterdir()) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
    yield room
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_the_usual_limit_on_open_files(tmp_path: Path, few_files: int) -> None:
    for shard in range(few_files):
        with ShardWriter(tmp_path, shard, fingerprint="f", columns={}, arrays={"fbank": (1, "float16")}) as out:
            out.write(f"c{shard}", fbank=np.full((1, 1), shard))
    values, _ = Features(tmp_path, "fbank").read([f"c{s}" for s in range(few_files)], 1)
    assert values.flatten().tolist() == list(range(few_files))


def test_a_machine_that_allows_too_few_open_files_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 100))
    with pytest.raises(ConfigError, match=r"2 shards are read at once and this machine allows 100 open files"):
        Features(folder, "fbank")


@pytest.mark.parametrize(("n", "batch", "drop_last"), [(10, 3, False), (10, 3, True), (9, 3, False), (2, 5, False)])
def test_an_epoch_is_every_item_once(n: int, batch: int, drop_last: bool) -> None:
    order = Order(n, batch, 7, drop_last)
    batches = list(order.epoch(0))
    assert len(batches) == order.steps_per_epoch
    seen = np.concatenate(batches)
    assert len(set(seen.tolist())) == len(seen) == (n - n % batch if drop_last else n)
    assert all(len(b) == batch for b in batches[:-1])


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    order = Order(20, 4, 7)
    first = np.concatenate(list(order.epoch(0)))
    assert np.array_equal(np.concatenate(list(Order(20, 4, 7).epoch(0))), first)
    assert not np.array_equal(np.concatenate(list(order.epoch(1))), first)
    assert not np.array_equal(np.concatenate(list(Order(20, 4, 8).epoch(0))), first)


def test_a_resume_sees_the_batches_that_are_left() -> None:
    order = Order(20, 4, 7)
    whole = list(order.epoch(3))
    for step in range(6):
        assert all(map(np.array_equal, order.epoch(3, step), whole[step:]))


@pytest.mark.parametrize(("n", "drop_last"), [(0, False), (3, True)])
def test_too_few_clips_say_what_to_do(n: int, drop_last: bool) -> None:
    with pytest.raises(DataError, match=r"do not fill a batch of 4\. Lower the batch"):
        Order(n, 4, 0, drop_last)
