"""Stage `embed`: frozen CLIP over images and captions, once. Training reads the result; CLIP is not in its graph."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from harken.clips import Manifest
from harken.config import Config, Paths
from harken.engines import Map
from harken.errors import DataError
from harken.media.images import read_jpeg
from harken.models import clip, runtimes
from harken.models.clip import Encoder
from harken.progress import track
from harken.shards import (
    OK,
    ShardWriter,
    atomic,
    code_version,
    facts,
    fingerprint,
    ledger,
    pending,
    publish,
    read_shard,
    shard_path,
    shards_in,
    vectors,
    vectors_type,
)
from harken.stages.weights import load_clip
from harken.training.runs import device, devices

log = logging.getLogger("harken")
CODE = ("stages/embed.py", "models/clip.py", "models/runtimes.py", "media/images.py", "shards.py")
TEXTS = 512  # captions in one item of the fan-out


class EmbedConfig(Config):
    """`prompt` goes before every caption; embeddings are stored as `dtype`, not normalised.

    `runtime` computes in `precision`. `batch` images at once on a GPU; on the CPU one clip's (`models/runtimes.py`).
    """

    prompt: str
    batch: int
    dtype: Literal["float16", "float32"]
    precision: runtimes.Precision
    runtime: runtimes.Runtime


class Job(Config):
    paths: Paths
    embed: EmbedConfig
    about: dict[str, str]


@dataclass(frozen=True)
class Shard:
    """An item of the fan-out: a shard to embed the images of."""

    number: int
    mark: str


@dataclass(frozen=True)
class Texts:
    """An item of the fan-out: captions to embed, and the place of the first among all of them."""

    first: int
    texts: list[str]


def run(paths: Paths, cfg: EmbedConfig, map: Map) -> None:
    """Fill `paths.embeddings`: a shard of image embeddings per feature shard, and captions.parquet."""
    work, captions = paths.work / "embed", paths.work / "embed" / "captions.parquet"
    about = identity(paths, cfg)
    known = (about, cfg.dtype, code_version(CODE))
    jobs = {s: fingerprint(*known, facts(paths.features, s)["digest"]) for s in shards_in(paths.features)}
    rows = captioned(paths)
    mark = fingerprint(*known, cfg.prompt, rows)
    texts = sorted({caption for *_, caption in rows})  # many captions are repeated; each is embedded once

    todo: list[Shard | Texts] = [Shard(s, jobs[s]) for s in pending(work, jobs)]
    is_stale = not _is_made(captions, mark)
    if is_stale:
        todo += [Texts(i, texts[i : i + TEXTS]) for i in range(0, len(texts), TEXTS)]
    job = Job(paths=paths, embed=cfg, about=about)
    found: dict[int, np.ndarray] = {}
    for result in track(map(embedder, job, todo, devices=devices()), len(todo), "embed"):
        found.update(result)
    if is_stale:
        dim = int(facts(work, min(jobs))["dim"])
        matrix = np.concatenate([np.empty((0, dim), cfg.dtype), *(found[i] for i in sorted(found))])
        place = {t: i for i, t in enumerate(texts)}
        meta = {**about, "prompt": cfg.prompt, "dim": str(dim), "fingerprint": mark}
        write_captions(captions, rows, matrix[[place[caption] for *_, caption in rows]], meta)
    names = [shard_path(work, s).name for s in jobs]
    publish(work, paths.embeddings, [*names, captions.name])


def identity(paths: Paths, cfg: EmbedConfig) -> dict[str, str]:
    """What the embeddings depend on besides what is embedded, in words. A change of any of it makes them stale.

    Raises DataError without weights, ConfigError where the runtime is not installed.
    """
    path = paths.weights / "weights.json"
    if not path.is_file():
        raise DataError(f"{path}: no weights. Run `dvc repro weights` first.")
    told = json.loads(path.read_text())["clip"]
    return {
        "model": "small" if told["load"] == "clip" else told["load"],
        "weights": told["sha256"],
        "preprocessing": clip.PREPROCESSING,
        "precision": cfg.precision,
        "runtime": runtimes.version(cfg.runtime),
    }


def captioned(paths: Paths) -> list[list[str]]:
    """[dataset, split, clip id, caption] of every caption of every clip that has features, in the lists' order."""
    outcomes = ledger(paths.features)
    ok = set(outcomes.filter(pc.equal(outcomes["status"], OK))["clip_id"].to_pylist())
    manifest = Manifest.read(paths.manifest)
    return [
        [dataset, split, c.id, caption]
        for dataset, split in manifest.splits()
        for c in manifest.clips(dataset, split)
        if c.id in ok
        for caption in c.captions
    ]


def embedder(job: Job) -> Callable[[Shard | Texts], dict[int, np.ndarray]]:
    cfg = job.embed
    return partial(embed, job, runtimes.start(load_clip(job.paths.weights), cfg.runtime, cfg.precision, device()))


def embed(job: Job, encoder: Encoder, item: Shard | Texts) -> dict[int, np.ndarray]:
    """Write one shard, or return the embeddings (caption, dim) of some captions by the place of the first."""
    if isinstance(item, Shard):
        embed_shard(job, encoder, item)
        return {}
    found = clip.text_embeddings(encoder, [job.embed.prompt + t for t in item.texts], batch=job.embed.batch)
    return {item.first: found.numpy().astype(job.embed.dtype)}


def embed_shard(job: Job, encoder: Encoder, shard: Shard) -> None:
    """Embed the images of one shard; clips without images are not requested of it."""
    cfg, features = job.embed, job.paths.features
    n_images = int(facts(features, shard.number)["n_images"])
    shape = (n_images, encoder.embed_dim)
    numbers = {"image_size": encoder.image_size, "dim": encoder.embed_dim, "n_images": n_images}
    n_clips = 1 if encoder.device.type == "cpu" else max(1, cfg.batch // n_images)

    def clips() -> Iterator[list[dict[str, Any]]]:
        rows = (r for r in read_shard(features, shard.number, ("images",)) if r["images"])
        while group := list(islice(rows, n_clips)):
            yield group

    def read(group: list[dict[str, Any]]) -> tuple[list[str], Tensor]:
        pictures = [read_jpeg(jpeg) for r in group for jpeg in r["images"]]
        return [r["clip_id"] for r in group], clip.crop(pictures, encoder.image_size)

    with ShardWriter(
        job.paths.work / "embed",
        shard.number,
        fingerprint=shard.mark,
        columns={"images": vectors_type(cfg.dtype, *shape)},
        meta={**job.about, **{k: str(v) for k, v in numbers.items()}},
    ) as out:
        for ids, found in runtimes.encoded(encoder, clips(), read):
            for clip_id, one in zip(ids, found.numpy().reshape(-1, *shape), strict=True):
                out.write(clip_id, images=one)


def write_captions(path: Path, rows: list[list[str]], matrix: np.ndarray, meta: dict[str, str]) -> None:
    """captions.parquet: dataset, split, clip_id, caption, embedding."""
    kind = vectors_type(matrix.dtype.name, matrix.shape[1])
    names = ("dataset", "split", "clip_id", "caption")
    fields = [*((n, pa.string()) for n in names), ("embedding", kind)]
    schema = pa.schema(fields, {f"harken.{k}": v for k, v in meta.items()})
    columns = [pa.array([r[i] for r in rows], pa.string()) for i in range(len(names))]
    table = pa.Table.from_arrays([*columns, vectors(matrix, kind)], schema=schema)
    with atomic(path) as f:
        pq.write_table(table, f, compression="lz4", use_dictionary=["dataset", "split"], write_statistics=False)


def _is_made(path: Path, mark: str) -> bool:
    return path.is_file() and (pq.read_schema(path).metadata or {}).get(b"harken.fingerprint") == mark.encode()
