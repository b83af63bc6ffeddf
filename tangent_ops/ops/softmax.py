"""Softmax for plain and dual tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from tangent_ops.ops.backend import Backend, autocast_is_on, why_not_in_rows
from tangent_ops.ops.dual_op import DualOp, Maps, dual_outputs
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

    Where x is frozen y alone is kept for the backward pass. Under autocast, and where
    :mod:`tangent_ops.functional` says so, it is PyTorch's own function.

    Args:
        input: any shape, plain or dual.
        dim: that sums to 1; on CUDA the kernel takes the last.
        dtype: to cast ``input`` to first.
        backend: None chooses by device; "triton" or "reference" insists.

    Returns:
        As ``input``, dual if that is.

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
        found = dual_outputs(_OP, (cast,), (dim,), chosen, why_not)
    return found[0] if found else out_of_place(torch.softmax, input, dim, dtype)


def _jvp(primals, tangents, options):
    output, output_t = softmax_jvp(primals[0], tangents[0], *options)
    return (output,), (output_t,), ()


def _triton_jvp(primals, tangents, options):
    from tangent_kernels import softmax as kernels

    output, output_t = kernels.softmax_jvp(primals[0], tangents[0])
    return (output,), (output_t,), ()


def _triton_vjp(saved, grads, needs, options):
    from tangent_kernels import softmax as kernels

    return (kernels.softmax_vjp(saved[0], grads[0]),)


def _triton_second_vjp(primals, tangents, saved, grads, grads_t, needs, needs_t, options):
    from tangent_kernels import softmax as kernels

    both = (grads[0], grads_t[0])
    x, x_t = kernels.softmax_second_vjp(saved[0], tangents[0], both, (*needs, *needs_t))
    return (x,), (x_t,)


def _save(primals, outputs, statistics):
    return outputs


_OP = DualOp(
    function=lambda primals, options: (torch.softmax(primals[0], *options),),
    outputs=1,
    reference=Maps(
        jvp=_jvp,
        save=_save,
        vjp=lambda saved, grads, needs, options: (softmax_vjp(saved[0], grads[0], *options),),
    ),
    triton=Maps(_triton_jvp, _save, _triton_vjp, _triton_second_vjp),
)
