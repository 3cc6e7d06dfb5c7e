"""CLIP embeds each image and caption once; equal clips have equal bytes; what changes the numbers makes them stale."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from harken.clips import Clip, Manifest, Source, Split
from harken.config import Paths
from harken.engines import inline, local
from harken.errors import ConfigError, DataError
from harken.media.images import jpeg, read_jpeg
from harken.models import clip, runtimes
from harken.shards import ShardWriter, digest_of, facts, ledger, read_shard, shard_path, shards_in
from harken.stages import embed
from harken.takedown import forget
from harken.training.data import CaptionEmbeddings, ImageEmbeddings
from harken.training.tasks import Captions

N_IMAGES, DIM = 3, 16
CFG = {"prompt": "", "batch": 64, "dtype": "float32", "precision": "float32", "runtime": "torch"}
SAID = {
    "a": ("a dog barks", "a dog is barking loudly"),
    "b": ("rain falls on a roof",),
    "sound_only": ("a dog barks",),
    "d": (),
    "e": ("wind",),
    "failed": ("a train",),
}


def pictures(clip_id: str) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(clip_id.encode()))
    return [rng.integers(0, 256, (32, 44, 3), np.uint8) for _ in range(N_IMAGES)]


def write_features(paths: Paths, shards: Iterable[Iterable[str]]) -> None:
    columns = {"images": pa.list_(pa.binary())}
    for shard, ids in enumerate(shards):
        with ShardWriter(
            paths.features, shard, fingerprint="f", columns=columns, meta={"n_images": str(N_IMAGES)}
        ) as out:
            for i in ids:
                if i == "failed":
                    out.skip(i, "media.corrupt")
                else:
                    out.write(i, images=None if i == "sound_only" else [jpeg(p, 95) for p in pictures(i)])


def tell(paths: Paths, **changed: Any) -> None:
    """weights.json, changed."""
    path = paths.weights / "weights.json"
    told = json.loads(path.read_text()) if path.is_file() else {"clip": {"load": "clip", "sha256": "0"}, "bert": {}}
    told["clip"] |= {k: v for k, v in changed.items() if k in told["clip"]}
    told["bert"] |= {k: v for k, v in changed.items() if k not in told["clip"]}
    path.write_text(json.dumps(told))


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(**{name: tmp_path / name for name in Paths.model_fields})
    clips = [Clip(i, "audiocaps", Split.TRAIN, Source("youtube", i), 0.0, 10.0, said) for i, said in SAID.items()]
    clips.append(Clip("b", "clotho", Split.TEST, Source("youtube", "b"), 0.0, 10.0, ("rain falls on a roof", "drops")))
    found.manifest.mkdir()
    pq.write_table(Manifest.build(clips, 2).table, found.manifest / "clips.parquet")
    write_features(found, (["a", "sound_only", "b"], ["failed", "d", "e"]))
    vocabulary = clip.Vocabulary.of((t for said in SAID.values() for t in said), 16)
    config = clip.small_config(
        vocab_size=vocabulary.size, image_size=32, width=32, layers=1, embed_dim=DIM, text_width=32, text_layers=1,
        context_length=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        clip.save(found.weights / "clip", clip._towers(clip.build(config), vocabulary, config))
    tell(found, sha256="5d99")
    return found


def run(paths: Paths, engine: Any = inline, **changed: Any) -> None:
    embed.run(paths, embed.EmbedConfig.model_validate({**CFG, **changed}), engine)


class AskedError(Exception):
    """What a stage would have done."""


def asked(paths: Paths, **changed: Any) -> list[str]:
    """What a run would compute: nothing is."""

    def record(make: Any, cfg: Any, items: Iterable[Any], *, devices: Any = ()) -> Iterator[Any]:
        items = list(items)
        if items:
            raise AskedError([f"shard {i.number}" if isinstance(i, embed.Shard) else "captions" for i in items])
        return iter(())

    try:
        run(paths, record, **changed)
    except AskedError as e:
        return list(e.args[0])
    return []


ALL = ["shard 0", "shard 1", "captions"]


def images_of(paths: Paths) -> dict[str, np.ndarray]:
    rows = [r for s in shards_in(paths.embeddings) for r in read_shard(paths.embeddings, s, ["images"])]
    return {r["clip_id"]: np.array(r["images"]) for r in rows}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_image_and_caption_is_embedded_as_clip_does(paths: Paths, dtype: str) -> None:
    run(paths, dtype=dtype, prompt="the sound of ")
    towers = clip.load(paths.weights / "clip")
    images, captions = ImageEmbeddings(paths.embeddings), CaptionEmbeddings(paths.embeddings)
    assert [i in images for i in ("a", "b", "d", "e", "sound_only", "failed")] == [True] * 4 + [False] * 2
    for i in ("e", "a"):
        stored = [read_jpeg(jpeg(p, 95)) for p in pictures(i)]
        true = clip.image_embeddings(towers, stored).numpy().astype(dtype).astype(np.float32)
        assert np.array_equal(images.of([i])[0].numpy(), true)
    assert images.of(["b", "a", "b"]).shape == (3, N_IMAGES, DIM)
    said = Captions.build([("a", SAID["a"]), ("b", SAID["b"]), ("sound_only", SAID["sound_only"])])
    found = captions.of(said, "audiocaps", "train").numpy()
    true = clip.text_embeddings(towers, [f"the sound of {t}" for t in said.texts]).numpy().astype(dtype)
    assert np.array_equal(found, true.astype(np.float32))


def test_what_lies_on_the_disk(paths: Paths) -> None:
    run(paths)
    schema = pq.read_schema(shard_path(paths.embeddings, 0))
    kind = schema.field("images").type
    assert (kind.list_size, kind.value_type.list_size, kind.value_type.value_type) == (N_IMAGES, DIM, pa.float32())
    told = facts(paths.embeddings, 0)
    expected = {"model": "small", "weights": "5d99", "preprocessing": clip.PREPROCESSING, "precision": "float32"}
    expected |= {"runtime": runtimes.version("torch"), "image_size": "32", "dim": str(DIM), "n_images": str(N_IMAGES)}
    assert {k: told[k] for k in expected} == expected
    assert "bicubic" in told["preprocessing"]
    table = pq.read_table(paths.embeddings / "captions.parquet")
    assert table["caption"].to_pylist() == [
        "a dog barks", "a dog is barking loudly", "rain falls on a roof", "a dog barks", "wind",
        "rain falls on a roof", "drops",
    ]  # fmt: skip
    assert table.schema.field("embedding").type.list_size == DIM
    told = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    told = {k.removeprefix("harken."): v for k, v in told.items()}
    assert told["prompt"] == "" and told["weights"] == "5d99"  # noqa: PT018
    assert {"model", "precision", "runtime", "dim", "fingerprint"} <= set(told)


def test_each_caption_is_computed_once(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    embeddings = clip.text_embeddings

    def counting(encoder: Any, captions: Any, **more: Any) -> Any:
        texts.extend(captions)
        return embeddings(encoder, captions, **more)

    monkeypatch.setattr(clip, "text_embeddings", counting)
    monkeypatch.setattr(embed, "TEXTS", 2)
    run(paths)
    assert sorted(texts) == ["a dog barks", "a dog is barking loudly", "drops", "rain falls on a roof", "wind"]
    rows = pq.read_table(paths.embeddings / "captions.parquet").to_pylist()
    by_text = {r["caption"]: r["embedding"] for r in rows}
    assert all(r["embedding"] == by_text[r["caption"]] for r in rows)


def test_the_same_clip_has_the_same_bytes_whatever_the_batch_and_the_neighbours(paths: Paths) -> None:
    run(paths, batch=1)
    first, captions = images_of(paths), (paths.embeddings / "captions.parquet").read_bytes()
    digest = digest_of(paths.embeddings)
    assert asked(paths, batch=64) == []  # it is no part of what they are
    for file in (paths.work / "embed").iterdir():
        file.unlink()
    run(paths, batch=64)
    assert digest_of(paths.embeddings) == digest
    assert (paths.embeddings / "captions.parquet").read_bytes() == captions
    write_features(paths, (["e"], ["b", "d", "a"]))
    run(paths)
    again = images_of(paths)
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[i], again[i]) for i in first)


@pytest.mark.slow  # four stages in processes of their own; extract does the same by default
@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_one_worker_or_two_the_same_files(paths: Paths, monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="it comes with the extra `cpu`")
    monkeypatch.setenv("HARKEN_DEVICE", "cpu")
    written = []
    for engine, workers in ((inline, "1"), (local, "2")):
        monkeypatch.setenv("HARKEN_WORKERS", workers)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in every stage
        work = paths.model_copy(update={"work": paths.work / workers, "embeddings": paths.embeddings / workers})
        run(work, engine, runtime=runtime)
        torch.set_num_threads(threads)
        written.append({p.name: p.read_bytes() for p in work.embeddings.iterdir()})
    assert written[0] == written[1]
    assert sorted(written[0]) == ["00000.parquet", "00001.parquet", "captions.parquet"]


def test_what_is_there_is_not_computed_again(paths: Paths) -> None:
    assert asked(paths) == ALL
    run(paths)
    assert asked(paths) == []
    run(paths)  # and is published all the same


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({"sha256": "5d98"}, ALL),
        ({"load": "ViT-B-32-quickgelu/openai"}, ALL),
        ({"dtype": "float16"}, ALL),
        ({"precision": "bfloat16"}, ALL),
        ({"version": "torch 2.99.0"}, ALL),
        ({"preprocessing": "another"}, ALL),
        ({"code": "another"}, ALL),
        ({"prompt": "the sound of "}, ["captions"]),
        ({"features": (["b", "sound_only", "a"], ["failed", "d", "e"])}, ["shard 0"]),
        ({"source": "another BERT"}, []),
        ({"batch": 1}, []),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_changes_the_numbers_makes_them_stale(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], stale: list[str]
) -> None:
    run(paths)
    (key, value), *_ = change.items()
    if key in ("sha256", "load", "source"):
        tell(paths, **change)
    elif key == "version":
        monkeypatch.setattr(runtimes, "version", lambda runtime: value)
    elif key == "preprocessing":
        monkeypatch.setattr(clip, "PREPROCESSING", value)
    elif key == "code":
        monkeypatch.setattr(embed, "code_version", lambda modules: value)
    elif key == "features":
        write_features(paths, value)
    assert asked(paths, **({key: value} if key in CFG else {})) == stale


def test_another_runtime_makes_them_stale(paths: Paths) -> None:
    pytest.importorskip("openvino", reason="it comes with the extra `cpu`")
    run(paths)
    assert asked(paths, runtime="openvino") == ALL


@pytest.mark.slow
def test_openvino_embeds_the_same_to_rounding(paths: Paths) -> None:
    pytest.importorskip("openvino", reason="it comes with the extra `cpu`")
    run(paths)
    plain = images_of(paths)
    run(paths, runtime="openvino")
    assert facts(paths.embeddings, 0)["runtime"].startswith("openvino 20")
    for i, found in images_of(paths).items():
        np.testing.assert_allclose(found, plain[i], atol=1e-5)


def test_a_missing_runtime_is_said_before_anything_is_done(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.metadata.version",
        lambda name: (_ for _ in ()).throw(runtimes.importlib.metadata.PackageNotFoundError),
    )
    with pytest.raises(ConfigError, match=r"harken\[cpu\]"):
        run(paths, runtime="openvino")
    assert not paths.embeddings.exists()


def test_no_weights_and_broken_images_say_so(paths: Paths) -> None:
    with ShardWriter(
        paths.features, 1, fingerprint="f", columns={"images": pa.list_(pa.binary())}, meta={"n_images": "3"}
    ) as out:
        out.write("e", images=[b"no JPEG"] * 3)
    with pytest.raises(DataError, match="should be a JPEG"):
        run(paths)
    (paths.weights / "weights.json").unlink()
    with pytest.raises(DataError, match="no weights"):
        run(paths)


def test_a_corpus_without_captions_has_a_table_of_none(paths: Paths) -> None:
    write_features(paths, (["d"], ["failed"]))
    run(paths)
    table = pq.read_table(paths.embeddings / "captions.parquet")
    assert table.num_rows == 0
    assert table.schema.field("embedding").type.list_size == DIM
    assert "d" in ImageEmbeddings(paths.embeddings)


def test_readers_leave_out_what_failed_and_refuse_what_does_not_fit(paths: Paths) -> None:
    columns = {"images": pa.list_(pa.list_(pa.float32(), 2), 2)}
    with ShardWriter(paths.embeddings, 0, fingerprint="e", columns=columns) as out:
        out.write("x", images=np.arange(4, dtype=np.float32).reshape(2, 2))
        out.skip("y", "media.corrupt")
        out.write("z", images=np.arange(4, 8, dtype=np.float32).reshape(2, 2))
    found = ImageEmbeddings(paths.embeddings)
    assert "y" not in found
    assert found.of(["z", "x"]).tolist() == [[[4, 5], [6, 7]], [[0, 1], [2, 3]]]
    assert len(ledger(paths.embeddings)) == 3
    columns = {"images": pa.list_(pa.list_(pa.float32(), 3), 2)}
    with ShardWriter(paths.embeddings, 1, fingerprint="e", columns=columns) as out:
        out.write("w", images=np.zeros((2, 3)))
    with pytest.raises(DataError, match=r"00001\.parquet: float32 \(2, 3\) for each clip, float32 \(2, 2\) in"):
        ImageEmbeddings(paths.embeddings)


def test_a_caption_without_an_embedding_is_named(paths: Paths) -> None:
    run(paths)
    said = Captions.build([("a", ("a dog barks", "a cat"))])
    with pytest.raises(DataError, match=r"1 captions of audiocaps train have no embedding, the first 'a cat'"):
        CaptionEmbeddings(paths.embeddings).of(said, "audiocaps", "train")
    with pytest.raises(DataError, match="no caption embeddings"):
        CaptionEmbeddings(paths.features)


def test_a_clip_that_is_taken_down_leaves_the_others_as_they_are(paths: Paths) -> None:
    run(paths)
    before = images_of(paths)
    report = forget(["a"], paths, who="the uploader", why="made private", now_ms=1)
    assert report.unproven == ()
    after = images_of(paths)
    assert after.keys() == before.keys() - {"a"}
    assert all(np.array_equal(after[i], before[i]) for i in after)
    images = ImageEmbeddings(paths.embeddings)
    assert "a" not in images
    assert np.array_equal(images.of(["b", "e"]).numpy(), np.stack([before["b"], before["e"]]))
    assert "a" not in pq.read_table(paths.embeddings / "captions.parquet")["clip_id"].to_pylist()
