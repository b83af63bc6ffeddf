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
SQUARE = (
    "probe", "nlft-1", "lora-1", "adapter-1", "taft-1", "taft-1-low-rank", "taft-1-momentum",
    "taft-1-exact", "core",
)  # fmt: skip
ENTROPY = ("probe", "nlft-1", "lora-1", "adapter-1", "taft-1", "taft-1-newton")

PRESETS = {
    "quick": Preset(
        accuracy.Sizes(
            ("digits",),
            (
                Regime(
                    "60 images", 60, 40, 2, 20,
                    ("probe", "nlft-1", "taft-1", "taft-1-exact"), ("probe", "nlft-1", "taft-1"),
                ),
            ),
        ),
        composition.Sizes(
            ("digits",), (2,), rounds=(2,), public=20, train=40, validation=40, epochs=2
        ),
        soups.Sizes(("digits",), (), (2,), public=20, train=40, validation=40, epochs=2),
        forgetting.Sizes("digits", 20, 40, 40, 2, (0, 1), (1, 4), epochs=1),
        membership.Sizes("digits", 20, 16, 16, 40, 2, 4, epochs=1),
        privacy.Sizes(
            {"digits": ImageSizes(20, 80, 60, 32, 2, 1)},
            (3.0,), (3.0,), 1e-4, 4, (16, 64), (24, 48), (4, 16), (8, 16),
        ),
        influence.Sizes(("digits",), 20, 40, 40, (6,), 4),
        seeds=(0, 1),
    ),
    "cpu": Preset(
        accuracy.Sizes(
            SETS,
            (
                Regime("200 images", 200, 500, 20, 40, SQUARE, ENTROPY),
                Regime(
                    "50 images", 50, 150, 5, 5,
                    ("probe", "nlft-1", "taft-1", "taft-1-exact", "taft-3"),
                    ("probe", "nlft-1", "nlft-3"),
                ),
            ),
        ),
        composition.Sizes(SETS, fine_sets=("emoji",)),
        soups.Sizes(SETS, ("emoji",)),
        forgetting.Sizes(removed=(0, 1, 5, 8), epochs=10),
        membership.Sizes(),
        privacy.Sizes(
            {
                "emoji": ImageSizes(100, 1000, 136, 100, 8, 5),
                "fashion": ImageSizes(100, 3900, 500, 100, 8, 1),
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
    privacy=replace(PRESETS["cpu"].privacy, sgd_epsilons=(0.5, 1.0, 3.0, 8.0)),
    workers=1,
    threads=8,
    device="cuda",
)  # fmt: skip
