"""The choices that ended at an edge of their grid, by code: nobody has to notice them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from studies.paper.cells import Found
from studies.paper.tuning import MOST_WIDENINGS


def edges(found: Found) -> str:
    """A section: how many options were chosen, and which of them at an edge."""
    every = [
        (cell, name, told)
        for cell in found.cells.values()
        for name, told in cell["result"].get("choices", {}).items()
    ]
    at_edge = [entry for entry in every if entry[2]["edge"]]
    head = (
        f"## Choices at an edge\n\nOf {len(every)} choices of an option, {len(at_edge)} ended at "
        f"an edge of the grid, after it had grown {MOST_WIDENINGS} times."
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
