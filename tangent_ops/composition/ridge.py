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

from tangent_ops.checks import check_not_negative
from tangent_ops.composition.feature_rows import FeatureRows
from tangent_ops.delta import Delta, DeltaMeta
from tangent_ops.errors import ArgumentError, StatisticsError

if TYPE_CHECKING:
    from tangent_ops.composition.statistics import TangentStatistics

TRIED = tuple(10.0 ** (k / 2) for k in range(6, -17, -1))  # l2 from 1,000 to 1e-8
HOPELESS = 1e13  # condition number at which float64 leaves three digits
ROUNDING = 0.01  # relative error of a solution that the terms' rounding may cause
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
        meta: DeltaMeta | None,
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
        return self.system(l2).solved()

    def path(self, l2s: Sequence[float]) -> list[PathRow]:
        """See `TangentStatistics.solve_path`."""
        _check_l2s(l2s)
        return [self.system(l2).row() for l2 in l2s]

    def choose(self, l2s: Sequence[float] = TRIED) -> PathRow:
        """See `TangentStatistics.choose`."""
        _check_l2s(l2s)
        found: list[System] = []
        hopeless = None
        for l2 in sorted(l2s, reverse=True):
            try:
                found.append(self.system(l2))
            except StatisticsError as error:  # smaller ones are hopeless, too
                hopeless = error
                break
        for system in sorted(found, key=lambda system: system.gcv):
            if (problem := system.problem()) is None:
                return system.row()
            hopeless = hopeless or problem
        assert hopeless is not None
        raise hopeless

    def system(self, l2: float, *, fewer: int = 0) -> System:
        """H + λ I, decomposed; λ of N - `fewer` samples.

        Raises:
            ArgumentError: l2 is negative or not finite.
            StatisticsError: it is not positive definite in float64.
        """
        check_not_negative(l2=l2)
        return System(self, l2, 1 - fewer / self.samples)

    def predictions(self, rows: FeatureRows, l2: float) -> Tensor:
        """f + J Δ at the optimum, (n, C) in float64."""
        return rows.outputs.double() + self.system(l2).moves(rows)

    def leave_one_out(self, rows: FeatureRows, residuals: Tensor, l2: float) -> Tensor:
        """r_i - J_i Δ₋ᵢ of the optimum without sample i, for samples that are in the statistics.

        Exact: (I - J_i A⁻¹ J_iᵀ)⁻¹ (r_i - J_i A⁻¹ g) with A = H + λ I and λ of N - 1 samples.

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

    def changes(
        self, rows: FeatureRows, residuals: Tensor, others: FeatureRows, l2: float
    ) -> Tensor:
        """f₋ᵢ(x) - f(x): the change of other samples' outputs when each sample is left out.

        Exact, as `exact.Influence.change`, from (N, m) products in the columns of the statistics.

        Args:
            rows: of samples that are in the statistics.
            residuals: as in `leave_one_out`, of these samples.
            others: of the samples whose outputs change.
            l2: the penalty's weight.

        Returns:
            (n, m, C): float64.

        Raises:
            StatisticsError: as in `leave_one_out`.
        """
        system = self.system(l2, fewer=1)
        left = self.leave_one_out(rows, residuals, l2)  # (I - h_ii)⁻¹ (r_i - J_i Δ)
        moved = system.moves(others) - self.system(l2).moves(others)
        return moved - torch.einsum("nmcd,nc->nmd", system.cross_leverage(rows, others), left)

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
            noise_variance = system.loss
        return noise_variance * system.leverage(rows)


class System:
    """H + λ I, decomposed.

    Args:
        ridge: what is solved.
        l2: the penalty's weight.
        share: of the samples that the penalty counts.
    """

    def __init__(self, ridge: Ridge, l2: float, share: float = 1.0) -> None:
        self.ridge, self.l2 = ridge, l2
        self.penalty = l2 * ridge.scale * share
        self.inverse = 1 / (ridge.head_values + self.penalty)
        if len(self.inverse) and not bool((self.inverse > 0).all() & self.inverse.isfinite().all()):
            raise self.hopeless(math.inf)
        self.scaled = ridge.cross * self.inverse
        flat = self.scaled.flatten(1)
        self.schur = ridge.core - flat @ ridge.cross.flatten(1).T
        self.schur.diagonal().add_(self.penalty)
        self.factor, info = torch.linalg.cholesky_ex(self.schur)
        if int(info):
            raise self.hopeless(math.inf)

    def apply(self, core: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        """(H + λ I)⁻¹ of a right-hand side (k,) and (C, h), the head in its eigenvectors' basis."""
        right = core - self.scaled.flatten(1) @ head.flatten()
        found = torch.cholesky_solve(right[:, None], self.factor)[:, 0]
        rest = head - (found @ self.ridge.cross.flatten(1)).view_as(head)
        return found, rest * self.inverse

    def product(self, core: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        """(H + λ I) of such a vector."""
        ridge = self.ridge
        cross = ridge.cross.flatten(1)
        above = ridge.core @ core + cross @ head.flatten() + self.penalty * core
        below = (core @ cross).view_as(head) + (ridge.head_values + self.penalty) * head
        return above, below

    @cached_property
    def optimum(self) -> tuple[Tensor, Tensor]:
        """Δ, (k,) and (C, h), the head in its eigenvectors' basis."""
        return self.apply(self.ridge.core_right, self.ridge.head_right)

    @cached_property
    def loss(self) -> float:
        """Mean of (1/C) ‖r - J Δ‖² at the optimum."""
        ridge = self.ridge
        core, head = self.optimum
        # g Δ = Δ (H + λ I) Δ at the optimum.
        right = ridge.core_right @ core + (ridge.head_right * head).sum()
        penalty = self.penalty * (core.square().sum() + head.square().sum())
        return max(0.0, (ridge.square - float(right) - float(penalty)) / (2 * ridge.scale))

    def solved(self) -> SolvedDelta:
        """The optimum as a delta."""
        if problem := self.problem():
            raise problem
        core, head = self.optimum
        parts = _named(self.ridge, core, head @ self.ridge.basis.T)
        meta = replace(self.ridge.meta.delta, shard=None)
        return SolvedDelta(parts, meta, l2=self.l2, condition=self.condition, loss=self.loss)

    def row(self) -> PathRow:
        """The optimum, and what chooses its l2."""
        return PathRow(self.solved(), self.effective_dimension, self.gcv)

    @property
    def gcv(self) -> float:
        """See `PathRow`."""
        free = 1 - self.effective_dimension / (2 * self.ridge.scale)
        return self.loss / free**2 if free > 0 else math.inf

    @cached_property
    def least(self) -> float:
        """The smallest eigenvalue, by power iterations of the inverse: an estimate from above."""
        return 1 / _power(self.apply, self.ridge)

    @cached_property
    def condition(self) -> float:
        """The largest eigenvalue by the smallest, by power iterations: an estimate from below."""
        return _power(self.product, self.ridge) / self.least

    def problem(self) -> StatisticsError | None:
        """Why the solution would be wrong, or None.

        The terms of N samples, rounded to units u, put a matrix E of independent errors on H, with
        ‖E‖ of about 0.6 u √(N P) for P columns. It moves Δ by at most ‖E‖ ‖Δ‖ / least.
        """
        ridge = self.ridge
        if not self.condition < HOPELESS:
            return self.hopeless(self.condition)
        columns = ridge.cross.shape[0] + ridge.head_right.numel()
        rounding = 0.6 * 2.0**-ridge.meta.fraction_bits * math.sqrt(ridge.samples * columns)
        if rounding <= ROUNDING * self.least:
            return None
        return StatisticsError(
            f"with l2={self.l2:g}, terms in steps of 2^-{ridge.meta.fraction_bits} are too coarse: "
            f"their rounding may move the solution by {rounding / self.least:.0%}. Use a larger "
            "l2, or compute the statistics with more fraction_bits"
        )

    @cached_property
    def effective_dimension(self) -> float:
        """tr H (H + λ I)⁻¹."""
        flat = self.scaled.flatten(1)
        inverse = torch.cholesky_inverse(self.factor)
        trace = self.inverse.sum() * self.ridge.meta.outputs + (inverse * (flat @ flat.T)).sum()
        columns = self.ridge.cross.shape[0] + self.ridge.head_right.numel()
        return columns - self.penalty * float(trace + inverse.trace())

    def moves(self, rows: FeatureRows) -> Tensor:
        """J Δ at the optimum, (n, C)."""
        core, head = self.optimum
        return rows.core.double() @ core + rows.head.double() @ self.ridge.basis @ head.T

    def leverage(self, rows: FeatureRows) -> Tensor:
        """J (H + λ I)⁻¹ Jᵀ of each sample, (n, C, C)."""
        solved, inputs = self._halves(rows)
        own = (inputs.square() * self.inverse).sum(1)
        return solved @ solved.mT + torch.diag_embed(own[:, None].expand(solved.shape[:2]))

    def cross_leverage(self, rows: FeatureRows, others: FeatureRows) -> Tensor:
        """J (H + λ I)⁻¹ Jᵀ of each pair of samples, (n, m, C, C)."""
        (left, inputs), (right, seen) = self._halves(rows), self._halves(others)
        shared = (inputs * self.inverse) @ seen.T
        eye = torch.eye(left.shape[1], dtype=torch.float64)
        return torch.einsum("nck,mdk->nmcd", left, right) + shared[..., None, None] * eye

    def _halves(self, rows: FeatureRows) -> tuple[Tensor, Tensor]:
        """The core's half of a product by the inverse, (n, C, k), and the head's inputs, (n, h)."""
        inputs = rows.head.double() @ self.ridge.basis
        left = rows.core.double() - torch.einsum("kch,nh->nck", self.scaled, inputs)
        solved = torch.linalg.solve_triangular(self.factor, left.flatten(0, 1).T, upper=False)
        return solved.T.view_as(left), inputs

    def hopeless(self, condition: float) -> StatisticsError:
        """The error that says so."""
        known = "" if math.isinf(condition) else f" (a condition number of about {condition:.0e})"
        return StatisticsError(
            f"with l2={self.l2:g}, {self.ridge.samples} samples determine no optimum in "
            f"float64{known}: use a larger l2, or more samples"
        )


def _check_l2s(l2s: Sequence[float]) -> None:
    if not len(l2s):
        raise ArgumentError("l2s is empty: give at least one")
    check_not_negative(**{f"l2s[{index}]": l2 for index, l2 in enumerate(l2s)})


def _power(product, ridge: Ridge) -> float:
    """The largest eigenvalue of a positive definite map, from below."""
    noise = torch.Generator().manual_seed(0)
    core = torch.randn(ridge.core_right.shape, generator=noise, dtype=torch.float64)
    head = torch.randn(ridge.head_right.shape, generator=noise, dtype=torch.float64)
    value = 0.0
    for _ in range(_STEPS):
        size = _norm(core, head)
        core, head = product(core / size, head / size)
        value = _norm(core, head)
    return value


def _norm(core: Tensor, head: Tensor) -> float:
    return math.sqrt(float(core.square().sum() + head.square().sum()))


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
