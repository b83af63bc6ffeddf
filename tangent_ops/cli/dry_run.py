"""``finetune --dry-run``: shows what would be done, and measures one step of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tangent_ops.cli.messages import counted, say

if TYPE_CHECKING:
    from tangent_ops.cli.anchor_options import AnchorOptions
    from tangent_ops.shards import ImageData, Plan, Samples, ShardRecipe
    from tangent_ops.shards.expected import Expected

_SHOWN = 50  # shards


def show_dry_run(
    anchor: AnchorOptions,
    recipe: ShardRecipe,
    data: ImageData,
    samples: Samples,
    assignment: Mapping[str, Sequence[str]],
    there: Plan | None,
    out: Path,
    validation: ImageData | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Print it; nothing is written, downloaded or trained.

    Args:
        anchor: checked.
        recipe: of the run.
        data: the run's images.
        samples: the same, listed.
        assignment: shard -> ids.
        there: the run, if it was begun already.
        out: its folder.
        validation: the validation images that were given.
        workers: shards at a time; None for the default.
        as_json: print JSON.
    """
    rows = _rows(recipe, assignment, there)
    weights, why = _weights(anchor, there)
    found, reason = _expected(anchor, recipe, data, samples, there)
    todo = [row for row in rows if not row["done"] and row["samples"]]
    epochs = recipe.epochs if recipe.method == "gradient" else 1
    known = found is not None and recipe.dp_epsilon is None
    if validation is None and there is not None:
        validation = there.validation
    measured = 0 if validation is None else _count(validation)
    seconds = (
        [found.seconds(row["samples"], epochs, measured) for row in todo] if known and found else []
    )
    if as_json:
        record = {
            "run": str(out),
            "classes": samples.counts(),
            "passed_over": list(samples.passed_over),
            "recipe": recipe.to_dict(),
            "shards": rows,
            "weights": weights,
            "parameters": found and found.parameters,
            "bytes_per_shard": found and found.bytes,
            "bytes": found and found.bytes * sum(row["samples"] > 0 for row in rows),
            "seconds": sum(seconds) if known else None,
            "measured_on": found and found.images,
        }
        typer.echo(json.dumps(record, indent=2))
        return
    _show(rows, recipe)
    more = f" ({len(rows) - _SHOWN} more not shown)" if len(rows) > _SHOWN else ""
    say(f"weights:    {weights}{f': {why}' if why else ''}")
    if found is None:
        say(f"size, time: not measured: {reason}")
    else:
        say(f"trained:    {found.parameters:,} numbers of each shard")
        kind = "statistics" if recipe.method == "statistics" else "deltas"
        count = sum(row["samples"] > 0 for row in rows)
        say(f"{kind + ':':<11} {_bytes(found.bytes)} each, {_bytes(found.bytes * count)} in all")
        say(f"time:       {_time(recipe, seconds, found, workers)}")
    shards = counted(len(rows), "shard")
    say(f"{len(todo)} of {shards} would be trained into {out}{more}; nothing was written")


def _count(validation: ImageData) -> int:
    """Number of validation images; 0 if those of a run are gone."""
    from tangent_ops.errors import ArgumentError

    try:
        return len(validation.open())
    except ArgumentError:
        return 0


def _rows(
    recipe: ShardRecipe, assignment: Mapping[str, Sequence[str]], there: Plan | None
) -> list[dict[str, Any]]:
    listed = [(name, len(ids), False) for name, ids in assignment.items()]
    if there is not None:  # perhaps some were forgotten
        listed = [(shard.name, shard.samples, shard.done) for shard in there.shards()]
    rows = []
    for name, count, done in listed:
        per_epoch = math.ceil(count / recipe.batch_size)
        steps = recipe.epochs * per_epoch if recipe.dp_epsilon is None else recipe.dp_steps
        by_steps = recipe.method == "gradient"
        rows.append(
            {"shard": name, "samples": count, "steps": steps if by_steps else None, "done": done}
        )
    return rows


def _show(rows: list[dict[str, Any]], recipe: ShardRecipe) -> None:
    without = "one pass" if recipe.method == "statistics" else "to the optimum"
    table = Table("shard", "samples", "steps")
    for row in rows[:_SHOWN]:
        steps = without if row["steps"] is None else str(row["steps"])
        if row["done"] or not row["samples"]:
            steps = "none: it is trained" if row["done"] else "none: it is empty"
        table.add_row(escape(row["shard"]), str(row["samples"]), steps)
    Console().print(table)


def _weights(anchor: AnchorOptions, there: Plan | None) -> tuple[str, str]:
    """Where the anchor's weights come from, and why they cannot be had."""
    from tangent_ops.cli.network import weights_source

    if there is not None:
        return "those of the run", ""
    if anchor.anchor is not None or anchor.weights is not None:
        return str(anchor.anchor or anchor.weights), ""
    if not anchor.pretrained:
        return "random", ""
    found = weights_source(anchor.model)
    if found.kind == "none":
        return "not to be had", found.why
    return ("in the cache" if found.kind == "cache" else "to be downloaded"), ""


def _expected(
    anchor: AnchorOptions,
    recipe: ShardRecipe,
    data: ImageData,
    samples: Samples,
    there: Plan | None,
) -> tuple[Expected | None, str]:
    """Sizes and times; or None, and why they were not measured."""
    from tangent_ops.cli.assignment import classes_of
    from tangent_ops.cli.make_anchor import model_without_weights
    from tangent_ops.errors import TangentOpsError
    from tangent_ops.shards import ImageData
    from tangent_ops.shards.anchor import load_anchor
    from tangent_ops.shards.expected import expected

    public = None if anchor.public is None else ImageData(str(anchor.public))
    try:
        if there is not None or anchor.anchor is not None:
            path = there.anchor_path if there is not None else anchor.anchor
            assert path is not None
            model, info = load_anchor(path)
            config = info.input
        else:
            model, config = model_without_weights(anchor, len(classes_of(samples)))
        return expected(model, config, recipe, data, public), ""
    except (TangentOpsError, OSError, MemoryError) as error:
        return None, str(error)


def _time(recipe: ShardRecipe, seconds: list[float], found: Expected, workers: int | None) -> str:
    if not seconds:
        return "not measured: it is a private fit" if recipe.dp_epsilon is not None else "none"
    at_a_time = min(len(seconds), workers or 1)
    words = f"about {_duration(sum(seconds))}"
    if at_a_time > 1:
        words += (
            f" of work, {_duration(sum(seconds) / at_a_time)} with {at_a_time} shards at a time"
        )
    words += f", without the start of processes; measured on {counted(found.images, 'image')}"
    if recipe.method == "exact":
        words += ", and the solve takes longer than in proportion"
    return words


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
