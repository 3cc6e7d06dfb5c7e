"""Reading the rows of an official list, so that whatever is wrong with it is reported by file and line."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TextIO

from harken.errors import DataError

VIDEO_ID: Final = re.compile(r"[A-Za-z0-9_-]{11}\Z")


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """`path` as UTF-8 text, unpacked if it is gzip, whatever its name; a byte order mark is dropped."""
    if not path.is_file():
        raise DataError(
            f"{path}: no such file. It should be the official list; the dataset's card says where to get it."
        )
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    how: dict[str, str] = {"encoding": "utf-8-sig", "newline": ""}
    with gzip.open(path, "rt", **how) if packed else path.open("rt", **how) as file:  # type: ignore[call-overload]
        try:
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise DataError(f"{path}: the gzip file is cut or damaged ({e}). Get it again.") from e


def rows(path: Path, file: Iterable[str], *, skip_blanks_after_comma: bool = False) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each row that is not empty. Fields keep their own outer blanks unless told otherwise.

    Raises DataError for bytes that are not UTF-8 and for a quote that is never closed.
    """
    reader = csv.reader(file, strict=True, skipinitialspace=skip_blanks_after_comma)
    while True:
        try:
            row = next(reader, None)
        except UnicodeDecodeError as e:
            raise DataError(
                f"{path}: not UTF-8 somewhere after line {reader.line_num} ({e.reason}). The official list is."
            ) from e
        except csv.Error as e:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV ({e}). Is the file cut? Get it again.") from e
        if row is None:
            return
        if row:
            yield reader.line_num, row


def header(path: Path, found: Iterator[tuple[int, list[str]]], expected: list[str]) -> None:
    """Take the first row and insist that it is `expected`."""
    line, row = next(found, (1, []))
    if row != expected:
        raise DataError(f"{path}:{line}: the header should read '{','.join(expected)}', found '{','.join(row)[:120]}'.")


def wrong(path: Path, line: int, what: str, right: str) -> DataError:
    """The error for one row: where, what is there, what would have been right."""
    return DataError(f"{path}:{line}: {what}; expected {right}.")


def number(path: Path, line: int, name: str, text: str, example: str) -> float:
    """A field that must be a number of seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        raise wrong(path, line, f"{name} is {text!r}", f"seconds such as {example}") from None
    if not 0 <= value < 1e9:
        raise wrong(path, line, f"{name} is {text!r}", f"seconds such as {example}")
    return value
