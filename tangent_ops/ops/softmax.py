"""Softmax for plain and dual tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from tangent_ops.ops.backend import Backend, autocast_is_on, why_not_in_rows
from tangent_ops.ops.dual_op import DualOp, Maps, dual_output
from tangent_ops.ops.pytorch_rules import out_of_place
from tangent_ops.ops.reference.softmax import softmax_jvp, softmax_vjp


def softmax(
    input: Tensor,
    dim: int,
    dtype: torch.dtype | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """``torch.softmax`` with its tangent in the same pass, for models without fused attention.

        y = softmax(x)        y_t = y∘(x_t - Σ y∘x_t)

    If x is frozen, only y is saved for the backward pass. PyTorch's own function computes calls
    under autocast, and where :mod:`tangent_ops.functional` says so.

    Args:
        input: any shape, plain or dual.
        dim: the dimension that sums to 1; the Triton kernel supports only the last.
        dtype: dtype to cast ``input`` to first, or None.
        backend: "triton", "reference", or None to choose by device.

    Returns:
        As ``input``; dual if ``input`` is dual.

    Raises:
        UnsupportedError: ``backend="triton"`` and the kernels do not compute this call.
    """
    found = None
    if input.ndim and input.numel() and not autocast_is_on(input.device.type):
        cast = input if dtype is None else input.to(dtype)
        last = dim in (-1, input.ndim - 1)
        chosen = backend if last or backend else "reference"
        why_not = why_not_in_rows(cast, cast.shape[-1])
        if not last:
            why_not = why_not or f"dim={dim} is not the last"
        found = dual_output(_OP, (cast,), (dim,), chosen, why_not)
    return out_of_place(torch.softmax, input, dim, dtype) if found is None else found


def _jvp(primals, tangents, options):
    return *softmax_jvp(primals[0], tangents[0], *options), ()


def _triton_jvp(primals, tangents, options):
    from tangent_kernels import softmax as kernels

    return *kernels.softmax_jvp(primals[0], tangents[0]), ()


def _triton_vjp(saved, grad, needs, options):
    from tangent_kernels import softmax as kernels

    return (kernels.softmax_vjp(saved[0], grad),)


def _triton_second_vjp(primals, tangents, saved, grad, grad_t, needs, needs_t, options):
    from tangent_kernels import softmax as kernels

    wanted = (*needs, *needs_t)
    x, x_t = kernels.softmax_second_vjp(saved[0], tangents[0], (grad, grad_t), wanted)
    return (x,), (x_t,)


def _save(primals, output, statistics):
    return (output,)


_OP = DualOp(
    function=lambda primals, options: torch.softmax(primals[0], *options),
    reference=Maps(
        jvp=_jvp,
        save=_save,
        vjp=lambda saved, grad, needs, options: (softmax_vjp(saved[0], grad, *options),),
    ),
    triton=Maps(_triton_jvp, _save, _triton_vjp, _triton_second_vjp),
)
