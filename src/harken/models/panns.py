"""PANNs (Kong et al. 2020) as frame encoders: CNN14 and ResNet38 on log-mel, up to but not including the time pooling.

State-dict names are upstream's, so released checkpoints load; the front end (STFT and mel filters) is
`media/logmel.py`, and its keys are dropped on loading. With a mask, activations beyond a clip's end are put back to
zero before every convolution: that is what the convolution's own padding does for a clip that ends there, so a padded
clip has the same frames as the clip alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from harken.errors import ConfigError, DataError
from harken.models.features import AudioFeatures

FRONT_END = ("spectrogram_extractor.", "logmel_extractor.")
LOGMEL_ROWS_PER_S = 100  # the front end's hop is 10 ms
HOP = 320  # samples per log-mel frame at 32 kHz; only error messages need it


def spec_augment(
    x: Float[Tensor, "clip 1 frame mel"], *, time_width: int = 64, mel_width: int = 8, n_stripes: int = 2
) -> Float[Tensor, "clip 1 frame mel"]:
    """Zero `n_stripes` time stripes and as many mel stripes in each clip; widths are uniform in [0, width).

    Drawn from torch's generator, as dropout is: part of the model's own training noise, saved and restored with it.
    """
    n_clips = x.shape[0]
    keep = torch.ones(n_clips, 1, *x.shape[2:], dtype=torch.bool, device=x.device)
    for axis, width in ((2, time_width), (3, mel_width)):
        size = x.shape[axis]
        span = min(width, size)
        at = torch.arange(size, device=x.device)
        for _ in range(n_stripes):
            length = torch.randint(span, (n_clips, 1), device=x.device)
            start = (torch.rand(n_clips, 1, device=x.device) * (size - length)).long()
            stripe = (at >= start) & (at < start + length)
            keep &= ~(stripe[:, None, :, None] if axis == 2 else stripe[:, None, None, :])
    return x * keep


def _halve(mask: Tensor | None) -> Tensor | None:
    """The mask after average pooling by two in time: a pooled frame is valid if both of its halves are."""
    if mask is None:
        return None
    return mask[:, 1::2] & mask[:, : mask.shape[1] // 2 * 2 : 2]


def _shrink(x: Tensor, mask: Tensor | None, pool: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Average over `pool` (frames, mel bins); a pooled frame is valid if all of its frames are."""
    if pool == (1, 1):
        return x, mask
    if mask is not None:
        n = mask.shape[1] // pool[0]
        mask = mask[:, : n * pool[0]].reshape(len(mask), n, pool[0]).all(-1)
    return F.avg_pool2d(x, pool), mask


def _cut(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask[:, None, :, None]


def _conv(n_in: int, n_out: int, size: int) -> nn.Conv2d:
    conv = nn.Conv2d(n_in, n_out, size, padding=size // 2, bias=False)
    nn.init.xavier_uniform_(conv.weight)
    return conv


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm and ReLU, then average pooling."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(n_in, n_out, 3), _conv(n_out, n_out, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(n_out), nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor, mask: Tensor | None, pool: int) -> tuple[Tensor, Tensor | None]:
        x = _cut(F.relu_(self.bn1(self.conv1(x))), mask)
        x = _cut(F.relu_(self.bn2(self.conv2(x))), mask)
        if pool == 1:
            return x, mask
        mask = _halve(mask)
        return _cut(F.avg_pool2d(x, pool), mask), mask


class ResidualBlock(nn.Module):
    """PANNs' basic block: where it halves the resolution, it pools before the first convolution."""

    def __init__(self, n_in: int, n_out: int, *, halves: bool, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.halves = halves
        self.conv1, self.conv2 = _conv(n_in, n_out, 3), _conv(n_out, n_out, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(n_out), nn.BatchNorm2d(n_out)
        nn.init.zeros_(self.bn2.weight)  # each block starts as the identity
        if halves:
            self.downsample = nn.Sequential(nn.AvgPool2d(2), _conv(n_in, n_out, 1), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        identity, out = x, x
        if self.halves:
            mask = _halve(mask)
            identity, out = self.downsample(x), _cut(F.avg_pool2d(x, 2), mask)
        out = _cut(F.relu_(self.bn1(self.conv1(out))), mask)
        out = F.dropout(out, self.dropout, self.training)
        return _cut(F.relu_(self.bn2(self.conv2(out)) + identity), mask), mask


class Panns(nn.Module):
    """What CNN14 and ResNet38 share: log-mel (clip, frame, mel) in dB to frames (clip, time, 32 * width).

    `summary` is None: the papers pool the frames. `fc1` and `fc_audioset` are kept so that checkpoints load whole; they
    are used by `tags` alone. `width` is the channels of the first block, 64 in the papers; with `input_pool` (frames,
    mel bins), (1, 1) in the papers, a small network starts from averaged log-mels, at that much less cost. `dropout`
    is that between blocks; residual blocks have half of it and the head two and a half times: 0.2, 0.1 and 0.5 in the
    papers.
    """

    min_frames: int
    dim: int

    def __init__(self, n_classes: int, width: int, n_mels: int, input_pool: tuple[int, int], dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.n_mels, self.dim, self.input_pool = n_mels, 32 * width, (input_pool[0], input_pool[1])
        self.bn0 = nn.BatchNorm2d(n_mels)
        self.fc1 = nn.Linear(self.dim, self.dim)
        self.fc_audioset = nn.Linear(self.dim, n_classes)
        for fc in (self.fc1, self.fc_audioset):
            nn.init.xavier_uniform_(fc.weight)
            nn.init.zeros_(fc.bias)

    def forward(
        self, logmel: Float[Tensor, "clip frame mel"], mask: Bool[Tensor, "clip frame"] | None = None
    ) -> AudioFeatures:
        """Encode log-mels; `mask` is True on the valid log-mel frames, which come first. In training mode, SpecAugment.

        Raises DataError where a clip is too short for a single output frame.
        """
        n_clips, n_frames, n_mels = logmel.shape
        if n_mels != self.n_mels:
            raise DataError(f"log-mels have {n_mels} mel bins; this network was built for {self.n_mels}.")
        shortest = n_frames if mask is None else int(mask.sum(1).min())
        needed = self.min_frames * self.input_pool[0]
        if shortest < needed:
            raise DataError(
                f"{type(self).__name__}: a clip has {shortest} log-mel frames and pooling needs {needed}: "
                f"at least {(needed - 1) * HOP} samples at 32 kHz. Leave shorter clips out."
            )
        x = self.bn0(logmel.transpose(1, 2)[..., None]).permute(0, 3, 2, 1)  # normalised per mel bin
        if self.training:
            x = spec_augment(x)
        x, mask = self._trunk(*_shrink(_cut(x, mask), mask, self.input_pool))
        frames = x.mean(3).transpose(1, 2)
        if mask is None:
            mask = torch.ones(n_clips, frames.shape[1], dtype=torch.bool, device=frames.device)
        return AudioFeatures(None, frames, mask)

    @property
    def frame_s(self) -> float:
        """Seconds from one output frame to the next: frame t is made from t * frame_s on, and of what lies around."""
        return self.min_frames * self.input_pool[0] / LOGMEL_ROWS_PER_S

    def _trunk(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def tags(self, features: AudioFeatures) -> Float[Tensor, "clip class"]:
        """Probabilities of AudioSet's classes, by upstream's head: max plus mean over time, then two linear layers."""
        keep = features.mask[..., None]
        largest = features.frames.masked_fill(~keep, -torch.inf).amax(1)
        mean = (features.frames * keep).sum(1) / keep.sum(1)
        x = F.dropout(largest + mean, 2.5 * self.dropout, self.training)
        x = F.dropout(F.relu_(self.fc1(x)), 2.5 * self.dropout, self.training)
        return torch.sigmoid(self.fc_audioset(x))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's, ignoring the front end that upstream keeps in its checkpoints."""
        kept = {k: v for k, v in state_dict.items() if not k.startswith(FRONT_END)}
        return super().load_state_dict(kept, strict=strict, assign=assign)


class Cnn14(Panns):
    """CNN14: six blocks of two convolutions. 10 s (1001 log-mel frames) give 15 frames, or 31 with `block6_pool` 1.

    `block6_pool` is 2 in Mei et al.'s retrieval code, which the papers build on, and 1 in PANNs itself.
    """

    def __init__(
        self,
        n_classes: int = 527,
        width: int = 64,
        n_mels: int = 64,
        block6_pool: int = 2,
        input_pool: tuple[int, int] = (1, 1),
        dropout: float = 0.2,
    ) -> None:
        super().__init__(n_classes, width, n_mels, input_pool, dropout)
        if block6_pool not in (1, 2):
            raise ConfigError(f"Cnn14: block6_pool is {block6_pool}; it must be 1 (PANNs) or 2 (Mei et al.).")
        self.block6_pool = block6_pool
        self.min_frames = 32 * block6_pool
        sizes = [1, *(width * 2**i for i in range(6))]
        for i in range(6):
            self.add_module(f"conv_block{i + 1}", ConvBlock(sizes[i], sizes[i + 1]))

    def _trunk(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for i in range(1, 7):
            x, mask = self.get_submodule(f"conv_block{i}")(x, mask, self.block6_pool if i == 6 else 2)
            x = F.dropout(x, self.dropout, self.training)
        return x, mask


class ResNet38(Panns):
    """ResNet38: a convolution block, sixteen residual blocks, a convolution block. 10 s give 31 frames."""

    min_frames = 32

    def __init__(
        self,
        n_classes: int = 527,
        width: int = 64,
        n_mels: int = 64,
        input_pool: tuple[int, int] = (1, 1),
        dropout: float = 0.2,
    ) -> None:
        super().__init__(n_classes, width, n_mels, input_pool, dropout)
        self.conv_block1 = ConvBlock(1, width)
        self.resnet = nn.Module()
        n_in = width
        for stage, n_blocks in enumerate((3, 4, 6, 3)):
            n_out = width * 2**stage
            blocks = [ResidualBlock(n_in, n_out, halves=stage > 0, dropout=dropout / 2)]
            blocks += [ResidualBlock(n_out, n_out, halves=False, dropout=dropout / 2) for _ in range(n_blocks - 1)]
            self.resnet.add_module(f"layer{stage + 1}", nn.ModuleList(blocks))
            n_in = n_out
        self.conv_block_after1 = ConvBlock(n_in, 32 * width)

    def _trunk(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x, mask = self.conv_block1(x, mask, 2)
        x = F.dropout(x, self.dropout, self.training)
        for stage in self.resnet.children():
            for block in stage.children():
                x, mask = block(x, mask)
        mask = _halve(mask)
        x = F.dropout(_cut(F.avg_pool2d(x, 2), mask), self.dropout, self.training)
        x, mask = self.conv_block_after1(x, mask, 1)
        return F.dropout(x, self.dropout, self.training), mask


ENCODERS: dict[str, type[Panns]] = {"cnn14": Cnn14, "resnet38": ResNet38}
