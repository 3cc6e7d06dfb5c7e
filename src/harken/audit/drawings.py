"""The plots of the audit page: inline SVG that needs neither a library nor a script.

Lengths along a plot are percentages and letters keep their size, so one drawing fits a desk and a phone. Colours are
CSS classes (`gone`, `denied`, ...), so one drawing fits both themes. What is drawn also stands in a table beside it.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from typing import Any

from markupsafe import Markup, escape

Row = Mapping[str, Any]

Z_INNER, Z_OUTER = 1.960, 3.090  # two-sided 95 % and 99.8 %, the usual limits of a funnel plot (Spiegelhalter 2005)
N_NAMED = 8  # labels named in a funnel; more hide the points
NAME_GAP_PX = 13.0
LETTER_PX, NARROW_PX = 7.0, 310.0  # a letter of a name, and the plot on a phone
FUNNEL_PX = 330
SURVIVAL_PX = 190
MIN_SEGMENT_LABEL = 0.075  # narrower segments have no room for their figure on a phone


def visible(text: object) -> str:
    """`text` with control and bidirectional characters spelled out: a label must not reorder the page around it."""
    return "".join(
        f"\\u{ord(c):04x}" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in str(text)
    )


def rate_bar(rate: Row, label: str) -> Markup:
    """One rate from 0 to 100 %: solid up to its lower end, pale where undecided, a whisker for the interval."""
    low, high, ci_low, ci_high = (_at(rate[k]) for k in ("rate_low", "rate_high", "ci_low", "ci_high"))
    whisker = Markup("").join(
        _line(x1, "50%" if flat else "20%", x2, "50%" if flat else "80%", "whisker")
        for x1, x2, flat in ((ci_low, ci_high, True), (ci_low, ci_low, False), (ci_high, ci_high, False))
    )
    body = _rect("0%", "100%", "track") + _rect("0%", high, "pale") + _rect("0%", low, "bar") + whisker
    return _svg(16, label, body)


def stack(groups: Mapping[str, int], label: str) -> Markup:
    """Counts side by side on one bar of their sum; wide parts carry their percentage."""
    total, start, body = sum(groups.values()), 0, Markup("")
    for group, n in groups.items():
        if n:
            title = f"{group}: {n:,} of {total:,}"
            body += _rect(_at(start / total), _at(n / total), f"g-{group}", title)
            if n / total >= MIN_SEGMENT_LABEL:
                body += _text(_at((start + n / 2) / total), "50%", f"{100 * n / total:.0f}", f"inside on-{group}")
        start += n
    return _svg(28, label, body, "stack")


def share_dot(low: float, value: float, high: float, domain: tuple[float, float], kind: str) -> Markup:
    """A point with its interval on the axis `domain`, for one row of a table; `kind` is its CSS class."""
    x0, x, x1 = (_at(_scaled(v, *domain)) for v in (low, value, high))
    grid = Markup("").join(
        _line(_at(_scaled(t, *domain)), "0%", _at(_scaled(t, *domain)), "100%", "grid") for t in _ticks(domain)
    )
    return _svg(24, None, grid + _line(x0, "50%", x1, "50%", f"span {kind}") + _circle(x, "50%", 5, f"dot {kind}"))


def share_axis(domain: tuple[float, float]) -> Markup:
    """The axis above a column of `share_dot`."""
    ticks = _ticks(domain)
    ticks = ticks if len(ticks) <= 3 else [ticks[0], ticks[len(ticks) // 2], ticks[-1]]
    body = Markup("").join(
        _text(_at(_scaled(t, *domain)), "70%", f"{100 * t:.0f} %", f"tick {_anchor(_scaled(t, *domain))}")
        for t in ticks
    )
    return _svg(16, None, body)


def share_domain(shares: Iterable[float]) -> tuple[float, float]:
    """The part of 0..1 that a column of points needs, on round numbers, 1 included."""
    low = min([*shares, 0.95])
    return max(0.0, math.floor((low - 0.02) * 20) / 20), 1.0


def diverging(value: float, largest: float, kind: str) -> Markup:
    """A bar from the middle: to the right for positive values, to the left for negative ones."""
    half = 0.5 * min(abs(value) / largest, 1.0) if largest else 0.0
    body = _rect(_at(0.5 if value > 0 else 0.5 - half), _at(half), kind) + _line("50%", "0%", "50%", "100%", "axis")
    return _svg(14, None, body)


def funnel(labels: Sequence[Row], share: float, title: str) -> Markup:
    """Availability of each label against its number of clips, within limits for a split that loses at random.

    labels: rows with name, n, n_ok, rate, q_value, is_biased, is_rare. share: what is left of the whole split, 0..1.
    The limits are share +- z sqrt(share (1 - share) / n) (Spiegelhalter 2005). The labels that stand out most are
    named.
    """
    spread = math.sqrt(share * (1 - share))
    low_n, high_n = min(x["n"] for x in labels), max(x["n"] for x in labels)
    left, right = math.log10(max(0.8 * low_n, 0.8)), math.log10(1.25 * high_n)
    bottom = max(0.0, math.floor((min(x["rate"] for x in labels) - 0.04) * 10) / 10)

    def at_x(n: float) -> float:
        return (math.log10(n) - left) / (right - left)

    def at_y(rate: float) -> float:
        return (1 - min(max(rate, bottom), 1.0)) / (1 - bottom)

    sizes = [10 ** (left + (right - left) * i / 60) for i in range(61)]
    bands = Markup("").join(
        _area(
            [(at_x(n), at_y(share + z * spread / math.sqrt(n))) for n in sizes]
            + [(at_x(n), at_y(share - z * spread / math.sqrt(n))) for n in reversed(sizes)],
            kind,
        )
        for z, kind in ((Z_OUTER, "limit outer"), (Z_INNER, "limit inner"))
    )
    body = _y_axis(bottom, 1.0) + _n_axis(low_n, high_n, at_x) + bands
    body += _line("0%", _at(at_y(share)), "100%", _at(at_y(share)), "mean")
    for x in sorted(labels, key=lambda x: (x["is_biased"], str(x["label"]))):
        kind = "point biased" if x["is_biased"] else "point"
        tip = f"{visible(x['name'])}: {x['n_ok']:,} of {x['n']:,} usable ({100 * x['rate']:.1f} %)"
        body += _circle(_at(at_x(x["n"])), _at(at_y(x["rate"])), 4, kind, tip)
    for name, across, y_px, side in _named(labels, share, at_x, at_y):
        body += _text(_at(across), f"{y_px:.1f}", name, f"name {side}", dx=9 if side == "start" else -9)
    return _svg(FUNNEL_PX, title, body, "plot")


def survival(curve: Sequence[Row], published: Sequence[Row], title: str) -> Markup:
    """The share still alive at each date, with the band that the truth is in between and what others held.

    curve: rows {when (ISO date), alive_low, alive_high, n}, by date. Survival only falls, so between two dates it lies
    between the upper end of the first and the lower end of the second. published: rows {when, rate, source}; those
    whose `when` is a month are drawn.
    """
    days = [date.fromisoformat(c["when"]).toordinal() for c in curve]
    others = [(day, p) for p in published if (day := _month(p["when"])) and days[0] <= day <= days[-1]]
    bottom = share_domain([*(c["alive_low"] for c in curve), *(p["rate"] for _, p in others)])[0]

    def at_x(day: int) -> float:
        return (day - days[0]) / max(days[-1] - days[0], 1)

    def at_y(alive: float) -> float:
        return (1 - alive) / (1 - bottom)

    body = _y_axis(bottom, 1.0) + _year_axis(days[0], days[-1], at_x)
    for (d0, c0), (d1, c1) in zip(zip(days, curve, strict=True), list(zip(days, curve, strict=True))[1:], strict=False):
        x0, x1, y0, y1 = at_x(d0), at_x(d1), at_y(c0["alive_high"]), at_y(c1["alive_low"])
        body += _area([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], "band")
    for day, p in others:
        tip = f"{p['when']}, {visible(p['source'])}: {100 * p['rate']:.1f} %"
        body += _circle(_at(at_x(day)), _at(at_y(p["rate"])), 4, "other", tip)
    for day, c in zip(days, curve, strict=True):
        x, ends = _at(at_x(day)), [c["alive_low"], c["alive_high"]]
        tip = f"{c['when']}: {100 * ends[0]:.1f} to {100 * ends[1]:.1f} % alive, {c['n']:,} clips seen"
        body += _line(x, _at(at_y(ends[0])), x, _at(at_y(ends[1])), "seen")
        body += _circle(x, _at(at_y(sum(ends) / 2)), 3.5, "seen", tip)
    return _svg(SURVIVAL_PX, title, body, "plot")


def _named(
    labels: Sequence[Row], share: float, at_x: Callable[[float], float], at_y: Callable[[float], float]
) -> list[tuple[str, float, float, str]]:
    """Names of the labels that stand out most, where they hide neither each other nor a point that stands out.

    Each with its place across (share of the plot), its height in px, and the side of its point that it begins from.
    """
    biased = [x for x in labels if x["is_biased"]]
    biased.sort(key=lambda x: (x["q_value"], -abs(x["rate"] - share) * math.sqrt(x["n"]), str(x["label"])))
    points = [(at_x(x["n"]), FUNNEL_PX * at_y(x["rate"])) for x in biased]
    placed: list[tuple[str, float, float, str]] = []
    for k, (x, (across, wanted)) in enumerate(zip(biased, points, strict=True)):
        name = _short(visible(x["name"]))
        width = len(name) * LETTER_PX / NARROW_PX
        for side in ("end", "start") if across > 0.5 else ("start", "end"):
            left, right = (across, across + width) if side == "start" else (across - width, across)
            others = [y for i, (at, y) in enumerate(points) if i != k and left <= at <= right]
            heights = [*others, *(y for _, _, y, _ in placed)]
            if left >= 0 and right <= 1.05 and all(abs(y - wanted) >= NAME_GAP_PX for y in heights):
                placed.append((name, across, wanted, side))
                break
        if len(placed) == N_NAMED:
            break
    return placed


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1].rstrip() + "\u2026"


def _month(when: str) -> int | None:
    """The middle of a month written as 2018-12, as a day number."""
    found = re.fullmatch(r"(\d{4})-(\d{2})", when)
    return date(int(found[1]), int(found[2]), 15).toordinal() if found else None


def _ticks(domain: tuple[float, float]) -> list[float]:
    low, high = domain
    step = 0.1 if high - low > 0.35 else 0.05
    step = 0.2 if high - low > 0.65 else step
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _y_axis(low: float, high: float) -> Markup:
    body = Markup("")
    for t in _ticks((low, high)):
        y = _at(1 - _scaled(t, low, high))
        body += _line("0%", y, "100%", y, "grid") + _text("0%", y, f"{100 * t:.0f} %", "tick end", dx=-8)
    return body


def _n_axis(low: int, high: int, at_x: Callable[[float], float]) -> Markup:
    steps = [1, 3] if high < 3000 * low else [1]
    ticks = [s * 10**k for k in range(8) for s in steps if low <= s * 10**k <= high] or [high]
    body = Markup("")
    for t in ticks:
        x = _at(at_x(t))
        body += _line(x, "0%", x, "100%", "grid")
        body += _text(x, "100%", f"{t:,}".replace(",", "\u202f"), "tick middle", dy=16)
    return body


def _year_axis(first: int, last: int, at_x: Callable[[int], float]) -> Markup:
    years = range(date.fromordinal(first).year, date.fromordinal(last).year + 1)
    every = 1 if len(years) <= 5 else 2 if len(years) <= 12 else 5
    body = Markup("")
    for year in years:
        day = date(year, 1, 1).toordinal()
        if first <= day <= last and (year - years[0]) % every == (1 if every > 1 else 0):
            x = _at(at_x(day))
            body += _line(x, "0%", x, "100%", "grid") + _text(x, "100%", str(year), "tick middle", dy=16)
    if "<text" not in body:  # all within a year: name both ends instead
        for day, side in ((first, "start"), (last, "end")):
            body += _text(_at(at_x(day)), "100%", date.fromordinal(day).isoformat(), f"tick {side}", dy=16)
    return body


def _scaled(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _anchor(position: float) -> str:
    return "start" if position < 0.1 else "end" if position > 0.9 else "middle"


def _at(share: float) -> str:
    return f"{100 * share:.2f}%"


def _svg(height_px: int, label: str | None, body: Markup, kind: str = "row") -> Markup:
    name = Markup('role="img" aria-label="{}"').format(label) if label else Markup('aria-hidden="true"')
    return Markup('<svg class="{}" width="100%" height="{}" {}>{}</svg>').format(kind, height_px, name, body)


def _rect(x: str, width: str, kind: str, title: str | None = None) -> Markup:
    tip = Markup("<title>{}</title>").format(title) if title else ""
    return Markup('<rect x="{}" y="0" width="{}" height="100%" class="{}">{}</rect>').format(x, width, kind, tip)


def _line(x1: str, y1: str, x2: str, y2: str, kind: str) -> Markup:
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(x1, y1, x2, y2, kind)


def _circle(x: str, y: str, radius: float, kind: str, title: str | None = None) -> Markup:
    tip = Markup("<title>{}</title>").format(title) if title else ""
    return Markup('<circle cx="{}" cy="{}" r="{}" class="{}">{}</circle>').format(x, y, f"{radius:g}", kind, tip)


def _text(x: str, y: str, text: str, kind: str, dx: float = 0, dy: float = 0) -> Markup:
    shift = Markup(' dx="{}" dy="{}"').format(f"{dx:g}", f"{dy:g}") if dx or dy else ""
    return Markup('<text x="{}" y="{}" class="{}"{}>{}</text>').format(x, y, kind, shift, escape(text))


def _area(corners: Sequence[tuple[float, float]], kind: str) -> Markup:
    """A polygon in shares of the plot: its own coordinates are stretched, since polygons know no percentages."""
    points = " ".join(f"{1000 * x:.1f},{1000 * y:.1f}" for x, y in corners)
    return Markup(
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">'
        '<polygon points="{}" class="{}"/></svg>'
    ).format(points, kind)
