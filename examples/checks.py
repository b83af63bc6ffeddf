"""What linearity promises, checked on the demo's own models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from assets import DemoError
from torch import Tensor
from torch.utils.data import Dataset

from tangent_ops import LinearizedModel, compose, load_delta, predict


def check_mean(composed: Tensor, logits: Sequence[Tensor]) -> str:
    """The composition says what its parts say on average, up to rounding."""
    mean = torch.stack(list(logits)).double().mean(dim=0)
    difference = float((composed - mean).abs().max() / mean.abs().max())
    if difference > 1e-4:
        raise DemoError(f"the composition differs from its parts' mean by {difference:.1e}")
    return (
        f"The composed model's outputs are the mean of its {len(logits)} shard models' outputs: "
        f"largest difference {difference:.0e} of the largest output (float32 rounding)."
    )


def check_last_one(
    tangent: LinearizedModel,
    tail: LinearizedModel,
    scored: Dataset,
    paths: Sequence[Path],
    logits: Sequence[Tensor],
    kept: int,
) -> str:
    """Forgetting all shards but one leaves that shard's model, bit for bit."""
    left = compose([paths[kept - 1]])
    alone = load_delta(paths[kept - 1], anchor=tangent.fingerprint)
    tangent.load_delta_dict(left)
    same_weights = all(torch.equal(left[name], alone[name]) for name in alone)
    same_outputs = torch.equal(predict(tail, scored), logits[kept - 1])
    if not (same_weights and same_outputs and left.keys() == alone.keys()):
        raise DemoError(f"forgetting all shards but {kept} is not the model of shard {kept}")
    return (
        f"Forgetting all shards but shard {kept} gives the model of shard {kept} alone: every "
        f"weight and all {logits[0].numel():,} outputs equal, bit for bit."
    )
