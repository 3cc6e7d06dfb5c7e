"""Stage `download`: manifest -> media shards. Each clip's section of its recording, unchanged, or the reason why not.

The media is copied, never re-encoded, from the key frame before the clip to its end, so that images and audio can be
taken again with other settings; `start_s` and `end_s` say where the clip lies on the stored file's own clock.
Every finished clip is spooled at once: a killed download asks no host twice for what it has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from harken.clips import Clip, Manifest
from harken.config import Config, Paths
from harken.engines import Map, inline
from harken.errors import ClipError, ConfigError, DataError
from harken.media.fetchers import FETCHERS
from harken.media.reasons import REASONS
from harken.media.section import Section
from harken.progress import track
from harken.shards import (
    OK,
    Outcome,
    ShardWriter,
    atomic,
    code_version,
    file_sha256,
    fingerprint,
    ledger,
    pending,
    publish_shards,
)

log = logging.getLogger("harken")
CODE = ("stages/download.py", "media", "clips.py", "shards.py")
FORMAT = 1  # of the stored shards; not the code's hash, or an edit would ask every host again
COLUMNS = {
    "media": pa.binary(),
    "container": pa.string(),
    "start_s": pa.float64(),
    "end_s": pa.float64(),
    "has_images": pa.bool_(),
}


class FetchConfig(Config):
    """How one host is reached: `by` names a fetcher; `at` is its address.

    `youtube`: a watch-page URL with {key}. `http`: a URL with {archive} and {key}. `folder`: a path. `{world}` in an
    address is the built-in corpus' loopback server, started for the stage.
    """

    by: Literal["youtube", "http", "folder"]
    at: str


class DownloadConfig(Config):
    """`fetch[host]` for each host of the manifest; datasets in `needs_images` lose clips that have no picture."""

    fetch: dict[str, FetchConfig]
    needs_images: list[str]
    silence_dbfs: float
    attempts: int
    timeout_s: float
    per_hour: int | None


class Job(Config):
    """What a download worker needs to know; the world's server is already running."""

    paths: Paths
    download: DownloadConfig
    world: str


def run(paths: Paths, cfg: DownloadConfig, map: Map) -> None:
    """Fill `paths.media`. Raises DataError when a whole split is lost: nothing downstream could use what is left."""
    manifest = Manifest.read(paths.manifest)
    hosts = {str(h) for h in manifest.table["host"].unique().to_pylist()}
    if missing := sorted(hosts - cfg.fetch.keys()):
        raise ConfigError(
            f"params.yaml: download.fetch: the manifest has clips of {', '.join(missing)}, which is not listed. "
            f"Add `{missing[0]}: {{by: folder, at: DIR}}` or another fetcher."
        )
    work = paths.work / "download"
    # neither pace nor patience changes what a shard holds
    asked = cfg.model_dump(exclude={"attempts", "timeout_s", "per_hour"})
    if _is_world(cfg):  # the built-in corpus keeps its ids when it is drawn anew
        asked["world"] = [file_sha256(paths.lists / "truth.json"), code_version(("world",))]
    jobs = {}
    for shard in manifest.shards:
        wanted = [(c.id, c.dataset, c.start_s, c.end_s) for c in manifest.requested(shard)]
        jobs[shard] = fingerprint(FORMAT, asked, wanted)
    todo = [(s, jobs[s]) for s in pending(work, jobs)]
    if cfg.per_hour is not None:
        map = inline  # one lane: a pace is a promise to the host, not to each worker
    tally: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        job = Job(paths=paths, download=cfg, world=stack.enter_context(_world(paths, cfg)))
        for outcomes in track(map(downloader, job, todo), len(todo), "download: shards"):
            tally.update(o.reason or OK for o in outcomes)
    publish_shards(work, paths.media, jobs)
    shutil.rmtree(work / "spool", ignore_errors=True)
    if tally:
        log.info("clips: %s", dict(sorted(tally.items(), key=lambda kv: -kv[1])))
    _refuse_empty_splits(manifest, ledger(paths.media))


def _is_world(cfg: DownloadConfig) -> bool:
    return any("{world}" in f.at for f in cfg.fetch.values())


@contextlib.contextmanager
def _world(paths: Paths, cfg: DownloadConfig) -> Iterator[str]:
    """The base URL of the built-in corpus' server while it is needed, else an empty string."""
    if not _is_world(cfg):
        yield ""
        return
    from harken.world.server import serve

    host = paths.lists / "host"
    if not host.is_dir():
        raise DataError(f"{host}: no built-in world here. Use preset `world`, or give `download.fetch` real addresses.")
    with serve(host) as base_url:
        yield base_url


def downloader(job: Job) -> Callable[[tuple[int, str]], list[Outcome]]:
    """One worker: its fetchers (one yt-dlp per process) and the function of one shard."""
    cfg = job.download
    fetchers = {host: _fetcher(fetch, cfg, job.world) for host, fetch in cfg.fetch.items()}
    return partial(download_shard, job, Manifest.read(job.paths.manifest), fetchers)


def _fetcher(fetch: FetchConfig, cfg: DownloadConfig, world: str) -> Any:
    at = fetch.at.replace("{world}", world)
    options: dict[str, Any] = {"silence_dbfs": cfg.silence_dbfs}
    if fetch.by != "folder":
        options["timeout_s"] = cfg.timeout_s
    if fetch.by == "youtube" and "{world}" in fetch.at:
        from harken.world.youtube import WatchPageIE

        options["extractors"] = (WatchPageIE,)
    return FETCHERS[fetch.by](at, **options)


def download_shard(job: Job, manifest: Manifest, fetchers: dict[str, Any], item: tuple[int, str]) -> list[Outcome]:
    """Fetch what the spool lacks, then write the shard."""
    shard, mark = item
    cfg, work = job.download, job.paths.work / "download"
    spool = work / "spool" / f"{shard:05d}-{mark}"
    spool.mkdir(parents=True, exist_ok=True)
    clips = manifest.requested(shard)
    for clip in clips:
        path = spool / hashlib.sha1(clip.id.encode()).hexdigest()
        if not path.is_file():
            needs_images = any(d in cfg.needs_images for d in clip.dataset.split("+"))
            began = time.monotonic()
            try:
                _spool(path, _attempt(fetchers[clip.source.host], clip, needs_images, cfg.attempts))
            except ClipError as e:  # the one place of this stage where a clip may fail
                _spool(path, e)
            if cfg.per_hour is not None:
                time.sleep(max(0.0, 3600 / cfg.per_hour - (time.monotonic() - began)))
    with ShardWriter(work, shard, fingerprint=mark, columns=COLUMNS, rows_per_group=16) as out:
        for clip in clips:
            facts, media = _unspool(spool / hashlib.sha1(clip.id.encode()).hexdigest())
            if "reason" in facts:
                out.skip(clip.id, facts["reason"], facts["message"])
            else:
                out.write(clip.id, media=media, **facts)
    shutil.rmtree(spool)
    return out.outcomes


def _attempt(fetcher: Any, clip: Clip, needs_images: bool, attempts: int) -> Section:
    """The section, asking again after a pause where the reason is transient. Raises the last ClipError."""

    def transient(error: BaseException) -> bool:
        return isinstance(error, ClipError) and REASONS[error.reason].retry == "soon"

    def say(state: RetryCallState) -> None:
        log.debug("%s: %s; asking again", clip.id, state.outcome.exception() if state.outcome else "")

    policy = Retrying(
        retry=retry_if_exception(transient),
        stop=stop_after_attempt(attempts),
        wait=wait_exponential_jitter(0.2, 600),
        before_sleep=say,
        reraise=True,
    )
    return policy(fetcher.fetch, clip, needs_images)


def _spool(path: Path, result: Section | ClipError) -> None:
    with atomic(path) as f:
        if isinstance(result, ClipError):
            facts: dict[str, Any] = {"reason": result.reason, "message": result.message}
            f.write(json.dumps(facts).encode() + b"\n")
            return
        facts = {
            "container": result.container,
            "start_s": result.start_s,
            "end_s": result.end_s,
            "has_images": result.has_video,
        }
        f.write(json.dumps(facts).encode() + b"\n" + result.data)


def _unspool(path: Path) -> tuple[dict[str, Any], bytes]:
    line, media = path.read_bytes().split(b"\n", 1)
    return json.loads(line), media


def _refuse_empty_splits(manifest: Manifest, outcomes: pa.Table) -> None:
    ok = set(outcomes.filter(pa.compute.equal(outcomes["status"], OK))["clip_id"].to_pylist())
    reasons = dict(zip(outcomes["clip_id"].to_pylist(), outcomes["reason"].to_pylist(), strict=True))
    for dataset, split in manifest.splits():
        ids = manifest.of(dataset, split)["clip_id"].to_pylist()
        if not any(i in ok for i in ids):
            why = ", ".join(f"{r} {n}" for r, n in Counter(reasons[i] for i in ids).most_common(3))
            raise DataError(
                f"{dataset} {split}: all {len(ids)} clips failed ({why}). Check `download.fetch` in params.yaml; "
                f"`harken status` shows every reason. To go without this split, remove it from `catalog.lists`."
            )
