"""What the present rules say of past attempts: a better rule mends every verdict that an older one gave.

Nothing stored is changed. `reclassify` returns the verdicts that differ, `harken.attempts.write_rulings` lays them
beside the ledger, and `harken.attempts.read` applies them.
"""

from __future__ import annotations

import json
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from harken.attempts import dictionary_codes
from harken.errors import DataError
from harken.media.reasons import MEASURED, RULE_VERSION, classify

COLUMNS: Final = ("attempt_id", "step", "outcome", "reason", "reason_then", "rule_version", "message", "facts")
"""What `reclassify` needs of a ledger: `reclassify(read(folder, COLUMNS))`."""

# harken's own checks give these reasons, too, in words that no rule knows: for them silence is no other verdict
_ALSO_MEASURED: Final = (
    "denied.drm",
    "live.processing",
    "live.upcoming",
    "media.not_media",
    "media.truncated",
    "net.connect",
    "tool.extractor_broken",
    "tool.no_format",
)
_UNMAPPED: Final = "unknown.unmapped"
_FACTS: Final = pa.schema(
    [
        ("http_status", pa.int64()),
        ("exception", pa.string()),
        ("where", pa.string()),
        ("countries", pa.list_(pa.string())),
        ("expected", pa.bool_()),
    ]
)


def reclassify(table: pa.Table) -> pa.Table:
    """The attempts of a ledger that the present rules judge otherwise: attempt_id, reason, rule_version.

    Judged are failed fetches whose verdict came from other rules, by their normalised message and facts; not what
    harken's own checks found out, nor what a census or an import reports. `table` has COLUMNS, as
    `harken.attempts.read` gives them. Raises DataError where facts are not what the ledger holds.
    """
    is_open = pc.and_(pc.equal(table["outcome"], "failed"), pc.equal(table["step"], "fetch"))
    is_open = pc.and_(is_open, pc.not_equal(table["rule_version"], RULE_VERSION))
    is_open = pc.and_not(is_open, _is_in(table["reason_then"], sorted(MEASURED)))
    rows = table.select(COLUMNS).filter(is_open)
    if not rows.num_rows:
        return _rulings(rows, rows["reason"].cast(pa.string()))
    said = pa.chunked_array([_judge(rows["message"], rows["facts"])])
    is_silent = pc.and_(pc.equal(said, _UNMAPPED), _is_in(rows["reason_then"], list(_ALSO_MEASURED)))
    # without a rule of their own such attempts fall back on what our check said then
    said = pc.if_else(is_silent, rows["reason_then"].cast(pa.string()), said)
    is_other = pc.not_equal(said, rows["reason"].cast(pa.string()))
    return _rulings(rows.filter(is_other), said.filter(is_other))


def _rulings(rows: pa.Table, reasons: pa.ChunkedArray) -> pa.Table:
    version = pa.array([RULE_VERSION] * rows.num_rows, pa.string())
    return pa.table({"attempt_id": rows["attempt_id"], "reason": reasons, "rule_version": version})


def _is_in(column: pa.ChunkedArray, values: list[str]) -> pa.ChunkedArray:
    return pc.is_in(column.cast(pa.string()), pa.array(values))


def _judge(messages: pa.ChunkedArray, facts: pa.ChunkedArray) -> pa.Array:
    """(row,) the reason of each message with its facts. Each pair that differs in what matters is judged once."""
    message_codes, texts = dictionary_codes(messages)
    facts_codes, known = dictionary_codes(_relevant(facts))
    pair = message_codes.astype(np.int64) * len(known) + facts_codes
    _, first, which = np.unique(pair, return_index=True, return_inverse=True)
    verdicts = [
        classify(texts[int(message_codes[i])].as_py(), **json.loads(known[int(facts_codes[i])].as_py())).code
        for i in first
    ]
    return pa.array(verdicts, pa.string()).take(pa.array(which))


def _relevant(facts: pa.ChunkedArray) -> pa.ChunkedArray:
    """(row,) the part of the facts that `classify` looks at, as JSON text: most attempts differ in others only."""
    codes, texts = dictionary_codes(facts)
    lines = b"\n".join(pc.cast(texts, pa.binary()).to_pylist()) + b"\n"
    try:
        found = pyarrow.json.read_json(
            pa.BufferReader(lines),
            read_options=pyarrow.json.ReadOptions(block_size=1 << 24),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=_FACTS, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid as e:
        raise DataError(
            f"the ledger's facts cannot be read ({e}). Each must be a JSON object as AttemptLog keeps it."
        ) from e
    words = [_words(found[name]) for name in _FACTS.names]
    joined = pc.binary_join_element_wise(*words, "\x1f").combine_chunks()
    keys, _ = dictionary_codes(pa.chunked_array([joined]))
    _, first = np.unique(keys, return_index=True)
    whole = found.take(pa.array(first)).to_pylist()
    shown = pa.array([json.dumps({k: v for k, v in row.items() if v is not None}) for row in whole], pa.string())
    return pa.chunked_array([pa.DictionaryArray.from_arrays(pa.array(keys[codes]), shown)])


def _words(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_list(column.type):
        column = pc.greater(pc.list_value_length(column), 0)  # which countries does not matter
    return pc.fill_null(column.cast(pa.string()), "")
