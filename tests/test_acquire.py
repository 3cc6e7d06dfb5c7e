"""The commands about acquisition, in a project whose ledger and manifest are a few rows."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from harken.attempts import Attempt, AttemptLog, new_id, read
from harken.cli import app
from harken.clips import Clip, Manifest, Source, Split, youtube_id
from harken.config import Paths, load
from harken.errors import ConfigError, DataError, HarkenError
from harken.media.lanes import TERMS
from harken.shards import ShardWriter
from harken.stages.download import COLUMNS

ROOT = Path(__file__).parents[1]
DAY_MS = 86_400_000
NOW_MS = round(time.time() * 1000)
KEYS = [f"-video_{i:04d}" for i in range(12)]
RNG = random.Random(3)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Preset `audiocaps` with a manifest of twelve clips, of which nothing has been asked for."""
    shutil.copyfile(ROOT / "presets/audiocaps.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARKEN_PARAMS", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    paths = load("paths", Paths)
    paths.manifest.mkdir(parents=True)
    pq.write_table(Manifest.build(clips(), 2).table, paths.manifest / "clips.parquet")
    return tmp_path


def clips() -> list[Clip]:
    splits = [Split.TEST] * 4 + [Split.TRAIN] * 8
    return [
        Clip(youtube_id(k, 0, 10), "audiocaps", s, Source("youtube", k), 0.0, 10.0, ("a dog barks",))
        for k, s in zip(KEYS, splits, strict=True)
    ]


def record(reasons: dict[str, str], ended_ms: int = NOW_MS - 1000, run: str = "", rule_version: str = "now") -> str:
    """Attempts at some videos; "" is ok. Returns the run's id."""
    run = run or new_id(ended_ms, RNG)
    with AttemptLog(load("paths", Paths).ledger, run, "w") as log:
        for key, reason in reasons.items():
            log.append(
                Attempt(
                    new_id(ended_ms - 9, RNG),
                    run,
                    "w",
                    "lane",
                    youtube_id(key, 0, 10),
                    "fetch",
                    ended_ms - 9,
                    ended_ms,
                    "failed" if reason else "ok",
                    reason,
                    rule_version,
                    "Private video" if reason else "",
                    {"where": "extract"} if reason else {},
                    {},
                )
            )
    return run


def say(*args: str) -> str:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def facts(*args: str) -> object:
    return json.loads(say(args[0], "--json", *args[1:]))


def test_an_audit_of_an_unfinished_download_says_what_it_knows(project: Path) -> None:
    record({KEYS[0]: "", KEYS[1]: "gone.private", KEYS[5]: ""})
    report = facts("audit")
    splits = {s["split"]: s for s in report["splits"]}
    assert (splits["test"]["n_visited"], splits["train"]["n_visited"]) == (2, 1)
    assert splits["test"]["groups"]["gone"] == 1
    usable = splits["test"]["rates"]["usable"]
    assert usable["ci_low"] < 0.5 < usable["ci_high"]  # two of four: the rest is not known
    assert "gone.private 1" in say("audit", "--page", "page.html")
    assert "gone.private" in (project / "page.html").read_text()


def test_status_tells_of_an_unfinished_download(project: Path) -> None:
    assert next(r for r in facts("status") if r["stage"] == "download")["state"] == "not run"
    record({KEYS[0]: "", KEYS[1]: "gone.private", KEYS[5]: ""})
    row = next(r for r in facts("status") if r["stage"] == "download")
    assert (row["state"], row["ok"], row["failed"], row["reasons"]) == ("begun", 2, 1, {"gone.private": 1})


def test_what_changed_since_a_run_or_a_day(project: Path) -> None:
    run = record({KEYS[0]: "", KEYS[1]: "gone.private", KEYS[2]: "gone.private"}, NOW_MS - 100 * DAY_MS)
    record({KEYS[1]: "", KEYS[3]: ""})
    day = time.strftime("%Y-%m-%d", time.gmtime((NOW_MS - 50 * DAY_MS) / 1000))
    for since in (run, day):
        drift = facts("audit", "--since", since)["drift"]
        assert drift["n_both"] == 3
        assert [r["clip_id"] for r in drift["resurrected"]] == [youtube_id(KEYS[1], 0, 10)]
    assert "1 back" in say("audit", "--since", run)
    with pytest.raises(ConfigError, match=f"neither a date such as 2026-11-01 nor a run. Last runs: {run}"):
        say("audit", "--since", "last week")


def test_two_laboratories_find_what_both_hold(project: Path) -> None:
    record(dict.fromkeys(KEYS[:3], ""))
    (project / "a.json").write_text(say("audit", "--json"))
    shutil.rmtree(load("paths", Paths).ledger)
    record(dict.fromkeys(KEYS[1:6], ""))
    (project / "b.json").write_text(say("audit", "--json"))
    rows = {r["split"]: r for r in facts("compare", "a.json", "b.json", "--ids", "both.txt")}
    assert (rows["test"]["n_a"], rows["test"]["n_b"], rows["test"]["n_both"]) == (3, 3, 2)
    assert (project / "both.txt").read_text().split() == [youtube_id(k, 0, 10) for k in KEYS[1:3]]
    assert rows["test"]["common"]["n_present"] == 2
    assert "audiocaps" in say("compare", "a.json", "b.json")
    for name, held in (("c.csv", KEYS[:3]), ("d.txt", KEYS[2:7])):
        (project / name).write_text("".join(f"{k}\n" for k in held))
    row = facts("compare", "c.csv", "d.txt", "--dataset", "audiocaps", "--split", "test")[0]
    assert (row["n_total"], row["n_a"], row["n_b"], row["n_both"]) == (4, 3, 2, 1)
    with pytest.raises(ConfigError, match="Say of which split: --dataset audiocaps --split test"):
        say("compare", "c.csv", "d.txt")
    (project / "c.json").write_text("nothing")
    with pytest.raises(DataError, match=r"c.json: not an audit report"):
        say("compare", "a.json", "c.json")


def test_before_anything_is_asked_for_others_lists_are_audited(project: Path) -> None:
    with pytest.raises(DataError, match="has no shards"):
        say("audit")
    (project / "theirs.txt").write_text("".join(f"{k}\n" for k in KEYS[:3]))
    say("import", "theirs.txt", "--who", "Lab X", "--dataset", "audiocaps", "--split", "test")
    report = facts("audit", "--page", "page.html")
    assert [(o["n_present"], o["n_listed"]) for o in report["observations"]] == [(3, 4)]
    assert all(s["rates"] is None for s in report["splits"])
    assert "Lab X" in (project / "page.html").read_text()


def test_another_laboratory_s_list_is_counted_and_named(project: Path) -> None:
    record(dict.fromkeys(KEYS[:2], ""))
    (project / "theirs.csv").write_text("file_name,caption\n" + "".join(f"Y{k}.wav,x\n" for k in KEYS[1:4]))
    with pytest.raises(ConfigError, match="say of which list it is: --dataset audiocaps --split test"):
        say("import", "theirs.csv", "--who", "Lab X")
    told = facts(
        "import", "theirs.csv", "--who", "Lab X", "--when", "2023-03", "--dataset", "audiocaps", "--split", "test"
    )
    assert told["n_ids"] == 3
    seen = facts("audit")["observations"]
    assert [(o["who"], o["when"], o["n_present"], o["n_listed"]) for o in seen] == [("Lab X", "2023-03", 3, 4)]
    assert seen[0]["agreement"] == {"both": 1, "only_us": 1, "only_them": 0, "neither": 0}
    assert "Lab X (2023-03): 3 of 4" in say("audit")


def test_media_of_a_folder_are_found_where_they_lie(project: Path) -> None:
    (project / "lab").mkdir()
    (project / f"lab/{KEYS[0]}.mp4").write_bytes(b"media")
    (project / "lab/notes.txt").write_text("notes")
    told = facts("import", "lab")
    assert told["n_files"] == 1
    assert sum(s["n_matched"] for s in told["splits"]) == 1
    assert "raise download.round" in say("import", "lab", "--into", "index")
    assert (project / "index").is_dir()


def test_what_is_forgotten_is_held_no_more(project: Path) -> None:
    paths = load("paths", Paths)
    with ShardWriter(paths.media, 0, fingerprint="f", columns=COLUMNS) as out:
        for clip in clips()[:3]:
            out.write(clip.id, media=b"secret", container="mp4", start_s=0.0, end_s=1.0, has_images=True)
    record(dict.fromkeys(KEYS[:3], ""))
    report = facts("forget", "--why", "asked to", "--who", "J. Doe", "--", KEYS[0])
    assert report["clip_ids"] == [youtube_id(KEYS[0], 0, 10)]
    split = facts("audit")["splits"][0]
    assert split["groups"]["ok"] == 2
    assert split["missing"]["reason"] == ["local.forgotten"]
    again = say("forget", "--why", "asked to", "--who", "J. Doe", "--", KEYS[0])
    assert "--no-run-cache" in again
    with pytest.raises(ConfigError):
        say("forget", "--why", "w", "--who", "w", "--", "no such clip")


def test_an_estimate_tells_days_and_order(project: Path) -> None:
    rows = facts("estimate")
    assert [r["host"] for r in rows] == ["youtube"]
    assert [(p["split"], p["n_clips"]) for p in rows[0]["in_order"]] == [("test", 4), ("train", 8)]
    assert 0 < rows[0]["days"] < 1
    record(dict.fromkeys(KEYS[:4], "gone.private"))
    assert [(p["split"], p["n_clips"]) for p in facts("estimate")[0]["in_order"]] == [("train", 8)]
    assert "audiocaps train: 8" in say("estimate")


def test_terms_are_shown_and_accepted_by_somebody(project: Path) -> None:
    assert facts("accept-terms", "youtube")["is_accepted"] is False
    with pytest.raises(HarkenError, match="add --who"):
        say("accept-terms", "youtube")
    assert TERMS["youtube"].url in say("accept-terms", "youtube", "--who", "J. Doe")
    assert facts("accept-terms", "youtube")["is_accepted"] is True
    with pytest.raises(ConfigError, match="accept-terms: unknown name 'vimeo'"):
        say("accept-terms", "vimeo")


def test_a_rule_that_has_changed_judges_the_past_anew(project: Path) -> None:
    record({KEYS[0]: "unknown.unmapped", KEYS[1]: ""}, rule_version="older")
    told = facts("reclassify", "--dry-run")
    assert told == {"changes": {"unknown.unmapped -> gone.private": 1}, "is_written": False}
    assert facts("audit")["splits"][0]["groups"]["unknown"] == 1
    assert "unknown.unmapped -> gone.private: 1" in say("reclassify")
    assert facts("audit")["splits"][0]["groups"]["gone"] == 1
    assert facts("reclassify")["changes"] == {}
    then = read(load("paths", Paths).ledger)["reason_then"].to_pylist()
    assert "unknown.unmapped" in then  # what was said then is kept


@dataclass
class Api:
    """videos.list of a few videos."""

    present: set[str]
    calls: list[list[str]] = field(default_factory=list)


@contextlib.contextmanager
def serving(api: Api) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            ids = parse_qs(urlsplit(self.path).query)["id"][0].split(",")
            api.calls.append(ids)
            status = {"uploadStatus": "processed", "privacyStatus": "public", "license": "youtube", "embeddable": True}
            items = [
                {"kind": "youtube#video", "id": i, "status": status, "contentDetails": {"duration": "PT1M"}}
                for i in ids
                if i in api.present
            ]
            page = {"totalResults": len(items), "resultsPerPage": len(items)}
            body = json.dumps({"kind": "youtube#videoListResponse", "items": items, "pageInfo": page}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/youtube/v3"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_census_asks_once_and_knows_no_reasons(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARKEN_YOUTUBE_API_KEY", "a key")
    canary = YAML(typ="safe").load(Path("params.yaml").read_text())["download"]["fetch"]["youtube"]["canaries"][0]
    api = Api({canary, *KEYS[:7]})
    with serving(api) as base:
        first = facts("census", "--base-url", base, "--limit", "8")
        assert sum(first["found"].values()) == 8
        rest = facts("census", "--base-url", base)
        assert sum(rest["found"].values()) == 4
        assert facts("census", "--base-url", base)["found"] == {}
        assert sum(facts("census", "--base-url", base, "--older-than", "0", "--limit", "3")["found"].values()) == 3
    found = {k: first["found"].get(k, 0) + rest["found"].get(k, 0) for k in ("present", "gone.unspecified")}
    assert found == {"present": 7, "gone.unspecified": 5}
    assert all(canary in call for call in api.calls)
    report = facts("audit")
    assert all(s["n_visited"] == 0 for s in report["splits"])  # nothing was asked for: what is usable is not known
    seen = {o["split"]: (o["who"], o["n_present"], o["n_listed"]) for o in report["observations"]}
    assert seen == {"test": ("our census", 4, 4), "train": ("our census", 3, 8)}
    due = facts("estimate")[0]["in_order"]
    assert sum(p["n_clips"] for p in due) == 7  # what is there is to be fetched now, what was not is asked for later
    table = read(load("paths", Paths).ledger)
    assert pa.compute.all(pa.compute.equal(table["step"].cast(pa.string()), "census")).as_py()
