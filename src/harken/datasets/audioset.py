"""AudioSet (Gemmeke et al. 2017): ten-second clips of YouTube videos with labels from an ontology of 527 sounds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from harken.clips import Clip, Source, Split, youtube_id
from harken.datasets.card import Card, Dataset, OfficialFile
from harken.datasets.rows import VIDEO_ID, number, opened, rows, wrong
from harken.errors import DataError

_BASE: Final = "http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/"
_COUNT: Final = re.compile(r"(num_\w+)=(\d+)")
_LABELS: Final = re.compile(r"/[a-z]+/[0-9a-z_]+(?:,/[a-z]+/[0-9a-z_]+)*\Z")
_HEADER: Final = "# num_ytids=..., num_segs=..., num_unique_labels=..., num_positive_labels=..."
_COLUMNS: Final = 'YTID, start_seconds, end_seconds, "positive_labels"'

CARD: Final = Card(
    name="audioset",
    title="AudioSet",
    licence="CC BY 4.0 (lists and labels); the videos belong to their uploaders",
    citation=(
        "J. F. Gemmeke, D. P. W. Ellis, D. Freedman, A. Jansen, W. Lawrence, R. C. Moore, M. Plakal, M. Ritter. "
        "Audio Set: An ontology and human-labeled dataset for audio events. ICASSP 2017."
    ),
    homepage="https://research.google.com/audioset/",
    files=(
        OfficialFile(
            "unbalanced_train_segments.csv",
            _BASE + "unbalanced_train_segments.csv",
            "unbalanced_train",
            2_041_789,
            sha256="bb2dfd5e4f1ced39db9480633c510f813d7899f4b7472aa83a411b4a43a12698",
            md5="d8f6fc703acf288c405fc97a156d4b85",
        ),
        OfficialFile(
            "balanced_train_segments.csv",
            _BASE + "balanced_train_segments.csv",
            "balanced_train",
            22_160,
            sha256="3b83e5ff9ed72cfda37d4e36ce08250e107c1ea70f109f6ab6668ac200db5e94",
            md5="0ec13c62ec25d1148b9bf3390dee8bd7",
        ),
        OfficialFile(
            "eval_segments.csv",
            _BASE + "eval_segments.csv",
            "eval",
            20_371,
            sha256="f7055f53935f70e74e39494a5c8c4c78f1700fce275028bd36e31186f33d45db",
            md5="85e796902a4e6a0898980a55f86b55f3",
        ),
        OfficialFile(
            "class_labels_indices.csv",
            _BASE + "class_labels_indices.csv",
            n_rows=527,
            sha256="cdd1049833c4b86127c2773ac0d14a2754b6a6d0d1798002ed5c66e699708429",
            md5="68c0b5c199d6cc789852b144cc3ab500",
        ),
    ),
    splits={
        "unbalanced_train": Split.TRAIN,
        "unbalanced": Split.TRAIN,
        "balanced_train": Split.VAL,
        "balanced": Split.VAL,
        "eval": Split.TEST,
    },
)


def read(path: Path, split: str) -> Iterator[Clip]:
    """The clips of an AudioSet segments file.

    The header's counts are held against the rows, which shows a mirror that a spreadsheet has cut. Labels are in the
    file's order, as machine ids ('/m/09x0r').
    """
    part = CARD.splits[split]
    counts: dict[str, int] = {}
    ids: set[str] = set()
    n_clips = n_labels = line = 0
    with opened(path) as file:
        for line, row in rows(path, file, skip_blanks_after_comma=True):
            if row[0].startswith("#"):
                counts |= {name: int(n) for name, n in _COUNT.findall(", ".join(row))}
                continue
            if not counts:
                raise wrong(
                    path, line, f"the counts are missing before the first row {row[0][:40]!r}", f"a line '{_HEADER}'"
                )
            if len(row) != 4:
                raise wrong(path, line, f"{len(row)} columns ({','.join(row)[:80]!r})", f"4: {_COLUMNS}")
            key, start, end, labels = row
            if not VIDEO_ID.match(key):
                raise wrong(path, line, f"{key!r} is no YouTube id", "11 letters, digits, '-' or '_'")
            if not _LABELS.match(labels):
                raise wrong(
                    path, line, f"the labels are {labels[:60]!r}", 'quoted machine ids such as "/m/09x0r,/t/dd00088"'
                )
            start_s = number(path, line, "start_seconds", start, "30.000")
            end_s = number(path, line, "end_seconds", end, "40.000")
            if end_s <= start_s:
                raise wrong(path, line, f"the clip ends at {end} s and starts at {start} s", "an end after the start")
            if key in ids:
                raise wrong(path, line, f"the video {key} appears a second time", "one clip per video")
            ids.add(key)
            names = tuple(labels.split(","))
            n_clips += 1
            n_labels += len(names)
            yield Clip(
                youtube_id(key, start_s, end_s), CARD.name, part, Source("youtube", key), start_s, end_s, (), names
            )
    for name, found in (("num_segs", n_clips), ("num_ytids", len(ids)), ("num_positive_labels", n_labels)):
        if counts.get(name, found) != found:
            raise DataError(
                f"{path}:{line}: the header says {name}={counts[name]}, the rows hold {found}. The copy is cut or"
                f" changed; get the file of {CARD.homepage} itself."
            )
    if not counts:
        raise DataError(f"{path}: the file is empty; expected a line '{_HEADER}' and rows '{_COLUMNS}'.")


AUDIOSET: Final = Dataset(CARD, read)
