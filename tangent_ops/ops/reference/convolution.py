"""Convolution, its tangent y_t = x_t ∗ W + x ∗ W_t + b_t, and the adjoint of that."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """How the kernel moves: one entry per spatial dimension, and the number of groups."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def convolution_jvp(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """A convolution and its tangent; products with an absent (None) tangent are not computed.

    PyTorch's own forward-mode rule convolves zeros where the input has no tangent: a third of
    the work of a patch embedding, and of any other first layer.

    Args:
        input: (B, K, *spatial).
        weight: (C, K / groups, *kernel).
        bias: (C,) or None.
        input_t: tangent of ``input`` or None for zero; the same for the next two.
        weight_t: tangent of ``weight``.
        bias_t: tangent of ``bias``.
        geometry: of the convolution.

    Returns:
        The output and its tangent, both (B, C, *spatial).
    """

    def convolve(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        stride, padding, dilation, groups = geometry
        none = [0] * len(stride)
        return torch.convolution(x, w, b, stride, padding, dilation, False, none, groups)

    output = convolve(input, weight, bias)
    if weight_t is not None:
        output_t = convolve(input, weight_t, bias_t)
        return output, output_t if input_t is None else output_t.add_(
            convolve(input_t, weight, None)
        )
    if input_t is not None:
        return output, convolve(input_t, weight, bias_t)
    assert bias_t is not None
    each = bias_t.view(-1, *[1] * len(geometry.stride))
    return output, each.expand_as(output).clone()


def convolution_vjp(
    input: Tensor,
    weight: Tensor,
    grad: Tensor,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a convolution by input, weight and bias.

    Args:
        input: (B, K, *spatial).
        weight: (C, K / groups, *kernel).
        grad: (B, C, *spatial), cotangent of the output.
        geometry: of the convolution.
        needs: which of the three to compute; the others are None.
    """
    stride, padding, dilation, groups = geometry
    none = [0] * len(stride)
    grads = torch.ops.aten.convolution_backward(
        grad,
        input,
        weight,
        [weight.shape[0]],
        stride,
        padding,
        dilation,
        False,
        none,
        groups,
        needs,
    )
    x, w, b = (one if need else None for one, need in zip(grads, needs, strict=True))
    return x, w, b
