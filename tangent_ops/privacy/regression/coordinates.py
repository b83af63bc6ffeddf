"""`public_coordinates`: a linear change of variables, from public data, for private regression.

A tangent model with a core and a linear head is f(x) + φ(x) c + W a(x). With fixed matrices T and
U, c = T z and W = Z Uᵀ, the coordinates (z, Z) have the features φ T and a U. Their columns are the
leading eigenvectors v of the public second moments Σ φᵀφ / n and Σ a aᵀ / n, whitened:

    v / sqrt(λ + floor λ_1)

so that isotropic noise and one clip treat all directions alike. The private data have no part in
it, so it costs no privacy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_ops.composition.ridge import FeatureRows
from tangent_ops.data import Data, check_integer, check_not_negative, in_order
from tangent_ops.errors import ArgumentError
from tangent_ops.losses import Loss
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.privacy.regression.samples import SampleReader

_LEAST = 1e-12  # eigenvalue, in units of the largest, below which there is only rounding


@dataclass(frozen=True, eq=False)
class PublicNorms:
    """Norms of the public samples, to choose bounds from; each (n,), float64.

    Attributes:
        core: of φ T, Frobenius.
        head: of a U.
        residual: of y - f at the model's deltas.
        core_gradient: of (φ T)ᵀ (y - f).
        head_gradient: of (y - f) (a U)ᵀ, Frobenius.
    """

    core: Tensor
    head: Tensor
    residual: Tensor
    core_gradient: Tensor
    head_gradient: Tensor


@dataclass(frozen=True, eq=False)
class PublicCoordinates:
    """Coordinates of a private regression; see the module.

    Attributes:
        core: T, (k, K), float64; K is 0 if only the head is trained.
        head: U, (h, L), float64; L is 0 if only the core is trained.
        layout: (name, dtype, shape) of each delta.
        head_names: the deltas of the linear head, weight first.
        curvature: mean over the public samples of Σ_c φ_cᵀ φ_c (K, K), φ_cᵀ a (K, C, L) and a aᵀ
            (L, L), in these coordinates.
        norms: of the public samples.
        anchor: fingerprint of the model that they are for.
        basis: fingerprint of its core's sides; None if it has no core.
    """

    core: Tensor
    head: Tensor
    layout: tuple[tuple[str, str, tuple[int, ...]], ...]
    head_names: tuple[str, ...]
    curvature: tuple[Tensor, Tensor, Tensor]
    norms: PublicNorms
    anchor: str
    basis: str | None

    @property
    def outputs(self) -> int:
        """C."""
        return self.curvature[1].shape[1]

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """‖column‖² of T, (K,), and of U, (L,): ‖Δ‖² is Σ of these times z² and Z²."""
        return self.core.square().sum(0), self.head.square().sum(0)

    def check(self, tangent: LinearizedModel) -> None:
        """Raise ArgumentError unless they are for this model."""
        if (tangent.fingerprint, tangent.basis_fingerprint) != (self.anchor, self.basis):
            raise ArgumentError(
                "coordinates are for another anchor or basis: compute them by "
                "public_coordinates(tangent, public_data) with this model"
            )

    def of(self, rows: FeatureRows) -> FeatureRows:
        """Samples' features (float64, on the CPU) in these coordinates."""
        return FeatureRows(rows.outputs, rows.core @ self.core, rows.head @ self.head)

    def deltas(self, core: Tensor, head: Tensor) -> dict[str, Tensor]:
        """The deltas, by name, of coordinates z (K,) and Z (C, L)."""
        flat, columns = self.core @ core, head @ self.head.T
        found, at, column = {}, 0, 0
        for name, dtype, shape in self.layout:
            size = math.prod(shape)
            if name in self.head_names:
                width = size // self.outputs
                part, column = columns[:, column : column + width], column + width
            else:
                part, at = flat[at : at + size], at + size
            found[name] = part.reshape(shape).to(getattr(torch, dtype))
        return found


def public_coordinates(
    tangent: LinearizedModel,
    public_data: Data,
    *,
    core: int,
    head: int,
    floor: float = 1e-3,
    loss: Loss | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> PublicCoordinates:
    """Whitened leading directions of the core and of the head's inputs, from public data.

    Args:
        tangent: the model, with a core (`core_basis`) if `core` is not 0. Its deltas enter the
            norms only.
        public_data: a Dataset of (input, class), or a DataLoader; no private sample is in it.
        core: K, how many directions of the core; at most all; 0 for the head alone.
        head: L, how many directions of the head's input, its bias included; 0 for the core alone.
        floor: in units of the largest eigenvalue; directions with less are not scaled up further.
        loss: `RescaledSquareLoss()` (None), with k = 1.
        batch_size: of a Dataset; a DataLoader has its own.
        device: the model is moved there first.
        progress: show a bar if it takes more than two seconds.

    Raises:
        ArgumentError: an argument is not as above; features are not finite.
        UnsupportedError: another loss; a model that mixes samples.
    """
    check_integer("core", core, 0)
    check_integer("head", head, 0)
    check_not_negative(floor=floor)
    if not core and not head:
        raise ArgumentError("core and head are both 0: nothing would be trained")
    reader = SampleReader(tangent, in_order(public_data, batch_size), loss, device, progress)
    batches = list(reader)
    phi = torch.cat([rows.core for rows, _ in batches])
    inputs = torch.cat([rows.head for rows, _ in batches])
    residuals = torch.cat([residual for _, residual in batches])
    n, _, k = phi.shape
    for name, asked, most in (("core", core, k), ("head", head, inputs.shape[1])):
        if asked > most:
            raise ArgumentError(f"{name} is {asked}: the model has {most} of its directions")
    directions = _whitened(torch.einsum("nck,ncl->kl", phi, phi) / n, core, floor)
    columns = _whitened(inputs.T @ inputs / n, head, floor)
    phi, inputs = phi @ directions, inputs @ columns
    curvature = (
        torch.einsum("nck,ncl->kl", phi, phi) / n,
        torch.einsum("nck,nl->kcl", phi, inputs) / n,
        inputs.T @ inputs / n,
    )
    norms = PublicNorms(
        core=phi.flatten(1).norm(dim=1),
        head=inputs.norm(dim=1),
        residual=residuals.norm(dim=1),
        core_gradient=torch.einsum("nck,nc->nk", phi, residuals).norm(dim=1),
        head_gradient=residuals.norm(dim=1) * inputs.norm(dim=1),
    )
    return PublicCoordinates(
        directions,
        columns,
        reader.features.layout,
        reader.features.head,
        curvature,
        norms,
        tangent.fingerprint,
        tangent.basis_fingerprint,
    )


def _whitened(moment: Tensor, count: int, floor: float) -> Tensor:
    """(m, count): the leading eigenvectors over the roots of their raised eigenvalues."""
    if not count:
        return moment.new_zeros(len(moment), 0)
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
    raised = values + floor * values[0]
    if not float(raised[-1]) > _LEAST * float(values[0]):
        raise ArgumentError(
            f"the public data have fewer than {count} directions that are not zero: ask for fewer, "
            "or give a floor"
        )
    return vectors / raised.sqrt()
