"""`Inverse`: solves with the Hessian of a problem at the model's present deltas."""

from __future__ import annotations

import functools

from torch import Tensor

from tangent_ops.data import check_integer
from tangent_ops.errors import ArgumentError
from tangent_ops.exact.conjugate import Product, solve
from tangent_ops.exact.layout import norm
from tangent_ops.exact.passes import Passes
from tangent_ops.exact.preconditioner import Preconditioner, check_rank
from tangent_ops.exact.problem import Problem, check_problem, check_tolerance


class Inverse:
    """v -> H⁻¹ v by preconditioned conjugate gradients, with H as in `Passes`.

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

    def __call__(self, right: Tensor, passes: Passes | None = None) -> Tensor:
        """Solve H x = right, or with the Hessian of other passes that are nearly the same.

        Raises:
            ConvergenceError: the tolerance was not reached.
        """
        passes = self.passes if passes is None else passes

        def product(vector: Tensor) -> Tensor:
            return passes.product(vector, self.at)

        return solve(product, right, self._tol, self._max_iterations, self._precondition)

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
