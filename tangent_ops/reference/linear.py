"""The affine map and its tangent: y_t = x_t Wᵀ + x W_tᵀ + b_t."""

from __future__ import annotations

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

    The second product is added in place: PyTorch's own forward-mode rule writes both, their sum
    and the sum with b_t to memory, one after the other.

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
    if weight_t is None and input_t is None:
        assert bias_t is not None
        return output, bias_t.expand_as(output).clone()
    if weight_t is None:
        assert input_t is not None
        return output, F.linear(input_t, weight, bias_t)
    output_t = F.linear(input, weight_t, bias_t)
    return output, output_t if input_t is None else output_t.add_(F.linear(input_t, weight))
