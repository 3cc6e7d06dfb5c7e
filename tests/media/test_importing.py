"""Other tools' folders: every name is read for the one thing it can mean, or listed with why it cannot be used."""

from __future__ import annotations

import os
import string
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harken.clips import Clip, Manifest, Source, Split, youtube_id, zenodo_id
from harken.errors import ClipError, DataError
from harken.media import importing
from harken.media.folder import FolderFetcher
from harken.media.importing import Found, Holdings, describe, import_, read_name, scan

IDS = st.text(string.ascii_letters + string.digits + "_-", min_size=11, max_size=11)
SECONDS = st.integers(0, 40_000)


def seen(told: Found | str) -> tuple[str, float | None, float | None, str]:
    assert isinstance(told, Found), told
    return told.key, told.start_s, told.end_s, told.layout


@given(IDS, SECONDS, st.integers(1, 60), st.sampled_from(["", "Dog, barking/", "development/"]))
def test_an_id_is_its_eleven_characters_whatever_they_are(key: str, start: int, length: int, folder: str) -> None:
    end = start + length
    assert seen(read_name(f"{folder}{key}.wav")) == (key, None, None, "video_id")
    assert seen(read_name(f"{folder}{key}_{start}.flac")) == (key, start, None, "video_id_start")
    # audioset-download writes the floats that pandas reads
    assert seen(read_name(f"{folder}{key}_{start}.0-{end}.0.ogg")) == (key, start, end, "start_end")
    assert seen(read_name(f"{folder}{key}_{start}_{end}.mp4")) == (key, start, end, "start_end")
    assert seen(read_name(f"{folder}{key}_{start}000_{end}000.flac")) == (key, start, end, "start_end")
    assert seen(read_name(f"{folder}{key}.p0.mp3")) == (key, None, None, "vip_ant")
    assert seen(read_name(f"{folder}Y{key}.wav")) == (key, None, None, "panns")
    assert seen(read_name(f"{folder}Y{key}_{start}.wav")) == (key, start, None, "video_id_start")
    assert isinstance(read_name(f"{folder}{key}.n1.mp3"), str)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("clip/abcdefghijk.n0.mp4", "background"),
        ("train_audio/abcdefghijk_30000.wav", "label's onset"),
        ("eval_audio/_bcdefghij-_0.wav", "label's onset"),
        ("Dog/abcdefghijk_40.0-30.0.wav", "ends before it starts"),
        ("abcdefghijk_30_30.wav", "ends before it starts"),
        ("abcdefghijk_100_400.wav", "longer than any clip"),
        ("abcdefghijk_30-130.wav", "longer than any clip"),
    ],
)
def test_what_a_name_cannot_mean_is_not_guessed(path: str, why: str) -> None:
    told = read_name(path)
    assert isinstance(told, str)
    assert why in told


@pytest.mark.parametrize("name", ["abcdefghijk.f137.mp4", "abcdefghij.wav", " Ambience Birds.wav", "a b_30.wav"])
def test_what_no_layout_explains_is_only_its_exact_name(name: str) -> None:
    assert seen(read_name(f"some/{name}")) == (name, None, None, "exact_name")


def clip(key: str, start_s: float, end_s: float, dataset: str = "audioset", split: Split = Split.TRAIN) -> Clip:
    return Clip(youtube_id(key, start_s, end_s), dataset, split, Source("youtube", key), start_s, end_s)


def clotho(name: str, part: str = "development") -> Clip:
    archive = f"clotho_audio_{part}"
    source = Source("zenodo", name, archive)
    return Clip(zenodo_id("4783391", archive, name), "clotho", Split.TRAIN, source, 0.0, None, ("a sound",))


def touch(root: Path, *paths: str, size: int = 1) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x" * size)


def test_a_scan_lists_everything_and_follows_no_link_out(tmp_path: Path) -> None:
    lab, other = tmp_path / "lab", tmp_path / "other"
    touch(other, "secretsecrt.wav")
    touch(lab, "Dog/abcdefghijk.wav", "Dog/._abcdefghijk.wav", "a.json", "Dog/x.jpg", "-------_---.MP4")
    (lab / "evilevilevi.wav").symlink_to(other / "secretsecrt.wav")
    (lab / "up").symlink_to(other)
    (lab / "loop").symlink_to(lab)
    (lab / "innerinneri.wav").symlink_to(lab / "Dog" / "abcdefghijk.wav")
    (lab / "danglingdan.wav").symlink_to(lab / "none.wav")
    os.mkfifo(lab / "fifofifofif.wav")
    Path(os.fsdecode(os.fsencode(lab) + b"/\xff\xfeabcdefghi.wav")).write_bytes(b"")
    found = scan(lab)
    assert [f.path for f in found.found()] == ["-------_---.MP4", "Dog/abcdefghijk.wav", "innerinneri.wav"]
    why = dict(zip(found.table["path"].to_pylist(), found.table["why"].to_pylist(), strict=True))
    assert why["evilevilevi.wav"] == "a link that leaves the folder"
    assert why["danglingdan.wav"] == why["fifofifofif.wav"] == "not a file, or a link to nothing"
    assert why["\\xff\\xfeabcdefghi.wav"] == "the name is not UTF-8"
    assert found.n_other == {"linked folder": 2, "hidden": 1, ".json": 1, ".jpg": 1}
    with pytest.raises(DataError, match="no such folder"):
        scan(tmp_path / "none")


def test_a_link_to_a_longer_name_of_the_folder_leaves_it(tmp_path: Path) -> None:
    touch(tmp_path, "lab2/abcdefghijk.wav", "lab/keepkeepkee.wav")
    (tmp_path / "lab" / "sidesidesid.wav").symlink_to(tmp_path / "lab2" / "abcdefghijk.wav")
    assert [f.key for f in scan(tmp_path / "lab").found()] == ["keepkeepkee"]


MANIFEST = Manifest.build(
    [
        clip("_labels____", 30, 40),
        clip("-whole_vid-", 30, 40),
        clip("fraction___", 239.8, 249.8),
        clip("vip-ant_one", 5, 15, "audioset", Split.TEST),
        clip("two_of_one_", 0, 10),
        clip("two_of_one_", 20, 30),
        clip("gonegonegon", 0, 10),
        clip("_labels____", 30, 40, "audiocaps"),
        clotho(" Ambience Birds.wav"),
        clotho("rain_loop_1.wav"),
        clotho("same.wav", "development"),
        clotho("same.wav", "validation"),
    ],
    4,
)


@pytest.fixture
def peers(tmp_path: Path) -> Path:
    root = tmp_path / "lab"
    touch(
        root,
        "Dog/_labels_____30.0-40.0.ogg",  # audioset-download: a copy for each label
        "Animal/_labels_____30.0-40.0.ogg",
        "AUDIOCAPS/audio_32000Hz/train/_labels_____30.flac",
        "data/all_0_35000/video/-whole_vid-.mp4",
        "data/all_0_35000/audio/vip-ant_one.p0.mp3",
        "data/all_0_35000/audio/vip-ant_one.n0.mp3",
        "data/all_0_35000/audio/two_of_one_.p0.mp3",
        "data/all_0_35000/frame/vip-ant_one.p0.4.4_01.jpg",
        "fraction____239.flac",  # aac-datasets cuts at the whole second: not the same ten seconds
        "elsewhere__.mp4",
        "CLOTHO_v2.1/clotho_audio_files/development/ Ambience Birds.wav",
        "CLOTHO_v2.1/clotho_audio_files/development/same.wav",
        "CLOTHO_v2.1/clotho_audio_files/development/stripped.wav",
        "rain_loop_1.wav",
    )
    return root


def test_an_import_counts_clips_leftovers_and_duplicates(peers: Path, tmp_path: Path) -> None:
    result = import_(peers, MANIFEST, tmp_path / "index", needs_images=["audioset"])
    counts = {(s["dataset"], s["split"]): (s["n_clips"], s["n_matched"], s["n_with_pictures"]) for s in result.splits}
    assert counts == {
        ("audioset", "train"): (6, 2, 1),
        ("audioset", "test"): (1, 1, 0),
        ("audiocaps", "train"): (1, 1, 0),
        ("clotho", "train"): (4, 3, 0),
    }
    unmatched = pq.read_table(tmp_path / "index" / "unmatched.parquet").to_pylist()
    assert {r["path"].rpartition("/")[2]: r["why"] for r in unmatched} == {
        "vip-ant_one.n0.mp3": "a stretch before or after the clip (audioset-dl's background)",
        "two_of_one_.p0.mp3": "several clips of its video are listed, and the name does not say which it is",
        "fraction____239.flac": "another stretch of a video that is listed",
        "elsewhere__.mp4": "no clip of the manifest has this name",
        "stripped.wav": "no clip of the manifest has this name",
    }
    duplicates = pq.read_table(tmp_path / "index" / "duplicates.parquet").to_pylist()
    kept = f"{peers}/AUDIOCAPS/audio_32000Hz/train/_labels_____30.flac"
    assert [(d["kept"], d["why"]) for d in duplicates] == [(kept, "is of a preferred container")] * 2
    missing = pq.read_table(tmp_path / "index" / "missing.parquet").to_pylist()
    assert {m["clip_id"] for m in missing if m["dataset"] == "audioset"} == {
        "yt:fraction___:239800-249800",
        "yt:gonegonegon:0-10000",
        "yt:two_of_one_:0-10000",
        "yt:two_of_one_:20000-30000",
    }
    assert result.n_files == 13
    assert result.n_used == 6
    assert result.n_other == {".jpg": 1}
    assert any("audiocaps train: 1 of 1 clips" in line for line in describe(result))


def test_the_index_and_the_folder_itself_give_the_same_files(peers: Path, tmp_path: Path) -> None:
    import_(peers, MANIFEST, tmp_path / "index", needs_images=["audioset"])
    indexed, listed = Holdings.of(tmp_path / "index"), Holdings.of(peers)
    clips = [c for s in MANIFEST.shards for c in MANIFEST.requested(s)]
    told = {c.id: indexed.best(c, True) for c in clips}
    assert {i: t[0].name for i, t in told.items() if t} == {
        "yt:_labels____:30000-40000": "_labels_____30.flac",
        "yt:-whole_vid-:30000-40000": "-whole_vid-.mp4",
        "yt:vip-ant_one:5000-15000": "vip-ant_one.p0.mp3",
        clotho(" Ambience Birds.wav").id: " Ambience Birds.wav",
        clotho("rain_loop_1.wav").id: "rain_loop_1.wav",
        clotho("same.wav").id: "same.wav",
    }
    assert told["yt:-whole_vid-:30000-40000"] == (peers / "data/all_0_35000/video/-whole_vid-.mp4", False)
    for c in clips:
        if c.source.key != "two_of_one_":  # only the manifest knows that it has two
            assert listed.best(c, True) == told[c.id]


def test_which_of_several_files_is_read(tmp_path: Path) -> None:
    key = "several_of_"
    wanted = clip(key, 30, 40)

    def best(*paths: str, pictures: bool = False, empty: str = "") -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        touch(root, *paths)
        if empty:
            (root / empty).write_bytes(b"")
        found = Holdings.of(root).best(wanted, pictures)
        assert found is not None
        return found[0].name

    assert best(f"{key}.mp4", f"{key}_30.flac") == f"{key}_30.flac"
    assert best(f"{key}.mp4", f"{key}_30.flac", pictures=True) == f"{key}.mp4"
    assert best(f"{key}.wav", f"{key}_30.flac", pictures=True) == f"{key}_30.flac"
    assert best(f"Y{key}.wav", f"{key}.wav") == f"Y{key}.wav"
    assert best(f"{key}_30.wav", f"{key}_30.flac", empty=f"{key}_30.wav") == f"{key}_30.flac"
    assert best(f"b/{key}_30.mp3", f"a/{key}_30-40.mp3") == f"{key}_30-40.mp3"
    assert best(f"{key}_30-45.wav", f"{key}_30-35.wav") == f"{key}_30-45.wav"
    assert Holdings.of(tmp_path / "0").best(clip(key, 20, 30), False) == (tmp_path / "0" / f"{key}.mp4", False)


def test_folders_add_up_and_one_that_is_imported_again_replaces_itself(tmp_path: Path) -> None:
    touch(tmp_path, "one/_labels____.mp4", "two/Y_labels____.wav", "two/-whole_vid-.mp4", "two/gonegonegon.wav")
    into = tmp_path / "index"
    import_(tmp_path / "one", MANIFEST, into)
    both = import_(tmp_path / "two", MANIFEST, into)
    assert (both.n_files, both.n_used) == (4, 3)
    assert both.n_duplicates == {"fits better by its name": 1}
    (tmp_path / "two" / "gonegonegon.wav").unlink()
    again = import_(tmp_path / "two", MANIFEST, into)
    assert (again.n_files, again.n_used) == (3, 2)
    first = (into / importing.INDEX).read_bytes()
    import_(tmp_path / "two", MANIFEST, into)
    assert (into / importing.INDEX).read_bytes() == first
    fewer = Manifest.build([clip("-whole_vid-", 30, 40)], 4)
    assert import_(tmp_path / "two", fewer, into).n_used == 1
    assert import_(tmp_path / "two", MANIFEST, into).n_used == 2, "an old verdict outlived its manifest"


def test_an_index_may_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    touch(tmp_path, "lab/_labels____.mp4")
    into = tmp_path / "index"
    import_(tmp_path / "lab", MANIFEST, into)
    table = pq.read_table(into / importing.INDEX)
    for bad in ("../../x/_labels____.mp4", "/etc/passwd", "a/..", "a/../b.wav"):
        rows = table.to_pylist()
        rows[0]["path"] = bad
        pq.write_table(table.from_pylist(rows, table.schema), into / importing.INDEX)
        with pytest.raises(DataError, match="leaves its folder"):
            FolderFetcher(into)
    pq.write_table(table.drop_columns(["why"]), into / importing.INDEX)
    with pytest.raises(DataError, match="Run `harken import` again"):
        FolderFetcher(into)


def test_a_disk_that_is_not_there_is_not_so_many_missing_clips(tmp_path: Path) -> None:
    touch(tmp_path, "lab/_labels____.mp4")
    import_(tmp_path / "lab", MANIFEST, tmp_path / "index")
    (tmp_path / "lab").rename(tmp_path / "away")
    with pytest.raises(DataError, match="mounted"):
        FolderFetcher(tmp_path / "index")
    with pytest.raises(DataError, match="no such folder"):
        import_(tmp_path / "lab", MANIFEST, tmp_path / "index")
    touch(tmp_path, "empty/readme.txt")
    with pytest.raises(DataError, match="no sound or video file"):
        import_(tmp_path / "empty", MANIFEST, tmp_path / "index")


def test_clips_are_read_in_place_from_every_layout(tmp_path: Path, lab: Any) -> None:
    ready = lab.make(seconds=2.0)
    root = tmp_path / "lab"
    clips = {
        "Dog/_audioset_d_30.0-32.0.mp4": clip("_audioset_d", 30, 32),
        "clip/-vip_ant_-_.p0.mp4": clip("-vip_ant_-_", 70, 72),
        "Ypanns_mei_1.mp4": clip("panns_mei_1", 5, 7),
        "AUDIOCAPS/audio_32000Hz/test/aac_dataset_10.mp4": clip("aac_dataset", 10, 12),
        "whole/whole_video.mp4": clip("whole_video", 0, 2),
    }
    for path in clips:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(ready)
    manifest = Manifest.build(clips.values(), 2)
    result = import_(root, manifest, tmp_path / "index")
    assert result.n_used == len(clips)
    for at in (root, tmp_path / "index"):
        fetcher = FolderFetcher(at)
        for c in clips.values():
            section = fetcher.fetch(c, True)
            assert section.end_s - section.start_s == pytest.approx(2.0)
    (root / "Ypanns_mei_1.mp4").unlink()
    with pytest.raises(ClipError) as e:
        fetcher.fetch(clips["Ypanns_mei_1.mp4"], True)
    assert e.value.reason == "folder.absent"


def test_a_cut_clip_that_is_short_is_said_to_be_short(tmp_path: Path, lab: Any) -> None:
    (tmp_path / "Ytoo_short_1.mp4").write_bytes(lab.make(seconds=2.0))
    with pytest.raises(ClipError) as e:
        FolderFetcher(tmp_path).fetch(clip("too_short_1", 30, 40), True)
    assert e.value.reason == "qc.short"  # by its id alone it would be a video that ends before the clip


def test_a_hundred_thousand_files_are_matched_in_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 100_000
    rng = np.random.default_rng(3)
    letters = np.array(list(string.ascii_letters + string.digits + "-_"))
    keys = sorted({"".join(k) for k in rng.choice(letters, (n, 11))})
    rows = [(f"{k[:1]}/{k}_{i % 500}.flac", i % 500) for i, k in enumerate(keys)]

    def walk(folder: Path, other: Any) -> Any:
        for path, start in rows:
            yield path, path[2:13], "", float(start), None, 9, 9, "video_id_start", ""

    monkeypatch.setattr(importing, "_walk", walk)
    clips = (clip(k, i % 500, i % 500 + 10) for i, k in enumerate(keys) if i % 2)
    result = import_(tmp_path, Manifest.build(clips, 64), tmp_path / "index")
    assert result.n_used == len(keys) // 2
    holdings = Holdings(importing.read_index(tmp_path / "index"))
    for i in (1, 4001, 99_001):
        assert holdings.best(clip(keys[i], i % 500, i % 500 + 10), False) == (tmp_path.resolve() / rows[i][0], True)
