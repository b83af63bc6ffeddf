"""`settle`: make the ledger of a run hold exactly the trained deltas of its plan."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tangent_ops.composition.ledger import Ledger
from tangent_ops.data import check_choice
from tangent_ops.delta import load_delta
from tangent_ops.errors import DeltaError, LedgerError, PlanError
from tangent_ops.files import erase
from tangent_ops.shards.plan import WEIGHTS, Plan

_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")  # of Plan.delta_path


@dataclass(frozen=True)
class Settled:
    """What `settle` changed.

    Attributes:
        added: shards whose deltas were added to the ledger.
        forgotten: shards whose deltas were removed, because the plan has other samples or none.
        missing: shards with samples that are not trained yet.
    """

    added: tuple[str, ...]
    forgotten: tuple[str, ...]
    missing: tuple[str, ...]


def settle(plan: Plan, *, weights: str | None = None) -> Settled:
    """Bring a run's ledger in line with its plan; after an interruption the next call continues.

    Deltas that do not belong to the plan any more, for example because a sample was forgotten, are
    removed from the ledger; their files are overwritten and removed. Trained deltas that are not in
    the ledger are added. Other files in the run's folder stay, and links are not followed.

    Args:
        plan: the run.
        weights: of the shards in the mean: "uniform", as in the paper, or "samples", the numbers of
            their samples. None for those of the last call, at first "uniform".

    Raises:
        ArgumentError: weights is neither.
        PlanError: another process is at work on the run; a delta's file is damaged, a link,
            or not the shard's.
        LedgerError: the ledger is damaged.
    """
    if weights is not None:
        check_choice("weights", weights, WEIGHTS)
    with plan.locked():
        return settle_locked(plan, weights)


def settle_locked(plan: Plan, weights: str | None = None) -> Settled:
    """`settle` for a caller that has locked the plan."""
    if weights is None:
        weights = plan.weights
    elif weights != plan.weights:
        plan.manifest.set_weights(weights)
    shards = {shard.name: shard for shard in plan.shards() if shard.job is not None}
    ledger = Ledger(plan.ledger_path, anchor=plan.anchor_info.fingerprint)
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
            weight = float(shard.samples) if weights == "samples" else 1.0
            meta = {"job": shard.job, "samples": shard.samples, "weights": weights}
            ledger.add(name, _delta(plan, name, shard.job), weight, meta)
            added.append(name)
    _erase_stale(plan)
    missing = tuple(name for name, shard in shards.items() if not shard.done)
    return Settled(tuple(added), tuple(forgotten), missing)


def check_settled(plan: Plan) -> Ledger:
    """The run's ledger.

    Raises:
        LedgerError: there is none, or it is not in line with the plan, so that forgotten samples
            may still have a part in it.
    """
    if not plan.ledger_path.is_dir():
        raise LedgerError(f"{plan.path} is not composed yet: settle it (tangent-ops compose)")
    ledger = Ledger(plan.ledger_path, create=False)
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


def _delta(plan: Plan, shard: str, job: str) -> Path:
    """The path of a job's delta, after a check that it is the delta of this shard and job."""
    path = plan.delta_path(job)
    try:
        _check_file(path)
        meta = load_delta(path, anchor=plan.anchor_info.fingerprint).meta
    except (DeltaError, OSError) as error:
        raise PlanError(f"{error}. Or remove it, and run the shards again") from error
    if meta is None or meta.shard != shard or meta.extra.get("job") != job:
        raise PlanError(
            f"{path} is not the delta of shard {shard!r}: remove it, and run the shards again"
        )
    return path


def _erase_stale(plan: Plan) -> None:
    """Erase the deltas that the run's workers wrote and that its plan does not have any more.

    Raises:
        PlanError: a file is named like such a delta, but cannot be read; the others are erased.
    """
    wanted = {plan.delta_path(shard.job) for shard in plan.shards() if shard.job is not None}
    stale, unclear = [], []
    for path in sorted(plan.deltas_path.iterdir()):
        if path in wanted or not _NAME.fullmatch(path.name):
            continue
        try:
            _check_file(path)
            meta = load_delta(path).meta
            assert meta is not None
            ours = meta.anchor == plan.anchor_info.fingerprint
            if ours and meta.extra.get("job", "").startswith(path.stem):
                stale.append(path)
        except (DeltaError, OSError) as error:
            unclear.append(str(error))
    for path in stale:
        erase(path)
    if unclear:
        raise PlanError(
            f"{unclear[0]}. It is named like a delta that the plan of {plan.path} does not have "
            "any more, and is not erased: remove it if it is one, or else move it elsewhere"
        )


def _check_file(path: Path) -> None:
    if path.is_symlink():
        raise OSError(f"{path} is a symbolic link, which is not followed here")
