"""`ShardCurvature`: products with a shard's Hessian, without its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from tangent_ops.errors import UnsupportedError
from tangent_ops.exact.preconditioner import Preconditioner

if TYPE_CHECKING:
    from tangent_ops.exact.problem import Problem

Curvature = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class ShardCurvature:
    """v -> H v with H = Σ_i J_iᵀ A_i J_i + N l2 I over one shard's N samples.

    `compose_lossless` and `forget_without_data` take it in place of a shard's data. A function that
    has the products computed in another process, or on another machine, can replace it. Made by
    `Problem.curvature`.

    Args:
        problem: of the shard; its loss must be quadratic: only then is H the same everywhere.

    Raises:
        UnsupportedError: the loss is not quadratic.
    """

    def __init__(self, problem: Problem) -> None:
        require_quadratic(problem, "the curvature of a shard", "RescaledSquareLoss")
        self.problem = problem

    @property
    def samples(self) -> int:
        """N, the number of the shard's samples."""
        return self.problem.samples

    def __call__(self, direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """H v, named and shaped as v."""
        passes = self.problem.system
        product = passes.product(passes.layout.flat(direction, "the direction"))
        return passes.layout.named(product.mul_(self.samples))

    def preconditioner(self, rank: int | None = None) -> Callable[[Tensor], Tensor]:
        """An approximate inverse of H, up to a factor; also for H of similar shards."""
        return Preconditioner(self.problem.system, rank).at(None)


def require_quadratic(problem: Problem, what: str, way_out: str) -> None:
    """Raise UnsupportedError unless the loss is quadratic in the logits."""
    if not problem.quadratic:
        raise UnsupportedError(
            f"{what} needs a quadratic loss, got {problem.loss!r}: use {way_out}"
        )
