"""The audit report as one HTML file: it opens from a disk, prints, and needs no network.

Bars are inline SVG, styles and the search of the missing list are inline too. Everything that comes from outside (ids,
labels, messages of other programs) is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2

GROUP_MEANINGS = {
    "ok": "usable: fetched, decoded and checked",
    "gone": "gone from the platform for everybody",
    "denied": "there, but not for us: country, age, membership",
    "content": "served, but not usable: silent, too short, broken",
    "ours": "our own trouble: network, tools, rate limits; undecided",
    "unknown": "suspected, not proven; undecided",
    "absent": "never in our local folder; undecided",
    "unvisited": "not visited yet",
}
RATE_MEANINGS = {"platform": "not gone from the platform", "access": "open to us", "usable": "held and checked"}
N_WORST_LABELS = 15
N_MESSAGES = 20
N_FIRST_ROWS = 100  # written as HTML, so that the list is there without JavaScript
N_MISSING = 50_000  # carried by the page; beyond, a browser takes seconds to open it


def render(report: Mapping[str, Any]) -> str:
    """The HTML page of a report of `harken.audit.rates.audit`: self-contained and deterministic.

    Lists up to N_MISSING missing clips and says so where there are more; the report itself holds all of them.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "count": count, "span": span}
    source = resources.files("harken.audit").joinpath("page.html.j2").read_text(encoding="utf-8")
    missing = [
        [f"{s['dataset']} {s['split']}", m["clip_id"], m["group"], m["reason"]]
        for s in report["splits"]
        for m in s["missing"]
    ]
    return environment.from_string(source).render(
        report=report,
        group_meanings=GROUP_MEANINGS,
        rate_meanings=RATE_MEANINGS,
        segments={_name(s): _segments(s["groups"], s["n_total"]) for s in report["splits"]},
        worst={_name(s): _worst(s["labels"]) for s in report["splits"]},
        messages=report["unmapped"]["messages"][:N_MESSAGES],
        missing=missing[:N_MISSING],
        n_missing=len(missing),
        first_rows=missing[:N_FIRST_ROWS],
        n_first_rows=N_FIRST_ROWS,
    )


def percent(share: float) -> str:
    """0.7854 -> `78.5 %`. Never `100.0 %` or `0.0 %` for a share that is not quite all or none."""
    text = f"{100 * share:.1f}"
    if text == "100.0" and share < 1:
        text = ">99.9"
    if text == "0.0" and share > 0:
        text = "<0.1"
    return f"{text}\u202f%"


def count(n: int) -> str:
    """2041789 -> `2 041 789`, with thin spaces that do not break."""
    return f"{n:,}".replace(",", "\u202f")


def span(low: float, high: float) -> str:
    """`79.1 % to 80.3 %`, or one percentage where both read the same."""
    first, last = percent(low), percent(high)
    return first if first == last else f"{first} to {last}"


def _name(split: Mapping[str, Any]) -> str:
    return f"{split['dataset']} {split['split']}"


def _segments(groups: Mapping[str, int], n_total: int) -> list[dict[str, Any]]:
    """The stacked bar of a split: where each group begins and how wide it is, in thousandths of the bar."""
    found, start = [], 0
    for group, n in groups.items():
        if n:
            found.append({"group": group, "count": n, "x": 1000 * start / n_total, "width": 1000 * n / n_total})
        start += n
    return found


def _worst(labels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The labels worst off for certain: by the upper end of the interval, so that one lost clip of two is not first."""
    return sorted(labels, key=lambda x: (x["ci_high"], x["label"]))[:N_WORST_LABELS]
