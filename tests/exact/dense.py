"""A small problem as dense matrices in float64: J by torch.func, ridge regression by solving."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from small_models import exact_vjp, images, oracle, vit
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from tangent_ops import LinearizedModel, linearize
from tangent_ops.data import Data
from tangent_ops.exact import Problem

SAMPLES, CLASSES = 12, 5
SIZE = {"depth": 1, "embed_dim": 12, "num_heads": 2}  # of the ViT


@dataclass
class Dense:
    """A tangent model of a small ViT, data, and what they are as matrices.

    Attributes:
        tangent: of all parameters.
        data: `SAMPLES` images with classes.
        jacobian: (N, C, P).
        anchor: (N, C), f(x; w0).
        targets: (N, C): 15 for the class, else 0.
        representation: of its problems.
    """

    tangent: LinearizedModel
    data: TensorDataset
    jacobian: Tensor
    anchor: Tensor
    targets: Tensor
    representation: str = "passes"

    def problem(self, l2: float, data: Data | None = None, **options: Any) -> Problem:
        """A `Problem` over all samples or other data, without progress bars."""
        data = self.data if data is None else data
        usual = {"progress": False, "batch_size": 5, "representation": self.representation}
        return Problem(self.tangent, data, l2, **usual | options)

    def in_single(self) -> Dense:
        """The same model and data in float32; the matrices stay in float64."""
        inputs, classes = self.data.tensors
        tangent = linearize(copy.deepcopy(self.tangent.anchor).float())
        return replace(self, tangent=tangent, data=TensorDataset(inputs.float(), classes))

    def optimum(self, l2: float, k: float = 1.0, keep: list[int] | None = None) -> Tensor:
        """The minimum of mean RescaledSquareLoss(k) + l2/2 ‖Δ‖² over samples `keep`, (P,)."""
        keep = list(range(SAMPLES)) if keep is None else keep
        rows = self.jacobian[keep].flatten(0, 1)
        weights = 2 / CLASSES * torch.where(self.targets[keep] > 0, k, 1.0).double().flatten()
        # (HᵀWH + λ)⁻¹ HᵀW = Hᵀ (HHᵀ + λ W⁻¹)⁻¹: 60 unknowns instead of 2,801.
        small = rows @ rows.T
        small.diagonal().add_(len(keep) * l2 / weights)
        return rows.T @ torch.linalg.solve(small, (self.targets - self.anchor)[keep].flatten())

    def hessian(self, l2: float, keep: list[int] | None = None) -> Tensor:
        """The Hessian of the sum over samples, penalty included, for k = 1, (P, P)."""
        rows = self.jacobian if keep is None else self.jacobian[keep]
        found = 2 / CLASSES * rows.flatten(0, 1).T @ rows.flatten(0, 1)
        found.diagonal().add_(len(rows) * l2)
        return found

    def solve(self, right: Tensor, penalty: float, blocks: Tensor | None = None) -> Tensor:
        """(Σ_i J_iᵀ A_i J_i + penalty I)⁻¹ right by Woodbury's identity, for A (N, C, C).

        A = 2/C I, the Hessian of `RescaledSquareLoss(k=1)`, unless given.
        """
        if blocks is None:
            blocks = 2 / CLASSES * torch.eye(CLASSES).double().expand(SAMPLES, -1, -1)
        rows, weighted = self.jacobian.flatten(0, 1), (blocks @ self.jacobian).flatten(0, 1)
        small = weighted @ rows.T
        small.diagonal().add_(penalty)
        return (right - rows.T @ torch.linalg.solve(small, weighted @ right)) / penalty

    def rows(self, inputs: Tensor) -> Tensor:
        """J(x), (M, C, P)."""
        return jacobian(self.tangent.anchor, list(self.tangent.deltas()), inputs)

    def kept(self, *indices: int) -> Subset:
        return Subset(self.data, indices)

    def without(self, *indices: int) -> Subset:
        return Subset(self.data, [i for i in range(SAMPLES) if i not in indices])

    def set(self, flat: Tensor) -> None:
        """Write a delta, (P,), into the model."""
        parts = flat.split([delta.numel() for delta in self.tangent.deltas().values()])
        with torch.no_grad():
            for delta, part in zip(self.tangent.deltas().values(), parts, strict=True):
                delta.copy_(part.view(delta.shape))

    @property
    def delta(self) -> Tensor:
        return flat(self.tangent.deltas())


def softmax_hessians(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, and the Hessian of each sample's cross-entropy by its logits (N, C, C)."""
    p = logits.softmax(dim=1)
    return p, torch.diag_embed(p) - p[:, :, None] * p[:, None]


def flat(delta: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().flatten() for value in delta.values()])


def jacobian(model: nn.Module, names: list[str], inputs: Tensor) -> Tensor:
    eye = torch.eye(CLASSES, dtype=torch.float64)
    return torch.stack(
        [
            torch.stack([flat(exact_vjp(model, names, row[None], one[None])) for row in eye])
            for one in inputs
        ]
    )


def make(**options) -> Dense:
    """The problem in float64, from Δ = 0; options are `linearize`'s."""
    model = vit(**SIZE).double().eval()
    tangent = linearize(model, **options)
    inputs = images(SAMPLES).double()
    classes = torch.arange(SAMPLES) % CLASSES
    targets = 15.0 * torch.nn.functional.one_hot(classes, CLASSES).double()
    rows = jacobian(model, list(tangent.deltas()), inputs)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    anchor = oracle(model)(inputs)(weights).detach()
    return Dense(tangent, TensorDataset(inputs, classes), rows, anchor, targets)
