"""Paper A's runs from features to results: what is made once, what is trained, what is refused before anything is.

A project of its own: log-mels drawn at random, a small CNN14 and a small BERT.
"""

from __future__ import annotations

import copy
import csv
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from torch import Tensor

from harken.clips import Clip, Manifest, Source, Split
from harken.config import parse, read_params
from harken.errors import ConfigError, DataError
from harken.media.frames import ImportedFrames, import_frames
from harken.models import weights
from harken.models.bert import Bert
from harken.models.panns import Cnn14
from harken.shards import ShardWriter, write_json
from harken.stages import train
from harken.stages.weights import load_encoder
from harken.training import frozen
from harken.training.batches import Features

N_SHARDS = 2
SHAPE: dict[str, Any] = {"width": 2, "options": {"n_classes": 3, "block6_pool": 1}}
ROWS_PER_FRAME = 32
LENGTH_S = {"audiocaps": 2.5, "clotho": 3.0}
# how many log-mel rows the clips have; 250 are heard of AudioCaps', of which one of the test clips has too few for any
ROWS = {
    ("audiocaps", Split.TRAIN): (300, 90, 255, 64, 180, 420, 200),
    ("audiocaps", Split.VAL): (260, 100, 300),
    ("audiocaps", Split.TEST): (31, 250, 120, 300),
    ("clotho", Split.TRAIN): (150, 300, 90, 200),
    ("clotho", Split.VAL): (210, 130),
    ("clotho", Split.TEST): (160, 240),
}
NT_XENT = {"name": "nt_xent", "temperature": 0.07, "reduction": "mean_of_directions"}
MEAN = {"dataset": "audiocaps", "encoder": "cnn14", "pooling": {"name": "mean"}, "loss": NT_XENT}
TAP = MEAN | {"pooling": {"name": "tap", "dp": 8}}
OTHERS = ("pretrained", "finetuned")  # the other paper's, of which there is nothing


def clips() -> list[Clip]:
    """Two captions for each clip that is trained on, but for each third three; two for the others."""
    return [
        Clip(clip_id, dataset, split, Source("youtube", clip_id), 0.0, 10.0, tuple(said))
        for (dataset, split), rows in ROWS.items()
        for i in range(len(rows))
        for clip_id in [f"{dataset}-{split}-{i}"]
        for said in [[f"{w} {dataset} {split} sound {i}" for w in ("a", "one", "the")[: 3 if i % 3 == 0 else 2]]]
    ]


def logmel(clip_id: str, n_rows: int) -> np.ndarray:
    rng = np.random.default_rng(list(clip_id.encode()))
    return (10 * rng.standard_normal((n_rows, 64)) + 20 * rng.standard_normal(64) - 40).astype(np.float16)


def encoder(seed: int) -> Cnn14:
    torch.manual_seed(seed)
    model = Cnn14(width=SHAPE["width"], **SHAPE["options"])
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(-40 if name.startswith("bn0") else 0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(300, 500) if name.startswith("bn0") else buffer.uniform_(0.5, 2)
    return model


def obtain(project: tiny.Project, kind: str = "tagging", seed: int = 0) -> None:
    """What the stage `weights` leaves of the encoder."""
    state, folder = encoder(seed).state_dict(), project.paths.weights
    weights.save(folder / "panns/cnn14.safetensors", state, {"labels": []})
    write_json(folder / "weights.json", {"panns": {"cnn14": {**SHAPE, "kind": kind, "sha256": str(seed)}}})


def make(root: Path) -> None:
    project = tiny.Project(root, {})
    paths, listed = project.paths, clips()
    manifest = Manifest.build(listed, N_SHARDS)
    paths.manifest.mkdir(parents=True)
    pq.write_table(manifest.table, paths.manifest / "clips.parquet")
    n_rows = {f"{d}-{s}-{i}": n for (d, s), rows in ROWS.items() for i, n in enumerate(rows)}
    for shard in manifest.shards:
        with ShardWriter(paths.features, shard, fingerprint="f", columns={}, arrays={"logmel": (64, "float16")}) as out:
            for c in manifest.requested(shard):
                out.write(c.id, logmel=logmel(c.id, n_rows[c.id]))
    torch.manual_seed(0)
    said = [t for c in listed for t in c.captions]
    Bert.small(said, dim=8, layers=1, heads=2, max_tokens=16).save(paths.weights / "bert")
    obtain(project)
    for name in OTHERS:
        getattr(paths, name).mkdir()


def params() -> dict[str, Any]:
    """The committed params, made tiny."""
    p = {s: copy.deepcopy(read_params(tiny.ROOT / "params.yaml")[s]) for s in ("train", "evaluate")}
    small = {"hidden": 16, "joint": 8, "length_s": LENGTH_S, "batch": {"audiocaps": 4, "clotho": 3}, "epochs": 1}
    p["train"] |= small | {"checkpoint_every": 100, "select": "last", "seeds": [1], "recipes": {"mean": MEAN}}
    p["evaluate"] |= {"n_resamples": 20, "ks": [1, 2], "prior_scale": None}
    return p


@pytest.fixture(scope="module")
def _root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("papera") / "project"
    make(root)
    return root


@pytest.fixture
def home(_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], tiny.Project]]:
    """Makes copies of the project, as many as are asked for."""
    monkeypatch.setenv("HARKEN_DEVICE", "cpu")
    monkeypatch.setenv("CI", "1")
    for name in ("HARKEN_RESTART", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    n = 0

    def copied() -> tiny.Project:
        nonlocal n
        n += 1
        shutil.copytree(_root, tmp_path / f"p{n}", copy_function=os.link)  # whoever changes a file writes it anew
        return tiny.Project(tmp_path / f"p{n}", params())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield copied
    torch.set_num_threads(threads)


@pytest.fixture
def project(home: Callable[[], tiny.Project]) -> tiny.Project:
    return home()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards whose frames were made, in order."""
    shards: list[int] = []
    real = frozen.make_shard

    def make_shard(*args: Any) -> int:
        shards.append(args[-1])
        return real(*args)

    monkeypatch.setattr(frozen, "make_shard", make_shard)
    return shards


def recipes(project: tiny.Project, **recipes: Mapping[str, Any]) -> None:
    project.params["train"]["recipes"] = {k: dict(v) for k, v in recipes.items()}


def told(project: tiny.Project, run: str = "mean-1") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project.paths.trained / run / "run.json").read_text())
    return found


def history(project: tiny.Project, run: str = "mean-1") -> dict[str, list[float]]:
    rows = list(csv.DictReader((project.paths.trained / run / "history.csv").open()))
    return {k: [float(r[k]) for r in rows] for k in rows[0]}


def tensors(project: tiny.Project, run: str = "mean-1", part: str = "") -> dict[str, Tensor]:
    found, _ = weights.load(project.paths.trained / run / "model.safetensors")
    return {k.removeprefix(part): v for k, v in found.items() if k.startswith(part)}


def evaluated(project: tiny.Project) -> dict[str, dict[str, Any]]:
    """What `evaluate` says of each row."""
    project.run("evaluate")
    rows = json.loads((project.paths.evaluations / "results.json").read_text())
    assert len({r["recipe"] for r in rows}) == len(rows)
    return {r["recipe"]: r for r in rows}


# ------------------------------------------------------------------------------------------- a frozen encoder's frames


def test_frames_of_a_frozen_encoder_are_made_once(project: tiny.Project, made: list[int]) -> None:
    recipes(project, mean=MEAN, tap=TAP)
    project.run("train")
    assert sorted(made) == [0, 1], "two recipes hear the same frames"
    assert_frames(project, encoder(0))
    recipes(project, mean=MEAN, max=MEAN | {"pooling": {"name": "max"}})
    project.params["train"]["seeds"] = [1, 2]
    project.run("train")
    assert sorted(made) == [0, 1], "the frames do not depend on the recipe, nor on the seed"
    assert {p.name for p in project.paths.trained.iterdir()} == {"mean-1", "mean-2", "max-1", "max-2"}
    recipes(project, mean=MEAN)
    project.params["train"]["seeds"] = [1]
    obtain(project, seed=1)
    project.run("train")
    assert sorted(made) == [0, 0, 1, 1]
    assert_frames(project, encoder(1))


def assert_frames(project: tiny.Project, model: Cnn14) -> None:
    """The kept frames are what the encoder makes of what is heard of each clip of training and validation."""
    model.eval()
    kept = Features(project.paths.work / "train-frames/cnn14.audiocaps", "frames")
    heard = {f"audiocaps-{s}-{i}": n for s in ("train", "val") for i, n in enumerate(ROWS["audiocaps", Split(s)])}
    assert kept.all == heard.keys(), "neither another dataset's, nor the test clips"
    for clip_id, n in heard.items():
        rows = min(n, round(100 * LENGTH_S["audiocaps"]) + 1)
        with torch.no_grad():
            alone = model(torch.from_numpy(logmel(clip_id, n)[:rows]).float()[None]).frames[0]
        assert len(alone) == kept.rows(clip_id) == rows // ROWS_PER_FRAME
        assert torch.equal(kept.read([clip_id], len(alone))[0][0], alone)
        assert bool(alone.std() > 0)


def test_frames_of_shards_that_are_no_more_are_not_read(project: tiny.Project) -> None:
    """Features that are sharded anew have the same clips in other shards."""
    project.run("train")
    folder = project.paths.work / "train-frames/cnn14.audiocaps"
    with ShardWriter(folder, 7, fingerprint="old", columns={}, arrays={"frames": (64, "float32")}) as out:
        out.write("audiocaps-train-0", frames=np.full((99, 64), 1e3))
    obtain(project, seed=1)
    project.run("train")
    assert_frames(project, encoder(1))


def test_a_run_on_frames_that_were_made_before_is_the_run_that_makes_them_at_every_step(
    home: Callable[[], tiny.Project],
    made: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick, slow = home(), home()
    for p in (quick, slow):
        recipes(p, mean=TAP)
        p.params["train"]["epochs"] = 2
    quick.run("train")
    n = len(made)
    monkeypatch.setattr(train, "is_frozen", lambda *args: False)
    slow.run("train")
    assert n == len(made) > 0
    found, expected = history(quick), history(slow)
    assert found.keys() == expected.keys()
    assert found["loss"][0] != found["loss"][1]
    for k in found:
        assert found[k] == pytest.approx(expected[k], abs=1e-4), k
    a, b = tensors(quick), tensors(slow)
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=1e-4, rtol=1e-3, msg=k)


def test_a_run_holds_its_frozen_encoder_as_it_was(project: tiny.Project) -> None:
    project.run("train")
    start, kept = encoder(0).state_dict(), tensors(project, part="audio.")
    assert start.keys() == kept.keys()
    assert all(torch.equal(kept[k], start[k]) for k in start), "its batch norms among them"
    bert = Bert.pretrained(project.paths.weights / "bert").state_dict()
    text = tensors(project, part="text.")
    assert not torch.equal(text[k := "model.encoder.layer.0.output.dense.weight"], bert[k])


def test_an_encoder_that_is_drawn_by_each_run_has_no_frames_to_keep(project: tiny.Project, made: list[int]) -> None:
    obtain(project, kind="random")
    project.params["train"]["seeds"] = [1, 2]
    project.run("train")
    assert made == []
    assert not (project.paths.work / "train-frames").exists()
    k = "conv_block1.conv1.weight"
    one, other = (tensors(project, f"mean-{seed}", "audio.")[k] for seed in (1, 2))
    assert not torch.equal(one, other)
    torch.manual_seed(1)
    assert torch.equal(one, load_encoder(project.paths.weights, "cnn14").state_dict()[k]), "frozen where it began"


def test_an_encoder_that_is_trained_has_no_frames_to_keep(project: tiny.Project, made: list[int]) -> None:
    project.params["train"]["freeze"] = ["text"]
    project.run("train")
    assert made == []
    assert not torch.equal(tensors(project, part="audio.")[k := "bn0.running_mean"], encoder(0).state_dict()[k])
    assert not torch.equal(tensors(project, part="audio.")[k := "conv_block6.bn2.bias"], encoder(0).state_dict()[k])
    bert = Bert.pretrained(project.paths.weights / "bert").state_dict()
    text = tensors(project, part="text.")
    assert all(torch.equal(text[k], bert[k]) for k in bert)


# --------------------------------------------------------------------------------------------------- Mei et al.'s code


def test_as_in_mei_et_al_the_batch_norms_of_a_frozen_encoder_go_on_learning(
    project: tiny.Project, made: list[int]
) -> None:
    recipes(project, mean=MEAN, clotho=MEAN | {"dataset": "clotho"})
    project.params["train"]["mei_compat"] = True
    project.run("train")
    assert made == []
    start = encoder(0)
    for run in ("mean-1", "clotho-1"):
        kept = tensors(project, run, "audio.")
        assert all(torch.equal(kept[k], v) for k, v in start.named_parameters()), "no weight is trained"
        buffers = dict(start.named_buffers())
        assert not any(torch.equal(kept[k], v) for k, v in buffers.items())
        steps = told(project, run)["steps"]
        assert {int(kept[k]) for k in buffers if k.endswith("num_batches_tracked")} == {steps}
    assert evaluated(project).keys() == {"mean", "clotho"}


@pytest.mark.parametrize(
    ("mei_compat", "dataset", "padding"),
    [
        (False, "audiocaps", "masked"),
        (False, "clotho", "masked"),
        (True, "audiocaps", "fixed"),
        (True, "clotho", "longest"),
    ],
)
def test_whose_padding_is_whose(mei_compat: bool, dataset: str, padding: str, project: tiny.Project) -> None:
    recipes(project, mean=MEAN | {"dataset": dataset})
    project.params["train"]["mei_compat"] = mei_compat
    cfg = project.cfg("train")
    assert train.padding_of(train.ModelConfig.of(cfg.recipes["mean"], cfg)) == padding


# ------------------------------------------------------------------------------------------------- epochs, temperature


@pytest.mark.parametrize(("epoch_of", "steps"), [("captions", 4), ("clips", 1)])
def test_an_epoch_is_one_of_captions_or_of_clips(epoch_of: str, steps: int, project: tiny.Project) -> None:
    """Seven clips have 17 captions; batches hold 4, and the last one is dropped."""
    project.params["train"]["epoch_of"] = epoch_of
    project.run("train")
    assert (told(project)["steps"], told(project)["n_train"]) == (steps, 7)
    assert told(project)["n_too_short"] == 0


def test_batches_of_captions_that_are_larger_than_the_clips_are_many_are_refused(project: tiny.Project) -> None:
    project.params["train"]["batch"] = {"audiocaps": 8, "clotho": 3}
    with pytest.raises(ConfigError, match=r"Batches of 8 captions of different clips need as many clips, found 7"):
        project.run("train")


def test_a_temperature_may_be_learnt(project: tiny.Project) -> None:
    learnt = {"name": "nt_xent", "temperature": {"initial": 0.07, "floor": 0.01}, "reduction": "sum"}
    recipes(project, learnt=MEAN | {"loss": learnt}, fixed=MEAN | {"loss": learnt | {"temperature": 0.7}})
    project.params["train"]["epochs"] = 2
    project.run("train")
    tau = history(project, "learnt-1")["temperature"]
    assert tau[0] == pytest.approx(0.07, rel=0.01)
    assert tau[0] != tau[1]
    scale = tensors(project, "learnt-1", "temperature.")["log_scale"]
    assert float((-scale).exp()) != pytest.approx(0.07, rel=1e-5)
    assert "temperature" not in history(project, "fixed-1")
    assert tensors(project, "fixed-1", "temperature.") == {}
    assert history(project, "learnt-1")["loss"][0] > history(project, "fixed-1")["loss"][0] + 0.05
    assert evaluated(project).keys() == {"learnt", "fixed"}


def test_a_pooling_may_learn_at_a_rate_of_its_own(project: tiny.Project) -> None:
    """Adam's first steps are as long as the rate, whatever the gradient is."""
    rates = {"as_all": 1.0, "slow": 1e-6}
    recipes(project, **{name: TAP | {"pooling_rate": rate} for name, rate in rates.items()}, none=TAP)
    project.run("train")
    assert tensors(project, "none-1").keys() == tensors(project, "as_all-1").keys()
    for name, value in tensors(project, "none-1").items():
        assert torch.equal(value, tensors(project, "as_all-1")[name]), name
    norm = "pooling.ln_audio.weight"  # ones at the start
    assert (tensors(project, "as_all-1")[norm] - 1).abs().max() > 1e-4
    assert (tensors(project, "slow-1")[norm] - 1).abs().max() < 1e-7
    projection = "audio_projection.0.weight"
    assert not torch.equal(tensors(project, "slow-1")[projection], tensors(project, "none-1")[projection])


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"encoder": "cnn15"}, r"recipes\.bad\.encoder: unknown name 'cnn15'\. Did you mean 'cnn14'\?"),
        ({"pooling": {"name": "tapp"}}, r"recipes\.bad\.pooling\.name: unknown name 'tapp'\. Did you mean 'tap'\?"),
        ({"pooling": {"dp": 3}}, r"recipes\.bad\.pooling: missing key `name`\. Known names: max, maxsim, mean"),
        ({"pooling": {"name": "mean", "dp": 3}}, r"recipes\.bad\.pooling: .*unexpected keyword argument 'dp'"),
        (
            {"pooling": {"name": "tap", "start": "unifrom"}},
            r"bad\.pooling: tap\.start: unknown name 'unifrom'\. Did you",
        ),
        ({"loss": {"name": "nt_xen", "temperature": 1}}, r"bad\.loss\.name: unknown name 'nt_xen'\. Did .* 'nt_xent'"),
        ({"loss": {"name": "nt_xent"}}, r"recipes\.bad\.loss: missing .*'temperature'"),
        ({"loss": {"name": "infonce", "temperature": {"initial": 0.1}}}, r"bad\.loss: .*'temperature'"),
        ({"loss": NT_XENT | {"temperature": {"initial": 0.07, "flor": 0.01}}}, r"bad\.loss: .*'flor'"),
        (
            {"loss": NT_XENT | {"temperature": {"initial": 0.07, "floor": 0.1}}},
            r"temperature: floor 0\.1 is not in \(0, 0\.07\]",
        ),
        ({"pooling_rate": 0}, r"recipes\.bad\.pooling_rate: .*greater than 0"),
        ({"dataset": "clothoo"}, r"train\.length_s has no value for 'clothoo', which bad is trained on"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_any_is_trained(
    changed: dict[str, Any], says: str, project: tiny.Project
) -> None:
    recipes(project, mean=MEAN, bad=MEAN | changed)
    with pytest.raises(ConfigError, match=says):
        project.run("train")
    assert not project.paths.work.exists()


@pytest.mark.parametrize("lacking", ["frames", "digest", "texts"])
def test_a_key_that_imported_frames_lack_is_named_in_one_line(lacking: str, project: tiny.Project) -> None:
    imported = {"frames": "data/frames", "digest": "d", "texts": "bert"}
    recipes(project, mean=MEAN, own=MEAN | {"encoder": {k: v for k, v in imported.items() if k != lacking}})
    with pytest.raises(ConfigError) as e:
        project.cfg("train")
    assert str(e.value).startswith(f"train.recipes.own.encoder.{lacking}: missing key.")
    assert "\n" not in str(e.value)


def test_a_loss_that_is_known_not_to_train_is_told_of_once_and_by_its_recipe(
    project: tiny.Project, caplog: pytest.LogCaptureFixture
) -> None:
    pmr = {"name": "pmr", "temperature": 0.07, "prior_scale": 5.0, "scale_by_batch": True}
    recipes(project, healthy=MEAN | {"loss": pmr | {"prior_scale": 0.5}}, sick=MEAN | {"loss": pmr})
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "harken"):
        warnings.simplefilter("error", UserWarning)
        project.run("train")
    found = [r.getMessage() for r in caplog.records if "known not to train" in r.getMessage()]
    assert len(found) == 1
    assert found[0].startswith("params.yaml: train.recipes.sick.loss: pmr.scale_by_batch with prior_scale 5 > 1")


# --------------------------------------------------------------------------------------------------- clips of no frame


def test_clips_too_short_for_one_frame_are_left_out_and_counted(
    project: tiny.Project, caplog: pytest.LogCaptureFixture
) -> None:
    """In its own splits of training and validation; another dataset's and the test's are not this run's."""
    short = {"audiocaps-train-1": ROWS_PER_FRAME - 1, "audiocaps-val-2": 5, "clotho-train-0": 1}
    shorten(project, short)
    recipes(project, mean=MEAN)
    with caplog.at_level(logging.WARNING, "harken"):
        project.run("train")
    assert (told(project)["n_train"], told(project)["n_val"], told(project)["n_too_short"]) == (6, 2, 2)
    assert "mean-1: 2 clips are too short for one frame and left out." in [r.getMessage() for r in caplog.records]
    kept = Features(project.paths.work / "train-frames/cnn14.audiocaps", "frames")
    assert not kept.all & short.keys()
    row = evaluated(project)["mean"]
    assert row["n_clips"] == 3
    assert row["passport"].startswith("audiocaps test 3/4 ")


def shorten(project: tiny.Project, rows: Mapping[str, int]) -> None:
    """Make these clips so many log-mel rows long."""
    before, paths = Features(project.paths.features, "logmel"), project.paths
    manifest = Manifest.read(paths.manifest)
    for shard in manifest.shards:
        with ShardWriter(paths.features, shard, fingerprint="g", columns={}, arrays={"logmel": (64, "float16")}) as out:
            for c in manifest.requested(shard):
                out.write(c.id, logmel=logmel(c.id, rows.get(c.id, before.rows(c.id))))


# ------------------------------------------------------------------------------------------- frames from somewhere else


def imported(
    project: tiny.Project, name: str = "own", seed: int = 0, captions: slice = slice(None), frame_s: float | None = 0.5
) -> ImportedFrames:
    """Frames and texts of AudioCaps that somebody else made."""
    rng, folder = np.random.default_rng(seed), project.root / "given"
    folder.mkdir(exist_ok=True)
    here = [c for c in clips() if c.dataset == "audiocaps"]
    np.savez(folder / "x.npz", **{c.id: rng.normal(size=(2 + i % 5, 6)).astype(np.float32) for i, c in enumerate(here)})
    said = [t for c in here for t in c.captions][captions]
    table = pa.table({"caption": said, "embedding": list(rng.normal(size=(len(said), 5)).astype(np.float32))})
    pq.write_table(table, folder / "texts.parquet")
    return import_frames(
        folder / "x.npz",
        project.root / name,
        dtype="float16",
        frame_s=frame_s,
        texts=folder / "texts.parquet",
        known={c.id for c in here},
    )


def on(found: ImportedFrames, texts: str = "imported", **changed: Any) -> dict[str, Any]:
    return TAP | {"encoder": {"frames": str(found.folder), "digest": found.digest, "texts": texts}} | changed


@pytest.mark.parametrize("freeze", [[], ["audio", "text"]])
def test_a_pooling_is_trained_on_frames_that_others_made(
    freeze: list[str], project: tiny.Project, made: list[int]
) -> None:
    found = imported(project)
    recipes(project, own=on(found), bert=on(found, "bert", pooling={"name": "meanmax"}))
    project.params["train"] |= {"freeze": freeze, "epochs": 2}
    project.run("train")
    assert made == []
    assert (told(project, "own-1")["frame_s"], told(project, "own-1")["n_too_short"]) == (0.5, 0)
    names = {k.split(".")[0] for k in tensors(project, "own-1")}
    assert names == {"audio_projection", "text_projection", "pooling"}, "what was imported stays where it is"
    assert {k.split(".")[0] for k in tensors(project, "bert-1")} == {"audio_projection", "text_projection", "text"}
    losses = history(project, "own-1")["loss"]
    assert losses[0] != losses[1]
    rows = evaluated(project)
    assert rows.keys() == {"own", "bert"}
    assert {r["passport"][:19] for r in rows.values()} == {"audiocaps test 4/4 "}, "they were not too short for others"


def test_imported_frames_and_texts_need_nothing_else(project: tiny.Project) -> None:
    recipes(project, own=on(imported(project)))
    for folder in ("features", "weights", *OTHERS):
        shutil.rmtree(getattr(project.paths, folder))
    project.run("train")
    assert evaluated(project).keys() == {"own"}


def test_frames_that_are_not_those_of_the_recipe_are_refused(project: tiny.Project) -> None:
    found = imported(project)
    recipes(project, mean=MEAN, own=on(found))
    again = imported(project, seed=1)
    assert again.digest != found.digest
    with pytest.raises(DataError, match=rf"digest is {again.digest}, the recipe's is {found.digest}"):
        project.run("train")
    assert not project.paths.work.exists()


def test_frames_that_were_exchanged_after_the_training_are_not_evaluated(project: tiny.Project) -> None:
    recipes(project, own=on(imported(project)))
    project.run("train")
    imported(project, seed=1)
    with pytest.raises(DataError, match=r"not the frames that this run was asked to train on"):
        project.run("evaluate")


def test_imported_texts_must_be_there(project: tiny.Project) -> None:
    found = imported(project)
    alone = import_frames(
        project.root / "given/x.npz", project.root / "mute", dtype="float32", frame_s=None, texts=None, known=None
    )
    recipes(project, own=on(found), mute=on(alone))
    with pytest.raises(ConfigError, match=r"recipes\.mute\.encoder\.texts: .*mute holds no texts"):
        project.run("train")


def test_a_caption_without_an_embedding_is_refused(project: tiny.Project) -> None:
    recipes(project, own=on(imported(project, captions=slice(1, None))))
    lacking = next(t for c in clips() for t in c.captions)
    with pytest.raises(DataError, match=rf"own: 1 .*captions .*no embedding, .*first '{lacking}'"):
        project.run("train")


@pytest.mark.parametrize(("frame_s", "n_frames"), [(None, 6), (0.5, 5), (1.0, 3), (1.25, 2)])
def test_of_imported_frames_those_that_begin_within_the_clip_are_heard(
    frame_s: float | None, n_frames: int, project: tiny.Project
) -> None:
    """AudioCaps' clips last 2.5 s here; the longest have six frames."""
    found = imported(project, frame_s=frame_s)
    recipes(project, own=on(found))
    recipe = project.cfg("train").recipes["own"]
    hearing = train.Hearing.of(project.paths, LENGTH_S["audiocaps"], recipe.encoder)
    assert (hearing.n_rows, hearing.frame_s) == (n_frames, frame_s)


def test_a_run_s_model_can_be_built_from_what_the_run_says(project: tiny.Project) -> None:
    recipes(project, own=on(imported(project)))
    cfg = project.cfg("train")
    spec = train.ModelConfig.of(cfg.recipes["own"], cfg)
    assert parse("run.json", train.ModelConfig, spec.model_dump(mode="json")) == spec


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_transductive_rows_stand_beside_the_plain_ones_and_change_nothing_in_them(
    home: Callable[[], tiny.Project],
) -> None:
    project = home()
    recipes(project, mean=MEAN, tap=TAP)
    project.run("train")
    plain, ranks = evaluated(project), pq.read_table(project.paths.evaluations / "ranks.parquet").to_pylist()
    project.params["evaluate"]["prior_scale"] = 14.285714
    both = evaluated(project)
    assert both.keys() == plain.keys() | {"mean (transductive)", "tap (transductive)"}
    assert {k: both[k] for k in plain} == plain
    found = pq.read_table(project.paths.evaluations / "ranks.parquet").to_pylist()
    assert [r for r in found if r["recipe"] in plain] == ranks
    for name in plain:
        revised = both[f"{name} (transductive)"]
        assert (revised["passport"], revised["chance"]) == (plain[name]["passport"], plain[name]["chance"])
        assert revised["metrics"].keys() == {"t2a", "a2t"}
    assert len(found) == 2 * len(ranks)


def test_when_a_text_aware_pooling_hears_is_kept_where_it_is_known_when_things_sound(project: tiny.Project) -> None:
    """Of the test clips the first cannot be heard; of the others 2.5 s are, whose frames are 0.32 s apart."""
    sounds = (("dog", 0.5, 1.5), ("rain", 2.0, 9.0), ("cat", 3.0, 4.0))
    events = [{"name": n, "size": "big", "start_s": a, "end_s": b, "sounds": True, "shown": []} for n, a, b in sounds]
    about = {"reason": "", "audioset": "", "audiocaps": "test", "clotho": "", "fps": 25.0, "captions": [], "decoys": []}
    times = {"start_s": 1.0, "end_s": 11.0, "duration_s": 12.0, "labels": [n for n, _, _ in sounds], "events": events}
    planted = {f"audiocaps-test-{i}": about | times for i in range(4)}
    write_json(project.paths.lists / "truth.json", {"clips": planted, "mids": {}})
    recipes(project, tap=TAP, mean=MEAN)
    project.run("train")
    evaluated(project)
    rows = pq.read_table(project.paths.evaluations / "grounding.parquet").to_pylist()
    names = ("tap", "tap (each frame alone)")
    assert {(r["recipe"], r["clip_id"]) for r in rows} == {(n, f"audiocaps-test-{i}") for n in names for i in (1, 2, 3)}
    assert len(rows) == 2 * 3 * 2, "the cat is beyond what is heard"
    for r in rows:
        assert (r["seed"], r["dataset"], r["stage"]) == (1, "audiocaps", "train")
        assert (r["frame_s"], r["heard_s"]) == (pytest.approx(0.32), 2.5)
        assert (r["start_s"], r["end_s"]) in {(0.5, 1.5), (2.0, 2.5)}
        n_frames = min(ROWS["audiocaps", Split.TEST][int(r["clip_id"][-1])], 251) // ROWS_PER_FRAME
        weights_ = np.array(r["weights"])
        assert sum(weights_) == pytest.approx(1, abs=1e-5)
        assert (weights_ > 0).sum() <= n_frames
        assert len(set(weights_[:n_frames])) == n_frames > 1


def test_a_clip_s_row_is_what_it_was_when_its_encoder_was_frozen(project: tiny.Project) -> None:
    """Evaluation encodes anew what training had in stored frames: the validation's score is the same both ways."""
    project.run("train")
    last = history(project)
    manifest = Manifest.read(project.paths.manifest)
    swapped = [
        Clip(c.id, c.dataset, {Split.VAL: Split.TEST, Split.TEST: Split.VAL}.get(c.split, c.split), c.source, 0.0, 10.0)
        for d, s in manifest.splits()
        for c in manifest.clips(d, s)
    ]
    said = {c.id: c.captions for c in clips()}
    table = Manifest.build(
        [Clip(c.id, c.dataset, c.split, c.source, 0.0, 10.0, said[c.id]) for c in swapped], N_SHARDS
    ).table
    (project.paths.manifest / "clips.parquet").unlink()
    pq.write_table(table, project.paths.manifest / "clips.parquet")
    project.params["evaluate"]["ks"] = [1, 5, 10]
    metrics = evaluated(project)["mean"]["metrics"]["t2a"]
    assert metrics["R@1"] == pytest.approx(last["val_t2a_R@1"][-1])
    assert metrics["R@5"] == pytest.approx(last["val_t2a_R@5"][-1])
