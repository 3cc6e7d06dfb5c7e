"""What Prometheus is told of stages, as its own parser reads it."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="metrics need the extra `cluster`")
from prometheus_client.parser import text_string_to_metric_families

from harken import prometheus
from harken.config import Paths
from harken.errors import ConfigError
from harken.progress import Loop
from harken.stages import __main__ as entry


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(entry, "die_with_parent", lambda: None)
    (tmp_path / "metrics").mkdir()
    settings = {"HARKEN_PARAMS": "params.yaml", "HARKEN_ENGINE": "inline", "HARKEN_THREADS": "1", "CI": "1"}
    for name, value in {**settings, "HARKEN_METRICS": str(tmp_path / "metrics"), "HARKEN_RUN_ID": "r"}.items():
        monkeypatch.setenv(name, value)
    for name in ("HARKEN_LOG", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return importlib.import_module("stage_toys")


@pytest.fixture
def paths(toys: Any, tmp_path: Path) -> Paths:
    found: Paths = toys.write_params(tmp_path)
    return found


def told(folder: Path) -> dict[str, dict[str, float]]:
    """stage -> metric -> value, of all files of a folder; a failure's reason is part of its name."""
    found: dict[str, dict[str, float]] = {}
    for path in folder.glob("*.prom"):
        for family in text_string_to_metric_families(path.read_text()):
            for sample in family.samples:
                name = sample.name.removeprefix("harken_stage_") + sample.labels.get("reason", "")
                its = found.setdefault(sample.labels["stage"], {})
                assert name not in its, "node_exporter refuses a series that is there twice"
                its[name] = sample.value
    return found


def test_a_run_and_failures_are_told(toys: Any, paths: Paths, tmp_path: Path) -> None:
    for _ in range(2):
        assert toys.run("refuses") == 1
    assert toys.run("gives_up") == 75
    (its,) = told(tmp_path / "metrics").values()
    assert "last_success_timestamp_seconds" not in its
    assert toys.run("counts") == 0
    (its,) = told(tmp_path / "metrics").values()
    assert (its["items_done"], its["items"], its["running"]) == (3, 3, 0)
    assert (its["failures_totalDataError"], its["failures_totalTransientError"]) == (2, 1)
    assert its["last_duration_seconds"] >= 0
    assert its["last_success_timestamp_seconds"] <= its["told_timestamp_seconds"] + 0.001
    assert toys.run("refuses") == 1
    (again,) = told(tmp_path / "metrics").values()
    assert again["last_success_timestamp_seconds"] == its["last_success_timestamp_seconds"]
    assert again["failures_totalDataError"] == 3


def test_stages_and_presets_share_a_folder(toys: Any, tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    works = [tmp_path / name / ".work/world" for name in ("one", "two")]
    jobs = [prometheus.metrics(work, stage) for work in works for stage in ("extract", "embed")]
    assert len(list(folder.glob("*.prom"))) == 4

    def run(job: prometheus.Metrics) -> None:
        for i in range(40):
            job.update(Loop("x", 40, done=i + 1))

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for path in folder.iterdir():
        families = {f.name: f.samples[0].value for f in text_string_to_metric_families(path.read_text()) if f.samples}
        assert families["harken_stage_items_done"] == 40
    assert len(list(folder.iterdir())) == 4, "nothing half-written is left"


def test_a_folder_that_is_none_is_refused(toys: Any, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARKEN_METRICS", "metrics/none.prom")
    with pytest.raises(ConfigError, match="no such folder"):
        prometheus.metrics(paths.work, "stats")
    assert toys.run("counts") == 1


def test_a_folder_that_goes_away_does_not_end_the_stage(
    toys: Any, paths: Paths, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = prometheus.metrics(paths.work, "stats")
    for path in (tmp_path / "metrics").iterdir():
        path.unlink()
    (tmp_path / "metrics").rmdir()
    for _ in range(3):
        job.update(Loop("x", 3))
    assert len([r for r in caplog.records if "not written" in r.message]) == 1


def test_without_the_setting_nothing_is_told(toys: Any, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARKEN_METRICS")
    assert toys.run("counts") == 0
    assert list((paths.work.parents[1] / "metrics").iterdir()) == []
