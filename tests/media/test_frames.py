"""Frames that others made: whatever they come in, the same clips give the same folder, or a refusal that says why."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from harken.cli import app, main
from harken.clips import Clip, Manifest, Source, Split, youtube_id, zenodo_id
from harken.config import parse
from harken.errors import ConfigError, DataError
from harken.media import frames
from harken.media.frames import coverage, import_frames, read_frames, read_texts, recipe
from harken.shards import DenseArray, file_sha256, read_table
from harken.training.batches import Features

ROOT = Path(__file__).parents[2]
D = 5
Arrays = Mapping[str, np.ndarray]


def clips(n: int = 7, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Clips of one to four frames, in no order; the last is one of Clotho's."""
    rng = np.random.default_rng(3)
    ids = [youtube_id(f"video{i * 37 % 101:06d}", 0, 10) for i in range(n - 1)]
    ids.append(zenodo_id("4783391", "clotho_audio_development", "Rain, on a roof.wav"))
    return {i: rng.normal(size=(1 + k % 4, D)).astype(dtype) for k, i in enumerate(ids)}


def table(given: Arrays, kind: pa.DataType) -> pa.Table:
    return pa.table({"clip_id": list(given), "frames": pa.array([list(a) for a in given.values()], kind)})


def lists(number: pa.DataType) -> pa.DataType:
    return pa.list_(pa.list_(number))


def as_parquet(path: Path, given: Arrays) -> Path:
    pq.write_table(table(given, lists(pa.float32())), path / "x.parquet", write_page_checksum=True)
    return path / "x.parquet"


def as_fixed_lists(path: Path, given: Arrays) -> Path:
    coded = table(given, pa.large_list(pa.list_(pa.float32(), D)))
    coded = coded.set_column(0, "clip_id", coded["clip_id"].dictionary_encode())
    pq.write_table(coded, path / "x.parquet", row_group_size=3)
    return path / "x.parquet"


def as_parquets(path: Path, given: Arrays) -> Path:
    whole = table(given, lists(pa.float64()))
    (path / "parts").mkdir()
    (path / "parts" / ".hidden.parquet").write_bytes(b"not one")
    for i in range(3):
        pq.write_table(whole.slice(3 * i, 3), path / "parts" / f"{i}.parquet")
    return path / "parts"


def as_npy(path: Path, given: Arrays) -> Path:
    for i, a in given.items():
        file = path / "npy" / f"{i}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.asfortranarray(a))
    (path / "npy" / "README.txt").touch()
    return path / "npy"


def as_npz(path: Path, given: Arrays) -> Path:
    np.savez_compressed(path / "x.npz", **given)
    return path / "x.npz"


KINDS: dict[str, Callable[[Path, Arrays], Path]] = {
    f.__name__: f for f in (as_parquet, as_fixed_lists, as_parquets, as_npy, as_npz)
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def take(source: Path, folder: Path, **options: Any) -> frames.ImportedFrames:
    given = {"dtype": "float16", "frame_s": None, "texts": None, "known": None}
    return import_frames(source, folder, **given | options)


def as_texts(path: Path, given: Mapping[str, np.ndarray], kind: pa.DataType | None = None) -> Path:
    columns = {"caption": list(given), "embedding": pa.array([list(v) for v in given.values()], kind)}
    pq.write_table(pa.table(columns), path)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture
def few_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "CLIPS_PER_SHARD", 3)


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    take(as_npz(tmp_path, clips()), tmp_path / "out")
    return tmp_path / "out"


@kinds
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_source_is_read_to_the_bit(
    kind: Callable[[Path, Arrays], Path], dtype: str, tmp_path: Path, few_a_shard: None
) -> None:
    given = clips()
    found = take(kind(tmp_path, given), tmp_path / "out", dtype=dtype)
    assert (found.dim, found.n_frames, found.n_clips, found.dtype) == (D, 4, 7, dtype)
    assert read_frames(tmp_path / "out", found.digest) == found
    rows = read_table(tmp_path / "out", ["frames_start", "frames_rows"]).to_pylist()
    assert [r["clip_id"] for r in rows] == sorted(given)
    assert [r["shard"] for r in rows] == [0, 0, 0, 1, 1, 1, 2]
    for r in rows:
        array = DenseArray(tmp_path / "out", r["shard"], "frames")
        there = np.empty((r["frames_rows"], D), dtype)
        assert array.dtype == there.dtype
        array.read_into(r["frames_start"], there)
        assert there.tobytes() == given[r["clip_id"]].astype(dtype).tobytes()


def test_training_reads_it(tmp_path: Path) -> None:
    given = clips()
    take(as_parquet(tmp_path, given), tmp_path / "out", dtype="float32")
    features = Features(tmp_path / "out", "frames")
    assert (features.width, features.most_rows) == (D, 4)
    values, valid = features.read(list(given), 4)
    for i, a in enumerate(given.values()):
        assert np.array_equal(values[i, : len(a)].numpy(), a)
        assert valid[i].tolist() == [k < len(a) for k in range(4)]


@kinds
def test_the_same_clips_give_the_same_bytes(
    kind: Callable[[Path, Arrays], Path], tmp_path: Path, few_a_shard: None
) -> None:
    given, outs = clips(), []
    texts = {"a dog": np.ones(2), "a cat": np.zeros(2)}
    for i, order in enumerate([list(given), sorted(given), sorted(given, reverse=True)]):
        (tmp_path / str(i)).mkdir()
        source = kind(tmp_path / str(i), {c: given[c] for c in order})
        spoken = as_texts(tmp_path / f"{i}.parquet", dict(list(texts.items())[:: 1 if i else -1]))
        found = take(source, tmp_path / str(i) / "out", texts=spoken)
        outs.append({n: b for n, b in files(tmp_path / str(i) / "out").items() if n != "frames.json"})
        assert found.digest == "a34773dec121c7f8"  # of every kind, now and later: recipes hold it
    assert outs[0] == outs[1] == outs[2]


def test_whatever_matters_is_in_the_digest(tmp_path: Path) -> None:
    given, texts = clips(), {"a dog": np.ones(2, np.float32)}
    other = {**given, min(given): given[min(given)] + 1}
    (tmp_path / "other").mkdir()
    one, two = as_npz(tmp_path, given), as_npz(tmp_path / "other", other)
    said = as_texts(tmp_path / "a.parquet", texts)
    unsaid = as_texts(tmp_path / "b.parquet", {"a cat": np.ones(2, np.float32)})
    ways: list[tuple[Path, dict[str, Any]]] = [
        (one, {}),
        (two, {}),
        (one, {"dtype": "float32"}),
        (one, {"frame_s": 0.32}),  # it decides how many frames of a clip are heard
        (one, {"frame_s": 1.0}),
        (one, {"texts": said}),
        (one, {"texts": unsaid}),
    ]
    found = [take(source, tmp_path / "out", **options) for source, options in ways]
    assert len({f.digest for f in found}) == len(ways)
    assert take(one, tmp_path / "out", frame_s=1).digest == found[4].digest
    assert [f.frame_s for f in found[3:5]] == [0.32, 1.0]


def test_facts_say_where_it_came_from(tmp_path: Path) -> None:
    source = as_npz(tmp_path, clips())
    take(source, tmp_path / "out", known={max(clips()), "yt:another"})
    facts = json.loads((tmp_path / "out" / "frames.json").read_text())
    assert facts["source"] == {"name": "x.npz", "sha256": file_sha256(source)}
    assert (facts["n_unknown"], facts["has_texts"], facts["frame_s"]) == (6, False, None)
    take(as_npy(tmp_path, clips()), tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "frames.json").read_text())
    assert (facts["source"], facts["n_unknown"]) == ({"name": "npy", "sha256": None}, None)


def test_zeros_are_frames(tmp_path: Path) -> None:
    take(as_npz(tmp_path, {"a": np.zeros((2, D)), "b": np.full((1, D), 65504.0)}), tmp_path / "out")
    values, _ = Features(tmp_path / "out", "frames").read(["a", "b"], 1)
    assert values[:, 0, 0].tolist() == [0.0, 65504.0]


GOOD = np.ones((2, D), np.float32)


@pytest.mark.parametrize("kind", [as_npy, as_npz])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (np.ones(D), "an array of shape (5,); expected (frame, dim). One vector for a whole clip is (1, dim)."),
        (np.ones((1, 2, D)), "shape (1, 2, 5); expected (frame, dim)"),
        (np.ones((0, D)), "nothing in it, shape (0, 5)"),
        (np.ones((2, 0)), "nothing in it, shape (2, 0)"),
        (np.ones((2, D + 1)), "frames of 6 numbers; those of the clips before have 5"),
        (np.array([[1.0, np.nan, 0, 0, 0]]), "1 numbers are NaN or infinite, the first of them in row 0"),
        (np.array([[0.0] * D, [-np.inf] * D]), "5 numbers are NaN or infinite, the first of them in row 1"),
        (np.full((1, D), -70000.0), "the largest number is 70000, which does not fit float16: take --dtype float32"),
        (np.full((1, D), 1e-9), "the largest number is 1e-09, which does not fit float16"),
        (np.ones((2, D), np.int32), "holds int32; expected float16"),
        (np.ones((2, D), np.complex64), "holds complex64; expected float16"),
        (np.array([[1.0, None]], object), "not a whole"),
    ],
)
def test_an_array_that_is_no_frames_is_refused(
    kind: Callable[[Path, Arrays], Path], wrong: np.ndarray, says: str, tmp_path: Path
) -> None:
    source = kind(tmp_path, {"a": GOOD, "wrong": wrong})
    with pytest.raises(DataError, match=re.escape(says)) as e:
        take(source, tmp_path / "out")
    assert "wrong" in str(e.value)
    assert "npy" in str(e.value) or "x.npz" in str(e.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == [source.name]


def test_float32_overflows_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not fit float32: scale the numbers"):
        take(as_npz(tmp_path, {"a": np.full((1, D), 1e300)}), tmp_path / "out", dtype="float32")


def rows(path: Path, *given: Any, kind: pa.DataType | None = None) -> Path:
    """A Parquet file of clips a, b, c ... with these frames."""
    columns = {"clip_id": list("abcdef")[: len(given)], "frames": pa.array(given, kind or lists(pa.float32()))}
    pq.write_table(pa.table(columns), path / "x.parquet")
    return path / "x.parquet"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (([[1.0, 2.0]], [[1.0, 2.0], [3.0]]), "x.parquet: clip 'b': vectors of 1 and of 2 numbers"),
        (([[1.0, 2.0]], [[1.0]]), "x.parquet: clip 'b': frames of 1 numbers; those of the clips before have 2"),
        (([[1.0, 2.0]], []), "x.parquet: clip 'b': nothing in it, shape (0, 0)"),
        (([[1.0, 2.0]], [[], []]), "x.parquet: clip 'b': nothing in it, shape (2, 0)"),
        (([[1.0, 2.0]], None), "x.parquet: clip 'b': a value is missing (null)"),
        (([[1.0, 2.0]], [None, [1.0, 2.0]]), "x.parquet: clip 'b': a value is missing (null)"),
        (([[1.0, 2.0]], [[1.0, None]]), "x.parquet: clip 'b': a number is missing (null)"),
        (([[1.0, 2.0]], [[1.0, float("nan")]]), "x.parquet: clip 'b': 1 numbers are NaN"),
        (([[1.0, 2.0]], [[1.0, 1e5]]), "x.parquet: clip 'b': the largest number is 100000"),
    ],
)
def test_a_row_that_is_no_frames_is_refused(given: tuple[Any, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(says)):
        take(rows(tmp_path, *given), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"id": ["a"], "frames": [[[1.0]]]}, "no column 'clip_id'; it has id, frames"),
        ({"clip_id": ["a"], "embedding": [[[1.0]]]}, "no column 'frames'"),
        ({"clip_id": [1], "frames": [[[1.0]]]}, "clip_id is of type int64; expected string"),
        ({"clip_id": ["a"], "frames": [[1.0]]}, "One vector for a whole clip is (1, dim): a list of one list."),
        ({"clip_id": ["a"], "frames": [[[1]]]}, "expected lists (frame) of lists (dim) of floats"),
        ({"clip_id": ["a"], "frames": [b"1234"]}, "frames is of type binary"),
        ({"clip_id": ["a", None], "frames": [[[1.0]], [[1.0]]]}, "row 1 has no clip_id"),
        ({"clip_id": pa.array([], pa.string()), "frames": pa.array([], lists(pa.float32()))}, "no clip in it"),
    ],
)
def test_columns_must_be_what_they_should(columns: dict[str, Any], says: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=re.escape(says)) as e:
        take(tmp_path / "x.parquet", tmp_path / "out")
    assert "x.parquet" in str(e.value)


@pytest.mark.parametrize("bad", ["", " a", "a\n", "clips/a", "C:\\a", "a\udcff"])
def test_what_cannot_be_an_id_is_refused(bad: str, tmp_path: Path) -> None:
    if bad == "a\udcff":
        source = tmp_path / "npy"
        source.mkdir()
        np.save(source / f"{bad}.npy", GOOD)
    else:
        source = as_parquet(tmp_path, {"b": GOOD, bad: GOOD})
    with pytest.raises(DataError, match="is no clip id: expected the manifest's, such as yt:"):
        take(source, tmp_path / "out")


def test_an_id_comes_once(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name in ("one", "two"):
        pq.write_table(table({"a": GOOD}, lists(pa.float32())), tmp_path / "parts" / f"{name}.parquet")
    with pytest.raises(DataError, match=r"two\.parquet: clip 'a' comes twice, the first time in .*one\.parquet"):
        take(tmp_path / "parts", tmp_path / "out")
    np.save(tmp_path / "a.npy", GOOD)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as z:
        z.write(tmp_path / "a.npy", "a.npy")
        z.write(tmp_path / "a.npy", "a")
    with pytest.raises(DataError, match=r"x\.npz: clip 'a' comes twice"):
        take(tmp_path / "x.npz", tmp_path / "out")


def _cut(path: Path, left: float) -> Path:
    path.write_bytes(path.read_bytes()[: round(path.stat().st_size * left)])
    return path


def _spoilt(path: Path) -> Path:
    """A file whose first half is not what it was."""
    raw = bytearray(path.read_bytes())
    raw[100 : len(raw) // 2] = bytes(len(raw) // 2 - 100)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    "harm", [lambda p: _cut(p, 0.7), lambda p: _cut(p, 0.0), _spoilt], ids=["cut", "empty", "zeros"]
)
@pytest.mark.parametrize("kind", [as_parquet, as_npz, as_npy])
def test_a_damaged_file_is_named(
    kind: Callable[[Path, Arrays], Path], harm: Callable[[Path], Path], tmp_path: Path
) -> None:
    big = {"a": np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)}
    source = kind(tmp_path, big)
    if harm is _spoilt and kind is as_npy:
        (source / "a.npy").write_bytes(bytes(500))
    else:
        harm(source / "a.npy" if kind is as_npy else source)
    with pytest.raises(DataError, match=r"(a\.npy|x\.npz.*|x\.parquet): not a whole"):
        take(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "a.npy", GOOD)
    shutil.copy(tmp_path / "a.npy", tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "both").mkdir()
    shutil.copy(tmp_path / "a.npy", tmp_path / "both")
    as_parquet(tmp_path / "both", {"a": GOOD})
    for name, says in {
        "lost": "lost: no such file or folder. Expected a Parquet file",
        "empty": "empty: no clip in it. Expected",
        "a.npy": "a.npy: not a kind of file that can be imported",
        "b.npz": "b.npz: not a whole .npz file (it is a single array)",
        "c.npz": "c.npz: not a whole .npz file",
        "both": "holds x.parquet and a.npy",
    }.items():
        with pytest.raises(DataError, match=re.escape(says)):
            take(tmp_path / name, tmp_path / "out")
    np.savez(tmp_path / "none.npz")
    with pytest.raises(DataError, match=r"none\.npz: no clip in it"):
        take(tmp_path / "none.npz", tmp_path / "out")


def test_clips_that_no_list_knows_are_counted_and_none_known_is_refused(tmp_path: Path) -> None:
    source = as_npz(tmp_path, {"aB3_-kLm90Q_30": GOOD, "aB3_-kLm90R_0": GOOD, "zz": GOOD})
    known = {"yt:aB3_-kLm90Q:30000-40000", "yt:aB3_-kLm90R:0-10000", "yt:aB3_-kLm90S:0-10000"}
    with pytest.raises(DataError) as e:
        take(source, tmp_path / "out", known=known)
    assert "'aB3_-kLm90Q_30' and 'aB3_-kLm90R_0'" in str(e.value)
    assert "'yt:aB3_-kLm90Q:30000-40000' and 'yt:aB3_-kLm90R:0-10000'" in str(e.value)
    assert "docs/own-frames.md" in str(e.value)
    found = take(source, tmp_path / "out", known={*known, "zz"})
    assert found.n_unknown == 2
    assert "zz" in Features(tmp_path / "out", "frames")
    assert "aB3_-kLm90R_0" in Features(tmp_path / "out", "frames")  # kept: another preset may know it


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float61"}, "dtype: unknown name 'float61'. Did you mean 'float16'?"),
        ({"frame_s": 0.0}, "frame_s is 0.0: expected the seconds"),
        ({"frame_s": float("nan")}, "frame_s is nan"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        take(as_npz(tmp_path, clips()), tmp_path / "out", **options)


def test_only_an_import_is_replaced(tmp_path: Path, imported: Path) -> None:
    source = as_npz(tmp_path, clips())
    (tmp_path / "media").mkdir()
    shutil.copy(imported / "00000.parquet", tmp_path / "media")  # a stage's shards have such names too
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    (tmp_path / "empty").mkdir()
    for folder, says in {
        "media": "has no frames.json: not an import",
        "notes": "holds 'mine.txt': not an import",
        "x.npz": "Take another folder",
        ".": "Take another folder",
    }.items():
        before = sorted(p for p in tmp_path.rglob("*"))
        with pytest.raises(ConfigError, match=says):
            take(source, tmp_path / folder)
        assert sorted(p for p in tmp_path.rglob("*")) == before
    npy = as_npy(tmp_path, clips())
    with pytest.raises(ConfigError, match="Take another folder"):
        take(npy, npy / "out")
    (imported / "mine.txt").touch()
    with pytest.raises(ConfigError, match=r"holds 'mine\.txt'"):
        take(source, imported)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        take(source, tmp_path / "file")
    take(source, tmp_path / "empty")


def test_an_import_replaces_the_one_before_whole(tmp_path: Path, few_a_shard: None) -> None:
    first = take(as_npz(tmp_path, clips()), tmp_path / "out", texts=as_texts(tmp_path / "t.parquet", {"a": np.ones(2)}))
    assert first.has_texts
    second = take(as_npz(tmp_path, {"a": GOOD}), tmp_path / "out")
    assert sorted(files(tmp_path / "out")) == ["00000.frames.npy", "00000.parquet", "frames.json"]
    assert read_frames(tmp_path / "out", second.digest) == second
    with pytest.raises(DataError, match=f"their digest is {second.digest}, the recipe's is {first.digest}"):
        read_frames(tmp_path / "out", first.digest)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "out")
    take(as_npz(tmp_path, clips()), link)
    assert link.is_symlink()
    assert read_frames(tmp_path / "out", None).n_clips == 7


KILLED = """
import os, signal, sys
from pathlib import Path
from harken.media import frames
from harken.shards import ShardWriter
point, source, folder = sys.argv[1:]
frames.CLIPS_PER_SHARD = 3
seen = []
def dies(owner, name, when):
    whole = getattr(owner, name)
    def instead(*args, **options):
        seen.append(name)
        if len(seen) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **options)
    setattr(owner, name, instead)
if point == "clip":
    dies(ShardWriter, "write", 5)
elif point == "facts":
    dies(frames, "write_json", 1)
else:
    renamed = Path.rename
    def rename(self, target):
        done = renamed(self, target)
        if self.name == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    Path.rename = rename
frames.import_frames(Path(source), Path(folder), dtype="float16", frame_s=None, texts=None, known=None)
"""


@pytest.mark.parametrize(
    ("point", "is_left"), [("clip", "old"), ("facts", "old"), ("out", "nothing"), (".out.importing", "new")]
)
def test_a_kill_leaves_the_old_folder_or_nothing(
    point: str, is_left: str, tmp_path: Path, few_a_shard: None, imported: Path
) -> None:
    (tmp_path / "new").mkdir()
    before = files(imported)
    given = {i: a + 1 for i, a in clips().items()}
    source = as_npz(tmp_path / "new", given)
    done = subprocess.run([sys.executable, "-c", KILLED, point, source, imported], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    if is_left == "nothing":
        assert not imported.exists()
    else:
        assert (files(imported) == before) == (is_left == "old")
        read_frames(imported, None)
    found = take(source, imported)
    assert read_frames(imported, found.digest) == found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out", "x.npz"]


def test_an_import_that_fails_leaves_what_was_there(
    tmp_path: Path, imported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, source = files(imported), as_npz(tmp_path, {"a": GOOD})
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == ".out.importing":
            raise OSError(13, "not now")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="not now"):
        take(source, imported)
    assert files(imported) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "x.npz"]


def test_one_import_at_a_time(tmp_path: Path) -> None:
    source, work = as_npz(tmp_path, clips()), tmp_path / ".out.importing"
    work.mkdir()
    (work / "00000.parquet").touch()
    with open(work / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another import into it is running"):
            take(source, tmp_path / "out")
        assert (work / "00000.parquet").exists()
    take(source, tmp_path / "out")
    assert not work.exists()


def test_texts_are_kept_once_and_in_order(tmp_path: Path) -> None:
    given = {"b dog": np.array([1.0, 2.0]), "a cat": np.array([3.0, 1 / 3])}
    columns = {"caption": ["b dog", "a cat", "b dog"], "embedding": [[1.0, 2.0], [3.0, 1 / 3], [1.0, 2.0]]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = take(as_npz(tmp_path, clips()), tmp_path / "out", texts=tmp_path / "t.parquet")
    assert found.has_texts
    captions, embeddings = read_texts(tmp_path / "out")
    assert captions == ["a cat", "b dog"]
    assert embeddings.dtype == np.float32
    assert np.array_equal(embeddings, np.stack([given[c] for c in captions]).astype(np.float32))
    assert embeddings.flags.writeable  # torch takes no other
    again = as_texts(tmp_path / "u.parquet", given, pa.list_(pa.float32(), 2))
    assert take(as_npz(tmp_path, clips()), tmp_path / "out", texts=again).digest == found.digest


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"caption": ["a", "a"], "embedding": [[1.0], [2.0]]}, "caption 'a' comes twice with different embeddings"),
        ({"caption": ["a"], "text": [[1.0]]}, "has caption (string), text (list<element: double>); expected"),
        ({"caption": [1], "embedding": [[1.0]]}, "expected `caption` (string) and `embedding` (a list of floats)"),
        ({"caption": ["a"], "embedding": [[[1.0]]]}, "expected `caption` (string) and `embedding` (a list of floats)"),
        ({"caption": ["a", None], "embedding": [[1.0], [1.0]]}, "1 rows have no caption"),
        ({"caption": ["a", "b"], "embedding": [[1.0], [1.0, 2.0]]}, "vectors of 1 and of 2 numbers"),
        ({"caption": ["a", "b"], "embedding": [[1.0], None]}, "a value is missing (null)"),
        ({"caption": ["a", "b"], "embedding": [[1.0], [float("inf")]]}, "NaN or infinite, the first of them in row 1"),
        ({"caption": ["a"], "embedding": pa.array([[]], pa.list_(pa.float32()))}, "nothing in it"),
        ({"caption": pa.array([], pa.string()), "embedding": pa.array([], pa.list_(pa.float32()))}, "no caption in it"),
    ],
)
def test_texts_that_are_none_are_refused(columns: dict[str, Any], says: str, tmp_path: Path) -> None:
    columns = {k: v if isinstance(v, pa.Array) else pa.array(v) for k, v in columns.items()}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=re.escape(says)) as e:
        take(as_npz(tmp_path, clips()), tmp_path / "out", texts=tmp_path / "t.parquet")
    assert "t.parquet" in str(e.value)
    assert not (tmp_path / "out").exists()


def test_texts_must_be_there(tmp_path: Path, imported: Path) -> None:
    with pytest.raises(DataError, match=r"lost\.parquet: no such file"):
        take(as_npz(tmp_path, clips()), imported, texts=tmp_path / "lost.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"cut\.parquet: not a whole Parquet file"):
        take(as_npz(tmp_path, clips()), imported, texts=tmp_path / "cut.parquet")
    with pytest.raises(DataError, match="no texts were imported"):
        read_texts(imported)


def test_a_folder_that_is_no_import_is_refused(tmp_path: Path, imported: Path) -> None:
    with pytest.raises(DataError, match=r"no imported frames here\. Run `harken import-frames SOURCE --into"):
        read_frames(tmp_path / "nothing", None)
    facts = (imported / "frames.json").read_text()
    (imported / "frames.json").write_text(facts.replace('"format": 1', '"format": 0'))
    with pytest.raises(DataError, match="another version"):
        read_frames(imported, None)
    (imported / "frames.json").write_text(facts[:50])
    with pytest.raises(DataError, match="not what an import writes"):
        read_frames(imported, None)
    (imported / "frames.json").write_text(facts)
    (imported / "00000.parquet").unlink()
    with pytest.raises(DataError, match=r"00000\.parquet: missing"):
        read_frames(imported, None)


def test_it_imports_no_torch() -> None:
    code = "import sys, harken.media.frames as f; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """A project's root whose manifest has five clips of AudioCaps, one of Clotho, and one of AudioSet."""
    (tmp_path / "params.yaml").write_text((ROOT / "presets/audiocaps.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARKEN_PARAMS", raising=False)
    listed = [
        Clip(
            youtube_id(f"video{i:06d}", 30, 40),
            "audiocaps" if i else "audioset",
            Split.TRAIN if i < 4 else Split.TEST,
            Source("youtube", f"video{i:06d}"),
            30.0,
            40.0,
            (f"sound {i}", "a sound") if i else (),
        )
        for i in range(6)
    ]
    name = "Rain, on a roof.wav"
    clotho = Source("zenodo", name, "clotho_audio_development")
    clip_id = zenodo_id("4783391", clotho.archive, name)
    listed.append(Clip(clip_id, "clotho", Split.TRAIN, clotho, 0.0, None, ("rain",)))
    found = Manifest.build(listed, 1)
    Path("data/audiocaps/manifest").mkdir(parents=True)
    pq.write_table(found.table, "data/audiocaps/manifest/clips.parquet")
    return found


def say(*args: str) -> str:
    result = CliRunner().invoke(app, ["import-frames", *args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def given_to(manifest: Manifest, n: int = 5) -> dict[str, np.ndarray]:
    return dict.fromkeys(manifest.table["clip_id"].to_pylist()[:n], GOOD) | {"other": GOOD}


def test_the_command_tells_what_it_took_and_how_to_train_on_it(project: Manifest) -> None:
    as_npz(Path(), given_to(project))
    as_texts(Path("t.parquet"), {"a sound": np.ones(2), "sound 1": np.zeros(2)})
    told = say("x.npz", "--into", "data/frames/mine", "--texts", "t.parquet", "--frame-s", "0.32")
    digest = read_frames(Path("data/frames/mine"), None).digest
    assert "6 clips, at most 2 frames each, 0.32 s apart (0.64 s), of 5 numbers (float16)" in told
    assert "1 clips are in no list" in told
    assert "audiocaps train: 3 of 3 clips, 4 of 6 captions" in told
    assert "audiocaps test: 1 of 2 clips, 2 of 4 captions" in told
    assert told.splitlines()[-1] == (
        f'mine: {{dataset: audiocaps, encoder: {{frames: data/frames/mine, digest: "{digest}", texts: imported}}, '
        "pooling: {name: tap, dp: 512}, loss: {name: nt_xent, temperature: 0.07, reduction: mean_of_directions}}"
    )


def test_the_recipe_is_one(project: Manifest) -> None:
    from harken.stages.train import TrainRecipe

    as_npz(Path(), given_to(project))
    for into in ("data/frames/mine", "data/frames/2 of, them: {mine}", "true"):
        found = json.loads(say("x.npz", "--into", into, "--dtype", "float32", "--json"))
        ((name, loaded),) = YAML(typ="safe").load(found["recipe"]).items()
        assert name == Path(into).name
        taken = parse("train.recipes", TrainRecipe, loaded)
        assert (taken.encoder.frames, taken.encoder.digest) == (Path(into), found["digest"])
        assert (taken.dataset, taken.encoder.texts) == ("audiocaps", "bert")
        assert (found["dtype"], found["n_clips"], found["n_unknown"]) == ("float32", 6, 1)
        assert found["splits"] == coverage(Path(into), project)


def test_a_recipe_is_of_the_dataset_that_was_imported(project: Manifest) -> None:
    rain = project.of("clotho", "train")["clip_id"][0].as_py()
    found = take(as_npz(Path(), {rain: GOOD}), Path("out"))
    assert "dataset: clotho," in recipe(found, coverage(Path("out"), project))
    sounding = project.of("audioset", "train")["clip_id"][0].as_py()
    found = take(as_npz(Path(), {sounding: GOOD}), Path("out"))
    assert "dataset: audiocaps," in recipe(found, coverage(Path("out"), project))  # nobody can train on AudioSet's


def test_a_project_without_a_manifest_says_so(project: Manifest) -> None:
    as_npz(Path(), given_to(project))
    shutil.rmtree("data")
    assert "not held against the lists" in say("x.npz", "--into", "data/frames/mine")
    assert json.loads(say("x.npz", "--into", "data/frames/mine", "--json"))["splits"] == []


def test_outside_of_a_project_it_says_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARKEN_PARAMS", raising=False)
    monkeypatch.setattr("sys.argv", ["harken", "import-frames", "x.npz", "--into", "out"])
    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 1
    assert "Run from the project's root" in capsys.readouterr().err


def test_the_guide_s_snippets_run(project: Manifest) -> None:
    page = (ROOT / "docs/own-frames.md").read_text()
    Path("clips").mkdir()
    for i in range(1, 6):
        Path(f"clips/video{i:06d}_30.wav").touch()
    scope: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert len(blocks) >= 2
    for body in blocks:
        exec(body, scope)
    for line in re.findall(r"^harken (import-frames .*)$", page, re.M):
        args = line.split()[1:]
        told = json.loads(say(*args, "--json"))
        assert told["n_unknown"] == 0
        splits = {(s["dataset"], s["split"]): s for s in told["splits"]}
        assert splits["audiocaps", "train"]["n_with_frames"] == 3
        if "--texts" in args:
            assert all(s["n_with_texts"] == s["n_captions"] for s in told["splits"])
    assert any(Path("data/frames").iterdir())  # the page imports something
