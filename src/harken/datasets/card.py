"""What harken knows about a dataset besides its rows: licence, citation, and where its official files come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from harken.clips import Clip, Split
from harken.errors import unknown


@dataclass(frozen=True, slots=True)
class OfficialFile:
    """One file as its authors publish it. An empty checksum is unpublished; `n_rows` excludes headers."""

    name: str
    url: str
    split: str = ""
    n_rows: int | None = None
    sha256: str = ""
    md5: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """A dataset's terms and sources. `splits` maps its official split names to the part each plays."""

    name: str
    title: str
    licence: str
    citation: str
    homepage: str
    files: tuple[OfficialFile, ...]
    splits: Mapping[str, Split]

    @property
    def urls(self) -> dict[str, str]:
        """File name -> official address."""
        return {f.name: f.url for f in self.files}

    def official_split(self, split: str) -> str:
        """The official name of a split given by it or as `train`, `val` or `test`. Raises ConfigError."""
        if split in self.splits:
            return split
        found = next((name for name, part in self.splits.items() if part == split), None)
        if found is None:
            raise unknown(f"{self.name}: split", split, {*self.splits, *map(str, Split)})
        return found


@dataclass(frozen=True, slots=True)
class Dataset:
    """A card and a reader. Every entry of DATASETS is one of these."""

    card: Card
    read: Callable[[Path, str], Iterator[Clip]]  # (official list, official split name) -> clips

    def clips(self, path: Path | str, split: str) -> Iterator[Clip]:
        """The clips of an official list (plain or .gz), one per clip, in order of first appearance, captions together.

        `split` is an official name (`card.splits`) or `train`, `val` or `test`. Raises ConfigError for another name at
        once, and DataError, naming file and line, where the list is not what its authors published; counts are checked
        at the end.
        """
        return self.read(Path(path), self.card.official_split(split))
