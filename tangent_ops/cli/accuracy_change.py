"""Tells what a command changed in the accuracy on a run's validation images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tangent_ops.cli.messages import say

if TYPE_CHECKING:
    from tangent_ops.delta import Delta
    from tangent_ops.shards import Plan


def measured_change(
    plan: Plan, before: Delta | None, after: Delta, progress: bool
) -> dict[str, Any] | None:
    """Accuracies before and after, for JSON and `say_change`; None without validation images.

    Args:
        plan: the run.
        before: a composition; None for the anchor.
        after: the composition now.
        progress: show a bar.
    """
    from torch import equal

    from tangent_ops.errors import TangentOpsError, in_words
    from tangent_ops.shards.job import device
    from tangent_ops.shards.scoring import predictions

    if plan.validation is None:
        return None
    same = before is not None and all(equal(before[name], after[name]) for name in after)
    deltas = {"after": after} if same else {"before": before, "after": after}
    info = plan.anchor_info
    try:
        samples = plan.validation.open(info.input).with_classes(info.classes)
        tangent = plan.tangent().to(device())
        found = predictions(tangent, deltas, samples, progress=progress)
    except (TangentOpsError, OSError) as error:  # the command has done its work already
        return {"not_measured": in_words(error)}
    then = "after" if same else "before"
    change = found.gain("after", over=then)
    return {
        "images": len(samples),
        "anchor": before is None,
        "before": found.accuracy(then).value,
        "after": found.accuracy("after").value,
        "change": change.value,
        "standard_error": change.error,
    }


def say_change(found: dict[str, Any] | None) -> None:
    """Print what `measured_change` found."""
    if found is None:
        return
    if why := found.get("not_measured"):
        say(f"the accuracy was not measured: {why}")
        return
    begin = f"accuracy on {found['images']} validation images: "
    if found["change"] == found["standard_error"] == 0 and not found["anchor"]:
        say(f"{begin}{found['after']:.1%}, as before")
        return
    of = "the anchor's " if found["anchor"] else ""
    say(
        f"{begin}{of}{found['before']:.1%} -> {found['after']:.1%}, "
        f"{100 * found['change']:+.1f} points (paired standard error "
        f"{100 * found['standard_error']:.1f})"
    )
