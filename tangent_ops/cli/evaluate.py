"""``tangent-ops evaluate``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tangent_ops.cli.compose import Run
from tangent_ops.cli.config import Config
from tangent_ops.cli.messages import errors, hidden, say

if TYPE_CHECKING:
    from torch import Tensor

    from tangent_ops.delta import Delta
    from tangent_ops.model.linearized import LinearizedModel
    from tangent_ops.shards import Plan

_SHOWN = 50  # classes


def evaluate(
    run: Run,
    data: Annotated[Path, typer.Argument(help="Folder with one folder of images per class.")],
    data_name: Annotated[
        str, typer.Option(help="Use another reader: torch/NAME, hfds/NAME or wds/NAME.")
    ] = "",
    split: Annotated[
        str, typer.Option(help="Split of the data set; a sub-folder of DATA, if there is one.")
    ] = "validation",
    delta: Annotated[
        Path | None, typer.Option(help="A delta (of one shard, say) instead of the compositions.")
    ] = None,
    anchor_only: Annotated[
        bool, typer.Option("--anchor-only", help="Evaluate the anchor, without any delta.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 64,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Measure the accuracy of a run on labelled images, and the recall of each class.

    Side by side: the anchor, and each composition that the run has (see `compose --how`). In a run
    of statistics also "head only", a probe of the same images: the optimum if nothing but the head
    is trained.
    """
    from torch import bincount, tensor

    from tangent_ops.cli.assignment import described
    from tangent_ops.data import check_integer
    from tangent_ops.errors import ArgumentError
    from tangent_ops.shards import ImageData, Plan
    from tangent_ops.shards.job import device
    from tangent_ops.shards.scoring import correct_by_class

    with errors():
        if anchor_only and delta is not None:
            raise ArgumentError("--delta and --anchor-only exclude each other")
        check_integer("--batch-size", batch_size, 1)
        plan = Plan.open(run)
        info = plan.anchor_info
        samples = ImageData(str(data), data_name, split).open(info.input)
        counts = samples.counts()
        if not as_json:
            say(described(samples))
        samples = samples.with_classes(info.classes)
        deltas, main, what = _compared(plan, delta, anchor_only)
        tangent = plan.tangent().to(device())
        correct = correct_by_class(
            tangent, deltas, samples, batch_size=batch_size, progress=not hidden(as_json)
        )
    totals = bincount(tensor(samples.targets), minlength=len(correct[main]))
    names = list(info.classes) or [str(index) for index in range(len(totals))]
    found = {name: _score(own, totals, names) for name, own in correct.items()}
    if as_json:
        record = {key: found[main][key] for key in ("accuracy", "standard_error")}
        record |= {"samples": len(samples), "classes": counts, "model": what, "models": found}
        typer.echo(json.dumps(record, indent=2))
        return
    if len(found) > 1:
        _show(found, dict(zip(names, totals.tolist(), strict=True)))
    score = found[main]
    say(
        f"{what}: {score['accuracy']:.1%} of {len(samples)} images "
        f"(standard error {score['standard_error']:.1%})"
    )


def _compared(
    plan: Plan, delta: Path | None, anchor_only: bool
) -> tuple[Mapping[str, Delta | None], str, str]:
    """Deltas by name, the name of the first in rank, and words for it."""
    from tangent_ops.delta import load_delta
    from tangent_ops.shards import settled_ledger
    from tangent_ops.shards.composing import composition, compositions, default_how

    if anchor_only:
        return {"anchor": None}, "anchor", "the anchor"
    if delta is not None:
        found = load_delta(delta, anchor=plan.anchor_info.fingerprint)
        return {str(delta): found}, str(delta), str(delta)
    main = default_how(plan)
    composition(plan, main)  # raises if there is none
    return compositions(plan), main, f"composition of {len(settled_ledger(plan))} shards"


def composed(plan: Plan, delta: Path | None) -> tuple[LinearizedModel, str]:
    """A run's model with one delta, by default the composed one, and a name for messages."""
    from tangent_ops.delta import load_delta
    from tangent_ops.shards import settled_ledger
    from tangent_ops.shards.composing import composition, default_how
    from tangent_ops.shards.job import device

    if delta is not None:
        found, what = load_delta(delta, anchor=plan.anchor_info.fingerprint), str(delta)
    else:
        found = composition(plan, default_how(plan))
        what = f"composition of {len(settled_ledger(plan))} shards"
    tangent = plan.tangent()
    tangent.load_delta_dict(found)
    return tangent.to(device()), what


def _score(correct: Tensor, totals: Tensor, names: list[str]) -> dict[str, Any]:
    share = float(correct.sum() / totals.sum())
    recall = {
        name: right / total if total else None
        for name, right, total in zip(names, correct.tolist(), totals.tolist(), strict=True)
    }
    error = math.sqrt(share * (1 - share) / int(totals.sum()))
    return {"accuracy": share, "standard_error": error, "recall": recall}


def _show(found: Mapping[str, dict[str, Any]], totals: Mapping[str, int]) -> None:
    """A table: a column for each model, and a row for each class that has images."""
    table = Table("recall", "images", *found)
    there = [name for name, total in totals.items() if total]
    for name in there[:_SHOWN]:
        shares = [f"{score['recall'][name]:.1%}" for score in found.values()]
        table.add_row(escape(name), str(totals[name]), *shares)
    table.add_section()
    table.add_row(
        "all", str(sum(totals.values())), *(f"{score['accuracy']:.1%}" for score in found.values())
    )
    Console().print(table)
    if len(there) > _SHOWN:
        say(f"and {len(there) - _SHOWN} more classes, which --json lists")
