"""The affine map for plain and dual tensors."""

# Operands come in tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from tangent_ops.ops.backend import Backend, autocast, in_forward_ad, why_not_in_float
from tangent_ops.ops.dual_op import DualOp, Maps, dual_output
from tangent_ops.ops.reference.linear import linear_jvp, linear_second_vjp, linear_vjp


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend | None = None
) -> Tensor:
    """``torch.nn.functional.linear`` whose tangent takes fewer passes over memory.

        y = x Wᵀ + b        y_t = x_t Wᵀ + x W_tᵀ + b_t

    By default PyTorch computes the three products and adds the tangent's two in place.
    ``backend="triton"`` is one launch that reads x once; kernels/README.md compares the two.
    :mod:`tangent_ops.functional` says which calls are computed here and which by PyTorch's own
    function.

    Args:
        input: (..., K), plain or dual.
        weight: (C, K), plain or dual.
        bias: (C,), plain or dual, or None; PyTorch computes a call with another shape.
        backend: "triton", or "reference" or None for PyTorch's products.

    Returns:
        (..., C), dual if an input is dual.

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
    found = dual_output(_OP, operands, (), backend or "reference", why_not)
    return F.linear(input, weight, bias) if found is None else found


def head_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map of its own to each head: y_h = W_h x_h + b_h.

    Torch function modes see the call, as they see ``F.linear``.

    Args:
        input: (..., H, K), plain or dual.
        weight: (H, C, K), plain or dual.
        bias: (H, C), plain or dual, or None.

    Returns:
        (..., H, C), dual if an input is dual.
    """
    if has_torch_function((input, weight)):
        return handle_torch_function(head_linear, (input, weight), input, weight, bias)
    rows = input.flatten(0, -3)  # (B, H, K)
    output = (rows.transpose(0, 1) @ weight.mT).transpose(0, 1)
    # Dynamo of torch 2.11 does not trace `unflatten` here.
    output = output.view(*input.shape[:-2], *output.shape[1:])
    return output if bias is None else output + bias


def _jvp(primals, tangents, options):
    return *linear_jvp(*primals, *tangents), ()


def _triton_jvp(primals, tangents, options):
    from tangent_kernels import linear as kernels

    return *kernels.linear_jvp(*primals, *tangents), ()


def _save(primals, output, statistics):
    return primals[:2]


def _vjp(saved, grad, needs, options):
    return linear_vjp(*saved, grad, needs)


def _second_vjp(primals, tangents, saved, grad, grad_t, needs, needs_t, options):
    return linear_second_vjp(*saved, *tangents[:2], grad, grad_t, needs, needs_t)


_OP = DualOp(
    function=lambda primals, options: F.linear(*primals),
    reference=Maps(_jvp, _save, _vjp),
    triton=Maps(_triton_jvp, _save, _vjp, _second_vjp),
)
