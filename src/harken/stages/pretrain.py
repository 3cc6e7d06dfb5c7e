"""Stage `pretrain`: audio-image contrastive training of the audio ViT, CLIP frozen as the pivot (Tsubaki et al. 2024).

The training clips are those that `stats` was computed on: one split less the held-out ones (AudioCaps val and test).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch

from harken.clips import Manifest, Split
from harken.config import Config, Paths
from harken.engines import Map
from harken.errors import DataError
from harken.evaluation.metrics import retrieval_metrics
from harken.evaluation.protocols import PROTOCOLS
from harken.media.quality import flagged
from harken.models.audio_vit import AudioViT
from harken.models.matching import MATCHES
from harken.models.towers import AudioTower
from harken.progress import track
from harken.shards import code_version, digest_of, file_sha256, fingerprint
from harken.stages.stats import training_ids
from harken.stages.weights import load_visual
from harken.training.batches import Features, Order, ShardOrder
from harken.training.data import ImageEmbeddings, read_stats
from harken.training.loop import Plan, fit
from harken.training.optim import OptimizerConfig, build
from harken.training.runs import device, devices, finish, folder_of, publish_runs, run_name, seeds_times, unfinished
from harken.training.tasks import AudioImage, AugmentConfig, FbankInput

log = logging.getLogger("harken")
CODE = (
    "stages/pretrain.py",
    "media/quality.py",
    "training",
    "models",
    "evaluation/metrics.py",
    "evaluation/protocols.py",
)


class RandomImage(Config):
    """VIP-ANT: one image of the clip at random, each step."""

    match: Literal["random_image"]


class NearestImage(Config):
    """Nearest Match: random for `n_warmup` epochs, then the image most similar to the audio."""

    match: Literal["nearest_image"]
    n_warmup: int
    scope: Literal["own_clip", "all_pairs"]


class Multiframe(Config):
    """Multiframe Match: all images against as many audio segments."""

    match: Literal["multiframe"]
    row_norm: bool


Recipe = RandomImage | NearestImage | Multiframe


class VitConfig(Config):
    """The audio ViT's input: `n_frames` fbank frames, patches `stride` (frames, mel bins) apart; the rest is CLIP's."""

    n_frames: int
    stride: tuple[int, int]
    checkpointing: bool


class PretrainConfig(Config):
    """One run per recipe and seed. `val_images` names the image protocol by which the best epoch is chosen.

    `shards_at_once`: null draws each batch from all clips; a number draws it from so many shards at a time, so that
    features which do not fit in memory are read once an epoch, in order. It decides about batches, so about results.
    """

    vit: VitConfig
    augment: AugmentConfig
    batch: int
    shards_at_once: int | None
    epochs: int
    optimizer: OptimizerConfig
    checkpoint_every: int
    select: Literal["best", "last"]
    val_images: Literal["mid", "max", "mean", "flatten"]
    seeds: list[int]
    recipes: dict[str, Recipe]


class Job(Config):
    paths: Paths
    pretrain: PretrainConfig
    marks: dict[str, str]


def run(paths: Paths, cfg: PretrainConfig, map: Map) -> None:
    """Fill `paths.pretrained` with one folder per run."""
    work = paths.work / "pretrain"
    runs = {run_name(r, s): (r, s) for r, s in seeds_times(cfg.recipes, cfg.seeds)}
    shared = cfg.model_dump(exclude={"recipes", "seeds", "checkpoint_every"})
    data = [digest_of(paths.features), digest_of(paths.embeddings), file_sha256(paths.stats / "stats.json")]
    data += [file_sha256(paths.weights / "weights.json"), code_version(CODE)]
    marks = {n: fingerprint(shared, cfg.recipes[r].model_dump(), s, data) for n, (r, s) in runs.items()}
    todo = unfinished(work, marks)
    job = Job(paths=paths, pretrain=cfg, marks=marks)
    items = [(name, *runs[name]) for name in todo]
    for _ in track(map(trainer, job, items, devices=devices()), len(items), "pretrain: runs"):
        pass
    publish_runs(work, paths.pretrained, marks)


def trainer(job: Job) -> Callable[[tuple[str, str, int]], str]:
    return partial(train_one, job)


def train_one(job: Job, item: tuple[str, str, int]) -> str:
    """Train one run to its end, from its checkpoint if it has one."""
    name, recipe, seed = item
    paths, cfg = job.paths, job.pretrain
    train, val, facts = split_ids(paths)
    images = ImageEmbeddings(paths.embeddings)
    train, val = [c for c in train if c in images], [c for c in val if c in images]
    if not train or not val:
        raise DataError(
            f"{paths.embeddings}: {len(train)} training and {len(val)} validation clips have images; need some of both."
        )
    settings = cfg.recipes[recipe]
    n_segments = int(images.of(train[:1]).shape[1]) if isinstance(settings, Multiframe) else 1
    tower = build_tower(paths, cfg.vit, n_segments, seed).to(device())
    # a clip that is turned round no longer has its segments where its images are
    augment = cfg.augment.model_copy(update={"roll": cfg.augment.roll and n_segments == 1})
    read = fbank_input(paths, cfg.vit, augment)
    match = MATCHES[settings.match](**settings.model_dump(exclude={"match"}))
    task = AudioImage(
        tower,
        match,
        read,
        train,
        images.of(train),
        val,
        images.of(val),
        PROTOCOLS[cfg.val_images],
        partial(retrieval_metrics, ks=(1,)),
    )
    order: Order | ShardOrder = Order(len(train), cfg.batch, seed)
    if cfg.shards_at_once is not None:
        of_clip = read.features.shards(read.features.numbers(train))
        order = ShardOrder(of_clip, cfg.shards_at_once, cfg.batch, seed)
    optimizer, factor = build(cfg.optimizer, tower, cfg.batch, order.steps_per_epoch, cfg.epochs)
    plan = Plan(cfg.epochs, seed, factor, None, cfg.checkpoint_every, cfg.select)
    folder = folder_of(paths.work / "pretrain", name, job.marks[name])
    state = fit(task, optimizer, order, plan, folder, f"pretrain {name}")
    told = {"recipe": recipe, "seed": seed, "n_segments": n_segments, "vit": cfg.vit.model_dump()}
    told |= {"n_train": len(train), "n_val": len(val), **facts}
    finish(folder, tower, state, told)
    return name


def split_ids(paths: Paths) -> tuple[list[str], list[str], Mapping[str, Any]]:
    """Training and validation ids with features, and how many training clips were held out or left out."""
    stats = read_stats(paths.stats)
    manifest, features = Manifest.read(paths.manifest), Features(paths.features, "fbank")
    exclude = {d: [Split(s) for s in splits] for d, splits in stats["exclude"].items()}  # type: ignore[attr-defined]
    dataset, split = str(stats["dataset"]), str(stats["split"])
    kept = training_ids(manifest, dataset, split, exclude)
    doubtful = flagged(paths.features, stats["leave_out"])  # type: ignore[arg-type]
    told = {"dataset": dataset, "n_held_out": len(manifest.of(dataset, split)) - len(kept)}
    told["n_left_out"] = sum(i in doubtful for i in kept)
    val = [i for i in manifest.of(dataset, Split.VAL)["clip_id"].to_pylist() if i in features]
    return [i for i in kept if i in features and i not in doubtful], val, told


def build_tower(paths: Paths, cfg: VitConfig, n_segments: int, seed: int) -> AudioTower:
    """The audio tower at its start: CLIP's image tower, positions interpolated to the FBANK's grid."""
    torch.manual_seed(seed)
    visual, heads = load_visual(paths.weights)
    vit = AudioViT.from_clip(
        visual,
        n_frames=cfg.n_frames // n_segments,
        stride=cfg.stride,
        heads=heads,
        checkpointing=cfg.checkpointing,
    )
    return AudioTower(vit, n_segments)


def fbank_input(paths: Paths, cfg: VitConfig, augment: AugmentConfig | None) -> FbankInput:
    """FBANK of any clip, normalised by the dataset's statistics."""
    stats = read_stats(paths.stats)
    mean, std = float(stats["mean"]), float(stats["std"])  # type: ignore[arg-type]
    return FbankInput(Features(paths.features, "fbank"), cfg.n_frames, mean, std, augment, device())
