"""`fit_noisy_descent`: noisy gradient descent on a square loss, one clip for each group.

In coordinates (z, Z) a sample's gradient has a part for the core, φᵀ r, and one for the head,
r aᵀ. Each is clipped to its own norm, C_b, and multiplied by √(s_b) / C_b with s_core + s_head = 1:
together they have a norm of at most 1. A Gaussian mechanism of noise σ on their sum is noise
C_b σ / √(s_b) on each part's sum. One clip for both would go to the part with the larger Jacobian.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_ops.composition.ridge import FeatureRows
from tangent_ops.data import Data, check_not_negative, check_positive
from tangent_ops.errors import ArgumentError
from tangent_ops.losses import Loss
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.privacy.accounting import Phase
from tangent_ops.privacy.fit import PrivateFit
from tangent_ops.privacy.options import Privacy
from tangent_ops.privacy.regression.coordinates import PublicCoordinates
from tangent_ops.privacy.regression.noisy_solution import moved
from tangent_ops.privacy.regression.private_samples import (
    ASSUMES,
    check_bound,
    private_samples,
    shrunk,
)
from tangent_ops.privacy.statement import make_statement


@dataclass(frozen=True)
class GroupClips:
    """Norms that the parts of each sample's gradient are clipped to, in the coordinates.

    Attributes:
        core: of φᵀ r; None if no core is trained.
        head: of r aᵀ; None if no head is trained.
        core_share: the core's part of the budget 1/σ², between 0 and 1; the rest is the head's.
    """

    core: float | None
    head: float | None
    core_share: float = 0.5

    def __post_init__(self) -> None:
        given = {"core": self.core, "head": self.head}
        check_positive(**{name: value for name, value in given.items() if value is not None})
        if not 0 < self.core_share < 1:
            raise ArgumentError(f"core_share must be between 0 and 1, got {self.core_share!r}")


def fit_noisy_descent(
    tangent: LinearizedModel,
    data: Data,
    privacy: Privacy,
    coordinates: PublicCoordinates,
    clips: GroupClips,
    *,
    lr: float,
    l2: float = 0.0,
    loss: Loss | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> PrivateFit:
    """Train core and head with (ε, δ)-differential privacy for each sample.

    Each of T steps adds Gaussian noise to the clipped gradients' sum over all samples, moves the
    coordinates by lr times the result over N, and makes a proximal step for the penalty. Features
    are computed once and kept: 8 N (C K + L) bytes. Coordinates from public data make the curvature
    close to the identity, so few steps suffice.

    Args:
        tangent: the model; its deltas are the start, and are trained in place.
        data: a Dataset of (input, class), or a DataLoader; each sample once.
        privacy: the guarantee, noise, steps and start; max_grad_norm and expected_batch_size are
            not used.
        coordinates: of this model, from public data.
        clips: for each sample, such as quantiles of ``coordinates.norms``.
        lr: of the coordinates; above 0 and up to 1. 1 is Newton's step if the private data's
            curvature is the public data's and core and head are not correlated; many steps diverge
            where the private curvature is above 2/lr.
        l2: of the penalty l2/2 ‖Δ‖² on the move from the start, as in `NoisyStatistics.solve`.
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
    began = time.perf_counter()
    privacy.check_unused("fit_noisy_descent", "max_grad_norm", "expected_batch_size")
    check_positive(lr=lr)
    check_not_negative(l2=l2)
    if lr > 1:
        raise ArgumentError(f"lr must be at most 1, got {lr:g}: larger steps may diverge")
    core = check_bound("clips.core", clips.core, coordinates.core.shape[1])
    head = check_bound("clips.head", clips.head, coordinates.head.shape[1])
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
    steps = privacy.steps
    sigma = privacy.multiplier(1.0, steps, samples.before)
    share = clips.core_share if core and head else float(bool(core))
    batches = list(samples)
    rows = FeatureRows(*(torch.cat(parts) for parts in zip(*map(_parts, batches), strict=True)))
    residuals = torch.cat([residual for _, residual in batches])
    source = privacy.noise_source()
    z = torch.zeros(coordinates.core.shape[1], dtype=torch.float64)
    columns = torch.zeros(coordinates.outputs, coordinates.head.shape[1], dtype=torch.float64)
    decays = [1 + lr * l2 * coordinates.outputs / 2 * length for length in coordinates.lengths]
    for _ in range(steps):
        left = residuals - rows.core @ z - rows.head @ columns.T
        of_core, of_head = clipped_gradients(rows, left, clips)
        if core:
            noise = source.normal(z.shape, core * sigma / math.sqrt(share), z.dtype, "cpu")
            z = (z + lr * (of_core + noise) / samples.count) / decays[0]
        if head:
            std = head * sigma / math.sqrt(1 - share)
            noise = source.normal(columns.shape, std, columns.dtype, "cpu")
            columns = (columns + lr * (of_head + noise) / samples.count) / decays[1]
    statement = make_statement(
        mechanism=(
            "noisy gradient descent on all samples, a sample's contribution scaled to norm 1: "
            + "; ".join(_words("core", core, share) + _words("head", head, 1 - share))
        ),
        phases=(Phase(sigma, 1.0, steps),),
        clip=1.0,
        delta=privacy.delta,
        sampling="none: every sample counts in every step",
        noise=source.words,
        assumes=(*ASSUMES, *privacy.assumes),
    )
    statement = privacy.after_start(statement)
    flat = torch.cat([z, columns.flatten()])
    trained = moved(coordinates, tangent.delta_dict(), flat, statement)
    tangent.load_delta_dict(trained)
    return PrivateFit(statement, trained, steps, time.perf_counter() - began)


def clipped_gradients(
    rows: FeatureRows, residuals: Tensor, clips: GroupClips
) -> tuple[Tensor, Tensor]:
    """The sums over the samples of clipped φᵀ r, (K,), and r aᵀ, (C, L), float64."""
    of_core = torch.einsum("nck,nc->nk", rows.core, residuals)
    if clips.core is not None:
        of_core = shrunk(of_core, clips.core)
    if clips.head is None:
        return of_core.sum(0), residuals.T @ rows.head
    # ‖r aᵀ‖ = ‖r‖ ‖a‖, and it is linear in r.
    sizes = rows.head.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return of_core.sum(0), shrunk(residuals * sizes, clips.head).T @ (rows.head / sizes)


def _parts(batch: tuple[FeatureRows, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    rows, _ = batch
    return rows.outputs, rows.core, rows.head


def _words(name: str, clip: float, share: float) -> list[str]:
    return [f"{name}'s gradient clipped to {clip:g}, share {share:g} of 1/sigma²"] if clip else []
