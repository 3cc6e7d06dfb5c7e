"""What a fan-out costs per shard: 4,096 shards of no work on two workers, harken's engines against the bare ones.

`local` against concurrent.futures' ProcessPoolExecutor, `dask` against distributed's own LocalCluster and
`client.submit`, `ray` (where it is installed) against a pool of bare actors. The bare ones are given all shards at
once; harken bounds what is out, makes the heavy object once a worker and redoes what a dead worker was at.

Wall time, from the first result to the last, over the number of shards; the start until the first result is a column
of its own. CPU time is of this process and of all workers, start and end included. Contestants take turns; medians.

    python benchmarks/bench_engines.py [--shards 4096] [--rounds 5] [--workers 2]
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import NamedTuple

import interleaved
from harken.engines import ENGINES

Fan = Callable[[int], Iterator[int]]


def nothing(cfg: int) -> Callable[[int], int]:
    return same


def same(n: int) -> int:
    return n


def harken(name: str) -> Fan:
    return lambda n: ENGINES[name]()(nothing, 0, range(n))


def bare_pool(n: int) -> Iterator[int]:
    with ProcessPoolExecutor(int(os.environ["HARKEN_WORKERS"]), mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(same, i) for i in range(n)]):
            yield future.result()


def bare_dask(n: int) -> Iterator[int]:
    import distributed

    workers = int(os.environ["HARKEN_WORKERS"])
    with (
        distributed.LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        distributed.Client(cluster) as client,
    ):
        futures = [client.submit(same, i, pure=False) for i in range(n)]
        for _, result in distributed.as_completed(futures, with_results=True):
            yield result


def bare_ray(n: int) -> Iterator[int]:
    import ray

    workers = int(os.environ["HARKEN_WORKERS"])
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    actor = ray.remote(num_cpus=1)(type("Bare", (), {"same": lambda self, i: i}))
    crew = [actor.remote() for _ in range(workers)]
    left = [crew[i % workers].same.remote(i) for i in range(n)]
    while left:
        done, left = ray.wait(left, num_returns=min(100, len(left)))
        yield from ray.get(done)
    ray.shutdown()


class Taken(NamedTuple):
    """Seconds: until the first result, from there to the last one for each shard, and of all processors for each."""

    start: float
    each: float
    cpu: float


def cpu_s() -> float:
    """CPU seconds of this process and of all its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def once(fan: Fan, n: int) -> Taken:
    began, cpu, found = time.monotonic(), cpu_s(), 0
    first = last = began
    for _ in fan(n):
        found += 1
        last = time.monotonic()
        first = last if found == 1 else first
    assert found == n
    return Taken(first - began, (last - first) / max(1, n - 1), (cpu_s() - cpu) / n)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=interleaved.ROUNDS)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    os.environ["HARKEN_WORKERS"] = str(given.workers)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    pairs: dict[str, tuple[Fan, Fan]] = {
        "local": (harken("local"), bare_pool),
        "dask": (harken("dask"), bare_dask),
        "ray": (harken("ray"), bare_ray),
    }
    if importlib.util.find_spec("ray") is None:
        del pairs["ray"]
    taken: dict[str, list[Taken]] = {}
    for _ in range(given.rounds):
        for name, (ours, bare) in pairs.items():
            for who, fan in ((f"harken, {name}", ours), (f"bare {name}", bare)):
                taken.setdefault(who, []).append(once(fan, given.shards))
    middle = {who: Taken(*(statistics.median(t) for t in zip(*all_, strict=True))) for who, all_ in taken.items()}
    print(f"{given.shards} shards of no work, {given.workers} workers, median of {given.rounds} rounds")
    print(interleaved.machine().partition(", one thread")[0])
    print(f"  {'':<16} {'first result':>12} {'a shard':>12} {'CPU a shard':>12} {'all of them':>12}")
    for name in pairs:
        for who in (f"harken, {name}", f"bare {name}"):
            t, bare = middle[who], middle[f"bare {name}"]
            whole = t.start + t.each * (given.shards - 1)
            print(
                f"  {who:<16} {t.start:10.2f} s {1e3 * t.each:9.2f} ms {1e3 * t.cpu:9.2f} ms {whole:10.1f} s   "
                f"{t.each / bare.each:5.2f} x bare {name} a shard"
            )


if __name__ == "__main__":
    main()
