"""Batches are a function of (seed, epoch, step), and a clip's rows are its own whatever the batch and its buffer."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harken.errors import ConfigError, DataError
from harken.shards import DenseArray, ShardWriter
from harken.training.batches import Features, Order, ShardOrder

CPU = torch.device("cpu")

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


def test_memory_that_is_used_again_shows_nothing_of_what_it_held(folder: Path) -> None:
    features = Features(folder, "fbank")
    room = features.room(3, 5, CPU)
    assert room.array.dtype == np.float16
    where = room.array.ctypes.data
    for ids in (["c", "d", "c"], ["b", "a"], ["a", "b", "c"], ["d"]):
        room.array[len(ids) :] = np.nan  # what lies beyond a smaller batch is nobody's
        clips = features.fill(room, features.numbers(ids))
        values, valid = features.read(ids, 5)
        assert clips.values.data_ptr() == where
        assert clips.values.dtype == torch.float16
        assert torch.equal(clips.on(CPU), values)
        assert torch.equal(clips.valid_on(CPU), valid)


def test_what_is_given_out_is_not_the_buffer(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0, fingerprint="f", columns={}, arrays={"fbank": (4, "float32")}) as out:
        out.write("a", fbank=np.ones((3, 4)))
    features = Features(tmp_path, "fbank")
    clips = features.fill(features.room(1, 3, CPU), features.numbers(["a"]))
    clips.on(CPU).zero_()  # stored as float32, so nothing had to be widened
    assert bool((clips.values == 1).all())


def test_more_clips_than_there_is_room_for_are_refused(folder: Path) -> None:
    features = Features(folder, "fbank")
    with pytest.raises(ValueError, match="longer"):
        features.fill(features.room(1, 5, CPU), features.numbers(["a", "c"]))


class Disk:
    """The system calls, noted by clip (its first byte); clips that are not `cached` make who will not wait fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cached: Sequence[int] | None = None, error: int = errno.EAGAIN):
        self.calls: list[tuple[str, int]] = []
        self.cached, self.error, self.at_most = cached, error, 1 << 20
        self._preadv, self._advise = os.preadv, os.posix_fadvise
        monkeypatch.setattr(os, "preadv", self.preadv)
        monkeypatch.setattr(os, "posix_fadvise", self.advise)

    def preadv(self, fd: int, buffers: Sequence[memoryview], at: int, flags: int = 0) -> int:
        self.calls.append(("read" if not flags else "try", at))
        if flags and self.cached is not None and at not in self.cached:
            raise OSError(self.error, os.strerror(self.error))
        return self._preadv(fd, [buffers[0][: self.at_most]], at)

    def advise(self, fd: int, at: int, n: int, advice: int) -> None:
        self.calls.append(("hint", at))
        self._advise(fd, at, n, advice)


HEADER = 128
A, C, D = HEADER, HEADER, HEADER + 7 * 8  # where a lies in its file, c and d in theirs


def test_what_is_in_memory_costs_a_call_a_clip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(folder, "fbank")
    features.read(["c", "a", "d"], 6)  # in memory from now on
    disk = Disk(monkeypatch)
    features.read(["c", "a", "b", "d"], 6)  # b has no rows
    assert disk.calls == [("try", C), ("try", A), ("try", D)]


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EOPNOTSUPP])
def test_the_kernel_is_told_of_a_batch_s_rest_before_it_is_waited_for(
    folder: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = Features(folder, "fbank")
    expected = features.read(["c", "d", "a"], 6)[0]
    disk = Disk(monkeypatch, [C], error)
    assert torch.equal(features.read(["c", "d", "a"], 6)[0], expected)
    assert disk.calls == [("try", C), ("try", D), ("hint", D), ("hint", A), ("read", D), ("read", A)]


def test_a_clip_of_which_the_beginning_is_in_memory_is_read_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = Features(folder, "fbank")
    expected = features.read(["c"], 6)[0]
    disk = Disk(monkeypatch, [C])
    disk.at_most = 16
    assert torch.equal(features.read(["c"], 6)[0], expected)
    assert disk.calls[:4] == [("try", C), ("try", C + 16), ("hint", C), ("read", C)]


def test_long_hints_are_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = DenseArray(folder, 1, "fbank")
    monkeypatch.setattr(DenseArray, "HINT_BYTES", 40)
    disk = Disk(monkeypatch)
    array.expect(0, 12)
    assert disk.calls == [("hint", HEADER + at) for at in (0, 40, 80)]


def test_an_error_of_the_disk_is_no_miss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(folder, "fbank")
    Disk(monkeypatch, [], errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        features.read(["c"], 6)


@pytest.mark.parametrize("lacking", ["posix_fadvise", "RWF_NOWAIT"])
def test_a_system_that_lacks_such_calls(folder: Path, lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(folder, "fbank")
    expected = features.read(["c", "a"], 6)[0]
    disk = Disk(monkeypatch, [])
    monkeypatch.delattr(os, lacking)
    assert torch.equal(features.read(["c", "a"], 6)[0], expected)
    assert {c for c, _ in disk.calls} == {"read", "hint" if lacking == "RWF_NOWAIT" else "try"}


def test_a_disk_that_gives_a_little_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(folder, "fbank")
    expected = features.read(["c", "a", "d"], 6)[0]
    Disk(monkeypatch).at_most = 7
    assert torch.equal(features.read(["c", "a", "d"], 6)[0], expected)


def test_an_array_that_is_cut_short_is_named(folder: Path) -> None:
    features = Features(folder, "fbank")
    path = folder / "00001.fbank.npy"
    os.truncate(path, path.stat().st_size - 1)
    assert features.read(["c"], 7)[0].shape == (1, 7, 4)
    with pytest.raises(DataError, match=r"00001\.fbank\.npy: ends before row 12. Delete it and run its stage again"):
        features.read(["c", "d"], 7)


@pytest.mark.parametrize("size", [0, 5, 70])
def test_an_array_without_a_whole_header_is_named(folder: Path, size: int) -> None:
    os.truncate(folder / "00001.fbank.npy", size)
    with pytest.raises(DataError, match=r"00001\.fbank\.npy: not a whole \.npy file .* Delete it and run its stage"):
        Features(folder, "fbank")


def test_stretches_are_what_is_wanted_in_the_disk_s_order(folder: Path) -> None:
    features = Features(folder, "fbank")

    def found(ids: Sequence[str], at_most: int) -> list[tuple[str, int, int]]:
        stretches = features.stretches(features.numbers(ids), at_most)
        return [(array.path.name[:5], start, rows) for array, start, rows in stretches]

    assert found("dcab", 1 << 20) == [("00000", 0, 3), ("00001", 0, 12)]  # neighbours are one
    assert found("da", 1 << 20) == [("00000", 0, 3), ("00001", 7, 5)]
    assert found("c", 4 * 8) == [("00001", 0, 4), ("00001", 4, 3)]
    assert found("c", 1) == [("00001", i, 1) for i in range(7)]
    assert found("", 1) == []


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


def by_shard(n: int, batch: int, seed: int = 7, drop_last: bool = False, at_once: int = 2) -> ShardOrder:
    return ShardOrder(np.arange(n) % 5, at_once, batch, seed, drop_last)


BOTH = pytest.mark.parametrize("make", [Order, by_shard])
Make = Callable[..., Order | ShardOrder]


@BOTH
@pytest.mark.parametrize(("n", "batch", "drop_last"), [(10, 3, False), (10, 3, True), (9, 3, False), (2, 5, False)])
def test_an_epoch_is_every_item_once(make: Make, n: int, batch: int, drop_last: bool) -> None:
    order = make(n, batch, 7, drop_last)
    batches = list(order.epoch(0))
    assert len(batches) == order.steps_per_epoch
    seen = np.concatenate(batches)
    assert len(set(seen.tolist())) == len(seen) == (n - n % batch if drop_last else n)
    assert all(len(b) == batch for b in batches[:-1])


@BOTH
def test_an_epoch_is_a_function_of_seed_and_number(make: Make) -> None:
    order = make(20, 4, 7)
    first = np.concatenate(list(order.epoch(0)))
    assert np.array_equal(np.concatenate(list(make(20, 4, 7).epoch(0))), first)
    assert not np.array_equal(np.concatenate(list(order.epoch(1))), first)
    assert not np.array_equal(np.concatenate(list(make(20, 4, 8).epoch(0))), first)


@BOTH
def test_a_resume_sees_the_batches_that_are_left(make: Make) -> None:
    order = make(20, 4, 7)
    whole = list(order.epoch(3))
    for step in range(6):
        assert all(map(np.array_equal, order.epoch(3, step), whole[step:]))
        assert len(list(order.epoch(3, step))) == len(whole[step:])


@pytest.mark.parametrize(
    ("order", "digest"),
    [
        (Order(1000, 32, 20), "db7edf9f5f3b73da"),
        (ShardOrder(np.arange(1000) % 13, 3, 32, 20), "863767664ebe0148"),
    ],
)
def test_the_order_is_the_same_in_every_process_and_release(order: Order | ShardOrder, digest: str) -> None:
    found = hashlib.sha256()
    for epoch in (0, 3):
        for items in order.epoch(epoch):
            found.update(items.astype("<i8").tobytes())
    assert found.hexdigest()[:16] == digest, "results that were published can no longer be had again"


@BOTH
@pytest.mark.parametrize(("n", "drop_last"), [(0, False), (3, True)])
def test_too_few_clips_say_what_to_do(make: Make, n: int, drop_last: bool) -> None:
    with pytest.raises(DataError, match=rf"{n} training clips do not fill a batch of 4\. Lower the batch"):
        make(n, 4, 0, drop_last)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Order(9, 4, 0, rank=2, world=2), r"rank 2 of 2 processes: expected 0 to 1"),
        (lambda: Order(9, 5, 0, rank=0, world=2), r"batch of 5 cannot be shared by 2 processes: make it a multiple"),
        (lambda: Order(9, 8, 0, rank=0, world=2), r"last of 9 clips in batches of 8 are too few for 2 processes"),
        (lambda: ShardOrder(np.arange(9), 0, 4, 0), r"0 shards at once: expected 1 or more"),
        (lambda: ShardOrder(np.arange(9), 1, 4, 0, world=2), r"2 processes .* need whole batches: drop the last"),
        (lambda: ShardOrder(np.arange(9), 1, 4, 0, True, 4, 4), r"rank 4 of 4 processes: expected 0 to 3"),
    ],
)
def test_what_several_processes_cannot_share_says_why(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_more_processes_than_shards_are_refused() -> None:
    with pytest.raises(DataError, match="do not fill a batch"):
        ShardOrder(np.zeros(90, np.int64), 1, 4, 0, True, 1, 2)


sizes = st.integers(1, 40)
some = st.integers(0, 3)


@given(n=sizes, share=st.integers(1, 8), world=st.integers(1, 4), seed=some, epoch=some, drop_last=st.booleans())
def test_processes_share_each_batch_that_one_alone_would_see(
    n: int, share: int, world: int, seed: int, epoch: int, drop_last: bool
) -> None:
    batch = share * world
    if (drop_last and n < batch) or (not drop_last and 0 < n % batch < world):
        return
    whole = list(Order(n, batch, seed, drop_last).epoch(epoch))
    ranks = [Order(n, batch, seed, drop_last, rank, world) for rank in range(world)]
    assert {r.steps_per_epoch for r in ranks} == {len(whole)}
    for items, *parts in zip(whole, *(r.epoch(epoch) for r in ranks), strict=True):
        assert np.array_equal(np.concatenate(parts), items)  # so they are disjoint: no item comes twice
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for first in range(len(whole) + 1):
        assert all(map(np.array_equal, ranks[-1].epoch(epoch, first), list(ranks[-1].epoch(epoch))[first:]))


@given(n=sizes, share=st.integers(1, 8), world=st.integers(1, 4), drop_last=st.booleans())
def test_a_part_says_where_its_clips_lie_in_the_batch(n: int, share: int, world: int, drop_last: bool) -> None:
    batch = share * world
    if (drop_last and n < batch) or (not drop_last and 0 < n % batch < world):
        return
    for step, items in enumerate(Order(n, batch, 3, drop_last).epoch(1)):
        for rank in range(world):
            order = Order(n, batch, 3, drop_last, rank, world)
            own = next(order.epoch(1, step))
            first, of = order.part(step)
            assert of == len(items)
            assert np.array_equal(own, items[first : first + len(own)])


@st.composite
def shard_orders(draw: st.DrawFn) -> list[ShardOrder]:
    """One order for each of a few processes that together hold a corpus."""
    world, share = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    shards = np.array(draw(st.lists(st.integers(0, 8), min_size=1, max_size=60)))
    owned = [np.isin(shards, np.unique(shards)[r::world]).sum() for r in range(world)]
    drop_last = world > 1 or draw(st.booleans())
    if min(owned) < (share if drop_last else 1):
        shards, share, drop_last = np.repeat(np.arange(world), 5), 2, True
    settings = (shards, draw(st.integers(1, 4)), share * world, draw(some), drop_last)
    return [ShardOrder(*settings, rank, world) for rank in range(world)]


@given(shard_orders(), some)
def test_an_order_by_shards_sees_each_clip_once_and_each_shard_in_one_go(orders: list[ShardOrder], epoch: int) -> None:
    assert len({o.steps_per_epoch for o in orders}) == 1
    seen: list[int] = []
    for rank, order in enumerate(orders):
        own = set(np.unique(order.shards)[rank :: len(orders)].tolist())
        groups = order.groups(epoch)
        in_groups = [set(order.shards[g].tolist()) for g in groups]
        assert sum(map(len, in_groups)) == len(set().union(*in_groups)), "a shard is read in two groups"
        assert set().union(*in_groups) == own
        assert all(1 <= len(g) <= order.at_once for g in in_groups)
        batches = list(order.epoch(epoch))
        assert len(batches) == order.steps_per_epoch
        flat = np.concatenate(batches).tolist()
        assert flat == np.concatenate(groups).tolist()[: len(flat)]
        assert len(flat) > sum(map(len, groups)) - order.batch or len(orders) > 1
        assert order.drop_last or len(flat) == len(order.shards)
        for first in range(len(batches) + 1):
            assert all(map(np.array_equal, order.epoch(epoch, first), batches[first:]))
        seen += flat
    assert len(set(seen)) == len(seen), "two processes see one clip"


@given(shard_orders(), some)
def test_parts_of_an_order_by_shards_lie_side_by_side(orders: list[ShardOrder], epoch: int) -> None:
    for step in range(orders[0].steps_per_epoch):
        sizes = [len(next(o.epoch(epoch, step))) for o in orders]
        parts = [o.part(step) for o in orders]
        assert {p.of for p in parts} == {sum(sizes)}
        assert [p.first for p in parts] == [sum(sizes[:rank]) for rank in range(len(orders))]


@given(shard_orders(), some, st.data())
def test_each_group_is_fetched_once_before_it_is_reached_and_no_earlier(
    orders: list[ShardOrder], epoch: int, data: st.DataObject
) -> None:
    order = orders[-1]
    first = data.draw(st.integers(0, order.steps_per_epoch - 1))
    groups = [g.tolist() for g in order.groups(epoch)]
    group_of = {item: i for i, g in enumerate(groups) for item in g}
    fetched: list[int] = []
    steps = zip(order.epoch(epoch, first), order.upcoming(epoch, first), strict=True)
    for items, wanted in steps:
        reached = [group_of[i] for i in items.tolist()]
        fetched += [groups.index(g.tolist()) for g in wanted]
        assert fetched, "a resume waits for what nobody fetches"
        assert fetched == list(range(fetched[0], fetched[-1] + 1))
        assert set(reached) <= set(fetched)
        assert fetched[-1] == min(max(reached) + 1, len(groups) - 1)
    assert fetched[0] == group_of[next(iter(order.epoch(epoch, first)))[0]]


def test_an_order_by_shards_is_a_whole_shuffle_where_all_fit_at_once() -> None:
    (group,) = ShardOrder(np.arange(20) % 5, 5, 4, 7).groups(0)
    assert sorted(group.tolist()) == list(range(20))
    assert group.tolist() != sorted(group.tolist())


# -------------------------------------------------------------------------------------------- epochs of captions


def owners(counts: Sequence[int]) -> np.ndarray:
    """(caption,): the clip of each where clip i has so many, as Captions.clip_of."""
    return np.repeat(np.arange(len(counts)), counts)


def of_captions(counts: Sequence[int], batch: int, seed: int = 7, **options: Any) -> Order:
    clips = owners(counts)
    return Order(len(clips), batch, seed, clips=clips, **options)


def can_be(counts: Sequence[int], batch: int) -> bool:
    """Whether captions can lie in batches without a clip twice (Gale and Ryser 1957)."""
    full, rest = divmod(sum(counts), batch)
    sizes, most = [batch] * full + [rest] * (rest > 0), sorted(counts, reverse=True)
    return all(sum(most[:k]) <= sum(min(s, k) for s in sizes) for k in range(1, len(most) + 1))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=9), st.data(), some, some, st.booleans())
def test_an_epoch_of_captions_has_each_once_and_no_clip_twice_in_a_batch(
    counts: list[int], data: st.DataObject, seed: int, epoch: int, drop_last: bool
) -> None:
    batch = data.draw(st.integers(1, len(counts)))
    order = of_captions(counts, batch, seed, drop_last=drop_last)
    if not can_be(counts, batch):
        with pytest.raises(ConfigError, match=rf"No order of these captions has batches of {batch} without a clip"):
            list(order.epoch(epoch))
        return
    batches = list(order.epoch(epoch))
    n = sum(counts)
    assert [len(b) for b in batches] == [batch] * (n // batch) + [n % batch] * (not drop_last and n % batch > 0)
    assert len(batches) == order.steps_per_epoch
    seen = np.concatenate(batches)
    assert len(set(seen.tolist())) == len(seen)
    assert set(seen.tolist()) <= set(range(n))
    clips = owners(counts)
    assert all(len(set(clips[b].tolist())) == len(b) for b in batches)
    for first in range(len(batches) + 1):
        left = list(order.epoch(epoch, first))
        assert len(left) == len(batches) - first
        assert all(map(np.array_equal, left, batches[first:]))


@pytest.mark.parametrize(("counts", "batch"), [([2, 1, 3, 1], 3), ([7, 6, 5, 1], 3), ([1, 2, 3, 2, 1, 4, 3, 2, 1], 6)])
def test_what_can_be_is_found_in_every_epoch(counts: list[int], batch: int) -> None:
    """An order that is found in most epochs only would end a run in its middle."""
    order = of_captions(counts, batch)
    for epoch in range(300):
        found = np.concatenate(list(order.epoch(epoch)))
        assert sorted(found.tolist()) == list(range(sum(counts)))


def test_an_epoch_of_captions_is_a_function_of_seed_and_number() -> None:
    counts = [5, 3, 1, 5, 4, 2, 5, 5]
    order = of_captions(counts, 4)
    first = np.concatenate(list(order.epoch(0)))
    assert np.array_equal(np.concatenate(list(of_captions(counts, 4).epoch(0))), first)
    assert not np.array_equal(np.concatenate(list(order.epoch(1))), first)
    assert not np.array_equal(np.concatenate(list(of_captions(counts, 4, 8).epoch(0))), first)


def test_the_order_of_captions_is_the_same_in_every_process_and_release() -> None:
    found = hashlib.sha256()
    for counts, batch in (([5] * 200, 32), ([1, 2, 3, 2, 1, 4, 3, 2, 1], 6)):
        for epoch in (0, 3):
            for items in of_captions(counts, batch, 20).epoch(epoch):
                found.update(items.astype("<i8").tobytes())
    assert found.hexdigest()[:16] == "1afdf5c943823db9", "results that were published can no longer be had again"


def test_a_clip_s_captions_lie_evenly_over_the_epoch() -> None:
    order, clips = of_captions([5] * 60, 12), owners([5] * 60)
    for epoch in range(3):
        laps = np.concatenate(list(order.epoch(epoch))).reshape(5, 60)
        assert all(sorted(clips[lap].tolist()) == list(range(60)) for lap in laps)
        companions = [tuple(sorted(clips[b].tolist())) for b in order.epoch(epoch)]
        assert len(set(companions)) == len(companions)


def test_which_caption_comes_first_is_chance() -> None:
    firsts = []
    for epoch in range(600):
        seen = np.concatenate(list(of_captions([3, 3, 3], 3).epoch(epoch)))
        firsts.append(int(seen[seen < 3][0]))
    assert (abs(np.bincount(firsts, minlength=3) - 200) < 50).all()


def test_processes_share_each_batch_of_captions() -> None:
    counts = [5, 3, 1, 5, 4, 2, 5, 5]
    whole = list(of_captions(counts, 4, drop_last=True).epoch(2))
    parts = [list(of_captions(counts, 4, drop_last=True, rank=r, world=2).epoch(2)) for r in range(2)]
    assert all(np.array_equal(np.concatenate(p), w) for w, *p in zip(whole, *parts, strict=True))


def test_more_captions_of_different_clips_than_there_are_clips_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Batches of 4 captions of different clips need as many clips, found 3\."):
        of_captions([5, 5, 5], 4)


def test_the_longest_clips_and_those_that_are_long_enough(folder: Path) -> None:
    features = Features(folder, "fbank")
    assert (features.all, features.most_rows) == ({"a", "b", "c", "d"}, 7)
    assert features.at_least(0) == features.all
    assert features.at_least(5) == {"c", "d"}
    assert features.at_least(6) == {"c"}
    assert features.at_least(8) == frozenset()
