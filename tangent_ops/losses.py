"""Losses that keep fine-tuning a tangent model convex. Any other torch loss works with `fit`."""

import math

import torch
from torch import Tensor, nn

from tangent_ops.errors import ArgumentError

_REDUCTIONS = ("mean", "sum", "none")


class RescaledSquareLoss(nn.Module):
    """Square loss for classification, its target class rescaled.

    For logits f of one sample with C classes and target class y:

        (1/C) [ k (f_y - M)^2 + sum_{i != y} f_i^2 ]

    Quadratic in the logits, hence in the delta of a tangent model. Source: Hui & Belkin,
    "Evaluation of Neural Architectures Trained with Square Loss vs Cross-Entropy in Classification
    Tasks", ICLR 2021 (arXiv:2006.07322).

    Args:
        k: weight of the target class, positive.
        M: value the target class's logit is drawn to, positive.
        reduction: over the samples: "mean", "sum" or "none".

    Raises:
        ArgumentError: an argument outside these ranges.
    """

    def __init__(self, k: float = 1.0, M: float = 15.0, reduction: str = "mean") -> None:
        super().__init__()
        for name, value in (("k", k), ("M", M)):
            if not (math.isfinite(value) and value > 0):
                raise ArgumentError(f"{name} must be positive and finite, got {value}")
        if reduction not in _REDUCTIONS:
            raise ArgumentError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")
        self.k = k
        self.M = M
        self.reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            logits: (N, C), floating point; 16-bit logits are computed on in float32.
            targets: (N,), int64 class indices in [0, C).

        Returns:
            A scalar, or (N,) with reduction "none".

        Raises:
            ArgumentError: shapes, dtypes or class indices other than these. Indices are checked
                on the CPU; on CUDA a wrong one trips a device assertion.
        """
        if logits.ndim != 2 or not logits.is_floating_point():
            raise ArgumentError(
                f"logits must be floating point of shape (N, C), got {logits.dtype} of shape "
                f"{tuple(logits.shape)}"
            )
        samples, classes = logits.shape
        if targets.shape != (samples,) or targets.dtype != torch.int64:
            raise ArgumentError(
                f"targets must be int64 class indices of shape ({samples},) for logits of shape "
                f"{tuple(logits.shape)}, got {targets.dtype} of shape {tuple(targets.shape)}"
            )
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        is_target = _one_hot(targets, classes)
        square = torch.where(is_target, self.k * (logits - self.M).square(), logits.square())
        loss = square.mean(dim=1)
        if self.reduction == "none":
            return loss
        return loss.mean() if self.reduction == "mean" else loss.sum()

    def extra_repr(self) -> str:
        """Show the settings in the module's repr, which is also a fair `DeltaMeta.loss`."""
        return f"k={self.k:g}, M={self.M:g}, reduction={self.reduction!r}"


def _one_hot(targets: Tensor, classes: int) -> Tensor:
    nowhere = targets.new_zeros((len(targets), classes), dtype=torch.bool)
    try:  # scatter checks the indices itself; F.one_hot does not run under vmap over grad
        return nowhere.scatter(1, targets[:, None], True)
    except RuntimeError as error:
        raise ArgumentError(
            f"targets must be class indices from 0 to {classes - 1}: {error}"
        ) from error
