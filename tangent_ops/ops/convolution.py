"""Convolutions of one to three dimensions for plain and dual tensors."""

# Operands come in tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tangent_ops.ops.backend import autocast, in_forward_ad
from tangent_ops.ops.dual_op import DualOp, Maps, dual_output
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
    """``F.conv1d``, ``F.conv2d`` or ``F.conv3d``, without the products of absent tangents.

        y = x ∗ W + b        y_t = x_t ∗ W + x ∗ W_t + b_t

    The gradients of the tangents are the ordinary ones, so only primals are saved.
    :mod:`tangent_ops.functional` says which calls are computed here and which by PyTorch's own
    function.

    Args:
        function: one of the three.
        input: (B, K, *spatial), plain or dual; without B, or empty, PyTorch computes the call.
        weight: (C, K / groups, *kernel), plain or dual.
        bias: (C,), plain or dual, or None.
        stride: step of the kernel.
        padding: zeros around the input; PyTorch computes "same" and "valid".
        dilation: distance between elements of the kernel.
        groups: number of channel groups.

    Returns:
        (B, C, *spatial), dual if an input is dual.
    """
    odd = not (input.ndim == weight.ndim == _SPATIAL[function] + 2 and input.numel())
    if not in_forward_ad() or isinstance(padding, str) or odd:
        return function(input, weight, bias, stride, padding, dilation, groups)
    operands = autocast(input.device.type, input, weight, bias)
    geometry = geometry_of(weight, stride, padding, dilation, groups)
    found = dual_output(_OP, operands, (geometry,))
    if found is None:
        return function(input, weight, bias, stride, padding, dilation, groups)
    return found


def geometry_of(
    weight: Tensor, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Geometry:
    """The options of a convolution with that weight, one number for every spatial dimension."""
    each = functools.partial(_each, spatial=weight.ndim - 2)
    return Geometry(each(stride), each(padding), each(dilation), groups)


def _each(sizes: Sizes, spatial: int) -> list[int]:
    """One size for every spatial dimension."""
    if isinstance(sizes, int):
        return [sizes] * spatial
    return list(sizes) * (spatial if len(sizes) == 1 else 1)


def _jvp(primals, tangents, options):
    return *convolution_jvp(*primals, *tangents, *options), ()


def _function(primals, options):
    stride, padding, dilation, groups = options[0]
    none = [0] * len(stride)
    return torch.convolution(*primals, stride, padding, dilation, False, none, groups)


_OP = DualOp(
    function=_function,
    reference=Maps(
        jvp=_jvp,
        save=lambda primals, output, statistics: primals[:2],
        vjp=lambda saved, grad, needs, options: convolution_vjp(*saved, grad, *options, needs),
    ),
)
