"""`compose`: all ways to compose shards, by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

from tangent_ops.composition.compose import compose as weighted_sum
from tangent_ops.composition.head import compose_head
from tangent_ops.composition.ridge import SolvedDelta
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.composition.statistics_file import load_statistics
from tangent_ops.data import Data, check_choice
from tangent_ops.delta import Delta, DeltaLike
from tangent_ops.errors import ArgumentError
from tangent_ops.exact.curvature import Curvature
from tangent_ops.exact.lossless import LosslessDelta, compose_lossless
from tangent_ops.losses import Loss
from tangent_ops.model.linearized import LinearizedModel

Numbers = Sequence[float]
StatisticsLike = TangentStatistics | str | os.PathLike[str]

# How -> the arguments that it needs, and those that it takes besides.
_ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "mean": ((), ()),
    "weights": (("weights",), ()),
    "least-squares": (("tangent", "data"), ("loss", "ridge")),
    "head": (("statistics",), ("l2",)),
    "lossless": (("curvatures",), ("tol", "max_iterations", "max_rounds")),
    "statistics": ((), ("l2",)),
}


@overload
def compose(
    deltas: Iterable[DeltaLike],
    weights: Numbers | Literal["least-squares"] | None = None,
    *,
    how: Literal["mean", "weights", "least-squares"] | None = None,
    tangent: LinearizedModel | None = None,
    data: Data | None = None,
    loss: Loss | None = None,
    ridge: float | None = None,
) -> Delta: ...
@overload
def compose(
    deltas: Iterable[DeltaLike],
    *,
    how: Literal["head"],
    statistics: Iterable[StatisticsLike],
    l2: float | None = None,
) -> SolvedDelta: ...
@overload
def compose(
    deltas: Iterable[DeltaLike],
    *,
    how: Literal["lossless"],
    curvatures: Sequence[Curvature],
    tol: float | None = None,
    max_iterations: int | None = None,
    max_rounds: int | None = None,
) -> LosslessDelta: ...
@overload
def compose(
    deltas: Iterable[StatisticsLike],
    *,
    how: Literal["statistics"],
    l2: float | None = None,
) -> SolvedDelta: ...
def compose(
    deltas: Iterable[Any],
    weights: Numbers | Literal["least-squares"] | None = None,
    *,
    how: str | None = None,
    **options: Any,
) -> Delta:
    """Compose shards' deltas, or their statistics.

    ================= ============================= ==========================================
    how               arguments                     result
    ================= ============================= ==========================================
    "mean"                                          the mean; the default
    "weights"         weights                       Σ_s w_s Δ_s; the default with weights
    "least-squares"   tangent, data, loss?, ridge?  Σ_s w_s Δ_s that fits validation data best
    "head"            statistics, l2?               the mean, with a head in closed form
    "lossless"        curvatures, tol?,             the optimum of the shards' union, from their
                      max_iterations?, max_rounds?  optima and products with their Hessians
    "statistics"      l2?                           the optimum of the union, from statistics
    ================= ============================= ==========================================

    The arguments are those of the functions that do it: for the first three
    `tangent_ops.composition.compose.compose`, `tangent_ops.composition.head.compose_head`,
    `compose_lossless`, and `TangentStatistics.solve`. ``weights="least-squares"`` is
    ``how="least-squares"``.

    Args:
        deltas: the shards' deltas, or paths of their files; with "statistics" the shards'
            statistics, or paths of theirs.
        weights: one finite number per delta.
        how: as in the table; None for what `weights` says.
        options: the table's arguments. Statistics of "head", one per delta, are those of
            `exact.head_statistics`. Without l2, generalised cross-validation chooses it.

    Returns:
        The composition. Its `meta` is the deltas' without shard.

    Raises:
        ArgumentError: another how; an argument that it needs is missing, or one is given that it
            does not take; or as in the function that does it, whose other errors are raised, too.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if how is None and not given.keys() - {"tangent", "data", "loss", "ridge"}:
        return weighted_sum(deltas, weights, **given)
    if weights == "least-squares" and how in (None, "least-squares"):
        how, weights = "least-squares", None
    if weights is not None:
        given["weights"] = weights
    how = how or ("mean" if weights is None else "weights")
    check_choice("how", how, tuple(_ARGUMENTS))
    _check(how, given)
    if how == "head":
        statistics = [_opened(one) for one in given.pop("statistics")]
        return compose_head(list(deltas), statistics, **given)
    if how == "lossless":
        return compose_lossless(list(deltas), given.pop("curvatures"), **given)
    if how == "statistics":
        return _solved(deltas, **given)
    if how == "least-squares":
        return weighted_sum(deltas, "least-squares", **given)
    return weighted_sum(deltas, **given)


def _check(how: str, given: dict[str, Any]) -> None:
    needed, besides = _ARGUMENTS[how]
    for name in needed:
        if name not in given:
            raise ArgumentError(f"how={how!r} needs {name}=...")
    for name in given:
        if name in (*needed, *besides):
            continue
        takers = [repr(way) for way, names in _ARGUMENTS.items() if name in sum(names, ())]
        way_out = f"pass how={' or '.join(takers)}, or leave it out" if takers else "leave it out"
        raise ArgumentError(f"{name} is not an argument of how={how!r}: {way_out}")


def _solved(several: Iterable[StatisticsLike], l2: float | None = None) -> SolvedDelta:
    total: TangentStatistics | None = None
    for item in several:
        own = _opened(item)
        total = own if total is None else total + own
    if total is None:
        raise ArgumentError("deltas is empty: there is nothing to compose")
    return total.choose().delta if l2 is None else total.solve(l2)


def _opened(item: object) -> TangentStatistics:
    if isinstance(item, TangentStatistics):
        return item
    if isinstance(item, (str, os.PathLike)):
        return load_statistics(item)
    raise ArgumentError(
        f"expected TangentStatistics or the path of their file, got a {type(item).__name__}"
    )
