"""Stage `finetune`: pretrained audio towers -> audio-text towers, CLIP's text tower frozen (Tsubaki et al. 2024)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import nn

from harken.clips import Manifest, Split
from harken.config import Config, Paths, parse
from harken.engines import Map
from harken.errors import unknown
from harken.evaluation.metrics import retrieval_metrics
from harken.media.quality import Flag, flagged
from harken.models.towers import LOGIT_SCALE_INIT
from harken.progress import track
from harken.shards import code_version, digest_of, file_sha256, fingerprint
from harken.stages.pretrain import VitConfig, build_tower, fbank_input
from harken.training.batches import Order
from harken.training.data import CaptionEmbeddings, captions_of
from harken.training.loop import Plan, fit
from harken.training.optim import OptimizerConfig, build
from harken.training.runs import (
    device,
    devices,
    finish,
    folder_of,
    load_model,
    publish_runs,
    run_name,
    runs_in,
    seeds_times,
    unfinished,
)
from harken.training.tasks import AudioText, AugmentConfig

log = logging.getLogger("harken")
CODE = ("stages/finetune.py", "stages/pretrain.py", "media/quality.py", "training", "models", "evaluation/metrics.py")


class FinetuneRecipe(Config):
    """`start` is the pretrain recipe whose run of the same seed is fine-tuned."""

    start: str


class FinetuneConfig(Config):
    """One run per recipe and seed, on the captioned clips of `dataset`; training leaves out those with such flags."""

    dataset: str
    leave_out: list[Flag]
    augment: AugmentConfig
    batch: int
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
    """Fill `paths.finetuned` with one folder per run. Raises ConfigError where a recipe starts from an unknown run."""
    work = paths.work / "finetune"
    runs = {run_name(r, s): (r, s) for r, s in seeds_times(cfg.recipes, cfg.seeds)}
    starts = {r["run"] for r in runs_in(paths.pretrained)}
    for recipe, seed in runs.values():
        start = run_name(cfg.recipes[recipe].start, seed)
        if start not in starts:
            raise unknown(f"params.yaml: finetune.recipes.{recipe}.start: pretrained runs", start, starts)
    shared = cfg.model_dump(exclude={"recipes", "seeds", "checkpoint_every"})
    captions = file_sha256(paths.embeddings / "captions.parquet")
    data = [digest_of(paths.features), captions, file_sha256(paths.stats / "stats.json"), code_version(CODE)]
    data.append(fingerprint(sorted(flagged(paths.features, cfg.leave_out))))
    marks = {}
    for name, (recipe, seed) in runs.items():
        weights = paths.pretrained / run_name(cfg.recipes[recipe].start, seed) / "model.safetensors"
        marks[name] = fingerprint(shared, seed, file_sha256(weights), data)
    items = [(name, *runs[name]) for name in unfinished(work, marks)]
    job = Job(paths=paths, finetune=cfg, marks=marks)
    for _ in track(map(trainer, job, items, devices=devices()), len(items), "finetune: runs"):
        pass
    publish_runs(work, paths.finetuned, marks)


def trainer(job: Job) -> Callable[[tuple[str, str, int]], str]:
    return partial(train_one, job)


def train_one(job: Job, item: tuple[str, str, int]) -> str:
    name, recipe, seed = item
    paths, cfg = job.paths, job.finetune
    start = run_name(cfg.recipes[recipe].start, seed)
    told = next(r for r in runs_in(paths.pretrained) if r["run"] == start)
    vit = parse(f"{start}/run.json: vit", VitConfig, told["vit"])
    tower = build_tower(paths, vit, told["n_segments"], seed)
    load_model(paths.pretrained, start, tower)
    if cfg.reset_logit_scale:
        nn.init.constant_(tower.logit_scale, LOGIT_SCALE_INIT)
    tower.to(device())
    manifest, read = Manifest.read(paths.manifest), fbank_input(paths, vit, cfg.augment)
    texts = CaptionEmbeddings(paths.embeddings)
    doubtful = flagged(paths.features, cfg.leave_out)
    splits: list[tuple[object, torch.Tensor]] = []
    for split, left_out in ((Split.TRAIN, doubtful), (Split.VAL, frozenset())):
        captions = captions_of(manifest, cfg.dataset, split, read.features, paths.features, left_out)
        splits.append((captions, texts.of(captions, cfg.dataset, split)))
    (train, train_texts), (val, val_texts) = splits
    task = AudioText(tower, read, train, train_texts, val, val_texts, retrieval_metrics)  # type: ignore[arg-type]
    order = Order(len(task.train.clip_ids), cfg.batch, seed)
    optimizer, factor = build(cfg.optimizer, tower, cfg.batch, order.steps_per_epoch, cfg.epochs)
    plan = Plan(cfg.epochs, seed, factor, None, cfg.checkpoint_every, cfg.select)
    folder = folder_of(paths.work / "finetune", name, job.marks[name])
    state = fit(task, optimizer, order, plan, folder, f"finetune {name}")
    kept = {k: told[k] for k in ("n_segments", "vit")} | {"recipe": recipe, "seed": seed, "start": start}
    finish(
        folder,
        tower,
        state,
        kept | {"dataset": cfg.dataset, "n_train": len(task.train.clip_ids), "n_val": len(task.val.clip_ids)},
    )
    return name
