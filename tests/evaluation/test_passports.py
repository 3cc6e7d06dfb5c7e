"""A passport depends on which clips and captions there are, and on nothing else."""

from __future__ import annotations

import hashlib

import pytest

from harken.errors import DataError
from harken.evaluation.passports import Passport, ids_sha256

CAPTIONS = {"yt:b:0-10000": ["a dog barks", "barking"], "yt:a:0-10000": ["rain"]}


def test_hash_can_be_computed_by_anyone() -> None:
    assert ids_sha256(["b", "a"]) == hashlib.sha256(b"a\nb\n").hexdigest()
    passport = Passport.of("audiocaps", "test", CAPTIONS, 975)
    lines = '["yt:a:0-10000", ["rain"]]\n["yt:b:0-10000", ["a dog barks", "barking"]]\n'
    assert passport.captions_sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_one_line() -> None:
    passport = Passport("audiocaps", "test", 845, 975, "9f" * 32, "02" * 32)
    assert str(passport) == "audiocaps test 845/975 ids:9f9f9f9f9f9f captions:020202020202"


def test_order_does_not_matter_and_everything_else_does() -> None:
    passport = Passport.of("audiocaps", "test", CAPTIONS, 975)
    assert Passport.of("audiocaps", "test", dict(reversed(CAPTIONS.items())), 975) == passport
    fewer = Passport.of("audiocaps", "test", {"yt:a:0-10000": ["rain"]}, 975)
    edited = Passport.of("audiocaps", "test", CAPTIONS | {"yt:a:0-10000": ["snow"]}, 975)
    moved = Passport.of(
        "audiocaps", "test", {"yt:b:0-10000": ["a dog barks"], "yt:a:0-10000": ["barking", "rain"]}, 975
    )
    assert len({passport, fewer, edited, moved}) == 4
    assert edited.ids_sha256 == passport.ids_sha256


def test_round_trip() -> None:
    passport = Passport.of("audioset", "test", {"a": (), "b": ()}, 20371)
    assert Passport(**passport.to_dict()) == passport  # type: ignore[arg-type]
    assert passport.n_present == 2


def test_impossible_passports_are_refused() -> None:
    with pytest.raises(DataError, match="official list has 1"):
        Passport.of("audiocaps", "test", CAPTIONS, 1)
    with pytest.raises(DataError, match="a is listed more than once"):
        ids_sha256(["a", "b", "a"])
