from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from harken.clips import Clip, Source, Split, youtube_id, zenodo_id
from harken.datasets import DATASETS
from harken.errors import ConfigError, DataError

AUDIOSET = """\
# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=4, num_segs=4, num_unique_labels=3, num_positive_labels=5
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
_abc-def_gh, 239.800, 249.800, "/m/09x0r"
0123456789a, 0.000, 3.000, "/m/0jbk"
-0000000000, 590.000, 600.000, "/m/0jbk"
"""
AUDIOCAPS = (
    "audiocap_id,youtube_id,start_time,caption\r\n"
    '1,vfY_TJq7n_U,130,"Rustling occurs, ducks quack"\r\n'
    "2,-dWHV3X25Qs,60,An audience cheers\r\n"
    "3,vfY_TJq7n_U,130,Ducks quack \r\n"
    '4,-dWHV3X25Qs,60,"A crowd says ""hey"" in a caf\u00e9"\r\n'
)
CLOTHO = (
    "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\r\n"
    ' Ambience Birds.wav,a,b,c,d,"e, f"\r\n'
    '"Bells, #2 &quot;x&quot; .wav",a , b,c,d,e\r\n'
)
LISTS = {"audioset": (AUDIOSET, "balanced_train"), "audiocaps": (AUDIOCAPS, "val"), "clotho": (CLOTHO, "development")}


def _read(folder: Path, name: str, text: str, split: str) -> list[Clip]:
    path = folder / "list.csv"
    path.write_bytes(text.encode())
    return list(DATASETS[name].clips(path, split=split))


def _refusal(folder: Path, name: str, text: str) -> str:
    with pytest.raises(DataError) as e:
        _read(folder, name, text, LISTS[name][1])
    assert str(folder / "list.csv") in str(e.value)
    return str(e.value)


def test_audioset(tmp_path: Path) -> None:
    clips = _read(tmp_path, "audioset", AUDIOSET, "balanced_train")
    assert clips[0] == Clip(
        "yt:--PJHxphWEs:30000-40000",
        "audioset",
        Split.VAL,
        Source("youtube", "--PJHxphWEs"),
        30.0,
        40.0,
        (),
        ("/m/09x0r", "/t/dd00088"),
    )
    assert [c.source.key for c in clips] == ["--PJHxphWEs", "_abc-def_gh", "0123456789a", "-0000000000"]
    assert clips[1].id == youtube_id("_abc-def_gh", 239.8, 249.8)
    assert clips[2].end_s == 3.0


def test_audiocaps_groups_captions_in_order_of_first_appearance(tmp_path: Path) -> None:
    first, second = _read(tmp_path, "audiocaps", AUDIOCAPS, "test")
    assert first.captions == ("Rustling occurs, ducks quack", "Ducks quack ")
    assert second.captions == ("An audience cheers", 'A crowd says "hey" in a caf\u00e9')
    assert (first.start_s, first.end_s, first.split) == (130.0, 140.0, Split.TEST)
    assert second.source == Source("youtube", "-dWHV3X25Qs")
    assert first.id == "yt:vfY_TJq7n_U:130000-140000"  # the id that AudioSet's row of the same clip has


def test_clotho_never_changes_a_name(tmp_path: Path) -> None:
    first, second = _read(tmp_path, "clotho", CLOTHO, "evaluation")
    assert first.source == Source("zenodo", " Ambience Birds.wav", "clotho_audio_evaluation")
    assert second.source.key == "Bells, #2 &quot;x&quot; .wav"
    assert second.captions == ("a ", " b", "c", "d", "e")
    assert (first.start_s, first.end_s, first.split) == (0.0, None, Split.TEST)
    assert first.id == zenodo_id("4783391", "clotho_audio_evaluation", " Ambience Birds.wav")


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_laws_of_every_dataset(tmp_path: Path, name: str) -> None:
    text, _ = LISTS[name]
    dataset = DATASETS[name]
    card = dataset.card
    assert card.name == name
    assert card.licence
    assert card.citation
    assert card.homepage.startswith("https://")
    assert set(card.splits.values()) == set(Split)
    assert all(f.url.startswith(("https://", "http://")) and f.name for f in card.files)
    assert all(len(f.sha256) in (0, 64) and len(f.md5) in (0, 32) and (f.sha256 or f.md5) for f in card.files)
    assert {f.split for f in card.files if f.split} <= set(card.splits)
    by_part = {split: _read(tmp_path, name, text, split) for split in (*card.splits, *map(str, Split), *Split)}
    for split, part in card.splits.items():
        assert {c.split for c in by_part[split]} == {part}
    for part in Split:
        assert {c.split for c in by_part[part]} == {part}
    clips = by_part["train"]
    assert len({c.id for c in clips}) == len(clips)
    assert all(c.dataset == name and (c.end_s is None or c.end_s > c.start_s >= 0) for c in clips)
    # the same clips from a packed list, from the other line ends, and with a byte order mark
    packed = tmp_path / "list.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert list(dataset.clips(packed, split="train")) == clips
    assert list(dataset.clips(str(packed), split="train")) == clips
    turned = text.replace("\r\n", "\n") if "\r\n" in text else text.replace("\n", "\r\n")
    assert _read(tmp_path, name, turned, "train") == clips
    assert _read(tmp_path, name, "\ufeff" + text, "train") == clips


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_what_is_wrong_with_the_file_itself(tmp_path: Path, name: str) -> None:
    text, split = LISTS[name]
    with pytest.raises(ConfigError, match="Did you mean 'train'"):
        DATASETS[name].clips(tmp_path / "none", split="trian")
    with pytest.raises(DataError, match="no such file"):
        list(DATASETS[name].clips(tmp_path / "none", split=split))
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress((text * 50).encode())[:-20])
    with pytest.raises(DataError):
        list(DATASETS[name].clips(cut, split=split))
    latin = tmp_path / "latin.csv"
    latin.write_bytes(text.replace("a", "\u00e4").encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(DATASETS[name].clips(latin, split=split))
    for other, (wrong, _) in LISTS.items():
        if other != name:
            assert ":1: " in _refusal(tmp_path, name, wrong)
    _refusal(tmp_path, name, "")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("num_segs=4", "num_segs=5", "num_segs=5, the rows hold 4"),
        ("num_ytids=4", "num_ytids=5", "num_ytids=5, the rows hold 4"),
        ("num_positive_labels=5", "num_positive_labels=6", "num_positive_labels=6, the rows hold 5"),
        ('-0000000000, 590.000, 600.000, "/m/0jbk"\n', "", "num_segs=4, the rows hold 3"),
        ('"/m/09x0r,/t/dd00088"', "/m/09x0r,/t/dd00088", ":4: 5 columns"),
        ("--PJHxphWEs, 30.000", "30.000", ":4: 3 columns"),
        ("--PJHxphWEs", "-PJHxphWEs", ":4: '-PJHxphWEs' is no YouTube id"),
        ("_abc-def_gh", "0123456789a", ":6: the video 0123456789a appears a second time"),
        ("30.000", "thirty", ":4: start_seconds is 'thirty'; expected seconds such as 30.000"),
        ("30.000", "nan", ":4: start_seconds is 'nan'"),
        ("30.000", "-1", ":4: start_seconds is '-1'"),
        ("40.000", "inf", ":4: end_seconds is 'inf'"),
        ("40.000", "20.000", "an end after the start"),
        ('"/m/0jbk"', '"Speech"', ":6: the labels are 'Speech'"),
        ('"/m/0jbk"', '"/m/0jbk', "CSV"),
        ("# num_ytids=4, num_segs=4, num_unique_labels=3, num_positive_labels=5\n", "", "the counts are missing"),
    ],
)
def test_audioset_rows_that_are_wrong(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in AUDIOSET
    assert said in _refusal(tmp_path, "audioset", AUDIOSET.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("audiocap_id,youtube_id,start_time,caption", "audiocap_id,youtube_id,caption", ":1: the header should read"),
        ('"Rustling occurs, ducks quack"', "Rustling occurs, ducks quack", ":2: 5 columns"),
        ("1,vfY", "vfY", ":2: 3 columns"),
        ("vfY_TJq7n_U,130", "vfY_TJq7n,130", ":2: 'vfY_TJq7n' is no YouTube id"),
        ("vfY_TJq7n_U,130", "YvfY_TJq7n_U.wav,130", "is no YouTube id"),
        (",130,", ",,", ":2: start_time is ''"),
        ("1,vfY", "x,vfY", ":2: audiocap_id is 'x'"),
        ("3,vfY", "1,vfY", ":4: audiocap_id 1 was already on line 2"),
        ("An audience cheers", " ", ":3: the caption is empty"),
        ('"A crowd', "A crowd", ""),
    ],
)
def test_audiocaps_rows_that_are_wrong(tmp_path: Path, old: str, new: str, said: str) -> None:
    if said:
        assert old in AUDIOCAPS
        assert said in _refusal(tmp_path, "audiocaps", AUDIOCAPS.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("caption_5", "caption_6", ":1: the header should read"),
        ('"e, f"', "e, f", ":2: 7 columns"),
        (",d,e\r\n", ",d\r\n", ":3: 5 columns"),
        (",d,e\r\n", ",d,\r\n", ":3: caption_5 is empty"),
        (" Ambience Birds.wav", "", ":2: the file name is ''"),
        (" Ambience Birds.wav", "../x.wav", ":2: the file name is '../x.wav'"),
        (" Ambience Birds.wav", '"Bells, #2 &quot;x&quot; .wav"', ":3: the file name"),
    ],
)
def test_clotho_rows_that_are_wrong(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in CLOTHO
    assert said in _refusal(tmp_path, "clotho", CLOTHO.replace(old, new, 1))


def test_a_spreadsheet_s_copy_of_audioset_is_refused(tmp_path: Path) -> None:
    text = "\r\n".join(line.replace('"', "") + ",,,,," for line in AUDIOSET.splitlines())
    assert ":4: 10 columns" in _refusal(tmp_path, "audioset", text)
