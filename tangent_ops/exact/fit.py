"""Fit a tangent model to the optimum, with a bound on what is left."""

from __future__ import annotations

import functools
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from tangent_ops.data import Data, check_integer
from tangent_ops.errors import ArgumentError, NotConvergedWarning
from tangent_ops.exact.checkpoint import Checkpoint, check_path
from tangent_ops.exact.layout import norm
from tangent_ops.exact.nystrom import check_rank, default_rank, preconditioner
from tangent_ops.exact.problem import Problem
from tangent_ops.exact.search import Search, identity
from tangent_ops.exact.tangent_kernel import solve_dual
from tangent_ops.losses import Loss
from tangent_ops.model.linearized import LinearizedModel

METHODS = ("cg", "dual")


@dataclass(frozen=True)
class ExactFit:
    """How a fit to the optimum ended.

    Attributes:
        converged: whether distance_bound <= tol * (‖Δ‖ - distance_bound), so that
            ‖Δ - Δ*‖ <= tol ‖Δ*‖.
        distance_bound: ‖∇F(Δ)‖ / l2, which ‖Δ - Δ*‖ cannot exceed, up to the rounding of the
            gradient; see `certify` for one in float64.
        gradient_norm: ‖∇F(Δ)‖, recomputed at the end.
        objective: F(Δ).
        iterations: of conjugate gradients, in all.
        newton_steps: quadratic models that were solved; one for a quadratic loss, and one more for
            each time rounding asked for another round.
        rank: of the preconditioner.
        samples: N.
        seconds: wall time.
    """

    converged: bool
    distance_bound: float
    gradient_norm: float
    objective: float
    iterations: int
    newton_steps: int
    rank: int
    samples: int
    seconds: float


def fit_exact(
    tangent: LinearizedModel,
    data: Data,
    l2: float,
    tol: float = 1e-3,
    *,
    loss: Loss | None = None,
    method: str = "cg",
    batch_size: int = 64,
    max_iterations: int = 1000,
    rank: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    cache: bool | str | os.PathLike[str] = False,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ExactFit:
    """Move the deltas to the minimum of mean loss + l2/2 ‖Δ‖², from where they are.

    The objective is that of `fit`. With a quadratic loss it is a ridge regression: conjugate
    gradients, one jvp and one vjp over the data to an iteration, in O(P) memory. With another
    convex loss, cross-entropy say, these are the steps of Newton's method, with a line search that
    costs no pass, for logits are linear in the step. It is strongly convex, so ‖∇F(Δ)‖ / l2 bounds
    the distance to the optimum (Boyd, Vandenberghe, "Convex Optimization", 2004, eq. 9.11).

    Args:
        tangent: its deltas are where it starts, and are set at the end.
        data: as in `fit`, read in the data set's own order; without random augmentation.
        l2: positive.
        tol: ends with ‖Δ - Δ*‖ <= tol ‖Δ*‖, guaranteed by that bound.
        loss: the mean over a batch of a convex loss of each sample; None for
            `RescaledSquareLoss()`.
        method: "cg"; or "dual": the kernel solution by the N C x N C matrix J Jᵀ, the empirical
            neural tangent kernel, for quadratic losses and N C up to some thousands, wherever the
            deltas are; what rounding leaves of it is removed by conjugate gradients.
        batch_size: of a Dataset; a DataLoader has its own.
        max_iterations: of conjugate gradients, in all.
        rank: of the Nyström preconditioner (`tangent_ops.exact.nystrom`); None for up to 64, as
            far as 1 GiB holds it; 0 for none.
        checkpoint: a file to go on from if it is there, and to keep up to date: after an
            interruption the result is the same, bit for bit on a CPU. It is removed at the end.
        checkpoint_every: iterations between two writings.
        cache: as in `fit`.
        device: moves the model there first.
        progress: show a progress bar.

    Returns:
        How it ended; see `ExactFit.converged`.

    Raises:
        ArgumentError: an argument other than these; a loss that is not convex, or not the mean of
            the samples' own, as class weights and ignored targets make it; a checkpoint of another
            problem.
        UnsupportedError: cache, for a model that cannot be split; dual, for another loss.
        NonFiniteLossError: the objective is NaN or infinite; the deltas are as before.

    Warns:
        NotConvergedWarning: the iterations were spent, or rounding ended the progress.
    """
    began = time.perf_counter()
    if method not in METHODS:
        raise ArgumentError(f"method must be one of {[*METHODS]}, got {method!r}")
    if not 0 < tol < 1:
        raise ArgumentError(f"tol must be between 0 and 1, got {tol}")
    check_integer("max_iterations", max_iterations, 1)
    check_integer("checkpoint_every", checkpoint_every, 1)
    check_rank(rank)
    if checkpoint is not None:
        check_path(checkpoint)
        if method == "dual":
            raise ArgumentError("checkpoint is for method='cg': the dual solution is one solve")
    problem = Problem(
        tangent,
        data,
        l2,
        loss,
        batch_size=batch_size,
        cache=cache,
        device=device,
        progress=progress,
    )
    start = problem.layout.flat(tangent.deltas(), "the start")
    file = None
    if method == "dual":
        start, rank = solve_dual(problem), 0
    else:
        rank = default_rank(problem) if rank is None else min(rank, problem.layout.size)
    make = functools.partial(preconditioner, problem, rank)
    search = Search(problem, start, tol, max_iterations, make)
    if checkpoint is not None:
        file = Checkpoint(Path(checkpoint), identity(problem, start, rank))
        search.keep(file, checkpoint_every)
    delta = search.run()
    value, gradient, _ = problem.gradient(delta)
    size, bound = norm(delta), norm(gradient) / problem.l2
    tangent.load_delta_dict(problem.layout.named(delta))
    if file is not None:
        file.remove()
    report = ExactFit(
        converged=bound <= tol * max(size - bound, 0.0),
        distance_bound=bound,
        gradient_norm=norm(gradient),
        objective=value,
        iterations=search.iterations,
        newton_steps=search.steps,
        rank=rank,
        samples=problem.samples,
        seconds=time.perf_counter() - began,
    )
    if not report.converged:
        warnings.warn(
            f"fit_exact stopped after {search.iterations} iterations at most {bound:.3g} from the "
            f"optimum, with ‖Δ‖ = {size:.3g}: raise max_iterations, tol or l2, or compute in "
            "float64",
            NotConvergedWarning,
            stacklevel=2,
        )
    return report
