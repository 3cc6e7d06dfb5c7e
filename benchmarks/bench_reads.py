"""Shuffled reads of training features: 1000 x 128 float16 (256 kB) a clip, in batches of 32, each into one buffer.

harken (raw arrays, `preadv` into reused buffers, read ahead by 1 or 2 threads) against numpy's memmap of the same
files and against Parquet, one row group a clip: fixed_size_binary and fixed_size_list<halffloat>. Wall time: it is the
disk that is waited for. Contestants take turns; medians.

Hot: every file in the page cache, put there either by reading it from end to end, or by reading clips at random (the
kernel then keeps 4 kB pages instead of larger ones, and copies them more slowly). Cold: before every pass all files
are dropped with posix_fadvise(DONTNEED); mincore says what is left. The disk's own rate is measured in the same rounds
on the same files: bare `preadv` of 256,000 bytes at random places, by 1 and by 2 threads, with the kernel's read-ahead
off, so that nothing is read that nobody asked for.

    python benchmarks/bench_reads.py [--clips 4000] [--folder DIR]
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import interleaved
from harken.shards import ShardWriter
from harken.training.batches import Features, Order, ShardOrder
from harken.training.loader import Loader

ROWS, WIDTH, BATCH, PER_SHARD = 1000, 128, 32, 500
CLIP_BYTES = ROWS * WIDTH * 2
CPU = torch.device("cpu")
ROUNDS = 5
COLD_ROUNDS = 3
EPOCH = itertools.count()

Read = Callable[[], int]
"""Reads clips and returns how many."""


def clip(i: int, base: np.ndarray) -> np.ndarray:
    found = base.copy()
    found[0, 0] = i % 2048  # exact in float16
    return found


def make(folder: Path, n: int) -> None:
    """The same clips thrice: harken's shards, Parquet of binaries, Parquet of lists."""
    base = np.random.default_rng(0).normal(-4, 4, (ROWS, WIDTH)).astype(np.float16)
    kinds = {"binary": pa.binary(CLIP_BYTES), "list": pa.list_(pa.float16(), ROWS * WIDTH)}
    for name in kinds:
        (folder / name).mkdir()
    for shard, first in enumerate(range(0, n, PER_SHARD)):
        writers = {
            name: pq.ParquetWriter(
                folder / name / f"{shard:05d}.parquet",
                pa.schema([("x", kind)]),
                compression="none",
                use_dictionary=False,
                write_statistics=False,
            )
            for name, kind in kinds.items()
        }
        arrays = {"fbank": (WIDTH, "float16")}
        with ShardWriter(folder / "npy", shard, fingerprint="bench", columns={}, arrays=arrays) as out:
            for i in range(first, min(first + PER_SHARD, n)):
                values = clip(i, base)
                out.write(f"c{i}", fbank=values)
                binary = pa.array([values.tobytes()], kinds["binary"])
                lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), ROWS * WIDTH)
                writers["binary"].write_table(pa.table({"x": binary}))
                writers["list"].write_table(pa.table({"x": lists}))
        for writer in writers.values():
            writer.close()


def ours(loader: Loader, widen: bool) -> int:
    total = 0
    with closing(loader.epoch(next(EPOCH))) as batches:
        for items, clips, _ in batches:
            values = clips.on(CPU) if widen else clips.values
            assert values[:, 0, 0].tolist() == [i % 2048 for i in items]
            total += len(items)
    return total


def into_one_buffer(n: int, limit: int, of: Callable[[int], np.ndarray]) -> int:
    """Batches of a shuffled epoch, at most `limit` clips of it, each clip copied into its place."""
    buffer, total = np.empty((BATCH, ROWS, WIDTH), np.float16), 0
    for items in Order(n, BATCH, 0).epoch(next(EPOCH)):
        for place, i in zip(buffer, items.tolist(), strict=False):
            place[:] = of(i)
        assert buffer[: len(items), 0, 0].tolist() == [i % 2048 for i in items]
        total += len(items)
        if total >= limit:
            break
    return total


def memmap(folder: Path, n: int) -> int:
    # mapped anew each time: the kernel drops no page that is mapped
    arrays = [np.load(p, mmap_mode="r") for p in sorted((folder / "npy").glob("*.npy"))]
    return into_one_buffer(n, n, lambda i: arrays[i // PER_SHARD][i % PER_SHARD * ROWS : (i % PER_SHARD + 1) * ROWS])


def parquet(files: list[pq.ParquetFile], n: int, limit: int) -> int:
    def of(i: int) -> np.ndarray:
        column = files[i // PER_SHARD].read_row_group(i % PER_SHARD, use_threads=False).column(0).chunk(0)
        if pa.types.is_fixed_size_list(column.type):
            return column.values.to_numpy().reshape(ROWS, WIDTH)
        return np.frombuffer(column.buffers()[1], np.float16, ROWS * WIDTH).reshape(ROWS, WIDTH)

    return into_one_buffer(n, limit, of)


def bare(folder: Path, n: int, threads: int) -> int:
    """What the disk gives: as many blocks as there are clips, at random places, no two the same."""
    files = [os.open(p, os.O_RDONLY) for p in sorted((folder / "npy").glob("*.npy"))]
    for fd in files:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    at = np.random.default_rng(next(EPOCH)).permutation(n)

    def read(part: np.ndarray) -> int:
        block = [bytearray(CLIP_BYTES)]
        return sum(os.preadv(files[i // PER_SHARD], block, i % PER_SHARD * CLIP_BYTES) for i in part.tolist())

    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, np.array_split(at, threads)))
    for fd in files:
        os.close(fd)
    return total // CLIP_BYTES


def paths(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def resident(path: Path) -> float:
    """The share of a file that is in the page cache, by mincore."""
    size = path.stat().st_size
    with open(path, "rb") as f, mmap.mmap(f.fileno(), size, prot=mmap.PROT_READ) as mapped:
        start = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        where = (ctypes.c_void_p(start.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data))
        failed = ctypes.CDLL(None, use_errno=True).mincore(*where)
        del start
    if failed:
        raise SystemExit(f"mincore: {os.strerror(ctypes.get_errno())}")
    return float((pages & 1).mean())


def drop(folder: Path) -> float:
    """Drop all files from the page cache; the largest share of any that stayed."""
    for path in paths(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    return max(map(resident, paths(folder)))


def read_through(folder: Path) -> None:
    for path in paths(folder):
        with open(path, "rb") as f:
            while f.read(1 << 20):
                pass


def disk_bytes() -> int:
    """What this process has had read from storage so far, read-ahead and all."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


class Rate(NamedTuple):
    """Clips a second of wall time and of CPU time, and bytes from the disk per byte asked for."""

    wall: float
    cpu: float
    disk: float


def rates(contestants: Mapping[str, Read], rounds: int, before: Callable[[], object]) -> dict[str, Rate]:
    """Medians of the contestants, who take turns; `before` runs before each pass."""
    found: dict[str, list[Rate]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, read in contestants.items():
            before()
            had, cpu, began = disk_bytes(), time.process_time(), time.perf_counter()
            n = read()
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
            found[name].append(Rate(n / wall, n / cpu, (disk_bytes() - had) / (n * CLIP_BYTES)))
    return {name: Rate(*map(statistics.median, zip(*passes, strict=True))) for name, passes in found.items()}


def show(found: Mapping[str, Rate]) -> None:
    peer = found["numpy memmap"]
    for name, rate in found.items():
        ratio = f"{rate.wall / peer.wall:5.2f} x memmap"
        print(f"  {name:<40} {rate.wall:8,.0f} clips/s  {ratio}   {rate.cpu:8,.0f} a CPU second")


def hot(folder: Path, n: int, peers: Mapping[str, Read], mine: Mapping[str, Read], widened: Read) -> None:
    print("hot, files read from end to end beforehand")
    read_through(folder)
    everyone = {**mine, "harken, 2 readers, then float32 on CPU": widened, **peers}
    show(rates(everyone, ROUNDS, lambda: None))
    kept = min(map(resident, paths(folder)))
    print(f"  in the page cache after it: at least {100 * kept:.0f} % of every file")
    print("hot, clips read at random beforehand")
    drop(folder)
    bare(folder, n, 1)
    again = {**mine, "numpy memmap": peers["numpy memmap"]}
    show(rates(again, ROUNDS, lambda: None))


def cold(folder: Path, n: int, peers: Mapping[str, Read], mine: Mapping[str, Read]) -> None:
    left: list[float] = []
    disk: dict[str, Read] = {f"bare preadv, {k} thread(s)": partial(bare, folder, n, k) for k in (1, 2)}
    found = rates({**disk, **mine, **peers}, COLD_ROUNDS, lambda: left.append(drop(folder)))
    print(f"cold; in the page cache before a pass: {100 * max(left):.1f} % of a file at most")
    if max(left) > 0.01:
        print("  this system does not drop files: no cold figures. Try --folder on a disk.")
        return
    for name, rate in found.items():
        one, two = (100 * rate.wall / found[d].wall for d in disk)
        shares = f"{one:4.0f} % of bare 1  {two:4.0f} % of bare 2"
        print(f"  {name:<40} {rate.wall:8,.0f} clips/s  {shares}   {rate.disk:.2f} bytes from the disk per byte")


def contestants(folder: Path, n: int) -> tuple[dict[str, Read], dict[str, Read], Read]:
    features = Features(folder / "npy", "fbank")
    ids = [f"c{i}" for i in range(n)]

    def loader(order: Order | ShardOrder, readers: int) -> Loader:
        return Loader(order, features, ids, ROWS, CPU, readers=readers)

    whole, parts = Order(n, BATCH, 0), ShardOrder(features.shards(np.arange(n)), 2, BATCH, 0)
    mine: dict[str, Read] = {
        "harken, 1 reader": partial(ours, loader(whole, 1), False),
        "harken, 2 readers": partial(ours, loader(whole, 2), False),
        "harken, 2 readers, by 2 shards": partial(ours, loader(parts, 2), False),
    }
    binaries, lists = ([pq.ParquetFile(p) for p in sorted((folder / k).glob("*"))] for k in ("binary", "list"))
    peers: dict[str, Read] = {
        "numpy memmap": partial(memmap, folder, n),
        "Parquet fixed_size_binary": partial(parquet, binaries, n, min(n, 1024)),
        "Parquet fixed_size_list<halffloat>": partial(parquet, lists, n, min(n, 1024)),
    }
    return mine, peers, partial(ours, loader(whole, 2), True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4000)
    parser.add_argument("--folder", type=Path, help="where the files are made, so which disk is measured")
    chosen = parser.parse_args()
    n = chosen.clips
    torch.set_num_threads(1)  # the readers' cores are not for widening
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        make(folder, n)
        print(f"{n:,} clips of {ROWS}x{WIDTH} float16 ({n * CLIP_BYTES / 1e9:.2f} GB) in shards of {PER_SHARD}")
        print(
            f"{interleaved.machine().rpartition(', one thread')[0]}, wall time, medians of {ROUNDS} and {COLD_ROUNDS}"
        )
        mine, peers, widened = contestants(folder, n)
        hot(folder, n, peers, mine, widened)
        cold(folder, n, peers, mine)


if __name__ == "__main__":
    main()
