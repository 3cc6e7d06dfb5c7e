"""Lists of what others held are read whole or refused with a reason, and kept with the name of who held it."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harken.audit.observations import Observation, read_id_list, read_observations, write_observation
from harken.errors import DataError

IDS = ["--4gqARaEJE", "YtZ_0123-ab", "7fmOlUlwoNg"]  # the second begins with a Y of its own


@pytest.mark.parametrize(
    "text",
    [
        "--4gqARaEJE\nYtZ_0123-ab\n7fmOlUlwoNg\n",
        "--4gqARaEJE\r\nYtZ_0123-ab\r\n7fmOlUlwoNg\r\n",
        "\ufeff--4gqARaEJE\n\nYtZ_0123-ab\n7fmOlUlwoNg",
        "Y--4gqARaEJE.wav\nYYtZ_0123-ab.wav\n7fmOlUlwoNg.flac\n",
        'file_name,caption_1\nY--4gqARaEJE.wav,"a, b"\nYYtZ_0123-ab.wav,c\nY7fmOlUlwoNg.wav,d\n',
        'audiocap_id,youtube_id,start_time,caption\r\n1,--4gqARaEJE,30,"dogs,\r\nmany"\r\n'
        "2,YtZ_0123-ab,0,c\r\n3,7fmOlUlwoNg,0,d\r\n4,7fmOlUlwoNg,0,again\r\n",
        "description,YTID\nan evil one,--4gqARaEJE\nx,YtZ_0123-ab\ny,7fmOlUlwoNg\n",
        "# made on a Sunday\n# YTID, start_seconds, end_seconds, positive_labels\n"
        '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_"\nYtZ_0123-ab, 0.000, 10.000, "/m/0jbk"\n'
        '7fmOlUlwoNg, 0.000, 10.000, "/m/0jbk"\n',
    ],
    ids=["raw", "crlf", "bom", "files", "mei", "audiocaps", "other column first", "audioset"],
)
def test_lists_as_they_come(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.csv").write_bytes(text.encode())
    assert read_id_list(tmp_path / "list.csv") == IDS
    (tmp_path / "list.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert read_id_list(tmp_path / "list.csv.gz") == IDS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no rows"),
        ("# only a comment\n\n", "no rows"),
        ("youtube_id,caption\n", "a header and no rows"),
        ("clip,caption\nx,y\n", r"Looked for the columns youtube_id, .*file_name.*rename"),
        ("--4gqARaEJE\nnot an id\n", "line 2: 'not an id' in column 1; expected a YouTube id of 11"),
        ("--4gqARaEJE\n../../etc/passwd.wav\n", "line 2"),
        ("a,youtube_id\nx,--4gqARaEJE\ny\n", "line 3: only 1 columns"),
    ],
)
def test_lists_that_are_none_say_so(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        read_id_list(tmp_path / "list.csv")


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_id_list(tmp_path / "none.csv")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"--4gqARaEJE\n" * 100)[:-20])
    for name in ("binary", "cut.gz"):
        with pytest.raises(DataError, match="not a text file"):
            read_id_list(tmp_path / name)


video_ids = st.text("ABCXYZabcxyz0189-_", min_size=11, max_size=11)


@given(st.lists(video_ids, min_size=1, unique=True))
def test_any_ids_survive_each_spelling(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    folder = tmp_path_factory.mktemp("ids")
    for spelling in ("{}", "Y{}.wav", "{}.wav", "Y{}"):
        (folder / "list").write_text("\n".join(spelling.format(i) for i in ids))
        assert read_id_list(folder / "list") == ids


def test_observations_round_trip(tmp_path: Path) -> None:
    made = Observation.of("Lab of A & B", "2023-03", "their index", "audioset", "test", [*IDS, IDS[0]])
    path = write_observation(tmp_path, made)
    assert write_observation(tmp_path, made) == path  # the same again replaces itself
    other = Observation.of("Lab of A & B", "undated", "their index", "audioset", "test", IDS[:1])
    assert write_observation(tmp_path, other) != path
    found = {o.when: o for o in read_observations(tmp_path)}
    assert set(found) == {"2023-03", "undated"}
    again = found["2023-03"]
    assert (again.who, again.source, again.dataset, again.split) == (
        "Lab of A & B", "their index", "audioset", "test",
    )  # fmt: skip
    assert again.ids.to_pylist() == sorted(IDS)
    assert again.present(pa.array(["7fmOlUlwoNg", "another_one"])).tolist() == [True, False]
    assert read_observations(tmp_path / "none") == []


def test_bad_observations_are_refused(tmp_path: Path) -> None:
    for when in ("last year", "2023-13", "2023-1", "2023-02-31", ""):
        with pytest.raises(DataError, match="is no date"):
            Observation.of("A", when, "", "audioset", "test", IDS)
    with pytest.raises(DataError, match="holds no ids"):
        Observation.of("A", "2023", "", "audioset", "test", [])
    with pytest.raises(DataError, match="must say who"):
        Observation.of("", "2023", "", "audioset", "test", IDS)
    pq.write_table(pa.table({"x": np.arange(3)}), tmp_path / "stray.parquet")
    with pytest.raises(DataError, match="not an observation"):
        read_observations(tmp_path)


def test_names_of_others_make_no_paths(tmp_path: Path) -> None:
    path = write_observation(tmp_path, Observation.of("../../evil", "2023", "", "../x", "a/b", IDS))
    assert path.parent == tmp_path
    assert path.is_file()
