"""Layer normalization for plain and dual tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tangent_ops.functional._backend import may_be_dual, save_for_tangents, take_apart
from tangent_ops.reference.layer_norm import layer_norm_jvp, layer_norm_vjp


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.layer_norm`` whose tangent takes three fused passes.

        y = w∘x̂ + b        y_t = w∘(J x_t) + w_t∘x̂ + b_t        J = ∂x̂/∂x

    The gradients of the tangents are the ordinary ones, in one pass. Inside ``torch.func``
    transforms, under autocast, with mixed dtypes or a bias alone, or where gradients of x, w or
    b themselves are recorded, the tangent is left to PyTorch's own rules.

    Args:
        input: (..., *normalized_shape), plain or dual.
        normalized_shape: the trailing dimensions that are normalized together.
        weight: normalized_shape, plain or dual, or None for ones.
        bias: normalized_shape, plain or dual, or None for zeros.
        eps: added to the variance.

    Returns:
        As ``input``, dual if an input is.
    """
    if torch.compiler.is_compiling() and any(map(may_be_dual, (input, weight, bias))):
        return _traceable(input, normalized_shape, weight, bias, eps)
    mixed = any(x is not None and x.dtype != input.dtype for x in (weight, bias))
    apart = take_apart(input, weight, bias)
    # PyTorch's backward pass with a bias alone is not differentiable once more.
    bias_alone = weight is None and bias is not None
    if apart is None or mixed or bias_alone or torch.is_autocast_enabled(input.device.type):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    primals, tangents = apart
    shape = tuple(normalized_shape)
    return forward_ad.make_dual(*_LayerNorm.apply(*primals, *tangents, shape, eps))


def _traceable(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``F.layer_norm``, which Dynamo cannot trace for a dual input with plain weights."""
    output = F.layer_norm(input, normalized_shape, eps=eps)
    if weight is not None:
        output = output * weight
    return output if bias is None else output + bias


class _LayerNorm(torch.autograd.Function):
    """layer_norm_jvp, differentiable by the tangents."""

    @staticmethod
    def forward(ctx, input, weight, bias, input_t, weight_t, bias_t, shape, eps):
        output, output_t, mean, rstd = layer_norm_jvp(
            input, shape, weight, bias, eps, input_t, weight_t, bias_t
        )
        save_for_tangents(ctx, output, input, weight, bias, mean, rstd)
        ctx.shape = shape
        return output, output_t

    @staticmethod
    def backward(ctx, _, grad):
        if grad is None:
            return (None,) * 8
        input, weight, bias, mean, rstd = ctx.saved_tensors
        grads = layer_norm_vjp(
            grad, input, ctx.shape, weight, bias, mean, rstd, ctx.needs_input_grad[3:6]
        )
        return None, None, None, *grads, None, None
