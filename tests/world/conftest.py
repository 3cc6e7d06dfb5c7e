"""A small world, built once for these tests: every kind of clip and of failure, little media."""

from __future__ import annotations

from pathlib import Path

import pytest

from harken.world import WorldConfig, build
from harken.world.corpus import plan
from harken.world.records import Record


def small_config(**changes: object) -> WorldConfig:
    values: dict[str, object] = {
        "seed": 5,
        "n_train": 24,
        "n_captioned": 12,
        "n_val": 4,
        "n_test": 6,
        "n_balanced": 6,
        "n_eval": 7,
        "n_clotho_train": 5,
        "n_clotho_val": 5,
        "n_clotho_test": 5,
        "width": 96,
        "height": 72,
        "fps": 10,
        "unavailable": 0.2,
        "broken": 0.15,
        "n_sounds": None,
        "sound_s": None,
        "background_db": [-50.0, -40.0],
        "further": None,
        "told": None,
    }
    return WorldConfig.model_validate(values | changes)


def default_config() -> WorldConfig:
    """The size of the committed params.yaml, for tests of plans, which make no media."""
    return small_config(
        n_train=440,
        n_captioned=260,
        n_val=36,
        n_test=100,
        n_balanced=40,
        n_eval=100,
        n_clotho_train=60,
        n_clotho_val=20,
        n_clotho_test=40,
        width=160,
        height=120,
        unavailable=0.08,
        broken=0.02,
        n_sounds=None,
        sound_s=None,
        background_db=(-50.0, -40.0),
        further=None,
        told=None,
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    build(out, small_config(), map)
    return out


@pytest.fixture(scope="session")
def small_plan() -> list[Record]:
    return plan(small_config())


@pytest.fixture(scope="session")
def default_plan() -> list[Record]:
    return plan(default_config())


@pytest.fixture(scope="session")
def make_config() -> object:
    return small_config
