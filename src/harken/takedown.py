"""Takedown: a clip that must not be kept leaves everything that was made of it, and a tombstone keeps it out.

The tombstone is written first and what is removed follows from the tombstones alone, so a takedown that was killed is
finished by the next one. Published files share their bytes with the scratch folder and with DVC's cache: each shard is
written anew beside the old one and takes its place, never changed where it lies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harken.attempts import Attempt, AttemptLog, new_id
from harken.clips import Manifest
from harken.config import Paths
from harken.errors import ConfigError, DataError, nearest
from harken.search import folder as text_aware
from harken.search import index
from harken.shards import OK, OUTCOME, DenseArray, Outcome, ShardWriter, atomic, facts, feed, shard_path

FORGOTTEN: Final = "local.forgotten"
MESSAGE: Final = "taken down on request"
FILE: Final = "tombstones.jsonl"
_FIELDS: Final = ("asked", "clip_id", "host", "key", "archive", "when_ms", "who", "why")

# (published folder, scratch folder, whether the clip stays as a failed row): a clip that failed in the first of them
# was never asked of the others
_SHARDED: Final = (("media", "download", True), ("features", "extract", False), ("embeddings", "embed", False))
_WRITERS: Final = ("download", "extract", "embed", "evaluate")


@dataclass(frozen=True, slots=True)
class Tombstone:
    """One clip that is not to be kept: `asked` is the id of the request (the clip's or its video's), `when_ms` UTC."""

    asked: str
    clip_id: str
    host: str
    key: str
    archive: str
    when_ms: int
    who: str
    why: str


@dataclass(slots=True)
class Forgotten:
    """What a takedown did: the clips of the request, which of them are newly so, and how much was removed where.

    `removed` maps each folder to the clips (or files, or rows) that left it, in all takedowns still unfinished.
    `unproven` names shards whose stored digest no reading of their rows explains: they were damaged before.
    """

    clip_ids: tuple[str, ...]
    new: tuple[str, ...]
    removed: dict[str, int] = field(default_factory=dict)
    unproven: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Its fields, for JSON, and what is left to do."""
        told = {"clip_ids": list(self.clip_ids), "new": list(self.new), "removed": self.removed}
        return {**told, "unproven": list(self.unproven), "left_to_do": list(LEFT_TO_DO)}


LEFT_TO_DO: Final = (
    "Run `dvc repro --no-run-cache`: what was trained or measured on the clip is made again without it. Without that "
    "option DVC may bring the old media back from its run cache.",
    "DVC's cache still holds the old files: then run `dvc gc -w`, and `dvc gc -w -c` where there is a remote.",
    "The other presets have folders of their own: repeat this with each that was used.",
    "Trained weights, ranks and lists of ids hold no media and stay until they are made again; a folder that was "
    "imported is yours and was not touched.",
)


def read_tombstones(folder: Path) -> list[Tombstone]:
    """The tombstones in a ledger's folder, in the order they were laid. Raises DataError where one is damaged."""
    path = folder / FILE
    if not path.is_file():
        return []
    stones = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            stones.append(Tombstone(**json.loads(line)))
        except (ValueError, TypeError) as e:
            raise DataError(
                f"{path}:{number}: no tombstone ({e}). Restore the file: it says what must not be kept."
            ) from None
    return stones


def tombstones(folder: Path) -> set[str]:
    """The ids of the clips that are not to be kept, from the tombstones in a ledger's folder."""
    return {s.clip_id for s in read_tombstones(folder)}


def forgotten(folder: Path, clip_ids: Iterable[str]) -> set[str]:
    """Which of `clip_ids` are not to be kept: those with a tombstone, and those of a video that was taken down whole.

    The latter may come from a list that was added after the takedown.
    """
    stones = read_tombstones(folder)
    exact = {s.clip_id for s in stones}
    videos = {s.asked for s in stones if s.host == "youtube" and s.asked == s.key}
    return {i for i in clip_ids if i in exact or (videos and _video(i) in videos)}


def _video(clip_id: str) -> str:
    return clip_id[3:14] if clip_id.startswith("yt:") else ""


def forget(ids: Sequence[str], paths: Paths, *, who: str, why: str, now_ms: int, book: Path | None = None) -> Forgotten:
    """Lay tombstones for `ids` and remove their clips from media, features, embeddings, spool, archives and indices.

    An id is a clip's, or a YouTube video's for all clips of it. Afterwards the media shards read as if the clips had
    failed with `local.forgotten`, the others as if they had never been asked for them, digests included. `book` is the
    folder of attempts that gets an event for each clip (by default the ledger itself). Asking again changes nothing
    and finishes what a killed takedown left.

    Raises ConfigError for an unknown id (with the nearest known one) or an empty reason, before anything is changed,
    and DataError while a stage is running.
    """
    if not ids or not who.strip() or not why.strip():
        raise ConfigError("forget: say which clips, who asks (--who NAME) and why (--why TEXT): the record must tell.")
    with _alone(paths):
        known = read_tombstones(paths.ledger)
        wanted = _resolve(ids, paths, known)
        had = {s.clip_id for s in known}
        new = [
            Tombstone(**{**w, "when_ms": now_ms, "who": who, "why": why})
            for w in wanted
            if w["clip_id"] not in had or (w["asked"] == w["key"] and not _covers(known, w))
        ]
        _lay(paths.ledger, [*known, *new])
        _record(book or paths.ledger, [*known, *new], new)
        report = Forgotten(tuple(sorted({w["clip_id"] for w in wanted})), tuple(sorted({s.clip_id for s in new} - had)))
        _sweep(paths, [*known, *new], report)
    return report


def _covers(known: Iterable[Tombstone], wanted: Mapping[str, Any]) -> bool:
    return any(s.asked == wanted["asked"] and s.clip_id == wanted["clip_id"] for s in known)


@contextlib.contextmanager
def _alone(paths: Paths) -> Iterator[None]:
    """No stage of this preset and no other takedown runs meanwhile; a stage that is started waits."""
    paths.ledger.mkdir(parents=True, exist_ok=True)
    paths.work.mkdir(parents=True, exist_ok=True)
    names = {paths.work / f"{n}.lock" for n in _WRITERS} | set(paths.work.glob("*.lock"))
    with contextlib.ExitStack() as stack:
        for path in [paths.ledger / "tombstones.lock", *sorted(names)]:
            file = stack.enter_context(open(path, "a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"{path}: a stage or another takedown is running. Wait for it or stop it, then run "
                    "`harken forget` again."
                ) from None
        yield


def _resolve(ids: Sequence[str], paths: Paths, known: Sequence[Tombstone]) -> list[dict[str, Any]]:
    """The clips that `ids` name, each with the id that named it. Raises ConfigError for an id that names none."""
    clips = _listed(paths, known)
    wanted: list[dict[str, Any]] = []
    for asked in dict.fromkeys(ids):
        found = _named(clips, asked)
        if not found:  # perhaps of a list that is no longer in the manifest
            found = _named(_stored_clips(paths), asked)
        if not found:
            guess = nearest(asked, _similar(clips, asked))
            raise ConfigError(
                f"forget: no clip and no video {asked!r} is known here."
                + (f" Did you mean {guess!r}?" if guess else "")
                + " Nothing was changed."
            )
        wanted += [{"asked": asked, **row} for row in found]
    return wanted


def _named(clips: pa.Table, asked: str) -> list[dict[str, Any]]:
    is_video = pc.and_(pc.equal(clips["host"], "youtube"), pc.equal(clips["key"], asked))
    found: list[dict[str, Any]] = clips.filter(pc.or_(pc.equal(clips["clip_id"], asked), is_video)).to_pylist()
    return found


_CLIP: Final = pa.schema([(n, pa.string()) for n in ("clip_id", "host", "key", "archive")])


def _listed(paths: Paths, known: Sequence[Tombstone]) -> pa.Table:
    """Every clip of the manifest and of the tombstones, once each."""
    tables = [pa.Table.from_pylist([{n: getattr(s, n) for n in _CLIP.names} for s in known], _CLIP)]
    if (paths.manifest / "clips.parquet").is_file():
        tables.append(Manifest.read(paths.manifest).table.select(_CLIP.names).cast(_CLIP))
    both = pa.concat_tables(tables)
    return both.group_by(_CLIP.names, use_threads=False).aggregate([]).select(_CLIP.names)


def _stored_clips(paths: Paths) -> pa.Table:
    """Every clip that a shard has a row of."""
    ids = sorted({i for folder, _ in _folders(paths) for shard in _shards(folder) for i in _clip_ids(folder, shard)})
    rows = [{"clip_id": i, "host": "youtube" if _video(i) else "", "key": _video(i), "archive": ""} for i in ids]
    return pa.Table.from_pylist(rows, _CLIP)


def _similar(clips: pa.Table, asked: str) -> list[str]:
    """Ids that share their first or last letters with `asked`: a few of perhaps two million to compare with."""
    found: set[str] = set()
    for column in ("clip_id", "key"):
        near = pc.or_(pc.starts_with(clips[column], asked[:6]), pc.ends_with(clips[column], asked[-6:]))
        found.update(clips[column].filter(near).to_pylist()[:2000])
    if not found and len(clips) <= 20_000:
        found.update(clips["clip_id"].to_pylist() + clips["key"].to_pylist())
    return sorted(found - {""})


def _lay(folder: Path, stones: Sequence[Tombstone]) -> None:
    for leftover in folder.glob(f".{FILE}.*.tmp"):
        leftover.unlink()
    lines = [json.dumps({n: getattr(s, n) for n in _FIELDS}, ensure_ascii=False) for s in stones]
    with atomic(folder / FILE) as f:
        f.write("".join(line + "\n" for line in lines).encode())


def _record(book: Path, stones: Sequence[Tombstone], new: Collection[Tombstone]) -> None:
    """An event in the ledger of attempts for each tombstone that has none yet.

    The event's id follows from the tombstone, so one that is written twice counts once.
    """
    for when_ms in sorted({s.when_ms for s in stones}):
        run_id = f"takedown-{when_ms}"
        is_sealed = any((book / run_id).glob("*.parquet"))
        known = "".join(p.read_text(encoding="utf-8") for p in (book / run_id).glob("*.jsonl"))
        events = [_event(s, run_id) for s in stones if s.when_ms == when_ms and (s in new or not is_sealed)]
        if lacking := [e for e in events if e.attempt_id not in known]:
            with AttemptLog(book, run_id, "forget") as log:
                for event in lacking:
                    log.append(event)


def _event(stone: Tombstone, run_id: str) -> Attempt:
    rng = random.Random(f"{stone.clip_id} {stone.asked} {stone.when_ms}")
    return Attempt(
        attempt_id=new_id(stone.when_ms, rng),
        run_id=run_id,
        worker="forget",
        lane="takedown",
        clip_id=stone.clip_id,
        step="fetch",
        began_ms=stone.when_ms,
        ended_ms=stone.when_ms,
        outcome="failed",
        reason=FORGOTTEN,
        rule_version="",
        message=MESSAGE,
        facts={"asked": stone.asked, "who": stone.who, "why": stone.why},
        tools={},
    )


def _folders(paths: Paths) -> list[tuple[Path, bool]]:
    """Every folder of shards, published and scratch, and whether a clip that goes stays there as a failed row."""
    found = [
        (folder, stays)
        for published, stage, stays in _SHARDED
        for folder in (getattr(paths, published), paths.work / stage)
        if folder.is_dir()
    ]
    return [*found, *((folder, False) for folder in sorted((paths.work / "train-frames").glob("*")) if folder.is_dir())]


def _shards(folder: Path) -> list[int]:
    return sorted(int(p.stem) for p in folder.glob("*.parquet") if p.stem.isdigit())


def _clip_ids(folder: Path, shard: int) -> list[str]:
    return pq.read_table(shard_path(folder, shard), columns=["clip_id"])["clip_id"].to_pylist()


def _sweep(paths: Paths, stones: Sequence[Tombstone], report: Forgotten) -> None:
    """Remove every clip with a tombstone from everywhere."""
    gone = {s.clip_id for s in stones}
    removed: Counter[str] = Counter()
    unproven: list[str] = []
    for folder, stays in _folders(paths):
        _drop_leftovers(folder)
        for shard in _shards(folder):
            if n := _rewrite(folder, shard, gone, stays, unproven):
                removed[str(folder)] += n
        for name in ("captions.parquet", "quality.parquet"):
            if n := _drop_rows(folder / name, gone):
                removed[str(folder / name)] += n
    names = {hashlib.sha1(i.encode()).hexdigest() for i in gone}
    for path in (paths.work / "download" / "spool").rglob("*"):
        if path.name in names:
            path.unlink()
            removed["spool"] += 1
    removed.update(_drop_members(paths.work / "archives", stones))
    for place in (paths.evaluations, paths.work / "evaluate"):
        _drop_leftovers(place)
        for folder in sorted({p.parent for p in place.rglob(index.CLIPS)}):
            if n := _drop_from_index(folder, gone):
                removed[str(folder)] += n
    report.removed, report.unproven = dict(removed), tuple(unproven)


def _drop_leftovers(folder: Path) -> None:
    """What a killed stage or takedown left: unfinished files, and dense arrays whose shard is not there."""
    for path in folder.rglob(".*.tmp"):
        path.unlink()
    for path in folder.glob("*.npy"):
        if not (folder / f"{path.name.partition('.')[0]}.parquet").is_file():
            path.unlink()


class _Stored:
    """A shard as it lies on the disk, row by row, with what `ShardWriter` needs to write it again."""

    def __init__(self, folder: Path, shard: int) -> None:
        self.facts = facts(folder, shard)
        self._file = pq.ParquetFile(shard_path(folder, shard))
        schema = self._file.schema_arrow
        dense = [n.removesuffix("_start") for n in schema.names if n.endswith("_start")]
        self._arrays = {n: DenseArray(folder, shard, n) for n in dense if f"{n}_rows" in schema.names}
        apart = {n for n, _ in OUTCOME} | {f"{n}_{end}" for n in self._arrays for end in ("start", "rows")}
        self.columns = {f.name: _plain(f.type) for f in schema if f.name not in apart}
        self.arrays = {n: (int(a.shape[1]), a.dtype.str) for n, a in self._arrays.items()}
        groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups)]
        self.rows_per_group = min(groups[:-1], default=max(64, *groups, 64))

    def rows(self, as_written: Callable[[Any, pa.DataType], Any]) -> Iterator[tuple[Outcome, dict[str, Any]]]:
        """(outcome, values) of each row; no values where the clip failed."""
        for i in range(self._file.metadata.num_row_groups):
            for row in self._file.read_row_group(i).to_pylist():
                outcome = Outcome(*(row[n] for n, _ in OUTCOME))
                if outcome.status != OK:
                    yield outcome, {}
                    continue
                values = {n: as_written(row[n], kind) for n, kind in self.columns.items()}
                for name, array in self._arrays.items():
                    values[name] = np.empty((row[f"{name}_rows"], array.shape[1]), array.dtype)
                    array.read_into(row[f"{name}_start"], values[name])
                yield outcome, values

    def digest(self, as_written: Callable[[Any, pa.DataType], Any]) -> str:
        """The digest that `ShardWriter` gives to these rows."""
        digest = hashlib.blake2b(digest_size=16)
        for outcome, values in self.rows(as_written):
            feed(digest, list(outcome[:3]))
            for value in values.values():
                feed(digest, value)
        return digest.hexdigest()

    def close(self) -> None:
        self._file.close()


def _plain(kind: pa.DataType) -> pa.DataType:
    """A list type with Arrow's own names for its elements, as stages declare them; Parquet gives them others."""
    if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)):
        return kind
    element = pa.field("item", _plain(kind.value_type), nullable=kind.value_field.nullable)
    return pa.list_(element, kind.list_size if pa.types.is_fixed_size_list(kind) else -1)


def _as_declared(table: pa.Table) -> pa.Table:
    return table.cast(pa.schema([(f.name, _plain(f.type)) for f in table.schema], table.schema.metadata))


def _as_python(value: Any, kind: pa.DataType) -> Any:
    return value


def _as_vectors(value: Any, kind: pa.DataType) -> Any:
    """A list of vectors as the arrays that were written, for Parquet does not tell them from lists of numbers."""
    is_list = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)
    if value is None or not (is_list and pa.types.is_fixed_size_list(kind.value_type)):
        return value
    return [np.array(v, kind.value_type.value_type.to_pandas_dtype()) for v in value]


def _rewrite(folder: Path, shard: int, gone: Collection[str], stays: bool, unproven: list[str]) -> int:
    """Write one shard without the clips in `gone`; how many it had. Clips that stay as failed rows count once."""
    table = pq.read_table(shard_path(folder, shard), columns=["clip_id", "reason"])
    rows = zip(table["clip_id"].to_pylist(), table["reason"].to_pylist(), strict=True)
    going = {i for i, reason in rows if i in gone and not (stays and reason == FORGOTTEN)}
    if not going:
        return 0
    stored = _Stored(folder, shard)
    meta = dict(reversed(stored.facts.items()))  # Arrow writes them last to first
    mark, digest = meta.pop("fingerprint"), meta.pop("digest")
    reading = next((r for r in (_as_python, _as_vectors) if stored.digest(r) == digest), None)
    if reading is None:
        unproven.append(str(shard_path(folder, shard)))
    with ShardWriter(
        folder,
        shard,
        fingerprint=mark,
        columns=stored.columns,
        arrays=stored.arrays,
        meta=meta,
        rows_per_group=stored.rows_per_group,
    ) as out:
        for outcome, values in stored.rows(reading or _as_python):
            if outcome.clip_id in going:
                if stays:
                    out.skip(outcome.clip_id, FORGOTTEN, MESSAGE)
            elif outcome.status == OK:
                out.write(outcome.clip_id, **values)
            else:
                out.skip(outcome.clip_id, outcome.reason, outcome.message)
        stored.close()
        if stored.arrays:
            # the old rows must not be read with the new arrays: a stop from here on leaves no shard, and its stage
            # makes it again
            shard_path(folder, shard).unlink()
    return len(going)


def _drop_rows(path: Path, gone: Collection[str]) -> int:
    if not path.is_file():
        return 0
    table = pq.read_table(path)
    goes = pc.is_in(table["clip_id"], pa.array(sorted(gone), pa.string()))
    if n := pc.sum(goes).as_py() or 0:
        kept = _as_declared(table.filter(pc.invert(goes)))
        with atomic(path) as f:
            pq.write_table(kept, f, compression="lz4", use_dictionary=["dataset", "split"], write_statistics=False)
    return int(n)


def _drop_members(archives: Path, stones: Iterable[Tombstone]) -> dict[str, int]:
    """Delete the unpacked recordings, and the packed archives that hold them too; both only serve to fetch."""
    removed: Counter[str] = Counter()
    for stone in stones:
        if not stone.archive or "/" in stone.archive or stone.archive.startswith("."):
            continue
        for path in (archives / stone.archive).rglob("*"):
            if path.name == stone.key and path.is_file():
                path.unlink()
                removed[str(archives / stone.archive)] += 1
        for packed in archives.glob("*"):
            if packed.is_file() and packed.name.startswith(f"{stone.archive}.7z"):
                packed.unlink()
                removed[str(packed)] += 1
    return dict(removed)


def _drop_from_index(folder: Path, gone: Collection[str]) -> int:
    if text_aware.is_text_aware(folder):
        return text_aware.drop(folder, gone)
    if not (folder / index.FACTS).is_file():  # the takedown before this one was killed here
        for name in (index.EMBEDDINGS, index.CLIPS):
            (folder / name).unlink(missing_ok=True)
        return 0
    found = index.load(folder)
    stays = np.array([i not in gone for i in found.clips["clip_id"].to_pylist()], bool)
    if stays.all():
        return 0
    kept = _as_declared(found.clips.filter(pa.array(stays)))
    index.Index(np.array(found.embeddings[stays]), kept).save(folder)
    return int((~stays).sum())


def describe(report: Forgotten) -> list[str]:
    """What was done, in lines for people."""
    lines = [f"{len(report.clip_ids)} clips are forgotten, {len(report.new)} of them since now"]
    lines += [f"removed from {where}: {n}" for where, n in report.removed.items()]
    lines += [f"{path}: its digest did not fit its rows before; check that shard's stage" for path in report.unproven]
    return [*lines, *LEFT_TO_DO]
