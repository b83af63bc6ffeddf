"""Errors of every precision as a table, from the file that `benchmarks.precision` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stored import RESULTS, BadFile

STORED = RESULTS / "precision" / "cpu.json"
HEADINGS = ("precision", "value", "tangent", "gradient")


@dataclass(frozen=True)
class Errors:
    """Relative errors, ‖found - exact‖/‖exact‖: ours, the ordinary model's, torch.func.jvp's."""

    precision: str
    value: float
    plain_value: float
    tangent: float
    eager_tangent: float
    gradient: float
    plain_gradient: float


def read_precision(path: Path = STORED) -> Mapping[str, Any] | None:
    """What is stored there; None if nothing is.

    Raises:
        BadFile: it is no file of `benchmarks.precision`.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        precision_table(found)
    except (KeyError, TypeError, ValueError) as problem:
        raise BadFile(f"{path} is not a file of benchmarks.precision: {problem}") from None
    return found


def precision_table(found: Mapping[str, Any] | None) -> str:
    """A line per precision: ours, and PyTorch's beside it in brackets."""
    if found is None:
        return "Not measured yet."
    lines = ["| " + " | ".join(HEADINGS) + " |", "| " + " | ".join(["---"] * 4) + " |"]
    for row in (Errors(**row) for row in found["rows"]):
        pairs = (
            (row.value, row.plain_value),
            (row.tangent, row.eager_tangent),
            (row.gradient, row.plain_gradient),
        )
        cells = [f"{ours:.1e} ({theirs:.1e})" for ours, theirs in pairs]
        lines.append("| " + " | ".join([row.precision, *cells]) + " |")
    about = found["environment"]
    where = f"{about['cpu']}, torch {about['torch']}, commit {about['commit']}, {about['date']}"
    return "\n".join(
        [*lines, "", f"{found['setting']}. {where}; `python -m benchmarks.precision`."]
    )
