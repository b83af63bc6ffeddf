"""`TangentStatistics`: the sums over samples that determine a square-loss fit, and exact algebra.

With f(x) + J(x) Δ and a square loss, the optimum on any set of samples depends on them through

    H = Σ_i J_iᵀ J_i        g = Σ_i J_iᵀ r_i        Σ_i ‖r_i‖²        r_i = y_i - f(x_i)

only. Columns of J are those of a core (k of them, in which all outputs differ) and those of a
linear head, whose rows are e_c ⊗ a_i for the head's input a_i with a 1 for its bias. So H has the
blocks Σ_ic φ_ic φ_icᵀ (k, k), Σ_i φ_ic a_iᵀ (k, C, h), and Σ_i a_i a_iᵀ (h, h) for all outputs.

Each sample's terms are rounded to multiples of 2^-bits once, and added as int64. So sums do not
depend on the order, and subtracting a sample leaves, bit for bit, what never having seen it gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tangent_ops.composition.ridge import TRIED, PathRow, Ridge, SolvedDelta
from tangent_ops.delta import DeltaMeta
from tangent_ops.errors import StatisticsError
from tangent_ops.files import dtype_name, to_json

FRACTION_BITS = 24
LIMIT = 2**63 - 1
# Name -> shape, in k core columns, C outputs and h entries of the head's input.
TERMS = {
    "core_core": "kk",
    "core_head": "kCh",
    "head_head": "hh",
    "core_residual": "k",
    "head_residual": "Ch",
    "residual_residual": "",
}


@dataclass(frozen=True)
class StatisticsMeta:
    """What statistics must have in common to be added.

    Attributes:
        delta: origin of the delta that they determine: anchor, model, trainable, basis, loss.
        layout: (name, dtype, shape) of each tensor of that delta, in the order of the columns.
        head: names of the head's weight and bias; empty if it is not trained or not linear; without
            the bias if that is not trained.
        outputs: C.
        classes: the names of the classes, if they are given.
        class_weights: of each class's samples, if they are given.
        fraction_bits: terms are multiples of 2^-fraction_bits.
    """

    delta: DeltaMeta
    layout: tuple[tuple[str, str, tuple[int, ...]], ...]
    head: tuple[str, ...]
    outputs: int
    classes: tuple[str, ...] | None = None
    class_weights: tuple[float, ...] | None = None
    fraction_bits: int = FRACTION_BITS

    @property
    def core_columns(self) -> int:
        """k."""
        return sum(torch.Size(shape).numel() for n, _, shape in self.layout if n not in self.head)

    @property
    def head_entries(self) -> int:
        """h: the entries of the head's input, and one for its bias."""
        shapes = {name: shape for name, _, shape in self.layout}
        return sum(torch.Size(shapes[name]).numel() // self.outputs for name in self.head)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the terms."""
        sizes = {"k": self.core_columns, "C": self.outputs, "h": self.head_entries}
        return {name: tuple(sizes[letter] for letter in shape) for name, shape in TERMS.items()}

    def check_same(self, other: StatisticsMeta, what: str) -> None:
        """Raise StatisticsError, naming what differs and the way out, if `other` differs."""
        if self == other:
            return
        mine, theirs = self._named(), other._named()
        name = next(name for name in mine if mine[name] != theirs[name])
        raise StatisticsError(
            f"{what} has another {name}: {_short(theirs[name])}, not {_short(mine[name])}. "
            "Statistics add up if anchor, basis, loss, classes and options are the same: compute "
            "it again with these"
        )

    def to_json(self) -> str:
        """One line, for `from_json`."""
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> StatisticsMeta:
        """What `to_json` wrote."""
        found = json.loads(line)
        layout = tuple((name, dtype, tuple(shape)) for name, dtype, shape in found["layout"])
        return cls(
            DeltaMeta(**found["delta"]),
            layout,
            tuple(found["head"]),
            found["outputs"],
            found["classes"] and tuple(found["classes"]),
            found["class_weights"] and tuple(found["class_weights"]),
            found["fraction_bits"],
        )

    def _named(self) -> dict[str, Any]:
        delta = self.delta
        return {
            "anchor": delta.anchor,
            "basis": (delta.rank, delta.basis),
            "loss": delta.loss,
            "list of classes": self.classes,
            "set of class weights": self.class_weights,
            "number of fraction bits": self.fraction_bits,
            "layout": (self.layout, self.head, self.outputs),
            "name of the model or pattern": (delta.model, delta.trainable),
            "origin": delta,
        }


class TangentStatistics:
    """The sums of some samples; see the module. `tangent_ops.statistics` computes them.

    ``a + b`` are the statistics of all samples of both, ``a - b`` those of a's samples without b's,
    bit for bit. Statistics reveal data: they are not a privacy mechanism.

    Args:
        meta: what the sums are of.
        terms: name -> int64 sum, as in `TERMS`.
        counts: int64 numbers of samples of each class, (C,); of one "class", (1,), if targets are
            no classes.
        reach: sum over the samples of the largest magnitude among the sample's terms. It is at most
            2^63 - 1, so no sum over a subset of the samples overflows.
        digests: (N, 2) int64, sorted: 128 bits of a hash of each sample's features, by which
            ``a - b`` knows that b's samples are among a's; None if the list is not kept.

    Raises:
        StatisticsError: names, shapes or dtypes other than these.
    """

    def __init__(
        self,
        meta: StatisticsMeta,
        terms: Mapping[str, Tensor],
        counts: Tensor,
        reach: int,
        digests: Tensor | None = None,
    ) -> None:
        shapes = meta.shapes()
        for name, shape in shapes.items():
            found = terms.get(name)
            if found is None or tuple(found.shape) != shape or found.dtype != torch.int64:
                got = "missing" if found is None else f"{found.dtype} of {tuple(found.shape)}"
                raise StatisticsError(f"{name} is {got}: expected torch.int64 of {shape}")
        self.meta = meta
        self.terms = {name: terms[name] for name in shapes}
        self.counts = counts
        self.reach = reach
        self.digests = digests

    @classmethod
    def zero(cls, meta: StatisticsMeta, labelled: bool = True) -> TangentStatistics:
        """Of no sample; `labelled` if targets are classes."""
        terms = {name: torch.zeros(s, dtype=torch.int64) for name, s in meta.shapes().items()}
        counts = torch.zeros(meta.outputs if labelled else 1, dtype=torch.int64)
        return cls(meta, terms, counts, 0, torch.zeros(0, 2, dtype=torch.int64))

    def __len__(self) -> int:
        """N, the number of samples."""
        return int(self.counts.sum())

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        listed = 0 if self.digests is None else self.digests.nbytes
        return sum(term.nbytes for term in self.terms.values()) + self.counts.nbytes + listed

    def __add__(self, other: TangentStatistics) -> TangentStatistics:
        """Of all samples of both.

        Raises:
            StatisticsError: another anchor, basis, loss, list of classes or layout; a sum that is
                out of range.
        """
        self._check(other)
        reach = self.reach + other.reach
        if reach > LIMIT:
            raise StatisticsError(
                f"the sum is out of range: its samples' largest terms come to {reach:.3g} units "
                f"of 2^-{self.meta.fraction_bits}, more than 2^63. Compute all statistics with "
                "fewer fraction_bits"
            )
        digests = None
        if self.digests is not None and other.digests is not None:
            digests = _sorted(torch.cat([self.digests, other.digests]))
        terms = {name: term + other.terms[name] for name, term in self.terms.items()}
        return TangentStatistics(self.meta, terms, self.counts + other.counts, reach, digests)

    def __sub__(self, other: TangentStatistics) -> TangentStatistics:
        """Without the other's samples, as if they had never been added.

        Raises:
            StatisticsError: as for ``+``; some of the other's samples are not among these, which is
                checked sample by sample unless a list of samples is missing.
        """
        self._check(other)
        digests = None
        if self.digests is not None and other.digests is not None:
            digests = _without(self.digests, other.digests)
        counts, reach = self.counts - other.counts, self.reach - other.reach
        if int(counts.min()) < 0 or reach < 0:
            raise StatisticsError(
                f"{len(other)} samples cannot be taken out of {len(self)}: they are more than "
                "these, or others"
            )
        terms = {name: term - other.terms[name] for name, term in self.terms.items()}
        return TangentStatistics(self.meta, terms, counts, reach, digests)

    def __eq__(self, other: object) -> bool:
        """Whether all sums are equal, bit for bit, and what they are of."""
        if not isinstance(other, TangentStatistics):
            return NotImplemented
        return self.meta == other.meta and not self.differences(other)

    __hash__ = None  # type: ignore[assignment]

    def differences(self, other: TangentStatistics) -> list[str]:
        """The names, for a message, of what differs; meta and lists of samples are not compared."""
        found = [n for n, term in self.terms.items() if not torch.equal(term, other.terms[n])]
        found += [] if torch.equal(self.counts, other.counts) else ["counts"]
        return found + ([] if self.reach == other.reach else ["reach"])

    def without_list(self) -> TangentStatistics:
        """The same without the list of samples, whose size grows with N; tensors are shared."""
        return TangentStatistics(self.meta, self.terms, self.counts, self.reach)

    def sort_list(self) -> None:
        """Put the list of samples into its order, after samples were added in place."""
        self.digests = None if self.digests is None else _sorted(self.digests)

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a file; of symmetric sums only the upper triangle."""
        tensors = {
            name: _packed(term) if name in ("core_core", "head_head") else term
            for name, term in self.terms.items()
        }
        tensors["counts"] = self.counts
        if self.digests is not None:
            tensors["digests"] = self.digests
        return tensors, {"statistics": self.meta.to_json(), "reach": str(self.reach)}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> TangentStatistics:
        """What `to_tensors` gave."""
        meta = StatisticsMeta.from_json(metadata["statistics"])
        shapes = meta.shapes()
        terms = {
            name: _unpacked(tensors[name], shapes[name][0])
            if name in ("core_core", "head_head")
            else tensors[name]
            for name in shapes
        }
        return cls(meta, terms, tensors["counts"], int(metadata["reach"]), tensors.get("digests"))

    def solve(self, l2: float) -> SolvedDelta:
        """The optimum on these samples, that of `fit_exact` with the same l2.

            min (1/N) Σ_i (1/C) ‖r_i - J_i Δ‖² + l2/2 ‖Δ‖²

        Args:
            l2: the penalty's weight, not negative.

        Raises:
            ArgumentError: l2 is negative or not finite.
            StatisticsError: no samples; a condition number at which float64 gives nothing; or terms
                whose rounding may move the solution by more than 1 %.
        """
        return Ridge(self).solve(l2)

    def solve_path(self, l2s: Sequence[float]) -> list[PathRow]:
        """The optimum for each l2, with what chooses among them; see `PathRow`.

        Raises:
            ArgumentError: no l2, or as in `solve`.
            StatisticsError: as in `solve`.
        """
        return Ridge(self).path(l2s)

    def choose(self, l2s: Sequence[float] = TRIED) -> PathRow:
        """The optimum with the l2 of the least generalised cross-validation.

        Nothing but the statistics is used. So a solution after samples were forgotten is, with its
        l2, the one of statistics that never had them. An l2 that `solve` refuses is passed over.

        Args:
            l2s: what is tried; by default from 1,000 to 1e-8, two for each power of ten.

        Raises:
            ArgumentError: as in `solve_path`.
            StatisticsError: no samples; or no l2 gives an optimum in float64.
        """
        return Ridge(self).choose(l2s)

    def __repr__(self) -> str:
        meta = self.meta
        return (
            f"TangentStatistics({len(self)} samples, {meta.core_columns} core columns, head "
            f"{meta.head_entries} x {meta.outputs}: {meta.delta.model})"
        )

    def _check(self, other: object) -> None:
        if not isinstance(other, TangentStatistics):
            raise StatisticsError(f"expected TangentStatistics, got a {type(other).__name__}")
        self.meta.check_same(other.meta, "the other statistic")
        if self.counts.shape != other.counts.shape:
            raise StatisticsError("one statistic's targets are classes, the other's are not")


def layout_of(delta: Mapping[str, Tensor]) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """`StatisticsMeta.layout` of a delta."""
    return tuple((name, dtype_name(v.dtype), tuple(v.shape)) for name, v in delta.items())


def _packed(matrix: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns]


def _unpacked(packed: Tensor, size: int) -> Tensor:
    rows, columns = torch.triu_indices(size, size)
    matrix = packed.new_zeros(size, size)
    matrix[rows, columns] = packed
    matrix[columns, rows] = packed
    return matrix


def _sorted(digests: Tensor) -> Tensor:
    order = digests[:, 1].argsort(stable=True)
    order = order[digests[order, 0].argsort(stable=True)]
    return digests[order]


def _without(digests: Tensor, gone: Tensor) -> Tensor:
    """Each digest as often as it is in the first more than in the second; both are sorted."""
    found, inverse = torch.cat([digests, gone]).unique(dim=0, return_inverse=True)
    left = torch.zeros(len(found), dtype=torch.int64)
    ones = torch.ones(len(inverse), dtype=torch.int64)
    ones[len(digests) :] = -1
    left.index_add_(0, inverse, ones)
    missing = int((left < 0).sum())
    if missing:
        raise StatisticsError(
            f"{missing} of the {len(gone)} samples to take out are not among the {len(digests)}, "
            "bit for bit: compute their statistic as they were computed when they were added "
            "(same images, device, threads and release of torch)"
        )
    return found.repeat_interleave(left, dim=0)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
