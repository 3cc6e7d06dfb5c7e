"""Who asks whom: captions against clips, the groupings that must differ, and the four image protocols."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harken.errors import ConfigError, DataError
from harken.evaluation.metrics import retrieval_metrics
from harken.evaluation.protocols import (
    PROTOCOLS,
    audio_to_image,
    audio_to_text,
    audio_to_text_grouped,
    dual_softmax,
    image_to_audio,
    text_to_audio,
)

OWNER = np.array([2, 0, 1, 1, 0, 2, 2])  # captions of a clip need not be neighbours, nor equally many


def recall(task: object, k: int) -> float:
    scores, relevant, _ = task  # type: ignore[misc]
    return retrieval_metrics(scores, relevant, ks=(k,))[f"R@{k}"]


def test_every_caption_asks_for_its_clip() -> None:
    sim = np.zeros((7, 3))
    sim[np.arange(7), OWNER] = 1.0
    task = text_to_audio(sim, OWNER)
    assert task.scores.shape == (7, 3)
    assert [r.tolist() for r in task.relevant] == [[c] for c in OWNER]
    assert recall(task, 1) == 100
    sim[0] = [1, 0, 0]
    assert recall(text_to_audio(sim, OWNER), 1) == pytest.approx(600 / 7)


def test_a_clip_is_content_with_the_best_of_its_captions() -> None:
    task = audio_to_text(np.zeros((7, 3)), OWNER)
    assert task.scores.shape == (3, 7)
    assert [sorted(r.tolist()) for r in task.relevant] == [[1, 4], [2, 3], [0, 5, 6]]
    sim = np.full((7, 3), 0.5)
    sim[1, 0], sim[4, 0] = 0.9, -1.0  # one good caption, one bad
    sim[3, 1], sim[6, 2] = 0.9, 0.9
    assert recall(audio_to_text(sim, OWNER), 1) == 100


def test_grouping_keeps_recall_at_1_and_raises_the_rest() -> None:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(40), 5)
    alike = rng.normal(size=(40, 40))[owner]  # captions of one clip resemble each other
    sim = alike + 0.5 * rng.normal(size=(200, 40)) + (owner[:, None] == np.arange(40))
    plain, grouped = audio_to_text(sim, owner), audio_to_text_grouped(sim, owner)
    assert recall(plain, 1) == recall(grouped, 1)
    assert recall(plain, 5) < recall(grouped, 5)
    assert recall(plain, 10) < recall(grouped, 10)
    assert recall(plain, 1) >= recall(text_to_audio(sim, owner), 1)


@pytest.mark.parametrize(
    ("task", "shape", "owner", "error", "says"),
    [
        (text_to_audio, (3, 2), [0, 1], ConfigError, "clip_of_text"),
        (text_to_audio, (2, 2), [0.0, 1.0], ConfigError, "integers"),
        (text_to_audio, (2, 2), [0, 2], ConfigError, "0 .. 1"),
        (text_to_audio, (2, 2), [0, -1], ConfigError, "0 .. 1"),
        (audio_to_text, (2, 3), [0, 2], DataError, "clip 1 .* no caption"),
        (audio_to_text_grouped, (2, 3), [0, 2], DataError, "clip 1 .* no caption"),
    ],
)
def test_captions_must_fit_the_gallery(task, shape, owner, error, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        task(np.zeros(shape), np.array(owner))


def literal(name: str, audio: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Each protocol, one pair of clips at a time."""
    if audio.ndim == 2:
        audio = np.repeat(audio[:, None], images.shape[1], axis=1)
    n, n_images, _ = images.shape

    def cos(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / np.sqrt(x @ x) / np.sqrt(y @ y))

    sim = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            each = [cos(images[i, x], audio[j, x]) for x in range(n_images)]
            if name == "flatten":
                sim[i, j] = cos(images[i].ravel(), audio[j].ravel())
            else:
                sim[i, j] = {"mid": each[(n_images - 1) // 2], "max": max(each), "mean": np.mean(each)}[name]
    return sim


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("n_images", [1, 3, 4])
def test_image_protocols_equal_their_literal_twins(name: str, segments: bool, n_images: int) -> None:
    rng = np.random.default_rng(1)
    images = rng.normal(size=(5, n_images, 6)) * rng.uniform(0.5, 2, size=(5, n_images, 1))
    audio = rng.normal(size=(5, n_images, 6) if segments else (5, 6))
    np.testing.assert_allclose(PROTOCOLS[name](audio, images), literal(name, audio, images), atol=1e-12)


def test_the_middle_of_four_images_is_the_second() -> None:
    images = np.eye(4)[None].repeat(2, axis=0)
    assert PROTOCOLS["mid"](np.eye(4)[[1, 2]], images).tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_one_image_makes_all_protocols_equal(name: str) -> None:
    rng = np.random.default_rng(2)
    audio, images = rng.normal(size=(4, 8)), rng.normal(size=(4, 1, 8))
    np.testing.assert_allclose(PROTOCOLS[name](audio, images), PROTOCOLS["mid"](audio, images), atol=1e-12)


def test_flatten_of_unit_rows_is_the_mean() -> None:
    rng = np.random.default_rng(3)
    audio, images = rng.normal(size=(2, 6, 4, 8))
    audio /= np.linalg.norm(audio, axis=-1, keepdims=True)
    images /= np.linalg.norm(images, axis=-1, keepdims=True)
    np.testing.assert_allclose(PROTOCOLS["flatten"](audio, images), PROTOCOLS["mean"](audio, images), atol=1e-12)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_half_precision_embeddings_do_not_overflow(name: str) -> None:
    images = np.full((2, 4, 512), 100, np.float16)
    assert PROTOCOLS[name](images[:, 0], images).dtype == np.float32
    np.testing.assert_allclose(PROTOCOLS[name](images[:, 0], images), 1, atol=1e-5)


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_an_embedding_without_direction_is_refused(name: str, bad: float) -> None:
    images = np.ones((3, 4, 2))
    images[2] = bad
    with pytest.raises(DataError, match="clip 2"):
        PROTOCOLS[name](np.ones((3, 2)), images)


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("audio", [(3, 3, 2), (2, 2), (3, 5)])
def test_shapes_must_fit(name: str, audio: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"images \(3, 4, 2\)"):
        PROTOCOLS[name](np.ones(audio), np.ones((3, 4, 2)))


def test_directions_of_the_image_task_are_transposes() -> None:
    sim = np.array([[0.9, 0.1], [0.95, 0.2]])
    assert recall(image_to_audio(sim), 1) == 50  # images of clip 1 prefer the audio of clip 0
    assert recall(audio_to_image(sim), 1) == 50
    assert audio_to_image(sim).scores[0].tolist() == [0.9, 0.95]
    with pytest.raises(ConfigError, match="found"):
        image_to_audio(np.zeros((2, 3)))


def literal_dual_softmax(sim: np.ndarray, omega: float) -> tuple[np.ndarray, np.ndarray]:
    """Each similarity times its share of its column (t2a) or row (a2t), one number after another."""
    n, m = sim.shape
    t2a, a2t = np.empty((n, m)), np.empty((n, m))
    for i in range(n):
        for j in range(m):
            column = sum(math.exp(omega * sim[k, j]) for k in range(n))
            row = sum(math.exp(omega * sim[i, k]) for k in range(m))
            t2a[i, j] = sim[i, j] * math.exp(omega * sim[i, j]) / column
            a2t[i, j] = sim[i, j] * math.exp(omega * sim[i, j]) / row
    return t2a, a2t


def cosines(n: int, m: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, m))


@pytest.mark.parametrize("omega", [0.1, 1.0, 1 / 0.07])
@pytest.mark.parametrize(("n", "m"), [(7, 3), (3, 7), (4, 4), (1, 5), (5, 1)])
def test_dual_softmax_equals_its_literal_twin(omega: float, n: int, m: int) -> None:
    sim = cosines(n, m)
    before = sim.copy()
    for found, expected in zip(dual_softmax(sim, omega), literal_dual_softmax(sim, omega), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert np.array_equal(sim, before)


def test_the_priors_sum_to_one_over_texts_for_t2a_and_over_clips_for_a2t() -> None:
    sim = cosines(7, 3)
    t2a, a2t = dual_softmax(sim, 5.0)
    np.testing.assert_allclose((t2a / sim).sum(0), 1)
    np.testing.assert_allclose((a2t / sim).sum(1), 1)
    assert (t2a / sim).sum(1) != pytest.approx(1)


def test_dual_softmax_of_the_transpose_is_the_other_direction() -> None:
    sim = cosines(7, 3)
    (t2a, a2t), (other, one) = dual_softmax(sim, 5.0), dual_softmax(sim.T, 5.0)
    np.testing.assert_allclose(t2a, one.T)
    np.testing.assert_allclose(a2t, other.T)


def test_the_prior_does_not_see_what_all_of_a_clip_s_texts_share() -> None:
    """A clip that every text likes a little more has a larger similarity, but the same prior."""
    sim = cosines(7, 3)
    liked = sim + np.array([0.0, 0.4, 0.0])
    np.testing.assert_allclose(dual_softmax(liked, 9.0)[0] / liked, dual_softmax(sim, 9.0)[0] / sim, rtol=1e-9)


def test_the_prior_takes_a_hub_from_those_that_are_not_its_own() -> None:
    """Clip 0 is the nearest to every text, but least of all to text 1: the prior gives that text its own clip."""
    sim = np.array([[0.9, 0.1], [0.6, 0.5]])
    assert recall(text_to_audio(sim, [0, 1]), 1) == 50
    t2a, _ = dual_softmax(sim, 1 / 0.07)
    assert recall(text_to_audio(t2a, [0, 1]), 1) == 100


def test_a_weak_prior_leaves_the_ranks_as_they_are() -> None:
    """ω near 0: all priors are 1 / n, which orders nothing anew."""
    sim = cosines(7, 3)
    t2a, a2t = dual_softmax(sim, 1e-9)
    np.testing.assert_allclose(t2a, sim / 7, rtol=1e-8)
    np.testing.assert_allclose(a2t, sim / 3, rtol=1e-8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_strong_prior_leaves_the_largest_alone(dtype: type) -> None:
    sim = cosines(7, 3).astype(dtype)
    with np.errstate(all="raise", under="ignore"):
        t2a, a2t = dual_softmax(sim, 1e6)
    np.testing.assert_array_equal(t2a, np.where(sim == sim.max(0), sim, 0.0))
    np.testing.assert_array_equal(a2t, np.where(sim == sim.max(1, keepdims=True), sim, 0.0))


@pytest.mark.parametrize("omega", [0.0, -1.0, float("nan")])
def test_a_prior_without_a_scale_is_refused(omega: float) -> None:
    with pytest.raises(ConfigError, match=r"prior_scale is .*; it must be above 0, such as 1 / temperature"):
        dual_softmax(cosines(2, 2), omega)
