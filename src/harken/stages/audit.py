"""Stage `audit`: manifest, media and visits -> what is missing, why, since when and whether it matters; JSON, one page.

What other laboratories held is named in params: lists under `paths.lists`, so that DVC watches them too.
"""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from harken.audit import page
from harken.audit.observations import Observation, read_id_list
from harken.audit.rates import audit
from harken.clips import Manifest
from harken.config import Config, Paths
from harken.engines import Map
from harken.errors import DataError
from harken.evaluation.passports import passport_of
from harken.media.reasons import UNVISITED, group
from harken.shards import FAILED, OK, atomic, ledger, publish, write_json

log = logging.getLogger("harken")
CODE = ("stages/audit.py", "audit", "evaluation/passports.py", "media/reasons.py", "attempts.py", "shards.py")


class ObservationList(Config):
    """What somebody held of a split: `list` is a file of ids under `paths.lists`; `when` an ISO date or `undated`."""

    who: str
    when: str
    source: str
    dataset: str
    split: str
    list: str


class AuditConfig(Config):
    """`labels`: the list under `paths.lists` that names labels (AudioSet's class_labels_indices.csv), or null.

    `min_positives`: below so many clips left a label is called rare. `level`: of the intervals. `observations`: other
    laboratories' lists.
    """

    labels: str | None
    min_positives: int = Field(ge=1)
    level: float = Field(gt=0, lt=1)
    observations: list[ObservationList]


def run(paths: Paths, cfg: AuditConfig, map: Map) -> None:
    """Write audit.json, missing.parquet and audit.html."""
    visits = pq.read_table(paths.visits / "visits.parquet").to_pandas()
    report = report_of(paths, cfg, visited(ledger(paths.media)), visits, observations(paths, cfg))
    work = paths.work / "audit"
    write_json(work / "audit.json", report)
    with atomic(work / "missing.parquet") as f:
        pq.write_table(missing(report), f)
    with atomic(work / "audit.html") as f:
        f.write(page.render(report).encode())
    publish(work, paths.audit, ["audit.json", "missing.parquet", "audit.html"])
    log.info("audit: %s", paths.audit / "audit.html")


def report_of(
    paths: Paths,
    cfg: AuditConfig,
    outcomes: pa.Table,
    visits: pd.DataFrame | None,
    observed: list[Observation],
    previous: pa.Table | None = None,
) -> dict[str, Any]:
    """The audit report of these outcomes (clip_id, status, reason, message) with the state of their attempts."""
    return audit(
        Manifest.read(paths.manifest).table,
        outcomes,
        group,
        observations=observed,
        attempts_state=visits,
        names=label_names(paths, cfg),
        min_positives=cfg.min_positives,
        target_level=cfg.level,
        previous=previous,
        passport=passport_of,
    )


def visited(outcomes: pa.Table) -> pa.Table:
    """The rows of clips that were asked for."""
    return outcomes.filter(pc.not_equal(outcomes["reason"], UNVISITED))


def outcomes_of(state: pd.DataFrame) -> pa.Table:
    """A ledger's states (`harken.stages.download.states`) as outcomes.

    What only a census saw is no visit, nor is a clip that is due and has no reason.
    """
    known = state[state["is_fetched"] & ((state["state"] == OK) | (state["reason"] != ""))]
    status = known["state"].map(lambda s: OK if s == OK else FAILED)
    rows = {"clip_id": known["clip_id"], "status": status, "reason": known["reason"], "message": known["message"]}
    return pa.table({name: pa.array(column, pa.string()) for name, column in rows.items()})


def observations(paths: Paths, cfg: AuditConfig) -> list[Observation]:
    """The observations that params name."""
    return [
        Observation.of(o.who, o.when, o.source, o.dataset, o.split, read_id_list(paths.lists / o.list))
        for o in cfg.observations
    ]


def label_names(paths: Paths, cfg: AuditConfig) -> dict[str, str]:
    """Label -> display name, from a list in the format of AudioSet's class_labels_indices.csv."""
    if cfg.labels is None:
        return {}
    path: Path = paths.lists / cfg.labels
    if not path.is_file():
        raise DataError(f"{path}: no such list. Name it under `lists.files`, or set `audit.labels` to null.")
    with open(path, newline="", encoding="utf-8-sig") as f:
        rows = csv.DictReader(f, skipinitialspace=True)
        if not {"mid", "display_name"} <= set(rows.fieldnames or ()):
            raise DataError(f"{path}: its header is {rows.fieldnames}; expected index,mid,display_name.")
        return {row["mid"]: row["display_name"] for row in rows}


def missing(report: dict[str, Any]) -> pa.Table:
    """Every missing clip of a report: dataset, split, clip_id, reason, group."""
    names = ("dataset", "split", "clip_id", "reason", "group")
    tables = [pa.schema([(n, pa.string()) for n in names]).empty_table()]
    for split in report["splits"]:
        table = pa.table({name: pa.array(values, pa.string()) for name, values in split["missing"].items()})
        for column in ("split", "dataset"):
            table = table.add_column(0, column, pa.array([split[column]] * len(table), pa.string()))
        tables.append(table)
    return pa.concat_tables(tables)
