"""The files of a run's compositions. Each records of which shards it is."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from tangent_ops.delta import Delta, load_delta, save_delta
from tangent_ops.errors import DeltaFileError, LedgerError, PlanError
from tangent_ops.files import erase, to_json
from tangent_ops.shards.plan import Plan
from tangent_ops.shards.run_folder import COMPOSITIONS

KEPT = ("least-squares", "head", "lossless", "statistics")  # the ledger has the mean
_STATE = "composed_of"


def write_composition(plan: Plan, how: str, delta: Delta, **extra: str) -> None:
    """Write a composition of the trained shards, atomically."""
    assert delta.meta is not None
    path = path_of(plan, how)
    path.parent.mkdir(exist_ok=True)
    save_delta(delta, path, meta=replace(delta.meta, extra={**extra, _STATE: _state(plan)}))


def read_composition(plan: Plan, how: str) -> Delta:
    """A composition of the present shards.

    Raises:
        LedgerError: the run is not composed so.
        PlanError: the file is damaged.
    """
    path = path_of(plan, how)
    try:
        delta = load_delta(path, anchor=plan.anchor_info.fingerprint)
    except FileNotFoundError as error:
        raise LedgerError(
            f"{plan.path} is not composed by {how!r}: tangent-ops compose --how {how}"
        ) from error
    except DeltaFileError as error:
        raise PlanError(f"{error}. Or remove it, and compose the run again") from error
    if delta.meta is None or delta.meta.extra.get(_STATE) != _state(plan):
        raise LedgerError(f"{path} is out of date: compose the run again")
    return delta


def erase_stale_compositions(plan: Plan) -> None:
    """Erase the compositions that are not of the present shards, and those that are damaged."""
    state = _state(plan)
    for path in (path_of(plan, how) for how in KEPT):
        try:
            meta = load_delta(path).meta
        except FileNotFoundError:
            continue
        except DeltaFileError:
            meta = None
        if meta is None or meta.extra.get(_STATE) != state:
            erase(path)


def path_of(plan: Plan, how: str) -> Path:
    """The file of a composition."""
    return plan.path / COMPOSITIONS / f"{how}.safetensors"


def _state(plan: Plan) -> str:
    """SHA-256 of the trained shards' jobs, and of l2 if the plan chooses it."""
    jobs = [shard.job for shard in plan.shards() if shard.done]
    return hashlib.sha256(to_json([jobs, plan.l2]).encode()).hexdigest()
