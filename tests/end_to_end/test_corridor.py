"""A tiny world through all stages: what was asked for is accounted for, what is planted is found, nothing is redone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from corridor import Corridor, contents

from harken.clips import Manifest
from harken.config import Paths, load
from harken.engines import inline
from harken.shards import ledger, read_table, shards_in
from harken.stages import STAGES, config_class, stage
from harken.world.truth import Truth


@pytest.fixture
def paths(corridor: Corridor, monkeypatch: pytest.MonkeyPatch) -> Paths:
    monkeypatch.chdir(corridor.root)
    monkeypatch.setenv("HARKEN_PARAMS", "params.yaml")
    return load("paths", Paths)


def statuses(folder: Path) -> dict[str, str]:
    """clip id -> reason, empty for an ok clip. No clip may be told of twice."""
    table = ledger(folder)
    found = dict(zip(table["clip_id"].to_pylist(), table["reason"].to_pylist(), strict=True))
    assert len(found) == len(table)
    for status, reason in zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True):
        assert (status, bool(reason)) in (("ok", False), ("failed", True))
    return found


def ok(folder: Path) -> set[str]:
    return {i for i, reason in statuses(folder).items() if not reason}


def test_requested_is_ok_and_failed_in_every_stage(paths: Paths) -> None:
    manifest = Manifest.read(paths.manifest)
    for shard in shards_in(paths.media):
        table = pq.read_table(paths.media / f"{shard:05d}.parquet", columns=["clip_id"])
        assert table["clip_id"].to_pylist() == [c.id for c in manifest.requested(shard)]
    assert statuses(paths.media).keys() == set(manifest.table["clip_id"].to_pylist())
    assert statuses(paths.features).keys() == ok(paths.media)
    images = read_table(paths.features, ["images"])
    with_images = {r["clip_id"] for r in images.to_pylist() if r["images"]}
    assert statuses(paths.embeddings).keys() == with_images
    assert shards_in(paths.media) == shards_in(paths.features) == shards_in(paths.embeddings) == manifest.shards


def test_every_planted_failure_has_its_planted_reason(paths: Paths) -> None:
    truth = Truth.read(paths.lists / "truth.json")
    told = statuses(paths.media)
    assert told == {i: c.reason for i, c in truth.clips.items()}
    assert len({r.split(".")[0] for r in told.values()}) > 2, "this world plants too little"


def test_features_are_of_ok_clips_alone(paths: Paths) -> None:
    usable = ok(paths.media)
    table = read_table(paths.features, ["images", "fbank_rows", "logmel_rows", "duration_s"])
    assert set(table["clip_id"].to_pylist()) == usable
    for row in table.to_pylist():
        rows = round(100 * row["duration_s"])
        assert rows - 3 <= row["fbank_rows"] <= rows
        assert abs(row["logmel_rows"] - rows) <= 1
        assert row["images"] is None if row["clip_id"].startswith("zen:") else len(row["images"]) == 4
    captions = pq.read_table(paths.embeddings / "captions.parquet")
    assert set(captions["clip_id"].to_pylist()) <= usable


def test_what_was_broken_is_in_no_gallery(paths: Paths) -> None:
    usable = ok(paths.features)
    ranks = pq.read_table(paths.evaluations / "ranks.parquet")
    assert set(ranks["clip_id"].to_pylist()) <= usable
    stats = json.loads((paths.stats / "stats.json").read_text())
    assert 0 < stats["n_clips"] <= len(usable)


def expected_rows(params: Mapping[str, Any]) -> Iterator[tuple[str, str, str, int]]:
    asked = params["evaluate"]
    for name in params["pretrain"]["recipes"]:
        for seed in params["pretrain"]["seeds"]:
            yield from (("pretrain", f"{name} ({p})", params["stats"]["dataset"], seed) for p in asked["images"])
            yield from (("pretrain", f"{name} (zero-shot)", d, seed) for d in asked["zero_shot"])
    for name in params["finetune"]["recipes"]:
        yield from (("finetune", name, params["finetune"]["dataset"], s) for s in params["finetune"]["seeds"])
    for name, recipe in params["train"]["recipes"].items():
        rows = [name, f"{name} (transductive)"] if asked["prior_scale"] is not None else [name]
        yield from (("train", row, recipe["dataset"], s) for row in rows for s in params["train"]["seeds"])


def test_the_results_have_every_row(corridor: Corridor, paths: Paths) -> None:
    results = json.loads((paths.evaluations / "results.json").read_text())
    found = [(r["stage"], r["recipe"], r["dataset"], r["seed"]) for r in results]
    assert sorted(found) == sorted(expected_rows(corridor.params))
    for r in results:
        assert r["metrics"].keys() == r["intervals"].keys() == r["chance"].keys()
        for direction, values in r["metrics"].items():
            for k in corridor.params["evaluate"]["ks"]:
                low, high = r["intervals"][direction][f"R@{k}"]
                assert 0 <= low <= values[f"R@{k}"] <= high <= 100
    report = (paths.report / "report.md").read_text()
    assert all(row in report for _, row, _, _ in expected_rows(corridor.params))
    assert (paths.report / "strips.png").stat().st_size > 1000
    assert all(f"### {part}" in report for part in ("The nearest image", "When images are taken", "Comparisons"))


def test_one_gallery_has_one_passport(paths: Paths) -> None:
    results = json.loads((paths.evaluations / "results.json").read_text())
    of: dict[str, set[str]] = {}
    for r in results:
        of.setdefault(r["dataset"], set()).add(r["passport"])
    assert all(len(passports) == 1 for passports in of.values())


REWRITTEN = tuple(f"{n}.parquet" for n in ("clips", "ranks", "planted", "grounding", "visits", "missing"))


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_run_again_redoes_nothing(name: str, paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    # the ledger grows with every attempt, and what it says of them is when they were made
    folders = [f for f in (Path(str(v)) for k, v in paths if k not in ("work", "ledger", "visits")) if f.is_dir()]
    before = {f: contents(f) for f in folders}
    # scratch files are the work; published ones are links to them and are linked anew
    kept = {
        p: p.stat() for p in (paths.work / name).rglob("*") if p.suffix in (".parquet", ".npy", ".safetensors", ".mp4")
    }
    kept = {p: s for p, s in kept.items() if p.name not in REWRITTEN or "index" in p.parts}
    stage(name).run(paths, load(name, config_class(name)), inline)
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in kept} == {
        p: (s.st_ino, s.st_mtime_ns) for p, s in kept.items()
    }
    assert {f: contents(f) for f in folders} == before


class StopError(Exception):
    """Raised by a map that is only to see what it was given."""


def test_zero_shot_scores_are_stale_when_the_captions_embeddings_change(paths: Paths, tmp_path: Path) -> None:
    def evaluated() -> dict[str, str]:
        seen: dict[str, str] = {}

        def spy(make: Any, cfg: Any, items: Any, **_: Any) -> Iterator[Any]:
            seen.update(cfg.marks)
            raise StopError

        with pytest.raises(StopError):
            stage("evaluate").run(changed, load("evaluate", config_class("evaluate")), spy)
        return seen

    changed = paths.model_copy(update={"work": tmp_path / "work"})
    before = evaluated()
    embeddings = tmp_path / "embeddings"
    embeddings.mkdir()
    for file in paths.embeddings.iterdir():
        (embeddings / file.name).write_bytes(file.read_bytes())
    table = pq.read_table(embeddings / "captions.parquet")
    pq.write_table(table.slice(1), embeddings / "captions.parquet")  # as another `embed.prompt` would
    changed = changed.model_copy(update={"embeddings": embeddings})
    after = evaluated()
    assert before.keys() == after.keys()
    assert not [n for n in before if before[n] == after[n] and n.startswith("pretrain/")]
