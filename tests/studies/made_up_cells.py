"""Cells that worker processes can import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from studies.paper.cells import Cell

CELLS = [Cell("square", {"number": number}) for number in (1, 2, 3)]


def run(cell: Cell) -> dict[str, Any]:
    """Squares a number and records the run in a file; fails if a file demands it."""
    number = cell.arguments["number"]
    marks = Path(os.environ["MARKS"])
    if (marks / f"fail-{number}").exists():
        raise ValueError(f"{number} is out of luck")
    with (marks / f"ran-{number}").open("a") as file:
        file.write("x")
    return {"squared": number**2}
