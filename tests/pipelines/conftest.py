"""A toy graph, and a real Prefect server of its own for the tests that need one."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import processes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # `pipelines` is no part of the installed package
until = functools.partial(processes.until, every_s=0.2)  # most questions are asked of a server

TOY = """\
stages:
  first:
    cmd: python -c "open('a', 'w').write(open('seed').read())"
    deps: [seed]
    outs: [a]
  left:
    cmd: python -c "open('l', 'w').write('l')"
    deps: [a]
    outs: [l]
  right:
    cmd: python -c "open('r', 'w').write('r')"
    deps: [a]
    outs: [r]
  last:
    cmd: python -c "open('z', 'w').write('z')"
    deps: [l, r]
    outs: [z]
  fails:
    cmd: python -c "print('there is no such thing'); raise SystemExit(3)"
    deps: [a]
    outs: [f]
  after:
    cmd: python -c "open('g', 'w').write('g')"
    deps: [f]
    outs: [g]
  sleeps:
    cmd: python sleeps.py
    outs: [s]
  busy:
    cmd: python busy.py
    outs: [b]
  tells:
    cmd: python tells.py
    outs: [t]
  download:
    cmd: python -c "open('d', 'w').write('d')"
    outs: [d]
"""
SLEEPS = """\
import os, subprocess, sys, time
from harken.engines import die_with_parent
die_with_parent()
if len(sys.argv) == 1:
    child = subprocess.Popen([sys.executable, __file__, "worker"])
    with open("pids", "w") as f:
        f.write(f"{os.getpid()} {child.pid}")
    print("asleep", flush=True)
time.sleep(600)
"""
"""Ends with its parent, as stages and their workers do."""
BUSY = """\
import json, os, pathlib, sys
n = len(list(pathlib.Path().glob("tried-*")))
pathlib.Path(f"tried-{n}").touch()
work = pathlib.Path(".work/world")
work.mkdir(parents=True, exist_ok=True)
told = {"stage": "busy", "run_id": os.environ.get("HARKEN_RUN_ID"), "status": 75, "is_transient": True}
if n == 0:
    (work / "busy.failed.json").write_text(json.dumps({**told, "message": "tcp://h:1 does not answer"}))
    sys.exit(75)
(work / "busy.failed.json").unlink(missing_ok=True)
pathlib.Path("b").write_text("b")
"""
TELLS = """\
import os, pathlib, time
from harken.progress import track, watched
work = pathlib.Path(".work/world")
work.mkdir(parents=True, exist_ok=True)
with watched(work, "tells", os.environ.get("HARKEN_RUN_ID", "")):
    for _ in track(range(8), 8, "items"):
        time.sleep(0.8)
pathlib.Path("t").write_text(os.environ["HARKEN_RUN_ID"])
"""


@pytest.fixture(scope="session")
def _toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def toy(_toy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_toy, tmp_path / "toy"))


def make_toy(root: Path) -> Path:
    """A workspace with a small graph of its own: one stage fails, one sleeps, one is well the second time."""
    root.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=root, check=True)
    (root / "dvc.yaml").write_text(TOY)
    (root / "seed").write_text("20")
    (root / "sleeps.py").write_text(SLEEPS)
    (root / "busy.py").write_text(BUSY)
    (root / "tells.py").write_text(TELLS)
    if not (root / "params.yaml").is_file():
        shutil.copy(ROOT / "params.yaml", root)
    return root


@contextmanager
def prefect_server(home: Path, **settings: str) -> Iterator[dict[str, str]]:
    """A server on a free port with a database of its own; yields the environment of its clients."""
    url = f"http://127.0.0.1:{processes.free_port()}"
    told = {"PREFECT_HOME": str(home), "PREFECT_API_URL": f"{url}/api", "NO_PROXY": "127.0.0.1,localhost"}
    told |= {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "CI": "1", **settings}
    env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | told
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    home.mkdir(parents=True, exist_ok=True)
    port = url.rpartition(":")[2]
    with open(home / "server.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui"],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            assert until(lambda: _is_up(url) or server.poll() is not None, 150), (home / "server.log").read_text()
            assert server.poll() is None, (home / "server.log").read_text()
            yield env
        finally:
            end(server)


def _is_up(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/api/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and all of the group."""
    for sign in (15, 9):
        try:
            os.killpg(process.pid, sign)
            process.wait(15)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()
