"""Composition: adding deltas adds what they do to the outputs, because the model is linear."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tangent_ops.delta import (
    Delta,
    DeltaMeta,
    check_anchor,
    check_kind,
    check_layout,
    check_values,
    load_delta,
)
from tangent_ops.errors import ArgumentError, DeltaError

DeltaLike = Mapping[str, Tensor] | str | os.PathLike[str]


def compose(deltas: Iterable[DeltaLike], weights: Sequence[float] | None = None) -> Delta:
    """Weighted sum of deltas, sum_k w_k delta_k, with one of them in memory at a time.

    The outputs of a tangent model follow: f + sum_k w_k J delta_k (Liu, Golatkar, Soatto: "Tangent
    Transformers for Composition, Privacy and Removal", ICLR 2024). To forget a shard, compose the
    others again; its delta never enters the sum.

    Args:
        deltas: deltas of one anchor, and one basis if they are of low rank, or paths of files,
            opened one after the other. All have the same names, shapes and dtypes. An iterator is
            consumed.
        weights: one finite number per delta; None for the mean.

    Returns:
        The sum, accumulated in float64, in the deltas' dtypes and on the first one's device. One
        delta with weight 1 comes back bit for bit. Its `meta` is the first delta's without shard
        and extra, and with the loss only if all share it; None if a delta has no meta.

    Raises:
        ArgumentError: no deltas, something that is no delta, a wrong number of weights, or a
            weight that is not finite.
        DeltaError: deltas of different anchors, ranks, bases, names, shapes or dtypes; values that
            are not finite, in a delta or in the sum.
        DeltaFileError: a file is truncated, was edited or is no delta file.
    """
    if isinstance(deltas, (Mapping, str, os.PathLike)):
        raise ArgumentError(f"deltas must be several, got one {type(deltas).__name__}: use a list")
    weights = None if weights is None else _checked(weights)

    total = _WeightedSum()
    # Counted by hand: enumerate and zip hold on to the last item while the next one is made.
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
    """The running sum; it knows the first delta's layout and anchor and refuses any other."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}  # float64
        self.dtypes: dict[str, torch.dtype] = {}
        self.meta: DeltaMeta | None = None
        self.origin_unknown = False

    def add(self, item: DeltaLike, weight: float) -> None:
        delta, what = _open(item, self.count)
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


def _open(item: DeltaLike, index: int) -> tuple[Mapping[str, Tensor], str]:
    if isinstance(item, Mapping):
        return item, f"delta {index}"
    if isinstance(item, (str, os.PathLike)):
        return load_delta(item), os.fspath(item)
    kind = type(item).__name__
    raise ArgumentError(f"delta {index} must be a dict of tensors or a path, got a {kind}")


def _checked(weights: Sequence[float]) -> list[float]:
    try:
        checked = [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"weights must be numbers, one per delta, got {weights!r}") from error
    if not all(map(math.isfinite, checked)):
        raise ArgumentError(f"weights must be finite, got {checked}")
    return checked
