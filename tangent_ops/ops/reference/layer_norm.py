"""Layer normalization, its tangent and its adjoint, by PyTorch's own fused passes.

With x̂ = (x - mean(x)) / sqrt(var(x) + ε) and y = w∘x̂ + b:

    y_t = w∘(J x_t) + w_t∘x̂ + b_t        J = ∂x̂/∂x = rstd (I - 1 1ᵀ/K - x̂ x̂ᵀ/K)

J is symmetric, so J x_t is what PyTorch's backward pass without a weight returns for the
cotangent x_t; and w_t∘x̂ + b_t is a layer norm with w_t and b_t for weight and bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Layer normalization in plain operations, with derivatives of every order.

    PyTorch's own has none of its tangent by x that is right: mean and deviation are taken for
    constants there, without a word (reverse over forward, forward over forward; torch 2.14).

    Args:
        input: (..., *normalized_shape).
        normalized_shape: the trailing dimensions that are normalized together.
        weight: normalized_shape, or None for ones.
        bias: normalized_shape, or None for zeros.
        eps: added to the variance.
    """
    dims = tuple(range(-len(normalized_shape), 0))
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    x = x - x.mean(dims, keepdim=True)
    output = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        output = output * weight
    return (output if bias is None else output + bias).to(input.dtype)


def layer_norm_jvp(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    input_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``F.layer_norm``, its tangent and the statistics that its adjoint needs.

    Args:
        input: (..., *normalized_shape).
        normalized_shape: the trailing dimensions that are normalized together.
        weight: normalized_shape, or None for ones.
        bias: normalized_shape, or None for zeros.
        eps: added to the variance.
        input_t: tangent of ``input`` or None for zero; the same for the next two.
        weight_t: tangent of ``weight``.
        bias_t: tangent of ``bias``.

    Returns:
        The output and its tangent, both as ``input``; mean and 1/standard deviation of each row.
    """
    output, mean, rstd = torch.native_layer_norm(input, normalized_shape, weight, bias, eps)
    if weight_t is not None:
        output_t = torch.native_layer_norm(input, normalized_shape, weight_t, bias_t, eps)[0]
    elif bias_t is not None:
        output_t = bias_t.expand_as(output).clone()
    else:
        output_t = None
    if input_t is not None:
        mask = (True, False, False)
        x_t, *_ = _backward(input_t, input, normalized_shape, mean, rstd, None, None, mask)
        assert x_t is not None
        if output_t is None:
            output_t = x_t if weight is None else x_t.mul_(weight)
        else:
            output_t = output_t.add_(x_t) if weight is None else output_t.addcmul_(x_t, weight)
    assert output_t is not None
    return output, output_t, mean, rstd


def layer_norm_vjp(
    grad: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of ``F.layer_norm`` by input, weight and bias.

    Args:
        grad: cotangent of the output, as ``input``.
        input: (..., *normalized_shape).
        normalized_shape: as in :func:`layer_norm_jvp`.
        weight: normalized_shape or None.
        bias: normalized_shape or None.
        mean: as :func:`layer_norm_jvp` returned it.
        rstd: as :func:`layer_norm_jvp` returned it.
        needs: which of the three to compute; the others are None.
    """
    return _backward(grad, input, normalized_shape, mean, rstd, weight, bias, needs)


def _backward(grad, input, shape, mean, rstd, weight, bias, needs) -> Gradients:
    grads = torch.ops.aten.native_layer_norm_backward(
        grad, input, list(shape), mean, rstd, weight, bias, list(needs)
    )
    x, w, b = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return x, w, b
