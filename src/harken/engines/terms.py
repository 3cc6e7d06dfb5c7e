"""What a running cluster's worker must have in common with the process that gives it work."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from harken import __version__
from harken.errors import ConfigError
from harken.shards import code_version

DECIDE = ("torch", "numpy", "scipy", "pyarrow", "av", "soxr", "pillow", "kaldi-native-fbank")
"""Packages that what a stage writes may depend on, to the last bit."""

OLD_S = 7 * 86400.0


@functools.cache
def sources() -> str:
    """harken's version and a hash of its sources, as they were when this process first asked."""
    return f"{__version__}, sources {code_version(['.'])[:12]}"


def facts() -> dict[str, str]:
    """What else may change a result: versions, and with how many threads this process computes."""
    found = {"python": platform.python_version(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset")}
    for name in DECIDE:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@dataclass(frozen=True)
class Terms:
    """Sent with the work: the asking process's harken, its other facts, its host, and a file that it has just made."""

    harken: str
    facts: Mapping[str, str]
    host: str
    mark: Path | None

    def differences(self) -> list[str]:
        """In a worker: what of its facts is another, as `name: here, there`.

        Raises ConfigError where this worker can do no work: another harken, another Python, or other folders.
        """
        here = f"the worker on {socket.gethostname()} (process {os.getpid()})"
        if sources() != self.harken:
            raise ConfigError(
                f"{here} has harken {sources()}, and {self.host} has {self.harken}. Install the same on both, then "
                "start the workers again: they keep what they once imported."
            )
        found = facts()
        if _minor(found["python"]) != _minor(self.facts["python"]):
            raise ConfigError(
                f"{here} runs Python {found['python']}, and {self.host} runs {self.facts['python']}. Start the workers "
                "with the same one."
            )
        if self.mark is not None and not self.mark.is_file():
            raise ConfigError(
                f"{here} does not see {self.mark}, which {self.host} has just written: it works in {Path.cwd()}. The "
                "folders that `paths` names must be the same on all machines: mount them, and start the workers in "
                "the project's folder."
            )
        told = sorted(found.keys() | self.facts.keys())
        pairs = [(name, found.get(name, "none"), self.facts.get(name, "none")) for name in told]
        return [f"{name}: {there}, not {asked}" for name, there, asked in pairs if there != asked]


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


@contextlib.contextmanager
def terms(shared: Path | None, token: str) -> Iterator[Terms]:
    """The terms of one fan-out. While it lasts, a file lies in `shared` that its workers must see."""
    mark = None if shared is None else shared / f".seen-{token}"
    if shared is not None and mark is not None:
        for old in shared.glob(".seen-*"):  # of processes that were killed; one that runs has shown its own long ago
            with contextlib.suppress(FileNotFoundError):
                if time.time() - old.stat().st_mtime > OLD_S:
                    old.unlink()
        mark.touch()
    try:
        yield Terms(sources(), facts(), socket.gethostname(), mark)
    finally:
        if mark is not None:
            mark.unlink(missing_ok=True)
