"""Stage `pretrain`: audio-image contrastive training of the audio ViT, CLIP frozen as the pivot (Tsubaki et al. 2024).

The training clips are those that `stats` was computed on: one split less the held-out ones (AudioCaps val and test).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from harken.clips import Manifest, Split
from harken.config import Config, Paths, parse
from harken.engines import Map
from harken.errors import ConfigError, DataError
from harken.evaluation.metrics import retrieval_metrics
from harken.evaluation.protocols import PROTOCOLS
from harken.media.quality import flagged
from harken.models.audio_vit import AudioViT
from harken.models.matching import MATCHES
from harken.models.towers import AudioTower, frames_of_pass
from harken.models.vipant import read_vipant, write_run
from harken.progress import track
from harken.shards import code_version, digest_of, file_sha256, read_table, shard_path, shards_in
from harken.stages.stats import training_ids
from harken.stages.weights import load_visual
from harken.training.batches import Features, Order, ShardOrder
from harken.training.compute import ComputeConfig, Encode, peak_flops, prepare, training_flops
from harken.training.curves import curves
from harken.training.data import ImageEmbeddings, read_stats
from harken.training.distributed import group, joined, parallel
from harken.training.loop import Plan, fit
from harken.training.optim import OptimizerConfig, build
from harken.training.runs import (
    SETTINGS,
    device,
    devices,
    finish,
    folder_of,
    left_to_do,
    publish_runs,
    run_name,
    seeds_times,
)
from harken.training.tasks import AudioImage, AugmentConfig, FbankInput

log = logging.getLogger("harken")
FRAME_SHIFT_S = 0.01  # of an fbank frame
Division = Literal["segment", "window", "token_pool"]
AtPool = Literal["mean", "flatten_repeat", "full_clip"]
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
    """Multiframe Match: all images, each against its share of the audio. `division` says what a share is: a `segment`
    of the clip embedded alone, a `window` round the image's time embedded alone, or a stretch of the whole clip's
    tokens (`token_pool`).
    """

    match: Literal["multiframe"]
    division: Division
    row_norm: bool


class Imported(Config):
    """No training: VIP-ANT's own audio tower, from its checkpoint at this path (see models.vipant).

    It heard FBANK at each recording's own rate, normalised by mean -4.93839311 and deviation 5.75751113; with other
    features (`extract.sample_rate_hz`, `stats`) it hears something else than it was trained on.
    """

    match: Literal["imported"]
    checkpoint: Path


Recipe = Annotated[RandomImage | NearestImage | Multiframe | Imported, Field(discriminator="match")]


class VitConfig(Config):
    """The audio ViT's input: `n_frames` fbank frames, patches `stride` (frames, mel bins) apart; the rest is CLIP's."""

    n_frames: int
    stride: tuple[int, int]


class SideConfig(Config):
    """What meets the images: one embedding of the whole clip, or `n_segments` of them; kept in a run's run.json.

    `centres`, as shares of the clip, are where windows lie.
    """

    n_segments: int
    division: Division
    centres: list[float] | None


WHOLE = SideConfig(n_segments=1, division="segment", centres=None)


class PretrainConfig(Config):
    """One run per recipe and seed. `val_images` names the image protocol by which the best epoch is chosen.

    `shards_at_once`: null draws each batch from all clips; a number draws it from so many shards at a time, so that
    features which do not fit in memory are read once an epoch, in order. It decides about batches, so about results.
    """

    vit: VitConfig
    compute: ComputeConfig
    augment: AugmentConfig
    batch: int
    drop_last: bool
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
    """Fill `paths.pretrained` with one folder per run.

    Raises DataError where a run was begun under other settings (see training.runs.unfinished).
    """
    work = paths.work / "pretrain"
    with joined(device()) as group:
        items, marks = group.told(partial(todo, paths, cfg, work))
        job = Job(paths=paths, pretrain=cfg, marks=marks)
        for _ in track(map(trainer, job, items, devices=devices()), len(items), "pretrain: runs"):
            pass
        if group.is_first:
            publish_runs(work, paths.pretrained, marks)


def todo(paths: Paths, cfg: PretrainConfig, work: Path) -> tuple[list[tuple[str, str, int]], dict[str, str]]:
    """The runs that are left, each with its recipe and seed, and the fingerprint of every run."""
    check_shards(paths, paths.features, paths.embeddings)
    runs = {run_name(r, s): (r, s) for r, s in seeds_times(cfg.recipes, cfg.seeds)}
    shared = cfg.model_dump(mode="json", exclude={"recipes", "seeds", "checkpoint_every"})
    data = {
        "features": digest_of(paths.features),
        "embeddings": digest_of(paths.embeddings),
        "stats": file_sha256(paths.stats / "stats.json"),
        "weights": file_sha256(paths.weights / "weights.json"),
    }
    code = code_version(CODE)
    settings = {}
    for name, (recipe, seed) in runs.items():
        own = cfg.recipes[recipe].model_dump(mode="json")
        own_data = data | _checkpoint_sha256(cfg.recipes[recipe])
        settings[name] = {"pretrain": shared, "recipe": own, "seed": seed, "data": own_data, "code": code}
    return left_to_do(work, runs, settings)


def _checkpoint_sha256(recipe: Recipe) -> dict[str, str]:
    """The hash of the checkpoint that a recipe imports, if it does."""
    if not isinstance(recipe, Imported):
        return {}
    if not recipe.checkpoint.is_file():
        raise DataError(f"{recipe.checkpoint}: no such checkpoint. Correct the path in params.yaml: pretrain.recipes.")
    return {"checkpoint": file_sha256(recipe.checkpoint)}


def trainer(job: Job) -> Callable[[tuple[str, str, int]], str]:
    return partial(train_one, job)


def train_one(job: Job, item: tuple[str, str, int]) -> str:
    """Train one run to its end, from its checkpoint if it has one; several processes train it together."""
    name, recipe, seed = item
    paths, cfg = job.paths, job.pretrain
    settings, folder = cfg.recipes[recipe], folder_of(paths.work / "pretrain", name, job.marks[name])
    if isinstance(settings, Imported):
        if group().is_first:
            _take_in(paths, cfg, settings, folder, recipe, seed)
        return name
    train, val, facts = split_ids(paths)
    images = ImageEmbeddings(paths.embeddings)
    train, val = [c for c in train if c in images], [c for c in val if c in images]
    if not train or not val:
        raise DataError(
            f"{paths.embeddings}: {len(train)} training and {len(val)} validation clips have images; need some of both."
        )
    side = WHOLE
    if isinstance(settings, Multiframe):
        side = _side(settings, int(images.of(train[:1]).shape[1]), paths, cfg.vit, train)
    prepare(cfg.compute)
    tower = build_tower(paths, cfg.vit, side, seed, compute=cfg.compute).to(device())
    # a clip that is turned round no longer has its segments where its images are
    augment = cfg.augment.model_copy(update={"roll": cfg.augment.roll and side.n_segments == 1})
    read = fbank_input(paths, cfg.vit, augment)
    match = MATCHES[settings.match](**settings.model_dump(exclude={"match", "division"}))
    task = AudioImage(
        tower,
        parallel(Encode(tower, "segments", cfg.compute)),
        match,
        read,
        train,
        images.of(train),
        val,
        images.of(val),
        PROTOCOLS[cfg.val_images],
        partial(retrieval_metrics, ks=(1,)),
    )
    order = _order(cfg, seed, read.features, train)
    optimizer, factor = build(cfg.optimizer, tower, cfg.batch, order.steps_per_epoch, cfg.epochs)
    speed = {"flops": training_flops(tower, cfg.vit.n_frames), "peak": peak_flops(device(), cfg.compute)}
    plan = Plan(cfg.epochs, seed, factor, None, cfg.checkpoint_every, cfg.select, **speed)
    state = fit(task, optimizer, order, plan, folder, f"pretrain {name}", watch=curves(folder))
    told = {"recipe": recipe, "seed": seed, "side": side.model_dump(), "vit": cfg.vit.model_dump()}
    told |= {"n_train": len(train), "n_val": len(val), **facts}
    if group().is_first:
        finish(folder, tower, state, told)
    return name


def _order(cfg: PretrainConfig, seed: int, features: Features, train: Sequence[str]) -> Order | ShardOrder:
    rank, world = group().rank, group().size
    if cfg.shards_at_once is None:
        return Order(len(train), cfg.batch, seed, cfg.drop_last, rank, world)
    of_clip = features.shards(features.numbers(train))
    return ShardOrder(of_clip, cfg.shards_at_once, cfg.batch, seed, cfg.drop_last, rank, world)


def _side(recipe: Multiframe, n_images: int, paths: Paths, vit: VitConfig, train: Sequence[str]) -> SideConfig:
    """Multiframe's audio side: as many embeddings as a clip has images; windows lie where most clips' images do."""
    if n_images < 2:
        raise ConfigError(
            "params.yaml: pretrain.recipes: multiframe needs two images a clip or more, and extract.n_images is "
            f"{n_images}. With one image it would be random_image: take that."
        )
    centres = None
    if recipe.division == "window":
        table, wanted = read_table(paths.features, ["image_times_s"]), set(train)
        rows = zip(table["clip_id"].to_pylist(), table["image_times_s"].to_pylist(), strict=True)
        times = np.array([t for i, t in rows if i in wanted])
        duration_s = vit.n_frames * FRAME_SHIFT_S
        centres = (np.median(times, axis=0) / duration_s).clip(0, 1).tolist()
    return SideConfig(n_segments=n_images, division=recipe.division, centres=centres)


def _take_in(paths: Paths, cfg: PretrainConfig, recipe: Imported, folder: Path, name: str, seed: int) -> None:
    """The run of a checkpoint from elsewhere."""
    found, like = read_vipant(recipe.checkpoint), build_tower(paths, cfg.vit, WHOLE, seed)
    told = {"recipe": name, "seed": seed, "side": WHOLE.model_dump(), "vit": cfg.vit.model_dump()}
    write_run(found, folder, like, told | {"dataset": str(read_stats(paths.stats)["dataset"])})
    (folder / SETTINGS).unlink(missing_ok=True)  # as `finish` does: it is of no use to a run that is done


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


def tower_of(told: Mapping[str, Any], where: str, stage: str) -> tuple[VitConfig, SideConfig]:
    """What the run.json of a run of `stage` says of its tower: what `build_tower` is to be given.

    Raises DataError where a harken before Multiframe's divisions wrote it.
    """
    if lacking := [key for key in ("vit", "side") if key not in told]:
        raise DataError(
            f"{where}: an older harken wrote it; it does not say {' and '.join(lacking)}, so nobody knows what tower "
            f"its weights are of. Run `dvc repro {stage}` again."
        )
    return parse(f"{where}: vit", VitConfig, told["vit"]), parse(f"{where}: side", SideConfig, told["side"])


def check_shards(paths: Paths, *folders: Path) -> None:
    """Raises DataError where a folder lacks a shard of the manifest: its clips would be missed by nobody."""
    wanted = Manifest.read(paths.manifest).shards
    for folder in folders:
        there = set(shards_in(folder))
        if lacking := [s for s in wanted if s not in there]:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise DataError(
                f"{shard_path(folder, lacking[0])}{more}: missing; the manifest names {len(wanted)} shards. Bring it "
                f"back with `dvc checkout {folder}`, or delete {folder} and run `dvc repro`."
            )


def build_tower(
    paths: Paths,
    cfg: VitConfig,
    side: SideConfig,
    seed: int,
    *,
    compute: ComputeConfig | None = None,
    at_pool: AtPool = "mean",
) -> AudioTower:
    """The audio tower at its start: CLIP's image tower, positions interpolated to the FBANK's grid."""
    torch.manual_seed(seed)
    visual, heads = load_visual(paths.weights)
    vit = AudioViT.from_clip(
        visual,
        n_frames=frames_of_pass(cfg.n_frames, side.n_segments, side.division),
        stride=cfg.stride,
        heads=heads,
        checkpointing=compute is not None and compute.checkpointing,
        fused_attention=compute is None or compute.fused_attention,
    )
    return AudioTower(vit, side.n_segments, division=side.division, centres=side.centres, at_pool=at_pool)


def fbank_input(paths: Paths, cfg: VitConfig, augment: AugmentConfig | None) -> FbankInput:
    """FBANK of any clip, normalised by the dataset's statistics."""
    stats = read_stats(paths.stats)
    mean, std = float(stats["mean"]), float(stats["std"])  # type: ignore[arg-type]
    return FbankInput(Features(paths.features, "fbank"), cfg.n_frames, mean, std, augment, device())
