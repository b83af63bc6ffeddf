"""`influences`: what forgetting each training image of a run would change at other images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from tqdm import tqdm

from tangent_ops.composition.feature_rows import FeatureRows
from tangent_ops.composition.ledger import StatisticsLedger
from tangent_ops.composition.ridge import Ridge
from tangent_ops.delta import Delta, load_delta
from tangent_ops.errors import ArgumentError, LedgerError, UnsupportedError
from tangent_ops.exact import Influence
from tangent_ops.exact.collect import feature_rows
from tangent_ops.exact.tangent_kernel import MAX_ROWS
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.shards.composing import composition, default_how
from tangent_ops.shards.job import device, job_data, job_problem
from tangent_ops.shards.jobs import Job
from tangent_ops.shards.manifest import Sample
from tangent_ops.shards.plan import Plan
from tangent_ops.shards.results import checked_result
from tangent_ops.shards.settling import settled_ledger

HOWS = ("mean", "lossless", "statistics")
HELD = 1 << 27  # numbers of images' Jacobians in a core that are in memory at a time; 1 GiB


@dataclass(frozen=True)
class Influences:
    """The effects of a run's N training images on M other images.

    Attributes:
        samples: the training images that the run has, without forgotten ones.
        shards: of each sample, the shards that have it.
        changes: (N, M), float64: of an image's loss when a sample is forgotten. Positive: the loss
            is higher without it, so it helped.
        logits: (M, C), float64: the composition's.
        losses: (M,), float64: the composition's.
    """

    samples: tuple[Sample, ...]
    shards: tuple[tuple[str, ...], ...]
    changes: Tensor
    logits: Tensor
    losses: Tensor


def influences(
    plan: Plan, inputs: Tensor, targets: Tensor | None = None, how: str | None = None,
    *, progress: bool = True,
) -> Influences:  # fmt: skip
    """Compute, exactly and without training, what forgetting each image would change.

    "Without an image" means that the shards which have it are at the optimum of their other images
    with the same l2, and are composed again: with the method "exact" by their mean, with the
    weights that the ledger would then have, or on the union ("lossless"); with the method
    "statistics" as the optimum on all other images, with the same l2. A shard with no other image
    is dropped. Copies of an image under other names stay, which `forget` would take out as well.

    Args:
        plan: a run that is settled, and composed so.
        inputs: (M, 3, height, width), prepared for the anchor.
        targets: (M,), the images' class indices; None for those that the composition predicts.
        how: "mean", "lossless" or "statistics"; None for the run's default.
        progress: show bars.

    Raises:
        UnsupportedError: the run's deltas are not optima of a quadratic loss; the union of a run
            whose images are in several shards; a run with a single image.
        ArgumentError: how is not for this run; too many images times classes in an exact fit; a
            target is no class.
        LedgerError: the run is not settled, or not composed so.
        StatisticsError: the statistics determine no optimum without an image.
        SampleError: a training image cannot be read, or has changed.
    """
    how = how or default_how(plan)
    check(plan, how)
    ledger = settled_ledger(plan)
    jobs = [plan.job(shard.name) for shard in plan.shards() if shard.done]
    if not jobs:
        raise LedgerError(f"{plan.path} has no trained shard: run the shards first")
    owners = _owners(plan, jobs, how)
    classes = plan.anchor_info.options["num_classes"]
    if targets is not None and not bool(((targets >= 0) & (targets < classes)).all()):
        raise ArgumentError(f"targets are {targets.tolist()}: its classes are 0 to {classes - 1}")
    main = composition(plan, how)
    tangent = plan.tangent().to(device())
    inputs = inputs.to(device())
    logits = _logits(tangent, inputs, main)
    samples = {sample.id: sample for job in jobs for sample in job.samples}
    union = Job(how, "", tuple(samples.values()))
    if how == "mean":
        after = _of_mean(plan, tangent, jobs, owners, inputs, progress)
    elif isinstance(ledger, StatisticsLedger):
        assert main.meta is not None
        ridge, l2 = Ridge(ledger.statistics()), float(main.meta.extra["l2"])
        after = logits + _of_statistics(plan, tangent, union, ridge, l2, inputs, progress)
    else:
        after = logits + _of_fit(plan, tangent, union, inputs, progress)
    wanted = logits.argmax(dim=1) if targets is None else targets.cpu()
    loss = RescaledSquareLoss(reduction="none")
    losses = loss(logits, wanted)
    changes = torch.stack([loss(without, wanted) for without in after]) - losses
    return Influences(union.samples, tuple(map(tuple, owners.values())), changes, logits, losses)


def check(plan: Plan, how: str) -> None:
    """Raise the errors of `influences` that need no image."""
    recipe = plan.recipe
    if recipe.method == "gradient":
        raise UnsupportedError(
            f"{plan.path} was trained by steps (method 'gradient'), and influence is exact only at "
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
    if how == "statistics":
        return
    classes = plan.anchor_info.options["num_classes"]
    sizes = {shard.name: shard.samples for shard in plan.shards() if shard.done}
    if how == "lossless":
        sizes = {"all shards together": sum(sizes.values())}
    for name, count in sizes.items():
        if count * classes > MAX_ROWS:
            raise ArgumentError(
                f"{name}: {count:,} images of {classes} classes are {count * classes:,} rows of "
                f"the tangent kernel, and {MAX_ROWS:,} are supported. Smaller shards, composed by "
                "their mean, need less, and --method statistics has no such limit"
            )


def _owners(plan: Plan, jobs: Sequence[Job], how: str) -> dict[str, list[str]]:
    """Id -> the shards that have the image."""
    owners: dict[str, list[str]] = {}
    for job in jobs:
        for sample in job.samples:
            owners.setdefault(sample.id, []).append(job.shard)
    if how != "mean" and any(len(shards) > 1 for shards in owners.values()):
        raise UnsupportedError(
            f"{plan.path} has images in several shards, which how={how} counts several times, and "
            "influence is computed for single ones: begin a run of shards that share no image"
            f"{', or give --how mean' if how == 'lossless' else ''}"
        )
    if len(owners) == 1:
        raise UnsupportedError(f"{plan.path} has a single image: nothing is left without it")
    return owners


def _of_mean(
    plan: Plan, tangent: LinearizedModel, jobs: Sequence[Job], owners: Mapping[str, Sequence[str]],
    inputs: Tensor, progress: bool,
) -> Tensor:  # fmt: skip
    """(N, M, C): the mean's logits without each image."""
    anchor = _logits(tangent, inputs, None)
    own: dict[str, Tensor] = {}  # shard -> what its delta adds to the logits
    moves: dict[str, dict[str, Tensor]] = {}  # shard -> id -> the change of that
    bar = tqdm(jobs, "influence", unit="shard", delay=2, leave=False, disable=not progress)
    for job in bar:
        delta = load_delta(checked_result(plan, job.shard, job.hash))
        own[job.shard] = _logits(tangent, inputs, delta) - anchor
        ids = [sample.id for sample in job.samples]
        if len(ids) > 1:  # else the shard goes with its only image
            changes = _of_fit(plan, tangent, job, inputs, progress=False)
            moves[job.shard] = dict(zip(ids, changes, strict=True))
    sizes = {job.shard: len(job.samples) for job in jobs}
    found = []
    for sample, shards in owners.items():
        left = {shard: size - (shard in shards) for shard, size in sizes.items()}
        weights = {s: float(n if plan.weights == "samples" else 1) for s, n in left.items() if n}
        added = torch.zeros_like(anchor)
        for shard, weight in weights.items():
            term = own[shard] + (moves[shard][sample] if shard in shards else 0.0)
            added += weight / sum(weights.values()) * term
        found.append(anchor + added)
    return torch.stack(found)


def _of_fit(
    plan: Plan, tangent: LinearizedModel, job: Job, inputs: Tensor, progress: bool
) -> Tensor:
    """(N, M, C): the change of a fit's logits without each of the job's images."""
    problem = job_problem(tangent, job_data(plan, job), plan.recipe, progress)
    return Influence(problem).change(inputs).cpu()


def _of_statistics(
    plan: Plan, tangent: LinearizedModel, union: Job, ridge: Ridge, l2: float, inputs: Tensor,
    progress: bool,
) -> Tensor:  # fmt: skip
    """(N, M, C): the change of the optimum's logits, some images' Jacobians at a time."""
    unread = torch.zeros(len(inputs), dtype=torch.int64)
    others, _ = feature_rows(tangent, TensorDataset(inputs, unread), progress=False)
    step = max(1, HELD // max(1, others.core[0].numel()))
    found = []
    for first in range(0, len(union.samples), step):
        some = job_data(plan, replace(union, samples=union.samples[first : first + step]))
        rows, residuals = feature_rows(tangent, some, progress=progress)
        found.append(ridge.changes(_on_cpu(rows), residuals.cpu(), _on_cpu(others), l2))
    return torch.cat(found)


def _on_cpu(rows: FeatureRows) -> FeatureRows:
    return FeatureRows(rows.outputs.cpu(), rows.core.cpu(), rows.head.cpu())


@torch.no_grad()
def _logits(tangent: LinearizedModel, inputs: Tensor, delta: Delta | None) -> Tensor:
    """(M, C), float64: with a delta; None for the anchor's."""
    if delta is None:
        tangent.zero_()
    else:
        tangent.load_delta_dict(delta)
    return tangent.eval()(inputs).double().cpu()
