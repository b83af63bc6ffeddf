"""Approximate inverses of a Hessian for conjugate gradients."""

from __future__ import annotations

from collections.abc import Sequence

from tangent_ops.data import check_integer
from tangent_ops.exact.conjugate import Product, unpreconditioned
from tangent_ops.exact.nystrom import Nystrom
from tangent_ops.exact.passes import Passes
from tangent_ops.exact.stored import StoredJacobian
from tangent_ops.exact.subset import ROWS, SubsetInverse

MAX_RANK = 64
MAX_BYTES = 1 << 30  # of the Nyström factor that is kept; computing it takes three times as much


def preconditioner(passes: Passes, rank: int | None = None) -> Product:
    """An approximate inverse of the Hessian, up to a factor; none if the rank is 0.

    Of `SubsetInverse` if J is stored, of `Nystrom` if it is computed by passes.
    """
    check_rank(rank)
    rank = default_rank(passes) if rank is None else min(rank, passes.layout.size)
    if not rank:
        return unpreconditioned
    return SubsetInverse([passes], rank) if is_stored(passes) else Nystrom(passes, rank)


def of_all(shards: Sequence[Passes]) -> Product:
    """An approximate inverse of the sum of the shards' Hessians, up to a factor."""
    stored = all(is_stored(passes) for passes in shards)
    return SubsetInverse(shards) if stored else preconditioner(shards[0])


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
