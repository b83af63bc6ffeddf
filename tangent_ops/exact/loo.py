"""Influence without a kernel matrix: a ranking of all samples, and the exact effect of a few."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from tangent_ops.data import Data, check_integer
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.exact.conjugate import solve
from tangent_ops.exact.layout import dot, norm
from tangent_ops.exact.nystrom import preconditioner
from tangent_ops.exact.problem import Problem
from tangent_ops.losses import Loss, loss_gradient
from tangent_ops.model.linearized import LinearizedModel


def first_order_scores(
    tangent: LinearizedModel,
    data: Data,
    l2: float,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Loss | None = None,
    tol: float = 1e-3,
    batch_size: int = 64,
    max_iterations: int = 1000,
    rank: int | None = None,
    cache: bool | str | os.PathLike[str] = False,
    progress: bool = True,
) -> Tensor:
    """What leaving out each sample does to the loss of each input, to first order.

    The classical influence function, for any convex loss: one solve to an input and one pass for
    all samples. It ranks them; `leave_one_out` then gives the exact effect of the first few, and
    `Influence` that of all where N C is small.

    Args:
        tangent: the model, at the optimum of `fit_exact` for these data and l2.
        data: as in `fit_exact`.
        l2: as in `fit_exact`.
        inputs: (M, ...), a batch.
        targets: (M, ...), theirs.
        loss: as in `fit_exact`.
        tol: of a solve: ‖residual‖ <= tol ‖right-hand side‖.
        batch_size: as in `fit_exact`.
        max_iterations: of each solve.
        rank: as in `fit_exact`.
        cache: as in `fit_exact`; inputs then go through the frozen part, too.
        progress: show progress bars.

    Returns:
        (N, M): float64. Positive: the sample helped, the loss is higher without it.

    Raises:
        ArgumentError: as in `fit_exact`; or the model is not at that optimum.
        ConvergenceError: a solve did not reach tol.
    """
    problem = Problem(
        tangent, data, l2, loss, batch_size=batch_size, cache=cache, progress=progress
    )
    delta = problem.layout.flat(tangent.deltas())
    logits = _at_optimum(problem, delta)
    at = None if problem.quadratic else logits
    precondition = preconditioner(problem, rank)
    scores = []
    for one, target in zip(problem.entering(inputs)[:, None], targets[:, None], strict=True):

        def cotangent(primal: Tensor, tangent: Tensor, target: Tensor = target) -> Tensor:
            return loss_gradient(problem.loss, primal + tangent, target.to(primal.device))[1]

        parts = problem.jacobian.pull_back(delta, one, cotangent)
        right = torch.cat([part.reshape(-1) for part in parts])
        solved = solve(lambda v: problem.product(v, at), right, tol, max_iterations, precondition)
        # The penalty weighs N - 1 samples then: the gradient of l2/2 ‖Δ‖² goes with the sample.
        own = l2 * dot(solved, delta)
        found = []
        for (_, labels), before, move in zip(
            problem.batches(), logits, problem.tangents(solved), strict=True
        ):
            _, gradient = loss_gradient(problem.loss, before, labels)
            found.append((len(before) * gradient * move).flatten(1).double().sum(dim=1))
        scores.append((torch.cat(found) + own) / problem.samples)
    return torch.stack(scores, dim=1)


def leave_one_out(
    tangent: LinearizedModel,
    data: Data,
    l2: float,
    indices: Sequence[int],
    inputs: Tensor,
    *,
    loss: Loss | None = None,
    tol: float = 1e-4,
    batch_size: int = 64,
    max_iterations: int = 1000,
    rank: int | None = None,
    cache: bool | str | os.PathLike[str] = False,
    progress: bool = True,
) -> Tensor:
    """f₋ᵢ(x) - f(x), exactly, for a few samples i: one solve each, at any size of the model.

    Args:
        tangent: the model, at the optimum of `fit_exact` for these data and l2.
        data: as in `fit_exact`.
        l2: as in `fit_exact`; also of the fits without a sample.
        indices: which samples to leave out, one at a time.
        inputs: (M, ...), a batch.
        loss: as in `fit_exact`, quadratic.
        tol: of a solve: ‖residual‖ <= tol ‖right-hand side‖.
        batch_size: as in `fit_exact`.
        max_iterations: of each solve.
        rank: as in `fit_exact`.
        cache: as in `fit_exact`; inputs then go through the frozen part, too.
        progress: show progress bars.

    Returns:
        (len(indices), M, ...): float64, each shaped as the model's output.

    Raises:
        ArgumentError: as in `fit_exact`; the model is not at that optimum; an index that is out of
            range, or a single sample.
        UnsupportedError: the loss is not quadratic.
        ConvergenceError: a solve did not reach tol.
    """
    problem = Problem(
        tangent, data, l2, loss, batch_size=batch_size, cache=cache, progress=progress
    )
    if not problem.quadratic:
        raise UnsupportedError("leave_one_out needs a quadratic loss: use forget_samples")
    for index in indices:
        check_integer("each index", index, 0)
        if index >= problem.samples:
            raise ArgumentError(f"index {index}: data has {problem.samples} samples")
    delta = problem.layout.flat(tangent.deltas())
    rests = [problem.without(index) for index in indices]
    _at_optimum(problem, delta)
    precondition = preconditioner(problem, rank)
    inputs = problem.entering(inputs)
    changes = []
    for rest in tqdm(rests, "leave one out", delay=2, leave=False, disable=not progress):
        _, gradient, _ = rest.gradient(delta)
        step = solve(rest.product, gradient.neg_(), tol, max_iterations, precondition)
        changes.append(problem.jacobian.outputs(step, inputs)[1].double())
    return torch.stack(changes)


def _at_optimum(problem: Problem, delta: Tensor) -> list[Tensor]:
    """The logits of every batch; raises ArgumentError if the fit is not at its optimum."""
    _, gradient, logits = problem.gradient(delta)
    bound, size = norm(gradient) / problem.l2, norm(delta)
    if bound > 0.1 * size:
        raise ArgumentError(
            f"the model may be {bound:.3g} from the optimum for these data and l2={problem.l2:g}, "
            f"with ‖Δ‖ = {size:.3g}: effects would be against another fit. Use fit_exact first"
        )
    return logits
