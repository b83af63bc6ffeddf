"""The affine map for plain and dual tensors."""

# Operands come in tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tangent_ops.ops.backend import Backend, autocast, in_forward_ad, why_not_in_float
from tangent_ops.ops.dual_op import DualOp, Maps, dual_outputs
from tangent_ops.ops.reference.linear import linear_jvp, linear_second_vjp, linear_vjp


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend | None = None
) -> Tensor:
    """``torch.nn.functional.linear`` whose tangent takes fewer passes over memory.

        y = x Wᵀ + b        y_t = x_t Wᵀ + x W_tᵀ + b_t

    On every device these are PyTorch's own products, three, the tangent's two added in place;
    ``backend="triton"`` is one launch that reads x once (kernels/README.md compares them). What is
    computed here and what is left to PyTorch's own function is in :mod:`tangent_ops.functional`.

    Args:
        input: (..., K), plain or dual.
        weight: (C, K), plain or dual.
        bias: (C,), plain or dual, or None; of another shape the call is PyTorch's.
        backend: None for PyTorch's products; "triton" or "reference" insists.

    Returns:
        (..., C), dual if an input is.

    Raises:
        UnsupportedError: ``backend="triton"`` and the kernel does not compute this call.
    """
    odd = weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1])
    if not in_forward_ad() or odd:
        return F.linear(input, weight, bias)
    operands = autocast(input.device.type, input, weight, bias)
    if any(x is not None and x.dtype != operands[0].dtype for x in operands):
        return F.linear(input, weight, bias)
    why_not = why_not_in_float(operands[0]) or why_not_in_float(operands[1])
    found = dual_outputs(_OP, operands, (), backend or "reference", why_not)
    return found[0] if found else F.linear(input, weight, bias)


def _jvp(primals, tangents, options):
    output, output_t = linear_jvp(*primals, *tangents)
    return (output,), (output_t,), ()


def _triton_jvp(primals, tangents, options):
    from tangent_kernels import linear as kernels

    output, output_t = kernels.linear_jvp(*primals, *tangents)
    return (output,), (output_t,), ()


def _save(primals, outputs, statistics):
    return primals[:2]


def _vjp(saved, grads, needs, options):
    return linear_vjp(*saved, grads[0], needs)


def _second_vjp(primals, tangents, saved, grads, grads_t, needs, needs_t, options):
    return linear_second_vjp(*saved, *tangents[:2], grads[0], grads_t[0], needs, needs_t)


_OP = DualOp(
    function=lambda primals, options: (F.linear(*primals),),
    outputs=1,
    reference=Maps(_jvp, _save, _vjp),
    triton=Maps(_triton_jvp, _save, _vjp, _second_vjp),
)
