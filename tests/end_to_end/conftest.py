"""The corridor's fixture: every stage run once, shared by all tests here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harken.stages import STAGES

sys.path.insert(0, str(Path(__file__).parent))  # what several test modules share is in corridor.py
from corridor import Corridor, tiny_params

# starting a process is most of the time that a tiny stage takes: each of these runs several, and what can, side by side
WAVES = (
    ("lists catalog download",),
    ("audit", "extract stats weights"),
    ("embed pretrain finetune", "train"),
    ("evaluate report",),
)
assert {s for wave in WAVES for chain in wave for s in chain.split()} == set(STAGES)


@pytest.fixture(scope="session")
def corridor(tmp_path_factory: pytest.TempPathFactory) -> Corridor:
    found = Corridor(tmp_path_factory.mktemp("corridor"), tiny_params())
    found.write()
    found.run_all(WAVES)
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever needs the corridor runs in one process, where it is made once."""
    for item in items:
        if "corridor" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("corridor"))
