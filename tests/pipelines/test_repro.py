"""The flow over DVC's graph: order, what a stage's run reports, and that nothing outlives a cancelled one."""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from processes import free_port, lives, until

pytest.importorskip("prefect", reason="the flow needs the extra `cluster`")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def flows() -> ModuleType:
    return importlib.import_module("pipelines.repro")


@pytest.fixture(scope="module")
def workspace() -> ModuleType:
    return importlib.import_module("pipelines.workspace")


def test_the_graph_is_dvcs_own(flows: ModuleType) -> None:
    from harken.stages import STAGES

    found = flows.graph(ROOT)
    assert set(found) == set(STAGES)
    assert found["lists"] == set()
    assert "catalog" in found["download"]
    assert "evaluate" in found["report"]


def test_the_order_respects_the_graph(flows: ModuleType) -> None:
    stages = {"a": set(), "b": {"a"}, "c": {"a"}, "d": {"b", "c"}, "e": set()}
    found = flows.order(stages)
    assert sorted(found) == sorted(stages)
    assert all(found.index(upstream) < found.index(s) for s in stages for upstream in stages[s])
    assert flows.order(stages, ["b"]) == ["a", "b"]


def test_an_unknown_target_names_the_nearest(flows: ModuleType) -> None:
    from harken.errors import ConfigError

    with pytest.raises(ConfigError, match="Did you mean 'catalog'"):
        flows.order({"catalog": set(), "lists": set()}, ["catalogue"])


def test_tasks_are_named_by_their_stage_and_remember_nothing(flows: ModuleType) -> None:
    from prefect.cache_policies import NO_CACHE

    found = flows.tasks(["lists", "catalog"])
    assert {name: t.name for name, t in found.items()} == {"lists": "lists", "catalog": "catalog"}
    for t in found.values():
        assert t.cache_policy == NO_CACHE
        assert t.persist_result is False
        assert t.retries == 0
    assert flows.tasks(["lists"], retries=2)["lists"].retries == 2


def test_a_stage_runs_once_and_tells_what_dvc_did(flows: ModuleType, toy: Path) -> None:
    said: list[str] = []
    assert flows.run_stage("first", said.append, toy)["did"] == "ran"
    assert (toy / "a").read_text() == "20"
    assert any("Running stage 'first'" in line for line in said)
    again = flows.run_stage("first", said.append, toy)
    assert again["did"] == "unchanged"
    assert again["stage"] == "first"
    # and one question tells of all stages what DVC would do
    stale = flows.changed(toy, said.append)
    assert "first" not in stale
    assert {"left", "last", "fails"} <= stale


def test_what_waits_for_a_stale_stage_is_not_untouched(flows: ModuleType) -> None:
    stages = {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"a"}}
    assert flows.untouched(stages, ["a", "b", "c", "d"], {"b"}) == {"a", "d"}
    assert flows.untouched(stages, ["a", "b", "c", "d"], set()) == set(stages)
    assert flows.untouched(stages, ["a", "b", "c", "d"], {"a"}) == set()


def test_a_failing_stage_ends_with_its_own_last_lines(flows: ModuleType, toy: Path) -> None:
    from harken.errors import HarkenError

    (toy / "a").write_text("20")
    with pytest.raises(HarkenError, match="there is no such thing"):
        flows.run_stage("fails", lambda line: None, toy)


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_cancelling_leaves_nothing_running(flows: ModuleType, toy: Path) -> None:
    errors: list[BaseException] = []
    asleep = threading.Event()

    def run() -> None:
        try:
            flows.run_stage("sleeps", lambda line: asleep.set() if line == "asleep" else None, toy)
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    assert asleep.wait(30)
    pids = [int(p) for p in (toy / "pids").read_text().split()]
    flows.stop_all()
    thread.join(30)
    assert not thread.is_alive()
    assert len(errors) == 1
    assert until(lambda: not any(map(lives, pids)), 10), [p for p in pids if lives(p)]


def test_what_a_stage_says_of_its_failure_decides_whether_it_is_tried_again(flows: ModuleType, toy: Path) -> None:
    from harken.errors import HarkenError, TransientError

    with pytest.raises(TransientError, match="h:1 does not answer"):
        flows.run_stage("busy", lambda line: None, toy, run_id="ours")

    def state(error: Exception) -> SimpleNamespace:
        return SimpleNamespace(result=lambda raise_on_failure: error)

    assert flows.is_transient(None, None, state(TransientError("away")))
    assert not flows.is_transient(None, None, state(HarkenError("wrong")))


def test_the_note_of_another_run_is_not_believed(workspace: ModuleType, tmp_path: Path) -> None:
    note = {"run_id": "theirs", "is_transient": True, "message": "away"}
    (tmp_path / "busy.failed.json").write_text(json.dumps(note))
    assert workspace.failure("busy", tmp_path, "theirs") == "away"
    assert workspace.failure("busy", tmp_path, "ours") is None
    (tmp_path / "busy.failed.json").write_text(json.dumps({**note, "run_id": "ours", "is_transient": False}))
    assert workspace.failure("busy", tmp_path, "ours") is None
    assert workspace.failure("busy", None, "ours") is None


def test_what_a_stage_tells_of_its_progress_is_shown(
    flows: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows, "LOOK_EVERY_S", 0.01)
    told = {"stage": "embed", "what": "embed", "done": 3, "total": 8, "left_s": 5.0, "pid": os.getpid()}
    (tmp_path / "embed.progress.json").write_text(json.dumps({**told, "host": socket.gethostname()}))
    seen: list[dict[str, object]] = []
    with flows._watched("embed", tmp_path, seen.append):
        assert until(lambda: seen, 5)
    assert seen[0]["done"] == 3
    assert seen[0]["what"] == "embed"


def test_a_server_that_takes_no_progress_costs_the_stage_nothing(
    flows: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object, **options: object) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(flows, "create_progress_artifact", away)
    said: list[str] = []
    bar = flows.Bar("embed", said.append)
    for done in (1, 2):
        bar({"what": "embed", "done": done, "total": 2, "left_s": None})
    assert len(said) == 1
    assert "the stage goes on" in said[0]


def test_one_flow_at_a_time_works_on_a_workspace(workspace: ModuleType, tmp_path: Path) -> None:
    from harken.errors import TransientError

    assert issubclass(workspace.WorkspaceBusy, TransientError), "its command ends with 75"
    said: list[str] = []
    with (
        workspace.exclusive(tmp_path, "flow run one", 0.0, said.append),
        pytest.raises(workspace.WorkspaceBusy, match=rf"flow run one \(process {os.getpid()} on "),
        workspace.exclusive(tmp_path, "flow run two", 0.0, said.append),
    ):
        raise AssertionError("two at once")
    assert said == []
    with workspace.exclusive(tmp_path, "flow run two", 0.0, said.append):
        pass


def test_a_flow_waits_for_another_and_says_so(workspace: ModuleType, tmp_path: Path) -> None:
    said: list[str] = []
    first = workspace.exclusive(tmp_path, "flow run one", 0.0, said.append)
    first.__enter__()
    threading.Timer(0.3, first.__exit__, (None, None, None)).start()
    with workspace.exclusive(tmp_path, "flow run two", 30.0, said.append):
        assert said
        assert "waits for flow run one" in said[0]


def test_the_lock_of_a_killed_flow_is_free_and_that_of_another_host_is_not(
    workspace: ModuleType, tmp_path: Path
) -> None:
    lock = tmp_path / ".dvc" / "tmp" / "flow.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({"who": "flow run dead", "pid": 1, "host": socket.gethostname()}))
    with workspace.exclusive(tmp_path, "flow run one", 0.0, lambda line: None):
        assert json.loads(lock.read_text())["who"] == "flow run one"
    lock.write_text(json.dumps({"who": "flow run away", "pid": 1, "host": "elsewhere"}))
    with (
        pytest.raises(workspace.WorkspaceBusy, match=r"on elsewhere.*delete .*flow.lock"),
        workspace.exclusive(tmp_path, "flow run one", 0.0, lambda line: None),
    ):
        raise AssertionError("two hosts at once")


def test_a_stage_is_told_the_run_and_its_variables(workspace: ModuleType) -> None:
    from harken.errors import ConfigError

    env = workspace.environment({"HARKEN_ENGINE": "dask", "CUDA_VISIBLE_DEVICES": "0"}, "run-1")
    assert env["HARKEN_ENGINE"] == "dask"
    assert env["HARKEN_RUN_ID"] == "run-1"
    for name in ("PATH", "HARKEN_RUN_ID", "LD_PRELOAD"):
        with pytest.raises(ConfigError, match=f"env: {name}"):
            workspace.environment({name: "x"}, "")


def test_no_server_and_a_server_that_is_away_are_told_apart(workspace: ModuleType) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from harken.errors import ConfigError, TransientError

    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(ConfigError, match=r"Start a server: prefect server start .* Or else."),
    ):
        workspace.require_server(" Or else.")
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(TransientError, match=r"http://127.0.0.1:9/api: no Prefect server answers.*prefect server start"),
    ):
        workspace.require_server()


def test_a_server_that_is_starting_is_waited_for(workspace: ModuleType) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"true")

        def log_message(self, *args: object) -> None: ...

    port = free_port()
    started: list[ThreadingHTTPServer] = []

    def start() -> None:
        started.append(ThreadingHTTPServer(("127.0.0.1", port), Health))
        started[0].serve_forever()

    timer = threading.Timer(0.5, start)
    timer.start()
    try:
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
            assert workspace.require_server(wait_s=30.0) == f"http://127.0.0.1:{port}/api"
    finally:
        timer.join(0.1)
        for server in started:
            server.shutdown()
            server.server_close()


@pytest.mark.slow
def test_the_flow_walks_the_graph_and_reports_every_stage(
    flows: ModuleType, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.testing.utilities import prefect_test_harness

    from harken.errors import HarkenError

    monkeypatch.setattr(flows, "RETRY_AFTER_S", [0.1])
    with prefect_test_harness(server_startup_timeout=120):
        rows = flows.repro(["last"], root=str(toy))
        assert [r["stage"] for r in rows] == flows.order(flows.graph(toy), ["last"])
        assert {r["did"] for r in rows} == {"ran"}
        with monkeypatch.context() as nothing:
            nothing.delattr(flows, "run_stage")  # where nothing is to be done no stage costs a process
            assert {r["did"] for r in flows.repro(["last"], branches=2, root=str(toy))} == {"unchanged"}
        (toy / "l").write_text("changed by hand")
        did = {r["stage"]: r["did"] for r in flows.repro(["last"], branches=2, root=str(toy))}
        assert did == {"first": "unchanged", "left": "from the run cache", "right": "unchanged", "last": "unchanged"}
        with pytest.raises(HarkenError, match="fails failed"):
            flows.repro(["after"], root=str(toy))
        assert not (toy / "g").exists()
        # a trouble that passes is tried again, a mistake is not
        assert flows.repro(["busy"], root=str(toy))[0]["tries"] == 2
        assert len(list(toy.glob("tried-*"))) == 2
        assert (toy / "b").read_text() == "b"
