"""The audit report as one HTML file: it opens from a disk, prints, and needs no network.

Its parts lie beside this module: `page.html.j2` (words and tables), `page.css`, `page.js` (list, calculator, theme) and
`drawings` (plots). Everything that comes from outside (ids, labels, messages of other programs) is escaped, and the
page's content security policy forbids it to run or fetch anything that was not written here.

The list of missing clips travels as columns of text, 14 bytes a row where rows of JSON took 77: a page of 387,000 rows
has 5.8 MB, answers after 0.3 to 0.4 s in headless Chromium and finds a word in 0.07 s (2 cores).
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from harken.audit import drawings

Report = Mapping[str, Any]

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
N_RARE_LABELS = 60  # named one by one
N_MESSAGES = 20
N_CHANGED = 50  # clips listed under what changed between two runs
N_FIRST_ROWS = 100  # written as HTML, so that the list is there without JavaScript
N_MISSING = 600_000  # carried by the page, 8 MB: room for 27 % of AudioSet, the most that any laboratory lacked
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"  # digits of the list's codes
_TIMES = re.compile(r":\d+-\d+$")


def render(report: Report) -> str:
    """The HTML page of a report of `harken.audit.rates.audit`: self-contained, and the same for the same report.

    Carries up to N_MISSING missing clips, whole splits first, and says what is left out; the report itself holds all of
    them.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "count": count,
        "span": span,
        "q": q_value,
        "visible": drawings.visible,
        "one": _one,
        "group_words": _group_words,
    }
    splits = report["splits"]
    n_carried = _carried([len(s["missing"]["clip_id"]) for s in splits], N_MISSING)
    style, script = _part("page.css"), _part("page.js")
    return environment.get_template("page.html.j2").render(
        report=report,
        draw=drawings,
        name=_name,
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        group_meanings=GROUP_MEANINGS,
        rate_meanings=RATE_MEANINGS,
        totals=_totals(splits),
        reasons=_reasons(splits),
        shares_shown=_shares_shown,
        worst=_worst,
        rare=_rare,
        n_worst=N_WORST_LABELS,
        n_rare=N_RARE_LABELS,
        n_changed=N_CHANGED,
        messages=report["unmapped"]["messages"][:N_MESSAGES],
        n_missing=sum(len(s["missing"]["clip_id"]) for s in splits),
        left_out=[
            (_name(s), n, len(s["missing"]["clip_id"]))
            for s, n in zip(splits, n_carried, strict=True)
            if n < len(s["missing"]["clip_id"])
        ],
        first_rows=_first_rows(splits),
        listed=_listed(splits, n_carried),
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


def q_value(q: float) -> str:
    """0.0123 -> `0.012`, and `<0.001` below that."""
    return "<0.001" if q < 0.001 else f"{q:.3f}"


def _part(name: str) -> str:
    return resources.files("harken.audit").joinpath(name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _name(split: Report) -> str:
    return f"{split['dataset']} {split['split']}"


def _one(n: int, singular: str, plural: str) -> str:
    return f"{count(n)} {singular if n == 1 else plural}"


def _group_words(groups: Mapping[str, int]) -> str:
    return ", ".join(f"{group} {count(n)}" for group, n in groups.items() if n)


def _totals(splits: Sequence[Report]) -> dict[str, int]:
    """Rows of all lists by group: a clip that two lists name counts in both."""
    return {group: sum(s["groups"][group] for s in splits) for group in GROUP_MEANINGS}


def _reasons(splits: Sequence[Report]) -> list[dict[str, Any]]:
    """A row for each reason with its count in each split, by group and then by how often."""
    found: dict[str, dict[str, Any]] = {}
    for i, split in enumerate(splits):
        for r in split["reasons"]:
            row = found.setdefault(r["reason"], {**r, "cells": [None] * len(splits), "total": 0})
            row["cells"][i] = r
            row["total"] += r["count"]
    order = list(GROUP_MEANINGS)
    return sorted(found.values(), key=lambda r: (order.index(r["group"]), -r["total"], r["reason"]))


def _shares_shown(reference: Report) -> list[float]:
    """Every share that a dot plot of published availabilities must have room for."""
    ours = reference["ours"]
    return [r["rate"] for r in reference["rows"]] + ([ours["ci_low"], ours["rate"]] if ours else [])


def _worst(labels: Sequence[Report]) -> list[Report]:
    """The labels worst off for certain: by the upper end of the interval, so that one lost clip of two is not first."""
    return sorted(labels, key=lambda x: (x["ci_high"], x["label"]))[:N_WORST_LABELS]


def _rare(labels: Sequence[Report]) -> list[Report]:
    return sorted((x for x in labels if x["is_rare"]), key=lambda x: (x["n_left"], x["label"]))


def _carried(n_rows: Sequence[int], most: int) -> list[int]:
    """How many rows of each split the page carries: small splits whole, since test sets are small."""
    carried = [0] * len(n_rows)
    for i in sorted(range(len(n_rows)), key=lambda i: (n_rows[i], i)):
        carried[i] = min(n_rows[i], most - sum(carried))
    return carried


def _first_rows(splits: Sequence[Report]) -> list[tuple[str, str, str, str]]:
    found: list[tuple[str, str, str, str]] = []
    for s in splits:
        most, lost = N_FIRST_ROWS - len(found), s["missing"]
        columns = (lost[name][:most] for name in ("clip_id", "group", "reason"))
        found += [(_name(s), *row) for row in zip(*columns, strict=True)]
    return found


def _listed(splits: Sequence[Report], n_carried: Sequence[int]) -> dict[str, Any]:
    """The missing list in columns: one block for each split, reasons as codes of a dictionary."""
    groups: dict[str, str] = {}
    for s, n in zip(splits, n_carried, strict=True):
        groups |= dict(zip(s["missing"]["reason"][:n], s["missing"]["group"][:n], strict=True))
    reasons = sorted(groups)
    place = {reason: i for i, reason in enumerate(reasons)}
    blocks = []
    for s, n in zip(splits, n_carried, strict=True):
        if n:
            codes = _codes([place[r] for r in s["missing"]["reason"][:n]], len(reasons))
            blocks.append(
                {
                    "part": drawings.visible(_name(s)),
                    "n": n,
                    "reason": codes,
                    **_id_columns(s["missing"]["clip_id"][:n]),
                }
            )
    return {"reasons": [[r, groups[r]] for r in reasons], "width": _width(len(reasons)), "blocks": blocks}


def _id_columns(ids: Sequence[str]) -> dict[str, Any]:
    """Clip ids as what all share, the keys, and codes of a dictionary of their times.

    `yt:--PJHxphWEs:30000-40000` is the head `yt:`, a key and the tail `:30000-40000`. Keys of one length are one text.
    """
    ends = zip(min(ids), max(ids), strict=False)  # what the first and the last in order share, all between them share
    shared = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))
    first = shared.rfind(":") + 1
    found = [_TIMES.search(i, first) for i in ids]
    tails = sorted({m[0] if m else "" for m in found})
    place = {tail: i for i, tail in enumerate(tails)}
    keys = [i[first : m.start() if m else None] for i, m in zip(ids, found, strict=True)]
    is_even = len({len(k) for k in keys}) == 1 and all(k.isascii() for k in keys)
    return {
        "head": ids[0][:first],
        "size": len(keys[0]) if is_even else 0,
        "keys": "".join(keys) if is_even else keys,
        "tails": tails,
        "width": _width(len(tails)),
        "tail": _codes([place[m[0] if m else ""] for m in found], len(tails)),
    }


def _codes(numbers: Sequence[int], n_words: int) -> str:
    """Numbers below `n_words` as text of base-64 digits, highest first, each as wide as the largest needs."""
    width = _width(n_words)
    word = ["".join(ALPHABET[i // 64**d % 64] for d in reversed(range(width))) for i in range(n_words)]
    return "".join([word[i] for i in numbers])


def _width(n_words: int) -> int:
    width = 1
    while 64**width < n_words:
        width += 1
    return width
