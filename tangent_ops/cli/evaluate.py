"""``tangent-ops evaluate``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tangent_ops.cli.chosen import AnchorOnly, OneDelta, check_one, chosen_delta
from tangent_ops.cli.compose import Run
from tangent_ops.cli.config import Config
from tangent_ops.cli.image_options import Reader, Split
from tangent_ops.cli.messages import counted, errors, hidden, say
from tangent_ops.cli.next_command import say_next

if TYPE_CHECKING:
    from tangent_ops.delta import Delta
    from tangent_ops.shards import Plan
    from tangent_ops.shards.scoring import Estimate, Predictions

_SHOWN = 50  # classes


def evaluate(
    run: Run,
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Folder with one folder of images per class. Default: the validation images that "
            "finetune was given."
        ),
    ] = None,
    data_name: Reader = "",
    split: Split = "validation",
    delta: OneDelta = None,
    anchor_only: AnchorOnly = False,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Show the recall of each class, too.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 64,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Measure the accuracy of a run on labelled images.

    Side by side: the anchor, and each composition that the run has (see `compose --how`). In a run
    of statistics also "head only", a probe of the same images: the optimum if nothing but the head
    is trained. Errors are standard errors, and those of differences are of paired images.
    """

    from tangent_ops.checks import check_integer
    from tangent_ops.cli.assignment import described
    from tangent_ops.errors import ArgumentError
    from tangent_ops.shards import ImageData, Plan
    from tangent_ops.shards.job import device
    from tangent_ops.shards.scoring import predictions

    with errors():
        check_one(None, delta, anchor_only)
        check_integer("--batch-size", batch_size, 1)
        if data is None and data_name:
            raise ArgumentError("--data-name is for the images of DATA: give a folder, too")
        plan = Plan.open(run)
        info = plan.anchor_info
        images = plan.validation if data is None else ImageData(str(data), data_name, split)
        if images is None:
            raise ArgumentError(
                f"{run} has no validation images: give a folder of labelled images, as in "
                f"`tangent-ops evaluate {run} IMAGES`"
            )
        samples = images.open(info.input)
        counts = samples.counts()
        if not as_json:
            say(described(samples) if data is not None else f"{images.root}: {described(samples)}")
        samples = samples.with_classes(info.classes)
        deltas, main, what = _compared(plan, delta, anchor_only)
        tangent = plan.tangent().to(device())
        found = predictions(
            tangent, deltas, samples, batch_size=batch_size, progress=not hidden(as_json)
        )
    names = list(info.classes) or [str(index) for index in range(found.outputs)]
    if as_json:
        scores = {name: _score(found, name, names) for name in deltas}
        record = {key: scores[main][key] for key in ("accuracy", "standard_error")}
        record |= {"samples": len(samples), "classes": counts, "model": what, "models": scores}
        typer.echo(json.dumps(record, indent=2))
        return
    if len(deltas) > 1:
        Console().print(_table(found, main))
    if per_class:
        _show_classes(found, names)
    share, error = found.accuracy(main)
    say(f"{what}: {share:.1%} of {counted(len(samples), 'image')} (standard error {error:.1%})")
    if delta is None and not anchor_only and not data_name:
        say_next("report", run, plan, *(() if plan.validation else ("--data", str(data))))


def _compared(
    plan: Plan, delta: Path | None, anchor_only: bool
) -> tuple[Mapping[str, Delta | None], str, str]:
    """Deltas by name, the name of the first in rank, and words for it."""
    from tangent_ops.shards.composing import ANCHOR, compositions, default_how

    found, what = chosen_delta(plan, None, delta, anchor_only)  # raises if there is none
    if anchor_only or delta is not None:
        name = ANCHOR if anchor_only else what
        return {name: found}, name, what
    return compositions(plan), default_how(plan), what


def _score(found: Predictions, name: str, classes: list[str]) -> dict[str, Any]:
    share, error = found.accuracy(name)
    counts = zip(found.correct_by_class(name).tolist(), found.totals().tolist(), strict=True)
    recall = [right / total if total else None for right, total in counts]
    return {
        "accuracy": share,
        "standard_error": error,
        "recall": dict(zip(classes, recall, strict=True)),
    }


def _table(found: Predictions, main: str) -> Table:
    """A row for each model, with what the main one gains over it."""
    table = Table("model", caption="± standard error", caption_justify="left")
    table.add_column("accuracy", justify="right")
    table.add_column(f"{escape(main)} is better by", justify="right")
    for name in found.classes:
        share, error = found.accuracy(name)
        gain = "" if name == main else points(found.gain(main, name))
        style = "bold" if name == main else ""
        table.add_row(escape(name), f"{share:.1%} ± {error:.1%}", gain, style=style)
    return table


def points(gain: Estimate) -> str:
    """A difference of accuracies in percentage points, with its standard error."""
    return f"{100 * gain.value:+.1f} ± {100 * gain.error:.1f} points"


def _show_classes(found: Predictions, names: list[str]) -> None:
    """A table: a column for each model, and a row for each class that has images."""
    table = Table("recall", "images", *map(escape, found.classes))
    totals = found.totals().tolist()
    there = [index for index, total in enumerate(totals) if total]
    correct = [found.correct_by_class(name).tolist() for name in found.classes]
    for index in there[:_SHOWN]:
        shares = [f"{right[index] / totals[index]:.1%}" for right in correct]
        table.add_row(escape(names[index]), str(totals[index]), *shares)
    Console().print(table)
    if len(there) > _SHOWN:
        say(f"and {len(there) - _SHOWN} more classes, which --json lists")
