"""The page is one well-formed file, needs no network, escapes what comes from outside and says what the report says."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from harken.audit import page
from harken.audit.rates import audit
from harken.clips import Clip, Manifest, Source, Split

VOID = {"meta", "input", "br", "link", "img", "hr"}
REASONS = ["", "", "", "", "", "gone.private", "gone.private", "denied.geo", "qc.silent", "unknown.unmapped"]
EVIL = "<script>alert(1)</script>"


def group(code: str) -> str:
    return {"gone": "gone", "denied": "denied", "qc": "content", "unknown": "unknown"}[code.partition(".")[0]]


def manifest(n: int, dataset: str = "audioset", split: str = "test") -> pa.Table:
    clips = (
        Clip(
            f"yt:{i}", dataset, Split(split), Source("youtube", str(i)), 0.0, 10.0, labels=(f"Label {i % 3} & {EVIL}",)
        )
        for i in range(n)
    )
    return Manifest.build(clips, 1).table


def report(n: int = 60, n_listed: int | None = None, **options: Any) -> dict[str, Any]:
    reasons = [REASONS[i % 10] for i in range(n)]
    ledger = pd.DataFrame(
        {
            "clip_id": [f"yt:{i}" for i in range(n)],
            "status": ["failed" if r else "ok" for r in reasons],
            "reason": reasons,
            "message": [f"odd {EVIL}" if r else "" for r in reasons],
        }
    )
    return audit(manifest(n_listed or n, **options), ledger, group)


class Page(HTMLParser):
    """Reads a page and fails on tags that do not nest; keeps ids, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.text).append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def test_tags_nest_and_ids_are_unique() -> None:
    read = Page(page.render(report()))
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))
    labelled = [a["aria-labelledby"] for _, a in read.tags if "aria-labelledby" in a]
    assert set(labelled) <= set(ids)
    assert [t for t, _ in read.tags].count("h1") == 1


def test_nothing_is_fetched_from_anywhere() -> None:
    html = page.render(report())
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"^\s*//.*$", "", html, flags=re.M))
    assert all(not ({"src", "href"} & a.keys()) or str(a.get("href")).startswith("#") for _, a in Page(html).tags)


def test_what_comes_from_outside_is_escaped() -> None:
    html = page.render(report())
    assert EVIL not in html
    assert EVIL in " ".join(Page(html).text)  # it is there to read, as text
    assert len([t for t, _ in Page(html).tags if t == "script"]) == 2


def test_it_says_what_the_report_says() -> None:
    words = Page(page.render(report())).words
    assert "The official lists name 60 clips; 60 visited." in words
    assert "audioset test: 50.0 % usable" in words
    assert "70.0 % to 80.0 %" in words  # platform, with the undecided tenth
    for reason in set(REASONS) - {""}:
        assert reason in words
    assert "The causes below cannot be trusted yet." in words


def test_bars_have_the_width_of_their_rates() -> None:
    bars = [a for t, a in Page(page.render(report())).tags if t == "rect"]
    usable = 1000 * 0.5
    assert str(usable) in [a["width"] for a in bars]
    stacked = [a for a in bars if a["height"] == "26"]
    assert sum(float(str(a["width"])) for a in stacked) == pytest.approx(1000, abs=0.1)
    assert [a["fill"] for a in stacked] == [f"var(--{g})" for g in ("ok", "gone", "denied", "content", "unknown")]


def test_missing_list_is_carried_as_data_and_begins_as_html(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "N_FIRST_ROWS", 7)
    monkeypatch.setattr(page, "N_MISSING", 20)
    html = page.render(report())
    read = Page(html)
    data = next(s for s in read.scripts if s.startswith("[["))
    assert json.loads(data)[0] == ["audioset test", "yt:5", "gone", "gone.private"]
    assert len(json.loads(data)) == 20
    assert "30 rows" in read.words
    assert "the first 20; the JSON report holds all" in read.words
    assert len(re.findall(r"<tr><td>audioset test</td>", html)) == 7


def test_part_of_a_list_is_said_to_be_a_part() -> None:
    words = Page(page.render(report(60, 80))).words
    assert "30 clips are usable of 60 visited; the official list has 80" in words
    assert "unvisited 20 (25.0 %)" in words


def test_others_are_named_for_official_lists_only() -> None:
    words = Page(page.render(report(60, 975, dataset="audiocaps"))).words
    assert "845 86.7 % Tsubaki et al. 2024, Table II" in words
    assert "this audit" in words
    assert "this audit" not in Page(page.render(report())).words


def test_nothing_visited_and_nothing_missing_are_pages_too() -> None:
    empty = audit(manifest(3), pd.DataFrame(columns=["clip_id", "status", "reason", "message"]), group)
    assert "3 clips, none visited yet." in Page(page.render(empty)).words
    whole = pd.DataFrame({"clip_id": ["yt:0"], "status": ["ok"], "reason": [""], "message": [""]})
    words = Page(page.render(audit(manifest(1), whole, group))).words
    assert "Nothing is missing among the clips visited." in words
    assert "100.0 % usable" in words


def test_same_report_same_page() -> None:
    assert page.render(report()) == page.render(json.loads(json.dumps(report())))


def test_numbers_read_as_people_write_them() -> None:
    assert page.count(2041789) == "2\u202f041\u202f789"
    assert page.percent(0.78549) == "78.5\u202f%"
    assert page.percent(0.99999) == ">99.9\u202f%"
    assert page.percent(1) == "100.0\u202f%"
    assert page.percent(0.00001) == "<0.1\u202f%"
    assert page.percent(0) == "0.0\u202f%"
    assert page.span(0.5, 0.50001) == "50.0\u202f%"


def test_labels_worst_off_are_those_that_are_certainly_so() -> None:
    labels = [
        {"label": "one of one", "ci_high": 0.79, "n": 1},
        {"label": "many", "ci_high": 0.3, "n": 900},
    ]
    assert [x["label"] for x in page._worst(labels)] == ["many", "one of one"]
