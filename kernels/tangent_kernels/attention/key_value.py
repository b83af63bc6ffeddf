"""Backward kernel by key and value; backward.py has the formulas."""

from __future__ import annotations

import triton
import triton.language as tl

from tangent_kernels.attention._adjoint import adjoints, weights
from tangent_kernels.attention._tiles import (
    LOG2_E,
    at,
    dot,
    dropout_at,
    load_numbers,
    load_rows,
    mask_at,
    store_rows,
    zero_sums,
)
from tangent_kernels.attention.backward import UNSPECIALIZED


@triton.jit
def _load_keys(
    source,  # rows (M, D)
    first,  # index of the tile's first key
    keys,
    COLS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """A (COLS, DIM_PAD) tile; past the end the last key again, so that P is at most 1 there."""
    cols = tl.minimum(first + tl.arange(0, COLS), keys - 1).to(tl.int64)
    dims = tl.arange(0, DIM_PAD)
    pointers = source[0] + cols[:, None] * source[1] + dims[None, :]
    if DIM_PAD != DIM:
        return tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _grad_key_value_tile(
    first,  # index of the first query of this tile
    head,  # of the queries
    r,  # tangent
    b,  # batch element
    k,  # (COLS, DIM_PAD)
    k_t,
    v,  # (COLS, DV_PAD)
    v_t,
    acc_k,  # (COLS, DIM_PAD), for grad_K if NEED_K, likewise below
    acc_k_t,
    acc_v,  # (COLS, DV_PAD)
    acc_v_t,
    q,  # operands
    q_t,
    g,
    h,
    lse,
    mu,
    delta,
    epsilon,
    mask,
    mask_strides,
    mask_t,
    mask_t_strides,
    seed,
    cols,  # (COLS,)
    batch,
    heads,
    queries,
    keys,
    scale,
    dropout_p,
    checked,  # whether the tile may lie on the diagonal of a causal mask
    SECOND: tl.constexpr,
    NEED_K: tl.constexpr,
    NEED_K_T: tl.constexpr,
    NEED_V: tl.constexpr,
    NEED_V_T: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one tile of ROWS queries to the sums; tiles of scores here are (COLS, ROWS)."""
    rows = first + tl.arange(0, ROWS)
    row_base = (b * heads + head) * queries
    tangent_base = r * batch * heads * queries + row_base
    q_tile = load_rows(at(q, 0, b, head), first, queries, ROWS, DIM, DIM_PAD, True)
    h_tile = load_rows(at(h, r, b, head), first, queries, ROWS, DV, DV_PAD, True)
    if SECOND:
        if q_t is not None:
            q_t_tile = load_rows(at(q_t, r, b, head), first, queries, ROWS, DIM, DIM_PAD, True)
        if g is not None:
            g_tile = load_rows(at(g, 0, b, head), first, queries, ROWS, DV, DV_PAD, True)
    scores = dot(k, q_tile.T, None, PRECISION)
    lse2 = load_numbers(lse + row_base, first, queries, 0.0, ROWS, True)[None, :] * LOG2_E
    scores_t = None
    mu_tile = None
    epsilon_tile = None
    mask_t_part = None
    if SECOND:
        scores_t = tl.zeros(scores.shape, tl.float32)
        if k_t is not None:
            scores_t = dot(k_t, q_tile.T, scores_t, PRECISION)
        if q_t is not None:
            scores_t = dot(k, q_t_tile.T, scores_t, PRECISION)
        if mu is not None:
            mu_base = mu + tangent_base
            mu_tile = load_numbers(mu_base, first, queries, 0.0, ROWS, True)[None, :]
        mask_t_part = mask_at(mask_t, mask_t_strides, r, b, head)
    mask_part = mask_at(mask, mask_strides, 0, b, head)
    dropout = dropout_at(seed, b, head, dropout_p)
    p, p_kept, p_t, centred, keep = weights(
        scores, scores_t, lse2, mu_tile, mask_part, mask_t_part, dropout, rows[None, :],
        cols[:, None], queries, keys, scale, checked, SECOND, BOOLEAN, CAUSAL,
    )  # fmt: skip
    if NEED_V_T:
        acc_v_t = dot(p_kept.to(h_tile.dtype), h_tile, acc_v_t, PRECISION)
    if NEED_V:
        if SECOND and g is not None:
            acc_v = dot(p_kept.to(h_tile.dtype), g_tile, acc_v, PRECISION)
        if mu is not None:
            acc_v = dot(p_t.to(h_tile.dtype), h_tile, acc_v, PRECISION)
    if NEED_K or NEED_K_T:
        grad_p = dot(v, h_tile.T, None, PRECISION)
        delta_base = delta + tangent_base
        delta_tile = load_numbers(delta_base, first, queries, 0.0, ROWS, True)[None, :]
        epsilon_tile = None
        if SECOND:
            epsilon_base = epsilon + tangent_base
            epsilon_tile = load_numbers(epsilon_base, first, queries, 0.0, ROWS, True)[None, :]
        grad_s_t, grad_s = adjoints(
            p, centred, keep, mu, dropout, grad_p, delta_tile, epsilon_tile, SECOND
        )
        grad_s_t = grad_s_t.to(q_tile.dtype)
        if NEED_K_T:
            acc_k_t = dot(grad_s_t, q_tile, acc_k_t, PRECISION)
        if NEED_K:
            if SECOND and (g is not None or v_t is not None):
                grad_p_t = tl.zeros(scores.shape, tl.float32)
                if g is not None:
                    grad_p_t = dot(v, g_tile.T, grad_p_t, PRECISION)
                if v_t is not None:
                    grad_p_t = dot(v_t, h_tile.T, grad_p_t, PRECISION)
                grad_s += p_kept * grad_p_t
            if SECOND and q_t is not None:
                acc_k = dot(grad_s_t, q_t_tile, acc_k, PRECISION)
            acc_k = dot(grad_s.to(q_tile.dtype), q_tile, acc_k, PRECISION)
    return acc_k, acc_k_t, acc_v, acc_v_t


@triton.jit(do_not_specialize=UNSPECIALIZED)
def grad_key_value_kernel(
    q,  # see grad_query_kernel for the operands
    k,
    v,
    mask,
    mask_b,
    mask_h,
    mask_row,
    q_t,
    k_t,
    v_t,
    mask_t,
    mask_t_r,
    mask_t_b,
    mask_t_h,
    mask_t_row,
    seed,
    lse,
    mu,
    g,
    h,
    delta,  # (R, B, H, N) float32, written by grad_query_kernel
    epsilon,
    grad_k,  # operand (R, B, H / shared, M, D) or None: written if needed
    grad_k_t,
    grad_v,  # operand (R, B, H / shared, M, DV) or None
    grad_v_t,
    first_tangent,
    batch,
    heads,
    shared,
    queries,
    keys,
    scale,
    dropout_p,
    GROUPED: tl.constexpr,  # whether several query heads share a key head
    SECOND: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes the gradients of COLS keys and values of one key head.

    It sums over the query heads that share this head in a fixed order, without atomics, so the
    result has the same bits in every run.
    """
    mask_strides = (0, mask_b, mask_h, mask_row)
    mask_t_strides = (mask_t_r, mask_t_b, mask_t_h, mask_t_row)
    col_tiles = tl.cdiv(keys, COLS)
    first_col = (tl.program_id(0) % col_tiles) * COLS
    batch_key_head = tl.program_id(0) // col_tiles
    key_heads = heads // shared
    r = (first_tangent + tl.program_id(1)).to(tl.int64)
    b = (batch_key_head // key_heads).to(tl.int64)
    key_head = (batch_key_head % key_heads).to(tl.int64)
    cols = first_col + tl.arange(0, COLS)

    k_tile = _load_keys(at(k, 0, b, key_head), first_col, keys, COLS, DIM, DIM_PAD)
    v_tile = load_rows(at(v, 0, b, key_head), first_col, keys, COLS, DV, DV_PAD, True)
    k_t_tile = None
    v_t_tile = None
    if SECOND:
        if k_t is not None:
            k_t_rows = at(k_t, r, b, key_head)
            k_t_tile = load_rows(k_t_rows, first_col, keys, COLS, DIM, DIM_PAD, True)
        if v_t is not None:
            v_t_rows = at(v_t, r, b, key_head)
            v_t_tile = load_rows(v_t_rows, first_col, keys, COLS, DV, DV_PAD, True)
    acc_k = zero_sums(grad_k, COLS, DIM_PAD)
    acc_k_t = zero_sums(grad_k_t, COLS, DIM_PAD)
    acc_v = zero_sums(grad_v, COLS, DV_PAD)
    acc_v_t = zero_sums(grad_v_t, COLS, DV_PAD)

    # Queries past the end are rows of zeros, which add nothing.
    # Under a causal mask queries before `low` attend to none of the keys.
    low = 0
    if CAUSAL:
        low = (first_col // ROWS) * ROWS
    # One loop over the tiles of all query heads: in nested loops Triton would keep the addresses
    # of every tile in registers.
    first = low
    head = key_head * shared
    for _ in range(0, shared * tl.cdiv(tl.maximum(queries - low, 0), ROWS)):
        checked = False
        if CAUSAL:
            checked = first < first_col + COLS - 1
        acc_k, acc_k_t, acc_v, acc_v_t = _grad_key_value_tile(
            first, head, r, b, k_tile, k_t_tile, v_tile, v_t_tile,
            acc_k, acc_k_t, acc_v, acc_v_t, q, q_t, g, h, lse, mu, delta, epsilon,
            mask, mask_strides, mask_t, mask_t_strides, seed, cols, batch, heads, queries, keys,
            scale, dropout_p, checked, SECOND, grad_k is not None, grad_k_t is not None,
            grad_v is not None, grad_v_t is not None, BOOLEAN, CAUSAL,
            DIM, DIM_PAD, DV, DV_PAD, ROWS, PRECISION,
        )  # fmt: skip
        first += ROWS
        if GROUPED and first >= queries:
            first = low
            head += 1
    if grad_k is not None:
        target = at(grad_k, r, b, key_head)
        store_rows(target, first_col, keys, acc_k * scale, COLS, DIM, DIM_PAD)
    if grad_k_t is not None:
        target = at(grad_k_t, r, b, key_head)
        store_rows(target, first_col, keys, acc_k_t * scale, COLS, DIM, DIM_PAD)
    if grad_v is not None:
        store_rows(at(grad_v, r, b, key_head), first_col, keys, acc_v, COLS, DV, DV_PAD)
    if grad_v_t is not None:
        store_rows(at(grad_v_t, r, b, key_head), first_col, keys, acc_v_t, COLS, DV, DV_PAD)
