"""Whatever is broken about a file, it ends in right features or in a reason: no crash, no hang, no other error."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harken.config import read_params
from harken.errors import ClipError
from harken.guard import Guard
from harken.stages.extract import ExtractConfig

HERE = Path(__file__).parent
CUTS = [(0.0, 2.0), (0.3, 1.5), (0.0, None), (1.0, 2.0), (0.0, 2.0)]


@pytest.fixture(scope="module")
def mutations(beside: Any) -> Any:
    return beside("mutations")


@pytest.fixture(scope="module")
def good(mutations: Any) -> dict[str, bytes]:
    return mutations.recordings()


@pytest.fixture(scope="module")
def guard(mutations: Any) -> Iterator[Any]:
    """Every default that a run of the pipeline has, but for less memory."""
    cfg = ExtractConfig(**read_params(HERE.parents[1] / "presets/world.yaml")["extract"])
    with Guard(importlib.import_module("mutant_work").judge, cfg, limit_s=60, memory_gb=1) as found:
        yield found


def row(data: bytes, i: int, has_images: bool) -> dict[str, Any]:
    """The `i`-th way to ask for a clip of a file: all of it or a part, with images or, at times, without."""
    start_s, end_s = CUTS[i % len(CUTS)]
    return {"media": data, "start_s": start_s, "end_s": end_s, "has_images": has_images and i % 7 != 6}


def outcomes(guard: Any, mutations: Any, good: dict[str, bytes], n: int, seed: int) -> Counter[tuple[str, str, str]]:
    """How often each kind of mutant ended how: (kind, outcome of extract, outcome of download). Fails for any bug."""
    found: Counter[tuple[str, str, str]] = Counter()
    bugs = {}
    broken = (
        (m, row(m.data, i + i // len(good), m.origin not in mutations.SOUND_ONLY))
        for i, m in enumerate(mutations.mutants(good, n, seed))
    )
    for mutant, outcome in guard.map(broken):
        if isinstance(outcome, ClipError):  # the guard's own
            found[mutant.kind, outcome.reason, outcome.reason] += 1
            if outcome.reason != "media.too_big":
                bugs[mutant.name] = (str(outcome),)
            continue
        found[mutant.kind, outcome.extracted, outcome.cut] += 1
        if outcome.bugs:
            bugs[mutant.name] = outcome.bugs
    assert not bugs, f"{len(bugs)} of {n}:\n" + "\n".join(f"{k}:\n" + "\n".join(v) for k, v in list(bugs.items())[:5])
    return found


def test_the_recordings_are_good(guard: Any, mutations: Any, good: dict[str, bytes]) -> None:
    work = ((name, row(data, i % 2, name not in mutations.SOUND_ONLY)) for i, (name, data) in enumerate(good.items()))
    for name, outcome in guard.map(work):
        assert outcome.bugs == ()
        assert outcome.extracted == "ok"
        # no muxer that is used takes their packets as they are
        assert outcome.cut == ("media.not_media" if name in ("mpegts", "adpcm") else "ok"), name


def test_mutants_are_what_they_promise(mutations: Any, good: dict[str, bytes]) -> None:
    two = {name: good[name] for name in ("mp4", "wav")}
    some, same, other = (list(mutations.mutants(two, 60, seed)) for seed in (0, 0, 1))
    assert some == same
    assert len({m.data for m in some} | set(two.values())) == 62
    assert len({m.data for m in [*some, *other]}) > 100
    assert {m.kind for m in some} == set(mutations.KINDS)
    assert {m.origin for m in some} == set(two)


def test_a_broken_file_ends_in_a_reason(guard: Any, mutations: Any, good: dict[str, bytes]) -> None:
    found = outcomes(guard, mutations, good, 150, seed=0)
    assert found.total() == 150
    assert len({kind for kind, _, _ in found}) == 15
    for step in (1, 2):  # neither has it all refused nor all let through
        ended = Counter(key[step] for key in found.elements())
        assert ended["ok"] > 15
        assert ended["media.truncated"] > 15
        assert len(ended) > 5


FOUND = [  # each of these once raised what is no reason
    ("0/flac/lying_sizes/100/0", 0.0, 2.0, False),  # what was stored had no sound
    ("4/fragmented/head_bits/32/0", 0.0, 2.0, False),  # what was stored had no decoder
    ("1/mpegts/many_bits/3261/0", 1.0, 2.0, False),  # a stream that first shows at the end
    ("0/vp8/table_bits/1655/0", 0.0, None, True),  # images of two sizes
    ("0/wav/truncated/8/0", 0.0, 2.0, False),  # a single sample
]


@pytest.mark.parametrize(("name", "start_s", "end_s", "has_images"), FOUND, ids=[f[0] for f in FOUND])
def test_what_mutants_have_found(
    name: str,
    start_s: float,
    end_s: float | None,
    has_images: bool,
    guard: Any,
    mutations: Any,
    good: dict[str, bytes],
) -> None:
    data = mutations.mutant(good, name).data
    outcome = guard({"media": data, "start_s": start_s, "end_s": end_s, "has_images": has_images})
    assert outcome.bugs == (), outcome.bugs[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_2_400_broken_files_end_in_a_reason(guard: Any, mutations: Any, good: dict[str, bytes]) -> None:
    found = outcomes(guard, mutations, good, 2_400, seed=1)
    for step, name in ((1, "extracted as it is"), (2, "cut, then extracted")):
        print(f"\n{name}: {dict(Counter(key[step] for key in found.elements()).most_common())}")
        by_kind: dict[str, Counter[str]] = {}
        for key in found.elements():
            by_kind.setdefault(key[0], Counter())[key[step]] += 1
        for kind, ended in by_kind.items():
            print(f"  {kind:16}", ", ".join(f"{reason} {n}" for reason, n in ended.most_common()))
    assert found.total() == 2_400
