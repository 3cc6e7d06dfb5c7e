"""The page in a real browser: no console errors, the list filters, the plots are there, both themes, desk and phone."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest

from harken.audit import page

pytestmark = pytest.mark.skipif(
    chromium.BROWSER is None, reason="no chromium or google-chrome on PATH (Debian: apt-get install chromium)"
)
SHOWN = (
    "[...document.querySelectorAll('#rows tr')]"
    ".map((r) => [...r.cells].map((c) => (c.querySelector('code') || c).textContent))"
)
STATUS = "document.getElementById('shown').textContent"


@pytest.fixture(scope="module")
def file(full: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "audit.html"
    path.write_text(page.render(full), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Chromium]:
    with chromium.Chromium() as started:
        yield started


@pytest.fixture(autouse=True)
def nothing_to_complain(browser: chromium.Chromium, file: Path) -> Iterator[None]:
    """After every test: no console error, no exception, nothing refused by the policy, nothing asked of a network."""
    browser.errors.clear()
    browser.requests.clear()
    yield
    assert browser.errors == []
    assert {r.split(":")[0] for r in browser.requests} <= {"file", "blob"}


def choose(browser: chromium.Chromium, name: str, value: str) -> None:
    event = "input" if name == "words" else "change"
    browser.run(
        f"{{ const e = document.getElementById({json.dumps(name)}); e.value = {json.dumps(value)};"
        f" e.dispatchEvent(new Event({json.dumps(event)}, {{bubbles: true}})); }}"
        " new Promise((done) => setTimeout(done, 60))"
    )


def missing(full: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (f"{s['dataset']} {s['split']}", *row)
        for s in full["splits"]
        for row in zip(*(s["missing"][k] for k in ("clip_id", "group", "reason")), strict=True)
    ]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_the_screen_in_both_themes(browser: chromium.Chromium, file: Path, width: int, dark: bool) -> None:
    browser.open(file, width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= width
    light = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (light < 60) == dark
    # no figure or word of a plot beyond the edge of the page
    beyond = "[...document.querySelectorAll('svg text')].map((t) => t.getBoundingClientRect())"
    assert browser.run(f"{beyond}.every((b) => b.left >= 0 && b.right <= innerWidth || b.width === 0)")


def test_the_theme_can_be_chosen_and_is_kept(browser: chromium.Chromium, file: Path) -> None:
    browser.open(file)
    colour = "getComputedStyle(document.body).backgroundColor"
    light = browser.run(colour)
    browser.run("document.getElementById('theme').click()")
    dark = browser.run(colour)
    assert dark != light
    assert browser.run("document.getElementById('theme').textContent") == "Light theme"
    browser.open(file)
    assert browser.run(colour) == dark
    browser.run("document.getElementById('theme').click()")
    assert browser.run(colour) == light


def test_plots_are_there_and_not_empty(browser: chromium.Chromium, file: Path, full: dict[str, Any]) -> None:
    browser.open(file)
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    n_plots = sum(bool(s["labels"]) + bool(s["since_when"]) for s in full["splits"])
    sizes = browser.run(
        "[...document.querySelectorAll('svg.plot')].map((p) => [p.getBoundingClientRect().width,"
        " p.querySelectorAll('circle, polygon').length])"
    )
    assert len(sizes) == n_plots
    assert all(width > 200 and n_marks > 3 for width, n_marks in sizes)
    bars = "[...document.querySelectorAll('svg.row rect.bar')].map((b) => b.getBoundingClientRect().width)"
    assert min(browser.run(bars)) > 100


def test_the_list_shows_what_is_missing_page_by_page(
    browser: chromium.Chromium, file: Path, full: dict[str, Any]
) -> None:
    browser.open(file)
    expected = [list(row) for row in missing(full)]
    assert browser.run(SHOWN) == expected[:25]
    choose(browser, "size", "500")
    browser.run("document.getElementById('next').click()")
    assert browser.run(SHOWN) == expected[500:1000]
    browser.run("document.getElementById('first').click()")
    assert browser.run(SHOWN) == expected[:500]
    assert browser.run("document.getElementById('previous').disabled")


def test_the_list_filters(browser: chromium.Chromium, file: Path, full: dict[str, Any]) -> None:
    browser.open(file)
    choose(browser, "size", "500")
    rows = missing(full)
    choose(browser, "reason", "gone.copyright_claim")
    choose(browser, "part", "audiocaps test")
    wanted = [list(r) for r in rows if r[0] == "audiocaps test" and r[3] == "gone.copyright_claim"]
    assert browser.run(SHOWN) == wanted
    choose(browser, "words", wanted[3][1].upper())  # a whole id, however it is spelled
    assert browser.run(SHOWN) == [wanted[3]]
    choose(browser, "words", "no such clip")
    assert browser.run(STATUS) == "No clip fits."
    browser.run("document.querySelector('button[type=reset]').click(); new Promise((d) => setTimeout(d, 60))")
    assert browser.run(STATUS).replace("\u202f", "").endswith(f"of {len(rows)}")
    choose(browser, "words", "DENIED geo")  # every word somewhere in id, group or reason
    found = browser.run(SHOWN)
    assert found == [list(r) for r in rows if "denied" in r[3] and "geo" in (r[1] + r[3]).lower()]


def test_a_reason_s_count_leads_to_its_clips(browser: chromium.Chromium, file: Path, full: dict[str, Any]) -> None:
    browser.open(file)
    browser.run(
        'document.querySelector(\'a[data-find="gone.private"][data-part="audiocaps val"]\').click();'
        " new Promise((d) => setTimeout(d, 60))"
    )
    expected = [list(r) for r in missing(full) if r[0] == "audiocaps val" and r[3] == "gone.private"]
    assert browser.run(STATUS).split(" found")[0].endswith(f"of {len(expected)}")
    assert browser.run(SHOWN) == expected[:25]


@pytest.mark.parametrize("column", [0, 1, 2, 3])
def test_the_list_sorts_both_ways(browser: chromium.Chromium, file: Path, full: dict[str, Any], column: int) -> None:
    browser.open(file)
    names = sorted(r[column] for r in missing(full))
    head = f"document.querySelectorAll('#missing-table thead th')[{column}]"
    browser.run(f"{head}.querySelector('button').click()")
    assert [r[column] for r in browser.run(SHOWN)] == names[:25]
    assert browser.run(f"{head}.getAttribute('aria-sort')") == "ascending"
    browser.run(f"{head}.querySelector('button').click()")
    assert [r[column] for r in browser.run(SHOWN)] == names[::-1][:25]


def test_the_filtered_list_is_saved_as_csv(browser: chromium.Chromium, file: Path, full: dict[str, Any]) -> None:
    browser.open(file)
    choose(browser, "part", "audiocaps val")
    browser.run(
        "globalThis.saved = []; URL.createObjectURL = (blob) => { saved.push(blob); return '#missing'; };"
        " HTMLAnchorElement.prototype.click = () => {}; document.getElementById('save').click()"
    )
    lines = list(csv.reader(browser.run("saved[0].text()").splitlines()))
    assert lines[0] == ["part", "clip_id", "group", "reason"]
    assert lines[1:] == [list(r) for r in missing(full) if r[0] == "audiocaps val"]


def test_ids_and_passports_are_copied(browser: chromium.Chromium, file: Path, full: dict[str, Any]) -> None:
    browser.open(file)
    browser.run("navigator.clipboard.writeText = async (text) => { globalThis.copied = text; }")
    browser.run("document.querySelector('#rows .copy').click()")
    assert browser.run("copied") == missing(full)[0][1]
    assert browser.run("document.querySelector('#rows .copy').textContent") == "Copied"
    browser.run("document.querySelector('[data-from]').click()")
    assert browser.run("copied") == full["splits"][0]["passport"]["bitmap"]


def test_the_calculator_gives_manski_s_bounds(browser: chromium.Chromium, file: Path, full: dict[str, Any]) -> None:
    browser.open(file)
    share = full["splits"][0]["sensitivity"]["share_missing"]
    browser.run(
        "document.getElementById('metric').value = '40';"
        " document.getElementById('calculator').dispatchEvent(new Event('input'))"
    )
    said = browser.run("document.getElementById('bounds').textContent")
    assert f"between {40 * (1 - share):.1f} and {40 * (1 - share) + 100 * share:.1f}" in said
    browser.run(
        "document.getElementById('metric').value = '140';"
        " document.getElementById('calculator').dispatchEvent(new Event('input'))"
    )
    assert browser.run("document.getElementById('bounds').textContent") == "A metric in percent: 0 to 100."


def test_without_javascript_the_first_rows_and_all_plots_are_there(
    browser: chromium.Chromium, file: Path, full: dict[str, Any]
) -> None:
    browser.open(file, scripts=False)
    browser.page("Emulation.setScriptExecutionDisabled", {"value": False})  # to ask; the page's own script has not run
    assert browser.run(SHOWN) == [list(r) for r in missing(full)[: page.N_FIRST_ROWS]]
    visible = "[...document.querySelectorAll('button, form')].filter((e) => e.getClientRects().length)"
    assert browser.run(f"{visible}.length") == 0
    assert browser.run("document.querySelectorAll('svg.plot circle').length") > 50


def test_paper_is_light_and_has_no_controls(browser: chromium.Chromium, file: Path) -> None:
    browser.open(file, dark=True)
    on_paper = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.page("Emulation.setEmulatedMedia", on_paper)
    assert browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]") > 200
    shown = "[...document.querySelectorAll('button, select, input')].filter((e) => e.getClientRects().length)"
    assert browser.run(f"{shown}.map((e) => e.closest('thead') !== null)") == [True] * 4  # the list's column heads
    browser.page("Emulation.setEmulatedMedia", {"media": ""})


def test_hostile_words_stay_words(browser: chromium.Chromium, full: dict[str, Any], tmp_path: Path) -> None:
    evil = "</script><script>globalThis.owned=1</script><img src=x onerror=owned=1>\"'\u202e"
    lost = full["splits"][0]["missing"]
    hostile = {
        **full["splits"][0],
        "missing": {**lost, "clip_id": [evil + str(i) for i in range(len(lost["clip_id"]))]},
    }
    path = tmp_path / "hostile.html"
    path.write_text(page.render({**full, "splits": [hostile, *full["splits"][1:]]}), encoding="utf-8")
    browser.open(path)
    assert browser.run("typeof globalThis.owned") == "undefined"
    assert browser.run(SHOWN)[0][1] == evil + "0"
    assert browser.run("document.querySelectorAll('img').length") == 0
