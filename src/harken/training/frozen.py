"""The frames of a frozen encoder, made once: every recipe and seed that trains on them reads what one pass computed.

An encoder that is not trained hears a clip the same way at every step (dropout and SpecAugment rest), so nothing is
lost, and a step costs what the head costs. Training alone reads them: a finished run holds its encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harken.engines import Map
from harken.models.panns import Panns
from harken.progress import track
from harken.shards import ShardWriter, facts, fingerprint, pending, read_shard, shards_in
from harken.training.batches import Features
from harken.training.runs import device, devices

NAME = "frames"


@dataclass(frozen=True)
class Frozen:
    """`encoder(*how)` hears these clips, each cut to `n_rows` log-mel rows; its frames go to `folder`; `mark` names
    what they depend on besides the features.
    """

    encoder: Callable[..., Panns]
    how: tuple[Any, ...]
    features: Path
    clip_ids: frozenset[str]
    n_rows: int
    folder: Path
    mark: str


def make(job: Frozen, map: Map, name: str) -> Path:
    """Fill `job.folder` with shards of every clip's valid frames in float32, where they are not there yet.

    A clip is heard alone, so that its frames depend on no other.
    """
    marks = {s: _mark(job, s) for s in shards_in(job.features)}
    todo = pending(job.folder, marks)
    for old in job.folder.glob("[0-9]*"):
        if int(old.name.split(".")[0]) not in marks:  # the features were sharded anew: its clips are in others now
            old.unlink()
    for _ in track(map(maker, job, todo, devices=devices()), len(todo), f"{name}: frames"):
        pass
    return job.folder


def _mark(job: Frozen, shard: int) -> str:
    return fingerprint(job.mark, facts(job.features, shard)["digest"])


def maker(job: Frozen) -> Callable[[int], int]:
    encoder = job.encoder(*job.how).to(device()).eval()
    return partial(make_shard, job, encoder, Features(job.features, "logmel"))


@torch.no_grad()
def make_shard(job: Frozen, encoder: Panns, features: Features, shard: int) -> int:
    arrays = {NAME: (encoder.dim, "float32")}
    with ShardWriter(job.folder, shard, fingerprint=_mark(job, shard), columns={}, arrays=arrays) as out:
        for row in read_shard(job.features, shard):
            clip_id = row["clip_id"]
            if clip_id in job.clip_ids:
                heard, _ = features.read([clip_id], min(features.rows(clip_id), job.n_rows))
                out.write(clip_id, frames=encoder(heard.to(device())).frames[0].cpu().numpy())
    return shard
