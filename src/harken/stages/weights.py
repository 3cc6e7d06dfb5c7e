"""Stage `weights`: the frozen image-text model and the encoders' starting weights at hand, with their hashes.

The built-in world trains a small CLIP on its own captions and pictures and starts BERT and PANNs from seeded random
weights; real presets load CLIP by name or file, BERT by name or folder, PANNs by URL and checksum or local path.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from harken.clips import Manifest, Split
from harken.config import Config, Paths
from harken.engines import Map
from harken.errors import ConfigError, DataError, unknown
from harken.media.images import read_jpeg
from harken.models import clip, weights
from harken.models.bert import Bert
from harken.models.panns import ENCODERS, LOGMEL_ROWS_PER_S, Panns
from harken.progress import track
from harken.shards import (
    atomic,
    code_version,
    digest_of,
    file_sha256,
    fingerprint,
    publish,
    read_shard,
    shards_in,
    write_json,
)
from harken.stages.stats import training_ids
from harken.training.batches import Features, Order
from harken.training.loop import Plan, fit
from harken.training.optim import warmup_cosine
from harken.training.runs import device, devices
from harken.training.tasks import Tagging
from harken.world.captions import drawn as captions_drawn
from harken.world.picture_captions import pairs

log = logging.getLogger("harken")
VISUAL = "visual.safetensors"
CODE = ("stages/weights.py", "models", "training", "world")


class SmallClipConfig(Config):
    """A small CLIP trained here; `shape` as `models.clip.small_config`.

    `pairs`: `world` draws `n_pairs` captioned pictures of the built-in world; `clips` takes the images and captions of
    the training clips, `n_pairs` of them at most.
    """

    kind: Literal["small"]
    shape: dict[str, int]
    pairs: Literal["world", "clips"]
    n_pairs: int
    steps: int
    batch: int
    lr: float
    seed: int


class OpenClipConfig(Config):
    """CLIP from open_clip: `name` is architecture/tag or architecture/path of a checkpoint."""

    kind: Literal["open_clip"]
    name: str


class MaskedConfig(Config):
    """Masked-word training on `n_captions` that are drawn from the built-in world's grammar."""

    n_captions: int
    steps: int
    batch: int
    lr: float


class SmallBertConfig(Config):
    """A small BERT with a vocabulary of the training captions. `masked`: how it is trained; null: it is not.

    The papers start from a BERT that has read books. One that has read nothing tells captions apart only late in
    training, and what attends by its states finds nothing to attend to until then.
    """

    kind: Literal["small"]
    dim: int
    layers: int
    heads: int
    max_tokens: int
    masked: MaskedConfig | None
    seed: int


class PretrainedBertConfig(Config):
    """A BERT by its name on the hub, or a folder."""

    kind: Literal["pretrained"]
    name: str


class RandomConfig(Config):
    """Weights drawn from each run's own seed."""

    kind: Literal["random"]


class CheckpointConfig(Config):
    """A PANNs checkpoint: a URL or a path, and its SHA-256 (null: recorded, not checked; only for a path)."""

    kind: Literal["checkpoint"]
    source: str
    sha256: str | None


class TaggingConfig(Config):
    """An encoder trained here to tag a dataset's training clips with their labels, as PANNs were on AudioSet.

    Clips of the splits in `exclude` are left out. `lr` falls to zero along a cosine; the last weights are kept.
    """

    kind: Literal["tagging"]
    dataset: str
    exclude: dict[str, list[Split]]
    length_s: float
    epochs: int
    batch: int
    lr: float
    seed: int


class EncoderConfig(Config):
    """`width` is the channels of the first block (PANNs: 64); `options` go to the encoder's class."""

    width: int
    options: dict[str, Any]
    start: RandomConfig | CheckpointConfig | TaggingConfig = Field(discriminator="kind")


class WeightsConfig(Config):
    """The frozen CLIP, BERT's start and the shape and start of each PANNs encoder that recipes use."""

    clip: SmallClipConfig | OpenClipConfig = Field(discriminator="kind")
    bert: SmallBertConfig | PretrainedBertConfig = Field(discriminator="kind")
    panns: dict[Literal["cnn14", "resnet38"], EncoderConfig]


class Job(Config):
    paths: Paths
    weights: WeightsConfig
    work: Path


def run(paths: Paths, cfg: WeightsConfig, map: Map) -> None:
    """Fill `paths.weights` and write weights.json: where each came from and its SHA-256."""
    captions = _training_captions(paths) if cfg.bert.kind == "small" else []
    uses_clips = cfg.clip.kind == "small" and cfg.clip.pairs == "clips"
    uses_clips |= any(e.start.kind == "tagging" for e in cfg.panns.values())
    data = [captions, digest_of(paths.features) if uses_clips else None]
    work = paths.work / "weights" / fingerprint(cfg.model_dump(), code_version(CODE), data)
    for old in work.parent.glob("*"):
        if old != work:
            shutil.rmtree(old)
    if not (work / "weights.json").is_file():
        work.mkdir(parents=True, exist_ok=True)
        parts = ["clip", "bert", *sorted(cfg.panns)]
        job = Job(paths=paths, weights=cfg, work=work)
        found = dict(track(map(obtainer, job, parts, devices=devices()), len(parts), "weights"))
        told: dict[str, Any] = {"clip": found.pop("clip"), "bert": found.pop("bert"), "panns": found}
        # training starts from the image tower's tensors alone, without the cost of building CLIP
        towers = _towers(told["clip"], work)
        weights.save(work / VISUAL, towers.visual_state, {"heads": towers.heads})
        write_json(work / "weights.json", told)  # last: its presence means that all is there
    publish(work, paths.weights, sorted(p.name for p in work.iterdir()))


def obtainer(job: Job) -> Callable[[str], tuple[str, dict[str, Any]]]:
    return partial(obtain, job)


def obtain(job: Job, part: str) -> tuple[str, dict[str, Any]]:
    """Obtain one of the models into the scratch folder; what weights.json is to say of it."""
    paths, cfg, work = job.paths, job.weights, job.work
    if part == "clip":
        return part, _clip(cfg.clip, paths, work)
    if part == "bert":
        return part, _bert(cfg.bert, _training_captions(paths) if cfg.bert.kind == "small" else [], work)
    encoder = cfg.panns[part]  # type: ignore[index]
    shape = {"width": encoder.width, "options": encoder.options}
    return part, {**shape, **_panns(part, encoder, paths, work)}


def is_random(folder: Path, name: str) -> bool:
    """Whether a PANNs encoder starts from weights that each run draws from its own seed."""
    return bool(json.loads((folder / "weights.json").read_text())["panns"].get(name, {}).get("kind") == "random")


def build_encoder(folder: Path, name: str) -> tuple[Panns, str]:
    """A PANNs encoder of the shape that the stage was told, without its weights, and of what kind these are."""
    told = json.loads((folder / "weights.json").read_text())["panns"]
    if name not in told:
        raise unknown("params.yaml: weights.panns: encoder", name, told)
    return ENCODERS[name](width=told[name]["width"], **told[name]["options"]), told[name]["kind"]


def load_encoder(folder: Path, name: str) -> Panns:
    """A PANNs encoder of the shape and with the weights that the stage obtained; random where it is to start so."""
    model, kind = build_encoder(folder, name)
    if kind == "checkpoint":
        weights.load_panns(model, folder / "panns" / f"{name}.pth")
    elif kind == "tagging":
        weights.load_into(model, folder / "panns" / f"{name}.safetensors")
    return model


def load_clip(folder: Path) -> clip.Towers:
    """The frozen CLIP that the stage obtained. Raises DataError where it has changed since."""
    path = folder / "weights.json"
    if not path.is_file():
        raise DataError(f"{path}: no weights. Run `dvc repro weights` first.")
    return _towers(json.loads(path.read_text())["clip"], folder)


def load_visual(folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of CLIP's image tower and its number of attention heads, for the audio tower to start from."""
    tensors, meta = weights.load(folder / VISUAL)
    return tensors, int(meta["heads"])


def _towers(told: dict[str, Any], folder: Path) -> clip.Towers:
    if told["load"] == "clip":
        return clip.load(folder / "clip")
    towers = clip.load(told["load"])
    if (found := _state_sha256(towers.model)) != told["sha256"]:
        raise DataError(
            f"CLIP {told['load']}: weights hash to {found}, not to {told['sha256']} as when they were obtained."
        )
    return towers


def _training_captions(paths: Paths) -> list[str]:
    manifest = Manifest.read(paths.manifest)
    return sorted(
        {t for d, s in manifest.splits() if s == Split.TRAIN for c in manifest.clips(d, s) for t in c.captions}
    )


def _clip(cfg: SmallClipConfig | OpenClipConfig, paths: Paths, work: Path) -> dict[str, Any]:
    if isinstance(cfg, OpenClipConfig):
        return {"load": cfg.name, "sha256": _state_sha256(clip.load(cfg.name).model)}
    size = cfg.shape["image_size"]
    log.info("weights: training a small CLIP on up to %d captioned pictures", cfg.n_pairs)
    if cfg.pairs == "world":
        shown = pairs(cfg.n_pairs, cfg.seed, (size * 4 // 3, size))
    else:
        shown = itertools.islice(_clip_pairs(paths), cfg.n_pairs)
    settings = clip.SmallClip(cfg.shape, cfg.steps, cfg.batch, cfg.lr, cfg.seed)
    clip.save(work / "clip", clip.train_small(shown, settings))
    return {"load": "clip", "sha256": file_sha256(work / "clip" / clip.WEIGHTS_FILE)}


def _clip_pairs(paths: Paths) -> Iterator[tuple[np.ndarray, str]]:
    """Every image of every captioned training clip, with the clip's first caption."""
    manifest = Manifest.read(paths.manifest)
    splits = [(d, s) for d, s in manifest.splits() if s == Split.TRAIN]
    said = {c.id: c.captions[0] for d, s in splits for c in manifest.clips(d, s) if c.captions}
    for shard in shards_in(paths.features):
        for row in read_shard(paths.features, shard, ("images",)):
            if row["clip_id"] in said:
                for jpeg in row["images"] or ():
                    yield read_jpeg(jpeg), said[row["clip_id"]]


def _bert(cfg: SmallBertConfig | PretrainedBertConfig, captions: list[str], work: Path) -> dict[str, Any]:
    if isinstance(cfg, PretrainedBertConfig):
        model, source = Bert.pretrained(cfg.name), cfg.name
    else:
        torch.manual_seed(cfg.seed)
        drawn = [] if cfg.masked is None else captions_drawn(cfg.masked.n_captions, cfg.seed)
        shape = {"dim": cfg.dim, "layers": cfg.layers, "heads": cfg.heads, "max_tokens": cfg.max_tokens}
        model, source = Bert.small([*captions, *drawn], **shape, dropout=0.1), f"random, seed {cfg.seed}"
        if cfg.masked is not None:
            how = cfg.masked
            loss = model.train_masked(drawn, steps=how.steps, batch=how.batch, lr=how.lr, seed=cfg.seed)
            source = f"masked words of {len(drawn)} drawn captions, seed {cfg.seed}"
            log.info("weights: bert guesses hidden words with a loss of %.2f", loss)
    model.save(work / "bert")
    return {"source": source, "sha256": file_sha256(work / "bert" / "model.safetensors")}


def _panns(name: str, cfg: EncoderConfig, paths: Paths, work: Path) -> dict[str, Any]:
    start = cfg.start
    if isinstance(start, RandomConfig):
        return {"kind": "random", "source": "each run's seed", "sha256": None}
    if isinstance(start, TaggingConfig):
        target = work / "panns" / f"{name}.safetensors"
        _tag(name, cfg, start, paths, target)
        source = f"tagging {start.dataset}, {start.epochs} epochs, seed {start.seed}"
        return {"kind": "tagging", "source": source, "sha256": file_sha256(target)}
    target = work / "panns" / f"{name}.pth"
    if "://" in start.source:
        if start.sha256 is None:
            raise DataError(f"params.yaml: weights.panns.{name}.start.sha256: a download needs its checksum.")
        weights.download(start.source, start.sha256, target)
    else:
        path = Path(start.source)
        if not path.is_file():
            raise DataError(f"{path}: no such checkpoint. Check weights.panns.{name}.start.source in params.yaml.")
        with open(path, "rb") as f, atomic(target) as out:
            shutil.copyfileobj(f, out)
    found = file_sha256(target)
    if start.sha256 is not None and found != start.sha256:
        raise DataError(f"{start.source}: sha256 is {found}, expected {start.sha256}. Download it again.")
    return {"kind": "checkpoint", "source": start.source, "sha256": found}


def _tag(name: str, cfg: EncoderConfig, start: TaggingConfig, paths: Paths, target: Path) -> None:
    """Train an encoder to tag, through the one loop, and keep its weights at `target`."""
    manifest, features = Manifest.read(paths.manifest), Features(paths.features, "logmel")
    kept = set(training_ids(manifest, start.dataset, Split.TRAIN, start.exclude))
    clips = [c for c in manifest.clips(start.dataset, Split.TRAIN) if c.id in kept and c.id in features and c.labels]
    labels = sorted({label for c in clips for label in c.labels})
    if not labels:
        raise DataError(f"weights.panns.{name}.start: no labelled clip of {start.dataset} train is left to tag.")
    number = {label: i for i, label in enumerate(labels)}
    options = {**cfg.options, "n_classes": max(len(labels), cfg.options.get("n_classes", 0))}
    if options["n_classes"] != cfg.options.get("n_classes"):
        raise ConfigError(
            f"params.yaml: weights.panns.{name}.options.n_classes is {cfg.options.get('n_classes')}; "
            f"{start.dataset} train has {len(labels)} labels. Set it to {len(labels)} or more."
        )
    tags = torch.zeros(len(clips), options["n_classes"])
    for i, c in enumerate(clips):
        tags[i, [number[label] for label in c.labels]] = 1
    torch.manual_seed(start.seed)
    model = ENCODERS[name](width=cfg.width, **options).to(device())
    n_rows = round(start.length_s * LOGMEL_ROWS_PER_S) + 1
    task = Tagging(model, features, n_rows, [c.id for c in clips], tags, device())
    order = Order(len(clips), min(start.batch, len(clips)), start.seed)
    groups = [{"params": list(model.parameters()), "lr": start.lr, "peak_lr": start.lr}]
    steps = {"steps_per_epoch": order.steps_per_epoch, "epochs": start.epochs, "warmup_epochs": 1}
    factor = partial(warmup_cosine, **steps, base=1.0, final=0.0)
    plan = Plan(start.epochs, start.seed, factor, None, max(1, order.steps_per_epoch), "last")
    fit(task, torch.optim.Adam(groups), order, plan, target.with_suffix(".run"), f"weights {name}")
    weights.save(target, model.state_dict(), {"labels": labels})
    shutil.rmtree(target.with_suffix(".run"))


def _state_sha256(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
