"""Cells that worker processes can import."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from studies.paper.cells import Cell, Found


def plan(found: Found) -> Iterator[Cell]:
    """Squares of 1 to 3, and then of the largest square."""
    for number in (1, 2, 3):
        yield Cell("square", {"number": number})
    squares = [cell["squared"] for cell in found.of("square")]
    if len(squares) >= 3:
        yield Cell("square", {"number": 9})


def run(cell: Cell) -> dict[str, Any]:
    """Squares a number and records the run in a file; fails if a file demands it."""
    number = cell.arguments["number"]
    marks = Path(os.environ["MARKS"])
    if (marks / f"fail-{number}").exists():
        raise ValueError(f"{number} is out of luck")
    with (marks / f"ran-{number}").open("a") as file:
        file.write("x")
    return {"squared": number**2}
