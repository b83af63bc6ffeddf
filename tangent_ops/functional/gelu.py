"""GELU for plain and dual tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tangent_ops.functional._backend import save_for_tangents, take_apart
from tangent_ops.reference.gelu import gelu_jvp, gelu_vjp


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``torch.nn.functional.gelu``, which keeps no tangent for the backward pass.

        y = x Φ(x)        y_t = (Φ(x) + x φ(x)) x_t

    PyTorch's own rule keeps x_t beside x, for derivatives by x that a frozen x does not have.
    Inside ``torch.func`` transforms and compiled code, or where gradients of x itself are
    recorded, it is PyTorch's own function.

    Args:
        input: any shape, plain or dual.
        approximate: "none" or "tanh".

    Returns:
        As ``input``, dual if that is.
    """
    apart = take_apart(input)
    if apart is None:
        return F.gelu(input, approximate=approximate)
    (primal,), (tangent,) = apart
    return forward_ad.make_dual(*_Gelu.apply(primal, tangent, approximate))


class _Gelu(torch.autograd.Function):
    """gelu_jvp, differentiable by the tangent."""

    @staticmethod
    def forward(ctx, input, input_t, approximate):
        output, output_t = gelu_jvp(input, input_t, approximate)
        save_for_tangents(ctx, output, input)
        ctx.approximate = approximate
        return output, output_t

    @staticmethod
    def backward(ctx, _, grad):
        if grad is None:
            return None, None, None
        (input,) = ctx.saved_tensors
        return None, gelu_vjp(input, grad, ctx.approximate), None
