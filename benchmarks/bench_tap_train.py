"""A training step of text-aware attention pooling with PMR: similarities of a batch, loss, all gradients.

31 frames, 1024 numbers, 512 inside, float32. harken's tiles (`batch_similarity`) against TAP as its equations are
printed and as autograd keeps it. Each step runs alone in a process, the two in turn: CPU time, one thread, medians of
`--rounds` of three steps after one; and how far the process grows beyond texts, frames, their gradients and the model.
The printed form keeps some eight tensors of (text, clip, dim); where they would take more than `--bound-gb`, it is not
run.

    python benchmarks/bench_tap_train.py [--batches 64 256 1024] [--bound-gb 4] [--rounds 3]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics

import torch

import interleaved
from bench_score import DIM, DP, Cost, cost
from harken.models.losses import pmr
from harken.models.pooling import POOLINGS, cosine_similarity
from harken.models.scoring import batch_similarity

N_FRAMES, N_STEPS = 31, 3
KEPT = 8  # tensors of (text, clip, dim) that the printed form holds at its peak


def step(kind: str, tap: torch.nn.Module, texts: torch.Tensor, frames: torch.Tensor) -> None:
    mask = torch.ones(frames.shape[:2], dtype=torch.bool)
    if kind == "tiles":
        sim = batch_similarity(texts, frames, mask, tap)
    else:
        sim = cosine_similarity(texts, tap(frames, mask, texts))
    pmr(sim, temperature=0.07, prior_scale=1 / 0.07, reduction="mean_of_directions").backward()


def steps(kind: str, batch: int) -> Cost:
    """Median seconds of a step, in this process; its growth over all of them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tap = POOLINGS["tap"](dim=DIM, dp=DP)
    texts = torch.randn(batch, DIM, requires_grad=True)
    frames = torch.randn(batch, N_FRAMES, DIM, requires_grad=True)
    for x in (texts, frames, *tap.parameters()):
        x.grad = torch.zeros_like(x)
    step("tiles", tap, torch.randn(65, DIM), torch.randn(65, 1, DIM))  # imports what is imported at its first use
    costs = [cost(lambda: step(kind, tap, texts, frames)) for _ in range(1 + N_STEPS)]
    middle = (statistics.median(getattr(c, field) for c in costs[1:]) for field in ("wall_s", "cpu_s"))
    return Cost(*middle, costs[0].grown_gb)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--bound-gb", type=float, default=4.0, help="what the printed form may take")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    print(f"TAP with PMR, {N_FRAMES} frames, {DIM} numbers, {DP} inside")
    print(interleaved.machine().rpartition(", median")[0])
    spawn = multiprocessing.get_context("spawn")
    for batch in asked.batches:
        needs = KEPT * batch**2 * DIM * 4 / 1e9
        kinds = ["tiles"] + ["as printed"] * (needs <= asked.bound_gb)
        found: dict[str, list[Cost]] = {kind: [] for kind in kinds}
        for _ in range(asked.rounds):
            for kind in kinds:
                with spawn.Pool(1) as alone:
                    found[kind].append(alone.apply(steps, (kind, batch)))
        cpu = {kind: statistics.median(c.cpu_s for c in costs) for kind, costs in found.items()}
        for kind, costs in found.items():
            grown = statistics.median(c.grown_gb for c in costs)
            print(f"  batch {batch:4}  {kind:<10} {cpu[kind]:7.2f} CPU s  {grown:6.2f} GB", end="")
            print(f"  {cpu[kind] / cpu['tiles']:6.2f} x tiles")
        if len(kinds) == 1:
            print(f"  batch {batch:4}  as printed  not run: about {needs:.0f} GB, over the {asked.bound_gb:g} allowed")


if __name__ == "__main__":
    main()
