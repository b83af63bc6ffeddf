"""Task arithmetic: deltas are task vectors, which are added, negated and scaled.

Sources: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023 (arXiv:2212.04089), for
the operations; Ortiz-Jimenez, Favero, Frossard, "Task Arithmetic in the Tangent Space: Improved
Editing of Pre-Trained Models", NeurIPS 2023 (arXiv:2305.12827), for why tangent models are the
place for them: there an operation on deltas is the same operation on what they do to the outputs.

All are :func:`tangent_ops.compose` with set weights: one delta is in memory at a time, sums are
float64, and anchor, rank, basis and layout are checked. Results have the ``meta`` that it gives:
the first delta's without shard and extra.
"""

from __future__ import annotations

import math
import numbers

from tangent_ops.composition.compose import compose
from tangent_ops.delta import Delta, DeltaLike
from tangent_ops.errors import ArgumentError


def add(*deltas: DeltaLike) -> Delta:
    """Learn several tasks: the sum of deltas.

    Args:
        deltas: of one anchor, or paths of files.

    Raises:
        ArgumentError: no deltas, or something that is no delta.
        DeltaError: they do not belong together, or the sum is not finite.
        DeltaFileError: a file is truncated, was edited or is no delta file.
    """
    return compose(deltas, [1.0] * len(deltas))


def negate(delta: DeltaLike) -> Delta:
    """Unlearn a task: the delta with the opposite sign, bit for bit.

    Args:
        delta: a delta, or the path of a file.

    Raises:
        ArgumentError: it is no delta.
        DeltaError: it has no values, or some that are not finite.
        DeltaFileError: the file is truncated, was edited or is no delta file.
    """
    return compose([delta], [-1.0])


def scale(delta: DeltaLike, factor: float) -> Delta:
    """Apply a task more or less: the delta times a factor.

    Args:
        delta: a delta, or the path of a file.
        factor: a finite number.

    Raises:
        ArgumentError: it is no delta, or factor is no finite number.
        DeltaError: it has no values, or some that are not finite, before or after.
        DeltaFileError: the file is truncated, was edited or is no delta file.
    """
    if not (isinstance(factor, numbers.Real) and math.isfinite(factor)):
        raise ArgumentError(f"factor must be a finite number, got {factor!r}")
    return compose([delta], [float(factor)])
