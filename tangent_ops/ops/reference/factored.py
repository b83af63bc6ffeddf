"""Layers whose weight moves by W_t = L T R: the tangent, and its adjoint, without that product.

    linear       y_t = x_t Wᵀ + ((x Rᵀ) Tᵀ) Lᵀ + b_t
    convolution  y_t = x_t ∗ W + L ∗ (T ∗ (x ∗ R)) + b_t         T and L are 1 x 1 kernels

R and L are fixed; without L, T has the rows of W. The backward pass reads x Rᵀ, which has as many
columns as R has rows, and never x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from tangent_ops.ops.reference.convolution import Geometry, convolution_vjp
from tangent_ops.ops.reference.linear import no_view, rows_of

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def factored_linear_jvp(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    right: Tensor,
    left: Tensor | None,
    input_t: Tensor | None,
    bias_t: Tensor | None,
    trained_t: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``F.linear`` and its tangent.

    Args:
        input: (..., K).
        weight: (C, K).
        bias: (C,) or None.
        right: R, (r, K).
        left: L, (C, s), or None.
        input_t: tangent of ``input`` or None for zero.
        bias_t: tangent of ``bias`` or None for zero.
        trained_t: T, (C, r), or (s, r) with ``left``.

    Returns:
        The output and its tangent, both (..., C), and x Rᵀ, (rows, r).
    """
    output = F.linear(input, weight, bias)
    output = no_view(output, output.shape)
    few = F.linear(rows_of(input), right)
    if left is None:
        output_t = F.linear(few, trained_t, bias_t)
    else:
        output_t = F.linear(F.linear(few, trained_t), left, bias_t)
    if input_t is not None:
        # out= for addmm_, which PyTorch's FlopCounterMode does not count. A trace would lose it.
        out = None if get_proxy_mode() else output_t
        output_t = torch.addmm(output_t, rows_of(input_t), weight.T, out=out)
    return output, no_view(output_t, output.shape), few


def factored_linear_vjp(
    few: Tensor,
    weight: Tensor,
    left: Tensor | None,
    grad: Tensor,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of H·y_t by the tangents of input, bias and T.

    Args:
        few: x Rᵀ, (rows, r).
        weight: (C, K).
        left: L, (C, s), or None.
        grad: H, (..., C).
        needs: which of the three to compute; the others are None.
    """
    rows = rows_of(grad)
    outer = rows if left is None or not needs[2] else rows @ left
    return (
        (rows @ weight).view(*grad.shape[:-1], weight.shape[1]) if needs[0] else None,
        rows.sum(0) if needs[1] else None,
        outer.T @ few if needs[2] else None,
    )


def factored_convolution_jvp(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    right: Tensor,
    left: Tensor | None,
    input_t: Tensor | None,
    bias_t: Tensor | None,
    trained_t: Tensor,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution of one group and its tangent.

    Args:
        input: (B, K, *spatial).
        weight: (C, K, *kernel).
        bias: (C,) or None.
        right: R, (r, K * kernel).
        left: L, (C, s), or None.
        input_t: tangent of ``input`` or None for zero.
        bias_t: tangent of ``bias`` or None for zero.
        trained_t: T, (C, r), or (s, r) with ``left``.
        geometry: stride, padding, dilation and groups, which are 1.

    Returns:
        The output and its tangent, both (B, C, *spatial), and x ∗ R, (B, r, *spatial).
    """
    stride, padding, dilation, _ = geometry
    none = [0] * len(stride)

    def convolve(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return torch.convolution(x, w, b, stride, padding, dilation, False, none, 1)

    output = convolve(input, weight, bias)
    few = convolve(input, right.view(-1, *weight.shape[1:]))
    inner = few if left is None else by_pixel(few, trained_t, None)
    output_t = by_pixel(inner, trained_t if left is None else left, bias_t)
    return output, output_t if input_t is None else output_t + convolve(input_t, weight), few


def by_pixel(input: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution with a 1 x 1 kernel: (B, K, *spatial) by (C, K) to (B, C, *spatial)."""
    spatial = input.ndim - 2
    one, none = [1] * spatial, [0] * spatial
    kernel = matrix.reshape(*matrix.shape, *one)
    return torch.convolution(input, kernel, bias, one, none, one, False, none, 1)


def factored_convolution_vjp(
    few: Tensor,
    weight: Tensor,
    left: Tensor | None,
    like: Tensor,
    grad: Tensor,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of H·y_t by the tangents of input, bias and T.

    Args:
        few: x ∗ R, (B, r, *spatial).
        weight: (C, K, *kernel).
        left: L, (C, s), or None.
        like: any tensor of the input's shape; its values are not read.
        grad: H, (B, C, *spatial).
        geometry: stride, padding, dilation and groups, which are 1.
        needs: which of the three to compute; the others are None.
    """
    by_input = convolution_vjp(like, weight, grad, geometry, (needs[0], False, False))[0]
    by_trained = None
    if needs[2]:
        outer = torch.einsum("bc...,br...->cr", grad, few)
        by_trained = outer if left is None else left.T @ outer
    return by_input, grad.transpose(0, 1).flatten(1).sum(1) if needs[1] else None, by_trained
