"""Softmax, its tangent y_t = y∘(x_t - Σ y∘x_t) and its adjoint, which is the same map."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_jvp(input: Tensor, input_t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Softmax over a dimension, and its tangent.

    Args:
        input: any shape.
        input_t: tangent of ``input``, same shape.
        dim: that sums to 1.
    """
    output = torch.softmax(input, dim)
    return output, softmax_vjp(output, input_t, dim)


def softmax_vjp(output: Tensor, grad: Tensor, dim: int) -> Tensor:
    """Gradient of softmax by its input: the Jacobian is symmetric.

    Args:
        output: the softmax.
        grad: cotangent of ``output``, same shape.
        dim: that sums to 1.
    """
    return torch.ops.aten._softmax_backward_data(grad, output, dim, output.dtype)
