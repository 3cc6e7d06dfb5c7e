"""One module per DVC stage. One word names the stage, its module, its params section, its config class and its task."""

from __future__ import annotations

import importlib
from types import ModuleType

from harken.config import FOLDERS, Config
from harken.errors import unknown

STAGES = tuple(FOLDERS)


def stage(name: str) -> ModuleType:
    """The module of a stage. Raises ConfigError for an unknown name, with the nearest known one."""
    if name not in STAGES:
        raise unknown("stage", name, STAGES)
    return importlib.import_module(f"harken.stages.{name}")


def config_class(name: str) -> type[Config]:
    """The config class of a stage: `ExtractConfig` for `extract`."""
    cls: type[Config] = getattr(stage(name), f"{name.capitalize()}Config")
    return cls
