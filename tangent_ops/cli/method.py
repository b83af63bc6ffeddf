"""How ``finetune`` fits shards if ``--method`` is not given."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from tangent_ops.errors import ArgumentError
from tangent_ops.shards.recipe import ShardRecipe

if TYPE_CHECKING:
    from tangent_ops.shards import Plan

EXACT_L2 = 0.1  # docs/cluster.md says what it gives
# Options of the steps of method "gradient", which the others do not have.
STEPS = (
    *("epochs", "lr", "optimizer", "schedule", "accumulate", "augment", "amp"),
    *("tensorboard", "wandb"),
)


def decided(recipe: ShardRecipe, given: Collection[str], there: Plan | None) -> ShardRecipe:
    """The recipe with a method: that of the run, or exact where the other options allow it.

    Args:
        recipe: of the options; its method counts if it was given.
        given: the names of the options that were given.
        there: the run, if it was begun already.

    Raises:
        ArgumentError: options of another method.
    """
    if "method" not in given:
        recipe = _chosen(recipe, given, there)
    if "core" in given and recipe.method != "statistics":
        raise ArgumentError("--core is for --method statistics: give that, too")
    steps = [name for name in STEPS if name in given]
    if steps and recipe.method == "statistics":
        raise ArgumentError(f"--{steps[0]} is for --method gradient: statistics take one pass")
    return recipe


def _chosen(recipe: ShardRecipe, given: Collection[str], there: Plan | None) -> ShardRecipe:
    if there is not None:
        method, l2 = there.recipe.method, there.recipe.l2
        return replace(recipe, method=method, l2=recipe.l2 if "l2" in given else l2)
    private = recipe.dp_epsilon is not None
    if private or recipe.loss != "rsl" or any(name in given for name in STEPS):
        return recipe
    if "l2" not in given:
        return replace(recipe, method="exact", l2=EXACT_L2)
    return replace(recipe, method="exact") if recipe.l2 > 0 else recipe
