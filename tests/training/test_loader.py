"""Reading ahead changes when a batch is read, and nothing else: not what is in it, not who sees an error, no thread."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harken.errors import DataError
from harken.shards import DenseArray, ShardWriter
from harken.training.batches import Clips, Features, Order, ShardOrder
from harken.training.loader import Batch, Loader, one_pass, read_ahead
from harken.training.tasks import AugmentConfig, FbankInput

CPU = torch.device("cpu")
N, BATCH, ROWS = 42, 4, 6
IDS = [f"c{i}" for i in range(N)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    for shard in range(7):
        with ShardWriter(folder, shard, fingerprint="f", columns={}, arrays={"fbank": (3, "float16")}) as out:
            for i in range(shard, N, 7):
                out.write(IDS[i], fbank=rng.normal(size=(int(rng.integers(0, 9)), 3)))
    return folder


@pytest.fixture
def features(folder: Path) -> Features:
    return Features(folder, "fbank")


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("harken-")]


@pytest.fixture(autouse=True)
def nobody_stays() -> Iterator[None]:
    yield
    assert not threads()


def order(features: Features, kind: str) -> Order | ShardOrder:
    return Order(N, BATCH, 5) if kind == "whole" else ShardOrder(features.shards(features.numbers(IDS)), 2, BATCH, 5)


def seen(loader: Loader, epoch: int, first: int = 0) -> list[tuple[list[int], Tensor, Tensor]]:
    """What a training that is at each batch for a while would see."""
    found = []
    with contextlib.closing(loader.epoch(epoch, first)) as batches:
        for items, clips, _ in batches:
            time.sleep(0.0005)
            found.append((items.tolist(), clips.on(CPU), clips.valid_on(CPU)))
    return found


def same(a: list[tuple[list[int], Tensor, Tensor]], b: list[tuple[list[int], Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x[0] == y[0] and torch.equal(x[1], y[1]) and torch.equal(x[2], y[2]) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("kind", ["whole", "by shards"])
@pytest.mark.parametrize(("ahead", "readers"), [(0, 1), (1, 1), (3, 1), (1, 2), (3, 2), (30, 4)])
def test_batches_are_the_order_s_whoever_reads_them_and_how_early(
    features: Features, kind: str, ahead: int, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = order(features, kind)
    coming = [items for epoch in (0, 1) for items in which.epoch(epoch)]
    expected = [(items.tolist(), *features.read([IDS[i] for i in items], ROWS)) for items in coming]
    fill, rng = Features.fill, random.Random(0)

    def at_times_slow(self: Features, clips: Clips, numbers: np.ndarray) -> Clips:
        time.sleep(rng.choice([0, 0, 0.003]))
        return fill(self, clips, numbers)

    monkeypatch.setattr(Features, "fill", at_times_slow)
    loader = Loader(which, features, IDS, ROWS, CPU, ahead, readers)
    assert same(seen(loader, 0) + seen(loader, 1), expected)
    assert same(seen(loader, 1, 4), expected[which.steps_per_epoch :][4:])
    assert seen(loader, 1, which.steps_per_epoch) == []


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


@pytest.fixture
def batches(features: Features) -> list[np.ndarray]:
    """The batches of an epoch, as numbers of `features`."""
    numbers = features.numbers(IDS)
    return [numbers[items] for items in Order(N, BATCH, 5).epoch(0)]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_the_next_few_are_filled_while_one_is_held(
    features: Features, batches: list[np.ndarray], ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[int] = []
    fill = Features.fill

    def noting(self: Features, clips: Clips, numbers: np.ndarray) -> Clips:
        fill(self, clips, numbers)
        filled.append(clips.array.ctypes.data)
        return clips

    monkeypatch.setattr(Features, "fill", noting)
    with read_ahead(features, batches, ROWS, CPU, ahead=ahead) as read:
        for step, clips in enumerate(read):
            due = min(step + 1 + ahead, len(batches))
            wait_until(lambda: len(filled) == due)  # noqa: B023 (called at once)
            assert np.array_equal(clips.numbers, batches[step]), "a batch that was held has changed"
            by_itself = fill(features, features.room(BATCH, ROWS, CPU), batches[step])
            assert torch.equal(clips.values, by_itself.values), "a batch that was held has changed"
            time.sleep(0.001)
            assert len(filled) == due, "more was read than there is room for"
    assert len(set(filled)) == ahead + 1


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("at", [0, 2, 10])
def test_an_error_comes_where_its_batch_would_have(
    folder: Path, features: Features, batches: list[np.ndarray], ahead: int, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = Features.fill

    def failing(self: Features, clips: Clips, numbers: np.ndarray) -> Clips:
        if np.array_equal(numbers, batches[at]):
            raise DataError("00003.fbank.npy: ends before row 12")
        return fill(self, clips, numbers)

    monkeypatch.setattr(Features, "fill", failing)
    taken: list[Clips] = []

    def go_through() -> None:
        with read_ahead(features, batches, ROWS, CPU, ahead=ahead) as read:
            for clips in read:
                taken.append(clips)
                time.sleep(0.001)  # the reader has long met the error

    with pytest.raises(DataError, match="ends before row 12"):
        go_through()
    assert len(taken) == at
    assert not threads()


def test_a_shard_that_was_cut_short_is_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0, fingerprint="f", columns={}, arrays={"fbank": (3, "float16")}) as out:
        for i in range(4):
            out.write(IDS[i], fbank=np.ones((5, 3)))
    features = Features(tmp_path, "fbank")
    os.truncate(tmp_path / "00000.fbank.npy", (tmp_path / "00000.fbank.npy").stat().st_size - 7)
    with pytest.raises(DataError, match=r"00000\.fbank\.npy: ends before row 20"):
        seen(Loader(Order(4, 1, 0), features, IDS[:4], ROWS, CPU), 0)


@pytest.mark.parametrize("kind", ["whole", "by shards"])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_whoever_leaves_early_leaves_no_thread_behind(features: Features, kind: str, taken: int) -> None:
    batches = Loader(order(features, kind), features, IDS, ROWS, CPU).epoch(0)
    for _ in range(taken):
        next(batches)
    batches.close()
    assert not threads()
    with contextlib.suppress(ZeroDivisionError), read_ahead(features, [np.arange(4)] * 9, ROWS, CPU) as read:
        next(read)
        raise ZeroDivisionError
    assert not threads()


def test_a_clip_without_features_is_named_before_anything_is_read(features: Features) -> None:
    loader = Loader(Order(N, BATCH, 5), features, [*IDS[:-1], "lost"], ROWS, CPU)
    with pytest.raises(DataError, match="lost has no fbank features; it failed in an earlier stage"):
        next(loader.epoch(0))


@pytest.mark.parametrize("first", [0, 5])
def test_groups_of_shards_are_fetched_from_end_to_end(
    features: Features, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, int, int]] = []
    expect = DenseArray.expect

    def noting(self: DenseArray, start: int, n_rows: int) -> None:
        if threading.current_thread().name.startswith("harken-fetcher"):
            fetched.append((self.path.name, start, n_rows))
        expect(self, start, n_rows)

    monkeypatch.setattr(DenseArray, "expect", noting)
    which = order(features, "by shards")
    assert isinstance(which, ShardOrder)
    seen(Loader(which, features, IDS, ROWS, CPU), 0, first)
    groups = which.groups(0)
    behind = np.searchsorted(np.cumsum([len(g) for g in groups]), first * BATCH, "right")
    shards = [sorted(np.unique(which.shards[g]).tolist()) for g in groups[behind:]]
    # a whole shard in one request, ascending within its group
    assert [name for name, _, _ in fetched] == [f"{s:05d}.fbank.npy" for group in shards for s in group]
    assert all((start, n) == (0, features._arrays[int(name[:5])].shape[0]) for name, start, n in fetched)
    fetched.clear()
    seen(Loader(order(features, "whole"), features, IDS, ROWS, CPU), 0)
    assert not fetched


def test_one_pass_keeps_the_order_it_is_given(features: Features) -> None:
    ids = IDS[::-1][:10]
    with one_pass(features, ids, 4, ROWS, CPU) as batches:
        found = [clips.on(CPU) for clips in batches]
    assert [len(f) for f in found] == [4, 4, 2]
    assert torch.equal(torch.cat(found), features.read(ids, ROWS)[0])
    with one_pass(features, [], 4, ROWS, CPU) as batches:
        assert list(batches) == []


def test_fbank_is_normalised_with_its_padding(features: Features) -> None:
    read = FbankInput(features, ROWS, -4.0, 2.5, None, CPU)
    raw, valid = features.read(IDS[:5], ROWS)
    with read.one_pass(IDS[:5], 5) as batches:
        found = read(next(batches), None)
    assert torch.equal(found, (raw + 4.0) / 2.5)
    assert bool((found[~valid] == 4.0 / 2.5).all())


def test_augmentation_is_the_generator_s_and_leaves_the_buffer_alone(features: Features) -> None:
    augment = AugmentConfig(freq_mask=2, time_mask=3, roll=True, gain_db=3.0)
    read = FbankInput(features, ROWS, 0.5, 2.0, augment, CPU)
    with read.one_pass(IDS[:5], 5) as batches:
        clips = next(batches)
        stored = clips.values.clone()
        one, again, other = (read(clips, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
        assert torch.equal(clips.values, stored)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.gpu
def test_a_gpu_is_fed_from_page_locked_memory(features: Features) -> None:
    gpu = torch.device("cuda")
    loader = Loader(Order(N, BATCH, 5), features, IDS, ROWS, gpu)
    expected = seen(Loader(Order(N, BATCH, 5), features, IDS, ROWS, CPU), 0)
    found: list[Any] = []
    with contextlib.closing(loader.epoch(0)) as batches:
        for items, clips, _ in batches:
            assert clips.values.is_pinned()
            torch.cuda._sleep(10_000_000)  # the copy waits in the stream while the buffer is given back
            found.append((items.tolist(), clips.on(gpu), clips.valid_on(gpu)))
    assert same([(items, values.cpu(), valid.cpu()) for items, values, valid in found], expected)


def test_a_batch_is_its_items_and_their_clips(features: Features) -> None:
    loader = Loader(order(features, "whole"), features, IDS, ROWS, CPU)
    with contextlib.closing(loader.epoch(0)) as batches:
        for batch in batches:
            assert isinstance(batch, Batch)
            assert np.array_equal(batch.clips.numbers, features.numbers([IDS[i] for i in batch.items]))
            assert batch.part == (0, len(batch.items))


@pytest.mark.parametrize("first", [0, 9])
def test_of_several_processes_each_reads_its_part_and_knows_which_it_is(features: Features, first: int) -> None:
    whole = list(Order(N, BATCH, 5).epoch(1, first))
    for rank in (0, 1):
        loader = Loader(Order(N, BATCH, 5, rank=rank, world=2), features, IDS, ROWS, CPU)
        with contextlib.closing(loader.epoch(1, first)) as batches:
            for items, clips, (begin, of) in batches:
                batch = whole.pop(0) if rank else whole[0]
                whole = whole if rank else [*whole[1:], batch]
                assert of == len(batch)
                assert np.array_equal(items, batch[begin : begin + len(items)])
                assert torch.equal(clips.on(CPU), features.read([IDS[i] for i in items], ROWS)[0])
    assert not whole, "a batch was not seen"
