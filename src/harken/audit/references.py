"""What others held of the same official lists, and when: fixed, cited, printed beside our own rates.

A row belongs to a list of exactly one size, so a filtered or cut-down list is compared with nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reference:
    """One laboratory's count of the clips it held. `n_held` is None for a prediction, which has a rate only."""

    when: str
    n_held: int | None
    source: str
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class OfficialList:
    """An official list, known by its dataset and its number of clips."""

    dataset: str
    name: str
    n_total: int
    rows: tuple[Reference, ...]


# The official lists were made of videos that were there: the header of AudioSet's CSV files states the day, and every
# AudioCaps clip is one of AudioSet's.
PUBLISHED = {"audioset": "2017-03-05", "audiocaps": "2017-03-05"}

_PANNS = "PANNs, Kong et al. 2020 and its README"
_HF = "Hugging Face agkphysics/AudioSet"
_NEAREST = "Tsubaki et al. 2024, Table II"
_TAP = "Xin et al. 2023 (taken over from Mei et al. 2022)"
_AAC = "aac-datasets documentation"
_PREDICTED = Reference(
    "end of 2026", None, "prediction: 2.2 % a year, as lost between 2018-12 and 2023-03 in two laboratories", 0.78
)


def _audioset(name: str, n_total: int, *rows: tuple[str, int, str]) -> OfficialList:
    return OfficialList("audioset", name, n_total, (*(Reference(*row) for row in rows), _PREDICTED))


def _audiocaps(name: str, n_total: int, aac: int, tap: int, nearest: int) -> OfficialList:
    rows = (
        Reference("undated", aac, _AAC),
        Reference("undated", tap, _TAP),
        Reference("undated", nearest, _NEAREST),
    )
    return OfficialList("audiocaps", name, n_total, rows)


OFFICIAL: tuple[OfficialList, ...] = (
    _audioset(
        "unbalanced train",
        2_041_789,
        ("2018-12", 1_913_637, _PANNS),
        ("2021 to 2022", 1_715_367, "VIP-ANT, last line of its index of the list"),
        ("2023-03", 1_738_788, _HF),
        ("undated", 1_673_501, _NEAREST),
    ),
    _audioset(
        "balanced train",
        22_160,
        ("2018-12", 20_550, _PANNS),
        ("2023-03", 18_685, _HF),
        ("undated", 16_273, _NEAREST),
    ),
    _audioset(
        "unbalanced and balanced train",
        2_041_789 + 22_160,
        ("2018-12", 1_913_637 + 20_550, _PANNS),
        ("2023 or before", 1_953_082, "a user of Whisper-AT, issue 13; that it means both lists is inferred"),
        ("2023-03", 1_738_788 + 18_685, _HF),
        ("undated", 1_673_501 + 16_273, _NEAREST),
    ),
    _audioset(
        "evaluation",
        20_371,
        ("2018-12", 18_887, _PANNS),
        ("2023-03", 17_142, _HF),
        ("undated", 16_000, _NEAREST),
    ),
    _audiocaps("train", 49_838, 46_231, 49_274, 43_045),
    _audiocaps("validation", 495, 465, 494, 429),
    _audiocaps("test", 975, 913, 957, 845),
)


def official_list(dataset: str, n_total: int) -> OfficialList | None:
    """The official list of that dataset with exactly that many clips, or None."""
    return next((x for x in OFFICIAL if x.dataset == dataset and x.n_total == n_total), None)
