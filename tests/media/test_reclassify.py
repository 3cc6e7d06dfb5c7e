from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from harken.attempts import Attempt, AttemptLog, fold, new_id, read, seal, write_rulings
from harken.media import reclassify as module
from harken.media.reasons import MEASURED, POLICIES, REASONS, RULE_VERSION, classify
from harken.media.reclassify import COLUMNS, reclassify

RATE_LIMITED = "Video unavailable. This content isn't available, try again later"
T0 = 1_700_000_000_000


def record(folder: Path, *rows: tuple[str, str, dict[str, Any]], version: str = "older", step: str = "fetch") -> None:
    """One failed attempt per (reason given then, message, facts), at the clips c0, c1, ..."""
    with AttemptLog(folder, "run", f"w{version}-{step}") as log:
        for n, (reason, message, facts) in enumerate(rows):
            outcome = "failed" if reason else "ok"
            identity = new_id(T0 + n, random.Random(f"{n}{version}{step}"))
            said = (outcome, reason, version, message, facts, {})
            log.append(Attempt(identity, "run", "w", "a", f"c{n}", step, T0, T0 + n, *said))


def verdicts(folder: Path) -> list[str]:
    rows = sorted(read(folder).to_pylist(), key=lambda r: r["clip_id"])
    return [r["reason"] for r in rows]


def test_a_verdict_of_the_past_follows_the_rules_and_what_was_stored_stays(tmp_path: Path) -> None:
    record(
        tmp_path,
        ("gone.unspecified", RATE_LIMITED, {"where": "extract", "expected": True, "duration_s": 3.5}),
        ("gone.private", "Private video", {"info_id": "x", "formats": ["140"], "nested": {"http_status": "odd"}}),
        ("unknown.unmapped", "no words", {"http_status": 503}),
        ("unknown.unmapped", "", {"exception": "GeoRestrictedError", "countries": ["DE", "FR"]}),
        ("media.403", "HTTP Error 404: Not Found", {"where": "media", "http_status": None}),
        ("unknown.unmapped", "'x' is undefined", {"expected": False}),
        ("", "", {}),
    )
    expected = [
        "session.rate_limited", "gone.private", "net.5xx", "denied.geo", "media.404", "tool.extractor_broken", "",
    ]  # fmt: skip
    before = read(tmp_path)
    rulings = reclassify(read(tmp_path, COLUMNS))
    assert rulings.num_rows == 5
    assert set(rulings["rule_version"].to_pylist()) == {RULE_VERSION}
    assert write_rulings(tmp_path, rulings) == tmp_path / "rulings-00001.parquet"
    assert verdicts(tmp_path) == expected
    after = read(tmp_path)
    assert after["reason_then"].to_pylist() == before["reason"].to_pylist()
    states = dict(fold(after, POLICIES, T0 + 10**9)[["clip_id", "state"]].itertuples(index=False))
    assert states == {
        "c0": "retry", "c1": "gone", "c2": "retry", "c3": "denied", "c4": "retry", "c5": "retry", "c6": "ok",
    }  # fmt: skip
    seal(tmp_path, keep=())
    assert verdicts(tmp_path) == expected
    assert reclassify(read(tmp_path)).num_rows == 0  # once is enough


def test_rules_that_are_taken_back_give_the_old_verdict_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path, ("gone.private", "Private video", {}))
    with monkeypatch.context() as patch:
        patch.setattr(module, "RULE_VERSION", "a slip")
        patch.setattr(module, "classify", lambda message, **facts: REASONS["denied.age"])
        write_rulings(tmp_path, reclassify(read(tmp_path)))
    assert verdicts(tmp_path) == ["denied.age"]
    write_rulings(tmp_path, reclassify(read(tmp_path)))
    assert verdicts(tmp_path) == ["gone.private"]


def test_a_rule_that_went_leaves_no_verdict_behind(tmp_path: Path) -> None:
    record(tmp_path, ("gone.copyright_claim", "The dog ate it", {}))
    write_rulings(tmp_path, reclassify(read(tmp_path)))
    assert verdicts(tmp_path) == ["unknown.unmapped"]


def test_what_harken_found_out_itself_is_not_judged_by_its_words(tmp_path: Path) -> None:
    own = [(code, "Video unavailable", {"http_status": 404}) for code in sorted(MEASURED)]
    own += [("media.truncated", "the file changed while it was read: 5 bytes, then 6", {"where": "media"})]
    own += [("net.connect", "redirected to what is no HTTP address", {"http_status": 302})]
    own += [("denied.drm", "the chosen formats are DRM protected", {})]
    record(tmp_path, *own)
    assert reclassify(read(tmp_path)).num_rows == 0


def test_only_fetches_under_other_rules_are_judged(tmp_path: Path) -> None:
    row = ("gone.unspecified", RATE_LIMITED, {})
    record(tmp_path, row, version=RULE_VERSION)
    record(tmp_path, row, step="census")
    assert reclassify(read(tmp_path)).num_rows == 0
    record(tmp_path, row)
    assert reclassify(read(tmp_path)).num_rows == 1


def test_each_row_gets_its_own_facts(tmp_path: Path) -> None:
    messages = ["Video unavailable", "Private video", "", "HTTP Error 404: Not Found", RATE_LIMITED]
    known: list[dict[str, Any]] = [
        {}, {"http_status": 429}, {"where": "media"}, {"where": "extract", "http_status": 404}, {"countries": []},
        {"countries": ["DE"], "expected": True}, {"exception": "MemoryError"}, {"expected": False},
    ]  # fmt: skip
    rows = [("local.bug", m, {**f, "seen": n}) for n, (m, f) in enumerate((m, f) for m in messages for f in known)]
    record(tmp_path, *rows)
    table = read(tmp_path)
    rulings = reclassify(table)
    found = dict(zip(rulings["attempt_id"].to_pylist(), rulings["reason"].to_pylist(), strict=True))
    for row in table.to_pylist():
        _, message, facts = rows[int(row["clip_id"][1:])]
        assert found[row["attempt_id"]] == classify(message, **facts).code
