"""`noisy_statistics`: H and g of a square-loss fit, released once with noise (AdaSSP).

In coordinates (z, Z) with features φ and a, clipped for each sample to ‖φ‖_F <= R, ‖a‖ <= A and,
with residuals, ‖r‖ <= B, one sample adds to the sums at most

    Σ φᵀφ: R²     Σ φ aᵀ: R A     Σ a aᵀ: A²     Σ φᵀ r: R B     Σ r aᵀ: B A     λ_min(H): R² + A²

in the Frobenius norm (the last by Weyl's inequality: H grows by a matrix whose largest eigenvalue
is ‖φφᵀ + ‖a‖² I‖). Sum b, divided by its bound Δ_b and multiplied by √(s_b), s_b >= 0 with
Σ s_b = 1, together with the others is a vector that one sample changes by a norm of at most 1. One
Gaussian mechanism of noise σ on that vector is noise Δ_b σ / √(s_b) on each sum. A symmetric sum's
vector has its diagonal and √2 times its upper triangle, which has the Frobenius norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_ops.composition.ridge import FeatureRows
from tangent_ops.data import Data, check_not_negative, check_positive
from tangent_ops.errors import ArgumentError
from tangent_ops.losses import Loss
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.privacy.accounting import Phase
from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.options import Privacy
from tangent_ops.privacy.regression.coordinates import PublicCoordinates
from tangent_ops.privacy.regression.noisy_solution import (
    CURVATURE,
    SYMMETRIC,
    NoisyStatistics,
    curvature_of,
)
from tangent_ops.privacy.regression.private_samples import (
    ASSUMES,
    check_bound,
    private_samples,
    shrunk,
)
from tangent_ops.privacy.statement import make_statement


@dataclass(frozen=True)
class FeatureBounds:
    """Norms that each sample is clipped to, in the coordinates, chosen without the private data.

    Attributes:
        core: R, of φ; None if no core is trained.
        head: A, of a; None if no head is trained.
        residual: B, of y - f.
    """

    core: float | None
    head: float | None
    residual: float

    def __post_init__(self) -> None:
        check_positive(residual=self.residual)
        given = {"core": self.core, "head": self.head}
        check_positive(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Shares:
    """How the privacy budget is divided; parts of 1, in terms of 1/σ².

    Attributes:
        curvature: of H, equally among its blocks; 0 for the public data's H, scaled to N samples,
            which costs nothing. The rest, 1 - curvature - eigenvalue, is g's.
        eigenvalue: of H's least eigenvalue, with which AdaSSP lowers the ridge; 0 to count it as 0.
        core: the core's part of g's share; the rest is the head's.
    """

    curvature: float = 1 / 3
    eigenvalue: float = 1 / 3
    core: float = 0.5

    def __post_init__(self) -> None:
        check_not_negative(curvature=self.curvature, eigenvalue=self.eigenvalue)
        if not self.curvature + self.eigenvalue < 1:
            raise ArgumentError(
                f"curvature {self.curvature:g} and eigenvalue {self.eigenvalue:g} leave nothing "
                "for g: their sum must be below 1"
            )
        if self.eigenvalue and not self.curvature:
            raise ArgumentError("eigenvalue is for a private curvature: give both, or neither")
        if not 0 < self.core < 1:
            raise ArgumentError(f"core must be between 0 and 1, got {self.core!r}")

    def of_sums(self, core: bool, head: bool) -> dict[str, float]:
        """Sum -> its part of 1, of those sums that are released."""
        there = {"core_core": core, "core_head": core and head, "head_head": head}
        blocks = [name for name in CURVATURE if there[name]]
        found = dict.fromkeys(blocks, self.curvature / len(blocks)) if self.curvature else {}
        right = 1 - self.curvature - self.eigenvalue
        own = self.core if core and head else float(core)
        found |= {"core_residual": right * own, "head_residual": right * (1 - own)}
        return {n: s for n, s in (found | {"least_eigenvalue": self.eigenvalue}).items() if s}


def noisy_statistics(
    tangent: LinearizedModel,
    data: Data,
    privacy: Privacy,
    coordinates: PublicCoordinates,
    bounds: FeatureBounds,
    *,
    shares: Shares | None = None,
    loss: Loss | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> NoisyStatistics:
    """Release H and g of a square-loss fit with (ε, δ)-differential privacy for each sample.

    Sufficient-statistics perturbation, and its adaptive form AdaSSP (Wang, "Revisiting
    differentially private linear regression", UAI 2018, algorithm 2), for several outputs and
    blocks, each with its own bound. All that is computed from the result is as private as it:
    ``solve(l2)`` for any number of l2. Memory does not grow with N.

    Args:
        tangent: the model; its deltas are the start, to which a solution is added.
        data: a Dataset of (input, class), or a DataLoader; each sample once.
        privacy: the guarantee, noise and start; max_grad_norm, expected_batch_size and steps are
            not used.
        coordinates: of this model, from public data.
        bounds: for each sample, such as quantiles of ``coordinates.norms``.
        shares: of the budget; None for thirds, as AdaSSP.
        loss: `RescaledSquareLoss` with k = 1; None for ``RescaledSquareLoss()``.
        batch_size: of a Dataset; a DataLoader has its own.
        device: the model is moved there first.
        progress: show a bar if it takes more than two seconds.

    Raises:
        ArgumentError: an argument is not as above; delta is 1/N or more; the deltas are not zero
            and start is "zero"; a sample is in the data twice, by index or by content; features
            that are not finite.
        UnsupportedError: another loss; preprocessing fitted to data; a batch norm that uses its
            batch; a model that mixes samples.
    """
    privacy.check_unused("noisy_statistics", "max_grad_norm", "expected_batch_size", "steps")
    shares = Shares() if shares is None else shares
    sensitivities = sensitivities_of(coordinates, bounds)
    samples = private_samples(
        tangent,
        data,
        privacy,
        coordinates,
        loss=loss,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    sigma = privacy.multiplier(1.0, 1, samples.before)
    sums: dict[str, Tensor] = {}
    for rows, residuals in samples:
        for name, value in clipped_sums(rows, residuals, bounds).items():
            sums[name] = sums[name] + value if name in sums else value
    parts = shares.of_sums(bool(sensitivities["core_residual"]), bool(sensitivities["head_head"]))
    spread = {name: sensitivities[name] * sigma / math.sqrt(s) for name, s in parts.items()}
    if "least_eigenvalue" in spread:
        blocks = (sums[name] for name in CURVATURE)
        sums["least_eigenvalue"] = torch.linalg.eigvalsh(curvature_of(*blocks))[0]
    source = privacy.noise_source()
    released = {name: value for name, value in sums.items() if not value.numel()}
    released |= {n: sums[n] + noise_for(source, n, sums[n], spread[n]) for n in spread}
    if not shares.curvature:
        public = zip(CURVATURE, coordinates.curvature, strict=True)
        released |= {name: samples.count * block for name, block in public}
    statement = make_statement(
        mechanism=(
            "Gaussian noise on the statistics of a square-loss fit, once (sufficient-statistics "
            f"perturbation; Wang 2018): {_words(bounds, parts)}"
        ),
        phases=(Phase(sigma, 1.0, 1),),
        clip=1.0,
        delta=privacy.delta,
        sampling="none: every sample counts",
        noise=source.words,
        assumes=(*ASSUMES, *privacy.assumes),
    )
    return NoisyStatistics(
        coordinates=coordinates,
        sums=released,
        spread=spread,
        samples=samples.count,
        start=tangent.delta_dict(),
        statement=privacy.after_start(statement),
    )


def sensitivities_of(coordinates: PublicCoordinates, bounds: FeatureBounds) -> dict[str, float]:
    """Sum -> the largest norm that one sample adds to it; 0 if the sum is empty.

    Raises:
        ArgumentError: a bound is missing.
    """
    core = check_bound("bounds.core", bounds.core, coordinates.core.shape[1])
    head = check_bound("bounds.head", bounds.head, coordinates.head.shape[1])
    return {
        "core_core": core**2,
        "core_head": core * head,
        "head_head": head**2,
        "core_residual": core * bounds.residual,
        "head_residual": head * bounds.residual,
        "least_eigenvalue": core**2 + head**2,
    }


def clipped_sums(rows: FeatureRows, residuals: Tensor, bounds: FeatureBounds) -> dict[str, Tensor]:
    """The sums over samples that are clipped to the bounds, float64."""
    phi = rows.core if bounds.core is None else shrunk(rows.core, bounds.core)
    inputs = rows.head if bounds.head is None else shrunk(rows.head, bounds.head)
    r = shrunk(residuals, bounds.residual)
    return {
        "core_core": torch.einsum("nck,ncl->kl", phi, phi),
        "core_head": torch.einsum("nck,nl->kcl", phi, inputs),
        "head_head": inputs.T @ inputs,
        "core_residual": torch.einsum("nck,nc->k", phi, r),
        "head_residual": r.T @ inputs,
    }


def noise_for(source: NoiseSource, name: str, value: Tensor, std: float) -> Tensor:
    """Noise of a sum; of a symmetric one, std on the diagonal and std/√2 beside it."""
    noise = source.normal(value.shape, std, torch.float64, "cpu")
    if name not in SYMMETRIC:
        return noise
    upper = noise.triu(1) / math.sqrt(2)
    return upper + upper.T + noise.diag().diag()


def _words(bounds: FeatureBounds, parts: dict[str, float]) -> str:
    core = "" if bounds.core is None else f"core features to {bounds.core:g}, "
    head = "" if bounds.head is None else f"head's inputs to {bounds.head:g}, "
    shares = ", ".join(f"{name} {share:.3g}" for name, share in parts.items())
    return f"{core}{head}residuals to {bounds.residual:g}; shares of 1/sigma²: {shares}"
