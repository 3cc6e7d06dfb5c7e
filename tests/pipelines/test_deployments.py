"""prefect.yaml, the set-up and the Kubernetes template, as far as they can be judged without a server."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import socket
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

prefect = pytest.importorskip("prefect", reason="the flows need the extra `cluster`")
ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "deploy" / "kubernetes" / "base-job-template.json"
WORKERS = "server/api/collections_data/views/aggregate-worker-metadata.json"


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    return importlib.import_module("pipelines.setup")


@pytest.fixture(scope="module")
def upkeep() -> ModuleType:
    return importlib.import_module("pipelines.upkeep")


def test_every_flow_is_deployed_with_a_schedule_and_parameters_that_it_has(setup: ModuleType) -> None:
    deployed = set()
    for d in setup.declared(ROOT / "prefect.yaml"):
        path, name = d["entrypoint"].split(":")
        flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
        assert isinstance(flow, prefect.Flow)
        assert set(d.get("parameters") or {}) <= set(inspect.signature(flow.fn).parameters)
        assert d["schedules"]
        assert d["description"]
        assert d["concurrency_limit"]["limit"] == 1
        assert d["tags"] == [setup.TAG]
        # #22885, #20251 of Prefect: a flow that waits for its retry while it holds a slot is ended
        assert not flow.retries
        deployed.add((flow.name, d["name"]))
    flows = {"repro", *importlib.import_module("pipelines.upkeep").FLOWS}
    assert {flow for flow, _ in deployed} == flows
    assert len(deployed) == len(setup.declared(ROOT / "prefect.yaml"))


def test_a_deployment_that_no_worker_would_run_is_refused(setup: ModuleType, tmp_path: Path) -> None:
    from harken.errors import ConfigError

    with pytest.raises(ConfigError, match=r"no such file. Run this in the workspace"):
        setup.declared(tmp_path / "prefect.yaml")
    (tmp_path / "prefect.yaml").write_text("deployments: [{name: nightly}]")
    with pytest.raises(ConfigError, match="deployment 'nightly' names no work pool"):
        setup.declared(tmp_path / "prefect.yaml")


def test_a_pool_of_another_type_is_refused_with_what_to_do(setup: ModuleType) -> None:
    from harken.errors import ConfigError

    client = SimpleNamespace(read_work_pool=lambda name: SimpleNamespace(type="ecs", concurrency_limit=None))
    with pytest.raises(ConfigError, match=r"work pool 'harken': it is of type 'ecs'.*prefect work-pool delete harken"):
        setup.pools(client, {"harken"})


def test_the_automations_are_what_the_server_would_take(setup: ModuleType) -> None:
    block = "00000000-0000-0000-0000-000000000000"
    zombies, failed, lost = setup.zombies(), *setup.notifications(block)
    assert zombies.trigger.within.total_seconds() >= 3 * 30
    assert zombies.actions[0].state == prefect.client.schemas.objects.StateType.CRASHED
    assert failed.trigger.match_related.root["prefect.resource.id"] == f"prefect.tag.{setup.TAG}"
    assert lost.trigger.expect == {setup.LOST}
    with pytest.raises(Exception, match="begins with http"):
        setup.webhook("hooks.example.org")


def test_paused_lanes_of_this_machine_are_told_with_their_reason(
    upkeep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harken.media.lanes import Lane, Pace

    monkeypatch.setenv("HARKEN_PARAMS", str(ROOT / "params.yaml"))
    monkeypatch.chdir(tmp_path)
    assert upkeep._paused() == ""
    lane = Lane(tmp_path / "ledger" / "lanes", f"youtube@{socket.gethostname()}", Pace(per_hour=200.0))
    lane.report("a", "")
    assert upkeep._paused() == ""
    lane.report("b", "session.bot_check")
    assert f"youtube@{socket.gethostname()}: paused until " in upkeep._paused()
    assert "session.bot_check" in upkeep._paused()


def test_flows_that_cannot_work_now_end_as_skipped_and_say_why(
    upkeep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = importlib.import_module("pipelines.workspace")
    monkeypatch.setenv("HARKEN_PARAMS", str(ROOT / "params.yaml"))
    monkeypatch.chdir(tmp_path)
    with prefect.logging.disable_run_logger():
        asked = upkeep.census.fn()
        assert (asked.name, asked.type.value) == ("Skipped", "COMPLETED")
        assert "the built-in world" in asked.message
        with workspace.exclusive(".", "flow run other", 0.0, lambda line: None):
            gone_on = upkeep.retry_downloads.fn()
    assert (gone_on.name, gone_on.type.value) == ("Skipped", "COMPLETED")
    assert "flow run other" in gone_on.message


def test_a_census_whose_quota_is_spent_ends_as_paused_and_one_that_is_refused_as_failed(
    upkeep: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harken.errors import HarkenError

    monkeypatch.setenv("HARKEN_PARAMS", str(ROOT / "params.yaml"))
    monkeypatch.setattr(upkeep, "create_table_artifact", lambda **given: None)
    told: dict[str, Any] = {"found": {"present": 50}, "n_left": 3, "paused": "paused until tomorrow"}
    monkeypatch.setattr(upkeep.workspace, "told", lambda command, root, say: (1, told))
    with prefect.logging.disable_run_logger():
        ended = upkeep.census.fn(base_url="http://127.0.0.1:9")
        assert (ended.name, ended.message) == ("Paused", "paused until tomorrow")
        told["paused"] = ""
        with pytest.raises(HarkenError, match="status 1"):
            upkeep.census.fn(base_url="http://127.0.0.1:9")


@pytest.mark.parametrize(("package", "below"), [("fastapi", "0.151"), ("sqlalchemy", "2.1")])
def test_the_pins_without_which_nothing_is_scheduled_stand(package: str, below: str) -> None:
    pinned = [
        Version(line.split("==")[1].split(" ")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.lower().startswith(f"{package}==")
    ]
    assert pinned
    assert pinned[0] < Version(below)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [Requirement(r) for r in extras["cluster"] if Requirement(r).name == package]
    assert asked
    assert not asked[0].specifier.contains(below)


def placeholders(value: Any) -> set[str]:
    return set(re.findall(r"{{ *([\w.]+) *}}", json.dumps(value)))


def test_the_kubernetes_template_is_the_workers_own_and_more() -> None:
    path = Path(prefect.__file__).parent / WORKERS
    if not path.is_file():
        pytest.skip("this Prefect does not carry the templates of its workers")
    theirs = json.loads(path.read_text())["prefect-kubernetes"]["kubernetes"]["default_base_job_configuration"]
    ours = json.loads(TEMPLATE.read_text())
    assert set(theirs) == set(ours)
    known = set(ours["variables"]["properties"])
    assert known >= set(theirs["variables"]["properties"])
    assert placeholders(ours["job_configuration"]) == known
    assert _within(theirs["job_configuration"], ours["job_configuration"])
    added = known - set(theirs["variables"]["properties"])
    assert all("default" in ours["variables"]["properties"][name] for name in added)


def test_what_a_deployment_sets_the_template_takes(setup: ModuleType) -> None:
    known = set(json.loads(TEMPLATE.read_text())["variables"]["properties"])
    for d in setup.declared(ROOT / "prefect.yaml"):
        assert set(d["work_pool"]["job_variables"]) <= known


def _within(theirs: Any, ours: Any) -> bool:
    """Whether everything of a template stands in the other, in its place."""
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and all(k in ours and _within(v, ours[k]) for k, v in theirs.items())
    if isinstance(theirs, list):
        return isinstance(ours, list) and all(_within(t, o) for t, o in zip(theirs, ours, strict=True))
    return bool(theirs == ours)
