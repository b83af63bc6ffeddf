"""The affine map, its tangent y_t = x_t Wᵀ + x W_tᵀ + b_t, and the adjoint of that."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_jvp(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``F.linear`` and its tangent; products with an absent (None) tangent are not computed.

    The tangent is written to memory once and added to in place: PyTorch's own forward-mode rule
    writes both products, their sum and the sum with b_t, one after the other.

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
    if weight_t is None:
        if input_t is not None:
            return output, F.linear(input_t, weight, bias_t)
        assert bias_t is not None
        return output, bias_t.expand_as(output).clone()
    output_t = F.linear(_rows(input), weight_t, bias_t)
    if input_t is not None:
        # out= for addmm_, which PyTorch's FlopCounterMode does not count.
        torch.addmm(output_t, _rows(input_t), weight.T, out=output_t)
    return output, output_t.view_as(output)


def linear_vjp(
    input: Tensor, weight: Tensor, grad: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``F.linear`` by input, weight and bias.

    Args:
        input: (..., K).
        weight: (C, K).
        grad: (..., C), cotangent of the output.
        needs: which of the three to compute; the others are None.

    Returns:
        (..., K), (C, K) and (C,), or None.
    """
    rows = _rows(grad)
    return (
        (rows @ weight).view_as(input) if needs[0] else None,
        rows.T @ _rows(input) if needs[1] else None,
        rows.sum(0) if needs[2] else None,
    )


def _rows(tensor: Tensor) -> Tensor:
    """(..., K) as (rows, K)."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
