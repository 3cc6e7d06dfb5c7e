"""The deployments on a real server with a real worker: scheduled, run, killed, and told of to a real webhook.

This is also the smoke test of the pins of fastapi and sqlalchemy: with others everything installs, and no run is ever
scheduled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from processes import free_port, lives

pytest.importorskip("prefect", reason="the flows need the extra `cluster`")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCHEDULED = {"type": "SCHEDULED"}
DEPLOYMENTS = {"repro/nightly", "retry-downloads/hourly", "census/weekly", "audit/weekly", "gc/weekly"}
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("prefect"), pytest.mark.timeout(420)]


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_of_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


toys = _module(HERE / "conftest.py")
corridor = _module(ROOT / "tests" / "end_to_end" / "corridor.py")


@dataclass
class Hook:
    """A loopback site: what was posted to it, and the answers of a Data API of which `private` videos are private."""

    url: str = ""
    posted: list[dict[str, Any]] = field(default_factory=list)
    private: set[str] = field(default_factory=set)


@contextmanager
def serving() -> Iterator[Hook]:
    hook = Hook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hook.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer({})

        def do_GET(self) -> None:
            ids = parse_qs(urlsplit(self.path).query)["id"][0].split(",")
            self.answer({"items": [self.video(i) for i in ids]})

        def video(self, key: str) -> dict[str, Any]:
            privacy = "private" if key in hook.private else "public"
            status = {"uploadStatus": "processed", "privacyStatus": privacy, "license": "youtube", "embeddable": True}
            return {"id": key, "status": status, "contentDetails": {"duration": "PT1M", "contentRating": {}}}

        def answer(self, body: Any) -> None:
            raw = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hook.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hook
    finally:
        server.shutdown()
        server.server_close()


class Busy(Exception):  # noqa: N818
    """The server's SQLite is locked: clients ask again."""


def _answer(request: urllib.request.Request) -> Any:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as e:
        if e.code == 503:
            raise Busy from None
        if e.code == 404:
            return None
        raise AssertionError(f"{request.full_url}: {e.read().decode()}") from e


@dataclass
class Site:
    """A workspace with a tiny downloaded world and the toy graph, and a server that knows its deployments."""

    root: Path
    env: dict[str, str]
    hook: Hook
    worker: subprocess.Popen[bytes] | None = None

    def python(self, *args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *args]
        return subprocess.run(command, cwd=self.root, env=self.env, text=True, capture_output=True, timeout=200)

    def api(self, path: str, body: Any = None) -> Any:
        """The server's answer: to a GET, or to a POST of `body`; None where there is no such thing."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.env['PREFECT_API_URL']}/{path}", data, {"Content-Type": "application/json"}
        )
        for _ in range(20):
            with suppress(Busy):
                return _answer(request)
            time.sleep(1)
        raise AssertionError(f"{path}: busy twenty times")

    def start(self, deployment: str, **parameters: Any) -> str:
        known = self.api(f"deployments/name/{deployment}")
        made = self.api(f"deployments/{known['id']}/create_flow_run", {"parameters": parameters, "state": SCHEDULED})
        return str(made["id"])

    def state(self, run: str) -> tuple[str, str]:
        state = self.api(f"flow_runs/{run}")["state"]
        return state["type"], f"{state['name']}: {state['message']}"

    def ended(self, run: str, limit_s: float = 180.0) -> tuple[str, str]:
        deadline = time.monotonic() + limit_s
        while (found := self.state(run))[0] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            assert time.monotonic() < deadline, (found, self.log())
            time.sleep(0.5)
        return found

    def artifact(self, key: str) -> Any:
        return self.api(f"artifacts/{key}/latest")

    def work(self) -> None:
        """Start a worker, if none lives."""
        if self.worker is not None and self.worker.poll() is None:
            return
        with open(self.root / "worker.log", "ab") as log:
            self.worker = subprocess.Popen(
                [sys.executable, "-m", "prefect", "worker", "start", "--pool", "harken"],
                cwd=self.root,
                env={**self.env, "HARKEN_YOUTUBE_API_KEY": "nobody's"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self) -> str:
        path = self.root / "worker.log"
        return path.read_text()[-4000:] if path.is_file() else ""

    def asleep(self) -> tuple[int, list[int]]:
        """The process of the flow that runs the stage `sleeps`, and the stage's own processes."""
        assert toys.until((self.root / "pids").is_file, 90), self.log()
        time.sleep(1)
        holder = json.loads((self.root / ".dvc" / "tmp" / "flow.lock").read_text())
        return int(holder["pid"]), [int(p) for p in (self.root / "pids").read_text().split()]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy graph beside a tiny world that was downloaded."""
    root = tmp_path_factory.mktemp("workspace")
    made = corridor.Corridor(root, corridor.tiny_params())
    made.write()
    made.run("lists catalog download")
    toys.make_toy(root)
    shutil.copytree(ROOT / "pipelines", root / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prefect.yaml", root)
    return Path(root)


@pytest.fixture(scope="module")
def site(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving() as hook, toys.prefect_server(tmp_path_factory.mktemp("prefect")) as env:
        env["PYTHONPATH"] = os.pathsep.join([str(workspace), str(ROOT / "src")])
        found = Site(workspace, env, hook)
        try:
            made = found.python("-m", "pipelines.setup", "--webhook", hook.url)
            assert made.returncode == 0, made.stdout + made.stderr
            yield found
        finally:
            if found.worker is not None:
                toys.end(found.worker)


def scheduled(site: Site) -> dict[str, int]:
    """The scheduled runs of each deployment."""
    found = dict.fromkeys(names(site).values(), 0)
    for run in site.api("flow_runs/filter", {"limit": 200}):
        found[names(site)[run["deployment_id"]]] += run["state_name"] == "Scheduled" and run["auto_scheduled"]
    return found


def names(site: Site) -> dict[str, str]:
    """flow/deployment of each deployment, by id."""
    flows = {f["id"]: f["name"] for f in site.api("flows/filter", {})}
    return {d["id"]: f"{flows[d['flow_id']]}/{d['name']}" for d in site.api("deployments/filter", {})}


def test_every_deployment_is_scheduled_and_setup_may_be_run_again(site: Site) -> None:
    again = site.python("-m", "pipelines.setup", "--webhook", site.hook.url)
    assert again.returncode == 0, again.stdout + again.stderr
    found: dict[str, int] = {}
    deadline = time.monotonic() + 120
    while (not found or min(found.values()) == 0) and time.monotonic() < deadline:
        time.sleep(1)
        found = scheduled(site)
    assert set(found) == DEPLOYMENTS
    assert min(found.values()) > 0, found
    found_automations = sorted(a["name"] for a in site.api("automations/filter", {}))
    assert found_automations == ["harken-failed", "harken-lost", "harken-zombies"]
    assert [p["name"] for p in site.api("work_pools/filter", {})] == ["harken"]
    checked = site.python("-m", "pipelines.setup", "--check")
    assert checked.returncode == 1
    assert "no worker is online. Run `prefect worker start --pool harken`" in checked.stdout


def test_a_census_an_audit_and_a_loss_told_to_the_webhook(site: Site) -> None:
    site.work()
    first = site.start("audit/weekly")
    assert site.ended(first)[0] == "COMPLETED", site.log()
    assert site.artifact("newly-missing")["data"] == "[]"
    taken = next(site.root.glob("ledger/world/*/snapshots/*"))
    taken.rename(taken.with_name("2020-01-01"))  # as if it had been taken that day

    import pyarrow.parquet as pq

    visits = pq.read_table(site.root / "data/world/visits/visits.parquet").to_pandas()
    lost = sorted(i for i in visits.loc[visits["state"] == "ok", "clip_id"] if i.startswith("yt:"))[0]
    site.hook.private.add(lost[3:14])
    before = (site.root / "data/world/visits/visits.parquet").read_bytes()
    run = site.start("census/weekly", base_url=site.hook.url, older_than=0)
    assert site.ended(run)[0] == "COMPLETED", site.log()
    run = site.start("audit/weekly")
    assert site.ended(run)[0] == "COMPLETED", site.log()

    table = site.artifact("newly-missing")
    rows = json.loads(table["data"])
    found = [row for row in rows if row["clip_id"] == lost]
    assert found, rows
    assert {row["clip_id"][3:14] for row in rows} == {lost[3:14]}
    assert found[0]["reason"] == "gone.private"
    assert found[0]["since"] == time.strftime("%Y-%m-%d", time.gmtime())
    assert "against 2020-01-01" in table["description"]
    assert toys.until(lambda: any(p["what"] == "lost" for p in site.hook.posted), 60), site.hook.posted
    posted = next(p for p in site.hook.posted if p["what"] == "lost")
    assert posted["facts"]["n_newly_missing"] == len({row["clip_id"] for row in rows})
    assert (site.root / "data/world/visits/visits.parquet").read_bytes() == before  # nothing became stale


def test_a_repro_tells_its_progress_and_its_run(site: Site) -> None:
    site.work()
    run = site.start("repro/nightly", targets=["tells"])
    seen: list[float] = []
    deadline = time.monotonic() + 120
    while site.state(run)[0] in ("SCHEDULED", "PENDING", "RUNNING") and time.monotonic() < deadline:
        if (found := site.artifact("progress-tells")) is not None:
            seen.append(float(found["data"]))
        time.sleep(0.5)
    assert site.ended(run)[0] == "COMPLETED", site.log()
    assert any(0 < percent < 100 for percent in seen), seen
    assert site.artifact("progress-tells")["description"] == "done"
    assert (site.root / "t").read_text() == run
    rows = json.loads(site.artifact("repro")["data"])
    assert [r["stage"] for r in rows] == ["tells"]


def test_the_other_deployments_run(site: Site) -> None:
    site.work()
    runs = [site.start("retry-downloads/hourly"), site.start("gc/weekly")]
    for run in runs:
        kind, told = site.ended(run)
        assert kind == "COMPLETED", (told, site.log())


def test_a_killed_flow_is_crashed_leaves_nothing_running_and_is_told_of(site: Site) -> None:
    site.work()
    (site.root / "pids").unlink(missing_ok=True)
    run = site.start("repro/nightly", targets=["sleeps"])
    flow, stage = site.asleep()
    os.kill(flow, signal.SIGKILL)
    kind, told = site.ended(run, 90)
    assert kind == "CRASHED", told
    assert toys.until(lambda: not any(map(lives, stage)), 10), "the stage lives on"
    assert toys.until(lambda: any(p["what"] == "failed" for p in site.hook.posted), 60), site.hook.posted
    assert next(p for p in site.hook.posted if p["what"] == "failed")["flow"] == "repro"


def test_a_cancelled_flow_leaves_nothing_running(site: Site) -> None:
    site.work()
    (site.root / "pids").unlink(missing_ok=True)
    run = site.start("repro/nightly", targets=["sleeps"])
    _, stage = site.asleep()
    assert site.python("-m", "prefect", "flow-run", "cancel", run).returncode == 0
    assert site.ended(run, 120)[0] == "CANCELLED"
    assert toys.until(lambda: not any(map(lives, stage)), 30), "the stage lives on"


def test_with_the_worker_dead_too_the_run_is_crashed_by_its_silence(site: Site) -> None:
    site.work()
    (site.root / "pids").unlink(missing_ok=True)
    run = site.start("repro/nightly", targets=["sleeps"])
    flow, stage = site.asleep()
    time.sleep(35)  # until it has beaten once at least
    assert site.worker is not None
    os.kill(site.worker.pid, signal.SIGKILL)
    os.kill(flow, signal.SIGKILL)
    site.worker.wait()
    kind, told = site.ended(run, 240)
    assert kind == "CRASHED", told
    assert "Nothing was heard of it" in told
    assert toys.until(lambda: not any(map(lives, stage)), 10), "the stage lives on"


def test_without_a_server_the_command_says_what_to_do_and_with_its_own_it_works(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pipelines", toy / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    env |= {"PREFECT_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT / "src"), "NO_PROXY": "127.0.0.1"}

    def repro(*args: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines.repro", "first", *args]
        return subprocess.run(command, cwd=toy, env={**env, **more}, text=True, capture_output=True, timeout=200)

    ended = repro()
    assert ended.returncode == 1
    assert "PREFECT_API_URL: not set" in ended.stderr
    ended = repro(PREFECT_API_URL="http://127.0.0.1:9/api")
    assert ended.returncode == 75
    assert "no Prefect server answers there" in ended.stderr
    assert not (toy / "a").exists()
    ended = repro("--ephemeral")
    assert ended.returncode == 0, ended.stderr
    assert (toy / "a").read_text() == "20"
    assert ended.stdout.split()[:2] == ["first", "ran"]


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL server of its own; yields the address of its database. Skips where none is installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    initdb = shutil.which("initdb") or next((str(f / "initdb") for f in folders if (f / "initdb").is_file()), None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed here (initdb, postgres)")
    who: dict[str, Any] = {}
    if os.getuid() == 0:  # it refuses to run as root
        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no account `postgres`")
        who = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        if who:
            os.chown(folder, who["user"], who["group"])
        data, port = f"{folder}/data", free_port()
        made = [initdb, "-D", data, "-U", "harken", "-A", "trust", "-N", "-E", "UTF8", "--locale", "C"]
        subprocess.run(made, check=True, capture_output=True, cwd=folder, **who)
        command = [str(Path(initdb).resolve().with_name("postgres")), "-D", data, "-k", folder, "-p", str(port)]
        server = subprocess.Popen(
            [*command, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **who,
        )
        try:
            assert toys.until((Path(folder) / f".s.PGSQL.{port}").exists, 30)
            yield f"postgresql+asyncpg://harken@127.0.0.1:{port}/postgres"
        finally:
            toys.end(server)


def test_on_postgresql_too_every_deployment_is_scheduled(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pipelines", toy / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prefect.yaml", toy)
    with (
        postgres() as database,
        serving() as hook,
        toys.prefect_server(tmp_path / "home", PREFECT_API_DATABASE_CONNECTION_URL=database) as env,
    ):
        env["PYTHONPATH"] = os.pathsep.join([str(toy), str(ROOT / "src")])
        site = Site(toy, env, hook)
        made = site.python("-m", "pipelines.setup", "--webhook", hook.url)
        assert made.returncode == 0, made.stdout + made.stderr
        assert set(names(site).values()) == DEPLOYMENTS
        assert toys.until(lambda: min(scheduled(site).values()) > 0, 120), scheduled(site)
        assert not list((tmp_path / "home").glob("*.db"))
        # the server checks a pool's template; a worker of Kubernetes itself was not run
        template = json.loads((ROOT / "deploy" / "kubernetes" / "base-job-template.json").read_text())
        pool = {"name": "jobs", "type": "kubernetes", "base_job_template": template}
        assert site.api("work_pools/", pool)["base_job_template"] == template
