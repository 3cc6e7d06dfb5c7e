"""Pretraining as a stage: what it refuses, what it goes on from, what it tells those after it of its towers."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import DIM, IMAGE_TIMES_S, SHAPE, VIT, Project, vipant_layout

from harken.errors import ConfigError, DataError
from harken.models.audio_vit import AudioViT
from harken.models.towers import AudioTower, window_starts
from harken.shards import ShardWriter, file_sha256, read_shard, shards_in, vectors_type
from harken.stages.pretrain import SideConfig, VitConfig, build_tower, tower_of
from harken.training import loop
from harken.training.runs import load_model

Stop = Callable[[int], None]
RUN = "vip_ant-20"


class StoppedError(Exception):
    """What a kill is to a process."""


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Stop:
    """Call it with n: the next training stops when it has kept n checkpoints, the one after that does not."""

    def after(n: int) -> None:
        real, kept = loop.save, []

        def save(*args: Any) -> None:
            real(*args)
            kept.append(args)
            if len(kept) == n:
                monkeypatch.setattr(loop, "save", real)
                raise StoppedError

        monkeypatch.setattr(loop, "save", save)

    return after


def begun(project: Project, stop: Stop) -> Path:
    """Stop a run in the middle of its second epoch; its checkpoint."""
    stop(4)
    with pytest.raises(StoppedError):
        project.run("pretrain")
    (state,) = (project.paths.work / "pretrain").glob("*/state.safetensors")
    return state


# Going on, or not


def test_a_run_begun_under_other_settings_is_kept_until_they_are_back(
    project: Project, stop: Stop, caplog: pytest.LogCaptureFixture
) -> None:
    project.params["pretrain"]["epochs"] = 2
    project.run("pretrain")
    undisturbed = project.contents("pretrain")
    shutil.rmtree(project.paths.work)
    state = begun(project, stop)
    kept = state.read_bytes()
    project.params["pretrain"]["epochs"] = 3
    with pytest.raises(
        DataError, match=r"pretrain\.epochs: 2 -> 3\n.*put the settings \(or the code\) back.*HARKEN_RESTART=1"
    ) as e:
        project.run("pretrain")
    assert str(state.parent) in str(e.value)
    assert "optimizer" not in str(e.value), "what is the same is not listed"
    assert state.read_bytes() == kept
    project.params["pretrain"] |= {"epochs": 2, "checkpoint_every": 1000}  # how often one is kept may change
    with caplog.at_level(logging.INFO, "harken"):
        project.run("pretrain")
    assert f"pretrain {RUN}: resuming at step 4" in caplog.text
    assert project.contents("pretrain") == undisturbed
    assert not state.exists()


def test_a_refusal_costs_no_run_that_was_done(project: Project, stop: Stop) -> None:
    project.params["pretrain"]["recipes"] = {name: {"match": "random_image"} for name in ("first", "second")}
    state = begun(project, stop)  # of the second: the first keeps three checkpoints
    assert state.parent.name.startswith("second-20")
    (done,) = (project.paths.work / "pretrain").glob("first-20.*/model.safetensors")
    before = done.stat()
    project.params["pretrain"]["epochs"] = 2
    with pytest.raises(DataError, match=r"second-20.*epochs: 1 -> 2"):
        project.run("pretrain")
    project.params["pretrain"]["epochs"] = 1
    project.run("pretrain")
    assert (done.stat().st_ino, done.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_harken_restart_gives_up_what_was_begun(
    project: Project, stop: Stop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    project.run("pretrain")
    undisturbed = project.contents("pretrain")
    shutil.rmtree(project.paths.work)
    project.params["pretrain"]["epochs"] = 2
    state = begun(project, stop)
    project.params["pretrain"]["epochs"] = 1
    monkeypatch.setenv("HARKEN_RESTART", "1")
    with caplog.at_level(logging.INFO, "harken"):
        project.run("pretrain")
    assert "resuming" not in caplog.text
    assert not state.parent.exists()
    assert project.contents("pretrain") == undisturbed


# Multiframe Match's audio side


def test_windows_lie_where_most_clips_images_were_taken(project: Project) -> None:
    project.params["pretrain"]["vit"] = VIT | {"n_frames": 1000}
    project.recipe("windows", {"match": "multiframe", "division": "window", "row_norm": False})
    project.run("pretrain")
    told = json.loads((project.paths.pretrained / "windows-20/run.json").read_text())
    vit, side = tower_of(told, "run.json", "pretrain")
    assert side == SideConfig(n_segments=4, division="window", centres=[t / 10 for t in IMAGE_TIMES_S])
    assert vit.n_frames == 1000
    assert window_starts(1000, 250, side.centres or ()) == [0, 208, 542, 750]
    assert build_tower(project.paths, vit, side, 0).centres == tuple(side.centres or ())


def test_images_later_than_the_fbank_have_windows_at_its_end(project: Project) -> None:
    project.recipe("windows", {"match": "multiframe", "division": "window", "row_norm": True})
    project.run("pretrain")  # FBANKs of 2 s, images up to the tenth
    told = json.loads((project.paths.pretrained / "windows-20/run.json").read_text())
    assert told["side"] == {"n_segments": 4, "division": "window", "centres": [0.0, 1.0, 1.0, 1.0]}


def test_one_image_is_not_several(project: Project) -> None:
    project.recipe("multiframe", {"match": "multiframe", "division": "segment", "row_norm": False})
    for shard in shards_in(project.paths.embeddings):
        rows = list(read_shard(project.paths.embeddings, shard, ("images",)))
        columns = {"images": vectors_type("float32", 1, DIM)}
        with ShardWriter(project.paths.embeddings, shard, fingerprint="f", columns=columns) as out:
            for row in rows:
                out.write(row["clip_id"], images=np.array(row["images"][:1], np.float32))
    with pytest.raises(ConfigError, match=r"multiframe needs two images.*extract\.n_images is 1.*random_image"):
        project.run("pretrain")


# VIP-ANT's own tower


def vipant_checkpoint(path: Path, seed: int = 1, **shape: Any) -> AudioTower:
    """Write a checkpoint as VIP-ANT would; the tower that it holds."""
    layout = vipant_layout()
    torch.manual_seed(seed)
    size = {**SHAPE, "n_frames": VIT["n_frames"], "stride": tuple(VIT["stride"]), **shape}
    tower = AudioTower(AudioViT(**size))
    tower.logit_scale.data.fill_(3.25)
    layout.write(path, layout.checkpoint(layout.as_vipant(tower.vit)))
    return tower


@pytest.fixture
def official(project: Project) -> AudioTower:
    path = project.root / "vip_ant.pth"
    project.recipe("official", {"match": "imported", "checkpoint": str(path)})
    return vipant_checkpoint(path)


def test_vip_ants_own_tower_is_published_fine_tuned_measured_and_told(
    project: Project, official: AudioTower, capsys: pytest.CaptureFixture[str]
) -> None:
    project.run("pretrain", "finetune", "evaluate", "report")
    published = load_model(project.paths.pretrained, "official-20", AudioTower(AudioViT(**sizes())))
    for name, value in official.state_dict().items():
        assert torch.equal(published.state_dict()[name], value), name
    told = json.loads((project.paths.pretrained / "official-20/run.json").read_text())
    assert told["imported"]["sha256"] == file_sha256(project.root / "vip_ant.pth")
    assert (told["dataset"], told["side"]["n_segments"], told["steps"]) == ("audioset", 1, None)
    tuned = json.loads((project.paths.finetuned / "official-20/run.json").read_text())
    assert (tuned["start"], tuned["steps"]) == ("official-20", 2)
    results = json.loads((project.paths.evaluations / "results.json").read_text())
    rows = {(r["stage"], r["recipe"], r["dataset"]) for r in results}
    assert {("pretrain", "official (mid)", "audioset"), ("finetune", "official", "audiocaps")} <= rows
    assert ("pretrain", "official (zero-shot)", "audiocaps") in rows
    report = capsys.readouterr().out
    assert all(f"| {row} |" in report for row in ("official (mid)", "official (zero-shot)", "official"))


def sizes() -> dict[str, Any]:
    return {**SHAPE, "n_frames": VIT["n_frames"], "stride": tuple(VIT["stride"])}


def test_what_is_fine_tuned_starts_from_vip_ants_tower(project: Project, official: AudioTower) -> None:
    for name in ("weight", "bias"):  # no step changes anything
        project.params["finetune"]["optimizer"][f"lr_{name}"] = 0.0
    project.params["finetune"]["reset_logit_scale"] = False
    project.run("pretrain", "finetune")
    tuned = load_model(project.paths.finetuned, "official-20", AudioTower(AudioViT(**sizes())))
    assert all(torch.equal(tuned.state_dict()[name], value) for name, value in official.state_dict().items())


def test_an_imported_run_done_again_has_the_same_files(project: Project, official: AudioTower) -> None:
    project.run("pretrain")
    first = project.contents("pretrain")
    assert sorted(first) == [f"official-20/{n}" for n in ("history.csv", "model.safetensors", "run.json")]
    project.run("pretrain")
    assert project.contents("pretrain") == first


def test_a_changed_checkpoint_is_taken_anew(project: Project, official: AudioTower) -> None:
    path = project.root / "vip_ant.pth"
    project.run("pretrain")
    before = project.contents("pretrain")
    other = vipant_checkpoint(path, seed=2)
    project.run("pretrain")
    after = project.contents("pretrain")
    assert {n for n in before if before[n] != after[n]} == {"official-20/model.safetensors", "official-20/run.json"}
    published = load_model(project.paths.pretrained, "official-20", AudioTower(AudioViT(**sizes())))
    assert torch.equal(published.state_dict()["vit.proj"], other.vit.proj)
    assert len(list((project.paths.work / "pretrain").iterdir())) == 1, "the old one is not kept"


def test_a_checkpoint_that_is_not_there(project: Project) -> None:
    project.recipe("official", {"match": "imported", "checkpoint": str(project.root / "lost.pth")})
    with pytest.raises(DataError, match=r"lost\.pth: no such checkpoint.*pretrain\.recipes"):
        project.run("pretrain")
    assert not project.paths.pretrained.exists()


def test_a_checkpoint_of_another_size_is_met_with_a_table(project: Project) -> None:
    vipant_checkpoint(project.root / "vip_ant.pth", embed_dim=8, layers=2)
    project.recipe("official", {"match": "imported", "checkpoint": str(project.root / "vip_ant.pth")})
    with pytest.raises(DataError, match=r"not of the size of this preset's CLIP:\n +key +found +expected\n") as e:
        project.run("pretrain")
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in str(e.value).splitlines()[2:]}
    assert lines["vit.proj"] == "(64, 8) (64, 16)"
    assert lines["vit.transformer.resblocks.1.attn.in_proj_bias"] == "(192,) none"
    vipant_checkpoint(project.root / "vip_ant.pth", n_frames=100)
    with pytest.raises(DataError, match=r"25 positions.*a grid of 12 x 4, 49 rows"):
        project.run("pretrain")


# What is not as it should be


def test_a_shard_that_is_gone_is_named(project: Project) -> None:
    project.run("pretrain")
    published = project.contents("pretrain")
    for folder in (project.paths.features, project.paths.embeddings):
        shard = folder / "00001.parquet"
        shard.rename(project.root / "kept")
        with pytest.raises(DataError, match=rf"{shard}: missing; the manifest names 2 shards.*dvc checkout"):
            project.run("pretrain")
        (project.root / "kept").rename(shard)
    array = project.paths.features / "00000.fbank.npy"
    array.rename(project.root / "kept")
    shutil.rmtree(project.paths.work)
    with pytest.raises(DataError, match=rf"{array}: missing beside its Parquet file"):
        project.run("pretrain")
    assert project.contents("pretrain") == published


def test_a_tower_that_nobody_knows_is_not_guessed() -> None:
    told = {"recipe": "nearest", "seed": 20, "n_segments": 1, "vit": {**VIT, "checkpointing": False}}
    with pytest.raises(DataError, match=r"nearest-20/run\.json: .*not say side.*Run `dvc repro pretrain`"):
        tower_of(told, "nearest-20/run.json", "pretrain")
    with pytest.raises(DataError, match="not say vit and side"):
        tower_of({"seed": 20}, "run.json", "finetune")
    side = {"n_segments": 1, "division": "segment", "centres": None}
    with pytest.raises(ConfigError, match=r"run\.json: side\.division: unknown name 'windows'"):
        tower_of({"vit": VIT, "side": {**side, "division": "windows"}}, "run.json", "pretrain")
    expected = VitConfig(n_frames=200, stride=(16, 32)), SideConfig(**side)
    assert tower_of({"vit": VIT, "side": side}, "run.json", "pretrain") == expected
