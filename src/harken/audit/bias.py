"""Does the hole change results? Which labels, causes and words are lost more than others, how far a metric can move.

Every test here asks whether clips went missing independently of what they contain. A p-value is adjusted for the number
of tests made beside it by Benjamini and Hochberg (1995); what is flagged has q < 0.05.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from harken.audit.intervals import wilson
from harken.audit.visits import CODE, OK, UNVISITED, numpy_of, one_array

Q_FLAGGED = 0.05
N_CELLS = 20
N_WORDS = 15
MIN_WORD_COUNT = 5
PRIOR_WORDS = 500.0  # how many words of evidence the prior is worth: small beside a split, large beside one rare word
MIN_EXPECTED = 5.0  # below, chi-square is no good approximation (Cochran 1954) and the exact distribution is used
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """The (clip, label) pairs of a split, each once: `row` and `code`, int (pair,), and the label of each code."""

    row: np.ndarray
    code: np.ndarray
    labels: tuple[str, ...]

    @staticmethod
    def of(column: pa.ChunkedArray) -> Labels:
        """The pairs of a manifest's column `labels` (lists of strings, null: none); codes are in the labels' order."""
        lists = one_array(column)
        lengths = numpy_of(lists.value_lengths().fill_null(0))
        coded = lists.flatten().dictionary_encode()
        names = coded.dictionary.to_pylist()
        order = sorted(range(len(names)), key=names.__getitem__)
        rank = np.empty(len(names), dtype=np.int64)
        rank[order] = np.arange(len(names))
        pairs = np.repeat(np.arange(len(lists), dtype=np.int64), lengths) * max(len(names), 1)
        pairs = np.unique(pairs + rank[numpy_of(coded.indices)] if len(pairs) else pairs)
        row, code = np.divmod(pairs, max(len(names), 1))
        return Labels(row, code, tuple(names[i] for i in order))


def label_rows(
    labels: Labels, state: np.ndarray, names: Mapping[str, str], min_positives: int, level: float
) -> list[dict[str, Any]]:
    """Availability of each label among visited clips, with how surprising it is beside the rest of the split.

    state: code of visits.STATES, int8 (clip,). names: label -> display name; a label without one shows itself.

    n_listed    clips of the official list with this label; n of them visited, n_ok (also n_left) of them usable
    rate        n_ok / n, with its Wilson interval as a sample of what could have been lost (not cut to what was seen)
    q_value     Fisher's exact test of the label's clips against all others of the split, adjusted
    is_biased   q_value < 0.05: this label has survived better or worse than its split, beyond chance
    is_rare     fewer than min_positives clips would be left even if every clip not yet visited turned out usable
    """
    k = len(labels.labels)
    of_pair = state[labels.row]
    n_listed = np.bincount(labels.code, minlength=k)
    n = np.bincount(labels.code[of_pair != CODE[UNVISITED]], minlength=k)
    n_ok = np.bincount(labels.code[of_pair == CODE[OK]], minlength=k)
    shown = np.flatnonzero(n)
    if not len(shown):
        return []
    n_all, ok_all = int((state != CODE[UNVISITED]).sum()), int((state == CODE[OK]).sum())
    p = [_fisher(int(n_ok[i]), int(n[i]), ok_all, n_all) for i in shown]
    rows = []
    for i, q in zip(shown, stats.false_discovery_control(np.clip(p, 0, 1)), strict=True):
        label, left = labels.labels[i], int(n_ok[i])
        low, high = wilson(left, int(n[i]), level)
        rows.append(
            {
                "label": label,
                "name": names.get(label, label),
                "n_listed": int(n_listed[i]),
                "n": int(n[i]),
                "n_ok": left,
                "n_left": left,
                "rate": left / int(n[i]),
                "ci_low": low,
                "ci_high": high,
                "q_value": float(q),
                "is_biased": bool(q < Q_FLAGGED),
                "is_rare": left + int(n_listed[i] - n[i]) < min_positives,
            }
        )
    return rows


def _fisher(ok: int, n: int, ok_all: int, n_all: int) -> float:
    return float(stats.fisher_exact([[ok, n - ok], [ok_all - ok, n_all - n - ok_all + ok]])[1])


def reason_by_label(
    labels: Labels,
    state: np.ndarray,
    reason: np.ndarray,
    reasons: Sequence[str],
    groups: Mapping[str, str],
    names: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The reasons that strike some labels more, or less, than others: up to N_CELLS cells, most surprising first.

    reason: index into `reasons`, -1 where there is none, int (clip,). Each cell (reason, label) of the visited clips is
    compared with the count expected if the two were independent, by Pearson's chi-square where all four expected
    counts are at least 5 and else by the hypergeometric distribution (twice the smaller tail). Only cells with
    q_value < 0.05 over all cells tested are returned. log2_ratio: log2((count + 0.5) / (expected + 0.5)).
    """
    visited = state != CODE[UNVISITED]
    n_all, k, m = int(visited.sum()), len(labels.labels), len(reasons)
    pair = visited[labels.row]
    n_label = np.bincount(labels.code[pair], minlength=k)
    n_reason = np.bincount(reason[reason >= 0], minlength=m)
    kept, used = np.flatnonzero(n_label), np.flatnonzero(n_reason)
    if not len(kept) or not len(used):
        return []
    struck = reason[labels.row] >= 0
    cell = reason[labels.row[struck]].astype(np.int64) * k + labels.code[struck]
    count = np.bincount(cell, minlength=m * k).reshape(m, k)[np.ix_(used, kept)].astype(float)
    r, c = n_reason[used][:, None].astype(float), n_label[kept][None, :].astype(float)
    expected = r * c / n_all
    p, residual = _independence(count, r, c, n_all)
    q = stats.false_discovery_control(p.ravel()).reshape(p.shape)
    found = [
        (p[i, j], -abs(residual[i, j]), reasons[used[i]], labels.labels[kept[j]], i, j)
        for i, j in np.argwhere(q < Q_FLAGGED)
    ]
    return [
        {
            "reason": code,
            "group": groups[code],
            "label": label,
            "name": names.get(label, label),
            "count": int(count[i, j]),
            "expected": float(expected[i, j]),
            "log2_ratio": math.log2((count[i, j] + 0.5) / (expected[i, j] + 0.5)),
            "p_value": float(p[i, j]),
            "q_value": float(q[i, j]),
        }
        for _, _, code, label, i, j in sorted(found)[:N_CELLS]
    ]


def _independence(count: np.ndarray, r: np.ndarray, c: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided p-values of independence for each cell of margins r (reason, 1), c (1, label), and its residual."""
    expected = r * c / n
    variance = expected * (1 - r / n) * (1 - c / n)
    residual = np.divide(count - expected, np.sqrt(variance), out=np.zeros_like(expected), where=variance > 0)
    smallest = np.minimum.reduce([expected, r - expected, c - expected, n - r - c + expected])
    p = stats.chi2.sf(residual**2, 1)
    few = np.nonzero(smallest < MIN_EXPECTED)
    at, size, marked = count[few], np.broadcast_to(c, count.shape)[few], np.broadcast_to(r, count.shape)[few]
    tails = stats.hypergeom.cdf(at, n, marked, size), stats.hypergeom.sf(at - 1, n, marked, size)
    p[few] = 2 * np.minimum(*tails)
    return np.clip(np.where(variance > 0, p, 1.0), 0.0, 1.0), residual


def words(captions: pa.ChunkedArray, missing: np.ndarray, present: np.ndarray) -> dict[str, Any] | None:
    """Caption words over-represented among missing or among present clips, by log-odds with a Dirichlet prior.

    captions: lists of strings (clip,); missing, present: bool (clip,). For a word counted y of n words among the
    missing and y' of n' among the present, with a prior of a words in all, a_w of them this word (in proportion to its
    share of all captions of the split, a = PRIOR_WORDS),

        log_odds = log((y + a_w) / (n + a - y - a_w)) - log((y' + a_w) / (n' + a - y' - a_w))
        z = log_odds / sqrt(1 / (y + a_w) + 1 / (y' + a_w))

    (Monroe, Colaresi and Quinn 2008, the z-score with an informative Dirichlet prior). z ranks words; as a clip's five
    captions repeat its words it is no significance. Words seen fewer than MIN_WORD_COUNT times are left out. None
    without captions, or with nothing missing or nothing present.

    Returns missing and present: up to N_WORDS each of {word, z, log_odds, n_missing, n_present}, strongest first;
    n_words_missing, n_words_present; mean_words_missing, mean_words_present: words per caption.
    """
    lists = one_array(captions)
    lost, held, rest = (_texts(lists, rows) for rows in (missing, present, ~(missing | present)))
    if not lost or not held:
        return None
    y, other = _count(lost), _count(held)
    both = y + other
    every = both + _count(rest)
    n, n_other, n_every = sum(y.values()), sum(other.values()), sum(every.values())
    scores = []
    for word in sorted(w for w, count in both.items() if count >= MIN_WORD_COUNT):
        a = PRIOR_WORDS * every[word] / n_every
        log_odds = _logit(y[word] + a, n + PRIOR_WORDS) - _logit(other[word] + a, n_other + PRIOR_WORDS)
        scores.append((log_odds / math.sqrt(1 / (y[word] + a) + 1 / (other[word] + a)), word, log_odds))

    def told(rows: list[tuple[float, str, float]]) -> list[dict[str, Any]]:
        return [
            {"word": word, "z": z, "log_odds": log_odds, "n_missing": y[word], "n_present": other[word]}
            for z, word, log_odds in rows[:N_WORDS]
        ]

    return {
        "missing": told(sorted((s for s in scores if s[0] > 0), key=lambda s: (-s[0], s[1]))),
        "present": told(sorted(s for s in scores if s[0] < 0)),
        "n_words_missing": n,
        "n_words_present": n_other,
        "mean_words_missing": n / len(lost),
        "mean_words_present": n_other / len(held),
    }


def _logit(count: float, n: float) -> float:
    # a text of one word repeated leaves nothing beside it; the prior's other words are then all there is
    return math.log(count / max(n - count, math.ulp(n)))


def _texts(lists: pa.Array, rows: np.ndarray) -> list[str]:
    return [x for x in lists.filter(pa.array(rows)).flatten().to_pylist() if x]


def _count(texts: Iterable[str]) -> Counter[str]:
    return Counter(word for text in texts for word in _WORD.findall(text.lower()))


def manski_bounds(value: float, share_missing: float, low: float = 0.0, high: float = 100.0) -> tuple[float, float]:
    """Between what a metric on the clips present leaves possible on the whole list (Manski 1989).

    value: the metric, a mean over the present clips of something that lies in low .. high for each clip (in percent:
    R@k, accuracy). The missing clips could all have scored `low`, or all `high`; nothing is assumed about them.

        (value * (1 - m) + low * m,  value * (1 - m) + high * m)

    Sharp for a mean over clips; a smaller gallery makes R@k easier besides, which this does not undo. Raises ValueError
    for a value outside low .. high or a share outside 0 .. 1.
    """
    if not low <= value <= high or not 0 <= share_missing <= 1:
        raise ValueError(
            f"manski_bounds: {value} is not in {low} .. {high}, or a share of {share_missing} not in 0 .. 1"
        )
    held = value * (1 - share_missing)
    return held + low * share_missing, held + high * share_missing


def sensitivity(share_missing: float) -> dict[str, Any]:
    """The two numbers that bound a percentage on the whole list: v * low_share .. v * low_share + 100 * high_share."""
    low, high = manski_bounds(50.0, share_missing)
    text = (
        f"{100 * share_missing:.1f} % of the clips are missing. Whatever they would have scored, a percentage v that "
        f"is a mean over the clips present is between v * {1 - share_missing:.4f} and v * {1 - share_missing:.4f} + "
        f"{100 * share_missing:.2f} on the whole list: 50 % could be anything from {low:.1f} % to {high:.1f} %. "
        "That retrieval is easier from a smaller gallery comes on top."
    )
    return {"share_missing": share_missing, "low_share": 1 - share_missing, "high_share": share_missing, "text": text}
