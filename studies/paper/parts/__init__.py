"""The parts of the study: each says what is to be run, and runs one piece of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from studies.paper.cells import Cell, Found
from studies.paper.parts import accuracy, composition, forgetting, influence, privacy
from studies.paper.parts.context import Context
from studies.paper.presets import Preset

Run = Callable[[dict[str, Any], Context], dict[str, Any]]

RUNS: dict[str, Run] = {
    accuracy.PART: accuracy.run,
    accuracy.MEMORY: accuracy.run_memory,
    composition.PART: composition.run,
    forgetting.PART: forgetting.run,
    forgetting.ATTACK: forgetting.run_attack,
    privacy.PART: privacy.run,
    influence.PART: influence.run,
}
PARTS = (accuracy, composition, forgetting, privacy, influence)


def plan(preset: Preset, found: Found) -> Iterator[Cell]:
    """Everything that can be run, given what was found."""
    for part in PARTS:
        yield from part.plan(preset, found)


def run(cell: Cell, context: Context) -> dict[str, Any]:
    """Run one cell."""
    return RUNS[cell.part](dict(cell.arguments), context)
