"""Official metadata -> clips: one module per dataset, each with a card (licence, citation, sources)."""

from __future__ import annotations

from typing import Final

from harken.datasets.audiocaps import AUDIOCAPS
from harken.datasets.audioset import AUDIOSET
from harken.datasets.card import Card, Dataset, OfficialFile
from harken.datasets.clotho import CLOTHO

DATASETS: Final[dict[str, Dataset]] = {"audioset": AUDIOSET, "audiocaps": AUDIOCAPS, "clotho": CLOTHO}

__all__ = ["DATASETS", "Card", "Dataset", "OfficialFile"]
