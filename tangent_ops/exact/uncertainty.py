"""`predictive_covariance`: covariance of a tangent model's outputs, by linearized Laplace."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tangent_ops.errors import ArgumentError
from tangent_ops.exact.inverse import Inverse
from tangent_ops.exact.layout import norm
from tangent_ops.exact.problem import Problem
from tangent_ops.exact.progress import progress_bar


def predictive_covariance(
    problem: Problem,
    inputs: Tensor | Mapping[str, Tensor],
    noise_variance: float | None = None,
    *,
    tol: float = 1e-4,
    max_iterations: int = 1000,
    rank: int | None = None,
) -> Tensor:
    """σ² J(x) (Σ_i J_iᵀ A_i J_i + N l2 I)⁻¹ J(x)ᵀ: the outputs' covariance given the data.

    For a quadratic loss this is exactly the posterior covariance of Bayesian linear regression,
    with noise σ² A⁻¹ and prior N(0, σ² / (N l2)) for each parameter. For cross-entropy, with σ² = 1
    and A taken at the present deltas, it is the linearized Laplace approximation (Immer, Korzepa,
    Bauer: "Improving predictions of Bayesian neural nets via local linearization", AISTATS 2021).
    It is the covariance of f + J Δ, without the noise of a new observation. Each input takes C
    solves by conjugate gradients, of which several share the passes over the data.

    Args:
        problem: model, data, loss and penalty; the model at the optimum, as `fit_exact` leaves it.
        inputs: (M, ...), shaped as a batch of the data's inputs.
        noise_variance: σ², positive. None: for a quadratic loss twice the mean loss per output at
            the present deltas, which assumes that the loss can be zero; for others 1.
        tol: of a solve: ‖residual‖ <= tol ‖right-hand side‖.
        max_iterations: of each solve.
        rank: of the preconditioner, as in `fit_exact`.

    Returns:
        (M, C, C): float64, symmetric, for the C outputs of each input.

    Raises:
        ArgumentError: an argument out of range.
        ConvergenceError: a solve did not reach tol.
    """
    if noise_variance is not None and not noise_variance > 0:
        raise ArgumentError(f"noise_variance must be positive, got {noise_variance}")
    inverse = Inverse(problem, tol, max_iterations, rank)
    passes, outputs = inverse.passes, problem.outputs
    if noise_variance is None:
        mean_loss = inverse.value - problem.l2 / 2 * norm(inverse.delta) ** 2
        noise_variance = 2 * mean_loss / outputs if problem.quadratic else 1.0
    ones, together = list(problem.present(inputs).split(1)), passes.layout.together
    several = max(1, together // outputs)
    total = len(ones) * outputs
    found = []
    with progress_bar("uncertainty", "solve", total, passes.progress, inner=False) as bar:
        for start in range(0, len(ones), several):
            jacobians = [passes.jacobian.rows(one) for one in ones[start : start + several]]
            solved = []
            for some in torch.cat(jacobians).split(together):
                solved.append(inverse.many(some))
                bar.update(len(some))
            solved = torch.cat(solved).split(outputs)
            for rows, columns in zip(jacobians, solved, strict=True):
                covariance = rows.double() @ columns.double().T / problem.samples
                found.append((covariance + covariance.T) / 2)
    return noise_variance * torch.stack(found)
