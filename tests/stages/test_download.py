"""The stage `download` against a scripted site: every planted fate, at most the asks that policy allows, any kill."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from scripted_site import CANARIES, KINDS, Site, Storm, make_media

from harken.attempts import fold, read
from harken.audit.rates import audit
from harken.clips import Manifest, Split
from harken.config import Paths
from harken.engines import inline, local
from harken.errors import ConfigError, DataError
from harken.media import lanes
from harken.media.lanes import LanePaused
from harken.media.reasons import POLICIES, group
from harken.shards import ledger, read_table
from harken.stages import download
from harken.stages.download import UNVISITED, DownloadConfig

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
FIELDS = ("lists", "manifest", "weights", "media", "visits", "audit", "features", "stats", "embeddings", "pretrained")
FIELDS += ("finetuned", "trained", "evaluations", "report", "work", "ledger")


@pytest.fixture(scope="module")
def media() -> dict[str, bytes]:
    return make_media()


@dataclass
class Lab:
    """A project of one split whose videos are on a scripted site."""

    paths: Paths
    site: Site
    base: str

    def cfg(self, **changes: object) -> DownloadConfig:
        fetch = {
            "by": "youtube",
            "at": self.base + "/watch?v={key}",
            "per_hour": None,
            "canaries": list(CANARIES),
        }
        values = {"fetch": {"youtube": fetch}, "needs_images": ["audiocaps"], "silence_dbfs": -60.0, "timeout_s": 0.5}
        values |= {"patience_s": 0.0, "limit": None, "round": 1}
        return DownloadConfig.model_validate({**values, **changes})

    def run(self, ahead_s: float = 0.0, **changes: object) -> None:
        download.run(self.paths, self.cfg(**changes), inline, ahead_s=ahead_s)

    def state(self, ahead_s: float = 0.0) -> pd.DataFrame:
        now_ms = round((time.time() + ahead_s) * 1000)
        return fold(read(self.paths.ledger), POLICIES, now_ms).set_index("clip_id")

    def reasons(self) -> dict[str, str]:
        """What the published shards say of each video."""
        table = ledger(self.paths.media)
        keys = (i[3:14] for i in table["clip_id"].to_pylist())
        return dict(zip(keys, table["reason"].to_pylist(), strict=True))

    def asked(self) -> Counter[str]:
        """How often each video of the plan was asked for since the last time."""
        found = Counter({k: n for k, n in self.site.asked.items() if k not in CANARIES})
        self.site.asked.clear()
        return found


@pytest.fixture
def make_lab(tmp_path: Path, media: dict[str, bytes]) -> Iterator[Callable[..., Lab]]:
    import contextlib

    with contextlib.ExitStack() as stack:

        def make(n: int, seed: int = 5, n_shards: int = 3, storms: list[Storm] | None = None) -> Lab:
            site = Site(media, storms=storms or [])
            site.plan(n, seed)
            paths = Paths(**{f: tmp_path / f for f in FIELDS})
            paths.manifest.mkdir(parents=True, exist_ok=True)
            pq.write_table(Manifest.build(site.clips(), n_shards).table, paths.manifest / "clips.parquet")
            lanes.accept_terms(paths.ledger.parent, "youtube", "a test", lanes.TERMS["youtube"].version, 0)
            return Lab(paths, site, stack.enter_context(site.serve()))

        yield make


def run_to_the_end(lab: Lab, ahead_s: float, patience_s: float, waits_s: tuple[float, ...] = ()) -> float:
    """A run, taken up again after every pause that its lane asks for; how far ahead it then is.

    Instead of being patient it may be run again after each of `waits_s`, without waiting so long in truth.
    """
    for wait_s in (0.0, *waits_s):
        ahead_s += wait_s
        while True:
            try:
                lab.run(ahead_s=ahead_s, patience_s=patience_s)
                break
            except LanePaused as e:
                ahead_s = e.until_ms / 1000 - time.time() + 1
    return ahead_s


def check_two_runs(lab: Lab, patience_s: float, waits_s: tuple[float, ...] = ()) -> None:
    """Two runs two days apart: every planted reason, and no ask that policy does not allow."""
    ahead_s = run_to_the_end(lab, 0.0, patience_s, waits_s)
    assert ahead_s < HOUR_S
    first = lab.asked()
    before = lab.state(ahead_s)
    assert set(first) == {p.key for p in lab.site.planted}
    assert Counter(lab.reasons().values())[""] == (before["state"] == "ok").sum()
    lab.site.tick(48)
    ahead_s = run_to_the_end(lab, 2 * DAY_S, patience_s, waits_s)
    assert ahead_s < 2 * DAY_S + HOUR_S
    second = lab.asked()
    now_ms = (time.time() + ahead_s) * 1000
    due = before[before["state"].isin(["suspect", "retry"]) & (before["next_ms"].astype(float) <= now_ms)]
    assert set(second) == {i[3:14] for i in due.index}
    assert 0 < len(second) < len(first) / 5
    planted = {p.key: lab.site.reason_at(p.key, 48.0) for p in lab.site.planted}
    assert lab.reasons() == planted
    told = audit(Manifest.read(lab.paths.manifest).table, ledger(lab.paths.media), group)["splits"][0]
    assert {r["reason"]: r["count"] for r in told["reasons"]} == Counter(r for r in planted.values() if r)
    usable = sum(not r for r in planted.values()) / len(planted)
    assert told["rates"]["usable"]["ci_low"] == told["rates"]["usable"]["ci_high"] == usable
    state = lab.state(ahead_s)
    confirmed = state[state["reason"] == "gone.unspecified"]
    assert set(confirmed["state"]) == {"gone"}  # seen twice, a day apart
    assert (state.loc[state["reason"] == "live.ended", "state"] == "suspect").all()  # a week apart is asked for


def test_after_two_runs_every_video_has_its_planted_reason(make_lab: Callable[..., Lab]) -> None:
    check_two_runs(make_lab(150), patience_s=0.0, waits_s=(3.0, 12.0))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_after_two_runs_each_of_two_thousand_videos_has_its_planted_reason(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(2000, n_shards=8)
    assert len({k.reason for k in KINDS.values()} - {""}) >= 25
    check_two_runs(lab, patience_s=30.0)


def test_a_run_again_asks_for_nothing(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(60)
    lab.run(timeout_s=0.3)
    lab.asked()
    was = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (lab.paths.work / "download").glob("*.parquet")}
    state = lab.state()
    waiting = set(state.index[state["state"].isin(["retry", "suspect"])])
    lab.run(timeout_s=0.3)
    assert {i[3:14] for i in waiting} >= set(lab.asked())
    assert lab.reasons()
    now = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (lab.paths.work / "download").glob("*.parquet")}
    assert set(was) == set(now)


def test_a_host_whose_clock_is_an_hour_ahead_does_no_harm(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(60)
    lab.run(ahead_s=HOUR_S, limit=30, timeout_s=0.3)  # that host's part of the ledger, and its lane
    first = lab.asked()
    state = lab.state()
    done = {i[3:14] for i in state.index[state["state"] == "ok"]}
    assert 0 < len(done) < len(first) == 30
    began_ms = time.time() * 1000
    lab.run(timeout_s=0.3)  # on a host whose clock is right: neither refused nor made to wait
    second, state = lab.asked(), lab.state()
    assert not done & set(second), "what is here is not asked for again"
    assert set(lab.reasons()) == set(first) | set(second)
    assert UNVISITED not in lab.reasons().values()
    now_ms = time.time() * 1000
    assert (state["last_ms"] <= now_ms).all()
    for _, row in state[state["state"].isin(["retry", "suspect"])].iterrows():
        waits_s = max(*POLICIES[row["reason"]].delays_s, POLICIES[row["reason"]].gap_s)
        assert row["next_ms"] <= max(row["last_ms"], began_ms) + 1000 * waits_s, "nor put off by an hour"


def test_a_limit_leaves_rows_that_say_so_and_the_next_run_goes_on(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(60)
    lab.run(limit=20)
    assert sum(lab.asked().values()) == 20
    found = Counter(lab.reasons().values())
    assert found[UNVISITED] == 40
    assert sum(found.values()) == 60
    lab.run(limit=25)
    assert sum(lab.asked().values()) == 25
    lab.run()
    assert UNVISITED not in lab.reasons().values()
    assert len(lab.state()) == 60


def test_a_split_that_is_not_asked_for_yet_is_not_lost(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(60)
    clips = [*lab.site.clips("audiocaps", Split.TEST)[:10], *lab.site.clips("audioset", Split.TRAIN)[10:]]
    pq.write_table(Manifest.build(clips, 3).table, lab.paths.manifest / "clips.parquet")
    lab.run(limit=10)
    assert Counter(lab.reasons().values())[UNVISITED] == 50


@pytest.mark.slow
def test_media_that_were_lost_are_fetched_again_once_or_told_to_be_gone(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(60)
    lab.run()
    lab.asked()
    ok = {k for k, reason in lab.reasons().items() if not reason}
    gone = sorted(ok)[0]
    shutil.rmtree(lab.paths.work)
    lab.site._kinds[gone] = "private"
    lab.run()
    asked = lab.asked()
    assert all(asked[k] == 1 for k in ok)
    assert lab.reasons()[gone] == "gone.private"
    assert all(lab.reasons()[k] == "" for k in ok - {gone})


@pytest.mark.slow
def test_what_was_given_up_is_asked_for_in_a_new_round_and_verdicts_are_rechecked(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(60)
    for day in range(0, 30, 5):
        run_to_the_end(lab, day * DAY_S, 0.0)
    lab.asked()
    state = lab.state(26 * DAY_S)
    given_up = {i[3:14] for i in state.index[state["state"] == "exhausted"]}
    assert given_up
    run_to_the_end(lab, 31 * DAY_S, 0.0)
    assert not given_up & set(lab.asked())
    ahead_s = run_to_the_end(lab, 32 * DAY_S, 0.0)
    lab.asked()
    lab.run(ahead_s=ahead_s + DAY_S, round=2)
    assert given_up <= set(lab.asked())
    private = {p.key for p in lab.site.planted if p.kind == "private"}
    lab.site._kinds |= dict.fromkeys(private, "ok")
    run_to_the_end(lab, 95 * DAY_S, 0.0)
    assert private <= set(lab.asked())
    assert all(lab.reasons()[k] == "" for k in private)


def test_the_order_of_asking_is_the_same_every_time_and_small_splits_come_first(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(60)
    large = lab.site.clips("audioset", Split.TRAIN)
    small = lab.site.clips("audiocaps", Split.TEST)[30:45]
    path = lab.paths.manifest / "clips.parquet"
    pq.write_table(Manifest.build([*large, *small], 3).table, path)
    order = download.in_order(lab.paths)
    assert len(order) == 60
    assert set(order["clip_id"][:15]) == {c.id for c in small}
    assert order["clip_id"].tolist() == download.in_order(lab.paths)["clip_id"].tolist()
    pq.write_table(Manifest.build([*small, *reversed(large)], 3).table, path)
    assert download.in_order(lab.paths)["clip_id"].tolist() == order["clip_id"].tolist()


@pytest.mark.slow
def test_other_lists_keep_the_media_that_are_here(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(60)
    lab.run()
    lab.asked()
    media = {r["clip_id"]: r["media"] for r in read_table(lab.paths.media, ["media"]).to_pylist()}
    fewer = lab.site.clips()[::2]
    pq.write_table(Manifest.build(fewer, 3).table, lab.paths.manifest / "clips.parquet")
    lab.run()
    left = {r["clip_id"]: r["media"] for r in read_table(lab.paths.media, ["media"]).to_pylist()}
    kept = {c.id: media[c.id] for c in fewer if c.id in media}
    assert {i: left[i] for i in kept} == kept
    assert set(left) <= {c.id for c in fewer}
    assert set(lab.asked()) <= {c.source.key for c in fewer if c.id not in media}


@pytest.mark.slow
def test_what_other_settings_would_judge_otherwise_is_asked_again(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(60)
    lab.run()
    blind = {p.key for p in lab.site.planted if p.kind == "no_video"}
    assert blind
    lab.asked()
    lab.run(needs_images=[])
    again = set(lab.asked())
    state = lab.state()
    gone = {i[3:14] for i in state.index[state["state"].isin(["gone", "denied"])]}
    assert blind <= again
    assert not gone & again  # no setting brings them back
    assert all(lab.reasons()[k] == "" for k in blind)


@pytest.mark.slow
def test_forgotten_clips_are_not_asked_for_and_not_kept(make_lab: Callable[..., Lab]) -> None:
    from harken.takedown import FORGOTTEN, forget

    lab = make_lab(60)
    lab.run()
    lab.asked()
    ok = next(k for k, reason in lab.reasons().items() if not reason)
    forget([ok], lab.paths, who="a test", why="asked to", now_ms=round(time.time() * 1000))
    lab.run(ahead_s=2 * DAY_S)
    assert lab.reasons()[ok] == FORGOTTEN
    assert ok not in lab.asked()


@pytest.mark.slow
def test_a_session_that_is_refused_ends_the_run_and_counts_against_no_clip(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(60, storms=[Storm(30, 100_000, "bot_check")])
    with pytest.raises(LanePaused, match="run the same command again"):
        lab.run()
    assert not lab.paths.media.exists()
    state = lab.state()
    troubled = state[state["reason"] == "session.bot_check"]
    assert len(troubled)
    assert set(troubled["n_counted"]) == {0}
    assert sum(lab.asked().values()) < 60
    with pytest.raises(LanePaused):
        lab.run()  # a day has not passed
    assert not lab.asked()
    lab.site.tick(25)
    lab.run(ahead_s=25 * HOUR_S)
    assert "session.bot_check" not in lab.reasons().values()
    assert Counter(lab.reasons().values())[""] > 8


class Breaking(dict[str, str]):
    """Fates of videos that all turn private after so many asks: a broken session, not sixty deaths."""

    site: Site
    after = 20

    def get(self, key: str, default: str = "") -> str:  # type: ignore[override]
        return "private" if len(self.site.order) > self.after else super().get(key, default)


def slandered(lab: Lab, kinds: dict[str, str]) -> set[str]:
    """The videos that the ledger calls private although they are not."""
    private = {i[3:14] for i in lab.state().query("reason == 'gone.private'").index}
    return {k for k in private if KINDS[kinds[k]].reason != "gone.private"}


@pytest.mark.slow
def test_what_failed_while_the_canaries_failed_is_no_evidence(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(60)
    kinds = dict(lab.site._kinds)
    lab.site._kinds = Breaking(kinds)
    lab.site._kinds.site = lab.site
    with pytest.raises(LanePaused):
        lab.run()
    assert not slandered(lab, kinds)  # whatever failed since the last good canary is not known
    assert len(lab.state()) < len(lab.asked()) < 60
    # as if the process had been killed before the event was written
    for path in lab.paths.ledger.glob("*/*.attempts.parquet"):
        segment = pq.read_table(path)
        pq.write_table(segment.filter(pa.compute.not_equal(segment["outcome"].cast(pa.string()), "void")), path)
    assert slandered(lab, kinds)
    with pytest.raises(LanePaused):
        lab.run()
    assert not slandered(lab, kinds)
    lab.site._kinds = kinds
    lab.run(ahead_s=3 * DAY_S)
    planted = {p.key: KINDS[p.kind].reason for p in lab.site.planted}
    private = {k for k, r in lab.reasons().items() if r == "gone.private"}
    assert private == {k for k, r in planted.items() if r == "gone.private"}


def test_youtube_is_asked_for_nothing_before_its_terms_are_accepted(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(60)
    (lab.paths.ledger.parent / "terms.json").unlink()
    with pytest.raises(ConfigError, match="harken accept-terms youtube"):
        lab.run()
    assert not lab.asked()


def test_a_split_that_is_lost_whole_stops_the_corridor(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(60)
    lab.site._kinds = {k: v if k in CANARIES else "private" for k, v in lab.site._kinds.items()}
    with pytest.raises(DataError, match=r"audiocaps test: all 60 clips failed \(gone.private 60\)"):
        lab.run()


DRIVER = """
import sys
from pathlib import Path
from harken.config import Paths
from harken.engines import inline
from harken.stages import download
root, cfg, ahead_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
paths = Paths(**{f: root / f for f in Paths.model_fields})
download.run(paths, download.DownloadConfig.model_validate_json(cfg), inline, ahead_s=ahead_s)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_change_nothing(make_lab: Callable[..., Lab], tmp_path: Path) -> None:
    lab = make_lab(400)
    cfg = lab.cfg(patience_s=12.0).model_dump_json()
    rng, deaths = random.Random(8), 0
    for _ in range(60):
        process = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), cfg, "0"])
        try:
            process.wait(rng.uniform(0.9, 1.7))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            deaths += 1
        if deaths == 20 or process.returncode == 0:
            break
    ahead_s = run_to_the_end(lab, 0.0, 12.0)
    first = lab.asked()
    held = [k for k, n in first.items() if n > 1 and KINDS[lab.site._kinds[k]].reason == ""]
    assert len(held) <= deaths  # at most the clip that each kill fell upon
    lab.site.tick(48)
    run_to_the_end(lab, max(ahead_s, 2 * DAY_S), 12.0)
    assert deaths == 20
    assert lab.reasons() == {p.key: lab.site.reason_at(p.key, 48.0) for p in lab.site.planted}


@pytest.mark.slow
def test_two_workers_share_what_one_would_do(make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    lab = make_lab(60)
    monkeypatch.setenv("HARKEN_WORKERS", "2")
    monkeypatch.setenv("PYTHONPATH", str(Path(download.__file__).parents[2]))
    download.run(lab.paths, lab.cfg(), local)
    passing = {p.key for p in lab.site.planted if KINDS[p.kind].heals_after or KINDS[p.kind].reason.startswith("net.")}
    passing |= {p.key for p in lab.site.planted if KINDS[p.kind].reason.startswith("media.")}
    asked, reasons = lab.asked(), lab.reasons()
    assert set(asked) == {p.key for p in lab.site.planted}
    assert all(n == 1 or k in passing for k, n in asked.items())  # those may be due again before the run ends
    assert {k: r for k, r in reasons.items() if k not in passing} == {
        p.key: KINDS[p.kind].reason for p in lab.site.planted if p.key not in passing
    }
