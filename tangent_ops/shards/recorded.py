"""What a plan records besides its samples; `Plan` extends it."""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

from tangent_ops.errors import ArgumentError, PlanError
from tangent_ops.shards.data import ImageData
from tangent_ops.shards.manifest import Manifest
from tangent_ops.shards.recipe import ShardRecipe
from tangent_ops.shards.run_folder import DATABASE

WEIGHTS = ("uniform", "samples")
AUTOMATIC = "auto"  # l2 chosen from the statistics

_NEEDED = {"anchor", "recipe", "data", "overlap", "dealt", "weights"}
_OF_STATISTICS = {"public", "basis", "l2"}


class Recorded:
    """The entries of a plan's database, checked as they are read.

    Args:
        path: the run's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = Manifest(path / DATABASE)

    @cached_property
    def recipe(self) -> ShardRecipe:
        values = self._value("recipe")
        try:
            return ShardRecipe.from_dict(values)
        except (ArgumentError, TypeError, AttributeError) as error:
            raise PlanError(f"{self.path} has a damaged recipe: {error}") from error

    @cached_property
    def data(self) -> ImageData:
        return self._images("data")

    @cached_property
    def validation(self) -> ImageData | None:
        """Labelled images that accuracies are measured on; None if the run was given none."""
        return self._images("validation") if "validation" in self._about else None

    @cached_property
    def overlap(self) -> bool:
        """Whether shards may share samples."""
        return self._value("overlap") is True

    @property
    def weights(self) -> str:
        """The shards' weights in the mean, as the last `settle` set them; "uniform" at first."""
        found = self.manifest.about()["weights"]
        if found not in WEIGHTS:
            raise PlanError(f"{self.path / DATABASE} has weights {found!r}: it was edited")
        return found

    @property
    def l2(self) -> float | None:
        """The penalty of the last solution of statistics; None if they choose it themselves."""
        found = self.manifest.about().get("l2", AUTOMATIC)
        try:
            l2 = None if found == AUTOMATIC else float(found)
        except ValueError:
            l2 = math.nan
        if l2 is not None and not (l2 >= 0 and math.isfinite(l2)):
            raise PlanError(f"{self.path / DATABASE} has l2 {found!r}: it was edited")
        return l2

    @cached_property
    def _about(self) -> dict[str, str]:
        found = self.manifest.about()
        if found.keys() - {"validation"} not in (_NEEDED, _NEEDED | _OF_STATISTICS):
            raise PlanError(f"{self.path / DATABASE} lacks entries of a plan: restore it")
        return found

    def _images(self, key: str) -> ImageData:
        values = self._value(key)
        try:
            return ImageData(**values)
        except (ArgumentError, TypeError) as error:
            what = "data source" if key == "data" else f"{key} source"
            raise PlanError(f"{self.path} has a damaged {what}: {error}") from error

    def _value(self, key: str) -> Any:
        try:
            return json.loads(self._about[key])
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{self.path / DATABASE} has a damaged {key}: restore it") from error
