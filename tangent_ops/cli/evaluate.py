"""``tangent-ops evaluate``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tangent_ops.cli.compose import Run
from tangent_ops.cli.config import Config
from tangent_ops.cli.messages import errors, hidden, say

if TYPE_CHECKING:
    from tangent_ops.model.linearized import LinearizedModel
    from tangent_ops.shards import Plan


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
        Path | None, typer.Option(help="A delta (of one shard, say) instead of the composed one.")
    ] = None,
    anchor_only: Annotated[
        bool, typer.Option("--anchor-only", help="Evaluate the anchor, without any delta.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 64,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Measure the accuracy of a run's composition on labelled images."""
    from tangent_ops.cli.assignment import described
    from tangent_ops.data import check_integer
    from tangent_ops.errors import ArgumentError
    from tangent_ops.evaluate import accuracy
    from tangent_ops.shards import ImageData, Plan

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
        tangent, what = composed(plan, delta, anchor_only)
        found = accuracy(tangent, samples, batch_size=batch_size, progress=not hidden(as_json))
    error = math.sqrt(found * (1 - found) / len(samples))
    if as_json:
        record = {"accuracy": found, "standard_error": error, "samples": len(samples)}
        record["classes"] = counts
        typer.echo(json.dumps({**record, "model": what}, indent=2))
    else:
        say(f"{what}: {found:.1%} of {len(samples)} images (standard error {error:.1%})")


def composed(plan: Plan, delta: Path | None, anchor_only: bool) -> tuple[LinearizedModel, str]:
    """A run's model with one delta, by default the composed one, and a name for messages."""
    import torch

    from tangent_ops.delta import load_delta
    from tangent_ops.shards import check_settled

    tangent = plan.tangent()
    if anchor_only:
        what = "the anchor"
    elif delta is not None:
        tangent.load_delta_dict(load_delta(delta, anchor=tangent.fingerprint))
        what = str(delta)
    else:
        ledger = check_settled(plan)
        tangent.load_delta_dict(ledger.composed())
        what = f"composition of {len(ledger)} shards"
    return tangent.to("cuda" if torch.cuda.is_available() else "cpu"), what
