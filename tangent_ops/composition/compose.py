"""`compose`: weighted sums of deltas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tangent_ops.composition.least_squares import LeastSquaresWeights
from tangent_ops.data import Data
from tangent_ops.delta import (
    Delta,
    DeltaLike,
    DeltaMeta,
    check_anchor,
    check_kind,
    check_layout,
    check_several,
    check_values,
    open_delta,
)
from tangent_ops.errors import ArgumentError, DeltaError
from tangent_ops.losses import Loss
from tangent_ops.model.linearized import LinearizedModel


def compose(
    deltas: Iterable[DeltaLike],
    weights: Sequence[float] | Literal["least-squares"] | None = None,
    *,
    tangent: LinearizedModel | None = None,
    data: Data | None = None,
    loss: Loss | None = None,
    ridge: float | None = None,
) -> Delta:
    """Weighted sum of deltas, sum_k w_k delta_k, with one of them in memory at a time.

    With the sum a tangent model computes f + sum_k w_k J delta_k (Liu, Golatkar, Soatto: "Tangent
    Transformers for Composition, Privacy and Removal", ICLR 2024). To forget a shard, compose the
    other shards' deltas again.

    Args:
        deltas: deltas of one anchor, and one basis if they are of low rank, or paths of files,
            opened one after the other. All have the same names, shapes and dtypes. An iterator is
            consumed.
        weights: one finite number per delta; None for the mean; or "least-squares" for the weights
            that fit ``data`` best. Least squares open files once more for every batch, and must be
            solved again after a shard was forgotten, because the old weights depend on its delta. A
            :class:`~tangent_ops.composition.least_squares.LeastSquaresWeights` solves again without
            data.
        tangent: for least squares: the tangent model; it is not changed.
        data: for least squares: validation data, a Dataset of (input, target) or a DataLoader.
        loss: for least squares: a convex quadratic one; None for `RescaledSquareLoss()`.
        ridge: for least squares: the mean loss is increased by ridge/2 times the weights' squared
            norm; None for the smallest ridge that rounding permits.

    Returns:
        The sum, accumulated in float64, in the deltas' dtypes and on the first one's device. A
        single delta with weight 1 is returned bit for bit. `meta` is the first delta's without
        shard and extra, and with the loss only if all share it; None if a delta has no meta.

    Raises:
        ArgumentError: no deltas, an item that is not a delta, a wrong number of weights, a weight
            that is not finite, least squares without tangent and data, options of least squares
            without it, or what `LeastSquaresWeights` refuses.
        DeltaError: deltas of different anchors, ranks, bases, names, shapes or dtypes; values that
            are not finite, in a delta or in the sum.
        DeltaFileError: a file is truncated, was edited or is not a delta file.
        NonFiniteLossError: outputs are NaN or infinite in least squares.
    """
    check_several(deltas)
    if isinstance(weights, str):
        if weights != "least-squares":
            raise ArgumentError(f"weights must be numbers or 'least-squares', got {weights!r}")
        if tangent is None or data is None:
            raise ArgumentError("weights='least-squares' needs tangent=... and data=...")
        deltas = list(deltas)
        weights = LeastSquaresWeights(deltas, tangent, data, loss=loss, ridge=ridge).weights()
    else:
        options = {"tangent": tangent, "data": data, "loss": loss, "ridge": ridge}
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise ArgumentError(
                f"{given[0]} is for weights='least-squares' only, got weights={weights!r}: "
                f"pass weights='least-squares', or leave {given[0]} out"
            )
        weights = None if weights is None else _checked(weights)

    total = _WeightedSum()
    # Not enumerate or zip, which keep the last delta in memory while the next one is loaded.
    for item in deltas:
        if weights is not None and total.count == len(weights):
            raise ArgumentError(f"{len(weights)} weights for more than {len(weights)} deltas")
        total.add(item, 1.0 if weights is None else weights[total.count])
        del item
    if total.count == 0:
        raise ArgumentError("deltas is empty: there is nothing to compose")
    if weights is not None and total.count != len(weights):
        raise ArgumentError(f"{len(weights)} weights for {total.count} deltas")
    return total.divided_by(total.count if weights is None else 1)


class _WeightedSum:
    """The running sum; add() refuses a delta of another layout or anchor than the first one's."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}  # float64
        self.dtypes: dict[str, torch.dtype] = {}
        self.meta: DeltaMeta | None = None
        self.origin_unknown = False

    def add(self, item: DeltaLike, weight: float) -> None:
        delta, what = open_delta(item, self.count)
        check_values(delta, what)
        self._join(getattr(delta, "meta", None), what)
        if self.count == 0:
            self.dtypes = {name: value.dtype for name, value in delta.items()}
            # The first term starts the sums: 0 + (-0.0) would lose a sign.
            self.sums = {name: value.detach().double() * weight for name, value in delta.items()}
        else:
            check_layout(delta, self.sums, what)
            for name, dtype in self.dtypes.items():
                if delta[name].dtype != dtype:
                    raise DeltaError(f"{what}: {name} is {delta[name].dtype}, the first's {dtype}")
            for name, total in self.sums.items():
                total.add_(delta[name].detach().to(total.device), alpha=weight)
        self.count += 1

    def _join(self, meta: DeltaMeta | None, what: str) -> None:
        if meta is None:
            self.origin_unknown = True
        elif self.meta is None:
            self.meta = replace(meta, shard=None, extra={})
        else:
            check_anchor(meta, self.meta.anchor, self.meta.model, what)
            check_kind(meta, self.meta.rank, self.meta.basis, what)
            if meta.loss != self.meta.loss:
                self.meta = replace(self.meta, loss=None)

    def divided_by(self, divisor: int) -> Delta:
        sums = {name: (total / divisor).to(self.dtypes[name]) for name, total in self.sums.items()}
        check_values(sums, "the composition")
        return Delta(sums, None if self.origin_unknown else self.meta)


def _checked(weights: Sequence[float]) -> list[float]:
    try:
        checked = [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"weights must be numbers, one per delta, got {weights!r}") from error
    if not all(map(math.isfinite, checked)):
        raise ArgumentError(f"weights must be finite, got {checked}")
    return checked
