"""Whole models: towers put together as the two papers do, with what is trainable and nothing else inside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from harken.errors import ConfigError, DataError, unknown
from harken.models.audio_vit import AudioViT
from harken.models.features import AudioFeatures, full, full_precision
from harken.models.losses import LearnedTemperature
from harken.models.pooling import cosine_similarity
from harken.models.scoring import batch_similarity, score_matrix

LOGIT_SCALE_INIT = math.log(1 / 0.07)  # VIP-ANT; learnable, not clamped
DIVISIONS = ("segment", "token_pool", "window")
AT_POOLS = ("mean", "flatten_repeat", "full_clip")
PRE_PROJECTION = ("mean", "max", "meanmax")  # pooled on the encoder's frames; the others pool projected frames


class AudioTower(nn.Module):
    """Paper B's trainable part: the audio ViT and the logit scale. CLIP's towers stay outside, in their cache.

    `n_segments` > 1 is Multiframe Match's audio side, one embedding for each image (Tsubaki et al. 2024, section
    II-C.2, which does not say how). `division` is where they come from:

    - `segment`: the FBANK is cut into as many equal stretches, and each is embedded alone, CLS to proj.
    - `token_pool`: the whole clip is embedded once; its tokens are averaged over mel and over as many bins of time
      (`AudioViT.binned`). CLS is not read, so what `full_clip` reads of such a tower nobody has trained.
    - `window`: as `segment`, but each stretch is centred where its image was taken: `centres`, fractions of the FBANK
      in [0, 1], which only this division looks at. A window that would stick out is moved inside, so windows overlap
      and none is padded.

    `at_pool` is how such a tower meets a text, of which there is one (section II-D): see `pooled`. Neither adds a
    parameter. Raises ConfigError for a name that is not known, and for centres that are not one in [0, 1] a segment.
    """

    def __init__(
        self,
        vit: AudioViT,
        n_segments: int = 1,
        *,
        division: str = "segment",
        centres: Sequence[float] | None = None,
        at_pool: str = "mean",
    ) -> None:
        super().__init__()
        if division not in DIVISIONS:
            raise unknown("AudioTower: division", division, DIVISIONS)
        if at_pool not in AT_POOLS:
            raise unknown("AudioTower: at_pool", at_pool, AT_POOLS)
        if n_segments < 1:
            raise ConfigError(f"AudioTower: n_segments is {n_segments}; it must be 1 or more.")
        if division == "window" and not _are_centres(centres, n_segments):
            raise ConfigError(
                f"AudioTower: division 'window' needs centres, {n_segments} fractions of the FBANK in [0, 1], one "
                f"for each segment; found {centres}. Give the images' times, divided by the FBANK's length."
            )
        self.vit = vit
        self.n_segments, self.division, self.at_pool = n_segments, division, at_pool
        self.centres = () if centres is None else tuple(centres)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE_INIT))

    def segments(self, fbank: Float[Tensor, "clip frame mel"]) -> Float[Tensor, "clip segment dim"]:
        """One embedding per segment, not normalised; a single segment is the whole clip."""
        if self.division == "token_pool":
            return self.vit.binned(fbank, self.n_segments)
        n_frames = fbank.shape[1]
        length = frames_of_pass(n_frames, self.n_segments, self.division)
        if self.division == "window":
            firsts = window_starts(n_frames, length, self.centres)
        else:
            firsts = [i * length for i in range(self.n_segments)]
        cut = torch.stack([fbank[:, i : i + length] for i in firsts], dim=1)
        return self.vit(cut.flatten(0, 1)).summary.unflatten(0, cut.shape[:2])

    def pooled(self, fbank: Float[Tensor, "clip frame mel"]) -> Float[Tensor, "clip dim"]:
        """One vector per clip for text, whose product with a unit text is their similarity: see `text_similarity`.

        By `at_pool`, in float32 at least:

        - `mean`: the mean of the normalised segment embeddings, of unit length, so the product is a cosine.
        - `flatten_repeat`: eq. 4 with the text in the place of every image, cos(flatten(a_all), (t, ..., t)) =
          t · Σ_l a_l / (√L |flatten(a_all)|) for a unit t. Its length, 1 where all segments are the same and less
          elsewhere, counts: not to be normalised.
        - `full_clip`: CLS of the whole clip in one pass, of unit length; positions are interpolated to its grid.
        """
        if self.at_pool == "full_clip":
            whole = self.vit(fbank).summary
            with full_precision(whole):
                return F.normalize(full(whole), dim=-1)
        segments = self.segments(fbank)
        with full_precision(segments):
            segments = full(segments)
            if self.at_pool == "flatten_repeat":
                return F.normalize(segments.flatten(1), dim=-1).view_as(segments).sum(1) / self.n_segments**0.5
            return F.normalize(F.normalize(segments, dim=-1).mean(1), dim=-1)

    def scaled(self, cosine: Float[Tensor, "row clip"]) -> Float[Tensor, "row clip"]:
        """`exp(logit_scale) * cosine`, in fp32 whatever the autocast mode."""
        return self.logit_scale.float().exp() * cosine.float()


def text_similarity(text: Float[Tensor, "row dim"], pooled: Float[Tensor, "clip dim"]) -> Float[Tensor, "row clip"]:
    """What every text, of any length, is to every clip of `AudioTower.pooled`, in [-1, 1]; float32 at least.

    A cosine, where `pooled` has unit length; where it is shorter, its length counts.
    """
    with full_precision(pooled):
        pooled = full(pooled)
        return F.normalize(full(text).to(pooled.dtype), dim=-1) @ pooled.T


def frames_of_pass(n_frames: int, n_segments: int, division: str) -> int:
    """How many fbank frames of `n_frames` the ViT sees at once: what to build it for, so that it need not interpolate.

    Those left over where segments do not divide the clip are dropped.
    """
    return n_frames if division == "token_pool" else n_frames // n_segments


def window_starts(n_frames: int, length: int, centres: Sequence[float]) -> list[int]:
    """The first fbank frame of windows of `length` around `centres`, fractions of `n_frames`, moved inside the clip.

    1000 frames, windows of 250 and images at both ends and thirds: 0, 208, 542, 750.
    """
    return [min(max(round(c * n_frames - length / 2), 0), n_frames - length) for c in centres]


def _are_centres(centres: Sequence[float] | None, n: int) -> bool:
    return centres is not None and len(centres) == n and all(0 <= c <= 1 for c in centres)


class StoredFrames(nn.Module):
    """The audio tower of frames that were made before, here or elsewhere: it gives back what it is given."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, frames: Float[Tensor, "clip frame dim"], valid: Bool[Tensor, "clip frame"]) -> AudioFeatures:
        return AudioFeatures(None, frames, valid)


class StoredTexts(nn.Module):
    """The text tower of embeddings that were made elsewhere, by their captions."""

    def __init__(self, captions: Sequence[str], embeddings: Float[Tensor, "caption dim"], where: str) -> None:
        super().__init__()
        self.dim, self.where, self._embeddings = embeddings.shape[1], where, embeddings
        self._row = {caption: i for i, caption in enumerate(captions)}

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Their embeddings. Raises DataError, which names `where` they should be, for captions that have none."""
        if lacking := [c for c in captions if c not in self._row]:
            raise DataError(
                f"{self.where}: {len(lacking)} of {len(captions)} captions have no embedding, first {lacking[0]!r}. "
                "Import texts that hold every caption of the dataset, to the letter."
            )
        return {"embedding": self._embeddings[[self._row[c] for c in captions]].float()}

    def forward(self, tokens: Mapping[str, Tensor]) -> Float[Tensor, "caption dim"]:
        return tokens["embedding"]


class TextAudio(nn.Module):
    """Paper A's model: audio and text encoders, projected to one space, pooled, compared (Xin et al. 2023, section 2).

    mean, max and meanmax pool the encoder's frames and project the result (Mei et al. 2022); netrvlad and tap project
    each frame and pool after it. `temperature`: the loss's τ where it is trained with the model.

    A tower without trainable weights stays in evaluation mode, and its batch norm, dropout and SpecAugment are frozen
    with it; with `frozen_in_training_mode` they are not, as in Mei et al.'s code.
    """

    def __init__(
        self,
        audio: nn.Module,
        text: nn.Module,
        pooling: nn.Module,
        name: str,
        dims: Mapping[str, Any],
        *,
        temperature: LearnedTemperature | None = None,
        frozen_in_training_mode: bool = False,
    ) -> None:
        super().__init__()
        self.audio, self.text, self.pooling, self.temperature = audio, text, pooling, temperature
        self.frozen_in_training_mode = frozen_in_training_mode
        self.pools_first = name in PRE_PROJECTION
        self.audio_projection = _mlp(dims["audio"], dims["hidden"], dims["joint"])
        self.text_projection = _mlp(dims["text"], dims["hidden"], dims["joint"])

    def train(self, mode: bool = True) -> TextAudio:
        super().train(mode)
        if self.frozen_in_training_mode:
            return self
        for tower in (self.audio, self.text):
            if not any(p.requires_grad for p in tower.parameters()):
                tower.eval()
        return self

    def encode_audio(self, heard: Float[Tensor, "clip row width"], valid: Bool[Tensor, "clip row"]) -> AudioFeatures:
        """What the audio tower hears of clips, log-mels for PANNs, as `project` gives it."""
        return self.project(self.audio(heard, valid))

    def project(self, features: AudioFeatures) -> AudioFeatures:
        """Projected frames (clip, frame, joint) and their mask; one frame where the pooling comes first."""
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
        return batch_similarity(text, audio.frames, audio.mask, self.pooling)

    def score(self, text: Float[Tensor, "text dim"], audio: AudioFeatures) -> Float[Tensor, "text clip"]:
        """The same matrix in tiles, exact, for whole test sets."""
        if self.pools_first:
            return cosine_similarity(text, audio.frames)
        return score_matrix(text, audio.frames, audio.mask, self.pooling)


def _mlp(dim: int, hidden: int, joint: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, joint))
