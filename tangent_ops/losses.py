"""Losses that keep fine-tuning a tangent model convex, and the derivatives of any loss by logits.

A tangent model is linear in its delta, so the objective is quadratic or convex if the loss is. The
loss alone is tested, on a few logits per sample.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tangent_ops.errors import ArgumentError

Loss = Callable[[Tensor, Tensor], Tensor]

GROUP = 4  # samples in each test of a loss
TRIED = 1024  # classes that are tested before the first batch

_REDUCTIONS = ("mean", "sum", "none")


class RescaledSquareLoss(nn.Module):
    """Square loss for classification with a rescaled target class.

    For logits f of one sample with C classes and target class y:

        (1/C) [ k (f_y - M)^2 + sum_{i != y} f_i^2 ]

    Quadratic in the logits, hence in the delta of a tangent model. Source: Hui & Belkin,
    "Evaluation of Neural Architectures Trained with Square Loss vs Cross-Entropy in Classification
    Tasks", ICLR 2021 (arXiv:2006.07322).

    Args:
        k: weight of the target class, positive.
        M: regression target of the target class's logit, positive.
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
            logits: (N, C), floating point; 16-bit logits are cast to float32.
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
        """The settings, for the module's repr and for `DeltaMeta.loss`."""
        return f"k={self.k:g}, M={self.M:g}, reduction={self.reduction!r}"


def _one_hot(targets: Tensor, classes: int) -> Tensor:
    nowhere = targets.new_zeros((len(targets), classes), dtype=torch.bool)
    try:  # scatter checks the indices itself; F.one_hot does not run under vmap over grad
        return nowhere.scatter(1, targets[:, None], True)
    except RuntimeError as error:
        raise ArgumentError(
            f"targets must be class indices from 0 to {classes - 1}: {error}"
        ) from error


def loss_name(loss: object) -> str:
    """A loss in words that are the same in another process."""
    name = getattr(loss, "__qualname__", None)
    return name or re.sub(r" at 0x[0-9a-f]+", "", repr(loss))


def at_least_single(logits: Tensor) -> Tensor:
    """The logits, in float32 if they have 16 bits."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def loss_gradient(loss: Loss, logits: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """The mean loss of a batch, and its gradient, shaped as the logits.

    Raises:
        ArgumentError: the loss is not a scalar tensor, or does not depend on the logits.
    """
    value, gradient, _ = _differentiated(loss, logits, targets)
    return float(value), gradient.detach()


def loss_product(loss: Loss, logits: Tensor, targets: Tensor, direction: Tensor) -> Tensor:
    """The Hessian of the mean loss of a batch times a direction, both shaped as the logits."""
    _, gradient, point = _differentiated(loss, logits, targets)
    if not gradient.requires_grad:  # a piecewise linear loss
        return torch.zeros_like(direction)
    with torch.enable_grad():
        (product,) = torch.autograd.grad(
            gradient, point, direction, allow_unused=True, materialize_grads=True
        )
    return product.detach()


def loss_hessians(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    """The Hessian of each sample's own loss.

    Args:
        loss: a mean of the samples' losses.
        logits: (n, ...) with C entries per sample.
        targets: (n, ...).

    Returns:
        (n, C, C).
    """
    flat = logits.reshape(len(logits), -1)
    columns = []
    for output in range(flat.shape[1]):
        direction = torch.zeros_like(flat)
        direction[:, output] = len(flat)  # undoes the mean
        product = loss_product(loss, logits, targets, direction.view_as(logits))
        columns.append(product.reshape_as(flat))
    return torch.stack(columns, dim=2)


def is_quadratic(loss: Loss, logits: Tensor, targets: Tensor) -> bool:
    """Whether the loss's gradient is affine in the logits, tested at three points of a line."""
    noise = torch.Generator().manual_seed(0)
    step = torch.randn(logits.shape, generator=noise, dtype=torch.float64)
    step = (step * (1 + logits.abs().max().double().cpu())).to(logits)
    start, middle, end = (loss_gradient(loss, logits + t * step, targets)[1] for t in (-1, 0, 1))
    size = max(float(gradient.abs().max()) for gradient in (start, middle, end))
    tolerance = 1e3 * torch.finfo(logits.dtype).eps * size
    return float((start + end - 2 * middle).abs().max()) <= tolerance


class MeanOfSamples:
    """Tests whether a loss is the mean of the samples' own losses.

    The loss of a small group of samples must equal the mean of their separate losses. The logits
    are random: a new head gives equal logits, which would hide class weights. If targets are class
    indices, the constructor tests every class; `check` tests other targets.

    Args:
        loss: maps logits and targets to a scalar.
        logits: (n, ...); only shape, dtype and device are used.
        targets: (n, ...), some of the data set's targets.

    Attributes:
        classes: (K, ...), one target for each of the first `TRIED` classes; empty if targets are
            not class indices.

    Raises:
        ArgumentError: the loss is not such a mean.
    """

    def __init__(self, loss: Loss, logits: Tensor, targets: Tensor) -> None:
        self._loss = loss
        self._logits = made_up(logits, GROUP)
        self._first = targets[:1]
        self.classes = targets[:0]
        self.check(targets[:GROUP])
        classes = _each_class(logits, targets)
        try:
            self.check(classes)
        except IndexError:  # the targets are not class indices
            return
        self.classes = classes

    def check(self, targets: Tensor) -> None:
        """Raise ArgumentError unless the loss is such a mean on these targets."""
        if len(self.classes):
            new = (targets < 0) | (targets >= len(self.classes))
            targets = targets[new.reshape(len(new), -1).any(1)]
        for start in range(0, len(targets), GROUP - 1):
            self._try(torch.cat([self._first, targets[start : start + GROUP - 1]]))

    @torch.no_grad()
    def _try(self, targets: Tensor) -> None:
        logits = self._logits[: len(targets)]
        alone = zip(logits.split(1), targets.split(1), strict=True)
        each = torch.stack([_scalar(self._loss(*one)) for one in alone]).double()
        mean, whole = float(each.mean()), float(_scalar(self._loss(logits, targets)))
        allowed = 1e3 * torch.finfo(logits.dtype).eps * float(each.abs().max())
        if not abs(whole - mean) <= allowed:
            raise ArgumentError(
                f"loss must be the mean of the samples' own losses: it is {whole:.6g} on a batch "
                f"whose samples have {mean:.6g} on average. Use reduction='mean', without class "
                "weights, and leave out samples whose target it ignores"
            )


def made_up(logits: Tensor, count: int) -> Tensor:
    """Random logits (count, ...), small enough that a float32 softmax does not saturate."""
    noise = torch.randn((count, *logits.shape[1:]), generator=torch.Generator().manual_seed(3))
    return (2 * noise).to(at_least_single(logits))


def check_convex(loss: Loss, logits: Tensor, targets: Tensor) -> None:
    """Raise ArgumentError if a sample's loss is concave along a random direction of the logits."""
    noise = torch.Generator().manual_seed(1)
    step = torch.randn(logits.shape, generator=noise, dtype=torch.float64).to(logits)
    terms = (step * loss_product(loss, logits, targets, step)).flatten(1)
    curvature = float(terms.sum(1).min())
    if curvature < -1e3 * torch.finfo(logits.dtype).eps * float(terms.abs().sum(1).max()):
        raise ArgumentError(
            f"loss must be convex in the logits: its curvature is {curvature:.3g} along a direction"
        )


def _each_class(logits: Tensor, targets: Tensor) -> Tensor:
    """One target of each class, if targets index the second dimension of the logits."""
    indices = targets.dtype == torch.int64 and targets.shape[1:] == logits.shape[2:]
    count = min(logits.shape[1], TRIED) if indices and logits.ndim > 1 else 0
    classes = torch.arange(count, device=targets.device, dtype=targets.dtype)
    return classes.view(-1, *(1,) * (targets.ndim - 1)).expand(-1, *targets.shape[1:])


def _differentiated(loss: Loss, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        point = logits.detach().requires_grad_()
        value = _scalar(loss(point, targets))
        if not value.requires_grad:
            raise ArgumentError("loss does not depend on the logits")
        (gradient,) = torch.autograd.grad(value, point, create_graph=True)
    return value.detach(), gradient, point


def _scalar(value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ArgumentError(f"loss must return a scalar tensor, got {got}")
    return value
