"""`forget`: take samples, or whole shards, out of a run."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from tangent_ops.composition.ridge import SolvedDelta
from tangent_ops.delta import load_delta
from tangent_ops.errors import ArgumentError, SampleError, UnsupportedError
from tangent_ops.exact import certify, fit_exact
from tangent_ops.shards.anchor import load_anchor
from tangent_ops.shards.composing import compose_locked
from tangent_ops.shards.composition_files import path_of
from tangent_ops.shards.data import ImageData
from tangent_ops.shards.history import ShardHistory, write_history
from tangent_ops.shards.job import job_data, job_problem, save
from tangent_ops.shards.plan import Plan
from tangent_ops.shards.results import write_statistics
from tangent_ops.shards.rows import difference
from tangent_ops.shards.run import Report, check_executor, train
from tangent_ops.shards.settling import settle_locked
from tangent_ops.shards.subtracting import reduced
from tangent_ops.shards.validating import Validator


@dataclass(frozen=True)
class Forgotten:
    """What `forget` did.

    Attributes:
        shards: those that had the samples.
        samples: number of samples taken out.
        dropped: those of the shards that have no sample left.
        resolved: shard -> bound on the distance of its new delta from the optimum without the
            samples, where the fit started from the old delta (method "exact").
        subtracted: shards whose statistics the samples were subtracted from (method "statistics").
        solution: of the statistics without the samples, if they had been solved; else None.
        report: on the training of the other shards.
    """

    shards: tuple[str, ...]
    samples: int
    dropped: tuple[str, ...]
    resolved: dict[str, float]
    subtracted: tuple[str, ...]
    solution: SolvedDelta | None
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
        ArgumentError: not exactly one of the three is given, or it is not in the plan.
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

    With the method "statistics", the samples' own statistics are computed, which reads no other
    image, and subtracted from their shards'; a whole shard needs no image. If one of them cannot be
    read any more, its shard's statistics are computed again from the images that stay. Statistics
    that were solved are solved again. All bits are those of a run that never had the samples.

    With other methods the steps are: check what training again needs, which is the anchor and, by
    their hashes, the images that stay in the affected shards; remove the samples from the plan, in
    one transaction; remove the deltas that were trained on them from the ledger, and overwrite and
    remove the files; train the affected shards, and no others, again from the anchor or, with the
    method "exact", move their old deltas to the optimum without the samples, with a certificate.
    Only shards that were trained are trained again. If this is interrupted after the samples left
    the plan, `run_shards` and `settle` do the rest.

    A shard's new delta is the one that it would have had without the samples: bit for bit if it
    was trained again, within the certificate's bound if its old delta was moved.

    Args:
        plan: the run.
        shard: its name.
        sample: its id, or several samples' ids.
        label: of the plan's labels.
        data: where the run's images are now, if they have moved, as for `Plan.relocate`; images
            to be forgotten need not be there.
        executor: as in `run_shards`.
        workers: as in `run_shards`.
        retries: as in `run_shards`.
        address: as in `run_shards`.
        progress: show bars.

    Raises:
        ArgumentError: not exactly one of the three is given, it is not in the plan, or another
            argument is invalid, and nothing was changed; or no cluster answers at the address, and
            only the last step remains to be done.
        SampleError: images that stay are missing or differ. Nothing was changed.
        PlanError: so in `data`, or the anchor's file is damaged. Nothing was changed.
        UnsupportedError: Ray, or what private fits need, is not installed. Nothing was changed.
        PlanError, LedgerError, WorkerError: as in `run_shards` and `settle`.
    """
    check_executor(executor, workers, retries, address)  # before anything is removed
    with plan.locked():
        found = find(plan, shard=shard, sample=sample, label=label)
        before = {s.name: s for s in plan.shards() if s.name in found}
        trained = [name for name, s in before.items() if s.done]
        starts = {}
        if plan.recipe.method == "exact" and plan.recipe.loss == "rsl":
            starts = {
                name: load_delta(plan.result_path(before[name].job or "")) for name in trained
            }
        if data is not None:
            plan.relocate(data, without=found, progress=progress)
        less = {}
        if plan.recipe.method == "statistics":
            less = reduced(plan, found, trained, progress)
        again = [name for name in trained if name not in less]
        _check_ready(plan, found, again, checked=data is not None, progress=progress)
        solved = path_of(plan, "statistics").exists()
        plan.manifest.remove(found)
        settle_locked(plan)
        left = {s.name for s in plan.shards() if s.job is not None}
        for name, statistics in less.items():
            write_statistics(plan, plan.job(name), statistics)
        resolved = _solved(plan, {n: d for n, d in starts.items() if n in left}, progress)
        report = train(
            plan,
            [name for name in again if name in left and name not in resolved],
            executor,
            workers=workers,
            retries=retries,
            address=address,
            progress=progress,
        )
        settle_locked(plan)
        solution = None
        if solved and any(shard.done for shard in plan.shards()):
            solution = compose_locked(plan, "statistics")
            assert isinstance(solution, SolvedDelta)
    return Forgotten(
        shards=tuple(found),
        samples=sum(map(len, found.values())),
        dropped=tuple(name for name in found if name not in left),
        resolved=resolved,
        subtracted=tuple(less),
        solution=solution,
        report=report,
    )


def _check_ready(
    plan: Plan,
    found: Mapping[str, Sequence[str]],
    again: Collection[str],
    *,
    checked: bool,
    progress: bool,
) -> None:
    """Before anything is removed, raise what would keep the shards from being trained again.

    Args:
        plan: the run.
        found: what is to be removed.
        again: the shards to be trained again.
        checked: whether the images that stay were compared already.
        progress: show bars.
    """
    staying = plan.staying(found, again)
    if not staying:
        return
    if not checked and (words := difference(plan.data, staying, progress)):
        raise SampleError(
            f"the shards could not be trained again: {words}. Nothing was forgotten yet. If the "
            "images have moved, give their place: --data FOLDER, data=ImageData(...) in Python. If "
            "some are lost, forget them in the same call: --sample for each"
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
    if not starts:
        return {}
    recipe = plan.recipe
    bounds = {}
    tangent = plan.tangent()
    validator = Validator(plan, tangent, repeated=len(starts) > 1)
    for name, start in starts.items():
        began = time.perf_counter()
        job = plan.job(name)
        tangent.load_delta_dict(start)
        problem = job_problem(tangent, job_data(plan, job), recipe, progress)
        fit_exact(problem, recipe.tol)
        certificate = certify(problem)
        bounds[name] = certificate.distance_bound
        validator.measure()
        history = ShardHistory(
            accuracy=tuple(validator.accuracy),
            seconds=time.perf_counter() - began,
            bound=certificate.distance_bound,
        )
        write_history(plan, job.hash, history)
        save(plan, job, tangent.delta_dict(), certificate=certificate.to_json())
        validator.next_shard()
    return bounds
