"""All cells of a preset, and how one of them is run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from studies.paper.cells import Cell, sources_sha256
from studies.paper.parts import accuracy, composition, forgetting, influence, membership, privacy
from studies.paper.parts.context import Context
from studies.paper.presets import Preset

Run = Callable[[dict[str, Any], Context], dict[str, Any]]

RUNS: dict[str, Run] = {
    accuracy.PART: accuracy.run,
    accuracy.MEMORY: accuracy.run_memory,
    composition.PART: composition.run,
    forgetting.PART: forgetting.run,
    membership.PART: membership.run,
    privacy.PART: privacy.run,
    influence.PART: influence.run,
}
PARTS = (accuracy, composition, forgetting, membership, privacy, influence)


def plan(preset: Preset) -> list[Cell]:
    """All cells; the parts with the longest first."""
    return [cell for part in PARTS for cell in part.plan(preset)]


def run(cell: Cell, context: Context) -> dict[str, Any]:
    """Run one cell."""
    return RUNS[cell.part](dict(cell.arguments), context)


def sources(cell: Cell) -> str:
    """A hash of what computes it."""
    module = inspect.getmodule(RUNS[cell.part])
    assert module is not None
    return sources_sha256(module.__name__)
