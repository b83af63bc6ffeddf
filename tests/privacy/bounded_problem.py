"""A small private problem: J by torch.func, the objective and its minimum without the library."""

from __future__ import annotations

import copy
import functools
from dataclasses import fields
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import TensorDataset

from tangent_ops import LinearizedModel, linearize
from tangent_ops.data import in_order
from tangent_ops.privacy.convex.bounded import Bounds, Objective
from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.options import Privacy

N, CLASSES, INPUTS = 9, 3, 4
R, B, M, L2 = 2.0, 2.0, 4.0, 0.4
QUIET = {"progress": False, "batch_size": 4}
BOUNDS = {"jacobian": R, "residual": B, "target": M}


class Silent(NoiseSource):
    """Draws zeros, so that results can be compared with exact ones."""

    def normal(self, shape, std, dtype, device):
        assert std > 0
        return torch.zeros(shape, dtype=dtype, device=device)


def private(fit, model=None, data=None, l2=L2, source: NoiseSource | None = None, **options):
    """Calls `fit_last_iterate` or `perturb_output` with flat options and noise from `source`."""
    model = tangent() if model is None else model
    data = samples() if data is None else data
    groups = []
    for kind in (Privacy, Bounds):
        names = {field.name for field in fields(kind)} & options.keys()
        groups.append(kind(**{name: options.pop(name) for name in names}))
    if source is None:
        return fit(model, data, l2, *groups, **options)
    with patch.object(Privacy, "noise_source", lambda self: source):
        return fit(model, data, l2, *groups, **options)


def anchor() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def tangent() -> LinearizedModel:
    return linearize(anchor(), example=samples(1).tensors[:1])


def samples(count: int = N, scale: float = 1.0, seed: int = 1) -> TensorDataset:
    noise = torch.Generator().manual_seed(seed)
    inputs = scale * torch.randn(count, INPUTS, dtype=torch.float64, generator=noise)
    return TensorDataset(inputs, torch.randint(CLASSES, (count,), generator=noise))


def joined(*parts: TensorDataset) -> TensorDataset:
    columns = zip(*(part.tensors for part in parts), strict=True)
    return TensorDataset(*(torch.cat(column) for column in columns))


def outliers() -> TensorDataset:
    """Inputs of all sizes, and Jacobians that grow with them."""
    return joined(*(samples(4, scale, n) for n, scale in enumerate((1e-6, 1.0, 30.0, 1e6))))


def objective(data, l2=L2, normalizer=None, model=None) -> Objective:
    bounds = Bounds(R, B, M, normalizer)
    model = tangent() if model is None else model
    options = {"cache": False, "device": None, "progress": False}
    return Objective(model, in_order(data, 4), l2, bounds, **options)


@functools.cache
def _model() -> nn.Module:
    return copy.deepcopy(anchor()).eval()


def dense(data: TensorDataset) -> tuple[Tensor, Tensor]:
    """J (N, C, P) and f (N, C) at the anchor."""
    model = _model()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    inputs, _ = data.tensors

    def logits(weights, one):
        return functional_call(model, weights, (one,))

    parts = [jacrev(logits)(weights, one) for one in inputs]
    rows = torch.stack([torch.cat([p[n].flatten(1) for n in weights], dim=1) for p in parts])
    return rows, torch.stack([logits(weights, one) for one in inputs])


def clipped(residual: Tensor) -> Tensor:
    """The Huber loss's gradient: the residual, at most of norm B."""
    size = residual.norm(dim=-1, keepdim=True)
    return residual * torch.clamp(B / size, max=1.0)


class Written:
    """(1/E) Σ ρ(u_i (f_i + J_i Δ - t_i)) + l2/2 ‖Δ‖², as matrices."""

    def __init__(self, data: TensorDataset, normalizer: float, l2: float = L2) -> None:
        rows, logits = dense(data)
        norms = torch.linalg.matrix_norm(rows, ord=2)
        self.u = torch.clamp(R / norms, max=1.0)[:, None]
        self.rows = self.u[..., None] * rows
        self.start = self.u * (logits - M * nn.functional.one_hot(data.tensors[1], CLASSES))
        self.normalizer, self.l2 = normalizer, l2

    def residuals(self, delta: Tensor) -> Tensor:
        return self.start + self.rows @ delta

    def each(self, delta: Tensor) -> Tensor:
        """∇ℓ_i, (N, P)."""
        return torch.einsum("ncp,nc->np", self.rows, clipped(self.residuals(delta)))

    def gradient(self, delta: Tensor) -> Tensor:
        return self.each(delta).sum(dim=0) / self.normalizer + self.l2 * delta

    def minimum(self) -> Tensor:
        """By gradient steps of 1/M, which converge linearly with any clipping."""
        smooth = self.l2 + len(self.rows) * R**2 / self.normalizer
        delta = torch.zeros(self.rows.shape[2], dtype=torch.float64)
        for _ in range(2000):
            step = self.gradient(delta) / smooth
            delta = delta - step
            if float(step.norm()) < 1e-12:
                break
        return delta


def flat(values) -> Tensor:
    return torch.cat([value.detach().flatten() for value in values.values()])
