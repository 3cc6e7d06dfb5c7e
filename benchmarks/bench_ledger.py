"""The ledger of attempts: durable appends, and the state of 2.08 M clips from 3 M attempts.

Appends: harken's batches of 100 and 1,000 (one write and one fsync each) against SQLite, a row a transaction in WAL
mode with synchronous=FULL (the usual safe way), and against SQLite given the same batches. Wall time: it is the disk
that is waited for. Read and fold, and re-judging all messages, run in a process of their own for their peak memory.

    python benchmarks/bench_ledger.py [--n 3000000] [--clips 2080000]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import interleaved
from harken.attempts import FOLD_COLUMNS, SCHEMA, Attempt, AttemptLog, fold, new_id, read
from harken.media.reasons import POLICIES, RULE_VERSION
from harken.media.reclassify import COLUMNS, reclassify

T0_MS = 1_700_000_000_000
ROUNDS = 5
SAID = {
    "": (0.70, ""),
    "gone.private": (0.08, "Private video. Sign in if you've been granted access to this video"),
    "gone.unspecified": (0.06, "Video unavailable"),
    "gone.account_terminated": (0.05, "Video unavailable. The account associated with this video has been terminated"),
    "gone.copyright_claim": (0.02, "This video is no longer available due to a copyright claim by {}"),
    "denied.geo": (0.02, "The uploader has not made this video available in your country"),
    "session.rate_limited": (0.03, "Video unavailable. This content isn't available, try again later"),
    "net.timeout": (0.04, "The read operation timed out"),
}


def attempts(n: int) -> Iterator[Attempt]:
    rng = random.Random(0)
    facts = {
        "exception": "ExtractorError",
        "where": "extract",
        "expected": True,
        "n_requests": 3,
        "info_id": "dQw4w9WgXcQ",
    }
    tools = {"yt_dlp": "2026.08.19", "av": "18.1.0"}
    for i in range(n):
        ms = T0_MS + i
        clip_id = f"yt:{i:011d}:30000-40000"
        yield Attempt(
            new_id(ms, rng), "run", "host-1", "youtube@host", clip_id, "fetch", ms, ms + 900, "failed", "gone.private",
            RULE_VERSION, "Private video. Sign in if you've been granted access", facts, tools,
        )  # fmt: skip


def ours(folder: Path, made: list[Attempt], batch: int) -> None:
    with AttemptLog(folder, "run", f"w{time.monotonic_ns()}") as log:
        for i, attempt in enumerate(made, 1):
            log.append(attempt)
            if i % batch == 0:
                log.flush()


def sqlite(folder: Path, made: list[Attempt], batch: int) -> None:
    db = sqlite3.connect(folder / f"{time.monotonic_ns()}.sqlite", isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute(f"CREATE TABLE attempts ({', '.join(SCHEMA.names)}, PRIMARY KEY (attempt_id))")
    for start in range(0, len(made), batch):
        db.execute("BEGIN")
        rows = [(*astuple(a)[:-2], json.dumps(a.facts), json.dumps(a.tools)) for a in made[start : start + batch]]
        db.executemany(f"INSERT INTO attempts VALUES ({', '.join('?' * len(SCHEMA.names))})", rows)
        db.execute("COMMIT")
    db.close()


def appends() -> None:
    made = list(attempts(20_000))
    contestants: dict[str, tuple[Callable[[Path, list[Attempt], int], None], int, int]] = {
        "harken, batches of 100": (ours, 20_000, 100),
        "harken, batches of 1,000": (ours, 20_000, 1_000),
        "harken, one by one": (ours, 500, 1),
        "SQLite WAL full-sync, one by one": (sqlite, 500, 1),
        "SQLite WAL full-sync, batches of 100": (sqlite, 20_000, 100),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for name, (run, n, batch) in contestants.items():
                began = time.perf_counter()
                run(Path(folder), made[:n], batch)
                rates[name].append(n / (time.perf_counter() - began))
    print(f"durable appends, medians of {ROUNDS}\n{interleaved.machine()}")
    peer = statistics.median(rates["SQLite WAL full-sync, one by one"])
    for name, found in rates.items():
        rate = statistics.median(found)
        print(f"  {name:<38} {rate:10,.0f} attempts/s   {rate / peer:7.1f} x SQLite one by one")


def make_ledger(folder: Path, n: int, n_clips: int) -> None:
    """A sealed ledger: every clip once in random order, then what is left over at random clips again."""
    rng = np.random.default_rng(0)
    clips = np.concatenate([rng.permutation(n_clips)[:n], rng.integers(0, n_clips, max(n - n_clips, 0))])
    codes = rng.choice(len(SAID), n, p=[share for share, _ in SAID.values()])
    crockford = np.frombuffer(b"0123456789ABCDEFGHJKMNPQRSTVWXYZ", np.uint8)
    ended = T0_MS + np.sort(rng.integers(0, 400 * 86_400_000, n))
    (folder / "run").mkdir()
    size = 250_000
    for part, start in enumerate(range(0, n, size)):
        chunk = slice(start, min(start + size, n))
        m = chunk.stop - start
        letters = np.empty((m, 26), np.uint8)
        for i in range(10):
            letters[:, i] = crockford[(ended[chunk] >> (45 - 5 * i)) & 31]
        letters[:, 10:] = crockford[rng.integers(0, 32, (m, 16))]
        reason = [list(SAID)[c] for c in codes[chunk]]
        failed = '{{"exception":"ExtractorError","where":"extract","expected":true,"n_requests":3,"k":{}}}'
        worked = '{{"info_id":"{:011d}","duration_s":{},"formats":["134","140"],"n_bytes":1234567,"n_requests":14}}'
        columns = {
            "attempt_id": letters.view("S26").ravel().astype(str),
            "run_id": ["run"] * m,
            "worker": [f"host-{part}"] * m,
            "lane": ["youtube@host"] * m,
            "clip_id": [f"yt:{c:011d}:30000-40000" for c in clips[chunk]],
            "step": ["fetch"] * m,
            "began_ms": ended[chunk] - 900,
            "ended_ms": ended[chunk],
            "outcome": ["failed" if r else "ok" for r in reason],
            "rule_version": ["an older"] * m,
            # an older rule did not know what a time-out says
            "reason": ["unknown.unmapped" if r == "net.timeout" else r for r in reason],
            "message": [SAID[r][1].format(f"owner {k % 40_000}") for k, r in enumerate(reason)],
            "facts": [(failed if r else worked).format(k, k % 600) for k, r in enumerate(reason)],
            "tools": ['{"yt_dlp":"2026.08.19","av":"18.1.0"}'] * m,
        }
        arrays = [pa.array(columns[f.name]).cast(f.type) for f in SCHEMA]
        pq.write_table(
            pa.table(arrays, schema=SCHEMA), folder / "run" / f"host-{part}.attempts.parquet", compression="zstd"
        )


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def read_and_fold(folder: Path) -> list[tuple[str, float, float, str]]:
    began = time.perf_counter()
    table = read(folder, FOLD_COLUMNS)
    middle, peak_of_read_gb = time.perf_counter(), peak_gb()
    frame = fold(table, POLICIES, T0_MS + 10**12)
    ended = time.perf_counter()
    states = ", ".join(f"{s} {k:,}" for s, k in frame["state"].value_counts().items())
    return [
        ("read", middle - began, peak_of_read_gb, f"{table.num_rows:,} attempts"),
        ("fold", ended - middle, peak_gb(), f"{len(frame):,} clips: {states}"),
    ]


def read_and_reclassify(folder: Path) -> list[tuple[str, float, float, str]]:
    began = time.perf_counter()
    table = read(folder, COLUMNS)
    middle = time.perf_counter()
    rulings = reclassify(table)
    took = time.perf_counter() - middle
    return [
        ("read, to re-judge", middle - began, peak_gb(), ""),
        ("reclassify", took, peak_gb(), f"{rulings.num_rows:,} verdicts change"),
    ]


def folding(n: int, n_clips: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        make_ledger(Path(name), n, n_clips)
        print(f"\n{n:,} attempts at {n_clips:,} clips, wall time and peak memory of the process")
        for work in (read_and_fold, read_and_reclassify):
            with spawn.Pool(1) as pool:
                for what, seconds, gb, found in pool.apply(work, (Path(name),)):
                    print(f"  {what:<18} {seconds:6.1f} s   {gb:5.2f} GB   {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=3_000_000)
    parser.add_argument("--clips", type=int, default=2_080_000)
    chosen = parser.parse_args()
    appends()
    folding(chosen.n, min(chosen.clips, chosen.n))


if __name__ == "__main__":
    main()
