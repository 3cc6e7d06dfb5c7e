"""Fine-tuning as a stage: it starts from the tower that run.json tells of, and evaluation rebuilds the same one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import SHAPE, Project

from harken.clips import Manifest
from harken.errors import ConfigError, DataError
from harken.models import weights
from harken.models.audio_vit import AudioViT
from harken.models.towers import AudioTower
from harken.shards import file_sha256
from harken.stages import evaluate
from harken.stages.pretrain import AtPool, SideConfig, VitConfig, build_tower, fbank_input
from harken.stages.weights import VISUAL
from harken.training.runs import load_model
from harken.training.tasks import embed_clips

SIDES = {
    "segment": {"n_segments": 4, "division": "segment", "centres": None},
    "token_pool": {"n_segments": 4, "division": "token_pool", "centres": None},
    "window": {"n_segments": 4, "division": "window", "centres": [0.0, 1.0, 1.0, 1.0]},  # of FBANKs of 2 s
}


@pytest.mark.parametrize(
    ("division", "at_pool"),
    [("segment", "mean"), ("window", "flatten_repeat"), ("token_pool", "full_clip")],
)
def test_evaluation_has_the_tower_that_was_trained(
    project: Project, division: str, at_pool: AtPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.recipe("multiframe", {"match": "multiframe", "division": division, "row_norm": False}, at_pool)
    rebuilt: list[AudioTower] = []

    def build(*args: object, **kwargs: object) -> AudioTower:
        rebuilt.append(build_tower(*args, **kwargs))  # type: ignore[arg-type]
        return rebuilt[-1]

    monkeypatch.setattr(evaluate, "build_tower", build)
    project.run("pretrain", "finetune", "evaluate")
    paths, side = project.paths, SIDES[division]
    tuned = json.loads((paths.finetuned / "multiframe-20/run.json").read_text())
    assert json.loads((paths.pretrained / "multiframe-20/run.json").read_text())["side"] == side
    assert (tuned["side"], tuned["at_pool"]) == (side, at_pool)
    assert [(t.n_segments, t.division, t.at_pool) for t in rebuilt] == [(4, division, "mean"), (4, division, at_pool)]
    assert all(list(t.centres) == (side["centres"] or []) for t in rebuilt)
    results = {r["recipe"]: r for r in json.loads((paths.evaluations / "results.json").read_text())}
    for row in ("multiframe (zero-shot)", "multiframe"):
        assert results[row]["metrics"].keys() == {"t2a", "a2t"}
    # what it hears is what this tower hears, told of by the params and not by run.json
    vit = VitConfig(**project.params["pretrain"]["vit"])
    tower = build_tower(paths, vit, SideConfig.model_validate(side), 20, at_pool=at_pool)
    load_model(paths.finetuned, "multiframe-20", tower)
    read, ids = fbank_input(paths, vit, None), Manifest.read(paths.manifest).of("audiocaps", "test")["clip_id"]
    with torch.no_grad():
        heard = [embed_clips(t.pooled, read, ids.to_pylist()) for t in (rebuilt[-1], tower)]
    assert torch.equal(*heard)
    assert heard[0].shape == (3, 16)


def test_the_way_of_pooling_is_what_is_fine_tuned(project: Project) -> None:
    """Two poolings of one pretrained tower: other losses, so other weights."""
    project.recipe("multiframe", {"match": "multiframe", "division": "segment", "row_norm": False})
    how = {p: {"start": "multiframe", "at_pool": p} for p in ("mean", "flatten_repeat", "full_clip")}
    project.params["finetune"]["recipes"] = how
    project.run("pretrain", "finetune")
    tuned = [weights.load(project.paths.finetuned / f"{p}-20/model.safetensors")[0]["vit.proj"] for p in how]
    assert all(not torch.equal(a, b) for i, a in enumerate(tuned) for b in tuned[:i])
    started = weights.load(project.paths.pretrained / "multiframe-20/model.safetensors")[0]["vit.proj"]
    assert all(not torch.equal(a, started) for a in tuned)


def test_a_run_of_an_older_harken_is_to_be_pretrained_again(project: Project) -> None:
    project.run("pretrain")
    path = project.paths.pretrained / "vip_ant-20/run.json"
    told = json.loads(path.read_text())
    del told["side"]
    told["n_segments"] = 1
    path.unlink()  # it is a link to the scratch folder's
    path.write_text(json.dumps(told))
    with pytest.raises(DataError, match=rf"{path}: an older harken.*not say side.*Run `dvc repro pretrain` again"):
        project.run("finetune")


def test_weights_of_another_architecture_are_met_with_their_shapes(project: Project) -> None:
    project.run("pretrain")
    torch.manual_seed(0)
    other = AudioViT(**{**SHAPE, "embed_dim": 8, "layers": 2}, pos_grid=(2, 2))
    weights.save(project.paths.weights / VISUAL, other.state_dict(), {"heads": 1})
    with pytest.raises(DataError, match=r"model\.safetensors: does not fit AudioTower") as e:
        project.run("finetune")
    said = str(e.value)
    assert str(project.paths.pretrained / "vip_ant-20") in said
    assert "vit.transformer.resblocks.1.attn.in_proj_weight" in said
    assert "(64, 16)" in said
    assert "(64, 8)" in said


def test_it_is_retrained_when_the_tower_that_it_starts_from_is(project: Project) -> None:
    project.run("pretrain", "finetune")
    before = file_sha256(project.paths.finetuned / "vip_ant-20/model.safetensors")
    project.params["pretrain"]["optimizer"]["lr_weight"] *= 2
    project.run("pretrain", "finetune")
    assert file_sha256(project.paths.finetuned / "vip_ant-20/model.safetensors") != before


def test_a_start_that_nobody_pretrained(project: Project) -> None:
    project.run("pretrain")
    project.params["finetune"]["recipes"] = {"tuned": {"start": "vip_amt", "at_pool": "mean"}}
    with pytest.raises(ConfigError, match=r"finetune\.recipes\.tuned\.start.*'vip_amt-20'.*Did you mean 'vip_ant-20'"):
        project.run("finetune")


def test_a_missing_shard_is_named(project: Project) -> None:
    project.run("pretrain")
    (project.paths.features / "00000.parquet").unlink()
    with pytest.raises(DataError, match=r"features/00000\.parquet: missing"):
        project.run("finetune")


def test_a_gradient_that_is_not_finite_names_the_clip(project: Project) -> None:
    project.run("pretrain")
    array = project.paths.features / "00000.fbank.npy"
    values = np.load(array)
    values[:] = np.nan
    array.unlink()
    np.save(array, values)
    with pytest.raises(DataError, match=r"finetune vip_ant-20: the loss is nan.*its features are not finite"):
        project.run("finetune")
    (told,) = (project.paths.work / "finetune").glob("*/diverged.json")
    assert any("not finite" in c for c in json.loads(told.read_text())["clips"])
    assert not project.paths.finetuned.exists()
