"""`Ridge`: optima, and what chooses among them, from `TangentStatistics`, in float64.

The optimum solves (H + λ I) Δ = g with λ = l2 N C / 2. With H = [[K, X], [Xᵀ, I ⊗ G]], of which K
is the core's block and G the head's for each output, the eigenvectors of G (h, h) serve every λ,
and what remains is a Cholesky decomposition in the k columns of the core, of

    S = K + λ I - Σ_c X_c (G + λ I)⁻¹ X_cᵀ                                 (the Schur complement)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tangent_ops.data import check_not_negative
from tangent_ops.delta import Delta, DeltaMeta
from tangent_ops.errors import ArgumentError, StatisticsError

if TYPE_CHECKING:
    from tangent_ops.composition.statistics import TangentStatistics

HOPELESS = 1e13  # condition number at which float64 leaves three digits
_STEPS = 30  # of power iteration


class SolvedDelta(Delta):
    """An optimum from statistics.

    Attributes:
        l2: the penalty's weight.
        condition: estimate of the condition number of H + λ I.
        loss: mean of (1/C) ‖r - J Δ‖² over the samples, without the penalty.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        meta: DeltaMeta,
        *,
        l2: float,
        condition: float,
        loss: float,
    ) -> None:
        super().__init__(tensors, meta)
        self.l2 = l2
        self.condition = condition
        self.loss = loss


@dataclass(frozen=True)
class PathRow:
    """One l2 of a path.

    Attributes:
        delta: the optimum, with l2, condition and loss.
        effective_dimension: tr H (H + λ I)⁻¹, of the P columns those that the data determine.
        gcv: generalised cross-validation (Golub, Heath, Wahba, Technometrics 1979), an estimate of
            the loss on new samples: loss / (1 - effective_dimension / (N C))².
    """

    delta: SolvedDelta
    effective_dimension: float
    gcv: float


@dataclass(frozen=True)
class FeatureRows:
    """f and J of some samples, as `TangentStatistics` sums them.

    Attributes:
        outputs: f, (n, C).
        core: φ, (n, C, k).
        head: a, (n, h), with a 1 for a bias.
    """

    outputs: Tensor
    core: Tensor
    head: Tensor

    @classmethod
    def joined(cls, several: Sequence[FeatureRows]) -> FeatureRows:
        """The samples of all, in order."""
        return cls(
            torch.cat([rows.outputs for rows in several]),
            torch.cat([rows.core for rows in several]),
            torch.cat([rows.head for rows in several]),
        )

    def __len__(self) -> int:
        return len(self.outputs)


class Ridge:
    """Solves for the optimum of statistics with any l2; one eigendecomposition serves all.

    Args:
        statistics: of at least one sample.

    Raises:
        StatisticsError: there is no sample.
    """

    def __init__(self, statistics: TangentStatistics) -> None:
        if not len(statistics):
            raise StatisticsError("the statistics are of no sample: there is nothing to solve")
        self.meta = statistics.meta
        self.samples = len(statistics)
        unit = 2.0**-self.meta.fraction_bits
        terms = {name: term.double() * unit for name, term in statistics.terms.items()}
        self.core, self.core_right = terms["core_core"], terms["core_residual"]
        self.square = float(terms["residual_residual"])
        self.head_values, self.basis = torch.linalg.eigh(terms["head_head"])
        # In the basis of the head's eigenvectors.
        self.cross = terms["core_head"] @ self.basis
        self.head_right = terms["head_residual"] @ self.basis

    @property
    def scale(self) -> float:
        """λ / l2."""
        return self.samples * self.meta.outputs / 2

    def solve(self, l2: float) -> SolvedDelta:
        """See `TangentStatistics.solve`."""
        return self.system(l2).solved(l2)

    def path(self, l2s: Sequence[float]) -> list[PathRow]:
        """See `TangentStatistics.solve_path`."""
        if not len(l2s):
            raise ArgumentError("l2s is empty: give at least one")
        check_not_negative(**{f"l2s[{index}]": l2 for index, l2 in enumerate(l2s)})
        rows = []
        for l2 in l2s:
            system = self.system(l2)
            delta, dimension = system.solved(l2), system.effective_dimension()
            free = 1 - dimension / (self.samples * self.meta.outputs)
            gcv = delta.loss / free**2 if free > 0 else math.inf
            rows.append(PathRow(delta, dimension, gcv))
        return rows

    def system(self, l2: float, *, fewer: int = 0) -> System:
        """H + λ I of one l2, decomposed; λ of N - `fewer` samples.

        Raises:
            ArgumentError: l2 is negative or not finite.
            StatisticsError: it is not positive definite in float64.
        """
        check_not_negative(l2=l2)
        return System(self, l2 * self.scale * (1 - fewer / self.samples))

    def predictions(self, rows: FeatureRows, l2: float) -> Tensor:
        """f + J Δ at the optimum, (n, C) in float64."""
        return rows.outputs.double() + self.system(l2).moves(rows)

    def leave_one_out(self, rows: FeatureRows, residuals: Tensor, l2: float) -> Tensor:
        """r_i - J_i Δ₋ᵢ of the optimum without sample i, for samples that are in the statistics.

        Exact: (I - J_i A⁻¹ J_iᵀ)⁻¹ (r_i - J_i A⁻¹ g) with A = H + λ₋ I and λ₋ of N - 1 samples.

        Args:
            rows: of these samples.
            residuals: their r, (n, C).
            l2: the penalty's weight.

        Returns:
            (n, C): float64.

        Raises:
            StatisticsError: as `solve`; a single sample, or a class's weight that is not 1.
        """
        if self.samples < 2:
            raise StatisticsError("leave-one-out needs two samples: nothing is left without one")
        if self.meta.class_weights is not None:
            raise StatisticsError("leave-one-out is for statistics without class weights")
        system = self.system(l2, fewer=1)
        left = residuals.double() - system.moves(rows)
        eye = torch.eye(self.meta.outputs, dtype=torch.float64)
        return torch.linalg.solve(eye - system.leverage(rows), left[..., None])[..., 0]

    def covariance(
        self, rows: FeatureRows, l2: float, noise_variance: float | None = None
    ) -> Tensor:
        """σ² J (H + λ I)⁻¹ Jᵀ: each sample's covariance of the outputs, (n, C, C), given the data.

        That of `exact.predictive_covariance`, whose noise_variance is 2/C of this one.

        Args:
            rows: of any samples.
            l2: the penalty's weight.
            noise_variance: σ², of an output; None for the mean squared residual at the optimum.
        """
        system = self.system(l2)
        if noise_variance is None:
            noise_variance = system.solved(l2).loss
        return noise_variance * system.leverage(rows)


class System:
    """H + λ I, decomposed."""

    def __init__(self, ridge: Ridge, penalty: float) -> None:
        self.ridge, self.penalty = ridge, penalty
        self.inverse = 1 / (ridge.head_values + penalty)
        if len(self.inverse) and not bool((self.inverse > 0).all() & self.inverse.isfinite().all()):
            raise _hopeless(penalty, math.inf)
        self.scaled = ridge.cross * self.inverse
        flat = self.scaled.flatten(1)
        self.schur = ridge.core - flat @ ridge.cross.flatten(1).T
        self.schur.diagonal().add_(penalty)
        self.factor, info = torch.linalg.cholesky_ex(self.schur)
        if int(info):
            raise _hopeless(penalty, math.inf)

    def apply(self, core: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        """(H + λ I)⁻¹ of a right-hand side (k,) and (C, h), the head in its eigenvectors' basis."""
        right = core - (self.scaled * head).sum((1, 2))
        found = torch.cholesky_solve(right[:, None], self.factor)[:, 0]
        rest = head - torch.tensordot(found, self.ridge.cross, 1)
        return found, rest * self.inverse

    def product(self, core: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        """(H + λ I) of such a vector."""
        ridge = self.ridge
        above = ridge.core @ core + (ridge.cross * head).sum((1, 2)) + self.penalty * core
        below = torch.tensordot(core, ridge.cross, 1) + (ridge.head_values + self.penalty) * head
        return above, below

    @cached_property
    def optimum(self) -> tuple[Tensor, Tensor]:
        """Δ, (k,) and (C, h), the head in its eigenvectors' basis."""
        return self.apply(self.ridge.core_right, self.ridge.head_right)

    def solved(self, l2: float) -> SolvedDelta:
        """The optimum as a delta."""
        ridge, condition = self.ridge, self.condition()
        if not condition < HOPELESS:
            raise _hopeless(self.penalty, condition)
        core, head = self.optimum
        right = ridge.core_right @ core + (ridge.head_right * head).sum()
        above, below = self.product(core, head)
        curved = above @ core + (below * head).sum() - self.penalty * _square(core, head)
        loss = (ridge.square - 2 * float(right) + float(curved)) / (2 * ridge.scale)
        parts = _named(ridge, core, head @ ridge.basis.T)
        meta = replace(ridge.meta.delta, shard=None)
        return SolvedDelta(parts, meta, l2=l2, condition=condition, loss=max(loss, 0.0))

    def condition(self) -> float:
        """The largest eigenvalue by the smallest, by power iterations: an estimate from below."""
        ridge = self.ridge
        largest = _power(self.product, ridge)
        return largest * _power(self.apply, ridge)

    def effective_dimension(self) -> float:
        """tr H (H + λ I)⁻¹."""
        flat = self.scaled.flatten(1)
        mixed = torch.cholesky_solve(flat @ flat.T, self.factor).trace()
        trace = self.inverse.sum() * self.ridge.meta.outputs + mixed
        trace = trace + torch.cholesky_inverse(self.factor).trace()
        columns = self.ridge.cross.shape[0] + self.ridge.head_right.numel()
        return columns - self.penalty * float(trace)

    def moves(self, rows: FeatureRows) -> Tensor:
        """J Δ at the optimum, (n, C)."""
        core, head = self.optimum
        return rows.core.double() @ core + rows.head.double() @ self.ridge.basis @ head.T

    def leverage(self, rows: FeatureRows) -> Tensor:
        """J (H + λ I)⁻¹ Jᵀ of each sample, (n, C, C)."""
        inputs = rows.head.double() @ self.ridge.basis
        left = rows.core.double() - torch.einsum("kch,nh->nck", self.scaled, inputs)
        k = left.shape[-1]
        solved = torch.linalg.solve_triangular(self.factor, left.reshape(-1, k).T, upper=False)
        solved = solved.T.view_as(left)
        own = (inputs.square() * self.inverse).sum(1)
        return solved @ solved.mT + torch.diag_embed(own[:, None].expand(left.shape[:2]))


def _power(product, ridge: Ridge) -> float:
    """The largest eigenvalue of a positive definite map, from below."""
    noise = torch.Generator().manual_seed(0)
    core = torch.randn(ridge.core_right.shape, generator=noise, dtype=torch.float64)
    head = torch.randn(ridge.head_right.shape, generator=noise, dtype=torch.float64)
    value = 0.0
    for _ in range(_STEPS):
        size = math.sqrt(_square(core, head))
        core, head = product(core / size, head / size)
        value = math.sqrt(_square(core, head))
    return value


def _square(core: Tensor, head: Tensor) -> float:
    return float(core.square().sum() + head.square().sum())


def _named(ridge: Ridge, core: Tensor, head: Tensor) -> dict[str, Tensor]:
    """The vector's parts by name, in the deltas' dtypes."""
    found, at, column = {}, 0, 0
    for name, dtype, shape in ridge.meta.layout:
        size = torch.Size(shape).numel()
        if name in ridge.meta.head:
            width = size // ridge.meta.outputs
            part, column = head[:, column : column + width], column + width
        else:
            part, at = core[at : at + size], at + size
        found[name] = part.reshape(shape).to(getattr(torch, dtype))
    return found


def _hopeless(penalty: float, condition: float) -> StatisticsError:
    known = "" if math.isinf(condition) else f" (its condition number is about {condition:.0e})"
    return StatisticsError(
        f"with λ = l2 N C / 2 = {penalty:g} the equations determine no optimum in float64{known}: "
        "use a larger l2, or more samples"
    )
