"""`perturb_output`: private fitting by noise on the exact optimum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_ops.data import Data, check_integer, in_order
from tangent_ops.delta import Delta
from tangent_ops.errors import ArgumentError, ConvergenceError
from tangent_ops.exact.certificate import gradient_in_double
from tangent_ops.exact.layout import norm
from tangent_ops.exact.preconditioner import Preconditioner
from tangent_ops.exact.problem import Cache
from tangent_ops.exact.search import Search
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.privacy.accounting import Phase
from tangent_ops.privacy.checks import check_contents, check_dataset, check_model
from tangent_ops.privacy.convex.bounded import Bounds, Objective
from tangent_ops.privacy.options import Privacy
from tangent_ops.privacy.statement import PrivacyStatement, attach, make_statement

_SHARE = 0.5  # of τ, for the solver; the rest is for its rounding, which the float64 check shows


@dataclass(frozen=True)
class PerturbedOutput:
    """A noisy optimum. All of it may be published.

    Attributes:
        delta: the optimum with noise, and with the statement attached.
        statement: what it promises.
        sigma: standard deviation of the noise in every entry.
        sensitivity: the largest distance of two neighbours' solutions: R B / (E l2) + 2 τ.
    """

    delta: Delta
    statement: PrivacyStatement
    sigma: float
    sensitivity: float


def perturb_output(
    tangent: LinearizedModel,
    data: Data,
    l2: float,
    privacy: Privacy,
    bounds: Bounds,
    *,
    inexactness: float = 0.01,
    max_iterations: int = 1000,
    batch_size: int = 64,
    cache: Cache = False,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> PerturbedOutput:
    """Fit a tangent model privately: Gaussian noise on the minimum of F.

    F(Δ) = (1/E) Σ_i ℓ_i(Δ) + l2/2 ‖Δ‖² with the bounded losses of `bounded`.
    A neighbour's F' differs by one ℓ_i/E, so at F's minimum ‖∇F'‖ = ‖∇ℓ_i‖/E <= R B / E. F' is
    l2-strongly convex, so the distance to its minimum is ‖∇F'‖ / l2 at most:

        ‖Δ*(D) - Δ*(D')‖ <= R B / (E l2)

    (Chaudhuri, Monteleoni, Sarwate, "Differentially private empirical risk minimization", JMLR
    2011, lemma 7, for one sample more or less and a fixed E). The solution is within τ of the
    minimum: τ is fixed before, and the solution is checked in float64, as
    `tangent_ops.exact.certify` does. The Gaussian noise is calibrated exactly (Balle, Wang,
    "Improving the Gaussian mechanism for differential privacy", ICML 2018), up to 0.1%, for
    R B / (E l2) + 2 τ.

    Args:
        tangent: its deltas are the solver's start, which does not affect the guarantee, and are set
            at the end.
        data: as in `fit_last_iterate`.
        l2: positive.
        privacy: the guarantee and the noise; max_grad_norm, expected_batch_size, steps and start
            are not used.
        bounds: as in `fit_last_iterate`.
        inexactness: τ in units of R B / (E l2), above 0 and up to 1.
        max_iterations: of conjugate gradients, in all.
        batch_size: of a Dataset; a DataLoader has its own.
        cache: as in `fit`: keep what enters the first trained block.
        device: moves the model there first.
        progress: show bars.

    Returns:
        The delta and its statement.

    Raises:
        ArgumentError: an invalid argument; a sample that is in the data twice, by index
            or by content.
        UnsupportedError: a model in 16 bits; preprocessing fitted to data; a batch norm that uses
            its batch; cache, for a model that cannot be split.
        ConvergenceError: τ was not reached; the deltas are as before.
        NonFiniteLossError: the objective is NaN or infinite; the deltas are as before.
    """
    check_model(tangent)
    privacy.check_unused("perturb_output", "max_grad_norm", "expected_batch_size", "start", "steps")
    check_integer("max_iterations", max_iterations, 1)
    loader = in_order(data, batch_size)
    samples = check_dataset(loader.dataset, privacy.public_preprocessing)
    privacy.check_failure(samples)
    multiplier = privacy.multiplier(1.0, 1)
    if not 0 < inexactness <= 1:
        raise ArgumentError(f"inexactness must be above 0 and at most 1, got {inexactness}")
    check_contents(loader)
    objective = Objective(
        tangent, loader, l2, bounds, cache=cache, device=device, progress=progress
    )
    exact_sensitivity = objective.sensitivity / objective.l2
    allowed = inexactness * exact_sensitivity
    start = objective.passes.layout.flat(tangent.deltas(), "the start")
    solution = _minimise(objective, start, allowed, max_iterations)
    sensitivity = exact_sensitivity + 2 * allowed
    sigma = sensitivity * multiplier
    layout = objective.passes.layout
    source = privacy.noise_source()
    noise = source.normal(solution.shape, sigma, torch.float64, layout.device)
    statement = make_statement(
        mechanism=(
            f"Gaussian noise of {sigma:.6g} on each entry of the exact optimum, found to "
            f"{allowed:.6g}: {1 / multiplier:.6g}-GDP (Chaudhuri, Monteleoni, Sarwate 2011; Balle, "
            "Wang 2018)"
        ),
        phases=(Phase(multiplier, 1.0, 1),),
        clip=bounds.gradient,
        delta=privacy.delta,
        sampling="none: every sample counts",
        noise=source.words,
        assumes=objective.assumes,
    )
    tangent.load_delta_dict(layout.named(noise.add_(solution)))
    return PerturbedOutput(attach(tangent.delta_dict(), statement), statement, sigma, sensitivity)


def _minimise(objective: Objective, start: Tensor, allowed: float, max_iterations: int) -> Tensor:
    """The minimum of F to within `allowed`, certified in float64.

    Raises:
        ConvergenceError: the solution is not within `allowed`.
    """
    passes = objective.passes
    value, _, _ = passes.gradient(passes.layout.zeros())
    # F is at least l2/2 ‖Δ‖², and at its minimum at most F(0).
    largest = math.sqrt(2 * value / passes.l2)
    tol = min(_SHARE * allowed / largest, 0.5) if largest else 0.5
    search = Search(passes, start, tol, max_iterations, Preconditioner(passes))
    solution = search.run()
    found = gradient_in_double(passes, passes.layout.named(solution)) / passes.l2
    if not found <= allowed:
        raise ConvergenceError(
            f"the solver came within {found:.3g} of the optimum after {search.iterations} "
            f"iterations, {allowed:.3g} was allowed; ‖Δ‖ = {norm(solution):.3g}. Raise "
            "max_iterations, inexactness or l2, or compute in float64"
        )
    return solution
