"""`influences`: what forgetting each training image of a run would change at one other image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_ops.delta import load_delta
from tangent_ops.errors import ArgumentError, LedgerError, PlanError, UnsupportedError
from tangent_ops.exact import Influence
from tangent_ops.exact.tangent_kernel import MAX_ROWS
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.shards.composing import default_how
from tangent_ops.shards.composition_files import read_composition
from tangent_ops.shards.job import device, job_data, job_problem
from tangent_ops.shards.jobs import Job
from tangent_ops.shards.manifest import Sample
from tangent_ops.shards.plan import Plan
from tangent_ops.shards.recipe import ShardRecipe
from tangent_ops.shards.results import checked_result
from tangent_ops.shards.settling import settled_ledger

HOWS = ("mean", "lossless", "statistics")


@dataclass(frozen=True)
class Influences:
    """The effects of a run's training images on one image.

    Attributes:
        samples: the training images that the run has, without forgotten ones.
        shards: of each sample, the shards that have it.
        changes: (N,), float64: of the image's loss when a sample is forgotten. Positive: the loss
            is higher without it, so it helped.
        logits: (C,), float64: the composition's at the image.
    """

    samples: tuple[Sample, ...]
    shards: tuple[tuple[str, ...], ...]
    changes: Tensor
    logits: Tensor


def influences(
    plan: Plan, image: Tensor, target: int | None = None, how: str | None = None,
    *, progress: bool = True,
) -> Influences:  # fmt: skip
    """Compute, exactly and without training, what forgetting each image would change.

    "Without an image" means that the shards which have it are at the optimum of their other images
    with the same l2, and are composed again: with the method "exact" by their mean, with the
    weights that the ledger would then have, or on the union ("lossless"); with the method
    "statistics" as the optimum on all other images, with the same l2.

    Args:
        plan: a run that is settled, and composed so.
        image: (3, height, width), prepared for the anchor.
        target: the image's class index; None for the class that the composition predicts.
        how: "mean", "lossless" or "statistics"; None for the run's default.
        progress: show bars.

    Raises:
        UnsupportedError: the run's deltas are not optima of a quadratic loss.
        ArgumentError: how is not for this run; too many images times classes.
        LedgerError: the run is not settled, or not composed so.
        SampleError: a training image cannot be read, or has changed.
    """
    how = how or default_how(plan)
    check(plan, how)
    ledger = settled_ledger(plan)
    jobs = [plan.job(shard.name) for shard in plan.shards() if shard.done]
    if not jobs:
        raise LedgerError(f"{plan.path} has no trained shard: run the shards first")
    tangent = plan.tangent().to(device())
    inputs = image[None].to(device())
    if how == "mean":
        by_size = plan.weights == "samples"
        assert len(ledger) == len(jobs)
        return _of_mean(plan, tangent, jobs, inputs, target, by_size, progress)
    return _of_union(plan, tangent, jobs, inputs, target, how, progress)


def check(plan: Plan, how: str) -> None:
    """Raise the errors of `influences` that need no image."""
    recipe = plan.recipe
    if recipe.method == "gradient":
        raise UnsupportedError(
            f"{plan.path} was fitted by steps (method 'gradient'), and influence is exact only at "
            "an optimum: begin a run with --method exact or --method statistics"
        )
    if recipe.loss != "rsl":
        raise UnsupportedError(
            f"{plan.path} was fitted with the loss {recipe.loss!r}, and influence is exact only "
            "for a quadratic one: begin a run with --loss rsl"
        )
    if how not in HOWS or (how == "statistics") != (recipe.method == "statistics"):
        raise ArgumentError(
            f"how={how} is not for this run: give {default_how(plan)}"
            f"{'' if recipe.method == 'statistics' else ' or lossless'}"
        )
    classes = plan.anchor_info.options["num_classes"]
    sizes = {shard.name: shard.samples for shard in plan.shards() if shard.done}
    if how != "mean":
        sizes = {"all shards together": sum(sizes.values())}
    for name, count in sizes.items():
        if count * classes > MAX_ROWS:
            raise ArgumentError(
                f"{name}: {count:,} images of {classes} classes are {count * classes:,} rows of "
                f"the tangent kernel, and {MAX_ROWS:,} are supported. Smaller shards with --method "
                "exact, composed by their mean, need less; in Python first_order_scores takes any "
                "number"
            )


def _of_mean(
    plan: Plan, tangent: LinearizedModel, jobs: Sequence[Job], inputs: Tensor,
    target: int | None, by_size: bool, progress: bool,
) -> Influences:  # fmt: skip
    with torch.no_grad():
        tangent.zero_()
        anchor = _logits(tangent, inputs)
        own = {}
        for job in jobs:
            tangent.load_delta_dict(load_delta(checked_result(plan, job.shard, job.hash)))
            own[job.shard] = _logits(tangent, inputs) - anchor
    sizes = {job.shard: len(job.samples) for job in jobs}
    samples: dict[str, Sample] = {}
    effects: dict[str, dict[str, Tensor]] = {}  # id -> shard -> change of its logits
    for job in jobs:
        changes = _changes(plan, tangent, job, plan.recipe, inputs, progress)
        for sample, change in zip(job.samples, changes, strict=True):
            samples[sample.id] = sample
            effects.setdefault(sample.id, {})[job.shard] = change
    logits = anchor + _mean(own, sizes, by_size)
    found = []
    for moved in effects.values():
        left = {shard: size - (shard in moved) for shard, size in sizes.items()}
        terms = {shard: term + moved.get(shard, 0.0) for shard, term in own.items() if left[shard]}
        found.append(anchor + _mean(terms, left, by_size))
    changes = _loss_changes(logits, torch.stack(found), target)
    shards = tuple(tuple(moved) for moved in effects.values())
    return Influences(tuple(samples.values()), shards, changes, logits)


def _mean(terms: Mapping[str, Tensor], sizes: Mapping[str, int], by_size: bool) -> Tensor | float:
    """The weighted mean of shards' logits; 0 of no shards, which leaves the anchor."""
    weights = {shard: float(sizes[shard]) if by_size else 1.0 for shard in terms}
    total = sum(weights.values())
    return sum((weights[s] / total * term for s, term in terms.items()), start=0.0)


def _of_union(
    plan: Plan, tangent: LinearizedModel, jobs: Sequence[Job], inputs: Tensor,
    target: int | None, how: str, progress: bool,
) -> Influences:  # fmt: skip
    delta = read_composition(plan, how)
    assert delta.meta is not None
    recipe = plan.recipe
    if how == "statistics":
        l2 = float(delta.meta.extra["l2"])
        if l2 == 0:
            raise UnsupportedError(
                f"{plan.path} is solved with l2 = 0: compose it again with --l2 above 0, or auto"
            )
        recipe = ShardRecipe(l2=l2, cache=recipe.cache, batch_size=recipe.batch_size)
    owners: dict[str, list[str]] = {}
    for job in jobs:
        for sample in job.samples:
            owners.setdefault(sample.id, []).append(job.shard)
    if any(len(shards) > 1 for shards in owners.values()):
        raise UnsupportedError(
            f"{plan.path} has images in several shards, which the union counts several times: "
            "influence is computed for the mean of such a run (--how mean)"
        )
    union = Job(how, "", tuple(sample for job in jobs for sample in job.samples))
    changes = _changes(plan, tangent, union, recipe, inputs, progress)
    with torch.no_grad():
        tangent.load_delta_dict(delta)
        logits = _logits(tangent, inputs)
    found = _loss_changes(logits, logits + changes, target)
    shards = tuple(tuple(owners[sample.id]) for sample in union.samples)
    return Influences(union.samples, shards, found, logits)


def _changes(
    plan: Plan, tangent: LinearizedModel, job: Job, recipe: ShardRecipe, inputs: Tensor,
    progress: bool,
) -> Tensor:  # fmt: skip
    """(N, C): the change of the fit's logits without each of the job's samples."""
    if len(job.samples) == 1:  # nothing is left of this shard: the caller drops it
        return torch.zeros(1, plan.anchor_info.options["num_classes"], dtype=torch.float64)
    problem = job_problem(tangent, job_data(plan, job), recipe, progress)
    return Influence(problem).change(inputs)[:, 0].cpu()


def _logits(tangent: LinearizedModel, inputs: Tensor) -> Tensor:
    return tangent.eval()(inputs)[0].double().cpu()


def _loss_changes(before: Tensor, after: Tensor, target: int | None) -> Tensor:
    """(N,): of the rescaled square loss; before (C,), after (N, C)."""
    loss = RescaledSquareLoss(reduction="none")
    wanted = int(before.argmax()) if target is None else target
    targets = torch.full((len(after),), wanted)
    if not 0 <= wanted < len(before):
        raise PlanError(f"the run has no class {wanted}")
    return loss(after, targets) - loss(before[None], targets[:1])
