"""The choices that ended at an edge of their grid, by code: nobody has to notice them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from studies.paper.cells import Found
from studies.paper.tuning import MOST_WIDENINGS


def edges(found: Found) -> str:
    """A section: how many options were chosen, and which of them at an end of what was tried."""
    every = [
        (cell, name, told)
        for cell in found.cells.values()
        for name, told in cell["result"].get("choices", {}).items()
        if len(told["tried"]) > 1
    ]
    at_edge = [entry for entry in every if _at_end(entry[2])]
    head = (
        f"## Choices at an edge\n\nOf {len(every)} choices of an option, {len(at_edge)} ended at "
        f"an end of the grid: it had grown {MOST_WIDENINGS} times, or there was nothing beyond "
        "(numbers of directions and steps, quantiles, shares, rates up to 1)."
    )
    if not at_edge:
        return head
    grouped: dict[tuple[str, str, str], list[Any]] = defaultdict(list)
    for cell, name, told in at_edge:
        grouped[cell["part"], _where(cell["arguments"]), name].append(told["chosen"])
    rows = ["| part | where | option | seeds | chosen |", "| --- " * 5 + "|"]
    for (part, where, name), values in sorted(grouped.items()):
        chosen = ", ".join(f"{value:g}" for value in sorted(set(values)))
        rows.append(f"| {part} | {where} | {name} | {len(values)} | {chosen} |")
    table = "\n".join(rows)
    return f"{head}\n\n<details><summary>Which</summary>\n\n{table}\n\n</details>"


def _where(arguments: dict[str, Any]) -> str:
    """The arguments that are words; they tell cells of a part apart."""
    return ", ".join(value for value in arguments.values() if isinstance(value, str))


def _at_end(told: dict[str, Any]) -> bool:
    """Whatever the reason: a limit of the grid is flagged, too."""
    values = [value for value, _ in told["tried"]]
    return told["chosen"] in (values[0], values[-1])
