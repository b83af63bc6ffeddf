"""A loss as a function of logits: its gradient, its Hessian, and whether it is quadratic.

A tangent model is linear in its delta, so that what the whole objective is (quadratic, convex) the
loss decides on its own, on a few numbers per sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tangent_ops.errors import ArgumentError

Loss = Callable[[Tensor, Tensor], Tensor]

GROUP = 4  # samples that a loss is tried on together
TRIED = 1024  # classes that it is tried on before the first batch


def at_least_single(logits: Tensor) -> Tensor:
    """Logits in float32, if they come in 16 bits."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def loss_gradient(loss: Loss, logits: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """Value of the mean loss of a batch, and its gradient, shaped as the logits.

    Raises:
        ArgumentError: the loss is no scalar tensor, or does not depend on the logits.
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
        logits: (n, ...) with C entries to a sample.
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
    """Whether the loss's gradient is affine in the logits, tried at three points of a line."""
    noise = torch.Generator().manual_seed(0)
    step = torch.randn(logits.shape, generator=noise, dtype=torch.float64)
    step = (step * (1 + logits.abs().max().double().cpu())).to(logits)
    start, middle, end = (loss_gradient(loss, logits + t * step, targets)[1] for t in (-1, 0, 1))
    size = max(float(gradient.abs().max()) for gradient in (start, middle, end))
    tolerance = 1e3 * torch.finfo(logits.dtype).eps * size
    return float((start + end - 2 * middle).abs().max()) <= tolerance


class MeanOfSamples:
    """Whether a loss is the mean of the samples' own losses, tried on their targets.

    The logits are made up, as those of a new head are all alike, and show no weights. A small group
    of samples has to have the mean of what each of them has alone. Where targets are class indices,
    that is tried on every class at once; `check` tries other targets as they come.

    Args:
        loss: of logits and targets.
        logits: (n, ...), of which shape, dtype and device count.
        targets: (n, ...), some of those to come.

    Attributes:
        classes: (K, ...): a target of each class, the first `TRIED` of them; empty if targets are
            no class indices.

    Raises:
        ArgumentError: it is not.
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
        except IndexError:  # they are the indices of something else
            return
        self.classes = classes

    def check(self, targets: Tensor) -> None:
        """Raise ArgumentError unless the loss is the mean on these targets, too."""
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
    """(count, ...): spread, and never so far that a softmax saturates in single precision."""
    noise = torch.randn((count, *logits.shape[1:]), generator=torch.Generator().manual_seed(3))
    return (2 * noise).to(at_least_single(logits))


def check_convex(loss: Loss, logits: Tensor, targets: Tensor) -> None:
    """Raise ArgumentError if a sample's loss curves down along a random direction of the logits."""
    noise = torch.Generator().manual_seed(1)
    step = torch.randn(logits.shape, generator=noise, dtype=torch.float64).to(logits)
    terms = (step * loss_product(loss, logits, targets, step)).flatten(1)
    curvature = float(terms.sum(1).min())
    if curvature < -1e3 * torch.finfo(logits.dtype).eps * float(terms.abs().sum(1).max()):
        raise ArgumentError(
            f"loss must be convex in the logits: its curvature is {curvature:.3g} along a direction"
        )


def _each_class(logits: Tensor, targets: Tensor) -> Tensor:
    """A target of each class, if targets are indices of classes in the second dimension."""
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
