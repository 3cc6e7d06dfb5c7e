"""One command for a fresh Prefect server: the work pool, the deployments of prefect.yaml, and what watches over them.

    python -m pipelines.setup                                    all of it; again after every change, it does no harm
    python -m pipelines.setup --webhook https://host/hook        and tells that address of failures and of lost clips
    python -m pipelines.setup --check                            changes nothing: says what is there and what is missing

Run it in the workspace, on the host whose worker is to work there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect.automations import Automation
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import StateType
from prefect.events import EventTrigger, Posture
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.exceptions import ObjectNotFound
from ruamel.yaml import YAML

from harken.errors import ConfigError, HarkenError, status_of
from pipelines.upkeep import LOST
from pipelines.workspace import require_server

FILE = Path("prefect.yaml")
TAG = "harken"
BLOCK = "harken-webhook"
TYPES = ("process", "kubernetes")  # the second is made with deploy/kubernetes/base-job-template.json
N_RUNS = 4  # of a pool at once: the long ones lock the workspace, the others are quick
START_S = 60.0  # `prefect server start --background` comes back before the server answers
SILENCE = timedelta(seconds=90)  # three heartbeats
BEATS = "prefect.flow-run.heartbeat"
ENDS = {f"prefect.flow-run.{end}" for end in ("Completed", "Failed", "Cancelled", "Crashed")}


def declared(path: Path = FILE) -> list[dict[str, Any]]:
    """The deployments of prefect.yaml. Raises ConfigError where there is no such file or it names no pool."""
    if not path.is_file():
        raise ConfigError(f"{path.resolve()}: no such file. Run this in the workspace, beside dvc.yaml.")
    found = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    deployments = list(found.get("deployments") or [])
    for d in deployments:
        if not (d.get("work_pool") or {}).get("name"):
            raise ConfigError(f"{path}: deployment {d.get('name')!r} names no work pool, so no worker would run it.")
    return deployments


def pools(client: SyncPrefectClient, names: set[str]) -> None:
    """Make the pools that are missing, of processes. Raises ConfigError for one which no deployment here can run in."""
    for name in sorted(names):
        try:
            found = client.read_work_pool(name)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=N_RUNS))
            continue
        if found.type not in TYPES:
            raise ConfigError(
                f"work pool {name!r}: it is of type {found.type!r}, expected {' or '.join(TYPES)}. Delete it (`prefect "
                f"work-pool delete {name}`) or name another one in {FILE}."
            )
        if found.concurrency_limit != N_RUNS:
            client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=N_RUNS))


def deploy() -> None:
    """`prefect deploy --all`: the deployments of prefect.yaml as they are written now."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(FILE)]
    env = {"HARKEN_WORKSPACE": str(Path.cwd()), **os.environ, "PYTHONPATH": _python_path()}
    ended = subprocess.run(command, env=env, text=True, capture_output=True)
    if ended.returncode != 0:
        raise HarkenError(f"`prefect deploy` ended with status {ended.returncode}:\n{ended.stdout}{ended.stderr}")


def _python_path() -> str:
    return os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH", "")])])


def zombies() -> Automation:
    """A flow run whose process was killed says nothing more; without this it would be `Running` for ever."""
    return Automation(
        name="harken-zombies",
        description="A run of which nothing is heard for 90 s is crashed.",
        trigger=EventTrigger(
            after={BEATS},
            expect={BEATS, *ENDS},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="Nothing was heard of it: killed, or cut off.")],
    )


def notifications(block_id: Any) -> list[Automation]:
    """What a webhook is told: runs of ours that failed, and audits that lost more clips than their alarm."""
    ours = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
    failed = (
        '{"what": "failed", "flow": {{ flow.name | tojson }}, "run": {{ flow_run.name | tojson }}, '
        '"state": {{ flow_run.state.name | tojson }}, "message": {{ flow_run.state.message | tojson }}}'
    )
    lost = '{"what": "lost", "told": {{ event.resource.name | tojson }}, "facts": {{ event.payload | tojson }}}'
    return [
        Automation(
            name="harken-failed",
            description="Tell the webhook of a run that failed or crashed.",
            trigger=EventTrigger(
                expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
                match={"prefect.resource.id": "prefect.flow-run.*"},
                match_related=ours,
                for_each={"prefect.resource.id"},
                posture=Posture.Reactive,
                threshold=1,
            ),
            actions=[CallWebhook(block_document_id=block_id, payload=failed)],
        ),
        Automation(
            name="harken-lost",
            description="Tell the webhook of clips that went missing.",
            trigger=EventTrigger(expect={LOST}, posture=Posture.Reactive, threshold=1),
            actions=[CallWebhook(block_document_id=block_id, payload=lost)],
        ),
    ]


def put(automation: Automation) -> None:
    """Make the automation, or make the one of its name be like it."""
    try:
        known = Automation.read(name=automation.name)
    except ValueError:
        automation.create()
        return
    automation.id = known.id
    automation.update()


def webhook(url: str) -> Any:
    """The id of the block that holds the address: it is a secret to many services, so it lies in no file here."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--webhook {url!r}: expected an address that begins with http:// or https://.")
    return Webhook(url=url, method="POST").save(BLOCK, overwrite=True)


def lacking(client: SyncPrefectClient) -> list[str]:
    """What keeps the deployments of prefect.yaml from running, in words that say what to do; none where all is well."""
    told, again = [], "Run `python -m pipelines.setup`."
    there = {(d.entrypoint, d.name) for d in client.read_deployments()}
    for d in declared():
        if (d["entrypoint"], d["name"]) not in there:
            told.append(f"deployment {d['name']} of {d['entrypoint']}: not on the server. {again}")
    for name in sorted({d["work_pool"]["name"] for d in declared()}):
        try:
            pool = client.read_work_pool(name)
        except ObjectNotFound:
            told.append(f"work pool {name!r}: not on the server. {again}")
            continue
        if pool.is_paused:
            told.append(f"work pool {name!r}: paused. Run `prefect work-pool resume {name}`.")
        elif str(getattr(pool.status, "value", pool.status)) != "READY":
            told.append(f"work pool {name!r}: no worker is online. Run `prefect worker start --pool {name}` here.")
    if not client.read_automations_by_name("harken-zombies"):
        told.append(f"automation harken-zombies: missing, so killed runs would be Running for ever. {again}")
    return told


def main() -> int:
    """The command line. Exit status 0 only where everything is there."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.setup", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--webhook", metavar="URL", help="told of failures and of lost clips; kept as a secret block")
    parser.add_argument("--check", action="store_true", help="change nothing; say what is missing")
    given = parser.parse_args()
    try:
        url = require_server(wait_s=0.0 if given.check else START_S)
        with get_client(sync_client=True) as client:
            if not given.check:
                pools(client, {d["work_pool"]["name"] for d in declared()})
                deploy()
                for automation in [zombies(), *(notifications(webhook(given.webhook)) if given.webhook else [])]:
                    put(automation)
            missing = lacking(client)
    except HarkenError as e:
        print(f"harken: {e}", file=sys.stderr)
        return status_of(e)
    for d in declared():
        when = ", ".join(s.get("cron", str(s)) for s in d.get("schedules") or []) or "when asked"
        print(f"{d['entrypoint']:<42} {d['name']:<10} {when:<14} {d['description']}")
    print(f"server: {url}")
    for line in missing:
        print(line)
    return 1 if missing and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
