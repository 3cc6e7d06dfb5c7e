"""A project that is ready to be trained on, its features and embeddings drawn at random, in which stages run inline."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from harken.clips import Clip, Manifest, Source, Split
from harken.config import FOLDERS, Paths, parse, read_params
from harken.engines import inline
from harken.models import weights
from harken.models.audio_vit import AudioViT
from harken.shards import ShardWriter, vectors_type, write_json
from harken.stages import config_class, stage
from harken.stages.embed import write_captions
from harken.stages.extract import COLUMNS
from harken.stages.weights import VISUAL

ROOT = Path(__file__).parents[2]
N_SHARDS, N_IMAGES, DIM = 2, 4, 16
# as VIP-ANT's towers a head per 64 of width
SHAPE = {"width": 64, "layers": 1, "heads": 1, "patch": 16, "embed_dim": DIM}
VIT = {"n_frames": 200, "stride": [16, 32]}
SIZES = {
    ("audioset", Split.TRAIN): 10,
    ("audioset", Split.VAL): 3,
    ("audioset", Split.TEST): 4,
    ("audiocaps", Split.TRAIN): 6,
    ("audiocaps", Split.VAL): 3,
    ("audiocaps", Split.TEST): 3,
}
IMAGE_TIMES_S = (0.0, 10 / 3, 20 / 3, 10 - 1 / 25)
STAGES = ("pretrain", "finetune", "evaluate", "report")


def params() -> dict[str, Any]:
    """The committed params of the stages that are run here, made tiny: one epoch, and one recipe of each stage."""
    p = {s: copy.deepcopy(read_params(ROOT / "params.yaml")[s]) for s in STAGES}
    short = {"batch": 4, "epochs": 1, "checkpoint_every": 1}
    short["augment"] = {"freq_mask": 8, "time_mask": 20, "roll": True, "gain_db": 4.0}
    p["pretrain"] |= short | {"vit": VIT, "recipes": {"vip_ant": {"match": "random_image"}}}
    p["finetune"] |= short | {"recipes": {"vip_ant": {"start": "vip_ant", "at_pool": "mean"}}}
    for name in ("pretrain", "finetune"):
        p[name]["optimizer"]["schedule"] = {"name": "warmup_cosine", "warmup_epochs": 0, "final": 0.001}
    p["evaluate"] |= {"n_resamples": 20}
    p["report"] |= {"n_resamples": 20, "compare": [], "compare_planted": []}
    return p


@dataclass
class Project:
    """Folders under `root`, and the params with which stages are run; a test changes both as it likes."""

    root: Path
    params: dict[str, Any]

    @property
    def paths(self) -> Paths:
        return Paths(**{name: self.root / name for name in Paths.model_fields})

    def cfg(self, name: str) -> Any:
        return parse(name, config_class(name), self.params[name])

    def run(self, *names: str) -> None:
        for name in names:
            stage(name).run(self.paths, self.cfg(name), inline)

    def recipe(self, name: str, pretrain: Mapping[str, Any], at_pool: str = "mean") -> None:
        """Make this the one recipe of both stages."""
        self.params["pretrain"]["recipes"] = {name: dict(pretrain)}
        self.params["finetune"]["recipes"] = {name: {"start": name, "at_pool": at_pool}}

    def contents(self, name: str) -> dict[str, bytes]:
        """Every file that a stage published."""
        out: Path = getattr(self.paths, FOLDERS[name])
        return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def make(root: Path) -> Project:
    """Features, embeddings, statistics and weights, as the stages before `pretrain` leave them."""
    project = Project(root, params())
    paths, rng = project.paths, np.random.default_rng(1)
    clips = [
        Clip(f"yt:{dataset}{split}{i}", dataset, split, Source("youtube", f"{dataset}{split}{i}"), 0.0, 10.0, said)
        for (dataset, split), n in SIZES.items()
        for i in range(n)
        for said in [(f"{split} sound {i}", f"another {split} sound {i}") if dataset == "audiocaps" else ()]
    ]
    manifest = Manifest.build(clips, N_SHARDS)
    paths.manifest.mkdir(parents=True)
    pq.write_table(manifest.table, paths.manifest / "clips.parquet")
    facts = dict.fromkeys(set(COLUMNS) - {"images", "image_times_s"}, 1.0)
    for shard in manifest.shards:
        ids = [c.id for c in manifest.requested(shard)]
        arrays = {"fbank": (128, "float16")}
        with ShardWriter(paths.features, shard, fingerprint="f", columns=COLUMNS, arrays=arrays) as out:
            for i in ids:
                fbank = rng.standard_normal((int(rng.integers(150, 250)), 128), np.float32)
                out.write(i, images=[b""] * N_IMAGES, image_times_s=list(IMAGE_TIMES_S), fbank=fbank, **facts)
        columns = {"images": vectors_type("float32", N_IMAGES, DIM)}
        with ShardWriter(paths.embeddings, shard, fingerprint="f", columns=columns) as out:
            for i in ids:
                out.write(i, images=rng.standard_normal((N_IMAGES, DIM), np.float32))
    rows = [[c.dataset, str(c.split), c.id, said] for c in clips for said in c.captions]
    write_captions(paths.embeddings / "captions.parquet", rows, rng.standard_normal((len(rows), DIM), np.float32), {})
    stats = {"dataset": "audioset", "split": "train", "exclude": {}, "leave_out": [], "mean": 0.0, "std": 1.0}
    write_json(paths.stats / "stats.json", stats)
    torch.manual_seed(0)
    visual = AudioViT(**SHAPE, pos_grid=(2, 2)).state_dict()
    write_json(paths.weights / "weights.json", {"clip": {"sha256": "0"}})
    weights.save(paths.weights / VISUAL, visual, {"heads": SHAPE["heads"]})
    paths.trained.mkdir()  # nothing of the other paper's
    return project


def vipant_layout() -> ModuleType:
    """tests/models/test_vipant.py, which can write a checkpoint as VIP-ANT does."""
    path = ROOT / "tests/models/test_vipant.py"
    spec = importlib.util.spec_from_file_location("vipant_layout", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
