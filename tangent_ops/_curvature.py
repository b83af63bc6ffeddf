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


def check_mean(loss: Loss, logits: Tensor, targets: Tensor) -> None:
    """Raise ArgumentError unless the loss is a mean of the samples' losses, tried on four."""
    logits, targets = logits[:4].detach(), targets[:4]
    with torch.no_grad():
        each = [
            float(_scalar(loss(logits[i : i + 1], targets[i : i + 1]))) for i in range(len(logits))
        ]
        # Twice the batch, since a sum and a mean of one sample are the same.
        both = float(_scalar(loss(torch.cat([logits, logits]), torch.cat([targets, targets]))))
    mean = sum(each) / len(each)
    if not abs(both - mean) <= 1e-3 * max(abs(mean), max(map(abs, each))):
        raise ArgumentError(
            f"loss must be the mean of the samples' own losses: it is {both:.6g} on a batch whose "
            f"samples have {mean:.6g} on average. Use reduction='mean', without class weights"
        )


def check_convex(loss: Loss, logits: Tensor, targets: Tensor) -> None:
    """Raise ArgumentError if the loss curves down along a random direction of the logits."""
    noise = torch.Generator().manual_seed(1)
    step = torch.randn(logits.shape, generator=noise, dtype=torch.float64).to(logits)
    product = loss_product(loss, logits, targets, step)
    curvature = float((step * product).sum())
    if curvature < -1e3 * torch.finfo(logits.dtype).eps * float((step * product).abs().sum()):
        raise ArgumentError(
            f"loss must be convex in the logits: its curvature is {curvature:.3g} along a direction"
        )


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
