"""Real media for tests of stages: the makers of tests/media/conftest.py, which other folders cannot import by name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def lab() -> Any:
    """`make`, `sound` and `read_number`, as tests of media have them."""
    path = Path(__file__).parents[1] / "media/conftest.py"
    spec = importlib.util.spec_from_file_location("media_lab", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["media_lab"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
