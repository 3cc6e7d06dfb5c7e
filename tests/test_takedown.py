"""A clip that is taken down is nowhere any more, everything else is as it was, and no stop in between matters."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from harken import attempts, takedown
from harken.clips import Clip, Manifest, Source, Split, youtube_id, zenodo_id
from harken.config import Paths
from harken.errors import ConfigError, DataError
from harken.media.reasons import POLICIES
from harken.models.pooling import POOLINGS
from harken.search import index, text_aware
from harken.shards import ShardWriter, digest_of, facts, ledger, publish, read_shard, read_table, shard_path
from harken.stages.download import COLUMNS as MEDIA
from harken.takedown import FORGOTTEN, MESSAGE, Forgotten, forget, forgotten, read_tombstones, tombstones

NOW_MS = 1_790_000_000_000
VIDEOS = ["-leading_da", "_under_scor", "two_clips__", "two_clips__", "stays_here_", "denied_here", "no_pictures"]
RECORDING = "Ambience, &amp; birds.wav"
FEATURES = {"images": pa.list_(pa.binary()), "image_times_s": pa.list_(pa.float64()), "duration_s": pa.float64()}
DENSE = {"fbank": (4, "float16"), "logmel": (3, "float32")}


def clips() -> list[Clip]:
    found = []
    for i, key in enumerate(VIDEOS):
        start_s = 10.0 * i
        source = Source("youtube", key)
        words = (f"caption of {key} {i}",)
        times = start_s, start_s + 10
        found.append(Clip(youtube_id(key, *times), "audiocaps", Split.TRAIN, source, *times, words))
    archive = "clotho_audio_development"
    source = Source("zenodo", RECORDING, archive)
    found.append(Clip(zenodo_id("1", archive, RECORDING), "clotho", Split.TRAIN, source, 0.0, None, ("a caption",)))
    return found


CLIPS = clips()
IDS = [c.id for c in CLIPS]
DASH, UNDER, TWO_A, TWO_B, STAYS, DENIED, BLIND, CLOTHO = IDS


def mark_of(clip_id: str, what: str) -> bytes:
    """Bytes that stand in one place only: what is left of a clip is found by them."""
    return hashlib.blake2b(f"{clip_id} {what}".encode(), digest_size=64).digest()


def dense_of(clip_id: str, name: str) -> np.ndarray:
    width, dtype = DENSE[name]
    rng = np.random.default_rng(int.from_bytes(mark_of(clip_id, name)[:4], "big"))
    return rng.normal(size=(20, width)).astype(dtype)


def vectors_of(clip_id: str, dtype: str) -> np.ndarray:
    rng = np.random.default_rng(int.from_bytes(mark_of(clip_id, "vectors")[:4], "big"))
    return rng.normal(size=(2, 8)).astype(dtype)


class Corpus:
    """Folders as the stages leave them, small. `without` is what they would be had those clips never been had."""

    def __init__(self, root: Path, without: frozenset[str] = frozenset(), dtype: str = "float16") -> None:
        self.without, self.dtype = without, dtype
        names = (n for n in Paths.model_fields)
        self.paths = Paths(**{n: root / n for n in names})
        self.manifest = Manifest.build(CLIPS, 2)
        self.paths.manifest.mkdir(parents=True)
        pq.write_table(self.manifest.table, self.paths.manifest / "clips.parquet")
        for shard in self.manifest.shards:
            here = self.manifest.requested(shard)
            self._media(shard, here)
            there = [c for c in here if c.id not in without and c.id != DENIED]
            self._features(shard, there)
            self._embeddings(shard, [c for c in there if c.id != BLIND])
        self._captions()
        self._index()
        for name, stage in (("media", "download"), ("features", "extract"), ("embeddings", "embed")):
            work = self.paths.work / stage
            publish(work, getattr(self.paths, name), [p.name for p in work.iterdir() if p.is_file()])
        shutil.copytree(
            self.paths.work / "evaluate" / "finetune.a.0123" / "index",
            self.paths.evaluations / "index" / "finetune" / "a",
            copy_function=os.link,
        )

    def _media(self, shard: int, here: list[Clip]) -> None:
        with ShardWriter(
            self.paths.work / "download", shard, fingerprint="m", columns=MEDIA, meta={"asked": "a"}, rows_per_group=2
        ) as out:
            for c in here:
                if c.id in self.without:
                    out.skip(c.id, FORGOTTEN, MESSAGE)
                elif c.id == DENIED:
                    out.skip(c.id, "denied.geo", "not in your country")
                else:
                    media = mark_of(c.id, "media")
                    out.write(c.id, media=media, container="mp4", start_s=0.25, end_s=10.25, has_images=c.id != BLIND)

    def _features(self, shard: int, here: list[Clip]) -> None:
        meta = {"n_images": "2", "fbank": "as it was"}
        work = self.paths.work / "extract"
        with ShardWriter(
            work, shard, fingerprint="f", columns=FEATURES, arrays=DENSE, meta=meta, rows_per_group=2
        ) as out:
            for c in here:
                images = None if c.id == BLIND else [mark_of(c.id, "jpeg 0"), mark_of(c.id, "jpeg 1")]
                times = None if c.id == BLIND else [0.0, 10 / 3]
                dense = {n: dense_of(c.id, n) for n in DENSE}
                out.write(c.id, images=images, image_times_s=times, duration_s=10.0, **dense)

    def _embeddings(self, shard: int, here: list[Clip]) -> None:
        element = pa.float16() if self.dtype == "float16" else pa.float32()
        columns = {"images": pa.list_(pa.list_(element, 8), 2)}
        with ShardWriter(self.paths.work / "embed", shard, fingerprint="e", columns=columns) as out:
            for c in here:
                out.write(c.id, images=list(vectors_of(c.id, self.dtype)))

    def _captions(self) -> None:
        rows = [
            {"dataset": c.dataset, "split": "train", "clip_id": c.id, "caption": c.captions[0], "embedding": [0.5] * 4}
            for c in CLIPS
            if c.id not in self.without
        ]
        schema = pa.schema(
            [(n, pa.string()) for n in ("dataset", "split", "clip_id", "caption")]
            + [("embedding", pa.list_(pa.float32(), 4))],
            {b"harken.fingerprint": b"c", b"harken.prompt": b""},
        )
        table = pa.Table.from_pylist(rows, schema)
        path = self.paths.work / "embed" / "captions.parquet"
        pq.write_table(table, path, compression="lz4", use_dictionary=["dataset", "split"], write_statistics=False)

    def _index(self) -> None:
        ids = [c.id for c in CLIPS if c.id not in self.without] or [CLIPS[0].id]
        rows = np.stack([dense_of(i, "logmel")[0] for i in ids])
        told = pa.array([[f"caption of {i}"] for i in ids], pa.list_(pa.string()))
        index.build(ids, rows, pa.table({"captions": told})).save(
            self.paths.work / "evaluate" / "finetune.a.0123" / "index"
        )

    def spool(self, clip_id: str) -> Path:
        name = hashlib.sha1(clip_id.encode()).hexdigest()
        path = self.paths.work / "download" / "spool" / "00001" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}\n" + mark_of(clip_id, "media"))
        return path

    def unpack(self) -> Path:
        path = self.paths.work / "archives" / "clotho_audio_development" / "development" / RECORDING
        path.parent.mkdir(parents=True)
        path.write_bytes(mark_of(CLOTHO, "media"))
        path.with_name("stays.wav").write_bytes(b"another")
        (self.paths.work / "archives" / "clotho_audio_development.7z").write_bytes(mark_of(CLOTHO, "media"))
        return path

    def files(self, *below: str) -> dict[str, bytes]:
        """Every file of the corpus' data, by its place."""
        root = self.paths.work.parent
        skip = ("ledger", "manifest")
        found = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix != ".lock")
        return {
            p.relative_to(root).as_posix(): p.read_bytes()
            for p in found
            if p.relative_to(root).parts[0] not in skip and (not below or p.relative_to(root).parts[0] in below)
        }


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path / "corpus")


def take_down(corpus: Corpus, *ids: str, now_ms: int = NOW_MS) -> Forgotten:
    return forget(ids, corpus.paths, who="the uploader", why="made private", now_ms=now_ms)


def traces(corpus: Corpus, clip_id: str) -> list[str]:
    """The files, below all folders but the ledger and the manifest, in which something of the clip is left."""
    caption = next(c.captions[0] for c in CLIPS if c.id == clip_id)
    marks = [mark_of(clip_id, w) for w in ("media", "jpeg 0", "jpeg 1")] + [caption.encode()]
    marks += [dense_of(clip_id, n).tobytes() for n in DENSE] + [f"caption of {clip_id}".encode()]
    unit = dense_of(clip_id, "logmel")[0] / np.linalg.norm(dense_of(clip_id, "logmel")[0].astype(np.float64))
    marks.append(unit.astype(np.float32).tobytes())
    left = [name for name, data in corpus.files().items() if any(m in data for m in marks)]
    for folder in (corpus.paths.embeddings, corpus.paths.work / "embed"):
        left += [str(folder) for t in [read_table(folder)] if clip_id in t["clip_id"].to_pylist()]
    return left


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("asked", [(DASH,), (TWO_A, STAYS), ("two_clips__",), (BLIND, DENIED), (CLOTHO,), tuple(IDS)])
def test_what_is_left_is_as_if_the_clip_had_never_been_had(tmp_path: Path, asked: tuple[str, ...], dtype: str) -> None:
    gone = frozenset(c.id for c in CLIPS if c.id in asked or c.source.key in asked)
    corpus, expected = Corpus(tmp_path / "is", dtype=dtype), Corpus(tmp_path / "should_be", gone, dtype=dtype)
    assert all(traces(corpus, i) for i in gone)
    report = take_down(corpus, *asked)
    assert set(report.clip_ids) == set(report.new) == gone == tombstones(corpus.paths.ledger)
    assert report.unproven == ()
    assert not [t for i in gone for t in traces(corpus, i)]
    for name in ("media", "features", "embeddings"):
        assert digest_of(getattr(corpus.paths, name)) == digest_of(getattr(expected.paths, name))
    if len(gone) < len(IDS):
        assert corpus.files() == expected.files()  # to the byte: the same row groups, headers and facts


def test_every_other_clip_keeps_all_it_had(corpus: Corpus) -> None:
    take_down(corpus, TWO_B, DASH)
    outcomes = {r["clip_id"]: (r["status"], r["reason"], r["message"]) for r in ledger(corpus.paths.media).to_pylist()}
    assert set(outcomes) == set(IDS)
    assert outcomes[TWO_B] == outcomes[DASH] == ("failed", FORGOTTEN, MESSAGE)
    assert outcomes[DENIED] == ("failed", "denied.geo", "not in your country")
    there = {i for i, (status, *_) in outcomes.items() if status == "ok"}
    assert there == set(IDS) - {TWO_B, DASH, DENIED}
    for shard in corpus.manifest.shards:
        for row in read_shard(corpus.paths.features, shard, ["images"]):
            assert row["images"] == (
                None if row["clip_id"] == BLIND else [mark_of(row["clip_id"], f"jpeg {k}") for k in (0, 1)]
            )
        assert facts(corpus.paths.features, shard)["fbank"] == "as it was"
        assert facts(corpus.paths.media, shard) | {"digest": ""} == {"asked": "a", "fingerprint": "m", "digest": ""}


def test_nothing_is_changed_where_it_lies(corpus: Corpus, tmp_path: Path) -> None:
    """DVC's cache holds the same inodes: its files must stay what their hashes say."""
    cache = tmp_path / "cache"
    shutil.copytree(corpus.paths.work.parent, cache, copy_function=os.link)
    before = {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    take_down(corpus, *IDS)
    assert {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()} == before


def test_only_shards_that_hold_the_clip_are_written(corpus: Corpus) -> None:
    shard = next(s for s in corpus.manifest.shards if DASH in [c.id for c in corpus.manifest.requested(s)])
    other = next(s for s in corpus.manifest.shards if s != shard)
    before = {f: shard_path(f, other).stat().st_ino for f in (corpus.paths.media, corpus.paths.work / "extract")}
    report = take_down(corpus, DASH)
    assert {f: shard_path(f, other).stat().st_ino for f in before} == before
    assert report.removed[str(corpus.paths.media)] == report.removed[str(corpus.paths.work / "download")] == 1


def test_what_a_text_aware_run_kept_is_cleared(corpus: Corpus) -> None:
    paths, ids = corpus.paths, [c.id for c in CLIPS if c.id != DENIED]
    arrays = {"frames": (8, "float32")}
    kept = paths.work / "train-frames" / "cnn14.audiocaps"
    frames = {i: np.frombuffer(mark_of(i, "frames") * 4, np.uint8).astype(np.float32).reshape(-1, 8) for i in ids}
    with ShardWriter(kept, 0, fingerprint="t", columns={}, arrays=arrays) as out:
        for i in ids:
            out.write(i, frames=frames[i])
    folder = paths.evaluations / "index" / "train" / "tap-20"
    pooling = POOLINGS["tap"](dim=8, dp=4).eval()
    text_aware.build(ids, (torch.from_numpy(f) for f in frames.values()), pooling, folder)
    before = {h.clip_id: h.score for h in text_aware.search(text_aware.load(folder), np.ones(8), len(ids), exact=True)}
    take_down(corpus, DASH)
    assert DASH in before
    assert DASH not in read_table(kept)["clip_id"].to_pylist()
    assert not any(frames[DASH].tobytes() in p.read_bytes() for p in kept.rglob("*") if p.is_file())
    after = {h.clip_id: h.score for h in text_aware.search(text_aware.load(folder), np.ones(8), len(ids), exact=True)}
    assert after == {i: s for i, s in before.items() if i != DASH}


def test_spool_and_archives_are_cleared(corpus: Corpus) -> None:
    spooled, kept = corpus.spool(DASH), corpus.spool(STAYS)
    unpacked = corpus.unpack()
    report = take_down(corpus, DASH, CLOTHO)
    assert not spooled.exists()
    assert kept.exists()
    assert not unpacked.exists()
    assert unpacked.with_name("stays.wav").exists()
    assert not (corpus.paths.work / "archives" / "clotho_audio_development.7z").exists()
    assert report.removed["spool"] == 1
    assert not traces(corpus, DASH) + traces(corpus, CLOTHO)


def test_asking_twice_changes_nothing(corpus: Corpus) -> None:
    take_down(corpus, "two_clips__")
    before = corpus.files(), (corpus.paths.ledger / takedown.FILE).read_bytes()
    again = take_down(corpus, "two_clips__", TWO_A, now_ms=NOW_MS + 5)
    assert (again.new, again.removed) == ((), {})
    assert set(again.clip_ids) == {TWO_A, TWO_B}
    assert (corpus.files(), (corpus.paths.ledger / takedown.FILE).read_bytes()) == before
    shutil.rmtree(corpus.paths.manifest)  # the list may have changed since
    assert set(take_down(corpus, "two_clips__").clip_ids) == {TWO_A, TWO_B}


def test_who_asked_and_why_is_kept(corpus: Corpus) -> None:
    take_down(corpus, DASH)
    (stone,) = read_tombstones(corpus.paths.ledger)
    assert (stone.asked, stone.clip_id, stone.key) == (DASH, DASH, "-leading_da")
    assert (stone.who, stone.why, stone.when_ms) == ("the uploader", "made private", NOW_MS)


def test_a_whole_video_stays_away_whatever_a_later_list_cuts_of_it(corpus: Corpus) -> None:
    take_down(corpus, "two_clips__", DASH)
    later = [youtube_id("two_clips__", 77, 87), youtube_id("-leading_da", 77, 87), DASH]
    assert forgotten(corpus.paths.ledger, later) == {later[0], DASH}
    assert forgotten(corpus.paths.work / "none", later) == set() == tombstones(corpus.paths.work / "none")


def test_a_clip_that_no_list_has_any_more_is_found_in_the_shards(corpus: Corpus) -> None:
    pq.write_table(Manifest.build(CLIPS[:1], 2).table, corpus.paths.manifest / "clips.parquet")
    report = take_down(corpus, "stays_here_", CLOTHO)
    assert set(report.clip_ids) == {STAYS, CLOTHO}
    assert not traces(corpus, STAYS) + traces(corpus, CLOTHO)


def test_attempts_stay_and_get_an_event(corpus: Corpus) -> None:
    take_down(corpus, "two_clips__")
    take_down(corpus, "two_clips__", now_ms=NOW_MS + 1)
    take_down(corpus, DASH, now_ms=NOW_MS + 2)
    assert attempts.seal(corpus.paths.ledger, keep=set()) == 2
    take_down(corpus, DASH, STAYS, now_ms=NOW_MS + 2)
    events = attempts.read(corpus.paths.ledger).to_pylist()
    assert sorted((e["clip_id"], e["reason"]) for e in events) == sorted(
        (i, FORGOTTEN) for i in (TWO_A, TWO_B, DASH, STAYS)
    )
    assert {json.loads(e["facts"])["why"] for e in events} == {"made private"}


def test_the_event_is_one_that_the_ledger_understands(corpus: Corpus) -> None:
    take_down(corpus, DASH)
    state = attempts.fold(attempts.read(corpus.paths.ledger), POLICIES, NOW_MS + 1)
    assert state["clip_id"].tolist() == [DASH]
    assert state["reason"].tolist() == [FORGOTTEN]


@pytest.mark.parametrize(
    ("asked", "guess"),
    [
        ("two_clips_-", "two_clips__"),
        ("-leading_db", "-leading_da"),
        (DASH[:-1] + "7", DASH),
        ("nothing like it", None),
    ],
)
def test_an_unknown_id_is_refused_before_anything_is_changed(corpus: Corpus, asked: str, guess: str | None) -> None:
    before = corpus.files()
    with pytest.raises(ConfigError, match="Nothing was changed") as e:
        take_down(corpus, STAYS, asked)
    assert (f"Did you mean {guess!r}?" in str(e.value)) == (guess is not None)
    assert corpus.files() == before
    assert tombstones(corpus.paths.ledger) == set()


@pytest.mark.parametrize(("ids", "who", "why"), [((), "me", "so"), ((DASH,), " ", "so"), ((DASH,), "me", "")])
def test_a_request_without_who_and_why_is_none(corpus: Corpus, ids: tuple[str, ...], who: str, why: str) -> None:
    with pytest.raises(ConfigError, match="--why"):
        forget(ids, corpus.paths, who=who, why=why, now_ms=NOW_MS)


def test_a_running_stage_is_not_disturbed(corpus: Corpus) -> None:
    before = corpus.files()
    with open(corpus.paths.work / "extract.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"extract\.lock"):
            take_down(corpus, DASH)
    assert corpus.files() == before
    take_down(corpus, DASH)


def test_a_damaged_tombstone_is_no_permission(corpus: Corpus) -> None:
    take_down(corpus, DASH)
    path = corpus.paths.ledger / takedown.FILE
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"tombstones\.jsonl:1"):
        tombstones(corpus.paths.ledger)


def test_a_shard_with_a_wrong_digest_is_cleared_all_the_same_and_named(corpus: Corpus) -> None:
    shard = next(s for s in corpus.manifest.shards if DASH in [c.id for c in corpus.manifest.requested(s)])
    path = shard_path(corpus.paths.features, shard).with_suffix(".fbank.npy")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(bytes(data))
    report = take_down(corpus, DASH)
    assert report.unproven == (str(shard_path(corpus.paths.features, shard)),)
    assert not traces(corpus, DASH)


KILLED = """
    import os, signal, sys
    from harken import shards, takedown
    from harken.config import Paths

    left = int(sys.argv[1])

    def die():
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(owner, name):
        original = getattr(owner, name)
        def called(*args, **kwargs):
            die()
            return original(*args, **kwargs)
        setattr(owner, name, called)

    from pathlib import Path
    for name in ("replace", "unlink"):
        before(Path, name)
    paths = Paths.model_validate_json(sys.argv[2])
    takedown.forget(sys.argv[3:], paths, who="the uploader", why="made private", now_ms=1790000000000)
    print(left)
"""


def run_until(corpus: Corpus, step: int, *ids: str) -> int | None:
    """Kill a takedown before its `step`th change of a file; None then, else how many steps it had left."""
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(step), corpus.paths.model_dump_json(), *ids]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode == 0:
        return int(done.stdout)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return None


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Any]:
    def make(name: str) -> Corpus:
        corpus = Corpus(tmp_path / name)
        corpus.spool(DASH)
        return corpus

    return make


def assert_finished(corpus: Corpus, gone: set[str]) -> None:
    assert tombstones(corpus.paths.ledger) == gone
    assert not [t for i in gone for t in traces(corpus, i)]
    assert not list(corpus.paths.work.parent.rglob("*.tmp"))
    for folder in (corpus.paths.media, corpus.paths.features, corpus.paths.embeddings):
        for shard in takedown._shards(folder):  # what is there is whole and true
            stored = takedown._Stored(folder, shard)
            assert facts(folder, shard)["digest"] in {
                stored.digest(r) for r in (takedown._as_python, takedown._as_vectors)
            }


@pytest.mark.slow
def test_a_takedown_that_is_killed_is_finished_by_the_next(fresh: Any) -> None:
    total = 10_000 - (run_until(fresh("whole"), 10_000, DASH, TWO_A) or 0)
    assert total > 30
    middle = np.random.default_rng(5).choice(np.arange(4, total - 1), 2, replace=False).tolist()
    for step in (0, *middle, total - 1):
        corpus = fresh(f"killed-{step}")
        assert run_until(corpus, step, DASH, TWO_A) is None
        gone = {DASH, TWO_A}
        if step:  # any next takedown finishes it
            take_down(corpus, STAYS)
            gone.add(STAYS)
        take_down(corpus, DASH, TWO_A)
        assert_finished(corpus, gone)


@pytest.mark.slow
def test_a_takedown_may_be_killed_before_any_change(fresh: Any) -> None:
    total = 10_000 - (run_until(fresh("whole"), 10_000, DASH, TWO_A) or 0)
    for step in range(total):
        corpus = fresh(f"killed-{step}")
        run_until(corpus, step, DASH, TWO_A)
        take_down(corpus, DASH, TWO_A)
        assert_finished(corpus, {DASH, TWO_A})
