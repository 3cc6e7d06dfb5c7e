"""The scripted site does what its plan says: whoever relies on it may."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from scripted_site import CANARIES, KINDS, Site, Storm, make_media

from harken.clips import Clip, Source, Split
from harken.errors import ClipError
from harken.media.reasons import REASONS
from harken.media.youtube import YouTubeFetcher
from harken.world.youtube import WatchPageIE


@pytest.fixture(scope="module")
def media() -> dict[str, bytes]:
    return make_media()


def _fetcher(base: str) -> YouTubeFetcher:
    return YouTubeFetcher(base + "/watch?v={key}", extractors=(WatchPageIE,), timeout_s=0.3)


def _reason(fetcher: YouTubeFetcher, clip: Clip) -> str:
    try:
        fetcher.fetch(clip, True)
    except ClipError as e:
        return e.reason
    return ""


def test_a_plan_is_its_seed_and_holds_every_kind(media: dict[str, bytes]) -> None:
    plans = [Site(media).plan(150, seed) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    counts = Counter(kind for _, kind, _ in plans[0])
    assert set(counts) == set(KINDS)
    assert counts["ok"] > 60
    keys = [k for k, _, _ in plans[0]]
    assert len(set(keys)) == 150
    assert {k[0] for k in keys} >= {"-", "_"}
    assert len({k.reason for k in KINDS.values()}) > 25
    assert {k.reason for k in KINDS.values()} <= {"", *REASONS}
    big = Counter(kind for _, kind, _ in Site(media).plan(2000, 3))
    assert all(big[name] == max(1, round(2000 * kind.share)) for name, kind in KINDS.items() if name != "ok")


def test_every_video_ends_as_it_was_planted(media: dict[str, bytes]) -> None:
    site = Site(media)
    plan = site.plan(len(KINDS), seed=4)
    with site.serve() as base:
        fetcher = _fetcher(base)
        found = {c.source.key: _reason(fetcher, c) for c in site.clips()}
        assert found == {key: KINDS[kind].reason for key, kind, _ in plan}  # what a first ask meets
        assert site.asked == Counter(dict.fromkeys(found, 1))
        site.tick(96)
        kinds = {key: kind for key, kind, _ in plan}
        changing = [c for c in site.clips() if KINDS[kinds[c.source.key]].reason and KINDS[kinds[c.source.key]].ends_h]
        healing = [c for c in site.clips() if KINDS[kinds[c.source.key]].heals_after]
        for clip in changing + healing:
            planted = next(p for p in plan if p.key == clip.source.key)
            for _ in range(KINDS[planted.kind].heals_after or 1):
                reason = _reason(fetcher, clip)
            assert reason == planted.reason, planted
        site.tick(3000)
        back = next(c for c in site.clips() if kinds[c.source.key] == "private_returns")
        assert _reason(fetcher, back) == ""


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("rate_limited", "session.rate_limited"),
        ("bot_check", "session.bot_check"),
        ("captcha", "session.captcha"),
        ("429", "session.http_429"),
    ],
)
def test_a_storm_swallows_whatever_is_asked_and_passes(media: dict[str, bytes], kind: str, reason: str) -> None:
    site = Site(media, storms=[Storm(1, 2, kind, retry_after_s=7)])
    site.plan(60, seed=1)
    canary = Clip("c", "t", Split.TEST, Source("youtube", CANARIES[0]), 4.0, 6.0)
    with site.serve() as base:
        fetcher = _fetcher(base)
        assert [_reason(fetcher, canary) for _ in range(4)] == ["", reason, reason, ""]
        site.storms.append(Storm(4, 1000, kind, retry_after_s=7))
        with pytest.raises(ClipError) as e:
            fetcher.fetch(canary, True)
        assert e.value.facts.get("retry_after_s") == (7.0 if kind == "429" else None)
        site.tick(1)
        assert _reason(fetcher, canary) == ""
    assert site.asked[CANARIES[0]] == 6
