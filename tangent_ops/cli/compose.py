"""``tangent-ops compose``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from tangent_ops.cli.config import Config
from tangent_ops.cli.messages import errors, say

Run = Annotated[Path, typer.Argument(help="The run's folder, made by `tangent-ops finetune`.")]


def compose(
    run: Run,
    weights: Annotated[
        Literal["uniform", "samples"] | None,
        typer.Option(
            help="Weights of the shards in the mean: equal, or their numbers of images. Default: "
            "as in the last call; uniform in the first."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the composed delta to this file, too.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite that file.")] = False,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Add up the deltas of a run's trained shards.

    They are kept in the ledger RUN/ledger. A later call adds the shards that were trained since
    then, and drops those that were forgotten.
    """
    from tangent_ops.delta import save_delta
    from tangent_ops.errors import ArgumentError
    from tangent_ops.shards import Plan, check_settled, settle

    with errors():
        if out is not None and out.exists() and not force:
            raise ArgumentError(f"{out} exists: give another name, or --force to overwrite it")
        plan = Plan.open(run)
        settled = settle(plan, weights=weights)
        ledger = check_settled(plan)
        count = len(ledger)
        if out is not None:
            save_delta(ledger.composed(), out)
    if as_json:
        record = {"run": str(plan.path), "composed": count, **asdict(settled)}
        typer.echo(json.dumps({**record, "delta": None if out is None else str(out)}, indent=2))
        return
    say(
        f"{count} shards composed: {len(settled.added)} added, {len(settled.forgotten)} dropped, "
        f"{len(settled.missing)} not trained yet"
    )
    if out is not None:
        say(f"wrote {out}")
