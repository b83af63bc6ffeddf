"""What a process trains shard after shard: the tangent model and its validation images, once."""

from __future__ import annotations

import torch

from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.shards.plan import Plan
from tangent_ops.shards.validating import Validator


class SharedModel:
    """A plan's tangent model, for one fit after the other in one process."""

    def __init__(self) -> None:
        self._made: tuple[object, LinearizedModel] | None = None
        self._validator: Validator | None = None

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

    def validator(self, plan: Plan, tangent: LinearizedModel) -> Validator:
        """Measures the shard that the model from `start` is trained on.

        It reads the run's validation images once for all shards of this process.
        """
        if self._validator is None or not self._validator.fits(plan, tangent):
            repeated = plan.recipe.method == "gradient"  # after every epoch
            self._validator = Validator(plan, tangent, repeated=repeated)
        else:
            self._validator.next_shard()
        return self._validator
