"""The ledger of attempts: what was asked, when, of whom, and what came back. Append-only; a clip's state is derived.

`folder/<run_id>/<worker>.jsonl` is written by one process, a line per attempt; `seal` turns finished ones into
`<worker>.attempts.parquet`. Verdicts on the past are `rulings-NNNNN.parquet` beside them (attempt_id, reason,
rule_version): no stored attempt is ever overwritten.

The state of a clip (`fold`), by its attempts in order of (ended_ms, attempt_id), each attempt_id once:

 1. No evidence: canaries; failed attempts of a lane that ended within the range of one of its void events. They are
    left out as if they had never been there. A clip with nothing else has no row: it is unvisited.
 2. No attempt ends after `now_ms`: a clock that ran ahead is set back to it.
 3. An ok fetch or import makes the clip `ok` for good; what a census says later moves `last_ok_ms` and
    `first_missing_ms` only. An ok census takes back every failure before it: the clip is there, and due at once
    (`retry` with no reason).
 4. A failure speaks by its reason's `Policy`. Those that are not counted never speak against the clip.
    With `confirmations` 1 it is a verdict at once. With n > 1 it is a suspicion until n observations of that very
    reason stand, each at least `gap_s` after the one before that counted, with nothing between that shows the video to
    exist (an ok, or a verdict of the groups denied and content). With 0 it passes, and no number of it is a verdict.
 5. The latest verdict since the last ok is the state: that of its group, `gone` for a confirmed suspicion of the group
    unknown. Without one the latest counted failure speaks: `suspect`, `retry`, or `exhausted` once `max_attempts` of
    its policy have been used since; without one of those either, the latest failure: `retry`.
 6. `next_ms`, the earliest time to ask again, is the later of what the latest counted failure and the latest failure
    ask for: the wait of its policy (by how often that policy was met since the last verdict or ok), or Retry-After
    where that is longer; `recheck_s` after a verdict, and after a recheck that was itself exhausted. It is NA (never)
    for `ok` and `exhausted` and where the verdict has no recheck.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from harken.errors import ConfigError, DataError, unknown
from harken.shards import atomic, sync_folder

if TYPE_CHECKING:  # a worker that only appends need not pay for it
    import pandas as pd

STEPS: Final = ("census", "fetch", "import", "canary")
OUTCOMES: Final = ("ok", "failed", "void")
STATES: Final = ("ok", "gone", "denied", "content", "suspect", "retry", "exhausted")

_WORD = pa.dictionary(pa.int32(), pa.string())
SCHEMA: Final = pa.schema(
    [
        ("attempt_id", pa.string()),
        ("run_id", _WORD),
        ("worker", _WORD),
        ("lane", _WORD),
        ("clip_id", pa.string()),
        ("step", _WORD),
        ("began_ms", pa.int64()),
        ("ended_ms", pa.int64()),
        ("outcome", _WORD),
        ("reason", _WORD),
        ("rule_version", _WORD),
        ("message", _WORD),
        ("facts", pa.string()),
        ("tools", _WORD),
    ]
)
"""An attempt as it is stored; `facts` and `tools` are JSON objects as text. `read` adds `reason_then`."""

FOLD_COLUMNS: Final = ("attempt_id", "lane", "clip_id", "step", "ended_ms", "outcome", "reason", "message", "facts")
"""What `fold` needs of a table: `fold(read(folder, FOLD_COLUMNS), ...)` spares memory."""

_RULING = pa.schema([("attempt_id", pa.string()), ("reason", _WORD), ("rule_version", _WORD)])
_SEALED = ".attempts.parquet"
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_ID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
_NAME = re.compile(r"[A-Za-z0-9][\w.+@-]*", re.ASCII)
_BLOCK_BYTES = 16 << 20
_LONGEST_LINE_BYTES = 4 << 20  # a line must fit into a block of the reader
_LONGEST_RETRY_AFTER_S = 366 * 86_400.0
_FACTS: Final[dict[str, tuple[type, ...]]] = {
    "http_status": (int,),
    "exception": (str,),
    "where": (str,),
    "countries": (list, tuple),
    "expected": (bool,),
    "retry_after_s": (int, float),
}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at one clip, or an event of a lane.

    `attempt_id` is a ULID (`new_id`); `began_ms` and `ended_ms` are UTC epoch milliseconds. `outcome` `failed` has a
    canonical `reason`, given by the rules of `rule_version` for the normalised `message` and the `facts` (a JSON-able
    dict); `ok` has none. `tools` maps names to versions. An event with `outcome` `void` takes evidence back: its facts
    {"lane", "from_ms", "to_ms"} say which failed attempts, by the time they ended (both ends included).
    """

    attempt_id: str
    run_id: str
    worker: str
    lane: str
    clip_id: str
    step: str
    began_ms: int
    ended_ms: int
    outcome: str
    reason: str
    rule_version: str
    message: str
    facts: Mapping[str, Any]
    tools: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Policy:
    """What a failure for one reason means for the clip, and when to ask again.

    `group` is the reason's roll-up. `is_counted` is False where the failure is ours and says nothing of the clip.
    `confirmations` is how many observations, each at least `gap_s` after the one before, make it a verdict: 1 at once,
    0 never (it passes). `delays_s[n-1]` is the wait after the n-th attempt that met this policy; the last one repeats.
    After `max_attempts` a passing failure is exhausted. `recheck_s` is the wait after a verdict (None: never again).
    """

    group: str
    is_counted: bool
    confirmations: int
    gap_s: float
    delays_s: tuple[float, ...]
    max_attempts: int
    recheck_s: float | None

    def __post_init__(self) -> None:
        problem = ""
        if self.confirmations < 0 or self.gap_s < 0 or any(d < 0 for d in self.delays_s) or (self.recheck_s or 0) < 0:
            problem = "a count or a time is negative"
        elif self.confirmations and not self.is_counted:
            problem = "what is not counted cannot become a verdict: confirmations must be 0"
        elif self.confirmations and self.group not in _VERDICTS:
            problem = f"no verdict follows from the group {self.group!r}. Known: {', '.join(_VERDICTS)}"
        elif self.confirmations != 1 and not self.delays_s:
            problem = "delays_s is empty: say how long to wait before the next attempt"
        elif self.is_counted and self.confirmations == 0 and self.max_attempts < 1:
            problem = "max_attempts must be at least 1"
        if problem:
            raise ConfigError(f"{self}: {problem}.")


_VERDICTS: Final = {"gone": "gone", "unknown": "gone", "denied": "denied", "content": "content"}


def new_id(ms: int, rng: random.Random) -> str:
    """A ULID for the time `ms` (UTC epoch milliseconds): ids sort by time. `rng` gives its other 80 bits.

    Two writers must not draw from equally seeded generators: an id that is met twice counts once.
    """
    if not 0 <= ms < 1 << 48:
        raise ConfigError(f"attempt id: {ms} is no time in epoch milliseconds (0 <= ms < 2**48).")
    value = ms << 80 | rng.getrandbits(80)
    return "".join(_CROCKFORD[value >> shift & 31] for shift in range(125, -1, -5))


class AttemptLog:
    """Appends attempts to `folder/<run_id>/<worker>.jsonl`, which this process alone writes.

        with AttemptLog(folder, run_id, worker) as log:
            log.append(attempt)     # kept in memory
            log.flush()             # on the disk, whatever happens next

    The end of the block flushes too, whether or not an exception ends it. An attempt is in the ledger when its whole
    line is: what a killed process or a full disk left behind of a line is cut off before the next one is written.
    """

    def __init__(self, folder: Path, run_id: str, worker: str) -> None:
        for what, name in (("run_id", run_id), ("worker", worker)):
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{what} {name!r}: expected a file name of letters, digits and . _ + @ -")
        self.path = folder / run_id / f"{worker}.jsonl"
        self._lines: list[bytes] = []
        self._fd = -1

    def __enter__(self) -> AttemptLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = _lock(self.path)
        if self._fd < 0:
            raise DataError(f"{self.path}: another process is writing here. Give every worker a name of its own.")
        self._size = _whole_bytes(self.path.read_bytes())
        os.ftruncate(self._fd, self._size)  # of a line that was cut short
        sync_folder(self.path.parent)  # the file's name must survive, too
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
        finally:
            _unlock(self._fd)
            self._fd = -1

    def append(self, attempt: Attempt) -> None:
        """Remember an attempt until the next `flush`. Raises ValueError for one that could not be read back."""
        self._lines.append(_line(attempt))

    def flush(self) -> None:
        """Make durable what was appended: one write, one fsync. After an OSError all of it is still to be flushed."""
        if self._fd < 0:
            raise ValueError(f"{self.path}: not open. Use AttemptLog in a with statement.")
        if not self._lines:
            return
        data = memoryview(b"".join(self._lines))
        try:
            done = 0
            while done < len(data):
                done += os.write(self._fd, data[done:])
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self._size)  # no torn line may stand before the next try
            raise
        self._size += len(data)
        self._lines.clear()


def _line(attempt: Attempt) -> bytes:
    """One attempt as a line of JSON, checked: a ledger that cannot be read back would be no ledger."""
    a = attempt
    if not _ID.fullmatch(a.attempt_id):
        raise ValueError(f"attempt_id {a.attempt_id!r}: expected a ULID of 26 characters; make it with new_id.")
    if a.step not in STEPS:
        raise unknown(f"attempt {a.attempt_id}: step", a.step, STEPS)
    if a.outcome not in OUTCOMES:
        raise unknown(f"attempt {a.attempt_id}: outcome", a.outcome, OUTCOMES)
    if bool(a.reason) != (a.outcome == "failed"):
        raise ValueError(
            f"attempt {a.attempt_id}: outcome {a.outcome!r} with reason {a.reason!r}. Failed ones have one."
        )
    for name, types in _FACTS.items():
        value = a.facts.get(name)
        if value is not None and not (isinstance(value, types) and isinstance(value, bool) == (bool in types)):
            expected = " or ".join(t.__name__ for t in types)
            raise ValueError(f"attempt {a.attempt_id}: fact {name}={value!r}: expected {expected}.")
    if a.outcome == "void":
        _void(a.attempt_id, a.facts)
    record = {**_fields(a), "facts": _json(a.facts), "tools": _json(a.tools)}
    line = (_json(record) + "\n").encode("utf-8", "replace")  # half a surrogate pair is no text that others can read
    if len(line) > _LONGEST_LINE_BYTES:
        raise ValueError(
            f"attempt {a.attempt_id}: {len(line)} bytes in a line; at most {_LONGEST_LINE_BYTES} can be kept."
        )
    return line


def _fields(attempt: Attempt) -> dict[str, Any]:
    return {name: getattr(attempt, name) for name in SCHEMA.names}


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} {value!r} cannot be written as JSON")


_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_as_json).encode


def _lock(path: Path) -> int:
    """An open descriptor of `path`, locked for this process; -1 where another one has it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return -1
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        _unlock(fd)  # it was sealed, hence removed, between opening and locking


def _unlock(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_UN)  # said aloud: a forked child may hold a copy of the descriptor
    os.close(fd)


def _whole_bytes(data: bytes) -> int:
    """How many bytes are whole lines."""
    return data.rfind(b"\n") + 1


def seal(folder: Path, keep: Collection[str]) -> int:
    """Turn the finished JSONL segments of all runs but those in `keep` into one Parquet file each; how many.

    A segment that a process still writes is left alone. Killed at any point and run again, the ledger holds the same:
    the Parquet file appears whole, then the JSONL goes, and an attempt that is in both counts once.
    """
    n_sealed = 0
    for path in sorted(folder.glob("*/*.jsonl")):
        if path.parent.name in keep:
            continue
        fd = _lock(path)
        if fd < 0:
            continue
        try:
            _seal_segment(path)
            n_sealed += 1
        finally:
            _unlock(fd)
    return n_sealed


def _seal_segment(path: Path) -> None:
    sealed = path.with_name(path.stem + _SEALED)
    for leftover in path.parent.glob(f".{sealed.name}.*.tmp"):  # of a process that was killed while sealing
        leftover.unlink()
    table = _read_lines(path)
    if sealed.exists():  # the worker of a run that went on after it had been sealed
        table = _once(pa.concat_tables([_read_sealed(sealed), table]))
    if table.num_rows:
        with atomic(sealed) as f:
            pq.write_table(table.sort_by("attempt_id").unify_dictionaries(), f, compression="zstd")
        sync_folder(path.parent)
    path.unlink(missing_ok=True)


def read(folder: Path, columns: Sequence[str] = ()) -> pa.Table:
    """All attempts of a ledger, each attempt_id once, in no particular order: SCHEMA and `reason_then`.

    `reason` and `rule_version` are the newest ruling's where there is one; `reason_then` is what was stored with the
    attempt. `columns` chooses some of them (by default all). A last line that was cut short is no attempt. A folder
    that does not exist holds none. Raises DataError for a file that is damaged.
    """
    wanted = list(columns) or [*SCHEMA.names, "reason_then"]
    if missing := [c for c in wanted if c not in SCHEMA.names and c != "reason_then"]:
        raise unknown("attempts: column", missing[0], [*SCHEMA.names, "reason_then"])
    stored = [c for c in SCHEMA.names if c in {*wanted, "attempt_id", "reason", "rule_version"}]
    # the lines first: what is sealed meanwhile is then found in Parquet, and an attempt found twice counts once
    tables = [_read_lines(p).select(stored) for p in sorted(folder.glob("*/*.jsonl"))]
    tables += [_read_sealed(p, stored) for p in sorted(folder.glob(f"*/*{_SEALED}"))]
    table = _once(pa.concat_tables([_empty(stored), *tables]).unify_dictionaries())
    return _ruled(table, folder).select(wanted)


def _empty(names: Iterable[str]) -> pa.Table:
    return pa.schema([SCHEMA.field(n) for n in names]).empty_table()


def _read_lines(path: Path) -> pa.Table:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return SCHEMA.empty_table()  # sealed since it was listed
    size = _whole_bytes(data)
    if not size:
        return SCHEMA.empty_table()
    plain = pa.schema([(f.name, pa.string() if f.type == _WORD else f.type) for f in SCHEMA])
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(pa.py_buffer(data).slice(0, size)),
            read_options=pyarrow.json.ReadOptions(block_size=min(_BLOCK_BYTES, size)),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=plain, unexpected_field_behavior="error"),
        )
    except pa.ArrowInvalid as e:
        raise DataError(
            f"{path}: a line is no attempt ({e}). Every line but an unfinished last one must be a JSON object as "
            "AttemptLog writes them. Copy the file, remove the damaged line, and say so beside it."
        ) from None
    if holes := [name for name in SCHEMA.names if table[name].null_count]:
        raise DataError(f"{path}: {', '.join(holes)} missing in some lines. Restore the file from a copy.")
    return table.select(SCHEMA.names).cast(SCHEMA)


def _read_sealed(path: Path, names: Sequence[str] = SCHEMA.names) -> pa.Table:
    try:
        return pq.ParquetFile(path).read(list(names)).cast(pa.schema([SCHEMA.field(n) for n in names]))
    except (pa.ArrowInvalid, pa.ArrowKeyError, ValueError) as e:
        raise DataError(f"{path}: not a sealed segment of a ledger ({e}). Restore it from a copy.") from None


def _once(table: pa.Table) -> pa.Table:
    """`table` with each attempt_id once."""
    if pc.count_distinct(table["attempt_id"]).as_py() == table.num_rows:
        return table
    rows = pa.table({"attempt_id": table["attempt_id"], "row": pa.array(np.arange(table.num_rows))})
    first = rows.group_by("attempt_id").aggregate([("row", "min")])["row_min"]
    return table.take(first.take(pc.sort_indices(first)))


def write_rulings(folder: Path, rulings: pa.Table) -> Path | None:
    """Lay new verdicts on past attempts beside the segments; None where there are none.

    `rulings` has attempt_id, reason and rule_version (more columns are left out). Of several rulings on an attempt the
    one written last holds.
    """
    if not rulings.num_rows:
        return None
    numbers = [int(p.stem.rpartition("-")[2]) for p in folder.glob("rulings-*.parquet")]
    path = folder / f"rulings-{max(numbers, default=0) + 1:05d}.parquet"
    with atomic(path) as f:
        pq.write_table(rulings.select(_RULING.names).cast(_RULING), f, compression="zstd")
    return path


def _ruled(table: pa.Table, folder: Path) -> pa.Table:
    """`table` with `reason` and `rule_version` by the newest ruling and the stored reason in `reason_then`."""
    table = table.append_column("reason_then", table["reason"])
    paths = sorted(folder.glob("rulings-*.parquet"), reverse=True)
    if not paths:
        return table
    rulings = _once(pa.concat_tables([pq.read_table(p, schema=_RULING) for p in paths]).unify_dictionaries())
    row = pc.index_in(table["attempt_id"], rulings["attempt_id"].combine_chunks())
    for name in ("reason", "rule_version"):
        newest = rulings[name].cast(pa.string()).take(row)
        column = pc.coalesce(newest, table[name].cast(pa.string())).dictionary_encode()
        table = table.set_column(table.schema.get_field_index(name), SCHEMA.field(name), column)
    return table


class _Rows(NamedTuple):
    """The evidence in order: by clip, then by (ended_ms, attempt_id). All arrays are (row,), but for `starts`."""

    starts: np.ndarray  # (clip,) first row of each clip
    clip: np.ndarray  # 0 .. n_clips-1
    ended_ms: np.ndarray
    is_stored: np.ndarray  # a fetch or an import: if it is ok, the media are here
    is_ok: np.ndarray
    reason: np.ndarray  # an index of the column's dictionary
    message: np.ndarray
    retry_after_ms: np.ndarray

    def last(self, mask: np.ndarray) -> np.ndarray:
        """(clip,) the last row of each clip where `mask` holds, else -1."""
        return np.maximum.reduceat(np.where(mask, np.arange(len(mask)), -1), self.starts)

    def first(self, mask: np.ndarray) -> np.ndarray:
        """(clip,) the first row of each clip where `mask` holds, else the number of rows."""
        return np.minimum.reduceat(np.where(mask, np.arange(len(mask)), len(mask)), self.starts)

    def tally(self, mask: np.ndarray) -> np.ndarray:
        """(clip,) on how many rows of each clip `mask` holds."""
        return np.add.reduceat(mask.astype(np.int64), self.starts)


class _Rules(NamedTuple):
    """Policies as arrays, one entry per reason of the column's dictionary."""

    is_counted: np.ndarray
    confirmations: np.ndarray
    gap_ms: np.ndarray
    max_attempts: np.ndarray
    recheck_ms: np.ndarray  # -1: never again
    verdict: np.ndarray  # an index of STATES
    shows_existence: np.ndarray
    kind: np.ndarray  # equal policies have an equal kind
    delay_ms: np.ndarray  # (reason, n): the wait after the n-th attempt

    @staticmethod
    def of(reasons: Sequence[str], used: Collection[int], policies: Mapping[str, Policy]) -> _Rules:
        passing = Policy("ours", False, 0, 0, (0,), 1, None)  # stands for what no failed row uses
        found = []
        for i, code in enumerate(reasons):
            if i in used and code not in policies:
                raise unknown("attempts: reason", code, policies)
            found.append(policies[code] if i in used else passing)
        found = found or [passing]
        kinds = {p: i for i, p in enumerate(dict.fromkeys(found))}
        longest = max(len(p.delays_s) for p in found)
        ladders = [p.delays_s or (0.0,) for p in found]
        return _Rules(
            np.array([p.is_counted for p in found]),
            np.array([p.confirmations for p in found]),
            np.array([round(p.gap_s * 1000) for p in found]),
            np.array([p.max_attempts for p in found]),
            np.array([-1 if p.recheck_s is None else round(p.recheck_s * 1000) for p in found]),
            np.array([STATES.index(_VERDICTS.get(p.group, "retry")) for p in found]),
            np.array([p.confirmations == 1 and p.group in ("denied", "content") for p in found]),
            np.array([kinds[p] for p in found]),
            np.array([[round(1000 * w[min(n, len(w) - 1)]) for n in range(max(longest, 1))] for w in ladders]),
        )


def fold(table: pa.Table, policies: Mapping[str, Policy], now_ms: int) -> pd.DataFrame:
    """The state of every clip that was asked for, sorted by clip_id; the rules are at the top of this module.

    Columns: clip_id, state (one of STATES), reason and message (of what decides the state; empty where it is ok),
    n_attempts, n_counted (failures that count against the clip), first_ms and last_ms (when the first and last attempt
    ended), and as nullable integers last_ok_ms (when it was last known to be there), first_missing_ms (the first
    observation since then that shows it gone, confirmed where need be) and next_ms (when to ask again; NA: never).
    `table` is as `read` gives it; its order and repeated attempts do not matter. Raises ConfigError for a reason
    without a policy.
    """
    rows, clip_ids, reasons, messages = _in_order(_evidence(table.select(FOLD_COLUMNS)), now_ms)
    failing = set(np.unique(rows.reason[~rows.is_ok]).tolist())
    rules = _Rules.of(reasons.to_pylist(), failing, policies)
    judged = _judge(rows, rules) if len(rows.starts) else _Judged(*[np.zeros(0, np.int64)] * len(_Judged._fields))
    return _frame(judged, rows, clip_ids, reasons, messages)


def _evidence(table: pa.Table) -> pa.Table:
    """The attempts that count as evidence: no canaries, no events, nothing that was taken back."""
    events = table.filter(pc.equal(table["outcome"].cast(pa.string()), "void"))
    is_kept = pc.and_(
        pc.not_equal(table["step"].cast(pa.string()), "canary"),
        pc.not_equal(table["outcome"].cast(pa.string()), "void"),
    )
    if events.num_rows:
        is_kept = pc.and_(is_kept, pa.array(~_is_void(table, events)))
    return table if pc.all(is_kept, min_count=0).as_py() else table.filter(is_kept)  # a copy of it all is dear


def _is_void(table: pa.Table, events: pa.Table) -> np.ndarray:
    """(row,) whether a failed attempt ended within the range of one of its lane's void events."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for attempt_id, text in zip(events["attempt_id"].to_pylist(), events["facts"].to_pylist(), strict=True):
        lane, from_ms, to_ms = _void(attempt_id, json.loads(text))
        ranges.setdefault(lane, []).append((from_ms, to_ms))
    ended_ms = table["ended_ms"].to_numpy()
    lane_codes, lanes = dictionary_codes(table["lane"])
    outcome_codes, outcomes = dictionary_codes(table["outcome"])
    is_failed = outcome_codes == _position(outcomes, "failed")
    found = np.zeros(table.num_rows, bool)
    for lane, spans in ranges.items():
        rows = np.flatnonzero(is_failed & (lane_codes == _position(lanes, lane)))
        spans.sort()
        begins = np.array([b for b, _ in spans])
        ends = np.maximum.accumulate([e for _, e in spans])  # of all that begin no later
        before = np.searchsorted(begins, ended_ms[rows], side="right") - 1
        found[rows] = (before >= 0) & (ended_ms[rows] <= ends[before])
    return found


def _void(attempt_id: str, facts: Mapping[str, Any]) -> tuple[str, int, int]:
    """What a void event takes back. Raises DataError where its facts do not say."""
    lane, from_ms, to_ms = facts.get("lane"), facts.get("from_ms"), facts.get("to_ms")
    if not (isinstance(lane, str) and isinstance(from_ms, int) and isinstance(to_ms, int)):
        raise DataError(
            f"attempt {attempt_id}: a void event's facts say which failures it takes back: lane (text), from_ms and "
            f"to_ms (integers). Found {dict(facts)!r}."
        )
    return lane, from_ms, to_ms


def dictionary_codes(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """A column of strings as (codes, the strings they stand for)."""
    if pa.types.is_dictionary(column.type):
        whole = column.unify_dictionaries().combine_chunks()
    else:  # in one piece first: to unify the dictionaries of many pieces takes five times as long
        whole = column.cast(pa.large_string()).combine_chunks().dictionary_encode()
    return whole.indices.to_numpy(zero_copy_only=False), whole.dictionary


def _position(values: pa.Array, value: str) -> int:
    return int(pc.index(values, value).as_py())


def _in_order(table: pa.Table, now_ms: int) -> tuple[_Rows, pa.Array, pa.Array, pa.Array]:
    """The evidence in order, its clips' ids in order, and what the codes of reasons and messages stand for."""
    codes, ids = dictionary_codes(table["clip_id"].cast(pa.string()))
    ranking = pc.sort_indices(ids)
    rank = np.empty(len(ids), np.int32)
    rank[ranking.to_numpy()] = np.arange(len(ids), dtype=np.int32)
    clip = rank[codes]
    ended_ms = np.minimum(table["ended_ms"].to_numpy(), now_ms)
    order = _order(clip, ended_ms, table["attempt_id"])
    clip, ended_ms = clip[order], ended_ms[order]
    step_codes, steps = dictionary_codes(table["step"])
    outcome_codes, outcomes = dictionary_codes(table["outcome"])
    reason_codes, reasons = dictionary_codes(table["reason"])
    message_codes, messages = dictionary_codes(table["message"])
    rows = _Rows(
        starts=np.flatnonzero(np.diff(clip, prepend=-1)),
        clip=clip,
        ended_ms=ended_ms,
        is_stored=np.isin(step_codes, [_position(steps, s) for s in ("fetch", "import")])[order],
        is_ok=(outcome_codes == _position(outcomes, "ok"))[order],
        reason=reason_codes[order],
        message=message_codes[order],
        retry_after_ms=_retry_after_ms(table["facts"])[order],
    )
    return rows, ids.take(ranking), reasons, messages


def _order(clip: np.ndarray, ended_ms: np.ndarray, attempt_ids: pa.ChunkedArray) -> np.ndarray:
    """The rows by clip, then by (ended_ms, attempt_id), each attempt once."""
    order = np.lexsort((ended_ms, clip))
    follows = (np.diff(clip[order]) == 0) & (np.diff(ended_ms[order]) == 0)
    if not follows.any():
        return order
    # few rows end in the same millisecond; an attempt that is there twice is among them
    tied = np.flatnonzero(np.append(follows, False) | np.insert(follows, 0, False))
    names = np.array(attempt_ids.take(pa.array(order[tied])).to_pylist())
    by_name = np.lexsort((names, ended_ms[order[tied]], clip[order[tied]]))
    order[tied] = order[tied[by_name]]
    names = names[by_name]
    return np.delete(order, tied[1:][names[1:] == names[:-1]])


def _retry_after_ms(facts: pa.ChunkedArray) -> np.ndarray:
    """(row,) what the host asked to wait, 0 where it did not."""
    found = np.zeros(len(facts), np.int64)
    has_one = pc.match_substring_regex(facts, r'"retry_after_s":\s*[0-9]').to_numpy()
    for row in np.flatnonzero(has_one):
        wait_s = json.loads(facts[int(row)].as_py()).get("retry_after_s") or 0
        found[row] = round(1000 * min(max(wait_s, 0), _LONGEST_RETRY_AFTER_S))
    return found


class _Judged(NamedTuple):
    """What follows for each clip; all arrays are (clip,), and a time of -1 stands for none."""

    state: np.ndarray  # an index of STATES
    speaks: np.ndarray  # the row that decides the state, -1 where that is no failure
    n_attempts: np.ndarray
    n_counted: np.ndarray
    first_ms: np.ndarray
    last_ms: np.ndarray
    last_ok_ms: np.ndarray
    first_missing_ms: np.ndarray
    next_ms: np.ndarray


def _judge(rows: _Rows, rules: _Rules) -> _Judged:
    """Rules 3 to 6 of the module, for all clips at once."""
    n, row = len(rows.clip), np.arange(len(rows.clip))
    is_failed = ~rows.is_ok
    confirmations = rules.confirmations[rows.reason]
    is_counted = is_failed & rules.is_counted[rows.reason]
    is_plain = is_failed & (confirmations == 1)

    last_row = np.append(rows.starts[1:], n) - 1
    last_ok = rows.last(rows.is_ok)
    is_stored = rows.last(rows.is_ok & rows.is_stored) >= 0
    is_current = row > last_ok[rows.clip]
    existed = rows.last(rows.is_ok | (is_plain & rules.shows_existence[rows.reason]))
    is_since = is_failed & (row > existed[rows.clip])
    is_confirmed, is_behind = _confirmations(rows, rules, is_since & (confirmations > 1))

    verdict = rows.last((is_current & is_plain) | is_confirmed)
    counted = rows.last(is_current & is_counted)
    latest = np.where(last_row > last_ok, last_row, -1)
    speaks = np.where(verdict >= 0, verdict, np.where(counted >= 0, counted, latest))
    speaks[is_stored] = -1

    is_open = is_current & (row > verdict[rows.clip])
    is_passing = (counted > verdict) & (rules.confirmations[rows.reason[counted]] == 0)
    tries = _tries(rows, rules, is_open, counted)
    is_exhausted = is_passing & (tries >= rules.max_attempts[rows.reason[counted]])

    state = np.full(len(last_row), STATES.index("retry"))
    state[(counted >= 0) & ~is_passing] = STATES.index("suspect")
    state[is_exhausted] = STATES.index("exhausted")
    state = np.where(verdict >= 0, rules.verdict[rows.reason[verdict]], state)
    state[is_stored] = STATES.index("ok")

    recheck_ms = np.where(verdict >= 0, rules.recheck_ms[rows.reason[verdict]], -1)
    after_recheck = np.where(recheck_ms >= 0, rows.ended_ms[counted] + recheck_ms, -1)
    due = np.where((verdict == counted) | is_exhausted, after_recheck, _due_ms(rows, rules, counted, tries))
    due = np.where(counted >= 0, due, -1)
    due_latest = _due_ms(rows, rules, latest, _tries(rows, rules, is_open, latest))
    next_ms = np.where(latest > counted, np.maximum(due, due_latest), due)
    next_ms[(counted >= 0) & (due < 0)] = -1  # a verdict that is never rechecked, or exhausted without one
    next_ms[(verdict >= 0) & (recheck_ms < 0)] = -1
    next_ms = np.where(latest < 0, rows.ended_ms[last_row], next_ms)  # an ok census: there, and to be fetched
    next_ms[is_stored] = -1

    is_missing = is_since & is_plain & (rules.verdict[rows.reason] == STATES.index("gone"))
    is_missing |= is_behind & (rules.verdict[rows.reason] == STATES.index("gone"))
    first_missing = rows.first(is_missing)
    return _Judged(
        state=state,
        speaks=speaks,
        n_attempts=last_row + 1 - rows.starts,
        n_counted=rows.tally(is_counted),
        first_ms=rows.ended_ms[rows.starts],
        last_ms=rows.ended_ms[last_row],
        last_ok_ms=np.where(last_ok >= 0, rows.ended_ms[last_ok], -1),
        first_missing_ms=np.where(first_missing < n, rows.ended_ms[np.minimum(first_missing, n - 1)], -1),
        next_ms=next_ms,
    )


def _confirmations(rows: _Rows, rules: _Rules, is_suspicion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of suspicions: (row,) which are verdicts, confirmed by then; and which have been confirmed sooner or later."""
    n = len(rows.clip)
    is_confirmed, is_behind = np.zeros(n, bool), np.zeros(n, bool)
    found = np.flatnonzero(is_suspicion)
    if not len(found):
        return is_confirmed, is_behind
    found = found[np.lexsort((found, rows.reason[found], rows.clip[found]))]
    is_first = (np.diff(rows.clip[found], prepend=-1) != 0) | (np.diff(rows.reason[found], prepend=-1) != 0)
    starts = np.flatnonzero(is_first)
    series = np.cumsum(is_first) - 1
    reason = rows.reason[found[starts]]
    ended_ms = np.append(rows.ended_ms, np.iinfo(np.int64).max // 2)  # of row n, which stands for "not yet"
    at = found[starts]  # of each series the latest observation that counts: at first the first one
    for n_seen in range(1, int(rules.confirmations[reason].max())):
        from_ms = (ended_ms[at] + rules.gap_ms[reason])[series]
        counts = (ended_ms[found] >= from_ms) & (found > at[series])
        following = np.minimum.reduceat(np.where(counts, found, n), starts)
        at = np.where(rules.confirmations[reason] > n_seen, following, at)
    is_confirmed[found[found >= at[series]]] = True
    is_behind[found[at[series] < n]] = True
    return is_confirmed, is_behind


def _tries(rows: _Rows, rules: _Rules, is_open: np.ndarray, of: np.ndarray) -> np.ndarray:
    """(clip,) how many open failures met the policy that row `of` met."""
    kind = rules.kind[rows.reason]
    return rows.tally(is_open & (kind == kind[of][rows.clip]))


def _due_ms(rows: _Rows, rules: _Rules, of: np.ndarray, tries: np.ndarray) -> np.ndarray:
    """(clip,) when the policy that row `of` met allows the next attempt."""
    step = np.clip(tries, 1, rules.delay_ms.shape[1]) - 1
    return rows.ended_ms[of] + np.maximum(rules.delay_ms[rows.reason[of], step], rows.retry_after_ms[of])


def _frame(judged: _Judged, rows: _Rows, clip_ids: pa.Array, reasons: pa.Array, messages: pa.Array) -> pd.DataFrame:
    import pandas as pd

    def words(codes: np.ndarray, values: pa.Array) -> pd.Series:
        chosen = pa.array(codes[judged.speaks], mask=judged.speaks < 0)
        return pc.fill_null(values.take(chosen), "").to_pandas()

    def times(values: np.ndarray) -> pd.Series:
        return pd.Series(pd.arrays.IntegerArray(values.astype(np.int64), values < 0))

    return pd.DataFrame(
        {
            "clip_id": clip_ids.to_pandas(),
            "state": pa.array(STATES).take(pa.array(judged.state)).to_pandas(),
            "reason": words(rows.reason, reasons),
            "message": words(rows.message, messages),
            "n_attempts": judged.n_attempts,
            "n_counted": judged.n_counted,
            "first_ms": judged.first_ms,
            "last_ms": judged.last_ms,
            "last_ok_ms": times(judged.last_ok_ms),
            "first_missing_ms": times(judged.first_missing_ms),
            "next_ms": times(judged.next_ms),
        }
    )
