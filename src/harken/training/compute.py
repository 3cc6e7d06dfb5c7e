"""How a tower computes: precision, memory and speed. The papers' definitions are elsewhere; nothing here changes them
by more than rounding.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harken.config import Config
from harken.errors import ConfigError
from harken.models.audio_vit import token_grid
from harken.models.features import full
from harken.models.towers import AudioTower, frames_of_pass

How = Literal["segments", "pooled"]

# Dense products per second, by their makers: (float32 without TF32, bfloat16). Sparsity doubles them on paper only.
# By whole words of the device's name, the first that fits: an "RTX A1000" is no A100.
PEAKS: dict[str, tuple[float, float]] = {
    "H200": (67e12, 989e12),
    "H100 PCIe": (51e12, 756e12),
    "H100 NVL": (60e12, 835e12),
    "H100": (67e12, 989e12),
    "A100": (19.5e12, 312e12),
    "L40S": (91.6e12, 362e12),
    "A10G": (31.5e12, 70e12),
    "RTX 4090": (82.6e12, 165e12),
    "RTX 3090": (35.6e12, 71e12),
}


class ComputeConfig(Config):
    """`precision` of the encoder's products; similarities and losses are float32 always.

    `micro_batch`: how many clips are encoded at a time; null for the whole batch. The loss is that of the whole batch
    all the same (Gao et al. 2021, GradCache): memory is the micro-batch's, a third more time is the price.
    `checkpointing` recomputes each block's activations in the backward pass, for the same price. `fused_attention`
    never holds attention's matrices. `compile`: torch.compile. `deterministic`: kernels that give equal bits, on GPUs
    too, where there are some; on CPUs they always do.
    """

    precision: Literal["float32", "bfloat16"]
    micro_batch: int | None
    checkpointing: bool
    fused_attention: bool
    compile: bool
    deterministic: bool


class Encode(nn.Module):
    """FBANK (clip, frame, mel) to what `AudioTower.segments` or `.pooled` makes of it, in float32 at least."""

    def __init__(self, tower: AudioTower, how: How, cfg: ComputeConfig) -> None:
        super().__init__()
        if cfg.micro_batch is not None and cfg.micro_batch < 1:
            raise ConfigError(f"compute.micro_batch: {cfg.micro_batch} clips; expected 1 or more, or null for all.")
        self.tower, self.micro_batch = tower, cfg.micro_batch
        self.lowered = cfg.precision == "bfloat16"
        method: Callable[[Tensor], Tensor] = getattr(tower, how)
        self.method = torch.compile(method) if cfg.compile else method

    def forward(self, fbank: Float[Tensor, "clip frame mel"]) -> Float[Tensor, "clip ..."]:
        """A chunk's graph is kept as its input alone and made again when the gradient reaches it."""
        with torch.autocast(fbank.device.type, torch.bfloat16, enabled=self.lowered):
            chunks = torch.split(fbank, self.micro_batch or len(fbank))
            if len(chunks) == 1 or not torch.is_grad_enabled():
                made = [self.method(c) for c in chunks]
            else:
                made = [checkpoint(self.method, c, use_reentrant=False) for c in chunks]
        return torch.cat([full(m) for m in made])


def prepare(cfg: ComputeConfig) -> None:
    """Set this process to `cfg.deterministic`. To be called before its first product on a GPU."""
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cfg.deterministic)


def training_flops(tower: AudioTower, n_frames: int) -> float:
    """The floating-point operations that training needs for a clip: one pass forward, two passes' worth back.

    What `checkpointing` and `micro_batch` do a second time is not counted: it is a price, not work.
    """
    vit = tower.vit
    in_one = tower.division == "token_pool" or tower.at_pool == "full_clip"
    passes = 1 if in_one else tower.n_segments
    length = n_frames if in_one else frames_of_pass(n_frames, tower.n_segments, tower.division)
    time, mel = token_grid(length, vit.n_mels, patch=vit.patch, stride=vit.stride)
    n_tokens, width = time * mel + 1, vit.conv1.out_channels
    patches = 2 * time * mel * vit.patch**2 * width
    linear = 2 * n_tokens * 12 * width**2  # queries, keys, values 3; out 1; the MLP 8
    attention = 2 * 2 * n_tokens**2 * width
    projections = 2 * (time + 1) * width * vit.embed_dim
    layers = len(vit.transformer.resblocks)
    return 3.0 * passes * (patches + layers * (linear + attention) + projections)


def peak_flops(device: torch.device, cfg: ComputeConfig) -> float | None:
    """What a GPU can do by its maker's word, in operations per second; None for one that is not known, and for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
    return known[cfg.precision == "bfloat16"] if known else None
