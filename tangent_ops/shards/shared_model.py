"""The tangent model that a process trains shard after shard, so that it is made once."""

from __future__ import annotations

import torch

from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.shards.plan import Plan


class SharedModel:
    """A plan's tangent model, for one fit after the other in one process."""

    def __init__(self) -> None:
        self._made: tuple[object, LinearizedModel] | None = None

    @property
    def made(self) -> bool:
        """Whether a fit has asked for the model."""
        return self._made is not None

    def start(self, plan: Plan, device: str | torch.device) -> LinearizedModel:
        """The model as `Plan.tangent` makes it, with all deltas zero, on the device.

        The one that was given out before must not be used any more.
        """
        key = plan.path, plan.anchor_info.fingerprint, plan.recipe, str(device)
        if self._made is None or self._made[0] != key:
            self._made = key, plan.tangent().to(device)
        tangent = self._made[1]
        tangent.train().zero_grad(set_to_none=True)
        return tangent.zero_()
