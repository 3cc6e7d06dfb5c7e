"""`harken` for people, the part about acquisition: what there is, why not, what may be asked for, what must go."""

from __future__ import annotations

import json
import random
import socket
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import pyarrow as pa
import typer
from rich.console import Console
from rich.table import Table

from harken import timings
from harken.audit.observations import Observation
from harken.config import Paths, load
from harken.errors import ConfigError, DataError, HarkenError

app = typer.Typer()
out = Console()
AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]


def state_of(paths: Paths) -> pd.DataFrame:
    """What the ledger of the current preset says of each clip now; empty where nothing was asked for yet."""
    from harken.stages.download import states

    return states(_attempts(paths), timings.now_ms())


def _attempts(paths: Paths) -> pa.Table:
    """The ledger of the current preset."""
    from harken.attempts import FOLD_COLUMNS, SCHEMA, read
    from harken.stages.download import DownloadConfig, is_world, ledger_folder

    cfg, columns = load("download", DownloadConfig), [*FOLD_COLUMNS, "run_id"]
    if is_world(cfg) and not (paths.lists / "truth.json").is_file():
        return SCHEMA.empty_table().select(columns)  # no world was made yet
    return read(ledger_folder(paths, cfg), columns)


def _censuses(table: pa.Table, paths: Paths) -> list[Observation]:
    """Our own censuses as observations, like those of other laboratories: of each split, what was there at the last."""
    from harken.clips import Manifest

    table = table.filter(pa.compute.equal(table["step"].cast(pa.string()), "census")).sort_by("ended_ms")
    if not table.num_rows:
        return []
    last = dict(zip(table["clip_id"].to_pylist(), table["outcome"].cast(pa.string()).to_pylist(), strict=True))
    when = f"{pd.Timestamp(table['ended_ms'].to_pylist()[-1], unit='ms'):%Y-%m-%d}"
    manifest, found = Manifest.read(paths.manifest), []
    for dataset, split in manifest.splits():
        there = [i[3:14] for i in manifest.of(dataset, split)["clip_id"].to_pylist() if last.get(i) == "ok"]
        if there:
            found.append(Observation.of("our census", when, "YouTube Data API v3, videos.list", dataset, split, there))
    return found


@app.command(epilog="Example: harken audit --since 2026-11-01 --page audit.html")
def audit(
    since: Annotated[str | None, typer.Option(help="An ISO date or a run's id: also tell what changed since.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the HTML page here.")] = None,
    as_json: AsJson = False,
) -> None:
    """What is missing, why, and since when, from the ledger as it is now; also of a download that is not finished."""
    from harken.audit import page as html
    from harken.audit.observations import read_observations
    from harken.shards import atomic, ledger
    from harken.stages.audit import AuditConfig, observations, outcomes_of, report_of, visited
    from harken.stages.download import states

    paths, cfg, now_ms = load("paths", Paths), load("audit", AuditConfig), timings.now_ms()
    asked = _attempts(paths)
    state = states(asked, now_ms)
    observed = [*observations(paths, cfg), *read_observations(paths.ledger / "observations"), *_censuses(asked, paths)]
    # media that came from elsewhere, by `dvc pull`, say what became of each clip but not when
    if not state.empty:
        outcomes = _without(outcomes_of(state), paths)
    elif observed and not paths.media.is_dir():
        outcomes = outcomes_of(state)  # nobody was asked yet: what other laboratories held is all there is
    else:
        outcomes = visited(ledger(paths.media))
    before = None
    if since is not None:
        until_ms = _end_of(since, asked)
        before = outcomes_of(states(asked.filter(pa.compute.less_equal(asked["ended_ms"], until_ms)), until_ms))
    report = report_of(paths, cfg, outcomes, None if state.empty else state, observed, before)
    if page is not None:
        with atomic(page) as f:
            f.write(html.render(report).encode())
    if as_json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
        return
    _print_audit(report)
    shown = page or paths.audit / "audit.html"
    if shown.is_file():
        out.print(f"\n{'Page' if page else 'Page of the last `dvc repro`'}: {shown}", markup=False, soft_wrap=True)


def _without(outcomes: pa.Table, paths: Paths) -> pa.Table:
    """The outcomes with what was taken down since: it was there, but it is not ours any more."""
    from harken.shards import FAILED
    from harken.takedown import FORGOTTEN, MESSAGE, forgotten

    gone = forgotten(paths.ledger, outcomes["clip_id"].to_pylist())
    is_gone = pa.compute.is_in(outcomes["clip_id"], pa.array(sorted(gone), pa.string()))
    for name, value in {"status": FAILED, "reason": FORGOTTEN, "message": MESSAGE}.items():
        column = pa.compute.if_else(is_gone, value, outcomes[name])
        outcomes = outcomes.set_column(outcomes.schema.get_field_index(name), name, column)
    return outcomes


def _end_of(since: str, asked: pa.Table) -> int:
    """The time (epoch ms) until which the earlier state is taken: the start of a day, or the end of a run."""
    try:
        return round(pd.Timestamp(since, tz="UTC").timestamp() * 1000)
    except ValueError:
        ends = asked.select(["run_id", "ended_ms"]).to_pandas().groupby("run_id", observed=True)["ended_ms"].max()
    if since not in ends.index:
        known = ", ".join(f"{r} ({pd.Timestamp(int(t), unit='ms'):%Y-%m-%d})" for r, t in ends.tail(8).items())
        raise ConfigError(f"audit --since {since}: neither a date such as 2026-11-01 nor a run. Last runs: {known}.")
    return int(ends[since])


def _print_audit(report: dict[str, Any]) -> None:
    table = Table("dataset", "split", "listed", "visited", "ok", "usable", "why not", box=None, header_style="bold")
    for s in report["splits"]:
        why = ", ".join(f"{r['reason']} {r['count']}" for r in s["reasons"])
        usable = s["rates"]["usable"] if s["rates"] else None
        numbers = [f"{n:,}" for n in (s["n_total"], s["n_visited"], s["groups"]["ok"])]
        table.add_row(s["dataset"], s["split"], *numbers, _rate(usable), why)
    out.print(table)
    for o in report["observations"]:
        out.print(
            f"{o['who']} ({o['when']}): {o['n_present']:,} of {o['n_listed']:,} of {o['dataset']} {o['split']}",
            markup=False,
            soft_wrap=True,
        )
    if drift := report["drift"]:
        out.print(
            f"since then: {len(drift['newly_missing'])} newly missing, {len(drift['resurrected'])} back, "
            f"{len(drift['reason_changed'])} for another reason, of {drift['n_both']:,} asked for both times"
        )


def _rate(rate: dict[str, float] | None) -> str:
    if rate is None:
        return "not visited"
    return f"{100 * rate['rate_low']:.1f} % [{100 * rate['ci_low']:.1f}, {100 * rate['ci_high']:.1f}]"


@app.command(epilog="Example: harken compare ours.json theirs.json --ids both.txt")
def compare(
    a: Annotated[Path, typer.Argument(help="An audit report (harken audit --json > a.json), or a list of ids.")],
    b: Annotated[Path, typer.Argument(help="Another laboratory's.")],
    ids: Annotated[Path | None, typer.Option(help="Write the ids that both hold here, one per line.")] = None,
    dataset: Annotated[str, typer.Option(help="Of lists of ids: audioset or audiocaps.")] = "",
    split: Annotated[str, typer.Option(help="Of lists of ids: train, val or test.")] = "",
    as_json: AsJson = False,
) -> None:
    """Which clips of each split two laboratories both hold, from their passports: no media change hands."""
    from harken.clips import Manifest
    from harken.evaluation.passports import common, from_report
    from harken.evaluation.passports import compare as compared

    manifest = load("paths", Paths).manifest
    official: dict[tuple[str, str], list[str]] = {}
    if (manifest / "clips.parquet").is_file():
        listed = Manifest.read(manifest)
        official = {pair: listed.of(*pair)["clip_id"].to_pylist() for pair in listed.splits()}
    ours, theirs = (_read_holdings(p, dataset, split, official) for p in (a, b))
    rows = compared(ours, theirs, {k: v for k, v in official.items() if _is_listed(ours, k, v)})
    if ids is not None:
        found: list[str] = []
        holdings = [{(h.dataset, h.split): h for h in from_report(r)} for r in (ours, theirs)]
        for r in rows:
            key = (r["dataset"], r["split"])
            if r["common"] is None:
                raise DataError(f"{manifest}: {key[0]} {key[1]}: not the list that the reports are of; run `catalog`.")
            found += common(holdings[0][key], holdings[1][key], official[key])[0]
        ids.write_text("".join(f"{i}\n" for i in found))
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    table = Table("dataset", "split", "listed", a.name, b.name, "both", "common subset", box=None, header_style="bold")
    for r in rows:
        numbers = [f"{r[k]:,}" for k in ("n_total", "n_a", "n_b", "n_both")]
        table.add_row(r["dataset"], r["split"], *numbers, r["common"]["text"] if r["common"] else "")
    out.print(table)


def _read_holdings(path: Path, dataset: str, split: str, official: dict[tuple[str, str], list[str]]) -> dict[str, Any]:
    """An audit report, or a list of video ids as the report of the one split that it is of."""
    if path.suffix == ".json":
        return _read_report(path)
    from harken.audit.observations import read_id_list
    from harken.evaluation.passports import passport_of

    if (dataset, split) not in official:
        pairs = ", ".join(f"--dataset {d} --split {s}" for d, s in official) or "none: run `catalog` first"
        raise ConfigError(f"compare {path}: no .json report, so a list of ids. Say of which split: {pairs}.")
    listed = official[dataset, split]
    held = Observation.of(path.name, "undated", path.name, dataset, split, read_id_list(path))
    present = held.present(pa.array([i[3:14] for i in listed]))
    passport = passport_of(dataset, split, listed, present, "listed by its holder")
    return {"splits": [{"dataset": dataset, "split": split, "passport": passport}]}


def _read_report(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise DataError(f"{path}: not an audit report ({e}). Write one with `harken audit --json`.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: not an audit report. Write one with `harken audit --json`.")
    return found


def _is_listed(report: dict[str, Any], pair: tuple[str, str], official: list[str]) -> bool:
    from harken.evaluation.passports import from_report, official_sha256

    sums = {(h.dataset, h.split): h.official_sha256 for h in from_report(report)}
    return sums.get(pair) == official_sha256(official)


@app.command(
    "import", epilog="Example: harken import ids.csv --who 'Lab X' --when 2023-03 --dataset audioset --split test"
)
def import_(
    path: Annotated[Path, typer.Argument(help="A folder of media, or a list of the ids that somebody held.")],
    into: Annotated[Path | None, typer.Option(help="Where the index of a folder goes.")] = None,
    who: Annotated[str, typer.Option(help="Of a list: whose it is.")] = "",
    when: Annotated[str, typer.Option(help="Of a list: its date, 2023, 2023-03 or 2023-03-05.")] = "undated",
    source: Annotated[str, typer.Option(help="Of a list: where it is from, to be cited.")] = "",
    dataset: Annotated[str, typer.Option(help="Of a list: audioset or audiocaps.")] = "",
    split: Annotated[str, typer.Option(help="Of a list: train, val or test.")] = "",
    as_json: AsJson = False,
) -> None:
    """Take in media that lie here already, or another laboratory's list of what it could get."""
    paths = load("paths", Paths)
    if path.is_dir():
        _import_media(path, into or paths.ledger / "imported", paths, as_json)
        return
    from harken.audit.observations import read_id_list, write_observation
    from harken.clips import Manifest

    known = Manifest.read(paths.manifest).splits()
    if (dataset, split) not in known:
        pairs = ", ".join(f"--dataset {d} --split {s}" for d, s in known)
        raise ConfigError(f"import {path}: say of which list it is: {pairs}.")
    observed = Observation.of(who, when, source or path.name, dataset, split, read_id_list(path))
    target = write_observation(paths.ledger / "observations", observed)
    if as_json:
        print(json.dumps({"who": who, "when": when, "n_ids": len(observed.ids), "file": str(target)}))
        return
    out.print(
        f"{len(observed.ids):,} ids of {who} ({when}). `harken audit` counts them from now on.",
        markup=False,
        soft_wrap=True,
    )


def _import_media(folder: Path, into: Path, paths: Paths, as_json: bool) -> None:
    from harken.clips import Manifest
    from harken.media.importing import describe
    from harken.media.importing import import_ as import_media
    from harken.stages.download import DownloadConfig

    needs_images = load("download", DownloadConfig).needs_images
    result = import_media(folder, Manifest.read(paths.manifest), into, needs_images)
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
        return
    for line in describe(result):
        out.print(line, markup=False, soft_wrap=True)
    out.print(
        f"Next, in params.yaml: download.fetch.youtube: {{by: folder, at: {into}}}; raise download.round; make repro",
        markup=False,
        soft_wrap=True,
    )


@app.command(epilog="Example: harken forget aB3_-kLm90Q --who 'J. Doe' --why 'request of the uploader, 2026-11-22'")
def forget(
    ids: Annotated[list[str], typer.Argument(help="Clip ids, or video ids for all clips of them.")],
    why: Annotated[str, typer.Option(help="For the record.")],
    who: Annotated[str, typer.Option(help="Who does this, for the record.")],
    as_json: AsJson = False,
) -> None:
    """Remove clips from everything that was made of them, and keep them out of all later runs."""
    from harken import takedown
    from harken.stages.download import DownloadConfig, ledger_folder

    paths = load("paths", Paths)
    book = ledger_folder(paths, load("download", DownloadConfig))
    report = takedown.forget(ids, paths, who=who, why=why, now_ms=timings.now_ms(), book=book)
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
        return
    for line in takedown.describe(report):
        out.print(line, markup=False, soft_wrap=True)


@app.command(epilog="Example: harken estimate")
def estimate(as_json: AsJson = False) -> None:
    """What a download would ask for now, how long that takes at the promised pace, and how much it transfers."""
    from harken.media.lanes import Pace
    from harken.media.lanes import estimate as estimated
    from harken.stages.download import DownloadConfig, YoutubeFetch, due_now

    paths, cfg = load("paths", Paths), load("download", DownloadConfig)
    due = due_now(paths, cfg, timings.now_ms())
    rows: list[dict[str, Any]] = []
    for host, fetch in cfg.fetch.items():
        part = due[due["host"] == host]
        canaries = tuple(fetch.canaries) if isinstance(fetch, YoutubeFetch) else ()
        told = estimated(len(part), Pace(per_hour=getattr(fetch, "per_hour", None), canary_keys=canaries))
        splits = part.groupby(["tier", "dataset", "split"], observed=True).size()
        order = [{"dataset": k[1], "split": k[2], "n_clips": int(n)} for k, n in splits.items()]
        rows.append({"host": host, "by": fetch.by, "days": told.days, "text": told.text, "in_order": order})
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for r in rows:
        out.print(f"{r['host']} ({r['by']}): {r['text']}", markup=False, soft_wrap=True)
        for part in r["in_order"]:
            out.print(f"  {part['dataset']} {part['split']}: {part['n_clips']:,}", markup=False, soft_wrap=True)


@app.command("accept-terms", epilog="Example: harken accept-terms youtube --who 'J. Doe, Example University'")
def accept_terms(
    host: Annotated[str, typer.Argument(help="youtube")],
    who: Annotated[str, typer.Option(help="Who accepts: a person, for an institution.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show what a host's terms mean for fetching from it; with --who, record that you accept them."""
    from harken.errors import unknown
    from harken.media import lanes
    from harken.stages.download import shared_folder

    if host not in lanes.TERMS:
        raise unknown("accept-terms", host, lanes.TERMS)
    paths, terms = load("paths", Paths), lanes.TERMS[host]
    if not as_json:
        out.print(f"{terms.text}\n{terms.url}", markup=False, soft_wrap=True)
    if not who:
        if as_json:
            print(json.dumps({"host": host, "is_accepted": lanes.accepted(shared_folder(paths), host) is not None}))
            return
        raise HarkenError("not accepted: nobody was named. To accept, add --who 'NAME, INSTITUTION'.")
    found = lanes.accept_terms(shared_folder(paths), host, who, terms.version, timings.now_ms())
    if as_json:
        print(json.dumps({"host": host, "is_accepted": True, "who": found.who}))
        return
    out.print(f"Accepted by {found.who}, recorded in {shared_folder(paths)}.", markup=False, soft_wrap=True)


@app.command(epilog="Example: harken census --country DE")
def census(
    country: Annotated[str | None, typer.Option(help="ISO 3166 code of where the clips would be fetched from.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many videos.")] = None,
    older_than: Annotated[int, typer.Option(min=0, help="Also what was last asked for so many days ago.")] = 90,
    base_url: Annotated[str | None, typer.Option(help="Another server that speaks the Data API.")] = None,
    as_json: AsJson = False,
) -> None:
    """Which videos are still there, by YouTube's official Data API: nothing is downloaded, fifty videos a call."""
    from harken.attempts import Attempt, AttemptLog, new_id, seal
    from harken.media.census import BASE_URL, Census, CensusPaused, key_from_environment
    from harken.media.reasons import RULE_VERSION
    from harken.media.versions import tools
    from harken.stages.download import DownloadConfig, YoutubeFetch, in_order, ledger_folder, shared_folder

    paths, cfg = load("paths", Paths), load("download", DownloadConfig)
    fetch = cfg.fetch.get("youtube")
    canaries = tuple(fetch.canaries) if isinstance(fetch, YoutubeFetch) else ()
    book = ledger_folder(paths, cfg)
    clips = in_order(paths)
    clips = clips[clips["host"] == "youtube"]
    seen = state_of(paths).set_index("clip_id")["last_ms"]
    recent = set(seen.index[seen > timings.now_ms() - older_than * 86_400_000])
    todo = clips[~clips["clip_id"].isin(recent)].head(limit or len(clips))
    ids_of: dict[str, list[str]] = {}
    for clip_id in todo["clip_id"]:
        ids_of.setdefault(clip_id[3:14], []).append(clip_id)
    asked = Census(
        shared_folder(paths),
        key_from_environment(),
        base_url=base_url or BASE_URL,
        canary_keys=canaries,
        country=country,
    )
    tally: Counter[str] = Counter()
    rng = random.SystemRandom()
    run_id, lane, paused = new_id(timings.now_ms(), rng), f"data-api@{socket.gethostname()}", ""
    with AttemptLog(book, run_id, "census") as writer:
        try:
            for n, finding in enumerate(asked.ask(ids_of)):
                for clip_id in ids_of[finding.key]:
                    attempt = Attempt(
                        new_id(finding.began_ms, rng), run_id, "census", lane, clip_id, "census", finding.began_ms,
                        finding.ended_ms, finding.outcome, finding.reason, RULE_VERSION, finding.message,
                        {**finding.facts, "where": "extract"}, tools(),
                    )  # fmt: skip
                    writer.append(attempt)
                tally[finding.reason or "present"] += 1
                if n % 50 == 49:
                    writer.flush()
        except CensusPaused as e:
            paused = str(e)
    seal(book, keep=())
    if as_json:
        print(json.dumps({"found": dict(tally), "n_left": len(ids_of) - sum(tally.values()), "paused": paused}))
    else:
        out.print(
            ", ".join(f"{k} {n:,}" for k, n in tally.most_common()) or "nothing to ask for",
            markup=False,
            soft_wrap=True,
        )
    if paused:
        raise HarkenError(paused)


@app.command(epilog="Example: harken reclassify --dry-run")
def reclassify(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Judge every failure of the past by the present rules. What was stored is kept; the new verdict lies beside it."""
    from harken.attempts import read, write_rulings
    from harken.media.reclassify import reclassify as reclassified
    from harken.stages.download import DownloadConfig, ledger_folder

    paths = load("paths", Paths)
    book = ledger_folder(paths, load("download", DownloadConfig))
    table = read(book)
    rulings = reclassified(table)
    was = table.select(["attempt_id", "reason"]).to_pandas().astype(str).set_index("attempt_id")["reason"]
    pairs = Counter(zip(was[rulings["attempt_id"].to_pylist()], rulings["reason"].to_pylist(), strict=True))
    changes = {f"{old} -> {new}": n for (old, new), n in pairs.most_common()}
    if not dry_run:
        write_rulings(book, rulings)
    if as_json:
        print(json.dumps({"changes": changes, "is_written": not dry_run}))
        return
    for what, n in changes.items():
        out.print(f"{what}: {n:,}", markup=False, soft_wrap=True)
    out.print(f"{rulings.num_rows:,} verdicts {'would change' if dry_run else 'changed'}.")
