"""Which delta of a run a command uses: a composition, one shard's, or none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tangent_ops.cli.messages import counted
from tangent_ops.errors import ArgumentError

if TYPE_CHECKING:
    from tangent_ops.delta import Delta
    from tangent_ops.model.linearized import LinearizedModel
    from tangent_ops.shards import Plan

How = Annotated[
    Literal["mean", "least-squares", "head", "lossless", "statistics"] | None,
    typer.Option(
        help="A composition that `compose --how` made. Default: the mean, or statistics in a run "
        "of --method statistics."
    ),
]
OneDelta = Annotated[
    Path | None, typer.Option(help="A delta (of one shard, say) instead of the compositions.")
]
AnchorOnly = Annotated[bool, typer.Option("--anchor-only", help="The anchor, without any delta.")]


def check_one(how: str | None, delta: Path | None, anchor_only: bool) -> None:
    """Raise ArgumentError if several deltas are asked for."""
    given = [("--how", how), ("--delta", delta), ("--anchor-only", anchor_only or None)]
    names = [name for name, value in given if value is not None]
    if len(names) > 1:
        raise ArgumentError(f"{' and '.join(names)} exclude each other: give one of them")


def chosen_delta(
    plan: Plan, how: str | None, delta: Path | None, anchor_only: bool
) -> tuple[Delta | None, str]:
    """The delta that was asked for, None for the anchor's, and words for it."""
    from tangent_ops.delta import load_delta
    from tangent_ops.shards import settled_ledger
    from tangent_ops.shards.composing import composition, default_how

    if anchor_only:
        return None, "the anchor"
    if delta is not None:
        return load_delta(delta, anchor=plan.anchor_info.fingerprint), str(delta)
    kind = how or default_how(plan)
    found = composition(plan, kind)
    return found, f"composition of {counted(len(settled_ledger(plan)), 'shard')} ({kind})"


def chosen(
    plan: Plan, how: str | None, delta: Path | None, anchor_only: bool
) -> tuple[LinearizedModel, str]:
    """The run's model with the delta that was asked for, and words for it."""
    from tangent_ops.shards.job import device

    found, what = chosen_delta(plan, how, delta, anchor_only)
    tangent = plan.tangent()
    if found is not None:
        tangent.load_delta_dict(found)
    return tangent.to(device()), what
