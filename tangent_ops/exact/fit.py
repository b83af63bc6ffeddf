"""`fit_exact`: fits a tangent model to the optimum, with a bound on the remaining distance."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tangent_ops.data import check_integer
from tangent_ops.errors import ArgumentError, NotConvergedWarning, UnsupportedError
from tangent_ops.exact.checkpoint import Checkpoint
from tangent_ops.exact.layout import norm
from tangent_ops.exact.passes import Passes
from tangent_ops.exact.preconditioner import Preconditioner, check_rank, is_stored
from tangent_ops.exact.problem import Problem, check_problem, check_tolerance
from tangent_ops.exact.search import Search
from tangent_ops.exact.subset import ROWS
from tangent_ops.exact.tangent_kernel import solve_dual
from tangent_ops.files import bytes_of, check_target
from tangent_ops.losses import loss_name

METHODS = ("auto", "cg", "dual")


@dataclass(frozen=True)
class ExactFit:
    """How a fit to the optimum ended.

    Attributes:
        converged: whether distance_bound <= tol * (‖Δ‖ - distance_bound), so that
            ‖Δ - Δ*‖ <= tol ‖Δ*‖.
        distance_bound: ‖∇F(Δ)‖ / l2, a bound on ‖Δ - Δ*‖ up to the rounding of the gradient; see
            `certify` for one in float64.
        gradient_norm: ‖∇F(Δ)‖, recomputed at the end.
        objective: F(Δ).
        iterations: of conjugate gradients, in all.
        newton_steps: steps of Newton's method; for a quadratic loss one, and one more for each
            further solve that removes rounding errors.
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
    problem: Problem,
    tol: float = 1e-3,
    *,
    method: str = "auto",
    max_iterations: int = 1000,
    rank: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
) -> ExactFit:
    """Move the model's deltas to the minimum of mean loss + l2/2 ‖Δ‖².

    The objective is that of `fit`. With a quadratic loss it is a ridge regression, solved by
    conjugate gradients; by passes, in O(P) memory, with one jvp and one vjp over the data per
    iteration. With another convex loss, such as cross-entropy, conjugate gradients solve the steps
    of Newton's method; its line search needs one jvp over the data, as logits are linear in the
    step. The objective is strongly convex, so ‖∇F(Δ)‖ / l2 bounds the distance to the optimum
    (Boyd, Vandenberghe, "Convex Optimization", 2004, eq. 9.11).

    Args:
        problem: model, data, loss and penalty. The present deltas are the start.
        tol: ends with ‖Δ - Δ*‖ <= tol ‖Δ*‖, guaranteed by that bound.
        method: "cg": conjugate gradients, with products as `Problem.representation` says. "dual":
            solve with the N C x N C matrix J Jᵀ, the tangent kernel, for quadratic losses and N C
            up to some thousands, whatever the present deltas are; conjugate gradients then remove
            rounding errors. "auto": dual, if J is kept as layer factors of up to 2,000 rows; else
            cg, whose preconditioner then inverts the Hessian of 2,000 rows exactly.
        max_iterations: of conjugate gradients, in all.
        rank: of the preconditioner (`tangent_ops.exact.preconditioner`). With layer factors, rows
            of J whose Hessian is inverted; None for up to 2,000. By passes, rank of Nyström's; None
            for up to 64, as far as 1 GiB holds it. 0 for none.
        checkpoint: a file: the fit resumes from it if it exists, updates it, and removes it at the
            end. A resumed fit has the same result, bit for bit on a CPU.
        checkpoint_every: iterations between two writes.

    Returns:
        How it ended; see `ExactFit.converged`.

    Raises:
        ArgumentError: an argument out of range; targets for which the loss is not a mean of the
            samples' losses; a checkpoint of another problem.
        UnsupportedError: dual, for a loss that is not quadratic.
        NonFiniteLossError: the objective is NaN or infinite; the deltas are as before.

    Warns:
        NotConvergedWarning: max_iterations was reached, or rounding prevents further progress.
    """
    began = time.perf_counter()
    check_problem(problem)
    if method not in METHODS:
        raise ArgumentError(f"method must be one of {[*METHODS]}, got {method!r}")
    check_tolerance(tol)
    check_integer("max_iterations", max_iterations, 1)
    check_integer("checkpoint_every", checkpoint_every, 1)
    check_rank(rank)
    if checkpoint is not None:
        check_target(Path(checkpoint).resolve(), "checkpoint")
        if method == "dual":
            raise ArgumentError("checkpoint is for method='cg': the dual solution is one solve")
    passes = problem.system
    start = problem.flat()
    file = None
    if method == "auto" and rank is None and checkpoint is None and _is_small(passes):
        # Otherwise conjugate gradients: the loss has no minimum, or l2 is small for the rounding.
        with contextlib.suppress(UnsupportedError, ArgumentError):
            start, rank = solve_dual(passes), 0
    elif method == "dual":
        start, rank = solve_dual(passes), 0
    preconditioner = Preconditioner(passes, rank)
    search = Search(passes, start, tol, max_iterations, preconditioner)
    if checkpoint is not None:
        file = Checkpoint(Path(checkpoint), _identity(problem, start, preconditioner.rank))
        search.keep(file, checkpoint_every)
    delta = search.run()
    # Factors in 16 bits are those of another problem: the bound is for the given one.
    judge = problem.passes if problem.in_16_bits else passes
    value, gradient, _ = judge.gradient(delta)
    size, bound = norm(delta), norm(gradient) / problem.l2
    problem.tangent.load_delta_dict(passes.layout.named(delta))
    if file is not None:
        file.remove()
    report = ExactFit(
        converged=bound <= tol * max(size - bound, 0.0),
        distance_bound=bound,
        gradient_norm=norm(gradient),
        objective=value,
        iterations=search.iterations,
        newton_steps=search.steps,
        rank=preconditioner.rank,
        samples=problem.samples,
        seconds=time.perf_counter() - began,
    )
    if not report.converged:
        warnings.warn(
            f"fit_exact stopped after {search.iterations} iterations, at a distance of at most "
            f"{bound:.3g} from the optimum, with ‖Δ‖ = {size:.3g}: raise max_iterations, tol or "
            "l2, or compute in float64",
            NotConvergedWarning,
            stacklevel=2,
        )
    return report


def _is_small(passes: Passes) -> bool:
    """Whether a decomposition of J Jᵀ costs less than conjugate gradients."""
    rows = passes.samples * passes.outputs
    return is_stored(passes) and passes.quadratic and rows <= ROWS


def _identity(problem: Problem, start: Tensor, rank: int) -> dict[str, str]:
    """What a checkpoint depends on; a fit with another tolerance may resume from it."""
    tangent, passes = problem.tangent, problem.passes
    return {
        "anchor": tangent.fingerprint,
        "basis": str(tangent.basis_fingerprint),
        "trained parameters": repr({n: [*s] for n, s in passes.layout.shapes.items()}),
        "data": problem.data_sha256,
        "loss": loss_name(problem.loss),
        "l2": problem.l2.hex(),
        "start": hashlib.sha256(bytes_of(start)).hexdigest(),
        "rank": str(rank),
        "representation": problem.representation,
        "batches": str(passes.loader.batch_size),
    }
