"""Stage `embed`: frozen CLIP over images and captions, once. Training reads the result; CLIP is not in its graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harken.clips import Manifest
from harken.config import Config, Paths
from harken.engines import Map
from harken.media.images import read_jpeg
from harken.models import clip
from harken.models.clip import Towers
from harken.progress import track
from harken.shards import (
    ShardWriter,
    atomic,
    code_version,
    facts,
    file_sha256,
    fingerprint,
    ledger,
    pending,
    publish,
    read_shard,
    shard_path,
    shards_in,
)
from harken.stages.weights import load_clip
from harken.training.runs import device

log = logging.getLogger("harken")
CODE = ("stages/embed.py", "models/clip.py", "media/images.py", "shards.py")


class EmbedConfig(Config):
    """`prompt` goes before every caption; `batch` images at once; embeddings are stored as `dtype`, not normalised."""

    prompt: str
    batch: int
    dtype: Literal["float16", "float32"]


class Job(Config):
    paths: Paths
    embed: EmbedConfig
    weights: str


def run(paths: Paths, cfg: EmbedConfig, map: Map) -> None:
    """Fill `paths.embeddings`: a shard of image embeddings per feature shard, and captions.parquet."""
    work, code = paths.work / "embed", code_version(CODE)
    weights = file_sha256(paths.weights / "weights.json")  # it holds the hashes of every weight
    job = Job(paths=paths, embed=cfg, weights=weights)
    known = (cfg.model_dump(), code, weights)
    jobs = {s: fingerprint(*known, facts(paths.features, s)["digest"]) for s in shards_in(paths.features)}
    todo = [(s, jobs[s]) for s in pending(work, jobs)]
    for _ in track(map(embedder, job, todo), len(todo), "embed: shards"):
        pass
    mark = fingerprint(*known, file_sha256(paths.manifest / "clips.parquet"), sorted(jobs.values()))
    captions = work / "captions.parquet"
    if not (
        captions.is_file() and (pq.read_schema(captions).metadata or {}).get(b"harken.fingerprint") == mark.encode()
    ):
        embed_captions(paths, cfg, captions, mark)
    names = [shard_path(work, s).name for s in jobs]
    publish(work, paths.embeddings, [*names, captions.name])


def embedder(job: Job) -> Callable[[tuple[int, str]], int]:
    return partial(embed_shard, job, load_clip(job.paths.weights).to(device()))


def embed_shard(job: Job, towers: Towers, item: tuple[int, str]) -> int:
    """Embed the images of one shard; clips without images are not requested of it."""
    shard, mark = item
    cfg = job.embed
    rows = [r for r in read_shard(job.paths.features, shard, ("images",)) if r["images"]]
    n_images = int(facts(job.paths.features, shard)["n_images"])
    element = pa.float16() if cfg.dtype == "float16" else pa.float32()
    columns = {"images": pa.list_(pa.list_(element, towers.embed_dim), n_images)}
    size = towers.image_size
    meta = {"weights": job.weights, "preprocessing": f"short side {size} bicubic antialiased, centre crop {size}"}
    with ShardWriter(job.paths.work / "embed", shard, fingerprint=mark, columns=columns, meta=meta) as out:
        step = max(1, cfg.batch // n_images)
        for i in range(0, len(rows), step):
            part = rows[i : i + step]
            pictures = [read_jpeg(jpeg) for r in part for jpeg in r["images"]]
            vectors = clip.image_embeddings(towers, pictures, batch=cfg.batch).numpy().astype(cfg.dtype)
            for r, v in zip(part, vectors.reshape(len(part), n_images, -1), strict=True):
                out.write(r["clip_id"], images=list(v))
    return shard


def embed_captions(paths: Paths, cfg: EmbedConfig, path: Path, mark: str) -> None:
    """Every caption of every clip that has features: dataset, split, clip_id, caption, embedding."""
    outcomes = ledger(paths.features)
    ok = set(outcomes.filter(pa.compute.equal(outcomes["status"], "ok"))["clip_id"].to_pylist())
    towers = load_clip(paths.weights).to(device())
    rows = []
    manifest = Manifest.read(paths.manifest)
    for dataset, split in manifest.splits():
        for c in manifest.clips(dataset, split):
            if c.id in ok:
                rows += [{"dataset": dataset, "split": split, "clip_id": c.id, "caption": t} for t in c.captions]
    texts = sorted({str(r["caption"]) for r in rows})  # many captions are repeated; each is embedded once
    vectors: dict[str, np.ndarray] = {}
    for i in track(range(0, len(texts), 256), -(-len(texts) // 256), "embed: captions"):
        part = texts[i : i + 256]
        found = clip.text_embeddings(towers, [cfg.prompt + t for t in part]).numpy()
        vectors.update(zip(part, found.astype(cfg.dtype), strict=True))
    element = pa.float16() if cfg.dtype == "float16" else pa.float32()
    schema = pa.schema(
        [
            ("dataset", pa.string()),
            ("split", pa.string()),
            ("clip_id", pa.string()),
            ("caption", pa.string()),
            ("embedding", pa.list_(element, towers.embed_dim)),
        ],
        {b"harken.fingerprint": mark.encode(), b"harken.prompt": cfg.prompt.encode()},
    )
    table = pa.Table.from_pylist([{**r, "embedding": list(vectors[str(r["caption"])])} for r in rows], schema)
    with atomic(path) as f:
        pq.write_table(table, f, compression="lz4", use_dictionary=["dataset", "split"], write_statistics=False)
