"""All cells of a preset, and how one of them is run."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

from studies.paper.cells import Cell, sources_sha256
from studies.paper.parts import (
    accuracy,
    composition,
    forgetting,
    influence,
    membership,
    privacy,
    soups,
)
from studies.paper.parts.context import Context
from studies.paper.presets import Preset

Run = Callable[[dict[str, Any], Context], dict[str, Any]]

RUNS: dict[str, Run] = {
    accuracy.PART: accuracy.run,
    composition.PART: composition.run,
    soups.PART: soups.run,
    forgetting.PART: forgetting.run,
    membership.PART: membership.run,
    privacy.PART: privacy.run,
    influence.PART: influence.run,
}


def plan(preset: Preset) -> list[Cell]:
    """All cells, seed by seed: what was cut off has whole seeds."""
    parts = (
        (composition, preset.composition),
        (accuracy, preset.accuracy),
        (privacy, preset.privacy),
        (forgetting, preset.forgetting),
        (membership, preset.membership),
        (soups, preset.soups),
        (influence, preset.influence),
    )
    cells = [cell for part, sizes in parts for cell in part.plan(sizes, preset.seeds)]
    return sorted(cells, key=lambda cell: preset.seeds.index(cell.arguments["seed"]))


def run(cell: Cell, context: Context) -> dict[str, Any]:
    """Run one cell."""
    return RUNS[cell.part](dict(cell.arguments), context)


def sources(cell: Cell) -> str:
    """A hash of what computes it."""
    return sources_sha256(module_of(cell.part))


def digest() -> str:
    """A hash of what computes any of them."""
    every = sorted(sources_sha256(module_of(part)) for part in RUNS)
    return hashlib.sha256("".join(every).encode()).hexdigest()


def module_of(part: str) -> str:
    """The module that runs a part."""
    module = inspect.getmodule(RUNS[part])
    assert module is not None
    return module.__name__
