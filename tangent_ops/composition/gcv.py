"""Solves statistics with the l2 that generalised cross-validation chooses.

Nothing but the statistics is used. So a solution after samples were forgotten is, with its l2, the
one of statistics that never had them.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tangent_ops.composition.ridge import PathRow, Ridge, SolvedDelta
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.errors import StatisticsError

L2S = tuple(10.0 ** (k / 2) for k in range(6, -17, -1))  # 1,000 to 1e-8; of equal ones the largest


def solve_by_gcv(statistics: TangentStatistics) -> SolvedDelta:
    """The optimum for the l2 of `L2S` with the least `PathRow.gcv`.

    Raises:
        StatisticsError: the statistics are of no sample, or no l2 gives an optimum in float64.
    """
    ridge = Ridge(statistics)
    rows: list[PathRow] = []
    for l2 in L2S:
        try:
            rows += ridge.path([l2])
        except StatisticsError as error:  # this l2 and all smaller ones are hopeless
            if not rows:
                raise
            del error
            break
    return min(rows, key=lambda row: row.gcv).delta


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


def probe_by_gcv(statistics: TangentStatistics) -> SolvedDelta:
    """`solve_by_gcv` in the head's columns alone, with zeros in the others."""
    found = solve_by_gcv(head_only(statistics))
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
