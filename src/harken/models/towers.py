"""Whole models: towers put together as the two papers do, with what is trainable and nothing else inside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from harken.models.audio_vit import AudioViT
from harken.models.features import AudioFeatures
from harken.models.pooling import cosine_similarity
from harken.models.scoring import score_matrix

LOGIT_SCALE_INIT = math.log(1 / 0.07)  # VIP-ANT; learnable, not clamped
PRE_PROJECTION = ("mean", "max", "meanmax")  # pooled on the encoder's frames; the others pool projected frames


class AudioTower(nn.Module):
    """Paper B's trainable part: the audio ViT and the logit scale. CLIP's towers stay outside, in their cache.

    `n_segments` > 1 is Multiframe Match's audio side: the FBANK is cut into that many equal stretches, each embedded
    alone (Tsubaki et al. 2024, section II-C.2).
    """

    def __init__(self, vit: AudioViT, n_segments: int = 1) -> None:
        super().__init__()
        self.vit = vit
        self.n_segments = n_segments
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE_INIT))

    def segments(self, fbank: Float[Tensor, "clip frame mel"]) -> Float[Tensor, "clip segment dim"]:
        """One embedding per segment, not normalised; a single segment is the whole clip."""
        n_clips, n_frames, n_mels = fbank.shape
        length = n_frames // self.n_segments
        cut = fbank[:, : length * self.n_segments].reshape(n_clips * self.n_segments, length, n_mels)
        return self.vit(cut).summary.reshape(n_clips, self.n_segments, -1)

    def pooled(self, fbank: Float[Tensor, "clip frame mel"]) -> Float[Tensor, "clip dim"]:
        """One embedding per clip for text: the mean of the normalised segment embeddings (dossier B15)."""
        return F.normalize(self.segments(fbank), dim=-1).mean(1)

    def scaled(self, cosine: Float[Tensor, "row clip"]) -> Float[Tensor, "row clip"]:
        """`exp(logit_scale) * cosine`, in fp32 whatever the autocast mode."""
        return self.logit_scale.float().exp() * cosine.float()


class TextAudio(nn.Module):
    """Paper A's model: audio and text encoders, projected to one space, pooled, compared (Xin et al. 2023, section 2).

    mean, max and meanmax pool the encoder's frames and project the result (Mei et al. 2022); netrvlad and tap project
    each frame and pool after it.
    """

    def __init__(
        self, audio: nn.Module, text: nn.Module, pooling: nn.Module, name: str, dims: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.audio, self.text, self.pooling = audio, text, pooling
        self.pools_first = name in PRE_PROJECTION
        self.audio_projection = _mlp(dims["audio"], dims["hidden"], dims["joint"])
        self.text_projection = _mlp(dims["text"], dims["hidden"], dims["joint"])

    def train(self, mode: bool = True) -> TextAudio:
        """As nn.Module's, but a tower without trainable weights stays in evaluation mode: its batch norm, dropout and
        SpecAugment are frozen with it.
        """
        super().train(mode)
        for tower in (self.audio, self.text):
            if not any(p.requires_grad for p in tower.parameters()):
                tower.eval()
        return self

    def encode_audio(self, logmel: Float[Tensor, "clip row mel"], valid: Bool[Tensor, "clip row"]) -> AudioFeatures:
        """Projected frames (clip, frame, joint) and their mask; one frame where the pooling comes first."""
        features = self.audio(logmel, valid)
        if not self.pools_first:
            return AudioFeatures(None, self.audio_projection(features.frames), features.mask)
        text = features.frames.new_zeros(1, features.frames.shape[-1])  # these poolings do not look at it
        pooled = self.audio_projection(self.pooling(features.frames, features.mask, text))
        return AudioFeatures(None, pooled, torch.ones(pooled.shape[:2], dtype=torch.bool, device=pooled.device))

    def encode_text(self, tokens: Any) -> Float[Tensor, "text dim"]:
        """Projected [CLS] states."""
        return self.text_projection(self.text(tokens))

    def similarity(self, text: Float[Tensor, "text dim"], audio: AudioFeatures) -> Float[Tensor, "text clip"]:
        """Cosine similarity of every text with every clip, differentiable; for batches."""
        if self.pools_first:
            return cosine_similarity(text, audio.frames)
        return cosine_similarity(text, self.pooling(audio.frames, audio.mask, text))

    def score(self, text: Float[Tensor, "text dim"], audio: AudioFeatures) -> Float[Tensor, "text clip"]:
        """The same matrix in tiles, exact, for whole test sets."""
        if self.pools_first:
            return cosine_similarity(text, audio.frames)
        return score_matrix(text, audio.frames, audio.mask, self.pooling)


def _mlp(dim: int, hidden: int, joint: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, joint))
