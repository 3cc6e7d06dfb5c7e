"""Numbers -> the sentences and small tables of a report. No verdict is written beforehand: each is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harken.evaluation import tables
from harken.evaluation.choices import PARTS, Choices, Part
from harken.evaluation.grounding import BRIEF, MEASURES, Groundings, Measure, Summary
from harken.evaluation.grounding import PARTS as SOUND_PARTS
from harken.evaluation.grounding import Part as SoundPart
from harken.evaluation.significance import Pooled, SeededDifference

SHARES = {
    "events": "sounds with an image",
    "short": "short sounds with an image",
    "clips": "clips with a right image",
    "images": "right images",
    "pairs": "right pairs",
}
MEASURED: dict[Measure, str] = {
    "error_s": "onset error, s",
    "near": "within one frame",
    "iou": "IoU",
    "inside": "weight inside",
    "peak": "peak inside",
}
SLACK = 1e-6  # a bar is met by what differs from it in rounding alone


def against_chance(factors: Mapping[str, float], bar: float) -> list[str]:
    """factors: row -> its R@1 over chance. How many rows reach the bar, and each that does not, the lowest first."""
    if not factors:
        return []
    ordered = sorted(factors.items(), key=lambda kv: kv[1])
    below = [f"{row} {f:.1f}" for row, f in ordered if f < bar - SLACK]
    lines = [
        f"- {len(ordered) - len(below)} of {len(ordered)} rows have an R@1 of at least {bar:g} times chance in both "
        f"directions; the lowest: {ordered[0][0]}, {ordered[0][1]:.1f} times."
    ]
    if below:
        lines.append(f"- NOT {bar:g} times chance: {', '.join(below)}.")
    return [*lines, ""]


def nearest_image(choices: Choices, pooled: Mapping[tuple[str, Part], Pooled], bar: float) -> list[str]:
    """How often the image that a tower finds nearest is a right one. pooled: what (recipe, part) comes to, if anything.

    bar: percent of all clips against which each recipe is held.
    """
    n, n_hard = (choices.count(part) for part in PARTS)
    lines = [
        "### The nearest image",
        "",
        "How often the image nearest to a training clip's sound is a planted one, whose object sounds in the clip, in "
        f"percent: of the {n} clips that have such an image, and of the {n_hard} hard ones among them, which have "
        "wrong images too. Multiframe Match chooses no image, so it has no row.",
        "",
        *tables.head_lines(["recipe", "seeds", f"all {n}", f"hard {n_hard}"]),
    ]
    for recipe, runs in choices.recipes.items():
        lines.append(tables.line([recipe, str(len(runs)), *(_cell(pooled.get((recipe, part))) for part in PARTS)]))
    lines.append(tables.line(["an image at random", "–", *(_share(choices.by_chance(part)) for part in PARTS)]))
    lines.append("")
    lines += [f"- {recipe}: {held_against(pooled[recipe, 'all'], bar)}." for recipe in choices.recipes]
    return [*lines, ""]


def held_against(found: Pooled, bar: float) -> str:
    """A mean in percent against a bar, and whether its interval says the same."""
    is_above = found.mean >= bar - SLACK
    says = f"{found.mean:.1f} % is {'at least' if is_above else 'below'} {bar:g} %"
    if is_above and found.low < bar:
        return f"{says}, but its interval reaches below"
    if not is_above and found.high >= bar:
        return f"{says}, but its interval reaches {bar:g} %"
    return f"{says}, and so is its interval"


def image_times(found: Mapping[str, Any]) -> list[str]:
    """What each rule for taking images catches of what is planted, and what that leaves to each way of matching.

    found: as `agreement.image_times_report` returns it.
    """
    mine, rules = found["rule"], found["rules"]
    rows = {f"`{mine}` (in use)": rules[mine]}
    if found["n_moved"]:
        rows[f"`{mine}`, as taken"] = found["taken"]
    rows |= {f"`{rule}`": shares for rule, shares in rules.items() if rule != mine}
    n = rules[mine]
    lines = [
        "### When images are taken",
        "",
        f"In percent, on the {n['n_clips']} clips that are trained on and their {n['n_events']} sounds, of which "
        f"{n['n_short']} are so short that they fit between two images of `endpoints`. A clip with a right image is "
        "one that Nearest Match can match rightly, a right image one that serves VIP-ANT, a right pair (the image "
        f"shows what sounds in the {found['segment_s']:g} s of its number) one that serves Multiframe Match.",
        "",
        *tables.head_lines(["images", *SHARES.values()]),
    ]
    lines += [tables.line([name, *(_share(shares[key]) for key in SHARES)]) for name, shares in rows.items()]
    lines.append("")
    lines += [f"- {_against(mine, rules[mine], rule, rules[rule])}" for rule in rules if rule != mine]
    if found["n_moved"]:
        lines.append(
            f"- In {found['n_moved']} clips an image was not taken when `{mine}` wants it, but up to "
            f"{found['most_s']:.2f} s away: their recordings end early or run at another rate."
        )
    return [*lines, ""]


def _against(mine: str, ours: Mapping[str, Any], other: str, theirs: Mapping[str, Any]) -> str:
    def more(key: str, what: str) -> list[str]:
        if ours[key] is None or theirs[key] is None:
            return []
        d = ours[key] - theirs[key]
        return [f"as many {what}" if abs(d) < 0.05 else f"{abs(d):.1f} points {'more' if d > 0 else 'fewer'} {what}"]

    seen = [*more("events", "of the sounds"), *more("short", "of the short ones")]
    left = [
        *more("clips", "clips to Nearest Match"),
        *more("images", "right images to VIP-ANT"),
        *more("pairs", "right pairs to Multiframe Match"),
    ]
    return f"Against `{other}`, `{mine}` catches {' and '.join(seen)}; it leaves {', '.join(left)}."


def grounding(found: Groundings, told: Summary, bar: float) -> list[str]:
    """Where each recipe's weights are for a sentence about one sound, against when it sounds.

    bar: frames, against which each recipe's median onset error is held.
    """
    lines = [
        f"### When it sounds: {found.dataset}",
        "",
        "Sentences about one sound each, asked of the clip that holds it: where the weights are that the text gives "
        "the clip's frames. Onset error: median, in seconds; the rest in percent. *Other clips*: what the same run's "
        "weights for the sentences of other clips would be worth here. *Equal weights* are chance. *At best*: each "
        "frame's weight is the share of it that the sound covers.",
        "",
    ]
    for part in (p for p in SOUND_PARTS if found.count(p)):
        which = f", each for at most {100 * BRIEF:g} % of what is heard" if part == "brief" else ""
        lines += [f"{found.count(part)} sounds of {found.n_clips(part)} clips{which}:", ""]
        lines += [*_grounding_table(found, told, part), ""]
    part = "brief" if found.count("brief") else "all"
    for recipe in found.recipes:
        if (recipe, "error_s", part) in told.cells:
            lines.append(f"- {recipe}: {onset_held(told.cells[recipe, 'error_s', part], found.frame_s[recipe], bar)}.")
        compared = {
            "IoU, against equal weights": told.by_flat,
            "weight inside, against other clips": told.by_clip,
            "weight inside, against the clip's other sentences": told.by_text,
        }
        for what, by in compared.items():
            if (recipe, part) in by:
                lines.append(f"- {recipe}, {what}: {difference(by[recipe, part])}.")
    return [*lines, ""]


def onset_held(found: Pooled, frame_s: float, bar: float) -> str:
    """A median onset error in seconds against a bar in frames, and whether its interval says the same."""
    frames = "one frame" if bar == 1 else f"{bar:g} frames"
    holds = found.mean <= bar * frame_s + SLACK
    says = (
        f"the median onset error is {_seconds(found)} s, {found.mean / frame_s:.1f} frames of {frame_s:g} s; "
        f"at most {frames}: {'holds' if holds else 'does NOT hold'}"
    )
    if holds and found.high > bar * frame_s + SLACK:
        return f"{says}, but its interval reaches above"
    if not holds and found.low <= bar * frame_s + SLACK:
        return f"{says}, but its interval reaches {frames}"
    return says


def _grounding_table(found: Groundings, told: Summary, part: SoundPart) -> list[str]:
    lines = tables.head_lines(["weights of", "seeds", "frame, s", *MEASURED.values()])

    def add(name: str, seeds: str, frame_s: float, cells: Mapping[Measure, str]) -> None:
        lines.append(tables.line([name, seeds, f"{frame_s:g}", *(cells.get(m, "–") for m in MEASURES)]))

    def plain(values: Mapping[Measure, float]) -> dict[Measure, str]:
        return {m: f"{v:.2f}" if m == "error_s" else f"{v:.1f}" for m, v in values.items()}

    for recipe, runs in found.recipes.items():
        cells = {m: told.cells[recipe, m, part] for m in MEASURES}
        shown = {m: _seconds(c) if m == "error_s" else _cell(c) for m, c in cells.items()}
        add(recipe, str(len(runs)), found.frame_s[recipe], shown)
        others = [found.typical(run.other_clips, part) for run in runs.values()]
        means = {m: sum(o[m] for o in others) / len(others) for m in MEASURES if all(m in o for o in others)}
        add(f"{recipe}, other clips", str(len(runs)), found.frame_s[recipe], plain(means))
    for frame_s in found.flat:
        add("equal weights", "–", frame_s, plain(found.typical(found.flat[frame_s], part)))
        add("at best", "–", frame_s, plain(found.typical(found.best[frame_s], part)))
    return lines


def _seconds(found: Pooled) -> str:
    spread = "" if found.std is None else f" ± {found.std:.2f}"
    return f"{found.mean:.2f}{spread} [{found.low:.2f}, {found.high:.2f}]"


def comparisons(found: Sequence[tuple[str, SeededDifference | None]], level: float) -> list[str]:
    """A line for each comparison, and how many of them chance alone would tell apart.

    found: what was compared, and the difference; None where it could not be, and the words say why.
    """
    if not found:
        return []
    lines = [
        "### Comparisons",
        "",
        "Paired over clips, seeds averaged first: difference in points, [its interval over clips], each seed's own.",
        "",
    ]
    lines += [f"- {what}." if d is None else f"- {what}: {difference(d)}." for what, d in found]
    tests = [d.difference for _, d in found if d is not None]
    if len(tests) > 1:
        n_real = sum(not d.is_within_noise for d in tests)
        lines.append(
            f"- Told from noise: {n_real} of {len(tests)} comparisons. Were there no difference anywhere, about "
            f"{len(tests) * (1 - level):.1f} would be."
        )
    return [*lines, ""]


def difference(found: SeededDifference) -> str:
    """`+5.3 [+2.1, +8.4], by seed +4.1, +5.0, +6.8, p = 0.001: a real difference`."""
    d, seeds = found.difference, ""
    if len(found.by_seed) > 1:
        seeds = f" by seed {', '.join(map(_signed, found.by_seed.values()))},"
    elif not found.by_seed:
        a, b = (", ".join(map(str, s)) for s in (found.seeds_a, found.seeds_b))
        seeds = f" no seed in common ({a} against {b}),"
    p = "p < 0.001" if d.p_value < 0.001 else f"p = {d.p_value:.3f}"
    return f"{_signed(d.mean)} [{_signed(d.low)}, {_signed(d.high)}],{seeds} {p}: {found.verdict}"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # no -0.0


def _cell(found: Pooled | None) -> str:
    if found is None:
        return tables.text(None)
    return tables.text({"mean": found.mean, "std": found.std, "interval": (found.low, found.high)})


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
