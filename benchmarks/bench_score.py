"""The similarity matrix of text-aware attention pooling at the size of the papers' test sets, exactly.

AudioCaps (4,785 captions, 957 clips of 31 frames) and Clotho (5,225, 1,045 of 93), 1024 numbers, 512 inside, float32.
harken's tiles against TAP as its equations are printed, in the same tiles, on a slice of the clips with all texts: CPU
time, one thread, in turn. Then the whole matrix, alone in a process: wall and CPU time on all cores, and how far the
process grows beyond the frames and texts that it was given. Last, how far the scores are from float64, with frames in
float32 and in bfloat16.

    python benchmarks/bench_score.py [--slice 64] [--threads 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import interleaved
from harken.engines import n_cores
from harken.models.pooling import POOLINGS, cosine_similarity
from harken.models.scoring import NaiveIndex, score_matrix

DIM, DP, ROUNDS = 1024, 512, 3
TEXT_CHUNK, CLIP_CHUNK = 256, 16  # of the printed form: 17 MB for each tensor of (text, clip, dim)


class Size(NamedTuple):
    n_texts: int
    n_clips: int
    n_frames: int


SIZES = {"AudioCaps": Size(4785, 957, 31), "Clotho": Size(5225, 1045, 93)}


class Given(NamedTuple):
    texts: torch.Tensor
    frames: torch.Tensor
    mask: torch.Tensor
    tap: torch.nn.Module


class Cost(NamedTuple):
    wall_s: float
    cpu_s: float
    grown_gb: float


def given(size: Size) -> Given:
    """Frames that share a part with some text, so that scores are not all near zero."""
    torch.manual_seed(0)
    texts = torch.randn(size.n_texts, DIM)
    frames = torch.randn(size.n_clips, size.n_frames, DIM) + texts[: size.n_clips, None]
    tap = POOLINGS["tap"](dim=DIM, dp=DP).eval()
    return Given(texts, frames, torch.ones(frames.shape[:2], dtype=torch.bool), tap)


def printed(g: Given) -> torch.Tensor:
    columns = []
    for i in range(0, len(g.frames), CLIP_CHUNK):
        index = NaiveIndex(g.tap, g.frames[i : i + CLIP_CHUNK], g.mask[i : i + CLIP_CHUNK])
        columns.append(torch.cat([index.score(chunk) for chunk in g.texts.split(TEXT_CHUNK)]))
    return torch.cat(columns, dim=1)


def tiled(g: Given) -> torch.Tensor:
    return score_matrix(g.texts, g.frames, g.mask, g.tap)


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def cost(run: Callable[[], object]) -> Cost:
    """What `run` takes, and by how much the peak of this process lies above what it holds now."""
    before, began, cpu = resident(), time.perf_counter(), time.process_time()
    run()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Cost(wall, cpu, max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e9)


def whole(size: Size, threads: int) -> Cost:
    """The whole matrix in this process."""
    torch.set_num_threads(threads)
    g = given(size)
    with torch.inference_mode():
        tiled(Given(g.texts[:512], g.frames[:64], g.mask[:64], g.tap))  # the libraries' own buffers
        return cost(lambda: tiled(g))


def errors(size: Size) -> dict[str, float]:
    """The largest distance of a cosine from float64, by what the frames are kept in."""
    g = given(size)
    found = {kind: tiled(g._replace(frames=g.frames.to(kind))) for kind in (torch.float32, torch.bfloat16)}
    exact = Given(g.texts.double(), g.frames.double(), g.mask, g.tap.double())
    columns = [exact.tap(exact.frames[i : i + 1], exact.mask[i : i + 1], exact.texts) for i in range(size.n_clips)]
    scores = torch.cat([cosine_similarity(exact.texts, c) for c in columns], dim=1)
    return {str(kind).removeprefix("torch."): float((s - scores).abs().max()) for kind, s in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slice", type=int, default=64, help="clips that both forms are timed on")
    parser.add_argument("--threads", type=int, default=n_cores(), help="threads for the whole matrix")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name, size in SIZES.items():
        g = given(size)
        part = g._replace(frames=g.frames[: asked.slice].clone(), mask=g.mask[: asked.slice])
        del g
        with torch.inference_mode():
            print(f"{name}: largest difference {(tiled(part) - printed(part)).abs().max():.1e}")
            medians = interleaved.measure(
                {"tiles": lambda p=part: tiled(p), "as printed": lambda p=part: printed(p)}, ROUNDS
            )
        what = (
            f"{name}: {size.n_texts} texts x {asked.slice} clips x {size.n_frames} frames, {DIM} numbers, {DP} inside"
        )
        interleaved.show(what, medians, "tiles")
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            c = alone.apply(whole, (size, asked.threads))
        print(f"  all {size.n_clips} clips, {asked.threads} threads: {c.wall_s:.1f} s, {c.cpu_s:.1f} CPU s, ", end="")
        print(f"grown by {c.grown_gb:.2f} GB")
        with torch.inference_mode():
            far = errors(Size(1024, 64, size.n_frames))
        print("  from float64, at most: " + ", ".join(f"{e:.1e} ({kind} frames)" for kind, e in far.items()))


if __name__ == "__main__":
    main()
