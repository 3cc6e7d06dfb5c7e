"""The three tasks that `fit` runs: audio with images, with captions through CLIP, with captions through BERT."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from harken.config import Config
from harken.errors import DataError
from harken.media.logmel import FLOOR
from harken.models.features import AudioFeatures, Part
from harken.models.losses import LOSSES
from harken.models.matching import Match
from harken.models.panns import Panns
from harken.models.towers import AudioTower, TextAudio, text_similarity
from harken.training import distributed
from harken.training.batches import Clips, Features, Order, ShardOrder
from harken.training.loader import Batch, Loader, one_pass

Score = Callable[[np.ndarray, list[np.ndarray]], Mapping[str, float]]
"""(scores (query, item), relevant items of each query) -> metrics; passed in by the stage from harken.evaluation."""

SILENCE_DB = 10 * math.log10(FLOOR)
"""What log-mels are of samples that are zero."""


class AugmentConfig(Config):
    """What is done to FBANK in training.

    The papers' own is SpecAugment: one mask each, `freq_mask` bins and `time_mask` frames at most. Small corpora need
    more: `roll` turns the clip round in time by a random amount (not before Multiframe Match, whose segments must meet
    their images), `gain_db` makes it louder or softer by up to that much.
    """

    freq_mask: int
    time_mask: int
    roll: bool
    gain_db: float


@dataclass(frozen=True)
class FbankInput:
    """Reads, pads and normalises FBANK; augments it in training."""

    features: Features
    n_frames: int
    mean: float
    std: float
    augment: AugmentConfig | None
    device: torch.device

    def loader(self, order: Order | ShardOrder, clip_ids: Sequence[str]) -> Loader:
        """The training clips in batches, read ahead."""
        return Loader(order, self.features, clip_ids, self.n_frames, self.device)

    def one_pass(self, clip_ids: Sequence[str], batch: int) -> AbstractContextManager[Iterator[Clips]]:
        """Clips in the given order, read ahead."""
        return one_pass(self.features, clip_ids, batch, self.n_frames, self.device)

    def __call__(
        self, clips: Clips, generator: torch.Generator | None, part: Part | None = None
    ) -> Float[Tensor, "clip frame mel"]:
        """(clip, n_frames, mel), normalised; clips shorter than n_frames are padded with raw 0 before it (VIP-ANT).

        Augmented where a `generator` is given and there is an `augment`, untouched otherwise. `part` says which clips
        of a shared batch these are.
        """
        fbank = clips.on(self.device).sub_(self.mean).div_(self.std)
        if generator is None or self.augment is None:
            return fbank
        n_clips, n_frames, n_mels = fbank.shape
        how, (first, of) = self.augment, part or Part(0, n_clips)

        def draw() -> Tensor:
            """Uniform in [0, 1), one number a clip: drawn for all clips of the batch, wherever they are."""
            return torch.rand(of, generator=generator)[first : first + n_clips]

        if how.roll:
            by = torch.randint(n_frames, (of,), generator=generator)[first : first + n_clips].tolist()
            fbank = torch.stack([clip.roll(n, 0) for clip, n in zip(fbank, by, strict=True)])
        if how.gain_db:
            nats = how.gain_db * math.log(10) / 10  # of energy, as the FBANK's logarithm is
            gain = (2 * draw()[:, None, None] - 1) * nats / self.std
            fbank += gain.to(self.device)
        for size, axis, limit in ((n_mels, 1, how.freq_mask), (n_frames, 0, how.time_mask)):
            width = draw() * limit
            start = draw() * (size - width)
            ends = torch.stack([start, start + width]).long().T.tolist()
            for clip, (start_at, end_at) in zip(fbank, ends, strict=True):
                clip.narrow(axis, start_at, end_at - start_at).zero_()  # 0 is the mean, after normalisation
        return fbank


def embed_clips(
    encode: Callable[[Tensor], Tensor], read: FbankInput, clip_ids: Sequence[str], *, batch: int = 64
) -> Tensor:
    """What `encode` makes of clips without augmentation, a row for each: an AudioTower's `segments` or `pooled`.

    Raises DataError where it is not finite, and names the clips.
    """
    with read.one_pass(clip_ids, batch) as batches:
        found = torch.cat([encode(read(clips, None)).cpu() for clips in batches]).float()
    finite = torch.isfinite(found).flatten(1).all(1).tolist()
    if bad := [clip for clip, fine in zip(clip_ids, finite, strict=True) if not fine]:
        few = ", ".join(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
        raise DataError(
            f"the embedding of {few} is not finite. Look at its features; if they are finite, the model has diverged."
        )
    return found


def _names(clip_ids: Sequence[str], batch: Batch) -> list[str]:
    """The clips of a batch; those whose features are not finite are marked."""
    bad = ~torch.isfinite(batch.clips.values).flatten(1).all(1)
    return [
        f"{clip_ids[i]} (its features are not finite)" if b else clip_ids[i]
        for i, b in zip(batch.items, bad.tolist(), strict=True)
    ]


def shared_infonce(along: Tensor, down: Tensor, part: Part) -> Tensor:
    """One process's share of InfoNCE over a batch that processes share; the sum of the shares is `infonce(sim)`.

    `along` (own row, clip) and `down` (row, own clip) are the scaled similarities of its own images or texts with all
    clips, and of all of them with its own clips.
    """
    own = torch.arange(part.first, part.first + len(along), device=along.device)
    cross_entropy = partial(nn.functional.cross_entropy, reduction="sum")
    return (cross_entropy(along, own) + cross_entropy(down.T, own)) / part.of


def contrast(similarity: Callable[[Tensor, Tensor], Tensor], rows: Tensor, columns: Tensor, part: Part) -> Tensor:
    """InfoNCE of a batch from its two sides, or this process's share of it (see `distributed`)."""
    group = distributed.group()
    if group.size == 1:
        return LOSSES["infonce"](similarity(rows, columns))
    return shared_infonce(similarity(rows, group.rows(columns)), similarity(group.rows(rows), columns), part)


@dataclass
class AudioImage:
    """Audio-image pretraining with frozen CLIP image embeddings (Tsubaki et al. 2024, section II-C).

    `encode` is the tower as it computes in training (see `compute` and `distributed`).
    """

    model: AudioTower
    encode: nn.Module
    match: Match
    read: FbankInput
    clip_ids: Sequence[str]
    images: Float[Tensor, "clip image dim"]
    val_ids: Sequence[str]
    val_images: Float[Tensor, "val image dim"]
    sim_of: Callable[[np.ndarray, np.ndarray], np.ndarray]
    score: Score

    def batches(self, order: Order | ShardOrder) -> Loader:
        return self.read.loader(order, self.clip_ids)

    def names(self, batch: Batch) -> Sequence[str]:
        return _names(self.clip_ids, batch)

    def loss(self, batch: Batch, epoch: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        audio = self.encode(self.read(batch.clips, generator, batch.part))
        images = self.images[torch.from_numpy(batch.items)].to(audio.device)
        rows, columns = self.match.sides(
            audio if self.model.n_segments > 1 else audio[:, 0], images, epoch, generator, batch.part
        )
        return contrast(lambda i, a: self.model.scaled(self.match.similarity(i, a)), rows, columns, batch.part), {}

    def validate(self) -> Mapping[str, float]:
        plain = getattr(self.encode, "module", self.encode)
        audio = distributed.group().spread(self.val_ids, partial(embed_clips, plain, self.read))
        if self.model.n_segments == 1:
            audio = audio[:, 0]  # one vector of the whole clip, to meet every image
        sim = self.sim_of(audio.numpy(), self.val_images.numpy())
        own = [np.array([i]) for i in range(len(sim))]
        i2a, a2i = self.score(sim, own), self.score(sim.T, own)
        return {"val_a2i_R@1": a2i["R@1"], "val_i2a_R@1": i2a["R@1"], "score": a2i["R@1"] + i2a["R@1"]}


def text_scores(sim: np.ndarray, clip_of: np.ndarray, score: Score) -> dict[str, float]:
    """Both directions of a (caption, clip) matrix; an audio query is right when any of its captions is found."""
    t2a = score(sim, [np.array([c]) for c in clip_of])
    a2t = score(sim.T, [np.flatnonzero(clip_of == c) for c in range(sim.shape[1])])
    return {f"val_t2a_{k}": v for k, v in t2a.items() if k.startswith("R@")} | {
        f"val_a2t_{k}": v for k, v in a2t.items() if k.startswith("R@")
    }


@dataclass(frozen=True)
class Captions:
    """The captions of a split: `of[i]` are the numbers of clip i's captions; `clip_of[c]` is the reverse."""

    clip_ids: Sequence[str]
    texts: Sequence[str]
    of: Sequence[np.ndarray]
    clip_of: np.ndarray

    @staticmethod
    def build(clips: Sequence[tuple[str, Sequence[str]]]) -> Captions:
        texts: list[str] = []
        of = []
        for _, captions in clips:
            of.append(np.arange(len(texts), len(texts) + len(captions)))
            texts.extend(captions)
        clip_of = np.repeat(np.arange(len(clips)), [len(o) for o in of])
        return Captions([c for c, _ in clips], texts, of, clip_of)

    def draw(self, items: np.ndarray, generator: torch.Generator, part: Part | None = None) -> np.ndarray:
        """One caption number per clip, uniform over its captions, so that the diagonal is the positives."""
        first, of = part or Part(0, len(items))
        u = torch.rand(of, generator=generator)[first : first + len(items)].numpy()
        return np.array([self.of[i][int(v * len(self.of[i]))] for i, v in zip(items, u, strict=True)])


@dataclass
class AudioText:
    """Audio-text fine-tuning against frozen CLIP caption embeddings (Tsubaki et al. 2024, section II-D)."""

    model: AudioTower
    encode: nn.Module
    read: FbankInput
    train: Captions
    texts: Float[Tensor, "caption dim"]
    val: Captions
    val_texts: Float[Tensor, "val_caption dim"]
    score: Score

    def batches(self, order: Order | ShardOrder) -> Loader:
        return self.read.loader(order, self.train.clip_ids)

    def names(self, batch: Batch) -> Sequence[str]:
        return _names(self.train.clip_ids, batch)

    def loss(self, batch: Batch, epoch: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        audio = self.encode(self.read(batch.clips, generator, batch.part))
        drawn = self.train.draw(batch.items, generator, batch.part)
        text = self.texts[torch.from_numpy(drawn)].to(audio.device)
        return contrast(lambda t, a: self.model.scaled(text_similarity(t, a)), text, audio, batch.part), {}

    def validate(self) -> Mapping[str, float]:
        plain = getattr(self.encode, "module", self.encode)
        audio = distributed.group().spread(self.val.clip_ids, partial(embed_clips, plain, self.read))
        sim = text_similarity(self.val_texts, audio).numpy()
        metrics = text_scores(sim, self.val.clip_of, self.score)
        return metrics | {"score": metrics["val_t2a_R@1"] + metrics["val_a2t_R@1"]}


@dataclass
class Tagging:
    """Clips and the labels they carry, as PANNs were pretrained (Kong et al. 2020): binary cross-entropy per label."""

    model: Panns
    features: Features
    n_rows: int
    clip_ids: Sequence[str]
    tags: Float[Tensor, "clip label"]
    device: torch.device

    def batches(self, order: Order | ShardOrder) -> Loader:
        return Loader(order, self.features, self.clip_ids, self.n_rows, self.device)

    def names(self, batch: Batch) -> Sequence[str]:
        return _names(self.clip_ids, batch)

    def loss(self, batch: Batch, epoch: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        found = self.model.tags(self.model(batch.clips.on(self.device), batch.clips.valid_on(self.device)))
        wanted = self.tags[torch.from_numpy(batch.items)].to(self.device)
        # summed over labels: a mean over hundreds of mostly absent ones would hardly move the network
        return nn.functional.binary_cross_entropy(found.clamp(1e-6, 1 - 1e-6), wanted) * wanted.shape[1], {}

    def validate(self) -> Mapping[str, float]:
        return {"score": 0.0}  # the last weights are taken; what they are worth shows in what is trained from them


def _lengthened(x: Tensor, n_frames: int) -> Tensor:
    """(clip, frame, ...) with frames of zeros, or False, at the end up to `n_frames`."""
    return torch.cat([x, x.new_zeros(len(x), n_frames - x.shape[1], *x.shape[2:])], dim=1)


@dataclass
class TextToAudio:
    """Paper A: PANNs and BERT, a pooling and a loss (Xin et al. 2023).

    `features` are what the audio tower hears: log-mels, or, with `is_encoded`, its own frames, made once because it is
    frozen. `loss_of` is called as the LOSSES are, with the batch's clip numbers, and with the `temperature` where the
    model has one. The items of the order are clips, each with one of its captions at random, or, with `by_caption`,
    captions. `padding` is how clips shorter than `n_rows` are heard: `masked` are what they are alone; `fixed` and
    `longest` take padding for sound, up to `n_rows` or to the batch's longest clip, as Mei et al.'s code does.
    """

    model: TextAudio
    tokenize: Callable[[Sequence[str]], Any]
    loss_of: Callable[..., Tensor]
    features: Features
    n_rows: int
    train: Captions
    val: Captions
    score: Score
    device: torch.device
    batch: int = 32
    is_encoded: bool = False
    by_caption: bool = False
    padding: str = "masked"

    @property
    def _item_ids(self) -> Sequence[str]:
        ids = self.train.clip_ids
        return [ids[c] for c in self.train.clip_of] if self.by_caption else ids

    def batches(self, order: Order | ShardOrder) -> Loader:
        return Loader(order, self.features, self._item_ids, self.n_rows, self.device)

    def names(self, batch: Batch) -> Sequence[str]:
        return _names(self._item_ids, batch)

    def loss(self, batch: Batch, epoch: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        drawn = batch.items if self.by_caption else self.train.draw(batch.items, generator)
        text = self.model.encode_text(self._tokens([self.train.texts[c] for c in drawn]))
        sim = self.model.similarity(text, self._audio(batch.clips))
        learnt, extra = {}, {"diagonal": float(sim.detach().diagonal().mean())}
        if self.model.temperature is not None:
            learnt["temperature"] = self.model.temperature()
            extra["temperature"] = float(learnt["temperature"].detach())
        return self.loss_of(sim, torch.from_numpy(self.train.clip_of[drawn]), **learnt), extra

    def similarity(self, captions: Captions) -> np.ndarray:
        """(caption, clip) cosine similarities of a whole split."""
        return self.model.score(self.texts(captions.texts), self.clips(captions.clip_ids)).float().cpu().numpy()

    def clips(self, clip_ids: Sequence[str]) -> AudioFeatures:
        """What the model makes of clips (see `TextAudio.project`), all in memory: to be scored, or looked into."""
        with one_pass(self.features, clip_ids, self.batch, self.n_rows, self.device) as batches:
            found = [self._audio(clips) for clips in batches]
        n_frames = max(f.frames.shape[1] for f in found)
        frames, masks = ([_lengthened(getattr(f, k), n_frames) for f in found] for k in ("frames", "mask"))
        return AudioFeatures(None, torch.cat(frames), torch.cat(masks))

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "caption joint"]:
        """The projected captions."""
        step = 4 * self.batch
        parts = [self._tokens(texts[i : i + step]) for i in range(0, len(texts), step)]
        return torch.cat([self.model.encode_text(tokens) for tokens in parts])

    def _audio(self, clips: Clips) -> AudioFeatures:
        heard, valid = clips.on(self.device), clips.valid_on(self.device)
        if self.padding == "longest":
            longest = int(clips.n_valid.max())
            heard, valid = heard[:, :longest], valid[:, :longest]
        if self.padding != "masked":
            if isinstance(self.model.audio, Panns):
                heard = heard.masked_fill(~valid[..., None], SILENCE_DB)  # they pad the samples, not the log-mels
            valid = torch.ones_like(valid)
        return (
            self.model.project(AudioFeatures(None, heard, valid))
            if self.is_encoded
            else self.model.encode_audio(heard, valid)
        )

    def validate(self) -> Mapping[str, float]:
        metrics = text_scores(self.similarity(self.val), self.val.clip_of, self.score)
        return metrics | {"score": sum(metrics.values())}

    def _tokens(self, texts: Sequence[str]) -> Any:
        return {k: v.to(self.device) for k, v in self.tokenize(texts).items()}
