"""Stage `download`: manifest -> media shards. Each clip's section of its recording, unchanged, or the reason why not.

The media is copied, never re-encoded, from the key frame before the clip to its end, so that images and audio can be
taken again with other settings; `start_s` and `end_s` say where the clip lies on the stored file's own clock.

Who is asked, and when, follows from the ledger of attempts, which this stage only appends to: what is stored is not
asked for again, what is gone is not asked for again, what may come back is asked again when its reason's policy allows.
Small splits are asked for first and the clips of each in the fixed random order of their hashes, so that a run stopped
at any time leaves an unbiased sample of what no smaller split names. Clips not asked for yet are rows with the reason
`local.unvisited`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from harken import attempts
from harken.attempts import FOLD_COLUMNS, Attempt, AttemptLog, new_id
from harken.clips import Clip, Manifest
from harken.config import Config, Paths
from harken.engines import Map, inline
from harken.errors import ClipError, ConfigError, DataError
from harken.media import lanes
from harken.media.fetchers import FETCHERS
from harken.media.lanes import Answer, Lane, LanePaused, Pace, VoidRange
from harken.media.reasons import POLICIES, RULE_VERSION, UNVISITED
from harken.media.section import Section
from harken.media.versions import tools
from harken.progress import track
from harken.shards import (
    OK,
    ShardWriter,
    atomic,
    code_version,
    facts,
    file_sha256,
    fingerprint,
    ledger,
    publish,
    publish_shards,
    read_shard,
    shard_path,
)
from harken.takedown import FORGOTTEN, MESSAGE, forgotten

log = logging.getLogger("harken")
CODE = ("stages/download.py", "media", "attempts.py", "takedown.py", "clips.py", "shards.py")
FORMAT = 2  # of the stored shards; not the code's hash, or an edit would ask every host again
COLUMNS = {
    "media": pa.binary(),
    "container": pa.string(),
    "start_s": pa.float64(),
    "end_s": pa.float64(),
    "has_images": pa.bool_(),
}
_RNG = random.Random(os.urandom(16))  # only makes names unique; nothing that is computed depends on it
VISITS = "visits.parquet"


class YoutubeFetch(Config):
    """`at`: a watch-page URL with {key}; on a loopback address the page itself is read and no other host is asked.
    `per_hour`: so many videos an hour at most; null: as fast as they come.

    `canaries`: ids of videos known to be there. One is asked for now and then; while it fails, no failure counts.
    """

    by: Literal["youtube"]
    at: str
    per_hour: float | None = Field(gt=0)
    canaries: list[str]


class HttpFetch(Config):
    """`at`: a URL with {key} and perhaps {archive}, one file each. `per_hour`: as for YouTube."""

    by: Literal["http"]
    at: str
    per_hour: float | None = Field(gt=0)


class ZenodoFetch(Config):
    """`at`: the URL of an archive, with {archive}; the archive is downloaded whole, checked and unpacked once."""

    by: Literal["zenodo"]
    at: str


class FolderFetch(Config):
    """`at`: a folder of recordings or of cut clips."""

    by: Literal["folder"]
    at: str


Fetch = Annotated[YoutubeFetch | HttpFetch | ZenodoFetch | FolderFetch, Field(discriminator="by")]


class DownloadConfig(Config):
    """`fetch[host]` for each host of the manifest; datasets in `needs_images` lose clips that have no picture.

    `{world}` in an address is the built-in corpus' loopback server, started for the stage. `limit`: ask for so many
    clips at most in one run (null: all that are due). `patience_s`: how long one run waits for clips that may be asked
    for again soon. `round`: raise it to ask again for what is due since, and for what was given up in an earlier round.
    """

    fetch: dict[str, Fetch]
    needs_images: list[str]
    silence_dbfs: float
    timeout_s: float = Field(gt=0)
    patience_s: float = Field(ge=0)
    limit: int | None = Field(ge=0)
    round: int = Field(ge=1)


class Job(Config):
    """What a download worker needs to know; the world's server is already running."""

    paths: Paths
    download: DownloadConfig
    world: str
    ledger: Path
    run_id: str
    asked: str
    ahead_s: float


@dataclass(frozen=True)
class Unit:
    """Clips of one shard and one tier, asked for one after the other by one worker."""

    shard: int
    clip_ids: tuple[str, ...]


@dataclass(frozen=True)
class Sealing:
    """One shard to be written: its fingerprint, and the reason and message of each clip that is not to be in it."""

    shard: int
    mark: str
    failures: Mapping[str, tuple[str, str]]


def run(paths: Paths, cfg: DownloadConfig, map: Map, *, ahead_s: float = 0.0) -> None:
    """Fill `paths.media` and `paths.visits`. `ahead_s`: by how much the time is later than the clock, for rehearsals.

    Raises DataError when a whole split is lost (nothing downstream could use what is left; one that is not all asked
    for yet is not lost) and LanePaused when a host has asked for a pause longer than `patience_s`: what was fetched is
    kept, and the next run goes on from it.
    """
    manifest = Manifest.read(paths.manifest)
    _refuse_unlisted_hosts(manifest, cfg)
    _refuse_unaccepted_terms(paths, cfg)
    work, book = paths.work / "download", ledger_folder(paths, cfg)
    work.mkdir(parents=True, exist_ok=True)
    asked = _asked(paths, cfg)
    clips = _in_order(manifest)
    taken_down = forgotten(paths.ledger, clips["clip_id"])
    began_ms = _now_ms(ahead_s)
    run_id = new_id(began_ms, _RNG)
    tally: Counter[str] = Counter()
    paused: LanePaused | None = None
    with contextlib.ExitStack() as stack:
        job = Job(
            paths=paths,
            download=cfg,
            world=stack.enter_context(_world(paths, cfg)),
            ledger=book,
            run_id=run_id,
            asked=asked,
            ahead_s=ahead_s,
        )
        _recover(work, book, run_id, asked)
        _recall_voids(job)
        asked_for = 0
        while paused is None and (cfg.limit is None or asked_for < cfg.limit):
            now_ms = _now_ms(ahead_s)
            state = _state(book, now_ms)
            missing = clips[~clips["clip_id"].isin(_stored(work, asked) | taken_down)]
            due = _due(missing, state, asked, cfg.round, began_ms, now_ms)
            if cfg.limit is not None:
                due = due.head(cfg.limit - asked_for)
            if due.empty:
                wait_s = _next_chance_s(missing, state, now_ms)
                if wait_s is None or wait_s > cfg.patience_s:
                    break
                log.info("download: asking again for some clips in %.0f s", wait_s)
                time.sleep(wait_s)
                continue
            asked_for += len(due)
            units = _units(due)
            for counts, stop in track(map(visitor, job, units), len(units), "download"):
                tally.update(counts)
                paused = paused or stop
                if paused is not None:
                    break
        paused = paused or _last_canaries(job)
        attempts.seal(book, keep=())
        state = _state(book, _now_ms(ahead_s))
        jobs = {s: fingerprint(FORMAT, asked, ids) for s, ids in _wanted(clips).items()}
        todo = _to_seal(clips, jobs, work, asked, state, taken_down)
        # a few shards are written sooner than a pool of processes is started
        for _ in track((map if len(todo) > 16 else inline)(sealer, job, todo), len(todo), "download: shards"):
            pass
    shutil.rmtree(work / "spool", ignore_errors=True)
    if tally:
        log.info("clips: %s", dict(sorted(tally.items(), key=lambda kv: -kv[1])))
    if paused is not None:
        raise paused
    publish_shards(work, paths.media, jobs)
    _export(state, clips, work, paths.visits)
    _refuse_empty_splits(manifest, ledger(paths.media))


def ledger_folder(paths: Paths, cfg: DownloadConfig) -> Path:
    """Where the attempts are recorded. The built-in world, drawn anew, is another platform with another history."""
    return paths.ledger / f"world-{_world_hash(paths)[:12]}" if is_world(cfg) else paths.ledger


def shared_folder(paths: Paths) -> Path:
    """Where lanes and accepted terms are kept, beside the presets' ledgers: a promise to a host is not a preset's."""
    return paths.ledger.parent


def is_world(cfg: DownloadConfig) -> bool:
    """Whether a host is the built-in corpus."""
    return any("{world}" in f.at for f in cfg.fetch.values())


def due_now(paths: Paths, cfg: DownloadConfig, now_ms: int) -> pd.DataFrame:
    """The clips that a run would ask for now, in order: clip_id, shard, tier, host, dataset, split."""
    clips = in_order(paths)
    asked = _asked(paths, cfg)
    state = _state(ledger_folder(paths, cfg), now_ms)
    held = _stored(paths.work / "download", asked) | forgotten(paths.ledger, clips["clip_id"])
    return _due(clips[~clips["clip_id"].isin(held)], state, asked, cfg.round, now_ms, now_ms)


def _world_hash(paths: Paths) -> str:
    truth = paths.lists / "truth.json"
    if not truth.is_file():
        raise DataError(
            f"{truth}: no built-in world here. Use preset `world`, or give `download.fetch` real addresses."
        )
    # its ids stay when it is drawn anew, so its truth and its code tell one world from another
    return fingerprint(file_sha256(truth), code_version(("world",)))


def _asked(paths: Paths, cfg: DownloadConfig) -> str:
    """What decides which bytes are stored for a clip. Neither pace nor patience does, nor through which page YouTube
    is asked; another folder or mirror may hold other files."""
    places = {host: [f.by, "" if f.by == "youtube" else f.at] for host, f in cfg.fetch.items()}
    world = _world_hash(paths) if is_world(cfg) else None
    return fingerprint(FORMAT, places, sorted(cfg.needs_images), cfg.silence_dbfs, world)


def _refuse_unlisted_hosts(manifest: Manifest, cfg: DownloadConfig) -> None:
    hosts = {str(h) for h in manifest.table["host"].unique().to_pylist()}
    if missing := sorted(hosts - cfg.fetch.keys()):
        raise ConfigError(
            f"params.yaml: download.fetch: the manifest has clips of {', '.join(missing)}, which is not listed. "
            f"Add `{missing[0]}: {{by: folder, at: DIR}}` or another fetcher."
        )


def _refuse_unaccepted_terms(paths: Paths, cfg: DownloadConfig) -> None:
    for fetch in cfg.fetch.values():
        if fetch.by == "youtube" and "{world}" not in fetch.at:
            lanes.refuse_unaccepted(shared_folder(paths), "youtube")


@contextlib.contextmanager
def _world(paths: Paths, cfg: DownloadConfig) -> Iterator[str]:
    """The base URL of the built-in corpus' server while it is needed, else an empty string."""
    if not is_world(cfg):
        yield ""
        return
    from harken.world.server import serve

    host = paths.lists / "host"
    if not host.is_dir():
        raise DataError(f"{host}: no built-in world here. Use preset `world`, or give `download.fetch` real addresses.")
    with serve(host) as base_url:
        yield base_url


def in_order(paths: Paths) -> pd.DataFrame:
    """Every clip of the manifest once, in the order of asking: clip_id, dataset, split, host, shard, tier, hash."""
    return _in_order(Manifest.read(paths.manifest))


def _in_order(manifest: Manifest) -> pd.DataFrame:
    """Each clip once, in the order of asking: tier by tier, shard by shard, hash by hash.

    A clip's tier is the smallest split that names it: the test sets are whole before the large lists are begun. Shards
    and the order within one are hashes, so what has been asked for is a random sample of its tier at any moment.
    """
    frame = pd.DataFrame(
        {
            name: manifest.table[name].cast(pa.string()).to_numpy(zero_copy_only=False)
            for name in ("clip_id", "dataset", "split", "host")
        }
    )
    frame["shard"] = manifest.table["shard"].to_numpy()
    sizes = frame.groupby(["dataset", "split"])["clip_id"].transform("size")
    pairs = frame["dataset"] + "/" + frame["split"]
    ranks = {p: k for k, (_, p) in enumerate(sorted(set(zip(sizes, pairs, strict=True))))}
    frame["tier"] = pairs.map(ranks)
    frame["hash"] = pd.util.hash_array(frame["clip_id"].to_numpy())
    frame = frame.sort_values(["tier", "shard", "hash"], kind="stable").drop_duplicates("clip_id")
    return frame.reset_index(drop=True)


def _wanted(clips: pd.DataFrame) -> dict[int, list[str]]:
    return {int(s): sorted(ids) for s, ids in clips.groupby("shard")["clip_id"]}


def states(table: pa.Table, now_ms: int) -> pd.DataFrame:
    """What attempts (FOLD_COLUMNS) say of each clip: as `fold`, and `is_fetched`: a census alone is no visit."""
    state = attempts.fold(table, POLICIES, now_ms)
    return state.assign(is_fetched=state["clip_id"].isin(set(_fetches(table)["clip_id"].unique().to_pylist())))


def _fetches(table: pa.Table) -> pa.Table:
    return table.filter(pa.compute.is_in(table["step"].cast(pa.string()), pa.array(["fetch", "import"])))


def _state(book: Path, now_ms: int) -> pd.DataFrame:
    """What the ledger says of each clip at this moment, indexed by clip id; to `states` are added

    asked, round the settings and the round of its last attempt, where those matter: content and exhausted
    failed       (reason, message) of its last attempt where that failed though the clip was had before; else None
    """
    table = attempts.read(book, FOLD_COLUMNS)
    state, tries = states(table, now_ms).set_index("clip_id"), _fetches(table)
    doubtful = state.index[state["state"].isin(["content", "exhausted"])]
    settings = {i: json.loads(f) for i, f in _last(tries, doubtful, "facts")}
    state["asked"] = state.index.map({i: f.get("asked") for i, f in settings.items()})
    state["round"] = state.index.map({i: f.get("round", 1) for i, f in settings.items()})
    had = state.index[state["state"] == OK]
    last = {i: (r, m) for i, r, m in _last(tries, had, "reason", "message") if r}
    state["failed"] = [last.get(i) for i in state.index]
    return state


def _last(table: pa.Table, clip_ids: Iterable[str], *columns: str) -> Iterator[tuple[Any, ...]]:
    """(clip_id, columns ...) of the last attempt of each of these clips."""
    rows = table.filter(pa.compute.is_in(table["clip_id"], pa.array(clip_ids, pa.string())))
    rows = rows.select(["clip_id", "ended_ms", *columns]).sort_by("ended_ms")
    found = dict(
        zip(rows["clip_id"].to_pylist(), zip(*(rows[c].to_pylist() for c in columns), strict=True), strict=True)
    )
    return ((i, *values) for i, values in found.items())


def _stored(work: Path, asked: str) -> set[str]:
    """The clips whose media are here already, in a shard or in the spool."""
    found = _spooled(work, "*")
    for path in work.glob("*.parquet"):
        found |= _held(_as_it_is(work, int(path.stem), asked)[1])
    return found


def _spooled(work: Path, folder: str) -> set[str]:
    """The clips of a folder of the spool, or of all of them (`*`)."""
    paths = (work / "spool").glob(f"{folder}/*")
    return {json.loads(_header(p))["clip_id"] for p in paths if not p.name.startswith(".")}


def _as_it_is(work: Path, shard: int, asked: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """A shard's fingerprint and the (status, reason) of each of its clips; nothing where other settings made it."""
    if not shard_path(work, shard).is_file() or (known := facts(work, shard)).get("asked") != asked:
        return "", {}
    table = pq.read_table(shard_path(work, shard), columns=["clip_id", "status", "reason"])
    ids, status, reason = (table[c].to_pylist() for c in ("clip_id", "status", "reason"))
    return known["fingerprint"], {i: (s, r) for i, s, r in zip(ids, status, reason, strict=True)}


def _held(rows: Mapping[str, tuple[str, str]]) -> set[str]:
    return {i for i, (status, _) in rows.items() if status == OK}


def _due(clips: pd.DataFrame, state: pd.DataFrame, asked: str, round_: int, began_ms: int, now_ms: int) -> pd.DataFrame:
    """Which of `clips`, whose media are not here, may be asked for now; in order."""
    known = state.reindex(clips["clip_id"])
    # what its policy lets be asked again by now: the suspected, the passing, and verdicts old enough to be rechecked
    is_due = (known["next_ms"].astype("Float64").fillna(float("inf")) <= now_ms).to_numpy(dtype=bool)
    is_due |= known["state"].isna().to_numpy()
    # had once, but the media are not here any more; a folder is looked into, whatever it lacked: each once a run
    is_before = (known["last_ms"] < began_ms).to_numpy(dtype=bool)
    is_due |= ((known["state"] == OK) | (known["reason"] == "folder.absent")).to_numpy() & is_before
    # judged by settings that hold no more, or given up in an earlier round
    is_due |= ((known["state"] == "content") & (known["asked"] != asked)).to_numpy()
    is_due |= (
        ((known["state"] == "exhausted") & (known["round"].astype("Float64") < round_)).fillna(False).to_numpy(bool)
    )
    return clips[is_due]


def _next_chance_s(clips: pd.DataFrame, state: pd.DataFrame, now_ms: int) -> float | None:
    later = state[state.index.isin(clips["clip_id"])]["next_ms"].dropna()
    later = later[later > now_ms]
    return (float(later.min()) - now_ms) / 1000 if len(later) else None


def _units(due: pd.DataFrame) -> list[Unit]:
    """The due clips in order, those of one tier and shard together."""
    return [Unit(int(k[1]), tuple(ids)) for k, ids in due.groupby(["tier", "shard"], sort=True)["clip_id"]]


def visitor(job: Job) -> Callable[[Unit], tuple[Counter[str], LanePaused | None]]:
    """One worker: its fetchers (one yt-dlp per process), its lanes, its page of the ledger."""
    cfg = job.download
    fetchers = {host: _fetcher(fetch, job) for host, fetch in cfg.fetch.items()}
    its_lanes = {host: _lane(host, fetch, job) for host, fetch in cfg.fetch.items()}
    return partial(visit, job, Manifest.read(job.paths.manifest), fetchers, its_lanes, _writer(job))


class _Page:
    """This worker's page of the ledger: every attempt is on the disk before the next one begins."""

    def __init__(self, folder: Path, run_id: str, ahead_s: float) -> None:
        # one worker may serve several fan-outs of a run, each on a page of its own
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}"
        self.run_id, self.ahead_s = run_id, ahead_s
        self._log = AttemptLog(folder, run_id, self.worker)
        self._log.__enter__()

    def write(self, attempt: Attempt) -> None:
        self._log.append(attempt)
        self._log.flush()

    def __del__(self) -> None:
        self._log.__exit__(None, None, None)


def _fetcher(fetch: Fetch, job: Job) -> Any:
    at = fetch.at.replace("{world}", job.world)
    options: dict[str, Any] = {"silence_dbfs": job.download.silence_dbfs}
    if fetch.by != "folder":
        options["timeout_s"] = job.download.timeout_s
    if fetch.by == "zenodo":
        from harken.datasets import DATASETS

        options |= {"cache": job.paths.work / "archives", "md5": {f.name: f.md5 for f in DATASETS["clotho"].card.files}}
    if fetch.by == "youtube" and urlsplit(at).hostname in ("127.0.0.1", "localhost"):
        from harken.world.youtube import WatchPageIE

        options["extractors"] = (WatchPageIE,)
    return FETCHERS[fetch.by](at, **options)


def _lane(host: str, fetch: Fetch, job: Job) -> Lane | None:
    """The lane to a host, shared by this machine's workers; none where files lie here or the host is our own."""
    if not isinstance(fetch, YoutubeFetch | HttpFetch) or "{world}" in fetch.at:
        return None
    canaries = tuple(fetch.canaries) if isinstance(fetch, YoutubeFetch) else ()
    pace = Pace(per_hour=fetch.per_hour, canary_keys=canaries)
    name = f"{host}@{socket.gethostname()}"
    return Lane(shared_folder(job.paths) / "lanes", name, pace, clock=lambda: time.time() + job.ahead_s)


def visit(
    job: Job,
    manifest: Manifest,
    fetchers: Mapping[str, Any],
    its_lanes: Mapping[str, Lane | None],
    page: _Page,
    unit: Unit,
) -> tuple[Counter[str], LanePaused | None]:
    """Ask for a unit's clips: media to the spool, every attempt to the ledger. Ends early where a lane is paused."""
    wanted = set(unit.clip_ids)
    clips = {c.id: c for c in manifest.requested(unit.shard) if c.id in wanted}
    tally: Counter[str] = Counter()
    for clip_id in unit.clip_ids:
        clip = clips[clip_id]
        fetcher, lane = fetchers[clip.source.host], its_lanes[clip.source.host]
        if lane is not None:
            try:
                lane.admit(partial(_probe, fetcher), partial(_void, page), patience_s=job.download.patience_s)
            except LanePaused as e:
                return tally, e.with_traceback(None)  # its frames would keep this page of the ledger open
        attempt = _ask(job, unit.shard, clip, fetcher, lane, page)
        page.write(attempt)
        if lane is not None:
            n_bytes = int(attempt.facts.get("n_bytes") or 0)
            lane.report(clip_id, attempt.reason, attempt.facts.get("retry_after_s"), n_bytes)
        tally[attempt.reason or OK] += 1
    return tally, None


def _ask(job: Job, shard: int, clip: Clip, fetcher: Any, lane: Lane | None, page: _Page) -> Attempt:
    """One attempt at one clip; its media are in the spool when it went well."""
    needs_images = any(d in job.download.needs_images for d in clip.dataset.split("+"))
    began_ms = _now_ms(job.ahead_s)
    section: Section | None = None
    try:
        section = fetcher.fetch(clip, needs_images)
        reason, message, known = "", "", dict(section.facts)
    except ClipError as e:  # the one place of this stage where a clip may fail
        reason, message, known = e.reason, e.message, dict(e.facts)
    attempt = _attempt(
        page,
        lane.name if lane is not None else clip.source.host,
        clip.id,
        "fetch",
        began_ms,
        reason,
        message,
        {**known, "asked": job.asked, "round": job.download.round},
    )
    if section is not None:
        _spool(_spool_path(job.paths.work / "download", shard, clip.id), section, attempt)
    return attempt


def _attempt(
    page: _Page, lane: str, clip_id: str, step: str, began_ms: int, reason: str, message: str, known: Mapping[str, Any]
) -> Attempt:
    return Attempt(
        attempt_id=new_id(began_ms, _RNG),
        run_id=page.run_id,
        worker=page.worker,
        lane=lane,
        clip_id=clip_id,
        step=step,
        began_ms=began_ms,
        ended_ms=_now_ms(page.ahead_s),
        outcome="failed" if reason else "ok",
        reason=reason,
        rule_version=RULE_VERSION,
        message=message,
        facts=known,
        tools=tools(),
    )


def _probe(fetcher: Any, key: str) -> Answer:
    """How the host answers for a canary."""
    try:
        fetcher.extract(key)
    except ClipError as e:
        return Answer(e.reason, e.facts.get("retry_after_s"))
    return Answer("")


def _void(page: _Page, found: VoidRange) -> None:
    """Record that a lane's failures in a range are no evidence: a canary failed."""
    now_ms = _now_ms(page.ahead_s)
    known = {"lane": found.lane, "from_ms": found.from_ms, "to_ms": found.to_ms}
    event = _attempt(page, found.lane, f"lane:{found.lane}", "canary", now_ms, "", "a canary failed", known)
    page.write(replace(event, outcome="void"))


def _recall_voids(job: Job) -> None:
    """After a kill between a canary's failure and its event: what a lane remembers as void is void in the ledger."""
    table = attempts.read(job.ledger, ["outcome", "facts"])
    events = table.filter(pa.compute.equal(table["outcome"].cast(pa.string()), "void"))["facts"].to_pylist()
    known = {(e["lane"], e["from_ms"], e["to_ms"]) for e in map(json.loads, events)}
    for host, fetch in job.download.fetch.items():
        lane = _lane(host, fetch, job)
        for found in lane.voids() if lane is not None else ():
            if tuple(found) not in known:
                _void(_writer(job), found)


def _last_canaries(job: Job) -> LanePaused | None:
    """At the end of a run, make sure of the sessions whose failures nothing has confirmed yet."""
    for host, fetch in job.download.fetch.items():
        lane = _lane(host, fetch, job)
        if lane is None or not isinstance(fetch, YoutubeFetch) or not fetch.canaries:
            continue
        fetcher, page = _fetcher(fetch, job), _writer(job)
        try:
            lane.verify(partial(_probe, fetcher), partial(_void, page), patience_s=job.download.patience_s)
        except LanePaused as e:
            return e.with_traceback(None)
    return None


def _writer(job: Job) -> _Page:
    return _Page(job.ledger, job.run_id, job.ahead_s)


def _now_ms(ahead_s: float) -> int:
    return round((time.time() + ahead_s) * 1000)


def _spool_path(work: Path, shard: int, clip_id: str) -> Path:
    return work / "spool" / f"{shard:05d}" / hashlib.sha1(clip_id.encode()).hexdigest()


def _spool(path: Path, section: Section, attempt: Attempt) -> None:
    """One clip's media with the attempt that got them, whole or not at all."""
    values = {
        "container": section.container,
        "start_s": section.start_s,
        "end_s": section.end_s,
        "has_images": section.has_video,
    }
    header = {"clip_id": attempt.clip_id, "asked": attempt.facts["asked"], "values": values, "attempt": asdict(attempt)}
    with atomic(path) as f:
        f.write(json.dumps(header).encode() + b"\n" + section.data)


def _header(path: Path) -> bytes:
    with open(path, "rb") as f:
        return f.readline()


def _recover(work: Path, book: Path, run_id: str, asked: str) -> None:
    """After a kill: what was spooled under other settings is dropped, and no media is left without its attempt."""
    for leftover in (work / "spool").rglob(".*.tmp"):
        leftover.unlink()
    spooled = sorted((work / "spool").glob("*/*"))
    if not spooled:
        return
    known = set(attempts.read(book, ["attempt_id"])["attempt_id"].to_pylist())
    with AttemptLog(book, run_id, "recovery") as writer:
        for path in spooled:
            header = json.loads(_header(path))
            if header["asked"] != asked:
                path.unlink()
            elif header["attempt"]["attempt_id"] not in known:
                writer.append(Attempt(**header["attempt"]))


def _to_seal(
    clips: pd.DataFrame,
    jobs: Mapping[int, str],
    work: Path,
    asked: str,
    state: pd.DataFrame,
    taken_down: set[str],
) -> list[Sealing]:
    """The shards whose rows are to change: new clips or settings, new media, another verdict."""
    fetched = state[state["is_fetched"]]
    verdicts = dict(zip(fetched.index, zip(fetched["reason"], fetched["message"], strict=True), strict=True))
    verdicts |= {i: failed for i, failed in fetched["failed"].items() if failed}
    todo = []
    for shard, ids in _wanted(clips).items():
        mark, rows = _as_it_is(work, shard, asked)
        spooled = _spooled(work, f"{shard:05d}")
        held = _held(rows) | spooled
        failures: dict[str, tuple[str, str]] = {}
        for clip_id in ids:
            if clip_id in taken_down:
                failures[clip_id] = (FORGOTTEN, MESSAGE)
            elif clip_id not in held:
                reason, message = verdicts.get(clip_id, ("", ""))
                failures[clip_id] = (reason, message) if reason else (UNVISITED, "not asked for yet")
        now = {i: ("failed", failures[i][0]) if i in failures else (OK, "") for i in ids}
        if mark != jobs[shard] or rows != now or spooled:
            todo.append(Sealing(shard, jobs[shard], failures))
    return todo


def sealer(job: Job) -> Callable[[Sealing], int]:
    return partial(seal_shard, job, Manifest.read(job.paths.manifest))


def seal_shard(job: Job, manifest: Manifest, item: Sealing) -> int:
    """Write one shard from the spool, the shard before it and the ledger's verdicts."""
    work = job.paths.work / "download"
    kept = _kept_media(work, item.shard, job.asked)
    meta = {"asked": job.asked}
    with ShardWriter(work, item.shard, fingerprint=item.mark, columns=COLUMNS, meta=meta, rows_per_group=16) as out:
        for clip in manifest.requested(item.shard):
            if clip.id in item.failures:
                out.skip(clip.id, *item.failures[clip.id])
                continue
            path = _spool_path(work, item.shard, clip.id)
            if path.is_file():
                line, media = path.read_bytes().split(b"\n", 1)
                out.write(clip.id, media=media, **json.loads(line)["values"])
            else:
                out.write(clip.id, **kept(clip.id))
    shutil.rmtree(work / "spool" / f"{item.shard:05d}", ignore_errors=True)
    return item.shard


def _kept_media(work: Path, shard: int, asked: str) -> Callable[[str], dict[str, Any]]:
    """The rows of the shard as it is, in its order, read as they are wanted: a shard need not fit into memory twice."""
    rows: Iterable[dict[str, Any]] = iter(())
    if shard_path(work, shard).is_file() and facts(work, shard).get("asked") == asked:
        rows = read_shard(work, shard, tuple(COLUMNS))
    ahead = iter(rows)

    def next_row(clip_id: str) -> dict[str, Any]:
        for row in ahead:  # both are in the order of clip ids
            if row.pop("clip_id") == clip_id:
                return row
        raise DataError(f"{shard_path(work, shard)}: {clip_id} was there and is not. Run the stage again.")

    return next_row


def _export(state: pd.DataFrame, clips: pd.DataFrame, work: Path, out: Path) -> None:
    """The ledger's state of the manifest's clips as a table, for the audit."""
    kept = (
        state[state.index.isin(clips["clip_id"])].drop(columns=["asked", "round", "failed"]).sort_index().reset_index()
    )
    with atomic(work / "visits" / VISITS) as f:
        pq.write_table(pa.Table.from_pandas(kept, preserve_index=False), f)
    publish(work / "visits", out, [VISITS])


def _refuse_empty_splits(manifest: Manifest, outcomes: pa.Table) -> None:
    ok = set(outcomes.filter(pa.compute.equal(outcomes["status"], OK))["clip_id"].to_pylist())
    reasons = dict(zip(outcomes["clip_id"].to_pylist(), outcomes["reason"].to_pylist(), strict=True))
    for dataset, split in manifest.splits():
        ids = manifest.of(dataset, split)["clip_id"].to_pylist()
        if not any(i in ok or reasons[i] == UNVISITED for i in ids):
            why = ", ".join(f"{r} {n}" for r, n in Counter(reasons[i] for i in ids).most_common(3))
            raise DataError(
                f"{dataset} {split}: all {len(ids)} clips failed ({why}). Check `download.fetch` in params.yaml; "
                f"`harken status` shows every reason. To go without this split, remove it from `catalog.lists`."
            )
