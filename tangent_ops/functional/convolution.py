"""Convolution for plain and dual tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tangent_ops.functional._backend import autocast, save_for_tangents, take_apart
from tangent_ops.reference.convolution import Geometry, convolution_jvp, convolution_vjp

Sizes = int | tuple[int, ...]


def convolution(
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: str | Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv1d``, ``F.conv2d`` or ``F.conv3d`` without products that an absent tangent makes 0.

        y = x ∗ W + b        y_t = x_t ∗ W + x ∗ W_t + b_t

    The gradients of the tangents are the ordinary ones, and primals alone are kept for them.
    Inside ``torch.func`` transforms and compiled code, or where gradients of x, W or b themselves
    are recorded, it is PyTorch's own function.

    Args:
        function: which of the three it is.
        input: (B, K, *spatial), plain or dual; without B it is PyTorch's own.
        weight: (C, K / groups, *kernel), plain or dual.
        bias: (C,), plain or dual, or None.
        stride: of the kernel.
        padding: zeros around the input; "same" and "valid" are PyTorch's own.
        dilation: of the kernel.
        groups: that channels fall into.

    Returns:
        (B, C, *spatial), dual if an input is.
    """
    apart = take_apart(input, weight, bias)
    if apart is None or isinstance(padding, str) or input.ndim != weight.ndim:
        return function(input, weight, bias, stride, padding, dilation, groups)
    each = functools.partial(_each, spatial=weight.ndim - 2)
    geometry = Geometry(each(stride), each(padding), each(dilation), groups)
    device = input.device.type
    primals, tangents = (autocast(device, *operands) for operands in apart)
    return forward_ad.make_dual(*_Convolution.apply(*primals, *tangents, geometry))


def _each(sizes: Sizes, spatial: int) -> list[int]:
    """One size for every spatial dimension."""
    if isinstance(sizes, int):
        return [sizes] * spatial
    return list(sizes) * (spatial if len(sizes) == 1 else 1)


class _Convolution(torch.autograd.Function):
    """convolution_jvp, differentiable by the tangents."""

    @staticmethod
    def forward(ctx, input, weight, bias, input_t, weight_t, bias_t, geometry):
        output, output_t = convolution_jvp(input, weight, bias, input_t, weight_t, bias_t, geometry)
        save_for_tangents(ctx, output, input, weight)
        ctx.geometry = geometry
        return output, output_t

    @staticmethod
    def backward(ctx, _, grad):
        if grad is None:
            return (None,) * 7
        input, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:6]
        return None, None, None, *convolution_vjp(input, weight, grad, ctx.geometry, needs), None
