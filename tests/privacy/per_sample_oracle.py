"""Per-sample gradients one sample at a time, in float64, and checks against them."""

from __future__ import annotations

import torch
from small_models import exact_vjp
from torch import Tensor, nn

from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.privacy.per_sample.gradients import MODES, PerSampleGradients

LOSS = RescaledSquareLoss()


def by_loops(tangent, inputs: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    """J(x_i)ᵀ c_i through torch.func.vjp of the anchor, one sample at a time, in float64."""
    names = list(tangent.deltas())
    each = [
        exact_vjp(tangent.anchor, names, c, x)
        for x, c in zip(inputs.split(1), cotangents.split(1), strict=True)
    ]
    return {name: torch.stack([one[name] for one in each]) for name in names}


def by_delta(tangent, samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients G of Δw as those of the deltas: Lᵀ G Rᵀ where Δw has fixed sides L and R."""
    right, left = tangent.basis.tensors(), tangent.left.tensors()
    found = dict(samples)
    for name, side in right.items():
        found[name] = found[name].flatten(2) @ side.double().T
        if name in left:
            found[name] = left[name].double().T @ found[name]
    return found


def check(tangent, inputs: Tensor, tolerance: float = 1e-6) -> None:
    """Checks per-sample gradients, and the clipped sums of all modes."""
    own = PerSampleGradients(tangent, inputs)
    with torch.no_grad():
        logits = tangent(inputs)
    targets = torch.arange(len(inputs)) % logits.shape[1]
    cotangents = _cotangents(logits, targets)
    right = by_delta(tangent, by_loops(tangent, inputs, cotangents))
    size = torch.stack([value.flatten(1).square().sum(1) for value in right.values()]).sum(0).sqrt()
    found = own.samples(inputs, cotangents)
    clip = float(size.median())
    factors = (clip / size).clamp_max(1)
    for name, value in right.items():
        error = (found[name].double() - value).flatten(1).norm(dim=1)
        assert float((error / size).max()) <= tolerance, name
    for mode in MODES:
        sums = own.clipped_sum(inputs, targets, LOSS, clip, mode)
        assert sums.keys() == right.keys()
        for name, value in right.items():
            expected = torch.tensordot(factors, value, 1)
            error = float((sums[name].double() - expected).norm())
            assert error <= tolerance * float(factors @ size), (mode, name)


def _cotangents(logits: Tensor, targets: Tensor) -> Tensor:
    """Cotangents of each sample's own loss: (2/C)(f - M y)."""
    wanted = 15.0 * nn.functional.one_hot(targets, logits.shape[1])
    return (2 / logits.shape[1] * (logits.double() - wanted)).to(logits)


class Row(nn.Module):
    """One layer, and logits of its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x)).flatten(1)
        return torch.stack([y.sum(1), (y * y).sum(1), y[:, 0]], dim=1)
