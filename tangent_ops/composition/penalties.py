"""`least_validation`: the penalties of the least generalised cross-validation, on a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tangent_ops.composition.ridge import Ridge

# What is tried by default, for the core and for the head.
TRIED = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def least_validation(
    ridge: Ridge, l2s: Sequence[float], head_l2s: Sequence[float]
) -> tuple[float, float, float]:
    """The l2 and head_l2 of the least `PathRow.gcv`, and that.

    One eigendecomposition of the Schur complement for each head_l2 serves all l2.
    """
    best = (math.inf, l2s[0], head_l2s[0])
    cross = ridge.cross.flatten(1)
    columns = ridge.cross.shape[0] + ridge.head_right.numel()
    for head_l2 in head_l2s:
        head_penalty = head_l2 * ridge.scale
        inverse = 1 / (ridge.head_values + head_penalty)
        scaled = (ridge.cross * inverse).flatten(1)
        values, vectors = torch.linalg.eigh(ridge.core - scaled @ cross.T)
        mixed = ((scaled @ scaled.T @ vectors) * vectors).sum(0)
        right = vectors.T @ (ridge.core_right - scaled @ ridge.head_right.flatten())
        alone = float((ridge.head_right.square() * inverse).sum())
        own = float(inverse.sum()) * ridge.meta.outputs
        for l2 in l2s:
            penalty = l2 * ridge.scale
            shrunk = 1 / (values + penalty)
            found = vectors @ (right * shrunk)
            head = (ridge.head_right - (found @ cross).view_as(ridge.head_right)) * inverse
            explained = alone + float((right.square() * shrunk).sum())
            penalties = penalty * found.square().sum() + head_penalty * head.square().sum()
            loss = (ridge.square - explained - float(penalties)) / (2 * ridge.scale)
            trace = head_penalty * (own + float((mixed * shrunk).sum()))
            trace += penalty * float(shrunk.sum())
            free = 1 - (columns - trace) / (2 * ridge.scale)
            if free > 0 and bool((shrunk > 0).all()) and bool((inverse > 0).all()):
                best = min(best, (max(loss, 0.0) / free**2, l2, head_l2))
    gcv, l2, head_l2 = best
    return l2, head_l2, gcv
