"""Scaled dot-product attention for plain and dual tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tangent_ops.errors import ArgumentError
from tangent_ops.ops.attention.eager import AttentionInParts
from tangent_ops.ops.attention.fused import fused_attention
from tangent_ops.ops.attention.path import Path, decide
from tangent_ops.ops.backend import Backend, autocast, no_autocast
from tangent_ops.ops.reference.attention import attention, attention_jvp


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` that also carries tangents.

    Without a tangent (and without ``backend``) this *is* PyTorch's function. With a tangent, inside
    ``torch.func.jvp`` or ``forward_ad.dual_level()``, it computes output and tangent together:

        S = s Q Kᵀ + b    P = softmax(S)    O = P V
        O_t = (P∘(S_t - μ)) V + P V_t       S_t = s (Q_t Kᵀ + Q K_tᵀ) + b_t    μ = Σ_j P∘S_t

    On CUDA Triton kernels do this in one pass, without an N x M matrix in memory; R tangents of one
    primal (``vmap`` over tangents, ``jacfwd``) share its scores and softmax. Kernels also compute
    gradients through value and tangent, and Hessian-vector products in both orders. Eager formulas
    compute head dimensions other than multiples of 8 up to 256, float64, jvp of jvp by the primal,
    and derivatives of third order. docs/nestings.md lists the nestings.

    Under autocast the operands are cast to its dtype first, as in PyTorch's function.

    Args:
        query: (..., Hq, N, D), floating point, plain or dual; N, D >= 1.
        key: (..., H, M, D), same dtype and device; M >= 1, Dv >= 1.
        value: (..., H, M, Dv), same dtype and device.
        attn_mask: boolean (True: attend) or additive, in float32 or query's dtype, broadcastable
            to (..., Hq, N, M); an additive mask may be dual. A row whose keys are all masked gives
            0. Neither a broadcast mask nor its gradient is expanded in memory.
        dropout_p: probability of dropping an attention weight, in [0, 1). Value and tangent drop
            the same weights, drawn from PyTorch's generator.
        is_causal: mask out later keys, aligned top left; not together with ``attn_mask``.
        scale: factor of the scores; 1/√D by default.
        enable_gqa: let Hq be a multiple of H.
        backend: "triton", "reference", or None to choose by device.

    Returns:
        (..., Hq, N, Dv) in the inputs' dtype, dual if an input is dual. For the Triton backend's
        output ``out.transpose(1, 2).reshape(B, N, H * Dv)`` is a view.

    Raises:
        ArgumentError: shapes, dtypes, devices or options that no backend supports.
        UnsupportedError: ``backend="triton"`` and the kernels do not compute this call, or do not
            compute a derivative with dropout; or the tensors are on CUDA and Triton is not
            installed.
    """
    query, key, value, attn_mask = autocast(query.device.type, query, key, value, attn_mask)
    _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    options = (dropout_p, is_causal, scale, enable_gqa)
    operands = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    path = decide(operands, dropout_p, backend)
    if path is Path.PYTORCH:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if path is Path.KERNELS or path is Path.KERNELS_RULE:
        unpack = path is Path.KERNELS
        return fused_attention(query, key, value, attn_mask, *options, unpack=unpack)
    with no_autocast(query.device.type):  # the operands are cast already
        if path is Path.FORMULA:
            return attention(query, key, value, attn_mask, *options)
        return _from_unpacked(path, operands, *options)


def _from_unpacked(
    path: Path,
    operands: tuple[Tensor, ...],
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    (query, query_t), (key, key_t), (value, value_t), *mask = map(forward_ad.unpack_dual, operands)
    attn_mask, attn_mask_t = mask[0] if mask else (None, None)
    primals, tangents = (query, key, value), (query_t, key_t, value_t)
    if path is Path.BLOCKS:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        pair = AttentionInParts.apply(*primals, *tangents, factor, is_causal)
    else:
        options = (dropout_p, is_causal, scale, enable_gqa)
        pair = attention_jvp(*primals, *tangents, attn_mask, attn_mask_t, *options)
    return forward_ad.make_dual(*pair)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if tensor.ndim < 2:
            raise ArgumentError(f"{name} is {_shape(tensor)}: expected (..., tokens, head_dim)")
        if not tensor.is_floating_point():
            raise ArgumentError(f"{name} is {tensor.dtype}: expected a floating-point dtype")
        if 0 in tensor.shape[-2:]:
            raise ArgumentError(f"{name} is {_shape(tensor)}: expected a token and a head_dim >= 1")
        if tensor.dtype != query.dtype:
            raise ArgumentError(
                f"{name} is {tensor.dtype} but query is {query.dtype}: cast them to one dtype"
            )
        if tensor.device != query.device:
            raise ArgumentError(f"{name} is on {tensor.device} but query is on {query.device}")
    if query.shape[-1] != key.shape[-1]:
        raise ArgumentError(
            f"query {_shape(query)} and key {_shape(key)} differ in head_dim (the last dimension)"
        )
    if key.shape[-2] != value.shape[-2]:
        raise ArgumentError(
            f"key {_shape(key)} and value {_shape(value)} differ in tokens (dimension -2)"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ArgumentError(f"dropout_p={dropout_p}: expected a probability in [0, 1)")
    _check_heads(query, key, value, enable_gqa)
    if attn_mask is not None:
        _check_mask(query, key, value, attn_mask, is_causal, enable_gqa)


def _check_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    if enable_gqa:
        if min(query.ndim, key.ndim, value.ndim) < 3:
            raise ArgumentError("enable_gqa=True needs a head dimension: (..., heads, tokens, D)")
        heads = [tensor.shape[-3] for tensor in (query, key, value)]
        if heads[1] != heads[2] or heads[1] == 0 or heads[0] % heads[1]:
            raise ArgumentError(
                f"enable_gqa=True with {heads[0]} query, {heads[1]} key and {heads[2]} value "
                "heads: expected equal key and value heads that divide the query heads"
            )
        return
    if query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return
    try:
        torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    except RuntimeError as error:
        raise ArgumentError(
            f"batch and heads of query {_shape(query)}, key {_shape(key)} and value "
            f"{_shape(value)} do not broadcast; for grouped heads pass enable_gqa=True"
        ) from error


def _check_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    if is_causal:
        raise ArgumentError("attn_mask and is_causal=True exclude each other: put both in the mask")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ArgumentError(f"attn_mask is {attn_mask.dtype}: expected bool or floating point")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise ArgumentError(
            f"attn_mask is {attn_mask.dtype} but query is {query.dtype}: "
            "cast it to query's dtype, or to float32 or bool"
        )
    if attn_mask.device != query.device:
        raise ArgumentError(f"attn_mask is on {attn_mask.device} but query is on {query.device}")
    lead = query.shape[:-2]
    if not enable_gqa:
        lead = torch.broadcast_shapes(lead, key.shape[:-2], value.shape[:-2])
    scores = (*lead, query.shape[-2], key.shape[-2])
    try:
        fits = torch.broadcast_shapes(attn_mask.shape, scores) == scores
    except RuntimeError:
        fits = False
    if not fits:
        raise ArgumentError(f"attn_mask {_shape(attn_mask)} does not broadcast to {scores}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
