"""The similarity matrix of text-aware attention pooling: factorised, and as the equations are printed, in tiles."""

from __future__ import annotations

import torch

import interleaved
from harken.models.pooling import POOLINGS
from harken.models.scoring import NaiveIndex, score_matrix

N_TEXTS, N_CLIPS, N_FRAMES, DIM, DP = 512, 96, 31, 512, 256
TEXT_CHUNK, CLIP_CHUNK = 256, 32


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tap = POOLINGS["tap"](dim=DIM, dp=DP)
    texts, frames = torch.randn(N_TEXTS, DIM), torch.randn(N_CLIPS, N_FRAMES, DIM)
    mask = torch.ones(N_CLIPS, N_FRAMES, dtype=torch.bool)

    @torch.inference_mode()
    def factorised() -> torch.Tensor:
        return score_matrix(texts, frames, mask, tap, text_chunk=TEXT_CHUNK, clip_chunk=CLIP_CHUNK)

    @torch.inference_mode()
    def naive() -> torch.Tensor:
        columns = []
        for part in range(0, N_CLIPS, CLIP_CHUNK):
            index = NaiveIndex(tap, frames[part : part + CLIP_CHUNK], mask[part : part + CLIP_CHUNK])
            columns.append(torch.cat([index.score(chunk) for chunk in texts.split(TEXT_CHUNK)]))
        return torch.cat(columns, dim=1)

    print(f"largest difference {(factorised() - naive()).abs().max():.1e}")
    medians = interleaved.measure({"factorised": factorised, "as printed": naive})
    what = f"TAP, {N_TEXTS} texts x {N_CLIPS} clips x {N_FRAMES} frames, {DIM} numbers, {DP} inside"
    interleaved.show(what, medians, "factorised")


if __name__ == "__main__":
    main()
