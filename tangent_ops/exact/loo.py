"""Influence without the tangent kernel: scores of all samples, exact effects of a few."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from tangent_ops.exact.curvature import require_quadratic
from tangent_ops.exact.inverse import Inverse
from tangent_ops.exact.layout import dot
from tangent_ops.exact.problem import Problem, check_problem
from tangent_ops.losses import loss_gradient


def first_order_scores(
    problem: Problem,
    inputs: Tensor,
    targets: Tensor,
    *,
    tol: float = 1e-3,
    max_iterations: int = 1000,
    rank: int | None = None,
) -> Tensor:
    """The change of each input's loss when each sample is left out, to first order.

    The classical influence function, for any convex loss: for each input, one solve and one pass
    over all samples. The scores rank the samples; `leave_one_out` gives exact effects of a few, and
    `Influence` of all samples, if N C is small.

    Args:
        problem: model, data, loss and penalty; the model at the optimum, as `fit_exact` leaves it.
        inputs: (M, ...), a batch.
        targets: (M, ...), the inputs' targets.
        tol: of a solve: ‖residual‖ <= tol ‖right-hand side‖.
        max_iterations: of each solve.
        rank: of the preconditioner, as in `fit_exact`.

    Returns:
        (N, M): float64. Positive: the loss is higher without the sample, so the sample helped.

    Raises:
        ArgumentError: an argument out of range; the model is not at that optimum.
        ConvergenceError: a solve did not reach tol.
    """
    inverse = Inverse(problem, tol, max_iterations, rank)
    inverse.check_optimum()
    passes, delta = problem.system, inverse.delta
    scores = []
    for one, target in zip(problem.present(inputs).split(1), targets.split(1), strict=True):

        def cotangent(primal: Tensor, tangent: Tensor, target: Tensor = target) -> Tensor:
            return loss_gradient(problem.loss, primal + tangent, target.to(primal.device))[1]

        parts = passes.jacobian.pull_back(delta, one, cotangent)
        solved = inverse(torch.cat([part.reshape(-1) for part in parts]))
        # The objective is then over N - 1 samples: one sample's share of the penalty goes, too.
        own = problem.l2 * dot(solved, delta)
        found = []
        for (_, labels), before, move in zip(
            passes.batches(), inverse.logits, passes.tangents(solved), strict=True
        ):
            _, gradient = loss_gradient(problem.loss, before, labels)
            found.append((len(before) * gradient * move).flatten(1).double().sum(dim=1))
        scores.append((torch.cat(found) + own) / problem.samples)
    return torch.stack(scores, dim=1)


def leave_one_out(
    problem: Problem,
    ids: Sequence[int],
    inputs: Tensor,
    *,
    tol: float = 1e-4,
    max_iterations: int = 1000,
    rank: int | None = None,
) -> Tensor:
    """f₋ᵢ(x) - f(x), exactly, for a few samples i: one solve each, for models of any size.

    Args:
        problem: as in `first_order_scores`, with a quadratic loss. The fits without a sample have
            the same l2.
        ids: which samples to leave out, one at a time: indices in the data set.
        inputs: (M, ...), a batch.
        tol: as in `first_order_scores`.
        max_iterations: as in `first_order_scores`.
        rank: as in `first_order_scores`.

    Returns:
        (len(ids), M, ...): float64, each shaped as the model's output.

    Raises:
        ArgumentError: an argument out of range; a single sample; the model is not at the optimum.
        UnsupportedError: the loss is not quadratic.
        ConvergenceError: a solve did not reach tol.
    """
    check_problem(problem)
    require_quadratic(problem, "leave_one_out", "forget_samples")
    problem.check_ids(ids)
    rests = [problem.without([index]).system for index in ids]
    inverse = Inverse(problem, tol, max_iterations, rank)
    inverse.check_optimum()
    inputs = problem.present(inputs)
    changes = []
    bar = tqdm(rests, "leave one out", delay=2, leave=False, disable=not problem.passes.progress)
    for rest in bar:
        _, gradient, _ = rest.gradient(inverse.delta)
        step = inverse(gradient.neg_(), rest)
        changes.append(rest.jacobian.outputs(step, inputs)[1].double())
    return torch.stack(changes)
