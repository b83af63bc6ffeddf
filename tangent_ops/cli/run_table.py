"""The table at the end of ``finetune``: a row for each shard, as its history tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tangent_ops.cli.messages import say

if TYPE_CHECKING:
    from tangent_ops.shards import Plan
    from tangent_ops.shards.history import ShardHistory

_SHOWN = 50  # shards


def show_shards(plan: Plan) -> None:
    """Print the trained shards of a run, and the accuracy of each where it was measured."""
    from tangent_ops.shards.history import read_history

    done = [shard for shard in plan.shards() if shard.done]
    found = [(s, read_history(plan, s.job or "")) for s in done[:_SHOWN]]
    measured = any(history and history.accuracy for _, history in found)
    fit, cell = _column(plan)
    best = measured and any(history and len(history.accuracy) > 1 for _, history in found)
    table = Table("shard", "images", *fit, *(["accuracy"] * measured), *(["best epoch"] * best))
    for shard, history in found:
        row = [escape(shard.name), str(shard.samples), *cell(shard.samples, history)]
        if measured:
            row.append(f"{history.accuracy[-1]:.1%}" if history and history.accuracy else "-")
        if best:
            row.append(_best(history))
        table.add_row(*row)
    Console().print(table)
    if len(done) > _SHOWN:
        say(f"and {len(done) - _SHOWN} more shards: tangent-ops inspect {plan.path} --shards")
    if best:
        say(
            "accuracy is on the validation images, after the last epoch; the deltas are of that "
            "epoch. An epoch chosen as the best on these images looks better than it is"
        )
    elif measured:
        say("accuracy is on the validation images")


def histories(plan: Plan) -> list[dict[str, Any]]:
    """The same for programs: of each trained shard, its history."""
    from tangent_ops.shards.history import read_history

    found = []
    for shard in plan.shards():
        if shard.done:
            history = read_history(plan, shard.job or "")
            told = {} if history is None else asdict(history)
            found.append({"shard": shard.name, "samples": shard.samples, **told})
    return found


def _column(plan: Plan) -> tuple[list[str], Callable[..., list[str]]]:
    """Headings of the columns on the fit, and a function of a shard's cells."""
    recipe = plan.recipe
    if recipe.method == "statistics":
        outputs = plan.anchor_info.options["num_classes"]
        return ["rows"], lambda samples, _: [str(samples * outputs)]
    if recipe.dp_epsilon is not None:
        return ["loss"], lambda *_: ["private"]
    if recipe.method == "exact":
        return ["from the optimum"], lambda _, history: [_bound(history)]
    return ["loss"], lambda _, history: [_losses(history)]


def _bound(history: ShardHistory | None) -> str:
    return f"< {history.bound:.2g}" if history and history.bound is not None else "-"


def _losses(history: ShardHistory | None) -> str:
    if not history or not history.loss:
        return "-"
    return f"{history.loss[0]:.3g} to {history.loss[-1]:.3g}"


def _best(history: ShardHistory | None) -> str:
    if not history or not history.accuracy:
        return "-"
    top = max(history.accuracy)
    return f"{history.accuracy.index(top)}: {top:.1%}"
