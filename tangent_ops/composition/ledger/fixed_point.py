"""Fixed-point arithmetic: int64 multiples of 2^-40, whose sums do not depend on the order.

A term w δ is the float64 product, rounded to the nearest multiple of 2^-40 (9.1e-13), ties to even:
an error of at most 4.6e-13, in addition to the product's own |w δ| · 2^-53. With a weight of 1
these values are exact, because their own spacing is no finer: every float16, float32 from 2^-17
(7.6e-6) up, bfloat16 from 2^-33 (1.2e-10) up and float64 from 2^12 up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tangent_ops.errors import LedgerError

FRACTION_BITS = 40
LIMIT = 2**63 - 1  # the largest int64: values up to 2^23 in magnitude

_UNIT = 2.0**FRACTION_BITS


def to_fixed(values: Tensor, weight: float) -> Tensor:
    """weight · values as int64 on the CPU; `reach` must have shown that they fit."""
    return (values.detach().cpu().double() * weight * _UNIT).round().to(torch.int64)


def from_fixed(fixed: Tensor) -> Tensor:
    """The float64 values; sums of more than 53 bits are rounded to nearest."""
    return fixed.double() / _UNIT


def reach(delta: Mapping[str, Tensor], weight: float, what: str) -> int:
    """The largest magnitude among the terms of `delta`, as a fixed-point integer.

    Raises:
        LedgerError: it is beyond `LIMIT`, or every term is rounded to zero, though not all values
            are zero.
    """
    largest = max((float(v.detach().abs().max()) for v in delta.values() if v.numel()), default=0.0)
    scaled = largest * weight * _UNIT
    if scaled > LIMIT:  # also if infinite
        raise LedgerError(
            f"{what} is out of range: weight {weight:g} times the largest value {largest:g} is "
            f"beyond {LIMIT / _UNIT:g}. Use a smaller weight"
        )
    fixed = round(scaled)
    if fixed == 0 and largest > 0:
        raise LedgerError(
            f"{what} would vanish: weight {weight:g} times the largest value {largest:g} rounds "
            f"to zero, in steps of {1 / _UNIT:.1e}. Use a larger weight for all shards"
        )
    return fixed
