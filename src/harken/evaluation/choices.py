"""Which images the towers of each recipe find nearest, and how often these are right: the runs of planted.parquet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from harken.errors import DataError

Float = npt.NDArray[np.float64]
Part = Literal["all", "hard"]
PARTS: tuple[Part, ...] = ("all", "hard")


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """All runs of all recipes, on the same clips: those that have a right image.

    recipes: recipe -> seed -> (clip,), 100 where the nearest image is a right one, else 0. random: (clip,), what an
    image at random is worth, in percent. is_hard: (clip,), whether the clip has wrong images too.
    """

    recipes: Mapping[str, Mapping[int, Float]]
    random: Float
    is_hard: npt.NDArray[np.bool_]

    @staticmethod
    def of(table: pa.Table) -> Choices | None:
        """The runs of a table with `recipe`, `seed`, `clip_id`, `is_right`, `share_right` and `is_hard`; None if empty.

        Raises DataError where two runs are of other clips: their means would say nothing of each other.
        """
        recipes: dict[str, dict[int, Float]] = {}
        first: pa.Table | None = None
        for recipe in pc.unique(table["recipe"]).to_pylist():
            rows = table.filter(pc.equal(table["recipe"], recipe))
            for seed in sorted(pc.unique(rows["seed"]).to_pylist()):
                run = rows.filter(pc.equal(rows["seed"], seed)).sort_by("clip_id")
                first = run if first is None else first
                if run["clip_id"].to_pylist() != first["clip_id"].to_pylist():
                    raise DataError(
                        f"planted images: {recipe}-{seed} has {len(run)} clips, the first run {len(first)}, and they "
                        "are not the same. Run `dvc repro evaluate` again."
                    )
                recipes.setdefault(recipe, {})[seed] = 100.0 * run["is_right"].to_numpy()
        if first is None:
            return None
        return Choices(recipes, 100.0 * first["share_right"].to_numpy(), first["is_hard"].to_numpy())

    def mask(self, part: Part) -> npt.NDArray[np.bool_]:
        """Which clips a part holds: (clip,)."""
        return self.is_hard if part == "hard" else np.ones(len(self.is_hard), bool)

    def runs(self, recipe: str, part: Part) -> dict[int, Float]:
        """Seed -> (clip of the part,)."""
        keep = self.mask(part)
        return {seed: values[keep] for seed, values in self.recipes[recipe].items()}

    def count(self, part: Part) -> int:
        """How many clips a part holds."""
        return int(self.mask(part).sum())

    def by_chance(self, part: Part) -> float | None:
        """How often an image at random is right, in percent; None for no clips."""
        return float(self.random[self.mask(part)].mean()) if self.count(part) else None
