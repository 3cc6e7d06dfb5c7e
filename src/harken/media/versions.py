"""The versions of the tools that an attempt depends on: what YouTube allows one of them it may refuse the next."""

from __future__ import annotations

import functools
import importlib.metadata
import shutil
import subprocess
from typing import Final

import harken

ABSENT: Final = "absent"
_DISTRIBUTIONS: Final = {"yt_dlp": "yt-dlp", "yt_dlp_ejs": "yt-dlp-ejs", "deno": "deno", "av": "av"}
_PATIENCE_S: Final = 20


def tools() -> dict[str, str]:
    """Versions of `yt_dlp`, `yt_dlp_ejs`, `deno`, `av` and `harken`; `absent` for what is not installed.

    They are looked up once per process, from the packages' own records; a deno that no package brought is asked itself.
    """
    return dict(_tools())


@functools.cache
def _tools() -> dict[str, str]:
    found = {name: _installed(distribution) for name, distribution in _DISTRIBUTIONS.items()}
    if found["deno"] == ABSENT:
        found["deno"] = _deno_on_path()
    return {**found, "harken": harken.__version__}


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _deno_on_path() -> str:
    """The version that `deno --version` prints in its first line, `deno 2.9.8 (stable, release, x86_64-...)`."""
    program = shutil.which("deno")
    if program is None:
        return ABSENT
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=_PATIENCE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ABSENT
    words = done.stdout.split()
    return words[1] if len(words) > 1 else ABSENT
