"""The affine map for plain and dual tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tangent_ops.functional._backend import autocast, save_for_tangents, take_apart
from tangent_ops.reference.linear import linear_jvp, linear_vjp


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` whose tangent takes fewer passes over memory.

        y = x Wᵀ + b        y_t = x_t Wᵀ + x W_tᵀ + b_t

    The gradients of the tangents are the map's ordinary ones. Inside ``torch.func`` transforms
    and compiled code, or where gradients of x, W or b themselves are recorded, it is PyTorch's
    own function: its rules nest there, or the compiler fuses.

    Args:
        input: (..., K), plain or dual.
        weight: (C, K), plain or dual.
        bias: (C,), plain or dual, or None.

    Returns:
        (..., C), dual if an input is.
    """
    apart = take_apart(input, weight, bias)
    if apart is None or weight.ndim != 2:
        return F.linear(input, weight, bias)
    device = input.device.type
    primals, tangents = (autocast(device, *operands) for operands in apart)
    return forward_ad.make_dual(*_Linear.apply(*primals, *tangents))


class _Linear(torch.autograd.Function):
    """linear_jvp, differentiable by the tangents."""

    @staticmethod
    def forward(ctx, input, weight, bias, input_t, weight_t, bias_t):
        output, output_t = linear_jvp(input, weight, bias, input_t, weight_t, bias_t)
        save_for_tangents(ctx, output, input, weight)
        return output, output_t

    @staticmethod
    def backward(ctx, _, grad):
        if grad is None:
            return (None,) * 6
        input, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:6]
        return None, None, None, *linear_vjp(input, weight, grad, needs)
