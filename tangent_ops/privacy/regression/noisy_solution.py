"""`NoisyStatistics`: released sums, and the solutions of any ridge that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tangent_ops.data import check_not_negative
from tangent_ops.delta import Delta
from tangent_ops.errors import ArgumentError, StatisticsError, UnsupportedError
from tangent_ops.privacy.parallel_composition import ASSUMES as ASSUMES_SHARDS
from tangent_ops.privacy.parallel_composition import parallel
from tangent_ops.privacy.regression.coordinates import PublicCoordinates
from tangent_ops.privacy.statement import PrivacyStatement, attach

CURVATURE = ("core_core", "core_head", "head_head")
SYMMETRIC = ("core_core", "head_head")
UNLIKELY = 0.05  # the probability that noise exceeds what the ridge allows for
_LEAST = 1e-6  # of a Cholesky factor's diagonal, in units of its largest entry


@dataclass(frozen=True, eq=False)
class NoisyStatistics:
    """Statistics of a square-loss fit with noise. All of it may be published.

    Attributes:
        coordinates: that the sums are in.
        sums: core_core (K, K), core_head (K, C, L), head_head (L, L), core_residual (K,),
            head_residual (C, L) and, if it was released, least_eigenvalue (); float64.
        spread: standard deviation of the noise of each sum that has noise. Beside the diagonal of
            core_core and head_head it is 1/√2 of that.
        samples: N.
        start: the deltas at which the residuals were taken.
        statement: what the release promises; solutions carry it.
    """

    coordinates: PublicCoordinates
    sums: dict[str, Tensor]
    spread: dict[str, float]
    samples: int
    start: Delta
    statement: PrivacyStatement

    @property
    def ridge(self) -> float:
        """AdaSSP's λ: what H's noise may amount to, less than what H's least eigenvalue surely is.

        Noise E on H has blocks of independent Gaussian entries. With a probability of at least
        1 - 3/4 · 5%, the norms of a symmetric block (m, m) and of another (m, n) are at most
        s (√(2m) + t) and s (√m + √n + t), t = √(2 ln(8 / 5%)) (Davidson, Szarek, 2001), and
        ‖E‖ is at most the largest of the symmetric ones' plus the other's. These are sharper than
        the union bounds in Wang 2018. Only the error depends on λ, not the privacy.
        """
        room = math.sqrt(2 * math.log(8 / UNLIKELY))
        core, outputs, head = self.sums["core_head"].shape
        spread = self.spread
        symmetric = (
            spread.get("core_core", 0.0) * (math.sqrt(2 * core) + room),
            spread.get("head_head", 0.0) * (math.sqrt(2 * head) + room),
        )
        mixed = spread.get("core_head", 0.0)
        mixed *= math.sqrt(core) + math.sqrt(outputs * head) + room
        sure = 0.0
        if "least_eigenvalue" in self.sums:
            sure = float(self.sums["least_eigenvalue"]) - room * spread["least_eigenvalue"]
        return max(0.0, max(symmetric) + mixed - max(0.0, sure))

    def solve(self, l2: float | None = None) -> Delta:
        """The start plus the solution of (H + Λ) z = g, in the coordinates.

        Eigenvalues of H below 0 are due to noise, and count as 0.

        Args:
            l2: the penalty l2/2 ‖Δ‖² on the move from the start, as in `TangentStatistics.solve`:
                Λ is l2 N C / 2 times the squared lengths of the coordinates' directions. None for
                Λ = `ridge` I, as AdaSSP.

        Returns:
            A delta with the statement attached.

        Raises:
            ArgumentError: l2 is negative or not finite.
            StatisticsError: l2 is too small to determine a solution.
        """
        outputs = self.coordinates.outputs
        if l2 is None:
            penalty = self.ridge * torch.ones(len(self._curvature), dtype=torch.float64)
        else:
            check_not_negative(l2=l2)
            core, head = self.coordinates.lengths
            penalty = l2 * self.samples * outputs / 2 * torch.cat([core, head.repeat(outputs)])
        matrix = self._curvature + penalty.diag()
        factor, info = torch.linalg.cholesky_ex(matrix)
        least, largest = factor.diagonal().aminmax()
        if int(info) or not float(least) > _LEAST * float(largest):
            raise StatisticsError(
                f"with l2 = {l2!r} the equations determine no solution in float64: use a larger "
                "l2, or None for AdaSSP's ridge if there is noise on H"
            )
        right = torch.cat([self.sums["core_residual"], self.sums["head_residual"].flatten()])
        found = torch.cholesky_solve(right[:, None], factor)[:, 0]
        return moved(self.coordinates, self.start, found, self.statement)

    @cached_property
    def _curvature(self) -> Tensor:
        """H with its negative eigenvalues at 0."""
        values, vectors = torch.linalg.eigh(curvature_of(*(self.sums[n] for n in CURVATURE)))
        return vectors * values.clamp_min(0) @ vectors.T


def curvature_of(core: Tensor, mixed: Tensor, head: Tensor) -> Tensor:
    """H, (K + C L, K + C L), of its blocks core_core, core_head and head_head."""
    mixed_flat = mixed.flatten(1)
    own = torch.block_diag(*[head] * mixed.shape[1])
    return torch.cat([torch.cat([core, mixed_flat], 1), torch.cat([mixed_flat.T, own], 1)])


def moved(
    coordinates: PublicCoordinates, start: Delta, flat: Tensor, statement: PrivacyStatement
) -> Delta:
    """The start plus a vector (K + C L,) of the coordinates, with a statement attached."""
    core = coordinates.core.shape[1]
    found = coordinates.deltas(flat[:core], flat[core:].reshape(coordinates.outputs, -1))
    return attach(Delta({n: start[n].cpu() + found[n] for n in start}, start.meta), statement)


def add_shards(shards: Mapping[str, NoisyStatistics]) -> NoisyStatistics:
    """The statistics of disjoint shards together; ε is the shards', not its sum.

    Each sample is in one shard, so all releases together, and their sum, are as private for it as
    its own shard's release (McSherry, SIGMOD 2009, theorem 4). The noise of K shards adds up: its
    standard deviation is √K times that of one release for all samples.

    Args:
        shards: shard -> its statistics.

    Raises:
        ArgumentError: no shard, or other coordinates, starts or kinds of sums than the first's.
        UnsupportedError: shards whose phases differ: their sum's guarantee is no single phase's.
    """
    statements = {name: one.statement for name, one in shards.items()}
    parallel(statements)  # checks them
    (name, first), *others = shards.items()
    for other, one in others:
        _check_same(name, first, other, one)
    every: Sequence[NoisyStatistics] = list(shards.values())
    sums = {n: torch.stack([one.sums[n] for one in every]).sum(0) for n in first.sums}
    spread = {n: math.sqrt(sum(one.spread[n] ** 2 for one in every)) for n in first.spread}
    statement = replace(
        first.statement,
        assumes=tuple(
            dict.fromkeys(
                (*(text for one in every for text in one.statement.assumes), *ASSUMES_SHARDS)
            )
        ),
    )
    samples = sum(one.samples for one in every)
    return replace(first, sums=sums, spread=spread, samples=samples, statement=statement)


def _check_same(name: str, first: NoisyStatistics, other: str, one: NoisyStatistics) -> None:
    if (
        one.statement.phases != first.statement.phases
        or one.statement.delta != first.statement.delta
    ):
        raise UnsupportedError(
            f"shards {name!r} and {other!r} have other phases or another delta: release both with "
            "the same Privacy(noise_multiplier=, delta=)"
        )
    mine, theirs = first.coordinates, one.coordinates
    pairs = ((mine.core, theirs.core), (mine.head, theirs.head))
    same = (mine.anchor, mine.basis) == (theirs.anchor, theirs.basis)
    same = (
        same and all(torch.equal(a, b) for a, b in pairs) and first.sums.keys() == one.sums.keys()
    )
    same = same and first.spread.keys() == one.spread.keys()
    if not same or any(not torch.equal(first.start[n], one.start[n]) for n in first.start):
        raise ArgumentError(
            f"shards {name!r} and {other!r} have other coordinates, starts or kinds of sums: give "
            "all shards the same coordinates and shares"
        )
