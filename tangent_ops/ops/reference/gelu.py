"""GELU, its tangent y_t = gelu'(x) x_t and its adjoint, by PyTorch's own fused passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_jvp(input: Tensor, input_t: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """``F.gelu`` and its tangent.

    Args:
        input: any shape.
        input_t: tangent of ``input``, same shape.
        approximate: "none" or "tanh".
    """
    return F.gelu(input, approximate=approximate), gelu_vjp(input, input_t, approximate)


def gelu_vjp(input: Tensor, grad: Tensor, approximate: str) -> Tensor:
    """Gradient of ``F.gelu``: the derivative is diagonal, so it is the tangent's formula.

    Args:
        input: any shape.
        grad: cotangent of the output, same shape.
        approximate: "none" or "tanh".
    """
    return torch.ops.aten.gelu_backward(grad, input, approximate=approximate)
