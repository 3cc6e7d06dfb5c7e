from __future__ import annotations

import importlib.metadata
import json
import subprocess
from typing import Any

import pytest

import harken
from harken.media import versions


@pytest.fixture(autouse=True)
def fresh() -> Any:
    versions._tools.cache_clear()
    yield
    versions._tools.cache_clear()


def test_the_tools_of_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("what a package's own record tells needs no process")

    monkeypatch.setattr(subprocess, "run", refuse)
    found = versions.tools()
    assert set(found) == {"yt_dlp", "yt_dlp_ejs", "deno", "av", "harken"}
    assert found["yt_dlp"] == importlib.metadata.version("yt-dlp")
    assert found["av"] == importlib.metadata.version("av")
    assert found["harken"] == harken.__version__
    assert found["deno"][0].isdigit()
    json.dumps(found)
    found["av"] = "changed"
    assert versions.tools()["av"] != "changed"  # the cache is not the caller's


@pytest.mark.parametrize(
    ("on_path", "says", "expected"),
    [
        ("/bin/deno", "deno 2.9.8 (stable, release, x86_64-unknown-linux-gnu)\nv8 1\n", "2.9.8"),
        ("/bin/deno", "", "absent"),
        ("/bin/deno", None, "absent"),
        (None, "", "absent"),
    ],
)
def test_a_deno_that_no_package_brought(
    on_path: str | None, says: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(command: list[str], **kwargs: Any) -> Any:
        asked.append(command)
        if says is None:
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, 0, stdout=says)

    def version(name: str) -> str:
        if name == "deno":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(versions.shutil, "which", lambda name: on_path)
    monkeypatch.setattr(versions.subprocess, "run", run)
    monkeypatch.setattr(versions.importlib.metadata, "version", version)
    assert versions.tools()["deno"] == expected
    versions.tools()
    assert len(asked) == (1 if on_path else 0)  # once per process
