"""`compose_head`: the mean of the blocks, and the head that fits best on top of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from tangent_ops.composition.compose import compose
from tangent_ops.composition.ridge import SolvedDelta
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.delta import Delta, DeltaLike, check_anchor, check_kind, fingerprint
from tangent_ops.errors import ArgumentError, StatisticsError

BLOCK = "block"  # in DeltaMeta.extra: the `block_fingerprint` of the delta that residuals are at
AT_ANCHOR = "anchor"  # in its place, for residuals at the anchor


def compose_head(
    deltas: Sequence[DeltaLike],
    statistics: Iterable[TangentStatistics],
    l2: float | None = None,
) -> SolvedDelta:
    """The mean of the deltas outside of the head, and a head in closed form.

    A head a ↦ h a has its optimum, given the other parameters' delta b, at

        h = (Σ_i r_i a_iᵀ) (Σ_i a_i a_iᵀ + λ I)⁻¹,    r_i = y_i - f(x_i) - J(x_i) b

    with λ = l2 N C / 2, and both sums add up over shards: `exact.head_statistics`. All shards'
    residuals are either

    - at the mean b of the deltas, which takes one extra round: shards send deltas, get the mean,
      and send their sums. h is then the optimum of the union, given b; or
    - at the anchor, b = 0, without an extra round: shards send delta and sums at once. h is then
      the optimum of the union if the head alone is trained, and the mean of the blocks comes on
      top of it.

    Args:
        deltas: the shards', or paths of their files.
        statistics: `exact.head_statistics` of each shard, in the same order.
        l2: the penalty's weight; None to let `TangentStatistics.choose` take it.

    Returns:
        The composition, with `compose`'s meta; its l2, condition and loss are of the head's fit.

    Raises:
        ArgumentError, DeltaError, DeltaFileError: as `compose`; not as many statistics as deltas.
        StatisticsError: statistics of another anchor or loss; residuals that are neither all at the
            mean nor all at the anchor; or as in `TangentStatistics.solve`.
    """
    deltas, statistics = list(deltas), list(statistics)
    if len(statistics) != len(deltas):
        raise ArgumentError(f"{len(statistics)} statistics for {len(deltas)} deltas")
    mean = compose(deltas)
    _check_heads(statistics, mean)
    total = statistics[0]
    for one in statistics[1:]:
        total = total + one
    solved = total.choose().delta if l2 is None else total.solve(l2)
    tensors = {name: solved.get(name, value).to(value) for name, value in mean.items()}
    return SolvedDelta(
        tensors,
        mean.meta,
        l2=solved.l2,
        condition=solved.condition,
        loss=solved.loss,
    )


def block_fingerprint(delta: Mapping[str, Tensor], head: Sequence[str]) -> str:
    """SHA-256 of a delta without its head."""
    return fingerprint({name: value for name, value in delta.items() if name not in head})


def _check_heads(statistics: Sequence[TangentStatistics], mean: Delta) -> None:
    for index, one in enumerate(statistics):
        what = f"statistics[{index}]"
        if not isinstance(one, TangentStatistics) or BLOCK not in one.meta.delta.extra:
            raise ArgumentError(f"{what} must be of exact.head_statistics, got {one!r}")
        own = one.meta
        check_anchor(mean.meta, own.delta.anchor, own.delta.model, f"the mean, for {what},")
        check_kind(mean.meta, own.delta.rank, own.delta.basis, f"the mean, for {what},")
        for name, _, shape in own.layout:
            if name not in mean or tuple(mean[name].shape) != shape:
                raise ArgumentError(f"{what} has a head {name} {shape}, which the deltas have not")
        if own.delta.extra[BLOCK] not in (AT_ANCHOR, block_fingerprint(mean, own.head)):
            raise StatisticsError(
                f"{what} has residuals neither at the mean of these deltas nor at the anchor: "
                "compute it at compose(deltas), of the same deltas in the same order, or without "
                "a delta"
            )
