"""Measures the accuracy of shards' models on the run's validation images, as they are trained."""

from __future__ import annotations

import tempfile

from torch import nn
from torch.utils.data import DataLoader, Dataset

from tangent_ops.errors import TangentOpsError, UnsupportedError
from tangent_ops.evaluate import accuracy
from tangent_ops.model.features import cache_features
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.shards.plan import Plan

_BATCH = 128


class Validator:
    """Appends the model's accuracy to a list, whenever it is asked to.

    An accuracy is no part of a shard's result: if the images cannot be read, the shard is trained
    without it.

    Args:
        plan: the run; without validation images nothing is measured.
        tangent: the model, on its device.
        repeated: keep what the frozen blocks give, because there will be several measurements.

    Attributes:
        accuracy: the present shard's.
        failure: why it is not measured; None if it is.
    """

    def __init__(self, plan: Plan, tangent: LinearizedModel, *, repeated: bool) -> None:
        self.accuracy: list[float] = []
        self.failure: str | None = None
        self._plan, self._tangent, self._repeated = plan, tangent, repeated
        self._ready: tuple[nn.Module, Dataset] | None = None

    def fits(self, plan: Plan, tangent: LinearizedModel) -> bool:
        """Whether it measures this model, on the images of this plan."""
        return tangent is self._tangent and plan.validation == self._plan.validation

    def next_shard(self) -> None:
        """The model is another shard's from here on; what the frozen blocks give is kept."""
        self.accuracy, self.failure = [], None
        if not self._repeated:
            self._repeated, self._ready = True, None

    def measure(self) -> None:
        """Append the accuracy of the model as it is now."""
        if self._plan.validation is None or self.failure is not None:
            return
        try:
            self._ready = self._ready or self._prepared()
            model, data = self._ready
            self.accuracy.append(accuracy(model, data, batch_size=_BATCH, progress=False))
        except (TangentOpsError, OSError) as error:
            self.failure = f"the accuracy was not measured: {error}"
            self.accuracy.clear()

    def _prepared(self) -> tuple[nn.Module, Dataset]:
        """A model, and what it classifies: the images, or the frozen blocks' outputs for them."""
        info = self._plan.anchor_info
        assert self._plan.validation is not None
        samples = self._plan.validation.open(info.input).with_classes(info.classes)
        if not self._repeated:
            return self._tangent, samples
        try:
            trunk, tail = self._tangent.split()
        except UnsupportedError:
            return self._tangent, samples
        # The mapped file needs no name any more, and so it goes with this process.
        with tempfile.TemporaryDirectory(prefix="tangent-ops-") as folder:
            loader = DataLoader(samples, batch_size=_BATCH)
            return tail, cache_features(trunk, loader, folder, progress=False)
