"""Scaled dot-product attention and its tangent, as eager torch formulas.

With S = s Q Kᵀ + b, P = softmax(S), O = P V and a dot above meaning "tangent of" (suffix ``_t``):

    S_t = s (Q_t Kᵀ + Q K_tᵀ) + b_t        μ_i = Σ_j P_ij S_t,ij
    O_t = (P∘(S_t − μ)) V + P V_t  =  (P∘S_t) V + P V_t − μ∘O

Half-precision inputs are computed in float32 and rounded once, at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as in ``F.scaled_dot_product_attention``, with a derivative of every kind.

    Args:
        query: (..., Hq, N, D), any floating dtype.
        key: (..., H, M, D), same dtype.
        value: (..., H, M, Dv), same dtype.
        attn_mask: boolean (True: attend) or additive, broadcastable to (..., Hq, N, M).
        dropout_p: probability of dropping an attention weight.
        is_causal: mask out keys after the query's own position, aligned top left.
        scale: factor of the scores; 1/√D by default.
        enable_gqa: Hq may be a multiple of H.

    Returns:
        (..., Hq, N, Dv) in the inputs' dtype. A row whose keys are all masked is 0.
    """
    dtype = query.dtype
    query, key, value = _widen(query), _widen(key), _widen(value)
    key, value = _repeat_heads(query, key, value, enable_gqa)
    bias, allowed = _split_mask(query, key, attn_mask, is_causal)
    scores = (query * _scale(query, scale)) @ key.mT
    scores, dead = _hide(scores if bias is None else scores + bias, allowed, is_causal)
    # Softmax spelled out, as reverse mode over forward mode of `softmax` itself raises in PyTorch,
    # and divided by its sum last, where every derivative of that is N x Dv.
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    # By a factor: the rule of a quotient keeps its result, which a model may change in place.
    factor = weights.sum(-1, keepdim=True).reciprocal()
    output = (_drop(weights, dropout_p) @ value) * factor
    return (output if dead is None else output.masked_fill(dead, 0.0)).to(dtype)


def attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
    attn_mask: Tensor | None = None,
    attn_mask_t: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention and its tangent; products with an absent (None) tangent are not computed.

    Args:
        query: (..., Hq, N, D); see :func:`attention` for the other primal arguments.
        key: (..., H, M, D).
        value: (..., H, M, Dv).
        query_t: tangent of ``query``, same shape, or None for zero.
        key_t: tangent of ``key``, same shape, or None for zero.
        value_t: tangent of ``value``, same shape, or None for zero.
        attn_mask: boolean or additive mask.
        attn_mask_t: tangent of an additive mask, same shape, or None for zero.
        dropout_p: the same weights are dropped in the output and in its tangent.
        is_causal: see :func:`attention`.
        scale: see :func:`attention`.
        enable_gqa: see :func:`attention`.

    Returns:
        The output and its tangent, both (..., Hq, N, Dv) in the inputs' dtype.
    """
    dtype = query.dtype
    query, key, value = _widen(query), _widen(key), _widen(value)
    query_t, key_t, value_t = (None if t is None else _widen(t) for t in (query_t, key_t, value_t))
    bias, allowed = _split_mask(query, key, attn_mask, is_causal)
    bias_t = None if attn_mask_t is None else _widen(torch.atleast_2d(attn_mask_t))  # pyright: ignore[reportArgumentType]
    if key_t is not None:
        key_t, _ = _repeat_heads(query, key_t, key_t, enable_gqa)
    if value_t is not None:
        _, value_t = _repeat_heads(query, value_t, value_t, enable_gqa)
    key, value = _repeat_heads(query, key, value, enable_gqa)

    # One batch dimension, so that sums of products need no pass of their own (baddbmm).
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    factor = _scale(query, scale)
    q, k, v = (_flatten(x, lead) for x in (query * factor, key, value))
    q_t = None if query_t is None else _flatten(query_t * factor, lead)
    k_t, v_t = (None if t is None else _flatten(t, lead) for t in (key_t, value_t))

    scores = torch.bmm(q, k.mT)
    if bias is not None:
        scores = _add(scores, bias, lead)
    if allowed is not None:
        allowed = _flatten(allowed, lead)
    scores, dead = _hide(scores, allowed, is_causal)
    weights = scores.softmax(-1)
    if dead is not None:
        weights = weights.masked_fill(dead, 0.0)
    kept = _drop(weights, dropout_p)
    output = torch.bmm(kept, v)
    output_t = torch.zeros_like(output) if v_t is None else torch.bmm(kept, v_t)

    scores_t = _scores_tangent(q, k, q_t, k_t)
    if bias_t is not None:
        scores_t = torch.zeros_like(scores) if scores_t is None else scores_t
        scores_t = _add(scores_t, bias_t, lead)
    if scores_t is not None:
        weights_t = weights * scores_t  # their tangent, before its row's mean is taken off
        mean_t = weights_t.sum(-1, keepdim=True)
        kept_t = weights_t if kept is weights else kept * scores_t
        output_t = torch.baddbmm(output_t, kept_t, v) - mean_t * output
    shape = (*lead, *output.shape[-2:])
    # A copy: the model may change it in place, and the backward pass needs this one.
    return output.to(dtype, copy=True).reshape(shape), output_t.to(dtype).reshape(shape)


def _scores_tangent(q: Tensor, k: Tensor, q_t: Tensor | None, k_t: Tensor | None) -> Tensor | None:
    """Q_t Kᵀ + Q K_tᵀ, (B, N, M), or None where it is zero."""
    if q_t is None:
        return None if k_t is None else torch.bmm(q, k_t.mT)
    if k_t is None:
        return torch.bmm(q_t, k.mT)
    return torch.baddbmm(torch.bmm(q, k_t.mT), q_t, k.mT)


def _flatten(tensor: Tensor, lead: torch.Size) -> Tensor:
    """(..., rows, cols) as (B, rows, cols), where "..." broadcasts to ``lead``."""
    return tensor.expand(*lead, *tensor.shape[-2:]).reshape(-1, *tensor.shape[-2:])


def _add(scores: Tensor, bias: Tensor, lead: torch.Size) -> Tensor:
    """(B, N, M) plus a bias that broadcasts to (..., N, M), without expanding the bias."""
    return (scores.unflatten(0, lead) + bias).flatten(0, len(lead) - 1) if lead else scores + bias


def _hide(scores: Tensor, allowed: Tensor | None, is_causal: bool) -> tuple[Tensor, Tensor | None]:
    """Scores with -inf where not allowed, and the rows (..., N, 1) without a key, if any can be.

    The scores of such a row are 0, so that it has a softmax; the caller overwrites its result.
    """
    if allowed is None:
        return scores, None
    scores = scores.masked_fill(~allowed, float("-inf"))
    if is_causal:  # every row attends to the first key
        return scores, None
    dead = ~allowed.any(-1, keepdim=True)
    return scores.masked_fill(dead, 0.0), dead


def _split_mask(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The additive bias and the boolean "may attend" that a mask argument stands for."""
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        return None, torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        return None, None
    mask: Tensor = torch.atleast_2d(attn_mask)  # pyright: ignore[reportAssignmentType]
    if mask.dtype == torch.bool:
        return None, mask
    return _widen(mask), mask != float("-inf")


def _repeat_heads(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor]:
    if not enable_gqa or query.shape[-3] == key.shape[-3]:
        return key, value
    groups = query.shape[-3] // key.shape[-3]
    return key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)


def _drop(weights: Tensor, dropout_p: float) -> Tensor:
    """``weights`` with some entries dropped and the rest scaled by 1/(1 - p)."""
    if dropout_p == 0.0:
        return weights
    return weights * F.dropout(torch.ones_like(weights), dropout_p)


def _widen(tensor: Tensor) -> Tensor:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if half else tensor


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale
