"""The page is one well-formed file, needs no network, escapes what comes from outside and says what the report says."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harken.audit import drawings, page
from harken.audit.rates import audit
from harken.clips import Clip, Manifest, Source, Split
from harken.media import reasons

VOID = {"meta", "input", "br", "link", "img", "hr"}
REASONS = ["", "", "", "", "", "gone.private", "gone.private", "denied.geo", "qc.silent", "unknown.unmapped"]
EVIL = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>\u202ebackwards\u0007"


def manifest(n: int, dataset: str = "audioset", split: str = "test", label: str = "Label") -> pa.Table:
    clips = (
        Clip(f"yt:{i}", dataset, Split(split), Source("youtube", str(i)), 0.0, 10.0, labels=(f"{label} {i % 3}",))
        for i in range(n)
    )
    return Manifest.build(clips, 1).table


def report(n: int = 60, n_listed: int | None = None, message: str = "odd", **options: Any) -> dict[str, Any]:
    codes = [REASONS[i % 10] for i in range(n)]
    ledger = pd.DataFrame(
        {
            "clip_id": [f"yt:{i}" for i in range(n)],
            "status": ["failed" if r else "ok" for r in codes],
            "reason": codes,
            "message": [message if r else "" for r in codes],
        }
    )
    return audit(manifest(n_listed or n, **options), ledger, reasons.group)


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

    @property
    def listed(self) -> dict[str, Any]:
        return dict(json.loads(next(s for s in self.scripts if s.startswith("{"))))

    def of(self, kind: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.tags if kind in str(a.get("class")).split()]


def ids_of(listed: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(part, id, reason) of every row that a page carries, read as its script reads them."""

    def number(text: str, at: int, width: int) -> int:
        n = 0
        for letter in text[at * width : (at + 1) * width]:
            n = 64 * n + page.ALPHABET.index(letter)
        return n

    rows = []
    for b in listed["blocks"]:
        for i in range(b["n"]):
            key = b["keys"][i * b["size"] : (i + 1) * b["size"]] if isinstance(b["keys"], str) else b["keys"][i]
            reason = listed["reasons"][number(b["reason"], i, listed["width"])][0]
            rows.append((b["part"], b["head"] + key + b["tails"][number(b["tail"], i, b["width"])], reason))
    return rows


def rows_of(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (f"{s['dataset']} {s['split']}", i, r)
        for s in report["splits"]
        for i, r in zip(s["missing"]["clip_id"], s["missing"]["reason"], strict=True)
    ]


@pytest.mark.parametrize("is_full", [False, True])
def test_tags_nest_ids_are_unique_and_links_lead_somewhere(is_full: bool, full: dict[str, Any]) -> None:
    read = Page(page.render(full if is_full else report()))
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in read.tags if "aria-labelledby" in a} <= set(ids)
    assert {str(a["href"]).removeprefix("#") for _, a in read.tags if "href" in a} <= set(ids)
    names = [t for t, _ in read.tags]
    assert names.count("h1") == names.count("main") == names.count("header") == names.count("nav") == 1


def test_nothing_is_fetched_from_anywhere(full: dict[str, Any]) -> None:
    html = page.render(full)
    assert not re.search(r"https?:|@import|url\(", html)
    assert all(not ({"src", "href"} & a.keys()) or str(a.get("href")).startswith("#") for _, a in Page(html).tags)


def test_its_policy_allows_its_own_style_and_script_only() -> None:
    read = Page(page.render(report()))
    policy = next(str(a["content"]) for _, a in read.tags if a.get("http-equiv") == "Content-Security-Policy")
    style, _, script = read.scripts
    for text in (style, script):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not any("style" in a or any(k.startswith("on") for k in a) for _, a in read.tags)


def test_what_comes_from_outside_is_escaped_wherever_it_is_shown(full: dict[str, Any]) -> None:
    found = copy.deepcopy(full)
    for s in found["splits"]:
        s["dataset"] = EVIL
        for x in (*s["labels"], *s["reason_by_label"]):
            x["name"] = x["label"] = EVIL
        for x in (s["words"] or {"missing": []})["missing"]:
            x["word"] = EVIL
        s["missing"]["clip_id"] = [EVIL + str(i) for i in range(len(s["missing"]["clip_id"]))]
        if s["passport"]:
            s["passport"]["text"] = EVIL
        if s["since_when"]:
            s["since_when"]["sources"] = [EVIL]
    for o in found["observations"]:
        o["who"] = o["source"] = o["dataset"] = EVIL
    for x in (*found["drift"]["newly_missing"], *found["drift"]["resurrected"]):
        x["clip_id"] = EVIL
    found["unmapped"]["messages"] = [{"message": EVIL, "count": 1}]
    html = page.render(found)
    read = Page(html)
    assert "<img" not in html
    assert "</script><script>alert" not in html
    assert [t for t, _ in read.tags].count("script") == 2
    shown = re.sub(r'data-copy="[^"]*"', "", html)
    assert "\u202e" not in shown  # shown as an escape: it would turn around what stands beside it
    assert "alert(1)</script>" in " ".join(read.text)  # it is there to read, as text
    assert ids_of(read.listed)[0][1] == EVIL + "0"  # the list itself carries ids as they are


def test_it_says_what_the_report_says() -> None:
    words = Page(page.render(report())).words
    assert "The official lists name 60 clips; 60 visited." in words
    assert "50.0 % are usable" in words
    assert "70.0 % to 80.0 %" in words  # platform, with the undecided tenth
    for reason in set(REASONS) - {""}:
        assert reason in words
    assert "The causes below cannot be trusted yet." in words


def test_questions_are_answered_in_order(full: dict[str, Any]) -> None:
    html = page.render(full)
    places = [html.index(f'<h2 id="{name}">') for name in ("left", "missing", "why", "since", "matter", "compare")]
    assert places == sorted(places)


def test_every_part_of_a_full_report_is_there(full: dict[str, Any]) -> None:
    found, read = full, Page(page.render(full))
    words = read.words
    labelled = [s for s in found["splits"] if s["labels"]]
    assert len(read.of("point")) == sum(len(s["labels"]) for s in labelled)
    assert len(read.of("biased")) == sum(s["n_biased_labels"] for s in labelled) > 0
    assert len(read.of("passport")) == sum(s["passport"]["n_present"] > 0 for s in found["splits"])
    assert len(read.of("stack")) == len(found["splits"])
    assert len(read.of("band")) == sum(len(s["since_when"]["curve"]) - 1 for s in found["splits"] if s["since_when"])
    assert f"{len(found['drift']['newly_missing'])} are newly missing" in words
    for text in ("Laboratory of the north", "Tsubaki et al. 2024", "McNemar", "Labels with fewer than 50", "Harp"):
        assert text in words
    for s in found["splits"]:
        assert s["sensitivity"] is None or " ".join(s["sensitivity"]["text"].split()) in words
        assert s["passport"]["n_present"] == 0 or s["passport"]["ids_sha256"] in words


def test_bars_have_the_width_of_their_rates() -> None:
    read = Page(page.render(report()))
    assert "50.00%" in [a["width"] for a in read.of("bar") if "width" in a]
    segments = [a for t, a in read.tags if t == "rect" and str(a["class"]).startswith("g-")]
    assert [a["class"] for a in segments] == [f"g-{g}" for g in ("ok", "gone", "denied", "content", "unknown")]
    assert sum(float(str(a["width"]).rstrip("%")) for a in segments) == pytest.approx(100, abs=0.1)


def test_the_list_carries_every_missing_clip(full: dict[str, Any]) -> None:
    for found in (full, report()):
        assert ids_of(Page(page.render(found)).listed) == rows_of(found)


ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9)
times = st.builds(
    "yt:{}:{}-{}".format, st.text("abc-_:", min_size=1, max_size=4), st.integers(0, 99), st.integers(0, 9)
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(ids, times), min_size=1, max_size=30))
def test_ids_come_back_from_their_columns(found: list[str]) -> None:
    block = {"part": "p", "n": len(found), "reason": "A" * len(found), **page._id_columns(found)}
    listed = {"reasons": [["r", "gone"]], "width": 1, "blocks": [json.loads(json.dumps(block))]}
    assert [i for _, i, _ in ids_of(listed)] == found


def test_codes_have_room_for_many_words() -> None:
    numbers = [0, 63, 64, 4095, 4096, 5000]
    text = page._codes(numbers, 5001)
    assert len(text) == 3 * len(numbers)
    assert text[:3] == "AAA"
    assert [page._width(n) for n in (1, 64, 65, 4096, 4097)] == [1, 1, 2, 2, 3]


def test_what_the_page_leaves_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "N_FIRST_ROWS", 7)
    monkeypatch.setattr(page, "N_MISSING", 20)
    html = page.render(report())
    read = Page(html)
    assert ids_of(read.listed) == rows_of(report())[:20]
    assert "30 rows" in read.words
    assert "Of audioset test this page carries the first 20 of 30; the JSON report holds all." in read.words
    assert len(re.findall(r"<tr><td>audioset test</td>", html)) == 7


def test_small_splits_are_carried_whole() -> None:
    assert page._carried([900, 5, 0, 40], 100) == [55, 5, 0, 40]
    assert page._carried([900, 5, 40], 10_000) == [900, 5, 40]


def test_part_of_a_list_is_said_to_be_a_part() -> None:
    words = Page(page.render(report(60, 80))).words
    assert "30 clips are usable of 60 visited; the official list has 80" in words
    assert "so the part visited is a sample of its list" in words


def test_others_are_named_for_official_lists_only() -> None:
    words = Page(page.render(report(60, 975, dataset="audiocaps"))).words
    assert "Tsubaki et al. 2024, Table II: 845" in words
    assert "this audit" in words
    assert "this audit" not in Page(page.render(report())).words


def test_nothing_visited_and_nothing_missing_are_pages_too() -> None:
    empty = audit(manifest(3), pd.DataFrame(columns=["clip_id", "status", "reason", "message"]), reasons.group)
    assert "3 clips, none visited yet" in Page(page.render(empty)).words
    whole = pd.DataFrame({"clip_id": ["yt:0"], "status": ["ok"], "reason": [""], "message": [""]})
    words = Page(page.render(audit(manifest(1), whole, reasons.group))).words
    assert "Nothing is missing among the clips visited." in words
    assert "1 of 1 clip is usable; all visited" in words


def test_same_report_same_page(full: dict[str, Any]) -> None:
    assert page.render(full) == page.render(json.loads(json.dumps(full)))


def test_numbers_read_as_people_write_them() -> None:
    assert page.count(2041789) == "2\u202f041\u202f789"
    assert page.percent(0.78549) == "78.5\u202f%"
    assert page.percent(0.99999) == ">99.9\u202f%"
    assert page.percent(1) == "100.0\u202f%"
    assert page.percent(0.00001) == "<0.1\u202f%"
    assert page.percent(0) == "0.0\u202f%"
    assert page.span(0.5, 0.50001) == "50.0\u202f%"
    assert [page.q_value(q) for q in (0.0001, 0.0123, 1.0)] == ["<0.001", "0.012", "1.000"]


def test_labels_worst_off_are_those_that_are_certainly_so() -> None:
    labels = [
        {"label": "one of one", "ci_high": 0.79, "n": 1},
        {"label": "many", "ci_high": 0.3, "n": 900},
    ]
    assert [x["label"] for x in page._worst(labels)] == ["many", "one of one"]


def test_controls_that_turn_text_around_are_spelled_out() -> None:
    assert drawings.visible("a\u202eb\nc") == "a\\u202eb\\u000ac"
    assert drawings.visible("na\u00efve \u4e2d") == "na\u00efve \u4e2d"


def test_names_in_a_funnel_do_not_overlap() -> None:
    labels = [
        {
            "label": f"l{i}",
            "name": f"l{i}",
            "n": 100 + i,
            "n_ok": 50,
            "rate": 0.5 + 0.01 * i,
            "q_value": 0.01,
            "is_biased": True,
            "is_rare": False,
        }
        for i in range(40)
    ]
    at = [float(y) for y in re.findall(r'y="([\d.]+)" class="name', drawings.funnel(labels, 0.8, "t"))]
    assert 2 <= len(at) <= drawings.N_NAMED
    assert min(abs(a - b) for i, a in enumerate(at) for b in at[:i]) >= drawings.NAME_GAP_PX


def test_a_name_in_a_funnel_hides_no_label_that_stands_out() -> None:
    label = {"n_ok": 1, "q_value": 0.01, "is_biased": True, "is_rare": False}
    near = [{**label, "label": n, "name": n, "n": 100 + i, "rate": 0.5} for i, n in enumerate("ab")]
    far = {**label, "label": "c", "name": "c", "n": 5000, "rate": 0.9, "is_biased": False}
    names = re.findall(r'class="name (\w+)"[^>]*>(\w)<', drawings.funnel([*near, far], 0.8, "t"))
    assert names == [("start", "b")]  # a, to its left, would have to cross b or leave the plot


def test_survival_band_is_between_neighbouring_dates() -> None:
    curve = [
        {"when": "2017-03-05", "alive_low": 1.0, "alive_high": 1.0, "n": 10},
        {"when": "2020-03-05", "alive_low": 0.8, "alive_high": 0.9, "n": 10},
        {"when": "2023-03-05", "alive_low": 0.5, "alive_high": 0.6, "n": 10},
    ]
    bands = re.findall(r'points="([^"]+)" class="band"', drawings.survival(curve, [], "t"))
    bottom = drawings.share_domain([0.5])[0]
    heights = [sorted({float(p.split(",")[1]) for p in b.split()}) for b in bands]
    for (top, low), (alive_high, alive_low) in zip(heights, [(1.0, 0.8), (0.9, 0.5)], strict=True):
        assert 1 - top / 1000 * (1 - bottom) == pytest.approx(alive_high, abs=1e-3)
        assert 1 - low / 1000 * (1 - bottom) == pytest.approx(alive_low, abs=1e-3)


def _luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _contrast(a: str, b: str) -> float:
    dark, light = sorted((_luminance(a), _luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_has_contrast_in_both_themes(theme: int) -> None:
    """At least 4.5 to 1 (WCAG 2.2, success criterion 1.4.3)."""
    css = page._part("page.css")
    colours = {n: (c, c) for n, c in re.findall(r"--([\w-]+): (#[0-9a-f]{6});", css)} | {
        n: (a, b) for n, a, b in re.findall(r"--([\w-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);", css)
    }
    pairs = [(text, ground) for text in ("ink", "soft", "link", "alarm") for ground in ("paper", "panel")]
    pairs += [("gone", "paper"), *((f"on-{g}", g) for g in page.GROUP_MEANINGS)]
    for text, ground in pairs:
        assert _contrast(colours[text][theme], colours[ground][theme]) >= 4.5, (text, ground)


def test_groups_of_the_page_are_those_of_the_audit() -> None:
    assert list(page.GROUP_MEANINGS) == list(report()["splits"][0]["groups"])
    css = page._part("page.css")
    assert all(f".g-{g} " in css and f"svg .on-{g} " in css for g in page.GROUP_MEANINGS)
