"""Text-aware search: two stages with all candidates are the exact scan, which is score_matrix; a hit says when."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from harken import cli
from harken.errors import ConfigError, DataError
from harken.models.features import AudioFeatures
from harken.models.pooling import POOLINGS
from harken.models.scoring import score_matrix
from harken.models.towers import StoredFrames, StoredTexts, TextAudio
from harken.search import folder as files
from harken.search import index as plain
from harken.search import query, text_aware
from harken.search.folder import drop, is_text_aware, verify
from harken.search.text_aware import TextAwareIndex, build, load, save_run, search, strip

DIM, N, T = 24, 70, 13
VARIANTS = [
    ("tap", {"dp": 16}),
    ("tap", {"dp": 16, "share_ln": False, "bias": True}),
    ("xpool", {}),
    ("xpool", {"dp": 12}),
    ("maxsim", {}),
]


def pooling_of(name: str, options: dict[str, object]) -> torch.nn.Module:
    """With gains, shifts and biases that hide no mistake, and attention that is not even."""
    pool = POOLINGS[name](dim=DIM, **options).eval()
    for p in pool.parameters():
        torch.nn.init.normal_(p, mean=0.5, std=0.5) if p.ndim == 1 else p.data.mul_(2)
    return pool


def gallery() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    frames, texts = torch.randn(N, T, DIM), torch.randn(4, DIM)
    mask = torch.arange(T) < torch.randint(1, T + 1, (N, 1))
    frames[::5, :3] += texts[0]
    return frames, mask, texts


def indexed(folder: Path, pool: torch.nn.Module, frames: torch.Tensor, mask: torch.Tensor) -> TextAwareIndex:
    kept = (f[m] for f, m in zip(frames, mask, strict=True))
    return build([str(i) for i in range(len(frames))], kept, pool, folder, frame_s=0.32)


@pytest.fixture
def found(tmp_path: Path) -> tuple[TextAwareIndex, torch.Tensor]:
    torch.manual_seed(0)
    frames, mask, texts = gallery()
    return indexed(tmp_path, pooling_of("tap", {"dp": 16}), frames, mask), texts


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_the_scan_is_the_score_matrix(name: str, options: dict[str, object], tmp_path: Path) -> None:
    torch.manual_seed(0)
    pool, (frames, mask, texts) = pooling_of(name, options), gallery()
    index = indexed(tmp_path, pool, frames, mask)
    wanted = score_matrix(texts, frames, mask, pool).detach()
    for text, row in zip(texts, wanted, strict=True):
        hits = search(index, text.numpy(), N, exact=True)
        assert [h.rank for h in hits] == list(range(1, N + 1))
        np.testing.assert_allclose([h.score for h in hits], [float(row[int(h.clip_id)]) for h in hits], atol=1e-5)
        assert sorted(h.clip_id for h in hits) == sorted(map(str, range(N)))
    if name != "maxsim":
        rows = pool.attention(frames, mask, texts[-1:])[:, 0].detach()
        for h in hits:
            wanted_row = rows[int(h.clip_id)][mask[int(h.clip_id)]]
            np.testing.assert_allclose(h.weights, wanted_row.numpy(), atol=1e-5)
    for h in hits:
        own = frames[int(h.clip_id)][mask[int(h.clip_id)]][:, None]
        alone = score_matrix(texts[-1:], own, torch.ones(len(own), 1, dtype=torch.bool), pool)[0].detach()
        np.testing.assert_allclose(h.alone, alone.numpy(), atol=1e-5)


def test_padding_that_is_attended_to_counts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pool, (frames, mask, texts) = pooling_of("tap", {"dp": 16, "key_mask": False}), gallery()
    model = _model(pool, "tap")
    save_run(tmp_path, model, [str(i) for i in range(N)], AudioFeatures(None, frames, mask), _told(N), 0.32)
    wanted = score_matrix(texts, frames, mask, pool)[0].detach()
    hits = search(load(tmp_path), texts[0].numpy(), N)
    np.testing.assert_allclose([h.score for h in hits], [float(wanted[int(h.clip_id)]) for h in hits], atol=1e-5)


def test_with_all_clips_for_candidates_it_is_the_scan(found: tuple[TextAwareIndex, torch.Tensor]) -> None:
    index, texts = found
    text = texts[0].numpy()
    for k in range(1, N + 2):
        assert search(index, text, k, candidates=N) == search(index, text, k, exact=True)


def test_candidates_are_the_likeliest_of_the_best_sketches(
    found: tuple[TextAwareIndex, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, texts = found
    for looked_at in (1, 3, 40):
        monkeypatch.setattr(text_aware, "LOOKED_AT", looked_at)
        for text in texts:
            coarse = text_aware.coarse_scores(index, text).numpy()
            every = {int(h.clip_id): h for h in search(index, text.numpy(), N, exact=True)}
            for n in (1, 7, N - 1):
                seen = np.sort(np.lexsort((np.arange(N), -coarse))[: n * looked_at])
                likely = text_aware._likely_scores(index, text, torch.from_numpy(seen)).numpy()
                best = seen[np.lexsort((seen, -likely))[:n]]
                hits = search(index, text.numpy(), n, candidates=n)
                assert {int(h.clip_id) for h in hits} == set(best.tolist())
                for h in hits:  # what it is found by does not change what a clip scores
                    assert (h.score, h.weights) == (every[int(h.clip_id)].score, every[int(h.clip_id)].weights)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_details_are_the_scores_but_for_rounding(
    name: str, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many directions as there are, what is left is the step of an int8."""
    torch.manual_seed(0)
    monkeypatch.setitem(globals(), "DIM", 16)
    pool, (frames, mask, texts) = pooling_of(name, options | ({"dp": 16} if "dp" in options else {})), gallery()
    index = indexed(tmp_path, pool, frames, mask)
    assert index.details.shape[1] == 32
    likely = text_aware._likely_scores(index, texts[0], torch.arange(N))
    wanted = score_matrix(texts[:1], frames, mask, pool).detach()[0]
    assert float(np.corrcoef(likely.numpy(), wanted.numpy())[0, 1]) > (0.99 if name == "maxsim" else 0.9)


def test_the_coarse_look_finds_an_event_that_a_mean_would_drown(tmp_path: Path) -> None:
    torch.manual_seed(0)
    n, dim = 600, 64
    texts = torch.nn.functional.normalize(torch.randn(12, dim), dim=1)
    frames = torch.randn(n, 31, dim) / dim**0.5
    frames[:12, 20:22] += 1.5 * texts[:, None]  # two frames of 31
    index = build([str(i) for i in range(n)], frames, POOLINGS["maxsim"](dim=dim), tmp_path)
    for i, text in enumerate(texts):
        (hit,) = search(index, text.numpy(), 1, candidates=6)
        assert hit.clip_id == str(i)
        assert hit.weights.index(max(hit.weights)) in (20, 21)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-100, 100), min_size=1, max_size=40))
def test_k_means_keeps_what_a_text_could_find(angles: list[int]) -> None:
    """Every frame's direction has a centroid near it: the farthest is no farther than with eight even sectors."""
    turned = torch.tensor(angles, dtype=torch.float32) * torch.pi / 100
    vectors = torch.stack([turned.cos(), turned.sin()], 1)
    centroids = text_aware._centroids(vectors)
    assert centroids.shape == (8, 2)
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(8))
    assert float((vectors @ centroids.T).max(1).values.min()) > np.cos(2 * np.pi / 8)


def test_twins_come_in_index_order_wherever_they_stand(tmp_path: Path) -> None:
    torch.manual_seed(1)
    frames, mask, texts = gallery()
    for i in (65, 11, 40, 3):
        frames[i], mask[i] = frames[3], mask[3]
    index = indexed(tmp_path, pooling_of("xpool", {}), frames, mask)
    hits = [h for h in search(index, texts[0].numpy(), N) if int(h.clip_id) in (3, 11, 40, 65)]
    assert [h.clip_id for h in hits] == ["3", "11", "40", "65"]
    assert len({h.score for h in hits}) == 1


def test_other_clips_do_not_change_a_score(found: tuple[TextAwareIndex, torch.Tensor], tmp_path: Path) -> None:
    index, texts = found
    order = torch.randperm(N)[:20].tolist()
    frames = [np.array(index.frames[int(index.starts[i]) : int(index.starts[i + 1])]) for i in order]
    # normed once already: a pooling whose norm is even gives them back to rounding, so take MaxSim's, which are exact
    few = build([str(i) for i in order], frames, POOLINGS["maxsim"](dim=DIM), tmp_path / "few")
    one = build([str(order[7])], frames[7:8], POOLINGS["maxsim"](dim=DIM), tmp_path / "one")
    text = texts[1].numpy()
    (alone,) = search(one, text, 1)
    (same,) = [h for h in search(few, text, 20) if h.clip_id == str(order[7])]
    assert (alone.score, alone.weights) == (same.score, same.weights)


def test_saved_whole_and_twice_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pool, (frames, mask, _) = pooling_of("xpool", {"dp": 12}), gallery()
    contents = []
    for _ in range(2):
        index = indexed(tmp_path / "deep", pool, frames, mask)
        verify(tmp_path / "deep")
        contents.append({p.name: p.read_bytes() for p in (tmp_path / "deep").iterdir()})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == sorted([*files.FILES, "index.json"])
    assert (len(index), index.dim, index.frame_s) == (N, DIM, 0.32)
    assert is_text_aware(tmp_path / "deep")
    for p in pool.parameters():
        assert p.requires_grad  # what was given is left as it was


def test_a_file_larger_than_the_memory_is_mapped(tmp_path: Path) -> None:
    rows = 1 << 30  # a terabyte, were it not all one hole
    with (tmp_path / "frames.npy").open("wb") as f:
        files.write_header(f, "<f4", (rows, 256))
        f.truncate(f.tell() + rows * 1024)
    found = text_aware._mapped(tmp_path / "frames.npy")
    assert found.shape == (rows, 256)
    assert not found[rows // 2].any()


def test_a_stop_in_between_leaves_no_index(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pool, (frames, mask, _) = pooling_of("tap", {}), gallery()
    indexed(tmp_path, pool, frames, mask)

    def broken():
        yield frames[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(["a", "b"], broken(), pool, tmp_path)
    with pytest.raises(DataError, match="no index here"):
        load(tmp_path)


def test_what_is_not_whole_is_refused(found: tuple[TextAwareIndex, torch.Tensor], tmp_path: Path) -> None:
    for name in files.FILES:
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match=f"{name} missing"):
            load(tmp_path)
        (tmp_path / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(DataError, match="changed since"):
            verify(tmp_path)
        (tmp_path / name).write_bytes(kept)
    np.save(tmp_path / "starts.npy", np.arange(9))
    with pytest.raises(DataError, match=r"starts\.npy: index\.json says \(71,\), found \(9,\)"):
        load(tmp_path)
    with pytest.raises(DataError, match="format 'text-aware 1'"):
        plain.load(tmp_path)
    plain.build(["a"], [[1.0, 0.0]]).save(tmp_path / "plain")
    assert not is_text_aware(tmp_path / "plain")
    with pytest.raises(DataError, match="format 1, this reads 'text-aware 1'"):
        load(tmp_path / "plain")


def test_clips_that_leave_are_gone_and_the_others_score_as_before(
    found: tuple[TextAwareIndex, torch.Tensor], tmp_path: Path
) -> None:
    index, texts = found
    text, gone = texts[0].numpy(), {"0", "5", "33", "69", "none"}
    before = {h.clip_id: h for h in search(index, text, N)}
    secret = np.array(index.frames[int(index.starts[33])]).tobytes()
    assert secret in (tmp_path / "frames.npy").read_bytes()
    assert (drop(tmp_path, gone), drop(tmp_path, gone)) == (4, 0)
    verify(tmp_path)
    assert secret not in (tmp_path / "frames.npy").read_bytes()
    after = {h.clip_id: h for h in search(load(tmp_path), text, N)}
    assert after.keys() == before.keys() - gone
    for clip_id, hit in after.items():
        assert (hit.score, hit.weights) == (before[clip_id].score, before[clip_id].weights)
    assert search(load(tmp_path), text, 5, candidates=5)
    (tmp_path / "index.json").unlink()  # killed in between
    assert drop(tmp_path, gone) == 0
    assert not list(tmp_path.iterdir())


def test_an_index_of_clips_that_all_leave_is_removed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    build(["a"], [torch.randn(3, DIM)], pooling_of("tap", {}), tmp_path)
    assert drop(tmp_path, ["a"]) == 1
    assert not list(tmp_path.iterdir())


ONES = [np.ones((3, DIM), np.float32)] * 2


@pytest.mark.parametrize(
    ("ids", "frames", "meta", "error", "says"),
    [
        (["a", "b"], ONES[:1], None, ConfigError, "frames of 1 clips for 2"),
        (["a"], ONES, None, ConfigError, "more clips than the 1"),
        ([], [], None, ConfigError, "no clips"),
        (["a", "a"], ONES, None, ConfigError, "clip a is given more than once"),
        (["a", "b"], [ONES[0], ONES[0][:0]], None, ConfigError, "of b, at least one, found"),
        (["a", "b"], [ONES[0][:, :5], ONES[0]], None, ConfigError, r"\(frame, 24\) of a"),
        (["a", "b"], [ONES[0], ONES[0] * np.nan], None, DataError, "frames of b are not finite"),
        (["a", "b"], ONES, pa.table({"x": [1]}), ConfigError, "1 rows for 2"),
    ],
)
def test_misuse_is_refused(ids, frames, meta, error, says, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        build(ids, frames, pooling_of("tap", {}), tmp_path, meta)
    assert not (tmp_path / "index.json").exists()


def test_a_pooling_that_needs_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Mean is not one of .* search\.index\.build"):
        build(["a", "b"], ONES, POOLINGS["mean"](dim=DIM), tmp_path)


@pytest.mark.usefixtures("unchecked")
def test_wrong_questions_are_refused(found: tuple[TextAwareIndex, torch.Tensor]) -> None:
    index, texts = found
    text = texts[0].numpy()
    for k in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="k must be a whole number"):
            search(index, text, k)
    with pytest.raises(ConfigError, match="candidates must be a whole number"):
        search(index, text, 1, candidates=0)
    with pytest.raises(ConfigError, match=r"shape \(23,\)"):
        search(index, text[1:])
    for bad in (text * 0, text * np.nan):
        with pytest.raises(DataError, match="no direction"):
            search(index, bad)


def _model(pool: torch.nn.Module, name: str) -> TextAudio:
    texts = StoredTexts(["a dog"], torch.ones(1, 5), "here")
    return TextAudio(StoredFrames(DIM), texts, pool, name, {"audio": DIM, "text": 5, "hidden": 8, "joint": DIM}).eval()


def _told(n: int) -> pa.Table:
    return pa.table({"captions": [["a dog barks"]] * n})


@pytest.mark.parametrize("name", ["mean", "netrvlad", "tap"])
def test_a_run_is_saved_as_its_pooling_needs(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, (frames, mask, texts) = _model(POOLINGS[name](dim=DIM).eval(), name), gallery()
    with torch.no_grad():
        audio = model.project(AudioFeatures(None, frames, mask))
        wanted = model.score(texts, audio)[0]
    save_run(tmp_path, model, [str(i) for i in range(N)], audio, _told(N), 0.32)
    assert is_text_aware(tmp_path) == (name == "tap")
    text = texts[0].numpy()
    hits = search(load(tmp_path), text, N) if name == "tap" else query.search(plain.load(tmp_path), text, N)
    np.testing.assert_allclose([h.score for h in hits], [float(wanted[int(h.clip_id)]) for h in hits], atol=1e-5)
    assert hits[0].captions == ("a dog barks",)


def test_a_strip_says_when() -> None:
    quarter = 0.07 * float(np.log(0.5))
    assert strip((-1.0, quarter, 0.0, 2 * quarter, 2 * quarter), 0.32) == "| ▄█▂▂| peak at 0.6 s"
    assert strip((1.0,), None) == "|█| peak at frame 0"


def test_the_command_prints_strips_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    frames, mask, texts = gallery()
    root = tmp_path / "index"
    indexed(root / "train" / "tap-20", pooling_of("tap", {}), frames, mask)
    plain.build(["v"], [[1.0, 0.0]]).save(root / "finetune" / "mf-20")
    plain.build(["w"], [[1.0, 0.0]]).save(root / "train" / "mf-20")
    monkeypatch.setattr(cli, "load", lambda *_: SimpleNamespace(evaluations=tmp_path))
    monkeypatch.setattr(cli, "_clip_text", lambda *_: np.array([1.0, 1.0]))
    monkeypatch.setattr(cli, "_run_text", lambda _, run, __: texts[0].numpy() if run == "tap-20" else np.ones(2))

    def asked(*args: str) -> str:
        result = CliRunner().invoke(cli.app, ["search", "a dog", *args], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    told = json.loads(asked("--run", "tap-20", "-k", "3", "--json"))
    assert [t["frame_s"] for t in told] == [0.32] * 3
    assert all(sum(t["weights"]) == pytest.approx(1) for t in told)
    shown = asked("--run", "tap-20", "-k", "3").splitlines()
    assert len(shown) == 6
    assert shown[1].strip() == strip(tuple(told[0]["alone"]), 0.32)
    assert json.loads(asked("--json"))[0] == {"clip_id": "v", "score": pytest.approx(0.5**0.5), "captions": []}
    assert "w" in asked("--run", "train/mf-20")
    with pytest.raises(ConfigError, match="finetune/mf-20, tap-20, train/mf-20"):
        asked("--run", "mf-20")
