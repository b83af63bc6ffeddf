"""RMS normalization, its tangent and its adjoint.

With r = 1/√(mean(x²) + ε), x̂ = r x and y = w∘x̂, over K elements:

    y_t = w∘(J x_t) + w_t∘x̂        J = ∂x̂/∂x = r (I - x̂ x̂ᵀ/K)

J is symmetric, so the adjoint uses the same product. 16-bit operands are computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float
) -> Tensor:
    """RMS normalization in plain operations, with derivatives of every order.

    PyTorch's own function is that on a CPU. On CUDA it is one kernel, whose backward pass has no
    forward-mode derivative (torch 2.14).

    Args:
        input: (..., *normalized_shape).
        normalized_shape: the trailing dimensions that are normalized together.
        weight: normalized_shape, or None for ones.
        eps: added under the root.
    """
    x = _wide(input)
    dims = tuple(range(-len(normalized_shape), 0))
    output = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    return (output if weight is None else output * weight).to(input.dtype)


def rms_norm_jvp(
    input: Tensor,
    weight: Tensor | None,
    eps: float,
    input_t: Tensor | None,
    weight_t: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS normalization over the last dimension, its tangent and 1/deviation.

    Args:
        input: (..., K).
        weight: (K,), or None for ones.
        eps: added under the root.
        input_t: tangent of ``input``, or None for zero.
        weight_t: tangent of ``weight``, or None for zero.

    Returns:
        The output and its tangent, both as ``input``; r, (..., 1), at least float32.
    """
    x = _wide(input)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normal = x * rstd
    output = normal if weight is None else normal * weight
    output_t = None if weight_t is None else normal * weight_t
    if input_t is not None:
        moved = _project(_wide(input_t), normal, rstd)
        moved = moved if weight is None else moved.mul_(weight)
        output_t = moved if output_t is None else output_t.add_(moved)
    assert output_t is not None
    return output.to(input.dtype), output_t.to(input.dtype), rstd


def rms_norm_vjp(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of RMS normalization by input and weight.

    Args:
        grad: cotangent of the output, as ``input``.
        input: (..., K).
        weight: (K,) or None.
        rstd: as :func:`rms_norm_jvp` returned it.
        needs: which of the two to compute; the other is None.
    """
    normal = _wide(input) * rstd
    cotangent = _wide(grad)
    x = w = None
    if needs[0]:
        into = cotangent if weight is None else cotangent * weight
        x = _project(into, normal, rstd).to(input.dtype)
    if needs[1]:
        assert weight is not None
        w = (cotangent * normal).sum_to_size(weight.shape).to(weight.dtype)
    return x, w


def _project(vector: Tensor, normal: Tensor, rstd: Tensor) -> Tensor:
    """J times a vector."""
    along = (normal * vector).mean(-1, keepdim=True)
    return (vector - normal * along) * rstd


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
