"""How much is run: `quick` in the tests, `cpu` on two cores, `gpu` with every block trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from studies.paper.methods import METHODS
from studies.paper.parts import (
    accuracy,
    composition,
    forgetting,
    influence,
    membership,
    privacy,
    soups,
)
from studies.paper.parts.accuracy import Regime
from studies.paper.parts.privacy import ImageSizes


@dataclass(frozen=True)
class Preset:
    """All parts, and how they are run.

    Attributes:
        seeds: Of every part.
        workers: Processes.
        threads: Of torch, in each.
        device: Of the models.
    """

    accuracy: accuracy.Sizes
    composition: composition.Sizes
    soups: soups.Sizes
    forgetting: forgetting.Sizes
    membership: membership.Sizes
    privacy: privacy.Sizes
    influence: influence.Sizes
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    workers: int = 2
    threads: int = 1
    device: str = "cpu"

    @property
    def depths(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Of every set, how many blocks are trained, by any method."""
        used: dict[str, set[int]] = {}
        for regime in self.accuracy.regimes:
            methods = {*regime.square, *regime.entropy}
            for images in regime.sets or self.accuracy.sets:
                found = {METHODS[name].depth for name in methods} - {0}
                used.setdefault(images, {1}).update(found)
        others = (*self.composition.sets, *self.soups.sets, *self.privacy.sets)
        others += (*self.influence.sets, self.forgetting.images, self.membership.images)
        for images in others:
            used.setdefault(images, {1})
        return tuple((images, tuple(sorted(depths))) for images, depths in used.items())


SETS = ("emoji", "silhouettes", "fashion", "mnist")
SQUARE = ("probe", "nlft-1", "taft-1", "taft-1-low-rank", "taft-1-momentum", "taft-1-exact", "core")
ENTROPY = ("probe", "nlft-1", "lora-1", "adapter-1", "taft-1", "taft-1-newton")

PRESETS = {
    "quick": Preset(
        accuracy.Sizes(
            ("mnist",),
            (
                Regime(
                    "100 images", 100, 100, 3, 20,
                    ("probe", "nlft-1", "taft-1", "taft-1-exact"), ("probe", "nlft-1", "taft-1"),
                ),
            ),
        ),
        composition.Sizes(
            ("mnist",), (4,), rounds=(4,), public=50, train=80, validation=60, epochs=5
        ),
        soups.Sizes(("mnist",), ("mnist",), (4,), public=50, train=80, validation=60, epochs=3),
        forgetting.Sizes("mnist", 50, 80, 60, 4, (0, 1), (1, 4), epochs=3),
        membership.Sizes("mnist", 50, 20, 20, 60, 2, 4, epochs=3),
        privacy.Sizes(
            {"mnist": ImageSizes(50, 300, 100, 64, 4, 2)},
            (3.0,), (3.0,), 1e-4, 4, (16, 64), (24, 48), (4, 16), (8, 16),
        ),
        influence.Sizes(("mnist",), 50, 60, 60, (6,), 5),
        seeds=(0, 1),
    ),
    "cpu": Preset(
        accuracy.Sizes(
            SETS,
            (
                Regime("200 images", 200, 500, 20, 40, SQUARE, ENTROPY),
                Regime(
                    "80 images", 80, 150, 5, 8,
                    ("probe", "nlft-1", "taft-1", "taft-1-exact", "taft-3"),
                    ("probe", "nlft-1", "nlft-3"),
                ),
            ),
        ),
        composition.Sizes(SETS, fine_sets=("emoji",)),
        soups.Sizes(SETS, ("emoji", "fashion")),
        forgetting.Sizes(removed=(0, 1, 2, 5, 8), epochs=10),
        membership.Sizes(),
        privacy.Sizes(
            {
                "emoji": ImageSizes(100, 1000, 136, 100, 8, 5),
                "fashion": ImageSizes(100, 3900, 500, 100, 8, 2),
            }
        ),
        influence.Sizes(("emoji",), 100, 200, 200, (10, 20, 40), 10),
    ),
}  # fmt: skip
EVERY = tuple(METHODS)
ONLY_SQUARE = ("taft-1-low-rank", "taft-1-momentum", "taft-1-exact", "core")
PRESETS["gpu"] = replace(
    PRESETS["cpu"],
    accuracy=accuracy.Sizes(
        (*SETS, "emoji-fine"),
        (
            Regime(
                "500 images", 500, 500, 20, 64,
                tuple(name for name in EVERY if name != "taft-1-newton"),
                tuple(name for name in EVERY if name not in ONLY_SQUARE),
            ),
        ),
    ),
    soups=soups.Sizes(SETS, SETS, (2, 5, 10, 25, 50)),
    workers=1,
    threads=8,
    device="cuda",
)  # fmt: skip
