"""The vector-Jacobian product of attention at the primal point.

It is the standard flash backward. Because the tangent O_t is linear in Q_t, K_t, V_t, the same
product with the cotangent H of O_t gives the gradients of the tangents (DESIGN: the backward of a
tangent transformer is the anchor's ordinary VJP):

    δ = Σ_d H∘O       grad_S = P∘(H Vᵀ - δ)
    grad_Q = s grad_S K       grad_K = s grad_Sᵀ Q       grad_V = Pᵀ H
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tangent_kernels._launch import (
    Config,
    device_of,
    empty_heads,
    has_async_mma,
    outer_strides,
    padded_dim,
    unit_last_stride,
)
from tangent_kernels.attention._tiles import LOG2_E, dot, load_rows, store_rows


@triton.jit
def _grad_query_tile(
    first,  # index of the first key of this tile
    q,  # (ROWS, DIM_PAD)
    grad_o,  # (ROWS, DIM_PAD)
    lse2,  # (ROWS,), in units of log2
    delta,  # (ROWS,)
    acc,  # (ROWS, DIM_PAD)
    k,  # (M, D) of this batch and head
    v,
    k_row,
    v_row,
    keys,
    scale,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    COLS: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add grad_S K of one tile of COLS keys."""
    # Keys past the end are zeros in k_tile, so whatever P is there adds nothing.
    k_tile = load_rows(k, first, k_row, keys, COLS, DIM, DIM_PAD, TAIL)
    v_tile = load_rows(v, first, v_row, keys, COLS, DIM, DIM_PAD, TAIL)
    scores = dot(q, k_tile.T, None, PRECISION) * (scale * LOG2_E)
    if TAIL:
        inside = (first + tl.arange(0, COLS)) < keys
        scores = tl.where(inside[None, :], scores, float("-inf"))
    p = tl.exp2(scores - lse2[:, None])
    grad_p = dot(grad_o, v_tile.T, None, PRECISION)
    grad_s = (p * (grad_p - delta[:, None])).to(k_tile.dtype)
    return dot(grad_s, k_tile, acc, PRECISION)


@triton.jit
def grad_query_kernel(
    q,  # (B, H, N, D), last stride 1; likewise every operand
    k,  # (B, H, M, D)
    v,  # (B, H, M, D)
    o,  # (B, H, N, D)
    lse,  # (B, H, N) float32, contiguous
    grad_o,  # (B, H, N, D)
    delta,  # (B, H, N) float32, contiguous; written here, read by the other kernel
    grad_q,  # (B, H, N, D), written if NEED_Q
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    o_batch,
    o_head,
    o_row,
    grad_o_batch,
    grad_o_head,
    grad_o_row,
    grad_q_batch,
    grad_q_head,
    grad_q_row,
    heads,
    queries,
    keys,
    scale,
    NEED_Q: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes δ, and grad_Q if asked for, of ROWS query rows."""
    row_tiles = tl.cdiv(queries, ROWS)
    first_row = (tl.program_id(0) % row_tiles) * ROWS
    batch_head = tl.program_id(0) // row_tiles
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    rows = first_row + tl.arange(0, ROWS)
    row_base = tl.cast(batch_head, tl.int64) * queries
    o += b * o_batch + h * o_head
    grad_o += b * grad_o_batch + h * grad_o_head
    o_tile = load_rows(o, first_row, o_row, queries, ROWS, DIM, DIM_PAD, True)
    g_tile = load_rows(grad_o, first_row, grad_o_row, queries, ROWS, DIM, DIM_PAD, True)
    delta_tile = tl.sum(o_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
    tl.store(delta + row_base + rows, delta_tile, mask=rows < queries)
    if NEED_Q:
        q += b * q_batch + h * q_head
        k += b * k_batch + h * k_head
        v += b * v_batch + h * v_head
        grad_q += b * grad_q_batch + h * grad_q_head
        q_tile = load_rows(q, first_row, q_row, queries, ROWS, DIM, DIM_PAD, True)
        lse2 = tl.load(lse + row_base + rows, mask=rows < queries, other=0.0) * LOG2_E
        acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
        whole = (keys // COLS) * COLS
        for first in range(0, whole, COLS):
            acc = _grad_query_tile(
                first, q_tile, g_tile, lse2, delta_tile, acc, k, v, k_row, v_row,
                keys, scale, DIM, DIM_PAD, COLS, False, PRECISION,
            )  # fmt: skip
        if whole < keys:
            acc = _grad_query_tile(
                whole, q_tile, g_tile, lse2, delta_tile, acc, k, v, k_row, v_row,
                keys, scale, DIM, DIM_PAD, COLS, True, PRECISION,
            )  # fmt: skip
        store_rows(grad_q, first_row, grad_q_row, queries, acc * scale, ROWS, DIM, DIM_PAD)


@triton.jit
def _grad_key_value_tile(
    first,  # index of the first query of this tile
    k,  # (COLS, DIM_PAD)
    v,  # (COLS, DIM_PAD)
    acc_k,  # (COLS, DIM_PAD)
    acc_v,  # (COLS, DIM_PAD)
    q,  # (N, D) of this batch and head
    grad_o,
    lse,  # (N,) of this batch and head
    delta,
    q_row,
    grad_o_row,
    queries,
    scale,
    NEED_K: tl.constexpr,
    NEED_V: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add grad_Sᵀ Q and Pᵀ H of one tile of ROWS queries; matrices here are transposed."""
    # Queries past the end are zeros in q_tile and g_tile: they add nothing.
    q_tile = load_rows(q, first, q_row, queries, ROWS, DIM, DIM_PAD, TAIL)
    g_tile = load_rows(grad_o, first, grad_o_row, queries, ROWS, DIM, DIM_PAD, TAIL)
    rows = first + tl.arange(0, ROWS)
    if TAIL:
        lse2 = tl.load(lse + rows, mask=rows < queries, other=0.0) * LOG2_E
    else:
        lse2 = tl.load(lse + rows) * LOG2_E
    scores = dot(k, q_tile.T, None, PRECISION) * (scale * LOG2_E)
    p = tl.exp2(scores - lse2[None, :])
    if NEED_V:
        acc_v = dot(p.to(g_tile.dtype), g_tile, acc_v, PRECISION)
    if NEED_K:
        if TAIL:
            delta_tile = tl.load(delta + rows, mask=rows < queries, other=0.0)
        else:
            delta_tile = tl.load(delta + rows)
        grad_p = dot(v, g_tile.T, None, PRECISION)
        grad_s = (p * (grad_p - delta_tile[None, :])).to(q_tile.dtype)
        acc_k = dot(grad_s, q_tile, acc_k, PRECISION)
    return acc_k, acc_v


@triton.jit
def grad_key_value_kernel(
    q,  # (B, H, N, D), last stride 1; likewise every operand
    k,  # (B, H, M, D)
    v,  # (B, H, M, D)
    lse,  # (B, H, N) float32, contiguous
    grad_o,  # (B, H, N, D)
    delta,  # (B, H, N) float32, contiguous
    grad_k,  # (B, H, M, D), written if NEED_K
    grad_v,  # (B, H, M, D), written if NEED_V
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    grad_o_batch,
    grad_o_head,
    grad_o_row,
    grad_k_batch,
    grad_k_head,
    grad_k_row,
    grad_v_batch,
    grad_v_head,
    grad_v_row,
    heads,
    queries,
    keys,
    scale,
    NEED_K: tl.constexpr,
    NEED_V: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes grad_K and grad_V of COLS keys."""
    col_tiles = tl.cdiv(keys, COLS)
    first_col = (tl.program_id(0) % col_tiles) * COLS
    batch_head = tl.program_id(0) // col_tiles
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    row_base = tl.cast(batch_head, tl.int64) * queries
    q += b * q_batch + h * q_head
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    grad_o += b * grad_o_batch + h * grad_o_head
    lse += row_base
    delta += row_base
    k_tile = load_rows(k, first_col, k_row, keys, COLS, DIM, DIM_PAD, True)
    v_tile = load_rows(v, first_col, v_row, keys, COLS, DIM, DIM_PAD, True)
    acc_k = tl.zeros([COLS, DIM_PAD], tl.float32)
    acc_v = tl.zeros([COLS, DIM_PAD], tl.float32)
    whole = (queries // ROWS) * ROWS
    for first in range(0, whole, ROWS):
        acc_k, acc_v = _grad_key_value_tile(
            first, k_tile, v_tile, acc_k, acc_v, q, grad_o, lse, delta, q_row, grad_o_row,
            queries, scale, NEED_K, NEED_V, DIM, DIM_PAD, ROWS, False, PRECISION,
        )  # fmt: skip
    if whole < queries:
        acc_k, acc_v = _grad_key_value_tile(
            whole, k_tile, v_tile, acc_k, acc_v, q, grad_o, lse, delta, q_row, grad_o_row,
            queries, scale, NEED_K, NEED_V, DIM, DIM_PAD, ROWS, True, PRECISION,
        )  # fmt: skip
    if NEED_K:
        grad_k += b * grad_k_batch + h * grad_k_head
        store_rows(grad_k, first_col, grad_k_row, keys, acc_k * scale, COLS, DIM, DIM_PAD)
    if NEED_V:
        grad_v += b * grad_v_batch + h * grad_v_head
        store_rows(grad_v, first_col, grad_v_row, keys, acc_v, COLS, DIM, DIM_PAD)


def grad_query_config(dim: int, dtype: torch.dtype, async_mma: bool) -> Config:
    """Tiles of grad_query_kernel; 16-bit ones spill no register on sm_80, sm_90 and sm_100."""
    wide = padded_dim(dim) > 64
    if dtype == torch.float32:
        return Config(32, 16, 4, 1) if wide and not async_mma else Config(64, 16, 4, 1)
    return Config(128, 16, 8, 2) if wide and not async_mma else Config(64, 32, 4, 2)


def grad_key_value_config(dim: int, dtype: torch.dtype, async_mma: bool) -> Config:
    """Tiles of grad_key_value_kernel; 16-bit ones spill no register, either."""
    wide = padded_dim(dim) > 64
    if dtype == torch.float32:
        return Config(16, 32, 4, 1) if wide and not async_mma else Config(16, 64, 4, 1)
    if not wide:
        return Config(32, 64, 4, 2)
    return Config(32, 64, 8, 2) if async_mma else Config(16, 128, 8, 2)


def attention_vjp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    scale: float,
    need_query: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward pass for those of query, key and value that need it.

    Args:
        query: (B, H, N, D), as in the forward pass.
        key: (B, H, M, D).
        value: (B, H, M, D).
        output: (B, H, N, D), of the forward pass.
        lse: (B, H, N) float32, of the forward pass.
        grad_output: (B, H, N, D), cotangent of the output, or of its tangent.
        scale: factor of the scores.
        need_query: whether to compute the first result; the next two likewise.
        need_key: the second.
        need_value: the third.

    Returns:
        Gradients of query, key and value (or of their tangents) in the inputs' dtype;
        one that is not needed has no rows, (B, H, 0, D).
    """
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    query, key, value, output, grad_output = map(
        unit_last_stride, (query, key, value, output, grad_output)
    )
    lse = lse.contiguous()
    grad_query = empty_heads(batch, heads, queries if need_query else 0, dim, query)
    grad_key = empty_heads(batch, heads, keys if need_key else 0, dim, query)
    grad_value = empty_heads(batch, heads, keys if need_value else 0, dim, query)
    if output.numel() == 0:
        return grad_query, grad_key.zero_(), grad_value.zero_()
    delta = torch.empty_like(lse)
    kind = (dim, query.dtype, has_async_mma(query))
    with device_of(query):
        if need_query or need_key:
            config = grad_query_config(*kind)
            grad_query_kernel[(triton.cdiv(queries, config.rows) * batch * heads,)](
                query,
                key,
                value,
                output,
                lse,
                grad_output,
                delta,
                grad_query,
                *outer_strides(query),
                *outer_strides(key),
                *outer_strides(value),
                *outer_strides(output),
                *outer_strides(grad_output),
                *outer_strides(grad_query),
                heads,
                queries,
                keys,
                scale,
                NEED_Q=need_query,
                **config.options(dim),
            )
        if need_key or need_value:
            config = grad_key_value_config(*kind)
            grad_key_value_kernel[(triton.cdiv(keys, config.cols) * batch * heads,)](
                query,
                key,
                value,
                lse,
                grad_output,
                delta,
                grad_key,
                grad_value,
                *outer_strides(query),
                *outer_strides(key),
                *outer_strides(value),
                *outer_strides(grad_output),
                *outer_strides(grad_key),
                *outer_strides(grad_value),
                heads,
                queries,
                keys,
                scale,
                NEED_K=need_key,
                NEED_V=need_value,
                **config.options(dim),
            )
    return grad_query, grad_key, grad_value
