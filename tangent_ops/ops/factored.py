"""Linear layers and convolutions whose weight has the tangent L T R, in factors."""

# Operands come in tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tangent_ops.ops.backend import autocast, in_forward_ad
from tangent_ops.ops.convolution import Sizes, convolution, geometry_of
from tangent_ops.ops.dual_op import DualOp, Maps, dual_output
from tangent_ops.ops.linear import head_linear, linear
from tangent_ops.ops.reference.factored import (
    by_pixel,
    factored_convolution_jvp,
    factored_convolution_vjp,
    factored_linear_jvp,
    factored_linear_vjp,
)


class Factors(NamedTuple):
    """The tangent L T R of a weight (C, K), a matrix of its first dimension by all others.

    Attributes:
        trained: T, (C, r), or (s, r) with ``left``; in calls a tensor whose value is zero.
        right: R, (r, K), fixed.
        left: L, (C, s), fixed; None for the identity.
    """

    trained: Tensor
    right: Tensor
    left: Tensor | None = None

    def product(self, shape: torch.Size | None = None) -> Tensor:
        """L T R in that shape, computed in the factors' own dtype, also under autocast."""
        with torch.autocast(self.trained.device.type, enabled=False):
            inner = self.trained if self.left is None else self.left @ self.trained
            found = inner @ self.right
        return found if shape is None else found.view(shape)

    def gradient(self, by_weight: Tensor) -> Tensor:
        """The gradient by T, given that by the weight, (..., C, K): Lᵀ G Rᵀ."""
        inner = by_weight.to(self.right.dtype) @ self.right.T
        return inner if self.left is None else self.left.T @ inner

    def to(self, dtype: torch.dtype) -> Factors:
        left = None if self.left is None else self.left.to(dtype)
        return Factors(self.trained.to(dtype), self.right.to(dtype), left)


def factored_linear(input: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
    """``F.linear`` with the weight W + L T R, where T is zero and may have a tangent.

        y = x Wᵀ + b        y_t = x_t Wᵀ + ((x Rᵀ) T_tᵀ) Lᵀ + b_t

    Args:
        input: (..., K), plain or dual.
        weight: (C, K), plain.
        bias: (C,), plain or dual, or None.
        factors: of the weight.

    Returns:
        (..., C), dual if an input, the bias or T is dual.
    """
    trained, right, left = factors
    if in_forward_ad() and (bias is None or bias.shape == weight.shape[:1]):
        operands = autocast(input.device.type, input, weight, bias, right, left, trained)
        if all(x is None or x.dtype == operands[0].dtype for x in operands):
            found = dual_output(_LINEAR, operands, ())
            if found is not None:
                return found
    moved = F.linear(F.linear(input, right), trained)
    return linear(input, weight, bias) + (moved if left is None else F.linear(moved, left))


def factored_convolution(
    function: Callable[..., Tensor],
    factors: Factors,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
) -> Tensor:
    """``F.conv1d``, ``F.conv2d`` or ``F.conv3d`` of one group, likewise.

        y = x ∗ W + b        y_t = x_t ∗ W + L ∗ (T_t ∗ (x ∗ R)) + b_t

    Args:
        function: one of the three.
        factors: of the weight.
        input: (B, K, *spatial), plain or dual.
        weight: (C, K, *kernel), plain.
        bias: (C,), plain or dual, or None.
        stride: step of the kernel.
        padding: zeros around the input; numbers only.
        dilation: distance between elements of the kernel.

    Returns:
        (B, C, *spatial), dual if an input, the bias or T is dual.
    """
    trained, right, left = factors
    if in_forward_ad() and input.numel():
        operands = autocast(input.device.type, input, weight, bias, right, left, trained)
        geometry = geometry_of(weight, stride, padding, dilation, 1)
        if all(x is None or x.dtype == operands[0].dtype for x in operands):
            found = dual_output(_CONVOLUTION, operands, (geometry,))
            if found is not None:
                return found
    output = convolution(function, input, weight, bias, stride, padding, dilation)
    kernel = right.view(-1, *weight.shape[1:])
    few = function(input, kernel, None, stride, padding, dilation)
    return output + _by_pixels(few, trained, left)


def factored_head_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, transposed: bool
) -> Tensor:
    """:func:`tangent_ops.ops.linear.head_linear`, likewise.

    Args:
        input: (..., H, K), plain or dual.
        weight: (H, C, K), plain.
        bias: (H, C), plain or dual, or None.
        factors: of the weight: L (or T, without L) has a leading dimension of heads.
        transposed: whether they are those of the weight's ``mT``.
    """
    trained, right, left = factors
    steps = [_each_head(right), _each_head(trained), *([] if left is None else [_each_head(left)])]
    if transposed:
        steps = [step.mT for step in reversed(steps)]
    moved = input
    for step in steps:
        moved = head_linear(moved, step.expand(input.shape[-2], -1, -1))
    return head_linear(input, weight, bias) + moved


def _each_head(matrix: Tensor) -> Tensor:
    return matrix if matrix.ndim == 3 else matrix[None]


def _by_pixels(few: Tensor, trained: Tensor, left: Tensor | None) -> Tensor:
    moved = by_pixel(few, trained, None)
    return moved if left is None else by_pixel(moved, left, None)


def _linear_function(primals, options):
    input, weight, bias, right, left, trained = primals
    return factored_linear(input, weight, bias, Factors(trained, right, left))


def _linear_jvp(primals, tangents, options):
    output, output_t, few = factored_linear_jvp(
        *primals[:5], tangents[0], tangents[2], _trained_t(primals, tangents)
    )
    return output, output_t, (few,)


def _linear_vjp(saved, grad, needs, options):
    few, weight, *left = saved
    return _spread(factored_linear_vjp(few, weight, left[0], grad, _needs(needs)))


def _convolution_function(primals, options):
    stride, padding, dilation, _ = options[0]
    input, weight, bias, right, left, trained = primals
    function = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    factors = Factors(trained, right, left)
    return factored_convolution(function, factors, input, weight, bias, stride, padding, dilation)


def _convolution_jvp(primals, tangents, options):
    output, output_t, few = factored_convolution_jvp(
        *primals[:5], tangents[0], tangents[2], _trained_t(primals, tangents), *options
    )
    return output, output_t, (few,)


def _convolution_vjp(saved, grad, needs, options):
    few, weight, left, like = saved
    return _spread(factored_convolution_vjp(few, weight, left, like, grad, *options, _needs(needs)))


def _convolution_save(primals, output, statistics):
    like = primals[0].new_empty(()).expand(primals[0].shape)  # the shape, and one element
    return *statistics, primals[1], primals[4], like


def _trained_t(primals, tangents):
    return torch.zeros_like(primals[5]) if tangents[5] is None else tangents[5]


def _needs(needs):
    return needs[0], needs[2], needs[5]


def _spread(gradients):
    by_input, by_bias, by_trained = gradients
    return by_input, None, by_bias, None, None, by_trained


_LINEAR = DualOp(
    function=_linear_function,
    reference=Maps(
        _linear_jvp,
        lambda primals, output, statistics: (*statistics, primals[1], primals[4]),
        _linear_vjp,
    ),
)
_CONVOLUTION = DualOp(
    function=_convolution_function,
    reference=Maps(_convolution_jvp, _convolution_save, _convolution_vjp),
)
