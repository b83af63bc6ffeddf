"""`SampleReader`: reads samples as features and residuals at a tangent model's deltas."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tangent_ops.composition.ridge import FeatureRows
from tangent_ops.data import place, unpack_one
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.exact.problem import check_tangent
from tangent_ops.exact.progress import progress_bar
from tangent_ops.exact.tangent_features import TangentFeatures
from tangent_ops.losses import Loss, RescaledSquareLoss, loss_name
from tangent_ops.model.linearized import LinearizedModel

_TRIED = 4  # inputs of noise, on which J is compared with passes through the model


class SampleReader:
    """Gives batches of (f, φ, a) and of the residuals y - (f + J Δ), float64, on the CPU.

    A sample's values depend on that sample alone: its features are computed without others.

    Args:
        tangent: the model; Δ are its deltas.
        loader: of (input, class), in order.
        loss: `RescaledSquareLoss` with k = 1; None for ``RescaledSquareLoss()``.
        device: the model is moved there first.
        progress: show a bar if it takes more than two seconds.

    Attributes:
        features: computes the rows.

    Raises:
        ArgumentError: not a tangent model, or its core has too many columns.
        UnsupportedError: another loss; a model that mixes samples.
    """

    def __init__(
        self,
        tangent: LinearizedModel,
        loader: DataLoader,
        loss: Loss | None,
        device: str | torch.device | None,
        progress: bool,
    ) -> None:
        check_tangent(tangent)
        self._loss = RescaledSquareLoss() if loss is None else loss
        if not isinstance(self._loss, RescaledSquareLoss) or self._loss.k != 1:
            raise UnsupportedError(
                f"loss is {loss_name(self._loss)}: private regression is for "
                "RescaledSquareLoss(k=1). Use fit_private for other losses"
            )
        self._device = place(tangent, device)
        self._loader = loader
        self._progress = progress
        first, _ = unpack_one(next(iter(loader)), self._device)
        noise = torch.randn(first[:_TRIED].shape, generator=torch.Generator().manual_seed(2))
        self.features = TangentFeatures(tangent, noise.to(first))
        deltas = {name: value.detach().cpu().double() for name, value in tangent.deltas().items()}
        head = self.features.head
        self._core = torch.cat(
            [torch.zeros(0).double(), *(v.flatten() for n, v in deltas.items() if n not in head)]
        )
        self._head = [deltas[name].reshape(len(deltas[name]), -1) for name in head]

    def __iter__(self) -> Iterator[tuple[FeatureRows, Tensor]]:
        with progress_bar("features", "batch", len(self._loader), self._progress) as bar:
            for batch in self._loader:
                inputs, targets = unpack_one(batch, self._device)
                rows = self.features(inputs)
                rows = FeatureRows(
                    rows.outputs.detach().cpu().double(),
                    rows.core.detach().cpu().double(),
                    rows.head.detach().cpu().double(),
                )
                yield rows, self._residuals(rows, targets.cpu())
                bar.update()

    def _residuals(self, rows: FeatureRows, targets: Tensor) -> Tensor:
        outputs = rows.outputs + rows.core @ self._core
        if self._head:
            outputs = outputs + rows.head @ torch.cat(self._head, dim=1).T
        self._loss(outputs, targets)  # checks shapes, dtypes and indices
        wanted = torch.zeros_like(outputs).scatter_(1, targets[:, None], self._loss.M)
        parts = (rows.core, rows.head, wanted - outputs)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise ArgumentError(
                "a sample's features or residuals are not finite: check the inputs for NaN and "
                "outliers, or clamp all of them to a fixed range"
            )
        return wanted - outputs
