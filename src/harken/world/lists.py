"""The corpus's lists in the official formats of AudioSet, AudioCaps and Clotho v2.1, with their real quirks.

The quirks are the point: `, ` between AudioSet's fields, CRLF in AudioCaps and in two of Clotho's three lists, captions
of one clip far apart, file names with leading blanks and HTML entities, ISO-8859-1 in Clotho's metadata.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from harken.world.classes import CLASSES, NAMES
from harken.world.records import Record
from harken.world.sounds import RATE_HZ

AUDIOSET_LISTS = ("unbalanced_train", "balanced_train", "eval")
AUDIOCAPS_LISTS = ("train", "val", "test")
CLOTHO_LISTS = ("development", "validation", "evaluation")
_CLOTHO_EOL = {"development": "\r\n", "validation": "\r\n", "evaluation": "\n"}
_MAKERS = ("Jörg Müller", "field_recordist", "Zoë", "klangfänger", "Élodie R.", "anonymous")
_LICENCES = (
    "http://creativecommons.org/licenses/by/3.0/",
    "http://creativecommons.org/publicdomain/zero/1.0/",
    "http://creativecommons.org/licenses/by-nc/3.0/",
)


def clotho_name(labels: tuple[str, ...], i: int, rng: np.random.Generator) -> str:
    """A file name as Clotho has them, unique by its number. Every ninth form is an odd one."""
    words = [CLASSES[n].noun for n in labels]
    number = f"{int(rng.integers(100, 1000))}{i:03d}"
    forms = (
        "{0} {n}.wav",
        "{n}_{0}.wav",
        " {0} in the morning {n}.wav",  # a leading blank
        "{0}, then something, {n}.wav",
        "{0} {n} .wav",  # a blank before the dot
        "{n}__{0}&amp;{1}.wav",  # HTML entities are part of the name
        "&quot;{0}&quot; {n}#2.wav",
        "{0}  and  {1}; {n}!.wav",  # two blanks
        "Someone&#39;s {0} {n}..WAV.wav",
    )
    return forms[i % len(forms)].format(words[0], words[-1], n=number)


def write_lists(records: Iterable[Record], out: Path) -> None:
    """Write out/audioset, out/audiocaps and out/clotho: every list, whether its recordings can be had or not."""
    records = list(records)
    for folder in ("audioset", "audiocaps", "clotho"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    _write(out / "audioset" / "class_labels_indices.csv", _class_labels())
    for name in AUDIOSET_LISTS:
        rows = sorted((r for r in records if r.audioset == name), key=lambda r: r.key)
        _write(out / "audioset" / f"{name}_segments.csv", _audioset(rows))
    first_id = 1
    for name in AUDIOCAPS_LISTS:
        rows = [r for r in records if r.audiocaps == name]
        _write(out / "audiocaps" / f"{name}.csv", _audiocaps(rows, first_id))
        first_id += sum(len(r.captions) for r in rows)
    for name in CLOTHO_LISTS:
        rows = [r for r in records if r.clotho == name]
        _write(out / "clotho" / f"clotho_captions_{name}.csv", _clotho_captions(rows, _CLOTHO_EOL[name]))
        metadata = _clotho_metadata(rows, _CLOTHO_EOL[name])
        _write(out / "clotho" / f"clotho_metadata_{name}.csv", metadata, encoding="iso-8859-1")


def _write(path: Path, text: str, encoding: str = "utf-8") -> None:
    path.write_bytes(text.encode(encoding))  # bytes: the line ends are part of the format


def _class_labels() -> str:
    rows = [f'{i},{CLASSES[n].mid},"{CLASSES[n].display_name}"\n' for i, n in enumerate(NAMES)]
    return "index,mid,display_name\n" + "".join(rows)


def _audioset(rows: list[Record]) -> str:
    labels = [name for r in rows for name in r.labels]
    lines = [
        "# Segments csv created by harken.world",
        f"# num_ytids={len(rows)}, num_segs={len(rows)}, num_unique_labels={len(set(labels))}, "
        f"num_positive_labels={len(labels)}",
        "# YTID, start_seconds, end_seconds, positive_labels",
    ]
    for r in rows:
        mids = ",".join(sorted(CLASSES[n].mid for n in r.labels))
        lines.append(f'{r.key}, {r.start_s:.3f}, {r.end_s:.3f}, "{mids}"')
    return "\n".join(lines) + "\n"


def _table(header: list[str], rows: Iterable[Iterable[object]], eol: str) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=eol)
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def _audiocaps(rows: list[Record], first_id: int) -> str:
    """Captions in rounds, each in another order of the clips, so that those of one clip lie apart."""
    rng = np.random.default_rng(first_id)
    table: list[tuple[int, str, int, str]] = []
    number = first_id
    for k in range(max((len(r.captions) for r in rows), default=0)):
        order = [rows[int(j)] for j in rng.permutation(len(rows))]
        if len(order) > 1 and table and table[-1][1] == order[0].key:
            order.append(order.pop(0))
        for r in order:
            table.append((number, r.key, round(r.start_s), r.captions[k]))
            number += 1
    return _table(["audiocap_id", "youtube_id", "start_time", "caption"], table, "\r\n")


def _clotho_captions(rows: list[Record], eol: str) -> str:
    header = ["file_name", *(f"caption_{k}" for k in range(1, 6))]
    return _table(header, ([r.key, *(_sentence(c) for c in r.captions)] for r in rows), eol)


def _sentence(text: str) -> str:
    """Clotho's captions are sentences: a capital and a full stop."""
    return text[0].upper() + text[1:] + "."


def _clotho_metadata(rows: list[Record], eol: str) -> str:
    header = ["file_name", "keywords", "sound_id", "sound_link", "start_end_samples", "manufacturer", "license"]
    table = []
    for r in rows:
        number = 100_000 + r.seed % 400_000
        maker = _MAKERS[r.seed % len(_MAKERS)]
        start = r.seed % 50_000
        table.append(
            [
                r.key,
                ";".join(CLASSES[n].noun for n in r.labels),
                number,
                f"https://freesound.example/sounds/{number}",
                f"[{start}, {start + round(r.duration_s * RATE_HZ)}]",
                maker,
                _LICENCES[r.seed % len(_LICENCES)],
            ]
        )
    return _table(header, table, eol)
