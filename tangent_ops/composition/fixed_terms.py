"""Adds samples' terms to the sums of statistics, each rounded to fixed point once.

Only elementwise operations in a fixed order, maxima and sums of integers are used, so a sample's
terms are the same bits whatever samples come with it, on every machine.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from tangent_ops.composition.feature_rows import FeatureRows
from tangent_ops.composition.statistics import LIMIT, TangentStatistics
from tangent_ops.errors import StatisticsError
from tangent_ops.files import bytes_of

_CACHED = 1 << 17  # entries of a temporary, which should stay in a core's cache
_EXACT = 2**53  # integers up to here are exact in float64


def add_samples(
    total: TangentStatistics,
    rows: FeatureRows,
    residuals: Tensor,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """Add some samples to statistics, in place.

    Args:
        total: whose list of samples is extended, unsorted; see `finished`.
        rows: f, φ and a of n samples.
        residuals: r, (n, C).
        labels: the samples' classes, (n,) int64; None if targets are no classes.
        weights: each sample's weight, (n,); None for 1.

    Raises:
        StatisticsError: a value is not finite, or the sums would be out of range; nothing is added.
    """
    bits = total.meta.fraction_bits
    core, head = rows.core.detach().cpu(), rows.head.detach().cpu()
    residuals = residuals.detach().cpu()
    own = torch.ones(len(rows)) if weights is None else weights.cpu()
    digests = _digests(core, head, residuals, own, labels)
    phi, a, r, w = core.double(), head.double(), residuals.double(), own.double()
    reaches = _reaches(phi, a, r, w, bits)
    reach = total.reach + sum(reaches)
    if reach > LIMIT:
        raise StatisticsError(
            f"the sums would be out of range: the samples' largest terms come to {reach:.3g} "
            f"units of 2^-{bits}, more than 2^63. Use fewer fraction_bits, such as {bits - 8}"
        )
    unit = 2.0**bits
    for some in _groups(reaches):
        _add(total, phi[some], a[some], r[some], None if weights is None else w[some], unit)
    if labels is None:
        total.counts += len(rows)
    else:
        total.counts += torch.bincount(labels.cpu(), minlength=len(total.counts))
    total.reach = reach
    assert total.digests is not None
    total.digests = torch.cat([total.digests, digests])


def _add(
    total: TangentStatistics, phi: Tensor, a: Tensor, r: Tensor, w: Tensor | None, unit: float
) -> None:
    """Add samples whose sums of terms are below 2^53 units."""
    n, c, k = phi.shape
    h = a.shape[1]
    terms = total.terms

    def rounded(values: Tensor) -> Tensor:
        """The sum over the samples, the first dimension; values are in units before weights."""
        if w is not None:
            values = values.mul_(w.view(-1, *(1,) * (values.ndim - 1)))
        return values.round_().sum(0).to(torch.int64)

    scaled = phi * unit
    step = max(1, _CACHED // max(1, n * max(k, c * h)))
    for start in range(0, k, step):
        some = slice(start, start + step)
        outer = scaled[:, 0, some, None] * phi[:, 0, None]
        for column in range(1, c):
            outer += scaled[:, column, some, None] * phi[:, column, None]
        terms["core_core"][some] += rounded(outer)
        if h:
            part = scaled[:, :, some].transpose(1, 2)[..., None] * a[:, None, None]
            terms["core_head"][some] += rounded(part)
    terms["core_residual"] += rounded(_sum_of_outputs(scaled * r[..., None]))
    step = max(1, _CACHED // max(1, n * h))
    for start in range(0, h, step):
        some = slice(start, start + step)
        terms["head_head"][some] += rounded((a[:, some, None] * unit) * a[:, None])
    terms["head_residual"] += rounded((r * unit)[..., None] * a[:, None])
    terms["residual_residual"] += rounded(_sum_of_outputs((r * unit) * r))


def _sum_of_outputs(values: Tensor) -> Tensor:
    """The sum over the second dimension, in its order."""
    return functools.reduce(torch.add, values.unbind(1))


def _reaches(phi: Tensor, a: Tensor, r: Tensor, w: Tensor, bits: int) -> list[int]:
    """For each sample, an integer that no term exceeds."""
    n = len(phi)
    largest_core = phi.abs().amax(2) if phi.shape[2] else phi.new_zeros(n, phi.shape[1])
    largest_head = a.abs().amax(1) if a.shape[1] else a.new_zeros(n)
    bounds = torch.stack(
        [
            _sum_of_outputs(largest_core.square()),
            largest_core.amax(1) * largest_head,
            largest_head.square(),
            _sum_of_outputs(largest_core * r.abs()),
            r.abs().amax(1) * largest_head,
            _sum_of_outputs(r.square()),
        ]
    )
    most = bounds.amax(0) * w * (1 + 2.0**-20)
    if not bool(most.isfinite().all()):
        raise StatisticsError("a sample's features are not finite: check the inputs for NaN")
    return [int(value) + 1 for value in (most * 2.0**bits).tolist()]


def _groups(reaches: list[int]) -> Iterator[slice]:
    """Consecutive samples whose terms' sums are exact in float64; single ones may exceed that."""
    start, reach = 0, 0
    for index, own in enumerate(reaches):
        if index > start and reach + own >= _EXACT:
            yield slice(start, index)
            start, reach = index, 0
        reach += own
    yield slice(start, len(reaches))


def _digests(
    core: Tensor, head: Tensor, residuals: Tensor, weights: Tensor, labels: Tensor | None
) -> Tensor:
    """(n, 2) int64: the first 128 bits of a SHA-256 of all that a sample's terms depend on."""
    found = []
    for index in range(len(core)):
        digest = hashlib.sha256()
        for part in (core, head, residuals, weights):
            digest.update(bytes_of(part[index]))
        digest.update(b"" if labels is None else str(int(labels[index])).encode())
        found.append(digest.digest()[:16])
    return torch.frombuffer(bytearray(b"".join(found)), dtype=torch.int64).view(-1, 2)
