"""Convolution for plain and dual tensors."""

# Operands come in tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tangent_ops.ops.backend import autocast, in_forward_ad
from tangent_ops.ops.dual_op import DualOp, Maps, dual_outputs
from tangent_ops.ops.reference.convolution import Geometry, convolution_jvp, convolution_vjp

Sizes = int | tuple[int, ...]

_SPATIAL = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


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

    The gradients of the tangents are the ordinary ones, and primals alone are kept for them. What
    is computed here and what is left to PyTorch's own function is in
    :mod:`tangent_ops.functional`.

    Args:
        function: which of the three it is.
        input: (B, K, *spatial), plain or dual; without B, or elements, it is PyTorch's own.
        weight: (C, K / groups, *kernel), plain or dual.
        bias: (C,), plain or dual, or None.
        stride: of the kernel.
        padding: zeros around the input; "same" and "valid" are PyTorch's own.
        dilation: of the kernel.
        groups: that channels fall into.

    Returns:
        (B, C, *spatial), dual if an input is.
    """
    odd = not (input.ndim == weight.ndim == _SPATIAL[function] + 2 and input.numel())
    if not in_forward_ad() or isinstance(padding, str) or odd:
        return function(input, weight, bias, stride, padding, dilation, groups)
    operands = autocast(input.device.type, input, weight, bias)
    each = functools.partial(_each, spatial=weight.ndim - 2)
    geometry = Geometry(each(stride), each(padding), each(dilation), groups)
    found = dual_outputs(_OP, operands, (geometry,))
    return found[0] if found else function(input, weight, bias, stride, padding, dilation, groups)


def _each(sizes: Sizes, spatial: int) -> list[int]:
    """One size for every spatial dimension."""
    if isinstance(sizes, int):
        return [sizes] * spatial
    return list(sizes) * (spatial if len(sizes) == 1 else 1)


def _jvp(primals, tangents, options):
    output, output_t = convolution_jvp(*primals, *tangents, *options)
    return (output,), (output_t,), ()


def _function(primals, options):
    stride, padding, dilation, groups = options[0]
    none = [0] * len(stride)
    return (torch.convolution(*primals, stride, padding, dilation, False, none, groups),)


_OP = DualOp(
    function=_function,
    outputs=1,
    reference=Maps(
        jvp=_jvp,
        save=lambda primals, outputs, statistics: primals[:2],
        vjp=lambda saved, grads, needs, options: convolution_vjp(*saved, grads[0], *options, needs),
    ),
)
