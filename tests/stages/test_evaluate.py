"""Evaluate keeps what each clip's nearest image is worth, and what rules for taking images are, where truth is planted.

Towers are played by one that reads the answer from the FBANK; real ones run in tests/end_to_end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from harken.clips import Clip, Manifest, Source, Split
from harken.config import Paths
from harken.models.towers import AudioTower
from harken.shards import ShardWriter, vectors_type, write_json
from harken.stages import evaluate
from harken.training.batches import Features
from harken.training.tasks import FbankInput
from harken.world.records import Event
from harken.world.truth import ClipTruth

N_FRAMES = 1000
ENDS = [0.0, 10 / 3, 20 / 3, 9.9]
NEAREST = {"easy": 2, "right": 1, "wrong": 2, "unseen": 0, "held_out": 3, "test_1": 0, "test_2": 1}
CFG = evaluate.EvaluateConfig(
    ks=[1], n_resamples=20, level=0.95, images=["mid"], zero_shot=[], at_pool="mean", prior_scale=None
)


def truths() -> dict[str, ClipTruth]:
    def clip(clip_id: str, *shown: tuple[float, float], cat: tuple[float, float] | None = None) -> ClipTruth:
        events = [Event("dog", "big", 0.0, 10.0, True, shown)]
        if cat is not None:
            events.append(Event("cat", "big", *cat, False, (cat,)))
        return ClipTruth(clip_id, "", "", "", "", 0.0, 10.0, 10.0, 10.0, (), ("dog",), tuple(events), ())

    distracted = ((0.0, 5.0), (8.0, 10.0))
    every = {i: clip(i, (0.0, 10.0)) for i in NEAREST}
    every |= {i: clip(i, *distracted, cat=(5.0, 8.0)) for i in ("right", "wrong")}
    return every | {"unseen": clip("unseen")}


def plant(lists: Path, clips: dict[str, ClipTruth]) -> None:
    told = {i: {k: v for k, v in asdict(c).items() if k != "clip_id"} for i, c in clips.items()}
    write_json(lists / "truth.json", {"clips": told, "mids": {}})


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(**{name: tmp_path / name for name in Paths.model_fields})
    ids = list(NEAREST)
    clips = [
        Clip(i, "audioset", Split.TEST if i.startswith("test") else Split.TRAIN, Source("youtube", i), 0.0, 10.0)
        for i in [*ids, "failed"]
    ]
    clips.append(Clip("held_out", "audiocaps", Split.TEST, Source("youtube", "held_out"), 0.0, 10.0, ("a dog",)))
    found.manifest.mkdir()
    pq.write_table(Manifest.build(clips, 1).table, found.manifest / "clips.parquet")
    times = {"image_times_s": pa.list_(pa.float64())}
    with ShardWriter(found.features, 0, fingerprint="f", columns=times, arrays={"fbank": (128, "float32")}) as out:
        for i in ids:
            fbank = np.zeros((N_FRAMES, 128), np.float32)
            fbank[:, NEAREST[i]] = 1.0
            out.write(i, image_times_s=ENDS, fbank=fbank)
        out.skip("failed", "qc.no_video")
    with ShardWriter(found.embeddings, 0, fingerprint="f", columns={"images": vectors_type("float32", 4, 4)}) as out:
        for i in ids:
            out.write(i, images=np.eye(4, dtype=np.float32))
    write_json(
        found.stats / "stats.json",
        {"mean": 0.0, "std": 1.0, "dataset": "audioset", "split": "train", "exclude": {"audiocaps": ["test"]},
         "leave_out": []},
    )  # fmt: skip
    captions = {"dataset": ["audiocaps"], "split": ["test"], "clip_id": ["held_out"], "caption": ["a dog"]}
    pq.write_table(pa.table(captions), found.embeddings / "captions.parquet")
    for folder in (found.pretrained, found.finetuned, found.trained):
        folder.mkdir()
    plant(found.lists, truths())
    return found


class Reader(AudioTower):
    """Its embedding of a clip is the first four mel bins."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.n_segments = 1

    def segments(self, fbank: Tensor) -> Tensor:
        return fbank[:, :, :4].mean(1, keepdim=True)


def look(paths: Paths, recipe: str = "nearest", seed: int = 20, tower: AudioTower | None = None) -> Path:
    """What `evaluate` leaves of one pretrained run."""
    told = {"recipe": recipe, "seed": seed, "dataset": "audioset"}
    folder = paths.work / f"{recipe}-{seed}"
    folder.mkdir(parents=True)
    read = FbankInput(Features(paths.features, "fbank"), N_FRAMES, 0.0, 1.0, None, torch.device("cpu"))
    sheet, manifest = evaluate.Sheet("pretrain", told, CFG), Manifest.read(paths.manifest)
    evaluate._audio_image(paths, tower or Reader(), read, told, manifest, sheet, folder)
    assert len(sheet.results) == 1
    return folder / "planted.parquet"


def test_each_clip_that_was_trained_on_has_its_outcome(paths: Paths) -> None:
    rows = {r["clip_id"]: r for r in pq.read_table(look(paths)).to_pylist()}
    assert list(rows) == ["easy", "right", "wrong"], "held out, without a right image, or of the test gallery"
    assert {i: (r["chosen"], r["is_right"]) for i, r in rows.items()} == {
        "easy": (2, True),
        "right": (1, True),
        "wrong": (2, False),
    }
    assert {i: (r["share_right"], r["is_hard"]) for i, r in rows.items()} == {
        "easy": (1.0, False),
        "right": (0.75, True),
        "wrong": (0.75, True),
    }
    assert {(r["stage"], r["recipe"], r["seed"]) for r in rows.values()} == {("pretrain", "nearest", 20)}


def test_a_tower_of_segments_chooses_no_image(paths: Paths) -> None:
    tower = Reader()
    tower.n_segments = 4
    tower.segments = lambda fbank: fbank[:, :4, :4]  # type: ignore[method-assign]
    assert not look(paths, "multiframe", tower=tower).exists()


def test_a_real_corpus_has_nothing_planted(paths: Paths) -> None:
    (paths.lists / "truth.json").unlink()
    assert not look(paths).exists()


def trained(paths: Paths, *runs: str) -> None:
    for run in runs:
        recipe, seed = run.split("-")
        told = {"recipe": recipe, "seed": int(seed), "dataset": "audioset", "vit": {"n_frames": N_FRAMES}}
        write_json(paths.pretrained / run / "run.json", told)
        (paths.pretrained / run / "model.safetensors").write_bytes(run.encode())


class Engine:
    """A map that measures nothing but the planted truth; `asked` are the runs that were not done yet."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.asked: list[str] = []

    def __call__(self, make: Any, cfg: Any, items: Iterable[Any], *, devices: Any = ()) -> Iterator[Any]:
        for name in items:
            self.asked.append(name)
            recipe, seed = name.removeprefix("pretrain/").split("-")
            folder = evaluate._folder(self.paths.work / "evaluate", name, cfg.marks[name])
            folder.mkdir(parents=True)
            found = look(self.paths, recipe, int(seed))
            if found.exists():
                found.rename(folder / "planted.parquet")
            found.parent.rmdir()
            pq.write_table(pa.table({"recipe": [recipe]}), folder / "ranks.parquet")
            write_json(folder / "results.json", [{"recipe": recipe, "seed": int(seed)}])
            yield name


def run(paths: Paths) -> list[str]:
    """The runs that were measured."""
    engine = Engine(paths)
    evaluate.run(paths, CFG, engine)
    return engine.asked


def test_the_runs_outcomes_lie_in_one_table(paths: Paths) -> None:
    trained(paths, "nearest-20", "nearest-21", "vip-20")
    assert run(paths) == ["pretrain/nearest-20", "pretrain/nearest-21", "pretrain/vip-20"]
    table = pq.read_table(paths.evaluations / "planted.parquet")
    assert len(table) == 9
    assert sorted(set(zip(table["recipe"].to_pylist(), table["seed"].to_pylist(), strict=True))) == [
        ("nearest", 20), ("nearest", 21), ("vip", 20),
    ]  # fmt: skip
    assert run(paths) == []
    assert pq.read_table(paths.evaluations / "planted.parquet") == table


def test_the_rules_are_measured_on_the_clips_that_are_trained_on(paths: Paths) -> None:
    trained(paths, "nearest-20")
    run(paths)
    told = json.loads((paths.evaluations / "image_times.json").read_text())
    assert (told["rule"], told["n_moved"], told["segment_s"]) == ("endpoints", 0, 2.5)
    ends = told["rules"]["endpoints"]
    assert (ends["n_clips"], ends["n_pairs"], ends["clips"]) == (4, 16, 75.0)
    assert ends["images"] == pytest.approx(100 * (4 + 3 + 3 + 0) / 16)
    assert told["rules"]["centres"]["images"] == pytest.approx(100 * (4 + 3 + 3 + 0) / 16)


def test_without_truth_nothing_of_it_is_left(paths: Paths) -> None:
    trained(paths, "nearest-20")
    run(paths)
    (paths.lists / "truth.json").unlink()
    assert run(paths) == ["pretrain/nearest-20"]
    assert sorted(p.name for p in paths.evaluations.iterdir()) == ["ranks.parquet", "results.json"]


def test_another_truth_makes_the_outcomes_stale(paths: Paths) -> None:
    trained(paths, "nearest-20")
    run(paths)
    changed = truths()
    plant(paths.lists, changed | {"wrong": changed["easy"]})
    assert run(paths) == ["pretrain/nearest-20"]
    assert all(pq.read_table(paths.evaluations / "planted.parquet")["is_right"].to_pylist())


def test_a_run_without_any_right_image_leaves_an_empty_table(paths: Paths) -> None:
    trained(paths, "nearest-20", "vip-20")
    plant(paths.lists, {i: truths()["unseen"] for i in NEAREST})
    run(paths)
    table = pq.read_table(paths.evaluations / "planted.parquet")
    assert (len(table), table.schema.field("recipe").type) == (0, pa.string())


def test_without_pretraining_no_rule_is_measured(paths: Paths) -> None:
    assert run(paths) == []
    assert [p.name for p in paths.evaluations.iterdir()] == ["results.json"]
