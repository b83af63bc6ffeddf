"""Take samples out of a fit, or put some in: exactly, with a certificate."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tangent_ops.data import Data, check_integer
from tangent_ops.delta import Delta, fingerprint
from tangent_ops.errors import ArgumentError, ConvergenceError, UnsupportedError
from tangent_ops.exact.certificate import Certificate, certify
from tangent_ops.exact.conjugate import solve, unpreconditioned
from tangent_ops.exact.fit import fit_exact
from tangent_ops.exact.layout import norm
from tangent_ops.exact.problem import Problem, check_l2
from tangent_ops.exact.search import loss_name
from tangent_ops.losses import Loss
from tangent_ops.model.linearized import LinearizedModel

Curvature = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def forget_samples(
    tangent: LinearizedModel,
    retain: Data,
    l2: float,
    tol: float = 1e-3,
    *,
    loss: Loss | None = None,
    batch_size: int = 64,
    cache: bool | str | os.PathLike[str] = False,
    progress: bool = True,
    **options: Any,
) -> tuple[Delta, Certificate]:
    """Move a fit to the optimum of the samples that stay, and bound what is left of the others.

    Conjugate gradients from the present deltas, which are near, to the minimum that a fit without
    the forgotten samples has: unique, so that nothing of them is in it. The certificate rests on
    the gradient over the retained samples alone; how good the start was does not matter.

    Args:
        tangent: fitted with these samples among others; its deltas are moved in place.
        retain: the samples that stay, as in `fit_exact`.
        l2: as in `fit_exact`; that of the fit.
        tol: as in `fit_exact`.
        loss: as in `fit_exact`; that of the fit.
        batch_size: as in `fit_exact`.
        cache: as in `fit_exact`.
        progress: show progress bars.
        options: max_iterations, rank and checkpoint, as in `fit_exact`.

    Returns:
        The new delta, and its certificate, in float64.

    Raises:
        ArgumentError: as in `fit_exact`.

    Warns:
        NotConvergedWarning: as in `fit_exact`; the certificate's bound is then large, but holds.
    """
    shared: dict[str, Any] = {"loss": loss, "batch_size": batch_size, "cache": cache}
    shared["progress"] = progress
    fit_exact(tangent, retain, l2, tol, **shared, **options)
    delta = tangent.delta_dict()
    return delta, certify(tangent, retain, l2, delta, **shared)


def add_samples(
    tangent: LinearizedModel, everything: Data, l2: float, tol: float = 1e-3, **options: Any
) -> tuple[Delta, Certificate]:
    """Move a fit to the optimum of more samples: the old and the new ones, ``everything``.

    Takes, does and returns what `forget_samples` does; the optimum does not depend on the way.
    """
    return forget_samples(tangent, everything, l2, tol, **options)


def forget_without_data(
    tangent: LinearizedModel,
    forget: Data,
    l2: float,
    curvature: Curvature,
    samples: int,
    start: Certificate,
    tol: float = 1e-3,
    *,
    loss: Loss | None = None,
    batch_size: int = 64,
    max_iterations: int = 1000,
    progress: bool = True,
) -> tuple[Delta, Certificate]:
    """Forget samples where the retained ones are not at hand, only products with their Hessian.

    With a quadratic loss the gradient over the retained samples is that over all, which the fit
    left small, less that over the forgotten ones. So the step solves H_R d = g_S, and

        ‖Δ + d - Δ*_R‖ <= (‖g_S - H_R d‖ + ‖g‖) / λ_R

    with g the gradient at the start, all in sums over samples, and λ_R = N_R l2.

    Args:
        tangent: fitted to all samples; its deltas are moved in place.
        forget: the samples to forget.
        l2: as in `fit_exact`; that of the fit.
        curvature: v -> H_R v, over the retained samples, penalty included: a `ShardCurvature`, or
            the sum of several.
        samples: N_R, how many are retained.
        start: of the fit to all samples, whose gradient norm counts.
        tol: ends with ‖g_S - H_R d‖ <= tol ‖g_S‖.
        loss: as in `fit_exact`, quadratic.
        batch_size: as in `fit_exact`.
        max_iterations: of conjugate gradients.
        progress: show progress bars.

    Returns:
        The new delta, and a certificate, computed in the model's precision, that cannot be
        verified without the retained data.

    Raises:
        ArgumentError: as in `fit_exact`; start is of another delta, l2, loss or number of samples.
        UnsupportedError: the loss is not quadratic.
        ConvergenceError: the tolerance was not reached; the deltas are as before.
    """
    check_l2(l2)
    check_integer("samples", samples, 1)
    check_integer("max_iterations", max_iterations, 1)
    problem = Problem(tangent, forget, l2, loss, batch_size=batch_size, progress=progress)
    if not problem.quadratic:
        raise UnsupportedError("forget_without_data needs a quadratic loss: use forget_samples")
    total = samples + problem.samples
    expected = (fingerprint(tangent.delta_dict()), l2, loss_name(problem.loss), total)
    names = ("delta", "l2", "loss", "samples")
    for name, value in zip(names, expected, strict=True):
        if getattr(start, name) != value:
            raise ArgumentError(
                f"start is for another {name}: {getattr(start, name)}, here it is {value}"
            )
    layout = problem.layout
    delta = layout.flat(tangent.deltas())
    _, gradient, _ = problem.gradient(delta)
    right = gradient.mul_(problem.samples)

    def product(vector: Tensor) -> Tensor:
        return layout.flat(curvature(layout.named(vector)), "the product")

    step = solve(product, right, tol / 2, max_iterations, unpreconditioned)
    left = norm(right - product(step))
    if left > tol * norm(right):
        raise ConvergenceError(
            f"the step's residual is {left / norm(right):.1e} by rounding, more than tol={tol:g}: "
            "raise tol, or compute in float64"
        )
    tangent.load_delta_dict(layout.named(delta + step))
    moved = tangent.delta_dict()
    bound = (left + total * start.gradient_norm) / (samples * l2)
    certificate = Certificate(
        distance_bound=bound,
        gradient_norm=bound * l2,
        l2=l2,
        samples=samples,
        loss=loss_name(problem.loss),
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
    """A delta with noise, and what the noise promises.

    Attributes:
        delta: the noisy one. Publish this one alone.
        sigma: standard deviation of the noise in every entry.
        epsilon: as asked for.
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

    σ = distance_bound sqrt(2 ln(1.25 / δ)) / ε in every entry. What is published is then (ε, δ)-
    indistinguishable from the exact optimum without the samples, with the same noise on it
    (output perturbation: Neel, Roth, Sharifi-Malvajerdi, "Descent-to-Delete", ALT 2021; the
    Gaussian mechanism: Dwork, Roth, "The Algorithmic Foundations of Differential Privacy", 2014,
    theorem A.1). It says nothing of the samples that stay: this is no differential privacy.

    Args:
        delta: what the certificate is for.
        certificate: of the removal.
        epsilon: above 0, up to 1, where that theorem ends.
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
    # numpy's, as torch's generator on a CPU takes 32 bits of a seed, few enough to try all.
    generator = np.random.Generator(np.random.PCG64(secrets.randbits(128)))
    tensors = {}
    for name, value in delta.items():
        noise = torch.as_tensor(generator.standard_normal(tuple(value.shape)))
        tensors[name] = (value.double() + sigma * noise.to(value.device)).to(value.dtype)
    return Noised(Delta(tensors, getattr(delta, "meta", None)), sigma, epsilon, failure)
