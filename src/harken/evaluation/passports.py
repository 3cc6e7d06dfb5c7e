"""The passport of a number: which clips and captions it was computed on, hashed.

Laboratories hold different remains of the same test set. R@k on 845 clips and R@k on 975 are different quantities, so a
number travels with its passport and two numbers share a table only if theirs are equal. Where they are not, the bitmaps
of two holdings give the clips that both laboratories have, without either sending the other anything but text.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from harken.errors import DataError


@dataclass(frozen=True, slots=True)
class Passport:
    """The clips a number was computed on. Hashes are hexadecimal SHA-256; equal passports mean comparable numbers.

    ids_sha256       over the sorted ids of the clips that were present, each followed by a line feed
    captions_sha256  over one JSON line `[id, [caption, ...]]` for each of them, in the same order
    """

    dataset: str
    split: str
    n_present: int
    n_total: int
    ids_sha256: str
    captions_sha256: str

    @staticmethod
    def of(dataset: str, split: str, captions: Mapping[str, Sequence[str]], n_total: int) -> Passport:
        """The passport of the present clips: `captions` maps the id of each to its captions (empty where it has none).

        n_total is the size of the official split. Raises DataError where more clips are present than there are.
        """
        if len(captions) > n_total:
            raise DataError(f"{dataset} {split}: {len(captions)} clips present, but its official list has {n_total}.")
        lines = (json.dumps([i, list(captions[i])], ensure_ascii=False) + "\n" for i in sorted(captions))
        return Passport(dataset, split, len(captions), n_total, ids_sha256(captions), _sha256("".join(lines)))

    def __str__(self) -> str:
        """One line for a table, a log or a paper: `audiocaps test 845/975 ids:9f3c81d20a44 captions:02be7c9915f0`."""
        return (
            f"{self.dataset} {self.split} {self.n_present}/{self.n_total} "
            f"ids:{self.ids_sha256[:12]} captions:{self.captions_sha256[:12]}"
        )

    def to_dict(self) -> dict[str, str | int]:
        """Its fields, for JSON; `Passport(**fields)` brings it back."""
        return asdict(self)


def ids_sha256(ids: Collection[str]) -> str:
    """SHA-256 over the sorted clip ids, each followed by a line feed. Raises DataError for an id that comes twice."""
    twice = [i for i, n in Counter(list(ids)).items() if n > 1]
    if twice:
        raise DataError(f"passport: clip {twice[0]} is listed more than once; a clip is present once or not.")
    return _sha256("".join(f"{i}\n" for i in sorted(ids)))


@dataclass(frozen=True, slots=True)
class Holding:
    """Which clips of an official list a laboratory holds: the passport of a split.

    ids_sha256       over the sorted ids of the clips held, each followed by a line feed (as in Passport)
    official_sha256  over all ids of the official list in its order, each followed by a line feed
    bitmap           base64 of one bit per clip of the official list in its order, the first in the highest bit of the
                     first byte, 1 where it is held; the last byte is filled with zeros
    policy           what a clip went through to count as held
    """

    dataset: str
    split: str
    n_present: int
    n_total: int
    ids_sha256: str
    official_sha256: str
    bitmap: str
    policy: str

    @staticmethod
    def of(dataset: str, split: str, official_ids: Sequence[str], present: np.ndarray, policy: str) -> Holding:
        """The holding of a split. official_ids: in the official list's order; present: bool (clip,).

        Raises DataError where the two differ in length, or an id comes twice.
        """
        if len(official_ids) != len(present):
            raise DataError(
                f"passport: {dataset} {split}: {len(present)} marks for the {len(official_ids)} clips of its list; "
                "there must be one for each, in the list's order."
            )
        held = [official_ids[i] for i in np.flatnonzero(present).tolist()]
        return Holding(
            dataset,
            split,
            len(held),
            len(official_ids),
            ids_sha256(held),
            official_sha256(official_ids),
            encode_bitmap(present),
            policy,
        )

    def __str__(self) -> str:
        """One line for a table, a log or a paper: `audiocaps test 845/975 ids:9f3c81d20a44 list:51c0d5ab60b3`."""
        return (
            f"{self.dataset} {self.split} {self.n_present}/{self.n_total} "
            f"ids:{self.ids_sha256[:12]} list:{self.official_sha256[:12]}"
        )

    @property
    def present(self) -> np.ndarray:
        """Which clips of the official list are held: bool (n_total,). Raises DataError for a bitmap that is damaged."""
        found = decode_bitmap(self.bitmap, self.n_total)
        if int(found.sum()) != self.n_present:
            raise DataError(
                f"passport: {self.dataset} {self.split}: the bitmap holds {int(found.sum())} clips, the passport says "
                f"{self.n_present}. It was damaged or edited; get the report again."
            )
        return found


def passport_of(
    dataset: str, split: str, official_ids: Sequence[str], present: np.ndarray, policy: str
) -> dict[str, str | int]:
    """A Holding's fields and its one line as `text`, for JSON: the `passport` of a split in an audit report."""
    holding = Holding.of(dataset, split, official_ids, present, policy)
    return {"text": str(holding), **asdict(holding)}


def from_report(report: Mapping[str, Any]) -> list[Holding]:
    """The holdings of an audit report, in its order. Raises DataError for a report without passports."""
    fields = tuple(Holding.__dataclass_fields__)
    found = []
    for split in report.get("splits", ()):
        told = split.get("passport")
        if told is None or not set(fields) <= set(told):
            raise DataError(
                f"report: {split.get('dataset')} {split.get('split')} carries no passport with a bitmap. Write the "
                "report with `harken audit --json`."
            )
        found.append(Holding(**{name: told[name] for name in fields}))
    if not found:
        raise DataError("report: it has no splits, so it is no audit report. Write one with `harken audit --json`.")
    return found


def common(a: Holding, b: Holding, official_ids: Sequence[str]) -> tuple[list[str], Holding]:
    """The clips that both hold, in the official list's order, and the passport of exactly these.

    official_ids: the official list that both marked. Raises DataError where the two, or the list given, are of
    different official lists, and where the ids that a bitmap marks have not the hash that its passport states.
    """
    _same_list(a, b)
    if official_sha256(official_ids) != a.official_sha256:
        raise DataError(
            f"passport: the list given has {len(official_ids)} clips, hash {official_sha256(official_ids)[:12]}, but "
            f"{a.dataset} {a.split} is marked on one of {a.n_total} with {a.official_sha256[:12]}. Give that list."
        )
    for holding in (a, b):
        held = [official_ids[i] for i in np.flatnonzero(holding.present).tolist()]
        if ids_sha256(held) != holding.ids_sha256:
            raise DataError(
                f"passport: {holding}: the ids that its bitmap marks have another hash. It was damaged or edited; get "
                "the report again."
            )
    both = a.present & b.present
    policy = a.policy if a.policy == b.policy else f"both of: {a.policy} | {b.policy}"
    shared = Holding.of(a.dataset, a.split, official_ids, both, policy)
    return [official_ids[i] for i in np.flatnonzero(both).tolist()], shared


def compare(
    a: Mapping[str, Any], b: Mapping[str, Any], official: Mapping[tuple[str, str], Sequence[str]] | None = None
) -> list[dict[str, Any]]:
    """What two laboratories hold of each split that both reports have, in the order of the first.

    a, b: audit reports. official: (dataset, split) -> ids of the official list; with it the common subset is named.

    Returns, for each split: dataset, split, n_total, n_a, n_b, n_both, only_a, only_b, neither (counts), text_a,
    text_b, is_same (the same clips), and common: the passport of the clips that both hold, None where the official
    list is not given. Raises DataError where no split is in both, or a split is of different official lists.
    """
    others = {(x.dataset, x.split): x for x in from_report(b)}
    rows = []
    for x in from_report(a):
        y = others.get((x.dataset, x.split))
        if y is not None:
            rows.append(_compared(x, y, (official or {}).get((x.dataset, x.split))))
    if not rows:
        raise DataError("compare: the two reports have no split in common.")
    return rows


def _compared(a: Holding, b: Holding, official_ids: Sequence[str] | None) -> dict[str, Any]:
    _same_list(a, b)
    x, y = a.present, b.present
    shared = common(a, b, official_ids)[1] if official_ids is not None else None
    return {
        "dataset": a.dataset,
        "split": a.split,
        "n_total": a.n_total,
        "n_a": a.n_present,
        "n_b": b.n_present,
        "n_both": int((x & y).sum()),
        "only_a": int((x & ~y).sum()),
        "only_b": int((~x & y).sum()),
        "neither": int((~x & ~y).sum()),
        "text_a": str(a),
        "text_b": str(b),
        "is_same": a.ids_sha256 == b.ids_sha256,
        "common": {"text": str(shared), **asdict(shared)} if shared else None,
    }


def _same_list(a: Holding, b: Holding) -> None:
    if (a.n_total, a.official_sha256) != (b.n_total, b.official_sha256):
        raise DataError(
            f"passport: {a} and {b} are marked on different official lists, so their bits name different clips. Build "
            "both manifests from the same official files, then audit again."
        )


def encode_bitmap(present: np.ndarray) -> str:
    """Bits (clip,) as base64, the first in the highest bit of the first byte."""
    return base64.b64encode(np.packbits(np.asarray(present, dtype=bool)).tobytes()).decode()


def decode_bitmap(text: str, n_total: int) -> np.ndarray:
    """The n_total bits of a bitmap: bool (n_total,). Raises DataError for another length or text that is no base64."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as e:
        raise DataError(f"passport: the bitmap is no base64 ({e}).") from e
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    if len(data) != -(-n_total // 8) or bits[n_total:].any():
        raise DataError(
            f"passport: the bitmap has {len(data)} bytes; {n_total} clips need {-(-n_total // 8)}, the rest zero bits."
        )
    return bits[:n_total].astype(bool)


def official_sha256(official_ids: Sequence[str]) -> str:
    """SHA-256 over the ids of an official list in its order, each followed by a line feed."""
    if len(set(official_ids)) != len(official_ids):
        ids_sha256(official_ids)  # names the one that comes twice
    return _sha256("".join(f"{i}\n" for i in official_ids))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
