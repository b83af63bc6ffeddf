"""Computes a basis for low-rank deltas from the largest directions of the anchor's gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tangent_ops.data import Data, as_loader, place, unpack
from tangent_ops.errors import ArgumentError, NonFiniteLossError
from tangent_ops.family import logits_of
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.model.low_rank import check_rank, delta_dtype, has_low_rank, matrix_shape
from tangent_ops.model.trainable import Trainable, choose


def gradient_basis(
    model: nn.Module,
    data: Data,
    rank: int,
    *,
    trainable: Trainable = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    batch_size: int = 32,
) -> dict[str, Tensor]:
    """Fixed factors A for ``linearize(model, trainable, rank=rank, basis=...)``, from data.

    The rows of A are the first right singular vectors of the mean loss's gradient G (out, in) at
    the anchor, so that G AᵀA, the first step of gradient descent, is the best approximation of G of
    that rank (Eckart, Young 1936). Each row's largest entry is positive. Only deltas of the same
    basis compose: compute it once, on data that every trainer of a shard may know.

    Args:
        model: the model to linearize; a copy of it runs, in eval mode.
        data: a Dataset of (input, target), or a DataLoader; all of it is read once.
        rank: rows of each A.
        trainable: which parameters, as in :func:`tangent_ops.linearize`.
        loss: (outputs, targets) -> scalar mean over the batch; None for `RescaledSquareLoss()`.
        batch_size: of a Dataset; a DataLoader has its own.

    Returns:
        name -> (rank, in) of the parameters that are matrices larger than ``rank`` both ways, on
        their device, in float64 where the parameter is, else float32.

    Raises:
        ArgumentError: rank is no positive integer, the model is linearized already, an argument
            is not as above, or a gradient has a smaller rank than ``rank``.
        NonFiniteLossError: a gradient is NaN or infinite.
    """
    check_rank(rank)
    if isinstance(model, LinearizedModel):
        raise ArgumentError("model is linearized already: pass the original, or model.anchor")
    loader = as_loader(data, batch_size, shuffle=False)
    loss = loss or RescaledSquareLoss()
    model = copy.deepcopy(model).eval().requires_grad_(False)
    device = place(model, None)
    names = choose(model, trainable)
    chosen = {n: p for n, p in model.named_parameters() if n in names and has_low_rank(p, rank)}
    for parameter in chosen.values():
        parameter.requires_grad_()
    with torch.enable_grad():
        for batch in loader if chosen else ():
            inputs, targets = unpack(batch, device)
            (loss(logits_of(model, inputs), targets) * len(inputs)).backward()
    return {name: _leading(name, parameter, rank) for name, parameter in chosen.items()}


def _leading(name: str, parameter: nn.Parameter, rank: int) -> Tensor:
    """The first right singular vectors of the parameter's gradient, as rows."""
    if parameter.grad is None:
        raise ArgumentError(f"the loss does not depend on {name}: leave it out of trainable")
    gradient = parameter.grad.double().reshape(matrix_shape(parameter))
    if not gradient.isfinite().all():
        raise NonFiniteLossError(f"the gradient by {name} is not finite: check the inputs for NaN")
    _, values, rows = torch.linalg.svd(gradient, full_matrices=False)
    noise = max(gradient.shape) * torch.finfo(parameter.dtype).eps * float(values[0])
    found = int((values > noise).sum())
    if found < rank:
        raise ArgumentError(
            f"the gradient by {name} has rank {found} on these data, less than rank={rank}: "
            "use more data, a smaller rank, or a random basis (basis=0)"
        )
    return canonical_rows(rows[:rank]).to(delta_dtype(parameter.dtype)).contiguous()


def canonical_rows(rows: Tensor) -> Tensor:
    """The rows with the sign by which each one's largest entry is positive."""
    return rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
