"""`Inverse`: solves with the Hessian of a problem at the model's present deltas."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from tangent_ops.data import check_integer
from tangent_ops.errors import ArgumentError
from tangent_ops.exact.conjugate import Product, solve_many
from tangent_ops.exact.layout import norm
from tangent_ops.exact.preconditioner import Preconditioner, check_rank
from tangent_ops.exact.problem import Problem, check_problem, check_tolerance


class Inverse:
    """H⁻¹ times vectors by preconditioned conjugate gradients, with H as in `Passes`.

    Args:
        problem: its Hessian is used, at the model's present deltas.
        tol: of a solve: ‖residual‖ <= tol ‖right-hand side‖.
        max_iterations: of each solve.
        rank: of the preconditioner, as in `fit_exact`.

    Attributes:
        delta: the present deltas, flat.
        value: F at these deltas.
        logits: of every batch, at these deltas.
        at: these logits, or None for a quadratic loss: see `Passes.product`.

    Raises:
        ArgumentError: an invalid argument.
    """

    def __init__(self, problem: Problem, tol: float, max_iterations: int, rank: int | None) -> None:
        check_problem(problem)
        check_tolerance(tol)
        check_integer("max_iterations", max_iterations, 1)
        check_rank(rank)
        self.passes = problem.system
        self._tol, self._max_iterations, self._rank = tol, max_iterations, rank
        self.delta = problem.flat()
        self.value, self._gradient, self.logits = self.passes.gradient(self.delta)
        self.at = None if problem.quadratic else self.logits

    def many(self, rights: Tensor, without: Sequence[int] | None = None) -> Tensor:
        """Solve H x_r = b_r for R right-hand sides, (R, P), which share the passes over the data.

        Memory is bounded if R <= `Layout.together`.

        Args:
            rights: b, (R, P).
            without: R indices; system r has the Hessian without this sample.

        Raises:
            ConvergenceError: the tolerance was not reached.
        """

        def product(vectors: Tensor, which: list[int]) -> Tensor:
            left_out = None if without is None else [without[r] for r in which]
            return self.passes.products(vectors, self.at, without=left_out)

        limits, progress = (self._tol, self._max_iterations), self.passes.progress
        return solve_many(product, rights, *limits, self._precondition, progress)

    def gradients_without(self, ids: Sequence[int]) -> Tensor:
        """Gradients of the objectives without one sample each, (R, P), at the present deltas."""
        n = self.passes.samples
        own = [self.passes.take([index]).gradient(self.delta)[1] for index in ids]
        return torch.stack([(n * self._gradient - gradient) / (n - 1) for gradient in own])

    def check_optimum(self) -> None:
        """Raise ArgumentError if the deltas may be far from the problem's optimum."""
        l2, size = self.passes.l2, norm(self.delta)
        bound = norm(self._gradient) / l2
        if bound > 0.1 * size:
            raise ArgumentError(
                f"the model may be {bound:.3g} from the optimum for these data and l2={l2:g}, "
                f"with ‖Δ‖ = {size:.3g}: the result would be for another fit. Use fit_exact first"
            )

    @functools.cached_property
    def _precondition(self) -> Product:
        return Preconditioner(self.passes, self._rank).at(self.at)
