"""The audit at AudioSet's real size: 3 M attempts folded to the state of 2.08 M clips, then the full report and page.

There is no peer: no other program answers these questions. What is printed is the time of each step and the peak
memory of the process, against the promise of 60 s and 4 GB on two cores. All data are synthetic: three splits of the
real sizes, 527 labels of about 2 a clip with a long tail.

    python benchmarks/bench_audit.py [--n 3000000] [--clips 2084320]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import interleaved
from bench_ledger import T0_MS, make_ledger
from harken.attempts import FOLD_COLUMNS, read
from harken.audit import page
from harken.audit.rates import audit
from harken.clips import SCHEMA, Manifest
from harken.evaluation.passports import passport_of
from harken.media.reasons import group
from harken.stages.audit import outcomes_of
from harken.stages.download import states

SIZES = {"train": 2_041_789, "val": 22_160, "test": 20_371}
N_LABELS = 527
NOW_MS = T0_MS + 500 * 86_400_000


def make_manifest(folder: Path, n: int) -> None:
    """The rows of an AudioSet of `n` clips: sizes in the real proportion, labels by a power law."""
    rng = np.random.default_rng(1)
    edges = np.round(np.cumsum([0, *SIZES.values()]) * n / sum(SIZES.values())).astype(int)
    split = np.repeat(list(SIZES), np.diff(edges))
    share = 1 / np.arange(1, N_LABELS + 1)
    n_labels = rng.integers(1, 4, n)
    labels = rng.choice(N_LABELS, n_labels.sum(), p=share / share.sum())
    offsets = np.concatenate([[0], np.cumsum(n_labels)]).astype(np.int32)
    names = pa.array([f"/m/{i:05x}" for i in range(N_LABELS)]).take(pa.array(labels))
    keys = [f"{i:011d}" for i in range(n)]
    columns = {
        "clip_id": pa.array([f"yt:{k}:30000-40000" for k in keys]),
        "shard": pa.array(np.zeros(n, np.int32)),
        "dataset": pa.array(["audioset"] * n),
        "split": pa.array(split.astype(object)),
        "host": pa.array(["youtube"] * n),
        "key": pa.array(keys),
        "archive": pa.array([""] * n),
        "start_s": pa.array(np.full(n, 30.0)),
        "end_s": pa.array(np.full(n, 40.0)),
        "captions": pa.ListArray.from_arrays(pa.array(np.zeros(n + 1, np.int32)), pa.array([], pa.string())),
        "labels": pa.ListArray.from_arrays(pa.array(offsets), names),
    }
    table = pa.table({name: columns[name].cast(SCHEMA.field(name).type) for name in SCHEMA.names})
    pq.write_table(table.replace_schema_metadata({b"harken.n_shards": b"1"}), folder / "clips.parquet")


def run(folder: Path, told: multiprocessing.Queue[tuple[str, float]]) -> None:
    began = time.perf_counter()

    def lap(what: str) -> None:
        nonlocal began
        now = time.perf_counter()
        told.put((what, now - began))
        began = time.perf_counter()

    manifest = Manifest.read(folder).table
    lap("manifest read")
    table = read(folder / "ledger", FOLD_COLUMNS)
    lap("ledger read")
    state = states(table, NOW_MS)
    del table
    lap("fold to state")
    report = audit(manifest, outcomes_of(state), group, attempts_state=state, passport=passport_of)
    lap("full audit")
    text = page.render(report)
    lap(f"page ({len(text) / 1e6:.1f} MB)")
    told.put(("peak GB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=3_000_000, help="attempts")
    parser.add_argument("--clips", type=int, default=sum(SIZES.values()))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ledger").mkdir()
        make_ledger(folder / "ledger", given.n, given.clips)
        make_manifest(folder, given.clips)
        told: multiprocessing.Queue[tuple[str, float]] = multiprocessing.get_context("spawn").Queue()
        process = multiprocessing.get_context("spawn").Process(target=run, args=(folder, told))
        process.start()
        steps = [told.get() for _ in range(6)]
        process.join()
    print(f"{given.n:,} attempts, {given.clips:,} clips, {N_LABELS} labels\n{interleaved.machine()}")
    for what, value in steps[:-1]:
        print(f"  {what:<24} {value:6.1f} s")
    print(f"  {'together':<24} {sum(v for _, v in steps[:-1]):6.1f} s   peak {steps[-1][1]:.2f} GB")


if __name__ == "__main__":
    main()
