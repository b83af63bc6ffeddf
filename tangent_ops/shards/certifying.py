"""`certify_run`: recomputes what a run's deltas, compositions and sums claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tangent_ops.composition.ledger import StatisticsLedger
from tangent_ops.composition.ridge import SolvedDelta
from tangent_ops.composition.statistics_file import load_statistics
from tangent_ops.delta import Delta, load_delta
from tangent_ops.errors import (
    LedgerError,
    PlanError,
    TangentOpsError,
    UnsupportedError,
    in_words,
)
from tangent_ops.exact import Certificate, certify
from tangent_ops.exact.lossless import TOLERANCE
from tangent_ops.shards.composition_files import path_of, read_composition
from tangent_ops.shards.job import device, job_data, job_problem
from tangent_ops.shards.jobs import Job
from tangent_ops.shards.plan import Plan
from tangent_ops.shards.results import checked_result
from tangent_ops.shards.settling import settled_ledger

CERTIFICATE = "certificate"  # the key in a delta's metadata, where samples were forgotten
# A fit measures its gradient in float32, and certify in float64.
ROUNDING = 0.05  # of a bound
SAME = 1e-6  # relative distance of a delta in float32 that was solved again in float64


@dataclass(frozen=True)
class Checked:
    """One claim, and what it is recomputed to be.

    Attributes:
        what: "fit", "removal", "composition" or "sum".
        name: of the shard or composition.
        samples: N.
        claimed: the bound that is claimed on the distance from the optimum; None of a sum.
        bound: the bound, recomputed; None if it could not be, and of a sum.
        size: ‖Δ‖; None if unknown.
        holds: whether the claim holds.
        why: why it does not, in words.
    """

    what: str
    name: str
    samples: int
    claimed: float | None
    bound: float | None
    size: float | None
    holds: bool
    why: str = ""


def certify_run(plan: Plan, *, progress: bool = True) -> list[Checked]:
    """Recompute every claim of a run: one pass over each shard's images, in float64.

    With the method "exact" a shard's claim is the recipe's tol, ‖Δ - Δ*‖ <= tol ‖Δ*‖; after
    samples were forgotten, the certificate in its delta. The lossless composition is compared with
    the fit on all shards' images. With the method "statistics" the ledger's sum is compared, bit
    for bit, with that of the shards' files, and the composition with a new solution; images are
    not read.

    Args:
        plan: the run.
        progress: show bars.

    Raises:
        UnsupportedError: the run's shards were fitted by steps, so nothing is claimed.
        PlanError: no shard is trained, or the plan is damaged.
    """
    method = plan.recipe.method
    if plan.recipe.dp_epsilon is not None:
        raise UnsupportedError(
            f"{plan.path} was fitted privately: tangent-ops privacy {plan.ledger_path} checks what "
            "that promises"
        )
    if method == "gradient":
        raise UnsupportedError(
            f"{plan.path} was fitted by steps (method 'gradient'), so there is no certificate: "
            "begin a run with --method exact or --method statistics"
        )
    jobs = [plan.job(shard.name) for shard in plan.shards() if shard.done]
    if not jobs:
        raise PlanError(f"{plan.path} has no trained shard: run the shards first")
    if method == "statistics":
        return _statistics(plan, jobs, progress)
    fits = [_fit(plan, job, progress) for job in jobs]
    found = [*fits, *_ledger(plan, jobs, progress)]
    if path_of(plan, "lossless").exists():
        found.append(_lossless(plan, jobs, fits, progress))
    return found


def _fit(plan: Plan, job: Job, progress: bool) -> Checked:
    what, claimed, size = "fit", None, None
    try:
        delta = load_delta(checked_result(plan, job.shard, job.hash))
        assert delta.meta is not None
        size = _norm(delta)
        problem = job_problem(
            plan.tangent().to(device()), job_data(plan, job), plan.recipe, progress
        )
        written = delta.meta.extra.get(CERTIFICATE)
        if written is not None:
            what = "removal"
            certificate = Certificate.from_json(written)
            claimed = certificate.distance_bound
            bound = certificate.verify(problem, delta).distance_bound
            return Checked(what, job.shard, len(job.samples), claimed, bound, size, True)
        bound = certify(problem, delta).distance_bound
    except (TangentOpsError, OSError) as error:
        why = in_words(error)
        return Checked(what, job.shard, len(job.samples), claimed, None, size, False, why)
    # ‖Δ‖ - bound is at most ‖Δ*‖.
    claimed = plan.recipe.tol * max(size - bound, 0.0)
    return _compared(what, job.shard, len(job.samples), claimed, bound, size)


def _lossless(plan: Plan, jobs: Sequence[Job], fits: Sequence[Checked], progress: bool) -> Checked:
    """Compare with the fit on all images; the claim follows from those of the shards.

    With H_s the Hessian of shard s in sums over its N_s samples, F the mean over all N,

        N ∇F(Δ) = Σ H_s (Δ - Δ_s) + Σ N_s ∇F_s(Δ_s)

    The first sum is at most the composition's tolerance times ‖Σ H_s Δ_s‖, and that is at most
    N ‖∇F(0)‖ and the norm of the second sum; the second is bounded by the shards' certificates.
    """
    name = "lossless"
    together = Job(name, "", tuple(sample for job in jobs for sample in job.samples))
    count, size = len(together.samples), None
    try:
        delta = read_composition(plan, name)
        size = _norm(delta)
        data = job_data(plan, together)
        problem = job_problem(plan.tangent().to(device()), data, plan.recipe, progress)
        bound = certify(problem, delta).distance_bound
        start = certify(problem, {k: torch.zeros_like(v) for k, v in delta.items()}).distance_bound
    except (TangentOpsError, OSError) as error:
        return Checked("composition", name, count, None, None, size, False, in_words(error))
    if any(fit.bound is None for fit in fits):
        why = "the bound of a shard is unknown"
        return Checked("composition", name, count, None, bound, size, False, why)
    shards = sum(fit.samples * (fit.bound or 0.0) for fit in fits) / count
    claimed = TOLERANCE * (start + shards) + shards
    return _compared("composition", name, count, claimed, bound, size)


def _statistics(plan: Plan, jobs: Sequence[Job], progress: bool) -> list[Checked]:
    count = sum(len(job.samples) for job in jobs)
    found, total = [], None
    for job in jobs:
        why = ""
        try:
            own = load_statistics(checked_result(plan, job.shard, job.hash)).without_list()
            total = own if total is None else total + own
            if len(own) != len(job.samples):
                why = f"its statistics are of {len(own)} images, the plan has {len(job.samples)}"
        except (TangentOpsError, OSError) as error:
            why = in_words(error)
        found.append(_sum(job.shard, len(job.samples), why))
    broken = any(not one.holds for one in found)
    found += _ledger(plan, jobs, progress)
    if broken or not all(one.holds for one in found):
        return found
    ledger = settled_ledger(plan)
    assert isinstance(ledger, StatisticsLedger)
    assert total is not None
    if differing := ledger.statistics().differences(total):
        why = f"the sum differs from that of the files: {', '.join(differing)}"
        found.append(_sum("sum of the files", count, why))
        return found
    found.append(_sum("sum of the files", count, ""))
    if path_of(plan, "statistics").exists():
        found.append(_solved(plan, ledger, count))
    return found


def _solved(plan: Plan, ledger: StatisticsLedger, count: int) -> Checked:
    """Compare the composition with a new solution of the sum."""
    try:
        delta = read_composition(plan, "statistics")
        assert delta.meta is not None
        again: SolvedDelta = ledger.statistics().solve(float(delta.meta.extra["l2"]))
        distance = _norm({k: value.double() - again[k].double() for k, value in delta.items()})
    except (TangentOpsError, OSError, KeyError, ValueError) as error:
        return Checked("composition", "statistics", count, None, None, None, False, in_words(error))
    size = _norm(delta)
    return _compared("composition", "statistics", count, SAME * size, distance, size)


def _ledger(plan: Plan, jobs: Sequence[Job], progress: bool) -> list[Checked]:
    """The ledger's sum, if there is a ledger: it is added up again from the shards."""
    if not plan.ledger_path.is_dir():
        return []
    why = ""
    try:
        settled_ledger(plan).verify(progress=progress)
    except LedgerError as error:
        why = str(error)
    return [_sum("ledger", sum(len(job.samples) for job in jobs), why)]


def _sum(name: str, samples: int, why: str) -> Checked:
    return Checked("sum", name, samples, None, None, None, not why, why)


def _compared(
    what: str, name: str, samples: int, claimed: float, bound: float, size: float
) -> Checked:
    holds = bound <= claimed * (1 + ROUNDING)
    why = "" if holds else "the bound is larger than what is claimed"
    return Checked(what, name, samples, claimed, bound, size, holds, why)


def _norm(delta: Delta | dict[str, torch.Tensor]) -> float:
    return sum(float(value.double().square().sum()) for value in delta.values()) ** 0.5
