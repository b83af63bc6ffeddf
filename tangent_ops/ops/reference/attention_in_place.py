"""Attention without a mask argument, its tangent and its adjoint, in few passes over memory.

The formulas are those of :mod:`tangent_ops.ops.reference.attention`, which take every option and
nest under every transform. These overwrite their intermediates, so they do neither (with ``out=``
where PyTorch's FlopCounterMode does not count the in-place form). With a cotangent G of O, or of
O_t (prefix ``grad_``):

    grad_V = Pᵀ G        grad_S = P∘(A - δ)        A = G Vᵀ        δ_i = Σ_j P_ij A_ij
    grad_Q = s grad_S K        grad_K = s grad_Sᵀ Q
"""

from __future__ import annotations

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
    scale: float,
    causal_from: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its tangent; products with an absent (None) tangent are not computed.

    Args:
        query: (B, N, D); B counts batch and heads.
        key: (B, M, D).
        value: (B, M, Dv).
        query_t: tangent of ``query`` or None for zero; the same for the next two.
        key_t: tangent of ``key``.
        value_t: tangent of ``value``.
        scale: factor of the scores.
        causal_from: None to attend to every key; else the position of the first query row, each of
            which attends to the keys up to its own position.

    Returns:
        The output and its tangent, both (B, N, Dv).
    """
    weights = _weights(query * scale, key, causal_from)
    output = torch.bmm(weights, value)
    output_t = torch.zeros_like(output) if value_t is None else torch.bmm(weights, value_t)
    if query_t is not None:
        scores_t = torch.bmm(query_t, key.mT)
        if key_t is not None:
            torch.baddbmm(scores_t, query, key_t.mT, out=scores_t)
    elif key_t is not None:
        scores_t = torch.bmm(query, key_t.mT)
    else:
        return output, output_t
    weights_t = scores_t.mul_(weights)  # over the scale, and before its row's mean is taken off
    torch.baddbmm(output_t, weights_t, value, alpha=scale, out=output_t)
    return output, output_t.addcmul_(weights_t.sum(-1, keepdim=True), output, value=-scale)


def attention_vjp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    scale: float,
    causal_from: int | None,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients by query, key and value, with the attention weights computed again.

    Args:
        query: (B, N, D); B counts batch and heads.
        key: (B, M, D).
        value: (B, M, Dv).
        grad: (B, N, Dv), cotangent of the output (or of its tangent).
        scale: factor of the scores.
        causal_from: as for :func:`attention_jvp`.
        needs: which of the three to compute; the others are None.
    """
    query = query * scale
    weights = _weights(query, key, causal_from)
    grad_value = torch.bmm(weights.mT, grad) if needs[2] else None
    if not needs[0] and not needs[1]:
        return None, None, grad_value
    # δ_i is Σ_j G_ij O_ij, too; but a model may have changed O in place.
    grad_scores = torch.bmm(grad, value.mT)
    grad_scores = torch.ops.aten._softmax_backward_data(grad_scores, weights, -1, weights.dtype)
    grad_query = torch.bmm(grad_scores, key).mul_(scale) if needs[0] else None
    grad_key = torch.bmm(grad_scores.mT, query) if needs[1] else None
    return grad_query, grad_key, grad_value


def _weights(query: Tensor, key: Tensor, causal_from: int | None) -> Tensor:
    scores = torch.bmm(query, key.mT)
    if causal_from is not None:
        corner = scores[..., causal_from:]  # the earlier keys are those of all rows
        later = torch.ones(corner.shape[1:], dtype=torch.bool, device=corner.device).triu_(1)
        corner.masked_fill_(later, float("-inf"))
    return scores.softmax(-1)
