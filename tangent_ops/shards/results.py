"""Reads the files that jobs write, a delta or statistics each, and erases those of no job."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tangent_ops.delta import load_delta
from tangent_ops.errors import DeltaError, PlanError, StatisticsError
from tangent_ops.files import erase
from tangent_ops.shards.plan import Plan
from tangent_ops.shards.stand_in import load_statistics, read_extra

_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")  # of Plan.result_path
_FAILURES = (DeltaError, StatisticsError, OSError)


class Origin(NamedTuple):
    """Of which anchor, shard and job a result is."""

    anchor: str
    shard: str | None
    job: str


def checked_result(plan: Plan, shard: str, job: str) -> Path:
    """The path of a job's result, after a check that it is the result of this shard and job.

    Raises:
        PlanError: the file is damaged, a link, or not the shard's.
    """
    path = plan.result_path(job)
    try:
        origin = _origin(plan, path)
    except _FAILURES as error:
        raise PlanError(f"{error}. Or remove it, and run the shards again") from error
    if origin != (plan.anchor_info.fingerprint, shard, job):
        what = "statistics" if plan.recipe.method == "statistics" else "delta"
        raise PlanError(
            f"{path} is not the {what} of shard {shard!r}: remove it, and run the shards again"
        )
    return path


def erase_stale(plan: Plan) -> None:
    """Erase the results that the run's workers wrote and that its plan does not have any more.

    Raises:
        PlanError: a file is named like a result, but cannot be read; the others are erased.
    """
    wanted = {plan.result_path(shard.job) for shard in plan.shards() if shard.job is not None}
    stale, unclear = [], []
    for path in sorted(plan.results_path.iterdir()):
        if path in wanted or not _NAME.fullmatch(path.name):
            continue
        try:
            origin = _origin(plan, path)
            ours = origin.anchor == plan.anchor_info.fingerprint
            if ours and origin.job.startswith(path.stem):
                stale.append(path)
        except _FAILURES as error:
            unclear.append(str(error))
    for path in stale:
        erase(path)
    if unclear:
        raise PlanError(
            f"{unclear[0]}. It is named like a file that the plan of {plan.path} does not have "
            "any more, and is not erased: remove it if it is one, or else move it elsewhere"
        )


def _origin(plan: Plan, path: Path) -> Origin:
    if path.is_symlink():
        raise OSError(f"{path} is a symbolic link, which is not followed here")
    if plan.recipe.method == "statistics":
        extra, meta = read_extra(path), load_statistics(path).meta.delta
        return Origin(meta.anchor, extra.get("shard"), extra.get("job", ""))
    meta = load_delta(path).meta
    assert meta is not None
    return Origin(meta.anchor, meta.shard, meta.extra.get("job", ""))
