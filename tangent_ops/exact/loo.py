"""Influence without the tangent kernel: scores of all samples, exact effects of a few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tangent_ops.exact.curvature import require_quadratic
from tangent_ops.exact.inverse import Inverse
from tangent_ops.exact.layout import dot
from tangent_ops.exact.passes import Passes
from tangent_ops.exact.problem import Problem, check_problem
from tangent_ops.exact.progress import progress_bar
from tangent_ops.losses import loss_gradient


def first_order_scores(
    problem: Problem,
    inputs: Tensor | Mapping[str, Tensor],
    targets: Tensor,
    *,
    tol: float = 1e-3,
    max_iterations: int = 1000,
    rank: int | None = None,
) -> Tensor:
    """The change of each input's loss when each sample is left out, to first order.

    The classical influence function, for any convex loss: for each input, one solve and one jvp
    over all samples. Several inputs share the passes over the data. The scores rank the samples;
    `leave_one_out` gives exact effects of a few, and `Influence` of all samples, if N C is small.

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
    passes, delta = inverse.passes, inverse.delta
    together = passes.layout.together
    ones = list(zip(problem.present(inputs).split(1), targets.split(1), strict=True))
    scores = []
    with progress_bar("first-order scores", "input", len(ones), passes.progress) as bar:
        for start in range(0, len(ones), together):
            some = ones[start : start + together]
            rights = [_loss_gradient(problem, passes, delta, *one) for one in some]
            solved = inverse.many(torch.stack(rights))
            # The objective is then over N - 1 samples: a sample's share of the penalty goes, too.
            own = problem.l2 * torch.tensor([dot(x, delta) for x in solved]).double()
            found = []
            for (_, labels), before, moves in zip(
                passes.batches(), inverse.logits, passes.tangents_many(solved), strict=True
            ):
                _, gradient = loss_gradient(problem.loss, before, labels)
                found.append((len(before) * gradient * moves).flatten(2).double().sum(dim=2))
            found = torch.cat(found, dim=1).T
            scores.append((found + own.to(found.device)) / problem.samples)
            bar.update(len(some))
    return torch.cat(scores, dim=1)


def _loss_gradient(
    problem: Problem, passes: Passes, delta: Tensor, one: Any, target: Tensor
) -> Tensor:
    """The gradient of an input's loss by the deltas, flat."""

    def cotangent(primal: Tensor, tangent: Tensor) -> Tensor:
        return loss_gradient(problem.loss, primal + tangent, target.to(primal.device))[1]

    parts = passes.jacobian.pull_back(delta, one, cotangent)
    return torch.cat([part.reshape(-1) for part in parts])


def leave_one_out(
    problem: Problem,
    ids: Sequence[int],
    inputs: Tensor | Mapping[str, Tensor],
    *,
    tol: float = 1e-4,
    max_iterations: int = 1000,
    rank: int | None = None,
) -> Tensor:
    """f₋ᵢ(x) - f(x), exactly, for a few samples i: one solve each, for models of any size.

    Several solves share the passes over the data; in each, the Hessian leaves its sample out.

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
    problem.without(ids[:1])  # refuses a single sample
    inverse = Inverse(problem, tol, max_iterations, rank)
    inverse.check_optimum()
    jacobian, together = inverse.passes.jacobian, inverse.passes.layout.together
    inputs = problem.present(inputs)
    changes = []
    with progress_bar("leave one out", "sample", len(ids), inverse.passes.progress) as bar:
        for start in range(0, len(ids), together):
            some = ids[start : start + together]
            steps = inverse.many(inverse.gradients_without(some).neg_(), without=some)
            changes.append(jacobian.outputs_many(steps, inputs)[1].double())
            bar.update(len(some))
    return torch.cat(changes)
