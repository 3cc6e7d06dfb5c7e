"""One module per DVC stage. One word names the stage, its module, its params section, its config class and its task."""

from __future__ import annotations

import importlib
from types import ModuleType

from harken.config import Config
from harken.errors import unknown

STAGES = (
    "lists",
    "catalog",
    "download",
    "audit",
    "extract",
    "weights",
    "stats",
    "embed",
    "pretrain",
    "finetune",
    "train",
    "evaluate",
    "report",
)
FOLDERS = {
    "lists": "lists",
    "catalog": "manifest",
    "download": "media",
    "audit": "audit",
    "extract": "features",
    "weights": "weights",
    "stats": "stats",
    "embed": "embeddings",
    "pretrain": "pretrained",
    "finetune": "finetuned",
    "train": "trained",
    "evaluate": "evaluations",
    "report": "report",
}
"""stage -> the name in `paths` of the folder that it fills"""


def stage(name: str) -> ModuleType:
    """The module of a stage. Raises ConfigError for an unknown name, with the nearest known one."""
    if name not in STAGES:
        raise unknown("stage", name, STAGES)
    return importlib.import_module(f"harken.stages.{name}")


def config_class(name: str) -> type[Config]:
    """The config class of a stage: `ExtractConfig` for `extract`."""
    cls: type[Config] = getattr(stage(name), f"{name.capitalize()}Config")
    return cls
