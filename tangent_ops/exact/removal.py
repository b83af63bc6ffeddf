"""Forgets samples of a fit, or adds some: exactly, with a certificate."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tangent_ops.data import check_integer
from tangent_ops.delta import Delta, fingerprint
from tangent_ops.errors import ArgumentError, ConvergenceError
from tangent_ops.exact.certificate import Certificate, certify
from tangent_ops.exact.conjugate import solve, unpreconditioned
from tangent_ops.exact.curvature import Curvature, require_quadratic
from tangent_ops.exact.fit import fit_exact
from tangent_ops.exact.layout import norm
from tangent_ops.exact.problem import Problem, check_problem, check_tolerance
from tangent_ops.losses import loss_name


def forget_samples(
    problem: Problem, ids: Sequence[int], tol: float = 1e-3, **options: Any
) -> tuple[Delta, Certificate]:
    """Move a fit to the optimum of the retained samples, with a bound on the remaining distance.

    `fit_exact` moves the deltas from their present values, which are near, to the minimum without
    the forgotten samples. This minimum is unique, so it does not depend on them. The certificate is
    computed from the gradient over the retained samples only, whatever the start was. If the
    forgotten samples are already deleted, `fit_exact` and `certify` on a `Problem` of the retained
    samples do the same.

    Args:
        problem: of all samples. The model's deltas are moved in place.
        ids: the samples to forget: indices in the data set.
        tol: as in `fit_exact`.
        options: max_iterations, rank and checkpoint, as in `fit_exact`.

    Returns:
        The new delta, and its certificate, computed in float64. Later calls need the problem of the
        retained samples, ``problem.without(ids)``.

    Raises:
        ArgumentError: as in `fit_exact`; an id that is no index; no sample is left.

    Warns:
        NotConvergedWarning: as in `fit_exact`; the certificate's bound is then large, but holds.
    """
    check_problem(problem)
    return _moved(problem.without(ids), tol, options)


def add_samples(
    problem: Problem, data: Dataset[Any], tol: float = 1e-3, **options: Any
) -> tuple[Delta, Certificate]:
    """Move a fit to the optimum of its samples and new ones, with a certificate.

    Args:
        problem: of the present samples. The model's deltas are moved in place.
        data: the new samples. Later calls need ``problem.plus(data)``.
        tol: as in `fit_exact`.
        options: as in `forget_samples`.

    Returns, raises and warns as `forget_samples`.
    """
    check_problem(problem)
    return _moved(problem.plus(data), tol, options)


def _moved(problem: Problem, tol: float, options: Mapping[str, Any]) -> tuple[Delta, Certificate]:
    fit_exact(problem, tol, **options)
    return problem.tangent.delta_dict(), certify(problem)


def forget_without_data(
    forgotten: Problem,
    curvature: Curvature,
    samples: int,
    start: Certificate,
    tol: float = 1e-3,
    *,
    max_iterations: int = 1000,
) -> tuple[Delta, Certificate]:
    """Forget samples without the retained ones' data, from products with their Hessian.

    With a quadratic loss, the gradient over the retained samples is the gradient g over all, which
    is small after a fit, minus the gradient g_S over the forgotten ones. So the step d solves
    H_R d = g_S, and

        ‖Δ + d - Δ*_R‖ <= (‖g_S - H_R d‖ + ‖g‖) / λ_R

    with λ_R = N_R l2, and all gradients at the start and in sums over samples.

    Args:
        forgotten: the problem of the samples to forget, with the loss and l2 of the fit to all
            samples. The model's deltas are moved in place.
        curvature: v -> H_R v, over the retained samples, penalty included: a `ShardCurvature`, or
            the sum of several.
        samples: N_R, the number of retained samples.
        start: the certificate of the fit to all samples; ‖g‖ is taken from it.
        tol: ends with ‖g_S - H_R d‖ <= tol ‖g_S‖.
        max_iterations: of conjugate gradients.

    Returns:
        The new delta, and a certificate, computed in the model's precision. Verifying it needs the
        retained data.

    Raises:
        ArgumentError: an argument out of range; start is of another delta, l2, loss or number of
            samples.
        UnsupportedError: the loss is not quadratic.
        ConvergenceError: the tolerance was not reached; the deltas are as before.
    """
    check_problem(forgotten)
    check_integer("samples", samples, 1)
    check_integer("max_iterations", max_iterations, 1)
    check_tolerance(tol)
    require_quadratic(forgotten, "forget_without_data", "forget_samples")
    tangent, passes, l2 = forgotten.tangent, forgotten.passes, forgotten.l2
    total, loss = samples + forgotten.samples, loss_name(forgotten.loss)
    expected = (fingerprint(tangent.delta_dict()), l2, loss, total)
    names = ("delta", "l2", "loss", "samples")
    for name, value in zip(names, expected, strict=True):
        if getattr(start, name) != value:
            raise ArgumentError(
                f"start is a certificate for another {name}: {getattr(start, name)}, here it is "
                f"{value}"
            )
    layout = passes.layout
    delta = forgotten.flat()
    _, gradient, _ = passes.gradient(delta)
    right = gradient.mul_(forgotten.samples)

    def product(vector: Tensor) -> Tensor:
        return layout.flat(curvature(layout.named(vector)), "the product")

    step = solve(product, right, tol / 2, max_iterations, unpreconditioned)
    left = norm(right - product(step))
    if left > tol * norm(right):
        raise ConvergenceError(
            f"the step's residual is {left / norm(right):.1e} because of rounding, more than "
            f"tol={tol:g}: raise tol, or compute in float64"
        )
    tangent.load_delta_dict(layout.named(delta + step))
    moved = tangent.delta_dict()
    bound = (left + total * start.gradient_norm) / (samples * l2)
    certificate = Certificate(
        distance_bound=bound,
        gradient_norm=bound * l2,
        l2=l2,
        samples=samples,
        loss=loss,
        method="gradient at the start, less that over the forgotten samples; residual of the step",
        assumes=(
            *start.assumes,
            f"the start's gradient norm was {start.gradient_norm:.6g} over all {total} samples",
            "the products are with the retained samples' Hessian",
        ),
        anchor=tangent.fingerprint,
        delta=fingerprint(moved),
        data=None,
    )
    return moved, certificate


@dataclass(frozen=True)
class Noised:
    """A delta with noise, and the guarantee of the noise.

    Attributes:
        delta: the noisy delta. Publish only this one.
        sigma: standard deviation of the noise in every entry.
        epsilon: ε, as given.
        failure: the δ of (ε, δ).
    """

    delta: Delta
    sigma: float
    epsilon: float
    failure: float


def noised(
    delta: Mapping[str, Tensor], certificate: Certificate, epsilon: float, failure: float
) -> Noised:
    """Add noise that hides how far the delta is from a retrained one: (ε, δ)-certified removal.

    σ = distance_bound sqrt(2 ln(1.25 / δ)) / ε in every entry. The noisy delta is then (ε, δ)-
    indistinguishable from the exact optimum without the samples, with the same noise on it
    (output perturbation: Neel, Roth, Sharifi-Malvajerdi, "Descent-to-Delete", ALT 2021; the
    Gaussian mechanism: Dwork, Roth, "The Algorithmic Foundations of Differential Privacy", 2014,
    theorem A.1). This is not differential privacy: it guarantees nothing to retained samples.

    Args:
        delta: the certificate's delta.
        certificate: of the removal.
        epsilon: above 0, up to 1, the range of that theorem.
        failure: δ, between 0 and 1.

    Returns:
        The noisy delta, drawn from a generator whose seed is the operating system's.

    Raises:
        ArgumentError: an argument out of range, or the certificate is for another delta.
    """
    if not 0 < epsilon <= 1:
        raise ArgumentError(f"epsilon must be above 0 and at most 1, got {epsilon}")
    if not 0 < failure < 1:
        raise ArgumentError(f"failure must be between 0 and 1, got {failure}")
    if fingerprint(delta) != certificate.delta:
        raise ArgumentError("the certificate is for another delta")
    sigma = certificate.distance_bound * math.sqrt(2 * math.log(1.25 / failure)) / epsilon
    # numpy's: torch's generator on a CPU uses 32 bits of its seed, so few that all can be tried.
    generator = np.random.Generator(np.random.PCG64(secrets.randbits(128)))
    tensors = {}
    for name, value in delta.items():
        noise = torch.as_tensor(generator.standard_normal(tuple(value.shape)))
        tensors[name] = (value.double() + sigma * noise.to(value.device)).to(value.dtype)
    return Noised(Delta(tensors, getattr(delta, "meta", None)), sigma, epsilon, failure)
