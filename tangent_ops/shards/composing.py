"""`compose_run`: compositions of a run, of its deltas or of its statistics."""

from __future__ import annotations

from tangent_ops.composition.head_only import probe
from tangent_ops.composition.ledger import Ledger, StatisticsLedger
from tangent_ops.data import check_choice, check_not_negative
from tangent_ops.delta import Delta
from tangent_ops.errors import ArgumentError, LedgerError
from tangent_ops.exact import compose_lossless, head_statistics
from tangent_ops.exact.compose import compose
from tangent_ops.shards.composition_files import (
    KEPT,
    path_of,
    read_composition,
    write_composition,
)
from tangent_ops.shards.data import ImageData
from tangent_ops.shards.job import device, job_data, job_problem
from tangent_ops.shards.plan import AUTOMATIC, Plan
from tangent_ops.shards.settling import settled_ledger

HOWS = ("mean", *KEPT)
PROBE = "head only"
ANCHOR = "anchor"


def default_how(plan: Plan) -> str:
    """How a run is composed if nothing else is said: "statistics", or "mean" of deltas."""
    return "statistics" if plan.recipe.method == "statistics" else "mean"


def compose_run(
    plan: Plan,
    how: str,
    *,
    l2: float | str | None = None,
    data: ImageData | None = None,
    progress: bool = True,
) -> Delta:
    """Compose the trained shards of a run that is settled.

    The mean is the ledger's. All other compositions are written to the folder ``compositions``, and
    erased when the run's shards change.

    Args:
        plan: the run.
        how: "mean"; "least-squares", with weights that fit validation images; "head", the mean with
            the head that is best on top of it, which reads the shards' images; "lossless", the
            optimum on the union of shards that were fitted exactly, which reads them, too; or
            "statistics", the same from the sum of the shards' statistics, without images.
        l2: of statistics: the penalty's weight; "auto" to let generalised cross-validation choose
            it from the statistics; None as in the last call, at first "auto". The plan records it.
        data: of least squares: the validation images.
        progress: show bars.

    Returns:
        The composition; a `SolvedDelta` of statistics.

    Raises:
        ArgumentError: how is not for this run, or another argument is not as above.
        LedgerError: the run is not settled, or has no trained shard.
        StatisticsError: the statistics determine no optimum for l2.
        PlanError: another process is at work on the run.
        SampleError: an image cannot be read.
    """
    check_how(plan, how, l2, data)
    with plan.locked():
        return compose_locked(plan, how, l2, data, progress)


def check_how(
    plan: Plan, how: str, l2: float | str | None = None, data: ImageData | None = None
) -> None:
    """Raise the ArgumentErrors of `compose_run`."""
    check_choice("how", how, HOWS)
    recipe = plan.recipe
    if (how == "statistics") != (recipe.method == "statistics"):
        raise ArgumentError(
            f"how={how!r} is not for a run with method {recipe.method!r}: compose it by "
            f"{default_how(plan)!r}"
        )
    if how == "lossless" and (recipe.method != "exact" or recipe.loss != "rsl"):
        raise ArgumentError(
            "how='lossless' is for shards that were fitted with method 'exact' and loss 'rsl'"
        )
    if how == "head" and recipe.loss != "rsl":
        raise ArgumentError("how='head' is for shards with loss 'rsl', which is quadratic")
    if (how == "least-squares") != (data is not None):
        raise ArgumentError(
            "how='least-squares' and data go together: its weights are fitted to validation images"
        )
    if l2 is not None and how != "statistics":
        raise ArgumentError("l2 is for statistics: deltas have that of their recipe")
    if isinstance(l2, str) and l2 != AUTOMATIC:
        raise ArgumentError(f"l2 must be a number, or {AUTOMATIC!r}, got {l2!r}")
    if l2 is not None and not isinstance(l2, str):
        check_not_negative(l2=l2)


def compose_locked(
    plan: Plan,
    how: str,
    l2: float | str | None = None,
    data: ImageData | None = None,
    progress: bool = True,
) -> Delta:
    """`compose_run` for a caller that has locked the plan and checked the arguments."""
    ledger = settled_ledger(plan)
    if not len(ledger):
        raise LedgerError(f"{plan.path} has no trained shard: there is nothing to compose")
    if isinstance(ledger, StatisticsLedger):
        return _solve(plan, ledger, l2)
    if how == "mean":
        return ledger.composed()
    if data is not None:
        delta = _least_squares(plan, data)
    else:
        delta = _head(plan, progress) if how == "head" else _lossless(plan, progress)
    write_composition(plan, how, delta)
    return delta


def composition(plan: Plan, how: str) -> Delta:
    """A composition that a settled run has.

    Raises:
        LedgerError: the run is not settled, or not composed so.
        PlanError: the composition's file is damaged.
    """
    ledger = settled_ledger(plan)
    if how == "mean" and isinstance(ledger, Ledger):
        return ledger.composed()
    return read_composition(plan, how)


def compositions(plan: Plan) -> dict[str, Delta | None]:
    """Name -> delta: the anchor (None), and each composition that a settled run has.

    "head only" is, in a run of statistics, the optimum if the linear head alone is trained, which
    is a probe of the same images; its l2 is chosen by generalised cross-validation.

    Raises:
        LedgerError, PlanError: as in `composition`.
    """
    ledger = settled_ledger(plan)
    found: dict[str, Delta | None] = {ANCHOR: None}
    if isinstance(ledger, StatisticsLedger):
        statistics = ledger.statistics()
        if statistics.meta.head:
            found[PROBE] = probe(statistics)
    elif len(ledger):
        found["mean"] = ledger.composed()
    for how in KEPT:
        if path_of(plan, how).exists():
            found[how] = read_composition(plan, how)
    return found


def _solve(plan: Plan, ledger: StatisticsLedger, l2: float | str | None) -> Delta:
    wanted = plan.l2 if l2 is None else l2
    statistics = ledger.statistics()
    if wanted is None or isinstance(wanted, str):
        delta = statistics.choose().delta
    else:
        delta = statistics.solve(wanted)
    if l2 is not None:  # it determines an optimum: later calls may use it
        plan.manifest.set_l2(l2 if isinstance(l2, str) else repr(float(l2)))
    write_composition(plan, "statistics", delta, l2=repr(delta.l2))
    return delta


def _lossless(plan: Plan, progress: bool) -> Delta:
    jobs = [plan.job(shard.name) for shard in plan.shards() if shard.done]
    tangent = plan.tangent().to(device())
    problems = [job_problem(tangent, job_data(plan, job), plan.recipe, progress) for job in jobs]
    paths = [plan.result_path(job.hash) for job in jobs]
    return compose_lossless(paths, [p.curvature() for p in problems], progress=progress)


def _head(plan: Plan, progress: bool) -> Delta:
    jobs = [plan.job(shard.name) for shard in plan.shards() if shard.done]
    paths = [plan.result_path(job.hash) for job in jobs]
    tangent, mean = plan.tangent().to(device()), compose(paths)
    sums = [head_statistics(tangent, job_data(plan, job), mean, progress=progress) for job in jobs]
    return compose(paths, how="head", statistics=sums)


def _least_squares(plan: Plan, data: ImageData) -> Delta:
    info = plan.anchor_info
    samples = data.open(info.input).with_classes(info.classes)
    paths = [plan.result_path(s.job) for s in plan.shards() if s.job is not None and s.done]
    return compose(paths, "least-squares", tangent=plan.tangent().to(device()), data=samples)
