"""The files that jobs write: a delta or statistics each, and a history; whose they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.composition.statistics_file import file_content, load_statistics
from tangent_ops.delta import load_delta
from tangent_ops.errors import DeltaError, PlanError, StatisticsError, in_words
from tangent_ops.files import content_sha256, erase, write_atomically, write_safetensors
from tangent_ops.shards.history import history_path, read_record
from tangent_ops.shards.plan import Job, Plan
from tangent_ops.shards.summary import summary_path

_NAME = re.compile(r"[0-9a-f]{32}\.(safetensors|json)")  # of Plan.result_path and history_path
_FAILURES = (DeltaError, StatisticsError, PlanError, OSError)


class Origin(NamedTuple):
    """Of which anchor, shard and job a result is."""

    anchor: str
    shard: str | None
    job: str


def write_statistics(plan: Plan, job: Job, statistics: TangentStatistics) -> None:
    """Write a job's statistics, atomically, to a file that `load_statistics` reads."""
    tensors, metadata = file_content(statistics)
    metadata |= {"shard": job.shard, "job": job.hash}
    metadata["content_sha256"] = content_sha256(tensors, metadata)
    path = plan.result_path(job.hash)
    write_atomically(path, lambda file: write_safetensors(file, tensors, metadata))


def checked_result(plan: Plan, shard: str, job: str) -> Path:
    """The path of a job's result, after a check that it is the result of this shard and job.

    Raises:
        PlanError: the file is damaged, a link, or not the shard's.
    """
    path = plan.result_path(job)
    try:
        origin = _origin(plan, path)
    except _FAILURES as error:
        raise PlanError(f"{in_words(error)}. Or remove it, and run the shards again") from error
    if origin != (plan.anchor_info.fingerprint, shard, job):
        what = "statistics" if plan.recipe.method == "statistics" else "delta"
        raise PlanError(
            f"{path} is not the {what} of shard {shard!r}: remove it, and run the shards again"
        )
    return path


def erase_stale(plan: Plan) -> None:
    """Erase the results and histories of jobs that the plan does not have any more.

    Raises:
        PlanError: a file is named like one of them, but cannot be read; the others are erased.
    """
    jobs = [shard.job for shard in plan.shards() if shard.job is not None]
    wanted = {*map(plan.result_path, jobs), *(history_path(plan, job) for job in jobs)}
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
            unclear.append(in_words(error))
    if stale:
        erase(summary_path(plan))  # it has their histories
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
    if path.suffix == ".json":
        record = read_record(path)
        return Origin(str(record.get("anchor")), None, str(record.get("job")))
    if plan.recipe.method == "statistics":
        found = load_statistics(path)
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        return Origin(found.meta.delta.anchor, about.get("shard"), about.get("job", ""))
    meta = load_delta(path).meta
    assert meta is not None
    return Origin(meta.anchor, meta.shard, meta.extra.get("job", ""))
