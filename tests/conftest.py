"""Shapes and types of the whole library are checked at run time in tests, and only there (jaxtyping, beartype)."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # what tests in several folders share
# before any test module imports harken; the tower is PEP 484's: a function of a float takes an int
jaxtyping.install_import_hook("harken", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

settings.register_profile("harken", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("harken")
# a shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No type checks: for tests of how functions refuse what their annotations already rule out."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Toys are slowed by more: a second thread is not awake when they are done, or waits for the first."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
