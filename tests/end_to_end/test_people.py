"""What people ask of a project in which everything has run."""

from __future__ import annotations

import json

import pytest
from corridor import Corridor
from typer.testing import CliRunner

from harken.cli import app
from harken.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_the_project(corridor: Corridor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corridor.root)
    monkeypatch.setenv("HARKEN_PARAMS", "params.yaml")
    monkeypatch.setenv("COLUMNS", "200")


def say(*args: str) -> str:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_stage_is_done() -> None:
    rows = json.loads(say("status", "--json"))
    assert {r["state"] for r in rows} == {"done"}
    asked = {r["stage"]: (r["ok"], r["failed"]) for r in rows if r["ok"] is not None}
    assert sum(asked["extract"]) == asked["download"][0]


def test_the_audit_s_page_is_named() -> None:
    assert "audit.html" in say("audit")


def test_a_sentence_finds_clips() -> None:
    hits = json.loads(say("search", "a big dog barks", "-k", "2", "--json"))
    assert len(hits) == 2
    assert hits[0]["score"] >= hits[1]["score"]
    assert hits[0]["clip_id"] in say("search", "a big dog barks", "--run", "nearest-20", "-k", "9")


def test_an_unknown_run_is_met_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'nearest-20'"):
        CliRunner().invoke(app, ["search", "a dog", "--run", "nearest-2"], catch_exceptions=False)
