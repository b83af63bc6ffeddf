"""How sure a tangent model's outputs are: the linearized Laplace approximation."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from tqdm import tqdm

from tangent_ops.data import Data, check_integer
from tangent_ops.errors import ArgumentError
from tangent_ops.exact.conjugate import solve
from tangent_ops.exact.layout import norm
from tangent_ops.exact.nystrom import preconditioner
from tangent_ops.exact.problem import Problem
from tangent_ops.losses import Loss
from tangent_ops.model.linearized import LinearizedModel


def predictive_covariance(
    tangent: LinearizedModel,
    data: Data,
    l2: float,
    inputs: Tensor,
    noise_variance: float | None = None,
    *,
    loss: Loss | None = None,
    tol: float = 1e-4,
    batch_size: int = 64,
    max_iterations: int = 1000,
    rank: int | None = None,
    cache: bool | str | os.PathLike[str] = False,
    progress: bool = True,
) -> Tensor:
    """σ² J(x) (Σ_i J_iᵀ A_i J_i + N l2 I)⁻¹ J(x)ᵀ: the outputs' covariance given the data.

    For a quadratic loss this is the posterior of Bayesian linear regression, exactly, with noise
    σ² A⁻¹ and prior N(0, σ² / (N l2)) for each parameter; for cross-entropy, with σ² = 1 and A
    taken at the present deltas, the linearized Laplace approximation (Immer, Korzepa, Bauer:
    "Improving predictions of Bayesian neural nets via local linearization", AISTATS 2021). It is
    the covariance of f + J Δ itself, without the noise of a new observation. C solves by conjugate
    gradients to an input, of one jvp and one vjp over the data to an iteration.

    Args:
        tangent: the model, at the optimum of `fit_exact` for these data and l2.
        data: as in `fit_exact`.
        l2: as in `fit_exact`.
        inputs: (M, ...), shaped as a batch of the data's inputs.
        noise_variance: σ², positive. None: 1, except for a quadratic loss: twice the mean loss at
            the present deltas, by output, which assumes that the loss can be zero.
        loss: as in `fit_exact`.
        tol: of a solve: ‖residual‖ <= tol ‖right-hand side‖.
        batch_size: as in `fit_exact`.
        max_iterations: of each solve.
        rank: as in `fit_exact`.
        cache: as in `fit_exact`; inputs then go through the frozen part, too.
        progress: show a progress bar.

    Returns:
        (M, C, C): float64, symmetric, for the C outputs of each input.

    Raises:
        ArgumentError: as in `fit_exact`; noise_variance is not positive.
        ConvergenceError: a solve did not reach tol.
    """
    if noise_variance is not None and not noise_variance > 0:
        raise ArgumentError(f"noise_variance must be positive, got {noise_variance}")
    if not 0 < tol < 1:
        raise ArgumentError(f"tol must be between 0 and 1, got {tol}")
    check_integer("max_iterations", max_iterations, 1)
    problem = Problem(
        tangent, data, l2, loss, batch_size=batch_size, cache=cache, progress=progress
    )
    delta = problem.layout.flat(tangent.deltas())
    value, _, logits = problem.gradient(delta)
    at = None if problem.quadratic else logits
    if noise_variance is None:
        mean_loss = value - problem.l2 / 2 * norm(delta) ** 2
        noise_variance = 2 * mean_loss / logits[0][0].numel() if problem.quadratic else 1.0
    precondition = preconditioner(problem, rank)
    inputs = problem.entering(inputs)
    outputs = logits[0][0].numel()
    found = []
    bar = tqdm(total=len(inputs) * outputs, desc="uncertainty", unit="solve", disable=not progress)
    with bar:
        for one in inputs[:, None]:
            rows = problem.jacobian.rows(one)
            columns = []
            for row in rows:
                solved = solve(
                    lambda v: problem.product(v, at), row, tol, max_iterations, precondition
                )
                columns.append(rows.double() @ solved.double())
                bar.update()
            covariance = torch.stack(columns, dim=1) / problem.samples
            found.append((covariance + covariance.T) / 2)
    return noise_variance * torch.stack(found)
