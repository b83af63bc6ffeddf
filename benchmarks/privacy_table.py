"""Tables of private training, from the files of `benchmarks.privacy` and the study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stored import RESULTS, BadFile

SPEED = RESULTS / "privacy" / "cpu.json"
NOT_MEASURED = "Not measured yet."


@dataclass(frozen=True)
class Step:
    """A training step: median seconds, and the peak of what it allocates."""

    name: str
    seconds: float
    peak: int


def read_speed(path: Path = SPEED) -> Mapping[str, Any] | None:
    """What is stored there; None if nothing is.

    Raises:
        BadFile: it is no file of `benchmarks.privacy`.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        speed_table(found)
    except (KeyError, TypeError, ValueError, StopIteration) as problem:
        raise BadFile(f"{path} is not a file of benchmarks.privacy: {problem}") from None
    return found


def speed_table(found: Mapping[str, Any] | None) -> str:
    """A line per kind of step: time and memory, and how many times the ordinary step's."""
    if found is None:
        return NOT_MEASURED
    batches = {count: [Step(**row) for row in rows] for count, rows in found["rows"].items()}
    names = [step.name for step in next(iter(batches.values()))]
    headings = [f"batch {count}: {what}" for count in batches for what in ("step", "peak memory")]
    lines = ["| step | " + " | ".join(headings) + " |"]
    lines.append("| " + " | ".join(["---"] * (1 + len(headings))) + " |")
    for name in names:
        cells = [name]
        for steps in batches.values():
            base = next(step for step in steps if step.name == "taft")
            step = next(step for step in steps if step.name == name)
            cells.append(f"{1e3 * step.seconds:.0f} ms ({step.seconds / base.seconds:.2f}x)")
            cells.append(f"{step.peak / 1e6:.0f} MB ({step.peak / base.peak:.2f}x)")
        lines.append("| " + " | ".join(cells) + " |")
    about = found["environment"]
    where = f"{about['cpu']}, torch {about['torch']}, commit {about['commit']}, {about['date']}"
    said = f"{found['setting']}. Medians. {where}; `python -m benchmarks.privacy`."
    return "\n".join([*lines, "", said])
