"""`Search`: Newton's method by conjugate gradients; a quadratic loss needs one step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from tqdm.auto import tqdm

from tangent_ops.exact.checkpoint import Checkpoint
from tangent_ops.exact.conjugate import State
from tangent_ops.exact.layout import dot, norm
from tangent_ops.exact.passes import Passes
from tangent_ops.exact.preconditioner import Preconditioner
from tangent_ops.exact.progress import progress_bar
from tangent_ops.losses import loss_gradient

SAFETY = 0.8  # of the tolerance; the true residual is slightly larger than the recurrence's
HALVINGS = 30


class Search:
    """Minimises an objective from a start; its state can be saved between any two iterations.

    Args:
        passes: over the data; their objective is minimised.
        start: the first delta, flat.
        tol: ends where ‖∇F‖ / l2 <= tol (‖Δ‖ - ‖∇F‖ / l2).
        max_iterations: of conjugate gradients, in all.
        preconditioner: of the Hessian.

    Attributes:
        delta: the present delta, flat.
        iterations: how many iterations of conjugate gradients are done.
        steps: how many steps of Newton's method have begun.
    """

    def __init__(
        self,
        passes: Passes,
        start: Tensor,
        tol: float,
        max_iterations: int,
        preconditioner: Preconditioner,
    ) -> None:
        self.passes = passes
        self.delta = start.clone()
        self.tol = tol
        self.max_iterations = max_iterations
        self._preconditioner = preconditioner
        self.iterations = 0
        self.steps = 0
        self._solve: State | None = None  # of the unfinished step
        self._last = float("inf")  # norm of the gradient at the last step's start
        self._gained = False  # whether the last step's decrease of F was more than rounding
        self._checkpoint: Checkpoint | None = None
        self._every = 0

    def keep(self, checkpoint: Checkpoint, every: int) -> None:
        """Resume from a checkpoint's file, if there is one; `run` then updates it."""
        self._checkpoint, self._every = checkpoint, every
        found = checkpoint.read()
        if found is None:
            return
        tensors, numbers = found
        tensors = {name: tensor.to(self.delta.device) for name, tensor in tensors.items()}
        self.delta = tensors["delta"]
        self.iterations, self.steps = int(numbers["iterations"]), int(numbers["steps"])
        self._last, self._gained = float.fromhex(numbers["last"]), numbers["gained"] == "True"
        if "x" in tensors:
            x, residual, search = (tensors[name] for name in ("x", "residual", "search"))
            rz, inner = float.fromhex(numbers["rz"]), int(numbers["inner"])
            self._solve = State(x, residual, search, rz, inner)

    def run(self) -> Tensor:
        """Search until the bound holds, max_iterations are done or rounding prevents progress."""
        bar = progress_bar("exact fit", "iteration", None, self.passes.progress, inner=False)
        with bar:
            bar.update(self.iterations)
            while True:
                value, gradient, logits = self.passes.gradient(self.delta)
                size, slope = norm(self.delta), norm(gradient)
                bar.set_postfix(bound=f"{slope / self.passes.l2:.2g}", refresh=False)
                resumed = self._solve is not None
                if not resumed and self._ends(size, slope):
                    return self.delta
                at = None if self.passes.quadratic else logits
                step = self._step(gradient.neg_(), at, bar)
                if self.passes.quadratic:
                    self.delta.add_(step)
                elif not self._line_search(step, value, gradient, logits):
                    return self.delta
                self._save()

    def _ends(self, size: float, slope: float) -> bool:
        bound = slope / self.passes.l2
        reached = bound <= self.tol * (size - bound) or slope == 0
        # After a solve of a quadratic problem only rounding errors remain: further solves remove
        # them, until one gains no digit.
        stalled = slope > self._last / 2 and not self._gained
        self._last = slope
        return reached or stalled or self.iterations >= self.max_iterations

    def _step(self, right: Tensor, at: Sequence[Tensor] | None, bar: tqdm) -> Tensor:
        """Solve H step = right to the residual that the tolerance needs."""
        precondition = self._preconditioner.at(at)
        if self._solve is None:
            self._solve = State.start(right, precondition)
            self.steps += 1
        solve = self._solve
        size = norm(right)
        while self.iterations < self.max_iterations:
            left = solve.residual_norm
            bar.set_postfix(bound=f"{left / self.passes.l2:.2g}", refresh=False)
            # If the next step has another Hessian, this step may be inexact (Dembo, Eisenstat,
            # Steihaug: "Inexact Newton Methods", 1982).
            inexact = 0.0 if self.passes.quadratic else 0.1 * size
            if left <= max(self._goal(solve), inexact):
                break
            solve.advance(lambda v: self.passes.product(v, at), precondition)
            self.iterations += 1
            bar.update()
            if self._every and self.iterations % self._every == 0:
                self._save()
        self._solve = None
        return solve.x

    def _goal(self, solve: State) -> float:
        """The residual at which the bound holds for Δ + x."""
        x, delta = solve.x, self.delta
        size = (dot(delta, delta) + 2 * dot(delta, x) + dot(x, x)) ** 0.5
        return SAFETY * self.passes.l2 * size * self.tol / (1 + self.tol)

    def _line_search(
        self, step: Tensor, value: float, right: Tensor, logits: Sequence[Tensor]
    ) -> bool:
        """Move along the step, if a length decreases F enough (Armijo); False if none does."""
        moves = self.passes.tangents(step)
        slope = -dot(right, step)
        squares = [dot(self.delta, self.delta), dot(self.delta, step), dot(step, step)]
        rounding = 1e-14 * abs(value) if step.element_size() == 8 else 1e-6 * abs(value)
        length = 1.0
        for _ in range(HALVINGS):
            penalty = squares[0] + 2 * length * squares[1] + length**2 * squares[2]
            found = self.passes.l2 / 2 * penalty
            for (_, targets), before, move in zip(
                self.passes.batches(), logits, moves, strict=True
            ):
                loss, _ = loss_gradient(self.passes.loss, before + length * move, targets)
                found += len(targets) / self.passes.samples * loss
            if found <= value + 1e-4 * length * slope + rounding:
                self.delta.add_(step, alpha=length)
                self._gained = found < value - rounding
                return True
            length /= 2
        return False

    def _save(self) -> None:
        if self._checkpoint is None:
            return
        tensors = {"delta": self.delta}
        numbers = {"iterations": str(self.iterations), "steps": str(self.steps)}
        numbers |= {"last": self._last.hex(), "gained": str(self._gained)}
        if self._solve is not None:
            solve = self._solve
            tensors |= {"x": solve.x, "residual": solve.residual, "search": solve.search}
            numbers |= {"rz": solve.rz.hex(), "inner": str(solve.iterations)}
        self._checkpoint.write(tensors, numbers)
