"""AudioCaps (Kim et al. 2019): captions for AudioSet clips, one in training and five in validation and test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from harken.clips import Clip, Source, Split, youtube_id
from harken.datasets.card import Card, Dataset, OfficialFile
from harken.datasets.rows import VIDEO_ID, header, number, opened, rows, wrong
from harken.errors import DataError

CLIP_S: Final = 10.0  # the lists have no end column; every clip is ten seconds by its authors' word
_COLUMNS: Final = ["audiocap_id", "youtube_id", "start_time", "caption"]
_BASE: Final = "https://raw.githubusercontent.com/cdjkim/audiocaps/d004db3ea1b01cf4fd0347dd8d27db90cadc8809/dataset/"

CARD: Final = Card(
    name="audiocaps",
    title="AudioCaps 1.0",
    licence="MIT (captions); for academic use only by its authors' word; the videos belong to their uploaders",
    citation=(
        "C. D. Kim, B. Kim, H. Lee, G. Kim. AudioCaps: Generating Captions for Audios in The Wild. NAACL-HLT 2019."
    ),
    homepage="https://github.com/cdjkim/audiocaps",
    files=(
        OfficialFile(
            "train.csv",
            _BASE + "train.csv",
            "train",
            49_838,
            sha256="c0c5223db682b3bf724ce7e7ce58d5b36929f74572e8526a7211f92d2eef7c8e",
        ),
        OfficialFile(
            "val.csv",
            _BASE + "val.csv",
            "val",
            2_475,
            sha256="dab1c96641d5f3053ddb99dca3949450da9a75737bda53e11cc0aa8b102be0c3",
        ),
        OfficialFile(
            "test.csv",
            _BASE + "test.csv",
            "test",
            4_875,
            sha256="b91c4b7ded2f4f6e7db5b9c4983dc1e1dca3d556f505b61e3fd65cac7e1c638a",
        ),
    ),
    splits={"train": Split.TRAIN, "val": Split.VAL, "test": Split.TEST},
)


def read(path: Path, split: str) -> Iterator[Clip]:
    """The clips of an AudioCaps list, read whole because a clip's captions need not be neighbours."""
    captions: dict[tuple[str, float], list[str]] = {}
    seen: dict[str, int] = {}
    with opened(path) as file:
        found = rows(path, file)
        header(path, found, _COLUMNS)
        for line, row in found:
            if len(row) != len(_COLUMNS):
                raise wrong(path, line, f"{len(row)} columns ({','.join(row)[:80]!r})", f"4: {','.join(_COLUMNS)}")
            number_, key, start, caption = row
            if not number_.isdecimal():
                raise wrong(path, line, f"audiocap_id is {number_!r}", "a whole number")
            if number_ in seen:
                raise wrong(path, line, f"audiocap_id {number_} was already on line {seen[number_]}", "one per caption")
            seen[number_] = line
            if not VIDEO_ID.match(key):
                raise wrong(path, line, f"{key!r} is no YouTube id", "11 letters, digits, '-' or '_'")
            if not caption.strip():
                raise wrong(path, line, "the caption is empty", "a sentence")
            captions.setdefault((key, number(path, line, "start_time", start, "30")), []).append(caption)
    if not captions:
        raise DataError(f"{path}: no rows below the header. The copy is cut; get it again from {CARD.homepage}.")
    for (key, start_s), texts in captions.items():
        end_s = start_s + CLIP_S
        source = Source("youtube", key)
        yield Clip(youtube_id(key, start_s, end_s), CARD.name, CARD.splits[split], source, start_s, end_s, tuple(texts))


AUDIOCAPS: Final = Dataset(CARD, read)
