"""A full report of a realistic corpus, made once for these tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # what several test modules share is in realistic.py and chromium.py
import realistic


@pytest.fixture(scope="session")
def full() -> dict[str, Any]:
    """The audit of five thousand clips in seven splits, with everything that an audit can hold; not to be changed."""
    return realistic.report()
