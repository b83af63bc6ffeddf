"""SiLU, its tangent y_t = silu'(x) x_t and its adjoint, by PyTorch's own fused passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def silu_jvp(input: Tensor, input_t: Tensor) -> tuple[Tensor, Tensor]:
    """``F.silu`` and its tangent.

    Args:
        input: any shape.
        input_t: tangent of ``input``, same shape.
    """
    return F.silu(input), silu_vjp(input, input_t)


def silu_vjp(input: Tensor, grad: Tensor) -> Tensor:
    """Gradient of ``F.silu``: the derivative is diagonal, so it is the tangent's formula.

    Args:
        input: any shape.
        grad: cotangent of the output, same shape.
    """
    if torch.is_grad_enabled() and grad.requires_grad:  # PyTorch's pass is not differentiable
        gate = torch.sigmoid(input)
        return grad * (gate + input * gate * (1 - gate))
    return torch.ops.aten.silu_backward(grad, input)
