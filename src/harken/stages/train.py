"""Stage `train`: paper A's models, PANNs, BERT, a pooling and a loss (Xin et al. 2023); a run per recipe and seed."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag
from torch import nn

from harken.clips import Manifest, Split
from harken.config import Config, Paths, parse
from harken.engines import Map
from harken.errors import ConfigError, unknown
from harken.evaluation.metrics import retrieval_metrics
from harken.media.frames import read_frames, read_texts
from harken.media.quality import Flag, flagged
from harken.models.bert import Bert
from harken.models.losses import LOSSES, LearnedTemperature, pmr_warnings
from harken.models.panns import ENCODERS, LOGMEL_ROWS_PER_S, Panns
from harken.models.pooling import POOLINGS
from harken.models.towers import PRE_PROJECTION, StoredFrames, StoredTexts, TextAudio
from harken.progress import track
from harken.shards import code_version, digest_of, file_sha256, fingerprint
from harken.stages.weights import build_encoder, is_random, load_encoder
from harken.takedown import forgotten
from harken.training import frozen
from harken.training.batches import Features, Order
from harken.training.curves import curves
from harken.training.data import captions_of
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
    seeds_times,
)
from harken.training.tasks import Captions, TextToAudio

log = logging.getLogger("harken")
CODE = (
    "stages/train.py",
    "stages/weights.py",
    "media/frames.py",
    "media/quality.py",
    "training",
    "models",
    "evaluation/metrics.py",
)


class Imported(Config):
    """Frames that another encoder made (`harken import-frames`), and its captions' embeddings or, for `bert`, ours.

    `digest` names them, so that a run says what it was trained on, and others are refused.
    """

    frames: Path
    digest: str
    texts: Literal["bert", "imported"]


def _kind(encoder: Any) -> str:
    return "name" if isinstance(encoder, str) else "imported"


class TrainRecipe(Config):
    """A row of the paper's tables. `pooling` and `loss` hold `name` and that choice's own options.

    The loss's `temperature` may be `{initial, floor}`: it is then trained with the model (see LearnedTemperature).
    `pooling_rate`: the factor on the optimiser's rates at which the pooling's own parameters learn.
    """

    dataset: str
    encoder: Annotated[Annotated[str, Tag("name")] | Annotated[Imported, Tag("imported")], Discriminator(_kind)]
    pooling: dict[str, Any]
    loss: dict[str, Any]
    pooling_rate: float = Field(default=1.0, gt=0)

    @property
    def options(self) -> dict[str, Any]:
        """The loss's options but for a temperature that is trained."""
        return {k: v for k, v in self.loss.items() if k != "name" and not (k == "temperature" and self.learns)}

    @property
    def learns(self) -> dict[str, float] | None:
        """How the temperature begins where it is trained."""
        learnt = self.loss.get("temperature")
        return learnt if isinstance(learnt, dict) else None


class TrainConfig(Config):
    """`length_s[dataset]` pads or cuts every clip; `hidden`, `joint`: the projections' sizes; `freeze` names towers.

    Training, but not validation, leaves out the clips with a flag in `leave_out`. An epoch goes through all `captions`,
    no batch having two of one clip, or through the `clips`, each with a caption at random. `mei_compat`: as in Mei et
    al.'s code padding is heard as sound, Clotho's batches are as long as their longest clip, and the batch norms of a
    frozen encoder go on learning.
    """

    leave_out: list[Flag]
    hidden: int
    joint: int
    text_dropout: float
    length_s: dict[str, float]
    freeze: list[Literal["audio", "text"]]
    mei_compat: bool
    batch: dict[str, int]
    epoch_of: Literal["captions", "clips"]
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
    mei_compat: bool

    @staticmethod
    def of(recipe: TrainRecipe, cfg: TrainConfig) -> ModelConfig:
        kept = {k: getattr(cfg, k) for k in ("hidden", "joint", "text_dropout", "mei_compat")}
        return ModelConfig(recipe=recipe, **kept)


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
    data = {name: _data(paths, cfg, recipe) for name, recipe in cfg.recipes.items()}
    settings = {}
    for name, (recipe_name, seed) in runs.items():
        own = {"train": shared, "recipe": cfg.recipes[recipe_name].model_dump(mode="json"), "seed": seed}
        settings[name] = {**own, "data": data[recipe_name], "code": code_version(CODE)}
    items, marks = left_to_do(work, runs, settings)
    frozen_ones = {_heard(cfg.recipes[r]) for _, r, _ in items if is_frozen(paths, cfg, cfg.recipes[r])}
    for encoder, dataset in sorted(frozen_ones):
        frozen.make(_frozen(paths, cfg, encoder, dataset), map, f"train: {encoder} on {dataset}")
    job = Job(paths=paths, train=cfg, marks=marks)
    for _ in track(map(trainer, job, items, devices=devices()), len(items), "train: runs"):
        pass
    publish_runs(work, paths.trained, marks)


def _data(paths: Paths, cfg: TrainConfig, recipe: TrainRecipe) -> dict[str, str]:
    """Hashes of what a recipe is trained on. Imported frames need no features, and imported texts no weights."""
    found = {"manifest": file_sha256(paths.manifest / "clips.parquet")}
    if isinstance(recipe.encoder, str):
        found["features"] = digest_of(paths.features)
    if isinstance(recipe.encoder, str) or recipe.encoder.texts == "bert":
        found["weights"] = file_sha256(paths.weights / "weights.json")
    return found | {"left_out": fingerprint(sorted(flagged(paths.features, cfg.leave_out)))}


def _heard(recipe: TrainRecipe) -> tuple[str, str]:
    assert isinstance(recipe.encoder, str)
    return recipe.encoder, recipe.dataset


def is_frozen(paths: Paths, cfg: TrainConfig, recipe: TrainRecipe) -> bool:
    """Whether a clip's frames are the same at every step and in every run, and so are made once (training.frozen)."""
    if "audio" not in cfg.freeze or cfg.mei_compat or not isinstance(recipe.encoder, str):
        return False
    return not is_random(paths.weights, recipe.encoder)


def _frozen(paths: Paths, cfg: TrainConfig, encoder: str, dataset: str) -> frozen.Frozen:
    hearing = Hearing.of(paths, cfg.length_s[dataset], encoder)
    ids = {c.id for split in (Split.TRAIN, Split.VAL) for c in Manifest.read(paths.manifest).clips(dataset, split)}
    present = frozenset(i for i in ids if i in hearing.present)
    weights = file_sha256(paths.weights / "weights.json")
    mark = fingerprint(encoder, weights, code_version(CODE), hearing.n_rows, sorted(present))
    folder, how = _frames_folder(paths, encoder, dataset), (paths.weights, encoder)
    return frozen.Frozen(load_encoder, how, paths.features, present, hearing.n_rows, folder, mark)


def _frames_folder(paths: Paths, encoder: str, dataset: str) -> Path:
    return paths.work / "train-frames" / f"{encoder}.{dataset}"


def check(name: str, recipe: TrainRecipe, cfg: TrainConfig) -> None:
    """Refuse a recipe that names something unknown, with the nearest known name; warn of one known not to train."""
    where = f"params.yaml: train.recipes.{name}"
    if isinstance(recipe.encoder, str) and recipe.encoder not in ENCODERS:
        raise unknown(f"{where}.encoder", recipe.encoder, ENCODERS)
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
    loss_of(where, recipe)
    if recipe.loss["name"] == "pmr":
        healthy = ("prior_scale", "scale_by_batch", "detach_prior", "index", "shift")
        for why in pmr_warnings(**{k: v for k, v in recipe.options.items() if k in healthy}):
            log.warning("%s.loss: %s", where, why)
    build_pooling(where, recipe, 8)
    if isinstance(recipe.encoder, Imported):
        found = read_frames(recipe.encoder.frames, recipe.encoder.digest)
        if recipe.encoder.texts == "imported" and not found.has_texts:
            raise ConfigError(
                f"{where}.encoder.texts: {recipe.encoder.frames} holds no texts. Import them too, or take `bert`."
            )


def loss_of(where: str, recipe: TrainRecipe) -> Callable[..., torch.Tensor]:
    """The recipe's loss with its options bound; to be given the `temperature` where that is trained."""
    loss = partial(_quiet, LOSSES[recipe.loss["name"]], **recipe.options)
    try:
        learnt = {} if recipe.learns is None else {"temperature": LearnedTemperature(**recipe.learns)()}
        loss(torch.eye(2), torch.arange(2), **learnt)
    except TypeError as e:
        raise ConfigError(f"{where}.loss: {e}") from None
    return loss


def _quiet(loss: Callable[..., torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
    """A loss that does not warn at every step of what `check` has warned of, with the recipe's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return loss(*args, **options)


def build_pooling(where: str, recipe: TrainRecipe, dim: int) -> nn.Module:
    """The recipe's pooling over frames of `dim` numbers."""
    options = {k: v for k, v in recipe.pooling.items() if k != "name"}
    try:
        return POOLINGS[recipe.pooling["name"]](dim=dim, **options)
    except (TypeError, ConfigError) as e:
        raise ConfigError(f"{where}.pooling: {e}") from None


@dataclass(frozen=True)
class Hearing:
    """What the audio tower of a run hears: features cut or padded to `n_rows`; `present` are the clips it can hear.

    A single frame needs `min_rows`. `frame_s`: seconds from one of the tower's frames to the next, None where nobody
    said.
    """

    features: Features
    n_rows: int
    min_rows: int
    present: Container[str]
    frame_s: float | None
    where: Path

    @staticmethod
    def of(paths: Paths, length_s: float, encoder: str | Imported) -> Hearing:
        if isinstance(encoder, Imported):
            found, features = read_frames(encoder.frames, encoder.digest), Features(encoder.frames, frozen.NAME)
            n_rows = found.n_frames
            if found.frame_s is not None:
                if found.frame_s > length_s:
                    raise ConfigError(
                        f"{encoder.frames}: frames are {found.frame_s:g} s apart, and clips last {length_s:g} s. "
                        "Import them again with --frame-s in seconds."
                    )
                n_rows = min(n_rows, math.ceil(length_s / found.frame_s - 1e-6))  # all that begin within it
            present = features.all - forgotten(paths.ledger, features.all)
            return Hearing(features, n_rows, 1, present, found.frame_s, encoder.frames)
        features = Features(paths.features, "logmel")
        with torch.device("meta"):  # its shape is all that is asked here
            tower, _ = build_encoder(paths.weights, encoder)
        min_rows = tower.min_frames * tower.input_pool[0]
        n_rows = round(length_s * LOGMEL_ROWS_PER_S) + 1
        return Hearing(features, n_rows, min_rows, features.at_least(min_rows), tower.frame_s, paths.features)

    def captions(
        self, manifest: Manifest, dataset: str, split: str, left_out: Container[str] = frozenset()
    ) -> Captions:
        return captions_of(manifest, dataset, split, self.present, self.where, left_out)

    def n_too_short(self, manifest: Manifest, dataset: str, splits: Sequence[str]) -> int:
        """How many clips of these splits have features, but too few for a single frame."""
        ids = {c.id for split in splits for c in manifest.clips(dataset, split)}
        return sum(i in self.features and self.features.rows(i) < self.min_rows for i in ids)


def padding_of(spec: ModelConfig) -> str:
    """How clips that are shorter than the others are heard (see TextToAudio)."""
    if not spec.mei_compat:
        return "masked"
    return "longest" if spec.recipe.dataset == "clotho" else "fixed"


def trainer(job: Job) -> Callable[[tuple[str, str, int]], str]:
    return partial(train_one, job)


def train_one(job: Job, item: tuple[str, str, int]) -> str:
    name, recipe_name, seed = item
    paths, cfg = job.paths, job.train
    recipe = cfg.recipes[recipe_name]
    torch.manual_seed(seed)  # new layers are drawn here
    spec = ModelConfig.of(recipe, cfg)
    model, tokenize = build_model(paths.weights, spec)
    model.to(device())
    for tower in cfg.freeze:
        getattr(model, tower).requires_grad_(False)
    manifest, hearing = Manifest.read(paths.manifest), Hearing.of(paths, cfg.length_s[recipe.dataset], recipe.encoder)
    if n_too_short := hearing.n_too_short(manifest, recipe.dataset, (Split.TRAIN, Split.VAL)):
        log.warning("%s: %d clips are too short for one frame and left out.", name, n_too_short)
    train = hearing.captions(manifest, recipe.dataset, Split.TRAIN, flagged(paths.features, cfg.leave_out))
    val = hearing.captions(manifest, recipe.dataset, Split.VAL)
    if isinstance(model.text, StoredTexts):
        model.text.tokenize([*train.texts, *val.texts])  # one that is missing is found now, not in some batch
    features, n_rows, is_encoded = hearing.features, hearing.n_rows, is_frozen(paths, cfg, recipe)
    if is_encoded:
        features = Features(_frames_folder(paths, *_heard(recipe)), frozen.NAME)
        n_rows = features.most_rows
    task = TextToAudio(
        model,
        tokenize,
        loss_of(name, recipe),
        features,
        n_rows,
        train,
        val,
        retrieval_metrics,
        device(),
        is_encoded=is_encoded,
        by_caption=cfg.epoch_of == "captions",
        padding=padding_of(spec),
    )
    batch = cfg.batch[recipe.dataset]
    n = len(train.texts) if task.by_caption else len(train.clip_ids)
    order = Order(n, batch, seed, drop_last=n >= batch, clips=train.clip_of if task.by_caption else None)
    rates = {"pooling": recipe.pooling_rate}
    optimizer, factor = build(cfg.optimizer, model, batch, order.steps_per_epoch, cfg.epochs, rates)
    plan = Plan(cfg.epochs, seed, factor, cfg.clip_norm, cfg.checkpoint_every, cfg.select)
    folder = folder_of(paths.work / "train", name, job.marks[name])
    state = fit(task, optimizer, order, plan, folder, f"train {name}", watch=curves(folder))
    told = {"recipe": recipe_name, "seed": seed, "dataset": recipe.dataset, "n_train": len(train.clip_ids)}
    told |= {"n_val": len(val.clip_ids), "n_too_short": n_too_short, "length_s": cfg.length_s[recipe.dataset]}
    finish(folder, model, state, told | {"frame_s": hearing.frame_s, "model": spec.model_dump(mode="json")})
    return name


def trained_model(
    paths: Paths, told: Mapping[str, Any]
) -> tuple[TextAudio, Callable[[Sequence[str]], Any], ModelConfig]:
    """A finished run's model (see `build_model`), and what it is made of. `told`: its facts, by `runs_in`."""
    spec = parse(f"{told['run']}: model", ModelConfig, told["model"])
    model, tokenize = build_model(paths.weights, spec)
    load_model(paths.trained, told["run"], model)
    return model, tokenize, spec


def build_model(weights: Path, cfg: ModelConfig) -> tuple[TextAudio, Callable[[Sequence[str]], Any]]:
    """The untrained model of a recipe, and what makes captions into its text tower's input.

    Encoders have the weights that the stage `weights` obtained, or are imported frames and texts; projections are new.
    """
    recipe = cfg.recipe
    if isinstance(recipe.encoder, Imported):
        audio: StoredFrames | Panns = StoredFrames(read_frames(recipe.encoder.frames, recipe.encoder.digest).dim)
    else:
        audio = load_encoder(weights, recipe.encoder)
    text: Bert | StoredTexts
    if isinstance(recipe.encoder, Imported) and recipe.encoder.texts == "imported":
        captions, embeddings = read_texts(recipe.encoder.frames)
        text = StoredTexts(captions, torch.from_numpy(embeddings), str(recipe.encoder.frames))
    else:
        text = Bert.pretrained(weights / "bert", dropout=cfg.text_dropout)
    pools_first = recipe.pooling["name"] in PRE_PROJECTION
    pooling = build_pooling("pooling", recipe, audio.dim if pools_first else cfg.joint)
    dims = {"audio": audio.dim, "text": text.dim, "hidden": cfg.hidden, "joint": cfg.joint}
    temperature = None if recipe.learns is None else LearnedTemperature(**recipe.learns)
    model = TextAudio(
        audio,
        text,
        pooling,
        recipe.pooling["name"],
        dims,
        temperature=temperature,
        frozen_in_training_mode=cfg.mei_compat,
    )
    return model, text.tokenize
