"""Preconditioned conjugate gradients, with a `State` that can be saved between iterations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_ops.errors import ArgumentError, ConvergenceError
from tangent_ops.exact.layout import dot, norm
from tangent_ops.exact.progress import progress_bar

Product = Callable[[Tensor], Tensor]  # of one vector (P,) or, for several at a time, (R, P)


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
        return cls._start(right, precondition(right))

    @classmethod
    def _start(cls, right: Tensor, preconditioned: Tensor) -> State:
        rz = dot(right, preconditioned)
        return cls(right.new_zeros(right.shape), right.clone(), preconditioned.clone(), rz)

    def advance(self, product: Product, precondition: Product) -> None:
        """Do one iteration, in place.

        Raises:
            ArgumentError: the direction has no positive curvature: the loss is not convex.
        """
        self._move(product(self.search))
        self._turn(precondition(self.residual))

    def _move(self, image: Tensor) -> None:
        """Go along the search direction, whose product with H is the image."""
        curvature = dot(self.search, image)
        if not curvature > 0:
            raise ArgumentError(
                f"the objective has a curvature of {curvature:.3g} along a direction, not a "
                "positive one: the loss must be convex in the logits"
            )
        step = self.rz / curvature
        self.x.add_(self.search, alpha=step)
        self.residual.sub_(image, alpha=step)

    def _turn(self, preconditioned: Tensor) -> None:
        """Choose the next search direction from the preconditioned residual."""
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
    """`solve_many` for one system, with vectors (P,)."""

    def products(vectors: Tensor, which: list[int]) -> Tensor:
        return product(vectors[0])[None]

    def preconditions(vectors: Tensor) -> Tensor:
        return precondition(vectors[0])[None]

    return solve_many(products, right[None], tol, max_iterations, preconditions)[0]


def solve_many(
    product: Callable[[Tensor, list[int]], Tensor],
    rights: Tensor,
    tol: float,
    max_iterations: int,
    precondition: Product,
    progress: bool = False,
) -> Tensor:
    """Solve H_r x_r = b_r until ‖b_r - H_r x_r‖ <= tol ‖b_r‖, by the recurrence; x is (R, P).

    Each system has conjugate gradients of its own, and leaves when it has converged; all share the
    passes over the data.

    Args:
        product: vectors (O, P), and the indices r of their systems, to H_r times each.
        rights: b, (R, P).
        tol: of each solve.
        max_iterations: of each solve.
        precondition: of all systems; takes (O, P).
        progress: show a bar, which counts iterations.

    Raises:
        ArgumentError: as in `State.advance`.
        ConvergenceError: max_iterations did not suffice.
    """
    goals = [tol * norm(right) for right in rights]
    pairs = zip(rights, precondition(rights), strict=True)
    states = [State._start(right, preconditioned) for right, preconditioned in pairs]
    iterations = 0
    with progress_bar("solve", "iteration", None, progress) as bar:
        while left := [r for r, s in enumerate(states) if s.residual_norm > goals[r]]:
            if iterations == max_iterations:
                worst = max(states[r].residual_norm / norm(rights[r]) for r in left)
                raise ConvergenceError(
                    f"a solve did not reach tol={tol:g} in {max_iterations} iterations, but "
                    f"{worst:.1e}: raise max_iterations, tol or l2"
                )
            bar.set_postfix(open=f"{len(left)} of {len(states)}", refresh=False)
            images = product(torch.stack([states[r].search for r in left]), left)
            for r, image in zip(left, images, strict=True):
                states[r]._move(image)
            del images
            residuals = precondition(torch.stack([states[r].residual for r in left]))
            for r, preconditioned in zip(left, residuals, strict=True):
                states[r]._turn(preconditioned)
            iterations += 1
            bar.update()
    return torch.stack([state.x for state in states])
