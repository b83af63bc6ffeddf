"""The affine map, its tangent y_t = x_t Wᵀ + x W_tᵀ + b_t, and the adjoint of that."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def linear_jvp(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``F.linear`` and its tangent; products with an absent (None) tangent are not computed.

    The second product is added to the first in place. PyTorch's own forward-mode rule writes both
    products, their sum, and the sum with b_t to memory.

    Args:
        input: (..., K).
        weight: (C, K).
        bias: (C,) or None.
        input_t: tangent of ``input`` or None for zero; the same for the next two.
        weight_t: tangent of ``weight``.
        bias_t: tangent of ``bias``.

    Returns:
        The output and its tangent, both (..., C).
    """
    output = F.linear(input, weight, bias)
    output = no_view(output, output.shape)
    if weight_t is None:
        if input_t is not None:
            return output, no_view(F.linear(input_t, weight, bias_t), output.shape)
        assert bias_t is not None
        return output, bias_t.expand_as(output).clone()
    output_t = F.linear(rows_of(input), weight_t, bias_t)
    if input_t is not None:
        # out= for addmm_, which PyTorch's FlopCounterMode does not count. A trace would lose it.
        out = None if get_proxy_mode() else output_t
        output_t = torch.addmm(output_t, rows_of(input_t), weight.T, out=out)
    return output, no_view(output_t, output.shape)


def linear_vjp(
    input: Tensor, weight: Tensor, grad: Tensor, needs: tuple[bool, bool, bool]
) -> Gradients:
    """Gradients of ``F.linear`` by input, weight and bias.

    Args:
        input: (..., K).
        weight: (C, K).
        grad: (..., C), cotangent of the output.
        needs: which of the three to compute; the others are None.

    Returns:
        (..., K), (C, K) and (C,), or None.
    """
    rows = rows_of(grad)
    return (
        (rows @ weight).view_as(input) if needs[0] else None,
        rows.T @ rows_of(input) if needs[1] else None,
        rows.sum(0) if needs[2] else None,
    )


def linear_second_vjp(
    input: Tensor,
    weight: Tensor,
    input_t: Tensor | None,
    weight_t: Tensor | None,
    grad: Tensor | None,
    grad_t: Tensor,
    needs: tuple[bool, bool, bool],
    needs_t: tuple[bool, bool, bool],
) -> tuple[Gradients, Gradients]:
    """Gradients of G·y + H·y_t by input, weight and bias, and by their tangents.

    Args:
        input: (..., K).
        weight: (C, K).
        input_t: tangent of ``input`` or None for zero.
        weight_t: tangent of ``weight`` or None for zero.
        grad: G, (..., C), or None for zero.
        grad_t: H, (..., C).
        needs: which of the three primal gradients to compute; the others are None.
        needs_t: the same for the tangents.
    """
    primal: list[Tensor | None] = [None] * 3
    if grad is not None:
        primal = list(linear_vjp(input, weight, grad, needs))
    # y_t contains W_t in the place of W, and x_t in the place of x; it does not contain the bias.
    if needs[0] and weight_t is not None:
        primal[0] = _sum(primal[0], linear_vjp(input, weight_t, grad_t, (True, False, False))[0])
    if needs[1] and input_t is not None:
        primal[1] = _sum(primal[1], linear_vjp(input_t, weight, grad_t, (False, True, False))[1])
    return (primal[0], primal[1], primal[2]), linear_vjp(input, weight, grad_t, needs_t)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None or other is None else one.add_(other)


def no_view(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The tensor in that shape, not as a view: a view from a Function cannot change in place."""
    return torch.ops.aten._unsafe_view(tensor, shape)


def rows_of(tensor: Tensor) -> Tensor:
    """(..., K) as (rows, K)."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
