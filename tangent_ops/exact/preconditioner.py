"""Approximate inverses of a Hessian for conjugate gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tangent_ops.data import check_integer
from tangent_ops.exact.conjugate import Product, unpreconditioned
from tangent_ops.exact.nystrom import Nystrom
from tangent_ops.exact.passes import Passes
from tangent_ops.exact.stored import StoredJacobian
from tangent_ops.exact.subset import ROWS, SubsetInverse

MAX_RANK = 64
MAX_BYTES = 1 << 30  # of the Nyström factor that is kept; computing it takes three times as much


class Preconditioner:
    """Makes approximate inverses of the Hessian, up to a factor.

    `SubsetInverse` at the logits of a step if J is stored. `Nystrom`, at Δ = 0 and once, if J is
    computed by passes. None if the rank is 0.

    Args:
        passes: over the data.
        rank: rows of J for `SubsetInverse`, or the rank of `Nystrom`; None for `default_rank`.
    """

    def __init__(self, passes: Passes, rank: int | None = None) -> None:
        check_rank(rank)
        self.passes = passes
        self.rank = default_rank(passes) if rank is None else min(rank, passes.layout.size)
        self._once: Product | None = None if self.rank else unpreconditioned

    def at(self, logits: Sequence[Tensor] | None) -> Product:
        """The inverse where the batches have these logits; None for a quadratic loss."""
        if self._once is None and is_stored(self.passes):
            inverse = SubsetInverse([self.passes], self.rank, logits)
            if logits is not None:
                return inverse
            self._once = inverse
        self._once = self._once or Nystrom(self.passes, self.rank)
        return self._once


def of_all(shards: Sequence[Passes]) -> Product:
    """An approximate inverse of the sum of the shards' Hessians, up to a factor."""
    stored = all(is_stored(passes) for passes in shards)
    return SubsetInverse(shards) if stored else Preconditioner(shards[0]).at(None)


def check_rank(rank: int | None) -> None:
    """Raise ArgumentError unless rank is None or an integer of at least 0."""
    if rank is not None:
        check_integer("rank", rank, 0)


def default_rank(passes: Passes) -> int:
    """The rows of J of `SubsetInverse`, or the largest rank that Nyström's limits allow."""
    if is_stored(passes):
        return min(ROWS, passes.samples * passes.outputs)
    size, width = passes.layout.size, passes.layout.dtype.itemsize
    return min(MAX_RANK, MAX_BYTES // (size * width), size, passes.samples)


def is_stored(passes: Passes) -> bool:
    """Whether J is kept, so that products take no passes through the model."""
    return isinstance(passes.jacobian, StoredJacobian)
