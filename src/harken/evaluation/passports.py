"""The passport of a number: which clips and captions it was computed on, hashed.

Laboratories hold different remains of the same test set. R@k on 845 clips and R@k on 975 are different quantities, so a
number travels with its passport and two numbers share a table only if theirs are equal.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

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


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
