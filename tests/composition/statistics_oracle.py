"""Made-up samples of statistics, and the dense float64 problem that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_ops.composition.feature_rows import FeatureRows
from tangent_ops.composition.fixed_terms import add_samples
from tangent_ops.composition.statistics import StatisticsMeta, TangentStatistics
from tangent_ops.delta import DeltaMeta


@dataclass(frozen=True)
class Samples:
    """Features of n samples: f (n, C), φ (n, C, k), a (n, h) and r (n, C)."""

    rows: FeatureRows
    residuals: Tensor
    labels: Tensor
    meta: StatisticsMeta

    def take(self, indices: list[int]) -> Samples:
        rows = self.rows
        chosen = FeatureRows(rows.outputs[indices], rows.core[indices], rows.head[indices])
        return Samples(chosen, self.residuals[indices], self.labels[indices], self.meta)

    def statistics(self, groups: int = 1, weights: Tensor | None = None) -> TangentStatistics:
        """The sums, added in groups of that many samples."""
        total = TangentStatistics.zero(self.meta)
        for start in range(0, len(self.labels), groups):
            some = list(range(len(self.labels)))[start : start + groups]
            part = self.take(some)
            own = None if weights is None else weights[part.labels]
            add_samples(total, part.rows, part.residuals, part.labels, own)
        total.sort_list()
        return total

    def jacobian(self) -> Tensor:
        """J, (n, C, P): the core's columns, then the head's, output by output."""
        n, c = self.residuals.shape
        phi, a = self.rows.core.double(), self.rows.head.double()
        head = torch.einsum("cd,nh->ncdh", torch.eye(c, dtype=torch.float64), a)
        return torch.cat([phi, head.reshape(n, c, -1)], dim=2)

    def optimum(self, l2: float, weights: Tensor | None = None) -> Tensor:
        """argmin of the mean of (w/C) ‖r - J Δ‖², and l2/2 ‖Δ‖², by least squares of all rows."""
        n, c = self.residuals.shape
        own = torch.ones(n) if weights is None else weights[self.labels]
        root = (own.double() / (n * c)).sqrt()[:, None]
        rows = (self.jacobian() * root[..., None]).flatten(0, 1)
        right = (self.residuals.double() * root).flatten()
        penalty = (l2 / 2) ** 0.5 * torch.eye(rows.shape[1], dtype=torch.float64)
        stacked = torch.cat([rows, penalty])
        return torch.linalg.lstsq(
            stacked, torch.cat([right, right.new_zeros(len(penalty))])
        ).solution


def make_samples(
    count: int,
    core: int = 5,
    outputs: int = 3,
    width: int = 4,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    bits: int = 48,
) -> Samples:
    """Random samples of a model with a core, and a head of `width` inputs and a bias."""
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise, dtype=dtype)

    head = torch.cat([normal(count, width), torch.ones(count, 1, dtype=dtype)], dim=1)
    rows = FeatureRows(normal(count, outputs), normal(count, outputs, core), head)
    labels = torch.arange(count) % outputs
    layout = (
        ("core", "float64", (core,)),
        ("head.weight", "float64", (outputs, width)),
        ("head.bias", "float64", (outputs,)),
    )
    meta = StatisticsMeta(
        DeltaMeta("a" * 64, "made up", ".*", loss="square", basis="b" * 64),
        layout,
        ("head.weight", "head.bias"),
        outputs,
        fraction_bits=bits,
    )
    return Samples(rows, normal(count, outputs) * 3, labels, meta)


def flat(delta: dict[str, Tensor]) -> Tensor:
    """A delta in the columns of `Samples.jacobian`."""
    head = torch.cat([delta["head.weight"], delta["head.bias"][:, None]], dim=1)
    return torch.cat([delta["core"], head.flatten()])
