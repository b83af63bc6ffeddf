"""Takes samples out of shards' statistics by subtraction: no other sample is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.composition.statistics_file import load_statistics
from tangent_ops.errors import SampleError, StatisticsError
from tangent_ops.shards.job import job_data, statistics_of
from tangent_ops.shards.plan import Plan
from tangent_ops.shards.shared_model import SharedModel


def reduced(
    plan: Plan, found: Mapping[str, Collection[str]], names: Collection[str], progress: bool
) -> dict[str, TangentStatistics]:
    """Shard -> its statistics without the samples in `found` (shard -> ids), where others stay.

    A shard is left out if one of its samples to be taken out cannot be read any more, or has other
    bits than when it was added; its statistics have to be computed again, from those that stay.

    Args:
        plan: a run with the method "statistics".
        found: what is to be taken out.
        names: the shards that have statistics.
        progress: show bars.
    """
    less, shared = {}, SharedModel()
    with _threads(plan.recipe.threads):
        for name in names:
            job = plan.job(name)
            gone = tuple(sample for sample in job.samples if sample.id in set(found[name]))
            if len(gone) == len(job.samples):
                continue
            try:
                data = job_data(plan, replace(job, samples=gone))
                lost = statistics_of(plan, data, progress, shared)
                less[name] = load_statistics(plan.result_path(job.hash)) - lost
            except (SampleError, StatisticsError):
                continue
    return less


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as a worker has, on which the last bits depend."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
