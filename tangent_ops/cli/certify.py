"""``tangent-ops certify``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tangent_ops.cli.compose import Run
from tangent_ops.cli.config import Config
from tangent_ops.cli.messages import errors, hidden, say

if TYPE_CHECKING:
    from tangent_ops.shards.certifying import Checked

_SHOWN = 200  # rows


def certify(
    run: Run,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Recompute what a run claims, from its images; exit with 1 if a claim does not hold.

    In a run of --method exact: how far each shard's delta, and the lossless composition, is from
    its optimum at most, by a pass over the images in float64; after `forget`, the certificate that
    was written then. In a run of --method statistics: the sums are those of the shards' files, bit
    for bit, and the composition solves them; no image is read.
    """
    from tangent_ops.shards import Plan
    from tangent_ops.shards.certifying import certify_run

    with errors():
        plan = Plan.open(run)
        found = certify_run(plan, progress=not hidden(as_json))
    broken = [one for one in found if not one.holds]
    if as_json:
        record = {"run": str(plan.path), "holds": not broken, "claims": list(map(asdict, found))}
        typer.echo(json.dumps(record, indent=2))
    else:
        _show(found)
        for one in broken:
            say(f"{one.what} of {one.name}: {one.why}")
        say(f"{len(found) - len(broken)} of {len(found)} claims hold")
    if broken:
        raise typer.Exit(1)


def _show(found: list[Checked]) -> None:
    """A table with a row for each claim; those that do not hold first."""
    table = Table("claim", "of", "images", "claimed", "recomputed", "relative", "holds")
    for one in sorted(found, key=lambda one: one.holds)[:_SHOWN]:
        numbers = [_written(value) for value in (one.claimed, one.bound)]
        relative = None if one.bound is None or not one.size else one.bound / one.size
        if one.what == "sum":
            numbers = ["same bits", "same bits" if one.holds else "other bits, or damaged"]
        table.add_row(
            one.what, escape(one.name), str(one.samples), *numbers, _written(relative),
            "yes" if one.holds else "[bold red]no[/bold red]",
        )  # fmt: skip
    Console().print(table)
    if len(found) > _SHOWN:
        say(f"and {len(found) - _SHOWN} more, which --json lists")


def _written(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
