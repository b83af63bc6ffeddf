"""Attention and its tangent in one online-softmax pass.

For each row i, over key tiles j, four sums share one rescaling by the running maximum:

    l   = Σ p          acc   = Σ p v
    mu  = Σ p S_t      acc_t = Σ p S_t v + p v_t          p = exp(S - max S)

    O = acc / l        O_t = acc_t / l - (mu / l) O       lse = max S + log l

O_t does not change when a row of S_t is shifted by a constant. S_t is shifted by its value at
the first key, which takes out the part common to all keys before p S_t is rounded to 16 bit.
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
def _accumulate(
    first,  # index of the first key of this tile
    q,  # (ROWS, DIM_PAD)
    q_t,  # (ROWS, DIM_PAD), anything without Q_T
    shift,  # (ROWS,) subtracted from each row of S_t
    acc,  # (ROWS, DIM_PAD)
    acc_t,  # (ROWS, DIM_PAD)
    row_max,  # (ROWS,), in units of log2
    row_sum,  # (ROWS,)
    mu,  # (ROWS,)
    k,  # (M, D) of this batch and head, likewise below
    v,
    k_t,
    v_t,
    k_stride,
    v_stride,
    k_t_stride,
    v_t_stride,
    keys,  # M
    scale,
    Q_T: tl.constexpr,
    K_T: tl.constexpr,
    V_T: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    COLS: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold one tile of COLS keys into the running sums."""
    k_tile = load_rows(k, first, k_stride, keys, COLS, DIM, DIM_PAD, TAIL)
    v_tile = load_rows(v, first, v_stride, keys, COLS, DIM, DIM_PAD, TAIL)
    scores = dot(q, k_tile.T, None, PRECISION) * (scale * LOG2_E)
    if TAIL:
        inside = (first + tl.arange(0, COLS)) < keys
        scores = tl.where(inside[None, :], scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    row_sum = row_sum * decay + tl.sum(p, 1)
    acc = acc * decay[:, None]
    acc = dot(p.to(v_tile.dtype), v_tile, acc, PRECISION)

    if Q_T or K_T or V_T:
        acc_t = acc_t * decay[:, None]
    if Q_T or K_T:
        scores_t = tl.zeros([q.shape[0], COLS], tl.float32)
        if Q_T:
            scores_t = dot(q_t, k_tile.T, scores_t, PRECISION)
        if K_T:
            k_t_tile = load_rows(k_t, first, k_t_stride, keys, COLS, DIM, DIM_PAD, TAIL)
            scores_t = dot(q, k_t_tile.T, scores_t, PRECISION)
        weighted = p * (scores_t * scale - shift[:, None])
        mu = mu * decay + tl.sum(weighted, 1)
        acc_t = dot(weighted.to(v_tile.dtype), v_tile, acc_t, PRECISION)
    if V_T:
        v_t_tile = load_rows(v_t, first, v_t_stride, keys, COLS, DIM, DIM_PAD, TAIL)
        acc_t = dot(p.to(v_tile.dtype), v_t_tile, acc_t, PRECISION)
    return acc, acc_t, new_max, row_sum, mu


@triton.jit
def attention_jvp_kernel(
    q,  # (B, H, N, D), last stride 1; likewise every operand
    k,  # (B, H, M, D)
    v,  # (B, H, M, D)
    q_t,  # (B, H, N, D), not read without Q_T
    k_t,  # (B, H, M, D), not read without K_T
    v_t,  # (B, H, M, D), not read without V_T
    o,  # (B, H, N, D)
    o_t,  # (B, H, N, D), strides of o; not written when there is no tangent
    lse,  # (B, H, N) float32, contiguous, natural logarithm
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    q_t_batch,
    q_t_head,
    q_t_row,
    k_t_batch,
    k_t_head,
    k_t_row,
    v_t_batch,
    v_t_head,
    v_t_row,
    o_batch,
    o_head,
    o_row,
    heads,  # H
    queries,  # N
    keys,  # M
    scale,
    Q_T: tl.constexpr,
    K_T: tl.constexpr,
    V_T: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes ROWS query rows of one batch element and head."""
    row_tiles = tl.cdiv(queries, ROWS)
    first_row = (tl.program_id(0) % row_tiles) * ROWS
    batch_head = tl.program_id(0) // row_tiles
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    q += b * q_batch + h * q_head
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    o += b * o_batch + h * o_head
    q_tile = load_rows(q, first_row, q_row, queries, ROWS, DIM, DIM_PAD, True)

    q_t_tile = q_tile
    shift = tl.zeros([ROWS], tl.float32)
    if Q_T:
        q_t += b * q_t_batch + h * q_t_head
        q_t_tile = load_rows(q_t, first_row, q_t_row, queries, ROWS, DIM, DIM_PAD, True)
        first_key = load_rows(k, 0, k_row, keys, 1, DIM, DIM_PAD, False)
        shift += tl.sum(q_t_tile.to(tl.float32) * first_key.to(tl.float32), 1)
    if K_T:
        k_t += b * k_t_batch + h * k_t_head
        first_key_t = load_rows(k_t, 0, k_t_row, keys, 1, DIM, DIM_PAD, False)
        shift += tl.sum(q_tile.to(tl.float32) * first_key_t.to(tl.float32), 1)
    if V_T:
        v_t += b * v_t_batch + h * v_t_head
    shift *= scale

    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    acc_t = tl.zeros([ROWS, DIM_PAD], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    mu = tl.zeros([ROWS], tl.float32)
    whole = (keys // COLS) * COLS
    for first in range(0, whole, COLS):
        acc, acc_t, row_max, row_sum, mu = _accumulate(
            first, q_tile, q_t_tile, shift, acc, acc_t, row_max, row_sum, mu,
            k, v, k_t, v_t, k_row, v_row, k_t_row, v_t_row, keys, scale,
            Q_T, K_T, V_T, DIM, DIM_PAD, COLS, False, PRECISION,
        )  # fmt: skip
    if whole < keys:
        acc, acc_t, row_max, row_sum, mu = _accumulate(
            whole, q_tile, q_t_tile, shift, acc, acc_t, row_max, row_sum, mu,
            k, v, k_t, v_t, k_row, v_row, k_t_row, v_t_row, keys, scale,
            Q_T, K_T, V_T, DIM, DIM_PAD, COLS, True, PRECISION,
        )  # fmt: skip

    acc = acc / row_sum[:, None]
    store_rows(o, first_row, o_row, queries, acc, ROWS, DIM, DIM_PAD)
    if Q_T or K_T or V_T:
        o_t += b * o_batch + h * o_head
        acc_t = acc_t / row_sum[:, None] - (mu / row_sum)[:, None] * acc
        store_rows(o_t, first_row, o_row, queries, acc_t, ROWS, DIM, DIM_PAD)
    rows = first_row + tl.arange(0, ROWS)
    lse += tl.cast(batch_head, tl.int64) * queries
    tl.store(lse + rows, row_max / LOG2_E + tl.log(row_sum), mask=rows < queries)


def forward_config(dim: int, dtype: torch.dtype, async_mma: bool) -> Config:
    """Tiles for a head dimension, chosen by the compiler's resource report.

    16-bit tiles spill no register, except 144 bytes where ``dim > 64`` and the matrix units read
    operands from registers (sm_80). float32 spills everywhere: right, and slow.
    """
    wide = padded_dim(dim) > 64
    if dtype == torch.float32:
        return Config(32, 16, 4, 1) if wide and not async_mma else Config(64, 16, 4, 1)
    if not wide:
        return Config(64, 32, 4, 2)
    return Config(64, 16, 4, 2) if async_mma else Config(128, 16, 8, 2)


def attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the fused forward pass.

    Args:
        query: (B, H, N, D), float16, bfloat16 or float32; D a multiple of 8 from 16 to 128.
        key: (B, H, M, D), same dtype.
        value: (B, H, M, D), same dtype.
        query_t: tangent of ``query`` or None for zero; the same for the next two.
        key_t: tangent of ``key``.
        value_t: tangent of ``value``.
        scale: factor of the scores.

    Returns:
        Output (B, H, N, D), its tangent (likewise, or (B, H, 0, D) if there is no tangent at all)
        and the log-sum-exp of the scores (B, H, N) in float32.
    """
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    query, key, value = map(unit_last_stride, (query, key, value))
    query_t, key_t, value_t = (
        None if t is None else unit_last_stride(t) for t in (query_t, key_t, value_t)
    )
    has_tangent = any(t is not None for t in (query_t, key_t, value_t))
    output = empty_heads(batch, heads, queries, dim, query)
    output_t = empty_heads(batch, heads, queries if has_tangent else 0, dim, query)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    if output.numel() == 0:
        return output, output_t, lse
    config = forward_config(dim, query.dtype, has_async_mma(query))
    with device_of(query):
        attention_jvp_kernel[(triton.cdiv(queries, config.rows) * batch * heads,)](
            query,
            key,
            value,
            query if query_t is None else query_t,
            key if key_t is None else key_t,
            value if value_t is None else value_t,
            output,
            output_t,
            lse,
            *outer_strides(query),
            *outer_strides(key),
            *outer_strides(value),
            *outer_strides(query_t),
            *outer_strides(key_t),
            *outer_strides(value_t),
            *outer_strides(output),
            heads,
            queries,
            keys,
            scale,
            Q_T=query_t is not None,
            K_T=key_t is not None,
            V_T=value_t is not None,
            **config.options(dim),
        )
    return output, output_t, lse
