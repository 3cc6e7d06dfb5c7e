"""What the tasks train and what they leave alone, what they draw, and how they name a bad clip."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from harken.errors import DataError
from harken.evaluation.metrics import retrieval_metrics
from harken.evaluation.protocols import PROTOCOLS
from harken.models.audio_vit import AudioViT
from harken.models.features import Part
from harken.models.losses import LearnedTemperature, infonce, nt_xent
from harken.models.matching import MATCHES
from harken.models.panns import Cnn14
from harken.models.pooling import POOLINGS
from harken.models.towers import AudioTower, TextAudio
from harken.shards import ShardWriter
from harken.training.batches import Features, Order
from harken.training.compute import ComputeConfig, Encode
from harken.training.loop import Plan, fit
from harken.training.optim import OptimizerConfig, build
from harken.training.tasks import (
    SILENCE_DB,
    AudioImage,
    AudioText,
    AugmentConfig,
    Captions,
    FbankInput,
    TextToAudio,
    contrast,
    embed_clips,
    shared_infonce,
    text_scores,
)

CPU = torch.device("cpu")
N, IMAGES, DIM, FRAMES, MELS = 10, 3, 8, 48, 16
IDS = [f"c{i}" for i in range(N)]
COMPUTE = ComputeConfig(
    precision="float32", micro_batch=None, checkpointing=False, fused_attention=True, compile=False, deterministic=False
)
AUGMENT = AugmentConfig(freq_mask=6, time_mask=20, roll=True, gain_db=3.0)
PLAIN = AugmentConfig(freq_mask=0, time_mask=0, roll=False, gain_db=0.0)


pytestmark = pytest.mark.usefixtures("one_thread")


def write(folder: Path, bad: dict[str, float] | None = None) -> Features:
    rng = np.random.default_rng(0)
    for shard in range(2):
        with ShardWriter(folder, shard, fingerprint="f", columns={}, arrays={"fbank": (MELS, "float16")}) as out:
            for clip in IDS[shard::2]:
                fbank = rng.normal(size=(int(rng.integers(FRAMES - 9, FRAMES + 9)), MELS))
                fbank[2, 3] = (bad or {}).get(clip, fbank[2, 3])
                out.write(clip, fbank=fbank)
    return Features(folder, "fbank")


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Features:
    return write(tmp_path_factory.mktemp("features"))


def tower(n_segments: int) -> AudioTower:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 8, "layers": 1, "heads": 2, "embed_dim": DIM, "patch": 8, "stride": (8, 8)}
    return AudioTower(AudioViT(**sizes, n_frames=FRAMES // n_segments, n_mels=MELS), n_segments)


def embeddings(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(3))


def audio_image(features: Features, match: str = "random_image", **options: Any) -> AudioImage:
    model = tower(IMAGES if match == "multiframe" else 1)
    return AudioImage(
        model,
        Encode(model, "segments", COMPUTE),
        MATCHES[match](**options),
        FbankInput(features, FRAMES, 0.5, 2.0, AUGMENT, CPU),
        IDS,
        embeddings(N, IMAGES),
        IDS[:4],
        embeddings(N, IMAGES)[:4],
        PROTOCOLS["flatten" if match == "multiframe" else "max"],
        partial(retrieval_metrics, ks=(1,)),
    )


CAPTIONS = Captions.build([(clip, [f"{clip} {k}" for k in range(1 + i % 3)]) for i, clip in enumerate(IDS)])


def audio_text(features: Features) -> AudioText:
    model, texts = tower(IMAGES), embeddings(len(CAPTIONS.texts))
    read = FbankInput(features, FRAMES, 0.5, 2.0, AUGMENT, CPU)
    encode = Encode(model, "pooled", COMPUTE)
    return AudioText(model, encode, read, CAPTIONS, texts, CAPTIONS, texts.clone(), retrieval_metrics)


def train(task: AudioImage | AudioText, folder: Path, epochs: int = 2) -> dict[str, Tensor]:
    """Three steps an epoch, with rates that move the weights; what they are then."""
    schedule: dict[str, Any] = {"name": "warmup_cosine", "warmup_epochs": 1, "final": 0.001}
    cfg = OptimizerConfig(name="lars", lr_weight=20.0, lr_bias=0.05, weight_decay=1e-6, base="1", schedule=schedule)
    order = Order(N, 4, 5)
    optimizer, factor = build(cfg, task.model, 4, order.steps_per_epoch, epochs)
    fit(task, optimizer, order, Plan(epochs, 5, factor, None, 1, "last"), folder, "toy")
    return {k: v.clone() for k, v in task.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------- what is trained and what is not


@pytest.mark.parametrize("match", ["random_image", "multiframe"])
def test_the_audio_tower_learns_and_the_images_stay(match: str, features: Features, tmp_path: Path) -> None:
    task = audio_image(features, match)
    before = copy.deepcopy(task.model.state_dict())
    images, val = task.images.clone(), task.val_images.clone()
    after = train(task, tmp_path)
    assert all(not torch.equal(after[k], before[k]) for k in before), "a tensor was not trained"
    assert torch.equal(task.images, images)
    assert torch.equal(task.val_images, val)
    assert (task.images.requires_grad, task.images.grad, task.val_images.grad) == (False, None, None)


def test_the_audio_tower_learns_and_the_texts_stay(features: Features, tmp_path: Path) -> None:
    task = audio_text(features)
    before = copy.deepcopy(task.model.state_dict())
    texts = task.texts.clone()
    after = train(task, tmp_path)
    assert all(not torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(task.texts, texts)
    assert torch.equal(task.val_texts, texts)
    assert (task.texts.requires_grad, task.texts.grad) == (False, None)


def test_what_is_trained_is_the_audio_tower_and_the_scale_alone(features: Features) -> None:
    """CLIP's towers are not in the model, so they are neither in the optimiser nor in a checkpoint."""
    for task in (audio_image(features), audio_text(features)):
        names = {k for k, _ in task.model.named_parameters()}
        assert names - {f"vit.{k}" for k, _ in task.model.vit.named_parameters()} == {"logit_scale"}
        assert {id(p) for p in task.encode.parameters()} == {id(p) for p in task.model.parameters()}
        cfg = OptimizerConfig(
            name="lars",
            lr_weight=1,
            lr_bias=1,
            weight_decay=0,
            base="1",
            schedule={"name": "step_lr", "every_epochs": 1, "gamma": 1},
        )
        optimizer, _ = build(cfg, task.model, 4, 3, 2)
        held = [p for g in optimizer.param_groups for p in g["params"]]
        assert len(held) == len(names)
        assert {id(p) for p in held} == {id(p) for p in task.model.parameters()}


def test_a_warm_up_that_never_ends_is_vip_ant_to_the_bit(features: Features, tmp_path: Path) -> None:
    vip_ant = train(audio_image(features), tmp_path / "random")
    for scope in ("own_clip", "all_pairs"):
        nearest = audio_image(features, "nearest_image", n_warmup=2, scope=scope)
        assert same(train(nearest, tmp_path / scope), vip_ant)
    shorter = audio_image(features, "nearest_image", n_warmup=1)
    assert not same(train(shorter, tmp_path / "shorter"), vip_ant)


def test_of_one_image_all_ways_are_one(features: Features) -> None:
    """Oracle 30: the loss of L = 1 is the same whoever matches."""
    found = []
    for match, options in (("random_image", {}), ("nearest_image", {"n_warmup": 0}), ("multiframe", {})):
        task = audio_image(features, "random_image")
        task.images = task.images[:, :1]
        task.match = MATCHES[match](**options)
        with contextlib.closing(task.batches(Order(N, 4, 5)).epoch(0)) as batches:
            batch = next(batches)
            audio = task.encode(task.read(batch.clips, None))
            images = task.images[torch.from_numpy(batch.items)]
        sides = task.match.sides(audio if match == "multiframe" else audio[:, 0], images, 0, torch.Generator())
        found.append(float(infonce(task.model.scaled(task.match.similarity(*sides))).detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] == pytest.approx(found[2], rel=1e-6)


# --------------------------------------------------------------------------------------------- shares of a loss


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 9))
def test_the_shares_of_a_loss_add_up_to_it(sizes: list[int], seed: int) -> None:
    n = sum(sizes)
    sim = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    shares = [shared_infonce(sim[i : i + k], sim[:, i : i + k], Part(i, n)) for i, k in zip(firsts, sizes, strict=True)]
    assert float(torch.stack(shares).sum()) == pytest.approx(float(infonce(sim)), rel=1e-12)


def test_alone_the_contrast_is_infonce_of_rows_and_columns() -> None:
    rows, columns = torch.randn(4, 3), torch.randn(4, 3)
    found = contrast(lambda r, c: r @ c.T, rows, columns, Part(0, 4))
    assert torch.equal(found, infonce(rows @ columns.T))


# ------------------------------------------------------------------------------------------- draws of one's part


def parts_of(n: int, cuts: tuple[int, ...]) -> list[tuple[int, int]]:
    edges = [0, *cuts, n]
    return list(itertools.pairwise(edges))


@pytest.mark.parametrize("cuts", [(5,), (4, 7), (1, 2, 3)])
@pytest.mark.parametrize(
    "augment",
    [
        AUGMENT,
        PLAIN.model_copy(update={"roll": True}),
        PLAIN.model_copy(update={"gain_db": 6.0}),
        PLAIN.model_copy(update={"time_mask": 30}),
    ],
)
def test_a_part_is_augmented_as_in_the_whole(features: Features, augment: AugmentConfig, cuts: tuple[int, ...]) -> None:
    read = FbankInput(features, FRAMES, 0.5, 2.0, augment, CPU)

    def clips(first: int, end: int) -> Any:
        return features.fill(features.room(end - first, FRAMES, CPU), features.numbers(IDS[first:end]))

    whole, after = read(clips(0, N), g := torch.Generator().manual_seed(7)), g.get_state()
    assert not torch.equal(whole, read(clips(0, N), None))
    for first, end in parts_of(N, cuts):
        part = read(clips(first, end), g := torch.Generator().manual_seed(7), Part(first, N))
        assert torch.equal(part, whole[first:end])
        assert torch.equal(g.get_state(), after), "what is drawn next would differ"


@pytest.mark.parametrize("cuts", [(5,), (4, 7), (1, 2, 3)])
def test_a_part_draws_the_captions_of_the_whole(cuts: tuple[int, ...]) -> None:
    items = np.random.default_rng(0).permutation(N)
    whole, after = CAPTIONS.draw(items, g := torch.Generator().manual_seed(7)), g.get_state()
    assert all(c in CAPTIONS.of[i] for c, i in zip(whole, items, strict=True))
    for first, end in parts_of(N, cuts):
        part = CAPTIONS.draw(items[first:end], g := torch.Generator().manual_seed(7), Part(first, N))
        assert np.array_equal(part, whole[first:end])
        assert torch.equal(g.get_state(), after)


def test_every_caption_of_a_clip_has_its_chance() -> None:
    g, three = torch.Generator().manual_seed(0), 2  # c2 has three captions
    drawn = CAPTIONS.draw(np.full(3000, three), g)
    counts = np.bincount(drawn)[CAPTIONS.of[three]]
    assert counts.sum() == 3000
    assert (abs(counts - 1000) < 4 * math.sqrt(3000 * 2 / 9)).all()
    assert (CAPTIONS.draw(np.full(50, 0), g) == CAPTIONS.of[0][0]).all()
    assert [CAPTIONS.clip_of[c] for c in CAPTIONS.of[three]] == [three] * 3
    assert [CAPTIONS.texts[c] for c in CAPTIONS.of[three]] == ["c2 0", "c2 1", "c2 2"]


def test_masks_and_gain_are_within_their_limits(features: Features) -> None:
    augment = AugmentConfig(freq_mask=4, time_mask=12, roll=False, gain_db=3.0)
    read, n = FbankInput(features, FRAMES, 0.0, 2.0, augment, CPU), 400
    clips = features.fill(features.room(n, FRAMES, CPU), features.numbers([IDS[0]] * n))
    plain = read(clips, None)
    found = read(clips, torch.Generator().manual_seed(0))
    zeroed = found == 0
    mels, frames = zeroed.all(1).sum(1), zeroed.all(2).sum(1)
    assert int(mels.max()) in (3, 4)
    assert int(frames.max()) in (11, 12)
    assert 0 in mels.tolist()
    nats = (found - plain)[~zeroed & (plain != 0)] * 2.0
    assert float(nats.abs().max()) == pytest.approx(0.3 * math.log(10), rel=0.05)


# ------------------------------------------------------------------------------------------------ bad features


@pytest.mark.parametrize(("value", "says"), [(math.inf, "nan"), (math.nan, "nan")])
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_clip_whose_features_are_not_finite_is_marked(kind: str, value: float, says: str, tmp_path: Path) -> None:
    features = write(tmp_path / "features", {"c3": value, "c8": -value})
    task = audio_image(features) if kind == "images" else audio_text(features)
    task.read = replace(task.read, augment=None)  # a mask may hide it
    batches = list(Order(N, 4, 5).epoch(0))
    step = next(s for s, items in enumerate(batches) if {3, 8} & set(items.tolist()))
    with pytest.raises(DataError, match=rf"the loss is {says} at epoch 0, step {step}.*diverged\.json names all"):
        train(task, tmp_path / "run")
    told = json.loads((tmp_path / "run" / "diverged.json").read_text())
    mark = " (its features are not finite)"
    assert told["clips"] == [IDS[i] + mark * (i in (3, 8)) for i in batches[step]]


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_clip_of_the_validation_is_named_too(kind: str, tmp_path: Path) -> None:
    task = (audio_image if kind == "images" else audio_text)(write(tmp_path, {"c3": math.inf, "c1": math.nan}))
    with (
        pytest.raises(DataError, match=r"the embedding of c1, c3 is not finite\. Look at its features"),
        torch.no_grad(),
    ):
        task.validate()


def test_finite_clips_are_not_marked(features: Features) -> None:
    task = audio_image(features)
    with contextlib.closing(task.batches(Order(N, 4, 5)).epoch(0)) as batches:
        assert [task.names(b) for b in batches] == [[IDS[i] for i in items] for items in Order(N, 4, 5).epoch(0)]


# -------------------------------------------------------------------------------------------------- validation


def test_validation_draws_nothing_and_reads_all(features: Features) -> None:
    task = audio_image(features)
    task.model.eval()
    with torch.no_grad():
        first, again = dict(task.validate()), dict(task.validate())
        embedded = embed_clips(task.encode, task.read, IDS, batch=3)
        expected = torch.cat([task.model.segments(task.read(c, None)) for c in _each(features)])
    assert first == again
    assert set(first) == {"val_a2i_R@1", "val_i2a_R@1", "score"}
    assert first["score"] == first["val_a2i_R@1"] + first["val_i2a_R@1"]
    torch.testing.assert_close(embedded, expected)


def _each(features: Features) -> list[Any]:
    return [features.fill(features.room(1, FRAMES, CPU), features.numbers([i])) for i in IDS]


def test_an_audio_query_is_right_with_any_of_its_captions() -> None:
    """Three captions of clip 0, one of clip 1: the worst caption of a clip does not count against it."""
    sim = np.array([[0.1, 0.9], [0.9, 0.1], [0.0, 0.2], [0.3, 0.4]])
    found = text_scores(sim, np.array([0, 0, 0, 1]), partial(retrieval_metrics, ks=(1,)))
    assert found == {"val_t2a_R@1": 50.0, "val_a2t_R@1": 50.0}
    better = np.array([[0.1, 0.2], [0.9, 0.1], [0.0, 0.2], [0.3, 0.4]])
    assert text_scores(better, np.array([0, 0, 0, 1]), partial(retrieval_metrics, ks=(1,)))["val_a2t_R@1"] == 100.0


def test_perfect_embeddings_have_full_marks(features: Features) -> None:
    task = audio_text(features)
    with torch.no_grad():
        audio = embed_clips(task.encode, task.read, IDS)
        task.val_texts = audio[torch.from_numpy(CAPTIONS.clip_of)]
        score = task.validate()
    assert score["val_a2t_R@1"] == 100.0
    assert score["score"] == score["val_t2a_R@1"] + score["val_a2t_R@1"]


# ------------------------------------------------------------------------------------------------ paper A's task

ROWS = [300, 96, 130, 64, 300, 200, 32, 255, 70, 300]  # log-mel rows of each clip; 32 of them make a frame


def logmels(folder: Path, rows: list[int] = ROWS, tail: float | None = None) -> Features:
    """Features of IDS; with `tail` each goes on for 64 rows of that value."""
    with ShardWriter(folder, 0, fingerprint="f", columns={}, arrays={"logmel": (64, "float32")}) as out:
        for i, n in enumerate(rows):
            values = 10 * np.random.default_rng(i).standard_normal((n, 64)) - 40
            out.write(IDS[i], logmel=values if tail is None else np.r_[values, np.full((64, 64), tail)])
    return Features(folder, "logmel")


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Features:
    return logmels(tmp_path_factory.mktemp("logmels"))


class Letters(nn.Module):
    """A text tower without dropout: the mean of an embedding for each byte."""

    dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.EmbeddingBag(128, self.dim)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.bytes(tokens["ids"], tokens["first"])
        return found


def spelt(texts: Any) -> dict[str, Tensor]:
    ids = [list(t.encode()) for t in texts]
    firsts = np.cumsum([0, *map(len, ids[:-1])])
    return {"ids": torch.tensor([i for t in ids for i in t]), "first": torch.from_numpy(firsts)}


def text_audio(pooling: str = "tap", temperature: LearnedTemperature | None = None) -> TextAudio:
    """In evaluation mode, with batch norms that have met log-mels: else the deepest frames would all be about 0."""
    torch.manual_seed(0)
    audio = Cnn14(n_classes=2, width=2, block6_pool=1, dropout=0.0)
    for m in audio.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    with torch.no_grad():
        audio(10 * torch.randn(4, 256, 64) - 40)
    dims = {"audio": audio.dim, "text": Letters.dim, "hidden": 16, "joint": 8}
    pool = POOLINGS[pooling](dim=audio.dim if pooling == "meanmax" else 8)
    return TextAudio(audio, Letters(), pool, pooling, dims, temperature=temperature).eval()


def text_to_audio(features: Features, model: TextAudio | None = None, n_rows: int = 301, **options: Any) -> TextToAudio:
    loss = partial(nt_xent, temperature=0.07)
    model = model or text_audio()
    captions = (CAPTIONS, CAPTIONS)
    return TextToAudio(model, spelt, loss, features, n_rows, *captions, retrieval_metrics, CPU, **options)


def of_clips(clip_ids: list[str]) -> Captions:
    return Captions.build([(i, [CAPTIONS.texts[c] for c in CAPTIONS.of[IDS.index(i)]]) for i in clip_ids])


@pytest.mark.parametrize("by_caption", [True, False])
def test_a_batch_s_audio_and_text_are_of_the_same_clips(by_caption: bool, heard: Features) -> None:
    """Item i of the order is a caption, or a clip that then draws one of its captions."""
    task = text_to_audio(heard, by_caption=by_caption)
    said: list[list[str]] = []
    numbers: list[list[int]] = []

    def tokenize(texts: Any) -> dict[str, Tensor]:
        said.append(list(texts))
        return spelt(texts)

    def loss_of(sim: Tensor, clips: Tensor) -> Tensor:
        numbers.append(clips.tolist())
        return nt_xent(sim, clips, temperature=0.07, mask_same_audio=True)

    task.tokenize, task.loss_of = tokenize, loss_of
    n = len(CAPTIONS.texts) if by_caption else N
    order = Order(n, 4, 5, clips=CAPTIONS.clip_of if by_caption else None)
    with contextlib.closing(task.batches(order).epoch(0)) as batches:
        for batch in batches:
            value, extra = task.loss(batch, 0, torch.Generator().manual_seed(1))
            assert [t.split()[0] for t in said[-1]] == list(task.names(batch)) == [IDS[c] for c in numbers[-1]]
            assert all(
                np.array_equal(batch.clips.array[i, : ROWS[c]], heard.read([IDS[c]], ROWS[c])[0][0])
                for i, c in enumerate(numbers[-1])
            )
            sim = task.model.similarity(
                task.model.encode_text(spelt(said[-1])),
                task.model.encode_audio(batch.clips.on(CPU), batch.clips.valid_on(CPU)),
            )
            assert float(value.detach()) == pytest.approx(float(nt_xent(sim, temperature=0.07).detach()), rel=1e-5)
            assert extra == {"diagonal": pytest.approx(float(sim.detach().diagonal().mean()), rel=1e-5)}
    met = [t for some in said for t in some]
    assert sorted(met) == sorted(CAPTIONS.texts) if by_caption else {t.split()[0] for t in met} == set(IDS)


def test_a_temperature_that_is_learnt_is_the_loss_s_and_is_told(heard: Features) -> None:
    model = text_audio(temperature=LearnedTemperature(0.2))
    task, plain = text_to_audio(heard, model), text_to_audio(heard)
    task.loss_of, plain.loss_of = nt_xent, partial(nt_xent, temperature=0.2)
    found = []
    for t in (task, plain):
        with contextlib.closing(t.batches(Order(N, 4, 5)).epoch(0)) as batches:
            found.append(t.loss(next(batches), 0, torch.Generator().manual_seed(1)))
    (loss, extra), (expected, without) = found
    torch.testing.assert_close(loss, expected)
    assert extra == {**without, "temperature": pytest.approx(0.2)}
    loss.backward()
    assert model.temperature is not None
    assert bool(model.temperature.log_scale.grad)


@pytest.mark.parametrize("pooling", ["tap", "netrvlad", "meanmax"])
def test_frames_that_were_made_before_are_as_good_as_the_encoder(pooling: str, heard: Features, tmp_path: Path) -> None:
    model = text_audio(pooling)
    arrays = {"frames": (64, "float32")}
    with torch.no_grad(), ShardWriter(tmp_path, 0, fingerprint="f", columns={}, arrays=arrays) as out:
        for i, n in zip(IDS, ROWS, strict=True):
            out.write(i, frames=model.audio(heard.read([i], n)[0]).frames[0].numpy())
    task = text_to_audio(heard, model)
    made = text_to_audio(Features(tmp_path, "frames"), model, n_rows=9, is_encoded=True)
    with torch.no_grad():
        np.testing.assert_allclose(made.similarity(CAPTIONS), task.similarity(CAPTIONS), atol=1e-5)


@pytest.mark.parametrize("padding", ["masked", "fixed", "longest"])
@pytest.mark.parametrize("pooling", ["tap", "meanmax"])
def test_a_clip_s_similarity_depends_on_companions_or_padding_as_in_mei_et_al_alone(
    pooling: str, padding: str, heard: Features
) -> None:
    """Oracle 12: 300 rows, the longest clip's, are 9 frames; 701 would be 21."""
    model, clip = text_audio(pooling), IDS[1]

    def row(n_rows: int, *clips: str) -> np.ndarray:
        task = text_to_audio(heard, model, n_rows, padding=padding)
        text = task.texts(["rain", "a dog barks"])
        return model.score(text, task.clips([clip, *clips])).numpy()[:, 0]

    with torch.no_grad():
        alone, together, padded = row(301), row(301, IDS[0], IDS[3]), row(701)
    differs = {"companions": abs(together - alone).max(), "padding": abs(padded - alone).max()}
    assert {k: v > 1e-3 for k, v in differs.items()} == {
        "companions": padding == "longest",
        "padding": padding == "fixed",
    }
    assert all(v > 1e-3 or v < 1e-5 for v in differs.values())


def test_padding_that_is_heard_is_silence(heard: Features, tmp_path: Path) -> None:
    """Mei et al. pad the samples with zeros, of which log-mels are -100 dB; 0 dB would be the loudest noise."""
    assert pytest.approx(-100) == SILENCE_DB
    rows = [200] * N
    model = text_audio()
    padded = text_to_audio(logmels(tmp_path / "short", rows), model, 264, padding="fixed")
    silent = text_to_audio(logmels(tmp_path / "silent", rows, tail=-100.0), model, 264)
    with torch.no_grad():
        np.testing.assert_allclose(padded.similarity(CAPTIONS), silent.similarity(CAPTIONS), atol=1e-5)


def test_clips_of_batches_of_different_lengths_are_one(heard: Features) -> None:
    """As long as their longest each, two batches have other numbers of frames; what is added is masked."""
    task = text_to_audio(heard, padding="longest", batch=2)
    ids = [IDS[i] for i in (1, 2, 0, 5, 3)]
    with torch.no_grad():
        found = task.clips(ids)
        assert found.frames.shape == (5, 9, 8)
        assert found.mask.sum(1).tolist() == [4, 4, 9, 9, 2]
        assert not found.frames[~found.mask].any()
        for i, n in ((0, 4), (2, 9), (4, 2)):
            own = task.clips(ids[i : i + 2])
            torch.testing.assert_close(found.frames[i, :n], own.frames[0])
        sim = task.similarity(of_clips(ids))
    assert sim.shape == (sum(len(CAPTIONS.of[IDS.index(i)]) for i in ids), 5)
    assert np.isfinite(sim).all()


def test_texts_come_in_pieces_and_are_the_same(heard: Features) -> None:
    task = text_to_audio(heard, batch=1)
    with torch.no_grad():
        torch.testing.assert_close(task.texts(CAPTIONS.texts), task.model.encode_text(spelt(CAPTIONS.texts)))
