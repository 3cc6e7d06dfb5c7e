"""What the flow `repro` costs over plain `dvc repro`: a stage, the start, and a graph in which nothing is to be done.

Chains of stages that do nothing, of two lengths, so that the cost of a stage is told from that of the start. The peers,
in turn with the flow: `dvc repro`, and one `dvc repro -s STAGE` after the other, which is the least that a flow of one
process a stage can cost. The Prefect server is started once, as for a project, and not counted. Wall time and the CPU
time of the command and its children, medians of 5.

    python benchmarks/bench_flow.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import interleaved

ROOT = Path(__file__).parents[1]
SHORT, LONG = 2, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=interleaved.ROUNDS)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch, server(Path(scratch) / "home") as env:
        chains = {n: chain(Path(scratch) / f"chain-{n}", n) for n in (SHORT, LONG)}
        found: dict[tuple[str, int, bool], tuple[float, float]] = {}
        for is_stale in (True, False):
            contestants = {
                (name, n): partial(run, root, env) for n, root in chains.items() for name, run in RUNS.items()
            }
            found |= {(*k, is_stale): v for k, v in measure(contestants, chains, is_stale, rounds).items()}
    show(found, rounds)


def show(found: dict[tuple[str, int, bool], tuple[float, float]], rounds: int) -> None:
    print(f"chains of {SHORT} and {LONG} stages that do nothing; wall s (CPU s)\n{interleaved.machine()}")
    for is_stale, what in ((True, "all to be done"), (False, "nothing to be done")):
        print(what)
        for name in RUNS:
            short, long = found[name, SHORT, is_stale], found[name, LONG, is_stale]
            stage = [(b - a) / (LONG - SHORT) for a, b in zip(short, long, strict=True)]
            start = [a - SHORT * s for a, s in zip(short, stage, strict=True)]
            print(
                f"  {name:<16} {SHORT} stages {short[0]:6.2f} ({short[1]:5.2f})  {LONG} stages {long[0]:6.2f} "
                f"({long[1]:5.2f})  a stage {stage[0]:5.2f} ({stage[1]:5.2f})  start {start[0]:5.2f} ({start[1]:5.2f})"
            )
        flow, plain, alone = (found[name, LONG, is_stale] for name in ("flow", "dvc repro", "dvc repro -s"))
        print(f"  flow / dvc repro {flow[0] / plain[0]:.2f} ({flow[1] / plain[1]:.2f})", end="   ")
        print(f"flow / dvc repro -s {flow[0] / alone[0]:.2f} ({flow[1] / alone[1]:.2f})")


def chain(root: Path, n: int) -> Path:
    """A workspace with a chain of `n` stages, each of which copies its file."""
    root.mkdir()
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=root, check=True)
    lines = ["stages:"]
    for i in range(n):
        lines += [f"  s{i}:", f"    cmd: cp f{i} f{i + 1}", f"    deps: [f{i}]", f"    outs: [f{i + 1}]"]
    (root / "dvc.yaml").write_text("\n".join(lines) + "\n")
    (root / "f0").write_text("0")
    return root


def plain(root: Path, env: dict[str, str]) -> None:
    call([sys.executable, "-m", "dvc", "repro"], root, env)


def one_by_one(root: Path, env: dict[str, str]) -> None:
    for i in range(int(root.name.rpartition("-")[2])):
        call([sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "-s", f"s{i}"], root, env)


def flow(root: Path, env: dict[str, str]) -> None:
    call([sys.executable, "-m", "pipelines.repro"], root, env)


RUNS: dict[str, Callable[[Path, dict[str, str]], None]] = {"dvc repro": plain, "dvc repro -s": one_by_one, "flow": flow}


def call(command: list[str], root: Path, env: dict[str, str]) -> None:
    ended = subprocess.run(command, cwd=root, env=env, text=True, capture_output=True)
    if ended.returncode != 0:
        sys.exit(f"{' '.join(command)}: status {ended.returncode}\n{ended.stdout}{ended.stderr}")


def measure(
    contestants: Mapping[tuple[str, int], Callable[[], None]], chains: Mapping[int, Path], is_stale: bool, rounds: int
) -> dict[tuple[str, int], tuple[float, float]]:
    """Median (wall s, CPU s of the children) of each contestant, in turn, after one warm-up each."""
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {k: [] for k in contestants}
    for i in range(rounds + 1):
        for (name, n), run in contestants.items():
            if is_stale:
                (chains[n] / "f0").write_text(f"{name} {i} {time.time_ns()}")  # never from the run cache
            began, cpu = time.monotonic(), _children_s()
            run()
            if i:
                taken[name, n].append((time.monotonic() - began, _children_s() - cpu))
    return {k: (statistics.median(w for w, _ in v), statistics.median(c for _, c in v)) for k, v in taken.items()}


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def server(home: Path) -> Iterator[dict[str, str]]:
    """A Prefect server on a free port; yields the environment of its clients."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    home.mkdir()
    url = f"http://127.0.0.1:{port}"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    env |= {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{url}/api",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    env |= {"DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [
        sys.executable,
        "-m",
        "prefect",
        "server",
        "start",
        "--no-ui",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with open(home / "log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 150
        while not _is_up(url):
            if time.monotonic() > deadline or process.poll() is not None:
                sys.exit((home / "log").read_text())
            time.sleep(0.5)
        yield env
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _is_up(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/api/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()
