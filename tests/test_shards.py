"""A shard is whole or not there, says what happened to every clip, and its digest is of its contents."""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harken.errors import DataError
from harken.shards import (
    DenseArray,
    ShardWriter,
    atomic,
    code_version,
    digest_of,
    facts,
    file_sha256,
    fingerprint,
    is_done,
    ledger,
    pending,
    publish,
    publish_shards,
    read_shard,
    read_table,
    shard_path,
    shards_in,
    vectors,
    vectors_type,
    write_json,
)

COLUMNS = {"media": pa.binary(), "start_s": pa.float64(), "images": pa.list_(pa.list_(pa.float32(), 3))}
ARRAYS = {"fbank": (4, "float16"), "logmel": (2, "float32")}


def rows(n: int = 5) -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    return [
        {
            "media": rng.bytes(20),
            "start_s": float(i) / 3,
            "images": list(rng.normal(size=(2, 3)).astype(np.float32)),
            "fbank": rng.normal(size=(i, 4)),
            "logmel": rng.normal(size=(2 * i, 2)).astype(np.float32),
        }
        for i in range(n)
    ]


def write(folder: Path, shard: int = 0, given: list[dict[str, Any]] | None = None, mark: str = "f") -> ShardWriter:
    given = rows() if given is None else given
    with ShardWriter(
        folder, shard, fingerprint=mark, columns=COLUMNS, arrays=ARRAYS, meta={"n_images": "2"}, rows_per_group=2
    ) as out:
        for i, row in enumerate(given):
            if i == 2:
                out.skip("bad", "qc.silent", "-80 dBFS")
            out.write(f"c{i}", **row)
    return out


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    out = write(tmp_path, 3)
    assert names(tmp_path) == ["00003.fbank.npy", "00003.logmel.npy", "00003.parquet"]
    assert [o.status for o in out.outcomes] == ["ok", "ok", "failed", "ok", "ok", "ok"]
    found = list(read_shard(tmp_path, 3, [*COLUMNS, "fbank_start", "fbank_rows", "logmel_start", "logmel_rows"]))
    assert [r["clip_id"] for r in found] == ["c0", "c1", "c2", "c3", "c4"]
    for got, given in zip(found, rows(), strict=True):
        assert (got["media"], got["start_s"]) == (given["media"], given["start_s"])
        assert np.array_equal(np.array(got["images"], np.float32), given["images"])
        for name, (width, dtype) in ARRAYS.items():
            buffer = np.empty((got[f"{name}_rows"], width), dtype)
            DenseArray(tmp_path, 3, name).read_into(got[f"{name}_start"], buffer)
            assert np.array_equal(buffer, given[name].astype(dtype))


def test_a_dense_array_is_a_plain_npy_file(tmp_path: Path) -> None:
    write(tmp_path)
    found = np.load(tmp_path / "00000.fbank.npy")
    assert found.dtype == np.float16
    assert np.array_equal(found, np.concatenate([r["fbank"] for r in rows()]).astype(np.float16))


def test_requested_is_ok_and_failed(tmp_path: Path) -> None:
    for shard in (0, 2):
        write(tmp_path, shard)
    found = ledger(tmp_path)
    assert found.num_rows == 12
    assert set(found["shard"].to_pylist()) == {0, 2}
    failed = found.filter(pa.compute.equal(found["status"], "failed")).to_pylist()
    assert [(r["clip_id"], r["reason"], r["message"]) for r in failed] == [("bad", "qc.silent", "-80 dBFS")] * 2
    assert read_table(tmp_path, ["start_s"]).num_rows == 10
    assert "bad" not in read_table(tmp_path)["clip_id"].to_pylist()


def test_a_shard_of_failures_alone_is_a_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0, fingerprint="f", columns=COLUMNS, arrays=ARRAYS) as out:
        out.skip("a", "gone.private")
    assert list(read_shard(tmp_path, 0)) == []
    assert len(ledger(tmp_path)) == 1
    assert np.load(tmp_path / "00000.fbank.npy").shape == (0, 4)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def begin() -> None:
        with ShardWriter(tmp_path, 0, fingerprint="f", columns=COLUMNS, arrays=ARRAYS) as out:
            for i, row in enumerate(rows()):
                out.write(f"c{i}", **row)
            raise error("midway")

    with pytest.raises(error, match="midway"):
        begin()
    assert names(tmp_path) == []


def test_an_exception_leaves_the_shard_that_was_there(tmp_path: Path) -> None:
    write(tmp_path)
    before = file_sha256(shard_path(tmp_path, 0))
    out = ShardWriter(tmp_path, 0, fingerprint="g", columns={})
    with pytest.raises(ValueError, match="written twice"), out:
        deque(out.skip(i, "qc.silent") for i in "aa")
    assert file_sha256(shard_path(tmp_path, 0)) == before
    assert len(names(tmp_path)) == 3


def test_the_parquet_file_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    appeared: list[str] = []
    replace = os.replace

    def noting(source: Path, target: Path) -> None:
        replace(source, target)
        appeared.append(target.name)

    monkeypatch.setattr("os.replace", noting)
    write(tmp_path)
    assert appeared == ["00000.fbank.npy", "00000.logmel.npy", "00000.parquet"]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"fbank": np.zeros((3, 5))}, ValueError, r"fbank of x: expected \(rows, 4\), found \(3, 5\)"),
        ({"fbank": np.zeros(4)}, ValueError, "fbank of x"),
        ({"fbnk": 1}, TypeError, "columns that this shard does not have: fbnk"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], says: str
) -> None:
    with (
        pytest.raises(error, match=says),
        ShardWriter(tmp_path, 0, fingerprint="f", columns=COLUMNS, arrays=ARRAYS) as out,
    ):
        out.write("x", **rows()[0] | change)
    assert names(tmp_path) == []


def test_equal_content_gives_equal_bytes_and_digest(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    write(a)
    write(b)
    assert [file_sha256(a / n) for n in names(a)] == [file_sha256(b / n) for n in names(b)]
    write(b, mark="another")  # made from other inputs, the same after all
    assert facts(a, 0)["digest"] == facts(b, 0)["digest"]
    assert digest_of(a) == digest_of(b)
    assert facts(a, 0)["n_images"] == "2"


def with_change(key: str, value: Any) -> list[dict[str, Any]]:
    given = rows()
    given[1] = given[1] | {key: value}
    return given


@pytest.mark.parametrize(
    "given",
    [
        rows(4),
        list(reversed(rows())),
        with_change("media", b"x"),
        with_change("start_s", np.nextafter(1 / 3, 1).item()),
        with_change("fbank", np.zeros((1, 4))),
        with_change("logmel", np.zeros((2, 2))),
        # one bit of one number: more digits than a printed array shows
        with_change("images", [np.nextafter(v, np.float32(9)) for v in rows()[1]["images"]]),
    ],
    ids=["fewer", "order", "bytes", "float", "array", "other_array", "one_bit"],
)
def test_any_change_of_content_changes_the_digest(tmp_path: Path, given: list[dict[str, Any]]) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", given=given)
    assert facts(tmp_path / "a", 0)["digest"] != facts(tmp_path / "b", 0)["digest"]


def test_long_vectors_are_digested_whole(tmp_path: Path) -> None:
    digests = set()
    for i in range(2):
        vector = np.zeros(4096, np.float32)
        vector[2000] = i  # NumPy prints no more than the ends of it
        with ShardWriter(tmp_path / str(i), 0, fingerprint="f", columns={"v": pa.list_(pa.float32())}) as out:
            out.write("a", v=vector)
        digests.add(facts(tmp_path / str(i), 0)["digest"])
    assert len(digests) == 2


def test_the_same_bytes_cut_elsewhere_are_another_content(tmp_path: Path) -> None:
    for name, a, b in (("x", b"ab", b"c"), ("y", b"a", b"bc")):
        with ShardWriter(tmp_path / name, 0, fingerprint="f", columns={"a": pa.binary(), "b": pa.binary()}) as out:
            out.write("id", a=a, b=b)
    assert facts(tmp_path / "x", 0)["digest"] != facts(tmp_path / "y", 0)["digest"]


def test_done_means_whole_and_of_the_same_inputs(tmp_path: Path) -> None:
    assert not is_done(tmp_path, 0, "f")
    write(tmp_path)
    assert is_done(tmp_path, 0, "f")
    assert not is_done(tmp_path, 0, "g")


def test_pending_is_what_lacks_and_leftovers_go(tmp_path: Path) -> None:
    assert pending(tmp_path / "new", {5: "f", 1: "f"}) == [1, 5]
    write(tmp_path, 1)
    write(tmp_path, 2)
    for name in (".00003.parquet.77.tmp", ".00003.fbank.npy.77.tmp"):
        (tmp_path / name).touch()
    assert pending(tmp_path, {1: "f", 2: "changed", 3: "f"}) == [2, 3]
    assert not [n for n in names(tmp_path) if n.endswith(".tmp")]


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda d: facts(d, 9), "no such shard. Run the stage"),
        (shards_in, "has no shards. Run `dvc repro`"),
        (ledger, "has no shards"),
        (lambda d: DenseArray(d, 9, "fbank"), "missing beside its Parquet file"),
    ],
)
def test_missing_shards_say_what_to_run(tmp_path: Path, read: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read(tmp_path)


def test_a_damaged_shard_says_so(tmp_path: Path) -> None:
    write(tmp_path)
    path = shard_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        facts(tmp_path, 0)


def test_reading_past_the_end_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    array = DenseArray(tmp_path, 0, "fbank")
    assert array.shape == (10, 4)
    with pytest.raises(DataError, match="ends before row 11"):
        array.read_into(9, np.empty((2, 4), np.float16))


def test_rows_are_read_straight_into_a_part_of_the_buffer(tmp_path: Path) -> None:
    write(tmp_path)
    out = np.full((3, 6, 4), 7, np.float16)
    DenseArray(tmp_path, 0, "fbank").read_into(3, out[1, :4])
    assert np.array_equal(out[1, :4], np.load(tmp_path / "00000.fbank.npy")[3:7])
    for untouched in (out[0], out[1, 4:], out[2]):
        assert (untouched == 7).all()


def test_publishing_links_and_replaces(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "deep" / "out"
    (work / "index").mkdir(parents=True)
    (work / "index" / "a.npy").write_bytes(b"a")
    (work / "b.json").write_bytes(b"b")
    out.mkdir(parents=True)
    (out / "stale").touch()
    publish(work, out, ["index", "b.json"])
    assert names(out) == ["b.json", "index"]
    assert (out / "b.json").stat().st_ino == (work / "b.json").stat().st_ino
    assert (out / "index" / "a.npy").stat().st_ino == (work / "index" / "a.npy").stat().st_ino
    publish(work, out, {"runs/one": "index", "two.json": "b.json"})
    assert names(out) == ["runs", "two.json"]
    assert (out / "runs" / "one" / "a.npy").read_bytes() == b"a"


def test_what_a_killed_run_left_half_written_is_not_published(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    (work / "run").mkdir(parents=True)
    (work / "run" / "model").write_bytes(b"whole")
    (work / "run" / ".model.77.tmp").write_bytes(b"ha")
    publish(work, out, ["run"])
    assert names(out / "run") == names(work / "run") == ["model"]


def test_publishing_across_file_systems_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    work = tmp_path / "work"
    work.mkdir()
    (work / "a").write_bytes(b"a")
    publish(work, tmp_path / "out", ["a"])
    assert (tmp_path / "out" / "a").read_bytes() == b"a"


def test_publishing_shards_drops_what_no_job_asks_for(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    for shard in (0, 1, 2):
        write(work, shard)
    (work / "spool").mkdir()
    publish_shards(work, out, [0, 2])
    wanted = [f"0000{s}.{e}" for s in (0, 2) for e in ("fbank.npy", "logmel.npy", "parquet")]
    assert names(out) == wanted
    assert names(work) == [*wanted, "spool"]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.json"

    def begin() -> None:
        with atomic(target) as f:
            f.write(b"half")
            assert not target.exists()
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        begin()
    assert names(target.parent) == []
    write_json(target, {"b": 1, "a": "ü"})
    assert target.read_text() == '{\n "a": "ü",\n "b": 1\n}\n'


def test_fingerprints_are_of_values(tmp_path: Path) -> None:
    assert fingerprint({"a": 1, "b": [2]}, "x") == fingerprint({"b": [2], "a": 1}, "x")
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert len(fingerprint()) == 16


def test_the_code_s_version_is_of_the_sources_named() -> None:
    assert code_version(["shards.py"]) != code_version(["clips.py"])
    assert code_version(["shards.py", "clips.py"]) == code_version(["clips.py", "shards.py"])
    assert code_version(["training"]) != code_version(["training/loop.py"])
    with pytest.raises(FileNotFoundError):
        code_version(["no_such_module.py"])


def test_the_ledger_s_columns_come_first(tmp_path: Path) -> None:
    write(tmp_path)
    assert pq.read_schema(shard_path(tmp_path, 0)).names[:4] == ["clip_id", "status", "reason", "message"]


def test_a_buffer_of_another_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    array = DenseArray(tmp_path, 0, "fbank")
    for out in (np.empty((2, 4), np.float32), np.empty((2, 5), np.float16)):
        with pytest.raises(ValueError, match="cannot fill"):
            array.read_into(0, out)


VECTORS = vectors_type("float16", 2, 3)


def write_vectors(folder: Path, given: list[Any], kind: pa.DataType = VECTORS) -> list[Any]:
    with ShardWriter(folder, 0, fingerprint="f", columns={"v": kind, "n": pa.int64()}, rows_per_group=2) as out:
        for i, value in enumerate(given):
            if isinstance(value, str):
                out.skip(value, "qc.silent")
            else:
                out.write(f"c{i}", v=value, n=i)
    return pq.read_table(shard_path(folder, 0)).to_pylist()


def test_arrays_become_fixed_size_lists_and_failed_clips_null(tmp_path: Path) -> None:
    given = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float16)
    # the gap is in a group with others, the last group is of nothing but gaps
    found = write_vectors(tmp_path, [given[0], "gap", given[2], given[3], "gap too", "and this"])
    assert [r["status"] for r in found] == ["ok", "failed", "ok", "ok", "failed", "failed"]
    for row, value in zip(found, [given[0], None, given[2], given[3], None, None], strict=True):
        assert (row["v"] is None) == (row["n"] is None) == (value is None)
        assert value is None or np.array_equal(np.array(row["v"], np.float16), value)
    kind = pq.read_schema(shard_path(tmp_path, 0)).field("v").type
    assert (kind.list_size, kind.value_type.list_size, kind.value_type.value_type) == (2, 3, pa.float16())
    assert not kind.value_type.value_field.nullable
    assert [r["clip_id"] for r in read_shard(tmp_path, 0, ["v"])] == ["c0", "c2", "c3"]


def test_an_array_and_the_list_of_its_vectors_are_the_same_content(tmp_path: Path) -> None:
    given = np.random.default_rng(1).normal(size=(4, 2, 3)).astype(np.float16)
    kind = pa.list_(pa.list_(pa.float16(), 3), 2)
    rows_of = {
        "array": write_vectors(tmp_path / "array", list(given), kind),
        "list": write_vectors(tmp_path / "list", [list(v) for v in given], kind),
        "wide": write_vectors(tmp_path / "wide", list(given.astype(np.float64)), kind),
        "strided": write_vectors(tmp_path / "strided", list(np.asfortranarray(given)), kind),
    }
    assert len({json.dumps(r) for r in rows_of.values()}) == 1
    assert len({facts(tmp_path / name, 0)["digest"] for name in rows_of}) == 1
    one_bit = given.copy()
    one_bit[3, 1, 2] = np.nextafter(one_bit[3, 1, 2], np.float16(9))
    write_vectors(tmp_path / "other", list(one_bit), kind)
    assert facts(tmp_path / "other", 0)["digest"] != facts(tmp_path / "array", 0)["digest"]


@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 1), (6,), (2, 4)])
def test_an_array_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"v of c0: expected \(2, 3\), found"):
        write_vectors(tmp_path, [np.zeros(shape, np.float16)])
    assert names(tmp_path) == []


def test_vectors_are_not_copied(tmp_path: Path) -> None:
    given = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    found = vectors(given, vectors_type("float32", 2, 3))
    assert found.to_pylist() == given.tolist()
    flat = found.flatten().flatten().to_numpy()
    assert np.shares_memory(flat, given)
    missing = np.array([False, True, False, False])
    assert vectors(given, vectors_type("float32", 2, 3), missing).to_pylist()[1] is None
