"""Modules that lie beside these tests and that guarded processes must be able to import."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def beside() -> Iterator[Callable[[str], ModuleType]]:
    """A module of this folder by its name; a guarded process takes the path of the one that starts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield importlib.import_module
