"""Stage `finetune`: pretrained audio towers -> audio-text towers, CLIP's text tower frozen (Tsubaki et al. 2024)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from harken.clips import Manifest, Split
from harken.config import Config, Paths
from harken.engines import Map
from harken.errors import unknown
from harken.evaluation.metrics import retrieval_metrics
from harken.media.quality import Flag, flagged
from harken.models.towers import LOGIT_SCALE_INIT
from harken.progress import track
from harken.shards import code_version, digest_of, file_sha256, fingerprint
from harken.stages.pretrain import AtPool, build_tower, check_shards, fbank_input, tower_of
from harken.training.batches import Order
from harken.training.compute import ComputeConfig, Encode, peak_flops, prepare, training_flops
from harken.training.curves import curves
from harken.training.data import CaptionEmbeddings, captions_of
from harken.training.distributed import group, joined, parallel
from harken.training.loop import Plan, fit
from harken.training.optim import OptimizerConfig, build
from harken.training.runs import (
    device,
    devices,
    finish,
    folder_of,
    left_to_do,
    load_model,
    publish_runs,
    run_name,
    runs_in,
    seeds_times,
)
from harken.training.tasks import AudioText, AugmentConfig, Captions

log = logging.getLogger("harken")
CODE = ("stages/finetune.py", "stages/pretrain.py", "media/quality.py", "training", "models", "evaluation/metrics.py")


class FinetuneRecipe(Config):
    """`start` is the pretrain recipe whose run of the same seed is fine-tuned.

    `at_pool` makes one embedding of a clip whose tower makes several (Multiframe): the `mean` of them normalised,
    `flatten_repeat` (eq. 4 with the text repeated for each), or `full_clip` (one pass over the whole clip). For a tower
    that makes one, all three are that one.
    """

    start: str
    at_pool: AtPool


class FinetuneConfig(Config):
    """One run per recipe and seed, on the captioned clips of `dataset`; training leaves out those with such flags."""

    dataset: str
    leave_out: list[Flag]
    compute: ComputeConfig
    augment: AugmentConfig
    batch: int
    drop_last: bool
    epochs: int
    optimizer: OptimizerConfig
    checkpoint_every: int
    select: Literal["best", "last"]
    reset_logit_scale: bool
    seeds: list[int]
    recipes: dict[str, FinetuneRecipe]


class Job(Config):
    paths: Paths
    finetune: FinetuneConfig
    marks: dict[str, str]


def run(paths: Paths, cfg: FinetuneConfig, map: Map) -> None:
    """Fill `paths.finetuned` with one folder per run.

    Raises ConfigError where a recipe starts from an unknown run, and DataError where a run was begun under other
    settings (see training.runs.unfinished).
    """
    work = paths.work / "finetune"
    with joined(device()) as group:
        items, marks = group.told(partial(todo, paths, cfg, work))
        job = Job(paths=paths, finetune=cfg, marks=marks)
        for _ in track(map(trainer, job, items, devices=devices()), len(items), "finetune: runs"):
            pass
        if group.is_first:
            publish_runs(work, paths.finetuned, marks)


def todo(paths: Paths, cfg: FinetuneConfig, work: Path) -> tuple[list[tuple[str, str, int]], dict[str, str]]:
    """The runs that are left, each with its recipe and seed, and the fingerprint of every run."""
    check_shards(paths, paths.features)
    runs = {run_name(r, s): (r, s) for r, s in seeds_times(cfg.recipes, cfg.seeds)}
    starts = {r["run"] for r in runs_in(paths.pretrained)}
    for recipe, seed in runs.values():
        start = run_name(cfg.recipes[recipe].start, seed)
        if start not in starts:
            raise unknown(f"params.yaml: finetune.recipes.{recipe}.start: pretrained runs", start, starts)
    shared = cfg.model_dump(mode="json", exclude={"recipes", "seeds", "checkpoint_every"})
    data = {
        "features": digest_of(paths.features),
        "captions": file_sha256(paths.embeddings / "captions.parquet"),
        "stats": file_sha256(paths.stats / "stats.json"),
        "left_out": fingerprint(sorted(flagged(paths.features, cfg.leave_out))),
    }
    code = code_version(CODE)
    settings = {}
    for name, (recipe, seed) in runs.items():
        weights = paths.pretrained / run_name(cfg.recipes[recipe].start, seed) / "model.safetensors"
        own_data = data | {"start": file_sha256(weights)}
        own = {"at_pool": cfg.recipes[recipe].at_pool}
        settings[name] = {"finetune": shared, "recipe": own, "seed": seed, "data": own_data, "code": code}
    return left_to_do(work, runs, settings)


def trainer(job: Job) -> Callable[[tuple[str, str, int]], str]:
    return partial(train_one, job)


def train_one(job: Job, item: tuple[str, str, int]) -> str:
    """Train one run to its end, from its checkpoint if it has one; several processes train it together."""
    name, recipe, seed = item
    paths, cfg = job.paths, job.finetune
    start, at_pool = run_name(cfg.recipes[recipe].start, seed), cfg.recipes[recipe].at_pool
    told = next(r for r in runs_in(paths.pretrained) if r["run"] == start)
    vit, side = tower_of(told, str(paths.pretrained / start / "run.json"), "pretrain")
    prepare(cfg.compute)
    tower = build_tower(paths, vit, side, seed, compute=cfg.compute, at_pool=at_pool)
    load_model(paths.pretrained, start, tower)
    if cfg.reset_logit_scale:
        nn.init.constant_(tower.logit_scale, LOGIT_SCALE_INIT)
    tower.to(device())
    manifest, read = Manifest.read(paths.manifest), fbank_input(paths, vit, cfg.augment)
    texts = CaptionEmbeddings(paths.embeddings)
    doubtful = flagged(paths.features, cfg.leave_out)
    splits: list[tuple[Captions, torch.Tensor]] = []
    for split, left_out in ((Split.TRAIN, doubtful), (Split.VAL, frozenset[str]())):
        captions = captions_of(manifest, cfg.dataset, split, read.features, paths.features, left_out)
        splits.append((captions, texts.of(captions, cfg.dataset, split)))
    (train, train_texts), (val, val_texts) = splits
    encode = parallel(Encode(tower, "pooled", cfg.compute))
    task = AudioText(tower, encode, read, train, train_texts, val, val_texts, retrieval_metrics)
    n_train = len(train.clip_ids)
    order = Order(n_train, cfg.batch, seed, cfg.drop_last, rank=group().rank, world=group().size)
    optimizer, factor = build(cfg.optimizer, tower, cfg.batch, order.steps_per_epoch, cfg.epochs)
    speed = {"flops": training_flops(tower, vit.n_frames), "peak": peak_flops(device(), cfg.compute)}
    plan = Plan(cfg.epochs, seed, factor, None, cfg.checkpoint_every, cfg.select, **speed)
    folder = folder_of(paths.work / "finetune", name, job.marks[name])
    state = fit(task, optimizer, order, plan, folder, f"finetune {name}", watch=curves(folder))
    kept = {k: told[k] for k in ("side", "vit")} | {"recipe": recipe, "seed": seed, "start": start, "at_pool": at_pool}
    kept |= {"dataset": cfg.dataset, "n_train": n_train, "n_val": len(val.clip_ids)}
    if group().is_first:
        finish(folder, tower, state, kept)
    return name
