"""``tangent-ops forget``."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tangent_ops.cli.accuracy_change import measured_change, say_change
from tangent_ops.cli.compose import Run
from tangent_ops.cli.config import Config
from tangent_ops.cli.machines import HELPS, Machines
from tangent_ops.cli.messages import counted, errors, fail, hidden, leaves, listed, say
from tangent_ops.cli.next_command import say_next
from tangent_ops.cli.options import Group

if TYPE_CHECKING:
    from tangent_ops.shards import Forgotten, Plan

GONE = (
    "the images are out of the plan; `tangent-ops compose` drops the deltas that saw them, "
    "`tangent-ops finetune` trains what is left"
)
WHERE = {
    **HELPS,
    "executor": "Where the affected shards are trained again.",
    "workers": "Shards at a time.",
}


def forget(
    run: Run,
    machines: Annotated[Machines, Group(Machines, {None: WHERE})],
    shard: Annotated[str | None, typer.Option(help="A whole shard, by its name.")] = None,
    sample: Annotated[
        list[str] | None,
        typer.Option(
            help="An image, by its path in the data, and its exact copies. Repeat for more images."
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="All images with this label, such as a customer's name.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run's images, if they have moved; those that stay are compared."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config: Config = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be forgotten, and do nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Forget an image, a customer or a shard of a run, for good.

    The deltas of the affected shards are overwritten on disk, and what is left of these shards is
    trained again: the composition is as if the images had never been there. If an image that stays
    is missing, nothing is forgotten. In a run of statistics the forgotten images are subtracted,
    and no other image is read. The images themselves, copies of files, and earlier exports stay
    where they are.
    """
    from tangent_ops.errors import ArgumentError, TangentOpsError, in_words
    from tangent_ops.shards import Plan, find
    from tangent_ops.shards import forget as forgotten
    from tangent_ops.shards.composing import default_how, former_composition

    with errors():
        if [shard, sample or None, label].count(None) != 2:
            raise ArgumentError("give one of --shard, --sample and --label")
        plan = Plan.open(run)
        which: dict[str, Any] = {"shard": shard, "sample": sample or None, "label": label}
        found = find(plan, **which)
        moved = None if data is None else replace(plan.data, root=str(data))
        count = sum(map(len, found.values()))
        shards = f"{counted(len(found), 'shard')} ({', '.join(list(found)[:5])})"
        words = f"{counted(count, 'image')} of {shards}"
        if dry_run:
            if moved is not None:
                plan.relocate(moved, without=found, dry_run=True, progress=not hidden(as_json))
            if as_json:
                typer.echo(json.dumps({"would_forget": found}, indent=2))
            else:
                say(f"would forget {words}; nothing was changed")
            return
        if not (yes or as_json):
            if not sys.stdin.isatty():
                fail(f"this forgets {words} for good: say --yes", 2)
            typer.confirm(f"Forget {words} for good?", abort=True)
        how = default_how(plan)
        before = None if plan.validation is None else former_composition(plan, how)
        yet = "nothing was forgotten yet; the same command does it"
        leaves(lambda: yet if _there(plan, which) else GONE)
        try:
            done = forgotten(
                plan,
                **which,
                data=moved,
                **vars(machines),
                progress=not hidden(as_json),
            )
        except (TangentOpsError, OSError) as error:
            if _there(plan, which):
                raise
            fail(f"{in_words(error)}\nBut {GONE}", 1, error)
    leaves("the images are forgotten, but not all was measured and shown")
    change = None
    after = former_composition(plan, how)
    if before is not None and after is not None:
        change = measured_change(plan, before, after, progress=not hidden(as_json))
    _show(done, change, as_json)
    if done.report.failed:
        raise typer.Exit(1)
    if not as_json and any(shard.done for shard in plan.shards()):
        say_next("compose" if after is None else "evaluate", run, plan)


def _there(plan: Plan, which: dict[str, Any]) -> bool:
    """Whether the plan still has them; one transaction removes them all."""
    from tangent_ops.errors import ArgumentError
    from tangent_ops.shards import find

    try:
        find(plan, **which)
    except ArgumentError:
        return False
    return True


def _show(done: Forgotten, change: dict[str, Any] | None, as_json: bool) -> None:
    failed = done.report.failed
    if as_json:
        record = {
            "samples": done.samples,
            "shards": done.shards,
            "dropped": done.dropped,
            "trained": done.report.trained,
            "solved": done.resolved,
            "subtracted": done.subtracted,
            "l2": None if done.solution is None else done.solution.l2,
            "failed": failed,
            "accuracy": change,
        }
        typer.echo(json.dumps(record, indent=2))
    else:
        anew = "summed anew" if done.subtracted else "trained anew"
        shards = {
            "empty now": len(done.dropped),
            "reduced by subtraction": len(done.subtracted),
            "solved again": len(done.resolved),
            anew: len(done.report.trained),
        }
        images = f"forgot {counted(done.samples, 'image')}"
        say(listed(f"{images} of {counted(len(done.shards), 'shard')}", shards))
        if done.solution is not None:
            say(f"  solved again without them, with l2 = {done.solution.l2:g}")
        for name, bound in done.resolved.items():
            say(f"  {name}: within {bound:.2g} of the optimum without them (certified)")
        for name, why in failed.items():
            say(f"  {name}: {why}")
        say_change(change)
