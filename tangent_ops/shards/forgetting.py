"""`forget`: take samples, or whole shards, out of a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from tangent_ops.delta import load_delta
from tangent_ops.errors import ArgumentError, SampleError, UnsupportedError
from tangent_ops.exact import forget_samples
from tangent_ops.shards.anchor import load_anchor
from tangent_ops.shards.data import ImageData
from tangent_ops.shards.job import job_data, save
from tangent_ops.shards.plan import Plan
from tangent_ops.shards.recipe import LOSSES
from tangent_ops.shards.rows import difference
from tangent_ops.shards.run import Report, check_executor, train
from tangent_ops.shards.settling import settle_locked


@dataclass(frozen=True)
class Forgotten:
    """What `forget` did.

    Attributes:
        shards: those that had the samples.
        samples: how many were taken out.
        dropped: those of the shards that have no sample left.
        resolved: shard -> bound on the distance of its new delta from the optimum without the
            samples, where it was solved anew from the old one (method "exact").
        report: on the training of the others.
    """

    shards: tuple[str, ...]
    samples: int
    dropped: tuple[str, ...]
    resolved: dict[str, float]
    report: Report


def find(
    plan: Plan,
    *,
    shard: str | None = None,
    sample: str | Sequence[str] | None = None,
    label: str | None = None,
) -> dict[str, list[str]]:
    """What `forget` would take out: shard -> ids.

    Raises:
        ArgumentError: not one of the three is given, or one of what is given is not there.
    """
    if [shard, sample, label].count(None) != 2:
        raise ArgumentError("give one of shard, sample and label")
    if shard is not None:
        return {shard: [row.id for row in plan.job(shard).samples]}
    return plan.find(sample=sample, label=label)


def forget(
    plan: Plan,
    *,
    shard: str | None = None,
    sample: str | Sequence[str] | None = None,
    label: str | None = None,
    data: ImageData | None = None,
    executor: str = "local",
    workers: int | None = None,
    retries: int = 3,
    address: str | None = None,
    progress: bool = True,
) -> Forgotten:
    """Forget a shard, samples with their exact copies, or all samples with a label.

    First comes a look at what training again needs: the images that stay in the shards concerned,
    by their hashes, and the anchor. Then the samples leave the plan, in one transaction; then the
    ledger loses the deltas that saw them, and those files are overwritten and removed; then the
    shards concerned, and no others, are trained anew from the anchor, or, with the method "exact",
    solved from where they were, to the optimum without the samples, with a certificate. Only shards
    that were trained are trained again. Interrupted anywhere after the samples have left the plan,
    `run_shards` and `settle` do the rest.

    A shard's delta afterwards is what it had been had the samples never been there: bit for bit
    when it was trained, within the certificate's bound when it was solved.

    Args:
        plan: the run.
        shard: its name.
        sample: its id, or several samples' ids.
        label: of the plan's labels.
        data: where the run's images are now, if they have moved: as `Plan.relocate`, but those to
            be forgotten need not be there.
        executor: as in `run_shards`.
        workers: as in `run_shards`.
        retries: as in `run_shards`.
        address: as in `run_shards`.
        progress: show bars.

    Raises:
        ArgumentError: not one of the three is given, or there is none of it, or another argument
            is not one of these: nothing has changed then. No cluster answers at the address: only
            the last step is left to be done.
        SampleError: images that stay are missing, or are others than they were; PlanError: so in
            `data`, or the anchor's file is damaged. Nothing has changed.
        UnsupportedError: Ray, or what private fits need, is not installed. Nothing has changed.
        PlanError, LedgerError, WorkerError: as in `run_shards` and `settle`.
    """
    check_executor(executor, workers, retries, address)  # before anything is gone
    with plan.locked():
        found = find(plan, shard=shard, sample=sample, label=label)
        before = {s.name: s for s in plan.shards() if s.name in found}
        trained = [name for name, s in before.items() if s.done]
        starts = {}
        if plan.recipe.method == "exact" and plan.recipe.loss == "rsl":
            starts = {name: load_delta(plan.delta_path(before[name].job or "")) for name in trained}
        _check_ready(plan, data, found, trained, progress)
        plan.manifest.remove(found)
        settle_locked(plan)
        left = {s.name for s in plan.shards() if s.job is not None}
        again = [name for name in trained if name in left]
        resolved = _solved(plan, {n: d for n, d in starts.items() if n in left}, progress)
        report = train(
            plan,
            [name for name in again if name not in resolved],
            executor,
            workers=workers,
            retries=retries,
            address=address,
            progress=progress,
        )
        settle_locked(plan)
    return Forgotten(
        shards=tuple(found),
        samples=sum(map(len, found.values())),
        dropped=tuple(name for name in found if name not in left),
        resolved=resolved,
        report=report,
    )


def _check_ready(
    plan: Plan,
    data: ImageData | None,
    found: Mapping[str, Sequence[str]],
    trained: Collection[str],
    progress: bool,
) -> None:
    """Raise what would keep the shards from being trained again, while all is still there."""
    if data is not None:
        plan.relocate(data, without=found, progress=progress)
    staying = plan.staying(found, trained)
    if not staying:
        return
    if data is None and (words := difference(plan.data, staying, progress)):
        raise SampleError(
            f"what stays could not be trained again: {words}. Nothing was forgotten yet. Have the "
            "images moved? Say where they are: --data FOLDER, data=ImageData(...) in Python. Are "
            "some gone for good? Forget them in the same call: --sample for each"
        )
    load_anchor(plan.anchor_path)
    if plan.recipe.dp_epsilon is not None:
        try:
            import tangent_ops.privacy  # noqa: F401
        except ImportError as error:
            raise UnsupportedError(f"{error}. Nothing was forgotten yet") from error


def _solved(
    plan: Plan, starts: Mapping[str, Mapping[str, torch.Tensor]], progress: bool
) -> dict[str, float]:
    """Move each delta to the optimum of the samples that stay."""
    recipe = plan.recipe
    bounds = {}
    tangent = plan.tangent() if starts else None
    for name, start in starts.items():
        assert tangent is not None
        job = plan.job(name)
        tangent.load_delta_dict(start)
        delta, certificate = forget_samples(
            tangent,
            job_data(plan, job),
            recipe.l2,
            recipe.tol,
            loss=LOSSES[recipe.loss](),
            batch_size=recipe.batch_size,
            cache=recipe.cached,
            progress=progress,
        )
        bounds[name] = certificate.distance_bound
        save(plan, job, delta, certificate=certificate.to_json())
    return bounds
