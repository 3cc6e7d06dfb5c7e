"""One sentence against a million clips under text-aware pooling: int8 sketches of all, details of some, exact on a few.

Clips of 31 frames of 1024 numbers, TAP of 512 inside. A TAP with random weights attends to all frames alike and makes
every shortcut look good; this one is made by hand to do what a trained one does: text and frames meet in the same
directions, so a text reads the frames that sound like it (how many in effect is printed). Frames are events that begin
and end, of 400 kinds, no two alike, over background and noise; a query is one event of one clip, with noise.

Agreement with the exact scan is of the ten best, on as many clips as asked for. 500 candidates of few clips say little
about 500 of a million, so fewer are asked for too: 10 of 20,000 are the same share of all. What each part takes is
measured apart: sketches over a whole million (those there are, over and over, so that no cache holds them), the rest on
clips that there are, and the exact scan as these take it, times a million over their number, in a straight line. All
with files in the page cache: of a million clips the frames are 127 GB and will be on a disk, of which a query reads its
candidates, 127 kB each. The peer of the sketches is faiss's flat int8 index of the same vectors (`pip install
faiss-cpu`), or, without it, numpy's product in float32.

    python benchmarks/bench_search.py [--clips 20000] [--queries 50] [--threads 2] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import interleaved
from harken.engines import n_cores
from harken.models.pooling import TextAwareAttention
from harken.search import text_aware

DIM, DP, FRAMES, KINDS, MILLION, K = 1024, 512, 31, 400, 1_000_000, 10
SHARPNESS = 100.0  # a logit is this times the cosine of text and frame
SPACE = 256  # directions that events lie in
AT_ONCE = 250


class Cost(NamedTuple):
    wall_ms: float
    cpu_ms: float


def attentive() -> TextAwareAttention:
    """A TAP whose queries meet its keys, and whose values come out where they went in."""
    tap = TextAwareAttention(dim=DIM, dp=DP).eval().requires_grad_(False)
    inside = torch.linalg.qr(torch.randn(DIM, DP)).Q
    stretch = (SHARPNESS * DP**0.5 / DP) ** 0.5  # |LN(x)|² within is dp
    for projection, matrix in ((tap.query, inside.T * stretch), (tap.key, inside.T * stretch), (tap.value, inside.T)):
        projection.weight.copy_(matrix)
    tap.out.weight.copy_(inside)
    return tap


def clips(n: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(frames, a text of one event in them) of n clips, AT_ONCE at a time."""
    space = torch.linalg.qr(torch.randn(DIM, SPACE)).Q.T
    kinds, t = torch.randn(KINDS, SPACE), torch.arange(FRAMES)
    for _ in range(0, n, AT_ONCE):
        events = kinds[torch.randint(KINDS, (AT_ONCE, 4))] + 0.5 * torch.randn(AT_ONCE, 4, SPACE)
        first = torch.randint(FRAMES - 3, (AT_ONCE, 4, 1))
        sounds = (t >= first) & (t < first + torch.randint(3, 16, (AT_ONCE, 4, 1)))
        sounds &= torch.arange(4)[:, None] < torch.randint(1, 5, (AT_ONCE, 1, 1))
        loud = sounds * torch.exp(0.5 * torch.randn(AT_ONCE, 4, 1))
        heard = torch.einsum("cet,ced->ctd", loud, events) + 0.5 * torch.randn(AT_ONCE, 1, SPACE)
        frames = (heard + 0.4 * torch.randn(AT_ONCE, FRAMES, SPACE)) @ space
        yield frames, (events[:, 0] + 0.5 * torch.randn(AT_ONCE, SPACE)) @ space


def take_turns(contestants: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, Cost]:
    """Median wall and CPU time of each contestant over as many queries, after one to warm up."""
    taken: dict[str, list[Cost]] = {name: [] for name in contestants}
    for i in range(-1, rounds):
        for name, run in contestants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run(max(i, 0))
            if i >= 0:
                taken[name].append(Cost((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3))
    return {name: Cost(*map(statistics.median, zip(*costs, strict=True))) for name, costs in taken.items()}


def peer(index: text_aware.TextAwareIndex, texts: torch.Tensor, threads: int) -> tuple[str, Callable[[int], object]]:
    """A flat search of the same centroids by the same texts, for the best CANDIDATES of them, by another's code."""
    width = index.basis.shape[1]
    vectors, sought = index.sketches.reshape(-1, width), (texts @ index.basis).numpy()
    if importlib.util.find_spec("faiss") is None:
        wide = vectors.float().numpy()
        return "numpy, float32 product", lambda i: np.argpartition(wide @ sought[i], -text_aware.CANDIDATES)
    import faiss

    faiss.omp_set_num_threads(threads)
    flat = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT)
    for part in vectors.split(1 << 18):
        flat.add(part.float().numpy())
    return f"faiss {faiss.__version__}, flat int8", lambda i: flat.search(sought[i : i + 1], text_aware.CANDIDATES)


def last(index: text_aware.TextAwareIndex, text: torch.Tensor) -> None:
    aim = text_aware._aim(index.pooling_64, text)
    for clip in range(K):
        text_aware._final(index, text, aim, clip)


def agreement(index: text_aware.TextAwareIndex, texts: torch.Tensor, exact: list[list[str]], n: int) -> float:
    """Of the exact ten best, the per cent that n candidates hold."""
    found = [text_aware.search(index, t.numpy(), K, candidates=n) for t in texts]
    return 100 * statistics.mean(len({h.clip_id for h in f} & set(e)) / K for f, e in zip(found, exact, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=20_000, help="clips that there are")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--threads", type=int, default=n_cores())
    parser.add_argument("--folder", type=Path, help="where to keep the index meanwhile, 128 kB a clip")
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a clip at a time, as it is built, is too little for two
    torch.set_grad_enabled(False)
    n, tap, texts = -(-asked.clips // AT_ONCE) * AT_ONCE, attentive(), []

    def frames() -> Iterator[torch.Tensor]:
        for given, said in clips(n):
            texts.append(said)
            yield from given

    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        began = time.process_time()
        index = text_aware.build([str(i) for i in range(n)], frames(), tap, Path(folder))
        built = (time.process_time() - began) / n * 1e3
        torch.set_num_threads(asked.threads)
        queries = torch.cat(texts)[:: max(1, n // asked.queries)][: asked.queries]
        report(index, queries, asked.threads)
        sizes = {p.name: p.stat().st_size / n for p in sorted(Path(folder).iterdir())}
    print(f"to build, with the frames made up: {built:.1f} CPU ms a clip; bytes a clip: ", end="")
    print(", ".join(f"{name} {size:,.0f}" for name, size in sizes.items() if size >= 1))


def report(index: text_aware.TextAwareIndex, texts: torch.Tensor, threads: int) -> None:
    n, began, cpu = len(index), time.perf_counter(), time.process_time()
    hits = [text_aware.search(index, t.numpy(), K, exact=True) for t in texts]
    scan = Cost((time.perf_counter() - began) / len(texts) * 1e3, (time.process_time() - cpu) / len(texts) * 1e3)
    exact = [[h.clip_id for h in of] for of in hits]
    read = [np.exp(-sum(w * np.log(w) for w in of[0].weights if w > 0)) for of in hits]
    print(f"{interleaved.machine().split(', one thread')[0]}, {threads} threads, {len(texts)} queries, median")
    print(f"{n} clips of {FRAMES} frames; of the best clip a text reads {statistics.mean(read):.1f} frames in effect")
    share = max(K, round(text_aware.CANDIDATES * n / MILLION))
    for count in sorted({share, share * 5, text_aware.CANDIDATES}):
        found = agreement(index, texts, exact, count)
        print(f"  {count:>7} candidates, 1 clip in {n / count:,.0f}: {found:.1f} % of the exact ten best")
    many = dataclasses.replace(index, sketches=index.sketches.repeat(-(-MILLION // n), 1)[:MILLION])
    name, other = peer(many, texts, threads)
    seen = text_aware.CANDIDATES * text_aware.LOOKED_AT
    some = (torch.arange(seen) * max(1, n // seen)) % n
    few = (torch.arange(text_aware.CANDIDATES) * max(1, n // text_aware.CANDIDATES)) % n
    costs = take_turns(
        {
            "sketches of 1,000,000 clips": lambda i: text_aware._best(text_aware.coarse_scores(many, texts[i]), seen),
            f"the same by {name}": other,
            f"details of {seen} clips": lambda i: text_aware._best(
                text_aware._likely_scores(index, texts[i], some), text_aware.CANDIDATES
            ),
            f"frames of {len(few)} clips": lambda i: text_aware._scores(index, texts[i], few),
            "of ten clips again in float64": lambda i: last(index, texts[i].double()),
        },
        min(len(texts), 10),
    )
    ours = Cost(*(sum(c[j] for key, c in costs.items() if "the same" not in key) for j in (0, 1)))
    costs["in all, a million clips"] = ours
    costs["exact scan, in a straight line"] = Cost(*(MILLION / n * c for c in scan))
    for key, c in costs.items():
        print(f"  {key:<42} {c.wall_ms:10.1f} ms {c.cpu_ms:10.1f} CPU ms  {c.wall_ms / ours.wall_ms:7.2f} x ours")


if __name__ == "__main__":
    main()
