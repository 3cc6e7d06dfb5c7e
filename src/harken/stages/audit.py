"""Stage `audit`: manifest and download ledger -> what is missing and why, per split, as JSON and one HTML page."""

from __future__ import annotations

import logging

from harken.audit import page
from harken.audit.rates import audit
from harken.clips import Manifest
from harken.config import Config, Paths
from harken.engines import Map
from harken.media.reasons import group
from harken.shards import atomic, ledger, publish, write_json

log = logging.getLogger("harken")
CODE = ("stages/audit.py", "audit", "media/reasons.py")


class AuditConfig(Config):
    """Nothing to choose yet: the audit is a function of the manifest and the ledger alone."""


def run(paths: Paths, cfg: AuditConfig, map: Map) -> None:
    """Write audit.json and audit.html."""
    outcomes = ledger(paths.media).to_pandas()
    result = audit(Manifest.read(paths.manifest).table, outcomes, group)
    work = paths.work / "audit"
    write_json(work / "audit.json", result)
    with atomic(work / "audit.html") as f:
        f.write(page.render(result).encode())
    publish(work, paths.audit, ["audit.json", "audit.html"])
    log.info("audit: %s", paths.audit / "audit.html")
