"""Real media (the makers of tests/media/conftest.py, which other folders cannot import by name) and a tiny project."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # what several test modules share is in tiny.py
import tiny


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> tiny.Project:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def project(_made: tiny.Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tiny.Project]:
    """A copy of the tiny project, computed with one thread as stages are."""
    monkeypatch.setenv("HARKEN_DEVICE", "cpu")
    monkeypatch.setenv("CI", "1")
    for name in ("HARKEN_RESTART", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(_made.root, tmp_path / "project", copy_function=os.link)  # whoever changes a file writes it anew
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny.Project(tmp_path / "project", tiny.params())
    torch.set_num_threads(threads)


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
