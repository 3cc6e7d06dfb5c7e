"""Several hosts on one DVC remote, a store like S3: what one has computed no other computes; no secret gets into git.

Hosts are fresh clones, each with its cache, its home and, where the system lets us (root on Linux), its own network:
they reach the store over a wire of their own and each other not at all. Elsewhere all of them share the loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from corridor import ROOT, contents, tiny_params
from ruamel.yaml import YAML

from harken import timings
from processes import free_port

pytest.importorskip("moto", reason="a store like S3 needs the extra `dev`")
pytest.importorskip("dvc_s3", reason="DVC's S3 remotes need the extra `cluster`")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BUCKET, KEY, SECRET = "lab", "AKIA-of-the-lab", "secret-of-the-lab"
STORE = """
import sys, boto3
from botocore.config import Config
s3 = boto3.client("s3", endpoint_url=sys.argv[1], aws_access_key_id="x", aws_secret_access_key="x",
                  region_name="us-east-1", config=Config(retries={"total_max_attempts": 2}))
"""


@dataclass
class Network:
    """Where a process runs: in front of its command stands what enters the place."""

    enter: tuple[str, ...] = ()

    def run(self, *command: str, cwd: Path, env: dict[str, str], status: int | None = 0) -> str:
        """What the command said, stdout and stderr together. Fails the test where its exit status is another."""
        done = subprocess.run(
            [*self.enter, *command],
            cwd=cwd,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
            check=False,
        )
        assert status is None or done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}"
        return done.stdout


@dataclass
class Store:
    """The store, and where the hosts find it."""

    network: Network
    url: str
    others: list[Network]

    def do(self, script: str, *args: str) -> Any:
        """Run a few lines with `s3`, as the store's owner; what they print, as JSON."""
        said = self.network.run(sys.executable, "-c", STORE + script, self.url, *args, cwd=ROOT, env=dict(os.environ))
        return json.loads(said) if said else None


@dataclass
class Host:
    """A clone of the project on a machine of its own."""

    root: Path
    network: Network

    @property
    def env(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "HARKEN_", "DVC_", "GIT_"))}
        home = self.root.parent / f"{self.root.name}-home"
        home.mkdir(exist_ok=True)
        own = {"HOME": str(home), "DVC_SITE_CACHE_DIR": str(home / "site"), "XDG_CONFIG_HOME": str(home / "config")}
        own |= {"PYTHONPATH": "src", "HARKEN_ENGINE": "inline", "HARKEN_DEVICE": "cpu", "CI": "1"}
        own |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}", "DVC_NO_ANALYTICS": "1"}
        for who in ("AUTHOR", "COMMITTER"):
            own |= {f"GIT_{who}_NAME": "a host", f"GIT_{who}_EMAIL": "host@example.org"}
        return env | own | {"AWS_EC2_METADATA_DISABLED": "true", "PYTHONDONTWRITEBYTECODE": "1"}

    def dvc(self, *args: str, status: int | None = 0) -> str:
        return self.network.run("dvc", *args, cwd=self.root, env=self.env, status=status)

    def git(self, *args: str) -> str:
        return self.network.run("git", *args, cwd=self.root, env=self.env)

    def use(self, store: Store, secret: str = SECRET) -> None:
        """The commands of the guide."""
        self.dvc("remote", "add", "--local", "--default", "store", f"s3://{BUCKET}/harken")
        self.dvc("remote", "modify", "--local", "store", "endpointurl", store.url)
        self.dvc("remote", "modify", "--local", "store", "access_key_id", KEY)
        self.dvc("remote", "modify", "--local", "store", "secret_access_key", secret)
        self.dvc("remote", "modify", "--local", "store", "verify", "true")

    def computed(self) -> list[str]:
        """The stages that have run here, in order."""
        work = self.root / ".work/world"
        return [r["stage"] for r in timings.read(work)] if work.is_dir() else []


def networks(n: int, stack: list[subprocess.Popen[bytes]]) -> list[Network] | None:
    """`n` networks of their own, the first with a wire to each other one; None where that is not allowed.

    They are gone with the processes that are put on `stack`.
    """
    if not (shutil.which("ip") and shutil.which("nsenter") and shutil.which("unshare")):
        return None
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        return None
    pids = []
    for _ in range(n):
        stack.append(subprocess.Popen(["unshare", "-n", "sleep", "900"]))
        pids.append(stack[-1].pid)
    found = [Network(("nsenter", "-t", str(pid), "-n")) for pid in pids]
    ours = Path("/proc/self/ns/net").readlink()
    while any(Path(f"/proc/{pid}/ns/net").readlink() == ours for pid in pids):  # unshare has not come to it yet
        time.sleep(0.01)

    def ip(where: int, *args: str) -> None:
        found[where].run("ip", *args, cwd=ROOT, env=dict(os.environ))

    ip(0, "link", "set", "lo", "up")
    ip(0, "addr", "add", "10.77.0.1/32", "dev", "lo")
    for i in range(1, n):
        ip(i, "link", "set", "lo", "up")
        ip(0, "link", "add", f"to{i}", "type", "veth", "peer", "name", "wire", "netns", str(pids[i]))
        ip(0, "addr", "add", f"10.77.{i}.1/24", "dev", f"to{i}")
        ip(0, "link", "set", f"to{i}", "up")
        ip(i, "addr", "add", f"10.77.{i}.2/24", "dev", "wire")
        ip(i, "link", "set", "wire", "up")
        ip(i, "route", "add", "10.77.0.1/32", "dev", "wire")
    return found


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    processes: list[subprocess.Popen[bytes]] = []
    try:
        found = networks(4, processes)
        url = f"http://{'10.77.0.1' if found else '127.0.0.1'}:{free_port()}"
        found = found or [Network()] * 4
        host, port = url.removeprefix("http://").split(":")
        command = [*found[0].enter, sys.executable, "-m", "moto.server", "-H", host, "-p", port]
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        made = Store(found[0], url, list(found[1:]))
        ready = [*found[0].enter, sys.executable, "-c", f"import socket; socket.create_connection(({host!r}, {port}))"]
        end = time.monotonic() + 60
        while subprocess.run(ready, capture_output=True, check=False).returncode:
            assert time.monotonic() < end, "the store did not start"
            time.sleep(0.2)
        made.do("s3.create_bucket(Bucket='lab')")
        yield made
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def hosts(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Host]:
    """`a` has computed all that `train` needs and pushed it with its run cache; `b` is a fresh clone with its dvc.lock,
    `c` one without."""
    folder = tmp_path_factory.mktemp("hosts")
    a = Host(folder / "a", store.others[0])
    a.root.mkdir()
    for name in ("dvc.yaml", ".gitignore", ".dvcignore"):
        shutil.copyfile(ROOT / name, a.root / name)
    shutil.copytree(ROOT / "src", a.root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (a.root / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copyfile(ROOT / ".dvc" / name, a.root / ".dvc" / name)
    params = tiny_params()
    params["train"]["recipes"] = dict([next(iter(params["train"]["recipes"].items()))])
    with open(a.root / "params.yaml", "w") as f:
        YAML(typ="safe", pure=True).dump(params, f)
    a.git("init", "-q", "-b", "main")
    a.git("add", "-A")
    a.git("commit", "-q", "-m", "The project")
    c = clone(a, folder / "c", store.others[2])
    a.use(store)
    a.dvc("repro", "weights")
    a.git("add", "-A")
    a.git("commit", "-q", "-m", "What a computed")
    a.dvc("push", "--run-cache")
    b = clone(a, folder / "b", store.others[1])
    for host in (b, c):
        host.use(store)
    return {"a": a, "b": b, "c": c}


def clone(of: Host, root: Path, network: Network) -> Host:
    made = Host(root, network)
    network.run("git", "clone", "-q", str(of.root), str(root), cwd=root.parent, env=made.env)
    return made


FIRST = ["lists", "catalog", "download", "extract", "weights"]


def test_the_gpu_host_trains_and_computes_nothing_that_was(hosts: dict[str, Host], store: Store) -> None:
    a, b, c = (hosts[n] for n in "abc")
    assert a.computed() == FIRST
    said = b.dvc("repro", "--pull", "--allow-missing", "-s", "train")
    assert b.computed() == ["train"], said
    assert not (b.root / "data/world/media").exists(), "what it does not need it has not fetched"
    b.git("add", "-A")
    b.git("commit", "-q", "-m", "What b trained")
    b.dvc("push", "--run-cache")

    # the first host, with the other's commit, has nothing left to do
    a.git("pull", "-q", str(b.root), "main")
    a.dvc("pull", "train")
    assert "didn't change, skipping" in a.dvc("repro", "train")
    assert a.computed() == FIRST
    assert contents(a.root / "models/world/train") == contents(b.root / "models/world/train")

    # one that never saw a dvc.lock finds the same by what goes into each stage
    said = c.dvc("repro", "--pull", "train")
    assert said.count("is cached - skipping run") == 6, said
    assert c.computed() == []
    assert (c.root / "dvc.lock").read_text() == (a.root / "dvc.lock").read_text()
    assert contents(c.root / "models/world/train") == contents(b.root / "models/world/train")


def test_no_secret_is_in_git(hosts: dict[str, Host]) -> None:
    for host in hosts.values():
        status = [line for line in host.git("status", "--porcelain").splitlines() if not line.endswith("dvc.lock")]
        assert status == []
        assert SECRET in (host.root / ".dvc/config.local").read_text()
        for word in (SECRET, KEY, BUCKET, "10.77.", "127.0.0.1"):
            assert word not in (host.root / ".dvc/config").read_text()
        assert host.git("log", "--all", "--oneline", f"-S{SECRET}") == ""


def test_hosts_reach_the_store_alone(store: Store) -> None:
    if not store.network.enter:
        pytest.skip("networks of their own need root on Linux: these hosts share the loopback")
    there = [n.run("ip", "-4", "-o", "addr", cwd=ROOT, env=dict(os.environ)) for n in store.others]
    assert len(set(there)) == 3
    for i, network in enumerate(store.others, 1):
        probe = f"import socket; socket.create_connection(('10.77.{i % 3 + 1}.2', 9), 1)"
        network.run(sys.executable, "-c", probe, cwd=ROOT, env=dict(os.environ), status=1)


def objects_of_a_shard(host: Host, store: Store) -> tuple[str, str]:
    """The store's keys of a shard of features, and of the list of files that it is on."""
    lock = YAML(typ="safe", pure=True).load((host.root / "dvc.lock").read_text())
    md5 = lock["stages"]["extract"]["outs"][0]["md5"]
    listed = f"harken/files/md5/{md5[:2]}/{md5[2:]}"
    files = store.do("print(s3.get_object(Bucket='lab', Key=sys.argv[2])['Body'].read().decode())", listed)
    md5 = next(f["md5"] for f in files if f["relpath"].endswith(".parquet") and f["relpath"][:5].isdigit())
    return f"harken/files/md5/{md5[:2]}/{md5[2:]}", listed


ONE_BIT = """
body = s3.get_object(Bucket="lab", Key=sys.argv[2])["Body"].read()
middle = len(body) // 2
s3.put_object(Bucket="lab", Key=sys.argv[2], Body=body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1:])
"""


def test_a_shard_damaged_in_the_store_is_refused_and_mended(
    hosts: dict[str, Host], store: Store, tmp_path: Path
) -> None:
    a = hosts["a"]
    d = clone(a, tmp_path / "d", store.others[1])
    d.use(store)
    shard, listed = objects_of_a_shard(a, store)
    store.do(ONE_BIT, shard)
    said = d.dvc("pull", "-v", "extract", status=1)
    named = [line for line in said.splitlines() if "corrupted cache file" in line]
    assert len(named) == 1
    assert shard.removeprefix("harken/") in named[0]
    assert not (d.root / "data/world/features").exists(), "no damaged file, and no folder with one missing"

    # a host that has it thinks it is there; without the list, too, it looks and sends both
    store.do("s3.delete_object(Bucket='lab', Key=sys.argv[2])", shard)
    assert "Everything is up to date" in a.dvc("push", "extract")
    store.do("s3.delete_object(Bucket='lab', Key=sys.argv[2])", listed)
    assert "2 files pushed" in a.dvc("push", "extract")
    d.dvc("pull", "extract")
    assert contents(d.root / "data/world/features") == contents(a.root / "data/world/features")


def test_a_store_that_cannot_be_reached_is_said_and_nothing_is_computed_anew(
    hosts: dict[str, Host], store: Store, tmp_path: Path
) -> None:
    e = clone(hosts["a"], tmp_path / "e", store.others[1])
    e.use(store)
    e.dvc("remote", "modify", "--local", "store", "endpointurl", store.url.rpartition(":")[0] + ":9")
    said = e.dvc("repro", "--pull", "--allow-missing", "-s", "train", status=255)
    assert f'Could not connect to the endpoint URL: "{store.url.rpartition(":")[0]}:9' in said
    assert e.computed() == []
