"""Stage `train`: paper A's models, PANNs, BERT, a pooling and a loss (Xin et al. 2023); a run per recipe and seed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from harken.clips import Manifest, Split
from harken.config import Config, Paths
from harken.engines import Map
from harken.errors import ConfigError, unknown
from harken.evaluation.metrics import retrieval_metrics
from harken.media.quality import Flag, flagged
from harken.models.bert import Bert
from harken.models.losses import LOSSES
from harken.models.panns import LOGMEL_ROWS_PER_S
from harken.models.pooling import POOLINGS
from harken.models.towers import PRE_PROJECTION, TextAudio
from harken.progress import track
from harken.shards import code_version, digest_of, file_sha256, fingerprint
from harken.stages.weights import load_encoder
from harken.training.batches import Features, Order
from harken.training.curves import curves
from harken.training.data import captions_of
from harken.training.loop import Plan, fit
from harken.training.optim import OptimizerConfig, build
from harken.training.runs import device, devices, finish, folder_of, publish_runs, run_name, seeds_times, unfinished
from harken.training.tasks import TextToAudio

log = logging.getLogger("harken")
CODE = ("stages/train.py", "stages/weights.py", "media/quality.py", "training", "models", "evaluation/metrics.py")


class TrainRecipe(Config):
    """A row of the paper's tables. `pooling` and `loss` hold `name` and that choice's own options."""

    dataset: str
    encoder: Literal["cnn14", "resnet38"]
    pooling: dict[str, Any]
    loss: dict[str, Any]


class TrainConfig(Config):
    """`length_s[dataset]` pads or cuts every clip; `hidden`, `joint`: the projections' sizes; `freeze` names towers.

    Training, but not validation, leaves out the clips with a flag in `leave_out`.
    """

    leave_out: list[Flag]
    hidden: int
    joint: int
    text_dropout: float
    length_s: dict[str, float]
    freeze: list[Literal["audio", "text"]]
    batch: dict[str, int]
    epochs: int
    optimizer: OptimizerConfig
    clip_norm: float | None
    checkpoint_every: int
    select: Literal["best", "last"]
    seeds: list[int]
    recipes: dict[str, TrainRecipe]


class ModelConfig(Config):
    """What a run's model is made of; kept in its run.json, so that later stages build it without the params it had."""

    recipe: TrainRecipe
    hidden: int
    joint: int
    text_dropout: float

    @staticmethod
    def of(recipe: TrainRecipe, cfg: TrainConfig) -> ModelConfig:
        return ModelConfig(recipe=recipe, hidden=cfg.hidden, joint=cfg.joint, text_dropout=cfg.text_dropout)


class Job(Config):
    paths: Paths
    train: TrainConfig
    marks: dict[str, str]


def run(paths: Paths, cfg: TrainConfig, map: Map) -> None:
    """Fill `paths.trained` with one folder per run. Raises ConfigError for unknown names before anything is trained."""
    for name, recipe in cfg.recipes.items():
        check(name, recipe, cfg)
    work = paths.work / "train"
    runs = {run_name(r, s): (r, s) for r, s in seeds_times(cfg.recipes, cfg.seeds)}
    shared = cfg.model_dump(mode="json", exclude={"recipes", "seeds", "checkpoint_every"})
    data = {
        "features": digest_of(paths.features),
        "manifest": file_sha256(paths.manifest / "clips.parquet"),
        "weights": file_sha256(paths.weights / "weights.json"),
        "left_out": fingerprint(sorted(flagged(paths.features, cfg.leave_out))),
    }
    settings = {}
    for name, (recipe_name, seed) in runs.items():
        own = cfg.recipes[recipe_name].model_dump(mode="json")
        settings[name] = {"train": shared, "recipe": own, "seed": seed, "data": data, "code": code_version(CODE)}
    marks = {name: fingerprint(s) for name, s in settings.items()}
    items = [(name, *runs[name]) for name in unfinished(work, marks, settings)]
    job = Job(paths=paths, train=cfg, marks=marks)
    for _ in track(map(trainer, job, items, devices=devices()), len(items), "train: runs"):
        pass
    publish_runs(work, paths.trained, marks)


def check(name: str, recipe: TrainRecipe, cfg: TrainConfig) -> None:
    """Refuse a recipe that names something unknown, with the nearest known name."""
    where = f"params.yaml: train.recipes.{name}"
    for part, choices in (("pooling", POOLINGS), ("loss", LOSSES)):
        options = getattr(recipe, part)
        if "name" not in options:
            raise ConfigError(f"{where}.{part}: missing key `name`. Known names: {', '.join(sorted(choices))}.")
        if options["name"] not in choices:
            raise unknown(f"{where}.{part}.name", options["name"], choices)
    for key in ("length_s", "batch"):
        if recipe.dataset not in getattr(cfg, key):
            raise ConfigError(
                f"params.yaml: train.{key} has no value for {recipe.dataset!r}, which {name} is trained on."
            )
    loss_of(where, recipe)(torch.eye(2))
    build_pooling(where, recipe, 8)


def loss_of(where: str, recipe: TrainRecipe) -> Callable[[torch.Tensor], torch.Tensor]:
    """The recipe's loss with its options bound."""
    options = {k: v for k, v in recipe.loss.items() if k != "name"}
    loss = partial(LOSSES[recipe.loss["name"]], **options)
    try:
        loss(torch.eye(2))
    except TypeError as e:
        raise ConfigError(f"{where}.loss: {e}") from None
    return loss


def build_pooling(where: str, recipe: TrainRecipe, dim: int) -> nn.Module:
    """The recipe's pooling over frames of `dim` numbers."""
    options = {k: v for k, v in recipe.pooling.items() if k != "name"}
    try:
        return POOLINGS[recipe.pooling["name"]](dim=dim, **options)
    except TypeError as e:
        raise ConfigError(f"{where}.pooling: {e}") from None


def trainer(job: Job) -> Callable[[tuple[str, str, int]], str]:
    return partial(train_one, job)


def train_one(job: Job, item: tuple[str, str, int]) -> str:
    name, recipe_name, seed = item
    paths, cfg = job.paths, job.train
    recipe = cfg.recipes[recipe_name]
    torch.manual_seed(seed)  # new layers are drawn here
    spec = ModelConfig.of(recipe, cfg)
    model, bert = build_model(paths.weights, spec)
    model.to(device())
    for tower in cfg.freeze:
        getattr(model, tower).requires_grad_(False)
    manifest, features = Manifest.read(paths.manifest), Features(paths.features, "logmel")
    captions = partial(captions_of, manifest, recipe.dataset, present=features, where=paths.features)
    train = captions(split=Split.TRAIN, left_out=flagged(paths.features, cfg.leave_out))
    val = captions(split=Split.VAL)
    n_rows = round(cfg.length_s[recipe.dataset] * LOGMEL_ROWS_PER_S) + 1
    loss = loss_of(name, recipe)
    task = TextToAudio(model, bert.tokenize, loss, features, n_rows, train, val, retrieval_metrics, device())
    batch = cfg.batch[recipe.dataset]
    order = Order(len(train.clip_ids), batch, seed, drop_last=len(train.clip_ids) >= batch)
    optimizer, factor = build(cfg.optimizer, model, batch, order.steps_per_epoch, cfg.epochs)
    plan = Plan(cfg.epochs, seed, factor, cfg.clip_norm, cfg.checkpoint_every, cfg.select)
    folder = folder_of(paths.work / "train", name, job.marks[name])
    state = fit(task, optimizer, order, plan, folder, f"train {name}", watch=curves(folder))
    told = {"recipe": recipe_name, "seed": seed, "dataset": recipe.dataset, "n_train": len(train.clip_ids)}
    finish(folder, model, state, told | {"n_val": len(val.clip_ids), "n_rows": n_rows, "model": spec.model_dump()})
    return name


def build_model(weights: Path, cfg: ModelConfig) -> tuple[TextAudio, Bert]:
    """The untrained model of a recipe: encoders with the weights that the stage `weights` obtained, new projections."""
    recipe = cfg.recipe
    audio = load_encoder(weights, recipe.encoder)
    bert = Bert.pretrained(weights / "bert", dropout=cfg.text_dropout)
    pools_first = recipe.pooling["name"] in PRE_PROJECTION
    pooling = build_pooling("pooling", recipe, audio.dim if pools_first else cfg.joint)
    dims = {"audio": audio.dim, "text": bert.dim, "hidden": cfg.hidden, "joint": cfg.joint}
    return TextAudio(audio, bert, pooling, recipe.pooling["name"], dims), bert
