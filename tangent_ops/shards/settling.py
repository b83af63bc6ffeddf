"""`settle`: make the ledger of a run hold exactly the deltas, or statistics, of its plan."""

from __future__ import annotations

from dataclasses import dataclass

from tangent_ops.composition.ledger import Ledger, StatisticsLedger
from tangent_ops.data import check_choice
from tangent_ops.errors import ArgumentError, LedgerError
from tangent_ops.shards.composition_files import erase_stale_compositions
from tangent_ops.shards.plan import WEIGHTS, Plan
from tangent_ops.shards.results import checked_result, erase_stale


@dataclass(frozen=True)
class Settled:
    """What `settle` changed.

    Attributes:
        added: shards whose deltas or statistics were added to the ledger.
        forgotten: shards that were removed from it, because the plan has other samples or none.
        missing: shards with samples that are not trained yet.
    """

    added: tuple[str, ...]
    forgotten: tuple[str, ...]
    missing: tuple[str, ...]


def settle(plan: Plan, *, weights: str | None = None) -> Settled:
    """Bring a run's ledger in line with its plan; after an interruption the next call continues.

    Deltas, or statistics, that do not belong to the plan any more, for example because a sample was
    forgotten, are removed from the ledger; their files are overwritten and removed. Those of jobs
    that are done and not in the ledger are added. Compositions of other shards than these are
    erased. Other files in the run's folder stay, and links are not followed.

    Args:
        plan: the run.
        weights: of the shards in the mean: "uniform", as in the paper, or "samples", the numbers of
            their samples. None for those of the last call, at first "uniform".

    Raises:
        ArgumentError: weights is neither, or given for statistics, which have none.
        PlanError: another process is at work on the run; a shard's file is damaged, a link,
            or not the shard's.
        LedgerError: the ledger is damaged.
    """
    if weights is not None:
        check_choice("weights", weights, WEIGHTS)
    with plan.locked():
        return settle_locked(plan, weights)


def settle_locked(plan: Plan, weights: str | None = None) -> Settled:
    """`settle` for a caller that has locked the plan."""
    if weights is not None and plan.recipe.method == "statistics":
        raise ArgumentError("weights are for a mean of deltas: a run's statistics are added up")
    if weights is None:
        weights = plan.weights
    elif weights != plan.weights:
        plan.manifest.set_weights(weights)
    shards = {shard.name: shard for shard in plan.shards() if shard.job is not None}
    ledger = ledger_of(plan)
    entries = {entry.shard: entry for entry in ledger.list()}
    forgotten = []
    for name, entry in entries.items():
        shard = shards.get(name)
        meta = entry.meta
        if shard is None or (meta.get("job"), meta.get("weights")) != (shard.job, weights):
            ledger.forget(name, progress=False)
            forgotten.append(name)
    added = []
    for name, shard in shards.items():
        if shard.done and (name not in entries or name in forgotten):
            assert shard.job is not None
            path = checked_result(plan, name, shard.job)
            meta = {"job": shard.job, "samples": shard.samples, "weights": weights}
            if isinstance(ledger, Ledger):
                weight = float(shard.samples) if weights == "samples" else 1.0
                ledger.add(name, path, weight, meta)
            else:
                ledger.add(name, path, meta)
            added.append(name)
    erase_stale(plan)
    erase_stale_compositions(plan)
    missing = tuple(name for name, shard in shards.items() if not shard.done)
    return Settled(tuple(added), tuple(forgotten), missing)


def ledger_of(plan: Plan, *, create: bool = True) -> Ledger | StatisticsLedger:
    """The run's ledger, of deltas or of statistics."""
    kind = StatisticsLedger if plan.recipe.method == "statistics" else Ledger
    anchor = plan.anchor_info.fingerprint if create else None
    return kind(plan.ledger_path, anchor=anchor, create=create)


def check_settled(plan: Plan) -> Ledger:
    """The ledger of a run whose shards have deltas.

    Raises:
        LedgerError: as in `settled_ledger`; or it is a ledger of statistics.
    """
    ledger = settled_ledger(plan)
    if not isinstance(ledger, Ledger):
        raise LedgerError(f"{plan.path} has statistics, not deltas: use settled_ledger")
    return ledger


def settled_ledger(plan: Plan) -> Ledger | StatisticsLedger:
    """The run's ledger, of deltas or of statistics.

    Raises:
        LedgerError: there is none, or it is not in line with the plan, so that forgotten samples
            may still have a part in it.
    """
    if not plan.ledger_path.is_dir():
        raise LedgerError(f"{plan.path} is not composed yet: settle it (tangent-ops compose)")
    ledger = ledger_of(plan, create=False)
    weights = plan.weights
    asked = {shard.name: (shard.job, weights) for shard in plan.shards() if shard.done}
    here = {e.shard: (e.meta.get("job"), e.meta.get("weights")) for e in ledger.list()}
    if asked != here:
        stale = [name for name, what in here.items() if asked.get(name) != what]
        raise LedgerError(
            f"the ledger of {plan.path} is not in line with its plan ({len(asked)} shards are "
            f"trained, {len(here)} composed, {len(stale)} of them out of date): settle it "
            "(tangent-ops compose)"
        )
    return ledger
