"""Private fitting by noise on the exact optimum."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_ops.data import Data, check_integer
from tangent_ops.delta import Delta
from tangent_ops.errors import ArgumentError, ConvergenceError
from tangent_ops.exact import certify
from tangent_ops.exact.layout import norm
from tangent_ops.exact.nystrom import preconditioner
from tangent_ops.exact.problem import in_order
from tangent_ops.exact.search import Search
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.privacy.accounting import Phase
from tangent_ops.privacy.checks import check_contents, check_dataset, check_model
from tangent_ops.privacy.convex.bounded import Bounds, Objective
from tangent_ops.privacy.convex.budget import release_noise
from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.statement import PrivacyStatement, attach, make_statement

_SHARE = 0.5  # of the solver's allowance: the rest is for the rounding that float64 finds


@dataclass(frozen=True)
class PerturbedOutput:
    """A noisy optimum. All of it may be published.

    Attributes:
        delta: the optimum with noise, and with the statement attached.
        statement: what it promises.
        sigma: standard deviation of the noise in every entry.
        sensitivity: how far two neighbours' solutions can be apart: R B / (E l2) + 2 τ.
    """

    delta: Delta
    statement: PrivacyStatement
    sigma: float
    sensitivity: float


def perturb_output(
    tangent: LinearizedModel,
    data: Data,
    l2: float,
    *,
    jacobian_bound: float,
    residual_bound: float,
    delta: float,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    inexactness: float = 0.01,
    max_iterations: int = 1000,
    target: float = 15.0,
    normalizer: float | None = None,
    batch_size: int = 64,
    cache: bool | str | os.PathLike[str] = False,
    device: str | torch.device | None = None,
    source: NoiseSource | None = None,
    public_preprocessing: bool = False,
    progress: bool = True,
) -> PerturbedOutput:
    """Fit a tangent model privately: Gaussian noise on the minimum of F.

    F(Δ) = (1/E) Σ_i ℓ_i(Δ) + l2/2 ‖Δ‖² with the bounded losses of `tangent_ops.privacy.convex.bounded`.
    A neighbour's F' differs by one ℓ_i/E, so at F's minimum ‖∇F'‖ = ‖∇ℓ_i‖/E <= R B / E; and F' is
    l2-strongly convex, so its own minimum is within that over l2:

        ‖Δ*(D) - Δ*(D')‖ <= R B / (E l2)

    (Chaudhuri, Monteleoni, Sarwate, "Differentially private empirical risk minimization", JMLR
    2011, lemma 7, for one sample more or less and a fixed E). The solver comes within τ of it,
    which is set before and checked after, in float64: see `tangent_ops.exact.certify`. The
    Gaussian noise is calibrated exactly (Balle, Wang, "Improving the Gaussian mechanism for
    differential privacy", ICML 2018), up to 0.1%, for R B / (E l2) + 2 τ.

    Args:
        tangent: its deltas are where the solver starts, of no consequence, and are set at the end.
        data: as in `fit_last_iterate`.
        l2: positive.
        jacobian_bound: R, as in `fit_last_iterate`.
        residual_bound: B, as in `fit_last_iterate`.
        delta: δ of the statement, below 1/N.
        target_epsilon: as in `fit_last_iterate`. This, or
        noise_multiplier: the noise's standard deviation over the sensitivity.
        inexactness: τ in units of R B / (E l2), above 0 and up to 1.
        max_iterations: of conjugate gradients, in all.
        target: as in `fit_last_iterate`.
        normalizer: as in `fit_last_iterate`.
        batch_size: of a Dataset; a DataLoader has its own.
        cache: as in `fit`: keep what enters the first trained block.
        device: moves the model there first.
        source: of the noise; None for `NoiseSource()`.
        public_preprocessing: as in `fit_private`.
        progress: show bars.

    Returns:
        The delta and its statement.

    Raises:
        ArgumentError: an argument other than these; a sample that is in the data twice, by index
            or by content.
        UnsupportedError: a model in 16 bits; preprocessing fitted to data; a batch norm that uses
            its batch; cache, for a model that cannot be split.
        ConvergenceError: τ was not reached; the deltas are as before.
        NonFiniteLossError: the objective is NaN or infinite; the deltas are as before.
    """
    check_model(tangent)
    check_integer("max_iterations", max_iterations, 1)
    bounds = Bounds(jacobian_bound, residual_bound, target, normalizer)
    loader = in_order(data, batch_size)
    samples = check_dataset(loader.dataset, public_preprocessing)
    multiplier = release_noise(samples, delta, target_epsilon, noise_multiplier)
    if not 0 < inexactness <= 1:
        raise ArgumentError(f"inexactness must be above 0 and at most 1, got {inexactness}")
    check_contents(loader)
    objective = Objective(
        tangent, loader, l2, bounds, cache=cache, device=device, progress=progress
    )
    exact_sensitivity = objective.sensitivity / objective.l2
    allowed = inexactness * exact_sensitivity
    start = objective.problem.layout.flat(tangent.deltas(), "the start")
    solution = _minimise(objective, start, allowed, max_iterations, progress)
    sensitivity = exact_sensitivity + 2 * allowed
    sigma = sensitivity * multiplier
    source = NoiseSource() if source is None else source
    layout = objective.problem.layout
    noise = source.normal(solution.shape, sigma, torch.float64, layout.device)
    statement = make_statement(
        mechanism=(
            f"Gaussian noise of {sigma:.6g} on each entry of the exact optimum, found to "
            f"{allowed:.6g}: {1 / multiplier:.6g}-GDP (Chaudhuri, Monteleoni, Sarwate 2011; Balle, "
            "Wang 2018)"
        ),
        phases=(Phase(multiplier, 1.0, 1),),
        clip=bounds.gradient,
        delta=delta,
        sampling="none: every sample counts",
        noise=source.words,
        assumes=objective.assumes,
    )
    tangent.load_delta_dict(layout.named(noise.add_(solution)))
    return PerturbedOutput(attach(tangent.delta_dict(), statement), statement, sigma, sensitivity)


def _minimise(
    objective: Objective, start: Tensor, allowed: float, max_iterations: int, progress: bool
) -> Tensor:
    """The minimum of F to within `allowed`, certified in float64.

    Raises:
        ConvergenceError: it was not reached.
    """
    problem = objective.problem
    value, _, _ = problem.gradient(problem.layout.zeros())
    # F is at least l2/2 ‖Δ‖², and at its minimum at most F(0).
    largest = math.sqrt(2 * value / problem.l2)
    tol = min(_SHARE * allowed / largest, 0.5) if largest else 0.5
    search = Search(problem, start, tol, max_iterations, functools.partial(preconditioner, problem))
    solution = search.run()
    found = certify(
        objective.model,
        objective.data,
        problem.l2,
        problem.layout.named(solution),
        loss=objective.loss,
        progress=progress,
    ).distance_bound
    if not found <= allowed:
        raise ConvergenceError(
            f"the solver came within {found:.3g} of the optimum after {search.iterations} "
            f"iterations, {allowed:.3g} was allowed; ‖Δ‖ = {norm(solution):.3g}. Raise "
            "max_iterations, inexactness or l2, or compute in float64"
        )
    return solution
