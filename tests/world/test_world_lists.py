"""The lists, read as a careful stranger would read them: byte by byte and with the csv module alone."""

from __future__ import annotations

import csv
import io
import re
from itertools import pairwise
from pathlib import Path

import pytest

from harken.world.classes import CLASSES
from harken.world.corpus import write_lists


@pytest.fixture(scope="module")
def lists(tmp_path_factory, default_plan) -> Path:
    out = tmp_path_factory.mktemp("lists")
    write_lists(default_plan, out)
    return out


def _audioset_rows(path: Path) -> list[list[str]]:
    lines = path.read_text().splitlines()
    return list(csv.reader(lines[3:], skipinitialspace=True))


@pytest.mark.parametrize(("name", "n"), [("unbalanced_train", 440), ("balanced_train", 40), ("eval", 100)])
def test_audioset_lists_have_the_official_form(lists, name, n):
    data = (lists / "audioset" / f"{name}_segments.csv").read_bytes()
    assert b"\r" not in data
    lines = data.decode("ascii").splitlines()
    assert lines[0].startswith("# Segments csv created ")
    assert lines[2] == "# YTID, start_seconds, end_seconds, positive_labels"
    assert all(re.fullmatch(r'[\w-]{11}, \d+\.\d{3}, \d+\.\d{3}, "/m/\w+(,/m/\w+)*"', x) for x in lines[3:])
    rows = _audioset_rows(lists / "audioset" / f"{name}_segments.csv")
    labels = [mid for r in rows for mid in r[3].split(",")]
    assert lines[1] == (
        f"# num_ytids={n}, num_segs={n}, num_unique_labels={len(set(labels))}, num_positive_labels={len(labels)}"
    )
    assert len(rows) == n == len({r[0] for r in rows})
    assert set(labels) <= {c.mid for c in CLASSES.values()}


def test_class_labels_quote_every_name(lists):
    text = (lists / "audioset" / "class_labels_indices.csv").read_text()
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["index", "mid", "display_name"]
    assert [r[0] for r in rows[1:]] == [str(i) for i in range(len(CLASSES))]
    assert all(x.endswith('"') and x.count('"') == 2 for x in text.splitlines()[1:])
    assert any("," in r[2] for r in rows[1:])


def test_audiocaps_lists_have_the_official_form_and_lie_in_the_unbalanced_list(lists):
    unbalanced = {r[0]: r[1] for r in _audioset_rows(lists / "audioset" / "unbalanced_train_segments.csv")}
    others = {
        r[0] for name in ("balanced_train", "eval") for r in _audioset_rows(lists / f"audioset/{name}_segments.csv")
    }
    numbers: list[str] = []
    for name, n_clips, n_each in (("train", 260, 1), ("val", 36, 5), ("test", 100, 5)):
        data = (lists / "audiocaps" / f"{name}.csv").read_bytes()
        assert data.count(b"\n") == data.count(b"\r\n")
        rows = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
        assert list(rows[0]) == ["audiocap_id", "youtube_id", "start_time", "caption"]
        assert len(rows) == n_clips * n_each
        ids = [r["youtube_id"] for r in rows]
        assert len(set(ids)) == n_clips
        assert all(float(unbalanced[r["youtube_id"]]) == int(r["start_time"]) for r in rows)
        assert not others & set(ids)
        assert all(a != b for a, b in pairwise(ids)), "captions of one clip on neighbouring rows"
        assert any("," in r["caption"] for r in rows)
        numbers += [r["audiocap_id"] for r in rows]
    assert len(set(numbers)) == len(numbers)


def test_clotho_lists_have_the_official_form_and_its_odd_names(lists):
    names: list[str] = []
    for part, n, crlf in (("development", 60, True), ("validation", 20, True), ("evaluation", 40, False)):
        data = (lists / "clotho" / f"clotho_captions_{part}.csv").read_bytes()
        assert (b"\r\n" in data) == crlf
        rows = list(csv.reader(io.StringIO(data.decode(), newline="")))
        assert rows[0] == ["file_name", *(f"caption_{k}" for k in range(1, 6))]
        assert len(rows) == n + 1
        assert all(len(r) == 6 and all(c.endswith(".") and c[0].isupper() for c in r[1:]) for r in rows[1:])
        names += [r[0] for r in rows[1:]]
        meta = (lists / "clotho" / f"clotho_metadata_{part}.csv").read_bytes()
        table = list(csv.reader(io.StringIO(meta.decode("iso-8859-1"), newline="")))
        assert table[0] == [
            "file_name", "keywords", "sound_id", "sound_link", "start_end_samples", "manufacturer", "license",
        ]  # fmt: skip
        assert [r[0] for r in table[1:]] == [r[0] for r in rows[1:]]
        with pytest.raises(UnicodeDecodeError):
            meta.decode("utf-8")
    assert len(set(names)) == len(names)
    for odd in (r"^ ", r" \.wav$", r",", r"&amp;", r"&#39;", r"&quot;", r"  ", r"#", r"\.\.WAV\.wav$"):
        assert any(re.search(odd, n) for n in names), odd
