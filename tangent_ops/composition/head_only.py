"""Statistics and optimum of the linear head alone: a probe of the same samples."""

from __future__ import annotations

from dataclasses import replace

import torch

from tangent_ops.composition.ridge import SolvedDelta
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.errors import StatisticsError


def head_only(statistics: TangentStatistics) -> TangentStatistics:
    """The same samples' statistics in the columns of the linear head alone.

    Their optimum is that of a linear probe of these samples, from the anchor's head on.

    Raises:
        StatisticsError: no linear head is among the columns.
    """
    meta = statistics.meta
    if not meta.head:
        raise StatisticsError(
            "the statistics have no linear head: it is not trained, or not linear"
        )
    own = replace(meta, layout=tuple(row for row in meta.layout if row[0] in meta.head))
    empty = {
        name: torch.zeros(shape, dtype=torch.int64)
        for name, shape in own.shapes().items()
        if name.startswith("core_")
    }
    return TangentStatistics(
        own,
        {**statistics.terms, **empty},
        statistics.counts,
        statistics.reach,
        statistics.digests,
    )


def probe(statistics: TangentStatistics) -> SolvedDelta:
    """The optimum in the head's columns alone, with zeros in the others; l2 as `choose` takes it.

    Raises:
        StatisticsError: as in `head_only` and `TangentStatistics.choose`.
    """
    found = head_only(statistics).choose().delta
    zeros = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype))
        for name, dtype, shape in statistics.meta.layout
    }
    assert found.meta is not None
    return SolvedDelta(
        {**zeros, **found},
        found.meta,
        l2=found.l2,
        condition=found.condition,
        loss=found.loss,
    )
