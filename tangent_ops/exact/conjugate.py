"""Preconditioned conjugate gradients, with a `State` that can be saved between iterations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tangent_ops.errors import ArgumentError, ConvergenceError
from tangent_ops.exact.layout import dot, norm

Product = Callable[[Tensor], Tensor]


def unpreconditioned(vector: Tensor) -> Tensor:
    """The vector itself."""
    return vector


@dataclass
class State:
    """Where a solve of H x = b stands. Source: Saad, "Iterative Methods", 2003, algorithm 9.1.

    Attributes:
        x: the solution so far.
        residual: b - H x, by the recurrence.
        search: the next direction.
        rz: residual times preconditioned residual.
        iterations: how many are done.
    """

    x: Tensor
    residual: Tensor
    search: Tensor
    rz: float
    iterations: int = 0

    @classmethod
    def start(cls, right: Tensor, precondition: Product) -> State:
        """At x = 0."""
        preconditioned = precondition(right)
        rz = dot(right, preconditioned)
        return cls(right.new_zeros(right.shape), right.clone(), preconditioned.clone(), rz)

    def advance(self, product: Product, precondition: Product) -> None:
        """Do one iteration, in place.

        Raises:
            ArgumentError: the direction has no positive curvature: the loss is not convex.
        """
        image = product(self.search)
        curvature = dot(self.search, image)
        if not curvature > 0:
            raise ArgumentError(
                f"the objective has a curvature of {curvature:.3g} along a direction, not a "
                "positive one: the loss must be convex in the logits"
            )
        step = self.rz / curvature
        self.x.add_(self.search, alpha=step)
        self.residual.sub_(image, alpha=step)
        del image
        preconditioned = precondition(self.residual)
        rz = dot(self.residual, preconditioned)
        self.search.mul_(rz / self.rz).add_(preconditioned)
        self.rz = rz
        self.iterations += 1

    @property
    def residual_norm(self) -> float:
        return norm(self.residual)


def solve(
    product: Product, right: Tensor, tol: float, max_iterations: int, precondition: Product
) -> Tensor:
    """Solve H x = b until ‖b - H x‖ <= tol ‖b‖, by the recurrence.

    Raises:
        ConvergenceError: max_iterations did not suffice.
    """
    state, goal = State.start(right, precondition), tol * norm(right)
    while state.residual_norm > goal:
        if state.iterations == max_iterations:
            raise ConvergenceError(
                f"a solve did not reach tol={tol:g} in {max_iterations} iterations, but "
                f"{state.residual_norm / norm(right):.1e}: raise max_iterations, tol or l2"
            )
        state.advance(product, precondition)
    return state.x
