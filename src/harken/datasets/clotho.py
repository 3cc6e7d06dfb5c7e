"""Clotho v2.1 (Drossos et al. 2020): Freesound recordings of 15 to 30 seconds with five captions each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from harken.clips import Clip, Source, Split, zenodo_id
from harken.datasets.card import Card, Dataset, OfficialFile
from harken.datasets.rows import header, opened, rows, wrong
from harken.errors import DataError

RECORD: Final = "4783391"
_COLUMNS: Final = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
_MD5: Final = {
    "clotho_audio_development.7z": "c8b05bc7acdb13895bb3c6a29608667e",
    "clotho_audio_validation.7z": "7dba730be08bada48bd15dc4e668df59",
    "clotho_audio_evaluation.7z": "4569624ccadf96223f19cb59fe4f849f",
    "clotho_captions_development.csv": "d4090b39ce9f2491908eebf4d5b09bae",
    "clotho_captions_validation.csv": "5879e023032b22a2c930aaa0528bead4",
    "clotho_captions_evaluation.csv": "1b16b9e57cf7bdb7f13a13802aeb57e2",
    "clotho_metadata_development.csv": "170d20935ecfdf161ce1bb154118cda5",
    "clotho_metadata_validation.csv": "2e010427c56b1ce6008b0f03f41048ce",
    "clotho_metadata_evaluation.csv": "13946f054d4e1bf48079813aac61bf77",
}
_N_CLIPS: Final = {"development": 3839, "validation": 1045, "evaluation": 1045}


def _file(name: str, md5: str) -> OfficialFile:
    split = name.partition(".")[0].rpartition("_")[2]
    url = f"https://zenodo.org/record/{RECORD}/files/{name}?download=1"
    return OfficialFile(name, url, split, _N_CLIPS[split] if name.endswith(".csv") else None, md5=md5)


CARD: Final = Card(
    name="clotho",
    title="Clotho v2.1",
    licence=(
        "Tampere University licence: non-commercial, with attribution (captions); each recording under its own Creative"
        " Commons licence, named in the metadata lists"
    ),
    citation="K. Drossos, S. Lipping, T. Virtanen. Clotho: An Audio Captioning Dataset. ICASSP 2020.",
    homepage=f"https://zenodo.org/record/{RECORD}",
    files=tuple(_file(name, md5) for name, md5 in _MD5.items()),
    splits={"development": Split.TRAIN, "validation": Split.VAL, "evaluation": Split.TEST},
)
# what a whole copy of the corpus consists of
ARCHIVES: Final = tuple(f for f in CARD.files if f.name.endswith(".7z"))
LISTS: Final = tuple(f for f in CARD.files if f.name.endswith(".csv"))


def read(path: Path, split: str) -> Iterator[Clip]:
    """The clips of a Clotho captions file: whole recordings, `end_s` None.

    Names are keys to the byte: some begin with a blank, have one before '.wav' or hold '&quot;', and none is ever
    changed.
    """
    archive = f"clotho_audio_{split}"
    lines: dict[str, int] = {}
    with opened(path) as file:
        found = rows(path, file)
        header(path, found, _COLUMNS)
        for line, row in found:
            if len(row) != len(_COLUMNS):
                raise wrong(path, line, f"{len(row)} columns ({','.join(row)[:80]!r})", f"6: {','.join(_COLUMNS)}")
            name, *captions = row
            if not name.lower().endswith(".wav") or "/" in name or "\\" in name or "\0" in name:
                raise wrong(path, line, f"the file name is {name[:60]!r}", "a plain name that ends in .wav")
            if name in lines:
                raise wrong(
                    path, line, f"the file name {name!r} was already on line {lines[name]}", "one row per recording"
                )
            lines[name] = line
            empty = next(
                (column for column, text in zip(_COLUMNS[1:], captions, strict=True) if not text.strip()), None
            )
            if empty:
                raise wrong(path, line, f"{empty} is empty", "five captions")
            source = Source("zenodo", name, archive)
            clip_id = zenodo_id(RECORD, archive, name)
            yield Clip(clip_id, CARD.name, CARD.splits[split], source, 0.0, None, tuple(captions))
    if not lines:
        raise DataError(f"{path}: no rows below the header. The copy is cut; get it again from {CARD.homepage}.")


CLOTHO: Final = Dataset(CARD, read)
